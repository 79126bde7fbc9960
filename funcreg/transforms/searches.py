"""Searches along a line for a step at which an objective is low enough.

Plain code stops at the first that will do, and reads one truth value a trial for that. In an ensemble, in compiled code
and wherever nothing can be read, all trials are made, and those after the last are left out.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value

from funcreg.core._typing import Params, Scalar, Updates
from funcreg.core.checks import check_alike
from funcreg.core.leafwise import compute, compute_wide, reduce_leaves, safe_sqrt, total
from funcreg.core.tree import tree_map
from funcreg.core.undocumented import is_batched, is_traced, without_levels
from funcreg.transforms.plateau import as_value


class Objective:
    """The objective along a line, with what an update got of it."""

    def __init__(self, name: str, params: Params, updates: Updates, like: Tensor, **given: Any) -> None:
        value, grad, value_fn, extra = (given[key] for key in ("value", "grad", "value_fn", "extra"))
        if grad is None or not callable(value_fn):
            raise TypeError(
                f"{name} needs the objective; expected update(updates, state, params, value=loss, grad=grads, "
                "value_fn=f), where f makes the loss from parameters"
            )
        check_alike(params, grad, ("params", "grad"))
        self.value = as_value(name, value, like)
        self.slope = real_dot(grad, updates, like)
        self.grad = compute_wide(lambda g: g.clone(), grad)
        self._params, self._updates, self._like = params, updates, like
        self._f = _with_extra(name, value_fn, extra)

    def at(self, step: Tensor) -> tuple[Tensor, Tensor, Updates]:
        """Value, slope along the line, and gradient, a step from the parameters."""
        point = compute(lambda w, u, s: w + s * u, self._params, self._updates, hyper=(step,))
        grad, value = grad_and_value(self._f)(point)
        return as_value("a line search", value, self._like), real_dot(grad, self._updates, self._like), grad

    def value_at(self, step: Tensor) -> Tensor:
        """The value a step from the parameters."""
        point = compute(lambda w, u, s: w + s * u, self._params, self._updates, hyper=(step,))
        return as_value("a line search", self._f(point), self._like)


def _with_extra(name: str, value_fn: Callable[..., Any], extra: dict[str, Any]) -> Callable[[Params], Any]:
    """An objective of the parameters alone, other arguments given."""
    if not extra:
        return value_fn
    parameters = inspect.signature(value_fn).parameters
    if not any([p.kind is p.VAR_KEYWORD for p in parameters.values()]):
        for key in extra:
            if key not in parameters:
                raise TypeError(f"{name} got the extra argument {key!r}, which value_fn does not take")
    return lambda params: value_fn(params, **extra)


def real_dot(a: Params, b: Params, like: Tensor) -> Tensor:
    """The real part of a scalar product of trees, such as the derivative along updates."""

    def product(x: Tensor, y: Tensor) -> Tensor:
        return x.real * y.real + x.imag * y.imag if x.is_complex() else x * y

    return total(reduce_leaves(product, a, b)).to(like.device, like.dtype)


def is_over(done: Tensor) -> bool:
    """Whether a search is known to be over; False where nothing can be read."""
    if is_traced():
        return False
    done = without_levels(done)
    return type(done) is Tensor and done.device.type != "meta" and not is_batched(done) and bool(done)


def choose(condition: Tensor, a: Any, b: Any) -> Any:
    """Of two trees, the first where a condition holds."""
    return tree_map(lambda x, y: torch.where(condition.to(x.device), x, y.to(x.dtype)), a, b)


def _violation(error: Tensor) -> Tensor:
    """By how much a condition is violated, 0 if it holds; NaN is a violation without measure."""
    error = error.clamp(min=0.0)
    return torch.where(error.isnan(), math.inf, error)


class Backtracking(NamedTuple):
    """Ever smaller steps, up to one that lowers the objective enough."""

    most_trials: int
    slope_rtol: Scalar
    decrease_factor: Scalar
    atol: Scalar
    rtol: Scalar

    def along(self, f: Objective, step: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The step that is found, the value there, by how much it lacks in decrease, and the number of trials.

        Args:
            f: The objective.
            step: The first trial.
            count: A counter, which is as that of trials.
        """
        found, error, trials = f.value, torch.full_like(step, math.inf), torch.zeros_like(count)
        over = torch.zeros_like(step, dtype=torch.bool)
        for n in range(self.most_trials + 1):
            shorter = step if n == 0 else self.decrease_factor * step
            there = f.value_at(shorter)
            left = _violation(there - (1 + self.rtol) * f.value - shorter * self.slope_rtol * f.slope)
            step, found, error, trials = choose(over, (step, found, error, trials), (shorter, there, left, trials + 1))
            over = error <= self.atol
            if is_over(over):
                break
        return step, found, error, trials


