"""Two processes (gloo, CPU) train VisualBERT as one does on the joint batch, uneven parts included.

Captions of other images come from the joint batch, so that a process may judge one that it has not read.
Batch normalisation takes statistics of each sample alone, as torch has no SyncBatchNorm on the CPU.
"""

import os

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.train_tiny import metrics, per_sample_norm, tiny_values, weights, write_pairs
from tests.two_processes import run_two
from vlmkernels.data import WordPieceTokenizer
from vlmkernels.train import TrainConfig, kinds, train

SHARDS = ((4, 3), (1, 6))
TEXTS = ("red", "dark green square dot 7", "blue", "blue ring", "light stripe cross", "dot dot dot 3", "ring")
STEPS = range(4)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def step(config, shard, number, wrap=lambda model: model):
    """Joint loss, its scores and the gradients of one step on the samples of ``shard``, in fp64."""
    torch.manual_seed(0)
    tokenizer = WordPieceTokenizer.train(TEXTS, 100, 16)
    kind = kinds.find("visualbert")
    model = wrap(kind.build_model(config, tokenizer).double().train())
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(len(TEXTS), 3, 16, 16, generator=generator, dtype=torch.float64)
    rest = {"label": -1, "concept": -1}
    samples = [{"image": images[i], "text": TEXTS[i], "key": f"k{i}", **rest} for i in shard]
    task = kind.build_task(config, tokenizer, 16)
    loss, measure = task.loss(model, task.collate(samples), number, True)
    loss.backward()
    gradients = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    return measure(), gradients


def run_values(table, out):
    """23 pairs in joint batches of 7, 7, 7 and 2 with plain SGD."""
    options = {"optimizer": "sgd", "lr": 0.05, "device": "cpu", "image_dropout": 0.3, "mask_rate": 0.3}
    return tiny_values(table, out, "visualbert", batch_size=7, epochs=2, **options)


def worker(rank, folder, table):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with per_sample_norm():
        config = TrainConfig(**run_values(table, folder))
        results = {
            (shards, number): step(
                config, torch.arange(7).split(shards)[rank].tolist(), number, DistributedDataParallel
            )
            for shards in SHARDS
            for number in STEPS
        }
        torch.save(results, f"{folder}/{rank}.pt")
        train("visualbert", TrainConfig(**run_values(table, f"{folder}/two")))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    table = write_pairs(folder, 23)
    run_two(worker, (str(folder), str(table)))
    with per_sample_norm():
        train("visualbert", TrainConfig(**run_values(table, folder / "one")))
    return folder, table


@pytest.mark.parametrize("shards", SHARDS, ids=str)
def test_loss_and_gradients_are_those_of_the_joint_batch(setup, shards):
    folder, table = setup
    for number in STEPS:
        with per_sample_norm():
            scores, gradients = step(TrainConfig(**run_values(table, folder)), list(range(7)), number)
        for rank in range(2):
            found, parts = torch.load(folder / f"{rank}.pt", weights_only=True)[shards, number]
            assert found == pytest.approx(scores, rel=1e-9)
            assert parts.keys() == gradients.keys()
            assert any(gradient.abs().max() > 1e-4 for gradient in gradients.values())
            for name, gradient in gradients.items():
                torch.testing.assert_close(parts[name], gradient, rtol=1e-7, atol=1e-12, msg=name)


def test_training_on_two_processes_is_training_on_one(setup):
    folder, _ = setup
    one, two = metrics(folder / "one"), metrics(folder / "two")
    assert [line["step"] for line in two] == list(range(1, 9))
    for name in ("loss", "perplexity", "match_accuracy", "grad_norm"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4), name
    expected = weights(folder / "one")
    for name, value in weights(folder / "two").items():
        if "num_batches_tracked" not in name:
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)
