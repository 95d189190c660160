"""One table of activations: what the ops, the reference, the kernels and the modules call them."""

import re

import pytest
import torch
from torch import nn

import vlmkernels
from tests.parity import peer
from vlmkernels import _native
from vlmkernels._activations import ACTIVATIONS, HUGGING_FACE, activation_of
from vlmkernels.reference import _dense as reference


def test_the_reference_knows_the_same():
    assert ("none", *ACTIVATIONS) == reference.ACTIVATIONS


@pytest.mark.skipif(_native.extension is None, reason="needs the extension")
def test_the_kernels_know_the_same():
    x = torch.ones(1, 1)
    with pytest.raises(ValueError, match=re.escape(f"one of {', '.join(reference.ACTIVATIONS)}, got")):
        torch.ops.vlmkernels.linear(x, x, None, None, "mish", False)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_module_computes_what_the_op_of_its_name_does(name):
    module = ACTIVATIONS[name].module()
    assert activation_of(module) == name
    x, one = torch.linspace(-4, 4, 50, dtype=torch.float64)[:, None], torch.ones(1, 1, dtype=torch.float64)
    torch.testing.assert_close(vlmkernels.linear(x, one, activation=name), module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("qualified", [cls for each in ACTIVATIONS.values() for cls in each.others])
def test_classes_of_other_libraries_compute_the_same(qualified):
    where, _, name = qualified.rpartition(".")
    module = getattr(peer(where), name)()
    x = torch.linspace(-4, 4, 50, dtype=torch.float64)
    activation = activation_of(module)
    assert activation is not None
    torch.testing.assert_close(module(x), ACTIVATIONS[activation].module()(x))


@pytest.mark.parametrize("word", HUGGING_FACE)
def test_the_words_of_hugging_face_mean_the_same(word):
    module = peer("transformers.activations").ACT2FN[word]
    x = torch.linspace(-4, 4, 50, dtype=torch.float64)
    torch.testing.assert_close(module(x), ACTIVATIONS[HUGGING_FACE[word]].module()(x))


def test_others_have_no_name():
    class Mine(nn.GELU):
        pass

    for module in (nn.Tanh(), nn.Identity(), Mine(), nn.LeakyReLU()):
        assert activation_of(module) is None
