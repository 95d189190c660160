"""`python -m benchmarks.gpu`, every step of it on a CPU: what it stores, where it stops, how it goes on."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

import vlmkernels

pytest.importorskip("triton")

from benchmarks import run as benchmark_run
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import day, pages, predict, results, sanitizer, timing, trials, verdicts
from benchmarks.gpu.cards import CARDS
from benchmarks.gpu.day import OPS, STEPS
from benchmarks.gpu.workers import Deadline
from benchmarks.gpu.workload import Workload
from benchmarks.gpu.workloads import workloads
from tests.gpu.interpreter import interpreting
from tests.test_benchmarks_gpu_workers import in_this_process
from vlmkernels._library import KERNELS
from vlmkernels.triton import gated_residual as residual_launchers

ROOT = Path(__file__).parents[1]
BLOCK = "<!-- roofline: measured -->\n<!-- /roofline -->"
OP = "gated_residual"  # whose rows take the least time
ROWS = [f"{OP}, residual stream, {type}, {x}" for type in ("bf16", "fp32") for x in ("forward", "training")]


@pytest.fixture(autouse=True)
def _triton_alone(monkeypatch):
    """An extension that was built with CUDA has kernels, and so cases, of its own."""
    monkeypatch.setitem(KERNELS, ("gated_residual", "CUDA"), "Triton")


def quick(*words, **files):
    files = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    return command.main([*words, "--device", "cpu", "--quick", *files])


def stored_in(folder):
    [path] = folder.glob("*.json")
    return json.loads(path.read_text())


def states(folder):
    return [row["state"] for row in stored_in(folder)["rows"].values()]


def page(*found):
    return pages.render(BLOCK, json.loads(predict.PREDICTIONS.read_text()), found)


@pytest.fixture(autouse=True)
def _each_run_has_a_second_of_its_own(monkeypatch):
    """Runs are named by the second in which they begin."""
    header_of, count = benchmark_run.header_of, iter(range(100))

    def header(*args):
        return header_of(*args) | {"id": f"2026-01-01T00:00:{next(count):02}Z"}

    monkeypatch.setattr(benchmark_run, "header_of", header)


@pytest.fixture(autouse=True)
def _tasks_have_no_processes(monkeypatch):
    """Whose start takes seconds, and which do not see what a test replaces."""
    for module in (day, verdicts):
        monkeypatch.setattr(module, "outcomes", in_this_process)


@pytest.fixture(scope="module")
def small_predictions(tmp_path_factory):
    """Of the workloads of --quick, for a card whose prediction compiles nothing."""
    path = tmp_path_factory.mktemp("predictions") / "quick.json"
    chosen = [w for w in workloads(quick=True) if w.op in (OP, "gated_linear_residual")]
    made = {"header": {"commit": "here"}, "entries": list(predict.entries(chosen, [CARDS["B200"]]))}
    path.write_text(json.dumps(made))
    return path


def test_on_a_cpu_every_step_runs_to_the_file(tmp_path, small_predictions, capsys):
    ops = [OP, "gated_linear_residual"]
    assert quick(*ops, "--card", "B200", results=tmp_path, predictions=small_predictions) == 0
    stored = stored_in(tmp_path)
    assert stored["machine"].endswith("-quick")
    [run] = stored["runs"].values()
    assert run["predictions"] == {"commit": "here"}
    assert len(stored["rows"]) == 2 * (2 + 4)
    assert list(stored["rows"])[:4] == ROWS
    for row in stored["rows"].values():
        assert row["of_predicted"] == row["seconds"]["median"] * 1e6 / row["predicted_us"]
        assert row["peers"][0]["ratio"]["median"] > 0
        assert row["peers"][-1]["why_not"] == "not compiled in this run"
        assert (row["rounds"], row["state"], row["kernels"]) == (3, "green", {"why_not": "no GPU"})
    judged = {(x["op"], x["state"]) for x in stored["verdicts"].values()}
    assert judged == {
        (op, state) for op in ops for state in ("green", "untested")
    }  # the latter by no sanitizer
    assert stored["ceilings"][""]["copy"] > 0
    shown = capsys.readouterr().out
    assert f"| {ROWS[1]} | **vlmkernels** |" in shown
    assert "gated_residual: 1 cases, op tests not run\ngated_residual: green by tests\n" in shown
    assert pages.measured(stored["rows"].values()) in page(stored)
    assert f"`{run['command']}`" in page(stored)
    assert "No run on a GPU is stored." in page()


@pytest.fixture
def in_place_of_a_gpu(monkeypatch):
    """The path of a GPU, with a CPU in its place."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA B200")
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    monkeypatch.setattr(timing, "EventTimer", lambda device: timing.HostTimer())
    monkeypatch.setattr(trials, "executor", lambda device: interpreting)
    place, tensors = trials.OnDevice.__init__, Workload.tensors
    monkeypatch.setattr(trials.OnDevice, "__init__", lambda self, trial, device: place(self, trial, "cpu"))
    monkeypatch.setattr(Workload, "tensors", lambda self, device: tensors(self, "cpu"))
    monkeypatch.setattr(day, "measure_ceilings", lambda device, quick: MEASURED)
    monkeypatch.setattr(day, "by_tests", partial(verdicts.by_tests, tests=lambda op, deadline: PASSED))


