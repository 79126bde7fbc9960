"""Penalties and constraints of singular values, and penalties of a matrix that have a gradient alone.

A leaf is read as a matrix, its first dimension against all others: the filters of a convolution are rows, a vector
is one column. Derivatives go through divided differences of the rule on singular values, not through those of
singular vectors, and so are finite also where singular values are equal or zero. A leaf that holds NaN or infinities
has no singular values: all that is made of it is NaN.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from funcreg._typing import Scalar
from funcreg.composition import varies
from funcreg.constraint import constraint
from funcreg.constraints import share, simplex_excess
from funcreg.construction import remembered
from funcreg.grouped import polar
from funcreg.leafwise import sign, squared, without_autocast
from funcreg.penalties import Dim, group_dims, l1, l2, shrunk
from funcreg.penalty import Penalty, Sum, penalty
from funcreg.separable import l0_envelope, l_half, l_two_thirds, mcp
from funcreg.undocumented import read_once

_AT_LEAST_0 = (0.0, math.inf)
_ABOVE_0 = (sys.float_info.min, math.inf)

#: From singular values and hyperparameters to as many numbers, or to one.
Rule = Callable[..., Tensor]


def as_matrix(w: Tensor) -> Tensor:
    """A leaf as a matrix: its first dimension against all others."""
    return w.flatten(1) if w.ndim > 1 else w.reshape(-1, 1)


#: Whether a matrix is finite, and its singular value decomposition.
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def whole(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that the compiler takes into its graph as a whole, with the derivatives that it has.

    The compiler would else trace the decomposition, and differentiate that. It knows such a function by its identity:
    make it once, outside of what is compiled.
    """

    @read_once  # `allow_in_graph` imports the compiler, and so waits until there is one, which runs this.
    def allow() -> None:
        torch.compiler.allow_in_graph(call)

    def called(*args: Any, **options: Any) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            allow()
        return call(*args, **options)

    return called


