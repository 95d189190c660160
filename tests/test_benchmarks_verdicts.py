"""Stored results name the sources they measured, and documents take those alone whose tests were green."""

import json
import subprocess

import pytest

from benchmarks import report, run, sources, verdicts
from tests.test_benchmarks import entry
from vlmkernels.ops import FAMILIES

OPS = [op for ops in FAMILIES.values() for op in ops]
PAGE = "<!-- benchmarks: all -->\n<!-- /benchmarks -->\n"


def names(paths, root=sources.ROOT):
    return {path.relative_to(root).as_posix() for path in paths}


def test_the_tests_of_an_op_decide(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_good.py").write_text("def test(): pass\n")
    (folder / "test_bad.py").write_text("def test(): assert 0\n")
    (folder / "test_nn_module.py").write_text("def test(): pass\n")
    green, summary = verdicts.run_tests("good", tmp_path)
    assert green
    assert summary.startswith("1 passed")
    green, summary = verdicts.run_tests("bad", tmp_path)
    assert not green
    assert "1 failed" in summary
    assert verdicts.run_tests("module", tmp_path)[0]
    assert verdicts.run_tests("missing", tmp_path) == (False, "test_missing.py does not exist")


@pytest.mark.parametrize("op", [*OPS, "cross_attention", "media_cache", "perceiver", "visualgpt"])
def test_sources_hold_the_op_and_what_it_calls(op):
    found = names(sources.of(op))
    home = "ops" if op in OPS else "models" if op == "visualgpt" else "nn"
    assert f"vlmkernels/{home}/{op}.py" in found
    assert {"vlmkernels/_library.py", "csrc/cpu/simd.h", "python/module.cpp", "CMakeLists.txt"} < found
    assert all(
        (sources.ROOT / f"csrc/cpu/{op}.cpp").exists() <= (f"csrc/cpu/{op}.cpp" in found) for op in OPS
    )
    if op in OPS:
        assert f"vlmkernels/reference/{op}.py" in found
    else:
        assert (
            "vlmkernels/ops/interval_attention.py" in found
            or "vlmkernels/ops/perceiver_attention.py" in found
        )


def test_another_byte_or_name_is_another_hash(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("x = 1\n")
    before = sources.digest([file], tmp_path)
    assert sources.digest([file], tmp_path) == before != sources.digest([file], tmp_path, also="torch 2")
    file.write_text("x = 2\n")
    assert sources.digest([file], tmp_path) != before
    file.write_text("x = 1\n")
    assert sources.digest([file.rename(tmp_path / "b.py")], tmp_path) != before


@pytest.fixture
def tree(tmp_path):
    """A repository with one op and its test."""
    root = tmp_path / "tree"
    (root / "vlmkernels" / "ops").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "vlmkernels" / "ops" / "double.py").write_text("FACTOR = 2\n")
    (root / "tests" / "test_double.py").write_text("def test(): pass\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one")
    return root


def git(root, *words):
    return subprocess.run(
        ["git", *words], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


def measured(root, results, header, **changes):
    """Store a run of the op of a tree without its tests; gives what reads the header of the run."""
    commit, hash = git(root, "rev-parse", "HEAD"), sources.digest(sources.of("double", root), root)
    header = {**header, "commit": commit, "dirty": False, "tests": {"double": {"sources": hash}}, **changes}
    report.merge(results / "m.json", "m", header, "double", [entry("x")], ["x"])
    return lambda: json.loads((results / "m.json").read_text())["runs"][header["id"]]["tests"]["double"]


def verified(root, results):
    """What a later verification says; earlier revisions are copied beside the tree."""

    def checkout(commit):
        copy = root.with_name(commit)
        git(root, "clone", "-q", ".", str(copy))
        git(copy, "checkout", "-q", commit)
        return copy

    (said,) = verdicts.verify(results, "a machine", root=root, checkout=checkout)
    return said


@pytest.fixture
def header():
    return run.header_of("python -m benchmarks.run double --no-tests", "cpu", 1)


def test_rows_stay_out_of_documents_until_tests_of_their_sources_were_green(tree, tmp_path, header):
    results, page = tmp_path / "results", tmp_path / "page.md"
    page.write_text(PAGE)
    tests = measured(tree, results, header)
    report.write_docs(results, [page])
    assert "No results yet" in page.read_text()
    assert report.unverified(report.load_results(results)) == [f"double on m, run {header['id']}"]

    assert "1 passed" in verified(tree, results)
    assert tests()["green"]
    assert report.unverified(report.load_results(results)) == []
    report.write_docs(results, [page])
    assert "| x |" in page.read_text()
    assert f"on the sources {tests()['sources']}, a machine" in page.read_text()
    assert list(verdicts.verify(results, "a machine", root=tree)) == []


def test_red_tests_keep_rows_out(tree, tmp_path, header):
    (tree / "tests" / "test_double.py").write_text("def test(): assert False\n")
    tests = measured(tree, tmp_path / "results", header)
    assert "1 failed" in verified(tree, tmp_path / "results")
    assert tests()["green"] is False
    assert report.unverified(report.load_results(tmp_path / "results"))


def test_what_was_measured_is_tested_though_the_tree_went_on(tree, tmp_path, header):
    tests = measured(tree, tmp_path / "results", header)
    wanted = tests()["sources"]
    (tree / "vlmkernels" / "ops" / "double.py").write_text("FACTOR = 3\n")
    (tree / "tests" / "test_double.py").write_text("def test(): assert False\n")
    assert "1 passed" in verified(tree, tmp_path / "results")
    assert (tests()["sources"], tests()["green"]) == (wanted, True)


def test_sources_that_no_commit_holds_are_never_green(tree, tmp_path, header):
    tests = measured(tree, tmp_path / "results", header, dirty=True)
    (tree / "vlmkernels" / "ops" / "double.py").write_text("FACTOR = 3\n")
    assert "no commit holds" in verified(tree, tmp_path / "results")
    assert "green" not in tests()
    other = {"double": {"sources": "of another tree"}}
    tests = measured(tree, tmp_path / "results", header, tests=other)
    assert "of another tree were measured" in verified(tree, tmp_path / "results")
    assert "green" not in tests()


def test_the_commands_say_what_they_leave_out(tree, tmp_path, header, monkeypatch, capsys):
    measured(tree, tmp_path / "results", header, dirty=True)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(PAGE)
    assert run.main(["--write-docs", "--results", str(tmp_path / "results")]) == 1
    assert f"left out: double on m, run {header['id']}" in capsys.readouterr().out
    assert run.main(["--verify", "--results", str(tmp_path / "results")]) == 1
    assert "no commit holds" in capsys.readouterr().out


def test_verification_of_some_ops_and_what_it_does_not_take(tree, tmp_path, header, capsys):
    measured(tree, tmp_path / "results", header)
    assert list(verdicts.verify(tmp_path / "results", "a machine", ["other"], root=tree)) == []
    assert len(list(verdicts.verify(tmp_path / "results", "a machine", ["double"], root=tree))) == 1
    missing = ["--results", str(tmp_path / "nowhere")]
    for words, why in (
        (missing, "must be a folder"),
        (["--list"], "takes ops"),
        (["--case", "x"], "takes ops"),
    ):
        with pytest.raises(SystemExit):
            run.main(["--verify", *words])
        assert why in capsys.readouterr().err


def test_every_published_row_was_green():
    assert report.unverified(report.load_results(run.RESULTS)) == []
