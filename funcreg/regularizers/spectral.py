"""Penalties and constraints of singular values: sums, powers and bounds of them, and the rank."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Scalar
from funcreg.core.arguments import ABOVE_0, AT_LEAST_0
from funcreg.core.construction import remembered
from funcreg.core.leafwise import times
from funcreg.regularizers.composition import varies
from funcreg.regularizers.concave import l0_envelope, mcp
from funcreg.regularizers.constraint import constraint
from funcreg.regularizers.constraints import share, simplex_excess
from funcreg.regularizers.lifting import penalty
from funcreg.regularizers.magnitudes import l_half, l_two_thirds
from funcreg.regularizers.penalties import l1, l2, shrunk
from funcreg.regularizers.penalty import Penalty, Sum
from funcreg.regularizers.singular_values import as_matrix, decompose, matmul, of_values, on_values, one_per_matrix

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


_sum, _directions, _polar_factor = of_values(_sum_of_values, _rank), on_values(_rank), on_values(_all_one)
_shrunk, _within_sum = on_values(shrunk), on_values(shrunk, _level)
_cut_off, _levelled = on_values(_clipped), on_values(_clipped, _level)


def _nuclear_proximal(w: Tensor, step: Scalar) -> Tensor:
    return _shrunk(w, one_per_matrix(step, "step"))


def _beside(slopes: Tensor, turns: Tensor) -> Tensor:
    """What the singular vectors of a matrix do not reach, and is free to be shrunk."""
    beside = slopes - matmul(turns, matmul(turns.mH, slopes))
    return beside - matmul(matmul(beside, turns.mH), turns)


def _nuclear_residual(w: Tensor, g: Tensor, strength: Scalar) -> Tensor:
    if not w.numel():
        return g.clone()
    turns, slopes = as_matrix(_directions(w)), as_matrix(g)
    beside = _beside(slopes, turns)
    return (slopes + times(strength, turns) - beside + _nuclear_proximal(beside, strength)).reshape(w.shape)


@penalty(gradient=_directions, proximal=_nuclear_proximal, residual=_nuclear_residual, separable=False)
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


_largest, _largest_directions = of_values(_largest_value, _is_largest), on_values(_is_largest)


def _spectral_proximal(w: Tensor, step: Scalar) -> Tensor:
    return _levelled(w, one_per_matrix(step, "step"))


@penalty(gradient=_largest_directions, proximal=_spectral_proximal, separable=False)
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
    terms = g.terms if isinstance(g, Sum) else ()
    if any([term.mask is not None or varies((*term.factors, *term.hyper)) for term in terms]):
        raise ValueError(
            f"penalty is {g!r} with weights for entries or a mask; expected one that treats all singular values alike. "
            "Multiply the lifted penalty, as in weights * on_singular_values(l1), with a number for each leaf."
        )

    def steep(s: Tensor, *hyper: Any, **options: Any) -> Tensor:
        # Infinite slopes along several singular vectors would meet as differences of infinities.
        return g.grad(s, *hyper, **options).clamp(max=torch.finfo(s.dtype).max / s.numel())

    slope, shrunk, whole = on_values(steep), on_values(g.prox), of_values(g, g.grad)
    names = tuple(inspect.signature(g).parameters)[1:]

    def ones(hyper: tuple[Any, ...]) -> list[Any]:
        return [one_per_matrix(value, name) for value, name in zip(hyper, names, strict=False)]

    def gradient(w: Tensor, *hyper: Any, **options: Any) -> Tensor:
        return slope(w, *ones(hyper), **options)

    def proximal(w: Tensor, step: Scalar, *hyper: Any, **options: Any) -> Tensor:
        return shrunk(w, one_per_matrix(step, "step"), *ones(hyper), **options)

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
    return _power(p).prox(w, step)


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


@penalty(
    gradient=_mcp.grad,
    proximal=_mcp.prox,
    separable=False,
    bounds={"strength": AT_LEAST_0, "gamma": ABOVE_0},
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
    return _mcp(w, strength, gamma)


_envelope = on_singular_values(l0_envelope)


@penalty(
    gradient=_envelope.grad,
    proximal=_envelope.prox,
    separable=False,
    bounds={"gamma": ABOVE_0},
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
    return _envelope(w, gamma)


# Constraints


def _spectral_ball_normal(w: Tensor, g: Tensor, slack: Scalar, radius: Scalar = 1.0) -> Tensor:
    if not w.numel():
        return g.clone()
    m, slopes, radius = as_matrix(w), as_matrix(g), one_per_matrix(radius, "radius")
    finite, u, s, vh = decompose(m)
    met = (s >= radius - slack * s.amax()).to(s.dtype)
    # Normals are the positive semidefinite combinations of pairs of singular vectors whose values meet the bound.
    u, vh = u * met, met.unsqueeze(-1) * vh
    push = -matmul(matmul(u.mH, slopes), vh.mH)
    sizes, ways = torch.linalg.eigh((push + push.mH) / 2)
    normal = matmul(matmul(u, matmul(ways * sizes.relu(), ways.mH)), vh)
    left = torch.where(torch.zeros_like(s.amax()) + radius == 0, torch.zeros_like(slopes), slopes + normal)
    return torch.where(finite, left, torch.full_like(left, math.nan)).reshape(w.shape)


@constraint(bounds={"radius": AT_LEAST_0}, residual=_spectral_ball_normal)
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
    return _cut_off(w, one_per_matrix(radius, "radius"))


def _nuclear_ball_normal(w: Tensor, g: Tensor, slack: Scalar, radius: Scalar = 1.0) -> Tensor:
    if not w.numel():
        return g.clone()
    radius = one_per_matrix(radius, "radius")
    finite, u, s, vh = decompose(as_matrix(w))
    kept = (s > 0).to(s.dtype)
    turns, slopes = matmul(u * kept, vh), as_matrix(g)
    push = -(turns.conj() * slopes).real.sum() if slopes.is_complex() else -(turns * slopes).sum()
    beside = torch.linalg.svd(_beside(slopes, turns), full_matrices=False)[1]
    # Normals are multiples of subgradients of the nuclear norm: the residual of its best strength.
    level = share(beside, push.unsqueeze(-1), kept.sum().clamp(min=1))[0]
    level = torch.where(s.sum() >= radius - slack * s.sum(), level.relu(), torch.zeros_like(level))
    left = as_matrix(_nuclear_residual(w, g, level))
    left = torch.where(torch.zeros_like(level) + radius == 0, torch.zeros_like(left), left)
    return torch.where(finite, left, torch.full_like(left, math.nan)).reshape(w.shape)


@constraint(bounds={"radius": AT_LEAST_0}, residual=_nuclear_ball_normal)
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
    return _within_sum(w, one_per_matrix(radius, "radius"))


def _stiefel_normal(w: Tensor, g: Tensor, slack: Scalar) -> Tensor:
    if not w.numel():
        return g.clone()
    m, slopes = as_matrix(w), as_matrix(g)
    wide = m.shape[0] < m.shape[1]
    m, slopes = (m.mH, slopes.mH) if wide else (m, slopes)
    along = matmul(m.mH, slopes)
    left = slopes - matmul(m, (along + along.mH) / 2)
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
