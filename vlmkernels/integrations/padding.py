"""Truncates padding that affects no result: open_clip's CLIP, whose text tower is causal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels._modules import is_exactly, must_be_called
from vlmkernels.integrations._swap import Rule, own, qualified_name

_POOLED_AT_THE_END = ("argmax", "eos")


class _Shorter:
    """A view of a model for shorter texts: tensors over positions are truncated, all else is the model's."""

    def __init__(self, model: OpenClipText, length: int) -> None:
        self._model = model
        self.positional_embedding = model.positional_embedding[:length]
        self.attn_mask = model.attn_mask[:length, :length]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class OpenClipText(Rule):
    """open_clip's CLIP, whose tokenizer pads every text to the full context.

    Each text is pooled at its end token, and no token attends to later ones: the library's own code runs on
    the columns up to the last end token of the batch.
    """

    patch_needs = frozenset({"padding"})
    patch_runs = "texts truncated after the longest of the batch"
    patch_methods = ("encode_text",)

    positional_embedding: Tensor  # [L, D]
    attn_mask: Tensor  # [L, L]
    text_pool_type: str
    text_eos_id: int

    @classmethod
    def patch_matches(cls, module: nn.Module) -> bool:
        return qualified_name(own(module)) == "open_clip.model.CLIP" and is_exactly(module, own(module))

    @classmethod
    def patch_refuses(cls, module: Any) -> str | None:
        encode: Any = own(module).encode_text  # type: ignore[attr-defined]
        reads = encode.__code__.co_names
        if not {"positional_embedding", "attn_mask", "transformer", "text_pool_type"} <= set(reads):
            return "this release of open_clip encodes texts differently"
        if module.text_pool_type not in _POOLED_AT_THE_END:
            return f"its texts are not pooled at their end, but by {module.text_pool_type!r}"
        mask = module.attn_mask
        if mask is not None and mask.is_meta:
            return "whether its text tower is causal cannot be read on the meta device"
        if mask is None or not torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1)):
            return "its text tower is not causal"
        return None

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:  # [B, L] -> [B, E]
        model: Any = self
        readable = type(text) is Tensor and text.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and text.numel() and self._has_no_hooks():
            ends = text.eq(self.text_eos_id).int() if self.text_pool_type == "eos" else text
            length = int(ends.argmax(dim=-1).max()) + 1
            text, model = text[:, :length], _Shorter(self, length)
        return own(self).encode_text(model, text, normalize)  # type: ignore[attr-defined]

    def _has_no_hooks(self) -> bool:
        """Whether no module of the text tower has hooks, which would get the truncated tokens."""
        parts: Any = (self.token_embedding, self.transformer, self.ln_final)
        return not any(must_be_called(module) for part in parts for module in part.modules())


PADDING: tuple[type[Rule], ...] = (OpenClipText,)
