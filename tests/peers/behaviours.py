"""What a user relies on, one function a behaviour; each raises where the patched model does not keep it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import io
import pickle
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.peers.families import Family, Inputs
from vlmkernels.integrations import Report, unpatch
from vlmkernels.testing import assert_as_good

Results = dict[str, Tensor]


def forward(family: Family, module: nn.Module, inputs: Inputs, *, training: bool = False) -> Results:
    module.train(training)
    torch.manual_seed(6)
    with torch.no_grad():
        out = family.outputs(module, inputs)
    module.eval()
    return {name: value.clone() for name, value in out.items()}


def gradients(
    family: Family,
    module: nn.Module,
    inputs: Inputs,
    *,
    root: nn.Module | None = None,
    training: bool = False,
) -> Results:
    """The loss, and the gradients of each module's own parameters as one vector.

    A bias before a softmax has the gradient zero, and what comes out is rounding alone: it is judged beside
    the weight. Parameters of one element stand for themselves.
    """
    module.train(training or family.in_training).zero_grad()
    torch.manual_seed(6)
    loss = family.loss(module, inputs)
    loss.backward()
    results = {"loss": loss.detach()}
    for name, owner in (module if root is None else root).named_modules():
        own = [(n, p) for n, p in owner.named_parameters(recurse=False) if p.grad is not None]
        for parameter_name, p in own:
            if p.numel() == 1:
                results[f"{name}.{parameter_name}"] = p.grad
        several = [p.grad.flatten() for _, p in own if p.numel() > 1]
        if several:
            results[name] = torch.cat(several)
    return results


RUNS: dict[str, Callable[..., Results]] = {
    "eval": forward,
    "train": functools.partial(forward, training=True),
    "gradients": gradients,
    "training gradients": functools.partial(gradients, training=True),
}


@functools.cache
def plain(family: Family, run: str) -> tuple[list[Results], Results]:
    """What the unpatched model gives in float32, as it is and nudged, and in float64."""
    module, inputs = family.build(), family.inputs()
    lows = [RUNS[run](family, other, inputs) for other in (module, *nudged(module, torch.float32))]
    return lows, RUNS[run](family, copy.deepcopy(module).double(), double(inputs))


def nudged(module: nn.Module, dtype: torch.dtype, count: int = 4) -> Iterator[nn.Module]:
    """Copies whose parameters are off by up to one rounding of `dtype`.

    How far a float32 model is off in one number is chance, so the largest error of several counts.
    """
    generator = torch.Generator().manual_seed(4)
    for _ in range(count):
        other = copy.deepcopy(module)
        with torch.no_grad():
            for p in other.parameters():
                nudge = 2 * torch.rand(p.shape, generator=generator, dtype=torch.float64) - 1
                p.copy_(p.double() * (1 + torch.finfo(dtype).eps * nudge))
        yield other


def double(inputs: Inputs) -> Inputs:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def judge(got: Results, lows: list[Results], exact: Results) -> None:
    assert got.keys() == exact.keys()
    for name, value in got.items():
        if value.is_floating_point():
            wide = name == "loss" and value.dtype == torch.float32  # where theirs is rounded under autocast
            theirs = [low[name].float() if wide else low[name] for low in lows]
            assert_as_good(value, theirs, exact[name], name=name)
        else:
            assert torch.equal(value, exact[name]), name


def patched(family: Family) -> tuple[nn.Module, Report]:
    module = family.build()
    return module, family.patch(module)


def same(got: Results, wanted: Results) -> None:
    assert got.keys() == wanted.keys()
    for name in got:
        assert torch.equal(got[name], wanted[name]), name


def eval_forward(family: Family) -> None:
    module, _ = patched(family)
    judge(forward(family, module, family.inputs()), *plain(family, "eval"))
    with torch.inference_mode():
        judge(family.outputs(module, family.inputs()), *plain(family, "eval"))


def train_forward(family: Family) -> None:
    module, _ = patched(family)
    judge(forward(family, module, family.inputs(), training=True), *plain(family, "train"))


def loss_and_gradients(family: Family) -> None:
    module, _ = patched(family)
    judge(gradients(family, module, family.inputs()), *plain(family, "gradients"))


def state_dict(family: Family) -> None:
    """Keys, tensors and names are those of the plain model, and files go both ways."""
    module, other = family.build(), family.build()
    before = module.state_dict()
    names = [name for name, _ in module.named_parameters()], [name for name, _ in module.named_modules()]
    identities = {name: id(p) for name, p in module.named_parameters()}
    family.patch(module)
    after = module.state_dict()
    assert list(before) == list(after)
    assert all(before[key].data_ptr() == after[key].data_ptr() for key in before)
    assert names == (
        [name for name, _ in module.named_parameters()],
        [name for name, _ in module.named_modules()],
    )
    assert identities == {name: id(p) for name, p in module.named_parameters()}
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.9)
    other.load_state_dict(module.state_dict(), strict=True)
    wanted = forward(family, module, family.inputs())
    unpatch(module)
    same(forward(family, other, family.inputs()), forward(family, module, family.inputs()))
    family.patch(other)
    same(forward(family, other, family.inputs()), wanted)


def save_pretrained(family: Family) -> None:
    """A patched model's folder is the plain model's."""
    assert family.pretrained is not None
    module, _ = patched(family)
    cls = type(family.pretrained(family.build()))
    with tempfile.TemporaryDirectory() as folder:
        family.pretrained(module).save_pretrained(folder)
        loaded = cls.from_pretrained(folder)
    assert type(loaded) is cls
    same(dict(loaded.state_dict()), dict(family.pretrained(module).state_dict()))
    judge(forward(family, loaded, family.inputs()), *plain(family, "eval"))
    assert len(family.patch(loaded)) == len(family.patch(family.pretrained(module)))
    judge(forward(family, loaded, family.inputs()), *plain(family, "eval"))


def generate(family: Family) -> None:
    assert family.generate is not None
    module = family.build().eval()
    wanted = family.generate(module, family.inputs())
    family.patch(module)
    assert torch.equal(family.generate(module, family.inputs()), wanted)


def checkpointing(family: Family) -> None:
    """Recomputed in the backward, dropout included, whether turned on before or after patching."""
    assert family.checkpoint is not None
    for steps in ((family.patch, family.checkpoint), (family.checkpoint, family.patch)):
        module = family.build()
        for step in steps:
            step(module)
        calls = _count_calls(module)
        got = gradients(family, module, family.inputs(), training=True)
        judge(got, *plain(family, "training gradients"))
        assert max(calls.values()) > 1, "nothing was recomputed"


def _count_calls(module: nn.Module) -> dict[str, int]:
    calls: dict[str, int] = {}

    def count(name: str, *_: Any) -> None:
        calls[name] = calls.get(name, 0) + 1

    for name, child in module.named_modules():
        child.register_forward_pre_hook(functools.partial(count, name))
    return calls


def autocast(family: Family) -> None:
    """bfloat16 products: as close to float64 as the plain model under autocast, with the same dtypes."""

    def loss(module: nn.Module, inputs: Inputs) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return family.loss(module, inputs)

    def run(module: nn.Module, inputs: Inputs) -> Results:
        with torch.autocast("cpu", torch.bfloat16):
            results = {f"output {k}": v for k, v in forward(family, module, inputs).items()}
        return results | gradients(_with_loss(family, loss), module, inputs)

    module, inputs = family.build(), family.inputs()
    lows = [run(other, inputs) for other in (module, *nudged(module, torch.bfloat16))]
    precise = copy.deepcopy(module).double()
    exact = {f"output {k}": v for k, v in forward(family, precise, double(inputs)).items()}
    exact |= gradients(family, precise, double(inputs))
    family.patch(module)
    judge(run(module, inputs), lows, exact)


def compiled(family: Family, backend: str = "aot_eager") -> None:
    torch.compiler.reset()
    module, _ = patched(family)
    module.eval()
    run = torch.compile(family.outputs, backend=backend)
    with torch.no_grad():
        judge(run(module, family.inputs()), *plain(family, "eval"))
    run = torch.compile(family.loss, backend=backend)
    lossy = _with_loss(family, run)
    judge(gradients(lossy, module, family.inputs()), *plain(family, "gradients"))
    torch.compiler.reset()


def _with_loss(family: Family, loss: Callable[[nn.Module, Inputs], Tensor]) -> Family:
    return dataclasses.replace(family, loss=loss)


def deep_copy(family: Family) -> None:
    module, report = patched(family)
    other = copy.deepcopy(module)
    assert family.patch(other) == report
    assert [type(m) for m in other.modules()] == [type(m) for m in module.modules()]
    wanted = forward(family, module, family.inputs())
    same(forward(family, other, family.inputs()), wanted)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    same(forward(family, other, family.inputs()), wanted)
    unpatch(other)
    same(forward(family, other, family.inputs()), plain(family, "eval")[0][0])


def pickling(family: Family) -> None:
    module, report = patched(family)
    module.eval()
    for other in (pickle.loads(pickle.dumps(module)), _saved_and_loaded(module)):
        assert [type(m) for m in other.modules()] == [type(m) for m in module.modules()]
        same(forward(family, other, family.inputs()), forward(family, module, family.inputs()))
        assert family.patch(other) == report


def _saved_and_loaded(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def hooks(family: Family) -> None:
    """Hooks of every module run, as often and in the same order, whether set before or after patching."""

    def listen(module: nn.Module) -> list[str]:
        heard: list[str] = []
        for name, child in module.named_modules():
            child.register_forward_pre_hook(lambda m, a, name=name: heard.append(f"before {name}"))
            child.register_forward_hook(lambda m, a, out, name=name: heard.append(f"after {name}"))
        return heard

    module = family.build().train(family.in_training)
    wanted = listen(module)
    family.loss(module, family.inputs())
    for early in (True, False):
        module = family.build().train(family.in_training)
        if early:
            heard = listen(module)
        family.patch(module)
        if not early:
            heard = listen(module)
        family.loss(module, family.inputs())
        assert heard == wanted


@contextlib.contextmanager
def _one_process():
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


class _Calls(nn.Module):
    """A module that computes the family's loss in its forward, as a training step under a wrapper does."""

    def __init__(self, family: Family, module: nn.Module) -> None:
        super().__init__()
        self.family, self.module = [family], module

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.family[0].loss(self.module, inputs)


