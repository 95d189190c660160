import math

import pytest
import torch
from torch import Tensor

import vlmkernels
from benchmarks import peers
from vlmkernels import reference
from vlmkernels.testing import assert_op_as_good, result_and_gradients

NATIVE = vlmkernels.info()["ops"]["roi_align"]["CPU"] != "reference"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IMPLEMENTATIONS = {"dispatched": vlmkernels.roi_align, "reference": reference.roi_align}
if torch.cuda.is_available():
    IMPLEMENTATIONS["cuda"] = lambda features, boxes, size, **options: vlmkernels.roi_align(
        features.cuda(), boxes.cuda(), size, **options
    ).cpu()
every = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
OPTIONS = [
    {},
    {"sampling_ratio": 2},
    {"aligned": False, "spatial_scale": 0.25},
    {"aligned": False, "sampling_ratio": 3, "spatial_scale": 0.5},
]
with_options = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))


def inputs(batch=2, channels=3, height=11, width=19, boxes=9, dtype=torch.float32, scale=1.0):
    """Boxes within the picture, beyond its edges, outside, empty, and with corners in the wrong order."""
    corners = torch.rand(boxes, 4) * torch.tensor([width, height, width, height]) * 1.6 - 3
    corners = torch.cat([corners[:, :2].minimum(corners[:, 2:]), corners[:, :2].maximum(corners[:, 2:])], 1)
    extra = torch.tensor(
        [
            [-90.0, -90, -60, -70],
            [5, 5, 5, 5],
            [8, 7, 3, 2],
            [-30, -30, 60, 50],
            [0, 0, width, height],
            [3, 2, 3.25, 9],
        ]
    )
    corners = torch.cat([corners, extra]) / scale
    picture = torch.randint(batch, (len(corners), 1)).float()
    features = torch.randn(batch, channels, height, width).to(dtype).requires_grad_()
    return features, torch.cat([picture, corners], 1)


def by_definition(features, boxes, size, *, spatial_scale=1.0, sampling_ratio=0, aligned=True):
    """Sample by sample, as torchvision's compiled kernels."""
    h, w = size
    (_, channels, height, width) = features.shape
    out = torch.zeros(len(boxes), channels, h, w, dtype=features.dtype)

    def around(at, length):
        if not -1 <= at <= length:
            return []
        at = min(max(at, 0.0), length - 1.0)
        low = min(int(at), length - 1)
        return [(low, 1 - (at - low)), (min(low + 1, length - 1), at - low)]

    for k, (picture, *corners) in enumerate(boxes.tolist()):
        x1, y1, x2, y2 = (x * spatial_scale - 0.5 * aligned for x in corners)
        sides = [side if aligned else max(side, 1.0) for side in (y2 - y1, x2 - x1)]
        bins = [side / count for side, count in zip(sides, size, strict=True)]
        grid = [sampling_ratio or max(math.ceil(each), 0) for each in bins]
        for p, q in ((p, q) for p in range(h) for q in range(w)):
            for i, j in ((i, j) for i in range(grid[0]) for j in range(grid[1])):
                rows = around(y1 + p * bins[0] + (i + 0.5) * bins[0] / grid[0], height)
                cols = around(x1 + q * bins[1] + (j + 0.5) * bins[1] / grid[1], width)
                for (row, a), (col, b) in ((y, x) for y in rows for x in cols):
                    out[k, :, p, q] += a * b * features[int(picture), :, row, col]
        out[k] /= max(grid[0] * grid[1], 1)
    return out


@every
@with_options
def test_definition(impl, options):
    features, boxes = inputs(dtype=torch.float64, scale=options.get("spatial_scale", 1.0))
    got = result_and_gradients(lambda x: IMPLEMENTATIONS[impl](x, boxes, (3, 2), **options), [features])
    want = result_and_gradients(lambda x: by_definition(x, boxes, (3, 2), **options), [features])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@every
@with_options
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (5, 14)], ids=str)
def test_forward_and_gradients(impl, dtype, options, size):
    features, boxes = inputs(dtype=dtype, width=40, scale=options.get("spatial_scale", 1.0))
    op = IMPLEMENTATIONS[impl]
    assert_op_as_good(
        lambda x, **o: op(x, boxes, size, **o), lambda x, **o: reference.roi_align(x, boxes, size, **o),
        [features], features=0, **options,
    )  # fmt: skip


def compiled_or_none():
    if peers.why_not("torchvision") is not None:
        return None
    return getattr(torch.ops.torchvision, "roi_align", None)


