"""Features of the regions of an image, computed elsewhere: a `.npy` file, or a data set in an hdf5 file."""

from __future__ import annotations

import os

import numpy
import torch
from torch import Tensor

from vlmkernels.data.images import BrokenImageError, _checked, _reason

HDF5 = (".h5#", ".hdf5#")  # between the name of a file and of a data set in it


def are_regions(name: str | os.PathLike[str]) -> bool:
    """Whether a path is of features, not of an image: FILE.npy, or FILE.h5#NAME."""
    text = os.fspath(name)
    return text.lower().endswith(".npy") or any(mark in text for mark in HDF5)


def read_regions(name: str | os.PathLike[str]) -> Tensor:  # [N, F]
    """The features of N regions as float32. BrokenImageError with the reason if they cannot be read.

    A file of numpy, or ``FILE.h5#NAME`` for the data set NAME of an hdf5 file, as bottom-up features are
    published (``detections.hdf5#42_features``), for which h5py must be installed. Pickled arrays are refused.
    """
    text = os.fspath(name)
    try:
        mark = next((mark for mark in HDF5 if mark in text), None)
        if mark is None:
            array = numpy.load(_checked(text), allow_pickle=False)
        else:
            import h5py

            file, _, key = text.partition(mark)
            with h5py.File(_checked(file + mark[:-1]), "r") as opened:
                array = opened[key][()]
        if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
            raise ValueError(f"features must be floating [N, F], got {array.dtype} {list(array.shape)}")
        return torch.from_numpy(numpy.ascontiguousarray(array, dtype=numpy.float32))
    except Exception as error:  # readers of damaged files raise many types
        raise BrokenImageError(_reason(error)) from error
