"""The language model against transformers' GPT-2: weights, outputs, gradients, steps with hidden states."""

import json

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import peers
from tests import flamingo_tiny, simvlm_tiny
from tests.parity import randomize
from vlmkernels import intervals
from vlmkernels.models import CausalLM, DecoderConfig
from vlmkernels.models.decoder import DecoderAttention, hf_fields
from vlmkernels.models.flamingo import _Decoding as FlamingoDecoding
from vlmkernels.models.generation import Decoding
from vlmkernels.models.simvlm import _Decoding as SimVLMDecoding

needs_transformers = pytest.mark.skipif(
    peers.why_not("transformers") is not None, reason=str(peers.why_not("transformers"))
)
close = torch.testing.assert_close
SIZES = {"vocab_size": 19, "n_positions": 12, "n_embd": 16, "n_layer": 3, "n_head": 4}


def gpt2(head=True, **fields):
    transformers = peers.load("transformers")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    kind = transformers.GPT2LMHeadModel if head else transformers.GPT2Model
    return randomize(kind(transformers.GPT2Config(**{**SIZES, **ids, **fields}))).eval()


def padded():
    tokens = torch.randint(0, 19, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :4] = mask[2, :1] = 0
    return tokens, mask


@needs_transformers
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu"])
def test_it_is_gpt2(activation, tmp_path):
    theirs = gpt2(activation_function=activation, n_inner=48, layer_norm_epsilon=1e-3)
    theirs.save_pretrained(tmp_path)
    ours = CausalLM.from_hf_folder(tmp_path).double()
    assert ours.config == DecoderConfig(
        19, 16, 3, 4, 12, 3, {"gelu_new": "gelu_tanh"}.get(activation, activation), 1e-3
    )
    tokens, mask = padded()
    real = mask.bool()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    given = {"attention_mask": mask, "output_hidden_states": True}
    wanted, got = theirs(tokens, position_ids=positions, **given), ours(tokens, **given)
    close(got.logits[real], wanted.logits[real])
    assert len(got.hidden_states) == len(wanted.hidden_states) == 4
    for mine, other in zip(got.hidden_states, wanted.hidden_states, strict=True):
        close(mine[real], other[real])
    got.logits[real].square().mean().backward()
    wanted.logits[real].square().mean().backward()
    other = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        turned = parameter.ndim == 2 and name.startswith("transformer.h.")
        close(parameter.grad.T if turned else parameter.grad, other[name])


@needs_transformers
@pytest.mark.parametrize("head", [True, False])
def test_weights_go_both_ways(head, tmp_path):
    """From a state dict alone, from GPT2Model's names with the buffers of old releases, and back."""
    theirs = gpt2()
    given = {name: tensor.detach().float() for name, tensor in theirs.state_dict().items()}
    if not head:
        given = {name.removeprefix("transformer."): t for name, t in given.items() if "lm_head" not in name}
        given |= {"h.0.attn.bias": torch.ones(1, 1, 12, 12).tril(), "h.0.attn.masked_bias": torch.zeros(())}
    ours = CausalLM.from_hf_state_dict(given, heads=4)
    assert (ours.config.layers, ours.config.activation) == (3, "gelu_tanh")
    save_file({name: tensor.clone() for name, tensor in given.items()}, tmp_path / "model.safetensors")
    assert CausalLM.from_hf_state_dict(tmp_path / "model.safetensors", heads=4).config == ours.config
    again = gpt2().float()
    again.load_state_dict(ours.hf_state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.float())


@needs_transformers
def test_config_fields_are_those_of_transformers():
    config = peers.load("transformers").GPT2Config()
    assert hf_fields({"model_type": "gpt2"}) == hf_fields(json.loads(config.to_json_string()))
    fields = hf_fields({"model_type": "gpt2"})
    assert DecoderConfig(**fields) == DecoderConfig(50257, 768, 12, 12, 1024, 4, "gelu_tanh", 1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gptj"}, "model_type must be 'gpt2', got 'gptj'"),
        (
            {"scale_attn_by_inverse_layer_idx": True, "n_inner": 100},
            "inverse_layer_idx .*; .*n_inner must be .*, got 100",
        ),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True, got False"),
        ({"activation_function": "mish"}, "activation_function must be one of gelu, .*, got 'mish'"),
    ],
)
def test_configs_of_other_models(config, message):
    with pytest.raises(ValueError, match=message):
        hf_fields({"model_type": "gpt2", **config})


