"""Scores of a model that judges texts of images and predicts their masked words, with controls.

The controls replace the image by another one, or leave it out: what a score owes to the image is what it
loses there.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlmkernels.data import Sample, mask_tokens, pair_tokens
from vlmkernels.data.samples import sample_rng, stacked
from vlmkernels.train import kinds

from .bundle import check_batch_size, inference
from .images import readable
from .scores import Scores

PICTURES = ("own", "another", "none")  # the image that is shown with a text


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """NaN without values; without a second one the error is NaN."""
        x = torch.tensor(values, dtype=torch.float64)
        error = x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan
        return cls(x.mean().item(), error)

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


@dataclasses.dataclass(frozen=True)
class MatchScores(Scores):
    """``match``: for each of ``PICTURES`` but "none", ``accuracy``, the fraction of right judgements over one
    text of the own image and one of another for each of ``judged`` samples, and ``ranking``, that in which
    the own text has the higher odds (ties count half); chance is 0.5 for both.

    ``perplexity`` of the ``words`` masked in the own texts, by picture; ``gain``: how much lower the negative
    log-likelihood of a word is with the own image than with another, and with none, paired.
    """

    judged: int
    match: dict[str, dict[str, Mean]]
    words: int
    perplexity: dict[str, float]
    gain: dict[str, Mean]

    def __str__(self) -> str:
        lines = [self.counted()]
        for picture, scores in self.match.items():
            found = ", ".join(f"{name} {score}" for name, score in scores.items())
            lines.append(
                f"right and wrong texts with {picture} image: {found} ({self.judged} pairs, chance 0.5)"
            )
        shown = ", ".join(f"{picture} image {value:.3f}" for picture, value in self.perplexity.items())
        lines.append(f"perplexity of {self.words} masked words: {shown}")
        gains = ", ".join(f"{picture} {score}" for picture, score in self.gain.items())
        lines.append(f"nats a word that the own image saves against: {gains}")
        return "\n".join(lines)


def evaluate_matching(
    model: nn.Module,
    tokenizer: Any,
    transform: Any,
    dataset: Any,
    *,
    batch_size: int = 64,
) -> MatchScores:
    """Evaluate a model of a kind that ``matches``; its mode does not change and no random number is drawn.

    Other texts and images are drawn from the same batch by the key of each sample; samples whose batch has no
    two others with different texts are not judged. ValueError when no sample can be read.
    """
    check_batch_size(batch_size)
    kind = kinds.of_model(model)
    skipped: dict[str, str] = {}
    seen = 0
    judgements: dict[str, list[tuple[float, float]]] = {picture: [] for picture in PICTURES[:2]}
    losses: dict[str, list[float]] = {picture: [] for picture in PICTURES}
    samples = readable(dataset, transform, skipped)
    while batch := list(itertools.islice(samples, batch_size)):
        seen += len(batch)
        with inference(model) as device:
            images = stacked([sample["image"] for sample in batch]).to(device)
            regions, mask = kind.pictures(model, images)
            texts = [sample["text"] for sample in batch]
            chosen = [triple for i in range(len(batch)) if (triple := _others(batch, i)) is not None]
            if not chosen:
                continue
            own, other, third = torch.tensor(chosen, device=device).unbind(1)
            for picture, rows in (("own", own), ("another", third)):
                shown = regions[rows], mask[rows]
                right, wrong = (
                    kind.match_odds(model, tokenizer, shown, [texts[i] for i in which.tolist()]).tolist()
                    for which in (own, other)
                )
                judgements[picture] += zip(right, wrong, strict=True)
            rngs = [sample_rng("evaluated", batch[i]["key"], texts[i]) for i in own.tolist()]
            tokens, _ = pair_tokens(tokenizer, [texts[i] for i in own.tolist()], [None] * len(own))
            hidden, labels = mask_tokens(tokens, tokenizer, rngs)
            views = {
                "own": (regions[own], mask[own]),
                "another": (regions[third], mask[third]),
                "none": (regions[own], torch.zeros_like(mask[own])),
            }
            for picture, shown in views.items():
                losses[picture] += kind.masked_losses(model, tokenizer, shown, hidden, labels).tolist()
    skipped |= getattr(dataset, "skipped", None) or {}
    if not seen:
        raise ValueError(f"data: no sample can be read, {len(skipped)} skipped")
    if not losses["own"]:
        raise ValueError("data: no batch has three samples with different texts, or none has a masked word")
    return MatchScores(
        samples=seen,
        skipped=skipped,
        judged=len(judgements["own"]),
        match={picture: _judged(odds) for picture, odds in judgements.items()},
        words=len(losses["own"]),
        perplexity={picture: math.exp(min(sum(each) / len(each), 700.0)) for picture, each in losses.items()},
        gain={
            picture: Mean.of([b - a for a, b in zip(losses["own"], losses[picture], strict=True)])
            for picture in PICTURES[1:]
        },
    )


def _others(batch: Sequence[Sample], i: int) -> tuple[int, int, int] | None:
    """A sample, another one with another text and image, and a third one that differs from both."""
    rng, chosen = sample_rng("others", batch[i]["key"], batch[i]["text"]), [i]
    for _ in range(2):
        known = {batch[j]["key"] for j in chosen}, {batch[j]["text"] for j in chosen}
        left = [j for j, s in enumerate(batch) if s["key"] not in known[0] and s["text"] not in known[1]]
        if not left:
            return None
        chosen.append(rng.choice(left))
    return chosen[0], chosen[1], chosen[2]


def _judged(odds: Sequence[tuple[float, float]]) -> dict[str, Mean]:
    """Of the log-odds of the right and of the wrong text of each sample."""
    return {
        "accuracy": Mean.of([((right > 0) + (wrong <= 0)) / 2 for right, wrong in odds]),
        "ranking": Mean.of([((right > wrong) + (right >= wrong)) / 2 for right, wrong in odds]),
    }
