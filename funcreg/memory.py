"""Packed memory: vectors in which leaves lie end to end, and leaves that look as if each had memory of its own.

A kernel reads and writes a vector; users see its leaves. Those that `init` makes have storages of their own size over
their parts of the vector, so that each saves and shares like any tensor. To make these at every step would take longer
than many a step: results of a step that does not donate share one storage for all parameters, and for each moment.

On a CPU, memory comes back to a pool when the last storage over it dies, whoever held it (a view, a numpy array, a
graph of autograd): torch keeps the buffer that a storage was made from alive as long as the storage, and the pool has a
weak reference to that buffer. Fresh pages for every result would cost a step several times its time. On other devices
torch's own allocator does all this.
"""

from __future__ import annotations

import itertools
import math
import mmap
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Vectors that are read side by side begin at different places of a page, or stores would delay loads.
_STAGGER = 832
_PAGE = 4096
#: Bytes from which memory is asked for in huge pages: a step reads all of it.
_HUGE = 1 << 22


@dataclass
class Part:
    """Leaves of one dtype that lie end to end."""

    key: Any  # The group, and which input of its members these are.
    dtype: torch.dtype
    device: torch.device
    positions: list[int]  # Of the leaves, in a list of leaves.
    shapes: list[tuple[int, ...]]


