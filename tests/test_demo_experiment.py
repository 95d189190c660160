"""The demo's three seeds: their mean, what is claimed of it, and the table of README."""

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("accelerate")

from benchmarks import demo, demo_experiment, experiment
from vlmkernels.train import TrainConfig
from vlmkernels.train.config import read_config


def run_of(seed, recall, places):
    """A result whose R@10 is ``recall`` everywhere."""
    way = {"R@1": recall / 4, "R@5": recall / 2, "R@10": recall, "chance": {"R@10": 0.005}}
    part = {
        "retrieval": dict.fromkeys(demo_experiment.WAYS, way),
        "zero_shot": {"captions": {"top1": recall}},
    }
    return {
        "seed": seed,
        "training": {"seconds": 120.0, "cpu_seconds": 90.0, "steps": 7},
        "evaluation": {"whole": part, "without flags": part},
        "places": dict(zip("abc", places, strict=True)),
        "machine": {"processor": "a processor"},
    }


def test_the_table_has_the_mean_of_the_seeds():
    runs = [run_of(0, 0.2, (1, 6, 7)), run_of(1, 0.3, (6, 30, 40))]
    text = demo_experiment.table(runs)
    assert text.count("| 6.2 % | 12.5 % | 25.0 % | 0.50 % |") == 4
    assert "mean of seeds 0, 1, 7 steps each, 1.5 minutes of processor time (a processor)" in text
    assert "2, 1 have their picture among the first 6" in text
    assert "25.00 %" in demo_experiment.summary(runs)
    page = demo_experiment.with_table("a\n<!-- demo -->\nold\n<!-- /demo -->\nb", text)
    assert "old" not in page
    assert page.startswith("a\n")
    assert page.endswith("\nb")


def test_a_mean_below_the_goal_and_a_report_without_hits_fail():
    assert all(demo_experiment.verdict([run_of(0, 0.3, (1, 9, 9))]).values())
    low = demo_experiment.verdict([run_of(0, 0.3, (1, 9, 9)), run_of(1, 0.1, (1, 9, 9))])
    assert list(low.values()) == [False, False, True]
    missed = demo_experiment.verdict([run_of(0, 0.3, (1, 9, 9)), run_of(1, 0.3, (7, 9, 9))])
    assert list(missed.values()) == [True, True, False]


def test_without_results_there_is_no_table(tmp_path):
    with pytest.raises(ValueError, match="results must hold a seed"):
        demo_experiment.main(["--table", "--results", str(tmp_path)])


def test_readme_has_the_table_of_the_kept_seeds():
    runs = experiment.stored(experiment.results_folder("demo"))
    assert demo_experiment.table(runs) in demo_experiment.README.read_text(encoding="utf-8")


def test_the_demo_is_the_shipped_configuration():
    config = TrainConfig(**read_config(demo.CONFIG))
    assert config.model == "emoji-resnet"
    assert config.data == "emoji3:style-train"


def test_a_stored_command_does_not_tell_where_its_files_went():
    words = ["--out", "somewhere", "--seeds", "0", "1", "--results=elsewhere", "--quick"]
    command = experiment.origin("virtex", words)["command"]
    assert command == "python -m benchmarks.virtex_experiment --seeds 0 1 --quick"
