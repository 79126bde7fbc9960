"""Constraints of matrices whose entries are at least 0, and whose rows and columns have given sums.

Which entries are positive is found by Newton's method on the dual problem; with these the projection is linear, and is
computed once more in closed form, with its derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Scalar
from funcreg.core.arguments import FINITE
from funcreg.core.equations import solved
from funcreg.core.leafwise import exact_dtype
from funcreg.core.ranges import concrete, known_true
from funcreg.regularizers.constraint import constraint
from funcreg.regularizers.constraints import simplex_excess
from funcreg.regularizers.singular_values import as_matrix


def _shares(weights: Any, m: Tensor, along: int) -> Tensor:
    """What part of the whole is in each row, or column."""
    size = m.shape[along]
    if weights is None:
        return torch.full((size,), 1 / max(size, 1), dtype=m.dtype, device=m.device)
    found = torch.as_tensor(weights, dtype=m.dtype, device=m.device)
    if found.shape != (size,):
        name = ("rows", "columns")[along]
        raise ValueError(f"{name} has shape {tuple(found.shape)}; expected ({size},), one for each of the {name}")
    if concrete(found) is not None and not (bool((found >= 0).all()) and 0 < found.sum() < torch.inf):
        name = ("rows", "columns")[along]
        raise ValueError(f"{name} is {found.tolist()}; expected shares of at least 0, not all of them 0")
    return found / found.sum()


def _thresholds(x: Tensor, total: Tensor) -> Tensor:
    r"""The number :math:`\tau` of :math:`\sum_i (x_i - \tau)_+ = t` along the last dimension, which is kept."""
    left = simplex_excess(x, total)
    top = x.argmax(-1, keepdim=True)
    return x.gather(-1, top) - left.gather(-1, top)


def _plan(m: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    r"""The nearest :math:`X = (W - \alpha_i - \beta_j)_+` whose rows and columns have given sums; NaN if none is found.

    With what is positive there the equations are linear.
    """
    if 1 in m.shape:
        only = rows.unsqueeze(-1) * columns / torch.where(rows.sum() == 0, torch.ones_like(rows.sum()), rows.sum())
        return torch.where(m.isnan(), m, only)
    is_known = ~m.isnan().any()
    # What does not carry anything is far below all else, and never positive.
    empty = (rows.unsqueeze(-1) == 0) | (columns == 0)
    m = torch.where(empty, m.amin() - 2 * (m.amax() - m.amin() + rows.sum() + 1), m)
    alpha, beta = _duals(m.detach(), rows, columns)
    start = m - alpha.unsqueeze(-1) - beta
    positive = start > 0
    x = torch.where(positive, start, torch.zeros_like(start))
    for _ in range(3):  # The first has the derivative; the others take away its rounding.
        off = _off_by(x, rows, columns)
        to_alpha, to_beta = _solved(positive, off, torch.zeros_like(off[0]) + _little(m))
        x = torch.where(positive, (x - to_alpha.unsqueeze(-1) - to_beta).relu(), torch.zeros_like(x))
    found = _off_by(x, rows, columns).abs().amax() <= 1e-3 * torch.maximum(rows.amax(), columns.amax())
    return torch.where(found & is_known, x, torch.full_like(x, math.nan))


def _off_by(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return torch.cat([x.sum(-1) - rows, x.sum(-2) - columns])


def _duals(m: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    r"""The multipliers :math:`\alpha_i, \beta_j` of a plan.

    Regularized steps of Newton's method on the dual problem, each of the best of some lengths, and sweeps over rows and
    columns between them. Where entries lie far apart beside the sums, few are positive, and the equations fall apart.
    So sums as large as the entries come first, and smaller ones as soon as those are nearly reached. Where numbers can
    be read it ends when all is exact to rounding.

    References:
        Li, Sun & Toh, *On the efficient computation of a generalized Jacobian of the projector over the Birkhoff
        polytope*, 2020.
    """
    alpha, beta = torch.zeros_like(m[:, 0]), torch.zeros_like(m[0])
    lengths = torch.cat([4.0 ** -torch.arange(15, dtype=m.dtype, device=m.device), torch.zeros_like(beta[:1])])
    best, least = (alpha, beta), torch.full_like(rows.sum(), math.inf)
    rounding = 2 * torch.finfo(m.dtype).eps * (m.abs().amax() + rows.amax() + columns.amax())
    spread, whole = m.amax() - m.amin(), rows.sum()
    factor = (spread * max(m.shape) / torch.where(whole == 0, torch.ones_like(whole), whole)).clamp(min=1.0)
    near = torch.where(rows > 0, rows, math.inf).amin() / 10
    is_lost = m.isnan().any()
    for _ in range(_MANY if concrete(m) is not None else min(100, 10 + 2 * sum(m.shape))):
        r, c = factor * rows, factor * columns
        alpha = _thresholds(m - beta, r.unsqueeze(-1)).squeeze(-1)
        beta = _thresholds((m - alpha.unsqueeze(-1)).mT, c.unsqueeze(-1)).squeeze(-1)
        x = (m - alpha.unsqueeze(-1) - beta).relu()
        off = _off_by(x, r, c)
        # What is in no positive entry moves by what is added, which is to be as far as entries lie apart.
        little = (off.abs().amax() / (10 * (spread + r.amax()))).clamp(max=1e-2, min=_little(m))
        turns = [x + lengths.unsqueeze(-1) * d for x, d in zip((alpha, beta), _solved(x > 0, off, little), strict=True)]
        x = (m - turns[0].unsqueeze(-1) - turns[1].unsqueeze(-2)).relu()
        worth = x.square().sum((-2, -1)) / 2 + (turns[0] * r).sum(-1) + (turns[1] * c).sum(-1)
        chosen = worth.argmin().reshape(1)
        alpha, beta = (turn.index_select(0, chosen).squeeze(0) for turn in turns)
        now = _off_by((m - alpha.unsqueeze(-1) - beta).relu(), r, c).abs().amax()
        last, ends = least, factor == 1
        better = ends & (now < least)
        best = torch.where(better, alpha, best[0]), torch.where(better, beta, best[1])
        least = torch.where(better, now, least)
        if known_true(is_lost | (ends & (torch.maximum(now, last) <= rounding))):
            break
        factor = torch.where(now <= torch.maximum(near * factor, rounding), (factor / 4).clamp(min=1.0), factor)
    return best


#: Most steps where numbers can be read; elsewhere all of fewer ones are made.
_MANY = 400


def _little(m: Tensor) -> float:
    return torch.finfo(m.dtype).eps ** 0.6


def _solved(positive: Tensor, off: Tensor, little: Tensor) -> tuple[Tensor, Tensor]:
    """What to take from the positive entries of rows and columns that are off by so much.

    A number may go from rows to columns, so that equations depend on each other: a little is added.
    """
    there = positive.to(off.dtype)
    upper = torch.cat([torch.diag_embed(there.sum(-1)), there], -1)
    gram = torch.cat([upper, torch.cat([there.mT, torch.diag_embed(there.sum(-2))], -1)], -2)
    found = solved(gram + torch.diag_embed(torch.zeros_like(off) + little), off)
    return found[: there.shape[0]], found[there.shape[0] :]


def _transported(w: Tensor, total: Scalar | None, rows: Any, columns: Any) -> Tensor:
    if not w.numel():
        return w.clone()
    m = as_matrix(w)
    m = m.to(exact_dtype(m))
    r, c = _shares(rows, m, 0), _shares(columns, m, 1)
    if total is None:
        found = _plan(m, m.shape[0] * r, m.shape[0] * c)
    else:
        whole, little = torch.as_tensor(total, dtype=m.dtype, device=m.device), _small_total(m)
        some = torch.where(whole == 0, little, whole)
        found = _plan(m, some * r, some * c)
        # A plan of nothing has the derivative of a small one, which is a multiple of its sum.
        slopes = found.detach() / little
        slopes = torch.where(slopes.isnan() & ~m.isnan().any(), 0.0, slopes)  # As nothing is a plan in any case.
        found = torch.where(whole == 0, whole * slopes, found)
    return found.to(w.dtype).reshape(w.shape)


def _small_total(m: Tensor) -> Tensor:
    """A sum beside which entries lie far apart, so far as such a plan is found."""
    spread = (m.amax() - m.amin()).detach()
    return torch.where(spread > 0, spread * (1e-6 if concrete(m) is not None else 1e-2), torch.ones_like(spread))


def _turned(w: Tensor, g: Tensor, total: Scalar | None, rows: Any, columns: Any) -> Tensor:
    """The gradient without what rows, columns and bounds take up, by which entries a small step leaves positive."""
    if not w.numel():
        return g.clone()
    m, slope = as_matrix(w), as_matrix(g)
    steepest = slope.abs().amax()
    small = torch.finfo(m.dtype).eps ** 0.5 * m.abs().mean() / torch.where(steepest == 0, 1.0, steepest)
    positive = as_matrix(_transported(w - small * g, total, rows, columns)) > 0
    left = torch.where(positive, slope, torch.zeros_like(slope))
    for _ in range(3):
        off = torch.cat([left.sum(-1), left.sum(-2)])
        to_rows, to_columns = _solved(positive, off, torch.zeros_like(off[0]) + _little(m))
        left = torch.where(positive, left - to_rows.unsqueeze(-1) - to_columns, torch.zeros_like(left))
    return left.reshape(w.shape)


def _transport_normal(
    w: Tensor, g: Tensor, slack: Scalar, total: Scalar = 1.0, *, rows: Any = None, columns: Any = None
) -> Tensor:
    return _turned(w, g, total, rows, columns)


def _birkhoff_normal(w: Tensor, g: Tensor, slack: Scalar) -> Tensor:
    return _turned(w, g, None, None, None)


@constraint(bounds={"total": FINITE}, real=True, residual=_transport_normal)
def transport(w: Tensor, total: Scalar = 1.0, *, rows: Any = None, columns: Any = None) -> Tensor:
    r"""Transport plans: entries of at least 0 whose rows, and columns, have given sums.

    .. math:: W_{ij} \ge 0, \quad \sum_j W_{ij} = t \, r_i, \quad \sum_i W_{ij} = t \, c_j

    Each leaf is a matrix of rows, as for `nuclear`. The projection has exact zeros, unlike Sinkhorn's scaling. Up to
    some hundred steps of Newton's method find which entries are positive, each of which solves for as many numbers as
    the leaf has rows and columns: enough also where entries are a million times as far apart as the sums are large.
    The projection is exact to rounding then, and NaN if it is not found: inside of `vmap`, of compiled code and on a
    GPU, where numbers cannot be read, it takes fewer steps, enough for some hundred times.

    Args:
        total: :math:`t`, the sum of all entries, at least 0.
        rows: Shares :math:`r` of the rows, numbers of at least 0, divided by their sum; None for equal ones.
        columns: Shares :math:`c` of the columns; None for equal ones.

    Raises:
        ValueError: Shares do not fit the rows or columns of a leaf, one is negative, or all are 0.

    Example:
        >>> plan = transport.project(torch.tensor([[1.0, 0.0], [0.2, 0.4]]), 1.0, rows=[0.5, 0.5], columns=[0.75, 0.25])
        >>> plan
        tensor([[0.5000, 0.0000],
                [0.2500, 0.2500]])

    References:
        Blondel, Seguy & Rolet, *Smooth and sparse optimal transport*, 2018.
    """
    return _transported(w, total, rows, columns)


@constraint(real=True, residual=_birkhoff_normal)
def birkhoff(w: Tensor) -> Tensor:
    r"""Doubly stochastic matrices, :math:`W_{ij} \ge 0` with rows and columns that sum to 1: soft permutations.

    The corners of this polytope are the permutations. A leaf with more columns than rows, or fewer, has rows that sum
    to 1 and columns that are equal in sum. See `transport`.

    Example:
        >>> birkhoff.project(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([[1., 0.],
                [0., 1.]])

    References:
        Birkhoff, *Tres observaciones sobre el algebra lineal*, 1946.
    """
    return _transported(w, None, None, None)
