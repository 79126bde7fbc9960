"""What a transform is: two pure functions, and what it tells of itself."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Params, Schedule, State, Updates
from funcreg.core.checks import check_alike, check_params, filled
from funcreg.core.construction import Remembering, remembered
from funcreg.core.histories import watch_history
from funcreg.core.leafwise import increment, scalar_device, without_autocast
from funcreg.core.masks import hidden, kept_by, listed
from funcreg.core.notices import warn_user
from funcreg.core.ranges import flags, number
from funcreg.core.tree import Absent, broadcast, flatten, tree_leaves, tree_paths
from funcreg.core.undocumented import dynamo_asks, is_compiling, is_transformed
from funcreg.core.wording import type_of
from funcreg.transforms.coarse import rounded_away

T = TypeVar("T")
#: From parameters to one bool a leaf.
Choice = Callable[[Params], list[bool]]
#: What a transform does in a descent; see `Transform`.
Stage = Literal["adds", "steps", "lands", "scales", "flips", "waits", "shrinks", "follows", "rounds", "counts"]


#: Extra arguments that loops hand to every transform, whether it looks at them or not.
FOR_ANY = ("value", "grad", "value_fn")


class Transform(Remembering):
    r"""A gradient transform: the pure functions `init(params)` and `update(updates, state, params, **extra)`.

    `init` makes the state from the parameters. `update` makes new updates and a new state; none of its arguments
    is written to. What `update` gets is checked: trees of one structure, leaves of one shape and device. Extra keyword
    arguments reach those transforms of a chain whose `update` names them or takes `**extra`.

    Args:
        init: From parameters to a state, a tree of tensors whose leaves never share memory.
        update: From updates, state and parameters to new updates and state, of the same structure, shapes and dtypes.
        metric: From a state that `update` returned to the diagonal metric of this preconditioner, a tree like the
            parameters (for Adam, :math:`\sqrt{\hat v} + \epsilon`); proximal steps use it.
        frozen: From parameters to one bool a leaf: which leaves this transform holds where they are, in any chain.
        state: Type of its states, if they are named tuples of its own: the state of another transform is refused.
        descends: Whether its updates are steps downhill, with a learning rate in them, which no proximal step may take
            for a direction.
        spares: From parameters to one bool a leaf: at which leaves a gradient may be None, which is taken for zeros.
            Frozen leaves are among them anyway.
        stages: What it does in a descent, from which a chain knows whether its links are in order: `"adds"` a gradient
            to updates, `"steps"` downhill along them with a learning rate, `"lands"` where the step should end, at
            exact zeros or in a set, `"scales"` updates, `"flips"` their sign; it `"waits"` if some calls gather
            gradients and make no step, `"shrinks"` if it moves parameters where updates are zero, and
            `"follows"` a step, to which it adds, `"rounds"` if it ends at numbers that parameters can be, so that
            what changes its updates is lost, or undone at the next step, and `"counts"` if what it does at a call
            depends on how many were before.
        covers: From parameters to one bool a leaf: at which leaves it makes a step of updates, or zeros. By default
            at all if it steps or flips signs, else at none.
        forwards_to: The transforms to which `update` hands its extra arguments, for one with `**extra`; so a name that
            neither it nor one of them takes is refused.
        links: The links of a chain, in their order.
        rate: By what it multiplies updates, up to their sign, if it does nothing else: number, tensor, schedule, or a
            tree of them.
        examples: Whether its updates are gradients of single examples, with one more dimension, the first.
        factor: From updates to the scalar by which it multiplies all of them, if it does nothing else.

    Raises:
        TypeError: A leaf is not a tensor of floating point or complex numbers.
        ValueError: Updates and parameters differ in structure, shape or device, and the message names the leaf; or
            the state is that of another transform.

    Example:
        >>> halve = Transform(
        ...     init=lambda params: (),
        ...     update=lambda updates, state, params: (tree_map(lambda u: u / 2, updates), state),
        ... )
        >>> params = {"weight": torch.tensor([1.0, 2.0])}
        >>> halve.update({"weight": torch.tensor([4.0, 6.0])}, halve.init(params), params)
        ({'weight': tensor([2., 3.])}, ())
    """

    def __init__(
        self,
        init: Callable[[Params], State],
        update: Callable[..., tuple[Updates, State]],
        metric: Callable[[State], Params] | None = None,
        frozen: Choice | None = None,
        state: type | None = None,
        *,
        descends: bool = False,
        spares: Choice | None = None,
        stages: Collection[Stage] = (),
        covers: Choice | None = None,
        forwards_to: Sequence[Transform] | None = None,
        links: Sequence[Transform] = (),
        rate: Hyper | Schedule | None = None,
        examples: bool = False,
        factor: Callable[[Updates], Tensor] | None = None,
    ) -> None:
        for name, function in (("init", init), ("update", update), ("metric", metric), ("frozen", frozen)):
            if not callable(function) and (function is not None or name in ("init", "update")):
                raise TypeError(f"{name} of a Transform is {function!r}; expected a function")
        flags(descends=descends, examples=examples)
        self._init, self._update = init, update
        self.metric = metric
        self.frozen = frozen
        self.descends = descends
        self.spares = frozen if spares is None else spares if frozen is None else either(spares, frozen)
        self.stages = tuple(stages)
        goes = "steps" in self.stages or "flips" in self.stages
        self.covers = everywhere if covers is None and goes else covers
        self._forwards_to = None if forwards_to is None else tuple(forwards_to)
        self.links = tuple(links)
        self.rate = rate
        self.examples = examples
        self.factor = factor
        self._state = state
        alone = [tx for tx in self.forwards_to if tx.examples]
        if alone and not examples:
            raise ValueError(
                f"{alone[0]!r} takes gradients of single examples, which are clipped before anything else; a wrapper "
                "would hand it sums of them, or trees like the parameters. Expected it alone, first in a chain, or in "
                "inject_hyperparams. For MultiSteps, take a larger batch."
            )

    kind = "transform"
    #: The same for trees from which the leaves that it freezes are left out already; None if that is itself.
    unheld: Transform | None = None

    @property
    def forwards_to(self) -> tuple[Transform, ...]:
        """The transforms to which it hands extra arguments, which are those that it is made of."""
        return self._forwards_to or ()

    def __bool__(self) -> bool:
        if dynamo_asks():
            return True
        raise TypeError(
            f"{self!r} has no truth value. Write chain(a, b) for `a and b`; to ask whether there is one, write "
            "`is not None`."
        )

    def __repr__(self) -> str:
        if self.made_by is not None:
            return super().__repr__()
        names = [getattr(f, "__qualname__", repr(f)) for f in (self._init, self._update)]
        return f"Transform(init={names[0]}, update={names[1]})"

    def init(self, params: Params) -> State:
        """The state before the first update."""
        state = self.begin(params)
        _watch_steps(self, params)
        return state

    def begin(self, params: Params) -> State:
        """`init` of a transform inside another one, which sees to the leaves that this one leaves alone."""
        check_params(params)
        return self._init(params)

    def accepted(self, extra: dict[str, Any]) -> dict[str, Any]:
        """Those of some extra arguments that `update` takes."""
        return {name: extra[name] for name in extra if self.accepts(name)} if extra else extra

    def accepts(self, name: str) -> bool:
        """Whether `update` takes an extra argument of this name, or hands it to a transform that does."""
        if self._forwards_to is not None:
            return name in _extra_names(self._update)[0] or any([tx.accepts(name) for tx in self._forwards_to])
        return name in _accepted(self._update, {name: None})

    @without_autocast
    def update(self, updates: Updates, state: State, params: Params, **extra: Any) -> tuple[Updates, State]:
        """New updates and the next state."""
        if extra:
            for name in extra:
                if name not in FOR_ANY and not self.accepts(name):
                    raise TypeError(
                        f"update got the extra argument {name!r}, which no transform of {self!r} takes; expected one "
                        "that an update names. Is it misspelled? A wrapper of your own hands on inner.accepted(extra)."
                    )
        try:
            check_params(params)
            if not self.examples:  # Which are no trees like the parameters, and are checked where they are summed.
                updates = filled(params, updates, self.spares)
        except (TypeError, ValueError) as error:
            if fits(updates, state):
                raise ValueError(
                    "update got a tree like the updates where the state is expected, and something else where the "
                    "parameters are; expected update(updates, state, params). Are state and params swapped?"
                ) from error
            if fits(params, state):
                raise ValueError(
                    "update got a tree like the parameters where the state is expected, and something else where the "
                    "updates are; expected update(updates, state, params). Are updates and state swapped?"
                ) from error
            raise
        if self._state is not None and not isinstance(state, self._state):
            came = type(state).__name__
            raise ValueError(f"state is {came}; expected {self._state.__name__}. Was it made by this transform's init?")
        watch_history(params, state)
        made = self._update(updates, state, params, **(_accepted(self._update, extra) if extra else extra))
        if not isinstance(made, tuple) or len(made) != 2:
            raise TypeError(f"update of {self!r} returned {type_of(made)}; expected a pair, (updates, state)")
        return made


def fits(updates: Updates, state: State) -> bool:
    """Whether what came as a state is a tree like the updates, with leaves."""
    try:
        check_alike(updates, state, ("updates", "state"))
    except (TypeError, ValueError, AttributeError):
        return False
    return bool(tree_leaves(updates))


def around(
    inner: Transform,
    init: Callable[[Params], State],
    update: Callable[..., tuple[Updates, State]],
    state: type | None = None,
    *,
    metric: Callable[[State], Params] | None = None,
    stages: Sequence[Stage] = (),
    also: Sequence[Transform] = (),
    **other: Any,
) -> Transform:
    """A transform that has of another one what that tells of itself, and hands its extra arguments on.

    Args:
        inner: The transform inside.
        init: As of `Transform`.
        update: As of `Transform`.
        state: As of `Transform`.
        metric: As of `Transform`.
        stages: Stages besides those of the inner transform.
        also: Others that take extra arguments.
        other: What it tells otherwise, by the names that `Transform` has for it.
    """
    told: dict[str, Any] = {
        "frozen": inner.frozen,
        "descends": inner.descends,
        "spares": inner.spares,
        "covers": inner.covers,
        "stages": [*inner.stages, *stages],
        "forwards_to": [inner, *also],
    }
    return Transform(init, update, metric, state=state, **(told | other))


def either(*choices: Choice) -> Choice:
    """The leaves that one of several functions chooses."""
    return lambda params: [any(bools) for bools in zip(*(choose(params) for choose in choices), strict=True)]


def everywhere(params: Params) -> list[bool]:
    """The choice of all leaves."""
    return [True] * len(tree_leaves(params))


# Warnings


def warn(message: str) -> None:
    """Warn of a line of the user's; not while code is traced or batched, where it was or will be run once more."""
    if is_compiling() or is_transformed():
        return
    warn_user(message)


