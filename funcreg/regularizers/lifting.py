"""Lift rules on one leaf to a penalty on trees: the decorator `penalty`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from funcreg.core._typing import Hyper, Params
from funcreg.core.checks import fits
from funcreg.core.leafwise import beside, compute, compute_leaves, obeyed, reduce_leaves, times, total, with_own_step
from funcreg.core.ranges import flags
from funcreg.core.tree import flatten
from funcreg.regularizers.composition import Structure
from funcreg.regularizers.penalty import Penalty, is_single, remembering_rule


@remembering_rule
def penalty(
    value: Callable[..., Tensor] | None = None,
    /,
    *,
    gradient: Callable[..., Tensor] | None = None,
    proximal: Callable[..., Tensor] | None = None,
    metric: Callable[..., Tensor] | None = None,
    residual: Callable[..., Tensor] | None = None,
    separable: bool | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    structure: Structure | None = None,
    inner_steps: int | None = None,
    has_gradient: bool = True,
    convex: bool | Callable[..., bool] = True,
) -> Callable[[Callable[..., Tensor]], Penalty]:
    r"""Lift rules on one leaf to a `Penalty` on trees: the decorated function is the value.

    Positional arguments after the leaf are hyperparameters: numbers, tensors, or trees like the parameters.
    Keyword-only arguments are static options. A rule sees float32 at least; gradients and proximal points come
    back in the dtype of the leaf.

    The value may return one term for each entry, group or leaf; the penalty is the sum of the terms. One term for
    each entry makes the penalty separable, and the proximal operator in a diagonal metric :math:`h` is then its
    own rule with `step / h`. The same terms are what `weights * penalty` weighs: entries of a separable penalty,
    groups where `structure` tells of groups (terms then keep the reduced dimensions), else leaves.

    Args:
        value: Nothing. It is what is decorated, and without its rules an error.
        gradient: `(w, *hyper, **options)` to the gradient, 0 at a kink of a norm.
        proximal: `(w, step, *hyper, **options)` to :math:`\arg\min_z \frac{1}{2} \|z - w\|^2 + \text{step} \cdot g(z)`.
        metric: `(w, metric, step, *hyper, **options)` to the same with
            :math:`\frac{1}{2} \sum_i h_i (z_i - w_i)^2`; not needed for a separable penalty.
        residual: `(w, g, strength, *hyper, **options)` to the element of least norm of
            :math:`g + \text{strength} \cdot \partial`; by default the residual of the proximal operator.
        separable: Whether the penalty is a sum over entries; by default it is where the value has one term for each.
        bounds: From the name of a hyperparameter to the least and greatest number it may be.
        structure: What sums with this penalty may rely on; see `Structure`.
        inner_steps: For a convex penalty without `metric`: the steps of a descent that stand in for it.
        has_gradient: Whether the gradient tells anything; False where it is 0 everywhere.
        convex: Whether it is convex; or a function of its hyperparameters and options to that.

    Example:
        >>> def huber_gradient(w, width):
        ...     return w.clamp(-width, width)
        >>> def huber_prox(w, step, width):
        ...     return w - step * (w / (1 + step)).clamp(-width, width)
        >>> @penalty(gradient=huber_gradient, proximal=huber_prox, bounds={"width": (0, float("inf"))})
        ... def huber(w, width):
        ...     return torch.where(w.abs() <= width, w.square() / 2, width * (w.abs() - width / 2))
        >>> params = {"weight": torch.tensor([0.5, -3.0])}
        >>> huber(params, 1.0), huber.grad(params, 1.0), huber.prox(params, 1.0, 1.0)
        (tensor(2.6250), {'weight': tensor([ 0.5000, -1.0000])}, {'weight': tensor([ 0.2500, -2.0000])})
    """

    if value is not None or gradient is None or proximal is None:
        raise TypeError(
            "penalty lacks its rules; expected @penalty(gradient=..., proximal=...) above the value, two functions of "
            "one leaf. A value alone needs no penalty: a function of the parameters is a term of the loss as it is."
        )
    flags(has_gradient=has_gradient)
    if not callable(convex):
        flags(convex=convex)
    if separable is not None:
        flags(separable=separable)

    def lift(value: Callable[..., Tensor]) -> Penalty:
        def of_entries(w: Tensor, *hyper: Any, **options: Any) -> bool:
            return value(w, *hyper, **options).shape == w.shape if separable is None else separable

        return Penalty(
            **_of_terms(value, of_entries, structure),
            **_of_steps(gradient, proximal, metric, residual, convex),
            in_metric=_in_metric(of_entries, metric is not None, separable),
            bounds=bounds,
            rule=value,
            structure=structure,
            inner_steps=inner_steps,
            separable=separable,
            couples_leaves=False,
            has_gradient=has_gradient,
            convex=convex,
        )

    return lift


def _of_terms(
    value: Callable[..., Tensor], of_entries: Callable[..., bool], structure: Structure | None
) -> dict[str, Callable[..., Any]]:
    """What a penalty needs to know of its value on trees, of a value on a leaf and whether that is a sum of entries."""

    def tree_value(params: Params, *hyper: Hyper, **options: Any) -> Tensor:
        # Summed leaf by leaf: the terms of one are in a cache, and those of all would be a second set of weights.
        return total(reduce_leaves(lambda w, *row: value(w, *row, **options), params, hyper=hyper))

    def tree_weighted(params: Params, weights: Hyper, /, *hyper: Hyper, **options: Any) -> Tensor:
        if is_single(weights):
            plain = tree_value(params, *hyper, **options)
            return times(beside(weights, plain), plain).to(plain.dtype)
        rule = lambda w, c, *row: _weighted_terms(w, c, value(w, *row, **options))
        return total(reduce_leaves(rule, params, hyper=(weights, *hyper)))

    def tree_weigh(params: Params, weights: Hyper, /, *hyper: Hyper, **options: Any) -> Hyper:
        own = compute_leaves(lambda w, *row: one_a_term(w, *row, **options), params, hyper=(weights, *hyper))
        return flatten(params)[1](own)

    def one_a_term(w: Tensor, c: Any, *hyper: Any, **options: Any) -> Any:
        """A weight, if each term of the value of a leaf has one number of it; without dimensions if all have."""
        if not isinstance(c, Tensor) or not c.ndim or of_entries(w, *hyper, **options):
            return c
        inside = None if structure is None or structure.groups is None else structure.groups(w, **options)
        shape = [1 if inside is None or d in inside else n for d, n in enumerate(w.shape)]
        if not fits(c, shape):
            one = math.prod(shape) == 1
            expected = "one number for each leaf" if one else f"one for each group, {tuple(shape)}"
            raise ValueError(
                f"a strength or step has shape {tuple(c.shape)}; expected {expected}, because "
                f"{value.__name__} couples entries of this leaf of shape {tuple(w.shape)}"
            )
        return c.reshape(()) if inside is None else c

    return {"value": tree_value, "weighted": tree_weighted, "weigh": tree_weigh}


def _of_steps(
    gradient: Callable[..., Tensor],
    proximal: Callable[..., Tensor],
    metric: Callable[..., Tensor] | None,
    residual: Callable[..., Tensor] | None,
    convex: bool | Callable[..., bool],
) -> dict[str, Callable[..., Any]]:
    """The rules by which a penalty moves trees, of those on a leaf."""

    def tree_gradient(params: Params, *hyper: Hyper, **options: Any) -> Params:
        return compute(lambda w, *row: obeyed(gradient, w, *row, **options), params, hyper=hyper)

    def tree_proximal(
        params: Params, step: Hyper, *hyper: Hyper, metric: Params | None = None, **options: Any
    ) -> Params:
        if metric is None:
            return compute(lambda w, *row: landed(w, *row, **options), params, hyper=(step, *hyper))
        return compute(
            lambda w, h, step, *row: in_metric(w, h, step, *row, **options), params, metric, hyper=(step, *hyper)
        )

    def in_metric(w: Tensor, h: Tensor, step: Any, *hyper: Any, **options: Any) -> Tensor:
        if metric is not None:
            return obeyed(metric, w, h, step, *hyper, **options)
        w, own = (w, step / h) if convex is True else with_own_step(w, step, h)
        return landed(w, own, *hyper, **options)

    def landed(w: Tensor, step: Any, *hyper: Any, **options: Any) -> Tensor:
        return obeyed(proximal, w, step, *hyper, **options)

    rules: dict[str, Callable[..., Any]] = {"gradient": tree_gradient, "proximal": tree_proximal}
    if residual is None:
        return rules
    rule = residual

    def tree_residual(params: Params, grads: Params, strength: Hyper, *hyper: Hyper, **options: Any) -> Params:
        return compute(lambda w, g, *row: rule(w, g, *row, **options), params, grads, hyper=(strength, *hyper))

    return {**rules, "residual": tree_residual}


def _in_metric(of_entries: Callable[..., bool], has_rule: bool, separable: bool | None) -> Callable[..., bool]:
    """Whether the proximal point of a tree in a metric is known: by a rule, or as there is one term for each entry."""

    def tree_in_metric(params: Params, *hyper: Hyper, **options: Any) -> bool:
        if has_rule or separable is not None:
            return has_rule or separable is True
        apart: list[bool] = []
        compute_leaves(lambda w, *row: apart.append(of_entries(w, *row, **options)) or w, params, hyper=hyper)
        return all(apart)

    return tree_in_metric


def _weighted_terms(w: Tensor, c: Any, terms: Tensor) -> Tensor:
    """Terms of the value of a leaf, each times its weight."""
    if isinstance(c, Tensor) and c.ndim and terms.ndim != w.ndim:
        raise ValueError(
            f"weights of shape {tuple(c.shape)} got terms of shape {tuple(terms.shape)}; expected terms that keep the "
            f"dimensions of a leaf of shape {tuple(w.shape)}, with 1 for those inside a group"
        )
    return times(c, terms).to(terms.dtype)
