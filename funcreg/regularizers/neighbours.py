"""Penalties of differences of neighbours along one dimension.

Their proximal operators are usually written as loops that branch on values. Here nothing does: all rows go the same
way at once, so that they run under `vmap`, on any device, and have derivatives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from funcreg.core._typing import Scalar
from funcreg.core.leafwise import running_sum, sign, step_times, times
from funcreg.regularizers.composition import Structure
from funcreg.regularizers.grouped import grouped, in_its_unit, per_entry, sum_groups, ungrouped
from funcreg.regularizers.lifting import penalty
from funcreg.regularizers.penalties import group_dims

_AT_LEAST_0 = (0.0, math.inf)
_SHARE = (0.0, 1.0)


def block_means(sums: Tensor, weight: Tensor, joined: Tensor) -> Tensor:
    """Sums over runs of neighbours along the last dimension, divided by sums of weights, at each entry of a run.

    Args:
        sums: What is summed.
        weight: What the sums are divided by.
        joined: One entry less: whether an entry is in the run of the one before.
    """
    first = torch.zeros_like(sums[..., :1], dtype=torch.int64)
    runs = torch.cat([first, running_sum((~joined).to(torch.int64))], -1)
    total = torch.zeros_like(sums).scatter_add(-1, runs, sums)
    mass = torch.zeros_like(sums).scatter_add(-1, runs, weight.expand(sums.shape).to(sums.dtype))
    return total.gather(-1, runs) / mass.gather(-1, runs)


def _crossing(knots: Tensor, slopes: Tensor, targets: Tensor, outside: Tensor) -> Tensor:
    """Where a rising, piecewise linear function reaches its targets, each along the last dimension but one.

    Args:
        knots: Its corners, in any order, along the last dimension.
        slopes: Its values there.
        targets: Values to be reached.
        outside: The slope of the function beyond all corners.
    """
    targets, knots, slopes = targets[..., None], knots[..., None, :], slopes[..., None, :]
    below, above = slopes <= targets, slopes >= targets
    left, low = torch.where(below, knots, -torch.inf).amax(-1), torch.where(below, slopes, -torch.inf).amax(-1)
    right, high = torch.where(above, knots, torch.inf).amin(-1), torch.where(above, slopes, torch.inf).amin(-1)
    targets = targets[..., 0]
    between = left + torch.where(high > low, (targets - low) / (high - low), 0.0) * (right - left)
    beyond = torch.where(below.any(-1), left + (targets - low) / outside, right - (high - targets) / outside)
    return torch.where(below.any(-1) & above.any(-1), between, beyond)


def _fused_rows(x: Tensor, h: Tensor, jump: Tensor, pull: Tensor) -> Tensor:
    r"""Rows :math:`z` of least :math:`\sum_i \frac{h_i}{2} (z_i - x_i)^2 + p_i |z_i| + \sum_i j_i |z_{i+1} - z_i|`.

    Dynamic programming from left to right: the derivative of what the entries so far cost, as a function of the
    next one, is piecewise linear, and is cut at the jump. From right to left the entries are then read off. This
    finds which neighbours are equal; what they are equal to is a mean, exact and differentiable.

    References:
        Johnson, *A dynamic programming algorithm for the fused lasso and L0-segmentation*, 2013.
    """
    most = torch.finfo(x.dtype).max / 16  # So that no difference of infinities appears.
    jump, pull = jump.clamp(max=most), pull.clamp(max=most)
    size = x.shape[-1]
    sides = torch.tensor([-1.0, 1.0], dtype=x.dtype, device=x.device)
    knots = torch.zeros_like(x[..., :1]).expand(*x.shape[:-1], 2)
    lean = sides.expand(knots.shape)  # Zero is a corner of the magnitude, from its left and from its right.
    at = carried = torch.zeros_like(knots)
    limits: list[Tensor] = []
    for i in range(size):
        at = h[..., i : i + 1] * (knots - x[..., i : i + 1]) + pull[..., i : i + 1] * lean + carried
        if i == size - 1:
            break
        ends = jump[..., i : i + 1] * sides
        found = _crossing(knots, at, ends, h[..., i : i + 1])
        limits.append(found)
        carried = torch.cat([torch.minimum(torch.maximum(at, ends[..., :1]), ends[..., 1:]), ends], -1)
        knots, lean = torch.cat([knots, found], -1), torch.cat([lean, found.sign()], -1)
    backwards = [_crossing(knots, at, torch.zeros_like(x[..., :1]), h[..., -1:])]
    for found in reversed(limits):
        backwards.append(torch.minimum(torch.maximum(backwards[-1], found[..., :1]), found[..., 1:]))
    z = torch.cat(backwards[::-1], -1)
    # Comparisons alone go on from here: derivatives are those of the means.
    up, down = z[..., 1:] > z[..., :-1], z[..., 1:] < z[..., :-1]
    bound = jump * (up.to(x.dtype) - down.to(x.dtype))
    total = h * x - pull * ((z > 0).to(x.dtype) - (z < 0).to(x.dtype))
    edge = torch.zeros_like(x[..., :1])
    total = total + torch.cat([bound, edge], -1) - torch.cat([edge, bound], -1)
    joined = ~(up | down) & (jump > 0)
    fused = block_means(total, h, joined)
    held = (z == 0) & (block_means(pull, h, joined) > 0)
    fused = torch.where(held, 0.0, fused) + 0.0
    return torch.where(x.isfinite().all(-1, keepdim=True), fused, torch.nan)


def _differences(rows: Tensor) -> Tensor:
    return rows[..., 1:] - rows[..., :-1]


def _jumps(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The sum of differences of neighbours along one dimension, which is kept."""
    return _differences(grouped(w, dims)).abs().sum(-1, keepdim=True).movedim(-1, dims[0])


