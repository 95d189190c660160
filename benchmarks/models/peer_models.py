"""The peers' models of the sizes that one of our configurations gives, with random weights."""

from __future__ import annotations

from typing import Any

from benchmarks import peers
from vlmkernels.models.align import AlignConfig
from vlmkernels.models.clip import ClipConfig
from vlmkernels.models.decoder import DecoderConfig


def open_clip_model(config: ClipConfig, **options: Any) -> Any:
    """open_clip.CLIP; `options` are arguments of its own."""
    resnet = not isinstance(config.vision_layers, int)
    vision = {
        "layers": config.vision_layers,
        "width": config.vision_width,
        "head_width": config.vision_width * (32 if resnet else 1) // config.vision_heads,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
    }
    text = {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.text_width,
        "heads": config.text_heads,
        "layers": config.text_layers,
    }
    build = peers.load("open_clip").model.CLIP
    return build(config.embed_dim, vision, text, quick_gelu=config.quick_gelu, output_dict=True, **options)


def transformers_clip(config: ClipConfig) -> Any:
    """transformers.CLIPModel."""
    transformers = peers.load("transformers")
    act = "quick_gelu" if config.quick_gelu else "gelu"
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.text_width,
        "intermediate_size": 4 * config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.context_length,
        "eos_token_id": config.eot_id,
        "hidden_act": act,
    }
    vision = {
        "hidden_size": config.vision_width,
        "intermediate_size": 4 * config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": act,
    }
    sizes = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.embed_dim)
    return transformers.CLIPModel(sizes)


def transformers_align(config: AlignConfig, depthwise_padding: tuple[int, ...] = ()) -> Any:
    """transformers.AlignModel; `depthwise_padding` names the blocks that halve an odd side."""
    transformers = peers.load("transformers")
    text = transformers.AlignTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.text_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        intermediate_size=config.text_mlp_width,
        max_position_embeddings=config.max_positions,
        hidden_dropout_prob=config.text_dropout,
        attention_probs_dropout_prob=config.text_dropout,
    )
    vision = transformers.AlignVisionConfig(
        width_coefficient=config.image_width,
        depth_coefficient=config.image_depth,
        drop_connect_rate=config.drop_rate,
        depthwise_padding=list(depthwise_padding),
    )
    sizes = {"projection_dim": config.embed_dim, "temperature_init_value": config.init_temperature}
    return transformers.AlignModel(transformers.AlignConfig(text_config=text, vision_config=vision, **sizes))


def transformers_gpt2(config: DecoderConfig) -> Any:
    """transformers.GPT2LMHeadModel, without dropout."""
    transformers = peers.load("transformers")
    sizes = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=config.width,
        n_layer=config.layers,
        n_head=config.heads,
        n_inner=config.mlp_ratio * config.width,
        activation_function="gelu_new" if config.activation == "gelu_tanh" else config.activation,
        layer_norm_epsilon=config.eps,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.GPT2LMHeadModel(sizes)
