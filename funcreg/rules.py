"""How channels go through each ATen operation: a table from names of operations to rules.

A rule gets the operation and the atoms of its arguments, and gives the atoms of its results. Whatever it gives no
atoms to it has closed: an operation without a rule closes all that reach it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from funcreg.atoms import UNKNOWN, Atoms, Component, grouped_by_dims, regrouped
from funcreg.tracing import Operation, Recording, Ref, refs_in

Components = list[Component]
Rule = Callable[["Flow", Operation], Sequence[Components]]
R = TypeVar("R", bound=Rule)
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[R], R]:
    """Let a function be the rule of these operations."""

    def register(function: R) -> R:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Flow:
    """The atoms of all tensors of a recording, found one operation after the other."""

    def __init__(self, recording: Recording) -> None:
        self.atoms = Atoms()
        self.known: dict[Ref, Components] = {}
        self.weights: set[Ref] = set()  # Parameters, buffers, and what is computed from them alone.
        self.starts: dict[str, list[tuple[int, int, int]]] = {}  # By leaf: dimension, first atom, number of atoms.
        self.used: set[Ref] = set()
        self.operation: Operation | None = None
        self.demands: list[tuple[Tensor, str]] = []  # Atoms that go only if the weights that read them are penalized.
        self.summed: list[Tensor] = []  # Atoms that the operation has taken as the terms of a sum.
        self._several: list[tuple[Tensor, str]] = []  # Atoms that differ along more than one dimension.
        self._shapes: dict[tuple[Any, ...], set[Ref]] = {}  # Tensors with atoms by their storage.
        for name, ref in recording.parameters.items():
            self._enter(name, ref, 0.0)
        for name, ref in recording.buffers.items():
            if ref.dtype.is_floating_point or ref.dtype.is_complex:
                self._enter(name, ref, UNKNOWN)
            self.weights.add(ref)
        for operation in recording.operations:
            self._follow(operation)
        self.operation = None
        for ref in recording.outputs:
            self.used.add(ref)
            self.atoms.close_all(self.of(ref), "they are an output of the network")
        for name, ref in recording.parameters.items():
            if ref not in self.used:
                for _, first, count in self.starts[name]:
                    self.atoms.close(torch.arange(first, first + count), "the forward pass did not use them")
        self._straighten()

    def _enter(self, name: str, ref: Ref, dead: float) -> None:
        self.weights.add(ref)
        components: Components = []
        self.starts[name] = []
        if ref in self.known:  # A tensor under two names.
            return
        for dim, size in enumerate(ref.shape):
            if size > 1:
                ids = self.atoms.new(size)
                self.starts[name].append((dim, int(ids[0]), size))
                shape = [size if d == dim else 1 for d in range(len(ref.shape))]
                components.append(Component(ids.reshape(shape), dead))
        self._note(ref, components)

    def of(self, value: Any) -> Components:
        """The atoms of an argument."""
        return self.atoms.settle(self.known.get(value, ())) if isinstance(value, Ref) else []

    def reason(self, what: str) -> str:
        """Why atoms are closed by the operation that is followed."""
        operation = self.operation
        assert operation is not None
        names = [f"'{operation.module}'"] if operation.module else []
        return f"{what} ({', '.join([operation.name.strip('_'), *names])})"

    def _follow(self, operation: Operation) -> None:
        self.operation = operation
        given = [ref for value in (operation.args, operation.kwargs) for ref in refs_in(value)]
        self.used.update(given)
        self.summed = []
        before = [c.ids.reshape(-1) for ref in given for c in self.of(ref)]
        found = _rule_of(operation)(self, operation)
        self._close_dropped(before, [c.ids for components in found for c in components])
        if given and all([ref in self.weights for ref in given]):
            self.weights.update(operation.results)
        for i, ref in enumerate(operation.results):
            components = list(found[i]) if i < len(found) else []
            if ref in operation.written or any([ref.storage == into.storage for into in operation.written]):
                self._overwrite(ref, components)
            self._note(ref, components)

    def _close_dropped(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Close what has reached an operation, did not come out of it, and did not end in a sum."""
        if before:
            seen = [
                self.atoms.find(ids.reshape(-1)) for ids in (*after, *self.summed, torch.zeros(1, dtype=torch.int64))
            ]
            given = self.atoms.find(torch.cat(list(before)))
            dropped = given[~torch.isin(given, torch.cat(seen))]
            if len(dropped):
                self.atoms.close(dropped.unique(), self.reason("they do not come out of an operation"))

    def _note(self, ref: Ref, components: Components) -> None:
        self.known[ref] = components
        self._shapes.setdefault(ref.storage, set()).add(ref)
        where = self.operation
        for component in components:
            if len(component.dims) > 1:
                name = "" if where is None else self.reason("they are counted together")
                self._several.append((component.ids, name))

    def _overwrite(self, ref: Ref, components: Components) -> None:
        """Views of what an operation has written into hold other numbers now."""
        before = {c.dead for c in self.known.get(ref, ())}
        if before == {c.dead for c in components} and not any([math.isnan(dead) for dead in before]):
            return
        for other in self._shapes.get(ref.storage, ()):
            if other != ref:
                self.known[other] = [Component(ids, UNKNOWN) for ids, _ in self.known[other]]

    def _straighten(self) -> None:
        """Join atoms until those of each tensor go by whole slices, of its last dimension where nothing else says."""
        changed = True
        while changed:
            changed = False
            for ids, reason in self._several:
                for component in self.atoms.settle([Component(ids, 0.0)]):
                    dims = sorted(component.dims)
                    if len(dims) > 1:
                        self.atoms.rigid([component], dims[:-1], reason)
                        changed = True


