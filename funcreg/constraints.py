"""The constraints: penalties of value 0 or infinity, whose proximal operator is a projection for every step.

Each is one block: the rule that projects one leaf, with its documentation. A rule never branches on a value, and
sorts rather than searches, so that a batch of radii costs one call.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from funcreg._typing import Hyper, Mask, Params, Scalar
from funcreg.composition import Structure
from funcreg.construction import written
from funcreg.penalties import Dim, group_dims, shrunk
from funcreg.penalty import LACKING, Penalty
from funcreg.ranges import check_range, concrete, flags
from funcreg.tree import (
    compute,
    compute_leaves,
    compute_wide,
    flatten,
    reduce_leaves,
    running_sum,
    safe_sqrt,
    sign,
    squared,
    tree_leaves,
    tree_paths,
)
from funcreg.tree import total as summed

_AT_LEAST_0 = (0.0, math.inf)


class Constraint(Penalty):
    r"""A set of allowed parameters: the penalty that is 0 in the set and infinite outside of it.

    `c.project(params, *hyper)` is the nearest point of the set, `c.prox(params, step, *hyper)` the same for every
    step, also for 0. `c(params, *hyper)` is 0 if the parameters lie in the set and infinite if not; a leaf counts as
    inside if its distance from the set is within the rounding of its size. The gradient is 0: a constraint has no
    slope inside, and outside none that helps. Most are made from a rule on one leaf, with the decorator `constraint`.

    Args:
        projection: From `(params, *hyper, **options)` to the nearest tree of the set. One that knows it in a metric,
            too, takes the keyword `metric=None`: a tree of positive tensors that weigh the squared distance.
        bounds: From the name of a hyperparameter to the least and greatest number it may be.
        check: Function of the hyperparameters that raises an error if they contradict each other.
        missed: From `(params, *hyper, **options)` to bools: whether a leaf lies outside although the projection leaves
            it where it is, for want of a nearest point. By default none does.
        in_metric: From the same to whether `projection` finds the nearest point in a metric; by default whether it
            takes one.
        residual: From `(params, grads, *hyper, **options)`, for parameters in the set, to the element of least norm of
            :math:`\nabla f` plus a normal of the set; by default the residual of the projection,
            :math:`w - P(w - \nabla f)`, which is 0 at the same points, but a length and no gradient.
        rule: The function whose name, documentation and signature these are; by default `projection`.
        separable: Whether each entry is bounded by itself.
        couples_leaves: Whether the projection of one leaf depends on others.
        convex: Whether the set is convex.
        structure: What sums with this constraint may rely on; see `Structure`.

    Example:
        Parameters that are all the same, in one leaf:

        >>> equal = Constraint(lambda params: tree_map(lambda w: w.mean().expand_as(w).clone(), params))
        >>> params = {"weight": torch.tensor([1.0, 3.0])}
        >>> equal(params), equal.project(params), equal(equal.project(params))
        (tensor(inf), {'weight': tensor([2., 2.])}, tensor(0.))
    """

    def __init__(
        self,
        projection: Callable[..., Params],
        *,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        check: Callable[..., None] | None = None,
        missed: Callable[..., list[Tensor]] | None = None,
        in_metric: Callable[..., bool] | None = None,
        residual: Callable[..., Params] | None = None,
        rule: Callable[..., Any] | None = None,
        separable: bool = False,
        couples_leaves: bool = True,
        convex: bool = True,
        structure: Structure | None = None,
    ) -> None:
        flags(convex=convex)

        def outside(params: Params, *hyper: Hyper, **options: Any) -> list[Tensor]:
            nearest = projection(params, *hyper, **options)
            leaves, rebuild = flatten(params)
            rounding = rebuild([_rounding(leaf) for leaf in leaves])
            terms = compute_leaves(_outside, params, nearest, hyper=(rounding,))
            if missed is not None:
                lost = missed(params, *hyper, **options)
                terms = [torch.where(out, x + math.inf, x) for out, x in zip(lost, terms, strict=True)]
            return terms

        def value(params: Params, *hyper: Hyper, **options: Any) -> Tensor:
            return summed(outside(params, *hyper, **options))

        def left(params: Params, grads: Params, strength: Hyper, *hyper: Hyper, **options: Any) -> Params:
            if residual is not None:
                found = residual(params, grads, *hyper, **options)
            else:
                moved = compute_wide(lambda w, g: w - g, params, grads)
                found = compute(lambda w, z: w - z, params, projection(moved, *hyper, **options))
            _, rebuild = flatten(params)
            lost = rebuild(outside(params, *hyper, **options))
            return compute(lambda r, out: torch.where(out == 0, r, out), found, hyper=(lost,))

        def gradient(params: Params, *hyper: Hyper, **options: Any) -> Params:
            return compute(lambda w: torch.where(w != w, w, torch.zeros_like(w)), params)

        def proximal(params: Params, step: Hyper, *hyper: Hyper, **options: Any) -> Params:
            return projection(params, *hyper, **options)

        def weighted(params: Params, weights: Hyper, /, *hyper: Hyper, **options: Any) -> Tensor:
            return value(params, *hyper, **options)  # No number changes 0 or infinity; 0 does not open the set either.

        told = in_metric
        if in_metric is None:
            takes = "metric" in inspect.signature(projection).parameters
            in_metric = lambda *hyper, **options: takes
        super().__init__(
            value,
            gradient,
            proximal,
            residual=left,
            bounds=bounds,
            rule=projection if rule is None else rule,
            weighted=weighted,
            in_metric=in_metric,
            separable=separable,
            couples_leaves=couples_leaves,
            has_gradient=False,
            convex=convex,
            structure=structure,
        )
        self._made = (
            type(self),
            (projection,),
            {
                "bounds": bounds,
                "check": check,
                "missed": missed,
                "in_metric": told,
                "residual": residual,
                "rule": rule,
                "separable": separable,
                "couples_leaves": couples_leaves,
                "convex": convex,
                "structure": structure,
            },
        )
        self._options -= {"metric"}  # Of the projection, not of the set.
        shown = [p for p in self.__signature__.parameters.values() if p.name != "metric"]
        self.__signature__ = inspect.Signature(shown)
        self._check = check

    kind = "constraint"

    def project(
        self,
        params: Params = LACKING,
        *hyper: Hyper,
        metric: Params | None = None,
        inner_steps: int | None = None,
        mask: Mask | None = None,
        **options: Any,
    ) -> Params:
        r"""The nearest point of the set, :math:`\arg\min_{z \in C} \sum_i h_i (z_i - w_i)^2`.

        Args:
            params: The tree :math:`w`.
            hyper: Hyperparameters of the constraint.
            metric: Tree of positive tensors :math:`h` like the parameters; by default all ones.
            inner_steps: For a convex set without a rule in a metric: the steps of a descent, as in `prox`.
            mask: Leaves on which the constraint acts; the others stay as they are.
            options: Static options of the constraint.
        """
        self._check_given("project", params=params)
        return self.prox(params, 0.0, *hyper, metric=metric, inner_steps=inner_steps, mask=mask, **options)

    def bind(self, *hyper: Hyper, **options: Any) -> tuple[tuple[Hyper, ...], dict[str, Any]]:
        """Hyperparameters in their order and options, or an error that says what this constraint takes."""
        values, options = super().bind(*hyper, **options)
        if self._check is not None:
            self._check(*values)
        return values, options


def _rounding(w: Tensor) -> float:
    """How far a leaf may be off by rounding, relative to its size."""
    return 32 * torch.finfo(w.dtype).eps


def _outside(w: Tensor, z: Tensor, rounding: float) -> Tensor:
    """0 if a leaf is its own projection but for rounding, infinite if not, NaN if it has one."""
    off = torch.where(w == z, torch.zeros_like(w), w - z).abs()
    sizes = z.abs()
    sizes = torch.where(sizes == math.inf, torch.zeros_like(sizes), sizes)
    # In units of the largest, so that no square leaves the range of float32.
    unit = sizes.amax() if w.numel() else sizes.sum()
    unit = torch.where(unit == 0, torch.ones_like(unit), unit)
    distance, size = ((x / unit).square().sum().sqrt() for x in (off, sizes))
    inside = torch.where(distance <= rounding * size, torch.zeros_like(unit), torch.full_like(unit, math.inf))
    return torch.where(off.isnan().any(), torch.full_like(unit, math.nan), inside)


@overload
def constraint(rule: Callable[..., Tensor], /) -> Constraint: ...


@overload
def constraint(
    *,
    metric: Callable[..., Tensor] | None = None,
    separable: bool = False,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    check: Callable[..., None] | None = None,
    real: bool = False,
    missed: Callable[..., Tensor] | None = None,
    residual: Callable[..., Tensor] | None = None,
    convex: bool = True,
    structure: Structure | None = None,
) -> Callable[[Callable[..., Tensor]], Constraint]: ...


def constraint(
    rule: Callable[..., Tensor] | None = None,
    /,
    *,
    metric: Callable[..., Tensor] | None = None,
    separable: bool = False,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    check: Callable[..., None] | None = None,
    real: bool = False,
    missed: Callable[..., Tensor] | None = None,
    residual: Callable[..., Tensor] | None = None,
    convex: bool = True,
    structure: Structure | None = None,
) -> Constraint | Callable[[Callable[..., Tensor]], Constraint]:
    r"""Lift the projection of one leaf to a `Constraint` on trees.

    Positional arguments after the leaf are hyperparameters: numbers, tensors, or trees like the parameters.
    Keyword-only arguments are static options. The rule sees float32 at least; projections come back in the dtype of
    the leaf. A convex set that needs none of the arguments below is `@constraint` alone.

    Args:
        rule: The projection, where there is nothing else to say of it.
        metric: `(w, metric, *hyper, **options)` to the nearest point where :math:`h` weighs the squared distance; not
            needed for an elementwise constraint.
        separable: Whether each entry is bounded by itself, so that no metric changes the projection.
        bounds: From the name of a hyperparameter to the least and greatest number it may be.
        check: Function of the hyperparameters that raises an error if they contradict each other.
        real: Whether complex leaves are refused, for a set that needs an order.
        missed: `(w, *hyper, **options)` to bools: where a leaf lies outside although the projection leaves it where it
            is, for want of a nearest point.
        residual: `(w, g, slack, *hyper, **options)`, for a leaf in the set, to the element of least norm of :math:`g`
            plus a normal of the set; by default the residual of the projection, :math:`w - P(w - g)`. The slack is how
            far, relative to its size, a sum or norm of a leaf may be off a bound by rounding.
        convex: Whether the set is convex.
        structure: What sums with this constraint may rely on; see `Structure`.

    Example:
        >>> @constraint(separable=True, real=True, convex=False)
        ... def whole(w):
        ...     "Whole numbers."
        ...     return w.round()
        >>> whole.project({"weight": torch.tensor([0.7, -2.2])})
        {'weight': tensor([ 1., -2.])}
        >>> whole(torch.tensor([1.0, -2.0])), whole(torch.tensor([0.5]))
        (tensor(0.), tensor(inf))
    """

    flags(separable=separable, real=real, convex=convex)
    given = {
        "metric": metric,
        "separable": separable,
        "bounds": bounds,
        "check": check,
        "real": real,
        "missed": missed,
        "residual": residual,
        "convex": convex,
        "structure": structure,
    }
    weighed = metric

    def lift(rule: Callable[..., Tensor]) -> Constraint:
        def projection(params: Params, *hyper: Hyper, metric: Params | None = None, **options: Any) -> Params:
            if real and any(leaf.is_complex() for leaf in tree_leaves(params)):
                names = zip(tree_paths(params), tree_leaves(params), strict=True)
                first = next(name for name, leaf in names if leaf.is_complex())
                raise TypeError(f"leaf '{first}' is complex; {rule.__name__} takes real numbers, which have an order")
            if metric is None or weighed is None:
                return compute(lambda w, *row: rule(w, *row, **options), params, hyper=hyper)
            near = weighed
            return compute(lambda w, h, *row: near(w, h, *row, **options), params, metric, hyper=hyper)

        def in_metric(*hyper: Any, **options: Any) -> bool:
            return weighed is not None or separable

        def lost(params: Params, *hyper: Hyper, **options: Any) -> list[Tensor]:
            return reduce_leaves(lambda w, *row: out(w, *row, **options), params, hyper=hyper, op="any")

        def out(w: Tensor, *hyper: Any, **options: Any) -> Tensor:
            # Leaves without entries are in every set.
            return missed(w, *hyper, **options) if missed is not None and w.numel() else torch.zeros_like(w)

        def left(params: Params, grads: Params, *hyper: Hyper, **options: Any) -> Params:
            normal = residual
            assert normal is not None
            leaves, rebuild = flatten(params)
            slack = rebuild([_rounding(leaf) for leaf in leaves])
            return compute(lambda w, g, *row: normal(w, g, *row, **options), params, grads, hyper=(slack, *hyper))

        return Constraint(
            projection,
            bounds=bounds,
            check=check,
            missed=None if missed is None else lost,
            in_metric=in_metric,
            residual=None if residual is None else left,
            rule=rule,
            separable=separable,
            couples_leaves=False,
            convex=convex,
            structure=structure,
        ).made_from(constraint, given, rule)

    return lift if rule is None else lift(rule)


# Groups


_INTERVAL = Structure(interval=True)
#: Whose normals are 0 at entries above 0, and of one sign at zeros: those that keep signs leave them normals.
_HALF_LINE = Structure(interval=True, needs=("signs",))
#: Of balls that hold 0 and are the same in each direction of an axis.
_KEEPS_SIGNS = Structure(keeps=("signs",))


def grouped(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A leaf with the entries of each group along one last dimension."""
    if not dims:
        return w.unsqueeze(-1)
    return w.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims))


