"""The inputs of a VisualBERT, tokens and regions with masks, types and positions: checks and embeddings."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels._modules import is_traced
from vlmkernels.models.parts.bert import Embeddings
from vlmkernels.nn.dense import Linear

OF_TEXT = ("attention_mask", "token_types", "positions")
OF_REGIONS = ("region_mask", "region_types")
INTEGERS = (torch.int64, torch.int32)
MASKS = ("attention_mask", "region_mask")


@dataclass(frozen=True)
class Inputs:
    """A batch of B texts and the regions of their images."""

    tokens: Tensor  # [B, L]
    regions: Tensor | None = None  # [B, V, E]
    attention_mask: Tensor | None = None  # [B, L]
    region_mask: Tensor | None = None  # [B, V]
    token_types: Tensor | None = None  # [B, L]
    region_types: Tensor | None = None  # [B, V]
    positions: Tensor | None = None  # [B, L]
    alignment: Tensor | None = None  # [B, V, A]

    def flattened(self) -> Inputs:
        """Inputs [B, C, ...] of C texts for each image as rows [B C, ...].

        What the regions have once, [B, ...], serves all texts of an image.
        """
        choices = self.tokens.shape[1]
        flat: dict[str, Tensor] = {}
        for name in (field.name for field in fields(self)):
            x = getattr(self, name)
            if x is None:
                continue
            if name not in ("tokens", *OF_TEXT) and x.dim() == (2 if name in OF_REGIONS else 3):
                x = x[:, None].expand(-1, choices, *x.shape[1:])
            flat[name] = x.flatten(0, 1) if x.dim() > 1 else x
        return Inputs(**flat)

    def mask(self) -> Tensor:  # [B, L + V] bool
        """Where the joint sequence is valid: everywhere without masks."""
        sizes = [(self.tokens.shape, self.attention_mask)]
        if self.regions is not None:
            sizes.append((self.regions.shape[:2], self.region_mask))
        device = self.tokens.device
        valid = [
            torch.ones(size, dtype=torch.bool, device=device) if mask is None else mask != 0
            for size, mask in sizes
        ]
        return torch.cat(valid, 1)

    def faults(self, visual_dim: int, max_positions: int) -> list[str]:
        """What is wrong with them."""
        tokens, regions, aligned = self.tokens, self.regions, self.alignment
        if tokens.dim() != 2 or tokens.dtype not in INTEGERS:
            return [f"tokens must be integer ids [B, L], got {got(tokens)}"]
        batch, length = tokens.shape
        faults = self._like(OF_TEXT, [batch, length])
        if not 1 <= length <= max_positions:
            faults.append(f"tokens must have 1 to max_positions {max_positions} columns, got {length}")
        if regions is None:
            given = [name for name in (*OF_REGIONS, "alignment") if getattr(self, name) is not None]
            return faults + [f"{name} may only be given with regions" for name in given]
        if regions.dim() != 3 or regions.shape[::2] != (batch, visual_dim) or not regions.is_floating_point():
            return [*faults, f"regions must be floating [B = {batch}, V, {visual_dim}], got {got(regions)}"]
        count = regions.shape[1]
        faults += self._like(OF_REGIONS, [batch, count])
        if aligned is not None and (
            aligned.dtype not in INTEGERS or aligned.dim() != 3 or aligned.shape[:2] != (batch, count)
        ):
            faults.append(f"alignment must be integer [{batch}, {count}, A], got {got(aligned)}")
        return faults

    def _like(self, names: tuple[str, ...], shape: list[int]) -> list[str]:
        """What is wrong with those that have a value for each token, or for each region."""
        faults = []
        for name in names:
            x, number = getattr(self, name), "mask" if name in MASKS else "integer"
            if x is not None and (list(x.shape) != shape or (name not in MASKS and x.dtype not in INTEGERS)):
                faults.append(f"{name} must be {number} {shape}, got {got(x)}")
        return faults


class JointEmbeddings(Embeddings):
    """LN of the text's sums and the regions', one after the other."""

    def __init__(self, config: Any) -> None:
        sizes = config.vocab_size, config.width, config.max_positions, config.token_types
        super().__init__(*sizes, config.pad_id, config.eps)
        self.region_type, self.pad_id = config.region_type, config.pad_id
        # Which would take the gradient of the head from padding's row where the table is sharded.
        self.word_embeddings.padding_idx = None
        self.visual_token_type_embeddings = nn.Embedding(config.token_types, config.width)
        self.visual_position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.visual_projection = Linear(config.region_width, config.width)

    def words(self, tokens: Tensor) -> Tensor:  # [B, L] -> [B, L, D]
        """With no gradient for padding, as in transformers."""
        words = self.word_embeddings(tokens)
        return torch.where((tokens == self.pad_id)[..., None], words.detach(), words)

    def forward(self, inputs: Inputs) -> Tensor:  # type: ignore[override]  # [B, L + V, D]
        text = self.total(inputs.tokens, inputs.positions, inputs.token_types)
        if inputs.regions is None:
            return self.LayerNorm(text)
        types, aligned = inputs.region_types, inputs.alignment
        if types is None:
            types = torch.full((1, 1), self.region_type, device=text.device)
        place = self.visual_position_embeddings(types.new_zeros(1, 1))
        if aligned is not None:
            known = (aligned != -1)[..., None]  # [B, V, A, 1]
            words = self.position_embeddings(aligned.clamp_min(0)) * known
            place = place + words.sum(2) / known.sum(2).clamp_min(1)
        regions = self.visual_projection(inputs.regions) + place + self.visual_token_type_embeddings(types)
        return self.LayerNorm(torch.cat([text, regions.to(text.dtype)], 1))


def label_faults(
    config: Any,
    inputs: Inputs,
    choices: int | None,
    labels: Tensor | None,
    match: Tensor | None,
    phrases: Tensor | None,
) -> list[str]:
    """What is wrong with the other arguments; `choices` is the number of texts of an image, if several."""
    head, (rows, length) = config.head, inputs.tokens.shape
    regions = 0 if inputs.regions is None else inputs.regions.shape[1]
    faults = []
    if head == "vcr" and choices is None:
        faults.append(f"tokens must be integer ids [B, C, L] for the head vcr, got {got(inputs.tokens)}")
    count = 0
    if head == "phrases":
        if phrases is None or phrases.dim() != 2 or len(phrases) != rows or phrases.dtype != torch.int64:
            faults.append(f"phrases must be int64 [B = {rows}, P], got {got(phrases)}")
        else:
            count, last = phrases.shape[1], length + regions - 1
            if count and rows and phrases.device.type == "cpu" and not is_traced():
                low, high = phrases.min().item(), phrases.max().item()
                if low < -1 or high > last:
                    faults.append(f"phrases must be positions up to {last}, or -1, got {low} to {high}")
    elif phrases is not None:
        faults.append(f"phrases may only be given for the head phrases, got {got(phrases)}")
    if match is not None and head != "pretraining":
        faults.append(f"match may only be given for the head pretraining, got {got(match)}")
    elif match is not None and (match.dtype != torch.bool or list(match.shape) != [rows]):
        faults.append(f"match must be bool [B = {rows}], got {got(match)}")
    if labels is None:
        return faults
    shapes = {
        "pretraining": [rows, length],
        "vqa": [rows, config.answers],
        "nlvr2": [rows],
        "vcr": [rows // (choices or 1)],
        "phrases": [rows, count, regions],
    }
    kind = "floating" if head in ("vqa", "phrases") else "int64"
    fits = labels.is_floating_point() if kind == "floating" else labels.dtype == torch.int64
    if head == "none":
        faults.append(f"labels may not be given for the head none, got {got(labels)}")
    elif not fits or list(labels.shape) != shapes[head]:
        faults.append(f"labels must be {kind} {shapes[head]} for the head {head}, got {got(labels)}")
    return faults


def got(x: Tensor | None) -> str:
    if x is None:
        return "None"
    return f"{x.dtype} of shape {list(x.shape)}"
