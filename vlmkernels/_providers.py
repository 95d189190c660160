"""Attention by other libraries, which `interval_attention` calls on CUDA where they know the mask.

flash-attn, 3 or 2, computes full and causal attention and segments of any length; torch's SDPA, by its
FlashAttention or cuDNN, full and causal attention. A provider is tried once for each dtype, head width and
card, on a few tokens, and not used where that fails. Results have the shapes, layout and meaning of those of
our kernels, so that a backward may be another's, and are the same from run to run.
"""

from __future__ import annotations

import abc
import functools
import importlib
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from vlmkernels.reference._attention import empty_heads_merged

VARIABLE = "VLMKERNELS_PROVIDERS"
NAMES = ("flash", "sdpa")
HALF = (torch.bfloat16, torch.float16)
WIDEST = 256
MOST = 2**16 - 1  # samples or segments of one launch


def _allowed(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")] if text else list(NAMES)
    if names == ["none"]:
        return ()
    if not set(names) <= set(NAMES):
        raise ValueError(f"{VARIABLE} must be none, flash, sdpa or flash,sdpa, got {text!r}")
    return tuple(names)


ALLOWED = _allowed(os.environ.get(VARIABLE, ""))


class Call(NamedTuple):
    """A call of interval_attention whose mask is known."""

    query: Tensor  # [B, H, Tq, D]
    key: Tensor  # [B, Hkv, Tk, D]
    value: Tensor  # [B, Hkv, Tk, D]
    scale: float
    causal: bool  # the last query sees the last key, in each segment if there are some
    ends: tuple[Tensor, Tensor] | None = None  # of the segments' queries and keys, 0 first

    @property
    def is_grouped(self) -> bool:
        return self.query.shape[1] != self.key.shape[1]

    @property
    def segments(self) -> int:
        return self.query.shape[0] if self.ends is None else self.ends[0].shape[0] - 1

    @property
    def longest(self) -> tuple[int | None, int | None]:
        """No segment has more queries or keys."""
        return (None, None) if self.ends is None else (self.query.shape[2], self.key.shape[2])

    def is_simple(self) -> bool:
        """Whether dtype, sizes, layout and scale are those that every provider takes."""
        query, key, value = tensors = self[:3]
        return (
            query.dtype in HALF
            and query.shape[-1] == value.shape[-1] <= WIDEST
            and all(x.numel() > 0 and _is_aligned(x) for x in tensors)
            and (self.ends is not None or not self.causal or query.shape[2] <= key.shape[2])
            and self.segments <= MOST
            and self.scale > 0
        )

    def tokens_first(self, *tensors: Tensor) -> list[Tensor]:
        """[B, T, H, D] of each [B, H, T, D]; for segments [B T, H, D]."""
        return [x.transpose(1, 2) if self.ends is None else x.transpose(1, 2).flatten(0, 1) for x in tensors]


def call_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    relative_bias: Tensor | None,
    causal: bool | None,
    query_ends: Tensor | None,
    key_ends: Tensor | None,
) -> Call | None:
    """The call of the op with these arguments; None where no provider has what it asks."""
    if causal is None or relative_bias is not None:
        return None
    if query_ends is None or key_ends is None:
        return Call(query, key, value, scale, causal and query.shape[2] > 1)  # one query sees all
    return Call(query, key, value, scale, causal, (query_ends, key_ends))


def _is_aligned(x: Tensor) -> bool:
    """Whether its rows, of a whole number of 16 bytes, can be read by so many at once."""
    sides = (*x.stride()[:-1], x.shape[-1])
    in_bytes = [x.data_ptr(), *(side * x.element_size() for side in sides)]
    return x.stride(-1) == 1 and not any(size % 16 for size in in_bytes)


