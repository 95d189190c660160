"""Tiny models of the families that `vlmkernels.integrations.patch` knows, and the calls that they support."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from vlmkernels.integrations import Report, patch

Inputs = dict[str, Tensor]
BATCH, SIDE, TOKENS, VOCABULARY = 5, 32, 12, 60


@dataclass(frozen=True, eq=False)
class Family:
    """A model and its loss as one module, how it is called, and what the library offers for it."""

    name: str
    library: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    outputs: Callable[[nn.Module, Inputs], dict[str, Tensor]]
    loss: Callable[[nn.Module, Inputs], Tensor]
    generate: Callable[[nn.Module, Inputs], Tensor] | None = None
    checkpoint: Callable[[nn.Module], None] | None = None
    pretrained: Callable[[nn.Module], nn.Module] | None = None  # the part that has save_pretrained
    wrap: Callable[[nn.Module], nn.Module] | None = None  # in DistributedDataParallel; around all if None
    lacks: dict[str, str] = field(default_factory=dict)  # behaviour -> why the library does not offer it
    options: dict[str, bool] = field(default_factory=dict)  # of patch
    in_training: bool = False  # the loss is that of the training mode

    @property
    def why_not(self) -> str | None:
        """Why it cannot be built here."""
        return peers.why_not(self.library)

    def patch(self, module: nn.Module) -> Report:
        return patch(module, **self.options)


class WithLoss(nn.Module):
    """A model beside its loss: patch sees both."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = loss


