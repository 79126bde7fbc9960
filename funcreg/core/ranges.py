"""Ranges of hyperparameters: numbers are checked where they are known, and nowhere else.

A number is known if it is a number of Python or numpy, or stands in a plain tensor on the CPU. It is not known while
a function is traced, batched or run on fake tensors, nor where reading it would wait for another device.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from funcreg.core.undocumented import is_traced, is_transformed
from funcreg.core.wording import type_of

_PLAIN = (Tensor, torch.nn.Parameter)
_INFINITY = math.inf
#: Whether a number is read to see whether it is in range, and for nothing else.
is_checking: ContextVar[bool] = ContextVar("is_checking", default=False)


def number(value: Any) -> Any:
    """A number of numpy, also one in an array without dimensions, as a number of Python; anything else as it is."""
    if isinstance(value, (Tensor, bool, int, float)) or getattr(value, "shape", None) != ():
        return value
    return value.item() if hasattr(value, "item") else value


def whole_number(name: str, value: Any, least: int = 1, hint: str = "") -> int:
    """A whole number of Python or numpy, or a ValueError for what is none, or is too small."""
    found = number(value)
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}{hint}")
    return found


def concrete(value: Any) -> Tensor | float | None:
    """A number, or a tensor whose entries are known here and now; else None, also for a schedule.

    Example:
        >>> concrete(0.5), concrete(torch.tensor(2.0)), concrete(torch.ones(2, device="meta"))
        (0.5, tensor(2.), None)
    """
    if isinstance(value, Tensor):
        return _read(value) if _known(value) else None
    value = number(value)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def known_true(x: Tensor) -> bool:
    """Whether all entries are true, and can be read: not while a function is traced or batched, or on a GPU.

    On the meta device nothing is left to be found.
    """
    known = concrete(x)
    return x.is_meta or (isinstance(known, Tensor) and bool(known.all()))


def is_readable(x: Tensor) -> bool:
    """Whether numbers may be read from a tensor here and now, also from another device, for which it then waits."""
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return type(x) in _PLAIN and x.device.type != "meta" and not capturing


def _read(value: Tensor) -> Tensor:
    token = is_checking.set(True)
    try:
        return value.detach()
    finally:
        is_checking.reset(token)


def _known(value: Tensor) -> bool:
    if is_traced() or type(value) not in _PLAIN or value.device.type != "cpu" or is_transformed(lambda: [value]):
        return False
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]  # It is documented.
        return False
    return value.layout == torch.strided and not value.is_quantized


def check_range(
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = _INFINITY,
    *,
    open_low: bool = False,
    open_high: bool = False,
    finite: bool = False,
    hint: str = "",
) -> None:
    """Raise an error if a number, or a tensor whose entries are known, lies outside a range; NaN lies outside of all.

    Args:
        name: What the value is called in the message.
        value: Number, tensor, schedule (which is left alone), or nested dicts, lists and tuples of them.
        low: Least value.
        high: Greatest value.
        open_low: Whether the least value itself is outside.
        open_high: Whether the greatest value itself is outside.
        finite: Whether infinities are outside too.
        hint: The likely cause, a sentence.

    Raises:
        TypeError: Not a number at all: a string, a bool, None, a complex number ...
        ValueError: Outside the range; the message names the place in a tree and the entry of a tensor.

    Example:
        >>> check_range("decay", {"head": 0.5, "body": torch.tensor([0.5, 1.0])}, 0, 1, open_high=True)
        Traceback (most recent call last):
        ValueError: decay at 'body' has the entry 1.0; expected numbers of at least 0 and below 1
    """
    if isinstance(value, (dict, list, tuple)):
        keys = getattr(value, "_fields", range(len(value)))
        items = value.items() if isinstance(value, dict) else zip(keys, value, strict=True)
        for key, child in items:
            if child is not None:  # A node without leaves.
                place = f"{name[:-1]}.{key}'" if name.endswith("'") else f"{name} at '{key}'"
                check_range(place, child, low, high, open_low=open_low, open_high=open_high, finite=finite, hint=hint)
        return
    several = False
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} is a tensor of {value.dtype}; expected real numbers")
        known = concrete(value)
        if not isinstance(known, Tensor) or not known.numel():
            return
        several = value.ndim > 0
        # Least and greatest entry: NaN is both. Large tensors are not read for an end that has no limit.
        ends: tuple[float, ...] = (known.amin().item(),) if several else (known.item(),)
        if several and (finite or open_high or high < _INFINITY):
            ends += (known.amax().item(),)
    else:
        plain = number(value)
        if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
            kind = getattr(value, "kind", None)
            if callable(value) and not isinstance(value, (type, torch.nn.Module)) and not isinstance(kind, str):
                return
            raise TypeError(f"{name} is {_described(value)}")
        ends = (plain if isinstance(plain, (int, float)) else float(plain),)
    for x in ends:
        above = x > low if open_low else x >= low
        below = x < high if open_high else x <= high
        if not (above and below) or (finite and math.isinf(x)):
            came = f"has the entry {x}" if several else f"is {x}"
            kind = "finite number" if math.isinf(x) or low == -high else "number"
            expected = f"{kind}s" if several else f"a {kind}"
            limits = _limits(low, high, open_low, open_high)
            raise ValueError(f"{name} {came}; expected {expected}{limits}{_cause(x, low, hint)}")


def _limits(low: float, high: float, open_low: bool, open_high: bool) -> str:
    least = "" if low == -_INFINITY else f" above {low:g}" if open_low else f" of at least {low:g}"
    most = "" if high == _INFINITY else f" below {high:g}" if open_high else f" of at most {high:g}"
    if least and most and not open_low and not open_high:
        return f" from {low:g} to {high:g}"
    return f"{least}{' and' if least and most else ''}{most}"


def _cause(x: float, low: float, hint: str) -> str:
    if hint:
        return f". {hint}"
    return ". Is a sign the wrong way round?" if x < 0 and low == 0 else ""


def _described(value: Any) -> str:
    """What a value is that is no number, what was expected, and where known, what to give instead."""
    expected, hint = "expected a number, a tensor, a schedule or a tree of them", ""
    kind = getattr(value, "kind", None)
    if isinstance(value, (str, bytes, bool, complex)) or value is None:
        came = repr(value)
    elif isinstance(kind, str):  # Before it is taken for a schedule, because it can be called.
        came, hint = f"the {kind} {getattr(value, '__name__', value)!s}", ". Are arguments in another order?"
    elif isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        came = f"the scheduler {type(value).__name__} of torch"
        hint = ". It changes an optimizer of torch; take a function of the number of steps, as cosine_decay_schedule is"
    elif isinstance(value, torch.optim.Optimizer):
        came = f"the optimizer {type(value).__name__} of torch"
    elif isinstance(value, torch.nn.Module):
        came = f"the module {type(value).__name__}"
    elif isinstance(value, type):
        came = f"the class {value.__name__}"
    elif hasattr(value, "__array__"):
        came, hint = "an array", ". Make a tensor of it with torch.as_tensor"
    else:
        came = type_of(value)
    return f"{came}; {expected}{hint}"


def flags(**given: Any) -> None:
    """Raise a TypeError for the first of these options that is not True or False."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; expected True or False")


