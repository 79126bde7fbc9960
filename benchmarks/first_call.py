"""Seconds of the first call: from `fuse(...)` to the end of the first step, with a cold and a warm cache of kernels.

Every number comes from a process of its own, after the import of torch and funcreg. Cold is a cache directory that
is empty, warm is the same directory once more.

    python benchmarks/first_call.py --write
    python benchmarks/first_call.py --slow --write  # And torch.compile for 100 tensors.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

import torch
from common import (
    DECAY,
    RATE,
    STEPS,
    THRESHOLD,
    adamw_by_hand,
    adamw_l1,
    check,
    draw,
    eager_in_double,
    fused_row,
    report,
    saved,
    shapes,
    start,
    torch_row,
)

import funcreg as fr

TREES = {
    "10 tensors": shapes("transformer")[:10],
    "100 tensors": shapes("transformer")[:100],
    "300 tensors": shapes("transformer"),
    "1000 tensors": shapes("tiny"),
    "1000 tensors, 20 shapes": [(8 * k, 16) for k in range(1, 21)] * 50,
}
#: Every second leaf, whatever its shape.
HALF = fr.select("*[02468]")
CHAINS = {
    "AdamW, L1": adamw_l1,
    "clipped AdamW, L1, masked decay": lambda: fr.chain(
        fr.clip_by_global_norm(1.0),
        fr.scale_by_adam(),
        fr.add_decayed_weights(DECAY, mask=HALF),
        fr.scale_by_learning_rate(RATE),
        fr.soft_threshold(THRESHOLD),
    ),
    "`prox_adam`, group lasso": lambda: fr.prox_adam(RATE, fr.group_lasso, strength=1e-3),
}
COMPILED = "torch.compile(AdamW.step), no L1"


def measure(chain: str, tree: str) -> float:
    """Seconds of the first call in this process; the result of the first steps is compared thereafter."""
    params, grads = draw(TREES[tree], 0), draw(TREES[tree], 1)
    plain = lambda leaves: torch.optim.AdamW(leaves, RATE, weight_decay=DECAY, foreach=True)
    begin = time.perf_counter()
    if chain == COMPILED:
        row = torch_row(plain, params, grads, compiled=True)
    else:
        row = fused_row(CHAINS[chain](), params, grads)
    row.once()
    seconds = time.perf_counter() - begin
    if chain == COMPILED:
        expected = adamw_by_hand(params, grads, 0.0)
    else:
        expected = eager_in_double(CHAINS[chain](), params, grads)
    check(row, expected, steps=STEPS - 1)
    return seconds


def in_a_process(chain: str, tree: str, cache: str) -> float:
    command = [sys.executable, __file__, "--child", chain, "--tree", tree]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    told = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(told.splitlines()[-1])


def main() -> None:
    options = start(__doc__, "slow", child="chain to measure in this process", tree="its tree")
    if options.child:
        print(measure(options.child, options.tree))
        return
    trees = list(TREES)[:1] if options.quick else list(TREES)
    wanted = [(chain, tree) for chain in CHAINS for tree in trees]
    wanted += [(COMPILED, tree) for tree in list(TREES)[: 2 if options.slow else 1]]
    result = saved("first_call").get("seconds", {})
    for chain, tree in wanted:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = in_a_process(chain, tree, cache), in_a_process(chain, tree, cache)
        result.setdefault(chain, {})[tree] = {"cold": cold, "warm": warm}
        print(f"{chain:32} {tree:24} {cold:6.1f} s cold {warm:6.1f} s warm")
    report("first_call", {"seconds": result}, options.write)


if __name__ == "__main__":
    main()