@torch.no_grad()
def sharpen(model: nn.Module, factor: float) -> nn.Module:
    """Matrices scaled up and biases drawn: attention is not flat, and no term is zero."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.mul_(factor)
        elif parameter.dim() == 1 and name.endswith("bias"):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def images(batch: int = BATCH, side: int = SIDE) -> Tensor:  # [B, 3, side, side]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def tokens(batch: int = BATCH, length: int = TOKENS) -> Tensor:  # [B, T]
    """Texts that begin with 1 and end with the largest token."""
    text = torch.randint(4, VOCABULARY - 1, (batch, length), generator=torch.Generator().manual_seed(2))
    text[:, 0], text[:, -1] = 1, VOCABULARY - 1
    return text


def padding(batch: int = BATCH, length: int = TOKENS) -> Tensor:  # [B, T]
    """1 at the tokens that count: texts of different lengths, the first one full."""
    lengths = torch.tensor([length - (3 * i) % (length - 2) for i in range(batch)])
    return (torch.arange(length) < lengths[:, None]).long()


def pairs() -> Inputs:
    return {"image": images(), "text": tokens()}


def padded_pairs() -> Inputs:
    """Texts of different lengths, all shorter than the context, which end with the largest token."""
    text, lengths = tokens(), padding().sum(1)[:, None] - 1
    text = text.masked_fill(torch.arange(TOKENS) >= lengths, 0).scatter(1, lengths - 1, VOCABULARY - 1)
    return {"image": images(), "text": text}


_TEXT = {"context_length": TOKENS, "vocab_size": VOCABULARY, "width": 32, "heads": 4, "layers": 2}
_VISION = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": SIDE}


def _open_clip() -> Any:
    return peers.load("open_clip")


def _open_clip_clip() -> nn.Module:
    torch.manual_seed(0)
    model = _open_clip().model.CLIP(24, _VISION, _TEXT, output_dict=True, quick_gelu=True)
    return WithLoss(sharpen(model, 2.0), _open_clip().ClipLoss())


def _open_clip_siglip() -> nn.Module:
    torch.manual_seed(0)
    vision = {
        "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": SIDE,
    }  # fmt: skip
    text = {**_TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    model = _open_clip().model.CustomTextCLIP(64, vision, text, init_logit_bias=-10.0, output_dict=True)
    return WithLoss(sharpen(model, 2.0), _open_clip().loss.SigLipLoss())


def _open_clip_coca() -> nn.Module:
    torch.manual_seed(0)
    vision = {**_VISION, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    text = {**_TEXT, "embed_cls": True, "output_tokens": True}
    decoder = {**_TEXT, "attn_pooler_heads": 4}
    coca = _open_clip().coca_model.CoCa(32, decoder, text, vision)
    for parameter in coca.parameters():
        if parameter.dim() == 2:  # one of them is left uninitialised
            torch.nn.init.normal_(parameter, std=0.2)
    return WithLoss(coca, _open_clip().loss.CoCaLoss(2.0, 1.0, pad_id=0))


def _open_clip_outputs(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    return {k: v for k, v in module.model(**inputs).items() if isinstance(v, Tensor)}


def _open_clip_loss(module: nn.Module, inputs: Inputs) -> Tensor:
    out = module.model(**inputs)
    return module.loss(
        out["image_features"], out["text_features"], out["logit_scale"], out.get("logit_bias"),
    )  # fmt: skip


def _coca_loss(module: nn.Module, inputs: Inputs) -> Tensor:
    out = module.model(**inputs)
    names = ("image_features", "text_features", "logits", "labels", "logit_scale")
    return sum(module.loss(*(out[name] for name in names)))


def _open_clip_checkpoint(module: nn.Module) -> None:
    module.model.set_grad_checkpointing(True)


_WITHOUT_FILES = {"save_pretrained": "not in open_clip"}
OPEN_CLIP = [
    Family(
        "open_clip CLIP", "open_clip", _open_clip_clip, padded_pairs, _open_clip_outputs, _open_clip_loss,
        checkpoint=_open_clip_checkpoint, lacks={**_WITHOUT_FILES, "generate": "no decoder"},
    ),
    Family(
        "open_clip SigLIP (timm)", "open_clip", _open_clip_siglip, pairs, _open_clip_outputs, _open_clip_loss,
        checkpoint=_open_clip_checkpoint, lacks={**_WITHOUT_FILES, "generate": "no decoder"},
    ),
    Family(
        "open_clip CoCa", "open_clip", _open_clip_coca, pairs, _open_clip_outputs, _coca_loss,
        checkpoint=_open_clip_checkpoint,
        lacks={**_WITHOUT_FILES, "generate": "open_clip 3.3.0 cannot under transformers 5"},
    ),
]  # fmt: skip


def _transformers() -> Any:
    return peers.load("transformers")


_HIDDEN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENDS = {"bos_token_id": 1, "eos_token_id": VOCABULARY - 1, "pad_token_id": 0}


def _clip() -> nn.Module:
    torch.manual_seed(0)
    text = {**_HIDDEN, **_ENDS, "vocab_size": VOCABULARY, "max_position_embeddings": TOKENS}
    vision = {**_HIDDEN, "image_size": SIDE, "patch_size": 8}
    config = _transformers().CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return sharpen(_transformers().CLIPModel(config), 6.0)


def _siglip() -> nn.Module:
    torch.manual_seed(0)
    text = {**_HIDDEN, **_ENDS, "vocab_size": VOCABULARY, "max_position_embeddings": TOKENS}
    vision = {**_HIDDEN, "image_size": SIDE, "patch_size": 8}
    model = _transformers().SiglipModel(_transformers().SiglipConfig(text_config=text, vision_config=vision))
    torch.nn.init.constant_(model.logit_scale, 1.5)
    torch.nn.init.constant_(model.logit_bias, -3.0)
    return sharpen(model, 2.0)


def _align() -> nn.Module:
    torch.manual_seed(0)
    text = {
        **_HIDDEN, "vocab_size": VOCABULARY, "max_position_embeddings": TOKENS,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    vision = {
        "image_size": SIDE, "width_coefficient": 0.25, "depth_coefficient": 0.2, "drop_connect_rate": 0.0,
        "depthwise_padding": [], "hidden_dim": 80,
    }  # fmt: skip
    config = _transformers().AlignConfig(text_config=text, vision_config=vision, projection_dim=80)
    model = _transformers().AlignModel(config)
    torch.nn.init.constant_(model.temperature, 0.2)
    for parameter in model.parameters():
        if parameter.dim() == 4:  # convolutions at which activations do not vanish over the depth
            torch.nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5)
    return sharpen(model, 4.0)


def _two_towers() -> Inputs:
    return {"input_ids": tokens(), "pixel_values": images(), "attention_mask": padding()}


def _two_tower_outputs(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    out = model(**inputs)
    return {name: out[name] for name in ("logits_per_image", "text_embeds", "image_embeds")}


def _two_tower_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    return model(**inputs, return_loss=True).loss


def _visual_bert() -> nn.Module:
    torch.manual_seed(0)
    config = _transformers().VisualBertConfig(
        **_HIDDEN, vocab_size=VOCABULARY, visual_embedding_dim=20, max_position_embeddings=TOKENS,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    return sharpen(_transformers().VisualBertForPreTraining(config), 6.0)


def _visual_bert_inputs() -> Inputs:
    regions = torch.randn(BATCH, 6, 20, generator=torch.Generator().manual_seed(5))
    text = tokens()
    return {
        "input_ids": text, "visual_embeds": regions, "attention_mask": torch.ones_like(text),
        "labels": torch.cat([text, text[:, :6]], 1),
        "visual_attention_mask": padding(BATCH, 6), "sentence_image_labels": torch.arange(BATCH) % 2,
    }  # fmt: skip


def _visual_bert_outputs(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    out = model(**inputs)
    return {name: out[name] for name in ("prediction_logits", "seq_relationship_logits")}


def _loss_of_output(model: nn.Module, inputs: Inputs) -> Tensor:
    return model(**inputs).loss


def idefics(additional: int = 2) -> nn.Module:
    torch.manual_seed(0)
    vision = {
        "embed_dim": 24, "image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "intermediate_size": 40,
        "num_attention_heads": 3,
    }  # fmt: skip
    perceiver = {
        "use_resampler": True, "resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2,
        "resampler_head_dim": 8, "qk_layer_norms_perceiver": False,
    }  # fmt: skip
    config = _transformers().IdeficsConfig(
        **_HIDDEN, **_ENDS, vocab_size=VOCABULARY, additional_vocab_size=additional,
        max_position_embeddings=64, vision_config=vision, perceiver_config=perceiver, use_resampler=True,
        cross_layer_interval=1, alpha_type="vector", alpha_initializer="normal", alphas_initializer_range=0.5,
    )  # fmt: skip
    return sharpen(_transformers().IdeficsForVisionText2Text(config), 6.0)


def idefics_inputs() -> Inputs:
    count = 2
    seen = torch.zeros(BATCH, TOKENS, count, dtype=torch.long)
    seen[:, 2:7, 0] = seen[:, 7:, 1] = 1  # the image before a token
    return {
        "input_ids": tokens(), "attention_mask": padding().flip(1), "image_attention_mask": seen,
        "pixel_values": images(BATCH * count, 16).unflatten(0, (BATCH, count)),
    }  # fmt: skip


def _logits(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    return {"logits": model(**inputs).logits}


def _next_token_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return F.cross_entropy(model(**inputs).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _idefics_generate(model: nn.Module, inputs: Inputs) -> Tensor:
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, min_new_tokens=6)


def _transformers_checkpoint(model: nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def _itself(model: nn.Module) -> nn.Module:
    return model


FILES: dict[str, Any] = {"checkpoint": _transformers_checkpoint, "pretrained": _itself}
_NO_DECODER = {"generate": "no decoder"}
TRANSFORMERS = [
    Family(
        "transformers CLIP", "transformers", _clip, _two_towers, _two_tower_outputs, _two_tower_loss,
        **FILES, lacks=_NO_DECODER,
    ),
    Family(
        "transformers SigLIP", "transformers", _siglip, _two_towers, _two_tower_outputs, _two_tower_loss,
        **FILES, lacks=_NO_DECODER,
    ),
    Family(
        "transformers ALIGN", "transformers", _align, _two_towers, _two_tower_outputs, _two_tower_loss,
        **FILES, lacks=_NO_DECODER,
    ),
    Family(
        "transformers VisualBERT", "transformers", _visual_bert, _visual_bert_inputs, _visual_bert_outputs,
        _loss_of_output, **FILES, lacks=_NO_DECODER,
    ),
    Family(
        "transformers IDEFICS", "transformers", idefics, idefics_inputs, _logits, _next_token_loss,
        generate=_idefics_generate, **FILES,
    ),
]  # fmt: skip
