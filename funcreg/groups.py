"""Penalties of whole groups of entries: nonconvex ones of the norm, greatest magnitudes, and competition inside groups.

A group is what the option `dim` reduces, as in `group_lasso`. Everything here is done along the last dimension of
`members(w, dims)`, which holds the entries of a group.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcreg._typing import Scalar
from funcreg.penalties import (
    Dim,
    Weights,
    group_dims,
    group_directions,
    group_norms,
    group_sizes,
    shrink_groups,
)
from funcreg.penalty import penalty
from funcreg.tree import safe_sqrt, squared

_AT_LEAST_0 = (0.0, math.inf)
_ABOVE_0 = (sys.float_info.min, math.inf)


# Groups as rows


def members(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The entries of each group along one last dimension, after the dimensions that count groups."""
    kept = [d for d in range(x.ndim) if d not in dims]
    size = math.prod([x.shape[d] for d in dims])
    return x.permute(*kept, *dims).reshape(*[x.shape[d] for d in kept], size)


def from_members(rows: Tensor, w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """What `members` took from a tensor of the shape of `w`, put back in its place."""
    order = [*[d for d in range(w.ndim) if d not in dims], *dims]
    return rows.reshape([w.shape[d] for d in order]).permute(*[order.index(d) for d in range(w.ndim)])


def per_group(x: Any, w: Tensor, dims: tuple[int, ...]) -> Any:
    """A number for each group, shaped to broadcast against `members`."""
    if not isinstance(x, Tensor) or not x.ndim:
        return x
    return members(x.expand([1 if d in dims else n for d, n in enumerate(w.shape)]), dims)


def sum_groups(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sums over groups, reduced dimensions kept."""
    return x.sum(dims, keepdim=True) if dims else x  # sum(()) would reduce them all.


# Nonconvex penalties of the norm


def mcp_value(size: Tensor, strength: Any, gamma: Scalar) -> Tensor:
    reached = size.clamp(max=gamma * strength)
    return strength * reached - squared(reached) / (2 * gamma)


def mcp_slope(size: Tensor, strength: Any, gamma: Scalar) -> Tensor:
    return (strength - size / gamma).relu()


def mcp_landing(size: Tensor, step: Tensor, strength: Any, gamma: Scalar) -> Tensor:
    """The minimum over z of (z - size)^2 / 2 + step mcp(z), for sizes and a z of at least 0."""
    curved = step < gamma  # Otherwise the objective is concave up to the flat part.
    bend = torch.where(curved, 1 - step / gamma, torch.ones_like(step))
    firm = torch.where(size <= gamma * strength, (size - step * strength).relu() / bend, size)
    hard = torch.where(size <= strength * (gamma * step).sqrt(), torch.zeros_like(size), size)
    return torch.where(curved, firm, hard)


def scad_value(size: Tensor, strength: Any, a: Scalar) -> Tensor:
    bent = (size - strength).relu().clamp(max=(a - 1) * strength)
    return strength * (size.clamp(max=strength) + bent) - squared(bent) / (2 * (a - 1))


def scad_slope(size: Tensor, strength: Any, a: Scalar) -> Tensor:
    return ((a * strength - size).relu() / (a - 1)).clamp(max=strength)


def scad_landing(size: Tensor, step: Tensor, strength: Any, a: Scalar) -> Tensor:
    """The minimum over z of (z - size)^2 / 2 + step scad(z), for sizes and a z of at least 0."""
    soft = (size - step * strength).relu()
    curved, never = step < a - 1, step > a + 1
    bend = torch.where(curved, a - 1 - step, torch.ones_like(step))
    middle = torch.where(size <= a * strength, ((a - 1) * size - a * strength * step) / bend, size)
    smooth = torch.where(size <= strength * (1 + step), soft, middle)
    jump = torch.where(size <= strength * (a + 1 + step) / 2, soft, size)
    hard = torch.where(size <= strength * ((a + 1) * step).sqrt(), torch.zeros_like(size), size)
    return torch.where(curved, smooth, torch.where(never, hard, jump))


def l0_landing(size: Tensor, step: Tensor) -> Tensor:
    return torch.where(size <= (2 * step).sqrt(), torch.zeros_like(size), size)


def _rescale(w: Tensor, norms: Tensor, landed: Tensor) -> Tensor:
    """Each group in its direction, with the norm where it landed."""
    factor = landed / torch.where(norms == 0, torch.ones_like(norms), norms)
    return w * torch.where(landed == norms, torch.ones_like(norms), factor) + 0.0


def _turn(w: Tensor, h: Tensor, force: Any, bend: Any, dims: tuple[int, ...]) -> Tensor:
    r"""The point :math:`h w / (h + \mu)` of the greatest root of :math:`(\mu + b) \|h w / (h + \mu)\| = f`.

    It is the local minimum of :math:`\frac{1}{2} \sum_i h_i (z_i - w_i)^2 + f \|z\| - \frac{b}{2} \|z\|^2` next to
    zero, if it has one. :math:`f / \|h w / (h + \mu)\| - \mu - b` is concave in :math:`\mu`, so that Newton's method
    falls to its greatest root from the right without a bracket. Without a root some other point comes back.
    """
    norms = safe_sqrt(sum_groups(squared(h * w), dims))
    unit = torch.where(norms == 0, torch.ones_like(norms), norms)
    # In units of the norm and of the greatest metric, so that no power leaves the range of float32.
    top = h.amax(dims, keepdim=True) if dims else h
    force, bend, h = force / unit, bend / top, h / top
    alive = (norms != 0) & (force < 1) & (force > bend)
    # The dead branch computes with ones, so that no derivative through it is NaN.
    pulls = torch.where(alive, squared(h * w / (unit / top)), torch.ones_like(h))
    weight = torch.where(alive, h, torch.ones_like(h))
    force = torch.where(alive, force, torch.full_like(norms, 0.5))
    start = (force - bend) / (1 - force)
    start = torch.where(alive, start, torch.zeros_like(start))
    shift = start
    for _ in range(8):
        scale = weight + shift
        phi = sum_groups(pulls / scale.square(), dims)
        cubic = sum_groups(pulls / (scale * scale.square()), dims)
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
    best, least = torch.zeros_like(w), sum_groups(h * squared(w), dims) / 2
    for z in [w, *points]:
        away = torch.where(z == w, torch.zeros_like(w), z - w)  # Infinity is at no distance from itself.
        found = sum_groups(h * squared(away), dims) / 2 + step * value(group_norms(z, dims))
        best, least = torch.where(found < least, z, best), torch.where(found < least, found, least)
    return torch.where(least.isnan(), least.to(w.dtype), best) + 0.0


def _as_tensor(x: Any, like: Tensor) -> Tensor:
    """A number or tensor in the precision of another tensor."""
    return x.to(like.dtype) if isinstance(x, Tensor) else torch.full_like(like, x)


def _group_mcp_gradient(w: Tensor, alpha: Scalar, gamma: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    slope = mcp_slope(group_norms(w, dims), alpha * group_sizes(w, dims, weights), gamma)
    return slope * group_directions(w, dims)


def _group_mcp_proximal(
    w: Tensor, step: Scalar, alpha: Scalar, gamma: Scalar, *, dim: Dim = ..., weights: Weights = None
) -> Tensor:
    dims = group_dims(w, dim)
    norms = group_norms(w, dims)
    return _rescale(w, norms, mcp_landing(norms, _as_tensor(step, norms), alpha * group_sizes(w, dims, weights), gamma))


def _group_mcp_metric(
    w: Tensor, h: Tensor, step: Scalar, alpha: Scalar, gamma: Scalar, *, dim: Dim = ..., weights: Weights = None
) -> Tensor:
    if not w.numel():
        return w.clone()
    dims = group_dims(w, dim)
    alpha = alpha * group_sizes(w, dims, weights)
    bent = _turn(w, h, step * alpha, step / gamma, dims)
    return _best(w, h, step, lambda norms: mcp_value(norms, alpha, gamma), [bent], dims)


def _group_mcp_residual(
    w: Tensor, g: Tensor, strength: Scalar, alpha: Scalar, gamma: Scalar, *, dim: Dim = ..., weights: Weights = None
) -> Tensor:
    dims = group_dims(w, dim)
    at_zero = shrink_groups(g, strength * alpha * group_sizes(w, dims, weights), dims)
    slope = _group_mcp_gradient(w, alpha, gamma, dim=dim, weights=weights)
    return torch.where(group_norms(w, dims) == 0, at_zero, g + strength * slope)


@penalty(
    gradient=_group_mcp_gradient,
    proximal=_group_mcp_proximal,
    metric=_group_mcp_metric,
    residual=_group_mcp_residual,
    reach="leaf",
    bounds={"strength": _AT_LEAST_0, "gamma": _ABOVE_0},
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


def _group_scad_gradient(w: Tensor, alpha: Scalar, a: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    slope = scad_slope(group_norms(w, dims), alpha * group_sizes(w, dims, weights), a)
    return slope * group_directions(w, dims)


def _group_scad_proximal(
    w: Tensor, step: Scalar, alpha: Scalar, a: Scalar, *, dim: Dim = ..., weights: Weights = None
) -> Tensor:
    dims = group_dims(w, dim)
    norms = group_norms(w, dims)
    return _rescale(w, norms, scad_landing(norms, _as_tensor(step, norms), alpha * group_sizes(w, dims, weights), a))


def _group_scad_metric(
    w: Tensor, h: Tensor, step: Scalar, alpha: Scalar, a: Scalar, *, dim: Dim = ..., weights: Weights = None
) -> Tensor:
    if not w.numel():
        return w.clone()
    dims = group_dims(w, dim)
    alpha = alpha * group_sizes(w, dims, weights)
    straight = _turn(w, h, step * alpha, 0.0, dims)
    bent = _turn(w, h, step * alpha * a / (a - 1), step / (a - 1), dims)
    return _best(w, h, step, lambda norms: scad_value(norms, alpha, a), [straight, bent], dims)


def _group_scad_residual(
    w: Tensor, g: Tensor, strength: Scalar, alpha: Scalar, a: Scalar, *, dim: Dim = ..., weights: Weights = None
) -> Tensor:
    dims = group_dims(w, dim)
    at_zero = shrink_groups(g, strength * alpha * group_sizes(w, dims, weights), dims)
    slope = _group_scad_gradient(w, alpha, a, dim=dim, weights=weights)
    return torch.where(group_norms(w, dims) == 0, at_zero, g + strength * slope)


@penalty(
    gradient=_group_scad_gradient,
    proximal=_group_scad_proximal,
    metric=_group_scad_metric,
    residual=_group_scad_residual,
    reach="leaf",
    bounds={"strength": _AT_LEAST_0, "a": (2.0, math.inf)},
)
def group_scad(w: Tensor, strength: Scalar, a: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    r"""SCAD of the norms of groups, :math:`\sum_g \text{scad}(\|w_g\|_2; c_g \lambda, a)`.

    Smoothly clipped absolute deviation: :math:`\text{scad}(n; \lambda, a)` has slope :math:`\lambda` up to :math:`\lambda`, a slope that falls to 0 at
    :math:`a \lambda`, and is constant from there on. It is not convex; the proximal operator is the global minimum
    for every step.

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


def _group_l0_gradient(w: Tensor, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    return 0 * w


def _group_l0_proximal(w: Tensor, step: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    norms = group_norms(w, dims)
    return _rescale(w, norms, l0_landing(norms, _as_tensor(step * group_sizes(w, dims, weights), norms)))


def _group_l0_metric(w: Tensor, h: Tensor, step: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    lost = sum_groups(h * squared(w), dims) / 2
    return torch.where(lost <= step * group_sizes(w, dims, weights), torch.zeros_like(w), w) + 0.0


def _group_l0_residual(w: Tensor, g: Tensor, strength: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    return torch.where(group_norms(w, group_dims(w, dim)) == 0, torch.zeros_like(g), g)


@penalty(
    gradient=_group_l0_gradient,
    proximal=_group_l0_proximal,
    metric=_group_l0_metric,
    residual=_group_l0_residual,
    reach="leaf",
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
