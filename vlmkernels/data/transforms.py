"""Image to float tensor: resize, crop, (x / 255 - mean) / std, with Pillow; training augmentation."""

from __future__ import annotations

import math
import random
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_RESIZE_MODES = ("shortest", "longest", "squash")
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
# An image of 1 x 60,000 pixels would have 3,000 million of them with a short side of 224. Beyond these limits
# only the visible part is resized, and sides are first reduced by integer factors.
_RESIZED_PIXELS = 2**24
_SIDE = 2**15


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _numbers(values: Any, count: int, kind: Any = (int, float)) -> bool:
    """Whether `values` are `count` finite numbers."""
    right = isinstance(values, (tuple, list)) and len(values) == count
    return right and all(isinstance(value, kind) and math.isfinite(value) for value in values)


_GREY = np.tile([0.299, 0.587, 0.114], (3, 1))  # the luma of Rec. 601 in each channel
_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_RGB = np.linalg.inv(_YIQ)


def _turn_hues(part: float) -> np.ndarray:
    """The map of RGB that turns hues by a part of the circle and keeps the luma: a rotation in YIQ."""
    cos, sin = math.cos(2 * math.pi * part), math.sin(2 * math.pi * part)
    return _RGB @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _YIQ


def swap_sides(text: str) -> str:
    """A caption of the mirrored image: the words left and right exchanged, in the case they were written."""

    def other(found: re.Match[str]) -> str:
        word = found.group()
        swapped = "right" if word.lower() == "left" else "left"
        return swapped.upper() if word.isupper() else swapped.title() if word[0].isupper() else swapped

    return _SIDES.sub(other, text)


def _centre(old: int, new: int, shown: int) -> tuple[float, float]:
    """The range on the `old` side of the `shown` centre pixels of the resized side, `new`."""
    first = round((new - shown) / 2)
    return first * (old / new), min((first + shown) * (old / new), old)


def _resize(
    image: Image.Image, size: tuple[int, int], interpolation: str, box: tuple[float, float, float, float]
) -> Image.Image:
    """The part `box` of an image, resized; Pillow's memory per row and column is bounded."""
    gap = 3.0 if max(box[2] - box[0], box[3] - box[1]) > _SIDE else None
    return image.resize(size, _FILTERS[interpolation], box, gap)


