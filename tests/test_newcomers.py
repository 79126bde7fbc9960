"""The pages for those who come from another library: their tables are complete, and both sides of a row are equal."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import funcreg as fr

ROOT = Path(__file__).parent.parent
OTHERS = (ROOT / "examples" / "from_others.md").read_text()
ROWS = re.findall(r"^\| (`.*) \| `(.*)` \| `(.*)` \|$", OTHERS, flags=re.MULTILINE)


def letters():
    w = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w[0, 0] = 0.0
    return {
        "fr": fr,
        "torch": torch,
        "math": math,
        "w": w,
        "norms": w.norm(dim=1, keepdim=True),
        "shrunk": lambda w, t: w.sign() * (w.abs() - t).clamp(min=0),
        "lam": 0.3,
        "rho": 0.4,
        "a": 0.2,
        "b": 0.7,
        "r": 1.1,
        "s": 0.8,
        "d": 0.6,
        "g": 1.7,
        "gamma": 3.0,
        "eps": 0.5,
        "c": torch.arange(20, dtype=torch.float64).reshape(5, 4) / 10,
        "alphas": torch.tensor([0.9, 0.6, 0.5, 0.1], dtype=torch.float64),
    }


def test_every_row_of_the_tables_is_computed():
    tables = re.findall(r"^\| `.*$", OTHERS, flags=re.MULTILINE)
    assert len(ROWS) == len(tables) > 40


@pytest.mark.parametrize(("name", "formula", "line"), ROWS, ids=[row[0].replace("`", "") for row in ROWS])
def test_both_sides_of_a_row_are_equal(name, formula, line):
    theirs, ours = eval(formula, letters()), eval(line, letters())
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
