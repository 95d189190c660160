"""SimVLM's generate: equal to the model without a cache, greedy, sampled and by beams; bad input."""

import itertools

import pytest
import torch

from tests.simvlm_tiny import FORMS, tiny_batch, tiny_model

both_forms = pytest.mark.parametrize("form", FORMS)
NEW = 6


def talkative(form, **fields):
    """A model whose greedy text varies: tokens and positions count as much as the image."""
    model = tiny_model(form, **fields)
    with torch.no_grad():
        model.text_position.normal_()
    return model


def prefixes(size=5):
    """Prefixes of 1 to 6 tokens, padded on the right with an ordinary token."""
    images, tokens, _ = tiny_batch(size, 6)
    tokens[:, 1:] = torch.randint(3, 31, (size, 5))
    return images, tokens, torch.arange(size) % 6 + 1


def next_logits(model, images, row, prefix):  # [1, 3, R, R] or None, [1, L] -> [V]
    """Logits of the token after `row`, by the whole model, the first `prefix` tokens being the prefix."""
    lengths = torch.tensor([row.shape[1]])
    return model(images, row, prefix, lengths, return_logits=True)["logits"][0, -1]


@torch.no_grad()
def without_cache(model, images, tokens, lengths, new=NEW):
    """Greedy texts [B, new], each row alone and every position anew for each token."""
    rows = []
    for i, length in enumerate(lengths.tolist()):
        row, image = tokens[i : i + 1, :length], None if images is None else images[i : i + 1]
        for _ in range(new):
            row = torch.cat([row, next_logits(model, image, row, length).argmax().view(1, 1)], 1)
        rows.append(row[0, length:])
    return torch.stack(rows)


@both_forms
@pytest.mark.parametrize("with_image", [True, False])
def test_cached_generation_is_the_uncached_one(form, with_image):
    model = talkative(form)
    images, tokens, lengths = prefixes()
    images = images if with_image else None
    expected = without_cache(model, images, tokens, lengths)
    assert len(set(map(tuple, expected.tolist()))) == 5
    assert max(len(set(row)) for row in expected.tolist()) >= 3
    end = next(token for token in range(31) if not (expected == token).any())  # an end that never comes
    out = model.generate(images, tokens, prefix_lengths=lengths, max_new_tokens=NEW, eos_token_id=end)
    assert torch.equal(out, expected)
    alone = model.generate(images, tokens[:, :3], max_new_tokens=NEW, eos_token_id=end)
    assert torch.equal(alone, without_cache(model, images, tokens, torch.full((5,), 3)))


@both_forms
def test_without_a_prefix_the_start_token_is_it(form):
    model = talkative(form)
    images = prefixes()[0]
    start = torch.full((5, 1), model.config.bos_id)
    assert torch.equal(
        model.generate(images, max_new_tokens=NEW), model.generate(images, start, max_new_tokens=NEW)
    )


@both_forms
def test_a_text_ends_at_its_end_token(form):
    model = talkative(form)
    images, tokens, lengths = prefixes()
    expected = without_cache(model, images, tokens, lengths)
    end = int(expected[0, 2])
    out = model.generate(images, tokens, prefix_lengths=lengths, max_new_tokens=NEW, eos_token_id=end)
    for got, row in zip(out.tolist(), expected.tolist(), strict=True):
        stop = row.index(end) + 1 if end in row else NEW
        assert got == (row[:stop] + [model.config.pad_id] * NEW)[: len(got)]


@both_forms
@pytest.mark.parametrize("with_image", [True, False])
@torch.no_grad()
def test_beam_search_over_everything_finds_the_likeliest_text(form, with_image):
    model = talkative(form, vocab_size=5)
    images, _, lengths = prefixes(size=3)
    tokens, images = torch.randint(0, 5, (3, 3)), images if with_image else None
    lengths = lengths.clamp(max=3)
    out = model.generate(
        images, tokens, prefix_lengths=lengths, max_new_tokens=3, num_beams=25, eos_token_id=4
    )
    for i, length in enumerate(lengths.tolist()):
        image = None if images is None else images[i : i + 1]
        best, best_text = -float("inf"), None
        for n in (1, 2, 3):
            for text in itertools.product(range(5), repeat=n):
                if 4 in text[:-1] or (n < 3 and text[-1] != 4):
                    continue
                row = torch.cat([tokens[i, :length], torch.tensor(text)])[None]
                lens = torch.tensor([row.shape[1]])
                logits = model(image, row, length, lens, return_logits=True)["logits"][0]
                scores = logits.log_softmax(-1)[length - 1 : -1].gather(1, row[0, length:, None])
                if float(scores.sum()) / n > best:
                    best, best_text = float(scores.sum()) / n, list(text)
        padded = best_text + [model.config.pad_id] * 3
        assert out[i].tolist() == padded[: out.shape[1]]


@both_forms
def test_sampling_repeats_with_its_generator_and_obeys_top_k(form):
    model = talkative(form)
    images, tokens, lengths = prefixes()
    options = {"prefix_lengths": lengths, "max_new_tokens": NEW}

    def drawn(seed, **more):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(images, tokens, do_sample=True, generator=generator, **options, **more)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert torch.equal(drawn(3, top_k=1), model.generate(images, tokens, **options))
    assert torch.equal(drawn(3, top_p=1e-9), model.generate(images, tokens, **options))


@both_forms
def test_generation_in_bfloat16(form):
    model = talkative(form).float()
    images, tokens, lengths = prefixes()
    options = {"prefix_lengths": lengths, "max_new_tokens": NEW}
    expected = model.generate(images.float(), tokens, **options)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.generate(images.float(), tokens, **options)
    assert out.shape == expected.shape
    out = model.bfloat16().generate(images.bfloat16(), tokens, **options)
    assert (out[:, 0] == expected[:, 0]).float().mean() >= 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": None, "prefix_tokens": None}, "wants images, prefix_tokens or both"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, wants 1 to 6"),
        ({"max_new_tokens": 7}, "max_new_tokens: got 7, wants 1 to 6"),
        ({"prefix_lengths": torch.tensor([1, 2, 3, 4, 0])}, r"prefix_lengths: got \[1, 2, 3, 4, 0\]"),
        ({"prefix_lengths": torch.tensor([1, 2])}, r"prefix_lengths: .*\[2\], wants 5 integers"),
        ({"prefix_tokens": torch.ones(5, 0).long()}, r"prefix_tokens: got rows of 0, wants 1 to"),
        ({"prefix_tokens": torch.ones(5).long()}, r"prefix_tokens: got .*\[5\]"),
        ({"num_beams": 0}, "num_beams: wants at least 1, got 0"),
    ],
)
def test_bad_input(arguments, message):
    images, tokens, _ = prefixes()
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(**{"images": images, "prefix_tokens": tokens, "max_new_tokens": 2, **arguments})
