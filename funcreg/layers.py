"""How channels go through reductions, products and layers, and which rule an operation has."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import funcreg.rows  # noqa: F401  It has rules, which are known by their names.
from funcreg.atoms import UNKNOWN, Component, grouped_by_dims
from funcreg.flow import RULES, Components, Flow, Fold, Rule, argument, rule, unknown
from funcreg.shapes import SAMPLES, pointwise
from funcreg.tracing import Operation, Ref, refs_in


def rule_of(operation: Operation) -> Rule:
    """The rule of an operation, that of all operations unknown to it if there is none."""
    name = operation.name
    known = RULES.get(name) or RULES.get(name.removesuffix("_")) or RULES.get(name.removesuffix("_copy"))
    if known is not None:
        return known
    if name.startswith("_scaled_dot_product"):
        return _attention
    if re.search(r"pool\dd|upsample_|(reflection|replication)_pad\dd", name):
        return _by_pixel
    return pointwise if torch.Tag.pointwise in operation.function.tags else unknown


# Reductions


_REDUCTIONS = (
    "sum mean amax amin max min var std var_mean linalg_vector_norm norm logsumexp prod any all argmax argmin "
    "median nanmedian mode kthvalue"
)
#: What is the same number of entries that are all the same, and what is zero of zeros.
_SAME = ("mean", "amax", "amin", "max", "min", "median", "nanmedian", "mode", "kthvalue")
_OF_ZEROS = (*_SAME, "sum", "norm", "linalg_vector_norm")


@rule(*_REDUCTIONS.split())
def _reduced(flow: Flow, operation: Operation) -> list[Components]:
    x, name = operation.args[0], operation.name
    if name in ("max", "min") and len(refs_in(operation.args)) > 1:
        return pointwise(flow, operation)
    where = argument(operation, "dim")
    dims = range(len(x.shape)) if where is None or where == [] else [where] if isinstance(where, int) else where
    dims = {dim % len(x.shape) for dim in dims}
    made: Components = []
    for component in flow.of(x):
        # Averages that nobody asks for, such as those of attention, may be others. Sums of zeros may lack some if no
        # number is another one then: code that divides by the number of channels takes it from the shape.
        if component.dims <= dims and not operation.needed:
            flow.summed.append(component.ids)
            continue
        if component.dims <= dims and name == "sum" and component.dead == 0 and x not in flow.weights:
            flow.summed.append(component.ids)
            flow.try_out(component.ids, flow.reason("they are reduced over channels"))
            continue
        made += flow.atoms.rigid([component], dims, flow.reason("they are reduced over channels"))
    if not argument(operation, "keepdim", False):
        kept = [dim for dim in range(len(x.shape)) if dim not in dims]
        made = [Component(ids.reshape([ids.shape[dim] for dim in kept]), dead) for ids, dead in made]
    zero, same = 0.0 if name in _OF_ZEROS else UNKNOWN, name in _SAME
    first = [Component(ids, zero if dead == 0 else dead if same else UNKNOWN) for ids, dead in made]
    return [first, *[[Component(ids, UNKNOWN) for ids, _ in made] for _ in operation.results[1:]]]


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def _softmax(flow: Flow, operation: Operation) -> list[Components]:
    x, dim = operation.args[0], argument(operation, "dim", -1)
    flow.one_weight |= x.shape[dim] == 1 if x.shape else True
    kept = flow.rigid(x, [dim], "a softmax over channels")
    return [[Component(ids, UNKNOWN) for ids, _ in kept]]


def _by_pixel(flow: Flow, operation: Operation) -> list[Components]:
    """Pooling, upsampling and padding of each channel by itself."""
    x = operation.args[0]
    pixels = int(re.findall(r"(\d)d", operation.name)[0])
    kept = flow.rigid(x, range(len(x.shape) - pixels, len(x.shape)), "they are pixels")
    # A border of zeros is averaged with them, and zeros lie between what is unpooled.
    same = not operation.name.startswith(("avg_pool", "max_unpool"))
    made = [Component(ids, dead if same or dead == 0 else UNKNOWN) for ids, dead in kept]
    return [made, [Component(ids, UNKNOWN) for ids, _ in kept]]


@rule("grid_sampler_2d", "grid_sampler_3d", "_grid_sampler_2d_cpu_fallback", "cudnn_grid_sampler")
def _sampled(flow: Flow, operation: Operation) -> list[Components]:
    """Each channel at other places; outside of it there may be zeros."""
    x, places = operation.args[:2]
    flow.close_index(places)
    kept = flow.rigid(x, [0, *range(2, len(x.shape))], "they are pixels")
    return [[Component(ids, 0.0 if dead == 0 else UNKNOWN) for ids, dead in kept]]


@rule("im2col", "col2im")
def _patches(flow: Flow, operation: Operation) -> list[Components]:
    """The pixels of a patch as channels, those of one channel after the other, and back; zeros lie around an image."""
    x, count = operation.args[0], math.prod(argument(operation, "kernel_size"))
    into = operation.name == "im2col"
    dim = len(x.shape) - (3 if into else 2)
    made: Components = []
    for ids, dead in flow.rigid(x, [d for d in range(len(x.shape)) if d != dim], "they are pixels"):
        front = ids.movedim(dim, 0).reshape(-1)
        if into:
            front = front.repeat_interleave(count)
        else:
            blocks = front.reshape(-1, count)
            flow.atoms.join(blocks, blocks[:, :1], flow.reason("they are pixels of a channel"))
            front = blocks[:, 0]
        shape = [1] * (len(x.shape) + (-1 if into else 1))
        shape[dim] = -1
        made.append(Component(front.reshape(shape), 0.0 if dead == 0 else UNKNOWN))
    return [flow.atoms.settle(made)]


@rule("unfold")
def _windows(flow: Flow, operation: Operation) -> list[Components]:
    x, dim = operation.args[:2]
    return [[Component(ids.unsqueeze(-1), dead) for ids, dead in flow.rigid(x, [dim], "windows along them are taken")]]


@rule("rrelu_with_noise")
def _noisy(flow: Flow, operation: Operation) -> list[Components]:
    """A slope for each entry, drawn in training; zero stays zero."""
    x, noise = operation.args[:2]
    flow.summed += [c.ids for c in flow.of(noise)]
    return [[Component(ids, 0.0 if dead == 0 else UNKNOWN) for ids, dead in flow.of(x)]]


# Products


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
            _consume(flow, group, read)
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


def _consume(flow: Flow, group: dict[int, Component], read: int | None) -> None:
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
            _consume(flow, group, read)
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


def _attention(flow: Flow, operation: Operation) -> list[Components]:
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


# Layers

#: Why dimensions of a weight stay that never were channels.
PIXELS = "they are the pixels of a kernel"


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(flow: Flow, operation: Operation) -> list[Components]:
    """Sums, means or maxima of rows; of no rows they are zero."""
    weight = operation.args[0]
    kept = flow.rigid(weight, [0], "they are looked up by an index")
    flow.write([weight], [kept])
    flow.close_index(operation.args[1:])
    return [[Component(ids.reshape(1, -1), 0.0 if dead == 0 else UNKNOWN) for ids, dead in kept]]


@rule("embedding")
def _embedding(flow: Flow, operation: Operation) -> list[Components]:
    weight, index = operation.args[:2]
    kept = flow.rigid(weight, [0], "they are looked up by an index")
    flow.write([weight], [kept])
    return [[Component(ids.reshape([*[1] * len(index.shape), -1]), dead) for ids, dead in kept]]


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution")
def _convolution(flow: Flow, operation: Operation) -> list[Components]:
    x, weight = operation.args[:2]
    bias, groups = argument(operation, "bias"), argument(operation, "groups", 1)
    transposed = bool(argument(operation, "transposed", False))
    pixels = range(2, len(x.shape))
    channels = flow.rigid(x, [0, *pixels], "they are pixels")
    kernel = flow.rigid(weight, pixels, PIXELS)
    of_dim = lambda dim: next((c for c in kernel if c.dims == {dim}), None)
    given, taken = of_dim(1 if transposed else 0), of_dim(0 if transposed else 1)
    reason = flow.reason("they meet entries that are not channels")
    if groups == 1:
        flat = [[1, x.shape[1]], [1, x.shape[1]]]
        a = [Component(c.ids.reshape(1, -1), c.dead) for c in channels]
        b = [] if taken is None else [Component(taken.ids.reshape(1, -1), taken.dead)]
        for group in grouped_by_dims(flow.atoms.meet([a, b], flat, reason)):
            _consume(flow, group, 1)
        ids = None if given is None else given.ids.reshape(-1)
    else:
        ids = _grouped_convolution(flow, channels, given, taken, groups, transposed, reason)
    if ids is None:
        return [[]]
    flow.atoms.write(ids)
    made = [Component(ids.reshape(1, -1, *[1] * len(pixels)), 0.0 if weight in flow.weights else UNKNOWN)]
    if bias is None:
        return [made]
    wide = [Component(ids.reshape(1, -1, *[1] * len(pixels)), dead) for ids, dead in flow.of(bias)]
    met = flow.atoms.meet([made, wide], [operation.results[0].shape[1:2] + (1,) * len(pixels)] * 2, reason)
    flow.write([None, bias], met)
    return [[Component(c.ids, 0.0 if c.dead == 0 and wide and wide[0].dead == 0 else UNKNOWN) for c in met[0]]]


def _grouped_convolution(
    flow: Flow,
    channels: Components,
    given: Component | None,
    taken: Component | None,
    groups: int,
    transposed: bool,
    reason: str,
) -> Tensor | None:
    """The channels that go into a group of a convolution, and those that come out of it, go together.

    Or, where these are mixed with others, as many of each group: the same ones of those that go in, and of the others.
    """
    inside, rows = (given, taken) if transposed else (taken, given)
    module = "" if flow.operation is None else flow.operation.module
    if rows is not None and inside is not None and not transposed:
        flow.grouped.setdefault(module, []).append(rows.ids.reshape(-1))
        if module in flow.narrow:
            return _narrow_groups(flow, channels, rows.ids.reshape(groups, -1), inside, reason)
    if inside is not None:  # Of each group, the same weights for all of them.
        flow.atoms.close(inside.ids, flow.reason("they are channels inside the groups of a convolution"))
    if rows is None:
        flow.atoms.close_all(channels, reason)
        return None
    blocks = rows.ids.reshape(groups, -1)
    flow.atoms.join(blocks, blocks[:, :1], reason)
    if not channels:
        flow.atoms.close(blocks, reason)
    for c in channels:
        flow.atoms.join(c.ids.reshape(groups, -1), blocks[:, :1], reason)
    if not transposed:
        return rows.ids.reshape(-1)
    return blocks[:, :1].expand(groups, 1 if inside is None else inside.ids.numel()).reshape(-1)


def _narrow_groups(flow: Flow, channels: Components, rows: Tensor, inside: Component, reason: str) -> Tensor:
    """As many channels of each group, of those that go in and of those that come out."""
    size, each = inside.ids.numel(), flow.reason("as many channels of each group of a convolution")
    flow.atoms.join(rows, rows[:1], each)
    for c in channels:
        flow.atoms.join(c.ids.reshape(-1, size), c.ids.reshape(-1, size)[:1], each)
    firsts = [Component(c.ids.reshape(-1)[:size].reshape(1, -1), c.dead) for c in channels]
    weight = [Component(inside.ids.reshape(1, -1), inside.dead)]
    for group in grouped_by_dims(flow.atoms.meet([firsts, weight], [[1, size]] * 2, reason)):
        _consume(flow, group, 1)
    for c in channels:
        flow.summed.append(c.ids)
    return rows.reshape(-1)


_BATCH_NORMS = (
    "batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm _batch_norm_with_update _batch_norm_no_update"
)


@rule(*_BATCH_NORMS.split())
def _batch_norm(flow: Flow, operation: Operation) -> list[Components]:
    x = operation.args[0]
    vectors = [argument(operation, name) for name in ("weight", "bias", "running_mean", "running_var")]
    across = [dim for dim in range(len(x.shape)) if dim != 1]
    if isinstance(vectors[2], Ref) and not argument(operation, "training", False):
        flow.rigid(x, across, "normalized over them in training")  # By running statistics in evaluation alone.
        return [_scaled(flow, x, vectors, lambda x, w, b, m, v: (x - m) * w * v + b)]
    # By the mean and variance of the entries themselves, so that none of them may be missing.
    flow.rigid(x, across, "normalized over them")
    return [_scaled(flow, x, vectors, lambda x, w, b, m, v: x * w * v + b)]


@rule("native_group_norm", "group_norm")
def _group_norm(flow: Flow, operation: Operation) -> list[Components]:
    x = operation.args[0]
    groups = argument(operation, "group", argument(operation, "num_groups"))
    reason = flow.reason("normalized with entries that are not channels")
    for ids, _ in flow.rigid(x, [0, *range(2, len(x.shape))], "they are pixels"):
        blocks = ids.reshape(groups, -1)
        flow.atoms.join(blocks, blocks[:, :1], reason)
    vectors = [argument(operation, "weight"), argument(operation, "bias"), None, None]
    return [_scaled(flow, x, vectors, lambda x, w, b, m, v: x * w * v + b)]


def _scaled(flow: Flow, x: Ref, vectors: list[Any], formula: Callable[..., float], dim: int = 1) -> Components:
    """A tensor each of whose channels is shifted and scaled by entries of vectors."""
    shape = [1] * len(x.shape)
    operands, shapes = [flow.of(x)], [list(x.shape)]
    for vector in vectors:
        shape[dim] = -1
        operands.append([Component(ids.reshape(shape), dead) for ids, dead in flow.of(vector)])
        shapes.append([1 if vector is None or d != dim else n for d, n in enumerate(x.shape)])
    met = flow.atoms.meet(operands, shapes, flow.reason("they scale entries that are not channels"))
    flow.write(vectors, met[1:])
    made: Components = []
    for group in grouped_by_dims(met):
        values = set()
        for sample in SAMPLES:
            # Without a scale it is 1, without a shift 0; statistics are whatever they are.
            given = [
                sample[0],
                *[
                    none if v is None else sample[i % 3]
                    for i, (v, none) in enumerate(zip(vectors, (1.0, 0.0, sample[1], sample[2]), strict=True))
                ],
            ]
            given = [group[i].dead if i in group and not math.isnan(group[i].dead) else y for i, y in enumerate(given)]
            values.add(formula(*given))
        made.append(Component(next(iter(group.values())).ids, values.pop() if len(values) == 1 else UNKNOWN))
    return made


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(flow: Flow, operation: Operation) -> list[Components]:
    """Channels that are averaged over stay, with all that reads them: so they go on, closed by this reason."""
    x, shape = operation.args[:2]
    weight, bias = argument(operation, "weight"), argument(operation, "bias")
    flow.rigid(x, range(len(x.shape) - len(shape), len(x.shape)), "normalized over channels")
    for ref in (weight, bias):
        flow.atoms.close_all(flow.of(ref), flow.reason("normalized over channels"))
    refs = [x, *[ref for ref in (weight, bias) if ref is not None]]
    met = flow.atoms.meet([flow.of(ref) for ref in refs], [ref.shape for ref in refs], flow.reason("they scale it"))
    made = [next(iter(group.values())) for group in grouped_by_dims(met)]
    return [[Component(ids, 0.0 if dead == 0 and bias is None else UNKNOWN) for ids, dead in made]]


# Recurrent layers


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
        _consume(flow, group, 1)
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
