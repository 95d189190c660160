"""The k most similar keys: exact results where inner products are exact numbers, with many ties."""

from importlib import import_module

import numpy
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import vlmkernels
from tests.recorded import RECORDERS, recorded
from vlmkernels import reference
from vlmkernels.ops import _retrieval as stored
from vlmkernels.reference import _retrieval as plain
from vlmkernels.reference.topk_similarity import topk_similarity_fwd
from vlmkernels.testing import assert_as_good

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [
    (1, 1, 1, 1),
    (3, 50, 7, 5),
    (8, 300, 33, 10),
    (40, 1000, 64, 100),
    (130, 700, 20, 300),
    (5, 9, 4, 40),
]


def on_cuda(query, key, k, **options):
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return tuple(x.cpu() for x in vlmkernels.topk_similarity(query.cuda(), key.cuda(), k, **options))


OPS = {
    "dispatched": vlmkernels.topk_similarity,
    **({"cuda": on_cuda} if torch.cuda.is_available() else {}),
}


def integers(n, m, d, *, dtype=torch.float32):
    """Features whose products are exact in every precision: as many ties as there can be."""
    return tuple(torch.randint(-2, 3, (rows, d)).to(dtype) for rows in (n, m))


def assert_equal(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.nan_to_num(-1e30), theirs.nan_to_num(-1e30))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("both", [False, True], ids=["", "both"])
@pytest.mark.parametrize("by_value", [True, False], ids=["sorted", "by index"])
@pytest.mark.parametrize(("n", "m", "d", "k"), SIZES, ids=str)
def test_values_indices_and_ties(op, dtype, both, by_value, n, m, d, k):
    query, key = integers(n, m, d, dtype=dtype)
    options = {"both": both, "return_sorted": by_value}
    got = OPS[op](query, key, k, **options)
    assert [x.shape for x in got] == [(n, min(k, m))] * 2 + [(m, min(k, n))] * 2 * both
    assert_equal(got, reference.topk_similarity(query, key, k, **options))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_keys", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("n", [1, 3, 70])
def test_keys_of_other_dtypes(op, dtype, of_keys, n):
    query, key = integers(n, 400, 24, dtype=dtype)
    scale = 2.0 ** torch.randint(-3, 4, (400,)) if of_keys == torch.int8 else None
    got = OPS[op](query, key.to(of_keys), 20, key_scale=scale, both=True)
    assert_equal(got, reference.topk_similarity(query, key.to(of_keys), 20, key_scale=scale, both=True))
    assert got[0].dtype == (torch.float64 if torch.float64 in (dtype, of_keys) else torch.float32)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantised", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize(("n", "d"), [(1, 700), (2, 64), (7, 130), (90, 33), (3, 1)], ids=str)
def test_as_exact_as_a_product(op, dtype, quantised, normalize, n, d):
    """The values are as good as those of a product in float32, and belong to their indices."""
    query, key, scale = torch.randn(n, d).to(dtype), torch.randn(500, d).to(dtype), None
    if quantised:
        scale, key = torch.rand(500) + 0.5, torch.randint(-127, 128, (500, d), dtype=torch.int8)
    values, indices = OPS[op](query, key, 50, normalize=normalize, key_scale=scale)
    low = plain.similarities(query, key, scale, normalize)
    wide = key.double() if scale is None else key.double() * scale.double()[:, None]
    exact = plain.similarities(query.double(), wide, None, normalize)
    assert_as_good(values, low.gather(1, indices), exact.gather(1, indices))
    assert_as_good(values, low.topk(50).values, exact.topk(50).values)
    assert (values.diff(dim=1) <= 0).all()
    assert all(len(row.unique()) == 50 for row in indices)


