"""The experiment with MAGIC: what it measures and claims, and that its script runs."""

import json

import pytest

from benchmarks import magic_experiment as experiment
from benchmarks.experiment import ROOT, stored
from vlmkernels.data import load_scenes

PICTURES = ("a", "b", "c", "d", "e", "f", "g", "h")


def result(alone, guided, other, seed=0):
    rows = {"alone": alone, "guided": guided, "other": other}
    captions = {
        row: [
            {"picture": name, "caption": row + name, "score": base + i / 100, "precision": base + i / 50}
            for i, name in enumerate(PICTURES)
        ]
        for row, base in rows.items()
    }
    return {"seed": seed, "captions": captions}


@pytest.mark.parametrize(
    ("results", "failing"),
    [
        ([result(0.1, 0.3, 0.2)], []),
        ([result(0.3, 0.2, 0.1)], ["than without guidance"] * 2),
        ([result(0.1, 0.2, 0.2)], ["than guided by another picture"] * 2),
        ([result(0.1, 0.3, 0.2), result(0.5, 0.2, 0.1)], ["than without guidance"] * 2),
        ([result(0.1, 0.3, 0.2), result(0.1, 0.2, 0.15)], []),
    ],
)
def test_verdict(results, failing):
    found = [claim for claim, holds in experiment.verdict(results).items() if not holds]
    assert len(found) == len(failing)
    assert all(text in claim for text, claim in zip(failing, found, strict=True))


def test_table_has_means_seeds_and_differences():
    lines = experiment.table([result(0.1, 0.3, 0.2), result(0.1, 0.4, 0.2, 1)]).splitlines()
    assert "| guided by the picture | 0.385 (0.335, 0.435) | 0.420 (0.370, 0.470) | 8 of 8 |" in lines
    assert lines[-2].startswith(
        "| guided by the picture – without guidance | +0.250 [+0.250, +0.250], p = 0.0"
    )
    assert len(lines) == 2 + 3 + 1 + 2 + 2


def test_content_word_precision():
    references = ["A brown bear, in the snow.", "Two bears playing"]
    assert experiment.precision("a bear is in the snow", references) == 1.0
    assert experiment.precision("A bear on a red sofa.", references) == pytest.approx(1 / 3)
    assert experiment.precision("bear bear bear dog", references) == 0.5
    assert experiment.precision("on the", references) == experiment.precision("", references) == 0.0


def test_pictures(tmp_path):
    found = experiment.scenes(3)
    names = load_scenes("test", size=3).names
    assert [each.references for each in found] == [[name] for name in names]
    (tmp_path / "images").mkdir()
    found[0].image.save(tmp_path / "images" / "x.png")
    listed = [{"file_name": "x.png", "captions": ["a", "b"]}, {"file_name": "y.png", "captions": []}]
    (tmp_path / "annotations.json").write_text(json.dumps({"images": listed}))
    (photograph,) = experiment.photographs(tmp_path, 1)
    assert photograph.name == "x.png"
    assert photograph.references == ["a", "b"]
    assert photograph.image.size == found[0].image.size


def test_stored_results_are_those_of_the_docs():
    """Of each kind of picture there is a result of; a table in the docs has a result."""
    docs = (ROOT / "docs" / "magic.md").read_text(encoding="utf-8")
    tables = 0
    for setting in (experiment.PHOTOS, experiment.SCENES):
        if results := stored(experiment.RESULTS / setting):
            tables += 1
            assert experiment.table(results) in docs
            assert len(results[0]["captions"]["guided"]) >= 36
    assert docs.count("| difference per picture |") == tables


@pytest.mark.slow
def test_the_script_runs(tmp_path, monkeypatch, capsys):
    """Two steps of each training, four scenes; the numbers mean nothing."""
    monkeypatch.delenv("VLMKERNELS_PHOTOS", raising=False)
    experiment.main(["--quick", "--seeds", "0", "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "VLMKERNELS_PHOTOS is not set" in out
    assert "| guided by another picture |" in out
    (result,) = stored(tmp_path / "out" / "results" / "scenes")
    assert result["setting"] == "scenes"
    assert {row: len(each) for row, each in result["captions"].items()} == dict.fromkeys(experiment.ROWS, 4)
    assert all(-1 <= each["score"] <= 1 for row in result["captions"].values() for each in row)
    experiment.main(["--quick", "--seeds", "0", "--out", str(tmp_path / "out")])  # trains nothing again
    assert result["trained"] == stored(tmp_path / "out" / "results" / "scenes")[0]["trained"]
