"""The hyperparameters of a param group, and the tensors through which chains see them.

A chain is made once and holds tensors, into which the numbers of the group are written before a step. What a factory
computes from these tensors is noted while it runs, and computed again when a number has changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcreg.core.construction import held_tensors, tells_all, written
from funcreg.core.leafwise import scalar_device
from funcreg.core.ranges import is_checking, number
from funcreg.core.tree import dotted, leaf_paths, restored, structure
from funcreg.core.undocumented import is_transformed

T = TypeVar("T")
#: What makes a number of Python of a tensor.
_CONVERSIONS = {
    *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__format__", "__repr__", "__str__"),
    *("arange", "linspace", "logspace", "nonzero", "masked_select", "unique"),  # Their shapes depend on values.
    *("__array__", "__bool__", "__complex__", "__float__", "__index__", "__int__"),
}


class GroupValues:
    """The hyperparameters of a group, and the tensors through which chains see them.

    Args:
        given: Hyperparameters by the factory's names.
        rate: Which of them is the learning rate, if there is one.
        params: The parameters of the group.
    """

    def __init__(self, given: dict[str, Any], rate: str | None, params: list[Tensor]) -> None:
        for name, value in given.items():
            _check_value(name, value)
        leaves, self._spec = structure(given)
        self._paths = leaf_paths(given)
        self._last = [_plain_number(x, None) for x in leaves]
        self._now = self._last
        # What stands between two that were checked is in the same range; a learning rate may fall to 0.
        falls = [path[0] == rate for path in self._paths]
        known = [_known(x) for x in self._last]
        self._least = [min(x, 0.0) if f and x is not None else x for x, f in zip(known, falls, strict=True)]
        self._most = known
        device = scalar_device(params)  # So that a step on a GPU does not wait for the CPU.
        self._held = [_held(x, device) for x in self._last]
        self._first = [p.device for p in params[:1]]
        self._derived: list[_Derived] = []
        self._converted: dict[int, Any] = {}  # Which values the factory made numbers of, and these numbers.
        self._read: frozenset[int] = frozenset()  # Of which it made something that is still there.

    def made(self, factory: Callable[[dict[str, Any]], T]) -> T:
        """What a factory makes of the values, with tensors for floats; what it computes of these follows them."""
        with _FactoryCall(self._held) as call:
            made = factory(restored(self._spec, self._held))
        self._derived = call.lasting()
        self._converted = {i: _single(self._last[i]) for i in sorted(call.converted)}
        self._read = call.converted.union(*[call.sources_of(each.result()) for each in self._derived])
        return made

    def unread(self, made: Any) -> list[str]:
        """The names of values, in tensors, of which nothing is in what the factory made, as far as that is known."""
        if not tells_all(made):
            return []
        held = {id(x) for x in held_tensors(made)}
        rows = [(path[0], i, x) for i, (path, x) in enumerate(zip(self._paths, self._held, strict=True))]
        read = {name for name, i, x in rows if i in self._read or id(x) in held}
        return [
            name for name in dict.fromkeys([str(n) for n, _, x in rows if isinstance(x, Tensor)]) if name not in read
        ]

    def readable(self) -> dict[str, Any]:
        """The values as a factory gets them, but floats on the CPU, where their ranges are checked."""
        return restored(self._spec, [_held(x, torch.device("cpu")) for x in self._now])

    def lost(self) -> list[str]:
        """The names of values of which the factory made numbers that they are no longer."""
        return [dotted(self._paths[i]) for i, old in self._converted.items() if _single(self._now[i]) != old]

    def fits(self, given: dict[str, Any], params: list[Tensor]) -> bool:
        """Whether other values differ in numbers alone, which are kept until they are written."""
        leaves, spec = structure(given)
        if spec != self._spec or self._first != [p.device for p in params[:1]]:
            return False
        self._now = list(map(_plain_number, leaves, self._last))
        return all([_is_like(x, y) for x, y in zip(self._now, self._last, strict=True)])

    def unchecked(self) -> bool:
        """Whether a number left the range of those that were checked."""
        rows = zip(map(_known, self._now), self._least, self._most, strict=True)
        return any([x is not None and not low <= x <= high for x, low, high in rows])

    def check(self) -> None:
        """Take all numbers for checked."""
        known = list(map(_known, self._now))
        self._least = [x if x is None else min(x, low) for x, low in zip(known, self._least, strict=True)]
        self._most = [x if x is None else max(x, high) for x, high in zip(known, self._most, strict=True)]

    def write(self) -> None:
        """Write what changed into the tensors, and into what was computed from them."""
        changed = False
        for i, (new, old, held) in enumerate(zip(self._now, self._last, self._held, strict=True)):
            if isinstance(new, float):
                changed = changed or new != old
                self._last[i] = new
            elif isinstance(new, Tensor) and held is not new:
                changed = True  # It may be changed in place.
        if not changed:
            return
        for new, held in zip(self._now, self._held, strict=True):
            if isinstance(new, float):
                held.fill_(new)  # Also if it is what it was: the factory may have written into the tensor.
            elif isinstance(new, Tensor) and held is not new:
                held.copy_(new)
        for each in self._derived:
            each.compute()


class _Derived(NamedTuple):
    """What a factory computed from values, and how."""

    result: weakref.ref[Tensor]
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    item: int | None = None  # Which of several results it is.
    is_view: bool = False  # Which sees new numbers itself; its arguments are kept.

    def compute(self) -> None:
        place = self.result()
        if place is None or self.is_view:
            return
        made = self.function(*self.args, **self.kwargs)
        if made is not None:  # As of `x[0] = lr`, which has written.
            place.copy_(made if self.item is None else made[self.item])


class _FactoryCall(TorchFunctionMode):
    """Notes, while a factory runs, what it computes from some tensors, and of which it makes numbers."""

    def __init__(self, values: list[Any]) -> None:
        super().__init__()
        tensors = [(i, x) for i, x in enumerate(values) if isinstance(x, Tensor)]
        self._sources = {id(x): (weakref.ref(x), frozenset([i])) for i, x in tensors}
        self._derived: list[_Derived] = []
        self.converted: frozenset[int] = frozenset()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if is_checking.get():
            return result
        given = list(_tensors((args, kwargs)))
        sources = frozenset().union(*map(self.sources_of, given))
        if not sources:
            return result
        name = getattr(func, "__name__", "")
        if is_transformed() or name in _CONVERSIONS:
            self.converted |= sources
        elif name == "__setitem__":
            self._note(args[0], sources, _Derived(weakref.ref(args[0]), func, tuple(args), kwargs))
        elif name == "__deepcopy__":  # Which looks up what it made before.
            self._note(result, sources, _Derived(weakref.ref(result), torch.clone, args[:1], {}))
        elif isinstance(result, (Tensor, tuple, list)):
            single = isinstance(result, Tensor)
            memory = [x.untyped_storage().data_ptr() for x in given]
            for item, x in enumerate([result] if single else result):
                if isinstance(x, Tensor):
                    is_view = all([x is not y for y in given]) and x.untyped_storage().data_ptr() in memory
                    made = _Derived(weakref.ref(x), func, tuple(args), kwargs, None if single else item, is_view)
                    self._note(x, sources, made)
        return result

    def _note(self, x: Tensor, sources: frozenset[int], made: _Derived) -> None:
        self._sources[id(x)] = (weakref.ref(x), sources)
        self._derived.append(made)

    def sources_of(self, x: Tensor | None) -> frozenset[int]:
        """Of which values a tensor was computed."""
        known, sources = self._sources.get(id(x), (None, frozenset[int]()))
        return sources if known is not None and known() is x else frozenset()

    def lasting(self) -> list[_Derived]:
        """What was computed and is still there, in order: the chain holds it, or what was computed from it."""
        found: list[_Derived] = []
        while self._derived:
            last = self._derived.pop()  # With the last reference to its arguments, if its result is gone.
            if last.result() is not None:
                found.append(last)
        return found[::-1]


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of a function of torch."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _single(value: Any) -> Any:
    """A value as a number of Python."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _plain_number(value: Any, old: Any) -> Any:
    """A number as one of Python; a whole one that takes the place of a float as a float."""
    if type(value) is float:
        return value
    value = number(value)
    return float(value) if isinstance(value, float) or (type(value) is int and isinstance(old, float)) else value


