"""How many groups of families stay where they are tried out: about a half, all but a few, and as few as may be."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from funcreg.networks.families import Family, parts


class Attempts:
    """Ways to take groups out, with how many of each family stay.

    Args:
        families: The families.
        counts: The number of groups of each.
        tensors: All tensors of the network, by their names.
        holders: The module that holds each family.
        multiplied: Whether each family is of channels that are summed over, less of which alone are to be tried, too;
            none where that needs no attempt of its own.
    """

    def __init__(
        self,
        families: Sequence[Family],
        counts: Sequence[int],
        tensors: Mapping[str, Tensor],
        holders: Sequence[str],
        multiplied: Sequence[bool],
    ) -> None:
        self._families, self._counts, self._tensors = families, counts, tensors
        self._holders, self._multiplied = holders, multiplied
        self.least = [1] * len(families)  # How many groups of each stay, whatever is dead.

    def each(self, chosen: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The ways for these families, by their names."""
        yield "half", self.half(chosen)
        yield "all but a few", self._allowed(chosen, [self._most(i) for i in chosen])
        if self._multiplied and any([self._multiplied[i] for i in chosen]):
            # Less of queries and keys alone, which the same number of all would hide to be wrong.
            half = [n - n // 2 if self._multiplied[i] else n for i in chosen for n in [self._counts[i]]]
            yield "half of queries", self._allowed(chosen, half)
        # As few as may be left, too: a dimension of one entry is another thing to squeeze and to broadcasting.
        yield "one", self._allowed(chosen, [self.least[i] for i in chosen])

    def half(self, chosen: Sequence[int]) -> tuple[int, ...]:
        """A half of the groups of each family, of some less, so that layers come to differ in width."""
        # Those that are next to each other differ for every second i, and each second and each third of them, too.
        counts = [(self._counts[i], (i + i // 2) % 2) for i in chosen]
        return self._allowed(chosen, [max(1, n - n // 2 - (less if n > 3 else 0)) for n, less in counts])

    def all_but_one(self, chosen: Sequence[int]) -> tuple[int, ...]:
        """All groups of each family but one."""
        return self._allowed(chosen, [max(1, self._counts[i] - 1) for i in chosen])

    def _most(self, family: int) -> int:
        """All groups of a family but one, or a few, so that families of one module differ: one number may count all."""
        n, i = self._counts[family], self._places[family]
        return n - 1 - i % (n - 1) if n > 2 else max(1, n - 1 + i % 2)

    @functools.cached_property
    def _places(self) -> list[int]:
        """The place of each family among those with as many groups in its module."""
        kinds = list(zip(self._holders, self._counts, strict=True))
        return [kinds[:i].count(kind) for i, kind in enumerate(kinds)]

    def _allowed(self, chosen: Sequence[int], left: Sequence[int]) -> tuple[int, ...]:
        """How many groups of each family stay, more of the hidden units that a recurrent layer has projections of."""
        found = {i: min(self._counts[i], max(n, self.least[i])) for i, n in zip(chosen, left, strict=True)}
        for units, projections in self._projected:
            if units in found:
                found[units] = min(self._counts[units], max(found[units], 1 + found.get(*projections)))
        return tuple(found.values())

    @functools.cached_property
    def _projected(self) -> list[tuple[int, tuple[int, int]]]:
        """Families of hidden units, with that of their projections, and how many these are."""
        several: list[tuple[int, tuple[int, int]]] = []
        for name, w in self._tensors.items():
            if name.rpartition(".")[2] == "weight_hr_l0":
                dims = {parts(family[name])[0].dim: i for i, family in enumerate(self._families) if name in family}
                several += [(dims[1], (dims.get(0, -1), len(w)))] if 1 in dims else []
        return several
