"""Losses as modules, on the ops `info_nce`, `sigmoid_loss`, `linear_cross_entropy` and the distillations of
logits.

`ClipLoss` and `SigLipLoss` replace open_clip 3.3.0's classes: same constructor, same forward, but no N x N
matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import vlmkernels
from vlmkernels.distributed import all_gather_with_grad, check_initialized, shard_sizes
from vlmkernels.nn._bounds import within


class _PairLoss(nn.Module):
    """Base class of the two losses over image-text pairs: the process layout and the gather of features."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size = {world_size}), got {rank}")
        self.rank = rank
        self.world_size = world_size

    def _shard_sizes(self, image_features: Tensor, text_features: Tensor) -> list[int]:
        if image_features.shape != text_features.shape:
            shapes = f"{list(image_features.shape)} and {list(text_features.shape)}"
            raise ValueError(
                f"image_features and text_features must have the same shape [N, D], got {shapes}"
            )
        check_initialized()
        if (dist.get_rank(), dist.get_world_size()) != (self.rank, self.world_size):
            layout = f"rank {dist.get_rank()} of {dist.get_world_size()}"
            raise ValueError(
                f"the loss was built for rank {self.rank} of {self.world_size}, this is {layout}"
            )
        return shard_sizes(len(image_features), image_features.device)

    def _targets(self, sizes: list[int], device: torch.device) -> Tensor:
        """The index of each local row's pair among the gathered rows, [n] int64."""
        return sum(sizes[: self.rank]) + torch.arange(sizes[self.rank], device=device)

    def _share(self, sizes: list[int]) -> float:
        """Weight of the mean over local rows, so that the mean over the ranks is the mean over all rows."""
        return sizes[self.rank] * self.world_size / sum(sizes) if sum(sizes) else 0.0