class _Product(torch.autograd.Function):
    """The product of two matrices, whose derivatives `torch.autocast` leaves alone wherever they are taken."""

    generate_vmap_rule = True

    @staticmethod
    @without_autocast
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (g,), (a, b) = grad_outputs, ctx.saved_tensors
        return _product(g, b.mH), _product(a.mH, g)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        (da, db), (a, b) = grad_inputs, ctx.saved_tensors
        parts = [_product(x, y) for x, y in ((da, b), (a, db)) if x is not None and y is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


@whole
def _product(a: Tensor, b: Tensor) -> Tensor:
    made: Any = _Product.apply(a, b)
    return made


def _decompose(w: Tensor) -> Parts:
    """Whether all entries are finite, and the singular value decomposition, where rounding counts as zero."""
    finite = w.isfinite().all()
    u, s, vh = torch.linalg.svd(torch.where(finite, w, torch.zeros_like(w)), full_matrices=False)
    noise = s.amax() * (max(w.shape) * torch.finfo(s.dtype).eps)
    return finite, u, torch.where(s <= noise, torch.zeros_like(s), s), vh


def _derivative(rule: Rule, parts: Parts, hyper: tuple[Any, ...], d: Tensor) -> Tensor:
    r"""The derivative of :math:`U f(S) V^*` along a direction, which is also its own adjoint.

    In the bases of singular vectors, the Hermitian part of the direction is multiplied by
    :math:`\frac{f_i - f_j}{s_i - s_j}`, the other part by :math:`\frac{f_i + f_j}{s_i + s_j}`, and what lies outside
    by :math:`f_i / s_i`; where these are 0 / 0, by the derivative :math:`f'`.
    """
    finite, u, s, vh = parts
    pull: Any
    t, pull = torch.func.vjp(lambda s: rule(s, *hyper), s)[:2]
    (slopes,) = pull(torch.ones_like(t))
    # Nearer than this, the difference is more rounding than number.
    tie = s.amax() * math.sqrt(torch.finfo(s.dtype).eps)

    def divided(over: Tensor, under: Tensor, least: Tensor, otherwise: Tensor) -> Tensor:
        tied = under.abs() <= least
        return torch.where(tied, otherwise, over / torch.where(tied, torch.ones_like(under), under))

    rows, columns = s.unsqueeze(-1), s.unsqueeze(-2)
    mean = (slopes.unsqueeze(-1) + slopes.unsqueeze(-2)) / 2
    differences = divided(t.unsqueeze(-1) - t.unsqueeze(-2), rows - columns, tie, mean)
    sums = divided(t.unsqueeze(-1) + t.unsqueeze(-2), rows + columns, torch.zeros_like(tie), mean)
    ratios = divided(t, s, torch.zeros_like(tie), slopes)
    uh, v = u.mH, vh.mH
    inside = _product(_product(uh, d), v)
    turned = (differences * (inside + inside.mH) + sums * (inside - inside.mH)) / 2
    left = (_product(d, v) - _product(u, inside)) * ratios
    right = ratios.unsqueeze(-1) * (_product(uh, d) - _product(inside, vh))
    whole = _product(u, _product(turned, vh) + right) + _product(left, vh)
    return torch.where(finite, whole, torch.full_like(d, math.nan))


def _by_hyper(rule: Rule, s: Tensor, hyper: tuple[Any, ...]) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """A rule at singular values, and from a cotangent of it to those of the tensors among its hyperparameters."""

    def of_tensors(*given: Tensor) -> Tensor:
        new = iter(given)
        return rule(s, *[next(new) if isinstance(h, Tensor) else h for h in hyper])

    tensors = [h for h in hyper if isinstance(h, Tensor)]
    made: Any = torch.func.vjp(of_tensors, *tensors) if tensors else (rule(s, *hyper), lambda along: ())
    return made


def _pull_hyper(rule: Rule, s: Tensor, hyper: tuple[Any, ...], along: Tensor) -> list[Tensor | None]:
    """What a cotangent of a rule is for each of its hyperparameters; None for a number."""
    found = iter(_by_hyper(rule, s, hyper)[1](along))
    return [next(found) if isinstance(h, Tensor) else None for h in hyper]


def _push_hyper(rule: Rule, s: Tensor, hyper: tuple[Any, ...], tangents: Sequence[Any]) -> Tensor:
    """The derivative of a rule along tangents of its hyperparameters."""
    moved = tuple(
        torch.zeros_like(h) if t is None else t for h, t in zip(hyper, tangents, strict=True) if isinstance(h, Tensor)
    )
    t, pull = _by_hyper(rule, s, hyper)
    # The adjoint of the adjoint: torch does not nest derivatives in forward mode in compiled code.
    return torch.func.vjp(pull, torch.zeros_like(t))[1](moved)[0] if moved else torch.zeros_like(t)


def _keep(ctx: Any, w: Tensor, *rest: Any) -> None:
    """Keep a matrix, its parts and hyperparameters for derivatives: tensors where autograd looks after them."""
    tensors = [h for h in rest if isinstance(h, Tensor)]
    ctx.numbers = [None if isinstance(h, Tensor) else h for h in rest]
    ctx.save_for_backward(w, *tensors)
    ctx.save_for_forward(w, *tensors)


def _kept(ctx: Any) -> tuple[Tensor, Any, tuple[Any, ...]]:
    # Views, as a pull-back may be called after its `vjp` has ended: torch then fails to differentiate in the saved
    # tensors, which are wrapped for a level that is gone. Every operation takes that wrapper off.
    w, *tensors = [t.view_as(t) for t in ctx.saved_tensors]
    new = iter(tensors)
    rest = tuple(next(new) if number is None else number for number in ctx.numbers)
    return w, rest[:4], rest[4:]


# The functions below take a matrix and what `_decompose` made of it, and hand all of their derivative to the matrix:
# none goes through singular vectors. Those are there for second derivatives, which are torch's own.


class _Apply(torch.autograd.Function):
    """A matrix with a rule applied to each of its singular values."""

    generate_vmap_rule = True

    @staticmethod
    @without_autocast
    def forward(rule: Rule, w: Tensor, finite: Tensor, u: Tensor, s: Tensor, vh: Tensor, *hyper: Any) -> Tensor:
        t = rule(s, *hyper).to(s.dtype)
        # Where nothing changes the matrix stays exactly as it is; adding zero turns -0.0 into +0.0.
        made = torch.where((t == s).all(), w, (u * t) @ vh) + 0.0
        return torch.where(finite, made, torch.full_like(made, math.nan))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rule = inputs[0]
        _keep(ctx, *inputs[1:])

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (g,), (_, parts, hyper) = grad_outputs, _kept(ctx)
        _, u, s, vh = parts
        along = _product(_product(u.mH, g), vh.mH).diagonal(dim1=-2, dim2=-1)
        along = along.real if along.is_complex() else along
        pulled = _pull_hyper(ctx.rule, s, hyper, along)
        return None, _derivative(ctx.rule, parts, hyper, g), None, None, None, None, *pulled

    @staticmethod
    @without_autocast
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        (_, d, _, _, _, _, *tangents), (_, parts, hyper) = grad_inputs, _kept(ctx)
        finite, u, s, vh = parts
        moved = _product(u * _push_hyper(ctx.rule, s, hyper, tangents), vh)
        moved = torch.where(finite, moved, torch.full_like(moved, math.nan))
        return moved if d is None else moved + _derivative(ctx.rule, parts, hyper, d)


class _Measure(torch.autograd.Function):
    """A number made of singular values by a rule whose gradient is another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rule: Rule, slope: Rule, w: Tensor, finite: Tensor, u: Tensor, s: Tensor, vh: Tensor, *hyper: Any
    ) -> Tensor:
        made = rule(s, *hyper)
        return torch.where(finite, made, torch.full_like(made, math.nan))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rule, ctx.slope = inputs[:2]
        _keep(ctx, *inputs[2:])

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (g,), (w, parts, hyper) = grad_outputs, _kept(ctx)
        pulled = _pull_hyper(ctx.rule, parts[2], hyper, g)
        return None, None, g * _apply(ctx.slope, w, *parts, *hyper), None, None, None, None, *pulled

    @staticmethod
    @without_autocast
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        (_, _, d, _, _, _, _, *tangents), (w, parts, hyper) = grad_inputs, _kept(ctx)
        moved = _push_hyper(ctx.rule, parts[2], hyper, tangents)
        if d is None:
            return moved
        along = _apply(ctx.slope, w, *parts, *hyper).conj() * d
        return moved + (along.real if along.is_complex() else along).sum()


class _Values(torch.autograd.Function):
    """Singular values, with the derivative that they have in the matrix."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, finite: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
        return s.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, *inputs)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (g,), (_, (_, u, _, vh), _) = grad_outputs, _kept(ctx)
        return _product(u * g, vh), None, None, None, None

    @staticmethod
    @without_autocast
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        (d, *_), (_, (_, u, s, vh), _) = grad_inputs, _kept(ctx)
        along = _product(_product(u.mH, d), vh.mH).diagonal(dim1=-2, dim2=-1)
        return (along.real if along.is_complex() else along).to(s.dtype)


