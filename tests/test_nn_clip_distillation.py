"""ClipDistillLoss and ClipKDLoss against open_clip and plain formulas, and on two processes against one."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vlmkernels
from tests.parity import peer
from tests.two_processes import on_two_processes
from vlmkernels.nn import ClipDistillLoss, ClipKDLoss, ClipLoss
from vlmkernels.testing import result_and_gradients

EXACT = {"rtol": 1e-11, "atol": 1e-13}


def features(rows, width, dtype=torch.float64):
    pair = torch.randn(2, rows, width, dtype=torch.float64)
    pair[1] += 0.7 * pair[0]
    return [F.normalize(x, dim=-1).to(dtype).requires_grad_() for x in pair]


def problem(rows=37, width=24, teacher_width=30, dtype=torch.float64):
    """What a student gives, and what a teacher does."""
    student = [*features(rows, width, dtype), torch.tensor(14.0, dtype=dtype, requires_grad=True)]
    return student, [*(x.detach() for x in features(rows, teacher_width, dtype)), torch.tensor(60.0)]


@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("name", ["contrastive_loss", "distill_loss"])
def test_distill_loss_equals_open_clip(rows, name):
    student, teacher = problem(rows)
    ours, theirs = ClipDistillLoss(), peer("open_clip.loss").DistillClipLoss()
    got, want = (
        result_and_gradients(lambda *x, loss=loss: loss(*x, *teacher, output_dict=True)[name], student)
        for loss in (ours, theirs)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert ours(*student, *teacher)[name == "distill_loss"] == got[0]


def plain_kd(student, teacher, projections=None):
    """The unweighted terms as CLIP-KD writes them, but for the scale of the interactive one."""
    images, texts, scale = student
    teacher_images, teacher_texts, teacher_scale = teacher
    logits, taught = scale * images @ texts.T, teacher_scale * teacher_images @ teacher_texts.T
    labels = torch.arange(len(images))
    contrastive = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    relational = sum(
        F.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean")
        for x, y in ((logits, taught), (logits.T, taught.T))
    )
    if projections:
        images, texts = (project(x) for project, x in zip(projections, (images, texts), strict=True))
    images, texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    crossed = scale * images @ teacher_texts.T, scale * texts @ teacher_images.T
    return {
        "contrastive_loss": contrastive,
        "feature_loss": F.mse_loss(images, teacher_images) + F.mse_loss(texts, teacher_texts),
        "relational_loss": relational / 2,
        "interactive_loss": sum(F.cross_entropy(x, labels) for x in crossed) / 2,
    }


WEIGHTS = {"contrastive": 1.0, "feature": 2000.0, "relational": 1.0, "interactive": 1.0}


@pytest.mark.parametrize("teacher_width", [24, 30])
def test_the_terms_of_clip_kd(teacher_width):
    student, teacher = problem(teacher_width=teacher_width)
    loss = ClipKDLoss(24, teacher_width).double()
    assert len(list(loss.parameters())) == (0 if teacher_width == 24 else 4)
    wanted = plain_kd(student, teacher, (loss.image_projection, loss.text_projection))
    for name, each in loss(*student, *teacher, output_dict=True).items():
        torch.testing.assert_close(each, WEIGHTS[name.removesuffix("_loss")] * wanted.pop(name), **EXACT)
    assert wanted == {}

    def summed(*student):
        terms = plain_kd(student, teacher, (loss.image_projection, loss.text_projection))
        return sum(WEIGHTS[name.removesuffix("_loss")] * term for name, term in terms.items())

    got = result_and_gradients(lambda *x: loss(*x, *teacher), student)
    for a, b in zip(got, result_and_gradients(summed, student), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_term_alone(name):
    student, teacher = problem(teacher_width=24)
    loss = ClipKDLoss(**{other: 3.0 if other == name else 0.0 for other in WEIGHTS})
    got = loss(*student, *teacher, output_dict=True)
    assert got.keys() == {f"{name}_loss"}
    torch.testing.assert_close(got[f"{name}_loss"], 3 * plain_kd(student, teacher)[f"{name}_loss"], **EXACT)
    torch.testing.assert_close(loss(*student, *teacher), got[f"{name}_loss"])


def test_no_term_at_all_gives_nothing():
    student, teacher = problem()
    assert ClipKDLoss(contrastive=0, feature=0, relational=0, interactive=0)(*student, *teacher) == 0


def test_a_student_in_bfloat16_of_a_teacher_in_float32():
    student, _ = problem(teacher_width=24, dtype=torch.bfloat16)
    _, teacher = problem(teacher_width=24, dtype=torch.float32)
    loss = ClipKDLoss()(*student, *teacher)
    assert loss.dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 for grad in torch.autograd.grad(loss, student))
    contrastive, distill = ClipDistillLoss()(*student, *teacher)
    assert contrastive.dtype == distill.dtype == torch.float32


def test_losses_go_through_the_op():
    student, teacher = problem()
    want = vlmkernels.contrastive_distillation(*student, *teacher, divergence="cross_entropy")
    assert torch.equal(ClipDistillLoss()(*student, *teacher)[1], want)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda *x: ClipKDLoss(24), "must be given together, got 24 and None"),
        (lambda *x: ClipKDLoss(feature=-1.0), "feature must not be negative, got -1.0"),
        (lambda *x: ClipKDLoss()(*x), r"image features of the teacher's shape \[37, 30\], got \[37, 24\]"),
        (lambda *x: ClipDistillLoss()(*x[:3], x[3][:5], *x[4:]), r"number of rows, got \[37, 37, 5, 37\]"),
        (lambda *x: ClipDistillLoss(world_size=2)(*x), "init_process_group"),
    ],
)
def test_errors(build, message):
    student, teacher = problem()
    with pytest.raises(ValueError, match=message):
        build(*student, *teacher)


# Two processes. All cases run in one pair of processes, because starting them is what takes the time.

LAYOUTS = {"even": (4, 4), "uneven": (5, 2), "empty": (6, 0)}
CASES = {
    "distill": lambda **world: ClipDistillLoss(gather_with_grad=True, **world),
    "distill-local": lambda **world: ClipDistillLoss(local_loss=True, gather_with_grad=True, **world),
    "kd": lambda **world: ClipKDLoss(**world),
    "kd-local": lambda **world: ClipKDLoss(local_loss=True, **world),
}


class Towers(nn.Module):
    """Two linear towers in double precision."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.image, self.text = nn.Linear(6, 5).double(), nn.Linear(7, 5).double()
        self.logit_scale = nn.Parameter(torch.tensor(2.5, dtype=torch.float64))

    def forward(self, x, y):
        return F.normalize(self.image(x), dim=-1), F.normalize(self.text(y), dim=-1), self.logit_scale.exp()


