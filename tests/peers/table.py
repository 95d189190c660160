"""The tables of docs/integrations.md: families by behaviours, and what patch does with each class."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from tests.peers.behaviours import BEHAVIOURS, outcome, patched
from tests.peers.families import Family
from tests.peers.language_models import FAMILIES, LANGUAGE_MODELS, REFUSED
from vlmkernels.integrations import patch

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def behaviours_table() -> str:
    """Runs every cell."""
    rows = [[family.name, *(outcome(family, b) for b in BEHAVIOURS)] for family in FAMILIES]
    return _table(["family", *BEHAVIOURS], rows)


def classes_table() -> str:
    return _table(
        ["family", "class", "modules", "", "what runs, or why not"], [r for f in FAMILIES for r in classes(f)]
    )


def classes(family: Family) -> list[list[str]]:
    """What patch reports of each class of the family."""
    report = patched(family)[1]
    counts = Counter((entry.cls.rpartition(".")[2], entry.status, entry.why) for entry in report)
    return [[family.name, cls, str(n), status, why] for (cls, status, why), n in counts.items()]


def fused_table() -> str:
    rows = [row for family in (*LANGUAGE_MODELS, *REFUSED) for row in fused(family)]
    return _table(["model", "class", "", "what runs, or why not"], rows)


def fused(family: Family) -> list[list[str]]:
    """What patch reports of the loss of a language model."""
    report = patch(family.build(), loss=False, attention=False, linear=False, padding=False, fused_loss=True)
    name = family.name.removesuffix(", fused loss")
    return [[name, entry.cls.rpartition(".")[2], entry.status, entry.why] for entry in report]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def committed(name: str) -> list[list[str]]:
    """The rows of a table of the page, without its head."""
    lines = _between(PAGE.read_text(), name).strip().splitlines()
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


def _between(page: str, name: str) -> str:
    found = re.search(f"<!-- {name} -->\n(.*)\n<!-- /{name} -->", page, re.DOTALL)
    assert found is not None, f"docs/integrations.md has no table {name!r}"
    return found[1]


def write() -> None:
    tables = {"classes": classes_table(), "fused": fused_table(), "behaviours": behaviours_table()}
    page = PAGE.read_text()
    for name, table in tables.items():
        page = re.sub(
            f"(?s)(?<=<!-- {name} -->\n).*(?=\n<!-- /{name} -->)", lambda _, table=table: table, page
        )
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(page)
    os.replace(temporary, PAGE)
