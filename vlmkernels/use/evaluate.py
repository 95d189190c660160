"""Retrieval recall R@k both ways and zero-shot classification, each with its chance level.

R@k is the fraction of queries with a matching item among the k nearest; a class is the normalised mean of the
normalised embeddings of its texts (Radford et al. 2021, section 3.1.4).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from vlmkernels import retrieval_ranks
from vlmkernels.data import BrokenImageError, Sample, SkipLog, read_image
from vlmkernels.train import kinds

from .bundle import check_batch_size, load_model
from .embed import encode_images, encode_texts
from .images import find_images, readable
from .scores import Scores

RECALLS = (1, 5, 10)
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "{}")
EMOJI_TEMPLATES = ("{}",)
SCORES_AT_ONCE = 2**24


@torch.no_grad()
def ranks(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    matches: Tensor,  # [P, 2] int64, rows of query and of key that belong together
    *,
    scores_at_once: int = SCORES_AT_ONCE,
) -> Tensor:
    """int64 [N]: the rank, from 1, of each query's best match, by inner product.

    The rank counts keys that do not match: one with the same score as the best match is ranked before it, so
    that a model with one embedding for everything gets no credit. Scores are fp32, ``scores_at_once`` of
    them in memory. ValueError for a query without a match.
    """
    places = []
    rows = max(1, scores_at_once // max(1, len(key)))
    keys = key.float()
    for start in range(0, len(query), rows):
        scores = query[start : start + rows].float() @ keys.T  # [rows, M]
        own = matches[(matches[:, 0] >= start) & (matches[:, 0] < start + rows)]
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[own[:, 0] - start, own[:, 1]] = True
        if not right.any(dim=1).all():
            first = start + int(right.any(dim=1).int().argmin())
            raise ValueError(f"matches must have a key for every query, got none for query {first}")
        best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
        # `not <` ranks a NaN score before the match.
        places.append(1 + (~(scores < best) & ~right).sum(dim=1))
    return torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)


def chance_recall(keys: int, matches: int, k: int) -> float:
    """The probability that one of ``matches`` out of ``keys`` is among the first k of a random order."""
    few, many = sorted((matches, min(k, keys)))
    return 1.0 - math.prod(max(0, keys - many - i) / (keys - i) for i in range(few))


def _direction(places: Tensor, counts: Tensor, keys: int) -> dict[str, Any]:
    """Recalls and median rank of one direction; ``counts`` [N] is the number of matches of each query."""
    groups = [(int(c), int(n)) for c, n in zip(*counts.unique(return_counts=True), strict=True)]

    def chance(k: int) -> float:
        return sum(number * chance_recall(keys, count, k) for count, number in groups) / len(counts)

    median = bisect.bisect_left(range(keys + 1), 0.5, key=lambda k: chance(k) if k else 0.0)
    return {
        **{f"R@{k}": (places <= k).float().mean().item() for k in RECALLS},
        "median_rank": float(places.median()),
        "chance": {**{f"R@{k}": chance(k) for k in RECALLS}, "median_rank": float(median)},
    }


def _distinct(names: Sequence[Hashable]) -> tuple[Tensor, Tensor]:
    """The row where each distinct name is first [K], and the number of its name for every row [N]."""
    first: dict[Hashable, int] = {}
    for i, name in enumerate(names):
        first.setdefault(name, i)
    number = {name: i for i, name in enumerate(first)}
    return torch.tensor(list(first.values())), torch.tensor([number[name] for name in names])


def _ids(matches: Tensor, images: int, texts: int) -> tuple[Tensor, Tensor] | None:
    """Ids [images] and [texts] that are equal where they match; None if an image and a text that do not match
    share a match, which ids cannot say."""
    image, text = matches.unbind(dim=1)
    none = matches.new_full((max(images, texts),), texts)
    image_ids = none[:images].scatter_reduce(0, image, text, "amin")  # the first of its texts
    text_ids = none[:texts].scatter_reduce(0, text, image_ids[image], "amin")
    counts = (ids.bincount(minlength=texts) for ids in (image_ids, text_ids))
    equal = sum(a * b for a, b in zip(*(count.tolist() for count in counts), strict=True))
    same = bool((image_ids[image] == text_ids[text]).all())
    return (image_ids, text_ids) if same and equal == len(matches) else None


def retrieval(
    image_features: Tensor,  # [N, E] normalised
    text_features: Tensor,  # [N, E] normalised
    texts: Sequence[str],
    keys: Sequence[str] | None = None,
    *,
    scores_at_once: int = SCORES_AT_ONCE,
) -> dict[str, Any]:
    """R@1/5/10 and median rank of images against texts and of texts against images, with chance levels.

    Row i of both is a pair. Equal texts are one text that matches all of their images, and equal ``keys``
    (None: all differ) are one image that matches all of its texts; any match of a query is right. ValueError
    when the sizes differ or are 0.
    """
    sizes = {len(image_features), len(text_features), len(texts), len(texts if keys is None else keys)}
    if len(sizes) > 1 or not texts:
        raise ValueError(
            f"image_features, text_features, texts and keys must have the same length, got {sizes}"
        )
    image_rows, image_numbers = _distinct(range(len(texts)) if keys is None else keys)
    text_rows, text_numbers = _distinct(texts)
    images, distinct = image_features[image_rows], text_features[text_rows]
    matches = torch.stack([image_numbers, text_numbers], dim=1).unique(dim=0)  # [P, 2]
    ids = _ids(matches, len(images), len(distinct))
    if ids is not None:
        image_to_text, text_to_image = retrieval_ranks(images, distinct, ids)
    else:
        image_to_text = ranks(images, distinct, matches, scores_at_once=scores_at_once)
        text_to_image = ranks(distinct, images, matches.flip(1), scores_at_once=scores_at_once)
    return {
        "images": len(images),
        "texts": len(distinct),
        "image_to_text": _direction(image_to_text, matches[:, 0].bincount(), len(distinct)),
        "text_to_image": _direction(text_to_image, matches[:, 1].bincount(), len(images)),
    }


def class_weights(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    texts: Sequence[Sequence[str]],
    *,
    batch_size: int = 256,
) -> Tensor:
    """float32 [C, E], row c the normalised mean of the normalised embeddings of ``texts[c]``."""
    empty = [c for c, group in enumerate(texts) if not group]
    if not texts or empty:
        raise ValueError(
            f"texts must have a text for every class, got {len(texts)} classes of which {empty} have none"
        )
    features = encode_texts(
        model, tokenizer, [text for group in texts for text in group], batch_size=batch_size
    )
    means = [part.mean(dim=0) for part in features.split([len(group) for group in texts])]
    return F.normalize(torch.stack(means), dim=-1)


def fill(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """Every template filled with every name. ValueError for a template without ``{}``."""
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise ValueError(f"templates must each contain {{}} for the name, got {list(templates)}")
    return [template.replace("{}", name) for template in templates for name in names]


def classification(
    image_features: Tensor,  # [N, E] normalised
    labels: Tensor,  # [N] int64 in [0, C)
    weights: Tensor,  # [C, E] normalised
) -> dict[str, Any]:
    """Top-1, top-5 and mean-per-class accuracy, with chance levels and the fraction of the largest class.

    A class with the same score as the right one is ranked before it.
    """
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= len(weights):
        raise ValueError(f"labels must be in [0, {len(weights)}) and not empty, got {len(labels)} labels")
    places, _ = retrieval_ranks(image_features, weights, labels)
    right = (places == 1).float()
    sizes = labels.bincount(minlength=len(weights))
    per_class = right.new_zeros(len(weights)).scatter_add_(0, labels, right)[sizes > 0] / sizes[sizes > 0]
    return {
        "top1": right.mean().item(),
        "top5": (places <= 5).float().mean().item(),
        "mean_per_class": per_class.mean().item(),
        "classes": len(weights),
        "chance": {
            "top1": 1 / len(weights),
            "top5": min(5, len(weights)) / len(weights),
            "mean_per_class": 1 / len(weights),
            "largest_class": sizes.max().item() / len(labels),
        },
    }


def emoji_class_texts(dataset: Any) -> dict[str, list[list[str]]]:
    """Two sets of texts for the 9 groups of emoji3, neither of which uses images or a test split.

    ``names``: the words of the group's name ("animals-nature" gives "animals" and "nature"), the usual
    zero-shot form; hard for a small model: these words are rare in the captions or absent. ``captions``: the
    names of the group's concepts in the training split that belongs to ``dataset`` (for concept-test, none of
    the concepts tested), a prompt ensemble.
    """
    from vlmkernels.data import load_emoji3

    train = load_emoji3("style-train" if dataset.split.startswith("style") else "concept-train")
    captions: list[dict[str, None]] = [{} for _ in dataset.group_names]
    for name, group in zip(train.names, train.groups, strict=True):
        captions[group][name] = None
    return {
        "names": [fill(EMOJI_TEMPLATES, name.split("-")) for name in dataset.group_names],
        "captions": [list(names) for names in captions],
    }


class ClassFolders(Dataset):
    """Images in one folder per class; the folder's name, "_" replaced by a space, is the name of the class.

    Hidden folders (.git, .ipynb_checkpoints) are not classes.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        visible = (path for path in Path(folder).iterdir() if not path.name.startswith("."))
        folders = sorted(path for path in visible if path.is_dir())
        if len(folders) < 2:
            raise ValueError(
                f"data: {folder} must contain a folder of images for each of two or more classes"
            )
        self.class_names = [path.name.replace("_", " ") for path in folders]
        self.files = [(file, label) for label, path in enumerate(folders) for file in find_images([path])]
        self._skip_log = SkipLog()

    @property
    def skipped(self) -> dict[str, str]:
        """Reason by path of the images skipped so far."""
        return self._skip_log.items()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        """BrokenImageError for an image that cannot be read, which is then in ``skipped``."""
        file, label = self.files[index]
        try:
            image = read_image(file)
        except BrokenImageError as error:
            self._skip_log.add(str(file), str(error))
            raise
        return Sample(image=image, text=self.class_names[label], key=str(file), label=label, concept=-1)


