"""Captions written by trained models: the scores of captions, the caption and eval commands."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.train_tiny import tiny_values, train_parts, write_pairs, write_tar
from vlmkernels.cli import main
from vlmkernels.data import CsvPairs, load_scenes
from vlmkernels.train import TrainConfig, load_bundle, train
from vlmkernels.use.caption import caption, write_captions
from vlmkernels.use.caption_scores import evaluate_captions, plain_tokens, reference_scores
from vlmkernels.use.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("lm", "flamingo", "simvlm", "virtex")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def finals(table, tmp_path_factory):
    """Folders of a trained model of each kind; SimVLM and VirTex know the 22 pairs by heart."""
    folder = tmp_path_factory.mktemp("runs")
    parts = train_parts(table, folder)
    made = {"clip": parts["vision"], "lm": parts["language_model"]}
    long = {"epochs": 80, "lr": 2e-2}
    for kind, own in (("flamingo", parts), ("simvlm", long), ("virtex", long)):
        values = {**tiny_values(table, folder / f"own-{kind}", kind, augment={}), **own}
        made[kind] = str(train(kind, TrainConfig(**values)).final)
    return made


def images(count):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_is_what_the_model_finds_likeliest(finals, kind):
    """Greedy decoding by the caches equals the argmax of whole forward passes, token by token."""
    bundle = load_bundle(finals[kind])
    model, tokenizer = bundle.model, bundle.tokenizer
    pictures = images(3)
    texts = write_captions(model, tokenizer, 3 if kind == "lm" else pictures, max_new_tokens=10)
    for i, text in enumerate(texts):
        first = tokenizer.sot_id if kind in ("simvlm", "virtex") else tokenizer.image_id
        tokens = torch.tensor([[first]])
        for _ in range(10):
            with torch.no_grad():
                if kind == "lm":
                    logits = model(tokens).logits
                elif kind == "flamingo":
                    logits = model(pictures[i][None, None, None], tokens)["logits"]
                elif kind == "virtex":
                    logits = model(pictures[i][None], tokens, return_logits=True)["logits"]
                else:
                    logits = model(pictures[i][None], tokens, 1, return_logits=True)["logits"]
            scores = logits[0, -1]
            if kind == "flamingo":
                scores[tokenizer.image_id] = -torch.inf
            if kind == "virtex" and tokens.shape[1] > 1:  # writes no token twice in a row
                scores[tokens[0, -1]] = -torch.inf
            tokens = torch.cat([tokens, scores.argmax()[None, None]], dim=1)
        assert text == tokenizer.decode(tokens[0, 1:])
    assert write_captions(model, tokenizer, 3 if kind == "lm" else pictures, max_new_tokens=10) == texts


@pytest.mark.parametrize("kind", ["flamingo", "simvlm", "virtex"])
def test_prompts_and_ways_of_decoding(finals, kind):
    bundle = load_bundle(finals[kind])
    pictures = images(4)

    def written(**options):
        return write_captions(bundle.model, bundle.tokenizer, pictures, max_new_tokens=6, **options)

    assert all(text.startswith("red dot") for text in written(prompt="red dot"))
    drawn = [
        written(do_sample=True, temperature=3.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert written(num_beams=3) == written(num_beams=3)
    assert not bundle.model.training
    with pytest.raises(ValueError, match=r"prompt must have at most 22 tokens, got \d+"):
        written(prompt="word " * 30)
    with pytest.raises(ValueError, match="num_beams"):
        written(num_beams=0)


@pytest.mark.parametrize("kind", ["simvlm", "virtex"])
def test_captions_are_those_of_the_training(finals, table, kind):
    """The whole way: table, tokens, training, folder, eval."""
    result = evaluate(finals[kind], str(table), device="cpu")
    assert result.samples == 22
    assert result.perplexity < 2
    pairs = CsvPairs(table)
    assert [each["references"] for each in result.captions] == [[text] for text in pairs.names]


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_that_of_the_counted_tokens(finals, table, kind):
    """Against one sample at a time through the model's own loss; the batch size changes nothing."""
    bundle = load_bundle(finals[kind])
    pairs = CsvPairs(table, transform=bundle.transform)
    small, large = (
        evaluate_captions(bundle.model, bundle.tokenizer, None, pairs, batch_size=size, max_new_tokens=2)
        for size in (3, 64)
    )
    assert small.perplexity == pytest.approx(large.perplexity, rel=1e-5)
    assert small.captions == large.captions
    tokenizer, total, count = bundle.tokenizer, 0.0, 0
    for i in range(len(pairs)):
        text, image = pairs[i]["text"], pairs[i]["image"]
        with torch.no_grad():
            if kind in ("simvlm", "virtex"):
                length = len(tokenizer.encode(text)) + 2
                tokens = tokenizer([text])[0, :length]
                prefix = (1,) if kind == "simvlm" else ()
                logits = bundle.model(image[None], tokens[None], *prefix, return_logits=True)["logits"]
            else:
                tokens = tokenizer.interleaved([[text]])[0]
                if kind == "lm":
                    logits = bundle.model(tokens[None]).logits
                else:
                    logits = bundle.model(image[None, None, None], tokens[None])["logits"]
        wanted = tokens[1:]
        total -= logits[0, :-1].log_softmax(-1)[torch.arange(len(wanted)), wanted].sum().item()
        count += len(wanted)
    assert large.tokens == count
    assert large.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


