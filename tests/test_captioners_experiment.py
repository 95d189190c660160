"""The captioners beside each other: what is claimed, the tables, and the episodes with new names."""

import numpy as np
import pytest
import torch

from benchmarks import captioners_experiment as experiment
from benchmarks import reading, shots, tower_probe
from benchmarks.experiment import results_folder, stored
from vlmkernels.data import load_scenes, slot_accuracy
from vlmkernels.data.scenes import OBJECTS


def result(system="flamingo", seed=0, slots=0.95, seconds=100.0, other=0.2):
    found = {"slots": slots, "objects": slots, "relations": slots, "scenes": slots / 2}
    elsewhere = {reading.OTHER: other, reading.STYLE: 0.7, reading.ALONE: 0.15, "chance": 0.18}
    each = {str(count): count / 10 for count in shots.SHOTS}
    shuffled = {count: 0.0 for count in each if count != "0"}
    return {
        "system": system,
        "seed": seed,
        "machine": {"processor": "a processor", "instruction sets": "avx2", "torch": "2.13"},
        "trained": {
            part: {"cpu_seconds": seconds} for part in [*experiment.SYSTEMS[system].values(), system]
        },
        "parameters": 2_000_000,
        "trained_parameters": 1_000_000,
        "evaluation": {"slots": found, "perplexity": 1.1, "reference_scores": {"CIDEr": 1.0}},
        "reading": {
            name: {
                **dict.fromkeys(reading.SCORES, share),
                **({} if name == "chance" else {"perplexity": 1.7}),
            }
            for name, share in elsewhere.items()
        },
        "tower": {"object": 0.9, "place": 0.8, "object_share": 0.2, "place_share": 0.1},
        "shots": {"episodes": 10, **{task: {"true": each, "shuffled": shuffled} for task in shots.TASKS}},
    }


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, []),
        ({"slots": 0.89}, ["seed 0: at least 90% of the slots"]),
        ({"seconds": 241.0}, ["seed 0: within 12 CPU minutes"]),
        ({"other": 0.256}, []),
        ({"other": 0.258}, ["seed 0: at most 10% of the gain with other images"]),
        ({"system": "virtex", "slots": 0.1, "seconds": 1e4}, []),
        ({"system": "flamingo-shots", "slots": 0.1, "seconds": 1e4}, []),
    ],
)
def test_verdict(changes, failing):
    found = experiment.verdict([result(**changes)])
    assert [claim for claim, holds in found.items() if not holds] == failing


def test_table_has_systems_means_seeds_and_trainings():
    results = [result(), result(seed=1, slots=0.85), result("simvlm", slots=0.994, seconds=270.0)]
    lines = experiment.table(results).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["SimVLM", "Flamingo"]
    assert "| 0 | 99.4 % | 99.4 % | 99.4 % | 49.7 % | 1.00 | 4.5 | 2.00 M | 1.00 M |" in lines[2]
    assert "| 0, 1 | 90.0 (95.0, 85.0) % |" in lines[3]
    assert "| 5.0 (clip 1.7, lm 1.7, flamingo 1.7) |" in lines[3]


def test_tables_stand_between_their_markers():
    end = "<!-- /captioners -->"
    page = f"a <!-- captioners: table --> old {end} b <!-- captioners: tower -->{end}"
    page += f"<!-- captioners: reading -->{end}<!-- captioners: shots -->{end} c"
    results = [result(), result("flamingo-shots")]
    written = experiment.with_tables(page, results)
    assert experiment.with_tables(written, results) == written
    assert "old" not in written
    assert written.index("| Flamingo |") < written.index(" b ") < written.index("| true |")
    assert "| the place of a patch | 80.0 % | 10.0 % |" in written
    assert "| Flamingo, own images | 95.0 % | 95.0 % | 95.0 % | 47.5 % | 1.100 |" in written
    assert "| captions of other scenes (chance) | 18.0 % | 18.0 % | 18.0 % | 18.0 % | – |" in written
    assert "| a known object, a new name | shuffled |  | 0.0 % | 0.0 % | 0.0 % |" in written
    with pytest.raises(ValueError, match="the page must have the markers"):
        experiment.with_tables("no markers", [result()])


def test_the_page_has_the_stored_results():
    results = stored(results_folder(experiment.NAME), "*-seed-*.json")
    page = experiment.PAGE.read_text(encoding="utf-8")
    if results:
        assert experiment.with_tables(page, results) == page
    else:
        assert "| system |" not in page


