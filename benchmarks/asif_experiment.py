"""Does ASIF get better with the number of anchors, on pictures and photographs that it never saw?

    python -m benchmarks.asif_experiment               the first call encodes emoji3's pictures, in minutes
    python -m benchmarks.asif_experiment --photos DIR  a folder with an annotations.json and its photographs

Encoders: EfficientNet-Lite0 and MiniLM of the extra `asif`. Nothing is trained and nothing is chosen: k = 800
and p = 8 are the paper's. Two tasks, for anchors of a growing number of emoji concepts, drawn at random:

    emoji   anchors in two drawing styles; queries are the 370 held-out concepts in the third style, by name
    photos  anchors in all three styles; queries are photographs, and captions that people wrote for them

The result is kept in benchmarks/results/asif/results.json, and the tables and the picture of docs/asif.md are
made of it; with another --results these stay.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import asif_picture, demo, experiment
from benchmarks.asif_tasks import Pairs, tasks
from vlmkernels._files import write_text
from vlmkernels.models import ASIF, AnchorTensors
from vlmkernels.models.asif import K, P
from vlmkernels.use.evaluate import retrieval

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "asif" / "results.json"
PAGE, PICTURE = ROOT / "docs" / "asif.md", ROOT / "docs" / "asif_anchors.svg"
COMMAND = "python -m benchmarks.asif_experiment"
DRAWS = 5
WAYS = ("image_to_text", "text_to_image")
RECALLS = ("R@1", "R@5")
TITLES = {"emoji": "held-out emoji", "photos": "photographs"}


def judge(pairs: Pairs, rows: Tensor) -> dict[str, Any]:
    """Recalls both ways with these anchors, and chance."""
    asif = ASIF(None, None, AnchorTensors(*(side[rows] for side in pairs.anchors)))
    images, texts = asif.encode_images(pairs.queries[0]), asif.encode_texts(pairs.queries[1])
    return retrieval(images.dense(len(rows)), texts.dense(len(rows)), pairs.texts, pairs.keys)


def run_task(pairs: Pairs) -> list[dict[str, Any]]:
    """A row for each number of concepts: recalls of every draw, which all of the concepts need only once."""
    rows = []
    for size in pairs.sizes():
        whole = size == len(pairs.concepts.unique())
        found = [judge(pairs, pairs.chosen(size, draw)) for draw in range(1 if whole else DRAWS)]
        rows.append(
            {
                "concepts": size,
                "anchors": statistics.fmean(len(pairs.chosen(size, draw)) for draw in range(len(found))),
                **{way: {name: [one[way][name] for one in found] for name in RECALLS} for way in WAYS},
                "chance": {way: {name: found[0][way]["chance"][name] for name in RECALLS} for way in WAYS},
                "images": found[0]["images"],
                "texts": found[0]["texts"],
            }
        )
        print(f"  {size} concepts", flush=True)
    return rows


def dense_scores(
    images: Tensor,  # [N, D_x]
    texts: Tensor,  # [C, D_y]
    anchors: Sequence[Tensor],  # [n, D_x], [n, D_y]
) -> Tensor:  # [N, C] float64
    """The definition by matmul, sort, scatter, pow, normalise, matmul."""
    reps = []
    for x, side in zip((images, texts), anchors, strict=True):
        cosines = F.normalize(x.double(), dim=1) @ F.normalize(side.double(), dim=1).T
        order = cosines.sort(dim=1, descending=True, stable=True).indices[:, :K]
        sparse = torch.zeros_like(cosines).scatter(1, order, cosines.gather(1, order))
        reps.append(F.normalize(sparse.clamp_min(0).pow(P), dim=1))
    return reps[0] @ reps[1].T


def edit(pairs: Pairs, queries: int = 10) -> dict[str, float]:
    """Scores of some right pairs without the anchor of the largest share, against the definition."""
    rows = pairs.chosen(max(pairs.sizes()), 0)
    asif = ASIF(None, None, AnchorTensors(*(side[rows] for side in pairs.anchors)))
    changes, errors = [], []
    for at in range(0, len(pairs.texts), max(1, len(pairs.texts) // queries)):
        image, text = (side[at : at + 1] for side in pairs.queries)
        before = asif.explain(image[0], text[0], 1)
        if not before.parts:
            continue
        left = rows[torch.arange(len(rows)) != before.parts[0].index]
        anchors = [side[left] for side in pairs.anchors]
        after = float(ASIF(None, None, AnchorTensors(*anchors)).similarity(image, text))
        changes.append(before.score - after)
        errors.append(abs(after - float(dense_scores(image, text, anchors))))
    return {"pairs": len(changes), "largest change": max(map(abs, changes)), "largest error": max(errors)}


def verdict(results: dict[str, Any]) -> dict[str, bool]:
    """The claims: more anchors find more, at least twice what chance does, and an edit is exact."""
    claims = {}
    for name, rows in results["tasks"].items():
        means = [statistics.fmean(row[way][recall][i] for way in WAYS for recall in RECALLS
                                  for i in range(len(row[way][recall]))) for row in rows]  # fmt: skip
        claims[f"{name}: at least five sizes"] = len(rows) >= 5
        claims[f"{name}: each larger set of at least 50 concepts has the higher mean recall"] = all(
            a < b for a, b, row in zip(means, means[1:], rows, strict=False) if row["concepts"] >= 50
        )
        last = rows[-1]
        for recall in RECALLS:
            claims[f"{name}: {recall} of all anchors is at least twice chance, both ways"] = all(
                statistics.fmean(last[way][recall]) >= 2 * last["chance"][way][recall] for way in WAYS
            )
        exact = results["edits"][name]
        claims[f"{name}: scores after an edit are the definition's, to 1e-5"] = exact["largest error"] < 1e-5
    return claims


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean over the draws and the lowest and highest of them."""
    names = [f"{way.replace('_to_', ' → ')} {recall}" for way in WAYS for recall in RECALLS]
    lines = [f"| concepts | anchors | {' | '.join(names)} |", "|---:|---:|" + "---:|" * len(names)]
    for row in rows:
        cells = []
        for way in WAYS:
            for recall in RECALLS:
                values = [100 * value for value in row[way][recall]]
                spread = f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.1f} %{spread}")
        lines.append(f"| {row['concepts']} | {row['anchors']:.0f} | {' | '.join(cells)} |")
    chance = [f"{100 * rows[-1]['chance'][way][recall]:.2f} %" for way in WAYS for recall in RECALLS]
    return "\n".join([*lines, f"| chance | | {' | '.join(chance)} |"])