def data_parallel(family: Family) -> None:
    """patch looks through DistributedDataParallel and leaves its bookkeeping alone."""
    with _one_process():
        _in_data_parallel(family)
        gc.collect()  # a wrapper that outlives the group ends it, and may wait for a thread that waits


def _in_data_parallel(family: Family) -> None:
    module = family.build()
    if family.wrap is not None:
        wrapped, called = family.wrap(module), family
    else:
        wrapped = nn.parallel.DistributedDataParallel(_Calls(family, module), find_unused_parameters=True)
        called = _with_loss(family, lambda model, inputs: model(**inputs))
    assert family.patch(wrapped).patched
    got = gradients(called, wrapped, family.inputs(), root=module)
    got = {name.replace(".module", ""): value for name, value in got.items()}
    judge(got, *plain(family, "gradients"))


def restored(family: Family) -> None:
    """unpatch gives back the classes and the bits; patch can come again."""
    module = family.build().eval()
    forward(family, module, family.inputs())  # some models note things on themselves
    classes = [type(m) for m in module.modules()]
    attributes = [set(vars(m)) for m in module.modules()]
    first = family.patch(module)
    wanted = forward(family, module, family.inputs())
    assert family.patch(module) == first
    unpatch(module)
    assert [type(m) for m in module.modules()] == classes
    assert [set(vars(m)) for m in module.modules()] == attributes
    same(forward(family, module, family.inputs()), plain(family, "eval")[0][0])
    assert family.patch(module) == first
    same(forward(family, module, family.inputs()), wanted)


BEHAVIOURS: dict[str, Callable[[Family], None]] = {
    "eval": eval_forward,
    "train": train_forward,
    "gradients": loss_and_gradients,
    "state_dict": state_dict,
    "save_pretrained": save_pretrained,
    "generate": generate,
    "checkpointing": checkpointing,
    "autocast": autocast,
    "compile": compiled,
    "deepcopy": deep_copy,
    "pickle": pickling,
    "hooks": hooks,
    "DDP": data_parallel,
    "unpatch": restored,
}


def outcome(family: Family, behaviour: str) -> str:
    """A cell of the table: "passed", "refused: ..." with patch's reasons, or what the library lacks."""
    if behaviour in family.lacks:
        return f"– ({family.lacks[behaviour]})"
    report = patched(family)[1]
    if not report.patched:
        return "refused: " + "; ".join(sorted({entry.why for entry in report.refused}))
    BEHAVIOURS[behaviour](family)
    return "passed"
