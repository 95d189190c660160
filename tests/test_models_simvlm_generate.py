"""SimVLM's generate: equal to the model without a cache, greedy, sampled and by beams; bad input."""

import pytest
import torch

from tests.simvlm_tiny import FORMS, tiny_batch, tiny_model
from vlmkernels.models.generation import generate

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


class Uncached:
    """What `generation.generate` asks of a model, every text anew for each token."""

    def __init__(self, model, images, tokens, lengths):
        self.model, self.images = model, list(images.split(1))
        self.rows = [tokens[i : i + 1, :length] for i, length in enumerate(lengths.tolist())]
        self.prefixes = lengths.tolist()

    def logits(self):
        rows = zip(self.images, self.rows, self.prefixes, strict=True)
        return torch.stack([next_logits(self.model, *row) for row in rows])

    def step(self, tokens):
        self.rows = [torch.cat([row, t.view(1, 1)], 1) for row, t in zip(self.rows, tokens, strict=True)]
        return self.logits()

    def reorder(self, rows):
        for name in ("images", "rows", "prefixes"):
            setattr(self, name, [getattr(self, name)[i] for i in rows.tolist()])


@both_forms
@torch.no_grad()
def test_beams_are_those_of_the_model_without_a_cache(form):
    model = talkative(form)
    images, tokens, lengths = prefixes()
    options = {"max_new_tokens": NEW, "num_beams": 4, "eos_token_id": 2}
    whole = Uncached(model, images, tokens, lengths)
    expected = generate(whole.logits(), whole.step, whole.reorder, pad_token_id=0, **options)
    out = model.generate(images, tokens, prefix_lengths=lengths, **options)
    assert torch.equal(out, expected)
    greedy = model.generate(images, tokens, prefix_lengths=lengths, max_new_tokens=NEW)
    assert (out[:, : greedy.shape[1]] != greedy[:, : out.shape[1]]).any(1).sum() >= 2


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
        ({"images": None, "prefix_tokens": None}, "images, prefix_tokens or both must be given"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be in \[1, 6\] after the prefix, got 0"),
        ({"max_new_tokens": 7}, r"max_new_tokens must be in \[1, 6\] after the prefix, got 7"),
        (
            {"prefix_lengths": torch.tensor([1, 2, 3, 4, 0])},
            r"prefix_lengths must be .*, got \[1, 2, 3, 4, 0\]",
        ),
        ({"prefix_lengths": torch.tensor([1, 2])}, r"prefix_lengths must be 5 integers, got .*\[2\]"),
        ({"prefix_tokens": torch.ones(5, 0).long()}, r"prefix_tokens must have 1 to .* columns, got 0"),
        ({"prefix_tokens": torch.ones(5).long()}, r"prefix_tokens must be .*, got .*\[5\]"),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
    ],
)
def test_bad_input(arguments, message):
    images, tokens, _ = prefixes()
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(**{"images": images, "prefix_tokens": tokens, "max_new_tokens": 2, **arguments})
