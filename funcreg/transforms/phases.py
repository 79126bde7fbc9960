"""Schedules of several phases: one cycle, warm-ups and restarts, and schedules that follow one another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Scalar, Schedule
from funcreg.core.construction import remembered
from funcreg.core.ranges import check_range, scalars
from funcreg.transforms.schedules import (
    KnownSchedule,
    check_finite,
    check_positive,
    check_shares,
    check_steps,
    constant_schedule,
    cosine_decay_schedule,
    double,
    exponential_decay,
    linear_schedule,
    piecewise_interpolate_schedule,
)


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
