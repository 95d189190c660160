"""The cases of every Triton kernel and every entry of the tables of tiles, on small ragged inputs.

A case runs under any executor: `case.run(executor)`. `case.launched()` gives its launches without running
them. `CASES` maps names to cases; those of a default run have `slow` False: the simulator of compiled code
takes those in `SIMULATED`, the interpreter the others.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from unittest import mock

import torch

from vlmkernels.reference.embedding_distillation import DISTANCES
from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _pairwise_classes as classes_of
from vlmkernels.triton import _pairwise_small as few_rows
from vlmkernels.triton import _rows as rows
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton import contrastive_distillation as distilled
from vlmkernels.triton import (
    distillation,
    embedding_distillation,
    gated_residual,
    info_nce,
    linear_cross_entropy,
    linear_distillation,
    sigmoid_loss,
    srau,
)

from .cases_attention import attentions
from .cases_dense import layers
from .cases_detection import boxes
from .cases_relative import relative
from .cases_retrieval import searches
from .launches import Launch, recording
from .trials import DTYPES, Executor, Trial, check, far, sanitized
from .trials_gated import Levels, Linear, Residual
from .trials_pairwise import CrossEntropy, Distillation, InfoNCE, Problem, Scaled, Sigmoid, TwoModels
from .trials_rows import Features, Logits

FP32, BF16, FP16 = DTYPES
HALF = (BF16, FP16)


@contextlib.contextmanager
def tf32_allowed() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@dataclasses.dataclass(frozen=True)
class Case:
    """A trial and the settings of the modules under which it runs."""

    op: str
    variant: str
    dtype: torch.dtype
    make: Callable[[torch.dtype], Trial]
    settings: Mapping[tuple[object, str], int]
    tf32: bool
    slow: bool
    far: bool = False  # rows so far apart that their memory is large, though hardly any of it is touched

    @property
    def name(self) -> str:
        return f"{self.op}, {self.variant}, {str(self.dtype).removeprefix('torch.')}"

    @contextlib.contextmanager
    def prepared(self) -> Iterator[Trial]:
        torch.manual_seed(0)
        with contextlib.ExitStack() as stack:
            for (module, name), value in self.settings.items():
                stack.enter_context(mock.patch.object(module, name, value))
            if self.tf32:
                stack.enter_context(tf32_allowed())
            yield self.make(self.dtype)

    def run(self, executor: Executor = sanitized) -> None:
        """Launch inside `executor()` and compare with float64."""
        with self.prepared() as trial:
            check(trial, executor)

    def launched(self) -> list[Launch]:
        with self.prepared() as trial, recording() as launches:
            trial.launch()
        return launches


def each(
    op, variant, make, dtypes=DTYPES, *, quick=(), settings=None, tf32=False, far=False
) -> Iterator[Case]:
    for dtype in dtypes:
        yield Case(op, variant, dtype, make, settings or {}, tf32, dtype not in quick, far)


def each_far(op, variant, make) -> Iterator[Case]:
    return each(op, variant, make, (BF16,), quick=(BF16,), far=True)


LARGE = {(tiles, "LARGE"): 0}
CHUNKS = {
    (pairwise, "CHUNK_ROWS"): 70,
    (info_nce, "PARTIAL_TILES"): 1,
    (info_nce, "PARTIAL_BYTES"): 0,
    (info_nce, "LINES"): 32,
    (info_nce, "PROGRAMS"): 2,
    (sigmoid_loss, "CHUNK_BYTES"): 0,
}


def with_far(trial: Trial, *names: str) -> Trial:
    """The trial with these inputs in rows that offsets of 32 bits do not reach."""
    for name in names:
        owner, _, attribute = name.rpartition(".")
        holder = getattr(trial, owner) if owner else trial
        setattr(holder, attribute, far(getattr(holder, attribute)))
    return trial


def by_pairs() -> Iterator[Case]:
    def problem(n, m, d, **options):
        return lambda t: Problem(n, m, d, t, **options)

    ragged = problem(70, 67, 37, normalize=True)
    square = problem(70, 70, 37)
    chunks = problem(135, 135, 24)
    wide = problem(140, 140, 100, scale_dtype=torch.float64)  # several steps of features, the last one ragged
    tf32 = problem(140, 140, 100, tf32=True)
    even = problem(70, 70, 128)
    long = problem(3, 4, 2100, normalize=True)  # more features than one program holds at once
    one = problem(1, 1, 1, scale=1.0)  # the rounding of one large logit is luck
    op = "info_nce"

    def nce(make, **options):
        return lambda t: InfoNCE(make(t), **options)

    def many(variant, make, *rest, settings=None, **options):
        """By the kernels of many rows."""
        return each(op, variant, make, *rest, settings={(few_rows, "LIMIT"): 0} | (settings or {}), **options)

    every = {"smoothing": 0.1, "weighted": True}
    rows = {"symmetric": False}
    yield from many("pairs", nce(square), quick=(FP32, BF16))
    yield from many("chunks", nce(chunks, store_bytes=0), quick=(FP16,), settings=CHUNKS)
    by_id = nce(problem(70, 70, 37, normalize=True), form="ids", **every)
    yield from many("by id", by_id, quick=(FP32, BF16))
    yield from many(
        "by id, chunks", nce(problem(135, 133, 24), form="ids", store_bytes=0, smoothing=0.2),
        quick=(FP16,), settings=CHUNKS,
    )  # fmt: skip
    yield from many("by index", nce(ragged, form="index", reduction="sum", **rows), quick=(BF16,))
    yield from many("by index, both ways", nce(ragged, form="index"))
    of_each = nce(square, reduction="none", **every)
    yield from many("of each row", of_each, quick=(FP32,))
    yield from many("one direction", nce(problem(70, 140, 100), **rows, **every))
    yield from many("one direction of each row", nce(problem(35, 67, 24), **rows, reduction="none"))
    yield from many("large tiles", nce(wide), settings=LARGE, quick=(BF16,))
    yield from many("large tiles, by id", nce(wide, form="ids", **every), settings=LARGE)
    yield from many("even", nce(even, smoothing=0.1))
    yield from many("long", nce(long, **rows, weighted=True), quick=(BF16,))
    yield from many("one", nce(one))
    low = problem(70, 70, 37, normalize=True, scale=1e-3)  # maximum and mean of the logits differ by little
    yield from many("low scale", nce(low), quick=(FP32,))
    yield from many("scale of 0", nce(problem(20, 20, 16, scale=0.0)))
    for i, name in enumerate(("queries", "keys", "scale")):
        needs = tuple(i == k for k in range(3))
        yield from many(f"gradient of the {name}", nce(problem(35, 35, 24), needs=needs))
    yield from many("tf32", nce(tf32), (FP32,), tf32=True)
    yield from many("tf32, large tiles", nce(tf32), (FP32,), tf32=True, settings=LARGE)
    yield from each(op, "few rows", nce(problem(70, 70, 150), smoothing=0.1), quick=(FP32, BF16, FP16))
    yield from each(
        op,
        "few rows by id",
        nce(problem(70, 67, 37), form="ids", weighted=False, smoothing=0.1),
        quick=(BF16,),
    )
    yield from each(op, "few rows, one direction", nce(problem(35, 67, 24), **rows, weighted=True))
    for i, name in enumerate(("queries", "keys", "scale")):
        needs = tuple(i == k for k in range(3))
        yield from each(op, f"few rows, gradient of the {name}", nce(problem(35, 35, 64), needs=needs))
    yield from each(op, "few rows, tf32", nce(tf32), (FP32,), tf32=True)

    op = "sigmoid_loss"

    def sigmoid(make, **options):
        return lambda t: Sigmoid(make(t), **options)

    yield from many("ragged, by ids", sigmoid(ragged, form="ids"), quick=(FP32, FP16))
    yield from many("chunks", sigmoid(chunks), quick=(BF16,), settings=CHUNKS)
    yield from many("chunks of each row", sigmoid(chunks, reduction="none"), quick=(FP16,), settings=CHUNKS)
    yield from many("wide", sigmoid(wide, form="pairs", reduction="sum"))
    yield from many("large tiles", sigmoid(wide), settings=LARGE, quick=(BF16,))
    yield from many("even", sigmoid(even, form="pairs", bias=3.0))
    yield from many("long", sigmoid(long, form="pairs"))
    yield from many("one", sigmoid(one))
    yield from many("loss alone", sigmoid(ragged, needs=(False,) * 4))
    yield from many("gradients alone", sigmoid(ragged, needs=(True, True, False, False)))
    for i, name in enumerate(("queries", "keys", "scale", "bias")):
        needs = tuple(i == k for k in range(4))
        yield from many(f"gradient of the {name}", sigmoid(problem(35, 40, 24), needs=needs))
    yield from many("tf32", sigmoid(tf32), (FP32,), tf32=True)
    yield from many("tf32, large tiles", sigmoid(tf32), (FP32,), tf32=True, settings=LARGE)

    yield from each(op, "few rows", sigmoid(problem(70, 140, 150)), quick=(FP32, BF16, FP16))
    yield from each(op, "few rows by ids", sigmoid(problem(70, 67, 37), form="ids"), quick=(BF16,))
    of_each = sigmoid(problem(70, 70, 24), form="pairs", reduction="none")
    yield from each(op, "few rows, each", of_each, quick=(FP16,))
    yield from each(op, "one tile", sigmoid(problem(35, 67, 24), reduction="sum"), quick=(FP32,))
    yield from each(op, "few rows, loss alone", sigmoid(problem(70, 70, 37), needs=(False,) * 4))
    for i, name in enumerate(("queries", "keys", "scale", "bias")):
        needs = tuple(i == k for k in range(4))
        yield from each(op, f"few rows, gradient of the {name}", sigmoid(problem(70, 70, 64), needs=needs))
    yield from each(op, "few rows, tf32", sigmoid(tf32), (FP32,), tf32=True)

    features = ("problem.query", "problem.key")
    for op, trial in (("info_nce", InfoNCE), ("sigmoid_loss", Sigmoid)):
        for normalize in (False, True):
            make = lambda t, f=trial, n=normalize: with_far(f(Problem(3, 3, 32, t, normalize=n)), *features)  # noqa: E731
            name, many_rows = f"far rows{', normalised' if normalize else ''}", {(few_rows, "LIMIT"): 0}
            yield from each(op, name, make, (BF16,), quick=(BF16,), far=True, settings=many_rows)
        make = lambda t, f=trial: with_far(f(Problem(3, 3, 32, t)), *features)  # noqa: E731
        yield from each_far(op, "few far rows", make)

    yield from each(
        "scale_grads", "four", lambda t: Scaled([(70, 67), (3000,), (), (1,)], t), quick=(FP32, BF16, FP16)
    )
    yield from each("scale_grads", "one", lambda t: Scaled([(5, 3)], t))


def by_teacher() -> Iterator[Case]:
    op = "contrastive_distillation"
    few = {
        (pairwise, "CHUNK_ROWS"): 70,
        (distilled, "PARTIAL_BYTES"): 0,
        (distilled, "PROGRAMS"): 2,
        (distilled, "LINES"): 32,
    }
    rows = {"symmetric": False, "divergence": "cross_entropy"}

    def case(n, m, d, e, **options):
        return lambda t: Distillation(n, m, d, e, t, **options)

    wide = (140, 67, 100, 140)  # several steps of features, the last one ragged
    yield from each(op, "ragged", case(70, 67, 37, 20), quick=(FP32, BF16))
    yield from each(
        op,
        "chunks",
        case(135, 135, 24, 40, store_bytes=0, reduction="none"),
        settings=few,
        quick=(FP16,),
    )
    yield from each(
        op,
        "chunks, cross entropy",
        case(135, 133, 24, 40, store_bytes=0, divergence="cross_entropy"),
        settings=few,
    )
    yield from each(op, "one direction", case(*wide, **rows), quick=(BF16,))
    yield from each(
        op, "one direction of each row", case(*wide, **rows, reduction="none", scale_dtype=torch.float64)
    )
    yield from each(op, "large tiles", case(*wide), settings=LARGE, quick=(BF16,))
    yield from each(op, "even", case(66, 70, 128, 64, reduction="sum"))
    yield from each(op, "one", case(1, 1, 1, 1, scale=1.0, teacher_scale=1.0))
    yield from each(op, "scale of 0", case(20, 30, 16, 16, scale=0.0))
    for i, name in enumerate(("queries", "keys", "scale")):
        needs = tuple(i == k for k in range(3))
        yield from each(op, f"gradient of the {name}", case(70, 67, 24, 30, needs=needs))
    yield from each(op, "tf32", case(*wide, tf32=True), (FP32,), tf32=True)
    yield from each(op, "tf32, large tiles", case(*wide, tf32=True), (FP32,), tf32=True, settings=LARGE)
    features = ("query", "key", "teacher_query", "teacher_key")
    yield from each_far(op, "far rows", lambda t: with_far(Distillation(3, 3, 32, 16, t), *features))


def by_classes() -> Iterator[Case]:
    op = "linear_cross_entropy"
    seven = {(pairwise, "CHUNK_ROWS"): 7, (classes_of, "CHUNK_BYTES"): 0}
    few = seven | {(linear_cross_entropy, "READ"): 64}
    every = {"bias": True, "column_scale": True, "smoothing": 0.1, "spread": 5.0}

    def case(n, classes, d, **options):
        return lambda t: CrossEntropy(n, classes, d, t, **options)

    yield from each(op, "ragged", case(9, 130, 37), quick=(FP32, FP16))
    yield from each(op, "chunks", case(16, 150, 20, **every), settings=few, quick=(BF16,))
    yield from each(op, "chunks left out", case(30, 150, 20, ignored=0.8), settings=few)
    yield from each(op, "wide", case(3, 2100, 2100, bias=True), quick=(BF16,))
    yield from each(op, "even", case(6, 128, 64, column_scale=True, smoothing=0.3))
    yield from each(op, "one", case(1, 1, 1, ignored=0.0))
    yield from each(op, "no row counts", case(8, 20, 5, ignored=1.0, **every), settings=few)
    yield from each(op, "loss alone", case(9, 70, 20, smoothing=0.1, needs=(False, False, False)))
    for i, name in enumerate(("hidden states", "weight", "bias")):
        needs = tuple(i == k for k in range(3))
        yield from each(op, f"gradient of the {name}", case(9, 70, 20, bias=True, needs=needs))
    yield from each_far(op, "far rows", lambda t: with_far(CrossEntropy(3, 5, 32, t), "hidden", "weight"))

    op = "linear_distillation"
    few = seven | {(distillation, name): 64 for name in ("READ", "HELD", "WRITTEN")}
    few |= {(linear_distillation, "READ"): 64, (linear_distillation, "NAMED"): 16, (rows, "TOTAL"): 4}
    mixed = {"hard_weight": 0.4, "biases": True}

    def taught(n, classes, d, **options):
        return lambda t: TwoModels(n, classes, d, t, **options)

    yield from each(op, "ragged", taught(9, 70, 37, reduction="mean", **mixed), quick=(FP32, FP16))
    jsd = mixed | {"divergence": "jsd"}
    yield from each(op, "chunks", taught(16, 150, 20, **jsd), settings=few, quick=(BF16,))
    yield from each(op, "chunks left out", taught(30, 150, 20, ignored=0.8), settings=few)
    every = {"targets": False, "reduction": "batchmean", "ahead": True}
    make = taught(9, 150, 20, divergence="reverse_kl", **every)
    yield from each(op, "all rows", make, settings=few, quick=(BF16,))
    yield from each(op, "targets alone", taught(9, 70, 20, hard_weight=1.0), settings=few)
    yield from each(op, "one", taught(1, 1, 1, width=1, targets=False))
    yield from each(op, "no row counts", taught(8, 20, 5, ignored=1.0, reduction="mean"), settings=few)
    yield from each(op, "float32 teacher", taught(9, 70, 20, teacher=FP32, **jsd), HALF)
    yield from each(op, "offline", taught(9, 70, 37, k=5, reduction="mean", **mixed), quick=(FP32, FP16))
    make = taught(16, 150, 20, k=37, **jsd)
    yield from each(op, "offline, chunks", make, settings=few, quick=(BF16,))
    yield from each(op, "offline, all rows", taught(9, 70, 20, k=20, **every), quick=(FP32,))
    yield from each(op, "offline, all classes", taught(9, 37, 20, k=37, divergence="jsd"), quick=(BF16,))
    yield from each(op, "offline, no classes", taught(9, 37, 20, k=0, divergence="jsd", hard_weight=0.4))
    yield from each(op, "offline, wide", taught(4, 2100, 20, k=9, **mixed), quick=(BF16,))
    for i, name in enumerate(("hidden states", "weight", "bias")):
        needs = tuple(i == k for k in range(3))
        yield from each(op, f"gradient of the {name}", taught(9, 70, 20, biases=True, needs=needs))
    tensors = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    yield from each_far(op, "far rows", lambda t: with_far(TwoModels(3, 40, 32, t, ignored=0.0), *tensors))


def by_rows() -> Iterator[Case]:
    op, few = "distillation", {(distillation, name): 64 for name in ("READ", "HELD", "WRITTEN")}
    blocks = few | {(rows, "TOTAL"): 4}
    mixed = {"hard_weight": 0.4, "reduction": "mean"}

    def logits(n, classes, **options):
        return lambda t: Logits(n, classes, t, **options)

    yield from each(op, "forward KL", logits(7, 130, **mixed), quick=(FP32, BF16), settings=blocks)
    yield from each(
        op, "reverse KL", logits(5, 150, divergence="reverse_kl", reduction="sum"), quick=(FP16,),
        settings=few,
    )  # fmt: skip
    jsd = {"divergence": "jsd", "hard_weight": 0.4}
    yield from each(op, "JSD", logits(5, 131, **jsd), quick=(FP32, BF16), settings=few)
    yield from each(op, "JSD in registers", logits(5, 70, temperature=1.0, **jsd), quick=(FP16,))
    for divergence in ("forward_kl", "reverse_kl"):
        make = logits(6, 300, divergence=divergence, targets=False, temperature=1.0, reduction="batchmean")
        yield from each(op, f"{divergence} of all rows", make)
    yield from each(op, "targets alone", logits(6, 96, hard_weight=1.0), quick=(BF16,), settings=few)
    yield from each(op, "no row counts", logits(6, 20, ignored=1.0, **mixed))
    yield from each(op, "targets alone, in a block", logits(6, 20, hard_weight=1.0))
    yield from each(op, "even", logits(6, 256, targets=False), settings=few)
    yield from each(op, "wide", logits(2, 5000, divergence="jsd", hard_weight=0.4))
    yield from each(op, "one", logits(1, 1, targets=False))
    yield from each(op, "float32 teacher", logits(6, 75, teacher=FP32, **jsd), HALF, settings=few)
    make = lambda t: with_far(Logits(3, 40, t, ignored=0.0), "student", "teacher")  # noqa: E731
    yield from each_far(op, "far rows", make)

    op, few = "embedding_distillation", {(embedding_distillation, "HELD"): 32}

    def features(n, depth, **options):
        return lambda t: Features(n, depth, t, **options)

    yield from each(op, "l1", features(70, 37, reduction="mean"), quick=(FP32, BF16))
    yield from each(op, "l1, long", features(7, 100, reduction="mean"), quick=(FP16,), settings=few)
    for distance in DISTANCES[1:]:
        make = features(9, 45, distance=distance, reduction="sum")
        yield from each(op, distance, make, quick=(FP32,))
        yield from each(op, f"{distance}, long", features(9, 70, distance=distance), settings=few)
        make = features(9, 70, distance=distance, normalize=False, weighted=False, reduction="mean")
        yield from each(op, f"{distance}, as it is", make, quick=(BF16,), settings=few)
    yield from each(op, "l1, as it is", features(9, 70, normalize=False, weighted=False))
    yield from each(op, "even", features(9, 64, weighted=False))
    yield from each(op, "one", features(1, 1))
    yield from each(op, "float32 teacher", features(9, 64, teacher=FP32), HALF)
    for power in range(14):  # every tile
        depth = max(1, 2**power - power // 3)
        n = embedding_distillation.blocks(depth)["BLOCK_R"] + 1
        make = features(n, depth, normalize=depth > 1)  # all that is 1 has no gradient
        yield from each(op, f"{n} rows of {depth}", make)
    make = lambda t: with_far(Features(3, 32, t, weighted=False), "student", "teacher")  # noqa: E731
    yield from each_far(op, "far rows", make)


def gated() -> Iterator[Case]:
    few = {(gated_residual, "PROGRAMS"): 2}
    both, channels = {"per_channel": True, "masked": True}, {"per_channel": True}
    op = "gated_residual"
    yield from each(op, "ragged", lambda t: Residual(33, 130, t), quick=(FP32, FP16), settings=few)
    yield from each(
        op, "channels, masked", lambda t: Residual(39, 100, t, **both), quick=(BF16,), settings=few
    )
    yield from each(op, "masked", lambda t: Residual(70, 37, t, masked=True), settings=few)
    yield from each(op, "wide", lambda t: Residual(2, 2100, t, **channels), quick=(BF16,), settings=few)
    yield from each(op, "wide, one gate", lambda t: Residual(3, 2100, t, masked=True), settings=few)
    yield from each(op, "gradient of y", lambda t: Residual(33, 130, t, needs=(True, False)))
    yield from each(op, "gradient of the gate", lambda t: Residual(33, 130, t, needs=(False, True)))
    yield from each(
        op, "float32 stream", lambda t: Residual(33, 40, FP32, y_dtype=t, **both), HALF, settings=few
    )
    yield from each(op, "small gates", lambda t: Residual(33, 40, t, gates=1e-3), quick=(FP32,))
    make = lambda t: Residual(33, 40, t, gates=10.0, **channels)  # noqa: E731
    yield from each(op, "large gates", make, quick=(FP32,))
    for power in range(12):  # every tile
        n, d = gated_residual.TILE // 2**power + 1, max(1, 2**power - power // 3)
        yield from each(op, f"{n} rows of {d}", lambda t, n=n, d=d: Residual(n, d, t, **both))

    op = "srau"
    yield from each(op, "ragged", lambda t: Levels(33, 130, t), quick=(FP32, FP16))
    yield from each(op, "paper, masked", lambda t: Levels(39, 100, t, paper=True, masked=True), quick=(BF16,))
    yield from each(op, "one level, wide", lambda t: Levels(2, 2100, t, levels=0, masked=True), quick=(FP32,))
    yield from each(op, "float32 text", lambda t: Levels(33, 40, t, language=FP32), HALF)
    for needed in ("language", "visual", "logits"):
        needs = tuple(needed == name for name in ("language", "visual", "logits"))
        yield from each(op, f"gradient of {needed}", lambda t, n=needs: Levels(9, 40, t, levels=2, needs=n))
    for power in range(11):  # every tile
        n, d = srau.TILE // 2**power + 1, max(1, 2**power - power // 3)
        yield from each(op, f"{n} rows of {d}", lambda t, n=n, d=d: Levels(n, d, t, levels=2, masked=True))

    op, rest = "gated_linear_residual", (tiles, "LARGE")
    yield from each(op, "ragged", lambda t: Linear(70, 67, 37, t, masked=True), quick=(FP32, FP16))
    yield from each(op, "channels", lambda t: Linear(37, 130, 100, t, **both), quick=(BF16,))
    yield from each(op, "large tiles", lambda t: Linear(140, 70, 100, t), settings={rest: 0}, quick=(BF16,))
    yield from each(op, "even", lambda t: Linear(66, 70, 128, t, **channels))
    yield from each(op, "one", lambda t: Linear(1, 1, 1, t))
    yield from each(op, "wide", lambda t: Linear(3, 5, 2100, t), quick=(BF16,))
    yield from each(op, "float32 stream", lambda t: Linear(20, 40, 30, t, x_dtype=FP32, **both), HALF)
    yield from each_far(op, "far rows", lambda t: with_far(Linear(3, 3, 32, t), "h", "weight"))
    yield from each(op, "gradient of the gate", lambda t: Linear(20, 40, 30, t, needs=(False, False, True)))
    yield from each(op, "tf32", lambda t: Linear(70, 67, 100, t, tf32=True), (FP32,), tf32=True)
    yield from each(
        op,
        "tf32, large tiles",
        lambda t: Linear(140, 70, 100, t, tf32=True),
        (FP32,),
        tf32=True,
        settings=LARGE,
    )


PARTS = (by_pairs, by_teacher, by_classes, by_rows, gated, partial(searches, each, with_far))
PARTS += tuple(partial(part, each) for part in (layers, attentions, relative, boxes))
CASES = {case.name: case for part in PARTS for case in part()}

# Each kernel once, in a type of one width; the interpreter takes the other default cases.
SIMULATED = {
    "info_nce, chunks, float16",
    "info_nce, of each row, float32",
    "info_nce, long, bfloat16",
    "info_nce, few rows, float32",
    "sigmoid_loss, ragged, by ids, float32",
    "sigmoid_loss, few rows, each, float16",
    "sigmoid_loss, one tile, float32",
    "scale_grads, four, bfloat16",
    "contrastive_distillation, ragged, float32",
    "contrastive_distillation, chunks, float16",
    "linear_cross_entropy, ragged, float32",
    "linear_distillation, offline, all classes, bfloat16",
    "distillation, JSD, float32",
    "distillation, far rows, bfloat16",
    "embedding_distillation, cosine, float32",
    "embedding_distillation, far rows, bfloat16",
    "gated_residual, channels, masked, bfloat16",
    "srau, paper, masked, bfloat16",
    "srau, one level, wide, float32",
    "gated_linear_residual, ragged, float32",
    "gated_linear_residual, large tiles, bfloat16",
    "topk_similarity, NaN, float32",
    "retrieval_ranks, NaN, float32",
    "mine_hard_negatives, far rows, bfloat16",
    "gated_mlp, ragged, float32",
    "mlp, no bias, float16",
    "interval_attention, frozen queries, float32",
    "interval_attention, bias, batches together, float32",
    "interval_attention, far rows, bfloat16",
    "relative_representation, fraction, float32",
    "relative_similarity, ragged, bfloat16",
    "contrastive_search_score, no token is alike, float32",
    "nms, groups, bfloat16",
    "roi_align, ragged, float32",
}
