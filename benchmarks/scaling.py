"""How one donating step of AdamW with L1 grows with tensors and with parameters, against torch's fused AdamW without.

    python benchmarks/scaling.py --write

Needs 6 GiB of memory, for 100 million parameters.
"""

from __future__ import annotations

from typing import Any

from common import (
    DECAY,
    RATE,
    THRESHOLD,
    Row,
    adamw_by_hand,
    adamw_l1,
    against,
    check,
    draw,
    fused_row,
    report,
    start,
    torch_row,
)
from torch.optim import AdamW

TENSORS = {count: [(10**7 // count // 100, 100)] * count for count in (10, 30, 100, 300, 1000)}
PARAMETERS = {total: [(total // 20 // 100, 100)] * 20 for total in (10**5, 10**6, 10**7, 10**8)}
SWEEPS = {"tensors, of 10M parameters in all": TENSORS, "parameters, in 20 tensors": PARAMETERS}


def measure(sizes: list[tuple[int, ...]], packed: bool, quick: bool) -> dict[str, Any]:
    params, grads = draw(sizes, 0), draw(sizes, 1)
    reference = torch_row(lambda leaves: AdamW(leaves, RATE, weight_decay=DECAY, fused=True), params, grads)
    check(reference, adamw_by_hand(params, grads, 0.0))

    def make() -> Row:
        row = fused_row(adamw_l1(), params, grads, packed=packed)
        check(row, adamw_by_hand(params, grads, THRESHOLD))
        return row

    return against(reference, make, quick)


def main() -> None:
    options = start(__doc__)
    result: dict[str, Any] = {}
    for name, sweep in SWEEPS.items():
        for count, sizes in sweep.items():
            if options.quick:
                sizes = [(max(n // 20, 2), m) for n, m in sizes]
            for packed in (False, True):
                times = measure(sizes, packed, options.quick)
                result.setdefault(name, {}).setdefault(count, {})["packed" if packed else "gathered"] = times
                print(f"{count:,} {name}, packed: {packed} {1e3 * times['seconds']:9.3f} ms {times['ratio']:6.2f}")
    report("scaling", {"sweeps": result}, options.write)


if __name__ == "__main__":
    main()