def _recalls(way: dict[str, Any]) -> str:
    """The recalls of one direction with their chance levels."""
    return ", ".join(f"R@{k} {way[f'R@{k}']:.4f} (chance {way['chance'][f'R@{k}']:.4f})" for k in RECALLS)


@dataclasses.dataclass(frozen=True)
class ContrastiveScores(Scores):
    """``retrieval`` (see :func:`retrieval`; None for :class:`ClassFolders`) and ``zero_shot``, a
    :func:`classification` for each set of class texts; None for data without labels.
    """

    retrieval: dict[str, Any] | None
    zero_shot: dict[str, Any] | None

    def __str__(self) -> str:
        """The numbers with their chance levels."""
        lines = [self.counted()]
        if self.retrieval is not None:
            lines.append(f"image to text: {_recalls(self.retrieval['image_to_text'])}")
            lines.append(f"text to image: {_recalls(self.retrieval['text_to_image'])}")
        for name, scores in (self.zero_shot or {}).items():
            chance = scores["chance"]
            lines.append(
                f"zero-shot, {scores['classes']} classes by {name}: top-1 {scores['top1']:.4f} "
                f"(chance {chance['top1']:.4f}, largest class {chance['largest_class']:.4f})"
            )
        return "\n".join(lines)


def evaluate_model(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    transform: Callable[[Any], Tensor],
    dataset: Any,
    *,
    batch_size: int = 256,
    class_texts: dict[str, list[list[str]]] | None = None,
) -> ContrastiveScores:
    """Evaluate a model in memory; its mode does not change and no random number is drawn.

    ``dataset`` yields samples (see ``vlmkernels.data.Sample``) with PIL images, to which ``transform`` is
    applied, or tensors. Classes are scored for each entry of ``class_texts`` (texts of every class), which
    emoji3 and class folders have themselves.
    """
    check_batch_size(batch_size)
    texts: list[str] = []
    keys: list[str] = []
    labels: list[int] = []
    skipped: dict[str, str] = {}

    def batches() -> Iterator[Tensor]:
        samples = readable(dataset, transform, skipped)
        while batch := list(itertools.islice(samples, batch_size)):
            texts.extend(sample["text"] for sample in batch)
            keys.extend(sample["key"] for sample in batch)
            labels.extend(int(sample["label"]) for sample in batch)
            yield torch.stack([sample["image"] for sample in batch])

    image_features = encode_images(model, batches())
    skipped |= getattr(dataset, "skipped", None) or {}
    if not texts:
        raise ValueError(f"data: no sample can be read, {len(skipped)} skipped")
    folders = isinstance(dataset, ClassFolders)
    if class_texts is None and hasattr(dataset, "group_names"):
        class_texts = emoji_class_texts(dataset)
    elif class_texts is None and folders:
        class_texts = {"names": [fill(TEMPLATES, [name]) for name in dataset.class_names]}
    text_features = encode_texts(model, tokenizer, texts, batch_size=batch_size)
    # Shards may count their keys from zero each; in a table a key is the path of the image.
    named = None if isinstance(dataset, IterableDataset) else keys
    found = None if folders else retrieval(image_features, text_features, texts, named)
    if class_texts is None or min(labels) < 0:
        return ContrastiveScores(len(texts), skipped, found, None)
    classes = {
        name: classification(
            image_features,
            torch.tensor(labels),
            class_weights(model, tokenizer, groups, batch_size=batch_size),
        )
        for name, groups in class_texts.items()
    }
    return ContrastiveScores(len(texts), skipped, found, classes)


