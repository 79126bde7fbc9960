"""L-BFGS: Newton's steps from the last gradients, with optax's names and numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Params, Schedule, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import (
    compute,
    compute_wide,
    increment,
    reduce_leaves,
    safe_sqrt,
    scalar_device,
    squared,
    total,
    zeros,
)
from funcreg.core.ranges import flags, whole_number
from funcreg.core.tree import tree_leaves, tree_map
from funcreg.transforms.chains import chain
from funcreg.transforms.factory_checks import check_transforms
from funcreg.transforms.linesearch import scale_by_zoom_linesearch
from funcreg.transforms.scaling import scale, scale_by_learning_rate
from funcreg.transforms.searches import real_dot
from funcreg.transforms.transform import Transform, counter, identity, public_state


@public_state
class LbfgsState(NamedTuple):
    """The state of `scale_by_lbfgs`.

    Example:
        >>> scale_by_lbfgs(memory_size=2).init(torch.zeros(1)).weights
        (tensor(0., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """

    steps: Tensor  # Number of updates made, int32.
    params: Params  # Parameters of the last update.
    updates: Params  # What it got.
    params_differences: tuple[Params, ...]  # By how much parameters changed, the last change at the end.
    updates_differences: tuple[Params, ...]  # By how much updates changed.
    weights: tuple[Tensor, ...]  # One over the scalar products of both, 0 where there are none.


def _plus(a: Params, c: Tensor, b: Params) -> Params:
    return compute(lambda x, y, c: x + c * y, a, b, hyper=(c,))


@remembered
def scale_by_lbfgs(memory_size: int = 10, scale_init_precond: bool = True) -> Transform:
    r"""Multiply updates by an inverse Hessian, as the last changes of gradients show it.

    Updates have to be gradients, so it comes first in a chain; `lbfgs` has a line search after it, without which steps
    may go uphill.

    Args:
        memory_size: Number of changes that are kept, each of the size of the parameters, twice.
        scale_init_precond: Whether the Hessian that is improved upon is the curvature of the last step, and the first
            step has length 1 at most; False for the identity.

    Example:
        >>> tx, params = scale_by_lbfgs(), {"w": torch.tensor([3.0])}
        >>> updates, state = tx.update({"w": torch.tensor([6.0])}, tx.init(params), params)
        >>> updates, tx.update({"w": torch.tensor([4.0])}, state, {"w": torch.tensor([2.0])})[0]
        ({'w': tensor([1.])}, {'w': tensor([2.])})

    References:
        Liu & Nocedal, *On the limited memory BFGS method for large scale optimization*, 1989.
    """
    memory_size = whole_number("memory_size", memory_size)
    flags(scale_init_precond=scale_init_precond)

    def init(params: Params) -> LbfgsState:
        memories = [tuple([zeros(params) for _ in range(memory_size)]) for _ in range(2)]
        scalar = {"dtype": torch.float64, "device": scalar_device(params)}
        weights = tuple([torch.zeros((), **scalar) for _ in range(memory_size)])
        return LbfgsState(counter(params), zeros(params), zeros(params), memories[0], memories[1], weights)

    def update(updates: Updates, state: LbfgsState, params: Params) -> tuple[Updates, LbfgsState]:
        if not tree_leaves(updates):
            return updates, state._replace(steps=increment(state.steps))
        begun = state.steps > 0
        change = lambda new, old: compute(
            lambda kept, x, b: torch.where(b, x - kept, torch.zeros_like(kept)).to(kept.dtype), old, new, hyper=(begun,)
        )
        moved, turned = change(params, state.params), change(updates, state.updates)
        along = real_dot(turned, moved, state.weights[0])
        weight = torch.where(along == 0, 0.0, 1 / torch.where(along == 0, 1.0, along))
        keep = lambda new, old: tree_map(lambda x, kept: x.to(kept.dtype, copy=True), new, old)
        new = LbfgsState(
            increment(state.steps),
            keep(params, state.params),
            keep(updates, state.updates),
            (*state.params_differences[1:], moved),
            (*state.updates_differences[1:], turned),
            (*state.weights[1:], weight),
        )
        first = _first_scale(updates, turned, along, begun) if scale_init_precond else torch.ones_like(along)
        product = _inverse_hessian(compute_wide(lambda u: u.clone(), updates), new, first)
        return tree_map(lambda u, x: x.to(u.dtype), updates, product), new

    return Transform(init, update, state=LbfgsState)


def _first_scale(updates: Updates, turned: Params, along: Tensor, begun: Tensor) -> Tensor:
    """The multiple of the identity that an inverse Hessian is built upon."""
    size = total(reduce_leaves(squared, turned)).to(along.device, along.dtype)
    curved = size > 0
    inverse = torch.where(curved, along / torch.where(curved, size, 1.0), 1.0)
    length = safe_sqrt(total(reduce_leaves(squared, updates)).to(along.device, along.dtype))
    return torch.where(begun, inverse, 1 / length.clamp(min=1.0))


def _inverse_hessian(vector: Params, state: LbfgsState, first: Tensor) -> Params:
    """The product of an inverse Hessian and a vector, by two passes over what is kept."""
    rows = list(zip(state.params_differences, state.updates_differences, state.weights, strict=True))
    shares: list[Tensor] = []
    for moved, turned, weight in reversed(rows):
        shares.append(weight * real_dot(moved, vector, weight))
        vector = _plus(vector, -shares[-1], turned)
    vector = compute(lambda v, c: c * v, vector, hyper=(first,))
    for (moved, turned, weight), share in zip(rows, reversed(shares), strict=True):
        vector = _plus(vector, share - weight * real_dot(turned, vector, weight), moved)
    return vector


#: The line search of `lbfgs`: Newton's steps have length 1 where the Hessian is right.
_ZOOM = scale_by_zoom_linesearch(20, initial_guess_strategy="one")


@remembered
def lbfgs(
    learning_rate: Hyper | Schedule | None = None,
    memory_size: int = 10,
    scale_init_precond: bool = True,
    linesearch: Transform | None = _ZOOM,
) -> Transform:
    r"""L-BFGS with a line search, :math:`w' = w - \eta H^{-1} g`: for smooth objectives without noise.

    Each update takes the objective: `tx.update(grads, state, params, value=loss, grad=grads, value_fn=f)`;
    `value_and_grad_from_state(f)` gives loss and gradient from the last search for nothing. For a penalty with a kink
    take `minimize`: with one in :math:`f` no step ends at a zero. `fuse` runs it without a compiler, and says so: the
    objective is a function, which may say something else at every step. `torch.compile` takes a whole training step.

    Args:
        learning_rate: Number, tensor or schedule that steps are multiplied by before the search; None for 1.
        memory_size: Number of changes that are kept, each of the size of the parameters, twice.
        scale_init_precond: Whether the Hessian that is improved upon is the curvature of the last step.
        linesearch: What makes the length of steps, at most 20 trials by default; None for none.

    Example:
        >>> f = lambda params: ((params["w"] - 1) ** 4).sum() + (params["w"] ** 2).sum()
        >>> tx, params = lbfgs(), {"w": torch.tensor([3.0, -2.0], dtype=torch.float64)}
        >>> state, value_and_grad = tx.init(params), value_and_grad_from_state(f)
        >>> for _ in range(12):
        ...     loss, grads = value_and_grad(params, state=state)
        ...     updates, state = tx.update(grads, state, params, value=loss, grad=grads, value_fn=f)
        ...     params = apply_updates(params, updates)
        >>> params
        {'w': tensor([0.4102, 0.4102], dtype=torch.float64)}

    References:
        Liu & Nocedal, *On the limited memory BFGS method for large scale optimization*, 1989.
    """
    if linesearch is not None:
        check_transforms("lbfgs", [linesearch])
    return chain(
        scale_by_lbfgs(memory_size, scale_init_precond),
        scale(-1.0) if learning_rate is None else scale_by_learning_rate(learning_rate),
        identity() if linesearch is None else linesearch,
    )
