"""Anchors: pairs of an image's and a text's features, in memory or in a folder of memory-mapped shards.

A folder has `anchors.json` and safetensors files. The json names the files that count, so that a change is
one rename: new files are written, then `anchors.json` is replaced, then files that no longer count are
deleted. A process that is killed at any moment leaves the old set or the new one; what else it leaves, the
next change removes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor

from vlmkernels._files import PARTIAL, write_text
from vlmkernels.models.parts.pretrained import config_from_dict, naming, save_tensors
from vlmkernels.models.parts.weight_files import read_json

MANIFEST = "anchors.json"
FORMAT = 1
SHARD_ROWS = 16384  # at most; a change writes the shards that it touches again
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Anchors(Protocol):
    """What ASIF reads. Anchors are numbered from 0 in the order of the blocks."""

    def blocks(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Features of images [n, D_x] and of texts [n, D_y], the rows of both being pairs."""

    def describe(self, index: int) -> tuple[str, str]:
        """Name and caption of an anchor."""


class AnchorTensors:
    """Anchors in memory. Without names these are the numbers; without captions these are empty."""

    def __init__(
        self,
        images: Tensor,  # [n, D_x]
        texts: Tensor,  # [n, D_y]
        names: Sequence[str] | None = None,
        captions: Sequence[str] | None = None,
    ) -> None:
        self.names = list(map(str, range(len(images)))) if names is None else list(names)
        self.captions = [""] * len(images) if captions is None else list(captions)
        if faults := pair_faults(images, texts, self.names, self.captions):
            raise ValueError("anchors: " + "; ".join(faults))
        self.images, self.texts = images, texts

    def __len__(self) -> int:
        return len(self.images)

    def blocks(self) -> Sequence[tuple[Tensor, Tensor]]:
        return [(self.images, self.texts)]

    def describe(self, index: int) -> tuple[str, str]:
        return self.names[index], self.captions[index]


def pair_faults(images: Tensor, texts: Tensor, names: Sequence[str], captions: Sequence[str]) -> list[str]:
    """Errors unless these are features [n, D] of any float dtype and n names and captions."""
    faults = [
        f"{name} must be floating [n, D], got {x.dtype} of shape {tuple(x.shape)}"
        for name, x in (("images", images), ("texts", texts))
        if x.dim() != 2 or not x.is_floating_point()
    ]
    counts = [len(x) for x in (images, texts, names, captions) if not isinstance(x, Tensor) or x.dim()]
    if len(set(counts)) > 1:
        faults.append(f"images, texts, names and captions must be as many, got {counts}")
    if not faults and not all(bool(x.isfinite().all()) for x in (images, texts)):
        faults.append("images and texts must be finite, got features that are not")
    return faults


@dataclasses.dataclass(frozen=True)
class _Shard:
    file: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Manifest:
    """Of a folder: which networks made the features, how wide these are, and the files that count."""

    format: int
    image_encoder: str
    text_encoder: str
    image_width: int
    text_width: int
    dtype: str
    shards: tuple[_Shard, ...]


