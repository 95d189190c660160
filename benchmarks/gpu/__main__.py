"""Tests, times and compares the kernels on a GPU, or predicts what they may reach without one.

python -m benchmarks.gpu              correctness, compute-sanitizer, timings against peers, comparison
python -m benchmarks.gpu --predict    benchmarks/gpu/predictions.json and the tables of docs/roofline.md
python -m benchmarks.gpu --device cpu --quick    every step on small inputs, for machines without a GPU
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import pages, predict
from benchmarks.report import write_atomically

say = partial(print, flush=True)


def write_predictions(path: Path, *, quick: bool, command: str) -> None:
    predictions = predict.predict(quick=quick, command=command, say=say)
    write_atomically(path, json.dumps(predictions, indent=1, ensure_ascii=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--predict", action="store_true", help="no measurement: write predictions and page")
    parser.add_argument("--quick", action="store_true", help="small inputs, few cases, no torch.compile")
    parser.add_argument("--predictions", type=Path, default=predict.PREDICTIONS, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.predict:
        command = "python -m benchmarks.gpu --predict" + " --quick" * options.quick
        write_predictions(options.predictions, quick=options.quick, command=command)
        if options.predictions == predict.PREDICTIONS and not options.quick:
            pages.write(json.loads(options.predictions.read_text(encoding="utf-8")))
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
