"""The mutation check: every seeded fault of mutants*.py must be seen by the tests of the kernels.

`python -m tests.gpu.mutations --write` runs all of them on every rung and writes the table of
docs/gpu_testing.md; names of kernels restrict the run.
"""

import argparse
import contextlib
import graphlib
import importlib
import pkgutil
import re
import sys
import tempfile
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import vlmkernels.triton

from . import (
    mutants,
    mutants_classes,
    mutants_dense,
    mutants_detection,
    mutants_distillation,
    mutants_gated,
    mutants_pairwise,
    mutants_relative,
    mutants_retrieval,
    mutants_rows,
)
from .cases import CASES
from .mutants import Mutation
from .ptx import simulated
from .sanitizer import Violation
from .trials import Executor, sanitized

MUTANTS = [
    *mutants.MUTANTS,
    *mutants_pairwise.MUTANTS,
    *mutants_classes.MUTANTS,
    *mutants_distillation.MUTANTS,
    *mutants_rows.MUTANTS,
    *mutants_dense.MUTANTS,
    *mutants_gated.MUTANTS,
    *mutants_relative.MUTANTS,
    *mutants_retrieval.MUTANTS,
    *mutants_detection.MUTANTS,
]
PAGE = Path(__file__).parents[2] / "docs" / "gpu_testing.md"
UNSEEN = "not seen"
SECTION = "mutations"
RUNGS: dict[str, Executor] = {"sanitized interpreter": sanitized, "PTX simulator": simulated}


def sources() -> dict[str, str]:
    """The Triton modules by name and their text, each after those it imports."""
    folder = Path(vlmkernels.triton.__path__[0])
    names = [found.name for found in pkgutil.iter_modules([str(folder)])]
    texts = {name: (folder / f"{name}.py").read_text() for name in names}
    imports = {
        name: {other for other in texts if re.search(rf"from vlmkernels\.triton(\.| import ){other}\b", text)}
        for name, text in texts.items()
    }
    return {name: texts[name] for name in graphlib.TopologicalSorter(imports).static_order()}


def patched(mutation: Mutation, text: str) -> str:
    found = text.count(mutation.old)
    if found != mutation.count:
        raise ValueError(f"{mutation.name}: {mutation.old!r} occurs {found} times, not {mutation.count}")
    return text.replace(mutation.old, mutation.new)


@contextlib.contextmanager
def mutated(mutation: Mutation) -> Iterator[None]:
    """The Triton modules run from a copy of their sources with the fault in it.

    The modules stay the same objects, so modules that imported them see the faulty kernels.
    """
    texts = sources()
    texts[mutation.module] = patched(mutation, texts[mutation.module])
    modules = {name: importlib.import_module(f"vlmkernels.triton.{name}") for name in texts}
    before = {name: dict(vars(module)) for name, module in modules.items()}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, text in texts.items():
                path = Path(folder) / f"{name}.py"  # Triton reads the source of a kernel from its file
                path.write_text(text)
                exec(compile(text, str(path), "exec"), vars(modules[name]))
            yield
        finally:
            for name, module in modules.items():
                _restore(module, before[name])


def _restore(module: types.ModuleType, names: dict) -> None:
    vars(module).clear()
    vars(module).update(names)


def verdict(mutation: Mutation, executor: Executor) -> str | None:
    """What the case of a mutation says of it, or None where it says nothing."""
    with mutated(mutation):
        try:
            CASES[mutation.case].run(executor)
        except AssertionError as error:
            if isinstance(error, Violation):
                return re.split(r": \d+ lanes| \(program", str(error))[0]
            return "wrong " + re.split(r":|\n", str(error))[0]
    return None


def row(mutation: Mutation, *verdicts: str | None) -> tuple[str, ...]:
    """A row of the table."""
    return (f"`{mutation.kernel}`", mutation.fault, *(said or UNSEEN for said in verdicts))


def table(rows: list[tuple[str, ...]], rungs: Iterable[str]) -> list[str]:
    head = ("kernel", "fault", *rungs)
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _parts(section: str) -> tuple[str, str, str]:
    """The page before, between and after the marks of a section."""
    before, begin, rest = PAGE.read_text().partition(f"<!-- {section} -->")
    between, end, after = rest.partition(f"<!-- /{section} -->")
    if not (begin and end):
        raise ValueError(f"{PAGE.name} has no section {section!r}")
    return before + begin, between, end + after


def write(lines: list[str], section: str = SECTION) -> None:
    before, _, after = _parts(section)
    PAGE.write_text("\n".join((before, *lines, after)))


def recorded(section: str = SECTION) -> list[tuple[str, ...]]:
    """The rows of a table on the page."""
    lines = _parts(section)[1].strip().splitlines()
    return [tuple(line.removeprefix("| ").removesuffix(" |").split(" | ")) for line in lines[2:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernels", nargs="*", help="all of them")
    parser.add_argument("--write", action="store_true", help="write the table of docs/gpu_testing.md")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    rows = []
    for mutation in MUTANTS:
        if not options.kernels or mutation.kernel in options.kernels:
            rows.append(row(mutation, *(verdict(mutation, executor) for executor in RUNGS.values())))
            print(" | ".join(rows[-1]), flush=True)
    if options.write:
        write(table(rows, RUNGS))
    sys.exit(any(set(verdicts) == {UNSEEN} for _, _, *verdicts in rows))


if __name__ == "__main__":
    main()
