"""Proximal optimizers: their fixed point solves the penalized problem, with exact zeros.

A step of size eta along a direction d in a metric h goes to w - eta d / h. The proximal operator after it has to see
the same eta, the same h, and the factor by which the direction exceeds a gradient in the long run: 1 / (1 - beta) for
a momentum buffer, 1 for Adam. Otherwise the fixed point solves a problem of another strength.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Params, Scalar, Schedule, State, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute, compute_wide, increment, product, scalar_device, total
from funcreg.core.masks import keep, kept_by, mask_leaves, merge
from funcreg.core.ranges import flags, scalars
from funcreg.core.tree import tree_leaves, tree_map
from funcreg.networks.coupled import check_groups_are_whole
from funcreg.regularizers.descent import accelerate, approach, check_inner_steps, overlaps
from funcreg.regularizers.penalty import Penalty
from funcreg.transforms.adam_family import scale_by_adam
from funcreg.transforms.factory_checks import below_one, check_selection, finite_nonnegative, positive, without_momentum
from funcreg.transforms.holding import check_decided, hold
from funcreg.transforms.regularizing import check_penalty, check_strength
from funcreg.transforms.scaling import TraceState, trace
from funcreg.transforms.transform import Choice, Transform, at_step, check_fit, counter, identity, public_state


@public_state
class ProximalState(NamedTuple):
    """The state of `prox_sgd`, `prox_adam` and `proximal_step`.

    Example:
        >>> prox_sgd(0.1, l1).init(torch.zeros(1))
        ProximalState(steps=tensor(0, dtype=torch.int32), direction=EmptyState())
    """

    steps: Tensor  # Number of updates made, int32.
    direction: State  # Of the momentum or the preconditioner.


@public_state
class WeighedTraceState(NamedTuple):
    """The state of the momentum of `prox_sgd` where it is a tensor, and so may change.

    Example:
        >>> prox_sgd(0.1, l1, momentum=torch.tensor(0.5)).init(torch.zeros(1)).direction
        WeighedTraceState(trace=tensor([0.]), weights=tensor(2., dtype=torch.float64))
    """

    trace: Params  # Decayed sum of updates.
    weights: Tensor  # The sum of their weights in it, in the long run 1 / (1 - momentum).


def _weighed_trace(decay: Tensor, nesterov: bool) -> Transform:
    """`trace` of a decay that may change from step to step, and the sum of the weights of updates in it."""
    plain = trace(decay, nesterov)

    def init(params: Params) -> WeighedTraceState:
        # From the long run, as with a number: a sum that began at 0 would begin with weaker penalties.
        weights = 1 / (1 - decay.to(scalar_device(params), torch.float64, copy=True))
        return WeighedTraceState(plain.begin(params).trace, weights)

    def update(updates: Updates, state: WeighedTraceState, params: Params) -> tuple[Updates, WeighedTraceState]:
        direction, after = plain.update(updates, TraceState(state.trace), params)
        now = decay.to(state.weights)
        stays = 1 / (1 - now)  # Without rounding where the momentum is what it was.
        weights = torch.where(state.weights == stays, stays, 1 + now * state.weights)
        return direction, WeighedTraceState(after.trace, weights)

    return Transform(init, update, state=WeighedTraceState)


def left_out(mask: Mask | None) -> Choice | None:
    """The leaves on which a penalty does not act, which stay where they are without a gradient."""
    return None if mask is None else lambda params: [not chosen for chosen in mask_leaves(mask, params)]


def land(
    params: Params,
    reached: Params,
    step: Hyper,
    metric: Params | None,
    penalty: Penalty,
    values: list[Hyper],
    inner_steps: int | None,
    mask: Mask | None,
    options: dict[str, Any],
) -> Params:
    """The proximal point of what was reached: by the rule of a penalty, or by some steps from the parameters."""
    if inner_steps is None or metric is None:
        return penalty.prox(reached, step, *values, metric=metric, mask=mask, **options)
    chosen = [True] * len(tree_leaves(params)) if mask is None else mask_leaves(mask, params)
    begin, goal, h = (keep(tree, chosen) for tree in (params, reached, metric))
    prox = lambda x, size: penalty.prox(x, size, *values, **options)
    apart = not penalty.couples_leaves
    # From the parameters: at a solution of the penalized problem they are that point already.
    return merge(reached, approach(prox, begin, goal, h, step, inner_steps, apart), chosen)


def descend(
    direction: Transform,
    gain: Callable[[Any], Scalar],
    learning_rate: Hyper | Schedule,
    penalty: Penalty,
    hyper: tuple[Hyper, ...],
    strength: Hyper | Schedule,
    mask: Mask | None,
    options: dict[str, Any],
    weight_decay: Hyper | Schedule = 0.0,
    max_step: Hyper | Schedule | None = None,
    inner_steps: int | None = None,
) -> Transform:
    """A step along a direction, then the proximal operator in the direction's metric, if it has one."""
    finite_nonnegative(learning_rate=learning_rate, weight_decay=weight_decay)
    hyper, options = check_penalty(penalty, hyper, options)
    check_strength(penalty, strength)
    check_selection(mask)
    along_free = direction if direction.unheld is None else direction.unheld  # `hold` sees to what it freezes.

    def init(params: Params) -> ProximalState:
        check_fit(params, None, learning_rate, weight_decay)
        check_fit(params, mask, strength, *hyper)
        check_groups_are_whole(penalty, mask, params)
        check_decided([along_free], params)
        return ProximalState(counter(params), along_free.begin(params))

    def update(updates: Updates, state: ProximalState, params: Params) -> tuple[Updates, ProximalState]:
        rate, force, decay, *values = (
            at_step(value, state.steps) for value in (learning_rate, strength, weight_decay, *hyper)
        )
        along, inner = along_free.update(updates, state.direction, params)
        metric = None if direction.metric is None else direction.metric(inner)
        if max_step is not None:
            # The direction is divided by the same metric that the proximal operator sees.
            most, free = at_step(max_step, state.steps), metric
            metric = compute(lambda h, r, m: h.clamp(min=r / m), free, hyper=(rate, most))
            along = compute_wide(lambda d, h, c: d * (h / c), along, free, metric)
        reached = compute_wide(lambda w, d, r, c: w - r * (d + c * w), params, along, hyper=(rate, decay))
        step = product(kept_by(mask, params), rate, force, gain(inner))
        count = inner_steps
        if count is None and metric is not None and not penalty.in_metric(params, *values, mask=mask, **options):
            count = 1
        landed = land(params, reached, step, metric, penalty, values, count, mask, options)
        # In the dtype of the parameters, or w + (0 - w) would not be 0.
        moves = compute(lambda w, z: z - w, params, landed)
        return moves, ProximalState(increment(state.steps), inner)

    tx = Transform(init, update, state=ProximalState, descends=True, spares=left_out(mask), stages=["steps", "lands"])
    return hold(tx, [direction])


