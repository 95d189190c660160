"""Targets of losses over pairs, through the public and the raw op."""

import pytest
import torch

import vlmkernels
from vlmkernels import reference

ops = torch.ops.vlmkernels
LOSSES = {  # public and raw call for targets
    "info_nce": (
        lambda x, positives: vlmkernels.info_nce(x, x, 1.0, positives=positives),
        lambda x, *ids: ops.info_nce(x, x, torch.tensor(1.0), *ids, None, True, 0.0, False, "mean", 0),
    ),
    "sigmoid_loss": (
        lambda x, positives: vlmkernels.sigmoid_loss(x, x, 1.0, 0.0, positives=positives),
        lambda x, *ids: ops.sigmoid_loss(
            x, x, torch.tensor(1.0), torch.tensor(0.0), *ids, False, "mean", *[False] * 3
        ),
    ),
}


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize(
    ("positives", "got"),
    [
        ((None, torch.arange(4)), "(NoneType, Tensor)"),
        ((torch.arange(4), None), "(Tensor, NoneType)"),
        ((torch.arange(4),), "(Tensor)"),
        ([torch.arange(4), torch.arange(4)], "list of Tensor"),
        ((), "()"),
    ],
    ids=str,
)
def test_targets_of_another_kind_are_named(op, positives, got):
    public, _ = LOSSES[op]
    with pytest.raises(TypeError) as error:
        public(torch.randn(4, 5), positives)
    assert str(error.value).startswith(f"{op}: positives must be ")
    assert str(error.value).endswith(f"(dense Tensor, dense Tensor) or None, got {got}")


@pytest.mark.parametrize("op", LOSSES)
def test_ids_of_keys_alone_are_refused(op):
    _, raw = LOSSES[op]
    with pytest.raises(
        ValueError, match=f"{op}: key_ids require the ids of the queries in positives, got None"
    ):
        raw(torch.randn(4, 5), None, torch.arange(4))


def test_the_raw_op_takes_indices_for_both_directions():
    """The public one wants ids there; -100 is a row without a positive."""
    torch.manual_seed(0)
    query, key = (torch.randn(rows, 6, dtype=torch.float64, requires_grad=True) for rows in (5, 7))
    index, scale = torch.tensor([3, 0, -100, 3, 6]), torch.tensor(2.0, dtype=torch.float64)
    got = ops.info_nce(query, key, scale, index, None, None, True, 0.1, True, "mean", 0)[0]
    want = reference.info_nce(query, key, scale, positives=index, label_smoothing=0.1, normalize=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(x, (query, key)) for x in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
