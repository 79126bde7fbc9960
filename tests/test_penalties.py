"""The laws of penalties: each test holds for every row of the table."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from cases import (
    CONSTRAINTS,
    DEVICE,
    GRADIENT_ALONE,
    PENALTIES,
    Layer,
    assert_equal,
    cpu_only,
    draw,
    draw_fours,
    flat,
    known,
    nearby,
    normal,
    stacked,
    uniform,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call, grad, grad_and_value, hessian, jvp, vmap
from torch.profiler import profile

import funcreg as fr
from funcreg.core.leafwise import step_times

every_penalty = pytest.mark.parametrize("case", PENALTIES.values(), ids=PENALTIES)
CONVEX = {name: case for name, case in PENALTIES.items() if not case.nonconvex}
every_convex_penalty = pytest.mark.parametrize("case", CONVEX.values(), ids=CONVEX)
every_penalty_of_complex_leaves = pytest.mark.parametrize(
    "case", [c for c in PENALTIES.values() if c.complex], ids=[n for n, c in PENALTIES.items() if c.complex]
)
every_penalty_on_leaves = pytest.mark.parametrize(
    "case", [c for c in PENALTIES.values() if c.equation], ids=[n for n, c in PENALTIES.items() if c.equation]
)
every_convex_penalty = pytest.mark.parametrize(
    "case", [c for c in PENALTIES.values() if not c.nonconvex], ids=[n for n, c in PENALTIES.items() if not c.nonconvex]
)
every_compiled_penalty = pytest.mark.parametrize(
    "case",
    [c for c in PENALTIES.values() if not c.uncompiled],
    ids=[n for n, c in PENALTIES.items() if not c.uncompiled],
)
every_penalty_of_every_shape = pytest.mark.parametrize(
    "case",
    [c for c in PENALTIES.values() if c.equation and not c.unshaped],
    ids=[n for n, c in PENALTIES.items() if c.equation and not c.unshaped],
)


def objective(case, x, z, step, metric=None):
    """What the proximal operator minimizes over z."""
    h = torch.ones(()) if metric is None else flat(metric)
    return 0.5 * (h * (flat(z) - flat(x)).abs().square()).sum() + step * case.value(z)


@functools.cache
def drawn(first, count, scale=1.0):
    """Trees of some seeds, stacked: laws over many trees are mapped over them."""
    return stacked([draw(seed, scale=scale) for seed in range(first, first + count)])


def around(z, sizes):
    """Twenty trees at each of some distances from one, stacked."""
    return fr.tree_map(lambda a, d: torch.cat([a + size * d for size in sizes]), z, drawn(0, 20))


def worths(case, x, others, step, metric=None):
    """What the proximal operator minimizes, at each of some trees."""
    return vmap(lambda z: objective(case, x, z, step, metric))(others)


def tiny_members():
    """Three trees of matrices, stacked along a first dimension."""
    trees = [{"a": draw(seed)["head"].weight, "b": draw(seed + 9)["head"].weight} for seed in range(3)]
    return trees, fr.tree_map(lambda *leaves: torch.stack(leaves), *trees)


@every_penalty_on_leaves
def test_value_is_the_sum_of_the_equation_over_leaves(case):
    params = draw()
    expected = sum(case.equation(w) for w in fr.tree_leaves(params))
    torch.testing.assert_close(case.value(params), expected, rtol=1e-13, atol=0)


@every_penalty
def test_gradient_is_that_of_autograd_away_from_kinks(case):
    params = fr.tree_map(lambda w: w + 0.1 * (w == 0), draw())
    assert_equal(case.grad(params), grad(case.value)(params), rtol=1e-12, atol=1e-14)


@every_penalty
def test_gradient_at_the_centre_is_zero_also_by_autograd_and_twice(case):
    params = fr.tree_map(lambda w: torch.full_like(w, case.centre), draw())
    zeros = fr.tree_map(torch.zeros_like, params)
    assert_equal(case.grad(params), zeros)
    assert_equal(grad(case.value)(params), zeros)
    row = {"w": torch.full((2, 2), case.centre, dtype=torch.float64)}
    assert flat(hessian(case.value)(row)).isfinite().all()
    assert flat(vmap(grad(case.value))(fr.tree_map(lambda w: torch.stack([w, w + 1]), row))).isfinite().all()


@every_penalty
def test_prox_minimizes_its_objective(case):
    x = draw()
    shares = stacked([fr.tree_map(lambda a, t=t: t * a, x) for t in (0.0, 0.25, 0.75, 1.0)])
    for step in (0.0, 0.1, 1.0, 3.0, 100.0):
        z = case.prox(x, step)
        others = fr.tree_map(lambda a, b: torch.cat([a, b]), around(z, (1e-6, 1e-3, 0.1, 1.0)), shares)
        assert (worths(case, x, others, step) >= objective(case, x, z, step) - 1e-12).all()


@every_convex_penalty
def test_what_prox_takes_away_is_a_subgradient_where_it_lands(case):
    x, others = draw(), drawn(50, 30, 2.0)
    values, vectors = vmap(case.value)(others), vmap(flat)(others)
    for step in (0.1, 1.0, 3.0):
        z = case.prox(x, step)
        slope = (flat(x) - flat(z)) / step
        assert (values >= case.value(z) + (vectors - flat(z)) @ slope - 1e-10).all()


@every_convex_penalty
def test_prox_is_firmly_nonexpansive(case):
    for seed in range(10):
        x, y = draw(seed), draw(seed + 100, scale=2.0)
        moved = flat(case.prox(x, 0.7)) - flat(case.prox(y, 0.7))
        assert moved @ moved <= moved @ (flat(x) - flat(y)) + 1e-12


@every_convex_penalty
def test_the_dual_prox_lands_at_a_subgradient_of_what_it_takes_away(case):
    x, others = draw(scale=2.0), drawn(50, 30, 2.0)
    values, vectors = vmap(case.value)(others), vmap(flat)(others)
    for step in (0.1, 1.0, 3.0):
        z = case.penalty.prox_dual(x, step, *case.hyper, **case.options)
        # It is in the subdifferential there, as this is in that of the dual.
        y = fr.tree_map(lambda a, b, step=step: (a - b) / step, x, z)
        assert (values >= case.value(y) + (vectors - flat(y)) @ flat(z) - 1e-10).all()
    whole = fr.tree_map(
        lambda a, b: a + b, case.prox(x, 1.0), case.penalty.prox_dual(x, 1.0, *case.hyper, **case.options)
    )
    assert_equal(whole, x, rtol=1e-12, atol=1e-14)


@every_convex_penalty
def test_the_dual_prox_takes_steps_masks_and_dtypes_as_prox_does(case):
    dual = lambda x, step, **kwargs: case.penalty.prox_dual(x, step, *case.hyper, **case.options, **kwargs)
    x, mask = draw(), fr.select("head.*")
    head = {"head": x["head"]}
    assert_equal(dual(x, 0.5, mask=mask), {**x, "head": dual(head, 0.5)["head"]})
    if case.equation:
        steps = {"head": 0.5, "body": torch.tensor(2.0, dtype=torch.float64)}
        assert_equal(dual(x, steps), {**dual(head, 0.5), **dual({"body": x["body"]}, 2.0)}, rtol=1e-12, atol=1e-15)
    assert {w.dtype for w in fr.tree_leaves(dual(draw(dtype=torch.bfloat16), torch.tensor(0.5)))} == {torch.bfloat16}
    many = vmap(lambda step: dual(x, step))(torch.tensor([0.5, 2.0], dtype=torch.float64))
    assert_equal(fr.tree_map(lambda w: w[1], many), dual(x, 2.0), rtol=1e-12, atol=1e-15)
    for step in (0.0, -1.0, math.nan, {"head": 0.0, "body": 1.0}):
        with pytest.raises(ValueError, match=r"^step"):
            dual(x, step)


def test_the_dual_prox_has_its_closed_forms():
    x = draw(scale=2.0)
    assert_equal(fr.l1.prox_dual(x, 0.7), fr.linf_ball.project(x, 1.0), rtol=1e-12, atol=1e-15)
    assert_equal(fr.half_l2.prox_dual(x, 0.7), fr.tree_map(lambda w: w / 1.7, x), rtol=1e-12)
    assert_equal(fr.group_lasso.prox_dual(x, 0.7), fr.max_norm.project(x, 1.0), rtol=1e-12, atol=1e-15)
    assert_equal(fr.l1_ball.prox_dual(x, 0.7, 2.0), fr.linf.prox(x, 1.4, dim=None), rtol=1e-12, atol=1e-14)
    assert_equal((0.3 * fr.l1).prox_dual(x, 0.7), fr.linf_ball.project(x, 0.3), rtol=1e-12, atol=1e-15)
    assert_equal(fr.nuclear.prox_dual(x, 0.7), fr.spectral_ball.project(x, 1.0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["l1", "l2", "half_l2", "elastic", "a user's"])
def test_prox_of_one_entry_is_the_minimum_on_a_grid(name):
    case = PENALTIES[name]
    for x in torch.linspace(-4, 4, 33, dtype=torch.float64):
        for step in (0.3, 1.7):
            z = case.prox(x, step)
            at = vmap(lambda z, x=x, step=step: 0.5 * (z - x) ** 2 + step * case.equation(z))
            assert (at(torch.linspace(-5, 5, 20001, dtype=torch.float64)) >= at(z[None]) - 1e-12).all()


@every_penalty
def test_step_zero_is_the_identity(case):
    assert_equal(case.prox(draw(), 0.0), draw(), rtol=1e-15)
    assert_equal(case.prox(draw(), torch.zeros(())), draw(), rtol=1e-15)


@every_penalty
def test_the_derivative_in_a_step_of_zero_is_that_of_a_small_one(case):
    x = draw()
    if case.tied:
        x = fr.tree_map(lambda w: w + 0.1 * (w == 0), x)
    zero, small = torch.zeros((), dtype=torch.float64), 1e-6
    point = lambda step: flat(case.prox(x, step))
    expected = (-3 * point(zero) + 4 * point(zero + small) - point(zero + 2 * small)) / (2 * small)
    _, forward = jvp(point, (zero,), (zero + 1,))
    torch.testing.assert_close(forward, expected, rtol=1e-5, atol=1e-6)
    backward = grad(lambda step: (point(step) * flat(draw(3))).sum())(zero)
    torch.testing.assert_close(backward, forward @ flat(draw(3)), rtol=1e-10, atol=1e-12)


def test_the_derivative_in_a_step_of_zero_has_its_closed_forms():
    size = lambda p, *hyper: grad(lambda t: flat(p.prox({"w": torch.tensor([2.0, -2.0])}, t, *hyper)).abs().sum())
    zero = torch.tensor(0.0)
    assert size(fr.l1)(zero) == size(fr.mcp, 1.0, math.inf)(zero) == -2
    assert size(fr.elastic, 1.0, 0.5)(zero) == -3
    assert size(fr.linf)(torch.tensor(0.5)) == -1


def with_zeros(case):
    """Leaves with zeros, and ways to move one: beside others in its row, alone in its row, and in a row of zeros."""
    matrix = torch.tensor([[0.0, 1.3], [0.0, 0.0], [0.4, -2.0]], dtype=torch.float64)
    ways = torch.eye(6, dtype=torch.float64).reshape(6, 3, 2)
    yield matrix, [ways[0], ways[2]]
    if case.least_ndim < 2:
        yield matrix[:, 0].clone(), [ways[0, :, 0], ways[2, :, 0]]


@pytest.mark.parametrize("name", [*PENALTIES, *GRADIENT_ALONE])
def test_the_derivative_of_the_gradient_is_that_of_autograd_also_at_zeros(name):
    case = {**PENALTIES, **GRADIENT_ALONE}[name]
    for w, ways in with_zeros(case):
        for way in ways:
            _, own = jvp(case.grad, (w,), (way,))
            _, twice = jvp(grad(case.value), (w,), (way,))
            torch.testing.assert_close(own, twice, rtol=1e-9, atol=1e-9)


@every_penalty
def test_derivatives_at_zeros_are_those_of_differences_that_agree_from_both_sides(case):
    d = 1e-6
    for w, ways in with_zeros(case):
        way = ways[0]
        for f in (case.grad, lambda w: case.prox(w, 0.5)):
            before, here, after = f(w - d * way), f(w), f(w + d * way)
            smooth = ((after + before - 2 * here).abs() < 1e-4 * d) & ((after - before).abs() < 1e3 * d)
            _, slope = jvp(f, (w,), (way,))
            torch.testing.assert_close(slope[smooth], ((after - before) / (2 * d))[smooth], rtol=1e-4, atol=1e-4)


def scales_with_parameters(case):
    twice = fr.tree_map(lambda w: 2 * w, draw())
    return bool((case.value(twice) - 2 * case.value(draw())).abs() < 1e-12)


SCALED = {name: case for name, case in PENALTIES.items() if scales_with_parameters(case)}


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e19, 1e30])
@pytest.mark.parametrize("name", SCALED)
def test_what_scales_with_parameters_does_so_at_every_magnitude(name, size):
    case = SCALED[name]
    plain = draw(dtype=torch.float32)
    scaled = fr.tree_map(lambda w: w * size, plain)
    close = {"rtol": 2e-5, "atol": 1e-6}
    expected = case.grad(plain)
    torch.testing.assert_close(case.value(scaled) / size, case.value(plain), rtol=1e-5, atol=0)
    assert_equal(case.grad(scaled), expected, **close)
    assert_equal(grad(case.value)(scaled), grad(case.value)(plain), **close)
    back = fr.tree_map(lambda z: z / size, case.prox(scaled, 0.5 * size))
    assert_equal(back, case.prox(plain, 0.5), rtol=1e-4, atol=1e-5)
    together = vmap(case.value)(fr.tree_map(lambda a, b: torch.stack([a, b]), plain, scaled))
    torch.testing.assert_close(together / torch.tensor([1.0, size]), case.value(plain).expand(2), rtol=1e-5, atol=0)
    _, along = jvp(case.value, (scaled,), (plain,))
    torch.testing.assert_close(along.float(), case.value(plain), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_norms_beside_each_other_are_right_at_every_magnitude(size):
    w = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]) * torch.tensor([[size], [1.0], [1.0]])
    for f in (fr.group_lasso, lambda w: fr.group_lasso(w, dim=0), fr.global_norm):
        exact = grad(f)(w.double()).float()
        torch.testing.assert_close(f(w), f(w.double()).float())
        torch.testing.assert_close(grad(f)(w), exact)
        torch.testing.assert_close(vmap(grad(f))(w[None])[0], exact)
        leaf = w.clone().requires_grad_()
        f(leaf).backward()
        torch.testing.assert_close(leaf.grad, exact)
        both = lambda w, f=f: (f(w), grad(f)(w))
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(w), (f(w), exact))


@pytest.mark.parametrize("name", [*PENALTIES, *GRADIENT_ALONE])
def test_autocast_changes_nothing(name):
    case = {**PENALTIES, **GRADIENT_ALONE}[name]
    params = draw(dtype=torch.float32)

    def everything():
        leaves = fr.tree_map(lambda w: w.clone().requires_grad_(), params)
        case.value(leaves).backward()
        found = [case.value(params), case.grad(params), grad(case.value)(params), fr.tree_map(lambda w: w.grad, leaves)]
        if name in PENALTIES:
            found += [case.prox(params, 0.5), grad(lambda p: flat(case.prox(p, 0.5)).square().sum())(params)]
        return found

    expected = everything()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(torch.device(DEVICE).type, dtype=dtype):
            assert_equal(everything(), expected)


def test_autocast_changes_nothing_in_compiled_code():
    w = torch.randn(5, 4)
    everything = lambda w: (fr.nuclear.prox(w, 0.5), fr.orthogonality(w), grad(fr.orthogonality)(w))
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        assert_equal(compiled(w), everything(w), rtol=1e-5, atol=1e-5)
    assert torch.linalg.matrix_rank(fr.nuclear.prox(w, 1.0)) < 4


@pytest.mark.parametrize("penalty", [fr.orthogonality, fr.orthogonality_offdiagonal], ids=lambda p: p.__name__)
def test_products_of_rows_are_right_or_infinite_at_every_magnitude(penalty):
    w = normal(torch.Generator().manual_seed(0), 4, 3)
    for dtype, scale in itertools.product((torch.float32, torch.bfloat16), (1.0, 1e5, 1e9, 1e12)):
        x = (w * scale).to(dtype)
        torch.testing.assert_close(penalty(x).double(), penalty(x.double()).float().double(), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            penalty.grad(x).double(), penalty.grad(x.double()), rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=0
        )
        torch.testing.assert_close(
            grad(penalty)(x), penalty.grad(x), rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=0
        )
    for scale in (1e15, 1e20, 1e37):
        x = (w * scale).bfloat16()
        assert penalty(x) == math.inf
        assert not penalty.grad(x).isnan().any()


@cpu_only  # Elsewhere reading a number waits for the device.
@pytest.mark.parametrize("penalty", [fr.orthogonality, fr.orthogonality_offdiagonal], ids=lambda p: p.__name__)
def test_products_of_rows_of_ordinary_magnitudes_are_scaled_by_nothing(penalty):
    with profile() as seen:
        penalty(torch.ones(4, 3)), penalty.grad(torch.ones(4, 3))
    assert "aten::div" not in {event.name for event in seen.events()}


@cpu_only  # Elsewhere reading a number waits for the device.
def test_a_strength_of_each_member_that_is_seen_to_be_finite_is_multiplied_in_one_pass():
    params, strengths = torch.randn(3, 5), torch.tensor([0.5, 2.0, 1.0])
    both = lambda w, alpha: (fr.elastic(w, alpha, 0.4), fr.elastic.grad(w, alpha, 0.4))
    passes = []
    for given_strength, dim in ((0.5, None), (strengths, 0)):
        with profile() as seen:
            vmap(both, (0, dim))(params, given_strength)
        passes.append([event.name for event in seen.events()].count("aten::where"))
    assert passes[0] == passes[1]
    tangents = jvp(vmap(both), (params, strengths), (params, strengths))[1]
    assert {x.dtype for x in tangents} == {torch.float32}


# Wrong numbers


def wrong_values(case):
    """For each hyperparameter with bounds, the place and a number outside of them."""
    names = [p for p in case.penalty.__signature__.parameters if p != "params"]
    for i, name in enumerate(names[: len(case.hyper)]):
        least, greatest = case.penalty.bounds.get(name, (-math.inf, math.inf))
        for value in (least - 1, greatest + 1, math.nan):
            if math.isfinite(value) or math.isnan(value):
                yield i, name, value


@every_penalty
def test_infinite_hyperparameters_and_strengths_are_limits_and_not_nan(case):
    params, g = draw(dtype=torch.float32), draw(1, dtype=torch.float32)
    names = [p for p in case.penalty.__signature__.parameters if p != "params"][: len(case.hyper)]
    found = []
    for i, name in enumerate(names):
        if case.penalty.bounds.get(name, (0, 0))[1] == math.inf:
            for infinite in (math.inf, 1e39, known(math.inf)):
                hyper = [*case.hyper[:i], infinite, *case.hyper[i + 1 :]]
                found += [f(params, *hyper, **case.options) for f in (case.penalty, case.penalty.grad)]
                found += [case.penalty.prox(params, step, *hyper, **case.options) for step in (0.0, 0.5, 1e20)]
                found += [fr.kkt_residual(params, g, case.penalty, *hyper, **case.options)]
                assert_equal(case.penalty.prox(params, 0.0, *hyper, **case.options), params)
    if case.penalty.__module__ != "cases":  # Its rules are a user's.
        for strength in (math.inf, 1e39, known(math.inf)):
            found += [fr.kkt_residual(params, g, case.penalty, *case.hyper, strength=strength, **case.options)]
            found += [case.prox(params, strength)]
    assert not any(leaf.isnan().any() for leaf in fr.tree_leaves(found))


def test_no_infinite_number_is_where_nothing_is_the_limit():
    params = {"w": torch.ones(3, 3)}
    for constraint in (fr.l2_sphere, fr.simplex, fr.transport):
        with pytest.raises(ValueError, match="is inf; expected a finite number of at least 0"):
            constraint.project(params, math.inf)
    with pytest.raises(ValueError, match="total of sparse_simplex is inf; expected a finite number of at least 0"):
        fr.sparse_simplex.project(params, 2, math.inf)
    with pytest.raises(ValueError, match="step is inf; expected a finite number above 0"):
        fr.l1.prox_dual(params, math.inf)


@every_penalty
def test_numbers_out_of_their_bounds_are_refused_also_in_tensors(case):
    params = {"w": draw()["head"].weight}
    for i, name, value in wrong_values(case):
        for wrong in (value, known(value), {"w": known(value)}):
            hyper = [*case.hyper[:i], wrong, *case.hyper[i + 1 :]]
            for call in (
                lambda hyper=hyper: case.penalty(params, *hyper, **case.options),
                lambda hyper=hyper: case.penalty.grad(params, *hyper, **case.options),
                lambda hyper=hyper: case.penalty.prox(params, 0.5, *hyper, **case.options),
                lambda hyper=hyper: case.penalty.given(*hyper, **case.options),
                lambda hyper=hyper: fr.add_penalty(case.penalty, *hyper, **case.options),
            ):
                with pytest.raises(ValueError, match=f"{name} of .*{value:g}"):
                    call()
        batch = [torch.tensor([value]) if j == i else torch.tensor([h]) for j, h in enumerate(case.hyper)]
        vmap(lambda *h: case.penalty(params, *h, **case.options))(*batch)  # Not read, and no error.
    for wrong in (-0.5, math.nan):
        for step in (wrong, known(wrong), {"w": known(wrong)}):
            with pytest.raises(ValueError, match=r"^step"):
                case.prox(params, step)
            with pytest.raises(ValueError, match="strength"):
                case.penalty.residual(params, params, *case.hyper, strength=step, **case.options)
            with pytest.raises(ValueError, match="strength"):
                case.penalty.given(*case.hyper, strength=step, **case.options)
    for step in ("0.5", True, None):
        with pytest.raises(TypeError, match=r"^step is"):
            case.prox(params, step)


@every_penalty
def test_no_number_is_read_where_it_is_not_known(case):
    params = fr.tree_map(lambda w: w.to("meta"), {"w": draw()["head"].weight})
    hyper = [torch.tensor(-7.0, device="meta") for _ in case.hyper]
    assert case.penalty(params, *hyper, **case.options).shape == ()
    assert case.penalty.prox(params, torch.tensor(-1.0, device="meta"), *hyper, **case.options)["w"].is_meta


# Copies


@every_penalty
def test_penalties_pickle_and_copy(case):
    params = draw()
    given = case.penalty.given(*case.hyper, **case.options)
    for p, hyper, options in (
        (case.penalty, case.hyper, case.options),
        (given, (), {}),
        (0.5 * given, (), {}),
        (given + 0.5 * fr.l2, (), {}),
        (given + torch.tensor(0.5) * fr.l1.given(mask=fr.select("head.*")), (), {}),
    ):
        for other in (pickle.loads(pickle.dumps(p)), copy.deepcopy(p), copy.copy(p)):
            assert repr(other) == repr(p)
            assert_equal(other(params, *hyper, **options), p(params, *hyper, **options))
            assert_equal(other.grad(params, *hyper, **options), p.grad(params, *hyper, **options))
    again = pickle.loads(pickle.dumps(0.5 * given))
    assert_equal(again.prox(params, 0.5), (0.5 * given).prox(params, 0.5))


def test_a_penalty_without_its_rules_is_told_what_they_are():
    for some in ({}, {"gradient": torch.sign}, {"proximal": fr.shrink}):
        with pytest.raises(TypeError, match=r"^penalty lacks its rules; expected @penalty\(gradient=..., proximal=..."):
            fr.penalty(**some)
    with pytest.raises(TypeError, match=r"^penalty lacks its rules"):

        @fr.penalty
        def root(w):
            return w.abs().sqrt()


def test_a_penalty_of_a_module_pickles_by_its_name():
    assert pickle.loads(pickle.dumps(fr.l1)) is copy.deepcopy(fr.l1) is fr.l1
    assert pickle.loads(pickle.dumps(PENALTIES["a user's"].penalty)) is PENALTIES["a user's"].penalty

    @fr.penalty(gradient=fr.shrink, proximal=fr.shrink)
    def local(w):
        return w.abs()

    with pytest.raises((pickle.PicklingError, AttributeError), match="local"):
        pickle.dumps(local)


def test_penalties_print_as_they_were_written():
    anchor = {"w": torch.ones(2)}
    for p, text in (
        (0.1 * fr.l1 + fr.elastic.given(0.1, rho=0.5), "0.1 * l1 + elastic.given(0.1, 0.5)"),
        (0.5 * (fr.l1 + 2 * fr.l2.given(mask=fr.matrices)), "0.5 * (l1 + 2 * l2.given(mask=matrices))"),
        (fr.group_lasso.given(dim=0), "group_lasso.given(dim=0)"),
        (fr.l1 + fr.simplex + fr.l2_ball.given(2.0), "l1 + simplex + l2_ball.given(2.0)"),
        ({"w": 2.0} * fr.anchored_l1.given(anchor), "{'w': 2.0} * anchored_l1.given({'w': tensor of (2,)})"),
        (
            torch.tensor(0.5, device="cpu") * fr.nonnegative_form(fr.mcp).given(1.0, 3.0),
            "tensor(0.5) * nonnegative_form",
        ),
        (fr.on_singular_values(fr.l_half), "on_singular_values(l_half)"),
        (fr.hierarchical("skip", "hidden"), "hierarchical('skip', 'hidden')"),
    ):
        assert repr(p).startswith(text)


@every_penalty
def test_nan_goes_through(case):
    params = draw()
    params["head"].weight[1, 1] = math.nan
    assert case.value(params).isnan()
    assert case.grad(params)["head"].weight[1, 1].isnan()
    assert case.prox(params, 0.5)["head"].weight[1, 1].isnan()
    assert case.penalty.residual(params, draw(1), *case.hyper, **case.options)["head"].weight[1, 1].isnan()
    if case.metric:
        ones = fr.tree_map(torch.ones_like, params)
        assert case.prox(params, 0.5, metric=ones)["head"].weight[1, 1].isnan()


@every_penalty
def test_zeros_are_positive_zeros(case):
    params = fr.tree_map(lambda w: torch.where(w == 0, -0.0, w), draw())
    for step in (0.5, 100.0):
        z = flat(case.prox(params, step))
        assert not torch.signbit(z[z == 0]).any()


@every_penalty
def test_a_penalty_with_kinks_makes_exact_zeros(case):
    z = flat(case.prox(draw(), 100.0))
    assert (z != case.centre).any() if case.smooth else (z == case.centre).all()


@every_penalty
def test_dtype_of_leaves_is_kept_and_values_are_float32_at_least(case):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        params = draw(dtype=dtype)
        for step in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
            assert {w.dtype for w in fr.tree_leaves(case.prox(params, step))} == {dtype}
        assert {w.dtype for w in fr.tree_leaves(case.grad(params))} == {dtype}
        assert case.value(params).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every_penalty
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_kept_under_vmap_over_float32_and_float64_steps(case, dtype):
    params = draw(dtype=dtype)
    for steps in (torch.tensor([0.1, 0.5]), torch.tensor([0.1, 0.5], dtype=torch.float64)):
        both = vmap(lambda step: case.prox(params, step))(steps)
        assert {w.dtype for w in fr.tree_leaves(both)} == {dtype}
        for i, step in enumerate(steps):
            member = fr.tree_map(lambda w, i=i: w[i], both)
            assert_equal(member, case.prox(params, step), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@every_penalty
def test_sixteen_bit_values_are_summed_in_float32(case):
    params = {"w": torch.full((300, 400), 2.0), "b": torch.full((3, 400), 300.0)}  # Exact in sixteen bits.
    exact = case.value(fr.tree_map(lambda w: w.double(), params))
    for dtype in (torch.float16, torch.bfloat16):
        narrow = case.value(fr.tree_map(lambda w, dtype=dtype: w.to(dtype), params))
        torch.testing.assert_close(narrow.double(), exact, rtol=1e-5, atol=0)


@every_penalty_of_every_shape
def test_leaves_of_every_shape_are_taken(case):
    leaves = [
        torch.tensor(0.7),
        torch.zeros(0),
        torch.zeros(0, 3),
        torch.zeros(3, 0),
        torch.randn(3, 4).T,
        torch.randn(2, 3, 4)[:, 1],
    ]
    for leaf in (leaf.double() for leaf in leaves):
        if leaf.ndim < case.least_ndim:
            with pytest.raises(ValueError, match=r"has no dimension|chooses no leaf"):
                case.value(leaf)
            continue
        expected = case.equation(leaf) if leaf.numel() else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(case.value(leaf), expected)
        assert case.prox(leaf, 0.5).shape == case.grad(leaf).shape == leaf.shape
        if case.metric:
            assert case.prox(leaf, 0.5, metric=torch.ones_like(leaf)).shape == leaf.shape


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@every_penalty
def test_trees_of_every_kind_have_the_value_of_their_leaves(case):
    a, b = draw()["head"].weight, draw(1)["head"].weight
    expected = case.value({"a": a, "b": b})
    for tree in (
        [a, b],
        (a, b),
        OrderedDict(y=a, x=b),
        {"x": {"y": [a]}, "z": (b,)},
        Pair(a, b),
        {"n": None, "a": a, "b": b},
    ):
        torch.testing.assert_close(case.value(tree), expected, rtol=1e-14, atol=0)
        assert type(case.prox(tree, 1.0)) is type(tree)
    assert case.prox({"b": b, "a": a}, 1.0).keys() == {"b": 0, "a": 0}.keys()
    assert case.value({}) == 0
    assert case.value({}).shape == ()
    assert case.grad({}) == case.prox({}, 1.0) == {}


@every_penalty
def test_derivatives_compose(case):
    params, tangent = draw(), draw(1)
    away = fr.tree_map(lambda w: w + 0.1 * (w == 0), params)
    value, slope = jvp(case.value, (away,), (tangent,))
    torch.testing.assert_close(slope, flat(case.grad(away)) @ flat(tangent), rtol=1e-11, atol=0)
    torch.testing.assert_close(value, case.value(away))
    twice = grad(lambda p: (flat(grad(case.value)(p)) * flat(tangent)).sum())(away)
    once = grad(lambda p: (flat(case.grad(p)) * flat(tangent)).sum())(away)
    assert_equal(twice, once, rtol=1e-9, atol=1e-12)
    through = grad(lambda p: flat(case.prox(p, 0.5)).square().sum())(params)
    assert flat(through).isfinite().all()
    assert (
        flat(grad(lambda p: flat(case.prox(p, 0.5)).square().sum())(fr.tree_map(torch.zeros_like, params)))
        .isfinite()
        .all()
    )


@every_penalty
def test_vmap_is_a_loop_over_members(case):
    trees, stacked = tiny_members()
    steps, hyper = (
        torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64),
        [torch.tensor(case.batch(h)) for h in case.hyper],
    )
    p, options = case.penalty, case.options
    values = vmap(lambda w, *h: p(w, *h, **options))(stacked, *hyper)
    grads = vmap(lambda w, *h: p.grad(w, *h, **options))(stacked, *hyper)
    slopes = vmap(grad(lambda w, *h: p(w, *h, **options)))(stacked, *hyper)
    points = vmap(lambda w, s, *h: p.prox(w, s, *h, **options))(stacked, steps, *hyper)
    for i, tree in enumerate(trees):
        h = [x[i] for x in hyper]
        torch.testing.assert_close(values[i], p(tree, *h, **options))
        member = lambda batch, i=i: fr.tree_map(lambda w: w[i], batch)
        assert_equal(member(grads), p.grad(tree, *h, **options), rtol=1e-12, atol=1e-15)
        assert_equal(member(slopes), grad(lambda w, h=h: p(w, *h, **options))(tree), rtol=1e-12, atol=1e-15)
        assert_equal(member(points), p.prox(tree, steps[i], *h, **options), rtol=1e-12, atol=1e-15)


@pytest.mark.slow
@every_compiled_penalty
def test_compiling_the_whole_changes_nothing(case):
    def everything(params, step):
        return case.value(params), grad(case.value)(params), case.grad(params), case.prox(params, step)

    params, step = {"w": draw()["head"].weight}, torch.tensor(0.5)  # Each further leaf would be traced anew.
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(params, step), everything(params, step), rtol=1e-12, atol=1e-15)


@every_penalty
def test_what_comes_back_lies_in_memory_as_the_leaves_do(case):
    """So that `view` works, torch's fused optimizers are right, and a checkpoint holds no more than the leaf."""
    x = draw()
    trees = [case.grad(x), case.prox(x, 0.3)]
    if case.metric:
        trees.append(case.prox(x, 0.3, metric=fr.tree_map(torch.ones_like, x)))
    for made in trees:
        for w, leaf in zip(fr.tree_leaves(x), fr.tree_leaves(made), strict=True):
            assert leaf.stride() == w.stride()
            assert leaf.untyped_storage().nbytes() == w.untyped_storage().nbytes()


