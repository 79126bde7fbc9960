"""A computation on trees, recorded as a list of tensor operations without computing anything.

The recorder runs a function on stand-ins that have a shape, a dtype and a device but no memory, and writes down each
operation that they meet. What the function does in Python (trees, masks, labels, numbers) happens once, while it is
recorded; what it does to tensors is in the record.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

#: What changes no value. The record keeps no track of memory: nothing in it is written to.
_SAME = {
    _aten.alias.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.detach.default,
    _aten.lift_fresh.default,
    _aten.lift_fresh_copy.default,
}


_VIEWS = {_aten.view.default, _aten._unsafe_view.default}
#: Types of leaves that are memory and nothing else.
_PLAIN = (Tensor, torch.nn.Parameter)


class CannotRecordError(Exception):
    """The function reads a number from a tensor, writes in place or draws random numbers, or leaves are no memory."""


class Value:
    """A tensor of a record: an input, or what an operation makes."""

    __slots__ = ("device", "dtype", "held", "node", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.node: Node | None = None
        self.held = False  # Whether it is a tensor that the function holds.

    @property
    def alias(self) -> bool:
        """Whether its memory is that of an input, or of a value that another value may share."""
        return self.node is None or any([out.alias_info is not None for out in self.node.op._schema.returns])


class Node:
    """An operation: among its arguments are values, also inside lists."""

    __slots__ = ("args", "inputs", "kwargs", "op", "outputs", "several")

    def __init__(
        self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Value], several: bool
    ) -> None:
        self.op, self.args, self.kwargs, self.outputs, self.several = op, args, kwargs, outputs, several
        self.inputs: list[Value] = []  # The values among the arguments, in their order.
        _values((*args, *kwargs.values()), self.inputs)
        for value in outputs:
            value.node = self

    def run(self, values: dict[Value, Any]) -> None:
        """Compute with what stands for the values."""
        args = [replaced(arg, values.__getitem__) for arg in self.args]
        out = self.op(*args, **{name: replaced(arg, values.__getitem__) for name, arg in self.kwargs.items()})
        values.update(zip(self.outputs, out if self.several else [out], strict=True))


def _values(args: Iterable[Any], found: list[Value]) -> None:
    for arg in args:
        if isinstance(arg, Value):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            _values(arg, found)


def replaced(arg: Any, f: Callable[[Value], Any]) -> Any:
    """An argument with `f` of the values in it."""
    if isinstance(arg, Value):
        return f(arg)
    return [replaced(x, f) for x in arg] if isinstance(arg, (list, tuple)) else arg


class Record:
    """Operations in their order, from inputs to outputs."""

    def __init__(self) -> None:
        self.inputs: list[Value] = []
        self.captured: list[tuple[Value, Tensor]] = []  # Tensors that the function holds, such as a learning rate.
        self.nodes: list[Node] = []
        self.outputs: list[Value] = []

    def forget(self) -> None:
        """Let go of the operations: the garbage collector would look at all of them again and again."""
        for node in self.nodes:
            for value in node.outputs:
                value.node = None
        self.nodes.clear()


class _StandIn(Tensor):
    """A tensor without memory, for a value."""

    value: Value

    @staticmethod
    def __new__(cls, value: Value) -> _StandIn:
        self = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)
        self.value = value
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise CannotRecordError(f"{func} outside of the record")


def _hashable(arg: Any) -> Any:
    """An argument by which the same operation is known again; 1, 1.0 and True are not the same."""
    if isinstance(arg, Value):
        return arg
    return tuple([_hashable(each) for each in arg]) if isinstance(arg, (list, tuple)) else constant(arg)


def constant(arg: Any) -> tuple[Any, ...]:
    """A constant by which it is known again: 1, 1.0 and True are not the same, nor are 0.0 and -0.0."""
    return (type(arg), arg, str(arg)) if type(arg) is float and arg == 0 else (type(arg), arg)


class _Constant:
    def __init__(self, value: Any) -> None:
        self.value = value


class _Recorder(TorchDispatchMode):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record
        self._captured: dict[int, _StandIn] = {}
        self._done: dict[Any, Any] = {}  # From an operation and its arguments to what came out.
        self._known: dict[Any, Any] = {}  # From an operation and what its arguments are like to what comes out.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SAME:
            return _StandIn(self.seen(args[0]).value)
        if func._schema.is_mutable:
            raise CannotRecordError(f"{func} writes in place")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CannotRecordError(f"{func} draws random numbers")
        key: list[Any] = [func]
        recorded = tuple([self._argument(arg, key) for arg in args])
        named = {name: self._argument(arg, key) for name, arg in kwargs.items()}
        if func is _aten.expand.default and recorded[0].shape == tuple(recorded[1]):
            return _StandIn(recorded[0])
        same = (func, *map(_hashable, recorded), *kwargs, *map(_hashable, named.values()))
        made = self._done.get(same)  # What each leaf computes of shared scalars is computed once.
        if made is None:
            made = self._done[same] = self._made(func, recorded, named, (*key, *kwargs))
        if isinstance(made, _Constant):
            return made.value
        return [_StandIn(value) for value in made] if isinstance(made, list) else _StandIn(made)

    def _made(self, func: Any, recorded: tuple[Any, ...], named: dict[str, Any], described: Any) -> Any:
        """Write an operation down; the value that it makes, or several, or what is no tensor."""
        out = self._known.get(described)
        if out is None:
            out = self._known[described] = self._described(func, recorded, named)
        if isinstance(out, _Constant):
            return out
        several = isinstance(out, list)
        values = [Value(*each) for each in out] if isinstance(out, list) else [Value(*out)]
        self._record.nodes.append(Node(func, recorded, named, values, several))
        return values if several else values[0]

    def _argument(self, arg: Any, key: list[Any]) -> Any:
        """An argument as it is recorded; what it is like goes into the key."""
        if isinstance(arg, Tensor):
            value = self.seen(arg).value
            key.append((value.shape, value.dtype, value.device))
            return value
        if isinstance(arg, (list, tuple)):
            key.append(len(arg))
            return [self._argument(each, key) for each in arg]
        key.append((type(arg), arg))
        return arg

    def seen(self, x: Tensor) -> _StandIn:
        """A stand-in, or the one for a tensor that comes from outside."""
        if isinstance(x, _StandIn):
            return x
        if id(x) not in self._captured:
            stand_in = self._captured[id(x)] = _StandIn(Value(tuple(x.shape), x.dtype, x.device))
            stand_in.value.held = True
            self._record.captured.append((stand_in.value, x))
        return self._captured[id(x)]

    def _described(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shape, dtype and device of what an operation makes; a list of them for several."""
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

        with FakeTensorMode():
            fake = lambda value: torch.empty(value.shape, dtype=value.dtype, device=value.device)
            out = func(*(replaced(arg, fake) for arg in args), **{k: replaced(arg, fake) for k, arg in kwargs.items()})
        if isinstance(out, FakeTensor):
            return tuple(out.shape), out.dtype, out.device
        if not any([isinstance(arg, (Value, list)) for arg in (*args, *kwargs.values())]):
            return _Constant(out)  # A question about dtypes, not about tensors.
        if isinstance(out, (list, tuple)) and all(isinstance(each, FakeTensor) for each in out):
            return [(tuple(each.shape), each.dtype, each.device) for each in out]
        raise CannotRecordError(f"{func} reads a number from a tensor")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let the garbage collector wait: of what is recorded nothing is garbage, and to look for some takes longest."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def stand_in(like: Any, count: int = 0) -> Tensor:
    """A new input of a record, like a tensor or a value; with a count, a stack of as many."""
    if isinstance(like, Tensor) and (type(like) not in _PLAIN or like.layout is not torch.strided):
        raise CannotRecordError(f"a leaf is a {type(like).__name__} of layout {like.layout}")
    return _StandIn(Value(((count,) if count else ()) + tuple(like.shape), like.dtype, like.device))


