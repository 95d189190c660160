"""Times, tests and compares the kernels on a GPU, or predicts lower bounds of their times without one.

    python -m benchmarks.gpu                 ceilings of the card, times against peers, tests and
                                             compute-sanitizer; into benchmarks/results/gpu/<card>.json
    python -m benchmarks.gpu info_nce        one op
    python -m benchmarks.gpu --only tests    one of the steps, in any order: a row is untested, green or red
                                             by the tests of the same sources
    python -m benchmarks.gpu sweep info_nce  times the tiles that its tables might have, prints the change
    python -m benchmarks.gpu --take FOLDER   adds results that came from another machine
    python -m benchmarks.gpu --predict       benchmarks/gpu/predictions.json, the tables of docs/roofline.md
    python -m benchmarks.gpu --device cpu --quick    every step on small inputs, where there is no GPU

Results are written after every row, and rows of the same sources are not measured again. The exit status is
1 if a kernel is wrong or results could not be written, and 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.gpu import day, pages, predict, trials
from benchmarks.gpu.cards import CARDS
from benchmarks.gpu.day import OPS, STEPS


def write_predictions(path: Path, *, quick: bool, command: str, say: Callable[[str], None]) -> None:
    predictions = predict.predict(quick=quick, command=command, say=say)
    text = json.dumps(predictions, indent=1, ensure_ascii=False) + "\n"
    # A step has one line
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    report.write_atomically(path, text)
    if path == predict.PREDICTIONS:
        pages.write()


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}")


def arguments_of(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("ops", nargs="*", metavar="[sweep] op", help=", ".join(OPS))
    add("--only", action="append", choices=STEPS, help="only these steps")
    add("--form", type=_regex, default="", metavar="REGEX", help="workloads whose name matches")
    add("--no-compile", action="store_true", help="without the peers that torch compiles")
    add("--minutes", type=float, help="stop by then; what is under way then is lost, what was stored is not")
    add("--again", action="store_true", help="also measure what is stored for the same sources")
    add("--slow-cases", action="store_true", help="every case of tests/gpu, not only the default ones")
    add("--sanitizer-minutes", type=float, default=5.0, help="for each tool of compute-sanitizer")
    add("--wheels", type=Path, metavar="FOLDER", help="wheels of peers, which are unpacked for this run")
    add("--results", type=Path, metavar="FOLDER", help="benchmarks/results/gpu; nothing with --quick")
    add("--take", type=Path, metavar="FOLDER", help="no measurement: add the results there")
    add("--predict", action="store_true", help="no measurement: write predictions and page")
    add("--write-docs", action="store_true", help="only write docs/roofline.md from what is stored")
    add("--quick", action="store_true", help="small inputs, few cases, no torch.compile")
    add("--device", default="cuda")
    add("--card", choices=list(CARDS), help="whose predictions to compare with")
    add("--seconds", type=float, default=3.0, help="of rounds for one row")
    add("--predictions", type=Path, default=predict.PREDICTIONS, metavar="FILE")
    add("--cases-alone", action="store_true", help="only the cases, which compute-sanitizer runs")
    options = parser.parse_args(words)
    options.sweep = options.ops[:1] == ["sweep"]
    options.ops = options.ops[options.sweep :]
    offered = day.SWEPT if options.sweep else OPS
    if unknown := set(options.ops) - set(offered):
        parser.error(f"no op {sorted(unknown)}; there are {offered}")
    options.ops = options.ops or offered
    if options.predict and options.quick and options.predictions == predict.PREDICTIONS:
        parser.error("--predict --quick needs --predictions FILE, or it would replace those of real sizes")
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu goes with --quick: its kernels are interpreted")
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels must be a folder, got {options.wheels}")
    if not any(options.form.search(name) for name in pages.row_names()):
        parser.error(f"--form {options.form.pattern!r} matches none of {len(pages.row_names())} workloads")
    if options.results is None and not options.quick:
        options.results = pages.RESULTS
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = arguments_of(words)
    command = shlex.join(["python", "-m", "benchmarks.gpu", *words])
    say = partial(print, flush=True)
    if options.predict:
        write_predictions(options.predictions, quick=options.quick, command=command, say=say)
    elif options.write_docs:
        pages.write()
    elif options.take is not None:
        return day.take(options.take, options.results, say)
    elif options.device != "cpu" and not torch.cuda.is_available():
        print("no GPU that torch can use; --predict and --device cpu --quick need none", file=sys.stderr)
        return 2
    elif options.cases_alone:
        chosen = trials.cases_for(options.ops, slow=False, one_each=options.quick)
        return int(not trials.run_aloud((c for c in chosen if not c.far), options.device, say))
    else:
        return day.Day(options, command, say).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