@every_penalty
def test_penalties_stand_in_a_loss_with_functional_call(case):
    model = torch.nn.Linear(3, 2).double()
    params, x = dict(model.named_parameters()), torch.randn(5, 3, dtype=torch.float64)
    data = lambda p: functional_call(model, p, (x,)).square().mean()
    both = grad(lambda p: data(p) + 0.1 * case.value(p))(params)
    assert_equal(
        both, fr.tree_map(lambda a, b: a + 0.1 * b, grad(data)(params), case.grad(params)), rtol=1e-11, atol=1e-14
    )


@every_penalty
def test_a_metric_weighs_the_distance(case):
    x = draw()
    h = fr.tree_map(lambda w: 10 ** (2 * w), draw(3))
    assert case.penalty.in_metric(x, *case.hyper, **case.options) == case.metric
    if case.inner_steps is not None:
        assert_equal(case.prox(x, 0.5, metric=h), case.prox(x, 0.5, metric=h, inner_steps=case.inner_steps))
        return
    if not case.metric:
        with pytest.raises(ValueError, match="metric"):
            case.prox(x, 0.5, metric=h)
        return
    for step in (0.0, 0.3, 2.0, 1e4):
        z = case.prox(x, step, metric=h)
        least = objective(case, x, z, step, h)
        assert (worths(case, x, around(z, (1e-5, 1e-2, 1.0)), step, h) >= least - 1e-9).all()
    constant = fr.tree_map(lambda w: torch.full_like(w, 4.0), x)
    assert_equal(case.prox(x, 2.0, metric=constant), case.prox(x, 0.5), rtol=1e-12, atol=1e-14)
    assert flat(grad(lambda p: flat(case.prox(p, 0.5, metric=h)).sum())(x)).isfinite().all()


