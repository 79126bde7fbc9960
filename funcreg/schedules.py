"""Schedules: functions from the number of steps taken to a value, under optax's names and numbers.

A schedule takes an int or a 0-dim integer tensor and computes in float64 without branching on it, so that a
compiled step is compiled once. It serves wherever a hyperparameter does: learning rates, strengths, decays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from funcreg._typing import Scalar, Schedule
from funcreg.construction import Remembering, remembered
from funcreg.notices import warn_user
from funcreg.ranges import check_choice, check_range, flags, scalars
from funcreg.undocumented import is_batched
from funcreg.wording import type_of

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
def linear_onecycle_schedule(
    transition_steps: int,
    peak_value: Scalar,
    pct_start: float = 0.3,
    pct_final: float = 0.85,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Schedule:
    r"""Rise to a peak, fall back to the first value, then fall on, on three straight lines.

    The first value is :math:`v / d`, the last one :math:`v / (d d')`. `torch.optim.lr_scheduler.OneCycleLR` with
    `three_phase=True` counts its phases otherwise.

    Args:
        transition_steps: Number of steps in all; the value stays at the last one afterwards.
        peak_value: :math:`v`, the greatest value.
        pct_start: Share of the steps until the peak, at least 0 and below `pct_final`.
        pct_final: Share of the steps until the value is back at the first one.
        div_factor: :math:`d`, above 0: what the peak is divided by for the first value.
        final_div_factor: :math:`d'`, above 0: what the first value is divided by for the last one.

    Raises:
        ValueError: `transition_steps` is not positive, or phases do not end one after another.

    Example:
        >>> schedule = linear_onecycle_schedule(100, 1.0, div_factor=10.0)
        >>> [round(float(schedule(count)), 2) for count in (0, 15, 30, 85, 100)]
        [0.1, 0.55, 1.0, 0.1, 0.0]

    References:
        Smith & Topin, *Super-convergence: very fast training of neural networks using large learning rates*, 2017.
    """
    _onecycle(transition_steps, div_factor, final_div_factor, pct_start=pct_start, pct_final=pct_final)
    (peak_value,) = check_finite(peak_value=peak_value)
    scales = {
        int(pct_start * transition_steps): div_factor,
        int(pct_final * transition_steps): 1 / div_factor,
        transition_steps: 1 / final_div_factor,
    }
    return piecewise_interpolate_schedule("linear", peak_value / div_factor, scales)


@remembered
def cosine_onecycle_schedule(
    transition_steps: int,
    peak_value: Scalar,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Schedule:
    r"""Rise to a peak along half a cosine, then fall along another one.

    The first value is :math:`v / d`, the last one :math:`v / (d d')`. `torch.optim.lr_scheduler.OneCycleLR` is at its
    peak and its end one step earlier.

    Args:
        transition_steps: Number of steps in all; the value stays at the last one afterwards.
        peak_value: :math:`v`, the greatest value.
        pct_start: Share of the steps until the peak, at least 0 and below 1.
        div_factor: :math:`d`, above 0: what the peak is divided by for the first value.
        final_div_factor: :math:`d'`, above 0: what the first value is divided by for the last one.

    Raises:
        ValueError: `transition_steps` is not positive, or the first phase ends with the last one.

    Example:
        >>> schedule = cosine_onecycle_schedule(100, 1.0, div_factor=10.0)
        >>> [round(float(schedule(count)), 2) for count in (0, 15, 30, 65, 100)]
        [0.1, 0.55, 1.0, 0.5, 0.0]

    References:
        Smith & Topin, *Super-convergence: very fast training of neural networks using large learning rates*, 2017.
    """
    _onecycle(transition_steps, div_factor, final_div_factor, pct_start=pct_start)
    (peak_value,) = check_finite(peak_value=peak_value)
    scales = {
        int(pct_start * transition_steps): div_factor,
        int(transition_steps): 1 / (div_factor * final_div_factor),
    }
    return piecewise_interpolate_schedule("cosine", peak_value / div_factor, scales)


def _onecycle(transition_steps: int, div_factor: float, final_div_factor: float, **shares: float) -> None:
    check_positive("transition_steps", transition_steps)
    check_shares(**shares)
    ends = {name: int(value * transition_steps) for name, value in shares.items()}
    for (name, end), (other, later) in pairwise([*ends.items(), ("transition_steps", int(transition_steps))]):
        if end >= later:
            raise ValueError(
                f"{name} is {shares[name]}, step {end} of {transition_steps}, where {other} ends at step {later}; "
                "expected phases that end one after another"
            )
    for name, value in (("div_factor", div_factor), ("final_div_factor", final_div_factor)):
        check_range(name, value, open_low=True, finite=True)
        scalars(**{name: value})


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


@remembered
def warmup_constant_schedule(init_value: Scalar, peak_value: Scalar, warmup_steps: int) -> Schedule:
    r"""Rise on a straight line, then stay.

    Args:
        init_value: First value.
        peak_value: Value from step `warmup_steps` on.
        warmup_steps: Number of steps of the rise; with 0 or fewer the value stays at `init_value`, with a warning.

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
    check_finite(init_value=init_value, peak_value=peak_value, end_value=end_value)
    check_steps(warmup_steps=warmup_steps, decay_steps=decay_steps)
    if decay_steps <= warmup_steps:
        raise ValueError(
            f"decay_steps is {decay_steps} and warmup_steps {warmup_steps}; expected more, because decay_steps "
            "counts the warm-up too"
        )
    zero = isinstance(peak_value, (int, float)) and peak_value == 0
    alpha = 0.0 if zero else end_value / peak_value
    decay = cosine_decay_schedule(peak_value, decay_steps - warmup_steps, alpha, exponent)
    return join_schedules([_warm_up(init_value, peak_value, warmup_steps), decay], [warmup_steps])


