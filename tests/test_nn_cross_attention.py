"""The gated block on its own: every case of who sees what, gradients, precision, compilation, memory."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parity import close, peer, randomize
from vlmkernels import intervals
from vlmkernels.nn import GatedCrossAttentionBlock, MaskedCrossAttention, MediaCache
from vlmkernels.nn.families import BLOCK_PRESETS
from vlmkernels.testing import saved_activation_bytes

SIZES = {"dim_head": 8, "heads": 4, "ff_mult": 2}
ZERO, MEAN = "zero", "mean"
ALL = frozenset(range(1, 4))
OF, HF = ("open_flamingo", "lucidrains", "flamingo_mini"), ("mllama",)

# (case, only the immediate image, positions of image tokens, cached, row) -> what the attention gives: the
# images that the row sees, of three; exceptions of families whose code does something else.
EDGES = {
    ("before the first image", True, (2, 4), False, 1): (ZERO, {HF: ALL}),
    ("on the image token", True, (2, 4), False, 2): ({1}, {}),
    ("after the second", True, (2, 4), False, 5): ({2}, {}),
    ("more image tokens than images", True, (0, 1, 2, 4), False, 5): (ZERO, {OF: MEAN, HF: ALL}),
    ("before the first image", False, (2, 4), False, 1): (ZERO, {OF: MEAN, HF: ALL}),
    ("after the second", False, (2, 4), False, 5): ({1, 2}, {}),
    ("more image tokens than images", False, (0, 1, 2, 4), False, 5): ({1, 2, 3}, {}),
    ("cached, no image so far", True, (), True, 3): (ZERO, {HF: ALL}),
    ("cached, no image so far", False, (), True, 3): (ZERO, {OF: MEAN, HF: ALL}),
    ("cached, every row sees the last image", True, (2, 4), True, 0): ({2}, {}),
    ("cached, every row sees the last image", False, (2, 4), True, 0): ({1, 2}, {}),
}  # fmt: skip


def build(**options):
    return randomize(GatedCrossAttentionBlock(24, 20, **{**SIZES, **options}))


def text_and_media(batch=2, tokens=7, images=3, *, dtype=torch.double):
    return torch.randn(batch, tokens, 24, dtype=dtype), torch.randn(batch, images, 5, 20, dtype=dtype)


def at(positions, tokens=7, batch=2):
    locations = torch.zeros(batch, tokens, dtype=torch.bool)
    locations[:, list(positions)] = True
    return locations


def expected_row(block, x, media, seen, ffn_on_empty=True):
    """The block's result for single rows x [B, D] that see the images of the set `seen`, by the formulas."""
    attn = block.attn
    repeats = attn.heads // attn.kv_heads
    key, value = (t.repeat_interleave(repeats, 1) for t in attn.keys_values(media))  # [B, H, M n, Dh]
    query = attn.q_norm(attn.to_q(attn.norm(x)).unflatten(-1, (attn.heads, -1)))[:, :, None]
    if seen == ZERO:
        out = torch.zeros_like(query)
    elif seen == MEAN:
        out = value.mean(2, keepdim=True)
    else:
        columns = torch.cat([torch.arange((j - 1) * 5, j * 5) for j in sorted(seen)])
        p = (query @ key[:, :, columns].mT * query.shape[-1] ** -0.5).softmax(-1)
        out = p @ value[:, :, columns]
    y = x + block.attn_gate.tanh() * attn.to_out(out[:, :, 0].flatten(1))
    return y + block.ff_gate.tanh() * block.ff(y) if ffn_on_empty else y


@pytest.mark.parametrize("family", [None, *BLOCK_PRESETS])
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: f"{edge[0]}, {'eq' if edge[1] else 'ge'}")
def test_edge_table(edge, family):
    _, immediate, positions, cached, row = edge
    seen, exceptions = EDGES[edge]
    empty = seen == ZERO
    seen = next((other for families, other in exceptions.items() if family in families), seen)
    options = BLOCK_PRESETS[family] if family else {}
    block = build(only_attend_immediate_media=immediate, **options)
    x, media = text_and_media()
    out = block(x, media, at(positions), use_cached_media=cached)
    ffn = not empty or options.get("ffn_on_empty", True)
    close(out[:, row], expected_row(block, x[:, row], media, seen, ffn))