def _rule_of(operation: Operation) -> Rule:
    name = operation.name
    known = RULES.get(name) or RULES.get(name.removesuffix("_")) or RULES.get(name.removesuffix("_copy"))
    if known is not None:
        return known
    if name.startswith("_scaled_dot_product"):
        return _attention
    if re.search(r"pool\dd|upsample_|(reflection|replication)_pad\dd", name):
        return _by_pixel
    return _pointwise if torch.Tag.pointwise in operation.function.tags else _unknown


def _unknown(flow: Flow, operation: Operation) -> list[Components]:
    for ref in refs_in([operation.args, operation.kwargs]):
        flow.atoms.close_all(flow.of(ref), flow.reason("an operation that is not followed"))
    return []


def _argument(operation: Operation, name: str, default: Any = None) -> Any:
    """An argument of an operation by its name, wherever it stands."""
    for i, argument in enumerate(operation.function._schema.arguments):
        if argument.name == name:
            if i < len(operation.args):
                return operation.args[i]
            if name in operation.kwargs:
                return operation.kwargs[name]
            return default if argument.default_value is None else argument.default_value
    return default


# Entry by entry

_ENTRYWISE = ("hardswish", "_prelu_kernel", "prelu", "log_sigmoid_forward", "rsub", "masked_fill", "special_erf")
_SAMPLES = ((0.7, -1.3, 2.9), (1.9, 0.4, -0.6), (-0.8, 2.2, 0.3))


@rule(*_ENTRYWISE)
def _pointwise(flow: Flow, operation: Operation) -> list[Components]:
    refs = refs_in([operation.args, operation.kwargs])
    reason = flow.reason("they meet entries that are not channels")
    met = flow.atoms.meet([flow.of(ref) for ref in refs], [ref.shape for ref in refs], reason)
    _write(flow, refs, met)
    made: Components = []
    for group in grouped_by_dims(met):
        dead = _value(operation, [group[i].dead if i in group else UNKNOWN for i in range(len(refs))])
        made.append(Component(next(iter(group.values())).ids, dead))
    return [made, [Component(ids, UNKNOWN) for ids, _ in made]]


def _write(flow: Flow, refs: Sequence[Any], components: Sequence[Components]) -> None:
    for ref, operand in zip(refs, components, strict=True):
        if ref in flow.weights:
            for component in operand:
                flow.atoms.write(component.ids)


def _value(operation: Operation, dead: list[float]) -> float:
    """What an operation makes of entries some of which are known, if it is the same whatever the others are."""
    found = set()
    for sample in _SAMPLES:
        entries = iter([sample[i % 3] if math.isnan(x) else x for i, x in enumerate(dead)])
        args, kwargs = _filled(operation.args, entries), _filled(operation.kwargs, entries)
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        made = operation.function(*args, **kwargs)
        found.add(float(made[0] if isinstance(made, (tuple, list)) else made))
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


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "zero", "fill", "bernoulli")
def _like(flow: Flow, operation: Operation) -> list[Components]:
    dead = {"zeros_like": 0.0, "zero": 0.0, "ones_like": 1.0}.get(operation.name.removesuffix("_"), UNKNOWN)
    return [[Component(ids, dead) for ids, _ in flow.of(operation.args[0])]]