#: Typed as what they return, which torch leaves open.
_values: Callable[..., Tensor] = _Values.apply
_apply: Callable[..., Tensor] = _Apply.apply
_measure: Callable[..., Tensor] = _Measure.apply


def _on_values(rule: Rule, common: Rule | None = None) -> Callable[..., Tensor]:
    """From a rule to `(w, *hyper, **options)`: a leaf of any shape with the rule applied to each singular value.

    Args:
        rule: From singular values and hyperparameters to new values, each from its own.
        common: From all singular values and the hyperparameters of the leaf to the one hyperparameter of the rule.
    """

    @whole
    def applied(w: Tensor, *hyper: Any, **options: Any) -> Tensor:
        if not w.numel():
            return w.clone()
        m = as_matrix(w)
        parts = _decompose(m)
        hyper = hyper if common is None else (common(_values(m, *parts), *hyper),)
        return _apply(partial(rule, **options), m, *parts, *hyper).reshape(w.shape)

    return applied


def _of_values(rule: Rule, slope: Rule) -> Callable[..., Tensor]:
    """The same for a number made of singular values by a rule whose gradient is another; 0 for an empty leaf."""

    @whole
    def measured(w: Tensor, *hyper: Any, **options: Any) -> Tensor:
        if not w.numel():
            return squared(w).sum()
        m = as_matrix(w)
        return _measure(partial(rule, **options), partial(slope, **options), m, *_decompose(m), *hyper)

    return measured


def _one(value: Scalar, name: str) -> Scalar:
    """A hyperparameter of a whole matrix, without dimensions."""
    if isinstance(value, Tensor) and value.ndim:
        if value.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected one number for each matrix")
        return value.reshape(())
    return value


# Singular values


def _sum_of_values(s: Tensor) -> Tensor:
    return s.sum(-1)


def _rank(s: Tensor) -> Tensor:
    return s.sign()


def _all_one(s: Tensor) -> Tensor:
    return torch.ones_like(s)


def _clipped(s: Tensor, radius: Scalar) -> Tensor:
    return torch.where(s < radius, s, radius)


def _level(s: Tensor, amount: Scalar) -> Tensor:
    """The number above which singular values exceed it by an amount in sum, 0 if they never do."""
    return (s - simplex_excess(s, amount)).amax(-1).relu()


_sum, _directions, _polar_factor = _of_values(_sum_of_values, _rank), _on_values(_rank), _on_values(_all_one)
_shrunk, _within_sum = _on_values(shrunk), _on_values(shrunk, _level)
_cut_off, _levelled = _on_values(_clipped), _on_values(_clipped, _level)


def _nuclear_gradient(w: Tensor) -> Tensor:
    return _directions(w)


def _nuclear_proximal(w: Tensor, step: Scalar) -> Tensor:
    return _shrunk(w, _one(step, "step"))


def _beside(slopes: Tensor, turns: Tensor) -> Tensor:
    """What the singular vectors of a matrix do not reach, and is free to be shrunk."""
    beside = slopes - _product(turns, _product(turns.mH, slopes))
    return beside - _product(_product(beside, turns.mH), turns)


def _nuclear_residual(w: Tensor, g: Tensor, strength: Scalar) -> Tensor:
    if not w.numel():
        return g.clone()
    turns, slopes = as_matrix(_nuclear_gradient(w)), as_matrix(g)
    beside = _beside(slopes, turns)
    return (slopes + strength * turns - beside + _nuclear_proximal(beside, strength)).reshape(w.shape)


