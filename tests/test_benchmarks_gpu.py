"""`python -m benchmarks.gpu`, every step of it on a CPU."""

import json
import os
import sys
import types
from unittest import mock

import pytest
import torch
from torch.nn import functional

import vlmkernels

pytest.importorskip("triton")

from benchmarks import peers
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import pages, predict, sanitizer, timing, trials
from benchmarks.gpu.cards import CARDS
from benchmarks.gpu.workloads import Workload, workloads
from benchmarks.run import disagreement
from tests.gpu import trials_cuda
from tests.gpu.cases import CASES
from tests.gpu.interpreter import interpreting
from tests.gpu.trials import strided
from vlmkernels import reference
from vlmkernels._library import KERNELS
from vlmkernels.triton import gated_residual as residual_launchers
from vlmkernels.triton._contrastive import tf32_allowed


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


def test_a_case_that_gives_a_wrong_result_is_named(monkeypatch):
    [case] = [c for c in trials.cases_for(["gated_residual"], slow=False) if "wide" in c.variant]
    assert trials.run([case], "cpu", lambda line: None) == {}
    monkeypatch.setattr(residual_launchers, "gated_residual", lambda x, y, gate, row_mask: x.clone())
    failed = trials.run([case], "cpu", lambda line: None)
    assert list(failed) == [case.name]
    assert "out" in failed[case.name]


def test_every_case_belongs_to_an_op_and_every_op_has_one():
    reached = {op for case in CASES.values() if not case.slow for op in trials.ops_of(case.name)}
    assert reached == set(command.OPS)
    assert len(trials.cases_for(command.OPS, slow=False, one_each=True)) == len(
        {c.op for c in CASES.values()}
    )


def test_kernels_of_the_extension_are_judged_where_it_has_them(monkeypatch):
    before = trials.cases_for(["gated_residual"], slow=False)
    assert not any(isinstance(case, trials.Extension) for case in before)
    monkeypatch.setitem(KERNELS, ("gated_residual", "CUDA"), "CUDA C++ (80)")
    more = trials.cases_for(["gated_residual"], slow=False)[len(before) :]
    assert {case.variant for case in more} == set(trials_cuda.CASES)
    assert trials.cases_for(["info_nce"], slow=False, one_each=True)[0].op == "info_nce_stats"
    assert trials.run(more, "cpu", lambda line: None) == {}
    wrong = mock.Mock(wraps=torch.ops.vlmkernels)
    wrong.gated_residual = lambda x, y, gate, mask: x.clone()
    monkeypatch.setattr(torch.ops, "vlmkernels", wrong)
    failed = trials.run(more[:1], "cpu", lambda line: None)
    assert list(failed) == [f"gated_residual, CUDA C++, {more[0].variant}"]


REPORTS = {
    "memcheck": """========= COMPUTE-SANITIZER
case: gated_residual, ragged, float32
========= Invalid __global__ read of size 4 bytes
=========     at _forward+0x1a0
========= ERROR SUMMARY: 1 error""",
    "racecheck": """========= COMPUTE-SANITIZER
case: gated_residual, ragged, float32
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)""",
    "initcheck": """========= COMPUTE-SANITIZER
case: gated_residual, ragged, float32
========= ERROR SUMMARY: 0 errors""",
    "synccheck": "========= Error: the device is not supported",
}