class Point(NamedTuple):
    """A point on the line."""

    step: Tensor
    value: Tensor
    slope: Tensor


class Wolfe(NamedTuple):
    """The conditions of Wolfe, the first of which slopes decide where rounding hides a decrease."""

    slope_rtol: Scalar
    curv_rtol: Scalar
    approx_dec_rtol: Scalar | None

    def decrease_error(self, there: Point, start: Point) -> Tensor:
        """By how much a point lacks in decrease."""
        error = there.value - start.value - self.slope_rtol * there.step * start.slope
        if self.approx_dec_rtol is not None:
            close = there.value - start.value - self.approx_dec_rtol * start.value.abs()
            error = torch.minimum(torch.maximum(there.slope - (2 * self.slope_rtol - 1) * start.slope, close), error)
        return _violation(error)

    def curvature_error(self, there: Point, start: Point) -> Tensor:
        """By how much the slope at a point is too steep."""
        return _violation(there.slope.abs() - self.curv_rtol * start.slope.abs())


class Search(NamedTuple):
    """A search for a step, between two trials."""

    trials: Tensor
    bracketed: Tensor  # Whether a good step is known to lie between low and high.
    over: Tensor
    here: Point  # The last trial.
    grad: Updates  # Its gradient.
    low: Point  # The better end, which may lie on either side.
    high: Point
    third: Point  # Another point for cubic interpolation.
    safe: Point  # The best step with a sufficient decrease.
    safe_grad: Updates
    decrease_error: Tensor
    curvature_error: Tensor


class Zoom(NamedTuple):
    """Steps that grow until a good one is bracketed, and then brackets that shrink around it."""

    wolfe: Wolfe
    most_trials: int
    longest: Scalar
    increase_factor: Scalar
    tol: Scalar
    precision: Scalar

    def along(self, f: Objective, start: Point, guess: Tensor, slope: Updates, count: Tensor) -> Search:
        """The search once it is over.

        Args:
            f: The objective.
            start: Where the line begins.
            guess: The first trial.
            slope: The gradient at the start.
            count: A counter, which is as that of trials.
        """
        no, unknown = torch.zeros_like(guess, dtype=torch.bool), torch.full_like(guess, math.inf)
        none = torch.zeros_like(count)
        s = Search(none, no, no, start, slope, start, start, start, start, slope, unknown, unknown)
        for _ in range(self.most_trials):
            s = self.trial(f, s, start, guess)
            if is_over(s.over):
                break
        return s

    def trial(self, f: Objective, s: Search, start: Point, guess: Tensor) -> Search:
        """The search after one more trial, or as it was if it is over."""
        longer = torch.where(s.trials == 0, guess, self.increase_factor * s.here.step)
        limit = self.longest + torch.zeros_like(longer)
        at_limit, longer = longer >= limit, torch.minimum(longer, limit)
        step = torch.where(s.bracketed, _between(s.low, s.high, s.third), longer)
        value, slope, grad = f.at(step)
        there = Point(step, value, slope)
        lacking, steep = self.wolfe.decrease_error(there, start), self.wolfe.curvature_error(there, start)
        good = torch.maximum(lacking, steep) <= self.tol
        narrow = s.bracketed & ((s.high.step - s.low.step).abs() <= self.precision)

        safer = (lacking <= self.tol) & (~s.bracketed | (value < s.safe.value))
        safe, safe_grad = choose(safer, (there, grad), (s.safe, s.safe_grad))
        between, low, high, third = _bracket(s, there, lacking)
        found = between | good
        trials = s.trials + 1
        stuck = (trials >= self.most_trials) | (narrow & (safe.step > 0))
        done = good | (~s.bracketed & at_limit & ~found)
        failed = stuck & ~done
        retreats = failed & ((safe.step > 0) | lacking.isinf())
        here, grad = choose(retreats, (safe, safe_grad), (there, grad))
        new = Search(trials, found, done | failed, here, grad, low, high, third, safe, safe_grad, lacking, steep)
        return choose(s.over, s, new)


