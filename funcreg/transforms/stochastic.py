"""Proximal training under noise: dual averaging, which finds a support and keeps it, and decay in proximal form.

After a step along one noisy gradient, the proximal operator sees a weight that the noise has moved: zeros come and go
with the batches. Dual averaging applies it to the sum of all gradients instead, with the penalty of all steps, so that
the noise averages out and the support settles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Params, Scalar, Schedule, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute, compute_wide, increment, product, safe_sqrt, squared, wide, zeros
from funcreg.core.masks import kept_by
from funcreg.core.ranges import scalars, single
from funcreg.core.tree import tree_map
from funcreg.networks.coupled import check_groups_are_whole
from funcreg.regularizers.descent import check_inner_steps
from funcreg.regularizers.penalties import half_l2
from funcreg.regularizers.penalty import Penalty
from funcreg.transforms.adam_family import scale_by_adam
from funcreg.transforms.factory_checks import below_one, check_selection, finite_nonnegative, positive
from funcreg.transforms.proximal import descend, land, left_out
from funcreg.transforms.regularizing import check_penalty, check_strength
from funcreg.transforms.transform import Transform, at_step, check_fit, counter, public_state


@public_state
class DualAveragingState(NamedTuple):
    """The state of `rmda` and `ramda`.

    Example:
        >>> rmda(0.1, l1).init(torch.zeros(1)).weight
        tensor(0., dtype=torch.float64)
    """

    steps: Tensor  # Number of updates made, int32.
    weight: Tensor  # Sum of the weights of all gradients so far, float64.
    start: Params  # Parameters before the first update.
    gradients: Params  # Weighted sum of all gradients.
    squares: Params  # Weighted sum of their squared magnitudes; `rmda` has none.


def _check_rule_in_metric(
    penalty: Penalty,
    params: Params,
    values: list[Hyper],
    inner_steps: int | None,
    mask: Mask | None,
    options: dict[str, Any],
) -> None:
    """Raise the error of the proximal operator now if it has no rule in a metric, and not at the first update."""
    if inner_steps is None and not penalty.in_metric(params, *values, mask=mask, **options):
        penalty.prox(params, 0.0, *values, metric=_real_zeros(params), mask=mask, **options)


def _average(
    metric: Callable[[Params], Params] | None,
    learning_rate: Scalar | Schedule,
    penalty: Penalty,
    hyper: tuple[Hyper, ...],
    strength: Hyper | Schedule,
    momentum: Scalar | Schedule,
    mask: Mask | None,
    options: dict[str, Any],
    inner_steps: int | None = None,
) -> Transform:
    finite_nonnegative(learning_rate=learning_rate)
    single(learning_rate=learning_rate)
    below_one(momentum=momentum)
    check_inner_steps(inner_steps)
    hyper, options = check_penalty(penalty, hyper, options)
    check_strength(penalty, strength)
    check_selection(mask)

    def init(params: Params) -> DualAveragingState:
        check_fit(params, mask, strength, *hyper)
        check_groups_are_whole(penalty, mask, params)
        steps = counter(params)
        if metric is not None:
            _check_rule_in_metric(
                penalty, params, [at_step(value, steps) for value in hyper], inner_steps, mask, options
            )
        weight = torch.zeros_like(steps, dtype=torch.float64)
        squares = () if metric is None else _real_zeros(params)
        return DualAveragingState(steps, weight, tree_map(torch.clone, params), zeros(params), squares)

    def update(updates: Updates, state: DualAveragingState, params: Params) -> tuple[Updates, DualAveragingState]:
        rate, force, keep, *values = (
            at_step(value, state.steps) for value in (learning_rate, strength, momentum, *hyper)
        )
        steps = increment(state.steps)
        root = steps.to(torch.float64).sqrt()
        weight = state.weight + rate * root
        gradients = compute(lambda v, g, s: v + s * g, state.gradients, updates, hyper=(rate * root,))
        force = product(kept_by(mask, params), weight, force)
        if metric is None:
            squares, h, scale = (), None, root
            # One number for all entries, which every penalty understands.
            force = product(kept_by(mask, params), force, 1 / root)
        else:
            squares = compute(lambda v, g, s: v + s * squared(g), state.squares, updates, hyper=(rate * root,))
            scale = h = metric(squares)
        reached = compute_wide(lambda w, v, h: w - v / h, state.start, gradients, hyper=(scale,))
        landed = land(params, reached, force, h, penalty, values, inner_steps, mask, options)
        # In the dtype of the parameters, or w + (0 - w) would not be 0.
        moves = compute(lambda w, z, b: (1 - b) * (z - w), params, landed, hyper=(keep,))
        return moves, DualAveragingState(steps, weight.to(torch.float64), state.start, gradients, squares)

    return Transform(
        init, update, state=DualAveragingState, descends=True, spares=left_out(mask), stages=["steps", "lands"]
    )


def _real_zeros(params: Params) -> Params:
    return tree_map(lambda w: torch.zeros_like(w.real, dtype=wide(w.real.dtype)), params)


@remembered
def rmda(
    learning_rate: Scalar | Schedule,
    penalty: Penalty,
    *hyper: Hyper | Schedule,
    strength: Hyper | Schedule = 1.0,
    momentum: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    **options: Any,
) -> Transform:
    r"""Dual averaging: one proximal step from the start along the weighted sum of all gradients.

    .. math::
        z_t = \arg\min_z \; \langle \textstyle\sum_s c_s g_s, z \rangle + \frac{\sqrt{t}}{2} \|z - w_0\|^2
        + \textstyle\sum_s c_s \cdot \lambda g(z), \quad c_s = \eta_s \sqrt{s}, \quad
        w_t = \beta w_{t-1} + (1 - \beta) z_t

    It ends at a minimum of :math:`f + \lambda g`, also under gradients of batches, and finds the support of that
    minimum after finitely many steps, where `prox_sgd` lets zeros come and go. The pull back to the start fades as
    1 / t, so that for an accurate solution of a problem without noise `fista` is the better one.

    Args:
        learning_rate: :math:`\eta`: number of at least 0, tensor or schedule, as for plain descent.
        penalty: A penalty :math:`g` such as `l1`.
        hyper: Its hyperparameters.
        strength: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        momentum: :math:`\beta`: number of at least 0 and below 1, tensor or schedule. Zeros are exact where it is 0;
            a schedule that ends there has both.
        mask: Leaves on which the penalty acts; the others are averaged without it.
        options: Static options of the penalty, such as `dim`.

    Example:
        >>> tx, params = rmda(0.5, l1, strength=0.3), {"w": torch.tensor([2.0, 0.1])}
        >>> state = tx.init(params)
        >>> for _ in range(1000):
        ...     updates, state = tx.update({"w": params["w"] - torch.tensor([1.0, 0.2])}, state, params)
        ...     params = apply_updates(params, updates)
        >>> params
        {'w': tensor([0.7013, 0.0000])}

    References:
        Huang & Lee, *Training structured neural networks through manifold identification and variance reduction*,
        2022.
        Xiao, *Dual averaging methods for regularized stochastic learning and online optimization*, 2010.
    """
    return _average(None, learning_rate, penalty, hyper, strength, momentum, mask, options)


@remembered
def ramda(
    learning_rate: Scalar | Schedule,
    penalty: Penalty,
    *hyper: Hyper | Schedule,
    strength: Hyper | Schedule = 1.0,
    momentum: Scalar | Schedule = 0.0,
    eps: Scalar = 1e-6,
    inner_steps: int | None = None,
    mask: Mask | None = None,
    **options: Any,
) -> Transform:
    r"""Dual averaging in a metric of its own, :math:`h_t = \sqrt[3]{\sum_s c_s g_s^2} + \epsilon`.

    .. math::
        z_t = \arg\min_z \; \langle \textstyle\sum_s c_s g_s, z \rangle
        + \frac{1}{2} \sum_i h_{t,i} (z_i - w_{0,i})^2 + \textstyle\sum_s c_s \cdot \lambda g(z), \quad
        c_s = \eta_s \sqrt{s}, \quad w_t = \beta w_{t-1} + (1 - \beta) z_t

    Like `rmda`, with a step size for each entry, as the step of MADGRAD: for networks whose gradients differ in size.

    Args:
        learning_rate: :math:`\eta`: number of at least 0, tensor or schedule.
        penalty: A penalty :math:`g` that has a proximal operator in a metric, or a convex one with `inner_steps`.
        hyper: Its hyperparameters.
        strength: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        momentum: :math:`\beta`: number of at least 0 and below 1, tensor or schedule. Zeros are exact where it is 0.
        eps: :math:`\epsilon`. An entry whose gradient is always 0 goes to zero at once; `mask` leaves it out.
        inner_steps: For a convex penalty without a rule in a metric, such as `nuclear`: how many steps of a descent
            from the parameters stand in for one, about 5. None for the penalty's own rule.
        mask: Leaves on which the penalty acts; the others are averaged without it.
        options: Static options of the penalty, such as `dim`.

    Example:
        >>> tx, params = ramda(0.5, l1, strength=0.3), {"w": torch.tensor([2.0, 0.1])}
        >>> state = tx.init(params)
        >>> for _ in range(1000):
        ...     updates, state = tx.update({"w": params["w"] - torch.tensor([1.0, 0.2])}, state, params)
        ...     params = apply_updates(params, updates)
        >>> params
        {'w': tensor([0.7004, 0.0000])}

    References:
        Huang & Lee, *Regularized adaptive momentum dual averaging with an efficient inexact subproblem solver for
        training structured neural network*, 2024.
        Defazio & Jelassi, *A momentumized, adaptive, dual averaged gradient method*, 2022.
    """
    finite_nonnegative(eps=eps)
    (eps,) = scalars(eps=eps)

    def metric(squares: Params) -> Params:
        return compute(lambda v, e: _safe_cube_root(v) + e, squares, hyper=(eps,))

    return _average(metric, learning_rate, penalty, hyper, strength, momentum, mask, options, inner_steps)


def _safe_cube_root(x: Tensor) -> Tensor:
    """Cube root of a number of at least 0, with derivative 0 at 0: both branches of a `where` are differentiated."""
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).pow(1 / 3))


@public_state
class FtrlState(NamedTuple):
    """The state of `ftrl`.

    Example:
        >>> ftrl(0.1, l1).init(torch.zeros(1))
        FtrlState(steps=tensor(0, dtype=torch.int32), squares=tensor([0.]), linear=tensor([0.]))
    """

    steps: Tensor  # Number of updates made, int32.
    squares: Params  # Sum of the squared magnitudes of all gradients.
    linear: Params  # Sum of all gradients, less what each step's metric holds at its parameters.


@remembered
def ftrl(
    learning_rate: Scalar,
    penalty: Penalty,
    *hyper: Hyper | Schedule,
    strength: Hyper | Schedule = 1.0,
    beta: Scalar = 1.0,
    inner_steps: int | None = None,
    mask: Mask | None = None,
    **options: Any,
) -> Transform:
    r"""Follow the regularized leader, FTRL-proximal, with a step size for each entry.

    .. math::
        w_{t+1} = \arg\min_z \; \langle \textstyle\sum_{s \le t} g_s, z \rangle
        + \frac{1}{2} \sum_{s \le t} \sum_i (h_{s,i} - h_{s-1,i}) (z_i - w_{s,i})^2 + t \lambda g(z), \quad
        h_t = \frac{\beta + \sqrt{\sum_{s \le t} g_s^2}}{\eta}

    The steps of AdaGrad, with the penalty of all rounds at once: it ends at a minimum of :math:`f + \lambda g`, with
    exact zeros that stay. McMahan and others (2013), and Keras, keep the penalty of a single round however many there
    are: that is `strength=lambda count: l1 / (count + 1)`. They begin at zeros, and at the first step forget weights
    that are none; here these are where it begins.

    Args:
        learning_rate: :math:`\eta`: number above 0, or tensor.
        penalty: A penalty :math:`g` that has a proximal operator in a metric, or a convex one with `inner_steps`.
        hyper: Its hyperparameters.
        strength: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        beta: :math:`\beta`, above 0: what holds the first step back.
        inner_steps: For a convex penalty without a rule in a metric; see `ramda`.
        mask: Leaves on which the penalty acts; the others take AdaGrad's steps.
        options: Static options of the penalty, such as `dim`.

    Example:
        >>> tx, params = ftrl(0.5, l1, strength=0.3), {"w": torch.tensor([2.0, 0.1])}
        >>> state = tx.init(params)
        >>> for _ in range(400):
        ...     updates, state = tx.update({"w": params["w"] - torch.tensor([1.0, 0.2])}, state, params)
        ...     params = apply_updates(params, updates)
        >>> params
        {'w': tensor([0.7000, 0.0000])}

    References:
        McMahan, *Follow-the-regularized-leader and mirror descent: equivalence theorems and L1 regularization*, 2011.
        McMahan and others, *Ad click prediction: a view from the trenches*, 2013.
    """
    positive(learning_rate=learning_rate, beta=beta)
    finite_nonnegative(learning_rate=learning_rate, beta=beta)
    learning_rate, beta = scalars(learning_rate=learning_rate, beta=beta)
    hyper, options = check_penalty(penalty, hyper, options)
    check_strength(penalty, strength)
    check_inner_steps(inner_steps)
    check_selection(mask)

    def init(params: Params) -> FtrlState:
        check_fit(params, mask, strength, *hyper)
        check_groups_are_whole(penalty, mask, params)
        steps = counter(params)
        _check_rule_in_metric(penalty, params, [at_step(value, steps) for value in hyper], inner_steps, mask, options)
        return FtrlState(steps, _real_zeros(params), zeros(params))

    def update(updates: Updates, state: FtrlState, params: Params) -> tuple[Updates, FtrlState]:
        force, *values = (at_step(value, state.steps) for value in (strength, *hyper))
        steps = increment(state.steps)
        squares = compute(lambda n, g: n + squared(g), state.squares, updates)
        h = compute(lambda n, b, r: (b + safe_sqrt(n)) / r, squares, hyper=(beta, learning_rate))
        before = compute(lambda n, b, r: (b + safe_sqrt(n)) / r, state.squares, hyper=(beta, learning_rate))
        held = torch.where(state.steps == 0, 0.0, 1.0)  # Before the first step nothing holds.
        linear = compute(
            lambda z, g, w, h, h0, c: z + g - (h - c * h0) * w,
            state.linear,
            updates,
            compute_wide(lambda w: w, params),
            h,
            before,
            hyper=(held,),
        )
        reached = compute_wide(lambda z, h: -z / h, linear, h)
        force = product(kept_by(mask, params), steps.to(torch.float64), force)
        landed = land(params, reached, force, h, penalty, values, inner_steps, mask, options)
        # In the dtype of the parameters, or w + (0 - w) would not be 0.
        moves = compute(lambda w, z: z - w, params, landed)
        return moves, FtrlState(steps, squares, linear)

    return Transform(init, update, state=FtrlState, descends=True, spares=left_out(mask), stages=["steps", "lands"])


@remembered
def adamprox(
    learning_rate: Hyper | Schedule,
    weight_decay: Hyper | Schedule = 1e-2,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    mask: Mask | None = None,
) -> Transform:
    r"""AdamW with its decay in proximal form, :math:`w' = (w - \eta d) / (1 + \eta \lambda)`, :math:`d` Adam's step.

    AdamW multiplies by :math:`1 - \eta \lambda` instead: the same to first order, but negative for
    :math:`\eta \lambda > 1`, and unstable above 2. This one shrinks weights at any strength. Like AdamW's, the decay
    does not see Adam's metric; `prox_adam(learning_rate, half_l2)` is the ridge penalty that does.

    Args:
        learning_rate: :math:`\eta`: number of at least 0, tensor or schedule.
        weight_decay: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        b1: Decay of the mean.
        b2: Decay of the mean square.
        eps: :math:`\epsilon`, added to the root.
        mask: Leaves that decay; True means apply.

    Example:
        >>> tx, params = adamprox(0.1, weight_decay=10.0), {"w": torch.tensor([2.0])}
        >>> updates, state = tx.update({"w": torch.tensor([1.0])}, tx.init(params), params)
        >>> apply_updates(params, updates)
        {'w': tensor([0.9500])}

    References:
        Zhuang, Liu, Cutkosky & Orabona, *Understanding AdamW through proximal methods and scale-freeness*, 2022.
    """
    adam = scale_by_adam(b1, b2, eps)
    plain = Transform(adam.init, adam.update)  # Tells no metric: the decay is that of AdamW.
    return descend(plain, lambda state: 1.0, learning_rate, half_l2, (), weight_decay, mask, {})
