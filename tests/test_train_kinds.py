"""Kinds of training: their table, and one that is added by a class and a line."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.made_up_kind import PLACE, MadeUp
from tests.train_tiny import TINY, metrics, tiny_values, weights, write_pairs
from vlmkernels.train import TrainConfig, kinds, load_bundle, train
from vlmkernels.train.config import settings
from vlmkernels.use.evaluate import evaluate
from vlmkernels.use.search import search


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setitem(kinds.KINDS, "made-up", PLACE)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def values(table, out, **more):
    return tiny_values(table, out, **{"model_options": {}, "max_steps": 2, **more})


def test_the_table_says_what_there_is():
    for name, kind in zip(kinds.KINDS, kinds.every(), strict=True):
        assert kind.name == name
        assert kind.configs
    with pytest.raises(ValueError, match=r"kind must be one of clip, .*, vild, got 'made-up'"):
        kinds.find("made-up")


@pytest.mark.parametrize("kind", TINY)
def test_a_trained_model_is_of_its_kind(kind):
    chosen = kinds.find(kind)
    fields = {"model_type": chosen.model.model_type}
    if kind != "flamingo":  # which has no sizes without its parts
        sizes = chosen.sizes(TrainConfig(model_options=TINY[kind]))
        fields |= {name: getattr(sizes, name) for name in vars(sizes)}
    assert kinds.name_of(fields) == kind
    others = {"clip": ["distill"]}  # whose result is a model of this kind
    assert [each.name for each in kinds.every() if each.trains(fields)] == [kind, *others.get(kind, [])]


def test_an_option_has_one_meaning_in_all_kinds():
    """It is one key and one flag, whatever kinds have it, and none hides a setting of all runs."""
    for kind in kinds.every():
        names = set(kind.options.__dataclass_fields__)
        assert not names & set(TrainConfig().to_dict())
        for name in names:
            field = kind.options.__dataclass_fields__[name]
            assert settings()[name].default == field.default
            assert settings()[name].help == field.metadata["help"]


def test_a_made_up_kind_trains_and_is_used(made_up, table, tmp_path):
    run = tmp_path / "run"
    summary = train("made-up", TrainConfig(**values(table, run, brightness=0.5)))
    assert summary.steps == 2
    assert len(metrics(run)) == 2
    assert "R@1" in str(summary)
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["brightness"] == 0.5
    assert "images_per_row" not in stored
    model = load_bundle(run / "final").model
    assert type(model) is MadeUp.model
    assert model.config.brightness == 0.5
    scores = evaluate(run / "final", str(table), device="cpu")
    assert scores.samples == 22
    assert str(scores).startswith("22 samples\nimage to text: R@1 ")
    assert len(search(run / "final", "red dot", table.parent, 3, cache=False).hits) == 3
    with pytest.raises(ValueError, match=r"settings or inputs differ .* brightness was 0.5, got 1.0"):
        train("made-up", TrainConfig(**values(table, run, resume="auto")))
    more = values(table, run, brightness=0.5, resume="auto", max_steps=3)
    assert train("made-up", TrainConfig(**more)).steps == 3
    with pytest.raises(ValueError, match=r"brightness may only be given for made-up, got 0.5"):
        train("clip", TrainConfig(**values(table, tmp_path / "other", brightness=0.5)))
    again = values(table, tmp_path / "again", init=str(run / "final"), lr=1e-12, max_steps=1)
    train("made-up", TrainConfig(**again))
    assert weights(tmp_path / "again")["colour.weight"].allclose(weights(run)["colour.weight"])


def test_a_made_up_kind_has_its_flags(table, tmp_path):
    def command(*arguments):
        whole = [sys.executable, "-m", "tests.made_up_kind", *map(str, arguments)]
        return subprocess.run(whole, capture_output=True, text=True, check=True).stdout

    run = tmp_path / "run"
    flags = ["--max-steps", 2, "--batch-size", 8, "--no-tensorboard", "--no-progress", "--brightness", 0.25]
    out = command("train", "made-up", "--data", table, "--out", run, *flags)
    assert out.startswith("2 steps, loss ")
    assert yaml.safe_load((run / "config.yaml").read_text())["brightness"] == 0.25
    scores = json.loads(command("eval", "--model", run / "final", "--data", table, "--json"))
    assert scores["retrieval"]["images"] == 22
