"""Weighted penalties, the sum of c_i g(w_i): each row of the table works, or has a reason not to."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    DEVICE,
    GRADIENT_ALONE,
    PENALTIES,
    Layer,
    PenaltyCase,
    _all,
    _columns,
    _rows,
    assert_equal,
    draw,
    flat,
    nearby,
)
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso
from torch import Tensor
from torch.func import grad, jvp, vmap

import funcreg as fr
from funcreg.regularizers.penalty import Sum


def _lines(w: Tensor) -> tuple[int, ...]:
    return (w.ndim - 1,)


#: The dimensions inside what takes one weight; an entry where a row is not here.
GROUPS: dict[str, Callable[[Tensor], tuple[int, ...]]] = {
    **dict.fromkeys(
        [
            "group_lasso",
            "group_lasso by size",
            "sparse_group_lasso",
            "group_mcp",
            "group_scad",
            "group_l0",
            "l1_linf",
            "exclusive_lasso",
            "oscar of rows",
            "a multiple",
            "a sum on some leaves",
            "group_l_half",
        ],
        _rows,
    ),
    **dict.fromkeys(["group_lasso of columns", "linf of columns", "total_variation of columns"], _columns),
    **dict.fromkeys(["total_variation", "fused_lasso"], _lines),
    "isotropic_total_variation": lambda w: tuple(range(max(w.ndim - 2, 0), w.ndim)),
    **dict.fromkeys(["groups + elastic", "nested groups + l1 + ridge"], _all),
}
ROWS = {name: case for name, case in PENALTIES.items() if not case.unweighted}
every_penalty = pytest.mark.parametrize("name", ROWS)
every_convex_penalty = pytest.mark.parametrize("name", [name for name, case in ROWS.items() if not case.nonconvex])


def inside(name: str, w: Tensor) -> tuple[int, ...]:
    """The dimensions inside what takes one weight in a leaf."""
    case = {**PENALTIES, **GRADIENT_ALONE}[name]
    if name in GROUPS:
        return GROUPS[name](w)
    return () if case.penalty.separable in (True, None) else _all(w)


def weights_for(name: str, params: Any, seed: int = 7, dtype: torch.dtype = torch.float64) -> Any:
    """The finest weights of a penalty, some of them zero."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(w: Tensor) -> Tensor:
        shape = [1 if d in inside(name, w) else n for d, n in enumerate(w.shape)]
        c = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") * 2 + 0.1
        return torch.where(torch.rand(shape, generator=generator, device="cpu") < 0.15, 0.0, c).to(w.device, dtype)

    return fr.tree_map(leaf, params)


def given(case: PenaltyCase, strength: Any, **kwargs: Any) -> fr.Penalty:
    return case.penalty.given(*case.hyper, strength=strength, **case.options, **kwargs)


def parts_of(w: Tensor, dims: tuple[int, ...]) -> list[Tensor]:
    """A leaf cut where weights may differ, the number of its dimensions kept."""
    parts = [w]
    for d in range(w.ndim):
        if d not in dims:
            parts = [slice_ for part in parts for slice_ in part.split(1, d)]
    return parts


def objective(p: fr.Penalty, x: Any, z: Any, step: Any = 1.0, metric: Any = None) -> Tensor:
    h = torch.ones(()) if metric is None else flat(metric)
    return 0.5 * (h * (flat(z) - flat(x)).square()).sum() + step * p(z)


def around(z: Any, sizes: tuple[float, ...]) -> Any:
    """A dozen trees at each of some distances from one, stacked."""
    moves = fr.tree_map(lambda *d: torch.stack(d), *[draw(seed) for seed in range(12)])
    return fr.tree_map(lambda a, d: torch.cat([a + size * d for size in sizes]), z, moves)


# Every row


def test_every_row_is_weighted_or_says_why_not():
    assert all(case.penalty.weighable for case in (*ROWS.values(), *GRADIENT_ALONE.values()))
    params = draw()
    for name, case in PENALTIES.items():
        if case.unweighted:
            assert not case.penalty.weighable, name
            with pytest.raises(TypeError, match="expected a number or a tensor without dimensions"):
                given(case, fr.tree_map(torch.ones_like, params))
            with pytest.raises(TypeError, match="expected a number or a tensor without dimensions"):
                given(case, {"head": 1.0, "body": 2.0})
            tx = fr.add_penalty(case.penalty, *case.hyper, strength={"head": 1.0, "body": 2.0}, **case.options)
            with pytest.raises(TypeError, match="expected a number or a tensor without dimensions"):
                tx.update(params, tx.init(params), params)
            torch.testing.assert_close((0.5 * given(case, 1.0))(params), 0.5 * case.value(params))


