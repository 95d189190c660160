"""The experiment with a teacher: what it compares and what it claims."""

import pytest
import yaml

from benchmarks import distill_experiment as experiment
from vlmkernels.train.config import read_config

PARTS = ("whole", "part")


def judged(recall, parameters, steps=10):
    way = {"R@1": recall / 2, "R@5": recall, "R@10": 1.5 * recall}
    retrieval = {part: {"image_to_text": way, "text_to_image": way} for part in PARTS}
    return {"parameters": parameters, "steps": steps, "cpu_seconds": 3.0, "retrieval": retrieval}


def result(alone, distilled, parameters=300, steps=10):
    return {
        "seed": 0,
        "teacher": judged(0.3, 900),
        "alone": judged(alone, 300),
        "distilled": judged(distilled, parameters, steps),
    }


HELPS = [f"higher mean recall with the teacher: {part}" for part in PARTS]


@pytest.mark.parametrize(
    ("results", "failing"),
    [
        ([result(0.1, 0.2)], []),
        ([result(0.2, 0.1), result(0.1, 0.3)], []),
        ([result(0.2, 0.1), result(0.1, 0.15)], HELPS),
        ([result(0.1, 0.1)], HELPS),
        ([result(0.1, 0.2, parameters=301)], ["at most a third"]),
        ([result(0.1, 0.2, steps=11)], ["the same steps"]),
    ],
)
def test_verdict(results, failing):
    found = [claim for claim, holds in experiment.verdict(results).items() if not holds]
    assert len(found) == len(failing)
    assert all(text in claim for text, claim in zip(failing, found, strict=True))


def test_table_has_means_and_seeds():
    lines = experiment.table([result(0.1, 0.2), result(0.2, 0.3)]).splitlines()
    assert len(lines) == 2 + len(experiment.ROWS)
    assert "| student alone | 0.00 M | 10 | 3 s | 15.0 % (10.0, 20.0) | 7.5 % | 22.5 % |" in lines[3]


def test_the_student_alone_has_the_same_settings(tmp_path):
    alone = yaml.safe_load(experiment.student_config(tmp_path).read_text())
    shipped = read_config(experiment.CONFIG)
    assert alone.items() <= shipped.items()
    assert not {"teacher", "relational_weight"} & alone.keys()
    assert {"model_options", "epochs", "batch_size", "lr"} <= alone.keys()