def raw_leaves(tx: Transform, params: Params) -> str | None:
    """What is wrong with leaves whose raw gradients are updates, while others take steps downhill; None if none are."""
    goes = "steps" in tx.stages or "flips" in tx.stages
    if not goes or tx.covers is None or tx.covers is everywhere:
        return None
    raw = [name for name, covered in zip(tree_paths(params), tx.covers(params), strict=True) if not covered]
    if not raw:
        return None
    return (
        f"{tx!r} makes steps downhill at some leaves and lets the updates of others pass: {listed(raw)} would go "
        "uphill, by the whole of their gradients. To hold them, write chain(freeze(mask), ...); to treat them "
        "otherwise, take partition."
    )


def _watch_steps(tx: Transform, params: Params) -> None:
    """Warn of steps of nothing, that go uphill at some leaves, or that sixteen bits round away."""
    if not (isinstance(params, Absent) or tree_leaves(params)):
        warn(
            f"{tx!r} begins without parameters, so that its steps do nothing. Are layers in a plain list, which a "
            "module does not see into, where a ModuleList belongs? Are all parameters frozen?"
        )
    if tx.covers is None or is_compiling() or is_transformed() or hidden(params):
        return
    for said in (raw_leaves(tx, params), rounded_away(tx, params)):
        if said is not None:
            warn(said)


