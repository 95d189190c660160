"""Comparing a module with another library's: outputs, gradients and names, both ways."""

import pytest
import torch

from benchmarks import peers
from vlmkernels.nn.families import family_state_dict, load_family_state_dict


def peer(name):
    if reason := peers.why_not(name):
        pytest.skip(reason)
    return peers.load(name)


def needs(library):
    """Marks tests that are skipped where a peer is not installed."""
    return pytest.mark.skipif(
        peers.why_not(library) is not None, reason=f"{library}: {peers.why_not(library)}"
    )


def randomize(module):
    """Parameters away from where they begin (gates at 0, gains at 1), in float64."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def close(got, wanted, name="result", tolerance=1e-11):
    """Float64 results alike but for rounding; some gradients are zero but for rounding themselves."""
    assert got.shape == wanted.shape, name
    assert (got - wanted).abs().max() <= tolerance * (wanted.abs().max() + 0.01), name


def assert_same(ours, theirs, family, inputs, call_theirs, call_ours, tolerance=1e-11):
    """Weights load and come back bit for bit; outputs and the gradients of inputs and weights are the same.

    `tolerance` is for a peer that computes its norms in float32 even for float64.
    """
    randomize(theirs)
    weights = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    load_family_state_dict(ours.double(), weights, family)
    back = family_state_dict(ours, family)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    results = []
    for module, call in ((theirs, call_theirs), (ours, call_ours)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = call(module, *leaves)
        out = out.flatten()
        (out * torch.linspace(0.5, 1.5, len(out), dtype=out.dtype)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for number, (wanted, got) in enumerate(zip(*results, strict=True)):
        close(got, wanted, f"gradient of input {number}" if number else "output", tolerance)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    gradients = family_state_dict(ours, family)
    for name, parameter in theirs.named_parameters():
        close(gradients[name], parameter.grad, f"gradient of {name}", tolerance)
