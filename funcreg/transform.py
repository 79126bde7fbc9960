"""What a transform is: two pure functions, and what it tells of itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg._typing import REACHES, Hyper, Mask, Params, Reach, State, Updates
from funcreg.tree import (
    broadcast,
    check_alike,
    check_nonnegative,
    check_params,
    flatten,
    mask_leaves,
    scalar_device,
    tree_leaves,
)


class Transform:
    r"""A gradient transform: the pure functions `init(params)` and `update(updates, state, params, **extra)`.

    `init` makes the state from the parameters. `update` makes new updates and a new state; none of its arguments
    is written to. What `update` gets is checked: trees of one structure, leaves of one shape and device. Extra keyword
    arguments reach those transforms of a chain whose `update` names them or takes `**extra`.

    Args:
        init: From parameters to a state, a tree of tensors whose leaves never share memory.
        update: From updates, state and parameters to new updates and state, of the same structure, shapes and dtypes.
        reach: How far one entry of the result looks: `"elementwise"`, `"rows"`, `"matrix"`, `"leaf"` or `"global"`.
            A compiled step uses it to lay leaves out; saying nothing is always right.
        metric: From a state that `update` returned to the diagonal metric of this preconditioner, a tree like the
            parameters (for Adam, :math:`\sqrt{\hat v} + \epsilon`); proximal steps use it.
        frozen: From parameters to one bool a leaf: which leaves this transform holds where they are, in any chain.
        state: Type of its states, if they are named tuples of its own: the state of another transform is refused.

    Raises:
        TypeError: A leaf is not a tensor of floating point or complex numbers.
        ValueError: Updates and parameters differ in structure, shape or device, and the message names the leaf; or
            the state is that of another transform.

    Example:
        >>> halve = Transform(
        ...     init=lambda params: (),
        ...     update=lambda updates, state, params: (tree_map(lambda u: u / 2, updates), state),
        ...     reach="elementwise",
        ... )
        >>> params = {"weight": torch.tensor([1.0, 2.0])}
        >>> halve.update({"weight": torch.tensor([4.0, 6.0])}, halve.init(params), params)
        ({'weight': tensor([2., 3.])}, ())
    """

    def __init__(
        self,
        init: Callable[[Params], State],
        update: Callable[..., tuple[Updates, State]],
        reach: Reach = "global",
        metric: Callable[[State], Params] | None = None,
        frozen: Callable[[Params], list[bool]] | None = None,
        state: type | None = None,
    ) -> None:
        if reach not in REACHES:
            raise ValueError(f"reach is {reach!r}; expected one of {', '.join(REACHES)}")
        self._init, self._update = init, update
        self.reach: Reach = reach
        self.metric = metric
        self.frozen = frozen
        self._state = state

    def init(self, params: Params) -> State:
        """The state before the first update."""
        check_params(params)
        return self._init(params)

    def update(self, updates: Updates, state: State, params: Params, **extra: Any) -> tuple[Updates, State]:
        """New updates and the next state."""
        check_params(params)
        check_alike(params, updates, ("params", "updates"))
        if self._state is not None and not isinstance(state, self._state):
            came = type(state).__name__
            raise ValueError(f"state is {came}; expected {self._state.__name__}. Was it made by this transform's init?")
        return self._update(updates, state, params, **(_accepted(self._update, extra) if extra else extra))


def _accepted(update: Callable[..., Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Those of some extra arguments that a function names or, with `**extra`, all."""
    parameters = inspect.signature(update).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return extra
    return {parameter.name: extra[parameter.name] for parameter in list(parameters)[3:] if parameter.name in extra}


def furthest(reaches: Iterable[Reach]) -> Reach:
    """The reach of transforms one after another."""
    return REACHES[max([0, *(REACHES.index(reach) for reach in reaches)])]


class EmptyState(NamedTuple):
    """The state of a transform without memory: a named tuple without fields.

    Example:
        >>> scale(2.0).init({"weight": torch.ones(2)})
        EmptyState()
    """


