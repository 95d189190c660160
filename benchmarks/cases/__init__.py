"""One function per op: which inputs are measured, what they cost at least, and against whom.

Ours and every baseline are called with the same tensors by keyword. Baselines are imported through
`benchmarks.peers`, or are one line around an imported function; torch.compile gets static shapes.
"""

from benchmarks.cases.attention import interval_attention, perceiver_attention
from benchmarks.cases.case import OURS, QUICK_SIZE, Baseline, Case
from benchmarks.cases.contrastive import info_nce, sigmoid_loss
from benchmarks.cases.dense import gated_mlp, linear, mlp
from benchmarks.cases.modules import cross_attention, media_cache, perceiver
from benchmarks.cases.residual import gated_linear_residual, gated_residual

__all__ = ["OURS", "QUICK_SIZE", "Baseline", "Case", "all_cases"]


def all_cases(*, quick: bool = False, device: str = "cpu") -> list[Case]:
    """Every declared case; `quick` keeps the names, cuts the sizes and leaves torch.compile out."""
    cases = [
        *gated_residual(quick),
        *gated_linear_residual(quick),
        *linear(quick),
        *mlp(quick),
        *gated_mlp(quick),
        *info_nce(quick, device),
        *sigmoid_loss(quick, device),
        *interval_attention(quick, device),
        *perceiver_attention(quick),
        *cross_attention(quick),
        *media_cache(quick),
        *perceiver(quick),
    ]
    ids = [case.id for case in cases]
    assert len(set(ids)) == len(ids), "two cases of one name"
    return cases
