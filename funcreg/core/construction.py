"""Objects that remember the call that made them: they print as it was written, and pickle as that call."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Set
from types import FunctionType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from funcreg.core.ranges import concrete
from funcreg.core.undocumented import is_compiling

P = ParamSpec("P")
T = TypeVar("T")


#: So many entries of a list or a dict among the arguments of a call are printed, or else only some.
MOST = 12
#: So many of a list of dicts, and of each of those.
_MOST_NESTED = 3


class Call(NamedTuple):
    """A function and what it was called with."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name, defaults among them."""
        bound = inspect.signature(self.function).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return bound.arguments

    @property
    def name(self) -> str:
        return self.function.__name__

    def __str__(self) -> str:
        given = [written(arg, MOST) for arg in self.args]
        given += [f"{name}={written(arg, MOST)}" for name, arg in self.kwargs.items()]
        return f"{self.name}({', '.join(given)})"


class Remembering:
    """What is made of closures by public functions, and remembers which one made it, with which arguments."""

    made_by: Call | None = None
    #: What errors call it where a number or a schedule is expected; None for what may be a schedule.
    kind: str | None = None

    def __repr__(self) -> str:
        return object.__repr__(self) if self.made_by is None else str(self.made_by)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By default, closures and all: pickle then says which of them it cannot write.
        return super().__reduce_ex__(protocol) if self.made_by is None else (_call, tuple(self.made_by))


def _call(function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    return function(*args, **kwargs)


def transforms_in(value: Any) -> list[Any]:
    """The transforms among some arguments."""
    if isinstance(value, Remembering):
        return [value] if value.kind == "transform" else []
    several = isinstance(value, (list, tuple)) and not hasattr(value, "_fields")
    values = value.values() if isinstance(value, dict) else value if several else ()
    return [each for part in values for each in transforms_in(part)]


def held_tensors(value: Any) -> list[Tensor]:
    """The tensors that something was made with: those in penalties, sums of them, and containers of both."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in _parts(value)[1] for tensor in held_tensors(part)]


def tells_all(value: Any) -> bool:
    """Whether `held_tensors` finds every tensor that something was made with: no function may hold another."""
    if isinstance(value, FunctionType):
        return not (value.__closure__ or value.__defaults__ or value.__kwdefaults__)
    if isinstance(value, Remembering) and value.made_by is not None:
        return tells_all(value.made_by[1:])
    if isinstance(value, Remembering):
        made = value.__reduce_ex__(4)
        return isinstance(made, str) or (len(made) == 2 and tells_all(made[1]))
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        return all(map(tells_all, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (Tensor, int, float, str, type, re.Pattern, torch.dtype, torch.device))


def made_with(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Something made again, with other tensors in the order of `held_tensors`."""
    if isinstance(value, Tensor):
        return next(tensors)
    make, parts = _parts(value)
    return make([made_with(part, tensors) for part in parts]) if held_tensors(parts) else value


def _parts(value: Any) -> tuple[Callable[[list[Any]], Any], list[Any]]:
    """What something is made of, and how."""
    if isinstance(value, Remembering):  # As it pickles: a name, or a function and its arguments.
        made = value.__reduce_ex__(4)
        return (lambda parts: value, []) if isinstance(made, str) else (lambda parts: made[0](*parts), list(made[1]))
    if isinstance(value, dict):
        return lambda parts: type(value)(zip(value, parts, strict=True)), list(value.values())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return lambda parts: type(value)(*parts), list(value)
    if isinstance(value, (tuple, list)):
        return type(value), list(value)
    return lambda parts: value, []


#: Arguments of torch's optimizers: what tells that a function has something like it, and what it is called here.
_TORCHS = {
    "lr": ("learning_rate", "learning_rate"),
    "betas": ("b1", "b1 and b2"),
    "weight_decay": ("learning_rate", "a link of its own: with_weight_decay(tx, kind, weight_decay), or adamw"),
    "alpha": ("decay", "decay"),
}


def torchs(names: Set[str]) -> dict[str, str]:
    """What a function with parameters of these names calls arguments of torch's optimizers, if it makes one."""
    return {
        theirs: ours
        for theirs, (needed, ours) in _TORCHS.items()
        if theirs not in names and {"learning_rate", needed} <= names
    }


def remembered(function: Callable[P, T]) -> Callable[P, T]:
    """Let what a function returns, a `Remembering`, remember this call."""
    elsewhere = torchs(frozenset(inspect.signature(function).parameters))

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> T:
        for theirs, ours in elsewhere.items():
            if theirs in kwargs:
                raise TypeError(f"{function.__name__} got {theirs}=, as in torch.optim; here that is {ours}")
        made = function(*args, **kwargs)
        # What hands an argument through did not make it. A compiler needs neither name nor pickle.
        if isinstance(made, Remembering) and not is_compiling() and all(made is not arg for arg in args):
            made.made_by = Call(make, args, kwargs)
        return made

    return make


def written(value: Any, most: int | None = None) -> str:
    """A value about as it is written in code; where a list or dict has more entries than so many, the first of them."""
    if isinstance(value, Tensor):
        known = None if value.ndim else concrete(value)  # Not where it is batched, or lies on another device.
        return f"tensor of {tuple(value.shape)}" if known is None else f"tensor({known:g})"
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        if most is not None and any([isinstance(each, dict) for each in value]):
            most = _MOST_NESTED  # As of families of leaves, of which one shows what the others are.
        inner = _some([written(each, most) for each in value], most)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    if isinstance(value, dict):
        return "{" + _some([f"{key!r}: {written(each, most)}" for key, each in value.items()], most) + "}"
    if isinstance(value, Remembering) and value.made_by is not None:
        return repr(value)
    return value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value)


def _some(entries: list[str], most: int | None) -> str:
    if most is not None and len(entries) > most:
        entries = [*entries[: most // 2], f"... {len(entries) - most // 2} more"]
    return ", ".join(entries)
