"""Penalties that have a gradient and no proximal operator: rows near to orthogonal, and sparsity whatever the scale."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from funcreg.core._typing import Scalar
from funcreg.core.leafwise import readable, sign, squared
from funcreg.regularizers.grouped import polar
from funcreg.regularizers.lifting import penalty
from funcreg.regularizers.penalties import Dim, group_dims
from funcreg.regularizers.singular_values import as_matrix, matmul, of_values, on_values

_AT_LEAST_0 = (0.0, math.inf)


def _without_prox(name: str) -> Callable[..., Tensor]:
    def proximal(w: Tensor, *rest: Any, **options: Any) -> Tensor:
        raise ValueError(
            f"{name} has no proximal operator: it is not convex, and no closed form is known. Use its gradient: put it "
            "into the loss, or into a chain with add_penalty."
        )

    return proximal


def _gram(w: Tensor, smaller: bool, factors: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """A leaf as a matrix with fewer rows than columns if `smaller`, the products of its rows, and the unit of both.

    The unit is 1, or the largest entry where products of so many factors may be infinite, whose sums would be NaN. It
    is None where it is seen to be 1.
    """
    m, most = as_matrix(w), 2.0 ** (100 // factors)
    m = m.mH if smaller and m.shape[0] > m.shape[1] else m
    gram = matmul(m, m.mH)
    # No entry is larger than its row, whose square is on the diagonal: a look at that costs less than passes over all.
    if gram.numel() and readable(gram) and gram.detach().diagonal(dim1=-2, dim2=-1).real.amax().item() <= most * most:
        return m, gram, None
    largest = m.detach().abs().amax() if m.numel() else m.detach().abs().sum()
    unit = torch.where((largest > most) & (largest < math.inf), largest, torch.ones_like(largest))
    m = m / unit
    return m, matmul(m, m.mH), unit


def _out_of(unit: Tensor | None, x: Tensor, power: int) -> Tensor:
    """What was computed in a unit, as it is without: in steps, because a power of the unit may be infinite."""
    return x if unit is None else functools.reduce(torch.mul, [unit] * power, x)


def _on_diagonal(gram: Tensor) -> Tensor:
    return torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))


def _less_one(gram: Tensor, unit: Tensor | None) -> Tensor:
    one = torch.diag_embed(torch.ones_like(gram.diagonal(dim1=-2, dim2=-1)))
    return gram - (one if unit is None else one / unit / unit)


def _as_leaf(x: Tensor, w: Tensor) -> Tensor:
    """A matrix, or its transpose, in the shape of a leaf."""
    return (x if x.shape == as_matrix(w).shape else x.mH).reshape(w.shape)


def _orthogonality_gradient(w: Tensor) -> Tensor:
    m, gram, unit = _gram(w, True, 3)
    return _as_leaf(_out_of(unit, matmul(4 * _less_one(gram, unit), m), 3), w)


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
    _, gram, unit = _gram(w, True, 2)
    return squared(_out_of(unit, _less_one(gram, unit), 2))


def _offdiagonal_gradient(w: Tensor) -> Tensor:
    m, gram, unit = _gram(w, False, 3)
    return _out_of(unit, matmul(4 * (gram - _on_diagonal(gram)), m), 3).reshape(w.shape)


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
    _, gram, unit = _gram(w, False, 2)
    return squared(_out_of(unit, gram - _on_diagonal(gram), 2))


def _cosines(w: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """Norms and directions of the vectors, what their cosines are off the diagonal, and one over their pairs."""
    if mode not in ("rows", "columns"):
        raise ValueError(f"mode is {mode!r}; expected 'rows' or 'columns'")
    m = as_matrix(w)
    norms, directions = polar(m if mode == "rows" else m.mH, (1,))
    cosines = matmul(directions, directions.mH)
    size = cosines.shape[-1]
    return norms, directions, cosines - _on_diagonal(cosines), 1 / max(1, size * (size - 1))


def _keras_gradient(w: Tensor, factor: Scalar, *, mode: Literal["rows", "columns"] = "rows") -> Tensor:
    norms, directions, cosines, share = _cosines(w, mode)
    signs = sign(cosines)
    slopes = matmul(signs, directions) - cosines.abs().sum(-1, keepdim=True) * directions
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
    # In the order of the value; the square of a great one may leave the range of float32, and the others not.
    off = torch.where(s > 2, s + 1, (s.square() - 1).abs())
    top = (off == off.amax(-1, keepdim=True)).to(s.dtype)
    return 2 * s * (s - 1).sign() * top / top.sum(-1, keepdim=True)


_furthest = of_values(_furthest_from_one, _srip_slope)


@penalty(gradient=on_values(_srip_slope), proximal=_without_prox("srip"), metric=_without_prox("srip"), separable=False)
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
