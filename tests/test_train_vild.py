"""Training ViLD: variants, proposals, resuming, evaluation, the commands; on small composites."""

import json
import os

import pytest
import torch
import torch.distributed as dist

from tests.train_tiny import (
    TINY,
    assert_same_run,
    metrics,
    per_sample_norm,
    tiny_values,
    weights,
    write_pairs,
)
from tests.two_processes import run_two
from vlmkernels.cli import main
from vlmkernels.data import load_pairs
from vlmkernels.data.composites import load_composites
from vlmkernels.data.proposals import Proposals
from vlmkernels.models.detector import Detections
from vlmkernels.train import TrainConfig, kinds, load_bundle, objective, train
from vlmkernels.train.config import read_config
from vlmkernels.use.detect import detect, propose
from vlmkernels.use.detection_scores import evaluate_detection
from vlmkernels.use.evaluate import evaluate

DATA = {"size": 6, "image_size": 64, "objects": 5}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    table = write_pairs(folder)
    return str(train("clip", TrainConfig(**tiny_values(table, folder / "run", max_steps=1))).final)


def values(clip, out, **more):
    common = {"data": "composites", "data_options": DATA, "augment": {}, "epochs": 2, "batch_size": 4}
    sizes = {**TINY["vild"], **more.pop("model_options", {})}
    return tiny_values(None, out, "vild", **{**common, "clip": clip, "model_options": sizes, **more})


@pytest.fixture(scope="module")
def final(clip, tmp_path_factory):
    """A model of the variant text, hardly trained."""
    out = tmp_path_factory.mktemp("run") / "run"
    return train("vild", TrainConfig(**values(clip, out, model_options={"variant": "text"}))).final


@pytest.fixture(scope="module")
def proposals(final, tmp_path_factory):
    path = tmp_path_factory.mktemp("proposals") / "proposals.safetensors"
    data = load_composites(**DATA)
    done = propose(final, data, path, most=5)
    assert (done.images, done.proposals) == (6, 30)
    found = Proposals(path)
    assert list(found) == [data[i]["key"] for i in range(6)]
    boxes, embeddings = found["composites/0/train/2"]
    assert embeddings.shape == (5, TINY["clip"]["embed_dim"])
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    return str(path)


def test_the_model_contains_its_teacher(clip, final):
    bundle, teacher = load_bundle(final), load_bundle(clip).model.state_dict()
    assert bundle.model.config.base == load_composites(**DATA).base
    inside = bundle.model.teacher.state_dict()
    assert all(inside[name].equal(value) for name, value in teacher.items())
    assert bundle.transform.image_size == TINY["clip"]["image_size"]


