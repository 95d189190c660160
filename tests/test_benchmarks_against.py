"""Two source trees in turn: benchmarks.against on made-up trees, and on this one."""

import shutil
import subprocess

import pytest

from benchmarks import against, measure, run

CASES = """
import os, time
import torch

class Case:
    id, backward, headline = "made up/case", False, False
    def inputs(self, device, small=False):
        return {"x": torch.ones(4)}, None
    def ours(self, x):
        BODY
        return x * FACTOR

def all_cases(quick, device):
    return [Case()]
"""


@pytest.fixture
def tree(tmp_path):
    """Writes a tree with one case."""

    def make(name: str, body: str = "pass", factor: float = 2.0):
        folder = tmp_path / name / "benchmarks" / "cases"
        folder.mkdir(parents=True)
        text = CASES.replace("BODY", body).replace("FACTOR", str(factor))
        (folder / "__init__.py").write_text(text)
        return tmp_path / name

    return make


def rows(*trees, names=("made up/case",), **options) -> list[dict]:
    settings = {"threads": 1, "seconds": 0.1, "memory": False, "quick": True, **options}
    return list(against.compare("ops", names, trees, **settings))


@pytest.mark.slow
def test_a_slower_tree_is_called_slower_and_a_faster_one_is_not(tree):
    quick, slow = tree("quick", "time.sleep(0.002)"), tree("slow", "time.sleep(0.02)")
    (row,) = rows(slow, quick)
    assert row["slower"]
    assert row["ratio"]["p80"] < 0.7
    assert "**slower**" in against.line(row)
    (row,) = rows(quick, slow)
    assert not row["slower"]
    assert row["ratio"]["p20"] > 1.5


@pytest.mark.slow
def test_a_tree_with_another_result_is_not_timed(tree):
    (row,) = rows(tree("now"), tree("then", factor=2.01))
    assert "moved by 5.0e-03" in row["why_not"]


def test_a_case_that_fails_has_its_reason_and_the_next_is_timed(tree):
    failing = tree("now", 'raise ValueError("no such size")')
    (row,) = rows(failing, tree("then"))
    assert row["why_not"] == "ValueError: no such size"
    (row,) = rows(tree("dies", "os._exit(3)"), tree("before"))
    assert row["why_not"] == "the process ended with status 3"


@pytest.mark.slow
def test_a_new_case_has_no_earlier_time(tree):
    (row,) = rows(tree("now"), tree("then"), names=["made up/other"])
    assert row["why_not"] == against.NEW


@pytest.mark.slow
def test_memory_of_both_trees(tree):
    (row,) = rows(tree("now", "y = torch.ones(8 << 20)"), tree("then"), memory=True)
    assert row["extra_bytes"] > 30 << 20
    assert row["before_bytes"] < 2 << 20


@pytest.mark.slow
def test_what_a_tree_prints_does_not_mix_with_the_answers(tree):
    (row,) = rows(tree("now", 'print("{}")'), tree("then"))
    assert "ratio" in row


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kind", "name"), [("ops", "gated_residual/"), ("models", "CLIP tiny, texts")])
def test_this_tree_against_itself(kind, name):
    settings = {"kind": kind, "quick": True, "device": "cpu", "threads": 1}
    with against._worker(measure.ROOT, settings) as (_, known):
        names = [known_name for known_name in known if known_name.startswith(name)][:1]
    options = {"threads": 1, "seconds": 0.1, "memory": False, "quick": True}
    (row,) = against.compare(kind, names, (measure.ROOT, measure.ROOT), **options)
    assert row["ratio"]["median"] > 0


@pytest.fixture
def repository(tmp_path):
    """A copy of what an extension-free tree needs, committed."""
    root = tmp_path / "repository"
    for folder in ("benchmarks", "vlmkernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
        shutil.copytree(measure.ROOT / folder, root / folder, ignore=ignored)
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "a tree"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    return root


def test_a_revision_is_checked_out_once(repository, monkeypatch, tmp_path):
    monkeypatch.setattr(against._native, "extension", None)
    monkeypatch.setattr(against, "TREES", tmp_path / "trees")
    tree = against.checkout("HEAD", repository)
    assert (tree / "vlmkernels" / "__init__.py").exists()
    assert against.checkout("HEAD", repository) == tree
    assert [path.name for path in (tmp_path / "trees").iterdir()] == [tree.name]


def test_a_build_that_fails_leaves_no_tree(repository, monkeypatch, tmp_path):
    monkeypatch.setattr(against._native, "extension", object())
    monkeypatch.setattr(against, "TREES", tmp_path / "trees")
    with pytest.raises(subprocess.CalledProcessError):
        against.checkout("HEAD", repository)  # it has no setup.py
    assert list((tmp_path / "trees").iterdir()) == []


def test_an_unknown_revision_is_refused_by_its_name(capsys):
    with pytest.raises(SystemExit):
        run.main(["gated_residual", "--against", "no-such-revision", "--no-tests"])
    assert "--against must name a commit" in capsys.readouterr().err


def test_a_tree_without_cases_is_refused(tree, tmp_path):
    with pytest.raises(ValueError, match="cannot be run: ModuleNotFoundError"):
        rows(tree("now"), tmp_path)
