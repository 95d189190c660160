import pytest
import torch

import vlmkernels
from benchmarks import peers
from vlmkernels import reference

NATIVE = vlmkernels.info()["ops"]["nms"]["CPU"] != "reference"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IMPLEMENTATIONS = {"dispatched": vlmkernels.nms, "reference": reference.nms}
if torch.cuda.is_available():

    def on_cuda(boxes, scores, iou_threshold, groups=None):
        groups = None if groups is None else groups.cuda()
        return vlmkernels.nms(boxes.cuda(), scores.cuda(), iou_threshold, groups=groups).cpu()

    IMPLEMENTATIONS["cuda"] = on_cuda
every = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def inputs(n, dtype=torch.float32, objects=20):
    """Boxes around some objects, of which many overlap."""
    corners = 100 * torch.rand(objects, 2)
    at = corners[torch.randint(objects, (n,))] + 6 * torch.randn(n, 2)
    boxes = torch.cat([at, at + 10 + 30 * torch.rand(n, 2)], 1)
    return boxes.to(dtype), torch.randn(n).to(dtype)


def by_definition(boxes, scores, iou_threshold, groups=None):
    """One pair at a time, in the arithmetic of numbers of the boxes' precision."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32)).numpy()
    order = sorted(range(len(scores)), key=lambda i: (scores[i].isnan().item(), -scores[i].item(), i))
    kept: list[int] = []
    for i in order:
        for j in kept:
            a, b = boxes[j], boxes[i]
            x, y = (max(min(a[k + 2], b[k + 2]) - max(a[k], b[k]), 0 * a[k]) for k in (0, 1))
            areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
            union = areas[0] + areas[1] - x * y
            same = groups is None or groups[i] == groups[j]
            if same and union != 0 and float(x * y / union) > iou_threshold:
                break
        else:
            kept.append(i)
    return kept


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 37, 90])
def test_boxes_that_stay(impl, dtype, n):
    boxes, scores = inputs(n, dtype)
    for threshold in (0.3, 0.7) if n > 1 else (0.0, 1.0):
        got = IMPLEMENTATIONS[impl](boxes, scores, threshold)
        assert got.dtype == torch.int64
        assert got.tolist() == by_definition(boxes, scores, threshold)


@every
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_boxes_of_other_groups_do_not_count(impl, dtype):
    boxes, scores = inputs(90, objects=4)
    groups = torch.randint(-2, 3, (90,)).to(dtype) * 2**30
    got = IMPLEMENTATIONS[impl](boxes, scores, 0.4, groups=groups)
    assert got.tolist() == by_definition(boxes, scores, 0.4, groups)
    alone = [(groups == group).nonzero().flatten() for group in groups.unique()]
    parts = [own[IMPLEMENTATIONS[impl](boxes[own], scores[own], 0.4)] for own in alone]
    assert sorted(got.tolist()) == sorted(torch.cat(parts).tolist())


@pytest.mark.skipif(not NATIVE, reason="compares the kernel with the reference")
@pytest.mark.parametrize("groups", [1, 2, 40])
def test_many_boxes(groups):
    """Several blocks of boxes, which are compared with those that stayed before."""
    boxes, scores = inputs(1100, objects=100)
    of = torch.randint(groups, (1100,))
    got = vlmkernels.nms(boxes, scores, 0.6, groups=of)
    assert torch.equal(got, reference.nms(boxes, scores, 0.6, groups=of))
    assert len(got) > 256


@pytest.mark.skipif(peers.why_not("torchvision") is not None, reason="torchvision is not installed")
def test_torchvisions_operator():
    torchvision = peers.load("torchvision")
    if not torchvision.extension._has_ops():
        pytest.skip("torchvision's extension does not load beside this torch")
    for dtype in (torch.float32, torch.float64):
        boxes, scores = inputs(2000, dtype, objects=100)
        classes = torch.randint(5, (2000,))
        for threshold in (0.1, 0.5, 0.7):
            got = vlmkernels.nms(boxes, scores, threshold)
            assert torch.equal(got, torchvision.ops.nms(boxes, scores, threshold))
            got = vlmkernels.nms(boxes, scores, threshold, groups=classes)
            batched = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, classes, threshold)
            assert torch.equal(got, batched)


@every
def test_ties_and_scores_that_are_not_numbers(impl):
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(6, 1) + 20 * torch.arange(6)[:, None]
    scores = torch.tensor([nan, 0.0, inf, -0.0, -inf, 0.0])
    assert IMPLEMENTATIONS[impl](boxes, scores, 0.5).tolist() == [2, 1, 3, 5, 4, 0]
    assert IMPLEMENTATIONS[impl](boxes[:1].repeat(6, 1), scores, 0.5).tolist() == [2]
    assert IMPLEMENTATIONS[impl](boxes[:1].repeat(40, 1), torch.ones(40), 0.5).tolist() == [0]


@every
def test_the_threshold_itself_is_not_above_it(impl):
    """IoU is 1/2 and 0.1 rounded up to float32, of which the latter is above the number 0.1."""
    halves = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]])
    tenths = torch.tensor([[0.0, 0, 10, 1], [0, 0, 1, 1]])
    scores = torch.tensor([1.0, 0.5])
    assert IMPLEMENTATIONS[impl](halves, scores, 0.5).tolist() == [0, 1]
    assert IMPLEMENTATIONS[impl](halves, scores, 0.49999999).tolist() == [0]
    assert IMPLEMENTATIONS[impl](tenths, scores, 0.1).tolist() == [0]
    assert IMPLEMENTATIONS[impl](tenths, scores, 0.100000002).tolist() == [0, 1]
    assert IMPLEMENTATIONS[impl](tenths.double(), scores, 0.1).tolist() == [0, 1]


@every
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_boxes_that_are_not_boxes(impl):
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor(
        [
            [0.0, 0, 10, 10], [nan, 0, 10, 10], [0, nan, 10, 10], [0, 0, nan, 10], [0, 0, 10, nan],
            [5, 5, 5, 5], [5, 5, 5, 5], [-inf, -inf, inf, inf], [inf, inf, inf, inf], [8, 8, 2, 2],
            [0, 0, inf, 10],
        ]
    )  # fmt: skip
    scores = -torch.arange(len(boxes)).float()
    got = IMPLEMENTATIONS[impl](boxes, scores, 0.0)
    assert got.tolist() == by_definition(boxes, scores, 0.0)
    assert {1, 2, 3, 4, 5, 6} <= set(got.tolist())
    assert IMPLEMENTATIONS[impl](boxes.flip(0), scores, 0.0).tolist() == by_definition(
        boxes.flip(0), scores, 0.0
    )


@every
def test_empty(impl):
    none = IMPLEMENTATIONS[impl](
        torch.zeros(0, 4), torch.zeros(0), 0.5, groups=torch.zeros(0, dtype=torch.int64)
    )
    assert none.shape == (0,)
    assert none.dtype == torch.int64


@pytest.mark.once
def test_registration():
    boxes, scores = inputs(50)
    groups = torch.randint(3, (50,))
    op = torch.ops.vlmkernels.nms.default
    for tensors in ((boxes, scores, None), (boxes.T.contiguous().T, scores, groups)):
        torch.library.opcheck(op, (*tensors, 0.5))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    compiled = torch.compile(
        lambda boxes, scores: boxes[vlmkernels.nms(boxes, scores, 0.5)] * 2,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for n in (9, 40):
        boxes, scores = inputs(n, objects=3)
        assert torch.equal(compiled(boxes, scores), 2 * boxes[vlmkernels.nms(boxes, scores, 0.5)])


def test_views_and_dtypes_that_differ():
    boxes, scores = inputs(200)
    want = vlmkernels.nms(boxes, scores, 0.5)
    wide = torch.stack([boxes, boxes], 2)
    assert torch.equal(vlmkernels.nms(wide[..., 1], torch.stack([scores, scores], 1)[:, 0], 0.5), want)
    assert torch.equal(vlmkernels.nms(boxes, scores.double(), 0.5), want)
    same = torch.zeros((), dtype=torch.int32).expand(200)
    assert torch.equal(
        vlmkernels.nms(boxes.requires_grad_(), scores.requires_grad_(), 0.5, groups=same), want
    )


def test_deterministic_for_any_number_of_threads(for_thread_counts):
    boxes, scores = inputs(2000, objects=200)
    first, *others = for_thread_counts(lambda: vlmkernels.nms(boxes, scores, 0.6))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.skipif(not NATIVE, reason="the reference has one thread")
@pytest.mark.once
def test_large_op_uses_more_than_one_thread(busy_threads):
    boxes, scores = torch.rand(10_000, 4), torch.rand(10_000)
    boxes[:, 2:] += boxes[:, :2]
    assert busy_threads(lambda: vlmkernels.nms(1000 * boxes, scores, 0.9)) >= 2


@pytest.mark.skipif(not NATIVE, reason="the reference has temporaries")
@pytest.mark.once
def test_memory_grows_with_the_boxes(peak_memory):
    """A matrix of the pairs would have 100 MB, one of bits 12."""
    script = """
