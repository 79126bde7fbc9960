"""The constraints: penalties of value 0 or infinity, whose proximal operator is a projection for every step.

Each is one block: the rule that projects one leaf, with its documentation. A rule never branches on a value, and
sorts rather than searches, so that a batch of radii costs one call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Scalar
from funcreg.core.arguments import FINITE
from funcreg.core.leafwise import running_sum, sign, squared
from funcreg.core.ranges import concrete
from funcreg.core.tree import at_leaf, tree_leaves, tree_paths
from funcreg.regularizers.composition import Structure
from funcreg.regularizers.constraint import constraint
from funcreg.regularizers.grouped import (
    finite,
    grouped,
    in_its_unit,
    of_groups,
    polar,
    relative,
    root_of_mean,
    sum_groups,
    ungrouped,
)
from funcreg.regularizers.penalties import Dim, group_dims, shrunk

_AT_LEAST_0 = (0.0, math.inf)

_INTERVAL = Structure(interval=True)
#: Whose normals are 0 at entries above 0, and of one sign at zeros: those that keep signs leave them normals.
_HALF_LINE = Structure(interval=True, needs=("signs",))
#: Of balls that hold 0 and are the same in each direction of an axis.
_KEEPS_SIGNS = Structure(keeps=("signs",))


# Normals


def _inner(x: Tensor, y: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The real inner product of each group, reduced dimensions kept."""
    products = (x.conj() * y).real if x.is_complex() else x * y
    return products.sum(dims, keepdim=True) if dims else products


def _without(g: Tensor, outward: Tensor, where: Tensor, dims: tuple[int, ...], both: bool = False) -> Tensor:
    """A gradient plus as much of an outward normal of length 1 as shortens it, where a bound is met; inwards as well
    if a set is hollow there.
    """
    push = -_inner(outward, g, dims)
    return g + torch.where(where, push if both else push.relu(), torch.zeros_like(push)) * outward


def _met(size: Tensor, bound: Scalar, slack: Scalar) -> Tensor:
    """Whether a bound is met but for rounding."""
    return size >= bound - slack * size


def _ball_normal(w: Tensor, g: Tensor, slack: Scalar, radius: Scalar, dims: tuple[int, ...]) -> Tensor:
    norms, directions = polar(w, dims)
    # A ball of radius 0 is a point, of which everything is a normal.
    left = _without(g, directions, _met(norms, radius, slack), dims)
    return torch.where(torch.zeros_like(norms) + radius == 0, torch.zeros_like(g), left)


def share(free: Tensor, tied: Tensor, fixed: Tensor) -> Tensor:
    r"""The number :math:`\mu` of :math:`\sum_{i \text{ fixed}} (p_i - \mu) + \sum_{i \text{ free}} (p_i - \mu)_+ = 0`.

    The sum over some of the free entries alone is never greater, and equal for the right ones, so that the number is
    the greatest of those that all of the largest free entries would give.

    Args:
        free: :math:`p_i` of free entries, along the last dimension; minus infinity elsewhere.
        tied: The sum of :math:`p_i` over fixed entries, with a last dimension of 1.
        fixed: How many they are, at least 1.
    """
    sums = torch.cat([tied, tied + running_sum(free.sort(-1, descending=True).values)], -1)
    counts = fixed + torch.arange(sums.shape[-1], dtype=sums.dtype, device=sums.device)
    return (sums / counts).amax(-1, keepdim=True)


# Entries


def _nonnegative_normal(w: Tensor, g: Tensor, slack: Scalar) -> Tensor:
    return torch.where(w > 0, g, g.clamp(max=0))


@constraint(separable=True, real=True, residual=_nonnegative_normal, structure=_HALF_LINE)
def nonnegative(w: Tensor) -> Tensor:
    r"""No entry below zero, :math:`w_i \ge 0`.

    The projection sets negative entries to 0.

    Example:
        >>> nonnegative.project({"weight": torch.tensor([2.0, -3.0])})
        {'weight': tensor([2., 0.])}
        >>> nonnegative(torch.tensor([2.0, 0.0])), nonnegative(torch.tensor([2.0, -3.0]))
        (tensor(0.), tensor(inf))

    References:
        Lee & Seung, *Learning the parts of objects by non-negative matrix factorization*, 1999.
    """
    return w.relu() + 0.0  # +0.0 also from -0.0.