@pytest.mark.parametrize("name", [n for n, c in {**ROWS, **GRADIENT_ALONE}.items() if c.equation])
def test_value_is_the_sum_of_weights_times_the_equation_of_parts(name):
    case, params = {**ROWS, **GRADIENT_ALONE}[name], draw()
    c = weights_for(name, params)
    expected = torch.zeros((), dtype=torch.float64)
    for w, weights in zip(fr.tree_leaves(params), fr.tree_leaves(c), strict=True):
        # The number of dimensions says to which leaves some rows apply: vectors are cut into vectors.
        for part, weight in zip(parts_of(w, inside(name, w)), weights.reshape(-1), strict=True):
            expected = expected + weight * case.equation(part)
    torch.testing.assert_close(given(case, c)(params), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [*ROWS, *GRADIENT_ALONE])
def test_gradient_is_that_of_autograd_away_from_kinks(name):
    case = {**ROWS, **GRADIENT_ALONE}[name]
    params = fr.tree_map(lambda w: w + 0.1 * (w == 0), draw())
    weighted = given(case, weights_for(name, params))
    assert_equal(weighted.grad(params), grad(weighted)(params), rtol=1e-11, atol=1e-14)
    value, slope = jvp(weighted, (params,), (draw(1),))
    torch.testing.assert_close(value, weighted(params))
    torch.testing.assert_close(slope, flat(weighted.grad(params)) @ flat(draw(1)), rtol=1e-11, atol=1e-14)


@every_penalty
def test_prox_is_that_of_steps_and_minimizes_the_weighted_objective(name):
    case, x = ROWS[name], draw()
    c = weights_for(name, x)
    weighted = given(case, c)
    for step in (0.3, 3.0):
        z = weighted.prox(x, step)
        assert_equal(z, case.prox(x, fr.tree_map(lambda c, step=step: step * c, c)), rtol=1e-12, atol=1e-14)
        least = objective(weighted, x, z, step)
        worths = vmap(lambda z, step=step: objective(weighted, x, z, step))(around(z, (1e-5, 1e-2, 1.0)))
        assert (worths >= least - 1e-12).all()
        assert objective(weighted, x, fr.tree_map(torch.zeros_like, x), step) >= least - 1e-12
        assert objective(weighted, x, x, step) >= least - 1e-12


@pytest.mark.parametrize("name", [name for name, case in ROWS.items() if case.metric])
def test_prox_in_a_metric_minimizes_the_weighted_objective(name):
    case, x = ROWS[name], draw()
    weighted, h = given(case, weights_for(name, x)), fr.tree_map(lambda w: 10**w, draw(3))
    z = weighted.prox(x, 0.5, metric=h)
    least = objective(weighted, x, z, 0.5, h)
    worths = vmap(lambda z: objective(weighted, x, z, 0.5, h))(around(z, (1e-5, 1e-2, 1.0)))
    assert (worths >= least - 1e-9).all()


@every_penalty
def test_ones_change_nothing(name):
    case, params = ROWS[name], draw()
    ones = fr.tree_map(torch.ones_like, weights_for(name, params))
    exact = torch.device(DEVICE).type == "cpu"  # Elsewhere compilers fuse a multiplication by one into a sum.
    for weights in (ones, {"head": 1.0, "body": torch.ones((), dtype=torch.float64)}):
        weighted = given(case, weights)
        # A sum multiplies in another order.
        rounding = {"rtol": 1e-13, "atol": 1e-15} if isinstance(case.penalty, Sum) or not exact else {}
        assert_equal(weighted(params), case.value(params), **rounding)
        assert_equal(weighted.grad(params), case.grad(params), **rounding)
        assert_equal(weighted.prox(params, 0.7), case.prox(params, 0.7), **rounding)


