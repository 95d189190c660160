"""A frozen causal language model with gated cross-attention before some of its layers.

The model is any module called like a decoder of transformers (which is not imported): `input_ids`,
`attention_mask`, `past_key_values`, `use_cache` in, an object with `logits` and `past_key_values` out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.intervals import Intervals
from vlmkernels.models.parts.generation import LanguageModelCall
from vlmkernels.models.parts.plain_head import plain_head
from vlmkernels.models.parts.token_loss import loss_of_logits, next_token_loss
from vlmkernels.nn.cross_attention import GatedCrossAttentionBlock
from vlmkernels.nn.media_cache import MediaCache

# The layers of OPT, GPT-NeoX, Llama and its relatives, GPT-2, GPT-J and `CausalLM`, MPT.
LAYERS = (
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "transformer.h",
    "transformer.blocks",
    "layers",
)
GATED = "gated_cross_attn_layer"
_PREFIX = "lang_encoder."
_DUPLICATES = {f"{_PREFIX}gated_cross_attn_layers.": GATED, f"{_PREFIX}old_decoder_blocks.": "decoder_layer"}


class MediaCondition:
    """What the gated layers attend to during one call of the language model; empty outside a call."""

    def __init__(self) -> None:
        self.media: Tensor | None = None  # [B, M, n, Dv]
        self.intervals: Intervals | None = None  # each [B, T], columns of the M n media tokens
        self.cache: MediaCache | None = None  # contains both of the above, for decoding

    @property
    def empty(self) -> bool:
        return self.media is None and self.cache is None


class FlamingoLayer(nn.Module):
    """A decoder layer, and before it a gated cross-attention block if it has one and there are media."""

    def __init__(
        self, block: GatedCrossAttentionBlock | None, decoder_layer: nn.Module, condition: MediaCondition
    ) -> None:
        super().__init__()
        self.gated_cross_attn_layer = block
        self.decoder_layer = decoder_layer
        self.condition = condition

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        block, condition = self.gated_cross_attn_layer, self.condition
        if block is not None and condition.cache is not None:
            x = block(x, cache=condition.cache)
        elif block is not None and condition.media is not None:
            x = block(x, condition.media, intervals=condition.intervals)
        return self.decoder_layer(x, *args, **kwargs)


def decoder_layers(language_model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers. ValueError when no known path leads to an nn.ModuleList."""
    for path in LAYERS:
        found: Any = language_model
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return path, found
    raise ValueError(
        f"lang_encoder: {type(language_model).__name__} has no layers under any of {', '.join(LAYERS)}"
    )


def language_width(language_model: nn.Module) -> int:
    """Width D of the layers, from the model's config."""
    config = getattr(language_model, "config", None)
    for name in ("hidden_size", "d_model", "width"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    raise ValueError(
        f"lang_encoder: the config of {type(language_model).__name__} has no hidden_size, d_model or width"
    )


def input_embeddings(language_model: nn.Module) -> nn.Embedding:
    """The token embedding, with its weight [V, D]."""
    try:
        embedding: Any = language_model.get_input_embeddings()  # type: ignore[operator]
        embedding.weight  # noqa: B018
        return embedding
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(f"lang_encoder: {type(language_model).__name__} has no input embeddings") from error


def insert_blocks(
    language_model: nn.Module, blocks: Sequence[GatedCrossAttentionBlock | None], condition: MediaCondition
) -> None:
    """Wraps each decoder layer, in place, into a `FlamingoLayer` with its block."""
    path, layers = decoder_layers(language_model)
    wrapped = nn.ModuleList(
        FlamingoLayer(block, layer, condition) for block, layer in zip(blocks, layers, strict=True)
    )
    parent, _, name = path.rpartition(".")
    setattr(language_model.get_submodule(parent), name, wrapped)


def predict(
    language_model: Any,
    call: LanguageModelCall,
    tokens: Tensor,  # [B, T]
    attention_mask: Tensor | None,  # [B, T]
    labels: Tensor | None,  # [B, T] int64
    return_logits: bool,
) -> dict[str, Tensor]:
    """What `Flamingo.forward` returns; the loss is computed from hidden states if the head is known."""
    arguments = call.arguments(tokens, attention_mask)
    if labels is None:
        return {"logits": language_model(**arguments).logits}
    if call.takes_return_logits:
        out = language_model(**arguments, labels=labels, return_logits=return_logits)
        logits, loss = out.logits, out.loss
    elif (head := plain_head(language_model)) is not None:
        hidden = language_model.base_model(**arguments).last_hidden_state
        logits = head(hidden) if return_logits else None
        loss = next_token_loss(hidden, head.weight, labels, head.bias)
    else:
        logits = language_model(**arguments).logits
        loss = loss_of_logits(logits, labels)
    return {"logits": logits, "loss": loss} if return_logits else {"loss": loss}


class TrainedRows:
    """A forward pre-hook of an embedding that keeps the gradient of its weight 0 outside `rows`.

    A hook of the module, since tensor hooks are lost when the weight becomes another tensor: assigned by
    `load_state_dict`, copied, moved off the meta device, or gathered from its shards.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = list(rows)

    def __call__(self, embedding: Any, inputs: Any = None) -> None:
        if torch.compiler.is_compiling():
            return
        weight = embedding.weight
        known = (weight._backward_hooks or {}).values()
        if weight.requires_grad and not any(getattr(hook, "func", None) is _keep_rows for hook in known):
            weight.register_hook(functools.partial(_keep_rows, self.rows))

    @classmethod
    def of(cls, embedding: nn.Module, rows: Sequence[int]) -> None:
        """Registers the hook for this embedding, whose weight may belong to compiled code."""
        known = [hook for hook in embedding._forward_pre_hooks.values() if isinstance(hook, cls)]
        if not known:
            known = [cls(rows)]
            embedding.register_forward_pre_hook(known[0])
        known[0](embedding)


def _keep_rows(rows: list[int], gradient: Tensor) -> Tensor:  # [V, D]
    kept = torch.zeros_like(gradient)
    kept[rows] = gradient[rows]
    return kept


def without_duplicates(state_dict: Mapping[str, Tensor], layers: str) -> dict[str, Tensor]:
    """open_flamingo's names, which have each layer up to three times, as one name for each tensor.

    `layers` is the path of the decoder layers.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        for prefix, part in _DUPLICATES.items():
            if name.startswith(prefix):
                index, _, rest = name.removeprefix(prefix).partition(".")
                result.setdefault(f"{_PREFIX}{layers}.{index}.{part}.{rest}", tensor)
                break
        else:
            result[name] = tensor
    return result
