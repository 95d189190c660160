"""Valid arguments of every public op, `vlmkernels.ops.__all__`, by name, and what a call may end in."""

from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

import vlmkernels
from vlmkernels import ops, reference

from . import raw, raw_detection, raw_retrieval
from .children import Wrong
from .damage import damaged, shown
from .draw import Draw
from .memory import guarded

ARGUMENTS: dict[str, Callable[[Draw], dict[str, Any]]] = {}
OF_OTHER_KINDS = (
    None,
    "x",
    0,
    1,
    2.5,
    True,
    -1,
    (),
    [],
    {},
    object(),
    b"",
    numpy.ones(3),
    range(3),
    complex(1),
)


def arguments(make: Callable[[Draw], dict[str, Any]]) -> Callable[[Draw], dict[str, Any]]:
    ARGUMENTS[make.__name__] = make
    return make


def named(op: str, values: list) -> dict[str, Any]:
    """Arguments of the raw op of that name."""
    names = (argument.name for argument in getattr(torch.ops.vlmkernels, op).default._schema.arguments)
    return dict(zip(names, values, strict=True))


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


@arguments
def gated_residual(draw: Draw) -> dict[str, Any]:
    return named("gated_residual", raw.gated_residual(draw))


@arguments
def gated_linear_residual(draw: Draw) -> dict[str, Any]:
    return named("gated_linear_residual", raw.gated_linear_residual(draw))


@arguments
def linear(draw: Draw) -> dict[str, Any]:
    return without(named("linear", raw.linear(draw)), "keep")


@arguments
def mlp(draw: Draw) -> dict[str, Any]:
    return without(named("mlp", raw.mlp(draw)), "keep")


@arguments
def gated_mlp(draw: Draw) -> dict[str, Any]:
    return without(named("gated_mlp", raw.gated_mlp(draw)), "keep")


@arguments
def interval_attention(draw: Draw) -> dict[str, Any]:
    values = named("interval_attention", raw.interval_attention(draw))
    grid = (values["grid_rows"], values["grid_cols"]) if values["relative_bias"] is not None else None
    scale = draw.maybe(values["scale"])
    return {
        **without(values, "grid_rows", "grid_cols", "causal", "query_ends", "key_ends"),
        **{"grid": grid, "scale": scale, "return_lse": draw.flag()},
    }


@arguments
def perceiver_attention(draw: Draw) -> dict[str, Any]:
    values = named("perceiver_attention", raw.perceiver_attention(draw))
    return {**values, "scale": draw.maybe(0.5)}


def with_positives(values: dict[str, Any]) -> dict[str, Any]:
    positives, key_ids = values["positives"], values["key_ids"]
    both = positives if key_ids is None else (positives, key_ids)
    return {**without(values, "key_ids"), "positives": both}


def with_targets(draw: Draw, values: dict[str, Any]) -> dict[str, Any]:
    return {**with_positives(values), "scale": draw.choice((values["scale"], 10.0))}


@arguments
def info_nce(draw: Draw) -> dict[str, Any]:
    return with_targets(draw, named("info_nce", raw.info_nce(draw)))


@arguments
def contrastive_distillation(draw: Draw) -> dict[str, Any]:
    values = named("contrastive_distillation", raw.contrastive_distillation(draw))
    return {**values, "teacher_scale": draw.choice((values["teacher_scale"], 10.0))}


@arguments
def sigmoid_loss(draw: Draw) -> dict[str, Any]:
    values = with_targets(draw, named("sigmoid_loss", raw.sigmoid_loss(draw)))
    return without(values, "need_query", "need_key", "need_scalars")


@arguments
def linear_cross_entropy(draw: Draw) -> dict[str, Any]:
    values = named("linear_cross_entropy", raw.linear_cross_entropy(draw))
    return without(values, "need_hidden", "need_weight", "need_bias")


@arguments
def linear_distillation(draw: Draw) -> dict[str, Any]:
    values = named("linear_distillation", raw.linear_distillation(draw))
    topk = values["teacher_log_probs"], values["teacher_indices"]
    rest = without(values, "teacher_log_probs", "teacher_indices", "need_hidden", "need_weight", "need_bias")
    return {**rest, "teacher_topk": None if topk[0] is None else topk}


@arguments
def distillation(draw: Draw) -> dict[str, Any]:
    return without(named("distillation", raw.distillation(draw)), "need_student")


@arguments
def embedding_distillation(draw: Draw) -> dict[str, Any]:
    return without(named("embedding_distillation", raw.embedding_distillation(draw)), "need_student")


@arguments
def srau(draw: Draw) -> dict[str, Any]:
    return named("srau", raw.srau(draw))


@arguments
def nms(draw: Draw) -> dict[str, Any]:
    return named("nms", raw_detection.nms(draw))


@arguments
def roi_align(draw: Draw) -> dict[str, Any]:
    values = named("roi_align", raw_detection.roi_align(draw))
    size = values["out_height"], values["out_width"]
    if draw.flag():
        pictures = range(len(values["features"]))
        values["boxes"] = tuple(raw_detection.corners(draw, draw.size()) for _ in pictures)
    return {**without(values, "out_height", "out_width"), "output_size": draw.choice((size, size[1]))}


