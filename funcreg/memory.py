"""Packed memory: vectors in which leaves lie end to end, and leaves that look as if each had memory of its own.

A kernel reads and writes a vector; users see its leaves. Each leaf has a storage of its own size over its part of the
vector, so that it saves, shares and compares like any tensor. On a CPU, memory comes back to a pool when the last
storage over it dies, whoever held it (a view, a numpy array, a graph of autograd): torch keeps the buffer that a
storage was made from alive as long as the storage, and the pool has a weak reference to that buffer. Fresh pages for
every result would cost a step several times its time. On other devices torch's own allocator does all this.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Vectors that are read side by side begin at different places of a page, or stores would delay loads.
_STAGGER = 832
_PAGE = 4096
#: Bytes from which memory is asked for in huge pages: a step reads all of it.
_HUGE = 1 << 22


@dataclass(frozen=True)
class Part:
    """Leaves of one dtype that lie end to end."""

    key: Any  # The group, and which input of its members these are.
    dtype: torch.dtype
    device: torch.device
    positions: tuple[int, ...]  # Of the leaves, in a list of leaves.
    shapes: tuple[tuple[int, ...], ...]


class Layout:
    """Where parts lie in one block of memory for each device."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = list(parts)
        self.sizes: dict[torch.device, int] = {}  # Bytes of each block.
        self.offsets: list[int] = []  # Of each part in its block, in bytes.
        #: For each leaf: position, part, offset in the block, shape and number of entries, by position.
        self.leaves: list[tuple[int, Part, int, tuple[int, ...], int]] = []
        for number, part in enumerate(self.parts):
            start = -(-self.sizes.get(part.device, 0) // _PAGE) * _PAGE + number % 16 * _STAGGER
            self.offsets.append(start)
            for position, shape in zip(part.positions, part.shapes, strict=True):
                entries = torch.Size(shape).numel()
                self.leaves.append((position, part, start, shape, entries))
                start += entries * part.dtype.itemsize
            self.sizes[part.device] = start
        self.leaves.sort(key=lambda leaf: leaf[0])
        self.positions = [position for position, *_ in self.leaves]
        #: The first leaf with entries, by whose address memory is found.
        self.anchor = next((i for i, (*_, entries) in enumerate(self.leaves) if entries), None)
        strides = lambda shape: torch.empty(shape, device="meta").stride()
        self._strides = {shape: strides(shape) for _, _, _, shape, _ in self.leaves}

    def strides(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a contiguous tensor."""
        return self._strides[shape]


class Memory:
    """Memory of some layout: one vector for each part, and, once asked for, the leaves in it."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._blocks = {device: _block(size, device) for device, size in layout.sizes.items()}
        self.vectors: dict[Any, Tensor] = {}
        for part, offset in zip(layout.parts, layout.offsets, strict=True):
            entries = sum([torch.Size(shape).numel() for shape in part.shapes])
            block = self._blocks[part.device]
            if isinstance(block, Tensor):
                vector = block[offset : offset + entries * part.dtype.itemsize].view(part.dtype)
            else:
                vector = _over(block, offset, entries, part.dtype)
            self.vectors[part.key] = vector
        #: Parts of the vectors, by whoever cuts them.
        self.views: dict[Any, Tensor] = {}
        #: Where the leaves begin, in the order of their positions.
        self.addresses: list[int] = []

    @property
    def is_reusable(self) -> bool:
        """Whether all of it is memory of the CPU; the allocators of other devices reuse theirs by themselves."""
        return not any(isinstance(block, Tensor) for block in self._blocks.values())

    def leaves(self) -> tuple[list[Tensor], Any]:
        """Leaves over this memory, in the order of their positions, and what dies when their last storage does.

        On other devices that is the anchor itself.
        """
        owners: dict[torch.device, Any] = {}
        for device, block in self._blocks.items():
            owners[device] = block.untyped_storage() if isinstance(block, Tensor) else memoryview(block)
        made = []
        for _, part, offset, shape, entries in self._layout.leaves:
            owner = owners[part.device]
            if not isinstance(owner, memoryview):
                storage = owner[offset : offset + entries * part.dtype.itemsize]
                leaf = torch.empty(0, dtype=part.dtype, device=part.device)
                leaf.set_(storage, 0, shape, self._layout.strides(shape))
            else:
                leaf = _over(owner, offset, entries, part.dtype)
                if len(shape) != 1:
                    leaf.as_strided_(shape, self._layout.strides(shape))
            made.append(leaf)
        self.addresses = self.addresses or list(map(Tensor.data_ptr, made))
        return made, next(iter(owners.values())) if self.is_reusable and owners else made[self._layout.anchor or 0]


class Pool:
    """Memory of one layout for results: what earlier results have left, or new.

    Args:
        layout: Where leaves lie.
        keeps: Whether memory is kept for the next result also while nobody holds an earlier one.
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

    def lend(self, memory: Memory) -> list[Tensor]:
        """Leaves over memory that was taken, in the order of their positions: it is theirs until the last one dies."""
        with torch.inference_mode(False), torch.no_grad():
            leaves, owner = memory.leaves()
        if self.layout.anchor is not None:
            self._used[memory.addresses[self.layout.anchor]] = memory
            weakref.finalize(owner, self._give_back, memory).atexit = False
        return leaves

    def find(self, addresses: list[int]) -> Memory | None:
        """The memory of which leaves at these addresses are all the leaves."""
        memory = None if self.layout.anchor is None else self._used.get(addresses[self.layout.anchor])
        return memory if memory is not None and memory.addresses == addresses else None

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


def _over(buffer: Any, offset: int, entries: int, dtype: torch.dtype) -> Tensor:
    """A vector over a part of a buffer."""
    if not entries:
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(buffer, dtype=dtype, count=entries, offset=offset)
