"""The experiment on unseen combinations: what it compares, what it claims, and that it runs."""

import numpy as np
import pytest

from benchmarks import flamingo_experiment as experiment
from benchmarks.experiment import ROOT, stored
from vlmkernels.data import load_scenes, slot_accuracy


def result(seed=0, **changes):
    """A result with these (perplexity, slots) for each row."""
    rows = {
        "language_model": (1.7, 0.16),
        "own_images": (1.2, 0.8),
        "other_images": (4.0, 0.18),
        "unseen_style": (1.5, 0.6),
    }
    rows.update(changes)
    return {
        "seed": seed,
        "chance": {"slots": 0.18, "objects": 0.04, "relations": 0.3, "scenes": 0.0},
        "evaluation": {
            name: {
                "perplexity": perplexity,
                "slots": {"slots": slots, "objects": slots, "relations": slots, "scenes": 0.1},
                "reference_scores": {"CIDEr": 1.0},
            }
            for name, (perplexity, slots) in rows.items()
        },
    }


def test_other_images_are_those_of_other_scenes():
    scenes = load_scenes("test", size=40)
    other = experiment.OtherImages(scenes)
    assert len(other) == 40
    assert sorted(other.image_of.values()) == list(range(40))
    for i in range(40):
        assert other.image_of[i] != i
        assert other[i]["text"] == scenes[i]["text"]
        assert other[i]["key"] == scenes[i]["key"]
        found, wanted = other[i]["image"], scenes[other.image_of[i]]["image"]
        assert (np.asarray(found) == np.asarray(wanted)).all()
    assert experiment.OtherImages(scenes).image_of == other.image_of


def test_chance_is_what_the_captions_of_the_other_images_score():
    scenes = load_scenes("test", size=300)
    other = experiment.OtherImages(scenes)
    by_key = {scenes[i]["key"]: scenes[i]["text"] for i in range(300)}
    captions = [by_key[scenes[other.image_of[i]]["key"]] for i in range(300)]
    found = experiment.chance(scenes)
    assert found == slot_accuracy(captions, scenes.names)
    assert 0.1 < found["slots"] < 0.25


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, []),
        ({"own_images": (1.8, 0.8)}, ["perplexity is lower with images"]),
        ({"own_images": (1.2, 0.1), "other_images": (4.0, 0.0)}, ["slot accuracy is higher with images"]),
        ({"other_images": (1.6, 0.18)}, ["no lower perplexity with other images"]),
        ({"other_images": (4.0, 0.23)}, []),
        ({"other_images": (4.0, 0.25)}, ["at most 10% of the gain in slots with other images"]),
    ],
)
def test_verdict(changes, failing):
    found = experiment.verdict(result(**changes))
    assert len(found) == 4
    assert [claim for claim, holds in found.items() if not holds] == failing


def test_table_has_means_and_seeds():
    text = experiment.table([result(0), result(1, own_images=(1.4, 0.9))])
    lines = text.splitlines()
    assert len(lines) == 3 + len(experiment.ROWS)
    assert "| Flamingo, own images | 1.300 (1.200, 1.400) | 85.0 % (80.0, 90.0) |" in text


def test_committed_results_hold_for_every_seed_and_are_those_of_the_docs():
    results = stored(experiment.RESULTS)
    assert [each["seed"] for each in results] == [0, 1, 2]
    for each in results:
        assert all(experiment.verdict(each).values())
        assert each["verdict"] == experiment.verdict(each)
        assert all(rows["samples"] >= 500 for rows in each["evaluation"].values())
    docs = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert experiment.table(results) in docs


@pytest.mark.slow
def test_the_experiment_runs(tmp_path, capsys):
    experiment.main(["--quick", "--seeds", "3", "--out", str(tmp_path / "runs")])
    (result,) = stored(tmp_path / "runs" / "results")
    assert result["seed"] == 3
    assert set(result["evaluation"]) == set(experiment.ROWS)
    assert result["trained"]["flamingo"]["steps"] == 2
    assert {row["samples"] for row in result["evaluation"].values()} == {8}
    assert result["verdict"] == experiment.verdict(result)
    assert "Flamingo, own images" in capsys.readouterr().out
