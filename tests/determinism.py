"""Which results of the ops depend on the number of threads of a CPU.

`python -m tests.determinism` compares in this process, as it was started (VLMKERNELS_CPU_ISA,
VLMKERNELS_NATIVE), and prints {op: {dtype: [comparisons that differ, comparisons]}} as JSON;
`--write-docs` has it done for every instruction set, with torch's products and by the reference kernels, and
writes the table of docs/determinism.md.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vlmkernels
from tests import instruction_sets
from vlmkernels import _calibration
from vlmkernels.testing import result_and_gradients, unit_features

THREADS = (1, 2, 3, 8)
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
DENSE = ("linear", "mlp", "gated_mlp")  # torch may compute their products
PAGE = Path(__file__).parent.parent / "docs" / "determinism.md"
MARKS = "<!-- threads -->\n", "<!-- /threads -->\n"

# A few rows, many, odd numbers; the first QUICK of each are all kinds of them.
QUICK = 4
ATTENTION = [  # batch, heads, key heads, queries, keys, width
    (1, 1, 1, 1, 333, 64), (2, 4, 2, 2, 90, 20), (1, 1, 1, 37, 45, 20), (1, 2, 1, 300, 700, 16),
    (2, 4, 2, 100, 100, 64), (1, 8, 8, 197, 197, 64), (1, 1, 1, 64, 2000, 64),
]  # fmt: skip
LAYERS = [  # rows, inputs, outputs
    (1, 200, 600), (3, 64, 48), (130, 37, 53), (2300, 40, 24), (50, 512, 256), (700, 128, 96), (64, 3000, 48),
]  # fmt: skip
PAIRS = [  # queries, keys, width
    (1, 1, 8), (33, 33, 20), (300, 300, 64), (1300, 1300, 16), (600, 600, 37), (530, 900, 24),
    (100, 100, 2000),
]  # fmt: skip
ROWS = [(1, 1), (3, 333), (300, 7), (700, 2600), (1, 70_000), (2000, 130)]  # rows, classes
BOXES = [  # pictures, channels, height, width, boxes
    (1, 1, 1, 9, 1), (2, 3, 30, 41, 20), (1, 8, 9, 50, 40), (3, 5, 17, 16, 30), (1, 2, 70, 50, 70),
]  # fmt: skip

Case = tuple[str, Callable[..., Tensor], list[Tensor]]


def cases(dtype: torch.dtype, most: int | None = None) -> Iterator[Case]:
    """Op, a function of the tensors, tensors: the forms of every op, in `most` sizes."""
    for make, sizes in (
        (_attention, ATTENTION),
        (_layers, LAYERS),
        (_losses, PAIRS),
        (_hidden, PAIRS),
        (_of_rows, ROWS),
        (_relative, PAIRS),
        (_retrieval, PAIRS),
        (_detection, BOXES),
    ):
        for size in sizes[:most]:
            yield from make(dtype, *size)


def _rows(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def _with(op: Callable, **options: Any) -> Callable[..., Tensor]:
    return lambda *tensors: op(*tensors, **options)


def _attention(dtype, b, h, hk, tq, tk, d) -> Iterator[Case]:
    tensors = _rows(dtype, (b, h, tq, d), (b, hk, tk, d), (b, hk, tk, d))
    bias = torch.randn(h, 13, 13, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    some = [torch.randint(-3, tk + 4, (b, tq)) for _ in range(2)]
    whole = [torch.zeros(tq).long(), torch.full((tq,), tk)]

    def biased(query, key, value, bias):
        return vlmkernels.interval_attention(query, key, value, *some, relative_bias=bias, grid=(7, 7))

    yield "interval_attention", biased, [*tensors, bias]
    yield "interval_attention", lambda *qkv: vlmkernels.interval_attention(*qkv, *whole), tensors
    latents = _rows(dtype, *[(b, hk, min(tq, 64), d)] * 2)
    op = _with(vlmkernels.perceiver_attention, media_lengths=torch.randint(0, tk + 1, (b,)))
    yield "perceiver_attention", op, tensors + latents


def _layers(dtype, n, k, o) -> Iterator[Case]:
    x, residual, w1, b1, w2, b2, w_up, b_up = _rows(
        dtype, (n, k), (n, o), (o, k), (o,), (k, o), (k,), (o, k), (o,)
    )

    def gated(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
        return vlmkernels.gated_mlp(x, w_gate, w_up, w_down, b_gate=b_gate, b_up=b_up, b_down=b_down)

    yield "linear", _with(vlmkernels.linear, activation="gelu"), [x, w1, b1]
    yield "mlp", _with(vlmkernels.mlp, activation="gelu"), [x, w1, b1, w2, b2]
    yield "gated_mlp", gated, [x, w1, w_up, w2, b1, b_up, b2]
    mask, branch = torch.rand(n) > 0.3, _rows(dtype, (n, o))
    for gate in _rows(dtype, (1,), (o,)):
        op = _with(vlmkernels.gated_linear_residual, row_mask=mask)
        yield "gated_linear_residual", op, [residual, x, w1, gate]
        yield "gated_residual", _with(vlmkernels.gated_residual, row_mask=mask), [residual, *branch, gate]
    levels = _rows(dtype, (3, n, o), (3, n, o))
    yield "srau", _with(vlmkernels.srau, tau=0.2, row_mask=mask), [residual, *levels]


def _losses(dtype, n, m, d) -> Iterator[Case]:
    features = [x.requires_grad_() for x in unit_features(n, m, d, dtype=dtype)]
    work = torch.promote_types(dtype, torch.float32)
    scale, bias = (torch.tensor(x, dtype=work, requires_grad=True) for x in (10.0, -5.0))
    ids, index = (torch.randint(0, n, (n,)), torch.randint(0, n, (m,))), torch.randint(0, m, (n,))
    both = {"symmetric": n == m}
    for options in (
        both, {**both, "normalize": True}, {**both, "store_bytes": 0}, {**both, "reduction": "none"},
        {"symmetric": False, "positives": index}, {**both, "positives": ids, "label_smoothing": 0.1},
    ):  # fmt: skip
        yield "info_nce", _with(vlmkernels.info_nce, **options), [*features, scale]
    teacher = [*unit_features(n, m, d + 5, dtype=dtype), torch.tensor(20.0, dtype=work)]
    for options in ({}, {"store_bytes": 0}, {"symmetric": False, "divergence": "cross_entropy"}):

        def distilled(query, key, scale, options=options):
            return vlmkernels.contrastive_distillation(query, key, scale, *teacher, **options)

        yield "contrastive_distillation", distilled, [*features, scale]
    for options in ({}, {"normalize": True}, {"positives": ids}, {"positives": index, "reduction": "none"}):
        yield "sigmoid_loss", _with(vlmkernels.sigmoid_loss, **options), [*features, scale, bias]


def _hidden(dtype, n, v, d) -> Iterator[Case]:
    tensors = [x.requires_grad_() for x in _rows(dtype, (n, d), (v, d), (v,))]
    target = torch.where(torch.rand(n) < 0.8, torch.randint(0, v, (n,)), -100)
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}):

        def loss(hidden, weight, bias, options=options):
            return vlmkernels.linear_cross_entropy(hidden, weight, target, bias=bias, **options)

        yield "linear_cross_entropy", loss, tensors
    layer = {
        "teacher_hidden": torch.randn(n, d + 5).to(dtype),
        "teacher_weight": torch.randn(v, d + 5).to(dtype),
    }
    topk = {"teacher_topk": torch.randn(n, v).log_softmax(1).topk(min(v, 9))}
    mixed = {"target": target, "hard_weight": 0.5}
    reverse, jsd = {"divergence": "reverse_kl", "reduction": "none"}, mixed | {"divergence": "jsd"}
    for options in (layer, layer | reverse, layer | jsd, topk, topk | jsd):

        def distilled(hidden, weight, bias, options=options):
            return vlmkernels.linear_distillation(hidden, weight, student_bias=bias, **options)

        yield "linear_distillation", distilled, tensors


def _of_rows(dtype, n, v) -> Iterator[Case]:
    student, teacher = _rows(dtype, (n, v), (n, v))
    target = torch.where(torch.rand(n) < 0.8, torch.randint(0, v, (n,)), -100)
    for divergence, options in (
        ("forward_kl", {}),
        ("reverse_kl", {"reduction": "none"}),
        ("jsd", {"target": target, "hard_weight": 0.5}),
    ):
        op = _with(vlmkernels.distillation, divergence=divergence, temperature=2.0, **options)
        yield "distillation", op, [student, teacher.detach()]
    for distance, normalize in (("l1", True), ("l2", False), ("cosine", True), ("smooth_l1", True)):
        options = {"distance": distance, "normalize": normalize, "weight": torch.rand(n)}
        op = _with(vlmkernels.embedding_distillation, **options)
        yield "embedding_distillation", op, [student, teacher.detach()]


def _relative(dtype, n, m, d) -> Iterator[Case]:
    x, anchors = (y.detach() for y in _rows(dtype, (n, d), (m, d)))
    for k, p in ((20, 8.0), (5, 2.5)):
        yield "relative_representation", _first(vlmkernels.relative_representation, k=k, p=p), [x, anchors]
    at = torch.arange(d) * (1 + torch.arange(max(n, m)) % 3)[:, None]

    def products(v, w):
        return vlmkernels.relative_similarity((v, at[:n]), (w, at[:m]))

    yield "relative_similarity", products, [x, anchors]
    hidden, context, prob = (y.detach() for y in _rows(dtype, (3, n, d), (3, min(m, 60), d), (3, n)))
    op = _first(vlmkernels.contrastive_search_score, -1, alpha=0.5, beta=2.0)
    yield "contrastive_search_score", op, [prob, hidden, context, prob]


def _detection(dtype, pictures, channels, height, width, count) -> Iterator[Case]:
    corners = torch.rand(count, 2) * torch.tensor([width, height])
    corners = torch.cat([corners, corners + 20 * torch.rand(count, 2)], 1)
    boxes = torch.cat([torch.randint(pictures, (count, 1)), corners], 1)
    features = _rows(dtype, (pictures, channels, height, width))
    for options in ({}, {"sampling_ratio": 2, "aligned": False}):
        yield "roi_align", _with(vlmkernels.roi_align, boxes=boxes, output_size=(7, 5), **options), features
    corners = corners.repeat(10, 1) + torch.randn(10 * count, 1)
    scores, groups = torch.randn(len(corners)).to(dtype), torch.randint(3, (len(corners),))
    for group in (None, groups):
        op = _with(vlmkernels.nms, iou_threshold=0.3, groups=group)
        yield "nms", lambda *tensors, op=op: op(*tensors).double(), [corners.to(dtype), scores]


def _first(op: Callable, which: int = 0, **options: Any) -> Callable[..., Tensor]:
    """One of the results."""
    return lambda *tensors: op(*tensors, **options)[which]


def _retrieval(dtype, n, m, d) -> Iterator[Case]:
    """Results as numbers: values and indices, ranks, indices."""
    features, ids = unit_features(n, m, d, dtype=dtype), (torch.arange(n) % 7, torch.arange(m) % 7)

    def joined(op, *args, **options):
        def results(*tensors):
            found = op(*tensors, *args, **options)
            return torch.cat([x.double().flatten() for x in (found if isinstance(found, tuple) else [found])])

        return results

    for options in ({}, {"normalize": True}, {"both": True}):
        yield "topk_similarity", joined(vlmkernels.topk_similarity, 20, **options), [*features]
    scales = {"key_scale": torch.rand(m)}
    quantised = [features[0], (127 * features[1]).to(torch.int8)]
    yield "topk_similarity", joined(vlmkernels.topk_similarity, 20, **scales), quantised
    yield "retrieval_ranks", joined(vlmkernels.retrieval_ranks), [*features]
    yield "retrieval_ranks", joined(vlmkernels.retrieval_ranks, ids), [*features]
    for options in ({"normalize": True}, {"positives": ids, "groups": ids, "margin": 0.1}):
        yield "mine_hard_negatives", joined(vlmkernels.mine_hard_negatives, 20, **options), [*features]


Found = dict[str, dict[str, list[int]]]


def compare(dtypes: Iterable[str] = DTYPES, ops: Collection[str] = (), most: int | None = None) -> Found:
    """Of each op and dtype: how many results and gradients differ from those of one thread, of how many."""
    found: Found = {}
    before = torch.get_num_threads()
    try:
        for name in dtypes:
            torch.manual_seed(0)
            for op, fn, tensors in cases(DTYPES[name], most):
                if ops and op not in ops:
                    continue
                runs = []
                for threads in THREADS:
                    torch.set_num_threads(threads)
                    runs.append(result_and_gradients(fn, tensors))
                counts = found.setdefault(op, {}).setdefault(name, [0, 0])
                for run in runs[1:]:
                    same = all(a is b is None or torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
                    counts[0] += not same
                    counts[1] += 1
    finally:
        torch.set_num_threads(before)
    return found


def started(products: str = "own", **environment: str) -> Found:
    """What a process finds that is started with these environment variables."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.determinism", "--products", products]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def table() -> str:
    """The lines of the table, measured here."""
    chosen = vlmkernels.info()["cpu"]["instruction set"]
    sets = [chosen, *instruction_sets.others()]
    own = [started(VLMKERNELS_CPU_ISA=isa) for isa in sets]
    by_torch, reference = started("torch"), started(VLMKERNELS_NATIVE="0")
    where = f"{_calibration.cpu_name()}; {', '.join(sets)}; torch {torch.__version__}"
    lines = [
        f"{where}; {', '.join(map(str, THREADS))} threads\n",
        f"| op | {' | '.join(DTYPES)} | products by torch | reference kernels |",
        "|---|" + "---|" * (len(DTYPES) + 2),
    ]
    for op in sorted(reference):
        cells = [_cell([found[op][name] for found in own]) for name in DTYPES]
        cells.append(_cell([by_torch[op][name] for name in _calibration.DTYPES]) if op in DENSE else "")
        cells.append(_cell(list(reference[op].values())))
        lines.append(f"| [{op}]({op}.md) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(counts: list[list[int]]) -> str:
    differ, all_ = map(sum, zip(*counts, strict=True))
    return f"{differ} of {all_}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--products", choices=("own", "torch"), default="own")
    parser.add_argument("--write-docs", action="store_true")
    args = parser.parse_args()
    if args.write_docs:
        head, _, rest = PAGE.read_text().partition(MARKS[0])
        PAGE.write_text(head + MARKS[0] + table() + MARKS[1] + rest.partition(MARKS[1])[2])
        return
    _calibration.apply(_calibration.all_products(args.products))
    print(json.dumps(compare(ops=DENSE if args.products == "torch" else ())))


if __name__ == "__main__":
    main()
