"""docs/model_benchmarks.md, made from the stored results, and a line of them for the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import measure, report

from .systems import OURS

PAGE = measure.ROOT / "docs" / "model_benchmarks.md"
README = measure.ROOT / "README.md"
HEADLINE = re.compile(r"(?<=<!-- models -->\n).*?(?=<!-- /models -->)", re.DOTALL)
HEADLINE_BATCH = 32
INTRODUCTION = """# Whole models

A training step (forward and backward) and the embedding of images and texts, against the same model with the
same weights in the peers' code, in alternating calls. Above 1, ours is faster. "bf16" is bfloat16 autocast on
both sides. Our embeddings use packed weights (`prepare_for_inference`). "of the limit" is the time that the
peer's matrix products would take at the machine's best rate, as a fraction of our time; it exceeds 100% if
ours skips products. "extra memory" is the peak above parameters, gradients and inputs, in a separate process.
The optimizer (torch's fused AdamW, the same for both) is not part of a step; its time is given below.

Texts either fill the context or are "captions" with the lengths of COCO's (9 to 31 tokens, 13.5 on average),
padded as each library's tokenizer pads them: to the full context for open_clip and ours, to the longest text
of the batch for transformers. On a CPU ours skips the padding.

No peer implements the same Flamingo or SimVLM: only ours is timed; their attention and resampler are measured
beside peers as modules in [benchmarks.md](benchmarks.md). Their captions are padded to 32 tokens.

This page is generated: `python -m benchmarks.models --write-docs`.
"""
COLUMNS = ("work", "implementation", "time", "× ours: median (p20–p80)", "extra memory", "of the limit")


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _rows(line: dict[str, Any]) -> list[tuple[str, ...]]:
    out = []
    for row in line["rows"]:
        first = "seconds" in row and "ratio" not in row
        if "why_not" in row:
            out.append(("", row["name"], "–", f"not measured: {row['why_not']}", "", ""))
            continue
        ratio = "1" if first else "{median:.2f} ({p20:.2f}–{p80:.2f})".format(**row["ratio"])
        peak = row.get("extra_bytes")
        memory = f"{peak / 2**20:.0f} MiB" if isinstance(peak, int) else peak or "–"
        share = f"{line['of_limit']:.0%}" if first else ""
        name = f"**{row['name']}**" if first else row["name"]
        out.append(
            (line["name"] if first else "", name, _seconds(row["seconds"]["median"]), ratio, memory, share)
        )
    return out


def _table(rows: list[tuple[str, ...]]) -> str:
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"
    )


def _parts(line: dict[str, Any]) -> str:
    def shares(parts: dict[str, float]) -> str:
        ordered = sorted(parts.items(), key=lambda item: -item[1])
        return ", ".join(
            f"{name} {_seconds(seconds)}"
            for name, seconds in ordered
            if seconds >= 0.005 * sum(parts.values())
        )

    lines = [f"- {line['name']}"]
    lines += [f"  - {name}: {shares(parts)}" for name, parts in line["parts"].items()]
    for name, seconds in line["optimizer"].items():
        lines.append(f"  - optimizer step of {name}: {_seconds(seconds['median'])}")
    return "\n".join(lines) + "\n"


def text(line: dict[str, Any]) -> str:
    return "\n".join("  ".join(cell for cell in row if cell) for row in _rows(line)) + "\n" + _parts(line)


def render(results: list[dict[str, Any]]) -> str:
    out = [INTRODUCTION]
    for result in results:
        lines = result["lines"]
        out.append(f"## {result['machine']}\n")
        for run in result["runs"].values():
            out.append(report.provenance(run))
        head = [COLUMNS, ("---", "---", "---:", "---:", "---:", "---:")]
        out.append(_table(head + [row for line in lines for row in _rows(line)]))
        out.append("### Where the time goes\n\nOne call under torch's profiler, by operators.\n")
        out.append("".join(_parts(line) for line in lines))
    return "\n".join(out)


def headline(results: list[dict[str, Any]]) -> str:
    """README's table: our time, and the factors of the peers, without their patched selves."""
    out = []
    for result in results:
        lines = [line for line in result["lines"] if line["batch"] == HEADLINE_BATCH]
        names = [row["name"] for line in lines for row in line["rows"] if "ratio" in row]
        peers = [name for name in dict.fromkeys(names) if not name.endswith(", patched")]
        rows: list[tuple[str, ...]] = [("work", OURS, *peers), ("---", *["---:"] * (1 + len(peers)))]
        for line in lines:
            ours, *others = line["rows"]
            ratios = {row["name"]: f"{row['ratio']['median']:.2f}×" for row in others if "ratio" in row}
            rows.append(
                (line["name"], _seconds(ours["seconds"]["median"]), *(ratios.get(name, "") for name in peers))
            )
        out.append(f"{_table(rows)}\n{result['machine']}: `python -m benchmarks.models`.\n")
    return "\n" + "\n".join(out) + "\n"


def write(folder: Path) -> None:
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    report.write_atomically(PAGE, render(results))
    readme = README.read_text(encoding="utf-8")
    report.write_atomically(README, HEADLINE.sub(lambda _: headline(results), readme))
