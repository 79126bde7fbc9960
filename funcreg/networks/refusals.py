"""Why a network does not run without some of its channels, in words: what fails, whose code is to blame, the remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from funcreg.core.masks import listed
from funcreg.core.wording import with_article
from funcreg.networks.agreement import Failure
from funcreg.networks.stored import Stored, is_count, unknown_counts

#: What errors say of the last trial.
ONE_LEFT, SOME_GONE = "with one of these channels left", "without some of these channels"


class Refusal(NamedTuple):
    """What goes wrong without some groups."""

    reason: str
    path: str  # The module whose code is to blame.
    of_one: bool  # Whether one group of each family was left.


def reason(
    module: nn.Module,
    smaller: nn.Module,
    wrong: Failure | str,
    unknown: Sequence[Stored],
    path: str,
    how: str,
    run: Callable[[], Any] | None,
) -> str:
    """What is wrong with a smaller network, what the module whose code is to blame holds, and the remedy.

    Args:
        module: The whole network.
        smaller: The smaller one.
        wrong: What is wrong with it.
        unknown: Numbers in it that no rule knows.
        path: The module whose code is to blame.
        how: How many channels are left.
        run: Runs the smaller one; None where several families are tried out together.
    """
    what = f"{how} the network fails {wrong}" if isinstance(wrong, Failure) else wrong
    if how == ONE_LEFT:
        what = what if isinstance(wrong, Failure) else f"{how} {wrong}"
        return f"{what}. Let its forward name the dimensions that squeeze takes away, x.flatten(1) or x.squeeze(-1)"
    if here := [each for each in unknown if each.path == path] or list(unknown):
        holds = f"{_stores(smaller, here)}, and no other numbers there make it run"
        holds += "" if run is None else _divided(smaller, here, run)
    else:
        numbers = unknown_counts(module, smaller, path)
        such = f" ({listed([f'{name}={value}' for name, value in numbers.items()])})" if numbers else ""
        holds = f"{named(module, path)} may have a width or a count as a number of its own{such}, or in its code"
    kind = type(module.get_submodule(path)).__name__
    return (
        f"{what}; {holds}. Let its forward take widths from the shapes of tensors (x.flatten(1), x.shape, -1 in a "
        f"view), or give rules={{{kind}: function}} to channel_groups and resized"
    )


def _divided(smaller: nn.Module, several: Sequence[Stored], run: Callable[[], Any]) -> str:
    """That the code divides a number by a count, as a width that stays for the width of a head, if it does."""
    is_one = lambda each: type(each.value) is int and is_count(each.attribute.rpartition(".")[2])
    several = [each for each in several if each.others]
    for each in several:  # So that it comes as far as it may.
        each.assign(smaller, each.others[0])
    for each in filter(is_one, several):
        count = _Divisor(each.others[0])
        each.assign(smaller, count)
        run()
        each.assign(smaller, each.others[0])
        if count.divided:
            what = f"{count.divided[0]} by {each.attribute}"
            return f", for its code divides {what}, which gives another number where some are gone"
    return ""


class _Divisor(int):
    """A number that keeps what is divided by it."""

    def __new__(cls, value: int) -> _Divisor:
        made = super().__new__(cls, value)
        made.divided = []
        return made

    divided: list[int]

    def __rfloordiv__(self, other: int) -> int:
        self.divided.append(other)
        return other // int(self)


def line(error: Exception) -> str:
    said = str(error).strip().partition("\n")[0]
    return said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"


def named(module: nn.Module, path: str) -> str:
    kind = type(module.get_submodule(path)).__name__
    return f"{path!r}, {with_article(kind)}," if path else f"{kind}, the network itself,"


def _stores(module: nn.Module, several: Sequence[Stored]) -> str:
    """Which module stores which numbers."""
    path = several[0].path
    show = lambda x: f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"{x!r}"
    stored = [f"{x.attribute}={show(x.value)}" for x in several if x.path == path]
    return f"{named(module, path)} stores {listed(stored)}"


def around(module: nn.Module, path: str) -> str:
    """The innermost module around a place that is none of torch's own."""
    while path and type(module.get_submodule(path)).__module__.startswith("torch.nn."):
        path = path.rpartition(".")[0]
    return path
