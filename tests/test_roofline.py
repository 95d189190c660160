"""What the model predicts of the kernels on a GPU, and the page that shows it."""

import contextlib
import dataclasses
import json
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime import interpreter as stock

from benchmarks.cases.residual import residual_bytes
from benchmarks.gpu import pages, predict, published, trace
from benchmarks.gpu import workload as workload_module
from benchmarks.gpu import workloads as declared
from benchmarks.gpu.cards import CARDS, card_of
from benchmarks.gpu.workload import TRAINING
from benchmarks.gpu.workloads import workloads
from benchmarks.report import load_results
from tests.gpu.interpreter import interpreting
from tests.gpu.launches import Launch
from tests.gpu.ptx import counted
from tests.gpu.ptx.counters import SECTOR, Counters
from vlmkernels._library import KERNELS
from vlmkernels.ops import _pairwise_small
from vlmkernels.triton import _pairwise_small as few_rows

TWICE = "_attention_bwd._key_grads"
WITHOUT_CODE = ("B200", "RTX 5090", "MI300X")  # nothing is compiled for their predictions
WITHOUT_PRODUCTS = (
    "gated_residual",
    "srau",
    "linear_cross_entropy",
    "linear",
    "mlp",
    "gated_mlp",
    "relative_similarity",
    "contrastive_search_score",
    "roi_align",
)  # of their own, or none that the model counts
COUNTS = ("bytes", "moved", "flops", "kernels")  # of a prediction, whatever the code


def workload(op: str, form: str = "", type: str = "bf16", **sizes):
    found = next(w for w in workloads() if (w.op, w.type) == (op, type) and w.form.startswith(form))
    return dataclasses.replace(found, sizes={**found.sizes, **sizes})


@pytest.fixture(autouse=True)
def no_path_for_small_losses(monkeypatch):
    """With its extension the library has one on CPUs; on a GPU there is none."""
    monkeypatch.setattr(_pairwise_small, "LIMIT", 0)


# The model


def multiplied(of) -> int:
    """FLOPs of the products that the Triton kernels of a training call really do."""
    count = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(interpreting())
        create_dot = stock.InterpreterBuilder.create_dot

        def counting(self, a, b, *rest):
            nonlocal count
            count += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
            return create_dot(self, a, b, *rest)

        stack.enter_context(mock.patch.object(stock.InterpreterBuilder, "create_dot", counting))
        stack.enter_context(trace.OnTriton())
        tensors = of.tensors("cpu")
        out = of.ours(**tensors)
        torch.autograd.grad(out, [x for x in tensors.values() if x.requires_grad], torch.ones_like(out))
    return count


@pytest.mark.parametrize(
    "of",
    [
        workload("info_nce", "N=4096", n=70, m=70, d=40),
        workload("contrastive_distillation", "N=4096", n=70, m=70, d=40, e=70),
        workload("sigmoid_loss", "N=4096", n=70, m=90, d=40),
        workload("interval_attention", "full, 577", batch=1, heads=1, queries=70, keys=140, width=16),
        workload("interval_attention", "causal", batch=1, heads=1, queries=300, keys=300, width=16),
        workload("interval_attention", "prefix", batch=1, heads=1, queries=200, keys=220, width=16),
        workload("interval_attention", "full, 577", batch=1, heads=1, queries=90, keys=40, width=16),
        workload("interval_attention", "Flamingo", batch=1, heads=1, queries=300, keys=160, width=16),
        workload("perceiver_attention", batch=1, media=20, latents=10),
        workload("gated_linear_residual", "attention", rows=70, width=90, inner=40),
    ],
    ids=lambda of: of.op,
)
def test_the_model_counts_the_products_that_the_kernels_do(of):
    passes = predict.traced(of, "sm_80", TRAINING)
    counted = sum(step.flops for this in passes for step in this.steps if step.launch is not None)
    assert counted == multiplied(of) > 0


def test_the_model_counts_the_products_of_any_intervals(monkeypatch):
    """Empty ones, and some that begin before the first key or end behind the last."""
    queries, keys = 200, 150
    start = torch.randint(-5, keys + 5, (queries,), dtype=torch.int32)
    end = start + torch.randint(-5, 60, (queries,), dtype=torch.int32)
    start[128:140], end[128:140] = 100, 130
    start[140:], end[140:] = 3, 3
    for module in (workload_module, declared):
        monkeypatch.setattr(
            module, "bounds", lambda mask, queries, keys, device="cpu": (start.to(device), end.to(device))
        )
    of = workload("interval_attention", "causal", batch=1, heads=1, queries=queries, keys=keys, width=16)
    passes = predict.traced(of, "sm_80", TRAINING)
    counted = sum(step.flops for this in passes for step in this.steps)
    assert counted == multiplied(of) > 0


