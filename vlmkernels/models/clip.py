"""CLIP: two towers, one space. S = exp(t) I T^T, trained with the symmetric InfoNCE (or sigmoid) loss.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"; the
released code openai/CLIP (MIT) for what the paper does not specify. Parameter names are those of openai/CLIP
and open_clip, so their state dicts load as they are; `_clip_convert.py` does the rest (OpenAI's extra
buffers, Hugging Face's names).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels import intervals
from vlmkernels._activations import QuickGELU
from vlmkernels.models import _clip_convert as convert
from vlmkernels.models.parts import padding
from vlmkernels.models.parts.pretrained import LATER, Pretrained, below, config_from_dict, naming
from vlmkernels.models.parts.resnet import ModifiedResNet
from vlmkernels.models.parts.transformer import LayerNorm, Transformer
from vlmkernels.models.parts.vit import VisionTransformer
from vlmkernels.models.parts.weight_files import Source
from vlmkernels.nn._bounds import within

MAX_LOG_SCALE = math.log(100.0)
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
    `text_causal=False` lets its tokens attend to all others, padding too. CLIPA differs from CLIP in these
    four. `vision_eps` and `text_eps` are those of the LayerNorms.
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
            faults.append(f"quick_gelu must be True or False, got {self.quick_gelu!r}")
        if not isinstance(self.vision_layers, int) and len(self.vision_layers) != 4:
            faults.append(
                f"vision_layers must be one number (ViT) or four (ModifiedResNet), got {self.vision_layers}"
            )
        if resnet and self.patch_size is not None:
            faults.append(f"patch_size must be None for a ModifiedResNet, got {self.patch_size}")
        of_vit = ("vision_mlp_width", "vision_eps", "vision_ln_pre", "vision_pool")
        if resnet and (
            given := [name for name in of_vit if getattr(self, name) != getattr(ClipConfig, name)]
        ):
            faults.append(f"{', '.join(given)} must not be given for a ModifiedResNet")
        for name, allowed in (("vision_pool", VISION_POOLS), ("text_pool", TEXT_POOLS)):
            if getattr(self, name) not in allowed:
                faults.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("vision_eps", "text_eps"):
            if not getattr(self, name) >= 0:
                faults.append(f"{name} must not be negative, got {getattr(self, name)}")
        if resnet and self.image_size % 32:
            faults.append(f"image_size must be a multiple of 32 for a ModifiedResNet, got {self.image_size}")
        if not resnet and (self.patch_size is None or self.image_size % self.patch_size):
            faults.append(
                f"image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size}"
            )
        for tower, width in (("vision", pool_width), ("text", self.text_width)):
            heads = getattr(self, f"{tower}_heads")
            if heads is None:
                heads = max(width // 64, 1)
                object.__setattr__(self, f"{tower}_heads", heads)
            if width % heads:
                faults.append(f"{tower}_heads must be a divisor of the width {width}, got {heads}")
        for name in ("pad_id", "eot_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                faults.append(
                    f"{name} must be an id below vocab_size {self.vocab_size}, got {getattr(self, name)}"
                )
        if faults:
            raise ValueError("ClipConfig: " + "; ".join(faults))


def _activation(config: ClipConfig) -> type[nn.Module]:
    return QuickGELU if config.quick_gelu else nn.GELU


def image_tower(config: ClipConfig) -> nn.Module:
    """Only `CLIP(config).visual`."""
    c = config
    assert c.vision_heads is not None, "set by ClipConfig"
    if not isinstance(c.vision_layers, int):
        return ModifiedResNet(c.vision_layers, c.vision_width, c.vision_heads, c.image_size, c.embed_dim)
    assert c.patch_size is not None, "checked by ClipConfig"
    return VisionTransformer(
        c.image_size,
        c.patch_size,
        c.vision_width,
        c.vision_layers,
        c.vision_heads,
        c.vision_mlp_width,
        c.embed_dim,
        _activation(c),
        eps=c.vision_eps,
        ln_pre=c.vision_ln_pre,
        pool=c.vision_pool,
    )


class CLIP(Pretrained):
    """CLIP with a ViT or a ModifiedResNet as image tower.

    `CLIP(CONFIGS["ViT-B-32"])` has random weights; `from_pretrained`, `from_openai_state_dict`,
    `from_hf_state_dict` and `from_hf_folder` load them. Call `clamp_logit_scale_()` after each optimizer
    step.
    """

    model_type: ClassVar[str] = "clip"
    config_class: ClassVar[type] = ClipConfig
    config: ClipConfig
    logit_bias: nn.Parameter | None

    def __init__(self, config: ClipConfig) -> None:
        super().__init__(config)
        c = self.config
        assert c.text_heads is not None, "set by ClipConfig"
        self.visual = image_tower(c)
        self.token_embedding = nn.Embedding(c.vocab_size, c.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(c.context_length, c.text_width))
        text_sizes = (c.text_width, c.text_layers, c.text_heads, c.text_mlp_width)
        self.transformer = Transformer(*text_sizes, _activation(c), c.text_eps)
        self.ln_final = LayerNorm(c.text_width, c.text_eps)
        self.text_projection = nn.Parameter(torch.empty(c.text_width, c.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(c.init_logit_scale))
        bias = None if c.init_logit_bias is None else nn.Parameter(torch.tensor(c.init_logit_bias))
        self.register_parameter("logit_bias", bias)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=c.text_width**-0.5)

    def encode_image(
        self,
        images: Tensor,  # [B, 3, R, R], normalised as in training
        normalize: bool = False,
    ) -> Tensor:
        """Image embeddings [B, E], L2-normalised if `normalize`. ValueError for another shape."""
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be [B, 3, {size}, {size}], got {list(images.shape)}")
        features = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(
        self,
        tokens: Tensor,  # [B, L] int64, L <= context_length, one row = start, text, end-of-text, padding
        normalize: bool = False,
    ) -> Tensor:
        """Text embeddings [B, E]: the top layer at the first `config.eot_id` of each row, projected.

        Attention is causal, so padding after the end-of-text id changes nothing and may be cut off; on a CPU
        it costs nothing (the rows are packed; not in compiled or traced code). A row without the id is a
        ValueError, on accelerators and in compiled code an asynchronous assertion, in a trace an index that
        is out of bounds. With `text_causal=False` or `text_pool="last"` padding counts: rows have all
        `context_length` tokens.
        """
        length, causal = self.config.context_length, self.config.text_causal
        padding_counts = not causal or self.config.text_pool == "last"
        if tokens.ndim != 2 or tokens.shape[1] > length or (padding_counts and tokens.shape[1] < length):
            sign = "=" if padding_counts else "<="
            raise ValueError(f"tokens must be [B, L] with L {sign} {length}, got {list(tokens.shape)}")
        last = self._pooled_positions(tokens)
        if not padding_counts and padding.can_drop(tokens):
            tokens, positions, bounds = padding.drop(tokens, last + 1)
            position_embeddings = F.embedding(positions, self.positional_embedding)
            seen, wanted = intervals.packed(bounds, tokens.shape[1]), bounds[None, 1:] - 1
        else:
            position_embeddings = self.positional_embedding[: tokens.shape[1]]
            seen = (intervals.causal if causal else intervals.full)(tokens.shape[1], device=tokens.device)
            wanted = last[:, None]
        embeddings = self.token_embedding(tokens)
        x = embeddings + position_embeddings.to(embeddings.dtype)
        x = self.transformer(x, seen, wanted).flatten(0, 1)  # [B, D]
        features = self.ln_final(x) @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def _pooled_positions(self, tokens: Tensor) -> Tensor:  # [B, L] -> [B]
        if self.config.text_pool == "last":
            return tokens.new_full(tokens.shape[:1], tokens.shape[1] - 1, dtype=torch.int64)
        is_eot = tokens == self.config.eot_id
        ended, last = is_eot.any(dim=1), is_eot.int().argmax(dim=1)
        if torch.jit.is_tracing():  # a trace has no assertions: such a row indexes beyond its end
            last = last.where(ended, tokens.shape[1])
        elif tokens.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(ended.all(), "tokens: a row has no end-of-text id")
        elif not ended.all():
            rows = (~ended).nonzero().flatten().tolist()
            raise ValueError(f"tokens: rows {rows} have no end-of-text id {self.config.eot_id}")
        return last

    def scale(self) -> Tensor:
        """exp(logit_scale), at most 100 (0-dim): the factor of the similarities."""
        return within(self.logit_scale, high=MAX_LOG_SCALE).exp()

    def forward(
        self,
        images: Tensor,  # [B, 3, R, R]
        tokens: Tensor,  # [B, L] int64
    ) -> dict[str, Tensor]:
        """Normalised image_features, text_features [B, E]; logit_scale = exp(t) <= 100; logit_bias if any.

        These are the arguments of `vlmkernels.nn.ClipLoss` and `SigLipLoss`, which also serve several
        processes.
        """
        out = {
            "image_features": self.encode_image(images, normalize=True),
            "text_features": self.encode_text(tokens, normalize=True),
            "logit_scale": self.scale(),
        }
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias
        return out

    def loss(
        self,
        images: Tensor,  # [B, 3, R, R]
        tokens: Tensor,  # [B, L] int64
        *,
        positives: tuple[Tensor, Tensor] | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The contrastive loss of one process's batch: `sigmoid_loss` with a logit bias, `info_nce` without.

        `positives` is (image ids [B], text ids [B]), equal ids being positive pairs; None pairs row i with
        row i. ValueError for label smoothing with the sigmoid loss, which has none.
        """
        query, key = self.encode_image(images), self.encode_text(tokens)
        if self.logit_bias is None:
            options: dict[str, Any] = {"label_smoothing": label_smoothing, "normalize": True}
            return vlmkernels.info_nce(query, key, self.scale(), positives=positives, **options)
        if label_smoothing:
            raise ValueError(f"label_smoothing: the sigmoid loss has none, got {label_smoothing}")
        return vlmkernels.sigmoid_loss(
            query, key, self.scale(), self.logit_bias, positives=positives, normalize=True
        )

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Puts logit_scale back into [0, ln 100]; to be called after each optimizer step."""
        self.logit_scale.clamp_(0.0, MAX_LOG_SCALE)

    def load_openai_state_dict(self, source: Source, *, check_activation: bool = True) -> None:
        """Loads weights of openai/CLIP or open_clip: a state dict or a file (.pt, TorchScript, .safetensors).

        The fields that come with the weights (`from_openai_state_dict`) must be as in this model's config,
        which the results depend on: ValueError, as for keys or shapes that do not match. With
        `check_activation=False` the activation may differ.
        """
        weights, fields, origin = convert.from_openai(source)
        if check_activation:
            convert.check_activation(fields, self.config.quick_gelu, origin)
        quick_gelu = {"quick_gelu": self.config.quick_gelu}
        wanted = config_from_dict(ClipConfig, {**vars(self.config), **fields, **quick_gelu})
        differing = [
            f"{name} must be {getattr(wanted, name)}, got {getattr(self.config, name)}"
            for name in fields
            if not name.startswith("init_") and getattr(self.config, name) != getattr(wanted, name)
        ]
        if differing:
            raise ValueError(f"{origin} does not match this config: " + "; ".join(differing))
        self.load_weights(weights)

    @classmethod
    def from_openai_state_dict(
        cls,
        source: Source,
        *,
        quick_gelu: bool | None = None,
        check_activation: bool = True,
        **fields: Any,
    ) -> CLIP:
        """A CLIP with weights of openai/CLIP or open_clip, sized by their shapes, in evaluation mode.

        What shapes do not determine is read from open_clip_config.json beside a file, and is known for
        OpenAI's own checkpoints (recognised by their buffers input_resolution, context_length, vocab_size):
        QuickGELU, heads of 64 channels. For other weights `quick_gelu`, `vision_heads` and `text_heads` must
        be given, for CLIPA's `vision_pool`, `text_pool` and `text_causal` too; ValueError names what is
        missing. Other `fields` of ClipConfig are its defaults, and the end-of-text id is vocab_size - 1.
        Arguments override what was read, but another activation than the known one is a ValueError unless
        `check_activation` is False. Raises as `load_openai_state_dict`.
        """
        given = fields if quick_gelu is None else {"quick_gelu": quick_gelu, **fields}
        weights, known, origin = convert.from_openai(source)
        if check_activation and quick_gelu is not None:
            convert.check_activation(known, quick_gelu, origin)
        return cls._from_converted(source, weights, {**known, **given})

    @classmethod
    def from_open_clip_folder(cls, folder: str | os.PathLike[str], **fields: Any) -> CLIP:
        """A CLIP from a folder with open_clip_config.json and weights of open_clip, in evaluation mode.

        `fields` of ClipConfig override the config's. ValueError lists what a CLIP here does not support
        (timm's and Hugging Face's towers, LayerScale, ...).
        """
        if not (path := Path(folder) / convert.OPEN_CLIP_FILE).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return cls.from_openai_state_dict(folder, check_activation=False, **fields)

    @classmethod
    def from_hf_state_dict(cls, source: Source, *, quick_gelu: bool | None = None, **fields: Any) -> CLIP:
        """A CLIP with the weights of Hugging Face's CLIPModel (a state dict or file), in evaluation mode.

        What shapes do not determine is read from config.json beside a file; for a state dict `quick_gelu`
        (True if hidden_act is "quick_gelu"), `vision_heads` and `text_heads` must be given. Other `fields` as
        in `from_openai_state_dict`.
        """
        given = fields if quick_gelu is None else {"quick_gelu": quick_gelu, **fields}
        weights, known, _ = convert.from_hf(source)
        return cls._from_converted(source, weights, {**known, **given})

    @classmethod
    def from_hf_folder(cls, folder: str | os.PathLike[str], **fields: Any) -> CLIP:
        """A CLIP from a folder that Hugging Face's CLIPModel.save_pretrained wrote, in evaluation mode.

        `fields` of ClipConfig override those of config.json. Dropout of attention, which acts only in
        training, is ignored. ValueError lists what a CLIP here does not support.
        """
        if not (path := Path(folder) / convert.CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return cls.from_hf_state_dict(folder, **fields)

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The weights under Hugging Face's CLIPModel names. ValueError for a ModifiedResNet or a bias."""
        return convert.to_hf(self.state_dict())

    @classmethod
    def _from_converted(cls, source: Source, weights: dict[str, Tensor], fields: dict[str, Any]) -> CLIP:
        with naming(source):
            config = config_from_dict(ClipConfig, convert.complete(weights, fields))
            return cls.with_weights(config, weights)


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

_TINY = ClipConfig(
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
)

# open_clip's names: OpenAI's own weights belong to the "-quickgelu" ones.
CONFIGS: dict[str, ClipConfig] = {
    **OPENAI,
    **LARGER,
    **{
        f"{name}-quickgelu": replace(config, quick_gelu=True)
        for name, config in {**OPENAI, **LARGER}.items()
        if name != "ViT-g-14"  # open_clip has none
    },
    "emoji-tiny": _TINY,
    "emoji-resnet": replace(
        _TINY, image_size=64, vision_layers=(1, 1, 1, 1), vision_width=16, vision_heads=8, patch_size=None
    ),
}
