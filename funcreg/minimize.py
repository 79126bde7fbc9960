"""Minima of a smooth loss plus a penalty: no learning rate, a certificate, and derivatives of the solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp, vmap

from funcreg._typing import Hyper, Mask, Params
from funcreg.checks import check_params
from funcreg.coupled import check_groups_are_whole
from funcreg.graphs import Graphs, Same, key_of, like, with_more
from funcreg.inputs import RANDOM, as_tensors, check_call, check_names, explained
from funcreg.leafwise import wide
from funcreg.masks import listed, mask_leaves
from funcreg.notices import warn_user
from funcreg.penalty import Penalty, Sum
from funcreg.quadratic import (
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
from funcreg.ranges import check_range, number
from funcreg.regularizing import check_penalty, check_strength
from funcreg.sharding import check_whole
from funcreg.summaries import solution_line, solution_text
from funcreg.transform import check_fit, check_selection, public_state
from funcreg.tree import structure, tree_leaves, tree_map, tree_paths
from funcreg.undocumented import forward_depth, is_batched, is_compiling, without_levels
from funcreg.vectors import Flat, flat_problem

#: What others call what is called otherwise here.
_ELSEWHERE = {
    "strengths": "it solves for one strength=; regularization_path solves for many, and vmap maps it over them",
    "data": "what the loss takes after params are its args=",
    **dict.fromkeys(("max_iter", "maxiter", "n_iter"), "the greatest number of steps is max_steps="),
}
#: Residuals that a dtype reaches where gradients are not far from 1.
_REACHED = {torch.float64: 1e-8, torch.float32: 1e-5}
#: Objectives of which a new one has to be below the greatest.
_HISTORY = 10
#: Steps after which a Newton step is tried; twice as many after each that was of no help.
_EVERY = 10
#: Shares of the way to the minimum of a model, or of a Newton step, that are tried.
_SHARES = (1.0, 0.5, 0.25, 0.0625)
#: Entries up to which Hessians and Jacobians are matrices; beyond that, equations are solved by products with vectors.
_DENSE = 512
#: Entries up to which a Hessian, and a Newton step on a model, cost little more than a proximal step.
SMALL = 64
#: Entries of a model for each that is not zero.
_GROWTH = 3
#: Most steps on a model.
_INNER = 200
#: Steps without a better residual or objective after which rounding is held to be all that moves.
_PATIENCE = 300


@public_state
class Solution(NamedTuple):
    """What `minimize` found.

    Example:
        >>> found = minimize(lambda w: (w - 1).square().sum() / 2, torch.zeros(2), l1, strength=0.25)
        >>> found
        Solution(converged in 1 step, residual 0.0e+00, 2 of 2 entries not zero)
        >>> found.params, found.converged
        (tensor([0.7500, 0.7500]), tensor(True))
    """

    params: Params  # With exact zeros.
    residual: Tensor  # Their `kkt_residual`; where a penalty is not convex also the move of a step, see `minimize`.
    steps: Tensor  # Number of proximal steps on the loss and on models of it, int64.
    converged: Tensor  # Whether the residual is at most the tolerance.

    def __repr__(self) -> str:
        return solution_line(self)

    def __str__(self) -> str:
        return solution_text(self)


def minimize(
    loss: Callable[..., Tensor],
    params: Params,
    penalty: Penalty,
    *hyper: Hyper,
    strength: Hyper = 1.0,
    args: tuple[Any, ...] = (),
    mask: Mask | None = None,
    tol: float | None = None,
    max_steps: int = 10_000,
    compile: bool | str | Callable[..., Any] = False,
    **options: Any,
) -> Solution:
    r"""Minimize :math:`f(w) + \lambda g(w)`: proximal gradient steps, and minima of quadratic models of the loss.

    Where all entries, or those that are not zero, are few enough for a Hessian (512), the descent goes to the minimum
    of a model, :math:`f` to second order plus :math:`\lambda g`, which is found by Newton steps on the fixed point of
    the proximal step: for squared errors that is the solution. In between and else, proximal gradient steps have the
    length of Barzilai and Borwein in the metric of the diagonal of the Hessian (if the penalty has a rule in a metric)
    and are taken back where the objective grows. The end is a certificate: `kkt_residual` of at most `tol`. Where the
    loss or the penalty is not convex this is a stationary point, and it depends on `params`.

    For a penalty that is not convex that is not enough: with `l0` or `l_half`, whose slope at zero is infinite, zeros
    are stationary whatever the loss. So a solution is also a fixed point of the proximal step, of the length at which
    the descent ends: `residual` is the greater of `kkt_residual` and of how far that step moves, divided by its length,
    which has the units of the gradient. Where there is no rule for `kkt_residual`, as for `schatten`, it is the latter.

    The solution has derivatives in `strength`, the hyperparameters, `args` and tensors in a penalty, as in
    `c * l1 + d * group_lasso.given()`, by the implicit function theorem: for `torch.func.grad`, `jvp` and `backward`.
    Tensors that the loss, or a user's own rule, holds without getting them as `args` are constants.
    Under `vmap` (over strengths, folds, data) members that are done stop moving. In a function that `torch.compile`
    compiles it is left as it is, with a break in the graph: when to stop depends on numbers.

    Args:
        loss: `loss(params, *args)`, a scalar with a first and second derivative.
        params: Where to begin.
        penalty: A penalty with a proximal operator, or a constraint.
        hyper: Its hyperparameters.
        strength: :math:`\lambda`: number of at least 0, tensor, or a tree of them like the parameters.
        args: What else the loss takes: trees of tensors. Arrays of numpy or pandas become tensors, in the dtype of
            `params`.
        mask: Leaves on which the penalty acts; the others, such as an intercept, are minimized over freely.
        tol: Greatest residual of a solution, at least 0, in units of the gradient. By default 1e-8 in float64,
            1e-5 in float32 and 1e-2 in 16 bits, which are in reach where gradients are not far from 1.
        max_steps: Number of steps, on the loss and on its models, after which to give up, at least 0; `converged` is
            then False.
        compile: Whether to compile steps, for calls to come with other numbers in tensors of the same shapes; or a
            backend of `torch.compile`. `"eager"` records steps, and runs them without a compiler. What the loss does
            in Python is then done anew only where it computes something else; a loss of which there is no graph is
            minimized as ever, and a warning says why.
        options: Static options of the penalty, such as `dim`.

    Raises:
        TypeError: `compile` is neither a bool nor a name or function of a backend.
        ValueError: A number is out of range, or the loss is no scalar.

    Example:
        The lasso, and the derivative of its solution in the strength:

        >>> x, y = torch.eye(3, dtype=torch.float64), torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)
        >>> def loss(w, x, y):
        ...     return (x @ w - y).square().sum() / 2
        >>> def lasso(strength):
        ...     return minimize(loss, torch.zeros_like(y), l1, strength=strength, args=(x, y)).params
        >>> lasso(torch.tensor(1.0))
        tensor([ 2., -1.,  0.], dtype=torch.float64)
        >>> torch.func.jacrev(lasso)(torch.tensor(1.0, dtype=torch.float64))
        tensor([-1.,  1.,  0.], dtype=torch.float64)

    References:
        Wright, Nowak & Figueiredo, *Sparse reconstruction by separable approximation*, 2009.
        Lee, Sun & Saunders, *Proximal Newton-type methods for minimizing composite functions*, 2014.
        Themelis, Ahookhosh & Patrinos, *On the acceleration of forward-backward splitting via an inexact Newton
        method*, 2019.
        Bertrand et al., *Implicit differentiation for fast hyperparameter selection in non-smooth convex learning*,
        2022.
    """
    check_names("minimize", options, _ELSEWHERE)
    problem = Problem(explained(loss), penalty, hyper, mask, tol, max_steps, options, compile)
    problem.check(params, strength, args)
    check_call(loss, args)
    return problem.solve(params, strength, as_tensors(args, "args", params))


@dataclass(frozen=True)
class Problem:
    """A loss and a penalty, and when they count as minimized."""

    loss: Callable[..., Tensor]
    penalty: Penalty
    hyper: tuple[Hyper, ...]
    mask: Mask | None
    tol: float | None
    max_steps: int
    options: dict[str, Any]
    compile: bool | str | Callable[..., Any]
    quadratic: bool = False  # Whether the loss seems to be, so that it has one Hessian.

    def check(self, params: Params, strength: Hyper, args: tuple[Any, ...]) -> None:
        """Raise an error, before any work, for what is no problem."""
        check_penalty(self.penalty, self.hyper, self.options)
        check_strength(self.penalty, strength)
        check_selection(self.mask)
        check_params(params)
        check_whole("minimize", tree_paths(params), tree_leaves(params))
        check_fit(params, self.mask, strength, *self.hyper)
        check_groups_are_whole(self.penalty, self.mask, params)
        self._check_tolerance(params)
        steps = number(self.max_steps)
        if type(steps) is not int or steps < 0:
            raise ValueError(f"max_steps is {self.max_steps!r}; expected a whole number of at least 0")
        for path, w in zip(tree_paths(params), tree_leaves(params), strict=True):
            if w.is_complex():
                raise TypeError(
                    f"leaf '{path}' is {w.dtype}; expected real parameters. Give torch.view_as_real(w) to a "
                    "loss that reads torch.view_as_complex(w); their l1 is group_lasso with dim=-1."
                )
        if not isinstance(args, tuple):
            raise TypeError(f"args is a {type(args).__name__}; expected a tuple of what the loss takes after params")
        if not (isinstance(self.compile, (bool, str)) or callable(self.compile)):
            raise TypeError(f"compile is {self.compile!r}; expected True, False or a backend of torch.compile")

    def _check_tolerance(self, params: Params) -> None:
        if self.tol is None:
            return
        check_range("tol", self.tol, 0.0)
        kind = _coarsest(params)
        if 0 < self.tol < 8 * torch.finfo(kind).eps:
            warn_user(
                f"tol is {self.tol:g}, and params are {kind}, in which gradients of size 1 are known to "
                f"{torch.finfo(kind).eps:.0e}: residuals below that are chance. By default tol is "
                f"{_REACHED.get(kind, 1e-2):g} here; for less, give params and args in float64.",
            )

    def tolerance(self, params: Params) -> float:
        """The greatest residual of a solution: that which was given, or what the dtype reaches."""
        return _REACHED.get(_coarsest(params), 1e-2) if self.tol is None else self.tol

    def solve(self, params: Params, strength: Hyper, args: tuple[Any, ...]) -> Solution:
        """The solution."""
        # When to stop depends on numbers, which no graph can hold.
        solved = torch.compiler.disable(self._solve) if is_compiling() else self._solve
        return solved(params, strength, args)  # pyright: ignore[reportCallIssue]  # Torch says it takes a function.

    @torch.inference_mode(False)  # Inside of it, torch 2.9 takes every derivative for 0.
    def _solve(self, params: Params, strength: Hyper, args: tuple[Any, ...]) -> Solution:
        start = tree_map(lambda w: w.detach(), params)  # The solution has no derivative in the place of the start.
        given, graphs = (start, strength, self.hyper, args), None
        if self.compile:
            given = (start, *tree_map(lambda x: _as_tensor(x, start), (strength, self.hyper)), args)
            graphs = self._graphs(given)
        flat, tensors = flat_problem(
            self.loss,
            self.penalty,
            given,
            self.mask,
            self.options,
            self.tolerance(params),
            self.max_steps,
        )
        flat = replace(flat, graphs=graphs, quadratic=self.quadratic, penalty_is_known=_is_known(self.penalty))
        if forward_depth() > 1:
            raise NotImplementedError(
                "a solution has no forward derivative of a forward derivative, as jacfwd(jacfwd(f)) takes; expected "
                "one of them in reverse: torch.func.hessian(f), or jacfwd(jacrev(f))"
            )
        try:
            x, residual, steps, converged, *_ = _Solve.apply(flat, *tensors)
        except RuntimeError as error:
            if "unsupported for Sparse" not in str(error):
                raise
            raise TypeError(
                "the loss multiplies a sparse matrix by a matrix, of which torch has no map over members and "
                "directions; expected products with vectors, torch.stack([x @ column for column in w.unbind(1)], 1), "
                "or a dense matrix, x.to_dense()"
            ) from error
        return Solution(flat.tree(x), residual, steps, converged)

    @torch.inference_mode(False)
    def landing(self, params: Params, args: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
        """From a strength to where the first proximal step of the descent lands, as a vector of all parameters."""
        start, one = tree_map(lambda w: w.detach(), params), torch.ones((), device=tree_leaves(params)[0].device)
        given = (start, one, self.hyper, args)
        flat, tensors = flat_problem(
            self.loss, self.penalty, given, self.mask, self.options, self.tolerance(params), self.max_steps
        )
        s = _start(flat, tensors)[0]

        def land(strength: Tensor) -> Tensor:
            known = [strength if t is one else t for t in tensors]
            return _proximal_step(flat, s.x, s.slope, s.rate, s.metric, known)

        return land

    def _graphs(self, given: tuple[Params, Hyper, Any, tuple[Any, ...]]) -> Graphs:
        """Graphs of what computes alike for all numbers in the tensors of a problem."""
        leaves, spec = structure(given)
        numbers, rest = [x for x in leaves if isinstance(x, Tensor)], [x for x in leaves if not isinstance(x, Tensor)]
        mask = None if self.mask is None else tuple(mask_leaves(self.mask, given[0]))
        key = (
            spec,
            tuple(map(like, numbers)),
            key_of([rest, self.options]),
            _key_of_penalty(self.penalty),
            mask,
            self.tolerance(given[0]),
        )
        return Graphs(key, "inductor" if self.compile is True else self.compile, "minimize")


def _as_tensor(x: Any, params: Params) -> Any:
    """A number as a tensor, so that graphs serve for other numbers."""
    like = tree_leaves(params)
    return torch.tensor(x, dtype=wide(like[0].dtype), device=like[0].device) if isinstance(x, float) and like else x


def _key_of_penalty(penalty: Penalty) -> Any:
    """What tells a penalty from others; sums of the same terms are the same."""
    if not isinstance(penalty, Sum) or penalty.structure.parts is None:
        return Same(penalty)
    return tuple(
        (_key_of_penalty(term.penalty), key_of([term.factors, term.hyper, term.options]), Same(term.mask))
        for term in penalty.structure.parts()
    )


def _is_known(penalty: Penalty) -> bool:
    """Whether it is one of the library's own, or a sum of them: nothing that it computes changes between calls."""
    if isinstance(penalty, Sum) and penalty.structure.parts is not None:
        return all([_is_known(term.penalty) for term in penalty.structure.parts()])
    return penalty.__module__.startswith("funcreg.") and penalty.made_by is None


