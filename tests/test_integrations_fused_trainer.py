"""`patch(fused_loss=True)` under transformers' Trainer, and on two processes."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import vlmkernels
from benchmarks import peers
from tests.peers.families import tokens
from tests.peers.language_models import LANGUAGE_MODELS, causal_inputs, masked_inputs
from tests.two_processes import run_two

pytestmark = pytest.mark.skipif(
    peers.why_not("transformers") is not None, reason=f"transformers: {peers.why_not('transformers')}"
)
GPT2, LLAMA, BERT = LANGUAGE_MODELS[:3]
STEPS = 3


def losses(model, rows, folder, **options):
    """The loss of each step, and the parameters after them."""
    transformers = peers.load("transformers")
    arguments = transformers.TrainingArguments(
        folder, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1,
        logging_nan_inf_filter=False, max_steps=STEPS, per_device_train_batch_size=2, optim="sgd",
        learning_rate=0.1, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    seen = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(seen) == STEPS
    return torch.tensor(seen), dict(model.named_parameters())


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        (GPT2, {"gradient_accumulation_steps": 3}),
        (LLAMA, {"gradient_accumulation_steps": 2, "bf16": True}),
        (LLAMA, {"gradient_checkpointing": True}),
        (BERT, {"gradient_accumulation_steps": 2}),
        (GPT2, {"label_smoothing_factor": 0.2}),
    ],
)
def test_trainer(family, options, tmp_path, monkeypatch):
    """As many labels as chance gives each row: each batch of an accumulated step has another weight."""
    calls = []
    ours = vlmkernels.linear_cross_entropy
    monkeypatch.setattr(vlmkernels, "linear_cross_entropy", lambda *a, **k: calls.append(a) or ours(*a, **k))
    inputs = masked_inputs() if family is BERT else causal_inputs()
    rows = [{name: x[i % len(x)] for name, x in inputs.items()} for i in range(18)]
    plain = family.build()
    model = copy.deepcopy(plain)
    assert family.patch(model)[0].status == "patched"
    got, wanted = (losses(m, rows, str(tmp_path), **options) for m in (model, plain))
    batches = STEPS * options.get("gradient_accumulation_steps", 1)
    assert len(calls) == (0 if "label_smoothing_factor" in options else batches)
    if "bf16" in options:
        torch.testing.assert_close(got[0].bfloat16(), wanted[0].bfloat16())
    else:
        torch.testing.assert_close(got, wanted)


def step(model, rank):
    """The loss of this process, and the gradients that are the mean over both."""
    model.zero_grad()
    text = tokens(4)[rank::2]
    loss = model(input_ids=text, labels=text, num_items_in_batch=torch.tensor(20)).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def replicated(rank):
    for family in (GPT2, LLAMA):
        plain = family.build().train()
        for module in plain.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        ours = copy.deepcopy(plain)
        assert family.patch(ours)[0].status == "patched"
        torch.testing.assert_close(
            *(step(nn.parallel.DistributedDataParallel(model), rank) for model in (ours, plain))
        )


def sharded(rank):
    for shards_head in (False, True):  # which hooks on the head gather; or those of the model, with its own
        results = []
        for fused in (False, True):
            model = LLAMA.build().train()
            if fused:
                LLAMA.patch(model)
            for layer in (*model.model.layers, *([model.lm_head] if shards_head else [])):
                fully_shard(layer)
            fully_shard(model)
            text = tokens(4)[rank::2]
            out = model(input_ids=text, labels=text)
            out.loss.backward()
            assert (out.logits is None) is (fused and not shards_head)
            results.append([out.loss.detach(), *(p.grad.full_tensor() for p in model.parameters())])
        torch.testing.assert_close(*results)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    replicated(rank)
    sharded(rank)
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """The same loss and gradients as the plain model, under DistributedDataParallel and fully_shard."""
    run_two(worker, (str(tmp_path),))
