"""The vlmkernels command where something is wrong around it: one line, the right status, no traceback."""

import os
import resource
import signal
import subprocess
import sys
import time

import numpy
import pytest
from PIL import Image

from tests.train_tiny import tiny_values, write_pairs, write_tar
from vlmkernels.cli import main
from vlmkernels.train import TrainConfig, train
from vlmkernels.use.embed import read_embeddings

RED = "\x1b[31mred.png"
NAMES = [RED, "new\nline.png", "\u202eback.png", "bell\x07.png", "字.png", "plain.png"]


@pytest.fixture(scope="module")
def finals(tmp_path_factory):
    """A CLIP and a SimVLM of a few steps, with their table."""
    folder = tmp_path_factory.mktemp("faults")
    table = write_pairs(folder)
    made = {
        kind: str(train(kind, TrainConfig(**tiny_values(table, folder / kind, kind, epochs=1))).final)
        for kind in ("clip", "simvlm")
    }
    return made, table


@pytest.fixture
def pictures(tmp_path):
    """Pictures with names that would write on a terminal, one of them broken, one not UTF-8."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in NAMES:
        Image.new("RGB", (8, 8), "red").save(folder / name)
    (folder / "\x1b[5mbroken.png").write_bytes(b"no image")
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return folder


def run(capsys, *arguments):
    """Status, standard output and standard error of a command."""
    status = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return status, out, err


def start(*arguments, **options):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "vlmkernels", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **{"stdout": subprocess.PIPE, **options})


def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    assert b"Traceback" not in err, err.decode()
    assert b"Exception ignored" not in err, err.decode()
    return process.returncode, out, err


@pytest.mark.parametrize(
    "device", ["cuda:7", "nonsense", "meta", "mps:3", "", "cuda:-1", "\x1b[31m", "\udcff"]
)
def test_a_device_that_cannot_be_used(finals, pictures, tmp_path, capsys, device):
    if device.startswith("cuda") and __import__("torch").cuda.device_count() > 7:
        pytest.skip("there is a device cuda:7")
    made, table = finals
    clip = ["--model", made["clip"], "--device", device]
    commands = [
        ["embed", *clip, "--out", tmp_path / "x.npz", pictures],
        ["search", *clip, "red", pictures],
        ["eval", *clip, "--data", table],
        ["caption", "--model", made["simvlm"], "--device", device, pictures],
    ]
    for command in commands:
        status, out, err = run(capsys, *command)
        assert (status, out) == (2, "")
        assert err.startswith("Error: device: ")
        assert "cannot be used here" in err
        assert err.count("\n") == 1
        assert "\x1b" not in err


@pytest.mark.parametrize(
    "out", ["folder.npz", "file/x.npz", "file/deep/x.npz", "/proc/none/x.npz", "n" * 260 + ".npz"]
)
def test_a_place_that_cannot_be_written(finals, pictures, tmp_path, capsys, out):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("in the way")
    status, printed, err = run(
        capsys, "embed", "--model", finals[0]["clip"], "--out", tmp_path / out, pictures
    )
    assert (status, printed) == (2, "")
    assert err.startswith("Error: out: ")
    assert "cannot be written" in err
    assert err.count("\n") == 1  # nothing was embedded before


def test_a_folder_that_may_not_be_written(finals, pictures, tmp_path, capsys, monkeypatch):
    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", denied)
    status, _, err = run(capsys, "embed", "--model", finals[0]["clip"], "--out", tmp_path / "x.npz", pictures)
    assert status == 2
    assert err == f"Error: out: {tmp_path / 'x.npz'} cannot be written: Permission denied\n"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_a_full_disk(finals, tmp_path, ending):
    """A limit on the size of files fails the writes that a full disk would fail."""
    texts = [f"text {i}" for i in range(100)]
    target = tmp_path / "out" / f"x.{ending}"
    process = start(
        "embed",
        *("--model", finals[0]["clip"], "--out", target, "--texts", *texts),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
    )
    status, out, err = finish(process)
    assert (status, out) == (1, b"")
    assert err.startswith(b"Error: ")
    assert b"File too large" in err
    assert list((tmp_path / "out").iterdir()) == []


def test_output_that_cannot_be_written(finals, pictures):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "wb") as full:
        search = ["search", "--no-cache", "--model", finals[0]["clip"], "red", pictures]
        status, _, err = finish(start(*search, stdout=full))
    assert status == 1
    assert b"Error: [Errno 28] No space left on device" in err


@pytest.mark.sampled(3)
@pytest.mark.parametrize("command", ["search", "eval", "info"])
def test_nobody_reads_the_output(finals, pictures, command):
    made, table = finals
    model = ["--model", made["clip"]]
    arguments = {
        "search": ["search", "--no-cache", *model, "red", pictures],
        "eval": ["eval", "--json", *model, "--data", table],
        "info": ["info"],
    }
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        status, _, _ = finish(start(*arguments[command], stdout=pipe))
    assert status == 1


def test_interrupted(finals, tmp_path):
    """The first picture is reported, the others take minutes."""
    noise = numpy.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png", compress_level=1)
    for i in range(2000):
        os.link(tmp_path / "b.png", tmp_path / f"b{i}.png")
    (tmp_path / "a.png").write_bytes(b"no image")
    out = tmp_path / "out" / "x.npz"
    process = start("embed", "--model", finals[0]["clip"], "--out", out, tmp_path)
    assert b"skipped" in process.stderr.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    status, printed, err = finish(process)
    assert (status, printed) == (130, b"")
    assert err.strip() == b""
    assert list(out.parent.iterdir()) == []


def shown(name):
    return (
        name.replace("\x1b", r"\x1b")
        .replace("\n", r"\n")
        .replace("\x07", r"\x07")
        .replace("\u202e", r"\u202e")
    )


def test_names_are_escaped_and_each_skipped_file_is_reported_once(finals, pictures, tmp_path, capsys):
    made, _ = finals
    search = ["search", "--no-cache", "-k", "99", "--model", made["clip"], "red", pictures]
    caption = ["caption", "--max-new-tokens", "3", "--model", made["simvlm"], pictures]
    embed = ["embed", "--model", made["clip"], "--out", tmp_path / f"{RED}.npz", pictures]
    for command in (search, caption, embed):
        status, out, err = run(capsys, *command)
        assert status == 0
        assert not any(sign in out + err for sign in "\x1b\x07\u202e\udce9")
        lines = err.splitlines()
        assert (
            sum(line.startswith(f"warning: skipped {pictures}/\\x1b[5mbroken.png: ") for line in lines) == 1
        )
        assert sum(line.startswith(f"warning: skipped {pictures}/caf\\udce9.png: ") for line in lines) == 1
        assert "not UTF-8" in err
        assert lines[2:] == ["2 skipped"]
        if command is not embed:
            assert len(out.splitlines()) == len(NAMES)
            assert all(f"{pictures}/{shown(name)}" in out for name in NAMES)
    assert set(read_embeddings(tmp_path / f"{RED}.npz")[1]) == {str(pictures / name) for name in NAMES}


def test_class_folders_with_names_that_would_write_on_a_terminal(finals, pictures, capsys):
    (pictures.parent / "other").mkdir()
    Image.new("RGB", (8, 8), "blue").save(pictures.parent / "other" / "b.png")
    status, out, err = run(capsys, "eval", "--model", finals[0]["clip"], "--data", pictures.parent)
    assert status == 0
    assert out.startswith(f"{len(NAMES) + 1} samples, 2 skipped\n")
    assert sum("skipped" in line for line in err.splitlines()) == 2
    assert "\x1b" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly\x1b[31m"],
        ["info", "\x1b[31mextra"],
        ["info", "--\x1b[31m"],
        ["train", "\x1b[31m"],
        ["train", "clip", "--data", "\x1b[31m"],
        ["train", "clip", "--data", "\x1b[31m.tsv"],
        ["train", "clip", "--config", "\x1b[31m"],
        ["train", "clip", "--lr", "\x1b[31m"],
        ["eval", "--model", "\x1b[31m"],
        ["embed", "--model", "x", "--out", "\x1b[31m", "x"],
        ["search", "--model", "x", "red", "\x1b[31m\udcff"],
        ["caption", "--model", "x", "x" * 5000],
    ],
)
def test_wrong_use_is_escaped(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.count("Error: ") == 1
    assert "\x1b" not in err


def test_a_text_that_is_not_unicode(finals, pictures, tmp_path, capsys):
    made, _ = finals
    commands = [
        ["search", "--no-cache", "--model", made["clip"], "caf\udce9", pictures],
        ["embed", "--model", made["clip"], "--out", tmp_path / "x.npz", "--texts", "fine", "caf\udce9"],
        ["caption", "--model", made["simvlm"], "--prompt", "caf\udce9", pictures],
    ]
    for command in commands:
        status, out, err = run(capsys, *command)
        assert (status, out) == (2, "")
        assert r"caf\udce9" in err
        assert "without lone surrogates" in err


def test_a_terminal_that_lacks_characters(finals, pictures):
    search = ["search", "--no-cache", "-k", "99", "--model", finals[0]["clip"], "red", pictures]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    status, out, _ = finish(start(*search, env=environment))
    assert status == 0
    assert rb"\u5b57.png" in out


def test_data_that_run_a_program(finals, tmp_path, capsys):
    made, table = finals
    write_tar(table, tmp_path / "a.tar")
    pipe = f"pipe:touch {tmp_path}/started; cat {tmp_path}/a.tar"
    evaluate = ["eval", "--model", made["clip"], "--data", pipe]
    training = ["train", "clip", "--data", pipe, "--samples-per-epoch", "8", "--out", tmp_path / "run"]
    for command in (evaluate, training):
        status, out, err = run(capsys, *command)
        assert (status, out) == (2, "")
        assert "--allow-pipe" in err
        assert not (tmp_path / "started").exists()
    (tmp_path / "theirs.yaml").write_text(
        f"data: '{pipe}'\nsamples_per_epoch: 8\ndata_options: {{allow_pipe: true}}\n"
    )
    status, _, err = run(
        capsys, "train", "clip", "--config", tmp_path / "theirs.yaml", "--out", tmp_path / "run"
    )
    assert status == 2
    assert "data_options must not contain allow_pipe" in err
    (tmp_path / "theirs.yaml").write_text(f"data: '{pipe}'\nallow_pipe: true\n")
    status, _, err = run(
        capsys, "train", "clip", "--config", tmp_path / "theirs.yaml", "--out", tmp_path / "run"
    )
    assert status == 2
    assert "unknown keys allow_pipe" in err
    assert not (tmp_path / "started").exists()
    status, out, _ = run(capsys, *evaluate, "--allow-pipe")
    assert status == 0
    assert out.startswith("22 samples")
    assert (tmp_path / "started").exists()
