"""Language models under `patch(fused_loss=True)`, beside the families of `more_families`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from tests.peers import families, more_families
from tests.peers.families import BATCH, TOKENS, VOCABULARY, Family, Inputs, padding, sharpen, tokens

IMAGE = VOCABULARY - 2  # the token of an image, in LLaVA
_ENDS = {"bos_token_id": 1, "eos_token_id": VOCABULARY - 1, "pad_token_id": 0}
_SIZES: dict[str, Any] = {
    **_ENDS, "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_GPT = {
    **_ENDS, "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
}  # fmt: skip


def _build(cls: str, config: str, sizes: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = peers.load("transformers")
        torch.manual_seed(0)
        return sharpen(getattr(transformers, cls)(getattr(transformers, config)(**sizes)), 4.0)

    return build


def causal_inputs() -> Inputs:
    """Padded texts, of which the first third is a prompt that is not to be predicted."""
    text, mask = tokens(), padding()
    text = text.masked_fill(text == IMAGE, 5)
    prompt = torch.arange(TOKENS) < TOKENS // 3
    return {"input_ids": text, "attention_mask": mask, "labels": text.masked_fill((mask == 0) | prompt, -100)}


def masked_inputs() -> Inputs:
    """Texts of which every third token is to be predicted."""
    inputs = causal_inputs()
    hidden = (torch.arange(TOKENS) % 3 == 1) & (inputs["attention_mask"] == 1)
    labels = inputs["input_ids"].masked_fill(~hidden, -100)
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(hidden, 3), "labels": labels}


def _seen() -> Inputs:
    """Texts that begin with an image of four patches."""
    inputs = causal_inputs()
    inputs["input_ids"][:, :4] = IMAGE
    return {**inputs, "pixel_values": families.images(BATCH, 16)}


def _prefixed() -> Inputs:
    """Images and texts that say where the part begins that is to be predicted."""
    inputs = _seen()
    return {**inputs, "token_type_ids": (inputs["labels"] != -100).long()}


def _sequences() -> Inputs:
    inputs = causal_inputs()
    return {**inputs, "labels": inputs["labels"][:, 3:].contiguous()}


def _logits(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    labels = inputs["labels"]
    inputs = {name: x for name, x in inputs.items() if name != "labels"}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = labels.clamp(min=0)
    return {"logits": model(**inputs).logits}


def _loss(model: nn.Module, inputs: Inputs) -> Tensor:
    return model(**inputs).loss


def _generate(model: nn.Module, inputs: Inputs) -> Tensor:
    prompt = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"].flip(1)}
    return model.generate(**prompt, max_new_tokens=6, do_sample=False, min_new_tokens=6)


def _family(
    name: str, cls: str, config: str, sizes: dict[str, Any], inputs: Callable[[], Inputs] = causal_inputs
) -> Family:
    masked = inputs is masked_inputs
    return Family(
        f"transformers {name}, fused loss", "transformers", _build(cls, config, sizes), inputs, _logits,
        _loss, generate=None if masked else _generate, lacks={"generate": "no decoder"} if masked else {},
        options={"fused_loss": True}, in_training=True, **families.FILES,
    )  # fmt: skip


def _fused(family: Family, **changes: Any) -> Family:
    changes = {"name": f"{family.name}, fused loss", "options": {"fused_loss": True}, **changes}
    return dataclasses.replace(family, in_training=True, **changes)


def _idefics() -> nn.Module:
    return families.idefics(additional=0)


def _idefics_inputs() -> Inputs:
    inputs = families.idefics_inputs()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


_named = {family.name: family for family in more_families.FAMILIES}
_VISION = {**_SIZES, "image_size": 16, "patch_size": 8}
_LLAVA = {
    "vision_config": {"model_type": "clip_vision_model", **_VISION}, "image_token_index": IMAGE,
    "text_config": {"model_type": "llama", **_SIZES}, "image_seq_length": 4,
}  # fmt: skip
_PALIGEMMA = {
    "vision_config": {"model_type": "siglip_vision_model", **_VISION}, "image_token_index": IMAGE,
    "text_config": {"model_type": "gemma", **_GROUPED}, "projection_dim": 32,
}  # fmt: skip
_MOE = {**_GROUPED, "num_local_experts": 4, "output_router_logits": True, "experts_implementation": "eager"}
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
_DISTILBERT = {
    "vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "pad_token_id": 0,
    "max_position_embeddings": 32,
}  # fmt: skip
_DECODER = {**_SIZES, "is_decoder": True}

LANGUAGE_MODELS = [
    _family("GPT-2", "GPT2LMHeadModel", "GPT2Config", _GPT),
    _family("Llama", "LlamaForCausalLM", "LlamaConfig", _SIZES),
    _family("BERT", "BertForMaskedLM", "BertConfig", _SIZES, masked_inputs),
    _family("OPT", "OPTForCausalLM", "OPTConfig", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 24}),
    _family("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES),
    _family("GPT-J", "GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 8}),
    _family("Phi", "PhiForCausalLM", "PhiConfig", _SIZES),
    _family("Qwen2", "Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    _family("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", _GROUPED),
    _family("Mixtral", "MixtralForCausalLM", "MixtralConfig", _MOE),
    _family("Cohere", "CohereForCausalLM", "CohereConfig", {**_GROUPED, "logit_scale": 0.3}),
    _family("Granite", "GraniteForCausalLM", "GraniteConfig", {**_GROUPED, "logits_scaling": 3.0}),
    _family("Gemma2", "Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "final_logit_softcapping": None}),
    _family("BERT as a decoder", "BertLMHeadModel", "BertConfig", _DECODER),
    _family("RoBERTa", "RobertaForMaskedLM", "RobertaConfig", _SIZES, masked_inputs),
    _family("DistilBERT", "DistilBertForMaskedLM", "DistilBertConfig", _DISTILBERT, masked_inputs),
    _family("T5", "T5ForConditionalGeneration", "T5Config", _T5, _sequences),
    _family("LLaVA", "LlavaForConditionalGeneration", "LlavaConfig", _LLAVA, _seen),
    _family("PaliGemma", "PaliGemmaForConditionalGeneration", "PaliGemmaConfig", _PALIGEMMA, _prefixed),
    _fused(_named["transformers VisualBERT"]),
    _fused(_named["transformers IDEFICS"], build=_idefics, inputs=_idefics_inputs, loss=_loss),
    _fused(_named["open_flamingo"]),
]
_BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
_BAMBA = {**_GROUPED, "mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]}
_BLIP2 = {
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    },
    "qformer_config": {**_SIZES, "encoder_hidden_size": 32},
    "text_config": {"model_type": "opt", **_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
}  # fmt: skip

REFUSED = [
    _family("Gemma2 with soft-capping", "Gemma2ForCausalLM", "Gemma2Config", _GROUPED),
    _family("Bamba with z-loss", "BambaForCausalLM", "BambaConfig", {**_BAMBA, "z_loss_coefficient": 0.1}),
    _family("BART", "BartForConditionalGeneration", "BartConfig", _BART, _sequences),
    _family("BLIP-2", "Blip2ForConditionalGeneration", "Blip2Config", _BLIP2),
    _fused(_named["transformers IDEFICS"], name="transformers IDEFICS with additional tokens, fused loss"),
]
FAMILIES = [*more_families.FAMILIES, *LANGUAGE_MODELS[:3]]