def test_normalised_values_are_cosines():
    query, key = torch.randn(6, 30), torch.randn(50, 30)
    key[7] = 0
    values, indices = vlmkernels.topk_similarity(query, key, 50, normalize=True)
    want = F.cosine_similarity(query[:, None], key[None], dim=2).gather(1, indices)
    torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 5, 60])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_last_and_infinity_is_not(n, dtype):
    query, key = integers(n, 300, 8, dtype=dtype)
    query[:, 0], key[:, 0] = 1, 0
    key[20], key[40, 0], key[60, 0], key[250] = torch.nan, torch.inf, -torch.inf, torch.nan
    for k in (1, 5, 298, 299, 300):
        got = vlmkernels.topk_similarity(query, key, k, both=True)
        assert_equal(got, reference.topk_similarity(query, key, k, both=True))
        assert (got[1][:, 0] == 40).all()
    assert got[1][0, 297:].tolist() == [60, 20, 250]
    query[n // 2] = torch.nan
    got = vlmkernels.topk_similarity(query, key, 4, both=True)
    assert got[1][n // 2].tolist() == [0, 1, 2, 3]
    assert_equal(got, reference.topk_similarity(query, key, 4, both=True))


@pytest.mark.parametrize("n", [1, 9, 65])
def test_keys_in_the_worst_order_and_all_equal(n):
    """Every key is better than those before; then none is."""
    query = torch.ones(n, 1)
    for key in (torch.arange(3000.0), -torch.arange(3000.0), torch.zeros(3000)):
        for k in (1, 7, 2048):
            got = vlmkernels.topk_similarity(query, key[:, None], k)
            order = key.argsort(descending=True, stable=True)[:k]
            assert_equal(got, (key[order].expand(n, k), order.expand(n, k)))


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (0, 0, 3), (4, 5, 0), (0, 5, 0)], ids=str)
@pytest.mark.parametrize("quantised", [False, True])
def test_empty(shape, quantised):
    n, m, d = shape
    query, key = torch.randn(n, d), torch.randn(m, d)
    scale = torch.ones(m) if quantised else None
    key = key.char() if quantised else key
    for normalize in (False, True):
        options = {"key_scale": scale, "both": True, "normalize": normalize}
        got = vlmkernels.topk_similarity(query, key, 3, **options)
        assert_equal(got, reference.topk_similarity(query, key, 3, **options))


@pytest.mark.parametrize("n", [2, 40])
def test_views(n):
    query, key = integers(2 * n, 600, 40)
    for q, k in (
        (query[::2, ::2], key[::3, ::2]),
        (query.T.contiguous().T[:n], key.T.contiguous().T),
        (query[:1].expand(n, 40), key[:1].expand(300, 40)),
    ):
        want = reference.topk_similarity(q.contiguous(), k.contiguous(), 9, both=True)
        assert_equal(vlmkernels.topk_similarity(q, k, 9, both=True), want)
    scale = torch.tensor(2.0).expand(600)
    got = vlmkernels.topk_similarity(query[:, ::2], key.char()[:, ::2], 9, key_scale=scale)
    assert_equal(got, reference.topk_similarity(query[:, ::2], 2 * key[:, ::2], 9))


def files(key, folder):
    """The same keys as an array, a memmap, and slices of safetensors files."""
    yield "array", key.numpy()
    yield "view", numpy.asfortranarray(key.numpy())
    yield "other byte order", key.numpy().astype(key.numpy().dtype.newbyteorder(">"))
    path = folder / "keys.npy"
    numpy.save(path, key.numpy())
    yield "memmap", numpy.load(path, mmap_mode="r")
    save_file({"keys": key.contiguous()}, folder / "keys.safetensors")
    for framework in ("pt", "np"):
        with safe_open(folder / "keys.safetensors", framework) as file:
            yield framework, file.get_slice("keys")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int8], ids=str)
def test_keys_in_files(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "BLOCK_BYTES", 64 * 20 * dtype.itemsize)
    query, key = integers(6, 1000, 20)
    key = key.to(dtype)
    scale = 2.0 ** torch.randint(-2, 3, (1000,)) if dtype == torch.int8 else None
    for options in ({}, {"both": True}, {"return_sorted": False, "normalize": True}):
        want = vlmkernels.topk_similarity(query, key, 7, key_scale=scale, **options)
        for name, keys in files(key, tmp_path):
            got = vlmkernels.topk_similarity(query, keys, 7, key_scale=scale, **options)
            if options.get("normalize"):
                assert torch.allclose(got[0], want[0]), name
            else:
                assert_equal(got, want)


