"""A grouped step as kernels and scalar arithmetic: their graphs, in their order, and what compiles them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import vmap

from funcreg.core import undocumented
from funcreg.core.notices import warn_user
from funcreg.fused.grouping import Group, Grouping
from funcreg.fused.recording import Node, Value, needed_nodes, placeholder, record

_aten = torch.ops.aten
#: Groups that are not elementwise in one graph: a compiler works on their kernels side by side.
_TOGETHER = 16

_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn, unless this was said before, if only of another file."""
    known = re.sub(r"'[^']*[/\\][^']*'", "", message)
    if known not in _said:
        _said.add(known)
        warn_user(message)


# Compilation


#: Inductor on a CPU fails to fuse some reductions with what is written in place (`KeyError: 'buf11'`), but not all.
_LESS_FUSED = {"max_fusion_size": 4}


class Compiler:
    """A backend for graphs: one compilation for all that compute the same, and none where it does not work."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        self.backend = backend
        self._made: dict[Any, Callable[..., Any]] = {}

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
        any_size = any_size and not any([x.numel() >= 1 << 31 for x in args])  # Which takes another type of index.
        shape = lambda x: x.ndim if any_size or polymorphic else x.shape
        key = (graph.code, any_size, polymorphic, *((shape(x), x.dtype, x.device) for x in args))
        if key not in self._made:  # Threads that come here together make the same.
            self._made[key] = self._compile(graph, args, any_size, polymorphic)
        return self._made[key]

    def _compile(self, graph: fx.GraphModule, args: Sequence[Tensor], any_size: bool, polymorphic: bool) -> Any:
        """Compile only: nothing that the step was given is read or written, so that what fails has changed nothing."""
        directly = functools.partial(undocumented.compile_directly, graph, args, self.backend, any_size)
        by_torch_compile = functools.partial(self._by_torch_compile, graph, args)
        ways = [by_torch_compile] if polymorphic else [directly, by_torch_compile]
        several = [{}, _LESS_FUSED] if self.backend == "inductor" else [{}]
        reason = ""
        for way, options in [(way, options) for options in several for way in ways]:
            try:
                with undocumented.imports_may_warn():
                    return graph if undocumented.compilation_is_forbidden() else way(options)
            except Exception as error:
                reason = reason or " ".join(str(error).split())[:300]
        say_once(f"fuse runs without compiled kernels, with equal results; compilation failed: {reason}")
        return graph

    def _by_torch_compile(self, graph: fx.GraphModule, args: Sequence[Tensor], options: dict[str, Any]) -> Any:
        compiled = torch.compile(graph, backend=self.backend, dynamic=True, options=options or None)
        compiled(*[torch.empty_like(x) for x in args])  # It compiles when it is called.
        return compiled


# Programs


@dataclass(eq=False)
class Kernel:
    """The computation of one stage: of one flat group, or of several other groups at once."""

    graph: fx.GraphModule
    groups: list[Group]
    reads: list[tuple[int, int]]  # Which of the groups, and which input of its members.
    scalars: list[Value]
    writes: list[tuple[int, int]]  # The same, of inputs whose places are written.
    results: list[Value]  # What it returns; sums of what its calls return, if these are several.


@dataclass
class Scalars:
    """The scalar arithmetic of one stage."""

    graph: fx.GraphModule
    takes: list[Value]
    makes: list[Value]
    compiled: Any = None


#: Stages, one after another: scalars, then kernels.
Program = list[tuple[Scalars | None, list[Kernel]]]


@dataclass
class _Piece:
    """What one group does in one stage: nodes from inputs and scalars to exports, then to what is written."""

    group: Group
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
        self._narrowed: dict[Value, Node] = {}  # From a scalar of float64 to what makes it float32.
        self._selects: list[Node] = []  # Exports of members, of stacks of them.
        #: From an export to the sum that stands for those of all members, or to nothing if another's does.
        self._sums: dict[Value, list[Value]] = {}

    def program(self) -> Program:
        """The kernels and scalars of all stages."""
        count = max([self._last(group) + 1 for group in self._grouping.groups], default=0)
        kernels = [self._kernels(stage) for stage in range(count)]
        wanted = {value for stage in kernels for kernel in stage for value in kernel.scalars}
        wanted.update(self._grouping.unpacked_outputs.values())
        nodes = [*self._selects, *map(self._with_sums, self._grouping.scalars), *self._narrowed.values()]
        nodes = needed_nodes(nodes, set(wanted))
        unknown = {value for node in nodes for value in node.outputs}
        unknown.update(value for stage in kernels for kernel in stage for value in kernel.results)
        program: Program = []
        for stage in [*kernels, []]:  # What the last kernels return may be needed, too.
            here, later = [], []
            for node in nodes:  # Each as soon as it can be computed.
                if unknown.isdisjoint(node.inputs):
                    unknown.difference_update(node.outputs)
                    here.append(node)
                else:
                    later.append(node)
            program.append((_scalars(here, wanted.union(*(node.inputs for node in later))), stage))
            unknown.difference_update(value for kernel in stage for value in kernel.results)
            nodes = later
        return program

    def _last(self, group: Group) -> int:
        """The stage in which a group writes."""
        return max([self._grouping.stages[value] for value in group.first.ends])

    def _kernels(self, stage: int) -> list[Kernel]:
        """Kernels of one stage: one for each flat group, and for other groups several together."""
        pieces = [piece for each in self._grouping.groups if (piece := self._piece(each, stage)) is not None]
        is_alone = lambda piece: piece.group.flat or piece.group.shape_polymorphic
        rest = [piece for piece in pieces if not is_alone(piece)]
        together = [rest[i : i + _TOGETHER] for i in range(0, len(rest), _TOGETHER)]
        return [self._kernel(each) for each in [*([piece] for piece in pieces if is_alone(piece)), *together]]

    def _piece(self, group: Group, stage: int) -> _Piece | None:
        """What a group does in a stage; None for nothing."""
        member, last = group.first, self._last(group)
        exports = [i for i, value in enumerate(member.exports) if self._grouping.stages[value] == stage]
        if not exports and stage != last:
            return None
        writes = member.writes if stage == last else []
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
        return _Piece(group, exports, reads, places, scalars, nodes, inputs, inner, ends)

    def _with_narrow_scalars(self, node: Node, own: set[Value]) -> Node:
        """A node with scalars in the precision it computes with, as they are where a tensor meets a scalar."""
        if {value.dtype for value in node.inputs if value in own} != {torch.float32}:
            return node

        def narrow(x: Value) -> Value:
            if x in own or x.dtype != torch.float64:
                return x
            if x not in self._narrowed:
                made = Value((), torch.float32, x.device)
                self._narrowed[x] = Node(_aten._to_copy.default, (x,), {"dtype": torch.float32}, [made])
            return self._narrowed[x].outputs[0]

        return node.with_values(narrow)

    def _result(self, group: Group, i: int) -> Value:
        """What a kernel returns for one export of its members, and how the exports are had from it."""
        exports = [member.exports[i] for member in group.members]
        like = exports[0]
        if len(exports) == 1 and not group.stacked:
            return like
        if group.flat:
            made = Value((), like.dtype, like.device)
            self._sums.update((value, []) for value in exports)
            self._sums[like].append(made)
            return made
        stacked = Value((len(exports), *like.shape), like.dtype, like.device)
        for place, value in enumerate(exports):
            self._selects.append(Node(_aten.select.int, (stacked, 0, place), {}, [value]))
        return stacked

    def _with_sums(self, node: Node) -> Node:
        """A stack that is only summed, of the sums over whole groups instead of single leaves."""
        if node.outputs[0] not in self._grouping.summed_stacks:
            return node
        terms = [each for value in node.inputs for each in self._sums.get(value, [value])]
        return Node(node.op, (terms, *node.args[1:]), node.kwargs, node.outputs)

    def _kernel(self, pieces: list[_Piece]) -> Kernel:
        """One graph of what some groups do: inputs, scalars, then places to write into unless these are the inputs."""
        writer = _GraphWriter()
        taken = [dict(zip(piece.reads, map(writer.input, piece.inputs), strict=True)) for piece in pieces]
        scalars = {value: writer.input() for value in dict.fromkeys(value for each in pieces for value in each.scalars)}
        places = [
            [found[i] if self._in_place else writer.input() for i in piece.places]
            for piece, found in zip(pieces, taken, strict=True)
        ]
        results, pairs = [], []
        for piece, targets in zip(pieces, places, strict=True):
            writer.values.update(zip(piece.scalar_inputs, [scalars[value] for value in piece.scalars], strict=True))
            writer.run(piece.nodes)
            values = [writer.values[value] for value in piece.ends]
            results += values[: len(piece.exports)]
            pairs += zip(targets, values[len(piece.exports) :], strict=True)
        writer.store(pairs)
        return Kernel(
            graph=writer.module(results),
            groups=[piece.group for piece in pieces],
            reads=[(i, slot) for i, piece in enumerate(pieces) for slot in piece.reads],
            scalars=list(scalars),
            writes=[(i, slot) for i, piece in enumerate(pieces) for slot in piece.places],
            results=[self._result(piece.group, i) for piece in pieces for i in piece.exports],
        )


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

    def input(self, value: Value | None = None) -> fx.Node:
        node = self._graph.placeholder(f"x{len(self._graph.nodes)}")
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