@every_convex_penalty
def test_inner_steps_find_the_proximal_operator_in_a_metric(case):
    x = draw()
    h = fr.tree_map(lambda w: 10 ** (w / w.abs().amax() / 2), draw(3))
    z = case.prox(x, 0.7, metric=h, inner_steps=50)
    if case.metric:
        assert_equal(z, case.prox(x, 0.7, metric=h), rtol=1e-8, atol=1e-9)
    least = objective(case, x, z, 0.7, h)
    assert (worths(case, x, around(z, (1e-5, 1e-2, 1.0)), 0.7, h) >= least - 1e-9).all()
    constant = fr.tree_map(lambda w: torch.full_like(w, 4.0), x)
    assert_equal(case.prox(x, 2.0, metric=constant, inner_steps=1), case.prox(x, 0.5), rtol=1e-12, atol=1e-14)
    half = fr.tree_map(lambda w: w.bfloat16(), x)
    assert all(w.dtype == torch.bfloat16 for w in fr.tree_leaves(case.prox(half, 0.7, metric=h, inner_steps=2)))
    with pytest.raises(ValueError, match="expected a whole number of at least 1"):
        case.prox(x, 0.7, metric=h, inner_steps=0)


@every_penalty
def test_a_mask_hides_leaves(case):
    params, mask = draw(), fr.select("head.*")
    head = {"head": params["head"]}
    torch.testing.assert_close(case.value(params, mask=mask), case.value(head))
    assert_equal(case.grad(params, mask=mask)["head"], case.grad(head)["head"])
    assert not flat(case.grad(params, mask=mask)["body"]).any()
    assert_equal(case.prox(params, 0.5, mask=mask), {**params, "head": case.prox(head, 0.5)["head"]})
    if case.metric:
        h = fr.tree_map(lambda w: w.abs() + 1, params)
        masked = case.prox(params, 0.5, metric=h, mask=mask)
        assert_equal(masked, {**params, "head": case.prox(head, 0.5, metric={"head": h["head"]})["head"]})


