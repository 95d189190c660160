import pytest
import torch

import vlmkernels
from vlmkernels import reference
from vlmkernels.testing import assert_op_as_good, result_and_gradients

NATIVE = vlmkernels.info()["ops"]["srau"]["CPU"] != "reference"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ORIENTATIONS = ["code", "paper"]
IMPLEMENTATIONS = {"dispatched": vlmkernels.srau, "reference": reference.srau}
if torch.cuda.is_available():
    IMPLEMENTATIONS["cuda"] = lambda *tensors, tau, row_mask=None, **options: vlmkernels.srau(
        *(x.cuda() for x in tensors), tau, row_mask=None if row_mask is None else row_mask.cuda(), **options
    ).cpu()


def inputs(shape, levels=(3,), dtype=torch.float32):
    shapes = (shape, (*levels, *shape), (*levels, *shape))
    return [(2 * torch.randn(each)).to(dtype).requires_grad_() for each in shapes]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(
    ("shape", "levels"),
    [((1,), ()), ((3, 37), ()), ((2, 5, 130), (3,)), ((300, 65), (2,)), ((2, 1100), (1,)), ((3, 16), (7,))],
    ids=str,
)
def test_forward_and_gradients(impl, dtype, orientation, shape, levels):
    tensors = inputs(shape, levels, dtype)
    options = {"tau": 0.2, "orientation": orientation}
    assert_op_as_good(IMPLEMENTATIONS[impl], reference.srau, tensors, features=0, **options)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
