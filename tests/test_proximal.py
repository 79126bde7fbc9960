"""Proximal optimizers and certificates against scikit-learn, on its real data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import CONSTRAINTS, DEVICE, PENALTIES, assert_equal, draw, draw_fours, flat, joint, normal
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
            penalty="l1",
            C=1 / (len(x) * strength),
            solver="liblinear",
            fit_intercept=False,
            tol=1e-9,
            max_iter=5000,
            random_state=0,
        ).fit(x, y)
    design, sign = torch.tensor(x), torch.tensor(2.0 * y - 1)
    loss = lambda p: torch.nn.functional.softplus(-sign * (design @ p["w"])).mean()
    smoothness = float(torch.linalg.eigvalsh(design.T @ design)[-1]) / len(x) / 4
    solution = _newton_on_support(x * (2.0 * y - 1)[:, None], fit.coef_[0], strength)
    return Problem(*_with_solution((loss, smoothness), solution), fr.l1, (), strength, adam_rate=0.3)


def _newton_on_support(signed: np.ndarray, coef: np.ndarray, strength: float) -> np.ndarray:
    """The coefficients of a logistic regression to the last digits, by Newton's method among those that are not zero:
    liblinear's line search ends where the loss has no digits left, 1e-8 away, or 1e-6 where it is flat."""
    support, signs, polished = coef != 0, np.sign(coef[coef != 0]), coef.copy()
    for _ in range(5):
        tail = 1 / (1 + np.exp(signed @ polished))
        slopes = signed.T @ tail / len(signed)
        hessian = (signed.T * (tail * (1 - tail))) @ signed / len(signed)
        step = np.linalg.solve(hessian[np.ix_(support, support)], strength * signs - slopes[support])
        polished[support] -= step
    assert np.abs(step).max() < 1e-13  # It is the minimum, for slopes at zeros are less than the strength,
    assert (np.sign(polished[support]) == signs).all()
    assert (np.abs(slopes[~support]) < strength).all()
    assert np.abs(polished - coef).max() <= 1e-5  # and scikit-learn's solution still.
    return polished


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
    """So many steps, or until one moves no more than rounding does, away from 0 where momentum gathers."""
    slope, state, still = grad(loss), tx.init(params), 0
    for n in range(steps):
        updates, state = tx.update(slope(params), state, params)
        params = fr.apply_updates(params, updates)
        if n % 10 == 9:  # Ten steps apart, as momentum stands still for a moment where it turns.
            still = still + 1 if flat(updates).abs().max() <= 1e-15 and flat(params).any() else 0
        if still == 2:
            break
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
    rows = torch.linspace(0.1, 1.0, len(x), dtype=torch.float64, device="cpu")
    fitted = Ridge(alpha=3.0, fit_intercept=False).fit(x, y, sample_weight=rows.cpu().numpy())
    slopes = torch.tensor(x).T @ (rows * torch.tensor(x @ fitted.coef_ - y)) / rows.sum()
    strength = fr.elastic_from_sklearn_ridge(3.0, n_samples=rows.sum().item())
    assert fr.kkt_residual({"w": torch.tensor(fitted.coef_)}, {"w": slopes}, fr.elastic, *strength) < 1e-12
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
    zero = torch.zeros((), dtype=torch.float64, device=DEVICE)
    assert fr.elastic_from_keras(zero, zero) == (0.0, 0.0)
    assert_equal(fr.elastic.grad(w, *fr.elastic_from_torch(0.1)), {"w": 0.1 * w["w"]}, rtol=1e-14)


# In the metric of any preconditioner


# From a preconditioner to its learning rate for the lasso, and options.
PRECONDITIONERS: dict[str, tuple[Callable[[], fr.Transform], Any, dict[str, Any]]] = {
    "Adam": (fr.scale_by_adam, fr.cosine_decay_schedule(0.05, 1500), {}),
    "NAdam": (lambda: fr.scale_by_adam(nesterov=True), fr.cosine_decay_schedule(0.05, 1500), {}),
    "AMSGrad": (fr.scale_by_amsgrad, fr.cosine_decay_schedule(0.05, 1500), {}),
    "RMSprop": (fr.scale_by_rms, fr.cosine_decay_schedule(0.02, 1500), {}),
    # Its metric vanishes as gradients settle, so that only a bound holds its steps.
    "centred RMSprop": (fr.scale_by_stddev, 0.05, {"max_step": 0.24}),
    "AdaGrad": (fr.scale_by_rss, 1.0, {}),
    "RMSprop with momentum": (
        lambda: fr.chain(fr.ema(0.9), fr.scale_by_rms()),
        fr.cosine_decay_schedule(0.02, 1500),
        {},
    ),
    "Adam at a rate beyond reason": (fr.scale_by_adam, 100.0, {"max_step": 0.24}),
    "Adam with one number a leaf": (fr.scale_by_adam, fr.cosine_decay_schedule(0.05, 1500), {"inner_steps": 1}),
}
every_preconditioner = pytest.mark.parametrize("preconditioner", PRECONDITIONERS)


