"""Weight decay, said exactly: what each kind does to a weight, and where it stands in a chain.

A step goes from w along the direction u, which momentum or a preconditioner made of the gradient g, with a learning
rate: w' = w - eta u. Kinds of decay differ in what they add, and in whether the preconditioner and the rate see it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Params, Scalar, Schedule, Updates
from funcreg.core.construction import remembered, written
from funcreg.core.leafwise import compute, compute_wide, increment, product, sign
from funcreg.core.ranges import concrete, number, scalars
from funcreg.core.tree import tree_leaves, tree_map
from funcreg.regularizers.penalties import half_l2
from funcreg.transforms.factory_checks import below_one, check_selection, finite, finite_nonnegative, positive
from funcreg.transforms.regularizing import where_masked
from funcreg.transforms.schedules import KnownSchedule
from funcreg.transforms.transform import Transform, at_step, check_fit, counter, public_state, scheduled

# Toward zero


@remembered
def add_cautious_weight_decay(weight_decay: Hyper | Schedule = 0.0, mask: Mask | None = None) -> Transform:
    r"""Add :math:`\lambda w` where a step does not move away from zero, :math:`u' = u + \lambda w \, [u w \ge 0]`.

    It stands where the decay of AdamW does, between a preconditioner and `scale_by_learning_rate`, and decays only
    weights that the step makes smaller anyway, so that it does not work against the loss.

    Args:
        weight_decay: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        mask: Leaves that decay; True means apply.

    Example:
        >>> tx, params = add_cautious_weight_decay(0.1), {"weight": torch.tensor([1.0, -2.0])}
        >>> tx.update({"weight": torch.tensor([0.5, 0.5])}, tx.init(params), params)[0]
        {'weight': tensor([0.6000, 0.5000])}

    References:
        Chen, Li, Liang, Su, Xie, Pierse, Liang, Lao & Liu, *Cautious weight decay*, 2025.
    """
    finite_nonnegative(weight_decay=weight_decay)
    check_selection(mask)

    def add(u: Tensor, w: Tensor, decay: Scalar) -> Tensor:
        return u + torch.where(_apart(u, w), torch.zeros_like(w), decay * w)

    rule = lambda updates, params, decay: compute(add, updates, params, hyper=(decay,))
    return where_masked(mask, scheduled(rule, weight_decay, stages=["adds"]))


def _apart(u: Tensor, w: Tensor) -> Tensor:
    """Whether a step along -u leads away from zero. Signs are compared: a product of small numbers is 0."""
    if w.is_complex():
        return (u.conj() * w).real < 0
    return ((u < 0) & (w > 0)) | ((u > 0) & (w < 0))


@remembered
def add_independent_weight_decay(
    weight_decay: Hyper | Schedule = 0.0,
    learning_rate: Hyper | Schedule | None = None,
    max_rate: Hyper | None = None,
    mask: Mask | None = None,
) -> Transform:
    r"""Subtract :math:`\lambda w` after the learning rate, :math:`u' = u - \lambda \frac{\eta_t}{\eta_{\max}} w`.

    Half the learning rate is not half the decay: so :math:`\lambda` is a share of the weight, and far smaller than
    that of AdamW. It may follow the shape of a learning-rate schedule, or one of its own as `weight_decay`.

    Args:
        weight_decay: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        learning_rate: Schedule :math:`\eta_t` whose shape the decay follows; None for a decay that follows none.
        max_rate: :math:`\eta_{\max}`, above 0; by default the greatest value of the schedule, if it is one of funcreg.
        mask: Leaves that decay; True means apply.

    Raises:
        ValueError: The greatest value of the learning rate is not known.

    Example:
        >>> tx = chain(scale_by_learning_rate(0.1), add_independent_weight_decay(0.01))
        >>> params = {"weight": torch.tensor([1.0, -2.0])}
        >>> tx.update({"weight": torch.zeros(2)}, tx.init(params), params)[0]
        {'weight': tensor([-0.0100,  0.0200])}

    References:
        Loshchilov & Hutter, *Decoupled weight decay regularization*, 2019.
        Wortsman et al., *Small-scale proxies for large-scale transformer training instabilities*, 2024.
    """
    finite_nonnegative(weight_decay=weight_decay)
    check_selection(mask)
    if learning_rate is None:
        if max_rate is not None:
            raise ValueError(f"max_rate is {max_rate!r}; it has no effect without learning_rate, the schedule it is of")
        learning_rate, max_rate = 1.0, 1.0
    else:
        finite_nonnegative(learning_rate=learning_rate)
        max_rate = _greatest(learning_rate, max_rate)

    def subtract(u: Tensor, w: Tensor, decay: Scalar, rate: Scalar, most: Scalar) -> Tensor:
        return u - decay * (rate / most) * w

    rule = lambda updates, params, *values: compute(subtract, updates, params, hyper=values)
    return where_masked(mask, scheduled(rule, weight_decay, learning_rate, max_rate, stages=["follows", "shrinks"]))


@remembered
def add_corrected_weight_decay(
    weight_decay: Hyper | Schedule,
    learning_rate: Hyper | Schedule,
    max_rate: Hyper | None = None,
    mask: Mask | None = None,
) -> Transform:
    r"""Add decay that falls with the learning rate, :math:`u' = u + \lambda \frac{\eta_t}{\eta_{\max}} w` (AdamC).

    It stands where the decay of AdamW does, before `scale_by_learning_rate` with the same schedule, so that the decay
    falls with the square of the rate (AdamC). The ratio of gradient to weight of a normalized layer then stays the
    same through a schedule, and its gradient does not grow at the end.

    Args:
        weight_decay: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        learning_rate: :math:`\eta_t`: the schedule of the step, or a tensor that is changed from outside.
        max_rate: :math:`\eta_{\max}`, above 0; by default the greatest value of the schedule, if it is one of funcreg.
        mask: Leaves that decay, those of normalized layers; True means apply.

    Raises:
        ValueError: The greatest value of the learning rate is not known, or it is constant, where this is the decay of
            AdamW.

    Example:
        >>> schedule = linear_schedule(0.1, 0.0, transition_steps=2)
        >>> tx, params = add_corrected_weight_decay(0.5, schedule), {"weight": torch.tensor([1.0])}
        >>> updates, state = tx.update({"weight": torch.zeros(1)}, tx.init(params), params)
        >>> updates, tx.update({"weight": torch.zeros(1)}, state, params)[0]
        ({'weight': tensor([0.5000])}, {'weight': tensor([0.2500])})

    References:
        Defazio, *Why gradients rapidly increase near the end of training*, 2025.
    """
    finite_nonnegative(weight_decay=weight_decay, learning_rate=learning_rate)
    check_selection(mask)
    if max_rate is None and isinstance(number(learning_rate), (int, float)):
        raise ValueError(
            f"learning_rate is {learning_rate!r} at every step: corrected decay would be that of AdamW, "
            "add_decayed_weights. Give the schedule of the steps, or max_rate="
        )
    most = _greatest(learning_rate, max_rate)

    def add(u: Tensor, w: Tensor, decay: Scalar, rate: Scalar, most: Scalar) -> Tensor:
        return u + decay * (rate / most) * w

    rule = lambda updates, params, *values: compute(add, updates, params, hyper=values)
    return where_masked(mask, scheduled(rule, weight_decay, learning_rate, most, stages=["adds"]))


@remembered
def add_proximal_weight_decay(
    weight_decay: Hyper | Schedule, learning_rate: Hyper | Schedule, mask: Mask | None = None
) -> Transform:
    r"""Divide parameters, after the step, by one plus the decay, :math:`u' = \frac{w + u}{1 + \eta_t \lambda} - w`.

    The decay of AdamW to first order, :math:`1 - \eta \lambda` as a division: it never turns a sign, and is stable for
    any :math:`\eta \lambda` (AdamProx). It stands after `scale_by_learning_rate` with the same learning rate.

    Args:
        weight_decay: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        learning_rate: :math:`\eta_t`: that of the step.
        mask: Leaves that decay; True means apply.

    Example:
        >>> tx = chain(scale_by_learning_rate(0.1), add_proximal_weight_decay(10.0, 0.1))
        >>> params = {"weight": torch.tensor([2.0])}
        >>> updates, state = tx.update({"weight": torch.tensor([1.0])}, tx.init(params), params)
        >>> apply_updates(params, updates)
        {'weight': tensor([0.9500])}

    References:
        Zhuang, Liu, Cutkosky & Orabona, *Understanding AdamW through proximal methods and scale-freeness*, 2022.
    """
    finite_nonnegative(weight_decay=weight_decay, learning_rate=learning_rate)
    check_selection(mask)

    def rule(updates: Updates, params: Params, decay: Hyper, rate: Hyper) -> Updates:
        reached = compute_wide(lambda w, u: w + u, params, updates)
        landed = half_l2.prox(reached, product(params, decay, rate))
        # In the dtype of the parameters, as every step that lands.
        return compute(lambda w, z: z - w, params, landed)

    return where_masked(mask, scheduled(rule, weight_decay, learning_rate, stages=["lands", "shrinks"]))


def _greatest(learning_rate: Hyper | Schedule, max_rate: Hyper | None) -> Hyper:
    """The greatest learning rate: given, or that of a schedule whose turns are known."""
    if max_rate is not None:
        finite_nonnegative(max_rate=max_rate)
        positive(max_rate=max_rate)
        return number(max_rate)
    most = _peak(learning_rate) if callable(learning_rate) else number(learning_rate)
    known = most if isinstance(most, (int, float)) else None
    if (known is not None and 0 < known < math.inf) or (isinstance(most, Tensor) and callable(learning_rate)):
        return most
    came = "is not known" if known is None else f"is {known}"
    raise ValueError(
        f"the greatest value of learning_rate, {written(learning_rate)}, {came}; expected a schedule of funcreg that "
        "rises above 0, or give max_rate="
    )


#: Later than the last step of any training.
_LATE = 2**31 - 1


def _peak(schedule: Any) -> Scalar | None:
    """The greatest value of a schedule, which it takes at a turn or an end; None if those are not known."""
    if not isinstance(schedule, KnownSchedule) or not all(map(_is_known, _called_with(schedule))):
        return None
    counts = [torch.tensor(count, dtype=torch.int32, device="cpu") for count in (0, *schedule.turns, _LATE)]
    values = [torch.as_tensor(schedule(count), device="cpu").to(torch.float64) for count in counts]
    most = functools.reduce(torch.maximum, values)
    known = concrete(most)  # Not while it is traced or batched.
    return most if known is None else float(known)


def _called_with(schedule: KnownSchedule) -> Sequence[Any]:
    return tree_leaves([*schedule.made_by.args, *schedule.made_by.kwargs.values()]) if schedule.made_by else ()


def _is_known(value: Any) -> bool:
    return not callable(value) or _peak(value) is not None


# Toward an anchor


@public_state
class AnchorState(NamedTuple):
    """The state of a decay toward a point that it keeps itself.

    Example:
        >>> add_weight_decay_to_ema(0.1).init({"weight": torch.ones(1)})
        AnchorState(steps=tensor(0, dtype=torch.int32), anchor={'weight': tensor([1.])})
    """

    steps: Tensor  # Number of updates made, int32.
    anchor: Params  # Parameters at the start, or their moving average.


def _toward(
    pull: Callable[[Tensor], Tensor],
    weight_decay: Hyper | Schedule,
    anchor: Params | None,
    mask: Mask | None,
    ema: Scalar | None = None,
) -> Transform:
    """Add a multiple of a function of the distance to an anchor: given, the first parameters, or their average."""
    if ema is not None:
        below_one(ema_decay=ema)
        (ema,) = scalars(ema_decay=ema)
    finite_nonnegative(weight_decay=weight_decay)
    if anchor is not None:
        finite(anchor=anchor)
    check_selection(mask)

    def add(updates: Updates, params: Params, decay: Hyper, anchor: Params) -> Updates:
        return compute(lambda u, w, a, c: u + c * pull(w - a), updates, params, anchor, hyper=(decay,))

    def add_given(updates: Updates, params: Params, decay: Hyper, anchor: Hyper) -> Updates:
        return compute(lambda u, w, c, a: u + c * pull(w - a), updates, params, hyper=(decay, anchor))

    def init(params: Params) -> AnchorState:
        check_fit(params, None, weight_decay)
        begin = tree_map(torch.clone, params) if ema is None else compute_wide(lambda w: w + 0.0, params)
        return AnchorState(counter(params), begin)

    def update(updates: Updates, state: AnchorState, params: Params) -> tuple[Updates, AnchorState]:
        anchor = state.anchor
        if ema is not None:
            # In this form an average of what does not move is exactly that, and its sign 0.
            anchor = compute(lambda m, w, b: m + (1 - b) * (w - m), anchor, params, hyper=(ema,))
        new = add(updates, params, at_step(weight_decay, state.steps), anchor)
        return new, AnchorState(increment(state.steps), anchor)

    if anchor is not None:
        return where_masked(mask, scheduled(add_given, weight_decay, anchor, stages=["adds"]))
    return where_masked(mask, Transform(init, update, state=AnchorState, stages=["adds"]))


def _difference(d: Tensor) -> Tensor:
    return d


@remembered
def add_weight_decay_to_anchor(
    weight_decay: Hyper | Schedule = 0.0, anchor: Params | None = None, mask: Mask | None = None
) -> Transform:
    r"""Add :math:`\lambda (w - a)`, the gradient of :math:`\frac{\lambda}{2} \|w - a\|_2^2`: decay toward an anchor.

    Before `scale_by_adam` this is L2-SP, as in the loss; between it and `scale_by_learning_rate`, the decay of AdamW
    toward :math:`a`. For fine-tuning, where decay toward zero forgets what was learned.

    Args:
        weight_decay: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        anchor: :math:`a`: a tree like the parameters, a prefix of one, or a number. None for the parameters that
            `init` gets, which are then a part of the state.
        mask: Leaves that decay; True means apply. Those of a new head have no use for an anchor.

    Example:
        >>> tx, params = add_weight_decay_to_anchor(0.1), {"weight": torch.tensor([1.0, -2.0])}
        >>> state = tx.init(params)
        >>> moved = {"weight": torch.tensor([2.0, -2.0])}
        >>> tx.update({"weight": torch.zeros(2)}, state, moved)[0]
        {'weight': tensor([0.1000, 0.0000])}

    References:
        Li, Grandvalet & Davoine, *Explicit inductive bias for transfer learning with convolutional networks*, 2018.
    """
    return _toward(_difference, weight_decay, anchor, mask)


@remembered
def add_l1_weight_decay_to_anchor(
    weight_decay: Hyper | Schedule = 0.0, anchor: Params | None = None, mask: Mask | None = None
) -> Transform:
    r"""Add :math:`\lambda \operatorname{sign}(w - a)`, the gradient of :math:`\lambda \|w - a\|_1`.

    It pulls weights to both sides of the anchor in turn, and none is brought back exactly: that is done by the proximal
    operator of `anchored_l1`, in `prox_sgd` and `prox_adam`.

    Args:
        weight_decay: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        anchor: :math:`a`: a tree like the parameters, a prefix of one, or a number. None for the parameters that
            `init` gets, which are then a part of the state.
        mask: Leaves that decay; True means apply.

    Example:
        >>> tx, params = add_l1_weight_decay_to_anchor(0.1, anchor=1.0), {"weight": torch.tensor([1.0, -2.0])}
        >>> tx.update({"weight": torch.zeros(2)}, tx.init(params), params)[0]
        {'weight': tensor([ 0.0000, -0.1000])}

    References:
        Li, Grandvalet & Davoine, *Explicit inductive bias for transfer learning with convolutional networks*, 2018.
    """
    return _toward(sign, weight_decay, anchor, mask)


@remembered
def add_weight_decay_to_ema(
    weight_decay: Hyper | Schedule = 0.0, ema_decay: Scalar = 0.999, mask: Mask | None = None
) -> Transform:
    r"""Add :math:`\lambda (w - m)`: decay toward a moving average, :math:`m_t = \beta m_{t-1} + (1 - \beta) w_t`.

    The average begins at the parameters that `init` gets, and is kept in float32 at least.

    Args:
        weight_decay: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        ema_decay: :math:`\beta`, at least 0 and below 1.
        mask: Leaves that decay; True means apply.

    Example:
        >>> tx, params = add_weight_decay_to_ema(0.1, ema_decay=0.5), {"weight": torch.tensor([1.0])}
        >>> state = tx.init(params)
        >>> tx.update({"weight": torch.zeros(1)}, state, {"weight": torch.tensor([3.0])})[0]
        {'weight': tensor([0.1000])}

    References:
        Tarvainen & Valpola, *Mean teachers are better role models*, 2017.
    """
    return _toward(_difference, weight_decay, None, mask, ema_decay)


@remembered
def add_l1_weight_decay_to_ema(
    weight_decay: Hyper | Schedule = 0.0, ema_decay: Scalar = 0.999, mask: Mask | None = None
) -> Transform:
    r"""Add :math:`\lambda \operatorname{sign}(w - m)`: the decay of `add_weight_decay_to_ema`, in L1.

    Args:
        weight_decay: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        ema_decay: :math:`\beta` of the average, at least 0 and below 1.
        mask: Leaves that decay; True means apply.

    Example:
        >>> tx, params = add_l1_weight_decay_to_ema(0.1), {"weight": torch.tensor([1.0, -1.0])}
        >>> state = tx.init(params)
        >>> tx.update({"weight": torch.zeros(2)}, state, {"weight": torch.tensor([3.0, -3.0])})[0]
        {'weight': tensor([ 0.1000, -0.1000])}

    References:
        Tarvainen & Valpola, *Mean teachers are better role models*, 2017.
    """
    return _toward(sign, weight_decay, None, mask, ema_decay)
