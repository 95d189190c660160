"""What ASIF is judged on: emoji that are not among its anchors, and photographs with captions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmkernels.data import load_emoji3
from vlmkernels.use import asif as use

CONCEPTS = (25, 50, 100, 200, 400, 800)  # and all there are


class Pairs:
    """Features of image-text pairs, each of a concept, and what is asked: features of images and texts.

    `keys` and `texts` of the queries tell which belong together, as for `vlmkernels.use.evaluate.retrieval`.
    """

    def __init__(
        self,
        anchors: tuple[Tensor, Tensor],  # [n, D_x], [n, D_y]
        concepts: Sequence[int],
        queries: tuple[Tensor, Tensor],  # [m, D_x], [m, D_y]
        texts: Sequence[str],
        keys: Sequence[str] | None = None,
    ) -> None:
        self.anchors, self.queries = anchors, queries
        self.concepts = torch.tensor(list(concepts))
        self.texts, self.keys = list(texts), keys

    def sizes(self) -> list[int]:
        """Numbers of concepts."""
        every = len(self.concepts.unique())
        return [*(size for size in CONCEPTS if size < every), every]

    def chosen(self, count: int, draw: int) -> Tensor:
        """The anchors [n] of `count` concepts; smaller sets of a draw are in its larger ones."""
        every = self.concepts.unique()
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(draw))
        return torch.isin(self.concepts, every[order[:count]]).nonzero()[:, 0]


def emoji_pairs(styles: Sequence[str], split: str | None) -> Iterator[tuple[str, int]]:
    """Names of anchors and numbers of their concepts: of some styles, of a split of the concepts or all."""
    allowed = None if split is None else set(load_emoji3(split).concept_ids)
    for concept_id, concept in enumerate(load_emoji3().concepts):
        if allowed is None or concept_id in allowed:
            for style in styles:
                yield f"{style}/{concept.hexcode}", concept_id


def tasks(photos: Path | None) -> dict[str, Pairs]:
    """The two tasks, or the first where there are no photographs."""
    asif = use.open_asif()
    images, texts = (torch.cat(side) for side in zip(*asif.anchors.blocks(), strict=True))
    row = {name: i for i, (name, _) in enumerate(asif.anchors.described())}

    def features(named: Sequence[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        rows = [row[name] for name, _ in named]
        return images[rows], texts[rows]

    seen = list(emoji_pairs(("noto", "twemoji"), "concept-train"))
    asked = list(emoji_pairs(("fluent",), "concept-test"))
    labels = [load_emoji3().concepts[concept].label for _, concept in asked]
    found = {"emoji": Pairs(features(seen), [c for _, c in seen], features(asked), labels)}
    if photos is not None:
        every = list(emoji_pairs(("noto", "twemoji", "fluent"), None))
        found["photos"] = photographs(
            photos, asif.image_encoder, asif.text_encoder, features(every), [c for _, c in every]
        )
    return found


def photographs(
    folder: Path,
    image_encoder: Any,
    text_encoder: Any,
    anchors: tuple[Tensor, Tensor],
    concepts: Sequence[int],
) -> Pairs:
    """All photographs that annotations.json lists, each with all of its captions."""
    place = min(folder.rglob("annotations.json"))
    listed = json.loads(place.read_text(encoding="utf-8"))["images"]
    files = [next(place.parent.rglob(entry["file_name"])) for entry in listed]
    shown, kept, skipped = use.encode_files(image_encoder, files)
    if len(kept) != len(files):
        raise ValueError(f"photographs must be readable, got {skipped}")
    captions = [(at, text) for at, entry in enumerate(listed) for text in entry["captions"]]
    texts = [text for _, text in captions]
    queries = shown[[at for at, _ in captions]], text_encoder(texts)
    return Pairs(anchors, concepts, queries, texts, [files[at].name for at, _ in captions])
