"""The tables of docs/roofline.md, from the stored predictions; and those of a measured run."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.gpu import published
from benchmarks.gpu.cards import CARDS, Card, card_of
from benchmarks.gpu.predict import PREDICTIONS, estimate
from benchmarks.gpu.results import GREEN, row_name
from benchmarks.gpu.workloads import workloads
from benchmarks.measure import ROOT
from benchmarks.report import load_results, write_atomically

PAGE = ROOT / "docs" / "roofline.md"
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
BLOCK = re.compile(r"(<!-- roofline: (\S+) -->\n).*?(<!-- /roofline -->)", re.DOTALL)
OURS = "**vlmkernels**"
SHAPES = {
    "info_nce": "D={d}",
    "sigmoid_loss": "D={d}",
    "contrastive_distillation": "D={d}, teacher {e}",
    "linear_cross_entropy": "[{n}, {d}] x {v} classes",
    "distillation": "[{rows}, {classes}]",
    "linear_distillation": "[{n}, {d}] of [{n}, {e}] x {v} classes",
    "embedding_distillation": "[{rows}, {width}]",
    "interval_attention": "{batch} x {heads} heads of {width}, {queries} x {keys}",
    "perceiver_attention": "{batch} x 8 heads of 64",
    "gated_residual": "[{batch}, {tokens}, {width}]",
    "srau": "{levels} levels of [{batch}, {tokens}, {width}]",
    "gated_linear_residual": "[{rows}, {inner}] -> {width}",
    "linear": "[{rows}, {inner}] -> {width}",
    "mlp": "[{rows}, {inner}] -> {width} -> {inner}",
    "gated_mlp": "[{rows}, {inner}] -> {width} -> {inner}",
    "topk_similarity": "M={m} D={d}",
    "retrieval_ranks": "D={d}",
    "mine_hard_negatives": "M={m} D={d}",
    "relative_representation": "{m} anchors, D={d}",
    "relative_similarity": "{n} x {m} rows of {k} among {anchors} anchors",
    "contrastive_search_score": "{k} candidates, {t} tokens, D={d}",
    "nms": "boxes of a region proposal network",
    "roi_align": "{channels} channels, 7 x 7 bins",
}
LABEL = "**Model, not measured.**"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows)) + "\n"


def time(microseconds: float) -> str:
    if microseconds < 1e3:
        return f"{microseconds:.3g} µs"
    return f"{microseconds / 1e3:.3g} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.3g} s"


def _size(count: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1e3
    return f"{count:.3g} {units[-1]}"


def _what(entry: dict[str, Any]) -> str:
    return f"{entry['form']}, {SHAPES[entry['op']].format(**entry['sizes'])}"


def _estimates(entries: list[dict[str, Any]], known: Mapping[str, Card]) -> str:
    """At the ceilings of the cards on which they were measured."""
    entries = [
        entry | {"cards": {c: x | estimate(x, known[c]) for c, x in entry["cards"].items()}}
        for entry in entries
    ]
    parts = []
    cards = list(CARDS)
    without = [c for c in cards if not any(entry["cards"][c]["code"] for entry in entries)]
    label = f"{LABEL} Lower bounds per card; for {', '.join(without)} without the code bound."
    if measured_on := [name for name, card in known.items() if card.ceilings]:
        label += f" {', '.join(measured_on)} at the ceilings measured there."
    for op in dict.fromkeys(entry["op"] for entry in entries):
        rows = []
        for entry in (x for x in entries if x["op"] == op):
            first = entry["cards"][cards[0]]
            flops = _size(first["flops"] / 1e6, ("MFLOP", "GFLOP", "TFLOP")) if first["flops"] else "–"
            theirs = "; ".join(
                f"{x.peer}: {time(x.microseconds)} ({x.on})" for x in published.figures_for(entry)
            )
            rows.append(
                (
                    _what(entry), entry["type"], entry["direction"],
                    _size(first["bytes"] / 1e3, ("kB", "MB", "GB")), flops, str(first["kernels"]),
                    *(f"{time(entry['cards'][c]['us'])} {entry['cards'][c]['bound']}" for c in cards),
                    theirs or "–",
                )
            )  # fmt: skip
        head = (
            "workload",
            "type",
            "pass",
            "bytes",
            "products",
            "kernels",
            *cards,
            "published by peers, on their machines",
        )
        parts.append(f"### {op}\n\n{label}\n\n{_markdown(head, rows, 3)}")
    return "\n".join(parts)


def _code(entries: list[dict[str, Any]], _: Mapping[str, Card]) -> str:
    """A row for each kernel and type; further ones where its loop does other work."""
    rows: dict[tuple[str, ...], str] = {}
    targets = {card.target: name for name, card in reversed(CARDS.items())}
    shown = [t for t in reversed(targets) if any(x["cards"][targets[t]]["code"] for x in entries)]
    for entry in entries:
        of_target = [entry["cards"][targets[target]]["code"] for target in shown]
        for kernel in of_target[0]:
            shares = tuple(f"{code[kernel][1]:.0%} {code[kernel][0]}" for code in of_target)
            rows.setdefault(
                (f"`{kernel}`", entry["type"], *shares),
                f"{entry['op']}, {entry['form']}, {entry['direction']}",
            )
    cards = [f"{t} ({', '.join(c.name for c in CARDS.values() if c.target == t)})" for t in shown]
    ordered = sorted((kernel, first, type, *x) for (kernel, type, *x), first in rows.items())
    return f"{LABEL} At most:\n\n{_markdown(('kernel', 'first in', 'type', *cards), ordered, 3)}"


def _cards(_: list[dict[str, Any]], known: Mapping[str, Card]) -> str:
    head = (
        "card",
        "target",
        "bf16, fp16",
        "TF32",
        "FP32",
        "memory",
        "multiprocessors",
        "clock",
        "cache",
        "source",
    )
    rows = [
        (
            c.name, c.target, *(f"{x:g} TFLOP/s" for x in (c.half, c.tf32, c.fp32)), f"{c.bandwidth:g} GB/s",
            str(c.multiprocessors), f"{c.clock} MHz", f"{c.cache} MiB", c.source,
        )
        for c in CARDS.values()
    ]  # fmt: skip
    ceilings = [
        (
            card.name,
            f"{card.bandwidth:.4g} GB/s",
            *(_rates(card.ceilings[kind]) for kind in ("half", "tf32", "fp32")),
        )
        for card in known.values()
        if card.ceilings
    ]
    text = _markdown(head, rows, 2)
    if ceilings:
        names = ("card", "copy, read and written", "bf16", "TF32", "FP32")
        text += "\nMeasured: copies, and products of cuBLAS by their depth K.\n\n" + _markdown(
            names, ceilings, 1
        )
    return text


def _rates(by_depth: Mapping[int, float]) -> str:
    return ", ".join(f"{rate / 1e12:.4g} TFLOP/s at K={depth}" for depth, rate in by_depth.items())


def _published(*_: Any) -> str:
    head = ("peer", "what", "on", "time", "source")
    rows = [
        (x.peer, f"{x.op}, {x.form}, {x.direction}", x.on, time(x.microseconds), x.source)
        for x in published.FIGURES
    ]
    return _markdown(head, rows, 5)


TABLES = {"estimates": _estimates, "code": _code, "cards": _cards, "published": _published}


def row_names() -> list[str]:
    """Of every workload in its directions."""
    return [row_name(w.op, w.form, w.type, x) for w in workloads() for x in w.directions]


def in_order(rows: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order of the workloads."""
    return [rows[name] for name in row_names() if name in rows]