@rule("copy")
def _copy(flow: Flow, operation: Operation) -> list[Components]:
    refs = list(operation.args[:2])
    reason = flow.reason("they are written into a tensor of another width")
    met = flow.atoms.meet([flow.of(ref) for ref in refs], [ref.shape for ref in refs], reason)
    return [met[1] or [Component(ids, UNKNOWN) for ids, _ in met[0]]]


@rule("glu")
def _glu(flow: Flow, operation: Operation) -> list[Components]:
    x = operation.args[0]
    dim = _argument(operation, "dim", -1) % len(x.shape)
    half = x.shape[dim] // 2
    components = _piece(flow, flow.of(x), dim, 0, half, x.shape[dim])
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
    return [made]


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def _viewed(flow: Flow, operation: Operation) -> list[Components]:
    x, (made,) = operation.args[0], operation.results
    if isinstance(operation.args[1], torch.dtype):
        return _unknown(flow, operation)
    return [flow.atoms.settle(_regroup(flow, flow.of(x), x.shape, made.shape))]


def _regroup(flow: Flow, components: Components, old: Sequence[int], new: Sequence[int]) -> Components:
    made = flow.atoms.settle([Component(regrouped(ids, old, new), dead) for ids, dead in components])
    # Entries that go by two dimensions at once do not go by one.
    for i, component in enumerate(made):
        if any([component.dims & other.dims for other in made[:i]]):
            flow.atoms.close(component.ids, flow.reason("they share a dimension with others"))
    return [c for i, c in enumerate(made) if not any([c.dims & other.dims for other in made[:i]])]


@rule("repeat")
def _repeated(flow: Flow, operation: Operation) -> list[Components]:
    x, times = operation.args[:2]
    made: Components = []
    for ids, dead in flow.of(x):
        front = ids.reshape([1] * (len(times) - ids.ndim) + list(ids.shape))
        made.append(
            Component(front.repeat([n if size > 1 else 1 for n, size in zip(times, front.shape, strict=True)]), dead)
        )
    return [made]


@rule("slice")
def _sliced(flow: Flow, operation: Operation) -> list[Components]:
    x, (made,) = operation.args[0], operation.results
    dim = _argument(operation, "dim", 0) % len(x.shape)
    start = _argument(operation, "start") or 0
    start = max(0, start + x.shape[dim]) if start < 0 else start
    if (_argument(operation, "step", 1) or 1) != 1:
        return [_rigid(flow, x, [dim], "every few entries are taken")]
    return [_piece(flow, flow.of(x), dim, start, made.shape[dim], x.shape[dim])]


def _piece(flow: Flow, components: Components, dim: int, start: int, length: int, size: int) -> Components:
    """The atoms of a part of a tensor: where it is one of equal parts, what goes goes from each of them."""
    made: Components = []
    for component in components:
        if dim not in component.dims or length == size:
            made.append(component)
        elif length > 1 and size % length == 0 and start % length == 0:
            first = component.ids.narrow(dim, 0, length)
            for other in range(length, size, length):
                flow.atoms.join(first, component.ids.narrow(dim, other, length), flow.reason("parts are taken"))
            made.append(Component(component.ids.narrow(dim, start, length), component.dead))
        else:
            made += flow.atoms.rigid([component], [dim], flow.reason("unequal parts are taken"))
    return flow.atoms.settle(made)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk")
def _split(flow: Flow, operation: Operation) -> list[Components]:
    x, dim = operation.args[0], _argument(operation, "dim", 0) % len(operation.args[0].shape)
    made: list[Components] = []
    start = 0
    sizes = [ref.shape[dim] for ref in operation.results]
    for length in sizes:
        equal = len(set(sizes)) == 1
        whole = flow.of(x) if equal else _rigid(flow, x, [dim], "unequal parts are taken")
        made.append(_piece(flow, whole, dim, start, length, x.shape[dim]))
        start += length
    return made


@rule("select", "unbind")
def _selected(flow: Flow, operation: Operation) -> list[Components]:
    x = operation.args[0]
    dim = _argument(operation, "dim", 0) % len(x.shape)
    made = [Component(ids.squeeze(dim), dead) for ids, dead in _rigid(flow, x, [dim], "one entry is taken")]
    return [made for _ in operation.results]


