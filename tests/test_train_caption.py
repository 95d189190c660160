"""Training of models that write captions: learning, bit-for-bit repeats and resumes, what stays frozen."""

import itertools
import math
import re

import pytest
import torch

from tests.train_tiny import (
    TINY,
    assert_same_run,
    metrics,
    tiny_values,
    train_parts,
    weights,
    write_pairs,
    write_tar,
)
from vlmkernels.data import CaptionTokenizer
from vlmkernels.models.clip import CLIP
from vlmkernels.models.decoder import IGNORE
from vlmkernels.train import TrainConfig, kinds, load_bundle, loop, train
from vlmkernels.train.kinds.simvlm import prefix_labels, prefix_lengths

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("lm", "flamingo", "simvlm", "virtex")
DIRECTIONS = {"virtex": 2}  # whose mean losses are summed


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def parts(table, tmp_path_factory):
    return train_parts(table, tmp_path_factory.mktemp("parts"))


@pytest.fixture
def values(table, tmp_path, parts):
    """Values of a TrainConfig of any kind: values(kind, name of the run, ...)."""

    def make(kind, name="run", **more):
        own = parts if kind == "flamingo" else {}
        return {**tiny_values(table, tmp_path / name, kind), **own, **more}

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_learns_the_captions(values, tmp_path, kind):
    epochs = {"lm": 20, "flamingo": 40, "simvlm": 20, "virtex": 20}[kind]
    summary = train(kind, TrainConfig(**values(kind, epochs=epochs, augment={}, lr=2e-2)))
    lines = metrics(tmp_path / "run")
    share = 0.9 if kind == "flamingo" else 0.5  # a Flamingo starts from a language model that has learned
    assert sum(line["loss"] for line in lines[-6:]) < share * sum(line["loss"] for line in lines[:6])
    if kind != "flamingo":
        assert lines[-1]["token_accuracy"] > lines[0]["token_accuracy"] + 0.1
    for line in lines:
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"] / DIRECTIONS.get(kind, 1)))
    assert summary.scores == {name: lines[-1][name] for name in ("perplexity", "token_accuracy")}
    assert "retrieval_at_1" not in lines[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_run_resumes_bit_for_bit(values, tmp_path, monkeypatch, kind):
    """Random prefixes of simvlm, dropout, the contrastive term of lm and virtex' slow weights included."""
    options = {"simvlm": {"form": "prefix_lm", "dropout": 0.1}, "virtex": {"dropout": 0.1}}.get(kind, {})
    common = {"model_options": {**TINY[kind], **options}}
    if kind == "lm":
        common |= {"ema_decay": 0.9, "contrastive_weight": 1.0}
    if kind == "virtex":
        common |= {"trunk_lr": 0.01, "lookahead_steps": 3, "augment": {"flip": 0.5, "caption_flip": True}}
    train(kind, TrainConfig(**values(kind, "whole", **common)))
    train(kind, TrainConfig(**values(kind, "again", **common, num_workers=1)))
    assert_same_run(tmp_path / "whole", tmp_path / "again")
    count, original = itertools.count(1), loop.Run.one_step

    def one_step(self, *arguments):
        if next(count) > 5:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "one_step", one_step)
        with pytest.raises(KeyboardInterrupt):
            train(kind, TrainConfig(**values(kind, "cut", **common, save_every=2)))
    train(kind, TrainConfig(**values(kind, "cut", **common, save_every=2, resume="auto")))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    train(kind, TrainConfig(**values(kind, "other", **common, seed=1)))
    assert metrics(tmp_path / "other") != metrics(tmp_path / "whole")


def test_flamingo_trains_resampler_and_gated_layers_only(values, tmp_path, parts):
    train("flamingo", TrainConfig(**values("flamingo", weight_decay=0.5)))
    trained = weights(tmp_path / "run")
    tower = load_bundle(parts["vision"]).model.visual.state_dict()
    vision = {f"vision_encoder.{name}": value for name, value in tower.items()}
    language = load_bundle(parts["language_model"]).model.state_dict()
    tokenizer = load_bundle(tmp_path / "run" / "final").tokenizer
    assert isinstance(tokenizer, CaptionTokenizer)
    rows = [tokenizer.image_id, tokenizer.endofchunk_id]
    others = [i for i in range(tokenizer.vocab_size) if i not in rows]
    assert all(trained[name].equal(value) for name, value in vision.items())
    for name, value in language.items():
        inside = re.sub(r"(transformer\.h\.\d+)", r"\1.decoder_layer", name)
        found = trained[f"lang_encoder.{inside}"]
        if name == "transformer.wte.weight":
            assert found[others].equal(value[others])
            assert not found[rows].equal(value[rows])
        else:
            assert found.equal(value)
    fresh = kinds.find("flamingo").build_model(TrainConfig(**values("flamingo")), tokenizer).state_dict()
    new = [n for n in trained if n.startswith("perceiver.") or "gated_cross_attn_layer" in n]
    assert new
    assert all(not trained[name].equal(fresh[name]) for name in new)