@arguments
def topk_similarity(draw: Draw) -> dict[str, Any]:
    values = named("topk_similarity", raw_retrieval.topk_similarity(draw))
    rescore = None if values["both"] else draw.maybe(draw.floats(*values["key"].shape))
    return {**values, "rescore": rescore}


@arguments
def relative_representation(draw: Draw) -> dict[str, Any]:
    x = draw.floats(draw.size(), draw.size())
    anchors = draw.floats(draw.size(), x.shape[1], dtype=draw.choice((x.dtype, draw.dtype())))
    return {"x": x, "anchors": anchors, "k": draw.choice((1, 3, 800)), "p": draw.choice((8.0, 1.0, 2.5))}


@arguments
def relative_similarity(draw: Draw) -> dict[str, Any]:
    values = raw_retrieval.relative_similarity(draw)
    return {"image_rep": tuple(values[:2]), "text_rep": tuple(values[2:])}


@arguments
def contrastive_search_score(draw: Draw) -> dict[str, Any]:
    return named("contrastive_search_score", raw_retrieval.contrastive_search_score(draw))


@arguments
def retrieval_ranks(draw: Draw) -> dict[str, Any]:
    return with_positives(named("retrieval_ranks", raw_retrieval.retrieval_ranks(draw)))


@arguments
def mine_hard_negatives(draw: Draw) -> dict[str, Any]:
    values = with_positives(named("mine_hard_negatives", raw_retrieval.mine_hard_negatives(draw)))
    own, other = values["query_groups"], values["key_groups"]
    groups = None if own is None else (own, other)
    return {**without(values, "query_groups", "key_groups"), "groups": groups}


def drawn(seed: int) -> tuple[str, dict[str, Any], list[str]]:
    """A function, its arguments, and which of them are damaged."""
    draw = Draw(seed)
    name = draw.choice(ops.__all__)
    values = ARGUMENTS[name](draw)
    which = sorted(draw.sample(sorted(values), min(len(values), draw.choice((0, 1, 1, 1, 2, 3)))))
    for each in which:
        values[each] = _damaged(draw, values[each], list(values.values()))
    kept = guarded(list(values.values()), at_end=draw.flag())
    values = dict(zip(values, kept, strict=True))
    for value in values.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.is_leaf and draw.flag():
            value.requires_grad_()
    return name, values, which


def _damaged(draw: Draw, value: Any, others: list) -> Any:
    if draw.random() < 0.1:
        return draw.choice(OF_OTHER_KINDS)
    if not isinstance(value, tuple):
        return damaged(draw, value, others)
    i = draw.randrange(len(value))
    return (*value[:i], _damaged(draw, value[i], others), *value[i + 1 :][: draw.choice((9, 9, 9, 0))])


def call(seed: int) -> bool:
    name, values, which = drawn(seed)
    try:
        results = getattr(vlmkernels, name)(**values)
    except (ValueError, IndexError, TypeError) as error:
        if not which:
            raise Wrong(f"{name} refuses valid arguments: {error}")
        if name not in str(error):
            raise Wrong(f"{name}: {type(error).__name__} without the name of the op: {error}")
        return False
    except Exception as error:
        if _without_memory(error):
            return False
        raise Wrong(f"{name}: {type(error).__name__}: {error}")
    _check(name, values, results)
    return True


def _without_memory(error: Exception) -> bool:
    said = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def _check(name: str, values: dict[str, Any], results: Any) -> None:
    """Results are of the reference's shape and dtype, gradients of those of what they belong to."""
    results = results if isinstance(results, tuple) else (results,)
    try:
        with torch.no_grad():
            wanted = getattr(reference, name)(**values)
    except Exception as error:
        if _without_memory(error):
            return
        raise
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for ours, theirs in zip(results, wanted, strict=True):
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise Wrong(f"{name} gives {shown(ours)}, the reference {shown(theirs)}")
    inputs = {
        each: value for each, value in values.items() if isinstance(value, Tensor) and value.requires_grad
    }
    if not any(result.requires_grad for result in results):
        return
    try:
        grads = torch.autograd.grad(
            sum(result.double().sum() for result in results), list(inputs.values()), allow_unused=True
        )
    except Exception as error:
        raise Wrong(f"{name}, backward: {type(error).__name__}: {error}")
    for (each, value), grad in zip(inputs.items(), grads, strict=True):
        if grad is not None and (grad.shape, grad.dtype) != (value.shape, value.dtype):
            raise Wrong(f"{name}: gradient of {each} {shown(value)} is {shown(grad)}")


def told(seed: int) -> str:
    """The call as text."""
    name, values, which = drawn(seed)
    lines = [
        f"  {each} = {shown(value)}{' (damaged)' if each in which else ''}" for each, value in values.items()
    ]
    return "\n".join([f"vlmkernels.{name}", *lines])
