"""Transforms that scale: learning rates, momentum and preconditioners, with optax's names and numbers.

Moments of 16-bit parameters are kept in float32; pass a dtype to keep them smaller. A second moment of sixteen bits is
rounded up or down at random, because rounded to the nearest it would stop moving. Bias corrections are float64 scalars:
in float32, `1 - b**t` loses six digits.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from funcreg._typing import Hyper, Params, Scalar, Schedule, Updates
from funcreg.construction import remembered
from funcreg.leafwise import compute, compute_wide, euclidean, increment, safe_sqrt, sign, squared, wide, widen, zeros
from funcreg.ranges import check_choice, concrete, flags, scalars, single
from funcreg.rounding import is_narrow, rounded, words
from funcreg.transform import (
    Stage,
    Transform,
    below_one,
    counter,
    dtypes,
    finite,
    finite_nonnegative,
    memoryless,
    positive,
    public_state,
    scheduled,
    share,
)
from funcreg.tree import flatten, tree_leaves, tree_map


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
    return scheduled(_scale, step_size_fn, stages=["scales"], rate=step_size_fn)


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


# Moments


def average(moments: Params, values: Params, decay: Scalar) -> Params:
    """Exponential moving average, in working precision."""
    return compute_wide(lambda m, x, b: b * m + (1 - b) * x, moments, values, hyper=(decay,))


def average_square(moments: Params, values: Params, decay: Scalar) -> Params:
    """Exponential moving average of squared magnitudes, in working precision."""
    return compute_wide(lambda m, x, b: b * m + (1 - b) * squared(x), moments, values, hyper=(decay,))


def stored(moments: Params, like: Params) -> Params:
    """Moments in the dtype in which the state keeps them."""
    return tree_map(lambda m, kept: m.to(kept.dtype), moments, like)


#: The key of the bits with which second moments are rounded.
_KEY = 0x243F6A8885A308D3


def _stored_square(moments: Params, like: Params, steps: Tensor) -> Params:
    """Second moments in the dtype in which the state keeps them: those of sixteen bits right on average."""
    if not any([is_narrow(kept.dtype) for kept in tree_leaves(like)]):
        return stored(moments, like)
    leaves, rebuild = flatten(moments)
    bits = words(torch.full_like(steps, _KEY, dtype=torch.int64), steps, moments)
    rows = zip(leaves, tree_leaves(like), bits, strict=True)
    return rebuild([(rounded(v, b, v0.dtype) if is_narrow(v0.dtype) else v).to(v0.dtype) for v, v0, b in rows])


def real_zeros(params: Params, value: Scalar = 0.0, dtype: torch.dtype | None = None) -> Params:
    """Accumulators of squared magnitudes, which are real."""

    def made(w: Tensor) -> Tensor:
        kept = dtype or wide(w.real.dtype)
        # In its dtype also where the leaf has no dimensions, and so no say beside a tensor of a wider one.
        return (torch.zeros_like(w.real, dtype=kept) + value).to(kept)

    return tree_map(made, params)


def bias_correction(decay: Scalar, steps: Tensor) -> Tensor:
    r"""What a moving average that began at zero lacks, :math:`1 - \beta^t`, in float64."""
    return 1 - decay ** steps.to(torch.float64)


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


# Preconditioners


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
    _check_real(nu_dtype)
    b1, b2, eps, eps_root = scalars(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    return b1, b2, eps, eps_root


def _check_real(nu_dtype: torch.dtype | None) -> None:
    """Raise a TypeError for what is no dtype of real numbers, which squared magnitudes are."""
    dtypes(nu_dtype=nu_dtype)
    if nu_dtype is not None and nu_dtype.is_complex:
        raise TypeError(f"nu_dtype is {nu_dtype}; expected a dtype of real numbers, which squared magnitudes are")


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
        mu, nu = average(state.mu, updates, b1), _stored_square(average_square(state.nu, updates, b2), state.nu, steps)
        new = AdamState(steps, stored(mu, state.mu), nu)
        mean = corrected_mean(mu, updates, b1, steps, nesterov)
        return compute(lambda u, m, h: m / h, updates, mean, metric(new)), new

    def metric(state: AdamState) -> Params:
        return adam_metric(state.nu, bias_correction(b2, state.steps), eps, eps_root)

    return Transform(init, update, metric, state=AdamState)


def corrected_mean(mu: Params, updates: Updates, b1: Scalar, steps: Tensor, nesterov: bool) -> Params:
    """A moving average without the weight of the zero that it began with, one step ahead if `nesterov`."""
    if not nesterov:
        return compute(lambda m, c: m * c, mu, hyper=(1 / bias_correction(b1, steps),))
    ahead, here = bias_correction(b1, increment(steps)), bias_correction(b1, steps)
    return compute(lambda m, u, b, c, d: b * m / c + (1 - b) * u / d, mu, updates, hyper=(b1, ahead, here))


def adam_metric(nu: Params, missing: Scalar, eps: Scalar, eps_root: Scalar) -> Params:
    """What Adam divides by, the root of a mean square that lacks a share at its beginning."""
    nu = tree_map(widen, nu)
    factor = 1 / missing  # Entries are multiplied, which takes a fraction of the time of a division.
    if isinstance(eps_root, (int, float)) and eps_root == 0:  # By default: nothing to add, in no pass.
        return compute(lambda v, c, e: safe_sqrt(v * c) + e, nu, hyper=(factor, eps))
    return compute(lambda v, c, e, r: safe_sqrt(v * c + r) + e, nu, hyper=(factor, eps, eps_root))


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
        mu, nu = average(state.mu, updates, b1), _stored_square(average_square(state.nu, updates, b2), state.nu, steps)
        missing = bias_correction(b2, steps) if bias_correction_nu else 1.0
        nu_max = compute(lambda top, v, c: torch.maximum(top, v / c), state.nu_max, nu, hyper=(missing,))
        new = AmsgradState(steps, stored(mu, state.mu), nu, nu_max)
        missing = bias_correction(b1, steps) if bias_correction_mu else 1.0
        return compute(lambda u, m, h, c: m / c / h, updates, mu, metric(new), hyper=(missing,)), new

    def metric(state: AmsgradState) -> Params:
        return adam_metric(state.nu_max, 1.0, eps, eps_root)

    return Transform(init, update, metric, state=AmsgradState)


@public_state
class RmsState(NamedTuple):
    """The state of `scale_by_rms`.

    Example:
        >>> scale_by_rms().init(torch.zeros(1))
        RmsState(steps=tensor(0, dtype=torch.int32), nu=tensor([0.]))
    """

    steps: Tensor  # Number of updates made, int32.
    nu: Params  # Moving average of the squares of updates.


def _root(eps_in_sqrt: bool) -> Any:
    return lambda v, e: safe_sqrt(v + e) if eps_in_sqrt else safe_sqrt(v) + e


def _checked_rms(
    decay: Scalar, eps: Scalar, initial_scale: Scalar, nu_dtype: torch.dtype | None
) -> tuple[Scalar, Scalar, Scalar]:
    """The hyperparameters of RMSprop, checked."""
    below_one(decay=decay)
    finite_nonnegative(eps=eps, initial_scale=initial_scale)
    _check_real(nu_dtype)
    decay, eps, initial_scale = scalars(decay=decay, eps=eps, initial_scale=initial_scale)
    single(initial_scale=initial_scale)
    return decay, eps, initial_scale


@remembered
def scale_by_rms(
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    nu_dtype: torch.dtype | None = None,
) -> Transform:
    r"""Divide updates by the root of their mean square, :math:`u / \sqrt{v + \epsilon}`.

    Args:
        decay: Decay of the mean square :math:`v`.
        eps: :math:`\epsilon`.
        initial_scale: First mean square.
        eps_in_sqrt: Whether :math:`\epsilon` stands below the root; `torch.optim.RMSprop` adds it to the root.
        bias_correction: Whether the mean square is corrected for its first value.
        nu_dtype: Dtype in which the mean square is kept, as in `scale_by_adam`.

    Example:
        >>> tx, params = scale_by_rms(decay=0.75), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([ 2.0000, -2.0000])}

    References:
        Tieleman & Hinton, *Lecture 6.5: rmsprop*, 2012.
    """
    decay, eps, initial_scale = _checked_rms(decay, eps, initial_scale, nu_dtype)
    flags(eps_in_sqrt=eps_in_sqrt, bias_correction=bias_correction)
    corrected = bias_correction

    def init(params: Params) -> RmsState:
        return RmsState(counter(params), real_zeros(params, initial_scale, nu_dtype))

    def update(updates: Updates, state: RmsState, params: Params) -> tuple[Updates, RmsState]:
        steps = increment(state.steps)
        new = RmsState(steps, _stored_square(average_square(state.nu, updates, decay), state.nu, steps))
        return compute(lambda u, h: u / h, updates, metric(new)), new

    def metric(state: RmsState) -> Params:
        root = _root(eps_in_sqrt)
        missing = _missing(decay, state.steps, corrected)
        return compute(lambda v, c, e: root(v / c, e), tree_map(widen, state.nu), hyper=(missing, eps))

    return Transform(init, update, metric, state=RmsState)


def _missing(decay: Scalar, steps: Tensor, corrected: bool) -> Scalar:
    return bias_correction(decay, steps) if corrected else 1.0


@public_state
class StddevState(NamedTuple):
    """The state of `scale_by_stddev`.

    Example:
        >>> scale_by_stddev().init(torch.zeros(1)).mu
        tensor([0.])
    """

    steps: Tensor  # Number of updates made, int32.
    mu: Params  # Moving average of updates.
    nu: Params  # Moving average of their squares.


@remembered
def scale_by_stddev(
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    nu_dtype: torch.dtype | None = None,
) -> Transform:
    r"""Divide updates by their standard deviation, :math:`u / \sqrt{v - m^2 + \epsilon}`: centred RMSprop.

    Args:
        decay: Decay of the mean :math:`m` and of the mean square :math:`v`.
        eps: :math:`\epsilon`.
        initial_scale: First mean square.
        eps_in_sqrt: Whether :math:`\epsilon` stands below the root; `torch.optim.RMSprop` adds it to the root.
        bias_correction: Whether both means are corrected for their first value.
        nu_dtype: Dtype in which the mean square is kept, as in `scale_by_adam`.

    Example:
        >>> tx, params = scale_by_stddev(decay=0.5), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([ 2.0000, -2.0000])}

    References:
        Graves, *Generating sequences with recurrent neural networks*, 2013.
    """
    decay, eps, initial_scale = _checked_rms(decay, eps, initial_scale, nu_dtype)
    flags(eps_in_sqrt=eps_in_sqrt, bias_correction=bias_correction)
    corrected = bias_correction

    def init(params: Params) -> StddevState:
        return StddevState(counter(params), zeros(params), real_zeros(params, initial_scale, nu_dtype))

    def update(updates: Updates, state: StddevState, params: Params) -> tuple[Updates, StddevState]:
        steps = increment(state.steps)
        mu, nu = average(state.mu, updates, decay), average_square(state.nu, updates, decay)
        new = StddevState(steps, stored(mu, state.mu), _stored_square(nu, state.nu, steps))
        return compute(lambda u, h: u / h, updates, metric(new)), new

    def metric(state: StddevState) -> Params:
        root = _root(eps_in_sqrt)
        missing = _missing(decay, state.steps, corrected)
        nu = tree_map(widen, state.nu)
        # Where updates hardly change, rounding leaves less than 0.
        spread = lambda v, m: (v - squared(m)).clamp(min=0.0)
        return compute(lambda v, m, c, e: root(spread(v / c, m / c), e), nu, state.mu, hyper=(missing, eps))

    return Transform(init, update, metric, state=StddevState)


@public_state
class RssState(NamedTuple):
    """The state of `scale_by_rss`.

    Example:
        >>> scale_by_rss(0.1).init(torch.zeros(1))
        RssState(sum_of_squares=tensor([0.1000]))
    """

    sum_of_squares: Params  # Of all updates so far.


@remembered
def scale_by_rss(initial_accumulator_value: Scalar = 0.1, eps: Scalar = 1e-7) -> Transform:
    r"""Divide updates by the root of the sum of all squares so far, :math:`u / \sqrt{\sum_s u_s^2 + \epsilon}`.

    Args:
        initial_accumulator_value: First sum.
        eps: :math:`\epsilon`, below the root.

    Example:
        >>> tx, params = scale_by_rss(initial_accumulator_value=0.0), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0, 0.0])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([1., 0.])}

    References:
        Duchi, Hazan & Singer, *Adaptive subgradient methods for online learning and stochastic optimization*, 2011.
    """
    finite_nonnegative(initial_accumulator_value=initial_accumulator_value, eps=eps)
    initial_accumulator_value, eps = scalars(initial_accumulator_value=initial_accumulator_value, eps=eps)
    single(initial_accumulator_value=initial_accumulator_value)

    def init(params: Params) -> RssState:
        return RssState(real_zeros(params, initial_accumulator_value))

    def update(updates: Updates, state: RssState, params: Params) -> tuple[Updates, RssState]:
        new = RssState(compute(lambda v, u: v + squared(u), state.sum_of_squares, updates))
        return compute(lambda u, h: u / torch.where(h == 0, 1.0, h), updates, metric(new)), new

    def metric(state: RssState) -> Params:
        return compute(lambda v, e: safe_sqrt(v + e), state.sum_of_squares, hyper=(eps,))

    return Transform(init, update, metric, state=RssState)


# Signs and ratios


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