@every_penalty_on_leaves
def test_steps_and_hyperparameters_may_be_trees(case):
    params = draw()
    steps = {"head": Layer(0.1, torch.tensor(2.0)), "body": 0.7}
    hyper = [{"head": h / 2, "body": h} for h in case.hyper]
    z = case.penalty.prox(params, steps, *hyper, **case.options)
    value = case.penalty(params, *hyper, **case.options)
    half = [h / 2 for h in case.hyper]
    head, body = {"w": params["head"].weight}, {"body": params["body"]}
    assert_equal({"w": z["head"].weight}, case.penalty.prox(head, 0.1, *half, **case.options))
    assert_equal({"body": z["body"]}, case.prox(body, 0.7))
    torch.testing.assert_close(value, case.penalty(params["head"], *half, **case.options) + case.value(body))
    with pytest.raises(ValueError, match="lacks 'body'"):
        case.prox(params, {"head": 0.1})


@every_penalty_of_complex_leaves
def test_complex_leaves_shrink_towards_the_centre_along_their_phase(case):
    w = torch.complex(draw()["head"].weight, draw(1)["head"].weight)
    w[0] = 0
    if case.equation:
        torch.testing.assert_close(case.value(w), case.equation(w), rtol=1e-13, atol=0)
    assert not case.value(w).is_complex()
    as_real = grad(lambda p: case.value(torch.view_as_complex(p)))(torch.view_as_real(w))
    torch.testing.assert_close(torch.view_as_real(case.grad(w)), as_real, rtol=1e-12, atol=1e-14)
    z = case.prox(w, 0.5)
    turn = lambda x: case.centre + (x - case.centre) * 1j
    torch.testing.assert_close(case.prox(turn(w), 0.5), turn(z))
    least = 0.5 * (z - w).abs().square().sum() + 0.5 * case.value(z)
    for seed in range(20):
        other = z + 0.1 * torch.complex(draw(seed)["head"].weight, draw(seed + 1)["head"].weight)
        assert 0.5 * (other - w).abs().square().sum() + 0.5 * case.value(other) >= least - 1e-12


