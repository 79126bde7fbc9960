"""Transforms one after another: chains, and what their order may get wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from funcreg.core._typing import Params, State, Updates
from funcreg.core.construction import remembered
from funcreg.core.masks import listed
from funcreg.core.undocumented import is_compiling
from funcreg.core.wording import type_of
from funcreg.transforms.factory_checks import check_transforms
from funcreg.transforms.holding import check_decided, hold
from funcreg.transforms.transform import Choice, Stage, Transform, around, either, everywhere, warn


@remembered
def chain(*transforms: Transform) -> Transform:
    r"""Apply transforms one after another; each gets the updates of the one before.

    The state is a tuple with one state for each transform. What `freeze` holds is left out of the whole chain,
    wherever in it `freeze` stands.

    Args:
        transforms: Transforms in their order.

    Raises:
        TypeError: An argument is not a transform.
        ValueError: A transform takes gradients of single examples and is not the first; or `update` got the state of
            another chain.

    Example:
        >>> tx = chain(clip(1.0), scale(-0.1))
        >>> params = {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([3.0, -0.5])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1000,  0.0500])}
    """
    check_transforms("chain", transforms)
    _check_examples_come_first(transforms)
    _check_order(transforms)
    links = [tx if tx.unheld is None else tx.unheld for tx in transforms]  # `hold` sees to what they freeze.

    def init(params: Params) -> tuple[State, ...]:
        check_decided(links, params)
        return tuple(tx.begin(params) for tx in links)

    def update(updates: Updates, state: State, params: Params, **extra: Any) -> tuple[Updates, tuple[State, ...]]:
        if type(state) is not tuple or len(state) != len(transforms):
            came = f"of {len(state)} entries" if type(state) is tuple else f"that is {type_of(state)}"
            raise ValueError(
                f"chain of {len(transforms)} transforms got a state {came}; expected one entry for each. Was it made "
                "by this chain's init?"
            )
        new = []
        for tx, old in zip(links, state, strict=True):
            updates, after = tx.update(updates, old, params, **tx.accepted(extra))
            new.append(after)
        return updates, tuple(new)

    spares = any(tx.spares is not None for tx in transforms)
    covers = [tx.covers for tx in transforms if tx.covers is not None]
    joined = Transform(
        init,
        update,
        _metric(transforms),
        descends=any(tx.descends for tx in transforms),
        spares=_spared_by(transforms) if spares else None,
        stages=[stage for tx in transforms for stage in tx.stages],
        covers=everywhere if everywhere in covers else either(*covers) if covers else None,
        forwards_to=transforms,
        links=transforms,
        examples=any(tx.examples for tx in transforms),
    )
    return hold(joined, transforms)


def with_link(tx: Transform) -> Transform:
    """A transform that shows what it is made of, as a chain does, with the state of that."""
    return around(tx, tx._init, tx._update, tx._state, metric=tx.metric, forwards_to=tx.forwards_to, links=[tx])


def _metric(links: Sequence[Transform]) -> Callable[[State], Params] | None:
    """The metric of a chain, if one link alone has one."""
    metrics = [(place, tx.metric) for place, tx in enumerate(links) if tx.metric is not None]
    if len(metrics) != 1:
        return None
    ((place, inner),) = metrics
    return lambda state: inner(state[place])


def _spared_by(transforms: Sequence[Transform]) -> Choice:
    """The leaves that a link spares, without those that another one, masked, steps along: it does need gradients."""
    spares = either(*[tx.spares for tx in transforms if tx.spares is not None])
    masked_steps = [tx for tx in transforms if tx.covers is not None and tx.covers is not everywhere]

    def spared(params: Params) -> list[bool]:
        found = spares(params)
        for tx in masked_steps:
            covered = tx.covers(params) if tx.covers is not None else []
            own = tx.spares(params) if tx.spares is not None else [False] * len(covered)
            found = [f and (s or not c) for f, c, s in zip(found, covered, own, strict=True)]
        return found

    return spared


def _check_examples_come_first(transforms: Sequence[Transform]) -> None:
    """Raise an error for a link that takes gradients of single examples, and gets what another one made."""
    late = next((tx for tx in transforms[1:] if tx.examples), None)
    if late is not None:
        raise ValueError(
            f"{late!r} takes gradients of single examples, and stands after {transforms[0]!r}, whose updates are like "
            "the parameters. Put it first."
        )


def _check_order(transforms: Sequence[Transform]) -> None:
    """Warn of links that take what another one made for what it is not: a step for a gradient, zeros for steps."""
    if is_compiling():
        return
    for i, tx in enumerate(transforms):
        before = transforms[:i]
        flipped = max([j for j, each in enumerate(before) if "flips" in each.stages], default=-1)
        takes_gradients = "adds" in tx.stages or "steps" in tx.stages
        stepped = next((each for each in before[flipped + 1 :] if _meet("steps", each, tx)), None)
        landed = next((each for each in before if _meet("lands", each, tx)), None)
        waiting = next((each for each in before if _meet("waits", each, tx)), None)
        rounded = next((each for each in before if _meet("rounds", each, tx) and changes(tx)), None)
        early = next((each for each in before if "steps" in tx.stages and _meet("follows", each, tx)), None)
        if stepped is not None and takes_gradients:
            adds = "adds" in tx.stages and "steps" not in tx.stages
            goes = "adds a gradient to it, and goes uphill" if adds else "turns its sign once more, and goes uphill"
            warn(
                f"in this chain, {tx!r} stands after {stepped!r}, which makes a step downhill of its updates: it takes "
                f"that step for a gradient, {goes}. Put it before the learning rate, as adamw does, "
                + ("or take proximal for what comes after the step." if adds else "or take one of them out.")
            )
        elif waiting is not None and "shrinks" in tx.stages:
            warn(
                f"in this chain, {tx!r} stands after {waiting!r}, whose steps come at some calls alone: it acts at "
                "every call, between these steps too. Put it inside, after the step, to count once a step."
            )
        elif rounded is not None:
            warn(
                f"in this chain, {tx!r} stands after {rounded!r}, which ends at numbers of sixteen bits: what it "
                "changes is rounded away, or undone by the copies at the next step. Put it inside."
            )
        elif landed is not None and (takes_gradients or "scales" in tx.stages):
            warn(
                f"in this chain, {tx!r} stands after {landed!r}, which ends where parameters are to be, at exact zeros "
                "or in a set: what changes its updates loses that. Put it before."
            )
        if early is not None:
            warn(
                f"in this chain, {tx!r} stands after {early!r}, which adds to a step downhill: its sign is turned, and "
                "it goes uphill. Put it after the learning rate."
            )


def changes(tx: Transform) -> bool:
    """Whether a transform may change what it is given, and not only hold leaves where they are."""
    passes = isinstance(tx.rate, (int, float)) and tx.rate == 1.0 and "flips" not in tx.stages
    return tx.frozen is None and not passes


def _meet(stage: Stage, first: Transform, second: Transform) -> bool:
    """Whether one transform has a stage, and another may act on leaves where it does: masks of both may differ."""
    apart = first.covers is not everywhere and second.covers not in (None, everywhere)
    return stage in first.stages and not (apart and first.covers is not None)


@remembered
def named_chain(*transforms: tuple[str, Transform]) -> Transform:
    r"""Apply transforms one after another, with a state that is a dict by their names.

    Args:
        transforms: Pairs of a name and a transform, in their order.

    Raises:
        ValueError: Two transforms have one name, or `update` got the state of another chain.

    Example:
        >>> tx = named_chain(("momentum", trace(0.9)), ("step", scale(-0.1)))
        >>> tx.init({"weight": torch.zeros(1)})
        {'momentum': TraceState(trace={'weight': tensor([0.])}), 'step': EmptyState()}
    """
    for i, pair in enumerate(transforms):
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            came = "a Transform" if isinstance(pair, Transform) else type_of(pair)
            raise TypeError(f"argument {i} of named_chain is {came}; expected a pair of a name and a Transform")
    names = [name for name, _ in transforms]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"named_chain got two transforms named {name!r}; expected names that differ")
    inner = chain(*(tx for _, tx in transforms))
    tx = _with_names(names, inner)
    if inner.unheld is not None:
        tx.unheld = _with_names(names, inner.unheld)
    return tx


def _with_names(names: Sequence[str], inner: Transform) -> Transform:
    """A chain whose state is a dict."""

    def init(params: Params) -> dict[str, State]:
        return dict(zip(names, inner.begin(params), strict=True))

    def update(updates: Updates, state: State, params: Params, **extra: Any) -> tuple[Updates, dict[str, State]]:
        if not isinstance(state, dict) or sorted(state) != sorted(names):
            came = f"of {listed(map(str, state))}" if isinstance(state, dict) else f"that is {type_of(state)}"
            raise ValueError(
                f"named_chain of {', '.join(names)} got a state {came}; expected a dict with these names. Was it made "
                "by this chain's init?"
            )
        updates, new = inner.update(updates, tuple(state[name] for name in names), params, **inner.accepted(extra))
        return updates, dict(zip(names, new, strict=True))

    outer = inner.metric
    metric = None if outer is None else lambda state: outer(tuple(state[name] for name in names))
    return around(inner, init, update, metric=metric, examples=inner.examples)
