"""Penalties of whole groups of entries: nonconvex ones of the norm, greatest magnitudes, and competition inside groups.

A group is what the option `dim` reduces, as in `group_lasso`. Everything here is done along the last dimension of
`grouped(w, dims)`, which holds the entries of a group.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from funcreg._typing import Scalar
from funcreg.composition import Structure
from funcreg.grouped import grouped, in_its_unit, in_units, of_groups, sum_groups, ungrouped
from funcreg.leafwise import euclidean, running_sum, sign, squared
from funcreg.lifting import penalty
from funcreg.penalties import (
    Dim,
    Weights,
    group_dims,
    group_directions,
    group_norms,
    group_sizes,
    shrink_groups,
    shrunk,
)
from funcreg.separable import (
    l0_landing,
    l_half_landing,
    l_half_slope,
    mcp_landing,
    mcp_slope,
    mcp_value,
    scad_landing,
    scad_slope,
    scad_value,
)

_AT_LEAST_0 = (0.0, math.inf)
_ABOVE_0 = (sys.float_info.min, math.inf)


# Nonconvex penalties of the norm


def _dims(w: Tensor, *, dim: Dim = ..., weights: Weights = None) -> tuple[int, ...]:
    return group_dims(w, dim)


def _dims_of_leaf(w: Tensor, *, dim: Dim = None, weights: Weights = None) -> tuple[int, ...]:
    return group_dims(w, dim)


def _rescale(w: Tensor, norms: Tensor, landed: Tensor) -> Tensor:
    """Each group in its direction, with the norm where it landed."""
    factor = landed / torch.where(norms == 0, torch.ones_like(norms), norms)
    # An infinite norm that stays is no number over itself.
    return w * torch.where((landed == norms) & norms.isinf(), torch.ones_like(norms), factor) + 0.0


def _turn(w: Tensor, h: Tensor, force: Any, bend: Any, dims: tuple[int, ...]) -> Tensor:
    r"""The point :math:`h w / (h + \mu)` of the greatest root of :math:`(\mu + b) \|h w / (h + \mu)\| = f`.

    It is the local minimum of :math:`\frac{1}{2} \sum_i h_i (z_i - w_i)^2 + f \|z\| - \frac{b}{2} \|z\|^2` next to
    zero, if it has one. :math:`f / \|h w / (h + \mu)\| - \mu - b` is concave in :math:`\mu`, so that Newton's method
    falls to its greatest root from the right without a bracket. Without a root some other point comes back.
    """
    x, h, size, top = in_units(w, h, dims)
    norms = euclidean(h * x, dims)
    # In units of the norm, too, so that no power leaves the range of float32.
    unit = torch.where(norms == 0, torch.ones_like(norms), norms)
    force, bend = force / size / top / unit, bend / top
    alive = (norms != 0) & (force < 1) & (force > bend)
    # The dead branch computes with ones, so that no derivative through it is NaN.
    pulls = torch.where(alive, squared(h * x / unit), torch.ones_like(h))
    weight = torch.where(alive, h, torch.ones_like(h))
    force = torch.where(alive, force, torch.full_like(norms, 0.5))
    start = (force - bend) / (1 - force)
    start = torch.where(alive, start, torch.zeros_like(start))
    shift = start
    for _ in range(8):
        scale = weight + shift
        terms = pulls / scale.square()
        phi, cubic = sum_groups(terms, dims), sum_groups(terms / scale, dims)
        gap = force / phi.sqrt() - shift - bend
        slope = force * cubic / (phi * phi.sqrt()) - 1
        falls = slope < -1e-6
        shift = shift - torch.where(falls, gap / torch.where(falls, slope, torch.ones_like(slope)), 0 * gap)
        shift = torch.minimum(shift.relu(), start)
    return torch.where(alive, w * (weight / (weight + shift)), torch.zeros_like(w))


def _best(
    w: Tensor, h: Tensor, step: Any, value: Callable[[Tensor], Tensor], points: list[Tensor], dims: tuple[int, ...]
) -> Tensor:
    """Of zero, the start and some points, the one of least objective for each group; the first if two are equal."""
    x, h, size, top = in_units(w, h, dims)
    best, least = torch.zeros_like(w), sum_groups(h * squared(x), dims) / 2
    for z in [w, *points]:
        away = torch.where(z == w, torch.zeros_like(w), z - w)  # Infinity is at no distance from itself.
        worth = step / size / top * (value(group_norms(z, dims)) / size)
        found = sum_groups(h * squared(away / size), dims) / 2 + worth
        best, least = torch.where(found < least, z, best), torch.where(found < least, found, least)
    return torch.where(least.isnan(), least.to(w.dtype), best) + 0.0


def _of_norms(slope: Callable[..., Tensor], landing: Callable[..., Tensor]) -> dict[str, Any]:
    """The rules of a penalty of the norms of groups, whose strength the weights multiply, from those on magnitudes."""

    def gradient(w: Tensor, strength: Scalar, bend: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
        dims = group_dims(w, dim)
        return slope(group_norms(w, dims), strength * group_sizes(w, dims, weights), bend) * group_directions(w, dims)

    def proximal(
        w: Tensor, step: Scalar, strength: Scalar, bend: Scalar, *, dim: Dim = ..., weights: Weights = None
    ) -> Tensor:
        dims = group_dims(w, dim)
        norms = group_norms(w, dims)
        return _rescale(w, norms, landing(norms, step, strength * group_sizes(w, dims, weights), bend))

    def residual(
        w: Tensor, g: Tensor, factor: Scalar, strength: Scalar, bend: Scalar, *, dim: Dim = ..., weights: Weights = None
    ) -> Tensor:
        dims = group_dims(w, dim)
        at_zero = shrink_groups(g, factor * strength * group_sizes(w, dims, weights), dims)
        slopes = gradient(w, strength, bend, dim=dim, weights=weights)
        return torch.where(group_norms(w, dims) == 0, at_zero, g + factor * slopes)

    return {"gradient": gradient, "proximal": proximal, "residual": residual}


def _group_mcp_metric(
    w: Tensor, h: Tensor, step: Scalar, alpha: Scalar, gamma: Scalar, *, dim: Dim = ..., weights: Weights = None
) -> Tensor:
    if not w.numel():
        return w.clone()
    dims = group_dims(w, dim)
    alpha = alpha * group_sizes(w, dims, weights)
    if not dims:
        return _rescale(w, w.abs(), mcp_landing(w.abs(), step / h, alpha, gamma))
    bent = _turn(w, h, step * alpha, step / gamma, dims)
    return _best(w, h, step, lambda norms: mcp_value(norms, alpha, gamma), [bent], dims)


@penalty(
    **_of_norms(mcp_slope, mcp_landing),
    metric=_group_mcp_metric,
    structure=Structure(keeps=("signs", "directions"), groups=_dims),
    separable=False,
    bounds={"strength": _AT_LEAST_0, "gamma": _ABOVE_0},
    convex=False,
)
def group_mcp(w: Tensor, strength: Scalar, gamma: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    r"""Minimax concave penalty of the norms of groups, :math:`\sum_g \text{mcp}(\|w_g\|_2; c_g \lambda, \gamma)`.

    :math:`\text{mcp}(n; \lambda, \gamma)` is :math:`\lambda n - n^2 / 2 \gamma` up to :math:`n = \gamma \lambda` and
    constant from there on: small groups vanish as under `group_lasso`, large ones are not shrunk at all. It is not
    convex; the proximal operator is the global minimum for every step, also where the step is greater than
    :math:`\gamma` and it jumps.

    Args:
        strength: Slope at zero :math:`\lambda`, at least 0.
        gamma: How far the penalty bends, above 0, usually above 1; infinite is `group_lasso`.
        dim: Dimensions that lie inside a group; see `group_lasso`.
        weights: Factors :math:`c_g` of the slope; see `group_lasso`.

    Raises:
        ValueError: A leaf has no such dimension.

    Example:
        >>> params = {"weight": torch.tensor([[3.0, 4.0], [0.9, 1.2], [0.3, 0.4]])}
        >>> group_mcp(params, strength=1.0, gamma=3.0)
        tensor(3.0833)
        >>> group_mcp.prox(params, 1.0, strength=1.0, gamma=3.0)
        {'weight': tensor([[3.0000, 4.0000],
                [0.4500, 0.6000],
                [0.0000, 0.0000]])}

    References:
        Zhang, *Nearly unbiased variable selection under minimax concave penalty*, 2010.
        Huang, Breheny & Ma, *A selective review of group selection in high-dimensional models*, 2012.
    """
    dims = group_dims(w, dim)
    return mcp_value(group_norms(w, dims), strength * group_sizes(w, dims, weights), gamma)


def _group_scad_metric(
    w: Tensor, h: Tensor, step: Scalar, alpha: Scalar, a: Scalar, *, dim: Dim = ..., weights: Weights = None
) -> Tensor:
    if not w.numel():
        return w.clone()
    dims = group_dims(w, dim)
    alpha = alpha * group_sizes(w, dims, weights)
    if not dims:
        return _rescale(w, w.abs(), scad_landing(w.abs(), step / h, alpha, a))
    straight = _turn(w, h, step * alpha, 0.0, dims)
    bent = _turn(w, h, step * alpha * a / (a - 1), step / (a - 1), dims)
    return _best(w, h, step, lambda norms: scad_value(norms, alpha, a), [straight, bent], dims)


@penalty(
    **_of_norms(scad_slope, scad_landing),
    metric=_group_scad_metric,
    structure=Structure(keeps=("signs", "directions"), groups=_dims),
    separable=False,
    bounds={"strength": _AT_LEAST_0, "a": (2.0, math.inf)},
    convex=False,
)
def group_scad(w: Tensor, strength: Scalar, a: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    r"""SCAD of the norms of groups, :math:`\sum_g \text{scad}(\|w_g\|_2; c_g \lambda, a)`.

    The smoothly clipped absolute deviation :math:`\text{scad}(n; \lambda, a)` has slope :math:`\lambda` up to
    :math:`\lambda`, a slope that falls to 0 at :math:`a \lambda`, and is constant from there on. It is not convex;
    the proximal operator is the global minimum for every step.

    Args:
        strength: Slope at zero :math:`\lambda`, at least 0.
        a: Where the penalty becomes constant, in units of :math:`\lambda`: at least 2; Fan & Li use 3.7.
        dim: Dimensions that lie inside a group; see `group_lasso`.
        weights: Factors :math:`c_g` of the slope; see `group_lasso`.

    Raises:
        ValueError: A leaf has no such dimension.

    Example:
        >>> params = {"weight": torch.tensor([[3.0, 4.0], [0.9, 1.2], [0.3, 0.4]])}
        >>> group_scad(params, strength=1.0, a=3.0)
        tensor(3.9375)
        >>> group_scad.prox(params, 1.0, strength=1.0, a=3.0)
        {'weight': tensor([[3.0000, 4.0000],
                [0.3000, 0.4000],
                [0.0000, 0.0000]])}

    References:
        Fan & Li, *Variable selection via nonconcave penalized likelihood and its oracle properties*, 2001.
        Huang, Breheny & Ma, *A selective review of group selection in high-dimensional models*, 2012.
    """
    dims = group_dims(w, dim)
    return scad_value(group_norms(w, dims), strength * group_sizes(w, dims, weights), a)


def _group_l_half_gradient(w: Tensor, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    norms = group_norms(w, dims)
    # The slope is infinite at 0, and both branches of a `where` are differentiated.
    slopes = l_half_slope(torch.where(norms == 0, torch.ones_like(norms), norms))
    return group_sizes(w, dims, weights) * slopes * group_directions(w, dims)


def _group_l_half_proximal(w: Tensor, step: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    norms = group_norms(w, dims)
    step = torch.zeros_like(norms) + step * group_sizes(w, dims, weights)  # Powers of tensors, as where it is one.
    return _rescale(w, norms, l_half_landing(norms, step))


def _group_l_half_residual(
    w: Tensor, g: Tensor, strength: Scalar, *, dim: Dim = ..., weights: Weights = None
) -> Tensor:
    pulled = strength * group_sizes(w, group_dims(w, dim), weights) != 0
    # No strength times an infinite slope is no pull.
    at_zero = torch.where(torch.as_tensor(pulled, device=w.device), torch.zeros_like(g), g)
    slopes = g + strength * _group_l_half_gradient(w, dim=dim, weights=weights)
    return torch.where(group_norms(w, group_dims(w, dim)) == 0, at_zero, slopes)


@penalty(
    gradient=_group_l_half_gradient,
    proximal=_group_l_half_proximal,
    residual=_group_l_half_residual,
    structure=Structure(keeps=("signs", "directions"), groups=_dims),
    separable=False,
    convex=False,
)
def group_l_half(w: Tensor, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    r"""Sum of the square roots of norms of groups, :math:`\sum_g c_g \|w_g\|_2^{1/2}`.

    Sparser than `group_lasso`, and less of a pull on large groups: the proximal operator makes a group 0 up to a norm
    of :math:`\frac{3}{2} (c_g \, \text{step})^{2/3}`, where it jumps; a global minimum for every step. Nonconvex.

    Args:
        dim: Dimensions that lie inside a group; see `group_lasso`.
        weights: Factors :math:`c_g`; see `group_lasso`.

    Raises:
        ValueError: A leaf has no such dimension.

    Example:
        >>> params = {"weight": torch.tensor([[2.4, 3.2], [0.6, 0.8]])}
        >>> group_l_half(params), group_l_half.prox(params, 1.0)
        (tensor(3.), {'weight': tensor([[2.2449, 2.9932],
                [0.0000, 0.0000]])})

    References:
        Xu, Chang, Xu & Zhang, *L1/2 regularization: a thresholding representation theory*, 2012.
        Li, Wang & Shi, *Group L1/2 regularization for pruning hidden layer nodes of feedforward neural networks*, 2019.
    """
    norms = group_norms(w, dims := group_dims(w, dim))
    zero = norms == 0
    return group_sizes(w, dims, weights) * torch.where(
        zero, torch.zeros_like(norms), torch.where(zero, torch.ones_like(norms), norms).sqrt()
    )


def _group_l0_gradient(w: Tensor, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    group_dims(w, dim)  # Which raises an error for dimensions that the leaf does not have.
    return 0 * sign(w)  # NaN goes through the sign, and infinity is no NaN.


def _group_l0_proximal(w: Tensor, step: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    norms = group_norms(w, dims)
    return _rescale(w, norms, l0_landing(norms, step * group_sizes(w, dims, weights)))


def _group_l0_metric(w: Tensor, h: Tensor, step: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    if not w.numel():
        return w.clone()
    x, h, size, top = in_units(w, h, dims)
    lost, cost = sum_groups(h * squared(x), dims) / 2, step / size / top / size * group_sizes(w, dims, weights)
    return torch.where(lost <= cost, torch.zeros_like(w), w) + 0.0


def _group_l0_residual(w: Tensor, g: Tensor, strength: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    slopes = g + _group_l0_gradient(w, dim=dim)
    return torch.where(group_norms(w, group_dims(w, dim)) == 0, torch.zeros_like(g), slopes)


@penalty(
    gradient=_group_l0_gradient,
    proximal=_group_l0_proximal,
    metric=_group_l0_metric,
    residual=_group_l0_residual,
    structure=Structure(keeps=("signs", "directions"), groups=_dims),
    separable=False,
    has_gradient=False,
    convex=False,
)
def group_l0(w: Tensor, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    r"""Number of groups that are not zero, :math:`\sum_g c_g [w_g \ne 0]`.

    The proximal operator keeps a group as it is or zeroes it, by whether its norm is above
    :math:`\sqrt{2 c_g \, \text{step}}`. The gradient is 0: in a loss this penalty does nothing. Zero is a stationary
    point whatever the loss.

    Args:
        dim: Dimensions that lie inside a group; see `group_lasso`.
        weights: Factors :math:`c_g`; see `group_lasso`.

    Raises:
        ValueError: A leaf has no such dimension.

    Example:
        >>> params = {"weight": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}
        >>> group_l0(params), group_l0.prox(params, 1.0)
        (tensor(2.), {'weight': tensor([[3., 4.],
                [0., 0.]])})

    References:
        Blumensath & Davies, *Iterative thresholding for sparse approximations*, 2008.
    """
    dims = group_dims(w, dim)
    norms = group_norms(w, dims)
    # Through the norms, so that NaN goes through and derivatives are zeros.
    return group_sizes(w, dims, weights) * torch.where(norms.isnan(), norms, (norms != 0).to(norms.dtype))


# Greatest magnitudes


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
    return _lowered(w, torch.ones_like(w.abs()), step * group_sizes(w, dims, weights), dims)


def _greatest_metric(w: Tensor, h: Tensor, step: Scalar, *, dim: Dim, weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    if not w.numel():
        return w.clone()
    weight, top = in_its_unit(h, dims)
    return _lowered(w, weight, step * group_sizes(w, dims, weights) / top, dims)


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
    volume = of_groups(strength * group_sizes(w, dims, weights), w, dims)
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
    structure=Structure(needs=("order", "directions"), keeps=("signs",), groups=_dims),
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
    return _few_left(w, torch.ones_like(w.abs()), 2 * step * group_sizes(w, dims, weights), dims)


def _exclusive_metric(w: Tensor, h: Tensor, step: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    if not w.numel():
        return w.clone()
    weight, top = in_its_unit(h, dims)
    return _few_left(w, weight, 2 * step * group_sizes(w, dims, weights) / top, dims)


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
        return g + strength * _exclusive_gradient(w, dim=dim, weights=weights)
    force = 2 * strength * group_sizes(w, dims, weights) * sum_groups(w.abs(), dims)
    return torch.where(w == 0, shrunk(g, force), g + force * sign(w))


@penalty(
    gradient=_exclusive_gradient,
    proximal=_exclusive_proximal,
    metric=_exclusive_metric,
    residual=_exclusive_residual,
    structure=Structure(groups=_dims),
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