@every_penalty
def test_the_residual_is_zero_at_a_solution_and_only_there(case):
    x = draw()
    z = case.prox(x, 0.5)
    slope = fr.tree_map(lambda a, b: a - b, z, x)  # Of the distance to x, so that z is the solution.
    residual = lambda w, g: fr.kkt_residual(w, g, case.penalty, *case.hyper, strength=0.5, **case.options)
    assert residual(z, slope) <= 1e-14
    moved = nearby(z, 3, 0.1)
    assert residual(moved, fr.tree_map(lambda a, b: a - b, moved, x)) > 1e-2


@pytest.mark.parametrize("name", [n for n, c in PENALTIES.items() if not n.startswith("a user's") and not c.ruleless])
def test_the_residual_is_the_direction_of_steepest_descent(name):
    case, w, g = PENALTIES[name], draw(), draw(1)
    w["head"].weight[0] = 0
    r = case.penalty.residual(w, g, *case.hyper, strength=0.5, **case.options)
    total = lambda t: (
        (flat(g) * (flat(w) - t * flat(r))).sum() + 0.5 * case.value(fr.tree_map(lambda a, b: a - t * b, w, r))
    )
    speed = (total(0.0) - total(1e-7)) / 1e-7
    torch.testing.assert_close(speed, flat(r) @ flat(r), rtol=1e-5, atol=1e-6)


