"""The experiment on classes without boxes: what it claims, its table, its controls."""

import pytest
import torch
from PIL import Image

from benchmarks import vild_experiment as experiment
from benchmarks.experiment import results_folder, stored


def result(text=0.0, taught=0.2, shuffled=0.01, base=(0.4, 0.4), seed=0):
    def scores(base, novel):
        box = {group: {"AP": value, "AP50": value} for group, value in (("base", base), ("novel", novel))}
        box["all"] = {"AP": 0.3, "AP50": 0.5}
        return {"scores": {"samples": 300, "classes": {"base": 26, "novel": 6}, "box": box, "mask": box}}

    trained = {"steps": 750, "cpu_seconds": 300.0}
    part = {"cpu_seconds": 60.0, "recognised": {"base": 0.75, "novel": 0.9}}
    return {
        "seed": seed,
        "machine": {"processor": "a processor", "instruction sets": "avx2", "torch": "2.13"},
        "teacher": {"whole": part, "crops": part, "cpu_seconds": 120.0},
        "proposals": {"cpu_seconds": 90.0, "images": 1000, "proposals": 10000},
        experiment.TEXT: {**trained, **scores(base[0], text)},
        experiment.DISTILLED: {**trained, **scores(base[1], taught)},
        experiment.SHUFFLED: scores(0.01, shuffled),
    }


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, []),
        ({"text": 0.2}, ["by boxes alone"]),
        ({"shuffled": 0.3}, ["with shuffled names"]),
        ({"taught": 0.0}, ["by boxes alone", "with shuffled names"]),
    ],
)
def test_verdict(changes, failing):
    found = [claim for claim, holds in experiment.verdict(result(**changes)).items() if not holds]
    assert len(found) == len(failing)
    assert all(claim.endswith(text) for text, claim in zip(failing, found, strict=True))


@pytest.mark.parametrize(
    ("bases", "within"),
    [
        ([(0.4, 0.1)], None),
        ([(0.4, 0.39), (0.42, 0.41)], True),
        ([(0.4, 0.39), (0.42, 0.38)], False),
        ([(0.4, 0.5), (0.4, 0.5)], True),
    ],
)
def test_base_classes_lose_no_more_than_seeds_differ(bases, within):
    results = [result(base=base, seed=seed) for seed, base in enumerate(bases)]
    assert experiment.base_within_spread(results) is within


def test_table_has_means_seeds_and_costs():
    lines = experiment.table([result(), result(taught=0.3, seed=1)]).splitlines()
    title = experiment.ROWS[experiment.DISTILLED]
    (row,) = [line for line in lines if line.startswith(f"| {title} |")]
    assert "| 25.0 (20.0, 30.0) |" in row
    assert row.endswith("| 5.0 (5.0, 5.0) |")
    text = "\n".join(lines)
    assert "it names 75.0 % (base) and 90.0 % (novel) of their crops" in text
    assert "Proposals, once: 10000 of 1000 pictures, 1.5 CPU minutes" in text
    assert "photographs" not in text


def test_the_table_stands_between_its_markers():
    page = "a <!-- vild: table --> old <!-- /vild --> b"
    written = experiment.with_table(page, [result()])
    assert experiment.with_table(written, [result()]) == written
    assert "old" not in written
    assert written.endswith(" b")
    with pytest.raises(ValueError, match="the page must have the markers"):
        experiment.with_table("no markers", [result()])


def test_the_page_has_the_stored_results():
    results = stored(results_folder(experiment.NAME))
    page = experiment.PAGE.read_text(encoding="utf-8")
    if results:
        assert experiment.with_table(page, results) == page
    else:
        assert "| trained by |" not in page


def test_the_stored_results_hold_what_the_page_claims():
    """Fails once novel classes gain nothing in a seed, or base ones lose more than seeds differ."""
    results = stored(results_folder(experiment.NAME))
    assert all(all(experiment.verdict(result).values()) for result in results)
    assert len(results) < 2 or experiment.base_within_spread(results)


def test_no_class_keeps_its_name():
    for seed in range(3):
        places = experiment.other_places(32, seed)
        assert places.sort().values.equal(torch.arange(32))
        assert (places != torch.arange(32)).all()


def test_the_teacher_sees_each_object_with_its_name(tmp_path):
    rows = experiment.write_crops(tmp_path, 3).read_text().splitlines()[1:]
    seen = [row.split("\t") for row in rows]
    data = experiment.load_composites("train", size=3, seed=1)
    assert [name for _, name in seen] == [name for index in range(3) for name in data.picture(index)[1]]
    box = data.picture(0)[0].boxes[0]
    width, height = Image.open(tmp_path / seen[0][0]).size
    assert width * height >= 0.9 * float((box[2] - box[0]) * (box[3] - box[1]))


@pytest.mark.slow
def test_the_experiment_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VLMKERNELS_PHOTOS", raising=False)
    arguments = ["--quick", "--seeds", "3", "--out", str(tmp_path)]
    experiment.main(arguments)
    (found,) = stored(tmp_path / "results")
    assert found["seed"] == 3
    assert {found[row]["scores"]["samples"] for row in experiment.ROWS} == {8}
    capsys.readouterr()
    experiment.main(arguments)  # trains nothing again
    assert stored(tmp_path / "results")[0]["text"] == found["text"]
    assert "| trained by |" in capsys.readouterr().out
