"""What a data set yields (`Sample`), how samples become a batch (`Collate`), what is left out (`SkipLog`)."""

from __future__ import annotations

import logging
import os
import random
import tempfile
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from PIL import Image
from torch import Tensor

from vlmkernels.data.transforms import ImageTransform

logger = logging.getLogger(__name__)

Transform = Callable[[Image.Image], Any]


class Sample(TypedDict):
    """One image with its text. `label` and `concept` are -1 where the data set has none.

    image: RGB `PIL.Image`, or what the transform of the data set made of it (a float tensor [3, H, W]).
    text: the caption. key: names the sample in messages and result lists. label: class index (emoji3: group
    0-8).
    concept: samples with an equal concept show the same thing (emoji3: index 0-1851), hence are mutual
    positives.
    """

    image: Any
    text: str
    key: str
    label: int
    concept: int


def sample_rng(*parts: object) -> random.Random:
    """A generator that depends only on `parts`: the same in every process, worker and run."""
    return random.Random("/".join(str(part) for part in parts))


def apply_transform(transform: Transform | None, image: Image.Image, rng: random.Random) -> Any:
    """`transform(image)`; an `ImageTransform` takes its random numbers from `rng`."""
    if transform is None:
        return image
    return transform(image, rng) if isinstance(transform, ImageTransform) else transform(image)


class Epoch:
    """An epoch number in shared memory: `set` in the main process is seen by running DataLoader workers."""

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.int64).share_memory_()

    def set(self, epoch: int) -> None:
        self._value.fill_(epoch)

    def get(self) -> int:
        return int(self._value)


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner and os.path.exists(path):
        os.unlink(path)


class SkipLog:
    """Keys of skipped samples with the reason, shared by all DataLoader workers of a process.

    Kept in a temporary file to which workers append whole lines; removed with the object that created it.
    Each key is logged once per worker as a warning.
    """

    def __init__(self) -> None:
        descriptor, self._path = tempfile.mkstemp(prefix="vlmkernels-skipped-")
        os.close(descriptor)
        self._known: set[str] = set()
        weakref.finalize(self, _remove, self._path, os.getpid())

    def add(self, key: str, reason: str) -> None:
        """Record a key; a key that was recorded before by this worker is not recorded again."""
        if key in self._known:
            return
        self._known.add(key)
        logger.warning("skipped %s: %s", key, reason)
        fields = (" ".join(text.split())[:1000] for text in (key, reason))
        with open(self._path, "a", encoding="utf-8") as file:
            file.write("\t".join(fields) + "\n")

    def items(self) -> dict[str, str]:
        """Reason by key, of all workers."""
        if not os.path.exists(self._path):  # a copy that outlived its original
            return {}
        with open(self._path, encoding="utf-8") as file:
            rows = (line.rstrip("\n").partition("\t") for line in file)
            return {key: reason for key, _, reason in rows}

    def __len__(self) -> int:
        return len(self.items())

    def __repr__(self) -> str:
        items = self.items()
        return f"{len(items)} skipped" + (f": {', '.join(list(items)[:10])}" if items else "")


class Collate:
    """Samples to a batch, for `DataLoader(collate_fn=Collate(tokenizer))`.

    The batch is a dict: images (float [B, 3, H, W] if the data set has a tensor transform, else a list),
    texts and keys (lists of str), labels [B] and concepts [B] (int64), and tokens [B, L] (int64) if a
    tokenizer is given.
    """

    def __init__(self, tokenizer: Callable[[list[str]], Tensor] | None = None) -> None:
        self.tokenizer = tokenizer

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Raises ValueError for an empty sequence."""
        if not samples:
            raise ValueError("samples is empty; a batch needs at least one sample")
        images: Any = [sample["image"] for sample in samples]
        if all(isinstance(image, Tensor) for image in images):
            images = torch.stack(images)
        batch: dict[str, Any] = {
            "images": images,
            "texts": [sample["text"] for sample in samples],
            "keys": [sample["key"] for sample in samples],
            "labels": torch.tensor([sample["label"] for sample in samples], dtype=torch.int64),
            "concepts": torch.tensor([sample["concept"] for sample in samples], dtype=torch.int64),
        }
        if self.tokenizer is not None:
            batch["tokens"] = self.tokenizer(batch["texts"])
        return batch
