"""Results print as a line, or as a short table, and are the tuples that they were."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from cases import DEVICE, normal, squares
from torch.func import vmap

import funcreg as fr


@functools.cache
def problem():
    generator = torch.Generator().manual_seed(0)
    x = normal(generator, 60, 8)
    start = {"w": torch.zeros_like(x[0]), "b": torch.zeros_like(x[0, 0])}
    return start, (x, x[:, 0] - 2 * x[:, 1] + normal(generator, 60))


def solve(strength, **options):
    start, data = problem()
    return fr.minimize(squares, start, fr.l1, strength=strength, args=data, mask=fr.select("w"), **options)


def path(count=20):
    start, data = problem()
    return fr.regularization_path(squares, start, fr.l1, args=data, mask=fr.select("w"), count=count, ratio=0.01)


def choice(count=20):
    start, data = problem()
    return fr.cross_validate(squares, start, fr.l1, data=data, mask=fr.select("w"), count=count, ratio=0.01)


def test_a_solution_is_a_line_and_printed_its_leaves():
    found = solve(0.5)
    assert repr(found).startswith("Solution(converged in ")
    assert "3 of 9 entries not zero)" in repr(found)
    line, header, bias, weight = str(found).splitlines()
    assert line == repr(found)
    assert header.split() == ["shape", "not", "zero", "least", "greatest"]
    assert bias.split()[:2] == ["b", "number"]
    assert weight.split()[:7] == [
        "w",
        "8",
        "2",
        "of",
        "8",
        f"{float(found.params['w'].min()):.4g}",
        *weight.split()[6:],
    ]


def test_what_has_not_converged_is_printed_so():
    assert "NOT converged in 0 steps" in str(solve(0.5, max_steps=0))


def test_members_are_printed_together():
    problem()  # What is drawn, is drawn outside of the map.
    found = vmap(solve)(torch.tensor([0.1, 0.5], dtype=torch.float64, device=DEVICE))
    assert str(found) == repr(found)
    assert repr(found).startswith("Solution(all members converged, residuals of at most ")


@pytest.mark.parametrize("count", [1, 5, 20])
def test_a_path_is_a_line_and_printed_a_table(count):
    found = path(count)
    assert repr(found).startswith(f"Path({count} strengths from {float(found.strengths[0]):.4g} to ")
    line, header, *rows = str(found).splitlines()
    assert line == repr(found)
    assert header.split() == ["strength", "loss", "zeros", "residual", "steps"]
    assert len(rows) == min(count, 12)
    assert float(rows[0].split()[0]) == pytest.approx(float(found.strengths[0]), rel=1e-3)
    assert float(rows[-1].split()[0]) == pytest.approx(float(found.strengths[-1]), rel=1e-3)


@pytest.mark.parametrize("count", [5, 30])
def test_a_choice_is_a_line_and_printed_a_table_with_its_marks(count):
    found = choice(count)
    assert repr(found).startswith(f"CrossValidation(best strength {float(found.best):.4g}, one standard error ")
    line, header, *rows = str(found).splitlines()
    assert line == repr(found)
    assert header.split() == ["strength", "loss", "standard", "error"]
    best = next(row for row in rows if row.endswith("best"))
    assert float(best.split()[0]) == pytest.approx(float(found.best), rel=1e-3)
    assert len(rows) <= 14


@pytest.mark.parametrize("make", [lambda: solve(0.5), path, choice], ids=["solution", "path", "choice"])
def test_they_are_tuples_as_ever(make, tmp_path):
    found = make()
    first, *_ = found
    assert first is found[0]
    assert found._replace(params=None).params is None
    assert type(copy.copy(found)) is type(pickle.loads(pickle.dumps(found))) is type(found)
    torch.save(found, tmp_path / "found.pt")
    assert repr(torch.load(tmp_path / "found.pt")) == repr(found)


def test_inside_of_maps_there_are_shapes():
    said, _ = [], problem()

    def one(strength):
        found = solve(strength)
        said.extend([str(found), repr(found)])
        return found.params["w"]

    vmap(one)(torch.tensor([0.1, 0.5], dtype=torch.float64, device=DEVICE))
    assert all(text.startswith("Solution(shapes params.b: (), params.w: (8,)") for text in said)
