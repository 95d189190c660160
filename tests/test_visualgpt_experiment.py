"""The experiment with few captions and with rewards: what it claims, and the tables it writes."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import visualgpt_experiment as experiment
from benchmarks.experiment import results_folder, stored
from vlmkernels.data import CsvPairs, load_scenes

COST = "Seeds {}. CPU minutes of training: {} a seed, {} for what they start from. Measured on a processor."
ROWS = {
    "few": {"srau-1": (0.3, 0.5), "residual-1": (0.2, 0.4), "srau-5": (0.6, 1.0), "residual-5": (0.5, 0.9)},
    "rewards": {"srau-80": (0.6, 1.0), "self_critical": (0.7, 1.2), "longer": (0.6, 1.1)},
}


def result(part, seed=0, **changes):
    """A result of a part with these (slots, CIDEr-D) of each model."""
    rows = {**ROWS[part], **changes}
    before = {"few": {"clip": {"cpu_seconds": 90.0}}, "rewards": {}}[part]
    return {
        "seed": seed,
        "machine": {"processor": "a processor"},
        "before": {**before, "lm": {"cpu_seconds": 30.0}},
        "trained": {name: {"cpu_seconds": 30.0} for name in rows},
        "evaluation": {
            name: {
                "perplexity": 2.0, "reference_scores": {"CIDEr": cider},
                "slots": {"slots": slots, "scenes": 0.1},
            }
            for name, (slots, cider) in rows.items()
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("part", "changes", "claim"),
    [
        ("few", {"residual-1": (0.3, 0.1)}, "more slots right with gates at 1 %"),
        ("few", {"residual-5": (0.9, 0.1)}, "more slots right with gates at 5 %"),
        ("few", {"residual-1": (0.1, 0.5)}, "CIDEr-D is higher with gates at 1 %"),
        ("few", {"residual-5": (0.1, 1.0)}, "CIDEr-D is higher with gates at 5 %"),
        (
            "rewards",
            {"srau-80": (0.1, 1.2), "longer": (0.1, 1.1)},
            "CIDEr-D is higher after self-critical training",
        ),
        ("rewards", {"longer": (0.1, 1.2)}, "CIDEr-D is higher than after as much more cross-entropy"),
    ],
)
def test_each_claim_can_fail(part, changes, claim):
    verdict = experiment.PARTS[part].verdict
    assert all(verdict(result(part)).values())
    failed = [name for name, held in verdict(result(part, **changes)).items() if not held]
    assert failed == [claim]


def test_the_table_has_every_seed():
    lines = experiment.table("few", [result("few"), result("few", 1, **{"srau-1": (0.5, 0.7)})]).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 6
    assert lines[2] == "| gates (srau), 1 % | 40.0 % (30.0, 50.0) | 10.0 % | 0.60 (0.50, 0.70) | 2.000 |"
    assert lines[7] == COST.format("0, 1", 2.0, 2.0)
    lines = experiment.table("rewards", [result("rewards")]).splitlines()
    assert lines[3] == "| then self-critical training | 70.0 % (70.0) | 10.0 % | 1.20 (1.20) | 2.000 |"
    assert lines[6] == COST.format("0", 1.5, 0.5)


def test_the_page_has_the_stored_results():
    folder = results_folder(experiment.NAME)
    page = experiment.PAGE.read_text(encoding="utf-8")
    assert experiment.with_tables(page, folder) == page
    with pytest.raises(ValueError, match="the page must have the markers"):
        experiment.with_tables("no markers", folder)


def test_the_page_counts_the_seeds_where_a_claim_holds():
    """Fails if self-critical training is said to raise CIDEr-D on test scenes in seeds where it does not."""
    lower = result("rewards", 1, self_critical=(0.9, 0.9))
    lines = experiment.table("rewards", [result("rewards"), lower]).splitlines()
    assert lines[-2] == "- CIDEr-D is higher after self-critical training: in 1 of 2 seeds"
    found = stored(results_folder(experiment.NAME), experiment.PARTS["rewards"].pattern)
    assert [one["seed"] for one in found] == [0, 1, 2]
    rows = [one["evaluation"] for one in found]
    cider = [
        [each[name]["reference_scores"]["CIDEr"] for name in ("srau-80", "self_critical")] for each in rows
    ]
    count = sum(after > before for before, after in cider)
    claim = f"- CIDEr-D is higher after self-critical training: in {count} of 3 seeds"
    assert claim in experiment.PAGE.read_text(encoding="utf-8").splitlines()


def test_steps_do_not_depend_on_the_share():
    """The epochs are those that the steps need, and end with them."""
    for size in (80, 400):
        words = experiment.flags("table.tsv", size, 30, 16, lr=0.1)
        given = dict(zip(words[::2], words[1::2], strict=True))
        batches = -(-size // 16)
        assert (int(given["--epochs"]) - 1) * batches < 30 <= int(given["--epochs"]) * batches
        assert (given["--max-steps"], given["--lr"]) == ("30", "0.1")


def test_tables_name_the_regions_of_each_scene_and_their_places(tmp_path):
    def transform(image):
        return torch.tensor([sum(image.tobytes()) / 1e6])

    def patch_tokens(images):
        return torch.stack([images, 2 * images, 3 * images, 4 * images], 1)  # [N, 4, 1]

    tower = SimpleNamespace(
        transform=transform, model=SimpleNamespace(visual=SimpleNamespace(patch_tokens=patch_tokens))
    )
    scenes = load_scenes("train", size=3)
    few, many = experiment.write_tables(tower, scenes, tmp_path / "scenes", [1, 3])
    assert len(CsvPairs(few)) == 1
    for sample, scene in zip(CsvPairs(many), scenes, strict=True):
        value = transform(scene["image"])
        regions = [[1, 1, 0, 1, 0], [2, 1, 0, 0, 1], [3, 0, 1, 1, 0], [4, 0, 1, 0, 1]]  # token, row, column
        expected = torch.tensor(regions).float()
        expected[:, 0] *= value
        assert sample["text"] == scene["text"]
        torch.testing.assert_close(sample["image"], expected)
