"""ASIF: images against texts with two encoders that never saw each other, sim(z, w) = <r(z), r(w)>.

Norelli et al. 2022 (arXiv:2210.01738). Anchors are pairs (image a_j, text b_j). An image z is represented by
its cosines to the anchors' images and a text w by those to the anchors' texts, of which the k largest are
kept, clamped at 0, raised to the power p and L2-normalised:

    r(z)_j = max(cos(z, a_j), 0)^p / norm for the k nearest j, else 0;    sim(z, w) = sum_j r(z)_j r(w)_j

Nothing is trained: anchors that are added or removed are another model at once, and a score is a sum over
anchors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import vlmkernels
from vlmkernels.models.parts import nearest
from vlmkernels.models.parts.anchors import Anchors

K, P = 800, 8.0  # of the paper
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "{}")


class Relative(NamedTuple):
    """Relative representations: the anchors that each item keeps, in ascending order, and their values."""

    values: Tensor  # [N, k] float32
    indices: Tensor  # [N, k] int64

    def dense(self, count: int) -> Tensor:  # [N, count]
        """With the zeros of the anchors that are not kept."""
        return self.values.new_zeros(len(self.values), count).scatter_(1, self.indices, self.values)


@dataclasses.dataclass(frozen=True)
class Part:
    """What an anchor gave to a score: `share` of it, the product of the two values of the representations."""

    index: int
    name: str
    caption: str
    share: float
    image_value: float
    text_value: float


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A score, the anchors that decided, the largest share first, and how many had one."""

    score: float
    parts: list[Part]
    anchors: int


