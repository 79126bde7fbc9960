"""Penalties of the structure among entries: differences of neighbours, orders of magnitudes, trees of groups.

Their proximal operators are usually written as loops that branch on values. Here nothing does: all rows go the same
way at once, so that they run under `vmap`, on any device, and have derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from funcreg._typing import Params, Scalar
from funcreg.composition import Structure
from funcreg.construction import remembered
from funcreg.grouped import grouped, in_its_unit, per_entry, sum_groups, ungrouped
from funcreg.leafwise import bare, euclidean, gathered, running_sum, safe_sqrt, sign, spread_like, squared, widen
from funcreg.lifting import penalty
from funcreg.penalties import Dim, Weights, group_dims
from funcreg.penalty import Penalty
from funcreg.sharding import whole
from funcreg.tree import flatten, tree_paths

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


# Differences of neighbours


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
        raise ValueError(f"dim is {dim!r}; expected an int: neighbours lie along one dimension")
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
    rises, edge = sign(_differences(rows)), torch.zeros_like(rows[..., :1])
    bound = jumps * rises
    known = grouped(g, dims) + pulls * sign(rows) + torch.cat([edge, bound], -1) - torch.cat([bound, edge], -1)
    # What equal neighbours and zeros leave free is the proximal operator of themselves.
    jumps, pulls = torch.where(rises == 0, jumps, 0.0), torch.where(rows == 0, pulls, 0.0)
    return ungrouped(_fused_rows(known, torch.ones_like(rows), jumps, pulls), w, dims)


def _fused_gradient(w: Tensor, alpha: Scalar, rho: Scalar, *, dim: int = -1) -> Tensor:
    return alpha * (rho * sign(w) + (1 - rho) * _steps_gradient(w, _line(w, dim)))


def _fused_proximal(w: Tensor, step: Scalar, alpha: Scalar, rho: Scalar, *, dim: int = -1) -> Tensor:
    return _steps_proximal(w, torch.ones_like(w), step * alpha * (1 - rho), step * alpha * rho, _line(w, dim))


def _fused_metric(w: Tensor, h: Tensor, step: Scalar, alpha: Scalar, rho: Scalar, *, dim: int = -1) -> Tensor:
    return _steps_metric(w, h, step * alpha * (1 - rho), step * alpha * rho, _line(w, dim))


def _fused_residual(w: Tensor, g: Tensor, strength: Scalar, alpha: Scalar, rho: Scalar, *, dim: int = -1) -> Tensor:
    return _steps_residual(w, g, strength * alpha * (1 - rho), strength * alpha * rho, _line(w, dim))


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
    return alpha * (rho * sum_groups(w.abs(), dims) + (1 - rho) * _jumps(w, dims))


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


# Orders of magnitudes


def falling_fit(y: Tensor) -> Tensor:
    r"""Rows :math:`z_1 \ge z_2 \ge \dots` of least :math:`\sum_i (z_i - y_i)^2`: isotonic regression.

    Halves are fitted and put together, all pairs of a size at once: the fit of both is that of each, but the end of
    the left one and the beginning of the right one, where they are out of order, become one mean.

    References:
        Ayer, Brunk, Ewing, Reid & Silverman, *An empirical distribution function for sampling with incomplete
        information*, 1955.
    """
    size = y.shape[-1]
    length = 1
    while length < size:
        length *= 2
    # What is added has no weight, and lies below all, so that nothing is out of order with it.
    weight = torch.cat([torch.ones_like(y), torch.zeros_like(y[..., :1]).expand(*y.shape[:-1], length - size)], -1)
    z = torch.cat([y, y.amin(-1, keepdim=True).expand(*y.shape[:-1], length - size)], -1)
    block = 1
    while block < length:
        shape = (*y.shape[:-1], length // (2 * block), 2 * block)
        both, mass = z.reshape(shape), weight.reshape(shape)
        left = torch.arange(2 * block, device=y.device) < block
        # How much more the left has to rise to a level than the right has to come down to it, at each of its entries.
        level, order = both.sort(dim=-1, descending=True)
        rising = torch.where(left, mass, 0.0).gather(-1, order)
        falling = torch.where(left, 0.0, mass).gather(-1, order)
        lifts = level * _from_right(rising) - _from_right(rising * level)
        drops = running_sum(falling * level) - level * running_sum(falling)
        over = (lifts > drops).gather(-1, order.argsort(dim=-1))
        # Of the left what is below the right level, of the right what is above it; in rounding only if out of order.
        pooled = (over != left) & (both[..., block - 1 : block] < both[..., block : block + 1])
        share = torch.where(pooled, mass, 0.0)
        count = share.sum(-1, keepdim=True)
        mean = (share * both).sum(-1, keepdim=True) / torch.where(count == 0, 1.0, count)
        z = torch.where(pooled, mean, both).reshape(z.shape)
        block *= 2
    return z[..., :size]


def _from_right(x: Tensor) -> Tensor:
    """Sums from each entry to the end."""
    return running_sum(x.flip(-1)).flip(-1)


def _ordered(w: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Magnitudes of each group from greatest to least, and the way back."""
    size, order = grouped(w, dims).abs().sort(dim=-1, descending=True)
    return size, order.argsort(dim=-1)


