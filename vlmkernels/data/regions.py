"""Features or boxes of the regions of images, from .npy files or one HDF5 file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy
import torch
from torch import Tensor

SUFFIXES = (".h5", ".hdf5")


class RegionFiles:
    """The regions of each image of a data set, by the sample's key.

    path: a folder with a file KEY.npy for each image, or an .h5 or .hdf5 file with a data set KEY, or a group
        KEY with a data set named `name`. Where nothing is called KEY, KEY without its extension is tried
        ("cat.npy" for "cat.jpg"). Each is [V, E]: V regions, as many as the image has, of E numbers.
    name: of the data set in a group.

    HDF5 files need the package h5py. Attribute `width`: E, the same for all images. Raises FileNotFoundError
    without such a path, ValueError for one without an array [V, E].
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str = "features") -> None:
        self.path, self.name = Path(path), name
        self._file: Any = None
        self._opened_by: int | None = None  # an open HDF5 file must not be shared with a forked worker
        if not self.path.exists():
            raise FileNotFoundError(f"regions: {self.path} does not exist")
        if not self.path.is_dir() and self.path.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"regions must be a folder of .npy files or an .h5 or .hdf5 file, got {self.path}"
            )
        first = next(iter(self.names()), None)
        if first is None:
            raise ValueError(
                f"regions: {self.path} has no {'.npy file' if self.path.is_dir() else 'data set'}"
            )
        self.width = self._array(first).shape[1]

    def names(self) -> Iterable[str]:
        """What the arrays are called, in a fixed order."""
        if self.path.is_dir():
            files = sorted(self.path.rglob("*.npy"))
            return (file.relative_to(self.path).with_suffix("").as_posix() for file in files)
        found: list[str] = []
        inner = f"/{self.name}"

        def visit(name: str, item: Any) -> None:
            if hasattr(item, "shape"):
                found.append(name.removesuffix(inner))

        self._open().visititems(visit)
        return sorted(found)

    def files(self) -> list[Path]:
        """The files that are read."""
        return sorted(self.path.rglob("*.npy")) if self.path.is_dir() else [self.path]

    def __call__(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Regions float32 [B, V, E] of the images, padded with zeros, and where they are valid, bool [B, V].

        ValueError naming a key without regions or with an array of another form.
        """
        arrays = [self._array(key) for key in keys]
        most = max((len(array) for array in arrays), default=0)
        regions, mask = (
            torch.zeros(len(keys), most, self.width),
            torch.zeros(len(keys), most, dtype=torch.bool),
        )
        for i, (key, array) in enumerate(zip(keys, arrays, strict=True)):
            if array.shape[1] != self.width:
                raise ValueError(
                    f"regions: {key} must be [V, {self.width}] like others, got {list(array.shape)}"
                )
            regions[i, : len(array)] = torch.from_numpy(array)
            mask[i, : len(array)] = True
        return regions, mask

    def _array(self, key: str) -> Any:
        for name in dict.fromkeys((key, PurePath(key).with_suffix("").as_posix())):
            found = self._read(name)
            if found is None:
                continue
            if found.ndim != 2 or not numpy.issubdtype(found.dtype, numpy.floating):
                got = f"{found.dtype} {list(found.shape)}"
                raise ValueError(f"regions: {name} in {self.path} must be floating [V, E], got {got}")
            if not numpy.isfinite(found).all():
                raise ValueError(f"regions: {name} in {self.path} must be finite")
            return numpy.ascontiguousarray(found, dtype=numpy.float32)
        raise ValueError(f"regions: {self.path} has none for the image {key!r}")

    def _read(self, name: str) -> Any:
        if not self.path.is_dir():
            item = self._open().get(name) if name else None
            item = item.get(self.name) if item is not None and not hasattr(item, "shape") else item
            return None if item is None else item[()]
        file = self.path / f"{name}.npy"
        if not file.is_file():
            return None
        try:
            return numpy.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"regions: {file} cannot be read: {error}") from error

    def _open(self) -> Any:
        if self._file is None or self._opened_by != os.getpid():
            import h5py

            try:
                self._file, self._opened_by = h5py.File(self.path, "r"), os.getpid()
            except OSError as error:
                raise ValueError(f"regions: {self.path} cannot be read: {error}") from error
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}