def test_a_run_resumes_bit_for_bit(clip, proposals, tmp_path):
    runs = {name: values(clip, tmp_path / name, proposals=proposals) for name in ("whole", "cut")}
    train("vild", TrainConfig(**runs["whole"]))
    train("vild", TrainConfig(**runs["cut"], max_steps=1))
    summary = train("vild", TrainConfig(**runs["cut"], resume="auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert summary.scores.keys() == {"class_loss", "box_loss"}
    for line in metrics(tmp_path / "whole"):
        parts = [value for name, value in line.items() if name.endswith("_loss")]
        assert line["loss"] == pytest.approx(sum(parts))
        assert line["distillation_loss"] > 0


@pytest.mark.parametrize("first", [1, 4])
def test_the_losses_of_the_parts_of_a_batch_add_up(clip, proposals, tmp_path, monkeypatch, first):
    """As on two processes, the second of which may have no samples; norms by their running statistics."""
    config = TrainConfig(**values(clip, tmp_path, proposals=proposals, prompt="a {}|{}"))
    kind = kinds.find("vild")
    tokenizer = kind.build_tokenizer(config, None)
    model, task = kind.build_model(config, tokenizer).eval(), kind.build_task(config, tokenizer)
    source = load_composites(**DATA, transform=kind.drawn_transform(config, None))
    task.prepare(source, torch.device("cpu"))
    samples, totals = [source[i] for i in range(4)], []
    monkeypatch.setattr(objective, "sum_over_processes", lambda value: totals.append(value) or value)
    whole, _ = task.loss(model, task.collate(samples), 3, False)
    monkeypatch.setattr(objective, "process_count", lambda: 2)
    parts = []
    for part in (samples[:first], samples[first:]):
        known = iter(totals)
        monkeypatch.setattr(objective, "sum_over_processes", lambda value, known=known: next(known))
        parts.append(task.loss(model, task.collate(part), 3, False)[0])
    assert (parts[1] == 0) == (first == 4)
    assert (sum(parts) / 2).item() == pytest.approx(whole.item(), rel=1e-5)


def uneven(clip, proposals, out):
    """7 pictures in joint batches of 5 and 2, with plain SGD."""
    data = {**DATA, "size": 7}
    options = {"data_options": data, "batch_size": 5, "epochs": 1, "device": "cpu"}
    return values(clip, out, proposals=proposals, optimizer="sgd", lr=0.01, **options)


def worker(rank, folder, clip, proposals):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with per_sample_norm():
        train("vild", TrainConfig(**uneven(clip, proposals, f"{folder}/two")))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_training_on_two_processes_is_training_on_one(clip, final, tmp_path):
    """Norms take statistics of each picture alone: torch has no SyncBatchNorm on the CPU."""
    proposals = str(tmp_path / "proposals.safetensors")
    propose(final, load_composites(**{**DATA, "size": 7}), proposals, most=5)
    run_two(worker, (str(tmp_path), clip, proposals))
    with per_sample_norm():
        train("vild", TrainConfig(**uneven(clip, proposals, tmp_path / "one")))
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["step"] for line in two] == [1, 2]
    for name in one[0]:
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4), name
    expected = weights(tmp_path / "one")
    for name, value in weights(tmp_path / "two").items():
        if "num_batches_tracked" not in name:
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_an_align_teaches(tmp_path):
    table = write_pairs(tmp_path)
    align = str(train("align", TrainConfig(**tiny_values(table, tmp_path / "a", "align", max_steps=1))).final)
    options = {"model_options": {"variant": "text"}, "max_steps": 1}
    final = train("vild", TrainConfig(**values(align, tmp_path / "run", **options))).final
    bundle, teacher = load_bundle(final), load_bundle(align).model
    assert bundle.model.config.teacher == teacher.config
    inside = bundle.model.teacher.state_dict()
    assert all(inside[name].equal(value) for name, value in teacher.state_dict().items())
    data = load_composites(**{**DATA, "size": 2})
    propose(final, data, tmp_path / "proposals.safetensors", most=3)
    assert Proposals(tmp_path / "proposals.safetensors").width == teacher.config.embed_dim
    data.picture(0)[0].to_pil().save(tmp_path / "seen.png")
    (found,) = detect(final, [tmp_path / "seen.png"], ["fox", "purple owl"], threshold=0).objects.values()
    assert {each.category for each in found} <= {"fox", "purple owl"}


