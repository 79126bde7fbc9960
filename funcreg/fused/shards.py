"""A step of a whole chain on the local shards of sharded parameters, compiled like any other step.

Where a chain acts entry by entry along the dimensions that are cut, the shards of a process are all it needs: they are
plain tensors, which are packed, compiled and donated, and no process waits for another. Where only its first link looks
across the cut, and all this does is to multiply updates by one number of them, as `clip_by_global_norm` does, the
number is found first, by one collective, and the chain runs on the shards with it. Any other chain runs leaf by leaf,
with what collectives its transforms need.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Params, State, Updates
from funcreg.core.checks import filled
from funcreg.core.leafwise import apply_updates, compute
from funcreg.core.locality import local_results
from funcreg.core.sharding import Layout, holds_sharded, is_sharded, layout, of_shard, shard
from funcreg.core.tree import restored, structure, tree_leaves, tree_map, tree_paths
from funcreg.transforms.transform import Transform


class OnShards:
    """How one step runs on sharded parameters.

    Args:
        tx: The transform.
        donate: Whether new parameters and state are written into the old ones.
        loose: Whether parameters are those of modules, which may require a gradient.
        make: From a transform to a step on plain tensors.
    """

    def __init__(self, tx: Transform, donate: bool, loose: bool, make: Callable[[Transform], Any]) -> None:
        self._tx, self._donate, self._loose, self._make = tx, donate, loose, make
        has_factor = bool(tx.links) and tx.links[0].factor is not None and tx.frozen is None
        self._scaled = _Scaled(tx) if has_factor else None
        self._steps: dict[bool, Any] = {}  # On shards; whether a number is found before.
        self._known: dict[Any, bool | None] = {}
        self._last: _Owned | None = None

    def init(self, params: Params, extra: dict[str, Any]) -> tuple[Params, State]:
        """Parameters and state for the step to own."""
        with torch.no_grad():
            state = self._tx.init(params)
            way = self.way(params, params, state, extra)
            if way is None:
                return tree_map(torch.clone, params), tree_map(torch.clone, state)
            made, memory = self._step(way).init(local(params), **local(extra))
            return spread(made, params), spread(memory, state)

    def packed_state(self, params: Params, state: State, extra: dict[str, Any]) -> State:
        """The state as the step likes it beside parameters that stay where they are."""
        way = self.way(params, params, state, extra)
        if way is None:
            return state
        shards = local(params)
        return spread(self._step(way).packed_state(shards, shards, local(state), **local(extra)), state)

    def gradients(self, params: Params) -> Updates:
        """Zeros like parameters, in memory where a step on shards reads them without copying."""
        for step in self._steps.values():
            return spread(step.gradients(local(params)), params)
        return tree_map(lambda w: torch.zeros_like(w, requires_grad=False), params)

    @torch.no_grad()
    def call(self, params: Params, grads: Updates, state: State, extra: dict[str, Any]) -> tuple[Params, State]:
        """New parameters and state, by a step on plain tensors where that is possible."""
        last = self._last
        if last is not None and not extra and (shards := last.shards(params, grads, state)) is not None:
            if last.scaled:
                self._find(grads)
            last.step(*shards)
            torch.autograd.graph.increment_version(last.written)
            return params, state
        grads = filled(params, grads, self._tx.spares, ("params", "grads"))
        if self._donate and not self._loose:
            _check_donated(params, state)
        grads = tree_map(_laid_like, params, grads)
        scaled = self.way(params, grads, state, extra)
        if scaled is None:
            return self._leaf_by_leaf(params, grads, state, extra)
        if scaled:
            self._find(grads)
        step, shards = self._step(scaled), [local(tree) for tree in (params, grads, state)]
        made = step(*shards, **local(extra))
        if not self._donate:
            return spread(made[0], params), spread(made[1], state)
        self._last = last = _Owned(params, state, shards, step, scaled)
        # Of the sharded tensors, beside that of their shards.
        torch.autograd.graph.increment_version(last.written)
        return params, state

    def _leaf_by_leaf(self, params: Params, grads: Updates, state: State, extra: dict[str, Any]) -> Any:
        new = _plain(self._tx, params, grads, state, extra)
        if not self._donate:
            return new
        # All is read before anything is written.
        for old, leaf in zip(tree_leaves((params, state)), [x.clone() for x in tree_leaves(new)], strict=True):
            old.copy_(leaf)
        return params, state

    def _step(self, scaled: bool) -> Any:
        if scaled not in self._steps:
            self._steps[scaled] = self._make(self._scaled.tx if scaled and self._scaled is not None else self._tx)
        return self._steps[scaled]

    def _find(self, grads: Updates) -> None:
        if self._scaled is not None:
            self._scaled.find(grads)

    def way(self, params: Params, grads: Updates, state: State, extra: dict[str, Any]) -> bool | None:
        """Whether a number has to be found before a step on the shards of this process; None if that is not enough."""
        leaves, spec = structure((params, grads, state, extra))
        layouts = [layout(x) if is_sharded(x) else None for x in leaves]
        shapes = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        key = spec, tuple(layouts), shapes
        if key not in self._known:
            if len(self._known) > 1000:
                self._known.clear()
            count = len(tree_leaves(params))
            found = False if _runs_on_shards(self._tx, leaves, spec, layouts, count) else None
            if found is None and self._scaled is not None:
                self._scaled.find(grads)
                found = True if _runs_on_shards(self._scaled.tx, leaves, spec, layouts, count) else None
            self._known[key] = found
        return self._known[key]


class _Scaled:
    """A chain with a number in the place of its first link, which multiplies updates by this number of them."""

    def __init__(self, tx: Transform) -> None:
        first, *self._rest = tx.links
        self._factor = first.factor
        self._number: Tensor | None = None  # Read at every step.
        self.tx = Transform(tx.init, self._update)

    def find(self, grads: Updates) -> None:
        """Find the number, of sharded gradients, by one collective."""
        assert self._factor is not None
        found = self._factor(grads)
        if self._number is None:
            kind = found.dtype if found.device.type == "mps" else torch.float64
            self._number = torch.zeros((), dtype=kind, device=found.device)
        self._number.copy_(found)

    def _update(self, updates: Updates, state: State, params: Params, **extra: Any) -> tuple[Updates, State]:
        first, *before = state
        updates = compute(lambda u, f: u * f, updates, hyper=(self._number,))
        after = [first]
        for link, old in zip(self._rest, before, strict=True):
            updates, new = link.update(updates, old, params, **link.accepted(extra))
            after.append(new)
        return updates, tuple(after)


def _plain(tx: Transform, params: Params, grads: Updates, state: State, extra: dict[str, Any]) -> tuple[Params, State]:
    updates, new = tx.update(grads, state, params, **extra)
    return apply_updates(params, updates), new


def _runs_on_shards(tx: Transform, leaves: list[Any], spec: Any, layouts: Sequence[Layout | None], count: int) -> bool:
    """Whether a step needs nothing but the shards of this process; the first leaves are so many parameters."""
    cuts = [_cuts(x, own) for x, own in zip(leaves, layouts, strict=True)]
    pieces = max([own.pieces() for own in layouts if own is not None])
    small = sorted({size for own in layouts if own is not None for size in own.small() if size})
    found = local_results(lambda *row: tree_leaves(_plain(tx, *restored(spec, row))), leaves, cuts, pieces, small)
    if found is None:
        return False
    written = [*cuts[:count], *cuts[2 * count :]]  # Extra arguments, which come last, are not.
    return all([result.cuts == own for result, own in zip(found, written, strict=False)])


class _Owned:
    """Parameters and state that a donating step got last time, with their shards, to be known again at a glance."""

    def __init__(self, params: Any, state: Any, shards: Sequence[Any], step: Any, scaled: bool) -> None:
        self._leaves, self._spec = structure((params, state))
        self._shards, self.step, self.scaled = shards, step, scaled
        first, self._spec_of_params = structure(params)
        self._kinds = list(map(_kind, first))
        self._grads: list[Any] = []  # References to those of last time.
        self._kept: list[Any] | None = None  # Their shards, once the same came twice, and so are held elsewhere.
        self.written = [x for x in self._leaves if is_sharded(x)]

    def shards(self, params: Any, grads: Any, state: Any) -> list[Any] | None:
        """The shards of three trees, if params and state are those of last time and gradients lie as parameters do."""
        leaves, spec = structure((params, state))
        if spec != self._spec or not all(map(operator.is_, leaves, self._leaves)):
            return None
        slopes, of_grads = structure(grads)
        own = self._of_grads(slopes) if of_grads == self._spec_of_params else None
        return None if own is None else [self._shards[0], restored(of_grads, own), self._shards[2]]

    def _of_grads(self, slopes: list[Any]) -> list[Any] | None:
        """The shards of gradients that lie as parameters do."""
        again = len(self._grads) == len(slopes) and all(
            [ref() is g for ref, g in zip(self._grads, slopes, strict=True)]
        )
        if again and self._kept is not None:
            return self._kept
        if list(map(_kind, slopes)) != self._kinds:
            return None
        own = list(map(shard, slopes))
        self._grads, self._kept = list(map(weakref.ref, slopes)), own if again else None
        return own


def _kind(x: Any) -> tuple[Any, ...]:
    """What a gradient has in common with its parameter."""
    if not isinstance(x, Tensor):
        return (None,)
    if not holds_sharded((x,)):
        return None, None, x.shape, x.dtype
    own: Any = x  # A `DTensor`.
    return own.device_mesh, own.placements, own.shape, own.dtype


def _cuts(x: Any, own: Layout | None) -> tuple[Any, ...]:
    """The cuts of a leaf, named by the dimensions of the mesh that make them."""
    if not isinstance(x, Tensor):
        return ()
    if own is None:
        return (None,) * x.ndim
    names: dict[int, Any] = {}
    for i in own.cutting():
        placement = own.placements[i]
        names[placement.dim] = (*names.get(placement.dim, (own.mesh,)), i, type(placement))
    return tuple([names.get(d) for d in range(x.ndim)])


def _laid_like(leaf: Any, other: Any) -> Any:
    """A gradient with the placements of its parameter."""
    if not is_sharded(leaf) or not is_sharded(other) or (layout(other) == layout(leaf) and not _partial(other)):
        return other
    return other.redistribute(layout(leaf).mesh, layout(leaf).placements)


def _partial(x: Any) -> bool:
    return any([p.is_partial() for p in x.placements])


def local(tree: Any) -> Any:
    """A tree with the shards of this process for sharded leaves."""
    return tree_map(shard, tree)


def spread(tree: Any, like: Any) -> Any:
    """A tree of shards as one of sharded tensors, like another one."""
    return tree_map(lambda w, x: of_shard(x, layout(w) if is_sharded(w) else None), like, tree)


def is_spread(*trees: Any) -> bool:
    """Whether a leaf of some trees is sharded, outside of what `torch.func` transforms."""
    return holds_sharded(tree_leaves(trees))


def _check_donated(params: Any, state: Any) -> None:
    for name, tree in (("params", params), ("state", state)):
        for path, leaf in zip(tree_paths(tree), tree_leaves(tree), strict=True):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                raise ValueError(
                    f"{name} '{path}' requires grad and cannot be donated. step.init(params) gives copies that can."
                )
