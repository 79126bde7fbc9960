"""A step of a whole chain on the local shards of sharded parameters, compiled like any other step.

Where a chain acts entry by entry along the dimensions that are cut, the shards of a process are all it needs: they are
plain tensors, which are packed, compiled and donated, and no process waits for another. Any other chain runs leaf by
leaf, with what collectives its transforms need.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcreg.locality import local_results
from funcreg.sharding import Layout, holds_sharded, is_sharded, layout, of_shard, shard
from funcreg.tree import filled, restored, structure, tree_leaves, tree_map, tree_paths


class OnShards:
    """How one step runs on sharded parameters.

    Args:
        plain: From `(params, grads, state, extra)` to new parameters and state.
        donate: Whether the new ones are written into the old ones.
        spares: From parameters to where a gradient may be None.
    """

    def __init__(self, plain: Callable[..., tuple[Any, Any]], donate: bool, spares: Any = None) -> None:
        self._plain, self._donate, self._spares = plain, donate, spares
        self._known: dict[Any, bool] = {}
        self._last: _Owned | None = None

    @torch.no_grad()
    def call(self, step: Callable[..., tuple[Any, Any]], params: Any, grads: Any, state: Any, extra: Any) -> Any:
        """New parameters and state, by a step on plain tensors where that is possible."""
        last = self._last
        if last is not None and not extra and (shards := last.shards(params, grads, state)) is not None:
            step(*shards)
            torch.autograd.graph.increment_version(last.written)
            return params, state
        grads = filled(params, grads, self._spares, ("params", "grads"))
        if self._donate:
            _check_donated(params, state)
        grads = tree_map(_laid_like, params, grads)
        if self.is_local(params, grads, state, extra):
            shards = [local(tree) for tree in (params, grads, state)]
            made = step(*shards, **local(extra))
            if not self._donate:
                return spread(made[0], params), spread(made[1], state)
            last = _Owned(params, state, shards)
            # Of the sharded tensors, beside that of their shards.
            torch.autograd.graph.increment_version(last.written)
            self._last = last
            return params, state
        new = self._plain(params, grads, state, extra)
        if not self._donate:
            return new
        # All is read before anything is written.
        for old, leaf in zip(tree_leaves((params, state)), [x.clone() for x in tree_leaves(new)], strict=True):
            old.copy_(leaf)
        return params, state

    def is_local(self, params: Any, grads: Any, state: Any, extra: Any) -> bool:
        """Whether a step needs nothing but the shards of this process."""
        leaves, spec = structure((params, grads, state, extra))
        layouts = [layout(x) if is_sharded(x) else None for x in leaves]
        shapes = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        key = spec, tuple(layouts), shapes
        if key not in self._known:
            if len(self._known) > 1000:
                self._known.clear()
            self._known[key] = self._runs_on_shards(leaves, spec, layouts, len(tree_leaves(params)))
        return self._known[key]

    def _runs_on_shards(self, leaves: list[Any], spec: Any, layouts: Sequence[Layout | None], count: int) -> bool:
        cuts = [_cuts(x, own) for x, own in zip(leaves, layouts, strict=True)]
        pieces = max([own.pieces() for own in layouts if own is not None])
        small = sorted({size for own in layouts if own is not None for size in own.small() if size})
        found = local_results(lambda *row: tree_leaves(self._plain(*restored(spec, row))), leaves, cuts, pieces, small)
        if found is None:
            return False
        written = [*cuts[:count], *cuts[2 * count :]]  # Extra arguments, which come last, are not.
        return all([result.cuts == own for result, own in zip(found, written, strict=False)])


class _Owned:
    """Parameters and state that a donating step got last time, with their shards, to be known again at a glance."""

    def __init__(self, params: Any, state: Any, shards: Sequence[Any]) -> None:
        self._leaves, self._spec = structure((params, state))
        self._shards, self._count = shards, len(tree_leaves(params))
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