MEASURED = {"copy": 4e12, "products": {kind: {"512": 5e13} for kind in ("half", "tf32", "fp32")}}
TIMES = {"seconds": {"median": 1.0, "p20": 1.0, "p80": 1.0}, "kernels": {}, "peers": []}
PASSED = {"said": "3 passed", "failed": {}}


def test_on_a_gpu_the_card_is_found_by_its_name(tmp_path, small_predictions, in_place_of_a_gpu):
    files = ["--results", str(tmp_path), "--predictions", str(small_predictions)]
    assert command.main([OP, "--quick", *files]) == 0
    stored = json.loads((tmp_path / "nvidia-b200-quick.json").read_text())
    [run] = stored["runs"].values()
    assert run["gpu"] == "NVIDIA B200"
    assert run["kernels"][OP] == vlmkernels.info()["ops"][OP]["CUDA"]
    assert stored["verdicts"][f"{OP} {results.fingerprint(OP)} tests"]["said"] == "3 passed"
    for row in stored["rows"].values():
        assert row["predicted_at"] == "measured ceilings"
    text = "<!-- roofline: cards -->\n<!-- /roofline -->"
    shown = pages.render(text, json.loads(predict.PREDICTIONS.read_text()), [stored])
    assert "| B200 | 4000 GB/s | 50 TFLOP/s at K=512 |" in shown


# Untested, green, red


@pytest.mark.slow
def test_tests_judge_the_rows_of_the_same_sources_whenever_they_run(tmp_path, monkeypatch):
    assert quick(OP, "--only", "timing", results=tmp_path) == 0
    assert states(tmp_path) == ["untested"] * 4
    assert page(stored_in(tmp_path)) == page().replace(
        "No run on a GPU is stored.", "Not shown: 4 untested rows."
    )
    assert quick(OP, "--only", "tests", results=tmp_path) == 0
    assert states(tmp_path) == ["green"] * 4
    assert ROWS[0] in page(stored_in(tmp_path))
    for module in (day, results):
        monkeypatch.setattr(module, "fingerprint", lambda op: "other sources")
    assert quick(OP, "--only", "timing", "--form", "bf16, forward", results=tmp_path) == 0
    assert states(tmp_path) == ["untested", "green", "green", "green"]
    assert quick(OP, "--only", "tests", results=tmp_path) == 0
    assert states(tmp_path) == ["green"] * 4


@pytest.mark.slow
def test_a_red_op_is_timed_and_stays_out_of_the_docs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(residual_launchers, "gated_residual", lambda x, y, gate, row_mask: x.clone())
    assert quick(OP, "gated_linear_residual", "--form", "bf16", results=tmp_path) == 1
    stored = stored_in(tmp_path)
    state = {row["op"]: row["state"] for row in stored["rows"].values()}
    assert state == {OP: "red", "gated_linear_residual": "green"}
    assert all(row["seconds"]["median"] > 0 for row in stored["rows"].values())
    shown = page(stored)
    assert "gated_linear_residual, feed-forward" in shown
    assert "gated_residual, residual" not in shown
    assert "Not shown: 2 red rows." in shown
    out = capsys.readouterr().out
    assert re.search(
        r"^RED gated_residual:\n  gated_residual, \w+, float32: AssertionError", out, re.MULTILINE
    )


