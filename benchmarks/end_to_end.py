"""`vlmkernels train clip` on emoji3 against the same training of open_clip's model: time and quality.

    python -m benchmarks.end_to_end                        seeds 0, 1, 2, clip-emoji
    python -m benchmarks.end_to_end --seeds 0 --max-steps 20

Both runs of a seed start from the same weights, see the same batches and use the same optimizer, schedule and
precision; the plain one is open_clip's CLIP and ClipLoss, eager. They take turns step by step in one process,
so what else the machine does meets both. The time of a run is that of its steps and of making the batches,
which are made once. Results are kept in benchmarks/results/end_to_end/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks import demo, measure, peers
from benchmarks.models.peer_models import open_clip_model
from benchmarks.models.work import parts_of
from vlmkernels._files import write_text
from vlmkernels.data import load_emoji3
from vlmkernels.models.clip import CLIP, MAX_LOG_SCALE
from vlmkernels.train import loop
from vlmkernels.train.config import TrainConfig, read_config
from vlmkernels.train.kinds._contrastive import Contrastive
from vlmkernels.train.kinds.clip import Clip
from vlmkernels.use.evaluate import evaluate_model

RESULTS = measure.ROOT / "benchmarks" / "results" / "end_to_end"
OURS, PLAIN = "vlmkernels", "open_clip, eager"


class PlainClip(nn.Module):
    """open_clip's model with the weights of ours, called as the training loop calls ours."""

    def __init__(self, ours: CLIP) -> None:
        super().__init__()
        self.model = open_clip_model(ours.config)
        self.model.load_state_dict(ours.state_dict())

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return self.model(images, tokens)

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        self.model.logit_scale.clamp_(0.0, MAX_LOG_SCALE)


class PlainTask(Contrastive):
    def loss(self, model: nn.Module, batch: dict[str, Any], step: int, measured: bool) -> Any:
        loss = peers.load("open_clip.loss").ClipLoss()(**model(batch["images"], batch["tokens"]))
        return loss, lambda: {"loss": loss.item()}


class PlainKind(Clip):
    """Clip with open_clip's model, of the same weights, and its loss in ours' place."""

    def build_model(self, config: TrainConfig, tokenizer: Any) -> Any:
        return PlainClip(super().build_model(config, tokenizer))

    def build_task(self, config: TrainConfig, tokenizer: Any, image_size: Any = None) -> PlainTask:
        return PlainTask(tokenizer, image_size)


def build_run(config: TrainConfig, folder: Path, plain: bool) -> loop.Run:
    """A run that is not started; ``plain`` is that of open_clip."""
    accelerator = Accelerator(
        cpu=True, mixed_precision={"fp32": "no"}.get(config.precision, config.precision)
    )
    return loop.Run(PlainKind() if plain else Clip(), config, accelerator, folder, contextlib.ExitStack())


def batches(run: loop.Run) -> Iterator[tuple[int, dict[str, Any]]]:
    """The steps of the run and their batches."""
    step = 0
    while step < run.steps:
        epoch = step // run.plan.steps_per_epoch
        for batch in run.plan.load(run.source, run.task.collate, epoch, 0):
            yield step, batch
            step += 1
            if step == run.steps:
                return


def train_seed(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Both runs of a seed: seconds of the batches and of each run's steps, losses, evaluation, profile."""
    config = TrainConfig(**{**read_config("clip-emoji"), **options, "seed": seed, "tensorboard": False})
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: build_run(config, Path(folder, name), name == PLAIN) for name in (OURS, PLAIN)}
        first = next(batches(runs[OURS]))[1]
        _check_equal_start(*(run.bare for run in runs.values()), first)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        losses: dict[str, list[float]] = {name: [] for name in runs}
        loading, start = [], time.perf_counter()
        for step, batch in batches(runs[OURS]):
            loading.append(time.perf_counter() - start)
            for name in (OURS, PLAIN) if step % 2 == 0 else (PLAIN, OURS):
                start = time.perf_counter()
                values = runs[name].one_step(batch, measured=True)
                seconds[name].append(time.perf_counter() - start)
                losses[name].append(values["loss"])
                runs[name].step += 1
            start = time.perf_counter()
        ours, plain = runs[OURS].bundle.model, runs[PLAIN].bare
        parts = {
            name: parts_of(lambda run=run: run.one_step(first, measured=False)) for name, run in runs.items()
        }
        judged = {OURS: _evaluation(runs[OURS], ours), PLAIN: _evaluation(runs[OURS], _as_ours(plain, ours))}
    return {
        "seed": seed,
        "steps": len(loading),
        "loading": sum(loading),
        "seconds": {name: sum(x) for name, x in seconds.items()},
        "step": {name: measure.spread(x) for name, x in seconds.items()},
        "ratio": measure.spread([a / b for a, b in zip(seconds[OURS], seconds[PLAIN], strict=True)]),
        "last_loss": {name: statistics.fmean(x[-10:]) for name, x in losses.items()},
        "evaluation": judged,
        "parts": parts,
    }


