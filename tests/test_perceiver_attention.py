import pytest
import torch
import torch.nn.functional as F

import vlmkernels
from tests.attention import DTYPES, assert_attention_as_good, by_reference_kernels, implementations
from vlmkernels import reference
from vlmkernels.testing import result_and_gradients

OPS = implementations(vlmkernels.perceiver_attention)
NATIVE = vlmkernels.info()["ops"]["perceiver_attention"]["CPU"] != "reference"


def inputs(b, h, hkv, n, s, latents, dh, dv, dtype=torch.float32):
    shapes = [
        (b, h, n, dh), (b, hkv, s, dh), (b, hkv, s, dv), (b, hkv, latents, dh), (b, hkv, latents, dv),
    ]  # fmt: skip
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def by_joined_reference_kernels(query, mk, mv, lk, lv, *, media_lengths=None):
    """Latents first: then what a query sees is one interval."""
    seen = torch.full((len(query),), mk.shape[2]) if media_lengths is None else media_lengths
    end = (lk.shape[2] + seen.clamp(0, mk.shape[2]))[:, None].expand(-1, query.shape[2])
    return by_reference_kernels(
        query, torch.cat([lk, mk], 2), torch.cat([lv, mv], 2), torch.zeros_like(end), end
    )


def assert_as_good(tensors, op="dispatched", **options):
    assert_attention_as_good(
        lambda op: lambda *t: op(*t, **options),
        OPS[op],
        tensors,
        exact=reference.perceiver_attention,
        kernels=by_joined_reference_kernels,
    )