def test_bfloat16_in_a_safetensors_file(tmp_path):
    query, key = integers(3, 90, 8)
    save_file({"keys": key.bfloat16()}, tmp_path / "keys.safetensors")
    with safe_open(tmp_path / "keys.safetensors", "pt") as file:
        got = vlmkernels.topk_similarity(query, file.get_slice("keys"), 5)
    assert_equal(got, reference.topk_similarity(query, key, 5))


def test_a_file_without_rows(tmp_path):
    save_file({"keys": torch.zeros(0, 8)}, tmp_path / "keys.safetensors")
    for both in (False, True):
        want = vlmkernels.topk_similarity(torch.ones(2, 8), torch.zeros(0, 8), 3, both=both)
        got = vlmkernels.topk_similarity(torch.ones(2, 8), numpy.zeros((0, 8), numpy.float32), 3, both=both)
        assert_equal(got, want)
        with safe_open(tmp_path / "keys.safetensors", "pt") as file:
            got = vlmkernels.topk_similarity(torch.ones(2, 8), file.get_slice("keys"), 3, both=both)
        assert_equal(got, want)


def quantise(key):
    scale = key.abs().amax(1) / 127
    return (key / scale[:, None]).round().to(torch.int8), scale


@pytest.mark.parametrize("normalize", [False, True])
def test_rescored_from_the_full_keys(normalize, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("vlmkernels.ops.topk_similarity"), "RESCORED", 1000)
    query, key = torch.randn(9, 60), torch.randn(800, 60)
    small, scale = quantise(key)
    exact = vlmkernels.topk_similarity(query, key, 10, normalize=normalize)
    alone = vlmkernels.topk_similarity(query, small, 10, key_scale=scale, normalize=normalize)
    assert not torch.equal(alone[1], exact[1])
    options = {"key_scale": scale, "normalize": normalize}
    for by_value in (True, False):
        for name, full in (("tensor", key), *files(key, tmp_path)):
            got = vlmkernels.topk_similarity(
                query, small, 10, rescore=full, return_sorted=by_value, **options
            )
            want = reference.topk_similarity(query, key, 10, normalize=normalize, return_sorted=by_value)
            assert torch.equal(got[1], want[1]), name
            torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)


def test_rescoring_is_that_of_four_times_as_many():
    """Keys of one number, by another one: what is not among the candidates is not found."""
    query, key = torch.ones(1, 1), torch.arange(100.0)[:, None]
    values, indices = vlmkernels.topk_similarity(query, key, 2, rescore=-key)
    assert values.tolist() == [[-92.0, -93.0]]
    assert indices.tolist() == [[92, 93]]
    values, indices = vlmkernels.topk_similarity(query, key.zero_(), 3, rescore=torch.zeros(100, 1))
    assert indices.tolist() == [[0, 1, 2]]


def test_the_reference_in_blocks_is_the_definition(monkeypatch):
    module = import_module("vlmkernels.reference.topk_similarity")
    monkeypatch.setattr(module, "ROWS", 7)
    monkeypatch.setattr(module, "COLS", 11)
    query, key = integers(20, 60, 6)
    key[13], key[30] = torch.nan, torch.nan
    for k in (1, 5, 30, 60):
        for by_value in (True, False):
            want = reference.topk_similarity(query, key, k, both=True, return_sorted=by_value)
            assert_equal(topk_similarity_fwd(query, key, None, k, False, by_value, True), want)