class Provider(abc.ABC):
    name: str  # in the environment variable
    title: str
    module: str | None = None  # that has to be installed
    takes_segments = False
    has_backward = True

    def missing(self) -> str:
        return "" if self.module is None or _is_installed(self.module) else "not installed"

    @abc.abstractmethod
    def takes(self, call: Call) -> bool:
        """Whether it computes the call, which is simple, as our kernels do."""

    @abc.abstractmethod
    def takes_backward(self, call: Call) -> bool:
        """Whether it computes the gradients, with the same bits in each run."""

    @abc.abstractmethod
    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """As the op's."""

    @abc.abstractmethod
    def backward(self, call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """The gradients of query, key and value."""


class Flash2(Provider):
    """flash-attn by the functions that its own autograd calls, which return a log-sum-exp."""

    name = "flash"
    title = "flash-attn 2"
    module = "flash_attn.flash_attn_interface"
    takes_segments = True

    def library(self) -> Any:
        return importlib.import_module(self.module)

    def takes(self, call: Call) -> bool:
        return True

    def takes_backward(self, call: Call) -> bool:
        return True

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        batch, _, tokens, _ = call.query.shape
        out, lse = self.call_forward(call, *call.tokens_first(*call[:3]))
        if call.ends is not None:  # a query without keys has plus or minus infinity there
            lse = lse.masked_fill(lse == torch.inf, -torch.inf)
            lse = lse.unflatten(1, (batch, tokens)).transpose(0, 1)
            out = out.unflatten(0, (batch, tokens))
        return out.contiguous().transpose(1, 2), lse.contiguous()

    def backward(self, call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        grads = tuple(empty_heads_merged(x, x.shape) for x in call[:3])
        if call.ends is not None:
            lse = lse.transpose(0, 1).flatten(1)
        tensors = call.tokens_first(dout, *call[:3], out)
        self.call_backward(call, tensors, lse, call.tokens_first(*grads))
        return grads

    def call_forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        options = {
            "dropout_p": 0.0, "softmax_scale": call.scale, "causal": call.causal, "window_size_left": -1,
            "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None, "return_softmax": False,
        }  # fmt: skip
        if call.ends is None:
            out, lse, *_ = self.library()._flash_attn_forward(q, k, v, **options)
        else:
            out, lse, *_ = self.library()._flash_attn_varlen_forward(
                q, k, v, *call.ends, *call.longest, **options
            )
        return out, lse

    def call_backward(self, call: Call, tensors: list[Tensor], lse: Tensor, into: list[Tensor]) -> None:
        options = {
            "dropout_p": 0.0, "softmax_scale": call.scale, "causal": call.causal, "window_size_left": -1,
            "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None, "deterministic": True,
            "rng_state": lse.new_empty(2, dtype=torch.int64),
        }  # fmt: skip
        if call.ends is None:
            self.library()._flash_attn_backward(*tensors, lse, *into, **options)
        else:
            self.library()._flash_attn_varlen_backward(
                *tensors, lse, *into, *call.ends, *call.longest, **options
            )


class Flash3(Flash2):
    """The same of version 3. Arguments go by place, since releases differ in their names."""

    title = "flash-attn 3"
    module = "flash_attn_interface"

    def takes_backward(self, call: Call) -> bool:
        return not call.is_grouped  # whose deterministic form counts on memory that it does not set

    def call_forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ends = call.ends or (None, None)
        places = (*(None,) * 4, *ends, *(None,) * 3, *call.longest, *(None,) * 9, call.scale, call.causal)
        out, lse, *_ = self.library()._flash_attn_forward(q, k, v, *places)
        return out, lse

    def call_backward(self, call: Call, tensors: list[Tensor], lse: Tensor, into: list[Tensor]) -> None:
        ends = call.ends or (None, None)
        places = (*ends, None, None, *call.longest, *into, call.scale, call.causal)
        self.library()._flash_attn_backward(*tensors, lse, *places, deterministic=True)


class SdpaFlash(Provider):
    """The FlashAttention of torch, where its scaled_dot_product_attention would choose it.

    Its gradients are the same in each run only under torch.use_deterministic_algorithms.
    """

    name = "sdpa"
    title = "SDPA, FlashAttention"
    backend = SDPBackend.FLASH_ATTENTION

    def takes(self, call: Call) -> bool:
        from_first = not call.causal or call.query.shape[2] == call.key.shape[2]
        simple = call.ends is None and from_first and not call.is_grouped
        return simple and sdpa_backend(call) == self.backend.value

    def takes_backward(self, call: Call) -> bool:
        return torch.are_deterministic_algorithms_enabled() and self.takes(call)

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            *call[:3], 0.0, call.causal, scale=call.scale
        )
        return _heads_merged(out), lse.contiguous()

    def backward(self, call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        lengths = call.query.shape[2], call.key.shape[2]
        dropout = lse.new_empty(2, dtype=torch.uint64), lse.new_empty((), dtype=torch.uint64)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout, *call[:3], out, lse, None, None, *lengths, 0.0, call.causal, *dropout, scale=call.scale
        )
        return tuple(map(_heads_merged, grads))


class SdpaCudnn(SdpaFlash):
    """That of cuDNN, whose gradients may differ from run to run."""

    title = "SDPA, cuDNN"
    backend = SDPBackend.CUDNN_ATTENTION
    has_backward = False

    def takes_backward(self, call: Call) -> bool:
        return False

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *call[:3], None, True, 0.0, call.causal, scale=call.scale
        )
        return _heads_merged(out), lse.reshape(out.shape[:3]).contiguous()


