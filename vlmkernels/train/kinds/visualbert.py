"""VisualBERT (Li et al. 2019): masked words and whether a caption is the image's, from words and regions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.data import Collate, WordPieceTokenizer, mask_tokens, pair_tokens
from vlmkernels.data.masking import IGNORE, RATE
from vlmkernels.data.samples import sample_rng
from vlmkernels.models import visualbert
from vlmkernels.models.parts.pretrained import Pretrained
from vlmkernels.models.parts.weight_files import weights_file
from vlmkernels.train import objective
from vlmkernels.train.config import TrainConfig, option
from vlmkernels.train.resume_check import files_digest
from vlmkernels.use.match_scores import MatchScores, evaluate_matching

from ._kind import Values
from ._word_pieces import WordPieceKind, WordPieceOptions

BERT_SIZES = (
    "vocab_size",
    "max_positions",
    "token_types",
    "width",
    "layers",
    "heads",
    "mlp_width",
    "activation",
    "eps",
)
RATES = ("mask_rate", "false_caption_ratio", "caption_pairs", "image_dropout")


@dataclasses.dataclass(frozen=True)
class VisualBertOptions(WordPieceOptions):
    bert: str | None = option(None, "visualbert: folder of a BERT (config, weights, tokenizer) to start from")
    mask_rate: float = option(RATE, "visualbert: share of the word pieces that are to be predicted")
    false_caption_ratio: float = option(0.5, "visualbert: share of the captions that are another image's")
    caption_pairs: float = option(
        0.0,
        "visualbert: share of the samples with a second caption, the one to judge, in tables where images "
        "have several; 1 in the published recipe",
    )
    image_dropout: float = option(
        0.0,
        "visualbert: share of the samples without their image, whose words only are learned; 1 for a control",
    )


class VisualBert(WordPieceKind):
    """In training the masks and the other captions are drawn in every step, from the seed, the step and the
    sample, the captions from the joint batch.
    """

    name = "visualbert"
    model = visualbert.VisualBERT
    configs = visualbert.CONFIGS
    options = VisualBertOptions
    matches = True

    def faults(self, config: TrainConfig) -> list[str]:
        faults, options = super().faults(config), self.own_options(config)
        for name in RATES:
            if not 0 <= (value := getattr(options, name)) <= 1:
                faults.append(f"{name} must be in [0, 1], got {value}")
        if options.caption_pairs and config.streams:
            faults.append(
                f"caption_pairs must be 0 for tars, which do not tell the captions of an image, "
                f"got {options.caption_pairs}"
            )
        if config.init is not None and options.bert is not None:
            faults.append(f"bert may only be given without init, got {options.bert}")
        if self.sizes(config).head != "pretraining":
            faults.append(f"model_options: head must be 'pretraining', got {self.sizes(config).head!r}")
        return faults

    def new_tokenizer(self, config: TrainConfig, source: Any) -> WordPieceTokenizer:
        """That of the BERT to start from, if there is one."""
        options = self.own_options(config)
        if options.bert is None or options.tokenizer is not None:
            return super().new_tokenizer(config, source)
        file = weights_file(options.bert, ("tokenizer.json", "vocab.txt"))
        return WordPieceTokenizer.from_file(file, self.sizes(config).context_length)

    def new_model(self, config: TrainConfig, tokenizer: Any) -> Pretrained:
        options = self.own_options(config)
        if options.bert is None:
            return super().new_model(config, tokenizer)
        chosen = dataclasses.asdict(self.sizes(config))
        fields = {name: value for name, value in chosen.items() if name not in BERT_SIZES}
        return visualbert.VisualBERT.from_bert(options.bert, **{**fields, "pad_id": tokenizer.pad_id})

    def own_inputs(self, config: TrainConfig) -> dict[str, Any]:
        folder = self.own_options(config).bert
        if folder is None:
            return {}
        return {"files of the BERT": files_digest(file for file in Path(folder).iterdir() if file.is_file())}

    def build_task(self, config: TrainConfig, tokenizer: Any, image_size: Any = None) -> Pretraining:
        return Pretraining(self.own_options(config), tokenizer, config.seed, image_size)

    def image_side(self, config: Any) -> int | None:
        return config.image_size if config.conv_blocks else None

    def pictures(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Regions [B, V, E], and where they are valid [B, V] bool, of images or of given regions."""
        if images.dim() == 4:
            regions = model.encode_image(images)
            return regions, regions.new_ones(regions.shape[:2], dtype=torch.bool)
        return images, images.any(-1)

    def match_odds(
        self, model: Any, tokenizer: Any, pictures: tuple[Tensor, Tensor], texts: Sequence[str]
    ) -> Tensor:
        """The log-odds [B] that each text belongs to its picture."""
        regions, mask = pictures
        inputs = placed(tokenizer, pair_tokens(tokenizer, texts, [None] * len(texts)), regions.device)
        return odds(model, model(regions=regions, region_mask=mask, **inputs)["match_logits"])

    def masked_losses(
        self,
        model: Any,
        tokenizer: Any,
        pictures: tuple[Tensor, Tensor],
        tokens: Tensor,  # [B, L]
        labels: Tensor,  # [B, L]
    ) -> Tensor:
        """The negative log-likelihood [R] of each masked word."""
        (regions, mask), labels = pictures, labels.to(pictures[0].device)
        inputs = placed(tokenizer, (tokens, torch.zeros_like(tokens)), regions.device)
        output = model(regions=regions, region_mask=mask, labels=labels, return_logits=True, **inputs)
        return F.cross_entropy(output["logits"].float(), labels[labels != IGNORE], reduction="none")

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: Any,
        transform: Any,
        dataset: Any,
        *,
        batch_size: int,
        templates: Any = None,
        num_beams: int = 1,
    ) -> MatchScores:
        return evaluate_matching(model, tokenizer, transform, dataset, batch_size=batch_size)