def open_data(data: Any, *, allow_pipe: bool = False) -> Any:
    """``data`` itself, or the data set of a specification: a folder of class folders, or ``load_pairs``'."""
    if not isinstance(data, (str, os.PathLike)):
        return data
    if os.path.isdir(data):
        return ClassFolders(data)
    from vlmkernels.data import load_pairs

    return load_pairs(str(data), allow_pipe=allow_pipe)


def evaluate(
    model_folder: str | os.PathLike[str],
    data: Any,
    *,
    batch_size: int = 256,
    device: str = "auto",
    templates: Sequence[str] | None = None,
    num_beams: int = 1,
    allow_pipe: bool = False,
) -> Scores:
    """Evaluate a trained model (RUN/final) on ``data``.

    CLIP and ALIGN: the result is that of :func:`evaluate_model`. ``data`` is "emoji3[:SPLIT]",
    "scenes[:SPLIT]", a CSV/TSV file or webdataset tars, for retrieval (emoji3 has classes too); a folder with
    one folder of images per class, for zero-shot classification with ``templates`` ("{}" is the name); or a
    data set. Flamingo, SimVLM and language models: that of ``evaluate_captions``, by beam search if
    ``num_beams`` exceeds 1; no class folders. VisualBERT: that of ``evaluate_matching``. ViLD: that of
    ``evaluate_detection``, on composites or COCO's JSON. ``allow_pipe`` is that of ``load_pairs``. Raises
    FileNotFoundError or ValueError naming what is invalid.
    """
    check_batch_size(batch_size)
    dataset = open_data(data, allow_pipe=allow_pipe)
    loaded = load_model(model_folder, device, fitting=kinds.every())
    kind = kinds.of_model(loaded[0])
    kind.check_images(dataset)
    prompted = templates is not None and not kind.detects
    if not kind.embeds and (prompted or isinstance(dataset, ClassFolders)):
        takes = " and ".join(kinds.model_types(kinds.embedders()))
        raise ValueError(f"data: {model_folder} embeds nothing; classes and templates are for {takes}")
    return kind.evaluate(*loaded, dataset, batch_size=batch_size, templates=templates, num_beams=num_beams)


def template_texts(templates: Sequence[str], dataset: Any) -> dict[str, list[list[str]]]:
    """The texts of every class of ``dataset`` by these templates, and emoji3's own."""
    names = getattr(dataset, "class_names", None) or getattr(dataset, "group_names", None)
    if names is None:
        raise ValueError("templates: this data has no classes; pass a folder of class folders or emoji3")
    class_texts = {"names": [fill(templates, name.split("-")) for name in names]}
    if isinstance(dataset, ClassFolders):
        return class_texts
    return {**emoji_class_texts(dataset), **class_texts}
