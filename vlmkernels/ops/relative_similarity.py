"""Dot products of sparse rows: relative representations of images with those of texts."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, kernel
from vlmkernels.ops._retrieval import no_gradients
from vlmkernels.reference.relative_similarity import relative_similarity_fwd, rep_faults


@arguments.public
def relative_similarity(
    image_rep: tuple[Tensor, Tensor],  # [Q, k] each
    text_rep: tuple[Tensor, Tensor],  # [C, l] each
) -> Tensor:  # [Q, C]
    """Similarities of images and texts by the anchors that both have (ASIF: Norelli et al. 2023).

    Args:
        image_rep: values ``[Q, k]`` and indices ``[Q, k]`` int64 of the anchors, as `relative_representation`
            gives them: ascending in each row, from 0 on.
        text_rep: ``[C, l]`` likewise; its l may be another number than k.

    Returns:
        ``[Q, C]``, float32 (float64 if values are): the dot products of the rows, which are 0 at all other
        anchors. Cosines, since rows of `relative_representation` have norm 1. They have no gradient. NaN in
        rows of values that are not all finite, as in a dense product. Autocast changes nothing.

    Raises:
        ValueError: naming every invalid argument; for indices that do not ascend, a device assertion on CUDA.
    """
    if not (isinstance(image_rep, tuple) and isinstance(text_rep, tuple)):
        raise TypeError("relative_similarity takes pairs of values and indices")
    faults = rep_faults("image", image_rep) + rep_faults("text", text_rep)
    faults += arguments.dtype_faults({"the values of image_rep": image_rep[0], "text_rep": text_rep[0]})
    tensors = (*image_rep, *text_rep)
    faults += arguments.device_faults({str(i): x for i, x in enumerate(tensors)})
    if faults:
        raise ValueError("relative_similarity: " + "; ".join(faults))
    return _op(*tensors)


def _fake(image_values, image_indices, text_values, text_indices):
    work = torch.promote_types(torch.promote_types(image_values.dtype, text_values.dtype), torch.float32)
    return image_values.new_empty((image_values.shape[0], text_values.shape[0]), dtype=work)


_op = define(
    "relative_similarity(Tensor image_values, Tensor image_indices, Tensor text_values, Tensor text_indices)"
    " -> Tensor",
    reference=relative_similarity_fwd,
    fake=_fake,
    flops=lambda *_, **__: 0,
    setup_context=no_gradients,
)

if TRITON:
    from vlmkernels.triton import relative_similarity as _triton

    kernel("relative_similarity", "CUDA", _triton.relative_similarity, "Triton")
