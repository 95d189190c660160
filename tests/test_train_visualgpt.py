"""Training of VisualGPT: from nothing, from a language model, on region features, and by CIDEr-D."""

import os

import numpy
import pytest
import torch
import torch.distributed as dist

from tests.train_tiny import (
    TINY,
    TINY_LM,
    assert_same_run,
    metrics,
    per_sample_norm,
    tiny_values,
    weights,
    write_pairs,
    write_tar,
)
from tests.two_processes import run_two
from vlmkernels.cli import main
from vlmkernels.data import BrokenImageError, CsvPairs, load_scenes, read_regions
from vlmkernels.train import TrainConfig, kinds, load_bundle, train
from vlmkernels.train.kinds.visualgpt import SelfCritical
from vlmkernels.use.caption import caption
from vlmkernels.use.caption_scores import reference_scores
from vlmkernels.use.cider import CiderD
from vlmkernels.use.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = (
    "a red fox above a key",
    "the owl",
    "a key above a red fox near the owl",
    "a fox above a key",
    "crab",
)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def learned(table, tmp_path_factory):
    """A run that knows the 22 pairs by heart."""
    out = tmp_path_factory.mktemp("runs") / "visualgpt"
    values = tiny_values(table, out, "visualgpt", augment={}, epochs=80, lr=2e-2)
    train("visualgpt", TrainConfig(**values))
    return out


@pytest.fixture
def values(table, tmp_path):
    return lambda name="run", **more: tiny_values(table, tmp_path / name, "visualgpt", **more)


def test_learns_the_captions_and_writes_them(learned, table, capsys):
    lines = metrics(learned)
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
    result = evaluate(learned / "final", str(table), device="cpu")
    assert result.perplexity < 2
    assert result.token_accuracy > 0.75
    found = caption(learned / "final", [table.parent / "3.png"], device="cpu", num_beams=3)
    main(["caption", "--model", str(learned / "final"), "--num-beams", "3", str(table.parent / "3.png")])
    assert found.captions[0][1] in capsys.readouterr().out


def test_interrupted_run_resumes_bit_for_bit(values, tmp_path):
    """Dropout and the captions that self-critical training draws included."""
    options = {**TINY["visualgpt"], "dropout": 0.1, "cross_dropout": 0.1}
    common = {"model_options": options, "self_critical": 2, "epochs": 3}
    train("visualgpt", TrainConfig(**values("whole", **common)))
    train("visualgpt", TrainConfig(**values("cut", **common, max_steps=5, save_every=4)))
    train("visualgpt", TrainConfig(**values("cut", **common, save_every=4, resume="auto")))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_starts_from_a_language_model(values, table, tmp_path):
    language = tiny_values(table, tmp_path / "lm", "lm", epochs=1, model_options={**TINY_LM, "width": 24})
    final = str(train("lm", TrainConfig(**language)).final)
    options = {name: TINY["visualgpt"][name] for name in ("image_size", "conv_blocks", "conv_width")}
    config = TrainConfig(**values(language_model=final, model_options=options))
    kind = kinds.find("visualgpt")
    model = kind.build_model(config, load_bundle(final).tokenizer)
    for name, tensor in load_bundle(final).model.state_dict().items():
        assert model.state_dict()[name].equal(tensor)
    assert train("visualgpt", config).scores["perplexity"] > 1


