"""`vlmkernels magic`: captions of pictures by a language model and a scorer, from their folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

from benchmarks import peers
from tests.train_tiny import tiny_values, train_parts, write_pairs
from vlmkernels.cli import main
from vlmkernels.data.gpt2_tokenizer import Gpt2Tokenizer
from vlmkernels.models import MAGIC, CausalLM, DecoderConfig
from vlmkernels.train import TrainConfig, train
from vlmkernels.use.asif import Encoders, build
from vlmkernels.use.bundle import load_bundle
from vlmkernels.use.images import find_images, read_files
from vlmkernels.use.magic import load_judge, load_writer, magic, write_guided

pytestmark = pytest.mark.usefixtures("one_thread")
MERGES = ["r e", "re d", "Ġ d", "Ġd o", "Ġdo t", "Ġ red"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def parts(table, tmp_path_factory):
    """Folders of a language model and of a scorer, and of models that are neither."""
    folder = tmp_path_factory.mktemp("parts")
    finals = train_parts(table, folder, lm_epochs=8)
    simvlm = train("simvlm", TrainConfig(**tiny_values(table, folder / "simvlm", "simvlm", epochs=1)))
    gpt2 = folder / "gpt2"
    write_gpt2(gpt2)
    return {
        "lm": finals["language_model"],
        "clip": finals["vision"],
        "simvlm": str(simvlm.final),
        "gpt2": str(gpt2),
    }


def write_gpt2(folder, start=True):
    """A GPT-2 as Hugging Face keeps it, with the paper's added tokens, and byte pairs made by hand."""
    folder.mkdir()
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge.split()) for merge in MERGES)]
    vocabulary = {symbol: i for i, symbol in enumerate([*symbols, "<|endoftext|>"])}
    added = {"<-start_of_text->": len(vocabulary), "<-pad->": len(vocabulary) + 1} if start else {}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    (folder / "added_tokens.json").write_text(json.dumps(added))
    size = len(vocabulary) + len(added)
    torch.manual_seed(0)
    sizes = {"vocab_size": size, "width": 16, "layers": 2, "heads": 2, "context_length": 32}
    model = CausalLM(DecoderConfig(**sizes, activation="gelu_tanh"))
    save_file(
        {k: v.contiguous().clone() for k, v in model.hf_state_dict().items()}, folder / "model.safetensors"
    )
    config = {
        "model_type": "gpt2",
        "vocab_size": size,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_captions_are_those_of_magic(parts, table):
    """The command's parts put together by hand."""
    found = magic([table.parent], parts["lm"], parts["clip"], device="cpu", batch_size=5, k=6, length=8)
    assert len(found.captions) == 22
    lm, clip = load_bundle(parts["lm"]), load_bundle(parts["clip"])
    judge = load_judge(parts["clip"], "cpu")
    search = MAGIC(
        lm.model, judge.scorer, decode=lm.tokenizer.decode, eos_token_id=lm.tokenizer.endofchunk_id
    )
    files = find_images([table.parent])
    images = torch.stack([image for _, image in read_files(clip.transform, files, {})])
    features = clip.model.encode_image(images, normalize=True)
    start = torch.full((22, 1), lm.tokenizer.image_id)
    tokens = search.generate(start, features, max_new_tokens=8, k=6)
    assert [path for path, _ in found.captions] == files
    assert [text for _, text in found.captions] == [lm.tokenizer.decode(row) for row in tokens.tolist()]
    alone = magic([table.parent], parts["lm"], parts["clip"], device="cpu", beta=0.0, k=6, length=8)
    assert len({text for _, text in alone.captions}) == 1, "without guidance nothing differs"


def test_the_command_prints_a_line_for_each_image(parts, table, tmp_path, capsys):
    for i in range(2):
        shutil.copy(table.parent / f"{i}.png", tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for folder in (parts["lm"], parts["gpt2"]):
        options = ["--alpha", "0.3", "--beta", "1", "--k", "5", "--length", "6", "--prompt", "red dot"]
        main(["magic", str(tmp_path), "--language-model", folder, "--scorer", parts["clip"], *options])
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        assert [line.split(": ")[0] for line in lines] == [str(tmp_path / f"{i}.png") for i in range(2)]
        assert all(line.split(": ")[1].startswith("red dot") for line in lines)
        assert "broken.png" in captured.err
        assert "1 skipped" in captured.err


def test_anchors_of_asif_are_a_scorer(parts, table, tmp_path):
    """Two encoders and the pairs of a table: the captions are guided, by scores that are cosines."""
    build(tmp_path / "anchors", [str(table)], encoders=Encoders.of(parts["clip"], parts["clip"], "cpu"))
    judge = load_judge(tmp_path / "anchors", "cpu")
    assert judge.scale == 100
    images = [image for _, image in read_files(judge.transform, find_images([table.parent]), {})]
    features = judge.encode(images)
    cosines = judge.scorer.similarity(features, [["red dot", ""]] * len(images)) / judge.scale
    assert cosines.shape == (22, 2)
    assert ((cosines >= 0) & (cosines <= 1)).all()
    found = magic([table.parent], parts["lm"], tmp_path / "anchors", device="cpu", k=6, length=8)
    writer = load_writer(parts["lm"], "cpu")
    assert [text for _, text in found.captions] == write_guided(writer, judge, features, k=6, length=8)


def test_a_gpt2_of_hugging_face(parts):
    writer = load_writer(parts["gpt2"], "cpu")
    text = Gpt2Tokenizer(parts["gpt2"])
    assert writer.start == text.id_of("<-start_of_text->")
    assert writer.end == text.end_id
    assert text.encode("red dot red") == [text.id_of(token) for token in ("red", "Ġdot", "Ġred")]
    ids = text.encode("a naïve <-pad-> dot<|endoftext|>")
    assert text.id_of("<-pad->") in ids
    assert text.decode(ids) == "a naïve <-pad-> dot<|endoftext|>"
    assert writer.text(ids) == "a naïve <-pad-> dot"
    assert writer.prompts("red", 3).tolist() == [[writer.start, text.id_of("red")]] * 3


def test_tokenizer_file_and_start_of_other_models(parts, tmp_path):
    write_gpt2(tmp_path / "plain", start=False)
    writer = load_writer(tmp_path / "plain", "cpu")
    assert writer.start == writer.end
    text = Gpt2Tokenizer(tmp_path / "plain")
    text._tokenizer.save(str(tmp_path / "plain" / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "plain" / name).unlink()
    again = Gpt2Tokenizer(tmp_path / "plain")
    assert again.encode("red dots") == text.encode("red dots")
    assert again.decode(again.encode("red dots")) == "red dots"


@pytest.mark.skipif(peers.why_not("transformers") is not None, reason=str(peers.why_not("transformers")))
def test_ids_are_those_of_transformers(parts):
    transformers = peers.load("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(parts["gpt2"])
    ours = Gpt2Tokenizer(parts["gpt2"])
    for text in ("red dots, red", "  naïve\n<-start_of_text->red", "été 12 <|endoftext|> x"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(
            ours.encode(text), clean_up_tokenization_spaces=False
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"--k": "0", "--alpha": "2"}, "k must be at least 1, got 0; alpha must be in [0, 1], got 2.0"),
        ({"--beta": "-1"}, "beta must be finite and not negative, got -1.0"),
        ({"--length": "0"}, "length must be at least 1, got 0"),
        ({"--length": "24"}, "prompt and length must be at most 23 tokens together, got 0 and 24"),
        ({"--batch-size": "0"}, "batch_size must be at least 1, got 0"),
        ({"--language-model": "none"}, "language_model: folder none does not exist"),
        ({"--language-model": "{clip}"}, "must be of type decoder, got clip"),
        ({"--scorer": "{simvlm}"}, "must be of type clip or align, got simvlm"),
        ({"--scorer": "none"}, "model: folder none does not exist"),
        ({"--device": "abacus"}, "device: 'abacus' cannot be used here"),
    ],
)
def test_wrong_use_is_one_error(parts, table, capsys, given, message):
    options = {"--language-model": parts["lm"], "--scorer": parts["clip"], **given}
    flags = [text.format(**parts) for option in options.items() for text in option]
    with pytest.raises(SystemExit) as error:
        main(["magic", str(table.parent / "0.png"), *flags])
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def damage_vocabulary(folder):
    (folder / "vocab.json").write_text("[1, 2")


def move_added_tokens(folder):
    (folder / "added_tokens.json").write_text('{"<-pad->": 3}')


def remove_merges(folder):
    (folder / "merges.txt").unlink()


def shrink_model(folder):
    write_gpt2(folder.with_name("small"), start=False)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder.with_name("small") / name, folder / name)


def take_away_the_end(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    text = Gpt2Tokenizer(folder)
    content = json.loads(text._tokenizer.to_str())
    content["added_tokens"] = []
    content["model"]["vocab"] = {name: i for name, i in vocabulary.items() if "endoftext" not in name}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (damage_vocabulary, ValueError, "the files of its tokenizer cannot be read"),
        (move_added_tokens, ValueError, "gives <-pad-> ids that do not follow the vocabulary"),
        (remove_merges, FileNotFoundError, r"must contain tokenizer.json, or vocab.json and merges.txt"),
        (shrink_model, ValueError, "must have at most the model's 263 ids, got 265"),
        (take_away_the_end, ValueError, r"must have <\|endoftext\|>"),
    ],
)
def test_damaged_folders_of_gpt2(tmp_path, change, error, message):
    write_gpt2(tmp_path / "gpt2")
    change(tmp_path / "gpt2")
    with pytest.raises(error, match=message):
        load_writer(tmp_path / "gpt2", "cpu")


def test_invalid_use_from_python(parts, table):
    with pytest.raises(ValueError, match="inputs must be a sequence of paths, got one str"):
        magic(str(table), parts["lm"], parts["clip"])
    writer, judge = load_writer(parts["lm"], "cpu"), load_judge(parts["clip"], "cpu")
    assert write_guided(writer, judge, torch.zeros(0, 16)) == []
    assert not writer.model.training
