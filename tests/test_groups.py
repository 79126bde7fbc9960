"""Laws of groups, greatest magnitudes, orders and differences, beside those of the table."""

from __future__ import annotations

import math

import pytest
import torch
from cases import assert_equal
from torch.func import grad, vmap

import funcreg as fr

NONCONVEX = [
    (fr.group_mcp, (0.7, 2.0)),
    (fr.group_scad, (0.7, 3.7)),
    (fr.group_scad, (0.7, 2.1)),
    (fr.group_l0, ()),
]


def cost(penalty, hyper, w, z, step, h=1.0, **options):
    """The objective of a proximal operator, for each of many points z."""
    return 0.5 * (h * (z - w) ** 2).flatten(1).sum(1) + step * vmap(lambda z: penalty(z, *hyper, **options))(z)


def rings(radii, angles=720):
    """Points of the plane on circles around zero."""
    turn = torch.linspace(0, 2 * math.pi, angles + 1, dtype=torch.float64)[:-1]
    return (radii[:, None, None] * torch.stack([turn.cos(), turn.sin()], 1)).reshape(-1, 1, 2)


@pytest.mark.parametrize(("penalty", "hyper"), NONCONVEX)
@pytest.mark.parametrize("step", [0.3, 0.5, 1.0, 2.0, 2.6, 2.7, 3.3, 4.7, 6.0])
def test_nonconvex_groups_land_at_the_global_minimum_for_every_step(penalty, hyper, step):
    grid = torch.linspace(0, 6, 6001, dtype=torch.float64)
    for size in torch.linspace(0, 5.5, 23, dtype=torch.float64):
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
    points = rings(torch.linspace(0, 5, 251, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        w = 3 * torch.randn(1, 2, dtype=torch.float64, generator=generator)
        h = 10 ** (spread * (2 * torch.rand(1, 2, dtype=torch.float64, generator=generator) - 1))
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
