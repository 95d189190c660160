"""Training on images of which some cannot be read: batches shrink, on some processes to nothing.

Two processes (gloo, CPU) then do what one does, and a run that is resumed what one does that was not stopped.
Batch normalisation takes statistics of each sample alone, as torch has no SyncBatchNorm on the CPU.
"""

import itertools
import logging
import math
import os
import tarfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from tests.train_tiny import (
    assert_same_run,
    metrics,
    per_sample_norm,
    tiny_values,
    train_parts,
    weights,
    write_pairs,
    write_tar,
)
from tests.two_processes import run_two
from vlmkernels.train import TrainConfig, objective, train
from vlmkernels.train.batches import BatchPlan

KINDS = ("clip", "align", "siglip", "lm", "flamingo", "simvlm", "virtex")
COUNT, BATCH = 23, 7

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def broken_samples():
    """What the second of two processes sees in step 1, and what both see in step 3."""
    second = list(BatchPlan(COUNT, BATCH, seed=0, rank=1, world_size=2).batches(0))
    both = list(BatchPlan(COUNT, BATCH, seed=0).batches(0))
    return sorted({*second[0], *both[2]})


def write_damaged(folder):
    """A table whose pictures are whole, and one of which some are no images."""
    whole = write_pairs(folder, COUNT)
    damaged = folder / "damaged.tsv"
    lines = whole.read_text().splitlines()
    for i in broken_samples():
        Path(folder, f"broken{i}.png").write_bytes(b"no image")
        lines[i + 1] = lines[i + 1].replace(f"{i}.png", f"broken{i}.png")
    damaged.write_text("\n".join(lines) + "\n")
    return whole, damaged


def run_values(table, out, kind, parts, **values):
    """Joint batches of 7, 7, 7 and 2 with plain SGD, twice."""
    own = parts if kind == "flamingo" else {}
    plain = {"batch_size": BATCH, "epochs": 2, "optimizer": "sgd", "lr": 0.05, "device": "cpu"}
    return tiny_values(table, out, kind, **plain, **own, **values)


def worker(rank, folder, table, parts, tars):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with per_sample_norm():
        for kind in KINDS:
            train(kind, TrainConfig(**run_values(table, f"{folder}/two-{kind}", kind, parts)))
    values = tiny_values(tars, f"{folder}/tars", batch_size=4, epochs=1, samples_per_epoch=8, device="cpu")
    train("clip", TrainConfig(**values))
    values = tiny_values(f"{folder}/none.tsv", f"{folder}/none", batch_size=4, device="cpu")
    with pytest.raises(ValueError, match="data: no sample can be read, 8 were skipped"):
        train("clip", TrainConfig(**values))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skips")
    whole, damaged = write_damaged(folder)
    parts = train_parts(whole, folder / "parts", lm_epochs=3)
    write_tar(whole, folder / "0.tar")
    (folder / "1.tar").write_bytes(b"no tar" * 500)
    (folder / "none.tsv").write_text(
        "filepath\ttitle\n" + "".join(f"absent{i}.png\ttext\n" for i in range(8))
    )
    return folder, damaged, parts


@pytest.fixture(scope="module")
def pair_of_runs(setup):
    folder, damaged, parts = setup
    arguments = (str(folder), str(damaged), parts, str(folder / "{0..1}.tar"))
    run_two(worker, arguments)
    with per_sample_norm():
        for kind in KINDS:
            train(kind, TrainConfig(**run_values(damaged, folder / f"one-{kind}", kind, parts)))
    return folder


@needs_gloo
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_of_which_one_has_an_empty_batch_train_as_one(pair_of_runs, kind):
    one, two = metrics(pair_of_runs / f"one-{kind}"), metrics(pair_of_runs / f"two-{kind}")
    steps = [line["step"] for line in one]
    assert [line["step"] for line in two] == steps
    assert 3 not in steps
    assert steps[:2] + steps[-1:] == [1, 2, 8]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4), name
    expected = weights(pair_of_runs / f"one-{kind}")
    for name, value in weights(pair_of_runs / f"two-{kind}").items():
        assert value.isfinite().all(), name
        if "num_batches_tracked" not in name:
            torch.testing.assert_close(
                value, expected[name], rtol=1e-3, atol=1e-5, msg=f"{name}: {{}}".format
            )


