"""Patched losses on two processes: the losses, and the gradients that DistributedDataParallel averages."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks import peers
from tests.two_processes import run_two
from vlmkernels.integrations import patch

LIBRARIES = ("open_clip", "sentence_transformers")
HERE = [library for library in LIBRARIES if peers.why_not(library) is None]


def losses(rank):
    """Every way to gather features that patch takes."""
    if "open_clip" in HERE:
        loss = peers.load("open_clip.loss")
        both = {"rank": rank, "world_size": 2}
        for local in (False, True):
            yield lambda local=local: loss.ClipLoss(local_loss=local, gather_with_grad=True, **both)
        for impl in ("bidir", "shift", "reduce", "gather"):
            yield lambda impl=impl: loss.SigLipLoss(dist_impl=impl, **both)
    if "sentence_transformers" in HERE:
        ranking = peers.load("sentence_transformers.sentence_transformer.losses").MultipleNegativesRankingLoss
        for options in (
            {},
            {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        ):
            yield lambda options=options: ranking(None, gather_across_devices=True, **options)


def step(loss, rank):
    """The loss of this process, and the gradients of a shared layer."""
    torch.manual_seed(0)
    tower = nn.parallel.DistributedDataParallel(nn.Linear(6, 8))
    images, texts = (nn.functional.normalize(tower(x[rank::2]), dim=-1) for x in torch.randn(2, 8, 6))
    if hasattr(loss, "compute_loss_from_embeddings"):
        value = loss.compute_loss_from_embeddings([images, texts], torch.zeros(4))
    else:
        value = loss(
            images, texts, torch.tensor(10.0), *([torch.tensor(-5.0)] if "Sig" in type(loss).__name__ else [])
        )
    value.backward()
    return [value.detach(), *(p.grad for p in tower.parameters())]


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for make in losses(rank):
        plain, ours = make(), make()
        assert patch(ours).patched
        for got, wanted in zip(step(ours, rank), step(plain, rank), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    dist.destroy_process_group()


@pytest.mark.skipif(not HERE, reason="neither open_clip nor sentence-transformers is installed")
def test_two_processes(tmp_path):
    run_two(worker, (str(tmp_path),))
