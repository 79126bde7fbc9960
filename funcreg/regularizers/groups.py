"""Nonconvex penalties of the norms of groups.

A group is what the option `dim` reduces, as in `group_lasso`. Rules are those of magnitudes, on norms; in a metric a
group turns, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Scalar
from funcreg.core.arguments import ABOVE_0, AT_LEAST_0
from funcreg.core.leafwise import euclidean, sign, squared, step_times, times, with_own_step
from funcreg.regularizers.composition import Structure
from funcreg.regularizers.concave import mcp_landing, mcp_slope, mcp_value, scad_landing, scad_slope, scad_value
from funcreg.regularizers.grouped import finite, in_units, sum_groups
from funcreg.regularizers.lifting import penalty
from funcreg.regularizers.magnitudes import l0_landing, l_half_landing, l_half_slope
from funcreg.regularizers.penalties import (
    Dim,
    Weights,
    dims_of_groups,
    group_dims,
    group_directions,
    group_norms,
    group_sizes,
    shrink_groups,
)


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
        worth = step_times(step / size / top, value(group_norms(z, dims)) / size)
        found = sum_groups(h * squared(away / size), dims) / 2 + worth
        best, least = torch.where(found < least, z, best), torch.where(found < least, found, least)
    return torch.where(least.isnan(), least.to(w.dtype), best) + 0.0


def _of_norms(slope: Callable[..., Tensor], landing: Callable[..., Tensor]) -> dict[str, Any]:
    """The rules of a penalty of the norms of groups, whose strength the weights multiply, from those on magnitudes."""

    def gradient(w: Tensor, strength: Scalar, bend: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
        dims = group_dims(w, dim)
        strength = step_times(strength, group_sizes(w, dims, weights))
        # An infinite slope is a number, so that zeros in a group stay what they are.
        return finite(slope(group_norms(w, dims), strength, bend), w) * group_directions(w, dims)

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
        at_zero = shrink_groups(g, step_times(factor, strength, group_sizes(w, dims, weights)), dims)
        slopes = gradient(w, strength, bend, dim=dim, weights=weights)
        return torch.where(group_norms(w, dims) == 0, at_zero, g + times(factor, slopes))

    return {"gradient": gradient, "proximal": proximal, "residual": residual}


def _group_mcp_metric(
    w: Tensor, h: Tensor, step: Scalar, alpha: Scalar, gamma: Scalar, *, dim: Dim = ..., weights: Weights = None
) -> Tensor:
    if not w.numel():
        return w.clone()
    dims = group_dims(w, dim)
    alpha = alpha * group_sizes(w, dims, weights)
    if not dims:
        w, own = with_own_step(w, step, h)
        return _rescale(w, w.abs(), mcp_landing(w.abs(), own, alpha, gamma))
    bent = _turn(w, h, step_times(step, alpha), step / gamma, dims)
    return _best(w, h, step, lambda norms: mcp_value(norms, alpha, gamma), [bent], dims)


@penalty(
    **_of_norms(mcp_slope, mcp_landing),
    metric=_group_mcp_metric,
    structure=Structure(keeps=("signs", "directions"), groups=dims_of_groups),
    separable=False,
    bounds={"strength": AT_LEAST_0, "gamma": ABOVE_0},
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
        w, own = with_own_step(w, step, h)
        return _rescale(w, w.abs(), scad_landing(w.abs(), own, alpha, a))
    straight = _turn(w, h, step_times(step, alpha), 0.0, dims)
    bent = _turn(w, h, step_times(step, alpha) * a / (a - 1), step / (a - 1), dims)
    return _best(w, h, step, lambda norms: scad_value(norms, alpha, a), [straight, bent], dims)


@penalty(
    **_of_norms(scad_slope, scad_landing),
    metric=_group_scad_metric,
    structure=Structure(keeps=("signs", "directions"), groups=dims_of_groups),
    separable=False,
    bounds={"strength": AT_LEAST_0, "a": (2.0, math.inf)},
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
    # Powers of tensors, as where it is one.
    step = torch.zeros_like(norms) + step_times(step, group_sizes(w, dims, weights))
    return _rescale(w, norms, l_half_landing(norms, step))


def _group_l_half_residual(
    w: Tensor, g: Tensor, strength: Scalar, *, dim: Dim = ..., weights: Weights = None
) -> Tensor:
    pulled = strength * group_sizes(w, group_dims(w, dim), weights) != 0
    # No strength times an infinite slope is no pull.
    at_zero = torch.where(torch.as_tensor(pulled, device=w.device), torch.zeros_like(g), g)
    slopes = g + times(strength, _group_l_half_gradient(w, dim=dim, weights=weights))
    return torch.where(group_norms(w, group_dims(w, dim)) == 0, at_zero, slopes)


@penalty(
    gradient=_group_l_half_gradient,
    proximal=_group_l_half_proximal,
    residual=_group_l_half_residual,
    structure=Structure(keeps=("signs", "directions"), groups=dims_of_groups),
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
    return _rescale(w, norms, l0_landing(norms, step_times(step, group_sizes(w, dims, weights))))


def _group_l0_metric(w: Tensor, h: Tensor, step: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    if not w.numel():
        return w.clone()
    x, h, size, top = in_units(w, h, dims)
    lost, cost = (
        sum_groups(h * squared(x), dims) / 2,
        step_times(step / size / top / size, group_sizes(w, dims, weights)),
    )
    return torch.where(lost <= cost, torch.zeros_like(w), w) + 0.0


def _group_l0_residual(w: Tensor, g: Tensor, strength: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    slopes = g + _group_l0_gradient(w, dim=dim)
    return torch.where(group_norms(w, group_dims(w, dim)) == 0, torch.zeros_like(g), slopes)


@penalty(
    gradient=_group_l0_gradient,
    proximal=_group_l0_proximal,
    metric=_group_l0_metric,
    residual=_group_l0_residual,
    structure=Structure(keeps=("signs", "directions"), groups=dims_of_groups),
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
