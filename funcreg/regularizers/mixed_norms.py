"""Mixed norms of groups: the greatest magnitude of each, and the squared sum of magnitudes, for which entries compete.

A group is what the option `dim` reduces, as in `group_lasso`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Scalar
from funcreg.core.leafwise import running_sum, sign, squared, step_times, times
from funcreg.regularizers.composition import Structure
from funcreg.regularizers.grouped import finite, grouped, in_its_unit, of_groups, sum_groups, ungrouped
from funcreg.regularizers.lifting import penalty
from funcreg.regularizers.penalties import Dim, Weights, dims_of_groups, group_dims, group_sizes, shrunk

# Greatest magnitudes


def _dims_of_leaf(w: Tensor, *, dim: Dim = None, weights: Weights = None) -> tuple[int, ...]:
    return group_dims(w, dim)


def water_level(x: Tensor, weight: Tensor, volume: Any) -> Tensor:
    r"""The level :math:`c` of :math:`\sum_i h_i \max(x_i - c, 0) = v` along the last dimension, which is kept.

    The sum is convex and falls in :math:`c`. That of the largest entries alone is never greater, and equal for the
    right number of them, so that the level is the greatest of the levels of all numbers of entries.

    References:
        Held, Wolfe & Crowder, *Validation of subgradient optimization*, 1974.
    """
    sorted_, order = x.sort(dim=-1, descending=True)
    sizes = weight.expand(x.shape).gather(-1, order)
    return ((running_sum(sizes * sorted_) - volume) / running_sum(sizes)).amax(-1, keepdim=True)


def _cut(w: Tensor, level: Tensor) -> Tensor:
    """Magnitudes cut at a level, signs and phases kept."""
    # At the level itself the entry goes with it, so that the derivative in a step of 0 is that of what is cut.
    return torch.where(w.abs() < level, w, sign(w) * level) + 0.0


def _greatest(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The greatest magnitude of each group, reduced dimensions kept; 0 of a group without entries."""
    return w.abs().amax(dims, keepdim=True) if w.numel() and dims else sum_groups(w.abs(), dims)


