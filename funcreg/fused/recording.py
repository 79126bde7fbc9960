"""A computation on trees, recorded as a list of tensor operations without computing anything.

The recorder runs a function on placeholders that have a shape, a dtype and a device but no memory, and writes down each
operation on them. What the function does in Python (trees, masks, labels, numbers) happens once, while it is recorded;
what it does to tensors is in the record.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcreg.core.undocumented import dispatch_mode, never_traced
from funcreg.core.wording import type_of

_aten = torch.ops.aten

#: What changes no value. The record keeps no track of memory: nothing in it is written to.
_IDENTITIES = {
    _aten.alias.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.detach.default,
    _aten.lift_fresh.default,
    _aten.lift_fresh_copy.default,
}
#: What is written down as another operation, with equal values.
_REPLACED = {
    # Placeholders are contiguous, the tensors that come in their place may be not.
    _aten.view.default: lambda args: (_aten.reshape.default, args),
    _aten._unsafe_view.default: lambda args: (_aten.reshape.default, args),
    # Inductor computes `isnan` entry by entry on a CPU.
    _aten.isnan.default: lambda args: (_aten.ne.Tensor, (args[0], args[0])),
}
#: Types of leaves that are memory and nothing else.
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


class CannotRecordError(Exception):
    """The function reads a number from a tensor, writes in place or draws random numbers, or a leaf has no memory."""


class Value:
    """A tensor of a record: an input, or what an operation makes."""

    __slots__ = ("device", "dtype", "node", "role", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.node: Node | None = None
        self.role = ""  # What an input is: "parameter", "gradient", or "captured", such as a learning rate.

    @property
    def may_alias(self) -> bool:
        """Whether its memory is that of an input, or of a value that another value may share."""
        return self.node is None or any([out.alias_info is not None for out in self.node.op._schema.returns])


class Node:
    """An operation: among its arguments are values, also inside lists."""

    __slots__ = ("args", "inputs", "is_tuple", "kwargs", "op", "outputs")

    def __init__(
        self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Value], is_tuple: bool = False
    ) -> None:
        self.op, self.args, self.kwargs, self.outputs, self.is_tuple = op, args, kwargs, outputs, is_tuple
        self.inputs: list[Value] = []  # The values among the arguments, in their order.
        for arg in (*args, *kwargs.values()):
            substituted(arg, self.inputs.append)

    def with_values(self, f: Callable[[Value], Value]) -> Node:
        """The same operation with `f` of the values among its arguments."""
        args = tuple([substituted(arg, f) for arg in self.args])
        kwargs = {name: substituted(arg, f) for name, arg in self.kwargs.items()}
        return Node(self.op, args, kwargs, self.outputs, self.is_tuple)

    def run(self, values: dict[Value, Any], call: Callable[..., Any]) -> None:
        """Apply it by `call(op, args, kwargs)` to what stands for its inputs."""
        args = tuple([substituted(arg, values.__getitem__) for arg in self.args])
        kwargs = {name: substituted(arg, values.__getitem__) for name, arg in self.kwargs.items()}
        out = call(self.op, args, kwargs)
        for i, value in enumerate(self.outputs):
            values[value] = call(operator.getitem, (out, i), {}) if self.is_tuple else out


def substituted(arg: Any, f: Callable[[Value], Any]) -> Any:
    """An argument with `f` of the values in it."""
    if isinstance(arg, Value):
        return f(arg)
    return [substituted(x, f) for x in arg] if isinstance(arg, (list, tuple)) else arg


@dataclass
class Record:
    """Operations in their order, from inputs to outputs."""

    inputs: list[Value]
    captured: list[tuple[Value, Tensor]] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)


class _Placeholder(Tensor):
    """A tensor without memory, for a value."""

    value: Value

    @staticmethod
    def __new__(cls, value: Value) -> _Placeholder:
        self = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)
        self.value = value
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise CannotRecordError(f"{func} outside of the record")


def placeholder(like: Any, count: int = 0) -> Tensor:
    """A new input of a record, like a tensor or a value; with a count, a stack of as many."""
    if isinstance(like, Tensor) and (type(like) not in _PLAIN_TYPES or like.layout is not torch.strided):
        raise CannotRecordError(f"a leaf is {type_of(like)} of layout {like.layout}")
    return _Placeholder(Value(((count,) if count else ()) + tuple(like.shape), like.dtype, like.device))


def lack_numbers(leaves: Sequence[Any]) -> bool:
    """Whether some tensors only describe others, as those of `FakeTensorMode`: a kernel would read invalid memory."""
    others = [x for x in leaves if isinstance(x, Tensor) and type(x) not in _PLAIN_TYPES and not x.is_meta]
    return any([x.layout is torch.strided and x.untyped_storage().device.type == "meta" for x in others])


def constant(arg: Any) -> tuple[Any, ...]:
    """A constant as a key: 1, 1.0 and True are not the same, nor are 0.0 and -0.0; NaN is the same as NaN."""
    return type(arg), repr(arg) if isinstance(arg, (float, complex)) else arg


def _hashable(arg: Any) -> Any:
    if isinstance(arg, Value):
        return arg
    return tuple([_hashable(each) for each in arg]) if isinstance(arg, (list, tuple)) else constant(arg)


class _Kind:
    """What the recorder makes of an operation; a key, too, whose hash is had in no time."""

    def __init__(self, func: Any) -> None:
        self.is_identity, self.replaced = func in _IDENTITIES, _REPLACED.get(func)
        self.makes_tensors = any(["Tensor" in str(out.type) for out in func._schema.returns])
        self.refused = ""
        if func._schema.is_mutable:
            self.refused = f"{func} writes in place"
        elif torch.Tag.nondeterministic_seeded in func.tags:
            self.refused = f"{func} draws random numbers"


_kind_of = functools.cache(_Kind)


class _Recorder:
    """Writes operations down in a record; a dispatch mode together with torch's class of them."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record
        self._captured: dict[int, _Placeholder] = {}
        self._done: dict[Any, Any] = {}  # From an operation and its arguments to what came out.
        self._inferred: dict[Any, Any] = {}  # From an operation and its arguments' shapes to those of what comes out.
        self._empty: dict[Any, Tensor] = {}  # From a shape and a dtype to a tensor of these without memory.

    @never_traced
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What stands for the result of an operation."""
        kind, kwargs = _kind_of(func), kwargs or {}
        if kind.is_identity:
            return _Placeholder(self.placeholder_of(args[0]).value)
        if kind.refused:
            raise CannotRecordError(kind.refused)
        if not kind.makes_tensors:
            if any([isinstance(arg, (Tensor, list)) for arg in (*args, *kwargs.values())]):
                raise CannotRecordError(f"{func} reads a number from a tensor")
            return func(*args, **kwargs)  # A question about dtypes.
        func, args = kind.replaced(args) if kind.replaced else (func, args)
        shapes: list[Any] = [kind]
        recorded = tuple([self._argument(arg, shapes) for arg in args])
        named = {name: self._argument(arg, shapes) for name, arg in kwargs.items()}
        if func is _aten.expand.default and recorded[0].shape == tuple(recorded[1]):
            return _Placeholder(recorded[0])
        same = (kind, *map(_hashable, recorded), *kwargs, *map(_hashable, named.values()))
        made = self._done.get(same)  # What each leaf computes of shared scalars is computed once.
        if made is None:
            made = self._done[same] = self._write(func, recorded, named, (*shapes, *kwargs))
        return [_Placeholder(value) for value in made] if isinstance(made, list) else _Placeholder(made)

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any) -> Any:
        """Write an operation down; the value that it makes, or several."""
        out = self._inferred.get(key)
        if out is None:
            out = self._inferred[key] = self._infer(func, args, kwargs)
        values = [Value(*each) for each in out] if isinstance(out, list) else [Value(*out)]
        node = Node(func, args, kwargs, values, is_tuple=isinstance(out, list))
        for value in values:
            value.node = node
        self._record.nodes.append(node)
        return values if node.is_tuple else values[0]

    def _argument(self, arg: Any, shapes: list[Any]) -> Any:
        """An argument as it is recorded; what its shape depends on is added to `shapes`."""
        if isinstance(arg, Tensor):
            value = self.placeholder_of(arg).value
            shapes.append((value.shape, value.dtype, value.device))
            return value
        if isinstance(arg, (list, tuple)):
            shapes.append(len(arg))
            return [self._argument(each, shapes) for each in arg]
        shapes.append((type(arg), arg))
        return arg

    def placeholder_of(self, x: Tensor) -> _Placeholder:
        """A placeholder as it is, or the one for a tensor that the function holds."""
        if isinstance(x, _Placeholder):
            return x
        if id(x) not in self._captured:
            made = self._captured[id(x)] = _Placeholder(Value(tuple(x.shape), x.dtype, x.device))
            made.value.role = "captured"
            self._record.captured.append((made.value, x))
        return self._captured[id(x)]

    def _infer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shape, dtype and device of what an operation makes; a list of them for several tensors."""
        device = _device_of_result([*args, *kwargs.values()])
        named = {name: self._bare(arg) for name, arg in kwargs.items()}
        out = func(*map(self._bare, args), **named)
        if isinstance(out, Tensor):
            return tuple(out.shape), out.dtype, device
        if isinstance(out, (list, tuple)) and all(isinstance(each, Tensor) for each in out):
            return [(tuple(each.shape), each.dtype, device) for each in out]
        raise CannotRecordError(f"{func} reads a number from a tensor")

    def _bare(self, arg: Any) -> Any:
        """An argument with tensors that have no memory."""
        return torch.device("meta") if isinstance(arg, torch.device) else substituted(arg, self._without_memory)

    def _without_memory(self, value: Value) -> Tensor:
        like = value.shape, value.dtype
        if like not in self._empty:
            self._empty[like] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        return self._empty[like]


