import copy
import dataclasses
import gc
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import vlmkernels
from vlmkernels import _packed
from vlmkernels.testing import result_and_gradients

PACKS = not _packed.why_not(torch.ones(1))
needs_onednn = pytest.mark.skipif(not PACKS, reason="this torch has no oneDNN")


def model(dtype=torch.float32):
    layers = nn.Sequential(nn.Linear(20, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 9, bias=False))
    return layers.to(dtype).eval()


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(20,), (1, 20), (37, 20), (2, 5, 20), (0, 20)], ids=str)
def test_results_parameters_and_names_stay(dtype, shape):
    net, x = model(dtype), torch.randn(shape).to(dtype)
    if _packed.why_not(net[0].weight):
        pytest.skip(_packed.why_not(net[0].weight))
    names, before = list(net.state_dict()), [id(p) for p in net.parameters()]
    with torch.no_grad():
        want = net(x)
        prepared = vlmkernels.prepare_for_inference(net)
        got = net(x)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert (prepared.packed, prepared.skipped) == (["0", "3"], {})
    assert list(net.state_dict()) == names
    assert [id(p) for p in net.parameters()] == before
    prepared.undo()
    with torch.no_grad():
        assert torch.equal(net(x), want)
    assert all("forward" not in module.__dict__ for module in net.modules())
    prepared.undo()


@needs_onednn
def test_the_packed_weight_is_what_runs(monkeypatch):
    net, x = model(), torch.randn(4, 20)
    with torch.no_grad(), vlmkernels.prepare_for_inference(net):
        first = net(x)
        entry = _packed.PACKED[id(net[0].weight)]
        other = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(48, 20), None)
        changed = dataclasses.replace(entry, packed=other)
        with monkeypatch.context() as patch:
            patch.setitem(_packed.PACKED, id(net[0].weight), changed)
            assert not torch.allclose(net(x), first)


@needs_onednn
@pytest.mark.parametrize(
    "activation", ["none", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "squared_relu"]
)
def test_the_ops_use_packed_weights(activation):
    net, x, residual = model(), torch.randn(6, 20), torch.randn(6, 9)
    w1, b1, w2 = net[0].weight, net[0].bias, net[3].weight
    with torch.no_grad():
        linear = vlmkernels.linear(x, w1, b1, activation=activation)
        mlp = vlmkernels.mlp(x, w1, b1, w2, None, activation=activation, residual=residual)
        with vlmkernels.prepare_for_inference(net):
            torch.testing.assert_close(
                vlmkernels.linear(x, w1, b1, activation=activation), linear, rtol=1e-4, atol=1e-4
            )
            got = vlmkernels.mlp(x, w1, b1, w2, None, activation=activation, residual=residual)
            torch.testing.assert_close(got, mlp, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_the_gated_mlp_uses_packed_weights(monkeypatch):
    layers = nn.ModuleDict(
        {"gate": nn.Linear(20, 48), "up": nn.Linear(20, 48), "down": nn.Linear(48, 9)}
    ).eval()
    x, residual = torch.randn(2, 6, 20), torch.randn(2, 6, 9)
    weights = [layers[name].weight for name in ("gate", "up", "down")]
    biases = {f"b_{name}": layer.bias for name, layer in layers.items()}
    with torch.no_grad():
        want = vlmkernels.gated_mlp(x, *weights, **biases, residual=residual)
        with vlmkernels.prepare_for_inference(layers):
            got = vlmkernels.gated_mlp(x, *weights, **biases, residual=residual)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            other = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(48, 20), None)
            entry = dataclasses.replace(_packed.PACKED[id(weights[1])], packed=other)
            monkeypatch.setitem(_packed.PACKED, id(weights[1]), entry)
            assert not torch.allclose(vlmkernels.gated_mlp(x, *weights, **biases, residual=residual), want)


