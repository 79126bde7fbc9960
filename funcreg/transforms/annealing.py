"""Schedules for what regularizes: strengths, thresholds, decays and sparsities that rise, come back, or follow a rate.

Like all schedules they take an int or a 0-dim integer tensor and compute in float64 without branching on it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Scalar, Schedule
from funcreg.core.construction import remembered
from funcreg.core.ranges import check_range, concrete, scalars
from funcreg.transforms.schedules import (
    KnownSchedule,
    check_finite,
    check_positive,
    check_shares,
    check_steps,
    double,
    interpolation,
)


@remembered
def cubic_ramp_schedule(
    end_value: Scalar,
    transition_steps: int,
    transition_begin: int = 0,
    init_value: Scalar = 0.0,
    update_every: int = 1,
) -> Schedule:
    r"""Rise fast, then ever more slowly, :math:`v_T + (v_0 - v_T) (1 - t / T)^3`: the ramp of gradual pruning.

    Weights are pruned, or a strength grows, while many are left that can do without; towards the end, where each one
    counts, next to nothing changes.

    Args:
        end_value: :math:`v_T`, the value from step `transition_begin + transition_steps` on, such as a sparsity of 0.9.
        transition_steps: :math:`T`, number of steps of the ramp, above 0.
        transition_begin: Number of steps before it.
        init_value: :math:`v_0`, the value before it.
        update_every: Number of steps, at least 1, for which the value stays before it moves on.

    Example:
        >>> schedule = cubic_ramp_schedule(0.8, transition_steps=100, transition_begin=10)
        >>> [round(float(schedule(count)), 3) for count in (10, 30, 60, 110)]
        [0.0, 0.39, 0.7, 0.8]
        >>> tx = add_penalty(l1, strength=cubic_ramp_schedule(1e-3, 1000))

        A tenth of 640 weights is left after 100 steps:

        >>> kept = lambda count: (640 * (1 - cubic_ramp_schedule(0.9, 100)(count))).round()
        >>> tx = chain(adam(1e-3), project(top_k, kept, mask=matrices))
        >>> [int(kept(count)) for count in (0, 50, 100)]
        [640, 136, 64]

    References:
        Zhu & Gupta, *To prune, or not to prune: exploring the efficacy of pruning for model compression*, 2017.
    """
    end_value, init_value = check_finite(end_value=end_value, init_value=init_value)
    check_positive("transition_steps", transition_steps)
    check_positive("update_every", update_every)
    check_steps(transition_begin=transition_begin)
    begin = max(transition_begin, 0)

    def schedule(count: Any) -> Tensor:
        steps = (double(count) - begin).clamp(0, transition_steps)
        if update_every != 1:  # The last value is reached also where the ramp is no multiple of it.
            steps = torch.where(steps < transition_steps, (steps / update_every).floor() * update_every, steps)
        return (init_value - end_value) * (1 - steps / transition_steps) ** 3 + end_value

    return KnownSchedule(schedule, [begin + transition_steps])


@remembered
def cyclic_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    cycle_steps: int,
    rise: float = 0.5,
    fall: float | None = None,
    interpolate_type: str = "linear",
    decay_rate: Scalar = 1.0,
) -> Schedule:
    r"""Rise from one value to another and fall back, again and again.

    Each cycle rises for a share of its steps, stays, and falls for a share: rise 0.5 and fall 0.5 are triangles
    (`torch.optim.lr_scheduler.CyclicLR`), rise 0.5 and fall 0 a ramp with a plateau, from which it drops (cyclical
    annealing), rise 0 and fall 1 along a cosine are warm restarts.

    Args:
        init_value: Value at the begin of each cycle, unless it begins at the peak.
        peak_value: Value at the peak of the first cycle.
        cycle_steps: Number of steps of a cycle.
        rise: Share of a cycle, from 0 to 1, that rises.
        fall: Share that falls, at the end of a cycle; None for all that does not rise.
        interpolate_type: `"linear"` or `"cosine"`.
        decay_rate: What the height of each peak above `init_value` is of the one before, from 0 to 1; CyclicLR's
            `"triangular2"` is 0.5.

    Example:
        >>> schedule = cyclic_schedule(0.0, 1.0, cycle_steps=10, decay_rate=0.5)
        >>> [round(float(schedule(count)), 2) for count in (0, 3, 5, 10, 15, 18)]
        [0.0, 0.6, 1.0, 0.0, 0.5, 0.2]
        >>> annealed = cyclic_schedule(0.0, 1.0, cycle_steps=10, rise=0.5, fall=0.0)
        >>> [round(float(annealed(count)), 2) for count in (0, 3, 5, 9, 10)]
        [0.0, 0.6, 1.0, 1.0, 0.0]

    References:
        Smith, *Cyclical learning rates for training neural networks*, 2017.
        Fu et al., *Cyclical annealing schedule: a simple approach to mitigating KL vanishing*, 2019.
    """
    between = interpolation(interpolate_type)
    init_value, peak_value = check_finite(init_value=init_value, peak_value=peak_value)
    check_positive("cycle_steps", cycle_steps)
    check_range("decay_rate", decay_rate, 0.0, 1.0)
    (decay_rate,) = scalars(decay_rate=decay_rate)
    check_range("rise", rise, 0.0, 1.0)
    down = 1 - rise if fall is None else fall
    check_shares(rise=rise, fall=down)
    if rise + down > 1 + 1e-9:
        raise ValueError(f"rise is {rise} and fall {down}; expected shares of a cycle that sum to at most 1")

    def schedule(count: Any) -> Tensor:
        steps = double(count).clamp(min=0)
        cycle = (steps / cycle_steps).floor()
        place = (steps - cycle * cycle_steps) / cycle_steps
        height = torch.where(place >= rise, torch.ones_like(place), place / rise if rise else torch.ones_like(place))
        if down:
            height = torch.minimum(height, (1 - place) / down)
        reached = peak_value - init_value
        return init_value + reached * decay_rate**cycle * between(0.0, 1.0, height.clamp(max=1.0))

    turns = [place * cycle_steps for place in (rise, 1 - down)]
    return KnownSchedule(schedule, [*turns, *map(math.floor, turns), cycle_steps - 1])


@remembered
def relative_schedule(value: Scalar, learning_rate: Scalar | Schedule, peak_value: Scalar | None = None) -> Schedule:
    r"""Follow a learning rate, :math:`v_t = v \eta_t / \eta_{\max}`.

    A threshold after the step, or a decay that stands after `scale_by_learning_rate`, acts once a step, whatever the
    rate: it outweighs a rate that falls. One that follows the rate keeps the balance.

    Args:
        value: :math:`v`, the value where the learning rate is at its peak.
        learning_rate: The schedule :math:`\eta_t`, or a number, for which the value is constant.
        peak_value: :math:`\eta_{\max}`, above 0. By default the greatest value of a schedule of this package where
            it turns; a function of your own has to be given one.

    Raises:
        ValueError: A function of unknown shape came without its peak, or the peak is not above 0.

    Example:
        >>> rate = warmup_cosine_decay_schedule(0.0, 0.1, warmup_steps=10, decay_steps=110)
        >>> threshold = relative_schedule(1e-4, rate)
        >>> [float(threshold(count)) for count in (0, 5, 10, 60)]
        [0.0, 5e-05, 0.0001, 5e-05]
        >>> tx = chain(sgd(rate), soft_threshold(threshold))
    """
    (value,) = check_finite(value=value)
    peak = _peak(learning_rate) if peak_value is None else peak_value
    check_range("peak_value", peak, open_low=True, finite=True)
    (peak,) = scalars(peak_value=peak)
    if not callable(learning_rate):
        (learning_rate,) = check_finite(low=0.0, learning_rate=learning_rate)

    def schedule(count: Any) -> Tensor:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        return value * (double(rate) / peak)

    return KnownSchedule(schedule, learning_rate.turns if isinstance(learning_rate, KnownSchedule) else ())


def _peak(learning_rate: Scalar | Schedule) -> Scalar:
    """The greatest value of a schedule whose turns are known."""
    if not callable(learning_rate):
        return learning_rate
    if not isinstance(learning_rate, KnownSchedule):
        raise ValueError(
            f"learning_rate is {learning_rate!r}, whose greatest value is not known; give it as peak_value"
        )
    counts = [torch.tensor(count, dtype=torch.int32, device="cpu") for count in (0, *learning_rate.turns)]
    peak = torch.stack([double(learning_rate(count)) for count in counts]).amax()
    known = concrete(peak)  # As a number, where it is one, it lies on no device.
    return peak if known is None else float(known)
