"""Sums of penalties: exact where they say so, and an error where they are not."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DEVICE, assert_equal, draw, flat, normal
from torch.func import vmap

import funcreg as fr


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("step", [0.0, 0.3, 4.0])
def test_sums_are_the_penalties_of_one_formula(step, metric):
    w = draw()
    h = {"metric": fr.tree_map(lambda w: w.abs() + 0.5, w)} if metric else {}
    alpha, rho = 0.7, 0.4
    elastic = (alpha * rho) * fr.l1 + (alpha * (1 - rho)) * fr.half_l2
    assert_equal(elastic.prox(w, step, **h), fr.elastic.prox(w, step, alpha, rho, **h), rtol=1e-12, atol=1e-14)
    assert_equal(elastic.grad(w), fr.elastic.grad(w, alpha, rho), rtol=1e-12)
    assert_equal(elastic.residual(w, w), fr.elastic.residual(w, w, alpha, rho), rtol=1e-12, atol=1e-14)
    for mixed in (
        (alpha * (1 - rho)) * fr.group_lasso + (alpha * rho) * fr.l1,
        (alpha * rho) * fr.l1 + (alpha * (1 - rho)) * fr.group_lasso,
    ):
        assert_equal(mixed.prox(w, step, **h), fr.sparse_group_lasso.prox(w, step, alpha, rho, **h), rtol=1e-9)
        assert_equal(mixed.residual(w, w), fr.sparse_group_lasso.residual(w, w, alpha, rho), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("total", [
    fr.l1 + fr.half_l2,
    0.3 * fr.group_lasso + fr.l2 + fr.l1,
    fr.l1 + fr.anchored_l2.given(0.7),
    fr.l1.given(mask=fr.matrices) + 0.0 * fr.half_l2,
    {"head": 0.0, "body": 2.0} * fr.half_l2 + 0.1 * fr.l1,
], ids=str)  # fmt: skip
def test_sums_with_a_ridge_take_steps_of_any_length(total, metric):
    w = draw()
    h = {"metric": fr.tree_map(lambda w: w.abs() + 0.5, w)} if metric else {}
    far, infinite = total.prox(w, 1e14, **h), total.prox(w, math.inf, **h)
    assert_equal(infinite, far, rtol=0, atol=1e-12)
    assert_equal(total.prox(w, torch.tensor(math.inf), **h), infinite)
    each = fr.tree_map(lambda w: torch.full_like(w[(..., *[slice(1)] * (w.ndim - 1))], math.inf), w)  # For each row.
    assert_equal(total.prox(w, each, **h), infinite)
    narrow = draw(dtype=torch.float32)
    h = {"metric": fr.tree_map(lambda w: w.abs() + 0.5, narrow)} if metric else {}
    assert_equal(total.prox(narrow, 1e30, **h), fr.tree_map(lambda z: z.float(), far), rtol=1e-6, atol=1e-6)


def test_a_sum_is_its_terms_in_any_order():
    terms = [0.3 * fr.group_lasso.given(dim=None), fr.group_lasso.given(dim=(1, 2, 3)), 0.2 * fr.l1, fr.l2]
    w = {"filters": draw()["body"]["filters"]}
    expected = (terms[0] + terms[1] + terms[2] + terms[3]).prox(w, 0.4)
    by_hand = fr.tree_map(lambda w: w / 1.8, w)
    inside = fr.l1.prox(by_hand, 0.4 / 1.8 * 0.2)
    outside = fr.group_lasso.prox(fr.group_lasso.prox(inside, 0.4 / 1.8), 0.3 * 0.4 / 1.8, dim=None)
    assert_equal(expected, outside, rtol=1e-13)
    assert_equal((terms[3] + terms[2] + terms[1] + terms[0]).prox(w, 0.4), expected, rtol=1e-13)
    assert_equal((terms[1] + (terms[3] + terms[0]) + terms[2]).prox(w, 0.4), expected, rtol=1e-13)


def test_a_curvature_for_each_entry_goes_into_the_metric():
    fisher = draw(3)["head"].weight.abs()

    @fr.penalty(
        gradient=lambda w, f: f * w,
        proximal=lambda w, step, f: w / (1 + step * f),
        separable=True,
        structure=fr.Structure(curvature=lambda f: f),
    )
    def weighted_ridge(w, f):
        return 0.5 * f * w.square()

    w = {"w": draw()["head"].weight}
    total = weighted_ridge.given(fisher) + 0.8 * fr.group_lasso
    z = total.prox(w, 0.5)
    objective = lambda z: 0.5 * (flat(z) - flat(w)).square().sum() + 0.5 * total(z)
    least = objective(z)
    assert (flat(z) == 0).any()
    for seed in range(200):
        for size in (1e-4, 1e-2, 1.0):
            other = {"w": z["w"] + size * draw(seed)["head"].weight}
            assert objective(other) >= least - 1e-12
    with pytest.raises(ValueError, match="with a step of its own for each entry"):
        (total + fr.group_lasso.given(dim=None)).prox(w, 0.5)


# Pairs without an exact proximal operator, and whether they have none only in a metric.
REFUSED = {
    "rows and columns": (fr.group_lasso.given(dim=0), fr.group_lasso.given(dim=1), False),
    "an unknown one": (fr.l1, fr.Penalty(fr.global_norm, lambda p: p, lambda p, step, metric=None: p), False),
    "groups in groups": (fr.group_lasso, fr.group_lasso.given(dim=None), True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_sum_has_value_and_gradient_and_says_why_it_has_no_prox(name):
    first, second, in_metric = REFUSED[name]
    total, w = 0.5 * first + second, {"w": draw()["head"].weight}
    torch.testing.assert_close(total(w), 0.5 * first(w) + second(w))
    assert_equal(total.grad(w), fr.tree_map(lambda a, b: 0.5 * a + b, first.grad(w), second.grad(w)))
    if in_metric:
        total.prox(w, 0.5)
    h = {"metric": fr.tree_map(torch.ones_like, w)} if in_metric else {}
    with pytest.raises(ValueError, match=r"has a value and a gradient, but.*no proximal operator that is known"):
        total.prox(w, 0.5, **h)
    tx = fr.prox_adam(0.1, total)
    if in_metric:  # One number of the metric for all.
        assert fr.tree_leaves(tx.update(w, tx.init(w), w)[0])[0].isfinite().all()
        return
    with pytest.raises(ValueError, match="no proximal operator"):
        tx.update(w, tx.init(w), w)


def test_terms_on_leaves_of_their_own_always_add_up():
    w = draw()
    total = fr.group_lasso.given(dim=0, mask=fr.select("head.weight")) + fr.group_lasso.given(mask=fr.select("body.*"))
    z = total.prox(w, 0.5)
    assert_equal(z["head"].weight, fr.group_lasso.prox(w["head"].weight, 0.5, dim=0))
    assert_equal(z["head"].bias, w["head"].bias)
    assert_equal(z["body"], fr.group_lasso.prox(w["body"], 0.5))
    overlapping = total + fr.group_lasso.given(dim=1, mask=fr.matrices)
    with pytest.raises(ValueError, match=r" \+ group_lasso.given\(dim=1, mask=matrices\) has a value"):
        overlapping.prox(w, 0.5)


def test_joint_norms_follow_l1_where_they_say_that_they_keep_signs():
    def joint_prox(params, step, metric=None):
        norm = fr.global_norm(params)
        return fr.tree_map(lambda w: w * torch.relu(norm - step) / norm, params)

    joint = fr.Penalty(
        fr.global_norm,
        lambda p: fr.tree_map(lambda w: w / fr.global_norm(p), p),
        joint_prox,
        structure=fr.Structure(keeps=("signs",)),
    )
    w = draw()
    assert_equal((joint + fr.l1).prox(w, 0.2), joint_prox(fr.l1.prox(w, 0.2), 0.2), rtol=1e-12)


#: Sums with a constraint, or with trees of groups, for 1 to 3 entries.
BOUNDED = {
    "l1, bounds around 0": fr.l1 + fr.box.given(-0.4, 0.7),
    "l1, bounds above 0": 0.5 * fr.l1 + fr.box.given(0.2, 0.7),
    "an elastic net of at least 0": fr.nonnegative + fr.elastic.given(0.8, 0.5),
    "huber and bounds": fr.huber.given(0.3) + fr.linf_ball.given(0.5),
    "l1 in a ball": fr.l1 + fr.l2_ball.given(0.6),
    "l1 with rows in balls": 0.5 * fr.l1 + fr.half_l2 + fr.max_norm.given(0.6, dim=None),
    "l1 in a ball of l1": fr.l1 + fr.l1_ball.given(0.6),
    "groups of at least 0": 0.5 * fr.group_lasso.given(dim=None) + fr.nonnegative,
    "groups of at least 0 in a ball": fr.nonnegative + 0.5 * fr.group_lasso.given(dim=None) + fr.l2_ball.given(0.6),
    "at least 0, in a ball of l1": fr.l1_ball.given(0.6) + fr.nonnegative,
    "mcp of at least 0": fr.mcp.given(0.7, 3.0) + fr.nonnegative,
    "largest entries of at least 0": fr.half_l2 + fr.nonnegative + fr.linf.given(),
    "l1 and nested groups": 0.5 * fr.l1 + fr.tree_lasso.given(groups=((0, (1,)), (2,))),
}


@pytest.mark.parametrize("metric", [False, True], ids=["plain", "in a metric"])
@pytest.mark.parametrize("total", BOUNDED.values(), ids=BOUNDED)
def test_bounds_follow_what_they_leave_a_solution(total, metric):
    """Nothing near the point, nor on a grid, is better; and it is where the residual of its equation is 0."""
    generator = torch.Generator().manual_seed(0)
    w = torch.tensor([[1.3, -0.9, 0.4], [0.1, -0.2, 2.0], [0.6, 0.0, -0.5]], dtype=torch.float64, device=DEVICE)
    h = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64, device=DEVICE)
    line = torch.linspace(-1, 1, 41, dtype=torch.float64, device=DEVICE)
    grid = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    for x in w:
        if metric and not total.in_metric(x):
            continue
        weights = h if metric else torch.ones_like(h)
        z = total.prox(x, 0.4, metric=h) if metric else total.prox(x, 0.4)
        near = z + 0.01 * normal(generator, 500, 3)
        at = vmap(lambda z, x=x, weights=weights: 0.5 * (weights * (z - x).square()).sum() + 0.4 * total(z))
        assert at(z[None]).isfinite()
        assert (at(z[None]) <= at(torch.cat([grid, near])) + 1e-12).all()
        assert_equal(total.residual(z, weights * (z - x) / 0.4), torch.zeros_like(z), atol=1e-12)


def test_bounds_on_what_is_not_convex_are_refused():
    with pytest.raises(ValueError, match="no proximal operator that is known"):
        (fr.mcp.given(1.0, 3.0) + fr.box.given(0.2, 0.7)).prox(torch.ones(2), 0.1)


def test_factors_may_be_tensors_of_an_ensemble():
    w, factors = draw(dtype=torch.float32), torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    many = vmap(lambda c: (c * fr.l1 + 0.3 * (fr.group_lasso + c * fr.half_l2)).prox(w, 0.5))(factors)
    values = vmap(lambda c: (c * fr.l1 + 0.3 * fr.group_lasso)(w))(factors)
    for i, c in enumerate(factors.tolist()):
        expected = (c * fr.l1 + 0.3 * fr.group_lasso + 0.3 * c * fr.half_l2).prox(w, 0.5)
        assert_equal(fr.tree_map(lambda z, i=i: z[i], many), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(values[i], (c * fr.l1 + 0.3 * fr.group_lasso)(w))
    assert {z.dtype for z in fr.tree_leaves(many)} == {torch.float32}


def test_hyperparameters_of_terms_may_be_trees():
    w, rho = draw(), {"head": 0.2, "body": torch.tensor(0.9, dtype=torch.float64)}
    total = fr.elastic.given(0.5, rho) + 0.1 * fr.group_lasso
    z = total.prox(w, 0.5)
    assert_equal(z["head"], (fr.elastic.given(0.5, 0.2) + 0.1 * fr.group_lasso).prox(w["head"], 0.5), rtol=1e-12)
    assert_equal(z["body"], (fr.elastic.given(0.5, 0.9) + 0.1 * fr.group_lasso).prox(w["body"], 0.5), rtol=1e-12)


def test_sixteen_bit_sums_are_rounded_once():
    w = draw(dtype=torch.bfloat16)
    total = 0.1 * fr.l1 + 0.3 * fr.group_lasso + 0.7 * fr.half_l2
    exact = total.prox(fr.tree_map(lambda w: w.float(), w), 0.3)
    assert_equal(total.prox(w, 0.3), fr.tree_map(lambda z: z.bfloat16(), exact))


def test_what_is_no_penalty_or_lacks_hyperparameters_is_refused():
    with pytest.raises(TypeError, match=r"elastic still takes alpha, rho; .* 0.1 \* elastic.given\(alpha, rho\)"):
        fr.l1 + fr.elastic
    with pytest.raises(ValueError, match="the strength of l1 is -1"):
        -1 * fr.l1
    with pytest.raises(TypeError, match="expected a number or a tensor without dimensions"):
        torch.ones(3) * fr.simplex
    with pytest.raises(TypeError, match="A schedule goes to"):
        (lambda count: 0.1) * fr.l1
    with pytest.raises(TypeError, match="A schedule goes to"):
        fr.elastic.given(lambda count: 0.1, 0.5)
    with pytest.raises(TypeError, match="unsupported operand"):
        fr.l1 + 1
    assert repr(0.1 * (fr.l1 + fr.l2)) == "0.1 * (l1 + l2)"


@pytest.mark.parametrize("divisor", [2, 4.0, torch.tensor(0.5), {"head": 2.0, "body": torch.tensor(4.0)}], ids=str)
def test_a_penalty_divided_by_a_number_is_that_share_of_it(divisor):
    w, share = draw(), fr.tree_map(lambda c: 1 / c, divisor)
    for p in (fr.l1, fr.elastic.given(0.3, 0.5), fr.group_lasso + fr.half_l2):
        assert_equal((p / divisor)(w), (share * p)(w))
        assert_equal((p / divisor).grad(w), (share * p).grad(w))
        assert_equal((p / divisor).prox(w, 0.7), (share * p).prox(w, 0.7))
    assert repr(fr.l1 / 2) == "0.5 * l1"


@pytest.mark.parametrize(("divisor", "error", "said"), [
    (0, ValueError, "the divisor of l1 is 0; expected a number above 0"),
    (-2.0, ValueError, "the strength of l1 is -2"),
    ({"head": 0.0, "body": 1.0}, ValueError, "the divisor of l1 at 'head' is 0.0; expected a number above 0"),
    (fr.l2, TypeError, "l1 is divided by l2; expected a number above 0, or a tree of such"),
    ("half", TypeError, "the strength of l1 is 'half'; expected a number"),
    (lambda count: 2.0, TypeError, "A schedule goes to"),
])  # fmt: skip
def test_a_penalty_is_divided_by_numbers_above_zero_alone(divisor, error, said):
    with pytest.raises(error, match=said):
        fr.l1 / divisor


def test_sums_are_built_and_used_inside_compiled_functions():
    def f(w, c):
        return (0.3 * fr.group_lasso + fr.l1.given(strength=c) + fr.half_l2).prox(w, 0.5)

    w, c = draw(), torch.tensor(0.7, dtype=torch.float64)
    assert_equal(torch.compile(f, fullgraph=True, backend="eager")(w, c), f(w, c), rtol=1e-12)


def test_masks_of_sums_and_of_terms_both_hold():
    w = draw()
    total = (fr.l1.given(mask=fr.matrices) + fr.half_l2).given(strength=0.5, mask={"head": True, "body": False})
    z = (total + fr.l2.given(mask=fr.select("body.scale.*"))).prox(w, 1.0)
    assert_equal(z["head"].weight, fr.elastic.prox(w["head"].weight, 1.0, 1.0, 0.5), rtol=1e-13)
    assert_equal(z["head"].bias, w["head"].bias / 1.5, rtol=1e-13)
    assert_equal(z["body"]["filters"], w["body"]["filters"])
    assert_equal(z["body"]["scale"], fr.tree_map(lambda w: w / 3, w["body"]["scale"]), rtol=1e-13)


def _apart_gradient(w):
    slope = (w[1] - w[0]).sign()
    return torch.stack([-slope, slope])


def _apart_proximal(w, step):
    gap = fr.shrink(w[1] - w[0], 2 * step) / 2
    middle = (w[0] + w[1]) / 2
    return torch.stack([middle - gap, middle + gap])


def test_differences_come_before_l1_and_before_one_norm_of_all():
    structure = fr.Structure(needs=("order", "directions"), groups=lambda w: (0,))
    apart = fr.penalty(gradient=_apart_gradient, proximal=_apart_proximal, structure=structure)(
        lambda w: (w[1] - w[0]).abs()
    )
    line = torch.linspace(-3, 3, 121, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    for total in (
        0.3 * fr.l1 + 0.4 * apart,
        0.4 * apart + 0.5 * fr.group_lasso.given(dim=None) + 0.2 * fr.l1 + 0.5 * fr.half_l2,
    ):
        for w in grid[torch.randperm(len(grid))[:20]]:
            z = total.prox(w, 0.9)
            at = vmap(lambda z, w=w, total=total: 0.5 * (z - w).square().sum() + 0.9 * total(z))
            assert at(z[None]) <= at(grid).min() + 1e-12
            assert (at(grid).min() - at(z[None])) < 1e-2
    with pytest.raises(ValueError, match="in a metric"):
        (fr.l1 + apart).prox(w, 1.0, metric=torch.ones_like(w))
    with pytest.raises(ValueError, match="no proximal operator"):
        (fr.group_lasso.given(dim=()) + apart).prox(w, 1.0)


@pytest.mark.slow
def test_sums_are_fused_and_valued_as_other_penalties_are():
    total = 0.3 * fr.l1 + 0.2 * fr.group_lasso.given(dim=None, mask=fr.matrices) + 0.1 * fr.half_l2
    w = {"a": draw(dtype=torch.float32)["head"].weight, "b": draw(dtype=torch.float32)["head"].bias}
    value, slopes = fr.value_and_grad(total, backend="aot_eager")(w)
    torch.testing.assert_close(value, total(w))
    assert_equal(slopes, total.grad(w), rtol=1e-6, atol=1e-7)
    tx = fr.prox_adam(0.1, total)
    updates, _ = tx.update(w, tx.init(w), w)
    step = fr.fuse(tx, backend="aot_eager")
    params, state = step.init(w)
    params, _ = step(params, w, state)
    assert_equal(params, fr.apply_updates(w, updates), rtol=2e-5, atol=1e-6)