def test_gates_have_a_learning_rate_of_their_own(values, parts):
    kind, tokenizer = kinds.find("flamingo"), load_bundle(parts["language_model"]).tokenizer
    config = TrainConfig(**values("flamingo", lr=1e-3, gate_lr=2e-2, weight_decay=0.5))
    model = kind.build_model(config, tokenizer)
    *rest, gates = kind.parameter_groups(config, model)
    assert gates["lr_scale"] == pytest.approx(20)
    assert gates["weight_decay"] == 0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in gates["params"]} == {"attn_gate", "ff_gate"}
    plain = model.parameter_groups(0.5)
    assert [group["weight_decay"] for group in rest] == [group["weight_decay"] for group in plain]
    found = [id(p) for group in (*rest, gates) for p in group["params"]]
    assert sorted(found) == sorted(id(p) for group in plain for p in group["params"])
    assert kind.parameter_groups(TrainConfig(**values("flamingo")), model) is None


def test_flamingo_starts_as_its_language_model(values, parts):
    """With the gates at zero the first loss is that of the language model on the same rows."""
    tokenizer = load_bundle(parts["language_model"]).tokenizer
    samples = [{"image": torch.randn(3, 16, 16), "text": t, "key": t} for t in ("red dot 1", "blue ring 2 3")]
    losses = {}
    for kind in ("lm", "flamingo"):
        config = TrainConfig(**values(kind))
        model = load_bundle(parts["language_model"]).model
        if kind == "flamingo":
            model = kinds.find(kind).build_model(config, tokenizer)
        task = kinds.find(kind).build_task(config, tokenizer)
        losses[kind], measure = task.loss(model.eval(), task.collate(samples), 0, True)
        assert measure()["loss"] == losses[kind].item()
    assert losses["lm"].equal(losses["flamingo"])


def test_counted_tokens_of_the_rows():
    """The caption and its end; of simvlm what follows the prefix."""
    tokenizer = CaptionTokenizer(24, 602)
    samples = [{"image": torch.zeros(3, 4, 4), "text": t, "key": t} for t in ("a fox", "an owl above a key")]
    config = TrainConfig(seed=3)

    class Listener(torch.nn.Module):
        def forward(self, *arguments, labels, **options):
            self.labels = labels
            found = {"loss": torch.tensor(1.0), "logits": None}
            return type("Output", (dict,), found)(found)

    model = Listener()
    for kind in ("lm", "flamingo"):
        task = kinds.find(kind).build_task(config, tokenizer)
        task.loss(model, task.collate(samples), 0, False)
        for row, sample in zip(model.labels, samples, strict=True):
            expected = [*tokenizer.encode(sample["text"]), tokenizer.endofchunk_id]
            assert row[row != IGNORE].tolist() == expected
    tokens = tokenizer([s["text"] for s in samples])
    labels = prefix_labels(tokenizer, tokens, torch.tensor([1, 3]))
    assert labels[0][labels[0] != IGNORE].tolist() == [*tokenizer.encode("a fox"), tokenizer.eot_id]
    expected = [*tokenizer.encode("an owl above a key")[2:], tokenizer.eot_id]
    assert labels[1][labels[1] != IGNORE].tolist() == expected


def test_prefixes_are_uniform_and_drawn_per_step_and_sample():
    keys = [str(i) for i in range(4000)]
    drawn = prefix_lengths(0, 5, keys, [6] * 4000)
    counts = drawn.bincount(minlength=6)
    assert counts[0] == 0
    assert len(counts) == 6  # 1 to 5 of 6 tokens
    assert counts[1:].min() > 700
    assert prefix_lengths(0, 5, keys[7:9], [6, 6]).equal(drawn[7:9])  # whatever the rest of the batch
    assert not prefix_lengths(0, 6, keys, [6] * 4000).equal(drawn)
    assert not prefix_lengths(1, 5, keys, [6] * 4000).equal(drawn)
    assert prefix_lengths(0, 0, ["a"], [2]).tolist() == [1]


def test_several_images_in_a_row(values, tmp_path):
    train("flamingo", TrainConfig(**values("flamingo", images_per_row=3)))
    bundle = load_bundle(tmp_path / "run" / "final")
    task = kinds.find("flamingo").build_task(TrainConfig(images_per_row=3), bundle.tokenizer)
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"image": torch.randn(3, 16, 16, generator=generator), "text": f"red dot {i}", "key": str(i)}
        for i in range(4)
    ]
    batch = task.collate(samples)
    loss, _ = task.loss(bundle.model, batch, 0, True)
    batch["images"][1, 1:] = 5.0  # places without an image: no token of the row points to them
    again, _ = task.loss(bundle.model, batch, 0, True)
    assert again.equal(loss)
    batch["images"][1, 0] = 5.0
    other, _ = task.loss(bundle.model, batch, 0, True)
    assert not other.equal(loss)