def test_no_gradient_and_no_change_by_autocast():
    query, key = torch.randn(5, 40, requires_grad=True), torch.randn(60, 40, requires_grad=True)
    values, indices = vlmkernels.topk_similarity(query, key, 5)
    assert not values.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(vlmkernels.topk_similarity(query, key, 5), (values, indices))


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.once
def test_registration(permuted, both):
    query, key = torch.randn(4, 6), torch.randn(9, 6)
    if permuted:
        query, key = (x.T.contiguous().T for x in (query, key))
    op = torch.ops.vlmkernels.topk_similarity.default
    for by_value in (True, False):
        torch.library.opcheck(op, (query.requires_grad_(), key, None, 3, True, by_value, both))
    scale = torch.rand(9)
    torch.library.opcheck(op, (query.detach(), (9 * key).char(), scale, 30, False, True, both))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(query, key):
        return vlmkernels.topk_similarity(query, key, 5, both=True)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((5, 16, 8), (9, 33, 4), (3, 4, 4)):
        query, key = integers(*shape)
        assert_equal(compiled(query, key), step(query, key))


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.once
def test_recorded(recorder):
    class Search(torch.nn.Module):
        def forward(self, query, key):
            return vlmkernels.topk_similarity(query, key, 4)

    rows, others = torch.export.Dim("rows", min=2), torch.export.Dim("others", min=2)
    search = recorded(recorder, Search(), integers(6, 20, 9), [{0: rows}, {0: others}])
    for m in (50, 3):
        query, key = integers(40, m, 9)
        assert_equal(search(query, key), Search()(query, key))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(4, 3)}, r"query must be \[N, D\] and key \[M, D\]"),
        ({"k": 0}, r"k must be in \[1, 2\*\*31\), got 0"),
        ({"query": torch.zeros(2, 2).long()}, "query must be float32, .*, got torch.int64"),
        ({"key": torch.zeros(4, 2).char()}, "int8 with key_scale, got torch.int8 without key_scale"),
        ({"key_scale": torch.ones(4)}, "key_scale must be None unless the keys are int8"),
        ({"key": torch.zeros(4, 2).char(), "key_scale": torch.ones(3)}, r"key_scale must be .*\(4,\)"),
    ],
    ids=str,
)
def test_the_raw_reference_refuses(change, message):
    good = {"query": torch.zeros(2, 2), "key": torch.zeros(4, 2), "key_scale": None, "k": 3}
    options = (False, True, False)
    topk_similarity_fwd(*good.values(), *options)
    with pytest.raises(ValueError, match=f"topk_similarity: .*{message}"):
        topk_similarity_fwd(*(good | change).values(), *options)


BAD = [
    ({"key": torch.zeros(4, 3)}, "query must be [Q, D] and key [M, D], got query (2, 2) and key (4, 3)"),
    ({"query": torch.zeros(2)}, "query must be [Q, D] and key [M, D], got query (2,)"),
    ({"key": numpy.zeros((4, 3), numpy.float32)}, "key [M, D], got query (2, 2) and key (4, 3)"),
    ({"key": numpy.zeros((4, 2), numpy.int64)}, "key must be stored as float64, float32, float16, int8"),
    ({"k": 0}, "k must be in [1, 2**31), got 0"),
    ({"key": torch.zeros(4, 2).char()}, "or int8 with key_scale, got torch.int8 without key_scale"),
    ({"key_scale": torch.ones(4)}, "key_scale must be None unless the keys are int8"),
    ({"rescore": torch.ones(3, 2)}, "rescore must have the shape of key, got (3, 2) and (4, 2)"),
    ({"rescore": torch.ones(4, 2).long()}, "rescore must be float32"),
    ({"rescore": torch.ones(4, 2), "both": True}, "rescore must be None with both=True"),
    ({"key": torch.zeros(4, 2, device="meta")}, "must be on the same device"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
@pytest.mark.once
def test_bad_input(change, message):
    good = {"query": torch.zeros(2, 2), "key": torch.zeros(4, 2), "k": 3}
    vlmkernels.topk_similarity(**good)
    with pytest.raises(ValueError, match="topk_similarity: ") as error:
        vlmkernels.topk_similarity(**good | change)
    assert message in str(error.value)


def test_all_faults_in_one_error():
    with pytest.raises(ValueError, match=r"(?s)key \[M, D\].*query must.*key_scale.*k must.*rescore"):
        vlmkernels.topk_similarity(
            torch.zeros(3, 4).long(), torch.zeros(3, 5), 0, key_scale=torch.zeros(1), rescore=torch.zeros(1)
        )


def test_keys_of_another_kind():
    with pytest.raises(TypeError, match="key must be dense Tensor or ndarray or SafetensorsSlice, got list"):
        vlmkernels.topk_similarity(torch.zeros(2, 2), [[1.0, 2.0]], 1)
