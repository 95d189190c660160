"""Every family, plain and patched, in all that a user does with it: the table of docs/integrations.md."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import vlmkernels
from tests.peers.behaviours import BEHAVIOURS, outcome, patched
from tests.peers.language_models import FAMILIES
from tests.peers.table import classes, committed
from vlmkernels.integrations import patch

COMPILED_BY_DEFAULT = ("open_clip CLIP", "torch.nn")


def _cells():
    for family in FAMILIES:
        for behaviour in BEHAVIOURS:
            slow = behaviour == "compile" and family.name not in COMPILED_BY_DEFAULT
            marks = [pytest.mark.slow] if slow else []
            if family.why_not is not None:  # not installed: `make setup` installs all of them
                marks.append(pytest.mark.skip(reason=f"{family.library}: {family.why_not}"))
            yield pytest.param(family, behaviour, id=f"{family.name}-{behaviour}", marks=marks)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("family", "behaviour"), list(_cells()))
@pytest.mark.filterwarnings("ignore")
def test_a_cell_of_the_table(family, behaviour):
    rows = {row[0]: dict(zip(BEHAVIOURS, row[1:], strict=True)) for row in committed("behaviours")}
    assert outcome(family, behaviour) == rows[family.name][behaviour]


def test_the_table_has_every_family_and_hides_nothing():
    rows = committed("behaviours")
    assert [row[0] for row in rows] == [family.name for family in FAMILIES]
    for row, family in zip(rows, FAMILIES, strict=True):
        for behaviour, cell in zip(BEHAVIOURS, row[1:], strict=True):
            assert (
                cell == f"– ({family.lacks[behaviour]})"
                if behaviour in family.lacks
                else cell == "passed" or (cell.startswith("refused: "))
            )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_report_is_what_the_page_says(family):
    if family.why_not is not None:
        pytest.skip(f"{family.library}: {family.why_not}")
    assert classes(family) == [row for row in committed("classes") if row[0] == family.name]


BUILT = [family for family in FAMILIES if family.why_not is None]


@pytest.mark.parametrize("family", BUILT, ids=lambda family: family.name)
@pytest.mark.filterwarnings("ignore")
def test_the_ops_that_the_report_names_run(family, monkeypatch):
    module, report = patched(family)
    named = set(re.findall(r"vlmkernels\.(\w+)", " ".join(entry.why for entry in report.patched)))
    ran = set()
    for name in named:
        ours = getattr(vlmkernels, name)
        monkeypatch.setattr(vlmkernels, name, lambda *a, n=name, f=ours, **k: ran.add(n) or f(*a, **k))
    for training in {False, family.in_training}:
        family.loss(module.train(training), family.inputs()).backward()
    assert ran | {"mlp"} == named | {"mlp"}  # "mlp, or linear with the activation"


aten = torch.ops.aten
SDPA = {  # torch has formulas for its kernels on a GPU alone
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
WRITTEN_OUT = ("ALIGN", "VisualBERT", "IDEFICS", "open_flamingo")  # where no product is made a second time


@pytest.mark.skipif(torch.ops.vlmkernels.linear not in flop_registry, reason="the ops have no FLOP formulas")
@pytest.mark.parametrize("family", BUILT, ids=lambda family: family.name)
@pytest.mark.filterwarnings("ignore")
def test_as_many_flops_are_counted_as_without_a_patch(family):
    ours = family.build()
    patch(ours, loss=False, padding=False)
    counts = []
    for module in (family.build(), ours):
        with FlopCounterMode(display=False, custom_mapping=SDPA) as forward:
            out = family.outputs(module.eval(), family.inputs())
        with FlopCounterMode(display=False, custom_mapping=SDPA) as backward:
            sum(x.sum() for x in out.values() if x.requires_grad).backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    (plain, plain_backward), (count, count_backward) = counts
    assert count == plain > 0
    if not any(name in family.name for name in WRITTEN_OUT):
        assert count_backward == plain_backward > 0
