"""The catalogue is what the code says and does."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from cases import PENALTIES

import funcreg as fr

ROOT = Path(__file__).parent.parent
made = runpy.run_path(str(ROOT / "examples" / "catalogue.py"))
PAGE = (ROOT / "examples" / "catalogue.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", made["TABLES"])
def test_the_page_holds_the_tables_made_from_the_code(name):
    written = PAGE.partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0].strip()
    assert written == made["TABLES"][name](), "run python examples/catalogue.py --write"


def test_it_has_every_public_penalty_once():
    names = [penalty.__name__ for penalty in made["penalties"]()]
    assert sorted(names) == sorted(name for name, value in vars(fr).items() if isinstance(value, fr.Penalty))


@pytest.mark.parametrize("penalty", made["penalties"](), ids=lambda penalty: penalty.__name__)
def test_it_sees_whether_a_penalty_is_convex(penalty):
    # Rows with options of their own may be of another kind: a power below 1 is not convex.
    rows = [case for case in PENALTIES.values() if case.penalty is penalty and "p" not in case.options]
    assert not rows or made["is_convex"](penalty) == (not rows[0].nonconvex)


def test_it_sees_what_a_proximal_operator_does():
    seen = {name: made["effects"](getattr(fr, name), made["sample"]()) for name in ("l1", "half_l2", "group_lasso")}
    assert seen["l1"] == "zeroes entries, shrinks all alike"
    assert seen["half_l2"] == "scales all alike"
    assert seen["group_lasso"] == "zeroes rows, scales each row"
    assert made["effects"](fr.sparse_group_lasso, made["sample"]()) == "zeroes rows, zeroes entries"


def test_its_cells_hold_no_bar_but_that_of_the_table():
    assert (
        made["markdown"](r"Sum, :math:`\|w\| + |w|`, of `a | b`")
        == r"Sum, $`\Vert w\Vert + \vert w\vert`$, of `a \| b`"
    )
    catalogue = PAGE.partition("<!-- catalogue -->\n")[2].partition("<!-- end -->")[0]
    tables = re.findall(r"(?:^\|.*\n)+", catalogue, flags=re.MULTILINE)
    assert tables
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
