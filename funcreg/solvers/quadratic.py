"""Minima of a quadratic model plus a penalty: proximal gradient steps, and Newton steps on their fixed point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.func import vjp, vmap

from funcreg.core.equations import solved, solved_upwards

#: Objectives of which a new one has to be below the greatest.
_HISTORY = 10
#: How Newton steps are damped: a loss that is flat along some direction makes a Jacobian singular.
_DAMPS = (1e-10, 1e-3)
#: Shares of a Newton step that are tried.
_SHARES = (1.0, 0.5, 0.25, 0.0625)
#: Steps without progress after which rounding is held to be all that moves.
_PATIENCE = 20


@dataclass(frozen=True)
class Rules:
    """A penalty on vectors."""

    land: Callable[[Tensor, Tensor, Tensor], Tensor]  # The proximal point of a vector, a step and a metric.
    value: Callable[[Tensor], Tensor]
    separable: bool  # Whether the Jacobian of `land` is diagonal.
    convex: bool


class Quadratic(NamedTuple):
    r"""A model of a loss, :math:`\langle g, z - o \rangle + \frac{1}{2} (z - o)^\top H (z - o)`."""

    origin: Tensor
    gradient: Tensor
    hessian: Tensor
    metric: Tensor  # A positive diagonal.
    rate: Tensor  # No less than the greatest curvature in the metric.
    enough: Tensor  # The error at which a descent is near enough to the minimum.


class Descent(NamedTuple):
    """Where the descent on a model is."""

    x: Tensor
    slope: Tensor  # Gradient of the model at x.
    recent: Tensor  # The last objectives.
    rate: Tensor  # One over the length of the next step, in the metric.
    error: Tensor  # A bound of the residual.
    since: Tensor  # Steps since it was last less, or the objective.
    steps: Tensor
    done: Tensor


def diagonal_metric(hessian: Tensor) -> Tensor:
    """The diagonal where it is positive, with a floor; ones where there is none, or one that loses small moves."""
    found = hessian.diagonal().abs()
    top = found.amax()
    return torch.where(
        found.isfinite() & (top > torch.finfo(top.dtype).tiny ** 0.5),
        found.clamp(min=1e-6 * top),
        torch.ones_like(found),
    )


def convex(hessians: Tensor, moves: Callable[[], Tensor]) -> Tensor:
    """Hessians as they are where models have minima, or else with the magnitudes of their eigenvalues.

    Args:
        hessians: Symmetric matrices.
        moves: Function to bools, which entries are not held at zero by the penalty: a model that curves downwards
            along others has a minimum nearby all the same.
    """
    if bool(_curves_upwards(hessians).all()):
        return hessians
    one, alive = torch.eye(hessians.shape[-1], dtype=hessians.dtype, device=hessians.device), moves()
    inside = alive.unsqueeze(-1) & alive.unsqueeze(-2)
    lost = ~_curves_upwards(torch.where(inside, hessians, one)) & hessians.isfinite().all(-1).all(-1)
    lost = lost[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(lost, hessians, one))
    return torch.where(lost, (vectors * values.abs().unsqueeze(-2)) @ vectors.mT, hessians)


def _curves_upwards(hessians: Tensor) -> Tensor:
    top = hessians.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
    one = torch.eye(hessians.shape[-1], dtype=hessians.dtype, device=hessians.device)
    rounding = torch.finfo(top.dtype).eps ** 0.5 * top
    return torch.linalg.cholesky_ex(hessians + rounding[..., None, None] * one)[1] == 0


def greatest_curvature(hessian: Tensor, metric: Tensor) -> Tensor:
    r"""A bound of the eigenvalues in a metric, at most :math:`n^{1/8}` times the greatest."""
    root = metric.sqrt()
    scaled = hessian / (root[:, None] * root)
    size = scaled.square().sum().sqrt()
    power = scaled / size.clamp(min=torch.finfo(size.dtype).tiny)
    power = power @ power
    power = power @ power
    return size * power.square().sum().sqrt().sqrt().sqrt()


def noise(objective: Tensor) -> Tensor:
    """By how much an objective may grow through rounding; an infinite one not at all."""
    return 16 * torch.finfo(objective.dtype).eps * torch.where(objective.isfinite(), objective.abs(), 0.0)


# How a descent goes on, on a model or on the loss itself


class Place(Protocol):
    """What any descent knows of where it is."""

    @property
    def x(self) -> Tensor: ...

    @property
    def slope(self) -> Tensor: ...

    @property
    def recent(self) -> Tensor: ...

    @property
    def rate(self) -> Tensor: ...

    @property
    def done(self) -> Tensor: ...


S = TypeVar("S", bound=tuple[Tensor, ...])


def judged(s: Place, metric: Tensor, z: Tensor, slope: Tensor, objective: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether a proximal gradient step to z is taken, the rate of the next one, and the squared length of this one.

    It is taken if it goes below the greatest of the last objectives. The next one has the length of Barzilai and
    Borwein.
    """
    move = z - s.x
    length = (metric * move.square()).sum()
    taken = objective <= s.recent.amax() - 5e-5 * s.rate * length + noise(objective)
    curvature = (move * (slope - s.slope)).sum() / length
    known = curvature.isfinite() & (length > 0)
    wanted = torch.where(known & (curvature > 0), curvature, s.rate / 4)
    wanted = torch.minimum(torch.maximum(wanted, s.rate / 100), s.rate * 100)
    rate = torch.where(taken, wanted, torch.maximum(2 * s.rate, torch.where(known, curvature, s.rate)))
    return taken, rate, length


