"""The singular values of a leaf: its decomposition as a matrix, and rules on its values with derivatives of their own.

A leaf is read as a matrix, its first dimension against all others: the filters of a convolution are rows, a vector
is one column. Derivatives go through divided differences of the rule on singular values, not through those of
singular vectors, and so are finite also where singular values are equal or zero. A leaf that holds NaN or infinities
has no singular values: all that is made of it is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Scalar
from funcreg.core.leafwise import squared, without_autocast
from funcreg.core.undocumented import forward_depth, read_once

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


def forward_once() -> None:
    """Raise an error inside of a forward derivative of a forward derivative, of which torch makes 0 here."""
    if forward_depth() > 1:
        raise NotImplementedError(
            "what is computed with matrices has no forward derivative of a forward derivative, as jvp of jvp or "
            "jacfwd(jacfwd(f)) take; expected one of them in reverse: torch.func.hessian(f), or jacfwd(jacrev(f))"
        )


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
        return matmul(g, b.mH), matmul(a.mH, g)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        forward_once()
        (da, db), (a, b) = grad_inputs, ctx.saved_tensors
        parts = [matmul(x, y) for x, y in ((da, b), (a, db)) if x is not None and y is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


@whole
def matmul(a: Tensor, b: Tensor) -> Tensor:
    made: Any = _Product.apply(a, b)
    return made


def decompose(w: Tensor) -> Parts:
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
    inside = matmul(matmul(uh, d), v)
    turned = (differences * (inside + inside.mH) + sums * (inside - inside.mH)) / 2
    left = (matmul(d, v) - matmul(u, inside)) * ratios
    right = ratios.unsqueeze(-1) * (matmul(uh, d) - matmul(inside, vh))
    whole = matmul(u, matmul(turned, vh) + right) + matmul(left, vh)
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


# The functions below take a matrix and what `decompose` made of it, and hand all of their derivative to the matrix:
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
        along = matmul(matmul(u.mH, g), vh.mH).diagonal(dim1=-2, dim2=-1)
        along = along.real if along.is_complex() else along
        pulled = _pull_hyper(ctx.rule, s, hyper, along)
        return None, _derivative(ctx.rule, parts, hyper, g), None, None, None, None, *pulled

    @staticmethod
    @without_autocast
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        forward_once()
        (_, d, _, _, _, _, *tangents), (_, parts, hyper) = grad_inputs, _kept(ctx)
        finite, u, s, vh = parts
        moved = matmul(u * _push_hyper(ctx.rule, s, hyper, tangents), vh)
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
        forward_once()
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
        return matmul(u * g, vh), None, None, None, None

    @staticmethod
    @without_autocast
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        forward_once()
        (d, *_), (_, (_, u, s, vh), _) = grad_inputs, _kept(ctx)
        along = matmul(matmul(u.mH, d), vh.mH).diagonal(dim1=-2, dim2=-1)
        return (along.real if along.is_complex() else along).to(s.dtype)


#: Typed as what they return, which torch leaves open.
_values: Callable[..., Tensor] = _Values.apply
_apply: Callable[..., Tensor] = _Apply.apply
_measure: Callable[..., Tensor] = _Measure.apply


def on_values(rule: Rule, common: Rule | None = None) -> Callable[..., Tensor]:
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
        parts = decompose(m)
        hyper = hyper if common is None else (common(_values(m, *parts), *hyper),)
        return _apply(partial(rule, **options), m, *parts, *hyper).reshape(w.shape)

    return applied


def of_values(rule: Rule, slope: Rule) -> Callable[..., Tensor]:
    """The same for a number made of singular values by a rule whose gradient is another; 0 for an empty leaf."""

    @whole
    def measured(w: Tensor, *hyper: Any, **options: Any) -> Tensor:
        if not w.numel():
            return squared(w).sum()
        m = as_matrix(w)
        return _measure(partial(rule, **options), partial(slope, **options), m, *decompose(m), *hyper)

    return measured


def one_per_matrix(value: Scalar, name: str) -> Scalar:
    """A hyperparameter of a whole matrix, without dimensions."""
    if isinstance(value, Tensor) and value.ndim:
        if value.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected one number for each matrix")
        return value.reshape(())
    return value
