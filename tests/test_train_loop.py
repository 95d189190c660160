"""Training runs on one process: what they write, that they learn, repeat and resume bit for bit."""

import itertools
import json
import logging
import math
import random

import pytest
import torch
import yaml

from tests.train_tiny import assert_same_run, metrics, tiny_values, weights, write_pairs, write_tar
from vlmkernels.train import TrainConfig, checkpoint, load_bundle, loop, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("kind", ["clip", "align", "siglip"])
def test_two_runs_are_equal_bit_for_bit(table, tmp_path, kind):
    values = tiny_values(table, tmp_path / "a", kind)
    summary = train(kind, TrainConfig(**values))
    torch.rand(5), random.random()  # what was drawn before a run must not matter
    train(kind, TrainConfig(**{**values, "out": str(tmp_path / "b")}))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    lines = metrics(tmp_path / "a")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["epoch"] for line in lines] == [i // 3 for i in range(12)]
    assert summary.steps == 12
    assert summary.loss == lines[-1]["loss"]
    train(kind, TrainConfig(**{**values, "out": str(tmp_path / "c"), "seed": 1}))
    assert metrics(tmp_path / "c") != lines


def test_the_run_folder(table, tmp_path):
    run = tmp_path / "run"
    config = TrainConfig(**tiny_values(table, run, tensorboard=True, save_every=0, keep=2))
    summary = train("clip", config)
    assert summary.run == run
    assert summary.final == run / "final"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "final",
        "metrics.jsonl",
        "tensorboard",
        "tokenizer",
    ]
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step-00000009", "step-00000012"]
    assert TrainConfig(**yaml.safe_load((run / "config.yaml").read_text())) == config
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert {"loss", "lr", "grad_norm", "retrieval_at_1", "logit_scale", "pairs_per_second", "time"} < set(
        json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    )
    bundle = load_bundle(run / "final")
    state = checkpoint.load(checkpoint.checkpoints(run)[-1])["model"]
    assert all(value.equal(state[name]) for name, value in bundle.model.state_dict().items())
    assert not bundle.model.training
    assert not bundle.transform.train
    assert bundle.tokenizer(["red dot", "blue"]).shape == (2, 12)


@pytest.mark.parametrize(
    ("kind", "optimizer"), [("clip", "adamw"), ("clip", "sgd"), ("align", "adamw"), ("siglip", "adamw")]
)
def test_learns_the_training_pairs(table, tmp_path, kind, optimizer):
    values = {"epochs": 30, "augment": {}, "optimizer": optimizer, "lr": 0.1 if optimizer == "sgd" else 1e-2}
    train(kind, TrainConfig(**tiny_values(table, tmp_path / "run", kind, **values)))
    lines = metrics(tmp_path / "run")
    first, last = lines[:6], lines[-6:]
    assert sum(line["loss"] for line in last) < 0.8 * sum(line["loss"] for line in first)
    assert sum(line["retrieval_at_1"] for line in last) / 6 > 0.3  # chance: at most 1/6


def interrupt_at(monkeypatch, step):
    """Ctrl-C after ``step`` steps."""
    count = itertools.count(1)
    original = loop.Run.one_step

    def one_step(self, *arguments):
        if next(count) > step:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(loop.Run, "one_step", one_step)


