"""Interleaved image-text sequences: prompts, labels, the choice of demonstrations (Alayrac et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.models.decoder import IGNORE

MEDIA_TOKEN = "<image>"
END_OF_CHUNK = "<|endofchunk|>"
ZERO_SHOT_TEXTS = 2


def caption_prompt(caption: str | None = None) -> str:
    """``<image>Output:caption<|endofchunk|>``; without a caption, the start that the model continues."""
    return f"{MEDIA_TOKEN}Output:" + ("" if caption is None else f"{caption}{END_OF_CHUNK}")


def vqa_prompt(question: str, answer: str | None = None) -> str:
    """``<image>Question:question Short answer:answer<|endofchunk|>``, or its start without an answer."""
    start = f"{MEDIA_TOKEN}Question:{question} Short answer:"
    return start + ("" if answer is None else f"{answer}{END_OF_CHUNK}")


def few_shot_prompt(
    demonstrations: Sequence[str] | Sequence[tuple[str, str]],
    question: str | None = None,
    *,
    shots: int | None = None,
    separator: str = "",
) -> str:
    """The text of a few-shot query: demonstrations, then the start that the model continues.

    Demonstrations are captions, or (question, answer) pairs with a `question`. The first `shots` of them are
    used, by default all, each with its image; the images of the sequence are those of the demonstrations in
    order, then the query's. With ``shots=0`` the first two are used as text only, without ``<image>``, to
    show the form of an answer: the zero-shot setting of Flamingo, whose sequence has one image. The templates
    are those of open_flamingo's evaluation, which also puts a line break between them (``separator="\\n"``).
    ValueError for too few demonstrations, or of the other kind.
    """
    needed = len(demonstrations) if shots is None else (shots or ZERO_SHOT_TEXTS)
    wanted = "captions (str)" if question is None else "(question, answer) pairs"
    faults = []
    if isinstance(demonstrations, str):
        faults.append(f"demonstrations must be a sequence of {wanted}, got one str")
    elif any(isinstance(each, str) == (question is not None) for each in demonstrations):
        asked = "without" if question is None else "with"
        faults.append(f"demonstrations must be {wanted} {asked} a question")
    if shots is not None and shots < 0:
        faults.append(f"shots must be at least 0, got {shots}")
    elif needed > len(demonstrations):
        faults.append(
            f"demonstrations must be at least {needed} for {shots} shots, got {len(demonstrations)}"
        )
    if faults:
        raise ValueError("few_shot_prompt: " + "; ".join(faults))
    shown = [
        caption_prompt(each) if isinstance(each, str) else vqa_prompt(*each)
        for each in demonstrations[:needed]
    ]
    if shots == 0:
        shown = [text.removeprefix(MEDIA_TOKEN) for text in shown]
    query = caption_prompt() if question is None else vqa_prompt(question)
    return separator.join([*shown, query])


def media_labels(
    tokens: Tensor,  # [B, T] int64
    *,
    media_token_id: int,
    endofchunk_token_id: int,
    attention_mask: Tensor | None = None,  # [B, T], 0 at padding
    pad_token_id: int | None = None,
    interleaved: bool = True,
) -> Tensor:
    """Labels [B, T] for `Flamingo`: the tokens, -100 where they are excluded from the loss.

    Excluded are padding (where `attention_mask` is 0, or the token is `pad_token_id`) and ``<image>``. With
    `interleaved`, the rule for documents with several images, also text before the first ``<image>`` and text
    after an ``<|endofchunk|>`` up to the next ``<image>``; without, the rule for single captions. The model
    shifts the labels itself.
    """
    media = tokens == media_token_id
    ignored = media.clone()
    if attention_mask is not None:
        ignored |= ~attention_mask.bool()
    if pad_token_id is not None:
        ignored |= tokens == pad_token_id
    if interleaved:
        position = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        last_media = (position * media).cummax(1).values  # 0: none so far
        last_end = (position * (tokens == endofchunk_token_id)).cummax(1).values
        ended_before = F.pad(last_end, (1, -1))  # an <|endofchunk|> itself is learnt
        ignored |= last_media <= ended_before
    return tokens.masked_fill(ignored, IGNORE)


@torch.no_grad()
def rices(
    query: Tensor,  # [Q, D]
    support: Tensor,  # [N, D]
    shots: int,
    *,
    exclude: Tensor | None = None,  # [Q] int64
    chunk: int = 256,
) -> Tensor:
    """Indices [Q, shots] of the support images most like each query image, the most similar last.

    Retrieval-based In-Context Example Selection (Yang et al. 2022; Alayrac et al. 2022, section 3.4): the
    cosine of frozen features, such as CLIP's image embeddings. Ties go to the lower index. ``exclude[i]`` is
    a support image excluded for query i, such as itself; -1 for none. `chunk` queries are compared at
    once. ValueError for other shapes, or fewer support images than shots.
    """
    faults = []
    if query.ndim != 2 or support.ndim != 2 or query.shape[-1] != support.shape[-1]:
        shapes = f"{list(query.shape)} and {list(support.shape)}"
        faults.append(f"query and support must be [Q, D] and [N, D], got {shapes}")
    elif not 0 <= shots <= len(support) - (exclude is not None):
        faults.append(
            f"shots must be in [0, {len(support)}], the support images without excluded ones, got {shots}"
        )
    if exclude is not None and exclude.shape != query.shape[:1]:
        faults.append(f"exclude must be [{len(query)}], got {list(exclude.shape)}")
    if faults:
        raise ValueError("rices: " + "; ".join(faults))
    support = F.normalize(support.float(), dim=-1)
    found = []
    for first in range(0, len(query), chunk):
        similarity = F.normalize(query[first : first + chunk].float(), dim=-1) @ support.T  # [c, N]
        if exclude is not None:
            barred = exclude[first : first + chunk, None]
            similarity.masked_fill_(barred == torch.arange(len(support), device=support.device), -torch.inf)
        order = similarity.sort(dim=1, descending=True, stable=True).indices
        found.append(order[:, :shots].flip(1))
    return torch.cat(found) if found else torch.empty((0, shots), dtype=torch.int64, device=query.device)
