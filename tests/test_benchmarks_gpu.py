"""What is predicted of the kernels on a GPU, and the command that would measure it there, run on a CPU."""

import contextlib
import dataclasses
import json
import os
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton.runtime import interpreter as stock

from benchmarks.cases.residual import residual_bytes
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import pages, predict, published, sanitizer, timing, trace, trials
from benchmarks.gpu.cards import CARDS, card_of
from benchmarks.gpu.predict import FORWARD, TRAINING
from benchmarks.gpu.workloads import workloads
from tests.gpu.cases import CASES
from tests.gpu.interpreter import interpreting
from tests.gpu.trials import strided
from vlmkernels.triton import gated_residual as residual_launchers

WITHOUT_CODE = ("B200", "RTX 5090", "MI300X")  # nothing is compiled for their predictions


def workload(op: str, form: str = "", type: str = "bf16", **sizes):
    found = next(w for w in workloads() if (w.op, w.type) == (op, type) and w.form.startswith(form))
    return dataclasses.replace(found, sizes={**found.sizes, **sizes})


# The model


class OnTriton(TorchDispatchMode):
    """Ops run the kernels registered for CUDA, in the interpreter."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vlmkernels":
            with self:
                return func.redispatch(trace.CUDA, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


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
        stack.enter_context(OnTriton())
        tensors = of.tensors("cpu")
        out = of.ours(**tensors)
        torch.autograd.grad(out, [x for x in tensors.values() if x.requires_grad], torch.ones_like(out))
    return count


@pytest.mark.parametrize(
    "of",
    [
        workload("info_nce", "N=4096", n=70, m=70, d=40),
        workload("sigmoid_loss", "N=4096", n=70, m=90, d=40),
        workload("interval_attention", "full, 577", batch=1, heads=2, queries=70, keys=140, width=16),
        workload("interval_attention", "causal", batch=1, heads=1, queries=300, keys=300, width=16),
        workload("interval_attention", "prefix", batch=1, heads=1, queries=200, keys=220, width=16),
        workload("interval_attention", "Flamingo", batch=1, heads=1, queries=300, keys=160, width=16),
        workload("perceiver_attention", batch=1, media=70, latents=20),
        workload("gated_linear_residual", "attention", rows=70, width=90, inner=40),
    ],
    ids=lambda of: f"{of.op}, {of.form}",
)
def test_the_model_counts_the_products_that_the_kernels_do(of):
    passes = predict.traced(of, "sm_80", TRAINING)
    counted = sum(step.flops for this in passes for step in this.steps if step.launch is not None)
    assert counted == multiplied(of) > 0


@pytest.mark.parametrize(("op", "products"), [("info_nce", 4), ("sigmoid_loss", 3)])
def test_products_of_a_loss_are_those_of_its_algorithm(op, products):
    of = workload(op, "N=4096")
    n, m, d = of.sizes.values()
    passes = predict.traced(of, "sm_80", TRAINING)
    assert sum(this.flops for this in passes) == products * 2 * n * m * d


@pytest.mark.parametrize("type", ["bf16", "fp32"])
def test_compulsory_bytes_of_a_residual_are_its_tensors(type):
    of = workload("gated_residual", type=type)
    itemsize = 2 if type == "bf16" else 4
    expected = residual_bytes(**of.sizes, itemsize=itemsize, kept=1.0, masked=False)
    passes = predict.traced(of, "sm_80", TRAINING)
    assert expected <= sum(this.compulsory for this in passes) < expected + 100  # the gate and its gradient


def test_what_fits_the_cache_and_does_not_stay_is_not_moved():
    given, between, result = 1, 2, 3
    this = trace.Pass(made={between: 80, result: 40}, stays={result}, read={given: 100, between: 80})
    this.steps = [
        trace.Step("first", [(given, 100), (between, 80)]),
        trace.Step("second", [(given, 100), (between, 80), (result, 40)]),
    ]
    assert this.compulsory == 140
    assert this.from_memory(cache=1000) == [100, 40]
    assert this.from_memory(cache=90) == [100, 140]
    assert this.from_memory(cache=0) == [180, 220]


def test_the_fullest_multiprocessor_decides_where_programs_are_even():
    step = trace.Step("a", [], 1e12, "half", mock.Mock(grid=(133, 1, 1)), even=True)
    card = CARDS["B200"]  # 148 multiprocessors, all but 15 have one program
    needs, _ = predict.seconds_of(step, 0, card)
    assert needs["products"] == pytest.approx(1e12 / 2250e12 * 148 / 133)
    needs, _ = predict.seconds_of(dataclasses.replace(step, even=False), 0, card)
    assert needs["products"] == pytest.approx(1e12 / 2250e12)


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
    assert card_of("NVIDIA H100 PCIe") is None
    assert card_of("NVIDIA A100-PCIE-40GB") is None
    for card in CARDS.values():
        assert card.peak("half") > card.peak("tf32") > card.peak("tf32x3")


# The stored predictions and the page


@pytest.fixture(scope="module")
def stored():
    return json.loads(predict.PREDICTIONS.read_text(encoding="utf-8"))


def test_the_page_shows_the_stored_predictions(stored):
    page = pages.PAGE.read_text(encoding="utf-8")
    assert pages.render(page, stored) == page, "python -m benchmarks.gpu --predict"
    assert page.count(pages.LABEL) == 1 + len({entry["op"] for entry in stored["entries"]})


def test_every_workload_is_predicted_for_every_card(stored):
    found = [(x["op"], x["form"], x["type"], x["direction"]) for x in stored["entries"]]
    assert found == [(w.op, w.form, w.type, d) for w in workloads() for d in (FORWARD, TRAINING)]
    assert all(list(entry["cards"]) == list(CARDS) for entry in stored["entries"])
    assert all(
        entry["cards"]["A100"]["code"] for entry in stored["entries"] if entry["op"] != "gated_residual"
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
        assert {name: kept["cards"][name] for name in cards} == made["cards"], (
            "python -m benchmarks.gpu --predict"
        )


def test_published_figures_stand_beside_a_workload(stored):
    shown = [figure for entry in stored["entries"] for figure in published.beside(entry)]
    assert len(shown) == len(published.FIGURES)
    assert all(figure.card in CARDS and figure.source for figure in published.FIGURES)


# The command


def test_a_trial_moves_with_its_layout_and_what_no_view_covers_is_poison():
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
    reached = {op for case in CASES.values() if not case.slow for op in trials.ops_of(case)}
    assert reached == set(command.OPS)
    assert len(trials.cases_for(command.OPS, slow=False, one_each=True)) == len(
        {c.op for c in CASES.values()}
    )


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


@pytest.fixture(scope="module")
def small_predictions(tmp_path_factory):
    """Of the workloads of --quick, for a card whose prediction compiles nothing."""
    path = tmp_path_factory.mktemp("predictions") / "quick.json"
    chosen = [w for w in workloads(quick=True) if w.op in ("gated_residual", "perceiver_attention")]
    made = {"header": {"commit": "here"}, "entries": list(predict.entries(chosen, [CARDS["B200"]]))}
    path.write_text(json.dumps(made))
    return path


def quick(*words, **files):
    files = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    return command.main([*words, "--device", "cpu", "--quick", *files])


def test_on_a_cpu_every_step_runs_to_the_file(tmp_path, small_predictions, capsys):
    ops = ["gated_residual", "perceiver_attention"]
    assert quick(*ops, "--card", "B200", results=tmp_path, predictions=small_predictions) == 0
    [path] = tmp_path.iterdir()
    stored = json.loads(path.read_text())
    assert list(stored["ops"]) == ops
    [run] = stored["runs"].values()
    assert run["correctness"]["gated_residual"] == {
        "tests": "not run (--quick)", "cases": 1, "failed": {}, "red": False
    }  # fmt: skip
    assert all(found["why_not"] for found in run["sanitizer"].values())
    assert run["predictions"] == {"commit": "here"}
    entries = [entry for of_op in stored["ops"].values() for entry in of_op]
    assert len(entries) == 2 * (2 + 3)
    for entry in entries:
        assert entry["of_predicted"] == entry["seconds"]["median"] * 1e6 / entry["predicted_us"]
        peers = {peer["name"]: peer for peer in entry["peers"]}
        eager = "SDPA on the concatenation" if entry["op"] == ops[1] else "x + gate.tanh() * y"
        assert peers[eager]["ratio"]["median"] > 0
        assert entry["rounds"] == 3
    assert "No module named 'flash_attn'" in peers["flash-attn on the concatenation"]["why_not"]
    shown = capsys.readouterr().out
    assert "| gated_residual, residual stream, bf16, training | **vlmkernels** |" in shown
    assert "gated_residual: correct; 1 cases" in shown


def test_a_red_op_is_not_timed(tmp_path, small_predictions, monkeypatch, capsys):
    monkeypatch.setattr(residual_launchers, "gated_residual", lambda x, y, gate, row_mask: x.clone())
    rc = quick("gated_residual", "perceiver_attention", results=tmp_path, predictions=small_predictions)
    assert rc == 1
    [path] = tmp_path.iterdir()
    stored = json.loads(path.read_text())
    assert list(stored["ops"]) == ["perceiver_attention"]
    assert stored["ops"]["perceiver_attention"][0]["no_prediction"] == "the device is none of the cards"
    assert "gated_residual: RED, not timed" in capsys.readouterr().out


def test_red_tests_make_an_op_red():
    cases = {"quick": False, "say": lambda line: None}
    with mock.patch.object(trials, "cases_for", return_value=[]):
        found = command.correctness(["info_nce"], "cpu", tests=lambda op: (False, "1 failed"), **cases)
    assert found == {"info_nce": {"tests": "1 failed", "cases": 0, "failed": {}, "red": True}}


def test_a_prediction_of_other_sizes_is_none(stored):
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
