"""How channels go through operations entry by entry, and through those that give tensors other shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from funcreg.networks.atoms import UNKNOWN, Component, grouped_by_dims, regrouped
from funcreg.networks.flow import SHARED, Components, Flow, argument, rule, unknown
from funcreg.networks.tracing import Operation, Ref, refs_in

# Entry by entry

_ENTRYWISE = (
    *("hardswish", "_prelu_kernel", "prelu", "leaky_relu", "log_sigmoid_forward", "rsub", "masked_fill"),
    *("special_erf", "complex", "polar"),
)
#: What unknown entries may be, of either sign, small and large.
SAMPLES = (
    *((0.7, -1.3, 2.9), (1.9, 0.4, -0.6), (-0.8, 2.2, 0.3), (-0.3, -0.6, -1.7)),
    *((30.0, -40.0, 50.0), (-500.0, 600.0, -700.0), (1e-4, 2e-4, -3e-4), (9e3, 8e3, 7e3)),
)


@rule(*_ENTRYWISE)
def pointwise(flow: Flow, operation: Operation) -> list[Components]:
    refs = refs_in([operation.args, operation.kwargs])
    reason = flow.reason("they meet entries that are not channels")
    met = flow.atoms.meet([flow.of(ref) for ref in refs], [ref.shape for ref in refs], reason)
    if not all([ref in flow.weights for ref in refs]):  # Else it is a weight, too, whose rows and columns are apart.
        flow.write(refs, met)
    made: Components = []
    for group in grouped_by_dims(met):
        numbers = [
            group[i].dead if i in group else flow.recording.numbers.get(ref, UNKNOWN) for i, ref in enumerate(refs)
        ]
        dead = _value(operation, numbers)
        made.append(Component(flow.merged(refs, group), dead))
    return [made, [Component(ids, UNKNOWN) for ids, _ in made]]


def _value(operation: Operation, dead: list[float]) -> float:
    """What an operation makes of entries some of which are known, if it is the same whatever the others are."""
    found = set()
    for sample in SAMPLES:
        entries = iter([sample[i % 3] if math.isnan(x) else x for i, x in enumerate(dead)])
        args, kwargs = _filled(operation.args, entries), _filled(operation.kwargs, entries)
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        made = operation.function(*args, **kwargs)
        made = made[0] if isinstance(made, (tuple, list)) else made
        found.add(float(made.real) if not made.is_complex() or made.imag == 0 else UNKNOWN)
    return found.pop() if len(found) == 1 else UNKNOWN


def _filled(value: Any, entries: Iterator[float]) -> Any:
    if isinstance(value, Ref):
        entry = next(entries)
        return torch.tensor(entry > 0 if value.dtype == torch.bool else entry).to(value.dtype)
    if isinstance(value, dict):
        return {key: _filled(each, entries) for key, each in value.items()}
    return type(value)(_filled(each, entries) for each in value) if type(value) in (tuple, list) else value


@rule("detach", "alias", "_to_copy", "contiguous", "lift_fresh", "clone", "to", "dropout", "requires_grad_", "_conj")
def _same(flow: Flow, operation: Operation) -> list[Components]:
    return [flow.of(operation.args[0])]


@rule("as_strided")
def _strided(flow: Flow, operation: Operation) -> list[Components]:
    """Other strides where dimensions have one entry, as pooling to one pixel gives where channels lie last."""
    x = operation.args[0]
    return [flow.of(x)] if operation.results == [x] else unknown(flow, operation)


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "zero", "fill", "bernoulli")
def _like(flow: Flow, operation: Operation) -> list[Components]:
    dead = {"zeros_like": 0.0, "zero": 0.0, "ones_like": 1.0}.get(operation.name.removesuffix("_"), UNKNOWN)
    return [[Component(ids, dead) for ids, _ in flow.of(operation.args[0])]]


@rule("zeros", "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided")
def _made(flow: Flow, operation: Operation) -> list[Components]:
    """Zeros have channels of their own, which go with those that they meet: a first state, or a place to write into."""
    for ref in refs_in(operation.args):  # Its dtype and device are taken alone.
        flow.summed += [c.ids for c in flow.of(ref)]
    (made,) = operation.results
    if not operation.name.endswith("zeros") and operation.name != "new_empty":  # Noise is drawn into that.
        return [[]]
    dead = 0.0 if operation.name.endswith("zeros") else UNKNOWN
    sizes = [[n if d == dim else 1 for d in range(len(made.shape))] for dim, n in enumerate(made.shape)]
    return [[Component(flow.atoms.new(max(size)).reshape(size), dead) for size in sizes if max(size) > 1]]


@rule("native_dropout")
def _dropped(flow: Flow, operation: Operation) -> list[Components]:
    kept = flow.of(operation.args[0])
    return [[Component(ids, 0.0 if dead == 0 else UNKNOWN) for ids, dead in kept], kept]


@rule("copy")
def _copy(flow: Flow, operation: Operation) -> list[Components]:
    refs = list(operation.args[:2])
    reason = flow.reason("they are written into a tensor of another width")
    met = flow.atoms.meet([flow.of(ref) for ref in refs], [ref.shape for ref in refs], reason)
    return [met[1] or [Component(ids, UNKNOWN) for ids, _ in met[0]]]


@rule("glu")
def _glu(flow: Flow, operation: Operation) -> list[Components]:
    x = operation.args[0]
    dim = argument(operation, "dim", -1) % len(x.shape)
    components = piece(flow, x, dim, 0, x.shape[dim] // 2)
    return [[Component(ids, 0.0 if dead == 0 else UNKNOWN) for ids, dead in components]]


# Other shapes


@rule("t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "movedim", "mT", "adjoint")
def _moved(flow: Flow, operation: Operation) -> list[Components]:
    x = operation.args[0]
    name, args = operation.name.removesuffix("_").removesuffix("_copy"), list(operation.args[1:])
    made: Components = []
    for ids, dead in flow.of(x):
        if name == "expand":
            shape = list(args[0])
            front = ids.reshape([1] * (len(shape) - ids.ndim) + list(ids.shape))
            made.append(Component(front, dead))
        elif name == "squeeze":
            given: Any = args[0] if args else range(len(x.shape))
            given = [given] if isinstance(given, int) else given
            dims = {dim % len(x.shape) for dim in given if x.shape[dim] == 1}
            made.append(Component(ids.reshape([n for dim, n in enumerate(ids.shape) if dim not in dims]), dead))
        else:
            made.append(Component(getattr(torch.ops.aten, name)(ids, *args), dead))
    if name == "expand":
        made += _shared(flow, x, operation.results[0])
    return [made]


def _shared(flow: Flow, x: Ref, made: Ref) -> Components:
    """Channels for a single head of keys or values, or a mask, that is expanded to as many as there are queries.

    The copies go with what they meet; where their number is one of the code, trying families out shows it.
    """
    ndim = len(made.shape)
    if ndim < 4 or x in flow.weights or x.shape[-3:-2] not in ((), (1,)) or made.shape[-3] == 1:
        return []
    shape = [n if dim == ndim - 3 else 1 for dim, n in enumerate(made.shape)]
    return [Component(flow.atoms.new(made.shape[-3]).reshape(shape), UNKNOWN)]


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def _viewed(flow: Flow, operation: Operation) -> list[Components]:
    x, (made,) = operation.args[0], operation.results
    if isinstance(operation.args[1], torch.dtype):
        return unknown(flow, operation)
    return [flow.atoms.settle(_regroup(flow, flow.of(x), x.shape, made.shape))]


def _regroup(flow: Flow, components: Components, old: Sequence[int], new: Sequence[int]) -> Components:
    made = flow.atoms.settle([Component(regrouped(ids, old, new), dead) for ids, dead in components])
    made = flow.by_features(made)
    # Entries that go by two dimensions at once do not go by one. What is kept anyhow takes nothing from the others.
    if sum([len(c.dims) for c in made]) > len({dim for c in made for dim in c.dims}):
        made.sort(key=lambda c: flow.is_kept(c.ids) or flow.atoms.is_closed(c.ids))
    apart: Components = []
    for component in made:
        before = [other for other in apart if component.dims & other.dims]
        if before:
            flow.preferred += [other.ids.reshape(-1) for other in before]
            flow.atoms.close(component.ids, flow.reason(SHARED))
        else:
            apart.append(component)
    return apart


@rule("repeat")
def _repeated(flow: Flow, operation: Operation) -> list[Components]:
    x, times = operation.args[:2]
    made: Components = []
    for ids, dead in flow.of(x):
        front = ids.reshape([1] * (len(times) - ids.ndim) + list(ids.shape))
        made.append(
            Component(front.repeat([n if size > 1 else 1 for n, size in zip(times, front.shape, strict=True)]), dead)
        )
    return [made + _shared(flow, x, operation.results[0])]


@rule("slice")
def _sliced(flow: Flow, operation: Operation) -> list[Components]:
    x, (made,) = operation.args[0], operation.results
    dim = argument(operation, "dim", 0) % len(x.shape)
    start = argument(operation, "start") or 0
    start = max(0, start + x.shape[dim]) if start < 0 else start
    if (argument(operation, "step", 1) or 1) != 1:
        return [flow.rigid(x, [dim], "every few entries are taken")]
    return [piece(flow, x, dim, start, made.shape[dim], (x, dim) not in flow.divided)]


def piece(flow: Flow, x: Ref, dim: int, start: int, length: int, equal: bool = True) -> Components:
    """The atoms of a part of a tensor: where it may be one of equal parts, what goes goes from each of them."""
    components, size = flow.of(x), x.shape[dim]
    made: Components = []
    for component in components:
        if dim not in component.dims or length == size:
            made.append(component)
        elif (part := flow.part(x, component, dim, start, length)) is not None:
            made.append(part)
        elif equal and length > 1 and size % length == 0 and start % length == 0:
            first = component.ids.narrow(dim, 0, length)
            for other in range(length, size, length):
                flow.atoms.join(first, component.ids.narrow(dim, other, length), flow.reason("parts are taken"))
            made.append(Component(component.ids.narrow(dim, start, length), component.dead))
        elif component.dims == {dim}:
            made.append(flow.cut(x, component, dim, start, length))
        else:
            made += flow.atoms.rigid([component], [dim], flow.reason("unequal parts are taken"))
    return flow.atoms.settle(made)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk")
def _split(flow: Flow, operation: Operation) -> list[Components]:
    x, dim = operation.args[0], argument(operation, "dim", 0) % len(operation.args[0].shape)
    made: list[Components] = []
    start, equal = 0, len({ref.shape[dim] for ref in operation.results}) == 1
    for ref in operation.results:
        made.append(piece(flow, x, dim, start, ref.shape[dim], equal))
        start += ref.shape[dim]
    return made


@rule("select", "unbind")
def _selected(flow: Flow, operation: Operation) -> list[Components]:
    x = operation.args[0]
    dim = argument(operation, "dim", 0) % len(x.shape)
    made = [Component(ids.squeeze(dim), dead) for ids, dead in flow.rigid(x, [dim], "one entry is taken")]
    return [made for _ in operation.results]


@rule("cat", "stack")
def _concatenated(flow: Flow, operation: Operation) -> list[Components]:
    refs = [ref for ref in operation.args[0] if 0 not in ref.shape]
    (result,) = operation.results
    dim = argument(operation, "dim", 0) % len(result.shape)
    operands, shapes = [flow.of(ref) for ref in refs], [list(ref.shape) for ref in refs]
    if operation.name == "stack":
        operands = [[Component(ids.unsqueeze(dim), dead) for ids, dead in operand] for operand in operands]
        shapes = [[*shape[:dim], 1, *shape[dim:]] for shape in shapes]
    reason = flow.reason("they lie beside entries that are not channels")
    # What differs along this dimension and another one goes by the other one.
    operands = [
        [kept for c in operand for kept in ([c] if c.dims == {dim} else flow.atoms.rigid([c], [dim], reason))]
        for operand in operands
    ]
    across = [[c for c in operand if c.dims != {dim}] for operand in operands]
    met = flow.atoms.meet(across, [[1 if d == dim else n for d, n in enumerate(shape)] for shape in shapes], reason)
    made = [
        Component(flow.merged(refs, group), _one([c.dead for c in group.values()])) for group in grouped_by_dims(met)
    ]
    along = [next((c for c in operand if c.dims == {dim}), None) for operand in operands]
    if any([c is not None for c in along]):
        flat = [1] * len(result.shape)
        pieces = []
        for c, shape in zip(along, shapes, strict=True):
            flat[dim] = shape[dim]
            pieces.append(torch.zeros(flat, dtype=torch.int64) if c is None else c.ids)
        made.append(Component(torch.cat(pieces, dim), _one([c.dead for c in along if c is not None])))
    return [made]


def _one(numbers: Sequence[float]) -> float:
    """A number, if all are the same."""
    return numbers[0] if all([x == numbers[0] for x in numbers]) else UNKNOWN


@rule("constant_pad_nd")
def _padded(flow: Flow, operation: Operation) -> list[Components]:
    x, pads = operation.args[:2]
    value = float(argument(operation, "value", 0) or 0)
    widths = {len(x.shape) - 1 - i: (pads[2 * i], pads[2 * i + 1]) for i in range(len(pads) // 2)}
    widths = {dim: width for dim, width in widths.items() if width != (0, 0)}
    made: Components = []
    for component in flow.of(x):
        inside = component.dims & set(widths)
        dead = component.dead if component.dead == value else UNKNOWN
        if not inside:
            made.append(Component(component.ids, dead))
        elif component.dims == inside and len(inside) == 1 and min(widths[next(iter(inside))]) >= 0:
            (dim,) = inside
            before, after = (
                torch.zeros_like(component.ids.narrow(dim, 0, 1)).expand(
                    [n if d == dim else -1 for d in range(component.ids.ndim)]
                )
                for n in widths[dim]
            )
            made.append(Component(torch.cat([before, component.ids, after], dim), component.dead))
        else:
            kept = flow.atoms.rigid([component], inside, flow.reason("they are padded"))
            made += [Component(ids, dead) for ids, _ in kept]
    return [made]


#: What moves entries along some dimensions, and what computes 0 of zeros along them.
_MOVES = ("index_select", "flip", "roll", "rot90")
_OF_ZEROS = ("cumsum", "cumprod", "cummax", "cummin", "sort", "topk")


@rule(*_MOVES, *_OF_ZEROS, "logcumsumexp")
def _ordered(flow: Flow, operation: Operation) -> list[Components]:
    x, name = operation.args[0], operation.name.removesuffix("_")
    where: Any = argument(operation, "dim", argument(operation, "dims", -1))
    dims: list[int] = [where] if isinstance(where, int) else list(where or range(len(x.shape)))
    kept = flow.rigid(x, dims, "their order is written in the code")
    if name not in _MOVES:
        kept = [Component(ids, 0.0 if dead == 0 and name in _OF_ZEROS else UNKNOWN) for ids, dead in kept]
    flow.close_index([operation.args[1:], operation.kwargs])
    return [kept, [Component(ids, UNKNOWN) for ids, _ in kept]]


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def _transformed(flow: Flow, operation: Operation) -> list[Components]:
    kept = flow.rigid(operation.args[0], operation.args[1], "a transform along channels is not followed")
    return [[Component(ids, 0.0 if dead == 0 else UNKNOWN) for ids, dead in kept]]


@rule("view_as_complex", "view_as_real")
def _complex(flow: Flow, operation: Operation) -> list[Components]:
    if operation.name == "view_as_real":
        return [[Component(ids.unsqueeze(-1), dead) for ids, dead in flow.of(operation.args[0])]]
    kept = flow.rigid(operation.args[0], [-1], "they are parts of complex numbers")
    return [[Component(ids.squeeze(-1), dead) for ids, dead in kept]]


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def _shuffled(flow: Flow, operation: Operation) -> list[Components]:
    x, factor = operation.args[:2]
    dim = len(x.shape) - (1 if "channel" in operation.name else 3)
    dim = 1 if "channel" in operation.name else dim
    others = [d for d in range(len(x.shape)) if d != dim]
    made: Components = []
    for ids, dead in flow.rigid(x, others, "entries are moved between dimensions"):
        front = ids.movedim(dim, 0)
        if operation.name == "pixel_unshuffle":
            front = front.repeat_interleave(factor * factor, 0)
        elif operation.name == "pixel_shuffle":
            blocks = front.reshape(-1, factor * factor)
            flow.atoms.join(blocks, blocks[:, :1], flow.reason("they are pixels of a channel"))
            front = blocks[:, 0].reshape([-1, *front.shape[1:]])
        else:
            blocks = front.reshape(factor, -1)
            flow.atoms.join(blocks, blocks[:1], flow.reason("they are shuffled"))
            front = blocks.T.reshape(front.shape)
        made.append(Component(front.movedim(0, dim), dead))
    return [flow.atoms.settle(made)]
