"""Constraints of counts: so many entries or groups that are not zero, of a leaf or of each run of entries."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Scalar
from funcreg.core.arguments import FINITE
from funcreg.core.construction import written
from funcreg.core.leafwise import exact_dtype
from funcreg.core.ranges import check_range, concrete
from funcreg.core.tree import tree_leaves
from funcreg.regularizers.constraint import constraint
from funcreg.regularizers.constraints import simplex_excess, simplex_normal
from funcreg.regularizers.grouped import grouped, of_groups, polar, ungrouped
from funcreg.regularizers.penalties import Dim, group_dims

_AT_LEAST_0 = (0.0, math.inf)


def _keep_largest(w: Tensor, sizes: Tensor, count: Scalar) -> Tensor:
    """The entries along the last dimension that have the largest sizes; of equal ones the first."""
    ranks = sizes.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    return torch.where((ranks < count) | w.isnan(), w, torch.zeros_like(w)) + 0.0


def _root(h: Tensor) -> Tensor:
    """What multiplies entries in a metric, where no product with them leaves the range of numbers."""
    return h.to(exact_dtype(h)).sqrt()


def _top_k_metric(w: Tensor, h: Tensor, k: Scalar, *, dim: Dim = None) -> Tensor:
    dims = group_dims(w, dim)
    x = grouped(w, dims)
    return ungrouped(_keep_largest(x, _root(grouped(h, dims)) * x.abs(), of_groups(k, w, dims)), w, dims)


def _count_normal(x: Tensor, g: Tensor, count: Scalar) -> Tensor:
    """What is left of a gradient where zeros along the last dimension may not move, because all counts are taken."""
    free = (x != 0) | ((x != 0).sum(-1, keepdim=True) < count)
    return torch.where(free, g, torch.zeros_like(g))


def _top_k_normal(w: Tensor, g: Tensor, slack: Scalar, k: Scalar, *, dim: Dim = None) -> Tensor:
    dims = group_dims(w, dim)
    return ungrouped(_count_normal(grouped(w, dims), grouped(g, dims), of_groups(k, w, dims)), w, dims)


def check_count(name: str, value: Hyper, hint: str = "") -> None:
    """Raise a ValueError if a count is no whole number, as far as it is known."""
    for x in tree_leaves(value):
        known = concrete(x)
        if known is None:
            continue
        broken = known % 1 != 0
        if broken.any() if isinstance(broken, Tensor) else broken:
            raise ValueError(f"{name} is {written(x)}; expected a whole number{hint}")


def _check_k(k: Hyper) -> None:
    share = "a tenth of a leaf is round(0.1 * w.numel())"
    check_count("k of top_k", k, f": {share}, and a schedule rounds as in lambda count: schedule(count).round()")


@constraint(metric=_top_k_metric, bounds={"k": _AT_LEAST_0}, check=_check_k, residual=_top_k_normal, convex=False)
def top_k(w: Tensor, k: Scalar, *, dim: Dim = None) -> Tensor:
    r"""At most :math:`k` entries that are not zero, :math:`\|w_g\|_0 \le k`.

    The projection keeps the largest, which is magnitude pruning at every step: iterative hard thresholding. Of equal
    magnitudes it keeps those that come first. The set is not convex.

    Args:
        k: How many entries of a group may be non-zero, a whole number of at least 0, or a tree of such for leaves of
            several sizes. A tensor is allowed, also a batched one; `cubic_ramp_schedule` prunes gradually.
        dim: Dimensions that lie inside a group; by default each leaf is one group. See `l2_ball`.

    Example:
        >>> top_k.project({"weight": torch.tensor([0.5, -3.0, 2.0, 2.0])}, 2)
        {'weight': tensor([ 0., -3.,  2.,  0.])}

    References:
        Blumensath & Davies, *Iterative hard thresholding for compressed sensing*, 2009.
    """
    dims = group_dims(w, dim)
    x = grouped(w, dims)
    return ungrouped(_keep_largest(x, x.abs(), of_groups(k, w, dims)), w, dims)


def _sparse_simplex_normal(
    w: Tensor, g: Tensor, slack: Scalar, k: Scalar, total: Scalar = 1.0, *, dim: Dim = None
) -> Tensor:
    dims = group_dims(w, dim)
    x = grouped(w, dims)
    taken = (x == 0) & ((x != 0).sum(-1, keepdim=True) >= of_groups(k, w, dims))
    # Where all counts are taken nothing pulls a zero in.
    held = torch.where(ungrouped(taken, w, dims), torch.full_like(g, math.inf), g)
    return simplex_normal(w, held, slack, total, dim=dim)


def _check_sparse_k(k: Hyper, total: Hyper) -> None:
    check_count("k of sparse_simplex", k)


@constraint(
    bounds={"k": (1.0, math.inf), "total": FINITE},
    check=_check_sparse_k,
    residual=_sparse_simplex_normal,
    real=True,
    convex=False,
)
def sparse_simplex(w: Tensor, k: Scalar, total: Scalar = 1.0, *, dim: Dim = None) -> Tensor:
    r"""Shares of a whole among few, :math:`w_i \ge 0`, :math:`\sum_{i \in g} w_i = t` and :math:`\|w_g\|_0 \le k`.

    A portfolio of at most :math:`k` assets. The projection is that of `simplex` on the :math:`k` greatest entries, of
    equal ones on those that come first. The set is not convex.

    Args:
        k: How many entries of a group may be non-zero, a whole number of at least 1, or a tree of such. A tensor is
            allowed, also a batched one.
        total: :math:`t`, the sum, at least 0.
        dim: Dimensions that lie inside a group; by default each leaf is one group. See `l2_ball`.

    Example:
        >>> sparse_simplex.project({"shares": torch.tensor([0.5, 0.9, 0.4])}, 2)
        {'shares': tensor([0.3000, 0.7000, 0.0000])}

    References:
        Kyrillidis, Becker, Cevher & Koch, *Sparse projections onto the simplex*, 2013.
    """
    dims = group_dims(w, dim)
    x = grouped(w, dims)
    ranks = x.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    few = torch.where((ranks < of_groups(k, w, dims)) | x.isnan(), x, torch.full_like(x, -math.inf))
    return ungrouped(simplex_excess(few, of_groups(total, w, dims)), w, dims)


def _keep_longest(w: Tensor, sizes: Tensor, k: Scalar) -> Tensor:
    """The groups of greatest size, of which there is one number each; of equal ones the first."""
    flat = sizes.reshape(-1)
    ranks = flat.sort(descending=True, stable=True).indices.argsort().reshape(sizes.shape)
    return torch.where((ranks < k) | w.isnan(), w, torch.zeros_like(w)) + 0.0


def _group_top_k_metric(w: Tensor, h: Tensor, k: Scalar, *, dim: Dim = ...) -> Tensor:
    return _keep_longest(w, polar(_root(h) * w, group_dims(w, dim))[0], k)


def _group_top_k_normal(w: Tensor, g: Tensor, slack: Scalar, k: Scalar, *, dim: Dim = ...) -> Tensor:
    there = polar(w, group_dims(w, dim))[0] != 0
    return torch.where(there | (there.sum() < k), g, torch.zeros_like(g))


def _check_group_k(k: Hyper) -> None:
    check_count("k of group_top_k", k)


@constraint(
    metric=_group_top_k_metric,
    bounds={"k": _AT_LEAST_0},
    check=_check_group_k,
    residual=_group_top_k_normal,
    convex=False,
)
def group_top_k(w: Tensor, k: Scalar, *, dim: Dim = ...) -> Tensor:
    r"""At most :math:`k` groups of a leaf that are not zero, :math:`|\{g : w_g \ne 0\}| \le k`.

    The projection keeps the groups of the greatest norms: magnitude pruning of units, or filters, at every step. Of
    equal norms it keeps those that come first. The set is not convex.

    Args:
        k: How many groups may be non-zero, a whole number of at least 0. A tensor is allowed, also a batched one.
        dim: Dimensions that lie inside a group; by default (`...`) all but the first, so that a group is a row of a
            matrix or a filter. See `group_lasso`.

    Example:
        >>> group_top_k.project({"weight": torch.tensor([[3.0, 4.0], [0.3, 0.4], [6.0, 0.0]])}, 1)
        {'weight': tensor([[0., 0.],
                [0., 0.],
                [6., 0.]])}

    References:
        Baraniuk, Cevher, Duarte & Hegde, *Model-based compressive sensing*, 2010.
    """
    return _keep_longest(w, polar(w, group_dims(w, dim))[0], k)


def _runs(w: Tensor, m: Any, dim: int) -> Tensor:
    """A leaf with each run of `m` entries of a dimension along a last dimension."""
    if not isinstance(m, int):
        raise ValueError(f"m is {m!r}; expected a whole number: it is part of a shape, and cannot be a tensor")
    (at,) = group_dims(w, dim)
    if w.shape[at] % m:
        raise ValueError(
            f"n_m_sparsity got a leaf of shape {tuple(w.shape)}, whose dimension {dim} is no multiple of m={m}. Leave "
            "such leaves out with mask=, or choose another dim."
        )
    x = w.movedim(at, -1)
    return x.reshape(*x.shape[:-1], w.shape[at] // m, m)  # Not unflatten: under a default device it does not compile.


def _n_m_metric(w: Tensor, h: Tensor, n: Scalar = 2, m: int = 4, *, dim: int = -1) -> Tensor:
    x = _runs(w, m, dim)
    return _keep_largest(x, _root(_runs(h, m, dim)) * x.abs(), n).flatten(-2).movedim(-1, dim)


def _n_m_normal(w: Tensor, g: Tensor, slack: Scalar, n: Scalar = 2, m: int = 4, *, dim: int = -1) -> Tensor:
    return _count_normal(_runs(w, m, dim), _runs(g, m, dim), n).flatten(-2).movedim(-1, dim)


def _check_n_m(n: Hyper, m: Hyper) -> None:
    check_count("n of n_m_sparsity", n)
    for x in tree_leaves(m):
        if isinstance(x, int):
            check_range(f"n of n_m_sparsity with m={x}", n, 0, x, hint="Are they swapped?")


@constraint(
    metric=_n_m_metric,
    bounds={"n": _AT_LEAST_0, "m": (1.0, math.inf)},
    check=_check_n_m,
    residual=_n_m_normal,
    convex=False,
)
def n_m_sparsity(w: Tensor, n: Scalar = 2, m: int = 4, *, dim: int = -1) -> Tensor:
    r"""At most :math:`n` of each :math:`m` neighbours that are not zero: the 2:4 pattern that sparse hardware runs.

    Of equal magnitudes the projection keeps those that come first. The set is not convex.

    Args:
        n: How many may be non-zero, from 0 to `m`.
        m: How many neighbours make a group, a whole number that divides the dimension.
        dim: The dimension along which they are neighbours; by default the last, the inputs of a linear layer.

    Raises:
        ValueError: A leaf has no such dimension, or `m` does not divide it.

    Example:
        >>> n_m_sparsity.project({"weight": torch.tensor([[0.5, -3.0, 2.0, 1.0, 0.1, 0.2, 0.0, 0.3]])}, 2, 4)
        {'weight': tensor([[ 0.0000, -3.0000,  2.0000,  0.0000,  0.0000,  0.2000,  0.0000,  0.3000]])}

    References:
        Mishra et al., *Accelerating sparse deep neural networks*, 2021.
    """
    x = _runs(w, m, dim)
    return _keep_largest(x, x.abs(), n).flatten(-2).movedim(-1, dim)
