"""A grouped step as kernels and scalar arithmetic: graphs, what compiles them, and the calls in their order."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import vmap

from funcreg import undocumented
from funcreg.grouping import Group, Grouping
from funcreg.recording import Node, Value, needed_nodes, placeholder, record

_aten = torch.ops.aten
#: Groups that are not elementwise in one graph: a compiler works on their kernels side by side.
_TOGETHER = 16
#: Entries from which a leaf is computed with where it lies, and of the longest vector of leaves copied together.
SEPARATE = {"cpu": (40_000, 1_000_000)}
SEPARATE_ELSEWHERE = (4_000_000, (1 << 31) - 1)

_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn, unless this was said before."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=2)


# Compilation


class Compiler:
    """A backend for graphs: one compilation for all that compute the same, and none where it does not work."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        self.backend = backend
        self._made: dict[Any, Callable[..., Any]] = {}
        self._lock, self._process = threading.Lock(), os.getpid()

    def __call__(
        self,
        graph: fx.GraphModule,
        args: Sequence[Tensor],
        any_size: bool = False,
        polymorphic: bool = False,
    ) -> Any:
        """What computes as a graph does, on arguments like these.

        Args:
            graph: Operations of ATen.
            args: Arguments of a call.
            any_size: Whether it is to serve vectors of any number of entries, the same for all; scalars aside.
            polymorphic: Whether it is to serve arguments of any shapes.
        """
        if self.backend == "eager" or (any_size and max([x.numel() for x in args if x.ndim], default=0) < 2):
            return graph  # The symbol for a size stands for 2 and more.
        long = any([x.numel() >= 1 << 31 for x in args])  # Which takes another type of index.
        any_size = any_size and not long
        shape = lambda x: x.ndim if any_size or polymorphic else x.shape
        key = (graph.code, any_size, polymorphic, *((shape(x), x.dtype, x.device) for x in args))
        if key not in self._made:
            if self._process != os.getpid():  # In a child, a thread that is not there may hold the lock.
                self._lock, self._process = threading.Lock(), os.getpid()
            with self._lock:  # Of this step alone: threads that wait for it need the same kernel.
                if key not in self._made:
                    self._made[key] = self._compile(graph, args, any_size, polymorphic)
        return self._made[key]

    def _compile(self, graph: fx.GraphModule, args: Sequence[Tensor], any_size: bool, polymorphic: bool) -> Any:
        """Compile only: nothing that the step was given is read or written, so that what fails has changed nothing."""
        try:
            with undocumented.imports_may_warn():
                if undocumented.compilation_is_forbidden():
                    return graph
                if not polymorphic:
                    return undocumented.compile_directly(graph, args, self.backend, any_size)
            return self._by_torch_compile(graph, args)
        except Exception as first:
            try:
                return self._by_torch_compile(graph, args)
            except Exception:
                reason = " ".join(str(first).split())[:300]
                say_once(f"fuse runs without compiled kernels, with equal results; compilation failed: {reason}")
                return graph

    def _by_torch_compile(self, graph: fx.GraphModule, args: Sequence[Tensor]) -> Any:
        compiled = torch.compile(graph, backend=self.backend, dynamic=True)
        with undocumented.imports_may_warn():
            compiled(*[torch.empty_like(x) for x in args])  # It compiles when it is called.
        return compiled


# Programs


@dataclass
class Buffer:
    """Members of a group that one call of a kernel computes with: end to end, stacked, or one alone."""

    group: int
    start: int  # The first member.
    count: int
    entries: int  # Of one input, all members together.
    before: int  # Entries of earlier members.


@dataclass(eq=False)
class KernelCall:
    """A call of a kernel."""

    buffers: list[Buffer]  # One for each of its groups.
    inputs: list[Any] = field(default_factory=list)  # What a plan knows of the leaves that it reads.
    compiled: Any = None


@dataclass
class Kernel:
    """The computation of one stage: for the buffers of one flat group in turn, or for several groups at once."""

    graph: fx.GraphModule
    flat: bool
    shape_polymorphic: bool
    reads: list[tuple[int, int]]  # Which of the groups, and which input of its members.
    scalars: list[Value]
    writes: list[tuple[int, int]]  # The same, of inputs whose places are written.
    results: list[Value]  # What it returns; sums of what its calls return, if these are several.
    calls: dict[bool, list[KernelCall]]  # If all leaves lie in packed memory, and if not.


