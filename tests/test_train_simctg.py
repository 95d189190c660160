"""SimCTG's loss by the published formula, the recipe of `train lm` with it, captions without images."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train_tiny import metrics, tiny_values, write_pairs
from vlmkernels.cli import main
from vlmkernels.data import CaptionLines, load_pairs
from vlmkernels.models.parts import token_contrast as parts
from vlmkernels.models.parts.token_contrast import token_contrast
from vlmkernels.testing import assert_as_good
from vlmkernels.train import TrainConfig, kinds, train
from vlmkernels.use.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


def published(hidden, mask, margin):
    """The matrices of the published code: a score matrix, its diagonal, a mask of pairs without it."""
    unit = hidden / hidden.norm(dim=2, keepdim=True)
    scores = unit @ unit.transpose(1, 2)  # [B, T, T]
    gold = torch.diagonal(scores, dim1=1, dim2=2)[..., None]
    losses = torch.relu(margin - (gold - scores))
    valid = mask[:, :, None] * mask[:, None, :] * (1 - torch.eye(mask.shape[1]).to(mask))
    return (losses * valid).sum() / valid.sum()


def states(seed=0, lengths=(7, 2, 5, 1), dtype=torch.float64):
    """Hidden states with much in common, as those of language models have; rows of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), 12)
    hidden = torch.randn(shape, generator=generator, dtype=torch.float64) + torch.ones(12).double()
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).double()
    return hidden.to(dtype), mask


@pytest.mark.parametrize("block", [9, 20, 2**20], ids=lambda block: f"block{block}")
@pytest.mark.parametrize("margin", [0.3, 0.5, 1.4])
def test_equals_the_published_formula(monkeypatch, margin, block):
    """Loss and gradient, whatever the size of the blocks; padding gets no gradient."""
    monkeypatch.setattr(parts, "BLOCK", block)
    hidden, mask = states()
    hidden.requires_grad_()
    loss, pairs = token_contrast(hidden, mask, margin)
    wanted = published(hidden, mask, margin)
    torch.testing.assert_close(loss, wanted)
    assert pairs.item() == 7 * 6 + 2 + 5 * 4
    (found,), (expected,) = (torch.autograd.grad(3 * x, hidden) for x in (loss, wanted))
    torch.testing.assert_close(found, expected)
    assert found[mask == 0].eq(0).all()
    assert found[0].abs().max() > 1e-3


def test_gradcheck():
    hidden, mask = states(lengths=(3, 2))
    hidden = hidden[..., :4].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_contrast(x, mask, 0.9)[0], hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    hidden, mask = states(dtype=dtype)
    found, truth = token_contrast(hidden, mask)[0], published(hidden.double(), mask, 0.5)
    assert_as_good(found, published(hidden.float(), mask.float(), 0.5), truth)
    with torch.autocast("cpu", torch.bfloat16):
        assert token_contrast(hidden, mask)[0].equal(found)


def test_rows_without_pairs():
    hidden, mask = states(lengths=(1, 1))
    hidden.requires_grad_()
    loss, pairs = token_contrast(hidden, mask)
    loss.backward()
    assert (loss.item(), pairs.item()) == (0.0, 0)
    assert hidden.grad.eq(0).all()
    empty = torch.zeros(0, 3, 4, requires_grad=True)
    token_contrast(empty, torch.zeros(0, 3))[0].backward()
    assert empty.grad.shape == (0, 3, 4)


def test_no_matrix_of_all_pairs(monkeypatch):
    """The largest tensor has the size of the states, or that of a block."""

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(each, torch.Tensor):
                    self.largest = max(self.largest, each.numel())
            return out

    monkeypatch.setattr(parts, "BLOCK", 4096)
    hidden, mask = states(lengths=(128,) * 4)
    hidden.requires_grad_()
    with Sizes() as sizes:
        token_contrast(hidden, mask)[0].backward()
    assert sizes.largest <= max(hidden.numel(), 4096) < 4 * 128 * 128


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def lines(table):
    """The captions of the table, one a line, between empty lines and one that is no text."""
    captions = [row.split("\t")[1] for row in table.read_text().splitlines()[1:]]
    path = table.with_name("captions.txt")
    path.write_bytes(("\n\n".join(captions) + "\n").encode() + b"caf\xe9\n")
    return path


