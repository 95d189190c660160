"""Judging a kernel by what float64 says and by how well plain PyTorch does from the same inputs."""

import torch
from torch import Tensor


def assert_as_good(got: Tensor, low: Tensor, exact: Tensor, *, cap: float | None = None, name: str = "result") -> None:
    """Fail unless `got` is about as close to the truth as plain PyTorch is.

    Args:
        got: what the kernel gave.
        low: the reference computed in float32 (float64 for float64 inputs) from the same inputs, of the dtype of `got`.
        exact: the reference computed in float64.
        cap: a bound on the relative Frobenius error that holds as well.

    The limit is ``2 max|low - exact| + 4 eps max|exact|`` with eps that of the dtype of `got`; float64 has 1e-12 max|exact|.

    Raises:
        AssertionError: with the error, the limit and PyTorch's own error. NaN and infinity fail unless `exact` has them too.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(exact.shape)}"
    assert got.dtype == low.dtype, f"{name}: dtype {got.dtype}, wanted {low.dtype}"
    if got.numel() == 0:
        return
    got64, exact = got.detach().double(), exact.detach().double()
    scale = exact.abs().max()
    own = (low.detach().double() - exact).abs().max()
    limit = 1e-12 * scale if got.dtype == torch.float64 else 2 * own + 4 * torch.finfo(got.dtype).eps * scale
    error = (got64 - exact).abs().max()
    assert error <= limit, f"{name}: error {error:.3e} above {limit:.3e} (PyTorch's own {own:.3e}, largest value {scale:.3e})"
    if cap is not None:
        relative = (got64 - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny)
        assert relative <= cap, f"{name}: relative error {relative:.3e} above {cap:.1e}"


def unit_features(
    rows: int, cols: int, dim: int, *, dtype: torch.dtype = torch.float32, similarity: float = 0.5
) -> tuple[Tensor, Tensor]:
    """L2-normalised random query [rows, dim] and key [cols, dim]; pair (i, i) has about the given cosine."""
    query = torch.nn.functional.normalize(torch.randn(rows, dim, dtype=torch.float64), dim=-1)
    noise = torch.nn.functional.normalize(torch.randn(cols, dim, dtype=torch.float64), dim=-1)
    key = noise.clone()
    n = min(rows, cols)
    key[:n] = similarity * query[:n] + (1 - similarity**2) ** 0.5 * noise[:n]
    return query.to(dtype), torch.nn.functional.normalize(key, dim=-1).to(dtype)