def check_bounds(lower: Hyper, upper: Hyper, names: tuple[str, str] = ("lower", "upper")) -> None:
    """Raise a ValueError if bounds cross, as those of a box, as far as they are known."""
    lows, highs = tree_leaves(lower), tree_leaves(upper)
    if len(lows) != len(highs) and 1 not in (len(lows), len(highs)):
        return
    count = max(len(lows), len(highs))
    own, other = tree_paths(lower), tree_paths(upper)
    # No max with a key, which torch.compile of torch 2.9 does not know.
    paths = other if len(other) > len(own) or (len(other) == len(own) and own == [""]) else own
    pairs = zip(paths, lows * (count // len(lows) or 1), highs * (count // len(highs) or 1), strict=False)
    for path, low, high in pairs:
        a, b = concrete(low), concrete(high)
        if a is None or b is None:
            continue
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            try:
                crossed = torch.as_tensor(a > b)
            except RuntimeError:  # They fit no common leaf, which is said where the leaf is known.
                continue
            if not crossed.any():
                continue
            a, b = (float(torch.as_tensor(x).broadcast_to(crossed.shape)[crossed][0]) for x in (a, b))
        if not a <= b:
            low, high = names
            raise ValueError(
                f"{at_leaf(path)}{low} is {a} and {high} is {b}; expected {low} <= {high}. Are they swapped?"
            )


def bounds_like(w: Tensor, lower: Scalar, upper: Scalar) -> tuple[Tensor, Tensor]:
    """Bounds as tensors of the dtype of a leaf, where it lies."""
    low, high = (torch.as_tensor(x, dtype=w.dtype, device=w.device) for x in (lower, upper))
    return low, high


def clamp(w: Tensor, lower: Scalar, upper: Scalar) -> Tensor:
    """Each entry in its bounds, NaN where they cross; bounds may be tensors of another dtype."""
    low, high = bounds_like(w, lower, upper)
    inside = torch.where(w < low, low, torch.where(w > high, high, w))
    return torch.where(low <= high, inside, torch.full_like(w, math.nan)) + 0.0


def _box_normal(w: Tensor, g: Tensor, slack: Scalar, lower: Scalar, upper: Scalar) -> Tensor:
    low, high = bounds_like(w, lower, upper)
    # A bound itself is met exactly, but for its rounding in the dtype of the leaf.
    at_low, at_high = w <= low + slack / 32 * low.abs(), w >= high - slack / 32 * high.abs()
    left = torch.where(at_low & (low > -math.inf), g.clamp(max=0), g)
    return torch.where(at_high & (high < math.inf), left.clamp(min=0), left)


@constraint(separable=True, check=check_bounds, real=True, residual=_box_normal, structure=_INTERVAL)
def box(w: Tensor, lower: Scalar, upper: Scalar) -> Tensor:
    r"""Each entry in an interval, :math:`l_i \le w_i \le u_i`.

    Args:
        lower: :math:`l`: number, tensor that broadcasts against a leaf, or a tree of them; may be `-math.inf`.
        upper: :math:`u`, at least `lower`; may be `math.inf`. Bounds that cross where they cannot be checked (in
            compiled or batched code, on a GPU) leave an empty set, whose projection is NaN.

    Raises:
        ValueError: Bounds cross.

    Example:
        >>> box.project({"weight": torch.tensor([2.0, -3.0, 0.5])}, -1.0, 1.0)
        {'weight': tensor([ 1.0000, -1.0000,  0.5000])}
    """
    return clamp(w, lower, upper)


def _linf_ball_normal(w: Tensor, g: Tensor, slack: Scalar, radius: Scalar = 1.0) -> Tensor:
    return _ball_normal(w, g, slack / 32, radius, ())


@constraint(separable=True, bounds={"radius": _AT_LEAST_0}, residual=_linf_ball_normal, structure=_INTERVAL)
def linf_ball(w: Tensor, radius: Scalar = 1.0) -> Tensor:
    r"""No entry larger than a radius, :math:`\max_i |w_i| \le r`.

    Args:
        radius: :math:`r`, at least 0.

    Example:
        >>> linf_ball.project({"weight": torch.tensor([2.0, -3.0, 0.5])}, 1.0)
        {'weight': tensor([ 1.0000, -1.0000,  0.5000])}
    """
    if not w.is_complex():
        return clamp(w, -radius, radius)
    return torch.where(w.abs() > radius, sign(w) * radius, w) + 0.0


# Norms


def _shortened(w: Tensor, radius: Scalar, dims: tuple[int, ...]) -> Tensor:
    norms, directions = polar(w, dims)
    # A norm that is NaN is no smaller one: how far the others have to come in is not known.
    return torch.where(norms <= radius, w, finite(radius, norms) * directions) + 0.0


def _shortened_in_metric(w: Tensor, h: Tensor, radius: Scalar, dims: tuple[int, ...]) -> Tensor:
    r"""The point :math:`h_i w_i / (h_i + \lambda)` of the sphere, where a group is too long."""
    if not w.numel():
        return w.clone()
    norms, directions = polar(w, dims)
    long = (norms > radius) & (norms < math.inf) & (torch.zeros_like(norms) + radius > 0)
    # The branch inside the ball computes with ones, so that no derivative through it is NaN.
    x, h = torch.where(long, directions, torch.ones_like(w)), torch.where(long, h, torch.ones_like(h))
    h = h / (h.amax(dims, keepdim=True) if dims else h)
    goal = torch.where(long, radius / norms, torch.ones_like(norms))
    z = x / (goal / h * root_of_mean(x, goal / h, goal, dims) + goal)
    return torch.where(long, radius * z / sum_groups(squared(z), dims).sqrt() + 0.0, _shortened(w, radius, dims))


def _ball_metric(w: Tensor, h: Tensor, radius: Scalar = 1.0, *, dim: Dim = None) -> Tensor:
    return _shortened_in_metric(w, h, radius, group_dims(w, dim))


def _max_norm_metric(w: Tensor, h: Tensor, radius: Scalar = 1.0, *, dim: Dim = ...) -> Tensor:
    return _shortened_in_metric(w, h, radius, group_dims(w, dim))


def _l2_ball_normal(w: Tensor, g: Tensor, slack: Scalar, radius: Scalar = 1.0, *, dim: Dim = None) -> Tensor:
    return _ball_normal(w, g, slack, radius, group_dims(w, dim))


def _max_norm_normal(w: Tensor, g: Tensor, slack: Scalar, radius: Scalar = 1.0, *, dim: Dim = ...) -> Tensor:
    return _ball_normal(w, g, slack, radius, group_dims(w, dim))


def _ball_dims(w: Tensor, *, dim: Dim = None) -> tuple[int, ...]:
    return group_dims(w, dim)


def _max_norm_dims(w: Tensor, *, dim: Dim = ...) -> tuple[int, ...]:
    return group_dims(w, dim)


@constraint(
    metric=_ball_metric,
    bounds={"radius": _AT_LEAST_0},
    residual=_l2_ball_normal,
    structure=Structure(keeps=("signs", "directions"), groups=_ball_dims),
)
def l2_ball(w: Tensor, radius: Scalar = 1.0, *, dim: Dim = None) -> Tensor:
    r"""Euclidean norms within a radius, :math:`\|w_g\|_2 \le r`.

    The projection scales a group that is too long, and leaves the others exactly as they are.

    Args:
        radius: :math:`r`, at least 0.
        dim: Dimensions that lie inside a group; by default each leaf is one group. `...` makes a group of each row or
            filter, which is `max_norm`; see `group_lasso`.

    Example:
        >>> l2_ball.project({"weight": torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "bias": torch.tensor([0.5])}, 1.0)
        {'weight': tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]]), 'bias': tensor([0.5000])}
    """
    return _shortened(w, radius, group_dims(w, dim))


@constraint(
    metric=_max_norm_metric,
    bounds={"radius": _AT_LEAST_0},
    residual=_max_norm_normal,
    structure=Structure(keeps=("signs", "directions"), groups=_max_norm_dims),
)
def max_norm(w: Tensor, radius: Scalar = 1.0, *, dim: Dim = ...) -> Tensor:
    r"""Norm of the weights of each unit within a radius, :math:`\|w_g\|_2 \le r`, as is used beside dropout.

    This is `l2_ball` with a group for each row of a matrix and each filter of a convolution.

    Args:
        radius: :math:`r`, at least 0.
        dim: Dimensions that lie inside a group; by default (`...`) all but the first. Keras lays a dense matrix out
            the other way round; what it calls `axis=0` is `dim=1` here.

    Example:
        >>> max_norm.project({"weight": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}, 1.0)
        {'weight': tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])}

    References:
        Srebro, Rennie & Jaakkola, *Maximum-margin matrix factorization*, 2004.
        Srivastava et al., *Dropout: a simple way to prevent neural networks from overfitting*, 2014.
    """
    return _shortened(w, radius, group_dims(w, dim))


def on_sphere(w: Tensor, radius: Scalar, dims: tuple[int, ...]) -> Tensor:
    """The nearest point of a sphere; of a group of zeros, to which all are equally near, the one of equal entries."""
    norms, directions = polar(w, dims)
    even = torch.full_like(directions, 1 / math.sqrt(max(1, math.prod([w.shape[d] for d in dims]))))
    return radius * torch.where(norms == 0, even, directions) + 0.0


def _sphere_normal(w: Tensor, g: Tensor, slack: Scalar, radius: Scalar = 1.0, *, dim: Dim = None) -> Tensor:
    norms, directions = polar(w, dims := group_dims(w, dim))
    left = _without(g, directions, torch.ones_like(norms, dtype=torch.bool), dims, both=True)
    return torch.where(torch.zeros_like(norms) + radius == 0, torch.zeros_like(g), left)


@constraint(bounds={"radius": FINITE}, residual=_sphere_normal, convex=False)
def l2_sphere(w: Tensor, radius: Scalar = 1.0, *, dim: Dim = None) -> Tensor:
    r"""Euclidean norms of exactly a radius, :math:`\|w_g\|_2 = r`.

    All points of the sphere are equally near to a group of zeros; the projection takes the one of equal entries.

    Args:
        radius: :math:`r`, at least 0.
        dim: Dimensions that lie inside a group; by default each leaf is one group. See `l2_ball`.

    Example:
        >>> l2_sphere.project({"weight": torch.tensor([0.3, 0.4]), "bias": torch.zeros(4)}, 1.0)
        {'weight': tensor([0.6000, 0.8000]), 'bias': tensor([0.5000, 0.5000, 0.5000, 0.5000])}
    """
    return on_sphere(w, radius, group_dims(w, dim))


def _min_max_normal(
    w: Tensor, g: Tensor, slack: Scalar, shortest: Scalar, longest: Scalar, *, dim: Dim = ...
) -> Tensor:
    norms, directions = polar(w, dims := group_dims(w, dim))
    left = _without(g, directions, _met(norms, longest, slack), dims)
    left = _without(left, -directions, norms <= shortest + slack * norms, dims)
    return torch.where(torch.zeros_like(norms) + longest == 0, torch.zeros_like(g), left)


@constraint(
    bounds={"shortest": _AT_LEAST_0, "longest": _AT_LEAST_0},
    check=lambda shortest, longest: check_bounds(shortest, longest, ("shortest", "longest")),
    residual=_min_max_normal,
    convex=False,
)
def min_max_norm(w: Tensor, shortest: Scalar, longest: Scalar, *, dim: Dim = ...) -> Tensor:
    r"""Norm of the weights of each unit between two lengths, :math:`l \le \|w_g\|_2 \le u`.

    All directions are equally near to a unit of zeros; the projection takes the one of equal entries.

    Args:
        shortest: :math:`l`, at least 0.
        longest: :math:`u`, at least `shortest`; may be `math.inf`.
        dim: Dimensions that lie inside a group; by default (`...`) all but the first, as in `max_norm`.

    Raises:
        ValueError: The shortest is longer than the longest.

    Example:
        >>> min_max_norm.project({"weight": torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.6, 0.8]])}, 1.0, 2.0)
        {'weight': tensor([[1.2000, 1.6000],
                [0.6000, 0.8000],
                [0.6000, 0.8000]])}
    """
    dims = group_dims(w, dim)
    norms = polar(w, dims)[0]
    goal = clamp(norms, shortest, longest)
    return torch.where(goal == norms, w + 0.0, on_sphere(w, goal, dims))


def simplex_excess(x: Tensor, total: Scalar, h: Tensor | None = None) -> Tensor:
    r"""By how much each entry exceeds the threshold that leaves a total, :math:`\sum_i (x_i - \tau / h_i)_+ = t`.

    Along the last dimension, for :math:`t \ge 0`. Entries are taken relative to the largest, so that neither their
    offset nor an infinite one spoils the sum.
    """
    if not x.shape[-1]:
        return x.clone()
    if h is not None:  # In a metric the threshold of an entry is its own: no offset is common to all.
        h = relative(h)
        pulls, order = (h * x).sort(-1, descending=True)
        inverse = (1 / h).gather(-1, order)
        sums, weights = running_sum(pulls * inverse) - total, running_sum(inverse)
        last = ((pulls * weights > sums).sum(-1, keepdim=True) - 1).clamp(min=0)
        found = (x - sums.gather(-1, last) / weights.gather(-1, last) / h).relu()
        # Once more what is missing, which is known to the rounding of what has landed.
        shares = torch.where(found > 0, 1 / h, torch.zeros_like(h))
        whole = shares.sum(-1, keepdim=True)
        missing = total - found.sum(-1, keepdim=True)
        return (found + missing * shares / torch.where(whole == 0, torch.ones_like(whole), whole)).relu()
    largest = x.amax(-1, keepdim=True)
    # Infinite entries are level with each other.
    x = torch.where((x == largest) & largest.isinf(), torch.zeros_like(x), x - largest)
    ordered = x.sort(-1, descending=True).values
    sums = running_sum(ordered) - total
    counts = running_sum(torch.ones_like(x))
    # Entries at the threshold count and rise with it, so that a total of 0 has the derivative of a small one.
    inside = (counts * ordered >= sums) & (ordered > -math.inf)
    last = (inside.sum(-1, keepdim=True) - 1).clamp(min=0)
    threshold = sums.gather(-1, last) / counts.gather(-1, last)
    return torch.where(x < threshold, torch.zeros_like(x), x - threshold)


def _simplex_metric(w: Tensor, h: Tensor, total: Scalar = 1.0, *, dim: Dim = None) -> Tensor:
    dims = group_dims(w, dim)
    return ungrouped(simplex_excess(grouped(w, dims), of_groups(total, w, dims), grouped(h, dims)), w, dims)


def simplex_normal(w: Tensor, g: Tensor, slack: Scalar, total: Scalar = 1.0, *, dim: Dim = None) -> Tensor:
    dims = group_dims(w, dim)
    if not w.numel():
        return g.clone()
    x, pull = grouped(w, dims), -grouped(g, dims)
    inside = x > 0
    tied, fixed = torch.where(inside, pull, 0.0).sum(-1, keepdim=True), inside.sum(-1, keepdim=True)
    level = share(torch.where(inside, -math.inf, pull), tied, fixed.clamp(min=1))
    left = level - pull
    left = torch.where(inside, left, left.clamp(max=0))
    # With a sum of 0 the set is a point, of which everything is a normal.
    return ungrouped(torch.where(fixed == 0, torch.zeros_like(left), left), w, dims)


@constraint(metric=_simplex_metric, bounds={"total": FINITE}, real=True, residual=simplex_normal)
def simplex(w: Tensor, total: Scalar = 1.0, *, dim: Dim = None) -> Tensor:
    r"""Shares of a whole, :math:`w_i \ge 0` and :math:`\sum_{i \in g} w_i = t`.

    The projection subtracts one number from all entries of a group and sets what is below 0 to 0, so that it has
    exact zeros, unlike a softmax.

    Args:
        total: :math:`t`, the sum, at least 0.
        dim: Dimensions that lie inside a group; by default each leaf is one group. See `l2_ball`.

    Example:
        >>> simplex.project({"shares": torch.tensor([0.5, 0.9, -1.0])}, 1.0)
        {'shares': tensor([0.3000, 0.7000, 0.0000])}

    References:
        Duchi, Shalev-Shwartz, Singer & Chandra, *Efficient projections onto the l1-ball*, 2008.
    """
    dims = group_dims(w, dim)
    return ungrouped(simplex_excess(grouped(w, dims), of_groups(total, w, dims)), w, dims)


def _within_l1(w: Tensor, h: Tensor | None, radius: Scalar, dims: tuple[int, ...]) -> Tensor:
    x, radius = grouped(w, dims), of_groups(radius, w, dims)
    sizes = x.abs()
    shrunk = sign(x) * simplex_excess(sizes, radius, None if h is None else grouped(h, dims))
    return ungrouped(torch.where(sizes.sum(-1, keepdim=True) <= radius, x, shrunk) + 0.0, w, dims)


def _l1_ball_metric(w: Tensor, h: Tensor, radius: Scalar = 1.0, *, dim: Dim = None) -> Tensor:
    return _within_l1(w, h, radius, group_dims(w, dim))


def _l1_ball_normal(w: Tensor, g: Tensor, slack: Scalar, radius: Scalar = 1.0, *, dim: Dim = None) -> Tensor:
    dims = group_dims(w, dim)
    if not w.numel():
        return g.clone()
    x, slopes, radius = grouped(w, dims), grouped(g, dims), of_groups(radius, w, dims)
    zero, size = x == 0, x.abs().sum(-1, keepdim=True)
    fixed = (~zero).sum(-1, keepdim=True)
    # On the boundary normals are multiples of subgradients of the norm: the residual of the best strength of l1.
    level = share(torch.where(zero, slopes.abs(), -math.inf), -_inner(sign(x), slopes, (-1,)), fixed.clamp(min=1))
    level = torch.where(_met(size, radius, slack), level.relu(), torch.zeros_like(level))
    left = torch.where(zero, shrunk(slopes, level), slopes + level * sign(x))
    return ungrouped(torch.where(torch.zeros_like(size) + radius == 0, torch.zeros_like(left), left), w, dims)


@constraint(metric=_l1_ball_metric, bounds={"radius": _AT_LEAST_0}, residual=_l1_ball_normal, structure=_KEEPS_SIGNS)
def l1_ball(w: Tensor, radius: Scalar = 1.0, *, dim: Dim = None) -> Tensor:
    r"""Sum of magnitudes within a radius, :math:`\sum_{i \in g} |w_i| \le r`: the lasso as a constraint.

    The projection is soft thresholding by what it takes, with exact zeros; a group inside stays as it is.

    Args:
        radius: :math:`r`, at least 0.
        dim: Dimensions that lie inside a group; by default each leaf is one group. See `l2_ball`.

    Example:
        >>> l1_ball.project({"weight": torch.tensor([3.0, -2.0, 0.5])}, 2.0)
        {'weight': tensor([ 1.5000, -0.5000,  0.0000])}

    References:
        Duchi, Shalev-Shwartz, Singer & Chandra, *Efficient projections onto the l1-ball*, 2008.
    """
    return _within_l1(w, None, radius, group_dims(w, dim))


# Planes


def _along(
    w: Tensor, normal: Scalar, offset: Scalar, dims: tuple[int, ...], h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How many normals a group lies below a plane, and the normals. A normal of zeros moves nothing.

    In a metric a step along the normal is one along the normal over the metric.
    """
    normals = torch.zeros_like(w) + normal
    steps = normals if h is None or not h.numel() else normals / in_its_unit(h, dims)[0]
    products, squares = w * normals, steps * normals
    if dims:
        products, squares = (x.sum(dims, keepdim=True) for x in (products, squares))
    return (offset - products) / torch.where(squares == 0, torch.full_like(squares, math.inf), squares), steps


def _without_normal(w: Tensor, normal: Scalar, dim: Dim) -> Tensor:
    dims = group_dims(w, dim)
    squares = squared(torch.zeros_like(w) + normal)
    return (squares.sum(dims, keepdim=True) if dims else squares) == 0


def _no_plane(w: Tensor, normal: Scalar, offset: Scalar = 0.0, *, dim: Dim = None) -> Tensor:
    nothing = _without_normal(w, normal, dim)
    return nothing & (torch.zeros_like(nothing, dtype=w.dtype) + offset != 0)


def _no_halfspace(w: Tensor, normal: Scalar, offset: Scalar = 0.0, *, dim: Dim = None) -> Tensor:
    nothing = _without_normal(w, normal, dim)
    return nothing & (torch.zeros_like(nothing, dtype=w.dtype) + offset < 0)


def _plane_metric(w: Tensor, h: Tensor, normal: Scalar, offset: Scalar = 0.0, *, dim: Dim = None) -> Tensor:
    for _ in range(2):  # The second takes away the rounding of entries that were far larger.
        below, steps = _along(w, normal, offset, group_dims(w, dim), h)
        w = w + below * steps
    return w


def _plane_normal(
    w: Tensor, g: Tensor, slack: Scalar, normal: Scalar, offset: Scalar = 0.0, *, dim: Dim = None
) -> Tensor:
    dims = group_dims(w, dim)
    _, outward = polar(torch.zeros_like(w) + normal, dims)
    return _without(g, outward, torch.ones_like(_inner(w, w, dims), dtype=torch.bool), dims, both=True)


@constraint(metric=_plane_metric, real=True, missed=_no_plane, residual=_plane_normal)
def hyperplane(w: Tensor, normal: Scalar, offset: Scalar = 0.0, *, dim: Dim = None) -> Tensor:
    r"""A linear equation, :math:`\langle a, w_g \rangle = b`.

    With the normal 1 and the offset 0 the entries of each group sum to 0: centred weights.

    Args:
        normal: :math:`a`: number, tensor that broadcasts against a leaf, or a tree of them. One that is all zeros
            moves nothing; the value tells whether it had to.
        offset: :math:`b`: number, tensor that broadcasts against the groups, or a tree of them.
        dim: Dimensions that lie inside a group; by default each leaf is one group. See `l2_ball`.

    Example:
        >>> hyperplane.project({"weight": torch.tensor([1.0, 2.0, 6.0])}, 1.0, 0.0)
        {'weight': tensor([-2., -1.,  3.])}
    """
    below, normals = _along(w, normal, offset, group_dims(w, dim))
    return w + below * normals


def _halfspace_metric(w: Tensor, h: Tensor, normal: Scalar, offset: Scalar = 0.0, *, dim: Dim = None) -> Tensor:
    below, _ = _along(w, normal, offset, group_dims(w, dim), h)
    return torch.where(below >= 0, w, _plane_metric(w, h, normal, offset, dim=dim)) + 0.0


def _halfspace_normal(
    w: Tensor, g: Tensor, slack: Scalar, normal: Scalar, offset: Scalar = 0.0, *, dim: Dim = None
) -> Tensor:
    dims = group_dims(w, dim)
    length, outward = polar(torch.zeros_like(w) + normal, dims)
    room = offset / torch.where(length == 0, torch.ones_like(length), length) - _inner(outward, w, dims)
    return _without(g, outward, room <= slack * polar(w, dims)[0], dims)


@constraint(metric=_halfspace_metric, real=True, missed=_no_halfspace, residual=_halfspace_normal)
def halfspace(w: Tensor, normal: Scalar, offset: Scalar = 0.0, *, dim: Dim = None) -> Tensor:
    r"""A linear inequality, :math:`\langle a, w_g \rangle \le b`.

    Args:
        normal: :math:`a`: number, tensor that broadcasts against a leaf, or a tree of them. One that is all zeros
            moves nothing; the value tells whether it had to.
        offset: :math:`b`: number, tensor that broadcasts against the groups, or a tree of them.
        dim: Dimensions that lie inside a group; by default each leaf is one group. See `l2_ball`.

    Example:
        >>> halfspace.project({"a": torch.tensor([1.0, 2.0, 6.0]), "b": torch.tensor([-1.0])}, 1.0, 0.0)
        {'a': tensor([-2., -1.,  3.]), 'b': tensor([-1.])}
    """
    below, normals = _along(w, normal, offset, group_dims(w, dim))
    return w + below.clamp(max=0) * normals + 0.0
