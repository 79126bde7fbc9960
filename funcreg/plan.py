"""A recorded step at work: where leaves lie, what is copied together, and the calls of kernels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcreg.grouping import Group, group
from funcreg.lowering import Buffer, Compiler, Kernel, Lowering, arrange
from funcreg.memory import Layout, Memory, Part, Pool
from funcreg.recording import Record, Value

#: A group, and which input of its members.
_Key = tuple[int, int]


class Plan:
    """The kernels of a recorded step, and memory for its results.

    Arguments are parameters, gradients, state, extra tensors and captured tensors, in one list.

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
        grouping = group(found, params, gradients, written)
        arrange(grouping)
        self.in_place, self._compiler, self._grouping = in_place, compiler, grouping
        self.captured = [x for _, x in found.captured]
        inputs = [*found.inputs, *(value for value, _ in found.captured)]
        self._numbers = {value: i for i, value in enumerate(inputs)}
        #: For each result, the argument whose place it takes.
        self.places = [self._numbers[value] if value is not None else -1 for value in written]
        dtypes = [
            value.dtype if place is None else place.dtype for value, place in zip(found.outputs, written, strict=True)
        ]
        self._unpacked = [(i, value, dtypes[i]) for i, value in grouping.unpacked_outputs.items()]
        #: For each input of each group, the arguments of its members.
        self._sources = {
            (number, slot): [self._numbers[member.inputs[slot]] for member in each.members]
            for number, each in enumerate(grouping.groups)
            for slot in range(len(each.first.inputs))
        }
        self._joins: dict[Any, Callable[[list[Tensor], Tensor], Any]] = {}
        position_of = {argument: position for position, argument in enumerate(self.places)}
        #: What kernels write, and where each leaf of it stands among the results.
        self._kept = {
            (number, slot): [position_of[argument] for argument in self._sources[number, slot]]
            for number, each in enumerate(grouping.groups)
            for slot in sorted({each.first.inputs.index(place) for place, _ in each.first.writes})
        }
        read = {
            key: [argument - params for argument in arguments]
            for key, arguments in self._sources.items()
            if params <= arguments[0] < params + gradients
        }
        self.results = Pool(Layout([self._part(key, positions) for key, positions in self._kept.items()]), keeps)
        self.gradients = Pool(Layout([self._part(key, positions) for key, positions in read.items()]))
        self._in_gradients = frozenset(read)
        #: The arguments that may lie in memory of results, and of gradients.
        self.kept = [self.places[position] for position in self.results.layout.positions]
        self.read = [params + position for position in self.gradients.layout.positions]
        self._programs = {False: self._program(whole=False)}
        self._scratch: list[_Scratch] = []  # Each is used by one call at a time.

    def _program(self, whole: bool) -> _Program:
        stages = Lowering(self._grouping, self.in_place, whole).program()
        return _Program(stages, self._numbers, [value for _, value, _ in self._unpacked])

    def group(self, key: _Key) -> Group:
        """The group of an input."""
        return self._grouping.groups[key[0]]

    def _part(self, key: _Key, positions: list[int]) -> Part:
        values = [member.inputs[key[1]] for member in self.group(key).members]
        shapes = tuple([tuple(value.shape) for value in values])
        return Part(key, values[0].dtype, values[0].device, tuple(positions), shapes)

    def run(self, arguments: list[Tensor], memory: Memory | None, gradients: Memory | None = None) -> list[Tensor]:
        """The results, in their order; none where they are written in place.

        Args:
            arguments: Tensors that are neither negated nor conjugated.
            memory: That in which parameters and state lie, if they do.
            gradients: That in which gradients lie, if they do.
        """
        whole = memory is not None and gradients is not None
        if whole not in self._programs:
            self._programs[whole] = self._program(whole)
        try:
            scratch = self._scratch.pop()
        except IndexError:
            scratch = _Scratch()
        call = _Call(self, arguments, memory, gradients, None if self.in_place else self.results.take(), scratch)
        values = self._programs[whole].run(call, self._compiler)
        self._scratch[:] = [scratch]
        unpacked: dict[int, Tensor] = {}
        for position, value, dtype in self._unpacked:
            x = values[value]
            # A copy of what may share memory with an argument, which may be written before it is read.
            x = x.clone(memory_format=torch.contiguous_format) if value.may_alias else x
            unpacked[position] = x.to(dtype)
        if call.out is None:
            for position, x in unpacked.items():
                arguments[self.places[position]].copy_(x)
            call.write_back()
            return []
        lent = iter(self.results.lend(call.out))
        return [unpacked[i] if i in unpacked else next(lent) for i in range(len(self.places))]

    def sources(self, buffer: Buffer, slot: int) -> list[int]:
        """The arguments of which an input of a buffer is made."""
        return self._sources[buffer.group, slot][buffer.start : buffer.start + buffer.count]

    def shape(self, buffer: Buffer, slot: int) -> tuple[int, ...]:
        """The shape of an input of a buffer."""
        each = self._grouping.groups[buffer.group]
        if each.flat:
            return (buffer.entries,)
        shape = each.first.inputs[slot].shape
        return (buffer.count, *shape) if each.stacked else shape

    def join(self, buffer: Buffer, slot: int, leaves: list[Tensor], out: Tensor) -> None:
        """Copy leaves into one buffer."""
        key = (buffer.group, slot, buffer.start, buffer.count)
        if key not in self._joins:
            self._joins[key] = _joiner([leaf.shape for leaf in leaves]) if self.group(key[:2]).flat else _stack
        self._joins[key](leaves, out)

    def lies_in(self, key: _Key, memory: Memory | None, gradients: Memory | None) -> Memory | None:
        """The memory in which an input lies, of that of parameters and state and that of gradients."""
        return memory if key in self._kept else gradients if key in self._in_gradients else None

    def is_written(self, key: _Key) -> bool:
        """Whether kernels write in the place of an input."""
        return key in self._kept