@pytest.mark.skipif(
    compiled_or_none() is None, reason="torchvision's extension does not load beside this torch"
)
@with_options
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchvisions_operator(options, dtype):
    scale, ratio, aligned = ({"spatial_scale": 1.0, "sampling_ratio": 0, "aligned": True} | options).values()
    features, boxes = inputs(height=50, width=70, boxes=40, dtype=dtype, scale=scale)
    got = result_and_gradients(lambda x: vlmkernels.roi_align(x, boxes, (7, 5), **options), [features])
    theirs = compiled_or_none()
    want = result_and_gradients(lambda x: theirs(x, boxes.to(dtype), scale, 7, 5, ratio, aligned), [features])
    for ours, other in zip(got, want, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(peers.why_not("torchvision") is not None, reason="torchvision is not installed")
@with_options
def test_torchvisions_python_form(options):
    """It has no samples beyond the picture: they are read at its edge."""
    plain = peers.load("torchvision.ops.roi_align")._roi_align
    plain = getattr(plain, "__wrapped__", plain)
    scale, ratio, aligned = ({"spatial_scale": 1.0, "sampling_ratio": 0, "aligned": True} | options).values()
    features, _ = inputs(height=30, width=30, dtype=torch.float64)
    corners = torch.rand(12, 4, dtype=torch.float64) * 10 + torch.tensor([2, 2, 13, 13])
    boxes = torch.cat([torch.arange(12.0)[:, None] % 2, corners / scale], 1)
    got = result_and_gradients(lambda x: vlmkernels.roi_align(x, boxes, (4, 3), **options), [features])
    want = result_and_gradients(lambda x: plain(x, boxes, scale, 4, 3, ratio, aligned), [features])
    for ours, other in zip(got, want, strict=True):
        torch.testing.assert_close(ours, other)


@every
def test_a_box_of_whole_pixels_is_their_average(impl):
    features = torch.arange(48.0).reshape(1, 1, 6, 8)
    boxes = torch.tensor([[0.0, 2, 0, 6, 4]])
    got = IMPLEMENTATIONS[impl](features, boxes, (2, 2))
    want = torch.nn.functional.avg_pool2d(features[:, :, :4, 2:6], 2)
    torch.testing.assert_close(got, want)


@every
def test_boxes_of_each_picture(impl):
    if impl == "cuda":
        pytest.skip("the wrapper moves one tensor")
    features, boxes = inputs()
    boxes = boxes[boxes[:, 0].argsort(stable=True)]
    apart = [boxes[boxes[:, 0] == i, 1:] for i in range(2)]
    want = IMPLEMENTATIONS[impl](features, boxes, (3, 3))
    assert torch.equal(IMPLEMENTATIONS[impl](features, apart, 3), want)
    assert torch.equal(IMPLEMENTATIONS[impl](features, tuple(apart), (3, 3)), want)
    many = torch.randn(300, 1, 4, 4).bfloat16()  # an index that bfloat16 does not have
    own = [torch.tensor([[0.0, 0, 4, 4]]).bfloat16()] * 300
    torch.testing.assert_close(IMPLEMENTATIONS[impl](many, own, 4), many)


@every
def test_corners_that_are_far_or_no_numbers(impl):
    nan, inf = float("nan"), float("inf")
    corners = torch.tensor(
        [
            [nan, 0, 4, 4], [0, 0, 4, nan], [-inf, -inf, inf, inf], [inf, inf, inf, inf], [0, 0, inf, 4],
            [-1e9, -1e9, 1e9, 1e9], [-3e5, 0, 3e5, 4], [1e30, 0, 2e30, 4], [4, 4, -inf, -inf],
        ]
    )  # fmt: skip
    boxes = torch.cat([torch.zeros(len(corners), 1), corners], 1)
    features = torch.ones(1, 2, 6, 5, requires_grad=True)
    for options in ({}, {"sampling_ratio": 2}, {"aligned": False}):
        got, grad = result_and_gradients(
            lambda x, o=options: IMPLEMENTATIONS[impl](x, boxes, 2, **o), [features]
        )
        want, grad_of = result_and_gradients(
            lambda x, o=options: reference.roi_align(x, boxes, 2, **o), [features]
        )
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grad, grad_of)
        assert (got[:2] == 0).all()
        assert got.isfinite().all()


@every
def test_samples_at_the_border_count(impl):
    """At -1 and at the size a sample is still inside, and has the value of the edge."""
    features = torch.full((1, 1, 4, 4), 3.0)
    corners = torch.tensor([[-1.5, 0, -0.5, 4], [-1.75, 0, -0.75, 4], [3.5, 0, 4.5, 4], [3.75, 0, 4.75, 4]])
    boxes = torch.cat([torch.zeros(4, 1), corners], 1)
    got = IMPLEMENTATIONS[impl](
        features, boxes + torch.tensor([0.0, 0.5, 0.5, 0.5, 0.5]), 1, sampling_ratio=1
    )
    assert got.flatten().tolist() == [3.0, 0.0, 3.0, 0.0]


