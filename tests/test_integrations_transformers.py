"""Patched models of transformers: configurations, attn_implementation="vlmkernels", keywords, the advice."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch

from benchmarks import peers
from tests import test_integrations
from tests.test_integrations import tiny_clip
from vlmkernels.integrations import patch, unpatch

pytestmark = pytest.mark.skipif(
    peers.why_not("transformers") is not None, reason=f"transformers: {peers.why_not('transformers')}"
)
if peers.why_not("transformers") is None:
    ALL_ATTENTION_FUNCTIONS = peers.load("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
calls = test_integrations.calls
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def build(name, implementation="sdpa", **options):
    transformers = peers.load("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "vocab_size": 30, **options})
    model = getattr(transformers, f"{name}Model")
    return model._from_config(config, attn_implementation=implementation).eval()


def padded(rows=((1, 1, 1, 1, 1), (1, 1, 1, 0, 0), (0, 0, 1, 1, 1))):
    mask = torch.tensor(rows)
    return {"input_ids": torch.arange(15).view(3, 5) + 3, "attention_mask": mask}


def attention_of(model):
    return next(m for m in model.modules() if type(m).__name__ == "CLIPAttention")


def test_the_configuration_of_a_module_is_that_of_the_model(tmp_path, calls):
    model, inputs = tiny_clip()
    module = attention_of(model)
    config = module.config
    plain = copy.deepcopy(config)
    patch(model)
    model(**inputs)
    assert len(calls) == 2
    assert module.config is config
    assert isinstance(config, type(plain))
    for other in (
        copy.deepcopy(module.config), copy.copy(module.config), pickle.loads(pickle.dumps(module.config)),
    ):  # fmt: skip
        assert type(other) is type(plain)
        assert other == plain
        assert (other.to_dict(), other._attn_implementation) == (plain.to_dict(), "sdpa")
    module.config.save_pretrained(tmp_path)
    assert type(plain).from_pretrained(tmp_path).to_dict() == plain.to_dict()
    assert not patch(peers.load("transformers").AutoModel.from_config(module.config), linear=False).refused
    module.config = copy.deepcopy(config)
    module.config._attn_implementation = "eager"  # of this module alone
    model(**inputs)
    assert len(calls) == 3
    unpatch(model)
    assert module.config._attn_implementation == "eager"


def test_an_attention_module_finds_itself_in_its_call(calls):
    """What its forward reads, calls and sets is its own."""

    class Attention(peers.load("transformers.models.clip.modeling_clip").CLIPAttention):
        def forward(self, x):
            self.count = getattr(self, "count", 0) + self.step()
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
            return attend(self, *[x.view(2, 5, 2, 8).transpose(1, 2)] * 3, None, scaling=self.scale)[0]

        def step(self):
            assert type(self) is not Attention  # the patched module
            return self.config.hidden_size

    module = Attention(build("CLIPText").config)
    assert [entry.status for entry in patch(module, linear=False)] == ["patched"]
    module(torch.randn(2, 5, 16))
    module(torch.randn(2, 5, 16))
    assert module.count == 32
    assert len(calls) == 2


def test_whole_models_are_copied_and_pickled(calls):
    model, inputs = tiny_clip()
    patch(model)
    wanted = model(**inputs, return_loss=True)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False),
    ):  # fmt: skip
        calls.clear()
        got = other(**inputs, return_loss=True)
        assert len(calls) == 2
        assert torch.equal(got.loss, wanted.loss)
        assert torch.equal(got.logits_per_image, wanted.logits_per_image)
        other.set_attn_implementation("eager")  # its own configuration
        assert attention_of(other).config._attn_implementation == "eager"
        assert attention_of(model).config._attn_implementation == "sdpa"


MODELS = {
    "Bert": {},
    "CLIPText": {"max_position_embeddings": 5, "eos_token_id": 29},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "Llama": {"num_key_value_heads": 1},
    "Mistral": {"num_key_value_heads": 1, "sliding_window": 3},
    "SiglipText": {"max_position_embeddings": 5},
}


@pytest.mark.parametrize("name", MODELS)
def test_padding_counts_under_the_name_of_our_attention(name, calls):
    options = MODELS[name]
    model = build(name, **options)
    patch(tiny_clip()[0])  # registers the name
    wanted = model(**padded()).last_hidden_state
    other = build(name, "vlmkernels", **options)
    other.load_state_dict(model.state_dict())
    calls.clear()
    got = other(**padded()).last_hidden_state
    assert calls
    seen = padded()["attention_mask"].bool()
    torch.testing.assert_close(got[seen], wanted[seen])
    model.set_attn_implementation("vlmkernels")
    assert torch.equal(model(**padded()).last_hidden_state[seen], got[seen])


def test_attention_sinks_are_refused_under_the_name_of_our_attention():
    options = {"head_dim": 8, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    patch(tiny_clip()[0])  # registers the name
    model = build("GptOss", "vlmkernels", **options)
    with pytest.raises(ValueError, match=r"no attention sinks \(s_aux of GptOssAttention\): set 'eager'"):
        model(**padded())


def test_models_that_have_our_attention_by_name_can_be_patched(calls):
    patch(build("Bert"))
    model = build("Bert", "vlmkernels")
    assert not patch(model, linear=False).refused
    model(**padded())
    assert len(calls) == 2
    unpatch(model)
    model(**padded())
    assert len(calls) == 4  # as it was told


class TestAdvice:
    """'sdpa' is recommended to those who can have it."""

    ADVICE = "'sdpa' can be patched"
    EAGER = "attn_implementation='eager' returns the attention weights"

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("CLIPText", {"max_position_embeddings": 8}),
            ("Bert", {}),
            ("Gemma2", {"head_dim": 8, "num_key_value_heads": 1}),
            ("GptOss", {"head_dim": 8, "num_key_value_heads": 1, "num_local_experts": 2}),
            ("Splinter", {}),
            ("MarkupLM", {}),
        ],
    )
    def test_is_true(self, name, options):
        model = build(name, "eager", **options)
        refused = patch(model, linear=False).refused
        assert refused
        if self.ADVICE in refused[0].why:
            model.set_attn_implementation("sdpa")
            assert patch(model, linear=False).patched
        else:
            assert {entry.why for entry in refused} == {self.EAGER}
            with pytest.raises(ValueError, match="scaled_dot_product_attention"):
                model._sdpa_can_dispatch()
        assert (self.ADVICE in refused[0].why) == (name in ("CLIPText", "Bert"))


def test_keywords_are_those_of_the_signature():
    model, _ = tiny_clip()
    mlp = next(m for m in model.modules() if type(m).__name__ == "CLIPMLP")
    x = torch.randn(2, 5, 16)
    wanted = mlp(x)
    patch(model)
    torch.testing.assert_close(mlp(hidden_states=x), wanted)
    linear = mlp.fc1
    torch.testing.assert_close(linear(input=x), linear(x))
    for wrong in ({}, {"nothing": x}, {"hidden_states": x, "more": x}):
        with pytest.raises(TypeError):
            mlp(**wrong)


def test_in_another_process(tmp_path):
    """What is loaded registers our attention and its mask there."""
    model = build("Bert")
    patch(model)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model(**padded()).last_hidden_state, tmp_path / "wanted.pt")
    code = f"""
from benchmarks import peers
peers.load("transformers")
import torch
from tests.test_integrations_transformers import padded
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
wanted = torch.load({str(tmp_path / "wanted.pt")!r})
print(torch.equal(model(**padded()).last_hidden_state, wanted))
model.set_attn_implementation("vlmkernels")
print(torch.equal(model(**padded()).last_hidden_state, wanted))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
