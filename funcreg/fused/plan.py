"""A recorded step at work: where leaves lie, what is copied together, and the calls of kernels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcreg.core import undocumented
from funcreg.fused.grouping import Group, group
from funcreg.fused.lowering import Compiler, Kernel, Lowering
from funcreg.fused.memory import Part, Pieces, Vector
from funcreg.fused.recording import Record, Value

#: Entries from which a leaf is computed with where it lies, and of the longest vector of leaves copied together.
SEPARATE = {"cpu": (40_000, 1_000_000)}
SEPARATE_ELSEWHERE = (4_000_000, (1 << 31) - 1)


@dataclass(eq=False)
class Operand:
    """Leaves that a kernel takes as one tensor: one alone, or several end to end or stacked."""

    sources: list[int]  # Their arguments.
    pieces: Pieces
    shape: tuple[int, ...]  # Of that tensor.
    part: Part | None  # In whose vectors they may lie,
    entries: slice  # and where in them.
    is_written: bool
    #: On a CPU, memory of earlier copies of them: together, and each.
    free: list[tuple[Tensor, list[Tensor]]] = field(default_factory=list)


@dataclass(eq=False)
class KernelCall:
    """A call of a kernel with some members of its groups."""

    reads: list[Operand]
    writes: list[Operand]
    compiled: Any = None


@dataclass
class Call:
    """The tensors of one call: parameters, gradients, state, extra and captured tensors, in one list.

    They are neither negated nor conjugated.
    """

    arguments: list[Tensor]
    vectors: dict[Part | None, Vector]  # In which leaves lie, if all of a part do.
    out: dict[Part | None, Vector] = field(default_factory=dict)  # For what is written, unless in place.
    copies: dict[Operand, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)  # Of leaves: together, and each.


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
        self._in_place, self._compiler = in_place, compiler
        self.captured = [x for _, x in found.captured]
        self._likes = list(map(_like, self.captured))
        inputs = [*found.inputs, *(value for value, _ in found.captured)]
        self._numbers = {value: i for i, value in enumerate(inputs)}
        #: For each result, the argument whose place it takes.
        self.places = [-1 if value is None else self._numbers[value] for value in written]
        likes = [value if place is None else place for value, place in zip(found.outputs, written, strict=True)]
        stays = lambda i, value: in_place and value is written[i]  # As the strengths that a step holds.
        self._unpacked = [
            (i, value, likes[i].dtype) for i, value in grouping.unpacked_outputs.items() if not stays(i, value)
        ]
        self._parts: dict[Value, Part] = {}  # By the leaf of the first member of a group.
        for each in grouping.groups:
            _arrange(each)
            self._add_parts(each, keeps, loose)
        self._written = self.parts("parameter", "state")
        leaves = {source: i for i, source in enumerate(itertools.chain(*[part.positions for part in self._written]))}
        #: Their leaves in the order of results.
        self._order = [leaves[place] for place in self.places if place in leaves]
        self._program = Lowering(grouping, in_place).program()
        self._operands: dict[Any, Operand] = {}
        #: Of each kernel, where all leaves lie in packed memory and where some do not.
        self._calls = {
            kernel: {packed: self._calls_of(kernel, packed) for packed in (True, False)}
            for _, kernels in self._program
            for kernel in kernels
        }
        taken = [value for scalars, _ in self._program if scalars for value in scalars.takes]
        taken += [value for kernel in self._calls for value in kernel.scalars]
        taken += [value for _, value, _ in self._unpacked]
        self._taken = {value: self._numbers[value] for value in taken if value in self._numbers}

    def _add_parts(self, of: Group, keeps: bool, loose: bool) -> None:
        """Memory for what a group writes, and for its gradients."""
        places = {place for place, _ in of.first.writes}
        members = of.members[: packed_members(of) if loose else None]
        for slot, value in enumerate(of.first.inputs):
            if value in places or value.role == "gradient":
                role = value.role if value.role in ("parameter", "gradient") else "state"
                leaves = [member.inputs[slot] for member in members]
                sources, shapes = [self._numbers[leaf] for leaf in leaves], [leaf.shape for leaf in leaves]
                self._parts[value] = Part(role, sources, shapes, value.dtype, value.device, len(self._parts), keeps)

    def _calls_of(self, kernel: Kernel, packed: bool) -> list[KernelCall]:
        operands = lambda slots, row: [self._operand(kernel.groups[i], slot, row[i]) for i, slot in slots]
        rows = zip(*[_taken_together(each, packed) for each in kernel.groups], strict=True)
        return [KernelCall(operands(kernel.reads, row), operands(kernel.writes, row)) for row in rows]

    def _operand(self, of: Group, slot: int, which: slice) -> Operand:
        """One input of some members of a group."""
        leaves = tuple([member.inputs[slot] for member in of.members[which]])
        if leaves not in self._operands:
            shapes = [leaf.shape for leaf in leaves]
            pieces = Pieces(shapes)
            part = self._parts.get(of.first.inputs[slot])
            is_written = self._in_place and part is not None and part.role != "gradient"
            if part is not None and which.stop > len(part.positions):  # Large leaves beside loose parameters.
                part = None
            start = 0 if part is None else part.starts[which.start]
            self._operands[leaves] = Operand(
                [self._numbers[leaf] for leaf in leaves],
                pieces,
                (pieces.entries,) if of.flat else (len(leaves), *shapes[0]) if of.stacked else shapes[0],
                part,
                slice(start, start + pieces.entries),
                is_written,
            )
        return self._operands[leaves]

    @property
    def is_valid(self) -> bool:
        """Whether captured tensors are of the shapes and dtypes that were recorded."""
        return self._likes == list(map(_like, self.captured))

    def parts(self, *roles: str) -> list[Part]:
        """Memory for leaves of some roles, among parameter, state and gradient."""
        return [part for part in self._parts.values() if part.role in roles]

    def packed(self, columns: Sequence[list[Any]], *roles: str) -> list[list[Any]]:
        """Leaves of trees, with copies in packed memory in the place of those of some roles."""
        made = [x for column in columns for x in column]
        for part in self.parts(*roles):
            for i, leaf in zip(part.positions, part.packed([made[i] for i in part.positions]), strict=True):
                made[i] = leaf
        rest = iter(made)
        return [list(itertools.islice(rest, len(column))) for column in columns]

    def run(self, call: Call) -> list[Tensor]:
        """The results, in their order; none where they are written in place."""
        if not self._in_place:
            call.out = {part: part.take() for part in self._written}
        values = self._run(call)
        unpacked: dict[int, Tensor] = {}
        for position, value, dtype in self._unpacked:
            x = values[value]
            # A copy of what may share memory with an argument, which may be written before it is read.
            x = x.clone(memory_format=torch.contiguous_format) if value.may_alias else x
            unpacked[position] = x.to(dtype)
        if self._in_place:
            for position, x in unpacked.items():
                call.arguments[self.places[position]].copy_(x)
            self._write_back(call)
            return []
        made = [leaf for part in self._written for leaf in part.lend(call.out[part])]
        results = [made[i] for i in self._order]
        for position, x in unpacked.items():
            results.insert(position, x)
        return results

    def _run(self, call: Call) -> dict[Value, Tensor]:
        """All scalars, and what no kernel writes."""
        values = {value: call.arguments[i].contiguous() for value, i in self._taken.items()}
        packed = len(call.vectors) == len(self._parts)
        for scalars, kernels in self._program:
            if scalars is not None:
                takes = [values[value] for value in scalars.takes]
                if scalars.compiled is None:
                    scalars.compiled = self._compiler(scalars.graph, takes)
                values.update(zip(scalars.makes, scalars.compiled(*takes), strict=True))
            for kernel in kernels:
                takes = [values[value] for value in kernel.scalars]
                made = [self._run_kernel(kernel, each, takes, call) for each in self._calls[kernel][packed]]
                if kernel.results:
                    columns = zip(*made, strict=True)
                    sums = made[0] if len(made) == 1 else [torch.stack(x).sum(dtype=x[0].dtype) for x in columns]
                    values.update(zip(kernel.results, sums, strict=True))
        return values

    def _run_kernel(self, kernel: Kernel, kernel_call: KernelCall, scalars: list[Tensor], call: Call) -> Any:
        args = [self._read(call, x) for x in kernel_call.reads] + scalars
        if call.out:
            args += [_view(call.out[x.part], x) for x in kernel_call.writes]
        if kernel_call.compiled is None:
            first = kernel.groups[0]
            kernel_call.compiled = self._compiler(kernel.graph, args, first.flat, first.shape_polymorphic)
        return kernel_call.compiled(*args)

    def _read(self, call: Call, x: Operand) -> Tensor:
        """Leaves as one tensor: where they lie, or several copied together."""
        if x.part in call.vectors:
            return _view(call.vectors[x.part], x)
        if x in call.copies:
            return call.copies[x][0]
        leaves = [call.arguments[i] for i in x.sources]
        if len(leaves) == 1 and leaves[0].is_contiguous():
            (leaf,) = leaves
            # A compiler would look at the gradient of a parameter that it gets a view of.
            return (leaf.detach() if leaf.requires_grad else leaf).view(x.shape)
        if not x.is_written:
            return torch.cat(x.pieces.flat(leaves)).view(x.shape)
        call.copies[x] = copy = self._memory(x, leaves[0])
        torch.cat(x.pieces.flat(leaves), out=copy[0].view(-1))
        return copy[0]

    def _memory(self, x: Operand, like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Memory for leaves that are copied together, and each of them in it."""
        try:
            return x.free.pop()
        except IndexError:
            pass
        with torch.inference_mode(False):
            data = torch.empty(x.pieces.entries, dtype=like.dtype, device=like.device)
            return data.view(x.shape), x.pieces.of(data)

    def _write_back(self, call: Call) -> None:
        """Write what kernels wrote into copies of leaves back into the leaves."""
        places = [call.arguments[i] for x in call.copies for i in x.sources]
        undocumented.copy_all(places, [leaf for _, leaves in call.copies.values() for leaf in leaves])
        for x, copy in call.copies.items():
            if copy[0].device.type == "cpu":  # Elsewhere calls may overlap, and allocators reuse memory by themselves.
                x.free[:] = [copy]