@penalty(gradient=_nuclear_gradient, proximal=_nuclear_proximal, residual=_nuclear_residual, separable=False)
def nuclear(w: Tensor) -> Tensor:
    r"""Nuclear norm, the sum of singular values, :math:`\sum_i \sigma_i(W)`: the lasso of rank.

    The proximal operator shrinks the singular values and leaves a matrix of lower rank. The gradient is
    :math:`U V^*` over the singular values that are not 0.

    In a diagonal metric, as Adam has one, there is no closed form, and an optimizer shares one number of the metric
    for each matrix. `inner_steps`, each of which takes a singular value decomposition, take the whole metric.

    Example:
        >>> params = {"weight": torch.tensor([[3.0, 0.0], [0.0, 0.5]])}
        >>> nuclear(params), nuclear.prox(params, 1.0)
        (tensor(3.5000), {'weight': tensor([[2., 0.],
                [0., 0.]])})

    References:
        Fazel, *Matrix rank minimization with applications*, 2002.
        Cai, Candes & Shen, *A singular value thresholding algorithm for matrix completion*, 2010.
    """
    return _sum(w)


def _largest_value(s: Tensor) -> Tensor:
    return s.amax(-1)


def _is_largest(s: Tensor) -> Tensor:
    top = ((s == s.amax(-1, keepdim=True)) & (s > 0)).to(s.dtype)
    return top / top.sum(-1, keepdim=True).clamp(min=1)


_largest, _largest_directions = _of_values(_largest_value, _is_largest), _on_values(_is_largest)


def _spectral_gradient(w: Tensor) -> Tensor:
    return _largest_directions(w)


def _spectral_proximal(w: Tensor, step: Scalar) -> Tensor:
    return _levelled(w, _one(step, "step"))


@penalty(gradient=_spectral_gradient, proximal=_spectral_proximal, separable=False)
def spectral(w: Tensor) -> Tensor:
    r"""Spectral norm, the largest singular value, :math:`\sigma_1(W)`: how much a layer can stretch.

    The proximal operator lowers the largest singular values to a common one. For a convolution this is the norm of
    its filters as a matrix, which bounds that of the operator but is not it.

    Example:
        >>> params = {"weight": torch.tensor([[3.0, 0.0], [0.0, 0.5]])}
        >>> spectral(params), spectral.prox(params, 1.0)
        (tensor(3.), {'weight': tensor([[2.0000, 0.0000],
                [0.0000, 0.5000]])})

    References:
        Yoshida & Miyato, *Spectral norm regularization for improving the generalizability of deep learning*, 2017.
    """
    return _largest(w)


@remembered
def on_singular_values(penalty_of_entries: Penalty) -> Penalty:
    r"""Lift a separable penalty to the singular values of each leaf, :math:`\sum_i g(\sigma_i(W))`.

    The proximal operator applies that of :math:`g` to the singular values. `on_singular_values(l1)` is `nuclear`; the
    square root as :math:`g` makes the Schatten-1/2 quasi-norm, a penalty that flattens out, such as MCP, a nuclear
    norm that leaves large singular values as they are. Hyperparameters are those of :math:`g`, one number for each
    leaf. In compiled code, take one that was lifted outside of it and whose rules take all tensors as hyperparameters.

    Args:
        penalty_of_entries: A separable penalty :math:`g` that sees magnitudes alone and grows with them, the same for
            all entries.

    Raises:
        ValueError: The penalty does not say that it is separable, with `separable=True`.

    Example:
        >>> ridge = on_singular_values(elastic)
        >>> ridge.prox({"weight": torch.tensor([[3.0, 0.0], [0.0, 0.5]])}, 1.0, 2.0, 0.5)
        {'weight': tensor([[1., 0.],
                [0., 0.]])}

    References:
        Lu, Zhu, Xu, Yan & Lin, *Generalized singular value thresholding*, 2015.
    """
    g = penalty_of_entries
    if not isinstance(g, Penalty) or g.separable is not True:
        raise ValueError(f"penalty is {g!r}; expected a separable one such as l1, made with separable=True")
    terms = g.structure.parts() if isinstance(g, Sum) and g.structure.parts is not None else []
    if any([term.mask is not None or varies((*term.factors, *term.hyper)) for term in terms]):
        raise ValueError(
            f"penalty is {g!r} with weights for entries or a mask; expected one that treats all singular values alike. "
            "Multiply the lifted penalty, as in weights * on_singular_values(l1), with a number for each leaf."
        )

    slope, shrunk, whole = _on_values(g.grad), _on_values(g.prox), _of_values(g, g.grad)

    def ones(hyper: tuple[Any, ...]) -> list[Any]:
        return [_one(value, "a hyperparameter") for value in hyper]

    def gradient(w: Tensor, *hyper: Any, **options: Any) -> Tensor:
        return slope(w, *ones(hyper), **options)

    def proximal(w: Tensor, step: Scalar, *hyper: Any, **options: Any) -> Tensor:
        return shrunk(w, *ones((step, *hyper)), **options)

    def value(w: Tensor, *hyper: Any, **options: Any) -> Tensor:
        return whole(w, *ones(hyper), **options)

    value.__signature__ = inspect.signature(g)  # pyright: ignore[reportFunctionMemberAccess]  # Functions have it.
    value.__name__ = value.__qualname__ = f"{g.__name__}_on_singular_values"
    value.__doc__, value.__module__ = f"`{g.__name__}` of the singular values of each leaf.", g.__module__
    return penalty(gradient=gradient, proximal=proximal, separable=False, bounds=g.bounds)(value)