def test_slots_are_scored_on_scenes_only(finals, table):
    result = evaluate(finals["simvlm"], load_scenes("test", size=5), device="cpu")
    assert set(result.slots) == {"slots", "objects", "relations", "scenes"}
    assert evaluate(finals["simvlm"], str(table), device="cpu").slots is None


def test_tars_are_scored_as_the_table(finals, table, tmp_path):
    tar = write_tar(table, tmp_path / "pairs-0.tar")
    results = [evaluate(finals["flamingo"], str(data), device="cpu", batch_size=9) for data in (table, tar)]
    for name in ("samples", "tokens", "perplexity", "token_accuracy", "reference_scores"):
        assert getattr(results[0], name) == getattr(results[1], name), name


def test_photographs(finals, tmp_path):
    """Real photographs with several captions each go the same way; nothing is claimed about the captions."""
    folder = os.environ.get("VLMKERNELS_PHOTOS")
    listed = [] if not folder else sorted(Path(folder).rglob("annotations.json"))
    if not listed:
        pytest.skip("VLMKERNELS_PHOTOS is not set to a folder with photographs and their annotations.json")
    photographs = json.loads(listed[0].read_text(encoding="utf-8"))["images"][:6]
    rows = ["filepath\ttitle"]
    for photograph in photographs:
        file = next(listed[0].parent.rglob(photograph["file_name"]))
        rows += [f"{file}\t{text}" for text in photograph["captions"]]
    table = tmp_path / "photographs.tsv"
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    for kind in ("flamingo", "simvlm", "virtex"):
        result = evaluate(finals[kind], str(table), device="cpu")
        assert result.samples == len(rows) - 1
        assert not result.skipped
        assert [len(each["references"]) for each in result.captions] == [5] * 6
        assert math.isfinite(result.perplexity)


def test_several_references_of_one_image(finals, table):
    path = table.with_name("two.tsv")
    path.write_text("filepath\ttitle\n0.png\tred dot\n0.png\tblue ring\n")
    result = evaluate(finals["simvlm"], str(path), device="cpu")
    assert result.samples == 2
    (only,) = result.captions
    assert only["references"] == ["red dot", "blue ring"]


def test_reference_scores_are_those_of_the_package():
    """BLEU by hand for one short pair; a perfect caption scores 1 in BLEU, and its CIDEr is the highest."""
    references = {
        "a": ["A red fox, above an owl.", "a fox over an owl"],
        "b": ["two keys and a small green frog"],
        "c": ["a zebra to the left of a crab"],
    }
    perfect = {key: texts[0] for key, texts in references.items()}
    scores = reference_scores(perfect, references)
    for n in (1, 2, 3, 4):
        assert scores[f"BLEU-{n}"] == pytest.approx(1.0, abs=1e-6)
    worse = reference_scores({**perfect, "c": "a frog to the left of a key"}, references)
    assert worse["CIDEr"] < scores["CIDEr"]
    found = reference_scores({"a": "a fox above a key"}, {"a": ["a fox above an owl"]})
    # unigrams: a (clipped to 1), fox, above of 5; bigrams: a fox, fox above of 4
    assert found["BLEU-1"] == pytest.approx(3 / 5, abs=1e-6)
    assert found["BLEU-2"] == pytest.approx(math.sqrt(3 / 5 * 2 / 4), abs=1e-6)
    assert found["CIDEr"] == 0
    assert plain_tokens("A Red-ish fox; it's  here!") == "a red ish fox it's here"
    with pytest.raises(ValueError, match="must have the same keys, got 3 and 1"):
        reference_scores(perfect, {"a": ["x"]})
    with pytest.raises(ValueError, match="references must have a text for every key, got none for a"):
        reference_scores({"a": "x"}, {"a": []})


