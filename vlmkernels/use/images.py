"""The images for a model: files, folders of them, and the samples of a data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from vlmkernels.data import BrokenImageError, Sample, read_image
from vlmkernels.data.images import transformed
from vlmkernels.data.regions import are_regions, read_regions
from vlmkernels.data.samples import warn_skipped

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def read_files(
    transform: Callable[[Image.Image], Tensor], files: Iterable[Path], skipped: dict[str, str]
) -> Iterator[tuple[Path, Tensor]]:
    """The files with their transformed images; what cannot be read goes to ``skipped`` with the reason."""
    for file in files:
        try:
            image = read_regions(file) if are_regions(file) else transformed(transform, read_image(file))[0]
        except BrokenImageError as error:
            skipped[str(file)] = str(error)
            warn_skipped(str(file), str(error))
        else:
            yield file, image


def find_images(inputs: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files named in ``inputs`` and the images below the folders in it, in a fixed order, each once.

    Below a folder hidden files and folders are skipped; a folder that cannot be listed is returned like an
    image, so that reading it reports the error. FileNotFoundError for a path that does not exist,
    ValueError when there is no image at all.
    """
    found: dict[Path, None] = {}
    names = [Path(name) for name in inputs]
    for path in names:
        if os.path.isdir(path):
            found.update(dict.fromkeys(sorted(_images_below(path))))
        elif os.path.lexists(path):
            found[path] = None
        else:
            raise FileNotFoundError(f"inputs: no file or folder {path}")
    if not found:
        where = ", ".join(str(name) for name in names) or "an empty list"
        raise ValueError(f"inputs: no image ({', '.join(sorted(IMAGE_SUFFIXES))}) in {where}")
    return list(found)


def _images_below(folder: Path) -> list[Path]:
    found: list[Path] = []

    def on_error(error: OSError) -> None:
        found.append(Path(error.filename))

    for parent, folders, files in os.walk(folder, onerror=on_error):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = (name for name in files if not name.startswith("."))
        found += [Path(parent, n) for n in names if os.path.splitext(n)[1].lower() in IMAGE_SUFFIXES]
    return found


def readable(
    dataset: Any, transform: Callable[[Image.Image], Any] | None, skipped: dict[str, str]
) -> Iterator[Sample]:
    """The samples in order, each once, their PIL images transformed unless ``transform`` is None.

    Those that cannot be transformed, or for which a map-style data set raises BrokenImageError, go to
    ``skipped`` with the reason.
    """
    streams = isinstance(dataset, IterableDataset)
    items: Iterable[Any] = dataset if streams else range(len(dataset))
    for item in items:
        try:
            sample = item if streams else dataset[item]
        except BrokenImageError as error:
            if error.key is not None:
                skipped[error.key] = str(error)
            continue
        if transform is not None and isinstance(sample["image"], Image.Image):
            try:
                image, text = transformed(transform, sample["image"], sample["text"])
                sample = Sample(**{**sample, "image": image, "text": text})  # type: ignore[typeddict-item]
            except BrokenImageError as error:
                skipped[sample["key"]] = str(error)
                warn_skipped(sample["key"], str(error))
                continue
        yield sample