SHAPES = {
    "resampler": (2, 4, 4, 64, 257, 64, 64, 64),
    "grouped": (3, 6, 2, 37, 130, 5, 20, 37),
    "few latents": (2, 2, 1, 3, 90, 4, 16, 8),
    "one": (1, 1, 1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
def test_forward_and_gradients(op, dtype, shape, ragged):
    b, s = SHAPES[shape][0], SHAPES[shape][4]
    lengths = torch.tensor([0, s, s // 2])[:b] if ragged else None
    assert_as_good(inputs(*SHAPES[shape], dtype), op, media_lengths=lengths)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_equals_attention_over_the_joined_tokens(dtype):
    query, mk, mv, lk, lv = inputs(2, 4, 4, 20, 50, 7, 16, 16)
    wanted = F.scaled_dot_product_attention(query, torch.cat([mk, lk], 2), torch.cat([mv, lv], 2))
    torch.testing.assert_close(vlmkernels.perceiver_attention(query, mk, mv, lk, lv), wanted)
    lengths = torch.tensor([-3, 99], dtype=dtype)  # clipped to [0, 50]
    got = vlmkernels.perceiver_attention(query, mk, mv, lk, lv, media_lengths=lengths)
    torch.testing.assert_close(got[0], F.scaled_dot_product_attention(query, lk, lv)[0])
    torch.testing.assert_close(got[1], wanted[1])


def test_padding_has_no_influence():
    query, mk, mv, lk, lv = inputs(1, 2, 2, 70, 300, 64, 16, 16)
    got = result_and_gradients(
        lambda *t: vlmkernels.perceiver_attention(*t, media_lengths=torch.tensor([128])),
        (query, mk, mv, lk, lv),
    )
    short = result_and_gradients(
        vlmkernels.perceiver_attention,
        [query, *(t.detach()[:, :, :128].requires_grad_() for t in (mk, mv)), lk, lv],
    )
    for i, (a, b) in enumerate(zip(got, short, strict=True)):
        padded = i in (2, 3)
        torch.testing.assert_close(a[:, :, :128] if padded else a, b)
        assert not padded or (a[:, :, 128:] == 0).all()


@pytest.mark.parametrize("scale", [0.05, -1.0])
def test_scale(scale):
    query, mk, mv, lk, lv = inputs(1, 2, 2, 9, 20, 4, 8, 8)
    got = vlmkernels.perceiver_attention(query, mk, mv, lk, lv, scale=scale)
    key, value = torch.cat([mk, lk], 2), torch.cat([mv, lv], 2)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, key, value, scale=scale))


def test_gradcheck():
    tensors = inputs(2, 4, 2, 5, 6, 3, 4, 3, torch.float64)
    lengths = torch.tensor([0, 4])
    assert torch.autograd.gradcheck(
        lambda *t: vlmkernels.perceiver_attention(*t, media_lengths=lengths), tensors
    )


def test_second_derivative_is_refused():
    tensors = inputs(1, 1, 1, 5, 5, 2, 4, 4)
    out = vlmkernels.perceiver_attention(*tensors)
    (dq,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="perceiver_attention has no second derivative"):
        dq.sum().backward()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.once
def test_registration(permuted):
    tensors = [t.detach() for t in inputs(2, 4, 2, 9, 8, 5, 6, 5)]
    if permuted:
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    lengths = torch.tensor([0, 5])
    op, bwd = torch.ops.vlmkernels.perceiver_attention, torch.ops.vlmkernels.perceiver_attention_bwd
    leaves = [t.clone().requires_grad_() for t in tensors]
    for given in (lengths, None):
        torch.library.opcheck(op.default, (*leaves, given, 0.4))
        out, lse = op(*tensors, given, 0.4)
        for needs in ([True] * 5, [False, True, False, False, True]):
            torch.library.opcheck(bwd.default, (torch.randn_like(out), *tensors, given, out, lse, 0.4, needs))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(*t):
        return vlmkernels.perceiver_attention(*t[:-1], media_lengths=t[-1])

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, s in ((10, 30), (70, 40)):
        tensors = inputs(2, 4, 2, n, s, 6, 16, 16)
        lengths = torch.tensor([7, s])
        for got, want in zip(
            result_and_gradients(lambda *t, f=compiled, at=lengths: f(*t, at), tensors),
            result_and_gradients(lambda *t, at=lengths: step(*t, at), tensors),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


def test_autocast_casts_the_operands():
    tensors = inputs(1, 2, 2, 20, 20, 4, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = vlmkernels.perceiver_attention(*tensors)
    torch.testing.assert_close(out, vlmkernels.perceiver_attention(*(t.bfloat16() for t in tensors)))
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize(
    "shape",
    [
        (0, 2, 2, 5, 5, 4, 4, 4), (2, 0, 0, 5, 5, 3, 4, 4), (2, 2, 2, 0, 5, 3, 4, 4),
        (2, 2, 2, 5, 0, 3, 4, 4), (2, 2, 1, 5, 5, 0, 4, 4), (1, 1, 1, 5, 0, 0, 4, 4),
        (1, 1, 1, 5, 4, 3, 0, 4), (1, 1, 1, 5, 4, 3, 4, 0), (2, 4, 2, 2, 0, 0, 4, 4),
    ],
    ids=str,
)  # fmt: skip
def test_sizes_of_zero(shape):
    tensors = inputs(*shape)
    out, *grads = result_and_gradients(vlmkernels.perceiver_attention, tensors)
    assert out.shape == (*tensors[0].shape[:3], shape[-1])
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    wanted = reference.perceiver_attention(*tensors)
    torch.testing.assert_close(out, wanted)
    if shape[4] + shape[5] == 0:
        assert (out == 0).all()


@pytest.mark.parametrize("frozen", range(0, 31, 3))
def test_frozen_inputs(frozen):
    tensors = inputs(1, 2, 1, 70, 90, 10, 8, 8)
    for i, t in enumerate(tensors):
        t.requires_grad_(not frozen >> i & 1)
    assert_as_good(tensors)


def test_any_strides():
    tensors = [
        t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for t in inputs(2, 4, 2, 20, 50, 7, 16, 16)
    ]
    tensors[3] = torch.randn(1, 1, 7, 16).expand(2, 2, 7, 16).requires_grad_()
    dense = [t.detach().contiguous().requires_grad_() for t in tensors]
    for got, want in zip(
        result_and_gradients(vlmkernels.perceiver_attention, tensors),
        result_and_gradients(vlmkernels.perceiver_attention, dense),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("source", ["media", "latents"])
def test_one_source_dominates(source):
    """Logits of one source far above the other's, in either order of arrival."""
    query, mk, mv, lk, lv = inputs(1, 1, 1, 40, 70, 9, 4, 4)
    with torch.no_grad():
        (mk if source == "media" else lk).mul_(300)
    assert_as_good([query, mk, mv, lk, lv])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", ["media", "latents"])
@pytest.mark.parametrize("queries", [1, 2, 3, 70])
def test_a_key_that_is_seen_alone_has_probability_one(queries, source, dtype):
    """Exactly, also in the backward, which forms its logit again."""
    media, latents = (40, 0) if source == "media" else (40, 1)
    for width in (20, 64, 512):
        query, mk, mv, lk, lv = inputs(2, 4, 2, queries, media, latents, width, 8, dtype)
        with torch.no_grad():
            mk.mul_(8)
            lk.mul_(8)
        lengths = torch.full((2,), 1 - latents)
        out = vlmkernels.perceiver_attention(query, mk, mv, lk, lv, media_lengths=lengths)
        value = mv if source == "media" else lv
        (dvalue,) = torch.autograd.grad(out, value, torch.ones_like(out))
        assert torch.equal(out, value[:, :, :1].repeat_interleave(2, 1).expand_as(out))
        assert (dvalue[:, :, 0] == 2 * queries).all(), f"width {width}"  # two heads share each key


@pytest.mark.skipif(not NATIVE, reason="torch splits a product by the number of threads")
def test_deterministic_for_any_number_of_threads(for_thread_counts):
    tensors = inputs(1, 2, 1, 100, 900, 64, 16, 16)
    lengths = torch.tensor([700])

    def step(*t):
        return vlmkernels.perceiver_attention(*t, media_lengths=lengths)

    first, *others = for_thread_counts(lambda: result_and_gradients(step, tensors))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(not NATIVE, reason="the reference joins by design")
@pytest.mark.once
def test_memory(peak_memory):
    """Joined keys and values would take 2 x 32 MiB beside the inputs."""
    script = """
media = [torch.randn(1, 1, 131072, 64) for _ in range(2)]
latents = [torch.randn(1, 1, 64, 64) for _ in range(3)]
vlmkernels.perceiver_attention(latents[0], *(t[:, :, :300] for t in media), *latents[1:])
run = lambda: vlmkernels.perceiver_attention(latents[0], *media, *latents[1:])
"""
    assert peak_memory(script) < 8 * 2**20


def good():
    key, value = torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 3)
    return {
        "query": torch.zeros(2, 4, 5, 8), "media_key": key, "media_value": value,
        "latent_key": key[:, :, :4], "latent_value": value[:, :, :4], "media_lengths": torch.tensor([1, 2]),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(4, 5, 8)}, r"four dimensions.*query \(4, 5, 8\)"),
        ({"latent_key": torch.zeros(2, 2, 4, 7)}, "query and key must have the same width"),
        (
            {"media_value": torch.zeros(2, 2, 7, 3)},
            "media_key and media_value must have the same number of tokens",
        ),
        ({"latent_value": torch.zeros(2, 2, 4, 4)}, "values must have the same width"),
        ({"latent_key": torch.zeros(2, 4, 4, 8)}, "heads of query must be a multiple"),
        ({"media_key": torch.zeros(2, 2, 6, 8).double()}, "the same dtype"),
        ({"media_lengths": torch.zeros(3).long()}, r"media_lengths must be int32 or int64 \[B\] = \(2,\)"),
        ({"media_lengths": torch.zeros(2)}, r"got torch.float32 \(2,\)"),
    ],
)
@pytest.mark.once
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        vlmkernels.perceiver_attention(**{**good(), **change})


def test_all_faults_in_one_error():
    change = {"latent_key": torch.zeros(2, 2, 4, 7), "media_lengths": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"(?s)the same width.*media_lengths"):
        vlmkernels.perceiver_attention(**{**good(), **change})
