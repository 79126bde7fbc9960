"""Weight decay, said exactly: what each kind does to a weight, where it stands in a chain, and what puts it there.

A step goes from w along the direction u, which momentum or a preconditioner made of the gradient g, with a learning
rate: w' = w - eta u. Kinds of decay differ in what they add, and in whether the preconditioner and the rate see it.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from funcreg._typing import Hyper, Mask, Params, Scalar, Schedule, Updates
from funcreg.combine import chain, named_chain
from funcreg.construction import remembered, transforms_in, written
from funcreg.leafwise import compute, compute_wide, increment, product, sign
from funcreg.penalties import half_l2
from funcreg.ranges import concrete, number, scalars
from funcreg.regularizing import add_decayed_weights, where_masked
from funcreg.schedules import KnownSchedule
from funcreg.transform import (
    Transform,
    at_step,
    below_one,
    check_fit,
    check_selection,
    check_transforms,
    counter,
    finite,
    finite_nonnegative,
    positive,
    public_state,
    scheduled,
    warn,
)
from funcreg.tree import tree_leaves, tree_map

#: The kinds of `with_weight_decay`.
Kind: TypeAlias = Literal[
    "coupled",
    "decoupled",
    "independent",
    "corrected",
    "cautious",
    "proximal",
    "anchor",
    "ema",
    "l1_anchor",
    "l1_ema",
]


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


# Where it stands in a chain


#: Kinds that stand after the learning rate; the others stand before it, and coupled decay before all.
_AFTER = ("independent", "proximal")
#: Options of a kind, besides those of all.
_OPTIONS = {
    "independent": ("max_rate",),
    "corrected": ("max_rate",),
    "anchor": ("anchor",),
    "l1_anchor": ("anchor",),
    "ema": ("ema_decay",),
    "l1_ema": ("ema_decay",),
}


@remembered
def with_weight_decay(
    tx: Transform,
    kind: Kind,
    weight_decay: Hyper | Schedule,
    *,
    mask: Mask | None = None,
    anchor: Params | None = None,
    ema_decay: Scalar | None = None,
    max_rate: Hyper | None = None,
) -> Transform:
    r"""Add weight decay of some kind to an optimizer, where it belongs in its chain.

    With the step :math:`u` of the optimizer before its learning rate :math:`\eta_t`, and :math:`\lambda` for
    `weight_decay`:

    - `"coupled"`: :math:`g + \lambda w` for the gradient, as in a loss with :math:`\frac{\lambda}{2} \|w\|^2`;
    - `"decoupled"`: :math:`w' = w - \eta_t (u + \lambda w)`, the decay of AdamW;
    - `"independent"`: :math:`w' = w - \eta_t u - \lambda \frac{\eta_t}{\eta_{\max}} w`, for any base rate;
    - `"corrected"`: :math:`w' = w - \eta_t (u + \lambda \frac{\eta_t}{\eta_{\max}} w)`, the decay of AdamC;
    - `"cautious"`: :math:`w' = w - \eta_t (u + \lambda w \, [u w \ge 0])`;
    - `"proximal"`: :math:`w' = (w - \eta_t u) / (1 + \eta_t \lambda)`, the decay of AdamProx;
    - `"anchor"`: :math:`w' = w - \eta_t (u + \lambda (w - a))`, and `"ema"` with a moving average for :math:`a`;
    - `"l1_anchor"` and `"l1_ema"`: the same with :math:`\operatorname{sign}(w - a)`.

    Each is a transform of its own, such as `add_cautious_weight_decay`, for a chain that is written by hand.

    Args:
        tx: An optimizer or chain with a learning rate, also inside `masked`, `partition` and other wrappers.
        kind: One of the above.
        weight_decay: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        mask: Leaves that decay; True means apply.
        anchor: :math:`a` of `"anchor"` and `"l1_anchor"`: a tree like the parameters, or a number; None for those that
            `init` gets.
        ema_decay: :math:`\beta` of the average of `"ema"` and `"l1_ema"`; 0.999 by default.
        max_rate: :math:`\eta_{\max}` of `"independent"` and `"corrected"`; by default the greatest learning rate, if
            its schedule is one of funcreg. A constant rate is its own.

    Raises:
        ValueError: It is not known where in the chain the learning rate is, or what its greatest value is; the message
            says what to write.

    Example:
        >>> tx = with_weight_decay(adam(0.1), "decoupled", 0.5)  # The same as adamw(0.1, weight_decay=0.5).
        >>> params = {"weight": torch.tensor([1.0, 1.0])}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1500,  0.0500])}

    References:
        Loshchilov & Hutter, *Decoupled weight decay regularization*, 2019.
    """
    check_transforms("with_weight_decay", [tx])
    if kind not in get_args(Kind):
        swapped = "" if isinstance(kind, str) else ". Are kind and weight_decay swapped?"
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(map(repr, get_args(Kind)))}{swapped}")
    given = {"anchor": anchor, "ema_decay": ema_decay, "max_rate": max_rate}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name not in _OPTIONS.get(kind, ()):
            takes = ", ".join(repr(each) for each in get_args(Kind) if name in _OPTIONS.get(each, ()))
            raise ValueError(f"{name} is {value!r}; it has no effect on {kind} decay. It belongs to {takes}.")
    finite_nonnegative(weight_decay=weight_decay)
    check_selection(mask)
    before = [part for part in every_part(tx) if decay_of(part) is not None]
    # Of two masks it is not known here whether they meet: one decay of a backbone and one of its head do not.
    if before and (mask is None or not all([_is_masked_otherwise(part, mask) for part in before])):
        warn(
            f"{tx!r} decays weights already, by {before[0]!r}; with_weight_decay adds to it. Is weight_decay=0.0 "
            "missing there?"
        )
    by_leaf = mask is not None or any([isinstance(x, (dict, list, tuple)) for x in (weight_decay, anchor)])
    vector = _flattened(tx) if by_leaf else None
    if vector is not None:
        raise ValueError(
            f"{vector!r} makes one vector of all leaves, where a mask, or a number for each leaf, has no place. Write "
            "the chain by hand: chain(flatten(direction), add_decayed_weights(...), scale_by_learning_rate(...))"
        )
    if mask is not None:
        given["mask"] = mask

    def make(rate: Hyper | Schedule) -> Transform:
        if kind in ("corrected", "proximal"):
            factory = add_corrected_weight_decay if kind == "corrected" else add_proximal_weight_decay
            return factory(weight_decay, rate, **given)
        follows = {"learning_rate": rate} if kind == "independent" and (callable(rate) or "max_rate" in given) else {}
        return _FACTORIES[kind](weight_decay, **follows, **given)

    return _placed(tx, kind, make, [])


_FACTORIES: dict[str, Callable[..., Transform]] = {
    "coupled": add_decayed_weights,
    "decoupled": add_decayed_weights,
    "independent": add_independent_weight_decay,
    "cautious": add_cautious_weight_decay,
    "anchor": add_weight_decay_to_anchor,
    "l1_anchor": add_l1_weight_decay_to_anchor,
    "ema": add_weight_decay_to_ema,
    "l1_ema": add_l1_weight_decay_to_ema,
}

Make: TypeAlias = Callable[[Any], Transform]


def _placed(tx: Transform, kind: str, make: Make, outer: list[Any]) -> Transform:
    """A chain with decay in it, made from the learning rate; `outer` scales what the chain returns."""
    pairs = _pairs(tx)
    links = _flat(tx) if pairs is None else [link for _, link in pairs]

    def joined(at: int, new: Transform, replaced: int = 0) -> Transform:
        if pairs is None:
            return chain(*links[:at], new, *links[at + replaced :])
        pair = (pairs[at][0] if replaced else "weight_decay", new)
        return named_chain(*pairs[:at], pair, *pairs[at + replaced :])

    if kind == "coupled":
        return joined(0, make(None))
    at = _stepping(tx, links)
    first, last = _run(links, at)
    rates = [link.rate for link in links[first : last + 1] if link.rate is not None]
    _check_after(tx, kind, links[last + 1 :])
    if links[at].rate is None:
        if kind in _AFTER and last > at:
            raise ValueError(
                f"{links[last]!r} stands after {links[at]!r} and scales its step, {kind} decay with it; put it inside"
            )
        return joined(at, _inside(links[at], kind, make, [*rates, *outer]), 1)
    new = make(_times(*rates, *outer))
    if kind not in _AFTER:
        return joined(first, new)
    landing = [i for i, link in enumerate(links) if i > last and "lands" in link.stages]
    return joined(landing[0] if landing else len(links), new)


def _pairs(tx: Transform) -> list[tuple[str, Transform]] | None:
    """Names and links of a chain whose links have names."""
    return list(tx.made_by.args) if tx.made_by is not None and tx.made_by.function is named_chain else None


def _flat(tx: Transform) -> list[Transform]:
    """The links of a chain, and of chains in it."""
    return [each for link in tx.links for each in _flat(link)] if tx.links else [tx]


def _steps(tx: Transform) -> bool:
    return "steps" in tx.stages or "flips" in tx.stages


def _stepping(tx: Transform, links: list[Transform]) -> int:
    """Which link makes a step downhill."""
    found = [i for i, link in enumerate(links) if _steps(link)]
    if len(found) == 1:
        return found[0]
    if found:
        both = f"{links[found[0]]!r} and {links[found[1]]!r}"
        raise ValueError(f"two links of {tx!r} turn signs, {both}; which of them has the learning rate?")
    scaled = next((link for link in links if callable(link.rate)), None)
    if scaled is not None:
        raise ValueError(
            f"no link of {tx!r} is known to make steps downhill, because the sign of {scaled!r} is not known; write "
            "scale_by_learning_rate(schedule) for the learning rate"
        )
    raise ValueError(
        f"{tx!r} has no learning rate that with_weight_decay could see. Give it an optimizer such as adam(1e-3), or "
        "write the chain by hand: chain(direction, add_decayed_weights(...), scale_by_learning_rate(...))"
    )


def _run(links: list[Transform], at: int) -> tuple[int, int]:
    """The first and last of the links beside the step that do nothing but scale: their product is the rate."""
    first = last = at
    while last + 1 < len(links) and links[last + 1].rate is not None:
        last += 1
    while links[at].rate is not None and first and links[first - 1].rate is not None:
        first -= 1
    unclear = [link for link in links[:at] if "scales" in link.stages and not callable(link.rate)]
    if not first and unclear:
        raise ValueError(
            f"{unclear[0]!r} may scale gradients, or be a part of the learning rate of {links[at]!r}: write the first "
            "before the optimizer, chain(scale(...), with_weight_decay(...)), or the second as one number"
        )
    return first, last


def _check_after(tx: Transform, kind: str, later: list[Transform]) -> None:
    """Raise an error for links that would make something else of decay before the learning rate."""
    for link in later:
        if kind not in _AFTER and "lands" not in link.stages and link.frozen is None and "follows" not in link.stages:
            raise ValueError(
                f"{link!r} stands after the learning rate of {tx!r}, and would see {kind} decay as a part of the step; "
                "expected a learning rate at the end, or a kind that follows it, such as 'independent'"
            )


#: Arguments of wrappers that make no step downhill: sharpness-aware minimization climbs with this one.
CLIMBING = ("adv_optimizer",)


def _inside(tx: Transform, kind: str, make: Make, outer: list[Any]) -> Transform:
    """A wrapper whose transforms decay, made by the call that made it with those in the place of its own."""
    if tx.links or _pairs(tx) is not None:
        return _placed(tx, kind, make, outer)
    call = tx.made_by
    if "lands" in tx.stages and not list(parts_of(tx)):
        known = call is not None and "weight_decay" in call.arguments
        hint = (
            "it has an argument weight_decay" if known else "put elastic, or a sum of half_l2 and its penalty, into it"
        )
        raise ValueError(
            f"{tx!r} makes a step and lands in one, so that {kind} decay has no place between; {hint}, or take "
            "'coupled'"
        )
    own = {} if call is None else {name: x for name, x in call.arguments.items() if name not in CLIMBING}
    if call is None or not any(map(_steps, transforms_in(own))):
        raise ValueError(
            f"the learning rate inside {tx!r} is not to be seen; put with_weight_decay around the optimizer in it"
        )
    change = lambda part: _placed(part, kind, make, outer) if _steps(part) else part
    bound = inspect.signature(call.function).bind(*call.args, **call.kwargs)
    changed = {name: _with_parts(x, change) for name, x in bound.arguments.items() if name in own}
    bound.arguments.update(changed)
    return call.function(*bound.args, **bound.kwargs)


@remembered
def _times(*rates: Hyper | Schedule) -> Hyper | Schedule:
    """The product of learning rates; its greatest value is known if that of the only schedule is."""
    factors: list[Any] = [rate for rate in rates if isinstance(rate, Tensor) or rate != 1.0]
    if len(factors) < 2:
        return factors[0] if factors else 1.0
    if any([isinstance(factor, (dict, list, tuple)) for factor in factors]):
        raise ValueError("a learning rate for each leaf is multiplied by another one; expected one for all leaves")
    at: Callable[[Any], list[Any]] = lambda count: [f(count) if callable(f) else f for f in factors]
    value = lambda count: functools.reduce(operator.mul, at(count))
    schedules = [factor for factor in factors if callable(factor)]
    if len(schedules) == 1 and isinstance(schedules[0], KnownSchedule):
        return KnownSchedule(value, schedules[0].turns)
    return value if schedules else value(0)


# What transforms are made of


def parts_of(tx: Transform) -> list[Transform]:
    """The transforms that a chain or a wrapper was made of, but for those with which it climbs."""
    if tx.links:
        return list(tx.links)
    given = {} if tx.made_by is None else tx.made_by.arguments
    return transforms_in({name: x for name, x in given.items() if name not in CLIMBING})


def every_part(tx: Transform) -> list[Transform]:
    """A transform, if it has no parts, or the parts of its parts, in their order."""
    parts = parts_of(tx)
    return [each for part in parts for each in every_part(part)] if parts else [tx]


def _with_parts(value: Any, change: Callable[[Transform], Transform]) -> Any:
    """Arguments of a call with each transform in them changed."""
    if isinstance(value, Transform):
        return change(value)
    if isinstance(value, dict):
        return {key: _with_parts(each, change) for key, each in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)([_with_parts(each, change) for each in value])
    return value


def _flattened(tx: Transform) -> Transform | None:
    """What hands one vector to the transforms inside, if something of a chain or wrapper does."""
    if tx.made_by is not None and tx.made_by.name == "flatten":
        return tx
    return next((found for part in parts_of(tx) if (found := _flattened(part)) is not None), None)


def _is_masked_otherwise(tx: Transform, mask: Mask) -> bool:
    own = None if tx.made_by is None else tx.made_by.arguments.get("mask")
    return own is not None and own is not mask and repr(own) != repr(mask)


def decay_of(tx: Transform) -> Hyper | Schedule | None:
    """The weight decay of a transform that was made with one, unless it is known to be 0."""
    value = None if tx.made_by is None else tx.made_by.arguments.get("weight_decay")
    known = concrete(value)
    return None if known is not None and not torch.as_tensor(known, device="cpu").any() else value
