"""Chains without the leaves that one of their links freezes, and what a transform of some leaves gets to see."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from funcreg.core._typing import Params, State, Updates
from funcreg.core.masks import keep, listed, merge
from funcreg.core.tree import flatten, tree_paths
from funcreg.transforms.transform import Transform, around, either


def as_seen(
    extra: dict[str, Any], params: Params, narrow: Callable[[Any], Any], whole: Callable[[Any], Any]
) -> dict[str, Any]:
    """Extra arguments for a transform that sees parameters in another form: their gradient, and the objective of these.

    Args:
        extra: Extra arguments of `update`.
        params: Parameters, and trees like them.
        narrow: From those to what the transform sees.
        whole: From that to parameters.
    """
    seen, grad, objective = dict(extra), extra.get("grad"), extra.get("value_fn")
    if grad is not None and tree_paths(grad) == tree_paths(params):
        seen["grad"] = narrow(grad)
    if callable(objective):
        # Its arguments are those of the objective, which a line search asks for.
        call = functools.wraps(objective, updated=())
        seen["value_fn"] = call(lambda point, *args, **others: objective(whole(point), *args, **others))
    return seen


def of_chosen(extra: dict[str, Any], params: Params, bools: list[bool]) -> dict[str, Any]:
    """Extra arguments for a transform of some leaves; for the objective the others are where they are."""
    return as_seen(extra, params, lambda tree: keep(tree, bools), lambda chosen: merge(params, chosen, bools))


def zeroed(updates: Updates, held: Sequence[bool]) -> Updates:
    """Updates with zeros for some leaves."""
    leaves, rebuild = flatten(updates)
    return rebuild([torch.zeros_like(u) if h else u for u, h in zip(leaves, held, strict=True)])


def hold(inner: Transform, links: Sequence[Transform]) -> Transform:
    """A transform that sees no leaf which one of some links freezes, and returns zeros for it.

    Masks are asked once, about all leaves: the inner transform is made of what links are without those they freeze.

    Args:
        inner: The transform of the other leaves.
        links: What may freeze some.
    """
    frozen = [tx.frozen for tx in links if tx.frozen is not None]
    if not frozen:
        return inner

    held = either(*frozen)

    def init(params: Params) -> State:
        return inner.begin(keep(params, [not h for h in held(params)]))

    def update(updates: Updates, state: State, params: Params, **extra: Any) -> tuple[Updates, State]:
        bools = held(params)
        free = [not h for h in bools]
        extra = of_chosen(inner.accepted(extra), params, free)
        new, after = inner.update(keep(updates, free), state, keep(params, free), **extra)
        return merge(zeroed(params if inner.examples else updates, bools), new, free), after

    metric, shown = inner.metric, inner.links
    tx = around(inner, init, update, metric=metric, frozen=held, links=shown, examples=inner.examples)
    tx.unheld = inner
    return tx


def check_decided(links: Sequence[Transform], free: Params) -> None:
    """Raise a ValueError for a link that, asked once more about the leaves that are free, would freeze some of them."""
    for tx in links:
        if tx.frozen is None:
            continue
        names = [name for name, again in zip(tree_paths(free), tx.frozen(free), strict=True) if again]
        if names:
            raise ValueError(
                f"{tx!r} freezes other leaves, {listed(names)}, where those that it freezes are left out, as they are "
                "in a chain: a mask or labels in it go by the place or the number of leaves. Choose by names, as "
                "select does, or by shapes; or let freeze stand in the chain itself."
            )