_POWERS = {p: on_singular_values(g) for p, g in {0.5: l_half, 2 / 3: l_two_thirds, 1: l1, 2: l2}.items()}


def _power(p: float) -> Penalty:
    if p not in _POWERS:
        raise ValueError(f"p is {p!r}; expected 1/2, 2/3, 1 or 2, whose proximal operators are known")
    return _POWERS[p]


def _schatten_gradient(w: Tensor, *, p: float = 1) -> Tensor:
    return _power(p).grad(w)


def _schatten_proximal(w: Tensor, step: Scalar, *, p: float = 1) -> Tensor:
    return _power(p).prox(w, _one(step, "step"))


@penalty(gradient=_schatten_gradient, proximal=_schatten_proximal, separable=False, convex=lambda p=1: p >= 1)
def schatten(w: Tensor, *, p: float = 1) -> Tensor:
    r"""Sum of powers of singular values, :math:`\sum_i \sigma_i(W)^p`, no root: a Schatten norm to its power.

    Below 1 it lowers the rank and shrinks large singular values less than `nuclear`, which is 1; it is not convex
    there. 2 is `l2`.

    Args:
        p: The power: 1/2, 2/3, 1 or 2, whose proximal operators have closed forms.

    Raises:
        ValueError: Another power.

    Example:
        >>> params = {"weight": torch.tensor([[4.0, 0.0], [0.0, 1.0]])}
        >>> schatten(params, p=1 / 2), schatten.prox(params, 1.0, p=1 / 2)
        (tensor(3.), {'weight': tensor([[3.7415, 0.0000],
                [0.0000, 0.0000]])})

    References:
        Nie, Huang & Ding, *Low-rank matrix recovery via efficient Schatten p-norm minimization*, 2012.
    """
    return _power(p)(w)


_mcp = on_singular_values(mcp)


def _spectral_mcp_gradient(w: Tensor, strength: Scalar, gamma: Scalar) -> Tensor:
    return _mcp.grad(w, _one(strength, "strength"), _one(gamma, "gamma"))


def _spectral_mcp_proximal(w: Tensor, step: Scalar, strength: Scalar, gamma: Scalar) -> Tensor:
    return _mcp.prox(w, _one(step, "step"), _one(strength, "strength"), _one(gamma, "gamma"))


@penalty(
    gradient=_spectral_mcp_gradient,
    proximal=_spectral_mcp_proximal,
    separable=False,
    bounds={"strength": _AT_LEAST_0, "gamma": _ABOVE_0},
    convex=False,
)
def spectral_mcp(w: Tensor, strength: Scalar, gamma: Scalar) -> Tensor:
    r"""Minimax concave penalty of singular values: `nuclear` near zero, constant from :math:`\gamma \lambda` on.

    It lowers the rank and leaves large singular values exactly as they are. See `mcp`, whose proximal operator acts
    on the singular values for every step. Nonconvex.

    Args:
        strength: :math:`\lambda`, the slope at zero, at least 0.
        gamma: Concavity :math:`\gamma`, above 0; infinite for `nuclear`.

    Example:
        >>> spectral_mcp.prox({"weight": torch.tensor([[4.0, 0.0], [0.0, 0.5]])}, 1.0, 1.0, 3.0)
        {'weight': tensor([[4., 0.],
                [0., 0.]])}

    References:
        Lu, Zhu, Xu, Yan & Lin, *Generalized singular value thresholding*, 2015.
    """
    return _mcp(w, _one(strength, "strength"), _one(gamma, "gamma"))


_envelope = on_singular_values(l0_envelope)


def _rank_envelope_gradient(w: Tensor, gamma: Scalar) -> Tensor:
    return _envelope.grad(w, _one(gamma, "gamma"))


def _rank_envelope_proximal(w: Tensor, step: Scalar, gamma: Scalar) -> Tensor:
    return _envelope.prox(w, _one(step, "step"), _one(gamma, "gamma"))


