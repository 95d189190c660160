import copy
import pickle

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from vlmkernels import _providers, interval_attention, intervals


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


LENGTHS, LOCATIONS = torch.tensor([2, 0]), torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()
BUILT = {
    "full": (lambda: intervals.full(5, 7), {"keys": 7}),
    "causal": (lambda: intervals.causal(5, 2), {"offset": 2}),
    "prefix_lm": (lambda: intervals.prefix_lm(LENGTHS, 5), {"prefix_len": LENGTHS, "offset": 0}),
    "padding": (lambda: intervals.padding(LENGTHS, 5), {"lengths": LENGTHS}),
    "packed": (lambda: intervals.packed(LENGTHS, 5), {"cu_seqlens": LENGTHS, "causal": True}),
    "media": (
        lambda: intervals.media(intervals.text_time(LOCATIONS), 3, 2),
        {"tokens_per_media": 3, "num_media": 2, "attend": "immediate"},
    ),
    "runs": (lambda: intervals.runs(LOCATIONS), {}),
    "bounds": (lambda: intervals.Intervals(LENGTHS, LENGTHS), {}),
}


@pytest.mark.parametrize("builder", BUILT)
def test_intervals_unpack_and_know_how_they_were_made(builder):
    build, given = BUILT[builder]
    made = build()
    start, end = made
    assert start is made.start is made[0]
    assert end is made.end is made[-1]
    assert len(made) == 2
    assert made.made_by == builder
    assert {name: made.given[name] for name in given} == given
    assert made.ends is None  # on a CPU nothing takes segments


def same(a, b):
    assert a.made_by == b.made_by
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("builder", BUILT)
def test_intervals_are_copied_pickled_and_mapped(builder):
    made = BUILT[builder][0]()
    for copy_of in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        same(copy_of(made), made)
    moved = tree_map(lambda x: x + 1 if isinstance(x, torch.Tensor) and x.dtype != torch.bool else x, made)
    assert isinstance(moved, intervals.Intervals)
    assert torch.equal(moved.start, made.start + 1)


