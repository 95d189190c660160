"""Attention modules of other code bases on `vlmkernels.interval_attention`.

A call is exact without dropout in training if it has no mask, `is_causal`, or a mask tensor in which each
query attends to one interval of keys (`_masks`); all other calls run the module's own code. On an accelerator
torch's kernels are used.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import vlmkernels
from vlmkernels import intervals
from vlmkernels._modules import are_plain, is_exactly
from vlmkernels.integrations import _masks
from vlmkernels.integrations._swap import Rule, is_traced_or_transformed, own
from vlmkernels.intervals import Intervals


def attend(
    query: Tensor,  # [B, H, Tq, Dh]
    key: Tensor,  # [B, Hkv, Tk, Dh]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    seen: Intervals | None = None,  # of keys for each query, all when None
    *,
    causal: bool = False,  # aligned at the first query and the first key
    scale: float | None = None,
) -> Tensor:  # [B, H, Tq, Dv]
    if seen is None:
        if causal:
            seen = intervals.causal(query.shape[2], device=query.device)
        else:
            seen = intervals.full(query.shape[2], key.shape[2], device=query.device)
    return vlmkernels.interval_attention(query, key, value, seen, scale=scale)


def fits(query: Tensor, key: Tensor, value: Tensor, scale: Any = None) -> bool:
    """Whether these are non-empty operands of the same batch on the CPU."""
    return (
        are_plain(query, key, value)
        and query.device.type == "cpu"
        and query.dim() == key.dim() == value.dim() == 4
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[1] % max(key.shape[1], 1) == 0
        and key.shape[1] == value.shape[1]
        and min(query.shape[2], key.shape[2]) > 0
        and not isinstance(scale, Tensor)
    )


class AttentionRule(Rule):
    patch_needs = frozenset({"attention"})
    patch_runs = "vlmkernels.interval_attention"


class TorchMultiheadAttention(AttentionRule):
    """torch.nn.MultiheadAttention; calls that request the attention weights run torch's code."""

    patch_runs = "vlmkernels.interval_attention if need_weights=False"

    batch_first: bool
    dropout: float
    num_heads: int
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    out_proj: nn.Linear

    @classmethod
    def patch_matches(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @classmethod
    def patch_refuses(cls, module: Any) -> str | None:
        if type(module) is not nn.MultiheadAttention:
            return "a subclass of torch.nn.MultiheadAttention with its own forward"
        if module.bias_k is not None or module.add_zero_attn:
            return "add_bias_kv and add_zero_attn append keys"
        return None

    def forward(  # type: ignore[override]
        self,
        query: Tensor,  # [B, Tq, D] or [Tq, B, D]
        key: Tensor,  # [B, Tk, D] or [Tk, B, D]
        value: Tensor,  # as key
        key_padding_mask: Tensor | None = None,  # [B, Tk]
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # [Tq, Tk] or [B H, Tq, Tk]
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        exact = (
            not need_weights
            and not (self.training and self.dropout > 0)
            and query.device.type == "cpu"
            and type(self) is self.patch_class  # no parametrization
            and is_exactly(out_proj := self.out_proj, nn.modules.linear.NonDynamicallyQuantizableLinear)
            and are_plain(query, key, value, *self._parameters.values(), *out_proj._parameters.values())
            and query.dim() == key.dim() == value.dim() == 3
            and not any(x.is_nested for x in (query, key, value))
            and min(query.numel(), key.numel()) > 0
            and query.shape[1 - self.batch_first] == key.shape[1 - self.batch_first]
        )
        seen, causal = None, False
        if exact:
            batch, queries = query.shape[1 - self.batch_first], query.shape[self.batch_first]
            shape = batch, self.num_heads, queries, key.shape[self.batch_first]
            if attn_mask is not None and is_causal and key_padding_mask is None:
                causal = True  # torch trusts the hint and does not look at the mask
            elif attn_mask is not None:
                seen = self._seen(attn_mask, shape)
                exact = seen is not None
            else:
                exact = not is_causal
        if exact and key_padding_mask is not None:
            padding = self._not_padding(key_padding_mask, shape)
            seen, exact = _masks.both(seen, padding), padding is not None
        if not exact:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = self._projections(query, key, value)
        if not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = attend(q, k, v, seen, causal=causal).transpose(1, 2).flatten(2)
        if not self.batch_first:
            out = out.transpose(0, 1)
        return self.patch_linear(out, out_proj.weight, out_proj.bias), None

    def _seen(self, attn_mask: Tensor, shape: tuple[int, int, int, int]) -> Intervals | None:
        batch, heads, *tokens = shape
        if attn_mask.shape not in ((*tokens,), (batch * heads, *tokens)):
            return None
        mask = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads))
        return _masks.intervals_of(mask, shape, true_is_seen=False, owner=attn_mask)

    def _not_padding(self, mask: Tensor, shape: tuple[int, int, int, int]) -> Intervals | None:
        if mask.shape != (shape[0], shape[3]):
            return None
        return _masks.intervals_of(mask[:, None, None], shape, true_is_seen=False, owner=mask)

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            q, k, v = self.patch_linear(query, weight, bias).chunk(3, -1)
            return q, k, v
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = weights if weight is None else weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = map(self.patch_linear, (query, key, value), weights, biases)
        return q, k, v

    @staticmethod
    def patch_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class TorchMultiheadAttentionLinear(TorchMultiheadAttention):
    """The same including its projections, for which torch calls no layer."""

    patch_needs = frozenset({"attention", "linear"})
    patch_runs = "vlmkernels.interval_attention and linear if need_weights=False"

    @staticmethod
    def patch_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return vlmkernels.linear(x, weight, bias)


