"""ClipLoss and SigLipLoss against open_clip and on two processes against one; the losses on the ops."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vlmkernels
from benchmarks import peers
from tests.two_processes import on_two_processes
from vlmkernels.distributed import all_gather_with_grad
from vlmkernels.nn import ClipLoss, InfoNCELoss, KnowledgeDistillationLoss, LinearCrossEntropyLoss, SigLipLoss
from vlmkernels.testing import result_and_gradients

needs_open_clip = pytest.mark.skipif(
    peers.why_not("open_clip") is not None, reason=str(peers.why_not("open_clip"))
)
DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


def features(rows, width=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    pair = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    pair[1] += 0.7 * pair[0]
    return [F.normalize(x, dim=-1).to(dtype).requires_grad_() for x in pair]


def run(loss_module, inputs, **options):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    loss = loss_module(*inputs, **options)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@needs_open_clip
@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
def test_clip_loss_equals_open_clip(rows, scale):
    inputs = [*features(rows), torch.tensor(scale)]
    ours, theirs = run(ClipLoss(), inputs), run(peers.load("open_clip.loss").ClipLoss(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


@needs_open_clip
@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -12.0)])
def test_siglip_loss_equals_open_clip(rows, scale, bias):
    inputs = [*features(rows), torch.tensor(scale), torch.tensor(bias)]
    ours, theirs = run(SigLipLoss(), inputs), run(peers.load("open_clip.loss").SigLipLoss(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


@needs_open_clip
def test_call_forms_of_open_clip():
    image, text = features(8)
    scale, bias = torch.tensor(10.0), torch.tensor(-3.0, requires_grad=True)
    theirs = peers.load("open_clip.loss")
    ours, peer = ClipLoss(False, True, True), theirs.ClipLoss(False, True, True)
    call = {"image_features": image, "text_features": text, "logit_scale": scale, "output_dict": True}
    out = ours(**call, logit_bias=bias)
    torch.testing.assert_close(out, peer(**call, logit_bias=bias))
    assert torch.autograd.grad(out["contrastive_loss"], bias)[0] == 0.0
    ours, peer = SigLipLoss(True, 0, 1, "shift"), theirs.SigLipLoss(True, 0, 1, "shift")
    out = ours(image, text, scale, logit_bias=None, output_dict=True)
    torch.testing.assert_close(out, peer(image, text, scale, logit_bias=None, output_dict=True))


def test_losses_go_through_the_ops():
    image, text = features(16)
    assert torch.equal(ClipLoss()(image, text, 20.0), vlmkernels.info_nce(image, text, 20.0))
    assert torch.equal(
        SigLipLoss()(image, text, 20.0, -5.0), vlmkernels.sigmoid_loss(image, text, 20.0, -5.0)
    )


def test_info_nce_loss_passes_every_option_on():
    query, key = (3.0 * x.detach() for x in features(12))
    ids = torch.arange(12) // 2
    weight = torch.linspace(0, 1, 12)
    options = {"symmetric": False, "label_smoothing": 0.1, "reduction": "none", "store_bytes": 0}
    module = InfoNCELoss(init_scale=20.0, normalize=False, **options)
    out = module(query, key, positives=(ids, ids), weight=weight)
    expected = vlmkernels.info_nce(
        query, key, 20.0, positives=(ids, ids), weight=weight, normalize=False, **options
    )
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, InfoNCELoss(init_scale=20.0, **options)(query, key, weight=weight))


def test_info_nce_loss_learns_its_scale_up_to_the_bound():
    query = features(32)[0].detach()
    module = InfoNCELoss()
    assert math.isclose(module.scale().item(), 1 / 0.07, rel_tol=1e-6)
    optimizer = torch.optim.Adam(module.parameters(), lr=1.0)
    for _ in range(5):  # perfect pairs: a larger scale is always better
        optimizer.zero_grad()
        module(query, query).backward()
        optimizer.step()
        module.clamp_()
    assert math.isclose(module.scale().item(), 100.0, rel_tol=1e-5)
    module.zero_grad()
    module(query, query.flip(0)).backward()  # wrong pairs: at the bound the gradient still acts
    assert module.log_scale.grad > 0
    assert list(InfoNCELoss(learnable=False).parameters()) == []
    assert "log_scale" in InfoNCELoss(learnable=False).state_dict()


@pytest.mark.parametrize(
    "options",
    [{}, {"ignore_index": 7, "reduction": "sum", "label_smoothing": 0.2}, {"reduction": "none"}],
)
def test_linear_cross_entropy_loss_is_torchs_of_the_logits(options):
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((3, 5, 8), (11, 8), (11,))]
    target, scale = torch.randint(0, 11, (3, 5)), torch.linspace(0.5, 2.0, 11)
    target[0, 1:3] = 7
    ours, theirs = LinearCrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    for column_scale in (None, scale):
        got = result_and_gradients(
            lambda h, w, b, scale=column_scale: ours(h, w, target, b, column_scale=scale), inputs
        )
        factor = 1.0 if column_scale is None else column_scale
        wanted = result_and_gradients(
            lambda h, w, b, factor=factor: theirs((F.linear(h, w, b) * factor).movedim(-1, 1), target), inputs
        )
        torch.testing.assert_close(got, wanted)
    assert not list(ours.parameters())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_knowledge_distillation_loss_is_torchs_of_softmaxes(reduction):
    student, teacher = torch.randn(3, 5, 11, requires_grad=True), torch.randn(3, 5, 11)
    target = torch.randint(0, 11, (3, 5))
    target[0, 1:3] = 7
    ours = KnowledgeDistillationLoss(2.0, hard_weight=0.25, ignore_index=7, reduction=reduction)

    def theirs(student, teacher):
        kl = nn.KLDivLoss(reduction="none", log_target=True)(
            (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
        ).sum(-1)
        hard = nn.CrossEntropyLoss(reduction="none")(student.movedim(-1, 1), target)
        losses = (0.75 * 4 * kl + 0.25 * hard).where(target != 7, 0)
        total = losses.sum()
        return losses if reduction == "none" else total if reduction == "sum" else total / (target != 7).sum()

    got = result_and_gradients(lambda s, t: ours(s, t, target), (student, teacher))
    torch.testing.assert_close(got, result_and_gradients(theirs, (student, teacher)))
    assert not list(ours.parameters())


HEADS = {"student_hidden": torch.zeros(2, 3, 4), "student_weight": torch.zeros(5, 4)}
TOPK = {"teacher_topk": (torch.zeros(2, 3, 1), torch.zeros(2, 3, 1, dtype=torch.int64))}


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("teacher", ["hidden", "topk"])
def test_knowledge_distillation_loss_of_hidden_states_is_that_of_logits(reduction, teacher):
    hidden, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((3, 5, 8), (11, 8), (11,)))
    heads = {"teacher_hidden": torch.randn(3, 5, 6), "teacher_weight": torch.randn(11, 6)}
    heads["teacher_bias"] = torch.randn(11)
    target = torch.randint(0, 11, (3, 5))
    target[0, 1:3] = 7
    loss = KnowledgeDistillationLoss(2.0, hard_weight=0.25, ignore_index=7, reduction=reduction)
    logits = F.linear(*heads.values())
    taught = heads if teacher == "hidden" else {"teacher_topk": (logits / 2).log_softmax(-1).topk(11)}
    got = result_and_gradients(
        lambda h, w, b: loss(target=target, student_hidden=h, student_weight=w, student_bias=b, **taught),
        (hidden, weight, bias),
    )
    want = result_and_gradients(
        lambda h, w, b: loss(F.linear(h, w, b), logits, target), (hidden, weight, bias)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ClipLoss(rank=2, world_size=2), r"rank must be in \[0, world_size = 2\), got 2"),
        (lambda: SigLipLoss(dist_impl="ring"), "dist_impl must be .*, got 'ring'"),
        (lambda: ClipLoss(use_horovod=True), "use_horovod"),
        (lambda: InfoNCELoss(init_scale=200.0), r"init_scale must be in \(0, max_scale = 100.0\], got 200.0"),
        (lambda: ClipLoss(world_size=2)(*features(4), 10.0), "init_process_group"),
        (lambda: all_gather_with_grad(torch.zeros(3, 2)), "init_process_group"),
        (
            lambda: KnowledgeDistillationLoss()(torch.zeros(2, 3, 4), torch.zeros(3, 2, 4)),
            r"teacher_logits must be \[..., V\] and target \[...\], got \[\[2, 3, 4\], \[3, 2, 4\]\]",
        ),
        (
            lambda: KnowledgeDistillationLoss()(torch.zeros(2, 4), torch.zeros(2, 5)),
            r"teacher_logits must be \[..., V\] and target \[...\], got \[\[2, 4\], \[2, 5\]\]",
        ),
        (
            lambda: KnowledgeDistillationLoss()(**HEADS, teacher_hidden=torch.zeros(3, 2, 4)),
            r"student_hidden and teacher_hidden must be \[..., \*\] .* \[\[2, 3, 4\], \[3, 2, 4\]\]",
        ),
        (
            lambda: KnowledgeDistillationLoss()(target=torch.zeros(6).long(), **HEADS, **TOPK),
            r"teacher_topk must be .* got \[\[2, 3, 4\], \[2, 3, 1\], \[2, 3, 1\], \[6\]\]",
        ),
        (
            lambda: KnowledgeDistillationLoss()(torch.zeros(2, 4), torch.zeros(2, 4), **HEADS),
            "with a teacher, got student_logits, teacher_logits, student_hidden, student_weight",
        ),
        (lambda: KnowledgeDistillationLoss()(torch.zeros(2, 4)), "must be given, .* got student_logits"),
        (lambda: KnowledgeDistillationLoss()(), "student_weight with a teacher, got none"),
        (
            lambda: KnowledgeDistillationLoss()(**HEADS),
            "linear_distillation: exactly one teacher must be given",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Two processes. All cases run in one pair of processes, because starting them is what takes the time.

LAYOUTS = {"even": (4, 4), "uneven": (5, 2), "empty": (6, 0)}
CASES = {
    "clip": lambda **world: ClipLoss(**world),
    "clip-gather": lambda **world: ClipLoss(gather_with_grad=True, **world),
    "clip-local": lambda **world: ClipLoss(local_loss=True, gather_with_grad=True, **world),
    **{
        f"siglip-{impl}": lambda impl=impl, **world: SigLipLoss(dist_impl=impl, **world)
        for impl in DIST_IMPLS
    },
}


class Towers(nn.Module):
    """Two linear towers in double precision, with scale and bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.image, self.text = nn.Linear(6, 5).double(), nn.Linear(7, 5).double()
        self.logit_scale = nn.Parameter(torch.tensor(2.5, dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-4.0, dtype=torch.float64))

    def forward(self, x, y):
        image, text = F.normalize(self.image(x), dim=-1), F.normalize(self.text(y), dim=-1)
        return image, text, self.logit_scale.exp(), self.logit_bias