@remembered
def prox_sgd(
    learning_rate: Hyper | Schedule,
    penalty: Penalty,
    *hyper: Hyper | Schedule,
    strength: Hyper | Schedule = 1.0,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    mask: Mask | None = None,
    **options: Any,
) -> Transform:
    r"""Proximal gradient descent, :math:`w' = \operatorname{prox}_{\eta \lambda g / (1 - \beta)}(w - \eta m)`.

    Its fixed point minimizes :math:`f + \lambda g`: for `l1` the lasso, with its exact zeros, under any schedule of
    the learning rate and with momentum. Without momentum this is ISTA.

    Args:
        learning_rate: :math:`\eta`: number of at least 0, tensor or schedule. Below 2 / L, for a gradient with
            Lipschitz constant L, plain descent converges.
        penalty: A penalty :math:`g` such as `l1`.
        hyper: Its hyperparameters.
        strength: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        momentum: :math:`\beta` of the buffer :math:`m_t = g_t + \beta m_{t-1}`, at least 0 and below 1; None for none.
            Where it is a tensor it may be changed in place, as schedulers do in `Optimizer`: then the sum of the
            weights of gradients in :math:`m`, which the state keeps, stands for :math:`1 / (1 - \beta)`.
        nesterov: Whether the step follows :math:`g_t + \beta m_t`.
        mask: Leaves on which the penalty acts; the others take plain steps.
        options: Static options of the penalty, such as `dim`.

    Example:
        The lasso of one weight: the minimum of :math:`\frac{1}{2} (w - 1)^2 + 0.3 |w|` is at 0.7.

        >>> tx, params = prox_sgd(0.5, l1, strength=0.3), {"w": torch.tensor([5.0])}
        >>> state = tx.init(params)
        >>> for _ in range(60):
        ...     updates, state = tx.update({"w": params["w"] - 1}, state, params)
        ...     params = apply_updates(params, updates)
        >>> params
        {'w': tensor([0.7000])}

    References:
        Daubechies, Defrise & De Mol, *An iterative thresholding algorithm for linear inverse problems*, 2004.
    """
    flags(nesterov=nesterov)
    without_momentum(momentum, nesterov=nesterov)
    if momentum is None:
        direction, gain = identity(), lambda state: 1.0
    else:
        below_one(momentum=momentum)
        (decay,) = scalars(momentum=momentum)
        if isinstance(decay, Tensor):
            direction = _weighed_trace(decay, nesterov)
            gain = lambda state: 1 + decay * state.weights if nesterov else state.weights
        else:
            direction, gain = trace(decay, nesterov), lambda state: 1 / (1 - decay)
    return descend(direction, gain, learning_rate, penalty, hyper, strength, mask, options)