def _warm_up(init_value: Scalar, peak_value: Scalar, warmup_steps: int) -> Schedule:
    """A rise before another schedule begins, which may take no step."""
    return linear_schedule(init_value, peak_value, warmup_steps) if warmup_steps > 0 else constant_schedule(init_value)


@remembered
def join_schedules(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    r"""Follow one schedule after another, each counting from its own first step.

    Args:
        schedules: Schedules in their order.
        boundaries: Steps at which the second, third ... schedule begins, one fewer than schedules.

    Raises:
        ValueError: The numbers of schedules and boundaries do not fit, or a boundary is less than the one before.

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
        check_steps(**{f"boundaries[{i}]": boundary})
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(f"{len(schedules)} schedules got {len(boundaries)} boundaries; expected {len(schedules) - 1}")
    if list(boundaries) != sorted(boundaries):
        raise ValueError(f"boundaries are {list(boundaries)}; expected steps that do not fall")

    def schedule(count: Any) -> Tensor:
        steps = double(count)
        value = double(schedules[0](count))
        for boundary, later in zip(boundaries, schedules[1:], strict=True):
            value = torch.where(steps < boundary, value, double(later(count - boundary)))
        return value

    turns: list[float] = []
    for begin, end, each in zip([0, *boundaries], [*boundaries, math.inf], schedules, strict=True):
        inner = each.turns if isinstance(each, KnownSchedule) else ()
        last = [] if end == math.inf else [end - 1]
        turns += [count for count in [begin, *[begin + turn for turn in inner], *last] if begin <= count < end]
    return KnownSchedule(schedule, turns)


@remembered
def warmup_exponential_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: int,
    transition_steps: int,
    decay_rate: Scalar,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: Scalar | None = None,
) -> Schedule:
    r"""Rise on a straight line, then multiply by a rate every so many steps.

    Args:
        init_value: First value.
        peak_value: Value at step `warmup_steps`.
        warmup_steps: Number of steps of the rise.
        transition_steps: Number of steps in which the value is multiplied once by `decay_rate`.
        decay_rate: Factor, at least 0; 0 keeps the value constant.
        transition_begin: Number of steps between the rise and the decay.
        staircase: Whether the exponent of the rate is rounded down to a whole number.
        end_value: Bound: the least value if `decay_rate` is below 1, else the greatest.

    Example:
        >>> schedule = warmup_exponential_decay_schedule(0.0, 1.0, 10, transition_steps=20, decay_rate=0.25)
        >>> [round(float(schedule(count)), 2) for count in (0, 5, 10, 20, 30)]
        [0.0, 0.5, 1.0, 0.5, 0.25]
    """
    rise = _warm_up(init_value, peak_value, warmup_steps)
    decay = exponential_decay(peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value)
    return join_schedules([rise, decay], [warmup_steps])


#: What a cycle of `sgdr_schedule` is made of; the first four have no default.
_CYCLE = ("init_value", "peak_value", "warmup_steps", "decay_steps", "end_value", "exponent")


@remembered
def sgdr_schedule(cosine_kwargs: Iterable[Mapping[str, Any]]) -> Schedule:
    r"""Follow one warm-up and half cosine after another: warm restarts.

    `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts` is this without warm-up, in cycles that grow by a factor.

    Args:
        cosine_kwargs: For each cycle the arguments of `warmup_cosine_decay_schedule`; `decay_steps` is its length.

    Example:
        >>> cycle = {"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 0, "decay_steps": 10}
        >>> schedule = sgdr_schedule([cycle, {**cycle, "peak_value": 0.5, "decay_steps": 20}])
        >>> [round(float(schedule(count)), 2) for count in (0, 5, 10, 20, 30)]
        [1.0, 0.5, 0.5, 0.25, 0.0]

    References:
        Loshchilov & Hutter, *SGDR: Stochastic gradient descent with warm restarts*, 2017.
    """
    if isinstance(cosine_kwargs, (Mapping, str)) or not hasattr(cosine_kwargs, "__iter__"):
        raise TypeError(f"cosine_kwargs is {cosine_kwargs!r}; expected a list of dicts, one for each cycle")
    cycles, ends = list(cosine_kwargs), [0]
    if not cycles:
        raise ValueError("cosine_kwargs is empty; expected the arguments of at least one cycle")
    for i, cycle in enumerate(cycles):
        if not isinstance(cycle, Mapping):
            raise TypeError(f"cosine_kwargs[{i}] is {cycle!r}; expected a dict of arguments")
        unknown = [name for name in cycle if name not in _CYCLE]
        lacking = [name for name in _CYCLE[:4] if name not in cycle]
        if unknown or lacking:
            came = f"has {unknown[0]!r}" if unknown else f"lacks {lacking[0]!r}"
            raise TypeError(f"cosine_kwargs[{i}] {came}; expected the arguments of warmup_cosine_decay_schedule")
        ends.append(ends[-1] + cycle["decay_steps"])
    schedules = [warmup_cosine_decay_schedule(**cycle) for cycle in cycles]
    return join_schedules(schedules, ends[1:-1])
