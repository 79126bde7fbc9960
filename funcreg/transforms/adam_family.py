"""Adam and what descends from it: a mean of updates over the root of a mean square, with optax's names and numbers.

Each tells its metric, so that `proximal_step` solves the penalized problem in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Params, Scalar, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute, compute_wide, increment, sign, squared, zeros
from funcreg.core.ranges import check_range, flags, scalars, single
from funcreg.core.tree import tree_map
from funcreg.transforms.factory_checks import below_one, dtypes, finite_nonnegative
from funcreg.transforms.moments import (
    adam_metric,
    average,
    average_square,
    bias_correction,
    check_real,
    corrected_mean,
    real_zeros,
    stored,
    stored_square,
)
from funcreg.transforms.transform import Transform, counter, public_state


def _moments(
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    mu_dtype: torch.dtype | None,
    nu_dtype: torch.dtype | None,
) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """The hyperparameters of Adam, checked."""
    below_one(b1=b1, b2=b2)
    finite_nonnegative(eps=eps, eps_root=eps_root)
    dtypes(mu_dtype=mu_dtype)
    check_real(nu_dtype)
    b1, b2, eps, eps_root = scalars(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    return b1, b2, eps, eps_root


@public_state
class AdamState(NamedTuple):
    """The state of `scale_by_adam`.

    Example:
        >>> scale_by_adam().init(torch.zeros(1))
        AdamState(steps=tensor(0, dtype=torch.int32), mu=tensor([0.]), nu=tensor([0.]))
    """

    steps: Tensor  # Number of updates made, int32.
    mu: Params  # Moving average of updates.
    nu: Params  # Moving average of their squares.


@remembered
def scale_by_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
    nu_dtype: torch.dtype | None = None,
) -> Transform:
    r"""Divide the mean of updates by the root of their mean square, :math:`\hat m / (\sqrt{\hat v} + \epsilon)`.

    Args:
        b1: Decay of the mean :math:`m`.
        b2: Decay of the mean square :math:`v`.
        eps: :math:`\epsilon`, added to the root.
        eps_root: Added below the root.
        mu_dtype: Dtype in which the mean is kept; by default that of the parameter, float32 for 16-bit ones.
        nesterov: Whether the mean looks one step ahead, as in NAdam.
        nu_dtype: Dtype in which the mean square is kept; by default that of the parameter, float32 for 16-bit ones.
            One of 16 bits is rounded up or down at random, by bits that are a function of step and place: its mean is
            right.

    Example:
        >>> tx, params = scale_by_adam(), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([ 1.0000, -1.0000])}

    References:
        Kingma & Ba, *Adam: a method for stochastic optimization*, 2015.
        Dozat, *Incorporating Nesterov momentum into Adam*, 2016.
    """
    b1, b2, eps, eps_root = _moments(b1, b2, eps, eps_root, mu_dtype, nu_dtype)
    flags(nesterov=nesterov)

    def init(params: Params) -> AdamState:
        return AdamState(counter(params), zeros(params, mu_dtype), real_zeros(params, dtype=nu_dtype))

    def update(updates: Updates, state: AdamState, params: Params) -> tuple[Updates, AdamState]:
        steps = increment(state.steps)
        mu, nu = average(state.mu, updates, b1), stored_square(average_square(state.nu, updates, b2), state.nu, steps)
        new = AdamState(steps, stored(mu, state.mu), nu)
        mean = corrected_mean(mu, updates, b1, steps, nesterov)
        return compute(lambda u, m, h: m / h, updates, mean, metric(new)), new

    def metric(state: AdamState) -> Params:
        return adam_metric(state.nu, bias_correction(b2, state.steps), eps, eps_root)

    return Transform(init, update, metric, state=AdamState)


@public_state
class AmsgradState(NamedTuple):
    """The state of `scale_by_amsgrad`.

    Example:
        >>> scale_by_amsgrad().init(torch.zeros(1)).nu_max
        tensor([0.])
    """

    steps: Tensor  # Number of updates made, int32.
    mu: Params  # Moving average of updates.
    nu: Params  # Moving average of their squares.
    nu_max: Params  # Greatest corrected average of squares so far.


@remembered
def scale_by_amsgrad(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    nu_dtype: torch.dtype | None = None,
) -> Transform:
    r"""Adam with the greatest mean square so far, :math:`\hat m / (\sqrt{\max_s \hat v_s} + \epsilon)`.

    As in optax the greatest *corrected* mean square counts; `torch.optim.Adam(amsgrad=True)` corrects the greatest.

    Args:
        b1: Decay of the mean :math:`m`.
        b2: Decay of the mean square :math:`v`.
        eps: :math:`\epsilon`, added to the root.
        eps_root: Added below the root.
        mu_dtype: Dtype in which the mean is kept; by default that of the parameter, float32 for 16-bit ones.
        bias_correction_mu: Whether the mean is corrected.
        bias_correction_nu: Whether the mean square is corrected.
        nu_dtype: Dtype in which the mean square and its greatest value are kept, as in `scale_by_adam`.

    Example:
        >>> tx, params = scale_by_amsgrad(), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([ 1., -1.])}

    References:
        Reddi, Kale & Kumar, *On the convergence of Adam and beyond*, 2018.
    """
    b1, b2, eps, eps_root = _moments(b1, b2, eps, eps_root, mu_dtype, nu_dtype)
    flags(bias_correction_mu=bias_correction_mu, bias_correction_nu=bias_correction_nu)

    def init(params: Params) -> AmsgradState:
        # Two calls: leaves of a state never share memory.
        squares = [real_zeros(params, dtype=nu_dtype) for _ in range(2)]
        return AmsgradState(counter(params), zeros(params, mu_dtype), *squares)

    def update(updates: Updates, state: AmsgradState, params: Params) -> tuple[Updates, AmsgradState]:
        steps = increment(state.steps)
        mu, nu = average(state.mu, updates, b1), stored_square(average_square(state.nu, updates, b2), state.nu, steps)
        missing = bias_correction(b2, steps) if bias_correction_nu else 1.0
        nu_max = compute(lambda top, v, c: torch.maximum(top, v / c), state.nu_max, nu, hyper=(missing,))
        new = AmsgradState(steps, stored(mu, state.mu), nu, nu_max)
        missing = bias_correction(b1, steps) if bias_correction_mu else 1.0
        return compute(lambda u, m, h, c: m / c / h, updates, mu, metric(new), hyper=(missing,)), new

    def metric(state: AmsgradState) -> Params:
        return adam_metric(state.nu_max, 1.0, eps, eps_root)

    return Transform(init, update, metric, state=AmsgradState)


@remembered
def scale_by_adamax(b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8) -> Transform:
    r"""Divide the mean of updates by their greatest magnitude, which fades, :math:`\hat m / v`.

    .. math:: v_t = \max(|u_t| + \epsilon, \beta_2 v_{t-1})

    Args:
        b1: Decay of the mean :math:`m`.
        b2: Decay of the greatest magnitude :math:`v`.
        eps: :math:`\epsilon`.

    Example:
        >>> tx, params = scale_by_adamax(), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([ 1., -1.])}

    References:
        Kingma & Ba, *Adam: a method for stochastic optimization*, 2015.
    """
    below_one(b1=b1, b2=b2)
    finite_nonnegative(eps=eps)
    b1, b2, eps = scalars(b1=b1, b2=b2, eps=eps)

    def init(params: Params) -> AdamState:
        return AdamState(counter(params), zeros(params), real_zeros(params))

    def update(updates: Updates, state: AdamState, params: Params) -> tuple[Updates, AdamState]:
        steps, mu = increment(state.steps), average(state.mu, updates, b1)
        greatest = lambda v, u, b, e: torch.maximum(u.abs() + e, b * v)
        nu = compute(greatest, state.nu, updates, hyper=(b2, eps))
        mean = corrected_mean(mu, updates, b1, steps, nesterov=False)
        return compute(lambda u, m, v: m / v, updates, mean, nu), AdamState(steps, stored(mu, state.mu), nu)

    return Transform(init, update, lambda state: state.nu, state=AdamState)


@public_state
class BeliefState(NamedTuple):
    """The state of `scale_by_belief`.

    Example:
        >>> scale_by_belief().init(torch.zeros(1))
        BeliefState(steps=tensor(0, dtype=torch.int32), mu=tensor([0.]), nu=tensor([0.]))
    """

    steps: Tensor  # Number of updates made, int32.
    mu: Params  # Moving average of updates.
    nu: Params  # Moving average of the squares of their distances to it.


@remembered
def scale_by_belief(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-16,
    eps_root: Scalar = 1e-16,
    *,
    nesterov: bool = False,
) -> Transform:
    r"""Divide the mean of updates by how far they are from it, :math:`\hat m / (\sqrt{\hat v} + \epsilon)`.

    .. math:: v_t = \beta_2 v_{t-1} + (1 - \beta_2) (u_t - m_t)^2 + \bar\epsilon

    Args:
        b1: Decay of the mean :math:`m`.
        b2: Decay of the mean square :math:`v` of distances.
        eps: :math:`\epsilon`, added to the root.
        eps_root: :math:`\bar\epsilon`, added to :math:`v` at every step.
        nesterov: Whether the mean looks one step ahead.

    Example:
        >>> tx, params = scale_by_belief(), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([ 1.1111, -1.1111])}

    References:
        Zhuang et al., *AdaBelief optimizer: adapting stepsizes by the belief in observed gradients*, 2020.
    """
    below_one(b1=b1, b2=b2)
    finite_nonnegative(eps=eps, eps_root=eps_root)
    b1, b2, eps, eps_root = scalars(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    flags(nesterov=nesterov)

    def init(params: Params) -> BeliefState:
        return BeliefState(counter(params), zeros(params), real_zeros(params))

    def update(updates: Updates, state: BeliefState, params: Params) -> tuple[Updates, BeliefState]:
        steps, mu = increment(state.steps), average(state.mu, updates, b1)
        apart = lambda v, u, m, b, r: b * v + (1 - b) * squared(u - m) + r
        nu = compute(apart, state.nu, updates, mu, hyper=(b2, eps_root))
        new = BeliefState(steps, stored(mu, state.mu), nu)
        mean = corrected_mean(mu, updates, b1, steps, nesterov)
        return compute(lambda u, m, h: m / h, updates, mean, metric(new)), new

    def metric(state: BeliefState) -> Params:
        return adam_metric(state.nu, bias_correction(b2, state.steps), eps, 0.0)

    return Transform(init, update, metric, state=BeliefState)


@remembered
def scale_by_yogi(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-3,
    eps_root: Scalar = 0.0,
    initial_accumulator_value: Scalar = 1e-6,
) -> Transform:
    r"""Adam with a mean square that moves by steps of one size, :math:`\hat m / (\sqrt{\hat v} + \epsilon)`.

    .. math:: v_t = v_{t-1} - (1 - \beta_2) \operatorname{sign}(v_{t-1} - u_t^2) u_t^2

    As in optax the mean begins at `initial_accumulator_value` too, and both are corrected as if they began at 0.

    Args:
        b1: Decay of the mean :math:`m`.
        b2: Decay of the mean square :math:`v`.
        eps: :math:`\epsilon`, added to the root.
        eps_root: Added below the root.
        initial_accumulator_value: First mean and first mean square.

    Example:
        >>> tx, params = scale_by_yogi(), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([ 0.9997, -0.9444])}

    References:
        Zaheer, Reddi, Sachan, Kale & Kumar, *Adaptive methods for nonconvex optimization*, 2018.
    """
    below_one(b1=b1, b2=b2)
    finite_nonnegative(eps=eps, eps_root=eps_root, initial_accumulator_value=initial_accumulator_value)
    b1, b2, eps, eps_root = scalars(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    (first,) = scalars(initial_accumulator_value=initial_accumulator_value)
    single(initial_accumulator_value=first)

    def init(params: Params) -> AdamState:
        mu = tree_map(lambda m: (m + first).to(m.dtype), zeros(params))
        return AdamState(counter(params), mu, real_zeros(params, first))

    def update(updates: Updates, state: AdamState, params: Params) -> tuple[Updates, AdamState]:
        steps, mu = increment(state.steps), average(state.mu, updates, b1)
        towards = lambda v, u, b: v - (1 - b) * sign(v - squared(u)) * squared(u)
        new = AdamState(steps, stored(mu, state.mu), compute(towards, state.nu, updates, hyper=(b2,)))
        mean = corrected_mean(mu, updates, b1, steps, nesterov=False)
        return compute(lambda u, m, h: m / h, updates, mean, metric(new)), new

    def metric(state: AdamState) -> Params:
        return adam_metric(state.nu, bias_correction(b2, state.steps), eps, eps_root)

    return Transform(init, update, metric, state=AdamState)


@remembered
def scale_by_radam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    *,
    nesterov: bool = False,
) -> Transform:
    r"""Adam that divides by a mean square once it is to be trusted, :math:`r_t \hat m / (\sqrt{\hat v} + \epsilon)`.

    .. math:: r_t^2 = \frac{(\rho_t - 4) (\rho_t - 2) \rho_\infty}{(\rho_\infty - 4) (\rho_\infty - 2) \rho_t}, \quad
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \quad \rho_\infty = \frac{2}{1 - \beta_2} - 1

    Up to the step at which :math:`\rho_t` reaches the threshold, the sixth by default, updates are :math:`\hat m`.

    Args:
        b1: Decay of the mean :math:`m`.
        b2: Decay of the mean square :math:`v`.
        eps: :math:`\epsilon`, added to the root of the corrected mean square; `torch.optim.RAdam` adds it to that of
            the mean square as it is.
        eps_root: Added below the root.
        threshold: The least :math:`\rho_t` with which it divides, at least 4, below which :math:`r_t` is not defined.
        nesterov: Whether the mean looks one step ahead.

    Example:
        >>> tx, params = scale_by_radam(), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([ 4.0000, -0.1000])}

    References:
        Liu et al., *On the variance of the adaptive learning rate and beyond*, 2020.
    """
    below_one(b1=b1, b2=b2)
    finite_nonnegative(eps=eps, eps_root=eps_root)
    check_range("threshold", threshold, 4.0, hint="Below 4 the factor of a step would be the root of a negative number")
    b1, b2, eps, eps_root, threshold = scalars(b1=b1, b2=b2, eps=eps, eps_root=eps_root, threshold=threshold)
    flags(nesterov=nesterov)

    def init(params: Params) -> AdamState:
        return AdamState(counter(params), zeros(params), real_zeros(params))

    def update(updates: Updates, state: AdamState, params: Params) -> tuple[Updates, AdamState]:
        steps, mu = increment(state.steps), average(state.mu, updates, b1)
        new = AdamState(steps, stored(mu, state.mu), stored(average_square(state.nu, updates, b2), state.nu))
        mean = corrected_mean(mu, updates, b1, steps, nesterov)
        return compute(lambda u, m, h: m / h, updates, mean, metric(new)), new

    def metric(state: AdamState) -> Params:
        trusted, rate = _rectification(b2, threshold, state.steps)
        roots = adam_metric(state.nu, bias_correction(b2, state.steps), eps, eps_root)
        return compute(lambda h, on, r: torch.where(on, h / r, 1.0), roots, hyper=(trusted, rate))

    return Transform(init, update, metric, state=AdamState)


def _rectification(b2: Scalar, threshold: Scalar, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a mean square of so many steps is trusted, and the factor of a step that is divided by its root."""
    most = 2 / (1 - b2) - 1
    length = most - 2 * steps * (1 - bias_correction(b2, steps)) / bias_correction(b2, steps)
    trusted = length >= threshold
    square = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
    # Where it is not trusted, 1 stands in for it, so that no derivative is NaN.
    return trusted, torch.where(trusted, square, 1.0).sqrt()


