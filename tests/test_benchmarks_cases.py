"""The declared cases: their FLOPs and bytes, that each runs, and that peers give what ours gives."""

from dataclasses import replace

import pytest
import torch

from benchmarks import cases as registry
from benchmarks import measure, peers, run
from benchmarks.cases import attention, pairwise, residual

MODULES = ("cross_attention", "media_cache", "perceiver")


def test_contrastive_flops():
    n, m, d = 6, 10, 4
    product = 2 * n * m * d
    count = pairwise.pairwise_flops
    assert count(n, m, d, backward=True, towers=2, recomputed=1.0) == (4 * product, 3 * product)
    assert count(n, m, d, backward=True, towers=2, recomputed=0.25) == (3.25 * product, 3 * product)
    assert count(n, m, d, backward=True, towers=1, recomputed=0.0) == (2 * product, 2 * product)
    assert count(n, m, d, backward=False, towers=2, recomputed=1.0) == (product, product)


def test_residual_bytes():
    rows, width = 6, 8
    moved = residual.residual_bytes(2, 3, width, itemsize=4, kept=1.0, masked=False)
    assert moved == 6 * rows * width * 4
    moved = residual.residual_bytes(2, 3, width, itemsize=2, kept=0.5, masked=True)
    assert moved == 4.5 * rows * width * 2 + 2 * rows


def test_bytes_of_a_contrastive_case_count_trained_towers():
    found = {c.name: c for c in pairwise.sigmoid_loss(False, "cpu")}
    n, d = 2048, 512
    assert found["N=2048 D=512 frozen key fp32"].bytes == (2 * n + n) * d * 4
    assert found["N=4096 D=512 bf16"].bytes == 4 * 4096 * d * 2
    assert found["N=4096 D=512 forward only fp32"].bytes == 2 * 4096 * d * 4


@pytest.mark.parametrize("declared", registry.all_cases(quick=True), ids=lambda declared: declared.id)
def test_every_declared_case_runs_at_a_small_size(declared):
    tensors, dout = declared.inputs("cpu", small=True)
    out, *grads = measure.step(declared.ours, tensors, dout, declared.backward)
    assert out.isfinite().all()
    wanted = [t for t in tensors.values() if t.requires_grad]
    assert [g.shape for g in grads] == [t.shape for t in wanted]
    assert bool(wanted) == declared.backward


@pytest.mark.sampled(4)
@pytest.mark.parametrize("declared", registry.all_cases(quick=True), ids=lambda declared: declared.id)
def test_every_peer_gives_what_ours_gives(declared):
    found = run.measure_case(replace(declared, memory=False), device="cpu", seconds=0.0, quick=True)
    assert found["baselines"]
    for row in found["baselines"]:
        missing = "open_flamingo" in row["name"] and peers.why_not("open_flamingo.src.helpers")
        missing = missing or "torchvision's extension does not load" in row.get("why_not", "")
        later = "chunk_size" in row["name"]  # an option of open_clip after 3.3
        assert "ratio" in row or missing or later, row.get("why_not")


@pytest.mark.parametrize("op", sorted({c.op for c in registry.all_cases()}))
def test_every_op_has_a_headline_case_with_a_compiled_peer(op):
    headline = [c for c in registry.all_cases() if c.op == op and c.headline]
    assert {c.dtype for c in headline} == {torch.float32, torch.bfloat16}
    assert all(any(b.compiled for b in c.baselines) for c in headline)
    assert all(c.memory for c in headline if c.backward)


def test_flamingo_core_of_a_peer_is_the_core_alone():
    """The stand-ins for the projections keep their results: no product with a weight, no copy of the keys."""
    (declared,) = (
        c for c in registry.all_cases(quick=True) if c.name == "Flamingo, 8 images x 64, T=256 fp32"
    )
    (core,) = (b for b in declared.baselines if "open_flamingo" in b.name)
    if peers.why_not("open_flamingo.src.helpers"):
        pytest.skip("open_flamingo is not here")
    tensors, _ = declared.inputs("cpu")
    with torch.profiler.profile() as profile, torch.no_grad():
        core.function()(**tensors)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::bmm"] == 2
    assert not {"aten::linear", "aten::mm", "aten::cat"} & set(counts)


def test_pairs_inside_intervals():
    start, end = (torch.tensor(x) for x in ([0, 0, 2, 5], [2, 3, 7, 5]))
    assert attention.visible_pairs(start, end) == 2 + 3 + 5
    assert attention.visible_pairs(start, end, block=2) == 2 * 4 + 2 * 6
    assert attention.visible_pairs(start, end, block=4) == 4 * 8
    assert attention.visible_pairs(start, start) == 0
    for mask, pairs in {"full": 64, "causal": 36, "prefix-LM": 37, "Flamingo": 8}.items():
        assert attention.visible_pairs(*attention.bounds(mask, 8, 8)) == pairs


def test_attention_flops():
    product = 2 * 10 * attention.HEADS * attention.WIDTH
    assert attention.attention_flops(10, backward=False) == 2 * product
    assert attention.attention_flops(10, backward=True) == 7 * product


def test_modules_run_with_the_ops_they_are_made_of():
    cases = registry.all_cases()
    chosen = run.select(cases, ["interval_attention", "perceiver_attention"], "", long=False)
    assert {c.op for c in chosen} == {"interval_attention", "perceiver_attention", *MODULES}
    assert {c.op for c in run.select(cases, ["media_cache"], "", long=False)} == {"media_cache"}