def check_sign(name: str, value: Any) -> None:
    """Raise a ValueError if an entry of a tensor, or a number, is known to be below 0; NaN goes through."""
    known = concrete(value)
    if known is None or (isinstance(known, Tensor) and (known.is_complex() or not known.numel())):
        return
    if isinstance(known, Tensor) and known.ndim:
        least = known.amin().item()  # In one pass; NaN wherever there is one.
        if least != least:
            least = torch.where(known < 0, known, torch.zeros_like(known)).amin().item()
        if least < 0:
            raise ValueError(f"{name} has the entry {least}; expected numbers of at least 0{_cause(least, 0.0, '')}")
    elif known < 0:
        raise ValueError(f"{name} is {float(known)}; expected a number of at least 0{_cause(float(known), 0.0, '')}")


def scalars(**hyper: Any) -> tuple[Any, ...]:
    """Hyperparameters that are one number for all steps and leaves, those of numpy as numbers of Python.

    Raises:
        TypeError: One is a schedule or a tree.
    """
    for name, value in hyper.items():
        if callable(value) and not isinstance(value, type):
            raise TypeError(f"{name} is the function {value!r}; expected a number or a tensor. It follows no schedule.")
        if isinstance(value, (dict, list, tuple)):
            raise TypeError(f"{name} is {type_of(value)}; expected a number or a tensor, one for all leaves")
    return tuple(number(value) for value in hyper.values())


def single(**hyper: Any) -> None:
    """Raise an error for the first of these that is one number for no leaf alone: a tree, or a tensor with dimensions.

    A schedule is left alone.
    """
    for name, value in hyper.items():
        if isinstance(value, (dict, list, tuple)):
            raise TypeError(f"{name} is {type_of(value)}; expected one number or tensor for all leaves")
        if isinstance(value, Tensor) and value.ndim:
            raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}; expected one number for all entries")


def check_numbers(name: str, value: Any) -> None:
    """Raise a TypeError for what is no real number, tensor or tree of them, such as a string or a function."""
    if callable(value) and not isinstance(value, type):
        raise TypeError(f"{name} is {value!r}; expected a number or a tensor")
    if isinstance(value, (dict, list, tuple)):
        for child in value.values() if isinstance(value, dict) else value:
            check_numbers(name, child)
    elif not isinstance(value, (Tensor, numbers.Number)) and not hasattr(value, "__array__"):
        raise TypeError(f"{name} is {_described(value)}")


def ordered(w: Tensor) -> Tensor:
    """A real tensor as it is, or an error, because complex numbers have no order."""
    if w.is_complex():
        raise ValueError("it is complex; expected real numbers, which have an order")
    return w


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a ValueError for what is not the name of one of some choices."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