def test_formula_of_the_authors_code(impl, tau):
    language, visual, logits = inputs((4, 6, 33), dtype=torch.float64)
    mask = torch.rand(4, 6) < 0.6

    def composed(language, visual, logits):
        total = 0
        for i in range(3):
            alpha = logits[i].sigmoid()
            spoken, seen = (alpha > tau).double(), (alpha < 1 - tau).double()
            total = total + alpha * spoken * language + (1 - alpha) * seen * visual[i]
        return total / 3**0.5 * mask[..., None]

    got = result_and_gradients(
        lambda *t: IMPLEMENTATIONS[impl](*t, tau=tau, row_mask=mask), (language, visual, logits)
    )
    for ours, theirs in zip(got, result_and_gradients(composed, (language, visual, logits)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_papers_gate_weighs_the_image():
    language, visual, logits = inputs((4, 33), ())
    got = vlmkernels.srau(language, visual, logits, 0.2, orientation="paper")
    gate = logits.sigmoid()
    seen, spoken = (torch.where(side > 0.2, side, 0) for side in (gate, 1 - gate))
    torch.testing.assert_close(got, seen * visual + spoken * language)


def test_a_side_that_is_cut_comes_back_through_the_other():
    """alpha = 0.1 is below tau: the text is cut, and the gate's gradient is that of the image alone."""
    language, visual = torch.tensor([5.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    logits = torch.tensor([0.1]).logit().requires_grad_()
    out, dlanguage, dvisual, dlogits = result_and_gradients(
        lambda *t: vlmkernels.srau(*t, 0.2), (language, visual, logits)
    )
    dout = dvisual / 0.9  # of the last
    torch.testing.assert_close(out, torch.tensor([2.7]))
    assert dlanguage == 0
    torch.testing.assert_close(dlogits, -0.09 * 3.0 * dout)


def test_comparisons_with_the_threshold_are_strict():
    language, visual, logits = torch.ones(4), torch.ones(4), torch.zeros(4, requires_grad=True)
    out, dlogits = result_and_gradients(lambda x: vlmkernels.srau(language, visual, x, 0.5), (logits,))
    assert (out == 0).all()
    assert (dlogits == 0).all()


def test_masked_rows_are_zero_whatever_they_hold():
    mask = torch.rand(4, 6) < 0.5
    tensors = inputs((4, 6, 33))
    with torch.no_grad():
        for x in tensors:
            x[..., ~mask, :] = float("nan")
    out, *grads = result_and_gradients(lambda *t: vlmkernels.srau(*t, 0.2, row_mask=mask), tensors)
    assert (out[~mask] == 0).all()
    assert (out[mask] != 0).any()
    for grad in grads:
        assert torch.isfinite(grad).all()
        assert (grad[..., ~mask, :] == 0).all()


@pytest.mark.parametrize(
    ("language", "visual", "logits"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float64),
    ],
)
def test_language_and_visual_promote_and_the_logits_do_not(language, visual, logits):
    dtypes = language, visual, logits
    tensors = [torch.randn(2, 3, 8).to(dtype).requires_grad_() for dtype in dtypes]
    out, *grads = result_and_gradients(lambda x, *rest: vlmkernels.srau(x[0], *rest, 0.2), tensors)
    assert out.dtype == torch.promote_types(language, visual)
    assert tuple(grad.dtype for grad in grads) == dtypes
    torch.testing.assert_close(out, reference.srau(tensors[0][0], *tensors[1:], 0.2), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_gradcheck(orientation):
    tensors = inputs((3, 7), (2,), torch.float64)
    mask = torch.tensor([True, False, True])
    for options in ({}, {"row_mask": mask}):
        assert torch.autograd.gradcheck(
            lambda *t, o=options: vlmkernels.srau(*t, 0.2, orientation=orientation, **o), tensors
        )


def test_second_derivative_is_refused():
    tensors = inputs((3, 7))
    (grad,) = torch.autograd.grad(vlmkernels.srau(*tensors, 0.2).sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match="srau has no second derivative"):
        grad.sum().backward()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("levels", [(), (3,)], ids=["one level", "three levels"])
@pytest.mark.once
def test_registration(permuted, levels):
    tensors = [x.detach() for x in inputs((5, 4, 6), levels)]
    dout = torch.randn(5, 4, 6)
    if permuted:
        dout, *tensors = (x.transpose(-2, -3) for x in (dout, *tensors))
    mask = torch.rand(dout.shape[:-1]) < 0.5
    op, bwd = torch.ops.vlmkernels.srau.default, torch.ops.vlmkernels.srau_bwd.default
    for row_mask in (mask, None):
        trained = [x.clone().requires_grad_() for x in tensors]
        torch.library.opcheck(op, (*trained, row_mask, 0.2, "code"))
        torch.library.opcheck(bwd, (dout, *tensors, row_mask, 0.2, "paper", [True, True, True]))
    torch.library.opcheck(bwd, (dout, *tensors, None, 0.2, "code", [True, False, False]))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(language, visual, logits, mask):
        return vlmkernels.srau(language, visual, logits, 0.2, row_mask=mask)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        tensors, mask = inputs((rows, 16)), torch.rand(rows) < 0.5
        for got, want in zip(
            result_and_gradients(lambda *t, m=mask: compiled(*t, m), tensors),
            result_and_gradients(lambda *t, m=mask: step(*t, m), tensors),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 5)], ids=str)
def test_empty(shape):
    tensors = inputs(shape)
    out, *grads = result_and_gradients(lambda *t: vlmkernels.srau(*t, 0.2), tensors)
    assert out.shape == shape
    assert [grad.shape for grad in grads] == [x.shape for x in tensors]


def test_views_and_frozen_inputs():
    language = torch.randn(6, 10).T.requires_grad_()
    visual = torch.randn(1, 1, 6).expand(3, 10, 6)
    logits = torch.randn(10, 3, 12)[..., ::2].transpose(0, 1)
    out, dlanguage, *frozen = result_and_gradients(
        lambda *t: vlmkernels.srau(*t, 0.2), (language, visual, logits)
    )
    want = result_and_gradients(
        lambda x: reference.srau(x, visual.contiguous(), logits.contiguous(), 0.2), (language,)
    )
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(dlanguage, want[1])
    assert frozen == [None, None]


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
def test_each_gradient_alone(needs):
    tensors = inputs((9, 40))
    every = result_and_gradients(lambda *t: vlmkernels.srau(*t, 0.2), tensors)
    some = [x.detach().requires_grad_(bool(need)) for x, need in zip(tensors, needs, strict=True)]
    for grad, full, need in zip(
        result_and_gradients(lambda *t: vlmkernels.srau(*t, 0.2), some)[1:], every[1:], needs, strict=True
    ):
        assert torch.equal(grad, full) if need else grad is None


def test_extreme_values():
    logits = torch.tensor([-3e38, -100.0, -88.0, -20.0, 0.0, 20.0, 88.0, 3e38, float("inf"), -float("inf")])
    language, visual = torch.full((10,), 1e30), torch.full((10,), -1e30)
    for tau in (0.0, 0.2):
        got = vlmkernels.srau(language, visual, logits, tau)
        torch.testing.assert_close(got, reference.srau(language, visual, logits, tau), rtol=1e-6, atol=1e23)
    for i in range(3):
        tensors = [torch.ones(4), torch.ones(4), torch.zeros(4)]
        tensors[i][2] = float("nan")
        got = vlmkernels.srau(*tensors, 0.2)
        assert got.isnan().tolist() == [False, False, True, False]


@pytest.mark.skipif(not NATIVE, reason="the reference has temporaries")
def test_nothing_is_kept_beside_the_inputs():
    tensors = inputs((20, 30))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        vlmkernels.srau(*tensors, 0.2)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in tensors}


@pytest.mark.skipif(not NATIVE, reason="torch's sigmoid has other bits where a thread's share ends")
def test_deterministic_for_any_number_of_threads():
    tensors = inputs((500, 129))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(result_and_gradients(lambda *t: vlmkernels.srau(*t, 0.2), tensors))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.once
def test_large_op_uses_more_than_one_thread(busy_threads):
    x = torch.randn(2048, 1024)
    assert busy_threads(lambda: vlmkernels.srau(x, x, x, 0.2)) >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual": torch.zeros(3, 5)}, r"visual must be \[L, 3, 4\].*got \(3, 5\)"),
        ({"visual": torch.zeros(0, 3, 4), "gate_logits": torch.zeros(0, 3, 4)}, r"L ≥ 1.*got \(0, 3, 4\)"),
        ({"gate_logits": torch.zeros(2, 3, 4)}, r"gate_logits must be as visual \(3, 4\), got \(2, 3, 4\)"),
        ({"tau": 0.6}, r"tau must be in \[0, 0.5\], got 0.6"),
        ({"tau": float("nan")}, r"tau must be in \[0, 0.5\], got nan"),
        ({"row_mask": torch.ones(3)}, r"row_mask must be bool \(3,\), got torch.float32 \(3,\)"),
        ({"orientation": "both"}, r"orientation must be 'code' or 'paper', got 'both'"),
        ({"language": torch.zeros(3, 4, dtype=torch.int64)}, r"float16, got language torch.int64"),
        ({"language": torch.tensor(1.0)}, r"language must be \[..., D\], got \(\)"),
    ],
)
@pytest.mark.once
def test_bad_input(change, message):
    good = {name: torch.zeros(3, 4) for name in ("language", "visual", "gate_logits")} | {"tau": 0.2}
    with pytest.raises(ValueError, match=message):
        vlmkernels.srau(**{**good, **change})


def test_all_faults_in_one_error():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"(?s)gate_logits.*tau.*row_mask.*orientation"):
        vlmkernels.srau(x, x, torch.zeros(2), -1.0, row_mask=torch.ones(1), orientation="")