@needs_gloo
def test_a_process_whose_shards_are_damaged_joins_every_step(pair_of_runs):
    assert [line["step"] for line in metrics(pair_of_runs / "tars")] == [1, 2]
    assert all(value.isfinite().all() for value in weights(pair_of_runs / "tars").values())


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_with_broken_images_resumes_bit_for_bit(setup, tmp_path, step):
    _, damaged, parts = setup
    values = {"augment": {"crop_scale": [0.5, 1.0]}, "save_every": 1, "keep": 9, "optimizer": "adamw"}
    common = {**run_values(damaged, "", "clip", parts), **values}
    train("clip", TrainConfig(**{**common, "out": str(tmp_path / "whole")}))
    stopped = {**common, "out": str(tmp_path / "resumed")}
    train("clip", TrainConfig(**{**stopped, "max_steps": step}))
    train("clip", TrainConfig(**{**stopped, "resume": "auto"}))
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_tars_resume_bit_for_bit(setup, tmp_path, workers):
    folder, _, _ = setup
    content = bytearray((folder / "0.tar").read_bytes())
    with tarfile.open(folder / "0.tar") as tar:
        third = tar.getmembers()[4]
    content[third.offset_data : third.offset_data + 3] = b"not"
    (folder / "damaged.tar").write_bytes(content)
    tars = f"{folder}/0.tar::{folder}/damaged.tar::{folder}/1.tar"
    common = tiny_values(tars, tmp_path / "whole", samples_per_epoch=24, epochs=2, num_workers=workers)
    train("clip", TrainConfig(**common))
    stopped = {**common, "out": str(tmp_path / "resumed"), "save_every": 1}
    train("clip", TrainConfig(**stopped, max_steps=4))
    train("clip", TrainConfig(**stopped, resume="auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_a_step_without_any_sample_changes_nothing(setup, tmp_path):
    _, damaged, parts = setup
    values = run_values(damaged, tmp_path, "clip", parts, save_every=1, max_steps=3)
    values["keep"] = 9
    train("clip", TrainConfig(**values))
    states = [
        torch.load(tmp_path / "checkpoints" / f"step-{step:08d}" / "state.pt", weights_only=True)
        for step in (1, 2, 3)
    ]
    changed = [
        any(not a["model"][name].equal(b["model"][name]) for name in a["model"])
        for a, b in itertools.pairwise(states)
    ]
    assert changed == [True, False]


def test_a_loss_that_is_not_finite_is_named_by_its_step(setup, tmp_path, monkeypatch):
    """Of which step 3, without samples, is one."""
    _, damaged, parts = setup
    losses = iter((1.0, 1.0, math.nan))
    original = objective.contrastive_loss
    monkeypatch.setattr(objective, "contrastive_loss", lambda *a, **k: original(*a, **k) * next(losses))
    with pytest.raises(FloatingPointError, match="at step 4"):
        train("clip", TrainConfig(**run_values(damaged, tmp_path, "clip", parts)))


def test_skipped_samples_are_named_once_and_counted(setup, tmp_path, caplog):
    _, damaged, parts = setup
    with caplog.at_level(logging.WARNING):
        train("clip", TrainConfig(**run_values(damaged, tmp_path, "clip", parts)))
    lines = [record.getMessage() for record in caplog.records]
    count = len(broken_samples())
    assert sum(line.startswith("skipped ") for line in lines) == count
    assert sum(line.startswith(f"{count} samples were skipped: ") for line in lines) == 1


def test_data_without_any_readable_sample_is_an_error(setup, tmp_path):
    folder, _, parts = setup
    for values in ({}, {"max_steps": 1}):
        with pytest.raises(ValueError, match=r"data: no sample can be read, .* first .'absent"):
            train(
                "clip",
                TrainConfig(**run_values(folder / "none.tsv", tmp_path / "x", "clip", parts, **values)),
            )


def test_no_configuration_lets_data_run_a_program(setup, tmp_path):
    folder, _, parts = setup
    pipe = f"pipe:touch {tmp_path}/started; cat {folder}/0.tar"
    values = run_values(pipe, tmp_path / "run", "clip", parts, samples_per_epoch=8, max_steps=1)
    with pytest.raises(ValueError, match="a program would be run"):
        train("clip", TrainConfig(**values))
    with pytest.raises(ValueError, match="data_options must not contain allow_pipe"):
        TrainConfig(**values, data_options={"allow_pipe": True})
    assert not (tmp_path / "started").exists()
    assert train("clip", TrainConfig(**values), allow_pipe=True).steps == 1
    assert (tmp_path / "started").exists()
    assert "allow_pipe" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    with pytest.raises(ValueError, match="a program would be run"):
        train("clip", TrainConfig(**{**values, "max_steps": 2, "resume": "auto"}))
