"""One step of the loops that people have: a torch optimizer with `regularize`, and a chain as an `Optimizer`.

    python benchmarks/loops.py --write

The unit is a step of torch's fused optimizer and the loop of softshrink that users write after it, which has one
threshold for all entries. `regularize` has that of each entry's step, so that under AdamW it reads a moment more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from common import (
    DECAY,
    RATE,
    Leaves,
    Row,
    against,
    check,
    draw,
    eager_in_double,
    fused_row,
    report,
    shapes,
    softshrink_loop,
    start,
    torch_row,
)
from torch.optim import SGD, AdamW

import funcreg as fr

STRENGTH = 1e-3
OPTIMIZERS: dict[str, tuple[Callable[..., Any], fr.Transform]] = {
    "SGD": (
        functools.partial(SGD, lr=RATE, momentum=0.9, fused=True),
        fr.prox_sgd(RATE, fr.l1, strength=STRENGTH, momentum=0.9),
    ),
    "AdamW": (
        functools.partial(AdamW, lr=RATE, weight_decay=DECAY, fused=True),
        fr.prox_adam(RATE, fr.l1, strength=STRENGTH, weight_decay=DECAY),
    ),
}


def hooked(make: Callable[..., Any], leaves: list[Any]) -> Any:
    """An optimizer with a penalty on it."""
    optimizer = make(leaves)
    fr.regularize(optimizer, fr.l1, strength=STRENGTH)
    return optimizer


def rows(name: str, params: Leaves, grads: Leaves) -> dict[str, Callable[[], Row]]:
    make, tx = OPTIMIZERS[name]
    whole = lambda leaves: fr.Optimizer(leaves, lambda lr: tx, lr=RATE)
    return {
        f"{name} fused, no L1": lambda: torch_row(make, params, grads),
        f"{name} fused, `regularize`": lambda: torch_row(functools.partial(hooked, make), params, grads),
        f"`Optimizer` of `prox_{'adam' if name == 'AdamW' else 'sgd'}`": lambda: torch_row(whole, params, grads),
        "the same through `fuse`": lambda: fused_row(tx, params, grads),
    }


def measured(name: str, tree: str, quick: bool) -> dict[str, Any]:
    make, tx = OPTIMIZERS[name]
    params, grads = draw(shapes(tree, quick), 0), draw(shapes(tree, quick), 1, scale=0.01)
    expected = eager_in_double(tx, params, grads)
    threshold = RATE * STRENGTH
    reference = torch_row(make, params, grads, after=softshrink_loop(threshold))
    reference.block(3)
    found: dict[str, Any] = {}
    for label, one in rows(name, params, grads).items():

        def checked(label: str = label, one: Callable[[], Row] = one) -> Row:
            row = one()
            if "no L1" not in label:
                check(row, expected)
            return row

        found[label] = against(reference, checked, quick)
        print(f"{tree:12} {label:40} {found[label]['ratio']:6.2f}")
    return found


def main() -> None:
    options = start(__doc__, tree="one tree alone: transformer, big or tiny")
    torch.manual_seed(0)
    trees = (options.tree,) if options.tree else ("transformer", "big", "tiny")
    workloads = {tree: {name: measured(name, tree, options.quick) for name in OPTIMIZERS} for tree in trees}
    report("loops", {"workloads": workloads}, options.write)


if __name__ == "__main__":
    main()
