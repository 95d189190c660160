"""Layers of the models are computed past their modules only where nobody waits for a call of these."""

import contextlib
import re

import accelerate
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

from tests.every_model import CASES, build, one_process
from vlmkernels.models.visualgpt import Regions

every = pytest.mark.parametrize("name", CASES)
LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.RMSNorm)


@contextlib.contextmanager
def every_call_heard(hook=lambda *call: None):
    """With a hook of all modules every layer is called, one after the other."""
    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def called(model) -> dict[str, nn.Module]:
    """The modules below the model that have something to do; containers have not.

    Without the end of CLIP's tower, which Flamingo does not read.
    """
    idle = nn.Module.forward
    modules = {name: m for name, m in model.named_modules() if name and type(m).forward is not idle}
    modules.pop("vision_encoder.ln_post", None)
    return modules


def places(model, kinds=nn.Module) -> dict[str, nn.Module]:
    """Of modules that differ in the numbers of their layers only, the first and the last."""
    found: dict[str, list[str]] = {}
    for name, module in called(model).items():
        if isinstance(module, kinds):
            found.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    return {name: model.get_submodule(name) for names in found.values() for name in {names[0], names[-1]}}


def bent(module, inputs, out):
    if isinstance(out, list):
        return [bent(module, inputs, each) for each in out]
    if isinstance(out, dict):
        return {**out, "loss": 2 * out["loss"]}
    if isinstance(out, torch.Tensor):
        return out + out.sin()
    name = "levels" if isinstance(out, Regions) else "logits"
    return out._replace(**{name: 2 * getattr(out, name)})


def gradients(model, out) -> list[torch.Tensor | None]:
    weights = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(out.sum(), weights, allow_unused=True))


@every
def test_layers_passed_over_compute_what_their_calls_would(name):
    case, seen = build(name), set()
    with every_call_heard(lambda module, *_: seen.add(module)):
        wanted = case.run()
    assert [path for path, module in called(case.model).items() if module not in seen] == []
    got = case.run()
    close(got, wanted)
    for a, b in zip(gradients(case.model, got), gradients(case.model, wanted), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)


@pytest.mark.sampled(3)
@every
def test_hooks_and_replaced_forwards_change_the_result(name):
    case = build(name)
    plain = case.run()
    for path, module in places(case.model).items():
        handle = module.register_forward_hook(bent)
        got = case.run()
        with every_call_heard():
            close(got, case.run())
        handle.remove()
        assert (got - plain).abs().max() > 1e-9, path
        own = module.forward
        module.forward = lambda *inputs, own=own, **options: bent(None, None, own(*inputs, **options))
        close(case.run(), got)
        del module.forward


@pytest.mark.sampled(3)
@every
def test_other_hooks_of_layers_are_called(name):
    case = build(name)
    case.model.requires_grad_(True)
    inputs = [None if x is None else x.requires_grad_(x.is_floating_point()) for x in case.batch()]
    for path, module in places(case.model, LAYERS).items():
        if path.startswith("vision_encoder."):  # runs without gradients
            continue
        for kind in ("forward_pre", "full_backward_pre", "full_backward"):
            seen = []
            handle = getattr(module, f"register_{kind}_hook")(lambda *call, seen=seen: seen.append(call))
            out = case.run(*inputs)
            if "backward" in kind:
                out.sum().backward()
            handle.remove()
            assert seen, (path, kind)


class Adapter(nn.Module):
    """Low-rank adaptation, as a wrapper that knows one argument."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False).double()
        self.up = nn.Linear(2, base.out_features, bias=False).double()

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@every
def test_adapters_on_every_linear_layer_learn(name):
    case = build(name)
    case.model.requires_grad_(False)
    adapters = {}
    for path, module in list(case.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = path.rpartition(".")
            adapters[path] = Adapter(module)
            setattr(case.model.get_submodule(parent), child, adapters[path])
    case.run().square().sum().backward()
    silent = [
        path
        for path, adapter in adapters.items()
        for weight in (adapter.down.weight, adapter.up.weight)
        if weight.grad is None or not weight.grad.any()
    ]
    assert [path for path in silent if not path.startswith("vision_encoder.")] == []


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.sampled(3)
@every
def test_parametrized_and_pruned_weights_are_used(name):
    case = build(name)
    for module in places(case.model, LAYERS).values():
        weight = module.weight.detach().clone()
        mask = (torch.arange(weight.numel()) % 3 > 0).reshape(weight.shape)
        with torch.no_grad():
            module.weight.copy_(2 * weight)
            doubled = case.run()
            module.weight.copy_(mask * weight)
            masked = case.run()
            module.weight.copy_(weight)
            parametrize.register_parametrization(module, "weight", Doubled())
            close(case.run(), doubled)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            prune.custom_from_mask(module, "weight", mask)
            close(case.run(), masked)
            prune.remove(module, "weight")
            module.weight.copy_(weight)


class Quantized(torch.Tensor):
    """A weight that is not there as numbers, like torchao's: it answers to a linear layer only."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.half, self.calls = weight / 2, 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *bias = args
            weight.calls += 1
            return F.linear(x, 2 * weight.half, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        # Whatever reads the weight past its module has no memory to read: it fails the test.
        raise NotImplementedError(f"Quantized: {func}")


@every
def test_weights_of_a_tensor_subclass_are_left_to_it(name):
    case = build(name)
    case.model.requires_grad_(False)
    wanted = case.run()
    weights = {}
    for path, module in case.model.named_modules():
        if isinstance(module, nn.Linear):
            weights[path] = Quantized(module.weight.detach())
            module.weight = nn.Parameter(weights[path], requires_grad=False)
    close(case.run(), wanted)
    assert [path for path, weight in weights.items() if weight.calls == 0] == []


@every
def test_offloaded_weights_are_fetched(name):
    case = build(name)
    wanted = case.run().detach()
    accelerate.cpu_offload(case.model, torch.device("cpu"))
    close(case.run().detach(), wanted)


@every
def test_weights_are_gathered_from_the_shards_of_every_part(name):
    case, sharded = build(name), build(name)
    wanted = case.run()
    grads = gradients(case.model, wanted)
    model = sharded.model
    with one_process() as mesh:
        for module in [m for m in called(model).values() if any(True for _ in m.parameters())][::-1]:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p.dim() == 0})
        got = sharded.run()
        close(got, wanted)
        got.sum().backward()
        for weight, grad in zip((p for p in model.parameters() if p.requires_grad), grads, strict=True):
            assert (weight.grad is None) == (grad is None)
            if grad is not None:
                close(weight.grad.full_tensor() if weight.dim() else weight.grad, grad)