def _charges(w: Tensor, costs: Tensor, dims: tuple[int, ...]) -> Tensor:
    """What each entry pays for its magnitude, by its place in the order; the same for equal magnitudes.

    So shared the charges times signs are the shortest subgradient, by autograd too.
    """
    if not w.numel():
        return torch.zeros_like(w.abs())
    size, back = _ordered(w, dims)
    shared = block_means(costs, torch.ones_like(size), size[..., 1:] == size[..., :-1])
    return ungrouped(shared.gather(-1, back), w, dims)


def _sorted_proximal(w: Tensor, costs: Tensor, dims: tuple[int, ...]) -> Tensor:
    if not w.numel():
        return w.clone()
    size, back = _ordered(w, dims)
    landed = falling_fit(size - costs).relu().gather(-1, back)
    landed = torch.where(size.isnan().any(-1, keepdim=True), torch.nan, landed)
    return sign(w) * ungrouped(landed, w, dims) + 0.0


def _slope_costs(w: Tensor, weights: Scalar, dims: tuple[int, ...]) -> Tensor:
    """What each magnitude pays, from greatest to least, or an error if a lesser one pays more."""
    costs = per_entry(weights, grouped(w.abs(), dims), w, dims)
    if costs.device.type == "cpu" and bare(costs) and (costs[..., 1:] > costs[..., :-1]).any():
        raise ValueError(
            "the weights of slope rise; expected numbers from greatest to least in the order of the entries of a "
            "group, or a lesser magnitude would pay more than a greater one, and the penalty would not be convex"
        )
    return costs


def _slope_gradient(w: Tensor, weights: Scalar, *, dim: Dim = None) -> Tensor:
    dims = group_dims(w, dim)
    return sign(w) * _charges(w, _slope_costs(w, weights, dims), dims)


def _slope_proximal(w: Tensor, step: Scalar, weights: Scalar, *, dim: Dim = None) -> Tensor:
    dims = group_dims(w, dim)
    return _sorted_proximal(w, _slope_costs(w, step * weights, dims), dims)


def _slope_dims(w: Tensor, *, dim: Dim = None) -> tuple[int, ...]:
    return group_dims(w, dim)


@penalty(
    gradient=_slope_gradient,
    proximal=_slope_proximal,
    structure=Structure(needs=("order", "directions"), keeps=("signs",), groups=_slope_dims),
    separable=False,
    bounds={"weights": _AT_LEAST_0},
    inner_steps=100,
)
def slope(w: Tensor, weights: Scalar, *, dim: Dim = None) -> Tensor:
    r"""Sorted :math:`\ell_1` norm, :math:`\sum_i \lambda_i |w|_{(i)}` with :math:`|w|_{(1)} \ge |w|_{(2)} \ge \dots`.

    Large weights pay more: it selects with a controlled rate of false discoveries, and makes magnitudes of
    correlated weights equal. With equal weights it is `l1`, with one alone `linf`. The proximal operator is exact;
    in a diagonal metric, where it has no closed form, `inner_steps` find it, by default 100.

    Args:
        weights: :math:`\lambda`, at least 0 and from greatest to least, as it must be for a convex penalty: a number,
            or a tensor that broadcasts to the leaf and is read in the order of its entries; or a tree of them.
        dim: Dimensions that lie inside a group, each of which is sorted for itself; see `group_lasso`. By default
            each leaf is one group.

    Raises:
        ValueError: A leaf has no such dimension, or weights rise (seen on a CPU outside of compiled code alone).

    Example:
        >>> params = {"weight": torch.tensor([1.0, -3.0, 2.5])}
        >>> weights = torch.tensor([1.5, 1.0, 0.5])
        >>> slope(params, weights), slope.prox(params, 1.0, weights)
        (tensor(7.5000), {'weight': tensor([ 0.5000, -1.5000,  1.5000])})

    References:
        Bogdan, van den Berg, Sabatti, Su & Candès, *SLOPE: adaptive variable selection via convex optimization*, 2015.
    """
    dims = group_dims(w, dim)
    return w.abs() * _charges(w, _slope_costs(w, weights, dims), dims)


