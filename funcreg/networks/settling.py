"""Numbers in a smaller network that nobody knows, and the values with which its outputs are what they were."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any, TypeAlias

from torch import Tensor, nn

from funcreg.networks.agreement import Agreement, Failure
from funcreg.networks.stored import Stored, is_told_by_name, reading
from funcreg.networks.uses import Problem, idle

#: Which of the values that it may have to have a number got, by its place; None if it stayed.
Settled: TypeAlias = dict[tuple[str, str], int | None]


def kind_of(smaller: nn.Module, each: Stored) -> tuple[type, str]:
    return type(smaller.get_submodule(each.path)), each.attribute


def settle(
    smaller: nn.Module, unknown: list[Stored], problem: Problem, settled: Settled | None = None
) -> Failure | str | None:
    """Give numbers that nobody knows one choice of values after the other.

    First that of a network like this one, then the same for all layers of a type, then for each layer that fails by
    itself.

    Args:
        smaller: The network.
        unknown: The numbers.
        problem: What is wrong with it as it is now.
        settled: What numbers got in networks like it, to be tried first; what they get here is added.

    Returns:
        None once nothing is wrong, else what was wrong first.
    """
    asked = _Asked(smaller, unknown, problem)
    before = [(settled or {}).get((each.path, each.attribute), 0) for each in unknown]
    if any([i != 0 for i in before]):
        for each, i in zip(unknown, before, strict=True):
            each.assign(smaller, _value(each, i))
        if asked() is None:
            return None
    wrong = _settle_all(smaller, unknown, asked)
    if wrong is None and settled is not None:
        for each in unknown:
            now = [i for i, other in enumerate(each.others) if are_same([other], [each.now(smaller)])]
            settled[each.path, each.attribute] = now[0] if now else None
    return wrong


def _value(each: Stored, i: int | None) -> Any:
    return each.value if i is None or i >= len(each.others) else each.others[i]


class _Asked:
    """What is wrong with a network, found once for the same values of all numbers that were read until it failed.

    Args:
        smaller: The network.
        unknown: The numbers that have other values each time.
        problem: What is wrong with it as it is now.
    """

    def __init__(self, smaller: nn.Module, unknown: list[Stored], problem: Problem) -> None:
        self._smaller, self._unknown, self._problem = smaller, unknown, problem
        self._known: list[tuple[dict[int, Any], Failure | str | None]] = []
        self.read: Set[int] = frozenset()  # The numbers that the last result comes from, by their places,
        self.ever: set[int] = set()  # and that any did.

    def __call__(self) -> Failure | str | None:
        values = {i: each.now(self._smaller) for i, each in enumerate(self._unknown)}
        for before, wrong in self._known:
            if are_same([*before.values()], [values[i] for i in before]):
                self.read = before.keys()
                return wrong
        with reading(self._smaller, self._unknown) as read:
            wrong = self._problem()
        self._known.append(({i: value for i, value in values.items() if i in read}, wrong))
        self.read = frozenset(read)
        self.ever |= read.keys()
        return wrong


def _settle_all(smaller: nn.Module, unknown: list[Stored], asked: _Asked) -> Failure | str | None:
    """What is wrong first with the same values for all layers of a type, None if nothing is with some values."""
    first, kinds = None, list(dict.fromkeys([kind_of(smaller, each) for each in unknown]))
    places = [kinds.index(kind_of(smaller, each)) for each in unknown]
    failed, blamed = list[_Part](), list[_Part]()
    for choice in _in_turn(smaller, unknown, kinds, failed, blamed):
        for each, place in zip(unknown, places, strict=True):
            each.assign(smaller, _value(each, choice[place]))
        wrong = asked()
        if wrong is None:
            return None
        first = first or wrong
        part = {place: choice[place] for place in {places[i] for i in asked.read}}
        failed.append(part)
        if isinstance(wrong, Failure):
            around = [type(smaller.get_submodule(path)) for path in _around(wrong.path)]
            for kind in {kinds[place][0] for place in part} & {*around}:
                blamed.append({place: i for place, i in part.items() if kinds[place][0] is kind})
    return None if unknown and _settle_each(smaller, unknown, asked) else first


#: How many choices of numbers are tried, and among how many.
_TRIES, _CHOICES = 64, 1 << 14
#: What some kinds of numbers got, by their places.
_Part: TypeAlias = dict[int, "int | None"]


def _in_turn(
    smaller: nn.Module,
    unknown: list[Stored],
    kinds: list[tuple[type, str]],
    failed: Sequence[_Part],
    blamed: Sequence[_Part],
) -> Iterator[tuple[int | None, ...]]:
    """Choices for all kinds of numbers but those with what failed, and at last those with what a type failed with.

    Args:
        smaller: The network.
        unknown: The numbers.
        kinds: Their kinds.
        failed: What all the numbers got that were read until it failed; it grows.
        blamed: What of these is of one type, around what failed; it grows.
    """
    count = [max(len(each.others) for each in unknown if kind_of(smaller, each) == kind) for kind in kinds]
    has = lambda choice, parts: any([all([choice[k] == i for k, i in part.items()]) for part in parts])
    later: list[tuple[int | None, ...]] = []
    tries = 0
    for choice in itertools.islice(itertools.product(*[(*range(n), None) for n in count]), _CHOICES):
        if has(choice, failed):
            continue
        if has(choice, blamed):
            later.append(choice)
        elif tries < _TRIES:
            tries += 1
            yield choice
    for choice in later:
        if tries < _TRIES and not has(choice, failed):
            tries += 1
            yield choice


def _around(path: str) -> list[str]:
    """The names of a module and of those around it, from the inside."""
    names = path.split(".") if path else []
    return [".".join(names[:i]) for i in range(len(names), -1, -1)]


def _settle_each(smaller: nn.Module, unknown: list[Stored], problem: Problem) -> bool:
    """Whether nothing is wrong once the numbers of each module that fails are chosen by themselves."""
    here: dict[str, list[Stored]] = {}
    for each in unknown:
        here.setdefault(each.path, []).append(each)
    choices = {path: itertools.product(*[(*each.others, each.value) for each in own]) for path, own in here.items()}
    due = list(here)
    for _ in range(4 * _TRIES):
        for path in due:
            choice = next(choices[path], None)
            if choice is None:
                return False
            for each, value in zip(here[path], choice, strict=True):
                each.assign(smaller, value)
        wrong = problem()
        if not isinstance(wrong, Failure):
            return wrong is None
        due = [path for path in _around(wrong.path) if path in here][:1]
        if not due:
            return False
    return False


# What inputs do not tell

#: For each kind of numbers which of its values they have.
_Choice: TypeAlias = tuple[int, ...]
#: How many combinations of values are tried; beyond that one kind of numbers has other values at a time.
_COMBINED = 32
#: Up to how many numbers each is a kind of its own.
_FEW = 4
#: After how many other runs names tell, if nothing else did; and how few may be all that there are.
_ENOUGH, _FEWEST = 8, 4


def decide(
    smaller: nn.Module, unknown: list[Stored], problem: Problem, runs: Iterable[Iterable[Agreement]]
) -> list[Stored]:
    """Let numbers stay where outputs need no others. Where outputs do not tell, those of other runs do.

    What nothing tells stays as it was, but for numbers with the name of a width that changed.

    Args:
        smaller: A network in which nothing is wrong.
        unknown: The numbers that nobody knows in it.
        problem: What is wrong on the inputs that are given.
        runs: Other runs. Of each the first way counts in which outputs agree for some values.

    Returns:
        The numbers of which nothing tells what they are.
    """
    given = _Asked(smaller, unknown, problem)
    numbers, read = _Numbers(smaller, _in_kinds(smaller, unknown, given)), given.ever
    fits = [choice for choice in numbers.choices(given) if choice == numbers.found or numbers.agree(choice, given)]
    alike = [problem]  # Runs in which outputs are as they are to be.
    ran = 0  # How many other runs there were with outputs as they are to be.
    labels = lambda: {id(each) for i, each in enumerate(unknown) if i not in read and not each.near}
    for ways in runs if len(fits) > 1 else ():
        for agreement in ways:
            asked = _Asked(smaller, unknown, functools.partial(agreement.problem, smaller))
            same = [choice for choice in fits if numbers.agree(choice, asked)]
            read |= asked.ever
            if same:
                fits, ran = same, ran + 1
                alike += [functools.partial(agreement.problem, smaller)] if ran <= _ENOUGH else []
                break
        if (ran > _ENOUGH and not _open(*numbers.told(fits), ran, labels())) or len(fits) == 1:
            break
    numbers.assign(min(fits, key=lambda choice: sum([i > 0 for i in choice])))
    told, untold = numbers.told(fits)
    for each in untold:
        if (same := _elsewhere(each, told)) is not None:
            each.assign(smaller, same)
    found = _open(told, untold, ran, labels())
    unused = {id(each) for each in idle(smaller, numbers.values_of(found, fits), alike)} if found else set[int]()
    for each in unknown:
        each.share_again(smaller)
    return [each for each in found if id(each) not in unused]


def _open(told: list[tuple[Stored, Any]], untold: list[Stored], ran: int, labels: Set[int]) -> list[Stored]:
    """The numbers of which neither outputs tell what they are, nor names, nor the same number elsewhere.

    A count that did not matter in other runs is right as it is, as one by which what is left is repeated, and the name
    of a width may be of one that stays. Labels are numbers that nothing read in any run, and that no code of their
    module names.
    """
    several = [each for each in untold if not each.named and _elsewhere(each, told) is None]
    several = [each for each in several if id(each) not in labels]
    return [each for each in several if ran < _FEWEST or not is_told_by_name(each.attribute.rpartition(".")[2])]


def _in_kinds(smaller: nn.Module, unknown: list[Stored], problem: Problem) -> list[list[Stored]]:
    """The numbers by their kinds, and of each kind those that may stay apart from those that may not."""
    if len(unknown) <= _FEW:
        return [[each] for each in unknown]
    several: dict[Any, list[Stored]] = {}
    for each in unknown:
        several.setdefault(kind_of(smaller, each), []).append(each)

    def may_stay(kind: list[Stored]) -> bool:
        now = [each.now(smaller) for each in kind]
        for each in kind:
            each.assign(smaller, each.value)
        stays = problem() is None
        for each, value in zip(kind, now, strict=True):
            each.assign(smaller, value)
        return stays

    found: list[list[Stored]] = []
    for kind in several.values():
        stay = [True] * len(kind)
        if len(kind) > 1 and not may_stay(kind):
            stay = [i < _TRIES and may_stay([each]) for i, each in enumerate(kind)]
        parts = [[each for each, here in zip(kind, stay, strict=True) if here is one] for one in (True, False)]
        found += [part for part in parts if part]
    return found


class _Numbers:
    """Numbers of a network by their kinds, and the values that those of a kind may have."""

    def __init__(self, smaller: nn.Module, kinds: list[list[Stored]]) -> None:
        self.smaller, self.kinds = smaller, kinds
        self._values, found = [], list[int]()
        for kind in self.kinds:
            now = [each.now(smaller) for each in kind]
            old = [each.value for each in kind]
            most = max([len(each.others) for each in kind])
            more = [[(*each.others, *[each.value] * most)[i] for each in kind] for i in range(most)]
            # What is preferred where nothing tells comes first.
            first = [now, old] if all([each.named for each in kind]) else [old, now]
            values = list[list[Any]]()
            for some in (*first, *more):
                values += [] if any([are_same(some, other) for other in values]) else [some]
            self._values.append(values)
            found.append(next(i for i, some in enumerate(values) if are_same(some, now)))
        self.found: _Choice = tuple(found)

    def choices(self, given: Problem) -> list[_Choice]:
        """Choices of values, with those that the network has among them."""
        several = [list(range(len(values))) for values in self._values]
        if math.prod(map(len, several)) <= _COMBINED:
            return list(itertools.product(*several))
        base = self.found  # With as much of what is preferred as outputs allow.
        for k in range(len(base)):
            preferred = (*base[:k], 0, *base[k + 1 :])
            base = preferred if preferred != base and self.agree(preferred, given) else base
        beside = [[(*base[:k], i, *base[k + 1 :]) for i in values] for k, values in enumerate(several)]
        fits = [[one for one in some if one == base or self.agree(one, given)] for some in beside]
        if math.prod(map(len, fits)) <= _COMBINED:
            together = itertools.product(*[[one[k] for one in some] for k, some in enumerate(fits)])
            return list(dict.fromkeys([self.found, *together]))  # Each once: a single one is not tried out.
        return list(dict.fromkeys([self.found, base, *[one for some in fits for one in some]]))

    def agree(self, choice: _Choice, problem: Problem) -> bool:
        """Whether nothing is wrong with these values."""
        self.assign(choice)
        return problem() is None

    def assign(self, choice: _Choice) -> None:
        for kind, values, i in zip(self.kinds, self._values, choice, strict=True):
            for each, value in zip(kind, values[i], strict=True):
                each.assign(self.smaller, value)

    def values_of(self, several: Sequence[Stored], fits: Sequence[_Choice]) -> list[tuple[Stored, list[Any]]]:
        """Some of the numbers, with their values in these choices."""
        wanted, found = {id(each) for each in several}, list[tuple[Stored, list[Any]]]()
        for i, (kind, values) in enumerate(zip(self.kinds, self._values, strict=True)):
            places = sorted({choice[i] for choice in fits})
            found += [(each, [values[n][k] for n in places]) for k, each in enumerate(kind) if id(each) in wanted]
        return found

    def told(self, fits: Sequence[_Choice]) -> tuple[list[tuple[Stored, Any]], list[Stored]]:
        """The numbers that have one value in all of these choices, with it, and those that have not."""
        told, untold = list[tuple[Stored, Any]](), list[Stored]()
        for i, (kind, values) in enumerate(zip(self.kinds, self._values, strict=True)):
            if len({choice[i] for choice in fits}) > 1:
                untold += kind
            else:
                told += zip(kind, values[fits[0][i]], strict=True)
        return told, untold


def _elsewhere(each: Stored, told: Iterable[tuple[Stored, Any]]) -> Any:
    """The value of what is the same number, in a module and its configuration, or in one that modules share."""
    own = each.attribute.rpartition(".")[2]
    for other, value in told:
        if are_same([other.value], [each.value]) and other.attribute.rpartition(".")[2] == own:
            stays = other.shared is not None and other.shared is each.shared and are_same([value], [each.value])
            if stays or (other.path == each.path and any([are_same([value], [x]) for x in (each.value, *each.others)])):
                return value
    return None


def are_same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether values are equal; tensors are if they are the same."""
    same = lambda a, b: a is b or (not isinstance(a, Tensor) and type(a) is type(b) and a == b)
    return all(map(same, some, others))


def lengths(unknown: Sequence[Stored]) -> list[int]:
    """Sizes of inputs at which it matters which value some numbers have, if they cut something off."""
    values = [value for each in unknown for value in (each.value, *each.others) if isinstance(value, int)]
    return sorted({value + 1 for value in values})
