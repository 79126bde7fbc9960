"""Line searches: step sizes that lower an objective enough, with optax's names and numbers.

Each tries so many steps at most, and evaluates the objective at each. Plain code stops at the first that will do, and
reads one truth value a trial for that. In an ensemble, in compiled code and wherever nothing can be read, all trials
are made, and those after the last are left out.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value

from funcreg._typing import Params, Scalar, State, Updates
from funcreg.checks import check_alike
from funcreg.construction import remembered
from funcreg.factory_checks import finite_nonnegative, positive
from funcreg.leafwise import compute, compute_wide, reduce_leaves, safe_sqrt, scalar_device, total
from funcreg.moments import stored
from funcreg.plateau import as_value
from funcreg.ranges import check_range, flags, scalars
from funcreg.transform import Transform, public_state
from funcreg.tree import tree_leaves, tree_map, tree_paths
from funcreg.undocumented import is_batched, is_traced, without_levels


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
        self.slope = _along(grad, updates, like)
        self.grad = compute_wide(lambda g: g.clone(), grad)
        self._params, self._updates, self._like = params, updates, like
        self._f = _with_extra(name, value_fn, extra)

    def at(self, step: Tensor) -> tuple[Tensor, Tensor, Updates]:
        """Value, slope along the line, and gradient, a step from the parameters."""
        point = compute(lambda w, u, s: w + s * u, self._params, self._updates, hyper=(step,))
        grad, value = grad_and_value(self._f)(point)
        return as_value("a line search", value, self._like), _along(grad, self._updates, self._like), grad

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


def _along(grad: Updates, updates: Updates, like: Tensor) -> Tensor:
    """The derivative along updates."""

    def product(g: Tensor, u: Tensor) -> Tensor:
        return g.real * u.real + g.imag * u.imag if g.is_complex() else g * u

    return _scalar(total(reduce_leaves(product, grad, updates)), like)


def _scalar(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.device, like.dtype)


def _number(params: Params, value: float) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=scalar_device(params))


def _is_over(done: Tensor) -> bool:
    """Whether a search is known to be over; False where nothing can be read."""
    if is_traced():
        return False
    done = without_levels(done)
    return type(done) is Tensor and done.device.type != "meta" and not is_batched(done) and bool(done)


def _select(condition: Tensor, a: Any, b: Any) -> Any:
    """Of two trees, the first where a condition holds."""
    return tree_map(lambda x, y: torch.where(condition.to(x.device), x, y.to(x.dtype)), a, b)


def _violation(error: Tensor) -> Tensor:
    """By how much a condition is violated, 0 if it holds; NaN is a violation without measure."""
    error = error.clamp(min=0.0)
    return torch.where(error.isnan(), math.inf, error)


def _check_trials(name: str, trials: int) -> None:
    if type(trials) is not int or trials < 1:
        raise ValueError(f"{name} is {trials!r}; expected a whole number of at least 1")


# Backtracking


@public_state
class BacktrackingLinesearchInfo(NamedTuple):
    """How a search went.

    Example:
        >>> scale_by_backtracking_linesearch(5).init(torch.zeros(1)).info.num_linesearch_steps
        tensor(0, dtype=torch.int32)
    """

    num_linesearch_steps: Tensor  # Number of trials, int32.
    decrease_error: Tensor  # By how much the last one lacks in decrease; infinite if there is no value.


@public_state
class ScaleByBacktrackingLinesearchState(NamedTuple):
    """The state of `scale_by_backtracking_linesearch`.

    Example:
        >>> scale_by_backtracking_linesearch(5).init(torch.zeros(1)).learning_rate
        tensor(1., dtype=torch.float64)
    """

    learning_rate: Tensor  # What updates were multiplied by.
    value: Tensor  # Value of the objective there.
    grad: Updates  # Its gradient there, if it is stored, else no leaves.
    info: BacktrackingLinesearchInfo


class _Backtracking(NamedTuple):
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
            step, found, error, trials = _select(over, (step, found, error, trials), (shorter, there, left, trials + 1))
            over = error <= self.atol
            if _is_over(over):
                break
        return step, found, error, trials


@remembered
def scale_by_backtracking_linesearch(
    max_backtracking_steps: int,
    slope_rtol: Scalar = 1e-4,
    decrease_factor: Scalar = 0.8,
    increase_factor: Scalar = 1.5,
    max_learning_rate: Scalar = 1.0,
    atol: Scalar = 0.0,
    rtol: Scalar = 0.0,
    store_grad: bool = False,
) -> Transform:
    r"""Scale updates by the first of ever smaller steps that lowers the objective enough.

    .. math:: f(w + \eta u) \le (1 + \delta) f(w) + \eta c \langle u, \nabla f(w) \rangle + \epsilon

    It comes last in a chain, after a descent such as `sgd(1.0)`, and takes the objective:
    `tx.update(grads, state, params, value=loss, grad=grads, value_fn=f)`. Other arguments of :math:`f` are given to
    `update` by name too.

    Args:
        max_backtracking_steps: Number of times that a step is shortened at most.
        slope_rtol: :math:`c`, from 0 to 1.
        decrease_factor: What a step is multiplied by that is too long, above 0 and below 1.
        increase_factor: What the step of the update before is multiplied by for the first trial, at least 1.
        max_learning_rate: Longest step.
        atol: :math:`\epsilon`, at least 0.
        rtol: :math:`\delta`, at least 0.
        store_grad: Whether the gradient at the last trial is kept, for `value_and_grad_from_state`.

    Raises:
        TypeError: An update came without the objective, or with an argument that it does not take.

    Example:
        >>> f = lambda params: (params["w"] ** 2).sum()
        >>> tx, params = chain(sgd(1.0), scale_by_backtracking_linesearch(10)), {"w": torch.tensor([3.0])}
        >>> grads, loss = torch.func.grad_and_value(f)(params)
        >>> updates, state = tx.update(grads, tx.init(params), params, value=loss, grad=grads, value_fn=f)
        >>> updates, float(state[1].learning_rate)
        ({'w': tensor([-4.8000])}, 0.8)

    References:
        Armijo, *Minimization of functions having Lipschitz continuous first partial derivatives*, 1966.
        Vaswani et al., *Painless stochastic gradient*, 2019.
    """
    _check_trials("max_backtracking_steps", max_backtracking_steps)
    finite_nonnegative(atol=atol, rtol=rtol)
    check_range("slope_rtol", slope_rtol, 0.0, 1.0)
    check_range("decrease_factor", decrease_factor, 0.0, 1.0, open_low=True, open_high=True)
    check_range("increase_factor", increase_factor, 1.0)
    positive(max_learning_rate=max_learning_rate)
    slope_rtol, decrease_factor, increase_factor, max_learning_rate, atol, rtol = scalars(
        slope_rtol=slope_rtol,
        decrease_factor=decrease_factor,
        increase_factor=increase_factor,
        max_learning_rate=max_learning_rate,
        atol=atol,
        rtol=rtol,
    )
    flags(store_grad=store_grad)
    search = _Backtracking(max_backtracking_steps, slope_rtol, decrease_factor, atol, rtol)

    def init(params: Params) -> ScaleByBacktrackingLinesearchState:
        number = lambda x: _number(params, x)
        info = BacktrackingLinesearchInfo(number(0.0).to(torch.int32), number(math.inf))
        grad = tree_map(torch.zeros_like, params) if store_grad else ()
        return ScaleByBacktrackingLinesearchState(number(1.0), number(math.inf), grad, info)

    def update(
        updates: Updates,
        state: ScaleByBacktrackingLinesearchState,
        params: Params,
        *,
        value: Any = None,
        grad: Updates | None = None,
        value_fn: Callable[..., Any] | None = None,
        **extra: Any,
    ) -> tuple[Updates, ScaleByBacktrackingLinesearchState]:
        if not tree_leaves(updates):
            return updates, state
        name, one = "scale_by_backtracking_linesearch", state.learning_rate
        f = Objective(name, params, updates, one, value=value, grad=grad, value_fn=value_fn, extra=extra)
        longest = torch.minimum(increase_factor * one, max_learning_rate + torch.zeros_like(one))
        step, found, error, trials = search.along(f, longest, state.info.num_linesearch_steps)
        step = torch.where(error.isinf(), 0.0, step)
        kept = f.at(step)[2] if store_grad else ()
        info = BacktrackingLinesearchInfo(trials, error)
        after = ScaleByBacktrackingLinesearchState(step, found, kept, info)
        return compute(lambda u, s: s * u, updates, hyper=(step,)), stored(after, state)

    return Transform(init, update, state=ScaleByBacktrackingLinesearchState, stages=["scales"])


# Zoom


@public_state
class ZoomLinesearchInfo(NamedTuple):
    """How a search went. That the curvature is too large may come from a longest step that is too short.

    Example:
        >>> scale_by_zoom_linesearch(5).init(torch.zeros(1)).info.curvature_error
        tensor(inf, dtype=torch.float64)
    """

    num_linesearch_steps: Tensor  # Number of trials, int32.
    decrease_error: Tensor  # By how much the last one lacks in decrease.
    curvature_error: Tensor  # By how much its slope is too steep.


@public_state
class ScaleByZoomLinesearchState(NamedTuple):
    """The state of `scale_by_zoom_linesearch`.

    Example:
        >>> scale_by_zoom_linesearch(5).init(torch.zeros(1)).learning_rate
        tensor(1., dtype=torch.float64)
    """

    learning_rate: Tensor  # What updates were multiplied by.
    value: Tensor  # Value of the objective there.
    grad: Updates  # Its gradient there.
    info: ZoomLinesearchInfo


class _Point(NamedTuple):
    """A point on the line."""

    step: Tensor
    value: Tensor
    slope: Tensor


class _Wolfe(NamedTuple):
    """The conditions of Wolfe, the first of which slopes decide where rounding hides a decrease."""

    slope_rtol: Scalar
    curv_rtol: Scalar
    approx_dec_rtol: Scalar | None

    def decrease_error(self, there: _Point, start: _Point) -> Tensor:
        """By how much a point lacks in decrease."""
        error = there.value - start.value - self.slope_rtol * there.step * start.slope
        if self.approx_dec_rtol is not None:
            close = there.value - start.value - self.approx_dec_rtol * start.value.abs()
            error = torch.minimum(torch.maximum(there.slope - (2 * self.slope_rtol - 1) * start.slope, close), error)
        return _violation(error)

    def curvature_error(self, there: _Point, start: _Point) -> Tensor:
        """By how much the slope at a point is too steep."""
        return _violation(there.slope.abs() - self.curv_rtol * start.slope.abs())


class _Search(NamedTuple):
    """A search for a step, between two trials."""

    trials: Tensor
    bracketed: Tensor  # Whether a good step is known to lie between low and high.
    over: Tensor
    here: _Point  # The last trial.
    grad: Updates  # Its gradient.
    low: _Point  # The better end, which may lie on either side.
    high: _Point
    third: _Point  # Another point for cubic interpolation.
    safe: _Point  # The best step with a sufficient decrease.
    safe_grad: Updates
    decrease_error: Tensor
    curvature_error: Tensor


class _Zoom(NamedTuple):
    """Steps that grow until a good one is bracketed, and then brackets that shrink around it."""

    wolfe: _Wolfe
    most_trials: int
    longest: Scalar
    increase_factor: Scalar
    tol: Scalar
    precision: Scalar

    def along(self, f: Objective, start: _Point, guess: Tensor, slope: Updates, count: Tensor) -> _Search:
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
        s = _Search(none, no, no, start, slope, start, start, start, start, slope, unknown, unknown)
        for _ in range(self.most_trials):
            s = self.trial(f, s, start, guess)
            if _is_over(s.over):
                break
        return s

    def trial(self, f: Objective, s: _Search, start: _Point, guess: Tensor) -> _Search:
        """The search after one more trial, or as it was if it is over."""
        longer = torch.where(s.trials == 0, guess, self.increase_factor * s.here.step)
        limit = self.longest + torch.zeros_like(longer)
        at_limit, longer = longer >= limit, torch.minimum(longer, limit)
        step = torch.where(s.bracketed, _between(s.low, s.high, s.third), longer)
        value, slope, grad = f.at(step)
        there = _Point(step, value, slope)
        lacking, steep = self.wolfe.decrease_error(there, start), self.wolfe.curvature_error(there, start)
        good = torch.maximum(lacking, steep) <= self.tol
        narrow = s.bracketed & ((s.high.step - s.low.step).abs() <= self.precision)

        safer = (lacking <= self.tol) & (~s.bracketed | (value < s.safe.value))
        safe, safe_grad = _select(safer, (there, grad), (s.safe, s.safe_grad))
        between, low, high, third = _bracket(s, there, lacking)
        found = between | good
        trials = s.trials + 1
        stuck = (trials >= self.most_trials) | (narrow & (safe.step > 0))
        done = good | (~s.bracketed & at_limit & ~found)
        failed = stuck & ~done
        retreats = failed & ((safe.step > 0) | lacking.isinf())
        here, grad = _select(retreats, (safe, safe_grad), (there, grad))
        new = _Search(trials, found, done | failed, here, grad, low, high, third, safe, safe_grad, lacking, steep)
        return _select(s.over, s, new)


@remembered
def scale_by_zoom_linesearch(
    max_linesearch_steps: int,
    max_learning_rate: Scalar | None = None,
    tol: Scalar = 0.0,
    increase_factor: Scalar = 2.0,
    slope_rtol: Scalar = 1e-4,
    curv_rtol: Scalar = 0.9,
    approx_dec_rtol: Scalar | None = 1e-6,
    stepsize_precision: Scalar = 1e-5,
    initial_guess_strategy: Literal["one", "keep"] = "keep",
) -> Transform:
    r"""Scale updates by a step that lowers the objective enough, and at which it is flat enough along them.

    .. math:: f(w + \eta u) \le f(w) + \eta c_1 \langle u, \nabla f(w) \rangle, \quad
        |\langle u, \nabla f(w + \eta u) \rangle| \le c_2 |\langle u, \nabla f(w) \rangle|

    These are the strong conditions of Wolfe. Steps grow until a good one is bracketed; then the bracket shrinks around
    minima of cubics through what was seen. If none is found, the best step that lowers the objective enough is taken.

    It comes last in a chain, and takes the objective: `tx.update(grads, state, params, value=loss, grad=grads,
    value_fn=f)`. Other arguments of :math:`f` are given to `update` by name too.

    Args:
        max_linesearch_steps: Number of trials at most, each a value and a gradient.
        max_learning_rate: Longest step; None for no limit.
        tol: By how much the conditions may be violated.
        increase_factor: What steps grow by, above 1.
        slope_rtol: :math:`c_1`, from 0 to 1.
        curv_rtol: :math:`c_2`, from 0 to 1.
        approx_dec_rtol: Share of the value within which its rounding hides a decrease, so that slopes decide; None for
            never.
        stepsize_precision: Width of a bracket at which the search ends if a step lowers the objective enough.
        initial_guess_strategy: First trial: `"one"`, for Newton's steps, or `"keep"`, the step of the update before.

    Raises:
        TypeError: An update came without the objective, or with an argument that it does not take.

    Example:
        >>> f = lambda params: (params["w"] ** 2).sum()
        >>> tx, params = chain(sgd(1.0), scale_by_zoom_linesearch(10)), {"w": torch.tensor([3.0])}
        >>> grads, loss = torch.func.grad_and_value(f)(params)
        >>> tx.update(grads, tx.init(params), params, value=loss, grad=grads, value_fn=f)[0]
        {'w': tensor([-3.])}

    References:
        Nocedal & Wright, *Numerical optimization*, algorithms 3.5 and 3.6, 2006.
        Hager & Zhang, *Algorithm 851: CG_DESCENT, a conjugate gradient method with guaranteed descent*, 2006.
    """
    _check_trials("max_linesearch_steps", max_linesearch_steps)
    finite_nonnegative(tol=tol, stepsize_precision=stepsize_precision)
    check_range("slope_rtol", slope_rtol, 0.0, 1.0)
    check_range("curv_rtol", curv_rtol, 0.0, 1.0)
    check_range("increase_factor", increase_factor, 1.0, open_low=True)
    most = math.inf if max_learning_rate is None else max_learning_rate
    approximate = math.inf if approx_dec_rtol is None else approx_dec_rtol
    positive(max_learning_rate=most)
    finite_nonnegative(approx_dec_rtol=0.0 if approx_dec_rtol is None else approx_dec_rtol)
    scalars(max_learning_rate=most, approx_dec_rtol=approximate)
    tol, increase_factor, slope_rtol, curv_rtol, stepsize_precision = scalars(
        tol=tol,
        increase_factor=increase_factor,
        slope_rtol=slope_rtol,
        curv_rtol=curv_rtol,
        stepsize_precision=stepsize_precision,
    )
    if initial_guess_strategy not in ("one", "keep"):
        raise ValueError(f"initial_guess_strategy is {initial_guess_strategy!r}; expected 'one' or 'keep'")
    wolfe = _Wolfe(slope_rtol, curv_rtol, approx_dec_rtol)
    search = _Zoom(wolfe, max_linesearch_steps, most, increase_factor, tol, stepsize_precision)

    def init(params: Params) -> ScaleByZoomLinesearchState:
        number = lambda x: _number(params, x)
        info = ZoomLinesearchInfo(number(0.0).to(torch.int32), number(math.inf), number(math.inf))
        return ScaleByZoomLinesearchState(number(1.0), number(math.inf), tree_map(torch.zeros_like, params), info)

    def update(
        updates: Updates,
        state: ScaleByZoomLinesearchState,
        params: Params,
        *,
        value: Any = None,
        grad: Updates | None = None,
        value_fn: Callable[..., Any] | None = None,
        **extra: Any,
    ) -> tuple[Updates, ScaleByZoomLinesearchState]:
        if not tree_leaves(updates):
            return updates, state
        name, one = "scale_by_zoom_linesearch", state.learning_rate
        f = Objective(name, params, updates, one, value=value, grad=grad, value_fn=value_fn, extra=extra)
        guess = torch.ones_like(one) if initial_guess_strategy == "one" else one
        start = _Point(torch.zeros_like(one), f.value, f.slope)
        s = search.along(f, start, guess, stored(f.grad, state.grad), state.info.num_linesearch_steps)
        info = ZoomLinesearchInfo(s.trials, s.decrease_error, s.curvature_error)
        after = ScaleByZoomLinesearchState(s.here.step, s.here.value, s.grad, info)
        scaled = compute(lambda u, c: c * u, updates, hyper=(s.here.step,))
        return scaled, tree_map(lambda x, kept: x.to(kept.dtype).clone(), after, state)

    return Transform(init, update, state=ScaleByZoomLinesearchState, stages=["scales"])


def _bracket(s: _Search, there: _Point, lacking: Tensor) -> tuple[Tensor, _Point, _Point, _Point]:
    """Whether a good step is known to lie in a bracket once a point is known, its ends, and another point."""
    # Where the objective is above its best so far, or rises again, a good step lies before.
    before = (there.value >= s.here.value) & (s.trials > 0)
    beyond = (lacking > 0) | torch.where(s.bracketed, there.value >= s.low.value, before)
    rising = ~beyond & torch.where(s.bracketed, there.slope * (s.high.step - s.low.step) >= 0, there.slope >= 0)
    low = _select(torch.where(s.bracketed, ~beyond, rising), there, _select(s.bracketed, s.low, s.here))
    high = _select(
        s.bracketed,
        _select(beyond, there, _select(rising, s.low, s.high)),
        _select(rising, s.here, there),
    )
    third = _select(s.bracketed, _select(beyond | rising, s.high, s.low), low)
    return s.bracketed | beyond | rising, low, high, third


def _between(low: _Point, high: _Point, third: _Point) -> Tensor:
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


def _cubic_minimum(a: _Point, b: _Point, c: _Point) -> tuple[Tensor, Tensor]:
    """The minimum of the cubic through three points that has the slope of the first there, and whether it has one."""
    to_b, to_c = b.step - a.step, c.step - a.step
    above_b, above_c = b.value - a.value - a.slope * to_b, c.value - a.value - a.slope * to_c
    scale = (to_b * to_c) ** 2 * (to_b - to_c)
    third, distinct = _quotient(to_c**2 * above_b - to_b**2 * above_c, scale)
    second, _ = _quotient(to_b**3 * above_c - to_c**3 * above_b, scale)
    radicand = second * second - 3 * third * a.slope
    way, curved = _quotient(-second + safe_sqrt(radicand.clamp(min=0)), 3 * third)
    return a.step + way, distinct & curved & (radicand >= 0)


def _parabola_minimum(a: _Point, b: _Point) -> tuple[Tensor, Tensor]:
    """The minimum of the parabola through two points that has the slope of the first there, and whether it has one."""
    width = b.step - a.step
    curvature, distinct = _quotient(b.value - a.value - a.slope * width, width**2)
    way, curved = _quotient(a.slope, 2 * curvature)
    return a.step - way, distinct & curved


# Values and gradients that a search has seen


def value_and_grad_from_state(value_fn: Callable[..., Any]) -> Callable[..., tuple[Tensor, Updates]]:
    r"""A function for the value and the gradient of an objective that takes both from a line search's state.

    The last trial of a search is where the next update begins. Only before the first update, and where a value is not
    finite, they are computed; where no number can be read, in an ensemble or compiled, and where the search sees other
    leaves, through a mask or in `flatten`, they always are.

    Args:
        value_fn: The objective, from parameters, and whatever else, to a scalar that does not change between steps.

    Raises:
        ValueError: The state has no value and gradient of a line search.

    Returns:
        A function of parameters, further arguments, and `state=`, to the value and the gradient.

    Example:
        >>> f = lambda params: (params["w"] ** 2).sum()
        >>> tx, params = lbfgs(), {"w": torch.tensor([3.0])}
        >>> state, value_and_grad = tx.init(params), value_and_grad_from_state(f)
        >>> for _ in range(3):
        ...     loss, grads = value_and_grad(params, state=state)
        ...     updates, state = tx.update(grads, state, params, value=loss, grad=grads, value_fn=f)
        ...     params = apply_updates(params, updates)
        >>> params
        {'w': tensor([0.])}
    """
    if not callable(value_fn):
        raise TypeError(f"value_and_grad_from_state got {value_fn!r}; expected a function of the parameters")

    def value_and_grad(params: Params, *args: Any, state: State, **kwargs: Any) -> tuple[Tensor, Updates]:
        found = _searches(state)
        if len(found) != 1:
            raise ValueError(
                f"the state has {len(found)} line searches that store a gradient; expected one, as in that of lbfgs() "
                "or scale_by_backtracking_linesearch(..., store_grad=True)"
            )
        if not _is_like(found[0].grad, params):
            grad, value = grad_and_value(value_fn)(params, *args, **kwargs)
            return value, grad
        kept = found[0].value, tree_map(torch.clone, found[0].grad)
        known = found[0].value.isfinite()
        if _is_over(known):
            return kept
        grad, value = grad_and_value(value_fn)(params, *args, **kwargs)
        return _select(known, kept, (value.to(kept[0].dtype), grad))

    return value_and_grad


def _is_like(grad: Updates, params: Params) -> bool:
    shapes = [[leaf.shape for leaf in tree_leaves(tree)] for tree in (grad, params)]
    return tree_paths(grad) == tree_paths(params) and shapes[0] == shapes[1]


def _searches(state: State) -> list[Any]:
    """The states of line searches inside a state."""
    if isinstance(state, (ScaleByZoomLinesearchState, ScaleByBacktrackingLinesearchState)):
        return [state] if tree_leaves(state.grad) else []
    inside = state.values() if isinstance(state, dict) else state if isinstance(state, (tuple, list)) else ()
    return [found for child in inside for found in _searches(child)]
