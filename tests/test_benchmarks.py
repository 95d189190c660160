"""The benchmark harness on tiny cases: ratios, missing peers, red ops, memory, results on disk, tables."""

import json
import os
from dataclasses import replace

import pytest
import torch

from benchmarks import cases as registry
from benchmarks import measure, report, run, sources
from benchmarks.cases import Baseline, Case, case


def double(x):
    return x * 2


GREEN = {"sources": "0123", "green": True, "said": "3 passed", "on": "a machine", "date": "2026-01-01"}


def tiny(name: str = "tiny", **changes) -> Case:
    case = Case(
        op="double",
        name=name,
        dtype=torch.float32,
        sizes={"n": 8},
        make_inputs=lambda device, dtype, n: {"x": torch.randn(n, dtype=dtype, requires_grad=True)},
        ours=double,
        baselines=(Baseline("sum", lambda: lambda x: x + x),),
        flops=1000.0,
        min_flops=1000.0,
        bytes=64.0,
        out_shape=("n",),
    )
    return replace(case, **changes)


def fake_limits(device, dtypes, *, quick=False):
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes] + ["copy"]
    return {name: {"rate": 1e9, "how": "made up"} for name in names}


@pytest.fixture
def header() -> dict:
    return run.header_of("python -m benchmarks.run double", "cpu", 1)


def test_a_copy_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.git("rev-parse", "HEAD") == ""
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no git either
    assert run.git("rev-parse", "HEAD") == ""
    assert run.header_of("words", "cpu", 1)["commit"] == "unknown"


@pytest.fixture
def no_limits(monkeypatch):
    monkeypatch.setattr(measure, "limits", fake_limits)


def entry(name: str, **changes) -> dict:
    seconds = {"median": 0.002, "p20": 0.001, "p80": 0.003}
    other = {
        "name": "peer",
        "compiled": False,
        "seconds": seconds,
        "ratio": {"median": 0.5, "p20": 0.4, "p80": 0.6},
    }
    ours = {
        "name": "vlmkernels",
        "seconds": seconds,
        "limit": "copy",
        "of_limit": 0.8,
        "extra_bytes": 3 << 20,
    }
    row = {"name": name, "backward": True, "headline": True, "ours": ours, "baselines": [other]}
    return {**row, "best_compiled": None, **changes}


def test_ratios_are_taken_pair_by_pair_and_the_first_alternates():
    now, order = [0.0], []

    def call(name, cost):
        def fn():
            order.append(name)
            now[0] += cost * (1 + len(order) // 6)  # the machine slows down as time goes by

        return fn

    times, pairs = measure.pairs(
        call("ours", 1.0), {"theirs": call("theirs", 3.0)}, seconds=1e9, rounds=(3, 4), clock=lambda: now[0]
    )
    assert order[2:6] == ["ours", "theirs", "theirs", "ours"]
    assert len(times) == len(pairs["theirs"]) == 4
    assert measure.spread([b / a for a, b in pairs["theirs"]])["median"] == pytest.approx(3.0, rel=0.3)
    assert max(times) > min(times)  # the slowdown is in the times and not in the ratio


def test_short_calls_are_repeated_and_the_time_is_per_call():
    now, calls = [0.0], [0]

    def fn():
        calls[0] += 1
        now[0] += 1e-4

    times, _ = measure.pairs(fn, {}, seconds=1e9, rounds=(3, 3), clock=lambda: now[0])
    assert times == pytest.approx([1e-4] * 3)
    assert calls[0] == 1 + 3 * round(measure.MIN_SAMPLE / 1e-4)


def test_a_call_that_turns_slow_is_not_repeated_on():
    now, calls = [0.0], [0]

    def fn():
        calls[0] += 1
        now[0] += 1e-4 if calls[0] == 1 else 0.15

    times, _ = measure.pairs(fn, {}, seconds=1e9, rounds=(3, 3), clock=lambda: now[0])
    assert times == pytest.approx([0.15] * 3)
    assert calls[0] == 1 + 3 * 2


def test_rounds_stop_after_the_seconds_but_not_below_the_minimum():
    now = [0.0]

    def fn():
        now[0] += 1.0

    assert len(measure.pairs(fn, {}, seconds=0.0, rounds=(3, 9), clock=lambda: now[0])[0]) == 3
    assert len(measure.pairs(fn, {}, seconds=4.5, rounds=(3, 9), clock=lambda: now[0])[0]) == 5
    assert len(measure.pairs(fn, {}, seconds=1e9, rounds=(3, 9), clock=lambda: now[0])[0]) == 9


def test_spread():
    assert measure.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}


