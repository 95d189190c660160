"""The contrastive losses of problems so small that the overhead of streaming kernels would dominate.

The similarity matrix is materialised: the forward computes the loss and, if gradients are needed, those of
the logits, which the backward multiplies with the features. The overhead of a call is small: two kernels, and
a Function without the layers of a registered op, which is why traced code does not use it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vlmkernels._library import define_part, has_kernel
from vlmkernels._modules import is_transformed
from vlmkernels.ops import _pairwise as pairwise

# Up to so many queries or keys this is faster than the streaming kernels.
LIMIT = 1024

# S_ij = scale a_i b_j <q_i, k_j> + bias, with a, b inverse norms or 1; the pairs (i, i) are positive. Without
# a bias the loss is the mean cross-entropy along the rows, averaged with that along the columns when
# symmetric; with one it is the sum of the logistic losses of all pairs over N. G = dloss/dS:
#   slope_ij = G_ij b_j [N, M]    slope_t_ji = G_ij a_i [M, N]    0 at positives, rows padded to 64
#   positive_i = G_ii             dscalars: the derivatives by scale and bias
# Outputs that are not needed are empty. Distillation has no positives: its slopes are of all pairs.
_fwd = define_part(
    "small_loss(Tensor query, Tensor key, Tensor scale, Tensor? bias, bool symmetric, float label_smoothing,"
    " bool normalize, bool need_query, bool need_key, bool need_scalars)"
    " -> (Tensor loss, Tensor slope, Tensor slope_t, Tensor positive, Tensor dscalars)",
    flops=lambda query, key, *_, **__: pairwise.flops(query, key),
)
_distil = define_part(
    "small_distillation(Tensor query, Tensor key, Tensor scale, Tensor teacher_query, Tensor teacher_key,"
    " Tensor teacher_scale, bool symmetric, bool cross_entropy, bool mean, bool need_query, bool need_key,"
    " bool need_scalars) -> (Tensor loss, Tensor slope, Tensor slope_t, Tensor positive, Tensor dscalars)",
    flops=lambda query, key, scale, teacher_query, teacher_key, *_, **__: (
        pairwise.flops(query, key) + pairwise.flops(teacher_query, teacher_key)
    ),
)
_bwd = define_part(
    "small_loss_bwd(Tensor dloss, Tensor query, Tensor key, Tensor scale, Tensor? bias, Tensor slope,"
    " Tensor slope_t, Tensor positive, Tensor dscalars, bool normalize, bool[4] needs)"
    " -> (Tensor dquery, Tensor dkey, Tensor dscale, Tensor dbias)",
    flops=lambda dloss, query, key, *rest, **_: pairwise.flops(query, key, sum(rest[-1][:2])),
)
_HERE = has_kernel("small_loss", "CPU")


def serves(query: Tensor, key: Tensor, *teacher: Tensor) -> bool:
    """Whether the problem is small, on a CPU, of one dtype, and neither traced (sizes must not choose the
    path) nor under transforms (which the op refuses).
    """
    if not _HERE or query.device.type != "cpu" or torch.compiler.is_compiling() or is_transformed():
        return False
    if torch.is_autocast_enabled("cpu") or not _PLAIN.issuperset(map(type, (query, key, *teacher))):
        return False
    if any(x.dtype != query.dtype or x.shape[1] == 0 for x in teacher):
        return False
    (n, d), m = query.shape, key.shape[0]
    return 0 < n <= LIMIT and 0 < m <= LIMIT and d > 0


def loss(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,
    bias: Tensor | None,
    symmetric: bool,
    label_smoothing: float,
    normalize: bool,
) -> Tensor:
    """The cross-entropy, or with a bias the logistic loss; key i is the positive of query i."""
    inputs = (query, key, scale, bias)
    form = partial(_fwd, *inputs, symmetric, label_smoothing, normalize)
    return _result("info_nce" if bias is None else "sigmoid_loss", form, normalize, *inputs)


def distillation(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,
    teacher_query: Tensor,  # [N, E]
    teacher_key: Tensor,  # [M, E]
    teacher_scale: Tensor,
    symmetric: bool,
    cross_entropy: bool,
    mean: bool,
) -> Tensor:
    """The divergence of the teacher's softmaxes from the student's: the mean of its rows, or the sum."""
    teacher = (teacher_query, teacher_key, teacher_scale)
    form = partial(_distil, query, key, scale, *teacher, symmetric, cross_entropy, mean)
    return _result("contrastive_distillation", form, False, query, key, scale, None)


def _result(
    op: str, form: Callable, normalize: bool, query: Tensor, key: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """The loss from `form`, which gives it with what the backward needs of the inputs that it is told."""
    needs = [t is not None and t.requires_grad for t in (query, key, scale, bias)]
    if torch.is_grad_enabled() and any(needs):
        form = partial(form, needs[0], needs[1], needs[2] or needs[3])
        return _Loss.apply(op, form, normalize, query, key, scale, bias)
    return form(False, False, False)[0]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, form, normalize, *inputs):
        loss, *formed = form()
        ctx.save_for_backward(*inputs, *formed)
        ctx.op, ctx.normalize = op, normalize
        return loss

    @staticmethod
    def backward(ctx, dloss):
        needs = list(ctx.needs_input_grad[3:])
        form = partial(_Gradients.apply, ctx.op) if torch.is_grad_enabled() else _bwd
        grads = form(dloss, *ctx.saved_tensors, ctx.normalize, needs)
        given = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return None, None, None, *given


class _Gradients(torch.autograd.Function):
    """Under create_graph: the gradients, which have no derivative."""

    @staticmethod
    def forward(ctx, op, *inputs):
        ctx.op = op
        return _bwd(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"vlmkernels.{ctx.op} has no second derivative")


_PLAIN = {Tensor, torch.nn.Parameter}
