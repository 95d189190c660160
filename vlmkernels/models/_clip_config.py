"""The sizes of a CLIP, and those that were published."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from vlmkernels.models.parts.pretrained import LATER, below

VISION_POOLS = ("class", "mean")
TEXT_POOLS = ("eot", "last")
SIZES = (
    *("embed_dim", "image_size", "vision_layers", "vision_width", "vision_heads", "patch_size"),
    *("context_length", "vocab_size", "text_width", "text_layers", "text_heads"),
    *("vision_mlp_width", "text_mlp_width"),
)


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of a CLIP. Defaults: ViT-B/32 with GELU.

    `vision_layers` is a number for a ViT, which needs `patch_size`, or four numbers for a ModifiedResNet,
    which has none. `vision_heads` and `text_heads` of None mean a head width of 64 (for a ModifiedResNet: of
    its attention pooling, 32 * vision_width wide), `vision_mlp_width` and `text_mlp_width` of None 4 times
    the width. `quick_gelu` is x * sigmoid(1.702 x) in place of GELU; OpenAI's weights need it.
    `init_logit_bias` of None means no logit bias, hence the softmax loss; a number means the sigmoid loss.

    A ViT pools its "class" token or the "mean" of its patches; `vision_ln_pre` is the LayerNorm before its
    blocks. A text is pooled at its end ("eot"), or at the "last" of `context_length` tokens, padding or not;
    `text_causal=False` lets its tokens see all others, padding too. CLIPA differs from CLIP in these four.
    `vision_eps` and `text_eps` are those of the LayerNorms.
    """

    embed_dim: int = 512
    image_size: int = 224
    vision_layers: int | tuple[int, int, int, int] = 12
    vision_width: int = 768
    vision_heads: int | None = None
    patch_size: int | None = 32
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 512
    text_layers: int = 12
    text_heads: int | None = None
    quick_gelu: bool = False
    pad_id: int = 0
    eot_id: int = 49407
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None
    vision_mlp_width: int | None = field(default=None, metadata=LATER)
    text_mlp_width: int | None = field(default=None, metadata=LATER)
    vision_eps: float = field(default=1e-5, metadata=LATER)
    text_eps: float = field(default=1e-5, metadata=LATER)
    vision_ln_pre: bool = field(default=True, metadata=LATER)
    vision_pool: str = field(default="class", metadata=LATER)
    text_pool: str = field(default="eot", metadata=LATER)
    text_causal: bool = field(default=True, metadata=LATER)

    def __post_init__(self) -> None:
        if too_small := below(self, 1, *SIZES):
            raise ValueError("ClipConfig: " + "; ".join(too_small))
        resnet = not isinstance(self.vision_layers, int)
        pool_width = self.vision_width * 32 if resnet else self.vision_width
        faults = []
        if not isinstance(self.quick_gelu, bool):
            faults.append(f"quick_gelu wants True or False, got {self.quick_gelu!r}")
        if not isinstance(self.vision_layers, int) and len(self.vision_layers) != 4:
            faults.append(
                f"vision_layers wants one number (ViT) or four (ModifiedResNet), got {self.vision_layers}"
            )
        if resnet and self.patch_size is not None:
            faults.append(f"patch_size is {self.patch_size}, a ModifiedResNet wants None")
        of_vit = ("vision_mlp_width", "vision_eps", "vision_ln_pre", "vision_pool")
        if resnet and (
            given := [name for name in of_vit if getattr(self, name) != getattr(ClipConfig, name)]
        ):
            faults.append(f"{', '.join(given)} given, a ModifiedResNet has none")
        for name, allowed in (("vision_pool", VISION_POOLS), ("text_pool", TEXT_POOLS)):
            if getattr(self, name) not in allowed:
                faults.append(f"{name} is {getattr(self, name)!r}, wants one of {', '.join(allowed)}")
        for name in ("vision_eps", "text_eps"):
            if not getattr(self, name) >= 0:
                faults.append(f"{name} is {getattr(self, name)}, wants 0 or more")
        if resnet and self.image_size % 32:
            faults.append(f"image_size is {self.image_size}, a ModifiedResNet wants a multiple of 32")
        if not resnet and (self.patch_size is None or self.image_size % self.patch_size):
            faults.append(
                f"image_size is {self.image_size}, wants a multiple of patch_size {self.patch_size}"
            )
        for tower, width in (("vision", pool_width), ("text", self.text_width)):
            heads = getattr(self, f"{tower}_heads")
            if heads is None:
                heads = max(width // 64, 1)
                object.__setattr__(self, f"{tower}_heads", heads)
            if width % heads:
                faults.append(f"{tower}_heads is {heads}, wants a divisor of the width {width}")
        for name in ("pad_id", "eot_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                faults.append(
                    f"{name} is {getattr(self, name)}, wants an id below vocab_size {self.vocab_size}"
                )
        if faults:
            raise ValueError("ClipConfig: " + "; ".join(faults))


def _vit(
    embed_dim: int, image_size: int, patch_size: int, layers: int, width: int, text: int, **more: Any
) -> ClipConfig:
    vision: dict[str, Any] = {"vision_layers": layers, "vision_width": width, "patch_size": patch_size}
    return ClipConfig(embed_dim=embed_dim, image_size=image_size, text_width=text, **vision, **more)


def _resnet(
    embed_dim: int, image_size: int, layers: tuple[int, int, int, int], width: int, text: int
) -> ClipConfig:
    vision: dict[str, Any] = {"vision_layers": layers, "vision_width": width, "patch_size": None}
    return ClipConfig(embed_dim=embed_dim, image_size=image_size, text_width=text, **vision)


OPENAI = {
    "RN50": _resnet(1024, 224, (3, 4, 6, 3), 64, 512),
    "RN101": _resnet(512, 224, (3, 4, 23, 3), 64, 512),
    "RN50x4": _resnet(640, 288, (4, 6, 10, 6), 80, 640),
    "RN50x16": _resnet(768, 384, (6, 8, 18, 8), 96, 768),
    "RN50x64": _resnet(1024, 448, (3, 15, 36, 10), 128, 1024),
    "ViT-B-32": _vit(512, 224, 32, 12, 768, 512),
    "ViT-B-16": _vit(512, 224, 16, 12, 768, 512),
    "ViT-L-14": _vit(768, 224, 14, 24, 1024, 768),
    "ViT-L-14-336": _vit(768, 336, 14, 24, 1024, 768),
}

LARGER = {
    "ViT-H-14": _vit(1024, 224, 14, 32, 1280, 1024, vision_heads=16, text_layers=24),
    "ViT-g-14": _vit(1024, 224, 14, 40, 1408, 1024, vision_heads=16, vision_mlp_width=6144, text_layers=24),
    "ViT-bigG-14": _vit(
        1280, 224, 14, 48, 1664, 1280, vision_heads=16, vision_mlp_width=8192, text_layers=32
    ),
}

# open_clip's names: OpenAI's own weights belong to the "-quickgelu" ones.
CONFIGS: dict[str, ClipConfig] = {
    **OPENAI,
    **LARGER,
    **{
        f"{name}-quickgelu": replace(config, quick_gelu=True)
        for name, config in {**OPENAI, **LARGER}.items()
        if name != "ViT-g-14"  # open_clip has none
    },
    "emoji-tiny": ClipConfig(
        embed_dim=128,
        image_size=48,
        vision_layers=4,
        vision_width=128,
        vision_heads=4,
        patch_size=8,
        context_length=32,
        vocab_size=4096,
        eot_id=4095,
        text_width=128,
        text_layers=2,
        text_heads=4,
    ),
}
