"""Accelerated descent to a proximal point, for what has no closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Params
from funcreg.core.leafwise import compute_wide, product, reduce_leaves, scalar_device, total
from funcreg.core.ranges import whole_number
from funcreg.core.tree import flatten


def accelerate(momentum: Tensor, uphill: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""How far FISTA goes on from a proximal point, as a share of the way to it, and the next :math:`t_k`.

    .. math:: y_{k+1} = x_{k+1} + \frac{t_k - 1}{t_{k+1}} (x_{k+1} - x_k), \quad t_{k+1} = (1 + \sqrt{1 + 4 t_k^2}) / 2

    Args:
        momentum: :math:`t_k`, a 0-dim tensor, 1 at first.
        uphill: Whether the momentum led uphill, so that :math:`t` becomes 1 again; None to look away.
    """
    if uphill is not None:
        momentum = torch.where(uphill.to(momentum.device), torch.ones_like(momentum), momentum)
    after = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
    return (momentum - 1) / after, after


def overlaps(y: Params, x: Params, before: Params) -> list[Tensor]:
    """For each leaf, where the momentum led times where the descent went: positive in sum if that was uphill.

    Args:
        y: Where the step began.
        x: Where it came to.
        before: Where the step before came to.
    """

    def overlap(y: Tensor, x: Tensor, before: Tensor) -> Tensor:
        return ((y - x).conj() * (x - before)).real if y.is_complex() else (y - x) * (x - before)

    return reduce_leaves(overlap, y, x, before)


def check_inner_steps(inner_steps: int | None) -> None:
    """Raise a ValueError unless this is None or a number of steps."""
    if inner_steps is not None:
        whole_number("inner_steps", inner_steps, hint=", or None")


def approach(
    prox: Callable[[Params, Hyper], Params],
    start: Params,
    point: Params,
    metric: Params,
    step: Hyper,
    count: int,
    apart: bool,
) -> Params:
    r"""Some steps towards :math:`\arg\min_z \frac{1}{2} \sum_i h_i (z_i - w_i)^2 + \text{step} \cdot g(z)`.

    At the minimum any number of steps stays.

    Args:
        prox: The proximal operator without a metric, from a tree and a step to a tree.
        start: Where to begin.
        point: The tree :math:`w`.
        metric: The tree :math:`h`.
        step: Number, tensor or tree of them.
        count: Number of steps, each with one proximal operator.
        apart: Whether the penalty couples no leaves, so that each may have a step size and a momentum of its own.
    """
    least = _least_steps(metric, apart)
    step = product(start, step, least)
    y = x = compute_wide(lambda w: w, start)
    leaves, rebuild = flatten(y)
    momentum = [torch.ones((), dtype=torch.float64, device=scalar_device(start))] * (len(leaves) if apart else 1)
    for _ in range(count):
        reached = compute_wide(lambda y, w, h, c: y - c * h * (y - w), y, point, metric, hyper=(least,))
        new = prox(reached, step)
        along = overlaps(y, new, x)
        pairs = [accelerate(t, part > 0) for t, part in zip(momentum, along if apart else [total(along)], strict=True)]
        shares, momentum = [share for share, _ in pairs], [t for _, t in pairs]
        further = rebuild(shares) if apart else shares[0]
        y, x = compute_wide(lambda x, before, k: x + k * (x - before), new, x, hyper=(further,)), new
    return x


def _least_steps(metric: Params, apart: bool) -> Hyper:
    """One over the greatest number of a metric: for each leaf, or one for leaves that a penalty may couple."""
    _, rebuild = flatten(metric)
    tops = reduce_leaves(lambda h: h, metric, op="max")
    if apart:
        return rebuild([1 / top for top in tops])
    return 1 / torch.stack([top.to(tops[0].device, tops[0].dtype) for top in tops]).amax() if tops else 1.0
