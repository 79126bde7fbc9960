"""Linear equations of neighbours on a grid, by nested dissection: far less work than those of as many unknowns.

A grid is cut into boxes of some entries. What lies inside a box is eliminated; then pairs of boxes become one, and the
entries between them are eliminated, all pairs at once, until the rim of the grid is left. In two dimensions work grows
with the power 3/2 of the number of entries, in three with its square.

References:
    George, *Nested dissection of a regular finite element mesh*, 1973.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Entries along a side of the least boxes; they have less than twice as many.
_SIDE = 4


class _Merge(NamedTuple):
    """How pairs of boxes become one."""

    dim: int  # Along which dimension they lie beside each other.
    first: Tensor  # Where the nodes of one of them are among the nodes of both.
    second: Tensor  # And those of the other.
    inside: int  # How many of the nodes of both, which come first, lie on no rim.
    size: int  # How many nodes both have.


def _nodes(sides: Sequence[int]) -> Tensor:
    """The places of a box of so many entries along each side, and of their next ones."""
    ranges = [torch.arange(side + 1, device="cpu") for side in sides]
    return torch.stack(torch.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, len(sides))


def _numbers(places: Tensor, sides: Sequence[int]) -> Tensor:
    """A number for each place in a box."""
    found = places[:, 0]
    for d in range(1, len(sides)):
        found = found * (sides[d] + 1) + places[:, d]
    return found


def _rim_last(places: Tensor, sides: Sequence[int]) -> tuple[Tensor, int]:
    """The places in an order in which those on the rim of a box come last, and how many are not."""
    rim = ((places == 0) | (places == torch.tensor(list(sides), device="cpu"))).any(1)
    return torch.cat([places[~rim], places[rim]]), int((~rim).sum())


class Grid:
    """Where the entries of grids of a shape go; see `grid`.

    Args:
        shape: The sizes of a grid.
        device: Where to compute.
    """

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self.shape, self.ndim = tuple(shape), len(shape)
        self.counts = [2 ** max(0, int(math.log2(n / _SIDE))) if n > _SIDE else 1 for n in shape]
        self.sides = [-(-n // count) for n, count in zip(shape, self.counts, strict=True)]
        self.padded = [side * count for side, count in zip(self.sides, self.counts, strict=True)]
        nodes, self.inside = _rim_last(_nodes(self.sides), self.sides)
        self.size = len(nodes)
        place = _numbers(nodes, self.sides).argsort()
        cells = _nodes([side - 1 for side in self.sides])
        corners = [place[_numbers(cells, self.sides)]]
        for d in range(self.ndim):
            after = cells.clone()
            after[:, d] += 1
            corners.append(place[_numbers(after, self.sides)])
        #: The nodes of the entries of a box; of each pair of an entry and its next ones, its number in a matrix.
        self.own = corners[0].to(device)
        self.pairs = torch.stack([a * self.size + b for a in corners for b in corners], -1).reshape(-1).to(device)
        boxes = _nodes([count - 1 for count in self.counts]) * torch.tensor(self.sides, device="cpu")
        last = (boxes[:, None] + nodes == torch.tensor(self.padded, device="cpu")).any(-1)
        #: Nodes after the last entries, which belong to nothing.
        self.beyond = last.reshape(*self.counts, self.size).to(torch.float64).to(device)
        self.merges = list(self._merges(nodes[self.inside :], device))

    def _merges(self, rim: Tensor, device: torch.device) -> Sequence[_Merge]:
        """All merges, smaller boxes first, along their shorter side."""
        counts, sides, found = list(self.counts), list(self.sides), list[_Merge]()
        while max(counts) > 1:
            dim = min([d for d in range(self.ndim) if counts[d] > 1], key=lambda d: sides[d])
            other = rim.clone()
            other[:, dim] += sides[dim]
            counts[dim], sides[dim] = counts[dim] // 2, 2 * sides[dim]
            both, inside = _rim_last(torch.unique(torch.cat([rim, other]), dim=0), sides)
            where = torch.full((math.prod([side + 1 for side in sides]),), -1, device="cpu")
            where[_numbers(both, sides)] = torch.arange(len(both), device="cpu")
            first, second = (where[_numbers(each, sides)].to(device) for each in (rim, other))
            found.append(_Merge(dim, first, second, inside, len(both)))
            rim = both[inside:]
        return found

    def cut(self, x: Tensor) -> Tensor:
        """From `(B, *shape)` to boxes, `(B, *counts, entries)`."""
        margins = [m for d in reversed(range(self.ndim)) for m in (0, self.padded[d] - self.shape[d])]
        x = torch.nn.functional.pad(x, margins)
        x = x.reshape(len(x), *[n for pair in zip(self.counts, self.sides, strict=True) for n in pair])
        return x.permute(0, *range(1, 2 * self.ndim, 2), *range(2, 2 * self.ndim + 1, 2)).flatten(self.ndim + 1)

    def glued(self, x: Tensor) -> Tensor:
        """The way back."""
        x = x.unflatten(-1, self.sides)
        x = x.permute(0, *[n for d in range(self.ndim) for n in (1 + d, 1 + self.ndim + d)])
        return x.reshape(len(x), *self.padded)[(slice(None), *[slice(n) for n in self.shape])]


@functools.lru_cache(maxsize=8)
def grid(shape: tuple[int, ...], device: torch.device) -> Grid:
    return Grid(shape, device)


def _paired(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Boxes that lie beside each other along a dimension."""
    one, other = x.unflatten(dim + 1, (-1, 2)).unbind(dim + 2)
    return one, other


