"""A student and its teacher: the terms of the loss, what is saved, and that a run resumes bit for bit."""

import itertools
import json
import random
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.test_train_kill import kill_somewhere, start
from tests.train_tiny import (
    TINY_ALIGN,
    TINY_CLIP,
    assert_same_run,
    metrics,
    tiny_values,
    weights,
    write_pairs,
)
from vlmkernels.cli import main
from vlmkernels.data import load_pairs
from vlmkernels.models.clip import CLIP, CONFIGS
from vlmkernels.train import TrainConfig, checkpoint, kinds, load_bundle, loop, train
from vlmkernels.train.config import read_config
from vlmkernels.train.teacher import Teacher
from vlmkernels.use.bundle import read_tokenizer
from vlmkernels.use.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

# Wider, with larger images and another vocabulary than the student.
TEACHER = {**TINY_CLIP, "embed_dim": 24, "image_size": 24, "vision_width": 24, "vocab_size": 700}
ALL_TERMS = {"relational_weight": 0.5, "feature_weight": 2.0, "interactive_weight": 0.25}
WAYS = {
    "kept features": {"augment": {}},
    "views of its own": ALL_TERMS,
    "its own transform, not kept": {"augment": {}, "teacher_cache": False, **ALL_TERMS},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def teacher(table, tmp_path_factory):
    values = tiny_values(table, tmp_path_factory.mktemp("teacher") / "run", model_options=TEACHER, epochs=8)
    return train("clip", TrainConfig(**values)).final


def distil(table, out, teacher, **values):
    return train("distill", TrainConfig(**tiny_values(table, out, teacher=str(teacher), **values)))


@pytest.mark.parametrize("way", WAYS)
def test_the_student_is_an_ordinary_clip(table, teacher, tmp_path, way):
    before = {file.name: file.read_bytes() for file in teacher.iterdir()}
    summary = distil(table, tmp_path / "run", teacher, ema_decay=0.5, **WAYS[way])
    bundle = load_bundle(summary.final)
    assert type(bundle.model) is CLIP
    assert kinds.of_model(bundle.model).name == "clip"
    assert bundle.model.state_dict().keys() == CLIP(bundle.model.config).state_dict().keys()
    assert (bundle.model.config.embed_dim, bundle.transform.image_size) == (16, 16)
    assert bundle.tokenizer.vocab_size == TINY_CLIP["vocab_size"]
    assert evaluate(summary.final, str(table), device="cpu").samples == 22
    again = tiny_values(table, tmp_path / "again", init=str(summary.final), max_steps=1)
    train("clip", TrainConfig(**again))
    assert {file.name: file.read_bytes() for file in teacher.iterdir()} == before
    state = checkpoint.load(checkpoint.checkpoints(summary.run)[-1])["model"]
    own = sum(value.numel() for value in bundle.model.state_dict().values())
    projections = 2 * (16 * 24 + 24) if "feature_weight" in WAYS[way] else 0
    assert sum(value.numel() for value in state.values()) == own + projections


def test_a_student_starts_from_the_weights_of_the_same_training_without_a_teacher(table, teacher, tmp_path):
    settings = {"lr": 1e-12, "max_steps": 1, "weight_decay": 0.0}
    train("clip", TrainConfig(**tiny_values(table, tmp_path / "alone", **settings)))
    distil(table, tmp_path / "taught", teacher, **settings, **ALL_TERMS)
    for name, value in weights(tmp_path / "alone").items():
        torch.testing.assert_close(weights(tmp_path / "taught")[name], value, rtol=1e-5, atol=1e-7)


def by_hand(student, teacher, distance, projected=None):
    """All terms from (images, texts, scale) of both, in the plainest form."""
    images, texts, scale = student
    their_images, their_texts, their_scale = teacher
    rows = torch.arange(len(images))
    ours, theirs = scale * images @ texts.T, their_scale * their_images @ their_texts.T
    own_images, own_texts = (F.normalize(x, dim=1) for x in projected or (images, texts))
    relational = sum(
        (b.softmax(1) * (b.log_softmax(1) - a.log_softmax(1))).sum(1).mean()
        for a, b in ((ours, theirs), (ours.T, theirs.T))
    )
    crossed = F.cross_entropy(scale * own_images @ their_texts.T, rows)
    crossed += F.cross_entropy(scale * own_texts @ their_images.T, rows)
    apart = {
        "l1": lambda x, y: (x - y).abs().sum(1),
        "l2": lambda x, y: (x - y).square().sum(1),
        "cosine": lambda x, y: 1 - F.cosine_similarity(x, y),
        "smooth_l1": lambda x, y: F.huber_loss(x, y, reduction="none").sum(1),
    }[distance]
    return {
        "contrastive": (F.cross_entropy(ours, rows) + F.cross_entropy(ours.T, rows)) / 2,
        "relational": relational / 2,
        "feature": (apart(own_images, their_images).mean() + apart(own_texts, their_texts).mean()) / 2,
        "interactive": crossed / 2,
    }


@pytest.mark.parametrize("distance", ["l1", "l2", "cosine", "smooth_l1"])
@pytest.mark.parametrize("their_scale", [None, 3.0])
def test_terms(table, teacher, distance, their_scale):
    values = tiny_values(table, "unused", teacher=str(teacher), feature_distance=distance, **ALL_TERMS)
    config, kind = TrainConfig(**values, teacher_scale=their_scale), kinds.find("distill")
    assert kind.faults(config) == []
    torch.manual_seed(0)
    tokenizer = kind.build_tokenizer(config, None)
    module = kind.trained_module(config, kind.build_model(config, tokenizer)).double()
    task = kind.build_task(config, tokenizer, 16)
    task.teacher.model.double()
    assert not task.teacher.model.training
    drawn = kind.drawn_transform(config, kind.build_transform(config))
    batch = task.collate([load_pairs(str(table), transform=drawn)[i] for i in range(5)])
    batch = {name: v.double() if "images" in name else v for name, v in batch.items()}
    assert batch["images"].shape[2:] == (16, 16)
    assert batch["teacher_images"].shape[2:] == (24, 24)
    their_tokens = read_tokenizer(teacher)(batch["texts"])
    assert batch["teacher_tokens"].equal(their_tokens)

    loss, measure = task.loss(module, batch, 0, True)
    loss.backward()
    assert all(p.grad is None for p in task.teacher.model.parameters())
    got = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    output, theirs = module(batch["images"], batch["tokens"]), load_bundle(teacher).model.double()
    taught = theirs(batch["teacher_images"], their_tokens)
    names = ("image_features", "text_features", "logit_scale")
    student, taught = [output[name] for name in names], [taught[name].detach() for name in names]
    if their_scale is not None:
        taught[2] = their_scale
    terms = by_hand(student, taught, distance, [output["projected"][name] for name in names[:2]])
    expected = terms["contrastive"] + sum(ALL_TERMS[f"{n}_weight"] * terms[n] for n in list(terms)[1:])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for name, p in module.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-8, atol=1e-12, msg=f"{name}: {{}}".format)
    shown = measure()
    for name, term in terms.items():
        assert shown[name] == pytest.approx(term.item(), rel=1e-10), name


