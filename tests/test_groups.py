"""Laws of groups, greatest magnitudes, orders and differences, beside those of the table."""

from __future__ import annotations

import itertools
import math
import operator
from functools import partial

import pytest
import torch
from cases import assert_equal, cpu_only, normal, uniform
from torch.func import grad, vmap

import funcreg as fr
from funcreg.regularizers.orders import falling_fit

NONCONVEX = [
    (fr.group_mcp, (0.7, 2.0)),
    (fr.group_scad, (0.7, 3.7)),
    (fr.group_scad, (0.7, 2.1)),
    (fr.group_l0, ()),
]


def cost(penalty, hyper, w, z, step, h=1.0, **options):
    """The objective of a proximal operator, for each of many points z."""
    return 0.5 * (h * (z - w) ** 2).flatten(1).sum(1) + step * vmap(lambda z: penalty(z, *hyper, **options))(z)


def rings(radii, angles=360):
    """Points of the plane on circles around zero."""
    turn = torch.linspace(0, 2 * math.pi, angles + 1, dtype=torch.float64)[:-1]
    return (radii[:, None, None] * torch.stack([turn.cos(), turn.sin()], 1)).reshape(-1, 1, 2)


@pytest.mark.parametrize(("penalty", "hyper"), NONCONVEX)
@pytest.mark.parametrize("step", [0.3, 0.5, 1.0, 2.0, 2.6, 2.7, 3.3, 4.7, 6.0])
def test_nonconvex_groups_land_at_the_global_minimum_for_every_step(penalty, hyper, step):
    grid = torch.linspace(0, 6, 3001, dtype=torch.float64)
    for size in torch.linspace(0, 5.5, 12, dtype=torch.float64):
        w = size * torch.tensor([[0.6, -0.8]], dtype=torch.float64)
        z = penalty.prox(w, step, *hyper)
        points = grid[:, None, None] * torch.tensor([[0.6, -0.8]], dtype=torch.float64)
        least = cost(penalty, hyper, w, z[None], step)
        assert (cost(penalty, hyper, w, points, step) >= least - 1e-13).all()
        torch.testing.assert_close(penalty.prox(w, torch.tensor(step), *hyper), z, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(penalty.prox(w, step, *hyper, metric=torch.ones_like(w)), z, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("penalty", "hyper"), NONCONVEX)
@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_nonconvex_groups_land_at_the_global_minimum_in_every_metric(penalty, hyper, spread):
    points = rings(torch.linspace(0, 5, 126, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        w = 3 * normal(generator, 1, 2)
        h = 10 ** (spread * (2 * uniform(generator, 1, 2) - 1))
        for step in (0.3, 1.0, 4.0):
            z = penalty.prox(w, step, *hyper, metric=h)
            least = cost(penalty, hyper, w, z[None], step, h)
            assert (cost(penalty, hyper, w, points, step, h) >= least - 1e-11).all()
            fine = z + rings(torch.tensor([1e-4, 1e-2], dtype=torch.float64), 90)
            assert (cost(penalty, hyper, w, fine, step, h) >= least - 1e-12).all()


@pytest.mark.parametrize(("penalty", "hyper"), NONCONVEX)
def test_infinite_groups_and_infinite_steps_have_their_limits(penalty, hyper):
    w = torch.tensor([[math.inf, 1.0], [0.1, 0.1], [0.0, 0.0], [9.0, 9.0]])
    assert_equal(penalty.prox(w, 0.5, *hyper), torch.tensor([[math.inf, 1.0], [0.0, 0.0], [0.0, 0.0], [9.0, 9.0]]))
    assert not penalty.prox(w[1:], math.inf, *hyper).any()
    assert penalty(w, *hyper).isfinite()
    assert penalty.grad(w[1:], *hyper).isfinite().all()


@pytest.mark.parametrize(("penalty", "hyper"), NONCONVEX[:3])
def test_weights_of_nonconvex_groups_multiply_their_slope(penalty, hyper):
    w, weights = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    z = penalty.prox(w, 0.9, *hyper, weights=weights)
    for i, c in enumerate(weights):
        row = w[i : i + 1]
        torch.testing.assert_close(z[i : i + 1], penalty.prox(row, 0.9, c * hyper[0], *hyper[1:]))
    torch.testing.assert_close(penalty.prox(w.T, 0.9, *hyper, weights=weights, dim=0), z.T)


def test_curved_groups_become_straight_far_out():
    w = torch.randn(5, 4, dtype=torch.float64)
    for step in (0.1, 1.0):
        torch.testing.assert_close(fr.group_mcp.prox(w, step, 1.0, 1e12), fr.group_lasso.prox(w, step))
        torch.testing.assert_close(fr.group_scad.prox(w, step, 1.0, 1e12), fr.group_lasso.prox(w, step))
        h = torch.rand_like(w) + 0.5
        straight = fr.group_lasso.prox(w, step, metric=h)
        torch.testing.assert_close(fr.group_mcp.prox(w, step, 1.0, 1e12, metric=h), straight)
        torch.testing.assert_close(fr.group_scad.prox(w, step, 1.0, 1e12, metric=h), straight)


@pytest.mark.parametrize(("penalty", "hyper"), NONCONVEX)
def test_derivatives_of_nonconvex_groups_are_finite_in_every_regime(penalty, hyper):
    w = torch.cat([torch.zeros(1, 3), torch.randn(4, 3), 30 * torch.randn(2, 3)]).double()
    h = 10 ** torch.randn_like(w)
    for step in (0.0, 0.1, hyper[-1] if hyper else 1.0, 1.7, 4.7, 50.0):
        for metric in (None, h, torch.ones_like(w)):
            slope = grad(lambda w, step=step, metric=metric: penalty.prox(w, step, *hyper, metric=metric).sum())(w)
            assert slope.isfinite().all()
            if hyper:
                steps = torch.tensor(step, dtype=torch.float64)
                slope = grad(lambda s, metric=metric: penalty.prox(w, s, *hyper, metric=metric).sum())(steps + 0.01)
                assert slope.isfinite()


# Greatest magnitudes and competition


VECTORS = [(fr.linf, {"dim": 1}), (fr.l1_linf, {}), (fr.exclusive_lasso, {})]


def l1_ball(w, radius):
    """The projection of a vector, by bisection on the threshold."""
    low, high = 0.0, float(w.abs().max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (w.abs() - middle).clamp(min=0).sum() > radius else (low, middle)
    return w.sign() * (w.abs() - high).clamp(min=0)


@pytest.mark.parametrize(("penalty", "options"), VECTORS)
@pytest.mark.parametrize("metric", [[1.0, 1.0], [0.2, 3.0]])
def test_vectors_land_at_the_minimum_over_the_plane(penalty, options, metric):
    axis = torch.linspace(-4, 4, 401, dtype=torch.float64)
    plane = torch.cartesian_prod(axis, axis)[:, None]
    h = torch.tensor([metric], dtype=torch.float64)
    for w in ([3.0, -1.0], [2.0, 2.0], [-0.5, 0.5], [0.0, 1.5], [0.0, 0.0], [-3.3, 3.1]):
        w = torch.tensor([w], dtype=torch.float64)
        for step in (0.2, 1.0, 3.0):
            z = penalty.prox(w, step, metric=h, **options)
            least = cost(penalty, (), w, z[None], step, h, **options)
            assert (cost(penalty, (), w, plane, step, h, **options) >= least - 1e-13).all()
            assert (cost(penalty, (), w, z + plane / 1e4, step, h, **options) >= least - 1e-13).all()


def test_what_linf_takes_away_is_the_projection_on_the_l1_ball():
    for size in (1, 2, 7, 100):
        w = torch.randn(size, dtype=torch.float64)
        for radius in (0.1, 1.0, 10.0):
            z = fr.linf.prox(w, radius)
            torch.testing.assert_close(w - z, l1_ball(w, radius), rtol=1e-12, atol=1e-14)
    row = torch.randn(3, 4, 5, dtype=torch.float64)
    assert_equal(fr.linf.prox(row, 0.7, dim=(0, 2)), fr.l1_linf.prox(row.transpose(0, 1), 0.7).transpose(0, 1))


def test_equal_magnitudes_share_what_the_greatest_bears():
    w = torch.tensor([2.0, -2.0, 2.0, 1.0])
    assert_equal(fr.linf.grad(w), torch.tensor([1.0, -1.0, 1.0, 0.0]) / 3)
    assert_equal(grad(fr.linf)(w), fr.linf.grad(w))
    assert_equal(fr.linf.prox(w, 1.5), torch.tensor([1.5, -1.5, 1.5, 1.0]))
    assert_equal(grad(lambda w: fr.linf.prox(w, 1.5).sum())(torch.zeros(3)).isfinite(), torch.ones(3).bool())
    assert_equal(fr.linf.prox(w, 7.0), torch.zeros(4))
    assert_equal(fr.exclusive_lasso.prox(torch.tensor([[1.0, -1.0]]), 0.5), torch.tensor([[1.0, -1.0]]) / 3)


def test_the_residual_of_linf_pours_the_strength_over_equal_magnitudes():
    w, g = torch.tensor([2.0, -2.0, 2.0, 1.0]), torch.tensor([-3.0, 2.5, 1.0, 0.3])
    assert_equal(fr.linf.residual(w, g, strength=1.5), torch.tensor([-2.0, 2.0, 1.0, 0.3]))
    assert_equal(fr.linf.residual(w, g, strength=0.0), g)
    assert_equal(fr.linf.residual(torch.zeros(4), g, strength=10.0), torch.zeros(4))


@pytest.mark.parametrize("penalty", [fr.linf, fr.l1_linf])
def test_infinite_magnitudes_and_steps_of_vectors_have_their_limits(penalty):
    w = torch.tensor([[math.inf, 2.0, -1.0], [1.0, 2.0, 3.0]])
    assert_equal(penalty.prox(w, 0.5, dim=1)[0], w[0])
    assert not penalty.prox(w[1:], math.inf, dim=1).any()


def test_weights_of_vectors_are_strengths_of_their_groups():
    w, weights = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for penalty, options in VECTORS:
        z = penalty.prox(w, 0.3, weights=weights, **options)
        for i, c in enumerate(weights):
            assert_equal(z[i : i + 1], penalty.prox(w[i : i + 1], 0.3 * c, **options), rtol=1e-14, atol=1e-15)
        steps = 0.3 * weights[:, None]
        assert_equal(penalty.prox(w, steps, **options), z, rtol=1e-14, atol=1e-15)
        by_size = penalty(w, weights="sqrt_size", **options)
        torch.testing.assert_close(by_size, 2 * penalty(w, **options))
    # 1 / 2 of the square as Kowalski writes it: t = 2 step.
    a = torch.tensor([[3.0, 2.0, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(fr.exclusive_lasso.prox(a, 0.5), (a - 5 / 3).clamp(min=0))


# Neighbours


def blocks_of(z):
    """Runs of equal entries, as lists of places."""
    runs = [[0]]
    for i in range(1, len(z)):
        runs.append([i]) if z[i] != z[i - 1] else runs[-1].append(i)
    return runs


def slack(x, z, h, jump, pull):
    """How far from optimal a row is for the fused lasso: the forces between neighbours are summed up from the left."""
    pulls = pull * z.sign()
    forces, low, high, worst = [], 0.0, 0.0, 0.0
    for i in range(len(z)):
        free = pull if z[i] == 0 else 0.0  # A zero leaves the pull of the magnitude free.
        push = h[i] * (z[i] - x[i]) + pulls[i]
        low, high = low + push - free, high + push + free
        if i == len(z) - 1:
            limits = (0.0, 0.0)
        elif (z[i + 1] - z[i]).abs() < 1e-12:
            limits = (-jump, jump)
        else:
            limits = (float(jump * (z[i + 1] - z[i]).sign()),) * 2
        worst = max(worst, float(limits[0] - high), float(low - limits[1]))
        low, high = max(low, limits[0]), min(high, limits[1])
        forces.append((low, high))
    return worst


@pytest.mark.parametrize(("jump", "pull"), [(0.05, 0.0), (0.5, 0.0), (3.0, 0.0), (0.5, 0.2), (0.2, 1.0), (0.0, 0.3)])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_fused_rows_satisfy_the_equations_of_their_forces(jump, pull, spread):
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 10, 60):
        x = normal(generator, 3, size).cumsum(1)
        x[0] = x[0].round()  # Ties and zeros.
        h = 10 ** (spread * (2 * uniform(generator, 3, size) - 1))
        alpha = jump + pull
        z = fr.fused_lasso.prox(x, 1.0, alpha, pull / alpha, metric=h)
        for i in range(3):
            assert slack(x[i], z[i], h[i], jump, pull) <= 1e-12 * size
        if spread == 0:
            chain = fr.l1.prox(fr.total_variation.prox(x, jump), pull)
            assert_equal(fr.fused_lasso.prox(x, 1.0, alpha, pull / alpha), chain, rtol=1e-12, atol=1e-13)


def test_total_variation_has_its_known_solutions():
    ramp = torch.arange(5.0)
    assert_equal(fr.total_variation.prox(ramp, 0.5), torch.tensor([0.5, 1.0, 2.0, 3.0, 3.5]))
    assert_equal(fr.total_variation.prox(ramp, math.inf), torch.full((5,), 2.0))
    assert_equal(fr.total_variation.prox(torch.tensor([0.0, 6.0, 0.0]), 1.0), torch.tensor([1.0, 4.0, 1.0]))
    assert_equal(fr.total_variation.prox(torch.ones(2, 4), 3.0), torch.ones(2, 4))
    # The slope of a hill is spread over its top.
    assert_equal(fr.total_variation.grad(torch.tensor([0.0, 2.0, 2.0, 1.0])), torch.tensor([-1.0, 1.0, 1.0, -1.0]))
    w = torch.randn(3, 4, 5, dtype=torch.float64)
    along = fr.total_variation.prox(w, 0.4, dim=1)
    assert_equal(along.transpose(1, 2), fr.total_variation.prox(w.transpose(1, 2), 0.4))
    with pytest.raises(ValueError, match="expected an int"):
        fr.total_variation(w, dim=(0, 1))
    with pytest.raises(ValueError, match="complex"):
        fr.total_variation.prox(w.to(torch.complex64), 1.0)


@pytest.mark.parametrize("entry", [math.nan, math.inf])
def test_fused_rows_that_are_not_finite_are_nan_and_leave_other_rows_alone(entry):
    w = torch.tensor([[1.0, entry, 3.0], [1.0, 2.0, 4.0]])
    z = fr.fused_lasso.prox(w, 0.5, 1.0, 0.5)
    assert z[0].isnan().all()
    assert_equal(z[1], fr.fused_lasso.prox(w[1], 0.5, 1.0, 0.5))


def test_derivatives_of_fused_rows_are_means_over_blocks():
    x = torch.tensor([3.0, 2.5, 0.25, -0.25, 0.1], dtype=torch.float64)
    z = fr.total_variation.prox(x, 0.5)
    for block in blocks_of(z):
        for i in block:
            slope = grad(lambda x, i=i: fr.total_variation.prox(x, 0.5)[i])(x)
            expected = torch.zeros_like(x)
            expected[block] = 1 / len(block)
            assert_equal(slope, expected, rtol=1e-14)
    for penalty, hyper in ((fr.total_variation, ()), (fr.fused_lasso, (1.0, 0.5))):
        for w in (torch.zeros(2, 4), torch.ones(2, 4)):
            assert grad(lambda w, p=penalty, h=hyper: p.prox(w, 0.3, *h).square().sum())(w).isfinite().all()


# Orders


def falling(y):
    """Isotonic regression by pooling adjacent violators, one entry after another."""
    means, sizes = [], []
    for value in y.tolist():
        means.append(value)
        sizes.append(1)
        while len(means) > 1 and means[-2] <= means[-1]:
            n = sizes[-2] + sizes[-1]
            means[-2:], sizes[-2:] = [(means[-2] * sizes[-2] + means[-1] * sizes[-1]) / n], [n]
    return torch.tensor([m for m, n in zip(means, sizes, strict=True) for _ in range(n)], dtype=y.dtype)


def test_falling_fits_are_those_of_pooling():
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 4, 5, 8, 13, 64, 100):
        for ties in (False, True):
            y = normal(generator, 5, size) + torch.linspace(1, -1, size)
            y = (2 * y).round() if ties else y
            expected = torch.stack([falling(row) for row in y])
            assert_equal(falling_fit(y), expected, rtol=1e-13, atol=1e-13)


def test_slope_is_least_against_other_points_and_has_its_limits():
    generator = torch.Generator().manual_seed(0)
    w = normal(generator, 4, 6)
    w[0, :3] = 0.5
    w[1] = 0
    weights = torch.linspace(1.2, 0.1, 6, dtype=torch.float64)
    for step in (0.0, 0.2, 1.0):
        z = fr.slope.prox(w, step, weights, dim=1)
        for i in range(4):
            row, others = w[i], z[i] + normal(generator, 400, 6) * 0.1
            at = lambda z, row=row, step=step: 0.5 * (z - row).square().sum() + step * fr.slope(z, weights)
            assert (vmap(at)(others) >= at(z[i]) - 1e-12).all()
            assert_equal(fr.slope.prox(row, step, weights), z[i])
            order = row.abs().argsort(descending=True)
            fitted = falling(row.abs()[order] - step * weights).clamp(min=0)
            torch.testing.assert_close(z[i].abs()[order], fitted, rtol=1e-12, atol=1e-13)
    first = torch.tensor([0.7, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert_equal(fr.slope.prox(w, 1.0, first, dim=1), fr.l1_linf.prox(w, 0.7), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fr.slope(w, first, dim=1), 0.7 * fr.l1_linf(w))
    assert_equal(fr.slope.prox(w, 1.0, 0.3), fr.l1.prox(w, 0.3), rtol=1e-14, atol=1e-15)
    falls = 0.2 + 0.1 * torch.arange(5, -1, -1, dtype=torch.float64)
    assert_equal(fr.slope.prox(w, 0.9, falls, dim=1), fr.oscar.prox(w, 0.9, 0.2, 0.1, dim=1), rtol=1e-13, atol=1e-15)
    several = torch.stack([weights, 2 * weights])
    both = vmap(lambda weights: fr.slope.prox(w, 0.5, weights, dim=1))(several)
    assert_equal(both[1], fr.slope.prox(w, 1.0, weights, dim=1))
    w, weights = w.cpu(), weights.cpu()  # Numbers on other devices are not read: that would wait for them.
    for call in (fr.slope, fr.slope.grad, lambda w, weights, dim: fr.slope.prox(w, 0.5, weights, dim=dim)):
        with pytest.raises(ValueError, match="at leaf 'a': the weights of slope rise"):
            call({"a": w}, weights.flip(0), dim=1)


def test_orders_of_infinite_magnitudes_and_steps_have_their_limits():
    w, weights = torch.tensor([1.0, math.inf, 0.5]), torch.tensor([1.0, 0.5, 0.2])
    torch.testing.assert_close(fr.slope.prox(w, 0.5, weights), torch.tensor([0.75, math.inf, 0.4]))
    for z in (fr.slope.prox(w[::2], math.inf, weights[1:]), fr.oscar.prox(w[::2], math.inf, 0.5, 0.1)):
        assert not z.any()


def test_derivatives_of_orders_are_finite_at_ties_and_zeros():
    weights = torch.linspace(1.2, 0.1, 6, dtype=torch.float64)
    for w in (torch.zeros(6), torch.ones(6), torch.tensor([1.0, 1.0, -1.0, 0.0, 0.0, 2.0])):
        for step in (0.0, 0.3, 30.0):
            through = lambda w, weights, step=step: fr.slope.prox(w, step, weights).square().sum()
            by_entries, by_weights = grad(through, argnums=(0, 1))(w.double(), weights)
            assert by_entries.isfinite().all()
            assert by_weights.isfinite().all()


# Trees


def test_trees_land_at_the_minimum_and_are_the_groups_they_hold():
    generator = torch.Generator().manual_seed(0)
    groups = ((0, (1, (2,)), (-1,)), (3, 4))
    w = normal(generator, 6, 2)
    inside = [[0, 1, 2, 5], [1, 2], [2], [5], [3, 4]]
    weights = torch.tensor([0.5, 1.0, 0.3, 0.2, 1.0], dtype=torch.float64)
    value = lambda w, c: sum(c * w[g].square().sum().sqrt() for c, g in zip(c, inside, strict=True))
    torch.testing.assert_close(fr.tree_lasso(w, groups=groups), value(w, torch.ones(5)))
    torch.testing.assert_close(fr.tree_lasso(w, groups=groups, weights=weights), value(w, weights))
    root = torch.tensor([len(g) * 2.0 for g in inside]).double().sqrt()
    torch.testing.assert_close(fr.tree_lasso(w, groups=groups, weights="sqrt_size"), value(w, root))
    for step in (0.1, 0.5, 1.5):
        z = fr.tree_lasso.prox(w, step, groups=groups, weights=weights)
        at = lambda z, step=step: 0.5 * (z - w).square().sum() + step * value(z, weights)
        for size in (1e-3, 1e-1, 1.0):
            others = z + size * normal(generator, 300, 6, 2)
            assert min(at(other) for other in others) >= at(z) - 1e-12
        assert_equal(fr.tree_lasso.prox(w.T, step, groups=groups, weights=weights, axis=-1), z.T)
    assert_equal(
        fr.tree_lasso.prox(w, 0.5, groups=((0,), (1,), (2,), (3,), (4,), (5,))), fr.group_lasso.prox(w, 0.5), rtol=1e-15
    )
    listed = [[0, [1]], range(2, 5), [5]]
    assert_equal(
        fr.tree_lasso.prox(w, 0.5, groups=listed), fr.tree_lasso.prox(w, 0.5, groups=((0, (1,)), (2, 3, 4), (5,)))
    )
    assert_equal(fr.tree_lasso.prox(w, math.inf, groups=((0, 1),))[2:], w[2:])
    assert not fr.tree_lasso.prox(w, math.inf, groups=((0, 1),))[:2].any()


@pytest.mark.parametrize("size", [1e-41, 1e-25, 1e-12, 1e12, 1e25])
def test_trees_of_groups_beside_each_other_are_right_at_every_magnitude(size):
    nested = partial(fr.tree_lasso, groups=((0, (1, (2,))), (3,)))
    prox = partial(fr.tree_lasso.prox, step=0.3, groups=((0, (1, (2,))), (3,)))
    slope = partial(fr.tree_lasso.grad, groups=((0, (1, (2,))), (3,)))
    w = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, -1.0], [2.0, 1.0]])
    digits = 1e-5 if size > torch.finfo(torch.float32).tiny else 1e-3
    for scale in ([1.0, 1.0, 1.0, size], [size, 1.0, 0.0, 1.0], [size] * 4):
        x = w * torch.tensor(scale)[:, None]
        # By autograd, what is far less than its neighbours may be less than any number on the way.
        for f, least in ((nested, 0.0), (prox, 0.0), (slope, 0.0), (grad(nested), 1e-20)):
            exact = f(x.double()).float()
            torch.testing.assert_close(f(x), exact, rtol=digits, atol=least)
            torch.testing.assert_close(vmap(f)(x[None])[0], exact, rtol=digits, atol=least)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (((0, 1), (1, 2)), "twice"),
        (((..., (...,)),), "twice"),
        (((0, 9),), "the slice 9"),
        ((0, 1), "a tuple of groups"),
        ([0, 0, 1, 1], r"a tuple of groups.* groups are \(\(0, 1\), \(2,\)\) for \(7, 7, 8\)"),
        (((0, "1"),), "'1'"),
    ],
)
def test_groups_that_are_no_trees_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        fr.tree_lasso({"w": torch.zeros(4)}, groups=groups)
    with pytest.raises(ValueError, match=r"^weights has 3 entries; expected 1, one for"):
        fr.tree_lasso(torch.zeros(4), groups=((0, 1),), weights=torch.ones(3))


# Features of a network


LASSONET = fr.hierarchical("skip", "hidden")


def lassonet_cost(v, u, b, step, ratio, alpha):
    """The objective at skip weights of norm b along v: the best hidden weights follow."""
    w = torch.minimum((u.abs() - step * alpha).clamp(min=0), ratio * b[:, None])
    far = 0.5 * (b - v.square().sum().sqrt()) ** 2 + 0.5 * ((u.abs() - w) ** 2).sum(1)
    return far + step * (b + alpha * w.sum(1))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_lassonet_lands_at_the_global_minimum_of_each_feature(ratio, alpha):
    generator = torch.Generator().manual_seed(0)
    params = {
        "skip": normal(generator, 2, 12),
        "hidden": 2 * normal(generator, 5, 12),
        "other": torch.ones(3),
    }
    params["skip"][:, :2] = 0
    params["hidden"][:, 1:3] = 0
    norms = torch.linspace(0, 12, 24001, dtype=torch.float64)
    for step in (0.0, 0.4, 2.0):
        z = LASSONET.prox(params, step, ratio, alpha)
        assert LASSONET(z, ratio, alpha).isfinite()
        assert_equal(z["other"], params["other"])
        for j in range(12):
            v, u, b, w = params["skip"][:, j], params["hidden"][:, j], z["skip"][:, j], z["hidden"][:, j]
            found = 0.5 * ((b - v).square().sum() + (w - u).square().sum())
            found = found + step * (b.square().sum().sqrt() + alpha * w.abs().sum())
            assert found <= lassonet_cost(v, u, norms, step, ratio, alpha).min() + 1e-12
            assert not w[b.abs().sum() == 0].any()
    through = lambda params: sum(w.square().sum() for w in LASSONET.prox(params, 0.4, ratio, alpha).values())
    assert all(w.isfinite().all() for w in grad(through)(params).values())


@pytest.mark.parametrize("outputs", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 10.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_lassonet_in_a_metric_lands_at_the_minimum_of_each_feature(outputs, ratio, alpha):
    generator = torch.Generator().manual_seed(0)
    draws = lambda *shape: normal(generator, *shape)
    params, metric = ({"skip": draws(outputs, 12), "hidden": 2 * draws(5, 12), "other": draws(3)} for _ in range(2))
    metric = fr.tree_map(lambda w: 10 ** (1.5 * w), metric)
    params["skip"][:, :3] = 0
    params["skip"][0, 5:7] = 0  # Where the metric of some is least.
    params["hidden"][:, 2:4] = 0
    h, k = metric["skip"], metric["hidden"]
    ones = fr.tree_map(torch.ones_like, metric)
    plain = LASSONET.prox(params, 0.4, ratio, alpha)
    assert_equal(LASSONET.prox(params, 0.4, ratio, alpha, metric=ones), plain, rtol=1e-12, atol=1e-14)

    def cost(skip, step):
        """The objective of each feature at some skip weights; the best hidden weights follow."""
        norms = skip.square().sum(0).sqrt()
        hidden = torch.minimum((params["hidden"].abs() - step * alpha / k).clamp(min=0), ratio * norms)
        far = (h * (skip - params["skip"]).square()).sum(0) + (k * (params["hidden"].abs() - hidden).square()).sum(0)
        return far / 2 + step * (norms + alpha * hidden.sum(0))

    for step in (0.0, 0.4, 20.0):
        z = LASSONET.prox(params, step, ratio, alpha, metric=metric)
        assert LASSONET(z, ratio, alpha).isfinite()
        assert_equal(z["other"], params["other"])
        found = (h * (z["skip"] - params["skip"]).square()).sum(0) + (
            k * (z["hidden"] - params["hidden"]).square()
        ).sum(0)
        found = found / 2 + step * (z["skip"].square().sum(0).sqrt() + alpha * z["hidden"].abs().sum(0))
        tolerance = 1e-12 * (1 + found)
        assert (found <= cost(torch.zeros_like(z["skip"]), step) + tolerance).all()
        for size in (1e-6, 1e-4, 1e-2, 0.3, 3.0):
            others = z["skip"] + size * draws(40, outputs, 12), z["skip"] * (1 + size * draws(40, 1, 12))
            for each in others:
                assert (found <= vmap(cost, in_dims=(0, None))(each, step) + tolerance).all()
        if outputs == 1:
            line = torch.linspace(-12, 12, 2401, dtype=torch.float64).expand(1, 12, -1).permute(2, 0, 1)
            assert (found <= vmap(cost, in_dims=(0, None))(line, step) + tolerance).all()
    through = lambda params: sum(
        w.square().sum() for w in LASSONET.prox(params, 0.4, ratio, alpha, metric=metric).values()
    )
    assert all(w.isfinite().all() for w in grad(through)(params).values())
    rest = {name: w[..., 7:] if name != "other" else w for name, w in params.items()}
    near = {name: w[..., 7:] if name != "other" else w for name, w in metric.items()}
    whole = lambda v, u: LASSONET.prox({**rest, "skip": v, "hidden": u}, 0.4, ratio, alpha, metric=near)
    leaves = [rest[name].clone().requires_grad_() for name in ("skip", "hidden")]
    torch.autograd.gradcheck(lambda v, u: operator.itemgetter("skip", "hidden")(whole(v, u)), leaves)


def test_lassonet_is_a_penalty_of_two_leaves():
    params = {"skip": torch.tensor([[2.0, 0.5]]), "hidden": torch.tensor([[1.0, 0.25], [0.5, 0.0]])}
    torch.testing.assert_close(LASSONET(params, 1.0, 0.5), torch.tensor(2.5 + 0.875))
    assert LASSONET(params, 0.1) == math.inf
    slopes = grad(LASSONET)(params, 1.0, 0.5)
    assert_equal(slopes, LASSONET.grad(params, 1.0, 0.5))
    far = LASSONET.prox(params, 100.0, 1.0)
    assert not far["skip"].any()
    assert not far["hidden"].any()
    halves = fr.tree_map(lambda w: w.bfloat16(), params)
    assert {w.dtype for w in LASSONET.prox(halves, 0.1, 1.0).values()} == {torch.bfloat16}
    steps = torch.tensor([0.1, 1.0])
    both = vmap(lambda step: LASSONET.prox(params, step, 1.0))(steps)
    for i, step in enumerate(steps):
        assert_equal(fr.tree_map(lambda w, i=i: w[i], both), LASSONET.prox(params, step, 1.0))
    turned = fr.hierarchical("skip", "hidden", axis=0).prox(fr.tree_map(lambda w: w.T, params), 0.3, 1.0)
    assert_equal(fr.tree_map(lambda w: w.T, turned), LASSONET.prox(params, 0.3, 1.0))
    with pytest.raises(ValueError, match="looks for leaf 'skip'"):
        LASSONET({"hidden": torch.ones(2, 2)}, 1.0)
    with pytest.raises(ValueError, match="2 and 3 features"):
        LASSONET({"skip": torch.ones(1, 2), "hidden": torch.ones(2, 3)}, 1.0)
    with pytest.raises(ValueError, match="not trees"):
        LASSONET.prox(params, {"skip": 0.1, "hidden": 0.2}, 1.0)


# Roots of norms, counts, and groups of at least zero


@pytest.mark.parametrize("step", [0.01, 0.3, 1.0, 4.7, 30.0])
def test_roots_of_norms_land_at_the_global_minimum_for_every_step(step):
    line = torch.tensor([[0.6, -0.8]], dtype=torch.float64)
    jump = 1.5 * step ** (2 / 3)
    for size in (0.0, 0.5, jump * (1 - 1e-9), jump, jump * (1 + 1e-9), 2 * jump, 9.0):
        w = size * line
        z = fr.group_l_half.prox(w, step)
        assert bool(z.any()) == (size > jump)
        points = torch.cat(
            [torch.linspace(0, 1.1, 2001, dtype=torch.float64)[:, None, None] * w, rings(jump * line[0].abs())]
        )
        least = cost(fr.group_l_half, (), w, z[None], step)
        assert (cost(fr.group_l_half, (), w, points, step) >= least - 1e-13).all()


@cpu_only
def test_groups_of_one_entry_are_entries_in_a_metric_of_any_size():
    x = 1.1 * torch.logspace(-37, 37, 149, dtype=torch.float64).float()
    for step, metric in itertools.product((3e-30, 0.7, 2e30), (1e-30, 1e-12, 1e12, 1e30)):
        h = torch.full_like(x, metric)
        for group, single, hyper in ((fr.group_mcp, fr.mcp, (0.7, 2.0)), (fr.group_scad, fr.scad, (0.7, 3.0))):
            found = group.prox(x, step, *hyper, dim=(), metric=h)
            assert_equal(found, single.prox(x, step, *hyper, metric=h), rtol=1e-6)


def test_roots_of_norms_take_weights_and_are_separable_on_groups_of_one():
    w = torch.randn(3, 4, dtype=torch.float64)
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    z = fr.group_l_half.prox(w, 0.9, weights=weights)
    for i, c in enumerate(weights):
        torch.testing.assert_close(z[i : i + 1], fr.group_l_half.prox(w[i : i + 1], 0.9 * c))
    assert_equal(fr.group_l_half.prox(w[0], 0.9), fr.l_half.prox(w[0], 0.9), rtol=1e-12)
    torch.testing.assert_close(fr.group_l_half(w[0]), fr.l_half(w[0]))
    infinite = torch.tensor([[math.inf, 1.0], [0.1, 0.1], [0.0, 0.0]])
    assert_equal(fr.group_l_half.prox(infinite, 0.5), torch.tensor([[math.inf, 1.0], [0.0, 0.0], [0.0, 0.0]]))


def test_the_groups_that_are_kept_are_those_that_cost_most_to_lose():
    generator = torch.Generator().manual_seed(0)
    w, h = normal(generator, 4, 3), uniform(generator, 4, 3) + 0.1
    for metric in (None, h):
        z = fr.group_top_k.project(w, 2, metric=metric)
        cost = lambda z, metric=metric: ((1 if metric is None else metric) * (w - z).square()).sum()
        others = [w * torch.tensor([[i in pair] for i in range(4)]) for pair in itertools.combinations(range(4), 2)]
        assert min(map(cost, others)) == cost(z)
    assert_equal(fr.group_top_k.project(torch.ones(3, 2), 2), torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))
    assert_equal(fr.group_top_k.project(w.T, 2, dim=0), fr.group_top_k.project(w, 2).T)
    columns = fr.group_top_k.project(w, 1, dim=0)
    assert (columns != 0).any(0).sum() == 1


@pytest.mark.parametrize(
    ("penalty", "hyper"),
    [
        (fr.group_lasso, ()),
        (fr.sparse_group_lasso, (0.8, 0.3)),
        (fr.group_mcp, (0.7, 2.0)),
        (fr.group_l0, ()),
        (fr.group_l_half, ()),
        (fr.l1_linf, ()),
    ],
)
def test_nonnegative_groups_land_at_the_global_minimum(penalty, hyper):
    form = fr.nonnegative_form(penalty)
    generator = torch.Generator().manual_seed(0)
    axis = torch.linspace(0, 3, 151, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)[:, None]
    for _ in range(6):
        w = 2 * normal(generator, 1, 2) + 0.3
        for step in (0.2, 0.7, 2.0):
            z = form.prox(w, step, *hyper)
            assert (z >= 0).all()
            assert form(z, *hyper) == penalty(z, *hyper)
            least = cost(penalty, hyper, w, z[None], step)
            fine = (z + rings(torch.tensor([1e-6, 1e-4, 1e-2], dtype=torch.float64), 36)).relu()
            for others in (points, fine):
                assert (cost(penalty, hyper, w, others, step) >= least - 1e-12).all()
            assert fr.kkt_residual(z, z - w, form, *hyper, strength=step) < 1e-12
    assert form(torch.tensor([[1.0, -1e-9]]), *hyper) == math.inf


def test_nonnegative_groups_have_metrics_weights_and_training():
    form, w = fr.nonnegative_form(fr.group_lasso), torch.tensor([[3.0, -4.0], [0.5, 0.5]], dtype=torch.float64)
    h = torch.full_like(w, 2.0)
    assert_equal(form.prox(w, 1.0, metric=h), form.prox(w, 0.5), rtol=1e-12)
    torch.testing.assert_close((2.0 * form)(w.relu()), 2 * fr.group_lasso(w.relu()))
    tx, goal = fr.prox_adam(0.05, form, strength=0.8), {"w": w}
    params, state = goal, tx.init(goal)
    for _ in range(1500):
        updates, state = tx.update({"w": params["w"] - w}, state, params)
        params = fr.apply_updates(params, updates)
    torch.testing.assert_close(params["w"], torch.tensor([[2.2, 0.0], [0.0, 0.0]], dtype=torch.float64))
    assert fr.kkt_residual(params, {"w": params["w"] - w}, form, strength=0.8) < 1e-6


@pytest.mark.parametrize(
    "rule", [fr.group_l0, fr.group_l0.grad, lambda w, **options: fr.group_l0.prox(w, 0.1, **options)]
)
def test_a_dimension_that_a_leaf_does_not_have_is_refused_by_every_rule(rule):
    with pytest.raises(ValueError, match="at leaf 'w'"):
        rule({"w": torch.ones(2, 3)}, dim=2)
