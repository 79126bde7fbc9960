"""How channels go through reductions and layers, and which rule an operation has."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import funcreg.networks.recurrent  # They have rules, which are known by their names.
import funcreg.networks.rows  # noqa: F401
from funcreg.networks.atoms import UNKNOWN, Component, grouped_by_dims
from funcreg.networks.flow import RULES, Components, Flow, Rule, argument, rule, unknown
from funcreg.networks.products import attention, consume
from funcreg.networks.shapes import SAMPLES, pointwise
from funcreg.networks.tracing import Operation, Ref, refs_in


def rule_of(operation: Operation) -> Rule:
    """The rule of an operation, that of all operations unknown to it if there is none."""
    name = operation.name
    known = RULES.get(name) or RULES.get(name.removesuffix("_")) or RULES.get(name.removesuffix("_copy"))
    if known is not None:
        return known
    if name.startswith("_scaled_dot_product"):
        return attention
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
            consume(flow, group, 1)
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
        consume(flow, group, 1)
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