def test_caption_command(finals, tmp_path, capsys):
    for name, colour in (("a.png", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (20, 30), colour).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    for kind in ("flamingo", "simvlm", "virtex"):
        main(["caption", "--model", finals[kind], str(tmp_path), "--max-new-tokens", "8"])
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        assert [line.split(":")[0] for line in lines] == [str(tmp_path / "a.png"), str(tmp_path / "b.jpg")]
        assert "skipped" in captured.err
        assert "broken.png" in captured.err
    common = ["caption", "--model", finals["simvlm"], str(tmp_path / "a.png"), "--prompt", "red"]
    main([*common, "--num-beams", "3"])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'a.png'}: red")
    outs = []
    for seed in ("0", "0", "1"):
        main([*common, "--sample", "--temperature", "5", "--top-k", "300", "--top-p", "0.99", "--seed", seed])
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]


def test_eval_command(finals, table, capsys):
    main(["eval", "--model", finals["flamingo"], "--data", str(table), "--num-beams", "2"])
    out = capsys.readouterr().out
    assert "22 samples" in out
    assert "perplexity" in out
    assert "BLEU-4" in out
    assert "CIDEr" in out
    main(["eval", "--model", finals["lm"], "--data", "scenes:test", "--json", "--batch-size", "500"])
    result = json.loads(capsys.readouterr().out)
    assert result["samples"] == 1000
    assert 0 <= result["slots"]["slots"] <= 1


def test_eval_without_the_package_of_the_metrics(finals, table, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    assert evaluate(finals["simvlm"], str(table), device="cpu").reference_scores is None
    main(["eval", "--model", finals["simvlm"], "--data", str(table)])
    out = capsys.readouterr().out
    assert "perplexity" in out
    assert "BLEU and CIDEr need pip install pycocoevalcap" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["caption", "--model", "{clip}", "{table}"],
            "must be of type flamingo or simvlm or virtex or visualgpt, got clip",
        ),
        (
            ["caption", "--model", "{lm}", "{table}"],
            "must be of type flamingo or simvlm or virtex or visualgpt, got decoder",
        ),
        (["search", "--model", "{simvlm}", "red", "{folder}"], "must be of type clip or align, got simvlm"),
        (
            ["embed", "--model", "{flamingo}", "--out", "x.npz", "{folder}"],
            "must be of type clip or align, got flamingo",
        ),
        (["eval", "--model", "{simvlm}", "--data", "{table}", "--template", "a {{}}"], "embeds nothing"),
        (["caption", "--model", "{simvlm}", "{folder}", "--num-beams", "0"], "num_beams"),
        (["caption", "--model", "{simvlm}", "no-such-picture.png"], "no-such-picture.png"),
    ],
)
def test_wrong_use_is_one_error(finals, table, arguments, message, capsys):
    names = {**finals, "table": str(table), "folder": str(table.parent)}
    with pytest.raises(SystemExit) as error:
        main([argument.format(**names) for argument in arguments])
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_captions_from_python(finals, table):
    found = caption(finals["simvlm"], [table.parent], device="cpu", batch_size=7)
    assert len(found.captions) == 22
    assert not found.skipped
    again = caption(finals["simvlm"], [path for path, _ in found.captions], device="cpu", batch_size=64)
    assert again.captions == found.captions
    with pytest.raises(ValueError, match="inputs must be a sequence of paths, got one str"):
        caption(finals["simvlm"], str(table.parent))
