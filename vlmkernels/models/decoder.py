"""A causal language model with GPT-2's layers and parameter names: learned positions, tied head.

Radford et al. 2019: x += Attention(LN x); x += W2 gelu(W1 LN x); logits = LN(x) E^T. Linear weights are
[out, in], as everywhere in torch, and in the files that are written here; Hugging Face's GPT-2 has them
[in, out] under the same names (`CausalLM.from_hf_state_dict`). `CausalLM` is called like a decoder of
transformers, so `Flamingo` takes either.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from vlmkernels import intervals
from vlmkernels._activations import ACTIVATIONS, HUGGING_FACE
from vlmkernels.intervals import Intervals
from vlmkernels.models.parts.attention import Keep, SelfAttention, attend_beside, split_heads
from vlmkernels.models.parts.foreign_config import Part
from vlmkernels.models.parts.pretrained import (
    CONFIG_FILE,
    LATER,
    Pretrained,
    below,
    config_from_dict,
    naming,
)
from vlmkernels.models.parts.token_loss import IGNORE as IGNORE
from vlmkernels.models.parts.token_loss import label_faults, next_token_loss
from vlmkernels.models.parts.transformer import Block, LayerNorm
from vlmkernels.models.parts.weight_files import Source, read_json, read_state_dict
from vlmkernels.nn.dense import Linear, add, table_for, take_rows, tied_logits
from vlmkernels.nn.kv_cache import Beside
from vlmkernels.nn.kv_cache import KVCache as KVCache

SIZES = ("vocab_size", "width", "layers", "heads", "context_length", "mlp_ratio")
HF_CONFIG: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
# What is fixed in a CausalLM.
HF_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
HF_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Names of the first version of the format -> GPT-2's.
FIRST_NAMES = {
    "embed_tokens": "transformer.wte",
    "embed_positions": "transformer.wpe",
    "norm": "transformer.ln_f",
}
FIRST_NAMES_OF_LAYERS = {
    "norm_attn": "ln_1",
    "attn.to_qkv": "attn.c_attn",
    "attn.to_out": "attn.c_proj",
    "norm_mlp": "ln_2",
    "mlp.0": "mlp.c_fc",
    "mlp.2": "mlp.c_proj",
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a `CausalLM`; `context_length` is the longest text, generated tokens included.

    `activation` is that of the MLP, by its name in `vlmkernels.mlp` (GPT-2's own is "gelu_tanh"), `eps` that
    of the LayerNorms.
    """

    vocab_size: int
    width: int = 128
    layers: int = 4
    heads: int = 4
    context_length: int = 256
    mlp_ratio: int = 4
    activation: str = dataclasses.field(default="gelu", metadata=LATER)
    eps: float = dataclasses.field(default=1e-5, metadata=LATER)

    def __post_init__(self) -> None:
        faults = below(self, 1, *SIZES)
        if self.heads > 0 and self.width % self.heads:
            faults.append(f"heads must be a divisor of the width {self.width}, got {self.heads}")
        if self.activation not in ACTIVATIONS:
            faults.append(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if not self.eps >= 0:
            faults.append(f"eps must not be negative, got {self.eps}")
        if faults:
            raise ValueError("DecoderConfig: " + "; ".join(faults))


class CausalLMOutput(NamedTuple):
    logits: Tensor | None  # [B, T, V]
    past_key_values: KVCache | None
    hidden_states: tuple[Tensor, ...] | None = None  # [B, T, D] each
    loss: Tensor | None = None  # []


class DecoderAttention(SelfAttention):
    """Self-attention with GPT-2's names."""

    adds_residual: ClassVar = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(heads)
        self.c_attn = Linear(width, 3 * width)
        self.c_proj = Linear(width, width)

    def project(self, x: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.c_attn(x)
        query, key, value = split_heads(qkv, self.heads, 3)
        if wanted is not None:
            (query,) = split_heads(take_rows(qkv[..., : x.shape[-1]], wanted), self.heads)
        return query, key, value

    def mix(
        self,
        x: Tensor,  # [B, T, D]
        seen: Intervals | None,
        wanted: Tensor | None,  # [B, n] int64
        keep: Keep | None = None,
        **options: Any,
    ) -> Tensor:  # [B, n or T, D]
        if not isinstance(keep, Beside) or seen is None:
            return super().mix(x, seen, wanted, keep, **options)
        query, key, value = self.project(x, wanted)
        return attend_beside(query, (key, value), keep(key, value), seen)

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        seen: Intervals,
        wanted: Tensor | None = None,  # [B, n] int64
        keep: Keep | None = None,
        residual: Tensor | None = None,  # [B, n or T, D]
    ) -> Tensor:  # [B, n or T, D]
        return add(residual, self.c_proj, self.mix(x, seen, wanted, keep))


class CausalLM(Pretrained):
    """A causal language model: GPT-2, or a small one to train from scratch on a small machine."""

    model_type: ClassVar[str] = "decoder"
    config_class: ClassVar[type] = DecoderConfig
    format: ClassVar[dict[str, Any]] = {"format_version": 2, "linear_weights": "[out, in]"}
    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        c = self.config
        activation = ACTIVATIONS[c.activation].module
        wte, wpe = nn.Embedding(c.vocab_size, c.width), nn.Embedding(c.context_length, c.width)
        layers = nn.ModuleList(
            Block(c.width, DecoderAttention(c.width, c.heads), c.mlp_ratio * c.width, activation, c.eps)
            for _ in range(c.layers)
        )
        self.transformer = nn.ModuleDict(
            {"wte": wte, "wpe": wpe, "h": layers, "ln_f": LayerNorm(c.width, c.eps)}
        )
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # 2 * layers branches are summed
                branch = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 * (2 * c.layers) ** -0.5 if branch else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def get_input_embeddings(self) -> nn.Embedding:
        return cast(nn.Embedding, self.transformer["wte"])

    def forward(
        self,
        input_ids: Tensor,  # [B, T] int64
        attention_mask: Tensor | None = None,  # [B, past + T], 0 at padding
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
        labels: Tensor | None = None,  # [B, T] int64
        return_logits: bool = True,
    ) -> CausalLMOutput:
        """Logits [B, T, V] of the next token at each position, of the last `logits_to_keep` if not 0.

        The ones of a row of `attention_mask` are one run: padding is on the left, on the right or both.
        Positions count from the first one. With `use_cache` the result contains the keys and values, to be
        passed with the next tokens. With `output_hidden_states` it contains layers + 1 states of all T
        tokens: their embeddings and the output of each layer, the last one after the final LayerNorm.
        With `labels` it contains the loss: the mean over t of -log softmax(logits_t)[labels_(t+1)], labels of
        -100 excluded, 0 if all are. The loss forms no logits; `return_logits=False` leaves them out.
        ValueError for other shapes, and beyond `config.context_length`.
        """
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = past + input_ids.shape[-1]
        faults = []
        if input_ids.ndim != 2:
            faults.append(f"input_ids must be [B, T], got {list(input_ids.shape)}")
        elif attention_mask is not None and attention_mask.shape != (input_ids.shape[0], length):
            wanted, got = [input_ids.shape[0], length], list(attention_mask.shape)
            faults.append(f"attention_mask must be {wanted} with the cached tokens, got {got}")
        faults += label_faults(labels, input_ids, "input_ids")
        if logits_to_keep < 0:
            faults.append(f"logits_to_keep must not be negative, got {logits_to_keep}")
        if length > self.config.context_length:
            faults.append(
                f"input_ids must have at most context_length = {self.config.context_length} tokens, "
                f"got {length}"
            )
        if faults:
            raise ValueError("CausalLM: " + "; ".join(faults))
        if use_cache and past_key_values is None:
            past_key_values = KVCache()
        seen = intervals.causal(length - past, past, device=input_ids.device)  # [T] each
        positions = torch.arange(past, length, device=input_ids.device)
        if attention_mask is not None:
            first, last = (x[:, None] for x in intervals.runs(attention_mask.bool()))  # [B, 1]
            seen = Intervals(torch.maximum(seen.start, first), torch.minimum(seen.end, last))  # [B, T] each
            positions = (positions - first).clamp_min(0)
        x = self.transformer["wte"](input_ids) + self.transformer["wpe"](positions)  # [B, T, D]
        hidden = [x]
        for index, layer in enumerate(cast(nn.ModuleList, self.transformer["h"])):
            keep = None if past_key_values is None else partial(past_key_values.update, layer_idx=index)
            x = layer(x, seen, keep=keep)
            if output_hidden_states:
                hidden.append(x)
        if logits_to_keep and not output_hidden_states and labels is None:
            x = x[:, -logits_to_keep:]
        x = self.transformer["ln_f"](x)
        embedding = self.get_input_embeddings()
        logits = self.head(x[:, -logits_to_keep:]) if return_logits else None
        states = (*hidden[:-1], x) if output_hidden_states else None
        loss = None if labels is None else next_token_loss(x, table_for(x, embedding), labels)
        return CausalLMOutput(logits, past_key_values, states, loss)

    def alternatives(
        self,
        input_ids: Tensor,  # [B, k] int64
        past_key_values: KVCache,  # of T tokens
        attention_mask: Tensor | None = None,  # [B, T], 0 at padding
    ) -> Tensor:  # [B, k, D]
        """Hidden states, after the final LayerNorm, of k alternatives of the next token of each row.

        Each is read as if it alone followed the tokens of the cache, whose keys and values are not copied.
        `past_key_values.choose(index)` then adds one of each row to them. ValueError for other shapes, and
        beyond `config.context_length`.
        """
        past = past_key_values.get_seq_length()
        faults = []
        if input_ids.ndim != 2:
            faults.append(f"input_ids must be [B, k], got {list(input_ids.shape)}")
        elif attention_mask is not None and attention_mask.shape != (input_ids.shape[0], past):
            wanted, got = [input_ids.shape[0], past], list(attention_mask.shape)
            faults.append(f"attention_mask must be {wanted} like the cached tokens, got {got}")
        if past >= self.config.context_length:
            faults.append(
                f"past_key_values must have fewer than context_length = {self.config.context_length} tokens, "
                f"got {past}"
            )
        if faults:
            raise ValueError("CausalLM.alternatives: " + "; ".join(faults))
        seen = intervals.full(input_ids.shape[1], past, device=input_ids.device)
        positions = torch.full_like(input_ids, past)
        if attention_mask is not None:
            first, last = (x[:, None].expand_as(input_ids) for x in intervals.runs(attention_mask.bool()))
            seen, positions = Intervals(first, last), positions - first
        x = self.transformer["wte"](input_ids) + self.transformer["wpe"](positions)  # [B, k, D]
        for index, layer in enumerate(cast(nn.ModuleList, self.transformer["h"])):
            x = layer(x, seen, keep=Beside(past_key_values, index))
        return self.transformer["ln_f"](x)

    def head(
        self,
        hidden: Tensor,  # [..., D], after the final LayerNorm
    ) -> Tensor:  # [..., V]
        """Logits of the tokens after those of these hidden states."""
        return tied_logits(hidden, self.get_input_embeddings())

    def loss(
        self,
        tokens: Tensor,  # [B, T] int64
        labels: Tensor | None = None,  # [B, T] int64
        attention_mask: Tensor | None = None,  # [B, T], 0 at padding
    ) -> Tensor:
        """Mean negative log-likelihood of the labels (by default of the tokens, padding excluded)."""
        if labels is None:
            labels = tokens if attention_mask is None else tokens.masked_fill(~attention_mask.bool(), IGNORE)
        return self(tokens, attention_mask, labels=labels, return_logits=False).loss

    def upgrade(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return gpt2_names(state_dict)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Also where this is a part of another module, or of the average of one in a checkpoint."""
        named = gpt2_names(state_dict, prefix)
        state_dict.clear()
        state_dict.update(named)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @classmethod
    def from_hf_state_dict(cls, source: Source, **fields: Any) -> CausalLM:
        """A language model with the weights of Hugging Face's GPT2LMHeadModel or GPT2Model, in eval mode.

        `source` is a state dict or a file; its linear weights, [in, out] there, are transposed. What shapes
        do not determine is read from config.json beside a file; for a state dict `heads` must be given, and
        `activation` and `eps` are GPT-2's by default. Dropout, which acts only in training, is ignored.
        `fields` of DecoderConfig override all. ValueError lists what a CausalLM here does not support.
        """
        state_dict = read_state_dict(source)
        known: dict[str, Any] = {"activation": "gelu_tanh"}
        if not isinstance(source, Mapping):
            path = (Path(source) if Path(source).is_dir() else Path(source).parent) / CONFIG_FILE
            if path.is_file():
                content = read_json(path)
                with naming(path):
                    known = hf_fields(content)
        with naming(source):
            weights = _from_hf(state_dict)
            known = {**_infer_sizes(weights), **known, **fields}
            if "heads" not in known:
                raise ValueError(
                    "heads: not determined by shapes, and there is no config beside the weights; pass it, or "
                    f"put Hugging Face's {CONFIG_FILE} beside the file"
                )
            config = config_from_dict(DecoderConfig, known)
            return cls.with_weights(config, weights)

    @classmethod
    def from_hf_folder(cls, folder: str | os.PathLike[str], **fields: Any) -> CausalLM:
        """A language model from a folder of Hugging Face's GPT-2 (config.json and weights), in eval mode.

        `fields` of DecoderConfig override those of config.json.
        """
        if not (path := Path(folder) / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return cls.from_hf_state_dict(folder, **fields)

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The weights as Hugging Face's GPT2LMHeadModel has them: linear ones [in, out], a tied head."""
        out = {
            name: tensor.T.contiguous() if name.endswith(HF_TRANSPOSED) else tensor
            for name, tensor in self.state_dict().items()
        }
        return {**out, "lm_head.weight": out["transformer.wte.weight"]}


def gpt2_names(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The weights of a `CausalLM` under `prefix` by GPT-2's names, whichever version of the format they have.

    Its layers may belong to a Flamingo, whose own names remain. Other tensors do as well.
    """
    return {
        prefix + _gpt2_name(name.removeprefix(prefix)) if name.startswith(prefix) else name: tensor
        for name, tensor in state_dict.items()
    }


def _gpt2_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in FIRST_NAMES:
        return f"{FIRST_NAMES[module]}.{kind}"
    if layer := re.fullmatch(r"layers\.(\d+)\.(decoder_layer\.)?(.+)", module):
        index, wrapper, part = layer.groups("")
        return f"transformer.h.{index}.{wrapper}{FIRST_NAMES_OF_LAYERS.get(part, part)}.{kind}"
    return name


def hf_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of DecoderConfig for the config.json of a GPT-2; ValueError listing what is not supported."""
    if config.get("model_type") != "gpt2":
        raise ValueError(f"model_type must be 'gpt2', got {config.get('model_type')!r}")
    part = Part("config", config, HF_CONFIG, HF_FIXED)
    inner, width = part["n_inner"], max(part["n_embd"], 1)
    if inner is not None and (type(inner) is not int or inner < 1 or inner % width):
        part.fault("n_inner", f"null or a multiple of n_embd {part['n_embd']}")
    if part["activation_function"] not in HUGGING_FACE:
        part.fault("activation_function", f"one of {', '.join(HUGGING_FACE)}")
    if part.faults:
        raise ValueError("; ".join(part.faults))
    return {
        "vocab_size": part["vocab_size"],
        "width": part["n_embd"],
        "layers": part["n_layer"],
        "heads": part["n_head"],
        "context_length": part["n_positions"],
        "mlp_ratio": 4 if inner is None else inner // width,
        "activation": HUGGING_FACE[part["activation_function"]],
        "eps": part["layer_norm_epsilon"],
    }


def _from_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Hugging Face GPT-2 as ours; ValueError if they are [out, in] or the head is not tied."""
    buffers = (".attn.bias", ".attn.masked_bias")  # older releases of transformers stored them
    given = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in state_dict.items()
        if not name.endswith(buffers)
    }
    head, table = given.pop("lm_head.weight", None), given.get("transformer.wte.weight")
    faults = []
    if head is not None and table is not None and not (head is table or torch.equal(head, table)):
        faults.append(
            "lm_head.weight must equal transformer.wte.weight, to which the head of a CausalLM is tied"
        )
    turned = [
        name
        for name, tensor in given.items()
        if name.endswith("attn.c_attn.weight") and tensor.ndim == 2 and len(tensor) == 3 * tensor.shape[1]
    ]
    if turned:
        faults.append(
            f"{', '.join(turned)} [3 D, D], that is [out, in] as in files of this library (from_pretrained); "
            "Hugging Face's GPT-2 has [D, 3 D]"
        )
    if faults:
        raise ValueError("state_dict: " + "; ".join(faults))
    return {
        name: tensor.T.contiguous() if name.endswith(HF_TRANSPOSED) and tensor.ndim == 2 else tensor
        for name, tensor in given.items()
    }


def _infer_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of DecoderConfig that shapes determine; ValueError if the weights are not a GPT-2's."""
    needed = ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight")
    if missing := [name for name in needed if name not in weights or weights[name].ndim != 2]:
        raise ValueError(f"state_dict must be a GPT-2's, but it has no matrix {', '.join(missing)}")
    (vocab_size, width), (positions, _), (hidden, _) = (weights[name].shape for name in needed)
    matches = (re.match(r"transformer\.h\.(\d+)\.", name) for name in weights)
    return {
        "vocab_size": vocab_size,
        "width": width,
        "layers": len({match.group(1) for match in matches if match}),
        "context_length": positions,
        "mlp_ratio": hidden // max(width, 1),
    }


CONFIGS: dict[str, DecoderConfig] = {"emoji-tiny": DecoderConfig(vocab_size=4098, context_length=128)}
