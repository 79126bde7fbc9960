"""Weight decay of any kind, put where it belongs in a chain or wrapper that is there already."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Params, Scalar, Schedule
from funcreg.core.construction import remembered, transforms_in
from funcreg.core.ranges import concrete
from funcreg.transforms.chains import chain, named_chain
from funcreg.transforms.coarse import flat_links
from funcreg.transforms.decay import (
    add_cautious_weight_decay,
    add_corrected_weight_decay,
    add_independent_weight_decay,
    add_l1_weight_decay_to_anchor,
    add_l1_weight_decay_to_ema,
    add_proximal_weight_decay,
    add_weight_decay_to_anchor,
    add_weight_decay_to_ema,
)
from funcreg.transforms.factory_checks import check_selection, check_transforms, finite_nonnegative
from funcreg.transforms.regularizing import add_decayed_weights
from funcreg.transforms.schedules import KnownSchedule
from funcreg.transforms.transform import Transform, warn

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
    given = {"anchor": anchor, "ema_decay": ema_decay, "max_rate": max_rate}
    given = {name: value for name, value in given.items() if value is not None}
    _check_kind(kind, given)
    finite_nonnegative(weight_decay=weight_decay)
    check_selection(mask)
    _warn_of_another(tx, mask)
    if mask is not None or any([isinstance(x, (dict, list, tuple)) for x in (weight_decay, anchor)]):
        _check_leaves(tx)
    if mask is not None:
        given["mask"] = mask

    def make(rate: Hyper | Schedule) -> Transform:
        if kind in ("corrected", "proximal"):
            factory = add_corrected_weight_decay if kind == "corrected" else add_proximal_weight_decay
            return factory(weight_decay, rate, **given)
        follows = {"learning_rate": rate} if kind == "independent" and (callable(rate) or "max_rate" in given) else {}
        return _FACTORIES[kind](weight_decay, **follows, **given)

    return _placed(tx, kind, make, [])


def _check_kind(kind: Any, given: dict[str, Any]) -> None:
    """Raise a ValueError for what is no kind of decay, and for an option that this kind does not have."""
    if kind not in get_args(Kind):
        swapped = "" if isinstance(kind, str) else ". Are kind and weight_decay swapped?"
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(map(repr, get_args(Kind)))}{swapped}")
    for name, value in given.items():
        if name not in _OPTIONS.get(kind, ()):
            takes = ", ".join(repr(each) for each in get_args(Kind) if name in _OPTIONS.get(each, ()))
            raise ValueError(f"{name} is {value!r}; it has no effect on {kind} decay. It belongs to {takes}.")


def _warn_of_another(tx: Transform, mask: Mask | None) -> None:
    """Warn where weights decay already; of two masks it is not known here whether they meet.

    One decay of a backbone and one of its head do not.
    """
    before = [part for part in every_part(tx) if decay_of(part) is not None]
    if before and (mask is None or not all([_is_masked_otherwise(part, mask) for part in before])):
        warn(
            f"{tx!r} decays weights already, by {before[0]!r}; with_weight_decay adds to it. Is weight_decay=0.0 "
            "missing there?"
        )


def _check_leaves(tx: Transform) -> None:
    """Raise a ValueError for a chain or wrapper that hands one vector to the transforms inside."""
    vector = _flattened(tx)
    if vector is not None:
        raise ValueError(
            f"{vector!r} makes one vector of all leaves, where a mask, or a number for each leaf, has no place. Write "
            "the chain by hand: chain(flatten(direction), add_decayed_weights(...), scale_by_learning_rate(...))"
        )


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
    links = flat_links(tx) if pairs is None else [link for _, link in pairs]

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
