"""Programs for a packed step: what is computed when, from which buffers and scalars, as graphs ready for a compiler."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.func import vmap

from funcreg.packing import Group, Home, Packing
from funcreg.recording import Node, Value, record, replaced, stand_in

_aten = torch.ops.aten


#: Groups that are not elementwise in one graph: a compiler works on their kernels side by side.
_TOGETHER = 16


@dataclass
class Buffer:
    """Leaves that one call of a kernel computes with: end to end, stacked, or one alone."""

    group: Group
    homes: list[Home]
    shapes: list[tuple[int, ...]]  # Of the buffer, for each input of a home.


@dataclass
class Kernel:
    """The computation of one stage: for the buffers of one flat group in turn, or for several groups at once."""

    module: fx.GraphModule
    flat: bool
    kin: bool  # Whether its code is to serve stacks of other sizes, too.
    reads: list[list[int]]  # Of each group, inputs of a home, by number.
    scalars: list[Value]
    writes: list[list[int]]  # Of each group, inputs of a home whose places are written.
    calls: list[tuple[list[int], list[Value]]]  # For each call the number of each group's buffer, and what it returns.


@dataclass
class _Part:
    """What one group does in one stage: nodes from inputs and scalars to what goes out, then to what is written."""

    group: Group
    out: list[int]  # Exports of a home, by number.
    reads: list[int]
    places: list[int]
    scalars: list[Value]
    nodes: list[Node]
    inputs: list[Value]
    outer: list[Value]  # Scalars, as the nodes know them.
    ends: list[Value]


@dataclass
class Scalars:
    """The scalar arithmetic of one stage."""

    module: fx.GraphModule
    takes: list[Value]
    makes: list[Value]


@dataclass
class Program:
    """Stages, one after another: scalars, then kernels."""

    buffers: list[Buffer]
    stages: list[tuple[Scalars | None, list[Kernel]]]


def compose(
    packing: Packing, in_place: bool, sizes: Callable[[torch.device], tuple[int, int]], products: bool = False
) -> Program:
    """The program of a packed step.

    Args:
        packing: The packed step.
        in_place: Whether kernels write into their inputs; else they take buffers to write into.
        sizes: For a device, the number of entries from which a leaf is computed with where it lies, and the largest
            number of entries of leaves that are copied together.
        products: Whether to multiply with the inverse of a scalar instead of dividing by it.
    """
    # What goes out of the last kernels may need one more stage of scalars.
    count = 2 + max([packing.stages[value] for group in packing.groups for value in _ends(group.first)], default=0)
    count = max(count, 1 + max([packing.stages[node.outputs[0]] for node in packing.scalars], default=0))
    buffers = [buffer for group in packing.groups for buffer in _buffers(group, sizes)]
    kernels: list[list[Kernel]] = [[] for _ in range(count)]
    stages, nodes = packing.stages, list(packing.scalars)
    more: dict[tuple[Value, torch.dtype], Value] = {}

    def narrow(value: Value, dtype: torch.dtype) -> Value:
        if (value, dtype) not in more:
            more[value, dtype] = made = Value((), dtype, value.device)
            nodes.append(Node(_aten._to_copy.default, (value,), {"dtype": dtype}, [made], several=False))
            stages[made] = known(value)
        return more[value, dtype]

    inverses: dict[Value, list[Value]] = {}
    exported = {value for group in packing.groups for home in group.homes for value in home.exports}
    known = lambda value: stages[value] + (value in exported)  # What kernels return is there a stage later.

    def inverse(value: Value) -> list[Value]:
        if value not in inverses:
            found = record(_split_inverse, stand_in(value))
            (inner,) = found.inputs
            inverses[value] = found.outputs
            for node in found.nodes:
                args = tuple([replaced(arg, lambda x: value if x is inner else x) for arg in node.args])
                nodes.append(Node(node.op, args, node.kwargs, node.outputs, node.several))
                stages.update((made, known(value)) for made in node.outputs)
        return inverses[value]

    def fitted(group: Group, nodes: list[Node], mine: set[Value]) -> list[Node]:
        if not group.flat:
            return nodes
        if products and group.first.inputs[0].device.type == "cpu":  # Elsewhere memory is what takes time.
            nodes = [each for node in nodes for each in _multiplied(node, mine, inverse)]
        return [_narrowed(node, mine, narrow) for node in nodes]

    sums: dict[Value, list[Value]] = {}  # From what goes out of a home to the parts of which the sum is wanted.
    numbers: dict[int, list[int]] = {}
    for number, buffer in enumerate(buffers):
        numbers.setdefault(id(buffer.group), []).append(number)

    def results(part: _Part) -> list[Value]:
        return [_result(part.group, i, sums, nodes, stages) for i in part.out]

    work: list[list[_Part]] = [[] for _ in range(count)]
    for group in packing.groups:
        at = [stages[value] for value in group.first.exports]
        last = max([stages[value] for value in _ends(group.first)])
        for stage in range(last + 1):
            out = [i for i, of in enumerate(at) if of == stage]
            if out or stage == last:
                work[stage].append(_part(group, out, stage == last, in_place, fitted))
    for stage, parts in enumerate(work):
        for part in parts:
            if part.group.flat:
                calls = [([number], results(part)) for number in numbers[id(part.group)]]
                kernels[stage].append(_kernel([part], calls, in_place))
            elif part.group.kin:
                kernels[stage].append(_kernel([part], [(numbers[id(part.group)], results(part))], in_place))
        rest = [part for part in parts if not part.group.flat and not part.group.kin]
        for together in (rest[i : i + _TOGETHER] for i in range(0, len(rest), _TOGETHER)):
            call = [numbers[id(part.group)][0] for part in together], [x for part in together for x in results(part)]
            kernels[stage].append(_kernel(together, [call], in_place))
    wanted = {value for stage in kernels for kernel in stage for value in kernel.scalars}
    wanted.update(packing.loose.values())
    nodes, _ = _needed(_sorted([_with_parts(node, sums, packing.sums) for node in nodes]), wanted)
    scalars = []
    for stage in range(count):
        here = [node for node in nodes if stages[node.outputs[0]] == stage]
        later = {value for node in nodes if stages[node.outputs[0]] > stage for value in node.inputs}
        scalars.append(_scalars(here, wanted | later))
    return Program(buffers, list(zip(scalars, kernels, strict=True)))


def _ends(home: Home) -> list[Value]:
    return [*(value for _, value in home.writes), *home.exports]


def _buffers(group: Group, sizes: Callable[[torch.device], tuple[int, int]]) -> Iterable[Buffer]:
    homes, first = group.homes, group.first.inputs
    if not group.flat:
        many = (len(homes),) if group.stacked else ()
        yield Buffer(group, homes, [many + value.shape for value in first])
        return
    least, most = sizes(first[0].device)
    parts: list[tuple[int, list[Home]]] = [(0, [])]
    apart: list[tuple[int, list[Home]]] = []
    for home in homes:
        size = math.prod(home.inputs[0].shape)
        if size >= least:
            apart.append((size, [home]))
        elif parts[-1][0] + size > most and parts[-1][1]:
            parts.append((size, [home]))
        else:
            parts[-1] = (parts[-1][0] + size, [*parts[-1][1], home])
    for size, members in [*parts, *apart]:
        if members:
            yield Buffer(group, members, [(size,)] * len(first))


def _result(
    group: Group, i: int, parts: dict[Value, list[Value]], nodes: list[Node], stages: dict[Value, int]
) -> Value:
    """What a kernel returns for one export of its homes, and how the exports are had from it."""
    exports = [home.exports[i] for home in group.homes]
    like, after = exports[0], stages[exports[0]] + 1
    if len(exports) == 1 and not group.stacked:
        return like
    if group.summed:
        part = Value((), like.dtype, like.device)
        parts.setdefault(like, []).append(part)
        for value in exports[1:]:
            parts[value] = []
        stages[part] = stages[like]
        return part
    stacked = Value((len(exports), *like.shape), like.dtype, like.device)
    stages[stacked] = stages[like]
    for place, value in enumerate(exports):
        nodes.append(Node(_aten.select.int, (stacked, 0, place), {}, [value], several=False))
        stages[value] = after
    return stacked


def _with_parts(node: Node, parts: dict[Value, list[Value]], sums: set[Value]) -> Node:
    """A stack that is only summed, of the sums of whole buffers instead of single leaves."""
    if node.outputs[0] not in sums:
        return node
    terms = [part for value in node.inputs for part in parts.get(value, [value])]
    return Node(node.op, (terms, *node.args[1:]), node.kwargs, node.outputs, node.several)


def _sorted(nodes: list[Node]) -> list[Node]:
    """Each node after those that make its inputs."""
    made = {value: node for node in nodes for value in node.outputs}
    ordered: dict[int, Node] = {}

    def place(node: Node) -> None:
        if id(node) not in ordered:
            for value in node.inputs:
                if value in made:
                    place(made[value])
            ordered[id(node)] = node

    for node in nodes:
        place(node)
    return list(ordered.values())


# Graphs


class _Emitter:
    """A graph that is being written."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.values: dict[Value, fx.Node] = {}
        self._inputs = 0

    def input(self, value: Value | None = None) -> fx.Node:
        self._inputs += 1
        node = self.graph.placeholder(f"x{self._inputs}")
        if value is not None:
            self.values[value] = node
            node.meta["read"] = value
        return node

    def run(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            args = tuple([replaced(arg, self.values.__getitem__) for arg in node.args])
            kwargs = {name: replaced(arg, self.values.__getitem__) for name, arg in node.kwargs.items()}
            out = self.graph.call_function(node.op, args, kwargs)
            if not node.several:
                out.meta["value"] = node.outputs[0]
            for i, value in enumerate(node.outputs):
                self.values[value] = self.graph.call_function(operator.getitem, (out, i)) if node.several else out

    def store(self, pairs: Sequence[tuple[fx.Node, fx.Node]]) -> None:
        """Write values into places. An input that is a value is read before its own place is written."""
        pairs = [(place, value) for place, value in pairs if place is not value]
        values = [
            self.graph.call_function(_aten.clone.default, (value,)) if value.op == "placeholder" else value
            for _, value in pairs
        ]
        for (place, _), value in zip(pairs, values, strict=True):
            self.graph.call_function(_aten.copy_.default, (place, value))

    def module(self, results: Iterable[fx.Node]) -> fx.GraphModule:
        self.graph.output(tuple(results))
        return fx.GraphModule(torch.nn.Module(), self.graph)


def over_temporaries(module: fx.GraphModule) -> fx.GraphModule:
    """A module to run without a compiler: what is elementwise is written where it goes, or over what is needed no more.

    Each operation then writes into memory that is in a cache already.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    inputs = graph.find_nodes(op="placeholder")
    for node in list(graph.nodes):
        if node.target is _aten.where.self and (x := _nan_of(node)) is not None:
            # `where` is slow; a magnitude between a sign and that sign is the sign, but NaN goes through.
            unequal, _, value = node.args
            sizes = [user for user in x.users if user.target is _aten.abs.default]
            made = x if x.op != "placeholder" else inputs[-1]
            with graph.inserting_after(made):
                size = graph.call_function(_aten.abs.default, (x,))
            size.meta["value"] = node.meta["value"]
            for other in sizes:
                other.replace_all_uses_with(size)
                graph.erase_node(other)
            node.target, node.args = _aten.clamp.Tensor, (size, value, value)
            if not unequal.users:
                graph.erase_node(unequal)
    for node in list(graph.nodes):
        if node.target in (_aten.add.Tensor, _aten.sub.Tensor):
            _multiply_inside(node)
    for node in graph.find_nodes(op="call_function", target=_aten.sum.default):
        _sum_of_products(node)
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = lambda node: max([order[user] for user in node.users])
    for copy in [node for node in graph.nodes if node.target is _aten.copy_.default]:
        place, node = copy.args
        # From there on the place is not read.
        free = max([order[user] for user in place.users if user is not copy], default=0)
        made: fx.Node | None = node if "value" in node.meta and "out" not in node.kwargs else None
        while made is not None and _elementwise(made) and order[made] >= free:
            if (out := _variant(made.target, "out")) is None:
                break
            made.target, made.kwargs = out, {**made.kwargs, "out": place}
            if made is node:
                graph.erase_node(copy)
            # What only this needs is made in the same place.
            apart = [x for x in made.all_input_nodes if _only_for(made, x) and x.op == "call_function"]
            made = next((x for x in apart if "out" not in x.kwargs), None)
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        if "out" in node.kwargs or "value" not in node.meta or not isinstance(first, fx.Node) or not _elementwise(node):
            continue
        if first.op != "call_function" or not _same_kind(node, first) or order[node] < last(first):
            continue
        if "out" in first.kwargs:  # That is where it belongs, and stays.
            continue
        if (inside := _variant(node.target, "_")) is not None:
            node.target = inside
    return fx.GraphModule(torch.nn.Module(), graph)


class _Memory(NamedTuple):
    place: fx.Node
    dtype: torch.dtype


def with_scratch(module: fx.GraphModule) -> tuple[fx.GraphModule, list[torch.dtype]]:
    """A module that takes memory for its temporaries as last arguments, as many as there are dtypes returned.

    Memory that is asked for and given back at every call may have to be cleared by the system every time.
    """
    graph = module.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    holders: dict[fx.Node, fx.Node] = {}  # From what is made to what first was made there.
    until: dict[fx.Node, int] = {}
    for node in order:
        if "value" in node.meta and "out" not in node.kwargs and _elementwise(node) and node.meta["value"].shape:
            first, op = node.args[0], node.target
            over = first if isinstance(first, fx.Node) and not isinstance(op, str) and op._schema.is_mutable else None
            holder = holders[node] = node if over is None else holders.get(over, over)
            until[holder] = max(until.get(holder, 0), order[node], *[order[user] for user in node.users])
    last = graph.find_nodes(op="placeholder")[-1]
    taken: list[_Memory] = []
    free: list[_Memory] = []
    busy: list[tuple[int, _Memory]] = []
    for node in order:
        out = _variant(node.target, "out") if holders.get(node) is node else None
        if out is None:
            continue
        free += [memory for end, memory in busy if end < order[node]]
        busy = [(end, memory) for end, memory in busy if end >= order[node]]
        dtype = node.meta["value"].dtype
        memory = next((memory for memory in free if memory.dtype == dtype), None)
        if memory is None:
            with graph.inserting_after(last):
                last = graph.placeholder(f"t{len(taken) + 1}")
            memory = _Memory(last, dtype)
            taken.append(memory)
        else:
            free.remove(memory)
        busy.append((until[node], memory))
        node.target, node.kwargs = out, {**node.kwargs, "out": memory.place}
    return fx.GraphModule(torch.nn.Module(), graph), [memory.dtype for memory in taken]


def _elementwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _same_kind(node: fx.Node, other: fx.Node) -> bool:
    made, over = node.meta["value"], other.meta.get("value")
    return over is not None and (made.shape, made.dtype) == (over.shape, over.dtype)


def _variant(op: Any, kind: str) -> Any:
    """The operation that writes into its first argument, `_`, or into an argument `out`."""
    name, packet = op._overloadname, op.overloadpacket
    if kind == "_":
        return getattr(getattr(_aten, packet.__name__ + "_", None), name, None)
    like = lambda schema: [(arg.name, str(arg.type)) for arg in schema.arguments if arg.name != "out"]
    for found in [getattr(packet, each, None) for each in ("out", f"{name}_out")]:
        if found is not None and like(found._schema) == like(op._schema):
            return found
    return None


def _multiply_inside(node: fx.Node) -> None:
    """Let a sum multiply a term itself, by a number, and two factors if the term is their product."""
    if "value" not in node.meta or node.meta["value"].dtype not in (torch.float32, torch.float64) or node.kwargs:
        return
    sign = 1 if node.target is _aten.add.Tensor else -1
    for place in (1, 0) if sign > 0 else (1,):
        term: Any = node.args[place]
        other = node.args[1 - place]
        if term is other or not _only_for(node, term) or not isinstance(other, fx.Node) or not _same_kind(node, other):
            continue
        by, inner = 1.0, term
        if term.target is _aten.mul.Tensor and isinstance(term.args[1], (int, float)):
            inner, by = term.args
        if inner is not term and _same_kind(node, inner):
            node.args, node.kwargs = (other, inner), {"alpha": by}
            node.graph.erase_node(term)
        factors = _factors(inner) if _only_for(node, inner) else ()
        if factors and all([_same_kind(node, factor) for factor in factors]):
            node.target, node.args, node.kwargs = _aten.addcmul.default, (other, *factors), {"value": sign * by}
            node.graph.erase_node(inner)
        if node.kwargs:
            return


def _sum_of_products(node: fx.Node) -> None:
    """Let a sum over all entries of a vector multiply them itself; a magnitude is a number times its sign."""
    term: Any = node.args[0]
    if node.kwargs or list(term.users) != [node] or "value" not in term.meta:
        return
    made, factors = term.meta["value"], _factors(term)
    if term.target is _aten.abs.default:
        before = itertools.takewhile(lambda other: other is not node, node.graph.nodes)
        signs = [other for other in before if other.target is _aten.sign.default and other.args == term.args]
        factors = (*term.args, *signs[:1])
    found = [factor.meta.get("value") or factor.meta.get("read") for factor in factors if isinstance(factor, fx.Node)]
    same = [x is not None and (x.shape, x.dtype) == (made.shape, made.dtype) for x in found]
    if made.dtype in (torch.float32, torch.float64) and same == [True, True]:
        node.target, node.args = _aten.dot.default, tuple(factors)
        node.graph.erase_node(term)


def _only_for(node: fx.Node, term: Any) -> bool:
    """Whether a term is made for nothing but a sum of its kind."""
    return isinstance(term, fx.Node) and list(term.users) == [node] and _same_kind(node, term)


def _factors(term: Any) -> tuple[Any, ...]:
    """Two tensors of which a term is the product."""
    if term.target is _aten.mul.Tensor and isinstance(term.args[1], fx.Node):
        return term.args
    return (term.args[0],) * 2 if term.target is _aten.pow.Tensor_Scalar and term.args[1] == 2 else ()


def without_nan(module: fx.GraphModule) -> fx.GraphModule | None:
    """A module that is right if what it returns is not NaN, or None if that is no less work, or proves nothing.

    Signs then need no care for NaN. It reads nothing that it writes, so that the other one can be run after it.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.find_nodes(op="placeholder"):
        if "read" in node.meta:
            node.meta["value"] = node.meta["read"]  # Sums may multiply it themselves, and round once.
    careful = [node for node in graph.nodes if node.target is _aten.where.self and _nan_of(node) is not None]
    for copy in graph.nodes:
        if copy.target is _aten.copy_.default and list(copy.args[0].users) != [copy]:
            return None
    for node in careful:
        if not _is_told(node.args[1]):
            return None
        node.replace_all_uses_with(node.args[2])
        unequal = node.args[0]
        graph.erase_node(node)
        if not unequal.users:
            graph.erase_node(unequal)
    return fx.GraphModule(torch.nn.Module(), graph) if careful else None


#: What is NaN where its first argument is, or any of them.
_CARRY_NAN = (_aten.abs.default, _aten.neg.default, _aten.mul.Tensor, _aten.add.Tensor, _aten.sub.Tensor)
_CARRY_NAN += (_aten.div.Tensor, _aten.sqrt.default, _aten.sum.default)


def _is_told(x: fx.Node) -> bool:
    """Whether something that a graph returns is NaN if an entry is."""
    reached = [x]
    for node in reached:  # Which grows meanwhile.
        if any([user.op == "output" for user in node.users]):
            return True
        reached += [user for user in node.users if user.target in _CARRY_NAN and user not in reached]
    return False


def _nan_of(node: fx.Node) -> fx.Node | None:
    """What a `where` takes where that is NaN."""
    unequal, x, value = node.args
    if not isinstance(unequal, fx.Node) or not isinstance(value, fx.Node) or not isinstance(x, fx.Node):
        return None
    if "value" not in node.meta or not _same_kind(node, value) or node.meta["value"].dtype.is_complex:
        return None
    signs = value.target in (_aten.sign.default, _aten.sgn.default)
    return x if signs and unequal.target is _aten.ne.Tensor and unequal.args == (x, x) else None


def _needed(nodes: Sequence[Node], wanted: Iterable[Value]) -> tuple[list[Node], set[Value]]:
    """The nodes that some values need, and all values that these nodes take or make."""
    needed, found = set(wanted), []
    for node in reversed(nodes):
        if any([value in needed for value in node.outputs]):
            found.append(node)
            needed.update(node.inputs)
    return found[::-1], needed


def _part(
    group: Group,
    out: list[int],
    last: bool,
    in_place: bool,
    fitted: Callable[[Group, list[Node], set[Value]], list[Node]],
) -> _Part:
    home = group.first
    writes = home.writes if last else []
    ends = [*(home.exports[i] for i in out), *(value for _, value in writes)]
    nodes, needed = _needed(home.nodes, ends)
    mine = {*home.inputs, *(value for node in home.nodes for value in node.outputs)}
    nodes = fitted(group, nodes, mine)
    mine.update(value for node in nodes for value in node.outputs)
    places = [home.inputs.index(place) for place, _ in writes]
    read = {i for i, value in enumerate(home.inputs) if value in needed}
    reads = sorted(read.union(places) if in_place else read or [0])
    inputs = [home.inputs[i] for i in reads]
    scalars = outer = list(dict.fromkeys(value for node in nodes for value in node.inputs if value not in mine))
    if group.stacked:
        nodes, inputs, outer, ends = _mapped(len(group.homes), nodes, inputs, scalars, ends)
    return _Part(group, out, reads, places, scalars, nodes, inputs, outer, ends)


def _kernel(parts: list[_Part], calls: list[tuple[list[int], list[Value]]], in_place: bool) -> Kernel:
    """One graph of what some groups do: inputs, scalars, then places to write into unless these are the inputs."""
    emitter = _Emitter()
    taken = [dict(zip(part.reads, [emitter.input(value) for value in part.inputs], strict=True)) for part in parts]
    scalars = {value: emitter.input() for value in dict.fromkeys(value for part in parts for value in part.scalars)}
    places = [
        [found[i] if in_place else emitter.input() for i in part.places]
        for part, found in zip(parts, taken, strict=True)
    ]
    results, pairs = [], []
    for part, targets in zip(parts, places, strict=True):
        emitter.values.update((inner, scalars[value]) for inner, value in zip(part.outer, part.scalars, strict=True))
        emitter.run(part.nodes)
        values = [emitter.values[value] for value in part.ends]
        results += values[: len(part.out)]
        pairs += zip(targets, values[len(part.out) :], strict=True)
    emitter.store(pairs)
    reads, writes = [part.reads for part in parts], [part.places for part in parts]
    first = parts[0].group
    return Kernel(emitter.module(results), first.flat, first.kin, reads, list(scalars), writes, calls)


def _narrowed(node: Node, mine: set[Value], narrow: Callable[[Value, torch.dtype], Value]) -> Node:
    """A node with scalars in the precision it computes with, as they are where a tensor meets a scalar."""
    dtypes = {value.dtype for value in node.inputs if value in mine}
    if dtypes != {torch.float32}:
        return node
    fit = lambda x: narrow(x, torch.float32) if x not in mine and x.dtype == torch.float64 else x
    args = tuple([replaced(arg, fit) for arg in node.args])
    kwargs = {name: replaced(arg, fit) for name, arg in node.kwargs.items()}
    return Node(node.op, args, kwargs, node.outputs, node.several)


def _multiplied(node: Node, mine: set[Value], inverse: Callable[[Value], list[Value]]) -> list[Node]:
    """A float32 division by a scalar as products, which take a fraction of the time."""
    if node.op is not _aten.div.Tensor or node.outputs[0].dtype != torch.float32:
        return [node]
    x, by = node.args
    if not isinstance(x, Value) or x not in mine or not isinstance(by, Value) or by in mine or by.dtype.is_complex:
        return [node]
    large, small = inverse(by)
    between = Value(x.shape, torch.float32, x.device)
    first = Node(_aten.mul.Tensor, (x, large), {}, [between], several=False)
    return [first, Node(_aten.mul.Tensor, (between, small), {}, node.outputs, several=False)]


def _split_inverse(x: Tensor) -> list[Tensor]:
    """Two float32 factors of 1 / x, the second of them 1 unless the inverse is beyond what float32 holds exactly."""
    whole = x.double().reciprocal()
    first = whole.abs().clamp(2.0**-126, 2.0**127).copysign(whole)
    return [first.float(), (whole / first).float()]


def _mapped(
    count: int, nodes: list[Node], inputs: list[Value], scalars: list[Value], ends: list[Value]
) -> tuple[list[Node], list[Value], list[Value], list[Value]]:
    """A home mapped over the stack of all homes like it: nodes, inputs, scalars and ends of that."""

    def one(*tensors: Tensor) -> tuple[Tensor, ...]:
        values: dict[Value, Any] = dict(zip([*inputs, *scalars], tensors, strict=True))
        for node in nodes:
            node.run(values)
        return tuple([values[value] for value in ends])

    stacks, shared = [stand_in(value, count) for value in inputs], [stand_in(value) for value in scalars]
    dims = (0,) * len(stacks) + (None,) * len(shared)
    found = record(vmap(one, in_dims=dims), *stacks, *shared)
    return found.nodes, found.inputs[: len(stacks)], found.inputs[len(stacks) :], found.outputs


def _scalars(nodes: list[Node], wanted: set[Value]) -> Scalars | None:
    if not nodes:
        return None
    made = {value for node in nodes for value in node.outputs}
    takes = list(dict.fromkeys(value for node in nodes for value in node.inputs if value not in made))
    makes = [value for node in nodes for value in node.outputs if value in wanted]
    emitter = _Emitter()
    for value in takes:
        emitter.input(value)
    emitter.run(nodes)
    return Scalars(emitter.module([emitter.values[value] for value in makes]), takes, makes)