def batch(rows):
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(rows, 7, generator=generator, dtype=torch.float64)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for layout, shards in LAYOUTS.items():
        x, y = (t.split(shards)[rank] for t in batch(sum(shards)))
        for case, build in CASES.items():
            model = DistributedDataParallel(Towers())
            loss = build(rank=rank, world_size=2)(*model(x, y))
            loss.backward()
            grads = {name: p.grad for name, p in model.module.named_parameters()}
            results[layout, case] = loss.detach(), grads
    faults = []
    for call in (
        lambda: ClipLoss(rank=1 - rank, world_size=2)(*model(x, y)),
        lambda: ClipLoss(rank=rank, world_size=2)(torch.zeros(3, 2), torch.zeros(2, 2), 1.0),
        lambda: all_gather_with_grad(torch.zeros(3, 2), sizes=[1, 1]),
    ):
        with pytest.raises(ValueError) as error:
            call()
        faults.append(str(error.value))
    torch.save({"results": results, "faults": faults}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return on_two_processes(worker, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two_processes, layout, case):
    losses, grads = zip(*(process["results"][layout, case] for process in two_processes), strict=True)
    model = Towers()
    single = SigLipLoss() if case.startswith("siglip") else ClipLoss()
    expected = single(*model(*batch(sum(LAYOUTS[layout]))))
    expected.backward()
    exact = {"rtol": 1e-11, "atol": 1e-13}
    torch.testing.assert_close(sum(losses) / 2, expected.detach(), **exact)
    if case in ("clip", "clip-gather"):  # every rank has the loss of the joint batch
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=0, atol=0)
        torch.testing.assert_close(grads[0][name], parameter.grad, msg=f"{name}: {{}}".format, **exact)


@needs_open_clip
@pytest.mark.parametrize("case", ["clip", "siglip"])
def test_two_processes_equal_open_clip_on_the_joint_batch(two_processes, case):
    name = "clip-local" if case == "clip" else "siglip-bidir"
    model = Towers()
    peer = peers.load("open_clip.loss")
    loss = (peer.ClipLoss() if case == "clip" else peer.SigLipLoss())(*model(*batch(7)))
    loss.backward()
    losses, grads = zip(*(process["results"]["uneven", name] for process in two_processes), strict=True)
    torch.testing.assert_close(sum(losses) / 2, loss.detach(), rtol=1e-11, atol=1e-13)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(grads[0][key], parameter.grad, rtol=1e-10, atol=1e-12)


def test_errors_on_two_processes(two_processes):
    for rank, process in enumerate(two_processes):
        layout, shapes, sizes = process["faults"]
        assert f"this is rank {rank} of 2" in layout
        assert "got [3, 2] and [2, 2]" in shapes
        assert "got [1, 1]" in sizes