@dataclass
class Scalars:
    """The scalar arithmetic of one stage."""

    graph: fx.GraphModule
    takes: list[Value]
    makes: list[Value]
    compiled: Any = None


@dataclass
class Program:
    """Stages, one after another: scalars, then kernels."""

    stages: list[tuple[Scalars | None, list[Kernel]]]
    takes: list[Value]  # Scalars, and what goes out as it is.


@dataclass
class _GroupStage:
    """What one group does in one stage: nodes from inputs and scalars to exports, then to what is written."""

    group: int
    exports: list[int]  # Exports of a member, by number.
    reads: list[int]
    places: list[int]
    scalars: list[Value]
    nodes: list[Node]
    inputs: list[Value]
    scalar_inputs: list[Value]  # The scalars, as the nodes know them.
    ends: list[Value]


class Lowering:
    """Makes the kernels and scalars of a grouped step.

    Args:
        grouping: The grouped step.
        in_place: Whether kernels write into their inputs; else they take buffers to write into.
    """

    def __init__(self, grouping: Grouping, in_place: bool) -> None:
        self._grouping, self._in_place = grouping, in_place
        self._stages = dict(grouping.stages)
        self._nodes = list(grouping.scalars)
        self._exported = {value for group in grouping.groups for member in group.members for value in member.exports}
        self._narrowed: dict[Value, Value] = {}  # From a scalar of float64 to that in float32.
        #: From an export to the sum that stands for those of all members, or to nothing if another's does.
        self._sums: dict[Value, list[Value]] = {}

    def program(self) -> Program:
        """The kernels and scalars of all stages."""
        groups = self._grouping.groups
        # Exports of the last kernels may need one more stage of scalars.
        count = 2 + max([self._stages[value] for group in groups for value in group.first.ends], default=0)
        count = max(count, 1 + max([self._stages[node.outputs[0]] for node in self._nodes], default=0))
        work: list[list[_GroupStage]] = [[] for _ in range(count)]
        for number, group in enumerate(groups):
            last = max([self._stages[value] for value in group.first.ends])
            for stage in range(last + 1):
                exports = [i for i, value in enumerate(group.first.exports) if self._stages[value] == stage]
                if exports or stage == last:
                    work[stage].append(self._group_stage(number, exports, stage == last))
        kernels = [self._kernels(parts) for parts in work]
        wanted = {value for stage in kernels for kernel in stage for value in kernel.scalars}
        wanted.update(self._grouping.unpacked_outputs.values())
        nodes = needed_nodes(_sorted([self._with_sums(node) for node in self._nodes]), set(wanted))
        scalars = []
        for stage in range(count):
            here = [node for node in nodes if self._stages[node.outputs[0]] == stage]
            later = {value for node in nodes if self._stages[node.outputs[0]] > stage for value in node.inputs}
            scalars.append(_scalars(here, wanted | later))
        takes = {value for each in scalars if each for value in each.takes} | wanted
        stages = list(zip(scalars, kernels, strict=True))
        return Program(stages, list(takes))

    def _kernels(self, work: list[_GroupStage]) -> list[Kernel]:
        """Kernels of one stage: one for each flat group, and for other groups several together."""
        groups = self._grouping.groups
        alone = lambda part: groups[part.group].flat or groups[part.group].shape_polymorphic
        found = [self._kernel([part]) for part in work if alone(part)]
        rest = [part for part in work if not alone(part)]
        return found + [self._kernel(rest[i : i + _TOGETHER]) for i in range(0, len(rest), _TOGETHER)]

    def _group_stage(self, number: int, exports: list[int], last: bool) -> _GroupStage:
        group = self._grouping.groups[number]
        member = group.first
        writes = member.writes if last else []
        ends = [*(member.exports[i] for i in exports), *(value for _, value in writes)]
        needed = set(ends)
        nodes = needed_nodes(member.nodes, needed)
        own = {*member.inputs, *(value for node in member.nodes for value in node.outputs)}
        if group.flat:
            nodes = [self._with_narrow_scalars(node, own) for node in nodes]
        places = [member.inputs.index(place) for place, _ in writes]
        read = {i for i, value in enumerate(member.inputs) if value in needed}
        reads = sorted(read.union(places) if self._in_place else read or [0])
        inputs = [member.inputs[i] for i in reads]
        scalars = inner = list(dict.fromkeys(value for node in nodes for value in node.inputs if value not in own))
        if group.stacked:
            nodes, inputs, inner, ends = _mapped(len(group.members), nodes, inputs, scalars, ends)
        return _GroupStage(number, exports, reads, places, scalars, nodes, inputs, inner, ends)

    def _with_narrow_scalars(self, node: Node, own: set[Value]) -> Node:
        """A node with scalars in the precision it computes with, as they are where a tensor meets a scalar."""
        if {value.dtype for value in node.inputs if value in own} != {torch.float32}:
            return node

        def narrow(x: Value) -> Value:
            if x in own or x.dtype != torch.float64:
                return x
            if x not in self._narrowed:
                self._narrowed[x] = made = Value((), torch.float32, x.device)
                self._nodes.append(Node(_aten._to_copy.default, (x,), {"dtype": torch.float32}, [made]))
                self._stages[made] = self._stages[x] + (x in self._exported)  # What kernels return is there later.
            return self._narrowed[x]

        return node.with_values(narrow)

    def _result(self, group: Group, i: int) -> Value:
        """What a kernel returns for one export of its members, and how the exports are had from it."""
        exports = [member.exports[i] for member in group.members]
        like, stage = exports[0], self._stages[exports[0]]
        if len(exports) == 1 and not group.stacked:
            return like
        if group.summed:
            made = Value((), like.dtype, like.device)
            self._sums.update((value, []) for value in exports)
            self._sums[like].append(made)
            self._stages[made] = stage
            return made
        stacked = Value((len(exports), *like.shape), like.dtype, like.device)
        self._stages[stacked] = stage
        for place, value in enumerate(exports):
            self._nodes.append(Node(_aten.select.int, (stacked, 0, place), {}, [value]))
            self._stages[value] = stage + 1
        return stacked

    def _with_sums(self, node: Node) -> Node:
        """A stack that is only summed, of the sums over whole groups instead of single leaves."""
        if node.outputs[0] not in self._grouping.summed_stacks:
            return node
        terms = [each for value in node.inputs for each in self._sums.get(value, [value])]
        return Node(node.op, (terms, *node.args[1:]), node.kwargs, node.outputs)

    def _kernel(self, parts: list[_GroupStage]) -> Kernel:
        """One graph of what some groups do: inputs, scalars, then places to write into unless these are the inputs."""
        writer = _GraphWriter()
        taken = [dict(zip(part.reads, map(writer.input, part.inputs), strict=True)) for part in parts]
        scalars = {value: writer.input() for value in dict.fromkeys(value for part in parts for value in part.scalars)}
        places = [
            [found[i] if self._in_place else writer.input() for i in part.places]
            for part, found in zip(parts, taken, strict=True)
        ]
        results, pairs = [], []
        for part, targets in zip(parts, places, strict=True):
            writer.values.update(zip(part.scalar_inputs, [scalars[value] for value in part.scalars], strict=True))
            writer.run(part.nodes)
            values = [writer.values[value] for value in part.ends]
            results += values[: len(part.exports)]
            pairs += zip(targets, values[len(part.exports) :], strict=True)
        writer.store(pairs)
        groups = [self._grouping.groups[part.group] for part in parts]
        return Kernel(
            graph=writer.module(results),
            flat=groups[0].flat,
            shape_polymorphic=groups[0].shape_polymorphic,
            reads=[(i, slot) for i, part in enumerate(parts) for slot in part.reads],
            scalars=list(scalars),
            writes=[(i, slot) for i, part in enumerate(parts) for slot in part.places],
            results=[self._result(group, i) for part, group in zip(parts, groups, strict=True) for i in part.exports],
            calls={whole: self._calls(parts, whole) for whole in (False, True)},
        )

    def _calls(self, parts: list[_GroupStage], whole: bool) -> list[KernelCall]:
        columns = [_buffers(part.group, self._grouping.groups[part.group], whole) for part in parts]
        return [KernelCall(list(buffers)) for buffers in zip(*columns, strict=True)]


