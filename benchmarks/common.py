"""What the benchmarks share: workloads, rows that take turns on the clock, checks of results, and the report."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import pathlib
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tables
import torch
import torch.nn.functional as F
from tables import saved as saved
from torch import Tensor

import funcreg as fr

HERE = pathlib.Path(__file__).parent
Leaves = dict[str, Tensor]
lists: Any = torch  # Its functions of lists of tensors are missing from its types.


def start(about: str | None, *flags: str, **choices: str) -> argparse.Namespace:
    """Options of a benchmark: the two that all have, and its own, flags and names with a help text."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="few rounds of small sizes, only to see that it works")
    parser.add_argument("--write", action="store_true", help="write the JSON and the tables of the pages")
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true")
    for name, text in choices.items():
        parser.add_argument(f"--{name}", help=text)
    options = parser.parse_args()
    if options.quick and options.write:
        parser.error("quick numbers are not worth writing")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5 and not options.quick:  # Threads that wait for each other wait for other processes, too.
        print(f"the machine is busy with something else (load {load:.1f}); these times will say little")
    return options


# Workloads


def shapes(workload: str, quick: bool = False) -> list[tuple[int, ...]]:
    """Shapes of a small transformer (300 tensors, 10.7 million parameters), of big matrices, or of tiny vectors."""
    layer = [(768, 256), (768,), (256, 256), (256,), (1024, 256), (1024,), (256, 1024), (256,), *[(256,)] * 4]
    transformer = [(4096, 256), (512, 256), *layer * 12]
    transformer += [(256,)] * (300 - len(transformer))
    found = {"transformer": transformer, "big": [(2000, 4000)] * 5, "tiny": [(64,)] * 1000}[workload]
    # Small, but still with leaves above and below the size from which a step treats them one by one.
    return [tuple([max(n // 4, 2) for n in shape]) for shape in found[:30]] if quick else list(found)


def draw(shapes: Iterable[tuple[int, ...]], seed: int, scale: float = 0.02) -> Leaves:
    """Normal numbers in a tree of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i:04}": scale * torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


# Rows


class Row:
    """One way to do the work: `step` does it once, and `results` are what came of it so far.

    What `prepare` does before each step, such as new gradients where a step spoils them, is not on the clock.
    """

    def __init__(
        self,
        step: Callable[[], Any],
        results: Callable[[], Iterable[Tensor]],
        prepare: Callable[[], Any] = lambda: None,
    ) -> None:
        self._step, self.results, self._prepare = step, results, prepare

    def once(self) -> float:
        """Seconds of a step."""
        self._prepare()
        begin = time.perf_counter()
        self._step()
        return time.perf_counter() - begin

    def block(self, calls: int) -> list[float]:
        """Seconds of some steps in succession, after one that is not counted and fills the caches."""
        return [self.once() for _ in range(calls + 1)][1:]


def fused_row(
    tx: fr.Transform, params: Leaves, grads: Leaves, donate: bool = True, packed: bool = False, **options: Any
) -> Row:
    """A chain through `fuse`; packed gradients lie where the step reads them, and stay what they are."""
    warnings.filterwarnings("ignore", "nothing was written into the gradients")
    step = fr.fuse(tx, donate=donate, **options)
    params, state = step.init(params)
    if packed:
        buffers = step.gradients(params)
        for name, g in grads.items():
            buffers[name].copy_(g)
        grads = buffers

    def call() -> None:
        nonlocal params, state
        params, state = step(params, grads, state)

    return Row(call, lambda: params.values())


def eager_row(tx: fr.Transform, params: Leaves, grads: Leaves) -> Row:
    """A chain as plain functions."""
    state = tx.init(params)

    def call() -> None:
        nonlocal params, state
        updates, state = tx.update(grads, state, params)
        params = fr.apply_updates(params, updates)

    return Row(call, lambda: params.values())


def torch_row(
    make: Callable[[list[Any]], Any],
    params: Leaves,
    grads: Leaves,
    before: Callable[[list[Tensor]], Any] = lambda leaves: None,
    after: Callable[[list[Tensor], Any], Any] | None = None,
    fresh: bool = False,
    compiled: bool = False,
) -> Row:
    """A torch optimizer, with something done before its step or, under `no_grad`, after it.

    If `fresh`, gradients are copied anew before each step, because something writes into them or lets go of them.
    """
    leaves = [w.clone().requires_grad_() for w in params.values()]
    own = [g.clone() if fresh else g for g in grads.values()]

    def prepare() -> None:
        if fresh:
            lists._foreach_copy_(own, list(grads.values()))
        for w, g in zip(leaves, own, strict=True):
            w.grad = g

    optimizer = make(leaves)
    step = torch.compile(optimizer.step) if compiled else optimizer.step

    def call() -> None:
        before(leaves)
        step()
        if after:
            with torch.no_grad():
                after(leaves, optimizer)

    return Row(call, lambda: leaves, prepare)


def softshrink_loop(threshold: float) -> Callable[[list[Tensor], Any], None]:
    """The L1 that users write after the step."""

    def shrink(leaves: list[Tensor], _: Any) -> None:
        for w in leaves:
            w.copy_(F.softshrink(w, threshold))

    return shrink


# AdamW with L1, the chain that most benchmarks step

RATE, DECAY, THRESHOLD = 1e-3, 1e-2, 1e-6
STEPS = 3  # Before a row is compared with what it should be.


def eager_in_double(tx: fr.Transform, params: Leaves, grads: Leaves) -> list[Tensor]:
    """Where the plain functions of a chain lead, in float64; `tests` compare them with formulas and with optax."""
    row = eager_row(
        tx, {name: w.double() for name, w in params.items()}, {name: g.double() for name, g in grads.items()}
    )
    for _ in range(STEPS):
        row.once()
    return list(row.results())


def adamw_l1() -> fr.Transform:
    return fr.chain(
        fr.scale_by_adam(),
        fr.add_decayed_weights(DECAY),
        fr.scale_by_learning_rate(RATE),
        fr.soft_threshold(THRESHOLD),
    )


def adamw_by_hand(params: Leaves, grads: Leaves, threshold: float, eps: float = 1e-8) -> Iterable[Tensor]:
    """The formula of AdamW with soft thresholding, in float64, one leaf after the other."""
    for w, g in zip(params.values(), grads.values(), strict=True):
        w, g = w.double(), g.double()
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for n in range(1, STEPS + 1):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w = w - RATE * (m / (1 - 0.9**n) / ((v / (1 - 0.999**n)).sqrt() + eps) + DECAY * w)
            w = w.sign() * (w.abs() - threshold).clamp(min=0)
        yield w


def check(row: Row, expected: Iterable[Tensor], tolerance: float = 1e-7, steps: int = STEPS) -> None:
    """Assert that a row, after its first steps, is where it should be; parameters are about 0.02, steps 0.001."""
    for _ in range(steps):
        row.once()
    for w, z in zip(row.results(), expected, strict=True):
        torch.testing.assert_close(w.detach().double(), z.detach().double(), rtol=0, atol=tolerance)


def check_moved(row: Row, expected: Iterable[Tensor], began: Iterable[Tensor], tolerance: float = 1e-3) -> None:
    """Assert that a row went where it should, up to a share of the way: Adam enlarges the rounding of gradients."""
    ways = [(w.detach() - z.detach(), z.detach() - s) for w, z, s in zip(row.results(), expected, began, strict=True)]
    missed, went = (sum(float(x.double().square().sum()) for x in column) ** 0.5 for column in zip(*ways, strict=True))
    assert missed < tolerance * went, f"missed by {missed / went:.1e} of the way"


# The clock


def against(reference: Row, make: Callable[[], Row], quick: bool, rounds: int = 15, calls: int = 7) -> dict[str, Any]:
    """Make a row, check it as it is made, and let it take turns with the reference, block by block.

    The ratio is the median over rounds of the ratio of the two medians of a round: what slows the machine for a
    while slows both.
    """
    row = make()
    if quick:
        rounds, calls = 2, 2
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(statistics.median(reference.block(calls)))
        ours.append(statistics.median(row.block(calls)))
    del row
    gc.collect()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return {
        "seconds": statistics.median(ours),
        "ratio": ratio,
        "quartiles": [low, high],
        "reference seconds": statistics.median(theirs),
    }


# The report


def machine() -> dict[str, Any]:
    names = []
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


def report(name: str, result: Mapping[str, Any], write: bool) -> None:
    """Print the table of these numbers; if asked, write the JSON beside the benchmark and the table into the pages."""
    header, *rows = tables.TABLES[name][0](dict(result))
    print()
    for row in [header, *rows]:
        print("| " + " | ".join(row) + " |")
    if write:
        text = json.dumps({**machine(), **result}, indent=1, ensure_ascii=False)
        (HERE / f"{name}.json").write_text(text + "\n")
        tables.write()
