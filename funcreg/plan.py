"""A recorded step at work: where leaves lie, what is copied together, and the calls of kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg import undocumented
from funcreg.grouping import group
from funcreg.lowering import Buffer, Compiler, Kernel, KernelCall, Lowering, arrange, packed_members
from funcreg.memory import Joined, Layout, Memory, Part, Pool
from funcreg.recording import Record, Value

#: A group, and which input of its members.
_Key = tuple[int, int]


@dataclass
class Call:
    """The tensors of one call: parameters, gradients, state, extra and captured tensors, in one list.

    They are neither negated nor conjugated.
    """

    arguments: list[Tensor]
    memories: list[Memory | None]  # In which parameters, state and gradients lie, where they are packed.
    out: list[Memory] = field(default_factory=list)  # For parameters and state, if they are not written in place.
    copies: dict[Any, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)  # Of leaves to write: all, and each.
    scratch: dict[Any, Any] = field(default_factory=dict)
    #: For calls of kernels the leaves that they read where these lie; the same for all calls at the same addresses.
    views: dict[KernelCall, list[tuple[int, Tensor]]] = field(default_factory=dict)


class _Input(NamedTuple):
    """Leaves that a kernel reads as one tensor."""

    key: tuple[int, int, int]  # The group, which input of its members, and the first member.
    sources: list[int]  # Their arguments.
    shape: tuple[int, ...]
    flat: bool
    is_written: bool


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
        loose: Whether parameters are written where they are, beside a state that is packed.
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
        loose: bool = False,
    ) -> None:
        grouping = group(found, params, gradients, written)
        arrange(grouping)
        self._groups, self.in_place, self._compiler = grouping.groups, in_place, compiler
        self.captured = [x for _, x in found.captured]
        self._likes = [(tuple(value.shape), value.dtype, value.device) for value, _ in found.captured]
        inputs = [*found.inputs, *(value for value, _ in found.captured)]
        self._numbers = {value: i for i, value in enumerate(inputs)}
        #: For each result, the argument whose place it takes.
        self.places = [-1 if value is None else self._numbers[value] for value in written]
        likes = [value if place is None else place for value, place in zip(found.outputs, written, strict=True)]
        stays = lambda i, value: in_place and value is written[i]  # As the strengths that a step holds.
        self._unpacked = [
            (i, value, likes[i].dtype) for i, value in grouping.unpacked_outputs.items() if not stays(i, value)
        ]
        self._sources: dict[_Key, list[int]] = {}  # For each input of each group, the arguments of its members.
        self._written: set[_Key] = set()  # Those whose places kernels write.
        #: The first parameter, the first leaf of the state and the first gradient among the arguments.
        self.begins = (0, params + gradients, params)
        parts, self._loose = self._parts(loose), loose
        #: Memory for parameters, for state, and for gradients.
        self.pools = [Pool(Layout(each, sum(map(len, parts[:i]))), keeps) for i, each in enumerate(parts)]
        self._joins: dict[Any, Joined] = {}
        self._program = Lowering(grouping, in_place).program()
        for kernel in [kernel for _, kernels in self._program.stages for kernel in kernels]:
            for kernel_call in [*kernel.calls[False], *kernel.calls[True]]:
                kernel_call.inputs = [self._input(kernel_call.buffers[which], slot) for which, slot in kernel.reads]
        self._takes = [value for value in self._program.takes if value in self._numbers]
        self._scratch: list[dict[Any, Any]] = []  # Each is used by one call at a time.

    def _parts(self, loose: bool) -> tuple[list[Part], ...]:
        """What is packed of parameters, of the state, and of gradients."""
        parts: tuple[list[Part], ...] = ([], [], [])
        for number, each in enumerate(self._groups):
            places = {place for place, _ in each.first.writes}
            count = packed_members(each) if loose else len(each.members)
            for slot, value in enumerate(each.first.inputs):
                key, sources = (number, slot), [self._numbers[member.inputs[slot]] for member in each.members]
                self._sources[key] = sources
                if value in places:
                    self._written.add(key)
                elif value.role != "gradient":
                    continue
                which = 2 if value not in places else 0 if value.role == "parameter" else 1
                shapes = [tuple(member.inputs[slot].shape) for member in each.members[:count]]
                positions = [source - self.begins[which] for source in sources[:count]]
                parts[which].append(Part(key, value.dtype, value.device, positions, shapes))
        return parts

    def _input(self, buffer: Buffer, slot: int) -> _Input:
        sources = self._sources[buffer.group, slot][buffer.start : buffer.start + buffer.count]
        is_written = self.in_place and (buffer.group, slot) in self._written
        key = (buffer.group, slot, buffer.start)
        return _Input(key, sources, self._shape(buffer, slot), self._groups[buffer.group].flat, is_written)

    @property
    def is_valid(self) -> bool:
        """Whether captured tensors are of the shapes and dtypes that were recorded."""
        return all(
            [(tuple(x.shape), x.dtype, x.device) == like for x, like in zip(self.captured, self._likes, strict=True)]
        )

    def packed_arguments(self, which: int) -> list[int]:
        """The arguments that may lie in the memory of a pool."""
        return [self.begins[which] + position for position in self.pools[which].layout.positions]

    def run(self, call: Call) -> list[Tensor]:
        """The results, in their order; none where they are written in place."""
        call.out = [] if self.in_place else [pool.take() for pool in self.pools[:2]]
        try:
            call.scratch = self._scratch.pop()
        except IndexError:
            call.scratch = {}
        values = self._run(call)
        self._scratch[:] = [call.scratch]
        unpacked: dict[int, Tensor] = {}
        for position, value, dtype in self._unpacked:
            x = values[value]
            # A copy of what may share memory with an argument, which may be written before it is read.
            x = x.clone(memory_format=torch.contiguous_format) if value.may_alias else x
            unpacked[position] = x.to(dtype)
        if self.in_place:
            for position, x in unpacked.items():
                call.arguments[self.places[position]].copy_(x)
            self._write_back(call)
            return []
        results = [leaf for pool, memory in zip(self.pools, call.out, strict=False) for leaf in pool.lend(memory)]
        for position in sorted(unpacked):
            results.insert(position, unpacked[position])
        return results

    def _run(self, call: Call) -> dict[Value, Tensor]:
        """All scalars, and what no kernel writes."""
        missing = [
            m is None and pool.layout.anchor is not None for m, pool in zip(call.memories, self.pools, strict=True)
        ]
        whole = call.memories[0] is not None and not any(missing)  # Then each flat group is one vector.
        values = {value: call.arguments[self._numbers[value]].contiguous() for value in self._takes}
        for scalars, kernels in self._program.stages:
            if scalars is not None:
                takes = [values[value] for value in scalars.takes]
                if scalars.compiled is None:
                    scalars.compiled = self._compiler(scalars.graph, takes)
                values.update(zip(scalars.makes, scalars.compiled(*takes), strict=True))
            for kernel in kernels:
                taken = [values[value] for value in kernel.scalars]
                made = [self._run_kernel(kernel, each, taken, call) for each in kernel.calls[whole]]
                if kernel.results:
                    columns = zip(*made, strict=True)
                    sums = made[0] if len(made) == 1 else [torch.stack(x).sum(dtype=x[0].dtype) for x in columns]
                    values.update(zip(kernel.results, sums, strict=True))
        return values

    def _run_kernel(self, kernel: Kernel, kernel_call: KernelCall, scalars: list[Tensor], call: Call) -> Any:
        args = self._views(call.memories, kernel_call, kernel.reads)
        for i, view in call.views.get(kernel_call, ()):
            args[i] = view
        for i, x in enumerate(args):
            if x is None:
                args[i] = self._read(call, i, kernel_call.inputs[i])
        if self._loose and kernel_call not in call.views:
            alone = lambda x: x.is_written and len(x.sources) == 1 and x.key not in call.copies
            call.views[kernel_call] = [(i, args[i]) for i, x in enumerate(kernel_call.inputs) if alone(x)]
        args += scalars
        if call.out:
            args += self._views(call.out, kernel_call, kernel.writes)
        if kernel_call.compiled is None:
            kernel_call.compiled = self._compiler(kernel.graph, args, kernel.flat, kernel.shape_polymorphic)
        return kernel_call.compiled(*args)

    def _views(
        self, memories: Sequence[Memory | None], kernel_call: KernelCall, slots: list[tuple[int, int]]
    ) -> list[Any]:
        """What of the inputs of a call, or of what it writes, lies in packed memory, and None for the rest."""
        found: list[Any] = [None] * len(slots)
        for memory in memories:
            if memory is None:
                continue
            key = (kernel_call, id(slots))
            if key not in memory.views:
                with torch.inference_mode(False):
                    rows = [(kernel_call.buffers[which], slot) for which, slot in slots]
                    memory.views[key] = [(i, self._view(memory, *row)) for i, row in enumerate(rows)]
                    memory.views[key] = [(i, view) for i, view in memory.views[key] if view is not None]
            for i, view in memory.views[key]:
                found[i] = view
        return found

    def _view(self, memory: Memory, buffer: Buffer, slot: int) -> Tensor | None:
        vector = memory.vectors.get((buffer.group, slot))
        if vector is None:
            return None
        if self._groups[buffer.group].flat:
            if buffer.before + buffer.entries > len(vector):  # Large leaves beside loose parameters.
                return None
            vector = vector[buffer.before : buffer.before + buffer.entries]
        return vector.view(self._shape(buffer, slot))

    def _shape(self, buffer: Buffer, slot: int) -> tuple[int, ...]:
        each = self._groups[buffer.group]
        shape = each.first.inputs[slot].shape
        return (buffer.entries,) if each.flat else (buffer.count, *shape) if each.stacked else shape

    def _read(self, call: Call, i: int, given: _Input) -> Tensor:
        """The leaf that a kernel reads, or a copy of leaves together; the i-th input of its kernel."""
        key, sources, shape, flat, is_written = given
        if key in call.copies:
            return call.copies[key][0]
        leaves = [call.arguments[source] for source in sources]
        if len(leaves) == 1:
            data = leaves[0].contiguous().view(shape)
            if is_written and not leaves[0].is_contiguous():
                call.copies[key] = data, [data.view(leaves[0].shape)]
            return data
        # What is only read is copied for one call of a kernel after the other, into the same memory.
        data = _vector(call.scratch, key if is_written or not flat else i, math.prod(shape), leaves[0]).view(shape)
        if flat:
            if key not in self._joins:
                self._joins[key] = Joined([leaf.shape for leaf in leaves])
            self._joins[key].join(leaves, data)
        else:
            torch.stack(leaves, out=data)
        if is_written:
            parts = call.scratch.get(key)
            if parts is None:
                parts = self._joins[key].split(data) if flat else list(data)
                if data.device.type == "cpu":  # They lie there in the next call, too.
                    call.scratch[key] = parts
            call.copies[key] = data, parts
        return data

    def _write_back(self, call: Call) -> None:
        """Write what kernels wrote into copies of leaves back into the leaves."""
        places: list[Tensor] = []
        parts: list[Tensor] = []
        for (number, slot, start), (_, copies) in call.copies.items():
            places += [call.arguments[source] for source in self._sources[number, slot][start : start + len(copies)]]
            parts += copies
        undocumented.copy_all(places, parts)


def _vector(scratch: dict[Any, Tensor], name: Any, entries: int, like: Tensor) -> Tensor:
    """Memory for copies of leaves; on a CPU the same name has the same memory from call to call."""
    if like.device.type != "cpu":  # Whose allocators know of streams and graphs.
        return torch.empty(entries, dtype=like.dtype, device=like.device)
    found = scratch.get((name, like.dtype))
    if found is None or len(found) < entries:
        with torch.inference_mode(False):
            found = scratch[name, like.dtype] = torch.empty(entries, dtype=like.dtype, device="cpu")
    return found[:entries]
