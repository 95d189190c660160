"""Runs that an earlier tree wrote are read, resumed and evaluated as they were then."""

import json
import re
import shutil

import numpy
import pytest
import yaml

from tests.old_runs import ARCHIVE, COMMANDS, OPTIONS, results
from tests.train_tiny import metrics
from vlmkernels.train import TrainConfig
from vlmkernels.train.config import read_config


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The folder with the runs, which is the present one: their paths are relative."""
    shutil.unpack_archive(ARCHIVE, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_like(found, wanted):
    """The same names, types and texts, and numbers that differ by rounding."""
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for name in wanted:
            assert_like(found[name], wanted[name])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for pair in zip(found, wanted, strict=True):
            assert_like(*pair)
    else:
        assert found == (pytest.approx(wanted, rel=1e-4) if isinstance(wanted, float) else wanted)


def assert_evaluated_as_before(old, kind):
    command = ["eval", "--model", f"{kind}/final", "--data", "pairs.tsv"]
    assert_like(
        json.loads(results([*command, "--json"])), json.loads((old / f"{kind}-eval.json").read_text())
    )
    assert words(results(command)) == words((old / f"{kind}-eval.txt").read_text())


def words(text):
    """A text without its numbers."""
    return re.sub(r"\d[\d.]*", "#", text)


@pytest.mark.parametrize("kind", OPTIONS)
def test_configurations_are_read(old, kind):
    given = yaml.safe_load((old / f"{kind}.yaml").read_text())
    stored = old / kind / "config.yaml"
    config = TrainConfig(**read_config(stored))
    assert config == TrainConfig(**read_config(old / f"{kind}.yaml"), out=kind)
    assert config.to_dict().items() >= given.items()


@pytest.mark.parametrize("kind", OPTIONS)
def test_runs_are_resumed_and_evaluated(old, kind):
    if (old / kind / "final").exists():
        assert_evaluated_as_before(old, kind)
    wanted = metrics(old / kind)
    assert f"model: {kind}/final" in results(["train", kind, "--out", kind, "--resume", "auto"])
    assert_like(metrics(old / kind), wanted)
    assert_evaluated_as_before(old, kind)


@pytest.mark.parametrize("kind", ["lm", "flamingo", "align"])
def test_other_settings_are_refused(old, kind, capsys):
    """Options of a kind must not change either, also if the earlier value is a default."""
    option = {"align": ["--label-smoothing", "0.1"]}.get(kind, ["--images-per-row", "1"])
    assert results(["train", kind, "--out", kind, "--resume", "auto", *option]) == ""
    found = capsys.readouterr().err
    assert f"settings or inputs differ from those of {kind}" in found
    assert option[0][2:].replace("-", "_") in found


def test_models_are_used(old):
    results(["train", "align", "--out", "align", "--resume", "auto"])
    for name, command in COMMANDS.items():
        wanted = (old / f"{name}.txt").read_text()
        if name == "embed":
            before = numpy.load("images.npz")
        assert words(results(command)) == words(wanted), name
    after = numpy.load("images.npz")
    assert after["keys"].tolist() == before["keys"].tolist()
    numpy.testing.assert_allclose(after["embeddings"], before["embeddings"], rtol=1e-4)
