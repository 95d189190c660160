"""What `python -m benchmarks.gpu` runs on a card: cases, peers, timers and predictions."""

import json
import subprocess
import sys
import types
import zipfile
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from benchmarks import peers
from benchmarks.gpu import attention_peers, ceilings, day, predict, sanitizer, timing, trials
from benchmarks.gpu.cards import CARDS
from benchmarks.gpu.day import OPS
from benchmarks.gpu.workload import TRAINING
from benchmarks.gpu.workloads import workloads
from benchmarks.run import disagreement
from tests.gpu import trials_cuda
from tests.gpu.cases import CASES
from tests.gpu.trials import strided
from vlmkernels import reference
from vlmkernels._library import KERNELS
from vlmkernels.triton import gated_residual as residual_launchers
from vlmkernels.triton._tiles import tf32_allowed

SETTINGS = timing.Settings("cpu", quick=True, compiled=False, seconds=1)


@pytest.fixture(autouse=True)
def _triton_alone(monkeypatch):
    """An extension that was built with CUDA has kernels, and so cases, of its own."""
    monkeypatch.setitem(KERNELS, ("gated_residual", "CUDA"), "Triton")


def test_a_trial_moves_with_its_layout_and_what_no_view_covers_is_poison(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # as it is at home

    class Given:
        def __init__(self):
            self.rows = strided(torch.randn(3, 5))
            self.both = [torch.arange(4.0)[1:], torch.ones(2, 1).expand(2, 3)]
            self.half = self.rows[:, 1:]
            self.none = None

    Given.__module__ = "tests.gpu.made_up"
    given = Given()
    moved = trials._moved(given, "cpu", {})
    assert torch.equal(moved.rows, given.rows)
    assert moved.rows.stride() == given.rows.stride()
    assert moved.rows.data_ptr() != given.rows.data_ptr()
    assert moved.half.data_ptr() == moved.rows[:, 1:].data_ptr()
    whole = moved.rows.as_strided((3, 12), (12, 1), 0)
    assert whole[:, :3].isnan().all()
    assert whole[:, 8:].isnan().all()
    assert torch.equal(moved.both[0], given.both[0])
    assert torch.equal(moved.both[1], given.both[1])
    assert moved.both[1].stride() == given.both[1].stride()


def test_a_case_that_gives_a_wrong_result_raises(monkeypatch, capsys):
    [case] = [c for c in trials.cases_for(["gated_residual"], slow=False) if "wide" in c.variant]
    trials.run_named(case.name, "cpu")
    assert trials.run_aloud([case], "cpu", print)
    monkeypatch.setattr(residual_launchers, "gated_residual", lambda x, y, gate, row_mask: x.clone())
    with pytest.raises(AssertionError, match="out"):
        trials.run_named(case.name, "cpu")
    assert not trials.run_aloud([case], "cpu", print)
    assert capsys.readouterr().out.startswith(f"case: {case.name}\ncase: {case.name}\nfailed: AssertionError")


def test_every_case_belongs_to_an_op_and_every_op_has_one():
    reached = {op for case in CASES.values() if not case.slow for op in trials.ops_of(case.name)}
    assert reached == set(OPS)
    of_ops = {c.op for c in CASES.values()}
    assert len(trials.cases_for(OPS, slow=False, one_each=True)) == len(of_ops)


def test_kernels_of_the_extension_are_judged_where_it_has_them(monkeypatch):
    before = trials.cases_for(["gated_residual"], slow=False)
    assert not any(isinstance(case, trials.Extension) for case in before)
    monkeypatch.setitem(KERNELS, ("gated_residual", "CUDA"), "CUDA C++ (80)")
    more = [case for case in trials.cases_for(["gated_residual"], slow=False) if case not in before]
    assert {case.variant for case in more} == set(trials_cuda.CASES)
    assert trials.cases_for(["info_nce"], slow=False, one_each=True)[0].op == "info_nce"
    for case in more:
        trials.run_named(case.name, "cpu")
    wrong = mock.Mock(wraps=torch.ops.vlmkernels)
    wrong.gated_residual = lambda x, y, gate, mask: x.clone()
    monkeypatch.setattr(torch.ops, "vlmkernels", wrong)
    with pytest.raises(AssertionError):
        trials.run_named(f"gated_residual, CUDA C++, {more[0].variant}", "cpu")


def test_compute_sanitizer_of_a_wheel_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "nvidia" / "cu13" / "bin"
    folder.mkdir(parents=True)
    tool = folder / "compute-sanitizer"
    tool.touch(0o755)
    (tmp_path / "nvidia" / "__init__.py").touch()  # as NVIDIA's wheels for CUDA 12: it hides folders without
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sanitizer, "FOLDERS", ())
    assert sanitizer.find() == str(tool)
    tool.unlink()
    assert sanitizer.find() is None