@penalty(
    gradient=_rank_envelope_gradient,
    proximal=_rank_envelope_proximal,
    separable=False,
    bounds={"gamma": _ABOVE_0},
    convex=False,
)
def rank_envelope(w: Tensor, gamma: Scalar) -> Tensor:
    r"""Quadratic envelope of the rank, :math:`\sum_i 1 - \frac{\gamma}{2} \max(\sqrt{2 / \gamma} - \sigma_i(W), 0)^2`.

    The rank, made smooth between 0 and :math:`\sqrt{2 / \gamma}`: see `l0_envelope`, whose proximal operator acts on
    the singular values for every step. Nonconvex.

    Args:
        gamma: :math:`\gamma`, above 0: the greater, the nearer to the rank.

    Example:
        >>> params = {"weight": torch.tensor([[4.0, 0.0], [0.0, 0.5]])}
        >>> rank_envelope(params, 0.5), rank_envelope.prox(params, 1.0, 0.5)
        (tensor(1.4375), {'weight': tensor([[4., 0.],
                [0., 0.]])})

    References:
        Carlsson, *On convex envelopes and regularization of non-convex functionals without moving global minima*, 2019.
    """
    return _envelope(w, _one(gamma, "gamma"))


# Constraints


def _spectral_ball_normal(w: Tensor, g: Tensor, slack: Scalar, radius: Scalar = 1.0) -> Tensor:
    if not w.numel():
        return g.clone()
    m, slopes, radius = as_matrix(w), as_matrix(g), _one(radius, "radius")
    finite, u, s, vh = _decompose(m)
    met = (s >= radius - slack * s.amax()).to(s.dtype)
    # Normals are the positive semidefinite combinations of pairs of singular vectors whose values meet the bound.
    u, vh = u * met, met.unsqueeze(-1) * vh
    push = -_product(_product(u.mH, slopes), vh.mH)
    sizes, ways = torch.linalg.eigh((push + push.mH) / 2)
    normal = _product(_product(u, _product(ways * sizes.relu(), ways.mH)), vh)
    left = torch.where(torch.zeros_like(s.amax()) + radius == 0, torch.zeros_like(slopes), slopes + normal)
    return torch.where(finite, left, torch.full_like(left, math.nan)).reshape(w.shape)


@constraint(bounds={"radius": _AT_LEAST_0}, residual=_spectral_ball_normal)
def spectral_ball(w: Tensor, radius: Scalar = 1.0) -> Tensor:
    r"""Singular values within a radius, :math:`\sigma_1(W) \le r`: a layer that stretches no input by more.

    The projection lowers the singular values that are too large; a matrix inside stays exactly as it is.

    Args:
        radius: :math:`r`, at least 0.

    Example:
        >>> spectral_ball.project({"weight": torch.tensor([[3.0, 0.0], [0.0, 0.5]])}, 1.0)
        {'weight': tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])}

    References:
        Gouk, Frank, Pfahringer & Cree, *Regularisation of neural networks by enforcing Lipschitz continuity*, 2021.
    """
    return _cut_off(w, _one(radius, "radius"))


def _nuclear_ball_normal(w: Tensor, g: Tensor, slack: Scalar, radius: Scalar = 1.0) -> Tensor:
    if not w.numel():
        return g.clone()
    radius = _one(radius, "radius")
    finite, u, s, vh = _decompose(as_matrix(w))
    kept = (s > 0).to(s.dtype)
    turns, slopes = _product(u * kept, vh), as_matrix(g)
    push = -(turns.conj() * slopes).real.sum() if slopes.is_complex() else -(turns * slopes).sum()
    beside = torch.linalg.svd(_beside(slopes, turns), full_matrices=False)[1]
    # Normals are multiples of subgradients of the nuclear norm: the residual of its best strength.
    level = share(beside, push.unsqueeze(-1), kept.sum().clamp(min=1))[0]
    level = torch.where(s.sum() >= radius - slack * s.sum(), level.relu(), torch.zeros_like(level))
    left = as_matrix(_nuclear_residual(w, g, level))
    left = torch.where(torch.zeros_like(level) + radius == 0, torch.zeros_like(left), left)
    return torch.where(finite, left, torch.full_like(left, math.nan)).reshape(w.shape)


@constraint(bounds={"radius": _AT_LEAST_0}, residual=_nuclear_ball_normal)
def nuclear_ball(w: Tensor, radius: Scalar = 1.0) -> Tensor:
    r"""Sum of singular values within a radius, :math:`\sum_i \sigma_i(W) \le r`, with low rank at its corners.

    Args:
        radius: :math:`r`, at least 0.

    Example:
        >>> nuclear_ball.project({"weight": torch.tensor([[3.0, 0.0], [0.0, 0.5]])}, 2.0)
        {'weight': tensor([[2., 0.],
                [0., 0.]])}

    References:
        Srebro & Shraibman, *Rank, trace-norm and max-norm*, 2005.
    """
    return _within_sum(w, _one(radius, "radius"))


