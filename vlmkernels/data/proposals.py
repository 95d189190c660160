"""Proposals of images with the embeddings of their crops, computed once: one safetensors file.

Tensors `boxes` [N, 4] and `embeddings` [N, D] of all images, one after the other, and `starts` [I + 1]; the
keys of the images and the teacher's name are in the metadata.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmkernels._files import write_atomic

VERSION = "1"


class Proposals(Mapping[str, tuple[Tensor, Tensor]]):
    """The boxes [P, 4] and embeddings [P, D] of an image by its key, read from the file when asked for.

    `teacher` is the name of whose embeddings they are, `width` is D. FileNotFoundError; ValueError for a file
    of another kind or a damaged one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"proposals: {self.path}: no such file")
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                starts = file.get_tensor("starts").tolist()
            keys = json.loads(metadata["keys"])
            self.teacher = metadata["teacher"]
            boxes, embeddings = found["boxes"], found["embeddings"]
            whole = starts == sorted(starts) and starts[:1] == [0] and starts[-1] == boxes[0]
            if not whole or len(keys) != len(starts) - 1 or boxes[1:] != [4] or boxes[0] != embeddings[0]:
                raise ValueError("its parts do not fit each other")
        except (SafetensorError, KeyError, ValueError, IndexError, TypeError) as error:
            raise ValueError(f"proposals: {self.path} is not a file of proposals ({error})") from error
        self.width: int = embeddings[1]
        self._rows = dict(zip(keys, itertools.pairwise(starts), strict=True))

    def __getitem__(self, key: str) -> tuple[Tensor, Tensor]:
        first, last = self._rows[key]
        with safe_open(self.path, "pt") as file:
            boxes, embeddings = (file.get_slice(name)[first:last] for name in ("boxes", "embeddings"))
        return boxes, embeddings.float()

    def __iter__(self):
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def write_proposals(
    path: str | os.PathLike[str],
    images: Mapping[str, tuple[Tensor, Tensor]],
    *,
    teacher: str,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes the boxes [P, 4] and embeddings [P, D] of images by their keys; P may differ, D may not.

    Embeddings are stored as `dtype`. ValueError without images or for other shapes.
    """
    if not images:
        raise ValueError("proposals: images must be one or more, got none")
    width = next(iter(images.values()))[1].shape[-1]
    for key, (boxes, embeddings) in images.items():
        if boxes.shape[1:] != (4,) or embeddings.shape != (len(boxes), width):
            got = f"{list(boxes.shape)} and {list(embeddings.shape)}"
            raise ValueError(
                f"proposals: {key} must have boxes [P, 4] and embeddings [P, {width}], got {got}"
            )
    counts = torch.tensor([0, *(len(boxes) for boxes, _ in images.values())])
    tensors = {
        "boxes": torch.cat([boxes.float().cpu() for boxes, _ in images.values()]),
        "embeddings": torch.cat([embeddings.to("cpu", dtype) for _, embeddings in images.values()]),
        "starts": counts.cumsum(0),
    }
    metadata = {"format": "pt", "version": VERSION, "teacher": teacher, "keys": json.dumps(list(images))}
    write_atomic(Path(path), lambda partial: save_file(tensors, partial, metadata))
