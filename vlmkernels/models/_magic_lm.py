"""Texts of which a language model reads k alternatives of the next token, one of them to be kept.

The keys and values of the tokens before are those of all k. A model that cannot read them so gets k copies.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels._modules import must_be_called
from vlmkernels.models.parts.generation import Decoding, LanguageModelCall, StepOutput
from vlmkernels.models.parts.plain_head import plain_head


class Texts(abc.ABC):
    """B texts being written: `read` the prompts, then for each token `alternatives` and `choose`."""

    def __init__(self, language_model: Any) -> None:
        self.language_model = language_model
        self.mask: Tensor | None = None  # [B, T], 0 at padding

    @abc.abstractmethod
    def read(
        self,
        tokens: Tensor,  # [B, T]
        mask: Tensor | None,  # [B, T], 0 at padding on the left
    ) -> StepOutput:
        """Logits of the next token, [B, V], and hidden states after the final norm, [B, T, D]."""

    @abc.abstractmethod
    def alternatives(
        self,
        tokens: Tensor,  # [B, k]
    ) -> Tensor:  # [B, k, D]
        """Hidden states of the next token, were it each of these."""

    @abc.abstractmethod
    def choose(
        self,
        index: Tensor,  # [B]
    ) -> Tensor:  # [B, V]
        """The token of this index joins each text; logits of the token after it."""

    @abc.abstractmethod
    def select(
        self,
        rows: Tensor,  # [M]
    ) -> None:
        """The texts become these ones."""

    def lengthen(self) -> None:
        if self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)


class CausalLMTexts(Texts):
    """Those of a `CausalLM`."""

    def read(self, tokens: Tensor, mask: Tensor | None) -> StepOutput:
        self.mask = mask
        out = self.language_model(
            tokens, mask, use_cache=True, output_hidden_states=True, return_logits=False
        )
        self.past = out.past_key_values
        return StepOutput(self.language_model.head(out.hidden_states[-1][:, -1]), out.hidden_states[-1])

    def alternatives(self, tokens: Tensor) -> Tensor:
        self.hidden = self.language_model.alternatives(tokens, self.past, self.mask)
        return self.hidden

    def choose(self, index: Tensor) -> Tensor:
        self.past.choose(index)
        self.lengthen()
        return self.language_model.head(take(self.hidden, index))

    def select(self, rows: Tensor) -> None:
        self.past.reorder_cache(rows)
        self.mask = None if self.mask is None else self.mask[rows]


class MaskedTexts(Texts):
    """Those of a model of transformers with a plain head: the alternatives are tokens of one row, and a mask
    hides them from one another."""

    def read(self, tokens: Tensor, mask: Tensor | None) -> StepOutput:
        self.mask = torch.ones_like(tokens) if mask is None else mask
        self.call = LanguageModelCall(self.language_model.base_model)
        arguments = self.call.arguments(tokens, self.mask)
        out = self.language_model.base_model(**arguments, use_cache=True)
        self.past = out.past_key_values
        return StepOutput(self.head(out.last_hidden_state[:, -1]), out.last_hidden_state)

    def head(self, hidden: Tensor) -> Tensor:
        return self.language_model.get_output_embeddings()(hidden)

    def alternatives(self, tokens: Tensor) -> Tensor:
        assert self.mask is not None, "made by read"
        (batch, k), dtype = tokens.shape, self.language_model.dtype
        itself = torch.eye(k, dtype=torch.bool, device=tokens.device).expand(batch, k, k)
        visible = torch.cat([self.mask.bool()[:, None].expand(-1, k, -1), itself], 2)  # [B, k, T + k]
        mask = torch.zeros(visible.shape, dtype=dtype, device=tokens.device)
        mask = mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
        positions = self.mask.sum(1, keepdim=True).expand_as(tokens)
        self.hidden = self.language_model.base_model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.past,
            use_cache=True,
        ).last_hidden_state
        return self.hidden

    def choose(self, index: Tensor) -> Tensor:
        assert self.mask is not None, "made by read"
        length = self.mask.shape[1]
        kept = torch.arange(length + 1, device=index.device).repeat(len(index), 1)
        kept[:, -1] += index
        for layer in self.past.layers:
            for name in ("keys", "values"):
                setattr(layer, name, getattr(layer, name).take_along_dim(kept[:, None, :, None], 2))
        self.lengthen()
        return self.head(take(self.hidden, index))

    def select(self, rows: Tensor) -> None:
        assert self.mask is not None, "made by read"
        self.past.reorder_cache(rows)
        self.mask = self.mask[rows]


class CopiedTexts(Texts):
    """Those of any model with a cache that can be reordered: every alternative is a row with its own copy."""

    def read(self, tokens: Tensor, mask: Tensor | None) -> StepOutput:
        self.decoding = Decoding(self.language_model)
        out = self.decoding.read(tokens, mask, return_hidden=True)
        if not hasattr(self.decoding.past, "reorder_cache"):
            name, cache = type(self.language_model).__name__, type(self.decoding.past).__name__
            raise ValueError(f"language_model: the cache of {name} cannot be reordered, it is a {cache}")
        return out

    def alternatives(self, tokens: Tensor) -> Tensor:
        batch, k = tokens.shape
        rows = torch.arange(batch, device=tokens.device)
        self.decoding.reorder(rows.repeat_interleave(k))
        out = self.decoding.step(tokens.flatten(), return_hidden=True)
        self.logits = out.logits.view(batch, k, -1)
        return out.hidden.view(batch, k, -1)

    def choose(self, index: Tensor) -> Tensor:
        batch, k, _ = self.logits.shape
        self.decoding.reorder(torch.arange(batch, device=index.device) * k + index)
        return take(self.logits, index)

    def select(self, rows: Tensor) -> None:
        self.decoding.reorder(rows)


def take(
    x: Tensor,  # [B, k, D]
    index: Tensor,  # [B]
) -> Tensor:  # [B, D]
    return x.take_along_dim(index[:, None, None], 1)[:, 0]


def texts_of(language_model: nn.Module) -> Texts:
    """The way that shares the keys and values, if the model has one; hooks of a model see its calls."""
    model: Any = language_model
    if hasattr(model, "alternatives") and not must_be_called(model):
        return CausalLMTexts(model)
    if plain_head(model) is not None and can_mask(model):
        return MaskedTexts(model)
    return CopiedTexts(model)


def can_mask(language_model: Any) -> bool:
    """Whether attention takes a mask with a row for each query, at positions that are given."""
    config = language_model.config
    takes_positions = LanguageModelCall(language_model.base_model).takes_positions
    return takes_positions and getattr(config, "_attn_implementation", None) in ("eager", "sdpa")
