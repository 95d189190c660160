"""Scores of a model's captions: perplexity, BLEU and CIDEr, and on scenes the fraction of right slots."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from vlmkernels.data import CaptionCollate, CaptionTokenizer, Sample, slot_accuracy
from vlmkernels.data._text import printable
from vlmkernels.data.samples import stacked
from vlmkernels.models.decoder import IGNORE
from vlmkernels.train import kinds

from .bundle import check_batch_size, inference
from .caption import write_captions
from .images import readable
from .scores import Scores

_WORD = re.compile(r"\w+(?:'\w+)?")


def plain_tokens(text: str) -> str:
    """Lower case, words only, single spaces: the form that BLEU and CIDEr compare.

    The COCO evaluation splits with the Penn Treebank tokenizer (in Java) and drops punctuation as well; on
    captions without clitics and hyphens the words are the same.
    """
    return " ".join(_WORD.findall(text.lower()))


def reference_scores(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """BLEU-1 to BLEU-4 and CIDEr of one caption for each key against its references (``pycocoevalcap``).

    CIDEr weighs n-grams by their rarity among these references: it is 0 for a single image.
    ModuleNotFoundError without the package, ValueError for different keys or a key without reference.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    if captions.keys() != references.keys() or not captions:
        raise ValueError(
            f"captions and references must have the same keys, got {len(captions)} and {len(references)}"
        )
    empty = [key for key, texts in references.items() if not texts]
    if empty:
        raise ValueError(f"references must have a text for every key, got none for {', '.join(empty[:5])}")
    found = {key: [plain_tokens(text)] for key, text in captions.items()}
    wanted = {key: [plain_tokens(text) for text in texts] for key, texts in references.items()}
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    cider, _ = Cider().compute_score(wanted, found)
    return {**{f"BLEU-{n}": float(value) for n, value in enumerate(bleu, 1)}, "CIDEr": float(cider)}


@dataclasses.dataclass(frozen=True)
class CaptionScores(Scores):
    """``perplexity`` and ``token_accuracy`` over all counted tokens of all captions (``tokens``; the end of a
    caption is one), ``reference_scores`` of the generated captions (None without the package pycocoevalcap),
    on scenes ``slots`` (see ``vlmkernels.data.slot_accuracy``), and ``captions``: key, caption and references
    of each image.
    """

    tokens: int
    perplexity: float
    token_accuracy: float
    reference_scores: dict[str, float] | None
    slots: dict[str, float] | None
    captions: list[dict[str, Any]]

    def __str__(self) -> str:
        """The numbers, and three of the captions."""
        accuracy = f"token accuracy {self.token_accuracy:.4f} ({self.tokens} tokens)"
        lines = [self.counted(), f"perplexity {self.perplexity:.3f}, {accuracy}"]
        for title, found in (("references", self.reference_scores), ("slots exactly right", self.slots)):
            if found:
                lines.append(f"{title}: " + ", ".join(f"{k} {value:.4f}" for k, value in found.items()))
        if self.reference_scores is None:
            lines.append("references: BLEU and CIDEr need pip install pycocoevalcap")
        for each in self.captions[:3]:
            lines.append(printable(f"{each['key']}: {each['caption']} ({each['references'][0]})"))
        return "\n".join(lines)


def evaluate_captions(
    model: nn.Module,
    tokenizer: CaptionTokenizer,
    transform: Any,
    dataset: Any,
    *,
    batch_size: int = 64,
    **decoding: Any,
) -> CaptionScores:
    """Evaluate a Flamingo, a SimVLM or a language model, which gets only the texts.

    ``dataset`` yields samples (see ``vlmkernels.data.Sample``) with PIL images, to which ``transform`` is
    applied, or tensors. ``decoding`` are options of ``write_captions``; greedy without. Samples with the same
    key are captions of the same image. ValueError when no sample can be read.
    """
    check_batch_size(batch_size)
    kind = kinds.of_model(model)
    collate = CaptionCollate(tokenizer, kind.layout)
    nll, hits, counted, seen = 0.0, 0, 0, 0
    captions: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    samples = readable(dataset, transform if kind.sees_images else None, skipped)
    while batch := list(itertools.islice(samples, batch_size)):
        if isinstance(dataset, IterableDataset):  # shards may count their keys from zero each
            batch = [Sample(**{**s, "key": f"{seen + i}"}) for i, s in enumerate(batch)]  # type: ignore[typeddict-item]
        seen += len(batch)
        with inference(model) as device:
            loss, right, number = _score(kind, model, tokenizer, collate(batch), device)
        nll, hits, counted = nll + loss * number, hits + right, counted + number
        new = list({sample["key"]: sample for sample in batch if sample["key"] not in captions}.values())
        if new:
            images = stacked([each["image"] for each in new]) if kind.sees_images else len(new)
            texts = write_captions(model, tokenizer, images, **decoding)
            captions.update(zip((sample["key"] for sample in new), texts, strict=True))
        for sample in batch:
            references.setdefault(sample["key"], []).append(sample["text"])
    skipped |= getattr(dataset, "skipped", None) or {}
    if not seen:
        raise ValueError(f"data: no sample can be read, {len(skipped)} skipped")
    try:
        scores = reference_scores(captions, references)
    except ModuleNotFoundError:
        scores = None
    return CaptionScores(
        samples=seen,
        skipped=skipped,
        tokens=counted,
        perplexity=math.exp(min(nll / counted, 700.0)),
        token_accuracy=hits / counted,
        reference_scores=scores,
        slots=slot_accuracy(list(captions.values()), [texts[0] for texts in references.values()])
        if hasattr(dataset, "scene")
        else None,
        captions=[
            {"key": key, "caption": text, "references": references[key]} for key, text in captions.items()
        ],
    )


def _score(
    kind: Any, model: nn.Module, tokenizer: CaptionTokenizer, batch: dict[str, Any], device: torch.device
) -> tuple[float, int, int]:
    """Mean loss, correctly predicted tokens and number of tokens of a batch."""
    placed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    loss, logits, labels = kind.caption_loss(model, tokenizer, placed, with_logits=True)
    assert logits is not None, "requested"
    targets = labels[:, 1:]
    right = (logits[:, :-1].argmax(dim=-1) == targets).sum()
    return loss.item(), int(right), int((targets != IGNORE).sum())
