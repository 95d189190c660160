"""Flamingo: a frozen vision encoder and a frozen language model, joined by trained layers.

    y <- y + tanh(a) CrossAttention(LN y, resampled image);  y <- y + tanh(b) FFW(LN y)   before LM layers

Source: Alayrac et al. 2022, "Flamingo: a Visual Language Model for Few-Shot Learning"; open_flamingo (MIT,
Awadalla et al. 2023) for sizes, parameter names and what the paper does not specify.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vlmkernels import intervals
from vlmkernels._activations import activation_of
from vlmkernels._modules import is_traced
from vlmkernels.models import _flamingo_lm as lm
from vlmkernels.models import decoder
from vlmkernels.models.clip import CONFIGS as CLIP_CONFIGS
from vlmkernels.models.clip import ClipConfig, image_tower
from vlmkernels.models.decoder import CausalLM, DecoderConfig
from vlmkernels.models.parts import generation, token_loss
from vlmkernels.models.parts.pretrained import LATER, Pretrained, below, config_from_dict
from vlmkernels.models.parts.weight_files import read_state_dict
from vlmkernels.nn.cross_attention import GatedCrossAttentionBlock
from vlmkernels.nn.media_cache import MediaCache
from vlmkernels.nn.perceiver import PerceiverResampler


@dataclass(frozen=True)
class FlamingoConfig:
    """Sizes of a Flamingo. Defaults: those of open_flamingo.

    `vision` is the CLIP whose image tower (a ViT) is used, `language` the library's own decoder; one that is
    None is given to `Flamingo` as a module, of `vision_width` (of its patch tokens), of `language_width` and
    `language_layers`. `cross_attn_every_n_layers`: a gated block stands before every n-th layer, the first
    before layer n. `normalize_patches` sends the patch tokens through CLIP's last LayerNorm, as open_clip
    does from version 2.24 on; OpenFlamingo's weights were made without. `max_num_media`, `max_num_frames`
    and `max_num_patches` of None mean no embedding of the image's, the frame's and the patch's place.
    `qk_norm`: a LayerNorm over each head of the queries and keys of all trained attention.
    `train_embeddings`: the rows of the two tokens in the input embedding are trained.
    """

    media_token_id: int
    endofchunk_token_id: int
    vision: ClipConfig | None = None
    language: DecoderConfig | None = None
    vision_width: int | None = None
    language_width: int | None = None
    language_layers: int | None = None
    cross_attn_every_n_layers: int = 1
    num_latents: int = 64
    resampler_depth: int = 6
    resampler_heads: int = 8
    resampler_dim_head: int = 64
    heads: int = 8
    dim_head: int = 64
    ff_mult: int = 4
    max_num_media: int | None = None
    max_num_frames: int | None = None
    only_attend_immediate_media: bool = True
    normalize_patches: bool = False
    train_embeddings: bool = True
    max_num_patches: int | None = field(default=None, metadata=LATER)
    qk_norm: bool = field(default=False, metadata=LATER)

    def __post_init__(self) -> None:
        nested: tuple[tuple[str, Any], ...] = (("vision", ClipConfig), ("language", DecoderConfig))
        for name, config_class in nested:
            if isinstance(getattr(self, name), Mapping):  # from JSON
                object.__setattr__(self, name, config_from_dict(config_class, getattr(self, name)))
        faults = []
        for name in ("media_token_id", "endofchunk_token_id"):
            if getattr(self, name) < 0 or (self.language and getattr(self, name) >= self.language.vocab_size):
                faults.append(f"{name} must be an id of the vocabulary, got {getattr(self, name)}")
        if self.media_token_id == self.endofchunk_token_id:
            faults.append(
                f"media_token_id and endofchunk_token_id must differ, got {self.media_token_id} for both"
            )
        if self.vision and not isinstance(self.vision.vision_layers, int):
            faults.append("vision must be a ViT, which has patch tokens, got a ModifiedResNet")
        sizes = (
            ("vision_width", self.vision and self.vision.vision_width, "vision"),
            ("language_width", self.language and self.language.width, "language"),
            ("language_layers", self.language and self.language.layers, "language"),
        )
        for name, own, part in sizes:
            given = getattr(self, name)
            if own is None and given is None and name != "language_layers":
                faults.append(f"{name} must be a number without `{part}`, got None")
            elif own is not None and given not in (None, own):
                faults.append(f"{name} must be {own}, as in `{part}`, got {given}")
        counts = ("cross_attn_every_n_layers", "num_latents", "resampler_depth", "heads", "dim_head")
        widths = ("vision_width", "language_width", "language_layers")
        places = ("max_num_media", "max_num_frames", "max_num_patches")
        more = ("resampler_heads", "resampler_dim_head", "ff_mult")
        faults += below(self, 1, *counts, *more, *widths, *places)
        if faults:
            raise ValueError("FlamingoConfig: " + "; ".join(faults))


class Flamingo(Pretrained):
    """Continues sequences of images and text in any order.

    `Flamingo(config)` builds both frozen parts at random; otherwise `vision_encoder` and `lang_encoder`
    are used, frozen, the language model's layers wrapped in place. A vision encoder has `patch_tokens`, as
    the towers of `CLIP` do, or maps images [N, 3, R, R] to patch tokens [N, v, D], or to a pair that ends
    with them. A language model is a decoder of transformers (GPT-2, GPT-J, OPT, Llama, GPT-NeoX, MPT and
    what has one of their layouts) or a `CausalLM`. ValueError if a module does not match the config.

    The trained parameters are the resampler, the gated blocks and two rows of the input embedding: the
    gradient of the embedding is zero elsewhere, so give it no weight decay (see `parameter_groups`). In
    training mode the vision encoder stays in evaluation mode. Called directly, `lang_encoder` is the frozen
    language model.
    """

    model_type: ClassVar[str] = "flamingo"
    config_class: ClassVar[type] = FlamingoConfig
    format: ClassVar[dict[str, Any]] = CausalLM.format  # of the language model in it
    config: FlamingoConfig

    def __init__(
        self,
        config: FlamingoConfig,
        *,
        vision_encoder: nn.Module | None = None,
        lang_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__(config)
        c = self.config
        if vision_encoder is None:
            if c.vision is None:
                raise ValueError("Flamingo: vision_encoder must be given, since config.vision is None")
            vision_encoder = image_tower(c.vision)
        elif c.vision is not None:
            with torch.device("meta"):
                wanted = image_tower(c.vision)
            both = [{k: x.shape for k, x in each.state_dict().items()} for each in (vision_encoder, wanted)]
            if both[0] != both[1]:
                raise ValueError("Flamingo: vision_encoder has other tensors than the tower of config.vision")
            if _not_in_shapes(vision_encoder) != _not_in_shapes(wanted):
                what = "heads, activations, epsilons or pooling"
                raise ValueError(f"Flamingo: vision_encoder has other {what} than the tower of config.vision")
        if lang_encoder is None:
            if c.language is None:
                raise ValueError("Flamingo: lang_encoder must be given, since config.language is None")
            lang_encoder = CausalLM(c.language)
        width = self._check_language_model(lang_encoder)
        path, layers = lm.decoder_layers(lang_encoder)
        vision_width = c.vision.vision_width if c.vision else cast(int, c.vision_width)
        blocks = [
            GatedCrossAttentionBlock(
                width,
                vision_width,
                dim_head=c.dim_head,
                heads=c.heads,
                ff_mult=c.ff_mult,
                only_attend_immediate_media=c.only_attend_immediate_media,
                qk_norm=c.qk_norm,
            )
            if (index + 1) % c.cross_attn_every_n_layers == 0
            else None
            for index in range(len(layers))
        ]
        self._condition = lm.MediaCondition()
        self._layers_path = path
        self._call = generation.LanguageModelCall(lang_encoder)
        self.vision_encoder = vision_encoder.requires_grad_(False).eval()
        self.perceiver = PerceiverResampler(
            vision_width,
            depth=c.resampler_depth,
            dim_head=c.resampler_dim_head,
            heads=c.resampler_heads,
            num_latents=c.num_latents,
            max_num_media=c.max_num_media,
            max_num_frames=c.max_num_frames,
            max_num_patches=c.max_num_patches,
            ff_mult=c.ff_mult,
            qk_norm=c.qk_norm,
        )
        self.lang_encoder = lang_encoder.requires_grad_(False)
        lm.insert_blocks(lang_encoder, blocks, self._condition)
        if c.train_embeddings:
            lm.input_embeddings(lang_encoder).weight.requires_grad_(True)
        self._train_two_rows()
        self.register_load_state_dict_post_hook(Flamingo._train_two_rows)

    def _check_language_model(self, model: nn.Module) -> int:
        c = self.config
        _, layers = lm.decoder_layers(model)
        width, rows = lm.language_width(model), len(lm.input_embeddings(model).weight)
        faults = []
        if any(isinstance(layer, lm.FlamingoLayer) for layer in layers):
            faults.append("it already belongs to a Flamingo")
        if c.language is not None and getattr(model, "config", None) != c.language:
            faults.append("its config is not config.language")
        if c.language_width not in (None, width):
            faults.append(f"its width is {width}, config.language_width {c.language_width}")
        if c.language_layers not in (None, len(layers)):
            faults.append(f"it has {len(layers)} layers, config.language_layers is {c.language_layers}")
        if c.cross_attn_every_n_layers > len(layers):
            faults.append(
                f"it has {len(layers)} layers, cross_attn_every_n_layers is {c.cross_attn_every_n_layers}"
            )
        if max(c.media_token_id, c.endofchunk_token_id) >= rows:
            ids = f"{c.media_token_id} and {c.endofchunk_token_id}"
            faults.append(
                f"its embedding has {rows} rows, the tokens are {ids} (see its resize_token_embeddings)"
            )
        if faults:
            raise ValueError(f"Flamingo: lang_encoder {type(model).__name__}: " + "; ".join(faults))
        return width

    def _train_two_rows(self, *loaded: Any) -> None:
        if self.config.train_embeddings:
            tokens = (self.config.media_token_id, self.config.endofchunk_token_id)
            lm.TrainedRows.of(lm.input_embeddings(self.lang_encoder), tokens)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._train_two_rows()

    def train(self, mode: bool = True) -> Flamingo:
        super().train(mode)
        self.vision_encoder.eval()
        return self

    def gated_blocks(self) -> Iterator[GatedCrossAttentionBlock]:
        """The gated cross-attention blocks, in the order of the layers."""
        for layer in self.lang_encoder.get_submodule(self._layers_path).children():
            if layer.gated_cross_attn_layer is not None:
                yield cast(GatedCrossAttentionBlock, layer.gated_cross_attn_layer)

    def parameter_groups(self, weight_decay: float = 0.1) -> list[dict[str, Any]]:
        """The trained parameters for an optimizer, with weight decay only on the gated blocks."""
        decayed = [p for block in self.gated_blocks() for p in block.parameters() if p.requires_grad]
        seen = {id(p) for p in decayed}
        plain = [p for p in self.parameters() if p.requires_grad and id(p) not in seen]
        return [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def encode_vision(
        self,
        vision_x: Tensor,  # [B, M, F, 3, R, R]
    ) -> Tensor:  # [B, M, F, v, Dv]
        """Patch tokens of M images (of F frames) per sample, from the frozen encoder."""
        images = vision_x.flatten(0, 2)
        patch_tokens: Any = getattr(self.vision_encoder, "patch_tokens", None)
        if patch_tokens is not None:
            tokens = patch_tokens(images, self.config.normalize_patches)
        else:
            tokens = self.vision_encoder(images)
            tokens = tokens if isinstance(tokens, Tensor) else tokens[-1]
        return tokens.unflatten(0, vision_x.shape[:3])

    def encode_media(
        self,
        vision_x: Tensor,  # [B, M, F, 3, R, R] or [B, M, F, v, Dv]
    ) -> Tensor:  # [B, M, n, Dv]
        """The n latents of each image, from pixels or from the result of `encode_vision`."""
        return self.perceiver(self.encode_vision(vision_x) if vision_x.ndim == 6 else vision_x)

    def forward(
        self,
        vision_x: Tensor | None,  # [B, M, F, 3, R, R] or [B, M, F, v, Dv]
        lang_x: Tensor,  # [B, T] int64
        attention_mask: Tensor | None = None,  # [B, T], 0 at padding
        labels: Tensor | None = None,  # [B, T] int64
        return_logits: bool = True,
    ) -> dict[str, Tensor]:
        """`logits` [B, T, V] of the next token and, with labels, `loss`: mean NLL of those not -100, or 0.

        With labels, `return_logits=False` saves the logits, which the loss of a linear head does not need.
        Text attends to the last image before it (with ``only_attend_immediate_media=False``, to all of them);
        image i of a sample belongs to its i-th `config.media_token_id`; images beyond the last are not seen.
        `vision_x` is pixels, patch tokens from `encode_vision` (which may be cached), or None for text only.
        Labels are shifted here (see `few_shot.media_labels`). Positions count from the first real token.

        Raises:
            ValueError: naming every invalid argument; on the CPU also for more image tokens than images.
        """
        if not torch.compiler.is_compiling():
            self._train_two_rows()
        media = self._checked_media(vision_x, lang_x, attention_mask, labels)
        locations = lang_x == self.config.media_token_id
        attend = "immediate" if self.config.only_attend_immediate_media else "all_previous"
        seen = intervals.media(intervals.text_time(locations), media.shape[2], media.shape[1], attend=attend)
        predict = partial(lm.predict, self.lang_encoder, self._call, lang_x, attention_mask)
        return self._conditioned(partial(predict, labels, return_logits), media=media, intervals=seen)

    def _conditioned(self, call: Callable[[], Any], **seen: Any) -> Any:
        if not self._condition.empty:
            raise RuntimeError("Flamingo: called during another call of the same model")
        try:
            for name, value in seen.items():
                setattr(self._condition, name, value)
            return call()
        finally:
            self._condition.media = self._condition.intervals = self._condition.cache = None

    def _checked_media(
        self,
        vision_x: Tensor | None,
        lang_x: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
    ) -> Tensor:  # [B, M, n, Dv]
        faults = []
        if lang_x.ndim != 2 or lang_x.dtype not in (torch.int32, torch.int64):
            faults.append(f"lang_x must be integers [B, T], got {lang_x.dtype} {list(lang_x.shape)}")
        if attention_mask is not None and attention_mask.shape != lang_x.shape:
            faults.append(f"attention_mask must be {list(lang_x.shape)}, got {list(attention_mask.shape)}")
        faults += token_loss.label_faults(labels, lang_x, "lang_x")
        if vision_x is not None:
            shape = list(vision_x.shape)
            size = self.config.vision.image_size if self.config.vision else "R"
            wanted = f"[B, M, F, 3, {size}, {size}] or [B, M, F, v, {self.perceiver.dim}]"
            if vision_x.ndim == 6:
                fits = shape[3] == 3 and size in ("R", shape[4]) and size in ("R", shape[5])
            else:
                fits = vision_x.ndim == 5 and shape[4] == self.perceiver.dim
            if not fits or shape[:1] != list(lang_x.shape[:1]):
                faults.append(
                    f"vision_x must be {wanted} with the batch size of lang_x {list(lang_x.shape)}, "
                    f"got {shape}"
                )
        images = 0 if vision_x is None else vision_x.shape[1]
        if not faults and lang_x.device.type == "cpu" and not is_traced():
            counts = (lang_x == self.config.media_token_id).sum(1)
            if (counts > images).any():
                faults.append(
                    f"lang_x: up to {int(counts.max())} image tokens in a row, vision_x has {images}"
                )
        if faults:
            raise ValueError("Flamingo: " + "; ".join(faults))
        if vision_x is None:
            latents = self.perceiver.latents
            return lang_x.new_empty((lang_x.shape[0], 0, *latents.shape), dtype=latents.dtype)
        return self.encode_media(vision_x)

    @torch.no_grad()
    def generate(
        self,
        vision_x: Tensor | None,  # [B, M, F, 3, R, R] or [B, M, F, v, Dv]
        lang_x: Tensor,  # [B, T] int64, prompts
        *,
        attention_mask: Tensor | None = None,  # [B, T], 0 at padding on the left
        max_new_tokens: int,
        eos_token_id: int | None = None,
        prefill_chunk: int | None = None,
        **decoding: Any,
    ) -> Tensor:
        """New tokens [B, n] after each prompt; after a row's end, `pad_token_id`.

        A row ends with `eos_token_id`, by default the config's end-of-chunk token. Keys and values of
        the images are computed once for all steps. The prompt is read `prefill_chunk` tokens at a time; None
        reads it at once. The image token is never chosen. `decoding`: `num_beams`, `do_sample`,
        `temperature`, `top_k`, `top_p`, `pad_token_id`, `length_penalty`, `early_stopping`,
        `suppress_tokens`, `generator`, as in `models.generation.generate`. ValueError as `forward`, for
        padding on the right, and from there.
        """
        chunk = lang_x.shape[-1] if prefill_chunk is None else prefill_chunk
        if lang_x.numel() == 0 or chunk < 1:
            raise ValueError(
                f"Flamingo: lang_x must be prompts [B, T], got {list(lang_x.shape)}, "
                f"and prefill_chunk at least 1, got {prefill_chunk}"
            )
        if attention_mask is not None and not attention_mask[..., -1].bool().all():
            raise ValueError(
                "Flamingo: attention_mask must have padding on the left for generate, got some at the end"
            )
        session = _Decoding(self, self._checked_media(vision_x, lang_x, attention_mask))
        for first in range(0, lang_x.shape[1], chunk):
            tokens = lang_x[:, first : first + chunk]
            mask = None if attention_mask is None else attention_mask[:, first : first + chunk]
            logits = session.read(tokens, mask)
        decoding["suppress_tokens"] = {self.config.media_token_id, *decoding.get("suppress_tokens", ())}
        return generation.generate(
            logits,
            session.step,
            session.reorder,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.config.endofchunk_token_id if eos_token_id is None else eos_token_id,
            **decoding,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """As `Pretrained.save_pretrained`; ValueError if the config does not contain both frozen parts."""
        if self.config.vision is None or self.config.language is None:
            raise ValueError(
                "Flamingo: a vision or language model of another library cannot be saved; "
                "openflamingo_state_dict() returns the trained weights"
            )
        super().save_pretrained(folder)

    def upgrade(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ours = isinstance(self.lang_encoder, CausalLM)
        return decoder.gpt2_names(state_dict, "lang_encoder.") if ours else dict(state_dict)

    def openflamingo_state_dict(self) -> dict[str, Tensor]:
        """The trained weights under the names of an OpenFlamingo checkpoint: all that such a file needs."""
        embedding = lm.input_embeddings(self.lang_encoder).weight
        name = next(name for name, parameter in self.named_parameters() if parameter is embedding)
        return {
            key: tensor
            for key, tensor in self.state_dict().items()
            if key == name or key.startswith("perceiver.") or f".{lm.GATED}." in key
        }

    def load_openflamingo_state_dict(self, source: Mapping[str, Any] | str | os.PathLike[str]) -> None:
        """Loads open_flamingo's weights: a checkpoint (a mapping or a file), or a whole state dict.

        Resampler and gated blocks must be complete. Tensors of the frozen parts are loaded if this model
        has them and skipped otherwise (buffers differ between versions of transformers). ValueError
        listing every missing, unknown and mis-shaped key; FileNotFoundError.
        """
        own = self.state_dict()
        given = self.upgrade(lm.without_duplicates(read_state_dict(source), self._layers_path))
        trained = {
            name for name in [*own, *given] if name.startswith("perceiver.") or f".{lm.GATED}." in name
        }
        lists = {
            "missing": sorted(trained - given.keys()),
            "unknown": sorted(trained - own.keys()),
            "of another shape": [
                f"{name} must be {list(own[name].shape)}, got {list(tensor.shape)}"
                for name, tensor in given.items()
                if name in own and own[name].shape != tensor.shape
            ],
        }
        faults = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in lists.items() if names]
        if faults:
            raise ValueError("state_dict does not match Flamingo: " + "; ".join(faults))
        self.load_state_dict({name: given[name] for name in given if name in own}, strict=False)


def _not_in_shapes(tower: nn.Module) -> list[Any]:
    """Heads, epsilons, pooling and activation of each module that has them."""
    of = ("heads", "eps", "pool")
    found = [(*(getattr(part, name, None) for name in of), activation_of(part)) for part in tower.modules()]
    return [each for each in found if each != (None,) * 4]


class _Decoding(generation.Decoding):
    """One run of `generate`: the language model's texts, and the images that they attend to."""

    def __init__(self, model: Flamingo, media: Tensor) -> None:
        super().__init__(model.lang_encoder, model._call)
        self.model = model
        self.media = MediaCache(model.gated_blocks(), media)

    def run(self, arguments: dict[str, Any]) -> Any:
        self.media.step(arguments["input_ids"] == self.model.config.media_token_id)
        return self.model._conditioned(partial(self.model.lang_encoder, **arguments), cache=self.media)

    def reorder(self, rows: Tensor) -> None:  # [M]
        super().reorder(rows)
        self.media.reorder(rows)


