"""How many kernels a training step of an op launches: the host takes microseconds for each."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import trace
from vlmkernels import _providers, interval_attention, intervals, perceiver_attention

from .workloads import BF16, heads, meta

TOKENS = 1024
FORWARD, *BACKWARD = [
    "_attention._forward", "_attention_bwd._query_grads", "_attention_bwd._query_ranges",
    "_attention_bwd._key_grads",
]  # fmt: skip


def launched(call, tensors, *rest) -> list[str]:
    """The kernels of a forward and of the backward to those tensors that require a gradient, torch's too."""
    step = trace.Pass()
    with trace.recording(step, "sm_90"):
        out = call(*tensors, *rest)
        out = out if isinstance(out, tuple) else (out,)
        wanted = [x for x in tensors if x.requires_grad]
        torch.autograd.grad(out, wanted, [x.detach() for x in out])
    return [found.name for found in step.steps]


def attended(tokens=TOKENS, grad=True):
    return heads(8, tokens, 16, 72, BF16).requires_grad_(grad)


BOUNDS = {
    "causal": intervals.causal(TOKENS, device="meta"),
    "any": tuple(meta(8, TOKENS, dtype=torch.int32) for _ in range(2)),
    "padding": intervals.padding(meta(8, dtype=torch.int32), TOKENS),
}


@pytest.mark.parametrize("mask", BOUNDS)
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)], ids=str)
def test_interval_attention_takes_four_at_most(mask, frozen):
    tensors = [attended(grad=i not in frozen) for i in range(3)]
    names = launched(lambda *x: interval_attention(*x, return_lse=True), tensors, *BOUNDS[mask])
    ranges = mask != "padding"  # which queries see a block of keys, where they differ
    assert len(names) == (2 if frozen == (1, 2) else 3 + ranges), names


@pytest.mark.parametrize("mask", ["full", "causal", "padding"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_torch_takes_the_place_of_a_kernel(mask, deterministic, monkeypatch):
    """SDPA, as it would be chosen on a card; its backward only if that is in order."""
    torch.use_deterministic_algorithms(deterministic)
    provider = _providers.SdpaFlash()
    monkeypatch.setattr(_providers, "ALLOWED", ("sdpa",))
    monkeypatch.setattr(_providers, "sdpa_backend", lambda call: provider.backend.value)
    kind = provider.title, BF16, 72, torch.device("meta")
    monkeypatch.setattr(_providers, "_TRIED", {kind: ""})
    whole = {**BOUNDS, "full": intervals.full(TOKENS, device="meta")}[mask]
    tensors = [attended() for _ in range(3)]
    names = launched(lambda *x: interval_attention(*x), tensors, whole)
    flash = "aten::_scaled_dot_product_flash_attention"
    if mask == "padding":
        assert names == [FORWARD, BACKWARD[0], BACKWARD[2]]
    else:
        assert names == [flash, *([f"{flash}_backward"] if deterministic else BACKWARD)]


@pytest.mark.parametrize("lengths", [True, False])
def test_perceiver_attention_takes_four(lengths):
    tensors = [attended(tokens) for tokens in (64, TOKENS, TOKENS, 64, 64)]
    media = meta(8, dtype=torch.int32) if lengths else None
    names = launched(lambda *x: perceiver_attention(*x, media_lengths=media), tensors)
    assert len(names) == 4, names