@pytest.mark.parametrize("kind", ["clip", "align"])
@pytest.mark.parametrize("step", [5, 6])
def test_interrupted_run_resumes_bit_for_bit(table, tmp_path, monkeypatch, caplog, kind, step):
    values = tiny_values(table, tmp_path / "whole", kind, ema_decay=0.9, num_workers=step % 2)
    train(kind, TrainConfig(**values))
    values = {**values, "out": str(tmp_path / "cut"), "save_every": 2}
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "vlmkernels.train"):
        interrupt_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train(kind, TrainConfig(**values))
    saved = step // 2 * 2
    assert f"interrupted after step {step}; the last checkpoint is of step {saved}" in caplog.text
    assert f"vlmkernels train {kind} --out {tmp_path / 'cut'} --resume auto" in caplog.text
    assert not (tmp_path / "cut" / "final").exists()
    summary = train(kind, TrainConfig(**{**values, "resume": "auto", "num_workers": 0}))
    assert summary.steps == 12
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_dropout_resumes_bit_for_bit(table, tmp_path, monkeypatch):
    from tests.train_tiny import TINY_ALIGN

    options = {**TINY_ALIGN, "text_dropout": 0.3, "drop_rate": 0.3}
    values = tiny_values(table, tmp_path / "whole", "align", model_options=options)
    train("align", TrainConfig(**values))
    values = {**values, "out": str(tmp_path / "cut"), "save_every": 1}
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train("align", TrainConfig(**values))
    train("align", TrainConfig(**{**values, "resume": "auto"}))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_resume_from_an_earlier_checkpoint(table, tmp_path):
    run = tmp_path / "run"
    values = tiny_values(table, run, save_every=4, keep=5)
    train("clip", TrainConfig(**values))
    expected = metrics(run), weights(run)
    start = run / "checkpoints" / "step-00000004"
    train("clip", TrainConfig(**{**values, "out": None, "resume": str(start), "max_steps": 6}))
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step-00000004", "step-00000006"]
    assert metrics(run) == expected[0][:6]
    train("clip", TrainConfig(**{**values, "resume": "auto"}))
    assert metrics(run) == expected[0]
    assert all(value.equal(expected[1][name]) for name, value in weights(run).items())


def test_resume_refuses_other_settings(table, tmp_path):
    values = tiny_values(table, tmp_path / "run", epochs=1)
    train("clip", TrainConfig(**values))
    with pytest.raises(ValueError, match=r"already contains a run; add --resume auto"):
        train("clip", TrainConfig(**values))
    with pytest.raises(
        ValueError, match=r"differ from those of .*: lr was 0.003, got 0.1; seed was 0, got 5"
    ):
        train("clip", TrainConfig(**{**values, "resume": "auto", "lr": 0.1, "seed": 5}))
    with pytest.raises(ValueError, match=r"'auto' needs --out"):
        train("clip", TrainConfig(**{**values, "out": None, "resume": "auto"}))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        train("clip", TrainConfig(**{**values, "resume": str(tmp_path / "run" / "checkpoints" / "step-7")}))
    again = train("clip", TrainConfig(**{**values, "resume": "auto"}))
    assert (again.steps, again.loss) == (3, metrics(tmp_path / "run")[-1]["loss"])


def test_average_of_the_weights_is_saved(table, tmp_path):
    for decay in (0.0, 0.9):
        train("clip", TrainConfig(**tiny_values(table, tmp_path / str(decay), ema_decay=decay)))
    assert metrics(tmp_path / "0.0") == metrics(tmp_path / "0.9")
    plain, averaged = weights(tmp_path / "0.0"), weights(tmp_path / "0.9")
    assert not all(plain[name].equal(averaged[name]) for name in plain)
    state = checkpoint.load(checkpoint.checkpoints(tmp_path / "0.9")[-1])["average"]
    assert all(state["module." + name].equal(value) for name, value in averaged.items())


def test_starts_from_a_trained_model(table, tmp_path):
    train("clip", TrainConfig(**tiny_values(table, tmp_path / "first", epochs=20, augment={})))
    first = metrics(tmp_path / "first")
    values = tiny_values(table, tmp_path / "second", epochs=1, augment={}, model_options={})
    train("clip", TrainConfig(**values, init=str(tmp_path / "first" / "final")))
    assert metrics(tmp_path / "second")[0]["loss"] < 0.9 * first[0]["loss"]
    values["out"] = str(tmp_path / "third")
    with pytest.raises(ValueError, match=r"init: .* must contain a model for siglip, got one for clip"):
        train("siglip", TrainConfig(**values, init=str(tmp_path / "first" / "final")))


