"""Step sizes from the value of the objective, with optax's names and numbers."""

from __future__ import annotations

from typing import Any, Literal

import torch

from funcreg.core._typing import Hyper, Params, Scalar, Schedule, State, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute, reduce_leaves, squared, total
from funcreg.core.ranges import scalars
from funcreg.core.tree import tree_leaves
from funcreg.transforms.chains import chain
from funcreg.transforms.factory_checks import finite, finite_nonnegative, positive
from funcreg.transforms.optimizers import sgd
from funcreg.transforms.plateau import as_value
from funcreg.transforms.transform import Transform, init_empty_state

_VARIANTS = ("sps", "sps+")
#: Below it, a squared norm is that of a minimum.
_TINY = torch.finfo(torch.float64).eps


@remembered
def scale_by_polyak(
    f_min: Scalar = 0.0,
    max_learning_rate: Scalar = 1.0,
    eps: Scalar = 0.0,
    variant: Literal["sps", "sps+"] = "sps",
) -> Transform:
    r"""Scale updates by Polyak's step size, :math:`\min(\frac{f - f^*}{\|u\|^2 + \epsilon}, \eta_{\max})`.

    The value :math:`f` of the objective comes with each update: `tx.update(grads, state, params, value=loss)`.

    Args:
        f_min: :math:`f^*`, the least value of the objective, or a bound below it.
        max_learning_rate: :math:`\eta_{\max}`, above 0.
        eps: :math:`\epsilon`, at least 0.
        variant: `"sps+"` makes no step where the value is below `f_min`, `"sps"` one uphill.

    Raises:
        TypeError: An update came without `value`.

    Example:
        >>> tx, params = scale_by_polyak(), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([3.0, 4.0])}, tx.init(params), params, value=5.0)[0]
        {'weight': tensor([0.6000, 0.8000])}

    References:
        Loizou, Vaswani, Laradji & Lacoste-Julien, *Stochastic Polyak step-size for SGD*, 2021.
    """
    finite(f_min=f_min)
    positive(max_learning_rate=max_learning_rate)
    finite_nonnegative(eps=eps)
    f_min, max_learning_rate, eps = scalars(f_min=f_min, max_learning_rate=max_learning_rate, eps=eps)
    if variant not in _VARIANTS:
        raise ValueError(f"variant is {variant!r}; expected one of {', '.join(_VARIANTS)}")

    def update(updates: Updates, state: State, params: Params, *, value: Any = None) -> tuple[Updates, State]:
        if not tree_leaves(updates):
            return updates, state
        size = total(reduce_leaves(squared, updates))
        gap = as_value("scale_by_polyak", value, size) - f_min
        gap = gap.clamp(min=0) if variant == "sps+" else gap
        flat = size + eps <= _TINY
        longest = max_learning_rate + torch.zeros_like(size)
        step = torch.minimum(gap / torch.where(flat, 1.0, size + eps), longest)
        return compute(lambda u, s: s * u, updates, hyper=(torch.where(flat, torch.zeros_like(step), step),)), state

    return Transform(init_empty_state, update, stages=["scales"])


@remembered
def polyak_sgd(
    max_learning_rate: Scalar = 1.0,
    scaling: Hyper | Schedule = 1.0,
    f_min: Scalar = 0.0,
    eps: Scalar = 0.0,
    variant: Literal["sps", "sps+"] = "sps",
) -> Transform:
    r"""Gradient descent with Polyak's step size, :math:`w' = w - s \min(\frac{f - f^*}{s^2 \|g\|^2}, \eta_{\max}) g`.

    There is no learning rate to choose, but the least value of the objective to know: 0 where a model can fit all
    data. The value :math:`f` comes with each update: `tx.update(grads, state, params, value=loss)`. A penalty in the
    objective belongs in both the value and the gradient.

    Args:
        max_learning_rate: :math:`\eta_{\max}`, above 0.
        scaling: :math:`s`: number of at least 0, tensor or schedule.
        f_min: :math:`f^*`, the least value of the objective, or a bound below it.
        eps: Added to the squared norm.
        variant: `"sps+"` makes no step where the value is below `f_min`, `"sps"` one uphill.

    Raises:
        TypeError: An update came without `value`.

    Example:
        >>> tx, params = polyak_sgd(), {"weight": torch.tensor([3.0])}
        >>> loss, grads = 0.5 * 3.0**2, {"weight": torch.tensor([3.0])}
        >>> tx.update(grads, tx.init(params), params, value=loss)[0]
        {'weight': tensor([-1.5000])}

    References:
        Loizou, Vaswani, Laradji & Lacoste-Julien, *Stochastic Polyak step-size for SGD*, 2021.
        Garrigos, Gower & Schaipp, *Function value learning: adaptive learning rates based on the Polyak stepsize and
        function splitting in ERM*, 2023.
    """
    return chain(sgd(scaling), scale_by_polyak(f_min, max_learning_rate, eps, variant))