def batch(rows):
    """The inputs of the towers, and the features of a teacher."""
    generator = torch.Generator().manual_seed(11)
    shapes = ((rows, 6), (rows, 7), (rows, 5), (rows, 5))
    x, y, *teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, y, *(F.normalize(each, dim=-1) for each in teacher)


def total(loss, model, x, y, *teacher):
    result = loss(*model(x, y), *teacher, 20.0)
    return result[0] + 2 * result[1] if isinstance(result, tuple) else result


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for layout, shards in LAYOUTS.items():
        inputs = [t.split(shards)[rank] for t in batch(sum(shards))]
        for case, build in CASES.items():
            model = DistributedDataParallel(Towers())
            loss = total(build(rank=rank, world_size=2), model, *inputs)
            loss.backward()
            grads = {name: p.grad for name, p in model.module.named_parameters()}
            results[layout, case] = loss.detach(), grads
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return on_two_processes(worker, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two_processes, layout, case):
    losses, grads = zip(*(process[layout, case] for process in two_processes), strict=True)
    model = Towers()
    expected = total(CASES[case](), model, *batch(sum(LAYOUTS[layout])))
    expected.backward()
    torch.testing.assert_close(sum(losses) / 2, expected.detach(), **EXACT)
    if case == "distill":  # every rank has the loss of the joint batch
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=0, atol=0)
        torch.testing.assert_close(grads[0][name], parameter.grad, msg=f"{name}: {{}}".format, **EXACT)


def test_the_contrastive_part_is_that_of_clip_loss():
    student, teacher = problem()
    assert torch.equal(ClipDistillLoss()(*student, *teacher)[0], ClipLoss()(*student))
