"""Decoding: greedy, sampling and beam search, against transformers' and against exhaustive search."""

import math

import pytest
import torch

from benchmarks import peers
from vlmkernels.models.decoder import CausalLM, DecoderConfig
from vlmkernels.models.generation import filter_logits, generate

needs_transformers = pytest.mark.skipif(
    peers.why_not("transformers") is not None, reason=str(peers.why_not("transformers"))
)
VOCABULARY, EOS = 7, 6


class Table:
    """A model whose next logits depend on the last two tokens; its cache is the tokens themselves."""

    def __init__(self, batch: int, sharpness: float = 1.5) -> None:
        self.table = sharpness * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY)
        self.start = torch.randint(0, VOCABULARY, (batch, 2))
        self.read = self.start
        self.steps = 0

    def logits(self, read):
        return self.table[read[:, -2], read[:, -1]]

    def step(self, tokens):
        self.steps += 1
        self.read = torch.cat([self.read, tokens[:, None]], 1)
        return self.logits(self.read)

    def reorder(self, rows):
        self.read = self.read[rows]

    def generate(self, **options):
        self.read = self.start
        return generate(self.logits(self.start), self.step, self.reorder, **options)

    def score(self, row, tokens, length_penalty=0.0):
        """log P(tokens | start of `row`) / length ** length_penalty, up to and including the end token."""
        read, total, length = self.start[row : row + 1], 0.0, 0
        for token in tokens:
            total += float(self.logits(read).log_softmax(-1)[0, token])
            read, length = torch.cat([read, torch.tensor([[token]])], 1), length + 1
            if token == EOS:
                break
        return total / length**length_penalty


def every_sequence(length):
    """All token lists that end with the end token, or have `length` tokens without it."""
    lists = [[]]
    for _ in range(length):
        lists = [
            [*tokens, token] if not tokens or tokens[-1] != EOS else tokens
            for tokens in lists
            for token in (range(VOCABULARY) if not tokens or tokens[-1] != EOS else [None])
        ]
    return lists


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
def test_wide_beam_search_finds_the_best_of_all_sequences(length_penalty):
    model = Table(5)
    found = model.generate(
        max_new_tokens=3, num_beams=VOCABULARY**2, eos_token_id=EOS, length_penalty=length_penalty
    )
    lengths = set()
    for row, tokens in enumerate(found.tolist()):
        best = max(every_sequence(3), key=lambda tokens: model.score(row, tokens, length_penalty))
        got, wanted = (model.score(row, each, length_penalty) for each in (tokens, best))
        lengths.add(len(best))
        assert got == pytest.approx(wanted, abs=1e-5)
    assert length_penalty == 0 or len(lengths) > 1, "the case has no early end"


def test_beams_are_better_than_greedy_and_one_beam_is_greedy():
    model = Table(32)
    options = {"max_new_tokens": 5, "length_penalty": 0.0}
    greedy, wide = model.generate(**options), model.generate(num_beams=8, **options)
    gains = [
        model.score(row, wide[row].tolist()) - model.score(row, greedy[row].tolist()) for row in range(32)
    ]
    assert sum(gains) > 1.0  # a single row may lose: greedy's own path can leave the beams
    read = model.start
    for i in range(5):
        read = torch.cat([read, model.logits(read).argmax(-1, keepdim=True)], 1)
        assert torch.equal(read[:, 2:], greedy[:, : i + 1])


@pytest.fixture(scope="module")
def gpt2():
    transformers = peers.load("transformers")
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=40, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=10
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the flat distribution of the initial weights
            parameter.mul_(6.0) if parameter.ndim == 2 else None
    return model


def of_gpt2(model, tokens, **options):
    """The new tokens of `generate` on transformers' model with its own cache."""
    state = {}

    def forward(new):
        out = model(new, past_key_values=state.get("cache"), use_cache=True)
        state["cache"] = out.past_key_values
        return out.logits[:, -1]

    def reorder(rows):
        state["cache"].reorder_cache(rows)

    with torch.no_grad():
        return generate(forward(tokens), lambda token: forward(token[:, None]), reorder, **options)


@needs_transformers
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 4, "length_penalty": -2.0},
        {"num_beams": 4, "length_penalty": 2.0},
        {"num_beams": 5, "early_stopping": True, "length_penalty": 0.0},
    ],
    ids=str,
)
def test_equals_transformers(gpt2, options):
    prompts = torch.randint(0, 10, (12, 4))
    ours = of_gpt2(gpt2, prompts, max_new_tokens=9, eos_token_id=10, pad_token_id=0, **options)
    with torch.no_grad():
        theirs = gpt2.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=9,
            eos_token_id=10,
            pad_token_id=0,
            do_sample=False,
            **options,
        )[:, 4:]
    ended = (theirs == 10).any(1)
    assert ended.any() or options.get("length_penalty") == 2.0, "the case has no early end"
    after = theirs.eq(10).cumsum(1) - theirs.eq(10).int() > 0  # pad_token_id 0 becomes 10 in theirs
    assert torch.equal(ours, theirs.masked_fill(after, 0))