@pytest.mark.parametrize("immediate", [True, False])
def test_samples_with_fewer_images_never_see_the_padding(immediate):
    block = build(only_attend_immediate_media=immediate)
    x, media = text_and_media()
    locations = at((1, 3, 5))
    out = block(x, media, locations, num_media=torch.tensor([3, 2]))
    last = ZERO if immediate else {1, 2}
    close(out[1:, 6], expected_row(block, x[1:, 6], media[1:], last))
    close(out[:1], block(x[:1], media[:1], locations[:1]))
    other = media.clone()
    other[1, 2] += 5
    assert torch.equal(block(x, other, locations, num_media=torch.tensor([3, 2])), out)


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("family", [None, "idefics", "mllama_meta"])
def test_a_later_image_never_changes_earlier_text(family, immediate):
    options = BLOCK_PRESETS[family] if family else {}
    block = build(only_attend_immediate_media=immediate, **options)
    for _ in range(20):
        x, media = text_and_media(tokens=9)
        locations = torch.rand(2, 9) < 0.4
        out = block(x, media, locations)
        time = locations.cumsum(1)
        for image in range(3):
            other = media.clone()
            other[:, image] += torch.randn_like(other[:, image])
            changed = (block(x, other, locations) != out).any(-1)
            assert not (changed & (time < image + 1)).any()
            assert torch.equal(changed, time == image + 1 if immediate else time >= image + 1)


def test_the_property_fails_for_the_families_that_leak():
    x, media = text_and_media()
    other = media.clone()
    other[:, 2] += 1
    for family in ("open_flamingo", "mllama"):
        block = build(only_attend_immediate_media=False, **BLOCK_PRESETS[family])
        before = [block(x, m, at((2, 4)))[:, 0] for m in (media, other)]
        assert not torch.equal(*before)


@pytest.mark.parametrize("immediate", [True, False])
def test_shared_intervals_equal_media_locations(immediate):
    block = build(only_attend_immediate_media=immediate)
    x, media = text_and_media()
    locations = at((1, 4))
    seen = intervals.media(intervals.text_time(locations), 5, 3, attend=block.attn.attend)
    assert torch.equal(block(x, media, intervals=seen), block(x, media, locations))
    assert torch.equal(
        block(x, media, intervals=(torch.zeros(7).int(), torch.full((7,), 15).int())), block(x, media)
    )