def test_compute_sanitizer_is_read_tool_by_tool(tmp_path, monkeypatch):
    script = tmp_path / "compute-sanitizer"
    answers = "".join(f"{tool}) cat <<'END'\n{text}\nEND\n;;\n" for tool, text in REPORTS.items())
    script.write_text(f'#!/bin/sh\ncase "$2" in\n{answers}esac\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = sanitizer.run(["gated_residual"], "cuda", lambda line: None)
    case = "gated_residual, ragged, float32"
    assert found == {
        "memcheck": {"errors": 1, "found": {case: ["Invalid __global__ read of size 4 bytes"]}},
        "racecheck": {"errors": 0, "found": {}},
        "initcheck": {"errors": 0, "found": {}},
        "synccheck": {"unfinished": "========= Error: the device is not supported"},
    }
    ops = {op: {"red": False, "failed": {}, "cases": 1, "tests": ""} for op in ("info_nce", "gated_residual")}
    command.mark_unsafe(ops, found)
    assert not ops["info_nce"]["red"]
    assert ops["gated_residual"]["unsafe"] == ["memcheck"]
    assert command.verdict(ops, found, lambda line: None) == 1
    assert command.verdict({"info_nce": ops["info_nce"]}, {"synccheck": found["synccheck"]}, print) == 1
    assert command.verdict({"info_nce": ops["info_nce"]}, {"memcheck": {"why_not": "absent"}}, print) == 0


def test_compute_sanitizer_of_a_wheel_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "nvidia" / "cu13" / "bin"
    folder.mkdir(parents=True)
    tool = folder / "compute-sanitizer"
    tool.touch(0o755)
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


def test_without_compute_sanitizer_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    found = sanitizer.run(["info_nce"], "cuda", lambda line: None)
    assert found == {tool: {"why_not": "compute-sanitizer is not installed"} for tool in sanitizer.TOOLS}


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


def fused_siglip_loss(image, text, log_temperature, bias):
    return reference.sigmoid_loss(image, text, log_temperature.exp(), bias).to(image.dtype)


STAND_INS = {
    "flash_attn": {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func},
    "memeff": {"MemoryEfficientCLIPLoss": Memeff},
    "liger_kernel.transformers": {"LigerFusedLinearCrossEntropyLoss": Liger},
    "siglip_kernel": {"fused_siglip_loss": fused_siglip_loss},
}


@pytest.mark.parametrize("of", [w for w in workloads(quick=True) if w.type == "bf16"], ids=lambda of: of.name)
def test_every_peer_is_called_as_it_wants_to_be_and_agrees(of, monkeypatch):
    """Peers that need a GPU have stand-ins with their signatures."""
    monkeypatch.setattr(peers, "_reasons", {})
    for name, members in STAND_INS.items():
        monkeypatch.setitem(peers._loaded, name, types.SimpleNamespace(**members))
    tensors = of.tensors("cpu")
    expected = of.ours(**tensors)
    for peer in of.peers:
        if not peer.compiled:
            out = peer.make()(**tensors)
            assert disagreement(expected, out, torch.bfloat16) is None, peer.name
            torch.autograd.grad(out, [x for x in tensors.values() if x.requires_grad], torch.ones_like(out))


def test_an_absent_peer_has_a_reason(monkeypatch):
    monkeypatch.setattr(peers, "_loaded", {})
    monkeypatch.setattr(peers, "_reasons", {})
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    of = next(w for w in workloads(quick=True) if w.op == "perceiver_attention")
    for entry in timing.measure_workload(of, "cpu", timing.host_timer, seconds=1, quick=True):
        eager, flash = entry["peers"]
        assert (eager["name"], flash["name"]) == (
            "SDPA on the concatenation",
            "flash-attn on the concatenation",
        )
        assert eager["ratio"]["median"] > 0
        assert "peer 'flash_attn' cannot be imported here" in flash["why_not"]


@pytest.fixture(scope="module")
def small_predictions(tmp_path_factory):
    """Of the workloads of --quick, for a card whose prediction compiles nothing."""
    path = tmp_path_factory.mktemp("predictions") / "quick.json"
    chosen = [w for w in workloads(quick=True) if w.op in ("gated_residual", "gated_linear_residual")]
    made = {"header": {"commit": "here"}, "entries": list(predict.entries(chosen, [CARDS["B200"]]))}
    path.write_text(json.dumps(made))
    return path


def quick(*words, **files):
    files = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    return command.main([*words, "--device", "cpu", "--quick", *files])


def test_on_a_cpu_every_step_runs_to_the_file(tmp_path, small_predictions, capsys):
    ops = ["gated_residual", "gated_linear_residual"]
    assert quick(*ops, "--card", "B200", results=tmp_path, predictions=small_predictions) == 0
    [path] = tmp_path.iterdir()
    stored = json.loads(path.read_text())
    assert list(stored["ops"]) == ops
    [run] = stored["runs"].values()
    assert run["correctness"]["gated_residual"] == {
        "tests": "not run", "cases": 1, "failed": {}, "red": False
    }  # fmt: skip
    assert all(found["why_not"] for found in run["sanitizer"].values())
    assert run["predictions"] == {"commit": "here"}
    entries = [entry for of_op in stored["ops"].values() for entry in of_op]
    assert len(entries) == 2 * (2 + 4)
    for entry in entries:
        assert entry["of_predicted"] == entry["seconds"]["median"] * 1e6 / entry["predicted_us"]
        assert entry["peers"][0]["ratio"]["median"] > 0
        assert entry["peers"][-1]["why_not"] == "not compiled with --quick"
        assert entry["rounds"] == 3
    shown = capsys.readouterr().out
    assert "| gated_residual, residual stream, bf16, training | **vlmkernels** |" in shown
    text = "<!-- roofline: measured -->\n<!-- /roofline -->"
    page = pages.render(text, json.loads(predict.PREDICTIONS.read_text()), [stored])
    assert pages.measured(entries) in page
    assert f"`{run['command']}`" in page
    assert "No run on a GPU is stored." in pages.render(text, json.loads(predict.PREDICTIONS.read_text()), [])
    assert "gated_residual: correct; 1 cases" in shown


def test_on_a_gpu_the_card_is_found_by_its_name(tmp_path, small_predictions, monkeypatch):
    """The path of a GPU, with a CPU in its place."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA B200")
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    monkeypatch.setattr(timing, "EventTimer", lambda device: timing.host_timer)
    monkeypatch.setattr(trials, "executor", lambda device: interpreting)
    place, tensors = trials.OnDevice.__init__, Workload.tensors
    monkeypatch.setattr(trials.OnDevice, "__init__", lambda self, trial, device: place(self, trial, "cpu"))
    monkeypatch.setattr(Workload, "tensors", lambda self, device: tensors(self, "cpu"))
    files = ["--results", str(tmp_path), "--predictions", str(small_predictions)]
    assert command.main(["gated_residual", "--quick", *files]) == 0
    stored = json.loads((tmp_path / "nvidia-b200.json").read_text())
    [run] = stored["runs"].values()
    assert run["gpu"] == "NVIDIA B200"
    assert run["kernels"]["gated_residual"] == vlmkernels.info()["ops"]["gated_residual"]["CUDA"]
    assert run["sanitizer"]["memcheck"] == {"why_not": "compute-sanitizer is not installed"}
    assert all(entry["of_predicted"] > 0 for entry in stored["ops"]["gated_residual"])


def test_a_red_op_is_not_timed(tmp_path, small_predictions, monkeypatch, capsys):
    monkeypatch.setattr(residual_launchers, "gated_residual", lambda x, y, gate, row_mask: x.clone())
    rc = quick("gated_residual", "gated_linear_residual", results=tmp_path, predictions=small_predictions)
    assert rc == 1
    [path] = tmp_path.iterdir()
    stored = json.loads(path.read_text())
    assert list(stored["ops"]) == ["gated_linear_residual"]
    assert stored["ops"]["gated_linear_residual"][0]["no_prediction"] == "the device is none of the cards"
    assert "gated_residual: RED, not timed" in capsys.readouterr().out


def test_red_tests_make_an_op_red():
    cases = {"quick": False, "slow": False, "say": lambda line: None}
    with mock.patch.object(trials, "cases_for", return_value=[]):
        found = command.correctness(["info_nce"], "cpu", tests=lambda op: (False, "1 failed"), **cases)
    assert found == {"info_nce": {"tests": "1 failed", "cases": 0, "failed": {}, "red": True}}


def test_what_is_left_out_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer, "run", mock.Mock(side_effect=AssertionError))
    assert quick("gated_residual", "--without", "sanitizer", results=tmp_path) == 0
    [path] = tmp_path.iterdir()
    [run] = json.loads(path.read_text())["runs"].values()
    assert run["sanitizer"]["racecheck"] == {"why_not": "--without sanitizer"}
    assert "--without sanitizer" in run["command"]


def test_a_prediction_of_other_sizes_is_none():
    stored = json.loads(predict.PREDICTIONS.read_text(encoding="utf-8"))
    [entry] = [e for e in stored["entries"] if e["op"] == "gated_residual"][:1]
    measured = {k: entry[k] for k in ("op", "form", "type", "direction")} | {"seconds": {"median": 1.0}}
    smaller = measured | {"sizes": {**entry["sizes"], "batch": 1}}
    timing.compare(smaller, stored, "H100")
    assert smaller["no_prediction"] == "not among the stored predictions"
    same = measured | {"sizes": entry["sizes"]}
    timing.compare(same, stored, "H100")
    assert same["of_predicted"] == 1e6 / entry["cards"]["H100"]["us"]


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "no GPU that torch can use; --predict and --device cpu --quick need none\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "--device cpu goes with --quick"),
        (["no_such_op"], "no op"),
        (["--predict", "--quick"], "--predict --quick needs --predictions FILE"),
    ],
)
def test_what_makes_no_sense_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        command.main(words)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_all_ops_in_quick_form(tmp_path):
    assert quick(results=tmp_path) == 0
    [path] = tmp_path.iterdir()
    assert set(json.loads(path.read_text())["ops"]) == set(command.OPS)
