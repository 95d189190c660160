"""Attention by other libraries: which call goes where, and with stand-ins the results and gradients."""

import contextlib
import sys
import types
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.library import _scoped_library, opcheck

pytest.importorskip("triton")

import vlmkernels
from tests import every_model
from tests import flash_stand_ins as stand_ins
from tests.attention import assert_attention_as_good
from tests.test_info import python
from vlmkernels import _providers, intervals
from vlmkernels.models.parts import padding
from vlmkernels.ops import _attention as attention
from vlmkernels.reference.interval_attention import interval_attention_bwd, interval_attention_fwd
from vlmkernels.testing import result_and_gradients
from vlmkernels.triton import interval_attention as triton

FLASH2, FLASH3 = stand_ins.FLASH2, stand_ins.FLASH3
OP = sys.modules["vlmkernels.ops.interval_attention"]
pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")


def sdpa_stand_ins(calls):
    """Kernels of torch's own ops, which has none of them for CPU tensors."""

    def bounds(query, key, causal):
        return intervals.causal(query.shape[2]) if causal else intervals.full(query.shape[2], key.shape[2])

    def attend(query, key, value, causal, scale):
        out, lse = interval_attention_fwd(query, key, value, *bounds(query, key, causal), scale, None, 0, 0)
        return out.contiguous(), lse, None, None, query.shape[2], key.shape[2]

    def flash(query, key, value, dropout=0.0, causal=False, debug=False, *, scale=None):
        calls.append("flash_attention")
        state = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
        return *attend(query, key, value, causal, scale), *state, query.new_empty(0)

    def cudnn(query, key, value, bias, with_lse, dropout=0.0, causal=False, debug=False, *, scale=None):
        assert bias is None
        assert with_lse
        calls.append("cudnn_attention")
        out, lse, *rest = attend(query, key, value, causal, scale)
        state = torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)
        return out, lse[..., None], *rest, *state, query.new_empty(0)

    def flash_backward(dout, query, key, value, out, lse, *rest, scale=None):
        ends_q, ends_k, longest_q, longest_k, dropout, causal, seed, offset = rest
        assert ends_q is ends_k is None
        assert (longest_q, longest_k, dropout) == (query.shape[2], key.shape[2], 0.0)
        assert seed.dtype == offset.dtype == torch.uint64
        calls.append("sdpa backward")
        options = scale, None, 0, 0, [True, True, True, False]
        tensors = dout, None, query, key, value, *bounds(query, key, causal), out, lse
        return tuple(x.contiguous() for x in interval_attention_bwd(*tensors, *options)[:3])

    return {"flash_attention": flash, "cudnn_attention": cudnn, "flash_attention_backward": flash_backward}


@contextlib.contextmanager
def on_cuda(*installed, sdpa="FLASH_ATTENTION", allowed=("flash", "sdpa"), older=False):
    """CPU tensors as those of a card where these modules are installed; what runs is listed."""
    calls: list[str] = []
    modules = {FLASH2: stand_ins.flash2(calls), FLASH3: stand_ins.flash3(calls, older=older)}
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(pytest.MonkeyPatch.context())
        for name in installed:
            context.setitem(sys.modules, name, modules[name])
        context.setattr(_providers, "_is_installed", installed.__contains__)
        context.setattr(_providers, "ALLOWED", allowed)
        context.setattr(_providers, "SEGMENTS", bool(installed) and "flash" in allowed)
        context.setattr(_providers, "_TRIED", {})
        context.setattr(
            _providers, "sdpa_backend", lambda call: torch.nn.attention.SDPBackend.__members__[sdpa].value
        )
        aten = stack.enter_context(_scoped_library("aten", "IMPL"))
        for name, kernel in sdpa_stand_ins(calls).items():
            aten.impl(f"_scaled_dot_product_{name}", kernel, "CPU")
        for name, reference in (
            ("interval_attention", interval_attention_fwd),
            ("interval_attention_bwd", interval_attention_bwd),
        ):

            def ours(*args, name=name, reference=reference):
                calls.append(name.replace("interval_attention", "ours").replace("_bwd", " backward"))
                return reference(*args)

            context.setattr(triton, name, ours)
        context.setattr(_providers, "may_run_on", lambda x: True)
        library = stack.enter_context(_scoped_library("vlmkernels", "IMPL"))
        for name in ("interval_attention", "interval_attention_bwd"):
            on_card = getattr(OP, "_on_cuda" + name.removeprefix("interval_attention"))
            library.impl(name, torch.no_grad()(on_card), "CPU", allow_override=True)
        # Those that try a provider are not listed
        tried = _providers._try
        context.setattr(_providers, "_try", lambda *args: (tried(*args), calls.clear()))
        yield calls


