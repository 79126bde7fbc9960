"""Memory of one step of AdamW on a small transformer, in units of the parameters (4 bytes each).

Held is what a row keeps from step to step: its parameters, its two moments, and buffers of its own. Passing is the
most that a step has besides, for a while. Gradients, which all need, count in neither.

    python benchmarks/memory.py --write
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import (
    DECAY,
    RATE,
    THRESHOLD,
    Row,
    adamw_by_hand,
    adamw_l1,
    check,
    draw,
    eager_row,
    fused_row,
    report,
    shapes,
    softshrink_loop,
    start,
    torch_row,
)
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile


def held() -> int:
    """Bytes of all tensors that live, storages counted once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def passing(row: Row) -> int:
    """The most bytes allocated at once during a step, on top of those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        row.once()
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events: list[Any] = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def main() -> None:
    options = start(__doc__)
    sizes = shapes("transformer", options.quick)
    params, grads = draw(sizes, 0), draw(sizes, 1)
    unit = sum(w.nbytes for w in params.values())
    tx, shrink = adamw_l1(), softshrink_loop(THRESHOLD)
    makers: dict[str, tuple[Callable[[], Row], float]] = {
        "funcreg, donating": (lambda: fused_row(tx, params, grads), THRESHOLD),
        "funcreg, donating, packed gradients": (lambda: fused_row(tx, params, grads, packed=True), THRESHOLD),
        "funcreg, not donating": (lambda: fused_row(tx, params, grads, donate=False), THRESHOLD),
        "funcreg, eager chain": (lambda: eager_row(tx, params, grads), THRESHOLD),
    }
    for kind in ("fused", "foreach"):
        chosen: Any = {kind: True}
        by_torch = partial(torch_row, partial(AdamW, lr=RATE, weight_decay=DECAY, **chosen), params, grads)
        makers[f"torch {kind}, no L1"] = (by_torch, 0.0)
        makers[f"torch {kind} + softshrink loop"] = (partial(by_torch, after=shrink), THRESHOLD)
    result = {}
    for name, (make, threshold) in makers.items():
        before = held()
        row = make()
        check(row, adamw_by_hand(params, grads, threshold))
        kept = held() - before - (unit if "packed" in name else 0)
        result[name] = {"held": kept / unit, "passing": passing(row) / unit}
        del row
    report("memory", {"unit": "bytes of the parameters", "rows": result}, options.write)


if __name__ == "__main__":
    main()
