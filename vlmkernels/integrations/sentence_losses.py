"""sentence-transformers' ranking losses with in-batch negatives on `vlmkernels.info_nce`."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vlmkernels
from vlmkernels.integrations._swap import qualified_name
from vlmkernels.integrations.losses import LossRule

_BOTH = {"query_to_doc", "doc_to_query"}


class RankingLoss(LossRule):
    """MultipleNegativesRankingLoss: anchors against all positives and negatives of the batch.

    Options are read at call time; with those that `refusal` names, the library's own code runs.
    """

    patch_runs = "vlmkernels.info_nce"
    name: ClassVar = "MultipleNegativesRankingLoss"
    patch_methods = ("compute_loss_from_embeddings",)
    folder: ClassVar = "sentence_transformers.sentence_transformer.losses."

    scale: float
    similarity_fct: Any
    gather_across_devices: bool
    directions: tuple[str, ...]
    partition_mode: str
    hardness_mode: str | None
    hardness_strength: float

    @classmethod
    def takes_class(cls, original: type[nn.Module]) -> bool:
        name = qualified_name(original)
        known = name.startswith(cls.folder) and name.endswith("." + cls.name)
        return known and hasattr(original, *cls.patch_methods)

    @classmethod
    def patch_matches(cls, module: nn.Module) -> bool:
        return any(cls.takes_class(base) for base in type(module).__mro__)

    @classmethod
    def patch_refuses(cls, module: Any) -> str | None:
        if not cls.takes_class(type(module)):
            return "a subclass of the loss with its own forward"
        return cls.refusal(module)

    def refusal(self) -> str | None:
        """Why a call runs the library's own code."""
        if _similarity(self.similarity_fct) is None:
            return "similarity_fct is neither cos_sim nor dot_score"
        if self.hardness_mode is not None and self.hardness_strength > 0:
            return "hardness_mode changes single logits"
        directions = set(self.directions)
        if directions != {"query_to_doc"} and (directions != _BOTH or self.partition_mode == "joint"):
            return "one softmax over several directions"
        return None

    def ranking_loss(self, queries: Tensor, docs: list[Tensor]) -> Tensor:
        """The loss of queries [n, D] with their documents, the positive first, each [n, D]."""
        n, rank = queries.shape[0], 0
        if self.gather_across_devices:
            util = sys.modules["sentence_transformers.util"]
            queries, rank = util.all_gather_with_grad(queries), util.get_rank()
            docs = [util.all_gather_with_grad(doc) for doc in docs]
        rows = slice(rank * n, rank * n + n)
        positives = torch.arange(rank * n, rank * n + n, device=queries.device)
        work = torch.promote_types(queries.dtype, torch.float32)

        def directed(query: Tensor, key: Tensor) -> Tensor:
            return vlmkernels.info_nce(
                query.to(work), key.to(work), self.scale, positives=positives, symmetric=False,
                normalize=_similarity(self.similarity_fct) == "cos_sim",
            )  # fmt: skip

        loss = directed(queries[rows], torch.cat(docs))
        if set(self.directions) == _BOTH:
            loss = (loss + directed(docs[0][rows], queries)) / 2
        return loss

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        if len(embeddings) < 2 or self.refusal() is not None:
            return super().compute_loss_from_embeddings(embeddings, labels)  # type: ignore[misc]
        return self.ranking_loss(embeddings[0], embeddings[1:])


class CachedRankingLoss(RankingLoss):
    """The variant with cached gradients: embeddings are computed in mini-batches, the loss here at once."""

    name = "CachedMultipleNegativesRankingLoss"
    patch_methods = ("calculate_loss",)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        if self.refusal() is not None:
            return super().calculate_loss(reps, labels, with_backward=with_backward)  # type: ignore[misc]
        queries, *docs = (torch.cat(rep) for rep in reps)
        loss = self.ranking_loss(queries, docs)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


def _similarity(function: Any) -> str | None:
    """ "cos_sim" or "dot_score" if the function is that of sentence-transformers."""
    name = getattr(function, "__name__", None)
    theirs = getattr(sys.modules.get("sentence_transformers.util"), name, None) if name else None
    return name if name in ("cos_sim", "dot_score") and function is theirs else None


SENTENCE_LOSSES: tuple[type[LossRule], ...] = (RankingLoss, CachedRankingLoss)