def test_a_product_of_cublas_reads_its_factors_and_writes_its_result():
    a, b, out = torch.empty(4, 6), torch.empty(6, 8), torch.empty(4, 8)
    this = trace.Pass()
    trace._recorded_product(this, a, b, out)
    trace._recorded_product(this, a, b, out, add=True)
    first, second = this.steps
    assert first.bytes == 4 * (24 + 48 + 32)
    assert second.bytes == first.bytes + 4 * 32
    assert first.flops == second.flops == 2 * 4 * 6 * 8


SCALE = "_ahead._scale"
ONE_TILE = [  # or few: then hardly an operand is read by two programs
    workload("gated_residual", batch=1, tokens=64, width=256),
    workload("info_nce", "N=4096", n=64, m=64, d=256),
    workload("contrastive_distillation", "N=4096", n=64, m=64, d=128, e=192),
    workload("sigmoid_loss", "N=4096", n=64, m=64, d=128),
    workload("interval_attention", "causal", batch=1, heads=1, queries=128, keys=128, width=64),
    workload("gated_linear_residual", "attention", rows=64, width=64, inner=128),
    workload("distillation", "KL", rows=16, classes=1024),
    workload("embedding_distillation", "l1", rows=32, width=256),
    pytest.param(workload("perceiver_attention", batch=1, media=64, latents=64), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("of", ONE_TILE, ids=lambda of: of.op)
def test_the_compiled_kernels_move_and_multiply_what_the_model_says(of, monkeypatch):
    """In the simulator of PTX: sectors of 32 bytes, and multiply-adds issued to tensor cores."""
    monkeypatch.setattr(few_rows, "LIMIT", 0)  # each of its programs reads all features of the others
    counts: list[tuple[Launch, Counters]] = []
    with counted(counts)(), trace.OnTriton():
        tensors = of.tensors("cpu")
        out = of.ours(**tensors)
        torch.autograd.grad(out, [x for x in tensors.values() if x.requires_grad], torch.ones_like(out))
    passes = predict.traced(of, "sm_80", TRAINING)
    steps = [step for this in passes for step in this.steps if step.launch is not None]
    steps = [step for step in steps if step.name != SCALE]  # a CPU sees that the incoming gradient is 1
    assert [step.name for step in steps] == [launch.name for launch, _ in counts]
    for step, (_, found) in zip(steps, counts, strict=True):
        moved = SECTOR * (found.global_loads.sectors + found.global_stores.sectors)
        # of an operand of several planes, which counts as a whole, a kernel may leave one out
        assert 0.98 * step.bytes <= moved <= 1.4 * step.bytes + 2048, step.name
        # 64 queries are too few for its warps, which multiply twice
        again = 2 if step.name == TWICE and of.op == "perceiver_attention" else 1
        assert 2 * found.tensor_fma == again * step.flops, step.name


@pytest.mark.parametrize(("op", "products"), [("info_nce", 4), ("sigmoid_loss", 3)])
def test_products_of_a_loss_are_those_of_its_algorithm(op, products):
    of = workload(op, "N=4096")
    n, m, d = of.sizes.values()
    passes = predict.traced(of, "sm_80", TRAINING)
    assert sum(this.flops for this in passes) == products * 2 * n * m * d


def test_products_of_a_distillation_are_those_of_student_and_teacher():
    of = workload("contrastive_distillation", "N=4096")
    n, m, d, e = of.sizes.values()
    passes = predict.traced(of, "sm_80", TRAINING)
    assert sum(this.flops for this in passes) == 2 * n * m * (4 * d + 2 * e)


@pytest.mark.parametrize("type", ["bf16", "fp32"])
def test_compulsory_bytes_of_a_residual_are_its_tensors(type):
    of = workload("gated_residual", type=type)
    itemsize = 2 if type == "bf16" else 4
    expected = residual_bytes(**of.sizes, itemsize=itemsize, kept=1.0, masked=False)
    passes = predict.traced(of, "sm_80", TRAINING)
    assert expected <= sum(this.compulsory for this in passes) < expected + 100  # the gate and its gradient


def test_a_kernel_in_cuda_is_predicted_by_its_launcher_in_triton(monkeypatch):
    of = workload("gated_residual")
    expected = [[step.name for step in this.steps] for this in predict.traced(of, "sm_80", TRAINING)]
    for name in ("gated_residual", "gated_residual_bwd"):
        monkeypatch.setitem(KERNELS, (name, "CUDA"), "CUDA C++ (80)")
    monkeypatch.setattr(trace, "CUDA", None)  # the dispatcher would find no launcher there
    assert [[step.name for step in this.steps] for this in predict.traced(of, "sm_80", TRAINING)] == expected


def test_what_fits_the_cache_and_does_not_stay_is_not_moved():
    given, between, result = 1, 2, 3
    read = {given: {0: 100}, between: {0: 80}}
    this = trace.Pass(made={between: 80, result: 40}, stays={result}, read=read, sizes={given: 100})
    this.steps = [
        trace.Step("first", [(given, 0, 100), (between, 0, 80)]),
        trace.Step("second", [(given, 0, 100), (between, 0, 80), (result, 0, 40)]),
    ]
    assert this.compulsory == 140
    assert this.from_memory(cache=1000) == [100, 40]
    assert this.from_memory(cache=90) == [100, 140]
    assert this.from_memory(cache=0) == [180, 220]


def test_each_slice_of_a_memory_is_read_and_none_twice():
    x, out = torch.zeros(3, 8), torch.zeros(8)
    this = trace.Pass()
    for i in (0, 1, 1):
        this.add("sum", [x[i]], [out])
    assert this.compulsory == 2 * x[0].nbytes
    assert this.from_memory(cache=1000) == [x[0].nbytes + out.nbytes, x[0].nbytes, 0]
    this.add("sum", [x], [out])
    assert this.compulsory == x.nbytes


def test_the_fullest_multiprocessor_decides_where_programs_are_even():
    step = trace.Step("a", [], 1e12, "half", mock.Mock(grid=(133, 1, 1)), even=True)
    card = CARDS["B200"]  # 148 multiprocessors, all but 15 have one program
    for even, longer in ((True, 148 / 133), (False, 1.0)):
        cost, _ = predict.facts_of(dataclasses.replace(step, even=even), 0, card)
        found = predict.estimate({"bytes": 0, "steps": [[1, *cost]]}, card)
        assert found["us"] == pytest.approx(1e12 / 2250e12 * 1e6 * longer, rel=1e-3)


def test_an_estimate_is_no_less_than_memory_and_products_need():
    for entry in predict.entries(workloads(), [CARDS[name] for name in WITHOUT_CODE]):
        for name, found in entry["cards"].items():
            at = (entry["op"], entry["form"], entry["type"], entry["direction"], name)
            assert found["us"] >= 0.999 * max(found["products_us"], 0), at
            assert found["us"] * CARDS[name].bandwidth * 1e3 >= 0.99 * found["bytes"], at
            assert found["kernels"] > 0, at
            assert found["code"] == {}, at


def test_cards_are_known_by_the_name_of_the_device():
    names = {
        "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200",
        "NVIDIA B200": "B200", "NVIDIA GeForce RTX 5090": "RTX 5090", "AMD Instinct MI300X OAM": "MI300X",
    }  # fmt: skip
    assert {device: card_of(device).name for device in names} == names
    others = ("NVIDIA H100 PCIe", "NVIDIA A100-PCIE-40GB", "NVIDIA GH200 480GB", "NVIDIA GB200")
    assert [card_of(device) for device in others] == [None] * 4
    for card in CARDS.values():
        assert card.peak("half") > card.peak("tf32") > card.peak("tf32x3")


# The stored predictions and the page


@pytest.fixture(scope="module")
def stored():
    return json.loads(predict.PREDICTIONS.read_text(encoding="utf-8"))


def test_the_page_shows_the_stored_predictions(stored):
    page = pages.PAGE.read_text(encoding="utf-8")
    results = load_results(pages.RESULTS)
    assert pages.render(page, stored, results) == page, "python -m benchmarks.gpu --write-docs"
    assert page.count(pages.LABEL) == 1 + len({entry["op"] for entry in stored["entries"]})


def test_every_workload_is_predicted_for_every_card(stored):
    found = [(x["op"], x["form"], x["type"], x["direction"]) for x in stored["entries"]]
    assert found == [(w.op, w.form, w.type, d) for w in workloads() if w.predicted for d in w.directions]
    assert all(list(entry["cards"]) == list(CARDS) for entry in stored["entries"])
    assert all(
        entry["cards"]["A100"]["code"] for entry in stored["entries"] if entry["op"] not in WITHOUT_PRODUCTS
    )


@pytest.mark.parametrize(
    ("of", "cards"),
    [
        (workload("gated_residual"), list(CARDS)),
        (workload("gated_linear_residual", "attention"), ["A100", "B200", "MI300X"]),
    ],
    ids=["gated_residual", "gated_linear_residual"],
)
def test_predictions_can_be_made_again(stored, of, cards):
    for made in predict.entries([of], [CARDS[name] for name in cards]):
        key = ("op", "form", "type", "direction", "sizes")
        kept = next(x for x in stored["entries"] if all(x[k] == made[k] for k in key))
        # Another release of Triton compiles to other instructions, but the work is the same
        same = triton.__version__ == stored["header"]["triton"]
        for name in cards:
            facts = made["cards"][name] if same else COUNTS
            expected, found = ({fact: card["cards"][name][fact] for fact in facts} for card in (kept, made))
            assert expected == found, "python -m benchmarks.gpu --predict"


@pytest.mark.slow
def test_all_stored_predictions_are_those_of_the_kernels(stored):
    made = list(predict.entries(workloads(), CARDS.values()))
    assert stored["entries"] == made, "python -m benchmarks.gpu --predict"


def test_published_figures_belong_to_a_workload(stored):
    shown = [figure for entry in stored["entries"] for figure in published.figures_for(entry)]
    assert len(shown) == len(published.FIGURES)
    assert all(figure.card in CARDS and figure.source for figure in published.FIGURES)
