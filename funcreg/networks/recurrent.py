"""How channels go through recurrent layers, whose hidden units have rows in all gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from funcreg.networks.atoms import UNKNOWN, Component, grouped_by_dims
from funcreg.networks.flow import Components, Flow, argument, rule, unknown
from funcreg.networks.products import consume
from funcreg.networks.tracing import Operation, Ref


class _Units(NamedTuple):
    """The atoms of the hidden units of a recurrent layer, and of what it gives: these, or projections of them."""

    hidden: Tensor
    given: Tensor


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(flow: Flow, operation: Operation) -> list[Components]:
    """A hidden unit has its rows in all gates, of every layer and direction, for these have one width.

    Once they are zero it stays the zero that it begins with: of the unit itself a share goes on, and what is added to
    it is the tanh of zero.
    """
    x, weights = operation.args[0], argument(operation, "params")
    directions = 2 if argument(operation, "bidirectional") else 1
    each = len(weights) // (directions * argument(operation, "num_layers"))
    current = _row(flow.rigid(x, range(len(x.shape) - 1), "they are steps of a sequence"))
    units: _Units | None = None
    for i in range(0, len(weights), each):
        if units is not None and i % (each * directions) == 0:
            current = [Component(units.given.repeat(directions).reshape(1, -1), 0.0)]
        units = _cell(flow, current, weights[i : i + each], bool(argument(operation, "has_biases")), units)
        if units is None:
            return unknown(flow, operation)
    assert units is not None
    _begin(flow, operation, units)
    return _last(operation, [units.given.repeat(directions), units.given, units.hidden])


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _recurrent_cell(flow: Flow, operation: Operation) -> list[Components]:
    x, names = operation.args[0], ("w_ih", "w_hh", "b_ih", "b_hh")
    cell = [ref for ref in (argument(operation, name) for name in names) if ref is not None]
    current = _row(flow.rigid(x, range(len(x.shape) - 1), "they are examples"))
    units = _cell(flow, current, cell, len(cell) > 2, None)
    if units is None:
        return unknown(flow, operation)
    _begin(flow, operation, units)
    return _last(operation, [units.hidden] * 2)


def _row(components: Components) -> Components:
    return [Component(ids.reshape(1, -1), dead) for ids, dead in components]


def _last(operation: Operation, several: Sequence[Tensor]) -> list[Components]:
    """For each result the atoms of its last dimension, zero where they are dead."""
    return [
        [Component(ids.reshape([1] * (len(ref.shape) - 1) + [-1]), 0.0)]
        for ids, ref in zip(several, operation.results, strict=False)
    ]


def _cell(flow: Flow, x: Components, weights: Sequence[Ref], biased: bool, units: _Units | None) -> _Units | None:
    """Join the units of one layer and direction with those of others; None if its weights have no channels."""
    into, across, *more = weights
    biases, project = (more[:2], more[2:]) if biased else ([], more)
    rows = {ref: ids for ref in (into, across, *more) if (ids := _along(flow, ref, 0)) is not None}
    columns = {ref: ids for ref in (into, across, *project) if (ids := _along(flow, ref, 1)) is not None}
    if len(rows) < len(weights) or len(columns) < len(project) + 2:
        return None
    size = (project[0] if project else across).shape[1]
    if units is None:
        hidden = rows[into][:size]
        units = _Units(hidden, rows[project[0]] if project else hidden)
    reason = flow.reason("they are one hidden unit")
    for ref in (into, across, *biases):
        flow.atoms.join(rows[ref].reshape(-1, size), units.hidden, reason)
        flow.atoms.write(rows[ref])
    for ref in project:
        flow.atoms.join(rows[ref], units.given, reason)
        flow.atoms.write(rows[ref])
    for ref, seen in [(across, units.given), *[(ref, units.hidden) for ref in project]]:
        flow.atoms.join(columns[ref], seen, reason)
        flow.atoms.read(columns[ref])
        flow.summed.append(columns[ref])
    read = [Component(columns[into].reshape(1, -1), 0.0)]
    met = flow.atoms.meet([x, read], [[1, into.shape[1]]] * 2, flow.reason("they meet entries that are not channels"))
    for group in grouped_by_dims(met):
        consume(flow, group, 1)
    return units


def _along(flow: Flow, ref: Ref, dim: int) -> Tensor | None:
    """The atoms of a weight along a dimension."""
    return next((c.ids.reshape(-1) for c in flow.of(ref) if c.dims == {dim}), None)


def _begin(flow: Flow, operation: Operation, units: _Units) -> None:
    """Close hidden units that do not begin with zero, or with what is zero once they are dead."""
    first: Any = argument(operation, "hx")
    states: list[Ref] = [first] if isinstance(first, Ref) else list(first)
    for state, ids in zip(states, (units.given, units.hidden), strict=False):
        kept = flow.rigid(state, range(len(state.shape) - 1), "they are layers or examples")
        for component in kept:
            flow.atoms.join(component.ids.reshape(-1), ids, flow.reason("they are one hidden unit"))
        if not kept or kept[0].dead != 0:
            flow.atoms.close(ids, flow.reason("their first state is given, and may not be zero"))


@rule("_pack_padded_sequence")
def _packed_sequence(flow: Flow, operation: Operation) -> list[Components]:
    kept = flow.rigid(operation.args[0], [0, 1], "they are steps of a sequence")
    return [[Component(ids.squeeze(0), dead) for ids, dead in kept]]


@rule("_pad_packed_sequence")
def _padded_sequence(flow: Flow, operation: Operation) -> list[Components]:
    kept, padding = flow.rigid(operation.args[0], [0], "they are steps of a sequence"), operation.args[3]
    return [[Component(ids.unsqueeze(0), dead if dead == padding else UNKNOWN) for ids, dead in kept]]
