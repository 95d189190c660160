"""Decoding from cached keys and values gives what one forward over the whole text gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.parity import close, randomize
from vlmkernels.nn import GatedCrossAttentionBlock, MediaCache
from vlmkernels.testing import assert_as_good

VOCABULARY, IMAGE, WIDTH, EACH = 50, 0, 24, 5


class TinyCaptioner(nn.Module):
    """Two layers of gated cross-attention and causal self-attention with a cache, and a head."""

    def __init__(self, immediate):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.blocks = nn.ModuleList(
            GatedCrossAttentionBlock(
                WIDTH, 20, dim_head=8, heads=2, ff_mult=2, only_attend_immediate_media=immediate
            )
            for _ in range(2)
        )

    def forward(self, tokens, past, **seen):  # [B, t] -> [B, t, V]; past: the inputs of each layer so far
        x = self.embedding(tokens)
        for i, (block, qkv) in enumerate(zip(self.blocks, self.qkv, strict=True)):
            x = block(x, **seen)
            past[i] = x if past[i] is None else torch.cat([past[i], x], 1)
            before = past[i].shape[1] - x.shape[1]
            q, k, v = qkv(past[i]).chunk(3, -1)
            rows = torch.arange(x.shape[1])[:, None] + before
            x = x + F.scaled_dot_product_attention(q[:, before:], k, v, rows >= torch.arange(k.shape[1]))
        return x @ self.embedding.weight.T

    def whole(self, tokens, media, **options):
        return self(tokens, [None, None], media=media, media_locations=tokens == IMAGE, **options)

    def chunked(self, tokens, cache, chunk, past=None):
        past = [None, None] if past is None else past
        logits = []
        for part in tokens.split(chunk, 1):
            cache.step(part == IMAGE)
            logits.append(self(part, past, cache=cache))
        return torch.cat(logits, 1)


def prompt(batch=2, length=11, images=((1, 5, 8), (0, 4, 5))):
    tokens = torch.randint(1, VOCABULARY, (batch, length))
    for row, positions in zip(tokens, images, strict=False):
        row[list(positions)] = IMAGE
    return tokens


@pytest.fixture(params=[True, False], ids=["immediate", "all previous"])
def model(request):
    return randomize(TinyCaptioner(request.param)).requires_grad_(False)


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 11])
def test_prefill_in_chunks_of_any_size(chunk, immediate):
    """Logits as good as without a cache, and the same greedy tokens after the prompt."""
    text, media = prompt(), torch.randn(2, 3, EACH, 20)
    model = TinyCaptioner(immediate).requires_grad_(False)
    for block in model.blocks:
        block.attn_gate += 0.5
        block.ff_gate -= 0.5
    cache, past = MediaCache(model.blocks, media), [None, None]
    logits = [model.chunked(text, cache, chunk, past)]
    for _ in range(6):
        best = logits[-1][:, -1:].argmax(-1)
        assert torch.equal(best, model.whole(text, media)[:, -1:].argmax(-1))
        text = torch.cat([text, best], 1)
        logits.append(model.chunked(best, cache, 1, past))
    growing = [model.whole(text[:, : t + 1], media)[:, -1:] for t in range(text.shape[1])]
    lows = [model.whole(text, media), torch.cat(growing, 1)]
    assert_as_good(torch.cat(logits, 1), lows, model.double().whole(text, media.double()))


@pytest.mark.parametrize("chunk", [1, 3])
def test_samples_with_images_of_their_own_number(model, chunk):
    tokens, media = prompt(), torch.randn(2, 3, EACH, 20, dtype=torch.double)
    counts = torch.tensor([3, 1])
    cache = MediaCache(model.blocks, media, num_media=counts)
    close(model.chunked(tokens, cache, chunk), model.whole(tokens, media, num_media=counts))


def test_append_between_chunks(model):
    """Text, an image, text, two more: as one forward with all of them."""
    tokens, media = prompt(), torch.randn(2, 3, EACH, 20, dtype=torch.double)
    cache, past = MediaCache(model.blocks, media[:, :1]), [None, None]
    tokens[:, :4] = torch.tensor([3, IMAGE, 4, 5])
    tokens[:, 4:] = prompt(length=7, images=((1, 4), (0, 6)))
    first = model.chunked(tokens[:, :4], cache, 4, past)
    cache.append(media[:, 1:])
    second = model.chunked(tokens[:, 4:], cache, 3, past)
    close(torch.cat([first, second], 1), model.whole(tokens, media))
    assert (cache.num_slots, cache.num_media, cache.seen.tolist()) == (3, 3, [3, 3])


def test_append_to_samples_of_their_own_number(model):
    """New images come right after those that a sample has, not after its padding."""
    media = torch.randn(2, 4, EACH, 20, dtype=torch.double)
    wanted = torch.stack([media[0, [0, 1, 2]], media[1, [0, 2, 3]]])
    cache = MediaCache(model.blocks, media[:, :2], num_media=torch.tensor([2, 1]))
    cache.append(media[:, 2:], num_media=torch.tensor([1, 2]))
    tokens = prompt()
    assert cache.num_media.tolist() == [3, 3]
    close(model.chunked(tokens, cache, 4), model.whole(tokens, wanted))
    even = MediaCache(model.blocks, media[:, :2])
    even.append(media[:, 2:], num_media=torch.tensor([2, 0]))
    close(model.chunked(tokens, even, 4), model.whole(tokens, media, num_media=torch.tensor([4, 2])))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("counts", [None, [3, 2]])
def test_drop_is_as_if_the_image_had_not_been_there(index, counts):
    """Of the text after it; what the layers saw of the image before stays in the language model's cache."""
    block = randomize(
        GatedCrossAttentionBlock(WIDTH, 20, dim_head=8, heads=2, only_attend_immediate_media=False)
    )
    media, x = torch.randn(2, 3, EACH, 20, dtype=torch.double), torch.randn(2, 4, WIDTH, dtype=torch.double)
    counts = None if counts is None else torch.tensor(counts)
    cache = MediaCache([block], media, num_media=counts)
    cache.step(torch.tensor([[False, True, True], [True, False, False]]))
    cache.drop(index)
    following = torch.tensor([[False, True, False, False], [True, False, True, False]])
    cache.step(following)
    rest = [i for i in range(3) if i != index]
    earlier = torch.tensor([2 - (index < 2), 1 - (index < 1)])
    less = 2 if counts is None else counts - (counts > index).long()
    time = earlier[:, None] + following.cumsum(1)
    mask = torch.arange(1, 3) <= time.clamp_max(torch.as_tensor(less).reshape(-1, 1))[..., None]
    close(block(x, cache=cache), block(x, media[:, rest], mask=mask))
    assert cache.num_slots == 2


