"""`read_image`: a file or encoded bytes as an upright RGB image, from any stored mode."""

from __future__ import annotations

import os
import random
import stat
from io import BytesIO
from typing import Any

import numpy
from PIL import ExifTags, Image

from vlmkernels.data._text import is_unicode
from vlmkernels.data.samples import Transform, apply_transform

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImageError(ValueError):
    """An image is missing or cannot be decoded or transformed; `key` names its sample, if known."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


def read_image(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """The RGB image of a file, or of encoded bytes. BrokenImageError with the reason if it cannot be read.

    The first frame, rotated according to its EXIF orientation; transparency is blended with white. 16-bit
    grey keeps its high byte. Floating-point grey is white at 1, or at 255 if a value exceeds 1. Grey outside
    of its range is an error, as are pipes, devices, names that are not UTF-8, EPS (a program), and more than
    the 179 million pixels that Pillow allows. Colour profiles are not applied.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else _checked(source)) as image:
            if image.format == "EPS":
                raise ValueError("an EPS file is a program, which Ghostscript would have to run")
            image.load()
            rgb = _to_rgb(image)
            turn = _TURNS.get(_orientation(image))
            return rgb if turn is None else rgb.transpose(turn)
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        raise BrokenImageError(_reason(error)) from error


def transformed(
    transform: Transform | None, image: Image.Image, text: str = "", rng: random.Random | None = None
) -> tuple[Any, str]:
    """`apply_transform`; BrokenImageError if it fails."""
    try:
        return apply_transform(transform, image, text, rng)
    except Exception as error:
        raise BrokenImageError(f"transform: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _checked(path: str | os.PathLike[str]) -> str:
    """The path of a regular file: opening a pipe would block forever, and a device has no end."""
    name = os.fspath(path)
    if not is_unicode(name):
        raise ValueError("the name is not UTF-8; rename the file")
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise ValueError("neither a regular file nor a folder that can be listed")
    return name


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata with intact pixels: ignored
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_of_8_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    colours = image if image.mode == "RGBA" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")


def _grey_of_8_bits(image: Image.Image) -> Image.Image:
    """8-bit grey from the modes I;16 (any byte order), I (16 bits, PNM) and F, which Pillow clips at 255."""
    grey = numpy.asarray(image)
    low, high = grey.min(), grey.max()
    white = 65535 if image.mode != "F" else 1 if high <= 1 else 255
    if not (low >= 0 and high <= white):  # NaN is neither
        raise ValueError(f"grey values must be in [0, {white}], got {low} to {high}")
    if "transparency" in image.info:
        grey = numpy.where(grey == image.info["transparency"], white, grey)
    grey = numpy.rint(grey * (255 / white)) if image.mode == "F" else grey >> 8
    return Image.fromarray(grey.astype(numpy.uint8))
