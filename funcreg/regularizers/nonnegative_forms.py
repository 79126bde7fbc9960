"""Non-negative forms of penalties: their values on weights of at least 0, infinite elsewhere."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Params
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute, compute_wide, reduce_leaves, total
from funcreg.regularizers.penalty import Penalty


@remembered
def nonnegative_form(inner: Penalty) -> Penalty:
    r"""A penalty on weights of at least 0: its value there, infinite elsewhere.

    The proximal operator is :math:`\arg\min_{z \ge 0} \frac{1}{2} \|z - w\|^2 + \text{step} \cdot g(z)`. For a
    separable penalty it is that of :math:`g`, and then negative entries are put to 0; for one of magnitudes that
    couples them, such as `group_lasso`, negative entries are put to 0 first, and do not count in its norms. Step 0 is
    the projection on :math:`z \ge 0`. The gradient is that of :math:`g`. Weights multiply :math:`g` alone: 0 alone
    still keeps entries from being negative.

    Args:
        inner: A separable penalty, made with `separable=True`, that is convex (`ewc`) or depends on magnitudes and
            grows with them (`l1`, `mcp`); or one that couples magnitudes, grows with each, and whose proximal operator
            is known to keep signs (`group_lasso`, `sparse_group_lasso`, `linf`).

    Raises:
        ValueError: The penalty couples entries otherwise.

    Example:
        >>> params = {"weight": torch.tensor([3.0, -0.5, -2.0])}
        >>> nonnegative_mcp = nonnegative_form(mcp)
        >>> nonnegative_mcp.prox(params, 1.0, 1.0, 4.0), nonnegative_mcp(params, 1.0, 4.0)
        ({'weight': tensor([2.6667, 0.0000, 0.0000])}, tensor(inf))
        >>> nonnegative_form(group_lasso).prox({"weight": torch.tensor([[3.0, 4.0], [0.6, -8.0]])}, 1.0)
        {'weight': tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])}
    """
    if not isinstance(inner, Penalty):
        raise TypeError(f"inner is {inner!r}; expected a separable Penalty such as l1")
    apart = inner.separable is True
    if not apart and "signs" not in inner.structure.keeps:
        raise ValueError(
            f"nonnegative_form got {inner!r}; expected a separable penalty, made with separable=True, or one that "
            "keeps signs, as its structure says. To put negative entries to 0 is exact for those alone."
        )

    def outside(params: Params) -> list[Tensor]:
        return reduce_leaves(lambda w: torch.where(_real(w) < 0, math.inf, 0.0), params)

    def value(params: Params, *hyper: Hyper, **options: Any) -> Tensor:
        return total([inner(params, *hyper, **options), *outside(params)])

    def weighted(params: Params, weights: Hyper, /, *hyper: Hyper, **options: Any) -> Tensor:
        return total([inner.weighted_value(params, weights, *hyper, **options), *outside(params)])

    def proximal(params: Params, step: Hyper, *hyper: Hyper, metric: Params | None = None, **options: Any) -> Params:
        start = params if apart else compute(lambda w: _real(w).relu(), params)
        landed = inner.prox(start, step, *hyper, metric=metric, **options)
        return compute(lambda z: _real(z).relu(), landed)

    def residual(params: Params, grads: Params, strength: Hyper, *hyper: Hyper, **options: Any) -> Params:
        # At zero, what would make an entry negative is taken up by the bound.
        held = lambda r: compute(lambda w, r: torch.where(w == 0, r.clamp(max=0), r), params, r)
        if inner.has_residual and apart:
            left = held(inner.residual(params, grads, *hyper, strength=strength, **options))
        elif inner.has_residual:
            left = inner.residual(params, held(grads), *hyper, strength=strength, **options)
        else:
            moved = compute_wide(lambda w, g: w - g, params, grads)
            left = compute(lambda w, z: w - z, params, proximal(moved, strength, *hyper, **options))
        return compute(lambda w, r: torch.where(_real(w) < 0, math.inf, r), params, left)

    form = Penalty(
        value,
        inner.grad,
        proximal,
        residual=residual,
        bounds=inner.bounds,
        rule=inner,
        weighted=weighted,
        weigh=inner.weigh,
        in_metric=inner.in_metric,
        separable=apart,
        couples_leaves=inner.couples_leaves,
        has_gradient=inner.has_gradient,
        convex=inner.is_convex,
    )
    form.__name__ = form.__qualname__ = f"nonnegative {inner.__name__}"
    return form


def _real(w: Tensor) -> Tensor:
    if w.is_complex():
        raise ValueError("a leaf is complex; expected real numbers, which have a sign")
    return w
