"""The numbers that a forward pass computes with, which have to be the same in a smaller network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch.overrides import TorchFunctionMode

#: Functions in the order in which they were called, and the numbers that they were given.
Computed: TypeAlias = list[tuple[str, tuple[float, ...]]]


class Numbers(TorchFunctionMode):
    """Writes down the numbers that tensors are computed with, and the functions that take them, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Computed = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        given = [*args, *(kwargs or {}).values()]
        counts = _ARITHMETIC.search(name) is not None
        numbers = [float(x) for x in given if isinstance(x, float) or (counts and type(x) is int)]
        if name == "scaled_dot_product_attention" and (kwargs or {}).get("scale") is None:
            numbers.append((args[0] if args else (kwargs or {})["query"]).shape[-1] ** -0.5)
        if numbers:
            self.found.append((name, tuple(numbers)))
        return func(*args, **(kwargs or {}))


#: Functions that compute with whole numbers, where others take them for sizes and dimensions.
_ARITHMETIC = re.compile("mul|div|pow|tensor|full")


def _shown(numbers: Sequence[float]) -> str:
    return ", ".join([f"{x:.4g}" for x in numbers])


def other_number(whole: Computed, smaller: Computed) -> str | None:
    """The first of the numbers that a smaller network computes with which the whole one does not have.

    Where the scale of scores comes from the number of features outputs may not tell it: a single key has all the
    weight, whatever its score.
    """
    for (name, one), (other_name, other) in zip(whole, smaller, strict=False):
        if (name, one) != (other_name, other):
            return (
                f"without some of these channels it computes {other_name} by {_shown(other)}, which was {name} by "
                f"{_shown(one)}: the scale of scores seems to come from the number of features, as in "
                "q.size(-1) ** -0.5. Let the module store a scale of its own"
            )
    return None
