"""What a run is resumed from: undamaged checkpoints, the same settings and inputs, and an unlocked folder."""

import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time

import filelock
import pytest
import torch

from tests.train_tiny import assert_same_run, tiny_values, write_pairs, write_tar
from tests.two_processes import FORKED
from vlmkernels.cli import main
from vlmkernels.train import TrainConfig, checkpoint, train


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def whole(table, tmp_path_factory):
    """A run with checkpoints after steps 4, 8 and 12, its last; and its values."""
    values = tiny_values(table, tmp_path_factory.mktemp("whole") / "run", save_every=4, keep=3)
    return train("clip", TrainConfig(**values)).run, values


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it, stopped after step 8 and asked to go on."""
    shutil.copytree(whole[0], tmp_path / "run", ignore=shutil.ignore_patterns("step-00000012", "final"))
    return tmp_path / "run", {**whole[1], "out": str(tmp_path / "run"), "resume": "auto"}


def flip(file, where):
    content = bytearray(file.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    file.write_bytes(content)


DAMAGE = {
    **{f"a bit at {where}": lambda f, where=where: flip(f / "state.pt", where) for where in (0, 0.3, 0.9, 1)},
    "half": lambda f: os.truncate(f / "state.pt", (f / "state.pt").stat().st_size // 2),
    "empty": lambda f: (f / "state.pt").write_bytes(b""),
    "longer": lambda f: (f / "state.pt").write_bytes((f / "state.pt").read_bytes() + b"x"),
    "absent": lambda f: (f / "state.pt").unlink(),
    "a folder": lambda f: ((f / "state.pt").unlink(), (f / "state.pt").mkdir()),
    "no checksum": lambda f: (f / "sha256sums").unlink(),
    "a bit of the checksum": lambda f: flip(f / "sha256sums", 0.1),
    "an empty folder": lambda f: [file.unlink() for file in f.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(whole, run, caplog, damage):
    run, values = run
    four, eight = checkpoint.checkpoints(run)
    DAMAGE[damage](eight)
    with caplog.at_level(logging.WARNING, "vlmkernels.train"):
        train("clip", TrainConfig(**values))
    assert str(eight) in caplog.text
    assert f"resuming the one before it, {four}" in caplog.text
    assert_same_run(whole[0], run)
    for folder in checkpoint.checkpoints(run):
        checkpoint.load(folder)


def test_a_damaged_checkpoint_asked_for_by_name_is_refused_with_the_one_before_it(run, capsys):
    run, _ = run
    four, eight = checkpoint.checkpoints(run)
    flip(eight / "state.pt", 0.5)
    with pytest.raises(SystemExit) as error:
        main(["train", "clip", "--resume", str(eight)])
    assert error.value.code == 2
    message = (
        f"Error: checkpoint: {eight / 'state.pt'} is damaged: it does not match the checksum in sha256sums"
    )
    assert capsys.readouterr().err == f"{message}; the one before it: --resume {four}\n"
    flip(four / "state.pt", 0.5)
    with pytest.raises(ValueError, match=r"is damaged: .*; there is none before it"):
        train("clip", TrainConfig(resume=str(four)))
    assert checkpoint.checkpoints(run) == [four, eight]


@pytest.fixture
def early(run):
    """A run whose checkpoints are of the version before checksums."""
    for folder in checkpoint.checkpoints(run[0]):
        state = torch.load(folder / "state.pt", weights_only=True)
        del state["course"]
        torch.save(state, folder / "state.pt")
        (folder / "sha256sums").unlink()
    return run


def test_checkpoints_of_an_earlier_version_are_resumed(whole, early, caplog):
    run, values = early
    with caplog.at_level(logging.WARNING, "vlmkernels.train"):
        train("clip", TrainConfig(**values))
    assert "step-00000008 is of an earlier version" in caplog.text
    assert_same_run(whole[0], run)


def test_checkpoints_of_an_earlier_version_keep_the_settings_of_their_run(early):
    _, values = early
    with pytest.raises(ValueError, match=r"lr was .*, got 0.5"):
        train("clip", TrainConfig(**{**values, "lr": 0.5}))


def test_a_damaged_checkpoint_of_an_earlier_version_is_named(early, caplog):
    run, values = early
    four, eight = checkpoint.checkpoints(run)
    os.truncate(eight / "state.pt", 1000)
    with caplog.at_level(logging.WARNING, "vlmkernels.train"):
        train("clip", TrainConfig(**values))
    assert f"{eight / 'state.pt'} is damaged" in caplog.text
    assert f"resuming the one before it, {four}" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(run):
    run, values = run
    lines = (run / "metrics.jsonl").read_text()
    four, eight = checkpoint.checkpoints(run)
    for folder in (four, eight):
        flip(folder / "state.pt", 0.5)
    with pytest.raises(ValueError, match=f"{eight}.* is damaged.*; .*{four}.* is damaged"):
        train("clip", TrainConfig(**values))
    assert checkpoint.checkpoints(run) == [four, eight]
    assert (run / "metrics.jsonl").read_text() == lines


def test_the_checksums_are_those_of_sha256sum(whole):
    folder = checkpoint.checkpoints(whole[0])[-1]
    assert (folder / "sha256sums").read_text() == f"{checkpoint.file_digest(folder / 'state.pt')}  state.pt\n"


def rewrite(values, table, change):
    """The same table with other lines."""
    other = table.with_name("other.tsv")
    other.write_text("\n".join(change(table.read_text().splitlines())) + "\n")
    return {**values, "data": str(other)}


def in_place(table, change):
    table.write_text("\n".join(change(table.read_text().splitlines())) + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "number of samples was 22, got 21; content of the table was sha256 "),
        (lambda lines: [lines[0], *lines[:0:-1]], "inputs differ from those of .*: content of the table was"),
        (lambda lines: [*lines[:-1], lines[-1] + "!"], "content of the table was sha256 .*, got sha256"),
    ],
    ids=["shorter", "another order", "another caption"],
)
def test_resume_refuses_other_data_under_the_same_name(run, table, tmp_path, change, message):
    run, values = run
    kept = table.read_text()
    try:
        in_place(table, change)
        with pytest.raises(ValueError, match=message):
            train("clip", TrainConfig(**values))
    finally:
        table.write_text(kept)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)] == [4, 8]


def test_resume_refuses_other_tars(table, tmp_path):
    for i in range(2):
        write_tar(table, tmp_path / f"pairs-{i}.tar")
    shards = tmp_path / "pairs-{0..1}.tar"
    values = tiny_values(shards, tmp_path / "run", samples_per_epoch=22, max_steps=4, save_every=2)
    train("clip", TrainConfig(**values))
    values |= {"resume": "auto", "max_steps": 6}
    with (tmp_path / "pairs-1.tar").open("ab") as file:
        file.write(bytes(10240))
    with pytest.raises(ValueError, match=r"differ from those of .*: tars was sha256 \w+, got sha256 \w+$"):
        train("clip", TrainConfig(**values))
    with pytest.raises(
        ValueError, match=r"data was .*, got .*; number of tars was 2, got 1; tars was|data was "
    ):
        train("clip", TrainConfig(**{**values, "data": str(tmp_path / "pairs-0.tar")}))
    write_tar(table, tmp_path / "pairs-1.tar")
    assert train("clip", TrainConfig(**values)).steps == 6


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", 4, "batch_size was 8, got 4"),
        ("augment", {}, r"augment was \{'crop_scale'.*, got \{\}"),
        ("optimizer", "sgd", "optimizer was 'adamw', got 'sgd'"),
        ("ema_decay", 0.9, "ema_decay was 0.0, got 0.9"),
        ("epochs", 9, "epochs was 4, got 9"),
    ],
)
def test_resume_refuses_other_settings_than_the_checkpoints(run, name, value, message):
    run, values = run
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").unlink()  # the checkpoint knows
    with pytest.raises(ValueError, match=f"resume: settings or inputs differ from those of {run}: {message}"):
        train("clip", TrainConfig(**{**values, name: value}))
    (run / "config.yaml").write_text(config.replace(f"{name}: ", f"{name}: 1 #"))
    with pytest.raises(ValueError, match=message):
        train("clip", TrainConfig(**{**values, name: value}))


def test_resume_refuses_another_kind_tokenizer_and_model(run):
    run, values = run
    with pytest.raises(ValueError, match=r"differ from those of .*: kind was 'clip', got 'siglip'"):
        train("siglip", TrainConfig(**values))
    options = {**values["model_options"], "text_width": 32}
    with pytest.raises(ValueError, match=r"model_options was .*, got .*'text_width': 32"):
        train("clip", TrainConfig(**{**values, "model_options": options}))
    config = json.loads((run / "tokenizer" / "tokenizer_config.json").read_text())
    (run / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**config, "more": 1}))
    with pytest.raises(ValueError, match=r"differ from those of .*: tokenizer files was sha256 "):
        train("clip", TrainConfig(**values))


def test_resume_refuses_another_model_to_start_from(whole, table, tmp_path):
    shutil.copytree(whole[0] / "final", tmp_path / "start")
    values = tiny_values(
        table, tmp_path / "run", init=str(tmp_path / "start"), model_options={}, save_every=2
    )
    train("clip", TrainConfig(**values, max_steps=2))
    file = tmp_path / "start" / "transform.json"
    transform = json.loads(file.read_text())
    file.write_text(json.dumps({**transform, "mean": [0.0, 0.0, 0.0]}))
    with pytest.raises(
        ValueError, match=r"differ from those of .*: transform was .*'mean': \[0\.0, 0\.0, 0\.0\]"
    ):
        train("clip", TrainConfig(**values, resume="auto"))


def test_damaged_lines_of_the_metrics_do_not_take_others_along(run, whole):
    run, values = run
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(
        b"".join([*lines[:2], b"\xff\x00\n", b"[]\n", *lines[2:10], lines[10][:9]])
    )
    train("clip", TrainConfig(**values))
    assert_same_run(whole[0], run)


def child(values, workers, ready):
    torch.set_num_threads(1)
    # Or its workers would be children of the server of forks, which lives on, and would not see their end
    multiprocessing.set_start_method("fork", force=True)
    if ready is not None:
        save = checkpoint.save

        def hold(*arguments):
            save(*arguments)
            ready.set()
            time.sleep(600)

        checkpoint.save = hold
    train("clip", TrainConfig(**{**values, "num_workers": workers}))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(whole, table, tmp_path, capsys, workers):
    run = tmp_path / "run"
    values = {**whole[1], "out": str(run), "resume": "auto"}
    ready = FORKED.Event()
    first = FORKED.Process(target=child, args=(values, workers, ready))
    first.start()
    try:
        assert ready.wait(120)
        held = f"another run is writing to {run} and has locked {run / 'checkpoints' / '.lock'}"
        before = sorted(run.rglob("*"))
        with pytest.raises(ValueError, match=f"out: {held}"):
            train("clip", TrainConfig(**values))
        with pytest.raises(SystemExit) as error:
            main(["train", "clip", "--out", str(run), "--resume", "auto"])
        assert error.value.code == 2
        assert capsys.readouterr().err == f"Error: out: {held}\n"
        assert sorted(run.rglob("*")) == before
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.join()
    train("clip", TrainConfig(**values))  # its workers may still live
    assert_same_run(whole[0], run)


def test_a_second_run_in_the_same_process_is_refused(run):
    run, values = run
    with (
        checkpoint.lock(run),
        pytest.raises(ValueError, match="another run is writing to"),
    ):
        train("clip", TrainConfig(**values))
    with checkpoint.lock(run):
        pass
    train("clip", TrainConfig(**values))


def test_a_run_goes_on_where_there_are_no_locks(whole, run, monkeypatch, caplog):
    def acquire(self, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    run, values = run
    train("clip", TrainConfig(**values))
    assert (
        f"{run} cannot be locked (No locks available): another run in it would not be noticed" in caplog.text
    )
    assert_same_run(whole[0], run)