def arrange(grouping: Grouping) -> None:
    """Order the leaves of flat groups as they are to lie in memory: small ones first, those of similar shape together.

    Neighbours that differ in their first dimension alone are copied together as they are.
    """
    for group in grouping.groups:
        if group.flat:
            least, _ = _separate(group)
            shape = lambda member: member.inputs[0].shape
            group.members.sort(key=lambda member: (math.prod(shape(member)) >= least, shape(member)[1:]))


def packed_members(group: Group) -> int:
    """Of how many members, the first ones, the state is packed beside loose parameters.

    On a CPU of all, for large pages make kernels faster. Elsewhere a second copy of that of large leaves, for the time
    of one step, may be more than there is memory for.
    """
    if not group.flat or group.first.inputs[0].device.type == "cpu":
        return len(group.members)
    least, _ = _separate(group)
    return sum([math.prod(member.inputs[0].shape) < least for member in group.members])


def _separate(group: Group) -> tuple[int, int]:
    return SEPARATE.get(group.first.inputs[0].device.type, SEPARATE_ELSEWHERE)


def _buffers(number: int, group: Group, whole: bool) -> Iterable[Buffer]:
    entries = [math.prod(member.inputs[0].shape) for member in group.members]
    if not group.flat:
        yield Buffer(number, 0, len(entries), sum(entries), 0)
        return
    least, most = _separate(group)
    start = 0
    while start < len(entries):
        end, size = start + 1, entries[start]
        # Of leaves in one vector, those that are large alone are not copied together with others.
        small = lambda i: i < len(entries) and entries[i] < least
        while end < len(entries) and (
            (whole and size + entries[end] < 1 << 31)
            or (not whole and small(start) and small(end) and size + entries[end] <= most)
        ):
            size, end = size + entries[end], end + 1
        yield Buffer(number, start, end - start, size, sum(entries[:start]))
        start = end


