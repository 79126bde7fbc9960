"""Transforms that scale: learning rates, momentum, signs and trust ratios, with optax's names and numbers."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Params, Scalar, Schedule, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute, compute_wide, euclidean, increment, sign, zeros
from funcreg.core.ranges import check_choice, concrete, flags, scalars
from funcreg.core.tree import tree_leaves, tree_map
from funcreg.core.undocumented import is_compiling
from funcreg.transforms.factory_checks import below_one, dtypes, finite, finite_nonnegative, positive, share
from funcreg.transforms.moments import average, bias_correction, stored
from funcreg.transforms.schedules import KnownSchedule
from funcreg.transforms.transform import (
    Stage,
    Transform,
    at_step,
    counter,
    everywhere,
    memoryless,
    public_state,
    scheduled,
)


@remembered
def scale(step_size: Hyper) -> Transform:
    r"""Multiply updates by a number, :math:`u' = s u`.

    Args:
        step_size: Factor: a number, a tensor, or a tree of them like the parameters. A negative one descends. For a
            schedule, take `scale_by_schedule`.

    Example:
        >>> params = {"weight": torch.zeros(2)}
        >>> scale(-0.1).update({"weight": torch.tensor([1.0, 2.0])}, EmptyState(), params)
        ({'weight': tensor([-0.1000, -0.2000])}, EmptyState())
    """
    finite(step_size=step_size)
    negative = _negative(step_size)
    stages: list[Stage] = ["scales", "flips"] if negative else ["scales"]
    sizes = tree_map(lambda s: s if callable(s) else abs(s), step_size)
    return scheduled(_scale, step_size, descends=negative, stages=stages, rate=sizes)


def _negative(step_size: Hyper) -> bool:
    """Whether a factor, or one of a tree, is known to be below 0."""
    known = [x for x in map(concrete, tree_leaves(step_size)) if x is not None]
    return any([bool((x < 0).any()) if isinstance(x, Tensor) else x < 0 for x in known])


def _scale(updates: Updates, params: Params, step_size: Hyper) -> Updates:
    return compute(lambda u, s: s * u, updates, hyper=(step_size,))


@remembered
def scale_by_schedule(step_size_fn: Schedule) -> Transform:
    r"""Multiply updates by a schedule's value, :math:`u' = s_t u`, with :math:`t` from 0.

    Args:
        step_size_fn: From the number of steps taken to the factor.

    Example:
        >>> tx = scale_by_schedule(linear_schedule(1.0, 0.0, 4))
        >>> params = {"weight": torch.zeros(1)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"weight": torch.ones(1)}, state, params)
        >>> tx.update({"weight": torch.ones(1)}, state, params)
        ({'weight': tensor([0.7500])}, ScheduleState(steps=tensor(2, dtype=torch.int32)))
    """
    if not callable(step_size_fn) or isinstance(step_size_fn, type):
        raise TypeError(f"step_size_fn is {step_size_fn!r}; expected a function of the step. For a number, use scale.")
    tx = scheduled(_scale, step_size_fn, stages=["scales"], rate=step_size_fn)
    tx.covers = everywhere if _may_be_negative(step_size_fn) else None
    return tx


def _may_be_negative(schedule: Schedule) -> bool:
    """Whether a schedule may make steps downhill; of one of the user's own nothing is known."""
    if not isinstance(schedule, KnownSchedule) or is_compiling():
        return True
    found = [concrete(at_step(schedule, count)) for count in (0, *schedule.turns)]
    return any([value is None or bool(value < 0) for value in found])


@remembered
def scale_by_learning_rate(learning_rate: Hyper | Schedule | None = None, *, flip_sign: bool = True) -> Transform:
    r"""Multiply updates by minus the learning rate, :math:`u' = -\eta_t u`: the last step of a descent.

    Args:
        learning_rate: Number of at least 0, tensor, schedule, or a tree of them like the parameters. None, optax's
            default that leaves updates as they are, is refused.
        flip_sign: Whether to multiply by minus the learning rate.

    Example:
        >>> params = {"weight": torch.zeros(2)}
        >>> scale_by_learning_rate(0.1).update({"weight": torch.tensor([1.0, 2.0])}, EmptyState(), params)
        ({'weight': tensor([-0.1000, -0.2000])}, EmptyState())
    """
    if learning_rate is None:
        raise TypeError(
            "learning_rate is None; expected a number, a tensor, a schedule or a tree of them. Without one, updates "
            "would go uphill: for the direction alone take the transform before it, such as scale_by_adam()."
        )
    finite_nonnegative(learning_rate=learning_rate)
    flags(flip_sign=flip_sign)
    direction = -1 if flip_sign else 1

    def rule(updates: Updates, params: Params, rate: Hyper) -> Updates:
        return compute(lambda u, r: direction * r * u, updates, hyper=(rate,))

    stages: list[Stage] = ["steps"] if flip_sign else ["scales"]
    return scheduled(rule, learning_rate, descends=True, stages=stages, rate=learning_rate)


@remembered
def trace(decay: Scalar, nesterov: bool = False, accumulator_dtype: torch.dtype | None = None) -> Transform:
    r"""Replace updates by their decayed sum, :math:`m_t = u_t + \beta m_{t-1}`: the momentum of `torch.optim.SGD`.

    Args:
        decay: :math:`\beta`, at least 0 and below 1.
        nesterov: Whether to return :math:`u_t + \beta m_t` instead of :math:`m_t`.
        accumulator_dtype: Dtype of the sum; by default that of the parameter, float32 for 16-bit ones.

    Example:
        >>> tx, params = trace(0.9), {"weight": torch.zeros(1)}
        >>> updates, state = tx.update({"weight": torch.ones(1)}, tx.init(params), params)
        >>> tx.update({"weight": torch.ones(1)}, state, params)
        ({'weight': tensor([1.9000])}, TraceState(trace={'weight': tensor([1.9000])}))

    References:
        Sutskever, Martens, Dahl & Hinton, *On the importance of initialization and momentum in deep learning*, 2013.
    """
    below_one(decay=decay)
    (decay,) = scalars(decay=decay)
    flags(nesterov=nesterov)
    dtypes(accumulator_dtype=accumulator_dtype)

    def init(params: Params) -> TraceState:
        return TraceState(zeros(params, accumulator_dtype))

    def update(updates: Updates, state: TraceState, params: Params) -> tuple[Updates, TraceState]:
        m = compute_wide(lambda m, u, b: u + b * m, state.trace, updates, hyper=(decay,))
        # Cloned, because leaves of updates and state never share memory.
        direction = compute(lambda u, m, b: u + b * m if nesterov else m.clone(), updates, m, hyper=(decay,))
        return direction, TraceState(stored(m, state.trace))

    return Transform(init, update, state=TraceState)


@public_state
class TraceState(NamedTuple):
    """The state of `trace`.

    Example:
        >>> trace(0.9).init({"weight": torch.zeros(1)})
        TraceState(trace={'weight': tensor([0.])})
    """

    trace: Params  # Decayed sum of updates.


@remembered
def ema(decay: Scalar, debias: bool = True, accumulator_dtype: torch.dtype | None = None) -> Transform:
    r"""Replace updates by their moving average, :math:`m_t = \beta m_{t-1} + (1 - \beta) u_t`.

    Args:
        decay: :math:`\beta`, at least 0 and below 1.
        debias: Whether to divide by :math:`1 - \beta^t`.
        accumulator_dtype: Dtype of the average; by default that of the parameter, float32 for 16-bit ones.

    Example:
        >>> tx, params = ema(0.9), {"weight": torch.zeros(1)}
        >>> updates, state = tx.update({"weight": torch.ones(1)}, tx.init(params), params)
        >>> updates
        {'weight': tensor([1.])}
    """
    below_one(decay=decay)
    (decay,) = scalars(decay=decay)
    flags(debias=debias)
    dtypes(accumulator_dtype=accumulator_dtype)

    def init(params: Params) -> EmaState:
        return EmaState(counter(params), zeros(params, accumulator_dtype))

    def update(updates: Updates, state: EmaState, params: Params) -> tuple[Updates, EmaState]:
        steps = increment(state.steps)
        m = average(state.ema, updates, decay)
        missing = bias_correction(decay, steps) if debias else 1.0
        averages = compute(lambda u, m, c: m / c, updates, m, hyper=(missing,))
        return averages, EmaState(steps, stored(m, state.ema))

    return Transform(init, update, state=EmaState)


@public_state
class EmaState(NamedTuple):
    """The state of `ema`.

    Example:
        >>> ema(0.9).init({"weight": torch.zeros(1)})
        EmaState(steps=tensor(0, dtype=torch.int32), ema={'weight': tensor([0.])})
    """

    steps: Tensor  # Number of updates made, int32.
    ema: Params  # Moving average, not corrected.


@remembered
def scale_by_sign() -> Transform:
    r"""Replace updates by their signs, :math:`\operatorname{sign}(u)`.

    Example:
        >>> params = {"weight": torch.zeros(3)}
        >>> scale_by_sign().update({"weight": torch.tensor([-3.0, 0.0, 0.5])}, EmptyState(), params)
        ({'weight': tensor([-1.,  0.,  1.])}, EmptyState())
    """
    return memoryless(lambda updates, params: compute(sign, updates))


@public_state
class LionState(NamedTuple):
    """The state of `scale_by_lion`.

    Example:
        >>> scale_by_lion().init(torch.zeros(1))
        LionState(mu=tensor([0.]))
    """

    mu: Params  # Moving average of updates.


_LION: dict[str, Any] = {
    "hard": lambda x, smooth_beta: sign(x),
    "smooth": lambda x, smooth_beta: (smooth_beta * x).tanh(),
    "refined": lambda x, smooth_beta: torch.where(x.abs() < 1, x, sign(x)),
}


@remembered
def scale_by_lion(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: torch.dtype | None = None,
    *,
    mode: Literal["hard", "smooth", "refined"] = "hard",
    smooth_beta: Scalar = 1.0,
) -> Transform:
    r"""Take the sign of an interpolated momentum, :math:`\operatorname{sign}(\beta_1 m + (1 - \beta_1) u)`.

    Args:
        b1: Share of the momentum in the direction.
        b2: Decay of the momentum :math:`m`.
        mu_dtype: Dtype in which the momentum is kept; by default that of the parameter, float32 for 16-bit ones.
        mode: `"hard"` for the sign, `"smooth"` for a hyperbolic tangent, `"refined"` to leave entries below 1.
        smooth_beta: Slope of the tangent.

    Example:
        >>> tx, params = scale_by_lion(), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([ 1., -1.])}

    References:
        Chen et al., *Symbolic discovery of optimization algorithms*, 2023.
    """
    share(b1=b1)
    below_one(b2=b2)
    positive(smooth_beta=smooth_beta)
    b1, b2, smooth_beta = scalars(b1=b1, b2=b2, smooth_beta=smooth_beta)
    dtypes(mu_dtype=mu_dtype)
    check_choice("mode", mode, _LION)
    if mode != "smooth" and isinstance(smooth_beta, (int, float)) and smooth_beta != 1:
        raise ValueError(f"smooth_beta is {smooth_beta}; it has no effect, because mode is {mode!r} and not 'smooth'")

    def init(params: Params) -> LionState:
        return LionState(zeros(params, mu_dtype))

    def update(updates: Updates, state: LionState, params: Params) -> tuple[Updates, LionState]:
        direction = compute(
            lambda u, m, b, slope: _LION[mode](b * m + (1 - b) * u, slope), updates, state.mu, hyper=(b1, smooth_beta)
        )
        return direction, LionState(stored(average(state.mu, updates, b2), state.mu))

    return Transform(init, update, state=LionState)


@remembered
def scale_by_trust_ratio(min_norm: Scalar = 0.0, trust_coefficient: Scalar = 1.0, eps: Scalar = 0.0) -> Transform:
    r"""Scale the update of each leaf to the size of the leaf, :math:`u' = c \frac{\|w\|}{\|u\| + \epsilon} u`.

    A leaf whose norm, or whose update's norm, is zero keeps its update.

    Args:
        min_norm: Least norm of either.
        trust_coefficient: :math:`c`.
        eps: :math:`\epsilon`.

    Example:
        >>> params = {"weight": torch.tensor([3.0, 4.0])}
        >>> scale_by_trust_ratio().update({"weight": torch.tensor([0.0, 0.5])}, EmptyState(), params)
        ({'weight': tensor([0., 5.])}, EmptyState())

    References:
        You, Gitman & Ginsburg, *Large batch training of convolutional networks*, 2017.
        You et al., *Large batch optimization for deep learning*, 2020.
    """
    finite_nonnegative(min_norm=min_norm, trust_coefficient=trust_coefficient, eps=eps)
    min_norm, trust_coefficient, eps = scalars(min_norm=min_norm, trust_coefficient=trust_coefficient, eps=eps)

    def ratio(u: Tensor, w: Tensor, least: Scalar, coefficient: Scalar, eps: Scalar) -> Tensor:
        sizes = [euclidean(x) for x in (w, u)]
        size, step = (torch.where(n <= least, least + torch.zeros_like(n), n) for n in sizes)
        either = (size == 0) | (step == 0)
        # Ones stand in where the ratio is not used, so that no derivative is NaN.
        size, step = (torch.where(either, 1.0, n) for n in (coefficient * size, step + eps))
        return u / step * size  # The ratio of sizes may be infinite where the result is not.

    def rule(updates: Updates, params: Params) -> Updates:
        return compute(ratio, updates, params, hyper=(min_norm, trust_coefficient, eps))

    return memoryless(rule)