def sdpa_backend(call: Call) -> int:
    """What scaled_dot_product_attention would run."""
    return torch._fused_sdp_choice(*call[:3], None, 0.0, call.causal, scale=call.scale)


def _heads_merged(x: Tensor) -> Tensor:  # [B, H, T, D], in memory [B, T, H, D]
    return x.transpose(1, 2).contiguous().transpose(1, 2)


PROVIDERS: tuple[Provider, ...] = (Flash3(), Flash2(), SdpaFlash(), SdpaCudnn())
_TRIED: dict[tuple[str, torch.dtype, int, torch.device], str] = {}  # why it is not used there, "" if it is


@functools.cache
def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except ValueError:  # a module that another put in its place
        return True


SEGMENTS = any(x.name in ALLOWED and x.takes_segments and not x.missing() for x in PROVIDERS)


def may_run_on(x: Tensor) -> bool:
    """Whether the device of `x` is one of theirs."""
    return x.is_cuda


def take_segments(x: Tensor, count: int) -> bool:
    """Whether one of them may want so many segments on the device of `x`."""
    return SEGMENTS and may_run_on(x) and count <= MOST


def attention(call: Call | None) -> tuple[Tensor, Tensor] | None:
    """(out, lse) by the first provider that takes the call; None if there is none."""
    provider = first(call)
    return None if call is None or provider is None else provider.forward(call)


def attention_bwd(call: Call | None, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...] | None:
    """The gradients of query, key and value, likewise."""
    provider = first(call, backward=True)
    if call is None or provider is None:
        return None
    return provider.backward(call, dout if _is_aligned(dout) else dout.contiguous(), out, lse)


def first(call: Call | None, backward: bool = False) -> Provider | None:
    """The first provider that takes the call, or its backward."""
    if call is None or not call.is_simple():
        return None
    for provider in PROVIDERS:
        takes = provider.takes_backward if backward else provider.takes
        if (
            provider.name in ALLOWED
            and not provider.missing()
            and takes(call)
            and not _why_not(provider, call)
        ):
            return provider
    return None


def _why_not(provider: Provider, like: Call) -> str:
    """Why it is not used for this dtype, head width and card, which the first call finds out."""
    kind = provider.title, like.query.dtype, like.query.shape[-1], like.query.device
    if kind not in _TRIED:
        try:
            _try(provider, like.query)
            _TRIED[kind] = ""
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: it may be built for another torch or card, or have changed
            _TRIED[kind] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return _TRIED[kind]


def _try(provider: Provider, like: Tensor) -> None:
    """Its calls on a few tokens. They do not wait for the device, nor take random numbers."""
    x = like.new_zeros(1, 16, 1, like.shape[-1]).transpose(1, 2)
    ends = torch.arange(0, 17, 8, dtype=torch.int32, device=x.device)
    for causal in (False, True):
        for segments in (None, (ends, ends)) if provider.takes_segments else (None,):
            call = Call(x, x, x, 1.0, causal, segments)
            result = provider.forward(call)
            if provider.has_backward:
                provider.backward(call, x, *result)


def summary() -> dict[str, str]:
    """Of each provider where it is used so far, or why it is not."""
    found = {}
    for provider in PROVIDERS:
        tried = [
            f"{str(dtype).removeprefix('torch.')}, heads of {width}, {_card(device)}: {why or 'used'}"
            for (title, dtype, width, device), why in _TRIED.items()
            if title == provider.title
        ]
        off = "" if provider.name in ALLOWED else f"off by {VARIABLE}"
        found[provider.title] = off or provider.missing() or "; ".join(tried) or "not tried yet"
    return found


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
