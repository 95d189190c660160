"""The Perceiver Resampler against open_flamingo, flamingo-pytorch, flamingo-mini and transformers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.parity import assert_same, close, peer, randomize
from vlmkernels.nn import PerceiverResampler
from vlmkernels.nn._layers import add_feed_forward
from vlmkernels.nn.families import RESAMPLER_PRESETS
from vlmkernels.testing import saved_activation_bytes

SIZES = {"depth": 2, "dim_head": 8, "heads": 4, "num_latents": 5}
# Keys and values of all layers come from one product when there are enough visual tokens.
FEW_AND_MANY = pytest.mark.parametrize("batch", [3, 12], ids=["layer by layer", "all layers at once"])


class MiniResampler(nn.Module):
    """flamingo-mini's: separate projections of keys and values, frames of one video flattened."""

    def __init__(self, dim, depth, dim_head, heads, num_latents, num_time_embeds=4):
        super().__init__()
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.time_pos_emb = nn.Parameter(torch.randn(num_time_embeds, 1, dim))
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention = nn.Module()
            attention.norm_media, attention.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
            for name in ("to_q", "to_k", "to_v"):
                setattr(attention, name, nn.Linear(dim, heads * dim_head, bias=False))
            attention.to_out = nn.Linear(heads * dim_head, dim, bias=False)
            parts = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU()
            feed_forward = nn.Sequential(*parts, nn.Linear(4 * dim, dim, bias=False))
            self.layers.append(nn.ModuleList([attention, feed_forward]))

    def forward(self, frames):  # [B, F, v, D]
        x = (frames + self.time_pos_emb[: frames.shape[1]]).flatten(1, 2)
        z = self.latents.expand(len(x), -1, -1)
        for attention, feed_forward in self.layers:
            z_hat = attention.norm_latents(z)
            both = torch.cat([attention.norm_media(x), z_hat], 1)
            q, k, v = (
                to(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for to, y in ((attention.to_q, z_hat), (attention.to_k, both), (attention.to_v, both))
            )
            p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            z = z + attention.to_out((p @ v).transpose(1, 2).flatten(2))
            z = z + feed_forward(z)
        return self.norm(z)


@pytest.mark.parametrize("embeddings", [{}, {"max_num_media": 4, "max_num_frames": 3}])
def test_open_flamingo(embeddings):
    theirs = peer("open_flamingo.src.helpers").PerceiverResampler(dim=24, **SIZES, **embeddings)
    ours = PerceiverResampler(24, **SIZES, **embeddings, **RESAMPLER_PRESETS["open_flamingo"])
    x = torch.randn(2, 3, 2, 7, 24, dtype=torch.double)
    assert_same(ours, theirs, "open_flamingo", [x], lambda m, x: m(x), lambda m, x: m(x))


@pytest.mark.parametrize("shape", [(2, 3, 7, 24), (2, 7, 24)])
def test_lucidrains(shape):
    theirs = peer("flamingo_pytorch").PerceiverResampler(dim=24, **SIZES)
    ours = PerceiverResampler(24, **SIZES, **RESAMPLER_PRESETS["lucidrains"])
    assert_same(
        ours,
        theirs,
        "lucidrains",
        [torch.randn(shape, dtype=torch.double)],
        lambda m, x: m(x),
        lambda m, x: m(x),
    )


def test_flamingo_mini():
    theirs = MiniResampler(24, **SIZES)
    ours = PerceiverResampler(24, **SIZES, **RESAMPLER_PRESETS["flamingo_mini"])
    x = torch.randn(2, 3, 7, 24, dtype=torch.double)
    assert_same(ours, theirs, "flamingo_mini", [x], lambda m, x: m(x), lambda m, x: m(x[:, None]))


@FEW_AND_MANY
@pytest.mark.parametrize("qk_norm", [False, True])
def test_idefics(qk_norm, batch):
    module = peer("transformers.models.idefics.perceiver")
    config = peer("transformers").IdeficsConfig(
        vision_config={"embed_dim": 24}, perceiver_config={"qk_layer_norms_perceiver": qk_norm}
    )
    theirs = module.IdeficsPerceiverResampler(config, 24, 2, 4, 8, 5)
    ours = PerceiverResampler(24, **SIZES, qk_norm=qk_norm, **RESAMPLER_PRESETS["idefics"])
    assert_same(
        ours,
        theirs,
        "idefics",
        [torch.randn(batch, 7, 24, dtype=torch.double)],
        lambda m, x: m(x),
        lambda m, x: m(x),
    )


@FEW_AND_MANY
def test_idefics2_with_padded_media(batch):
    module = peer("transformers.models.idefics2.modeling_idefics2")
    config = peer("transformers.models.idefics2.configuration_idefics2").Idefics2PerceiverConfig(
        hidden_size=24, resampler_n_latents=5, resampler_depth=2, resampler_n_heads=4, resampler_head_dim=8,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    theirs = module.Idefics2PerceiverResampler(config)
    ours = PerceiverResampler(24, **SIZES, kv_heads=2, **RESAMPLER_PRESETS["idefics2"])
    lengths = torch.tensor([7, 3, 1]).repeat(batch // 3)
    seen = (torch.arange(7) < lengths[:, None]).long()
    x = torch.randn(batch, 7, 24, dtype=torch.double)
    with torch.no_grad():
        theirs.latents.copy_(torch.randn_like(theirs.latents))
    calls = (lambda m, x: m(x, attention_mask=seen)), (lambda m, x: m(x, lengths))
    assert_same(ours, theirs, "idefics2", [x], *calls, tolerance=2e-5)


def test_squared_relu():
    resampler = PerceiverResampler(24, **SIZES, **RESAMPLER_PRESETS["flamingo"])
    feed_forward = resampler.layers[0][1]
    x = torch.randn(3, 24)
    normed = F.layer_norm(x, (24,), feed_forward[0].weight, feed_forward[0].bias)
    wanted = (normed @ feed_forward[1].weight.T).clamp_min(0).square() @ feed_forward[3].weight.T
    torch.testing.assert_close(feed_forward(x), wanted)
    torch.testing.assert_close(add_feed_forward(x, feed_forward), x + wanted)


def test_padding_is_never_seen_and_latents_remain():
    resampler = randomize(PerceiverResampler(24, **SIZES))
    x = torch.randn(1, 3, 1, 7, 24, dtype=torch.double)
    lengths = torch.tensor([[4, 7, 0]])
    whole = resampler(x, lengths)
    close(whole[:, :1], resampler(x[:, :1, :, :4]))
    close(whole[:, 1:2], resampler(x[:, 1:2]))
    close(whole[:, 2:], resampler(x[:, :1, :, :0]))
    other = x.clone()
    other[:, 0, :, 4:], other[:, 2] = 7.0, -3.0
    assert torch.equal(resampler(other, lengths), whole)


def test_every_parameter_and_the_media_get_gradients_and_a_frozen_resampler_costs_none():
    resampler = PerceiverResampler(24, **SIZES, max_num_media=3, max_num_frames=2, qk_norm=True)
    x = torch.randn(1, 2, 2, 7, 24, requires_grad=True)
    resampler(x).square().sum().backward()
    for name, tensor in (("x", x), *resampler.named_parameters()):
        assert tensor.grad is not None, name
        assert tensor.grad.abs().max() > 0, name
    resampler.requires_grad_(False)
    assert not resampler(x.detach()).requires_grad
    grad = torch.autograd.grad(resampler(x).square().sum(), x)[0]
    torch.testing.assert_close(grad, x.grad)


def test_adapted_projections_are_called():
    """A projection that is not a plain linear layer, as low-rank adaptation makes it, is not bypassed."""

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, adapted = (randomize(PerceiverResampler(24, **SIZES)) for _ in range(2))
    adapted.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for attention, feed_forward in adapted.layers:
            for owner, name in (
                (attention, "to_kv"),
                (attention, "to_q"),
                (feed_forward, "1"),
                (feed_forward, "3"),
            ):
                old = getattr(owner, name)
                new = Twice(old.in_features, old.out_features, bias=False, dtype=torch.double)
                new.weight.copy_(old.weight / 2)
                setattr(owner, name, new)
    x = torch.randn(2, 1, 1, 7, 24, dtype=torch.double)
    close(adapted(x), plain(x))


@FEW_AND_MANY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, batch):
    resampler = PerceiverResampler(32, depth=2, dim_head=16, heads=2, num_latents=4)
    x = torch.randn(batch, 1, 1, 9, 32)
    wanted = resampler(x)
    low = PerceiverResampler(32, depth=2, dim_head=16, heads=2, num_latents=4).to(dtype)
    low.load_state_dict(resampler.state_dict())
    out = low(x.to(dtype))
    assert out.dtype == dtype
    limit = 30 * torch.finfo(dtype).eps
    assert (out.float() - wanted).abs().max() < limit
    out.sum().backward()
    assert all(p.grad.dtype == dtype for p in low.parameters())


@FEW_AND_MANY
def test_autocast(batch):
    resampler = PerceiverResampler(32, depth=2, dim_head=16, heads=2, num_latents=4)
    x = torch.randn(batch, 1, 1, 9, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = resampler(x)
    wanted = resampler(x)
    assert 0 < (out - wanted).abs().max() < 0.2
    out.float().square().sum().backward()
    grads = [p.grad.clone() for p in (x, *resampler.parameters())]
    resampler.zero_grad()
    x.grad = None
    wanted.square().sum().backward()
    for grad, p in zip(grads, (x, *resampler.parameters()), strict=True):
        assert grad.dtype == torch.float32
        assert (grad - p.grad).norm() < 0.1 * p.grad.norm() + 1e-3


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend):
    resampler = PerceiverResampler(24, **SIZES, max_num_media=3)
    compiled = torch.compile(resampler, fullgraph=True, backend=backend)
    x = torch.randn(2, 2, 1, 7, 24, requires_grad=True)
    lengths = torch.tensor([[7, 2], [0, 5]])
    results = []
    for module in (resampler, compiled):
        out = module(x, lengths)
        grads = torch.autograd.grad(out.square().sum(), [x, *resampler.parameters()])
        results.append((out, *grads))
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_refused():
    resampler, x = PerceiverResampler(24, **SIZES), torch.randn(2, 1, 1, 7, 24, requires_grad=True)
    (grad,) = torch.autograd.grad(resampler(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
    latents = torch.randn(5, 24, requires_grad=True)
    out = add_feed_forward(latents, resampler.layers[0][1])
    (grad,) = torch.autograd.grad(out.square().sum(), latents, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_no_images():
    resampler = PerceiverResampler(24, **SIZES)
    assert resampler(torch.randn(0, 2, 1, 7, 24)).shape == (0, 2, 5, 24)
    assert resampler(torch.randn(2, 0, 1, 7, 24)).shape == (2, 0, 5, 24)


def test_saved_memory():
    """Much less than open_flamingo's, whose media are normalised, joined and projected in every layer."""
    helpers = peer("open_flamingo.src.helpers")
    theirs = helpers.PerceiverResampler(dim=512, depth=6)
    ours = PerceiverResampler(512, depth=6)
    x = torch.randn(1, 1, 1, 256, 512)
    bytes_of = [saved_activation_bytes(m, x, parameters=m.parameters()) for m in (theirs, ours)]
    assert bytes_of[0] > 2 * bytes_of[1]


def test_places_of_patches():
    """Embeddings of the places are added to the tokens; without them the tokens have no order."""
    placed = PerceiverResampler(24, **SIZES, max_num_patches=9).double()
    plain = PerceiverResampler(24, **SIZES).double()
    missing, unexpected = plain.load_state_dict(placed.state_dict(), strict=False)
    assert (missing, unexpected) == ([], ["patch_embs"])
    x = torch.randn(2, 3, 2, 7, 24, dtype=torch.double)
    torch.testing.assert_close(placed(x), plain(x + placed.patch_embs[:7]))
    torch.testing.assert_close(plain(x), plain(x.flip(3)))
    assert (placed(x) - placed(x.flip(3))).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"x has 10 visual tokens, there are embeddings for 9"):
        placed(torch.randn(1, 1, 1, 10, 24, dtype=torch.double))


def test_bad_input():
    with pytest.raises(ValueError, match=r"heads must be a multiple of kv_heads, got 4 and 3"):
        PerceiverResampler(24, heads=4, kv_heads=3)
    with pytest.raises(
        ValueError, match=r"depth must be a positive number, got 0; .*activation must be one of"
    ):
        PerceiverResampler(24, depth=0, activation="tanh")
    resampler = PerceiverResampler(24, **SIZES, max_num_media=2, max_num_frames=1)
    with pytest.raises(
        ValueError, match=r"x must be \[B, T, F, v, D\].* with D = 24, got \(2, 1, 1, 7, 25\)"
    ):
        resampler(torch.randn(2, 1, 1, 7, 25))
    with pytest.raises(
        ValueError, match=r"x has 3 images, there are embeddings for 2; x has 2 frames, .* for 1"
    ):
        resampler(torch.randn(2, 3, 2, 7, 24))
    with pytest.raises(ValueError, match=r"media_lengths must be int32 or int64 \[B, T\] = \(2, 1\)"):
        resampler(torch.randn(2, 1, 1, 7, 24), torch.ones(3))
