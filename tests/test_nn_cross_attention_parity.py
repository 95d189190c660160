"""The gated block with the weights of other libraries: names both ways, outputs, gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.parity import assert_same, peer, randomize
from vlmkernels.nn import GatedCrossAttentionBlock
from vlmkernels.nn.families import BLOCK_PRESETS, load_family_state_dict

SIZES = {"dim_head": 8, "heads": 4}


def locations(*rows, tokens=9):
    result = torch.zeros(len(rows), tokens, dtype=torch.bool)
    for row, positions in zip(result, rows, strict=True):
        row[list(positions)] = True
    return result


def text_and_media(dim_visual=20):
    return [torch.randn(2, 9, 24, dtype=torch.double), torch.randn(2, 3, 5, dim_visual, dtype=torch.double)]


# Text before the first image and more image tokens than images; no image and one at the end.
MANY, FEW = locations((1, 4, 5, 7), (0, 6)), locations((), (8,))


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize(
    ("seen", "cached"), [(MANY, False), (FEW, False), (MANY, True), (FEW, True), (None, True)]
)
def test_open_flamingo(seen, cached, immediate):
    helpers = peer("open_flamingo.src.helpers")
    options = {"only_attend_immediate_media": immediate, **SIZES}
    theirs = helpers.GatedCrossAttentionBlock(dim=24, dim_visual=20, **options)
    ours = GatedCrossAttentionBlock(24, 20, **options, **BLOCK_PRESETS["open_flamingo"])

    def call(module, x, media):
        return module(x, media, media_locations=seen, use_cached_media=cached)

    assert_same(ours, theirs, "open_flamingo", text_and_media(), call, call)
    ours.load_state_dict(theirs.state_dict())  # the native names


@pytest.mark.parametrize("immediate", [True, False])
def test_lucidrains(immediate):
    options = {"only_attend_immediate_media": immediate, **SIZES}
    theirs = peer("flamingo_pytorch").GatedCrossAttentionBlock(dim=24, **options)
    ours = GatedCrossAttentionBlock(24, **options, **BLOCK_PRESETS["lucidrains"])

    def call(module, x, media):
        return module(x, media, MANY)

    assert_same(ours, theirs, "lucidrains", text_and_media(24), call, call)


class MiniBlock(nn.Module):
    """flamingo-mini's block, written from its description."""

    def __init__(self, dim, dim_visual, dim_head, heads, activation):
        super().__init__()
        self.attn = nn.Module()
        self.attn.norm = nn.LayerNorm(dim)
        self.attn.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.attn.to_kv = nn.Linear(dim_visual, 2 * heads * dim_head, bias=False)
        self.attn.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.alpha_attn, self.alpha_ffw = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.ffw = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, 4 * dim, bias=False),
            activation,
            nn.Linear(4 * dim, dim, bias=False),
        )
        self.heads = heads

    def forward(self, x, media, seen):
        images, each = media.shape[1:3]
        q = self.attn.to_q(self.attn.norm(x))
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (q, *self.attn.to_kv(media.flatten(1, 2)).chunk(2, -1))
        )
        time = seen.cumsum(1)
        image = torch.arange(images).repeat_interleave(each) + 1
        logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(
            (time[..., None] != image)[:, None], -torch.finfo(q.dtype).max
        )
        p = logits.softmax(-1).masked_fill((time == 0)[:, None, :, None], 0)
        x = x + self.alpha_attn.tanh() * self.attn.to_out((p @ v).transpose(1, 2).flatten(2))
        return x + self.alpha_ffw.tanh() * self.ffw(x)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_flamingo_mini(activation):
    theirs = MiniBlock(24, 20, 8, 4, {"gelu": nn.GELU, "relu": nn.ReLU}[activation]())
    ours = GatedCrossAttentionBlock(24, 20, activation=activation, **SIZES, **BLOCK_PRESETS["flamingo_mini"])

    def call(module, x, media):
        return module(x, media, MANY)

    assert_same(ours, theirs, "flamingo_mini", text_and_media(), call, call)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("gate", "qk_norm"), [("scalar", False), ("vector", True)])
def test_idefics(gate, qk_norm, holes):
    module = peer("transformers.models.idefics.modeling_idefics")
    config = peer("transformers").IdeficsConfig(
        hidden_size=24, num_attention_heads=3, intermediate_size=40, vision_config={"embed_dim": 20},
        qk_layer_norms=qk_norm, alpha_type="vector" if gate == "vector" else "float",
        attn_implementation="eager",
    )  # fmt: skip
    theirs = module.IdeficsGatedCrossAttentionLayer(config, layer_idx=0)
    ours = GatedCrossAttentionBlock(
        24, 20, dim_head=8, heads=3, ff_dim=40, gate=gate, qk_norm=qk_norm, **BLOCK_PRESETS["idefics"]
    )
    time = MANY.cumsum(1)
    mask = (time[..., None] == torch.arange(1, 4)) | (holes & (torch.rand(2, 9, 3) < 0.5))

    def call_theirs(layer, x, media):
        wide = mask.repeat_interleave(5, -1)[:, None]
        lowest = torch.finfo(torch.float32).min  # their softmax runs in float32
        additive = torch.zeros_like(wide, dtype=x.dtype).masked_fill(~wide, lowest)
        seen = mask.any(-1).to(x.dtype)
        return layer(
            x,
            image_hidden_states=media.flatten(1, 2),
            image_attention_mask=additive,
            cross_attention_gate=seen,
        )

    def call_ours(block, x, media):
        return block(x, media, mask=mask) if holes else block(x, media, MANY)

    assert_same(ours, theirs, "idefics", text_and_media(), call_theirs, call_ours, tolerance=2e-5)


