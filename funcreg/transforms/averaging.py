"""Optimizers around optimizers: slow weights, averages in place of a schedule, steps from the worst point nearby."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Params, Scalar, Schedule, State, Updates
from funcreg.core.construction import remembered, transforms_in
from funcreg.core.leafwise import beside, compute, compute_wide, increment, kept_dtype, scalar_device
from funcreg.core.ranges import check_range, concrete, flags, scalars, single
from funcreg.core.tree import tree_leaves, tree_map
from funcreg.core.wording import type_of
from funcreg.transforms.chains import chain
from funcreg.transforms.combine import pick
from funcreg.transforms.factory_checks import check_transforms, dtypes, finite_nonnegative, share
from funcreg.transforms.holding import hold
from funcreg.transforms.phases import warmup_constant_schedule
from funcreg.transforms.preconditioners import scale_by_rms
from funcreg.transforms.regularizing import add_decayed_weights
from funcreg.transforms.scaling import scale_by_learning_rate
from funcreg.transforms.transform import Choice, Transform, around, at_step, counter, everywhere, public_state, warn
from funcreg.transforms.wrappers import Named, check_period

#: What a number of calls is called, or what tells from it, in transforms that count them.
_COUNTING = ("every_k_schedule", "sync_period", "k", "should_transform_fn")

# Fast and slow weights


@public_state
class LookaheadParams(NamedTuple):
    """Fast and slow parameters of `lookahead`, for a loop that carries both.

    Example:
        >>> LookaheadParams.init_synced({"w": torch.ones(1)})
        LookaheadParams(fast={'w': tensor([1.])}, slow={'w': tensor([1.])})
    """

    fast: Params  # Gradients are taken here.
    slow: Params  # For evaluation.

    @classmethod
    def init_synced(cls, params: Params) -> LookaheadParams:
        """Both alike; the slow ones are copies."""
        return cls(params, tree_map(torch.clone, params))


@public_state
class LookaheadState(NamedTuple):
    """The state of `lookahead`.

    Example:
        >>> lookahead(sgd(0.1), 5, 0.5).init({"w": torch.ones(1)}).slow
        {'w': tensor([1.])}
    """

    fast_state: State
    steps_since_sync: Tensor  # int32.
    slow: Params  # The slow parameters; () where the parameters are `LookaheadParams`, which hold them.


class _Lookahead(Transform):
    """A transform that also takes gradients like the fast parameters alone, where it has both."""

    def update(self, updates: Updates, state: State, params: Params, **extra: Any) -> tuple[Updates, State]:
        if isinstance(params, LookaheadParams) and not isinstance(updates, LookaheadParams):
            updates = LookaheadParams(updates, params.slow)  # In the place of gradients that nobody looks at.
        return super().update(updates, state, params, **extra)


@remembered
def lookahead(
    fast_optimizer: Transform, sync_period: int, slow_step_size: Scalar, reset_state: bool = False
) -> Transform:
    r"""Let an optimizer run ahead, and every k steps go back to slow weights :math:`s' = s + \alpha (w - s)`.

    Parameters may be plain: they are the fast ones, and `state.slow` has the slow ones, which are for evaluation. So it
    stands in chains, masks and `Optimizer`. Or they are `LookaheadParams`, as in optax: gradients, like `params.fast`
    or like the pair, give a pair of updates. Where steps are to be clipped or scaled, do it inside.

    Slow weights are means, and an entry that is exactly zero in the fast weights alone is not zero in them: around
    `prox_sgd` or `prox_adam`, most zeros are lost at each synchronization. Train the last steps with the optimizer
    inside alone, from `state.slow`, which makes them again. Convex sets hold means of their points too.

    Args:
        fast_optimizer: Optimizer of the fast weights.
        sync_period: Number k of its steps from one synchronization to the next, at least 1.
        slow_step_size: :math:`\alpha`, from 0 to 1.
        reset_state: Whether the optimizer starts anew after each synchronization.

    Raises:
        ValueError: The state was begun with plain parameters and got a pair, or the other way round.

    Example:
        >>> tx, params = lookahead(sgd(0.1), 2, 0.5), {"w": torch.zeros(1)}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update({"w": torch.ones(1)}, state, params)
        ...     params = apply_updates(params, updates)
        >>> params, state.slow
        ({'w': tensor([-0.1000])}, {'w': tensor([-0.1000])})

        >>> tx, params = lookahead(sgd(0.1), 2, 0.5), LookaheadParams.init_synced({"w": torch.zeros(1)})
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
        >>> apply_updates(params, updates)
        LookaheadParams(fast={'w': tensor([-0.1000])}, slow={'w': tensor([0.])})

    References:
        Zhang, Lucas, Hinton & Ba, *Lookahead optimizer: k steps forward, 1 step back*, 2019.
    """
    check_transforms("lookahead", [fast_optimizer])
    _warn_of_rounding("lookahead", fast_optimizer)
    check_period("sync_period", sync_period)
    _warn_of_lost_counts("lookahead", fast_optimizer, sync_period if reset_state else None)
    share(slow_step_size=slow_step_size)
    (slow_step_size,) = scalars(slow_step_size=slow_step_size)
    flags(reset_state=reset_state)

    def init(params: Params) -> LookaheadState:
        fast = params.fast if isinstance(params, LookaheadParams) else params
        slow = () if isinstance(params, LookaheadParams) else tree_map(torch.clone, params)
        return LookaheadState(fast_optimizer.begin(fast), counter(params), slow)

    def update(updates: Updates, state: LookaheadState, params: Params, **extra: Any) -> tuple[Updates, LookaheadState]:
        pair = isinstance(params, LookaheadParams)
        fast, slow, grads = (params.fast, params.slow, updates.fast) if pair else (params, state.slow, updates)
        alone = type(state.slow) is tuple and len(state.slow) == 0
        if pair != alone and tree_leaves(fast):
            came, begun = ("LookaheadParams", "plain parameters") if pair else ("plain parameters", "LookaheadParams")
            raise ValueError(f"lookahead got {came}, and a state that was begun with {begun}; expected one kind")
        moves, after = fast_optimizer.update(grads, state.fast_state, fast, **fast_optimizer.accepted(extra))
        sync = state.steps_since_sync + 1 >= sync_period
        ahead = compute_wide(lambda w, u, s: w + u - s, fast, moves, slow)
        moves = compute(
            lambda u, d, sync, a: torch.where(sync, u - (1 - a) * d, u), moves, ahead, hyper=(sync, slow_step_size)
        )
        slowly = compute(
            lambda s, d, sync, a: torch.where(sync, a * d, torch.zeros_like(d)),
            slow,
            ahead,
            hyper=(sync, slow_step_size),
        )
        if reset_state:
            begun = fast_optimizer.begin(compute(lambda w, u: w + u, fast, moves))
            after = pick(sync, begun, after)
        count = torch.where(sync, torch.zeros_like(state.steps_since_sync), state.steps_since_sync + 1)
        if pair:
            return LookaheadParams(moves, slowly), LookaheadState(after, count, ())
        return moves, LookaheadState(after, count, compute(lambda s, d: s + d, slow, slowly))

    return _Lookahead(
        init,
        update,
        frozen=_of_fast(fast_optimizer.frozen),
        state=LookaheadState,
        descends=fast_optimizer.descends,
        spares=_of_fast(fast_optimizer.spares),
        stages=[*fast_optimizer.stages, "lands"],
        covers=_of_fast(fast_optimizer.covers),
        forwards_to=[fast_optimizer],
    )


def _warn_of_rounding(name: str, inner: Transform) -> None:
    """Warn if an optimizer whose parameters are averaged ends at numbers of sixteen bits."""
    if "rounds" in inner.stages:
        warn(
            f"{name} averages the parameters of {inner!r}, which end at numbers of sixteen bits: what it moves is "
            f"rounded away, or undone by the copies at the next step. Put {name} inside."
        )


def _warn_of_lost_counts(name: str, inner: Transform, period: int | None) -> None:
    """Warn if what starts anew after each period of calls acts by their number, and not in cycles of that period."""
    if period is not None and any([cycle is None or period % cycle for cycle in _cycles(inner)]):
        warn(
            f"{name} with reset_state=True starts {inner!r} anew at each synchronization, and with it the count of its "
            f"calls, which never passes {period}: what waits for more never happens, and what it gathered is lost. "
            "Take reset_state=False, or a sync_period that its own period divides."
        )


def _cycles(tx: Transform) -> list[int | None]:
    """After how many calls what counts them begins again, of a transform and those in it; None if that is not known."""
    if "counts" not in tx.stages or tx.made_by is None:
        return [None] * ("counts" in tx.stages)
    given = tx.made_by.arguments
    inside = [cycle for part in transforms_in(given) for cycle in _cycles(part)]
    own = [_whole(given[name]) for name in _COUNTING if name in given]
    if not own:
        return inside or [None]
    return [None if own[0] is None or cycle is None else own[0] * cycle for cycle in inside or [1]]


def _whole(value: Any) -> int | None:
    """A known number of calls; None of a function, or of a number in a tensor that cannot be read."""
    known = concrete(value)
    return None if known is None else int(known)


def _of_fast(choose: Choice | None) -> Choice | None:
    """A choice of plain parameters, for pairs too."""
    if choose is None or choose is everywhere:
        return choose
    return lambda params: choose(params.fast) * 2 if isinstance(params, LookaheadParams) else choose(params)


# An average in place of a schedule


@public_state
class ScheduleFreeState(NamedTuple):
    """The state of `schedule_free`.

    Example:
        >>> schedule_free_sgd(0.1).init(torch.ones(1)).z
        tensor([1.])
    """

    b1: Tensor  # float64, as are the next ones.
    weight_sum: Tensor  # Sum of the weights of the average.
    step_count: Tensor  # Number of updates made, from 1, int32.
    max_lr: Tensor  # Greatest learning rate so far.
    base_optimizer_state: State
    z: Params  # Where the base optimizer is.


@remembered
def schedule_free(
    base_optimizer: Transform,
    learning_rate: Scalar | Schedule,
    b1: Scalar = 0.9,
    weight_lr_power: Scalar = 2.0,
    state_dtype: torch.dtype | None = None,
) -> Transform:
    r"""Average the points of an optimizer, instead of letting its learning rate fall.

    .. math::
        z' = z + u(\nabla f(y)), \quad x' = (1 - c_t) x + c_t z', \quad y' = (1 - \beta) z' + \beta x'

    The parameters are the points :math:`y`, where gradients are taken; `schedule_free_eval_params` gives the average
    :math:`x`, which is for evaluation. Weights of the average are :math:`c_t = \gamma_t^p / \sum_s \gamma_s^p` of the
    greatest learning rate :math:`\gamma_t` so far. A proximal operator or a projection in the base optimizer acts on
    :math:`z`, so that averages of points in a convex set are in it too; exact zeros are those of `state.z`, and their
    averages have few.

    Args:
        base_optimizer: Optimizer without momentum, such as `sgd` or a chain with `scale_by_rms`.
        learning_rate: :math:`\gamma` of that optimizer: number of at least 0, tensor, or schedule, which may warm up.
            Its first value is taken at step 1, as in optax.
        b1: :math:`\beta`, above 0 and at most 1.
        weight_lr_power: :math:`p`.
        state_dtype: Dtype of :math:`z`; by default that of the parameter, float32 for 16-bit ones.

    Example:
        >>> tx, params = schedule_free(sgd(0.5), 0.5), {"w": torch.tensor([1.0])}
        >>> state = tx.init(params)
        >>> for _ in range(50):
        ...     updates, state = tx.update(params, state, params)  # The gradient of half the square.
        ...     params = apply_updates(params, updates)
        >>> bool(schedule_free_eval_params(state, params)["w"].abs() < 0.05)
        True

    References:
        Defazio et al., *The road less scheduled*, 2024.
    """
    check_transforms("schedule_free", [base_optimizer])
    _warn_of_rounding("schedule_free", base_optimizer)
    if isinstance(learning_rate, (dict, list, tuple)):
        raise TypeError("learning_rate is a tree; expected a number, a tensor or a schedule: it weighs whole points")
    single(learning_rate=learning_rate)
    finite_nonnegative(learning_rate=learning_rate)
    check_range("b1", b1, 0.0, 1.0, open_low=True)
    check_range("weight_lr_power", weight_lr_power, finite=True)
    b1, weight_lr_power = scalars(b1=b1, weight_lr_power=weight_lr_power)
    dtypes(state_dtype=state_dtype)
    lands = "lands" in base_optimizer.stages

    def init(params: Params) -> ScheduleFreeState:
        zero = torch.zeros((), dtype=torch.float64, device=scalar_device(params))
        z = tree_map(lambda w: w.clone().to(kept_dtype(w, state_dtype)), params)
        inner = base_optimizer.begin(params)
        return ScheduleFreeState(zero + b1, zero.clone(), counter(params) + 1, zero.clone(), inner, z)

    def update(
        updates: Updates, state: ScheduleFreeState, params: Params, **extra: Any
    ) -> tuple[Updates, ScheduleFreeState]:
        rate = at_step(learning_rate, state.step_count)
        greatest = torch.maximum(state.max_lr, torch.zeros_like(state.max_lr) + beside(rate, state.max_lr))
        weight = greatest**weight_lr_power
        whole = state.weight_sum + weight
        share_of_z = torch.where(whole == 0, 0.0, weight / torch.where(whole == 0, 1.0, whole))
        # Where the base optimizer lands is relative to its own point; its decay is that of the parameters.
        at = tree_map(lambda z, w: z.to(w.dtype), state.z, params) if lands else params
        moves, inner = base_optimizer.update(updates, state.base_optimizer_state, at, **base_optimizer.accepted(extra))
        z = compute(lambda z, u: z + u, state.z, moves)
        # By differences, which are exactly 0 at a leaf that does not move.
        step = compute(_toward_average, params, state.z, z, hyper=(b1, share_of_z))
        count = increment(state.step_count)
        return step, ScheduleFreeState(state.b1.clone(), whole, count, greatest, inner, z)

    return around(base_optimizer, init, update, ScheduleFreeState, stages=["lands"])


def _toward_average(y: Tensor, before: Tensor, z: Tensor, b: Scalar, c: Scalar) -> Tensor:
    """From y to the next y: the average x is known from y and the z before."""
    x = y + (1 - b) / b * (y - before)
    return b * c * (z - x) + (1 - b) * (z - before)


def schedule_free_eval_params(state: ScheduleFreeState, params: Params) -> Params:
    r"""The average :math:`x = (y - (1 - \beta) z) / \beta` of `schedule_free`, where a model is evaluated.

    Args:
        state: State of `schedule_free` itself; in a chain it is one of several.
        params: The parameters :math:`y` that belong to it.

    Raises:
        ValueError: The state is another one, or one of several stacked members.

    Example:
        >>> tx, params = schedule_free_sgd(0.5), {"w": torch.tensor([1.0])}
        >>> schedule_free_eval_params(tx.init(params), params)
        {'w': tensor([1.])}
    """
    if not isinstance(state, ScheduleFreeState):
        raise ValueError(
            f"state is {type_of(state)}; expected the ScheduleFreeState of schedule_free. In the state of a "
            "chain it stands at the place of that link, as in state[1]."
        )
    if state.b1.ndim:
        raise ValueError(
            "state is one of stacked members; expected that of one. torch.func.vmap(schedule_free_eval_params) takes "
            "them all."
        )
    return compute(lambda y, z, b: y + (1 - b) / b * (y - z), params, state.z, hyper=(state.b1,))


def _warmed(learning_rate: Scalar | Schedule, warmup_steps: int | None) -> Scalar | Schedule:
    if warmup_steps is None:
        return learning_rate
    if callable(learning_rate):
        raise TypeError("learning_rate is a schedule, and warmup_steps is given too; expected a number with it")
    check_period("warmup_steps", warmup_steps)
    return warmup_constant_schedule(0.0, learning_rate, warmup_steps)


@remembered
def schedule_free_sgd(
    learning_rate: Scalar | Schedule = 1.0,
    warmup_steps: int | None = None,
    b1: Scalar = 0.9,
    weight_decay: Scalar | Schedule | None = None,
    weight_lr_power: Scalar = 2.0,
    state_dtype: torch.dtype | None = None,
) -> Transform:
    r"""Gradient descent whose points are averaged by `schedule_free`, with a constant learning rate.

    Args:
        learning_rate: :math:`\gamma`.
        warmup_steps: Number of steps in which it rises from 0; None for none.
        b1: :math:`\beta` of the average.
        weight_decay: :math:`\lambda`; each step also subtracts :math:`\gamma \lambda y`. None for none.
        weight_lr_power: Power of the learning rate in the weights of the average.
        state_dtype: Dtype of the points that are averaged.

    Example:
        >>> tx, params = schedule_free_sgd(0.5), {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([1.0])}, tx.init(params), params)
        >>> updates
        {'w': tensor([-0.5000])}

    References:
        Defazio et al., *The road less scheduled*, 2024.
    """
    rate = _warmed(learning_rate, warmup_steps)
    step = scale_by_learning_rate(rate)
    base = step if weight_decay is None else chain(add_decayed_weights(weight_decay), step)
    return schedule_free(base, rate, b1, weight_lr_power, state_dtype)


@remembered
def schedule_free_adamw(
    learning_rate: Scalar | Schedule = 0.0025,
    warmup_steps: int | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.0,
    weight_lr_power: Scalar = 2.0,
    state_dtype: torch.dtype | None = None,
) -> Transform:
    r"""AdamW whose momentum is the average of `schedule_free`, with a constant learning rate.

    Args:
        learning_rate: :math:`\gamma`.
        warmup_steps: Number of steps in which it rises from 0; None for none.
        b1: :math:`\beta` of the average.
        b2: Decay of the mean square.
        eps: :math:`\epsilon`, added to the root.
        weight_decay: :math:`\lambda`; each step also subtracts :math:`\gamma \lambda y`.
        weight_lr_power: Power of the learning rate in the weights of the average.
        state_dtype: Dtype of the points that are averaged.

    Example:
        >>> tx, params = schedule_free_adamw(0.5), {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([3.0])}, tx.init(params), params)
        >>> updates
        {'w': tensor([-0.5000])}

    References:
        Defazio et al., *The road less scheduled*, 2024.
    """
    rate = _warmed(learning_rate, warmup_steps)
    base = chain(
        scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(rate),
    )
    return schedule_free(base, rate, b1, weight_lr_power, state_dtype)


# Steps from the worst point nearby


@public_state
class SAMState(NamedTuple):
    """The state of `sam`.

    Example:
        >>> sam(sgd(0.1), sgd(0.05)).init(torch.ones(1)).cache
        tensor([1.])
    """

    steps_since_sync: Tensor  # Number of steps uphill since the last one downhill, int32.
    opt_state: State
    adv_state: State
    cache: Params  # Where the last step downhill ended; () in opaque mode.


@remembered
def sam(
    optimizer: Transform,
    adv_optimizer: Transform,
    sync_period: int = 2,
    reset_state: bool = True,
    opaque_mode: bool = False,
) -> Transform:
    r"""Sharpness-aware minimization: descend along the gradient at the worst point nearby.

    Of every k updates, k - 1 climb, with the steps of `adv_optimizer` turned round; the last one goes back to where
    they began, and from there a step of `optimizer` along the gradient at the top. So parameters are between two steps
    of `optimizer` where the loss is bad. In opaque mode all this is one update, which is given the gradient function.

    The radius :math:`\rho` of the paper is the learning rate of `adv_optimizer` along gradients of norm 1. A step that
    lands, at exact zeros or in a set, lands there; what `optimizer` freezes does not climb.

    With a period of 1, which never climbs, this is `optimizer`; optax goes back a step each time then.

    Args:
        optimizer: Optimizer of the steps downhill.
        adv_optimizer: Optimizer of the steps uphill, written as if it went downhill.
        sync_period: Number k of updates from one step downhill to the next, at least 1.
        reset_state: Whether `adv_optimizer` starts anew after each step downhill.
        opaque_mode: Whether one update does all k, with the extra argument `grad_fn(params, i)`: the gradients at
            the climbing parameters, for i from 0 to k - 2.

    Raises:
        TypeError: In opaque mode `update` got no `grad_fn`.

    Example:
        >>> unit = stateless(lambda grads, params: tree_map(lambda g: g / global_norm(grads), grads))
        >>> tx, params = sam(sgd(0.1), chain(unit, sgd(0.05))), {"w": torch.tensor([1.0])}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(params, state, params)  # The gradient of half the square.
        ...     params = apply_updates(params, updates)
        >>> params  # 1 - 0.1 * 1.05
        {'w': tensor([0.8950])}

    References:
        Foret, Kleiner, Mobahi & Neyshabur, *Sharpness-aware minimization for efficiently improving generalization*,
        2021.
    """
    check_transforms("sam", [optimizer, adv_optimizer])
    check_period("sync_period", sync_period)
    flags(reset_state=reset_state, opaque_mode=opaque_mode)
    _warn_of_lost_counts("sam", adv_optimizer, sync_period if reset_state else None)
    climber = hold(adv_optimizer, [optimizer])

    def init(params: Params) -> SAMState:
        cache = () if opaque_mode else tree_map(torch.clone, params)
        return SAMState(counter(params), optimizer.begin(params), climber.begin(params), cache)

    def visible(updates: Updates, state: SAMState, params: Params, **extra: Any) -> tuple[Updates, SAMState]:
        n = state.steps_since_sync
        last = n + 1 >= sync_period
        cache = pick(n == 0, params, state.cache)
        up, adv = climber.update(updates, state.adv_state, params, **climber.accepted(extra))
        down, opt = optimizer.update(updates, state.opt_state, cache, **optimizer.accepted(extra))
        # In the dtype of the parameters, so that zeros where it lands are exact.
        landed = compute(lambda c, u: c + u, cache, down)
        moves = compute(lambda w, z, u, last: torch.where(last, z - w, -u), params, landed, up, hyper=(last,))
        adv = pick(last, climber.begin(params) if reset_state else state.adv_state, adv)
        opt = pick(last, opt, state.opt_state)
        return moves, SAMState(torch.where(last, torch.zeros_like(n), n + 1), opt, adv, cache)

    def opaque(
        updates: Updates, state: SAMState, params: Params, grad_fn: Callable[[Params, int], Updates], **extra: Any
    ) -> tuple[Updates, SAMState]:
        at, adv = params, state.adv_state
        for i in range(sync_period - 1):
            up, adv = climber.update(updates, adv, at, **climber.accepted(extra))
            at = compute(lambda w, u: w - u, at, up)
            updates = grad_fn(at, i)
        moves, opt = optimizer.update(updates, state.opt_state, params, **optimizer.accepted(extra))
        adv = climber.begin(params) if reset_state else adv
        return moves, SAMState(state.steps_since_sync.clone(), opt, adv, ())

    if not opaque_mode:
        return around(optimizer, init, visible, SAMState, stages=["lands", "counts"], also=[adv_optimizer])

    def update(updates: Updates, state: SAMState, params: Params, **extra: Any) -> tuple[Updates, SAMState]:
        if not callable(extra.get("grad_fn")):
            came = repr(extra["grad_fn"]) if "grad_fn" in extra else "no grad_fn"
            raise TypeError(
                f"sam in opaque mode got {came}; expected update(..., grad_fn=...), a function of parameters and the "
                "number of steps uphill to gradients"
            )
        return opaque(updates, state, params, **extra)

    return around(
        optimizer, init, update, SAMState, stages=["lands"], also=[adv_optimizer, Named(lambda name: name == "grad_fn")]
    )
