"""The training loop: accelerate places and wraps the model, a BatchPlan says what each step sees."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, set_seed
from torch import nn

from vlmkernels.data import ImageTransform, load_pairs
from vlmkernels.data.tokenizer import load_tokenizer

from . import batches, checkpoint
from .bundle import Bundle, build_model, build_tokenizer, build_transform, check_model
from .config import FREE_ON_RESUME, OBJECTIVES, TrainConfig, read_config, write_config
from .optim import build_average, build_optimizer, learning_rate
from .record import METRICS, Recorder
from .tasks import build_task

log = logging.getLogger("vlmkernels.train")
FINAL = "final"
TOKENIZER = "tokenizer"
SHUFFLE = 1000  # samples of a tar among which the next one is drawn


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run ended with; ``final`` is the folder that eval, embed, search and caption take.

    ``scores`` are of the last logged batch: retrieval_at_1, or perplexity and token_accuracy of a model that
    writes captions.
    """

    run: Path
    final: Path
    steps: int
    loss: float
    scores: dict[str, float]
    seconds: float
    pairs_per_second: float


def train(kind: str, config: TrainConfig) -> Summary:
    """Train ``kind`` (clip, align, siglip, lm, flamingo or simvlm) as ``config`` says; write the run folder.

    The folder gets config.yaml, metrics.jsonl, TensorBoard events, tokenizer/, checkpoints/ (the last
    ``keep``, as step-00000120) and final/. ValueError or FileNotFoundError for a configuration that cannot
    run, FloatingPointError when the loss is not finite. A KeyboardInterrupt is raised again; the run can then
    be resumed from its last checkpoint.
    """
    if kind not in OBJECTIVES:
        raise ValueError(f"kind must be one of {', '.join(OBJECTIVES)}, got {kind!r}")
    if kind not in ("clip", "align") and config.label_smoothing:
        raise ValueError(
            f"label_smoothing belongs to the softmax losses, not to {kind}; got {config.label_smoothing}"
        )
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.precision == "fp16" and on_cpu:
        raise ValueError("precision fp16 needs a CUDA device; use bf16 or fp32 on the CPU")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    run, start = locate(kind, config)
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
        with _deterministic(config.deterministic):
            return Run(kind, config, accelerator, run, start).execute()
    finally:
        if own_group:
            accelerator.state.destroy_process_group()


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms (a warning where an op has none), then the earlier setting again."""
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


def locate(kind: str, config: TrainConfig) -> tuple[Path, Path | None]:
    """The run folder and the checkpoint to resume from, if any.

    ValueError for a folder with a run that nobody asked to resume, FileNotFoundError without the checkpoint.
    """
    if config.resume not in (None, "auto"):
        start = Path(str(config.resume))
        checkpoint.step_of(start)
        if not start.is_dir():
            raise FileNotFoundError(f"resume: no checkpoint {start}")
        run = start.absolute().parent.parent
        if config.out is not None and Path(config.out).absolute() != run:
            raise ValueError(f"resume: {start} belongs to the run {run}, not to --out {config.out}")
        return run, start
    if config.out is None:
        if config.resume == "auto":
            raise ValueError("resume: 'auto' needs --out, the folder of the run to continue")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("out: several processes need --out, so that they agree on the run folder")
        return Path("runs") / f"{kind}-{datetime.datetime.now():%Y%m%d-%H%M%S}", None
    run = Path(config.out)
    found = checkpoint.checkpoints(run)
    if config.resume == "auto":
        return run, found[-1] if found else None
    if found or (run / FINAL).exists():
        raise ValueError(
            f"out: {run} already holds a run; add --resume auto to continue it, or give another folder"
        )
    return run, None


class Run:
    """One call of train(): what it builds, and the loop over steps."""

    def __init__(
        self, kind: str, config: TrainConfig, accelerator: Accelerator, run: Path, start: Path | None
    ) -> None:
        self.kind, self.config, self.accelerator, self.run, self.start = kind, config, accelerator, run, start
        if start is not None:
            _check_same_course(run, config)
        set_seed(config.seed)
        check_model(kind, config)
        transform = build_transform(kind, config)
        drawn = transform
        if config.augment and transform is not None:
            drawn = ImageTransform.from_dict({**transform.to_dict(), "train": True, **config.augment})
        rank, world = accelerator.process_index, accelerator.num_processes
        options: dict[str, Any] = {"transform": drawn, "seed": config.seed, **config.data_options}
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
        if accelerator.is_main_process and start is None:
            build_tokenizer(kind, config, self.source).save(run / TOKENIZER)
        accelerator.wait_for_everyone()
        tokenizer = load_tokenizer(run / TOKENIZER)
        self.bundle = Bundle(build_model(kind, config, tokenizer), tokenizer, transform)
        self.task = build_task(kind, config, tokenizer)
        self.span = (
            self.plan.steps_per_epoch * config.epochs
        )  # of the schedule, whenever max_steps ends the run
        self.steps = min(self.span, config.max_steps or self.span)
        self.bare = self.bundle.model.train()
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            self.bare = nn.SyncBatchNorm.convert_sync_batchnorm(self.bare)
        self.bare.to(accelerator.device)
        self.average = build_average(self.bare, config.ema_decay)
        self.model, self.optimizer = accelerator.prepare(self.bare, build_optimizer(self.bare, config))
        set_seed(config.seed, device_specific=True)
        self.step = 0

    def execute(self) -> Summary:
        config, main = self.config, self.accelerator.is_main_process
        if main:
            self.run.mkdir(parents=True, exist_ok=True)
            for name in checkpoint.clean(self.run):
                log.info("removed %s, which an interrupted write left", name)
        if self.start is not None:
            self._restore(checkpoint.load(self.start))
            log.info("resumed %s after step %d", self.run, self.step)
        if main:
            write_config(
                self.run / "config.yaml", dataclasses.replace(config, out=str(self.run), resume=None)
            )
            checkpoint.keep_metrics_until(self.run / METRICS, self.step)
            for later in checkpoint.checkpoints(self.run):
                if checkpoint.step_of(later) > self.step:
                    checkpoint.remove(later)
        self.accelerator.wait_for_everyone()
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
            except KeyboardInterrupt:
                if main:
                    log.warning("%s", self._how_to_resume())
                raise
            if main:
                self._write_final()
                skipped = self.source.skipped
                if skipped:
                    log.warning("%d samples were skipped: %s", len(skipped), ", ".join(list(skipped)[:10]))
        self.accelerator.wait_for_everyone()
        return Summary(self.run, self.run / FINAL, self.step, **recorder.totals())

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
            for batch in loaded:
                logged = (self.step + 1) % config.log_every == 0 or self.step + 1 == self.steps
                values = self.one_step(batch, logged)
                self.step += 1
                if logged:
                    recorder.record(self.step, epoch, values)
                recorder.advance()
                if self.step % save_every == 0 or self.step == self.steps:
                    recorder.flush()
                    self._save()
                if self.step == self.steps:
                    break

    def one_step(self, batch: dict[str, Any], measured: bool) -> dict[str, Any]:
        """Forward, backward and update on this process's part of a joint batch."""
        config, device = self.config, self.accelerator.device
        rate = learning_rate(self.step, self.span, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        placed = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        with self.accelerator.autocast():
            loss, measure = self.task.loss(self.model, placed, self.step, measured)
        self.accelerator.backward(loss)
        norm = None
        if config.grad_clip:
            norm = self.accelerator.clip_grad_norm_(self.bare.parameters(), config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step(self.bare)
        if self.average is not None:
            self.average.update_parameters(self.bare)
        if not measured:
            return {}
        values = {**measure(), "lr": rate}
        if norm is not None:
            values["grad_norm"] = norm.item()
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss is {values['loss']} at step {self.step + 1}; lower lr or raise warmup_steps"
            )
        return values

    def _save(self) -> None:
        states = gather_object([checkpoint.random_state()])
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "model": self.bare.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "random": states,
            }
            checkpoint.save(self.run, self.step, state, self.config.keep)
        self.accelerator.wait_for_everyone()

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.bare.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
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
        model: Any = self.bare if self.average is None else self.average.module
        with checkpoint.whole_folder(self.run / FINAL) as folder:
            dataclasses.replace(self.bundle, model=model).save(folder)

    def _how_to_resume(self) -> str:
        found = checkpoint.checkpoints(self.run)
        if not found:
            return f"interrupted after step {self.step}, before the first checkpoint: start again"
        command = f"vlmkernels train {self.kind} --out {self.run} --resume auto"
        last = checkpoint.step_of(found[-1])
        return (
            f"interrupted after step {self.step}; the last checkpoint is of step {last}; continue: {command}"
        )


def _check_same_course(run: Path, config: TrainConfig) -> None:
    """ValueError listing what differs from the run's config.yaml and would change its course."""
    earlier = TrainConfig(**read_config(run / "config.yaml")).to_dict()
    free = FREE_ON_RESUME - {"num_workers"} if config.streams else FREE_ON_RESUME
    changed = [
        f"{name} was {earlier[name]!r}, got {value!r}"
        for name, value in config.to_dict().items()
        if name not in free and earlier[name] != value
    ]
    if changed:
        raise ValueError(f"resume: the configuration differs from that of {run}: " + "; ".join(changed))