@pytest.mark.parametrize("family", [None, "open_flamingo", "mllama"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_masks_that_are_not_intervals(kv_heads, family):
    block = build(kv_heads=kv_heads, **(BLOCK_PRESETS[family] if family else {}))
    x, media = text_and_media()
    mask = torch.zeros(2, 7, 3, dtype=torch.bool)
    mask[:, 1, [0, 2]], mask[:, 2, 1], mask[:, 3:] = True, True, True
    out = block(x, media, mask=mask)
    empty = {None: ZERO, "open_flamingo": MEAN, "mllama": ALL}[family]
    ffn = block.ffn_on_empty
    for row, seen in ((0, empty), (1, {1, 3}), (2, {2}), (6, ALL)):
        close(out[:, row], expected_row(block, x[:, row], media, seen, ffn or row > 0))
    assert torch.equal(block(x, media, mask=mask.repeat_interleave(5, -1)), out)
    holes = torch.rand(2, 7, 15) < 0.5
    leaves = [t.clone().requires_grad_() for t in (x, media)]
    assert all(
        grad.isfinite().all() for grad in torch.autograd.grad(block(*leaves, mask=holes).sum(), leaves)
    )


def test_the_attention_alone_is_the_branch():
    block = build()
    x, media = text_and_media()
    branch = block.attn(x, media, at((1,)))
    assert torch.equal(branch[:, 0], torch.zeros(2, 24, dtype=torch.double))
    y = x + block.attn_gate.tanh() * branch
    close(block(x, media, at((1,))), y + block.ff_gate.tanh() * block.ff(y))


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_closed_gates_give_x_and_open_ones_get_gradients(gate):
    block = GatedCrossAttentionBlock(24, 20, gate=gate, **SIZES)
    x, media = text_and_media(dtype=torch.float32)
    out = block(x, media, at((1, 3)))
    assert torch.equal(out, x)
    out.square().sum().backward()
    for gradient in (block.attn_gate.grad, block.ff_gate.grad):
        assert gradient.shape == ((24,) if gate == "vector" else (1,))
        assert gradient.isfinite().all()
        assert (gradient != 0).all()
    assert all(p.grad.abs().max() == 0 for name, p in block.named_parameters() if "gate" not in name)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"activation": "squared_relu", "gate": "vector"}, {"activation": "relu", "ffn_on_empty": False},
        {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "kv_heads": 2, "gate": "vector"},
    ],
)  # fmt: skip
def test_gradients(options, recompute):
    """Of every input and parameter, against finite differences."""
    block = build(**{**options, "recompute_ffn": recompute, "heads": 2})
    x, media = text_and_media(1, 4, 2)
    names = [name for name, _ in block.named_parameters()]

    def run(x, media, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(block, named, (x, media, at((1, 2), 4, 1)))

    inputs = [t.detach().requires_grad_() for t in (x, media, *block.parameters())]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_frozen_parts_get_no_gradient_and_change_no_other():
    block = build()
    x, media = text_and_media()
    locations = at((1, 4))

    def gradients(*inputs):
        block.zero_grad()
        for t in inputs:
            t.grad = None
        block(x, media, locations).square().sum().backward()
        return {name: p.grad for name, p in (("x", x), ("media", media), *block.named_parameters())}

    x.requires_grad_()
    media.requires_grad_()
    whole = {name: grad.clone() for name, grad in gradients(x, media).items()}
    frozen = {"ff.1.weight", "ff.3.weight", "attn.norm.bias", "attn.to_q.weight", "attn_gate", "media"}
    media.requires_grad_(False)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in frozen)
    part = gradients(x, media)
    assert {name for name, grad in part.items() if grad is None} == frozen
    for name in part.keys() - frozen:
        close(part[name], whole[name], name)


