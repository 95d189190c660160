"""The teacher's features on disk: when they are used and made again, by several processes, after a kill."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load

from tests.test_train_kill import die_before
from tests.test_train_skips import COUNT, write_damaged
from tests.train_tiny import TINY_CLIP, assert_same_run, metrics, tiny_values, weights, write_tar
from tests.two_processes import FORKED
from vlmkernels.data import load_pairs
from vlmkernels.train import TrainConfig, feature_store, train
from vlmkernels.train.feature_store import FeatureStore, Table
from vlmkernels.train.teacher import Teacher

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHER = {**TINY_CLIP, "embed_dim": 24, "image_size": 24, "vision_width": 24, "vocab_size": 700}
TERMS = {"relational_weight": 0.5, "feature_weight": 2.0, "interactive_weight": 0.25}
needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
needs_kill = pytest.mark.skipif(sys.platform != "linux", reason="moments are counted on Linux")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vlmkernels" / "teachers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs, and a trained teacher of another width, image size and vocabulary than the student."""
    folder = tmp_path_factory.mktemp("teacher")
    write_damaged(folder)
    train("clip", TrainConfig(**tiny_values(folder / "pairs.tsv", folder / "run", model_options=TEACHER)))
    return folder


def distil(folder, out, table="pairs.tsv", **values):
    more = {"augment": {}, "teacher": str(folder / "run" / "final"), **values}
    return train("distill", TrainConfig(**tiny_values(folder / table, out, **more)))


@pytest.fixture
def encoded(monkeypatch):
    """How many samples of whole data sets teachers have encoded."""
    sizes, original = [], Teacher._encode

    def encode(self, source, *arguments):
        sizes.append(len(source))
        return original(self, source, *arguments)

    monkeypatch.setattr(Teacher, "_encode", encode)
    return sizes


def files(cache):
    return sorted(cache.glob("*.safetensors"))


def test_features_are_computed_once(folder, tmp_path, cache, encoded, monkeypatch):
    distil(folder, tmp_path / "first")
    assert encoded == [COUNT]
    (file,) = files(cache)
    monkeypatch.setattr(Teacher, "_encode", None)
    distil(folder, tmp_path / "second")
    assert files(cache) == [file]
    assert_same_run(tmp_path / "first", tmp_path / "second")