def inputs(b=2, h=2, hkv=2, tq=40, tk=40, d=16, dtype=torch.bfloat16):
    shapes = (b, h, tq, d), (b, hkv, tk, d), (b, hkv, tk, d)
    return [torch.randn(b, t, h, d).to(dtype).transpose(1, 2).requires_grad_() for b, h, t, d in shapes]


DOCUMENTS = torch.tensor([0, 7, 7, 30, 37])
TIMES = torch.tensor([[0] * 5 + [1] * 9 + [2] * 6 + [4] * 20, [1] * 3 + [3] * 30 + [7] * 7])

MASKS = {  # sizes, what is built for them, and whether it is one for segments
    "full": ({}, lambda: intervals.full(40), False),
    "full, grouped": ({"h": 4}, lambda: intervals.full(40), False),
    "full, fewer queries": ({"tq": 9}, lambda: intervals.full(9, 40), False),
    "causal": ({}, lambda: intervals.causal(40), False),
    "causal, cached keys": ({"tq": 9}, lambda: intervals.causal(9, 31), False),
    "causal, one query": ({"tq": 1}, lambda: intervals.causal(1, 39), False),
    "packed": ({"b": 1}, lambda: intervals.packed(DOCUMENTS, 40), True),
    "packed, whole": ({"b": 1, "h": 4}, lambda: intervals.packed(DOCUMENTS, 40, causal=False), True),
    "packed, not from 0": ({"b": 1}, lambda: intervals.packed(DOCUMENTS + 3, 40), True),
    "packed, longer": ({"b": 1}, lambda: intervals.packed(2 * DOCUMENTS, 40, causal=False), True),
    "images": ({"tk": 15}, lambda: intervals.media(TIMES, 3, 5), True),
    "images, grouped": ({"tk": 15, "h": 4}, lambda: intervals.media(TIMES, 3, 5), True),
}
OTHERS = {
    "tensors": ({}, lambda: tuple(intervals.full(40))),
    "full, of more keys": ({"tk": 50}, lambda: intervals.full(40)),
    "causal, of more keys": ({"tk": 50}, lambda: intervals.causal(40)),
    "causal, of fewer keys": ({"tk": 30}, lambda: intervals.causal(40)),
    "causal, after the keys": ({"tq": 9}, lambda: intervals.causal(9, 20)),
    "packed, two samples": ({}, lambda: intervals.packed(DOCUMENTS, 40)),
    "packed, other keys": ({"b": 1, "tk": 50}, lambda: intervals.packed(DOCUMENTS, 40)),
    "images, of more keys": ({"tk": 18}, lambda: intervals.media(TIMES, 3, 5)),
    "images, numbers on the device": ({"tk": 15}, lambda: intervals.media(TIMES, 3, torch.tensor([5, 2]))),
    "images before": ({"tk": 15}, lambda: intervals.media(TIMES, 3, 5, attend="all_previous")),
    "padding": ({}, lambda: intervals.padding(torch.tensor([30, 4]), 40)),
    "prefix": ({}, lambda: intervals.prefix_lm(7, 40)),
    "runs": ({}, lambda: intervals.runs(torch.ones(40, 40).tril().bool())),
}


