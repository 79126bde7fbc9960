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

from funcreg._typing import Scalar, Schedule
from funcreg.construction import Remembering, remembered
from funcreg.ranges import check_range, flags, scalars

#: A step later than that of any training, which int32 counts.
_LATE = 2**31 - 1


def _double(count: Any) -> Tensor:
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
        return self._value(count)


def _finite(low: float = -math.inf, **hyper: Scalar) -> tuple[Any, ...]:
    """Hyperparameters of a schedule, checked: finite numbers or tensors."""
    for name, value in hyper.items():
        check_range(name, value, low, finite=True)
    return scalars(**hyper)


def _steps(**counts: Any) -> None:
    """Raise an error for the first of these that is no number of steps; negative ones are none, as in optax."""
    for name, value in counts.items():
        if isinstance(value, (torch.Tensor, dict, list, tuple)) or callable(value):
            raise TypeError(f"{name} is {value!r}; expected a number of steps")
        check_range(name, value, -math.inf, finite=True)


def _positive(name: str, value: int) -> None:
    _steps(**{name: value})
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
    (value,) = _finite(value=value)
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
        transition_steps: Number of steps between the two; with 0 or fewer the value stays at `init_value`.
        transition_begin: Number of steps before the transition.

    Example:
        >>> polynomial_schedule(1.0, 0.0, 2, transition_steps=10)(5)
        tensor(0.2500, dtype=torch.float64)
    """
    init_value, end_value = _finite(init_value=init_value, end_value=end_value)
    check_range("power", power, open_low=True, finite=True)
    (power,) = scalars(power=power)
    _steps(transition_steps=transition_steps, transition_begin=transition_begin)
    if transition_steps <= 0:
        return constant_schedule(init_value)
    begin = max(transition_begin, 0)

    def schedule(count: Any) -> Tensor:
        share = 1 - (_double(count) - begin).clamp(0, transition_steps) / transition_steps
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
        transition_steps: Number of steps between the two; with 0 or fewer the value stays at `init_value`.
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
        transition_steps: Number of steps in which the value is multiplied once by `decay_rate`.
        decay_rate: Factor, at least 0; 0 keeps the value constant.
        transition_begin: Number of steps before the decay.
        staircase: Whether the exponent is rounded down to a whole number.
        end_value: Bound: the least value if `decay_rate` is below 1, else the greatest.

    Example:
        >>> exponential_decay(1.0, transition_steps=10, decay_rate=0.25)(5)
        tensor(0.5000, dtype=torch.float64)
    """
    (init_value,) = _finite(init_value=init_value)
    (decay_rate,) = _finite(low=0.0, decay_rate=decay_rate)
    if end_value is not None:
        (end_value,) = _finite(end_value=end_value)
    _steps(transition_steps=transition_steps, transition_begin=transition_begin)
    flags(staircase=staircase)
    if transition_steps <= 0:
        return constant_schedule(init_value)
    begin = max(transition_begin, 0)

    def schedule(count: Any) -> Tensor:
        exponent = (_double(count) - begin).clamp(min=0) / transition_steps
        rate = torch.as_tensor(decay_rate, dtype=exponent.dtype, device=exponent.device)
        rate = torch.where(rate == 0, 1.0, rate)
        value = init_value * rate ** (exponent.floor() if staircase else exponent)
        if end_value is None:
            return value
        bound = torch.as_tensor(end_value, dtype=value.dtype, device=value.device)
        return torch.where(rate < 1, torch.maximum(value, bound), torch.minimum(value, bound))

    # Without an end the sign stays, and growth is without limit. By the last step any end is reached, but from 0.
    still = end_value is None or isinstance(init_value, Tensor) or init_value == 0
    return KnownSchedule(schedule, [] if still else [_LATE])


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
    (init_value,) = _finite(init_value=init_value)
    if not isinstance(boundaries_and_scales, (Mapping, type(None))):
        came = type(boundaries_and_scales).__name__
        raise TypeError(f"boundaries_and_scales is a {came}; expected a dict from step to factor, such as {{100: 0.1}}")
    scales = dict(boundaries_and_scales or {})
    for boundary, scale in scales.items():
        _steps(**{"a boundary of boundaries_and_scales": boundary})
        _finite(0.0, **{f"boundaries_and_scales[{boundary}]": scale})

    def schedule(count: Any) -> Tensor:
        value = init_value * torch.ones_like(_double(count))
        for boundary, scale in scales.items():
            value = torch.where(_double(count) >= boundary, scale * value, value)
        return value

    return KnownSchedule(schedule, list(scales))


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
    init_value, alpha = _finite(init_value=init_value, alpha=alpha)
    check_range("exponent", exponent, open_low=True, finite=True)
    (exponent,) = scalars(exponent=exponent)
    _positive("decay_steps", decay_steps)

    def schedule(count: Any) -> Tensor:
        cosine = (1 + torch.cos(math.pi * _double(count).clamp(max=decay_steps) / decay_steps)) / 2
        return init_value * ((1 - alpha) * cosine**exponent + alpha)

    return KnownSchedule(schedule, [decay_steps])


