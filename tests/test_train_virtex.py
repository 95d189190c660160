"""What only VirTex's training has: its other tasks, two learning rates, Lookahead, flipped captions."""

import math

import pytest
import torch

from tests.train_tiny import TINY, assert_same_run, metrics, tiny_values, weights, write_pairs
from vlmkernels.cli import main
from vlmkernels.data import CaptionTokenizer, load_scenes
from vlmkernels.models.decoder import IGNORE
from vlmkernels.train import TrainConfig, kinds, load_bundle, train
from vlmkernels.train.kinds.virtex import mask_captions
from vlmkernels.train.optim import Lookahead

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = ("captioning", "masked_lm", "token_classification")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def values(table, tmp_path):
    def make(name="run", task="bicaptioning", **more):
        options = {"model_options": {**TINY["virtex"], "task": task}}
        return {**tiny_values(table, tmp_path / name, "virtex", **options), **more}

    return make


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_learn_and_resume(values, table, tmp_path, task, capsys):
    options = {"task": task, "epochs": 8, "augment": {}, "lr": 2e-2}
    train("virtex", TrainConfig(**values("whole", **options)))
    lines = metrics(tmp_path / "whole")
    assert sum(line["loss"] for line in lines[-6:]) < 0.9 * sum(line["loss"] for line in lines[:6])
    assert lines[-1]["perplexity"] == pytest.approx(math.exp(lines[-1]["loss"]))
    if task == "masked_lm":  # whose masks are drawn in each step
        train("virtex", TrainConfig(**values("cut", **options, save_every=7, max_steps=7)))
        train("virtex", TrainConfig(**values("cut", **options, save_every=7, resume="auto")))
        assert_same_run(tmp_path / "whole", tmp_path / "cut")
    model = load_bundle(tmp_path / "whole" / "final").model
    assert model.config.task == task
    start = str(tmp_path / "whole" / "final")
    again = values("again", epochs=1, init=start, lr=1e-12, max_steps=1)
    train("virtex", TrainConfig(**again))  # of the task of the model that it starts from
    assert load_bundle(tmp_path / "again" / "final").model.config.task == task
    if task != "captioning":
        uses = {
            f"model: one of task {task!r} writes no captions": ["eval", "--data", str(table)],
            f"generate: task must be one of ('bicaptioning', 'captioning'), got {task!r}": [
                "caption",
                str(table.parent / "0.png"),
            ],
        }
        for message, (command, *arguments) in uses.items():
            with pytest.raises(SystemExit):
                main([command, "--model", start, "--device", "cpu", *arguments])
            assert message in capsys.readouterr().err


def test_masks_are_those_published():
    tokenizer = CaptionTokenizer(24, 602)
    texts = ["a fox to the left of an owl above a key and more", "fox"] * 500
    batch = {"tokens": tokenizer(texts), "keys": [str(i) for i in range(1000)]}
    found = mask_captions(tokenizer, batch, 3, 7)
    masked, labels, tokens = found["masked"], found["labels"], batch["tokens"]
    inner = (tokenizer.lengths(tokens) - 2)[:, None]
    place = torch.arange(tokens.shape[1])
    outside = (place == 0) | (place > inner)
    assert masked[outside].equal(tokens[outside])
    assert (labels[outside] == IGNORE).all()
    predicted, changed = labels != IGNORE, masked != tokens
    assert labels[predicted].equal(tokens[predicted])
    assert (masked[predicted] == tokenizer.image_id).all()
    assert (predicted[1::2].sum(1) == 1).all()  # one alone is always the mask
    drawn = math.ceil(0.15 * int(inner[0]))
    assert drawn > 1
    assert 0.82 < predicted[::2].sum() / (500 * drawn) < 0.88
    assert 0.07 < (changed & ~predicted)[::2].sum() / (500 * drawn) < 0.13
    assert predicted[::2].any(0)[1 : int(inner[0]) + 1].all()
    again = mask_captions(tokenizer, {"tokens": tokens[4:6], "keys": batch["keys"][4:6]}, 3, 7)
    assert again["masked"].equal(masked[4:6])  # whatever the rest of the batch
    assert not mask_captions(tokenizer, batch, 3, 8)["masked"].equal(masked)


