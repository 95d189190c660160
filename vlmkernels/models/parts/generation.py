"""Token-by-token decoding: greedy, by sampling, or by beam search, for any model with a cache.

A model provides two functions: `step` reads one token of each row and returns the logits of the next,
`reorder` selects rows of its caches. A beam search widens the batch by the same `reorder`. `Decoding` has
both for a language model; the steps of all models here also return hidden states with `return_hidden`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Step = Callable[[Tensor], Tensor]  # tokens [N] int64 -> logits [N, V]
Reorder = Callable[[Tensor], None]  # rows [M] int64, M = N or not


@torch.no_grad()
def generate(
    logits: Tensor,  # [B, V] of the first new token
    step: Step,
    reorder: Reorder,
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    suppress_tokens: Sequence[int] = (),
    candidates_per_beam: int | None = None,
    repeated_log_probability: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """New tokens [B, n] int64, n <= max_new_tokens; after a row's end, `pad_token_id`.

    `eos_token_id` ends a row and is part of it; None: every row has max_new_tokens. `pad_token_id` is the end
    token by default. `suppress_tokens` are never chosen.

    - `num_beams=1`: the most likely token (the lower id of ties). With `do_sample` one is drawn from softmax
      of logits / temperature, among the `top_k` most likely, then among the fewest of these whose probability
      reaches `top_p`. `generator` (on the logits' device) makes the draw repeatable.
    - `num_beams>1`: beam search for the largest log-probability / length ** length_penalty. It ends when no
      running beam divided by its present length can still enter the `num_beams` finished ones, or, with
      `early_stopping`, once there are `num_beams` of these. `candidates_per_beam` considers only that many
      continuations of each beam, the most likely ones (Freitag and Al-Onaizan 2017), from the second token
      on; None: all.

    `repeated_log_probability` is the log-probability of a new token equal to the new token before it, -10000
    for example, so that no word is written twice in a row; None: as the model has it.

    ValueError naming every invalid option.
    """
    faults = _faults(
        logits, max_new_tokens, num_beams, do_sample, temperature, top_k, top_p, eos_token_id, pad_token_id
    )
    banned = sorted({token for token in suppress_tokens if not 0 <= token < logits.shape[-1]})
    if banned:
        faults.append(f"suppress_tokens must be ids below {logits.shape[-1]}, got {banned}")
    if candidates_per_beam is not None and candidates_per_beam < 1:
        faults.append(f"candidates_per_beam must be at least 1 or None, got {candidates_per_beam}")
    if repeated_log_probability is not None and not repeated_log_probability <= 0:
        faults.append(f"repeated_log_probability must be at most 0 or None, got {repeated_log_probability}")
    if faults:
        raise ValueError("generate: " + "; ".join(faults))
    if pad_token_id is None:
        pad_token_id = 0 if eos_token_id is None else eos_token_id
    ban = torch.zeros_like(logits[0], dtype=torch.float32)
    ban[list(suppress_tokens)] = -math.inf
    if num_beams > 1:
        return _beam_search(
            logits,
            step,
            reorder,
            ban,
            max_new_tokens,
            num_beams,
            eos_token_id,
            pad_token_id,
            length_penalty,
            early_stopping,
            candidates_per_beam,
            repeated_log_probability,
        )
    tokens: list[Tensor] = []
    finished = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    while True:
        scores = logits.float() + ban
        if tokens and repeated_log_probability is not None:
            scores = _with_repeated(scores.log_softmax(-1), tokens[-1], repeated_log_probability)
        if do_sample:
            probabilities = filter_logits(scores, temperature, top_k, top_p).softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        else:
            token = scores.argmax(-1)
        if eos_token_id is not None:
            token = token.masked_fill(finished, pad_token_id)
            finished |= token == eos_token_id
        tokens.append(token)
        if len(tokens) == max_new_tokens or (eos_token_id is not None and bool(finished.all())):
            return torch.stack(tokens, 1)
        logits = step(token)


class StepOutput(NamedTuple):
    """The result of a step with `return_hidden`."""

    logits: Tensor  # [N, V] of the next token
    hidden: Tensor  # [N, D] of the token read, or [N, t, D] of all tokens read, before the head


class LanguageModelCall:
    """The arguments for a language model, of those that its forward has."""

    def __init__(self, language_model: nn.Module) -> None:
        known = inspect.signature(language_model.forward).parameters
        self.takes_positions = "position_ids" in known
        self.takes_logits_to_keep = "logits_to_keep" in known
        self.takes_return_logits = "return_logits" in known

    def arguments(
        self,
        tokens: Tensor,  # [B, T]
        attention_mask: Tensor | None,  # [B, past + T]
        *,
        last_only: bool = False,
    ) -> dict[str, Any]:
        """Positions count from the first token that is not padding."""
        options: dict[str, Any] = {"input_ids": tokens}
        if attention_mask is not None:
            options["attention_mask"] = attention_mask
            if self.takes_positions:
                positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
                options["position_ids"] = positions[:, attention_mask.shape[1] - tokens.shape[1] :]
        if last_only and self.takes_logits_to_keep:
            options["logits_to_keep"] = 1
        return options


class Decoding:
    """Texts being generated by a language model that is called like a decoder of transformers."""

    def __init__(self, language_model: nn.Module, call: LanguageModelCall | None = None) -> None:
        self.language_model = language_model
        self.call = LanguageModelCall(language_model) if call is None else call
        self.past: Any = None
        self.mask: Tensor | None = None

    def run(self, arguments: dict[str, Any]) -> Any:
        """The language model's output."""
        return self.language_model(**arguments)

    def read(
        self,
        tokens: Tensor,  # [N, t]
        mask: Tensor | None = None,  # [N, t], 0 at padding on the left
        return_hidden: bool = False,
    ) -> Any:  # [N, V], or StepOutput
        """Logits of the token after these, which join the cache; a text may be read in several calls."""
        if mask is not None:
            self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)
        arguments = self.call.arguments(tokens, self.mask, last_only=True)
        arguments.update(past_key_values=self.past, use_cache=True)
        if return_hidden:
            arguments["output_hidden_states"] = True
        out = self.run(arguments)
        self.past = out.past_key_values
        return StepOutput(out.logits[:, -1], out.hidden_states[-1]) if return_hidden else out.logits[:, -1]

    def step(
        self,
        tokens: Tensor,  # [N]
        return_hidden: bool = False,
    ) -> Any:  # [N, V], or StepOutput
        """Logits of the token after the given one of each text."""
        mask = None if self.mask is None else self.mask.new_ones((tokens.shape[0], 1))
        if not return_hidden:
            return self.read(tokens[:, None], mask)
        logits, hidden = self.read(tokens[:, None], mask, True)
        return StepOutput(logits, hidden[:, 0])

    def reorder(self, rows: Tensor) -> None:  # [M]
        """Selects rows of the texts; M may differ from N."""
        self.past.reorder_cache(rows)
        self.mask = None if self.mask is None else self.mask[rows]