class AnchorFolder:
    """Anchors in a folder, of which only the parts that are read are in memory.

    `create` makes one, `AnchorFolder(path)` opens one. `add` and `remove` change it on the disk and here; one
    process at a time changes it, and those that read it keep what they opened until `reload`. Names and
    captions are texts of the user, such as the path of an image.

    Raises FileNotFoundError if there is no such folder, ValueError for one that is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.reload()

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        *,
        image_width: int,
        text_width: int,
        image_encoder: str = "",
        text_encoder: str = "",
        dtype: str = "float32",
    ) -> AnchorFolder:
        """A folder without anchors. ValueError if it has anchors already, or for another width or dtype.

        image_width, text_width: of the features. image_encoder, text_encoder: what made them, to be compared
        by those who use them. dtype: float32, bfloat16 or float16, in which features are stored.
        """
        path = Path(folder)
        faults = [
            f"{name} must be at least 1, got {width}"
            for name, width in (("image_width", image_width), ("text_width", text_width))
            if width < 1
        ]
        if dtype not in DTYPES:
            faults.append(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if (path / MANIFEST).exists() and _read(path).shards:
            faults.append(f"folder must have no anchors yet (`add` goes on with it), got {path}")
        if faults:
            raise ValueError("anchors: " + "; ".join(faults))
        path.mkdir(parents=True, exist_ok=True)
        _write(path, _Manifest(FORMAT, image_encoder, text_encoder, image_width, text_width, dtype, ()))
        return cls(path)

    def reload(self) -> None:
        """Read the folder as it is on the disk."""
        while True:
            self._manifest = _read(self.folder)
            try:
                self._shards = [
                    _Rows.open(self.folder, shard, self._manifest) for shard in self._manifest.shards
                ]
            except FileNotFoundError:
                if _read(self.folder) == self._manifest:
                    raise
            else:  # no other process has replaced a file in the meantime
                break
        self._ends = list(itertools.accumulate(shard.count for shard in self._manifest.shards))

    image_encoder = property(lambda self: self._manifest.image_encoder)
    text_encoder = property(lambda self: self._manifest.text_encoder)
    image_width = property(lambda self: self._manifest.image_width)
    text_width = property(lambda self: self._manifest.text_width)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def blocks(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Views of the files: the features of images and of texts of each shard."""
        return [(shard.images, shard.texts) for shard in self._shards]

    def describe(self, index: int) -> tuple[str, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} anchors")
        at = next(i for i, end in enumerate(self._ends) if index < end)
        row = index - (self._ends[at - 1] if at else 0)
        return self._shards[at].describe(row)

    def described(self) -> Iterator[tuple[str, str]]:
        """Name and caption of every anchor."""
        return itertools.chain.from_iterable(shard.described() for shard in self._shards)

    def add(
        self,
        images: Tensor,  # [n, D_x]
        texts: Tensor,  # [n, D_y]
        names: Sequence[str],
        captions: Sequence[str],
    ) -> int:
        """Append pairs, all of them or, if the process is killed, none; the number of them.

        A pair whose name and caption are both there already, or twice among the new ones, is left out.
        ValueError for features of other widths or that are not finite.
        """
        faults = pair_faults(images, texts, names, captions)
        for side, x, width in (("images", images, self.image_width), ("texts", texts, self.text_width)):
            if x.dim() == 2 and x.shape[1] != width:
                faults.append(f"{side} must be [n, {width}], as in {self.folder}, got {list(x.shape)}")
        if faults:
            raise ValueError("anchors: " + "; ".join(faults))
        with self._changing():
            known = set(self.described())
            first = {
                pair: i
                for i, pair in reversed(list(enumerate(zip(names, captions, strict=True))))
                if pair not in known
            }
            if chosen := sorted(first.values()):
                dtype = DTYPES[self._manifest.dtype]
                new = _Rows(
                    images.detach()[chosen].cpu().to(dtype),
                    texts.detach()[chosen].cpu().to(dtype),
                    _Texts.of([names[i] for i in chosen]),
                    _Texts.of([captions[i] for i in chosen]),
                )
                kept = list(self._manifest.shards)
                # A shard that is not larger than what follows it joins it, so that there are few small ones.
                while kept and kept[-1].count < min(SHARD_ROWS, len(new) + 1):
                    new = _Rows.open(self.folder, kept.pop(), self._manifest).joined(new)
                self._commit([*kept, *self._written(new)])
        return len(chosen)

    def remove(self, pairs: Iterable[tuple[str, str]]) -> int:
        """Take out the anchors of these names and captions, all of them or, if the process is killed, none;
        the number of them."""
        gone = set(pairs)
        with self._changing():
            before, kept = len(self), []
            for shard, rows in zip(self._manifest.shards, self._shards, strict=True):
                keep = [i for i, pair in enumerate(rows.described()) if pair not in gone]
                kept += [shard] if len(keep) == shard.count else self._written(rows.taken(keep))
            if tuple(kept) != self._manifest.shards:
                self._commit(kept)
        return before - len(self)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """As the only process that changes the folder, from what it has on the disk."""
        with _locked(self.folder):
            self.reload()
            self._delete_others()
            yield

    def _written(self, rows: _Rows) -> list[_Shard]:
        """New files, which do not count yet. Their names are never used again: one who has read an earlier
        `anchors.json` finds what it names, or nothing."""
        shards = []
        for start in range(0, len(rows), SHARD_ROWS):
            part = rows.taken(range(start, min(start + SHARD_ROWS, len(rows))))
            shards.append(_Shard(f"{uuid.uuid4().hex}.safetensors", len(part)))
            part.save(self.folder / shards[-1].file)
        return shards

    def _commit(self, shards: Sequence[_Shard]) -> None:
        """From here on these files count."""
        _write(self.folder, dataclasses.replace(self._manifest, shards=tuple(shards)))
        self.reload()
        self._delete_others()

    def _delete_others(self) -> None:
        counting = {shard.file for shard in self._manifest.shards}
        for path in [*self.folder.glob(f"{PARTIAL}*"), *self.folder.glob("*.safetensors")]:
            if path.name not in counting:
                path.unlink(missing_ok=True)


