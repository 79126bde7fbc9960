"""Penalties of nested groups: trees in which a group vanishes with all that lies inside it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Scalar
from funcreg.core.leafwise import euclidean, safe_sqrt, squared, times
from funcreg.regularizers.composition import Structure
from funcreg.regularizers.grouped import sum_groups
from funcreg.regularizers.lifting import penalty
from funcreg.regularizers.penalties import Weights, group_dims


def _levels(groups: Any, size: int) -> list[list[tuple[int, list[int]]]]:
    """Nested groups by height, inner ones first: of each group the number, in order of opening, and the slices."""
    groups = _tuples(groups)
    if not isinstance(groups, tuple) or not all(isinstance(group, tuple) for group in groups):
        hint = ""
        if isinstance(groups, tuple) and len(groups) == size:
            hint = ". Of the numbers of the groups, one for each index, groups are ((0, 1), (2,)) for (7, 7, 8)"
        raise ValueError(
            f"groups is {groups!r}; expected a tuple of groups, each a tuple of indices and of groups{hint}"
        )
    named = _indices(groups, size)
    if len(set(named)) < len(named):
        raise ValueError(
            f"groups={groups} has an index or ... twice; expected groups nested in or apart from each other"
        )
    rest = [i for i in range(size) if i not in set(named)]
    levels: list[list[tuple[int, list[int]]]] = []
    opened = 0

    def grow(node: Any) -> tuple[list[int], int]:
        nonlocal opened
        number, slices, height = opened, [], 0
        opened += 1
        for entry in node:
            if isinstance(entry, tuple):
                inside, below = grow(entry)
                slices, height = [*slices, *inside], max(height, below + 1)
            else:
                slices += rest if entry is ... else [entry % size]
        levels.extend([] for _ in range(height + 1 - len(levels)))
        levels[height].append((number, slices))
        return slices, height

    for group in groups:
        grow(group)
    return levels


def _tuples(node: Any) -> Any:
    """Lists and ranges, also those inside, as tuples."""
    return tuple(map(_tuples, node)) if isinstance(node, (tuple, list, range)) else node


def _indices(node: Any, size: int) -> list[int]:
    """Indices anywhere inside, counted from the front; -1 stands for all others."""
    found: list[int] = []
    for entry in node:
        if isinstance(entry, tuple):
            found += _indices(entry, size)
        elif entry is ...:
            found.append(-1)
        elif not isinstance(entry, int) or isinstance(entry, bool):
            raise ValueError(f"groups has {entry!r}; expected indices, tuples of them, and ... for all others")
        elif not -size <= entry < size:
            raise ValueError(
                f"groups names the slice {entry} of a leaf that has {size} along axis=; the inputs of a linear layer "
                "lie along axis=1. A leaf without such slices is left out with mask="
            )
        else:
            found.append(entry % size)
    return found


class _Forest:
    """Nested groups of the slices of one leaf.

    Args:
        w: The leaf.
        groups: Tuples of tuples and indices.
        axis: Dimension that indices count.
        weights: Factors of the groups.
    """

    def __init__(self, w: Tensor, groups: Any, axis: int, weights: Weights) -> None:
        (self.axis,) = group_dims(w, axis)
        self.inside = tuple(d for d in range(w.ndim) if d != self.axis)
        size = w.shape[self.axis]
        self.factors: list[Tensor] = []  # By height: one for each group, and 0 for slices in none of that height.
        self.labels: list[Tensor] = []  # By height: in which group each slice is.
        levels = _levels(groups, size)
        count = sum(len(level) for level in levels)
        if isinstance(weights, Tensor) and weights.numel() != count:
            raise ValueError(f"weights has {weights.numel()} entries; expected {count}, one for each group")
        if weights is not None and not isinstance(weights, Tensor) and weights != "sqrt_size":
            raise ValueError(f"weights is {weights!r}; expected None, 'sqrt_size' or a tensor with one entry a group")
        width = math.prod([w.shape[d] for d in self.inside])
        for level in levels:
            labels = [len(level)] * size
            for place, (_, slices) in enumerate(level):
                for i in slices:
                    labels[i] = place
            self.labels.append(torch.tensor(labels, dtype=torch.int64, device=w.device))
            if isinstance(weights, Tensor):
                factor = torch.stack(
                    [*[weights.reshape(-1)[number] for number, _ in level], 0 * weights.reshape(-1)[0]]
                )
            else:
                sizes = [1.0 if weights is None else math.sqrt(len(slices) * width) for _, slices in level]
                factor = torch.tensor([*sizes, 0.0], dtype=w.abs().dtype, device=w.device)
            self.factors.append(factor)

    def sizes(self, w: Tensor) -> Tensor:
        """The norm of each slice."""
        return euclidean(w, self.inside).reshape(-1)

    def norms(self, sizes: Tensor, height: int, zeros: Tensor | None = None) -> Tensor:
        """The norm of each group of a height, and last that of slices in none.

        Args:
            sizes: The norm of each slice, which has no derivatives at zero.
            height: Which groups.
            zeros: The square of each slice where that is zero, whose second derivative is that of the group.
        """
        labels, none = self.labels[height], torch.zeros_like(sizes.sum()).expand(len(self.factors[height]))
        # In units of the longest slice of each group, so that no square leaves the range of float32.
        unit = none.detach().scatter_reduce(0, labels, sizes.detach(), "amax")
        unit = torch.where(unit < math.inf, unit, torch.ones_like(unit)).clamp(min=torch.finfo(unit.dtype).tiny)
        squares = (sizes / unit[labels]).square()
        if zeros is not None:
            squares = squares + zeros / unit[labels] / unit[labels]
        return safe_sqrt(none.index_add(0, labels, squares)) * unit

    def along(self, factor: Tensor, w: Tensor) -> Tensor:
        """One factor for each slice, shaped to multiply the leaf."""
        return factor.reshape([-1 if d == self.axis else 1 for d in range(w.ndim)])

    def shrink(self, w: Tensor, force: Scalar, only: list[Tensor] | None = None) -> Tensor:
        """Group soft thresholding from the leaves of the trees to their roots."""
        sizes = self.sizes(w)
        kept = torch.ones_like(sizes)
        for height, (labels, factors) in enumerate(zip(self.labels, self.factors, strict=True)):
            norms = self.norms(sizes * kept, height)
            weights = factors if only is None else factors * only[height]
            threshold = torch.where(weights == 0, 0.0, force * weights)
            left = (norms - threshold).relu() / torch.where(norms == 0, 1.0, norms)
            kept = kept * torch.where((weights == 0) | norms.isinf(), 1.0, left)[labels]
        return w * self.along(kept, w) + 0.0

    def slope(self, w: Tensor) -> Tensor:
        """The gradient, the subgradient of least norm at a group of zeros, where it has no slope."""
        sizes = self.sizes(w)
        # In units of slices, those of zeros in the least of others, so that no inverse leaves the range of float32.
        known = torch.where((sizes > 0) & (sizes < math.inf), sizes.detach(), math.inf)
        least = known.amin() if known.numel() else known.sum()
        units = torch.where(known < math.inf, known, torch.where(least < math.inf, least, torch.ones_like(least)))
        total = torch.zeros_like(sizes)
        for height, (labels, factors) in enumerate(zip(self.labels, self.factors, strict=True)):
            norms = self.norms(sizes, height)
            total = total + factors[labels] * (units / torch.where(norms == 0, math.inf, norms)[labels])
        return w / self.along(units, w) * self.along(total, w)


def _tree_gradient(w: Tensor, *, groups: Any, axis: int = 0, weights: Weights = None) -> Tensor:
    return _Forest(w, groups, axis, weights).slope(w)


def _tree_proximal(w: Tensor, step: Scalar, *, groups: Any, axis: int = 0, weights: Weights = None) -> Tensor:
    return _Forest(w, groups, axis, weights).shrink(w, step)


def _tree_residual(
    w: Tensor, g: Tensor, strength: Scalar, *, groups: Any, axis: int = 0, weights: Weights = None
) -> Tensor:
    forest = _Forest(w, groups, axis, weights)
    sizes = forest.sizes(w)
    # Groups of zeros leave a ball free: what they cannot take away is the proximal operator of their trees.
    zero = [(forest.norms(sizes, height) == 0).to(sizes.dtype) for height in range(len(forest.labels))]
    return forest.shrink(g + times(strength, forest.slope(w)), strength, zero)


@penalty(
    gradient=_tree_gradient,
    proximal=_tree_proximal,
    residual=_tree_residual,
    separable=False,
    structure=Structure(keeps=("signs",)),
    inner_steps=100,
)
def tree_lasso(w: Tensor, *, groups: Any, axis: int = 0, weights: Weights = None) -> Tensor:
    r"""Sum of the norms of nested groups, :math:`\sum_g c_g \|w_g\|_2`: what lies deeper vanishes first.

    A group is a tuple of indices and of groups inside it, and `...` stands for all indices that are written nowhere.
    In `groups=((0, (1, 2), (3, (4,))),)` there is one tree: nothing in it stays without the group of all five, and 4
    not without 3. `groups=((0, 1), (2, 3, 4))` are two trees of one group each. The proximal operator shrinks groups
    from the leaves of the trees to their roots, which is exact because groups are nested or apart. Indices that no
    group holds carry no penalty. In a diagonal metric, where there is no closed form, `inner_steps` find the point, by
    default 100.

    Groups of features of a linear model, of any sizes, are trees of one group each.

    Args:
        groups: Tuple or list of groups. Indices count slices along `axis`, such as the rows of a matrix.
        axis: Dimension that indices count.
        weights: The factors :math:`c_g`: None for 1, `"sqrt_size"` for the root of the number of entries of a group,
            or a tensor with one entry for each group, in the order of their opening brackets.

    Raises:
        ValueError: Groups overlap, or name a slice that a leaf does not have.

    Example:
        >>> params = {"weight": torch.tensor([3.0, 4.0, 0.5])}
        >>> tree_lasso(params, groups=((0, 1, (2,)),))
        tensor(5.5249)
        >>> tree_lasso.prox(params, 1.0, groups=((0, 1, (2,)),))
        {'weight': tensor([2.4000, 3.2000, 0.0000])}

    References:
        Zhao, Rocha & Yu, *The composite absolute penalties family for grouped and hierarchical variable selection*,
        2009.
        Jenatton, Mairal, Obozinski & Bach, *Proximal methods for hierarchical sparse coding*, 2011.
    """
    forest = _Forest(w, groups, axis, weights)
    sizes = forest.sizes(w)
    zeros = sum_groups(squared(torch.where(forest.along(sizes, w) == 0, w, torch.zeros_like(w))), forest.inside)
    terms = [factors * forest.norms(sizes, height, zeros.reshape(-1)) for height, factors in enumerate(forest.factors)]
    return torch.cat(terms) if terms else 0 * sizes


tree_lasso.hints = {"dim": ". Indices count slices along axis=; dim= of group_lasso is what lies inside a group."}