def test_second_derivatives_are_refused():
    block = build()
    x, media = text_and_media()
    (grad,) = torch.autograd.grad(block(x.requires_grad_(), media).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_adapted_projections_are_called():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, adapted = build(), build()
    adapted.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for owner, name in (
            (adapted.attn, "to_q"),
            (adapted.attn, "to_out"),
            (adapted.ff, "1"),
            (adapted.ff, "3"),
        ):
            old = getattr(owner, name)
            new = Twice(old.in_features, old.out_features, bias=False, dtype=torch.double)
            new.weight.copy_(old.weight / 2)
            setattr(owner, name, new)
    x, media = text_and_media()
    close(adapted(x, media, at((1,))), plain(x, media, at((1,))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["open_flamingo", "mllama_meta"])
def test_low_precision(family, dtype):
    block = build(**BLOCK_PRESETS[family]).to(dtype)
    x, media = (t.to(dtype) for t in text_and_media())
    out = block(x, media, at((1, 4)))
    assert out.dtype == dtype
    wanted = block.double()(x.double(), media.double(), at((1, 4)))
    assert (out.double() - wanted).abs().max() <= 8 * torch.finfo(dtype).eps * wanted.abs().max()
    block.to(dtype)(x, media, at((1, 4))).sum().backward()
    assert all(p.grad.dtype == dtype for p in block.parameters())


@pytest.mark.parametrize("family", ["open_flamingo", "mllama_meta"])
@pytest.mark.parametrize("way", ["locations", "mask"])
def test_autocast(way, family):
    block = build(**BLOCK_PRESETS[family]).float()
    inputs = [t.float().requires_grad_() for t in text_and_media()]
    seen = {"media_locations": at((0, 4))} if way == "locations" else {"mask": torch.rand(2, 7, 3) < 0.6}
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = block(*inputs, **seen)
        assert out.dtype == torch.float32
        results.append([out, *torch.autograd.grad(out.square().sum(), [*inputs, *block.parameters()])])
    assert not torch.equal(results[0][0], results[1][0])
    for wanted, got in zip(*results, strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).norm() <= 0.04 * wanted.norm() + 1e-3


class Recorder(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    """No operator hands a number to the host, and the meta device, which has no numbers, runs it all."""
    block = build(empty_row="uniform", ffn_on_empty=False)
    x, media = text_and_media()
    with Recorder() as recorder:
        block(x.requires_grad_(), media, at((1,)), num_media=torch.tensor([1, 2])).sum().backward()
        cache = MediaCache([block], media, num_media=torch.tensor([1, 2]))
        cache.step(at((1,)))
        block(x, cache=cache)
    waits = {"_local_scalar_dense", "is_nonzero", "item", "nonzero", "any", "equal", "masked_select"}
    assert not {name for name in recorder.names if name.split(".")[0] in waits}
    block, x, media, locations = (
        block.to("meta"),
        x.detach().to("meta"),
        media.to("meta"),
        at((1,)).to("meta"),
    )
    assert block(x, media, locations).shape == x.shape
    cache = MediaCache([block], media, num_media=torch.tensor([1, 2], device="meta"))
    cache.append(media, num_media=torch.tensor([1, 2], device="meta"))
    cache.drop(0)
    cache.reorder(torch.tensor([1, 0], device="meta"))
    cache.step(locations)
    assert block(x, cache=cache).shape == x.shape


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["open_flamingo", "mllama_meta"])
def test_compile(family, backend):
    block = build(**BLOCK_PRESETS[family])
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    inputs = [t.requires_grad_() for t in text_and_media()]
    results = []
    for module in (block, compiled):
        out = module(*inputs, at((1, 4)))
        results.append([out, *torch.autograd.grad(out.square().sum(), [*inputs, *block.parameters()])])
    for wanted, got in zip(*results, strict=True):
        close(got, wanted)


def test_saved_memory():
    """T = 512, d = 1024, 8 images of 64 latents, 8 heads of 64, feed-forward 4 d: 4 times less."""
    theirs = peer("open_flamingo.src.helpers").GatedCrossAttentionBlock(dim=1024, dim_visual=1024)
    x, media, locations = (
        torch.randn(1, 512, 1024),
        torch.randn(1, 8, 64, 1024),
        at(range(0, 512, 64), 512, 1),
    )
    blocks = [GatedCrossAttentionBlock(1024, 1024, recompute_ffn=again) for again in (False, True)]
    kept = [
        saved_activation_bytes(
            b, x.requires_grad_(), media.requires_grad_(), locations, parameters=b.parameters()
        )
        for b in (theirs, *blocks)
    ]
    assert kept[0] > 4 * kept[1]
    assert kept[0] > 12 * kept[2]


def test_bad_input():
    with pytest.raises(ValueError, match=r"heads must be a multiple of kv_heads, got 4 and 3"):
        MaskedCrossAttention(24, heads=4, kv_heads=3)
    with pytest.raises(
        ValueError, match=r"gate must be one of scalar, vector, got 'matrix'; empty_row must be one of"
    ):
        GatedCrossAttentionBlock(24, gate="matrix", empty_row="nan")
    block = build()
    x, media = text_and_media()
    with pytest.raises(
        ValueError, match=r"x must be \[B, T, 24\], got \(2, 7, 23\); exactly one of media and cache"
    ):
        block(x[..., 1:])
    with pytest.raises(
        ValueError,
        match="at most one of media_locations, intervals and mask may be given, got media_locations and",
    ):
        block(x, media, at((1,)), mask=torch.ones(2, 7, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"media_locations must be \[B, T\] = \(2, 7\).*, got \(2, 6\)"):
        block(x, media, at((1,), 6))
    with pytest.raises(ValueError, match=r"mask must be bool \[B, T, M or M n\] = \(2, 7, \(3, 15\)\), got"):
        block(x, media, mask=torch.ones(2, 7, 4, dtype=torch.bool))
    with pytest.raises(
        ValueError,
        match=r"media must be \[B = 2, M, n, Dv\], got \(2, 15, 20\); num_media requires media_locations",
    ):
        block(x, media.flatten(1, 2), num_media=torch.tensor([1, 1]))
