"""`load_pairs`: one name for the sources of image-text pairs and captions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmkernels.data.coco import CocoPictures
from vlmkernels.data.composites import Composites, PictureTransform, load_composites
from vlmkernels.data.csv_pairs import CsvPairs
from vlmkernels.data.emoji import Emoji3, load_emoji3
from vlmkernels.data.lines import CaptionLines
from vlmkernels.data.samples import Transform
from vlmkernels.data.scenes import Scenes, load_scenes
from vlmkernels.data.tar_pairs import TarPairs


def load_pairs(
    spec: str,
    *,
    transform: Transform | PictureTransform | None = None,
    seed: int = 0,
    allow_pipe: bool = False,
    **options: Any,
) -> Emoji3 | Scenes | Composites | CocoPictures | CaptionLines | CsvPairs | TarPairs:
    """Open the data set given by `spec`; its samples are `Sample`s.

    spec: "emoji3" or "emoji3:SPLIT" (`load_emoji3`), "scenes" or "scenes:SPLIT" (`load_scenes`), "composites"
        or "composites:SPLIT" (`load_composites`), a .json file in COCO's format (`CocoPictures`), the path of
        a .csv, .tsv or .txt table (`CsvPairs`), or webdataset tars as a path, brace pattern or URL with
        ".tar" (`TarPairs`); or "lines:FILE", captions without images (`CaptionLines`).
    transform: applied to every RGB image, e.g. `image_transform(224)`. seed: of all random choices.
    allow_pipe: whether a program may be run to read tars, which every URL requires (`TarPairs`); do not take
        it from untrusted input.
    options: further arguments of that class, e.g. caption="label_tags", separator=",", shuffle=1000.

    Raises ValueError for an unknown spec or option (naming the known ones), and the errors of the classes.
    """
    arguments = {"transform": transform, "seed": seed, **options}
    name, _, split = spec.partition(":")
    embedded: dict[str, Callable[..., Any]] = {
        "emoji3": load_emoji3,
        "scenes": load_scenes,
        "composites": load_composites,
    }
    if name in embedded:
        return _open(embedded[name], split or "train", arguments)
    if name == "lines":
        if options:
            raise ValueError(f"options of CaptionLines must be none, got {sorted(options)}")
        return CaptionLines(split)
    if ".tar" in spec:
        return _open(TarPairs, spec, {**arguments, "allow_pipe": allow_pipe})
    if Path(spec).suffix.lower() in (".csv", ".tsv", ".txt"):
        return _open(CsvPairs, spec, arguments)
    if Path(spec).suffix.lower() == ".json":
        return _open(CocoPictures, spec, arguments)
    raise ValueError(
        "spec must be emoji3[:SPLIT], scenes[:SPLIT], composites[:SPLIT], a .csv, .tsv or .txt file, "
        "COCO's .json, .tar shards or lines:FILE, "
        f"got {spec!r}"
    )


def _open(source: Callable[..., Any], first: str, arguments: dict[str, Any]) -> Any:
    known = [p.name for p in inspect.signature(source).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ValueError(f"options of {source.__name__} must be among {known}, got {unknown}")
    return source(first, **arguments)
