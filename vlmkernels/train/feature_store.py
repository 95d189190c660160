"""Features of images and texts by name, in a file that is whole, of the right origin, or made again."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b, sha256
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor

from vlmkernels._files import PARTIAL
from vlmkernels.models.parts.pretrained import save_tensors

log = logging.getLogger("vlmkernels.train")
FORMAT = 1
ID_BYTES = 16


class Table:
    """A feature for each name; of the names a digest is kept."""

    def __init__(
        self,
        ids: Tensor,  # [N, ID_BYTES] uint8
        features: Tensor,  # [N, E]
    ) -> None:
        self.ids, self.features = ids, features
        self._rows = {name.tobytes(): row for row, name in enumerate(ids.numpy())}

    @classmethod
    def of(cls, features: Mapping[str, Tensor]) -> Table:
        ids = b"".join(map(_id, features))
        return cls(
            torch.frombuffer(bytearray(ids), dtype=torch.uint8).view(-1, ID_BYTES),
            torch.stack(list(features.values())),
        )

    def find(self, names: Sequence[str]) -> tuple[Tensor, list[int]]:
        """A new [len(names), E], and the positions of the names that are not here."""
        rows = [self._rows.get(_id(name)) for name in names]
        found = self.features[torch.tensor([row or 0 for row in rows], dtype=torch.int64)]
        return found, [i for i, row in enumerate(rows) if row is None]


def _id(name: str) -> bytes:
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=ID_BYTES).digest()


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """The features of a data set by one model."""

    images: Table
    texts: Table
    scale: Tensor  # [], of the similarities

    def tensors(self) -> dict[str, Tensor]:
        return {
            "image_ids": self.images.ids,
            "images": self.images.features,
            "text_ids": self.texts.ids,
            "texts": self.texts.features,
            "scale": self.scale,
        }


def find_or_make(path: Path, identity: str, make: Callable[[], FeatureStore]) -> FeatureStore:
    """What ``path`` has of this identity; made and written if it is absent, damaged or of another one.

    One process does so while the others wait. A place where nothing can be locked or written costs time only.
    """
    with _locked(path):
        store = read(path, identity)
        if store is None:
            store = make()
            try:
                write(path, identity, store)
            except OSError as error:
                log.warning("the teacher's features are not kept: %s", error)
    return store


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock beside ``path`` that ends with its process; what an interrupted write left is removed."""
    held = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
        for leftover in path.parent.glob(f"{PARTIAL}{path.name}.*"):
            leftover.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be locked: %s", path, error)
    try:
        yield
    finally:
        held.release()


def write(path: Path, identity: str, store: FeatureStore) -> None:
    """Atomically, with a checksum."""
    tensors = store.tensors()
    save_tensors(tensors, path, {"identity": identity, "sha256": _checksum(tensors)})


def read(path: Path, identity: str) -> FeatureStore | None:
    """None if there is no such file; a warning says what is wrong with one that cannot be used."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copies, as a tensor of safetensors is a view of the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if metadata["identity"] != identity:
            raise ValueError("they are of another teacher, data or transform")
        if metadata["sha256"] != _checksum(tensors):
            raise ValueError("they do not match their checksum")
    except Exception as error:  # safetensors raises many types for damaged files
        log.warning("the features in %s are computed again: %s", path, error)
        return None
    images = Table(tensors["image_ids"], tensors["images"])
    return FeatureStore(images, Table(tensors["text_ids"], tensors["texts"]), tensors["scale"])


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    total = sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()
