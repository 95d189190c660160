"""The linear layer at the end of a language model of transformers (which is not imported)."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmkernels._modules import can_be_fused, must_be_called

# Those of transformers whose logits are ``head(base_model(...))``: no scale, no soft-capping after the head.
PLAIN_HEADS = (
    "GPT2LMHeadModel",
    "GPTJForCausalLM",
    "GPTNeoXForCausalLM",
    "LlamaForCausalLM",
    "MptForCausalLM",
    "OPTForCausalLM",
)


def plain_head(language_model: Any) -> nn.Linear | None:
    """The linear layer whose result is the logits, if its weights may be used without calling the model."""
    cls = type(language_model)
    if not cls.__module__.startswith("transformers.") or cls.__name__ not in PLAIN_HEADS:
        return None
    head = language_model.get_output_embeddings()
    return None if must_be_called(language_model) or not can_be_fused(head, nn.Linear) else head
