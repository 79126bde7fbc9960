"""The pages for those who come from another library: their tables are complete, and both sides of a row are equal."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import pytest
import torch

import funcreg as fr
from funcreg.core.spelling import unknown_name

ROOT = Path(__file__).parent.parent
OPTAX = (ROOT / "examples" / "from_optax.md").read_text()
OTHERS = (ROOT / "examples" / "from_others.md").read_text()
ROWS = re.findall(r"^\| (`.*) \| `(.*)` \| `(.*)` \|$", OTHERS, flags=re.MULTILINE)
made = runpy.run_path(str(ROOT / "examples" / "from_optax.py"))


def letters():
    w = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
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
        "n": 442,
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


PENALTIES = re.findall(
    r"^\| `(?:\w+\.)*(\w+)\(.*` \| `(.*)` \|$",
    "".join(re.findall(r"^## (?:Keras|skglm|jaxopt|pyproximal)\n.*?(?=^## |\Z)", OTHERS, re.DOTALL | re.MULTILINE)),
    flags=re.MULTILINE,
)


@pytest.mark.parametrize(("theirs", "line"), PENALTIES, ids=[name for name, _ in PENALTIES])
def test_the_name_of_a_row_is_told_what_it_is_here(theirs, line):
    if not hasattr(fr, theirs):
        said = unknown_name(theirs, vars(fr)).partition("Is it ")[2]
        assert [name for name in re.findall(r"\w+", said) if hasattr(fr, name) and name in line], said


def test_a_name_with_another_digit_is_no_norm_that_is_here():
    assert unknown_name("l24", vars(fr)).endswith("attribute 'l24'")


def test_a_metric_of_one_lands_where_a_constraint_of_keras_does():
    alike, own, keras = (torch.nn.Parameter(letters()["w"]) for _ in range(3))
    optimizers = [torch.optim.Adam([each], lr=0.3) for each in (alike, own, keras)]
    fr.regularize(optimizers[0], fr.max_norm, 1.1, metric=lambda state, group: 1.0)
    fr.regularize(optimizers[1], fr.max_norm, 1.1)
    for step in range(3):
        for each, optimizer in zip((alike, own, keras), optimizers, strict=True):
            each.grad = -(each.detach() * (step + 1)).sin()
            optimizer.step()
        keras.data = fr.max_norm.project(keras.detach(), 1.1)
    torch.testing.assert_close(alike.detach(), keras.detach(), rtol=0, atol=1e-14)
    assert (own - keras).abs().max() > 1e-2  # In the metric of Adam.


def test_ftrl_from_zeros_is_that_of_keras():
    target, rate, lam = letters()["w"], 0.5, 0.3
    linear, squares, w = (torch.zeros_like(target) for _ in range(3))
    tx, params = fr.ftrl(rate, fr.l1, strength=lambda count: lam / (count + 1)), torch.zeros_like(target)
    state = tx.init(params)
    for _ in range(6):
        g, before = w - target, squares.sqrt()
        squares = squares + g.square()
        linear = linear + g - (squares.sqrt() - before) / rate * w
        w = (linear.clamp(-lam, lam) - linear) / ((squares.sqrt() + 1.0) / rate)
        updates, state = tx.update(params - target, state, params)
        params = fr.apply_updates(params, updates)
        torch.testing.assert_close(params, w, rtol=0, atol=1e-7)  # The schedule is one of float32.
    assert 0 < (w == 0).sum() < w.numel()


# optax


def test_every_public_name_of_optax_has_one_place():
    shared, absent = made["shared"](), made["absent"]()
    assert len(absent) == len(set(absent))
    assert set(shared).isdisjoint(absent)
    assert {*shared, *absent} == set(made["optaxs"]())
    assert set(made["OTHERWISE"]) <= set(shared)


def test_the_page_holds_the_tables_made_from_the_code():
    assert made["filled"](OPTAX) == OPTAX, "run python examples/from_optax.py --write"


def test_states_that_are_called_the_same_have_the_fields_of_optax():
    known = made["REFERENCE"]["fields"]
    same = [name for name in known if hasattr(getattr(fr, name, None), "_fields") and not made["words"](name)]
    assert len(same) > 15
    for name in same:
        assert [*getattr(fr, name)._fields] == [{"count": "steps"}.get(f, f) for f in known[name].split()], name


def test_every_name_is_in_the_tables_once():
    tables = "".join(
        re.findall(r"^<!-- (?:same|other|without) -->\n(.*?)^<!-- end -->", OPTAX, re.DOTALL | re.MULTILINE)
    )
    cells = [line.split(" | ") for line in tables.splitlines() if line.startswith("| ")]
    named = [name for first, second, *_ in cells for name in re.findall(r"`(\w+)`", first if "`" in first else second)]
    assert sorted(named) == made["optaxs"]()


LINES = [line for _, said in made["INSTEAD"] for line in re.findall(r"`([^`]*fr\.[^`]*)`", said)]


@pytest.mark.parametrize("line", LINES)
def test_what_is_written_instead_is_there(line):
    params = {"w": torch.ones(3, 2), "b": torch.ones(2)}
    names = {"fr": fr, "torch": torch, "params": params, "f": torch.add}
    names["loss"] = lambda p: sum((w - 1).square().sum() for w in p.values())
    assert eval(line, names) is not None
