r"""Separable nonconvex penalties, :math:`\sum_i \phi(|w_i|)`, by rules on magnitudes, and the powers among them.

A nonconvex proximal operator has regimes: past some step the objective is no longer convex, the minimum jumps, and
other formulas hold. In the metric of Adam the step of each entry is its own, `step / h`, and may lie in any regime:
each operator holds for every step, entry by entry, and is a global minimum. Where two points tie, it is the smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from funcreg.core._typing import Scalar
from funcreg.core.leafwise import sign, step_times, times
from funcreg.regularizers.composition import Structure
from funcreg.regularizers.lifting import penalty
from funcreg.regularizers.penalties import shrunk
from funcreg.regularizers.penalty import Penalty


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
        pulled = shrunk(g, step_times(strength, torch.where(steep.isinf(), 0.0, steep)))
        at_zero = torch.where(holds, 0 * sign(g), pulled)  # NaN goes through the sign.
        return torch.where(w == 0, at_zero, g + times(strength, gradient(w, *hyper)))

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
