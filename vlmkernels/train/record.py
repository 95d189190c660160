"""What a run tells: metrics.jsonl, accelerate's trackers (TensorBoard) and the progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

METRICS = "metrics.jsonl"


def _last_values(path: Path) -> tuple[float, float]:
    """Loss and R@1 of the last line, which a run that is resumed at its end has nothing to add to."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    last = json.loads(lines[-1]) if lines else {}
    return last.get("loss", math.nan), last.get("retrieval_at_1", math.nan)


class Recorder:
    """Writes the values of logged steps; any process but the first only keeps the totals."""

    def __init__(
        self, accelerator: Accelerator, run: Path, *, step: int, steps: int, batch_size: int, progress: bool
    ) -> None:
        main = accelerator.is_main_process
        self._accelerator, self._batch_size = accelerator, batch_size
        self._first = self._step = step
        self._begin = time.perf_counter()
        self._last = (step, self._begin)
        self._loss, self._retrieval = _last_values(run / METRICS)
        # Events after the checkpoint are written again: TensorBoard drops the earlier ones.
        restart = {"purge_step": step + 1} if step else {}
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": restart})
        self._file = (run / METRICS).open("a", encoding="utf-8") if main else None
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
        self._bar.close()
        if self._file is not None:
            self._file.close()
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def record(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Values of one step; ``pairs_per_second`` is measured since the step recorded before."""
        clock = time.perf_counter()
        rate = (step - self._last[0]) * self._batch_size / max(clock - self._last[1], 1e-9)
        self._last = (step, clock)
        self._loss, self._retrieval = values["loss"], values["retrieval_at_1"]
        values = {**values, "pairs_per_second": round(rate, 1)}
        if self._file is not None:
            self._file.write(json.dumps({"step": step, "epoch": epoch, **values, "time": time.time()}) + "\n")
            self._file.flush()
        self._accelerator.log({f"train/{name}": value for name, value in values.items()}, step=step)
        text = f"loss {self._loss:.3f}, R@1 {self._retrieval:.3f}, {rate:.0f} pairs/s"
        self._bar.set_postfix_str(text, refresh=False)

    def advance(self) -> None:
        """One step is done."""
        self._step += 1
        self._bar.update(1)

    def flush(self) -> None:
        """Bring the lines so far to the disk: a checkpoint must not outlive the metrics before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def totals(self) -> dict[str, float]:
        """Last loss and R@1, and the time since the run was started or resumed."""
        seconds = time.perf_counter() - self._begin
        return {
            "loss": self._loss,
            "retrieval_at_1": self._retrieval,
            "seconds": seconds,
            "pairs_per_second": (self._step - self._first) * self._batch_size / max(seconds, 1e-9),
        }