@needs_onednn
@pytest.mark.parametrize("given", [False, True], ids=["plain", "residual"])
def test_mlps_on_packed_weights_work_on_some_rows_at_a_time(given, monkeypatch):
    layers = nn.ModuleDict({"a": nn.Linear(20, 48), "b": nn.Linear(20, 48), "c": nn.Linear(48, 9)}).eval()
    a, b, c = (layers[name] for name in "abc")
    x, residual = torch.randn(3, 7, 20), torch.randn(3, 7, 9) if given else None
    seen = []

    def run():
        mlp = vlmkernels.mlp(x, a.weight, a.bias, c.weight, c.bias, activation="gelu", residual=residual)
        return mlp, vlmkernels.gated_mlp(x, a.weight, b.weight, c.weight, b_down=c.bias, residual=residual)

    def noting(rows, *rest):
        seen.append(rows.shape[0])
        return packed_linear(rows, *rest)

    packed_linear = _packed.packed_linear
    monkeypatch.setattr(_packed, "ROWS", 5)
    for op in ("mlp", "gated_mlp"):
        monkeypatch.setattr(sys.modules[f"vlmkernels.ops.{op}"], "packed_linear", noting)
    with torch.no_grad():
        want = run()
        seen.clear()
        with vlmkernels.prepare_for_inference(layers):
            got = run()
    assert seen == [n for n in (5, 5, 5, 5, 1) for _ in range(2)] + [
        n for n in (5, 5, 5, 5, 1) for _ in range(3)
    ]
    for x_, y_ in zip(got, want, strict=True):
        torch.testing.assert_close(x_, y_, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_gradients_are_those_of_the_weight_itself():
    net, x = model(), torch.randn(6, 20, requires_grad=True)
    want = result_and_gradients(net, [x])
    with vlmkernels.prepare_for_inference(net):
        for ours, theirs in zip(result_and_gradients(net, [x]), want, strict=True):
            assert torch.equal(ours, theirs)


@needs_onednn
@pytest.mark.parametrize("change", ["in place", "load_state_dict", "optimizer", "replaced", "cut"])
def test_a_changed_weight_is_an_error(change):
    net, x = model(), torch.randn(3, 20)
    with vlmkernels.prepare_for_inference(net):
        if change == "in place":
            with torch.no_grad():
                net[0].weight.mul_(2)
        elif change == "load_state_dict":
            net.load_state_dict(model().state_dict())
        elif change == "optimizer":
            net(x).sum().backward()
            torch.optim.SGD(net.parameters(), 0.1).step()
        elif change == "cut":  # the memory that it began with
            net[0].weight.data, net[0].bias.data = net[0].weight.data[:40], net[0].bias.data[:40]
        else:
            net[0].weight.data = torch.randn(48, 20)
        with torch.no_grad(), pytest.raises(RuntimeError, match="a weight has changed since"):
            net(x)
    net = model() if change == "cut" else net
    with torch.no_grad(), vlmkernels.prepare_for_inference(net):
        torch.testing.assert_close(net(x), copy.deepcopy(net)(x), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_copies_and_pickles_run_on_their_own_weights():
    net, x = model(), torch.randn(3, 20)
    with torch.no_grad(), vlmkernels.prepare_for_inference(net):
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            other[0].weight.zero_()
            other[0].bias.zero_()
            assert not torch.allclose(other(x), net(x))
            with vlmkernels.prepare_for_inference(other) as prepared:
                assert prepared.packed == ["0", "3"]


@needs_onednn
def test_what_is_not_packed_says_why():
    net = nn.ModuleDict({"f16": nn.Linear(4, 4).half(), "meta": nn.Linear(4, 4, device="meta")}).eval()
    with vlmkernels.prepare_for_inference(net) as prepared:
        assert prepared.packed == []
        assert prepared.skipped == {"f16": "torch.float16 is not packed", "meta": "on meta"}


@needs_onednn
def test_weights_that_are_made_anew_in_every_call_are_not_packed():
    net = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)).eval()
    prune.l1_unstructured(net[1], "weight", 0.5)
    with vlmkernels.prepare_for_inference(net) as prepared:
        assert prepared.skipped == {"0": "not a plain parameter", "1": "not a plain parameter"}


@needs_onednn
def test_compiled_and_autocast_models_run_as_before():
    net, x = model(), torch.randn(3, 20)
    with torch.no_grad():
        want = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = net(x)
        with vlmkernels.prepare_for_inference(net):
            compiled = torch.compile(net, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(x), want)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(net(x), low)


@needs_onednn
def test_packed_copies_do_not_outlive_the_model():
    gc.collect()
    before = len(_packed.PACKED)
    net = model()
    vlmkernels.prepare_for_inference(net)
    assert len(_packed.PACKED) == before + 2
    del net
    gc.collect()
    assert len(_packed.PACKED) == before


def test_bad_use():
    with pytest.raises(ValueError, match=r"training mode, call model\.eval\(\) first"):
        vlmkernels.prepare_for_inference(model().train())


@needs_onednn
def test_preparing_twice_is_an_error():
    net = model()
    prepared = vlmkernels.prepare_for_inference(net)
    with pytest.raises(ValueError, match="prepared already"):
        vlmkernels.prepare_for_inference(net)
    prepared.undo()