class Leaf(NamedTuple):
    """Where a leaf lies in the block of its device."""

    position: int
    offset: int  # In bytes.
    entries: int
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Layout:
    """Where parts lie in one block of memory for each device.

    Args:
        parts: The leaves.
        before: Number of parts in other memory that kernels read beside these.
    """

    def __init__(self, parts: Sequence[Part], before: int = 0) -> None:
        self.sizes: dict[torch.device, int] = {}  # Bytes of each block.
        self.vectors: dict[Any, Leaf] = {}  # Each part as a whole.
        leaves: list[Leaf] = []
        for number, part in enumerate(parts, before):
            like = part.dtype, part.device
            start = offset = -(-self.sizes.get(part.device, 0) // _PAGE) * _PAGE + number % 16 * _STAGGER
            for position, shape in zip(part.positions, part.shapes, strict=True):
                entries, strides = math.prod(shape), torch.empty(shape, device="meta").stride()
                leaves.append(Leaf(position, offset, entries, *like, shape, strides))
                offset += entries * part.dtype.itemsize
            entries = (offset - start) // part.dtype.itemsize
            self.vectors[part.key] = Leaf(-1, start, entries, *like, (entries,), (1,))
            self.sizes[part.device] = offset
        self.leaves = sorted(leaves)
        self.positions = [leaf.position for leaf in self.leaves]
        self._joined = {part.key: Joined(part.shapes) for part in parts}
        given = [position for part in parts for position in part.positions]
        self._order = sorted(range(len(given)), key=given.__getitem__)
        #: The first leaf with entries, by whose address memory is found.
        self.anchor = next((i for i, leaf in enumerate(self.leaves) if leaf.entries), None)

    def split(self, vectors: dict[Any, Tensor]) -> list[Tensor]:
        """Vectors as their leaves, in the order of positions."""
        made = [leaf for key, joined in self._joined.items() for leaf in joined.split(vectors[key])]
        return [made[i] for i in self._order]


class Joined:
    """Leaves of some shapes in a vector, end to end.

    Neighbours that differ in their first dimension alone are put together, and cut apart, as they are: to see each leaf
    as a vector first takes longer than to copy a small one.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self._runs: list[tuple[slice, slice, tuple[int, ...], list[int]]] = []
        self._count = len(shapes)
        start = entries = 0
        for tail, run in itertools.groupby(shapes, key=lambda shape: shape[1:]):
            heads = [math.prod(shape[:1]) for shape in run]
            size = sum(heads) * math.prod(tail)
            which, part = slice(start, start + len(heads)), slice(entries, entries + size)
            self._runs.append((which, part, (sum(heads), *tail), heads))
            start, entries = start + len(heads), entries + size

    def join(self, leaves: list[Tensor], vector: Tensor) -> None:
        """Write leaves into a vector."""
        if 2 * len(self._runs) > self._count:
            torch.cat([leaf.reshape(-1) for leaf in leaves], out=vector)
            return
        for which, part, shape, _ in self._runs:
            torch.cat(leaves[which], out=vector[part].view(shape))

    def split(self, vector: Tensor) -> list[Tensor]:
        """The leaves in a vector; unlike results of `torch.split`, they are no views for autograd."""
        found: list[Tensor] = []
        for _, part, shape, heads in self._runs:
            found += torch.unsafe_split_with_sizes(vector[part].view(shape), heads)
        return found


class Memory:
    """Memory of some layout: one vector for each part, and, once asked for, the leaves in it."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._blocks = {device: _block(size, device) for device, size in layout.sizes.items()}
        parts = layout.vectors
        self.vectors = dict(zip(parts, _tensors_over(self._blocks, list(parts.values())), strict=True))
        #: Views of the vectors, of whoever made them.
        self.views: dict[Any, Any] = {}
        #: Where the leaves begin, in the order of their positions.
        self.addresses: tuple[int, ...] = ()

    @property
    def is_reusable(self) -> bool:
        """Whether all of it is memory of the CPU; the allocators of other devices reuse theirs by themselves."""
        return not any(isinstance(block, Tensor) for block in self._blocks.values())

    def leaves(self, own_storages: bool) -> tuple[list[Tensor], Any]:
        """Leaves over this memory, in the order of their positions, and what dies when their last storage does.

        On other devices that is the anchor itself.
        """
        owners = {d: block if isinstance(block, Tensor) else memoryview(block) for d, block in self._blocks.items()}
        if own_storages:
            made = _tensors_over(owners, self._layout.leaves)
        else:
            parts = self._layout.vectors
            made = self._layout.split(dict(zip(parts, _tensors_over(owners, list(parts.values())), strict=True)))
        self.addresses = self.addresses or tuple(map(Tensor.data_ptr, made))
        if self._layout.anchor is None:  # No entries: nothing that could come back.
            return made, None
        return made, next(iter(owners.values())) if self.is_reusable else made[self._layout.anchor]


class Pool:
    """Memory of one layout: what earlier leaves have left, or new.

    Args:
        layout: Where leaves lie. Their positions are those in a list of leaves.
        keeps: Whether memory is kept for the next leaves also while nobody holds earlier ones.
    """

    def __init__(self, layout: Layout, keeps: bool = False) -> None:
        self.layout, self._keeps = layout, keeps
        self._free: list[Memory] = []
        self._used: dict[int, Memory] = {}  # By the address of the anchor.

    def take(self) -> Memory:
        """Memory that nobody uses."""
        try:
            return self._free.pop()
        except IndexError:
            with torch.inference_mode(False):
                return Memory(self.layout)

    def lend(self, memory: Memory, own_storages: bool = False) -> list[Tensor]:
        """Leaves over memory that was taken, in the order of their positions: it is theirs until the last one dies."""
        with torch.inference_mode(False), torch.no_grad():
            leaves, owner = memory.leaves(own_storages)
        if self.layout.anchor is not None:
            self._used[memory.addresses[self.layout.anchor]] = memory
            weakref.finalize(owner, self._give_back, memory).atexit = False
        return leaves

    def packed(self, leaves: Sequence[Any]) -> list[Any]:
        """Leaves with copies in such memory in the place of those that it is for."""
        made = list(leaves)
        for i, copied in zip(self.layout.positions, self.lend(self.take(), own_storages=True), strict=True):
            made[i] = copied.copy_(leaves[i])
        return made

    def find(self, addresses: Sequence[int]) -> Memory | None:
        """The memory in which leaves lie that begin at these addresses, if all of them do that it is for."""
        if self.layout.anchor is None:
            return None
        memory = self._used.get(addresses[self.layout.positions[self.layout.anchor]])
        if memory is None or memory.addresses != tuple([addresses[i] for i in self.layout.positions]):
            return None
        return memory

    def _give_back(self, memory: Memory) -> None:
        self._used.pop(memory.addresses[self.layout.anchor or 0], None)
        if memory.is_reusable and (self._used or self._keeps):
            self._free.append(memory)
            del self._free[1:]
        elif not self._used:
            self._free.clear()


def _block(size: int, device: torch.device) -> Any:
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    size = max(size, 1)
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # Shared, a child would write into it.
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            block.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # A system without huge pages computes as well.
            return block
    return block


def _tensors_over(blocks: dict[torch.device, Any], leaves: list[Leaf]) -> list[Tensor]:
    """Tensors over parts of blocks, each with a storage of its own."""
    made = []
    for _, offset, entries, dtype, device, shape, strides in leaves:
        block = blocks[device]
        if not entries:
            made.append(torch.empty(shape, dtype=dtype, device=device))
        elif isinstance(block, Tensor):
            storage = block.untyped_storage()[offset : offset + entries * dtype.itemsize]
            made.append(torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape, strides))
        else:
            vector = torch.frombuffer(block, dtype=dtype, count=entries, offset=offset)
            made.append(vector.as_strided_(shape, strides))
    return made
