"""The experiment on features from captions: what it compares, and what it claims."""

import json

import pytest

from benchmarks import virtex_experiment as experiment


def result(untrained, captioning, bicaptioning, seed=0):
    def row(score):
        return {"steps": 500, "cpu_seconds": 40.0, "probe": {"score": score, "chance": 0.2}}

    return {
        "seed": seed,
        "untrained": {"probe": row(untrained)["probe"]},
        "captioning": row(captioning),
        "bicaptioning": row(bicaptioning),
    }


@pytest.mark.parametrize(
    ("results", "failing"),
    [
        ([result(0.3, 0.5, 0.6)], []),
        ([result(0.3, 0.5, 0.6), result(0.4, 0.6, 0.55, 1)], []),
        ([result(0.3, 0.6, 0.5)], ["both directions better"]),
        ([result(0.3, 0.5, 0.6), result(0.4, 0.4, 0.6, 1)], ["forward only: better"]),
        ([result(0.6, 0.5, 0.4)], ["directions: better", "forward only: better", "both directions better"]),
    ],
)
def test_verdict(results, failing):
    found = [claim for claim, holds in experiment.verdict(results).items() if not holds]
    assert len(found) == len(failing)
    assert all(text in claim for text, claim in zip(failing, found, strict=True))


def test_table_has_means_seeds_and_gaps():
    lines = experiment.table([result(0.3, 0.5, 0.6), result(0.4, 0.6, 0.8, 1)]).splitlines()
    assert "| random weights |  |  | 35.0 % (30.0, 40.0) |  |" in lines
    assert "| captions, both directions | 500 | 40 s | 70.0 % (60.0, 80.0) | +35.0 |" in lines
    assert lines[-1] == "Chance, the mean share of the objects: 20.0 %."


@pytest.mark.slow
def test_the_whole_experiment_shortened(tmp_path, capsys):
    experiment.main(["--quick", "--seeds", "0", "--out", str(tmp_path)])
    assert "captions, both directions | 2 |" in capsys.readouterr().out
    stored = json.loads((tmp_path / "results" / "seed-0.json").read_text())
    assert stored["captioning"]["probe"]["samples"] == 40
    assert {stored[row]["probe"]["untrained"] for row in ("captioning", "bicaptioning")} == {False}
    assert stored["untrained"]["probe"]["untrained"] is True
