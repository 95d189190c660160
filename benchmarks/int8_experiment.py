"""Do int8 keys find the same ten as their float32 originals, on features of trained encoders?

    python -m benchmarks.int8_experiment   the first call encodes emoji3's pictures, in minutes

Encoders: MiniLM and EfficientNet-Lite0 of the extra `asif`, cosines of their features. Nothing is trained and
nothing is chosen: the scale of a key is its largest absolute value over 127, as in docs/topk_similarity.md.

    names     the 1,852 names of emoji3, searched by the search tags of each
    pictures  its 3,704 Noto and Twemoji pictures, searched by the 1,852 Fluent ones

The result is kept in benchmarks/results/int8/results.json, and the table of docs/topk_similarity.md is made
of it; with another --results the page stays.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vlmkernels
from benchmarks import experiment
from benchmarks.asif_tasks import emoji_pairs
from vlmkernels._files import write_text
from vlmkernels.data import load_emoji3
from vlmkernels.use import asif as use

NAME, COUNT = "int8", 10
RESULTS = experiment.results_folder(NAME) / "results.json"
PAGE = experiment.ROOT / "docs" / "topk_similarity.md"
MARKS = "<!-- int8 -->", "<!-- /int8 -->"
SETS = {"names": "names by their tags, MiniLM", "pictures": "pictures by another style, EfficientNet-Lite0"}
WAYS = {"int8": "int8 keys", "rescored": "rescored"}


def quantized(key: Tensor) -> tuple[Tensor, Tensor]:  # [M, D] -> [M, D] int8, [M]
    """The keys rounded to int8, each with its own scale."""
    scale = key.abs().amax(1).clamp_min(torch.finfo(key.dtype).tiny) / 127
    return (key / scale[:, None]).round().to(torch.int8), scale


def agreement(query: Tensor, key: Tensor, count: int = COUNT) -> dict[str, Any]:  # [Q, D], [M, D]
    """Of the best `count` by the full keys: how many queries have all of them by int8 keys, and how many of
    them are found on average; so for int8 keys alone and rescored by the full ones."""
    small, scale = quantized(key)
    _, exact = vlmkernels.topk_similarity(query, key, count)
    ways = {"int8": None, "rescored": key}
    result: dict[str, Any] = {"queries": len(query), "keys": len(key), "width": key.shape[1], "k": count}
    for way, full in ways.items():
        _, indices = vlmkernels.topk_similarity(query, small, count, key_scale=scale, rescore=full)
        shared = (indices[:, :, None] == exact[:, None]).sum((1, 2))  # [Q]
        result[way] = {
            "same set": (shared == exact.shape[1]).float().mean().item(),
            "same first": (indices[:, 0] == exact[:, 0]).float().mean().item(),
            "overlap": shared.float().mean().item() / exact.shape[1],
        }
    return result


def features() -> dict[str, tuple[Tensor, Tensor]]:
    """Queries and keys of each set, of length 1. ModuleNotFoundError without the packages of the encoders."""
    asif = use.open_asif()
    images, texts = (torch.cat(side) for side in zip(*asif.anchors.blocks(), strict=True))
    row = {name: i for i, (name, _) in enumerate(asif.anchors.described())}

    def rows(*styles: str) -> list[int]:
        return [row[name] for name, _ in emoji_pairs(styles, None)]

    tags = [", ".join(concept.tags) for concept in load_emoji3().concepts]
    sets = {
        "names": (asif.text_encoder(tags), texts[rows("fluent")]),
        "pictures": (images[rows("fluent")], images[rows("noto", "twemoji")]),
    }
    return {name: (F.normalize(query), F.normalize(key)) for name, (query, key) in sets.items()}


def table(sets: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each set and way."""
    lines = [
        "| set | queries, keys, width | search | same ten | same first | of the ten found |",
        "|---|---|---|---:|---:|---:|",
    ]
    for name, found in sets.items():
        size = f"{found['queries']:,}, {found['keys']:,}, {found['width']:,}"
        for way, label in WAYS.items():
            cells = " | ".join(
                f"{100 * found[way][of]:.2f} %" for of in ("same set", "same first", "overlap")
            )
            lines.append(f"| {SETS[name]} | {size} | {label} | {cells} |")
    return "\n".join(lines)


def with_table(page: str, text: str) -> str:
    """The page with the table between its markers."""
    return experiment.between(page, MARKS, text)


def main(arguments: Sequence[str] | None = None) -> bool:
    """Runs the experiment; returns whether rescored int8 keys gave every query the ten of the full keys."""
    parser = argparse.ArgumentParser(prog=experiment.command_of(NAME), description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of the result")
    args = parser.parse_args(arguments)
    sets = {name: agreement(*sides) for name, sides in features().items()}
    claims = {
        f"{name}: rescored int8 keys give every query the ten of float32": found["rescored"]["same set"] == 1
        for name, found in sets.items()
    }
    origin = experiment.origin(NAME, arguments)
    experiment.write_result(args.results, {**origin, "sets": sets, "verdict": claims})
    if args.results == RESULTS:
        write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8"), table(sets)))
    print(table(sets))
    held = experiment.show(claims)
    print(f"Result: {args.results}")
    return held


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