def test_the_recipe_spreads_hidden_states(lines, tmp_path, capsys):
    """With the term the similarity of a caption's tokens falls below that without it; both learn."""
    spread = {}
    for weight in (0.0, 1.0):
        values = tiny_values(lines, tmp_path / str(weight), "lm", epochs=20, lr=0.02, augment={})
        summary = train("lm", TrainConfig(**{**values, "data": f"lines:{lines}"}, contrastive_weight=weight))
        run = metrics(tmp_path / str(weight))
        assert run[-1]["perplexity"] < 0.5 * run[0]["perplexity"]
        assert ("contrastive" in run[-1]) == ("contrastive" in summary.scores) == (weight > 0)
        model, tokenizer, _ = load(summary.final)
        tokens = tokenizer.interleaved([[text] for text in CaptionLines(lines).names])
        mask = (tokens != tokenizer.pad_id).long()
        hidden = model(tokens, mask, output_hidden_states=True).hidden_states[-1]
        spread[weight] = token_contrast(hidden, mask)[0].item()
        assert evaluate(summary.final, f"lines:{lines}", device="cpu").samples == 22
    assert spread[1.0] < 0.5 * spread[0.0]
    for line in run:
        logged = line["loss"] - line["contrastive"]
        assert torch.tensor(logged).exp().item() == pytest.approx(line["perplexity"], rel=1e-5)


def load(folder):
    from vlmkernels.use.bundle import load_model

    return load_model(folder, "cpu", fitting=kinds.every())


def test_a_step_is_the_sum_of_both_losses(table):
    """The loss of a batch against the formula on the model's own hidden states."""
    config = TrainConfig(**tiny_values(table, table.parent, "lm"), contrastive_weight=0.3)
    kind = kinds.find("lm")
    tokenizer = kind.build_tokenizer(config, None)
    torch.manual_seed(0)
    model = kind.build_model(config, tokenizer).double()
    samples = [
        {"image": None, "text": text, "key": text} for text in ("a red dot", "ring", "dark blue square")
    ]
    task = kind.build_task(config, tokenizer)
    batch = task.collate(samples)
    loss, measure = task.loss(model, batch, 0, True)
    mask = (batch["tokens"] != tokenizer.pad_id).long()
    out = model(batch["tokens"], mask, output_hidden_states=True)
    labels = kind.labels(tokenizer, batch["tokens"])[:, 1:].flatten()
    likelihood = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels, ignore_index=-100)
    contrast = published(out.hidden_states[-1], mask.double(), 0.5)
    torch.testing.assert_close(loss, likelihood + 0.3 * contrast)
    assert measure()["contrastive"] == pytest.approx(contrast.item())
    assert measure()["loss"] == pytest.approx(loss.item())
    assert measure()["perplexity"] == pytest.approx(likelihood.exp().item())


def test_caption_lines(lines, tmp_path):
    source = load_pairs(f"lines:{lines}")
    assert isinstance(source, CaptionLines)
    assert len(source) == 22 == len(source.names)
    assert source[1] == {"image": None, "text": source.names[1], "key": "line 3", "label": -1, "concept": -1}
    assert source[-1]["key"] == "line 43"
    assert list(source.skipped) == ["line 44"]
    with pytest.raises(IndexError, match="index 22 is out of range for 22 samples"):
        source[22]
    with pytest.raises(FileNotFoundError, match="path must be a text file, got none"):
        load_pairs("lines:none")
    with pytest.raises(ValueError, match=r"options of CaptionLines must be none, got \['caption'\]"):
        load_pairs(f"lines:{lines}", caption="label")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="has no line with a caption"):
        load_pairs(f"lines:{tmp_path / 'empty.txt'}")


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("lm", ["--contrastive-weight", "-1"], "contrastive_weight must not be negative, got -1.0"),
        ("lm", ["--contrastive-margin", "2"], "contrastive_margin must be in (0, 2), got 2.0"),
        ("clip", ["--contrastive-weight", "1"], "contrastive_weight may only be given for lm, got 1.0"),
        ("clip", [], "data: clip needs images, which CaptionLines("),
    ],
)
def test_wrong_use_is_one_error(lines, tmp_path, capsys, kind, more, message):
    with pytest.raises(SystemExit) as error:
        main(["train", kind, "--data", f"lines:{lines}", "--out", str(tmp_path / "run"), *more])
    assert error.value.code == 2
    assert re.search(re.escape(message), capsys.readouterr().err)
