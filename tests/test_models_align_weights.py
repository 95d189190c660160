"""ALIGN's weights of Hugging Face: what shapes do not determine is read from config.json, or rejected."""

import copy
import dataclasses

import pytest
import torch

from benchmarks import peers
from benchmarks.models.peer_models import transformers_align
from tests.test_models_align import TINY, batch, needs_transformers, randomize
from vlmkernels.models import _align_sources
from vlmkernels.models.align import ALIGN, CONFIGS, AlignConfig
from vlmkernels.testing import assert_as_good


@needs_transformers
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu", "quick_gelu"])
def test_a_folder_of_hugging_face_computes_the_same(act, tmp_path):
    """Everything that shapes do not determine is unusual."""
    peer = transformers_align(TINY)
    text, vision = peer.config.text_config, peer.config.vision_config
    text.num_attention_heads, text.layer_norm_eps, text.hidden_act = 8, 0.1, act
    vision.batch_norm_eps, vision.strides = 0.2, [1, 2, 1, 2, 1, 2, 1]
    peer = type(peer)(peer.config).eval()
    randomize(peer)
    peer.save_pretrained(tmp_path, max_shard_size="300KB")
    model = ALIGN.from_hf_folder(tmp_path)
    assert model.config.text_heads == 8
    images, tokens, mask = batch(TINY)
    exact = copy.deepcopy(peer).double()
    with torch.no_grad():
        low, wide = (
            peer(tokens, images, attention_mask=mask),
            exact(tokens, images.double(), attention_mask=mask),
        )
        ours = model(images, tokens, attention_mask=mask)
    for name, theirs in (("image_features", "image_embeds"), ("text_features", "text_embeds")):
        assert_as_good(ours[name], low[theirs], wide[theirs], name=name)


@needs_transformers
def test_the_defaults_of_hugging_face_are_known():
    transformers = peers.load("transformers")
    for peer, read, fixed in (
        (transformers.AlignTextConfig, _align_sources.TEXT, _align_sources.TEXT_FIXED),
        (transformers.AlignVisionConfig, _align_sources.VISION, _align_sources.VISION_FIXED),
    ):
        assert {name: getattr(peer(), name) for name in [*read, *fixed]} == {**read, **fixed}
    fields = _align_sources.hf_fields({"model_type": "align"})
    assert AlignConfig(**fields) == dataclasses.replace(CONFIGS["align-base"], image_size=600)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "clip"}, "model_type must be 'align', got 'clip'"),
        ({"text_config": {"hidden_act": "mish"}}, "hidden_act must be one of gelu.*, got 'mish'"),
        (
            {"text_config": {"attention_probs_dropout_prob": 0.0}},
            "attention_probs_dropout_prob must be hidden_dropout_prob, got 0.0",
        ),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act must be \"swish\", got 'relu'"),
        (
            {"vision_config": {"pooling_type": "max", "depthwise_padding": [5]}},
            "pooling_type must be 'mean', got 'max'; .* depthwise_padding must be .*, got .5.",
        ),
        (
            {"vision_config": {"width_coefficient": "2"}},
            "width_coefficient must be a value like 2.0, got '2'",
        ),
    ],
)
def test_what_a_config_of_hugging_face_may_not_say(changes, message):
    with pytest.raises(ValueError, match=message):
        _align_sources.hf_fields({"model_type": "align", **changes})