def test_gradcheck():
    features, boxes = inputs(height=6, width=5, boxes=2, dtype=torch.float64)
    for options in ({}, {"sampling_ratio": 2, "aligned": False}):
        assert torch.autograd.gradcheck(lambda x, o=options: vlmkernels.roi_align(x, boxes, 2, **o), features)


def test_second_derivative_is_refused():
    features, boxes = inputs()
    weight = torch.ones(len(boxes), 3, 2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(
        (weight * vlmkernels.roi_align(features, boxes, 2)).sum(), features, create_graph=True
    )
    with pytest.raises(RuntimeError, match="roi_align has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.once
def test_registration(permuted):
    features, boxes = inputs()
    dout, features = torch.randn(len(boxes), 3, 2, 5), features.detach()
    if permuted:
        features, dout = (x.to(memory_format=torch.channels_last) for x in (features, dout))
        boxes = boxes.T.contiguous().T
    op, bwd = torch.ops.vlmkernels.roi_align.default, torch.ops.vlmkernels.roi_align_bwd.default
    torch.library.opcheck(op, (features.clone().requires_grad_(), boxes, 2, 5, 1.0, 0, True))
    for need in (True, False):
        torch.library.opcheck(bwd, (dout, boxes, 2, 11, 19, 0.5, 2, False, [need]))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(features, first, second):
        return vlmkernels.roi_align(features, [first, second], (3, 2), spatial_scale=0.5)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (5, 9):
        features, _ = inputs(height=count + 3)
        boxes = 10 * torch.rand(count, 4), 10 * torch.rand(count + 1, 4)
        got = result_and_gradients(lambda x, b=boxes: compiled(x, *b), [features])
        want = result_and_gradients(lambda x, b=boxes: step(x, *b), [features])
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    ("shape", "count"),
    [((2, 3, 4, 5), 0), ((0, 3, 4, 5), 0), ((2, 0, 4, 5), 2), ((2, 3, 0, 5), 2), ((2, 3, 4, 0), 2)],
)
def test_empty(shape, count):
    boxes = torch.zeros(count, 5)
    out, grad = result_and_gradients(
        lambda x: vlmkernels.roi_align(x, boxes, (2, 3)), [torch.randn(shape, requires_grad=True)]
    )
    assert out.shape == (count, shape[1], 2, 3)
    assert grad.shape == shape
    assert (out == 0).all()
    assert (grad == 0).all()
    lists = [torch.zeros(0, 4)] * shape[0]
    assert vlmkernels.roi_align(torch.randn(shape), lists, 2).shape == (0, shape[1], 2, 2)


def test_views_and_dtypes_that_differ():
    features, boxes = inputs()
    want = result_and_gradients(lambda x: vlmkernels.roi_align(x, boxes, (3, 2)), [features])
    views = [
        features.detach().to(memory_format=torch.channels_last), features.detach().mT.contiguous().mT,
        torch.stack([features.detach()] * 2, -1)[..., 0],
    ]  # fmt: skip
    for view in views:
        got = result_and_gradients(
            lambda x: vlmkernels.roi_align(x, boxes.double(), (3, 2)), [view.requires_grad_()]
        )
        assert all(map(torch.equal, got, want))
    out = vlmkernels.roi_align(features.detach(), boxes.requires_grad_(), 2)
    assert not out.requires_grad


def test_features_that_are_not_numbers_stay_where_they_are():
    features = torch.zeros(1, 1, 9, 9)
    features[..., 6:] = float("nan")
    boxes = torch.tensor([[0.0, 0, 0, 5, 5], [0, -40, -40, -30, -30], [0, 3, 3, 9, 9]])
    got = vlmkernels.roi_align(features, boxes, 2)
    assert got.isnan().flatten(1).any(1).tolist() == [False, False, True]
    assert got[2, 0, :, 0].tolist() == [0.0, 0.0]


@pytest.mark.skipif(not NATIVE, reason="the reference's products have other bits on other numbers of threads")
def test_deterministic_for_any_number_of_threads(for_thread_counts):
    features, boxes = inputs(channels=20, height=40, width=50, boxes=300)
    for dtype in (torch.float32, torch.bfloat16):
        x = features.detach().to(dtype).requires_grad_()
        first, *others = for_thread_counts(
            lambda x=x: result_and_gradients(lambda y: vlmkernels.roi_align(y, boxes, 7), [x])
        )
        assert all(all(map(torch.equal, first, other)) for other in others)


@pytest.mark.once
def test_large_op_uses_more_than_one_thread(busy_threads):
    features, boxes = torch.randn(1, 64, 64, 64), torch.tensor([[0.0, 0, 0, 60, 60]]).repeat(200, 1)
    assert busy_threads(lambda: vlmkernels.roi_align(features, boxes, 7)) >= 2


@pytest.mark.skipif(not NATIVE, reason="the reference keeps what autograd keeps")
def test_only_the_boxes_are_kept():
    features, boxes = inputs()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        vlmkernels.roi_align(features, boxes, 7)
    assert [x.data_ptr() for x in kept] == [boxes.data_ptr()]


@pytest.mark.parametrize("index", [2.0, -1.0, 0.5, float("nan"), float("inf")])
def test_boxes_of_no_picture(index):
    boxes = torch.tensor([[0.0, 0, 0, 2, 2], [index, 0, 0, 2, 2]])
    for op in (vlmkernels.roi_align, reference.roi_align):
        with pytest.raises(IndexError, match=r"boxes\[:, 0\] must be indices of pictures, in \[0, B = 2\)"):
            op(torch.zeros(2, 3, 4, 5), boxes, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(3, 4, 5)}, r"features must be \[B, C, H, W\], got \(3, 4, 5\)"),
        ({"boxes": torch.zeros(2, 4)}, r"boxes must be \[K, 5\] or a list of \[k, 4\], got \(2, 4\)"),
        ({"boxes": [torch.zeros(2, 4)]}, r"boxes must be \[k, 4\] for each of 2 pictures, got \[\(2, 4\)\]"),
        ({"boxes": [torch.zeros(2, 4), torch.zeros(5)]}, r"boxes must be \[k, 4\].*\(5,\)\]"),
        (
            {"boxes": torch.zeros(2, 5, dtype=torch.int64)},
            r"float16, got features torch.float32, boxes torch.int64",
        ),
        ({"output_size": 0}, r"output_size must be two numbers from 1 to 4096, got \(0, 0\)"),
        ({"output_size": (2, 5000)}, r"output_size must be .*got \(2, 5000\)"),
        ({"spatial_scale": 0.0}, r"spatial_scale must be positive and finite, got 0.0"),
        ({"spatial_scale": float("nan")}, r"spatial_scale must be positive and finite, got nan"),
        ({"sampling_ratio": -1}, r"sampling_ratio must be from 0 \(adaptive\) to 1024, got -1"),
        (
            {"features": torch.zeros(2, 1, 1, 2**20 + 1)},
            r"features must have at most 1048576 rows and columns",
        ),
    ],
)
@pytest.mark.once
def test_bad_input(change, message):
    good = {"features": torch.zeros(2, 3, 4, 5), "boxes": torch.zeros(2, 5), "output_size": 2}
    with pytest.raises(ValueError, match=message):
        vlmkernels.roi_align(**{**good, **change})