def test_only_the_terms_that_have_a_weight_are_computed(table, teacher, tmp_path):
    distil(table, tmp_path / "run", teacher, max_steps=1, relational_weight=0, interactive_weight=1)
    (line,) = metrics(tmp_path / "run")
    assert not {"relational", "feature"} & line.keys()
    assert line["loss"] == pytest.approx(line["contrastive"] + line["interactive"])


@pytest.mark.parametrize("term", ["relational", "feature", "interactive"])
def test_learns_from_the_teacher(table, teacher, tmp_path, term):
    values = {"relational_weight": 0.0, f"{term}_weight": 10.0, "augment": {}, "epochs": 20, "lr": 1e-2}
    distil(table, tmp_path / "run", teacher, **values)
    lines = metrics(tmp_path / "run")
    first, last = (sum(line[term] for line in part) for part in (lines[:6], lines[-6:]))
    assert last < 0.8 * first


@pytest.mark.parametrize("kind", ["align", "siglip"])
def test_a_teacher_of_another_kind(table, tmp_path, kind):
    options = {**TINY_ALIGN, "embed_dim": 24, "image_projection": True} if kind == "align" else TEACHER
    taught = train(kind, TrainConfig(**tiny_values(table, tmp_path / kind, kind, model_options=options)))
    distil(table, tmp_path / "run", taught.final, **ALL_TERMS)
    assert type(load_bundle(tmp_path / "run" / "final").model) is CLIP


def test_the_teacher_does_not_drop(table, tmp_path, teacher):
    """Its features are those of evaluation mode, and the run does not change its mode."""
    seen = Teacher(teacher)
    modes = {module.training for module in seen.model.modules()}
    assert modes == {False}
    assert not any(parameter.requires_grad for parameter in seen.model.parameters())


