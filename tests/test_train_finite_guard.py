"""Numbers that are not finite reach neither the weights nor the disk; the run stops and names the step."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.train_tiny import assert_same_run, metrics, tiny_values, write_pairs
from tests.two_processes import run_two
from vlmkernels.cli import main
from vlmkernels.train import TrainConfig, checkpoint, finite_guard, loop, train
from vlmkernels.train.kinds._captioning import Captioning
from vlmkernels.train.kinds._contrastive import Contrastive

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = {"clip": Contrastive, "simvlm": Captioning, "lm": Captioning}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def spoil(monkeypatch, kind, step, spoilt):
    """The loss of a step (from 1) becomes ``spoilt(loss)``."""
    original = TASKS[kind].loss

    def loss(self, model, batch, number, measured):
        value, measure = original(self, model, batch, number, measured)
        return (spoilt(value) if number + 1 == step else value), measure

    monkeypatch.setattr(TASKS[kind], "loss", loss)


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.inf


SPOILT = {
    "nan": (lambda loss: loss * torch.nan, "the loss is nan at step 6"),
    "inf": (lambda loss: loss * torch.inf, "the loss is inf at step 6"),
    "nan, a finite gradient": (lambda loss: loss + torch.nan, "the loss is nan at step 6"),
    "a gradient of inf": (_InfiniteGradient.apply, "the norm of the gradient is (inf|nan) at step 6"),
}


def on_the_device(monkeypatch):
    """The guard as on accelerators, on the CPU, whose fused optimizers heed found_inf as well."""
    original = finite_guard.FiniteGuard.__init__

    def init(self, *arguments, **options):
        original(self, *arguments, **options)
        self.at_once = False

    monkeypatch.setattr(finite_guard.FiniteGuard, "__init__", init)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "read later"])
@pytest.mark.parametrize("fault", SPOILT)
@pytest.mark.parametrize(("kind", "optimizer"), [("clip", "adamw"), ("clip", "sgd"), ("simvlm", "adamw")])
def test_one_bad_step_stops_the_run_and_reaches_nothing(
    table, tmp_path, monkeypatch, caplog, kind, optimizer, fault, deferred
):
    values = tiny_values(table, tmp_path / "run", kind, optimizer=optimizer, grad_clip=float(not deferred))
    values |= {"log_every": 5, "save_every": 4, "ema_decay": 0.9}
    runs = []
    original = loop.Run.execute
    monkeypatch.setattr(loop.Run, "execute", lambda run: (runs.append(run), original(run))[1])
    train(kind, TrainConfig(**{**values, "out": str(tmp_path / "five"), "max_steps": 5}))
    spoilt, message = SPOILT[fault]
    spoil(monkeypatch, kind, 6, spoilt)
    if deferred:
        on_the_device(monkeypatch)
    with pytest.raises(FloatingPointError, match=f"{message}; lower lr or raise warmup_steps"):
        train(kind, TrainConfig(**values))
    five, stopped = (run.bare.state_dict() for run in runs)
    learned = [name for name, _ in runs[0].bare.named_parameters()]
    assert all(stopped[name].equal(five[name]) for name in learned)
    assert runs[1].step == (8 if deferred else 5)  # saving after step 8 reads the guard
    assert [line["step"] for line in metrics(tmp_path / "run")] == [5]
    (kept,) = checkpoint.checkpoints(tmp_path / "run")
    assert checkpoint.load(kept)["step"] == 4
    assert not (tmp_path / "run" / "final").exists()
    assert f"the last good checkpoint, of step 4, is {kept}" in caplog.text


def test_a_run_that_was_stopped_goes_on_bit_for_bit(table, tmp_path, monkeypatch):
    values = tiny_values(table, tmp_path / "whole")
    train("clip", TrainConfig(**values))
    values |= {"out": str(tmp_path / "cut"), "save_every": 2, "resume": "auto"}
    with monkeypatch.context() as patch:
        spoil(patch, "clip", 6, lambda loss: loss * torch.nan)
        for _ in range(2):
            with pytest.raises(FloatingPointError, match="the loss is nan at step 6"):
                train("clip", TrainConfig(**values))
    train("clip", TrainConfig(**values))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_the_loss_on_logged_steps_alone_is_not_enough(table, tmp_path, capsys):
    values = tiny_values(table, tmp_path / "run")
    flags = {"lr": 1e30, "log-every": 7, "save-every": 2, "keep": 2, "data": table, "out": tmp_path / "run"}
    flags |= {name: values[name] for name in ("batch_size", "epochs")} | {
        "model-options": values["model_options"]
    }
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    with pytest.raises(SystemExit) as error:
        main(["train", "clip", *arguments, "--no-progress", "--no-tensorboard"])
    assert error.value.code == 1
    told = capsys.readouterr().err
    assert "Error: the loss is" in told or "Error: the norm of the gradient is" in told
    assert "Traceback" not in told
    for folder in checkpoint.checkpoints(tmp_path / "run"):
        finite_guard.check_finite(0, state=checkpoint.load(folder))
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weights_are_looked_at_before_they_are_saved(table, tmp_path, optimizer):
    values = tiny_values(table, tmp_path / "run", lr=1e300, warmup_steps=0, optimizer=optimizer, max_steps=1)
    with pytest.raises(FloatingPointError, match=r"not finite after step 1: model\.\S+, .* more; lower lr"):
        train("clip", TrainConfig(**values))
    assert checkpoint.checkpoints(tmp_path / "run") == []
    assert not (tmp_path / "run" / "final").exists()


def test_an_infinite_learning_rate_is_refused(table, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["train", "clip", "--lr", "inf", "--data", str(table), "--out", str(tmp_path / "run")])
    assert error.value.code == 2
    assert "lr must be finite, got inf" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_check_finite_names_what_is_not():
    good = {"a": torch.ones(2), "n": 3, "ids": torch.arange(3), "list": [torch.zeros(())], "none": None}
    finite_guard.check_finite(1, model=good)
    good["list"].append({"b": torch.tensor([1.0, torch.inf])})
    with pytest.raises(FloatingPointError, match=r"not finite after step 7: model\.list\.1\.b; lower lr"):
        finite_guard.check_finite(7, model=good)


class Scaled:
    """A line learned in float16's way: a gradient scaler, whose loss or gradient a test spoils."""

    def __init__(self):
        self.line = nn.Linear(3, 1)
        self.optimizer = torch.optim.AdamW(self.line.parameters(), lr=0.1, fused=True)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)
        self.guard = finite_guard.FiniteGuard(self.optimizer, torch.device("cpu"), 0, scaled=True)
        self.guard.at_once = False

    def step(self, loss_by=1.0, gradient_by=1.0):
        loss = self.line(torch.ones(2, 3)).square().mean() * loss_by
        self.scaler.scale(loss).backward()
        for parameter in self.line.parameters():
            parameter.grad *= gradient_by
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.line.parameters()])
        self.guard.check(loss, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def weights(self):
        return [p.detach().clone() for p in self.line.parameters()]


def test_a_gradient_beyond_the_scale_is_skipped_by_the_scaler():
    run = Scaled()
    for gradient in (1.0, torch.inf, torch.nan, 1.0):
        before, scale = run.weights(), run.scaler.get_scale()
        run.step(gradient_by=gradient)
        same = all(a.equal(b) for a, b in zip(before, run.weights(), strict=True))
        assert same == (gradient != 1.0)
        assert run.scaler.get_scale() == (scale if gradient == 1.0 else scale / 2)
    run.guard.read()


def test_a_loss_that_is_not_finite_stops_a_scaled_run():
    run = Scaled()
    run.step()
    before = run.weights()
    run.step(loss_by=torch.nan)
    run.step()
    assert all(a.equal(b) for a, b in zip(before, run.weights(), strict=True))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        run.guard.read()


def test_a_gradient_beyond_every_scale_stops_the_run():
    run = Scaled()
    run.step()
    for _ in range(finite_guard.TRIES - 1):
        run.step(gradient_by=torch.inf)
    run.guard.read()
    run.step(gradient_by=torch.inf)
    before = run.weights()
    run.step()
    assert all(a.equal(b) for a, b in zip(before, run.weights(), strict=True))
    with pytest.raises(
        FloatingPointError, match=f"the norm of the gradient is inf at step {finite_guard.TRIES + 1}"
    ):
        run.guard.read()


def test_the_guard_does_not_wait_for_the_device():
    """Tensors of the meta device have no values: reading one is an error."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, fused=True)
    for scaled in (False, True):
        guard = finite_guard.FiniteGuard(optimizer, torch.device("meta"), 0, scaled=scaled)
        guard.check(torch.zeros((), device="meta"), torch.zeros((), device="meta"))
        guard._notify(optimizer)
        with pytest.raises((RuntimeError, NotImplementedError)):
            guard.read()
        del optimizer.found_inf


def worker(rank, folder, table):
    """Two processes; what each of them raised is kept."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    raised = {}

    def attempt(name, kind, deferred=False, out=None, **values):
        with pytest.MonkeyPatch.context() as patch:
            if deferred:
                on_the_device(patch)
            if rank == 1:  # a gradient that is the same on both, so that the loss alone tells
                spoil(patch, kind, 4, lambda loss: loss + torch.nan)
            if name == "disk" and rank == 0:
                patch.setattr(checkpoint, "_write_state", full_disk)
            config = tiny_values(table, f"{folder}/{out or name}", kind, device="cpu", log_every=5, **values)
            try:
                train(kind, TrainConfig(**config))
            except Exception as error:
                raised[name] = f"{type(error).__name__}: {error}"

    attempt("clip", "clip", save_every=2)
    attempt("lm", "lm", save_every=2)
    attempt("later", "clip", deferred=True, save_every=100)
    attempt("disk", "clip", save_every=2)
    attempt("again", "clip", out="clip", save_every=2)
    torch.save(raised, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def full_disk(*arguments):
    raise OSError(28, "No space left on device")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_processes_stop_together(table, tmp_path):
    run_two(worker, (str(tmp_path), str(table)))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    bad_loss = "FloatingPointError: the loss is nan at step 4; lower lr or raise warmup_steps"
    for name in ("clip", "lm", "later"):
        assert first[name] == second[name] == bad_loss
        assert not (tmp_path / name / "final").exists()
    for name in ("clip", "lm"):
        assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path / name)] == [2]
    assert first["disk"].startswith("OSError: [Errno 28] No space left on device: ")
    assert second["disk"] == f"ConnectionAbortedError: the first process stopped: {first['disk']}"
    held = f"ValueError: out: {tmp_path / 'clip'} already contains a run"
    assert first["again"].startswith(held)
    assert second["again"].startswith(f"ConnectionAbortedError: the first process stopped: {held}")
