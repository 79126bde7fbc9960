"""Steps for which numbers of sixteen bits are too coarse: told from a learning rate and parameters, before the first.

Optimizers that divide by the size of gradients make steps of about their learning rate. Where that is less than half
the distance from a parameter to the next number of its dtype, the sum is the parameter again, at every step.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from funcreg.core._typing import Params
from funcreg.core.construction import transforms_in
from funcreg.core.masks import listed
from funcreg.core.ranges import is_readable, number
from funcreg.core.rounding import digits, is_narrow
from funcreg.core.tree import tree_leaves, tree_paths
from funcreg.transforms.schedules import KnownSchedule

#: Scalers whose results are of size 1 at most, or little more.
_OF_SIZE_1 = {
    *("scale_by_adam", "scale_by_amsgrad", "scale_by_adamax", "scale_by_yogi", "scale_by_rms", "scale_by_lion"),
    *("scale_by_sign", "scale_by_radam", "scale_by_adan", "scale_by_adopt", "scale_by_muon"),
}
#: What makes such results no larger.
_NO_LARGER = ("clip", "shaped_as_matrices")
#: What makes the steps of the transforms that it is made of, though maybe not at every call.
_WRAPPERS = {
    *("MultiSteps", "apply_if_finite", "conditionally_mask", "conditionally_transform", "flatten", "lookahead"),
    *("partition", "selective_transform", "with_extra_args"),
}


def rounded_away(tx: Any, params: Params) -> str | None:
    """What is wrong if most parameters of sixteen bits cannot move by steps of a transform; None if nothing is known.

    It reads parameters, and so waits for their device.
    """
    leaves = tree_leaves(params)
    frozen = [False] * len(leaves) if tx.frozen is None else tx.frozen(params)
    rows = zip(tree_paths(params), leaves, frozen, strict=True)
    narrow = [(name, w.detach()) for name, w, held in rows if is_narrow(w.dtype) and is_readable(w) and not held]
    rate = _size(tx) if narrow else None
    if not rate or rate >= 1:
        return None
    # Half the distance to the next number is 2 to the exponent of a number, less the digits. Below the least of these
    # it is less.
    least = {dtype: 2.0 ** (math.floor(math.log2(rate)) + 1 + digits(dtype)) for dtype in {w.dtype for _, w in narrow}}
    still = sum([(w.abs() > least[w.dtype]).sum().item() for _, w in narrow])
    entries = sum([w.numel() for _, w in narrow])
    if 2 * still <= entries:
        return None
    return (
        f"{tx!r} makes steps of about {rate:g}, which {still} of {entries} entries of {listed(n for n, _ in narrow)} "
        "cannot follow: in sixteen bits the next number is more than twice as far away, and what is added, decay and "
        "penalties too, is rounded away. with_master_weights or with_stochastic_rounding around the optimizer keeps it."
    )


def _size(tx: Any) -> float | None:
    """How large the greatest entries are of what a transform makes of gradients; None if that is not known."""
    if tx.links:
        return _size_of_chain(flat_links(tx))
    if tx.made_by is None:
        return None
    factory, given = getattr(tx.made_by.function, "factory", None), tx.made_by.arguments
    if factory is not None:  # Of hyperparameters that are in the state.
        return _size(factory(*tx.made_by.args, **tx.made_by.kwargs))
    name = tx.made_by.name
    if name == "named_chain":
        return _size_of_chain([link for _, each in tx.made_by.args for link in flat_links(each)])
    if name in _OF_SIZE_1:
        return 1.0
    if name == "set_to_zero":
        return 0.0
    if name == "prox_adam":
        return abs(_greatest(given["learning_rate"]))
    inside = transforms_in(given)
    if name in _WRAPPERS or name == "proximal_step":
        sizes = [_size(each) for each in inside]
        rate = abs(_greatest(given["learning_rate"])) if name == "proximal_step" else 1.0
        return None if None in sizes else rate * max(size for size in sizes if size is not None)
    return None


def _size_of_chain(links: list[Any]) -> float | None:
    names = ["" if link.made_by is None else link.made_by.name for link in links]
    sizes = [_size(link) for link in links]
    last = max([i for i, size in enumerate(sizes) if size is not None], default=None)
    if last is None:
        return None
    size, decay = sizes[last] or 0.0, 0.0
    for link, name in zip(links[last + 1 :], names[last + 1 :], strict=True):
        if name.startswith("add_") and "weight_decay" in link.made_by.arguments:
            # What stands after the learning rate acts without it.
            decay += _greatest(link.made_by.arguments["weight_decay"])
        elif link.rate is not None:
            size *= abs(_greatest(link.rate))
            decay *= abs(_greatest(link.rate))
        elif not name.startswith(_NO_LARGER) and "lands" not in link.stages:
            return None
    return size if decay < 2.0**-8 else None  # A decay may be large enough to act by itself.


def flat_links(tx: Any) -> list[Any]:
    """The links of a chain, and of chains in it."""
    return [each for link in tx.links for each in flat_links(link)] if tx.links else [tx]


def _greatest(value: Any) -> float:
    """The greatest number that a hyperparameter is at any step; infinite if that is not known, as of a tensor."""
    if isinstance(value, KnownSchedule):
        found = [value(steps) for steps in (0, *value.turns)]
        return max([x.item() if isinstance(x, Tensor) and is_readable(x) else _greatest(x) for x in found], key=abs)
    value = number(value)
    return float(value) if isinstance(value, (int, float)) else math.inf