@remembered
def warmup_constant_schedule(init_value: Scalar, peak_value: Scalar, warmup_steps: int) -> Schedule:
    r"""Rise on a straight line, then stay.

    Args:
        init_value: First value.
        peak_value: Value from step `warmup_steps` on.
        warmup_steps: Number of steps of the rise.

    Example:
        >>> warmup_constant_schedule(0.0, 1.0, warmup_steps=4)(1)
        tensor(0.2500, dtype=torch.float64)
    """
    return linear_schedule(init_value, peak_value, warmup_steps)


@remembered
def warmup_cosine_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: int,
    decay_steps: int,
    end_value: Scalar = 0.0,
    exponent: Scalar = 1.0,
) -> Schedule:
    r"""Rise on a straight line, then follow half a cosine down.

    Args:
        init_value: First value.
        peak_value: Value at step `warmup_steps`.
        warmup_steps: Number of steps of the rise.
        decay_steps: Number of steps in all, the rise included.
        end_value: Value from step `decay_steps` on.
        exponent: Power of the cosine.

    Raises:
        ValueError: `decay_steps` is not above `warmup_steps`.

    Example:
        >>> schedule = warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=10, decay_steps=30)
        >>> [round(float(schedule(count)), 2) for count in (0, 5, 10, 20, 30)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    _finite(init_value=init_value, peak_value=peak_value, end_value=end_value)
    _steps(warmup_steps=warmup_steps, decay_steps=decay_steps)
    if decay_steps <= warmup_steps:
        raise ValueError(
            f"decay_steps is {decay_steps} and warmup_steps {warmup_steps}; expected more, because decay_steps "
            "counts the warm-up too"
        )
    zero = isinstance(peak_value, (int, float)) and peak_value == 0
    alpha = 0.0 if zero else end_value / peak_value
    decay = cosine_decay_schedule(peak_value, decay_steps - warmup_steps, alpha, exponent)
    return join_schedules([linear_schedule(init_value, peak_value, warmup_steps), decay], [warmup_steps])


@remembered
def join_schedules(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    r"""Follow one schedule after another, each counting from its own first step.

    Args:
        schedules: Schedules in their order.
        boundaries: Steps at which the second, third ... schedule begins, one fewer than schedules.

    Raises:
        ValueError: The numbers of schedules and boundaries do not fit, or the boundaries do not rise.

    Example:
        >>> schedule = join_schedules([constant_schedule(1.0), linear_schedule(0.5, 0.0, 10)], [100])
        >>> float(schedule(99)), float(schedule(105))
        (1.0, 0.25)
    """
    if callable(schedules) or isinstance(schedules, Tensor):
        raise TypeError(f"join_schedules got {schedules!r}; expected a list of schedules")
    for i, each in enumerate(schedules):
        if not callable(each):
            raise TypeError(
                f"schedule {i} of join_schedules is {each!r}; expected a function of the number of steps. "
                "For a number, take constant_schedule."
            )
    if not schedules:
        raise ValueError("join_schedules got no schedules; expected at least one")
    if not isinstance(boundaries, (list, tuple)):
        raise TypeError(f"boundaries is {boundaries!r}; expected a list of steps")
    for i, boundary in enumerate(boundaries):
        _steps(**{f"boundaries[{i}]": boundary})
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(f"{len(schedules)} schedules got {len(boundaries)} boundaries; expected {len(schedules) - 1}")
    if list(boundaries) != sorted(boundaries):
        raise ValueError(f"boundaries are {list(boundaries)}; expected steps that rise")

    def schedule(count: Any) -> Tensor:
        steps = _double(count)
        value = _double(schedules[0](count))
        for boundary, later in zip(boundaries, schedules[1:], strict=True):
            value = torch.where(steps < boundary, value, _double(later(count - boundary)))
        return value

    turns: list[float] = []
    for begin, end, each in zip([0, *boundaries], [*boundaries, math.inf], schedules, strict=True):
        inner = each.turns if isinstance(each, KnownSchedule) else ()
        last = [] if end == math.inf else [end - 1]
        turns += [count for count in [begin, *[begin + turn for turn in inner], *last] if begin <= count < end]
    return KnownSchedule(schedule, turns)