@every_preconditioner
def test_the_direction_times_the_metric_comes_to_be_the_gradient(preconditioner):
    tx, params, grads = PRECONDITIONERS[preconditioner][0](), draw(), draw(1)
    state = tx.init(params)
    for _ in range(400):
        direction, state = tx.update(grads, state, params)
    assert_equal(fr.tree_map(torch.mul, direction, tx.metric(state)), grads, rtol=1e-12)


@pytest.mark.slow
@every_preconditioner
def test_the_fixed_point_is_the_lasso_in_the_metric_of(preconditioner):
    problem, (make, rate, options) = lasso(), PRECONDITIONERS[preconditioner]
    tx = fr.proximal_step(make(), rate, fr.l1, strength=problem.strength, **options)
    params, _ = train(tx, problem.loss, {"w": torch.zeros_like(problem.solution)}, 1500)
    assert_equal(params, {"w": problem.solution}, rtol=1e-8, atol=1e-10)
    assert torch.equal(params["w"] == 0, problem.solution == 0)
    assert fr.kkt_residual(params, grad(problem.loss)(params), fr.l1, strength=problem.strength) < 1e-10


def test_prox_adam_is_the_proximal_step_of_adam():
    params, hyper = draw(), {"strength": 0.3, "weight_decay": 0.1, "mask": fr.matrices, "max_step": 0.2}
    one = fr.prox_adam(0.1, fr.elastic, 0.5, rho=0.4, b1=0.8, b2=0.9, eps=0.1, **hyper)
    other = fr.proximal_step(fr.scale_by_adam(0.8, 0.9, 0.1), 0.1, fr.elastic, 0.5, rho=0.4, **hyper)
    for tx in (one, other):
        state = tx.init(params)
        assert fr.tree_paths(state) == fr.tree_paths(one.init(params))
    assert_equal(*(tx.update(draw(1), tx.init(params), params)[0] for tx in (one, other)))


def test_an_entry_without_gradients_shrinks_by_no_more_than_the_greatest_step():
    grads = {"w": torch.tensor([1.0, 0.0], dtype=torch.float64)}

    def after(steps, **options):
        params = {"w": torch.full((2,), 0.9, dtype=torch.float64)}
        return train(fr.prox_adam(0.01, fr.l1, strength=0.4, **options), lambda p: p["w"][0], params, steps)[0]["w"]

    assert after(1)[1] == 0  # The minimum of the penalty alone, in one step of 0.01 / 1e-8.
    torch.testing.assert_close(after(1, max_step=0.5)[1], grads["w"][0] * 0.7)
    torch.testing.assert_close(after(4, max_step=0.5)[1], grads["w"][0] * 0.1)
    assert after(5, max_step=0.5)[1] == 0
    assert_equal({"w": after(3, max_step=0.5)[0]}, {"w": after(3)[0]}, rtol=1e-14)  # The others step as they did.
    assert_equal({"w": after(3, max_step=1e9)}, {"w": after(3)}, rtol=1e-14)


def without_metric(penalty):
    """The same penalty without a proximal operator in a metric."""

    def proximal(params, step, *hyper, **options):
        return penalty.prox(params, step, *hyper, **options)

    return fr.Penalty(penalty, penalty.grad, proximal, couples_leaves=penalty.couples_leaves)


def test_inner_steps_come_to_the_proximal_operator_in_the_metric():
    params, grads, adam = draw(), draw(1), fr.scale_by_adam(eps=0.3)
    for penalty, hyper in ((fr.l1, ()), (fr.group_lasso, ()), (fr.sparse_group_lasso, (0.5, 0.4))):
        gap = []
        expected = fr.proximal_step(adam, 0.1, penalty, *hyper, mask=fr.matrices)
        expected = flat(expected.update(grads, expected.init(params), params)[0])
        for steps in (1, 10, 100):
            tx = fr.proximal_step(adam, 0.1, without_metric(penalty), *hyper, mask=fr.matrices, inner_steps=steps)
            gap.append((flat(tx.update(grads, tx.init(params), params)[0]) - expected).abs().max())
        assert gap[0] > 1e-3
        assert gap[1] < 0.1 * gap[0]
        assert gap[2] < 1e-12