class Equations:
    r"""Equations :math:`(H + \sum_{ij} D_i^\top B_{ij} D_j) x = f`, factorized.

    Args:
        h: The diagonal :math:`H` of positive numbers, `(B, *shape)`, float64.
        bend: :math:`B`, symmetric for each entry, as lists of tensors like `h`. :math:`D_i` takes differences to the
            next entry along a dimension; what an entry at the end has there is left out.
    """

    def __init__(self, h: Tensor, bend: Sequence[Sequence[Tensor]]) -> None:
        self.grid = grid(tuple(h.shape[1:]), h.device)
        self._parts: list[tuple[Tensor, Tensor]] = []
        rest = self._reduced(self._boxes(h, bend), self.grid.inside)
        for merge in self.grid.merges:
            one, other = _paired(rest, merge.dim)
            both = self._spread(one, merge.first, merge.size) + self._spread(other, merge.second, merge.size)
            rest = self._reduced(both, merge.inside)
        self._root = torch.linalg.cholesky_ex(rest)[0]

    def _boxes(self, h: Tensor, bend: Sequence[Sequence[Tensor]]) -> Tensor:
        """The matrix of each box."""
        grid, ndim = self.grid, self.grid.ndim
        known = [[self._ended(bend[min(i, j)][max(i, j)], (i, j)) for j in range(ndim)] for i in range(ndim)]
        rows = [sum(row[1:], row[0]) for row in known]
        real = grid.cut(torch.ones_like(h[:1]))
        values = [grid.cut(h) + (1 - real) + sum(rows[1:], rows[0]), *[-row for row in rows]]
        values += [value for row, sums in zip(known, rows, strict=True) for value in (-sums, *row)]
        made = h.new_zeros(*values[0].shape[:-1], grid.size**2)
        made.index_add_(-1, grid.pairs, torch.stack(values, -1).flatten(-2))
        made = made.unflatten(-1, (grid.size, grid.size))
        made.diagonal(dim1=-2, dim2=-1).add_(grid.beyond)
        return made

    def _ended(self, x: Tensor, dims: Sequence[int]) -> Tensor:
        x = x.clone()
        for d in dims:
            x.narrow(1 + d, x.shape[1 + d] - 1, 1).zero_()
        return self.grid.cut(x)

    def _spread(self, x: Tensor, places: Tensor, size: int) -> Tensor:
        """Matrices at some rows and columns of larger ones."""
        flat = (places.unsqueeze(-1) * size + places).reshape(-1)
        zeros = x.new_zeros(*x.shape[:-2], size**2)
        return zeros.scatter_(-1, flat.expand(*x.shape[:-2], -1), x.flatten(-2)).unflatten(-1, (size, size))

    def _reduced(self, x: Tensor, count: int) -> Tensor:
        """What is left of matrices once the first unknowns are eliminated."""
        lower = torch.linalg.cholesky_ex(x[..., :count, :count])[0]
        across = torch.linalg.solve_triangular(lower, x[..., :count, count:], upper=False)
        self._parts.append((lower, across))
        return x[..., count:, count:] - across.mT @ across

    def solved(self, f: Tensor) -> Tensor:
        grid = self.grid
        f = grid.cut(f)
        rest, known = f.new_zeros(*f.shape[:-1], grid.size), list[Tensor]()
        rest[..., grid.own] = f
        for merge, part in zip([None, *grid.merges], self._parts, strict=True):
            if merge is not None:
                one, other = _paired(rest, merge.dim)
                rest = one.new_zeros(*one.shape[:-1], merge.size)
                rest[..., merge.first] = one
                rest[..., merge.second] += other
            rest = self._down(rest, part, known)
        x = torch.cholesky_solve(rest.unsqueeze(-1), self._root).squeeze(-1)
        for merge, part in zip([*reversed(grid.merges), None], reversed(self._parts), strict=True):
            x = self._up(x, part, known.pop())
            if merge is not None:
                x = torch.stack([x[..., merge.first], x[..., merge.second]], merge.dim + 2)
                x = x.flatten(merge.dim + 1, merge.dim + 2)
        return grid.glued(x[..., grid.own])

    def _down(self, rest: Tensor, part: tuple[Tensor, Tensor], known: list[Tensor]) -> Tensor:
        lower, across = part
        count = lower.shape[-1]
        known.append(torch.linalg.solve_triangular(lower, rest[..., :count, None], upper=False))
        return rest[..., count:] - (across.mT @ known[-1]).squeeze(-1)

    def _up(self, x: Tensor, part: tuple[Tensor, Tensor], known: Tensor) -> Tensor:
        lower, across = part
        found = torch.linalg.solve_triangular(lower.mT, known - across @ x.unsqueeze(-1), upper=True)
        return torch.cat([found.squeeze(-1), x], -1)
