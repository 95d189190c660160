"""The experiment with images and without: its claims, its table, and the two ways of the head."""

import copy

import pytest

from benchmarks import visualbert_experiment as experiment

NAMES = (
    "right and wrong", "with another image: not so", "than without the image", "than with another image",
    "lower perplexity", "not so, too", "the same steps",
)  # fmt: skip


def result():
    def score(value, error=0.01):
        return {"value": value, "error": error}

    judged = {
        "match": {
            "own": {"accuracy": score(0.8), "ranking": score(0.9)},
            "another": {"accuracy": score(0.51), "ranking": score(0.5)},
        },
        "perplexity": {"own": 2.0, "another": 9.0, "none": 5.0},
        "gain": {"another": score(1.5), "none": score(0.9)},
    }
    return {
        "seed": 0,
        "images": {"steps": 9, "judged": judged},
        "words": {"steps": 9, "judged": {"perplexity": {"none": 4.0}}},
    }


def changed(path, value):
    whole = copy.deepcopy(result())
    place = whole
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return whole


JUDGED = ("images", "judged")


@pytest.mark.parametrize(
    ("whole", "failing"),
    [
        (result(), []),
        (changed((*JUDGED, "match", "own", "accuracy", "value"), 0.52), [0]),
        (changed((*JUDGED, "match", "own", "accuracy", "value"), 0.2), [0]),
        (changed((*JUDGED, "match", "another", "accuracy", "value"), 0.54), [1]),
        (changed((*JUDGED, "gain", "none", "error"), 0.4), [2]),
        (changed((*JUDGED, "gain", "another", "value"), -1.0), [3]),
        (changed((*JUDGED, "perplexity", "own"), 4.5), [4]),
        (changed((*JUDGED, "perplexity", "none"), 1.9), [4]),
        (changed((*JUDGED, "perplexity", "another"), 3.9), [5]),
        (changed(("words", "judged", "perplexity", "none"), 10.0), []),
        (changed(("words", "steps"), 8), [6]),
    ],
)
def test_verdict(whole, failing):
    found = list(experiment.verdict(whole).items())
    assert len(found) == len(NAMES)
    assert all(text in claim for text, (claim, _) in zip(NAMES, found, strict=True))
    assert [i for i, (_, holds) in enumerate(found) if not holds] == failing


def test_table_has_means_and_seeds():
    other = changed((*JUDGED, "perplexity", "own"), 3.0)
    lines = experiment.table([result(), other]).splitlines()
    assert len(lines) == 6
    assert lines[2].endswith("| 0.800 (0.800, 0.800) | 0.010 | 0.900 (0.900, 0.900) | 2.50 (2.00, 3.00) |")
    assert lines[4] == "| trained with images | none | – | – | – | 5.00 (5.00, 5.00) |"
    assert lines[5] == "| trained without | none | – | – | – | 4.00 (4.00, 4.00) |"


def test_both_ways_of_the_head_are_one_step():
    """The same loss and the same gradients, in less memory."""
    works, _, sizes = experiment.head_works(quick=True)
    first, second = (work() for work in works.values())
    assert sizes["batch"] == 2
    assert first[0].item() == pytest.approx(second[0].item(), rel=1e-5)
    for a, b in zip(first[1:], second[1:], strict=True):
        assert (a - b).abs().max() <= 1e-4 * (b.abs().max() + 1e-2)