@pytest.mark.parametrize("steps", [1, 3])
def test_any_number_of_inner_steps_has_the_same_fixed_point(steps):
    generator = torch.Generator().manual_seed(0)
    x = normal(generator, 60, 9) * torch.arange(9, 0, -1) / 4
    y = x[:, :2].sum(-1)
    loss = lambda p: (x[:, :4] @ p["a"] + x[:, 4:].unflatten(1, (5, 1)).sum(-1) @ p["b"] - y).square().mean() / 2
    start = {"a": torch.ones(4, dtype=torch.float64), "b": torch.ones(5, dtype=torch.float64)}
    leaves = without_metric(fr.group_lasso)
    for penalty, options, zeros in ((leaves, {"dim": None}, [False, True]), (joint, {}, [False, False])):
        tx = fr.proximal_step(fr.scale_by_rss(), 2.0, penalty, strength=0.4, inner_steps=steps, max_step=0.2, **options)
        params, _ = train(tx, loss, start, 600)
        slopes = grad(loss)(params)
        assert fr.kkt_residual(params, slopes, penalty, strength=0.4, **options) < 1e-12
        assert [not leaf.any() for leaf in fr.tree_leaves(params)] == zeros


def _low_rank(w, step):
    u, size, v = torch.linalg.svd(w, full_matrices=False)
    return u @ torch.relu(size - step).diag() @ v


@fr.penalty(gradient=lambda w: _low_rank(w, 0.0), proximal=_low_rank, separable=False)
def sum_of_singular_values(w):
    """A penalty that has no proximal operator in a diagonal metric, and needs the proximal step alone."""
    return torch.linalg.svdvals(w)


@pytest.mark.slow
def test_a_matrix_of_low_rank_is_found_in_the_metric_of_adagrad():
    generator = torch.Generator().manual_seed(0)
    draws = lambda *shape: normal(generator, *shape)
    x = draws(80, 6) * torch.tensor([1.0, 2.0, 3.0, 0.5, 1.0, 2.0])
    y = x @ draws(6, 2) @ draws(2, 5) + 0.1 * draws(80, 5)
    loss = lambda p: (x @ p["w"] - y).square().mean(0).sum() / 2
    start = {"w": torch.zeros(6, 5, dtype=torch.float64)}
    plain = fr.fista(0.08, sum_of_singular_values, strength=0.5)
    metric = fr.proximal_step(fr.scale_by_rss(), 3.0, sum_of_singular_values, strength=0.5, inner_steps=5)
    expected, found = (train(tx, loss, start, 300)[0]["w"] for tx in (plain, metric))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert torch.linalg.matrix_rank(found, tol=1e-9) == 2
    one = fr.proximal_step(fr.scale_by_rss(), 3.0, sum_of_singular_values, strength=0.5)
    torch.testing.assert_close(train(one, loss, start, 600)[0]["w"], expected, rtol=1e-7, atol=1e-8)


SOLVED = {
    **{name: (case, {"strength": 0.5}) for name, case in PENALTIES.items()},
    **{name: (case, {}) for name, case in CONSTRAINTS.items()},  # Which hold whatever their strength.
}
SOLVED = {name: (case, strong) for name, (case, strong) in SOLVED.items() if case.nonconvex != "a union of planes"}


@pytest.mark.parametrize(("case", "strong"), SOLVED.values(), ids=SOLVED)
def test_prox_adam_solves_the_penalized_problem_of(case, strong):
    goal, curvature = draw_fours(), fr.tree_map(lambda w: 1.2 + w.tanh() / 2, draw_fours(1))
    slopes = lambda params: fr.tree_map(lambda c, w, t: c * (w - t), curvature, params, goal)
    tx = fr.prox_adam(0.6, case.penalty, *case.hyper, **strong, b1=0.3, b2=0.8, eps=1.0, **case.options)
    params, state = goal, tx.init(goal)
    for n in range(160):
        updates, state = tx.update(slopes(params), state, params)
        params = fr.apply_updates(params, updates)
        if n >= 20 and flat(updates).abs().max() <= 1e-11:  # It stays there.
            break
    options = {**case.options, **strong}
    assert fr.kkt_residual(params, slopes(params), case.penalty, *case.hyper, **options) < 1e-9


