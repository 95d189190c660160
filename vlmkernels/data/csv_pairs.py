"""Image-text pairs listed in a CSV or TSV file (open_clip's format: columns filepath and title)."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from vlmkernels.data.samples import Epoch, Sample, SkipLog, Transform, apply_transform, sample_rng


class BrokenImageError(ValueError):
    """The image of a sample is missing or cannot be decoded."""


def read_image(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """RGB image of a file or of encoded bytes. BrokenImageError with the reason if that fails."""
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


class CsvPairs(Dataset[Sample]):
    """Map-style data set over the rows of a CSV file with a header.

    path: the file, UTF-8. image_column, text_column: names in its header (open_clip: filepath, title).
    separator: between columns; None is a tab if the header holds one (open_clip's default), else a comma.
    root: folder of relative image paths; None tries the working directory (as open_clip), then the folder of
        the file. transform: applied to the RGB image; see `image_transform`. seed: of random augmentation.

    Rows without a path or a caption are left out when the file is read, images that cannot be decoded when
    they are
    met: a batch of a DataLoader is then shorter, never empty. `skipped` gives all of them with the reason.
    Raises FileNotFoundError for the file, ValueError for a missing column (naming those found) or no usable
    row.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        image_column: str = "filepath",
        text_column: str = "title",
        separator: str | None = None,
        root: str | os.PathLike[str] | None = None,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        self.path, self.root = Path(path), None if root is None else Path(root)
        self.transform, self.seed = transform, seed
        self._epoch, self._skip_log = Epoch(), SkipLog()
        self._rows: list[tuple[str, str]] = []
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist; expected a CSV file")
        csv.field_size_limit(sys.maxsize)
        with self.path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
            header = file.readline()
            if separator is None:
                separator = "\t" if "\t" in header else ","
            columns = next(csv.reader([header], delimiter=separator), [])
            missing = [name for name in (image_column, text_column) if name not in columns]
            if missing:
                raise ValueError(
                    f"{self.path} has no column {' and '.join(map(repr, missing))}; "
                    f"columns found with separator {separator!r}: {columns}. "
                    "Name them with image_column, text_column and separator"
                )
            image_at, text_at = columns.index(image_column), columns.index(text_column)
            for number, row in enumerate(csv.reader(file, delimiter=separator), start=2):
                if not row:
                    continue
                image, text = (row[at].strip() if at < len(row) else "" for at in (image_at, text_at))
                if image and text:
                    self._rows.append((image, text))
                else:
                    reason = "no caption" if image else "no image path"
                    self._skip_log.add(f"row {number}", f"{reason}: {row}")
        if not self._rows:
            raise ValueError(f"{self.path} has no row with an image path and a caption ({self._skip_log})")

    @property
    def skipped(self) -> dict[str, str]:
        """Reason by key (image path, or "row N" of the file) of what was left out so far, of all workers."""
        return self._skip_log.items()

    @property
    def names(self) -> list[str]:
        """The captions, in item order."""
        return [text for _, text in self._rows]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of random augmentation; workers that are already running see it."""
        self._epoch.set(epoch)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Raises BrokenImageError (a ValueError) naming the file if the image cannot be read."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        index %= len(self)
        key, text = self._rows[index]
        try:
            image = read_image(self._locate(key))
        except BrokenImageError as error:
            self._skip_log.add(key, str(error))
            raise BrokenImageError(f"{key} cannot be read, {error}") from error
        rng = sample_rng(self.seed, self._epoch.get(), index)
        image = apply_transform(self.transform, image, rng)
        return Sample(image=image, text=text, key=key, label=-1, concept=-1)

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The readable ones of `indices`; if none is, the next readable sample. Called by DataLoader."""
        samples = [sample for index in indices for sample in self._readable(index)]
        step = 0
        while not samples:
            step += 1
            if step > len(self):
                some = dict(list(self.skipped.items())[:3])
                raise ValueError(f"{self.path}: no image can be read, e.g. {some}")
            samples = self._readable((indices[-1] + step) % len(self))
        return samples

    def _readable(self, index: int) -> list[Sample]:
        try:
            return [self[index]]
        except BrokenImageError:  # recorded in `skipped`
            return []

    def _locate(self, name: str) -> Path:
        path = Path(name)
        if self.root is not None:
            return self.root / path
        return path if path.exists() else self.path.parent / path

    def __repr__(self) -> str:
        return f"CsvPairs({str(self.path)!r}, samples={len(self)}, {self._skip_log})"