def runs(tensors, whole, **options):
    return vlmkernels.interval_attention(*tensors, whole, **options)


def assert_as_good(tensors, whole):
    """With the intervals whole as the definition with start and end."""

    def on(op):
        bounds = (whole,) if op is vlmkernels.interval_attention else tuple(whole)
        return lambda *x: op(*x, *bounds)

    assert_attention_as_good(on, vlmkernels.interval_attention, tensors)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("by", ["flash2", "flash3", "flash3, older"])
def test_flash_attn_forward_and_gradients(mask, dtype, by):
    """Exact intervals judge: every query and key of the segments is where they have it, and no other."""
    sizes, build, segments = MASKS[mask]
    tensors = inputs(**sizes, dtype=dtype)
    with on_cuda(FLASH2 if by == "flash2" else FLASH3, older=by.endswith("older")) as calls:
        assert_as_good(tensors, build())
    name = by.partition(",")[0] + (" segments" if segments else "")
    backward = "ours backward" if by != "flash2" and sizes.get("h") == 4 else f"{name} backward"
    assert calls == [name, backward]


@pytest.mark.parametrize("mask", [name for name, (*_, segments) in MASKS.items() if not segments])
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "CUDNN_ATTENTION"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_sdpa_forward_and_gradients(mask, backend, deterministic):
    sizes, build, _ = MASKS[mask]
    tensors = inputs(**sizes)
    torch.use_deterministic_algorithms(deterministic)
    with on_cuda(sdpa=backend) as calls:
        assert_as_good(tensors, build())
    flash = backend == "FLASH_ATTENTION"
    if mask in ("full, grouped", "causal, cached keys"):
        assert calls == ["ours", "ours backward"]
    else:
        last = "sdpa backward" if flash and deterministic else "ours backward"
        assert calls == ["flash_attention" if flash else "cudnn_attention", last]


@pytest.mark.parametrize("mask", OTHERS)
def test_other_masks_are_ours(mask):
    sizes, build = OTHERS[mask]
    with on_cuda(FLASH2, FLASH3) as calls:
        runs(inputs(**sizes), build()).sum().backward()
    assert calls == ["ours", "ours backward"]


@pytest.mark.parametrize(
    ("installed", "allowed", "sdpa", "who", "who_for_segments"),
    [
        ([FLASH2, FLASH3], ("flash", "sdpa"), "FLASH_ATTENTION", "flash3", "flash3 segments"),
        ([FLASH2], ("flash", "sdpa"), "CUDNN_ATTENTION", "flash2", "flash2 segments"),
        ([FLASH2], ("sdpa",), "CUDNN_ATTENTION", "cudnn_attention", "ours"),
        ([FLASH2], (), "CUDNN_ATTENTION", "ours", "ours"),
        ([], ("flash", "sdpa"), "FLASH_ATTENTION", "flash_attention", "ours"),
        ([], ("flash", "sdpa"), "CUDNN_ATTENTION", "cudnn_attention", "ours"),
        ([], ("flash", "sdpa"), "EFFICIENT_ATTENTION", "ours", "ours"),
        ([], ("flash", "sdpa"), "MATH", "ours", "ours"),
        ([], ("flash",), "FLASH_ATTENTION", "ours", "ours"),
    ],
)
@pytest.mark.parametrize("mask", ["full", "causal", "packed", "images"])
def test_which_provider_computes_which_mask(installed, allowed, sdpa, who, who_for_segments, mask):
    sizes, build, segments = MASKS[mask]
    with on_cuda(*installed, allowed=allowed, sdpa=sdpa) as calls, torch.no_grad():
        runs(inputs(**sizes), build())
    assert calls == [who_for_segments if segments else who]