def tiny():
    torch.manual_seed(0)
    return randomize(CausalLM(DecoderConfig(19, 16, 2, 2, 12, activation="gelu_tanh"))).eval()


def test_weights_that_are_no_gpt2s():
    ours = tiny()
    theirs = ours.hf_state_dict()
    untied = {**theirs, "lm_head.weight": theirs["lm_head.weight"] + 1}
    for given, message in (
        (
            ours.state_dict(),
            r"h\.1\.attn\.c_attn\.weight \[3 D, D\], that is \[out, in\] as in files of this",
        ),
        (untied, "lm_head.weight must equal transformer.wte.weight"),
        (
            {"wte.weight": theirs["transformer.wte.weight"]},
            "must be a GPT-2's, but it has no matrix transformer.wpe",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            CausalLM.from_hf_state_dict(given, heads=2)
    with pytest.raises(ValueError, match="heads: not determined by shapes"):
        CausalLM.from_hf_state_dict(theirs)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        CausalLM.from_hf_folder("nowhere")


def test_files_say_their_format(tmp_path):
    ours = tiny()
    ours.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["format_version"], fields["linear_weights"]) == (2, "[out, in]")
    again = CausalLM.from_pretrained(tmp_path).double().state_dict()
    assert all(
        torch.equal(again[name], tensor.float().double()) for name, tensor in ours.state_dict().items()
    )
    for change in ({"format_version": 3}, {"linear_weights": "[in, out]"}):
        (tmp_path / "config.json").write_text(json.dumps({**fields, **change}))
        with pytest.raises(ValueError, match=r"must be .*'format_version': 2.* for CausalLM, got"):
            CausalLM.from_pretrained(tmp_path)


def test_attention_answers_for_the_wanted_tokens():
    attention = randomize(DecoderAttention(16, 2))
    x, wanted = torch.randn(3, 7, 16, dtype=torch.float64), torch.tensor([[6, 0], [3, 3], [1, 2]])
    seen = intervals.causal(7)
    rows = torch.arange(3)[:, None]
    close(attention(x, seen, wanted), attention(x, seen)[rows, wanted])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ours", pytest.param("gpt2", marks=needs_transformers)])
def test_steps_return_hidden_states(kind):
    """As a search over candidates needs them: of the prompt, then of k tokens after each row, one kept."""
    model = flamingo_tiny.language_model(kind).double()
    tokens = torch.randint(3, 38, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    decoding, plain = Decoding(model), Decoding(model)
    logits, hidden = decoding.read(tokens, mask, return_hidden=True)
    close(logits, plain.read(tokens, mask))
    assert hidden.shape == (2, 6, 32)
    head = model.get_input_embeddings().weight
    close(hidden[:, -1] @ head.T, logits)

    candidates = logits.topk(3).indices  # [2, 3]
    decoding.reorder(torch.arange(2).repeat_interleave(3))
    logits, hidden = decoding.step(candidates.flatten(), return_hidden=True)
    kept = torch.tensor([1, 5])
    decoding.reorder(kept)
    chosen = candidates.flatten()[kept]
    close(logits[kept], plain.step(chosen))
    close(hidden @ head.T, logits)
    close(decoding.step(chosen), plain.step(chosen))


@torch.no_grad()
def test_steps_of_systems_return_hidden_states():
    flamingo = flamingo_tiny.flamingo().double()
    vision_x, lang_x = flamingo_tiny.inputs()
    table = flamingo.lang_encoder.transformer["wte"].weight
    sessions = [FlamingoDecoding(flamingo, flamingo.encode_media(vision_x.double())) for _ in range(2)]
    for session in sessions:
        session.read(lang_x, None)
    out = sessions[0].step(lang_x[:, 0], return_hidden=True)
    close(out.logits, sessions[1].step(lang_x[:, 0]))
    close(out.hidden @ table.T, out.logits)
    for form in simvlm_tiny.FORMS:
        simvlm = simvlm_tiny.tiny_model(form)
        images, tokens, lengths = simvlm_tiny.tiny_batch()
        sessions = [SimVLMDecoding(simvlm, images, tokens, lengths, 3) for _ in range(2)]
        out = sessions[0].step(tokens[:, 1], return_hidden=True)
        close(out.logits, sessions[1].step(tokens[:, 1]))
        close(out.hidden @ simvlm.token_embedding.weight.T, out.logits)