def _like(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device


def _view(vector: Vector, x: Operand) -> Tensor:
    """Leaves in packed memory as one tensor."""
    view = vector.views.get(x)
    if view is None:
        with torch.inference_mode(False):
            view = vector.views[x] = vector.entries[x.entries].view(x.shape)
    return view


# Which leaves are taken together


def _arrange(of: Group) -> None:
    """Let small leaves of a flat group, which are copied together, lie before large ones."""
    if of.flat:
        least, _ = _separate(of)
        of.members.sort(key=lambda member: math.prod(member.inputs[0].shape) >= least)


def packed_members(of: Group) -> int:
    """Of how many members, the first ones, the state is packed beside loose parameters.

    On a CPU of all, for large pages make kernels faster. Elsewhere a second copy of that of large leaves, for the time
    of one step, may be more than there is memory for.
    """
    if not of.flat or of.first.inputs[0].device.type == "cpu":
        return len(of.members)
    least, _ = _separate(of)
    return sum([entries < least for entries in _entries(of)])


def _taken_together(of: Group, packed: bool) -> Iterable[slice]:
    """The members that one call of a kernel computes with: what is not packed is copied together, if it is small."""
    entries, (least, most) = _entries(of), _separate(of)
    cuts, size = [0], entries[0]
    for i, more in enumerate(entries[1:], start=1) if of.flat else ():
        limit = (1 << 31) - 1 if packed else most if more < least else 0
        if size + more > limit:
            cuts.append(i)
            size = 0
        size += more
    return [slice(*each) for each in itertools.pairwise([*cuts, len(entries)])]


def _separate(of: Group) -> tuple[int, int]:
    return SEPARATE.get(of.first.inputs[0].device.type, SEPARATE_ELSEWHERE)


def _entries(of: Group) -> list[int]:
    """Numbers of entries of the members of a group."""
    return [math.prod(member.inputs[0].shape) for member in of.members]
