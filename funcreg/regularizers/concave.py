"""Penalties that level off: concave functions of magnitudes, between `l1` and `l0`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from funcreg.core._typing import Scalar
from funcreg.core.arguments import ABOVE_0, AT_LEAST_0
from funcreg.core.leafwise import held, safe_sqrt, sign, step_times, times
from funcreg.regularizers.magnitudes import of_magnitudes


def _nearer_than_zero(point: Tensor, worth: Tensor, pull: Tensor) -> Tensor:
    r"""Whether a stationary point lies lower than zero, where both are minima.

    Args:
        point: :math:`z` of at least 0.
        worth: :math:`\text{step} \cdot \phi(z) / z`.
        pull: :math:`\text{step} \cdot \phi'(z)`, by which the point is off.
    """
    return ~(worth >= point / 2 + pull)  # Divided by the point, so that an infinite one is kept.


def log_sum_slope(size: Tensor, epsilon: Scalar) -> Tensor:
    return 1 / (epsilon + size)


def log_sum_landing(size: Tensor, step: Scalar, epsilon: Scalar) -> Tensor:
    step, reach = torch.zeros_like(size) + step, size + epsilon
    real = ~(step / reach / reach >= 1 / 4)  # Up to here there is no stationary point but zero.
    step = torch.where(real & (reach < math.inf), step, torch.zeros_like(step))
    # In units of the reach, whose square may leave the range of float32.
    root = (1 - 4 * (step / reach / reach)).sqrt()
    point = (size - 2 * step / reach / (1 + root)).relu()
    # Past a step of epsilon^2 zero and the stationary point are both minima.
    worth = step / point * torch.log1p(point / epsilon)
    alive = real & _nearer_than_zero(point, worth, step / (epsilon + point))
    return torch.where(alive, point, torch.zeros_like(point))


@of_magnitudes(log_sum_slope, log_sum_landing, bounds={"epsilon": ABOVE_0})
def log_sum(w: Tensor, epsilon: Scalar) -> Tensor:
    r"""Sum of logarithms, :math:`\sum_i \log(1 + |w_i| / \epsilon)`.

    Between `l1` and `l0`: the slope falls from :math:`1 / \epsilon` at 0 to none. The proximal operator is
    continuous up to a step of :math:`\epsilon^2`; past it, it jumps. Nonconvex.

    Args:
        epsilon: Width of the dip at zero, above 0; the smaller, the nearer to `l0`.

    Example:
        >>> params = {"weight": torch.tensor([3.0, -0.5])}
        >>> log_sum(params, 1.0), log_sum.prox(params, 1.0, 1.0)
        (tensor(1.7918), {'weight': tensor([2.7321, 0.0000])})

    References:
        Candes, Wakin & Boyd, *Enhancing sparsity by reweighted l1 minimization*, 2008.
        Prater-Bennette, Shen & Tripp, *The proximity operator of the log-sum penalty*, 2022.
    """
    return torch.log1p(w.abs() / epsilon)


def _lambert(x: Tensor) -> Tensor:
    r"""The greater root :math:`v - 1` of :math:`(v - 1) e^{v - 1} = -x`, for :math:`x` from 0 to 1 / e."""
    # A series around the point where both roots meet, then four steps of Halley's method.
    near = safe_sqrt((2 - 2 * math.e * x).relu())
    v = near - near.square() / 3 + 11 / 72 * near * near.square()
    for _ in range(4):
        growth = (v - 1).exp()
        off = (v - 1) * growth + x
        below = 2 * v.square() * growth - (v + 1) * off
        v = v - 2 * v * off / torch.where(below == 0, torch.ones_like(below), below)
    return v - 1


def etp_scale(size: Tensor, gamma: Scalar) -> Tensor:
    return -1 / torch.expm1(-torch.as_tensor(gamma, dtype=size.dtype, device=size.device))


def etp_slope(size: Tensor, gamma: Scalar) -> Tensor:
    return times(gamma, etp_scale(size, gamma) * _decay(size, gamma))


def _decay(size: Tensor, gamma: Scalar) -> Tensor:
    return torch.exp(-times(gamma, size))


def etp_landing(size: Tensor, step: Scalar, gamma: Scalar) -> Tensor:
    step = torch.zeros_like(size) + step
    height, decay = step * etp_scale(size, gamma), _decay(size, gamma)
    force = times(gamma, height).clamp(max=torch.finfo(size.dtype).max)  # Or what has decayed to nothing is NaN.
    real = ~(times(gamma, force * decay) > 1 / math.e) & ~(step == math.inf)  # Beyond, zero is the only minimum.
    force, height = (torch.where(real, x, torch.zeros_like(x)) for x in (force, height))
    root = size + _lambert(times(gamma, force * decay)) / gamma
    # The equation of the root once more: exact without a step.
    point = (size - force * _decay(root, gamma)).relu()
    worth = height * -torch.expm1(-times(gamma, point)) / point
    alive = real & _nearer_than_zero(point, worth, force * _decay(point, gamma))
    return torch.where(alive, point, torch.zeros_like(point))


@of_magnitudes(etp_slope, etp_landing, bounds={"gamma": ABOVE_0})
def etp(w: Tensor, gamma: Scalar) -> Tensor:
    r"""Exponential-type penalty, :math:`\sum_i (1 - e^{-\gamma |w_i|}) / (1 - e^{-\gamma})`, which levels off.

    Between `l1`, for a small :math:`\gamma`, and `l0`, for a great one; 1 at a weight of 1. The proximal operator is
    continuous while :math:`\text{step} \cdot \gamma^2 \le 1 - e^{-\gamma}`, and jumps beyond. Nonconvex.

    Args:
        gamma: :math:`\gamma`, how fast it levels off, above 0.

    Example:
        >>> params = {"weight": torch.tensor([3.0, -0.5])}
        >>> etp(params, 1.0), etp.prox(params, 1.0, 1.0)
        (tensor(2.1257), {'weight': tensor([2.9142, 0.0000])})

    References:
        Gao, Wang, Yu & Zhang, *A feasible nonconvex relaxation approach to feature selection*, 2011.
    """
    reach = times(gamma, w.abs())
    # The derivative of expm1 is rounded at 1, and that of exp at itself.
    risen = torch.where(reach < 1, -torch.expm1(-reach.clamp(max=1)), 1 - torch.exp(-reach))
    return etp_scale(w.abs(), gamma) * risen


def geman_slope(size: Tensor, gamma: Scalar) -> Tensor:
    return 1 / (1 + size / gamma) / (size + gamma)


def geman_landing(size: Tensor, step: Scalar, gamma: Scalar) -> Tensor:
    step, reach = torch.zeros_like(size) + step, size + gamma
    part = 1 / (1 + size / gamma)  # Of gamma in the reach, also where both are infinite.
    real = ~(step / reach / reach * part > 4 / 27)  # Beyond, zero is the only minimum.
    step = torch.where(real & (reach < math.inf), step, torch.zeros_like(step))
    force = step / reach / reach * part
    # The greatest root of s^3 - s^2 + force, in units of the reach: from a start that is exact at both ends.
    share = (2 + safe_sqrt((1 - 6.75 * force).relu())) / 3
    for _ in range(4):
        off, rise, bend = share.square() * (share - 1) + force, share * (3 * share - 2), 6 * share - 2
        below = 2 * rise.square() - off * bend
        share = share - 2 * off * rise / torch.where(below == 0, torch.ones_like(below), below)
    # The equation of the root once more: exact without a step.
    point = (size - step / reach * part / share.square()).relu()
    alive = real & _nearer_than_zero(point, step / (point + gamma), step * geman_slope(point, gamma))
    return torch.where(alive, point, torch.zeros_like(point))


@of_magnitudes(geman_slope, geman_landing, bounds={"gamma": ABOVE_0})
def geman(w: Tensor, gamma: Scalar) -> Tensor:
    r"""Geman's penalty, :math:`\sum_i |w_i| / (|w_i| + \gamma)`, which levels off at 1.

    Of slope :math:`1 / \gamma` at 0, and near `l0` for a small :math:`\gamma`. The proximal operator is continuous up
    to a step of :math:`\frac{1}{2} \gamma^2`, and jumps beyond. Nonconvex.

    Args:
        gamma: :math:`\gamma`, where it reaches one half, above 0.

    Example:
        >>> params = {"weight": torch.tensor([3.0, -0.5])}
        >>> geman(params, 1.0), geman.prox(params, 1.0, 1.0)
        (tensor(1.0833), {'weight': tensor([2.9354, 0.0000])})

    References:
        Geman & Yang, *Nonlinear image recovery with half-quadratic regularization*, 1995.
    """
    return w.abs() / (w.abs() + gamma)


def mcp_value(size: Tensor, strength: Scalar, gamma: Scalar) -> Tensor:
    capped = size.clamp(max=held(gamma * strength, size))
    return torch.addcmul(times(strength, capped), capped, capped / (-2 * gamma))


def mcp_slope(size: Tensor, strength: Scalar, gamma: Scalar) -> Tensor:
    return (strength - size / gamma).relu()


def mcp_landing(size: Tensor, step: Scalar, strength: Scalar, gamma: Scalar) -> Tensor:
    jump = strength * (step * gamma) ** 0.5
    return _firm_or_hard(size, step / gamma, step_times(step, strength), gamma * strength, jump)


def _firm_or_hard(size: Tensor, share: Scalar, threshold: Scalar, reach: Scalar, jump: Scalar) -> Tensor:
    """Landing of a slope that falls to none: firm thresholding while that is convex, then hard thresholding.

    Args:
        size: Magnitudes.
        share: Step times the curvature.
        threshold: Step times the slope at zero.
        reach: Where the slope ends.
        jump: Up to where hard thresholding makes zeros.
    """
    share = torch.zeros_like(size) + share
    convex = share < 1
    room = torch.where(convex, 1 - share, torch.ones_like(share))  # Never a division by zero, also where not taken.
    # By comparisons, not as the minimum of both, whose derivative a tie at step 0 would split.
    firm = torch.where(size >= reach, size, (size - threshold).relu() / room)
    hard = torch.where(size <= jump, torch.zeros_like(size), size)
    return torch.where(convex, firm, hard)


@of_magnitudes(mcp_slope, mcp_landing, bounds={"strength": AT_LEAST_0, "gamma": ABOVE_0})
def mcp(w: Tensor, strength: Scalar, gamma: Scalar) -> Tensor:
    r"""Minimax concave penalty: `l1` near zero, constant from :math:`\gamma \lambda` on, so that large weights stay.

    .. math:: \sum_i \lambda c_i - \frac{c_i^2}{2 \gamma}, \quad c_i = \min(|w_i|, \gamma \lambda)

    The proximal operator is firm thresholding for a step below :math:`\gamma`, and hard thresholding at
    :math:`\lambda \sqrt{\text{step} \cdot \gamma}` from there on. Nonconvex.

    Args:
        strength: :math:`\lambda`, the slope at zero, at least 0.
        gamma: Concavity :math:`\gamma`, above 0; infinite for `l1`.

    Example:
        >>> params = {"weight": torch.tensor([4.0, 2.0, -0.5])}
        >>> mcp(params, 1.0, 3.0)
        tensor(3.2917)
        >>> mcp.prox(params, 1.0, 1.0, 3.0), mcp.prox(params, 3.0, 1.0, 3.0)
        ({'weight': tensor([4.0000, 1.5000, 0.0000])}, {'weight': tensor([4., 0., 0.])})

    References:
        Zhang, *Nearly unbiased variable selection under minimax concave penalty*, 2010.
    """
    return mcp_value(w.abs(), strength, gamma)


def envelope_slope(size: Tensor, gamma: Scalar) -> Tensor:
    return times((2 * gamma) ** 0.5, 1 - _risen(size, gamma))


def envelope_landing(size: Tensor, step: Scalar, gamma: Scalar) -> Tensor:
    slope = step_times(step, (2 * gamma) ** 0.5)
    return _firm_or_hard(size, step_times(step, gamma), slope, (2 / gamma) ** 0.5, (2 * step) ** 0.5)


def _risen(size: Tensor, gamma: Scalar) -> Tensor:
    """The share of a size in where the envelope levels off, at most 1."""
    return times((gamma / 2) ** 0.5, size).clamp(max=1.0)


@of_magnitudes(envelope_slope, envelope_landing, bounds={"gamma": ABOVE_0})
def l0_envelope(w: Tensor, gamma: Scalar) -> Tensor:
    r"""Quadratic envelope of `l0`, :math:`\sum_i 1 - \frac{\gamma}{2} \max(\sqrt{2 / \gamma} - |w_i|, 0)^2`.

    The greatest function below `l0` that a square of curvature :math:`\gamma` makes convex: it has a slope, no minimum
    that `l0` has not, and the same least value beside a loss whose curvature is below :math:`\gamma`. It is `mcp` of
    strength :math:`\sqrt{2 \gamma}` that bends by :math:`1 / \gamma`. Nonconvex.

    Args:
        gamma: :math:`\gamma`, above 0: the greater, the nearer to `l0`.

    Example:
        >>> params = {"weight": torch.tensor([3.0, -1.0])}
        >>> l0_envelope(params, 0.5), l0_envelope.prox(params, 1.0, 0.5)
        (tensor(1.7500), {'weight': tensor([3., 0.])})

    References:
        Carlsson, *On convex envelopes and regularization of non-convex functionals without moving global minima*, 2019.
    """
    share = _risen(w.abs(), gamma)
    return share * (2 - share)


def _soft_or_stay(size: Tensor, threshold: Scalar, height: Scalar) -> Tensor:
    """Landing of a slope that ends in a plateau: soft thresholding up to a jump, beyond which a size stays.

    Args:
        size: Magnitudes.
        threshold: Step times slope.
        height: Height of the plateau over the slope.
    """
    threshold = torch.zeros_like(size) + threshold
    jump = torch.where(threshold <= 2 * height, height + threshold / 2, (2 * height * threshold) ** 0.5)
    return torch.where(size <= jump, (size - threshold).relu(), size)


def scad_value(size: Tensor, strength: Scalar, a: Scalar) -> Tensor:
    return times(strength, size.clamp(max=held(strength, size))) + mcp_value((size - strength).relu(), strength, a - 1)


def scad_slope(size: Tensor, strength: Scalar, a: Scalar) -> Tensor:
    return mcp_slope((size - strength).relu(), strength, a - 1)


def scad_landing(size: Tensor, step: Scalar, strength: Scalar, a: Scalar) -> Tensor:
    share = torch.zeros_like(size) + step / (a - 1)
    convex = share < 1
    room = torch.where(convex, 1 - share, torch.ones_like(share))  # Never a division by zero, also where not taken.
    soft = (size - step_times(step, strength)).relu()
    # By comparisons, not as minimum and maximum, whose derivatives a tie at step 0 would split.
    firm = torch.where(size >= a * strength, size, (size - strength * (step + share)).relu() / room)
    firm = torch.where(size <= strength * (1 + step), soft, firm)
    return torch.where(convex, firm, _soft_or_stay(size, step_times(step, strength), strength * (a + 1) / 2))


@of_magnitudes(scad_slope, scad_landing, bounds={"strength": AT_LEAST_0, "a": (2.0, math.inf)})
def scad(w: Tensor, strength: Scalar, a: Scalar) -> Tensor:
    r"""Smoothly clipped absolute deviation: `l1` up to :math:`\lambda`, constant from :math:`a \lambda` on.

    .. math::
        \sum_i \int_0^{|w_i|} \min\left(\lambda, \frac{\max(a \lambda - x, 0)}{a - 1}\right) dx

    The proximal operator is continuous for a step below :math:`a - 1`, jumps from soft thresholding to the identity
    for a step up to :math:`a + 1`, and is hard thresholding at :math:`\lambda \sqrt{(a + 1) \text{step}}` beyond.
    Nonconvex.

    Args:
        strength: :math:`\lambda`, the slope at zero, at least 0.
        a: Where the penalty becomes constant, in units of :math:`\lambda`: at least 2; Fan & Li use 3.7.

    Example:
        >>> params = {"weight": torch.tensor([4.0, 3.0, 1.5])}
        >>> scad(params, 1.0, 3.0)
        tensor(5.4375)
        >>> scad.prox(params, 1.0, 1.0, 3.0), scad.prox(params, 5.0, 1.0, 3.0)
        ({'weight': tensor([4.0000, 3.0000, 0.5000])}, {'weight': tensor([0., 0., 0.])})

    References:
        Fan & Li, *Variable selection via nonconcave penalized likelihood and its oracle properties*, 2001.
    """
    return scad_value(w.abs(), strength, a)


def capped_l1_slope(size: Tensor, threshold: Scalar) -> Tensor:
    return torch.where(size < threshold, torch.ones_like(size), 0 * sign(size))  # NaN goes through the sign.


def capped_l1_landing(size: Tensor, step: Scalar, threshold: Scalar) -> Tensor:
    return _soft_or_stay(size, step, threshold)


@of_magnitudes(capped_l1_slope, capped_l1_landing, bounds={"threshold": AT_LEAST_0})
def capped_l1(w: Tensor, threshold: Scalar) -> Tensor:
    r"""Sum of capped magnitudes, :math:`\sum_i \min(|w_i|, \theta)`.

    The proximal operator for a step up to :math:`2 \theta` is soft thresholding up to
    :math:`\theta + \frac{1}{2} \text{step}` and the identity above; for a greater step, hard thresholding at
    :math:`\sqrt{2 \theta \cdot \text{step}}`. Nonconvex.

    Args:
        threshold: :math:`\theta`, at least 0; infinite for `l1`.

    Example:
        >>> params = {"weight": torch.tensor([3.0, -1.2, 0.5])}
        >>> capped_l1(params, 1.0), capped_l1.prox(params, 1.0, 1.0)
        (tensor(2.5000), {'weight': tensor([ 3.0000, -0.2000,  0.0000])})

    References:
        Zhang, *Analysis of multi-stage convex relaxation for sparse regularization*, 2010.
        Gong, Zhang, Lu, Huang & Ye, *A general iterative shrinkage and thresholding algorithm*, 2013.
    """
    return w.abs().clamp(max=threshold)
