"""Minima of a smooth loss plus a penalty: no learning rate, a certificate, and derivatives of the solution."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, jvp, vjp, vmap

from funcreg._typing import Hyper, Mask, Params
from funcreg.certificates import kkt_residual
from funcreg.coupled import check_groups_are_whole
from funcreg.penalty import Penalty
from funcreg.ranges import check_range
from funcreg.regularizing import check_penalty
from funcreg.sharding import check_whole
from funcreg.transform import check_fit, check_selection, nonnegative, public_state
from funcreg.tree import check_params, flatten, product, tree_leaves, tree_paths, wide

#: Objectives of which a new one has to be below the greatest.
_HISTORY = 10
#: Steps after which a Newton step is tried.
_EVERY = 10
#: Shares of a Newton step that are tried.
_SHARES = (1.0, 0.5, 0.25, 0.0625)
#: Entries up to which Jacobians are matrices; beyond that, equations are solved by products with vectors.
_DENSE = 512
#: Steps without a better residual or objective after which rounding is held to be all that moves.
_PATIENCE = 300


@public_state
class Solution(NamedTuple):
    """What `minimize` found.

    Example:
        >>> found = minimize(lambda w: (w - 1).square().sum() / 2, torch.zeros(2), l1, strength=0.25)
        >>> found.params, found.converged
        (tensor([0.7500, 0.7500]), tensor(True))
    """

    params: Params  # With exact zeros.
    residual: Tensor  # Their `kkt_residual`.
    steps: Tensor  # Number of proximal gradient steps, int64.
    converged: Tensor  # Whether the residual is at most the tolerance.


def minimize(
    loss: Callable[..., Tensor],
    params: Params,
    penalty: Penalty,
    *hyper: Hyper,
    strength: Hyper = 1.0,
    args: tuple[Any, ...] = (),
    mask: Mask | None = None,
    tol: float = 1e-8,
    max_steps: int = 10_000,
    **options: Any,
) -> Solution:
    r"""Minimize :math:`f(w) + \lambda g(w)`: proximal gradient steps, then Newton steps on what they leave nonzero.

    Steps have the length of Barzilai and Borwein in the metric of the diagonal of the Hessian (if the penalty has a
    rule in a metric) and are taken back where the objective grows; every tenth is followed by a Newton step on the
    fixed point of the proximal step, if that brings it nearer. The end is a certificate: `kkt_residual` of at most
    `tol`. Where the loss or the penalty is not convex this is a stationary point, and it depends on `params`.

    The solution has derivatives in `strength`, the hyperparameters and `args`, by the implicit function theorem: for
    `torch.func.grad`, `jvp` and `backward`. Tensors that the loss holds without getting them as `args` are constants.
    Under `vmap` (over strengths, folds, data) members that are done stop moving.

    Args:
        loss: `loss(params, *args)`, a scalar with a first and second derivative.
        params: Where to begin. float64 is needed for residuals like the default `tol`; float32 ends near 1e-6.
        penalty: A penalty with a proximal operator, or a constraint.
        hyper: Its hyperparameters.
        strength: :math:`\lambda`: number of at least 0, tensor, or a tree of them like the parameters.
        args: What else the loss takes: trees of tensors.
        mask: Leaves on which the penalty acts; the others, such as an intercept, are minimized over freely.
        tol: Greatest `kkt_residual` of a solution, at least 0, in units of the gradient.
        max_steps: Number of steps after which to give up, at least 0; `converged` is then False.
        options: Static options of the penalty, such as `dim`.

    Raises:
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
        Bertrand et al., *Implicit differentiation for fast hyperparameter selection in non-smooth convex learning*,
        2022.
    """
    problem = Problem(loss, penalty, hyper, mask, tol, max_steps, options)
    problem.check(params, strength, args)
    return problem.solve(params, strength, args)


@dataclass(frozen=True)
class Problem:
    """A loss and a penalty, and when they count as minimized."""

    loss: Callable[..., Tensor]
    penalty: Penalty
    hyper: tuple[Hyper, ...]
    mask: Mask | None
    tol: float
    max_steps: int
    options: dict[str, Any]

    def check(self, params: Params, strength: Hyper, args: tuple[Any, ...]) -> None:
        """Raise an error, before any work, for what is no problem."""
        nonnegative(strength=strength)
        check_penalty(self.penalty, self.hyper, self.options)
        check_selection(self.mask)
        check_params(params)
        check_whole("minimize", tree_paths(params), tree_leaves(params))
        check_fit(params, self.mask, strength, *self.hyper)
        check_groups_are_whole(self.penalty, self.mask, params)
        check_range("tol", self.tol, 0.0)
        if type(self.max_steps) is not int or self.max_steps < 0:
            raise ValueError(f"max_steps is {self.max_steps!r}; expected a whole number of at least 0")
        if any([w.is_complex() for w in tree_leaves(params)]):
            raise TypeError("params are complex; expected real ones, such as torch.view_as_real makes")
        if not isinstance(args, tuple):
            raise TypeError(f"args is a {type(args).__name__}; expected a tuple of what the loss takes after params")

    def solve(self, params: Params, strength: Hyper, args: tuple[Any, ...], kept: Tensor | None = None) -> Solution:
        """The solution; if only some entries may move, with their places in a vector of all."""
        flat, tensors = _flat(self, params, strength, args, kept)
        x, residual, steps, converged, *_ = _Solve.apply(flat, *tensors)
        return Solution(flat.tree(x), residual, steps, converged)


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


@dataclass(frozen=True)
class _Flat:
    """A problem in functions of one vector and of all tensors that it was given."""

    read: Callable[[Tensor, Any], Tensor]  # The loss.
    land: Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # The proximal point of a vector, a step and a metric.
    value: Callable[[Tensor, Any], Tensor]  # The penalty.
    residual: Callable[[Tensor, Tensor, Any], Tensor]  # Of a vector and the gradient there.
    begin: Callable[[Any], Tensor]  # The vector at which to begin.
    tree: Callable[[Tensor], Params]
    in_metric: bool  # Whether the penalty has a rule in a metric.
    tol: float
    max_steps: int
    #: For each enclosing `vmap`, from the inside out: which tensors have members along their first dimension.
    levels: tuple[tuple[int | None, ...], ...] = ()

    def mapped(self, dims: tuple[int | None, ...]) -> _Flat:
        """The problem of a stack of members."""
        return replace(self, levels=(*self.levels, dims))

    def over_members(self, f: Callable[..., Any], tuples: int = 1) -> Callable[..., Any]:
        """A function of some tuples like the tensors, and of what has one entry for each member, for all members."""
        for dims in self.levels:
            f = _vmapped(f, dims, tuples)
        return f


def _vmapped(f: Callable[..., Any], dims: tuple[int | None, ...], tuples: int) -> Callable[..., Any]:
    return lambda *given: vmap(f, in_dims=(*[dims] * tuples, *[0] * (len(given) - tuples)))(*given)


def _flat(
    problem: Problem, params: Params, strength: Hyper, args: tuple[Any, ...], kept: Tensor | None
) -> tuple[_Flat, list[Tensor]]:
    loss, penalty, hyper, mask, options = problem.loss, problem.penalty, problem.hyper, problem.mask, problem.options
    leaves, rebuild = flatten((params, strength, hyper, args))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    own, tree = flatten(params)
    shapes, sizes, dtypes = [w.shape for w in own], [w.numel() for w in own], [w.dtype for w in own]
    dtype = functools.reduce(torch.promote_types, map(wide, dtypes), torch.float32)

    def given(tensors: Any) -> Any:
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        return rebuild(filled)

    def vector(tree: Params) -> Tensor:
        parts = [w.reshape(-1).to(dtype) for w in tree_leaves(tree)]
        whole = torch.cat(parts) if parts else torch.zeros(0, dtype=dtype)
        return whole if kept is None else whole.index_select(0, kept)

    def unpacked(x: Tensor, rest: float = 0.0) -> Params:
        if kept is not None:
            x = x.new_full((*x.shape[:-1], sum(sizes)), rest).index_copy(-1, kept, x)
        parts = x.split(sizes, dim=-1)
        return tree([part.reshape((*part.shape[:-1], *shape)) for part, shape in zip(parts, shapes, strict=True)])

    def read(x: Tensor, tensors: Any) -> Tensor:
        value = loss(cast(unpacked(x)), *given(tensors)[3])
        if not isinstance(value, Tensor) or value.ndim:
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"loss returned {came}; expected a tensor without dimensions")
        return value.to(dtype)

    def land(x: Tensor, step: Tensor, metric: Tensor, tensors: Any) -> Tensor:
        point, (_, force, values, _) = unpacked(x), given(tensors)
        h = unpacked(metric, 1.0) if in_metric else None
        return vector(penalty.prox(point, product(point, step, force), *values, metric=h, mask=mask, **options))

    def value(x: Tensor, tensors: Any) -> Tensor:
        _, force, values, _ = given(tensors)
        return penalty.weighted_value(unpacked(x), force, *values, mask=mask, **options).to(dtype)

    def residual(x: Tensor, slope: Tensor, tensors: Any) -> Tensor:
        _, force, values, _ = given(tensors)
        point, grads = unpacked(x), unpacked(slope)
        return kkt_residual(point, grads, penalty, *values, strength=force, mask=mask, **options).to(dtype)

    cast = lambda point: tree([w.to(kind) for w, kind in zip(tree_leaves(point), dtypes, strict=True)])
    in_metric = penalty.in_metric(params, *hyper, mask=mask, **options)
    tree_of = lambda x: cast(unpacked(x))
    begin = lambda tensors: vector(given(tensors)[0])
    flat = _Flat(read, land, value, residual, begin, tree_of, in_metric, problem.tol, problem.max_steps)
    return flat, [leaves[i] for i in places]


# The descent, of one member


def _start(flat: _Flat, tensors: Any) -> _State:
    x = flat.begin(tensors)
    slope, value = grad_and_value(flat.read)(x, tensors)
    product = lambda v: _hessian_times(flat, x, tensors, v)
    metric = _metric(flat, x, tensors)
    v = torch.where(slope == 0, torch.ones_like(slope), slope)
    rate = torch.ones_like(value)
    for _ in range(6):  # The greatest curvature in the metric, roughly.
        v = v / v.square().sum().sqrt().clamp(min=torch.finfo(x.dtype).tiny)
        v = product(v / metric.sqrt()) / metric.sqrt()
        rate = v.square().sum().sqrt()
    rate = torch.where((rate > 0) & rate.isfinite(), rate, torch.ones_like(rate))
    objective = value + flat.value(x, tensors)
    residual = flat.residual(x, slope, tensors)
    zero = torch.zeros_like(value, dtype=torch.int64)
    recent = torch.where(objective.isfinite(), objective, torch.inf).expand(_HISTORY).clone()
    return _State(x, slope, recent, rate, metric, residual, residual, zero, zero, residual <= flat.tol)


def _metric(flat: _Flat, x: Tensor, tensors: Any) -> Tensor:
    """The diagonal of the Hessian where it is positive, with a floor; ones where the penalty takes no metric."""
    if not flat.in_metric or not 1 < len(x) <= _DENSE:
        return torch.ones_like(x)
    product = lambda v: _hessian_times(flat, x, tensors, v)
    found = vmap(product)(torch.eye(len(x), dtype=x.dtype, device=x.device)).diagonal().abs()
    top = found.amax()
    return torch.where(found.isfinite() & (top > 0), found.clamp(min=1e-6 * top), torch.ones_like(x))


def _hessian_times(flat: _Flat, x: Tensor, tensors: Any, v: Tensor) -> Tensor:
    # Twice in reverse: some losses of torch, `mse_loss` among them, have no forward derivative of their gradient.
    return vjp(lambda x: grad_and_value(flat.read)(x, tensors)[0], x)[1](v)[0]


def _proximal_step(flat: _Flat, x: Tensor, slope: Tensor, rate: Tensor, metric: Tensor, tensors: Any) -> Tensor:
    return flat.land(x - slope / (rate * metric), 1 / rate, metric, tensors)


def _landing_times(flat: _Flat, x: Tensor, rate: Tensor, metric: Tensor, tensors: Any) -> Callable[[Tensor], Tensor]:
    """The product of a vector and the Jacobian of the proximal step from x."""
    point = x - grad_and_value(flat.read)(x, tensors)[0] / (rate * metric)

    def product(v: Tensor) -> Tensor:
        inner = v - _hessian_times(flat, x, tensors, v) / (rate * metric)
        return jvp(lambda z: flat.land(z, 1 / rate, metric, tensors), (point,), (inner,))[1]

    return product


def _matrix(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    r""":math:`I - J`, from products of vectors and :math:`J`."""
    one = torch.eye(len(x), dtype=x.dtype, device=x.device)
    return one - vmap(product)(one).T


def _noise(objective: Tensor) -> Tensor:
    """By how much an objective may grow through rounding."""
    return 16 * torch.finfo(objective.dtype).eps * objective.abs()


def _step(flat: _Flat, tensors: Any, s: _State) -> _State:
    z = _proximal_step(flat, s.x, s.slope, s.rate, s.metric, tensors)
    slope, value = grad_and_value(flat.read)(z, tensors)
    objective = value + flat.value(z, tensors)
    move = z - s.x
    length = (s.metric * move.square()).sum()
    bound = s.recent.amax()
    taken = (objective <= bound - 5e-5 * s.rate * length + _noise(objective)) & slope.isfinite().all()
    curvature = (move * (slope - s.slope)).sum() / length
    known = curvature.isfinite() & (length > 0)
    wanted = torch.where(known & (curvature > 0), curvature, s.rate / 4)
    wanted = torch.minimum(torch.maximum(wanted, s.rate / 100), s.rate * 100)
    rate = torch.where(taken, wanted, torch.maximum(2 * s.rate, torch.where(known, curvature, s.rate)))
    return _moved(flat, tensors, s, taken, z, slope, objective, rate, length == 0)


def _newton(flat: _Flat, tensors: Any, s: _State) -> _State:
    """A Newton step on the fixed point of the proximal step, if it more than halves the residual."""

    def land(x: Tensor) -> Tensor:
        return _proximal_step(flat, x, grad_and_value(flat.read)(x, tensors)[0], s.rate, s.metric, tensors)

    step = _solve_fixed_point(_landing_times(flat, s.x, s.rate, s.metric, tensors), s.x, land(s.x) - s.x)
    step = torch.where(step.isfinite().all(), step, torch.zeros_like(step))

    def reach(share: Tensor) -> tuple[Tensor, ...]:
        z = land(s.x + share * step)
        slope, value = grad_and_value(flat.read)(z, tensors)
        return z, slope, value + flat.value(z, tensors), flat.residual(z, slope, tensors)

    shares = torch.tensor(_SHARES, dtype=s.x.dtype, device=s.x.device)
    points, slopes, objectives, residuals = vmap(reach)(shares)
    objectives = torch.where(objectives.isnan(), torch.inf, objectives)
    closer = (residuals < s.residual / 2) & (objectives <= s.recent.amax() + _noise(objectives))
    # The one that is nearest, or else the lowest.
    order = torch.where(closer.any(), torch.where(closer, residuals, torch.inf), objectives)
    one = order.argmin()[None]
    z, slope, objective = (x.index_select(0, one)[0] for x in (points, slopes, objectives))
    taken = closer.any() | (objective < s.recent[-1])
    after = _moved(flat, tensors, s, taken, z, slope, objective, s.rate, torch.zeros_like(taken))
    metric = _metric(flat, after.x, tensors)
    rate = after.rate * torch.where(s.done, 1.0, (s.metric / metric).amax())
    after = after._replace(metric=torch.where(s.done, s.metric, metric), rate=rate)
    return after._replace(steps=s.steps, since=torch.where(taken, after.since, s.since))


def _moved(
    flat: _Flat,
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
    x, slope = torch.where(taken, z, s.x), torch.where(taken, slope, s.slope)
    recent = torch.where(taken, torch.cat([s.recent[1:], objective[None]]), s.recent)
    residual = torch.where(taken, flat.residual(x, slope, tensors), s.residual)
    lower = taken & (objective < s.recent.amin() - _noise(objective))
    better = (residual < 0.99 * s.best) | lower
    since = torch.where(better, 0, s.since + 1)
    limits = torch.finfo(x.dtype)
    done = (residual <= flat.tol) | (since > _PATIENCE) | (taken & still) | (rate > limits.max / 1e9)
    best = torch.minimum(residual, s.best)
    after = _State(x, slope, recent, rate, s.metric, residual, best, since, s.steps + 1, done)
    return _State(*(torch.where(s.done, old, new) for old, new in zip(s, after, strict=True)))


def _descend(flat: _Flat, tensors: Any) -> tuple[Tensor, ...]:
    """The solution, its residual, steps, whether it has converged, and the step and metric for its derivatives."""
    step, newton, start = (
        flat.over_members(lambda tensors, *s, f=f: f(flat, tensors, *(_State(*x) for x in s)))
        for f in (_step, _newton, _start)
    )
    s = start(tensors)
    helped = False
    for n in range(1, flat.max_steps + 1):
        if (helped or n % _EVERY == 1) and bool(s.done.all()):
            break
        s = step(tensors, s)
        if helped or n % _EVERY == 0:
            before, s = s, newton(tensors, s)
            helped = bool((s.residual < before.residual / 2).any())
    return s.x, s.residual, s.steps, s.residual <= flat.tol, s.rate, s.metric


# Linear equations of a fixed point


def _solve_fixed_point(product: Callable[[Tensor], Tensor], x: Tensor, b: Tensor) -> Tensor:
    r""":math:`(I - J)^{-1} b`, from products of vectors and :math:`J`."""
    if len(x) <= _DENSE:
        # A little more than I: a loss that is flat along some direction makes the matrix singular.
        matrix = _matrix(product, x) + 1e-10 * torch.eye(len(x), dtype=x.dtype, device=x.device)
        return torch.linalg.solve_ex(matrix, b)[0]
    return _gmres(lambda v: v - product(v), b, 30)


def _gmres(product: Callable[[Tensor], Tensor], b: Tensor, count: int) -> Tensor:
    """The vector in a Krylov space of some dimensions whose product is nearest to b."""
    tiny = torch.finfo(b.dtype).tiny
    size = b.square().sum().sqrt()
    basis = [b / size.clamp(min=tiny)]
    columns = []
    for _ in range(min(count, len(b))):
        w = product(basis[-1])
        stack = torch.stack(basis)
        for _ in range(2):  # Twice, or rounding would leave some of the earlier directions.
            w = w - stack.T @ (stack @ w)
        columns.append(w)
        length = w.square().sum().sqrt()
        basis.append(torch.where(length > 1e-14, w / length.clamp(min=tiny), torch.zeros_like(w)))
    stack = torch.stack(basis[:-1])
    images = torch.stack([product(v) for v in stack])
    shares = torch.linalg.pinv(images.T, rtol=1e-13) @ b
    return shares @ stack


# Derivatives


class _Solve(torch.autograd.Function):
    """The solution as a function of all tensors of the flat."""

    @staticmethod
    def forward(flat: _Flat, *tensors: Tensor) -> tuple[Tensor, ...]:
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
        found = pull(tuple(tensors), x, rate, metric, slopes[0])
        for dims in reversed(flat.levels):  # What is the same for all members gets the sum of their slopes.
            found = [g if dim == 0 else g.sum(0) for g, dim in zip(found, dims, strict=True)]
        return None, *(g if t.is_floating_point() else None for g, t in zip(found, tensors, strict=True))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        x, rate, metric, *tensors = ctx.saved_tensors
        flat = ctx.flat
        push = flat.over_members(lambda *given: _push(flat, *given), tuples=2)
        filled = [torch.zeros_like(t) if d is None else d for t, d in zip(tensors, tangents[1:], strict=True)]
        return push(tuple(tensors), tuple(filled), x, rate, metric), None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *given: Any) -> Any:
        flat, *tensors = given
        moved = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, in_dims[1:], strict=True)]
        dims = tuple(None if dim is None else 0 for dim in in_dims[1:])
        return _Solve.apply(flat.mapped(dims), *moved), (0,) * 6


def _landing(flat: _Flat, x: Tensor, rate: Tensor, metric: Tensor, tensors: Any) -> tuple[Any, Any, list[int]]:
    """The proximal step from x as a function of the vector, and of the real tensors, and which these are."""
    which = [i for i, t in enumerate(tensors) if t.is_floating_point()]

    def land(x: Tensor, tensors: Any = tensors) -> Tensor:
        return _proximal_step(flat, x, grad_and_value(flat.read)(x, tensors)[0], rate, metric, tensors)

    def of_real(*real: Tensor) -> Tensor:
        given = list(tensors)
        for i, t in zip(which, real, strict=True):
            given[i] = t
        return land(x, tuple(given))

    return land, of_real, which


def _pull(flat: _Flat, tensors: Any, x: Tensor, rate: Tensor, metric: Tensor, slope: Tensor) -> list[Tensor]:
    """Slopes in the tensors, from a slope in the solution."""
    land, of_real, which = _landing(flat, x, rate, metric, tensors)
    if len(x) <= _DENSE:
        matrix = _matrix(_landing_times(flat, x, rate, metric, tensors), x)
        along = torch.linalg.pinv(matrix.T, rtol=1e-12) @ slope
    else:
        back = vjp(land, x)[1]
        along = _gmres(lambda v: v - back(v)[0], slope, 200)
    found = list(map(torch.zeros_like, tensors))
    for i, g in zip(which, vjp(of_real, *(tensors[i] for i in which))[1](along), strict=True):
        found[i] = g
    return found


def _push(flat: _Flat, tensors: Any, tangents: Any, x: Tensor, rate: Tensor, metric: Tensor) -> Tensor:
    """How the solution moves when the tensors do."""
    _, of_real, which = _landing(flat, x, rate, metric, tensors)
    real, along = tuple(tensors[i] for i in which), tuple(tangents[i] for i in which)
    # What pulls back is linear: its own pull-back pushes forward, also where a loss has no forward derivative.
    pull = vjp(of_real, *real)[1]
    moved = vjp(pull, torch.zeros_like(x))[1](along)[0]
    product = _landing_times(flat, x, rate, metric, tensors)
    if len(x) <= _DENSE:
        return torch.linalg.pinv(_matrix(product, x), rtol=1e-12) @ moved
    return _gmres(lambda v: v - product(v), moved, 200)