def chosen(s: Place, error: Tensor, objectives: Tensor, errors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which of several points is best, an index in a row; whether one comes near; and whether the best is taken.

    It is the one with the least error of those that more than halve it and go uphill no more than a step may, or else
    the lowest.
    """
    closer = (errors < error / 2) & (objectives <= s.recent.amax() + noise(objectives))
    objectives = torch.where(objectives.isnan(), torch.inf, objectives)
    order = torch.where(closer.any(), torch.where(closer, errors, torch.inf), objectives)
    best = order.argmin()[None]
    return best, closer.any(), closer.any() | (objectives.index_select(0, best)[0] < s.recent[-1])


def moved(s: Place, taken: Tensor, z: Tensor, slope: Tensor, objective: Tensor) -> tuple[Tensor, ...]:
    """The vector, its slope and the last objectives after a step, if it was taken; and whether it was the lowest."""
    recent = torch.where(taken, torch.cat([s.recent[1:], objective[None]]), s.recent)
    lower = taken & (objective < s.recent.amin() - noise(objective))
    return torch.where(taken, z, s.x), torch.where(taken, slope, s.slope), recent, lower


def is_lost(rate: Tensor) -> Tensor:
    """Whether steps have become too short for numbers."""
    return rate > torch.finfo(rate.dtype).max / 1e9


def unless_done(done: Tensor, before: S, after: S) -> S:
    """The state after a step, and of a descent that is done the one before."""
    kept = [torch.where(done, old, new) for old, new in zip(before, after, strict=True)]
    return type(before)(*kept)


# The descent on a model


def begin(model: Quadratic, rules: Rules) -> Descent:
    """The descent before its first step."""
    objective = rules.value(model.origin)
    zero = torch.zeros_like(objective, dtype=torch.int64)
    recent = torch.where(objective.isfinite(), objective, torch.inf).expand(_HISTORY).clone()
    unknown = torch.full_like(objective, torch.inf)
    return Descent(model.origin, model.gradient, recent, model.rate, unknown, zero, zero, zero > 0)


def step(model: Quadratic, rules: Rules, s: Descent) -> Descent:
    """A proximal gradient step of the length of Barzilai and Borwein; a descent that is done stays."""
    z, slope, objective, error = _landed(model, rules, s.rate, s.x, s.slope)
    taken, rate, _ = judged(s, model.metric, z, slope, objective)
    return _after(model, s, taken, z, slope, objective, error, rate, s.steps + 1)


def newton(model: Quadratic, rules: Rules, s: Descent) -> Descent:
    """A Newton step on the fixed point of the proximal step, if it more than halves the error or goes downhill."""
    scale = s.rate * model.metric
    landed, pull = vjp(lambda z: rules.land(z, 1 / s.rate, model.metric), s.x - s.slope / scale)[:2]
    one, move = torch.eye(len(s.x), dtype=s.x.dtype, device=s.x.device), landed - s.x
    damps = torch.tensor(_DAMPS, dtype=s.x.dtype, device=s.x.device).clamp(min=8 * torch.finfo(s.x.dtype).eps)
    if rules.separable and rules.convex:
        slopes = pull(torch.ones_like(landed))[0]
        moves = slopes > 0  # What does not move with its point goes where it landed, whatever the others do.
        scale = scale / torch.where(moves, slopes, 1.0)
        inside = moves[:, None] & moves
        diagonals = torch.where(moves, scale * (1 - slopes + damps[:, None]), 1.0)
        wanted = torch.where(moves, scale * move - model.hessian @ torch.where(moves, 0.0, move), move)
        matrices = torch.where(inside, model.hessian, 0.0) + diagonals.diag_embed()
        ways = solved_upwards(matrices, wanted.expand(len(damps), -1))
    else:
        inner = one - model.hessian / scale[:, None]
        jacobian = pull(torch.ones_like(landed))[0][:, None] * inner if rules.separable else vmap(pull)(one)[0] @ inner
        ways = solved(one - jacobian + damps[:, None, None] * one, move.expand(len(damps), -1))
    ways = torch.where(ways.isfinite().all(-1, keepdim=True), ways, torch.zeros_like(ways))
    shares = torch.tensor(_SHARES, dtype=s.x.dtype, device=s.x.device)
    points = s.x + (shares[:, None, None] * ways).reshape(-1, len(s.x))

    def reach(x: Tensor) -> tuple[Tensor, ...]:
        return _landed(model, rules, s.rate, x, model.gradient + model.hessian @ (x - model.origin))

    *places, objectives, errors = vmap(reach)(points)
    best, _, taken = chosen(s, s.error, objectives, errors)
    z, slope, objective, error = (x.index_select(0, best)[0] for x in (*places, objectives, errors))
    return _after(model, s, taken, z, slope, objective, error, s.rate, s.steps)


def _landed(model: Quadratic, rules: Rules, rate: Tensor, x: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
    """The proximal step from x, the slope and the objective there, and a bound of the residual."""
    scale = rate * model.metric
    z = rules.land(x - slope / scale, 1 / rate, model.metric)
    way = z - model.origin
    bend = model.hessian @ way
    after = model.gradient + bend
    objective = (way * (model.gradient + bend / 2)).sum() + rules.value(z)
    # What pulled x to z, less the slope at x, is a subgradient of the penalty at z.
    return z, after, objective, (after - slope - scale * (z - x)).abs().amax()


def _after(
    model: Quadratic,
    s: Descent,
    taken: Tensor,
    z: Tensor,
    slope: Tensor,
    objective: Tensor,
    error: Tensor,
    rate: Tensor,
    steps: Tensor,
) -> Descent:
    """The descent after a step, if it was taken, and if it is not done."""
    x, slope, recent, lower = moved(s, taken, z, slope, objective)
    error = torch.where(taken, error, s.error)
    since = torch.where((error < 0.99 * s.error) | lower, 0, s.since + (steps - s.steps))
    done = (error <= model.enough) | (since > _PATIENCE) | is_lost(rate)
    return unless_done(s.done, s, Descent(x, slope, recent, rate, error, since, steps, done))