@public_state
class AdanState(NamedTuple):
    """The state of `scale_by_adan`.

    Example:
        >>> scale_by_adan().init(torch.zeros(1)).n
        tensor([0.])
    """

    steps: Tensor  # Number of updates made, int32.
    m: Params  # Moving average of updates.
    v: Params  # Moving average of their changes from step to step.
    n: Params  # Moving average of the squares of updates that look ahead by such a change.
    g: Params  # The last updates.


@remembered
def scale_by_adan(
    b1: Scalar = 0.98,
    b2: Scalar = 0.92,
    b3: Scalar = 0.99,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
) -> Transform:
    r"""Adam with a Nesterov momentum of changes, :math:`(\hat m + (1 - \beta_2) \hat v) / (\sqrt{\hat n} + \epsilon)`.

    Here :math:`v` is the mean of changes :math:`\delta_t = u_t - u_{t-1}`, and :math:`n` the mean square of
    :math:`u_t + (1 - \beta_2) \delta_t`; at the first step there is no change.

    Args:
        b1: Decay of the mean :math:`m`.
        b2: Decay of the mean :math:`v` of changes.
        b3: Decay of the mean square :math:`n`.
        eps: :math:`\epsilon`, added to the root.
        eps_root: Added below the root.

    Example:
        >>> tx, params = scale_by_adan(), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([ 1., -1.])}

    References:
        Xie, Zhou, Li, Lin & Yan, *Adan: adaptive Nesterov momentum algorithm for faster optimizing deep models*, 2022.
    """
    below_one(b1=b1, b2=b2, b3=b3)
    finite_nonnegative(eps=eps, eps_root=eps_root)
    b1, b2, b3, eps, eps_root = scalars(b1=b1, b2=b2, b3=b3, eps=eps, eps_root=eps_root)

    def init(params: Params) -> AdanState:
        return AdanState(counter(params), zeros(params), zeros(params), real_zeros(params), zeros(params))

    def update(updates: Updates, state: AdanState, params: Params) -> tuple[Updates, AdanState]:
        steps = increment(state.steps)
        changes = compute_wide(
            lambda u, last, n: torch.where(n == 0, torch.zeros_like(u), u - last),
            updates,
            state.g,
            hyper=(state.steps,),
        )
        ahead = compute_wide(lambda u, d, b: u + (1 - b) * d, updates, changes, hyper=(b2,))
        m, v = average(state.m, updates, b1), average(state.v, changes, b2)
        n = stored(average_square(state.n, ahead, b3), state.n)
        # Cloned, because a state never shares memory with the updates that a user holds.
        last = compute(lambda kept, u: u.clone(), state.g, updates)
        new = AdanState(steps, stored(m, state.m), stored(v, state.v), n, last)
        missing = bias_correction(b1, steps), bias_correction(b2, steps)
        direction = lambda u, m, v, h, b, c, d: (m / c + (1 - b) * (v / d)) / h
        return compute(direction, updates, m, v, metric(new), hyper=(b2, *missing)), new

    def metric(state: AdanState) -> Params:
        return adam_metric(state.n, bias_correction(b3, state.steps), eps, eps_root)

    return Transform(init, update, metric, state=AdanState)