def _coarsest(params: Params) -> torch.dtype:
    """The dtype with the fewest digits."""
    return max([w.dtype for w in tree_leaves(params)], key=lambda kind: torch.finfo(kind).eps, default=torch.float64)


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
    return 1 <= x.shape[-1] <= _DENSE


def _is_small(x: Tensor) -> bool:
    return 1 <= x.shape[-1] <= SMALL


def _is_eager(flat: Flat, x: Tensor) -> bool:
    """Whether the descent begins with a model.

    Where entries are many and the penalty is no convex sum over them, steps find those that matter at less cost.
    """
    return _is_small(x) or (flat.separable and flat.convex)


def _start(flat: Flat, tensors: Any) -> tuple[_State, Tensor, Tensor, Tensor]:
    """The state before the first step, the Hessian, if it is a small matrix, and whether the loss is flat, or drawn."""
    x = flat.begin(tensors)
    slope, value = grad_and_value(flat.read)(x, tensors)
    once, again = flat.read(x, tensors), flat.read(x, tensors)
    is_drawn = (once - again).abs() > torch.finfo(value.dtype).eps ** 0.5 * value.abs()
    hessian, metric = x, torch.ones_like(x)
    if _is_small(x):
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


def _proximal_step(flat: Flat, x: Tensor, slope: Tensor, rate: Tensor, metric: Tensor, tensors: Any) -> Tensor:
    return flat.land(x - slope / (rate * metric), 1 / rate, metric, tensors)


