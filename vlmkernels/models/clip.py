"""CLIP: two towers, one space. S = exp(t) I T^T, trained with the symmetric InfoNCE (or sigmoid) loss.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"; the
released code openai/CLIP (MIT) for what the paper leaves open. Parameter names are those of openai/CLIP and
open_clip, so their state dicts load as they are; `_clip_convert.py` does the rest (OpenAI's extra buffers,
Hugging Face's names).
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels import intervals
from vlmkernels._modules import is_traced
from vlmkernels.intervals import Intervals
from vlmkernels.models import _clip_convert as convert
from vlmkernels.models import _padding
from vlmkernels.models._clip_resnet import ModifiedResNet
from vlmkernels.models._pretrained import Pretrained
from vlmkernels.nn.dense import MLP, Linear, QuickGELU, add, take_rows

MAX_LOG_SCALE = math.log(100.0)


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of a CLIP. Defaults: ViT-B/32 with GELU.

    `vision_layers` is a number for a ViT, which needs `patch_size`, or four numbers for a ModifiedResNet,
    which has none. `vision_heads` and `text_heads` of None mean a head width of 64 (for a ModifiedResNet: of
    its attention pooling, 32 * vision_width wide). `quick_gelu` is x * sigmoid(1.702 x) in place of GELU;
    OpenAI's weights need it. `init_logit_bias` of None means no logit bias, hence the softmax loss; a number
    means the sigmoid loss.
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

    def __post_init__(self) -> None:
        resnet = not isinstance(self.vision_layers, int)
        pool_width = self.vision_width * 32 if resnet else self.vision_width
        faults = []
        for name in ("vision_layers", "text_layers"):
            layers = getattr(self, name)
            if isinstance(layers, int) and layers < 1:
                faults.append(f"{name} is {layers}, wants at least 1")
        if not isinstance(self.quick_gelu, bool):
            faults.append(f"quick_gelu wants True or False, got {self.quick_gelu!r}")
        if not isinstance(self.vision_layers, int) and len(self.vision_layers) != 4:
            faults.append(
                f"vision_layers wants one number (ViT) or four (ModifiedResNet), got {self.vision_layers}"
            )
        if resnet and self.patch_size is not None:
            faults.append(f"patch_size is {self.patch_size}, a ModifiedResNet wants None")
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


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose result has its input's dtype: under autocast F.layer_norm alone would return fp32."""

    def forward(self, x: Tensor) -> Tensor:  # [..., D]
        return super().forward(x).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; parameter names of nn.MultiheadAttention (one projection for q, k, v)."""

    linear_weights: ClassVar = ("in_proj_weight",)
    adds_residual: ClassVar = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        seen: Intervals,
        wanted: Tensor | None,  # [B, n] int64
        residual: Tensor | None = None,  # [B, n or T, D]
    ) -> Tensor:  # [B, n or T, D]
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, x.shape[-1]
        if wanted is None:
            query, key, value = self._heads(vlmkernels.linear(x, weight, bias), 3)
        else:
            (query,) = self._heads(vlmkernels.linear(take_rows(x, wanted), weight[:width], bias[:width]), 1)
            key, value = self._heads(vlmkernels.linear(x, weight[width:], bias[width:]), 2)
            seen = seen[0][wanted], seen[1][wanted]
        out = vlmkernels.interval_attention(query, key, value, *seen)
        return add(residual, self.out_proj, out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, parts: int) -> Tensor:  # [B, T, parts D] -> [parts, B, heads, T, Dh]
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)


class Block(nn.Module):
    """Pre-LayerNorm transformer block: x += Attention(LN x); x += W2 act(W1 LN x)."""

    def __init__(self, width: int, heads: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        c_fc, c_proj = Linear(width, 4 * width), Linear(4 * width, width)
        self.mlp = MLP(OrderedDict([("c_fc", c_fc), ("gelu", activation()), ("c_proj", c_proj)]))

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        seen: Intervals,
        wanted: Tensor | None = None,  # [B, n] int64
    ) -> Tensor:  # [B, n or T, D]
        residual = x if wanted is None else take_rows(x, wanted)
        x = add(residual, self.attn, self.ln_1(x), seen, wanted)
        return add(x, self.mlp, self.ln_2(x))


class Transformer(nn.Module):
    """Blocks one after the other; the last one computes the wanted tokens alone, where a tower pools."""

    def __init__(self, width: int, layers: int, heads: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(layers))
        branch_std = width**-0.5 * (2 * layers) ** -0.5  # 2 * layers branches are summed
        for block in self.resblocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=branch_std)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.get_parameter("c_fc.weight"), std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.get_parameter("c_proj.weight"), std=branch_std)

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        seen: Intervals,  # [T] each
        wanted: Tensor | None = None,  # [B, n] int64, all tokens when None
    ) -> Tensor:  # [B, n or T, D]
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, seen)
        return last(x, seen, wanted)


class VisionTransformer(nn.Module):
    """The image tower of ViT-B/32 ... ViT-L/14@336px: images [B, 3, R, R] to embeddings [B, output_dim]."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
        activation: type[nn.Module],
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        tokens = (image_size // patch_size) ** 2 + 1
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, output_dim))

    def _tokens(
        self,
        images: Tensor,  # [B, 3, R, R]
        wanted: Tensor | None = None,  # [B, n] int64
    ) -> Tensor:  # [B, n or 1 + (R / P)^2, D], class token first
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # [B, (R / P)^2, D]
        first = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([first, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        return self.transformer(self.ln_pre(x), intervals.full(x.shape[1], device=x.device), wanted)

    def patch_tokens(
        self,
        images: Tensor,  # [B, 3, R, R]
        normalize: bool = False,
    ) -> Tensor:  # [B, (R / P)^2, D]
        """The last layer's output at the patches, row by row, through `ln_post` if `normalize`."""
        return self(images, patches=True, normalize=normalize)

    def forward(
        self,
        images: Tensor,  # [B, 3, R, R]
        *,
        patches: bool = False,
        normalize: bool = False,
    ) -> Tensor:  # [B, output_dim]
        """The embeddings, or with `patches` what `patch_tokens` says."""
        if patches:
            tokens = self._tokens(images)[:, 1:]
            return self.ln_post(tokens) if normalize else tokens
        class_token = torch.zeros(images.shape[0], 1, dtype=torch.int64, device=images.device)
        return self.ln_post(self._tokens(images, class_token)[:, 0]) @ self.proj


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
        activation = QuickGELU if c.quick_gelu else nn.GELU
        assert c.vision_heads is not None, "set by ClipConfig"
        assert c.text_heads is not None, "set by ClipConfig"
        self.visual: nn.Module
        if isinstance(c.vision_layers, int):
            assert c.patch_size is not None, "checked by ClipConfig"
            sizes = (c.image_size, c.patch_size, c.vision_width, c.vision_layers, c.vision_heads, c.embed_dim)
            self.visual = VisionTransformer(*sizes, activation)
        else:
            self.visual = ModifiedResNet(
                c.vision_layers, c.vision_width, c.vision_heads, c.image_size, c.embed_dim
            )
        self.token_embedding = nn.Embedding(c.vocab_size, c.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(c.context_length, c.text_width))
        self.transformer = Transformer(c.text_width, c.text_layers, c.text_heads, activation)
        self.ln_final = LayerNorm(c.text_width)
        self.text_projection = nn.Parameter(torch.empty(c.text_width, c.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(c.init_logit_scale))
        bias = None if c.init_logit_bias is None else nn.Parameter(torch.tensor(c.init_logit_bias))
        self.register_parameter("logit_bias", bias)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=c.text_width**-0.5)

    def encode_image(
        self,
        images: Tensor,  # [B, 3, R, R], normalised as the weights want
        normalize: bool = False,
    ) -> Tensor:
        """Image embeddings [B, E], L2-normalised when asked. ValueError for another shape."""
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images: wants [B, 3, {size}, {size}], got {list(images.shape)}")
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
        ValueError (on accelerators, in compiled and in traced code: an asynchronous assertion).
        """
        length = self.config.context_length
        if tokens.ndim != 2 or tokens.shape[1] > length:
            raise ValueError(f"tokens: wants [B, L] with L <= {length}, got {list(tokens.shape)}")
        is_eot = tokens == self.config.eot_id
        if tokens.device.type != "cpu" or is_traced():
            torch._assert_async(is_eot.any(dim=1).all(), "tokens: a row has no end-of-text id")
        elif not is_eot.any(dim=1).all():
            rows = (~is_eot.any(dim=1)).nonzero().flatten().tolist()
            raise ValueError(f"tokens: rows {rows} have no end-of-text id {self.config.eot_id}")
        last = is_eot.int().argmax(dim=1)
        if _padding.can_drop(tokens):
            tokens, positions, bounds = _padding.drop(tokens, last + 1)
            position_embeddings = F.embedding(positions, self.positional_embedding)
            seen, wanted = intervals.packed(bounds, tokens.shape[1]), bounds[None, 1:] - 1
        else:
            position_embeddings = self.positional_embedding[: tokens.shape[1]]
            seen, wanted = intervals.causal(tokens.shape[1], device=tokens.device), last[:, None]
        embeddings = self.token_embedding(tokens)
        x = embeddings + position_embeddings.to(embeddings.dtype)
        x = self.transformer(x, seen, wanted).flatten(0, 1)  # [B, D]
        features = self.ln_final(x) @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def scale(self) -> Tensor:
        """exp(logit_scale), at most 100: what the similarities are multiplied by (0-dim)."""
        return self.logit_scale.clamp(max=MAX_LOG_SCALE).exp()

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

    def load_openai_state_dict(
        self, source: Mapping[str, Any] | str | os.PathLike[str], *, check_activation: bool = True
    ) -> None:
        """Loads weights of openai/CLIP or open_clip: a state dict or a file (.pt, TorchScript, .safetensors).

        OpenAI's own checkpoints (known by their buffers input_resolution, context_length, vocab_size) were
        trained with QuickGELU: with `quick_gelu=False` in the config they are refused, unless
        `check_activation` is False. Raises ValueError as well for keys or shapes that do not fit.
        """
        self.load_weights(convert.from_openai(source, self.config.quick_gelu, check_activation))

    @classmethod
    def from_openai_state_dict(
        cls,
        source: Mapping[str, Any] | str | os.PathLike[str],
        *,
        quick_gelu: bool,
        check_activation: bool = True,
        **fields: Any,
    ) -> CLIP:
        """A CLIP with weights of openai/CLIP or open_clip, sized by their shapes, in evaluation mode.

        `quick_gelu` cannot be seen in the weights and must be given; `fields` (vision_heads, text_heads,
        eot_id, ...) override what is inferred: head width 64, end-of-text id vocab_size - 1. Raises as
        `load_openai_state_dict`.
        """
        state_dict = convert.from_openai(source, quick_gelu, check_activation)
        return cls._from_converted(state_dict, {"quick_gelu": quick_gelu, **fields})

    @classmethod
    def from_hf_state_dict(
        cls, source: Mapping[str, Any] | str | os.PathLike[str], *, quick_gelu: bool, **fields: Any
    ) -> CLIP:
        """A CLIP with the weights of Hugging Face's CLIPModel (a state dict or file), in evaluation mode.

        `quick_gelu` is True where the model's hidden_act is "quick_gelu". `fields` as in
        `from_openai_state_dict`.
        """
        return cls._from_converted(convert.from_hf(source), {"quick_gelu": quick_gelu, **fields})

    @classmethod
    def from_hf_folder(cls, folder: str | os.PathLike[str]) -> CLIP:
        """A CLIP from a folder that Hugging Face's CLIPModel.save_pretrained wrote, in evaluation mode."""
        state_dict, fields = convert.read_hf_folder(folder)
        return cls._from_converted(state_dict, fields)

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The weights under Hugging Face's CLIPModel names. ValueError for a ModifiedResNet or a bias."""
        return convert.to_hf(self.state_dict())

    @classmethod
    def _from_converted(cls, state_dict: dict[str, Tensor], fields: dict[str, Any]) -> CLIP:
        model = cls(ClipConfig(**{**convert.infer_sizes(state_dict), **fields}))
        model.load_weights(state_dict)
        return model.eval()


def _vit(embed_dim: int, image_size: int, patch_size: int, layers: int, width: int, text: int) -> ClipConfig:
    vision: dict[str, Any] = {"vision_layers": layers, "vision_width": width, "patch_size": patch_size}
    return ClipConfig(embed_dim=embed_dim, image_size=image_size, text_width=text, **vision)


def _resnet(
    embed_dim: int, image_size: int, layers: tuple[int, int, int, int], width: int, text: int
) -> ClipConfig:
    vision: dict[str, Any] = {"vision_layers": layers, "vision_width": width, "patch_size": None}
    return ClipConfig(embed_dim=embed_dim, image_size=image_size, text_width=text, **vision)


PUBLISHED = {
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

# open_clip's names: OpenAI's own weights belong to the "-quickgelu" ones.
CONFIGS: dict[str, ClipConfig] = {
    **PUBLISHED,
    **{f"{name}-quickgelu": replace(config, quick_gelu=True) for name, config in PUBLISHED.items()},
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
