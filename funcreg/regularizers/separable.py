"""Separable penalties that are squares near a point: capped ones, Huber's, and those anchored at given weights.

A weight for each leaf or entry is a tree that multiplies a penalty, `weights * l2`, a tree of steps, of strengths of a
transform, or of a hyperparameter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Scalar
from funcreg.core.leafwise import sign, squared, step_times, times
from funcreg.regularizers.composition import Structure
from funcreg.regularizers.grouped import finite
from funcreg.regularizers.lifting import penalty
from funcreg.regularizers.penalties import shrunk

_AT_LEAST_0 = (0.0, math.inf)


# Squares near zero, and so no rules on magnitudes, whose slope would be 0 at zero


def _mumford_shah_gradient(w: Tensor, alpha: Scalar, kappa: Scalar) -> Tensor:
    return torch.where(times(alpha, squared(w)) >= kappa, 0 * sign(w), times(2 * alpha, w))


def _mumford_shah_proximal(w: Tensor, step: Scalar, alpha: Scalar, kappa: Scalar) -> Tensor:
    size = w.abs()
    room = 1 + 2 * alpha * (torch.zeros_like(size) + step)
    # Divided by the size, whose square may leave the range of float32.
    return torch.where(alpha * size <= kappa * room / size, w / room, w) + 0.0  # +0.0 also from -0.0.


def _mumford_shah_residual(w: Tensor, g: Tensor, strength: Scalar, alpha: Scalar, kappa: Scalar) -> Tensor:
    return g + times(strength, _mumford_shah_gradient(w, alpha, kappa))


@penalty(
    gradient=_mumford_shah_gradient,
    proximal=_mumford_shah_proximal,
    residual=_mumford_shah_residual,
    structure=Structure(keeps=("signs",)),
    separable=True,
    bounds={"alpha": _AT_LEAST_0, "kappa": _AT_LEAST_0},
    convex=False,
)
def relaxed_mumford_shah(w: Tensor, alpha: Scalar, kappa: Scalar) -> Tensor:
    r"""Sum of capped squares, :math:`\sum_i \min(\alpha w_i^2, \kappa)`: the relaxed functional of Mumford and Shah.

    Small entries shrink as under `l2`, large ones cost no more and stay: of differences of neighbours, it smooths noise
    and keeps edges. It makes no zeros. Nonconvex.

    Args:
        alpha: :math:`\alpha` of the square, at least 0.
        kappa: :math:`\kappa`, the most that an entry costs, at least 0; infinite for `l2`.

    Example:
        >>> params = {"weight": torch.tensor([3.0, -1.0])}
        >>> relaxed_mumford_shah(params, 1.0, 2.0), relaxed_mumford_shah.prox(params, 1.0, 1.0, 2.0)
        (tensor(3.), {'weight': tensor([ 3.0000, -0.3333])})

    References:
        Mumford & Shah, *Optimal approximations by piecewise smooth functions and associated variational problems*,
        1989.
        Strekalovskiy & Cremers, *Real-time minimization of the piecewise smooth Mumford-Shah functional*, 2014.
    """
    return times(alpha, squared(w)).clamp(max=kappa)


def _huber_gradient(w: Tensor, delta: Scalar) -> Tensor:
    if w.is_complex():
        return torch.where(w.abs() <= delta, w, finite(delta, w) * sign(w))
    return _between(w, delta)


def _between(w: Tensor, delta: Scalar) -> Tensor:
    most: Any = delta  # The types of clamp know no such union.
    return w.clamp(-most, most)


def _huber_proximal(w: Tensor, step: Scalar, delta: Scalar) -> Tensor:
    square, line = w / (1 + step), w - step_times(step, finite(delta, w)) * sign(w)
    return torch.where(w.abs() <= (1 + step) * delta, square, line) + 0.0  # +0.0 also from -0.0.


def _huber_residual(w: Tensor, g: Tensor, strength: Scalar, delta: Scalar) -> Tensor:
    return g + times(strength, _huber_gradient(w, delta))


@penalty(
    gradient=_huber_gradient,
    proximal=_huber_proximal,
    residual=_huber_residual,
    separable=True,
    bounds={"delta": _AT_LEAST_0},
)
def huber(w: Tensor, delta: Scalar) -> Tensor:
    r"""Huber's function: `half_l2` up to a width, a straight line of slope :math:`\delta` beyond.

    .. math::
        \sum_i \frac{1}{2} c_i^2 + \delta (|w_i| - c_i), \quad c_i = \min(|w_i|, \delta)

    The form of `torch.nn.functional.huber_loss`. Large weights are pulled no more than by `l1`; it makes no zeros.

    Args:
        delta: Width :math:`\delta` of the square, and slope of the line, at least 0; infinite for `half_l2`.

    Example:
        >>> params = {"weight": torch.tensor([3.0, -0.5])}
        >>> huber(params, 1.0), huber.prox(params, 1.0, 1.0)
        (tensor(2.6250), {'weight': tensor([ 2.0000, -0.2500])})

    References:
        Huber, *Robust estimation of a location parameter*, 1964.
    """
    # Of numbers with their signs: the second derivative of magnitudes is 0 at zero.
    size = w.abs() if w.is_complex() else w
    capped = size.clamp(max=delta) if w.is_complex() else _between(w, delta)
    return capped * (size - capped / 2)


# Anchored at given weights


def _anchored_l1_gradient(w: Tensor, anchor: Scalar) -> Tensor:
    return sign(w - anchor)


def _anchored_l1_proximal(w: Tensor, step: Scalar, anchor: Scalar) -> Tensor:
    change = w - anchor
    # The anchor itself, not the sum of a difference, so that weights return to it exactly.
    return torch.where(change.abs() <= step, anchor, w - step * sign(change)) + 0.0  # +0.0 also from -0.0.


def _anchored_l1_residual(w: Tensor, g: Tensor, strength: Scalar, anchor: Scalar) -> Tensor:
    change = w - anchor
    return torch.where(change == 0, shrunk(g, strength), g + times(strength, sign(change)))


@penalty(
    gradient=_anchored_l1_gradient,
    proximal=_anchored_l1_proximal,
    residual=_anchored_l1_residual,
    separable=True,
)
def anchored_l1(w: Tensor, anchor: Scalar) -> Tensor:
    r"""Sum of distances to given weights, :math:`\sum_i |w_i - a_i|`, which brings most of them back exactly.

    Fine-tuning with it changes few weights of a pretrained model. `anchored_l1(params, 0)` is `l1(params)`.

    Args:
        anchor: :math:`a`: a tree like the parameters, a prefix of one, or a number.

    Example:
        >>> params, pretrained = {"weight": torch.tensor([3.0, 0.5])}, {"weight": torch.tensor([1.0, 0.75])}
        >>> anchored_l1(params, pretrained), anchored_l1.prox(params, 0.5, pretrained)
        (tensor(2.2500), {'weight': tensor([2.5000, 0.7500])})

    References:
        Li, Grandvalet & Davoine, *Explicit inductive bias for transfer learning with convolutional networks*, 2018.
    """
    return (w - anchor).abs()


def _towards(w: Tensor, anchor: Scalar, pull: Scalar) -> Tensor:
    """Where :math:`|z - w|^2 + \text{pull} |z - a|^2` is least; all of a sum of 1, so that the anchor is kept."""
    kept = 1 / (1 + pull + torch.zeros_like(w.abs()))
    return w * kept + anchor * (1 - kept) + 0.0  # +0.0 also from -0.0.


def _anchored_l2_gradient(w: Tensor, anchor: Scalar) -> Tensor:
    return 2 * (w - anchor)


def _anchored_l2_proximal(w: Tensor, step: Scalar, anchor: Scalar) -> Tensor:
    return _towards(w, anchor, 2 * step)


def _anchored_l2_residual(w: Tensor, g: Tensor, strength: Scalar, anchor: Scalar) -> Tensor:
    return g + times(strength, _anchored_l2_gradient(w, anchor))


@penalty(
    gradient=_anchored_l2_gradient,
    proximal=_anchored_l2_proximal,
    residual=_anchored_l2_residual,
    structure=Structure(curvature=lambda anchor: 2.0),
    separable=True,
)
def anchored_l2(w: Tensor, anchor: Scalar) -> Tensor:
    r"""Sum of squared distances to given weights, :math:`\sum_i (w_i - a_i)^2`. No factor one half.

    `anchored_l2(params, 0)` is `l2(params)`. The L2-SP of Li, Grandvalet & Davoine has a factor one half, as
    `ewc(params, anchor, 1)` has.

    Args:
        anchor: :math:`a`: a tree like the parameters, a prefix of one, or a number.

    Example:
        >>> params, pretrained = {"weight": torch.tensor([3.0, 0.5])}, {"weight": torch.tensor([1.0, 0.5])}
        >>> anchored_l2(params, pretrained), anchored_l2.prox(params, 0.5, pretrained)
        (tensor(4.), {'weight': tensor([2.0000, 0.5000])})

    References:
        Li, Grandvalet & Davoine, *Explicit inductive bias for transfer learning with convolutional networks*, 2018.
    """
    return squared(w - anchor)


def _ewc_gradient(w: Tensor, anchor: Scalar, fisher: Scalar) -> Tensor:
    return fisher * (w - anchor)


def _ewc_proximal(w: Tensor, step: Scalar, anchor: Scalar, fisher: Scalar) -> Tensor:
    return _towards(w, anchor, step_times(step, fisher))


def _ewc_residual(w: Tensor, g: Tensor, strength: Scalar, anchor: Scalar, fisher: Scalar) -> Tensor:
    return g + times(strength, _ewc_gradient(w, anchor, fisher))


@penalty(
    gradient=_ewc_gradient,
    proximal=_ewc_proximal,
    residual=_ewc_residual,
    structure=Structure(curvature=lambda anchor, fisher: fisher),
    separable=True,
    bounds={"fisher": _AT_LEAST_0},
)
def ewc(w: Tensor, anchor: Scalar, fisher: Scalar) -> Tensor:
    r"""Elastic weight consolidation, :math:`\frac{1}{2} \sum_i F_i (w_i - a_i)^2`.

    It holds the weights that an earlier task needs. The proximal operator is stable for any :math:`F`, where a
    gradient step diverges as soon as its size times :math:`F` is above 2.

    Args:
        anchor: :math:`a`, the weights of the earlier task: a tree like the parameters, a prefix of one, or a number.
        fisher: :math:`F`, the diagonal of the Fisher information there, at least 0: a tree, a prefix or a number.

    Example:
        >>> params = {"weight": torch.tensor([3.0, 0.5])}
        >>> anchor, fisher = {"weight": torch.tensor([1.0, 1.0])}, {"weight": torch.tensor([3.0, 0.0])}
        >>> ewc(params, anchor, fisher), ewc.prox(params, 1.0, anchor, fisher)
        (tensor(6.), {'weight': tensor([1.5000, 0.5000])})

    References:
        Kirkpatrick et al., *Overcoming catastrophic forgetting in neural networks*, 2017.
    """
    return fisher * squared(w - anchor) / 2
