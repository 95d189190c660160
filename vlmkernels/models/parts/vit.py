"""The vision transformer of CLIP: images to embeddings, or to the tokens of their patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmkernels import intervals
from vlmkernels.models.parts.transformer import LayerNorm, Transformer


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
        """The embeddings, or with `patches` the result of `patch_tokens`."""
        if patches:
            tokens = self._tokens(images)[:, 1:]
            return self.ln_post(tokens) if normalize else tokens
        if self.pool == "mean":
            pooled = self._tokens(images)[:, 1:].mean(1)
        else:
            class_token = torch.zeros(images.shape[0], 1, dtype=torch.int64, device=images.device)
            pooled = self._tokens(images, class_token)[:, 0]
        return self.ln_post(pooled) @ self.proj