@remembered
def prox_adam(
    learning_rate: Hyper | Schedule,
    penalty: Penalty,
    *hyper: Hyper | Schedule,
    strength: Hyper | Schedule = 1.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Hyper | Schedule = 0.0,
    mask: Mask | None = None,
    **options: Any,
) -> Transform:
    r"""Adam with the proximal operator in its metric :math:`h = \sqrt{\hat v} + \epsilon`.

    .. math:: w' = \arg\min_z \frac{1}{2} \sum_i h_i (z_i - w_i + \eta \hat m_i / h_i)^2 + \eta \lambda g(z)

    Its fixed point minimizes :math:`f + \lambda g`, with exact zeros. A threshold without the metric would weigh
    each entry by its own :math:`h_i`, and with :math:`\lambda \ge 1` zero everything.

    An entry whose gradient is always 0 (an unused row of an embedding) has :math:`h = \epsilon` and goes to zero at
    once; leave it out with `mask`, raise `eps`, or give `max_step`.

    Args:
        learning_rate: :math:`\eta`: number of at least 0, tensor or schedule.
        penalty: A penalty :math:`g` with a proximal operator. One without a rule in a metric, such as `nuclear`,
            shares one number of :math:`h` for each leaf; see `inner_steps` of `proximal_step`.
        hyper: Its hyperparameters.
        strength: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        b1: Decay of the mean.
        b2: Decay of the mean square.
        eps: :math:`\epsilon`.
        weight_decay: Decoupled decay, as in AdamW: the step also subtracts :math:`\eta` times this times :math:`w`.
        mask: Leaves on which the penalty acts; the others take plain steps.
        options: Static options of the penalty, such as `dim`; `max_step` and `inner_steps` of `proximal_step`.

    Example:
        >>> tx, params = prox_adam(0.1, l1, strength=0.3), {"w": torch.tensor([2.0, 0.1])}
        >>> state = tx.init(params)
        >>> for _ in range(400):
        ...     updates, state = tx.update({"w": params["w"] - torch.tensor([1.0, 0.2])}, state, params)
        ...     params = apply_updates(params, updates)
        >>> params
        {'w': tensor([0.7000, 0.0000])}

    References:
        Yun, Lozano & Yang, *Adaptive proximal gradient methods for structured neural networks*, 2021.
    """
    adam = scale_by_adam(b1, b2, eps)
    return proximal_step(
        adam, learning_rate, penalty, *hyper, strength=strength, weight_decay=weight_decay, mask=mask, **options
    )