def _rigid(flow: Flow, x: Ref, dims: Sequence[int], what: str) -> Components:
    return flow.atoms.rigid(flow.of(x), [dim % len(x.shape) for dim in dims], flow.reason(what))


@rule("cat", "stack")
def _concatenated(flow: Flow, operation: Operation) -> list[Components]:
    refs = [ref for ref in operation.args[0] if 0 not in ref.shape]
    (result,) = operation.results
    dim = _argument(operation, "dim", 0) % len(result.shape)
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
        Component(next(iter(group.values())).ids, _one([c.dead for c in group.values()]))
        for group in grouped_by_dims(met)
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
    value = float(_argument(operation, "value", 0) or 0)
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


@rule("index_select", "flip", "roll", "gather", "cumsum", "cumprod", "sort", "topk")
def _ordered(flow: Flow, operation: Operation) -> list[Components]:
    x = operation.args[0]
    where: Any = _argument(operation, "dim", _argument(operation, "dims", -1))
    dims: list[int] = [where] if isinstance(where, int) else list(where or range(len(x.shape)))
    kept = _rigid(flow, x, dims, "their order is written in the code")
    dead = kept if operation.name in ("index_select", "flip", "roll") else [Component(c.ids, UNKNOWN) for c in kept]
    for ref in refs_in([operation.args[1:], operation.kwargs]):
        flow.atoms.close_all(flow.of(ref), flow.reason("they are used as an index"))
    return [dead for _ in operation.results]


@rule("index")
def _indexed(flow: Flow, operation: Operation) -> list[Components]:
    x, indices = operation.args[:2]
    taken = [dim for dim, each in enumerate(indices) if each is not None]
    for ref in refs_in(indices):
        flow.atoms.close_all(flow.of(ref), flow.reason("they are used as an index"))
    kept = _rigid(flow, x, taken, "they are looked up by an index")
    (result,) = operation.results
    first = taken[0] if taken == list(range(taken[0], taken[-1] + 1)) else 0
    new = len(result.shape) - (len(x.shape) - len(taken))
    made = []
    for ids, dead in kept:
        sizes = [n for dim, n in enumerate(ids.shape) if dim not in taken]
        made.append(Component(ids.reshape([*sizes[:first], *[1] * new, *sizes[first:]]), dead))
    return [made]


@rule("view_as_complex", "view_as_real")
def _complex(flow: Flow, operation: Operation) -> list[Components]:
    if operation.name == "view_as_real":
        return [[Component(ids.unsqueeze(-1), dead) for ids, dead in flow.of(operation.args[0])]]
    kept = _rigid(flow, operation.args[0], [-1], "they are parts of complex numbers")
    return [[Component(ids.squeeze(-1), dead) for ids, dead in kept]]


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def _shuffled(flow: Flow, operation: Operation) -> list[Components]:
    x, factor = operation.args[:2]
    dim = len(x.shape) - (1 if "channel" in operation.name else 3)
    dim = 1 if "channel" in operation.name else dim
    others = [d for d in range(len(x.shape)) if d != dim]
    made: Components = []
    for ids, dead in _rigid(flow, x, others, "entries are moved between dimensions"):
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


# Reductions


_REDUCTIONS = "sum mean amax amin max min var std var_mean linalg_vector_norm norm logsumexp prod any all argmax argmin"


@rule(*_REDUCTIONS.split())
def _reduced(flow: Flow, operation: Operation) -> list[Components]:
    x, name = operation.args[0], operation.name
    if name in ("max", "min") and len(refs_in(operation.args)) > 1:
        return _pointwise(flow, operation)
    where = _argument(operation, "dim")
    dims = range(len(x.shape)) if where is None or where == [] else [where] if isinstance(where, int) else where
    dims = {dim % len(x.shape) for dim in dims}
    made: Components = []
    for component in flow.of(x):
        # Averages that nobody asks for, such as those of attention, may be others. No sum may: code that divides by
        # the number of channels takes it from the shape.
        if component.dims <= dims and not operation.needed:
            flow.summed.append(component.ids)
            continue
        made += flow.atoms.rigid([component], dims, flow.reason("they are reduced over channels"))
    if not _argument(operation, "keepdim", False):
        kept = [dim for dim in range(len(x.shape)) if dim not in dims]
        made = [Component(ids.reshape([ids.shape[dim] for dim in kept]), dead) for ids, dead in made]
    zero = 0.0 if name in ("sum", "mean", "amax", "amin", "max", "min", "norm", "linalg_vector_norm") else UNKNOWN
    same = name in ("mean", "amax", "amin", "max", "min")
    first = [Component(ids, zero if dead == 0 else dead if same else UNKNOWN) for ids, dead in made]
    return [first, *[[Component(ids, UNKNOWN) for ids, _ in made] for _ in operation.results[1:]]]


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def _softmax(flow: Flow, operation: Operation) -> list[Components]:
    kept = _rigid(flow, operation.args[0], [_argument(operation, "dim", -1)], "a softmax over channels")
    return [[Component(ids, UNKNOWN) for ids, _ in kept]]