def test_trains_on_tars(values, table, tmp_path):
    tar = write_tar(table, tmp_path / "pairs-0.tar")
    common = {"data": str(tar), "samples_per_epoch": 22}
    train("flamingo", TrainConfig(**values("flamingo", "whole", **common)))
    train("flamingo", TrainConfig(**values("flamingo", "cut", **common, save_every=5, max_steps=5)))
    train("flamingo", TrainConfig(**values("flamingo", "cut", **common, save_every=5, resume="auto")))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_stays_near_fp32(values, tmp_path, kind):
    for precision in ("fp32", "bf16"):
        train(kind, TrainConfig(**values(kind, precision, precision=precision, epochs=2)))
    exact, rounded = metrics(tmp_path / "fp32"), metrics(tmp_path / "bf16")
    assert exact != rounded
    assert [line["loss"] for line in rounded] == pytest.approx([line["loss"] for line in exact], rel=0.05)
    assert all(v.dtype != torch.bfloat16 for v in weights(tmp_path / "bf16").values())


@pytest.mark.parametrize("kind", ["flamingo", "simvlm", "virtex"])
def test_starts_from_a_trained_captioner(values, tmp_path, kind):
    train(kind, TrainConfig(**values(kind, "first")))
    own = {"vision": None, "language_model": None, "model_options": {}} if kind == "flamingo" else {}
    init = str(tmp_path / "first" / "final")
    train(kind, TrainConfig(**{**values(kind, "second", lr=1e-12, max_steps=1, init=init), **own}))
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    for name in first:
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(second[name], first[name])
    if kind == "flamingo":
        frozen = load_bundle(tmp_path / "second" / "final").model.vision_encoder
        assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (
            "flamingo",
            {"vision": None, "language_model": None},
            "vision must be the folder of a trained clip .*, got None; language_model must be",
        ),
        ("flamingo", {"vision": "nowhere"}, "nowhere"),
        ("flamingo", {"gate_lr": 0.0}, "gate_lr must be positive, got 0.0"),
        (
            "flamingo",
            {"renamed": 1.5},
            r"renamed must be in \[0, 1\], got 1.5; images_per_row must",
        ),
        (
            "simvlm",
            {"vision": "somewhere"},
            "vision may only be given for flamingo, got somewhere",
        ),
        ("simvlm", {"images_per_row": 2}, "images_per_row may only be given for lm and flamingo, got 2"),
        (
            "lm",
            {"tokenizer": "pieces.txt"},
            "tokenizer may only be given for align and visualbert, got pieces.txt",
        ),
        (
            "lm",
            {"label_smoothing": 0.1},
            "label_smoothing may only be given for the softmax losses, not for lm",
        ),
        (
            "lm",
            {"images_per_row": 8, "model_options": {**TINY["lm"], "context_length": 22}},
            "at least 3 ids per caption of a row, got 22 for 8 captions",
        ),
        ("simvlm", {"model_options": {"depth": 1}}, "model_options: unknown fields depth; known are form"),
        ("lm", {"model": "large"}, "lm has no configuration 'large'; it has emoji-tiny"),
    ],
)
def test_bad_use_is_a_clear_error(values, kind, more, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(kind, TrainConfig(**values(kind, **more)))


def test_parts_of_the_wrong_kind(values, parts):
    swapped = {"vision": parts["language_model"], "language_model": parts["vision"]}
    with pytest.raises(ValueError) as error:
        train("flamingo", TrainConfig(**values("flamingo", **swapped)))
    assert "must contain a model for clip, got one for lm" in str(error.value)
    assert "must contain a model for lm, got one for clip" in str(error.value)
    with pytest.raises(ValueError, match="must contain a model for simvlm, got one for lm"):
        train("simvlm", TrainConfig(**values("simvlm", init=parts["language_model"])))


def test_the_towers_stay_as_they_were(values, parts):
    """Building a Flamingo takes over the modules of the folders, not the files."""
    before = weights_of(parts)
    train("flamingo", TrainConfig(**values("flamingo", epochs=1)))
    assert isinstance(load_bundle(parts["vision"]).model, CLIP)
    assert all(a.equal(b) for a, b in zip(before, weights_of(parts), strict=True))


def weights_of(parts):
    return [v for folder in parts.values() for v in load_bundle(folder).model.state_dict().values()]