def test_rows_end_alone_and_the_loop_stops_with_the_last():
    model = Table(6, sharpness=3.0)
    free = model.generate(max_new_tokens=12)
    model.steps = 0
    tokens = model.generate(max_new_tokens=12, eos_token_id=EOS, pad_token_id=1)
    lengths = []
    for row, wanted in zip(tokens.tolist(), free.tolist(), strict=True):
        length = wanted.index(EOS) + 1 if EOS in wanted else 12
        lengths.append(length)
        assert row == (wanted[:length] + [1] * 12)[: len(row)]
    assert len(set(lengths)) > 1, "all rows end together"
    assert tokens.shape[1] == max(lengths) == model.steps + 1


@pytest.mark.parametrize("beams", [1, 3])
def test_suppressed_tokens_are_never_chosen(beams):
    model = Table(16)
    free = model.generate(max_new_tokens=6, num_beams=beams)
    tokens = model.generate(max_new_tokens=6, num_beams=beams, suppress_tokens=(2, 3))
    assert ((free == 2) | (free == 3)).any()
    assert not ((tokens == 2) | (tokens == 3)).any()


def test_sampling_is_repeatable_and_follows_the_distribution():
    model = Table(1)
    model.start = model.start.expand(4000, 2)

    def draw(seed, **options):
        return model.generate(
            max_new_tokens=2, do_sample=True, generator=torch.Generator().manual_seed(seed), **options
        )

    first = draw(1)
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
    for temperature in (1.0, 0.5):
        share = draw(3, temperature=temperature)[:, 0].bincount(minlength=VOCABULARY) / 4000
        wanted = (model.logits(model.start[:1])[0] / temperature).softmax(-1)
        assert (share - wanted).abs().max() <= 0.03
    assert torch.equal(draw(4, top_k=1), model.generate(max_new_tokens=2))
    assert torch.equal(draw(4, top_p=1e-6), model.generate(max_new_tokens=2))


@needs_transformers
@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.8}], ids=str)
def test_filters_equal_transformers(options):
    process = peers.load("transformers.generation.logits_process")
    logits = 2 * torch.randn(50, 9)
    wanted = process.TemperatureLogitsWarper(0.7)(None, logits)
    if "top_k" in options:
        wanted = process.TopKLogitsWarper(options["top_k"])(None, wanted)
    if "top_p" in options:
        wanted = process.TopPLogitsWarper(options["top_p"])(None, wanted)
    ours = filter_logits(logits, 0.7, **options)
    assert torch.equal(ours, wanted)
    assert (ours == -math.inf).any()


def test_our_decoder_with_its_cache():
    torch.manual_seed(1)
    model = CausalLM(DecoderConfig(vocab_size=9, width=16, layers=2, heads=2, context_length=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0) if parameter.ndim == 2 else None
    prompts = torch.randint(0, 9, (4, 3))
    for beams in (1, 3):
        cached = of_gpt2(model, prompts, max_new_tokens=6, num_beams=beams)
        state = {"tokens": prompts}

        def step(token, state=state):
            state["tokens"] = torch.cat([state["tokens"], token[:, None]], 1)
            return model(state["tokens"]).logits[:, -1]

        def reorder(rows, state=state):
            state["tokens"] = state["tokens"][rows]

        with torch.no_grad():
            again = generate(model(prompts).logits[:, -1], step, reorder, max_new_tokens=6, num_beams=beams)
        assert torch.equal(cached, again)


def test_bad_options_are_listed_together():
    model = Table(2)
    with pytest.raises(ValueError) as caught:
        model.generate(
            max_new_tokens=0,
            num_beams=2,
            do_sample=True,
            temperature=0.0,
            top_k=0,
            top_p=1.5,
            eos_token_id=VOCABULARY,
            pad_token_id=-1,
            suppress_tokens=(9,),
        )
    for part in ("max_new_tokens must be at least 1, got 0", "do_sample", "temperature", "top_k", "top_p"):
        assert part in str(caught.value)
    assert f"eos_token_id must be an id below {VOCABULARY} or None, got {VOCABULARY}" in str(caught.value)
    assert "suppress_tokens must be ids below 7, got [9]" in str(caught.value)
