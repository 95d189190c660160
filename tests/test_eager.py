"""Calls that the dispatcher has nothing to add to do without it, and all others get the op itself."""

import contextlib
import sys
from unittest import mock

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vlmkernels as vk
from tests.test_transforms import OPS
from vlmkernels import _library

# Small losses of plain arguments have kernels of their own
EVERY = [name for name in OPS if f"{name} streamed" not in OPS and name != "contrastive_distillation"]


@contextlib.contextmanager
def watched():
    """The names of the ops whose kernels are called without the dispatcher, in their order."""
    ran: list[str] = []

    def watch(name):
        op = getattr(torch.ops.vlmkernels, name).default

        def kernel(*args):
            assert not torch.is_grad_enabled()
            ran.append(name)
            return op(*args)

        return kernel

    every = {name for op in vk.ops.__all__ for name in (op, f"{op}_bwd")}
    names = [name for name in every if hasattr(torch.ops.vlmkernels, name)]
    with mock.patch.dict(_library.IN_PYTHON, {(name, "CPU"): watch(name) for name in names}):
        yield ran


def step(name, wrap=torch.Tensor.requires_grad_):
    """The result of an op and the gradient of the sum of its squares."""
    fn, shape = OPS[name]
    x = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
    x = wrap(x)
    out = fn(x)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


@pytest.mark.parametrize("name", EVERY)
def test_every_op_does_without_the_dispatcher_and_results_are_the_same(name):
    with watched() as ran:
        got = step(name)
        assert {op.removesuffix("_bwd") for op in ran} == {name.split()[0]}
        with torch.profiler.profile() as profile:
            ran.clear()
            want = step(name)
        assert ran == []
    assert f"vlmkernels::{name.split()[0]}" in {event.name for event in profile.events()}
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def call(x):
    return vk.gated_residual(x, 2 * x, x[0])


def under(context):
    def use(x):
        with context():
            return call(x)

    return use


def dual(x):
    with forward_ad.dual_level():
        return call(x)


OTHERS = {
    "profiler": under(torch.profiler.profile),
    "dispatch mode": under(Dispatch),
    "function mode": under(Function),
    "default device": under(lambda: torch.device("cpu")),
    "below autograd": under(torch._C._AutoDispatchBelowAutograd),
    "forward-mode level": dual,
    "vmap": lambda x: torch.vmap(call)(x[None])[0],
    "subclass": lambda x: call(x.as_subclass(Subclass)).as_subclass(torch.Tensor),
    "negative view": lambda x: call(torch._neg_view(-x)),
    "traced": lambda x: torch.jit.trace(call, x, check_trace=False)(x),
    "compiled": lambda x: torch.compile(call, backend="eager", fullgraph=True)(x),
    "aot": lambda x: torch.compile(call, backend="aot_eager", fullgraph=True)(x),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("other", OTHERS)
def test_what_takes_part_in_a_call_gets_the_op_itself(other):
    x = torch.randn(4, 6)
    with watched() as ran:
        got = OTHERS[other](x)
        assert ran == []
        torch.testing.assert_close(got, call(x))
        assert ran == ["gated_residual"]


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("made", [contextlib.nullcontext, torch.inference_mode])
def test_inference(mode, made):
    with made():
        x = torch.randn(4, 6)
    with watched() as ran, mode():
        got = call(x)
    assert ran == ["gated_residual"]
    assert (got.is_inference(), got.requires_grad) == (mode is torch.inference_mode, False)
    with torch.no_grad():
        torch.testing.assert_close(got, torch.ops.vlmkernels.gated_residual(x, 2 * x, x[0], None))


@pytest.mark.parametrize("parameter", [False, True])
def test_a_parameter_is_a_tensor(parameter):
    with watched() as ran:
        grads = step("gated_residual", nn.Parameter if parameter else torch.Tensor.requires_grad_)[1]
    assert ran == ["gated_residual", "gated_residual_bwd"]
    assert type(grads) is torch.Tensor


@pytest.mark.parametrize("name", ["linear", "gated_residual"])
@pytest.mark.parametrize("cache", [True, False])
def test_autocast_casts_operands_as_the_dispatcher_does(name, cache):
    """gated_residual has none."""
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
        with watched() as ran:
            got = step(name)
        with torch.profiler.profile():
            want = step(name)
    assert ran[0] == name
    assert got[0].dtype == (torch.bfloat16 if name == "linear" else torch.float32)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_a_kernel_runs_below_autocast():
    seen = []

    def kernel(x, *args):
        seen.append((torch.is_autocast_enabled("cpu"), x.dtype))
        return torch.ops.vlmkernels.linear(x, *args)

    with mock.patch.dict(_library.IN_PYTHON, {("linear", "CPU"): kernel}), torch.autocast("cpu"):
        vk.linear(torch.randn(4, 6), torch.randn(8, 6))
    assert seen == [(False, torch.bfloat16)]


def test_arguments_that_are_converted_or_refused_get_the_op_itself():
    x = torch.randn(6, 4)
    with watched() as ran:
        got = vk.info_nce(x, x, 2.0, reduction="sum", label_smoothing=0)
        assert ran == []
        torch.testing.assert_close(got, vk.info_nce(x, x, 2.0, reduction="sum", label_smoothing=0.0))
        assert ran == ["info_nce"]
        with pytest.raises(TypeError, match="info_nce: symmetric must be bool, got str"):
            vk.info_nce(x, x, 2.0, reduction="sum", symmetric="no")
        assert ran == ["info_nce"]


def test_devices_that_differ_get_the_op_itself():
    x = torch.randn(4, 6)
    with watched() as ran, pytest.raises(ValueError, match=r"gated_residual: .*same device"):
        sys.modules["vlmkernels.ops.gated_residual"]._op(x, x.to("meta"), x[0], None)
    assert ran == []


def test_there_is_no_second_derivative():
    x = torch.randn(4, 6, requires_grad=True)
    with watched() as ran:
        (grad,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        assert ran == ["gated_residual", "gated_residual_bwd"]
        with pytest.raises(RuntimeError, match=r"vlmkernels\.gated_residual has no second derivative"):
            torch.autograd.grad(grad.sum(), x)


def test_a_thread_in_a_mode_leaves_other_threads_alone():
    assert _library._autocast_of_plain_eager() == frozenset()
    with torch.autocast("cpu"):
        assert _library._autocast_of_plain_eager() == {"CPU"}
    with torch.inference_mode(), torch.autocast("cpu"):
        assert _library._autocast_of_plain_eager() == {"CPU"}