def _bracket(s: Search, there: Point, lacking: Tensor) -> tuple[Tensor, Point, Point, Point]:
    """Whether a good step is known to lie in a bracket once a point is known, its ends, and another point."""
    # Where the objective is above its best so far, or rises again, a good step lies before.
    before = (there.value >= s.here.value) & (s.trials > 0)
    beyond = (lacking > 0) | torch.where(s.bracketed, there.value >= s.low.value, before)
    rising = ~beyond & torch.where(s.bracketed, there.slope * (s.high.step - s.low.step) >= 0, there.slope >= 0)
    low = choose(torch.where(s.bracketed, ~beyond, rising), there, choose(s.bracketed, s.low, s.here))
    high = choose(
        s.bracketed,
        choose(beyond, there, choose(rising, s.low, s.high)),
        choose(rising, s.here, there),
    )
    third = choose(s.bracketed, choose(beyond | rising, s.high, s.low), low)
    return s.bracketed | beyond | rising, low, high, third


def _between(low: Point, high: Point, third: Point) -> Tensor:
    """A step between two: the minimum of a cubic or a parabola if it is not near an end, else the middle."""
    width = (high.step - low.step).abs()
    left, right = torch.minimum(low.step, high.step), torch.maximum(low.step, high.step)

    def inside(found: tuple[Tensor, Tensor], share: float) -> Tensor:
        step, there = found
        return there & (step > left + share * width) & (step < right - share * width)

    cubic, parabola = _cubic_minimum(low, high, third), _parabola_minimum(low, high)
    middle = torch.where(inside(parabola, 0.1), parabola[0], (low.step + high.step) / 2)
    return torch.where(inside(cubic, 0.2), cubic[0], middle)


def _quotient(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a / b and whether there is one. Nothing is divided by 0, so that no derivative is NaN."""
    there = b != 0
    return a / torch.where(there, b, 1.0), there


def _cubic_minimum(a: Point, b: Point, c: Point) -> tuple[Tensor, Tensor]:
    """The minimum of the cubic through three points that has the slope of the first there, and whether it has one."""
    to_b, to_c = b.step - a.step, c.step - a.step
    above_b, above_c = b.value - a.value - a.slope * to_b, c.value - a.value - a.slope * to_c
    scale = (to_b * to_c) ** 2 * (to_b - to_c)
    third, distinct = _quotient(to_c**2 * above_b - to_b**2 * above_c, scale)
    second, _ = _quotient(to_b**3 * above_c - to_c**3 * above_b, scale)
    radicand = second * second - 3 * third * a.slope
    way, curved = _quotient(-second + safe_sqrt(radicand.clamp(min=0)), 3 * third)
    return a.step + way, distinct & curved & (radicand >= 0)


def _parabola_minimum(a: Point, b: Point) -> tuple[Tensor, Tensor]:
    """The minimum of the parabola through two points that has the slope of the first there, and whether it has one."""
    width = b.step - a.step
    curvature, distinct = _quotient(b.value - a.value - a.slope * width, width**2)
    way, curved = _quotient(a.slope, 2 * curvature)
    return a.step - way, distinct & curved
