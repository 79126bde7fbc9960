"""Preconditioners beyond Adam's, with optax's names and numbers: what a gradient is divided by, from those before it.

Each tells its metric, so that `proximal_step` solves the penalized problem in it. Moments of 16-bit parameters are kept
in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcreg._typing import Hyper, Params, Scalar, Schedule, Updates
from funcreg.construction import remembered
from funcreg.leafwise import (
    compute,
    compute_wide,
    gathered,
    increment,
    reduce_leaves,
    safe_sqrt,
    sign,
    squared,
    wide,
    zeros,
)
from funcreg.ranges import check_range, flags, scalars, single
from funcreg.scaling import (
    AdamState,
    adam_metric,
    average,
    average_square,
    bias_correction,
    corrected_mean,
    real_zeros,
    stored,
)
from funcreg.transform import (
    Transform,
    at_step,
    below_one,
    check_fit,
    counter,
    dtypes,
    finite_nonnegative,
    positive,
    public_state,
    share,
)
from funcreg.tree import flatten, leaves_like, tree_leaves, tree_map

# Entry by entry


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


@public_state
class AdadeltaState(NamedTuple):
    """The state of `scale_by_adadelta`.

    Example:
        >>> scale_by_adadelta().init(torch.zeros(1))
        AdadeltaState(e_g=tensor([0.]), e_x=tensor([0.]), h=tensor([1.]))
    """

    e_g: Params  # Moving average of the squares of updates that come in.
    e_x: Params  # Moving average of the squares of those that go out.
    h: Params  # What the last updates were divided by, from the average of those that went out before them.


@remembered
def scale_by_adadelta(rho: Scalar = 0.9, eps: Scalar = 1e-6) -> Transform:
    r"""Give updates the size of those before them, :math:`u' = \sqrt{x + \epsilon} / \sqrt{v + \epsilon} \; u`.

    Here :math:`v` is the mean square of updates :math:`u`, and :math:`x` that of the earlier :math:`u'`. The same as
    in `torch.optim.Adadelta`; of a complex entry the squared magnitude counts, where optax squares the entry. The state
    keeps what it divided by, one tensor more than theirs, for the metric of `proximal_step`.

    Args:
        rho: Decay of both mean squares.
        eps: :math:`\epsilon`, above 0: with 0 nothing would ever move.

    Example:
        >>> tx, params = scale_by_adadelta(rho=0.75, eps=1.0), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0, 0.0])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([1.7889, 0.0000])}

    References:
        Zeiler, *Adadelta: an adaptive learning rate method*, 2012.
    """
    below_one(rho=rho)
    positive(eps=eps)
    rho, eps = scalars(rho=rho, eps=eps)

    def init(params: Params) -> AdadeltaState:
        return AdadeltaState(real_zeros(params), real_zeros(params), real_zeros(params, 1.0))

    def update(updates: Updates, state: AdadeltaState, params: Params) -> tuple[Updates, AdadeltaState]:
        e_g = stored(average_square(state.e_g, updates, rho), state.e_g)
        h = compute(lambda v, x, e: (v + e).sqrt() / (x + e).sqrt(), e_g, state.e_x, hyper=(eps,))
        direction = compute_wide(lambda u, h: u / h, updates, h)
        e_x = stored(average_square(state.e_x, direction, rho), state.e_x)
        return stored(direction, updates), AdadeltaState(e_g, e_x, h)

    return Transform(init, update, lambda state: state.h, state=AdadeltaState)


# Leaf by leaf


@public_state
class NovogradState(NamedTuple):
    """The state of `scale_by_novograd`.

    Example:
        >>> scale_by_novograd().init(torch.zeros(2))
        NovogradState(steps=tensor(0, dtype=torch.int32), mu=tensor([0., 0.]), nu=tensor([0.]))
    """

    steps: Tensor  # Number of updates made, int32.
    mu: Params  # Decayed sum of updates over their norm, and of decay.
    nu: Params  # For each leaf, the moving average of the squared norm of its updates.


@remembered
def scale_by_novograd(
    b1: Scalar = 0.9,
    b2: Scalar = 0.25,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: Hyper | Schedule = 0.0,
    mu_dtype: torch.dtype | None = None,
) -> Transform:
    r"""Divide the update of each leaf by the root of its mean squared norm, then sum with momentum.

    .. math:: m_t = \beta_1 m_{t-1} + \frac{u_t}{\sqrt{v_t} + \epsilon} + \lambda w, \quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \|u_t\|^2, \quad v_1 = \|u_1\|^2

    Args:
        b1: Decay of the momentum :math:`m`, which is a sum and no mean.
        b2: Decay of the mean squared norm :math:`v`, one number a leaf.
        eps: :math:`\epsilon`, added to the root.
        eps_root: Added below the root.
        weight_decay: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        mu_dtype: Dtype in which the momentum is kept, and to which updates are rounded; by default that of the
            parameter, float32 for 16-bit ones.

    Example:
        >>> tx, params = scale_by_novograd(), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([3.0, -4.0])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([ 0.6000, -0.8000])}

    References:
        Ginsburg et al., *Stochastic gradient methods with layer-wise adaptive moments for training of deep networks*,
        2019.
    """
    below_one(b1=b1, b2=b2)
    finite_nonnegative(eps=eps, eps_root=eps_root, weight_decay=weight_decay)
    b1, b2, eps, eps_root = scalars(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    dtypes(mu_dtype=mu_dtype)

    def init(params: Params) -> NovogradState:
        check_fit(params, None, weight_decay)
        # One entry with the dimensions of its leaf, beside which a fused step keeps it.
        single = lambda w: torch.zeros([1] * w.ndim, dtype=wide(w.real.dtype), device=w.device)
        return NovogradState(counter(params), zeros(params, mu_dtype), tree_map(single, params))

    def update(updates: Updates, state: NovogradState, params: Params) -> tuple[Updates, NovogradState]:
        sums = flatten(updates)[1](reduce_leaves(squared, updates))
        sizes = tree_map(lambda s, v: s.reshape(v.shape), sums, state.nu)
        follow = lambda v, s, n, b: torch.where(n == 0, s, b * v + (1 - b) * s)
        nu = compute(follow, state.nu, sizes, hyper=(state.steps, b2))
        # One after another, in the order of operations that optax has.
        scaled = lambda u, w, v, e, r, c: u / (safe_sqrt(v + r) + e) + c * w
        own = compute_wide(scaled, updates, params, hyper=(nu, eps, eps_root, at_step(weight_decay, state.steps)))
        mu = stored(compute_wide(lambda m, u, b: b * m + u, state.mu, own, hyper=(b1,)), state.mu)
        # Cloned, because leaves of updates and state never share memory.
        return compute(lambda u, m: m.clone(), updates, mu), NovogradState(increment(state.steps), mu, nu)

    def metric(state: NovogradState) -> Params:
        # Of the sum, which exceeds a mean by 1 / (1 - b1).
        spread = lambda m, v, b, e, r: torch.zeros_like(m.real) + (1 - b) * (safe_sqrt(v + r) + e)
        return compute_wide(spread, state.mu, hyper=(state.nu, b1, eps, eps_root))

    return Transform(init, update, metric, state=NovogradState)


# Dimension by dimension


@public_state
class SM3State(NamedTuple):
    """The state of `scale_by_sm3`.

    Example:
        >>> scale_by_sm3().init(torch.zeros(2, 3)).mu
        (tensor([0., 0.]), tensor([0., 0., 0.]))
    """

    mu: Params  # For each dimension of a leaf, the greatest sums of squares along it; of a vector the sums themselves.
    nu: Params  # Moving average of divided updates.
    factors: Params  # Moving average of what they were multiplied by; () unless the metric is kept.


@remembered
def scale_by_sm3(b1: Scalar = 0.9, b2: Scalar = 1.0, eps: Scalar = 1e-8, *, keep_metric: bool = False) -> Transform:
    r"""Divide updates by the root of their sum of squares, of which a vector a dimension is kept, then take the mean.

    .. math:: a_{ij} = \min(r_i, c_j) + u_{ij}^2, \quad
        m' = \beta_1 m + (1 - \beta_1) \frac{u}{\sqrt{a + \epsilon}}, \quad
        r_i' = \max_j a_{ij}, \quad c_j' = \max_i a_{ij}

    So a matrix needs as much memory beside its mean as its rows and columns. With `b2` below 1 the sum is
    :math:`\beta_2 \min(r_i, c_j) + (1 - \beta_2) u_{ij}^2`.

    Args:
        b1: Decay of the mean :math:`m`, which is not corrected for its first value.
        b2: Decay of the sums, at most 1, which keeps them.
        eps: :math:`\epsilon`, below the root.
        keep_metric: Whether the state has one more tensor like the parameters, for the metric of `proximal_step`,
            which cannot be told from rows and columns.

    Example:
        >>> tx, params = scale_by_sm3(b1=0.5), {"weight": torch.zeros(2, 2)}
        >>> updates, state = tx.update({"weight": torch.tensor([[4.0, 0.0], [-1.0, 2.0]])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([[ 0.5000,  0.0000],
                [-0.5000,  0.5000]])}
        >>> state.mu
        {'weight': (tensor([16.,  4.]), tensor([16.,  4.]))}

    References:
        Anil, Gupta, Koren & Singer, *Memory-efficient adaptive optimization*, 2019.
    """
    below_one(b1=b1)
    share(b2=b2)
    finite_nonnegative(eps=eps)
    b1, b2, eps = scalars(b1=b1, b2=b2, eps=eps)
    flags(keep_metric=keep_metric)
    # A sum counts the squares whole, a mean by their weight.
    whole = torch.where(b2 == 1, 1.0, 1 - b2) if isinstance(b2, Tensor) else 1.0 if b2 == 1 else 1 - b2

    def init(params: Params) -> SM3State:
        return SM3State(tree_map(_along_dimensions, params), zeros(params), real_zeros(params) if keep_metric else ())

    def update(updates: Updates, state: SM3State, params: Params) -> tuple[Updates, SM3State]:
        add = lambda u, b, f, *along: f * squared(u) + b * functools.reduce(torch.minimum, _tensors(along))
        sums = compute_wide(add, updates, hyper=(b2, whole, *_laid_out(updates, state.mu)))
        divide = lambda u, a, e: torch.where(a > 0, u / _root(a, e), 0.0)
        nu = stored(average(state.nu, compute_wide(divide, updates, sums, hyper=(eps,)), b1), state.nu)
        rows = zip(tree_leaves(sums), leaves_like(updates, state.mu), strict=True)
        mu = flatten(updates)[1]([_greatest(a, kept) for a, kept in rows])
        # Cloned, because leaves of updates and state never share memory.
        return compute(lambda u, m: m.clone(), updates, nu), SM3State(mu, nu, follow(state.factors, sums))

    def follow(factors: Params, sums: Params) -> Params:
        if not keep_metric:
            return ()
        return compute(lambda p, a, b, e: b * p + (1 - b) / _root(a, e), factors, sums, hyper=(b1, eps))

    def metric(state: SM3State) -> Params:
        return compute(lambda p: 1 / p, state.factors)

    return Transform(init, update, metric if keep_metric else None, state=SM3State)


def _root(sums: Tensor, eps: Scalar) -> Tensor:
    """The root of a sum of squares, or 1 where there is none, so that no quotient and no derivative is NaN."""
    inside = sums + eps
    return torch.where(inside == 0, 1.0, inside).sqrt()


def _tensors(values: Sequence[Tensor | float]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor)]


def _along_dimensions(w: Tensor) -> tuple[Tensor, ...]:
    """Zeros along each dimension of a leaf, the same in every process; of a vector, or a number, where it lies."""
    kept = wide(w.real.dtype)
    if w.ndim < 2:
        return (torch.zeros_like(w.real, dtype=kept),)
    return tuple([torch.zeros(n, dtype=kept, device=w.device) for n in w.shape])


def _laid_out(updates: Updates, mu: Params) -> list[Hyper]:
    """For each dimension a tree of what is kept along it, as it broadcasts; infinity where a leaf has fewer."""
    rows = [
        [
            x if len(kept) == 1 else x.reshape([x.numel() if d == i else 1 for i in range(len(kept))])
            for d, x in enumerate(kept)
        ]
        for kept in leaves_like(updates, mu)
    ]
    most, rebuild = max([len(row) for row in rows], default=0), flatten(updates)[1]
    return [rebuild([row[d] if d < len(row) else math.inf for row in rows]) for d in range(most)]


def _greatest(sums: Tensor, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The greatest entries along each dimension, in the dtype in which they are kept."""
    if sums.ndim < 2:
        return (sums.to(like[0].dtype),)
    # A sum over no entries is 0, a maximum an error.
    over = lambda a, others: a.amax(others) if a.numel() else a.sum(others)
    others = [tuple([i for i in range(sums.ndim) if i != d]) for d in range(sums.ndim)]
    found = gathered([compute_wide(lambda a, dims=dims: over(a, dims), sums) for dims in others])
    return tuple([x.to(kept.dtype) for x, kept in zip(found, like, strict=True)])
