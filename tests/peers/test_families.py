"""Every family, plain and patched, in all that a user does with it: the table of docs/integrations.md."""

import pytest

from tests.peers.behaviours import BEHAVIOURS, outcome
from tests.peers.more_families import FAMILIES
from tests.peers.table import classes, committed

COMPILED_BY_DEFAULT = ("open_clip CLIP", "transformers CLIP", "open_flamingo", "torch.nn")


def _cells():
    for family in FAMILIES:
        for behaviour in BEHAVIOURS:
            slow = behaviour == "compile" and family.name not in COMPILED_BY_DEFAULT
            marks = [pytest.mark.slow] if slow else []
            if family.why_not is not None:  # not installed: `make setup` installs all of them
                marks.append(pytest.mark.skip(reason=f"{family.library}: {family.why_not}"))
            yield pytest.param(family, behaviour, id=f"{family.name}-{behaviour}", marks=marks)


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