def test_a_kernel_that_raises_is_a_red_row(tmp_path, monkeypatch, capsys):
    measure = timing.measure_named

    def failing(task, settings):
        if task[1] == "training":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return measure(task, settings)

    monkeypatch.setattr(day, "measure_named", failing)
    assert quick(OP, "--only", "timing", results=tmp_path) == 1
    of = {name: row["state"] for name, row in stored_in(tmp_path)["rows"].items()}
    assert [of[name] for name in ROWS] == ["untested", "red", "untested", "red"]
    assert "failed: RuntimeError: CUDA error: an illegal" in capsys.readouterr().out
    monkeypatch.setattr(day, "measure_named", mock.Mock(side_effect=AssertionError))
    assert quick(OP, "--only", "timing", results=tmp_path) == 0  # it is known, and would only fail again


def test_a_peer_that_brings_down_the_process_makes_no_row_red(tmp_path, monkeypatch):
    def failing(task, settings):
        if settings.peers:
            raise RuntimeError("its process ended with status -11")
        return TIMES

    monkeypatch.setattr(day, "measure_named", failing)
    assert quick(OP, results=tmp_path) == 0
    assert states(tmp_path) == ["green"] * 4
    peers = [{"name": "all of them", "why_not": "RuntimeError: its process ended with status -11"}]
    assert all(row["peers"] == peers for row in stored_in(tmp_path)["rows"].values())


def test_what_the_sanitizer_finds_outweighs_green_tests(tmp_path, monkeypatch):
    found = {"errors": 1, "found": {"gated_residual, ragged, float32": ["Invalid read"]}, "cases": 1}
    monkeypatch.setattr(sanitizer, "run", lambda *args, **rest: {"memcheck": found})
    assert quick(OP, "--form", "bf16", results=tmp_path) == 1
    assert states(tmp_path) == ["red"] * 2


def test_what_a_tool_said_of_one_op_stays_when_the_time_ends_in_the_next(tmp_path, monkeypatch, capsys):
    asked = []

    def watch(ops, device, deadline, *, seconds, quick):
        asked.extend(ops)
        deadline.at = 0.0 if len(asked) == 1 else deadline.at
        return {"memcheck": {"errors": 0, "found": {}, "cases": 1}}

    monkeypatch.setattr(sanitizer, "run", watch)
    words = ("info_nce", OP, "--only", "sanitizer")
    assert quick(*words, results=tmp_path) == 0
    assert f"no time was left for 1: sanitizer of {OP}" in capsys.readouterr().out
    assert quick(*words, results=tmp_path) == 0
    assert asked == ["info_nce", OP]


# Where it stops, and goes on


@pytest.mark.slow
def test_a_second_call_goes_on_where_the_first_stopped(tmp_path, monkeypatch, capsys):
    ticking = iter(range(1000))
    monkeypatch.setattr(
        day, "Deadline", lambda minutes: Deadline(minutes, clock=lambda: float(next(ticking)))
    )
    assert quick(OP, "--minutes", "0.06", "--only", "timing", results=tmp_path) == 0
    out = capsys.readouterr().out
    first = stored_in(tmp_path)["rows"]
    assert 0 < len(first) < 4
    assert f"no time was left for {4 - len(first)}: {'; '.join(ROWS[len(first) :])}" in out
    monkeypatch.setattr(day, "Deadline", Deadline)
    assert quick(OP, "--only", "timing", results=tmp_path) == 0
    after = stored_in(tmp_path)
    assert list(after["rows"]) == ROWS
    assert len(after["runs"]) == 2
    for name, row in after["rows"].items():
        assert (row["run"] == min(after["runs"])) == (name in first)
    monkeypatch.setattr(day, "measure_named", mock.Mock(side_effect=AssertionError))
    assert quick(OP, "--only", "timing", results=tmp_path) == 0
    assert quick(OP, "--only", "timing", "--again", results=tmp_path) == 1