def interrupt_at(monkeypatch, step):
    """Ctrl-C after ``step`` steps."""
    count, original = itertools.count(1), loop.Run.one_step

    def one_step(self, *arguments):
        if next(count) > step:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(loop.Run, "one_step", one_step)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache", ["left", "removed"])
def test_an_interrupted_run_resumes_bit_for_bit(table, teacher, tmp_path, monkeypatch, way, cache):
    values = {**WAYS[way], "save_every": 5, "ema_decay": 0.9}
    distil(table, tmp_path / "whole", teacher, **values)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            distil(table, tmp_path / "cut", teacher, **values)
    assert [checkpoint.step_of(c) for c in checkpoint.checkpoints(tmp_path / "cut")] == [5]
    if cache == "removed":
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    distil(table, tmp_path / "cut", teacher, **values, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_run_resumes_bit_for_bit(table, teacher, tmp_path):
    rng = random.Random(3)
    values = tiny_values(
        table, tmp_path / "whole", teacher=str(teacher), augment={}, epochs=20, save_every=4, **ALL_TERMS
    )
    whole = start("distill", values)
    whole.join()
    assert whole.exitcode == 0
    run = tmp_path / "killed"
    values = {**values, "out": str(run), "resume": "auto"}
    done = 0
    while done < 2:
        done += kill_somewhere("distill", values, run, rng)
    last = start("distill", values)
    last.join()
    assert last.exitcode == 0
    assert_same_run(tmp_path / "whole", run)
    assert not list(tmp_path.rglob(".partial-*"))


def test_a_changed_teacher_is_refused(table, teacher, tmp_path):
    changed = tmp_path / "teacher"
    shutil.copytree(teacher, changed)
    distil(table, tmp_path / "run", changed, max_steps=2)
    fields = json.loads((changed / "transform.json").read_text())
    (changed / "transform.json").write_text(json.dumps({**fields, "interpolation": "nearest"}))
    with pytest.raises(ValueError, match=r"settings or inputs differ .*files of the teacher was sha256"):
        distil(table, tmp_path / "run", changed, max_steps=3, resume="auto")


def test_faults_are_named_together(table, teacher, tmp_path, capsys):
    values = {"feature_weight": -1.0, "feature_distance": "far", "teacher_scale": 0.0}
    with pytest.raises(ValueError) as error:
        train("distill", TrainConfig(**tiny_values(table, tmp_path / "run", **values)))
    for text in (
        "teacher must be the folder of a trained clip or align or siglip (RUN/final), got None",
        "feature_weight must not be negative, got -1.0",
        "feature_distance must be one of l1, l2, cosine, smooth_l1, got 'far'",
        "teacher_scale must be positive, got 0.0",
    ):
        assert text in str(error.value)
    with pytest.raises(ValueError, match=r"one of relational_weight, .* must be positive, got 0 for all"):
        distil(table, tmp_path / "run", teacher, relational_weight=0.0)
    options = {**TINY_CLIP, "init_logit_bias": -5.0}
    with pytest.raises(ValueError, match="must make a model for distill, got one for siglip"):
        distil(table, tmp_path / "run", teacher, model_options=options)
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit) as exit:
        main(["train", "distill", "--data", str(table), "--teacher", str(tmp_path), "--out", "unused"])
    assert exit.value.code == 2
    assert "config.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="relational_weight may only be given for distill"):
        train("clip", TrainConfig(**tiny_values(table, tmp_path / "run", relational_weight=2.0)))


def test_a_teacher_that_embeds_nothing_is_refused(table, tmp_path):
    captioner = train("lm", TrainConfig(**tiny_values(table, tmp_path / "lm", "lm", max_steps=1))).final
    with pytest.raises(ValueError, match=r"teacher: .*lm.final must contain a model for .*, got one for lm"):
        distil(table, tmp_path / "run", captioner)


def parameters(options):
    sizes = kinds.find("distill").sizes(TrainConfig(model_options=options))
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in nn.Module.parameters(CLIP(sizes)))


def test_the_shipped_student_has_at_most_a_third_of_the_parameters():
    student, teacher = read_config("distill-emoji"), read_config("clip-emoji")
    assert student["data"] == teacher["data"]
    assert student["model"] == teacher["model"] == "emoji-tiny"
    assert CONFIGS["emoji-tiny"].embed_dim == 128
    assert 3 * parameters(student["model_options"]) <= parameters(teacher.get("model_options", {}))
