"""The descent of `minimize`, of one member of a map and of all: proximal gradient steps, and minima of models.

Where the loss is small enough for a Hessian, a step goes to the minimum of a quadratic model (`quadratic`); where it is
not, Newton steps on the fixed point of the proximal step solve their equations by products with vectors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp, vmap

from funcreg.core.inputs import RANDOM, LinAlgError
from funcreg.core.masks import listed
from funcreg.core.notices import warn_user
from funcreg.solvers.graphs import Graphs, with_more
from funcreg.solvers.quadratic import (
    Descent,
    Quadratic,
    Rules,
    begin,
    chosen,
    convex,
    diagonal_metric,
    greatest_curvature,
    is_lost,
    judged,
    moved,
    newton,
    step,
    unless_done,
)
from funcreg.solvers.vectors import Flat

#: Objectives of which a new one has to be below the greatest.
_HISTORY = 10
#: Steps after which a Newton step is tried; twice as many after each that was of no help.
_EVERY = 10
#: Shares of the way to the minimum of a model, or of a Newton step, that are tried.
_SHARES = (1.0, 0.5, 0.25, 0.0625)
#: Entries up to which Hessians and Jacobians are matrices; beyond that, equations are solved by products with vectors.
DENSE = 512
#: Entries up to which a Hessian, and a Newton step on a model, cost little more than a proximal step.
SMALL = 64
#: Entries of a model for each that is not zero.
_GROWTH = 3
#: Most times by which a step is shorter than one that was not taken.
_SHORTER = 10
#: Most steps on a model.
_INNER = 200
#: Steps without a better residual or objective after which rounding is held to be all that moves.
_PATIENCE = 300


class _State(NamedTuple):
    """Where the descent is; vectors hold all parameters."""

    x: Tensor
    slope: Tensor  # Gradient of the loss at x.
    recent: Tensor  # The last objectives.
    rate: Tensor  # One over the length of the next step, in the metric.
    metric: Tensor
    residual: Tensor
    best: Tensor  # The least residual so far,
    since: Tensor  # and the steps since then.
    steps: Tensor
    done: Tensor


# The descent, of one member


def _is_dense(x: Tensor) -> bool:
    return 1 <= x.shape[-1] <= DENSE


def is_small(x: Tensor) -> bool:
    return 1 <= x.shape[-1] <= SMALL


def _is_eager(flat: Flat, x: Tensor) -> bool:
    """Whether the descent begins with a model.

    Where entries are many and the penalty is no convex sum over them, steps find those that matter at less cost.
    """
    return is_small(x) or (flat.separable and flat.convex)


def first_state(flat: Flat, tensors: Any) -> tuple[_State, Tensor, Tensor, Tensor]:
    """The state before the first step, the Hessian, if it is a small matrix, and whether the loss is flat, or drawn."""
    x = flat.begin(tensors)
    slope, value = grad_and_value(flat.read)(x, tensors)
    once, again = flat.read(x, tensors), flat.read(x, tensors)
    is_drawn = (once - again).abs() > torch.finfo(value.dtype).eps ** 0.5 * value.abs()
    hessian, metric = x, torch.ones_like(x)
    if is_small(x):
        hessian = _hessian(flat, x, tensors)
        metric = diagonal_metric(hessian) if flat.in_metric else metric
        rate = _first_rate(flat, tensors, hessian, metric)
    else:
        rate = _curvature(flat, x, tensors, slope)
    is_flat = (slope == 0).all() & (rate == 0) & (x.shape[-1] > 0) & ~value.isnan()
    rate = _in_reach(torch.where((rate > 0) & rate.isfinite(), rate, torch.ones_like(rate)), x, slope, metric)
    objective = value + flat.value(x, tensors)
    residual = torch.where(value.isnan(), value, _left(flat, x, slope, rate, metric, tensors))
    zero = torch.zeros_like(value, dtype=torch.int64)
    recent = torch.where(objective.isfinite(), objective, torch.inf).expand(_HISTORY).clone()
    done = (residual <= flat.tol) | residual.isnan() | ~slope.isfinite().all()  # From NaN no step leads anywhere.
    return _State(x, slope, recent, rate, metric, residual, residual, zero, zero, done), hessian, is_flat, is_drawn


def _first_rate(flat: Flat, tensors: Any, hessian: Tensor, metric: Tensor) -> Tensor:
    """One over the length of a first step on a model, in the metric.

    Where every zero is stationary only steps leave it, and longer ones leave more of them: each entry goes as far as it
    would alone, and what goes uphill is taken back.
    """
    rate = greatest_curvature(hessian, metric)
    if flat.convex or not flat.in_metric:
        return rate
    one = torch.ones_like(rate)
    held = flat.land(torch.full_like(metric, torch.finfo(metric.dtype).eps ** 2), one, metric, tensors) == 0
    left = flat.residual(torch.zeros_like(metric), torch.where(held, -1e30, 0.0).to(metric.dtype), tensors)
    return torch.where(held.any() & (left == 0), one, rate)


def _in_reach(rate: Tensor, x: Tensor, slope: Tensor, metric: Tensor) -> Tensor:
    """A rate whose step is short enough for numbers to tell what it adds to.

    Where the curvature is nearly 0, as that of a smooth loss of quantiles between two samples, a step would otherwise
    be so long that no number of halvings makes it short.
    """
    if not x.shape[-1]:
        return rate
    longest = x.abs().amax().clamp(min=1.0) / torch.finfo(x.dtype).eps
    least = (slope / metric).abs().amax() / longest
    return torch.where(least.isfinite(), torch.maximum(rate, least), rate)


def _curvature(flat: Flat, x: Tensor, tensors: Any, slope: Tensor) -> Tensor:
    """The greatest curvature, roughly."""
    v = torch.where(slope == 0, torch.ones_like(slope), slope)
    rate = torch.ones_like(v.sum())
    for _ in range(2 if _is_eager(flat, x) else 6):
        v = v / v.square().sum().sqrt().clamp(min=torch.finfo(x.dtype).tiny)
        v = _hessian_times(flat, x, tensors, v)
        rate = v.square().sum().sqrt()
    return rate


def _hessian(flat: Flat, x: Tensor, tensors: Any) -> Tensor:
    one = torch.eye(len(x), dtype=x.dtype, device=x.device)
    return vmap(lambda v: _hessian_times(flat, x, tensors, v))(one)


def _hessian_times(flat: Flat, x: Tensor, tensors: Any, v: Tensor) -> Tensor:
    # Twice in reverse: some losses of torch, `mse_loss` among them, have no forward derivative of their gradient.
    return vjp(lambda x: grad_and_value(flat.read)(x, tensors)[0], x)[1](v)[0]


def forward_backward(flat: Flat, x: Tensor, slope: Tensor, rate: Tensor, metric: Tensor, tensors: Any) -> Tensor:
    return flat.land(x - slope / (rate * metric), 1 / rate, metric, tensors)


def _left(flat: Flat, x: Tensor, slope: Tensor, rate: Tensor, metric: Tensor, tensors: Any) -> Tensor:
    """The residual at x; of a penalty that is not convex no less than the move of a proximal step, as a gradient."""
    if flat.convex or not x.shape[-1]:
        return flat.residual(x, slope, tensors)
    move = (forward_backward(flat, x, slope, rate, metric, tensors) - x).abs() - 4 * torch.finfo(x.dtype).eps * x.abs()
    step = (rate * metric * move.clamp(min=0.0)).amax()
    # Without a rule the residual is the move of a step of length 1, which may go elsewhere from any point.
    return torch.maximum(flat.residual(x, slope, tensors), step) if flat.has_rule else step


def jacobian_times(flat: Flat, x: Tensor, rate: Tensor, metric: Tensor, tensors: Any) -> Callable[[Tensor], Tensor]:
    """The product of a vector and the Jacobian of the proximal step from x."""
    point = x - grad_and_value(flat.read)(x, tensors)[0] / (rate * metric)
    # What pulls back is linear: its own pull-back pushes forward. The forward mode of torch would do it at once, but
    # its first use compiles with what is deprecated, and says so.
    pull = vjp(lambda z: flat.land(z, 1 / rate, metric, tensors), point)[1]
    push = vjp(lambda v: pull(v)[0], torch.zeros_like(point))[1]
    return lambda v: push(v - _hessian_times(flat, x, tensors, v) / (rate * metric))[0]


def _slope_and_objective(flat: Flat, z: Tensor, tensors: Any) -> tuple[Tensor, Tensor]:
    """The gradient of the loss at a point, and the objective, not a number where that is not finite."""
    slope, value = grad_and_value(flat.read)(z, tensors)
    return slope, torch.where(slope.isfinite().all(), value + flat.value(z, tensors), torch.nan)


def _step(flat: Flat, tensors: Any, s: _State) -> _State:
    """A proximal gradient step."""
    z = forward_backward(flat, s.x, s.slope, s.rate, s.metric, tensors)
    slope, objective = _slope_and_objective(flat, z, tensors)
    taken, rate, length = judged(s, s.metric, z, slope, objective)
    # What curves most where a step was far too long, as an exponential function does, says little of where it began.
    rate = torch.where(taken, rate, torch.minimum(rate, _SHORTER * s.rate))
    return _moved(flat, tensors, s, taken, z, slope, objective, rate, length == 0)


def _shortened(s: _State) -> _State:
    """The state after a step to where the loss fails, as `logdet` does at zeros: that of one that no member takes."""
    rate = torch.where(s.done, s.rate, 2 * s.rate)
    return s._replace(rate=rate, steps=torch.where(s.done, s.steps, s.steps + 1), done=s.done | is_lost(rate))


def _newton(flat: Flat, tensors: Any, s: _State) -> _State:
    """A Newton step on the fixed point of the proximal step."""

    def land(x: Tensor) -> Tensor:
        return forward_backward(flat, x, grad_and_value(flat.read)(x, tensors)[0], s.rate, s.metric, tensors)

    product = jacobian_times(flat, s.x, s.rate, s.metric, tensors)
    step = gmres(lambda v: v - product(v), land(s.x) - s.x, 30)
    step = torch.where(step.isfinite().all(), step, torch.zeros_like(step))
    return _nearest(flat, tensors, s, [land(s.x + share * step) for share in _SHARES])[0]


def _towards(
    flat: Flat, tensors: Any, s: _State, goal: Tensor, steps: Tensor, shares: tuple[float, ...]
) -> tuple[_State, Tensor]:
    """A step towards the minimum of a model, which took some steps to find; and whether it came near."""
    points = [goal if share == 1 else s.x + share * (goal - s.x) for share in shares]
    after, near = _nearest(flat, tensors, s, points)
    return after._replace(steps=torch.where(s.done, s.steps, s.steps + steps)), near | s.done


def _nearest(flat: Flat, tensors: Any, s: _State, points: list[Tensor]) -> tuple[_State, Tensor]:
    """The state at one of some points: the nearest that more than halves the residual, or else the lowest."""

    def reach(z: Tensor) -> tuple[Tensor, ...]:
        slope, objective = _slope_and_objective(flat, z, tensors)
        return z, slope, objective, _left(flat, z, slope, s.rate, s.metric, tensors)

    # One after the other: mapped over maps, some losses of torch, `mse_loss` among them, fail on their targets.
    places, slopes, objectives, residuals = (torch.stack(each) for each in zip(*map(reach, points), strict=True))
    # Of the least so far: steps may come nearer and go away again, and half of where they are may lie far uphill.
    best, near, taken = chosen(s, s.best, objectives, residuals)
    z, slope, objective = (x.index_select(0, best)[0] for x in (places, slopes, objectives))
    after = _moved(flat, tensors, s, taken, z, slope, objective, s.rate, torch.zeros_like(taken))
    return after._replace(steps=s.steps, since=torch.where(taken, after.since, s.since)), near


def _moved(
    flat: Flat,
    tensors: Any,
    s: _State,
    taken: Tensor,
    z: Tensor,
    slope: Tensor,
    objective: Tensor,
    rate: Tensor,
    still: Tensor,
) -> _State:
    """The state after a step, if it was taken, and if this member is not done."""
    x, slope, recent, lower = moved(s, taken, z, slope, objective)
    residual = _left(flat, x, slope, rate, s.metric, tensors)
    if flat.convex:  # Else it depends on the length of the next step, too.
        residual = torch.where(taken, residual, s.residual)
    since = torch.where((residual < 0.99 * s.best) | lower, 0, s.since + 1)
    done = (residual <= flat.tol) | (since > _PATIENCE) | (taken & still) | is_lost(rate)
    best = torch.minimum(residual, s.best)
    after = _State(x, slope, recent, rate, s.metric, residual, best, since, s.steps + 1, done)
    return unless_done(s.done, s, after)


# The descent, of all members


def _with_graphs(flat: Flat, graphs: Graphs, tensors: Any) -> tuple[Flat, Any]:
    """A problem with graphs of what its loss computes, if there are any, and the tensors as these take them."""
    if 0 in flat.sizes:
        return replace(flat, graphs=None), tensors
    member = list(tensors)
    for dims in reversed(flat.levels):
        member = [t if dim is None else t.select(0, 0) for t, dim in zip(member, dims, strict=True)]
    x = flat.begin(member)
    known = [x if x.is_inference() else x.detach().requires_grad_(), *member]
    known += [] if flat.kept is None else [flat.kept]

    def computes(x: Tensor, *known: Tensor) -> Any:
        tensors = known[: len(member)]
        value = flat.read(x, tensors)
        if flat.penalty_is_known:
            return value
        one = torch.ones_like(x)
        step = flat.land(x, one.amax(), one, tensors)
        return value, step, flat.value(x, tensors), flat.residual(x, one, tensors)

    shape = (flat.levels, flat.sizes, None if flat.kept is None else len(flat.kept))
    found = graphs.knowing(computes, shape, known)
    return replace(flat, graphs=found), tuple(graphs.arranged(tensors))


def descend(flat: Flat, tensors: Any) -> tuple[Tensor, ...]:
    """The solution, its residual, steps, whether it has converged, and the step and metric for its derivatives."""
    if flat.graphs is not None:
        flat, tensors = _with_graphs(flat, flat.graphs, tensors)
    start = flat.over_members(lambda tensors: first_state(flat, tensors), "start")
    proximal = flat.over_members(lambda tensors, s: _step(flat, tensors, _State(*s)), "step")
    s, hessian, flat_there, is_drawn = start(tensors)
    if bool(is_drawn.any()):
        raise TypeError(f"the loss is not the same at two calls with the same parameters. {RANDOM}")
    if bool(flat_there.all()):
        warn_user(
            "the gradient and the curvature of the loss are 0 at params: does it depend on them? A detach(), .data or "
            "item() in it hides them.",
        )
    s = _State(*s)
    lost = s.residual.isnan() | ~s.slope.isfinite().all(-1)
    if bool(lost.any()):
        warn_user(_why_lost(flat, tensors, lost))
    hessians, eager = _Hessians(flat, tensors, hessian if is_small(s.x) else None), _is_eager(flat, s.x)
    # A Hessian costs as much as so many steps as it has rows, or somewhat less.
    first = 0 if eager else max(_EVERY, s.x.shape[-1] // 8 if _is_dense(s.x) else 0)
    # Each member tries a model when it is due: one that helps others may be of no use to it, and takes many steps.
    plan = _Plan(torch.full_like(s.steps, first), torch.full_like(s.steps, _EVERY), torch.zeros_like(s.residual))
    has_moved = False
    while bool((going := ~s.done & (s.steps < flat.max_steps)).any()):
        due = going & (s.steps >= plan.then)
        if bool(due.any()):
            before, size = s, 0
            with contextlib.suppress(LinAlgError):  # The loss has no value there; shorter steps may lead on.
                after, size = _jumped(flat, tensors, _alone(s, due), hessians, plan.share, has_moved)
                s, has_moved = _joined(s, due, after), True
            plan = plan.after(due, before.residual, s, eager, size)
        others = going & ~due
        if bool(others.any()):
            try:
                after = _State(*proximal(tensors, _alone(s, others)))
            except LinAlgError:
                after = _shortened(_alone(s, others))
            s, has_moved = _joined(s, others, after), True
    return s.x, s.residual, s.steps, s.residual <= flat.tol, s.rate, s.metric


def _why_lost(flat: Flat, tensors: Any, lost: Tensor) -> str:
    """What is said where a descent cannot begin."""
    pairs = zip(flat.names(), tensors, strict=True)
    numbers = lambda x: x if x.layout is torch.strided else x.coalesce().values()
    names = [name for name, x in pairs if x.is_floating_point() and not bool(numbers(x).isfinite().all())]
    for_some = f" for {int(lost.sum())} of {lost.numel()} members" if lost.ndim else ""
    cause = (
        f"There is NaN or inf in {listed(names)}."
        if names
        else "Expected params at which the loss is finite and smooth; log(w), 1 / w and w.sqrt() are not at 0."
    )
    return f"the loss or its gradient is not finite at params{for_some}, so that no step is taken. {cause}"


class _Plan(NamedTuple):
    """For each member, when it tries a model next, and how near the minimum of that is near enough."""

    then: Tensor  # Number of steps,
    wait: Tensor  # and how many there are after one that was of no help.
    #: As a share of the residual. A model that only halved that is not worth a minimum to all digits, and far from the
    #: solution, where gradients are huge, none has them. Of what failed nothing is known, nor of the first.
    share: Tensor

    def after(self, due: Tensor, before: Tensor, s: _State, eager: bool, size: int) -> _Plan:
        """What comes after models of some members, from the residuals before and the size of their Hessians."""
        ratio = s.residual / before
        helped = ratio < 0.5
        wait = torch.where(helped, _EVERY, 2 * self.wait)
        then = s.steps + torch.where(helped & eager, 0, wait.clamp(min=size // 8))
        share = torch.where(helped, ratio.square(), 0.0)
        return _Plan(*[torch.where(due, new, old) for new, old in zip((then, wait, share), self, strict=True)])


def _alone(s: _State, which: Tensor) -> _State:
    """The state in which only some members go on."""
    return s._replace(done=~which)


def _joined(s: _State, which: Tensor, after: _State) -> _State:
    """The state after steps of some members."""
    return after._replace(done=torch.where(which, after.done, s.done))


def _jumped(
    flat: Flat, tensors: Any, s: _State, hessians: _Hessians, share: Tensor, has_moved: bool
) -> tuple[_State, int]:
    """The state after a step to the minimum of a model, and the size of its Hessian."""
    inside = None
    if not is_small(s.x):
        inside = _working_set(flat, tensors, s)
        if not 1 <= inside.shape[-1] <= DENSE:
            tried = flat.over_members(lambda tensors, s: _newton(flat, tensors, _State(*s)), "newton")
            return _State(*tried(tensors, s)), 0
    x, slope = (entries(v, inside) for v in (s.x, s.slope))
    curvature = convex(hessians.at(x, inside, has_moved), lambda: entries(_moves(flat, tensors, s) > 0, inside))
    enough = torch.where(share > 0, share * s.residual, 0.0).clamp(min=flat.tol / 4)
    left = int((flat.max_steps - s.steps).masked_fill(s.done, flat.max_steps).amin())
    quadratic, descent = _model_minimum(flat, tensors, s.done, (x, slope, curvature, enough), inside, left)
    goal = descent.x if inside is None else s.x.scatter(-1, inside, descent.x)
    whole, part_way = (
        flat.over_members(
            lambda tensors, s, goal, steps, shares=shares: _towards(flat, tensors, _State(*s), goal, steps, shares),
            ("towards", shares),
        )
        for shares in (_SHARES[:1], _SHARES)
    )
    after, near = whole(tensors, s, goal, descent.steps)
    if not bool(near.all()):
        hessians.same = False
        after, _ = part_way(tensors, s, goal, descent.steps)
    after = _State(*after)
    if inside is None:
        # Where a model was of no help, steps become no longer than those whose length is known.
        known = s.rate * (s.metric / quadratic.metric).amax(-1)
        stayed = (after.x == s.x).all(-1) & (s.steps > 0) & known.isfinite()
        rate = torch.where(stayed, torch.maximum(quadratic.rate, known), quadratic.rate)
        after = after._replace(
            rate=torch.where(s.done, s.rate, rate),
            metric=torch.where(s.done.unsqueeze(-1), s.metric, quadratic.metric),
        )
    return after, x.shape[-1]


def _moves(flat: Flat, tensors: Any, s: _State) -> Tensor:
    """How far a proximal step takes zeros; infinite for entries that are not zero."""
    land = flat.over_members(
        lambda tensors, x, slope, rate, metric: forward_backward(flat, x, slope, rate, metric, tensors), "landed"
    )
    return torch.where(s.x == 0, land(tensors, s.x, s.slope, s.rate, s.metric).abs(), torch.inf)


def _working_set(flat: Flat, tensors: Any, s: _State) -> Tensor:
    """Places of the entries that are not zero, and of the zeros that a proximal step takes furthest.

    They are no more than some times those that are not zero, as most zeros that a step would move stay once the others
    have moved. Each member has its own, and of others so many that all have as many.
    """
    moves = torch.where(s.done.unsqueeze(-1), 0.0, _moves(flat, tensors, s))
    least, most = (int(x.sum(-1).amax()) for x in (moves.isinf(), moves > 0))
    if flat.separable:
        most = min(most, max(_GROWTH * least, SMALL))
    places = moves.argsort(dim=-1, descending=True)[..., :most]
    return places if flat.graphs is None else _shared(places, s.x.shape[-1])


def _shared(places: Tensor, size: int) -> Tensor:
    """The places of all members, for each of them, and more."""
    found = with_more(torch.zeros(size, dtype=torch.bool, device=places.device).index_fill(0, places.reshape(-1), True))
    return found.expand(*places.shape[:-1], -1)


def entries(x: Tensor, places: Tensor | None) -> Tensor:
    return x if places is None else x.take_along_dim(places, -1)


class _Hessians:
    """Hessians of a loss, or of it as a function of the entries in some places; what is known is not computed again.

    Where all members of a map begin, or wherever they are if the loss seems to be quadratic, one serves for those with
    the same data.

    Args:
        flat: The problem.
        tensors: What it was given.
        start: The Hessian where the descent begins, if it is known.
    """

    def __init__(self, flat: Flat, tensors: Any, start: Tensor | None) -> None:
        self._flat, self._tensors, self.first_state = flat, tensors, start
        self._known: tuple[Tensor, Tensor] | None = None  # Places, and the Hessian of those.
        self.same = flat.quadratic  # Whether they seem to be the same everywhere.

    def at(self, x: Tensor, inside: Tensor | None, moved: bool) -> Tensor:
        """Hessians at the entries x in some places, or all; x has moved or is where the descent begins."""
        flat, differs = self._flat, moved and not self.same
        if inside is None:
            if self.first_state is not None and not differs:
                return self.first_state
            return flat.over_members(lambda tensors, x: _hessian(flat, x, tensors), "hessian")(self._tensors, x)
        union = inside.unique()
        if differs or len(union) > DENSE:
            of = lambda tensors, x, inside: _hessian(flat.narrowed(inside), x, tensors)
            return flat.over_members(of, ("hessian", x.shape[-1]))(self._tensors, x, inside)
        if self._known is None or not bool(torch.isin(union, self._known[0]).all()):
            self._known = union, self._at_start(x, union)
        places, found = self._known
        own = torch.searchsorted(places, inside.contiguous())
        return found.take_along_dim(own.unsqueeze(-1), -2).take_along_dim(own.unsqueeze(-2), -1)

    def _at_start(self, x: Tensor, places: Tensor) -> Tensor:
        flat = self._flat
        part = replace(flat.narrowed(places), levels=flat.levels, sizes=flat.sizes, graphs=flat.graphs)
        # Of what a member is given it takes what all may share: not x, nor the strength.
        start = part.over_members(lambda tensors, x: _hessian(part, part.begin(tensors), tensors), "hessian at start")
        return start(self._tensors, x)


def _model_minimum(
    flat: Flat,
    tensors: Any,
    given_up: Tensor,
    there: tuple[Tensor, ...],
    inside: Tensor | None,
    budget: int,
) -> tuple[Quadratic, Descent]:
    """Models of the loss at entries in some places, from the slope and the Hessian there, and descents to minima.

    `there` are entries, slopes, Hessians, and errors that are small enough.
    """
    size = there[0].shape[-1]
    places = () if inside is None else (inside,)

    def within(tensors: Any, places: tuple[Tensor, ...]) -> tuple[Flat, Rules]:
        part = flat.narrowed(*places) if places else flat
        land = lambda x, step, metric: part.land(x, step, metric, tensors)
        return part, Rules(land, lambda x: part.value(x, tensors), flat.separable, flat.convex)

    def model(tensors: Any, x: Tensor, slope: Tensor, hessian: Tensor, enough: Tensor, *places: Tensor) -> Any:
        part, rules = within(tensors, places)
        metric = diagonal_metric(hessian) if flat.in_metric else torch.ones_like(x)
        rate = _first_rate(part, tensors, hessian, metric)
        rate = _in_reach(torch.where((rate > 0) & rate.isfinite(), rate, 1.0), x, slope, metric)
        made = Quadratic(x, slope, hessian, metric, rate, enough)
        return made, begin(made, rules)

    stepped, jumped = (
        flat.over_members(
            lambda tensors, q, d, *places, f=f: f(Quadratic(*q), within(tensors, places)[1], Descent(*d)),
            (name, size),
        )
        for f, name in ((step, "step of a model"), (newton, "newton of a model"))
    )
    quadratic, descent = flat.over_members(model, ("model", size))(tensors, *there, *places)
    # The Jacobian of a penalty that is no sum over entries is a matrix, too.
    every = 1 if flat.separable or is_small(there[0]) else _EVERY // 2
    descent, steps, helped = Descent(*descent), 0, False
    while steps < min(budget, _INNER) and not bool((descent.done | given_up).all()):
        descent, steps = Descent(*stepped(tensors, quadratic, descent, *places)), steps + 1
        if helped or steps % every == 0:
            before, descent = descent.error, Descent(*jumped(tensors, quadratic, descent, *places))
            helped = bool((descent.error < before / 2).any())
    return Quadratic(*quadratic), descent


# Linear equations of a fixed point


def gmres(product: Callable[[Tensor], Tensor], b: Tensor, count: int) -> Tensor:
    """The vector in a Krylov space of some dimensions whose product is nearest to b."""
    tiny = torch.finfo(b.dtype).tiny
    size = b.square().sum().sqrt()
    basis, images = [b / size.clamp(min=tiny)], []
    for _ in range(min(count, len(b))):
        images.append(product(basis[-1]))
        w, stack = images[-1], torch.stack(basis)
        for _ in range(2):  # Twice, or rounding would leave some of the earlier directions.
            w = w - stack.T @ (stack @ w)
        length = w.square().sum().sqrt()
        basis.append(torch.where(length > 1e-14, w / length.clamp(min=tiny), torch.zeros_like(w)))
    shares = torch.linalg.pinv(torch.stack(images).T, rtol=1e-13) @ b
    return shares @ torch.stack(basis[:-1])