def test_evaluation_and_commands(final, tmp_path, capsys):
    scores = evaluate(final, load_composites("test", **DATA))
    assert scores.samples == 6
    assert scores.classes["all"] == scores.classes["base"] + scores.classes.get("novel", 0)
    assert "box, base" in str(scores)
    data = load_composites("test", **DATA)
    for index in range(2):
        data.picture(index)[0].to_pil().save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    arguments = ["detect", "--model", str(final), "--categories", "fox, purple owl", "--threshold", "0"]
    arguments += ["--out", str(tmp_path / "out"), str(tmp_path)]
    main(arguments)
    captured = capsys.readouterr()
    assert "1 skipped" in captured.err
    assert "purple owl" in captured.out or "fox" in captured.out
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(rows) == 2
    assert {each["category"] for objects in rows.values() for each in objects} <= {"fox", "purple owl"}
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_scores_of_known_detections():
    """Perfect boxes for base classes, none for novel ones, one wrong class."""
    data = load_composites("test", **DATA)
    known = {}
    for index in range(len(data)):
        picture, _ = data.picture(index)
        known[id_of(picture.image)] = picture

    def detect(image):
        picture = known[id_of(image)]
        base = picture.labels <= len(data.base)
        count = int(base.sum())
        return Detections(
            picture.boxes[base], torch.ones(count), picture.labels[base] - 1, picture.masks[base].float()
        )

    scores = evaluate_detection(detect, data)
    assert scores.box["base"] == {"AP": pytest.approx(1), "AP50": pytest.approx(1)}
    assert scores.mask["base"]["AP"] == pytest.approx(1)
    assert scores.box.get("novel", {"AP": 0.0})["AP"] == 0
    objects = [label for picture in known.values() for label in picture.labels.tolist()]
    assert scores.objects == len(objects)
    share = sum(label <= len(data.base) for label in objects) / len(objects)
    assert scores.proposed == pytest.approx(share)


@pytest.mark.slow
def test_it_finds_what_it_was_trained_on(clip, tmp_path):
    """Objects of base classes in its own training pictures; a novel class has no boxes there."""
    data = {"size": 24, "image_size": 64, "objects": 5}
    detector = {**TINY["vild"]["detector"], "conv_width": 8, "width": 16, "detections": 10}
    detector |= {"rpn_samples": 64, "box_samples": 32, "box_positive": 0.5}
    common = {"data_options": data, "epochs": 60, "batch_size": 6, "lr": 5e-3, "weight_decay": 0.01}
    common["model_options"] = {"variant": "text", "detector": detector}
    common["augment"] = {"scales": [1.0, 1.0], "flip": False}
    done = train("vild", TrainConfig(**values(clip, tmp_path / "run", **common)))
    scores = evaluate(done.final, load_composites(**data))
    assert scores.box["base"]["AP50"] > 0.4, scores
    assert scores.mask["base"]["AP50"] > 0.3, scores


def id_of(image):
    return float((image * torch.linspace(0, 1, image.numel()).view_as(image)).sum())


def test_proposals_are_of_the_pictures_of_every_seed():
    """Those that `propose --data composites:train` reads."""
    config = read_config("vild-composites")
    sources = [load_pairs(config["data"], **{"seed": seed, **config["data_options"]}) for seed in range(3)]
    assert {source[0]["key"] for source in sources} == {load_pairs("composites:train")[0]["key"]}


def test_other_kinds_refuse_boxes(clip, tmp_path):
    config = TrainConfig(**tiny_values("composites", tmp_path, data_options=DATA))
    with pytest.raises(ValueError, match="data: clip needs images with texts, got Composites"):
        train("clip", config)
    with pytest.raises(ValueError, match="data: clip needs images with texts"):
        evaluate(clip, "composites:test")


def test_errors_name_the_setting(clip, final, proposals, tmp_path):
    def message(**more):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            train("vild", TrainConfig(**values(**{"clip": clip, "out": tmp_path / "run", **more})))
        return str(error.value)

    assert "clip must be the folder of a trained CLIP" in message(clip=None)
    assert "must be of type clip" in message(clip=str(final))
    assert "proposals must be a file of vlmkernels propose for the variant vild" in message()
    other = message(proposals=proposals, data_options={**DATA, "seed": 1})
    assert "has none of composites/1/train/" in other
    assert "these are other pictures" in other
    text = {"model_options": {"variant": "text"}}
    assert "proposals must not be given for the variant text" in message(proposals=proposals, **text)
    found = message(prompt="a photo|{}", augment={"crop_scale": [1, 1]}, **text)
    assert "prompt must have a {}" in found
    assert "augment of vild must have scales and flip, got crop_scale" in found
    assert "vild needs images with boxes" in message(data="scenes", data_options={}, **text)
    with pytest.raises(ValueError, match="data: vild needs images with boxes"):
        evaluate(final, "scenes:test")