@every_convex_penalty
def test_lambda_max_is_where_zero_becomes_a_solution(case):
    grads = draw()
    largest = fr.lambda_max(grads, case.penalty, *case.hyper, **case.options)
    if case.smooth or case.centre:
        assert largest == math.inf
        return
    assert not flat(case.prox(grads, largest * (1 + 1e-12))).any()
    assert flat(case.prox(grads, largest * (1 - 1e-9))).any()
    # It grows with the gradients in proportion: that is its derivative along them, and there is no second one.
    grown = lambda c: fr.lambda_max(fr.tree_map(lambda g: c * g, grads), case.penalty, *case.hyper, **case.options)
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    slope, bisected = grad_and_value(grown)(one)  # Where numbers are not read, nothing but halves is tried.
    torch.testing.assert_close(bisected, largest, rtol=1e-13, atol=0)
    torch.testing.assert_close(slope, largest, rtol=1e-7, atol=0)
    tracked = one.clone().requires_grad_()
    (slope,) = torch.autograd.grad(grown(tracked), tracked)
    torch.testing.assert_close(slope, largest, rtol=1e-7, atol=0)


def test_lambda_max_has_derivatives_in_what_penalties_are_made_of():
    grads = draw()
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    of = {
        "elastic": lambda c: fr.lambda_max(grads, fr.elastic, c, 0.5),
        "a share": lambda c: fr.lambda_max(grads, fr.elastic, 2.0, 0.5 * c),
        "a share of one": lambda c: fr.lambda_max(grads, fr.elastic, c, 1.0),
        "a multiple": lambda c: fr.lambda_max(grads, 0.5 * c * fr.l1),
        "a sum": lambda c: fr.lambda_max(grads, c * fr.l1 + 0.5 * fr.group_lasso.given()),
        "sparse_group_lasso": lambda c: fr.lambda_max(grads, fr.sparse_group_lasso, 1.0, 0.5 * c),
    }
    for name, f in of.items():
        expected = (f(one + 1e-5) - f(one - 1e-5)) / 2e-5
        here, after, before = vmap(grad(f))(torch.stack([one, one + 1e-5, one - 1e-5]))
        second = (after - before) / 2e-5
        say = lambda m, name=name: f"{name}: {m}"
        torch.testing.assert_close(grad(f)(one), expected, rtol=1e-6, atol=1e-8, msg=say)
        torch.testing.assert_close(grad(grad(f))(one), second, rtol=1e-5, atol=1e-6, msg=say)
        torch.testing.assert_close(here, expected, rtol=1e-6, atol=1e-8, msg=say)


def test_lambda_max_has_its_closed_forms():
    grads = draw()
    largest = flat(grads).abs().max()
    torch.testing.assert_close(fr.lambda_max(grads, fr.l1), largest, rtol=1e-15, atol=0)
    torch.testing.assert_close(fr.lambda_max(grads, fr.elastic, 0.5, 0.2), largest / 0.1, rtol=1e-14, atol=0)
    norms = [torch.linalg.vector_norm(w) for w in fr.tree_leaves(grads)]
    torch.testing.assert_close(fr.lambda_max(grads, fr.group_lasso, dim=None), max(norms), rtol=1e-14, atol=0)
    assert fr.lambda_max(fr.tree_map(torch.zeros_like, grads), fr.l1) == 0
    torch.testing.assert_close(fr.lambda_max(grads, fr.l1, mask=fr.select("head.bias")), grads["head"].bias.abs().max())


