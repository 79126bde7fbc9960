"""Hyperparameters in the state: read and set there between steps, with no new compilation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Params, State, Updates
from funcreg.core.construction import Call, Remembering, remembered
from funcreg.core.leafwise import increment, scalar_device
from funcreg.core.ranges import number
from funcreg.core.tree import leaves_like, tree_leaves, tree_map
from funcreg.core.undocumented import is_compiling
from funcreg.transforms.factory_checks import check_no_torchs, dtypes
from funcreg.transforms.transform import Transform, around, at_step, counter, public_state


@public_state
class InjectHyperparamsState(NamedTuple):
    """The state of what `inject_hyperparams` makes.

    Example:
        >>> inject_hyperparams(sgd)(0.1).init(torch.zeros(1)).hyperparams
        {'learning_rate': tensor(0.1000, dtype=torch.float64)}
    """

    steps: Tensor  # Number of updates made, int32.
    hyperparams: dict[str, Hyper]  # By the names of the factory: those of the next update, scheduled ones of the last.
    inner_state: State


@remembered
def inject_hyperparams(
    inner_factory: Callable[..., Transform],
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: torch.dtype | None = None,
) -> Callable[..., Transform]:
    r"""Keep the numbers that a factory is called with in the state, as tensors, instead of in the transform.

    What comes is called like the factory. Each number and tensor among its arguments, defaults too, is an entry of
    `state.hyperparams`; each function among them is a schedule of the number of updates, also where the factory itself
    takes none, as for `b1`. An update reads the entries. Between steps one may be read, and set: in place, with
    `fill_`; to another tensor; or between eager steps, to a number. No value compiles anything anew. In a stack of
    states each member has its own. Setting one that follows a schedule has no effect.

    Bools, names, penalties, masks and transforms stay arguments, as do whole numbers that the factory annotates so or
    takes as options. Numbers are kept in float64, so that the transform is the same as without this: optax rounds them
    to the dtype of the parameters, where a decay of 0.999 in bfloat16 is 1. An `Optimizer` does all this itself, with
    the factory as it is.

    Args:
        inner_factory: Function that makes a transform, such as `adamw`.
        static_args: Name, or names, of arguments that stay what they are: functions that are no schedules, numbers
            that the factory does not take as tensors.
        hyperparam_dtype: Dtype of the entries; by default float64 for numbers, and that of a tensor.

    Raises:
        ValueError: A static argument is none of the factory's; or a number, also one that was set, is out of range.
        TypeError: The factory returned no transform, or does not take a tensor where it got a number.

    Example:
        >>> tx = inject_hyperparams(sgd)(learning_rate=0.1)
        >>> params, grads = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> updates
        {'w': tensor([-0.1000])}
        >>> state.hyperparams["learning_rate"] = 0.5
        >>> tx.update(grads, state, params)[0]
        {'w': tensor([-0.5000])}

        >>> tx = inject_hyperparams(adam)(0.1, b1=linear_schedule(0.9, 0.5, 100))
        >>> tx.init(params).hyperparams["b1"]
        tensor(0.9000, dtype=torch.float64)
    """
    if isinstance(inner_factory, Transform) or not callable(inner_factory):
        hint = (
            ", before it is called, as in inject_hyperparams(sgd)(0.1)" if isinstance(inner_factory, Transform) else ""
        )
        raise TypeError(f"inner_factory is {inner_factory!r}; expected the function that makes a transform{hint}")
    check_no_torchs("inner_factory", inner_factory)
    names = (static_args,) if isinstance(static_args, str) else static_args
    if not isinstance(names, Iterable) or not all([isinstance(name, str) for name in names]):
        raise TypeError(f"static_args is {static_args!r}; expected the names of arguments, such as ('nesterov',)")
    names = tuple(names)
    known = inspect.signature(inner_factory).parameters
    takes_any = any([p.kind is p.VAR_KEYWORD for p in known.values()])
    for name in names:
        if name not in known and not takes_any:
            raise ValueError(
                f"static_args names {name!r}, which {_name(inner_factory)} does not take; it takes {', '.join(known)}"
            )
    dtypes(hyperparam_dtype=hyperparam_dtype)
    return Injected(inner_factory, names, hyperparam_dtype)


def _name(factory: Any) -> str:
    return getattr(factory, "__name__", repr(factory))


class Injected(Remembering):
    """A factory whose transforms have their hyperparameters in the state; `inject_hyperparams` makes it."""

    def __init__(self, factory: Callable[..., Transform], static: tuple[str, ...], dtype: torch.dtype | None) -> None:
        self.factory, self._static, self._dtype = factory, static, dtype

    @property
    def __name__(self) -> str:
        return repr(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Transform:
        """The transform that the factory makes of these arguments, with their numbers in its state."""
        call = _Call(self.factory, self._static, args, kwargs)
        tx = _injected(call, self._dtype)
        if not is_compiling():
            tx.made_by = Call(self, args, kwargs)
        return tx


class _Call:
    """The arguments of one call of a factory, those that are hyperparameters apart."""

    def __init__(
        self, factory: Callable[..., Transform], static: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        parameters = list(inspect.signature(factory).parameters.values())
        positions = _by_position(_name(factory), parameters, args)
        names = _by_name(_name(factory), parameters, positions, kwargs)
        where = {**positions, **names}
        defaults = {p.name: p.default for p in parameters}
        values = {
            **dict(zip(positions, args, strict=True)),
            **{name: kwargs.get(name, defaults.get(name)) for name in names},
        }
        free = [label for label in values if label not in static and where[label].name not in static]
        self.factory, self._positions, self._names = factory, list(positions), list(names)
        self.hyper: dict[str, Hyper] = {
            label: values[label] for label in free if _is_hyper(values[label], where[label])
        }
        self._values = {label: value for label, value in values.items() if label not in self.hyper}

    def make(self, hyper: dict[str, Hyper]) -> Transform:
        """The transform with some values of the hyperparameters."""
        values = {**self._values, **hyper}
        try:
            made: Any = self.factory(
                *[values[label] for label in self._positions], **{label: values[label] for label in self._names}
            )
        except TypeError as error:
            if is_compiling() or "missing" in str(error):
                raise
            raise TypeError(
                f"{error}. inject_hyperparams hands numbers over as tensors; what {_name(self.factory)} takes "
                f"otherwise is named in static_args. Now these are tensors: {', '.join(self.hyper) or 'none'}."
            ) from error
        if not isinstance(made, Transform):
            raise TypeError(f"{_name(self.factory)} returned {made!r}; expected a Transform")
        return made


def _by_position(factory: str, parameters: list[inspect.Parameter], args: tuple[Any, ...]) -> dict[str, Any]:
    """The parameters of positional arguments, by name; those of `*hyper` are numbered, as hyper_0."""
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    several = [p for p in parameters if p.kind is p.VAR_POSITIONAL]
    if len(args) > len(places) and not several:
        raise TypeError(f"{factory} takes {len(places)} positional arguments, but got {len(args)}")
    found = {p.name: p for p in places[: len(args)]}
    return {**found, **{f"{several[0].name}_{i}": several[0] for i in range(len(args) - len(places))}}


def _by_name(
    factory: str, parameters: list[inspect.Parameter], taken: dict[str, Any], kwargs: dict[str, Any]
) -> dict[str, inspect.Parameter]:
    """The parameters of arguments by keyword, those with defaults too."""
    known = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    others = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    for name in kwargs:
        if name in taken:
            raise TypeError(f"{factory} got several values for the argument {name!r}")
        if name not in known and not others:
            raise TypeError(f"{factory} got {name!r}, which it does not take; it takes {', '.join(known)}")
    defaults = {name: p for name, p in known.items() if p.default is not p.empty and name not in taken}
    return {**defaults, **{name: known[name] if name in known else others[0] for name in kwargs}}


#: What the annotation of an argument that may be a hyperparameter names; nothing, where there is none.
_REAL = ("Scalar", "Hyper", "Schedule", "float", "Any", "inspect._empty")
_NUMERIC = (*_REAL, "Tensor")


def _is_hyper(value: Any, parameter: inspect.Parameter) -> bool:
    """Whether an argument is a number, a tensor, a schedule, or a dict of them."""
    if not any([name in str(parameter.annotation) for name in _NUMERIC]):
        return False
    if "int" in str(parameter.annotation) and not any([name in str(parameter.annotation) for name in _REAL]):
        return False  # A whole number, such as the key of a generator, also in a tensor.
    leaves = tree_leaves(value) if isinstance(value, dict) else [value]
    # A whole number among the options of a penalty, such as a dimension, is none.
    if parameter.kind is parameter.VAR_KEYWORD and any([isinstance(leaf, int) for leaf in leaves]):
        return False
    return len(leaves) > 0 and all([_is_number(leaf) or _is_schedule(leaf) for leaf in leaves])


def _is_number(leaf: Any) -> bool:
    plain = number(leaf)
    return isinstance(plain, Tensor) or (isinstance(plain, (int, float)) and not isinstance(plain, bool))


def _is_schedule(leaf: Any) -> bool:
    return callable(leaf) and not isinstance(leaf, type) and not isinstance(getattr(leaf, "kind", None), str)


def _injected(call: _Call, dtype: torch.dtype | None) -> Transform:
    """The transform of a call, whose hyperparameters are in the state."""

    def tensor(value: Any, device: torch.device) -> Tensor:
        if isinstance(value, Tensor):
            own = dtype if dtype is not None and value.is_floating_point() else value.dtype
            return (value if value.ndim else value.to(device)).to(own)
        return torch.full((), number(value), dtype=dtype or torch.float64, device=device)

    def first(device: torch.device) -> dict[str, Hyper]:
        steps = torch.zeros((), dtype=torch.int32, device=device)
        # Copies, because a user may write into what he gave, and leaves of a state are its own.
        return tree_map(lambda value: tensor(at_step(value, steps), device).clone(), call.hyper)

    def now(state: InjectHyperparamsState) -> dict[str, Hyper]:
        known = leaves_like(call.hyper, state.hyperparams, ("the arguments", "state.hyperparams"))
        values = iter(known)
        steps, device = state.steps, state.steps.device
        return tree_map(
            lambda value: (lambda old: tensor(at_step(value, steps) if callable(value) else old, device))(next(values)),
            call.hyper,
        )

    # On the CPU, where numbers are checked against their ranges.
    model = call.make(first(torch.device("cpu")))

    def init(params: Params) -> InjectHyperparamsState:
        hyper = first(scalar_device(params))
        return InjectHyperparamsState(counter(params), hyper, call.make(hyper).begin(params))

    def update(
        updates: Updates, state: InjectHyperparamsState, params: Params, **extra: Any
    ) -> tuple[Updates, InjectHyperparamsState]:
        hyper = now(state)
        inner = call.make(hyper)
        updates, after = inner.update(updates, state.inner_state, params, **inner.accepted(extra))
        return updates, InjectHyperparamsState(increment(state.steps), hyper, after)

    def metric(state: InjectHyperparamsState) -> Params:
        measure = call.make(state.hyperparams).metric
        return None if measure is None else measure(state.inner_state)

    measure = None if model.metric is None else metric
    return around(model, init, update, InjectHyperparamsState, metric=measure, examples=model.examples)
