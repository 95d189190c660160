"""Folders in the first version of the formats (tests/data/models-1) load, and compute what was recorded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

from vlmkernels.models import ALIGN, CLIP, CausalLM, Flamingo, SimVLM
from vlmkernels.train.optim import parameter_groups

FOLDER = Path(__file__).parent / "data" / "models-1"


def read(cls, name):
    """The model in float64, in which the outputs were recorded, and these with their inputs."""
    return cls.from_pretrained(FOLDER / name).double(), load_file(FOLDER / name / "expected.safetensors")


def close(got, wanted):
    torch.testing.assert_close(got, wanted.to(got.dtype))


@torch.no_grad()
@pytest.mark.parametrize(("cls", "name"), [(CLIP, "clip"), (ALIGN, "align")])
def test_two_towers(cls, name):
    model, expected = read(cls, name)
    for key, value in model(expected["images"].double(), expected["tokens"]).items():
        close(value, expected[key])


@torch.no_grad()
@pytest.mark.parametrize("form", ["encoder_decoder", "prefix_lm"])
def test_simvlm(form):
    model, expected = read(SimVLM, f"simvlm-{form}")
    images, tokens = expected["images"].double(), expected["tokens"]
    out = model(images, tokens, expected["prefix"], return_logits=True)
    close(out["logits"], expected["logits"])
    close(out["loss"], expected["loss"])
    for beams, name in ((1, "new"), (2, "beams")):
        new = model.generate(images, tokens[:, :2], max_new_tokens=4, num_beams=beams)
        assert torch.equal(new, expected[name])


@torch.no_grad()
def test_language_model():
    model, expected = read(CausalLM, "lm")
    close(model(expected["tokens"], expected["attention_mask"]).logits, expected["logits"])


@torch.no_grad()
def test_flamingo():
    model, expected = read(Flamingo, "flamingo")
    images, tokens = expected["images"].double(), expected["tokens"]
    close(model(images, tokens)["logits"], expected["logits"])
    for beams, name in ((1, "new"), (2, "beams")):
        new = model.generate(images, tokens[:, :4], max_new_tokens=4, num_beams=beams)
        assert torch.equal(new, expected[name])


def step_on(model, groups, name, loss):
    """One more step of the recorded optimizer: all that is trained, in one vector.

    Without the biases of keys: their gradient is 0 but for rounding, of which Adam makes whole steps.
    """
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    optimizer.load_state_dict(torch.load(FOLDER / name / "optimizer.pt", weights_only=True))
    loss().backward()
    optimizer.step()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    counts = {name: torch.ones_like(p, dtype=torch.bool) for name, p in trained.items()}
    for key in counts:
        if key.endswith("c_attn.bias"):
            counts[key].chunk(3)[1].fill_(False)
    got, counted = (torch.cat([x.flatten() for x in each.values()]) for each in (trained, counts))
    close(got[counted], load_file(FOLDER / name / "next.safetensors")["next"][counted])


def test_training_of_a_language_model_goes_on():
    model, expected = read(CausalLM, "lm")
    tokens, mask = expected["tokens"], expected["attention_mask"]
    groups = parameter_groups(model.float(), 0.1)
    step_on(model, groups, "lm", lambda: model.loss(tokens, attention_mask=mask))


def test_training_of_a_flamingo_goes_on():
    model, expected = read(Flamingo, "flamingo")
    images, tokens = expected["images"], expected["tokens"]
    groups = model.float().parameter_groups(0.1)
    step_on(model, groups, "flamingo", lambda: model(images, tokens, labels=tokens)["loss"])


@torch.no_grad()
@pytest.mark.parametrize(("cls", "name"), [(CausalLM, "lm"), (Flamingo, "flamingo")])
def test_state_dicts_of_checkpoints(cls, name):
    """As training keeps them: of the model and of the average of its weights."""
    given = load_file(FOLDER / name / "model.safetensors")
    wanted, expected = read(cls, name)
    model = cls(wanted.config).eval()
    model.load_state_dict(dict(given))
    average = AveragedModel(cls(wanted.config).eval())
    average.load_state_dict({"n_averaged": torch.tensor(2)} | {f"module.{k}": v for k, v in given.items()})
    inputs = [expected["images"].double(), expected["tokens"]] if cls is Flamingo else [expected["tokens"]]
    for each in (model, average):
        got, want = each.double()(*inputs), wanted(*inputs)
        close(*(out["logits"] if isinstance(out, dict) else out.logits for out in (got, want)))


def test_openflamingo_file_around_a_language_model(tmp_path):
    wanted, _ = read(Flamingo, "flamingo")
    given = load_file(FOLDER / "flamingo" / "model.safetensors")
    trained = {k: v for k, v in given.items() if "perceiver." in k or "gated" in k or "embed_tokens" in k}
    torch.save(trained, tmp_path / "openflamingo.pt")
    torch.manual_seed(1)
    model = Flamingo(wanted.config)
    model.load_openflamingo_state_dict(tmp_path / "openflamingo.pt")
    got, want = (each.openflamingo_state_dict() for each in (model, wanted.float()))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
