"""Which channel each entry of each tensor belongs to, as sets of atoms that are joined while a network is followed.

Every index of every dimension of a parameter is an atom. What an operation computes carries the atoms of what it is
computed from; atoms whose entries can only go together are joined, and atoms that cannot go are closed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

UNKNOWN = math.nan


class Component(NamedTuple):
    """Atoms of the entries of a tensor.

    A tensor has several if its entries go by several of their dimensions, as those of a matrix do.
    """

    ids: Tensor  # With as many dimensions as the tensor, of size 1 where the atom is the same all along.
    dead: float  # What an entry is at every input once its channel is zero, nan if that is not one number.

    @property
    def dims(self) -> set[int]:
        """The dimensions along which the atoms differ."""
        return {dim for dim, size in enumerate(self.ids.shape) if size > 1}


class Atoms:
    """Disjoint sets of atoms. Atom 0 stands for entries that belong to no channel, and is closed."""

    def __init__(self) -> None:
        self.parents = torch.zeros(1, dtype=torch.int64)
        self.reasons: list[str] = ["entries of no channel"]
        self._closed: list[tuple[Tensor, int]] = [(torch.zeros(1, dtype=torch.int64), 0)]
        self._read: list[Tensor] = []
        self._written: list[Tensor] = []
        self._computed: list[tuple[Tensor, Tensor]] = []

    def new(self, count: int) -> Tensor:
        first = len(self.parents)
        made = torch.arange(first, first + count)
        self.parents = torch.cat([self.parents, made])
        return made

    def find(self, ids: Tensor) -> Tensor:
        """The atom that stands for the set of each atom."""
        while True:
            above = self.parents[ids]
            if torch.equal(above, ids):
                return ids
            ids = above

    def join(self, one: Tensor, other: Tensor, reason: str) -> None:
        """Join atoms pairwise; what meets no atom is closed."""
        a, b = torch.broadcast_tensors(self.find(one), self.find(other))
        a, b = a.reshape(-1), b.reshape(-1)
        none = (a == 0) ^ (b == 0)
        if none.any():
            self.close(torch.maximum(a, b)[none], reason)
        joined = (a != b) & ~none
        a, b = a[joined], b[joined]
        while len(a):
            low, high = torch.minimum(a, b), torch.maximum(a, b)
            self.parents.scatter_reduce_(0, high, low, "amin")
            a, b = self.find(a), self.find(b)
            apart = a != b
            a, b = a[apart], b[apart]

    def close(self, ids: Tensor, reason: str) -> None:
        """Keep these atoms, and all that is or will be joined to them."""
        self.reasons.append(reason)
        self._closed.append((ids.reshape(-1), len(self.reasons) - 1))

    def read(self, ids: Tensor) -> None:
        """Note that a contraction runs over these atoms of a weight."""
        self._read.append(ids.reshape(-1))

    def write(self, ids: Tensor) -> None:
        """Note that what is computed has these atoms of a weight."""
        self._written.append(ids.reshape(-1))

    def compute(self, ids: Tensor, others: Iterable[Tensor]) -> None:
        """Note that what reads or has these atoms of a computed weight does so with others that it is computed from."""
        self._computed += [(ids, other) for other in others if other is not ids]

    def marked(self) -> tuple[Tensor, Tensor]:
        """For each atom whether a contraction runs over it, and whether something has it that is computed."""
        return self._marks(self._read), self._marks(self._written)

    def _marks(self, several: Sequence[Tensor]) -> Tensor:
        marks = torch.zeros(len(self.parents), dtype=torch.bool)
        for ids in several:
            marks[ids] = True
        for ids, other in reversed(self._computed):  # From what is computed last to what it is computed from.
            here, there = torch.broadcast_tensors(ids, other)
            marks[there[marks[here]]] = True
        return marks

    def closed(self) -> Tensor:
        """For each set, at the atom that stands for it, the number of the first reason why it is closed, else -1."""
        found = torch.full((len(self.parents),), -1)
        for ids, reason in reversed(self._closed):
            found[self.find(ids)] = reason
        return found

    def is_closed(self, ids: Tensor) -> bool:
        """Whether all of these atoms are kept."""
        return bool((self.closed()[self.find(ids)] >= 0).all())

    # Components

    def settle(self, components: Iterable[Component]) -> list[Component]:
        """Components by the sets of today, dimensions along which they do not differ any more of size 1."""
        settled: list[Component] = []
        for ids, dead in components:
            sets, own = self.find(ids), ids  # The atoms themselves stay: they say whose they are.
            for dim, size in enumerate(sets.shape):
                if size > 1 and bool((sets == sets.narrow(dim, 0, 1)).all()):
                    sets, own = sets.narrow(dim, 0, 1), own.narrow(dim, 0, 1)
            if own.numel() > 1:
                settled.append(Component(own, dead))
            elif ids.numel() > 1:
                self.close(own, "it is a single channel")
        return settled

    def rigid(self, components: Iterable[Component], dims: Iterable[int], reason: str) -> list[Component]:
        """Components once some dimensions keep all their entries: what differs along others goes whole or not."""
        dims, kept = set(dims), []
        for component in self.settle(components):
            touched = component.dims & dims
            if not touched:
                kept.append(component)
                continue
            first = component.ids
            for dim in touched:
                first = first.narrow(dim, 0, 1)
            if component.dims - dims:
                self.join(component.ids, first, reason)
                kept.append(Component(first, component.dead))
            else:
                self.close(component.ids, reason)
        return self.settle(kept)

    def close_all(self, components: Iterable[Component], reason: str) -> None:
        for component in components:
            self.close(component.ids, reason)

    def meet(
        self, operands: Sequence[list[Component]], shapes: Sequence[Sequence[int]], reason: str
    ) -> list[list[Component]]:
        """Components of tensors that are combined entry by entry, as they broadcast.

        Where one has atoms along a dimension and another has as many entries without any, none can go. Where both
        have atoms, these are joined.
        """
        ndim = max([len(shape) for shape in shapes], default=0)
        fronts = [[1] * (ndim - len(shape)) + list(shape) for shape in shapes]
        operands = [
            [Component(c.ids.reshape([1] * (ndim - c.ids.ndim) + list(c.ids.shape)), c.dead) for c in operand]
            for operand in operands
        ]
        while True:
            before = [self.settle(operand) for operand in operands]
            operands = before
            for i, shape in enumerate(fronts):
                has = {dim for component in before[i] for dim in component.dims}
                lacking = {dim for dim, size in enumerate(shape) if size > 1} - has
                operands = [
                    self.rigid(operand, lacking, reason) if j != i else operand for j, operand in enumerate(operands)
                ]
            if [[c.dims for c in operand] for operand in operands] == [[c.dims for c in operand] for operand in before]:
                break
        return self._joined(operands, reason)

    def _joined(self, operands: list[list[Component]], reason: str) -> list[list[Component]]:
        for i, one in enumerate(operands):
            for other in operands[i + 1 :]:
                for a in one:
                    for b in other:
                        if a.dims & b.dims:
                            self._join_components(a, b, reason)
        return [self.settle(operand) for operand in operands]

    def _join_components(self, a: Component, b: Component, reason: str) -> None:
        """Join atoms of entries that meet; where one has more dimensions, what goes goes by those that both have."""
        shared = a.dims & b.dims
        for one, other in ((a, b), (b, a)):
            more = one.dims - other.dims
            if more and shared == other.dims and min(more) < min(shared):
                # Whole heads, not the same feature of each of them.
                self.rigid([one], shared, reason)
                self.close(other.ids, reason)
                return
        kept = [self.rigid([each], each.dims - shared, reason) for each in (a, b)]
        if all(kept):
            self.join(kept[0][0].ids, kept[1][0].ids, reason)


def grouped_by_dims(operands: Sequence[list[Component]]) -> list[dict[int, Component]]:
    """For each set of atoms that met, the operands that have it, by their numbers."""
    found: list[dict[int, Component]] = []
    for i, operand in enumerate(operands):
        for component in operand:
            same = next((g for g in found if next(iter(g.values())).dims & component.dims), None)
            if same is None:
                found.append({i: component})
            else:
                same.setdefault(i, component)
    return found


def regrouped(ids: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """The atoms of a tensor of the shape `old` after a view as one of the shape `new`."""
    full, sizes = list(ids.shape), [1] * len(new)
    for before, after in _blocks(old, new):
        if any(ids.shape[dim] > 1 for dim in before):
            for dim in before:
                full[dim] = old[dim]
            for dim in after:
                sizes[dim] = new[dim]
    return ids.expand(full).reshape(sizes)


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Dimensions before and after a view that hold the same entries, as small as they may be."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before, after, m, n = [], [], 1, 1
        while True:
            if i < len(old) and (m <= n or j >= len(new)):
                m *= old[i]
                before.append(i)
                i += 1
            elif j < len(new):
                n *= new[j]
                after.append(j)
                j += 1
            if m == n and ((before and after) or (i >= len(old) and j >= len(new))):
                break
        blocks.append((before, after))
    return blocks