def transposed(x):
    """In memory [B, H, D, T]."""
    return x.mT.contiguous().mT


def shifted(x):
    """Its rows begin between two places that are read at once."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def padded(x):
    """Its rows are of 20 elements each."""
    return torch.cat([x, x[..., :4]], -1)[..., :16]


@pytest.mark.parametrize(
    ("who", "sizes", "options", "layout"),
    [
        ("flash2", {"d": 8}, {}, None),
        ("flash2", {"d": 72}, {}, None),
        ("flash2", {"d": 256}, {}, None),
        ("flash2", {}, {"scale": 0.3}, None),
        ("flash2", {}, {"return_lse": True}, None),
        ("flash2", {}, {}, Tensor.contiguous),
        ("flash2", {"d": 32}, {}, lambda x: x[..., 8:24]),
        ("ours", {"d": 20}, {}, None),
        ("ours", {"d": 264}, {}, None),
        ("ours", {"dtype": torch.float32}, {}, None),
        ("ours", {"dtype": torch.float64}, {}, None),
        ("ours", {"b": 0}, {}, None),
        ("ours", {}, {"scale": 0.0}, None),
        ("ours", {}, {"scale": -1.0}, None),
        ("ours", {}, {"relative_bias": torch.zeros(2, 3, 3), "grid": (2, 2)}, None),
        ("ours", {}, {}, transposed),
        ("ours", {}, {}, shifted),
        ("ours", {}, {}, padded),
        ("ours", {"b": 70_000, "h": 1, "hkv": 1, "d": 8, "tq": 1, "tk": 1}, {}, None),
    ],
)
def test_which_calls_are_for_providers(who, sizes, options, layout):
    tensors = [x.detach() for x in inputs(**sizes)]
    if layout is not None:
        tensors = [layout(x) for x in tensors]
    with on_cuda(FLASH2) as calls:
        out = runs(tensors, intervals.full(*(x.shape[2] for x in tensors[:2])), **options)
    assert calls == [who]
    out = out[0] if options.get("return_lse") else out
    assert out.transpose(1, 2).is_contiguous()


def test_a_value_of_another_width_is_ours():
    query, key, _ = inputs()
    with on_cuda(FLASH2) as calls:
        runs((query, key, key[..., :8].contiguous()), intervals.full(40))
    assert calls == ["ours"]


@pytest.mark.parametrize("mask", ["full", "packed", "images"])
def test_the_gradient_of_the_log_sum_exp_is_ours(mask):
    sizes, build, _ = MASKS[mask]
    tensors = inputs(**sizes)
    with on_cuda(FLASH2) as calls:
        whole = build()

        def joined(op):
            bounds = (whole,) if op is vlmkernels.interval_attention else tuple(whole)

            def both(*x):
                out, lse = op(*x, *bounds, return_lse=True)
                return torch.cat([out.flatten(), lse.where(lse > -torch.inf, 0).flatten()])

            return both

        assert_attention_as_good(joined, vlmkernels.interval_attention, tensors)
        lse = runs(tensors, whole, return_lse=True)[1]
        start, end = whole
        empty = (start.clamp(0, tensors[1].shape[2]) >= end.clamp(0, tensors[1].shape[2])).expand(
            lse.shape[0], -1
        )
        assert torch.equal((lse == -torch.inf).all(1), empty)
    assert calls[1] == "ours backward"


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_gradients_of_some_inputs_are_ours(frozen):
    tensors = inputs()
    tensors[frozen].requires_grad_(False)
    with on_cuda(FLASH2) as calls:
        runs(tensors, intervals.full(40)).sum().backward()
    assert calls == ["flash2", "ours backward"]


def test_an_incoming_gradient_that_is_not_aligned_is_copied():
    tensors = inputs()
    with on_cuda(FLASH2) as calls:
        out = runs(tensors, intervals.full(40))
        dout = torch.randn(out.shape).bfloat16()
        got = torch.autograd.grad(out, tensors, transposed(dout), retain_graph=True)
        assert all(map(torch.equal, got, torch.autograd.grad(out, tensors, dout)))
    assert calls == ["flash2", "flash2 backward", "flash2 backward"]


def test_autocast_decides_the_dtype():
    tensors = [x.detach().float() for x in inputs()]
    with on_cuda(FLASH2) as calls, torch.autocast("cpu", torch.bfloat16):
        assert runs(tensors, intervals.full(40)).dtype == torch.bfloat16
    assert calls == ["flash2"]


class TestTrying:
    """A provider is tried before its first call of a kind."""

    @pytest.mark.parametrize("place", ["_flash_attn_forward", "_flash_attn_varlen_backward"])
    def test_one_that_fails_is_not_used_and_info_says_why(self, place):
        fails = mock.Mock(side_effect=RuntimeError("no kernel image is available\nfor this card"))
        with on_cuda(FLASH2, FLASH3) as calls:
            setattr(sys.modules[FLASH2], place, fails)
            sys.modules[FLASH3]._flash_attn_forward = fails
            for _ in range(2):
                with torch.no_grad():
                    runs(inputs(), intervals.full(40))
            assert calls == ["flash_attention"] * 2
            assert fails.call_count == 2  # once for each of them
            runs(inputs(dtype=torch.float16), intervals.full(40))
            assert fails.call_count == 4
            providers = vlmkernels.info()["providers"]
            why = "RuntimeError: no kernel image is available"
            bf16, f16 = (f"{dtype}, heads of 16, cpu" for dtype in ("bfloat16", "float16"))
            assert providers["flash-attn 3"] == f"{bf16}: {why}; {f16}: {why}"
            assert providers["flash-attn 2"] == providers["flash-attn 3"]
            assert providers["SDPA, FlashAttention"] == f"{bf16}: used; {f16}: used"
            assert providers["SDPA, cuDNN"] == "not tried yet"
            lines = str(vlmkernels.info()).splitlines()
            assert f"attention by flash-attn 2: {providers['flash-attn 2']}" in lines

    def test_one_that_cannot_be_imported_is_not_used(self):
        with on_cuda(FLASH2) as calls:
            sys.modules[FLASH2] = None
            runs(inputs(), intervals.full(40))
            assert calls == ["flash_attention"]
            assert "ModuleNotFoundError" in vlmkernels.info()["providers"]["flash-attn 2"]

    def test_a_module_that_was_put_in_its_place_is_tried(self, monkeypatch):
        is_installed = _providers._is_installed.__wrapped__
        assert not is_installed("made_up_flash.interface")
        monkeypatch.setitem(sys.modules, "made_up_flash", types.ModuleType("made_up_flash"))
        assert is_installed("made_up_flash.interface")

    def test_a_lack_of_memory_says_nothing_about_it(self):
        with on_cuda(FLASH2) as calls:
            library = sys.modules[FLASH2]
            real, library._flash_attn_forward = (
                library._flash_attn_forward,
                mock.Mock(side_effect=torch.OutOfMemoryError("full")),
            )
            with pytest.raises(torch.OutOfMemoryError):
                runs(inputs(), intervals.full(40))
            library._flash_attn_forward = real
            runs(inputs(), intervals.full(40))
        assert calls == ["flash2"]

    def test_random_numbers_stay_as_they_are(self):
        tensors = inputs()
        with on_cuda(FLASH2):
            before = torch.get_rng_state()
            runs(tensors, intervals.full(40))
            assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(2, 3, 40, 16), (1, 2, 1, 72)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_functions_of_torch_are_called_as_they_want_to_be(shape, causal):
    """Its shape functions check the arguments; results have the memory of our own."""
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    call = _providers.Call(x, x, x, 0.25, causal)
    for provider in (_providers.SdpaFlash(), _providers.SdpaCudnn()):
        out, lse = provider.forward(call)
        assert out.transpose(1, 2).is_contiguous()
        assert (lse.shape, lse.dtype) == (shape[:3], torch.float32)
        assert lse.is_contiguous()
    for grad in _providers.SdpaFlash().backward(call, x, out, lse):
        assert (grad.shape, grad.dtype) == (shape, torch.bfloat16)
        assert grad.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("mask", ["full", "causal", "packed", "images"])
def test_compiled_graphs_contain_the_op_and_run_the_provider(mask):
    """Traced at once, and with the same result."""
    sizes, build, segments = MASKS[mask]
    tensors = inputs(**sizes)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    with on_cuda(FLASH2) as calls:
        whole = build()
        expected = result_and_gradients(lambda *x: runs(x, whole), tensors)
        calls.clear()
        compiled = torch.compile(lambda *x: runs(x, whole), fullgraph=True, backend=backend)
        got = result_and_gradients(compiled, tensors)
        assert all(map(torch.equal, got, expected))
    name = "flash2 segments" if segments else "flash2"
    assert calls == [name, f"{name} backward"]
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert "vlmkernels.interval_attention.default" in called


@pytest.mark.parametrize("mask", ["full", "causal", "packed", "images"])
def test_registration(mask):
    sizes, build, _ = MASKS[mask]
    tensors = inputs(**sizes)
    ops = torch.ops.vlmkernels
    with on_cuda(FLASH2):
        whole = build()
        known = attention.known_mask(whole, *tensors[:2])
        assert known[0] is not None
        options = 0.25, None, 0, 0, *known
        opcheck(ops.interval_attention.default, (*tensors, *whole, *options))
        detached = [x.detach() for x in tensors]
        out, lse = ops.interval_attention(*detached, *whole, *options)
        saved = *detached, *whole, out, lse, *options
        needs = [True, True, True, False]
        opcheck(ops.interval_attention_bwd.default, (torch.randn_like(out), None, *saved, needs))


MODELS = {
    "clip": {"full", "causal", "bounds"},
    "align": {"bounds"},
    "decoder": {"causal"},
    "flamingo": {"media", "causal", "full"},
    "simvlm": {"padding", "packed", "bounds"},
    "simvlm-prefix_lm": {"prefix_lm"},
    "virtex": {"causal", "full"},
    "block": {"media"},
}


@pytest.mark.parametrize("name", MODELS)
def test_models_pass_intervals_whole(name, monkeypatch):
    """Where padding is computed, as on accelerators. Those of the wanted rows alone are bounds."""
    made = set()
    ours = vlmkernels.interval_attention

    def listed(query, key, value, seen, end=None, **options):
        assert end is None
        made.add(seen.made_by)
        return ours(query, key, value, seen, **options)

    monkeypatch.setattr(vlmkernels, "interval_attention", listed)
    monkeypatch.setattr(padding, "can_drop", lambda tokens: False)
    every_model.build(name).run()
    assert made == MODELS[name]


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("", ("flash", "sdpa")),
        ("none", ()),
        ("sdpa", ("sdpa",)),
        ("flash, sdpa", ("flash", "sdpa")),
        ("sdpa,flash", ("sdpa", "flash")),
    ],
)
def test_the_environment_variable_names_what_is_allowed(text, allowed):
    assert _providers._allowed(text) == allowed


def test_the_environment_variable_is_read_when_the_library_is_imported():
    code = "import vlmkernels; print(vlmkernels.info())"
    off = python(code, VLMKERNELS_PROVIDERS="none").stdout
    assert off.count("off by VLMKERNELS_PROVIDERS") == 4
    done = python(code, VLMKERNELS_PROVIDERS="flash,none")
    assert done.returncode != 0
    assert "VLMKERNELS_PROVIDERS must be none, flash, sdpa or flash,sdpa, got 'flash,none'" in done.stderr
