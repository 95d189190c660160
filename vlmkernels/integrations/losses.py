"""Contrastive losses of open_clip and transformers on `vlmkernels.info_nce` and `vlmkernels.sigmoid_loss`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

import vlmkernels
from vlmkernels import nn as ours
from vlmkernels._arguments import under_autocast
from vlmkernels.integrations._swap import Rule, is_traced_or_transformed, qualified_name


class LossRule(Rule):
    patch_needs = frozenset({"loss"})

    @classmethod
    def takes_class(cls, original: type[nn.Module]) -> bool:
        """Whether the class can be constructed in its patched form."""
        return False


def _forward_of(ours: type[nn.Module]) -> Callable:
    """The forward of our loss; outside autocast the result has the dtype of the features, as in open_clip."""

    @functools.wraps(ours.forward)
    def forward(self: Any, image_features: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_traced_or_transformed():
            return self.patch_own.forward(self, image_features, *args, **kwargs)
        result = ours.forward(self, image_features, *args, **kwargs)
        if under_autocast(image_features.device.type):
            return result
        if isinstance(result, dict):
            return {name: loss.to(image_features.dtype) for name, loss in result.items()}
        if isinstance(result, tuple):
            return tuple(loss.to(image_features.dtype) for loss in result)
        return result.to(image_features.dtype)

    return forward


class ClipLoss(ours.ClipLoss):
    forward = _forward_of(ours.ClipLoss)  # not in a base class, which would come after open_clip's class


class SigLipLoss(ours.SigLipLoss):
    forward = _forward_of(ours.SigLipLoss)


class ClipDistillLoss(ours.ClipDistillLoss):
    forward = _forward_of(ours.ClipDistillLoss)


class OpenClipLoss(LossRule):
    """open_clip's ClipLoss, and CoCaLoss, whose contrastive part is ClipLoss.forward."""

    patch_runs = "vlmkernels.info_nce"
    patch_methods = ()
    names: ClassVar[tuple[str, ...]] = ("open_clip.loss.ClipLoss", "open_clip.loss.CoCaLoss")
    ours: ClassVar[type[nn.Module]] = ClipLoss

    @classmethod
    def takes_class(cls, original: type[nn.Module]) -> bool:
        return qualified_name(original) in cls.names

    @classmethod
    def patch_matches(cls, module: nn.Module) -> bool:
        return any(cls.takes_class(base) for base in type(module).__mro__)

    @classmethod
    def patch_refuses(cls, module: Any) -> str | None:
        if not cls.takes_class(type(module)):
            return "a subclass that builds the logits itself"
        if getattr(module, "use_horovod", False):
            return "use_horovod: features are gathered with torch.distributed"
        if module.world_size > 1 and not getattr(module, "gather_with_grad", True):
            return "gather_with_grad=False leaves out a part of the gradient, vlmkernels.nn.ClipLoss does not"
        return None

    @classmethod
    def patch_bases(cls, original: type[nn.Module]) -> tuple[type, ...]:
        """Our forward comes directly before that of the base class, after what a subclass adds to it."""
        *added, base = cls._known(original)
        return (cls, *added, cls.ours, base)

    @classmethod
    def patch_facts(cls, original: type[nn.Module]) -> dict[str, Any]:
        return {"patch_own": cls._known(original)[-1]}

    @classmethod
    def _known(cls, original: type[nn.Module]) -> list[type[nn.Module]]:
        return [c for c in original.__mro__ if qualified_name(c) in cls.names]


class OpenSigLipLoss(OpenClipLoss):
    patch_runs = "vlmkernels.sigmoid_loss"
    names = ("open_clip.loss.SigLipLoss",)
    ours = SigLipLoss


class OpenDistillLoss(OpenClipLoss):
    patch_runs = "vlmkernels.info_nce, vlmkernels.contrastive_distillation"
    names = ("open_clip.loss.DistillClipLoss",)
    ours = ClipDistillLoss


class _ModelLoss(LossRule):
    """A model of transformers that returns loss and logits: our loss is computed from the features.

    The logits are an output and are computed as before, but no gradient of the loss flows through them.
    """

    name: ClassVar[str]

    @classmethod
    def patch_matches(cls, module: nn.Module) -> bool:
        return qualified_name(type(module)) == cls.name

    def contrastive_loss(self, texts: Tensor, images: Tensor) -> Tensor:
        raise NotImplementedError  # every model has its own; not abc, for the reason given in Rule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("return_loss"):
            return super().forward(*args, **kwargs)
        return_dict = kwargs.pop("return_dict", None)
        kwargs["return_loss"] = False
        output = super().forward(*args, **kwargs, return_dict=True)
        loss = self.contrastive_loss(output.text_embeds, output.image_embeds)
        if not under_autocast(loss.device.type):
            loss = loss.to(output.logits_per_text.dtype)
        output = type(output)(loss=loss, **output)
        if return_dict is None:
            return_dict = self.config.return_dict  # type: ignore[union-attr]
        return output if return_dict else output.to_tuple()


class TransformersClip(_ModelLoss):
    patch_runs = "vlmkernels.info_nce for the loss"
    name = "transformers.models.clip.modeling_clip.CLIPModel"
    logit_scale: Tensor

    def contrastive_loss(self, texts: Tensor, images: Tensor) -> Tensor:
        return vlmkernels.info_nce(texts, images, self.logit_scale.exp())


class TransformersAlign(_ModelLoss):
    patch_runs = "vlmkernels.info_nce for the loss"
    name = "transformers.models.align.modeling_align.AlignModel"
    temperature: Tensor

    def contrastive_loss(self, texts: Tensor, images: Tensor) -> Tensor:
        return vlmkernels.info_nce(texts, images, 1 / self.temperature, label_smoothing=0.1)


class TransformersSiglip(_ModelLoss):
    patch_runs = "vlmkernels.sigmoid_loss for the loss"
    name = "transformers.models.siglip.modeling_siglip.SiglipModel"
    logit_scale: Tensor
    logit_bias: Tensor

    def contrastive_loss(self, texts: Tensor, images: Tensor) -> Tensor:
        return vlmkernels.sigmoid_loss(texts, images, self.logit_scale.exp(), self.logit_bias)


LOSSES: tuple[type[LossRule], ...] = (
    OpenDistillLoss,  # before that of its base class
    OpenClipLoss,
    OpenSigLipLoss,
    TransformersClip,
    TransformersAlign,
    TransformersSiglip,
)