boxes, scores = 1000 * torch.rand(10_000, 4), torch.rand(10_000)
boxes[:, 2:] = boxes[:, :2] + 100
def run():
    vlmkernels.nms(boxes, scores, 0.3)
"""
    assert peak_memory(script) < 4 * 2**20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(3, 5)}, r"boxes must be \[N, 4\], got \(3, 5\)"),
        ({"boxes": torch.zeros(4)}, r"boxes must be \[N, 4\], got \(4,\)"),
        ({"scores": torch.zeros(2)}, r"scores must be \[N\].*\(3, 4\), got \(2,\)"),
        ({"scores": torch.zeros(3, 1)}, r"scores must be \[N\].*got \(3, 1\)"),
        ({"groups": torch.zeros(3)}, r"groups must be int32 or int64 \[N\].*got torch.float32 \(3,\)"),
        ({"groups": torch.zeros(2, dtype=torch.int64)}, r"groups must be .*got torch.int64 \(2,\)"),
        ({"iou_threshold": -0.1}, r"iou_threshold must be in \[0, 1\], got -0.1"),
        ({"iou_threshold": float("nan")}, r"iou_threshold must be in \[0, 1\], got nan"),
        ({"boxes": torch.zeros(3, 4, dtype=torch.int64)}, r"float16, got boxes torch.int64"),
    ],
)
@pytest.mark.once
def test_bad_input(change, message):
    good = {"boxes": torch.zeros(3, 4), "scores": torch.zeros(3), "iou_threshold": 0.5}
    with pytest.raises(ValueError, match=message):
        vlmkernels.nms(**{**good, **change})


def test_all_faults_in_one_error():
    with pytest.raises(ValueError, match=r"(?s)nms: boxes.*scores.*groups.*iou_threshold"):
        vlmkernels.nms(torch.zeros(3), torch.zeros(2), 2.0, groups=torch.zeros(1))