def test_other_images_are_those_of_other_scenes_and_chance_is_what_their_captions_score():
    scenes = load_scenes("test", size=40)
    other = reading.OtherImages(scenes)
    assert len(other) == 40
    assert sorted(other.image_of.values()) == list(range(40))
    for i in range(40):
        assert other.image_of[i] != i
        assert other[i]["text"] == scenes[i]["text"]
        found, wanted = other[i]["image"], scenes[other.image_of[i]]["image"]
        assert (np.asarray(found) == np.asarray(wanted)).all()
    captions = [scenes.names[other.image_of[i]] for i in range(40)]
    assert reading.chance(scenes) == slot_accuracy(captions, scenes.names)


@pytest.mark.parametrize("task", shots.TASKS)
def test_an_episode_has_its_object_everywhere_and_other_known_objects(task):
    scenes = load_scenes("test", size=1500, objects=len(OBJECTS), seed=1)
    made = shots.episodes(scenes, task, 40)
    known = set(OBJECTS[: shots.KNOWN])
    for one, other in zip(made, shots.others(made), strict=True):
        shown = [scenes.scene(index).objects for index in (*one.shots, one.query)]
        assert len({*one.shots, one.query}) == max(shots.SHOTS) + 1
        assert all(one.concept in objects for objects in shown)
        assert {name for objects in shown for name in objects} - {one.concept} <= known
        assert (one.concept in known) == (task == "known")
        assert (one.name in shots.NAMES) == (task == "known")
        assert other.concept != one.concept
        assert shots.renamed(scenes.scene(one.query).caption, one).count(one.name) == 1
    assert shots.episodes(scenes, task, 40) == made


def test_right_is_the_name_in_the_slot_of_the_object():
    scenes = load_scenes("test", size=20)
    first, second = scenes.scene(0).objects[:2]
    one = shots.Episode((), 0, second, "dax")
    relation = scenes.scene(0).relations[0]
    assert shots.right(f"a {first} {relation} a dax", scenes, one)
    assert not shots.right(f"a dax {relation} a {first}", scenes, one)
    assert not shots.right(f"a {first}", scenes, one)
    assert not shots.right(scenes.scene(0).caption, scenes, one)
    assert shots.renamed(f"a fox above an {second}", one) == "a fox above a dax"


def test_what_is_read_of_a_tower():
    scenes = load_scenes("train", size=60)
    objects = tower_probe.objects_of(scenes)
    for index, row in enumerate(objects):
        scene = scenes.scene(index)
        assert [scenes.objects[i] for i in row if i < 24] == [
            name for _, name in sorted(zip(scene.cells, scene.objects, strict=True))
        ]
    places = torch.arange(36.0).view(1, 6, 6)  # the number of each place is its token
    cells = tower_probe.by_cell(places.reshape(1, 36, 1), 2)[..., 0]
    assert cells.view(4, 3, 3).equal(
        torch.stack([places[0, y : y + 3, x : x + 3] for y in (0, 3) for x in (0, 3)])
    )
    codes = torch.eye(25)[objects]  # [60, 4, 25]
    assert tower_probe.share(codes.flatten(0, 1), objects.flatten()) == pytest.approx(1)
    half = torch.cat([codes, codes[torch.randperm(60)]], -1).flatten(0, 1)
    assert 0.5 < tower_probe.share(half, objects.flatten()) < 0.75


def test_prompts_are_padded_on_the_left():
    tokens, mask = shots.left_padded([[1, 2, 3], [4]], pad=9)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.slow
def test_the_experiment_runs(tmp_path, capsys):
    systems = ("flamingo", "flamingo-shots")
    arguments = ["--quick", "--systems", *systems, "--seeds", "3", "--out", str(tmp_path)]
    experiment.main(arguments)
    found = {each["system"]: each for each in stored(tmp_path / "results", "*-seed-*.json")}
    assert set(found) == set(systems)
    assert all(each["seed"] == 3 and each["evaluation"]["samples"] == 8 for each in found.values())
    assert set(found["flamingo-shots"]["shots"]) == {"episodes", *shots.TASKS}
    assert set(found["flamingo"]["reading"]) == set(reading.ROWS) - {reading.OWN}
    before = capsys.readouterr().out
    experiment.main(arguments)  # trains nothing again
    for each in stored(tmp_path / "results", "*-seed-*.json"):
        assert each["trained"] == found[each["system"]]["trained"]
    assert "| Flamingo | 3 |" in before
