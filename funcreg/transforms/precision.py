"""Small steps on sixteen-bit parameters: copies in float32, or rounding that is right on average.

A decay of 1e-5 is less than half a step of a number of bfloat16, and a sum that is rounded to the nearest stays where
it was, however often it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Params, State, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute_wide, increment, widen
from funcreg.core.masks import keep, merge
from funcreg.core.rounding import check_key, first_key, is_narrow, rounded, words
from funcreg.core.tree import flatten, tree_leaves, tree_map
from funcreg.transforms.factory_checks import check_transforms
from funcreg.transforms.transform import Stage, Transform, around, counter, public_state


def _narrow(params: Params) -> list[bool]:
    """Which leaves have sixteen bits."""
    return [is_narrow(w.dtype) for w in tree_leaves(params)]


def _rounding(inner: Transform, init: Any, update: Any, state: type) -> Transform:
    """A transform that tells of itself what the one inside does; what comes after it would change where it landed."""
    metric = inner.metric
    stages: list[Stage] = ["rounds", "lands"] if {"steps", "flips"}.intersection(inner.stages) else ["rounds"]
    read = None if metric is None else lambda state: metric(state.inner_state)
    return around(inner, init, update, state, metric=read, stages=stages)


@public_state
class MasterWeightsState(NamedTuple):
    """The state of `with_master_weights`: copies of leaves of sixteen bits, and nothing for others.

    Example:
        >>> with_master_weights(identity()).init({"w": torch.ones(1, dtype=torch.bfloat16), "b": torch.ones(1)})
        MasterWeightsState(master={'w': tensor([1.]), 'b': ABSENT}, inner_state=EmptyState())
    """

    master: Params  # In float32.
    inner_state: State


@remembered
def with_master_weights(inner: Transform) -> Transform:
    r"""Train sixteen-bit parameters through copies in float32, of which they are the rounding.

    The inner transform sees the copies as its parameters, and gradients in float32: its moments, its decay, its
    proximal operator are those of a model in float32, and zeros are exact in both. Leaves of other dtypes are their own
    copies. Updates of sixteen-bit leaves are float32, so that `apply_updates` rounds once. It goes outermost: what
    something else changes, as a decay after it does, goes back to the copies at the next step. Begin with a new state
    where parameters were changed and are meant to stay so.

    Args:
        inner: A whole optimizer, such as `adamw(1e-3)`.

    Example:
        A decay that bfloat16 would lose in each step, over a thousand of them:

        >>> tx, params = with_master_weights(adamw(1e-3, weight_decay=0.1)), torch.ones(1, dtype=torch.bfloat16)
        >>> grads, state = torch.zeros_like(params), tx.init(params)
        >>> for _ in range(1000):
        ...     updates, state = tx.update(grads, state, params)
        ...     params = apply_updates(params, updates)
        >>> params, state.master
        (tensor([0.9062], dtype=torch.bfloat16), tensor([0.9048]))

    References:
        Micikevicius et al., *Mixed precision training*, 2018.
    """
    check_transforms("with_master_weights", [inner])

    def init(params: Params) -> MasterWeightsState:
        master = keep(tree_map(widen, params), _narrow(params))
        return MasterWeightsState(tree_map(torch.clone, master), inner.begin(tree_map(widen, params)))

    def update(
        updates: Updates, state: MasterWeightsState, params: Params, **extra: Any
    ) -> tuple[Updates, MasterWeightsState]:
        narrow = _narrow(params)
        whole = merge(params, state.master, narrow)
        wide = tree_map(widen, updates)
        new, after = inner.update(wide, state.inner_state, whole, **inner.accepted(extra))
        here = keep(params, narrow)
        moves = compute_wide(lambda w, m, u: m + u - w, here, state.master, keep(new, narrow))
        # As apply_updates adds, so that parameters are the rounding of their copies, whatever was lost in a large move.
        master = compute_wide(lambda w, d: w + d, here, moves)
        return merge(new, moves, narrow), MasterWeightsState(master, after)

    return _rounding(inner, init, update, MasterWeightsState)


@public_state
class StochasticRoundingState(NamedTuple):
    """The state of `with_stochastic_rounding`.

    Example:
        >>> with_stochastic_rounding(identity(), key=7).init(torch.zeros(1)).steps
        tensor(0, dtype=torch.int32)
    """

    steps: Tensor  # Number of updates made, int32.
    key: Tensor  # What the bits of all steps are made from, int64.
    inner_state: State


@remembered
def with_stochastic_rounding(inner: Transform, key: int | Tensor | torch.Generator) -> Transform:
    r"""Round sixteen-bit parameters after a step up or down at random, so that their mean is the exact sum.

    A step of a tenth of the distance between two neighbours moves a parameter to the next in one of ten cases: small
    decays and thresholds act as they should on average, without memory for copies. What lands at zero is exactly zero,
    and a parameter that is not moved stays. Leaves of other dtypes are left alone. It goes outermost, as
    `with_master_weights` does, and gives updates of float32.

    The bits are a function of key, step and place, as those of `add_noise`: a run that goes on from a saved state draws
    what it would have drawn, and members of an ensemble draw bits of their own.

    Args:
        inner: A whole optimizer, such as `adamw(1e-3)`, which sees parameters and gradients in float32.
        key: Where the bits come from: an int, a 0-dim tensor of an integer, or a generator, from which `init` draws.

    Example:
        >>> tx = with_stochastic_rounding(adamw(1e-3, weight_decay=0.1), key=0)
        >>> params = torch.ones(10_000, dtype=torch.bfloat16)
        >>> grads, state = torch.zeros_like(params), tx.init(params)
        >>> for _ in range(100):
        ...     updates, state = tx.update(grads, state, params)
        ...     params = apply_updates(params, updates)
        >>> round(float(params.float().mean()), 3), round(0.9999**100, 3)
        (0.99, 0.99)

    References:
        Gupta, Agrawal, Gopalakrishnan & Narayanan, *Deep learning with limited numerical precision*, 2015.
        Zamirai et al., *Revisiting BFloat16 training*, 2020.
    """
    check_transforms("with_stochastic_rounding", [inner])
    check_key(key)

    def init(params: Params) -> StochasticRoundingState:
        whole = tree_map(widen, params)
        return StochasticRoundingState(counter(params), first_key(key, params), inner.begin(whole))

    def update(
        updates: Updates, state: StochasticRoundingState, params: Params, **extra: Any
    ) -> tuple[Updates, StochasticRoundingState]:
        steps, whole = increment(state.steps), tree_map(widen, params)
        new, after = inner.update(tree_map(widen, updates), state.inner_state, whole, **inner.accepted(extra))
        leaves, rebuild = flatten(params)
        rows = zip(leaves, tree_leaves(new), words(state.key, steps, params), strict=True)
        moves = [compute_wide(_rounded_move(w.dtype), w, u, bits) if is_narrow(w.dtype) else u for w, u, bits in rows]
        return rebuild(moves), StochasticRoundingState(steps, state.key, after)

    return _rounding(inner, init, update, StochasticRoundingState)


def _rounded_move(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A rule from a parameter in float32, an update and random bits to the move to where it is rounded to."""
    return lambda w, u, bits: rounded(w + u, bits, dtype) - w
