"""Tests of kernels against float64, with the error of plain PyTorch on the same inputs as the tolerance."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def assert_as_good(
    got: Tensor,
    low: Tensor | Sequence[Tensor],
    exact: Tensor,
    *,
    cap: float | None = None,
    name: str = "result",
) -> None:
    """Fail unless `got` is about as close to the truth as plain PyTorch is.

    The limit is ``2 max|low - exact| + 4 eps max|exact|``, eps being that of the dtype of `got`;
    ``1e-12 max|exact|`` for float64. A float32 number below the smallest normal one may be 0.

    Args:
        got: the kernel's result.
        low: the reference computed in float32 (float64 for float64 inputs) from the same inputs, of the dtype
            of `got`; or several such results, of which the least accurate counts.
        exact: the reference computed in float64.
        cap: an additional bound on the relative Frobenius error.
        name: the result's name in the message.

    Raises:
        AssertionError: with the error, the limit and PyTorch's own error. NaN fails.
    """
    lows = [low] if isinstance(low, Tensor) else list(low)
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == lows[0].dtype, f"{name}: dtype {got.dtype}, expected {lows[0].dtype}"
    if got.numel() == 0:
        return
    got64, exact = got.detach().double(), exact.detach().double()
    largest = exact.abs().max()
    own = max((each.detach().double() - exact).abs().max() for each in lows)
    limit = (
        1e-12 * largest if got.dtype == torch.float64 else 2 * own + 4 * torch.finfo(got.dtype).eps * largest
    )
    limit += torch.finfo(torch.float32).tiny
    error = (got64 - exact).abs().max()
    assert error <= limit, (
        f"{name}: error {error:.3e} above {limit:.3e} (PyTorch's own {own:.3e}, largest value {largest:.3e})"
    )
    if cap is not None:
        relative = (got64 - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny)
        assert relative <= cap, f"{name}: relative error {relative:.3e} above {cap:.1e}"


def result_and_gradients(fn: Callable, inputs: Sequence[Tensor], **options: Any) -> list[Tensor | None]:
    """`fn(*inputs, **options)` and its gradients by the inputs that require one.

    The incoming gradient is fixed: numbers from 0.5 to 1.5 that are exact in bfloat16.
    """
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    out = fn(*leaves, **options)
    incoming = torch.arange(out.numel(), device=out.device) % 65 / 64 + 0.5
    wanted = [x for x in leaves if x.requires_grad]
    grads = iter(
        torch.autograd.grad(out, wanted, incoming.to(out.dtype).reshape(out.shape)) if wanted else ()
    )
    return [out, *(next(grads) if x.requires_grad else None for x in leaves)]


def assert_op_as_good(
    op: Callable,
    reference: Callable,
    inputs: Sequence[Tensor],
    *,
    features: int = 2,
    caps: dict | None = None,
    **options: Any,
) -> None:
    """`assert_as_good` for the result of `op` and every gradient, against a `reference` with its signature.

    The first `features` inputs are ``[rows, D]``. PyTorch's float32 error in a single number is random,
    so for results with one element its largest error over eight orders of the D features counts.
    """
    got = result_and_gradients(op, inputs, **options)
    double = inputs[0].dtype == torch.float64
    exact = result_and_gradients(
        reference, [x.detach().double().requires_grad_(x.requires_grad) for x in inputs], **options
    )
    wide = [
        x.detach().to(torch.float64 if double else torch.float32).requires_grad_(x.requires_grad)
        for x in inputs
    ]
    lows = [result_and_gradients(reference, wide, **options)]
    for _ in range(7 if features and not double else 0):
        order = torch.randperm(inputs[0].shape[-1])
        shuffled = [
            x.detach()[..., order].requires_grad_(x.requires_grad) if i < features else x
            for i, x in enumerate(wide)
        ]
        lows.append(result_and_gradients(reference, shuffled, **options))
    names = ["result", *(f"gradient {j}" for j in range(len(inputs)))]
    for i, (name, ours, truth, *theirs) in enumerate(zip(names, got, exact, *lows, strict=True)):
        if ours is None or truth is None:
            assert ours is truth, f"{name}: given by one side only"
            continue
        counted = theirs if truth.numel() == 1 else theirs[:1]
        same = [low.to(ours.dtype) for low in counted if low is not None]
        assert_as_good(ours, same, truth, cap=(caps or {}).get(i), name=name)


def unit_features(
    rows: int, cols: int, dim: int, *, dtype: torch.dtype = torch.float32, similarity: float = 0.5
) -> tuple[Tensor, Tensor]:
    """L2-normalised random query [rows, dim] and key [cols, dim]; pair (i, i) has about the given cosine."""
    query = torch.nn.functional.normalize(torch.randn(rows, dim, dtype=torch.float64), dim=-1)
    key = torch.nn.functional.normalize(torch.randn(cols, dim, dtype=torch.float64), dim=-1)
    n = min(rows, cols)
    key[:n] = similarity * query[:n] + (1 - similarity**2) ** 0.5 * key[:n]
    return query.to(dtype), torch.nn.functional.normalize(key, dim=-1).to(dtype)


def saved_activation_bytes(fn: Callable, *inputs: Any, parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps from `fn(*inputs)` for the backward.

    Every storage counts once and in full, even if several tensors share it; those of `inputs` and
    `parameters` do not count. All are kept alive until the end, so that no address is reused.
    """
    known = {x.untyped_storage().data_ptr() for x in (*inputs, *parameters) if isinstance(x, Tensor)}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fn(*inputs)
    return sum(storage.nbytes() for storage in kept.values())
