"""Image-text pairs listed in a CSV or TSV file (open_clip's format: columns filepath and title)."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from vlmkernels.data._text import is_unicode
from vlmkernels.data.images import BrokenImageError, read_image, transformed
from vlmkernels.data.regions import are_regions, read_regions
from vlmkernels.data.samples import Epoch, Sample, SkipLog, Transform, sample_rng

if TYPE_CHECKING:
    from typing_extensions import Self


class _Lines:
    """Numbered lines after a header, which is line 1; lines that were read too early can be put back."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines, self._returned, self.number = iter(lines), list[str](), 1

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self._returned.pop() if self._returned else next(self._lines)
        self.number += 1
        return line

    def put_back(self, lines: list[str]) -> None:
        self._returned += reversed(lines)
        self.number -= len(lines)


class _Table:
    """The rows of a table, each with its first line and whether its quotes close.

    A quoted field may span several lines, until one of them is a row itself: it has the same number of fields
    as the header, and its image has the extension of this row's or the previous row's. A row with an unclosed
    quote is parsed with its quotes as ordinary characters, so that it does not swallow the next rows.
    """

    def __init__(self, lines: Iterable[str], separator: str, columns: int, image_at: int) -> None:
        self._lines, self._separator, self._columns = _Lines(lines), separator, columns
        self._image_at = image_at

    def __iter__(self) -> Iterator[tuple[int, list[str], bool]]:
        before: list[str] = []
        for line in self._lines:
            number, fields, closed = self._lines.number, self._split(line), True
            if '"' in line:
                taken: list[str] = []
                record = self._record(line, taken, self._extension(before) | self._extension(fields))
                try:
                    quoted = next(csv.reader(record, delimiter=self._separator, strict=True))
                    closed = not taken or len(quoted) == self._columns
                except csv.Error:
                    closed = False
                if closed:
                    fields = quoted
                else:
                    self._lines.put_back(taken)
            before = fields
            yield number, fields, closed

    def _record(self, line: str, taken: list[str], extensions: set[str]) -> Iterator[str]:
        """A line and the following ones that csv reads, which are recorded in `taken`."""
        yield line
        for line in self._lines:
            taken.append(line)
            fields = self._split(line)
            # An image after a quote may be that of this row, whose caption the quote closes.
            before_quotes = '"' not in "".join(fields[: self._image_at + 1])
            if before_quotes and len(fields) == self._columns and self._extension(fields) <= extensions:
                return
            yield line

    def _split(self, line: str) -> list[str]:
        return line.rstrip("\r\n").split(self._separator)

    def _extension(self, fields: list[str]) -> set[str]:
        """That of the image's name, if the row is long enough to have one."""
        return {os.path.splitext(name.strip(' "'))[1].lower() for name in fields[self._image_at :][:1]}


class CsvPairs(Dataset[Sample]):
    """Map-style data set over the rows of a CSV file with a header.

    path: the file, UTF-8. image_column, text_column: names in its header (open_clip: filepath, title).
    separator: between columns; None is a tab if the header has one (open_clip's default), else a comma.
    root: folder of relative image paths; None tries the working directory (as open_clip), then the folder of
        the file. transform: applied to the RGB image; see `image_transform`. seed: of random augmentation.

    A path of features, FILE.npy or FILE.h5#NAME, gives the regions of an image, a tensor [N, F], which is not
    transformed; see `read_regions`.

    Rows without a path or a caption, with more columns than the header, with unclosed quotes or invalid
    UTF-8 are skipped when the file is read, images that cannot be read or transformed when they are loaded:
    a batch of a DataLoader is then shorter, and may be empty. `skipped` lists all of them with the reason,
    rows by their line.

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
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"path must be a CSV file, got {self.path}")
        with self.path.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
            header = file.readline()
            if separator is None:
                separator = "\t" if "\t" in header else ","
            try:
                columns = next(csv.reader([header], delimiter=separator), [])
            except csv.Error as error:
                raise ValueError(f"{self.path} has no header: {error}") from None
            missing = [name for name in (image_column, text_column) if name not in columns]
            if missing:
                raise ValueError(
                    f"{self.path} has no column {' and '.join(map(repr, missing))}; "
                    f"columns found with separator {separator!r}: {columns}. "
                    "Name them with image_column, text_column and separator; the file must be UTF-8"
                )
            image_at, text_at = columns.index(image_column), columns.index(text_column)
            for line, fields, closed in _Table(file, separator, len(columns), image_at):
                if fields == [""]:
                    continue
                image = fields[image_at].strip() if image_at < len(fields) else ""
                text = fields[text_at].strip() if text_at < len(fields) else ""
                if not closed and len(fields) != len(columns):
                    reason = "a quote is not closed"
                elif len(fields) > len(columns) and any(fields[len(columns) :]):
                    reason = f"{len(fields)} columns, the header has {len(columns)}"
                elif not image or not text:
                    reason = "no caption" if image else "no image path"
                elif not ((image + text).isascii() or is_unicode(image + text)):
                    reason = "not UTF-8"
                else:
                    self._rows.append((image, text))
                    continue
                self._skip_log.add(f"line {line}", f"{reason}: {fields}")
        if not self._rows:
            raise ValueError(f"{self.path} has no row with an image path and a caption ({self._skip_log})")

    @property
    def skipped(self) -> dict[str, str]:
        """Reason by key (image path, or "line N") of the samples skipped so far, in all workers."""
        return self._skip_log.items()

    @property
    def names(self) -> list[str]:
        """The captions, in item order."""
        return [text for _, text in self._rows]

    @property
    def keys(self) -> list[str]:
        """The keys of the samples, in item order: the images as the table names them."""
        return [image for image, _ in self._rows]

    def image_files(self) -> list[Path]:
        """The paths of the images, in item order."""
        return [self._locate(image) for image, _ in self._rows]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of random augmentation, also in workers that are already running."""
        self._epoch.set(epoch)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Raises BrokenImageError (a ValueError) naming the file if the image cannot be read."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        index %= len(self)
        key, text = self._rows[index]
        rng = sample_rng(self.seed, self._epoch.get(), index)
        try:
            if are_regions(key):
                image = read_regions(self._locate(key))
            else:
                image, text = transformed(self.transform, read_image(self._locate(key)), text, rng)
        except BrokenImageError as error:
            self._skip_log.add(key, str(error))
            raise BrokenImageError(f"{key} cannot be read, {error}", key) from error
        return Sample(image=image, text=text, key=key, label=-1, concept=-1)

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The readable ones of `indices`. Called by DataLoader, also through Subset."""
        samples = []
        for index in indices:
            with contextlib.suppress(BrokenImageError):  # recorded in `skipped`
                samples.append(self[index])
        return samples

    def _locate(self, name: str) -> Path:
        path = Path(name)
        if self.root is not None:
            return self.root / path
        return path if os.path.exists(path) else self.path.parent / path

    def __repr__(self) -> str:
        return f"CsvPairs({str(self.path)!r}, samples={len(self)}, {self._skip_log})"
