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
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels import intervals
from vlmkernels.intervals import Intervals
from vlmkernels.models import _clip_convert as convert
from vlmkernels.models._clip_config import CONFIGS as CONFIGS
from vlmkernels.models._clip_config import ClipConfig as ClipConfig
from vlmkernels.models.parts import padding
from vlmkernels.models.parts.pretrained import Pretrained, config_from_dict, naming
from vlmkernels.models.parts.resnet import ModifiedResNet
from vlmkernels.models.parts.weight_files import Source
from vlmkernels.nn._bounds import within
from vlmkernels.nn.dense import MLP, Linear, QuickGELU, add, take_rows

MAX_LOG_SCALE = math.log(100.0)


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

    def __init__(
        self, width: int, heads: int, mlp_width: int, activation: type[nn.Module], eps: float
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width, eps)
        c_fc, c_proj = Linear(width, mlp_width), Linear(mlp_width, width)
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

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_width: int | None,
        activation: type[nn.Module],
        eps: float,
    ) -> None:
        super().__init__()
        block_sizes = (width, heads, 4 * width if mlp_width is None else mlp_width)
        self.resblocks = nn.ModuleList(Block(*block_sizes, activation, eps) for _ in range(layers))
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
        mlp_width: int | None,
        output_dim: int,
        activation: type[nn.Module],
        *,
        eps: float,
        ln_pre: bool,
        pool: str,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        tokens = (image_size // patch_size) ** 2 + 1
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens, width))
        self.ln_pre = LayerNorm(width, eps) if ln_pre else nn.Identity()
        self.transformer = Transformer(width, layers, heads, mlp_width, activation, eps)
        self.ln_post = LayerNorm(width, eps)
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
        if self.pool == "mean":
            pooled = self._tokens(images)[:, 1:].mean(1)
        else:
            class_token = torch.zeros(images.shape[0], 1, dtype=torch.int64, device=images.device)
            pooled = self._tokens(images, class_token)[:, 0]
        return self.ln_post(pooled) @ self.proj


def _activation(config: ClipConfig) -> type[nn.Module]:
    return QuickGELU if config.quick_gelu else nn.GELU


def image_tower(config: ClipConfig) -> nn.Module:
    """`CLIP(config).visual` alone."""
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
        ValueError, on accelerators and in compiled code an asynchronous assertion, in a trace an index that
        is out of bounds. With `text_causal=False` or `text_pool="last"` padding counts: rows have all
        `context_length` tokens.
        """
        length, causal = self.config.context_length, self.config.text_causal
        padding_counts = not causal or self.config.text_pool == "last"
        if tokens.ndim != 2 or tokens.shape[1] > length or (padding_counts and tokens.shape[1] < length):
            sign = "=" if padding_counts else "<="
            raise ValueError(f"tokens: wants [B, L] with L {sign} {length}, got {list(tokens.shape)}")
        last = self._pooled_places(tokens)
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

    def _pooled_places(self, tokens: Tensor) -> Tensor:  # [B, L] -> [B]
        if self.config.text_pool == "last":
            return tokens.new_full(tokens.shape[:1], tokens.shape[1] - 1, dtype=torch.int64)
        is_eot = tokens == self.config.eot_id
        ended, last = is_eot.any(dim=1), is_eot.int().argmax(dim=1)
        if torch.jit.is_tracing():  # which records no assertions: such a row reads behind its end
            last = last.where(ended, tokens.shape[1])
        elif tokens.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(ended.all(), "tokens: a row has no end-of-text id")
        elif not ended.all():
            rows = (~ended).nonzero().flatten().tolist()
            raise ValueError(f"tokens: rows {rows} have no end-of-text id {self.config.eot_id}")
        return last

    def scale(self) -> Tensor:
        """exp(logit_scale), at most 100: what the similarities are multiplied by (0-dim)."""
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

        What comes with the weights (`from_openai_state_dict`) has to be as in this model's config, or else
        they would compute something else: ValueError, as for keys or shapes that do not fit. With
        `check_activation=False` the activation may differ.
        """
        weights, fields, origin = convert.from_openai(source)
        if check_activation:
            convert.check_activation(fields, self.config.quick_gelu, origin)
        quick_gelu = {"quick_gelu": self.config.quick_gelu}
        wanted = config_from_dict(ClipConfig, {**vars(self.config), **fields, **quick_gelu})
        differing = [
            f"{name} is {getattr(self.config, name)}, here {getattr(wanted, name)} is wanted"
            for name in fields
            if not name.startswith("init_") and getattr(self.config, name) != getattr(wanted, name)
        ]
        if differing:
            raise ValueError(f"{origin} does not fit this config: " + "; ".join(differing))
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

        What shapes do not show is read from open_clip_config.json beside a file, and known of OpenAI's own
        checkpoints (their buffers input_resolution, context_length, vocab_size tell): QuickGELU, heads of 64
        channels. For other weights `quick_gelu`, `vision_heads` and `text_heads` have to be given, for
        CLIPA's `vision_pool`, `text_pool` and `text_causal` too; ValueError names what is missing. Other
        `fields` of ClipConfig are its defaults, and the end-of-text id is vocab_size - 1. What is given comes
        first, but that another activation than the known one is a ValueError unless `check_activation` is
        False. Raises as `load_openai_state_dict`.
        """
        given = fields if quick_gelu is None else {"quick_gelu": quick_gelu, **fields}
        weights, known, origin = convert.from_openai(source)
        if check_activation and quick_gelu is not None:
            convert.check_activation(known, quick_gelu, origin)
        return cls._from_converted(source, weights, {**known, **given})

    @classmethod
    def from_open_clip_folder(cls, folder: str | os.PathLike[str], **fields: Any) -> CLIP:
        """A CLIP from a folder with open_clip_config.json and weights of open_clip, in evaluation mode.

        `fields` of ClipConfig come before the config's. ValueError lists all that such a model has and a CLIP
        here has not (timm's and Hugging Face's towers, LayerScale, ...).
        """
        if not (path := Path(folder) / convert.OPEN_CLIP_FILE).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return cls.from_openai_state_dict(folder, check_activation=False, **fields)

    @classmethod
    def from_hf_state_dict(cls, source: Source, *, quick_gelu: bool | None = None, **fields: Any) -> CLIP:
        """A CLIP with the weights of Hugging Face's CLIPModel (a state dict or file), in evaluation mode.

        What shapes do not show is read from config.json beside a file; for a state dict `quick_gelu` (True
        where hidden_act is "quick_gelu"), `vision_heads` and `text_heads` have to be given. Other `fields` as
        in `from_openai_state_dict`.
        """
        given = fields if quick_gelu is None else {"quick_gelu": quick_gelu, **fields}
        weights, known, _ = convert.from_hf(source)
        return cls._from_converted(source, weights, {**known, **given})

    @classmethod
    def from_hf_folder(cls, folder: str | os.PathLike[str], **fields: Any) -> CLIP:
        """A CLIP from a folder that Hugging Face's CLIPModel.save_pretrained wrote, in evaluation mode.

        `fields` of ClipConfig come before those of config.json. Dropout of attention, which acts in training
        alone, is not taken over. ValueError lists all that a CLIP here has not.
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