def _mapped(
    count: int, nodes: list[Node], inputs: list[Value], scalars: list[Value], ends: list[Value]
) -> tuple[list[Node], list[Value], list[Value], list[Value]]:
    """A subgraph mapped over the stack of all leaves like it: nodes, inputs, scalars and ends of that."""

    def one(*tensors: Tensor) -> tuple[Tensor, ...]:
        values: dict[Value, Any] = dict(zip([*inputs, *scalars], tensors, strict=True))
        for node in nodes:
            node.run(values, lambda op, args, kwargs: op(*args, **kwargs))
        return tuple([values[value] for value in ends])

    stacks, shared = [placeholder(value, count) for value in inputs], [placeholder(value) for value in scalars]
    dims = (0,) * len(stacks) + (None,) * len(shared)
    found = record(vmap(one, in_dims=dims), *stacks, *shared)
    return found.nodes, found.inputs[: len(stacks)], found.inputs[len(stacks) :], found.outputs


def _sorted(nodes: list[Node]) -> list[Node]:
    """Each node after those that make its inputs."""
    made = {value: node for node in nodes for value in node.outputs}
    ordered: dict[Node, None] = {}

    def place(node: Node) -> None:
        if node not in ordered:
            for value in node.inputs:
                if value in made:
                    place(made[value])
            ordered[node] = None

    for node in nodes:
        place(node)
    return list(ordered)


def _scalars(nodes: list[Node], wanted: set[Value]) -> Scalars | None:
    if not nodes:
        return None
    made = {value for node in nodes for value in node.outputs}
    takes = list(dict.fromkeys(value for node in nodes for value in node.inputs if value not in made))
    makes = [value for node in nodes for value in node.outputs if value in wanted]
    writer = _GraphWriter()
    for value in takes:
        writer.input(value)
    writer.run(nodes)
    return Scalars(writer.module([writer.values[value] for value in makes]), takes, makes)


class _GraphWriter:
    """A graph that is being written."""

    def __init__(self) -> None:
        self._graph = fx.Graph()
        self.values: dict[Value, fx.Node] = {}
        self._inputs = 0

    def input(self, value: Value | None = None) -> fx.Node:
        self._inputs += 1
        node = self._graph.placeholder(f"x{self._inputs}")
        if value is not None:
            self.values[value] = node
        return node

    def run(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            node.run(self.values, self._graph.call_function)

    def store(self, pairs: Sequence[tuple[fx.Node, fx.Node]]) -> None:
        """Write values into places. An input that is a value is read before its own place is written."""
        pairs = [(place, value) for place, value in pairs if place is not value]
        values = [
            self._graph.call_function(_aten.clone.default, (value,)) if value.op == "placeholder" else value
            for _, value in pairs
        ]
        for (place, _), value in zip(pairs, values, strict=True):
            self._graph.call_function(_aten.copy_.default, (place, value))

    def module(self, results: Iterable[fx.Node]) -> fx.GraphModule:
        self._graph.output(tuple(results))
        return fx.GraphModule(torch.nn.Module(), self._graph)
