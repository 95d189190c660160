"""The vlmkernels command: what it prints, its exit codes, and one error for wrong use."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image

import vlmkernels
from tests.train_tiny import metrics, tiny_values, write_pairs
from vlmkernels.cli import main
from vlmkernels.train import loop


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run made by the command itself: (table, run, configuration file)."""
    folder = tmp_path_factory.mktemp("cli")
    table = write_pairs(folder)
    config = folder / "tiny.yaml"
    values = tiny_values(table, folder / "run")
    del values["out"], values["data"]
    config.write_text(yaml.safe_dump(values))
    arguments = ["train", "clip", "--config", str(config), "--data", str(table), "--out", str(folder / "run")]
    main([*arguments, "--epochs", "2", "--lr", "0.01"])
    return table, folder / "run", config


def fail(capsys, *arguments):
    """Exit code and standard error of a command that fails."""
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    return error.value.code, capsys.readouterr().err


def test_info_and_version(capsys):
    main(["info"])
    out = capsys.readouterr().out
    assert out.strip() == str(vlmkernels.info()).strip()
    assert "info_nce" in out
    main(["--version"])
    assert vlmkernels.__version__ in capsys.readouterr().out


def test_help_names_every_command_and_field(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("info", "train", "eval", "embed", "search"))
    main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--batch-size N" in out
    assert "[default: 256]" in out
    assert "--deterministic / --no-deterministic" in out
    assert "align-emoji" in out


def test_flags_override_the_file(trained):
    _, run, _ = trained
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert (stored["epochs"], stored["lr"], stored["batch_size"]) == (2, 0.01, 8)
    assert len(metrics(run)) == 6


def test_train_prints_where_the_model_is(trained, tmp_path, capsys):
    table, _, config = trained
    main(
        [
            "train",
            "siglip",
            "--config",
            str(config),
            "--data",
            str(table),
            "--out",
            str(tmp_path),
            "--max-steps",
            "2",
        ]
    )
    out = capsys.readouterr().out
    assert "2 steps, loss" in out
    assert f"model: {tmp_path / 'final'}" in out


def test_resume_needs_no_configuration(trained, tmp_path, capsys):
    table, _, config = trained
    run = tmp_path / "run"
    common = ["train", "clip", "--out", str(run)]
    main([*common, "--config", str(config), "--data", str(table), "--epochs", "2", "--max-steps", "4"])
    main([*common, "--resume", "auto", "--max-steps", "6"])
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    code, err = fail(capsys, *common, "--resume", "auto", "--lr", "1")
    assert code == 2
    assert "lr was 0.003, got 1.0" in err


def test_interrupt_says_how_to_resume(trained, tmp_path, capsys, monkeypatch):
    table, _, config = trained

    def interrupt(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Run, "one_step", interrupt)
    code, err = fail(capsys, "train", "clip", "--config", config, "--data", table, "--out", tmp_path / "run")
    assert code == 130
    assert "interrupted after step 0, before the first checkpoint" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "clip", "--batch-size", "many"], "Invalid value for '--batch-size'"),
        (["train", "clop"], "'clop' is not one of 'clip', 'align', 'siglip'"),
        (["train", "clip", "--config", "nothing.yaml"], "no file nothing.yaml"),
        (
            ["train", "clip", "--epochs", "0", "--lr", "-1"],
            "epochs must be at least 1, got 0; lr must be positive",
        ),
        (["train", "clip", "--model", "none"], "clip has no configuration 'none'"),
        (["train", "clip", "--augment", "[1"], "augment must be a mapping such as {name: value}, got '[1'"),
        (["train", "clip", "--data", "photos"], "photos"),
        (["embed", "--model", "x", "--out", "x.npz"], "Missing argument"),
        (["eval", "--model", "no-such-folder"], "no-such-folder"),
        (["fly"], "No such command 'fly'"),
    ],
)
def test_wrong_use_is_one_error(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, err = fail(capsys, *arguments)
    assert code == 2
    assert message in err
    assert err.count("Error: ") == 1
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_unknown_keys_of_a_file(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("batchsize: 3\n")
    code, err = fail(capsys, "train", "clip", "--config", path)
    assert code == 2
    assert "unknown keys batchsize; known keys are" in err


def test_eval_embed_and_search(trained, tmp_path, capsys):
    table, run, _ = trained
    model = ["--model", str(run / "final")]
    main(["eval", *model, "--data", str(table)])
    out = capsys.readouterr().out
    assert "22 samples" in out
    assert "image to text: R@1" in out
    main(["eval", *model, "--data", str(table), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["samples"] == 22
    assert 0 <= result["retrieval"]["image_to_text"]["R@10"] <= 1

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("c.jpg", "green")):
        Image.new("RGB", (20, 20), colour).save(pictures / name)
    main(["embed", *model, "--out", str(tmp_path / "e.safetensors"), str(pictures)])
    assert "3 images" in capsys.readouterr().out
    from vlmkernels.use.embed import read_embeddings

    features, keys = read_embeddings(tmp_path / "e.safetensors")
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert len(keys) == 3
    main(["embed", *model, "--out", str(tmp_path / "t.npz"), "--texts", "red dot", "ring"])
    assert "2 texts" in capsys.readouterr().out

    (pictures / "broken.png").write_bytes(b"no image")
    main(["search", *model, "--no-cache", "-k", "2", "red dot", str(pictures)])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 2
    assert float(lines[0].split()[0]) >= float(lines[1].split()[0])
    assert "broken.png" in captured.err


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "vlmkernels", "--help"], capture_output=True, text=True, check=True
    )
    assert "Commands:" in done.stdout
