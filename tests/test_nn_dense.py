"""Linear and MLP modules: equal to torch's, and true to their children where these were changed."""

import pytest
import torch
from torch import nn

import vlmkernels
from vlmkernels.models.clip import CLIP, CONFIGS
from vlmkernels.nn.dense import MLP, Linear, QuickGELU, SquaredReLU

ACTIVATIONS = [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU(), QuickGELU(), SquaredReLU(), nn.Tanh()]


def mlp_with(activation: nn.Module) -> MLP:
    torch.manual_seed(0)
    return MLP(Linear(6, 10), activation, Linear(10, 5)).double()


def by_torch(mlp: MLP, x, residual):
    first, activation, last = mlp
    hidden = activation(nn.functional.linear(x, first.weight, first.bias))
    return residual + nn.functional.linear(hidden, last.weight, last.bias)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_equals_its_children(activation):
    mlp = mlp_with(activation)
    x, residual = torch.randn(2, 3, 6).double().requires_grad_(), torch.randn(2, 3, 5).double()
    got, want = mlp(x, residual), by_torch(mlp, x, residual)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mlp(x), want - residual, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(out.sum(), [x, *mlp.parameters()]) for out in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_linear_adds_its_residual():
    layer = Linear(4, 3).double()
    x, residual = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    want = residual + nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x, residual), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_hooks_of_children_are_called(place):
    mlp = mlp_with(nn.GELU())
    x, residual, seen = torch.randn(3, 6).double(), torch.randn(3, 5).double(), []
    want = mlp(x, residual)
    mlp[place].register_forward_hook(lambda module, inputs, output: seen.append(module))
    torch.testing.assert_close(mlp(x, residual), want, rtol=1e-12, atol=1e-12)
    assert seen == [mlp[place]]


def test_a_child_that_was_replaced_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp = mlp_with(nn.GELU())
    x = torch.randn(3, 6).double()
    before = mlp(x)
    last = Doubled(10, 5).double()
    last.load_state_dict(mlp[2].state_dict())
    mlp[2] = last
    torch.testing.assert_close(mlp(x), 2 * before, rtol=1e-12, atol=1e-12)


def test_a_prepared_clip_packs_every_product_of_its_towers():
    model = CLIP(CONFIGS["emoji-tiny"]).eval()
    images, tokens = torch.randn(2, 3, 48, 48), torch.full((2, 8), model.config.eot_id)
    with torch.no_grad():
        want = model(images, tokens)
        with vlmkernels.prepare_for_inference(model) as prepared:
            got = model(images, tokens)
        assert {name.rpartition(".")[2] for name in prepared.packed} == {
            "in_proj_weight", "out_proj", "c_fc", "c_proj",
        }  # fmt: skip
        assert len(prepared.packed) == 4 * 6
        assert not prepared.skipped
    for name in ("image_features", "text_features"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)
