"""The records of a run: metrics.jsonl, accelerate's trackers (TensorBoard) and the progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from vlmkernels._files import named

METRICS = "metrics.jsonl"


def _last_values(path: Path) -> dict[str, Any]:
    """The last line; a run that is resumed at its end adds none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else {}


SHORT = {"retrieval_at_1": "R@1"}


def score_text(scores: Mapping[str, float]) -> str:
    """Scores by their short names."""
    return ", ".join(f"{SHORT.get(n, n.replace('_', ' '))} {value:.3f}" for n, value in scores.items())


class Recorder:
    """Writes the values of logged steps; processes other than the first only keep the totals."""

    def __init__(
        self,
        accelerator: Accelerator,
        run: Path,
        *,
        scores: Sequence[str],
        step: int,
        steps: int,
        batch_size: int,
        progress: bool,
    ) -> None:
        main = accelerator.is_main_process
        self._accelerator, self._scores, self._batch_size = accelerator, scores, batch_size
        self._first = self._step = step
        self._begin = time.perf_counter()
        self._last = (step, self._begin)
        self._values = _last_values(run / METRICS)
        # Events after the checkpoint are written again: TensorBoard drops the earlier ones.
        restart = {"purge_step": step + 1} if step else {}
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": restart})
        self._path = run / METRICS
        self._file = self._path.open("a", encoding="utf-8") if main else None
        self._bar = tqdm(
            total=steps,
            initial=step,
            unit="step",
            disable=not (main and progress),
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as closing:
            if error is not None:  # must not be replaced by a second error of a full disk
                closing.enter_context(contextlib.suppress(OSError))
            for tracker in self._accelerator.trackers:
                closing.callback(tracker.finish)
            if self._file is not None:
                closing.callback(self._file.close)
            closing.callback(self._bar.close)

    def record(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Values of one step; ``pairs_per_second`` is measured since the step recorded before."""
        clock = time.perf_counter()
        rate = (step - self._last[0]) * self._batch_size / max(clock - self._last[1], 1e-9)
        self._last = (step, clock)
        self._values = values = {**values, "pairs_per_second": round(rate, 1)}
        if self._file is not None:
            line = json.dumps({"step": step, "epoch": epoch, **values, "time": time.time()}) + "\n"
            with named(self._path):
                self._file.write(line)
                self._file.flush()
        self._accelerator.log({f"train/{name}": value for name, value in values.items()}, step=step)
        text = f"loss {values['loss']:.3f}, {score_text(self._last_scores())}, {rate:.0f} pairs/s"
        self._bar.set_postfix_str(text, refresh=False)

    def advance(self) -> None:
        """One step is done."""
        self._step += 1
        self._bar.update(1)

    def flush(self) -> None:
        """Flush the lines to the disk: a checkpoint must not outlive the metrics before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _last_scores(self) -> dict[str, float]:
        return {name: self._values.get(name, math.nan) for name in self._scores}

    def totals(self) -> dict[str, Any]:
        """Last loss and scores, and the time since the run was started or resumed."""
        seconds = time.perf_counter() - self._begin
        return {
            "loss": self._values.get("loss", math.nan),
            "scores": self._last_scores(),
            "seconds": seconds,
            "pairs_per_second": (self._step - self._first) * self._batch_size / max(seconds, 1e-9),
        }
