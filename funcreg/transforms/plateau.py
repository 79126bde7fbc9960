"""Steps that grow smaller where a value stops improving, with optax's names and numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Params, Scalar, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute, scalar_device
from funcreg.core.ranges import check_range, scalars, whole_number
from funcreg.core.sharding import whole
from funcreg.transforms.factory_checks import finite_nonnegative, share
from funcreg.transforms.transform import Transform, counter, public_state


@public_state
class ReduceLROnPlateauState(NamedTuple):
    """The state of `reduce_on_plateau`. Its numbers are float64: what is an improvement depends on small differences.

    Example:
        >>> reduce_on_plateau().init(torch.zeros(1)).scale
        tensor(1., dtype=torch.float64)
    """

    scale: Tensor  # What updates are multiplied by.
    best_value: Tensor  # Least mean of values so far.
    plateau_count: Tensor  # Means since then, int32.
    cooldown_count: Tensor  # Means to come that are not counted, int32.
    values: Tensor  # Values in the mean that is not complete, int32.
    avg_value: Tensor  # Mean of these.


@remembered
def reduce_on_plateau(
    factor: Scalar = 0.1,
    patience: int = 10,
    rtol: Scalar = 1e-4,
    atol: Scalar = 0.0,
    cooldown: int = 0,
    accumulation_size: int = 1,
    min_scale: Scalar = 0.0,
) -> Transform:
    r"""Multiply updates by a number that shrinks whenever a value has stopped improving.

    The value, a loss as a rule, comes with each update: `tx.update(grads, state, params, value=loss)`. It improves if
    it is below :math:`\text{best} - \text{rtol} \, |\text{best}| - \text{atol}`. Nothing is read from it: a step on a
    GPU, in an ensemble or compiled goes on without waiting, and each member has a plateau of its own.
    `torch.optim.lr_scheduler.ReduceLROnPlateau` waits for one value more than `patience`.

    Where it stands is in the state: `tree_get(state, "scale")`, which times the learning rate is the one in effect. In
    an `Optimizer` each parameter has it, `optimizer.state[parameter]["1.scale"]` if this is the second link.

    Args:
        factor: What the number is multiplied by, above 0 and below 1.
        patience: Number of values in a row without improvement after which it is.
        rtol: Least improvement, as a share of the best value, from 0 to 1.
        atol: Least improvement; not 0 if `rtol` is.
        cooldown: Number of values after a reduction that are not counted.
        accumulation_size: Number of values that are averaged to one; more than 1 for losses of mini-batches.
        min_scale: Least number that updates are multiplied by, from 0 to 1.

    Raises:
        TypeError: An update came without `value`.

    Example:
        >>> tx, params = chain(sgd(1.0), reduce_on_plateau(factor=0.5, patience=2)), {"weight": torch.zeros(1)}
        >>> state, scales = tx.init(params), []
        >>> for loss in (3.0, 2.0, 2.0, 2.0, 1.0):
        ...     updates, state = tx.update({"weight": torch.ones(1)}, state, params, value=loss)
        ...     scales.append(-float(updates["weight"]))
        >>> scales
        [1.0, 1.0, 1.0, 0.5, 0.5]
        >>> tree_get(state, "scale")
        tensor(0.5000, dtype=torch.float64)
    """
    check_range("factor", factor, 0.0, 1.0, open_low=True, open_high=True)
    share(rtol=rtol, min_scale=min_scale)
    finite_nonnegative(atol=atol)
    factor, rtol, atol, min_scale = scalars(factor=factor, rtol=rtol, atol=atol, min_scale=min_scale)
    if isinstance(rtol, (int, float)) and isinstance(atol, (int, float)) and rtol == atol == 0:
        raise ValueError("rtol and atol are both 0; expected one above 0, or any rounding error is an improvement")
    patience, cooldown = whole_number("patience", patience), whole_number("cooldown", cooldown, 0)
    accumulation_size = whole_number("accumulation_size", accumulation_size)

    def init(params: Params) -> ReduceLROnPlateauState:
        number = lambda x: torch.full((), x, dtype=torch.float64, device=scalar_device(params))
        one, best, mean = number(1.0), number(torch.inf), number(0.0)
        return ReduceLROnPlateauState(one, best, counter(params), counter(params), counter(params), mean)

    def update(
        updates: Updates, state: ReduceLROnPlateauState, params: Params, *, value: Any = None
    ) -> tuple[Updates, ReduceLROnPlateauState]:
        seen = state.values + 1
        value = as_value("reduce_on_plateau", value, state.scale).detach()
        mean = (state.values * state.avg_value + value) / seen
        complete = seen == accumulation_size
        better = mean < (1 - rtol * state.best_value.sign()) * state.best_value - atol
        count = torch.where(better, 0, state.plateau_count + 1)
        cooling = state.cooldown_count > 0
        reduce = (count == patience) & ~cooling
        least = min_scale + torch.zeros_like(state.scale)
        reduced = torch.where(reduce, torch.maximum(state.scale * factor, least), state.scale)
        after = ReduceLROnPlateauState(
            scale=reduced,
            best_value=torch.where(better, mean, state.best_value),
            plateau_count=torch.where(reduce | cooling, 0, count),
            cooldown_count=torch.where(cooling, state.cooldown_count - 1, torch.where(reduce, cooldown, 0)),
            values=torch.zeros_like(seen),
            avg_value=torch.zeros_like(mean),
        )
        before = state._replace(values=seen, avg_value=mean)
        new = [torch.where(complete, a, b).to(b.dtype) for a, b in zip(after, before, strict=True)]
        state = ReduceLROnPlateauState(*new)
        return compute(lambda u, s: s * u, updates, hyper=(state.scale,)), state

    return Transform(init, update, state=ReduceLROnPlateauState, stages=["scales"])


def as_value(name: str, value: Any, like: Tensor) -> Tensor:
    """The value of an objective that came with an update, as a scalar like another one."""
    if value is None:
        raise TypeError(f"{name} needs the value of the objective; expected update(updates, state, params, value=loss)")
    value = whole(value)
    if not isinstance(value, Tensor):
        return torch.full_like(like, value)
    if value.ndim:
        raise ValueError(f"value has shape {tuple(value.shape)}; expected a number, or a tensor without dimensions")
    return value.to(like.device, like.dtype)
