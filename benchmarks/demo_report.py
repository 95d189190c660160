"""The demo's report: one HTML page without any outside resource, and tables for the terminal."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

TEMPLATES = Path(__file__).parent / "templates"
DIRECTIONS = (("image_to_text", "picture to text"), ("text_to_image", "text to picture"))
CLASS_TEXTS = {"captions": "all training names of the group", "names": "the words of the group's name"}


def percent(value: float) -> str:
    """One decimal, two below one per cent."""
    return f"{100 * value:.{2 if 0 < value < 0.01 else 1}f} %"


def size(count: int | None) -> str:
    """Bytes in the unit people read."""
    if count is None:
        return ""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.{0 if count >= 100 * unit else 1}f} {name}"
    return f"{count} B"


def milliseconds(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def evaluation_text(judged: dict[str, Any]) -> str:
    """The table of recalls and accuracies for the terminal."""
    lines = [f"{'retrieval':42}{'R@1':>9}{'R@5':>9}{'R@10':>9}{'median':>9}"]
    for name, result in judged.items():
        found = result["retrieval"]
        lines.append(f"{name}: {found['images']} pictures, {found['texts']} texts")
        for key, label in DIRECTIONS:
            for row, values in ((label, found[key]), ("chance", found[key]["chance"])):
                cells = "".join(f"{percent(values[f'R@{k}']):>9}" for k in (1, 5, 10))
                lines.append(f"  {row:40}{cells}{values['median_rank']:>9.0f}")
    lines.append(
        f"{'zero-shot, ' + str(_classes(judged)) + ' groups':42}{'top-1':>9}{'top-5':>9}{'by class':>9}"
    )
    for name, result in judged.items():
        lines.append(name)
        for key, label in CLASS_TEXTS.items():
            lines.append(f"  {label:40}{_accuracies(result['zero_shot'][key])}")
        chance = result["zero_shot"]["captions"]["chance"]
        lines.append(
            f"  {'chance':40}{_accuracies(chance)}   always the largest: {percent(chance['largest_class'])}"
        )
    return "\n".join(lines)


def _classes(judged: dict[str, Any]) -> int:
    return next(iter(judged.values()))["zero_shot"]["captions"]["classes"]


def _accuracies(values: dict[str, Any]) -> str:
    return "".join(f"{percent(values[key]):>9}" for key in ("top1", "top5", "mean_per_class"))


def timing_text(timings: Sequence[dict[str, Any]]) -> str:
    """The table of times and memory for the terminal."""
    lines = []
    for table in timings:
        title = f"N={table['n']} D={table['d']} fp32"
        lines.append(f"{title:38}{'ms':>8}{'p20-p80':>16}{'time / ours':>13}{'extra memory':>14}")
        for row in table["rows"]:
            if row["why"]:
                lines.append(f"  {row['name']:36}  not measured: {row['why']}")
                continue
            low, high = milliseconds(row["ms"]["p20"]), milliseconds(row["ms"]["p80"])
            ratio = "" if row["ours"] else f"{row['ratio']:.2f}"
            memory = size(row["bytes"]) or "-"
            ms = milliseconds(row["ms"]["median"])
            lines.append(f"  {row['name']:36}{ms:>8}{f'{low}-{high}':>16}{ratio:>13}{memory:>14}")
        lines += sorted({f"  memory: {row['why_no_bytes']}" for row in table["rows"] if row["why_no_bytes"]})
    return "\n".join(lines)


def data_uri(image: Image.Image) -> str:
    """The picture as a PNG inside a data URI."""
    buffer = io.BytesIO()
    image.convert("RGB").quantize(64).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def line_chart(
    title: str, xs: Sequence[float], ys: Sequence[float], unit: str, floor: float | None = None
) -> str:
    """An SVG of one curve, coloured by the page's CSS; ``floor`` draws a dashed line, such as chance."""
    width, height, left, right, top, bottom = 640, 260, 52, 12, 12, 34
    low = min([*ys, 0.0] if floor is None else [*ys, floor, 0.0])
    high = max([*ys] if floor is None else [*ys, floor])
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    span = max(xs[-1] - xs[0], 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - xs[0]) / span * (width - left - right)
        return across, height - bottom - (y - low) / max(high - low, 1e-12) * (height - top - bottom)

    parts = []
    for tick in ticks:
        y = place(xs[0], tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in [tick for tick in nice_ticks(xs[0], xs[-1]) if xs[0] <= tick <= xs[-1]]:
        x = place(tick, low)[0]
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 14}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text class="tick" x="{width - right}" y="{height - 1}" text-anchor="end">step</text>')
    if floor is not None:
        y = place(xs[0], floor)[1]
        parts.append(f'<line class="floor" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(x, y) for x, y in zip(xs, ys, strict=True)))
    parts.append(f'<polyline class="curve" points="{points}"/>')
    label = f"{title}, from {ys[0]:.3g} to {ys[-1]:.3g} {unit}".strip()
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``, about ``count`` of them."""
    raw = max(high - low, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def bars(timings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the template draws: for each size the rows with the width of their bars in per cent of the
    longest."""
    charts = []
    for table in timings:
        longest = max(row["ms"]["median"] for row in table["rows"] if not row["why"])
        most = max((row["bytes"] or 0 for row in table["rows"]), default=0) or 1
        rows = []
        for row in table["rows"]:
            drawn = {
                "name": row["name"],
                "ours": row["ours"],
                "why": row["why"],
                "memory": size(row["bytes"]),
            }
            drawn["why_no_bytes"] = row["why_no_bytes"]
            drawn["memory_width"] = round(100 * (row["bytes"] or 0) / most, 1)
            if not row["why"]:
                drawn["width"] = round(100 * row["ms"]["median"] / longest, 1)
                drawn["ms"] = milliseconds(row["ms"]["median"])
                drawn["spread"] = f"{milliseconds(row['ms']['p20'])} to {milliseconds(row['ms']['p80'])} ms"
                drawn["ratio"] = None if row["ours"] else f"{row['ratio']:.2f}"
            rows.append(drawn)
        charts.append({"n": table["n"], "d": table["d"], "rows": rows})
    return charts


def render(results: dict[str, Any], found: dict[str, Any]) -> str:
    """The page. ``results`` is what results.json holds, ``found`` the pictures and texts of
    ``demo.pictures``."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "png": data_uri}
    curve = results["training"]["curve"]
    steps = [line["step"] for line in curve]
    batch = results["training"]["config"]["batch_size"]
    charts = {
        "loss": line_chart("Training loss", steps, [line["loss"] for line in curve], "", math.log(batch)),
        "recall": line_chart(
            "In-batch R@1", steps, [line["retrieval_at_1"] for line in curve], "", 1 / batch
        ),
    }
    return environment.get_template("demo.html").render(
        results=results,
        found=found,
        charts=charts,
        bars=bars(results["timings"]),
        directions=DIRECTIONS,
        class_texts=CLASS_TEXTS,
        main=next(iter(results["evaluation"].values())),
        main_name=next(iter(results["evaluation"])),
        log=math.log,
    )
