"""Flamingo.generate: the caches give what whole forwards give, for any chunk, batch, padding and search."""

import pytest
import torch

from benchmarks import peers
from tests.flamingo_tiny import END, LAYOUTS, MEDIA, PAD, flamingo, inputs
from vlmkernels.models.generation import generate

needs_transformers = pytest.mark.skipif(
    peers.why_not("transformers") is not None, reason=str(peers.why_not("transformers"))
)
KINDS = ["ours", *(pytest.param(kind, marks=needs_transformers) for kind in LAYOUTS)]
NEW = 6


def without_cache(model, vision_x, lang_x, **options):
    """The same search where each step runs the whole text through `forward`."""
    state = {"text": lang_x, "images": vision_x}

    def logits():
        with torch.no_grad():
            return model(state["images"], state["text"])["logits"][:, -1]

    def step(tokens):
        state["text"] = torch.cat([state["text"], tokens[:, None]], 1)
        return logits()

    def reorder(rows):
        state["text"], state["images"] = state["text"][rows], state["images"][rows]

    options = {"eos_token_id": END, "suppress_tokens": (MEDIA,), "max_new_tokens": NEW, **options}
    return generate(logits(), step, reorder, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_with_cache_for_every_prefill_chunk(kind):
    model = flamingo(kind, cross_attn_every_n_layers=2)
    with torch.no_grad():
        for block in model.gated_blocks():
            block.attn.to_out.weight.mul_(6.0 if kind == "ours" else 3.0)  # images decide some tokens
    vision_x, lang_x = inputs()
    wanted = without_cache(model, vision_x, lang_x)
    assert len({tuple(row) for row in wanted.tolist()}) > 1
    assert not torch.equal(wanted, without_cache(model, vision_x.flip(0), lang_x)), "images play no part"
    chunks = range(1, lang_x.shape[1] + 2) if kind in ("ours", "llama") else (1, 3, 6, 13)
    for chunk in (None, *chunks):
        got = model.generate(vision_x, lang_x, max_new_tokens=NEW, prefill_chunk=chunk)
        assert torch.equal(got, wanted), chunk


@pytest.mark.parametrize("kind", ["ours", pytest.param("llama", marks=needs_transformers)])
def test_logits_of_chunks_equal_those_of_a_forward(kind):
    """All previous images, two of them read in one chunk, then text."""
    from vlmkernels.models.flamingo import _Decoding

    model = flamingo(kind, only_attend_immediate_media=False)
    vision_x, lang_x = inputs()
    with torch.no_grad():
        wanted = model(vision_x, lang_x)["logits"]
        for chunk in (1, 3, 5, 14):
            session = _Decoding(model, model.encode_media(vision_x))
            for first in range(0, 14, chunk):
                logits = session.read(lang_x[:, first : first + chunk], None)
                last = min(first + chunk, 14) - 1
                error = (logits - wanted[:, last]).abs().max()
                assert error <= 1e-5 * wanted.abs().max(), (chunk, last)


@pytest.mark.parametrize("kind", ["ours", *KINDS[3:5]])
def test_beam_search_with_cache(kind):
    model = flamingo(kind)
    vision_x, lang_x = inputs()
    for options in ({"num_beams": 3}, {"num_beams": 4, "length_penalty": -2.0, "early_stopping": True}):
        wanted = without_cache(model, vision_x, lang_x, **options)
        got = model.generate(vision_x, lang_x, max_new_tokens=NEW, prefill_chunk=5, **options)
        assert torch.equal(got, wanted)
    assert not torch.equal(wanted, model.generate(vision_x, lang_x, max_new_tokens=NEW))


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_unequal_length(kind):
    """Left padding: each prompt of a batch goes on as it does alone, with fewer images too."""
    model = flamingo(kind)
    vision_x, lang_x = inputs()
    lengths = (14, 9, 6)
    prompts = [lang_x[row, :length] for row, length in enumerate(lengths)]
    batch = torch.stack([torch.cat([torch.full((14 - len(p),), PAD), p]) for p in prompts])
    mask = torch.stack([torch.arange(14) >= 14 - len(p) for p in prompts]).long()
    for options in ({}, {"num_beams": 3}):
        for chunk in (None, 4):
            together = model.generate(
                vision_x, batch, attention_mask=mask, max_new_tokens=NEW, prefill_chunk=chunk, **options
            )
            for row, prompt in enumerate(prompts):
                images = vision_x[row : row + 1, : int((prompt == MEDIA).sum())]
                alone = model.generate(images, prompt[None], max_new_tokens=NEW, **options)
                length = alone.shape[1]
                assert torch.equal(together[row, :length], alone[0]), (options, chunk, row)
                assert (together[row, length:] == END).all()


def test_rows_end_with_the_end_token_and_images_are_never_drawn():
    model = flamingo()
    vision_x, lang_x = inputs(rows=8)
    options = {"max_new_tokens": 30, "do_sample": True, "temperature": 3.0}
    draw = model.generate(vision_x, lang_x, generator=torch.Generator().manual_seed(1), **options)
    again = model.generate(vision_x, lang_x, generator=torch.Generator().manual_seed(1), **options)
    other = model.generate(vision_x, lang_x, generator=torch.Generator().manual_seed(2), **options)
    assert torch.equal(draw, again)
    assert draw.shape != other.shape or not torch.equal(draw, other)
    assert not (draw == MEDIA).any()
    ended = (draw == END).int().cummax(1).values
    assert ended[:, -1].any()
    assert (draw[:, 1:][ended[:, :-1].bool()] == END).all()
    short = model.generate(
        vision_x, lang_x, eos_token_id=int(draw[0, 0]), pad_token_id=PAD,
        generator=torch.Generator().manual_seed(1), **options,
    )  # fmt: skip
    assert short[0].tolist() == [draw[0, 0]] + [PAD] * (short.shape[1] - 1)


def test_images_are_encoded_once():
    model = flamingo()
    vision_x, lang_x = inputs()
    calls = []
    for module in (
        model.vision_encoder.conv1,
        model.perceiver,
        *(b.attn.to_kv for b in model.gated_blocks()),
    ):
        module.register_forward_hook(lambda *_: calls.append(1))
    model.generate(vision_x, lang_x, max_new_tokens=NEW, num_beams=2, prefill_chunk=3)
    assert len(calls) == 2 + 4


def test_text_alone():
    model = flamingo()
    _, lang_x = inputs()
    lang_x[lang_x == MEDIA] = 5
    got = model.generate(None, lang_x, max_new_tokens=NEW)
    state = {"text": lang_x}
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(None, state["text"])["logits"][:, -1]
        logits[:, MEDIA] = -torch.inf
        state["text"] = torch.cat([state["text"], logits.argmax(-1, keepdim=True)], 1)
    wanted = state["text"][:, 14:]
    ended = (wanted == END).int().cumsum(1) - (wanted == END).int() > 0
    assert torch.equal(got, wanted.masked_fill(ended, END)[:, : got.shape[1]])


def test_bad_prompts():
    model = flamingo()
    vision_x, lang_x = inputs()
    mask = torch.ones_like(lang_x)
    mask[1, -2:] = 0
    with pytest.raises(ValueError, match="must have padding on the left for generate"):
        model.generate(vision_x, lang_x, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"got \[3, 0\]"):
        model.generate(vision_x, lang_x[:, :0], max_new_tokens=2)
    with pytest.raises(ValueError, match="prefill_chunk at least 1, got 0"):
        model.generate(vision_x, lang_x, max_new_tokens=2, prefill_chunk=0)
    with pytest.raises(ValueError, match="3 image tokens in a row, vision_x has 2"):
        model.generate(vision_x[:, :2], lang_x, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"attention_mask must be \[3, 14\]"):
        model.generate(vision_x, lang_x, attention_mask=torch.ones(3, 9), max_new_tokens=2)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        model.generate(vision_x, lang_x, max_new_tokens=2, do_sample=True, top_k=0)