def _left(flat: Flat, x: Tensor, slope: Tensor, rate: Tensor, metric: Tensor, tensors: Any) -> Tensor:
    """The residual at x; of a penalty that is not convex no less than the move of a proximal step, as a gradient."""
    if flat.convex or not x.shape[-1]:
        return flat.residual(x, slope, tensors)
    move = (_proximal_step(flat, x, slope, rate, metric, tensors) - x).abs() - 4 * torch.finfo(x.dtype).eps * x.abs()
    step = (rate * metric * move.clamp(min=0.0)).amax()
    # Without a rule the residual is the move of a step of length 1, which may go elsewhere from any point.
    return torch.maximum(flat.residual(x, slope, tensors), step) if flat.has_rule else step


def _landing_times(flat: Flat, x: Tensor, rate: Tensor, metric: Tensor, tensors: Any) -> Callable[[Tensor], Tensor]:
    """The product of a vector and the Jacobian of the proximal step from x."""
    point = x - grad_and_value(flat.read)(x, tensors)[0] / (rate * metric)
    # What pulls back is linear: its own pull-back pushes forward. The forward mode of torch would do it at once, but
    # its first use compiles with what is deprecated, and says so.
    pull = vjp(lambda z: flat.land(z, 1 / rate, metric, tensors), point)[1]
    push = vjp(lambda v: pull(v)[0], torch.zeros_like(point))[1]
    return lambda v: push(v - _hessian_times(flat, x, tensors, v) / (rate * metric))[0]