class ClipLoss(_PairLoss):
    """Symmetric InfoNCE over image-text pairs, as open_clip.ClipLoss (Radford et al. 2021).

    With `world_size` > 1 the features of all processes are gathered, always with their gradients
    (`gather_with_grad` is accepted and has no effect: without them the gradient is not that of the loss).
    Shards may differ in size. After DistributedDataParallel's averaging, gradients equal those of one process
    with the joint batch. `local_loss=False`: every rank returns the loss of the joint batch.
    `local_loss=True`: a rank computes its own rows and columns only, and returns its share of the loss: the
    mean over the ranks is the loss of the joint batch. `cache_labels` has no effect, since no labels are
    built. `use_horovod=True` raises a ValueError.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(rank, world_size)
        if use_horovod:
            raise ValueError("use_horovod must be False; features are gathered with torch.distributed")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels

    def forward(
        self,
        image_features: Tensor,  # [N, D], L2-normalised
        text_features: Tensor,  # [N, D], L2-normalised
        logit_scale: Tensor | float,  # one element
        logit_bias: Tensor | float | None = None,  # a constant added to every logit: no effect on the softmax
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The scalar loss, fp32 (fp64 for fp64 features); {"contrastive_loss": loss} with `output_dict`."""
        if self.world_size == 1:
            loss = vlmkernels.info_nce(image_features, text_features, logit_scale)
        else:
            loss = self._joint_loss(image_features, text_features, logit_scale)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0.0 * logit_bias.sum()  # a zero gradient, which DistributedDataParallel waits for
        return {"contrastive_loss": loss} if output_dict else loss

    def _joint_loss(self, images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
        sizes = self._shard_sizes(images, texts)
        return self._contrastive((images, texts), self._of_all((images, texts), sizes), scale, sizes)

    def _of_all(self, own: tuple[Tensor, Tensor], sizes: list[int]) -> tuple[Tensor, Tensor]:
        """The images and texts of all ranks."""
        if self.world_size == 1:
            return own
        images, texts = own
        return all_gather_with_grad(images, sizes=sizes), all_gather_with_grad(texts, sizes=sizes)

    def _contrastive(
        self,
        own: tuple[Tensor, Tensor],
        every: tuple[Tensor, Tensor],
        scale: Tensor | float,
        sizes: list[int],
    ) -> Tensor:
        """The loss from the images and texts of this rank and of all."""
        if self.world_size == 1 or not self.local_loss:
            return vlmkernels.info_nce(*every, scale)
        (images, texts), (all_images, all_texts) = own, every
        targets = self._targets(sizes, images.device)
        rows = vlmkernels.info_nce(images, all_texts, scale, positives=targets, symmetric=False)
        columns = vlmkernels.info_nce(texts, all_images, scale, positives=targets, symmetric=False)
        return 0.5 * self._share(sizes) * (rows + columns)


class SigLipLoss(_PairLoss):
    """Pairwise sigmoid loss, as open_clip.SigLipLoss (Zhai et al. 2023).

    With `world_size` > 1 each rank compares its images with the texts of all ranks and returns its share of
    the loss: the mean over the ranks is the loss of the joint batch, and after DistributedDataParallel's
    averaging so are the gradients. Shards may differ in size. open_clip's four communication patterns
    (`dist_impl`: "bidir", "shift", "reduce", "gather") are accepted; they give the same loss, and here all of
    them gather. `chunk_size` and `cache_labels` have no effect, since no N x N matrix is built.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__(rank, world_size)
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                f"dist_impl must be 'bidir', 'shift', 'reduce', 'gather' or None, got {dist_impl!r}"
            )
        self.cache_labels = cache_labels
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,  # [N, D], L2-normalised
        text_features: Tensor,  # [N, D], L2-normalised
        logit_scale: Tensor | float,  # one element
        logit_bias: Tensor | float | None,  # one element; None means 0
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The scalar loss, fp32 (fp64 for fp64 features); {"contrastive_loss": loss} with `output_dict`."""
        bias = 0.0 if logit_bias is None else logit_bias
        if self.world_size == 1:
            loss = vlmkernels.sigmoid_loss(image_features, text_features, logit_scale, bias)
        else:
            sizes = self._shard_sizes(image_features, text_features)
            all_texts = all_gather_with_grad(text_features, sizes=sizes)
            targets = self._targets(sizes, image_features.device)
            loss = vlmkernels.sigmoid_loss(image_features, all_texts, logit_scale, bias, positives=targets)
            loss = self._share(sizes) * loss
        return {"contrastive_loss": loss} if output_dict else loss


class InfoNCELoss(nn.Module):
    """`vlmkernels.info_nce` with a learnable scale, exp(log_scale) clamped to `max_scale`.

    The parameter is `log_scale`, 0-dim; with `learnable=False` it is a buffer. Call `clamp_()` after each
    optimizer step: beyond the bound the gradient of `log_scale` is zero. The other options are those of
    `info_nce`; features are L2-normalised by default.
    """

    def __init__(
        self,
        init_scale: float = 1 / 0.07,
        max_scale: float = 100.0,
        *,
        learnable: bool = True,
        symmetric: bool = True,
        label_smoothing: float = 0.0,
        normalize: bool = True,
        reduction: str = "mean",
        store_bytes: int = 2**28,
    ) -> None:
        super().__init__()
        if not 0.0 < init_scale <= max_scale:
            raise ValueError(f"init_scale must be in (0, max_scale = {max_scale}], got {init_scale}")
        log_scale = torch.tensor(math.log(init_scale))
        self.log_scale: Tensor
        if learnable:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        self.max_scale = max_scale
        self.symmetric = symmetric
        self.label_smoothing = label_smoothing
        self.normalize = normalize
        self.reduction = reduction
        self.store_bytes = store_bytes

    def scale(self) -> Tensor:
        """exp(log_scale), at most `max_scale`, 0-dim."""
        return within(self.log_scale, high=math.log(self.max_scale)).exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamps log_scale to at most ln max_scale; call it after each optimizer step."""
        self.log_scale.clamp_(max=math.log(self.max_scale))

    def forward(
        self,
        query: Tensor,  # [N, D]
        key: Tensor,  # [M, D]
        *,
        positives: Tensor | tuple[Tensor, Tensor] | None = None,
        weight: Tensor | None = None,  # [N]
    ) -> Tensor:
        """The loss, a scalar or [N] with reduction "none"; targets, shapes and errors as in `info_nce`."""
        return vlmkernels.info_nce(
            query,
            key,
            self.scale(),
            positives=positives,
            symmetric=self.symmetric,
            label_smoothing=self.label_smoothing,
            normalize=self.normalize,
            weight=weight,
            reduction=self.reduction,
            store_bytes=self.store_bytes,
        )


class LinearCrossEntropyLoss(nn.Module):
    """`vlmkernels.linear_cross_entropy` with its options, as torch.nn.CrossEntropyLoss has those of its own.

    The classes' weight is not a parameter of the loss: give that of the model's head, which stays where it is
    and may be tied to an embedding.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(
        self,
        hidden: Tensor,  # [..., D]
        weight: Tensor,  # [V, D]
        target: Tensor,  # [...] int64
        bias: Tensor | None = None,  # [V]
        *,
        column_scale: Tensor | None = None,  # [V]
    ) -> Tensor:
        """The loss, a scalar or [...] with reduction "none"; errors as in `linear_cross_entropy`."""
        return vlmkernels.linear_cross_entropy(
            hidden,
            weight,
            target,
            bias=bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            column_scale=column_scale,
            reduction=self.reduction,
        )


class KnowledgeDistillationLoss(nn.Module):
    """`vlmkernels.distillation` of logits, or `vlmkernels.linear_distillation` of hidden states, of any
    leading shape.

    Weights are not parameters of the loss: give those of the models' heads, which stay where they are.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        hard_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "batchmean",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.divergence = divergence
        self.beta = beta
        self.hard_weight = hard_weight
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(
        self,
        student_logits: Tensor | None = None,  # [..., V]
        teacher_logits: Tensor | None = None,  # [..., V]
        target: Tensor | None = None,  # [...] int64
        *,
        student_hidden: Tensor | None = None,  # [..., D_s]
        student_weight: Tensor | None = None,  # [V, D_s]
        teacher_hidden: Tensor | None = None,  # [..., D_t]
        teacher_weight: Tensor | None = None,  # [V, D_t]
        student_bias: Tensor | None = None,  # [V]
        teacher_bias: Tensor | None = None,  # [V]
        teacher_topk: tuple[Tensor, Tensor] | None = None,  # log-probabilities and classes, both [..., k]
    ) -> Tensor:
        """The loss, a scalar or [...] with reduction "none"; errors as in the ops.

        Of the logits of both, or of `student_hidden` and `student_weight` with one teacher: `teacher_hidden`
        and `teacher_weight`, or `teacher_topk`.
        """
        logits = _given(student_logits=student_logits, teacher_logits=teacher_logits)
        hidden = _given(
            student_hidden=student_hidden, teacher_hidden=teacher_hidden, teacher_topk=teacher_topk
        )
        heads = _given(
            student_weight=student_weight,
            teacher_weight=teacher_weight,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
        )
        whole = len(logits) == 2 or (student_hidden is not None and student_weight is not None)
        if not whole or (logits and (hidden or heads)):
            raise ValueError(
                "student_logits and teacher_logits must be given, or student_hidden and student_weight with "
                f"a teacher, got {', '.join((*logits, *hidden, *heads)) or 'none'}"
            )
        rows = logits or hidden
        tensors = [x for value in rows.values() for x in (value if isinstance(value, tuple) else (value,))]
        leading = tensors[0].shape[:-1]
        if (
            any(x.shape[:-1] != leading for x in tensors)
            or (logits and tensors[0].shape != tensors[1].shape)
            or (target is not None and target.shape != leading)
        ):
            last = "V" if logits else "*"
            shapes = [list(x.shape) for x in (*tensors, target) if x is not None]
            raise ValueError(f"{' and '.join(rows)} must be [..., {last}] and target [...], got {shapes}")

        def flat(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(flat, value))
            return value.reshape(leading.numel(), value.shape[-1])

        loss = (vlmkernels.distillation if logits else vlmkernels.linear_distillation)(
            **{name: flat(value) for name, value in rows.items()},
            **heads,
            temperature=self.temperature,
            divergence=self.divergence,
            beta=self.beta,
            target=None if target is None else target.reshape(-1),
            hard_weight=self.hard_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )
        return loss.reshape(leading) if self.reduction == "none" else loss


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
