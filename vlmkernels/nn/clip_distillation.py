"""Losses that teach a CLIP by another: `info_nce`, `contrastive_distillation`, `embedding_distillation`.

`ClipDistillLoss` replaces open_clip 3.3.0's class: same constructor, same forward, but no N x N matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import vlmkernels
from vlmkernels.nn.losses import ClipLoss

Features = tuple[Tensor, Tensor]  # of images and of texts


class ClipDistillLoss(ClipLoss):
    """The contrastive loss and the distillation from a teacher, as open_clip.DistillClipLoss.

    The distillation is the cross-entropy of the teacher's softmaxes over the batch against the student's,
    averaged over rows and columns: the affinity mimicking of TinyCLIP (Wu et al. 2023). The widths of student
    and teacher may differ, and the teacher gets no gradient. The arguments are those of `ClipLoss`; with
    `world_size` > 1 the features of all processes are gathered as there, the teacher's as well.
    """

    def forward(  # type: ignore[override]  # open_clip's classes differ like this
        self,
        image_features: Tensor,  # [N, D], L2-normalised
        text_features: Tensor,  # [N, D], L2-normalised
        logit_scale: Tensor | float,  # one element
        dist_image_features: Tensor,  # [N, E], L2-normalised
        dist_text_features: Tensor,  # [N, E], L2-normalised
        dist_logit_scale: Tensor | float,  # one element
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """The two losses, fp32 (fp64 for fp64 features), with `output_dict` as {"contrastive_loss": ...,
        "distill_loss": ...}.
        """
        own, teacher = (image_features, text_features), (dist_image_features, dist_text_features)
        sizes = self._sizes(own, teacher)
        every, all_teacher = self._of_all(own, sizes), self._of_all(teacher, sizes)
        contrastive = self._contrastive(own, every, logit_scale, sizes)
        distill = self._distillation(
            (own, every, logit_scale), (teacher, all_teacher, dist_logit_scale), sizes, "cross_entropy"
        )
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill

    def _sizes(self, own: Features, teacher: Features) -> list[int]:
        """The number of rows of each rank."""
        rows = [len(x) for x in (*own, *teacher)]
        if len(set(rows)) > 1:
            raise ValueError(f"features of student and teacher must have the same number of rows, got {rows}")
        return rows[:1] if self.world_size == 1 else self._shard_sizes(*own)

    def _distillation(
        self,
        student: tuple[Features, Features, Tensor | float],
        teacher: tuple[Features, Features, Tensor | float],
        sizes: list[int],
        divergence: str,
    ) -> Tensor:
        """The distillation from the features of this rank, those of all ranks, and the scale, of both."""
        (own, every, scale), (taught, all_taught, teacher_scale) = student, teacher
        if self.world_size == 1 or not self.local_loss:
            return vlmkernels.contrastive_distillation(
                *every, scale, *all_taught, teacher_scale, divergence=divergence
            )
        rows, columns = (
            vlmkernels.contrastive_distillation(
                own[i], every[1 - i], scale, taught[i], all_taught[1 - i], teacher_scale,
                symmetric=False, divergence=divergence,
            )
            for i in (0, 1)
        )  # fmt: skip
        return 0.5 * self._share(sizes) * (rows + columns)


class ClipKDLoss(ClipDistillLoss):
    """The losses of CLIP-KD (Yang et al. 2024): a student CLIP taught by the features of another.

    Each term has a weight, and one with weight 0 is not computed:

    - `contrastive`: the student's own loss, that of `ClipLoss`;
    - `feature`: the mean squared distance of the student's features from the teacher's, of images plus texts;
    - `relational`: KL(teacher || student) of the softmaxes over the batch, rows and columns;
    - `interactive`: InfoNCE of the student's images against the teacher's texts, and of its texts against the
      teacher's images.

    The feature and interactive terms compare features of one width. Given `student_width` and `teacher_width`
    that differ, the student's pass through `image_projection` and `text_projection`, linear layers of this
    module whose parameters belong in the optimizer. The scale of the interactive term is the student's
    (CLIP-KD learns one more). The other arguments are those of `ClipLoss`; with `world_size` > 1 the feature
    and interactive terms are those of a rank's own rows, whose mean over the ranks is that of the joint
    batch, and a module with projections needs DistributedDataParallel as the model does.
    """

    def __init__(
        self,
        student_width: int | None = None,
        teacher_width: int | None = None,
        *,
        contrastive: float = 1.0,
        feature: float = 2000.0,
        relational: float = 1.0,
        interactive: float = 1.0,
        local_loss: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(local_loss, gather_with_grad=True, rank=rank, world_size=world_size)
        if (student_width is None) != (teacher_width is None):
            widths = f"{student_width} and {teacher_width}"
            raise ValueError(f"student_width and teacher_width must be given together, got {widths}")
        self.weights = {
            "contrastive": contrastive,
            "feature": feature,
            "relational": relational,
            "interactive": interactive,
        }
        if faults := [f"{name} must not be negative, got {w}" for name, w in self.weights.items() if w < 0]:
            raise ValueError("; ".join(faults))
        self.image_projection: nn.Module = nn.Identity()
        self.text_projection: nn.Module = nn.Identity()
        if student_width is not None and teacher_width is not None and student_width != teacher_width:
            self.image_projection = nn.Linear(student_width, teacher_width)
            self.text_projection = nn.Linear(student_width, teacher_width)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,  # [N, D], L2-normalised
        text_features: Tensor,  # [N, D], L2-normalised
        logit_scale: Tensor | float,  # one element
        dist_image_features: Tensor,  # [N, E], L2-normalised
        dist_text_features: Tensor,  # [N, E], L2-normalised
        dist_logit_scale: Tensor | float,  # one element
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The weighted sum, fp32 (fp64 for fp64 features), or with `output_dict` the weighted terms by name,
        "feature_loss" for example.
        """
        own = (image_features, text_features)
        teacher = (dist_image_features.detach(), dist_text_features.detach())
        sizes = self._sizes(own, teacher)
        on = {name for name, weight in self.weights.items() if weight}
        every = self._of_all(own, sizes) if on & {"contrastive", "relational"} else own
        all_teacher = self._of_all(teacher, sizes) if on & {"relational", "interactive"} else teacher
        losses = {}
        if "contrastive" in on:
            losses["contrastive"] = self._contrastive(own, every, logit_scale, sizes)
        if "relational" in on:
            losses["relational"] = self._distillation(
                (own, every, logit_scale), (teacher, all_teacher, dist_logit_scale), sizes, "kl"
            )
        if on & {"feature", "interactive"}:
            projected = self._projected(own, teacher)
            share = self._share(sizes)
        if "feature" in on:
            images, texts = (
                vlmkernels.embedding_distillation(x, y, distance="l2") / x.shape[1]
                for x, y in zip(projected, teacher, strict=True)
            )
            losses["feature"] = share * (images + texts)
        if "interactive" in on:
            losses["interactive"] = share * self._interactive(projected, all_teacher, logit_scale, sizes)
        weighted = {f"{name}_loss": self.weights[name] * loss for name, loss in losses.items()}
        if output_dict:
            return weighted
        return sum(weighted.values(), start=image_features.new_zeros((), dtype=torch.float32))

    def _projected(self, own: Features, teacher: Features) -> Features:
        projected = self.image_projection(own[0]), self.text_projection(own[1])
        for name, x, y in zip(("image", "text"), projected, teacher, strict=True):
            if x.shape != y.shape:
                raise ValueError(
                    f"the feature and interactive terms need {name} features of the teacher's shape "
                    f"{list(y.shape)}, got {list(x.shape)}: give student_width and teacher_width"
                )
        return projected

    def _interactive(
        self, projected: Features, all_teacher: Features, scale: Tensor | float, sizes: list[int]
    ) -> Tensor:
        targets = self._targets(sizes, projected[0].device)
        images, texts = (
            vlmkernels.info_nce(x, y.to(x.dtype), scale, positives=targets, symmetric=False, normalize=True)
            for x, y in zip(projected, reversed(all_teacher), strict=True)
        )
        return 0.5 * (images + texts)
