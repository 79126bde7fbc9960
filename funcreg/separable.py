r"""Separable penalties, :math:`\sum_i \phi(|w_i|)`, many of them nonconvex, and penalties anchored at given weights.

A nonconvex proximal operator has regimes: past some step the objective is no longer convex, the minimum jumps, and
other formulas hold. In the metric of Adam the step of each entry is its own, `step / h`, and may lie in any regime:
each operator holds for every step, entry by entry, and is a global minimum. Where two points tie, it is the smaller.

A weight for each leaf or entry is a tree that multiplies a penalty, `weights * l0`, a tree of steps, of strengths of a
transform, or of a hyperparameter.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcreg._typing import Hyper, Params, Scalar
from funcreg.composition import Structure
from funcreg.construction import remembered
from funcreg.grouped import finite
from funcreg.leafwise import compute, compute_wide, reduce_leaves, safe_sqrt, sign, squared, total
from funcreg.lifting import penalty
from funcreg.penalties import shrunk
from funcreg.penalty import Penalty

_AT_LEAST_0 = (0.0, math.inf)
_ABOVE_0 = (sys.float_info.min, math.inf)


def of_magnitudes(
    slope: Callable[..., Tensor],
    landing: Callable[..., Tensor],
    bounds: Mapping[str, tuple[float, float]] | None = None,
    has_gradient: bool = True,
) -> Callable[[Callable[..., Tensor]], Penalty]:
    r"""Lift rules on magnitudes to a nonconvex penalty, :math:`\sum_i \phi(|w_i|)`: what is decorated is its value.

    Args:
        slope: `(size, *hyper)` to :math:`\phi'`, at 0 from the right, where it may be infinite.
        landing: `(size, step, *hyper)` to :math:`\arg\min_{z \ge 0} \frac{1}{2} (z - a)^2 + \text{step} \cdot \phi(z)`.
        bounds: From the name of a hyperparameter to the least and greatest number it may be.
        has_gradient: Whether the slope is not 0 everywhere.
    """

    def gradient(w: Tensor, *hyper: Scalar) -> Tensor:
        zero = w == 0
        # A slope may be infinite at 0, and both branches of a `where` are differentiated.
        return torch.where(zero, torch.zeros_like(w), sign(w) * slope(torch.where(zero, 1.0, w.abs()), *hyper))

    def proximal(w: Tensor, step: Scalar, *hyper: Scalar) -> Tensor:
        return sign(w) * landing(w.abs(), step, *hyper) + 0.0  # +0.0 also from -0.0.

    def residual(w: Tensor, g: Tensor, strength: Scalar, *hyper: Scalar) -> Tensor:
        steep = slope(torch.zeros_like(w.abs()), *hyper)
        holds = steep.isinf() & (strength != 0)  # No strength times an infinite slope is no pull.
        pulled = shrunk(g, strength * torch.where(steep.isinf(), 0.0, steep))
        at_zero = torch.where(holds, 0 * sign(g), pulled)  # NaN goes through the sign.
        return torch.where(w == 0, at_zero, g + strength * gradient(w, *hyper))

    return penalty(
        gradient=gradient,
        proximal=proximal,
        residual=residual,
        structure=Structure(keeps=("signs",)),
        separable=True,
        bounds=bounds,
        has_gradient=has_gradient,
        convex=False,
    )


# Powers


def l0_slope(size: Tensor) -> Tensor:
    return torch.where(size == 0, math.inf, 0 * sign(size))  # NaN goes through the sign.


def l0_landing(size: Tensor, step: Scalar) -> Tensor:
    return torch.where(size <= (2 * step) ** 0.5, torch.zeros_like(size), size)


@of_magnitudes(l0_slope, l0_landing, has_gradient=False)
def l0(w: Tensor) -> Tensor:
    r"""Number of entries that are not zero, :math:`\|w\|_0`.

    The gradient is 0 and tells nothing; the proximal operator is hard thresholding, which keeps an entry as it is
    above :math:`\sqrt{2 \cdot \text{step}}` and makes it 0 up to there. Nonconvex.

    Example:
        >>> params = {"weight": torch.tensor([3.0, -0.5, 0.0])}
        >>> l0(params), l0.prox(params, 0.5)
        (tensor(2.), {'weight': tensor([3., 0., 0.])})

    References:
        Blumensath & Davies, *Iterative thresholding for sparse approximations*, 2008.
    """
    return sign(w).abs()


def _power(size: Tensor, exponent: float) -> Tensor:
    """A power below 1, with derivative 0 at 0: both branches of a `where` are differentiated."""
    zero = size == 0
    return torch.where(zero, torch.zeros_like(size), torch.where(zero, 1.0, size) ** exponent)


def _ratio(step: Scalar, size: Tensor, exponent: float) -> Tensor:
    """A step in units of sizes and of a power of them; 0 also where the inverse of a size is infinite."""
    return (step / size / size**exponent).nan_to_num(0.0, posinf=math.inf)


def l_half_slope(size: Tensor) -> Tensor:
    return 0.5 * size**-0.5


def l_half_landing(size: Tensor, step: Scalar) -> Tensor:
    alive = ~(size <= 1.5 * step ** (2 / 3))
    safe = torch.where(alive, size, 1.0)
    # In units of the size; the greatest value is that of the jump.
    force = _ratio(step, safe, 0.5).clamp(max=(2 / 3) ** 1.5)
    angle = torch.acos(-(0.75 * 3**0.5) * force)
    root = (1 + torch.cos(angle * (2 / 3))) * (2 / 3)
    # The equation of the root once more: exact without a step, and a digit better with one.
    return torch.where(alive, safe * (1 - force / (2 * root.sqrt())), torch.zeros_like(size))


@of_magnitudes(l_half_slope, l_half_landing)
def l_half(w: Tensor) -> Tensor:
    r"""Sum of square roots, :math:`\sum_i |w_i|^{1/2}`.

    The proximal operator makes an entry 0 up to :math:`\frac{3}{2} \text{step}^{2/3}`, where it jumps, and shrinks
    large entries less than `l1`. The gradient grows without bound towards 0, and is 0 there. Nonconvex.

    Example:
        >>> params = {"weight": torch.tensor([4.0, -1.0])}
        >>> l_half(params), l_half.prox(params, 1.0)
        (tensor(3.), {'weight': tensor([3.7415, 0.0000])})

    References:
        Xu, Chang, Xu & Zhang, *L1/2 regularization: a thresholding representation theory*, 2012.
    """
    return _power(w.abs(), 0.5)


def l_two_thirds_slope(size: Tensor) -> Tensor:
    return (2 / 3) * size ** (-1 / 3)


def l_two_thirds_landing(size: Tensor, step: Scalar) -> Tensor:
    alive = ~(size <= 2 * (2 / 3 * step) ** 0.75)
    safe = torch.where(alive, size, 1.0)
    # The root of v^4 - v + force, in units of the size; the greatest force is that of the jump, 2^(-4/3).
    force = _ratio(2 / 3 * step, safe, 1 / 3).clamp(max=2 ** (-4 / 3))
    cube = (1 / 16 + (1 / 256 - force**3 / 27).sqrt()) ** (1 / 3)
    half = (2 * (cube + force / 3 / cube)).sqrt()
    root = (half + (2 / half - half.square()).sqrt()) / 2
    # The equation of the root once more: exact without a step, and a digit better with one.
    return torch.where(alive, safe * (1 - force / root), torch.zeros_like(size))


@of_magnitudes(l_two_thirds_slope, l_two_thirds_landing)
def l_two_thirds(w: Tensor) -> Tensor:
    r"""Sum of powers, :math:`\sum_i |w_i|^{2/3}`.

    The proximal operator makes an entry 0 up to :math:`2 (\frac{2}{3} \text{step})^{3/4}`, where it jumps. The
    gradient grows without bound towards 0, and is 0 there. Nonconvex.

    Example:
        >>> params = {"weight": torch.tensor([8.0, -1.0])}
        >>> l_two_thirds(params), l_two_thirds.prox(params, 1.0)
        (tensor(5.), {'weight': tensor([7.6618, 0.0000])})

    References:
        Cao, Sun & Xu, *Fast image deconvolution using closed-form thresholding formulas of Lq regularization*, 2013.
    """
    return _power(w.abs(), 2 / 3)


# Penalties that level off


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
    step = torch.where(real, step, torch.zeros_like(step))
    # In units of the reach, whose square may leave the range of float32.
    root = (1 - 4 * (step / reach / reach)).sqrt()
    point = (size - 2 * step / reach / (1 + root)).relu()
    # Past a step of epsilon^2 zero and the stationary point are both minima.
    worth = step / point * torch.log1p(point / epsilon)
    alive = real & _nearer_than_zero(point, worth, step / (epsilon + point))
    return torch.where(alive, point, torch.zeros_like(point))


@of_magnitudes(log_sum_slope, log_sum_landing, bounds={"epsilon": _ABOVE_0})
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
    return gamma * etp_scale(size, gamma) * torch.exp(-gamma * size)


def etp_landing(size: Tensor, step: Scalar, gamma: Scalar) -> Tensor:
    step = torch.zeros_like(size) + step
    force, decay = step * gamma * etp_scale(size, gamma), torch.exp(-gamma * size)
    real = ~(gamma * (force * decay) > 1 / math.e) & ~(step == math.inf)  # Beyond, zero is the only minimum.
    force = torch.where(real, force, torch.zeros_like(force))
    root = size + _lambert(gamma * (force * decay)) / gamma
    # The equation of the root once more: exact without a step.
    point = (size - force * torch.exp(-gamma * root)).relu()
    worth = force / gamma * -torch.expm1(-gamma * point) / point
    alive = real & _nearer_than_zero(point, worth, force * torch.exp(-gamma * point))
    return torch.where(alive, point, torch.zeros_like(point))


@of_magnitudes(etp_slope, etp_landing, bounds={"gamma": _ABOVE_0})
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
    reach = gamma * w.abs()
    # The derivative of expm1 is rounded at 1, and that of exp at itself.
    risen = torch.where(reach < 1, -torch.expm1(-reach.clamp(max=1)), 1 - torch.exp(-reach))
    return etp_scale(w.abs(), gamma) * risen


def geman_slope(size: Tensor, gamma: Scalar) -> Tensor:
    return 1 / (1 + size / gamma) / (size + gamma)


def geman_landing(size: Tensor, step: Scalar, gamma: Scalar) -> Tensor:
    step, reach = torch.zeros_like(size) + step, size + gamma
    part = 1 / (1 + size / gamma)  # Of gamma in the reach, also where both are infinite.
    real = ~(step / reach / reach * part > 4 / 27)  # Beyond, zero is the only minimum.
    step = torch.where(real, step, torch.zeros_like(step))
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


@of_magnitudes(geman_slope, geman_landing, bounds={"gamma": _ABOVE_0})
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


# Squares near zero, and so no rules on magnitudes, whose slope would be 0 at zero.


def _mumford_shah_gradient(w: Tensor, alpha: Scalar, kappa: Scalar) -> Tensor:
    return torch.where(alpha * squared(w) >= kappa, 0 * sign(w), 2 * alpha * w)


def _mumford_shah_proximal(w: Tensor, step: Scalar, alpha: Scalar, kappa: Scalar) -> Tensor:
    size = w.abs()
    room = 1 + 2 * alpha * (torch.zeros_like(size) + step)
    return torch.where(alpha * size.square() <= kappa * room, w / room, w) + 0.0  # +0.0 also from -0.0.


def _mumford_shah_residual(w: Tensor, g: Tensor, strength: Scalar, alpha: Scalar, kappa: Scalar) -> Tensor:
    return g + strength * _mumford_shah_gradient(w, alpha, kappa)


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
    return (alpha * squared(w)).clamp(max=kappa)


def mcp_value(size: Tensor, strength: Scalar, gamma: Scalar) -> Tensor:
    capped = size.clamp(max=gamma * strength)
    return capped * (strength - capped / (2 * gamma))


def mcp_slope(size: Tensor, strength: Scalar, gamma: Scalar) -> Tensor:
    return (strength - size / gamma).relu()


def mcp_landing(size: Tensor, step: Scalar, strength: Scalar, gamma: Scalar) -> Tensor:
    share = torch.zeros_like(size) + step / gamma
    convex = share < 1
    room = torch.where(convex, 1 - share, torch.ones_like(share))  # Never a division by zero, also where not taken.
    # By comparisons, not as the minimum of both, whose derivative a tie at step 0 would split.
    firm = torch.where(size >= gamma * strength, size, (size - step * strength).relu() / room)
    hard = torch.where(size <= strength * (step * gamma) ** 0.5, torch.zeros_like(size), size)
    return torch.where(convex, firm, hard)


@of_magnitudes(mcp_slope, mcp_landing, bounds={"strength": _AT_LEAST_0, "gamma": _ABOVE_0})
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
    return mcp_slope(size, (2 * gamma) ** 0.5, 1 / gamma)


def envelope_landing(size: Tensor, step: Scalar, gamma: Scalar) -> Tensor:
    return mcp_landing(size, step, (2 * gamma) ** 0.5, 1 / gamma)


@of_magnitudes(envelope_slope, envelope_landing, bounds={"gamma": _ABOVE_0})
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
    return mcp_value(w.abs(), (2 * gamma) ** 0.5, 1 / gamma)


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
    return strength * size.clamp(max=strength) + mcp_value((size - strength).relu(), strength, a - 1)


def scad_slope(size: Tensor, strength: Scalar, a: Scalar) -> Tensor:
    return mcp_slope((size - strength).relu(), strength, a - 1)


def scad_landing(size: Tensor, step: Scalar, strength: Scalar, a: Scalar) -> Tensor:
    share = torch.zeros_like(size) + step / (a - 1)
    convex = share < 1
    room = torch.where(convex, 1 - share, torch.ones_like(share))  # Never a division by zero, also where not taken.
    soft = (size - step * strength).relu()
    # By comparisons, not as minimum and maximum, whose derivatives a tie at step 0 would split.
    firm = torch.where(size >= a * strength, size, (size - strength * (step + share)).relu() / room)
    firm = torch.where(size <= strength * (1 + step), soft, firm)
    return torch.where(convex, firm, _soft_or_stay(size, step * strength, strength * (a + 1) / 2))


@of_magnitudes(scad_slope, scad_landing, bounds={"strength": _AT_LEAST_0, "a": (2.0, math.inf)})
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


@of_magnitudes(capped_l1_slope, capped_l1_landing, bounds={"threshold": _AT_LEAST_0})
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


def _huber_gradient(w: Tensor, delta: Scalar) -> Tensor:
    if w.is_complex():
        return torch.where(w.abs() <= delta, w, finite(delta, w) * sign(w))
    return _between(w, delta)


def _between(w: Tensor, delta: Scalar) -> Tensor:
    most: Any = delta  # The types of clamp know no such union.
    return w.clamp(-most, most)


def _huber_proximal(w: Tensor, step: Scalar, delta: Scalar) -> Tensor:
    square, line = w / (1 + step), w - step * (finite(delta, w) * sign(w))
    return torch.where(w.abs() <= (1 + step) * delta, square, line) + 0.0  # +0.0 also from -0.0.


def _huber_residual(w: Tensor, g: Tensor, strength: Scalar, delta: Scalar) -> Tensor:
    return g + strength * _huber_gradient(w, delta)


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
    return torch.where(change == 0, shrunk(g, strength), g + strength * sign(change))


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
    return g + strength * _anchored_l2_gradient(w, anchor)


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
    return _towards(w, anchor, step * fisher)


def _ewc_residual(w: Tensor, g: Tensor, strength: Scalar, anchor: Scalar, fisher: Scalar) -> Tensor:
    return g + strength * _ewc_gradient(w, anchor, fisher)


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


# Non-negative forms


@remembered
def nonnegative_form(inner: Penalty) -> Penalty:
    r"""A penalty on weights of at least 0: its value there, infinite elsewhere.

    The proximal operator is :math:`\arg\min_{z \ge 0} \frac{1}{2} \|z - w\|^2 + \text{step} \cdot g(z)`. For a
    separable penalty it is that of :math:`g`, and then negative entries are put to 0; for one of magnitudes that
    couples them, such as `group_lasso`, negative entries are put to 0 first, and do not count in its norms. Step 0 is
    the projection on :math:`z \ge 0`. The gradient is that of :math:`g`. Weights multiply :math:`g` alone: 0 alone
    still keeps entries from being negative.

    Args:
        inner: A separable penalty, made with `separable=True`, that is convex (`ewc`) or depends on magnitudes and
            grows with them (`l1`, `mcp`); or one that couples magnitudes, grows with each, and whose proximal operator
            is known to keep signs (`group_lasso`, `sparse_group_lasso`, `linf`).

    Raises:
        ValueError: The penalty couples entries otherwise.

    Example:
        >>> params = {"weight": torch.tensor([3.0, -0.5, -2.0])}
        >>> nonnegative_mcp = nonnegative_form(mcp)
        >>> nonnegative_mcp.prox(params, 1.0, 1.0, 4.0), nonnegative_mcp(params, 1.0, 4.0)
        ({'weight': tensor([2.6667, 0.0000, 0.0000])}, tensor(inf))
        >>> nonnegative_form(group_lasso).prox({"weight": torch.tensor([[3.0, 4.0], [0.6, -8.0]])}, 1.0)
        {'weight': tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])}
    """
    if not isinstance(inner, Penalty):
        raise TypeError(f"inner is {inner!r}; expected a separable Penalty such as l1")
    apart = inner.separable is True
    if not apart and "signs" not in inner.structure.keeps:
        raise ValueError(
            f"nonnegative_form got {inner!r}; expected a separable penalty, made with separable=True, or one that "
            "keeps signs, as its structure says. To put negative entries to 0 is exact for those alone."
        )

    def outside(params: Params) -> list[Tensor]:
        return reduce_leaves(lambda w: torch.where(_real(w) < 0, math.inf, 0.0), params)

    def value(params: Params, *hyper: Hyper, **options: Any) -> Tensor:
        return total([inner(params, *hyper, **options), *outside(params)])

    def weighted(params: Params, weights: Hyper, /, *hyper: Hyper, **options: Any) -> Tensor:
        return total([inner.weighted_value(params, weights, *hyper, **options), *outside(params)])

    def proximal(params: Params, step: Hyper, *hyper: Hyper, metric: Params | None = None, **options: Any) -> Params:
        start = params if apart else compute(lambda w: _real(w).relu(), params)
        landed = inner.prox(start, step, *hyper, metric=metric, **options)
        return compute(lambda z: _real(z).relu(), landed)

    def residual(params: Params, grads: Params, strength: Hyper, *hyper: Hyper, **options: Any) -> Params:
        # At zero, what would make an entry negative is taken up by the bound.
        held = lambda r: compute(lambda w, r: torch.where(w == 0, r.clamp(max=0), r), params, r)
        if inner.has_residual and apart:
            left = held(inner.residual(params, grads, *hyper, strength=strength, **options))
        elif inner.has_residual:
            left = inner.residual(params, held(grads), *hyper, strength=strength, **options)
        else:
            moved = compute_wide(lambda w, g: w - g, params, grads)
            left = compute(lambda w, z: w - z, params, proximal(moved, strength, *hyper, **options))
        return compute(lambda w, r: torch.where(_real(w) < 0, math.inf, r), params, left)

    form = Penalty(
        value,
        inner.grad,
        proximal,
        residual=residual,
        bounds=inner.bounds,
        rule=inner,
        weighted=weighted,
        weigh=inner.weigh,
        in_metric=inner.in_metric,
        separable=apart,
        couples_leaves=inner.couples_leaves,
        has_gradient=inner.has_gradient,
        convex=inner.is_convex,
    )
    form.__name__ = form.__qualname__ = f"nonnegative {inner.__name__}"
    return form


def _real(w: Tensor) -> Tensor:
    if w.is_complex():
        raise ValueError("a leaf is complex; expected real numbers, which have a sign")
    return w
