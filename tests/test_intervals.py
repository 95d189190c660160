import pytest
import torch

from vlmkernels import intervals


def mask(bounds, keys):
    start, end = bounds
    assert start.dtype == end.dtype == torch.int32
    assert start.shape == end.shape
    j = torch.arange(keys)
    return (j >= start[..., None]) & (j < end[..., None])


def test_causal():
    assert torch.equal(mask(intervals.causal(5), 5), torch.ones(5, 5).tril().bool())
    assert torch.equal(mask(intervals.causal(2, 3), 5), torch.ones(5, 5).tril().bool()[3:])


def test_runs_of_a_mask():
    rows = [[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    seen = torch.tensor(rows).bool()
    start, end = intervals.runs(seen)
    assert torch.equal(mask((start, end), 4), seen)
    assert intervals.are_runs(seen, start, end)
    whole = intervals.runs(seen[None])
    assert [x.tolist() for x in whole] == [[start.tolist()], [end.tolist()]]


@pytest.mark.parametrize("row", [[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 1]])
def test_a_mask_with_holes_is_no_run(row):
    seen = torch.tensor([[1, 1, 0, 0], row]).bool()
    assert not intervals.are_runs(seen, *intervals.runs(seen))


def test_full():
    assert mask(intervals.full(3), 3).all()
    assert torch.equal(mask(intervals.full(2, 4), 6), (torch.arange(6) < 4).expand(2, 6))


@pytest.mark.parametrize("offset", [0, 2])
def test_prefix_lm(offset):
    i, j = torch.arange(6)[:, None] + offset, torch.arange(9)
    for length in (0, 1, 4, 9):
        assert torch.equal(mask(intervals.prefix_lm(length, 6, offset), 9), (j < length) | (j <= i))
    lengths = torch.tensor([0, 4, 9])
    got = mask(intervals.prefix_lm(lengths, 6, offset), 9)
    assert torch.equal(got, (j < lengths[:, None, None]) | (j <= i))


def test_prefix_of_nothing_is_causal():
    for got, want in zip(intervals.prefix_lm(0, 7), intervals.causal(7), strict=True):
        assert torch.equal(got, want)


def test_padding():
    lengths = torch.tensor([3, 0, 5])
    got = mask(intervals.padding(lengths, 4), 5)
    assert torch.equal(got, (torch.arange(5) < lengths[:, None, None]).expand(3, 4, 5))


@pytest.mark.parametrize("causal", [True, False])
def test_packed(causal):
    document = torch.tensor([0, 0, 0, 1, 3, 3, -1, -1])  # document 2 has no tokens, two rows belong to none
    i, j = torch.arange(8)[:, None], torch.arange(8)
    wanted = (document[:, None] == document) & (document[:, None] >= 0)
    got = mask(intervals.packed(torch.tensor([0, 3, 4, 4, 6]), 8, causal=causal), 8)
    assert torch.equal(got, wanted & (j <= i) if causal else wanted)


@pytest.mark.parametrize("attend", ["immediate", "all_previous"])
@pytest.mark.parametrize("count", [3, torch.tensor([3, 1])], ids=["shared", "ragged"])
def test_media(attend, count):
    locations = torch.tensor([[0, 1, 0, 1, 1, 0, 1], [1, 0, 0, 1, 0, 0, 0]]).bool()
    time = intervals.text_time(locations)
    assert time.tolist() == [[0, 1, 1, 2, 3, 3, 4], [1, 1, 1, 2, 2, 2, 2]]
    got = mask(intervals.media(time, 2, count, attend=attend), 6)
    image = torch.arange(6) // 2 + 1
    there = image <= (count[:, None, None] if isinstance(count, torch.Tensor) else count)
    seen = image == time[..., None] if attend == "immediate" else image <= time[..., None]
    assert torch.equal(got, seen & there)


def test_media_refuses_another_rule():
    with pytest.raises(ValueError, match="attend must be 'immediate' or 'all_previous', got 'next'"):
        intervals.media(torch.zeros(1, 2), 1, 1, attend="next")


@pytest.mark.parametrize("length", [2**31, 2**40 + 1, 2**63 - 1])
def test_lengths_beyond_int32_are_longer_than_any_sequence(length):
    time = torch.tensor([[0, 1, 2]])
    for count in (torch.tensor([length]), torch.tensor(length)):
        assert mask(intervals.prefix_lm(count, 3), 5).all()
        assert torch.equal(
            mask(intervals.media(time, 2, count), 6)[0], mask(intervals.media(time, 2, 3), 6)[0]
        )
    assert mask(intervals.padding(torch.tensor([length]), 3), 5).all()
    assert mask(intervals.packed(torch.tensor([0, length]), 3, causal=False), 3).all()


def test_lengths_are_integers():
    ints, floats = torch.ones(2, dtype=torch.int64), torch.ones(2)
    for build, name in (
        (lambda: intervals.prefix_lm(floats, 3), "prefix_lm: prefix_len"),
        (lambda: intervals.padding(floats, 3), "padding: lengths"),
        (lambda: intervals.packed(floats, 3), "packed: cu_seqlens"),
        (lambda: intervals.media(floats[:, None], 2, 1), "media: text_time"),
        (lambda: intervals.media(ints[:, None], 2, floats), "media: num_media"),
    ):
        with pytest.raises(ValueError, match=f"{name} must contain integers, got torch.float32"):
            build()


@pytest.mark.parametrize("shape", [(0,), (1, 2), ()])
def test_packed_wants_a_list_of_bounds(shape):
    with pytest.raises(ValueError, match=r"cu_seqlens must be \[documents \+ 1\]"):
        intervals.packed(torch.zeros(shape, dtype=torch.int32), 3)


@pytest.mark.parametrize(
    "bounds",
    [
        intervals.causal(9, 4),
        intervals.prefix_lm(torch.tensor([0, 3, 20]), 9),
        intervals.packed(torch.tensor([0, 4, 4, 7]), 9),
        intervals.packed(torch.tensor([0, 4, 4, 7]), 9, causal=False),
        intervals.media(intervals.text_time(torch.rand(4, 30) < 0.3), 3, torch.tensor([0, 1, 4, 30])),
    ],
)
def test_builders_are_monotone(bounds):
    for bound in bounds:
        assert (bound.diff(dim=-1) >= 0).all()


def test_builders_never_wait_for_the_device():
    """On the meta device a value cannot be read."""
    lengths = torch.empty(3, dtype=torch.int64, device="meta")
    locations = torch.empty(3, 7, dtype=torch.bool, device="meta")
    built = [
        intervals.causal(7, device="meta"),
        intervals.prefix_lm(lengths, 7),
        intervals.prefix_lm(3, 7, device="meta"),
        intervals.padding(lengths, 7),
        intervals.packed(lengths, 7),
        intervals.media(intervals.text_time(locations), 2, lengths),
        intervals.media(intervals.text_time(locations), 2, 3, attend="all_previous"),
    ]
    assert all(bound.device.type == "meta" for bounds in built for bound in bounds)