def _runs(results: Iterable[dict[str, Any]]) -> str:
    """The measured rows, without those of kernels that have not passed their tests."""
    parts = []
    for result in results:
        rows = in_order(result["rows"])
        for run, header in result["runs"].items():
            entries = [x for x in rows if (x["run"], x["state"]) == (run, GREEN)]
            if not entries:
                continue
            facts = (
                f"`{header['command']}`, {header['date']}, commit {header['commit'][:12]}, {header['gpu']}"
            )
            versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
            parts.append(f"### {result['machine']}\n\n{facts}; {versions}\n\n{measured(entries)}")
        hidden = Counter(x["state"] for x in rows if x["state"] != GREEN)
        if hidden:
            parts.append(f"Not shown: {', '.join(f'{n} {state}' for state, n in hidden.items())} rows.\n")
    return "\n".join(parts) or "No run on a GPU is stored.\n"


def render(text: str, predictions: dict[str, Any], results: Iterable[dict[str, Any]]) -> str:
    """The page with its tables filled in."""
    results = list(results)
    cards = dict(CARDS)
    for result in results:
        for found in result["ceilings"].values():
            card = card_of(result["runs"][found["run"]]["gpu"])
            if card is not None:
                cards[card.name] = card.measured(found)
    header = predictions["header"]
    made = (
        f"`{header['command']}`, {header['date']}, commit {header['commit'][:12]}, "
        f"Triton {header['triton']}, torch {header['torch']}\n"
    )

    def fill(found: re.Match) -> str:
        if found[2] == "made":
            return f"{found[1]}\n{made}\n{found[3]}"
        if found[2] == "measured":
            return f"{found[1]}\n{_runs(results)}\n{found[3]}"
        return f"{found[1]}\n{TABLES[found[2]](predictions['entries'], cards)}\n{found[3]}"

    return BLOCK.sub(fill, text)


