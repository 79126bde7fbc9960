r"""Images of least total variation near to others, by an interior point method: exact to rounding at any size.

.. math:: \min_z \frac{1}{2} \sum_i h_i (z_i - x_i)^2 + \sum_i \|(D z)_i\|

:math:`(D z)_i` are the differences of an entry to the next ones along some dimensions. With the norms as numbers of
their own, :math:`(t_i, v_i)` in a cone, :math:`t_i \ge \|v_i\|`, and multipliers :math:`(1, s_i)` in the same cone,
each step solves linear equations of neighbours. Twenty to forty steps suffice at any size.

References:
    Nesterov & Todd, *Self-scaled barriers and interior-point methods for convex programming*, 1997.
    Andersen, Dahl & Vandenberghe, *Interior-point methods for large-scale cone programming*, 2011.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcreg.regularizers.dissection import Equations

#: Most steps; the duality gap, relative to the objective, at which to end; and the greatest of what counts as found.
_STEPS, _GAP, _FOUND = 100, 1e-14, 1e-8
#: Steps without a lower gap after which rounding is held to be all that moves.
_PATIENCE = 4
#: What is a difference of 0, beside how far its multiplier is from 1.
_LEVEL = 1e-3
#: How much stiffer ties are in a region than between regions, at least, and what they are at most.
_STIFFER, _STIFF, _STIFFEST = 1e3, 1e7, 1e12
#: Shares of ties that are added in turn, as the metric may be less than ties are known to.
_ROUNDING = (0.0, 1e-14, 1e-10)


def slope(x: Tensor, d: int) -> Tensor:
    """The next entry along a dimension minus this one; 0 at the end."""
    size = x.shape[d]
    return torch.cat([x.narrow(d, 1, size - 1) - x.narrow(d, 0, size - 1), _end(x, d)], d)


def back(p: Tensor, d: int) -> Tensor:
    """The transpose of `slope`."""
    held = p.narrow(d, 0, p.shape[d] - 1)
    return torch.cat([_end(p, d), held], d) - torch.cat([held, _end(p, d)], d)


def _end(x: Tensor, d: int) -> Tensor:
    return torch.zeros_like(x.narrow(d, 0, 1))


def slopes(z: Tensor, ndim: int) -> Tensor:
    """The slopes along each of the last dimensions."""
    return torch.stack([slope(z, d) for d in range(-ndim, 0)])


def backs(p: Tensor) -> Tensor:
    """The transpose of `slopes`."""
    found = [back(each, d) for each, d in zip(p, range(-len(p), 0), strict=True)]
    return sum(found[1:], found[0])


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(0)


def _fall(t: Tensor, v: Tensor) -> Tensor:
    r""":math:`t^2 - \|v\|^2`, without a difference of squares."""
    norm = dot(v, v).sqrt()
    return (t - norm) * (t + norm)


class _Scaling:
    r"""Of each cone the symmetric matrix W that takes the multipliers to where its inverse takes the point.

    :math:`W^2 = \eta^2 (2 \bar w \bar w^\top - J)` with the factor :math:`\eta`, a vector :math:`\bar w = (w_0, w)` of
    :math:`w_0^2 - \|w\|^2 = 1`, and J the diagonal of 1 and -1, ..., -1.
    """

    def __init__(self, t: Tensor, v: Tensor, s: Tensor) -> None:
        of_point, of_multiplier = _fall(t, v).sqrt(), _fall(torch.ones_like(t), s).sqrt()
        one, other = v / of_point, s / of_multiplier
        mean = ((1 + t / (of_point * of_multiplier) + dot(one, other)) / 2).sqrt()
        self.w = (one - other) / (2 * mean)
        self.top = (1 + dot(self.w, self.w)).sqrt()
        self.square = of_point / of_multiplier  # Of the factor.
        self.factor = self.square.sqrt()
        self.bent = 2 / (1 + 2 * dot(self.w, self.w))

    def times(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        along = dot(self.w, b)
        return self.factor * (self.top * a + along), self.factor * (b + self.w * (a + along / (1 + self.top)))

    def inverse(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        along = dot(self.w, b)
        return (self.top * a - along) / self.factor, (b + self.w * (along / (1 + self.top) - a)) / self.factor

    def bend(self) -> list[list[Tensor]]:
        """How multipliers answer to differences, once the norms went along with these."""
        rows = list(enumerate(self.w))
        return [[((i == j) * 1.0 - self.bent * a * b) / self.square for j, b in rows] for i, a in rows]


class _Point(NamedTuple):
    z: Tensor
    t: Tensor
    v: Tensor
    s: Tensor

    def moved(self, d: _Point, far: Tensor) -> _Point:
        return _Point(*[x + far * y for x, y in zip(self, d, strict=True)])

    def where(self, here: Tensor, other: _Point) -> _Point:
        return _Point(*[torch.where(here, x, y) for x, y in zip(self, other, strict=True)])


def _reach(a: Tensor, b: Tensor, to_a: Tensor, to_b: Tensor) -> Tensor:
    """How far points of cones may go along a direction: the first root of a square."""
    square, half, rest = to_a * to_a - dot(to_b, to_b), a * to_a - dot(b, to_b), _fall(a, b)
    inside = half * half - square * rest
    ends = (inside >= 0) & ((half < 0) | (square < 0))
    under = inside.clamp(min=0.0).sqrt() - half
    return torch.where(ends, rest / torch.where(ends, under, 1.0), torch.inf)


class _Descent:
    """The method for images `(B, *shape)`, in float64."""

    def __init__(self, x: Tensor, h: Tensor) -> None:
        self.x, self.h, self.ndim = x, h, x.ndim - 1
        self._dims = tuple(range(1, x.ndim))
        v = slopes(x, self.ndim)
        norm = dot(v, v).sqrt()
        # Constraints hold from the beginning on: they are linear.
        self.point = _Point(x, norm + norm.mean(self._dims, keepdim=True), v, torch.zeros_like(v))

    def gap(self) -> Tensor:
        return (self.point.t + dot(self.point.v, self.point.s)).sum(self._dims, keepdim=True)

    def objective(self) -> Tensor:
        z, _, v, _ = self.point
        return (self.h * (z - self.x).square() / 2 + dot(v, v).sqrt()).sum(self._dims, keepdim=True)

    def step(self, active: Tensor) -> None:
        """Predict how far complementarity may fall, and step to less of it."""
        _, t, v, s = self.point
        ones, zeros = torch.ones_like(t), torch.zeros_like(t)
        scaling = _Scaling(t, v, s)
        equations = Equations(self.h, scaling.bend())
        at = scaling.times(ones, s)  # The point and the multipliers, both scaled, are this.
        goal = -at[0] * at[0] - dot(at[1], at[1]), -2 * at[0] * at[1]
        first = self._direction(scaling, equations, at, goal)
        far = self._far(first).clamp(max=1.0)
        mean = self.gap() / t[0].numel()
        a, b = scaling.inverse(first.t, first.v), scaling.times(zeros, first.s)
        goal = (
            goal[0] + (1 - far) ** 3 * mean - a[0] * b[0] - dot(a[1], b[1]),
            goal[1] - a[0] * b[1] - b[0] * a[1],
        )
        second = self._direction(scaling, equations, at, goal)
        self.point = self.point.moved(second, (0.99 * self._far(second)).clamp(max=1.0)).where(active, self.point)

    def _far(self, d: _Point) -> Tensor:
        _, t, v, s = self.point
        reach = torch.minimum(_reach(t, v, d.t, d.v), _reach(torch.ones_like(t), s, torch.zeros_like(t), d.s))
        return reach.amin(self._dims, keepdim=True)

    def _direction(
        self, scaling: _Scaling, equations: Equations, at: tuple[Tensor, Tensor], goal: tuple[Tensor, Tensor]
    ) -> _Point:
        """The direction along which the product of the point and the multipliers goes to a goal."""
        z, _, _, s = self.point
        top = (at[0] * goal[0] - dot(at[1], goal[1])) / _fall(*at)
        push, force = scaling.inverse(top, (goal[1] - top * at[1]) / at[0])
        # Multipliers begin with 1: norms go where that stays.
        stiff, lean = (2 * scaling.top**2 - 1) / scaling.square, -2 * scaling.top * scaling.w / scaling.square
        force = force - lean * push / stiff
        dz = equations.solved(self.h * (self.x - z) + backs(s) + backs(force))
        dv = slopes(dz, self.ndim)
        dt = (push - dot(lean, dv)) / stiff
        return _Point(dz, dt, dv, force - (dv - scaling.bent * scaling.w * dot(scaling.w, dv)) / scaling.square)


def nearest(x: Tensor, h: Tensor) -> Tensor:
    """The images of least objective, `(B, *shape)`, equal where their multipliers say so; NaN if not found."""
    descent = _Descent(x, h)
    best, least = descent.point, torch.full_like(descent.gap(), torch.inf)
    idle = torch.zeros_like(least)
    flat = descent.point.t.amax(tuple(range(1, x.ndim)), keepdim=True) == 0
    for _ in range(_STEPS):
        gap, objective = descent.gap(), descent.objective()
        share = gap / objective
        better = share.abs() < least
        best, least = descent.point.where(better, best), torch.where(better, share.abs(), least)
        idle = torch.where(better, 0.0, idle + 1)
        active = ~flat & (least > _GAP) & (idle < _PATIENCE) & share.isfinite()
        if not bool(active.any()):
            break
        descent.step(active)
    found = (least <= _FOUND) | flat
    z, _, v, s = best
    # At a solution either the difference is 0 or the multiplier has length 1. Where both nearly are it is a difference:
    # these become ever smaller along a ridge, while a multiplier comes near to 1 by chance alone.
    level = dot(v, v).sqrt() < _LEVEL * (1 - dot(s, s).sqrt())
    z = leveled(z, regions(level | flat, len(v)), h)
    return torch.where(found, torch.where(flat, x, z), torch.nan)


# Regions


def regions(joined: Tensor, ndim: int) -> Tensor:
    """For each entry the number of the first one of its region: of entries that are joined to their next ones."""
    count = joined[0].numel()
    labels = torch.arange(count, device=joined.device).reshape(joined.shape[1:]).expand(joined.shape).contiguous()
    while True:
        before, labels = labels, labels.clone()
        for d in range(-ndim, 0):
            size = labels.shape[d] - 1
            here, there = labels.narrow(d, 0, size), labels.narrow(d, 1, size)
            tied = joined.narrow(d, 0, size)
            least = torch.minimum(here, there)
            here.copy_(torch.where(tied, least, here))
            there.copy_(torch.where(tied, torch.minimum(least, there), there))
        flat = labels.flatten(1)
        # The region of an entry's first one is its own; what was that one's region before goes along.
        flat = flat.scatter_reduce(1, before.flatten(1), flat, "amin").gather(1, before.flatten(1))
        labels = flat.gather(1, flat).reshape(joined.shape)
        if bool((labels == before).all()):
            return labels


def leveled(x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The mean of each region in all of its entries."""
    places, zeros = labels.flatten(1), x.new_zeros(len(x), x[0].numel())
    weights = weights / weights.amax(tuple(range(1, x.ndim)), keepdim=True)
    # Of differences to the first entry: what is equal already stays.
    first = x.flatten(1).gather(1, places)
    sums = zeros.scatter_add(1, places, (weights.flatten(1) * (x.flatten(1) - first)))
    counts = zeros.scatter_add(1, places, weights.flatten(1)).clamp(min=torch.finfo(x.dtype).tiny)
    return (first + (sums / counts).gather(1, places)).reshape(x.shape)