def _accepted(update: Callable[..., Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Those of some extra arguments that a function names or, with `**extra`, all."""
    names, takes_all = _extra_names(update)
    return extra if takes_all else {name: extra[name] for name in names if name in extra}


def _extra_names(update: Callable[..., Any]) -> tuple[list[str], bool]:
    """The names of extra arguments of a function, and whether it takes all."""
    if torch.compiler.is_dynamo_compiling() and isinstance(update, types.FunctionType):
        # It knows no signature of a function that is made in what it traces.
        code = update.__code__
        names = code.co_varnames[3 : code.co_argcount + code.co_kwonlyargcount]
        return list(names), bool(code.co_flags & inspect.CO_VARKEYWORDS)
    parameters = inspect.signature(update).parameters.values()
    kinds = [parameter.kind for parameter in parameters]
    names = [
        parameter.name for parameter in list(parameters)[3:] if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    return names, inspect.Parameter.VAR_KEYWORD in kinds


# States


def public_state(state: type[T]) -> type[T]:
    """Let states of a type go through `torch.save` and `torch.load` with its defaults, which refuse unknown types.

    They are saved by their public name, whatever module defines them; files may know them by that module, too.
    """
    by_module = f"funcreg.{state.__module__.rpartition('.')[2]}.{state.__qualname__}"
    state.__module__ = "funcreg"
    torch.serialization.add_safe_globals([state, (state, by_module)])
    return state


@public_state
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


def memoryless(
    f: Callable[[Updates, Params], Updates],
    spares: Choice | None = None,
    *,
    stages: Collection[Stage] = (),
    covers: Choice | None = None,
    rate: Hyper | None = None,
    factor: Callable[[Updates], Tensor] | None = None,
) -> Transform:
    """`stateless` for functions that are known to return updates like those that they get."""
    update = lambda updates, state, params: (f(updates, params), state)
    return Transform(init_empty_state, update, spares=spares, stages=stages, covers=covers, rate=rate, factor=factor)


@remembered
def stateless(f: Callable[[Updates, Params], Updates]) -> Transform:
    r"""A transform without memory, made from a function, :math:`u' = f(u, w)`.

    Args:
        f: Function of the updates and the parameters, both trees, to a tree like them.

    Raises:
        ValueError: The function returned a tree of another structure, or leaves of another shape.

    Example:
        >>> tx = stateless(lambda updates, params: tree_map(torch.sign, updates))
        >>> params = {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([-3.0, 0.5])}, tx.init(params), params)
        ({'weight': tensor([-1.,  1.])}, EmptyState())
    """
    if not callable(f) or isinstance(f, type):
        raise TypeError(f"stateless got {f!r}; expected a function of updates and params")
    name = getattr(f, "__name__", type(f).__name__)

    def checked(updates: Updates, params: Params) -> Updates:
        try:
            new = f(updates, params)
        except (AttributeError, TypeError) as error:
            if isinstance(updates, Tensor) and type(error) is AttributeError:
                raise
            raise TypeError(
                f"the function {name} of stateless raised {type(error).__name__}: {error}. It gets two trees, the "
                "updates and the parameters, and returns a tree like them. For a rule of one leaf, write "
                f"stateless(lambda updates, params: tree_map({name}, updates))."
            ) from error
        if new is None and tree_leaves(updates):
            raise TypeError(f"the function {name} of stateless returned None; expected new updates. Lacks it a return?")
        check_alike(updates, new, ("updates", f"what the function {name} of stateless returned"))
        return new

    return memoryless(checked)


@remembered
def identity() -> Transform:
    r"""Leave updates as they are, :math:`u' = u`.

    Example:
        >>> params = {"weight": torch.zeros(2)}
        >>> identity().update({"weight": torch.ones(2)}, EmptyState(), params)
        ({'weight': tensor([1., 1.])}, EmptyState())
    """
    return memoryless(lambda updates, params: updates, rate=1.0)


@public_state
class ScheduleState(NamedTuple):
    """The state of a transform with a hyperparameter that follows a schedule.

    Example:
        >>> scale_by_schedule(linear_schedule(1.0, 0.0, 4)).init(torch.zeros(1))
        ScheduleState(steps=tensor(0, dtype=torch.int32))
    """

    steps: Tensor  # Number of updates made, int32.


def counter(params: Params) -> Tensor:
    """A count of steps at 0: a tensor, so that counting on compiles nothing anew."""
    return torch.zeros((), dtype=torch.int32, device=scalar_device(params))


def is_scheduled(*hyper: Hyper) -> bool:
    """Whether a hyperparameter, or a leaf of one, is a schedule."""
    return any(callable(leaf) for value in hyper for leaf in flatten(value)[0])


def at_step(value: Hyper, steps: Tensor | int | None) -> Hyper:
    """A hyperparameter with the values that its schedules have at a step, and numbers of numpy as those of Python."""
    if isinstance(value, (Tensor, float, int)):
        return value
    leaves, rebuild = flatten(value)
    return rebuild([value_at(leaf, steps) for leaf in leaves])


def value_at(leaf: Any, steps: Tensor | int | None) -> Any:
    if not callable(leaf):
        return number(leaf)
    value = number(leaf(steps))
    if isinstance(value, bool) or not isinstance(value, (Tensor, float, int)):
        raise TypeError(f"the schedule {leaf!r} returned {value!r}; expected a number or a tensor")
    return value


def check_fit(params: Params, mask: Mask | None, *hyper: Hyper) -> None:
    """Raise an error, before the first update, for a mask or a tree of hyperparameters that does not fit."""
    chosen = kept_by(mask, params)
    for value in hyper:
        broadcast(value, chosen, "a hyperparameter")


def scheduled(
    rule: Callable[..., Updates],
    *hyper: Hyper,
    descends: bool = False,
    stages: Collection[Stage] = (),
    rate: Hyper | Schedule | None = None,
) -> Transform:
    """A transform from `rule(updates, params, *values)`, where a hyperparameter may follow a schedule.

    Memory is one counter, and that only if there is a schedule.
    """
    counts = is_scheduled(*hyper)

    def init(params: Params) -> ScheduleState | EmptyState:
        check_fit(params, None, *hyper)
        return ScheduleState(counter(params)) if counts else EmptyState()

    def update(updates: Updates, state: State, params: Params) -> tuple[Updates, State]:
        values = [at_step(value, state.steps if counts else None) for value in hyper]
        return rule(updates, params, *values), ScheduleState(increment(state.steps)) if counts else state

    state = ScheduleState if counts else None
    return Transform(init, update, state=state, descends=descends, stages=stages, rate=rate)
