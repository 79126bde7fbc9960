"""Schedules: functions from the number of steps taken to a value, under optax's names and numbers.

A schedule takes an int or a 0-dim integer tensor and computes in float64 without branching on it, so that a
compiled step is compiled once. It serves wherever a hyperparameter does: learning rates, strengths, decays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Scalar, Schedule
from funcreg.core.construction import Remembering, remembered
from funcreg.core.notices import warn_user
from funcreg.core.ranges import check_choice, check_range, flags, scalars
from funcreg.core.undocumented import is_batched
from funcreg.core.wording import type_of

#: A step later than that of any training, which int32 counts.
_LATE = 2**31 - 1


def double(count: Any) -> Tensor:
    """A count or a value in float64."""
    return count.to(torch.float64) if isinstance(count, Tensor) else torch.as_tensor(count, dtype=torch.float64)


class KnownSchedule(Remembering):
    """A function of the number of steps taken that prints and pickles as the call that made it.

    Args:
        value: The function.
        turns: Steps, besides 0, at which it may take its least and greatest values: between them it only rises or only
            falls. Where a schedule is given for what has a range, it is checked there.
    """

    def __init__(self, value: Callable[[Any], Scalar], turns: Sequence[float] = ()) -> None:
        self._value = value
        self.turns = tuple([min(math.ceil(count), _LATE) for count in turns if count > 0])

    def __call__(self, count: Any) -> Scalar:
        value = self._value(count)
        if isinstance(value, Tensor) or not isinstance(count, Tensor) or torch.compiler.is_dynamo_compiling():
            return value
        return torch.full_like(count, value, dtype=torch.float64) if is_batched(count) else value  # As `vmap` asks.


def check_finite(low: float = -math.inf, **hyper: Scalar) -> tuple[Any, ...]:
    """Hyperparameters of a schedule, checked: finite numbers or tensors."""
    for name, value in hyper.items():
        check_range(name, value, low, finite=True)
    return scalars(**hyper)


def check_steps(**counts: Any) -> None:
    """Raise an error for the first of these that is no number of steps; negative ones are none, as in optax."""
    for name, value in counts.items():
        _check_number(name, value, "a number of steps")
        check_range(name, value, -math.inf, finite=True)
        if 0 < value < 1:
            raise ValueError(f"{name} is {value}; expected a number of steps. Are arguments in another order?")


def check_shares(**shares: Any) -> None:
    """Raise an error for the first of these that is no number from 0 to 1."""
    for name, value in shares.items():
        _check_number(name, value, "a share, from 0 to 1")
        check_range(name, value, 0.0, 1.0)


def _check_number(name: str, value: Any, expected: str) -> None:
    if isinstance(value, (torch.Tensor, dict, list, tuple)) or callable(value):
        raise TypeError(f"{name} is {value!r}; expected {expected}")


def check_positive(name: str, value: int) -> None:
    """Raise an error for what is no number of steps above 0."""
    check_steps(**{name: value})
    if value <= 0:
        raise ValueError(f"{name} is {value}; expected a positive number of steps")


@remembered
def constant_schedule(value: Scalar) -> Schedule:
    r"""Stay at one value, :math:`v_t = v`.

    Args:
        value: The value :math:`v`.

    Example:
        >>> constant_schedule(0.1)(5)
        0.1
    """
    (value,) = check_finite(value=value)
    return KnownSchedule(lambda count: value)


@remembered
def polynomial_schedule(
    init_value: Scalar, end_value: Scalar, power: Scalar, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    r"""Go from one value to another along a power, :math:`(v_0 - v_T) (1 - t / T)^p + v_T`.

    Args:
        init_value: Value up to step `transition_begin`.
        end_value: Value from step `transition_begin + transition_steps` on.
        power: Exponent; 1 is a straight line.
        transition_steps: Number of steps between the two; with 0 or fewer the value stays at `init_value`,
            with a warning.
        transition_begin: Number of steps before the transition.

    Example:
        >>> polynomial_schedule(1.0, 0.0, 2, transition_steps=10)(5)
        tensor(0.2500, dtype=torch.float64)
    """
    init_value, end_value = check_finite(init_value=init_value, end_value=end_value)
    check_range("power", power, open_low=True, finite=True)
    (power,) = scalars(power=power)
    check_steps(transition_steps=transition_steps, transition_begin=transition_begin)
    if transition_steps > 0:
        return _polynomial(init_value, end_value, power, transition_steps, max(transition_begin, 0))
    are_numbers = isinstance(init_value, (int, float)) and isinstance(end_value, (int, float))
    if init_value is end_value or (are_numbers and init_value == end_value):
        return constant_schedule(init_value)
    return _stays(init_value, transition_steps)


def _stays(init_value: Any, transition_steps: int) -> Schedule:
    """A schedule that never leaves its first value, which is hardly meant."""
    warn_user(
        f"this schedule stays at its first value, {init_value}, for ever, as in optax, because its number of steps is "
        f"{transition_steps}; if that is meant, take constant_schedule"
    )
    return constant_schedule(init_value)


def _polynomial(init_value: Any, end_value: Any, power: Any, transition_steps: int, begin: int) -> Schedule:
    def schedule(count: Any) -> Tensor:
        share = 1 - (double(count) - begin).clamp(0, transition_steps) / transition_steps
        return (init_value - end_value) * share**power + end_value

    return KnownSchedule(schedule, [begin + transition_steps])


@remembered
def linear_schedule(
    init_value: Scalar, end_value: Scalar, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    r"""Go from one value to another on a straight line, :math:`v_0 + (v_T - v_0) t / T`.

    Args:
        init_value: Value up to step `transition_begin`.
        end_value: Value from step `transition_begin + transition_steps` on.
        transition_steps: Number of steps between the two; with 0 or fewer the value stays at `init_value`,
            with a warning.
        transition_begin: Number of steps before the transition.

    Example:
        >>> linear_schedule(1.0, 0.0, transition_steps=10)(3)
        tensor(0.7000, dtype=torch.float64)
    """
    return polynomial_schedule(init_value, end_value, 1, transition_steps, transition_begin)


@remembered
def exponential_decay(
    init_value: Scalar,
    transition_steps: int,
    decay_rate: Scalar,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: Scalar | None = None,
) -> Schedule:
    r"""Multiply by a rate every so many steps, :math:`v_0 r^{t / T}`.

    Args:
        init_value: Value up to step `transition_begin`.
        transition_steps: Number of steps in which the value is multiplied once by `decay_rate`; with 0 or fewer it
            stays at `init_value`, with a warning.
        decay_rate: Factor, at least 0; 0 keeps the value constant.
        transition_begin: Number of steps before the decay.
        staircase: Whether the exponent is rounded down to a whole number.
        end_value: Bound: the least value if `decay_rate` is below 1, else the greatest.

    Example:
        >>> exponential_decay(1.0, transition_steps=10, decay_rate=0.25)(5)
        tensor(0.5000, dtype=torch.float64)
    """
    (init_value,) = check_finite(init_value=init_value)
    (decay_rate,) = check_finite(low=0.0, decay_rate=decay_rate)
    if end_value is not None:
        (end_value,) = check_finite(end_value=end_value)
    check_steps(transition_steps=transition_steps, transition_begin=transition_begin)
    flags(staircase=staircase)
    if transition_steps <= 0:
        return _stays(init_value, transition_steps)
    begin = max(transition_begin, 0)

    def schedule(count: Any) -> Tensor:
        exponent = (double(count) - begin).clamp(min=0) / transition_steps
        rate = torch.as_tensor(decay_rate, dtype=exponent.dtype, device=exponent.device)
        is_constant = rate == 0
        rate = torch.where(is_constant, 1.0, rate)
        value = init_value * rate ** (exponent.floor() if staircase else exponent)
        if end_value is None:
            return value
        bound = torch.as_tensor(end_value, dtype=value.dtype, device=value.device)
        bounded = torch.where(rate < 1, torch.maximum(value, bound), torch.minimum(value, bound))
        return torch.where(is_constant, value, bounded)

    # Without an end the sign stays, and growth is without limit. By the last step any end is reached, but from 0.
    still = end_value is None or isinstance(init_value, Tensor) or init_value == 0
    return KnownSchedule(schedule, [] if still else [_LATE])


def _scales(boundaries_and_scales: Mapping[int, float] | None) -> dict[int, float]:
    """The factors at boundaries, checked."""
    if not isinstance(boundaries_and_scales, (Mapping, type(None))):
        came = type_of(boundaries_and_scales)
        raise TypeError(f"boundaries_and_scales is {came}; expected a dict from step to factor, such as {{100: 0.1}}")
    scales = dict(boundaries_and_scales or {})
    for boundary, scale in scales.items():
        check_steps(**{"a boundary of boundaries_and_scales": boundary})
        check_finite(0.0, **{f"boundaries_and_scales[{boundary}]": scale})
    return scales


@remembered
def piecewise_constant_schedule(
    init_value: Scalar, boundaries_and_scales: Mapping[int, float] | None = None
) -> Schedule:
    r"""Multiply by a factor at each boundary, :math:`v_t = v_0 \prod_{b \le t} s_b`.

    Args:
        init_value: Value before the first boundary.
        boundaries_and_scales: From step to the factor, at least 0, that applies from it on.

    Raises:
        ValueError: A factor is negative.

    Example:
        >>> piecewise_constant_schedule(1.0, {10: 0.5, 20: 0.1})(20)
        tensor(0.0500, dtype=torch.float64)
    """
    (init_value,) = check_finite(init_value=init_value)
    scales = _scales(boundaries_and_scales)

    def schedule(count: Any) -> Tensor:
        value = init_value * torch.ones_like(double(count))
        for boundary, scale in scales.items():
            value = torch.where(double(count) >= boundary, scale * value, value)
        return value

    return KnownSchedule(schedule, list(scales))


def _linear(start: Scalar, end: Scalar, share: Tensor) -> Tensor:
    return (end - start) * share + start


def _cosine(start: Scalar, end: Scalar, share: Tensor) -> Tensor:
    return end + (start - end) / 2 * (torch.cos(math.pi * share) + 1)


#: How values between two are found, from the share of the way.
INTERPOLATIONS: dict[str, Callable[[Scalar, Scalar, Tensor], Tensor]] = {"linear": _linear, "cosine": _cosine}


def interpolation(interpolate_type: str) -> Callable[[Scalar, Scalar, Tensor], Tensor]:
    """The interpolation of a name, or an error that lists the names."""
    check_choice("interpolate_type", interpolate_type, INTERPOLATIONS)
    return INTERPOLATIONS[interpolate_type]


@remembered
def piecewise_interpolate_schedule(
    interpolate_type: str, init_value: Scalar, boundaries_and_scales: Mapping[int, float] | None = None
) -> Schedule:
    r"""Go through values at boundaries, each the one before times a factor, :math:`v_b = v_0 \prod_{c \le b} s_c`.

    Args:
        interpolate_type: Way between two boundaries: `"linear"` or `"cosine"`, half a cosine, level at both ends.
        init_value: Value at step 0.
        boundaries_and_scales: From step to the factor, at least 0, of the value there and that at the boundary before.

    Raises:
        ValueError: A factor is negative, or `interpolate_type` is not known.

    Example:
        >>> schedule = piecewise_interpolate_schedule("linear", 1.0, {4: 0.1, 8: 0.01})
        >>> [round(float(schedule(count)), 4) for count in (0, 2, 4, 6, 8, 100)]
        [1.0, 0.55, 0.1, 0.0505, 0.001, 0.001]
    """
    between = interpolation(interpolate_type)
    (init_value,) = check_finite(init_value=init_value)
    pieces = sorted(_scales(boundaries_and_scales).items())
    bounds, values = [0, *[boundary for boundary, _ in pieces]], [init_value]
    for _, scale in pieces:
        values.append(values[-1] * scale)

    def schedule(count: Any) -> Tensor:
        steps = double(count)
        # Before step 0, where no step is counted, optax has 0.
        value = torch.zeros_like(steps)
        for begin, end, first, last in zip(bounds[:-1], bounds[1:], values[:-1], values[1:], strict=True):
            share = (steps - begin) / max(end - begin, 1)
            value = torch.where((begin <= steps) & (steps < end), between(first, last, share), value)
        return torch.where(steps >= bounds[-1], values[-1], value)

    return KnownSchedule(schedule, bounds)


@remembered
def cosine_decay_schedule(
    init_value: Scalar, decay_steps: int, alpha: Scalar = 0.0, exponent: Scalar = 1.0
) -> Schedule:
    r"""Follow half a cosine down, :math:`v_0 ((1 - \alpha) (\frac{1 + \cos(\pi t / T)}{2})^p + \alpha)`.

    Args:
        init_value: First value.
        decay_steps: Number of steps down; the value stays at the last one afterwards.
        alpha: Last value as a share of the first.
        exponent: Power of the cosine.

    Raises:
        ValueError: `decay_steps` is not positive.

    Example:
        >>> cosine_decay_schedule(1.0, decay_steps=10)(5)
        tensor(0.5000, dtype=torch.float64)

    References:
        Loshchilov & Hutter, *SGDR: Stochastic gradient descent with warm restarts*, 2017.
    """
    init_value, alpha = check_finite(init_value=init_value, alpha=alpha)
    check_range("exponent", exponent, open_low=True, finite=True)
    (exponent,) = scalars(exponent=exponent)
    check_positive("decay_steps", decay_steps)

    def schedule(count: Any) -> Tensor:
        cosine = (1 + torch.cos(math.pi * double(count).clamp(max=decay_steps) / decay_steps)) / 2
        return init_value * ((1 - alpha) * cosine**exponent + alpha)

    return KnownSchedule(schedule, [decay_steps])
