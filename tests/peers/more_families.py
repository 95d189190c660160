"""open_flamingo, sentence-transformers, and plain torch.nn, beside the families of `families`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from tests.flamingo_tiny import END, MEDIA, PAD, language_model, open_gates
from tests.flamingo_tiny import inputs as flamingo_inputs
from tests.peers.families import (
    BATCH,
    OPEN_CLIP,
    TOKENS,
    TRANSFORMERS,
    VOCABULARY,
    Family,
    Inputs,
    WithLoss,
    padding,
    sharpen,
    tokens,
)


def _flamingo() -> nn.Module:
    torch.manual_seed(7)
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    vision = {"layers": 2, "width": 24, "head_width": 8, "patch_size": 8, "image_size": 16}
    clip = peers.load("open_clip").model.CLIP(16, vision, text)
    clip.visual.output_tokens = True
    language = language_model("llama")
    peers.load("open_flamingo.src.utils").extend_instance(
        language, peers.load("open_flamingo.src.flamingo_lm").FlamingoLMMixin
    )
    language.set_decoder_layers_attr_name("model.layers")
    build = peers.load("open_flamingo.src.flamingo").Flamingo
    model = build(clip, language, END, MEDIA, vis_dim=24, cross_attn_every_n_layers=2)
    del model.perceiver.layers[2:]  # it always has six
    return open_gates(model)


def _flamingo_inputs() -> Inputs:
    vision_x, lang_x = flamingo_inputs()
    mask = torch.ones_like(lang_x)
    mask[1, 11:] = 0
    lang_x[1, 11:] = PAD
    labels = lang_x.masked_fill((mask == 0) | (lang_x == MEDIA), -100)
    return {"vision_x": vision_x, "lang_x": lang_x, "attention_mask": mask, "labels": labels}


def _flamingo_outputs(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    return {"logits": model(**inputs).logits}


def _flamingo_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    return model(**inputs).loss


def _flamingo_generate(model: nn.Module, inputs: Inputs) -> Tensor:
    """Greedy, by open_flamingo's own cache of the images; its generate() fails under transformers 5."""
    model.cache_media(inputs["lang_x"][:, :8], inputs["vision_x"])
    text = inputs["lang_x"][:, 8:9]
    for _ in range(5):
        out = model(None, text, torch.ones_like(text), clear_conditioned_layers=False)
        text = torch.cat([text, out.logits[:, -1].argmax(-1, keepdim=True)], 1)
    model.uncache_media()
    return text


class _Ranked(nn.Module):
    """A ranking loss of sentence-transformers, called with the columns of a batch."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.ranking = loss


class _Encoder(nn.Module):
    """Token features in, "sentence_embedding" out, as the modules of a SentenceTransformer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        hidden = self.layers(self.tokens(features["input_ids"]))
        weight = features["attention_mask"][..., None].to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        return {**features, "sentence_embedding": mean}


def _ranked(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    library = peers.load("sentence_transformers")
    encoder = library.SentenceTransformer(modules=[_Encoder()], device="cpu")
    losses = peers.load("sentence_transformers.sentence_transformer.losses")
    return _Ranked(getattr(losses, name)(sharpen(encoder, 3.0), **options))


def _ddp_inside(module: nn.Module) -> nn.Module:
    """As the library's trainer does: the loss stays outside."""
    module.ranking.model = nn.parallel.DistributedDataParallel(module.ranking.model)
    return module


def _triplets() -> Inputs:
    text = torch.randint(4, VOCABULARY, (3, BATCH, TOKENS), generator=torch.Generator().manual_seed(8))
    return {"input_ids": text, "attention_mask": padding().expand(3, BATCH, TOKENS)}


def _columns(inputs: Inputs) -> list[Inputs]:
    return [{name: x[i] for name, x in inputs.items()} for i in range(3)]


def _sentence_outputs(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    column = _columns(inputs)[0]
    return {"embedding": module.ranking.model(column)["sentence_embedding"]}


def _ranking_loss(module: nn.Module, inputs: Inputs) -> Tensor:
    return module.ranking(_columns(inputs), torch.zeros(BATCH))


class _Plain(nn.Module):
    """Parts of torch.nn as people put them together: padded text that looks at a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 32)
        encoder = nn.TransformerEncoderLayer(32, 4, 48, 0.0, nn.functional.gelu, batch_first=True)
        self.text = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
        self.picture = nn.Linear(24, 20)
        self.norm = nn.LayerNorm(32)
        self.look = nn.MultiheadAttention(32, 4, kdim=20, vdim=20, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(32), nn.Linear(32, 48), nn.GELU(approximate="tanh"), nn.Dropout(0.1),
            nn.Linear(48, 32, bias=False),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, VOCABULARY))

    def forward(self, text: Tensor, picture: Tensor, mask: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(text.shape[1], dtype=picture.dtype)
        hidden = self.text(self.tokens(text), mask=causal, src_key_padding_mask=mask == 0, is_causal=True)
        seen = self.picture(picture).transpose(0, 1)
        looked, _ = self.look(self.norm(hidden).transpose(0, 1), seen, seen, need_weights=False)
        hidden = hidden + looked.transpose(0, 1)
        return self.head(hidden + self.mlp(hidden))


def _plain_inputs() -> Inputs:
    picture = torch.randn(BATCH, 9, 24, generator=torch.Generator().manual_seed(9))
    return {"text": tokens(), "picture": picture, "mask": padding()}


def _plain_outputs(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    return {"logits": module.model(**inputs)}


def _plain_loss(module: nn.Module, inputs: Inputs) -> Tensor:
    labels = inputs["text"].masked_fill(inputs["mask"] == 0, -100)
    return module.loss(module.model(**inputs)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _plain() -> nn.Module:
    torch.manual_seed(0)
    return WithLoss(sharpen(_Plain(), 2.0), nn.CrossEntropyLoss())


_SENTENCES = {
    "generate": "no decoder", "save_pretrained": "not for losses", "checkpointing": "not in this model",
}  # fmt: skip
OTHERS = [
    Family(
        "open_flamingo", "open_flamingo.src.flamingo", _flamingo, _flamingo_inputs, _flamingo_outputs,
        _flamingo_loss, generate=_flamingo_generate,
        lacks={
            "save_pretrained": "not in open_flamingo",
            "checkpointing": "only under FSDP",
            "pickle": "its classes are made at run time",
        },
    ),
    Family(
        "sentence-transformers ranking loss", "sentence_transformers",
        lambda: _ranked("MultipleNegativesRankingLoss"), _triplets, _sentence_outputs, _ranking_loss,
        wrap=_ddp_inside, lacks=_SENTENCES,
    ),
    Family(
        "sentence-transformers cached ranking loss", "sentence_transformers",
        lambda: _ranked("CachedMultipleNegativesRankingLoss", mini_batch_size=2), _triplets,
        _sentence_outputs, _ranking_loss, wrap=_ddp_inside, lacks=_SENTENCES,
    ),
    Family(
        "torch.nn", "torch", _plain, _plain_inputs, _plain_outputs, _plain_loss,
        lacks={
            "generate": "no decoder", "save_pretrained": "not in torch.nn",
            "checkpointing": "not in torch.nn",
        },
    ),
]  # fmt: skip
FAMILIES = [*OPEN_CLIP, *TRANSFORMERS, *OTHERS]
