"""Parameters that are frozen, `requires_grad=False`, beside others that are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def frozen_beside_others(leaves: Sequence[Any]) -> list[bool]:
    """For each leaf whether it is a parameter of a module that somebody froze.

    A plain tensor needs no gradient as a rule, and where no leaf requires one, gradients come from elsewhere, such as
    `torch.func.grad`. So only a `Parameter` counts, and only beside leaves that do require a gradient.
    """
    requires = [isinstance(w, Tensor) and w.requires_grad for w in leaves]
    if all(requires) or not any(requires):
        return [False] * len(leaves)
    return [not needed and isinstance(w, nn.Parameter) for w, needed in zip(leaves, requires, strict=True)]


def gradients_of(params: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of parameters by which a step moves; None for a frozen one, whatever was left in its `grad`."""
    rows = zip(params, frozen_beside_others(params), strict=True)
    return [None if frozen else w.grad for w, frozen in rows]
