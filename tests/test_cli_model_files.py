"""Every command that takes a model says in one line which of its files is wrong, and what to do."""

import json
import os
import shutil
import struct

import pytest

from tests.test_cli import fail
from tests.train_tiny import tiny_values, write_pairs
from vlmkernels.cli import main
from vlmkernels.train import TrainConfig, train

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 12345\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Pairs, and models of runs of one step: a CLIP and a language model."""
    folder = tmp_path_factory.mktemp("models")
    table = write_pairs(folder)
    finals = [
        train(kind, TrainConfig(**tiny_values(table, folder / kind, kind, max_steps=1))).final
        for kind in ("clip", "lm")
    ]
    return table, *finals


def cut(name, size):
    """Keeps the first bytes of a file."""

    def damage(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return damage


def fill(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def change(name, **values):
    """Other values in a JSON object."""

    def damage(folder):
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**fields, **values}))

    return damage


def remove(name):
    return lambda folder: (folder / name).unlink()


def header(fields, length=None):
    """A safetensors file with such a header."""
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def pipe(path):
    path.unlink()
    os.mkfifo(path)


WEIGHTS, CONFIG, TRANSFORM = "model.safetensors", "config.json", "transform.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
DEEP = b"[" * 100_000
F32 = {"dtype": "F32", "shape": [1]}
DAMAGES = {
    "weights cut": (cut(WEIGHTS, 2000), WEIGHTS, "download it again"),
    "weights cut in the header": (cut(WEIGHTS, 50), WEIGHTS, "download it again"),
    "weights empty": (fill(WEIGHTS, b""), WEIGHTS, "empty; download it again"),
    "weights of git-lfs": (fill(WEIGHTS, LFS), WEIGHTS, "git lfs pull"),
    "weights a page": (fill(WEIGHTS, b"<!doctype html><p>not found</p>"), WEIGHTS, "not a file of weights"),
    "weights gone": (remove(WEIGHTS), WEIGHTS, "found no weights"),
    "header huge": (fill(WEIGHTS, header({}, 2**62)), WEIGHTS, "header too large"),
    "header no JSON": (fill(WEIGHTS, struct.pack("<Q", 9) + b"not JSON!"), WEIGHTS, "invalid JSON"),
    "offsets negative": (
        fill(WEIGHTS, header({"a": {**F32, "data_offsets": [-4, 0]}})),
        WEIGHTS,
        "not a file of weights",
    ),
    "offsets overlap": (
        fill(
            WEIGHTS,
            header({"a": {**F32, "data_offsets": [0, 4]}, "b": {**F32, "data_offsets": [0, 4]}}) + bytes(4),
        ),
        WEIGHTS,
        "not a file of weights",
    ),
    "offsets beyond the file": (
        fill(WEIGHTS, header({"a": {"dtype": "F32", "shape": [2**50], "data_offsets": [0, 2**52]}})),
        WEIGHTS,
        "not a file of weights",
    ),
    "weights of another model": (
        fill(WEIGHTS, header({"a": {**F32, "data_offsets": [0, 4]}}) + bytes(4)),
        "final",
        "1 unknown: a",
    ),
    "config cut": (cut(CONFIG, 40), CONFIG, "not JSON"),
    "config empty": (fill(CONFIG, b""), CONFIG, "empty"),
    "config deep": (fill(CONFIG, DEEP), CONFIG, "nested too deep"),
    "config a list": (fill(CONFIG, b"[]"), CONFIG, "must contain a JSON object, got list"),
    "config no text": (fill(CONFIG, b"\xff\xfe{}"), CONFIG, "not JSON"),
    "config gone": (remove(CONFIG), CONFIG, "does not exist; pass a folder such as RUN/final"),
    "config a pipe": (lambda folder: pipe(folder / CONFIG), CONFIG, "does not exist"),
    "config of another type": (change(CONFIG, model_type=["clip"]), "final", "['clip']"),
    "sizes are text": (
        change(CONFIG, vision_width="wide"),
        CONFIG,
        "must be an integer below 2**31, got 'wide'",
    ),
    "sizes are objects": (change(CONFIG, vision_layers={"a": 1}), CONFIG, "vision_layers must be an integer"),
    "sizes are 0": (change(CONFIG, patch_size=0), CONFIG, "patch_size must be at least 1, got 0"),
    "a trillion parameters": (
        change(CONFIG, vocab_size=10**9, text_width=2000),
        "final",
        "[1000000000, 2",
    ),
    "a billion layers": (change(CONFIG, text_layers=10**9), "final", "requires more than"),
    "numbers without end": (change(CONFIG, init_logit_scale=float("nan")), CONFIG, "must be a finite number"),
    "tokenizer cut": (cut(TOKENIZER, 500), TOKENIZER, "copy both from the trained model"),
    "tokenizer empty": (fill(TOKENIZER, b""), TOKENIZER, "empty"),
    "tokenizer of git-lfs": (fill(TOKENIZER, LFS), TOKENIZER, "git lfs pull"),
    "tokenizer deep": (fill(TOKENIZER, DEEP), TOKENIZER, "copy both"),
    "tokenizer gone": (remove(TOKENIZER), TOKENIZER, "no such file"),
    "tokenizer_config cut": (cut(TOKENIZER_CONFIG, 9), TOKENIZER_CONFIG, "copy both"),
    "tokenizer_config a list": (fill(TOKENIZER_CONFIG, b"[]"), TOKENIZER_CONFIG, "copy both"),
    "tokenizer_config of types": (
        change(TOKENIZER_CONFIG, context_length="x"),
        TOKENIZER_CONFIG,
        "copy both",
    ),
    "tokenizer_config of no kind": (change(TOKENIZER_CONFIG, type=["x"]), TOKENIZER_CONFIG, "copy both"),
    "texts without end": (
        change(TOKENIZER_CONFIG, context_length=10**12),
        "final",
        "context_length of the tokenizer must be at most 12, as in the model, got 1000000000000",
    ),
    "ids of another model": (
        change(TOKENIZER_CONFIG, vocab_size=700),
        "final",
        "eot_id of the tokenizer must be 599, eot_id of the model, got 699",
    ),
    "transform cut": (cut(TRANSFORM, 30), TRANSFORM, "not JSON"),
    "transform deep": (fill(TRANSFORM, DEEP), TRANSFORM, "nested too deep"),
    "transform of types": (change(TRANSFORM, mean=["a", "b", "c"]), TRANSFORM, "got ('a', 'b', 'c')"),
    "transform unknown": (change(TRANSFORM, rotate=3), TRANSFORM, "unknown fields ['rotate']"),
    "transform huge": (change(TRANSFORM, image_size=10**6), TRANSFORM, "must be at most 8192"),
    "transform resizes": (change(TRANSFORM, resize_size=[10**6, 3]), TRANSFORM, "must be at most 8192"),
    "transform of another model": (
        change(TRANSFORM, image_size=32),
        TRANSFORM,
        "must be 16, as in the model, got 32",
    ),
    "transform gone": (remove(TRANSFORM), TRANSFORM, "no such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_line_names_the_file(damage, trained, tmp_path, capsys):
    table, final, language = trained
    model = shutil.copytree(final, tmp_path / "final")
    break_it, file, advice = DAMAGES[damage]
    break_it(model)
    pictures = table.parent
    out = tmp_path / "out"
    common = ["--data", str(table), "--out", str(out)]
    for arguments in (
        ["embed", "--model", model, "--out", out.with_suffix(".npz"), pictures],
        ["search", "--model", model, "red", pictures],
        ["eval", "--model", model, "--data", table],
        ["caption", "--model", model, pictures / "0.png"],
        ["train", "clip", "--init", model, *common],
        ["train", "flamingo", "--vision", model, "--language-model", language, *common],
    ):
        code, err = fail(capsys, *arguments)
        assert code == 2, err
        lines = err.strip().splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("Error: ")
        assert file in lines[0]
        assert advice in lines[0]
    assert {path.name for path in tmp_path.iterdir()} <= {"final", "out"}
    assert not (out / "config.yaml").exists()


def test_the_model_itself_serves_every_command(trained, tmp_path, capsys):
    """What `test_one_line_names_the_file` breaks is whole before."""
    table, final, _ = trained
    main(["embed", "--model", str(final), "--out", str(tmp_path / "out.npz"), str(table.parent)])
    run = ["train", "clip", "--init", str(final), "--data", str(table), "--out", str(tmp_path / "run")]
    main([*run, "--max-steps", "1", "--batch-size", "8"])
    assert (tmp_path / "run" / "final" / WEIGHTS).is_file()
