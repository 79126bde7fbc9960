"""What a donating step may write into: leaves with memory of their own, apart from each other and from what is read."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Params, State, Updates
from funcreg.core.tree import tree_paths


class Donated:
    """Leaves that a step writes into, apart from each other: where they begin and end in memory.

    Raises:
        ValueError: Two of them share memory.
    """

    def __init__(self, names: Sequence[str], leaves: Sequence[Tensor]) -> None:
        spans = sorted([(x.data_ptr(), x.data_ptr() + reach_of(x), i) for i, x in enumerate(leaves) if x.numel()])
        for (_, end, first), (begin, _, second) in pairwise(spans):
            if begin < end:
                raise ValueError(
                    f"{names[first]} and {names[second]} share memory and cannot be donated. Are weights tied? "
                    "Give each once, as module.named_parameters() does. step.init(params) gives copies that share "
                    "nothing, of tied weights too, which are apart from then on."
                )
        self._begins, self._ends = [begin for begin, _, _ in spans] or [0], [end for _, end, _ in spans] or [0]
        self._names = [names[i] for _, _, i in spans]

    def overlap(self, begins: Sequence[int], sizes: Sequence[int]) -> tuple[int, str] | None:
        """Which of some other tensors, at these addresses, shares memory with which of these."""
        if not begins or min(begins) >= self._ends[-1] or max(begins) + max(sizes) <= self._begins[0]:
            return None  # As gradients and packed memory mostly lie.
        for i, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
            before = bisect.bisect_left(self._begins, begin + size) - 1  # They are apart: none reaches further.
            if before >= 0 and self._ends[before] > begin and size:
                return i, self._names[before]
        return None

    def shared(self, tensors: Sequence[Any]) -> tuple[int, str] | None:
        """Which of some other tensors shares memory with which of these."""
        return self.overlap([x.data_ptr() for x in tensors], list(map(reach_of, tensors)))


def check_donated(
    params: Params, grads: Updates, state: State, columns: Any, captured: list[Tensor], loose: bool
) -> Donated:
    """Where donated leaves lie, or an error: they cannot be written into, or share memory with what is read."""
    owned, names = [*columns[0], *columns[2]], names_of(params, state)
    for name, leaf in zip(names, owned, strict=True):
        if leaf.is_neg() or leaf.is_conj():
            raise ValueError(f"{name} is a negated or conjugated view and cannot be donated; pass a copy of it")
        if leaf.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{name} was made in inference mode and cannot be donated outside of it; pass a copy of it, clone()"
            )
        if leaf.requires_grad and not loose:
            raise ValueError(f"{name} requires grad and cannot be donated. step.init(params) gives copies that can.")
        reach = 0  # Of the dimensions with smaller strides.
        for stride, size in sorted(zip(leaf.stride(), leaf.shape, strict=True)) if leaf.numel() else ():
            if size > 1 and stride <= reach:
                raise ValueError(f"{name} is an expanded tensor, whose entries share memory, and cannot be donated")
            reach += (size - 1) * stride
    donated = Donated(names, owned)
    if (found := donated.shared(columns[1])) is not None:
        raise ValueError(
            f"grads '{tree_paths(grads)[found[0]]}' shares memory with params or state, {found[1]}, which are "
            "donated and so overwritten. Pass a copy of it."
        )
    if (found := donated.shared(captured)) is not None:
        raise ValueError(
            f"a tensor of shape {tuple(captured[found[0]].shape)} that the chain holds shares memory with "
            f"{found[1]}, which is donated and so overwritten at every step. Is it an anchor made of these "
            "parameters? Give the chain a copy: tensor.clone()."
        )
    return donated


def names_of(params: Params, state: State) -> list[str]:
    """What errors call the leaves of both."""
    return [f"params '{name}'" for name in tree_paths(params)] + [f"state '{name}'" for name in tree_paths(state)]


def reach_of(leaf: Tensor) -> int:
    """Bytes from the first to the last entry of a tensor."""
    if not leaf.numel():
        return 0
    last = sum([(size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True)])
    return (last + 1) * leaf.element_size()
