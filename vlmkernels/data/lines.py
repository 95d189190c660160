"""Captions without images, one a line of a text file: what language models learn from."""

from __future__ import annotations

import os
from pathlib import Path

from torch.utils.data import Dataset

from vlmkernels.data._text import is_unicode
from vlmkernels.data.samples import Sample, SkipLog


class CaptionLines(Dataset[Sample]):
    """Map-style data set over the lines of a UTF-8 text file; the `image` of its samples is None.

    path: the file. Empty lines are left out, lines that are not UTF-8 are skipped and listed in `skipped`.
    `has_images` is False: only kinds that see no images can be trained on it.

    Raises FileNotFoundError for the file, ValueError if it has no usable line.
    """

    has_images = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._skip_log = Path(path), SkipLog()
        self._lines: list[tuple[int, str]] = []
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"path must be a text file, got {self.path}")
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                text = line.strip()
                if not is_unicode(text):
                    self._skip_log.add(f"line {number}", f"not UTF-8: {text}")
                elif text:
                    self._lines.append((number, text))
        if not self._lines:
            raise ValueError(f"{self.path} has no line with a caption ({self._skip_log})")

    @property
    def skipped(self) -> dict[str, str]:
        """Reason by key ("line N") of the skipped lines."""
        return self._skip_log.items()

    @property
    def names(self) -> list[str]:
        """The captions, in item order."""
        return [text for _, text in self._lines]

    def set_epoch(self, epoch: int) -> None:
        """Nothing is drawn at random."""

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        number, text = self._lines[index]
        return Sample(image=None, text=text, key=f"line {number}", label=-1, concept=-1)

    def __repr__(self) -> str:
        return f"CaptionLines({str(self.path)!r}, samples={len(self)}, {self._skip_log})"
