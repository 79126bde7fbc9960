"""A recorded step at work: where leaves lie, what is copied together, and the calls of kernels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcreg.grouping import group
from funcreg.lowering import Buffer, Compiler, Kernel, Lowering, Program, arrange
from funcreg.memory import Layout, Memory, Part, Pool
from funcreg.recording import Record, Value

#: A group, and which input of its members.
_Key = tuple[int, int]


@dataclass
class Call:
    """The tensors of one call: parameters, gradients, state, extra and captured tensors, in one list.

    They are neither negated nor conjugated.
    """

    arguments: list[Tensor]
    memory: Memory | None = None  # In which parameters and state lie, if they lie where the plan puts them.
    gradients: Memory | None = None
    out: Memory | None = None  # For results that are not written in place.
    copies: dict[Any, tuple[Buffer, int, Tensor]] = field(default_factory=dict)  # Of leaves that are written.
    scratch: dict[Any, Tensor] = field(default_factory=dict)


class Plan:
    """The kernels of a recorded step, and memory for its results.

    Args:
        found: The record.
        params: Number of parameters.
        gradients: Number of gradients: as many, or none.
        written: For each result the input whose place it takes, or that it is like; None for one that is like none.
        in_place: Whether results are written into the arguments whose places they take.
        compiler: Compiles kernels.
        keeps: Whether memory is kept for the next result also while nobody holds an earlier one.
    """

    def __init__(
        self,
        found: Record,
        params: int,
        gradients: int,
        written: Sequence[Value | None],
        in_place: bool,
        compiler: Compiler,
        keeps: bool = False,
    ) -> None:
        self._grouping = group(found, params, gradients, written)
        arrange(self._grouping)
        self._groups, self.in_place, self._compiler = self._grouping.groups, in_place, compiler
        self.captured = [x for _, x in found.captured]
        self._likes = [(tuple(value.shape), value.dtype, value.device) for value, _ in found.captured]
        inputs = [*found.inputs, *(value for value, _ in found.captured)]
        self._numbers = {value: i for i, value in enumerate(inputs)}
        #: For each result, the argument whose place it takes.
        self.places = [-1 if value is None else self._numbers[value] for value in written]
        likes = [value if place is None else place for value, place in zip(found.outputs, written, strict=True)]
        self._unpacked = [(i, value, likes[i].dtype) for i, value in self._grouping.unpacked_outputs.items()]
        #: For each input of each group, the arguments of its members.
        self._sources: dict[_Key, list[int]] = {}
        self._kept: dict[_Key, list[int]] = {}  # Of these, the results whose places kernels write,
        read: dict[_Key, list[int]] = {}  # and the gradients.
        for number, each in enumerate(self._groups):
            places = {place for place, _ in each.first.writes}
            for slot, value in enumerate(each.first.inputs):
                key, sources = (number, slot), [self._numbers[member.inputs[slot]] for member in each.members]
                self._sources[key] = sources
                if value in places:
                    self._kept[key] = [self.places.index(source) for source in sources]
                elif params <= sources[0] < params + gradients:
                    read[key] = [source - params for source in sources]
        self._joins: dict[Any, Callable[[list[Tensor], Tensor], Any]] = {}
        self.results = Pool(Layout([self._part(key, positions) for key, positions in self._kept.items()]), keeps)
        self.gradients = Pool(Layout([self._part(key, positions) for key, positions in read.items()]))
        #: The arguments that may lie in memory of results, and of gradients.
        self.kept = [self.places[position] for position in self.results.layout.positions]
        self.read = [params + position for position in self.gradients.layout.positions]
        self._programs = {False: self._program(whole=False)}
        self._scratch: list[dict[Any, Tensor]] = []  # Each is used by one call at a time.

    def _program(self, whole: bool) -> Program:
        program = Lowering(self._grouping, self.in_place, whole).program()
        program.takes = [value for value in program.takes if value in self._numbers]
        return program

    def _part(self, key: _Key, positions: list[int]) -> Part:
        values = [member.inputs[key[1]] for member in self._groups[key[0]].members]
        return Part(key, values[0].dtype, values[0].device, positions, [tuple(value.shape) for value in values])

    @property
    def is_valid(self) -> bool:
        """Whether captured tensors are of the shapes and dtypes that were recorded."""
        return all(
            [(tuple(x.shape), x.dtype, x.device) == like for x, like in zip(self.captured, self._likes, strict=True)]
        )

    def run(self, call: Call) -> list[Tensor]:
        """The results, in their order; none where they are written in place."""
        whole = call.memory is not None and call.gradients is not None
        if whole not in self._programs:
            self._programs[whole] = self._program(whole)
        call.out = None if self.in_place else self.results.take()
        try:
            call.scratch = self._scratch.pop()
        except IndexError:
            call.scratch = {}
        values = self._run(self._programs[whole], call)
        self._scratch[:] = [call.scratch]
        unpacked: dict[int, Tensor] = {}
        for position, value, dtype in self._unpacked:
            x = values[value]
            # A copy of what may share memory with an argument, which may be written before it is read.
            x = x.clone(memory_format=torch.contiguous_format) if value.may_alias else x
            unpacked[position] = x.to(dtype)
        if call.out is None:
            for position, x in unpacked.items():
                call.arguments[self.places[position]].copy_(x)
            self._write_back(call)
            return []
        results = self.results.lend(call.out)
        for position in sorted(unpacked):
            results.insert(position, unpacked[position])
        return results

    def _run(self, program: Program, call: Call) -> dict[Value, Tensor]:
        """All scalars, and what no kernel writes."""
        values = {value: call.arguments[self._numbers[value]].contiguous() for value in program.takes}
        for scalars, kernels in program.stages:
            if scalars is not None:
                takes = [values[value] for value in scalars.takes]
                if scalars.compiled is None:
                    scalars.compiled = self._compiler(scalars.graph, takes)
                values.update(zip(scalars.makes, scalars.compiled(*takes), strict=True))
            for kernel in kernels:
                self._run_kernel(kernel, values, call)
        return values

    def _run_kernel(self, kernel: Kernel, values: dict[Value, Tensor], call: Call) -> None:
        taken = [values[value] for value in kernel.scalars]
        for number, (buffers, results) in enumerate(kernel.calls):
            args = self._views(call.memory, kernel, number, kernel.reads)
            for i, (which, slot) in enumerate(kernel.reads):
                if args[i] is None:
                    args[i] = self._input(call, i, buffers[which], slot)
            args += taken
            if call.out is not None:
                args += self._views(call.out, kernel, number, kernel.writes)
            compiled = kernel.compiled.get(number)
            if compiled is None:
                compiled = self._compiler(kernel.graph, args, kernel.flat, kernel.shape_polymorphic)
                kernel.compiled[number] = compiled
            made = compiled(*args)
            if results:
                values.update(zip(results, made, strict=True))

    def _views(self, memory: Memory | None, kernel: Kernel, number: int, slots: list[tuple[int, int]]) -> list[Any]:
        """Inputs of a call that lie in some memory of results, and None for others; made once for each memory."""
        if memory is None:
            return [None] * len(slots)
        key = (id(kernel), number, slots is kernel.writes)
        if key not in memory.views:
            buffers = kernel.calls[number][0]
            with torch.inference_mode(False):
                memory.views[key] = [self._view(memory, buffers[which], slot) for which, slot in slots]
        return memory.views[key].copy()

    def _view(self, memory: Memory, buffer: Buffer, slot: int) -> Tensor | None:
        vector = memory.vectors.get((buffer.group, slot))
        if vector is None:
            return None
        part = vector[buffer.before : buffer.before + buffer.entries] if self._groups[buffer.group].flat else vector
        return part.view(self._shape(buffer, slot))

    def _shape(self, buffer: Buffer, slot: int) -> tuple[int, ...]:
        each = self._groups[buffer.group]
        shape = each.first.inputs[slot].shape
        return (buffer.entries,) if each.flat else (buffer.count, *shape) if each.stacked else shape

    def _leaves(self, call: Call, buffer: Buffer, slot: int) -> list[Tensor]:
        sources = self._sources[buffer.group, slot][buffer.start : buffer.start + buffer.count]
        return [call.arguments[source] for source in sources]

    def _input(self, call: Call, i: int, buffer: Buffer, slot: int) -> Tensor:
        """An input of a buffer: where its leaves lie if they lie together, else a copy; the i-th of its kernel."""
        key = (buffer.group, slot)
        if call.gradients is not None and (found := self._view(call.gradients, buffer, slot)) is not None:
            return found
        if (key, buffer.start) in call.copies:
            return call.copies[key, buffer.start][-1]
        leaves, shape = self._leaves(call, buffer, slot), self._shape(buffer, slot)
        written = self.in_place and key in self._kept
        if len(leaves) == 1:
            data = leaves[0].contiguous().view(shape)
        else:
            # What is only read is copied for one call of a kernel after the other, into the same memory.
            name = (key, buffer.start) if written or not self._groups[buffer.group].flat else i
            data = _vector(call.scratch, name, math.prod(shape), leaves[0]).view(shape)
            join = self._joins.get((*key, buffer.start))
            if join is None:
                shapes = [leaf.shape for leaf in leaves]
                join = _joiner(shapes) if self._groups[buffer.group].flat else _stack
                self._joins[(*key, buffer.start)] = join
            join(leaves, data)
        if written:
            call.copies[key, buffer.start] = (buffer, slot, data)
        return data

    def _write_back(self, call: Call) -> None:
        """Write what kernels wrote into copies of leaves back into the leaves."""
        for buffer, slot, data in call.copies.values():
            leaves = self._leaves(call, buffer, slot)
            if len(leaves) == 1 and data.data_ptr() == leaves[0].data_ptr():
                continue
            for leaf, part in zip(leaves, data.view(-1).split([x.numel() for x in leaves]), strict=True):
                leaf.copy_(part.view(leaf.shape))


def _vector(scratch: dict[Any, Tensor], name: Any, entries: int, like: Tensor) -> Tensor:
    """Memory for copies of leaves; on a CPU the same name has the same memory from call to call."""
    if like.device.type != "cpu":  # Whose allocators know of streams and graphs.
        return torch.empty(entries, dtype=like.dtype, device=like.device)
    found = scratch.get((name, like.dtype))
    if found is None or len(found) < entries:
        with torch.inference_mode(False):
            found = scratch[name, like.dtype] = torch.empty(entries, dtype=like.dtype, device="cpu")
    return found[:entries]


def _stack(leaves: list[Tensor], out: Tensor) -> None:
    torch.stack(leaves, out=out)


def _joiner(shapes: list[torch.Size]) -> Callable[[list[Tensor], Tensor], None]:
    """What copies leaves of some shapes into a vector, end to end.

    Neighbours that differ in their first dimension alone are put together as they are: to see each leaf as a vector
    first takes longer than to copy a small one.
    """
    runs: list[tuple[slice, slice, tuple[int, ...]]] = []
    start = entries = 0
    for tail, run in itertools.groupby(shapes, key=lambda shape: shape[1:]):
        heads = [shape[0] for shape in run]
        size = sum(heads) * math.prod(tail)
        runs.append((slice(start, start + len(heads)), slice(entries, entries + size), (sum(heads), *tail)))
        start, entries = start + len(heads), entries + size

    def join(leaves: list[Tensor], out: Tensor) -> None:
        if 2 * len(runs) > len(shapes):
            torch.cat([leaf.reshape(-1) for leaf in leaves], out=out)
            return
        for some, part, shape in runs:
            torch.cat(leaves[some], out=out[part].view(shape))

    return join
