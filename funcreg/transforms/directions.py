"""Directions that look at signs, at the last gradient or at the size of a leaf, with optax's names and numbers.

None of them divides by a metric of its own, so that none is a preconditioner of a proximal step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Params, Scalar, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute, euclidean, increment, sign, zeros
from funcreg.core.ranges import check_range, concrete, scalars, single
from funcreg.core.tree import tree_map
from funcreg.transforms.factory_checks import finite_nonnegative, positive
from funcreg.transforms.transform import Transform, counter, memoryless, public_state


@remembered
def scale_by_param_block_norm(min_scale: Scalar = 1e-3) -> Transform:
    r"""Multiply the update of each leaf by the norm of the leaf, :math:`u' = \max(\|w\|, s) u`.

    Args:
        min_scale: :math:`s`, the least factor, with which a leaf at zero moves.

    Example:
        >>> params = {"weight": torch.tensor([3.0, 4.0]), "bias": torch.zeros(1)}
        >>> grads = {"weight": torch.tensor([1.0, 0.5]), "bias": torch.ones(1)}
        >>> scale_by_param_block_norm().update(grads, EmptyState(), params)[0]
        {'weight': tensor([5.0000, 2.5000]), 'bias': tensor([0.0010])}
    """
    return _by_size(lambda w: euclidean(w), min_scale)


@remembered
def scale_by_param_block_rms(min_scale: Scalar = 1e-3) -> Transform:
    r"""Multiply the update of each leaf by the root mean square of the leaf, :math:`u' = \max(\|w\| / \sqrt{n}, s) u`.

    Args:
        min_scale: :math:`s`, the least factor, with which a leaf at zero moves.

    Example:
        >>> params = {"weight": torch.tensor([2.0, -2.0]), "bias": torch.zeros(1)}
        >>> grads = {"weight": torch.tensor([1.0, 0.5]), "bias": torch.ones(1)}
        >>> scale_by_param_block_rms().update(grads, EmptyState(), params)[0]
        {'weight': tensor([2., 1.]), 'bias': tensor([0.0010])}

    References:
        Shazeer & Stern, *Adafactor: adaptive learning rates with sublinear memory cost*, 2018.
    """
    return _by_size(lambda w: euclidean(w) / math.sqrt(max(w.numel(), 1)), min_scale)


def _by_size(size: Callable[[Tensor], Tensor], min_scale: Scalar) -> Transform:
    finite_nonnegative(min_scale=min_scale)
    (min_scale,) = scalars(min_scale=min_scale)

    def scaled(u: Tensor, w: Tensor, least: Scalar) -> Tensor:
        n = size(w)
        return u * torch.where(n <= least, least + torch.zeros_like(n), n)

    return memoryless(lambda updates, params: compute(scaled, updates, params, hyper=(min_scale,)))


@public_state
class OptimisticGradientState(NamedTuple):
    """The state of `scale_by_optimistic_gradient`.

    Example:
        >>> scale_by_optimistic_gradient().init(torch.zeros(1))
        OptimisticGradientState(steps=tensor(0, dtype=torch.int32), previous_gradient=tensor([0.]))
    """

    steps: Tensor  # Number of updates made, int32.
    previous_gradient: Params  # The last updates that came in.


@remembered
def scale_by_optimistic_gradient(alpha: Scalar = 1.0, beta: Scalar = 1.0) -> Transform:
    r"""Go as if the last change of the gradient came once more, :math:`u' = (\alpha + \beta) u_t - \beta u_{t-1}`.

    At the first step the last gradient is the one that came. In games, where plain descent circles around a saddle
    point, this comes to it.

    Args:
        alpha: :math:`\alpha`, the weight of the gradient.
        beta: :math:`\beta`, the weight of its change.

    Example:
        >>> tx, params = scale_by_optimistic_gradient(), {"weight": torch.zeros(1)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0])}, tx.init(params), params)
        >>> updates, tx.update({"weight": torch.tensor([5.0])}, state, params)[0]
        ({'weight': tensor([4.])}, {'weight': tensor([6.])})

    References:
        Mokhtari, Ozdaglar & Pattathil, *A unified analysis of extra-gradient and optimistic gradient methods for saddle
        point problems*, 2020.
    """
    finite_nonnegative(alpha=alpha, beta=beta)
    alpha, beta = scalars(alpha=alpha, beta=beta)

    def init(params: Params) -> OptimisticGradientState:
        return OptimisticGradientState(counter(params), zeros(params))

    def update(
        updates: Updates, state: OptimisticGradientState, params: Params
    ) -> tuple[Updates, OptimisticGradientState]:
        before = state.previous_gradient
        direction = compute(
            lambda u, last, n, a, b: (a + b) * u - b * torch.where(n == 0, u, last),
            updates,
            before,
            hyper=(state.steps, alpha, beta),
        )
        # Cloned, because a state never shares memory with the updates that a user holds.
        last = compute(lambda kept, u: u.clone(), before, updates)
        return direction, OptimisticGradientState(increment(state.steps), last)

    return Transform(init, update, state=OptimisticGradientState)


@public_state
class RpropState(NamedTuple):
    """The state of `scale_by_rprop`.

    Example:
        >>> scale_by_rprop(0.1).init(torch.zeros(2))
        RpropState(step_sizes=tensor([0.1000, 0.1000]), prev_updates=tensor([0., 0.]))
    """

    step_sizes: Params  # How far each entry goes.
    prev_updates: Params  # Where the last gradient sends each entry; 0 where its sign had turned.


@remembered
def scale_by_rprop(
    learning_rate: Scalar,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step_size: Scalar = 1e-6,
    max_step_size: Scalar = 50.0,
) -> Transform:
    r"""Go along the signs of updates, by a step for each entry that grows while its sign stays.

    Where the sign is that of the step before, the step size is multiplied by :math:`\eta_+`; where it has turned, by
    :math:`\eta_-`, and the entry waits. As in optax 0.2.8 every update is the one that the gradient *before* asked for,
    zero where the sign has turned since, so that the first one is 0; `torch.optim.Rprop` goes at once.

    Of a complex entry, the real and the imaginary part have a sign and a step size each.

    Args:
        learning_rate: First step size, above 0.
        eta_minus: :math:`\eta_-`, above 0 and below 1.
        eta_plus: :math:`\eta_+`, above 1.
        min_step_size: Least step size.
        max_step_size: Greatest step size.

    Example:
        >>> tx, params = scale_by_rprop(0.1), {"weight": torch.zeros(2)}
        >>> _, state = tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)
        >>> updates, state = tx.update({"weight": torch.tensor([3.0, 0.2])}, state, params)
        >>> updates, state.step_sizes
        ({'weight': tensor([0.1000, 0.0000])}, {'weight': tensor([0.1200, 0.0500])})

    References:
        Riedmiller & Braun, *A direct adaptive method for faster backpropagation learning: the RPROP algorithm*, 1993.
        Igel & Hüsken, *Empirical evaluation of the improved Rprop learning algorithms*, 2003.
    """
    positive(learning_rate=learning_rate)
    check_range("eta_minus", eta_minus, 0.0, 1.0, open_low=True, open_high=True)
    check_range("eta_plus", eta_plus, 1.0, open_low=True, finite=True)
    finite_nonnegative(min_step_size=min_step_size)
    positive(max_step_size=max_step_size)
    (learning_rate,) = scalars(learning_rate=learning_rate)
    factors = scalars(eta_minus=eta_minus, eta_plus=eta_plus)
    bounds = scalars(min_step_size=min_step_size, max_step_size=max_step_size)
    single(learning_rate=learning_rate, min_step_size=min_step_size, max_step_size=max_step_size)
    low, high = (concrete(x) for x in bounds)
    if low is not None and high is not None and low > high:
        raise ValueError(f"min_step_size is {low:g} and max_step_size {high:g}; expected a range. Are they swapped?")

    def init(params: Params) -> RpropState:
        first = lambda x: (x + learning_rate * (1 + 1j if x.is_complex() else 1)).to(x.dtype)
        return RpropState(tree_map(first, zeros(params)), zeros(params))

    def update(updates: Updates, state: RpropState, params: Params) -> tuple[Updates, RpropState]:
        sizes, before = state
        sizes = compute(_by_parts(_resized), sizes, updates, before, hyper=(*factors, *bounds))
        after = compute(_by_parts(lambda p, u, s: _unless_turned(u, p, s * sign(u))), before, updates, sizes)
        return compute(_by_parts(lambda u, p: _unless_turned(u, p, p)), updates, before), RpropState(sizes, after)

    return Transform(init, update, state=RpropState)


def _agreement(u: Tensor, last: Tensor) -> Tensor:
    """1 where signs agree, -1 where they differ, 0 where one is 0; a product of tiny numbers would be 0 too."""
    return sign(u) * sign(last)


def _resized(size: Tensor, u: Tensor, last: Tensor, down: Scalar, up: Scalar, low: Scalar, high: Scalar) -> Tensor:
    agreement = _agreement(u, last)
    changed = torch.where(agreement > 0, size * up, size * down)
    bounded = torch.minimum(torch.maximum(changed, low + torch.zeros_like(size)), high + torch.zeros_like(size))
    return torch.where(agreement == 0, size, bounded)


def _unless_turned(u: Tensor, last: Tensor, value: Tensor) -> Tensor:
    """A value where the sign has not turned, else 0."""
    return torch.where(_agreement(u, last) < 0, torch.zeros_like(value), value)


def _by_parts(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A rule of real leaves as one that sees the real and the imaginary parts of a complex leaf side by side."""

    def rule(*row: Any) -> Tensor:
        if not row[0].is_complex():
            return f(*row)
        return torch.view_as_complex(
            f(*[torch.view_as_real(x) if isinstance(x, Tensor) and x.is_complex() else x for x in row])
        )

    return rule