def ungrouped(x: Tensor, w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """What `grouped` made of a leaf, in the shape of that leaf again."""
    if not dims:
        return x.squeeze(-1)
    outer = [n for d, n in enumerate(w.shape) if d not in dims]
    return x.reshape([*outer, *[w.shape[d] for d in dims]]).movedim(tuple(range(-len(dims), 0)), dims)


def _of_groups(x: Scalar, w: Tensor, dims: tuple[int, ...]) -> Scalar:
    """A hyperparameter that broadcasts against a leaf, beside the groups of that leaf."""
    return grouped(x.broadcast_to(w.shape), dims)[..., :1] if isinstance(x, Tensor) and x.ndim else x


def polar(w: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The norm of each group and its direction, zero for a group of zeros; computed in units of the largest entry.

    A group with infinite entries points along them alone.
    """
    if not w.numel():
        return squared(w).sum(dims, keepdim=True) if dims else squared(w), w.clone()
    size = w.abs()
    largest = size.amax(dims, keepdim=True) if dims else size
    plain = (largest > 0) & (largest < math.inf)
    unit = torch.where(plain, largest, torch.ones_like(largest))
    infinite = torch.where(size == math.inf, sign(w), torch.zeros_like(w))
    scaled = torch.where(largest == math.inf, infinite, w / unit)
    norms = squared(scaled)
    norms = safe_sqrt(norms.sum(dims, keepdim=True) if dims else norms)
    directions = scaled / torch.where(norms == 0, torch.ones_like(norms), norms)
    return torch.where(largest == math.inf, largest, norms * unit), directions


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
    for low, high in zip(lows * (count // len(lows) or 1), highs * (count // len(highs) or 1), strict=False):
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
            raise ValueError(f"{low} is {a} and {high} is {b}; expected {low} <= {high}. Are they swapped?")


def clamp(w: Tensor, lower: Scalar, upper: Scalar) -> Tensor:
    """Each entry in its bounds, NaN where they cross; bounds may be tensors of another dtype."""
    low, high = (torch.as_tensor(x, dtype=w.dtype, device=w.device) for x in (lower, upper))
    inside = torch.where(w < low, low, torch.where(w > high, high, w))
    return torch.where(low <= high, inside, torch.full_like(w, math.nan)) + 0.0


def _box_normal(w: Tensor, g: Tensor, slack: Scalar, lower: Scalar, upper: Scalar) -> Tensor:
    low, high = (torch.as_tensor(x, dtype=w.dtype, device=w.device) for x in (lower, upper))
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
    return torch.where(norms > radius, radius * directions, w) + 0.0


def _shortened_in_metric(w: Tensor, h: Tensor, radius: Scalar, dims: tuple[int, ...]) -> Tensor:
    r"""The point :math:`h_i w_i / (h_i + \lambda)` of the sphere, where a group is too long.

    Newton's method on one over the norm, which is concave in :math:`\lambda`, climbs to the root from where no entry
    alone is longer than the radius.
    """

    def over_group(x: Tensor) -> Tensor:
        return x.sum(dims, keepdim=True) if dims else x

    if not w.numel():
        return w.clone()
    norms, directions = polar(w, dims)
    long = (norms > radius) & (norms < math.inf) & (torch.zeros_like(norms) + radius > 0)
    # The branch inside the ball computes with ones, so that no derivative through it is NaN.
    x, h = torch.where(long, directions, torch.ones_like(w)), torch.where(long, h, torch.ones_like(h))
    h = h / (h.amax(dims, keepdim=True) if dims else h)
    goal = torch.where(long, radius / norms, torch.ones_like(norms))
    root = (h * (x.abs() / goal - 1)).relu()
    root = root.amax(dims, keepdim=True) if dims else root
    for _ in range(8):
        z = h * x / (h + root)
        length = over_group(squared(z)).sqrt()
        root = root + length.square() / over_group(squared(z) / (h + root)) * (length / goal - 1)
    z = h * x / (h + root)
    return torch.where(long, radius * z / over_group(squared(z)).sqrt() + 0.0, _shortened(w, radius, dims))


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


@constraint(bounds={"radius": _AT_LEAST_0}, residual=_sphere_normal, convex=False)
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
        pulls, order = (h * x).sort(-1, descending=True)
        inverse = (1 / h).gather(-1, order)
        sums, weights = running_sum(pulls * inverse) - total, running_sum(inverse)
        last = ((pulls * weights > sums).sum(-1, keepdim=True) - 1).clamp(min=0)
        return (x - sums.gather(-1, last) / weights.gather(-1, last) / h).relu()
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
    return ungrouped(simplex_excess(grouped(w, dims), _of_groups(total, w, dims), grouped(h, dims)), w, dims)


def _simplex_normal(w: Tensor, g: Tensor, slack: Scalar, total: Scalar = 1.0, *, dim: Dim = None) -> Tensor:
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


@constraint(metric=_simplex_metric, bounds={"total": _AT_LEAST_0}, real=True, residual=_simplex_normal)
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
    return ungrouped(simplex_excess(grouped(w, dims), _of_groups(total, w, dims)), w, dims)


def _within_l1(w: Tensor, h: Tensor | None, radius: Scalar, dims: tuple[int, ...]) -> Tensor:
    x, radius = grouped(w, dims), _of_groups(radius, w, dims)
    sizes = x.abs()
    shrunk = sign(x) * simplex_excess(sizes, radius, None if h is None else grouped(h, dims))
    return ungrouped(torch.where(sizes.sum(-1, keepdim=True) <= radius, x, shrunk) + 0.0, w, dims)


def _l1_ball_metric(w: Tensor, h: Tensor, radius: Scalar = 1.0, *, dim: Dim = None) -> Tensor:
    return _within_l1(w, h, radius, group_dims(w, dim))


def _l1_ball_normal(w: Tensor, g: Tensor, slack: Scalar, radius: Scalar = 1.0, *, dim: Dim = None) -> Tensor:
    dims = group_dims(w, dim)
    if not w.numel():
        return g.clone()
    x, slopes, radius = grouped(w, dims), grouped(g, dims), _of_groups(radius, w, dims)
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


# Counts


def _keep_largest(w: Tensor, sizes: Tensor, count: Scalar) -> Tensor:
    """The entries along the last dimension that have the largest sizes; of equal ones the first."""
    ranks = sizes.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    return torch.where((ranks < count) | w.isnan(), w, torch.zeros_like(w)) + 0.0


def _top_k_metric(w: Tensor, h: Tensor, k: Scalar, *, dim: Dim = None) -> Tensor:
    dims = group_dims(w, dim)
    x = grouped(w, dims)
    return ungrouped(_keep_largest(x, grouped(h, dims).sqrt() * x.abs(), _of_groups(k, w, dims)), w, dims)


def _count_normal(x: Tensor, g: Tensor, count: Scalar) -> Tensor:
    """What is left of a gradient where zeros along the last dimension may not move, because all counts are taken."""
    free = (x != 0) | ((x != 0).sum(-1, keepdim=True) < count)
    return torch.where(free, g, torch.zeros_like(g))


def _top_k_normal(w: Tensor, g: Tensor, slack: Scalar, k: Scalar, *, dim: Dim = None) -> Tensor:
    dims = group_dims(w, dim)
    return ungrouped(_count_normal(grouped(w, dims), grouped(g, dims), _of_groups(k, w, dims)), w, dims)


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
    return ungrouped(_keep_largest(x, x.abs(), _of_groups(k, w, dims)), w, dims)


def _keep_longest(w: Tensor, sizes: Tensor, k: Scalar) -> Tensor:
    """The groups of greatest size, of which there is one number each; of equal ones the first."""
    flat = sizes.reshape(-1)
    ranks = flat.sort(descending=True, stable=True).indices.argsort().reshape(sizes.shape)
    return torch.where((ranks < k) | w.isnan(), w, torch.zeros_like(w)) + 0.0


def _group_top_k_metric(w: Tensor, h: Tensor, k: Scalar, *, dim: Dim = ...) -> Tensor:
    return _keep_longest(w, polar(h.sqrt() * w, group_dims(w, dim))[0], k)


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
    return _keep_largest(x, _runs(h, m, dim).sqrt() * x.abs(), n).flatten(-2).movedim(-1, dim)


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


# Planes


def _along(
    w: Tensor, normal: Scalar, offset: Scalar, dims: tuple[int, ...], h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How many normals a group lies below a plane, and the normals. A normal of zeros moves nothing.

    In a metric a step along the normal is one along the normal over the metric.
    """
    normals = torch.zeros_like(w) + normal
    steps = normals if h is None else normals / h
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
    below, steps = _along(w, normal, offset, group_dims(w, dim), h)
    return w + below * steps


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
    below, steps = _along(w, normal, offset, group_dims(w, dim), h)
    return w + below.clamp(max=0) * steps + 0.0


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