def test_bf16_stays_near_fp32(table, tmp_path):
    plain = {
        "optimizer": "sgd",
        "lr": 0.01,
    }  # AdamW's first steps make signs of gradients that are but rounding
    for precision in ("fp32", "bf16"):
        values = tiny_values(table, tmp_path / precision, precision=precision, epochs=2, **plain)
        train("clip", TrainConfig(**values))
    exact, rounded = metrics(tmp_path / "fp32"), metrics(tmp_path / "bf16")
    assert exact != rounded
    assert [line["loss"] for line in rounded] == pytest.approx([line["loss"] for line in exact], rel=0.05)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "bf16").values())


@pytest.mark.parametrize(("start", "kept"), [(6.0, math.log(100)), (-1.0, 0.0)], ids=["above", "below"])
def test_logit_scale_is_clamped(table, tmp_path, start, kept):
    values = tiny_values(table, tmp_path / "run", lr=1e-6, warmup_steps=0, epochs=1)
    values["model_options"] = {**values["model_options"], "init_logit_scale": start}
    train("clip", TrainConfig(**values))
    assert max(line["logit_scale"] for line in metrics(tmp_path / "run")) <= 100.001
    assert float(weights(tmp_path / "run")["logit_scale"]) == pytest.approx(kept, abs=1e-4)


def test_broken_images_are_counted_and_named(table, tmp_path, caplog):
    broken = table.with_name("broken.tsv")
    broken.write_text(table.read_text() + "absent.png\tnothing\n")
    with caplog.at_level(logging.WARNING, "vlmkernels.train"):
        train("clip", TrainConfig(**tiny_values(broken, tmp_path / "run")))
    assert "1 samples were skipped" in caplog.text
    assert "absent.png" in caplog.text


def test_trains_on_tars(table, tmp_path):
    write_tar(table, tmp_path / "pairs-0.tar")
    values = tiny_values(tmp_path / "pairs-0.tar", tmp_path / "whole", samples_per_epoch=22)
    train("clip", TrainConfig(**values))
    assert [line["epoch"] for line in metrics(tmp_path / "whole")] == [i // 3 for i in range(12)]
    cut = {**values, "out": str(tmp_path / "cut"), "save_every": 5}
    train("clip", TrainConfig(**cut, max_steps=5))
    train("clip", TrainConfig(**cut, resume="auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    with pytest.raises(ValueError, match="samples_per_epoch must be given for the tars"):
        TrainConfig(**{**values, "samples_per_epoch": None})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("clop", {}, "kind must be one of clip, align, siglip, .*, visualgpt, visualbert, vild, got 'clop'"),
        ("clip", {"model": "ViT-Z"}, "clip has no configuration 'ViT-Z'; it has .*ViT-B-32"),
        ("clip", {"model_options": {"depth": 3}}, "model_options: unknown fields depth; known are embed_dim"),
        ("clip", {"precision": "fp16", "device": "cpu"}, "precision fp16 needs a CUDA device"),
        (
            "clip",
            {"model_options": {"init_logit_bias": -10.0}},
            "init_logit_bias must make a model for clip, got one for siglip",
        ),
        ("siglip", {"label_smoothing": 0.1}, "label_smoothing may only be given for the softmax losses"),
        ("clip", {"augment": {"zoom": 2}}, "zoom"),
        ("clip", {"data_options": {"zoom": 2}}, "options of CsvPairs must be among .*, got .'zoom'."),
    ],
)
def test_bad_use_is_a_clear_error_and_leaves_nothing(table, tmp_path, kind, values, message):
    config = TrainConfig(**{**tiny_values(table, tmp_path / "run"), **values})
    with pytest.raises(ValueError, match=message):
        train(kind, config)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(table, tmp_path):
    values = tiny_values(table, tmp_path / "run", optimizer="sgd", lr=1e30, grad_clip=0.0, warmup_steps=0)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step \d+"):
        train("clip", TrainConfig(**values))


def test_settings_of_torch_are_restored(table, tmp_path):
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    train("clip", TrainConfig(**tiny_values(table, tmp_path / "run", max_steps=1)))
    assert before == (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
