"""Other preconditioners and optimizers than Adam's: their metrics, their edges, and what is wrong input."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import TRANSFORMS, assert_equal, draw, flat
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso
from torch.func import grad

import funcreg as fr

# From a preconditioner to its learning rate for the lasso, and options.
METRICS: dict[str, tuple[Callable[[], fr.Transform], Any, dict[str, Any]]] = {
    "Adamax": (fr.scale_by_adamax, fr.cosine_decay_schedule(0.05, 1500), {}),
    # Its metric vanishes as gradients settle, so that only a bound holds its steps.
    "AdaBelief": (fr.scale_by_belief, 0.05, {"max_step": 0.24}),
    "AdaBelief ahead": (lambda: fr.scale_by_belief(nesterov=True), 0.05, {"max_step": 0.24}),
    "Yogi": (fr.scale_by_yogi, fr.cosine_decay_schedule(0.05, 1500), {}),
    "RAdam": (fr.scale_by_radam, fr.cosine_decay_schedule(0.05, 1500), {}),
    "Adan": (lambda: fr.scale_by_adan(b1=0.9), fr.cosine_decay_schedule(0.05, 1500), {}),
    "Adadelta": (fr.scale_by_adadelta, 1.0, {"max_step": 0.24}),
    "NovoGrad": (fr.scale_by_novograd, fr.cosine_decay_schedule(0.02, 1500), {}),
    "SM3": (lambda: fr.scale_by_sm3(keep_metric=True), 1.0, {}),
    "SM3 of means": (lambda: fr.scale_by_sm3(b2=0.99, keep_metric=True), fr.cosine_decay_schedule(0.05, 1500), {}),
}
every_metric = pytest.mark.parametrize("preconditioner", METRICS)


@every_metric
def test_the_direction_times_the_metric_comes_to_be_the_gradient(preconditioner):
    tx, params, grads = METRICS[preconditioner][0](), draw(), draw(1)
    state = tx.init(params)
    for _ in range(400):
        direction, state = tx.update(grads, state, params)
    assert_equal(fr.tree_map(torch.mul, direction, tx.metric(state)), grads, rtol=1e-12, atol=1e-20)


def test_the_docstring_of_proximal_step_names_every_transform_with_a_metric():
    named = {*re.findall(r"`(scale_by_\w+)", str(fr.proximal_step.__doc__).split("Args:")[0])}
    made = {"scale_by_sm3": fr.scale_by_sm3(keep_metric=True)}
    for name in [name for name in vars(fr) if name.startswith("scale_by_") and name not in made]:
        parameters = inspect.signature(getattr(fr, name)).parameters.values()
        if all(p.default is not p.empty for p in parameters) and name != "scale_by_learning_rate":
            made[name] = getattr(fr, name)()
    assert named == {name for name, tx in made.items() if tx.metric is not None}


def lasso() -> tuple[Callable[[Any], torch.Tensor], torch.Tensor]:
    """Half the mean squared error of standardized data, and scikit-learn's solution for a strength of 0.05."""
    x, y = load_diabetes(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    fit = Lasso(alpha=0.05, fit_intercept=False, tol=1e-15, max_iter=10**6).fit(x, y)
    gram, moment = torch.tensor(x.T @ x / len(x)), torch.tensor(x.T @ y / len(x))
    return lambda p: 0.5 * (p["w"] @ gram @ p["w"]) - moment @ p["w"], torch.tensor(np.asarray(fit.coef_))


@pytest.mark.slow
@every_metric
def test_the_fixed_point_of_a_proximal_step_is_the_lasso_in_the_metric_of(preconditioner):
    (loss, solution), (make, rate, options) = lasso(), METRICS[preconditioner]
    tx = fr.proximal_step(make(), rate, fr.l1, strength=0.05, **options)
    params = {"w": torch.zeros_like(solution)}
    state = tx.init(params)
    for _ in range(1500):
        updates, state = tx.update(grad(loss)(params), state, params)
        params = fr.apply_updates(params, updates)
    assert_equal(params, {"w": solution}, rtol=1e-8, atol=1e-10)
    assert torch.equal(params["w"] == 0, solution == 0)
    assert (solution == 0).any()
    assert fr.kkt_residual(params, grad(loss)(params), fr.l1, strength=0.05) < 1e-9


@pytest.mark.parametrize(
    "make",
    [
        fr.scale_by_sm3,
        fr.scale_by_sign,
        lambda: fr.scale_by_rprop(0.1),
        fr.scale_by_optimistic_gradient,
        fr.scale_by_param_block_norm,
        fr.scale_by_param_block_rms,
    ],
)
def test_what_keeps_no_metric_is_no_preconditioner_of_a_proximal_step(make):
    with pytest.raises(ValueError, match=r"preconditioner tells no metric; expected .*keep_metric=True"):
        fr.proximal_step(make(), 0.1, fr.l1)


@pytest.mark.parametrize("make", [lambda: fr.adamax(0.1), lambda: fr.sm3(0.1), lambda: fr.lars(0.1)])
def test_an_optimizer_is_no_preconditioner(make):
    with pytest.raises(ValueError, match="whose updates are steps downhill with a learning rate in them"):
        fr.proximal_step(make(), 0.1, fr.l1)


NEW = list(TRANSFORMS)[list(TRANSFORMS).index("scale_by_adamax") :]
NOISY = ("noisy_sgd", "differentially_private_aggregate with noise")
REAL = [name for name in NEW if not name.startswith(NOISY)]  # Complex noise is not real noise.


@pytest.mark.parametrize("name", REAL)
def test_complex_leaves_without_imaginary_parts_move_as_real_ones(name):
    case = TRANSFORMS[name]
    wide = lambda tree: fr.tree_map(lambda w: torch.complex(w, torch.zeros_like(w)), tree)
    tx, params, other = case.make(), draw(), wide(draw())
    state, states = tx.init(params), case.make().init(other)
    for seed in (1, 2, 3):
        updates, state = tx.update(draw(seed), state, params)
        found, states = tx.update(wide(draw(seed)), states, other)
        assert_equal(fr.tree_map(lambda u: u.real, found), updates, rtol=1e-11, atol=1e-13)
        assert not flat(fr.tree_map(lambda u: u.imag, found)).any()
        params, other = fr.apply_updates(params, updates), fr.apply_updates(other, found)


ZERO = {"w": torch.zeros(2, 3), "b": torch.zeros(3), "none": torch.zeros(0)}


@pytest.mark.parametrize("name", NEW)
def test_neither_leaves_nor_gradients_of_zeros_make_a_nan(name):
    ones = fr.tree_map(torch.ones_like, ZERO)
    for params, grads in ((ZERO, ones), (ones, ZERO), (ZERO, ZERO)):
        tx = TRANSFORMS[name].make()
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
            assert flat(updates).isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        fr.scale_by_adamax,
        fr.scale_by_belief,
        fr.scale_by_yogi,
        fr.scale_by_radam,
        fr.scale_by_adan,
        fr.scale_by_adadelta,
        fr.scale_by_novograd,
        fr.scale_by_sm3,
        lambda: fr.lars(0.1),
        lambda: fr.fromage(0.1),
        lambda: fr.adamax(0.1),
        lambda: fr.adan(0.1),
        lambda: fr.sm3(0.1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_defaults_zeros_make_no_nan_either(make, dtype):
    zero = fr.tree_map(lambda w: w.to(dtype), ZERO)
    tx = make()
    state = tx.init(zero)
    for _ in range(3):
        updates, state = tx.update(zero, state, zero)
        assert flat(updates).isfinite().all()


def test_a_leaf_at_zero_moves_by_the_least_norm():
    params, grads = {"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])}
    for tx, expected in (
        (fr.lars(0.5), [-1.5, -2.0]),  # The plain step.
        (fr.fromage(0.75, min_norm=0.5), [-0.75 * 0.8 * 0.3, -0.75 * 0.8 * 0.4]),
        (fr.scale_by_param_block_norm(), [0.003, 0.004]),
        (fr.scale_by_param_block_rms(0.1), [0.3, 0.4]),
    ):
        found, _ = tx.update(grads, tx.init(params), params)
        torch.testing.assert_close(found["w"], torch.tensor(expected))


def test_rectified_adam_divides_from_its_sixth_step_on():
    tx, params = fr.scale_by_radam(b1=0.0, b2=0.999), {"w": torch.ones(1, dtype=torch.float64)}
    state, plain = tx.init(params), []
    for _ in range(8):
        updates, state = tx.update({"w": torch.full_like(params["w"], 5.0)}, state, params)
        plain.append(updates["w"].item() == 5.0)
    assert plain == [True] * 5 + [False] * 3


def test_sm3_keeps_a_vector_for_each_dimension():
    params = {"m": torch.zeros(40, 30), "filters": torch.zeros(5, 4, 3, 2), "b": torch.zeros(7), "s": torch.zeros(())}
    size = lambda state: sum(leaf.numel() for leaf in fr.tree_leaves(state))
    own, vectors = size(params), 40 + 30 + 5 + 4 + 3 + 2 + 7 + 1
    assert size(fr.scale_by_sm3().init(params)) == own + vectors
    assert size(fr.scale_by_sm3(keep_metric=True).init(params)) == 2 * own + vectors


def test_rprop_sees_signs_of_gradients_whose_products_would_vanish():
    tx, params = fr.scale_by_rprop(1e-5), {"w": torch.zeros(2)}
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update({"w": torch.tensor([1e-38, -1e-38])}, state, params)
    torch.testing.assert_close(state.step_sizes["w"], torch.full((2,), 1e-5 * 1.2**2))


def test_rprop_of_complex_entries_has_a_step_size_for_each_part():
    tx, params = fr.scale_by_rprop(0.1), {"w": torch.zeros(1, dtype=torch.complex64)}
    state = tx.init(params)
    for g in (1 + 1j, 1 - 1j):
        _, state = tx.update({"w": torch.tensor([g])}, state, params)
    torch.testing.assert_close(state.step_sizes["w"], torch.tensor([0.12 + 0.05j]))


def test_noisy_descent_is_descent_with_noise_of_the_variance_that_was_asked_for():
    params = {"w": torch.zeros(200_000, dtype=torch.float64)}
    tx = fr.noisy_sgd(0.5, eta=0.04, gamma=1.0, key=3)
    same = fr.chain(fr.add_noise(0.04, 1.0, 3), fr.scale(-0.5))
    state, other = tx.init(params), same.init(params)
    for n in (1, 2, 3):
        updates, state = tx.update({"w": torch.ones_like(params["w"])}, state, params)
        expected, other = same.update({"w": torch.ones_like(params["w"])}, other, params)
        assert_equal(updates, expected)
        assert abs(updates["w"].mean() + 0.5) < 0.001
        assert abs(updates["w"].var() / (0.25 * 0.04 / n) - 1) < 0.02
    with pytest.raises(TypeError, match="noisy_sgd got no key; expected key="):
        fr.noisy_sgd(0.1)


def test_optimistic_steps_come_to_the_saddle_point_that_plain_ones_leave():
    def after(tx):
        params = {"x": torch.ones(1, dtype=torch.float64), "y": torch.ones(1, dtype=torch.float64)}
        state = tx.init(params)
        for _ in range(300):
            updates, state = tx.update({"x": params["y"], "y": -params["x"]}, state, params)
            params = fr.apply_updates(params, updates)
        return fr.global_norm(params)

    assert after(fr.optimistic_gradient_descent(0.3)) < 1e-4
    assert after(fr.sgd(0.3)) > 10


def test_fromage_keeps_leaves_from_growing_at_any_rate():
    params = {"w": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    for rate in (1e-4, 0.1, 3.0, fr.linear_schedule(0.5, 0.0, 4)):
        tx = fr.fromage(rate)
        state, w = tx.init(params), params
        for _ in range(5):  # Gradients that lie across keep the norm.
            across = {"w": torch.stack([-w["w"][1], w["w"][0]])}
            updates, state = tx.update(across, state, w)
            w = fr.apply_updates(w, updates)
        torch.testing.assert_close(fr.global_norm(w).item(), 5.0, rtol=1e-13, atol=0)


def test_small_rates_of_fromage_are_not_lost_in_float32():
    params = {"w": torch.ones(1)}
    updates, _ = (tx := fr.fromage(torch.tensor(1e-4))).update({"w": torch.zeros(1)}, tx.init(params), params)
    torch.testing.assert_close(updates["w"], torch.tensor([-1e-4 * 1e-6 - 5e-9]), rtol=1e-3, atol=1e-10)


def test_the_decay_of_novograd_follows_a_schedule():
    params = {"w": torch.ones(2, dtype=torch.float64)}
    tx = fr.scale_by_novograd(b1=0.0, weight_decay=fr.linear_schedule(1.0, 0.0, 4))
    state = tx.init(params)
    for n in range(5):
        updates, state = tx.update({"w": torch.zeros_like(params["w"])}, state, params)
        torch.testing.assert_close(updates["w"], torch.full_like(params["w"], 1 - n / 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["radam", "adan", "adadelta", "novograd", "sm3", "rprop", "fromage"])
def test_the_real_compiler_makes_the_same_steps_of(name):
    draws = lambda seed: fr.tree_map(lambda w: w.float(), {f"layer{i}": draw(10 * seed + i) for i in range(2)})
    tx, params = TRANSFORMS[name].make(), draws(0)
    step = fr.fuse(tx, donate=True)
    (found, state), expected, eager = step.init(params), params, tx.init(params)
    for seed in range(1, 8):  # Rectified Adam divides in the sixth.
        found, state = step(found, draws(seed), state)
        updates, eager = tx.update(draws(seed), eager, expected)
        expected = fr.apply_updates(expected, updates)
        assert_equal(found, expected, rtol=1e-4, atol=1e-5)


# Wrong input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fr.scale_by_adamax(b1=1.0), ValueError, r"b1 is 1\.0; expected a number of at least 0 and below 1"),
        (lambda: fr.scale_by_belief(eps=-1.0), ValueError, r"eps is -1\.0; expected"),
        (lambda: fr.scale_by_belief(nesterov=1), TypeError, "nesterov is 1; expected True or False"),
        (lambda: fr.scale_by_yogi(initial_accumulator_value=-1e-6), ValueError, "initial_accumulator_value is -1e-06"),
        (lambda: fr.scale_by_radam(threshold=3.0), ValueError, r"threshold is 3\.0; expected .*at least 4.*Below 4"),
        (lambda: fr.scale_by_adan(b3=1.5), ValueError, r"b3 is 1\.5; expected a number of at least 0 and below 1"),
        (lambda: fr.scale_by_adadelta(eps=0.0), ValueError, r"eps is 0\.0; expected a number above 0"),
        (lambda: fr.scale_by_adadelta(rho=lambda n: 0.5), TypeError, "rho is the function .* It follows no schedule"),
        (lambda: fr.scale_by_novograd(mu_dtype=torch.int32), TypeError, r"mu_dtype is torch\.int32; expected a dtype"),
        (lambda: fr.scale_by_sm3(b2=1.5), ValueError, r"b2 is 1\.5; expected a number from 0 to 1"),
        (lambda: fr.scale_by_sm3(keep_metric=None), TypeError, "keep_metric is None; expected True or False"),
        (lambda: fr.scale_by_rprop(0.0), ValueError, r"learning_rate is 0\.0; expected a number above 0"),
        (lambda: fr.rprop(lambda n: 0.1), TypeError, "learning_rate is the function .* It follows no schedule"),
        (lambda: fr.rprop(0.1, eta_minus=1.2), ValueError, r"eta_minus is 1\.2; expected a number above 0 and below 1"),
        (lambda: fr.rprop(0.1, eta_plus=0.5), ValueError, r"eta_plus is 0\.5; expected a number above 1"),
        (lambda: fr.rprop(0.1, min_step_size=2.0, max_step_size=1.0), ValueError, "expected a range. Are they swapped"),
        (lambda: fr.scale_by_param_block_norm(-1.0), ValueError, r"min_scale is -1\.0"),
        (lambda: fr.optimistic_adam(lambda n: 0.1), TypeError, "learning_rate is the function .* no schedule"),
        (lambda: fr.adadelta(), TypeError, "learning_rate is None; expected a number.* would go uphill"),
        (lambda: fr.fromage("fast"), TypeError, "learning_rate is 'fast'; expected a number"),
        (lambda: fr.lars(0.1, trust_ratio_mask="w"), TypeError, "mask is the string 'w'"),
        (lambda: fr.noisy_sgd(0.1, key=0.5), TypeError, r"key is 0\.5; expected an int"),
        (lambda: fr.signum(0.1, beta=1.0), ValueError, "is 1.0; expected a number of at least 0 and below 1"),
    ],
)
def test_wrong_hyperparameters_are_said(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_state_of_another_one_is_refused():
    params = {"w": torch.ones(2)}
    for tx, other in (
        (fr.scale_by_belief(), fr.scale_by_adam()),
        (fr.scale_by_novograd(), fr.scale_by_adan()),
        (fr.scale_by_sm3(), fr.scale_by_rprop(0.1)),
    ):
        with pytest.raises(ValueError, match=r"state is \w+State; expected \w+State\. Was it made by this"):
            tx.update(params, other.init(params), params)


def test_what_an_optimizer_has_not_is_said_by_its_own_name():
    with pytest.raises(TypeError, match=r"momentum is None; expected a number.*lars without momentum has momentum=0"):
        fr.lars(0.1, momentum=None)
    with pytest.raises(ValueError, match=r"^momentum is 1\.0"):
        fr.lars(0.1, momentum=1.0)
    with pytest.raises(TypeError, match=r"learning_rate is the function .*optimistic_adam_v2 takes schedules"):
        fr.optimistic_adam(fr.linear_schedule(0.1, 0.0, 5))
    with pytest.raises(ValueError, match=r"^learning_rate is -0\.1"):
        fr.optimistic_adam(-0.1)
