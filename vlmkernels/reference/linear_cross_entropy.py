"""Cross-entropy of the classes of a linear layer, z = (h W^T + b) c, c scaling the columns.

    l_i = logsumexp_j z_ij - (1 - e) z_i,t_i - (e / V) sum_j z_ij

With u_i = dL/dl_i, 0 on ignored rows, and q the smoothed one-hot rows:

    dz_ij = u_i c_j (softmax(z_i)_j - q_ij)        dh = dz W    dW = dz^T h    db = sum_i dz_i
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [...] int64
    *,
    bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    column_scale: Tensor | None = None,  # [V]
    reduction: str = "mean",
) -> Tensor:
    """The definition, with all logits, differentiable by autograd."""
    rows, flat = hidden.reshape(target.numel(), hidden.shape[-1]), target.reshape(-1)
    options = (ignore_index, label_smoothing, reduction)
    check("linear_cross_entropy", rows, weight, flat, bias, column_scale, *options)
    counted = flat != ignore_index
    z = logits(rows.where(counted[:, None], 0), weight, bias, column_scale)  # [N, V]
    losses = F.cross_entropy(
        z, flat, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    if reduction == "none":
        return losses.reshape(target.shape)
    return losses.sum() / counted.sum().clamp_min(1) if reduction == "mean" else losses.sum()


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, column_scale: Tensor | None) -> Tensor:
    """[N, V], in float32 or float64."""
    work = torch.promote_types(hidden.dtype, torch.float32)
    z = F.linear(hidden.to(work), weight.to(work), None if bias is None else bias.to(work))
    return z if column_scale is None else z * column_scale.to(work)


def linear_cross_entropy_fwd(
    hidden, weight, target, bias, column_scale, ignore_index, label_smoothing, reduction, *needs
):
    """The raw op: (loss, dhidden, dweight, dbias); a gradient that `needs` does not ask for has size 0."""
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    loss = linear_cross_entropy(hidden, weight, target, bias=bias, column_scale=column_scale, **options)
    rest = (bias, column_scale, ignore_index, label_smoothing, reduction, needs)
    return loss, *linear_cross_entropy_bwd(loss.new_ones(loss.shape), hidden, weight, target, *rest)


def linear_cross_entropy_bwd(
    dloss: Tensor,  # [] or [N]
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N] int64
    bias: Tensor | None,  # [V]
    column_scale: Tensor | None,  # [V]
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias); an output that `needs` does not ask for has size 0."""
    options = (ignore_index, label_smoothing, reduction)
    check("linear_cross_entropy_bwd", hidden, weight, target, bias, column_scale, *options)
    dhidden, dweight = hidden.new_empty(0), weight.new_empty(0)
    dbias = (weight if bias is None else bias).new_empty(0)
    if any(needs):
        work, counted = torch.promote_types(hidden.dtype, torch.float32), (target != ignore_index)[:, None]
        h, w = hidden.where(counted, 0).to(work), weight.to(work)
        u = dloss.to(work) / (counted.sum().clamp_min(1) if reduction == "mean" else 1)
        q = torch.arange(len(w), device=w.device) == target[:, None]  # [N, V]
        q = (1 - label_smoothing) * q.to(work) + label_smoothing / max(len(w), 1)
        dz = u.expand(target.shape)[:, None] * (logits(h, weight, bias, column_scale).softmax(1) - q)
        dz = (dz if column_scale is None else dz * column_scale.to(work)).where(counted, 0)  # [N, V]
        if needs[0]:
            dhidden = (dz @ w).where(counted, 0).to(hidden.dtype).contiguous()
        if needs[1]:
            dweight = (dz.T @ h).to(weight.dtype).contiguous()
        if needs[2]:
            dbias = dz.sum(0).to(dbias.dtype)
    return dhidden, dweight, dbias


def check(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    column_scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> bool:
    """The raw ops get any tensors. Whether every row is known to count."""
    n, v = target.numel(), weight.shape[0] if weight.dim() else 0
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]]
    wanted = {"hidden": (hidden, (n, weight.shape[-1] if weight.dim() else 0)), "target": (target, (n,))}
    wanted |= {"bias": (bias, (v,)), "column_scale": (column_scale, (v,))}
    faults = [
        f"{name} must be {list(shape)}, got {list(x.shape)}"
        for name, (x, shape) in wanted.items()
        if x is not None and x.shape != shape
    ]
    if weight.dim() != 2:
        faults.append(f"weight must be [V, D], got {list(weight.shape)}")
    if target.dtype != torch.int64:
        faults.append(f"target must be int64, got {target.dtype}")
    if not 0 <= label_smoothing < 1:
        faults.append(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        faults.append(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if faults:
        raise ValueError(f"{op}: " + "; ".join(faults))
    if target.device.type == "cpu" and n:
        low, high = (int(x) for x in target.aminmax())
        if 0 <= low <= high < v and not low <= ignore_index <= high:
            return True
    valid = ((target == ignore_index) | ((target >= 0) & (target < v))).all()
    if target.is_cuda:  # without waiting for the device
        torch._assert_async(valid, f"{op}: target must be in [0, V) or ignore_index")
    elif not valid:
        outside = target[(target != ignore_index) & ((target < 0) | (target >= v))]
        raise IndexError(f"{op}: target must be in [0, V = {v}) or {ignore_index}, got {int(outside[0])}")
    return False