_sdpa: Callable[..., Any] | None = None  # transformers' function of that name


def _transformers_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, Tq, Dh]
    key: Tensor,  # [B, Hkv, Tk, Dh]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The result of transformers' "sdpa"; calls that are not exact here are delegated to it."""
    sinks = [name for name in ("s_aux", "sinks") if kwargs.get(name) is not None]
    if sinks:  # which "sdpa" ignores; models that have them never use it
        cls = type(module).__name__
        raise ValueError(
            f"attn_implementation='vlmkernels' has no attention sinks ({sinks[0]} of {cls}): set 'eager'"
        )
    options = ("position_bias", "cache", "softcap", "output_attentions")
    exact = (
        (type(module) is _Call or not is_traced_or_transformed())  # a patched module has checked
        and dropout == 0
        and all(kwargs.get(name) is None or kwargs[name] is False for name in options)
        and fits(query, key, value, scaling)
    )
    seen, causal = None, False
    if exact and attention_mask is not None:
        seen = _masks.intervals_of(attention_mask, (*query.shape[:3], key.shape[2]))
        exact = seen is not None
    elif exact:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        causal = causal and query.shape[2] > 1
    if not exact:
        assert _sdpa is not None
        return _sdpa(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )  # fmt: skip
    out = attend(query, key, value, seen, causal=causal, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


class _Config:
    """A configuration in which "sdpa" is replaced by the name of our function."""

    def __init__(self, behind: Any) -> None:
        self._behind = behind

    @property
    def _attn_implementation(self) -> str:
        name = self._behind._attn_implementation
        return "vlmkernels" if name == "sdpa" else name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)


class _Call:
    """A module during a call of its forward, whose configuration names our function."""

    def __init__(self, module: nn.Module) -> None:
        object.__setattr__(self, "_module", module)

    @property
    def config(self) -> _Config:
        return _Config(self._module.config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


class TransformersAttention(AttentionRule):
    """Attention modules of transformers that look up their attention function in its registry.

    Configurations, and therefore the masks that transformers builds, stay those of "sdpa"; after
    ``model.set_attn_implementation("eager")`` the module runs transformers' code.
    """

    @classmethod
    def patch_matches(cls, module: nn.Module) -> bool:
        return "ALL_ATTENTION_FUNCTIONS" in _names_in_forward(module)

    @classmethod
    def patch_refuses(cls, module: Any) -> str | None:
        if inspect.unwrap(type(module).forward).__globals__["ALL_ATTENTION_FUNCTIONS"] is not _registry():
            return "its file has attention functions of its own"
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if implementation in ("sdpa", "vlmkernels"):
            return None
        if implementation == "eager":
            why = "attn_implementation='eager' returns the attention weights"
            return f"{why}; 'sdpa' can be patched" if _has_sdpa(module) else why
        return f"attn_implementation={implementation!r} is not 'sdpa'"

    @classmethod
    def patch_ready(cls) -> None:
        global _sdpa
        _sdpa = _registry()["sdpa"]
        _registry().register("vlmkernels", _transformers_attention)
        masks = sys.modules["transformers.masking_utils"].ALL_MASK_ATTENTION_FUNCTIONS  # type: ignore[attr-defined]
        masks.register("vlmkernels", masks["sdpa"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return own(self).forward(_Call(self), *args, **kwargs)


def _registry() -> Any:
    return sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS


def _has_sdpa(module: nn.Module) -> bool:
    """Whether all models of the file that the module comes from can switch to "sdpa"."""
    names = inspect.unwrap(type(module).forward).__globals__
    classes = [x for x in names.values() if isinstance(x, type) and x.__module__ == names["__name__"]]
    models = [cls for cls in classes if hasattr(cls, "_supports_sdpa")]
    return bool(models) and all(cls._supports_sdpa for cls in models)  # type: ignore[attr-defined]


class _Redirect(TorchFunctionMode):
    """Intercepts the calls of torch's scaled_dot_product_attention that can be computed exactly."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _scaled_dot_product_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    exact = dropout_p == 0 and fits(query, key, value, scale) and not (is_causal and attn_mask is not None)
    exact = exact and (enable_gqa or query.shape[1] == key.shape[1])
    seen = None
    if exact and attn_mask is not None:
        seen = _masks.intervals_of(attn_mask, (*query.shape[:3], key.shape[2]))
        exact = seen is not None
    if exact:
        return attend(query, key, value, seen, causal=is_causal, scale=scale)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class ScaledDotProductAttention(AttentionRule):
    """Any module whose forward calls torch's scaled_dot_product_attention, for example timm's Attention."""

    patch_runs = "vlmkernels.interval_attention; its original code under torch.compile"

    @classmethod
    def patch_matches(cls, module: nn.Module) -> bool:
        return "scaled_dot_product_attention" in _names_in_forward(module)

    @classmethod
    def patch_refuses(cls, module: Any) -> str | None:
        if getattr(module, "fused_attn", True) is False or getattr(module, "scaled_cosine", False):
            return "it is set to compute attention without scaled_dot_product_attention"
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler does not trace every method under a mode
            return super().forward(*args, **kwargs)
        with _Redirect():
            return super().forward(*args, **kwargs)


def _names_in_forward(module: nn.Module) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code.co_names if code is not None else ()


ATTENTION: tuple[type[AttentionRule], ...] = (
    TorchMultiheadAttentionLinear,
    TorchMultiheadAttention,
    TransformersAttention,
    ScaledDotProductAttention,
)
