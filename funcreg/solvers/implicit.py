"""Derivatives of the solution of `minimize`, by the implicit function theorem at the fixed point of a proximal step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp, vmap

from funcreg.core.undocumented import is_batched, without_levels
from funcreg.solvers.proximal_newton import DENSE, descend, entries, forward_backward, gmres, is_small, jacobian_times
from funcreg.solvers.vectors import Flat


class Solve(torch.autograd.Function):
    """The solution as a function of all tensors of the flat."""

    @staticmethod
    def forward(flat: Flat, *tensors: Tensor) -> tuple[Tensor, ...]:
        return descend(flat, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        flat, *tensors = inputs
        x, _, _, _, rate, metric = output
        ctx.flat = flat
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, rate, metric, *tensors)
        ctx.save_for_forward(x, rate, metric, *tensors)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Any, ...]:
        x, rate, metric, *tensors = ctx.saved_tensors
        flat = ctx.flat
        pull = flat.over_members(lambda tensors, *rest: _pull(flat, tensors, *rest))
        found = pull(tuple(tensors), x, rate, metric, slopes[0], *_moving(flat, tuple(tensors), x, rate, metric))
        for i in range(len(tensors)):  # What is the same for all members gets the sum of their slopes.
            shared = [place for place, dims in enumerate(reversed(flat.levels)) if dims[i] is None]
            found[i] = found[i].sum(shared) if shared else found[i]
        return None, *(g if t.is_floating_point() else None for g, t in zip(found, tensors, strict=True))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        x, rate, metric, *tensors = ctx.saved_tensors
        flat = ctx.flat
        push = flat.over_members(lambda *given: _push(flat, *given), tuples=2)
        filled = [torch.zeros_like(t) if d is None else d for t, d in zip(tensors, tangents[1:], strict=True)]
        inside = _moving(flat, tuple(tensors), x, rate, metric)
        return push(tuple(tensors), tuple(filled), x, rate, metric, *inside), None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *given: Any) -> Any:
        flat, *tensors = given
        moved = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, in_dims[1:], strict=True)]
        dims = tuple(None if dim is None else 0 for dim in in_dims[1:])
        flat, moved = flat.mapped(dims, info.batch_size, moved)
        return Solve.apply(flat, *moved), (0,) * 6


def _landing(
    flat: Flat, x: Tensor, rate: Tensor, metric: Tensor, tensors: Any, sparse: bool = True
) -> tuple[Any, Any, list[int]]:
    """The proximal step from x as a function of the vector, and of the real tensors, and which these are."""
    which = [i for i, t in enumerate(tensors) if t.is_floating_point() and (sparse or t.layout is torch.strided)]

    def land(x: Tensor, tensors: Any = tensors) -> Tensor:
        return forward_backward(flat, x, grad_and_value(flat.read)(x, tensors)[0], rate, metric, tensors)

    def of_real(*real: Tensor) -> Tensor:
        given = list(tensors)
        for i, t in zip(which, real, strict=True):
            given[i] = t
        return land(x, tuple(given))

    return land, of_real, which


def _moving(flat: Flat, tensors: Any, x: Tensor, rate: Tensor, metric: Tensor) -> tuple[Tensor, ...]:
    """Places of the entries on whose moves those of a proximal step depend, where others are many and known to be none.

    A step of a penalty that is a sum over entries has no slope in those that it holds at zero. Inside of `vmap` their
    number is not known.
    """
    if not flat.separable or is_small(x) or is_batched(without_levels(x)):
        return ()

    def slopes(tensors: Any, x: Tensor, rate: Tensor, metric: Tensor) -> Tensor:
        point = x - grad_and_value(flat.read)(x, tensors)[0] / (rate * metric)
        return vjp(lambda z: flat.land(z, 1 / rate, metric, tensors), point)[1](torch.ones_like(x))[0]

    moving = (flat.over_members(slopes)(tensors, x, rate, metric) != 0) | (x != 0)
    count = int(moving.sum(-1).amax())
    return (moving.byte().argsort(dim=-1, descending=True)[..., :count],) if 1 <= count <= DENSE else ()


def _pull(
    flat: Flat, tensors: Any, x: Tensor, rate: Tensor, metric: Tensor, slope: Tensor, inside: Tensor | None = None
) -> list[Tensor]:
    """Slopes in the tensors, from a slope in the solution."""
    land, of_real, which = _landing(flat, x, rate, metric, tensors)
    back = vjp(land, x)[1]
    if inside is None and len(x) > DENSE:
        along = gmres(lambda v: v - back(v)[0], slope, 200)
    else:
        matrix = _matrix_of_move(flat, tensors, x, rate, metric, inside)
        along = torch.linalg.pinv(matrix.T, rtol=1e-12) @ entries(slope, inside)
        if inside is not None:
            along = slope + back(torch.zeros_like(slope).index_copy(0, inside, along))[0]
    found = list(map(torch.zeros_like, tensors))
    for i, g in zip(which, vjp(of_real, *(tensors[i] for i in which))[1](along), strict=True):
        found[i] = g
    return found


def _push(
    flat: Flat, tensors: Any, tangents: Any, x: Tensor, rate: Tensor, metric: Tensor, inside: Tensor | None = None
) -> Tensor:
    """How the solution moves when the tensors do."""
    _, of_real, which = _landing(flat, x, rate, metric, tensors, sparse=False)  # Torch has no tangents of sparse ones.
    real, along = tuple(tensors[i] for i in which), tuple(tangents[i] for i in which)
    # What pulls back is linear: its own pull-back pushes forward, also where a loss has no forward derivative.
    pull = vjp(of_real, *real)[1]
    moved = vjp(pull, torch.zeros_like(x))[1](along)[0]
    product = jacobian_times(flat, x, rate, metric, tensors)
    if inside is None and len(x) > DENSE:
        return gmres(lambda v: v - product(v), moved, 200)
    solve = torch.linalg.pinv(_matrix_of_move(flat, tensors, x, rate, metric, inside), rtol=1e-12)
    if inside is None:
        return solve @ moved
    others = moved.index_fill(0, inside, 0.0)  # They move as the step says, and move those inside.
    return others.index_copy(0, inside, solve @ entries(moved + product(others), inside))


def _matrix(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    r""":math:`I - J`, from products of vectors and :math:`J`."""
    one = torch.eye(len(x), dtype=x.dtype, device=x.device)
    return one - vmap(product)(one).T


def _matrix_of_move(
    flat: Flat, tensors: Any, x: Tensor, rate: Tensor, metric: Tensor, inside: Tensor | None = None
) -> Tensor:
    r""":math:`I - J` of the proximal step, of the entries in some places."""
    part = flat if inside is None else flat.narrowed(inside)
    x, metric = entries(x, inside), entries(metric, inside)
    return _matrix(jacobian_times(part, x, rate, metric, tensors), x)
