"""Minima are those of scikit-learn, certified for every penalty, and have the derivatives of the implicit function."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import sklearn
import torch
from cases import CONSTRAINTS, DEVICE, PENALTIES, assert_equal, draw, draw_fours, flat, normal, number, squares, zeros
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, MultiTaskLasso
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    mse_loss,
    smooth_l1_loss,
    softplus,
)

import funcreg as fr
from funcreg.core.undocumented import forward_depth

#: A lasso of `LogisticRegression`, whose argument has another name since scikit-learn 1.8.
LASSO = {"l1_ratio": 1.0} if tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8) else {"penalty": "l1"}


def standard(load) -> tuple[Tensor, Tensor]:
    x, y = load(return_X_y=True)
    return torch.tensor((x - x.mean(0)) / (x.std(0) + 1e-9), device=DEVICE), torch.tensor(y, device=DEVICE)


def logistic(params, x, y):
    return binary_cross_entropy_with_logits(x @ params["w"] + params["b"], y.double())


def softmax(params, x, y):
    return cross_entropy(x @ params["w"].T + params["b"], y)


# scikit-learn


@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0, 100.0])
def test_the_lasso_of_scikit_learn(strength):
    x, y = standard(load_diabetes)
    found = fr.minimize(
        squares, {"w": zeros(10), "b": zeros()}, fr.l1, strength=strength, args=(x, y), mask=fr.select("w")
    )
    expected = Lasso(strength, tol=1e-14, max_iter=100_000).fit(x.cpu().numpy(), y.cpu().numpy())
    np.testing.assert_allclose(found.params["w"].cpu(), expected.coef_, atol=1e-9)
    np.testing.assert_array_equal(found.params["w"].cpu() == 0, expected.coef_ == 0)
    assert found.converged
    assert found.residual <= 1e-8
    assert abs(float(found.params["b"]) - expected.intercept_) < 1e-9


def test_the_elastic_net_of_badly_scaled_columns():
    x, y = standard(load_diabetes)
    x, y = x * torch.logspace(-3, 3, 10, dtype=torch.float64, device=DEVICE), y - y.mean()
    found = fr.minimize(squares, {"w": zeros(10)}, fr.elastic, 0.5, 0.9, args=(x, y))
    expected = ElasticNet(alpha=0.5, l1_ratio=0.9, fit_intercept=False, tol=1e-15, max_iter=1_000_000)
    expected = expected.fit(x.cpu().numpy(), y.cpu().numpy()).coef_
    assert found.converged
    np.testing.assert_allclose(found.params["w"].cpu(), expected, rtol=1e-7, atol=1e-12)


def test_the_lasso_of_several_tasks():
    x, y = standard(load_diabetes)
    targets = torch.stack([y, y.flip(0), y.square() / 100], 1) - y.mean()
    loss = lambda w, x, y: (x @ w.T - y).square().sum() / (2 * len(x))
    found = fr.minimize(loss, zeros(3, 10), fr.group_lasso, strength=8.0, args=(x, targets), dim=0)
    expected = MultiTaskLasso(8.0, fit_intercept=False, tol=1e-14, max_iter=100_000)
    expected = expected.fit(x.cpu().numpy(), targets.cpu().numpy()).coef_
    np.testing.assert_allclose(found.params.cpu(), expected, atol=1e-7)
    np.testing.assert_array_equal(found.params.cpu() == 0, expected == 0)


@pytest.mark.parametrize("strength", [0.1, 0.01, 0.001])
def test_logistic_regression_with_a_free_intercept(strength):
    x, y = standard(load_breast_cancer)
    found = fr.minimize(
        logistic, {"w": zeros(30), "b": zeros()}, fr.l1, strength=strength, args=(x, y), mask=fr.select("w")
    )
    assert found.converged
    model = LogisticRegression(C=1 / (strength * len(y)), **LASSO, solver="saga", tol=1e-10, max_iter=20_000)
    weights = model.fit(x.cpu().numpy(), y.cpu().numpy()).coef_[0] if strength > 0.05 else found.params["w"].cpu()
    np.testing.assert_allclose(found.params["w"].cpu(), weights, atol=1e-5)
    slopes = grad(logistic)(found.params, x, y)
    residual = fr.kkt_residual(found.params, slopes, fr.l1, strength=strength, mask=fr.select("w"))
    torch.testing.assert_close(residual, found.residual, rtol=0, atol=1e-12)
    assert residual <= 1e-8


@pytest.mark.parametrize(
    ("load", "strength"),
    [(load_wine, 0.1), (load_wine, 0.03), pytest.param(load_digits, 0.1, marks=pytest.mark.slow)],
)
def test_softmax_regression_with_groups_of_classes_is_certified(load, strength):
    x, y = standard(load)
    params = {"w": zeros(int(y.max()) + 1, x.shape[1]), "b": zeros(int(y.max()) + 1)}
    found = fr.minimize(
        softmax, params, fr.group_lasso, strength=strength, args=(x, y), mask=fr.select("w"), dim=0, max_steps=500
    )
    dead = (found.params["w"] == 0).all(0)
    assert found.converged
    assert 0 < dead.sum() < len(dead)
    assert int(found.steps) < 100


# Every penalty


def quadratic(params, goal):
    return sum(
        (
            (0.5 + torch.linspace(0, 1, w.numel(), dtype=w.dtype, device=w.device).reshape(w.shape)) * (w - g).square()
        ).sum()
        for w, g in zip(fr.tree_leaves(params), fr.tree_leaves(goal), strict=True)
    )


@pytest.mark.parametrize("name", [n for n, case in PENALTIES.items() if not case.unshaped])
def test_every_penalty_is_minimized(name):
    case = PENALTIES[name]
    goal = (draw_fours if case.least_ndim > 1 else draw)(3)
    mask = fr.select(min_ndim=case.least_ndim) if case.least_ndim else None
    begin = fr.tree_map(torch.zeros_like, goal) if not case.nonconvex else goal
    steps = 100 if case.nonconvex and case.ruleless else 2000
    found = fr.minimize(
        quadratic, begin, case.penalty, *case.hyper, strength=0.5, args=(goal,), mask=mask, max_steps=steps, tol=1e-7,
        **case.options,
    )  # fmt: skip
    if case.nonconvex and case.ruleless:  # Its residual is that of a step of one size, which may jump elsewhere.
        assert quadratic(found.params, goal).isfinite()
        return
    assert found.converged, found.residual
    if case.nonconvex:
        return
    objective = lambda point: quadratic(point, goal) + 0.5 * case.value(point, mask=mask)
    least, generator = objective(found.params), torch.Generator().manual_seed(0)
    for size in (1e-3, 0.1):
        other = fr.tree_map(lambda w, size=size: w + size * normal(generator, *w.shape), found.params)
        assert objective(other) >= least - 1e-12


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_every_constraint_is_obeyed(name):
    case = CONSTRAINTS[name]
    goal = draw_fours(5)
    found = fr.minimize(
        quadratic, goal, case.penalty, *case.hyper, args=(goal,), max_steps=500, tol=1e-6, **case.options
    )
    assert case.penalty(found.params, *case.hyper, **case.options) == 0


# Members


def test_members_are_those_of_a_loop():
    x, y = standard(load_diabetes)
    strengths = torch.logspace(-1, 1.5, 7, dtype=torch.float64, device=DEVICE)
    data = torch.stack([x, x.flip(1)])
    one = lambda strength, x: fr.minimize(squares, {"w": zeros(10)}, fr.l1, strength=strength, args=(x, y))
    found = vmap(vmap(one, in_dims=(0, None)), in_dims=(None, 0))(strengths, data)
    assert found.converged.all()
    assert len(found.steps.unique()) > 2  # Members that are done stop.
    for i in range(2):
        for k, strength in enumerate(strengths):
            alone = one(strength, data[i])
            torch.testing.assert_close(found.params["w"][i, k], alone.params["w"], rtol=0, atol=1e-8)
            assert torch.equal(found.params["w"][i, k] == 0, alone.params["w"] == 0)


@pytest.mark.slow
def test_members_take_no_more_steps_than_alone():
    """Models that help one of them are tried by that one alone, and the others take steps."""
    generator = torch.Generator().manual_seed(0)
    x = normal(generator, 60, 5)
    y = 2 * x[:, 0] + normal(generator, 60)
    smooth = lambda w, h: (h * (softplus((x @ w - y) / h) + softplus((y - x @ w) / h))).mean()
    solve = lambda h: fr.minimize(smooth, zeros(5), fr.l1, strength=0.05, args=(h,))
    widths = torch.tensor([0.3, 0.003], dtype=torch.float64, device=DEVICE)
    found, alone = vmap(solve)(widths), [solve(h) for h in widths]
    assert found.converged.all()
    for k, one in enumerate(alone):
        torch.testing.assert_close(found.params[k], one.params, rtol=0, atol=1e-6)
        assert found.steps[k] <= 1.5 * one.steps


def test_nothing_given_is_changed_and_dtypes_stay():
    params = {"w": torch.ones(3, device=DEVICE), "v": torch.ones(2, dtype=torch.float64, device=DEVICE)}
    before = fr.tree_map(torch.clone, params)
    loss = lambda p: (p["w"] - 2).square().sum() + (p["v"] + 1).square().sum()
    found = fr.minimize(loss, params, fr.l1, strength=0.5, tol=1e-5)
    assert_equal(params, before)
    assert found.params["w"].dtype == torch.float32
    torch.testing.assert_close(found.params["w"], torch.full((3,), 1.75, device=DEVICE))
    torch.testing.assert_close(found.params["v"], torch.full((2,), -0.75, dtype=torch.float64, device=DEVICE))


def test_what_has_not_converged_says_so():
    x, y = standard(load_diabetes)
    found = fr.minimize(squares, {"w": zeros(10)}, fr.l1, strength=0.1, args=(x, y), max_steps=2)
    assert not found.converged
    assert found.residual > 1e-8
    assert found.steps == 2
    with pytest.warns(UserWarning, match="the loss or its gradient is not finite"):
        hopeless = fr.minimize(lambda w: w.sum() * torch.nan, zeros(2), fr.l1)
    assert not hopeless.converged
    with pytest.warns(UserWarning, match=r"tol is 1e-08, and params are torch.float32"):
        in_float32 = fr.minimize(
            squares, {"w": zeros(10).float()}, fr.l1, strength=0.1, args=(x.float(), y.float()), tol=1e-8
        )
    assert not in_float32.converged
    assert in_float32.steps < 2000  # Where rounding is all that moves, it ends.
    assert in_float32.residual < 1e-3


def test_a_start_at_the_solution_stays():
    found = fr.minimize(lambda w: (w - 1).square().sum() / 2, number(0.5), fr.l1, strength=0.5)
    assert found.steps == 0
    assert found.params == 0.5


# Derivatives


def lasso(strength, x, y, **options):
    return fr.minimize(squares, {"w": zeros(x.shape[1])}, fr.l1, strength=strength, args=(x, y), **options).params["w"]


def between(f, at, h=1e-4):
    return (f(at + h) - f(at - h)) / (2 * h)


def test_derivatives_in_the_strength():
    x, y = standard(load_diabetes)
    f, at = lambda strength: lasso(strength, x, y), number(2.0)
    expected = between(f, at)
    for derivative in (jacrev, jacfwd):
        torch.testing.assert_close(derivative(f)(at), expected, rtol=1e-6, atol=1e-6)
    leaf = at.clone().requires_grad_()
    f(leaf).square().sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * f(at) @ expected, rtol=1e-6, atol=0)
    strengths = torch.logspace(-1, 1, 4, dtype=torch.float64, device=DEVICE)
    size = lambda strength: f(strength).square().sum()
    many = vmap(grad(size))(strengths)
    for slope, strength in zip(many, strengths, strict=True):
        torch.testing.assert_close(slope, between(size, strength), rtol=1e-5, atol=1e-5)


def test_derivatives_in_hyperparameters():
    x, y = standard(load_diabetes)

    def net(alpha, rho):
        return fr.minimize(squares, {"w": zeros(10)}, fr.elastic, alpha, rho, args=(x, y)).params["w"]

    alpha, rho = number(1.5), number(0.7)
    torch.testing.assert_close(jacrev(net, 0)(alpha, rho), between(lambda a: net(a, rho), alpha), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(jacfwd(net, 1)(alpha, rho), between(lambda r: net(alpha, r), rho), rtol=1e-5, atol=1e-5)


def test_derivatives_in_one_strength_for_each_weight():
    x, y = standard(load_diabetes)
    f = lambda strengths: fr.minimize(squares, {"w": zeros(10)}, fr.l1, strength={"w": strengths}, args=(x, y)).params[
        "w"
    ]
    at = torch.linspace(1, 5, 10, dtype=torch.float64, device=DEVICE)
    jacobian = jacrev(f)(at)
    for i in range(10):
        unit = 1e-4 * torch.eye(10, dtype=torch.float64, device=DEVICE)[i]
        torch.testing.assert_close(jacobian[:, i], (f(at + unit) - f(at - unit)) / 2e-4, rtol=1e-5, atol=1e-5)


def test_derivatives_of_groups_and_in_the_data():
    x, y = standard(load_diabetes)
    f = lambda strength, x: (
        fr.minimize(squares, {"w": zeros(10)}, fr.group_lasso, strength=strength, args=(x, y), dim=None)
        .params["w"]
        .square()
        .sum()
    )
    at = number(20.0)
    torch.testing.assert_close(grad(f)(at, x), between(lambda c: f(c, x), at), rtol=1e-5, atol=0)
    slopes = grad(f, 1)(at, x)
    for i, j in ((0, 0), (5, 3), (100, 9)):
        unit = torch.zeros_like(x)
        unit[i, j] = 1e-3
        expected = (f(at, x + unit) - f(at, x - unit)) / 2e-3
        torch.testing.assert_close(slopes[i, j], expected, rtol=1e-4, atol=1e-6)


def test_the_derivative_of_ridge_is_that_of_its_closed_form():
    x, y = standard(load_diabetes)
    y = y - y.mean()
    closed = lambda c: torch.linalg.solve(
        x.T @ x / len(x) + c * torch.eye(10, dtype=torch.float64, device=DEVICE), x.T @ y / len(x)
    )
    found = lambda c: fr.minimize(squares, {"w": zeros(10)}, fr.half_l2, strength=c, args=(x, y)).params["w"]
    at = number(0.3)
    torch.testing.assert_close(found(at), closed(at), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(jacrev(found)(at), jacrev(closed)(at), rtol=1e-6, atol=1e-8)


def test_derivatives_beyond_matrices(monkeypatch):
    for module in ("proximal_newton", "implicit"):
        monkeypatch.setattr(sys.modules[f"funcreg.solvers.{module}"], "DENSE", 4)
    x, y = standard(load_diabetes)
    f, at = lambda strength: lasso(strength, x, y), number(5.0)
    expected = between(f, at)
    assert 0 < (f(at) != 0).sum() < 10
    for derivative in (jacrev, jacfwd):
        torch.testing.assert_close(derivative(f)(at), expected, rtol=1e-5, atol=1e-6)


def test_derivatives_in_what_holds_entries_where_they_are():
    x, y = made(30, 80)  # So many that entries whose step has no slope are left out of the equations.

    def f(low):
        return fr.minimize(squares, {"w": zeros(80)}, fr.box, low, 0.3, args=(x, y), tol=1e-10).params["w"]

    low = number(0.0)
    held = f(low) == 0
    assert 5 < held.sum() < 75
    expected = between(f, low, 1e-6)
    assert (expected[held] == 1).any()
    for derivative in (jacrev, jacfwd):
        torch.testing.assert_close(derivative(f)(low), expected, rtol=1e-5, atol=1e-5)
    size = lambda low: f(low).sum()
    mapped = vmap(grad(size))(torch.stack([low, low]))  # Where nobody knows how many these are.
    torch.testing.assert_close(mapped, expected.sum().expand(2), rtol=1e-5, atol=1e-5)


SPECTRAL = {
    "nuclear": (0.05, lambda c: (fr.nuclear, (), {"strength": c})),
    "spectral": (0.05, lambda c: (fr.spectral, (), {"strength": c})),
    "spectral_mcp": (0.15, lambda c: (fr.spectral_mcp, (c, 3.0), {})),
    "schatten": (0.02, lambda c: (fr.schatten, (), {"strength": c, "p": 0.5})),
    "rank_envelope": (0.02, lambda c: (fr.rank_envelope, (1.0,), {"strength": c})),
    "on_singular_values": (0.15, lambda c: (fr.on_singular_values(fr.mcp), (c, 3.0), {})),
    "spectral_ball": (0.15, lambda c: (fr.spectral_ball, (c,), {})),
    "nuclear_ball": (0.3, lambda c: (fr.nuclear_ball, (c,), {})),
    "stiefel": (0.5, lambda c: (fr.stiefel, (), {})),
}


def of_low_rank(make):
    """From a number to the solution that a penalty of singular values has for it, and to a number made of that."""
    x, y = made(60, 12)
    loss = lambda w, y: (x @ w.reshape(-1) - y).square().mean() / 2
    start = torch.eye(3, 4, dtype=torch.float64, device=DEVICE)

    def solution(c):
        penalty, hyper, options = make(c)
        moved = y + c * x[:, 0]  # `stiefel` has no number: its solution depends on the data.
        return fr.minimize(loss, start, penalty, *hyper, args=(moved,), tol=1e-11, **options).params

    def size(c):
        found = solution(c)
        return found.square().sum() + found.sum()

    return solution, size


@pytest.mark.parametrize(
    ("at", "make"),
    [
        pytest.param(*row, marks=[pytest.mark.slow] * (name not in ("nuclear", "spectral_ball")), id=name)
        for name, row in SPECTRAL.items()
    ],
)
def test_derivatives_through_singular_values(at, make):
    solution, size = of_low_rank(make)
    expected = between(solution, number(at), 1e-5)
    assert (expected.abs() > 1e-3).any()
    for derivative in (jacrev, jacfwd):
        torch.testing.assert_close(derivative(solution)(number(at)), expected, rtol=1e-5, atol=1e-6)
    leaf = number(at).requires_grad_()
    size(leaf).backward()
    torch.testing.assert_close(leaf.grad, between(size, number(at), 1e-5), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank_envelope", "spectral_ball"])
def test_second_derivatives_through_singular_values_also_mapped(name):
    at, make = SPECTRAL[name]
    size = of_low_rank(make)[1]
    expected = between(grad(size), number(at), 1e-5)
    torch.testing.assert_close(grad(grad(size))(number(at)), expected, rtol=1e-5, atol=1e-6)
    points = torch.stack([number(at), number(1.01 * at)])
    torch.testing.assert_close(vmap(grad(size))(points), torch.stack([grad(size)(c) for c in points]))


@pytest.mark.parametrize("make", [
    lambda c: fr.prox_sgd(0.5, fr.l1, strength=c),
    lambda c: fr.prox_adam(0.3, fr.l1, strength=c, b2=0.9),
    lambda c: fr.fista(0.5, fr.l1, strength=c, restart=False),
], ids=["prox_sgd", "prox_adam", "fista"])  # fmt: skip
def test_unrolled_steps_have_derivatives_too(make):
    goal = torch.tensor([2.0, -1.0, 0.05], dtype=torch.float64, device=DEVICE)

    def trained(strength):
        tx, w = make(strength), torch.zeros_like(goal)
        state = tx.init(w)
        for _ in range(60):
            updates, state = tx.update(w - goal, state, w)
            w = fr.apply_updates(w, updates)
        return w

    at = number(0.3)
    torch.testing.assert_close(jacrev(trained)(at), between(trained, at, 1e-6), rtol=1e-5, atol=1e-6)


# Errors


@pytest.mark.parametrize(("change", "error", "said"), [
    ({"strength": -1.0}, ValueError, "strength"),
    ({"tol": -1.0}, ValueError, "tol"),
    ({"max_steps": 1.5}, ValueError, "max_steps"),
    ({"args": [1]}, TypeError, "args is a list"),
    ({"mask": "w"}, TypeError, "select"),
    ({"dim": 0}, TypeError, "l1 takes"),
    ({"loss": lambda w: w}, ValueError, r"loss returned shape \(2,\)"),
    ({"loss": lambda w: 1.0}, ValueError, "loss returned a float"),
    ({"penalty": "l1"}, TypeError, "expected a Penalty"),
    ({"params": torch.ones(2, dtype=torch.int64)}, TypeError, "int64"),
    ({"params": torch.ones(2, dtype=torch.complex64)}, TypeError, "complex"),
])  # fmt: skip
def test_bad_input_is_named(change, error, said):
    given = {"loss": lambda w: w.square().sum(), "params": zeros(2), "penalty": fr.l1} | change
    loss, params, penalty = (given.pop(name) for name in ("loss", "params", "penalty"))
    with pytest.raises(error, match=said):
        fr.minimize(loss, params, penalty, **given)


def test_a_penalty_without_a_proximal_operator_is_refused():
    with pytest.raises((ValueError, TypeError, NotImplementedError), match="prox"):
        fr.minimize(lambda w: w.square().sum(), zeros(2, 2), fr.orthogonality)


def test_it_prints_and_saves(tmp_path):
    found = fr.minimize(lambda w: (w - 1).square().sum(), zeros(2), fr.l1)
    assert isinstance(found, fr.Solution)
    torch.save(found, tmp_path / "found.pt")
    assert_equal(torch.load(tmp_path / "found.pt"), found)
    assert flat(found.params).shape == (2,)


@pytest.mark.parametrize("of", [mse_loss, huber_loss, smooth_l1_loss], ids=lambda f: f.__name__)
def test_losses_of_torch_without_a_forward_derivative_of_their_gradient_are_solved_and_differentiated(of):
    x, y = standard(load_diabetes)
    y = y / 50

    def solved(strength):
        loss = lambda p, x, y: of(x @ p["w"], y)
        return fr.minimize(loss, {"w": zeros(10)}, fr.l1, strength=strength, args=(x, y), tol=1e-9)

    strength = torch.tensor(0.05, dtype=torch.float64, device=DEVICE)
    found = solved(strength)
    assert found.converged
    size = lambda s: solved(s).params["w"].square().sum()
    numeric = (size(strength + 1e-4) - size(strength - 1e-4)) / 2e-4
    torch.testing.assert_close(grad(size)(strength), numeric, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(jvp(size, (strength,), (torch.ones_like(strength),))[1], numeric, rtol=1e-3, atol=1e-8)


# Where it is hard


def made(samples: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = normal(generator, samples, columns)
    return x, x[:, :5].sum(1) + normal(generator, samples)


@pytest.mark.parametrize("strength", [0.1, 0.01, 0.001])
def test_more_columns_than_samples_at_small_strengths(strength):
    x, y = made(30, 80)
    found = fr.minimize(squares, {"w": zeros(80)}, fr.l1, strength=strength, args=(x, y))
    expected = Lasso(strength, fit_intercept=False, tol=1e-15, max_iter=1_000_000).fit(x.cpu().numpy(), y.cpu().numpy())
    assert found.converged
    assert found.steps < 500
    np.testing.assert_allclose(found.params["w"].cpu(), expected.coef_, atol=1e-7)


def test_where_a_hessian_of_all_would_be_too_large_those_that_are_not_zero_have_one():
    x, y = made(60, 700)
    found = fr.minimize(squares, {"w": zeros(700)}, fr.l1, strength=0.1, args=(x, y))
    expected = Lasso(0.1, fit_intercept=False, tol=1e-15, max_iter=100_000).fit(x.cpu().numpy(), y.cpu().numpy()).coef_
    assert found.converged
    assert found.steps < 300  # With models to all digits, thousands.
    np.testing.assert_allclose(found.params["w"].cpu(), expected, atol=1e-8)
    np.testing.assert_array_equal(found.params["w"].cpu() == 0, expected == 0)


def test_of_many_entries_those_that_matter_are_found_in_few_steps():
    x, y = made(60, 1500)
    strengths = torch.tensor([0.5, 0.1], dtype=torch.float64, device=DEVICE)
    found = vmap(lambda c: fr.minimize(squares, {"w": zeros(1500)}, fr.l1, strength=c, args=(x, y)))(strengths)
    assert found.converged.all()
    assert found.steps.max() < 60
    for strength, w in zip(strengths, found.params["w"], strict=True):
        slopes = grad(squares)({"w": w}, x, y)
        assert fr.kkt_residual({"w": w}, slopes, fr.l1, strength=strength) <= 1e-8


@pytest.mark.slow
def test_models_of_more_rows_than_torch_factorizes_right_in_several_threads():
    script = """
        import torch, funcreg as fr
        torch.set_num_threads(2)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(300, 200, dtype=torch.float64, generator=generator)
        y = x[:, :5].sum(1) + torch.randn(300, dtype=torch.float64, generator=generator)
        loss = lambda w, x, y: (x @ w - y).square().mean() / 2
        found = fr.minimize(loss, torch.zeros(200, dtype=torch.float64), fr.l1, strength=1e-3, args=(x, y))
        assert found.converged and found.steps < 100, found
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "MKL" not in run.stderr + run.stdout