def _by_pixel(flow: Flow, operation: Operation) -> list[Components]:
    """Pooling, upsampling and padding of each channel by itself."""
    x = operation.args[0]
    pixels = int(re.findall(r"(\d)d", operation.name)[0])
    kept = _rigid(flow, x, range(len(x.shape) - pixels, len(x.shape)), "they are pixels")
    same = not operation.name.startswith("avg_pool")
    made = [Component(ids, dead if same or dead == 0 else UNKNOWN) for ids, dead in kept]
    return [made, [Component(ids, UNKNOWN) for ids, _ in kept]]


# Products


def _contract(
    flow: Flow, a: Components, b: Components, shapes: Sequence[Sequence[int]], read: int | None
) -> Components:
    """The atoms of a product of matrices of these shapes; `read` says which of them is a weight."""
    over = max(len(shapes[0]), len(shapes[1])) - 1  # The dimension of the sum, once each has one for the other's.
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
        flow.atoms.close(ids, flow.reason("a product of two tensors of channels, whose scale may go by their number"))
        return
    if read in group:
        flow.atoms.read(group[read].ids)
    dead = next((c.dead for i, c in group.items() if i != read), UNKNOWN)
    if dead != 0 and read in group:  # Whatever it is then, the weights that read it have to be zero.
        flow.demands.append((ids.reshape(-1), flow.reason(_not_zero(dead))))
    elif dead != 0:
        flow.atoms.close(ids, flow.reason(_not_zero(dead)))


def _not_zero(dead: float) -> str:
    number = "another number" if math.isnan(dead) else f"{dead:g}"
    return f"they are read, and a dead one would be {number}, not 0"


@rule("mm", "bmm", "matmul", "mv")
def _product(flow: Flow, operation: Operation) -> list[Components]:
    return [_multiplied(flow, *operation.args[:2])]


def _multiplied(flow: Flow, a: Ref, b: Ref) -> Components:
    read = 1 if b in flow.weights and a not in flow.weights else 0 if a in flow.weights else None
    x, y, shapes = flow.of(a), flow.of(b), [list(a.shape), list(b.shape)]
    vector = len(shapes[1]) == 1
    if vector:
        y, shapes[1] = [Component(ids.unsqueeze(-1), dead) for ids, dead in y], [*shapes[1], 1]
    made = _contract(flow, x, y, shapes, read)
    return [Component(ids.squeeze(-1), dead) for ids, dead in made] if vector else made


@rule("addmm", "baddbmm", "addmv", "addbmm")
def _added_product(flow: Flow, operation: Operation) -> list[Components]:
    bias, a, b = operation.args[:3]
    return [_added(flow, _multiplied(flow, a, b), operation.results[0].shape, bias)]


@rule("linear")
def _linear(flow: Flow, operation: Operation) -> list[Components]:
    x, weight = operation.args[:2]
    bias = _argument(operation, "bias")
    turned = [Component(ids.T, dead) for ids, dead in flow.of(weight)]
    read = 1 if weight in flow.weights else None
    made = _contract(flow, flow.of(x), turned, [x.shape, weight.shape[::-1]], read)
    return [made if bias is None else _added(flow, made, operation.results[0].shape, bias)]


def _added(flow: Flow, made: Components, shape: Sequence[int], bias: Ref) -> Components:
    met = flow.atoms.meet([made, flow.of(bias)], [shape, bias.shape], flow.reason("they meet entries of no channel"))
    _write(flow, [None, bias], met)
    return [
        Component(
            next(iter(group.values())).ids, 0.0 if all([i in group and group[i].dead == 0 for i in (0, 1)]) else UNKNOWN
        )
        for group in grouped_by_dims(met)
    ]