@pytest.mark.parametrize("type", ["bf16", "fp32", "tf32"])
def test_the_precision_of_a_workload_is_one_that_torch_compile_can_read(type):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision, torch.get_float32_matmul_precision()
    of = next(w for w in workloads() if w.type == type)
    with of.precision():
        assert matmul.allow_tf32 is (type == "tf32")
        assert tf32_allowed() is (type == "tf32")
    assert (matmul.fp32_precision, torch.get_float32_matmul_precision()) == before


def test_every_round_times_all_once_and_another_begins():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    now = iter(range(100))
    taken = timing.rounds_of(
        calls, lambda fn: fn() or 1.0, seconds=0.5, rounds=(3, 50), clock=lambda: float(next(now))
    )
    assert "".join(order) == "abcbcacab"
    assert taken == {name: [1.0] * 3 for name in "abc"}


def test_the_caches_are_flushed_before_the_first_event(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def synchronize(self):
            order.append("synchronize")

        def elapsed_time(self, other):
            return 2.5

    timer = timing.EventTimer.__new__(timing.EventTimer)
    timer.cache = mock.Mock(zero_=lambda: order.append("flush"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert timer(lambda: order.append("call")) == 0.0025
    assert order == ["flush", "event", "call", "event", "synchronize"]


def flash_attn_func(q, k, v, causal=False):  # [B, T, H, D]
    tq, tk = q.shape[1], k.shape[1]
    mask = torch.ones(tq, tk, dtype=torch.bool).tril(tk - tq if causal else tk)  # aligned at the bottom right
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def flash_attn_varlen_func(q, k, v, ends_q, ends_k, longest_q, longest_k):  # [tokens, H, D]
    assert (ends_q.diff().max(), ends_k.diff().max()) == (longest_q, longest_k)
    segments = zip(
        *(x.tensor_split(ends[1:-1].long()) for x, ends in ((q, ends_q), (k, ends_k), (v, ends_k))),
        strict=True,
    )
    return torch.cat([flash_attn_func(*(x[None] for x in segment))[0] for segment in segments])


class Memeff:
    def __init__(self, temperature, normalized_inputs, stable):
        assert normalized_inputs
        assert not stable
        self.temperature = temperature

    def __call__(self, image, text):
        return reference.info_nce(image, text, 1 / self.temperature)


class Liger:
    def __call__(self, weight, hidden, target):
        return functional.cross_entropy((hidden @ weight.T).float(), target)


class LigerKLDIVLoss(torch.nn.KLDivLoss):
    pass


class LigerJSD:
    def __init__(self, beta=0.5, ignore_index=-100):
        self.beta = beta

    def __call__(self, log_q, log_p, shift_labels=None):
        return reference.distillation(log_q, log_p, divergence="jsd", beta=self.beta)


class LigerFusedLinearJSD:
    def __init__(self, jsd_beta=0.5, ignore_index=-100, temperature=1.0):
        self.options = {"divergence": "jsd", "beta": jsd_beta}
        self.temperature = temperature

    def __call__(self, student_input, student_weight, teacher_input, teacher_weight, shift_labels=None):
        logits = student_input @ student_weight.T, teacher_input @ teacher_weight.T
        return reference.distillation(*(x.float() / self.temperature for x in logits), **self.options)


def fused_siglip_loss(image, text, log_temperature, bias):
    return reference.sigmoid_loss(image, text, log_temperature.exp(), bias).to(image.dtype)


STAND_INS = {
    "flash_attn": {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func},
    "memeff": {"MemoryEfficientCLIPLoss": Memeff},
    "liger_kernel.transformers": {
        "LigerFusedLinearCrossEntropyLoss": Liger,
        "LigerFusedLinearJSD": LigerFusedLinearJSD,
        "LigerJSD": LigerJSD,
        "LigerKLDIVLoss": LigerKLDIVLoss,
    },
    "siglip_kernel": {"fused_siglip_loss": fused_siglip_loss},
}


CALLED = {
    f"{of.name}, {peer.name}": (of, peer)
    for of in workloads(quick=True)
    for peer in of.peers
    if of.type == "bf16" and not peer.compiled
}


@pytest.mark.parametrize("name", CALLED)
def test_a_peer_is_called_as_it_wants_to_be_and_agrees(name, monkeypatch):
    """Peers that need a GPU have stand-ins with their signatures."""
    of, peer = CALLED[name]
    monkeypatch.setattr(peers, "_reasons", {})
    monkeypatch.setattr(
        attention_peers, "sdpa_kernel", lambda backend: nullcontext()
    )  # a CPU has one of them
    for module, members in STAND_INS.items():
        monkeypatch.setitem(peers._loaded, module, types.SimpleNamespace(**members))
    try:
        theirs = peer.make()
    except ImportError as error:
        pytest.skip(str(error))
    tensors = of.tensors("cpu")
    expected, out = of.ours(**tensors), theirs(**tensors)
    assert disagreement(expected, out, torch.bfloat16) is None
    if of.backward:
        torch.autograd.grad(out, [x for x in tensors.values() if x.requires_grad], torch.ones_like(out))


def test_each_kernel_of_sdpa_is_a_row_of_its_own(monkeypatch):
    held_to = []
    monkeypatch.setattr(
        attention_peers, "sdpa_kernel", lambda backend: held_to.append(backend) or nullcontext()
    )
    of = next(w for w in workloads(quick=True) if w.name == "interval_attention, causal, bf16")
    own, *others = [peer for peer in of.peers if peer.name.startswith("SDPA")]
    assert [peer.name for peer in others] == [f"{own.name}, {name}" for name in attention_peers.BACKENDS]
    tensors = of.tensors("cpu")
    expected = own.make()(**tensors)
    assert not held_to
    for peer in others:
        assert torch.equal(peer.make()(**tensors), expected)
    assert held_to == list(attention_peers.BACKENDS.values())


def test_an_absent_peer_has_a_reason(monkeypatch):
    monkeypatch.setattr(peers, "_loaded", {})
    monkeypatch.setattr(peers, "_reasons", {})
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    of = next(w for w in workloads(quick=True) if w.op == "perceiver_attention")
    row = timing.measure_row(of, TRAINING, SETTINGS)
    assert row["seconds"]["median"] > 0
    peer = {peer["name"]: peer for peer in row["peers"]}
    assert peer["SDPA on the concatenation"]["ratio"]["median"] > 0
    why = "peer 'flash_attn' cannot be imported here"
    assert why in peer["flash-attn on the concatenation"]["why_not"]
    assert "RuntimeError" in peer["SDPA on the concatenation, cuDNN"]["why_not"]  # a CPU has no such kernel


def test_wheels_are_unpacked_for_the_run(tmp_path, monkeypatch):
    def wheel(name, tag="py3-none-any"):
        with zipfile.ZipFile(tmp_path / f"{name}-1.5-{tag}.whl", "w") as file:
            about = f"{name}-1.5.dist-info"
            file.writestr(f"{name}/__init__.py", "here = True\n")
            file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
            file.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
            file.writestr(f"{about}/RECORD", "")

    wheel("made_up_peer")
    wheel("other_peer", "cp27-none-any")
    monkeypatch.setattr(day, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    said = []
    day.install(tmp_path, said.append)
    script = (
        "import made_up_peer, importlib.metadata as m; print(made_up_peer.here, m.version('made_up_peer'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "True 1.5\n"
    assert day._version("made_up_peer") == "1.5"
    assert [line.partition(" is skipped: ")[0] for line in said] == ["other_peer-1.5-cp27-none-any.whl"]


# The time of kernels alone, with torch.cuda as its documentation has it


class Graph:
    """Records what is captured; a call that waits for the host invalidates the capture."""

    current: "Graph | None" = None
    wait = False

    def __init__(self):
        self.log = []

    def capture_begin(self):
        Graph.current = self

    def capture_end(self):
        Graph.current = None
        if Graph.wait:
            raise RuntimeError("capture was invalidated")

    def replay(self):
        self.log.append("replay")


@pytest.fixture
def card(monkeypatch):
    """Streams, events and graphs on which every call takes 2 ms."""
    stream = mock.Mock(wait_stream=lambda other: None)
    event = mock.Mock(elapsed_time=lambda other: 2.0)
    for name, stand_in in {
        "CUDAGraph": Graph,
        "Stream": lambda: stream,
        "Event": lambda enable_timing: event,
        "current_stream": lambda: stream,
        "stream": lambda of: nullcontext(),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    timer = timing.EventTimer.__new__(timing.EventTimer)
    timer.cache = mock.Mock()
    return timer


def test_kernels_are_timed_as_one_graph(card, monkeypatch):
    monkeypatch.setattr(Graph, "wait", False)
    inside = []
    found = card.kernels(lambda: inside.append(Graph.current is not None))
    assert found == {"seconds": {"median": 0.002, "p20": 0.002, "p80": 0.002}, "how": "CUDA graph"}
    assert inside == [False, False, True]  # libraries set themselves up before


def test_a_call_that_cannot_be_captured_is_summed_by_the_profiler(card, monkeypatch):
    monkeypatch.setattr(Graph, "wait", True)

    def call():
        if Graph.current is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    def event(microseconds, device, named=False):
        range = types.SimpleNamespace(elapsed_us=lambda: microseconds)
        return types.SimpleNamespace(device_type=device, is_user_annotation=named, time_range=range)

    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [event(30, cuda), event(12, cuda), event(99, cpu), event(42, cuda, named=True)]
    seen = mock.MagicMock()
    seen.__enter__.return_value = types.SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: seen)
    found = card.kernels(call)
    assert found["how"] == "profiler"
    assert found["seconds"]["median"] == pytest.approx(42e-6)
    assert found["no_graph"] == "RuntimeError: operation not permitted when stream is capturing"
    assert Graph.current is None


def test_kernels_that_nothing_can_time_leave_the_row_as_it_is(card, monkeypatch):
    monkeypatch.setattr(Graph, "wait", True)
    monkeypatch.setattr(torch.profiler, "profile", mock.Mock(side_effect=RuntimeError("no CUPTI")))
    assert timing._kernels(card, mock.Mock()) == {"why_not": "RuntimeError: no CUPTI"}


# Ceilings, and predictions at them


def test_ceilings_are_rates_of_copies_and_products():
    found = ceilings.measure_ceilings("cpu", quick=True, timer=lambda call: call() is None or 0.5)
    assert found["copy"] == ceilings.QUICK_COPIED / 0.5
    assert list(found["products"]) == ["half", "tf32", "fp32"]
    for rates in found["products"].values():
        assert rates == {str(k): 2 * ceilings.QUICK_EDGE**2 * k / 0.5 for k in (512, 1024, 8192)}
    assert "bf16 " in ceilings.shown(found)


MEASURED = {"copy": 4e12, "products": {"half": {"512": 5e14, "1024": 6e14, "8192": 7e14}}}


def test_products_of_a_library_reach_what_was_measured_at_their_depth():
    card = CARDS["H200"].measured(MEASURED)
    rates = [card.peak("half", depth) / 1e14 for depth in (64, 512, 1000, 1024, 4096, 10**5)]
    assert rates == [5, 5, 5, 6, 6, 7]
    assert card.peak("half") == 7e14  # within a kernel
    assert card.peak("fp32") == CARDS["H200"].peak("fp32")
    assert card.bandwidth == 4000


def test_a_prediction_divides_by_what_was_measured():
    """A step that moves 8 GB, two of 10 TFLOP by a library at K = 512, and one that code bounds."""
    steps = [[1, 8e9, 0, "", 0, 1.0, 0], [2, 0, 1e13, "half", 512, 1.0, 0], [1, 0, 1e13, "half", 0, 1.1, 2e4]]
    facts = {"bytes": 8e9, "steps": steps}
    found = predict.estimate(facts, CARDS["H200"].measured(MEASURED))
    assert found["us"] == 2e3 + 2 * 2e4 + 2e4
    assert found["memory_us"] == 2e3
    assert found["bound"] == "products"
    published = predict.estimate(facts, CARDS["H200"])
    assert published["us"] == pytest.approx(8e3 / 4.8 + 2e7 / 989.4 + 2e4, rel=1e-3)


def test_a_prediction_of_other_sizes_is_none():
    stored = json.loads(predict.PREDICTIONS.read_text(encoding="utf-8"))
    entry = next(e for e in stored["entries"] if e["op"] == "gated_residual")
    measured = {k: entry[k] for k in ("op", "form", "type", "direction")}
    measured |= {"seconds": {"median": 1.0}, "kernels": {"seconds": {"median": 0.5}}}
    smaller = measured | {"sizes": {**entry["sizes"], "batch": 1}}
    timing.compare(smaller, stored, CARDS["H100"])
    assert smaller["no_prediction"] == "not among the stored predictions"
    same = measured | {"sizes": entry["sizes"]}
    timing.compare(same, stored, CARDS["H100"])
    assert same["of_predicted"] == 0.5e6 / entry["cards"]["H100"]["us"]  # of the kernels, as it was predicted
    assert same["predicted_at"] == "published rates"
    timing.compare(same, stored, CARDS["H100"].measured(MEASURED))
    assert same["predicted_at"] == "measured ceilings"


def test_host_time_of_the_losses_is_printed():
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.overhead", "--calls", "2", "--profile"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [
        line for line in said.splitlines() if line.endswith(tuple("0123456789")) and " us, at best " in line
    ]
    measured = ("forward", "forward and backward")
    assert [(row.split(" ")[0], row.partition(", ")[2].partition(":")[0]) for row in rows] == [
        (name, what) for name in ("product_sum", "info_nce", "sigmoid_loss") for what in measured
    ]
    assert "info_nce_bwd.py" in said
