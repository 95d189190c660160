"""A language model of captions without their images, which Flamingo keeps frozen."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmkernels.data import CaptionTokenizer
from vlmkernels.models import decoder
from vlmkernels.models.parts.generation import generate

from ._captioning import RowKind


class LanguageModel(RowKind):
    name = "lm"
    model = decoder.CausalLM
    configs = decoder.CONFIGS
    layout = "text"
    sees_images = False

    def token_ids(self, tokenizer: CaptionTokenizer) -> dict[str, int]:
        return {"vocab_size": tokenizer.vocab_size}

    def caption_loss(
        self, model: Any, tokenizer: CaptionTokenizer, batch: dict[str, Any], *, with_logits: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        tokens = batch["tokens"]
        labels = self.labels(tokenizer, tokens)
        mask = self.attention_mask(tokenizer, tokens)
        output = model(tokens, mask, labels=labels, return_logits=with_logits)
        return output.loss, output.logits, labels

    def generate(
        self, model: Any, tokenizer: CaptionTokenizer, images: Any, prompts: Tensor, **decoding: Any
    ) -> Tensor:
        out = model(prompts, use_cache=True, logits_to_keep=1)
        past = out.past_key_values

        def step(tokens: Tensor) -> Tensor:  # [N] -> [N, V]
            return model(tokens[:, None], past_key_values=past, use_cache=True).logits[:, -1]

        end = tokenizer.endofchunk_id
        return generate(out.logits[:, -1], step, past.reorder_cache, eos_token_id=end, **decoding)