def _device_of_result(args: list[Any]) -> torch.device:
    """The device that an operation is told, or that of its tensors; those of the CPU without dimensions go with all."""
    told = next((arg for arg in args if isinstance(arg, torch.device)), None)
    if told is not None:
        return torch.empty(0, device=told).device  # With its number, which the argument may lack.
    values: list[Value] = []
    substituted(args, values.append)
    cpu = torch.device("cpu")
    devices = {value.device for value in values if value.shape or value.device != cpu} or {cpu}
    if len(devices) > 1:
        raise CannotRecordError(f"an operation takes tensors of the devices {sorted(map(str, devices))}")
    return devices.pop()


def record(function: Callable[..., Sequence[Tensor]], *placeholders: Any) -> Record:
    """The record of a function of placeholders that returns a list of tensors.

    Raises:
        CannotRecordError: The function does what only tensors with memory can do.
    """
    found = Record([x.value for x in placeholders if isinstance(x, _Placeholder)])
    recorder: Any = type("Recording", (_Recorder, dispatch_mode()), {})(found)
    with torch.no_grad(), recorder:
        for result in function(*placeholders):
            if not isinstance(result, Tensor):
                raise CannotRecordError(f"a result is {result!r}, which is no tensor")
            found.outputs.append(recorder.placeholder_of(result).value)
    needed = set(found.outputs)
    found.nodes = needed_nodes(found.nodes, needed)
    found.captured = [pair for pair in found.captured if pair[0] in needed]
    return found


def needed_nodes(nodes: Sequence[Node], needed: set[Value]) -> list[Node]:
    """The nodes that some values need, in their order; all values that these take are added to `needed`."""
    found = []
    for node in reversed(nodes):
        if any([value in needed for value in node.outputs]):
            found.append(node)
            needed.update(node.inputs)
    return found[::-1]