def _oscar_costs(w: Tensor, dims: tuple[int, ...], alpha: Any, beta: Any) -> Tensor:
    """What each magnitude pays, from greatest to least."""
    rows = grouped(w.abs(), dims)
    later = torch.arange(rows.shape[-1] - 1, -1, -1, dtype=rows.dtype, device=rows.device)
    return per_entry(alpha, rows, w, dims) + per_entry(beta, rows, w, dims) * later


def _oscar_gradient(w: Tensor, alpha: Scalar, beta: Scalar, *, dim: Dim = None) -> Tensor:
    dims = group_dims(w, dim)
    return sign(w) * _charges(w, _oscar_costs(w, dims, alpha, beta), dims)


def _oscar_proximal(w: Tensor, step: Scalar, alpha: Scalar, beta: Scalar, *, dim: Dim = None) -> Tensor:
    dims = group_dims(w, dim)
    costs = _oscar_costs(w, dims, alpha, beta)
    return _sorted_proximal(w, per_entry(step, costs, w, dims) * costs, dims)


@penalty(
    gradient=_oscar_gradient,
    proximal=_oscar_proximal,
    structure=Structure(needs=("order", "directions"), keeps=("signs",), groups=_slope_dims),
    separable=False,
    bounds={"alpha": _AT_LEAST_0, "beta": _AT_LEAST_0},
    inner_steps=100,
)
def oscar(w: Tensor, alpha: Scalar, beta: Scalar, *, dim: Dim = None) -> Tensor:
    r"""Magnitudes and the greater of each pair, :math:`\alpha \sum_i |w_i| + \beta \sum_{i<j} \max(|w_i|, |w_j|)`.

    It makes zeros and equal magnitudes. It is `slope` with weights that fall from
    :math:`\alpha + (n - 1) \beta` to :math:`\alpha` in steps of :math:`\beta`.

    Args:
        alpha: Strength of the sum of magnitudes, at least 0.
        beta: Strength of the sum over pairs, at least 0.
        dim: Dimensions that lie inside a group, whose entries make pairs; see `slope`.

    Raises:
        ValueError: A leaf has no such dimension.

    Example:
        >>> params = {"weight": torch.tensor([1.0, -3.0, 2.5])}
        >>> oscar(params, 0.5, 0.5), oscar.prox(params, 1.0, 0.5, 0.5)
        (tensor(7.5000), {'weight': tensor([ 0.5000, -1.5000,  1.5000])})

    References:
        Bondell & Reich, *Simultaneous regression shrinkage, variable selection, and supervised clustering of
        predictors with OSCAR*, 2008.
    """
    dims = group_dims(w, dim)
    return w.abs() * _charges(w, _oscar_costs(w, dims, alpha, beta), dims)


# Trees of groups


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
            raise ValueError(f"groups names the slice {entry} of a leaf that has {size} there; leave it out with mask=")
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
    return forest.shrink(g + strength * forest.slope(w), strength, zero)


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


# Features of a network


def _skipping(theta: Tensor, size: Tensor, force: Scalar, ratio: Scalar) -> tuple[Tensor, Tensor]:
    """Skip weights of each feature after a proximal step, and the bound of its weights in the first layer.

    Args:
        theta: Skip weights, a row for each feature.
        size: Magnitudes in the first layer, after soft thresholding.
        force: The threshold of the norm of skip weights.
        ratio: The bound over that norm.
    """
    norms = euclidean(theta, (theta.ndim - 1,))
    sorted_, none = size.sort(dim=-1, descending=True).values, torch.zeros_like(norms)
    # With the s largest entries of the first layer at the bound, what the norm would be; the first s that fits.
    pushes = torch.cat([none, running_sum(sorted_)], -1)
    counts = torch.arange(pushes.shape[-1], dtype=norms.dtype, device=norms.device)
    landed = (norms - force + ratio * pushes).relu() / (1 + counts * ratio**2)
    fits = ratio * landed >= torch.cat([sorted_, none], -1)
    landed = landed.gather(-1, fits.to(torch.int64).argmax(-1, keepdim=True))
    even = torch.full_like(theta, 1 / math.sqrt(max(1, theta.shape[-1])))
    way = torch.where(norms == 0, even, theta / torch.where(norms == 0, 1.0, norms))
    return way * landed, ratio * landed