class ASIF:
    """Scores of images against texts through anchors.

    image_encoder, text_encoder: callables, items -> features [N, D], of images and of texts
        (`vlmkernels.use.encoders`), or None where only features are given.
    anchors: an `AnchorFolder`, `AnchorTensors`, or anything else with their `blocks` and `describe`. The
        features of both may be of any width and norm.
    k, p: how many anchors an item keeps, and the power. `k` is clamped to the number of anchors.
    search: "exact" (`vlmkernels.topk_similarity`), or "faiss" for its approximate index, which is made at the
        first use: some of the nearest anchors may be missing, and scores differ accordingly.
    group: a process group of torch.distributed. Each rank then has a part of the anchors, which are numbered
        in the order of the ranks, and the k nearest are those of all ranks. Every rank makes the same calls
        with the same items and has the same results.

    Features [N, D], or a `Relative` made before, may be given in the place of items. Raises ValueError that
    names each argument that is not valid.
    """

    def __init__(
        self,
        image_encoder: Callable[[Any], Tensor] | None,
        text_encoder: Callable[[Any], Tensor] | None,
        anchors: Anchors,
        *,
        k: int = K,
        p: float = P,
        search: str = "exact",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        faults = []
        if k < 1:
            faults.append(f"k must be at least 1, got {k}")
        if not 0 < p < float("inf"):
            faults.append(f"p must be positive and finite, got {p}")
        if search not in nearest.SEARCHES:
            faults.append(f"search must be one of {', '.join(nearest.SEARCHES)}, got {search!r}")
        if faults:
            raise ValueError("ASIF: " + "; ".join(faults))
        self.image_encoder, self.text_encoder, self.anchors = image_encoder, text_encoder, anchors
        self.k, self.p, self.group = k, p, group
        self._searches = [nearest.SEARCHES[search]() for _ in ("images", "texts")]

    def encode_images(self, images: Any) -> Relative:
        """Representations of images, items of the image encoder or features [N, D_x]."""
        return self._relative(images, self.image_encoder, "image", 0)

    def encode_texts(self, texts: Any) -> Relative:
        """Representations of texts, items of the text encoder or features [N, D_y]."""
        return self._relative(texts, self.text_encoder, "text", 1)

    def similarity(self, images: Any, texts: Any) -> Tensor:  # [N, C] float32
        """Scores of N images against C texts, in [0, 1]."""
        return vlmkernels.relative_similarity(self.encode_images(images), self.encode_texts(texts))

    def classify(self, images: Any, classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
        """Scores [N, C]: of a class the maximum over its texts, the templates with its name for "{}"."""
        faults = [
            f"{name} must not be empty"
            for name, x in (("classes", classes), ("templates", templates))
            if not x
        ]
        if isinstance(classes, str) or isinstance(templates, str):
            faults.append("classes and templates must be sequences of texts, got one text")
        if without := [template for template in templates if "{}" not in template]:
            faults.append(f"templates must each have a {{}} for the class, got {without}")
        if faults:
            raise ValueError("ASIF.classify: " + "; ".join(faults))
        texts = [template.replace("{}", name) for name in classes for template in templates]
        return self.similarity(images, texts).unflatten(1, (len(classes), len(templates))).amax(2)

    def explain(self, image: Any = None, text: Any = None, count: int = 10) -> Explanation:
        """The `count` anchors with the largest shares of the score of an image and a text.

        Each is one item, or features [D]. Of an image or a text alone it is the score with itself, 1: the
        anchors that represent it.
        """
        faults = ["image or text must be given, got neither"] if image is None and text is None else []
        if count < 1:
            faults.append(f"count must be at least 1, got {count}")
        if faults:
            raise ValueError("ASIF.explain: " + "; ".join(faults))
        reps = [
            encode(x[None] if isinstance(x, Tensor) else [x])
            for x, encode in ((image, self.encode_images), (text, self.encode_texts))
            if x is not None
        ]
        (v, i), (w, j) = reps[0], reps[-1]
        shared, of_image, of_text = _intersection(i[0], j[0])
        image_values, text_values = v[0, of_image], w[0, of_text]
        products = image_values * text_values
        score = float(products.sum())
        order = products.argsort(descending=True, stable=True)
        order = order[products[order] > 0]
        chosen = order[:count].tolist()
        told = self._describe([int(shared[at]) for at in chosen])
        parts = [
            Part(
                int(shared[at]),
                *told[int(shared[at])],
                share=float(products[at]) / score,
                image_value=float(image_values[at]),
                text_value=float(text_values[at]),
            )
            for at in chosen
        ]
        return Explanation(score, parts, len(order))

    def _relative(
        self, items: Any, encoder: Callable[[Any], Tensor] | None, name: str, side: int
    ) -> Relative:
        if isinstance(items, Relative):
            return items
        if not isinstance(items, Tensor):
            if encoder is None:
                raise ValueError(
                    f"ASIF: {name}_encoder must be given for {name}s that are not features, got None"
                )
            items = encoder(items)
        blocks = [block[side] for block in self.anchors.blocks()]
        width = blocks[0].shape[1] if blocks else "D"
        if items.dim() != 2 or not items.is_floating_point() or (blocks and items.shape[1] != width):
            got = f"{items.dtype} of shape {list(items.shape)}"
            raise ValueError(
                f"ASIF: features of {name}s must be floating [N, {width}], as anchors are, got {got}"
            )
        values, indices = self._searches[side](items.detach(), blocks, self.k)
        if self.group is not None:
            values, indices = nearest.of_all_ranks(values, indices, self._count(), self.k, self.group)
        values, indices = nearest.ascending(values, indices)
        return Relative(torch.ops.vlmkernels.relative_representation(values, self.p), indices)

    def _count(self) -> int:
        return sum(len(images) for images, _ in self.anchors.blocks())

    def _describe(self, indices: Sequence[int]) -> dict[int, tuple[str, str]]:
        """Names and captions of some anchors, of any rank."""
        if self.group is None:
            return {index: self.anchors.describe(index) for index in indices}
        first, count = nearest.first_of_rank(self._count(), self.group), self._count()
        own = {i: self.anchors.describe(i - first) for i in indices if first <= i < first + count}
        every: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(every, own, group=self.group)
        return {index: told for part in every for index, told in part.items()}


def _intersection(
    first: Tensor,  # [k] int64, ascending
    second: Tensor,  # [l] int64, ascending
) -> tuple[Tensor, Tensor, Tensor]:
    """What both have, and where it is in each."""
    at = torch.searchsorted(second, first).clamp_max(max(len(second) - 1, 0))
    found = (second[at] == first).nonzero().flatten() if len(second) else first.new_empty(0)
    return first[found], found, at[found]
