"""Two processes (gloo, CPU) train captioning models as one does on the joint batch, uneven parts included.

The parts differ in samples and in counted tokens; the loss is the mean over all tokens of both. Batch
normalisation takes statistics of each sample alone, as torch has no SyncBatchNorm on the CPU.
"""

import os

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.train_tiny import metrics, per_sample_norm, tiny_values, train_parts, weights, write_pairs
from tests.two_processes import run_two
from vlmkernels.train import TrainConfig, kinds, load_bundle, train

KINDS = ("lm", "flamingo", "simvlm", "virtex", "visualgpt")
SHARDS = ((4, 3), (1, 6))
TEXTS = ("red", "dark green square dot 7", "a", "blue ring", "light stripe cross", "dot dot dot 3", "ring")

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def step(kind, config, parts, shard, wrap=lambda model: model):
    """Joint loss, its scores and the gradients of one step on the samples of ``shard``, in fp64."""
    torch.manual_seed(0)
    tokenizer = load_bundle(parts["language_model"]).tokenizer
    model = kinds.find(kind).build_model(config, tokenizer).double()
    for parameter in model.parameters():  # gates of 0 would hide the resampler
        if parameter.requires_grad and parameter.numel() == 1:
            parameter.data.fill_(0.5)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(len(TEXTS), 3, 16, 16, generator=generator, dtype=torch.float64)
    samples = [{"image": images[i], "text": TEXTS[i], "key": f"k{i}"} for i in shard]
    task = kinds.find(kind).build_task(config, tokenizer)
    model = wrap(model.train())
    loss, measure = task.loss(model, task.collate(samples), 4, True)
    loss.backward()
    gradients = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    return measure(), gradients


def run_values(table, out, kind, parts):
    """23 pairs in joint batches of 7, 7, 7 and 2 with plain SGD."""
    own = {"flamingo": parts, "lm": {"contrastive_weight": 0.7}}.get(kind, {})
    return tiny_values(
        table, out, kind, batch_size=7, epochs=2, optimizer="sgd", lr=0.05, device="cpu", **own
    )


def worker(rank, folder, table, parts):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with per_sample_norm():
        results = {}
        for kind in KINDS:
            config = TrainConfig(**run_values(table, folder, kind, parts))
            for shards in SHARDS:
                shard = torch.arange(7).split(shards)[rank].tolist()
                results[kind, shards] = step(kind, config, parts, shard, DistributedDataParallel)
        torch.save(results, f"{folder}/{rank}.pt")
        for kind in KINDS:
            train(kind, TrainConfig(**run_values(table, f"{folder}/two-{kind}", kind, parts)))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    table = write_pairs(folder, 23)
    parts = train_parts(table, folder / "parts", lm_epochs=3)
    run_two(worker, (str(folder), str(table), parts))
    with per_sample_norm():
        for kind in KINDS:
            train(kind, TrainConfig(**run_values(table, folder / f"one-{kind}", kind, parts)))
    return folder, table, parts


@pytest.mark.parametrize("shards", SHARDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_joint_batch(setup, kind, shards):
    folder, table, parts = setup
    with per_sample_norm():
        scores, gradients = step(
            kind, TrainConfig(**run_values(table, folder, kind, parts)), parts, list(range(7))
        )
    for rank in range(2):
        rank_scores, rank_gradients = torch.load(folder / f"{rank}.pt", weights_only=True)[kind, shards]
        assert rank_scores == pytest.approx(scores, rel=1e-9)
        assert rank_gradients.keys() == gradients.keys()
        assert any(gradient.abs().max() > 1e-4 for gradient in gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                rank_gradients[name], gradient, rtol=1e-7, atol=1e-12, msg=f"{name}: {{}}".format
            )


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_two_processes_is_training_on_one(setup, kind):
    folder, _, _ = setup
    one, two = metrics(folder / f"one-{kind}"), metrics(folder / f"two-{kind}")
    assert [line["step"] for line in two] == list(range(1, 9))
    for name in ("loss", "perplexity", "grad_norm"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4), name
    expected = weights(folder / f"one-{kind}")
    for name, value in weights(folder / f"two-{kind}").items():
        if "num_batches_tracked" not in name:
            torch.testing.assert_close(
                value, expected[name], rtol=1e-3, atol=1e-5, msg=f"{name}: {{}}".format
            )