def test_peak_extra_counts_temporaries_and_not_results():
    x = torch.ones(1 << 20)

    def call():
        temporary = torch.ones(8 << 20)  # 32 MiB
        return (x, temporary[: 1 << 20] + 1)  # 4 MiB more, and the input again

    extra = measure.peak_extra(call, [x])
    assert 31 << 20 < extra < 36 << 20


def test_peak_extra_sees_memory_that_is_mapped_without_torch():
    import mmap

    def call():
        with mmap.mmap(-1, 16 << 20) as temporary:
            temporary.write(b"1" * (16 << 20))
        return ()

    assert measure.peak_extra(call, []) >= 16 << 20


def test_memory_of_a_declared_case_comes_from_a_fresh_process():
    case = next(c for c in registry.all_cases(quick=True) if c.op == "gated_residual" and c.memory)
    found = measure.memory_of(case.id, quick=True, threads=1, device="cpu")
    assert set(found) == {name for name, _, _ in case.implementations()}
    assert isinstance(found[registry.OURS], int)


def test_memory_of_an_unknown_case_is_a_reason():
    found = measure.memory_of("no/such case", quick=True, threads=1, device="cpu")
    assert list(found) == [""]
    assert isinstance(found[""], str)


def test_a_missing_peer_has_a_row_that_says_why():
    def missing():
        raise ImportError("peer 'x' cannot be imported here: no module x")

    case = tiny(baselines=(Baseline("absent", missing), Baseline("sum", lambda: lambda x: x + x)))
    found = run.measure_case(case, device="cpu", seconds=0.0, quick=True)
    absent, present = found["baselines"]
    assert "no module x" in absent["why_not"]
    assert "seconds" not in absent
    assert present["ratio"]["p20"] <= present["ratio"]["median"] <= present["ratio"]["p80"]
    assert "not measured: ImportError: peer 'x'" in report.table([found])


def test_a_peer_with_another_result_is_not_timed():
    case = tiny(baselines=(Baseline("triple", lambda: lambda x: x * 3),))
    row = run.measure_case(case, device="cpu", seconds=0.0, quick=True)["baselines"][0]
    assert "differs from ours by 5.0e-01" in row["why_not"]
    assert "ratio" not in row


def test_a_failure_of_ours_is_an_error():
    def broken(x):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run.measure_case(tiny(ours=broken), device="cpu", seconds=0.0, quick=True)


def test_a_peer_that_does_not_fit_in_memory_is_not_tried(monkeypatch):
    monkeypatch.setattr(case, "available_bytes", lambda: 100)
    big = tiny(baselines=(Baseline("dense", lambda: double, matrices=1),), sizes={"n": 8, "m": 8})
    big = replace(big, make_inputs=lambda device, dtype, n, m: {"x": torch.randn(n, requires_grad=True)})
    row = run.measure_case(big, device="cpu", seconds=0.0, quick=True)["baselines"][0]
    assert row["why_not"].startswith("MemoryError: needs about")


def test_memory_goes_to_the_rows():
    peaks = {registry.OURS: 5 << 20, "sum": "OSError: no number"}
    found = run.measure_case(
        tiny(memory=True), device="cpu", seconds=0.0, quick=True, memory=lambda case: peaks
    )
    assert found["ours"]["extra_bytes"] == 5 << 20
    text = report.table([found])
    assert "5 MiB" in text
    assert "not measured: OSError: no number" in text


def test_a_red_op_is_neither_timed_nor_stored(header, no_limits):
    stored, timed = [], []

    def counted(x):
        timed.append(x)
        return double(x)

    arguments = {
        "quick": True,
        "seconds": 0.0,
        "store": lambda *a: stored.append(a),
        "say": lambda text: None,
    }
    red = run.run_ops([tiny(ours=counted)], header, tests=lambda op, root: (False, "1 failed"), **arguments)
    assert (red, stored, timed) == (["double"], [], [])
    assert (header["tests"]["double"]["green"], header["tests"]["double"]["said"]) == (False, "1 failed")

    assert (
        run.run_ops([tiny(ours=counted)], header, tests=lambda op, root: (True, "3 passed"), **arguments)
        == []
    )
    assert timed
    assert stored[0][0] == "double"
    assert (header["tests"]["double"]["green"], header["tests"]["double"]["said"]) == (True, "3 passed")


