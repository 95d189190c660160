"""VisualGPT: GPT-2 that attends to every level of an image encoder, through gates with a threshold.

Chen et al. 2022 (arXiv:2102.10407). Regions of an image, or the positions of a grid, go through a post-norm
encoder; E_1 .. E_L are the results of its L layers. A block of the decoder, with one LayerNorm LN_1 for three
purposes and one cross-attention for all levels:

    a   = x + SelfAttention(LN_1 x)
    e_l = CrossAttention(LN_1 a, LN_1 E_l)
    r   = srau(a, e, W_l [a; e_l] + b_l)        (`vlmkernels.srau`: no residual besides the gates)
    y   = r + MLP(LN_2 r)

The products of the gates are split: W_l a for all levels in one, W_l e_l in one for each; LN_1 a is
multiplied into queries once. Keys and values of the levels are computed once for an image, whatever the
number of its texts and tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels import intervals
from vlmkernels.models._visualgpt_layers import Encoder, Regions, VisualBlock
from vlmkernels.models._visualgpt_layers import VisualGPTConfig as VisualGPTConfig
from vlmkernels.models._visualgpt_weights import from_original, to_original
from vlmkernels.models.decoder import CausalLM
from vlmkernels.models.parts.generation import StepOutput, generate
from vlmkernels.models.parts.pretrained import Pretrained, config_from_dict, naming
from vlmkernels.models.parts.resnet import ResNet
from vlmkernels.models.parts.token_loss import IGNORE, label_faults, next_token_loss
from vlmkernels.models.parts.transformer import LayerNorm
from vlmkernels.models.parts.weight_files import Source, read_state_dict
from vlmkernels.nn.dense import table_for, tied_logits
from vlmkernels.nn.kv_cache import KVCache

# Fields of a VisualGPT's config that its language model determines.
SHARED = ("vocab_size", "width", "layers", "heads", "context_length", "mlp_ratio", "activation")


class VisualGPT(Pretrained):
    """Captions of images, given as pixels or as features of regions, by a GPT-2."""

    model_type: ClassVar[str] = "visualgpt"
    config_class: ClassVar[type] = VisualGPTConfig
    config: VisualGPTConfig

    def __init__(self, config: VisualGPTConfig) -> None:
        super().__init__(config)
        width, region_width = config.width, config.region_width
        self.tower: ResNet | None = None
        if config.image_size is not None:
            self.tower = ResNet(config.conv_blocks, config.conv_width, pool=config.conv_pool)
            region_width = self.tower.channels
        self.encoder = Encoder(config, region_width)
        wte, wpe = nn.Embedding(config.vocab_size, width), nn.Embedding(config.context_length, width)
        blocks = nn.ModuleList(VisualBlock(config) for _ in range(config.layers))
        self.transformer = nn.ModuleDict({"wte": wte, "wpe": wpe, "h": blocks, "ln_f": LayerNorm(width)})
        for name, parameter in self.transformer.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for name, parameter in (*self.encoder.named_parameters(), *self.transformer.named_parameters()):
            if parameter.ndim == 2 and (".cross." in name or name.startswith(("layers.", "projection."))):
                nn.init.xavier_uniform_(parameter)
            elif "gate_" in name and parameter.ndim == 2:
                nn.init.uniform_(parameter, -((2 * width) ** -0.5), (2 * width) ** -0.5)

    @property
    def blocks(self) -> list[VisualBlock]:
        return [cast(VisualBlock, block) for block in cast(nn.ModuleList, self.transformer["h"])]

    def encode(self, images: Tensor) -> Regions:  # [B, 3, R, R], or regions [B, N, F]
        """All levels of the encoder for pixels, or for the features of regions, rows of zeros at their end.

        ValueError for another shape or dtype than the config's.
        """
        side, width = self.config.image_size, self.config.region_width
        given = list(images.shape)
        if side is None:
            wanted, fits = f"[B, N, {width}] of regions", images.dim() == 3 and images.shape[2] == width
            fits = fits and images.shape[1] > 0
        else:
            wanted, fits = f"[B, 3, {side}, {side}]", given[1:] == [3, side, side]
        if not fits or not images.is_floating_point():
            raise ValueError(f"VisualGPT: images must be floating {wanted}, got {images.dtype} {given}")
        if self.tower is not None:
            images = self.tower(images).flatten(2).transpose(1, 2)
        return self.encoder(images)

    def forward(
        self,
        images: Tensor,  # [B, 3, R, R], or regions [B, N, F]
        tokens: Tensor,  # [B k, T] int64
        labels: Tensor | None = None,  # [B k, T] int64
        *,
        return_logits: bool = False,
        per_token: bool = False,
    ) -> dict[str, Tensor]:
        """Cross-entropy of the next tokens of k texts for each image, those of an image one after the other.

        Args:
            tokens: texts from their start token on, `pad_id` at their end.
            labels: of `tokens`, -100 where not counted; None: the tokens without padding.
            return_logits: also return `logits`.
            per_token: return the loss of each label instead of the mean.

        Returns:
            `loss`: mean over the labels of -log P(label | image, tokens before), 0 if there are none; with
            `per_token` [B k, T], 0 at the first one and where not counted. `logits` [B k, T, V].

        Raises:
            ValueError: naming every argument of invalid shape or dtype.
        """
        config, faults = self.config, []
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            faults.append(f"tokens must be int64 [B, T], got {tokens.dtype} {list(tokens.shape)}")
        else:
            if not 1 <= tokens.shape[1] <= config.context_length:
                most = f"1 to context_length {config.context_length}"
                faults.append(f"tokens must have {most} columns, got {tokens.shape[1]}")
            rows, count = tokens.shape[0], images.shape[0]
            if rows != count and (count == 0 or rows % count):
                got = f"{rows} and {count}"
                faults.append(f"tokens must have as many rows as images, or a multiple of them, got {got}")
            faults += label_faults(labels, tokens, "tokens")
        if faults:
            raise ValueError("VisualGPT: " + "; ".join(faults))
        kept = tokens != config.pad_id
        hidden = self._hidden(self.encode(images), tokens, kept)  # [B k, T, D]
        if labels is None:
            labels = tokens.masked_fill(~kept, IGNORE)
        table = table_for(hidden, self.transformer["wte"])
        if per_token:
            successors = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
            loss = vlmkernels.linear_cross_entropy(
                hidden, table, successors, ignore_index=IGNORE, reduction="none"
            )
            loss = F.pad(loss[:, :-1], (1, 0))
        else:
            loss = next_token_loss(hidden, table, labels)
        return {"loss": loss, "logits": self._logits(hidden)} if return_logits else {"loss": loss}

    def _logits(self, hidden: Tensor) -> Tensor:  # [..., D] -> [..., V]
        return tied_logits(hidden, self.transformer["wte"])

    def _embed(self, tokens: Tensor, past: int = 0) -> Tensor:  # [N, T] -> [N, T, D]
        places = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        return self.transformer["wte"](tokens) + self.transformer["wpe"](places)

    def _hidden(self, regions: Regions, tokens: Tensor, kept: Tensor) -> Tensor:  # [B k, T] -> [B k, T, D]
        x = self._embed(tokens)
        seen = intervals.causal(tokens.shape[1], device=tokens.device)
        for block in self.blocks:
            x = block(x, seen, None, regions, kept)
        return self.transformer["ln_f"](x)

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,  # [B, 3, R, R], or regions [B, N, F]
        prompts: Tensor | None = None,  # [B, P] int64
        *,
        max_new_tokens: int,
        eos_token_id: int | None = None,
        **decoding: Any,
    ) -> Tensor:  # [B, n]
        """Text after the prompts; keys and values are cached. Put the model in evaluation mode first.

        Args:
            prompts: start token first, then a text that the caption continues, without padding; None: only
                the start token.
            max_new_tokens: P + max_new_tokens <= context_length.
            eos_token_id: ends a text; None: the config's.
            decoding: num_beams, do_sample, temperature, top_k, top_p, length_penalty, early_stopping,
                suppress_tokens, generator: see `vlmkernels.models.generation.generate`.

        Returns:
            The new tokens only, the config's `pad_id` after the end.

        Raises:
            ValueError: for invalid arguments.
        """
        room = self.config.context_length - (1 if prompts is None else prompts.shape[-1])
        if not 1 <= max_new_tokens <= room:
            raise ValueError(f"max_new_tokens must be in [1, {room}] after the prompts, got {max_new_tokens}")
        session = VisualDecoding(self, images, prompts)
        return generate(
            session.first_logits,
            session.step,
            session.reorder,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.config.end_id if eos_token_id is None else eos_token_id,
            pad_token_id=self.config.pad_id,
            **decoding,
        )

    @classmethod
    def from_language_model(cls, language_model: CausalLM, **fields: Any) -> VisualGPT:
        """A new model around a GPT-2, whose weights it starts from; `fields` of the config that it lacks.

        `CausalLM.from_hf_folder` and `from_hf_state_dict` read any GPT-2. ValueError for one with another
        epsilon than GPT-2's, and for fields that differ from its sizes.
        """
        given = language_model.config
        faults = [] if given.eps == 1e-5 else [f"eps of the language model must be 1e-5, got {given.eps}"]
        sizes = {name: getattr(given, name) for name in SHARED}
        faults += [
            f"{name} must be that of the language model, {size}, got {fields[name]}"
            for name, size in sizes.items()
            if fields.get(name, size) != size
        ]
        if faults:
            raise ValueError("VisualGPT: " + "; ".join(faults))
        model = cls(config_from_dict(VisualGPTConfig, {**sizes, **fields}))
        model.load_state_dict(language_model.state_dict(), strict=False)
        return model

    @classmethod
    def from_original_state_dict(cls, source: Source, **fields: Any) -> VisualGPT:
        """The model of a state dict, or a file, of the authors' code, in evaluation mode.

        Its sizes are those of the weights, heads are of 64 channels, and `fields` of the config override all.
        Weights that their code never uses are ignored. ValueError lists what does not match.
        """
        state_dict = read_state_dict(source)
        with naming(source):
            sizes, weights = from_original(state_dict)
            return cls.with_weights(config_from_dict(VisualGPTConfig, {**sizes, **fields}), weights)

    def original_state_dict(self) -> dict[str, Tensor]:
        """The weights as the authors' code reads them, those that it never uses as zeros."""
        return to_original(self.state_dict(), self.config)

    def check_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """As in `Pretrained`, with a separate error for weights of the authors' code."""
        if "encoder.fc.weight" in state_dict:
            raise ValueError(
                "state_dict is of the authors' code: read it by VisualGPT.from_original_state_dict"
            )
        super().check_weights(state_dict)


