"""A linear probe: how well a linear classifier of frozen image features does on held-out images.

Logistic regression on standardised features; its weight decay is the one of a grid that has the lowest loss
on a fifth of the training samples. Images with several classes (scenes: the objects in them) are scored by
the mean average precision over classes, as VirTex (Desai and Johnson 2021) does on VOC07, others by accuracy.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.data import parse_caption
from vlmkernels.train import kinds

from .bundle import check_batch_size, inference, load_model
from .evaluate import open_data
from .images import readable
from .scores import Scores

WEIGHT_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
STEPS = 200
HELD_OUT = {  # what is tested on when nothing is given, by the training data
    "scenes": "scenes:test",
    "scenes:train": "scenes:test",
    "emoji3": "emoji3:style-test",
    "emoji3:train": "emoji3:style-test",
    "emoji3:style-train": "emoji3:style-test",
    "emoji3:concept-train": "emoji3:concept-test",
}


@dataclasses.dataclass(frozen=True)
class ProbeScores(Scores):
    """``score`` on the held-out ``samples`` after training on ``train_samples``, by the ``metric``.

    ``chance`` is the score without features: that of the largest class, or the mean share of the classes.
    """

    train_samples: int
    features: int
    classes: int
    untrained: bool
    metric: str
    score: float
    chance: float
    weight_decay: float

    def __str__(self) -> str:
        of = "an untrained network" if self.untrained else "a trained network"
        return (
            f"{self.train_samples} training samples, {self.counted()} held out\n"
            f"linear probe on {self.features} features of {of}, {self.classes} classes: "
            f"{self.metric} {self.score:.4f} (chance {self.chance:.4f})"
        )


@dataclasses.dataclass(frozen=True)
class Examples:
    """Features and classes of images."""

    features: Tensor  # [N, F] float64
    targets: Tensor  # [N, C] float64, 1 for each class of the image

    def part(self, rows: Tensor) -> Examples:
        return Examples(self.features[rows], self.targets[rows])


def probe(
    model_folder: str | os.PathLike[str],
    data: Any,
    test: Any = None,
    *,
    untrained: bool = False,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: str = "auto",
    allow_pipe: bool = False,
) -> ProbeScores:
    """Probe the image features of a trained model: VirTex' pooled grid, embeddings of CLIP and ALIGN.

    ``model_folder`` is RUN/final of a training run. ``data`` and ``test`` are scenes, emoji3 or a folder of
    class folders, as names or data sets; ``test`` of None is the test split of named data, else a fifth of
    ``data``, drawn by ``seed``. ``limit`` takes only the first samples of each. ``untrained`` probes a
    network of the same configuration with random weights of ``seed``, whose batch normalisation has the
    statistics of the training images. FileNotFoundError or ValueError name what is invalid.
    """
    check_batch_size(batch_size)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    model, _, transform = load_model(model_folder, device, fitting=kinds.probed())
    if untrained:
        place = next(model.parameters()).device
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = type(model)(model.config).to(place).eval()
    if test is None and isinstance(data, str):
        test = HELD_OUT.get(data)
    skipped: dict[str, str] = {}
    options = {"limit": limit, "batch_size": batch_size, "skipped": skipped, "transform": transform}
    source = open_data(data, allow_pipe=allow_pipe)
    if untrained:
        _estimate_statistics(model, source, **options)
    train = _examples(model, source, **options)
    if test is None:
        generator = torch.Generator().manual_seed(seed)
        first, rest = _fifth(len(train.features), generator)
        train, held_out = train.part(rest), train.part(first)
    else:
        held_out = _examples(model, open_data(test, allow_pipe=allow_pipe), **options)
    if train.targets.shape[1] != held_out.targets.shape[1]:
        counts = f"{train.targets.shape[1]} and {held_out.targets.shape[1]}"
        raise ValueError(f"data and test must have the same classes, got {counts} of them")
    scores = linear_probe(train, held_out, seed=seed)
    return ProbeScores(
        samples=len(held_out.features),
        skipped=skipped,
        train_samples=len(train.features),
        features=train.features.shape[1],
        classes=train.targets.shape[1],
        untrained=untrained,
        **scores,
    )


def linear_probe(train: Examples, held_out: Examples, *, seed: int = 0) -> dict[str, Any]:
    """metric, score, chance and weight_decay of a probe. ValueError for too few samples to choose by."""
    if len(train.features) < 10 or not len(held_out.features):
        got = f"{len(train.features)} and {len(held_out.features)}"
        raise ValueError(f"data: a probe needs 10 samples for training and 1 to test, got {got}")
    mean, std = train.features.mean(0), train.features.std(0)
    std = torch.where(std > 1e-12, std, 1.0)
    train, held_out = (Examples((x.features - mean) / std, x.targets) for x in (train, held_out))
    first, rest = _fifth(len(train.features), torch.Generator().manual_seed(seed))
    known, chosen_by = train.part(rest), train.part(first)
    losses = {decay: float(_loss(_fit(known, decay), chosen_by)) for decay in WEIGHT_DECAYS}
    decay = min(losses, key=lambda each: losses[each])
    logits = _logits(_fit(train, decay), held_out.features)
    shares = train.targets.mean(0)
    if _has_one_class(train) and _has_one_class(held_out):
        right = logits.argmax(1) == held_out.targets.argmax(1)
        guessed = held_out.targets[:, int(shares.argmax())]
        found = {"metric": "accuracy", "score": right.double().mean(), "chance": guessed.mean()}
    else:
        seen = held_out.targets.any(0)
        precision = average_precision(logits, held_out.targets)[seen].mean()
        chance = held_out.targets.mean(0)[seen].mean()
        found = {"metric": "mean average precision", "score": precision, "chance": chance}
    return {name: v.item() if isinstance(v, Tensor) else v for name, v in found.items()} | {
        "weight_decay": decay
    }


def average_precision(
    scores: Tensor,  # [N, C]
    targets: Tensor,  # [N, C] of 0 and 1
) -> Tensor:
    """[C]: for each class, the mean over its images of the precision at their rank; NaN without any.

    Of images with the same score, those of other classes come first.
    """
    order = targets.argsort(dim=0, stable=True)
    order = order.gather(0, scores.gather(0, order).argsort(dim=0, descending=True, stable=True))
    hits = targets.gather(0, order).double()
    rank = torch.arange(1, len(scores) + 1, device=scores.device)[:, None]
    return (hits * hits.cumsum(0) / rank).sum(0) / hits.sum(0)


def _fifth(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A fifth of the numbers below ``count``, at random, and the others."""
    order = torch.randperm(count, generator=generator)
    return order[: count // 5], order[count // 5 :]


def _has_one_class(examples: Examples) -> bool:
    return bool((examples.targets.sum(1) == 1).all())


def _fit(examples: Examples, weight_decay: float) -> Tensor:
    """Weights [F + 1, C], the last row of biases: the minimum of loss + weight_decay / 2 |W|^2."""
    features = examples.features
    weights = features.new_zeros(features.shape[1] + 1, examples.targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(weights, examples) + 0.5 * weight_decay * weights[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weights.detach()


def _logits(weights: Tensor, features: Tensor) -> Tensor:  # [F + 1, C], [N, F] -> [N, C]
    return features @ weights[:-1] + weights[-1]


def _loss(weights: Tensor, examples: Examples) -> Tensor:
    """Mean over images of the cross-entropy, or of the sum over classes of the binary one."""
    logits = _logits(weights, examples.features)
    if _has_one_class(examples):
        return F.cross_entropy(logits, examples.targets)
    losses = F.binary_cross_entropy_with_logits(logits, examples.targets, reduction="sum")
    return losses / len(logits)


def _batches(
    dataset: Any, limit: int | None, batch_size: int, skipped: dict[str, str], transform: Any
) -> Iterator[list[Any]]:
    samples = itertools.islice(readable(dataset, transform, skipped), limit)
    while batch := list(itertools.islice(samples, batch_size)):
        yield batch


def _examples(model: nn.Module, dataset: Any, **options: Any) -> Examples:
    kind, features, targets = kinds.of_model(model), [], []
    names = _class_names(dataset)
    with inference(model) as device:
        for batch in _batches(dataset, **options):
            images = torch.stack([sample["image"] for sample in batch]).to(device)
            features.append(kind.image_features(model, images).double().cpu())
            targets.append(_targets(dataset, batch, names))
    options["skipped"] |= getattr(dataset, "skipped", None) or {}
    if not features:
        raise ValueError(f"data: no sample can be read, {len(options['skipped'])} skipped")
    return Examples(torch.cat(features), torch.cat(targets))


def _class_names(dataset: Any) -> Sequence[str]:
    names = getattr(dataset, "objects", None) if hasattr(dataset, "scene") else None
    names = names or getattr(dataset, "class_names", None) or getattr(dataset, "group_names", None)
    if names is None:
        raise ValueError(
            f"data: a probe needs classes: scenes, emoji3 or a folder of class folders, got {dataset!r}"
        )
    return names


def _targets(dataset: Any, batch: Sequence[Any], names: Sequence[str]) -> Tensor:  # [B, C]
    place = {name: i for i, name in enumerate(names)}
    found = torch.zeros(len(batch), len(names), dtype=torch.float64)
    for row, sample in enumerate(batch):
        if hasattr(dataset, "scene"):
            found[row, [place[name] for name in parse_caption(sample["text"])[0]]] = 1.0
        else:
            found[row, int(sample["label"])] = 1.0
    return found


@torch.no_grad()
def _estimate_statistics(model: nn.Module, dataset: Any, **options: Any) -> None:
    """Means and variances of batch normalisation over the data, which random weights have not seen."""
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not layers:
        return
    kind, device = kinds.of_model(model), next(model.parameters()).device
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the average over all batches
        layer.train()
    for batch in _batches(dataset, **options):
        kind.image_features(model, torch.stack([sample["image"] for sample in batch]).to(device))
    model.eval()