def turned(force: Tensor, z: Tensor, h: Tensor, jump: Tensor) -> Tensor:
    """How images of equal entries move by a force, against a metric and the second derivative of norms.

    Equal neighbours move together: by stiff ties, and the mean of what is left.
    """
    v = slopes(z, z.ndim - 1)
    norm = dot(v, v).sqrt()
    level = norm == 0
    free = torch.where(level, 0.0, jump / torch.where(level, 1.0, norm))
    most = _STIFFER * free.amax(tuple(range(1, z.ndim)), keepdim=True)
    ties = torch.where(level, most.clamp(_STIFF, _STIFFEST), 0.0)
    unit = v / torch.where(level, 1.0, norm)
    rows = list(enumerate(unit))
    bend = [[free * ((i == j) * 1.0 - a * b) + (i == j) * ties for j, b in rows] for i, a in rows]
    labels, ones = regions(level, len(v)), torch.ones_like(h)
    force = leveled(force, labels, ones)
    found = torch.full_like(force, torch.nan)
    for rounding in _ROUNDING:
        if bool(found.isfinite().all()):
            break
        found = Equations(h + rounding * (ties + free), bend).solved(force)
    return leveled(found, labels, ones)


def by_parts(f: Callable[..., Tensor], *given: Tensor, most: int = 1 << 17) -> Tensor:
    """A function of images that come one after the other, of so many at once that memory suffices."""
    count = max(1, most // max(1, given[0][0].numel()))
    return torch.cat([f(*some) for some in zip(*[x.split(count) for x in given], strict=True)])