def _ties(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """1 where an entry is a greatest one of its group, 0 elsewhere, NaN through a group with NaN."""
    top = _greatest(w, dims)
    return torch.where(top.isnan(), top, (w.abs() == top).to(top.dtype))


def _greatest_gradient(w: Tensor, *, dim: Dim, weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    ties = _ties(w, dims)
    return sign(w) * (group_sizes(w, dims, weights) * ties / sum_groups(ties, dims))


def _greatest_proximal(w: Tensor, step: Scalar, *, dim: Dim, weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    return _lowered(w, torch.ones_like(w.abs()), step_times(step, group_sizes(w, dims, weights)), dims)


def _greatest_metric(w: Tensor, h: Tensor, step: Scalar, *, dim: Dim, weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    if not w.numel():
        return w.clone()
    weight, top = in_its_unit(h, dims)
    return _lowered(w, weight, step_times(step, group_sizes(w, dims, weights)) / top, dims)


def _lowered(w: Tensor, weight: Tensor, volume: Any, dims: tuple[int, ...]) -> Tensor:
    """The greatest magnitudes of each group at one level, where what is cut off sums to a volume."""
    if not w.numel():
        return w.clone()
    rows = grouped(w, dims)
    level = water_level(rows.abs(), grouped(weight, dims), of_groups(volume, w, dims))
    return ungrouped(_cut(rows, level.relu()), w, dims)


def _greatest_residual(w: Tensor, g: Tensor, strength: Scalar, *, dim: Dim, weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    if not w.numel():
        return g.clone()
    at_zero = _greatest_proximal(g, strength, dim=dim, weights=weights)
    # The strength is poured over the greatest entries, most where they are pushed up most.
    ties = grouped(_ties(w, dims), dims)
    push = -(grouped(g, dims) * grouped(sign(w), dims).conj()).real
    push = torch.where(ties == 0, torch.full_like(push, torch.finfo(push.dtype).min / 4), push)
    volume = of_groups(finite(step_times(strength, group_sizes(w, dims, weights)), w), w, dims)
    poured = ties * (push - water_level(push, ties, volume)).relu()
    return torch.where(_greatest(w, dims) == 0, at_zero, g + sign(w) * ungrouped(poured, w, dims))


@penalty(
    gradient=partial(_greatest_gradient, dim=None),
    proximal=partial(_greatest_proximal, dim=None),
    metric=partial(_greatest_metric, dim=None),
    residual=partial(_greatest_residual, dim=None),
    structure=Structure(needs=("order", "directions"), keeps=("signs",), groups=_dims_of_leaf),
    separable=False,
)
def linf(w: Tensor, *, dim: Dim = None, weights: Weights = None) -> Tensor:
    r"""Greatest magnitude of each leaf, :math:`\max_i |w_i|`, summed over leaves.

    The proximal operator cuts all magnitudes at one level, where what is cut off sums to the step: what it takes
    away is the projection on the :math:`\ell_1` ball. It makes entries equal, and all zero when their magnitudes
    sum to no more than the step. The gradient is shared evenly among equal greatest entries.

    Args:
        dim: Dimensions that lie inside a group; see `group_lasso`. By default each leaf is one group.
        weights: Factors of the groups; see `group_lasso`.

    Raises:
        ValueError: A leaf has no such dimension.

    Example:
        >>> params = {"weight": torch.tensor([3.0, -2.5, 1.0])}
        >>> linf(params), linf.prox(params, 1.5)
        (tensor(3.), {'weight': tensor([ 2., -2.,  1.])})

    References:
        Parikh & Boyd, *Proximal algorithms*, 2014, section 6.5.
    """
    dims = group_dims(w, dim)
    return group_sizes(w, dims, weights) * _greatest(w, dims)


@penalty(
    gradient=partial(_greatest_gradient, dim=...),
    proximal=partial(_greatest_proximal, dim=...),
    metric=partial(_greatest_metric, dim=...),
    residual=partial(_greatest_residual, dim=...),
    structure=Structure(needs=("order", "directions"), keeps=("signs",), groups=dims_of_groups),
    separable=False,
)
def l1_linf(w: Tensor, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    r"""Sum over groups of the greatest magnitude, :math:`\sum_g c_g \max_{i \in g} |w_i|`, which zeroes whole groups.

    A group costs no more for all of its entries than for the greatest one, so that groups that stay are used in
    full. `linf` is the same with one group for each leaf.

    Args:
        dim: Dimensions that lie inside a group; see `group_lasso`.
        weights: Factors :math:`c_g`; see `group_lasso`.

    Raises:
        ValueError: A leaf has no such dimension.

    Example:
        >>> params = {"weight": torch.tensor([[3.0, -2.5], [0.5, 0.25]])}
        >>> l1_linf(params), l1_linf.prox(params, 1.0)
        (tensor(3.5000), {'weight': tensor([[ 2.2500, -2.2500],
                [ 0.0000,  0.0000]])})

    References:
        Quattoni, Carreras, Collins & Darrell, *An efficient projection for l1,inf regularization*, 2009.
    """
    dims = group_dims(w, dim)
    return group_sizes(w, dims, weights) * _greatest(w, dims)


# Competition inside groups


def _alone(w: Tensor, dims: tuple[int, ...]) -> bool:
    """Whether entries have no others in their groups, so that the square is that of `l2`, smooth at zero."""
    return math.prod([w.shape[d] for d in dims]) == 1


def _exclusive_gradient(w: Tensor, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    sums = w if _alone(w, dims) else sum_groups(w.abs(), dims) * sign(w)
    return 2 * group_sizes(w, dims, weights) * sums


def _exclusive_proximal(w: Tensor, step: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    return _few_left(w, torch.ones_like(w.abs()), step_times(2 * step, group_sizes(w, dims, weights)), dims)


def _exclusive_metric(w: Tensor, h: Tensor, step: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    if not w.numel():
        return w.clone()
    weight, top = in_its_unit(h, dims)
    return _few_left(w, weight, step_times(2 * step, group_sizes(w, dims, weights)) / top, dims)


def _few_left(w: Tensor, weight: Tensor, force: Any, dims: tuple[int, ...]) -> Tensor:
    """Where entries of each group land that compete with a force in a metric."""
    if not w.numel():
        return w.clone()
    if _alone(w, dims):
        return w / (1 + force / weight) + 0.0  # +0.0 also from -0.0.
    rows, give = grouped(w, dims), 1 / grouped(weight, dims)
    size, force = rows.abs(), torch.zeros_like(give[..., :1]) + of_groups(force, w, dims)
    # In units of a force above 1, so that no product with it leaves the range of float32.
    unit = torch.where(force.detach() > 1, force.detach(), 1.0)
    own, others = 1 / unit, torch.where(unit == math.inf, 1.0, force / unit)
    # The sum s of what stays solves s = sum_i (|w_i| - f s / h_i)_+ with the force f. That of some entries alone is
    # never greater, and equal for those that stay: the greatest s belongs to them.
    order = (size / give).argsort(dim=-1, descending=True)
    sums, gives = running_sum(size.gather(-1, order)), running_sum(give.gather(-1, order))
    last = (sums / (own + others * gives)).argmax(-1, keepdim=True)
    total, given = sums.gather(-1, last), gives.gather(-1, last)
    # |w_i| - f s / h_i in this order is not lost in rounding under a great force, where the greatest entry stays.
    left = (own * size + others * (size * given - total * give)).relu() / (own + others * given)
    return ungrouped(sign(rows) * left + 0.0, w, dims)


def _exclusive_residual(w: Tensor, g: Tensor, strength: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    if _alone(w, dims):
        return g + times(strength, _exclusive_gradient(w, dim=dim, weights=weights))
    force = step_times(2 * strength, group_sizes(w, dims, weights), sum_groups(w.abs(), dims))
    return torch.where(w == 0, shrunk(g, force), g + times(force, sign(w)))


@penalty(
    gradient=_exclusive_gradient,
    proximal=_exclusive_proximal,
    metric=_exclusive_metric,
    residual=_exclusive_residual,
    structure=Structure(groups=dims_of_groups),
    separable=False,
)
def exclusive_lasso(w: Tensor, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    r"""Sum over groups of the squared sum of magnitudes, :math:`\sum_g c_g \|w_g\|_1^2`. No factor one half.

    Entries of a group compete: few of each group stay, but no group vanishes, for near zero the square is flat.
    With groups of one entry it is `l2`.

    Args:
        dim: Dimensions that lie inside a group; see `group_lasso`.
        weights: Factors :math:`c_g`; see `group_lasso`.

    Raises:
        ValueError: A leaf has no such dimension.

    Example:
        >>> params = {"weight": torch.tensor([[3.0, -1.0], [0.3, 0.0]])}
        >>> exclusive_lasso(params)
        tensor(16.0900)
        >>> exclusive_lasso.prox(params, 0.25)
        {'weight': tensor([[2.0000, 0.0000],
                [0.2000, 0.0000]])}

    References:
        Zhou, Jin & Hoi, *Exclusive lasso for multi-task feature selection*, 2010.
        Kowalski, *Sparse regression using mixed norms*, 2009.
    """
    dims = group_dims(w, dim)
    squares = squared(w) if _alone(w, dims) else sum_groups(w.abs(), dims).square()
    return group_sizes(w, dims, weights) * squares
