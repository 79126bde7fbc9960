"""Which families are to blame where a network does not run without groups of all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from funcreg.networks.refusals import Refusal
from funcreg.networks.trying import Trial


def refused(trial: Trial, joined: Sequence[int] = ()) -> tuple[dict[int, str], list[tuple[int, ...]]]:
    """The families without which the network does not run, by their numbers, with the reason.

    Those of numbered layers that are alike are tried together, and apart only where that fails.

    Args:
        trial: Whether it runs.
        joined: Families that may become one with others.

    Returns:
        The reasons, and sets of families among those refused that go if as many groups of each do: no more is tried
        once there are some.
    """
    kinds: dict[Any, list[int]] = {}
    for i in range(len(trial.families)):
        kinds.setdefault(_kind(trial, i), []).append(i)
    search = _Search(trial, joined)
    search.find(list(kinds.values()))
    return search.reasons, search.together


def _kind(trial: Trial, i: int) -> frozenset[str]:
    """The leaves of a family but for the numbers of layers."""
    return frozenset(map(_numbered, trial.families[i]))


class _Search:
    """Divides kinds of families until each of them runs, or is refused."""

    def __init__(self, trial: Trial, joined: Sequence[int] = ()) -> None:
        self._trial, self._stage, self._joined = trial, trial.stage, joined
        self._known: dict[Any, Refusal | None] = {}
        self.reasons: dict[int, str] = {}
        self.together: list[tuple[int, ...]] = []
        self._alike: dict[Any, bool] = {}  # Whether families run as one.

    def find(self, kinds: list[list[int]]) -> None:
        """Refuse families until the network runs without all others.

        Which are to blame is looked for where all together failed alone, for that is one trial of many.
        """
        while kinds and (problem := self._trial.problem(_families(kinds))) is not None:
            self._stage, before = self._trial.stage, (len(self.reasons), len(self._trial.needs_two))
            kinds = self._running(kinds, problem)
            if before == (len(self.reasons), len(self._trial.needs_two)):  # As where outputs are not always the same.
                self.reasons.update(dict.fromkeys(_families(kinds), problem.reason))
                return
            self.together = list(self._as_one())
            if self.together:
                return

    def _as_one(self) -> Iterator[tuple[int, ...]]:
        """Families among those refused that run if as many groups of each go, as where a number counts all of them.

        They are of one module, where a family of its own for queries and keys, for what mixes scores, and for values
        has a group for each head. Of modules in numbered layers that are alike the first is tried.
        """
        several: dict[tuple[str, int], list[int]] = {}
        for i in [i for i in self._joined if i in self.reasons]:
            several.setdefault((self._trial.holder(i), self._trial.counts[i]), []).append(i)
        for some in several.values():
            kinds: dict[Any, list[int]] = {}
            for i in some:
                kinds.setdefault(_kind(self._trial, i), []).append(i)
            for here in (some, *kinds.values()):
                kind = tuple([_kind(self._trial, i) for i in here])
                if len(here) > 1 and kind not in self._alike:
                    self._alike[kind] = self._trial.runs_alike(here)
                if self._alike.get(kind):
                    yield tuple(here)
                    break

    def _problem(self, chosen: list[int]) -> Refusal | None:
        """What goes wrong without some families, which is not tried a second time."""
        key = self._stage, tuple(chosen), tuple([self._trial.least[i] for i in chosen])
        if key not in self._known:
            self._known[key] = self._trial.problem(chosen, self._stage)
        return self._known[key]

    def _running(self, kinds: list[list[int]], problem: Refusal | None = None) -> list[list[int]]:
        """Those of some kinds of families without which the network runs; all others are refused.

        Args:
            kinds: Families by their kinds.
            problem: What goes wrong without all of them, if that is known.
        """
        problem = problem or (self._problem(_families(kinds)) if kinds else None)
        if problem is None:
            return kinds
        if len(kinds) == 1:
            return self._apart(kinds[0], problem)
        first, second = map(self._running, self._divided(kinds, problem))
        if first and second and self._problem(_families(first + second)) is not None:
            return [*first, *self._beside(first, second)]
        return first + second

    def _divided(self, kinds: list[list[int]], problem: Refusal) -> tuple[list[list[int]], list[list[int]]]:
        """Some kinds in two parts, those that have leaves in layers like the one that failed in the second."""
        families, inside = self._trial.families, f"{_numbered(problem.path)}." if problem.path else ""
        blamed = [any([_numbered(name).startswith(inside) for name in families[kind[0]]]) for kind in kinds]
        if all(blamed) or not any(blamed):
            return kinds[: len(kinds) // 2], kinds[len(kinds) // 2 :]
        first, second = (
            [kind for kind, here in zip(kinds, blamed, strict=True) if here is one] for one in (False, True)
        )
        return first, second

    def _apart(self, kind: list[int], problem: Refusal) -> list[list[int]]:
        """What runs of one kind. Where the first and the last fail alike, all do."""
        if self._trial.runs_with_two(kind, problem, self._stage):
            return [kind]
        if len(kind) == 1:
            self.reasons[kind[0]] = problem.reason
            return []
        first, last = (self._problem([i]) for i in (kind[0], kind[-1]))
        if first is not None and last is not None and (alike := _alike(first.reason, last.reason)) is not None:
            self.reasons.update(dict.fromkeys(kind, alike))
            return []
        return self._running([kind[: len(kind) // 2], kind[len(kind) // 2 :]], problem)

    def _beside(self, first: list[list[int]], second: list[list[int]]) -> Iterator[list[int]]:
        """Those of some kinds that run, with which others do not run all together."""
        taken = _families(first)
        for kind in second:
            problem = self._problem([*taken, *kind])
            if problem is None:
                taken += kind
                yield kind
            else:
                self.reasons.update(dict.fromkeys(kind, problem.reason))


def _families(kinds: list[list[int]]) -> list[int]:
    return [i for kind in kinds for i in kind]


#: The number of a layer in a name, or of entries in a shape.
_NUMBER = re.compile(r"\d+")


def _numbered(name: str) -> str:
    """What names have in common but for numbers."""
    return _NUMBER.sub("*", name)


def _alike(one: str, other: str) -> str | None:
    """Two texts as one, with stars for the numbers by which alone they differ; None if they differ otherwise."""
    if _numbered(one) != _numbered(other):
        return None
    numbers = zip(_NUMBER.findall(one), _NUMBER.findall(other), strict=True)
    stars = iter([a if a == b else "*" for a, b in numbers])
    return _NUMBER.sub(lambda _: next(stars), one)
