"""AdamW with L1 by optax under `jax.jit` with donated buffers: the process that `step.py --optax` asks for times.

A line of JSON with shapes and numbers comes in, and "equal" goes out once the step agrees with the formula in float64.
Then each line is a number of calls, and their seconds go out.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

import numpy as np


def by_hand(w: np.ndarray, g: np.ndarray, steps: int, given: dict) -> np.ndarray:
    """The formula of AdamW with soft thresholding, in float64."""
    w, g = w.astype(np.float64), g.astype(np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for n in range(1, steps + 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - given["rate"] * (m / (1 - 0.9**n) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8) + given["decay"] * w)
        w = np.sign(w) * np.maximum(np.abs(w) - given["threshold"], 0)
    return w


def main() -> None:
    given = json.loads(sys.stdin.readline())
    if hasattr(os, "sched_setaffinity"):  # Before jax counts the cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given["threads"]])
    jax, jnp, optax = map(importlib.import_module, ("jax", "jax.numpy", "optax"))

    random = np.random.default_rng(0)
    start, slopes = [[0.02 * random.standard_normal(s, np.float32) for s in given["shapes"]] for _ in range(2)]
    params, grads = [jnp.array(w) for w in start], [jnp.array(g) for g in slopes]
    tx = optax.adamw(given["rate"], weight_decay=given["decay"])
    state, t = tx.init(params), given["threshold"]

    def step(params, grads, state):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return jax.tree.map(lambda w: w - jnp.clip(w, -t, t), params), state

    step = jax.jit(step, donate_argnums=(0, 2))
    for _ in range(3):
        params, state = step(params, grads, state)
    for w, s, g in zip(params, start, slopes, strict=True):
        np.testing.assert_allclose(np.asarray(w, np.float64), by_hand(s, g, 3, given), rtol=0, atol=1e-7)
    del start, slopes
    print(json.dumps("equal"), flush=True)

    for line in sys.stdin:
        seconds = []
        for _ in range(json.loads(line) + 1):
            begin = time.perf_counter()
            params, state = jax.block_until_ready(step(params, grads, state))
            seconds.append(time.perf_counter() - begin)
        print(json.dumps(seconds[1:]), flush=True)


if __name__ == "__main__":
    main()