def filter_logits(
    logits: Tensor,  # [B, V]
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """logits / temperature, -inf outside the `top_k` largest and the nucleus of probability `top_p`; [B, V].

    The nucleus is the smallest set of most likely tokens whose probability is at least `top_p` (Holtzman
    et al. 2020), at least one.
    """
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    return logits


def _beam_search(
    logits: Tensor,  # [B, V]
    step: Step,
    reorder: Reorder,
    ban: Tensor,  # [V] 0 or -inf
    max_new_tokens: int,
    beams: int,
    eos: int | None,
    pad: int,
    length_penalty: float,
    early_stopping: bool,
    candidates: int | None,
    repeated: float | None,
) -> Tensor:
    batch, vocabulary = logits.shape
    device = logits.device
    first = torch.arange(batch, device=device)[:, None] * beams  # row of a sample's beam 0
    reorder(torch.arange(batch, device=device).repeat_interleave(beams))
    logits = logits.repeat_interleave(beams, 0)
    scores = torch.full((batch, beams), -math.inf, device=device)
    scores[:, 0] = 0.0  # the beams are equal at first: only one of them counts
    running = torch.empty((batch, beams, 0), dtype=torch.int64, device=device)
    finished = torch.full((batch, beams, max_new_tokens), pad, device=device)
    finished_scores = torch.full((batch, beams), -math.inf, device=device)
    finished_lengths = torch.zeros((batch, beams), dtype=torch.int64, device=device)
    open_ = torch.ones((batch, 1), dtype=torch.bool, device=device)
    for length in range(1, max_new_tokens + 1):
        each = logits.float().log_softmax(-1) + ban
        if repeated is not None and length > 1:
            each = _with_repeated(each, running[:, :, -1].flatten(), repeated)
        if candidates is not None and length > 1 and candidates < vocabulary:
            likely, ids = each.topk(candidates)
            each = torch.full_like(each, -math.inf).scatter(1, ids, likely)
        totals = scores[:, :, None] + each.view(batch, beams, vocabulary)
        # Twice the number of beams: if all beams end here, enough are left to continue.
        best, index = totals.flatten(1).topk(min(2 * beams, beams * vocabulary))
        beam, token = index // vocabulary, index % vocabulary
        sequences = torch.cat([_rows(running, beam), token[..., None]], -1)  # [B, 2 beams, length]
        ended = token == eos if eos is not None else torch.zeros_like(token, dtype=torch.bool)
        if length == max_new_tokens:
            ended = torch.ones_like(ended)

        entering = ended & open_  # only the first `beams` candidates may enter the finished ones
        entering[:, beams:] = False
        entered = (best / length**length_penalty).masked_fill(~entering, -math.inf)
        finished_scores, kept = torch.cat([finished_scores, entered], 1).topk(beams)
        padded = torch.nn.functional.pad(sequences, (0, max_new_tokens - length), value=pad)
        finished = _rows(torch.cat([finished, padded], 1), kept)
        lengths = torch.full_like(token, length)
        finished_lengths = torch.cat([finished_lengths, lengths], 1).gather(1, kept)

        scores, kept = best.masked_fill(ended, -math.inf).topk(beams)
        running = _rows(sequences, kept)
        worst = finished_scores.amin(1, keepdim=True)
        open_ &= scores[:, :1] / length**length_penalty > worst
        if early_stopping:
            open_ &= worst == -math.inf
        if length == max_new_tokens or not bool(open_.any()):
            break
        reorder((first + beam.gather(1, kept)).flatten())
        logits = step(running[:, :, -1].flatten())
    return finished[:, 0, : int(finished_lengths[:, 0].max())] if batch else finished[:, 0, :0]


def _with_repeated(
    scores: Tensor,  # [N, V]
    last: Tensor,  # [N]
    value: float,
) -> Tensor:  # [N, V]
    """The log-probabilities, `value` for each row's last token."""
    return scores.scatter(1, last[:, None], value)


def _rows(
    sequences: Tensor,  # [B, K, L]
    index: Tensor,  # [B, k]
) -> Tensor:  # [B, k, L]
    return sequences.gather(1, index[..., None].expand(-1, -1, sequences.shape[-1]))


def _faults(
    logits: Tensor,
    max_new_tokens: int,
    num_beams: int,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_token_id: int | None,
    pad_token_id: int | None,
) -> list[str]:
    faults = []
    if max_new_tokens < 1:
        faults.append(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if num_beams < 1:
        faults.append(f"num_beams must be at least 1, got {num_beams}")
    if do_sample and num_beams > 1:
        faults.append(f"num_beams must be 1 with do_sample, got {num_beams}")
    if not temperature > 0:
        faults.append(f"temperature must be positive, got {temperature}")
    if top_k is not None and top_k < 1:
        faults.append(f"top_k must be at least 1 or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        faults.append(f"top_p must be in (0, 1] or None, got {top_p}")
    for name, token in (("eos_token_id", eos_token_id), ("pad_token_id", pad_token_id)):
        if token is not None and not 0 <= token < logits.shape[-1]:
            faults.append(f"{name} must be an id below {logits.shape[-1]} or None, got {token}")
    return faults
