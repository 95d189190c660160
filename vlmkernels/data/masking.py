"""Texts for a masked language model of word pieces: pairs of texts in one row, and masked tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from vlmkernels.data.tokenizer import WordPieceTokenizer

IGNORE = -100
RATE = 0.15


def pair_tokens(
    tokenizer: WordPieceTokenizer, texts: Sequence[str], seconds: Sequence[str | None]
) -> tuple[Tensor, Tensor]:
    """Rows [CLS] text [SEP] or [CLS] text [SEP] second [SEP], and the type of each token, int64 [B, L] each.

    The type is 1 in the second text and its [SEP]. L is that of the longest row, 2 without rows. Of two texts
    that are too long for the tokenizer's `context_length` the longer one is cut first.
    """
    rows: list[list[int]] = []
    starts: list[int] = []
    for text, second in zip(texts, seconds, strict=True):
        first, other = tokenizer.encode(text), [] if second is None else tokenizer.encode(second)
        room = tokenizer.context_length - (2 if second is None else 3)
        while len(first) + len(other) > room:
            (first if len(first) >= len(other) else other).pop()
        row = [tokenizer.cls_id, *first, tokenizer.sep_id]
        starts.append(len(row))
        rows.append(row if second is None else [*row, *other, tokenizer.sep_id])
    longest = max(map(len, rows), default=2)
    tokens = torch.full((len(rows), longest), tokenizer.pad_id, dtype=torch.int64)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = torch.tensor(row)
    in_second = torch.arange(longest) >= torch.tensor(starts, dtype=torch.int64)[:, None]
    return tokens, (in_second & (tokens != tokenizer.pad_id)).long()


def mask_tokens(
    tokens: Tensor,  # [B, L]
    tokenizer: WordPieceTokenizer,
    generators: Sequence[random.Random],
    rate: float = RATE,
) -> tuple[Tensor, Tensor]:  # [B, L] each
    """Tokens with some of them hidden, and the labels: the ids of those, -100 elsewhere (Devlin et al. 2018).

    Each word piece is chosen with probability `rate`, never [CLS], [SEP] or padding. Of the chosen 80 %
    become [MASK], 10 % another piece drawn at random, 10 % stay. `generators` has one for each row.
    """
    fixed = {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id}
    special = fixed | {tokenizer.mask_id, tokenizer.unk_id}
    rows, labels = tokens.tolist(), torch.full_like(tokens, IGNORE)
    for i, (row, rng) in enumerate(zip(rows, generators, strict=True)):
        for j, token in enumerate(row):
            if token in fixed or rng.random() >= rate:
                continue
            labels[i, j] = token
            way = rng.random()
            if way < 0.8:
                row[j] = tokenizer.mask_id
            elif way < 0.9:
                while (drawn := rng.randrange(tokenizer.vocab_size)) in special:
                    pass
                row[j] = drawn
    return torch.tensor(rows, dtype=tokens.dtype).view_as(tokens), labels