def test_tars_scenes_and_region_features(values, table, tmp_path):
    tars = write_tar(table, tmp_path / "a.tar")
    train("visualgpt", TrainConfig(**values("tars", data=str(tars), samples_per_epoch=22, epochs=1)))
    scenes = {"data": "scenes:test", "data_options": {"size": 8}, "epochs": 1}
    train("visualgpt", TrainConfig(**values("scenes", **scenes)))
    assert evaluate(tmp_path / "scenes" / "final", load_scenes("test", size=4), device="cpu").slots

    lines = ["filepath\ttitle"]
    for i, text in enumerate(TEXTS):
        numpy.save(
            tmp_path / f"{i}.npy", numpy.random.default_rng(i).normal(size=(2 + i, 6)).astype("float16")
        )
        lines.append(f"{i}.npy\t{text}")
    (tmp_path / "regions.tsv").write_text("\n".join(lines))
    options = {**TINY["visualgpt"], "image_size": None, "region_width": 6}
    common = {"data": str(tmp_path / "regions.tsv"), "model_options": options, "augment": {}}
    train("visualgpt", TrainConfig(**values("regions", **common, epochs=100, lr=1e-2)))
    final = tmp_path / "regions" / "final"
    assert evaluate(final, str(tmp_path / "regions.tsv"), device="cpu").token_accuracy > 0.75
    found = dict(caption(final, [tmp_path / "1.npy", tmp_path / "4.npy"], device="cpu").captions)
    assert found[tmp_path / "4.npy"] == TEXTS[4] != found[tmp_path / "1.npy"]


def test_region_files(tmp_path):
    features = numpy.random.default_rng(0).normal(size=(3, 6))
    numpy.save(tmp_path / "good.npy", features)
    torch.testing.assert_close(read_regions(tmp_path / "good.npy"), torch.from_numpy(features).float())
    numpy.save(tmp_path / "flat.npy", features[0])
    numpy.save(tmp_path / "pickle.npy", numpy.array([{}]))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:100])
    for name, reason in (
        ("flat", r"floating \[N, F\], got float64 \[6\]"), ("pickle", "allow_pickle"), ("cut", "Error"),
        ("none", "No such file"),
    ):  # fmt: skip
        with pytest.raises(BrokenImageError, match=reason):
            read_regions(tmp_path / f"{name}.npy")
    (tmp_path / "t.csv").write_text("filepath,title\ngood.npy,a\ncut.npy,b\n")
    pairs = CsvPairs(tmp_path / "t.csv")
    assert [sample["text"] for sample in pairs.__getitems__([0, 1])] == ["a"]
    assert list(pairs.skipped) == ["cut.npy"]
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "all.hdf5", "w") as file:
        file["42_features"] = features
    assert read_regions(tmp_path / "all.hdf5#42_features").shape == (3, 6)
    with pytest.raises(BrokenImageError):
        read_regions(tmp_path / "all.hdf5#43_features")


def test_cider_d_is_that_of_the_coco_evaluation():
    pytest.importorskip("pycocoevalcap")
    references = {str(i): [text, "an owl"][: 1 + i % 2] for i, text in enumerate(TEXTS)}
    captions = {str(i): text for i, text in enumerate(reversed(TEXTS))}
    score = CiderD(references.values())
    found = [score(captions[key], texts) for key, texts in references.items()]
    assert sum(found) / len(found) == pytest.approx(reference_scores(captions, references)["CIDEr"])
    assert score("", TEXTS[0]) == 0
    assert score(TEXTS[0], TEXTS[0]) > score("a red fox above", TEXTS[0]) > score("crab", TEXTS[0])
    with pytest.raises(ValueError, match="corpus must have"):
        CiderD([])
    with pytest.raises(ValueError, match="references must have"):
        score("a", [])


