"""Whether something was written into gradients since the last step, which would else be taken with the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from funcreg.core import undocumented


class Freshness:
    """What the last calls of a step saw of the gradients that it gave out.

    The version of a tensor moves where torch writes into it. It does not where others do: numpy, DLPack, `.data`, a
    kernel of one's own. So a gradient without a new version is old only if its numbers are, too: they are compared at
    the second such call in a row, the one time that a device is waited for. If they differ, versions tell nothing
    here, and nothing is compared from then on.
    """

    def __init__(self) -> None:
        self._vectors: list[int] = []
        self._versions: list[int] = []
        self._numbers: dict[int, Tensor] = {}
        self.is_told = False  # Whether there is nothing more to find out.

    def stale(self, vectors: list[int], leaves: list[Tensor], spared: Callable[[], list[bool]]) -> list[int]:
        """Which leaves nothing was written into at the last two calls; asked at every call, until it is told.

        Args:
            vectors: What the memory of these leaves is known by.
            leaves: The leaves.
            spared: Whether it makes no difference what a leaf holds, for each of them.
        """
        before, self._versions = self._versions, undocumented.versions(leaves)
        same, self._vectors = vectors == self._vectors, vectors
        old = [i for i, (x, y) in enumerate(zip(before, self._versions, strict=True)) if x == y] if same else []
        if not old or _is_captured(leaves[old[0]]):
            self._numbers = {}
            return []
        skipped = spared()
        numbers = {i: _fingerprint(leaves[i]) for i in old if not skipped[i]}
        both = [i for i in numbers if i in self._numbers]
        found = [i for i in both if bool(numbers[i] == self._numbers[i])]
        self._numbers, self.is_told = numbers, bool(both)
        return found


def _is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, in which no number is read."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _fingerprint(x: Tensor) -> Tensor:
    """A number that other entries, or the same in another order, would not have."""
    entries = x.detach().reshape(-1)
    return (entries * torch.linspace(1.0, 2.0, len(entries), dtype=torch.float32, device=x.device)).sum()