def with_tables(page: str, results: dict[str, Any]) -> str:
    """The page with the table of each task between its markers."""
    for name, rows in results["tasks"].items():
        marks = f"<!-- asif: {name} -->", "<!-- /asif -->"
        page = experiment.between(page, marks, table(rows))
    return page


def picture(results: dict[str, Any]) -> str:
    """R@5 from images to texts of both tasks, with chance."""
    curves = []
    for name, rows in results["tasks"].items():
        values = [[100 * value for value in row["image_to_text"]["R@5"]] for row in rows]
        chance = 100 * rows[-1]["chance"]["image_to_text"]["R@5"]
        curves.append(asif_picture.Curve(TITLES[name], [row["anchors"] for row in rows], values, chance))
    return asif_picture.draw("R@5 in per cent, image to text", "anchors", curves)


def main(arguments: Sequence[str] | None = None) -> bool:
    """Runs the experiment; returns whether every claim holds."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    given = os.environ.get("VLMKERNELS_PHOTOS")
    parser.add_argument(
        "--photos", type=Path, default=given and Path(given), help="default: VLMKERNELS_PHOTOS"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of the result")
    args = parser.parse_args(arguments)
    if args.photos is None:
        print("no photographs: set VLMKERNELS_PHOTOS to a folder with images/ and annotations.json")
    found = tasks(args.photos)
    results: dict[str, Any] = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.asif_experiment"]),
        "machine": demo.machine(),
        "tasks": {},
        "edits": {name: edit(pairs) for name, pairs in found.items()},
    }
    for name, pairs in found.items():
        print(TITLES[name], flush=True)
        results["tasks"][name] = run_task(pairs)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.results, json.dumps(results, indent=1) + "\n")
    if args.results == RESULTS:
        write_text(PICTURE, picture(results))
        write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), results))
    claims = verdict(results)
    for claim, holds in claims.items():
        print(f"  {'yes' if holds else 'NO '} {claim}")
    for name, rows in results["tasks"].items():
        print(f"\n{TITLES[name]}: {rows[-1]['images']} images, {rows[-1]['texts']} texts\n\n{table(rows)}")
    print(f"\nResults: {args.results}")
    return all(claims.values())


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
