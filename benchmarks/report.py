"""Results on disk and the tables made from them.

`results/<machine>.json` is `{"machine", "runs": {id: header}, "ops": {op: [case, ...]}}`; a case names the
run that measured it, and a run the tests of what it measured (verdicts.py). Documents hold
`<!-- benchmarks: NAME -->` ... `<!-- /benchmarks -->`; NAME is an op, "all", or "headline".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlmkernels._files import write_text

BLOCK = re.compile(r"(<!-- benchmarks: (\S+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)
COLUMNS = (
    "case",
    "implementation",
    "time",
    "× ours: median (p20–p80)",
    "extra memory",
    "kept for the backward",
    "of the limit",
)
SAVED = COLUMNS.index("kept for the backward")


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def merge(
    path: Path,
    machine: str,
    header: dict[str, Any],
    op: str,
    cases: Iterable[dict[str, Any]],
    declared: Iterable[str],
) -> None:
    """Put the measured `cases` of `op` into the file, where they replace those of the same name.

    The order is that of `declared`; cases that are not declared leave, and so do runs that no case names.
    """
    stored = (
        json.loads(path.read_text(encoding="utf-8"))
        if path.exists()
        else {"machine": machine, "runs": {}, "ops": {}}
    )
    run = header["id"]
    found = {case["name"]: case for case in stored["ops"].get(op, [])}
    found.update({case["name"]: {**case, "run": run} for case in cases})
    stored["runs"][run] = header
    stored["ops"][op] = [found[name] for name in declared if name in found]
    used = {case["run"] for of_op in stored["ops"].values() for case in of_op}
    stored["runs"] = {name: stored["runs"][name] for name in sorted(used)}
    write_atomically(path, json.dumps(stored, indent=1, ensure_ascii=False) + "\n")


def table(cases: Iterable[dict[str, Any]]) -> str:
    """Markdown: one row for each implementation of each case, ours first.

    What is kept for the backward has a column where it was measured.
    """
    cases = list(cases)
    rows = [COLUMNS, ("---", "---", "---:", "---:", "---:", "---:", "---:")]
    for case in cases:
        direction = "" if case["backward"] or "forward only" in case["name"] else ", forward only"
        ours = case["ours"]
        limit = f"{ours['of_limit']:.0%} ({ours['limit']})" if ours.get("of_limit") is not None else ""
        bytes_ours = size(ours.get("extra_bytes")), size(ours.get("saved_bytes"))
        rows.append((case["name"] + direction, "**vlmkernels**", _time(ours), "1", *bytes_ours, limit))
        for other in case["baselines"]:
            name = other["name"] + (" (best compiled)" if other["name"] == case.get("best_compiled") else "")
            if "why_not" in other:
                rows.append(("", name, "–", f"not measured: {other['why_not']}", "", "", ""))
            else:
                ratio = other["ratio"]
                shown = f"{ratio['median']:.2f} ({ratio['p20']:.2f}–{ratio['p80']:.2f})"
                bytes_theirs = size(other.get("extra_bytes")), size(other.get("saved_bytes"))
                rows.append(("", name, _time(other), shown, *bytes_theirs, ""))
    if not any("saved_bytes" in row for case in cases for row in (case["ours"], *case["baselines"])):
        rows = [row[:SAVED] + row[SAVED + 1 :] for row in rows]
    return _table(rows)


def _table(rows: Iterable[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def _time(entry: dict[str, Any]) -> str:
    return duration(entry["seconds"]["median"])


def duration(seconds: float) -> str:
    for unit, length in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= length or unit == "µs":
            value = seconds / length
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    raise AssertionError


def size(count: int | str | None) -> str:
    if count is None:
        return "–"
    if isinstance(count, str):
        return f"not measured: {count}"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def provenance(header: dict[str, Any], op: str | None = None) -> str:
    """What made a table: the command, when, where and on which versions."""
    rates = []
    for name, limit in header["limits"].items():
        unit = "GB/s" if name == "copy" else "GFLOP/s"
        rates.append(f"{name} {limit['rate'] / 1e9:.4g} {unit} ({limit['how']})")
    kernels = {op: header["kernels"][op]} if op in header["kernels"] else header["kernels"]
    changes = " with local changes" if header["dirty"] else ""
    device = f"{header['cpu']}, {header['gpu']}" if header.get("gpu") else header["cpu"]
    load = "load average {:.2f} at the start, {:.2f} at the end".format(header["load"][0], header["load"][-1])
    tests = [f"{name}: {_said(said)}" for name, said in header["tests"].items() if op in (None, name)]
    facts = [
        f"`{header['command']}`, {header['date']}, commit {header['commit'][:12]}{changes}",
        f"{device}, {header['isa']}, {header['threads']} threads, {load}",
        ", ".join(f"{name} {version}" for name, version in header["versions"].items()),
        "runs here: " + ", ".join(f"{name}: {kernel}" for name, kernel in kernels.items()),
        "limits: " + "; ".join(rates),
        "tests: " + "; ".join(tests),
    ]
    return "\n".join(f"- {fact}" for fact in facts) + "\n"


def _said(tests: dict[str, Any]) -> str:
    if "green" not in tests:
        return f"not run on the sources {tests['sources']}"
    return "{said}, on the sources {sources}, {on}, {date}".format(**tests)


def is_green(header: dict[str, Any], op: str) -> bool:
    """Whether tests of the sources that a run measured passed."""
    return bool(header["tests"].get(op, {}).get("green"))


def unverified(results: Iterable[dict[str, Any]]) -> list[str]:
    """Whose rows no document may have, since tests of what they measured were not seen to be green."""
    runs = {
        (op, result["machine"], case["run"]): result["runs"][case["run"]]
        for result in results
        for op, cases in result["ops"].items()
        for case in cases
    }
    return [
        f"{op} on {machine}, run {run}"
        for (op, machine, run), header in runs.items()
        if not is_green(header, op)
    ]


def _verified(result: dict[str, Any]) -> dict[str, Any]:
    ops = {
        op: [case for case in cases if is_green(result["runs"][case["run"]], op)]
        for op, cases in result["ops"].items()
    }
    return {**result, "ops": ops}


def render(block: str, results: list[dict[str, Any]]) -> str:
    """The text between the markers of `block`, of rows whose tests were green."""
    results = [_verified(result) for result in results]
    if block == "headline":
        return _headline(results)
    parts = []
    for result in results:
        ops = sorted(result["ops"]) if block == "all" else [op for op in result["ops"] if op == block]
        for op in ops:
            cases = result["ops"][op]
            for run in dict.fromkeys(case["run"] for case in cases):
                level = "##" if block == "all" else "###"
                parts.append(f"{level} {op} on {result['machine']}\n")
                parts.append(provenance(result["runs"][run], op))
                parts.append(table(case for case in cases if case["run"] == run))
    return "\n".join(parts) if parts else "No results yet.\n"


def _headline(results: list[dict[str, Any]]) -> str:
    parts = []
    for result in results:
        rows = [
            ("op", "case", "vlmkernels", "of the limit", "against"),
            ("---", "---", "---:", "---:", "---"),
        ]
        runs: dict[str, dict[str, None]] = {}  # the ops that each run measured
        for op, cases in result["ops"].items():
            for case in (c for c in cases if c["headline"]):
                timed = [other for other in case["baselines"] if "why_not" not in other]
                eager = [o for o in timed if not o["compiled"]][:1]
                best = [o for o in timed if o["name"] == case.get("best_compiled")]
                against = "; ".join(f"{o['ratio']['median']:.2f}× {o['name']}" for o in eager + best)
                share = f"{case['ours']['of_limit']:.0%}" if case["ours"].get("of_limit") is not None else ""
                rows.append((op, case["name"], _time(case["ours"]), share, against))
                runs.setdefault(case["run"], {})[op] = None
        if not runs:
            continue
        parts.append(_table(rows))
        for run, ops in runs.items():
            header = result["runs"][run]
            tests = {(header["tests"][op]["on"], header["tests"][op]["date"]) for op in ops}
            passed = "; ".join(f"{on}, {date}" for on, date in sorted(tests))
            parts.append(
                f"{result['machine']}: `{header['command']}`, {header['date']}. "
                f"The tests of the measured sources passed on {passed}.\n"
            )
    return "\n".join(parts) if parts else "No results yet.\n"


def load_results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def write_docs(results_folder: Path, documents: Iterable[Path]) -> list[Path]:
    """Fill every marked block of `documents`; returns those that changed."""
    results, changed = load_results(results_folder), []
    for path in documents:
        before = path.read_text(encoding="utf-8")
        after = BLOCK.sub(lambda found: f"{found[1]}\n{render(found[2], results)}\n{found[3]}", before)
        if after != before:
            write_atomically(path, after)
            changed.append(path)
    return changed
