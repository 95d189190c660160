"""What tests and compute-sanitizer say of an op on a card, and of which sources they say it."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import results, sanitizer, trials, verdicts
from benchmarks.gpu.day import OPS
from benchmarks.gpu.workers import Deadline
from tests.test_benchmarks_gpu_workers import in_this_process

ROOT = Path(__file__).parents[1]
OP = "gated_residual"
PASSED = {"said": "3 passed", "failed": {}}


def judged(reports, ops=(OP, "info_nce")):
    return {x["op"]: (x["state"], list(x["failed"])) for x in verdicts.by_sanitizer(list(ops), reports)}


def test_the_sanitizer_makes_the_ops_red_whose_cases_it_stopped_at():
    clean, case = {"errors": 0, "found": {}, "cases": 3}, "gated_residual, ragged, float32"
    assert judged({"memcheck": clean}) == {OP: ("green", []), "info_nce": ("green", [])}
    found = {"errors": 1, "found": {case: ["Invalid read"]}, "cases": 3}
    red = ("red", ["compute-sanitizer memcheck"])
    assert judged({"memcheck": found, "racecheck": clean}) == {OP: red, "info_nce": ("green", [])}
    nowhere = {"errors": 1, "found": {"": ["Invalid read"]}, "cases": 0}
    assert judged({"memcheck": nowhere}) == {OP: red, "info_nce": red}
    late = {"unfinished": "no end within 9 s", "found": {case: ["Invalid read"]}, "cases": 2}
    assert judged({"memcheck": late}) == {OP: red, "info_nce": ("untested", [])}
    assert judged({"memcheck": {"why_not": "absent"}})[OP] == ("untested", [])


def test_an_op_is_judged_as_soon_as_its_cases_are_over(monkeypatch):
    deadline, ran = Deadline(), []
    monkeypatch.setattr(verdicts, "outcomes", in_this_process)
    monkeypatch.setattr(trials, "run_named", lambda name, device: ran.append(name))

    def tests(op, deadline):
        if op == "sigmoid_loss":
            deadline.at = 0.0
            return None
        return PASSED

    ops = [OP, "sigmoid_loss", "info_nce"]
    judge = partial(verdicts.by_tests, quick=True, slow=False, say=lambda line: None, tests=tests)
    assert [(x["op"], x["state"]) for x in judge(ops, "cuda", deadline)] == [(OP, "green")]
    assert not any(name.startswith("info_nce") for name in ran)


def test_without_pytest_the_cases_judge_alone(monkeypatch):
    monkeypatch.setattr(verdicts.importlib.util, "find_spec", lambda name: None)
    assert verdicts.op_tests(OP, Deadline()) == {
        "said": "op tests not run, pytest is not installed",
        "failed": {},
    }


def made_up_tests(folder, body):
    (folder / "test_made_up.py").write_text(f"""
import pytest, time

@pytest.mark.parametrize("on", ["dispatched", "cuda"])
def test_it(on):
    {body}
