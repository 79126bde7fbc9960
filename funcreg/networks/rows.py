"""How channels go through operations that take, add or set rows by an index: channel by channel along other dimensions.

Along the dimensions of the index all entries stay. An index is no channel, and what it depends on is closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from funcreg.networks.atoms import UNKNOWN, Component, grouped_by_dims
from funcreg.networks.flow import Components, Flow, argument, rule, unknown
from funcreg.networks.shapes import piece
from funcreg.networks.tracing import Operation, Ref, refs_in

_LOOKED_UP = "they are looked up by an index"


class _Place(NamedTuple):
    """Where an index reads or writes."""

    taken: list[int]  # Dimensions of the tensor that it is for.
    dims: list[int | None]  # For each dimension of what is read which one it is; None for one of the index.


def _place(flow: Flow, x: Ref, indices: Sequence[Ref | None]) -> _Place | None:
    """Where an index reads or writes, None if that is not known."""
    flow.close_index(indices)
    taken, sizes, dim = list[int](), list[int](), 0
    for each in indices:
        masks = each is not None and each.dtype in (torch.bool, torch.uint8)
        count = len(each.shape) if each is not None and masks else 1
        if each is not None:
            taken += range(dim, dim + count)
            sizes.append(1 if masks else len(each.shape))
        if count == 0:
            return None
        dim += count
    if not taken:
        return None
    kept: list[int | None] = [dim for dim in range(len(x.shape)) if dim not in taken]
    first = taken[0] if taken == list(range(taken[0], taken[-1] + 1)) else 0
    return _Place(taken, [*kept[:first], *[None] * max(sizes), *kept[first:]])


@rule("index", "_unsafe_index")
def _indexed(flow: Flow, operation: Operation) -> list[Components]:
    x, indices = operation.args[:2]
    place = _place(flow, x, indices)
    if place is None:
        return unknown(flow, operation)
    if len(place.taken) == 1 and place.dims[place.taken[0]] is None and len(place.dims) == len(x.shape):
        dim, (index,) = place.taken[0], refs_in(indices)
        start = flow.recording.numbers.get(index)
        if start is not None and index.dtype == torch.int64 and index.shape == (1,):  # x[:, [-1]]
            return [piece(flow, x, dim, int(start) % x.shape[dim], 1)]
    made: Components = []
    for ids, dead in flow.rigid(x, place.taken, _LOOKED_UP):
        made.append(Component(ids.reshape([1 if dim is None else ids.shape[dim] for dim in place.dims]), dead))
    return [made]


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def _put(flow: Flow, operation: Operation) -> list[Components]:
    x, indices, values = operation.args[:3]
    place = _place(flow, x, indices)
    if place is None or not isinstance(values, Ref):
        return unknown(flow, operation)
    dims = place.dims[len(place.dims) - len(values.shape) :] if values.shape else []
    rigid = [i for i, dim in enumerate(dims) if dim is None]
    moved = lambda sizes: [sizes[dims.index(dim)] if dim in dims else 1 for dim in range(len(x.shape))]
    rows = [Component(ids.reshape(moved(ids.shape)), dead) for ids, dead in flow.rigid(values, rigid, _LOOKED_UP)]
    shape = [1 if dim in place.taken else n for dim, n in enumerate(x.shape)]
    operands = [flow.rigid(x, place.taken, _LOOKED_UP), rows]
    adds = bool(argument(operation, "accumulate", False))
    number = flow.recording.numbers.get(values, UNKNOWN)
    return [_met(flow, (x, values), operands, (shape, moved(values.shape)), "adds" if adds else "sets", number)]


@rule("index_add", "index_copy")
def _by_rows(flow: Flow, operation: Operation) -> list[Components]:
    x, dim, index, rows = operation.args[:4]
    if not x.shape or len(rows.shape) != len(x.shape):
        return unknown(flow, operation)
    flow.close_index([index])
    way = "adds" if operation.name.startswith("index_add") else "sets"
    return [_among_rows(flow, (x, rows), {dim % len(x.shape)}, way)]


@rule("scatter_add", "scatter", "scatter_reduce")
def _scattered(flow: Flow, operation: Operation) -> list[Components]:
    x, dim, index, rows = operation.args[:4]
    if not x.shape or not isinstance(rows, Ref) or len(rows.shape) != len(x.shape):
        return unknown(flow, operation)
    flow.close_index([index])
    sums = operation.name.startswith("scatter_add") or argument(operation, "reduce") in ("sum", "add")
    way = "adds" if sums and argument(operation, "include_self", True) else "reduces"
    if operation.name.removesuffix("_") == "scatter" and argument(operation, "reduce") is None:
        way = "sets"
    return [_among_rows(flow, (x, rows), _rigid(flow, index, dim, x, rows), way)]


@rule("gather")
def _gathered(flow: Flow, operation: Operation) -> list[Components]:
    x, dim, index = operation.args[:3]
    if not x.shape:
        return unknown(flow, operation)
    flow.close_index([index])
    return [flow.rigid(x, sorted(_rigid(flow, index, dim, x)), _LOOKED_UP)]


def _rigid(flow: Flow, index: Ref, dim: int, *several: Ref) -> set[int]:
    """The dimensions along which an index may differ, or does not take all entries, so that these stay."""
    dim %= len(index.shape)
    alike = lambda d: flow.alike(index, d) and all([x.shape[d] == index.shape[d] for x in several])
    return {d for d in range(len(index.shape)) if d == dim or not alike(d)}


def _among_rows(flow: Flow, refs: tuple[Ref, Ref], dims: set[int], way: str) -> Components:
    operands = [flow.rigid(ref, sorted(dims), _LOOKED_UP) for ref in refs]
    shapes = [[1 if dim in dims else n for dim, n in enumerate(ref.shape)] for ref in refs]
    return _met(flow, refs, operands, shapes, way)


def _met(
    flow: Flow,
    refs: Sequence[Ref],
    operands: Sequence[Components],
    shapes: Sequence[Sequence[int]],
    way: str,
    number: float = UNKNOWN,
) -> Components:
    """The atoms of a tensor some of whose rows are added to, set, or reduced with others.

    Args:
        flow: What is known.
        refs: The tensor, and the rows.
        operands: Their atoms, along the dimensions of the tensor.
        shapes: Their shapes, with 1 for the dimensions of the index.
        way: What is done with the rows.
        number: What the entries of the rows are where they have no atoms.
    """
    reason = flow.reason("they are written into entries that are not channels")
    met = flow.atoms.meet(operands, shapes, reason)
    flow.write(refs, met)
    made: Components = []
    for group in grouped_by_dims(met):
        into, rows = (group[i].dead if i in group else other for i, other in ((0, UNKNOWN), (1, number)))
        same = (rows == 0 and (into == 0 or way == "adds")) or (way == "sets" and rows == into)
        made.append(Component(next(iter(group.values())).ids, into if same else UNKNOWN))
    return made
