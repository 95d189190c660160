"""Samples of a data set (`Sample`), batches of them (`Collate`), and skipped samples (`SkipLog`)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import tempfile
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmkernels.data._text import printable
from vlmkernels.data.transforms import ImageTransform, ImageViews, _pair

logger = logging.getLogger(__name__)

Transform = Callable[[Image.Image], Any]


class Sample(TypedDict):
    """One image with its text. `label` and `concept` are -1 if the data set has none.

    image: RGB `PIL.Image`, or the result of the data set's transform (a float tensor [3, H, W]); None if the
    data set has no images.
    text: the caption. key: identifies the sample in messages and results. label: class index (emoji3: group
    0-8).
    concept: samples with an equal concept show the same object (emoji3: index 0-1851) and are mutual
    positives.
    """

    image: Any
    text: str
    key: str
    label: int
    concept: int


def sample_rng(*parts: object) -> random.Random:
    """A generator that depends only on `parts`: the same in every process, worker and run."""
    return random.Random("/".join(str(part) for part in parts).encode("utf-8", "surrogatepass"))


def apply_transform(
    transform: Transform | None, image: Image.Image, text: str, rng: random.Random | None
) -> tuple[Any, str]:
    """`transform(image)` and the caption of its result.

    An `ImageTransform` or `ImageViews` takes its random numbers from `rng` and may change the caption.
    """
    if transform is None:
        return image, text
    if isinstance(transform, (ImageTransform, ImageViews)):
        return transform.pair(image, text, rng)
    return transform(image), text


class Epoch:
    """An epoch number in shared memory, so that `set` in the main process reaches running workers."""

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.int64).share_memory_()

    def set(self, epoch: int) -> None:
        self._value.fill_(epoch)

    def get(self) -> int:
        return int(self._value)


def warn_skipped(key: str, reason: str) -> None:
    """Log the warning about a skipped sample."""
    logger.warning("skipped %s: %s", printable(key), printable(reason))


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner and os.path.exists(path):
        os.unlink(path)


class SkipLog:
    """Keys of skipped samples with the reason, shared by all DataLoader workers of a process.

    Stored in a temporary file to which workers append whole lines; removed with the object that created it.
    A key is logged as a warning when it is first recorded, once for all workers and epochs.
    """

    def __init__(self) -> None:
        descriptor, self._path = tempfile.mkstemp(prefix="vlmkernels-skipped-")
        os.close(descriptor)
        self._known: dict[str, str] = {}
        self._read = 0  # bytes of the file that are in _known
        weakref.finalize(self, _remove, self._path, os.getpid())

    def add(self, key: str, reason: str) -> None:
        """Record a key; one that is already recorded keeps its reason."""
        if self.reason(key) is not None:
            return
        reason = " ".join(reason.split())[:1000]
        self._known[key] = reason
        warn_skipped(key, reason)
        # If the disk is full, record and warning are limited to this worker.
        with contextlib.suppress(OSError), open(self._path, "ab", buffering=0) as file:
            file.write(json.dumps([key, reason]).encode() + b"\n")

    def reason(self, key: str) -> str | None:
        """Why a key was skipped, None if it was not."""
        if key not in self._known:
            self._refresh()
        return self._known.get(key)

    def items(self) -> dict[str, str]:
        """Reason by key, from all workers."""
        self._refresh()
        return dict(self._known)

    def _refresh(self) -> None:
        """Read what other workers recorded; a copy of the log may outlive the file."""
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):  # another worker is about to complete it
                    break
                self._read += len(line)
                with contextlib.suppress(ValueError):  # cut off by a full disk
                    self._known.setdefault(*json.loads(line))

    def __len__(self) -> int:
        return len(self.items())

    def __repr__(self) -> str:
        items = self.items()
        return f"{len(items)} skipped" + (f": {', '.join(map(printable, list(items)[:10]))}" if items else "")


class Collate:
    """Collates samples into a batch, for `DataLoader(collate_fn=Collate(tokenizer))`.

    The batch is a dict: images (float [B, 3, H, W] if the data set has a tensor transform, else a list),
    texts and keys (lists of str), labels [B] and concepts [B] (int64), and tokens [B, L] (int64) if a
    tokenizer is given. A batch without any readable sample has B = 0; its images are [0, 3, H, W] with
    `image_size`, an int or (H, W), otherwise an empty list.
    """

    def __init__(
        self,
        tokenizer: Callable[[list[str]], Tensor] | None = None,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        self.tokenizer, self.image_size = tokenizer, image_size

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "images": stack_images(samples, self.image_size),
            "texts": [sample["text"] for sample in samples],
            "keys": [sample["key"] for sample in samples],
            "labels": torch.tensor([sample["label"] for sample in samples], dtype=torch.int64),
            "concepts": torch.tensor([sample["concept"] for sample in samples], dtype=torch.int64),
        }
        if self.tokenizer is not None:
            batch["tokens"] = self.tokenizer(batch["texts"])
        return batch


def stack_images(samples: Sequence[Sample], image_size: int | tuple[int, int] | None) -> Any:
    """float [B, 3, H, W] for tensors, [B, N, F] padded with 0 for regions, else the list.

    Without samples [0, 3, H, W] if the size is given.
    """
    images = [sample["image"] for sample in samples]
    if not images and image_size is not None:
        return torch.zeros(0, 3, *_pair(image_size))
    return stacked(images) if images and all(isinstance(image, Tensor) for image in images) else images


def stacked(images: Sequence[Tensor]) -> Tensor:
    """Images [B, 3, H, W], or regions [B, N, F], N of the sample with the most, the others padded with 0."""
    if images[0].dim() == 2:
        most = max(len(each) for each in images)
        images = [F.pad(each, (0, 0, 0, most - len(each))) for each in images]
    return torch.stack(list(images))