def test_columns_far_from_zero_beside_an_intercept():
    x, y = standard(load_diabetes)
    begin, mask = {"w": zeros(10), "b": zeros()}, fr.select("w")
    found = fr.minimize(squares, begin, fr.l1, strength=1.0, args=(x + 100, y), mask=mask, tol=1e-7)
    expected = fr.minimize(squares, begin, fr.l1, strength=1.0, args=(x, y), mask=mask)
    assert found.converged
    torch.testing.assert_close(found.params["w"], expected.params["w"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", ["equal", "zero", "constant"])
def test_columns_that_tell_nothing_new(change):
    x, y = made(40, 8)
    x = x.clone()
    x[:, 5] = {"equal": x[:, 0], "zero": 0.0 * x[:, 0], "constant": torch.ones_like(x[:, 0])}[change]
    found = fr.minimize(squares, {"w": zeros(8)}, fr.l1, strength=0.05, args=(x, y))
    expected = Lasso(0.05, fit_intercept=False, tol=1e-15, max_iter=100_000).fit(x.cpu().numpy(), y.cpu().numpy()).coef_
    objective = lambda w: squares({"w": w}, x, y) + 0.05 * w.abs().sum()
    torch.testing.assert_close(
        objective(found.params["w"]), objective(torch.tensor(expected, device=DEVICE)), rtol=1e-12, atol=0
    )
    assert found.converged


def test_what_is_not_a_number_ends_at_once_and_says_where_it_is():
    x, y = made(40, 8)
    for broken in (torch.nan, torch.inf):
        args = (x.index_fill(0, torch.tensor([3], device=DEVICE), broken), y)
        with pytest.warns(UserWarning, match=r"is not finite at params, .* There is NaN or inf in args at '0'\."):
            found = fr.minimize(squares, {"w": zeros(8)}, fr.l1, args=args)
        assert found.steps == 0
        assert not found.converged
    with pytest.warns(UserWarning, match="Expected params at which the loss is finite"):
        nothing = fr.minimize(squares, {"w": zeros(8)}, fr.l1, args=(x[:0], y[:0]))  # The mean of no rows.
    assert nothing.residual.isnan()
    assert not nothing.converged
    solve = lambda y: fr.minimize(squares, {"w": zeros(8)}, fr.l1, args=(x, y)).converged
    with pytest.warns(UserWarning, match="for 1 of 2 members"):
        assert vmap(solve)(torch.stack([y, y / 0])).tolist() == [True, False]


def test_numbers_of_steps_may_be_numpys():
    assert fr.minimize(lambda w: (w - 1).square(), number(0.0), fr.l1, max_steps=np.int64(0)).steps == 0
    with pytest.raises(ValueError, match="expected a whole number of at least 0"):
        fr.minimize(lambda w: (w - 1).square(), number(0.0), fr.l1, max_steps=np.float64(2.0))


def test_a_loss_that_hides_its_parameters_is_named():
    with pytest.warns(UserWarning, match="does it depend on them"):
        fr.minimize(lambda w: w.detach().square().sum(), zeros(2), fr.l1)


# Tolerances


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-8), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_tolerance_is_what_the_dtype_reaches(dtype, tol):
    goal = torch.tensor([1.3, -0.2], dtype=dtype, device=DEVICE)
    found = fr.minimize(lambda w: (w - goal).square().sum(), torch.zeros_like(goal), fr.l1, strength=0.5)
    assert found.converged
    assert found.residual <= tol
    assert found.params.dtype == dtype


def test_a_tolerance_that_no_float32_reaches_is_named():
    with pytest.warns(UserWarning, match=r"tol is 1e-09, and params are torch.float32"):
        fr.minimize(lambda w: (w - 1).square().sum(), zeros(2).float(), fr.l1, tol=1e-9)


# Compiled, and without a word


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # The compiler of torch looks at it after a break.
def test_in_compiled_functions_it_is_left_as_it_is():
    x, y = made(40, 8)
    size = lambda strength: 2 * lasso(strength, x, y).square().sum()
    compiled = torch.compile(size, backend="eager")
    at = number(0.1).requires_grad_()
    torch.testing.assert_close(compiled(at), size(at), rtol=0, atol=0)
    compiled(at).backward()
    torch.testing.assert_close(at.grad, grad(size)(number(0.1)), rtol=1e-12, atol=0)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(size, backend="eager", fullgraph=True)(number(0.1))


@pytest.mark.slow
def test_nothing_that_is_deprecated_is_used():
    script = """
        import warnings, torch, funcreg as fr
        warnings.simplefilter("error")
        x = torch.eye(3, dtype=torch.float64)
        y = torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64)
        loss = lambda p, x: (x @ p["w"] - p["b"] - y).square().sum()
        begin = {"w": torch.zeros(3, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
        fr.regularization_path(loss, begin, fr.l1, args=(x,), mask=fr.select("w"), count=3)
        f = lambda s: fr.minimize(loss, begin, fr.l1, strength=s, args=(x,), mask=fr.select("w")).params["w"].sum()
        torch.func.grad(f)(torch.tensor(0.5, dtype=torch.float64))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert not run.returncode, run.stderr


@pytest.mark.parametrize("of", [mse_loss, huber_loss, smooth_l1_loss], ids=lambda f: f.__name__)
def test_maps_over_maps_of_losses_of_torch_whose_targets_a_map_shares(of):
    x, y = made(40, 8)
    data, strengths = torch.stack([x, x.flip(1)]), torch.tensor([0.3, 0.1], dtype=torch.float64, device=DEVICE)
    loss = lambda p, x, y: of(x @ p["w"], y)
    one = lambda strength, x: fr.minimize(loss, {"w": zeros(8)}, fr.l1, strength=strength, args=(x, y)).params["w"]
    found = vmap(vmap(one, in_dims=(0, None)), in_dims=(None, 0))(strengths, data)
    for i, k in ((0, 0), (0, 1), (1, 0), (1, 1)):
        torch.testing.assert_close(found[i, k], one(strengths[k], data[i]), rtol=0, atol=1e-8)


HELD = {
    "a multiple": lambda c: c * fr.l1,
    "a sum": lambda c: c * fr.l1 + 0.1 * fr.half_l2,
    "hyperparameters": lambda c: fr.elastic.given(c, 0.5),
    "weights": lambda c: {"w": c * torch.linspace(0.5, 1.5, 8, dtype=torch.float64, device=DEVICE)} * fr.l1,
    "parts": lambda c: fr.per_leaf({"w": c * fr.l1}),
    "one side": lambda c: fr.nonnegative_form(c * fr.l1),
}


@pytest.mark.parametrize("name", HELD)
def test_derivatives_and_maps_follow_the_tensors_that_a_penalty_holds(name):
    x, y = made(40, 8)
    solved = lambda c, penalty=None: fr.minimize(
        squares, {"w": zeros(8)}, penalty or HELD[name](c), strength=0.2, args=(x, y), tol=1e-12
    ).params["w"]
    size = lambda c: solved(c).square().sum()
    at = torch.tensor([0.5, 0.8], dtype=torch.float64, device=DEVICE)
    expected = torch.stack([between(size, c) for c in at])
    tracked = at[0].clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(size(tracked), tracked)[0], expected[0], rtol=1e-5, atol=1e-8)
    for derivative in (grad, jacfwd):
        torch.testing.assert_close(vmap(derivative(size))(at), expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(vmap(solved)(at), torch.stack([solved(c) for c in at]), rtol=0, atol=1e-9)
    path = lambda c: fr.regularization_path(
        squares, {"w": zeros(8)}, HELD[name](c), strengths=[0.3, 0.2], args=(x, y), tol=1e-12
    ).params["w"]
    torch.testing.assert_close(grad(lambda c: path(c)[1].square().sum())(at[0]), expected[0], rtol=1e-5, atol=1e-8)


def test_derivatives_and_maps_follow_tensors_among_options():
    x, y = made(40, 8)
    begin, at = zeros(8, 3), 0.5 + made(16, 1)[0].reshape(2, 8, 1).abs()
    targets = torch.stack([y, y.flip(0), 2 * y], dim=1)
    solved = lambda penalty, **options: (
        fr.minimize(
            lambda w, x, y: (x @ w - y).square().mean(), begin, penalty, strength=0.05, args=(x, targets), **options
        ).params
    )
    option = lambda w: solved(fr.group_lasso, dim=1, weights=w)
    given = lambda w: solved(fr.group_lasso.given(dim=1, weights=w))
    size = lambda f: lambda w: f(w).square().sum()
    torch.testing.assert_close(vmap(option)(at), torch.stack([option(w) for w in at]), rtol=0, atol=1e-8)
    for derivative in (grad, jacfwd):
        expected = derivative(size(given))(at[0])
        assert expected.any()
        torch.testing.assert_close(derivative(size(option))(at[0]), expected)
    tracked = at[0].clone().requires_grad_()
    size(option)(tracked).backward()
    torch.testing.assert_close(tracked.grad, expected)


def test_what_others_call_otherwise_is_named():
    for theirs, ours in (("max_iter", "max_steps="), ("data", "args="), ("strengths", "strength=")):
        with pytest.raises(TypeError, match=f"minimize got {theirs}=; .*{ours}"):
            fr.minimize(lambda w: w.square().sum(), zeros(2), fr.l1, **{theirs: 1})


def test_what_a_loss_holds_and_a_transform_follows_is_named():
    x, y = made(40, 8)
    solved = lambda y: fr.minimize(lambda w: (x @ w - y).square().mean(), zeros(8), fr.l1, strength=0.1).params
    for call in (
        lambda: vmap(solved)(torch.stack([y, 2 * y])),
        lambda: grad(lambda y: solved(y).sum())(y),
        lambda: jacfwd(lambda y: solved(y).sum())(y),
    ):
        with pytest.raises(TypeError, match=r"the loss holds 'y', which vmap, .* give it in args=\(\.\.\.\)"):
            call()


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2, 3, 2)], ids=str)
def test_derivatives_of_maps_over_maps_are_those_of_loops(shape):
    """Data along the outermost map, strengths along the next, and along the last what both share."""
    x, y = made(30, 3)
    data = torch.stack([x, x.flip(1), x.roll(1, 1)])[: shape[0]]
    strengths = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64, device=DEVICE)[: shape[1]]
    shifts = torch.tensor([0.0, 0.5], dtype=torch.float64, device=DEVICE)
    one = lambda x, s, c: (
        fr.minimize(squares, {"w": zeros(3)}, fr.l1, strength=s, args=(x, y + c), tol=1e-12).params["w"].square().sum()
    )
    inner = lambda x, s: vmap(lambda c: one(x, s, c))(shifts) if len(shape) == 3 else one(x, s, shifts[0])
    maps = lambda data, strengths: vmap(lambda x: vmap(lambda s: inner(x, s))(strengths))(data).sum()
    count = 2 if len(shape) == 3 else 1
    loops = lambda data, strengths: sum(one(x, s, c) for x in data for s in strengths for c in shifts[:count])
    for k in (0, 1):
        expected = grad(loops, k)(data, strengths)
        torch.testing.assert_close(grad(maps, k)(data, strengths), expected, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(jacfwd(maps, k)(data, strengths), expected, rtol=1e-7, atol=1e-9)


# Second derivatives


@pytest.mark.parametrize("penalty", [fr.l1, fr.half_l2], ids=["l1", "half_l2"])
def test_second_derivatives_are_those_of_differences_or_refused(penalty):
    x, y = made(60, 8)
    size = lambda strength: (
        fr.minimize(squares, {"w": zeros(8)}, penalty, strength=strength, args=(x, y), tol=1e-12)
        .params["w"]
        .square()
        .sum()
    )
    at = number(0.05)
    expected = between(grad(size), at)
    for second in (grad(grad(size)), hessian(size), grad(lambda s: jvp(size, (s,), (torch.ones_like(s),))[1])):
        torch.testing.assert_close(second(at), expected, rtol=1e-5, atol=0)
    with pytest.raises(NotImplementedError, match="in reverse"):
        jacfwd(jacfwd(size))(at)


def test_without_the_count_forward_derivatives_of_each_other_go_unnoticed(monkeypatch):
    monkeypatch.setattr(torch._functorch.eager_transforms, "JVP_NESTING", 0)
    assert forward_depth() == 0


# What users meet


def test_a_start_that_requires_a_gradient_gives_a_solution_that_does_not():
    x, y = made(40, 8)
    begin = {"w": torch.nn.Parameter(zeros(8))}
    found = fr.minimize(squares, begin, fr.l1, strength=0.1, args=(x, y))
    assert not found.params["w"].requires_grad
    leaf = y.clone().requires_grad_()
    assert fr.minimize(squares, begin, fr.l1, strength=0.1, args=(x, leaf)).params["w"].requires_grad


def test_a_loss_that_draws_numbers_is_named():
    x, y = made(40, 8)
    loss = lambda p: (torch.nn.functional.dropout(x, 0.5) @ p["w"] - y).square().mean()
    with pytest.raises(TypeError, match=r"It draws random numbers, as dropout does.*eval\(\)"):
        fr.minimize(loss, {"w": zeros(8)}, fr.l1)


def test_a_constraint_has_no_strength():
    with pytest.raises(ValueError, match="holds whatever its strength"):
        fr.minimize(lambda w: w.square().sum(), zeros(2), fr.simplex, strength=0.5)


@pytest.mark.parametrize(("name", "said"), [("strengths", "regularization_path"), ("data", "args=")])
def test_names_of_other_functions_are_said(name, said):
    with pytest.raises(TypeError, match=f"minimize got {name}=.*{said}"):
        fr.minimize(lambda w: w.square().sum(), zeros(2), fr.l1, **{name: 1.0})


def test_where_a_loss_curves_downwards_models_have_minima_too():
    x, y = standard(load_diabetes)
    y, generator = (y - y.mean()) / y.std(), torch.Generator().manual_seed(0)
    begin = {"a": 0.3 * normal(generator, 10, 4), "b": zeros(4), "c": 0.3 * normal(generator, 4), "d": zeros()}
    loss = lambda p, x, y: (torch.tanh(x @ p["a"] + p["b"]) @ p["c"] + p["d"] - y).square().mean() / 2
    found = fr.minimize(loss, begin, fr.l1, strength=0.02, args=(x, y), mask=fr.select("a", "c"))
    assert found.converged
    assert found.steps < 300  # With models that have no minima, more.
    each = vmap(lambda s: fr.minimize(loss, begin, fr.l1, strength=s, args=(x, y), mask=fr.select("a", "c")))
    assert each(torch.tensor([0.02, 0.1], dtype=torch.float64, device=DEVICE)).converged.all()


def poisson(params, x, y):
    outputs = x @ params["w"] + params["b"]
    return (outputs.exp() - y * outputs).mean()


@pytest.mark.parametrize("unit", [1e2, 1e3, 1e6])
def test_counts_of_any_size_are_fitted_from_zeros(unit):
    """The first steps lead to where an exponential function has up to hundreds of digits."""
    x, _ = made(60, 4)
    y, begin, mask = unit * (0.5 * x[:, 0]).exp().round(), {"w": zeros(4), "b": zeros()}, fr.select("w")
    found = fr.minimize(poisson, begin, fr.l1, strength=0.1 * unit, args=(x, y), mask=mask, tol=1e-8 * unit)
    near = {"w": zeros(4), "b": y.mean().log()}
    expected = fr.minimize(poisson, near, fr.l1, strength=0.1 * unit, args=(x, y), mask=mask, tol=1e-8 * unit)
    assert found.converged
    assert found.steps < 100
    torch.testing.assert_close(found.params, expected.params, rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [44.0, 100.0])
def test_where_no_digit_of_a_model_would_be_right_its_minimum_is_not_looked_for(size):
    x, _ = made(60, 4)
    y, mask = (0.5 * x[:, 0]).exp().round(), fr.select("w")
    solve = lambda b: fr.minimize(poisson, {"w": zeros(4), "b": b}, fr.l1, strength=0.1, args=(x, y), mask=mask)
    found = solve(number(size))  # Where the loss is 1e19, or 1e43.
    assert found.converged
    assert found.steps < 300  # With models to all digits, thousands.
    torch.testing.assert_close(found.params, solve(zeros()).params, rtol=0, atol=1e-7)


#: What a loss is where a logarithm has no value: NaN, or infinite where its author says so.
BEYOND = {
    "nan": lambda w: (w - w.log()).sum(),
    "inf": lambda w: torch.where((w > 0).all(), (w - torch.where(w > 0, w, 1.0).log()).sum(), torch.inf),
}


@pytest.mark.parametrize(("beyond", "count"), [("nan", 30), ("inf", 1)])
def test_no_step_leads_to_where_the_loss_is_not_finite(beyond, count):
    # Far from the minimum that of a model lies below zero, where gradients are finite, and small.
    start = torch.tensor([0.001, 5.0, 100.0], dtype=torch.float64, device=DEVICE).repeat(count)
    found = fr.minimize(BEYOND[beyond], start, fr.l1, strength=0.25)
    assert found.converged
    torch.testing.assert_close(found.params, torch.full_like(start, 0.8), rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [[3.0], [1.0, 3.0], [1.0, 2.0, 4.0]], ids=str)
def test_losses_that_are_nearly_straight_between_samples_are_minimized(samples):
    """Where the descent begins their curvature is down to 1e-260, and their gradient does not say how far to go."""
    y = torch.tensor(samples, dtype=torch.float64, device=DEVICE)
    widths = torch.tensor([0.03, 0.01, 0.005, 1 / 300, 1 / 600], dtype=torch.float64, device=DEVICE)

    def loss(w, y, width):
        return width * (softplus((w - y) / width) + softplus((y - w) / width)).sum()

    solve = lambda width: fr.minimize(loss, zeros(), fr.l1, strength=0.5, args=(y, width))
    found = vmap(solve)(widths)
    assert found.converged.all(), found
    assert found.steps.max() < 600  # As many as alone.
    slope = lambda w, width: torch.tanh((w - y) / (2 * width)).sum() + 0.5
    assert torch.stack([slope(w, h) for w, h in zip(found.params, widths, strict=True)]).abs().max() < 1e-7


# Penalties for which every zero is stationary


def sparse(rows: int = 60, columns: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = normal(generator, rows, columns)
    return x, 3 * x[:, 0] - 2 * x[:, 1] + x[:, 2] + 0.5 * normal(generator, rows)


def plain(w, x, y):
    return (x @ w - y).square().mean() / 2


def rows_of(w, x, y):
    return plain(w[0], x, y) + (w[1] ** 2).sum() / 2


EVERY_ZERO = {  # A penalty, and on what: a vector, or a matrix whose second row is best at 0.
    "l0": (fr.l0, plain, (10,)),
    "l_half": (fr.l_half, plain, (10,)),
    "l_two_thirds": (fr.l_two_thirds, plain, (10,)),
    "nonnegative l_half": (fr.nonnegative_form(fr.l_half), plain, (10,)),
    "l_half and ridge": (fr.l_half + 0.1 * fr.half_l2, plain, (10,)),
    "l0 and l1": (0.5 * fr.l0 + 0.1 * fr.l1, plain, (10,)),
    "group_l0": (fr.group_l0, rows_of, (2, 10)),
    "group_l_half": (fr.group_l_half, rows_of, (2, 10)),
    "schatten": (fr.schatten.given(p=0.5), rows_of, (2, 10)),
    "l_half of singular values": (fr.on_singular_values(fr.l_half), rows_of, (2, 10)),
}


@pytest.mark.parametrize("name", EVERY_ZERO)
@pytest.mark.parametrize("compile", [False, pytest.param("eager", marks=pytest.mark.slow)])
def test_where_every_zero_is_stationary_a_solution_is_what_proximal_steps_find(name, compile):
    x, y = sparse()
    penalty, loss, shape = EVERY_ZERO[name]
    begin = zeros(*shape)
    objective = lambda w: loss(w, x, y) + 0.1 * penalty(w)
    found = fr.minimize(loss, begin, penalty, strength=0.1, args=(x, y), compile=compile)
    tx, w = fr.prox_sgd(0.4, penalty, strength=0.1), begin
    state = tx.init(w)
    for _ in range(150):
        updates, state = tx.update(grad(loss)(w, x, y), state, w)
        w = w + updates
        if updates.abs().max() <= 1e-13:  # It stays there.
            break
    assert found.converged
    assert (found.params != 0).any()
    assert objective(found.params) <= objective(w) + 1e-9
    again = fr.minimize(loss, found.params, penalty, strength=0.1, args=(x, y), compile=compile)
    torch.testing.assert_close(again.params, found.params, rtol=0, atol=1e-7)


@pytest.mark.parametrize("begin", ["zeros", "ones", "the minimum of the loss"])
def test_the_best_of_all_supports(begin):
    x, y = sparse()
    start = {
        "zeros": zeros(10),
        "ones": zeros(10) + 1,
        "the minimum of the loss": torch.linalg.lstsq(x, y[:, None])[0][:, 0],
    }
    supports = [list(s) for k in range(5) for s in itertools.combinations(range(10), k)]
    for strength in (0.02, 0.1, 0.5):
        fits = [torch.linalg.lstsq(x[:, s], y[:, None])[0][:, 0] if s else zeros(0) for s in supports]
        least = min(float(plain(w, x[:, s], y)) + strength * len(s) for w, s in zip(fits, supports, strict=True))
        found = fr.minimize(plain, start[begin], fr.l0, strength=strength, args=(x, y))
        assert found.converged
        assert float(plain(found.params, x, y) + strength * fr.l0(found.params)) == pytest.approx(least, abs=1e-9)


def test_members_of_such_a_map_are_those_of_a_loop():
    x, y = sparse()
    one = lambda strength: fr.minimize(plain, zeros(10), fr.l_half, strength=strength, args=(x, y))
    strengths = torch.tensor([0.05, 0.1, 100.0], dtype=torch.float64, device=DEVICE)
    found = vmap(one)(strengths)
    assert found.converged.all()
    assert (found.params[:2] != 0).any(1).all()
    assert not found.params[2].any()
    for k, strength in enumerate(strengths):
        torch.testing.assert_close(found.params[k], one(strength).params, rtol=0, atol=1e-7)


@pytest.mark.parametrize("penalty", [fr.l0, fr.l_half], ids=["l0", "l_half"])
def test_such_zeros_are_left_where_a_hessian_of_all_would_be_too_large(penalty):
    x, y = sparse(rows=200, columns=600)
    found = fr.minimize(plain, zeros(600), penalty, strength=0.1, args=(x, y))
    assert found.converged
    assert (found.params[:3] != 0).all()


def test_such_solutions_have_derivatives():
    x, y = sparse()
    f = lambda strength: fr.minimize(plain, zeros(10), fr.l_half, strength=strength, args=(x, y), tol=1e-11).params
    torch.testing.assert_close(jacrev(f)(number(0.1)), between(f, number(0.1)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "entropy",
    [lambda w: -torch.special.entr(w).sum(), lambda w: torch.special.xlogy(w, w).sum(), lambda w: (w * w.log()).sum()],
    ids=["entr", "xlogy", "log"],
)
def test_a_slope_that_is_infinite_on_the_boundary(entropy):
    costs = torch.tensor([0.3, 2.0, -1.0, 5.0, 0.0], dtype=torch.float64, device=DEVICE)
    found = fr.minimize(lambda w: costs @ w + entropy(w), torch.full_like(costs, 0.2), fr.simplex)
    assert found.converged
    torch.testing.assert_close(found.params, torch.softmax(-costs, 0), rtol=0, atol=1e-8)


def test_zeros_that_pass_for_the_solution_of_data_in_small_units_are_told():
    x, y = standard(load_diabetes)
    x, y = x[:30, :3], y[:30] / y[:30].std()
    loss = lambda w, x, y, scale=1.0: scale * (x @ w - y).square().mean() / 2
    solve = lambda unit, start, strength, scale=1.0: fr.minimize(
        loss, start, fr.l1, strength=scale * unit * strength, args=(x, unit * y, scale)
    )
    with pytest.warns(UserWarning, match=r"is at most .*e-10, below tol=1e-08, .* Multiply the loss .* by 1e\+10"):
        assert not solve(1e-9, zeros(3), 0.01).params.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = solve(1.0, zeros(3), 0.01).params
        torch.testing.assert_close(solve(1e-9, zeros(3), 0.01, 1e10).params / 1e-9, one, rtol=1e-6, atol=1e-7)
        for strength in (0.01, 0.0):  # A minimum that was known before.
            assert solve(1.0, solve(1.0, zeros(3), strength).params, strength).steps == 0
