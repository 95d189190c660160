"""Products of sparse rows: representations of images and of texts over the same anchors (ASIF).

A row is its values v and their indices, which ascend; elsewhere it is 0:

    sim_qc = sum over the indices a that rows q and c both have of  v_qa w_ca

A row with a value that is not finite has NaN products, as in the dense product.
"""

import torch
from torch import Tensor

Representation = tuple[Tensor, Tensor]  # values [rows, k], indices [rows, k] int64


def relative_similarity(image_rep: Representation, text_rep: Representation) -> Tensor:  # [Q, C]
    """The definition."""
    return relative_similarity_fwd(*image_rep, *text_rep)


def relative_similarity_fwd(
    image_values: Tensor,  # [Q, k]
    image_indices: Tensor,  # [Q, k] int64
    text_values: Tensor,  # [C, l]
    text_indices: Tensor,  # [C, l] int64
) -> Tensor:  # [Q, C]
    """The raw op. One image at a time: its indices are searched for those of all texts."""
    check(image_values, image_indices, text_values, text_indices)
    work = torch.promote_types(torch.promote_types(image_values.dtype, text_values.dtype), torch.float32)
    v, w = image_values.detach().to(work), text_values.detach().to(work)
    k = v.shape[1]
    out = (v * 0).sum(1)[:, None] + (w * 0).sum(1)
    for i in range(len(v) if k else 0):
        row = image_indices[i].contiguous()
        at = torch.searchsorted(row, text_indices.contiguous()).clamp_max(k - 1)  # [C, l]
        out[i] += (v[i][at] * w).where(row[at] == text_indices, 0).sum(1)
    return out


def check(image_values: Tensor, image_indices: Tensor, text_values: Tensor, text_indices: Tensor) -> None:
    """The raw op gets any tensors."""
    named = {"image": (image_values, image_indices), "text": (text_values, text_indices)}
    faults = [fault for side, rep in named.items() for fault in rep_faults(side, rep)]
    if faults:
        raise ValueError("relative_similarity: " + "; ".join(faults))
    for side, (_, indices) in named.items():
        check_order(f"{side}_indices", indices)


def rep_faults(side: str, rep: Representation) -> list[str]:
    values, indices = rep
    if values.dim() == 2 and indices.shape == values.shape and indices.dtype == torch.int64:
        return []
    got = " and ".join(f"{x.dtype} {list(x.shape)}" for x in rep)
    return [f"{side}_rep must be values and indices [rows, k], indices of int64, got {got}"]


def check_order(name: str, indices: Tensor) -> None:
    """None negative, ascending in each row."""
    ordered = (indices[:, :1] >= 0).all() & (indices[:, 1:] > indices[:, :-1]).all()
    if indices.is_cuda or indices.is_meta:  # without waiting for the device
        torch._assert_async(ordered, f"relative_similarity: {name} must ascend in each row, from 0 on")
    elif not ordered:
        raise ValueError(f"relative_similarity: {name} must ascend in each row, from 0 on")
