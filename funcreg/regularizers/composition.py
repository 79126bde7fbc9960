"""Sums of penalties: when the proximal operator of a sum is that of one term after that of another."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Params, Scalar
from funcreg.core.construction import written
from funcreg.core.leafwise import compute, compute_wide, product, total
from funcreg.core.masks import Selection, kept_by, mask_leaves
from funcreg.core.ranges import concrete, flags
from funcreg.core.tree import broadcast, flatten, tree_leaves, tree_map

#: What a proximal operator may keep of the point that it moves; see `Structure`.
Kept = Literal["signs", "order", "directions"]


@dataclass(frozen=True)
class Structure:
    r"""What a penalty tells of itself, from which a sum knows whether its proximal operator is exact.

    :math:`\operatorname{prox}_{f + g} = \operatorname{prox}_f \circ \operatorname{prox}_g` where the proximal
    operator of :math:`f` leaves every subgradient of :math:`g` a subgradient. So a penalty says what has to be kept
    for that, and what its own proximal operator keeps:

    - `"signs"`: no entry changes its sign, and zeros stay zeros;
    - `"order"`: all entries of a leaf go through one odd function that never falls, so that those that were equal
      stay equal;
    - `"directions"`: each group is multiplied by a number of at least 0.

    A penalty with a constant second derivative needs none of this: it shrinks first, and makes the metric stiffer.

    Args:
        needs: Each of these alone keeps the subgradients of this penalty.
        keeps: What the proximal operator of this penalty keeps. In a metric only signs count.
        groups: From a leaf and the static options to the dimensions inside a group, for `"directions"`: those of
            small groups are kept by what scales larger ones. Weights of the penalty are one number for each group.
        curvature: From the hyperparameters to :math:`q`, for a penalty :math:`\frac{q}{2} \|w - c\|^2`.
        parts: From the hyperparameters and options to the terms of a penalty that is itself a sum.
        interval: Whether it bounds each entry by an interval: the least of a convex function of one number in an
            interval is the end that lies nearest to its minimum, so that it may follow any convex separable penalty.

    Example:
        Soft thresholding keeps signs, and all that :math:`|w|` needs is its sign; so does this one:

        >>> @penalty(
        ...     gradient=lambda w: (w > 0).to(w.dtype),
        ...     proximal=lambda w, step: w - w.clamp(min=0).clamp(max=step),
        ...     structure=Structure(needs=("signs",), keeps=("signs",)),
        ... )
        ... def positive_part(w):
        ...     return w.relu()
        >>> (0.5 * l1 + positive_part).prox(torch.tensor([3.0, -3.0, 1.0]), 1.0)
        tensor([ 1.5000, -2.5000,  0.0000])

    References:
        Yu, *On decomposing the proximal map*, 2013.
    """

    needs: tuple[Kept, ...] = ()
    keeps: tuple[Kept, ...] = ()
    groups: Callable[..., tuple[int, ...]] | None = None
    curvature: Callable[..., Hyper] | None = None
    parts: Callable[..., Sequence[Term]] | None = None
    interval: bool = False

    def __post_init__(self) -> None:
        flags(interval=self.interval)


class Term(NamedTuple):
    """A penalty with all that it takes, times factors."""

    penalty: Any  # A Penalty, whose module imports this one.
    factors: tuple[Hyper, ...] = ()
    hyper: tuple[Hyper, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    mask: Mask | None = None

    def value(self, params: Params) -> Tensor:
        if not self.factors:
            return self.penalty(params, *self.hyper, mask=self.mask, **dict(self.options))
        weights = product(self.chosen(params), *self.factors)
        return self.penalty.weighted_value(params, weights, *self.hyper, mask=self.mask, **dict(self.options))

    def grad(self, params: Params) -> Params:
        if not self.factors:
            return self.penalty.grad(params, *self.hyper, mask=self.mask, **dict(self.options))
        weights = product(self.chosen(params), *self.factors)
        return self.penalty.weighted_grad(params, weights, *self.hyper, mask=self.mask, **dict(self.options))

    def prox(self, params: Params, step: Hyper, metric: Params | None) -> Params:
        step = product(self.chosen(params), step, *self.factors)
        return self.penalty.prox(params, step, *self.hyper, metric=metric, mask=self.mask, **dict(self.options))

    def in_metric(self, params: Params) -> bool:
        return self.penalty.in_metric(params, *self.hyper, mask=self.mask, **dict(self.options))

    def residual(self, params: Params, grads: Params, strength: Hyper) -> Params:
        strength = product(self.chosen(params), strength, *self.factors)
        return self.penalty.residual(
            params, grads, *self.hyper, strength=strength, mask=self.mask, **dict(self.options)
        )

    def times(self, weights: Hyper) -> Term:
        """This term with one more factor."""
        return self._replace(factors=(weights, *self.factors))

    def check(self, params: Params) -> None:
        """Raise an error, which says where, if the factors are no weights of the terms of the penalty."""
        chosen = self.chosen(params)
        self.penalty.weigh(chosen, product(chosen, *self.factors), *self.hyper, **dict(self.options))

    def parts(self) -> list[Term]:
        """The terms of this term, none of them itself a sum."""
        split = self.penalty.structure.parts
        if split is None:
            return [self]
        inner = [part for term in split(*self.hyper, **dict(self.options)) for part in term.parts()]
        return [
            part._replace(factors=(*self.factors, *part.factors), mask=_both(self.mask, part.mask)) for part in inner
        ]

    def curvature(self, params: Params) -> Hyper:
        """The second derivative, 0 at leaves that the mask leaves out."""
        own, chosen = self.penalty.structure.curvature(*self.hyper, **dict(self.options)), self.chosen(params)
        bend = product(chosen, own, *self.factors)
        if self.mask is None:
            return bend
        found = iter(broadcast(bend, chosen, "a hyperparameter"))
        return flatten(params)[1]([next(found) if acts else 0.0 for acts in self.places(params)])

    def chosen(self, params: Params) -> Params:
        """The leaves on which this term acts."""
        return kept_by(self.mask, params)

    def places(self, params: Params) -> list[bool]:
        """On which leaves this term acts."""
        return [True] * len(tree_leaves(params)) if self.mask is None else mask_leaves(self.mask, params)

    def acts(self, params: Params) -> list[bool]:
        """On which leaves one of its parts acts."""
        return [any(row) for row in zip(*[part.places(params) for part in self.parts()], strict=True)]

    def title(self) -> str:
        """The term as it is written in code."""
        factors = [f"{factor:g}" if isinstance(factor, (int, float)) else written(factor) for factor in self.factors]
        name = written(self.penalty)
        if " + " in name and (factors or self.mask is not None):
            name = f"({name})"
        given = [written(value) for value in self.penalty.without_defaults(self.hyper)]
        given += [f"{key}={written(value)}" for key, value in self.options]
        given += [] if self.mask is None else [f"mask={written(self.mask)}"]
        return " * ".join([*factors, f"{name}.given({', '.join(given)})" if given else name])


def _both(outer: Mask | None, inner: Mask | None) -> Mask | None:
    if outer is None or inner is None:
        return inner if outer is None else outer

    def both(params: Params) -> list[bool]:
        return [a and b for a, b in zip(mask_leaves(outer, params), mask_leaves(inner, params), strict=True)]

    return Selection(both, optional=True)


def sum_value(terms: Sequence[Term], params: Params) -> Tensor:
    """The value of a sum."""
    return total([term.value(params) for term in terms])


def sum_gradient(terms: Sequence[Term], params: Params) -> Params:
    """The sum of gradients, rounded once."""
    exact = _widened(params)
    slopes = [term.grad(exact) for term in terms]
    return compute(lambda w, *slopes: functools.reduce(torch.add, slopes), params, *slopes)


def sum_proximal(terms: Sequence[Term], params: Params, step: Hyper, metric: Params | None) -> Params:
    """The proximal operator of a sum, rounded once; a ValueError if it is not known to be exact."""
    smooth, rough = _sorted(terms)
    point = _widened(params)
    for term in smooth:
        point = term.prox(point, step, metric)
        step, metric = _stiffened(point, step, metric, term.curvature(point))
    for term in _ordered(rough, point, step, metric):
        point = term.prox(point, step, metric)
    return compute(lambda w, z: z, params, point)


def sum_in_metric(terms: Sequence[Term], params: Params) -> bool:
    """Whether the proximal operator of a sum is known in a metric."""
    smooth, rough = _sorted(terms)
    if not all([term.in_metric(params) for term in [*smooth, *rough]]):
        return False
    return not _arranged(rough, params, [False] * len(rough), [False] * len(rough))[1]


def sum_residual(terms: Sequence[Term], params: Params, grads: Params, strength: Hyper) -> Params:
    """The element of least norm of the subdifferential: what is left of the gradient after each term in turn.

    It is the first derivative of the proximal operator in its step, and so composes in the same order.
    """
    smooth, rough = _sorted(terms)
    for term in [*smooth, *_ordered(rough, params, strength, None)]:
        grads = term.residual(params, grads, strength)
    return grads


def split(terms: Sequence[Term]) -> tuple[list[Term], list[Term]]:
    """The parts of a sum that have a constant second derivative, and the others."""
    parts = [part for term in terms for part in term.parts()]
    smooth = [part for part in parts if part.penalty.structure.curvature is not None]
    return smooth, [part for part in parts if part.penalty.structure.curvature is None]


def _sorted(terms: Sequence[Term]) -> tuple[list[Term], list[Term]]:
    """`split`, except for a single term, whose own rules are as good."""
    return split(terms) if len(terms) > 1 else ([], list(terms))


def _widened(params: Params) -> Params:
    return compute_wide(lambda w: w, params)


def varies(value: Hyper) -> bool:
    """Whether a hyperparameter differs between the entries of a leaf."""
    return any(isinstance(x, Tensor) and x.numel() != 1 for x in tree_leaves(value))


def _stiffened(params: Params, step: Hyper, metric: Params | None, curvature: Hyper) -> tuple[Hyper, Params | None]:
    r"""Step and metric for what is left after a term of this curvature: the metric grows by step times curvature.

    One number for a whole leaf divides the step instead, which every penalty understands. A large step, which may
    be infinite, divides the metric and is 1 then: it is the same.
    """
    if metric is None and not varies(step) and not varies(curvature):
        rows = [broadcast(x, params, "a hyperparameter") for x in (step, curvature)]
        steps = [_softened(s, q) for s, q in zip(*rows, strict=True)]
        single = not _is_tree(step, rows[0]) and not _is_tree(curvature, rows[1])
        return (steps[0] if single and steps else flatten(params)[1](steps)), None
    if metric is None:
        metric = tree_map(lambda w: torch.ones_like(w.real), params)
    stiffer = lambda h, s, q: h / _unit(s) + _in_units(s) * q
    return tree_map(_in_units, step), compute_wide(stiffer, metric, hyper=(step, curvature))


def _softened(step: Scalar, curvature: Scalar) -> Scalar:
    softness = 1 / _unit(step) + _in_units(step) * curvature
    if not isinstance(softness, Tensor) and softness == 0:  # Of an infinite step without curvature.
        return math.inf
    return _in_units(step) / softness


#: Steps above this are units of what they multiply: infinite ones, and those whose products may be.
_LARGE = 2.0**60


def _unit(step: Scalar) -> Scalar:
    if isinstance(step, Tensor):
        return torch.where(step > _LARGE, step, torch.ones_like(step))
    return step if step > _LARGE else 1.0


def _in_units(step: Scalar) -> Scalar:
    if isinstance(step, Tensor):
        return torch.where(step > _LARGE, torch.ones_like(step), step)
    return 1.0 if step > _LARGE else step


def _is_tree(value: Hyper, spread: list[Any]) -> bool:
    return any(x is not value for x in spread)


def _ordered(terms: list[Term], params: Params, step: Hyper, metric: Params | None) -> list[Term]:
    """The terms in an order in which each leaves the subgradients of all before it what they are."""
    # In a metric only signs are kept. Steps that vary in a leaf spoil the order of its entries; directions are kept,
    # because penalties that say which weights they take refuse steps that vary inside a group.
    even = [metric is None and not any([varies(x) for x in (step, *term.factors)]) for term in terms]
    straight = [alike or (metric is None and term.penalty.weighable) for alike, term in zip(even, terms, strict=True)]
    order, left = _arranged(terms, params, even, straight)
    if left:
        raise ValueError(_why_not(left, all(even)))
    return order


def _arranged(
    terms: list[Term], params: Params, even: list[bool], straight: list[bool]
) -> tuple[list[Term], list[Term]]:
    """Terms in order, as far as there is one, and what is left.

    Args:
        terms: Terms in any order.
        params: The tree on whose leaves they act.
        even: Whether the proximal operator of each may keep the order of the entries of a leaf.
        straight: Whether it may keep the directions of groups.
    """
    leaves, places = tree_leaves(params), [term.places(params) for term in terms]

    def may_follow(last: int, first: int) -> bool:
        shared = [w for w, here, there in zip(leaves, places[last], places[first], strict=True) if here and there]
        possible: dict[Kept, bool] = {"signs": True, "order": even[last], "directions": straight[last]}
        return not shared or _leaves_alone(terms[last], terms[first], shared, possible)

    left, order = list(range(len(terms))), []
    while left:
        # Whatever may go first, may: the order of the others is as good without it.
        first = next((i for i in left if all([may_follow(j, i) for j in left if j != i])), None)
        if first is None:
            break
        left.remove(first)
        order.append(terms[first])
    return order, [terms[i] for i in left]


def composes(first: Term, last: Term, leaves: list[Tensor], in_metric: bool) -> bool:
    """Whether the proximal operator of one term after that of another is known to be that of their sum.

    Masks are not asked: both terms act on all of these leaves.
    """
    possible: dict[Kept, bool] = {"signs": True, "order": not in_metric, "directions": not in_metric}

    def follows(last: Term, first: Term) -> bool:
        bends, bounds = first.penalty.structure.curvature is not None, last.penalty.structure.interval
        if (first.penalty.structure.interval and bounds) or (bends and (bounds or not in_metric)):
            return True
        return _leaves_alone(last, first, leaves, possible)

    return all([follows(b, a) for a in first.parts() for b in last.parts()])


def apart(first: Term, last: Term) -> bool:
    """Whether two terms are known to bound the same entries by intervals that have no number in common.

    Bounds that are schedules, trees or on another device are not known, nor where parts with masks act.
    """
    bounds = lambda term: [x for x in term.parts() if x.penalty.structure.interval and x.mask is None]
    return any([_miss(a, b) for a in bounds(first) for b in bounds(last)])


def _miss(first: Term, last: Term) -> bool:
    bounds = list(map(concrete, (*first.hyper, *last.hyper)))
    if any([bound is None for bound in bounds]):
        return False
    shape = torch.broadcast_shapes(*[bound.shape for bound in bounds if isinstance(bound, Tensor)])
    # Of an interval in the other one's reach, the nearest number to one in that lies in both.
    start = torch.zeros(shape, dtype=torch.float64, device="cpu")
    landed = last.penalty.project(first.penalty.project(start, *first.hyper), *last.hyper)
    return bool(first.penalty(landed, *first.hyper) > 0)


def _leaves_alone(last: Term, first: Term, leaves: list[Tensor], possible: dict[Kept, bool]) -> bool:
    """Whether the proximal operator of `last` leaves subgradients of `first` subgradients."""
    inner, outer = first.penalty.structure, last.penalty.structure
    if (
        outer.interval
        and not inner.interval
        and first.penalty.separable is True
        and not any(map(torch.is_complex, leaves))
    ):
        return first.penalty.is_convex(*first.hyper, **dict(first.options))
    kept = [need for need in inner.needs if need in outer.keeps and possible[need]]
    if any(need != "directions" for need in kept):
        return True
    if not kept or inner.groups is None or outer.groups is None:
        return False
    return all(
        [set(inner.groups(w, **dict(first.options))) <= set(outer.groups(w, **dict(last.options))) for w in leaves]
    )


def _why_not(terms: Sequence[Term], uniform: bool) -> str:
    where = "" if uniform else ", in a metric (as Adam has one) or with a step of its own for each entry,"
    said = " + ".join([term.title() for term in terms])
    return (
        f"{said} has a value and a gradient, but{where} no proximal operator that is known to "
        "be exact: that of one term spoils what that of another found. Exact are sums of anything with half_l2 or l2, "
        "l1 with group penalties, groups nested in each other, and bounds (box, nonnegative) on convex penalties of "
        "single entries. Keep the proximal operator of one term and put the "
        "other into the loss or add_penalty; or give each its own leaves with given(mask=...)."
    )