def _skipping_in_metric(
    theta: Tensor, h: Tensor, size: Tensor, k: Tensor, force: Scalar, ratio: Scalar
) -> tuple[Tensor, Tensor]:
    r"""`_skipping` where :math:`h` and :math:`k` weigh the squared distances of skip weights and of the first layer.

    Skip weights of norm b are :math:`h_i v_i / (h_i + \mu)` with some :math:`\mu > -\min h`. The cost of b is convex,
    with derivative :math:`-\mu b + \text{force} - M \sum_i k_i (s_i - M b)_+`, and falls in :math:`\mu`: its root is
    bisected. Two steps of Newton's method then make it exact, and give it derivatives.
    """
    # In units of the greatest metric and magnitude of a feature, so that no power leaves the range of float32.
    most = torch.cat([h, k], -1).amax(-1, keepdim=True)
    h, k, force = h / most, k / most, force / most
    total = euclidean(h * theta, (theta.ndim - 1,)) + ratio * (k * size).sum(-1, keepdim=True)
    alive = total > force
    length = torch.cat([theta.abs(), size], -1).amax(-1, keepdim=True)
    length = torch.where(alive, length, 1.0)
    least = h.amin(-1, keepdim=True)
    softest = h == least
    # What leaves zero goes where the metric is least.
    stuck = ~((theta != 0) & softest).any(-1, keepdim=True)
    pull = torch.where(softest & stuck, torch.finfo(h.dtype).eps, h * theta / length)
    # The dead branch computes with ones, so that no derivative through it is NaN.
    pull, size, force = torch.where(alive, pull, 1.0), size / length, force / length

    def at(far: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm of skip weights, derivative of the cost there, and its own in far."""
        scale = h - least + far
        norm = squared(pull / scale).sum(-1, keepdim=True).sqrt()
        over = size - ratio * norm
        push = ratio * (k * over.relu()).sum(-1, keepdim=True)
        stiffness = ratio**2 * (k * (over > 0)).sum(-1, keepdim=True)
        fall = -(squared(pull) / (scale * scale.square())).sum(-1, keepdim=True) / norm
        return norm, (least - far) * norm + force - push, (least - far + stiffness) * fall - norm

    low, high = torch.full_like(total, -60.0), torch.full_like(total, 50.0)
    for _ in range(42):
        middle = (low + high) / 2
        rising = at(middle.exp())[1] > 0
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    ends = low.exp(), high.exp()
    far = ends[1]
    for _ in range(2):  # In 1 / far, where the derivative is concave: from this side only rounding passes the root.
        _, slope, bend = at(far)
        far = torch.clamp(far / (1 + slope / (bend * far)), *ends)
    norm = at(far)[0]
    gone = torch.where(total.isnan(), total, 0.0)
    kept, bound = torch.where(alive, length * pull / (h - least + far), gone), length * ratio * norm
    return kept, torch.where(alive, bound, gone)


@remembered
def hierarchical(skip: str, hidden: str, axis: int = -1) -> Penalty:
    r"""LassoNet: :math:`\sum_j \|\theta_j\|_2 + \alpha \|W_j\|_1` under :math:`|W_{ij}| \le M \|\theta_j\|_2`.

    A network gets a linear layer :math:`\theta` that skips it, beside its first layer :math:`W`. A feature :math:`j`
    may be used by the first layer only as far as the skip layer uses it: when :math:`\theta_j` becomes zero, the
    whole network forgets the feature. The value is infinite where the constraint is broken, beyond rounding. The
    gradient is that of the sum of norms. The proximal operator is the global minimum, and keeps the constraint; where
    :math:`\theta_j` was zero and the first layer brings it back, its entries are equal. In a diagonal metric it is the
    minimum, too, to rounding; there the entries of the least metric come back.

    The hyperparameters of the penalty are `ratio`, the :math:`M`, and `alpha`, by default 0.

    Args:
        skip: Dotted name of the weight of the skip layer, such as `"skip.weight"`.
        hidden: Dotted name of the weight of the first layer, such as `"layers.0.weight"`.
        axis: Dimension of both along which features lie; by default the last, as in `torch.nn.Linear`.

    Raises:
        ValueError: There are no such leaves, or they have not the same features; later, from the parameters.

    Example:
        >>> lassonet = hierarchical("skip", "hidden")
        >>> params = {"skip": torch.tensor([[2.0, 0.5]]), "hidden": torch.tensor([[3.0, 0.25], [0.5, 0.0]])}
        >>> lassonet.prox(params, 1.0, ratio=1.0)
        {'skip': tensor([[2., 0.]]), 'hidden': tensor([[2.0000, 0.0000],
                [0.5000, 0.0000]])}

    References:
        Lemhadri, Ruan, Abraham & Tibshirani, *LassoNet: a neural network with feature sparsity*, 2021.
    """

    def pair(params: Params) -> tuple[list[Tensor], list[int], Callable[[Iterable[Tensor]], Params]]:
        """All leaves, the places of the two among them, and the way back to a tree."""
        leaves, rebuild = flatten(params)
        paths = tree_paths(params)
        missing = [name for name in (skip, hidden) if name not in paths]
        if missing:
            raise ValueError(f"hierarchical looks for leaf '{missing[0]}'; the parameters have {', '.join(paths)}")
        places = [paths.index(skip), paths.index(hidden)]
        sizes = [leaves[i].shape[axis] if leaves[i].ndim else 0 for i in places]
        if sizes[0] != sizes[1] or not leaves[places[0]].ndim:
            raise ValueError(
                f"'{skip}' and '{hidden}' have {sizes[0]} and {sizes[1]} features along axis {axis}; expected as many"
            )
        for i in places:
            leaves[i] = whole(leaves[i])
        return leaves, places, lambda found: spread_like(rebuild(found), params)

    def features(w: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """A row for each feature, and the dimensions that it holds."""
        dims = tuple(d for d in range(w.ndim) if d != axis % w.ndim)
        return grouped(widen(w), dims), dims

    def value(params: Params, ratio: Scalar, alpha: Scalar = 0.0) -> Tensor:
        leaves, places, _ = pair(params)
        (theta, _), (inner, _) = [features(leaves[i]) for i in places]
        norms = euclidean(theta, (theta.ndim - 1,))
        slack = 1 + 32 * torch.finfo(norms.dtype).eps
        broken = (inner.abs() > ratio * norms * slack).any()
        total = norms.sum() + alpha * inner.abs().sum()
        return torch.where(broken, torch.inf, total)

    def gradient(params: Params, ratio: Scalar, alpha: Scalar = 0.0) -> Params:
        leaves, places, rebuild = pair(params)
        slopes = [torch.zeros_like(w) for w in leaves]
        theta, dims = features(leaves[places[0]])
        norms = euclidean(theta, (theta.ndim - 1,))
        found = ungrouped(theta / torch.where(norms == 0, math.inf, norms), leaves[places[0]], dims)
        slopes[places[0]] = found.to(leaves[places[0]].dtype)
        slopes[places[1]] = (alpha * sign(widen(leaves[places[1]]))).to(leaves[places[1]].dtype)
        return rebuild(slopes)

    def proximal(
        params: Params, step: Scalar, ratio: Scalar, alpha: Scalar = 0.0, metric: Params | None = None
    ) -> Params:
        if any(isinstance(x, Tensor) and x.ndim for x in (step, ratio, alpha)) or not all(
            isinstance(x, (int, float, Tensor)) for x in (step, ratio, alpha)
        ):
            raise ValueError("hierarchical takes one step, ratio and alpha for both of its leaves, not trees of them")
        leaves, places, rebuild = pair(params)
        (theta, outer_dims), (inner, inner_dims) = [features(leaves[i]) for i in places]
        size = inner.abs() - step * alpha
        if metric is None or not theta.numel():
            kept, bound = _skipping(theta, size.relu(), step, ratio)
        else:
            weights = flatten(gathered(metric))[0]
            (h, _), (k, _) = [features(weights[i]) for i in places]
            size = inner.abs() - step * alpha / k
            kept, bound = _skipping_in_metric(theta, h, size.relu(), k, step, ratio)
        within = sign(inner) * torch.minimum(size.relu(), bound)
        results = list(leaves)
        for i, rows, dims in ((places[0], kept, outer_dims), (places[1], within, inner_dims)):
            results[i] = (ungrouped(rows, leaves[i], dims) + 0.0).to(leaves[i].dtype)
        return rebuild(results)

    value.__name__ = "hierarchical"
    value.__doc__ = f"The penalty of LassoNet of '{skip}' and '{hidden}'."
    return Penalty(value, gradient, proximal, bounds={"ratio": _AT_LEAST_0, "alpha": _AT_LEAST_0})