class _Program:
    """Scalars and kernels of a plan, stage by stage."""

    def __init__(self, stages: Any, numbers: dict[Value, int], unpacked: list[Value]) -> None:
        self._stages = stages
        taken = {value for scalars, _ in stages if scalars for value in scalars.takes}
        taken |= {value for _, kernels in stages for kernel in kernels for value in kernel.scalars}
        self._given = [(value, numbers[value]) for value in taken.union(unpacked) if value in numbers]

    def run(self, call: _Call, compiler: Compiler) -> dict[Value, Tensor]:
        """All scalars, and what no kernel writes."""
        values: dict[Value, Tensor] = {value: call.arguments[i].contiguous() for value, i in self._given}
        for scalars, kernels in self._stages:
            if scalars is not None:
                takes = [values[value] for value in scalars.takes]
                if scalars.compiled is None:
                    scalars.compiled = compiler(scalars.graph, takes, any_size=False, polymorphic=False)
                values.update(zip(scalars.makes, scalars.compiled(*takes), strict=True))
            for kernel in kernels:
                self._run_kernel(kernel, values, call, compiler)
        return values

    def _run_kernel(self, kernel: Kernel, values: dict[Value, Tensor], call: _Call, compiler: Compiler) -> None:
        taken = [values[value] for value in kernel.scalars]
        for number, (buffers, results) in enumerate(kernel.calls):
            args = [call.input(i, buffers[which], slot) for i, (which, slot) in enumerate(kernel.reads)]
            args += taken
            if call.out is not None:
                args += [call.view(call.out, buffers[which], slot) for which, slot in kernel.writes]
            if number == len(kernel.compiled):
                kernel.compiled.append(compiler(kernel.graph, args, kernel.flat, kernel.polymorphic))
            made = kernel.compiled[number](*args)
            if results:
                values.update(zip(results, made, strict=True))


class _Call:
    """The tensors of one call of a plan."""

    def __init__(
        self,
        plan: Plan,
        arguments: list[Tensor],
        memory: Memory | None,
        gradients: Memory | None,
        out: Memory | None,
        scratch: _Scratch,
    ) -> None:
        self._plan, self.arguments, self.out = plan, arguments, out
        self._memory, self._gradients, self._scratch = memory, gradients, scratch
        self._copies: dict[Any, tuple[Buffer, int, Tensor]] = {}  # Of leaves that are written.

    def view(self, memory: Memory, buffer: Buffer, slot: int) -> Tensor:
        """An input of a buffer that lies in some memory."""
        key = (buffer.group, slot, buffer.start, buffer.count)
        found = memory.views.get(key)
        if found is None:
            with torch.inference_mode(False):
                vector = memory.vectors[buffer.group, slot][buffer.before : buffer.before + buffer.entries]
                found = memory.views[key] = vector.view(self._plan.shape(buffer, slot))
        return found

    def input(self, i: int, buffer: Buffer, slot: int) -> Tensor:
        """An input of a buffer: where its leaves lie if they lie together, else a copy; the i-th of its kernel."""
        plan, key = self._plan, (buffer.group, slot)
        memory = plan.lies_in(key, self._memory, self._gradients)
        if memory is not None:
            return self.view(memory, buffer, slot)
        if (key, buffer.start) in self._copies:
            return self._copies[key, buffer.start][-1]
        leaves = [self.arguments[source] for source in plan.sources(buffer, slot)]
        shape = plan.shape(buffer, slot)
        written = plan.in_place and plan.is_written(key)
        if len(leaves) == 1:
            data = leaves[0].contiguous().view(shape)
        else:
            # What is only read is copied for one call of a kernel after the other, into the same memory.
            name = (key, buffer.start) if written or not self._plan.group(key).flat else i
            data = self._scratch.take(name, math.prod(shape), leaves[0].dtype, leaves[0].device).view(shape)
            plan.join(buffer, slot, leaves, data)
        if written:
            self._copies[key, buffer.start] = (buffer, slot, data)
        return data

    def write_back(self) -> None:
        """Write what kernels wrote into copies of leaves back into the leaves."""
        for buffer, slot, data in self._copies.values():
            leaves = [self.arguments[source] for source in self._plan.sources(buffer, slot)]
            if len(leaves) == 1 and data.data_ptr() == leaves[0].data_ptr():
                continue
            parts = data.view(-1).split([leaf.numel() for leaf in leaves])
            for leaf, part in zip(leaves, parts, strict=True):
                leaf.copy_(part.view(leaf.shape))


class _Scratch:
    """Memory for copies of leaves, used again from call to call on a CPU."""

    def __init__(self) -> None:
        self._vectors: dict[Any, Tensor] = {}

    def take(self, name: Any, entries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A vector; the same name has the same memory."""
        if device.type != "cpu":  # Whose allocators know of streams and graphs.
            return torch.empty(entries, dtype=dtype, device=device)
        found = self._vectors.get((name, dtype))
        if found is None or len(found) < entries:
            with torch.inference_mode(False):
                found = self._vectors[name, dtype] = torch.empty(entries, dtype=dtype, device=device)
        return found[:entries]


def _stack(leaves: list[Tensor], out: Tensor) -> None:
    torch.stack(leaves, out=out)


def _end_to_end(leaves: list[Tensor], out: Tensor) -> None:
    torch.cat([leaf.reshape(-1) for leaf in leaves], out=out)


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
    if 2 * len(runs) > len(shapes):
        return _end_to_end

    def join(leaves: list[Tensor], out: Tensor) -> None:
        for some, part, shape in runs:
            torch.cat(leaves[some], out=out[part].view(shape))

    return join