@pytest.mark.parametrize("way", ["intervals", "mask"])
def test_mllama(way):
    """transformers' layer, its rows without an image included, which attend to everything."""
    module = peer("transformers.models.mllama.modeling_mllama")
    config = peer("transformers.models.mllama.configuration_mllama").MllamaTextConfig(
        hidden_size=24, num_attention_heads=6, num_key_value_heads=2, intermediate_size=40,
        num_hidden_layers=1, cross_attention_layers=[0], pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    theirs = module.MllamaCrossAttentionDecoderLayer(config, 0)
    ours = GatedCrossAttentionBlock(
        24, dim_head=4, heads=6, kv_heads=2, ff_dim=40, only_attend_immediate_media=False,
        **BLOCK_PRESETS["mllama"] | {"eps": config.rms_norm_eps},
    )  # fmt: skip
    seen = MANY
    mask = seen.cumsum(1)[..., None] >= torch.arange(1, 4)  # [B, T, M], one tile each

    def call_theirs(layer, x, media):
        additive, rows = module._prepare_cross_attention_mask(mask[..., None].to(x.dtype), 5, x.dtype)
        return layer(
            x, cross_attention_states=media.flatten(1, 2), cross_attention_mask=additive, attention_mask=None,
            full_text_row_masked_out_mask=rows,
        )  # fmt: skip

    def call_ours(block, x, media):
        return block(x, media, mask=mask) if way == "mask" else block(x, media, seen)

    assert_same(ours, theirs, "mllama", text_and_media(24), call_theirs, call_ours, tolerance=2e-5)


class MetaBlock(nn.Module):
    """The cross-attention block of Meta's llama-models, written from its description."""

    def __init__(self, dim, heads, kv_heads, hidden, eps=1e-5):
        super().__init__()
        width = dim // heads
        self.heads, self.kv_heads = heads, kv_heads
        self.attention, self.feed_forward = nn.Module(), nn.Module()
        self.attention.wq = nn.Linear(dim, dim, bias=False)
        self.attention.wk = nn.Linear(dim, kv_heads * width, bias=False)
        self.attention.wv = nn.Linear(dim, kv_heads * width, bias=False)
        self.attention.wo = nn.Linear(dim, dim, bias=False)
        self.attention.q_norm, self.attention.k_norm = (nn.RMSNorm(width, eps=eps) for _ in range(2))
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(dim, eps=eps) for _ in range(2))
        self.feed_forward.w1, self.feed_forward.w3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.feed_forward.w2 = nn.Linear(hidden, dim, bias=False)
        self.gate_attn, self.gate_ffwd = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x, media, mask):  # mask [B, T, M n]
        a, repeats = self.attention, self.heads // self.kv_heads
        tokens = media.flatten(1, 2)
        q = a.q_norm(a.wq(self.attention_norm(x)).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        k = a.k_norm(a.wk(tokens).unflatten(-1, (self.kv_heads, -1))).transpose(1, 2)
        v = a.wv(tokens).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        k, v = (y.repeat_interleave(repeats, 1) for y in (k, v))
        seen = mask.any(-1)
        bias = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask & seen[..., None], -torch.inf)
        out = F.scaled_dot_product_attention(q, k, v, bias[:, None]) * seen[:, None, :, None]
        x = x + self.gate_attn.tanh() * a.wo(out.transpose(1, 2).flatten(2))
        normed = self.ffn_norm(x)
        hidden = F.silu(self.feed_forward.w1(normed)) * self.feed_forward.w3(normed)
        return x + self.gate_ffwd.tanh() * (self.feed_forward.w2(hidden) * seen[..., None])


@pytest.mark.parametrize("partial_tiles", [False, True])
def test_mllama_meta(partial_tiles):
    theirs = MetaBlock(24, 6, 2, 40)
    ours = GatedCrossAttentionBlock(
        24, dim_head=4, heads=6, kv_heads=2, ff_dim=40, only_attend_immediate_media=False,
        **BLOCK_PRESETS["mllama_meta"],
    )  # fmt: skip
    mask = (MANY.cumsum(1)[..., None] >= torch.arange(1, 4)).repeat_interleave(5, -1)
    if partial_tiles:
        mask = mask & (torch.arange(15) % 5 < 3)

    def call_ours(block, x, media):
        return block(x, media, mask=mask) if partial_tiles else block(x, media, MANY)

    calls = (lambda block, x, media: block(x, media, mask)), call_ours
    assert_same(ours, theirs, "mllama_meta", text_and_media(24), *calls)


def test_prefixes_and_faulty_weights():
    block, other = (randomize(GatedCrossAttentionBlock(24, 20, **SIZES)) for _ in range(2))
    prefix = "lang_encoder.model.layers.3.gated_cross_attn_layer."
    weights = {prefix + name: tensor for name, tensor in other.state_dict().items()}
    load_family_state_dict(
        block, {**weights, "lang_encoder.norm": torch.ones(3)}, "open_flamingo", prefix=prefix
    )
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), other.parameters(), strict=True))
    del weights[prefix + "attn_gate"]
    weights[prefix + "extra"] = weights[prefix + "ff_gate"]
    weights[prefix + "attn.to_q.weight"] = torch.ones(3, 24)
    message = (
        r"does not match GatedCrossAttentionBlock as open_flamingo: 1 missing: \S*attn_gate; "
        r"1 unknown: \S*extra; 1 of another shape: \S*to_q.weight \[3, 24\] for \[32, 24\]"
    )
    with pytest.raises(ValueError, match=message):
        load_family_state_dict(block, weights, "open_flamingo", prefix=prefix)
    with pytest.raises(ValueError, match=r"family must be one of flamingo, open_flamingo, .*, got 'blip'"):
        load_family_state_dict(block, weights, "blip")