class _Texts:
    """Texts as one tensor of bytes, of which only those that are asked for are read."""

    def __init__(
        self,
        content: Tensor,  # [bytes] uint8
        ends: Tensor,  # [n] int64
    ) -> None:
        self.content, self.ends = content, ends

    @classmethod
    def of(cls, texts: Sequence[str]) -> _Texts:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        content = torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8)
        return cls(content, torch.tensor([len(text) for text in encoded]).cumsum(0))

    def __getitem__(self, row: int) -> str:
        start, end = (int(self.ends[row - 1]) if row else 0), int(self.ends[row])
        return self.content[start:end].numpy().tobytes().decode("utf-8", "surrogatepass")

    def every(self) -> list[str]:
        content, ends = self.content.numpy().tobytes(), self.ends.tolist()
        return [
            content[start:end].decode("utf-8", "surrogatepass")
            for start, end in itertools.pairwise([0, *ends])
        ]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What a shard contains."""

    images: Tensor  # [n, D_x]
    texts: Tensor  # [n, D_y]
    names: _Texts
    captions: _Texts

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def open(cls, folder: Path, shard: _Shard, manifest: _Manifest) -> _Rows:
        path = folder / shard.file
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, but {MANIFEST} names it")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for name, width in (("images", manifest.image_width), ("texts", manifest.text_width)):
                found, wanted = (tensors[name].dtype, [*tensors[name].shape]), [shard.count, width]
                if found != (DTYPES[manifest.dtype], wanted):
                    raise ValueError(f"{name} must be {manifest.dtype} {wanted}, got {found[0]} {found[1]}")
            texts = (_Texts(tensors[name], tensors[f"{name}_ends"]) for name in ("names", "captions"))
            return cls(tensors["images"], tensors["texts"], *texts)
        except Exception as error:  # safetensors raises many types for damaged files
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"{path} is not a shard of anchors ({reason}); build the folder again"
            ) from error

    def save(self, path: Path) -> None:
        tensors = {"images": self.images, "texts": self.texts}
        for name, texts in (("names", self.names), ("captions", self.captions)):
            tensors |= {name: texts.content, f"{name}_ends": texts.ends}
        save_tensors({name: x.contiguous() for name, x in tensors.items()}, path, {})

    def describe(self, row: int) -> tuple[str, str]:
        return self.names[row], self.captions[row]

    def described(self) -> Iterator[tuple[str, str]]:
        return zip(self.names.every(), self.captions.every(), strict=True)

    def taken(self, rows: Sequence[int]) -> _Rows:
        chosen = torch.tensor(list(rows), dtype=torch.int64)
        texts = (texts.every() for texts in (self.names, self.captions))
        return _Rows(
            self.images[chosen], self.texts[chosen], *(_Texts.of([t[i] for i in rows]) for t in texts)
        )

    def joined(self, others: _Rows) -> _Rows:
        pairs = ((getattr(self, name), getattr(others, name)) for name in ("names", "captions"))
        return _Rows(
            torch.cat([self.images, others.images]),
            torch.cat([self.texts, others.texts]),
            *(_Texts.of([*a.every(), *b.every()]) for a, b in pairs),
        )


def _read(folder: Path) -> _Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"anchors: {path} does not exist; pass a folder that `vlmkernels asif build` made"
        )
    fields = read_json(path)
    with naming(path):
        if fields.get("format") != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {fields.get('format')!r}")
        shards = fields.get("shards")
        if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
            raise ValueError("shards must be a list of objects")
        fields["shards"] = [config_from_dict(_Shard, shard) for shard in shards]
        manifest = config_from_dict(_Manifest, fields)
        bad = [
            shard.file for shard in manifest.shards if shard.file != Path(shard.file).name or shard.count < 1
        ]
        if bad or manifest.dtype not in DTYPES:
            raise ValueError(f"shards must be files of the folder, dtype one of {', '.join(DTYPES)}")
    return manifest


def _write(folder: Path, manifest: _Manifest) -> None:
    write_text(folder / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def _locked(folder: Path) -> FileLock:
    return FileLock(folder / ".lock")