def build_and_use(x, seen):
    start, end = intervals.causal(x.shape[0], 1)
    own = intervals.packed(seen.end.new_tensor([0, 2]), x.shape[0], causal=False)
    offset = seen.given["offset"] if seen.made_by == "causal" else 0
    return x + start + end + seen[1] + offset + sum(own), own


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_compiled_functions_take_and_return_intervals(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(build_and_use, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length, offset in ((4, 0), (6, 0), (6, 3)):
        x, seen = torch.randn(length), intervals.causal(length, offset)
        (got, own), (wanted, expected) = compiled(x, seen), build_and_use(x, seen)
        assert torch.equal(got, wanted)
        assert isinstance(own, intervals.Intervals)
        same(own, expected)


class Attends(torch.nn.Module):
    def forward(self, x, seen):  # [B, H, T, D]
        return interval_attention(x, x, x, seen) + interval_attention(x, x, x, intervals.causal(x.shape[2]))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("builder", ["causal", "packed", "bounds"])
def test_exported_programs_take_intervals_and_can_be_saved(strict, builder, tmp_path):
    def build(t):
        bounds = torch.tensor([0, 1, t - 1])
        return {
            "causal": intervals.causal(t),
            "packed": intervals.packed(bounds, t),
            "bounds": intervals.Intervals(torch.zeros(t, dtype=torch.int64), torch.full((t,), t - 1)),
        }[builder]

    length = torch.export.Dim("length", min=3, max=64)
    x = torch.randn(1, 2, 5, 4)
    sizes = {  # of what is in one, those of its lengths
        "causal": [{0: length}, {0: length}, None, {"offset": None}],
        "packed": [{0: length}, {0: length}, None, {"cu_seqlens": None, "causal": None}],
        "bounds": [{0: length}, {0: length}, None, {}],
    }[builder]
    program = torch.export.export(
        Attends(), (x, build(5)), strict=strict, dynamic_shapes=({2: length}, sizes)
    )
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for t in (5, 9):
        x = torch.randn(1, 2, t, 4)
        assert torch.equal(loaded(x, build(t)), Attends()(x, build(t)))


class TestSegments:
    """What attention within segments needs, where something takes it."""

    @pytest.fixture(autouse=True)
    def taken(self, monkeypatch):
        monkeypatch.setattr(_providers, "SEGMENTS", True)
        monkeypatch.setattr(_providers, "may_run_on", lambda x: True)

    def seen(self, made, rows, queries, keys):
        """The mask of the segments, and that they hold every query and every key once."""
        query_ends, key_ends = made.ends
        assert query_ends.dtype == key_ends.dtype == torch.int32
        assert query_ends.shape == key_ends.shape
        assert (query_ends[0], key_ends[0]) == (0, 0)
        assert (query_ends[-1], key_ends[-1]) == (rows * queries, rows * keys)
        found = torch.zeros(rows * queries, rows * keys, dtype=torch.bool)
        for i in range(len(query_ends) - 1):
            (top, bottom), (left, right) = query_ends[i : i + 2], key_ends[i : i + 2]
            found[top:bottom, left:right] = True
        blocks = found.view(rows, queries, rows, keys)
        others = ~torch.eye(rows, dtype=torch.bool)
        assert not blocks.transpose(1, 2)[others].any()
        return torch.stack([blocks[row, :, row] for row in range(rows)])

    @pytest.mark.parametrize("bounds", [[0, 3, 4, 4, 6], [0, 8], [2, 5], [0, 3, 40], [0], [9, 12], [0, 0, 0]])
    def test_documents(self, bounds):
        made = intervals.packed(torch.tensor(bounds), 8, causal=False)
        assert torch.equal(self.seen(made, 1, 8, 8)[0], mask(made, 8))

    @pytest.mark.parametrize("images", [0, 1, 3, 6])
    @pytest.mark.parametrize(
        "times", [[[0, 0, 1, 1, 2, 5]], [[1, 1, 1, 1, 1, 1], [0, 2, 2, 3, 4, 4], [7] * 6]]
    )
    def test_images(self, images, times):
        made = intervals.media(torch.tensor(times), 2, images)
        assert torch.equal(self.seen(made, len(times), 6, 2 * images), mask(made, 2 * images))

    def test_negative_times_come_before_all_images(self):
        made = intervals.media(torch.tensor([[-2, 0, 1], [-1, -1, -1]]), 2, 1)
        assert torch.equal(self.seen(made, 2, 3, 2), mask(made, 2))

    def test_times_that_decrease_are_an_error(self):
        with pytest.raises(RuntimeError, match="media: text_time decreases along a row"):
            intervals.media(torch.tensor([[0, 1, 1], [1, 2, 1]]), 2, 3)

    def test_other_masks_have_none(self):
        assert intervals.media(torch.zeros(1, 3).int(), 2, 3, attend="all_previous").ends is None
        assert intervals.media(torch.zeros(1, 3).int(), 2, torch.tensor([3])).ends is None
        assert intervals.padding(torch.tensor([3]), 4).ends is None
        assert intervals.media(torch.zeros(1, 3).int(), 2, 10**6).ends is None

    def test_they_never_wait_for_the_device(self):
        lengths = torch.empty(3, dtype=torch.int64, device="meta")
        locations = torch.empty(3, 7, dtype=torch.bool, device="meta")
        built = intervals.packed(lengths, 7), intervals.media(intervals.text_time(locations), 2, 3)
        assert all(ends.device.type == "meta" for made in built for ends in made.ends)

    def test_they_are_compiled(self):
        def both(bounds, time):
            packed = intervals.packed(bounds, time.shape[1])
            return packed.ends, intervals.media(time, 2, bounds.shape[0]).ends

        torch._dynamo.reset()
        compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
        for bounds, time in (([0, 3, 5], [[0, 1, 2, 2, 3]]), ([0, 6], [[1, 1, 1, 4, 5, 5], [0] * 6])):
            given = torch.tensor(bounds), torch.tensor(time)
            for got, wanted in zip(tree_leaves(compiled(*given)), tree_leaves(both(*given)), strict=True):
                assert torch.equal(got, wanted)
