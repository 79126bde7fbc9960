"""Penalties of the order of magnitudes: a greater one pays more.

Sorted magnitudes less what they pay are fitted by isotonic regression. Nothing branches on a value: all groups go the
same way at once, so that it runs under `vmap`, on any device, and has derivatives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Scalar
from funcreg.core.leafwise import bare, running_sum, sign, step_times, times
from funcreg.regularizers.composition import Structure
from funcreg.regularizers.grouped import grouped, per_entry, ungrouped
from funcreg.regularizers.lifting import penalty
from funcreg.regularizers.neighbours import block_means
from funcreg.regularizers.penalties import Dim, group_dims

_AT_LEAST_0 = (0.0, math.inf)


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
    # What shares a cost above the sum of magnitudes is zero, so that no difference of infinities need appear.
    costs = torch.minimum(costs, 2 * size.detach().sum(-1, keepdim=True))
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
    return times(_charges(w, _slope_costs(w, weights, dims), dims), sign(w))


def _slope_proximal(w: Tensor, step: Scalar, weights: Scalar, *, dim: Dim = None) -> Tensor:
    dims = group_dims(w, dim)
    return _sorted_proximal(w, _slope_costs(w, step_times(step, weights), dims), dims)


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
    return times(_charges(w, _slope_costs(w, weights, dims), dims), w.abs())


def _oscar_costs(w: Tensor, dims: tuple[int, ...], alpha: Any, beta: Any) -> Tensor:
    """What each magnitude pays, from greatest to least."""
    rows = grouped(w.abs(), dims)
    later = torch.arange(rows.shape[-1] - 1, -1, -1, dtype=rows.dtype, device=rows.device)
    return per_entry(alpha, rows, w, dims) + times(per_entry(beta, rows, w, dims), later)


def _oscar_gradient(w: Tensor, alpha: Scalar, beta: Scalar, *, dim: Dim = None) -> Tensor:
    dims = group_dims(w, dim)
    return times(_charges(w, _oscar_costs(w, dims, alpha, beta), dims), sign(w))


def _oscar_proximal(w: Tensor, step: Scalar, alpha: Scalar, beta: Scalar, *, dim: Dim = None) -> Tensor:
    dims = group_dims(w, dim)
    return _sorted_proximal(w, _oscar_costs(w, dims, step_times(step, alpha), step_times(step, beta)), dims)


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
    return times(_charges(w, _oscar_costs(w, dims, alpha, beta), dims), w.abs())
