"""The training loop: accelerate places and wraps the model, a BatchPlan has the samples of each step."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor, nn

from vlmkernels.data import load_pairs
from vlmkernels.data._text import printable
from vlmkernels.data.tokenizer import load_tokenizer
from vlmkernels.use.bundle import Bundle

from . import batches, checkpoint, kinds
from .config import TrainConfig, read_config, write_config
from .finite_guard import FiniteGuard, check_finite
from .optim import build_average, build_lookahead, build_optimizer, learning_rate
from .record import METRICS, Recorder, score_text
from .resume_check import inputs_identity, reject_changes, settings_identity, with_later_fields

log = logging.getLogger("vlmkernels.train")
Result = TypeVar("Result")
FINAL = "final"
TOKENIZER = "tokenizer"
SHUFFLE = 1000  # size of the shuffle buffer of tars


@dataclasses.dataclass(frozen=True)
class Summary:
    """The results of a run; ``final`` is the folder for eval, embed, search and caption.

    ``scores`` are of the last logged batch: retrieval_at_1, or perplexity and token_accuracy of a captioning
    model.
    """

    run: Path
    final: Path
    steps: int
    loss: float
    scores: dict[str, float]
    seconds: float
    pairs_per_second: float

    def __str__(self) -> str:
        return (
            f"{self.steps} steps, loss {self.loss:.4f}, {score_text(self.scores)}, {self.seconds:.1f} s, "
            f"{self.pairs_per_second:.0f} pairs/s\nmodel: {printable(self.final)}"
        )


def train(kind: str, config: TrainConfig, *, allow_pipe: bool = False) -> Summary:
    """Train ``kind`` (a name in ``vlmkernels.train.kinds.KINDS``) with ``config``; write the run folder.

    The folder gets config.yaml, metrics.jsonl, TensorBoard events, tokenizer/, checkpoints/ (the last
    ``keep``, as step-00000120) and final/. ``allow_pipe`` lets ``config.data`` be a URL that runs a program
    to read tars; no configuration can allow that. ValueError or FileNotFoundError for an invalid
    configuration, FloatingPointError naming the step when the loss, its gradient or the weights are not
    finite: nothing of them is saved. KeyboardInterrupt and OSError (such as a full disk) are passed on; the
    run can then be resumed from its last checkpoint.
    """
    chosen = kinds.find(kind)
    if chosen.label_smoothing is None and config.label_smoothing:
        raise ValueError(
            f"label_smoothing may only be given for the softmax losses, not for {kind}; "
            f"got {config.label_smoothing}"
        )
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.precision == "fp16" and on_cpu:
        raise ValueError("precision fp16 needs a CUDA device; use bf16 or fp32 on the CPU")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    run = locate(kind, config)
    own_group = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # a second run in one process may differ in precision
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=str(run),
    )
    try:
        with _deterministic(config.deterministic), contextlib.ExitStack() as held:
            return Run(chosen, config, accelerator, run, held, allow_pipe=allow_pipe).execute()
    finally:
        if own_group:
            accelerator.state.destroy_process_group()


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms (a warning where an op has none) inside the block."""
    memory: Any = torch.utils.deterministic
    was, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled, benchmark = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = filled and was
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        memory.fill_uninitialized_memory = filled
        torch.backends.cudnn.benchmark = benchmark