def test_groups_may_have_weights_of_their_own():
    w, weights = torch.ones(2, 3), torch.tensor([1.0, 10.0])
    torch.testing.assert_close(fr.group_lasso(w, weights=weights), torch.tensor(11 * 3**0.5))
    z = fr.group_lasso.prox(w, 0.5, weights=weights)
    assert z[0].all()
    assert not z[1].any()
    torch.testing.assert_close(fr.group_lasso(w, dim=-1, weights=weights), fr.group_lasso(w, weights=weights))
    torch.testing.assert_close(fr.group_lasso.prox(w.T, 0.5, dim=(0,), weights=weights), z.T)


IN_METRICS = {name: (case, draw) for name, case in PENALTIES.items() if case.metric}
IN_METRICS |= {name: (case, draw_fours) for name, case in CONSTRAINTS.items() if case.metric}


@pytest.mark.parametrize("name", IN_METRICS)
def test_points_in_metrics_of_many_magnitudes_are_stationary(name):
    case, drawn = IN_METRICS[name]
    for seed in (0, 5, 11):
        params, generator = drawn(seed), torch.Generator().manual_seed(seed)
        h = fr.tree_map(lambda w, g=generator: 10 ** (6 * uniform(g, *w.shape) - 3), params)
        for x in (params, fr.tree_map(torch.div, params, h)):
            z = case.prox(x, 0.3, metric=h)
            slopes = fr.tree_map(lambda z, w, h: h * (z - w), z, x, h)
            left = case.penalty.residual(z, slopes, *case.hyper, strength=0.3, **case.options)
            for r, w, own in zip(*map(fr.tree_leaves, (left, x, h)), strict=True):
                # As a force, or as the way to where it is none.
                assert min((r.abs() / own).max() / w.abs().max(), r.abs().max() / (own * w).abs().max()) < 1e-9


def test_group_prox_in_a_metric_is_exact_for_metrics_of_many_magnitudes():
    for spread, tolerance in ((2, 1e-12), (4, 1e-11), (6, 1e-9)):
        x = torch.randn(500, 64, dtype=torch.float64)
        h = 10 ** (spread * (2 * torch.rand_like(x) - 1))
        pulls = (h * x).square()
        step = 0.5 * pulls.sum(1).sqrt().median()
        z = fr.group_lasso.prox(x, step, metric=h)
        alive = pulls.sum(1).sqrt() > step
        theta = z[alive].square().sum(1, keepdim=True).sqrt()
        stationary = h[alive] * (z[alive] - x[alive]) + step * z[alive] / theta
        assert (stationary.abs().amax() / step) < tolerance
        assert not z[~alive].any()


def test_group_prox_in_a_metric_stays_in_the_range_of_float32():
    for size in (1e-16, 1e13, 1e17):
        w, h = torch.tensor([[3.0, 4.0]]), torch.full((1, 2), size)
        z = fr.group_lasso.prox(w, 2.5 * size, metric=h)
        torch.testing.assert_close(z, w / 2, rtol=1e-5, atol=0)


IN_METRICS_OF_GROUPS = {
    "group_lasso": (fr.group_lasso, ()),
    "sparse_group_lasso": (fr.sparse_group_lasso, (0.7, 0.4)),
    "group_mcp": (fr.group_mcp, (0.7, 2.0)),
    "group_scad": (fr.group_scad, (0.7, 5.0)),
    "group_l0": (fr.group_l0, ()),
    "l1_linf": (fr.l1_linf, ()),
    "exclusive_lasso": (fr.exclusive_lasso, ()),
    "total_variation": (fr.total_variation, ()),
    "fused_lasso": (fr.fused_lasso, (0.7, 0.4)),
}


@pytest.mark.parametrize("name", IN_METRICS_OF_GROUPS)
def test_groups_in_metrics_are_those_of_float64_where_products_leave_the_range_of_float32(name):
    penalty, hyper = IN_METRICS_OF_GROUPS[name]
    generator = torch.Generator().manual_seed(3)
    for size, scale in ((1e25, 1e19), (1e-25, 1e-19), (1e25, 1e-19), (1e-25, 1e19), (1e-25, 1.0), (1e25, 1.0)):
        w = (size * normal(generator, 40, 4)).float()
        h = (scale * (0.1 + uniform(generator, 40, 4))).float()
        for step in (0.0, 0.3 * size * scale, 0.3 * size * size * scale):
            if step == 0 or 1e-37 < step < 1e37:
                expected = penalty.prox(w.double(), step, *hyper, metric=h.double())
                z = penalty.prox(w, step, *hyper, metric=h)
                torch.testing.assert_close(z, expected.float(), rtol=1e-4, atol=1e-6 * size)


def test_sparsity_is_the_share_of_exact_zeros():
    assert fr.sparsity({"a": torch.tensor([0.0, -0.0, 1.0, 1e-40])}) == 0.5
    assert fr.sparsity({"a": torch.zeros(3), "b": torch.ones(1)}, mask={"a": True, "b": False}) == 1
    assert fr.sparsity({}) == 0
    torch.testing.assert_close(vmap(fr.sparsity)({"a": torch.eye(2)}), torch.tensor([0.5, 0.5]))


@given(st.lists(st.floats(allow_nan=True, width=32), min_size=1), st.floats(0, 1e6, width=32))
def test_soft_thresholding_moves_by_the_threshold_or_to_zero(entries, threshold):
    w = torch.tensor(entries)
    z = fr.l1.prox(w, threshold)
    assert_equal(fr.shrink(w, torch.tensor(threshold)), z)
    assert torch.equal(z.isnan(), w.isnan())
    inside = w.abs() <= threshold
    assert not z[inside].any()
    assert not torch.signbit(z[inside]).any()
    torch.testing.assert_close(z[~inside], w[~inside] - threshold * w[~inside].sign(), equal_nan=True)


@given(st.integers(0, 2**31), st.floats(0, 10), st.floats(0.01, 10))
def test_elastic_is_between_lasso_and_ridge(seed, alpha, scale):
    params = draw(seed % 1000, scale=scale)
    torch.testing.assert_close(fr.elastic(params, alpha, 1), alpha * fr.l1(params))
    torch.testing.assert_close(fr.elastic(params, alpha, 0), alpha * fr.half_l2(params))
    torch.testing.assert_close(fr.half_l2(params), fr.l2(params) / 2)


@every_penalty
def test_results_lie_with_the_parameters_whatever_the_default_device(case):
    params, metric = draw(), fr.tree_map(lambda w: w.abs() + 1, draw())

    def everything():
        points = [case.prox(params, 0.5, **({"metric": metric} if weighed else {})) for weighed in {False, case.metric}]
        return case.value(params), case.grad(params), points, fr.sparsity(params)

    expected = everything()
    with torch.device("meta"):
        found = everything()
    assert_equal(found, expected)


@every_penalty
def test_arguments_stay_as_they_were(case):
    params, h = draw(), fr.tree_map(torch.ones_like, draw())
    before = copy.deepcopy((params, h))
    case.value(params), case.grad(params), case.prox(params, 0.5)
    if case.metric:
        case.prox(params, 0.5, metric=h)
    assert_equal((params, h), before)
    assert all(
        a.data_ptr() != b.data_ptr()
        for a, b in zip(fr.tree_leaves(params), fr.tree_leaves(case.grad(params)), strict=True)
    )