class VisualDecoding:
    """Texts being generated: cached keys and values of text and image, one set of the latter for an image."""

    def __init__(self, model: VisualGPT, images: Tensor, prompts: Tensor | None = None) -> None:
        self.model = model
        self.regions = model.encode(images)
        self.memory = [block.keys_values(self.regions) for block in model.blocks]
        self.cache = KVCache()
        self.image = torch.arange(len(images), device=images.device)  # [N], of each text
        if prompts is None:
            prompts = torch.full((len(images), 1), model.config.start_id, device=images.device)
        if prompts.dim() != 2 or len(prompts) != len(images) or prompts.dtype != torch.int64:
            wanted, got = f"int64 [{len(images)}, P]", f"{prompts.dtype} {list(prompts.shape)}"
            raise ValueError(f"VisualGPT: prompts must be {wanted}, got {got}")
        self.first_logits = model._logits(self._read(prompts)[:, -1])

    def _read(self, tokens: Tensor) -> Tensor:  # [N, t] -> [N, t, D]
        past, length = self.cache.get_seq_length(), tokens.shape[1]
        x = self.model._embed(tokens, past)
        seen = intervals.causal(length, past, device=x.device)
        for index, block in enumerate(self.model.blocks):
            keep = partial(self.cache.update, layer_idx=index)
            x = block(x, seen, self.memory[index], self.regions, keep=keep)
        return self.model.transformer["ln_f"](x)

    def step(self, tokens: Tensor, return_hidden: bool = False) -> Any:  # [N] -> [N, V] or StepOutput
        """Logits of the tokens after `tokens`, which are added to the cache."""
        hidden = self._read(tokens[:, None])[:, 0]
        logits = self.model._logits(hidden)
        return StepOutput(logits, hidden) if return_hidden else logits

    def reorder(self, rows: Tensor) -> None:  # [M]
        """Selects rows of the texts; M may differ from N."""
        self.cache.reorder_cache(rows)
        self.image = self.image[rows]
        images = len(self.regions.levels)
        texts = len(rows) // images if images else 0
        in_order = torch.arange(images, device=rows.device).repeat_interleave(texts)
        if not torch.equal(self.image, in_order):
            self.memory = [(key[self.image], value[self.image]) for key, value in self.memory]
            levels, mask = self.regions
            self.regions = Regions(levels[self.image], None if mask is None else mask[self.image])
            self.image = torch.arange(len(rows), device=rows.device)


CONFIGS: dict[str, VisualGPTConfig] = {
    "visualgpt": VisualGPTConfig(),
    "visualgpt-resnet50": VisualGPTConfig(image_size=224),
    "emoji-tiny": VisualGPTConfig(
        image_size=48,
        conv_blocks=(1, 1, 1),
        conv_width=16,
        conv_pool=False,
        width=128,
        encoder_mlp_width=256,
        layers=4,
        heads=4,
        context_length=32,
        vocab_size=4098,
        start_id=4096,
        end_id=4097,
        pad_id=0,
        dropout=0.0,
        cross_dropout=0.0,
    ),
}
