"""What info_nce keeps between forward and backward, and how much."""

import pytest
import torch

import vlmkernels
from vlmkernels.testing import unit_features

NATIVE = "reference" not in vlmkernels.info()["ops"]["info_nce"]["CPU"]


@pytest.mark.sampled(2)
@pytest.mark.skipif(not NATIVE, reason="the reference is dense by design")
@pytest.mark.parametrize("store_bytes", [0, 2**24])
def test_memory(peak_memory, store_bytes):
    """The full matrix would take 256 MiB, four times what the op may hold beyond its store."""
    script = """
query, key = (torch.randn(8192, 64, requires_grad=True) for _ in range(2))
run = lambda: vlmkernels.info_nce(query, key, 0.1, store_bytes={store}).backward()
"""
    assert peak_memory(script.format(store=store_bytes)) < 64 * 2**20 + store_bytes


@pytest.mark.skipif(not NATIVE, reason="the reference is dense by design")
def test_memory_with_the_default_store(peak_memory):
    """The full matrix would take 1 GiB, four times the store."""
    script = """
query, key = (torch.randn(16384, 16, requires_grad=True) for _ in range(2))
run = lambda: vlmkernels.info_nce(query, key, 0.1).backward()
"""
    assert peak_memory(script) < 2**28 + 64 * 2**20


def test_a_store_of_another_type_is_not_read():
    """oneDNN switched off between forward and backward: kept bf16 tiles mean nothing to float products."""
    query, key = (t.requires_grad_() for t in unit_features(300, 300, 32, dtype=torch.bfloat16))
    loss = vlmkernels.info_nce(query, key, 10.0)
    want = torch.autograd.grad(loss, (query, key), retain_graph=True)
    with torch.backends.mkldnn.flags(enabled=False):
        got = torch.autograd.grad(loss, (query, key))
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-4)
