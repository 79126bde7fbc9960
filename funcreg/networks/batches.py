"""Whether a network computes with each example of a batch by itself, so that the first of them show what all do."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funcreg.core.tree import tree_leaves, tree_map
from funcreg.networks.agreement import Agreement, unequal, unlike


class Examples:
    """The first examples of batches, once a network was seen to give on them alone what it gives among all."""

    def __init__(self) -> None:
        self._all = self._first = 0  # How many there are, and how many are enough; none where that is not known.

    def enough(self, inputs: Any) -> Any:
        """The first examples of inputs, or all of them where it is not known that these are enough."""
        if not self._all or any([len(x) != self._all for x in _batches(inputs)]):
            return inputs
        return tree_map(lambda x: x[: self._first] if isinstance(x, Tensor) else x, inputs)

    def compare(self, several: Agreement, few: Agreement) -> None:
        """Know how many examples are enough, if a network has the second outputs on the first of some inputs."""
        every, first = (_batches(each.inputs) for each in (several, few))
        n, m = len(every[0]) if every else 0, len(first[0]) if first else 0
        if not 0 < m < n or any([len(x) != n for x in (*every, *_batches(several.expected))]):
            return
        of_first = [x[:m] for x in every]
        if unlike(of_first, first) or not all(map(_same, of_first, first)):
            return
        expected = [x[:m] for x in several.expected]
        if unlike(expected, few.expected) is None and unequal(expected, few.expected, several.rounding) is None:
            self._all, self._first = n, m


def _batches(several: Any) -> list[Tensor]:
    """Tensors whose first dimension is one of examples, all with a size along it."""
    return [x if x.ndim else x[None][:0] for x in tree_leaves(several) if isinstance(x, Tensor)]


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())