def test_self_critical_gradient_is_that_of_the_drawn_captions(learned, table):
    """Against the sum of advantage times log-probability over captions of several lengths, each alone."""
    bundle = load_bundle(learned / "final")
    kind, model = kinds.find("visualgpt"), bundle.model.double()
    with torch.no_grad():  # smaller logits, so that captions differ
        for parameter in model.transformer["ln_f"].parameters():
            parameter.mul_(0.5)
    pairs = CsvPairs(table, transform=bundle.transform)
    task = kind.build_task(TrainConfig(data=str(table), self_critical=3), bundle.tokenizer)
    assert isinstance(task, SelfCritical)
    task.prepare(pairs, torch.device("cpu"))
    batch = task.collate([pairs[i] for i in range(4)])
    batch["images"] = batch["images"].double()
    loss, measure = task.loss(model, batch, 7, True)
    model.zero_grad()
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    tokens, rewards = task._drawn(model, batch["images"][:, 0, 0], batch, 7)
    assert measure()["reward"] == pytest.approx(rewards.mean().item())
    assert not torch.equal(tokens, task._drawn(model, batch["images"][:, 0, 0], batch, 8)[0])
    total = 0.0
    longest = max(len(bundle.tokenizer.encode(text)) for text in pairs.names)
    assert tokens.shape[1] == longest + 2 < bundle.tokenizer.context_length  # with start and end
    assert len((tokens != bundle.tokenizer.pad_id).sum(1).unique()) > 1 < len(rewards.unique())
    for i, row in enumerate(tokens):
        length = next(
            (t for t in range(1, len(row)) if row[t] == bundle.tokenizer.endofchunk_id), len(row) - 1
        )
        logits = model(batch["images"][i // 3, :, 0], row[None, : length + 1], return_logits=True)["logits"][
            0
        ]
        logp = logits[:-1].log_softmax(-1)[torch.arange(length), row[1 : length + 1]].sum()
        others = [rewards[i // 3, other] for other in range(3) if other != i % 3]
        advantage = rewards[i // 3, i % 3] - sum(others) / 2
        total = total - advantage * logp / len(tokens)
    model.zero_grad()
    total.backward()
    torch.testing.assert_close(loss, total)
    for name, parameter in model.named_parameters():
        if name in got:
            torch.testing.assert_close(got[name], parameter.grad, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
def test_self_critical_training_raises_the_score(learned, table, tmp_path):
    """From a model that was stopped early; fails if the reward of the last steps is not above the first."""
    start = tiny_values(table, tmp_path / "start", "visualgpt", augment={}, epochs=25, lr=2e-2)
    final = str(train("visualgpt", TrainConfig(**start)).final)
    common = {"init": final, "model_options": {}, "augment": {}, "self_critical": 5}
    train("visualgpt", TrainConfig(**tiny_values(table, tmp_path / "run", **common, epochs=20, lr=1e-3)))
    rewards = [line["reward"] for line in metrics(tmp_path / "run")]
    assert sum(rewards[-12:]) > 1.1 * sum(rewards[:12])


def worker(rank, folder, table):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with per_sample_norm():
        train("visualgpt", TrainConfig(**two_values(table, f"{folder}/two")))
    dist.destroy_process_group()


def two_values(table, out):
    values = {"batch_size": 7, "epochs": 1, "optimizer": "sgd", "lr": 0.05, "device": "cpu"}
    return tiny_values(table, out, "visualgpt", **values, self_critical=3)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_draw_and_train_as_one(tmp_path):
    table = write_pairs(tmp_path, 23)
    run_two(worker, (str(tmp_path), str(table)))
    with per_sample_norm():
        train("visualgpt", TrainConfig(**two_values(table, tmp_path / "one")))
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    first, second = (weights(tmp_path / name) for name in ("one", "two"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"self_critical": 1}, "self_critical must be 0, or at least 2"),
        (
            {"self_critical": 2, "data": "{a..b}.tar", "samples_per_epoch": 4},
            "self_critical needs data whose captions are known",
        ),
        (
            {"language_model": "{final}"},
            "language_model: .* must contain a model for lm, got one for visualgpt",
        ),
        (
            {"init": "{final}", "language_model": "{final}"},
            "language_model may only be given for a visualgpt",
        ),
        ({"model_options": {"tau": 0.9}}, r"tau must be in \[0, 0.5\], got 0.9"),
    ],
)
def test_errors_name_the_setting(values, learned, change, message):
    change = {
        k: v.replace("{final}", str(learned / "final")) if isinstance(v, str) else v
        for k, v in change.items()
    }
    with pytest.raises(ValueError, match=message):
        train("visualgpt", TrainConfig(**{**values(), **change}))