def test_beams(model):
    """Expanded, reordered and taken apart, a cache row goes with its beam."""
    media = torch.randn(2, 3, EACH, 20, dtype=torch.double)
    cache = MediaCache(model.blocks, media, num_media=torch.tensor([3, 2]))
    cache.reorder(torch.tensor([0, 0, 1, 1]))
    tokens = prompt(4, 9, ((1,), (1, 3), (2, 4, 6), ()))
    past = [None, None]
    model.chunked(tokens, cache, 9, past)
    order = torch.tensor([1, 1, 3, 2])
    cache.reorder(order)
    past = [x[order] for x in past]
    after = torch.tensor([[IMAGE, 7], [8, 9], [3, IMAGE], [4, 4]])
    got = model.chunked(after, cache, 1, past)
    rows = torch.tensor([0, 0, 1, 1])
    whole = model.whole(
        torch.cat([tokens[order], after], 1), media[rows], num_media=torch.tensor([3, 3, 2, 2])
    )
    close(got, whole[:, -2:])


def test_intervals_and_masks_may_be_given_beside_the_cache():
    block = randomize(GatedCrossAttentionBlock(WIDTH, 20, dim_head=8, heads=2))
    media, x = torch.randn(2, 3, EACH, 20, dtype=torch.double), torch.randn(2, 4, WIDTH, dtype=torch.double)
    cache = MediaCache([block.attn], media)
    mask = torch.rand(2, 4, 3) < 0.5
    close(block(x, cache=cache, mask=mask), block(x, media, mask=mask))
    seen = torch.tensor([0, 5, 5, 0]), torch.tensor([5, 15, 10, 0])
    close(block(x, cache=cache, intervals=seen), block(x, media, intervals=seen))