@remembered
def proximal_step(
    preconditioner: Transform,
    learning_rate: Hyper | Schedule,
    penalty: Penalty,
    *hyper: Hyper | Schedule,
    strength: Hyper | Schedule = 1.0,
    weight_decay: Hyper | Schedule = 0.0,
    max_step: Hyper | Schedule | None = None,
    inner_steps: int | None = None,
    mask: Mask | None = None,
    **options: Any,
) -> Transform:
    r"""A step of a preconditioner, with the proximal operator in its metric :math:`h`, and zeros that are exact.

    .. math:: w' = \arg\min_z \frac{1}{2} \sum_i h_i (z_i - w_i + \eta d_i)^2 + \eta \lambda g(z)

    Its fixed point minimizes :math:`f + \lambda g` whatever the metric, if the direction :math:`d` comes to be the
    gradient over :math:`h`, as it does for `scale_by_adam`, `scale_by_amsgrad`, `scale_by_rms`, `scale_by_stddev`,
    `scale_by_rss`, `scale_by_adamax`, `scale_by_belief`, `scale_by_yogi`, `scale_by_radam`, `scale_by_adan`,
    `scale_by_adadelta`, `scale_by_novograd`, `scale_by_factored_rms`, `scale_by_ademamix`,
    `scale_by_simplified_ademamix`, `scale_by_adopt` and `scale_by_sm3(keep_metric=True)`. Momentum stands before these
    as `ema`; `trace` exceeds the gradient, and would weaken the penalty.

    An entry whose gradient is always 0 (an unused row of an embedding, a dead unit) has the metric
    :math:`\epsilon`, and the step :math:`\eta / \epsilon` takes it to zero at once. That is the minimum, but may
    surprise: `max_step` bounds :math:`\eta / h`, so that the entry shrinks by that times the slope of
    :math:`\lambda g`, and `mask` leaves it alone. With a bound of :math:`1 / L`, for a gradient with Lipschitz
    constant L, no learning rate is too large.

    Args:
        preconditioner: A transform that tells its metric, or a chain with one such link.
        learning_rate: :math:`\eta`: number of at least 0, tensor or schedule.
        penalty: A penalty :math:`g`.
        hyper: Its hyperparameters.
        strength: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        weight_decay: Decoupled decay, as in AdamW: the step also subtracts :math:`\eta` times this times :math:`w`.
        max_step: Greatest :math:`\eta / h`, above 0: number, tensor, schedule, or a tree of them; None for no bound.
        inner_steps: For a penalty without a proximal operator in a metric, such as `nuclear`: how many steps of `fista`
            stand in for it, at least 1. The fixed point is the same for any number. With 1, the default, the step and
            the proximal operator share one number, the greatest of :math:`h` in each leaf (in all leaves, if the
            penalty may couple them); where the penalty is convex, about 5 come near the metric of each entry, and
            need far fewer updates. None for the penalty's own rule, where it has one.
        mask: Leaves on which the penalty acts; the others take plain steps.
        options: Static options of the penalty, such as `dim`.

    Example:
        >>> tx, params = proximal_step(scale_by_rms(), 0.1, l1, strength=0.3), {"w": torch.tensor([2.0, 0.1])}
        >>> state = tx.init(params)
        >>> for _ in range(400):
        ...     updates, state = tx.update({"w": params["w"] - torch.tensor([1.0, 0.2])}, state, params)
        ...     params = apply_updates(params, updates)
        >>> params
        {'w': tensor([0.7000, 0.0000])}

        The second weight has no gradient: capped, it shrinks by 0.5 times 0.3.

        >>> tx = proximal_step(scale_by_adam(), 0.1, l1, strength=0.3, max_step=0.5)
        >>> params, grads = {"w": torch.tensor([2.0, 2.0])}, {"w": torch.tensor([1.0, 0.0])}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> apply_updates(params, updates)
        {'w': tensor([1.8700, 1.8500])}

    References:
        Duchi, Hazan & Singer, *Adaptive subgradient methods for online learning and stochastic optimization*, 2011.
        Yun, Lozano & Yang, *Adaptive proximal gradient methods for structured neural networks*, 2021.
    """
    if not isinstance(preconditioner, Transform):
        raise TypeError(f"preconditioner is {preconditioner!r}; expected a Transform such as scale_by_adam()")
    if preconditioner.descends:
        raise ValueError(
            f"preconditioner is {preconditioner!r}, whose updates are steps downhill with a learning rate in them; "
            "expected the direction alone, such as scale_by_adam() in place of adam(0.1). The learning rate is given "
            "to the proximal step, once."
        )
    if preconditioner.metric is None:
        raise ValueError(
            "preconditioner tells no metric; expected a transform such as scale_by_adam, or a chain with one such "
            "link; scale_by_sm3 keeps one with keep_metric=True. Is it a wrapper, which may stand around proximal_step "
            "instead? For momentum alone, take prox_sgd."
        )
    if max_step is not None:
        positive(max_step=max_step)
    check_inner_steps(inner_steps)
    return descend(
        preconditioner,
        lambda state: 1.0,
        learning_rate,
        penalty,
        hyper,
        strength,
        mask,
        options,
        weight_decay,
        max_step,
        inner_steps,
    )