def _check_equal_start(ours: Any, plain: Any, batch: dict[str, Any]) -> None:
    with torch.no_grad():
        a, b = ours(batch["images"], batch["tokens"]), plain(batch["images"], batch["tokens"])
    for name in ("image_features", "text_features"):
        if not torch.allclose(a[name], b[name], atol=1e-4):
            raise ArithmeticError(f"{name} of the two models differ at the start")


def _as_ours(plain: Any, ours: CLIP) -> CLIP:
    """Our model with the weights of the plain one, so that one evaluation judges both."""
    model = CLIP(ours.config)
    model.load_state_dict(plain.model.state_dict())
    return model


def _evaluation(run: loop.Run, model: CLIP) -> dict[str, Any]:
    bundle = replace(run.bundle, model=model.eval())
    test = load_emoji3("style-test")
    parts = demo.judged_parts(test)
    return {
        name: evaluate_model(bundle.model, bundle.tokenizer, bundle.transform, part).to_dict()
        for name, part in parts
    }


def mean_recall(evaluation: dict[str, Any]) -> float:
    """R@10 on the unseen style, both directions."""
    found = next(iter(evaluation.values()))["retrieval"]
    return statistics.fmean(found[way]["R@10"] for way in ("image_to_text", "text_to_image"))


def summary(runs: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'':18}{'seconds a run':>15}{'step':>10}{'R@10, mean (each seed)':>32}{'last loss':>12}"]
    for name in (OURS, PLAIN):
        recalls = [mean_recall(run["evaluation"][name]) for run in runs]
        each = ", ".join(f"{100 * r:.1f}" for r in recalls)
        lines.append(
            f"{name:18}{statistics.fmean(run['seconds'][name] + run['loading'] for run in runs):15.1f}"
            f"{1e3 * statistics.median(run['step'][name]['median'] for run in runs):7.0f} ms"
            f"{100 * statistics.fmean(recalls):12.1f} % ({each})"
            f"{statistics.fmean(run['last_loss'][name] for run in runs):12.3f}"
        )
    ours, plain = (sum(run["seconds"][name] + run["loading"] for run in runs) for name in (OURS, PLAIN))
    loading = sum(run["loading"] for run in runs)
    lines.append(
        f"time of a run: {ours / plain:.2f} of the plain one, {loading / ours:.0%} of it makes batches"
    )
    lines.append(f"a step: {statistics.median(run['ratio']['median'] for run in runs):.2f} of the plain one")
    for name, parts in runs[-1]["parts"].items():
        ordered = sorted(parts.items(), key=lambda item: -item[1])
        lines.append(f"one step of {name}: " + ", ".join(f"{part} {1e3 * s:.0f} ms" for part, s in ordered))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    title = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=title)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="clip-emoji.yaml says how many")
    parser.add_argument("--max-steps", type=int, help="stop after this many steps, to try the script")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(arguments)
    options = {name: value for name in ("epochs", "max_steps", "precision") if (value := getattr(args, name))}
    runs = []
    for seed in args.seeds:
        runs.append(train_seed(seed, options))
        print(f"seed {seed}\n{summary(runs[-1:])}", flush=True)
    words = sys.argv[1:] if arguments is None else arguments
    result = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.end_to_end", *words]),
        "machine": demo.machine(),
        "runs": runs,
    }
    args.results.mkdir(parents=True, exist_ok=True)
    steps = f"-{args.max_steps}steps" if args.max_steps else ""
    target = args.results / f"{args.precision}{steps}.json"
    write_text(target, json.dumps(result, indent=1) + "\n")
    print(f"all seeds\n{summary(runs)}\nResult: {target}")


if __name__ == "__main__":
    main()