def test_gradients_flow_through_the_cache():
    block = randomize(GatedCrossAttentionBlock(WIDTH, 20, dim_head=8, heads=2))
    media = torch.randn(2, 3, EACH, 20, dtype=torch.double, requires_grad=True)
    x, locations = torch.randn(2, 4, WIDTH, dtype=torch.double), torch.rand(2, 4) < 0.5
    parameters = [media, *block.parameters()]
    wanted = torch.autograd.grad(block(x, media, locations).square().sum(), parameters)
    cache = MediaCache([block], media)
    cache.step(locations)
    for got, grad in zip(
        torch.autograd.grad(block(x, cache=cache).square().sum(), parameters), wanted, strict=True
    ):
        close(got, grad)


def test_a_decoding_step_projects_no_media():
    """Whatever the weights of the projection become, the step does not read them."""
    block = randomize(GatedCrossAttentionBlock(WIDTH, 20, dim_head=8, heads=2)).requires_grad_(False)
    media, x = torch.randn(2, 3, EACH, 20, dtype=torch.double), torch.randn(2, 1, WIDTH, dtype=torch.double)
    cache = MediaCache([block], media)
    cache.step(torch.ones(2, 1, dtype=torch.bool))
    wanted = block(x, cache=cache)
    block.attn.to_kv.weight.fill_(torch.nan)
    assert torch.equal(block(x, cache=cache), wanted)


def test_compile():
    block = randomize(GatedCrossAttentionBlock(WIDTH, 20, dim_head=8, heads=2)).requires_grad_(False)
    media, x = torch.randn(2, 3, EACH, 20, dtype=torch.double), torch.randn(2, 6, WIDTH, dtype=torch.double)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    locations = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0]]).bool()
    cache = MediaCache([block], media)
    rows = []
    for i in range(6):
        cache.step(locations[:, i : i + 1])
        rows.append(compiled(x[:, i : i + 1], cache=cache))
    close(torch.cat(rows, 1), block(x, media, locations))


def test_bad_input():
    block = GatedCrossAttentionBlock(WIDTH, 20, dim_head=8, heads=2)
    other = GatedCrossAttentionBlock(WIDTH, 20, dim_head=8, heads=2, only_attend_immediate_media=False)
    media, x = torch.randn(2, 3, EACH, 20), torch.randn(2, 4, WIDTH)
    with pytest.raises(
        ValueError, match=r"blocks must be .* modules, got \['Linear'\]; media must be \[B, M, n, Dv\]"
    ):
        MediaCache([nn.Linear(2, 2)], media[0])
    with pytest.raises(ValueError, match="the same only_attend_immediate_media; num_media must be"):
        MediaCache([block, other], media, num_media=torch.tensor([1]))
    cache = MediaCache([block], media)
    with pytest.raises(
        ValueError, match=r"call step\(\) for the rows \[B, t\] = \(2, 4\) first; the last was for None"
    ):
        block(x, cache=cache)
    cache.step(length=3)
    with pytest.raises(ValueError, match=r"the last was for \(2, 3\)"):
        block(x, cache=cache)
    with pytest.raises(ValueError, match=r"media_locations must be \[B = 2, t\], got \(3, 4\)"):
        cache.step(torch.zeros(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="the cache was created without this layer"):
        other(x, cache=cache)
    with pytest.raises(
        ValueError, match=r"exactly one of media and cache .*; media_locations must be passed to cache.step"
    ):
        block(x, media, torch.zeros(2, 4, dtype=torch.bool), cache=cache)
    with pytest.raises(ValueError, match=r"index must be in \[0, 3\), got 3"):
        cache.drop(3)
    with pytest.raises(ValueError, match=r"media must be \[B = 2, m, n = 5, Dv\], got \(2, 3, 4, 20\)"):
        cache.append(media[:, :, 1:])