def test_an_interrupted_run_keeps_the_cases_that_it_measured(header, no_limits):
    def interrupted(x):
        raise KeyboardInterrupt

    stored = {}
    cases = [tiny(), tiny(name="second", ours=interrupted)]
    with pytest.raises(KeyboardInterrupt):
        run.run_ops(
            cases,
            header,
            quick=True,
            seconds=0.0,
            tests=None,
            store=lambda op, header, entries: stored.update({op: [entry["name"] for entry in entries]}),
            say=lambda text: None,
        )
    assert stored == {"double": [cases[0].name]}


def test_without_tests_the_sources_are_recorded(header, no_limits):
    run.run_ops([tiny()], header, quick=True, seconds=0.0, tests=None, say=lambda text: None)
    assert header["tests"] == {"double": {"sources": sources.digest(sources.of("double"))}}


def test_header_says_where_the_numbers_are_from(header):
    assert header["commit"]
    assert isinstance(header["dirty"], bool)
    assert header["versions"]["torch"] == torch.__version__
    assert {"cpu", "isa", "threads", "load", "date", "command", "tests", "kernels"} <= set(header)
    assert set(header["kernels"]) >= {"info_nce", "sigmoid_loss", "gated_residual"}


def test_machine_name(monkeypatch):
    monkeypatch.setattr(run, "cpu_info", lambda: ("AMD EPYC 9B45 64-Core Processor @ 2.6GHz", "avx512-bf16"))
    assert run.machine_name("cpu", 2) == "amd-epyc-9b45-64-core-avx512-bf16-2t"


def test_limit_is_the_slower_of_products_and_copies():
    limits = {"float32": {"rate": 1e12}, "copy": {"rate": 1e10}}
    found = {"flops": 5e8, "bytes": 1e6, "dtype": "float32", "ours": {"seconds": {"median": 1e-3}}}
    run.add_limit(found, limits)
    assert (found["ours"]["limit"], found["ours"]["of_limit"]) == ("products", pytest.approx(0.5))
    found["bytes"] = 8e6
    run.add_limit(found, limits)
    assert (found["ours"]["limit"], found["ours"]["of_limit"]) == ("copy", pytest.approx(0.8))


def test_measured_limits_are_positive():
    found = measure.limits("cpu", [torch.float32], quick=True)
    assert set(found) == {"float32", "copy"}
    assert all(limit["rate"] > 0 and limit["how"] for limit in found.values())


def test_without_16_bit_products_the_limit_is_that_of_float32(monkeypatch):
    tiles = {"float32": {"rate": 1e11, "how": "tile products of 64x256x512"}, "bfloat16": {}, "float64": {}}
    monkeypatch.setattr(measure, "_tile_products", lambda dtype, quick: tiles[dtype])
    found = measure.limits("cpu", [torch.bfloat16, torch.float64], quick=True)
    assert found["bfloat16"] == {"rate": 1e11, "how": "tile products of 64x256x512 in float32"}
    assert found["float64"]["how"].startswith("torch.mm of")


