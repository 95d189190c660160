"""out = Y f X^T / n: the features of boxes, each as h x w averages of linear interpolations."""

from collections.abc import Sequence

from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, kernel
from vlmkernels.reference.roi_align import (
    option_faults,
    roi_align_bwd,
    roi_align_fwd,
    shape_faults,
    with_pictures,
)


@arguments.public
def roi_align(
    features: Tensor,  # [B, C, H, W]
    boxes: Tensor | Sequence[Tensor],  # [K, 5], or for each picture [k, 4]
    output_size: int | tuple[int, int],
    *,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:  # [K, C, h, w]
    """The features within boxes, each on one grid: RoIAlign (He et al. 2017, Mask R-CNN, section 3).

    The same function as torchvision's.

    A box is divided into h x w bins, and a bin is the average of the features at its samples, interpolated
    linearly between the four pixels around each. Samples beyond one pixel from the picture count as 0. For
    the levels of a pyramid, call it with the boxes of each.

    Args:
        features: ``[B, C, H, W]`` of float32, float64, bfloat16 or float16, at most 2^20 rows and columns.
        boxes: ``[K, 5]``, each the index of its picture in the batch and the corners x1, y1, x2, y2; or a
            list of B tensors ``[k, 4]``. They may lie outside the picture. No gradient.
        output_size: ``(h, w)``, or one number for both, from 1 to 4096.
        spatial_scale: what the corners are multiplied by to get pixels of the features: 1/16 for corners in
            an image and features of stride 16.
        sampling_ratio: a bin has this many samples in each direction, from 1 to 1024; 0: as many as it has
            pixels, rounded up.
        aligned: with True a corner at 0 is the edge of the first pixel, as in Detectron2, with False its
            centre, as in the first version, where boxes are also widened to at least one pixel. That is the
            default of torchvision.

    Returns:
        ``[K, C, h, w]`` in the dtype of the features, with a gradient for them. Positions, weights and sums
        are float32 (float64 for float64 features). Gradients of a pixel are added in the order of the boxes.

    Raises:
        ValueError: naming every invalid argument.
        IndexError: a box of no picture: the first column of `boxes` is not a whole number in ``[0, B)`` (a
            device assertion on CUDA).
    """
    size = output_size if isinstance(output_size, tuple) else (output_size, output_size)
    tensors = {"features": features}
    if isinstance(boxes, Tensor):
        tensors["boxes"] = boxes
    else:
        tensors |= {f"boxes[{i}]": each for i, each in enumerate(boxes)}
    faults = shape_faults(features, boxes)
    faults += option_faults(size, features.shape[2:], spatial_scale, sampling_ratio)
    faults += arguments.dtype_faults(tensors)
    faults += arguments.device_faults(tensors)
    if faults:
        raise ValueError("roi_align: " + "; ".join(faults))
    rows = boxes if isinstance(boxes, Tensor) else with_pictures(features, boxes)
    return _op(features, rows.detach(), *size, spatial_scale, sampling_ratio, aligned)


def _fake(features, boxes, out_height, out_width, *options):
    return features.new_empty(boxes.shape[0], features.shape[1], out_height, out_width)


def _fake_bwd(dout, boxes, batch, height, width, *options):
    return dout.new_empty((batch, dout.shape[1], height, width) if options[-1][0] else 0)


def _setup_context(ctx, inputs, output) -> None:
    features, boxes, _, _, *ctx.options = inputs
    ctx.batch, _, *ctx.sizes = features.shape
    ctx.save_for_backward(boxes)


def _backward(ctx, needs, dout):
    if not needs["features"]:
        return {}
    (boxes,) = ctx.saved_tensors
    return {"features": _bwd(dout, boxes, ctx.batch, *ctx.sizes, *ctx.options, [True])}


_OPTIONS = "float spatial_scale, int sampling_ratio, bool aligned"

_op = define(
    f"roi_align(Tensor features, Tensor boxes, SymInt out_height, SymInt out_width, {_OPTIONS}) -> Tensor",
    reference=roi_align_fwd,
    fake=_fake,
    flops=lambda *_, **__: 0,
    setup_context=_setup_context,
    backward=_backward,
)
_bwd = define(
    f"roi_align_bwd(Tensor dout, Tensor boxes, SymInt batch, SymInt height, SymInt width, {_OPTIONS}, "
    "bool[1] needs) -> Tensor dfeatures",
    reference=roi_align_bwd,
    fake=_fake_bwd,
    flops=lambda *_, **__: 0,
)

if TRITON:
    from vlmkernels.triton import roi_align as _triton

    kernel("roi_align", "CUDA", _triton.roi_align, "Triton")
    kernel("roi_align_bwd", "CUDA", _triton.roi_align_bwd, "Triton")