def test_peers_that_were_not_compiled_are_measured_by_a_run_that_compiles(
    tmp_path, monkeypatch, in_place_of_a_gpu
):
    """Of small inputs, which otherwise are not compiled."""
    asked = []

    def measured(task, settings):
        asked.append(settings.compiled)
        return TIMES

    monkeypatch.setattr(day, "measure_named", measured)
    words = [OP, "--only", "timing", "--form", "bf16, forward", "--results", str(tmp_path)]
    for more in ([], ["--no-compile"], [], ["--no-compile"]):
        assert command.main([*words, *more, "--again"] if not asked else [*words, *more]) == 0
        if len(asked) == 1:
            row = next(iter(stored_in(tmp_path)["rows"].values()))
            assert row["compiled"] is True
    assert asked == [True]
    assert command.main([*words, "--again", "--no-compile"]) == 0
    assert command.main(words) == 0
    assert asked == [True, False, True]


def test_tests_and_sanitizer_are_not_repeated_for_the_same_sources(tmp_path, monkeypatch):
    clean = {"memcheck": {"errors": 0, "found": {}, "cases": 1}}
    watched = mock.Mock(return_value=clean)
    monkeypatch.setattr(sanitizer, "run", watched)
    words = (OP, "--only", "tests", "--only", "sanitizer")
    assert quick(*words, results=tmp_path) == 0
    monkeypatch.setattr(trials, "run_named", mock.Mock(side_effect=AssertionError))
    assert quick(*words, results=tmp_path) == 0
    watched.assert_called_once()
    assert quick(*words, "--again", results=tmp_path) == 1


def test_without_time_nothing_runs_and_what_is_left_is_said(tmp_path, capsys):
    assert quick(OP, "--minutes", "0", results=tmp_path) == 0
    out = capsys.readouterr().out
    assert f"no time was left for 7: ceilings; {'; '.join(ROWS)}; tests of {OP}; sanitizer of {OP}" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_written_and_the_rest_is_shown(tmp_path, monkeypatch, capsys):
    write, count = results.write_atomically, iter(range(100))

    def full(path, text):
        if next(count) >= 3:  # ceilings and two rows
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(results, "write_atomically", full)
    assert quick(OP, "--only", "timing", results=tmp_path) == 1
    assert list(stored_in(tmp_path)["rows"]) == ROWS[:2]
    out = capsys.readouterr().out
    assert "is not written: No space left on device; it lacks" in out
    monkeypatch.setattr(results, "write_atomically", write)
    [path] = tmp_path.glob("*.json")
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / path.name).write_text(out.strip().splitlines()[-1])
    assert list(stored_in(tmp_path / "shown")["rows"]) == ROWS[2:]
    assert command.main(["--take", str(tmp_path / "shown"), "--results", str(tmp_path)]) == 0
    assert list(stored_in(tmp_path)["rows"]) == ROWS


@pytest.mark.slow
def test_a_disk_that_has_room_again_gets_everything(tmp_path, monkeypatch):
    write, count = results.write_atomically, iter(range(100))

    def full_once(path, text):
        if next(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(results, "write_atomically", full_once)
    assert quick(OP, "--only", "timing", results=tmp_path) == 0
    assert list(stored_in(tmp_path)["rows"]) == ROWS


@pytest.mark.slow
def test_results_of_another_machine_are_added_to_those_that_are_here(tmp_path, capsys):
    there, here = tmp_path / "there", tmp_path / "here"
    assert quick(OP, "--only", "timing", "--form", "bf16", results=here) == 0
    assert quick(OP, results=there) == 0
    newer = stored_in(there)
    assert command.main(["--take", str(there), "--results", str(here)]) == 0
    assert "4 rows, 4 with those that were here" in capsys.readouterr().out
    taken = stored_in(here)
    assert set(taken["rows"]) == set(ROWS)
    assert {row["run"] for row in taken["rows"].values()} == set(newer["runs"])  # of two the later one
    assert set(states(here)) == {"green"}
    (there / "damaged.json").write_text('{"rows": {}} and more')
    assert command.main(["--take", str(there), "--results", str(here)]) == 1
    assert f"{there}/damaged.json contains no results: Extra data" in capsys.readouterr().out
    assert stored_in(here) == taken


@pytest.fixture(scope="module")
def copy_without_git(tmp_path_factory):
    """The tree as a card's machine gets it: sources alone, and no repository."""
    folder = tmp_path_factory.mktemp("copy") / "tree"
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "results")
    for name in ("vlmkernels", "benchmarks", "tests", "tools", "csrc", "python"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    return folder


def in_copy(folder, *words, **options):
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **options}
    command = [*words, "--device", "cpu", "--quick"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **output)