def init_empty_state(params: Params) -> EmptyState:
    """The init of a transform without memory.

    Example:
        >>> init_empty_state({"weight": torch.ones(2)})
        EmptyState()
    """
    return EmptyState()


def stateless(f: Callable[[Updates, Params], Updates], reach: Reach = "global") -> Transform:
    r"""A transform without memory, made from a function, :math:`u' = f(u, w)`.

    Args:
        f: Function of the updates and the parameters, both trees.
        reach: How far one entry of the result looks; see `Transform`.

    Example:
        >>> tx = stateless(lambda updates, params: tree_map(torch.sign, updates), reach="elementwise")
        >>> params = {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([-3.0, 0.5])}, tx.init(params), params)
        ({'weight': tensor([-1.,  1.])}, EmptyState())
    """
    return Transform(init_empty_state, lambda updates, state, params: (f(updates, params), state), reach)


def identity() -> Transform:
    r"""Leave updates as they are, :math:`u' = u`.

    Example:
        >>> params = {"weight": torch.zeros(2)}
        >>> identity().update({"weight": torch.ones(2)}, EmptyState(), params)
        ({'weight': tensor([1., 1.])}, EmptyState())
    """
    return stateless(lambda updates, params: updates, "elementwise")


class ScheduleState(NamedTuple):
    """The state of a transform with a hyperparameter that follows a schedule."""

    steps: Tensor  # Number of updates made, int32.


def counter(params: Params) -> Tensor:
    """A count of steps at 0: a tensor, so that counting on compiles nothing anew."""
    return torch.zeros((), dtype=torch.int32, device=scalar_device(params))


def is_scheduled(*hyper: Hyper) -> bool:
    """Whether a hyperparameter, or a leaf of one, is a schedule."""
    return any(callable(leaf) for value in hyper for leaf in flatten(value)[0])


def at_step(value: Hyper, steps: Tensor | None) -> Hyper:
    """A hyperparameter with the values that its schedules have at a step."""
    leaves, rebuild = flatten(value)
    return rebuild([leaf(steps) if callable(leaf) else leaf for leaf in leaves])


def check_fit(params: Params, mask: Mask | None, *hyper: Hyper) -> None:
    """Raise an error, before the first update, for a mask or a tree of hyperparameters that does not fit."""
    if mask is not None:
        mask_leaves(mask, params)
    for value in hyper:
        broadcast(value, params, "a hyperparameter")


def scheduled(rule: Callable[..., Updates], *hyper: Hyper, reach: Reach) -> Transform:
    """A transform from `rule(updates, params, *values)`, where a hyperparameter may follow a schedule.

    Memory is one counter, and that only if there is a schedule.
    """
    counts = is_scheduled(*hyper)

    def init(params: Params) -> ScheduleState | EmptyState:
        check_fit(params, None, *hyper)
        return ScheduleState(counter(params)) if counts else EmptyState()

    def update(updates: Updates, state: State, params: Params) -> tuple[Updates, State]:
        if not counts:
            return rule(updates, params, *hyper), state
        values = [at_step(value, state.steps) for value in hyper]
        return rule(updates, params, *values), ScheduleState(state.steps + 1)

    return Transform(init, update, reach, state=ScheduleState if counts else None)


def nonnegative(**hyper: Hyper) -> None:
    """Raise an error for the first of these hyperparameters that is a negative number, a string or a bool."""
    for name, value in hyper.items():
        check_nonnegative(name, value)


def positive(**hyper: Hyper) -> None:
    """Raise an error for the first of these hyperparameters that is a number of at most 0, a string or a bool."""
    nonnegative(**hyper)
    for name, value in hyper.items():
        if any(isinstance(x, (int, float)) and x == 0 for x in tree_leaves(value)):
            raise ValueError(f"{name} is {value}; expected a number above 0")


def below_one(**hyper: Hyper) -> None:
    """Raise an error for the first of these hyperparameters that is a number below 0 or of at least 1."""
    nonnegative(**hyper)
    for name, value in hyper.items():
        if any(isinstance(x, (int, float)) and x >= 1 for x in tree_leaves(value)):
            raise ValueError(f"{name} is {value}; expected a number below 1")