def test_kept_features_are_those_of_every_batch(folder, tmp_path):
    distil(folder, tmp_path / "kept", **TERMS)
    distil(folder, tmp_path / "encoded", teacher_cache=False, **TERMS)
    for a, b in zip(metrics(tmp_path / "kept"), metrics(tmp_path / "encoded"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize(
    "values",
    [{"augment": {"flip": 0.5}}, {"teacher_cache": False}, {"table": "0.tar", "samples_per_epoch": 8}],
    ids=["augmented", "not wanted", "tars"],
)
def test_nothing_is_kept(folder, tmp_path, cache, encoded, values):
    write_tar(folder / "pairs.tsv", folder / "0.tar")
    distil(folder, tmp_path / "run", max_steps=2, **values)
    assert encoded == []
    assert not cache.exists()


def test_other_data_weights_transforms_and_seeds_have_other_features(folder, tmp_path, cache, encoded):
    def made(values=None, at=folder):
        before = len(encoded)
        distil(at, tmp_path / "run", **{"max_steps": 1, **(values or {})})
        shutil.rmtree(tmp_path / "run")
        return len(encoded) - before

    assert [made(), made(), made({"lr": 1e-4}), made({"seed": 1})] == [1, 0, 0, 1]
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert [made(at=other), made(at=other)] == [1, 0]  # images of the same names in another folder
    Image.new("RGB", (16, 16), "red").save(other / "3.png")
    assert [made(at=other), made(at=other)] == [1, 0]
    transform = other / "run" / "final" / "transform.json"
    transform.write_text(json.dumps({**json.loads(transform.read_text()), "interpolation": "nearest"}))
    assert [made(at=other), made(at=other)] == [1, 0]
    trained = tmp_path / "trained"
    again = tiny_values(folder / "pairs.tsv", trained, init=str(folder / "run" / "final"), max_steps=1)
    train("clip", TrainConfig(**again))
    shutil.copy(trained / "final" / "model.safetensors", other / "run" / "final")
    assert [made(at=other), made(at=other)] == [1, 0]
    lines = (other / "pairs.tsv").read_text().splitlines()
    (other / "pairs.tsv").write_text("\n".join([*lines[:-1], lines[-1] + " and more"]) + "\n")
    assert [made(at=other), made(at=other)] == [1, 0]
    assert len(files(cache)) == len(encoded) == 7


def flip(file, where):
    content = bytearray(file.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def exchange(file):
    """The features of another identity under this name."""
    feature_store.write(file, "another", example())


DAMAGE = {
    **{f"a bit at {where}": lambda f, where=where: flip(f, where) for where in (0, 0.02, 0.3, 0.9, 1)},
    "half": lambda f: os.truncate(f, f.stat().st_size // 2),
    "empty": lambda f: f.write_bytes(b""),
    "another file": lambda f: f.write_text("features"),
    "a folder": lambda f: (f.unlink(), f.mkdir(), (f / "file").touch()),
    "those of others": exchange,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_foreign_features_are_made_again(folder, tmp_path, cache, encoded, caplog, damage):
    distil(folder, tmp_path / "first", max_steps=3)
    (file,) = files(cache)
    whole = load(file.read_bytes())
    DAMAGE[damage](file)
    with caplog.at_level(logging.WARNING, "vlmkernels.train"):
        distil(folder, tmp_path / "second", max_steps=3)
    assert f"the features in {file} are computed again" in caplog.text
    assert encoded == [COUNT, COUNT]
    assert_same_run(tmp_path / "first", tmp_path / "second")
    if damage == "a folder":
        assert "the teacher's features are not kept" in caplog.text
    else:
        again = load(file.read_bytes())
        assert again.keys() == whole.keys()
        assert all(again[name].equal(whole[name]) for name in whole)


@pytest.mark.parametrize("place", ["/dev/null/cache", "", "a full disk"])
def test_a_cache_that_cannot_be_written_costs_time_only(folder, tmp_path, monkeypatch, caplog, place):
    distil(folder, tmp_path / "first", max_steps=3)
    if place == "a full disk":

        def save_tensors(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
        monkeypatch.setattr(feature_store, "save_tensors", save_tensors)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        monkeypatch.setenv("HOME", "relative")
    with caplog.at_level(logging.WARNING, "vlmkernels.train"):
        distil(folder, tmp_path / "second", max_steps=3)
    assert "the teacher's features are not kept" in caplog.text
    assert_same_run(tmp_path / "first", tmp_path / "second")


def test_texts_of_later_epochs_are_encoded_when_they_occur(folder, cache):
    teacher, settings = Teacher(folder / "run" / "final"), {"seed": 0}
    source = load_pairs("emoji3:style-test", caption="label_tags", transform=teacher.transform)
    source.concept_ids = source.concept_ids[:40]
    source.styles = source.styles[:40]
    teacher.prepare(source, torch.device("cpu"), settings, 0)
    source.set_epoch(1)
    samples = [source[i] for i in range(40)]
    texts = [sample["text"] for sample in samples]
    _, unknown = teacher.store.texts.find(texts)
    assert 0 < len(unknown) < 40
    tokens = teacher.tokenizer(texts)
    found = teacher({"keys": [s["key"] for s in samples], "texts": texts, "teacher_tokens": tokens})
    images = torch.stack([sample["image"] for sample in samples])
    with torch.no_grad():
        expected = teacher.model(images, tokens)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


def test_an_image_that_was_broken_when_the_data_were_encoded_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pairs")
    source = load_pairs(str(tmp_path / "pairs" / "damaged.tsv"))
    teacher = Teacher(folder / "run" / "final")
    teacher.prepare(source, torch.device("cpu"), {}, 0)
    key = next(iter(source.skipped))
    batch = {"keys": ["1.png", key], "texts": ["a", "b"], "teacher_tokens": teacher.tokenizer(["a", "b"])}
    with pytest.raises(ValueError, match=rf"teacher: {key} could not be read .* remove {teacher.place}"):
        teacher(batch)


def test_broken_images_are_reported_once(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        distil(folder, tmp_path / "run", "damaged.tsv", epochs=2)
    said = [record.getMessage() for record in caplog.records if "skipped broken" in record.getMessage()]
    assert len(said) == len(set(said)) > 0


def example():
    draw = torch.Generator().manual_seed(0)
    images, texts = ({f"{i}": row for i, row in enumerate(torch.randn(50, 8, generator=draw))} for _ in "it")
    return FeatureStore(Table.of(images), Table.of(texts), torch.tensor(7.0))


def test_a_store_is_what_was_put_in(tmp_path):
    store, file = example(), tmp_path / "features.safetensors"
    feature_store.write(file, "own", store)
    found = feature_store.read(file, "own")
    for name, tensor in store.tensors().items():
        assert found.tensors()[name].equal(tensor)
    rows, unknown = found.images.find(["3", "x", "\udcff", "3", "0"])
    assert unknown == [1, 2]
    assert rows[[0, 3, 4]].equal(store.images.features[[3, 3, 0]])
    rows.zero_()
    assert found.images.find(["3"])[0].equal(store.images.features[3:4])
    assert found.images.find([])[0].shape == (0, 8)
    file.write_bytes(b"")  # the file is read whole, and may change
    assert found.texts.features.equal(store.texts.features)


def make_in_turn(file, log):
    """Find or make a store; whether it was made is written to a log."""

    def make():
        with log.open("a") as out:
            out.write("made\n")
        return example()

    assert feature_store.find_or_make(file, "own", make).scale == 7


def test_of_several_processes_one_computes(tmp_path):
    file, log = tmp_path / "cache" / "features.safetensors", tmp_path / "log"
    processes = [FORKED.Process(target=make_in_turn, args=(file, log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert log.read_text() == "made\n"


def make_and_die(file, moment):
    die_before(moment, str(file.parent))
    feature_store.find_or_make(file, "own", example)


@needs_kill
def test_a_kill_at_any_moment_leaves_no_or_whole_features(tmp_path):
    fork = multiprocessing.get_context("fork")
    seen = set()
    for moment in range(1, 100):
        file = tmp_path / str(moment) / "features.safetensors"
        process = fork.Process(target=make_and_die, args=(file, moment))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        seen.add(file.exists())
        if file.exists():
            assert feature_store.read(file, "own") is not None
        assert feature_store.find_or_make(file, "own", example).scale == 7
        assert sorted(path.suffix for path in file.parent.iterdir()) == [".lock", ".safetensors"]
        if process.exitcode == 0:
            break
    assert moment > 3
    assert seen == {False, True}


WAYS = {"kept": {"augment": {}}, "views": {"augment": {"crop_scale": [0.5, 1.0]}}}


def run_values(folder, out, way):
    """Joint batches of 7, 7, 7 and 2, of which some are empty on a process, with plain SGD."""
    plain = {"batch_size": 7, "epochs": 2, "optimizer": "sgd", "lr": 0.05, "device": "cpu"}
    return {"table": "damaged.tsv", **plain, **TERMS, **WAYS[way]}


def worker(rank, folder, out):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    for way in WAYS:
        distil(folder, out / f"two-{way}", **run_values(folder, out, way))
    dist.destroy_process_group()


@needs_gloo
def test_two_processes_train_as_one(folder, tmp_path, cache):
    torch.multiprocessing.spawn(worker, (folder, tmp_path), nprocs=2)  # whose output is captured
    assert len(files(cache)) == 1
    shutil.rmtree(cache)
    for way in WAYS:
        distil(folder, tmp_path / f"one-{way}", **run_values(folder, tmp_path, way))
        one, two = metrics(tmp_path / f"one-{way}"), metrics(tmp_path / f"two-{way}")
        assert [line["step"] for line in two] == [line["step"] for line in one] == [1, 2, 4, 5, 6, 7, 8]
        for a, b in zip(one, two, strict=True):
            assert b == pytest.approx(a, rel=1e-4)
        expected = weights(tmp_path / f"one-{way}")
        for name, value in weights(tmp_path / f"two-{way}").items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
