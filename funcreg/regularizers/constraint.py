"""The class of constraints, and what makes one of a rule that projects a leaf."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Params
from funcreg.core.arguments import LACKING
from funcreg.core.leafwise import compute, compute_leaves, compute_wide, obeyed, reduce_leaves
from funcreg.core.leafwise import total as summed
from funcreg.core.ranges import flags
from funcreg.core.tree import flatten, tree_leaves, tree_paths
from funcreg.regularizers.composition import Structure
from funcreg.regularizers.penalty import Penalty, remembering, remembering_rule

_AT_LEAST_0 = (0.0, math.inf)


class Constraint(Penalty):
    r"""A set of allowed parameters: the penalty that is 0 in the set and infinite outside of it.

    `c.project(params, *hyper)` is the nearest point of the set, `c.prox(params, step, *hyper)` the same for every
    step, also for 0. `c(params, *hyper)` is 0 if the parameters lie in the set and infinite if not; a leaf counts as
    inside if its distance from the set is within the rounding of its size. The gradient is 0: a constraint has no
    slope inside, and outside none that helps. A NaN makes NaN of each entry whose nearest point depends on it; where
    entries are ranked, as by `top_k`, it counts as the greatest. Most are made from a rule on one leaf, with the
    decorator `constraint`.

    Args:
        projection: From `(params, *hyper, **options)` to the nearest tree of the set. One that knows it in a metric,
            too, takes the keyword `metric=None`: a tree of positive tensors that weigh the squared distance. Leaves
            that a mask leaves out are not in these trees: `tree_map` and `tree_leaves` pass their places by.
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

    @remembering
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

        if in_metric is None:
            takes = "metric" in inspect.signature(projection).parameters
            in_metric = lambda *hyper, **options: takes
        super().__init__(
            **_of_set(projection, missed, residual),
            bounds=bounds,
            rule=projection if rule is None else rule,
            in_metric=in_metric,
            separable=separable,
            couples_leaves=couples_leaves,
            has_gradient=False,
            convex=convex,
            structure=structure,
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


def _of_set(
    projection: Callable[..., Params],
    missed: Callable[..., list[Tensor]] | None,
    residual: Callable[..., Params] | None,
) -> dict[str, Any]:
    """The rules of the penalty that is 0 in a set and infinite outside of it."""

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

    def weighted(params: Params, weights: Hyper, /, *hyper: Hyper, **options: Any) -> Tensor:
        return value(params, *hyper, **options)  # No number changes 0 or infinity; 0 does not open the set either.

    def gradient(params: Params, *hyper: Hyper, **options: Any) -> Params:
        return compute(lambda w: torch.where(w != w, w, torch.zeros_like(w)), params)

    def proximal(params: Params, step: Hyper, *hyper: Hyper, **options: Any) -> Params:
        return projection(params, *hyper, **options)

    def left(params: Params, grads: Params, strength: Hyper, *hyper: Hyper, **options: Any) -> Params:
        if residual is not None:
            found = residual(params, grads, *hyper, **options)
        else:
            moved = compute_wide(lambda w, g: w - g, params, grads)
            found = compute(lambda w, z: w - z, params, projection(moved, *hyper, **options))
        _, rebuild = flatten(params)
        lost = rebuild(outside(params, *hyper, **options))
        return compute(lambda r, out: torch.where(out == 0, r, out), found, hyper=(lost,))

    return {"value": value, "gradient": gradient, "proximal": proximal, "residual": left, "weighted": weighted}


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


@remembering_rule
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

    def lift(rule: Callable[..., Tensor]) -> Constraint:
        return Constraint(
            **_of_leaves(rule, metric, real, missed, residual),
            in_metric=lambda *hyper, **options: metric is not None or separable,
            bounds=bounds,
            check=check,
            rule=rule,
            separable=separable,
            couples_leaves=False,
            convex=convex,
            structure=structure,
        )

    return lift if rule is None else lift(rule)


def _of_leaves(
    rule: Callable[..., Tensor],
    metric: Callable[..., Tensor] | None,
    real: bool,
    missed: Callable[..., Tensor] | None,
    residual: Callable[..., Tensor] | None,
) -> dict[str, Any]:
    """The rules of a set of trees, of those on a leaf."""
    weighed = metric

    def projection(params: Params, *hyper: Hyper, metric: Params | None = None, **options: Any) -> Params:
        if real and any(leaf.is_complex() for leaf in tree_leaves(params)):
            names = zip(tree_paths(params), tree_leaves(params), strict=True)
            first = next(name for name, leaf in names if leaf.is_complex())
            raise TypeError(f"leaf '{first}' is complex; {rule.__name__} takes real numbers, which have an order")
        if metric is None or weighed is None:
            return compute(lambda w, *row: obeyed(rule, w, *row, **options), params, hyper=hyper)
        near = weighed
        return compute(lambda w, h, *row: obeyed(near, w, h, *row, **options), params, metric, hyper=hyper)

    rules: dict[str, Any] = {"projection": projection}
    if missed is not None:
        out = missed

        def lost(params: Params, *hyper: Hyper, **options: Any) -> list[Tensor]:
            # Leaves without entries are in every set.
            some = lambda w, *row: out(w, *row, **options) if w.numel() else torch.zeros_like(w)
            return reduce_leaves(some, params, hyper=hyper, op="any")

        rules["missed"] = lost
    if residual is not None:
        normal = residual

        def left(params: Params, grads: Params, *hyper: Hyper, **options: Any) -> Params:
            leaves, rebuild = flatten(params)
            slack = rebuild([_rounding(leaf) for leaf in leaves])
            return compute(lambda w, g, *row: normal(w, g, *row, **options), params, grads, hyper=(slack, *hyper))

        rules["residual"] = left
    return rules