def _openflamingo(width: int, layers: int, every: int) -> FlamingoConfig:
    # Ids: the two tokens that open_flamingo adds to the 50,277 of the GPT-NeoX tokenizer.
    return FlamingoConfig(
        media_token_id=50278,
        endofchunk_token_id=50277,
        vision=CLIP_CONFIGS["ViT-L-14-quickgelu"],
        language_width=width,
        language_layers=layers,
        cross_attn_every_n_layers=every,
    )


CONFIGS: dict[str, FlamingoConfig] = {
    "OpenFlamingo-3B": _openflamingo(2048, 24, 1),  # MPT-1B
    "OpenFlamingo-3B-Instruct": _openflamingo(2048, 24, 1),  # MPT-1B, Dolly
    "OpenFlamingo-4B": _openflamingo(2560, 32, 2),  # RedPajama-INCITE-3B
    "OpenFlamingo-4B-Instruct": _openflamingo(2560, 32, 2),  # RedPajama-INCITE-3B, instruct
    "OpenFlamingo-9B": _openflamingo(4096, 32, 4),  # MPT-7B
    "emoji-tiny": FlamingoConfig(
        media_token_id=4096,
        endofchunk_token_id=4097,
        vision=CLIP_CONFIGS["emoji-tiny"],
        language=decoder.CONFIGS["emoji-tiny"],
        num_latents=16,
        resampler_depth=2,
        resampler_heads=4,
        resampler_dim_head=32,
        heads=4,
        dim_head=32,
    ),
}