def test_trunk_and_head_have_their_learning_rates(values, tmp_path):
    kind, config = kinds.find("virtex"), TrainConfig(**values(trunk_lr=0.3, lr=0.1, weight_decay=0.2))
    model = kind.build_model(config, kind.build_tokenizer(config, None))
    groups = kind.parameter_groups(config, model)
    trunk = {id(p) for p in model.visual.parameters()}
    counted = 0
    for group in groups:
        for parameter in group["params"]:
            assert group["lr_scale"] == (pytest.approx(3.0) if id(parameter) in trunk else 1.0)
            assert group["weight_decay"] == (0.2 if parameter.ndim >= 2 else 0.0)
            counted += 1
    assert counted == len(list(model.parameters()))
    common = {"optimizer": "sgd", "augment": {}, "weight_decay": 0.0, "grad_clip": 0.0, "warmup_steps": 0}
    for name, rate in (("frozen", 1e-12), ("same", None), ("equal", 0.05)):
        train("virtex", TrainConfig(**values(name, **common, lr=0.05, trunk_lr=rate, epochs=1)))
    assert_same_run(tmp_path / "same", tmp_path / "equal")
    frozen = weights(tmp_path / "frozen")
    stem = frozen["visual.conv1.weight"]
    assert not stem.equal(weights(tmp_path / "same")["visual.conv1.weight"])
    train("virtex", TrainConfig(**values("less", **common, lr=1e-12, epochs=1)))
    assert weights(tmp_path / "less")["visual.conv1.weight"].allclose(stem)
    assert frozen["output_bias"].abs().max() > 1e-3


def test_lookahead_is_its_definition():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    lookahead = Lookahead(parameters, 3, 0.5)
    fast = slow = [p.detach().clone() for p in parameters]
    for updates in range(1, 8):
        change = [torch.randn_like(p) for p in parameters]
        with torch.no_grad():
            for parameter, step in zip(parameters, change, strict=True):
                parameter.add_(step)
        lookahead.after_update(updates)
        fast = [a + b for a, b in zip(fast, change, strict=True)]
        if updates % 3 == 0:
            fast = slow = [a + 0.5 * (b - a) for a, b in zip(slow, fast, strict=True)]
        torch.testing.assert_close([p.detach() for p in parameters], fast)
        torch.testing.assert_close(lookahead.slow, slow)
    with lookahead.slow_weights():
        torch.testing.assert_close([p.detach() for p in parameters], slow)
    torch.testing.assert_close([p.detach() for p in parameters], fast)


def test_lookahead_saves_and_resumes_its_slow_weights(values, tmp_path):
    """11 updates with steps of 5: the model saved is that after the tenth, also of a run cut at 8."""
    options = {"lookahead_steps": 5, "save_every": 8}
    train("virtex", TrainConfig(**values("ten", **options, max_steps=10)))
    train("virtex", TrainConfig(**values("whole", **options, max_steps=11)))
    train("virtex", TrainConfig(**values("cut", **options, max_steps=8)))
    train("virtex", TrainConfig(**values("cut", **options, max_steps=11, resume="auto")))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    ten, whole = weights(tmp_path / "ten"), weights(tmp_path / "whole")
    trained = [name for name in ten if "running" not in name and "num_batches" not in name]
    assert all(ten[name].equal(whole[name]) for name in trained)
    train("virtex", TrainConfig(**values("plain", max_steps=10)))
    assert metrics(tmp_path / "plain")[:5] == metrics(tmp_path / "ten")[:5]
    assert metrics(tmp_path / "plain") != metrics(tmp_path / "ten")


def test_flipped_scenes_have_flipped_captions(values):
    kind = kinds.find("virtex")
    config = TrainConfig(**values(augment={"flip": 1.0, "caption_flip": True, "crop_scale": [1.0, 1.0]}))
    transform = kind.build_transform(config)
    plain, flipped = (
        load_scenes("train", size=40, transform=each)
        for each in (transform, kind.drawn_transform(config, transform))
    )
    assert any("left" in name for name in plain.names)
    for i in range(40):
        text = plain[i]["text"]
        assert flipped[i]["text"] == text.replace("to the left of", "to the right of")
        torch.testing.assert_close(flipped[i]["image"], plain[i]["image"].flip(2), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"trunk_lr": 0.0}, "trunk_lr must be positive, got 0.0"),
        ({"lookahead_steps": -1}, "lookahead_steps must not be negative, got -1"),
        ({"lookahead_alpha": 1.5}, r"lookahead_alpha must be in \(0, 1\], got 1.5"),
        ({"lookahead_steps": 5, "ema_decay": 0.9}, "lookahead_steps must be 0 with ema_decay"),
        ({"augment": {"caption_flip": 1}}, "caption_flip must be a bool, got 1"),
        ({"task": "reading"}, "task must be one of"),
        ({"model": "R50"}, "virtex has no configuration 'R50'; it has bicaptioning_R_50_L1_H512"),
    ],
)
def test_bad_use_is_a_clear_error(values, more, message):
    with pytest.raises(ValueError, match=message):
        train("virtex", TrainConfig(**values(**more)))


def test_trunk_lr_is_for_virtex(table, tmp_path):
    config = TrainConfig(**tiny_values(table, tmp_path / "run", "simvlm", trunk_lr=0.1))
    with pytest.raises(ValueError, match=r"trunk_lr may only be given for virtex, got 0.1"):
        train("simvlm", config)


def test_a_run_without_lookahead_does_not_resume_with_it(values):
    train("virtex", TrainConfig(**values(max_steps=3)))
    with pytest.raises(ValueError, match="lookahead_steps was 0, got 5"):
        train("virtex", TrainConfig(**values(max_steps=4, resume="auto", lookahead_steps=5)))
