"""The experiment with few captions: what it claims, and the table it writes."""

import pytest

from benchmarks import visualgpt_experiment as experiment


def result(**changes):
    """A result with these (slots, CIDEr-D) of each model."""
    rows = {"srau-1": (0.3, 0.5), "residual-1": (0.2, 0.4), "srau-5": (0.6, 1.0), "residual-5": (0.5, 0.9)}
    rows |= {"self_critical": (0.7, 1.2), **changes}
    return {
        "evaluation": {
            name: {
                "perplexity": 2.0, "reference_scores": {"CIDEr": cider},
                "slots": {"slots": slots, "scenes": 0.1},
            }
            for name, (slots, cider) in rows.items()
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"residual-1": (0.3, 0.1)}, "more slots right with gates at 1 %"),
        ({"residual-5": (0.9, 0.1)}, "more slots right with gates at 5 %"),
        ({"self_critical": (0.9, 1.0)}, "CIDEr-D is higher after self-critical training"),
    ],
)
def test_each_claim_can_fail(changes, claim):
    assert all(experiment.verdict(result()).values())
    failed = [name for name, held in experiment.verdict(result(**changes)).items() if not held]
    assert failed == [claim]


def test_the_table_has_every_seed():
    lines = experiment.table([result(), result(**{"srau-1": (0.5, 0.7)})]).splitlines()
    assert len(lines) == 7
    assert lines[2] == "| gates (srau), 1 % | 40.0 % (30.0, 50.0) | 10.0 % | 0.60 (0.50, 0.70) | 2.000 |"


def test_steps_are_the_same_for_every_share():
    for share in experiment.SHARES:
        size = experiment.SCENES * share // 100
        words = experiment.flags(size, experiment.STEPS)
        epochs = int(words[words.index("--epochs") + 1])
        steps = epochs * -(-size // experiment.BATCH)
        assert experiment.STEPS <= steps < experiment.STEPS + size / experiment.BATCH + 1
