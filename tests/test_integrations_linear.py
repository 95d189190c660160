"""Patched linear layers and MLPs: which op runs for which layers, and when they run one by one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import vlmkernels
from vlmkernels.integrations import patch, unpatch
from vlmkernels.integrations._chains import chain_of, gated_of
from vlmkernels.testing import assert_as_good

OPS = ("linear", "mlp", "gated_mlp")


@pytest.fixture
def calls(monkeypatch):
    """The names of the ops that ran, in order."""
    names = []
    for name in OPS:
        ours = getattr(vlmkernels, name)

        def counting(*args, name=name, ours=ours, **kwargs):
            names.append(name)
            return ours(*args, **kwargs)

        monkeypatch.setattr(vlmkernels, name, counting)
    return names


def results(module, x):
    x = x.detach().to(next(module.parameters()).dtype).requires_grad_()
    module.zero_grad()
    out = module(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


def assert_exact(module, x, runs, calls, **options):
    """Patched, the module is as good as plain in outputs and gradients, and these ops run."""
    plain, wide = copy.deepcopy(module), copy.deepcopy(module).double()
    report = patch(module, **options)
    calls.clear()
    got = results(module, x)
    assert calls == runs
    for ours, theirs, exact in zip(got, results(plain, x), results(wide, x), strict=True):
        assert_as_good(ours, theirs, exact)
    return report


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


QuickGELU.__module__ = "open_clip.transformer"


class SquaredReLU(nn.Module):
    def forward(self, x):
        return F.relu(x).square()


SquaredReLU.__module__, SquaredReLU.__qualname__ = "transformers.activations", "ReLUSquaredActivation"
ACTIVATIONS = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "relu": nn.ReLU(),
    "quick_gelu": QuickGELU(),
    "squared_relu": SquaredReLU(),
}


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 1, 3, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, bias, calls):
    torch.manual_seed(0)
    report = assert_exact(nn.Linear(6, 4, bias=bias), torch.randn(shape), ["linear"], calls)
    assert [entry.why for entry in report] == ["vlmkernels.linear"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, calls):
    torch.manual_seed(0)
    assert_exact(nn.Linear(6, 4).to(dtype), torch.randn(5, 6), ["linear"], calls)


def test_frozen_layers_get_no_gradient(calls):
    torch.manual_seed(0)
    module = nn.Linear(6, 4)
    module.weight.requires_grad_(False)
    assert_exact(module, torch.randn(5, 6), ["linear"], calls)
    assert module.weight.grad is None


def test_calls_that_stay_with_torch(calls):
    module = nn.Linear(6, 4)
    plain = copy.deepcopy(module)
    patch(module)
    for wrong in (
        torch.randn(5, 7),
        torch.randn(5, 6, dtype=torch.float64),
        torch.ones(5, 6, dtype=torch.int64),
    ):
        with pytest.raises(RuntimeError) as theirs:
            plain(wrong)
        with pytest.raises(RuntimeError) as ours:
            module(wrong)
        assert str(ours.value) == str(theirs.value)
    assert calls == []


@pytest.mark.parametrize("word", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_mlps(word, bias, calls):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.LayerNorm(6), nn.Linear(6, 8, bias=bias), ACTIVATIONS[word], nn.Identity(),
        nn.Linear(8, 4, bias=bias), nn.Dropout(0.5),
    ).eval()  # fmt: skip
    report = assert_exact(module, torch.randn(2, 5, 6), ["mlp"], calls)
    assert [(entry.name, entry.why) for entry in report] == [
        ("", "vlmkernels.mlp, or linear with the activation"),
        ("1", "vlmkernels.linear"),
        ("4", "vlmkernels.linear"),
    ]  # fmt: skip


def test_longer_and_shorter_lines(calls):
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    three = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 6), nn.Linear(6, 6), nn.ReLU()
    )
    assert_exact(three, x, ["mlp", "linear", "linear"], calls)
    shared = nn.Linear(6, 6)
    assert_exact(nn.Sequential(shared, nn.ReLU(), shared), x, ["mlp"], calls)
    assert_exact(
        nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU()), x, ["linear", "linear"], calls
    )


def test_dropout_between_the_layers(calls):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
    plain, x = copy.deepcopy(module), torch.randn(5, 6)
    patch(module)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, plain(x))
    assert calls == ["linear", "linear"]
    module.eval()(x)
    assert calls[2:] == ["mlp"]


@pytest.mark.parametrize("name", ["0", "1", "2"])
def test_hooks_inside_are_called(name, calls):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))

    heard = []
    early = build()
    early.get_submodule(name).register_forward_hook(lambda *_: heard.append("early"))
    report = patch(early)
    early(torch.randn(5, 6))
    assert heard == ["early"]
    if name != "2":
        assert [entry.why for entry in report.refused] == [
            f"hooks on {type(early.get_submodule(name)).__name__}: it runs layer by layer"
        ]
    late = build()
    assert not patch(late).refused
    handle = late.get_submodule(name).register_full_backward_hook(lambda *_: heard.append("late"))
    late(torch.randn(5, 6)).sum().backward()
    assert heard == ["early", "late"]
    handle.remove()
    calls.clear()
    late(torch.randn(5, 6))
    assert calls == ["mlp"]
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: heard.append(type(m).__name__))
    late(torch.randn(5, 6))
    handle.remove()
    assert heard[2:] == ["Linear", "GELU", "Linear", "Sequential"]


def test_steps_that_do_nothing_are_called_for_those_who_listen(calls):
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Identity(), nn.Linear(8, 4), nn.Dropout(0.0))
    patch(module)
    heard = []
    for name in ("2", "4"):
        module.get_submodule(name).register_forward_hook(lambda m, *_: heard.append(type(m)))
    module(torch.randn(5, 6))
    assert heard == [nn.Identity, nn.Dropout]
    assert calls == ["linear", "linear"]


def test_what_is_refused():
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Weight(nn.Parameter):
        pass

    assert patch(Own(6, 4)).refused[0].why == "a subclass of torch.nn.Linear with its own forward"
    module = nn.Linear(6, 4)
    module.weight = Weight(torch.randn(4, 6))
    assert patch(module).refused[0].why == "its weight is a subclass of Tensor"
    module = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4))
    report = patch(module)
    assert [entry.why for entry in report.refused] == ["there is no kernel for Tanh"]
    assert [entry.name for entry in report.patched] == ["0", "2"]
    module = nn.Linear(6, 4)
    parametrize.register_parametrization(module, "weight", nn.Identity())
    assert [entry.status for entry in patch(module)] == ["refused"]


def test_a_layer_parametrized_later_is_called(calls):
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    patch(module)
    parametrize.register_parametrization(module[0], "weight", Double())
    x = torch.randn(5, 6)
    wanted = F.linear(F.gelu(F.linear(x, module[0].weight, module[0].bias)), module[2].weight, module[2].bias)
    torch.testing.assert_close(module(x), wanted)
    assert "mlp" not in calls


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.drop, self.down = nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.0), nn.Linear(8, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Any name, any annotation, any docstring."""
        hidden = self.up(hidden)
        hidden = self.act(hidden)
        hidden = self.drop(hidden)
        return self.down(hidden)