def locate(kind: str, config: TrainConfig) -> Path:
    """The run folder. ValueError if the configuration names none, FileNotFoundError for no checkpoint."""
    if config.resume not in (None, "auto"):
        start = Path(str(config.resume))
        checkpoint.step_of(start)
        if not start.is_dir():
            raise FileNotFoundError(f"resume: no checkpoint {start}")
        run = start.absolute().parent.parent
        if config.out is not None and Path(config.out).absolute() != run:
            raise ValueError(f"resume: {start} belongs to the run {run}, not to --out {config.out}")
        return run
    if config.out is not None:
        return Path(config.out)
    if config.resume == "auto":
        raise ValueError("resume: 'auto' needs --out, the folder of the run to continue")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("out: several processes need --out, so that they agree on the run folder")
    return Path("runs") / f"{kind}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def starting_point(run: Path, resume: str | None) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from and its content, None for a new run.

    ValueError if the folder has a run and ``resume`` is None, or has no undamaged checkpoint.
    """
    found = checkpoint.checkpoints(run)
    if resume == "auto":
        return checkpoint.load_first(found[::-1]) if found else None
    if resume is None:
        if found or (run / FINAL).exists():
            raise ValueError(
                f"out: {run} already contains a run; add --resume auto to continue it, or pass another folder"
            )
        return None
    start = Path(resume)
    try:
        return start, checkpoint.load(start)
    except ValueError as error:
        earlier = [path for path in found if checkpoint.step_of(path) < checkpoint.step_of(start)]
        offer = f"; the one before it: --resume {earlier[-1]}" if earlier else "; there is none before it"
        raise ValueError(f"{error}{offer}") from None


class Run:
    """One call of train(): what it builds, and the loop over steps."""

    def __init__(
        self,
        kind: kinds.Kind,
        config: TrainConfig,
        accelerator: Accelerator,
        run: Path,
        held: contextlib.ExitStack,
        *,
        allow_pipe: bool = False,
    ) -> None:
        self.kind, self.config, self.accelerator, self.run = kind, config, accelerator, run
        set_seed(config.seed)
        if faults := kind.faults(config):
            raise ValueError("; ".join(faults))
        transform = kind.build_transform(config)
        drawn = kind.drawn_transform(config, transform)
        rank, world = accelerator.process_index, accelerator.num_processes
        options: dict[str, Any] = {"transform": drawn, "seed": config.seed, **config.data_options}
        options["allow_pipe"] = allow_pipe
        self.plan: batches.BatchPlan | batches.StreamPlan
        if config.samples_per_epoch is not None and config.streams:
            size, pairs = config.samples_per_epoch, config.batch_size
            self.plan = batches.StreamPlan(size, pairs, drop_last=config.drop_last, world_size=world)
            stream = {"samples_per_rank": self.plan.samples_per_rank, "rank": rank, "world_size": world}
            self.source: Any = load_pairs(config.data, **{"shuffle": SHUFFLE, **options, **stream})
        else:
            self.source = load_pairs(config.data, **options)
            self.plan = batches.BatchPlan(
                len(self.source),
                config.batch_size,
                seed=config.seed,
                drop_last=config.drop_last,
                rank=rank,
                world_size=world,
            )
        kind.check_images(self.source)
        state: dict[str, Any] | None = self._begin(held)
        self.identity = settings_identity(kind, config)
        earlier: dict[str, Any] = state.get("course", {}) if state else {}
        if state and not earlier:  # of an earlier version
            earlier = settings_identity(kind, TrainConfig(**read_config(run / "config.yaml")))
        reject_changes(run, earlier, self.identity)
        tokenizer = load_tokenizer(run / TOKENIZER)
        self.bundle = Bundle(kind.build_model(config, tokenizer), tokenizer, transform)
        inputs = inputs_identity(self.source, run / TOKENIZER, drawn, self.bundle.model)
        inputs |= kind.own_inputs(config)
        self.identity |= inputs
        reject_changes(run, with_later_fields(earlier, self.bundle.model), inputs)
        image_size = None if transform is None else transform.image_size
        self.task = kind.build_task(config, tokenizer, image_size)
        self.span = (
            self.plan.steps_per_epoch * config.epochs
        )  # of the schedule, whenever max_steps ends the run
        self.steps = min(self.span, config.max_steps or self.span)
        self.bare = kind.trained_module(config, self.bundle.model).train()
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            self.bare = nn.SyncBatchNorm.convert_sync_batchnorm(self.bare)
        self.bare.to(accelerator.device)
        self.average = build_average(self.bare, config.ema_decay)
        self.lookahead = build_lookahead(self.bare, config)
        optimizer = build_optimizer(self.bare, config, kind.parameter_groups(config, self.bare))
        self.model, self.optimizer = accelerator.prepare(self.bare, optimizer)
        set_seed(config.seed, device_specific=True)
        self.step = 0
        if state is not None:
            self._restore(state)
        scaled = accelerator.scaler is not None
        self.guard = FiniteGuard(optimizer, accelerator.device, self.step, scaled=scaled)
        self.task.prepare(self.source, accelerator.device)

    def _by_main(self, work: Callable[[], Result]) -> Result:
        """Do ``work`` on the first process and return its result on all; its error ends all of them."""
        outcome: list[Any] = [None, None]
        error: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                outcome[0] = work()
            except Exception as caught:
                error = caught
                outcome[1] = f"{type(error).__name__}: {error}"
        broadcast_object_list(outcome)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise ConnectionAbortedError(f"the first process stopped: {outcome[1]}")
        return outcome[0]

    def _begin(self, held: contextlib.ExitStack) -> dict[str, Any] | None:
        """Enter the run folder; returns the content of the checkpoint to resume from, if any."""
        config, known = self.config, []

        def enter() -> str | None:
            held.enter_context(checkpoint.lock(self.run))
            for name in checkpoint.clean(self.run):
                log.info("removed %s, left by an interrupted write", name)
            start = starting_point(self.run, config.resume)
            if start is None:
                tokenizer = self.kind.build_tokenizer(config, self.source)
                with checkpoint.atomic_folder(self.run / TOKENIZER) as folder:
                    tokenizer.save(folder)
                return None
            known.append(start[1])
            return str(start[0])

        start = self._by_main(enter)
        if start is None:
            return None
        return known.pop() if known else checkpoint.load(Path(start))

    def execute(self) -> Summary:
        config, main = self.config, self.accelerator.is_main_process
        self._by_main(self._tidy)
        with Recorder(
            self.accelerator,
            self.run,
            scores=self.task.scores,
            step=self.step,
            steps=self.steps,
            batch_size=config.batch_size,
            progress=config.progress,
        ) as recorder:
            try:
                self._loop(recorder)
                self._by_main(self._write_final)
            except (KeyboardInterrupt, FloatingPointError, OSError) as error:
                if main:
                    log.warning("%s", self._last_checkpoint_hint(isinstance(error, FloatingPointError)))
                raise
            skipped = self._skipped()
            if main and skipped:
                names = ", ".join(map(printable, list(skipped)[:10]))
                log.warning("%d samples were skipped: %s", len(skipped), names)
        return Summary(self.run, self.run / FINAL, self.step, **recorder.totals())

    def _tidy(self) -> None:
        """Remove what the run wrote after this step, checkpoints before their metrics."""
        for later in checkpoint.checkpoints(self.run):
            if checkpoint.step_of(later) > self.step:
                checkpoint.remove(later)
        checkpoint.keep_metrics_until(self.run / METRICS, self.step)
        stored = dataclasses.replace(self.config, out=str(self.run), resume=None)
        write_config(self.run / "config.yaml", self.kind.settings(stored))

    def _loop(self, recorder: Recorder) -> None:
        config = self.config
        save_every = config.save_every or self.plan.steps_per_epoch
        while self.step < self.steps:
            epoch, start = divmod(self.step, self.plan.steps_per_epoch)
            loaded = self.plan.load(
                self.source,
                self.task.collate,
                epoch,
                start,
                num_workers=config.num_workers,
                pin_memory=self.accelerator.device.type == "cuda",
            )
            some_read = start > 0
            for batch in loaded:
                logged = (self.step + 1) % config.log_every == 0 or self.step + 1 == self.steps
                values = self.one_step(batch, logged)
                self.step += 1
                some_read = some_read or values is not None
                if logged and values is not None:
                    recorder.record(self.step, epoch, values)
                recorder.advance()
                if self.step % save_every == 0 or self.step == self.steps:
                    recorder.flush()
                    self._save()
                if self.step == self.steps:
                    break
            if not some_read:
                skipped = self._skipped()
                first = next(iter(skipped.items()), None)
                raise ValueError(f"data: no sample can be read, {len(skipped)} were skipped, first {first}")

    def _skipped(self) -> dict[str, str]:
        """Reason by key of the samples skipped so far on any process; all processes call it."""
        return {key: reason for part in gather_object([self.source.skipped]) for key, reason in part.items()}

    def one_step(self, batch: dict[str, Any], measured: bool) -> dict[str, Any] | None:
        """Forward, backward and update on this process's part of a joint batch; None without any sample."""
        config, device = self.config, self.accelerator.device
        rate = learning_rate(self.step, self.span, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        placed = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        with self.accelerator.autocast():
            found = self.task.loss(self.model, placed, self.step, measured)
        if found is None:
            self.guard.skip()
            return None
        loss, measure = found
        self.accelerator.backward(loss)
        norm = self._clip()
        self.guard.check(loss, norm)
        self.optimizer.step()
        if self.lookahead is not None:
            self.lookahead.after_update(self.step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step(self.bare)
        if self.average is not None:
            self.average.update_parameters(self.bare)
        if not measured:
            return {}
        self.guard.read()
        return {**measure(), "lr": rate, "grad_norm": norm.item()}

    def _clip(self) -> Tensor:
        """The norm of the joint batch's gradient, which is clipped to ``grad_clip``."""
        if self.config.grad_clip:
            return self.accelerator.clip_grad_norm_(self.bare.parameters(), self.config.grad_clip)
        self.accelerator.unscale_gradients()
        return nn.utils.get_total_norm([p.grad for p in self.bare.parameters() if p.grad is not None])

    def _save(self) -> None:
        self.guard.read()
        states = gather_object([checkpoint.random_state()])

        def write() -> None:
            average, scaler = self.average, self.accelerator.scaler
            learned = {
                "model": self.bare.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": None if average is None else average.state_dict(),
                "lookahead": None if self.lookahead is None else self.lookahead.state_dict(),
            }
            check_finite(self.step, **learned)
            state = {
                **learned,
                "step": self.step,
                "course": self.identity,
                "scaler": None if scaler is None else scaler.state_dict(),
                "random": states,
            }
            checkpoint.save(self.run, self.step, state, self.config.keep)

        self._by_main(write)

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.bare.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.lookahead is not None:
            if not state.get("lookahead"):
                raise ValueError("lookahead_steps must be 0 to resume a run without it")
            self.lookahead.load_state_dict(state["lookahead"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        rank, known = self.accelerator.process_index, len(state["random"])
        if known != self.accelerator.num_processes:
            log.warning(
                "the checkpoint is of %d processes, this run has %d: it continues, but not bit for bit",
                known,
                self.accelerator.num_processes,
            )
        if rank < known:
            checkpoint.set_random_state(state["random"][rank])

    def _write_final(self) -> None:
        model = self.kind.trained_model(self.bare if self.average is None else self.average.module)
        slow = contextlib.nullcontext() if self.lookahead is None else self.lookahead.slow_weights()
        with slow, checkpoint.atomic_folder(self.run / FINAL) as folder:
            check_finite(self.step, model=model.state_dict())
            dataclasses.replace(self.bundle, model=model).save(folder)

    def _last_checkpoint_hint(self, would_stop_again: bool) -> str:
        """After a stop: the last checkpoint, and how to continue from it."""
        found = checkpoint.checkpoints(self.run)
        if not found:
            return f"interrupted after step {self.step}, before the first checkpoint: start again"
        last = checkpoint.step_of(found[-1])
        if would_stop_again:
            return f"the last good checkpoint, of step {last}, is {found[-1]}"
        command = f"vlmkernels train {self.kind.name} --out {self.run} --resume auto"
        return (
            f"interrupted after step {self.step}; the last checkpoint is of step {last}; continue: {command}"
        )
