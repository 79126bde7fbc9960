"""One step of AdamW with L1, through `fuse` and by everybody else; 1.00 is torch's fused AdamW, which has no L1.

    python benchmarks/step.py --write
    python benchmarks/step.py --optax path/to/python --write  # Of an environment with optax and jax.
    python benchmarks/step.py --peers --write  # In an environment with TorchOpt and HeavyBall.

Results of the three merge. Each row takes turns with the reference, in blocks of calls.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from common import (
    DECAY,
    HERE,
    RATE,
    THRESHOLD,
    Leaves,
    Row,
    adamw_by_hand,
    adamw_l1,
    against,
    check,
    draw,
    eager_row,
    fused_row,
    lists,
    report,
    saved,
    shapes,
    softshrink_loop,
    start,
    torch_row,
)
from tables import WORKLOADS
from torch import Tensor
from torch.optim import AdamW

Made = tuple[Callable[[], Row], dict[str, float]]
REFERENCE = "torch `AdamW(fused=True)`, no L1"


def fused(leaves: list[Tensor]) -> AdamW:
    return AdamW(leaves, RATE, weight_decay=DECAY, fused=True)


def shrink_foreach(leaves: list[Tensor], _: Any) -> None:
    inside = lists._foreach_clamp_max(leaves, THRESHOLD)
    lists._foreach_clamp_min_(inside, -THRESHOLD)
    lists._foreach_sub_(leaves, inside)


def rows(params: Leaves, grads: Leaves, compiled: bool) -> dict[str, Made]:
    """What makes each row, and the numbers of the formula to which it is equal."""
    l1, plain = {"threshold": THRESHOLD}, {"threshold": 0.0}
    tx, shrink = adamw_l1(), softshrink_loop(THRESHOLD)

    def by_torch(after: Any = None, **kind: Any) -> Callable[[], Row]:
        make = lambda leaves: AdamW(leaves, RATE, weight_decay=DECAY, **kind)
        return lambda: torch_row(make, params, grads, after=after)

    found = {
        "funcreg, donating, packed gradients": (lambda: fused_row(tx, params, grads, packed=True), l1),
        "funcreg, donating": (lambda: fused_row(tx, params, grads), l1),
        "funcreg, not donating": (lambda: fused_row(tx, params, grads, donate=False), l1),
        "funcreg, donating, without a compiler": (lambda: fused_row(tx, params, grads, backend="eager"), l1),
        "funcreg, eager chain": (lambda: eager_row(tx, params, grads), l1),
        "torch fused + softshrink loop": (by_torch(shrink, fused=True), l1),
        "torch foreach + foreach L1": (by_torch(shrink_foreach, foreach=True), l1),
        "torch foreach, no L1": (by_torch(foreach=True), plain),
        "torch for-loop, no L1": (by_torch(foreach=False, fused=False), plain),
    }
    if compiled:
        make = lambda leaves: AdamW(leaves, RATE, weight_decay=DECAY, foreach=True)
        found["torch.compile(AdamW.step), no L1"] = (lambda: torch_row(make, params, grads, compiled=True), plain)
    return found


def peers(params: Leaves, grads: Leaves) -> dict[str, Made]:
    def torchopt_row() -> Row:
        torchopt = importlib.import_module("torchopt")

        tx = torchopt.adamw(RATE, weight_decay=DECAY)
        mine = {name: w.clone() for name, w in params.items()}
        state = tx.init(mine)

        given = {name: g.clone() for name, g in grads.items()}

        def call() -> None:
            nonlocal mine, state
            updates, state = tx.update(given, state, params=mine, inplace=True)
            mine = torchopt.apply_updates(mine, updates, inplace=True)

        def prepare() -> None:  # Updates are written into gradients.
            lists._foreach_copy_(list(given.values()), list(grads.values()))

        return Row(call, lambda: mine.values(), prepare)

    def heavyball_row() -> Row:
        heavyball = importlib.import_module("heavyball")

        # Its eps is the least denominator, and not added to it; here neither makes a difference.
        make = lambda leaves: heavyball.AdamW(leaves, RATE, (0.9, 0.999), eps=1e-16, weight_decay=DECAY)
        return torch_row(make, params, grads)

    found = {
        "torchopt": ("TorchOpt `adamw`, no L1", torchopt_row, {}),
        "heavyball": ("HeavyBall `AdamW`, no L1", heavyball_row, {"eps": 1e-30}),
    }
    here = {}
    for package, (name, make, numbers) in found.items():
        if importlib.util.find_spec(package):
            here[name] = (make, {"threshold": 0.0, **numbers})
        else:
            print(f"{package} is not installed and left out")
    return here


class OptaxRow(Row):
    """A process with optax, which checks itself and times itself when it is told to."""

    def __init__(self, python: str, sizes: list[tuple[int, ...]]) -> None:
        command = [python, str(HERE / "optax_step.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.given, self.told = self.process.stdin, self.process.stdout
        given = {"shapes": sizes, "rate": RATE, "decay": DECAY, "threshold": THRESHOLD}
        assert self._ask({**given, "threads": torch.get_num_threads()}) == "equal"

    def _ask(self, what: Any) -> Any:
        print(json.dumps(what), file=self.given, flush=True)
        return json.loads(self.told.readline())

    def block(self, calls: int) -> list[float]:
        return self._ask(calls)

    def __del__(self) -> None:
        self.process.communicate()


def main() -> None:
    options = start(__doc__, "peers", "slow", optax="Python of an environment with optax and jax")
    result = saved("step").get("workloads", {})
    for workload in WORKLOADS:
        sizes = shapes(workload, options.quick)
        params, grads = draw(sizes, 0), draw(sizes, 1)
        reference = torch_row(fused, params, grads)
        check(reference, adamw_by_hand(params, grads, 0.0))
        found = peers(params, grads) if options.peers else rows(params, grads, workload == "big" or options.slow)
        found = {} if options.optax else found
        times = result.setdefault(workload, {})

        def checked(make: Callable[[], Row], numbers: Any, params: Leaves = params, grads: Leaves = grads) -> Row:
            row = make()
            check(row, adamw_by_hand(params, grads, **numbers))
            return row

        makers: dict[str, Callable[[], Row]]
        makers = {name: functools.partial(checked, *made) for name, made in found.items()}
        if options.optax:
            makers["optax, jit, donating"] = functools.partial(OptaxRow, options.optax, sizes)
        for name, make in makers.items():
            times[name] = against(reference, make, options.quick)
            print(f"{workload:12} {name:40} {1e3 * times[name]['seconds']:9.3f} ms {times[name]['ratio']:7.2f}")
    report("step", {"reference": REFERENCE, "workloads": result}, options.write)


if __name__ == "__main__":
    main()