def placed(tokenizer: Any, texts: tuple[Tensor, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tokens and types of texts as arguments of the model."""
    tokens, types = (part.to(device) for part in texts)
    return {"tokens": tokens, "token_types": types, "attention_mask": tokens != tokenizer.pad_id}


def odds(model: Any, logits: Tensor) -> Tensor:  # [B, 2] -> [B]
    """The log-odds that a text belongs to its image, by the polarity of the model's head."""
    label = model.config.match_label
    return (logits[:, label] - logits[:, 1 - label]).to(torch.promote_types(logits.dtype, torch.float32))


class Pretraining:
    """The task: the mean loss of the masked words of all processes, plus that of their judged captions."""

    scores = ("perplexity", "match_accuracy")

    def __init__(self, options: VisualBertOptions, tokenizer: Any, seed: int, image_size: Any) -> None:
        self.collate = Collate(image_size=image_size)
        self.options, self.tokenizer, self.seed = options, tokenizer, seed
        self.captions: dict[str, list[str]] = {}  # of each image, in a table

    def prepare(self, source: Any, device: torch.device) -> None:
        keys = getattr(source, "keys", None)
        for key, text in zip(keys, source.names, strict=True) if keys is not None else ():
            self.captions.setdefault(key, []).append(text)
        if self.options.caption_pairs and max(map(len, self.captions.values()), default=0) < 2:
            raise ValueError("caption_pairs: no image in data has several captions")

    def draw(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """What a step draws: tokens, types, labels [B, L]; match and whether the image is seen, bool [B]."""
        options = self.options
        joint = objective.joint_list([*zip(batch["keys"], batch["texts"], strict=True)])
        firsts: list[str] = []
        seconds: list[str | None] = []
        match, sees = list[bool](), list[bool]()
        generators = []
        for key, text in zip(batch["keys"], batch["texts"], strict=True):
            rng = sample_rng(self.seed, "masked", step, key, text)
            own = {text, *self.captions.get(key, ())}
            rest = [other for other in self.captions.get(key, ()) if other != text]
            pair, false, blind = (rng.random() for _ in range(3))
            sees.append(blind >= options.image_dropout)
            others = [other for name, other in joint if name != key and other not in own]
            wrong = sees[-1] and bool(others) and false < options.false_caption_ratio
            judged = rng.choice(others) if wrong else text
            if rest and pair < options.caption_pairs:
                firsts.append(text)
                seconds.append(judged if wrong else rng.choice(rest))
            else:
                firsts.append(judged)
                seconds.append(None)
            match.append(not wrong)
            generators.append(rng)
        tokens, types = pair_tokens(self.tokenizer, firsts, seconds)
        hidden, labels = mask_tokens(tokens, self.tokenizer, generators, options.mask_rate)
        matches = torch.tensor(match, dtype=torch.bool)
        # Nothing that is seen says which words another image's caption has.
        paired = torch.tensor([second is not None for second in seconds], dtype=torch.bool)
        foreign = ~matches[:, None] & ((types == 1) | ~paired[:, None])
        labels = labels.masked_fill(foreign, IGNORE)
        seen = torch.tensor(sees, dtype=torch.bool)
        return {"tokens": hidden, "types": types, "labels": labels, "match": matches, "sees": seen}

    def loss(
        self, model: nn.Module, batch: dict[str, Any], step: int, measured: bool
    ) -> tuple[Tensor, Callable[[], Values]] | None:
        drawn = self.draw(batch, step)
        images, whole = batch["images"], cast(visualbert.VisualBERT, getattr(model, "module", model))
        device = images.device
        drawn = {name: x.to(device) for name, x in drawn.items()}
        labels, match, sees = drawn["labels"], drawn["match"], drawn["sees"]
        counts = torch.stack(
            [(labels != IGNORE).sum(), sees.sum(), sees.new_tensor(len(sees), dtype=torch.int64)]
        )
        words, judged, samples = objective.sum_over_processes(counts).unbind()
        if not batch["keys"] and not samples:  # waits for the device only if this process has no samples
            return None
        inputs = placed(self.tokenizer, (drawn["tokens"], drawn["types"]), device)
        if whole.tower is None and not len(images):  # of a process without samples
            images = images.new_zeros(0, 1, whole.config.region_width)
        if images.dim() == 4:
            inputs |= {"images": images, "region_mask": sees.new_ones(len(sees), whole.config.cells)}
        else:
            inputs |= {"regions": images, "region_mask": images.any(-1)}
        inputs["region_mask"] = inputs["region_mask"] & sees[:, None]
        output = model(**inputs, labels=labels)
        margins = odds(whole, output["match_logits"])
        own_words = output["masked_lm_loss"] * (counts[0].double() / words.clamp_min(1)).to(margins.dtype)
        target = match.to(margins.dtype)
        each = F.binary_cross_entropy_with_logits(margins, target, reduction="none") * sees
        own_match = each.sum() / judged.clamp_min(1)

        def measure() -> Values:
            right = (((margins > 0) == match) & sees).sum()
            parts = torch.stack([own_words.detach().double(), own_match.detach().double(), right.double()])
            masked_lm, matching, hits = objective.sum_over_processes(parts).tolist()
            return {
                "loss": masked_lm + matching,
                "masked_lm": masked_lm,
                "match": matching,
                "perplexity": math.exp(min(masked_lm, 700.0)),
                "match_accuracy": hits / max(int(judged), 1),
            }

        return (own_words + own_match) * objective.process_count(), measure

    def after_step(self, model: Any) -> None:
        pass