def _line(w: Tensor, dim: int) -> tuple[int, ...]:
    if not isinstance(dim, int):
        raise ValueError(
            f"dim is {dim!r}; expected an int: neighbours lie along one dimension. For images take "
            "isotropic_total_variation, or, in a loss, total_variation.given(dim=-1) + total_variation.given(dim=-2)"
        )
    if w.is_complex():
        raise ValueError("a leaf is complex; expected real numbers, whose neighbours have an order")
    return group_dims(w, dim)


def _line_dims(w: Tensor, *, dim: int = -1) -> tuple[int, ...]:
    return _line(w, dim)


def _steps_gradient(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The shortest subgradient of the sum of differences: the same for all of a run of equal neighbours."""
    if not w.numel():
        return w.clone()
    rows = grouped(w, dims)
    rises, edge = sign(_differences(rows)), torch.zeros_like(rows[..., :1])
    total = torch.cat([edge, rises], -1) - torch.cat([rises, edge], -1)
    return ungrouped(block_means(total, torch.ones_like(rows), rises == 0), w, dims)


def _steps_proximal(w: Tensor, h: Tensor, jump: Scalar, pull: Scalar, dims: tuple[int, ...]) -> Tensor:
    if not w.numel():
        return w.clone()
    rows = grouped(w, dims)
    jumps, pulls = per_entry(jump, rows, w, dims)[..., 1:], per_entry(pull, rows, w, dims)
    return ungrouped(_fused_rows(rows, grouped(h, dims), jumps, pulls), w, dims)


def _steps_metric(w: Tensor, h: Tensor, jump: Scalar, pull: Scalar, dims: tuple[int, ...]) -> Tensor:
    if not w.numel():
        return w.clone()
    weight, top = in_its_unit(h, dims)
    return _steps_proximal(w, weight, jump / top, pull / top, dims)


def _steps_residual(w: Tensor, g: Tensor, jump: Scalar, pull: Scalar, dims: tuple[int, ...]) -> Tensor:
    if not w.numel():
        return g.clone()
    rows = grouped(w, dims)
    jumps, pulls = per_entry(jump, rows, w, dims)[..., 1:], per_entry(pull, rows, w, dims)
    # What pulls both ways cancels, also where it is infinite.
    jumps, pulls = (x.clamp(max=torch.finfo(x.dtype).max / 8) for x in (jumps, pulls))
    rises, edge = sign(_differences(rows)), torch.zeros_like(rows[..., :1])
    bound = jumps * rises
    known = grouped(g, dims) + pulls * sign(rows) + torch.cat([edge, bound], -1) - torch.cat([bound, edge], -1)
    # What equal neighbours and zeros leave free is the proximal operator of themselves.
    jumps, pulls = torch.where(rises == 0, jumps, 0.0), torch.where(rows == 0, pulls, 0.0)
    return ungrouped(_fused_rows(known, torch.ones_like(rows), jumps, pulls), w, dims)


def _forces(step: Scalar, alpha: Scalar, rho: Scalar) -> tuple[Scalar, Scalar]:
    return step_times(step, alpha, 1 - rho), step_times(step, alpha, rho)


def _fused_gradient(w: Tensor, alpha: Scalar, rho: Scalar, *, dim: int = -1) -> Tensor:
    return times(alpha, rho * sign(w) + (1 - rho) * _steps_gradient(w, _line(w, dim)))


def _fused_proximal(w: Tensor, step: Scalar, alpha: Scalar, rho: Scalar, *, dim: int = -1) -> Tensor:
    return _steps_proximal(w, torch.ones_like(w), *_forces(step, alpha, rho), _line(w, dim))


def _fused_metric(w: Tensor, h: Tensor, step: Scalar, alpha: Scalar, rho: Scalar, *, dim: int = -1) -> Tensor:
    return _steps_metric(w, h, *_forces(step, alpha, rho), _line(w, dim))


def _fused_residual(w: Tensor, g: Tensor, strength: Scalar, alpha: Scalar, rho: Scalar, *, dim: int = -1) -> Tensor:
    return _steps_residual(w, g, *_forces(strength, alpha, rho), _line(w, dim))


@penalty(
    gradient=_fused_gradient,
    proximal=_fused_proximal,
    metric=_fused_metric,
    residual=_fused_residual,
    structure=Structure(groups=_line_dims),
    separable=False,
    bounds={"alpha": _AT_LEAST_0, "rho": _SHARE},
)
def fused_lasso(w: Tensor, alpha: Scalar, rho: Scalar, *, dim: int = -1) -> Tensor:
    r"""Zeros, and equal neighbours, :math:`\alpha (\rho \sum_i |w_i| + (1 - \rho) \sum_i |w_{i+1} - w_i|)`.

    For weights whose order along a dimension means something: positions of a kernel, times, frequencies. The
    proximal operator is exact. It takes one round of small tensor operations for each entry of a row and work that
    grows with the square of the length of a row: meant for rows of up to some thousand entries. A row with an entry
    that is not finite becomes NaN.

    Args:
        alpha: Strength, at least 0.
        rho: Share of the :math:`\ell_1` term, from 0 (`total_variation`) to 1 (`l1`).
        dim: Dimension along which neighbours lie; by default the last.

    Raises:
        ValueError: A leaf has no such dimension, or is complex.

    Example:
        >>> params = {"weight": torch.tensor([3.0, 2.5, 0.25, -0.25])}
        >>> fused_lasso(params, alpha=1.0, rho=0.5)
        tensor(4.6250)
        >>> fused_lasso.prox(params, 1.0, alpha=1.0, rho=0.5)
        {'weight': tensor([2., 2., 0., 0.])}

    References:
        Tibshirani, Saunders, Rosset, Zhu & Knight, *Sparsity and smoothness via the fused lasso*, 2005.
        Friedman, Hastie, Höfling & Tibshirani, *Pathwise coordinate optimization*, 2007.
    """
    dims = _line(w, dim)
    return times(alpha, rho * sum_groups(w.abs(), dims) + (1 - rho) * _jumps(w, dims))


def _variation_gradient(w: Tensor, *, dim: int = -1) -> Tensor:
    return _steps_gradient(w, _line(w, dim))


def _variation_proximal(w: Tensor, step: Scalar, *, dim: int = -1) -> Tensor:
    return _steps_proximal(w, torch.ones_like(w), step, 0.0, _line(w, dim))


def _variation_metric(w: Tensor, h: Tensor, step: Scalar, *, dim: int = -1) -> Tensor:
    return _steps_metric(w, h, step, 0.0, _line(w, dim))


def _variation_residual(w: Tensor, g: Tensor, strength: Scalar, *, dim: int = -1) -> Tensor:
    return _steps_residual(w, g, strength, 0.0, _line(w, dim))


@penalty(
    gradient=_variation_gradient,
    proximal=_variation_proximal,
    metric=_variation_metric,
    residual=_variation_residual,
    structure=Structure(needs=("order", "directions"), groups=_line_dims),
    separable=False,
)
def total_variation(w: Tensor, *, dim: int = -1) -> Tensor:
    r"""Sum of differences of neighbours, :math:`\sum_i |w_{i+1} - w_i|`, which makes neighbours equal.

    The proximal operator is exact and makes steps out of slopes; see `fused_lasso` for its cost.

    Args:
        dim: Dimension along which neighbours lie; by default the last.

    Raises:
        ValueError: A leaf has no such dimension, or is complex.

    Example:
        >>> params = {"weight": torch.tensor([3.0, 2.5, 0.25, -0.25])}
        >>> total_variation(params), total_variation.prox(params, 0.5)
        (tensor(3.2500), {'weight': tensor([2.5000, 2.5000, 0.2500, 0.2500])})

    References:
        Rudin, Osher & Fatemi, *Nonlinear total variation based noise removal algorithms*, 1992.
        Condat, *A direct algorithm for 1-D total variation denoising*, 2013.
    """
    return _jumps(w, _line(w, dim))
