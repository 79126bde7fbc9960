"""Measurements in the state: what updates are like at a place of a chain, step by step or averaged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Params, Scalar, State, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import scalar_device, wide
from funcreg.core.tree import leaves_like, tree_leaves, tree_map
from funcreg.core.wording import type_of
from funcreg.transforms.scaling import ema
from funcreg.transforms.transform import Transform, public_state
from funcreg.transforms.wrappers import Named, named_by


class _Probe:
    """A user's function of updates and, if it has more parameters, of the parameters and extra arguments."""

    def __init__(self, function: Any) -> None:
        if not callable(function) or isinstance(function, (type, Transform)):
            raise TypeError(f"measure is {function!r}; expected a function of updates, such as global_norm")
        self._function = function
        self._both, self._required = False, []
        if isinstance(getattr(function, "kind", None), str):  # A penalty: its other parameters are its own.
            self._names: Callable[[dict[str, Any]], dict[str, Any]] = lambda extra: {}
            return
        parameters = list(inspect.signature(function).parameters.values())
        places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self._both = len(places) > 1 and (places[1].default is places[1].empty or places[1].name == "params")
        others = [p for p in parameters if p.kind is p.KEYWORD_ONLY or p in places[2 if self._both else 1 :]]
        self._required = [p.name for p in others if p.default is p.empty]
        self._names = lambda extra: named_by(function, extra, 2 if self._both else 1)

    def takes(self) -> Transform:
        """Stands for the function where a transform says who takes its extra arguments."""
        return Named(lambda name: name in self._names({name: None}))

    def __call__(self, updates: Updates, params: Params, extra: dict[str, Any]) -> Any:
        """What is measured: tensors of their own, because a function may return its argument."""
        given = self._names(extra)
        found = self._function(updates, params, **given) if self._both else self._function(updates, **given)
        device = scalar_device(params)
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else torch.as_tensor(x, device=device), found)

    def begin(self, params: Params) -> Any:
        """Zeros of the shapes and dtypes that a measurement will have."""
        dtypes = [wide(leaf.real.dtype) for leaf in tree_leaves(params)]
        zero = torch.zeros((), dtype=dtypes[0] if dtypes else None, device=scalar_device(params))
        return tree_map(torch.zeros_like, self(params, params, dict.fromkeys(self._required, zero)))


class Measure(Transform):
    """A transform whose updates are a measurement: it stands in `monitor`, not in a chain."""

    def __init__(
        self, begin: Callable[[Params], Any], init: Callable[[Params], State], update: Any, takes: Transform
    ) -> None:
        super().__init__(init, update, forwards_to=[takes])
        self.first = begin  # From parameters to the measurement before the first.


def _plain(measure: Any) -> Measure:
    """A function as a measure without memory."""
    probe = _Probe(measure)

    def update(updates: Updates, state: State, params: Params, **extra: Any) -> tuple[Any, State]:
        return probe(updates, params, extra), state

    return Measure(probe.begin, lambda params: (), update, probe.takes())


def _of_transform(tx: Transform) -> Measure:
    """A transform of a user's own as a measure: its updates are what is measured."""

    def update(updates: Updates, state: State, params: Params, **extra: Any) -> tuple[Any, State]:
        found, after = tx.update(updates, state, params, **tx.accepted(extra))
        return tree_map(torch.clone, found), after

    def first(params: Params) -> Any:
        return tree_map(torch.zeros_like, tx.update(params, tx.begin(params), params)[0])

    return Measure(first, tx.begin, update, tx)


def _ready(measure: Any) -> Measure:
    if isinstance(measure, Measure):
        return measure
    return _of_transform(measure) if isinstance(measure, Transform) else _plain(measure)


def _like(found: Any, before: Any, name: str) -> Any:
    """A measurement in the dtypes of the last one, so that nothing compiles anew."""
    rows = iter(leaves_like(found, before, (f"the measurement {name!r}", "that before it")))
    return tree_map(lambda x: x.to(next(rows).dtype), found)


# Of the last update


@public_state
class SnapshotState(NamedTuple):
    """The state of `snapshot`.

    Example:
        >>> snapshot("norm", global_norm).init(torch.ones(1))
        SnapshotState(measurement={'norm': tensor(0.)})
    """

    measurement: dict[str, Any]  # By its name; zeros before the first update.


@remembered
def snapshot(measure_name: str, measure: Callable[..., Any]) -> Transform:
    r"""Keep in the state what a function says of the updates at this place of a chain; they pass.

    The function gets the updates; if it has a second parameter, the parameters too; and those extra arguments that it
    names after these, such as `value`.

    Args:
        measure_name: Name of the measurement, under which `state.measurement` has it.
        measure: Function of updates to a tensor or a tree of them, such as `global_norm`.

    Example:
        >>> tx, params = chain(snapshot("before", global_norm), clip_by_global_norm(1.0)), {"w": torch.zeros(2)}
        >>> updates, state = tx.update({"w": torch.tensor([3.0, 4.0])}, tx.init(params), params)
        >>> state[0].measurement
        {'before': tensor(5.)}
    """
    if not isinstance(measure_name, str):
        raise TypeError(f"measure_name is {measure_name!r}; expected a name, then a function of updates")
    probe = _Probe(measure)

    def init(params: Params) -> SnapshotState:
        return SnapshotState({measure_name: probe.begin(params)})

    def update(updates: Updates, state: SnapshotState, params: Params, **extra: Any) -> tuple[Updates, SnapshotState]:
        found = probe(updates, params, extra)
        return updates, SnapshotState({measure_name: _like(found, state.measurement[measure_name], measure_name)})

    return Transform(init, update, state=SnapshotState, forwards_to=[probe.takes()], rate=1.0)


