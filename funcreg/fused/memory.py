"""Packed memory: vectors in which leaves lie end to end, and leaves that look as if each had memory of its own.

A kernel reads and writes a vector; users see its leaves. Those that `init` makes have storages of their own size over
their parts of the vector, so that each saves and shares like any tensor. To make these at every step would take longer
than many a step: results of a step that does not donate share the storage of their vector.

On a CPU, a vector comes back when the last storage over it dies, whoever held it (a view, a numpy array, a graph of
autograd): torch keeps the buffer that a storage was made from alive as long as the storage, and there is a weak
reference to that buffer. Fresh pages for every result would cost a step several times its time. On other devices
torch's own allocator does all this.
"""

from __future__ import annotations

import itertools
import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Vectors that are read side by side begin at different places of a page, or stores would delay loads.
_STAGGER = 832
#: Bytes from which memory is asked for in huge pages: a step reads all of it.
_HUGE = 1 << 22


class Vector:
    """Memory in which the leaves of a part lie end to end."""

    def __init__(self, memory: Any, entries: Tensor) -> None:
        self.memory, self.entries = memory, entries
        #: What kernels take of it.
        self.views: dict[Any, Tensor] = {}
        #: Where the leaves begin, once there are some.
        self.addresses: list[int] = []


class Part:
    """Leaves of one dtype that lie end to end, and the vectors made for them.

    Args:
        role: What they are: parameter, state or gradient.
        positions: Where the leaves stand in a list of leaves.
        shapes: Their shapes.
        dtype: Their dtype.
        device: Their device.
        number: Parts that kernels read side by side have different numbers.
        keeps: Whether a vector is kept for the next leaves also while nobody holds earlier ones.
    """

    def __init__(
        self,
        role: str,
        positions: Sequence[int],
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        number: int = 0,
        keeps: bool = False,
    ) -> None:
        self.role, self.positions = role, positions
        self._shapes, self._pieces = shapes, Pieces(shapes)
        self._dtype, self._device, self._keeps = dtype, device, keeps
        self._begin = number % 16 * _STAGGER
        #: At which entry each leaf begins, and the last one ends.
        self.starts = [0, *itertools.accumulate(self._pieces.sizes)]
        #: The first leaf with entries, by whose address a vector is found.
        self._anchor = next((i for i, shape in enumerate(shapes) if math.prod(shape)), None)
        self._free: list[Vector] = []
        self._used: dict[int, Vector] = {}

    def take(self) -> Vector:
        """A vector that nobody uses."""
        try:
            return self._free.pop()
        except IndexError:
            pass
        entries = self._pieces.entries
        with torch.inference_mode(False):
            if self._device.type != "cpu" or not entries:
                made = torch.empty(entries, dtype=self._dtype, device=self._device)
                return Vector(made, made)
            memory = _pages(self._begin + entries * self._dtype.itemsize)
            return Vector(memory, self._over(memory, 0, (entries,)))

    def lend(self, vector: Vector, own_storages: bool = False) -> list[Tensor]:
        """Leaves over a vector that was taken, in their order: it is theirs until the last one dies."""
        owner = vector.memory if isinstance(vector.memory, Tensor) else memoryview(vector.memory)
        with torch.inference_mode(False), torch.no_grad():
            if own_storages:
                leaves = [self._over(owner, *each) for each in zip(self.starts, self._shapes, strict=False)]
            else:
                leaves = self._pieces.of(self._over(owner, 0, (self._pieces.entries,)))
        if self._anchor is not None:
            vector.addresses = vector.addresses or list(map(Tensor.data_ptr, leaves))
            self._used[vector.addresses[self._anchor]] = vector
            last = leaves[self._anchor] if isinstance(owner, Tensor) else owner
            weakref.finalize(last, self._give_back, vector).atexit = False
        return leaves

    def packed(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Copies of leaves in a vector, each with a storage of its own."""
        places = self.lend(self.take(), own_storages=True)
        return [place.copy_(x) for place, x in zip(places, leaves, strict=True)]

    def find(self, addresses: Sequence[int]) -> Vector | None:
        """The vector in which all leaves of this part lie; of a list of leaves, it is given where they begin."""
        if self._anchor is None:  # No entries, which lie anywhere.
            return self.take()
        vector = self._used.get(addresses[self.positions[self._anchor]])
        if vector is None or vector.addresses != [addresses[i] for i in self.positions]:
            return None
        return vector

    def _give_back(self, vector: Vector) -> None:
        self._used.pop(vector.addresses[self._anchor or 0], None)
        is_reusable = not isinstance(vector.memory, Tensor)  # Allocators of other devices reuse theirs by themselves.
        self._free = [vector] if is_reusable and (self._used or self._keeps) else []

    def _over(self, owner: Any, start: int, shape: tuple[int, ...]) -> Tensor:
        """A tensor with a storage of its own over some entries; it is no view for autograd."""
        entries, size = math.prod(shape), self._dtype.itemsize
        if not entries:
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        if isinstance(owner, Tensor):
            storage = owner.untyped_storage()[start * size : (start + entries) * size]
            return torch.empty(0, dtype=self._dtype, device=self._device).set_(storage).resize_(shape)
        offset = self._begin + start * size
        return torch.frombuffer(owner, dtype=self._dtype, count=entries, offset=offset).resize_(shape)


class Pieces:
    """Leaves of some shapes in a vector, end to end."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.sizes = list(map(math.prod, shapes))
        self.entries = sum(self.sizes)
        self._shaped = [(i, shape) for i, shape in enumerate(shapes) if len(shape) != 1]

    def flat(self, leaves: list[Tensor]) -> list[Tensor]:
        """Leaves as vectors."""
        for i, _ in self._shaped:
            leaves[i] = leaves[i].reshape(-1)
        return leaves

    def of(self, vector: Tensor) -> list[Tensor]:
        """The leaves in a vector; unlike results of `torch.split`, they are no views for autograd."""
        leaves = list(torch.unsafe_split_with_sizes(vector, self.sizes))
        for i, shape in self._shaped:
            leaves[i].resize_(shape)
        return leaves


def _pages(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # Shared, a child would write into it.
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # A system without huge pages computes as well.
            return memory
    return memory
