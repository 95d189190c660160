"""Two processes (gloo, CPU) do what one process does on the joint batch, uneven batches included.

Batch normalisation in training mode is the exception: torch has no SyncBatchNorm on the CPU, so each process
normalises with the statistics of its own part. ALIGN is therefore compared with its normalisation in
evaluation mode, or with statistics of each sample alone; what is tested is everything else.
"""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.train_tiny import (
    TINY_ALIGN,
    TINY_CLIP,
    metrics,
    per_sample_norm,
    tiny_values,
    weights,
    write_pairs,
)
from tests.two_processes import run_two
from vlmkernels.models.align import ALIGN, AlignConfig
from vlmkernels.models.clip import CLIP, ClipConfig
from vlmkernels.train import TrainConfig, kinds, loop, objective, train

KINDS = ("clip", "align", "siglip")
SHARDS = ((4, 3), (1, 6), (3, 3))

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def build(kind):
    """The same model in every process, in fp64, every batch normalisation with statistics of its own."""
    torch.manual_seed(0)
    if kind == "align":
        model = ALIGN(AlignConfig(**TINY_ALIGN, image_projection=True, text_dropout=0.0, drop_rate=0.0))
    else:
        bias = {"init_logit_bias": -3.0} if kind == "siglip" else {}
        model = CLIP(ClipConfig(**TINY_CLIP, **bias, eot_id=599))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.double().eval()


def batch(size):
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 190, (size, 12), generator=generator)
    tokens[:, -1] = 599
    return images, tokens


def step(kind, model, images, tokens):
    """Loss and gradients of one step of the loop's objective."""
    if kind == "align":
        tokens = tokens.clamp(max=199)
    output = model(images, tokens)
    features = objective.joint_features(output)
    loss = objective.contrastive_loss(
        *features,
        output["logit_scale"],
        output.get("logit_bias"),
        label_smoothing=kinds.find(kind).label_smoothing or 0.0,
    )
    loss.backward()
    return loss.detach(), {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def worker(rank, folder, table):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for kind in KINDS:
        for shards in SHARDS:
            part = [values.split(shards)[rank] for values in batch(sum(shards))]
            results[kind, shards] = step(kind, DistributedDataParallel(build(kind)), *part)
    torch.save(results, f"{folder}/{rank}.pt")
    with per_sample_norm():
        for kind in KINDS:
            train(kind, TrainConfig(**run_values(table, f"{folder}/two-{kind}", kind)))
    dist.destroy_process_group()


def run_values(table, out, kind):
    """23 pairs in joint batches of 7, 7, 7 and 2 with plain SGD."""
    return tiny_values(table, out, kind, batch_size=7, epochs=2, optimizer="sgd", lr=0.05, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    table = write_pairs(folder, 23)
    run_two(worker, (str(folder), str(table)))
    with per_sample_norm():
        for kind in KINDS:
            train(kind, TrainConfig(**run_values(table, folder / f"one-{kind}", kind)))
    return folder


@pytest.mark.parametrize("shards", SHARDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_joint_batch(folder, kind, shards):
    loss, gradients = step(kind, build(kind), *batch(sum(shards)))
    for rank in range(2):
        rank_loss, rank_gradients = torch.load(folder / f"{rank}.pt", weights_only=True)[kind, shards]
        torch.testing.assert_close(rank_loss, loss, rtol=1e-10, atol=0)
        assert rank_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                rank_gradients[name], gradient, rtol=1e-8, atol=1e-12, msg=f"{name}: {{}}".format
            )


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_two_processes_is_training_on_one(folder, kind):
    one, two = metrics(folder / f"one-{kind}"), metrics(folder / f"two-{kind}")
    assert [line["step"] for line in two] == list(range(1, 9))
    for name in ("loss", "grad_norm", "logit_scale", "retrieval_at_1"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4), name
    expected = weights(folder / f"one-{kind}")
    for name, value in weights(folder / f"two-{kind}").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=f"{name}: {{}}".format)


def test_each_process_keeps_its_random_state(folder):
    state = torch.load(folder / "two-clip" / "checkpoints" / "step-00000008" / "state.pt", weights_only=True)
    first, second = state["random"]
    assert not first["torch"].equal(second["torch"])


def test_several_processes_need_a_folder(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="several processes need --out"):
        loop.locate("clip", TrainConfig())
