"""Whether code uses a number only where all its values do the same, so that nothing has to tell which it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from funcreg.networks.agreement import Failure
from funcreg.networks.stored import Stored, reading

#: What is wrong with a network in a run, None if nothing is.
Problem: TypeAlias = Callable[[], Failure | str | None]


def idle(
    smaller: nn.Module, several: Sequence[tuple[Stored, Sequence[Any]]], problems: Sequence[Problem]
) -> list[Stored]:
    """The numbers that were read in some runs, each time for what is the same with any of their values.

    That is a comparison, as in `if self.scale > 1`, or the end of a slice that takes all of a dimension that is as wide
    as the number may be, as in `x[:, : self.channels]`.

    Args:
        smaller: The network. Its numbers are the same afterwards.
        several: The numbers, with their values.
        problems: Runs, with what is wrong in them.
    """
    several = [(each, values) for each, values in several if {type(n) for n in (each.now(smaller), *values)} == {int}]
    plain, now = [each for each, _ in several], [each.now(smaller) for each, _ in several]
    used = [_Used.of(n, values) for n, (_, values) in zip(now, several, strict=True)]
    reads = [0] * len(plain)
    try:
        for each, number in zip(plain, used, strict=True):
            each.assign(smaller, number)
        for problem in problems:
            with reading(smaller, plain) as read, _Slices():
                if problem() is not None:
                    return []
            reads = [count + read[i] for i, count in enumerate(reads)]
    finally:
        for each, value in zip(plain, now, strict=True):
            each.assign(smaller, value)
    rows = zip(plain, used, reads, strict=True)
    return [each for each, number, count in rows if count and count == number.idle]


class _Used(int):
    """A number that counts how often it was used where all its values do the same."""

    values: tuple[int, ...]
    idle: int

    @classmethod
    def of(cls, now: int, values: Sequence[int]) -> _Used:
        made = cls(now)
        made.values, made.idle = (now, *values), 0
        return made

    def _same(self, function: Callable[..., Any], *others: Any) -> Any:
        found = [function(value, *others) for value in self.values]
        self.idle += found[0] is not NotImplemented and len(set(found)) == 1
        return found[0]

    def __bool__(self) -> bool:
        return self._same(int.__bool__)

    def __eq__(self, other: object) -> bool:
        return self._same(int.__eq__, other)

    def __ne__(self, other: object) -> bool:
        return self._same(int.__ne__, other)

    def __lt__(self, other: int) -> bool:
        return self._same(int.__lt__, other)

    def __le__(self, other: int) -> bool:
        return self._same(int.__le__, other)

    def __gt__(self, other: int) -> bool:
        return self._same(int.__gt__, other)

    def __ge__(self, other: int) -> bool:
        return self._same(int.__ge__, other)

    __hash__ = int.__hash__


class _Slices(TorchFunctionMode):
    """Counts the ends of slices that take all of a dimension with the width that a number may be."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            for n, part in _taken(*args):
                stop = part.stop
                if type(stop) is _Used and part.start in (None, 0) and part.step in (None, 1):
                    stop.idle += n <= int(stop) and n in stop.values
        return func(*args, **(kwargs or {}))


def _taken(x: Tensor, index: Any) -> Iterator[tuple[int, slice]]:
    """The slices of an index, each with the size of its dimension; none where it has tensors or lists."""
    parts = index if isinstance(index, tuple) else (index,)
    if any([isinstance(part, (Tensor, list, bool)) for part in parts]):
        return
    dim = 0
    for part in parts:
        if part is Ellipsis:
            dim = x.ndim - len([each for each in parts if each is not None and each is not Ellipsis]) + dim
        elif isinstance(part, slice):
            yield x.shape[dim], part
        dim += part is not None and part is not Ellipsis