def test_results_merge_by_case_and_drop_unused_runs(tmp_path, header):
    path = tmp_path / "results" / "machine.json"
    first, second = {**header, "id": "1"}, {**header, "id": "2"}
    report.merge(path, "machine", first, "a", [entry("x"), entry("y"), entry("old")], ["x", "y", "old"])
    report.merge(path, "machine", first, "b", [entry("z")], ["z"])
    report.merge(path, "machine", second, "a", [entry("y", headline=False)], ["y", "x"])
    stored = json.loads(path.read_text())
    assert [(c["name"], c["run"]) for c in stored["ops"]["a"]] == [("y", "2"), ("x", "1")]
    assert stored["ops"]["a"][0]["headline"] is False
    assert set(stored["runs"]) == {"1", "2"}
    report.merge(path, "machine", second, "a", [entry("x")], ["x"])
    report.merge(path, "machine", second, "b", [entry("z")], ["z"])
    assert set(json.loads(path.read_text())["runs"]) == {"2"}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    report.write_atomically(path, "old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_tables_are_generated_between_markers_and_twice_is_once(tmp_path, header):
    results, page = tmp_path / "results", tmp_path / "page.md"
    header = {**header, "limits": fake_limits("cpu", []), "tests": {"a": GREEN}, "kernels": {"a": "C++"}}
    report.merge(results / "m.json", "m", header, "a", [entry("x"), entry("y")], ["x", "y"])
    page.write_text("before\n<!-- benchmarks: a -->\nstale\n<!-- /benchmarks -->\nafter\n")
    assert report.write_docs(results, [page]) == [page]
    text = page.read_text()
    assert text.startswith("before\n<!-- benchmarks: a -->\n")
    assert text.endswith("<!-- /benchmarks -->\nafter\n")
    assert "stale" not in text
    assert "`python -m benchmarks.run double`" in text
    assert "| x | **vlmkernels** | 2 ms | 1 | 3 MiB | 80% (copy) |" in text
    assert "|  | peer | 2 ms | 0.50 (0.40–0.60) | – |  |" in text  # ours loses, the row stays
    assert report.write_docs(results, [page]) == []


def test_names_do_not_add_columns_to_tables(tmp_path, header):
    header["tests"] = {"a": GREEN}
    report.merge(tmp_path / "m.json", "m", header, "a", [entry("KL(p || s)")], ["KL(p || s)"])
    for block in ("headline", "a"):
        text = report.render(block, report.load_results(tmp_path))
        assert r"KL(p \|\| s)" in text
        assert "||" not in text


def test_headline_names_the_eager_peer_and_the_best_compiled_one(tmp_path, header):
    header["tests"] = {"a": GREEN}
    compiled = {**entry("x")["baselines"][0], "name": "compiled peer", "compiled": True}
    case = entry("x", baselines=[*entry("x")["baselines"], compiled], best_compiled="compiled peer")
    report.merge(tmp_path / "m.json", "m", header, "a", [case, entry("y", headline=False)], ["x", "y"])
    text = report.render("headline", report.load_results(tmp_path))
    assert "| a | x | 2 ms | 80% | 0.50× peer; 0.50× compiled peer |" in text
    assert "| y |" not in text


def test_what_is_kept_for_the_backward_is_counted_and_has_a_column():
    size = 1 << 20

    def squares(x):  # x is an input and does not count; its double does
        return (2 * x).square()

    found = run.measure_case(
        tiny(
            make_inputs=lambda device, dtype, n: {"x": torch.randn(n, requires_grad=True)},
            sizes={"n": size},
            ours=squares,
            baselines=(Baseline("product", lambda: lambda x: 4 * x * x),),
            memory=True,
        ),
        device="cpu",
        seconds=0.0,
        quick=True,
    )
    assert found["ours"]["saved_bytes"] == 4 * size
    assert found["baselines"][0]["saved_bytes"] == 4 * size
    text = report.table([found])
    assert "| kept for the backward |" in text
    assert "| 4 MiB |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1
    assert "kept" not in report.table([entry("x")])
    assert "saved_bytes" not in run.measure_case(tiny(), device="cpu", seconds=0.0, quick=True)["ours"]


def test_select():
    cases = [tiny("a"), tiny("b", long=True), tiny("c", op="other")]
    assert [c.name for c in run.select(cases, [], "", long=False)] == ["a", "c"]
    assert [c.name for c in run.select(cases, ["double"], "", long=True)] == ["a", "b"]
    with pytest.raises(ValueError, match="no benchmark for \\['nothing'\\]"):
        run.select(cases, ["nothing"], "", long=False)
    with pytest.raises(ValueError, match="without --long"):
        run.select(cases, [], "b", long=False)


def test_quick_writes_nothing_and_a_full_run_writes_the_machine(tmp_path, monkeypatch, capsys, no_limits):
    monkeypatch.setattr(registry, "all_cases", lambda **options: [tiny()])
    monkeypatch.setattr(run, "machine_name", lambda device, threads: "machine")
    threads = str(torch.get_num_threads())
    common = ["--no-tests", "--threads", threads, "--seconds", "0", "--results", str(tmp_path)]
    assert run.main([*common, "--quick"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert run.main(common) == 0
    stored = json.loads((tmp_path / "machine.json").read_text())
    assert stored["ops"]["double"][0]["name"] == "tiny"
    (only,) = stored["runs"].values()
    assert only["command"].startswith("python -m benchmarks.run --no-tests")
    assert "**vlmkernels**" in capsys.readouterr().out
