"""Dual averaging against scikit-learn, and under noise."""

from __future__ import annotations

import pytest
import torch
from cases import normal
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso
from torch.func import grad

import funcreg as fr

STRENGTH = 0.1
data, y = load_diabetes(return_X_y=True)
x = (data - data.mean(0)) / data.std(0)
y = (y - y.mean()) / y.std()
solution = torch.tensor(Lasso(STRENGTH, fit_intercept=False, tol=1e-15, max_iter=10**6).fit(x, y).coef_)
x, y = torch.tensor(x), torch.tensor(y)
rate = 1 / float(torch.linalg.matrix_norm(x, 2) ** 2 / len(x))


def loss(params, batch=slice(None)):
    return 0.5 * (x[batch] @ params["w"] - y[batch]).square().mean()


def train(tx, steps, batches=None):
    """The last parameters, and which were zero at each step."""
    params, generator = {"w": torch.full_like(solution, 0.1)}, torch.Generator().manual_seed(0)
    state, zeros = tx.init(params), []
    for _ in range(steps):
        batch = slice(None) if batches is None else torch.randint(len(x), (batches,), generator=generator, device="cpu")
        updates, state = tx.update(grad(loss)(params, batch), state, params)
        params = fr.apply_updates(params, updates)
        zeros.append(params["w"] == 0)
    return params["w"], torch.stack(zeros)


# From an optimizer to how near it comes without noise: dual averaging is pulled to its start by 1 / t.
FULL = {
    "ftrl": (lambda: fr.ftrl(0.3, fr.l1, strength=STRENGTH), 1e-8),
    "rmda": (lambda: fr.rmda(0.2 * rate, fr.l1, strength=STRENGTH), 1e-2),
    "ramda": (lambda: fr.ramda(0.003, fr.l1, strength=STRENGTH), 1e-2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_without_noise_it_ends_at_scikit_learns_solution_with_its_zeros(name):
    make, tolerance = FULL[name]
    w, zeros = train(make(), 1000)
    assert (w - solution).abs().max() <= tolerance * solution.abs().max()
    assert (zeros[500:] == (solution == 0)).all()


@pytest.mark.slow
def test_under_noise_the_right_support_settles_where_proximal_descent_lets_it_flicker():
    changes = lambda zeros: (zeros[1001:] != zeros[1000:-1]).sum()
    _, flickering = train(fr.prox_sgd(0.2 * rate, fr.l1, strength=STRENGTH), 2000, batches=32)
    assert changes(flickering) > 1000
    for make, _ in FULL.values():
        w, zeros = train(make(), 2000, batches=32)
        assert changes(zeros) == 0
        assert torch.equal(zeros[-1], solution == 0)
        assert (w - solution).abs().max() < 0.2 * solution.abs().max()


def test_zeros_are_exact_once_momentum_has_ended():
    momentum = fr.piecewise_constant_schedule(0.9, {500: 0.0})
    _, zeros = train(fr.rmda(rate, fr.l1, strength=STRENGTH, momentum=momentum), 600)
    assert not zeros[450].any()
    assert torch.equal(zeros[-1], solution == 0)


def test_decay_in_proximal_form_is_stable_at_any_strength():
    w = {"w": torch.tensor([2.0, -1.0])}
    still = {"w": torch.zeros(2)}
    for decay in (0.1, 30.0, 1e6):
        proximal, explicit = fr.adamprox(0.1, decay), fr.adamw(0.1, weight_decay=decay)
        updates, _ = proximal.update(still, proximal.init(w), w)
        shrunk = fr.apply_updates(w, updates)["w"]
        torch.testing.assert_close(shrunk, w["w"] / (1 + 0.1 * decay))
        updates, _ = explicit.update(still, explicit.init(w), w)
        assert (fr.apply_updates(w, updates)["w"].abs() > w["w"].abs()).all() == (0.1 * decay > 2)


@pytest.mark.parametrize(("make", "rate"), [(fr.ramda, 0.2), (fr.ftrl, 1.0)])
def test_inner_steps_average_in_a_metric_that_a_penalty_has_no_rule_for(make, rate):
    generator = torch.Generator().manual_seed(0)
    draws = lambda *shape: normal(generator, *shape)
    goal, curvature = draws(5, 2) @ draws(2, 4), 0.5 + draws(5, 4).sigmoid()
    slopes = lambda w: curvature * (w - goal)
    with pytest.raises(ValueError, match="Give inner_steps="):
        make(rate, fr.nuclear, strength=0.4).init(goal)
    for penalty in (fr.l1 + fr.nuclear, fr.per_leaf({"w": fr.l2_sphere.given(1.0)})):
        with pytest.raises(ValueError, match="in a metric"):
            make(rate, penalty).init({"w": goal})
    make(rate, fr.slope, 1.0).init(goal)  # It has inner steps of its own.
    tx, w = make(rate, fr.nuclear, strength=0.4, inner_steps=5), torch.zeros_like(goal)
    state = tx.init(w)
    for _ in range(200):
        updates, state = tx.update(slopes(w), state, w)
        w = fr.apply_updates(w, updates)
    assert fr.kkt_residual(w, slopes(w), fr.nuclear, strength=0.4) < 0.01
    assert torch.linalg.matrix_rank(w, tol=1e-6) <= 2