def record(function: Callable[..., Sequence[Tensor]], *stand_ins: Any) -> Record:
    """The record of a function of stand-ins that returns a list of tensors.

    Raises:
        CannotRecordError: The function does what only tensors with memory can do.
    """
    found = Record()
    found.inputs = [x.value for x in stand_ins if isinstance(x, _StandIn)]
    recorder = _Recorder(found)
    with torch.no_grad(), recorder:
        results = function(*stand_ins)
        for result in results:
            if not isinstance(result, Tensor):
                raise CannotRecordError(f"a result is {result!r}, which is no tensor")
            found.outputs.append(recorder.seen(result).value)
    _simplify(found)
    _drop_unused(found)
    return found


def _simplify(found: Record) -> None:
    """Replace what compilers are slow with by what has equal values.

    Roots that are made safe at zero for their derivatives become plain ones, for a step has none; `isnan`, which
    Inductor computes entry by entry on a CPU, becomes a comparison. A product with one is its other factor, and
    an update added to what it starts from is where it leads: exactly, and with fewer operations.
    """
    same: dict[Value, Value] = {}
    for node in found.nodes:
        if same:
            args = tuple([replaced(arg, lambda x: same.get(x, x)) for arg in node.args])
            kwargs = {name: replaced(arg, lambda x: same.get(x, x)) for name, arg in node.kwargs.items()}
            Node.__init__(node, node.op, args, kwargs, node.outputs, node.several)
        if node.op is _aten.mul.Tensor and type(node.args[1]) is float and node.args[1] == 1:
            x, made = node.args[0], node.outputs[0]
            if x.dtype == made.dtype and not (made in found.outputs and x.alias):
                same[made] = x
        if (z := _moved_there(node)) is not None:
            same[node.outputs[0]] = z
        if node.op in _VIEWS:  # Stand-ins are contiguous, tensors may be not.
            Node.__init__(node, _aten.reshape.default, node.args, {}, node.outputs, several=False)
        if node.op is _aten.isnan.default:
            Node.__init__(node, _aten.ne.Tensor, (node.args[0], node.args[0]), {}, node.outputs, several=False)
        if node.op is not _aten.where.self:
            continue
        zero, nothing, root = node.args
        if not (_made_by(root, _aten.sqrt.default) and _made_by(nothing, _aten.zeros_like.default)):
            continue
        inner = root.node.args[0]
        if _made_by(inner, _aten.where.self) and _made_by(zero, _aten.eq.Scalar):
            x, of = zero.node.args[0], inner.node.args
            if of[0] is zero and of[2] is x and zero.node.args[1] == 0 and _made_by(of[1], _aten.ones_like.default):
                Node.__init__(node, _aten.sqrt.default, (x,), {}, node.outputs, several=False)
    found.outputs = [same.get(value, value) for value in found.outputs]


def _moved_there(node: Node) -> Value | None:
    """What `x + (z - x)` comes to, an update that is added to what it is the way from."""
    if node.op is not _aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    x, way = node.args
    if not _made_by(way, _aten.sub.Tensor) or way.node.kwargs:
        return None
    z, start = way.node.args
    kinds = {(y.shape, y.dtype) for y in (z, way, node.outputs[0]) if isinstance(y, Value)}
    plain = start is x and isinstance(z, Value) and len(kinds) == 1 and z.node is not None
    return z if plain and not z.alias else None


def _made_by(value: Any, op: Any) -> bool:
    return isinstance(value, Value) and value.node is not None and value.node.op is op


def _drop_unused(found: Record) -> None:
    needed = set(found.outputs)
    nodes: list[Node] = []
    for node in reversed(found.nodes):
        if any([value in needed for value in node.outputs]):
            nodes.append(node)
            needed.update(node.inputs)
    found.nodes = nodes[::-1]
    found.captured = [pair for pair in found.captured if pair[0] in needed]
