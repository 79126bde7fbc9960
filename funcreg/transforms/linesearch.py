"""Line searches: step sizes that lower an objective enough, with optax's names and numbers.

Each tries so many steps at most, and evaluates the objective at each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value

from funcreg.core._typing import Params, Scalar, State, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute, scalar_device
from funcreg.core.ranges import check_range, flags, scalars, whole_number
from funcreg.core.tree import tree_leaves, tree_map, tree_paths
from funcreg.transforms.factory_checks import finite_nonnegative, positive
from funcreg.transforms.moments import stored
from funcreg.transforms.searches import Backtracking, Objective, Point, Wolfe, Zoom, choose, is_over
from funcreg.transforms.transform import Transform, public_state


def _number(params: Params, value: float) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=scalar_device(params))


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
    max_backtracking_steps = whole_number("max_backtracking_steps", max_backtracking_steps)
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
    search = Backtracking(max_backtracking_steps, slope_rtol, decrease_factor, atol, rtol)

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
    max_linesearch_steps = whole_number("max_linesearch_steps", max_linesearch_steps)
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
    wolfe = Wolfe(slope_rtol, curv_rtol, approx_dec_rtol)
    search = Zoom(wolfe, max_linesearch_steps, most, increase_factor, tol, stepsize_precision)

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
        start = Point(torch.zeros_like(one), f.value, f.slope)
        s = search.along(f, start, guess, stored(f.grad, state.grad), state.info.num_linesearch_steps)
        info = ZoomLinesearchInfo(s.trials, s.decrease_error, s.curvature_error)
        after = ScaleByZoomLinesearchState(s.here.step, s.here.value, s.grad, info)
        scaled = compute(lambda u, c: c * u, updates, hyper=(s.here.step,))
        return scaled, tree_map(lambda x, kept: x.to(kept.dtype).clone(), after, state)

    return Transform(init, update, state=ScaleByZoomLinesearchState, stages=["scales"])


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
        if is_over(known):
            return kept
        grad, value = grad_and_value(value_fn)(params, *args, **kwargs)
        return choose(known, kept, (value.to(kept[0].dtype), grad))

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