def stored() -> list[dict[str, Any]]:
    """The runs on GPUs; those of small inputs measure nothing."""
    return [result for result in load_results(RESULTS) if not result["machine"].endswith("-quick")]


def write() -> None:
    """The page, from what is stored."""
    predictions = json.loads(PREDICTIONS.read_text(encoding="utf-8"))
    write_atomically(PAGE, render(PAGE.read_text(encoding="utf-8"), predictions, stored()))


def _kernels(entry: Mapping[str, Any]) -> str:
    found = entry["kernels"]
    return time(found["seconds"]["median"] * 1e6) if "seconds" in found else "–"


def measured(rows: Iterable[dict[str, Any]]) -> str:
    """What a run measured: ours, its prediction, the peers over ours, and whether our kernels are right."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        name = row_name(row["op"], row["form"], row["type"], row["direction"])
        if "error" in row:
            lines.append((name, OURS, "–", "–", f"failed: {row['error']}", "", "", row["state"]))
            continue
        prediction = row.get("no_prediction", "–"), "–"
        if "predicted_us" in row:
            prediction = time(row["predicted_us"]), f"{row['of_predicted']:.2f}"
        median = time(row["seconds"]["median"] * 1e6)
        lines.append((name, OURS, median, _kernels(row), "1", *prediction, row["state"]))
        for peer in row["peers"]:
            if "why_not" in peer:
                lines.append(("", peer["name"], "–", "–", f"not measured: {peer['why_not']}", "", "", ""))
            else:
                median, ratio = time(peer["seconds"]["median"] * 1e6), f"{peer['ratio']['median']:.2f}"
                lines.append(("", peer["name"], median, _kernels(peer), ratio, "", "", ""))
    head = (
        "workload",
        "implementation",
        "time",
        "kernels alone",
        "× ours",
        "predicted, no faster than",
        "measured / predicted",
        "tests",
    )
    return _markdown(head, lines, 2)


def line(row: Mapping[str, Any]) -> str:
    """A row in short."""
    peers = [peer for peer in row["peers"] if "ratio" in peer]
    best = min(peers, key=lambda peer: peer["ratio"]["median"], default=None)
    beside = f"; {best['ratio']['median']:.2f} times that: {best['name']}" if best else ""
    name = row_name(row["op"], row["form"], row["type"], row["direction"])
    return f"{name}: {time(row['seconds']['median'] * 1e6)}, kernels alone {_kernels(row)}{beside}"