class Scaled(Line):
    def forward(self, hidden):
        hidden = self.up(hidden)
        hidden = self.act(hidden)
        hidden = self.drop(hidden) * 2
        return self.down(hidden)


class Gated(nn.Module):
    def __init__(self, bias=False, act=None):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8, bias), nn.Linear(6, 8, bias), nn.Linear(8, 6, bias)
        self.act = act or nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Swapped(Gated):
    def forward(self, x):
        return self.down(self.gate(x) * self.act(self.up(x)))


def test_a_class_is_known_by_its_code(calls):
    assert chain_of(Line) == ("up", "act", "drop", "down")
    assert gated_of(Gated) == ("down", "act", "gate", "up")
    assert chain_of(Scaled) is chain_of(Gated) is gated_of(Line) is gated_of(Swapped) is None
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    assert_exact(Line(), x, ["mlp"], calls)
    assert_exact(Scaled(), x, ["linear", "linear"], calls)
    assert_exact(Swapped(), x, ["linear"] * 3, calls)


@pytest.mark.parametrize("bias", [True, False])
def test_gated_mlps(bias, calls):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    report = assert_exact(Gated(bias), x, ["gated_mlp"], calls)
    assert [entry.why for entry in report] == ["vlmkernels.gated_mlp", *["vlmkernels.linear"] * 3]
    module = Gated(bias)
    module.up.register_forward_hook(lambda *_: None)
    report = assert_exact(module, x, ["linear"] * 3, calls)
    assert report.refused[0].why == "hooks on up: it runs layer by layer"
    report = assert_exact(Gated(bias, nn.Tanh()), x, ["linear"] * 3, calls)
    assert report.refused[0].why == "there is no kernel for Tanh"


def test_attention_takes_its_projections_along(calls):
    torch.manual_seed(0)

    class Self(nn.MultiheadAttention):
        pass

    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    wanted = module(x, x, x, need_weights=False)[0]
    assert patch(module, attention=False) == []
    assert [entry.why for entry in patch(module, linear=False)] == [
        "vlmkernels.interval_attention if need_weights=False"
    ]
    module(x, x, x, need_weights=False)
    assert calls == []
    (entry,) = patch(module)
    assert entry.why == "vlmkernels.interval_attention and linear if need_weights=False"
    torch.testing.assert_close(module(x, x, x, need_weights=False)[0], wanted)
    assert calls == ["linear", "linear"]
    unpatch(module)
    assert type(module) is nn.MultiheadAttention


@pytest.mark.parametrize("build", [Line, Gated], ids=["mlp", "gated_mlp"])
def test_compiled_in_one_graph(build):
    torch.manual_seed(0)
    module = build()
    patch(module)
    x = torch.randn(5, 6)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))


def test_packed_weights_are_used_by_patched_layers(calls):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()
    x = torch.randn(40, 64)
    wanted = module(x)
    patch(module)
    with vlmkernels.prepare_for_inference(module) as prepared, torch.inference_mode():
        assert set(prepared.packed) | set(prepared.skipped) == {"0", "2"}
        torch.testing.assert_close(module(x), wanted)
    assert calls == ["mlp"]
    with vlmkernels.prepare_for_inference(module):
        assert [entry.status for entry in patch(module)] == ["patched"] * 3
    unpatch(module)
    assert type(module[0]) is nn.Linear