@dataclass(frozen=True)
class ImageTransform:
    """A callable PIL image -> float32 [3, H, W], made by `image_transform`, which documents the fields.

    Frozen and JSON-serialisable: `to_dict` and `from_dict` store it with a checkpoint.
    """

    image_size: int | tuple[int, int] = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    train: bool = False
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    resize_size: int | tuple[int, int] | None = None
    fill: int = 0
    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    jitter: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    caption_flip: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "resize_size"):
            size = getattr(self, name)
            sides = (size, size) if isinstance(size, int) else size
            absent = size is None and name == "resize_size"
            if not absent and not (_numbers(sides, 2, int) and min(sides) >= 1):
                raise ValueError(f"{name} must be a positive int or (height, width), got {size!r}")
        if not (_numbers(self.mean, 3) and _numbers(self.std, 3) and min(self.std) > 0):
            raise ValueError(
                f"mean and std must have 3 values, std > 0, got mean={self.mean!r}, std={self.std!r}"
            )
        if self.interpolation not in _FILTERS:
            raise ValueError(f"interpolation must be one of {sorted(_FILTERS)}, got {self.interpolation!r}")
        if self.resize_mode not in _RESIZE_MODES:
            raise ValueError(f"resize_mode must be one of {_RESIZE_MODES}, got {self.resize_mode!r}")
        if not isinstance(self.train, bool) or not isinstance(self.fill, int) or not 0 <= self.fill <= 255:
            raise ValueError(
                f"train must be a bool and fill in [0, 255], got train={self.train!r}, fill={self.fill!r}"
            )
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must satisfy 0 < low <= high <= 1, got {self.crop_scale!r}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio must satisfy 0 < low <= high, got {self.crop_ratio!r}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be a probability, got {self.flip!r}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {self.jitter!r}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must be in [0, 0.5], got {self.hue!r}")
        if not 0 <= self.grayscale <= 1:
            raise ValueError(f"grayscale must be a probability, got {self.grayscale!r}")
        if not isinstance(self.caption_flip, bool):
            raise ValueError(f"caption_flip must be a bool, got {self.caption_flip!r}")

    def __call__(self, image: Image.Image, rng: random.Random | None = None) -> Tensor:
        """float32 [3, H, W]. `rng` drives the augmentation; by default it is seeded by torch's generator."""
        return self.pair(image, "", rng)[0]

    def pair(self, image: Image.Image, text: str, rng: random.Random | None = None) -> tuple[Tensor, str]:
        """The transformed image and its caption, which `caption_flip` changes with a flip of the image."""
        if not isinstance(image, Image.Image):
            raise ValueError(f"image must be a PIL.Image, got a {type(image).__name__}")
        if self.train:
            rng = rng or _drawn_rng()
            image, flipped = self._augment(image, rng)
            image = self._colour(image.convert("RGB"), rng)
            text = swap_sides(text) if flipped and self.caption_flip else text
        else:
            image = self._resize_and_crop(image).convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return pixels.sub_(mean).div_(std), text

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageTransform:
        """The inverse of `to_dict` (also after JSON turned tuples into lists). ValueError if invalid."""
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) - known:
            got = sorted(set(values) - known) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"values must be a dict with keys among {sorted(known)}, got {got}")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(**arguments)
        except TypeError as error:  # a number instead of a pair, a string instead of a number
            raise ValueError(f"not the values of an image transform, {error}: {values}") from error

    def for_inference(self) -> ImageTransform:
        """The same geometry and normalisation without augmentation."""
        return ImageTransform.from_dict({**self.to_dict(), "train": False})

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        target = _pair(self.image_size)
        height, width = _pair(self.resize_size or self.image_size)
        old_width, old_height = image.size
        if self.resize_mode == "squash":
            new = (width, height)
        elif self.resize_mode == "shortest" and height == width:
            short, long = sorted(image.size)
            other = int(height * long / short)
            new = (height, other) if old_width <= old_height else (other, height)
        else:
            pick = max if self.resize_mode == "longest" else min
            ratio = pick(old_height / height, old_width / width)
            new = (max(1, round(old_width / ratio)), max(1, round(old_height / ratio)))
        shown = new
        if new[0] * new[1] > _RESIZED_PIXELS:
            shown = (min(new[0], target[1]), min(new[1], target[0]))
        if new != image.size:
            box = (*_centre(image.width, new[0], shown[0]), *_centre(image.height, new[1], shown[1]))
            image = _resize(image, shown, self.interpolation, (box[0], box[2], box[1], box[3]))
        return self._center_crop_or_pad(image, target)

    def _center_crop_or_pad(self, image: Image.Image, target: tuple[int, int]) -> Image.Image:
        height, width = target
        missing_w, missing_h = max(0, width - image.width), max(0, height - image.height)
        if missing_w or missing_h:
            border = (missing_w // 2, missing_h // 2, (missing_w + 1) // 2, (missing_h + 1) // 2)
            image = ImageOps.expand(image.convert("RGB"), border, (self.fill,) * 3)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))

    def _augment(self, image: Image.Image, rng: random.Random) -> tuple[Image.Image, bool]:
        """Random area and aspect ratio (ten tries, then the largest centre box), resized; flipped or not."""
        height, width = _pair(self.image_size)
        box = None
        for _ in range(10):
            area = image.width * image.height * rng.uniform(*self.crop_scale)
            ratio = math.exp(rng.uniform(math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= image.width and 0 < h <= image.height:
                left, top = rng.randint(0, image.width - w), rng.randint(0, image.height - h)
                box = (left, top, left + w, top + h)
                break
        if box is None:
            ratio = min(max(image.width / image.height, self.crop_ratio[0]), self.crop_ratio[1])
            w = min(image.width, max(1, round(image.height * ratio)))
            h = min(image.height, max(1, round(image.width / ratio)))
            left, top = (image.width - w) // 2, (image.height - h) // 2
            box = (left, top, left + w, top + h)
        image = image.crop(box)
        image = _resize(image, (width, height), self.interpolation, (0, 0, *image.size))
        flipped = rng.random() < self.flip
        return (ImageOps.mirror(image) if flipped else image), flipped

    def _colour(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """Every change is an affine map of a pixel's colour, so all of them are one."""
        if not (self.jitter or self.hue or self.grayscale):
            return image
        of_pixel, added = np.eye(3), 0.0  # what is added is a grey, which no later change alters
        if self.jitter > 0:
            brightness, contrast, saturation = (
                rng.uniform(1 - self.jitter, 1 + self.jitter) for _ in range(3)
            )
            grey = brightness * np.asarray(image.convert("L")).mean()
            of_pixel *= brightness * contrast
            added = (1 - contrast) * grey
            of_pixel = (saturation * np.eye(3) + (1 - saturation) * _GREY) @ of_pixel
        if self.hue > 0:
            of_pixel = _turn_hues(rng.uniform(-self.hue, self.hue)) @ of_pixel
        if self.grayscale > 0 and rng.random() < self.grayscale:
            of_pixel = _GREY @ of_pixel
        return image.convert("RGB", tuple(value for row in of_pixel.tolist() for value in (*row, added)))


@dataclass(frozen=True)
class ImageViews:
    """Several `ImageTransform`s of one image, drawn alike: a callable PIL image -> a tensor for each.

    With the same crop, flip and jitter options all show the same part of the image, each in its own size.
    """

    transforms: tuple[ImageTransform, ...]

    def __call__(self, image: Image.Image, rng: random.Random | None = None) -> tuple[Tensor, ...]:
        return self.pair(image, "", rng)[0]

    def pair(
        self, image: Image.Image, text: str, rng: random.Random | None = None
    ) -> tuple[tuple[Tensor, ...], str]:
        """The views, and the caption as the first transform has it."""
        rng = rng or _drawn_rng()
        state, pairs = rng.getstate(), []
        for transform in self.transforms:
            rng.setstate(state)
            pairs.append(transform.pair(image, text, rng))
        return tuple(view for view, _ in pairs), pairs[0][1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"transforms": [transform.to_dict() for transform in self.transforms]}


def _drawn_rng() -> random.Random:
    """Seeded by torch's generator."""
    return random.Random(int(torch.randint(2**62, (), device="cpu")))


def image_transform(
    image_size: int | tuple[int, int],
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    *,
    train: bool = False,
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
    resize_size: int | tuple[int, int] | None = None,
    fill: int = 0,
    crop_scale: tuple[float, float] = (0.9, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.0,
    jitter: float = 0.0,
    hue: float = 0.0,
    grayscale: float = 0.0,
    caption_flip: bool = False,
) -> ImageTransform:
    """PIL image -> float32 [3, H, W], values (x / 255 - mean) / std.

    Inference (`train=False`) equals `open_clip.transform.image_transform_v2`: resize, centre crop, then RGB
    (an alpha channel is dropped, not blended). Sizes are an int (square) or (height, width).
    resize_mode: "shortest" side to the target and crop, "longest" side to the target and pad with `fill`, or
    "squash".
    resize_size: size of the resize if it differs from the crop `image_size`.
    interpolation: "bicubic", "bilinear" or "nearest", Pillow's antialiased filters.

    Training: a random box of `crop_scale` of the area and an aspect ratio in `crop_ratio` is resized to the
    target; flipped horizontally with probability `flip` (0: captions may contain left and right, which
    `caption_flip` exchanges with every flip, as in VirTex); brightness, contrast and saturation are each
    scaled by a factor in 1 +- `jitter`, hues turn in YIQ by a part of the circle in +- `hue`, and with
    probability `grayscale` colours are dropped.

    Raises ValueError naming the argument that is out of range.
    """
    return ImageTransform(
        image_size=image_size if isinstance(image_size, int) else (image_size[0], image_size[1]),
        mean=tuple(mean),
        std=tuple(std),
        train=train,
        interpolation=interpolation,
        resize_mode=resize_mode,
        resize_size=resize_size,
        fill=fill,
        crop_scale=crop_scale,
        crop_ratio=crop_ratio,
        flip=flip,
        jitter=jitter,
        hue=hue,
        grayscale=grayscale,
        caption_flip=caption_flip,
    )


def align_transform(image_size: int = 289, resize_size: int = 346) -> ImageTransform:
    """ALIGN's inference transform: bilinear to `resize_size` squared, centre crop, x / 127.5 - 1.

    Jia et al. 2021 (arXiv:2102.05918), section 5: 346 pixels, crop 289. Equals the EfficientNet image
    processor of transformers with include_top=False, rescale_offset=True, rescale_factor=1/127.5,
    do_normalize=False.
    """
    half = (0.5, 0.5, 0.5)
    return image_transform(
        image_size, half, half, interpolation="bilinear", resize_mode="squash", resize_size=resize_size
    )