""")
    return partial(verdicts.op_tests, "made_up", folder=folder)


@pytest.mark.parametrize(
    ("body", "said", "failed"),
    [
        ("assert on == 'cuda'", "1 passed", {}),
        (
            "assert on != 'cuda'",
            "1 failed",
            {"test_made_up.py::test_it[cuda]": "AssertionError: assert 'cuda' != 'cuda'"},
        ),
        ("pass\n\ndel test_it", "no tests", {"the run of the tests": "no tests"}),
    ],
    ids=["passed", "failed", "none"],
)
def test_op_tests_are_those_on_cuda_tensors(tmp_path, monkeypatch, body, said, failed):
    monkeypatch.setattr(verdicts, "WORKERS", 1)
    found = made_up_tests(tmp_path, body)(Deadline())
    assert found["said"].startswith(said)
    assert list(map(os.path.basename, found["failed"])) == list(failed)
    assert all(why.startswith(x) for why, x in zip(found["failed"].values(), failed.values(), strict=True))


def test_op_tests_past_the_deadline_say_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "WORKERS", 1)
    assert made_up_tests(tmp_path, "time.sleep(600)")(Deadline(minutes=3 / 60)) is None


def test_every_op_has_tests_on_cuda_tensors():
    paths = [f"tests/test_{op}.py" for op in OPS]
    words = ["--collect-only", "-q", "-k", "cuda", "-m", "not slow", "-p", "no:cacheprovider", *paths]
    script = f"import pytest, torch; torch.cuda.is_available = lambda: True; pytest.main({words})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    collected = {
        line.partition("::")[0] for line in done.stdout.splitlines() if "[cuda" in line or "-cuda" in line
    }
    assert collected == set(paths), done.stdout[-2000:]


def test_the_sources_of_an_op_are_what_it_imports():
    found = {path.relative_to(ROOT).as_posix() for path in results.sources("info_nce")}
    kernels = {
        f"vlmkernels/triton/{name}.py" for name in ("info_nce", "_pairwise", "_pairwise_chunked", "_tiles")
    }
    assert kernels | {"vlmkernels/reference/info_nce.py", "vlmkernels/_library.py"} < found
    assert not any("attention" in path or "sigmoid" in path for path in found)
    assert "csrc/cuda/gated_residual.cuh" in {x.relative_to(ROOT).as_posix() for x in results.sources(OP)}


def test_another_source_or_compiler_is_another_fingerprint(tmp_path, monkeypatch):
    of = results.fingerprint.__wrapped__
    before = of(OP)
    assert of(OP) == before != of("info_nce")
    changed = tmp_path / "device.cuh"
    changed.write_text("// other code")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "sources", lambda op: [changed])
    here = of(OP)
    changed.write_text("// yet other code")
    assert of(OP) != here
    changed.write_text("// other code")
    assert of(OP) == here
    monkeypatch.setattr(results.triton, "__version__", "0")
    assert of(OP) != here


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


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A compute-sanitizer that gives these answers."""

    def answer(reports, then=""):
        script = tmp_path / "compute-sanitizer"
        answers = "".join(f"{tool}) cat <<'END'\n{text}\nEND\n;;\n" for tool, text in reports.items())
        script.write_text(f'#!/bin/sh\ncase "$2" in\n{answers}esac\n{then}\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return sanitizer.run([OP], "cuda", Deadline(), seconds=3, quick=True)

    return answer


def test_compute_sanitizer_is_read_tool_by_tool(tools):
    case = "gated_residual, ragged, float32"
    assert tools(REPORTS) == {
        "memcheck": {"errors": 1, "found": {case: ["Invalid __global__ read of size 4 bytes"]}, "cases": 1},
        "racecheck": {"errors": 0, "found": {}, "cases": 1},
        "initcheck": {"errors": 0, "found": {}, "cases": 1},
        "synccheck": {"unfinished": "Error: the device is not supported", "found": {}, "cases": 0},
    }


def test_a_tool_past_its_limit_says_what_it_found_until_then(tools):
    case = "gated_residual, ragged, float32"
    found = tools({"memcheck": REPORTS["memcheck"].rpartition("\n")[0]}, then="sleep 600")
    assert found["memcheck"] == {
        "unfinished": "no end within 3 s",
        "found": {case: ["Invalid __global__ read of size 4 bytes"]},
        "cases": 1,
    }


@pytest.mark.parametrize(
    ("said", "status", "why"),
    [
        (
            "========= Error: Device not supported\n========= ERROR SUMMARY: 1 error",
            0,
            "Error: Device not supported",
        ),
        (
            "case: gated_residual\nfailed: RuntimeError: unknown error\n========= ERROR SUMMARY: 0 errors",
            1,
            "failed: RuntimeError: unknown error",
        ),
    ],
    ids=["the tool", "the case"],
)
def test_a_tool_that_could_not_watch_says_nothing_of_the_op(tools, said, status, why):
    found = tools({"memcheck": said}, then=f"exit {status}")
    assert found["memcheck"]["unfinished"] == why
    assert judged({"memcheck": found["memcheck"]})[OP] == ("untested", [])


def test_far_cases_stay_out_of_the_sanitizer(capsys, monkeypatch):
    monkeypatch.setattr(trials, "run_one", lambda case, device: None)
    assert command.main(["--cases-alone", "--device", "cpu", "--quick"]) == 0
    watched = capsys.readouterr().out.splitlines()
    default = [case for case in trials.cases_for(OPS, slow=False) if not case.far]
    assert watched == [
        f"case: {case.name}" for case in default if case in trials.cases_for(OPS, slow=False, one_each=True)
    ]
    far = {case.name for case in trials.cases_for(OPS, slow=False) if case.far}
    assert far
    assert all("far" in name for name in far)


def test_without_compute_sanitizer_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    found = sanitizer.run(["info_nce"], "cuda", Deadline(), seconds=1, quick=True)
    assert found == {tool: {"why_not": "compute-sanitizer is not installed"} for tool in sanitizer.TOOLS}