def _stiefel_normal(w: Tensor, g: Tensor, slack: Scalar) -> Tensor:
    if not w.numel():
        return g.clone()
    m, slopes = as_matrix(w), as_matrix(g)
    wide = m.shape[0] < m.shape[1]
    m, slopes = (m.mH, slopes.mH) if wide else (m, slopes)
    along = _product(m.mH, slopes)
    left = slopes - _product(m, (along + along.mH) / 2)
    return (left.mH if wide else left).reshape(w.shape)


@constraint(residual=_stiefel_normal, convex=False)
def stiefel(w: Tensor) -> Tensor:
    r"""Orthonormal rows, or columns if there are fewer of them, :math:`W W^* = I` or :math:`W^* W = I`.

    The projection sets all singular values to 1: the polar factor. The nearest point to a matrix without full rank is
    one of many. The set is not convex.

    Example:
        >>> stiefel.project({"weight": torch.tensor([[3.0, 0.0], [0.0, -0.5]])})
        {'weight': tensor([[ 1.,  0.],
                [ 0., -1.]])}

    References:
        Fan & Hoffman, *Some metric inequalities in the space of matrices*, 1955.
    """
    return _polar_factor(w)


# Gradient alone


def _without_prox(name: str) -> Callable[..., Tensor]:
    def proximal(w: Tensor, *rest: Any, **options: Any) -> Tensor:
        raise ValueError(
            f"{name} has no proximal operator: it is not convex, and no closed form is known. Use its gradient: put it "
            "into the loss, or into a chain with add_penalty."
        )

    return proximal


def _gram(w: Tensor, smaller: bool) -> tuple[Tensor, Tensor]:
    """A leaf as a matrix with fewer rows than columns if `smaller`, and the products of its rows."""
    m = as_matrix(w)
    m = m.mH if smaller and m.shape[0] > m.shape[1] else m
    return m, _product(m, m.mH)


def _on_diagonal(gram: Tensor) -> Tensor:
    return torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))


def _less_one(gram: Tensor) -> Tensor:
    return gram - torch.diag_embed(torch.ones_like(gram.diagonal(dim1=-2, dim2=-1)))


def _as_leaf(x: Tensor, w: Tensor) -> Tensor:
    """A matrix, or its transpose, in the shape of a leaf."""
    return (x if x.shape == as_matrix(w).shape else x.mH).reshape(w.shape)


def _orthogonality_gradient(w: Tensor) -> Tensor:
    m, gram = _gram(w, smaller=True)
    return _as_leaf(_product(4 * _less_one(gram), m), w)


@penalty(
    gradient=_orthogonality_gradient,
    proximal=_without_prox("orthogonality"),
    metric=_without_prox("orthogonality"),
    separable=False,
)
def orthogonality(w: Tensor) -> Tensor:
    r"""How far from orthonormal rows, :math:`\|W W^* - I\|_F^2`, or columns if there are fewer of them.

    Of the two it is the one that can be 0; they differ by a constant, and have one gradient,
    :math:`4 (W W^* - I) W`. It has no proximal operator; the constraint is `stiefel`.

    Example:
        >>> params = {"weight": torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])}
        >>> orthogonality(params), orthogonality.grad(params)
        (tensor(9.), {'weight': tensor([[24.,  0.,  0.],
                [ 0.,  0.,  0.]])})

    References:
        Bansal, Chen & Wang, *Can we gain more from orthogonality regularizations in training deep networks?*, 2018.
    """
    return squared(_less_one(_gram(w, smaller=True)[1]))


def _offdiagonal_gradient(w: Tensor) -> Tensor:
    m, gram = _gram(w, smaller=False)
    return _product(4 * (gram - _on_diagonal(gram)), m).reshape(w.shape)


@penalty(
    gradient=_offdiagonal_gradient,
    proximal=_without_prox("orthogonality_offdiagonal"),
    metric=_without_prox("orthogonality_offdiagonal"),
    separable=False,
)
def orthogonality_offdiagonal(w: Tensor) -> Tensor:
    r"""How far rows are from orthogonal, whatever their norms, :math:`\sum_{i \ne j} \langle w_i, w_j \rangle^2`.

    Rows and filters are the units. It has no proximal operator.

    Example:
        >>> orthogonality_offdiagonal({"weight": torch.tensor([[2.0, 0.0], [1.0, 1.0]])})
        tensor(8.)

    References:
        Brock, Lim, Ritchie & Weston, *Neural photo editing with introspective adversarial networks*, 2017.
    """
    gram = _gram(w, smaller=False)[1]
    return squared(gram - _on_diagonal(gram))


