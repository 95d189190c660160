"""`patch(fused_loss=True)`: the loss and every gradient of each language model, and what the page says."""

import pytest
import torch

import vlmkernels
from tests.peers.behaviours import autocast, loss_and_gradients, patched
from tests.peers.language_models import LANGUAGE_MODELS, REFUSED
from tests.peers.table import committed, fused


def cases(families):
    for family in families:  # one may be not installed: `make setup` installs all of them
        why_not = f"{family.library}: {family.why_not}"  # the import's error
        marks = [pytest.mark.skip(reason=why_not)] if family.why_not else []
        yield pytest.param(family, id=family.name, marks=marks)


CASES = list(cases(LANGUAGE_MODELS))


@pytest.mark.parametrize("family", CASES)
def test_loss_and_gradients(family):
    loss_and_gradients(family)


@pytest.mark.parametrize("family", CASES)
def test_autocast(family):
    autocast(family)


@pytest.mark.parametrize("family", CASES)
def test_one_call_makes_the_loss(family, monkeypatch):
    calls = []
    ours = vlmkernels.linear_cross_entropy
    monkeypatch.setattr(
        vlmkernels, "linear_cross_entropy", lambda *a, **k: calls.append(a[1].shape) or ours(*a, **k)
    )
    module, _ = patched(family)
    inputs = family.inputs()
    assert torch.isfinite(family.loss(module.train(), inputs))
    assert len(calls) == 1
    family.loss(module.eval(), inputs)
    assert len(calls) == 1


@pytest.mark.parametrize("family", cases((*LANGUAGE_MODELS, *REFUSED)))
def test_the_report_is_what_the_page_says(family):
    rows = fused(family)
    assert rows == [row for row in committed("fused") if row[0] == rows[0][0]]
    assert rows[0][2] == ("refused" if family in REFUSED else "patched")


def test_the_page_has_every_model():
    named = [family.name.removesuffix(", fused loss") for family in (*LANGUAGE_MODELS, *REFUSED)]
    assert list(dict.fromkeys(row[0] for row in committed("fused"))) == named
