"""The gradient of Flamingo's embedding keeps to two rows, whatever tensor its weight becomes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from tests.every_model import one_process
from tests.flamingo_tiny import END, MEDIA, config, flamingo, inputs
from tests.test_models_flamingo import loss_of
from vlmkernels.models.flamingo import Flamingo


def assigned(model):
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return model


def assigned_through_a_parent(model):
    assigned(nn.ModuleDict({"flamingo": model}))
    return model


def made_on_meta(model):
    with torch.device("meta"):
        empty = Flamingo(config())
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    return empty


def moved_to_new_parameters(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        return model.double().float()


def given_another_embedding(model):
    old = model.lang_encoder.transformer.wte
    model.lang_encoder.transformer.wte = nn.Embedding(*old.weight.shape)
    model.lang_encoder.transformer.wte.load_state_dict(old.state_dict())
    return model


def given_another_weight(model):
    embedding = model.lang_encoder.transformer.wte
    embedding.weight = nn.Parameter(embedding.weight.detach().clone())
    return model


WAYS = {
    "as it is": lambda model: model,
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "assign": assigned,
    "assign through a parent": assigned_through_a_parent,
    "meta": made_on_meta,
    "moved": moved_to_new_parameters,
    "embedding": given_another_embedding,
    "weight": given_another_weight,
}


def rows_of(gradient) -> list[int]:
    return gradient.abs().sum(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_two_rows_are_trained(way):
    model = way(flamingo())
    wanted = flamingo()
    for each in (model, wanted):
        loss_of(each).backward()
        loss_of(each, 1).backward()
    gradient, want = (each.lang_encoder.transformer.wte.weight.grad for each in (model, wanted))
    assert rows_of(gradient) == [MEDIA, END]
    torch.testing.assert_close(gradient, want)


def test_the_language_model_called_alone_keeps_to_them():
    model = given_another_weight(flamingo())
    model.lang_encoder(inputs()[1]).logits.sum().backward()
    assert set(rows_of(model.lang_encoder.transformer.wte.weight.grad)) <= {MEDIA, END}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("way", [copy.deepcopy, assigned])
def test_compiled_models_keep_to_them(way):
    model = way(flamingo())
    torch._dynamo.reset()
    loss_of(torch.compile(model, backend="aot_eager")).backward()
    assert rows_of(model.lang_encoder.transformer.wte.weight.grad) == [MEDIA, END]


@pytest.mark.parametrize(
    "parts", [(), ("lang_encoder.transformer.wte", "perceiver", "vision_encoder")], ids=str
)
def test_shards_keep_to_them(parts):
    model, wanted = flamingo(), flamingo()
    loss_of(wanted).backward()
    with one_process() as mesh:
        for part in parts:
            fully_shard(model.get_submodule(part), mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss_of(model).backward()
        gradient = model.lang_encoder.transformer.wte.weight.grad.full_tensor()
    assert rows_of(gradient) == [MEDIA, END]
    torch.testing.assert_close(gradient, wanted.lang_encoder.transformer.wte.weight.grad)


def test_frozen_embeddings_stay_frozen():
    model = flamingo()
    model.lang_encoder.transformer.wte.weight = nn.Parameter(
        model.lang_encoder.transformer.wte.weight.detach(), requires_grad=False
    )
    loss_of(model).backward()
    assert model.lang_encoder.transformer.wte.weight.grad is None
