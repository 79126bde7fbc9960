"""How channels go through products: of matrices, with weights or with each other, and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from funcreg.networks.atoms import UNKNOWN, Component, grouped_by_dims
from funcreg.networks.flow import Components, Flow, Fold, argument, rule, unknown
from funcreg.networks.tracing import Operation, Ref


def _contract(
    flow: Flow, a: Components, b: Components, shapes: Sequence[Sequence[int]], read: int | None
) -> Components:
    """The atoms of a product of matrices of these shapes; `read` says which of them is a weight."""
    over = max(len(shapes[0]), len(shapes[1])) - 1  # The dimension of the sum, once each has one for the other's.
    if read is None:
        flow.meet_heads(a, len(shapes[0]))
        flow.meet_heads(b, len(shapes[1]))
    a, b = _summed(flow, a, len(shapes[0]) - 1), _summed(flow, b, len(shapes[1]) - 2)
    left = [Component(ids.unsqueeze(-1), dead) for ids, dead in a]
    right = [Component(ids.unsqueeze(-3), dead) for ids, dead in b]
    wide = [[*shapes[0], 1], [*shapes[1][:-2], 1, *shapes[1][-2:]]]
    met = flow.atoms.meet([left, right], wide, flow.reason("they meet entries that are not channels"))
    made: Components = []
    for group in grouped_by_dims(met):
        component = next(iter(group.values()))
        if over in component.dims:
            consume(flow, group, read)
            continue
        if read is not None and read in group:
            flow.atoms.write(group[read].ids)
        dead = 0.0 if any([c.dead == 0 for c in group.values()]) else UNKNOWN
        made.append(Component(component.ids.squeeze(over), dead))
    return made


def _summed(flow: Flow, components: Components, dim: int) -> Components:
    """Atoms before a sum over a dimension: what differs along others too goes by those, as the heads of attention."""
    reason = flow.reason("they are summed over")
    apart = [kept for c in components for kept in ([c] if c.dims == {dim} else flow.atoms.rigid([c], [dim], reason))]
    return flow.atoms.settle(apart)


def consume(flow: Flow, group: dict[int, Component], read: int | None) -> None:
    """End the way of channels in a sum, which they must add nothing to."""
    ids = next(iter(group.values())).ids
    flow.summed.append(ids)
    if read is None:
        flow.multiply(ids, any([c.dead == 0 for c in group.values()]))
        return
    if read in group:
        flow.atoms.read(group[read].ids)
    dead = next((c.dead for i, c in group.items() if i != read), UNKNOWN)
    if dead != 0 and read in group:  # Whatever it is then, the weights that read it have to be zero.
        taken = None if read != 1 else _taken(flow, group[read].ids, dead)
        if taken is None and group[read].dead != 0 and not flow.is_fixed(group[read].ids):
            # A weight that is computed of zeros, and is another number.
            flow.atoms.close(ids, flow.reason(_not_zero(dead)))
        flow.demands.append((ids.reshape(-1), flow.reason(_not_zero(dead)), taken))
    elif dead != 0:
        flow.atoms.close(ids, flow.reason(_not_zero(dead)))


def _taken(flow: Flow, atoms: Tensor, constant: float) -> Fold | None:
    """How the bias of a linear layer or a convolution takes what constant channels give, alike at every place."""
    operation = flow.operation
    assert operation is not None
    name = operation.name
    if name == "addmm" and argument(operation, "alpha", 1) == argument(operation, "beta", 1) == 1:
        bias, _, weight = operation.args[:3]
        return flow.fold(weight, atoms, constant, bias)
    convolves = "convolution" in name and not any(argument(operation, "padding", (1,)))
    if name == "linear" or (convolves and not argument(operation, "transposed", False)):
        return flow.fold(operation.args[1], atoms, constant, argument(operation, "bias"))
    return None


def _not_zero(dead: float) -> str:
    number = "another number" if math.isnan(dead) else f"{dead:g}"
    return f"they are read, and a dead one would be {number}, not 0, which no bias here can take"


@rule("mm", "bmm", "matmul", "mv", "dot", "vdot")
def _product(flow: Flow, operation: Operation) -> list[Components]:
    return [_multiplied(flow, *operation.args[:2])]


def _multiplied(flow: Flow, a: Ref, b: Ref) -> Components:
    # What is computed of buffers and parameters alone is what a layer reads, too.
    reads = b in flow.weights and (a not in flow.weights or (flow.is_parameter(b) and not flow.is_parameter(a)))
    read = 1 if reads else 0 if a in flow.weights else None
    x, y, shapes = flow.of(a), flow.of(b), [list(a.shape), list(b.shape)]
    vector = len(shapes[1]) == 1
    if vector:
        y, shapes[1] = [Component(ids.unsqueeze(-1), dead) for ids, dead in y], [*shapes[1], 1]
    made = _contract(flow, x, y, shapes, read)
    return [Component(ids.squeeze(-1), dead) for ids, dead in made] if vector else made


@rule("addmm", "baddbmm", "addmv", "addbmm", "_sparse_addmm")
def _added_product(flow: Flow, operation: Operation) -> list[Components]:
    bias, a, b = operation.args[:3]
    return [_added(flow, _multiplied(flow, a, b), operation.results[0].shape, bias)]


@rule("_trilinear")
def _trilinear(flow: Flow, operation: Operation) -> list[Components]:
    """Sums of products of three tensors, each with dimensions of size 1 for those of others: a bilinear layer."""
    refs, gone = operation.args[:3], operation.args[6]
    if len([ref for ref in refs if ref in flow.weights]) != 1:
        return unknown(flow, operation)
    operands, shapes = list[Components](), list[list[int]]()
    for ref, new in zip(refs, operation.args[3:6], strict=True):
        old = iter(range(len(ref.shape)))
        dims = [None if dim in new else next(old) for dim in range(len(ref.shape) + len(new))]
        wide = lambda sizes, dims=dims: [1 if dim is None else sizes[dim] for dim in dims]
        operands.append([Component(ids.reshape(wide(ids.shape)), dead) for ids, dead in flow.of(ref)])
        shapes.append(wide(ref.shape))
    reason = flow.reason("they meet entries that are not channels")
    # What is summed over goes by those dimensions alone, what is not by the others.
    read = next(i for i, ref in enumerate(refs) if ref in flow.weights)
    met = flow.atoms.meet(operands, shapes, reason)
    met = [[kept for c in operand for kept in _one_way(flow, c, set(gone))] for operand in met]
    made: Components = []
    for group in grouped_by_dims(met):
        ids = next(iter(group.values())).ids
        if next(iter(group.values())).dims <= set(gone):
            consume(flow, group, read)
            continue
        if read in group:
            flow.atoms.write(group[read].ids)
        dead = 0.0 if any([c.dead == 0 for c in group.values()]) else UNKNOWN
        made.append(Component(ids.reshape([n for dim, n in enumerate(ids.shape) if dim not in gone]), dead))
    return [made]


def _one_way(flow: Flow, component: Component, gone: set[int]) -> Components:
    """Atoms that differ along one dimension, or along some that are all summed over or not."""
    if len(component.dims) < 2:
        return [component]
    return flow.atoms.rigid([component], component.dims & gone, flow.reason("they are summed over"))


@rule("linear")
def _linear(flow: Flow, operation: Operation) -> list[Components]:
    x, weight = operation.args[:2]
    bias = argument(operation, "bias")
    turned = [Component(ids.T, dead) for ids, dead in flow.of(weight)]
    read = 1 if weight in flow.weights else None
    made = _contract(flow, flow.of(x), turned, [x.shape, weight.shape[::-1]], read)
    return [made if bias is None else _added(flow, made, operation.results[0].shape, bias)]


def _added(flow: Flow, made: Components, shape: Sequence[int], bias: Ref) -> Components:
    met = flow.atoms.meet([made, flow.of(bias)], [shape, bias.shape], flow.reason("they meet entries of no channel"))
    flow.write([None, bias], met)
    return [
        Component(
            next(iter(group.values())).ids, 0.0 if all([i in group and group[i].dead == 0 for i in (0, 1)]) else UNKNOWN
        )
        for group in grouped_by_dims(met)
    ]


def attention(flow: Flow, operation: Operation) -> list[Components]:
    """Heads go whole, or by their features: of queries and keys together, unless the scale goes by their number."""
    query, key, value = operation.args[:3]
    mask = argument(operation, "attn_mask") or argument(operation, "attn_bias")
    heads = query.shape[-3] if len(query.shape) > 3 else 1
    operands, shapes = [], []
    for ref in (query, key, value):
        flow.meet_heads(flow.of(ref), len(ref.shape))
    features = [] if flow.inside is None else _features(flow, operation)
    for ref in (query, key, value, *([] if mask is None else [mask])):
        whole = flow.inside is None or ref == mask
        going = [c for c in flow.of(ref) if whole or c.dims != {len(ref.shape) - 1}]
        reason = flow.reason("features of an attention head, which goes whole")
        kept = flow.atoms.rigid(going, [len(ref.shape) - 1, len(ref.shape) - 2], reason)
        operands.append([_for_queries(component, heads) for component in kept])
        have = ref.shape[-3] if len(ref.shape) > 2 else 1
        shapes.append([*ref.shape[:-3], 1 if have == 1 else heads, 1, 1])
    met = flow.atoms.meet(operands, shapes, flow.reason("they meet heads that are kept"))
    made = [
        Component(next(iter(group.values())).ids, 0.0 if 2 in group and group[2].dead == 0 else UNKNOWN)
        for group in grouped_by_dims(met)
    ]
    return [made + features]


@rule("_nested_tensor_from_mask_left_aligned")
def _checked(flow: Flow, operation: Operation) -> list[Components]:
    """Whether what a mask leaves out comes last, of which no number is read but those of the mask."""
    flow.summed += [c.ids for c in flow.of(operation.args[0])]
    return []


def _features(flow: Flow, operation: Operation) -> Components:
    """The features of values, once those of queries and keys have met."""
    apart = [[c for c in flow.of(ref) if c.dims == {len(ref.shape) - 1}] for ref in operation.args[:3]]
    flat = [[Component(ids.reshape(-1), dead) for ids, dead in each] for each in apart[:2]]
    met = flow.atoms.meet(flat, [operation.args[0].shape[-1:]] * 2, flow.reason("they meet entries of no channel"))
    for group in grouped_by_dims(met):
        ids = next(iter(group.values())).ids
        flow.summed.append(ids)
        if argument(operation, "scale") is None:
            flow.atoms.close(ids, flow.reason("attention takes the scale of scores from the number of features"))
        flow.multiply(ids, any([c.dead == 0 for c in group.values()]))
    return apart[2]


def _for_queries(component: Component, heads: int) -> Component:
    """Heads of keys and values, each as often as it has queries."""
    have = component.ids.shape[-3]
    return (
        component
        if have in (1, heads)
        else Component(component.ids.repeat_interleave(heads // have, -3), component.dead)
    )
