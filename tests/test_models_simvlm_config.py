"""SimVLM's config, sizes, saving and loading, and what it refuses."""

import dataclasses

import pytest
import torch

from tests.simvlm_tiny import FORMS, tiny_batch, tiny_config, tiny_model
from vlmkernels.models.simvlm import CONFIGS, SimVLM, SimVLMConfig

both_forms = pytest.mark.parametrize("form", FORMS)
close = torch.testing.assert_close


@pytest.mark.parametrize(
    ("name", "encoder_decoder", "prefix_lm", "conv_stage"),
    [
        ("simvlm-base", 251_829_584, 223_461_200, 27_535_424),
        ("simvlm-large", 783_173_056, 682_360_256, 43_179_072),
        ("simvlm-huge", 1_580_297_808, 1_370_334_288, 67_424_080),
        ("emoji-tiny", 2_083_388, 1_884_220, 126_992),
    ],
)
def test_parameter_counts(name, encoder_decoder, prefix_lm, conv_stage):
    def count(module):
        return sum(p.numel() for p in module.parameters())

    config = CONFIGS[name]
    with torch.device("meta"):
        first, second = SimVLM(config), SimVLM(dataclasses.replace(config, form="prefix_lm"))
    assert (count(first), count(second), count(first.conv_stage)) == (encoder_decoder, prefix_lm, conv_stage)
    # By formula: 12 D^2 + 13 D a layer (ViT's), 4 D^2 + 6 D for cross-attention, the rest are embeddings.
    width, side = config.width, config.grid[0]
    blocks = (config.encoder_layers + config.decoder_layers) * (12 * width**2 + 13 * width)
    cross = config.decoder_layers * (4 * width**2 + 6 * width) + 2 * width
    tables = config.encoder_layers * config.heads * (2 * side - 1) ** 2
    rows = config.vocab_size + config.context_length + side**2 + 2 + 16 * config.conv_width + 1
    assert prefix_lm == conv_stage + blocks + tables + rows * width
    assert encoder_decoder == prefix_lm + cross


def test_the_forms_share_all_names_but_cross_attention():
    first, second = (SimVLM(tiny_config(form)).state_dict() for form in FORMS)
    assert {n: t.shape for n, t in first.items() if "cross" not in n} == {
        n: t.shape for n, t in second.items()
    }
    assert len(first) > len(second)


@both_forms
def test_saved_and_loaded_model_is_the_same(form, tmp_path):
    model = tiny_model(form).float()
    model.save_pretrained(tmp_path)
    loaded = SimVLM.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    images, tokens, lengths = tiny_batch()
    args = images.float(), tokens, 2, lengths.clamp(min=2)
    close(loaded(*args, return_logits=True), model(*args, return_logits=True), rtol=0, atol=0)


@both_forms
def test_weights_of_the_other_form_are_refused(form):
    other = next(f for f in FORMS if f != form)
    with pytest.raises(ValueError, match=rf"state_dict must be of form '{form}', got '{other}'"):
        SimVLM(tiny_config(form)).load_weights(SimVLM(tiny_config(other)).state_dict())
    state = SimVLM(tiny_config(form)).state_dict()
    del state["ln_final.bias"]
    with pytest.raises(ValueError, match=r"1 missing: ln_final\.bias"):
        SimVLM(tiny_config(form)).load_weights(state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"form": "decoder"}, r"form must be one of .*, got 'decoder'"),
        ({"image_size": 20}, r"image_size must be a multiple of 8, got 20"),
        ({"conv_blocks": (1, 1)}, r"conv_blocks must be three numbers of 1 or more, got \(1, 1\)"),
        ({"heads": 5}, r"heads must be a divisor of width 32, got 5"),
        ({"decoder_layers": 0}, r"encoder_layers and decoder_layers must each be at least 1, got 2, 0"),
        ({"context_length": 1}, r"context_length must be at least 2, got 1"),
        ({"eos_id": 31}, r"eos_id must be an id below 31, got 31"),
        (
            {"dropout": 1.0, "stochastic_depth": -0.1},
            r"dropout must be .*, got 1\.0; stochastic_depth must be .*, got -0\.1",
        ),
    ],
)
def test_bad_config(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_prefix_form_may_be_the_encoder_alone():
    model = SimVLM(tiny_config("prefix_lm", decoder_layers=0))
    images, tokens, _ = tiny_batch()
    assert model(images.float(), tokens)["loss"].isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": torch.zeros(4, 3, 32, 32)},
            r"images must be floating \[B, 3, 24, 24\], got .*\[4, 3, 32, 32\]",
        ),
        ({"images": torch.zeros(4, 3, 24, 24, dtype=torch.uint8)}, r"images must be .*, got torch\.uint8"),
        (
            {"images": torch.zeros(3, 3, 24, 24)},
            r"images and tokens must have the same number of rows, got 3 and 4",
        ),
        ({"tokens": torch.ones(4)}, r"tokens must be .*, got torch\.float32 of shape \[4\]"),
        (
            {"tokens": torch.ones(4, 13, dtype=torch.long)},
            r"tokens must have 1 to context_length 12 columns, got 13",
        ),
        ({"prefix_length": 11}, r"prefix_length must be in \[0, text_lengths = .*\], got 11"),
        ({"prefix_length": 1.5}, r"prefix_length must be .*, got 1\.5"),
        ({"prefix_length": torch.tensor([1, 1, -1, 1])}, r"prefix_length must be .*, got \[1, 1, -1, 1\]"),
        ({"prefix_length": torch.ones(3).long()}, r"prefix_length must be 4 integers, got .*\[3\]"),
        (
            {"text_lengths": torch.tensor([11, 1, 1, 1])},
            r"text_lengths must be in \[1, 10\], got \[11, 1, 1, 1\]",
        ),
        ({"text_lengths": torch.ones(4)}, r"text_lengths must be .*, got torch\.float32"),
    ],
)
def test_bad_input(changes, message):
    images, tokens, _ = tiny_batch()
    arguments = {"images": images.float(), "tokens": tokens, "prefix_length": 1, **changes}
    with pytest.raises(ValueError, match=message):
        SimVLM(tiny_config())(**arguments)


def test_config_of_another_model_is_refused():
    with pytest.raises(ValueError, match="config of SimVLM must be a SimVLMConfig, got str"):
        SimVLM("simvlm-base")
    assert isinstance(CONFIGS["simvlm-base"], SimVLMConfig)
