"""`python -m benchmarks.gpu sweep`: tiles that are timed within a call, and the change of the table."""

import json
from unittest import mock

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import day
from benchmarks.gpu import sweep as sweeps
from benchmarks.gpu.predict import traced
from benchmarks.gpu.sweep import SWEEPS
from benchmarks.gpu.workload import TRAINING
from tests.test_benchmarks_gpu_workers import in_this_process

SM90 = GPUTarget("cuda", 90, 32)


def place_of(name):
    return next(i for i, sweep in enumerate(SWEEPS) if sweeps.name_of(sweep, "sm_90").startswith(name))


def launches(sweep, tile, target):
    of = sweeps.workload_of(sweep, quick=False, device="cuda")
    with sweeps.in_table(sweep, tile, target):
        steps = [step for this in traced(of, target, TRAINING) for step in this.steps]
    return [step.launch for step in steps if step.name == sweep.kernel]


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweeps.name_of(sweep, "sm_90"))
def test_the_call_of_a_sweep_launches_its_kernel_with_the_tile(sweep):
    tile = sweeps.candidates(sweep, "sm_90", quick=False)[-1]
    [launch] = launches(sweep, tile, "sm_90")
    wanted = {name.upper(): size for name, size in tile._asdict().items() if name.startswith("block")}
    wanted |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    assert wanted == {name: launch.config[name] for name in wanted}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Runs the sweep of an op; without processes, which do not see what a test replaces."""

    monkeypatch.setattr(day, "outcomes", in_this_process)
    words = ["sweep", "gated_linear_residual", "--device", "cpu", "--quick", "--results", str(tmp_path)]
    return lambda *more: command.main([*words, *more])


def stored_in(folder):
    [path] = folder.iterdir()
    return json.loads(path.read_text())["sweeps"]


def test_a_sweep_stores_its_times_and_is_shown_again_and_not_repeated(sweep, tmp_path, monkeypatch, capsys):
    assert sweep() == 0
    out = capsys.readouterr().out
    assert out.count("2 of 2 tiles ran") == 2
    stored = stored_in(tmp_path)
    assert list(stored) == [f"gated_linear_residual._forward, {type}, sm_80" for type in ("bf16", "tf32")]
    for found in stored.values():
        assert all(times["median"] > 0 for times in found["times"].values())
    monkeypatch.setattr(sweeps, "measure_tile", mock.Mock(side_effect=AssertionError))
    assert sweep() == 0
    assert capsys.readouterr().out == out
    assert sweep("--again") == 0
    assert "0 of 2 tiles ran; not that of the table: AssertionError" in capsys.readouterr().out


def test_a_sweep_without_time_goes_on_behind_its_last_tile(sweep, tmp_path, monkeypatch, capsys):
    ticking = iter(range(1000))
    limited = day.Deadline
    monkeypatch.setattr(day, "Deadline", lambda minutes: limited(minutes, clock=lambda: float(next(ticking))))
    assert sweep("--minutes", "0.03") == 0
    assert "no time was left for 3: gated_linear_residual._forward, bf16" in capsys.readouterr().out
    [before] = stored_in(tmp_path).values()
    assert len(before["times"]) == 1
    monkeypatch.setattr(day, "Deadline", limited)
    assert sweep() == 0
    after = stored_in(tmp_path)["gated_linear_residual._forward, bf16, sm_80"]
    assert (len(after["times"]), *before["times"].items()) == (2, *list(after["times"].items())[:1])


def test_a_tile_with_another_result_is_out(monkeypatch):
    place = place_of("gated_linear_residual._forward, bf16")
    task = place, sweeps.candidates(SWEEPS[place], "sm_80", quick=True)[1]
    sweeps._given.cache_clear()
    assert sweeps.measure_tile(task, "cpu", True, "sm_80")["median"] > 0
    results = sweeps._results
    monkeypatch.setattr(sweeps, "_results", lambda *of: [1.5 * x for x in results(*of)])
    with pytest.raises(ArithmeticError, match="differs from ours"):
        sweeps.measure_tile(task, "cpu", True, "sm_80")


def spread(median, around=0.01):
    return {"median": median, "p20": median * (1 - around), "p80": median * (1 + around)}


@pytest.mark.parametrize(
    ("times", "shown"),
    [
        (
            {"Tile(128, 64, 64, 4, 3)": spread(2e-3), "Tile(64, 64, 64, 4, 2)": spread(1e-3)},
            """2 of 2 tiles ran
--- vlmkernels/triton/_tiles.py: STATISTICS_ON
+++ on sm_90
-    ("half", True): Tile(128, 64, 64, 4, 3),  # 2 ms
+    ("half", True): Tile(64, 64, 64, 4, 2),  # 1 ms""",
        ),
        (
            {"Tile(128, 64, 64, 4, 3)": spread(2e-3, 0.2), "Tile(64, 64, 64, 4, 2)": spread(1.9e-3)},
            "2 of 2 tiles ran; none is faster than Tile(128, 64, 64, 4, 3), 2 ms",
        ),
        (
            {"Tile(128, 64, 64, 4, 3)": spread(2e-3), "Tile(1, 1, 1, 1, 1)": {"why_not": "does not fit"}},
            "1 of 2 tiles ran; none is faster than Tile(128, 64, 64, 4, 3), 2 ms",
        ),
        (
            {"Tile(128, 64, 64, 4, 3)": {"why_not": "does not fit"}, "Tile(1, 1, 1, 1, 1)": spread(1e-3)},
            "1 of 2 tiles ran; not that of the table: does not fit",
        ),
    ],
    ids=["faster", "within the spread", "out", "not there"],
)
def test_the_change_of_a_table(times, shown):
    sweep = SWEEPS[place_of("info_nce._stats, bf16")]
    assert sweeps.difference(sweep, "sm_90", times) == f"info_nce._stats, bf16, sm_90: {shown}"


def test_the_change_names_the_exception_that_a_card_has():
    sweep = SWEEPS[place_of("_attention_bwd._query_grads, bf16, heads of 128")]
    chosen = sweeps.shown(sweep.chosen("sm_80"))
    shown = sweeps.difference(sweep, "sm_80", {chosen: spread(2.0), "Tile(64, 64, 4, 2)": spread(1.0)})
    assert "--- vlmkernels/triton/_attention_bwd.py: QUERY_GRADS_ON\n+++ on sm_80\n" in shown
    assert f"\n-    (True, 128, False): {chosen}," in shown


class Driver:
    """Of a card that is not there: enough to compile for it as a launch does."""

    def get_current_target(self):
        return SM90

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def test_what_is_compiled_beforehand_is_what_a_launch_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    place = place_of("gated_linear_residual._forward, bf16")
    tile = sweeps.candidates(SWEEPS[place], "sm_90", quick=False)[1]
    sweeps.compile_tile((place, tile), SM90)
    compiled = set(tmp_path.iterdir())
    assert compiled
    run = JITFunction.run
    [launch] = launches(SWEEPS[place], tile, "sm_90")
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    run(launch.kernel, *launch.args, grid=launch.grid, warmup=True, **launch.kwargs)
    assert set(tmp_path.iterdir()) == compiled
    other = {**launch.kwargs, "num_warps": 2 * launch.kwargs["num_warps"]}
    run(launch.kernel, *launch.args, grid=launch.grid, warmup=True, **other)
    assert set(tmp_path.iterdir()) > compiled
