"""SimVLM (Wang et al. 2022): the rest of a caption is predicted from the image and a prefix of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmkernels.data import CaptionTokenizer
from vlmkernels.data.samples import sample_rng
from vlmkernels.models import simvlm
from vlmkernels.models.decoder import IGNORE

from ._captioning import CaptionKind


class SimVLM(CaptionKind):
    """Rows of start, caption, end. The loss counts the tokens after the prefix.

    In training the length of the prefix is drawn in every step, from the seed, the step and the sample's key;
    in an evaluation the prefix is the start token.
    """

    name = "simvlm"
    model = simvlm.SimVLM
    configs = simvlm.CONFIGS
    layout = "prefix"
    captions = True

    def token_ids(self, tokenizer: CaptionTokenizer) -> dict[str, int]:
        return {**super().token_ids(tokenizer), "bos_id": tokenizer.sot_id, "eos_id": tokenizer.eot_id}

    def with_draws(
        self, batch: dict[str, Any], tokenizer: CaptionTokenizer, seed: int, step: int
    ) -> dict[str, Any]:
        lengths = tokenizer.lengths(batch["tokens"]).tolist()
        return {**batch, "prefixes": prefix_lengths(seed, step, batch["keys"], lengths)}

    def caption_loss(
        self, model: Any, tokenizer: CaptionTokenizer, batch: dict[str, Any], *, with_logits: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        tokens, prefixes = batch["tokens"], batch.get("prefixes")  # [B, L], [B]
        prefixes = tokens.new_ones(len(tokens)) if prefixes is None else prefixes.to(tokens.device)
        output = model(batch["images"], tokens, prefixes, return_logits=with_logits)
        return output["loss"], output.get("logits"), prefix_labels(tokenizer, tokens, prefixes)

    def first_token(self, tokenizer: CaptionTokenizer) -> int:
        return tokenizer.sot_id

    def generate(
        self, model: Any, tokenizer: CaptionTokenizer, images: Any, prompts: Tensor, **decoding: Any
    ) -> Tensor:
        return model.generate(images, prompts, **decoding)


def prefix_labels(
    tokenizer: CaptionTokenizer,
    tokens: Tensor,  # [B, L]
    prefixes: Tensor,  # [B]
) -> Tensor:
    """Labels [B, L] of start, caption, end: the tokens after each row's prefix, its end among them."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    counted = (place >= prefixes[:, None]) & (place < tokenizer.lengths(tokens)[:, None])
    return tokens.masked_fill(~counted, IGNORE)


def prefix_lengths(seed: int, step: int, keys: list[str], lengths: list[int]) -> Tensor:
    """int64 [B]: uniform over 1 (the start token only) to n - 1 of n tokens, for each sample."""
    drawn = [
        sample_rng(seed, "prefix", step, key).randint(1, length - 1)
        for key, length in zip(keys, lengths, strict=True)
    ]
    return torch.tensor(drawn, dtype=torch.int64)