def _matrix(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    r""":math:`I - J`, from products of vectors and :math:`J`."""
    one = torch.eye(len(x), dtype=x.dtype, device=x.device)
    return one - vmap(product)(one).T


def _step(flat: Flat, tensors: Any, s: _State) -> _State:
    """A proximal gradient step."""
    z = _proximal_step(flat, s.x, s.slope, s.rate, s.metric, tensors)
    slope, value = grad_and_value(flat.read)(z, tensors)
    objective = torch.where(slope.isfinite().all(), value + flat.value(z, tensors), torch.nan)
    taken, rate, length = judged(s, s.metric, z, slope, objective)
    return _moved(flat, tensors, s, taken, z, slope, objective, rate, length == 0)


def _newton(flat: Flat, tensors: Any, s: _State) -> _State:
    """A Newton step on the fixed point of the proximal step."""

    def land(x: Tensor) -> Tensor:
        return _proximal_step(flat, x, grad_and_value(flat.read)(x, tensors)[0], s.rate, s.metric, tensors)

    product = _landing_times(flat, s.x, s.rate, s.metric, tensors)
    step = _gmres(lambda v: v - product(v), land(s.x) - s.x, 30)
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
        slope, value = grad_and_value(flat.read)(z, tensors)
        objective = torch.where(slope.isfinite().all(), value + flat.value(z, tensors), torch.nan)
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


def _descend(flat: Flat, tensors: Any) -> tuple[Tensor, ...]:
    """The solution, its residual, steps, whether it has converged, and the step and metric for its derivatives."""
    if flat.graphs is not None:
        flat, tensors = _with_graphs(flat, flat.graphs, tensors)
    start = flat.over_members(lambda tensors: _start(flat, tensors), "start")
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
    hessians = _Hessians(flat, tensors, hessian if _is_small(s.x) else None)
    n, wait, eager = 0, _EVERY, _is_eager(flat, s.x)
    # A Hessian costs as much as so many steps as it has rows, or somewhat less.
    then = 0 if eager else max(wait, s.x.shape[-1] // 8 if _is_dense(s.x) else 0)
    while n < flat.max_steps and not bool(s.done.all()):
        if n >= then:
            before = s.residual
            s, steps, size = _jumped(flat, tensors, s, hessians, flat.max_steps - n, n > 0)
            n = n + steps
            helped = bool((s.residual < before / 2).any())
            wait = _EVERY if helped else 2 * wait
            then = n if helped and eager else n + max(wait, size // 8)
            if then == n:
                continue
        s, n = _State(*proximal(tensors, s)), n + 1
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


def _jumped(
    flat: Flat, tensors: Any, s: _State, hessians: _Hessians, budget: int, moved: bool
) -> tuple[_State, int, int]:
    """The state after a step to the minimum of a model, how many steps that took, and the size of its Hessian."""
    inside = None
    if not _is_small(s.x):
        inside = _working_set(flat, tensors, s)
        if not 1 <= inside.shape[-1] <= _DENSE:
            tried = flat.over_members(lambda tensors, s: _newton(flat, tensors, _State(*s)), "newton")
            return _State(*tried(tensors, s)), 0, 0
    x, slope = (_entries(v, inside) for v in (s.x, s.slope))
    curvature = convex(hessians.at(x, inside, moved), lambda: _entries(_moves(flat, tensors, s) > 0, inside))
    quadratic, descent, steps = _model_minimum(flat, tensors, s.done, (x, slope, curvature), inside, budget)
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
    return after, max(steps, 1), x.shape[-1]


def _moves(flat: Flat, tensors: Any, s: _State) -> Tensor:
    """How far a proximal step takes zeros; infinite for entries that are not zero."""
    land = flat.over_members(
        lambda tensors, x, slope, rate, metric: _proximal_step(flat, x, slope, rate, metric, tensors), "landed"
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


def _entries(x: Tensor, places: Tensor | None) -> Tensor:
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
        self._flat, self._tensors, self._start = flat, tensors, start
        self._known: tuple[Tensor, Tensor] | None = None  # Places, and the Hessian of those.
        self.same = flat.quadratic  # Whether they seem to be the same everywhere.

    def at(self, x: Tensor, inside: Tensor | None, moved: bool) -> Tensor:
        """Hessians at the entries x in some places, or all; x has moved or is where the descent begins."""
        flat, differs = self._flat, moved and not self.same
        if inside is None:
            if self._start is not None and not differs:
                return self._start
            return flat.over_members(lambda tensors, x: _hessian(flat, x, tensors), "hessian")(self._tensors, x)
        union = inside.unique()
        if differs or len(union) > _DENSE:
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
    there: tuple[Tensor, Tensor, Tensor],
    inside: Tensor | None,
    budget: int,
) -> tuple[Quadratic, Descent, int]:
    """Models of the loss at entries in some places, from the slope and the Hessian there, and descents to minima."""
    tol, size = flat.tol / 4, there[0].shape[-1]
    places = () if inside is None else (inside,)

    def within(tensors: Any, places: tuple[Tensor, ...]) -> tuple[Flat, Rules]:
        part = flat.narrowed(*places) if places else flat
        land = lambda x, step, metric: part.land(x, step, metric, tensors)
        return part, Rules(land, lambda x: part.value(x, tensors), flat.separable, flat.convex)

    def model(tensors: Any, x: Tensor, slope: Tensor, hessian: Tensor, *places: Tensor) -> Any:
        part, rules = within(tensors, places)
        metric = diagonal_metric(hessian) if flat.in_metric else torch.ones_like(x)
        rate = _first_rate(part, tensors, hessian, metric)
        rate = _in_reach(torch.where((rate > 0) & rate.isfinite(), rate, 1.0), x, slope, metric)
        made = Quadratic(x, slope, hessian, metric, rate)
        return made, begin(made, rules)

    stepped, jumped = (
        flat.over_members(
            lambda tensors, q, d, *places, f=f: f(Quadratic(*q), within(tensors, places)[1], tol, Descent(*d)),
            (name, size),
        )
        for f, name in ((step, "step of a model"), (newton, "newton of a model"))
    )
    quadratic, descent = flat.over_members(model, ("model", size))(tensors, *there, *places)
    # The Jacobian of a penalty that is no sum over entries is a matrix, too.
    every = 1 if flat.separable or _is_small(there[0]) else _EVERY // 2
    descent, steps, helped = Descent(*descent), 0, False
    while steps < min(budget, _INNER) and not bool((descent.done | given_up).all()):
        descent, steps = Descent(*stepped(tensors, quadratic, descent, *places)), steps + 1
        if helped or steps % every == 0:
            before, descent = descent.error, Descent(*jumped(tensors, quadratic, descent, *places))
            helped = bool((descent.error < before / 2).any())
    return Quadratic(*quadratic), descent, steps


# Linear equations of a fixed point


def _gmres(product: Callable[[Tensor], Tensor], b: Tensor, count: int) -> Tensor:
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


# Derivatives


class _Solve(torch.autograd.Function):
    """The solution as a function of all tensors of the flat."""

    @staticmethod
    def forward(flat: Flat, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _descend(flat, tensors)

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
        return _Solve.apply(flat, *moved), (0,) * 6


def _landing(
    flat: Flat, x: Tensor, rate: Tensor, metric: Tensor, tensors: Any, sparse: bool = True
) -> tuple[Any, Any, list[int]]:
    """The proximal step from x as a function of the vector, and of the real tensors, and which these are."""
    which = [i for i, t in enumerate(tensors) if t.is_floating_point() and (sparse or t.layout is torch.strided)]

    def land(x: Tensor, tensors: Any = tensors) -> Tensor:
        return _proximal_step(flat, x, grad_and_value(flat.read)(x, tensors)[0], rate, metric, tensors)

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
    if not flat.separable or _is_small(x) or is_batched(without_levels(x)):
        return ()

    def slopes(tensors: Any, x: Tensor, rate: Tensor, metric: Tensor) -> Tensor:
        point = x - grad_and_value(flat.read)(x, tensors)[0] / (rate * metric)
        return vjp(lambda z: flat.land(z, 1 / rate, metric, tensors), point)[1](torch.ones_like(x))[0]

    moving = (flat.over_members(slopes)(tensors, x, rate, metric) != 0) | (x != 0)
    count = int(moving.sum(-1).amax())
    return (moving.byte().argsort(dim=-1, descending=True)[..., :count],) if 1 <= count <= _DENSE else ()


def _pull(
    flat: Flat, tensors: Any, x: Tensor, rate: Tensor, metric: Tensor, slope: Tensor, inside: Tensor | None = None
) -> list[Tensor]:
    """Slopes in the tensors, from a slope in the solution."""
    land, of_real, which = _landing(flat, x, rate, metric, tensors)
    back = vjp(land, x)[1]
    if inside is None and len(x) > _DENSE:
        along = _gmres(lambda v: v - back(v)[0], slope, 200)
    else:
        matrix = _matrix_of_move(flat, tensors, x, rate, metric, inside)
        along = torch.linalg.pinv(matrix.T, rtol=1e-12) @ _entries(slope, inside)
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
    product = _landing_times(flat, x, rate, metric, tensors)
    if inside is None and len(x) > _DENSE:
        return _gmres(lambda v: v - product(v), moved, 200)
    solve = torch.linalg.pinv(_matrix_of_move(flat, tensors, x, rate, metric, inside), rtol=1e-12)
    if inside is None:
        return solve @ moved
    others = moved.index_fill(0, inside, 0.0)  # They move as the step says, and move those inside.
    return others.index_copy(0, inside, solve @ _entries(moved + product(others), inside))


def _matrix_of_move(
    flat: Flat, tensors: Any, x: Tensor, rate: Tensor, metric: Tensor, inside: Tensor | None = None
) -> Tensor:
    r""":math:`I - J` of the proximal step, of the entries in some places."""
    part = flat if inside is None else flat.narrowed(inside)
    x, metric = _entries(x, inside), _entries(metric, inside)
    return _matrix(_landing_times(part, x, rate, metric, tensors), x)