@every_penalty
def test_a_number_everywhere_is_a_multiple_and_multiples_multiply(name):
    case, params = ROWS[name], draw()
    c = weights_for(name, params)
    everywhere = given(case, fr.tree_map(lambda c: torch.full_like(c, 0.7), c))
    for a, b in ((everywhere, given(case, 0.7)), (0.7 * given(case, c), given(case, 0.7) * c)):
        torch.testing.assert_close(a(params), b(params), rtol=1e-13, atol=0)
        assert_equal(a.grad(params), b.grad(params), rtol=1e-13, atol=1e-15)
        assert_equal(a.prox(params, 0.5), b.prox(params, 0.5), rtol=1e-12, atol=1e-14)
        assert_equal(a.residual(params, draw(1)), b.residual(params, draw(1)), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(everywhere(params), 0.7 * case.value(params), rtol=1e-13, atol=0)
    both = given(case, c)
    assert_equal(both.prox(params, 2.0), (2.0 * both).prox(params, 1.0), rtol=1e-12, atol=1e-14)


@every_penalty
def test_without_weight_what_is_there_stays(name):
    case, params = ROWS[name], draw()
    weights = {
        "head": Layer(0.0, torch.zeros(())),
        "body": fr.tree_map(torch.ones_like, weights_for(name, params))["body"],
    }
    weighted, body = given(case, weights), {"body": params["body"]}
    torch.testing.assert_close(weighted(params), case.value(body))
    assert not flat(weighted.grad(params)["head"]).any()
    z = weighted.prox(params, 0.5)
    assert_equal(z["head"], params["head"], rtol=1e-15)
    assert_equal(z["body"], case.prox(body, 0.5)["body"], rtol=1e-12, atol=1e-14)


@every_penalty
def test_a_single_tensor_may_be_mapped_over_and_so_may_trees(name):
    case, params = ROWS[name], {"a": draw()["head"].weight, "b": draw(9)["head"].weight}
    numbers = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    trees = [weights_for(name, params, seed) for seed in range(3)]
    stacked = fr.tree_map(lambda *leaves: torch.stack(leaves), *trees)
    rules: list[Callable[[fr.Penalty], Any]] = [
        lambda p: p(params),
        lambda p: p.grad(params),
        lambda p: p.prox(params, 0.5),
    ]
    for rule in rules:
        by_numbers = vmap(lambda c, rule=rule: rule(given(case, c)))(numbers)
        by_trees = vmap(lambda c, rule=rule: rule(given(case, c)))(stacked)
        for i, (number, tree) in enumerate(zip(numbers, trees, strict=True)):
            member = lambda batch, i=i: fr.tree_map(lambda x: x[i], batch)
            assert_equal(member(by_numbers), rule(given(case, number)), rtol=1e-12, atol=1e-14)
            assert_equal(member(by_trees), rule(given(case, tree)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [n for n in [*ROWS, *GRADIENT_ALONE] if inside(n, torch.ones(4, 3))])
def test_weights_that_vary_where_entries_are_coupled_are_refused(name):
    case, params = {**ROWS, **GRADIENT_ALONE}[name], draw()
    weights = {"head": Layer(torch.ones(4, 3), 1.0), "body": 1.0}
    shape = tuple(1 if d in inside(name, params["head"].weight) else n for d, n in enumerate((4, 3)))
    expected = (
        "one number for each (leaf|matrix)" if shape == (1, 1) else f"one for each group, {re.escape(str(shape))}"
    )
    message = rf"at leaf 'head.weight': a strength or step has shape \(4, 3\); expected {expected}"
    weighted = given(case, weights)
    calls = [weighted, weighted.grad]
    if name in ROWS:
        calls += [
            lambda p: weighted.prox(p, 1.0),
            lambda p: weighted.residual(p, p),
            lambda p: case.prox(p, weights),
            lambda p: case.penalty.residual(p, p, *case.hyper, strength=weights, **case.options),
        ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(params)
    with pytest.raises(ValueError, match=message):
        if case.penalty.has_gradient:
            tx = fr.add_penalty(case.penalty, *case.hyper, strength=weights, **case.options)
        else:
            tx = fr.proximal(case.penalty, weights, *case.hyper, **case.options)
        tx.update(params, fr.EmptyState(), params)


@every_convex_penalty
def test_the_residual_is_zero_at_a_solution_and_only_there(name):
    case, x = ROWS[name], draw()
    c = weights_for(name, x)
    weighted = given(case, c)
    z = weighted.prox(x, 0.5)
    difference = lambda w: fr.tree_map(lambda a, b: a - b, w, x)
    assert fr.kkt_residual(z, difference(z), weighted, strength=0.5) <= 1e-14
    half = fr.tree_map(lambda c: 0.5 * c, c)
    assert fr.kkt_residual(z, difference(z), case.penalty, *case.hyper, strength=half, **case.options) <= 1e-14
    moved = nearby(z, 3, 0.1)
    assert fr.kkt_residual(moved, difference(moved), weighted, strength=0.5) > 1e-2


@every_convex_penalty
def test_lambda_max_is_where_zero_becomes_a_solution(name):
    case, grads = ROWS[name], draw()
    weighted = given(case, fr.tree_map(lambda c: c + 0.1, weights_for(name, grads)))
    largest = fr.lambda_max(grads, weighted)
    if case.smooth or case.centre:
        assert largest == math.inf
        return
    assert not flat(weighted.prox(grads, largest * (1 + 1e-12))).any()
    assert flat(weighted.prox(grads, largest * (1 - 1e-9))).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["l1", "l0", "log_sum", "huber", "group_lasso", "group_mcp", "ridge + l1", "fused_lasso"]
)
def test_compiling_the_whole_changes_nothing(name):
    case, params = ROWS[name], {"w": draw()["head"].weight}

    def everything(params, c):
        weighted = given(case, c)
        return weighted(params), weighted.grad(params), weighted.prox(params, 0.5), grad(weighted)(params)

    c = weights_for(name, params)
    compiled = torch.compile(everything, fullgraph=True, backend="eager")  # The law of penalties goes further down.
    assert_equal(compiled(params, c), everything(params, c), rtol=1e-12, atol=1e-14)


# One entry


@pytest.mark.parametrize("form", [lambda p: p, fr.nonnegative_form], ids=["all numbers", "numbers of at least 0"])
@pytest.mark.parametrize("name", [n for n, c in ROWS.items() if c.equation and not inside(n, torch.ones(2, 2))])
def test_prox_is_the_global_minimum_for_each_entry(name, form):
    case = ROWS[name]
    if form is fr.nonnegative_form and case.penalty.separable is not True:
        with pytest.raises(ValueError, match="expected a separable penalty"):
            form(case.penalty)
        return
    p = form(case.penalty)
    x, c = torch.meshgrid(torch.linspace(-3, 3, 25), torch.tensor([0.0, 0.03, 0.4, 1.0, 4.0, 30.0]), indexing="ij")
    x, c = x.double() + 0.013, c.double()
    weighted = p.given(*case.hyper, strength={"w": c})
    z = weighted.prox({"w": x}, 0.7)["w"]
    equation = vmap(vmap(case.equation))
    at = lambda z: 0.5 * (z - x) ** 2 + torch.where(c == 0, 0.0, 0.7 * c * equation(z))
    least = at(z)
    grid = torch.cat([torch.linspace(-3.2, 3.2, 1601), torch.tensor([0.0, 0.3, -0.3])]).double()
    points = grid if form is not fr.nonnegative_form else grid[grid >= 0]
    assert (vmap(at)(points[:, None, None].expand(-1, *x.shape)) >= least - 1e-12).all()
    if form is fr.nonnegative_form:
        assert (z >= 0).all()
        torch.testing.assert_close(weighted({"w": z}), (c * equation(z)).sum(), rtol=1e-12, atol=1e-14)
        assert weighted({"w": x}) == math.inf
        assert (0.0 * p.given(*case.hyper))(x) == math.inf
        step = p.prox({"w": x}, {"w": 0.7 * c}, *case.hyper, **case.options)["w"]
        assert_equal(z, step, rtol=1e-13, atol=1e-15)


# Sums


TERMS: dict[str, Callable[[Any], fr.Penalty]] = {
    "l1": lambda c: c["entries"] * fr.l1,
    "l1 of one strength": lambda c: 0.4 * fr.l1,
    "half_l2": lambda c: c["more"] * fr.half_l2,
    "half_l2 of rows": lambda c: c["rows"] * fr.half_l2,
    "group_lasso": lambda c: c["rows"] * fr.group_lasso,
    "group_lasso of leaves": lambda c: {"w": 0.6} * fr.group_lasso.given(dim=None),
    "elastic": lambda c: c["entries"] * fr.elastic.given(0.7, 0.4),
    "sparse_group_lasso": lambda c: c["rows"] * fr.sparse_group_lasso.given(0.7, 0.4),
    "l1_linf": lambda c: c["rows"] * fr.l1_linf,
    "total_variation": lambda c: c["rows"] * fr.total_variation,
    "total_variation of columns": lambda c: c["columns"] * fr.total_variation.given(dim=0),
    "slope": lambda c: c["rows"] * fr.slope.given(torch.tensor([1.0, 0.5, 0.25]), dim=-1),
    "mcp": lambda c: c["entries"] * fr.mcp.given(0.5, 3.0),
}
EXACT = {
    ("group_lasso", "group_lasso of leaves"),
    ("group_lasso", "half_l2"),
    ("group_lasso", "l1"),
    ("group_lasso", "total_variation"),
    ("group_lasso of leaves", "l1"),
    ("l1 of one strength", "total_variation"),
    ("l1", "slope"),
}


def random_weights(seed: int) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(seed)
    shapes = {"entries": (2, 3), "more": (2, 3), "rows": (2, 1), "columns": (1, 3)}
    return {name: {"w": torch.rand(shape, dtype=torch.float64) * 1.5} for name, shape in shapes.items()}


def test_sums_of_weighted_terms_are_exact_or_refuse():
    exact, refused = set(), {}
    names = sorted(TERMS)
    for i, first in enumerate(names):
        for second in names[i:]:
            for seed in range(3):
                c = random_weights(seed)
                total = TERMS[first](c) + TERMS[second](c)
                x = {"w": torch.randn(2, 3, dtype=torch.float64)}
                torch.testing.assert_close(total(x), TERMS[first](c)(x) + TERMS[second](c)(x))
                try:
                    z = total.prox(x, 0.6)
                except ValueError as error:
                    refused[first, second] = str(error)
                    break
                exact.add((first, second))
                least = objective(total, x, z, 0.6)
                moves = torch.randn(600, 2, 3, dtype=torch.float64)
                # Also along single entries, where kinks are.
                moves = torch.cat([moves, moves * (torch.rand(600, 2, 3) < 0.3)])
                for size in (1e-4, 1e-2, 0.3):
                    others = vmap(
                        lambda d, z=z, size=size, x=x, total=total: objective(total, x, {"w": z["w"] + size * d}, 0.6)
                    )
                    assert (others(moves) >= least - 1e-12).all(), (first, second)
                if "mcp" not in (first, second):
                    slope = fr.tree_map(lambda a, b: a - b, z, x)
                    assert fr.kkt_residual(z, slope, total, strength=0.6) <= 1e-12
    assert all(re.search("no (closed )?proximal operator", message) for message in refused.values())
    assert exact >= EXACT
    assert ("l1", "total_variation") not in exact


# Weights of every kind


def test_weights_may_be_numbers_tensors_and_prefixes():
    params = draw()
    column = torch.tensor([[1.0], [0.0], [2.0], [0.5]], dtype=torch.float64)
    for weights in (
        {"head": Layer(column, 0.5), "body": 2.0},
        {"head": Layer(column, torch.tensor(0.5)), "body": {"filters": 2, "scale": [2.0]}},
    ):
        if isinstance(weights["body"], dict):
            weights["body"]["scale"] = (2.0,)
        weighted = weights * fr.group_lasso
        expected = (column[:, 0] * params["head"].weight.square().sum(1).sqrt()).sum()
        expected = expected + 0.5 * params["head"].bias.abs().sum() + 2 * fr.group_lasso(params["body"])
        torch.testing.assert_close(weighted(params), expected)
    row = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close((row * fr.l1)(params["head"].weight), (row * params["head"].weight.abs()).sum())
    assert_equal((fr.l1 * row).prox(params["head"].weight, 0.1), fr.l1.prox(params["head"].weight, 0.1 * row))
    assert_equal(
        ([2.0, row] * fr.l1)([params["head"].bias, params["head"].weight]),
        (row * fr.l1)(params["head"].weight) + 2 * fr.l1(params["head"].bias),
    )


def test_weights_are_what_hyperparameters_and_options_are_where_both_say_it():
    w, g = draw(), draw(1)
    c, anchor = weights_for("l1", w), draw(2)
    rows = torch.tensor([1.0, 0.0, 3.0, 0.5], dtype=torch.float64)
    head = w["head"].weight
    pairs = [
        (c * fr.l1, fr.elastic.given(c, 1.0), w),
        (c * fr.elastic.given(1.0, 0.3), fr.elastic.given(c, 0.3), w),
        (fr.tree_map(lambda c: c / 2, c) * fr.anchored_l2.given(anchor), fr.ewc.given(anchor, c), w),
        (rows[:, None] * fr.group_lasso, fr.group_lasso.given(weights=rows), head),
        (rows[:, None] * fr.l1_linf, fr.l1_linf.given(weights=rows), head),
        (rows[:, None] * fr.exclusive_lasso, fr.exclusive_lasso.given(weights=rows), head),
        (2.0 * fr.group_l0.given(weights=rows), 2 * rows[:, None] * fr.group_l0, head),
    ]
    for found, expected, params in pairs:
        assert_equal(found(params), expected(params), rtol=1e-13)
        assert_equal(found.grad(params), expected.grad(params), rtol=1e-13, atol=1e-15)
        assert_equal(found.prox(params, 0.4), expected.prox(params, 0.4), rtol=1e-12, atol=1e-14)
        slopes = g if params is w else g["head"].weight
        assert_equal(found.residual(params, slopes), expected.residual(params, slopes), rtol=1e-12, atol=1e-14)


def test_weights_and_masks_both_hold():
    params = draw()
    weights = weights_for("l1", params)
    weighted = fr.l1.given(strength=weights, mask=fr.matrices)
    kept = weights["head"].weight * params["head"].weight.abs()
    torch.testing.assert_close(
        weighted(params), kept.sum() + (weights["body"]["filters"] * params["body"]["filters"].abs()).sum()
    )
    assert not weighted.grad(params)["head"].bias.any()
    assert_equal(weighted.prox(params, 0.3)["head"].bias, params["head"].bias)
    torch.testing.assert_close((weights * fr.l1)(params, mask=fr.matrices), weighted(params))
    # A weight that fits the leaves of the mask alone.
    rows = torch.rand(4, 1, dtype=torch.float64)
    only = fr.group_lasso.given(strength=rows, mask=fr.select("head.weight"))
    assert_equal(only.grad(params)["head"].weight, rows * fr.group_lasso.grad(params["head"].weight))
    assert_equal(only.prox(params, 0.3)["head"].weight, fr.group_lasso.prox(params["head"].weight, 0.3 * rows))
    torch.testing.assert_close(only(params), (rows * fr.group_lasso)(params["head"].weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_those_of_the_parameters(dtype):
    params = draw(dtype=dtype)
    for name in ("l1", "huber", "group_lasso", "elastic"):
        for kind in (torch.float64, dtype):
            weighted = given(ROWS[name], weights_for(name, params, dtype=kind))
            assert weighted(params).dtype == torch.float32
            for tree in (weighted.grad(params), weighted.prox(params, 0.5), weighted.residual(params, params)):
                assert {w.dtype for w in fr.tree_leaves(tree)} == {dtype}
        exact = given(ROWS[name], weights_for(name, params))(fr.tree_map(lambda w: w.double(), params))
        torch.testing.assert_close(
            given(ROWS[name], weights_for(name, params))(params).double(), exact, rtol=1e-5, atol=0
        )


def test_leaves_of_every_shape_are_weighted():
    leaves = [torch.tensor(0.7), torch.zeros(0), torch.zeros(0, 3), torch.zeros(3, 0), torch.ones(3, 4).T]
    for name in ("l1", "l0", "mcp", "group_lasso", "group_lasso of leaves", "exclusive_lasso", "linf", "slope"):
        for leaf in leaves:
            weighted = given(ROWS[name], weights_for(name, leaf))
            assert weighted(leaf).shape == ()
            assert weighted.grad(leaf).shape == weighted.prox(leaf, 0.5).shape == leaf.shape


def test_an_infinite_weight_is_paid_by_what_is_not_zero_alone():
    c = torch.tensor([math.inf, math.inf, 1.0])
    for p in (fr.l1, fr.half_l2, fr.l2, fr.l0, fr.huber.given(0.5), fr.group_lasso):
        weighted = c * p
        w = torch.tensor([0.0, 0.0, 2.0])
        torch.testing.assert_close(weighted(w), p(w[2:]))
        assert_equal(weighted.grad(w), p.grad(w))
        assert_equal(grad(weighted)(w), p.grad(w))
        assert weighted(torch.tensor([0.0, 1.0, 2.0])) == math.inf
        assert_equal(weighted.prox(torch.tensor([3.0, -1.0, 2.0]), 0.5)[:2], torch.zeros(2))
        assert math.inf * p.given() is not None
        assert (math.inf * p)(torch.zeros(3)) == 0
    assert fr.kkt_residual(w, torch.tensor([5.0, -9.0, -1.0]), c * fr.l1) == 0


def test_weights_that_fit_no_leaf_are_refused():
    params = draw()
    with pytest.raises(ValueError, match=r"lacks 'body'"):
        ({"head": 1.0} * fr.l1)(params)
    with pytest.raises(ValueError, match=r"at leaf '.*': .*shape \(7,\); expected one that broadcasts to"):
        (torch.ones(7) * fr.l1)(params)
    with pytest.raises(ValueError, match="the strength of l1 at 'head' is -1"):
        {"head": -1, "body": 1.0} * fr.l1
    with pytest.raises(TypeError, match="the strength of l1 at 'head' is 'x'"):
        {"head": "x", "body": 1.0} * fr.l1
    with pytest.raises(TypeError, match="the strength of l1 at 'head' is True"):
        {"head": True, "body": 1.0} * fr.l1
    with pytest.raises(TypeError, match="A schedule goes to"):
        {"head": lambda count: 1.0, "body": 1.0} * fr.l1
    with pytest.raises(TypeError, match=r"the strength of l1 \+ simplex is a dict"):
        {"head": 1.0, "body": 2.0} * (fr.l1 + fr.simplex)
    with pytest.raises(TypeError, match="the strength of simplex is a dict"):
        {"head": 1.0, "body": 2.0} * fr.simplex

    flat_norms = fr.penalty(
        gradient=lambda w: w,
        proximal=lambda w, step: w,
        separable=False,
        structure=fr.Structure(groups=lambda w: (1,)),
    )(lambda w: w.square().sum(1).sqrt())
    with pytest.raises(ValueError, match=r"at leaf 'w': .* got terms of shape \(4,\); expected terms that keep"):
        (torch.ones(4, 1) * flat_norms)({"w": torch.ones(4, 3)})


@pytest.mark.parametrize("factor", [0.0, 2.0, torch.tensor(0.0)])
def test_no_number_changes_a_constraint(factor):
    inside, outside = torch.tensor([0.25, 0.75]), torch.tensor([2.0, 0.75])
    assert (factor * fr.simplex)(inside) == 0
    assert (factor * fr.simplex)(outside) == math.inf
    assert_equal((factor * fr.simplex).prox(outside, 1.0), fr.simplex.project(outside))


def test_a_users_penalty_of_groups_is_weighted_by_what_it_tells_of_them():
    def norms(w):
        return w.square().sum(1, keepdim=True).sqrt()

    rows = fr.penalty(
        gradient=lambda w: w / norms(w),
        proximal=lambda w, step: w * (1 - step / norms(w)).relu(),
        structure=fr.Structure(groups=lambda w: (1,)),
        separable=False,
    )(norms)
    w, c = draw()["head"].weight, torch.tensor([[1.0], [2.0], [0.0], [0.3]], dtype=torch.float64)
    for rule in (lambda p: p(w), lambda p: p.grad(w), lambda p: p.prox(w, 0.5)):
        assert_equal(rule(c * rows), rule(c * fr.group_lasso), rtol=1e-13, atol=1e-15)


def test_weighted_penalties_are_restricted_to_numbers_of_at_least_0_and_coupled():
    w, c = draw()["head"].weight, torch.tensor([[1.0], [2.0], [0.0], [0.3]], dtype=torch.float64)
    inner, outer = fr.nonnegative_form(c * fr.l1), c * fr.nonnegative_form(fr.l1)
    for rule in (lambda p: p(w.abs()), lambda p: p.grad(w), lambda p: p.prox(w, 0.5), lambda p: p.residual(w, w)):
        assert_equal(rule(inner), rule(outer))
    params, family = {"a": w, "b": draw(1)["head"].weight}, {"a": 0, "b": 0}
    inner, outer = fr.coupled(c * fr.group_lasso, family), fr.coupled(fr.group_lasso, family).given(weights=c)
    for rule in (lambda p: p(params), lambda p: p.grad(params), lambda p: p.prox(params, 0.5)):
        assert_equal(rule(inner), rule(outer), rtol=1e-13, atol=1e-15)


# Where penalties are used


@pytest.mark.parametrize(
    "name", ["l1", "l0", "log_sum", "group_lasso", "sparse_group_lasso", "linf", "groups + elastic"]
)
def test_transforms_take_weighted_penalties_as_they_take_trees_of_strengths(name):
    case, params, grads = ROWS[name], draw(), draw(1)
    c = weights_for(name, params)
    makers: list[Callable[..., fr.Transform]] = [
        *([fr.add_penalty] if case.penalty.has_gradient else []),  # Others are refused there.
        lambda *p, **o: fr.prox_sgd(0.3, *p, momentum=0.5, **o),
        lambda *p, **o: fr.fista(0.3, *p, **o),
        lambda *p, **o: fr.rmda(0.3, *p, **o),
    ]
    if case.metric and name != "groups + elastic":
        makers += [lambda *p, **o: fr.prox_adam(0.3, *p, **o), lambda *p, **o: fr.ftrl(0.3, *p, **o)]
    for make in makers:
        found, expected = make(given(case, c)), make(case.penalty, *case.hyper, strength=c, **case.options)
        a, b = found.init(params), expected.init(params)
        for _ in range(2):
            u, a = found.update(grads, a, params)
            v, b = expected.update(grads, b, params)
            assert_equal(u, v, rtol=1e-12, atol=1e-14)


def test_weighted_penalties_are_fused():
    params, grads = draw(dtype=torch.float32), draw(1, dtype=torch.float32)
    weights = weights_for("l1", params, dtype=torch.float32)
    rows = weights_for("group_lasso", params, dtype=torch.float32)
    weighted = weights * fr.log_sum.given(0.3) + 0.5 * (rows * fr.group_lasso)
    value, slopes = fr.value_and_grad(weighted, backend="aot_eager")(params)
    torch.testing.assert_close(value, weighted(params))
    assert_equal(slopes, weighted.grad(params), rtol=1e-6, atol=1e-7)
    for tx in (fr.prox_adam(0.1, weights * fr.l1), fr.prox_sgd(0.1, weights * fr.l1 + rows * fr.group_lasso)):
        updates, _ = tx.update(grads, tx.init(params), params)
        step = fr.fuse(tx, backend="aot_eager")
        own, state = step.init(params)
        own, _ = step(own, grads, state)
        assert_equal(own, fr.apply_updates(params, updates), rtol=2e-5, atol=1e-6)


def test_the_adaptive_lasso_is_that_of_scikit_learn_with_scaled_columns():
    x, y = (torch.tensor(a) for a in load_diabetes(return_X_y=True))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    c = 1 / torch.linalg.lstsq(x, y[:, None]).solution[:, 0].abs()
    alpha = 0.02
    # With v = c w the weights move into the columns.
    fitted = Lasso(alpha, fit_intercept=False, tol=1e-14, max_iter=10**6).fit((x / c).cpu().numpy(), y.cpu().numpy())
    expected = torch.tensor(fitted.coef_) / c
    penalty = {"w": alpha * c} * fr.l1
    loss = lambda p: (x @ p["w"] - y).square().mean() / 2
    rate = 1 / float(torch.linalg.eigvalsh(x.T @ x / len(x)).amax())
    solutions = []
    for tx, steps in ((fr.prox_sgd(rate, penalty), 2500), (fr.fista(rate, penalty), 500)):
        params = {"w": torch.zeros(x.shape[1], dtype=torch.float64)}
        state = tx.init(params)
        for n in range(steps):
            updates, state = tx.update(grad(loss)(params), state, params)
            params = fr.apply_updates(params, updates)
            if n >= 20 and updates["w"].abs().max() <= 1e-15:  # It stays there.
                break
        solutions.append(state.solution if hasattr(state, "solution") else params)
    for solution in solutions:
        torch.testing.assert_close(solution["w"], expected, rtol=0, atol=1e-8)
        assert torch.equal(solution["w"] == 0, expected == 0)
    assert 0 < fr.sparsity(solutions[0]) < 1
    assert fr.kkt_residual(solutions[1], grad(loss)(solutions[1]), penalty) < 1e-8
    torch.testing.assert_close(
        loss(solutions[1]) + penalty(solutions[1]), loss({"w": expected}) + alpha * (c * expected.abs()).sum()
    )
    gap = fr.duality_gap(lambda p: x @ p["w"], solutions[1], y, penalty)
    assert 0 <= gap + 1e-12 < 1e-8
    start = {"w": torch.zeros_like(c)}
    largest = (grad(loss)(start)["w"] / (alpha * c)).abs().max()
    torch.testing.assert_close(fr.lambda_max(grad(loss)(start), penalty), largest, rtol=1e-14, atol=0)