@public_state
class FistaState(NamedTuple):
    """The state of `fista`.

    Example:
        >>> fista(0.1, l1).init(torch.zeros(1)).solution
        tensor([0.])
    """

    steps: Tensor  # Number of updates made, int32.
    momentum: Tensor  # The sequence t_k, float64.
    solution: Params  # The last proximal point, sparse at every step.


@remembered
def fista(
    learning_rate: Hyper | Schedule,
    penalty: Penalty,
    *hyper: Hyper | Schedule,
    strength: Hyper | Schedule = 1.0,
    restart: bool = True,
    mask: Mask | None = None,
    **options: Any,
) -> Transform:
    r"""Accelerated proximal gradient descent, for gradients without noise.

    .. math::
        x_{k+1} = \operatorname{prox}_{\eta \lambda g}(y_k - \eta \nabla f(y_k)), \quad
        y_{k+1} = x_{k+1} + \frac{t_k - 1}{t_{k+1}} (x_{k+1} - x_k)

    The parameters are the points :math:`y`, where gradients are taken; `state.solution` holds the points :math:`x`,
    which are sparse at every step. Both end at the minimum of :math:`f + \lambda g`.

    Args:
        learning_rate: :math:`\eta`: number of at least 0, tensor or schedule; at most 1 / L for a gradient with
            Lipschitz constant L.
        penalty: A convex penalty :math:`g` such as `l1`.
        hyper: Its hyperparameters.
        strength: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        restart: Whether the momentum starts anew when it points uphill, which makes the descent several times faster.
        mask: Leaves on which the penalty acts; the others take plain accelerated steps.
        options: Static options of the penalty, such as `dim`.

    Example:
        >>> tx, params = fista(0.5, l1, strength=0.3), {"w": torch.tensor([5.0, 0.1])}
        >>> state = tx.init(params)
        >>> for _ in range(60):
        ...     updates, state = tx.update({"w": params["w"] - torch.tensor([1.0, 0.2])}, state, params)
        ...     params = apply_updates(params, updates)
        >>> state.solution
        {'w': tensor([0.7000, 0.0000])}

    References:
        Beck & Teboulle, *A fast iterative shrinkage-thresholding algorithm for linear inverse problems*, 2009.
        O'Donoghue & Candes, *Adaptive restart for accelerated gradient schemes*, 2015.
    """
    finite_nonnegative(learning_rate=learning_rate)
    flags(restart=restart)
    hyper, options = check_penalty(penalty, hyper, options)
    check_strength(penalty, strength)
    check_selection(mask)

    def init(params: Params) -> FistaState:
        check_fit(params, None, learning_rate)
        check_fit(params, mask, strength, *hyper)
        check_groups_are_whole(penalty, mask, params)
        steps = counter(params)
        return FistaState(steps, torch.ones_like(steps, dtype=torch.float64), tree_map(torch.clone, params))

    def update(updates: Updates, state: FistaState, params: Params) -> tuple[Updates, FistaState]:
        rate, force, *values = (at_step(value, state.steps) for value in (learning_rate, strength, *hyper))
        reached = compute_wide(lambda y, g, r: y - r * g, params, updates, hyper=(rate,))
        step = product(kept_by(mask, params), rate, force)
        x = penalty.prox(reached, step, *values, mask=mask, **options)
        uphill = total(overlaps(params, x, state.solution)) > 0 if restart else None
        further, momentum = accelerate(state.momentum, uphill)
        # From y to the next y, in one subtraction: where x and its predecessor are zero, y becomes exactly zero.
        moves = compute(lambda y, x, x0, k: x + k * (x - x0) - y, params, x, state.solution, hyper=(further,))
        return moves, FistaState(increment(state.steps), momentum, compute(lambda x0, x: x, state.solution, x))

    return Transform(init, update, state=FistaState, descends=True, spares=left_out(mask), stages=["steps", "lands"])
