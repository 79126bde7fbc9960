"""Proximal optimizers and certificates against scikit-learn, on its real data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import assert_equal
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, MultiTaskLasso, Ridge
from torch import Tensor
from torch.func import grad

import funcreg as fr


def standardized(x: np.ndarray) -> np.ndarray:
    x = x[:, x.std(0) > 0]
    return (x - x.mean(0)) / x.std(0)


class Problem(NamedTuple):
    loss: Callable[[Any], Tensor]
    solution: Tensor  # scikit-learn's.
    smoothness: float  # Lipschitz constant of the gradient.
    penalty: fr.Penalty
    hyper: tuple[float, ...]
    strength: float
    options: dict[str, Any] = {}  # noqa: RUF012  # Never written to.
    adam_rate: float = 0.02  # As large as the coefficients are.


def least_squares(x: np.ndarray, y: np.ndarray) -> tuple[Callable[[Any], Tensor], float]:
    """Half the mean squared error, through its normal equations."""
    x, y = torch.tensor(x), torch.tensor(y)
    gram, moment = x.T @ x / len(x), torch.tensordot(y, x, ([0], [0])) / len(x)
    return (
        lambda p: 0.5 * ((p["w"] @ gram) * p["w"]).sum() - (moment * p["w"]).sum(),
        float(torch.linalg.eigvalsh(gram)[-1]),
    )


def lasso() -> Problem:
    x, y = load_diabetes(return_X_y=True)
    x, y = standardized(x), (y - y.mean()) / y.std()
    fit = Lasso(alpha=0.05, fit_intercept=False, tol=1e-15, max_iter=10**6).fit(x, y)
    return Problem(*_with_solution(least_squares(x, y), fit.coef_), fr.l1, (), 0.05)


def elastic_net() -> Problem:
    x, y = load_diabetes(return_X_y=True)
    x, y = standardized(x), (y - y.mean()) / y.std()
    fit = ElasticNet(alpha=0.2, l1_ratio=0.4, fit_intercept=False, tol=1e-15, max_iter=10**6).fit(x, y)
    return Problem(*_with_solution(least_squares(x, y), fit.coef_), fr.elastic, (0.2, 0.4), 1.0)


def multi_task_lasso() -> Problem:
    x, y = load_digits(return_X_y=True)
    x, y = standardized(x), np.eye(10)[y] - np.eye(10)[y].mean(0)
    fit = MultiTaskLasso(alpha=0.02, fit_intercept=False, tol=1e-15, max_iter=10**6).fit(x, y)
    return Problem(*_with_solution(least_squares(x, y), fit.coef_), fr.group_lasso, (), 0.02, {"dim": 0})


def sparse_logistic(strength: float = 0.25) -> Problem:
    x, y = load_breast_cancer(return_X_y=True)
    x = standardized(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It warns of how it is called, in one version or another, and of convergence.
        fit = LogisticRegression(
            penalty="l1", C=1 / (len(x) * strength), solver="liblinear", fit_intercept=False, tol=1e-14, max_iter=20000
        ).fit(x, y)
    design, sign = torch.tensor(x), torch.tensor(2.0 * y - 1)
    loss = lambda p: torch.nn.functional.softplus(-sign * (design @ p["w"])).mean()
    smoothness = float(torch.linalg.eigvalsh(design.T @ design)[-1]) / len(x) / 4
    return Problem(*_with_solution((loss, smoothness), fit.coef_[0]), fr.l1, (), strength, adam_rate=0.3)


def _with_solution(problem: tuple[Callable[[Any], Tensor], float], solution: np.ndarray) -> tuple[Any, Tensor, float]:
    return problem[0], torch.tensor(solution), problem[1]


PROBLEMS = {f.__name__: f for f in (lasso, elastic_net, multi_task_lasso, sparse_logistic)}


def penalized(make: Callable[..., fr.Transform], problem: Problem, rate: Any, **options: Any) -> fr.Transform:
    return make(rate, problem.penalty, *problem.hyper, strength=problem.strength, **problem.options, **options)


# From a problem to an optimizer, the number of its steps, and how near it must come.
OPTIMIZERS: dict[str, tuple[Callable[[Problem], fr.Transform], int, float]] = {
    "prox_sgd": (lambda p: penalized(fr.prox_sgd, p, 1 / p.smoothness), 4000, 1e-8),
    "prox_sgd with momentum": (lambda p: penalized(fr.prox_sgd, p, 0.5 / p.smoothness, momentum=0.9), 1000, 1e-8),
    "prox_sgd with Nesterov's momentum": (
        lambda p: penalized(fr.prox_sgd, p, 0.3 / p.smoothness, momentum=0.9, nesterov=True),
        1500,
        1e-8,
    ),
    "prox_sgd under a schedule": (
        lambda p: penalized(
            fr.prox_sgd, p, fr.linear_schedule(0.5 / p.smoothness, 0.2 / p.smoothness, 1500), momentum=0.9
        ),
        1500,
        1e-8,
    ),
    "fista": (lambda p: penalized(fr.fista, p, 1 / p.smoothness), 800, 1e-8),
    "fista without restart": (lambda p: penalized(fr.fista, p, 1 / p.smoothness, restart=False), 2000, 1e-8),
    "prox_adam": (lambda p: penalized(fr.prox_adam, p, fr.cosine_decay_schedule(p.adam_rate, 3000)), 3000, 1e-6),
}


def train(tx: fr.Transform, loss: Callable[[Any], Tensor], params: Any, steps: int) -> Any:
    slope, state = grad(loss), tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(slope(params), state, params)
        params = fr.apply_updates(params, updates)
    return params, state


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_fixed_point_is_scikit_learns_solution_with_its_exact_zeros(problem, optimizer):
    problem, (make, steps, tolerance) = PROBLEMS[problem](), OPTIMIZERS[optimizer]
    params, _ = train(make(problem), problem.loss, {"w": torch.zeros_like(problem.solution)}, steps)
    largest = problem.solution.abs().max()
    assert (params["w"] - problem.solution).abs().max() <= tolerance * largest
    assert torch.equal(params["w"] == 0, problem.solution == 0)
    assert (params["w"] == 0).any()
    slopes = grad(problem.loss)(params)
    residual = fr.kkt_residual(
        params, slopes, problem.penalty, *problem.hyper, strength=problem.strength, **problem.options
    )
    assert residual <= tolerance * 1e-1


@pytest.mark.slow
def test_fista_solves_a_badly_conditioned_logistic_problem():
    problem = sparse_logistic(0.02)
    params, _ = train(
        penalized(fr.fista, problem, 1 / problem.smoothness), problem.loss, {"w": torch.zeros(30).double()}, 3000
    )
    assert_equal(params, {"w": problem.solution}, rtol=1e-8, atol=1e-9)
    assert torch.equal(params["w"] == 0, problem.solution == 0)


def test_a_raw_threshold_under_momentum_solves_another_problem():
    problem = lasso()
    rate = 0.5 / problem.smoothness
    raw = fr.chain(fr.trace(0.9), fr.scale(-rate), fr.soft_threshold(rate * problem.strength))
    params, _ = train(raw, problem.loss, {"w": torch.zeros_like(problem.solution)}, 800)
    assert (params["w"] - problem.solution).abs().max() > 1e-2
    weaker = fr.kkt_residual(params, grad(problem.loss)(params), fr.l1, strength=0.1 * problem.strength)
    assert weaker <= 1e-12  # It solves the one of strength (1 - momentum) times its own.


def test_an_l1_term_in_the_loss_gives_no_zero():
    problem = lasso()
    total = lambda p: problem.loss(p) + problem.strength * fr.l1(p)
    for tx in (fr.sgd(0.1), fr.adam(0.01)):
        params, _ = train(tx, total, {"w": torch.full_like(problem.solution, 0.1)}, 500)
        assert fr.sparsity(params) == 0


def test_fista_keeps_a_sparse_point_at_every_step_and_restarts_faster():
    problem, zero = lasso(), {"w": torch.zeros(10, dtype=torch.float64)}
    gap = {}
    for restart in (False, True):
        _, state = train(penalized(fr.fista, problem, 1 / problem.smoothness, restart=restart), problem.loss, zero, 150)
        gap[restart] = (state.solution["w"] - problem.solution).abs().max()
        assert (state.solution["w"] == 0).any()
    assert gap[True] < 0.1 * gap[False]


def test_masked_leaves_are_fitted_without_penalty():
    x, y = load_diabetes(return_X_y=True)
    x, y = standardized(x), y / y.std()
    fit = Lasso(alpha=0.05, tol=1e-15, max_iter=10**6).fit(x, y)
    design, target = torch.tensor(x), torch.tensor(y)
    loss = lambda p: 0.5 * (design @ p["w"] + p["intercept"] - target).square().mean()
    params = {"w": torch.zeros(10, dtype=torch.float64), "intercept": torch.zeros((), dtype=torch.float64)}
    mask = {"w": True, "intercept": False}
    for tx, steps in (
        (fr.fista(0.2, fr.l1, strength=0.05, mask=mask), 1500),
        (fr.prox_adam(fr.cosine_decay_schedule(0.05, 4000), fr.l1, strength=0.05, mask=mask), 4000),
        (fr.prox_sgd(0.1, fr.l1, strength={"w": 0.05, "intercept": 0.0}, momentum=0.9), 1500),
    ):
        found, _ = train(tx, loss, params, steps)
        assert_equal(
            found, {"w": torch.tensor(fit.coef_), "intercept": torch.tensor(fit.intercept_)}, rtol=1e-6, atol=1e-9
        )
        assert fr.kkt_residual(found, grad(loss)(found), fr.l1, strength=0.05, mask=mask) < 1e-8


def test_lambda_max_is_where_scikit_learns_lasso_becomes_zero():
    x, y = load_diabetes(return_X_y=True)
    x, y = standardized(x), (y - y.mean()) / y.std()
    slopes = grad(least_squares(x, y)[0])({"w": torch.zeros(10, dtype=torch.float64)})
    torch.testing.assert_close(fr.lambda_max(slopes, fr.l1), torch.tensor(abs(x.T @ y).max() / len(x)))
    at = lambda factor: (
        Lasso(float(fr.lambda_max(slopes, fr.l1)) * factor, fit_intercept=False, tol=1e-12).fit(x, y).coef_
    )
    assert not at(1.000001).any()
    assert at(0.999).any()


def test_strengths_convert_from_scikit_learn():
    x, y = load_diabetes(return_X_y=True)
    x, y = standardized(x), (y - y.mean()) / y.std()
    loss, _ = least_squares(x, y)
    ridge = {"w": torch.tensor(Ridge(alpha=3.0, fit_intercept=False).fit(x, y).coef_)}
    strength = fr.elastic_from_sklearn_ridge(3.0, n_samples=len(x))
    assert fr.kkt_residual(ridge, grad(loss)(ridge), fr.elastic, *strength) < 1e-12
    problem = sparse_logistic()
    strength = fr.elastic_from_sklearn_logistic(1 / (569 * 0.25), n_samples=569, l1_ratio=1.0)
    params = {"w": problem.solution}
    assert fr.kkt_residual(params, grad(problem.loss)(params), fr.elastic, *strength) < 1e-8
    problem = elastic_net()
    params = {"w": problem.solution}
    strength = fr.elastic_from_sklearn(0.2, l1_ratio=0.4)
    assert fr.kkt_residual(params, grad(problem.loss)(params), fr.elastic, *strength) < 1e-8
    assert strength == fr.elastic_from_glmnet(0.2, alpha=0.4) == fr.Elastic(0.2, 0.4)


def test_strengths_convert_from_torch_and_keras():
    w = {"w": torch.randn(5, dtype=torch.float64)}
    torch.testing.assert_close(
        fr.elastic(w, *fr.elastic_from_keras(l1=0.3, l2=0.7)), 0.3 * fr.l1(w) + 0.7 * fr.l2(w), rtol=1e-14, atol=0
    )
    assert fr.elastic_from_keras() == (0.0, 0.0)
    assert_equal(fr.elastic.grad(w, *fr.elastic_from_torch(0.1)), {"w": 0.1 * w["w"]}, rtol=1e-14)