@pytest.mark.slow
def test_a_copy_without_git_is_killed_and_resumes(copy_without_git, tmp_path):
    words = [sys.executable, "-m", "benchmarks.gpu", "sigmoid_loss", "--only", "timing"]
    words += ["--results", str(tmp_path)]
    first = in_copy(copy_without_git, *words)
    before = {}
    while not before:
        assert first.poll() is None, first.stdout.read()
        if found := list(tmp_path.glob("*.json")):
            before = json.loads(found[0].read_text())["rows"]
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    assert "no commit is known here" in first.communicate()[0]
    second = in_copy(copy_without_git, *words)
    out = second.communicate()[0]
    assert second.returncode == 0, out
    stored = stored_in(tmp_path)
    assert len(stored["rows"]) == 2 * sum(w.op == "sigmoid_loss" for w in workloads())
    assert {run["commit"] for run in stored["runs"].values()} == {"unknown"}
    kept = {
        name: row for name, row in stored["rows"].items() if row["run"] == next(iter(before.values()))["run"]
    }
    assert kept.keys() >= before.keys()
    assert len(kept) < len(stored["rows"])


# The four commands


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """What each of the four commands asks of `python -m benchmarks.gpu`."""
    found = {}
    for part in "1234":
        environment = os.environ | {"PYTHON": "echo", "OUT": str(tmp_path_factory.mktemp("day"))}
        words = [ROOT / "tools" / "gpu_day.sh", part, "--no-compile"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        lines = [shlex.split(line) for line in done.stdout.splitlines()]
        assert all(line[:2] == ["-m", "benchmarks.gpu"] for line in lines)
        found[part] = [command.arguments_of(line[2:]) for line in lines]
        assert found[part].pop(0).take == Path("benchmarks/results/gpu")
    return found


def test_the_four_commands_do_everything_once_in_less_than_nine_minutes_each(calls):
    done = []
    for of_part in calls.values():
        assert sum(call.minutes for call in of_part) < 9
        assert all(call.no_compile for call in of_part)
        for call in of_part:
            steps = ["sweep"] if call.sweep else call.only
            done += [(step, op) for step in steps for op in call.ops]
    expected = [(step, op) for step in STEPS for op in OPS] + [("sweep", op) for op in day.SWEPT]
    assert sorted(done) == sorted(expected)
    assert sum(call.minutes for of_part in calls.values() for call in of_part) <= 28


def test_a_command_leaves_results_and_its_output(copy_without_git, tmp_path):
    script = [str(copy_without_git / "tools" / "gpu_day.sh"), "2", "--form", "residual.*bf16, forward"]
    done = in_copy(copy_without_git, *script, PYTHON=sys.executable, OUT=str(tmp_path))
    out = done.communicate()[0]
    assert done.returncode == 0, out
    assert (tmp_path / "day-2.log").read_text() == out
    assert len(stored_in(tmp_path)["rows"]) == 3
    unknown = in_copy(copy_without_git, script[0], "5", PYTHON="true", OUT=str(tmp_path))
    assert "no part 5" in unknown.communicate()[0]
    assert unknown.returncode == 2


# Words


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
        (["sweep", "gated_residual"], "no op"),
        (["--form", "none such"], "--form 'none such' matches none of "),
        (["--form", "("], "argument --form: '(' is no regular expression: missing )"),
        (["--wheels", "no/such/folder"], "--wheels must be a folder, got no/such/folder"),
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
    assert len(stored_in(tmp_path)["rows"]) == 2 * len(workloads())
    assert set(states(tmp_path)) == {"green"}