@pytest.mark.parametrize(
    ("penalty", "hyper", "options"),
    [
        (fr.nuclear, (), {}),
        (fr.spectral_mcp, (0.5, 3.0), {}),
        (fr.tree_lasso, (), {"groups": ((0, (1, 2)),)}),
        (fr.l2_sphere, (0.7,), {}),
        (fr.group_lasso.given(dim=None) + fr.group_lasso, (), {}),
    ],
)
def test_without_a_rule_in_a_metric_a_leaf_has_one_number_of_it(penalty, hyper, options):
    params, grads = draw()["head"].weight, draw(1)["head"].weight
    adam = fr.scale_by_adam(eps=0.1)
    strength = 1.0 if isinstance(penalty, fr.Constraint) else 0.4
    tx = fr.proximal_step(adam, 0.3, penalty, *hyper, strength=strength, **options)
    found = tx.update(grads, tx.init(params), params)[0]
    direction, state = adam.update(grads, adam.init(params), params)
    h = adam.metric(state)
    step = 0.3 / h.max()
    expected = penalty.prox(params - step * h * direction, strength * step, *hyper, **options) - params
    assert_equal(found, expected, rtol=1e-12, atol=1e-14)
    fused = fr.fuse(tx, backend="aot_eager")
    after, _ = fused(params, grads, fused.init(params)[1])
    assert_equal(after, params + expected, rtol=1e-12, atol=1e-14)


def test_leaves_without_the_penalty_take_whole_steps_whatever_the_inner_ones():
    params, mask = draw(), {"head": True, "body": False}
    for steps in (1, 4):
        tx = fr.proximal_step(fr.scale_by_rms(), 0.1, joint, mask=mask, inner_steps=steps)
        plain = fr.chain(fr.scale_by_rms(), fr.scale(-0.1))
        found, expected = (t.update(draw(1), t.init(params), params)[0]["body"] for t in (tx, plain))
        assert_equal(found, expected, rtol=1e-12, atol=1e-15)


def test_what_is_no_preconditioner_is_said():
    for wrong in (fr.trace(0.9), fr.scale_by_lion(), fr.masked(fr.scale_by_adam(), True)):
        with pytest.raises(ValueError, match="preconditioner tells no metric; expected a transform such as"):
            fr.proximal_step(wrong, 0.1, fr.l1)
    with pytest.raises(TypeError, match=r"preconditioner is 0\.1; expected a Transform"):
        fr.proximal_step(0.1, fr.scale_by_adam(), fr.l1)
    with pytest.raises(ValueError, match=r"max_step is 0\.0; expected a number above 0"):
        fr.prox_adam(0.1, fr.l1, max_step=0.0)
    with pytest.raises(ValueError, match="max_step is -1; expected a number above 0"):
        fr.prox_adam(0.1, fr.l1, max_step=-1)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"inner_steps is .*; expected a whole number of at least 1"):
            fr.prox_adam(0.1, fr.l1, inner_steps=wrong)


@pytest.mark.parametrize("make", [
    lambda *hyper, **named: fr.prox_sgd(0.1, fr.elastic, *hyper, strength=2.0, **named),
    lambda *hyper, **named: fr.prox_adam(0.1, fr.elastic, *hyper, strength=2.0, **named),
    lambda *hyper, **named: fr.fista(0.1, fr.elastic, *hyper, strength=2.0, **named),
    lambda *hyper, **named: fr.rmda(0.1, fr.elastic, *hyper, strength=2.0, **named),
    lambda *hyper, **named: fr.proximal(fr.elastic, 0.1, *hyper, **named),
    lambda *hyper, **named: fr.add_penalty(fr.elastic, *hyper, strength=2.0, **named),
], ids=["prox_sgd", "prox_adam", "fista", "rmda", "proximal", "add_penalty"])  # fmt: skip
def test_hyperparameters_by_name_are_those_in_their_order(make):
    alpha = fr.linear_schedule(0.1, 0.3, 4)
    given, named, mixed = make(alpha, 0.5), make(alpha=alpha, rho=0.5), make(alpha, rho=0.5)
    params = {"w": torch.tensor([1.0, -0.2, 0.0])}
    states = [tx.init(params) for tx in (given, named, mixed)]
    for _ in range(3):
        steps = [
            tx.update({"w": torch.tensor([0.3, 0.1, -0.4])}, s, params)
            for tx, s in zip((given, named, mixed), states, strict=True)
        ]
        states = [state for _, state in steps]
        assert_equal(steps[1][0], steps[0][0])
        assert_equal(steps[2][0], steps[0][0])
        params = fr.apply_updates(params, steps[0][0])