@every_penalty
def test_penalties_say_whether_they_are_convex_and_only_those_have_a_dual_prox(case):
    assert case.penalty.is_convex(*case.hyper, **case.options) == (not case.nonconvex)
    if case.nonconvex:
        given = case.penalty.given(*case.hyper, **case.options)
        for p in (given, 0.5 * given, given + fr.l1):
            with pytest.raises(ValueError, match="is not known to be convex; expected a convex penalty such as l1"):
                p.prox_dual(draw(), 0.5)


@pytest.mark.parametrize("other", [0.0, 0.5, 2, math.inf, *[
    torch.full(shape, 0.5, dtype=dtype)
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    for shape in ((), (2,))
]], ids=str)  # fmt: skip
def test_steps_times_strengths_have_the_dtype_that_torch_gives_their_product(other):
    for dtype, shape in itertools.product((torch.float64, torch.float32, torch.bfloat16, torch.int64), ((), (2,))):
        x = torch.full(shape, 2, dtype=dtype)
        for found in (step_times(x, other), step_times(other, x)):
            assert_equal(found, x * other)


#: Penalties with strengths of 0 among theirs: of all of them, or of some entries or groups.
_SOME = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
_WITHOUT_STRENGTH = {
    "elastic": [(fr.elastic, hyper, {}) for hyper in ((0.3, 0.0), (0.3, 1.0), (0.0, 0.5))],
    "sparse_group_lasso": [(fr.sparse_group_lasso, hyper, {}) for hyper in ((0.3, 0.0), (0.3, 1.0), (0.0, 0.5))],
    "fused_lasso": [(fr.fused_lasso, hyper, {}) for hyper in ((0.3, 0.0), (0.3, 1.0), (0.0, 0.5))],
    "group_mcp": [(fr.group_mcp, (0.0, 3.0), {}), (fr.group_mcp, (1.0, 3.0), {"weights": _SOME})],
    "group_scad": [(fr.group_scad, (0.0, 3.0), {}), (fr.group_scad, (1.0, 3.0), {"weights": _SOME})],
    "oscar": [
        (fr.oscar, (0.0, 0.5), {}),
        (fr.oscar, (0.5, 0.0), {}),
        (fr.oscar, (0.0, 0.0), {}),
        (fr.oscar, (0.0, math.inf), {}),
    ],
    "slope": [(fr.slope, (0.0,), {}), (fr.slope, (torch.tensor([1.0, 0.0, 0.0]).double(),), {"dim": -1})],
    "ewc": [(fr.ewc, (0.5, 0.0), {}), (fr.ewc, (0.5, _SOME), {})],
    "others": [(fr.huber, (0.0,), {}), (fr.relaxed_mumford_shah, (0.0, 1.0), {}), (fr.mcp, (0.0, 3.0), {})],
    "weights": [
        (penalty, (), {"weights": _SOME})
        for penalty in (fr.group_lasso, fr.group_l_half, fr.group_l0, fr.l1_linf, fr.exclusive_lasso)
    ],
    "factors": [(factor * fr.l1, (), {}) for factor in (0.0, torch.tensor(0.0), _SOME)],
}


@pytest.mark.parametrize("rows", _WITHOUT_STRENGTH.values(), ids=_WITHOUT_STRENGTH)
def test_no_strength_is_no_pull_however_long_the_step(rows):
    w = normal(torch.Generator().manual_seed(0), 3, 3)
    h = uniform(torch.Generator().manual_seed(1), 3, 3) + 0.5
    for penalty, hyper, options in rows:
        tensors = [torch.as_tensor(x, dtype=torch.float64) for x in hyper]
        metrics = (None, h) if penalty.in_metric(w, *hyper, **options) else (None,)
        for taken, metric in itertools.product((hyper, tensors), metrics):
            far = penalty.prox(w, 1e10, *taken, metric=metric, **options)
            assert far.isfinite().all()
            for step in (math.inf, torch.tensor(math.inf)):
                assert_equal(penalty.prox(w, step, *taken, metric=metric, **options), far, rtol=0, atol=1e-6)


def test_a_rule_whose_result_is_not_like_the_leaf_is_said():
    @fr.penalty(gradient=lambda w: w.sum(), proximal=lambda w, step: w[:1])
    def magnitudes(w):
        return w.abs()

    @fr.constraint
    def forgetful(w):
        w + 1.0

    params = {"w": torch.ones(2, 2, device=DEVICE)}
    with pytest.raises(
        ValueError, match=r"at leaf 'w': <lambda> returned a tensor of shape \(\); expected .* \(2, 2\)"
    ):
        magnitudes.grad(params)
    for metric in (None, params):
        with pytest.raises(ValueError, match=r"at leaf 'w': <lambda> returned a tensor of shape \(1, 2\)"):
            magnitudes.prox(params, 0.1, metric=metric)
    with pytest.raises(ValueError, match=r"at leaf 'w': forgetful returned None; expected a tensor of shape \(2, 2\)"):
        forgetful.project(params)


def test_a_rule_that_writes_into_the_leaf_is_said():
    @fr.constraint
    def capped(w):
        return w.clamp_(max=0.1)

    for dtype in (torch.float32, torch.bfloat16):
        params = {"w": torch.ones(2, dtype=dtype, device=DEVICE)}
        for call in (capped, capped.project):
            with pytest.raises(
                ValueError, match=r"at leaf 'w': capped wrote into the leaf that it was given; expected"
            ):
                call(params)


def test_products_and_names_of_other_libraries_are_refused_with_what_to_write():
    with pytest.raises(TypeError, match=r"l1 is multiplied by l2; expected a number.* A sum is l1 \+ l2\."):
        fr.l1 * fr.l2
    params = {"w": torch.ones(2)}
    for call in (fr.elastic, fr.elastic.given, lambda *a, **k: fr.add_penalty(fr.elastic, **k)):
        with pytest.raises(TypeError, match=r"got l1_ratio. l1_ratio of other libraries is rho here."):
            call(params, alpha=0.1, l1_ratio=0.5)
    with pytest.raises(TypeError, match=r"got axis. axis of other libraries is dim here."):
        fr.group_lasso(params, axis=0)
    for group_lasso in (fr.group_lasso, fr.sparse_group_lasso):
        with pytest.raises(TypeError, match=r"got groups\. Groups of indices are tree_lasso, .* axis=1"):
            group_lasso(params, groups=((0,), (1,)))
    with pytest.raises(TypeError, match=r"got dim\. Indices count slices along axis="):
        fr.tree_lasso(params, groups=((0,), (1,)), dim=1)
    with pytest.raises(ValueError, match=r"at leaf 'w': groups names the slice 2 .* that has 2 along axis=; .* axis=1"):
        fr.tree_lasso(params, groups=((0,), (1, 2)))
    with pytest.raises(ValueError, match=r"dim is \(-2, -1\); expected an int: .* take isotropic_total_variation, or"):
        fr.total_variation(torch.ones(3, 3), dim=(-2, -1))
    with pytest.raises(TypeError, match=r"elastic takes alpha, rho; got alpha by position and by name"):
        fr.elastic(params, 0.1, 0.5, alpha=0.1)
    with pytest.raises(
        TypeError, match=r"l1 takes no hyperparameters; got alpha\. Its strength is a factor, 1e-4 \* l1\(params\)"
    ):
        fr.l1(params, alpha=0.1)