def _cosines(w: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """Norms and directions of the vectors, what their cosines are off the diagonal, and one over their pairs."""
    if mode not in ("rows", "columns"):
        raise ValueError(f"mode is {mode!r}; expected 'rows' or 'columns'")
    m = as_matrix(w)
    norms, directions = polar(m if mode == "rows" else m.mH, (1,))
    cosines = _product(directions, directions.mH)
    size = cosines.shape[-1]
    return norms, directions, cosines - _on_diagonal(cosines), 1 / max(1, size * (size - 1))


def _keras_gradient(w: Tensor, factor: Scalar, *, mode: Literal["rows", "columns"] = "rows") -> Tensor:
    norms, directions, cosines, share = _cosines(w, mode)
    signs = sign(cosines)
    slopes = _product(signs, directions) - cosines.abs().sum(-1, keepdim=True) * directions
    slopes = 2 * factor * share * slopes / torch.where(norms == 0, torch.ones_like(norms), norms)
    return (slopes if mode == "rows" else slopes.mH).reshape(w.shape)


@penalty(
    gradient=_keras_gradient,
    proximal=_without_prox("keras_orthogonal"),
    metric=_without_prox("keras_orthogonal"),
    separable=False,
    bounds={"factor": _AT_LEAST_0},
)
def keras_orthogonal(w: Tensor, factor: Scalar = 0.01, *, mode: Literal["rows", "columns"] = "rows") -> Tensor:
    r"""The mean magnitude of cosines between rows, :math:`\frac{f}{m (m - 1)} \sum_{i \ne j} |\cos(w_i, w_j)|`.

    The numbers are those of `keras.regularizers.OrthogonalRegularizer`. Keras lays a dense matrix out the other way
    round: its columns, the units, are the rows here. One row alone, of which Keras makes 0 / 0, has value 0. It has no
    proximal operator.

    Args:
        factor: :math:`f`, at least 0.
        mode: `"rows"` or `"columns"`: what is to be orthogonal.

    Raises:
        ValueError: Another mode.

    Example:
        >>> keras_orthogonal({"weight": torch.tensor([[2.0, 0.0], [3.0, 4.0]])}, 0.5)
        tensor(0.3000)

    References:
        Chollet et al., *Keras*, 2015.
    """
    _, _, cosines, share = _cosines(w, mode)
    return factor * share * cosines.abs()


def _furthest_from_one(s: Tensor) -> Tensor:
    return (s.square() - 1).abs().amax(-1)


def _srip_slope(s: Tensor) -> Tensor:
    off = s.square() - 1
    top = (off.abs() == off.abs().amax(-1, keepdim=True)).to(s.dtype)
    return 2 * s * off.sign() * top / top.sum(-1, keepdim=True)


_furthest = _of_values(_furthest_from_one, _srip_slope)


@penalty(
    gradient=_on_values(_srip_slope), proximal=_without_prox("srip"), metric=_without_prox("srip"), separable=False
)
def srip(w: Tensor) -> Tensor:
    r"""Spectral restricted isometry, :math:`\max_i |\sigma_i(W)^2 - 1|`: the singular value that is furthest from 1.

    This is the spectral norm of :math:`W W^* - I`, or of :math:`W^* W - I` if it is the smaller matrix, exact where
    the paper iterates. It has no proximal operator.

    Example:
        >>> srip({"weight": torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.5, 0.0]])})
        tensor(3.)

    References:
        Bansal, Chen & Wang, *Can we gain more from orthogonality regularizations in training deep networks?*, 2018.
    """
    return _furthest(w)


def _hoyer_parts(w: Tensor, dim: Dim) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of magnitudes of each group over its norm, one over the norm, and its direction."""
    dims = group_dims(w, dim)
    norms, directions = polar(w, dims)
    ratios = directions.abs().sum(dims, keepdim=True) if dims else directions.abs()
    return ratios, 1 / torch.where(norms == 0, torch.ones_like(norms), norms), directions


def _hoyer_gradient(w: Tensor, *, dim: Dim = None) -> Tensor:
    ratios, inverse, directions = _hoyer_parts(w, dim)
    return 2 * ratios * (sign(w) - ratios * directions) * inverse


@penalty(
    gradient=_hoyer_gradient,
    proximal=_without_prox("hoyer_square"),
    metric=_without_prox("hoyer_square"),
    separable=False,
)
def hoyer_square(w: Tensor, *, dim: Dim = None) -> Tensor:
    r"""Sparsity whatever the scale, :math:`\left( \sum_i |w_i| \right)^2 / \sum_i w_i^2`.

    From 1 for one entry alone to the number of entries for equal magnitudes: a smooth count of those that are not 0.
    A leaf of zeros has value 0. It has no proximal operator.

    Args:
        dim: Dimensions that lie inside a group; by default each leaf is one group. See `l2_ball`.

    Example:
        >>> hoyer_square({"weight": torch.tensor([3.0, -4.0])})
        tensor(1.9600)

    References:
        Yang, Wen & Li, *DeepHoyer: learning sparser neural network with differentiable scale-invariant sparsity
        measures*, 2020.
    """
    return _hoyer_parts(w, dim)[0].square()