def test_all_faults_in_one_error():
    with pytest.raises(
        ValueError, match=r"(?s)roi_align: features.*boxes.*output_size.*scale.*sampling_ratio"
    ):
        vlmkernels.roi_align(torch.zeros(3), torch.zeros(4), (0, 1), spatial_scale=-1.0, sampling_ratio=2000)


@pytest.mark.parametrize(
    ("argument", "value"), [("boxes", 3), ("boxes", [torch.zeros(1, 4), 3]), ("output_size", "7")]
)
def test_wrong_types_name_their_argument(argument, value):
    good = {"features": torch.zeros(2, 3, 4, 5), "boxes": torch.zeros(2, 5), "output_size": 2}
    with pytest.raises(TypeError, match=f"roi_align: {argument} must be"):
        vlmkernels.roi_align(**{**good, argument: value})


@pytest.mark.parametrize(("size", "number"), [(True, 1), ((True, 3), (1, 3))])
def test_true_counts_as_one(size, number):
    features, boxes = torch.randn(2, 3, 4, 5), torch.tensor([[0, 1.0, 1, 4, 3], [1, 100, 100, 200, 200]])
    want = vlmkernels.roi_align(features, boxes, number)
    assert vlmkernels.roi_align(features, boxes, size).equal(want)
    assert reference.roi_align(features, boxes, size).equal(reference.roi_align(features, boxes, number))


@every
def test_boxes_may_be_zeros_without_memory(impl):
    features, zeros = torch.randn(1, 2, 4, 5, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.float64)
    without = torch._efficientzerotensor(zeros.shape, dtype=zeros.dtype)
    got, want = (IMPLEMENTATIONS[impl](features, boxes, 3, aligned=False) for boxes in (without, zeros))
    assert got.equal(want)