# Several, and of all updates so far


@public_state
class MonitorState(NamedTuple):
    """The state of `monitor`.

    Example:
        >>> monitor({"norm": global_norm}).init(torch.ones(1))
        MonitorState(measurements={'norm': tensor(0.)}, measure_states=((),))
    """

    measurements: dict[str, Any]  # By name; zeros before the first update.
    measure_states: tuple[State, ...]  # Of the measures, in their order.


@remembered
def monitor(measures: Mapping[str, Any]) -> Transform:
    r"""Keep in the state what several measures say of the updates at this place of a chain; they pass.

    A measure is a function, as of `snapshot`, or what `measure_with_ema` makes of one. A penalty or the share of zeros
    is measured of the parameters: `lambda updates, params: l1(params)`; the loss, given to `update` as `value=`, by
    `lambda updates, params, value: value`.

    Args:
        measures: From name to measure. `state.measurements` has what they say, by name.

    Example:
        >>> tx = monitor({
        ...     "norm": global_norm,
        ...     "weights": lambda updates, params: l1(params),
        ...     "loss": measure_with_ema(lambda updates, params, value: value, 0.9),
        ... })
        >>> params, grads = {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([3.0, 4.0])}
        >>> updates, state = tx.update(grads, tx.init(params), params, value=torch.tensor(0.5))
        >>> state.measurements
        {'norm': tensor(5.), 'weights': tensor(3.), 'loss': tensor(0.5000)}
    """
    if not isinstance(measures, Mapping):
        raise TypeError(
            f"measures is {type_of(measures)}; expected a dict from name to measure, such as {{'norm': global_norm}}"
        )
    if not measures:
        raise ValueError("monitor got no measures; expected a dict from name to measure")
    made: dict[str, Measure] = {}
    for name, measure in measures.items():
        try:
            made[name] = _ready(measure)
        except TypeError as error:
            raise TypeError(f"at {name!r}: {error}") from error

    def init(params: Params) -> MonitorState:
        first = {name: measure.first(params) for name, measure in made.items()}
        return MonitorState(first, tuple([measure.begin(params) for measure in made.values()]))

    def update(updates: Updates, state: MonitorState, params: Params, **extra: Any) -> tuple[Updates, MonitorState]:
        if len(state.measure_states) != len(made):
            raise ValueError(
                f"monitor of {', '.join(made)} got a state of {len(state.measure_states)} measures; was it made by its "
                "init?"
            )
        found, after = {}, []
        for (name, measure), old in zip(made.items(), state.measure_states, strict=True):
            one, new = measure.update(updates, old, params, **measure.accepted(extra))
            found[name] = _like(one, state.measurements[name], name)
            after.append(new)
        return updates, MonitorState(found, tuple(after))

    return Transform(init, update, state=MonitorState, forwards_to=list(made.values()), rate=1.0)


@remembered
def measure_with_ema(
    measure: Callable[..., Any], decay: Scalar, debias: bool = True, accumulator_dtype: torch.dtype | None = None
) -> Measure:
    r"""The moving average of a measurement, for `monitor`: :math:`m_t = \beta m_{t-1} + (1 - \beta) x_t`.

    Bools are averaged as 0 and 1: a share of steps.

    Args:
        measure: Function, as of `snapshot`.
        decay: :math:`\beta`, at least 0 and below 1.
        debias: Whether to divide by :math:`1 - \beta^t`.
        accumulator_dtype: Dtype of the average; by default that of the measurement, float32 for 16-bit ones.

    Example:
        >>> tx = monitor({"clipped": measure_with_ema(lambda updates: global_norm(updates) > 1.0, 0.5)})
        >>> params = {"w": torch.zeros(1)}
        >>> state = tx.init(params)
        >>> for size in (2.0, 0.5):
        ...     updates, state = tx.update({"w": torch.tensor([size])}, state, params)
        >>> state.measurements
        {'clipped': tensor(0.3333)}
    """
    average, probe = ema(decay, debias, accumulator_dtype), _Probe(measure)

    def first(params: Params) -> Any:
        return _floats(probe.begin(params))

    def update(updates: Updates, state: State, params: Params, **extra: Any) -> tuple[Any, State]:
        found = _floats(probe(updates, params, extra))
        return average.update(found, state, found)

    return Measure(first, lambda params: average.begin(first(params)), update, probe.takes())


def _floats(tree: Any) -> Any:
    return tree_map(lambda x: x if x.is_floating_point() or x.is_complex() else x.to(torch.float32), tree)
