"""MAGIC (Su et al. 2022): a frozen language model writes, a frozen image-text model says what fits the image.

v* = argmax over the k likeliest v of (1 - alpha) p(v) - alpha max_j cos(h_v, h_j) + beta softmax_k(s(v)):
p is the softmax over the whole vocabulary, h are hidden states after the final norm, the h_j those of all
tokens before, and s is the similarity of the image with the text that ends in v. Without the last term this
is contrastive search (Su et al., NeurIPS 2022). Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import vlmkernels
from vlmkernels.models._magic_lm import take, texts_of

K, ALPHA, BETA, NEW_TOKENS, TEXT_TOKENS = 45, 0.1, 2.0, 15, 60  # of the paper's captions of COCO
SCALE = 100.0  # that of every published CLIP, for scorers that were not trained with one
CONTEXTS = ("context_length", "n_positions", "max_position_embeddings")  # names of the longest text


class Scorer(Protocol):
    """A model of images and texts, which are of no size in common with the language model."""

    def similarity(
        self,
        image_features: Tensor,  # [B, ...]
        texts: Sequence[Sequence[str]],  # B of k
    ) -> Tensor:  # [B, k]
        """Logits of the texts of each image: similarities times the scale with which they were trained."""


class DualEncoderScorer:
    """A trained CLIP, SigLIP or ALIGN with its tokenizer: scale * cosine, for image features [B, E]."""

    def __init__(self, model: Any, tokenizer: Callable[[list[str]], Tensor]) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def similarity(
        self,
        image_features: Tensor,  # [B, E]
        texts: Sequence[Sequence[str]],  # B of k
    ) -> Tensor:  # [B, k]
        different, place = distinct(texts)
        tokens = self.tokenizer(different).to(next(self.model.parameters()).device)
        found = self.model.encode_text(tokens, normalize=True)
        images = nn.functional.normalize(image_features.to(found), dim=-1)
        return self.model.scale() * torch.einsum("be,bke->bk", images, found[place.to(found.device)])


class ASIFScorer:
    """An `ASIF`: scale * score, for image features [B, D] of its image encoder.

    ASIF's scores are cosines without a trained scale.
    """

    def __init__(self, asif: Any, scale: float = SCALE) -> None:
        self.asif, self.scale = asif, scale

    @torch.no_grad()
    def similarity(
        self,
        image_features: Tensor,  # [B, D]
        texts: Sequence[Sequence[str]],  # B of k
    ) -> Tensor:  # [B, k]
        different, place = distinct(texts)
        seen, read = self.asif.encode_images(image_features), self.asif.encode_texts(different)
        scores = [
            vlmkernels.relative_similarity(
                tuple(x[row : row + 1] for x in seen), tuple(x[place[row]] for x in read)
            )
            for row in range(len(texts))
        ]
        return self.scale * torch.cat(scores)


class MAGIC:
    """CLIP-guided decoding by a language model that has never seen an image.

    `language_model` is called like a decoder of transformers: its causal language models, or a `CausalLM`.
    Keys and values of the text so far are shared by the k candidates of a step, not copied, for `CausalLM`
    and for GPT-2, GPT-J, GPT-NeoX, Llama and OPT of transformers. `scorer` may be None for `beta=0`.
    `decode` makes the text of some ids for the scorer (default: as for `scorer=None`, none is made).
    `eos_token_id` ends a text; `pad_token_id` fills the rest (default: the end).

    Both models should be in evaluation mode. They may be on different devices.
    """

    def __init__(
        self,
        language_model: nn.Module,
        scorer: Scorer | None = None,
        *,
        decode: Callable[[list[int]], str] | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        if scorer is not None and decode is None:
            raise ValueError("MAGIC: decode must be given with a scorer, got None")
        self.language_model, self.scorer, self.decode = language_model, scorer, decode
        self.eos_token_id = eos_token_id
        self.pad_token_id = (eos_token_id or 0) if pad_token_id is None else pad_token_id

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,  # [B, T] int64
        image_features: Tensor | None = None,  # [B, ...]
        *,
        attention_mask: Tensor | None = None,  # [B, T], 0 at padding on the left
        max_new_tokens: int = NEW_TOKENS,
        k: int = K,
        alpha: float = ALPHA,
        beta: float = BETA,
        text_tokens: int = TEXT_TOKENS,
    ) -> Tensor:
        """New tokens [B, n] int64, n <= max_new_tokens: those of each image, then its end and padding.

        The prompt counts in max_j and is not part of the text that is scored: the scorer sees the last
        `text_tokens` new tokens, decoded. If the candidate is the end, it sees the text without it, which a
        CLIP embeds alike. A text whose end was chosen is not continued. With `beta=0` no text is scored; with
        `alpha=beta=0` or `k=1` the result is greedy. Among equal candidates the likelier, then the lower id
        is chosen. Defaults are the paper's for COCO, whose decoding_len of 16 counts a prompt of one token.

        ValueError naming every invalid argument.
        """
        faults = self._faults(input_ids, image_features, attention_mask, max_new_tokens, k, alpha, beta)
        if text_tokens < 1:
            faults.append(f"text_tokens must be at least 1, got {text_tokens}")
        if faults:
            raise ValueError("MAGIC: " + "; ".join(faults))
        batch, width = input_ids.shape
        device = input_ids.device
        result = input_ids.new_full((batch, max_new_tokens), self.pad_token_id)
        if not batch:
            return result[:, :0]
        texts = texts_of(self.language_model)
        logits, hidden = texts.read(input_ids, attention_mask)
        lengths = input_ids.new_full((batch,), width)
        if attention_mask is not None:  # each context from its first token on
            lengths = attention_mask.long().sum(1)
            order = (torch.arange(width, device=device) - lengths[:, None]) % width
            hidden = hidden.take_along_dim(order[..., None], 1)
        context = torch.nn.functional.pad(hidden, (0, 0, 0, max_new_tokens - 1))
        rows = torch.arange(batch, device=device)  # of the result, those that are being written
        written: list[list[int]] = [[] for _ in range(batch)]
        for at in range(max_new_tokens):
            prob, ids = likeliest(logits, k)
            hidden = texts.alternatives(ids)
            similarity = None
            if beta:
                similarity = self._similarity(image_features, rows, written, ids, text_tokens)
            best, _ = vlmkernels.contrastive_search_score(
                prob,
                hidden,
                context[:, : width + at],
                similarity,
                alpha=float(alpha),
                beta=float(beta),
                context_lengths=lengths,
            )
            token = ids.gather(1, best[:, None])[:, 0]
            result[rows, at] = token
            if at + 1 == max_new_tokens:
                break
            logits = texts.choose(best)
            context[torch.arange(len(rows), device=device), lengths] = take(hidden, best)
            lengths = lengths + 1
            for row, chosen in zip(rows.tolist(), token.tolist(), strict=True):
                written[row].append(chosen)
            going = (token != self.eos_token_id).nonzero()[:, 0] if self.eos_token_id is not None else rows
            if len(going) < len(rows):
                if not len(going):
                    break
                texts.select(going)
                logits, context, lengths, rows = (x[going] for x in (logits, context, lengths, rows))
        return result[:, : at + 1]

    def _similarity(
        self,
        image_features: Tensor | None,
        rows: Tensor,  # [M]
        written: list[list[int]],
        ids: Tensor,  # [M, k]
        text_tokens: int,
    ) -> Tensor:  # [M, k]
        """The scorer's logits for each candidate of the rows."""
        assert self.scorer is not None, "checked"
        assert self.decode is not None, "checked"
        assert image_features is not None, "checked"
        texts = [
            [
                self.decode([i for i in [*written[row], new][-text_tokens:] if i != self.eos_token_id])
                for new in candidates
            ]
            for row, candidates in zip(rows.tolist(), ids.tolist(), strict=True)
        ]
        found = self.scorer.similarity(image_features[rows.to(image_features.device)], texts)
        if found.shape != ids.shape:
            raise ValueError(
                f"MAGIC: scorer must return [images, texts] = {list(ids.shape)}, got {list(found.shape)}"
            )
        return found.to(device=ids.device, dtype=torch.float32)

    def _faults(
        self,
        input_ids: Tensor,
        image_features: Tensor | None,
        attention_mask: Tensor | None,
        max_new_tokens: int,
        k: int,
        alpha: float,
        beta: float,
    ) -> list[str]:
        faults = []
        if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or not input_ids.shape[-1]:
            found = f"{input_ids.dtype} {list(input_ids.shape)}"
            return [f"input_ids must be int64 [B, T] with at least one token, got {found}"]
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                wanted, got = list(input_ids.shape), list(attention_mask.shape)
                faults.append(f"attention_mask must be {wanted} like input_ids, got {got}")
            elif not _is_padded_left(attention_mask):
                faults.append("attention_mask must have its zeros on the left and a one in every row")
        for name, number in (("max_new_tokens", max_new_tokens), ("k", k)):
            if number < 1:
                faults.append(f"{name} must be at least 1, got {number}")
        if not 0 <= alpha <= 1:
            faults.append(f"alpha must be in [0, 1], got {alpha}")
        if not 0 <= beta < float("inf"):
            faults.append(f"beta must be finite and not negative, got {beta}")
        elif beta and self.scorer is None:
            faults.append(f"beta must be 0 without a scorer, got {beta}")
        elif beta and image_features is None:
            faults.append(f"image_features must be given with beta, got None with beta {beta}")
        if image_features is not None and image_features.shape[:1] != input_ids.shape[:1]:
            features = list(image_features.shape)
            faults.append(f"image_features must be [{len(input_ids)}, ...] like input_ids, got {features}")
        longest = longest_text(self.language_model)
        if longest is not None and input_ids.shape[1] + max_new_tokens > longest:
            given = f"{input_ids.shape[1]} + {max_new_tokens}"
            faults.append(
                f"input_ids and max_new_tokens must be at most {longest} tokens together, got {given}"
            )
        return faults


def distinct(texts: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:  # [B, k] int64
    """The different ones of B times k texts, and which each is: images with like captions share many."""
    number: dict[str, int] = {}
    place = [[number.setdefault(text, len(number)) for text in row] for row in texts]
    return list(number), torch.tensor(place)


def likeliest(
    logits: Tensor,  # [B, V]
    k: int,
) -> tuple[Tensor, Tensor]:  # [B, min(k, V)] each
    """Probabilities and ids of the k likeliest tokens, the likeliest first, of equals the lower id."""
    prob, ids = (
        logits.to(torch.promote_types(logits.dtype, torch.float32))
        .softmax(-1)
        .sort(descending=True, stable=True)
    )
    return prob[:, :k], ids[:, :k]


def longest_text(language_model: Any) -> int | None:
    """The number of tokens that a model can read, if its config says so."""
    config = getattr(language_model, "config", None)
    return next((found for name in CONTEXTS if isinstance(found := getattr(config, name, None), int)), None)


def _is_padded_left(mask: Tensor) -> bool:  # [B, T]
    ones = mask.bool()
    return bool((ones[:, 1:] >= ones[:, :-1]).all()) and bool(ones[:, -1:].all())
