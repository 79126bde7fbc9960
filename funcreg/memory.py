"""Packed memory: vectors in which leaves lie end to end, and leaves that look as if each had memory of its own.

A kernel reads and writes a vector; users see its leaves. Each leaf has a storage of its own size over its part of the
vector, so that it saves, shares and compares like any tensor. On a CPU, memory comes back to a pool when the last
storage over it dies, whoever held it (a view, a numpy array, a graph of autograd): torch keeps the buffer that a
storage was made from alive as long as the storage, and the pool has a weak reference to that buffer. Fresh pages for
every result would cost a step several times its time. On other devices torch's own allocator does all this.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Iterable
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
    """Where parts lie in one block of memory for each device."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.sizes: dict[torch.device, int] = {}  # Bytes of each block.
        self.vectors: dict[Any, Leaf] = {}  # Each part as a whole.
        leaves: list[Leaf] = []
        for number, part in enumerate(parts):
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
        #: The first leaf with entries, by whose address memory is found.
        self.anchor = next((i for i, leaf in enumerate(self.leaves) if leaf.entries), None)


class Memory:
    """Memory of some layout: one vector for each part, and, once asked for, the leaves in it."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._blocks = {device: _block(size, device) for device, size in layout.sizes.items()}
        parts = layout.vectors
        self.vectors = dict(zip(parts, _tensors_over(self._blocks, list(parts.values())), strict=True))
        #: Lists of parts of the vectors, of whoever cuts them.
        self.views: dict[Any, list[Any]] = {}
        #: Where the leaves begin, in the order of their positions.
        self.addresses: tuple[int, ...] = ()

    @property
    def is_reusable(self) -> bool:
        """Whether all of it is memory of the CPU; the allocators of other devices reuse theirs by themselves."""
        return not any(isinstance(block, Tensor) for block in self._blocks.values())

    def leaves(self) -> tuple[list[Tensor], Any]:
        """Leaves over this memory, in the order of their positions, and what dies when their last storage does.

        On other devices that is the anchor itself.
        """
        owners = {d: block if isinstance(block, Tensor) else memoryview(block) for d, block in self._blocks.items()}
        made = _tensors_over(owners, self._layout.leaves)
        self.addresses = self.addresses or tuple(map(Tensor.data_ptr, made))
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

    def find(self, addresses: tuple[int, ...]) -> Memory | None:
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


def _tensors_over(blocks: dict[torch.device, Any], leaves: list[Leaf]) -> list[Tensor]:
    """Tensors over parts of blocks, each with a storage of its own."""
    only = next(iter(blocks.values())) if len(blocks) == 1 else None
    if only is None or isinstance(only, Tensor) or not all([leaf.entries for leaf in leaves]):
        return [_tensor_over(blocks[leaf.device], leaf) for leaf in leaves]
    # In two loops: a call for each leaf would take longer than all else of a step on many small ones.
    over = torch.frombuffer
    made = [over(only, dtype=dtype, count=count, offset=offset) for _, offset, count, dtype, *_ in leaves]
    for tensor, leaf in zip(made, leaves, strict=True):
        if len(leaf.shape) != 1:
            tensor.as_strided_(leaf.shape, leaf.strides)
    return made


def _tensor_over(block: Any, leaf: Leaf) -> Tensor:
    _, offset, entries, dtype, device, shape, strides = leaf
    if not entries:
        return torch.empty(shape, dtype=dtype, device=device)
    if isinstance(block, Tensor):
        storage = block.untyped_storage()[offset : offset + entries * dtype.itemsize]
        return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape, strides)
    return torch.frombuffer(block, dtype=dtype, count=entries, offset=offset).as_strided_(shape, strides)