def _known(value: Any) -> Any:
    """The number of a hyperparameter that changes, where it is known."""
    if isinstance(value, Tensor):
        return value.item() if not value.ndim and value.device.type == "cpu" else None
    return value if isinstance(value, float) else None


def _held(value: Any, device: torch.device) -> Any:
    """What a factory gets for a value: a tensor for a float, in the precision that it has in Python."""
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64, device=device)
    return value.detach().clone() if isinstance(value, Tensor) and not value.ndim else value


def _is_like(new: Any, old: Any) -> bool:
    """Whether one value of a hyperparameter can take the place of another without a new chain."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        return new is old or (new.ndim == old.ndim == 0 and new.dtype == old.dtype and new.device == old.device)
    if isinstance(new, float) or isinstance(old, float):
        return type(new) is type(old)
    return type(new) is type(old) and (new is old or bool(new == old))


def _check_value(name: str, value: Any) -> None:
    for leaf in structure(value)[0]:
        if not isinstance(number(leaf), (Tensor, float, int, str)):
            hint = ""
            if callable(leaf):
                hint = (
                    ". A schedule belongs in the factory, where it counts the steps of the chain, and so does a mask "
                    "or a penalty; a scheduler of torch changes lr in the groups"
                )
            raise TypeError(
                f"{name} is {written(leaf)}; expected a number, a tensor, a string, or dicts and tuples of them, which "
                f"are saved with the group{hint}"
            )
