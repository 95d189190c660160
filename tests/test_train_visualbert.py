"""Training VisualBERT: it learns to look, resumes bit for bit; draws, region files, evaluation, match."""

import json
import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image

from tests.train_tiny import (
    TINY,
    WORDS,
    assert_same_run,
    metrics,
    tiny_values,
    weights,
    write_pairs,
    write_tar,
)
from vlmkernels.cli import main
from vlmkernels.data import WordPieceTokenizer, load_pairs, mask_tokens, pair_tokens
from vlmkernels.train import TrainConfig, kinds, load_bundle, train
from vlmkernels.use.bundle import load_model
from vlmkernels.use.evaluate import evaluate
from vlmkernels.use.match import match

COLOURS = {
    "red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220), "black": (10, 10, 10),
    "white": (250, 250, 250), "yellow": (230, 220, 30), "cyan": (30, 210, 220), "pink": (240, 120, 200),
}  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def tokenizer():
    return WordPieceTokenizer.train([" ".join(WORDS)] * 3, 100, 12)


@pytest.fixture(scope="module")
def final(table, tmp_path_factory):
    """A model with a tower, hardly trained."""
    out = tmp_path_factory.mktemp("run") / "run"
    return train("visualbert", TrainConfig(**tiny_values(table, out, "visualbert", epochs=1))).final


# It learns


def write_halves(folder, copies, unseen_copies):
    """Pictures of two colours side by side in noise; a fifth of the pairs is in the second table only."""
    generator, pairs = numpy.random.default_rng(0), [(a, b) for a in COLOURS for b in COLOURS if a != b]
    tables = []
    seen = [pair for i, pair in enumerate(pairs) if i % 5]
    for name, part, count in (("seen", seen, copies), ("unseen", pairs[::5], unseen_copies)):
        rows = ["filepath\ttitle"]
        for left, right in part:
            for copy in range(count):
                pixels = numpy.empty((8, 8, 3))
                pixels[:, :4], pixels[:, 4:] = COLOURS[left], COLOURS[right]
                noisy = (pixels + generator.normal(0, 12, pixels.shape)).clip(0, 255).astype(numpy.uint8)
                file = f"{left}-{right}-{copy}.png"
                Image.fromarray(noisy).save(folder / file)
                rows.append(f"{file}\t{left} {right}")
        tables.append(folder / f"{name}.tsv")
        tables[-1].write_text("\n".join(rows) + "\n")
    return tables


def test_it_looks_at_its_images(tmp_path):
    """Pairs of colours that no training picture has. It fails unless right and wrong texts are told apart at
    three standard errors above chance, masked words are likelier with the own image than without and than
    with another one, by three standard errors of the paired differences, and another image takes both away.
    """
    seen, unseen = write_halves(tmp_path, 12, 24)
    sizes = {**TINY["visualbert"], "image_size": 8, "conv_blocks": (1,), "conv_width": 8, "conv_pool": True}
    sizes |= {"width": 32, "mlp_width": 64, "init_std": 32**-0.5}
    values = tiny_values(seen, tmp_path / "run", "visualbert", model_options=sizes, augment={}, epochs=24)
    options = {"mask_rate": 0.3, "image_dropout": 0.1, "batch_size": 88, "lr": 6e-3, "min_lr": 3e-3}
    final = train("visualbert", TrainConfig(**{**values, **options})).final
    found = evaluate(final, str(unseen), batch_size=144)
    own, another = (found.match[picture]["accuracy"] for picture in ("own", "another"))
    assert own.value >= 0.5 + 3 * own.error > 0.5, found
    assert another.value < 0.5 + 3 * another.error, found
    assert all(gain.value >= 3 * gain.error > 0 for gain in found.gain.values()), found
    assert found.perplexity["another"] > found.perplexity["none"], found


# Runs