def _attention(flow: Flow, operation: Operation) -> list[Components]:
    """Heads go whole: a feature less of queries and keys would change the scale of their products."""
    query, key, value = operation.args[:3]
    mask = _argument(operation, "attn_mask") or _argument(operation, "attn_bias")
    heads = query.shape[-3] if len(query.shape) > 3 else 1
    operands, shapes = [], []
    for ref in (query, key, value, *([] if mask is None else [mask])):
        kept = _rigid(flow, ref, [-1, -2], "features of an attention head, which goes whole")
        operands.append([_for_queries(component, heads) for component in kept])
        have = ref.shape[-3] if len(ref.shape) > 2 else 1
        shapes.append([*ref.shape[:-3], 1 if have == 1 else heads, 1, 1])
    met = flow.atoms.meet(operands, shapes, flow.reason("they meet heads that are kept"))
    return [
        [
            Component(next(iter(group.values())).ids, 0.0 if 2 in group and group[2].dead == 0 else UNKNOWN)
            for group in grouped_by_dims(met)
        ]
    ]


def _for_queries(component: Component, heads: int) -> Component:
    """Heads of keys and values, each as often as it has queries."""
    have = component.ids.shape[-3]
    return (
        component
        if have in (1, heads)
        else Component(component.ids.repeat_interleave(heads // have, -3), component.dead)
    )


# Layers


@rule("embedding")
def _embedding(flow: Flow, operation: Operation) -> list[Components]:
    weight, index = operation.args[:2]
    kept = _rigid(flow, weight, [0], "they are looked up by an index")
    _write(flow, [weight], [kept])
    return [[Component(ids.reshape([*[1] * len(index.shape), -1]), dead) for ids, dead in kept]]


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution")
def _convolution(flow: Flow, operation: Operation) -> list[Components]:
    x, weight = operation.args[:2]
    bias, groups = _argument(operation, "bias"), _argument(operation, "groups", 1)
    transposed = bool(_argument(operation, "transposed", False))
    pixels = range(2, len(x.shape))
    channels = _rigid(flow, x, [0, *pixels], "they are pixels")
    kernel = _rigid(flow, weight, pixels, "they are the pixels of a kernel")
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
    _write(flow, [None, bias], met)
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
    """The channels that go into a group of a convolution, and those that come out of it, go together."""
    inside, rows = (given, taken) if transposed else (taken, given)
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


_BATCH_NORMS = (
    "batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm _batch_norm_with_update _batch_norm_no_update"
)


@rule(*_BATCH_NORMS.split())
def _batch_norm(flow: Flow, operation: Operation) -> list[Components]:
    x = operation.args[0]
    vectors = [_argument(operation, name) for name in ("weight", "bias", "running_mean", "running_var")]
    if isinstance(vectors[2], Ref) and not _argument(operation, "training", False):
        return [_scaled(flow, x, vectors, lambda x, w, b, m, v: (x - m) * w * v + b)]
    # By the mean and variance of the entries themselves, so that none of them may be missing.
    _rigid(flow, x, [dim for dim in range(len(x.shape)) if dim != 1], "normalized over them")
    return [_scaled(flow, x, vectors, lambda x, w, b, m, v: x * w * v + b)]


@rule("native_group_norm", "group_norm")
def _group_norm(flow: Flow, operation: Operation) -> list[Components]:
    x = operation.args[0]
    groups = _argument(operation, "group", _argument(operation, "num_groups"))
    reason = flow.reason("normalized with entries that are not channels")
    for ids, _ in _rigid(flow, x, [0, *range(2, len(x.shape))], "they are pixels"):
        blocks = ids.reshape(groups, -1)
        flow.atoms.join(blocks, blocks[:, :1], reason)
    vectors = [_argument(operation, "weight"), _argument(operation, "bias"), None, None]
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
    _write(flow, vectors, met[1:])
    made: Components = []
    for group in grouped_by_dims(met):
        values = set()
        for sample in _SAMPLES:
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
    x, shape = operation.args[:2]
    weight, bias = _argument(operation, "weight"), _argument(operation, "bias")
    kept = _rigid(flow, x, range(len(x.shape) - len(shape), len(x.shape)), "normalized over channels")
    for ref in (weight, bias):
        flow.atoms.close_all(flow.of(ref), flow.reason("normalized over channels"))
    return [[Component(ids, 0.0 if dead == 0 and bias is None else UNKNOWN) for ids, dead in kept]]
