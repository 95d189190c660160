"""Compiled dense layers: operations of torch on a GPU, which a compiler fuses, and the library's op on a CPU.

Fake and meta tensors stand for those of a GPU: what is in the graph is decided before anything runs.
"""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

import vlmkernels
from tests.dense import ACTIVATIONS
from vlmkernels import reference
from vlmkernels.nn import _layers

OPS = ("linear", "mlp", "gated_mlp")
ON_CPU = {op: f"vlmkernels.{op}.default" for op in OPS}


class Layer(nn.Module):
    """One of the ops with its weights, bias and residual."""

    def __init__(
        self, op: str, activation: str, *, grad: bool = True, of: object = vlmkernels, **made
    ) -> None:
        super().__init__()
        shapes = {"linear": [(4, 5)], "mlp": [(6, 5), (4, 6)], "gated_mlp": [(6, 5), (6, 5), (4, 6)]}[op]
        self.weights = nn.ParameterList(nn.Parameter(torch.rand(*s, **made), grad) for s in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.rand(len(w), **made), grad) for w in self.weights)
        self.op, self.name, self.activation = getattr(of, op), op, activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        options = {"activation": self.activation, "residual": residual}
        if self.name == "gated_mlp":
            names = ("b_gate", "b_up", "b_down")
            return self.op(x, *self.weights, **dict(zip(names, self.biases, strict=True)), **options)
        pairs = (t for pair in zip(self.weights, self.biases, strict=True) for t in pair)
        return self.op(x, *pairs, **options)


def graphs_of(fn, *arguments, backward: bool = True) -> tuple[object, list[set[str]]]:
    """The result of the compiled function, and the operators of the forward's and the backward's graph."""
    found: list[set[str]] = []

    def record(module, _):
        found.append({str(n.target) for n in module.graph.nodes if n.op == "call_function"})
        return module.forward

    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=record))
    out = compiled(*arguments)
    if backward:
        out.sum().backward()
    return out, found


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("vlmkernels")}


@pytest.mark.parametrize("op", OPS)
def test_a_graph_for_a_gpu_has_operations_of_torch(op):
    layer = Layer(op, "quick_gelu", device="meta")
    x = torch.empty(2, 3, 5, device="meta", requires_grad=True)
    _, found = graphs_of(layer, x, torch.empty(2, 3, 4, device="meta"))
    assert len(found) == 2
    for names in found:
        assert "aten.mm.default" in names or "aten.addmm.default" in names
        assert ours(names) == set()


@pytest.mark.parametrize("op", OPS)
def test_a_graph_for_a_cpu_has_the_op(op):
    _, found = graphs_of(Layer(op, "gelu"), torch.rand(3, 5, requires_grad=True))
    assert [ours(names) for names in found] == [{ON_CPU[op]}, {f"vlmkernels.{op}_bwd.default"}]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_export(op, strict):
    def exported(layer, x):
        nodes = torch.export.export(layer, (x,), strict=strict).graph.nodes
        return {str(n.target) for n in nodes if n.op == "call_function"}

    with torch.no_grad():
        assert ours(exported(Layer(op, "gelu"), torch.rand(3, 5))) == {ON_CPU[op]}
        with FakeTensorMode():
            layer = Layer(op, "gelu", grad=False, device="cuda")
            names = exported(layer, torch.empty(3, 5, device="cuda"))
    assert ours(names) == set()
    assert {"aten.linear.default", "aten.gelu.default"} <= names


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
def test_types_are_those_of_the_op(op, activation):
    with torch.no_grad(), FakeTensorMode():
        layer = Layer(op, activation, grad=False, device="cuda", dtype=torch.bfloat16)
        x = torch.empty(3, 5, device="cuda", dtype=torch.bfloat16)
        residual = torch.empty(3, 4, device="cuda")
        want = layer(x, residual)
        got, (names,) = graphs_of(layer, x, residual, backward=False)
    assert (got.dtype, got.shape, got.device) == (want.dtype, want.shape, want.device)
    assert ours(names) == set()
    assert not any("pow" in name for name in names)  # which autocast computes in float32


def test_layers_of_modules():
    """The feed-forward layer of the perceiver and of cross-attention, which has a gradient of its own."""
    layer = _layers.FeedForward(8, 16, activation="gelu", norm="layernorm", eps=1e-5)
    for device, expected in (("meta", set()), ("cpu", {"vlmkernels.linear.default"})):
        layer, x = layer.to_empty(device=device), torch.zeros(2, 3, 8, device=device, requires_grad=True)
        _, found = graphs_of(lambda x: _layers.add_feed_forward(x, layer), x)  # noqa: B023
        assert ours(found[0]) == expected


@pytest.mark.parametrize("op", OPS)
def test_the_operations_are_those_of_the_reference(op):
    """On a device without a kernel of the library nothing else would run."""
    layer, plain = (Layer(op, "silu", of=of, device="meta") for of in (vlmkernels, reference))
    x = torch.empty(3, 5, device="meta", requires_grad=True)
    assert graphs_of(layer, x)[1] == graphs_of(plain, x)[1]