def test_a_run_resumes_bit_for_bit(table, tmp_path):
    common = {
        "caption_pairs": 0.0,
        "image_dropout": 0.3,
        "model_options": {**TINY["visualbert"], "dropout": 0.1},
    }
    runs = {name: tiny_values(table, tmp_path / name, "visualbert", **common) for name in ("whole", "cut")}
    train("visualbert", TrainConfig(**runs["whole"]))
    train("visualbert", TrainConfig(**runs["cut"], max_steps=5))
    summary = train("visualbert", TrainConfig(**runs["cut"], resume="auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert summary.scores.keys() == {"perplexity", "match_accuracy"}
    lines = metrics(tmp_path / "whole")
    assert all(line["loss"] == pytest.approx(line["masked_lm"] + line["match"]) for line in lines)


def test_a_changed_setting_is_not_resumed(table, tmp_path):
    values = tiny_values(table, tmp_path / "run", "visualbert", max_steps=1)
    train("visualbert", TrainConfig(**values))
    with pytest.raises(ValueError, match=r"mask_rate was 0.15, got 0.2"):
        train("visualbert", TrainConfig(**{**values, "resume": "auto", "mask_rate": 0.2, "max_steps": 2}))


def test_tars_and_a_given_tokenizer(table, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "words")
    shard = write_tar(table, tmp_path / "pairs.tar")
    values = tiny_values(shard, tmp_path / "run", "visualbert", samples_per_epoch=16, epochs=1)
    with pytest.raises(ValueError, match="tokenizer must be given for tars"):
        train("visualbert", TrainConfig(**values))
    done = train("visualbert", TrainConfig(**values, tokenizer=str(tmp_path / "words" / "tokenizer.json")))
    assert done.steps == 2
    assert evaluate(done.final, str(shard), batch_size=8).judged == 22


# What is drawn


def test_masks_are_80_10_10(tokenizer):
    """Of 15 % of the words; [CLS], [SEP] and padding stay. Counts within four standard deviations."""
    text = " ".join(WORDS)
    tokens, types = pair_tokens(tokenizer, [text] * 2000, [None] * 2000)
    hidden, labels = mask_tokens(tokens, tokenizer, [random.Random(i) for i in range(2000)])
    chosen = labels != -100
    words = tokens > tokenizer.mask_id
    assert not types.any()
    assert not (chosen & ~words).any()
    assert hidden[~chosen].equal(tokens[~chosen])
    assert labels[chosen].equal(tokens[chosen])
    total = int(chosen.sum())
    shares = {
        "chosen": (total, int(words.sum()), 0.15),
        "masked": (int((hidden == tokenizer.mask_id).sum()), total, 0.8),
        "same": (int((hidden == tokens)[chosen].sum()), total, 0.1 + 0.1 / (tokenizer.vocab_size - 5)),
    }
    for name, (count, of, share) in shares.items():
        assert abs(count - share * of) < 4 * (of * share * (1 - share)) ** 0.5, name
    again, _ = mask_tokens(tokens, tokenizer, [random.Random(i) for i in range(2000)])
    assert again.equal(hidden)


def test_two_texts_are_cut_the_longer_first(tokenizer):
    long = " ".join(WORDS)
    tokens, types = pair_tokens(tokenizer, [long, "red", "red dot"], ["dot ring", long, None])
    assert tokens.shape == types.shape == (3, 12)
    ends = (tokens == tokenizer.sep_id).sum(1)
    assert ends.tolist() == [2, 2, 1]
    words = (tokens > tokenizer.mask_id) & (types == 0), (tokens > tokenizer.mask_id) & (types == 1)
    assert [part.sum(1).tolist() for part in words] == [[7, 1, 2], [2, 8, 0]]
    assert types[2].sum() == 0
    assert pair_tokens(tokenizer, [], [])[0].shape == (0, 2)


def task_of(tokenizer, **options):
    return kinds.find("visualbert").build_task(TrainConfig(**options), tokenizer, 16)


BATCH = {"keys": [f"k{i}" for i in range(8)], "texts": WORDS[:8]}


def test_other_captions_are_those_of_other_images(tokenizer):
    """Half of them; their words are hidden but not predicted."""
    task = task_of(tokenizer, mask_rate=1.0)
    drawn = [task.draw(BATCH, step) for step in range(100)]
    wrong = sum(int((~each["match"]).sum()) for each in drawn)
    assert abs(wrong - 400) < 4 * 200**0.5
    own = torch.tensor([tokenizer.encode(text)[0] for text in BATCH["texts"]])
    task.options = SimpleNamespace(**{**vars(task.options), "mask_rate": 0.0})
    for before, step in zip(drawn, range(100), strict=True):
        shown = task.draw(BATCH, step)
        assert ((shown["tokens"][:, 1] == own) == shown["match"]).all()
        assert ((before["labels"] != -100).any(1) == before["match"]).all()
        assert shown["match"].equal(before["match"])
    again = task_of(tokenizer, mask_rate=1.0).draw(BATCH, 7)
    assert all(again[name].equal(drawn[7][name]) for name in again)


def test_equal_captions_are_right_for_each_other(tokenizer):
    batch = {"keys": ["a", "b", "c"], "texts": ["red", "red", "red"]}
    drawn = [task_of(tokenizer, false_caption_ratio=1.0).draw(batch, step) for step in range(5)]
    assert all(each["match"].all() for each in drawn)


def test_a_sample_without_its_image_is_not_judged(tokenizer):
    drawn = task_of(tokenizer, image_dropout=1.0, false_caption_ratio=1.0).draw(BATCH, 0)
    assert not drawn["sees"].any()
    assert drawn["match"].all()


def test_pairs_of_captions(table, tmp_path):
    """The first is always the image's own, the second is judged; both captions of an image are known."""
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    both = tmp_path / "both.tsv"
    lines = ["\t".join(row) for row in rows] + [f"{file}\tsecond {i}" for i, (file, _) in enumerate(rows[1:])]
    both.write_text("\n".join(lines) + "\n")
    source = load_pairs(str(both), root=table.parent)
    tokenizer = WordPieceTokenizer.train(source.names, 200, 24)
    task = task_of(tokenizer, caption_pairs=1.0, mask_rate=0.0)
    task.prepare(source, torch.device("cpu"))
    samples = [source[i] for i in (0, 1, 22, 23)]
    batch = {"keys": [s["key"] for s in samples], "texts": [s["text"] for s in samples]}
    own = {
        key: {s["text"] for s in map(source.__getitem__, range(44)) if s["key"] == key}
        for key in batch["keys"]
    }
    rights = 0
    for step in range(20):
        drawn = task.draw(batch, step)
        for i, (key, text) in enumerate(zip(batch["keys"], batch["texts"], strict=True)):
            row, types = drawn["tokens"][i], drawn["types"][i]
            first, second = tokenizer.decode(row[types == 0]), tokenizer.decode(row[types == 1])
            plain = {tokenizer.decode(tokenizer.encode(each)) for each in own[key]}
            assert first == tokenizer.decode(tokenizer.encode(text))
            assert (second in plain - {first}) == bool(drawn["match"][i])
            rights += bool(drawn["match"][i])
    assert 20 < rights < 60
    with pytest.raises(ValueError, match="caption_pairs: no image in data has several captions"):
        task_of(tokenizer, caption_pairs=0.5).prepare(load_pairs(str(table)), torch.device("cpu"))


# Regions


def write_regions(folder, table, width=5):
    """The features of one to four regions for each picture of a table, and a table of them."""
    generator, rows = numpy.random.default_rng(1), ["filepath\ttitle"]
    for line in table.read_text().splitlines()[1:]:
        name, text = line.replace(".png", ".npy").split("\t")
        numpy.save(folder / name, generator.random((int(generator.integers(1, 5)), width)))
        rows.append(f"{name}\t{text}")
    features = folder / "features.tsv"
    features.write_text("\n".join(rows) + "\n")
    return features


def test_training_on_features_of_regions(table, tmp_path):
    """No tower; an image of fewer regions is as if it were alone."""
    features = write_regions(tmp_path, table)
    values = tiny_values(features, tmp_path / "run", "visualbert", epochs=1, image_dropout=0.3, augment={})
    with pytest.raises(ValueError, match=r"regions must be floating \[B = 8, V, 32\], got .* \[8, 4, 5\]"):
        train("visualbert", TrainConfig(**{**values, "out": str(tmp_path / "wrong")}))
    values["model_options"] = {**values["model_options"], "conv_blocks": [], "visual_dim": 5}
    final = train("visualbert", TrainConfig(**values)).final
    assert load_bundle(final).model.tower is None
    found = evaluate(final, str(features), batch_size=8)
    assert (found.samples, found.judged) == (22, 22)
    texts = ["red 1", "blue 2"]
    ranked = match(final, tmp_path / "0.npy", texts)
    model, words, _ = load_model(final, "cpu", fitting=kinds.matchers())
    kind, shown = kinds.of_model(model), torch.zeros(2, 6, 5)
    first = torch.from_numpy(numpy.load(tmp_path / "0.npy")).float()
    shown[:, : len(first)] = first
    with torch.no_grad():
        odds = kind.match_odds(model, words, kind.pictures(model, shown), texts)
    assert dict(ranked.texts) == pytest.approx(
        dict(zip(texts, odds.sigmoid().tolist(), strict=True)), abs=1e-6
    )
    with pytest.raises(ValueError, match="this VisualBERT has no image tower"):
        match(final, table.parent / "0.png", texts)


# Commands


def run(capsys, *arguments):
    """The exit status of a command, and what it wrote."""
    status = 0
    try:
        main([str(each) for each in arguments])
    except SystemExit as stop:
        status = stop.code
    out = capsys.readouterr()
    return status, out.out, out.err


def test_the_commands(final, table, capsys, monkeypatch):
    code, out, _ = run(capsys, "eval", "--model", final, "--data", table, "--batch-size", 8, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["samples"] == found["judged"] == 22
    assert found["perplexity"].keys() == {"own", "another", "none"}
    assert all(0 <= each["value"] <= 1 for way in found["match"].values() for each in way.values())
    text = str(evaluate(final, str(table), batch_size=8))
    assert "chance 0.5" in text
    assert f"perplexity of {found['words']} masked words: own image" in text
    image = table.parent / "0.png"
    code, out, _ = run(capsys, "match", "--model", final, image, "red dot", "blue ring", "red dot")
    lines = [line.split("  ") for line in out.splitlines()]
    assert sorted(text for _, text in lines) == ["blue ring", "red dot", "red dot"]
    probabilities = [float(probability) for probability, _ in lines]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(0 <= each <= 1 for each in probabilities)
    assert code == 0


def test_evaluation_draws_no_random_number(final, table):
    parts, data = load_model(final, "cpu", fitting=kinds.matchers()), load_pairs(str(table))
    before = torch.get_rng_state()
    first, second = (kinds.of_model(parts[0]).evaluate(*parts, data, batch_size=8) for _ in range(2))
    assert first == second
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["match", "{image}", " "], "texts must be a sequence of one or more texts that are not empty"),
        (["match", "nowhere.png", "a"], "nowhere.png"),
        (
            ["eval", "--data", "{table}", "--template", "a {}"],
            "embeds nothing; classes and templates are for",
        ),
        (["search", "a", "{folder}"], "must be of type clip or align, got visualbert"),
    ],
)
def test_invalid_use_of_a_model(final, table, capsys, arguments, message):
    places = {"{image}": table.parent / "0.png", "{table}": table, "{folder}": table.parent}
    name, *rest = [str(places.get(each, each)) for each in arguments]
    code, _, err = run(capsys, name, "--model", final, *rest)
    assert code in (1, 2)
    assert message in err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_rate": 1.5, "image_dropout": -0.1}, r"mask_rate must be in \[0, 1\], got 1.5; image_dropout"),
        ({"model_options": {"head": "vqa"}}, "head must be 'pretraining', got 'vqa'"),
        ({"model_options": {"conv_blocks": [1], "image_size": 31}}, "image_size must be a multiple of 2"),
        ({"vision": "x"}, "vision may only be given for flamingo"),
        ({"label_smoothing": 0.1}, "label_smoothing may only be given for the softmax losses"),
    ],
)
def test_invalid_settings(table, tmp_path, values, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train("visualbert", TrainConfig(**{**tiny_values(table, tmp_path / "run", "visualbert"), **values}))


def test_init_continues_with_the_model_and_its_words(final, table, tmp_path):
    values = tiny_values(table, tmp_path / "run", "visualbert", init=str(final), epochs=1)
    done = train("visualbert", TrainConfig(**{**values, "model_options": {}}))
    assert weights(tmp_path / "run").keys() == weights(final.parent).keys()
    assert load_bundle(done.final).tokenizer.vocab_size == load_bundle(final).tokenizer.vocab_size


def test_a_bert_is_a_start(tokenizer, table, tmp_path):
    """Its words, sizes and weights."""
    from vlmkernels.models.visualbert import VisualBERT, VisualBertConfig

    sizes = {"vocab_size": tokenizer.vocab_size, "width": 16, "layers": 1, "heads": 4, "mlp_width": 24}
    torch.manual_seed(5)
    bert = VisualBERT(
        VisualBertConfig(head="none", visual_dim=4, max_positions=12, context_length=12, **sizes)
    )
    folder = tmp_path / "bert"
    folder.mkdir()
    state = {
        n.removeprefix("visual_bert."): t for n, t in bert.state_dict().items() if "visual_" not in n[12:]
    }
    torch.save(state, folder / "pytorch_model.bin")
    config = {
        "model_type": "bert",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 16,
        "num_hidden_layers": 1,
    }
    config |= {"num_attention_heads": 4, "intermediate_size": 24, "max_position_embeddings": 12}
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer._tokenizer.save(str(folder / "tokenizer.json"))
    values = tiny_values(table, tmp_path / "run", "visualbert", bert=str(folder), max_steps=1, lr=1e-9)
    values["model_options"] = {**values["model_options"], "context_length": 12}
    values["model_options"] = {
        n: v for n, v in values["model_options"].items() if n not in ("max_positions",)
    }
    final = train("visualbert", TrainConfig(**values)).final
    model = load_bundle(final).model
    assert (model.config.heads, model.config.width, model.config.layers) == (4, 16, 1)
    for name, tensor in state.items():
        torch.testing.assert_close(model.state_dict()[f"visual_bert.{name}"], tensor, rtol=0, atol=1e-6)
