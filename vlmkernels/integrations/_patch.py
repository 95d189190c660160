"""`patch(model)` and its inverse."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from vlmkernels.integrations import _swap
from vlmkernels.integrations._swap import Rule
from vlmkernels.integrations.attention import ATTENTION
from vlmkernels.integrations.eager_attention import EAGER_ATTENTION, UnknownAttention
from vlmkernels.integrations.fused_loss import FUSED_LOSS
from vlmkernels.integrations.linear import LINEAR
from vlmkernels.integrations.losses import LOSSES
from vlmkernels.integrations.padding import PADDING
from vlmkernels.integrations.sentence_losses import SENTENCE_LOSSES

_LOSSES = (*LOSSES, *SENTENCE_LOSSES)
_RULES: tuple[type[Rule], ...] = (
    *_LOSSES,
    *FUSED_LOSS,
    *PADDING,
    *EAGER_ATTENTION,
    *ATTENTION,
    *LINEAR,
    UnknownAttention,
)


class Entry(NamedTuple):
    """One module of a report."""

    name: str  # as in named_modules(); "" is the module that was given
    cls: str
    status: str  # "patched" or "refused"
    why: str  # what runs, or the reason


class Report(list[Entry]):
    """The modules that `patch` considered; str() is a readable table."""

    @property
    def patched(self) -> list[Entry]:
        return [entry for entry in self if entry.status == "patched"]

    @property
    def refused(self) -> list[Entry]:
        return [entry for entry in self if entry.status == "refused"]

    def __str__(self) -> str:
        rows = [("module", "class", "", "what runs, or why not"), *self]
        rows = [(name or "(itself)", cls.rpartition(".")[2], *rest) for name, cls, *rest in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def patch(
    model: nn.Module,
    *,
    loss: bool = True,
    attention: bool = True,
    linear: bool = True,
    padding: bool = True,
    fused_loss: bool = False,
) -> Report:
    """Makes the modules of a live model run on the ops of this library, in place.

    Each module remains the same object, with its parameters, buffers, hooks, names and flags; only its class
    is replaced by a subclass of it. Patched models can be copied, pickled, saved, checkpointed, wrapped and
    compiled; compile after patching. A module that cannot be computed exactly is refused. Under conditions
    that are known only at call time (dropout in training, an unsupported mask) its own code runs.

    Args:
        model: any module, including a loss; wrappers (DistributedDataParallel) are unwrapped.
        loss: contrastive losses of open_clip, of sentence-transformers, and of transformers' CLIP, SigLIP
            and ALIGN.
        attention: attention modules.
        linear: linear layers, and MLPs of two of them, plain or gated: torch.nn.Sequential, and classes whose
            forward only calls the layers.
        padding: text towers of open_clip's CLIP, which then skip the columns after the longest text.
        fused_loss: causal and masked language models of transformers, and its vision-language models, which
            in training with labels compute their loss from the hidden states and return None for the logits.

    Returns:
        The report, with one entry per module that matches a rule: what runs, or the reason why not. Modules
        that are already patched stay patched; a second call can add options.
    """
    options = {
        "loss": loss, "attention": attention, "linear": linear, "padding": padding, "fused_loss": fused_loss,
    }  # fmt: skip
    requested = {name for name, wanted in options.items() if wanted}
    report = Report()
    for name, module in list(model.named_modules()):
        needs, before = requested, _swap.rule_of(module)
        if before is not None:
            if _swap.cannot_restore(module):
                continue
            needs = requested | before.patch_needs
            _swap.restore(module)
        rule = next((r for r in _RULES if r.patch_needs <= needs and r.patch_matches(module)), None)
        if rule is None:
            continue
        why = _swap.cannot_swap(module) or rule.patch_refuses(module)
        if why is None:
            _swap.swap(module, rule)
        if rule.patch_needs & requested:
            cls = _swap.qualified_name(type(module))
            report.append(
                Entry(name, cls, *(("patched", rule.patch_runs) if why is None else ("refused", why)))
            )
    return report


def unpatch(model: nn.Module) -> None:
    """Restores the class of every patched module of `model`.

    Raises:
        ValueError: naming the modules whose class was changed again after the patch; no module of the model
            is restored then.
    """
    patched = {name: module for name, module in model.named_modules() if _swap.rule_of(module) is not None}
    faults = [
        f"{name or '(itself)'}: {why}" for name, m in patched.items() if (why := _swap.cannot_restore(m))
    ]
    if faults:
        raise ValueError("unpatch: " + "; ".join(faults))
    for module in patched.values():
        _swap.restore(module)


def drop_in(cls: type[nn.Module]) -> type[nn.Module]:
    """The class to use instead of a loss class: a subclass of it with the same constructor.

    Args:
        cls: ClipLoss, CoCaLoss, SigLipLoss or DistillClipLoss of open_clip, MultipleNegativesRankingLoss or
            CachedMultipleNegativesRankingLoss of sentence-transformers.

    Raises:
        ValueError: for another class.
    """
    rule = next((rule for rule in _LOSSES if rule.takes_class(cls)), None)
    if rule is None:
        wanted = "a contrastive loss class of open_clip or sentence-transformers"
        raise ValueError(f"drop_in: cls must be {wanted}, got {_swap.qualified_name(cls)}")
    return _swap.swapped(cls, rule)
