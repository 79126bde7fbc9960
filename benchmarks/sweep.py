"""Sixty-four trainings of a small network on handwritten digits: a loop over them, and one `sweep`.

A grid of eight learning rates and eight strengths of L1, AdamW, minibatches. 1x is what is written by hand: one
training after the other, each with its model and `AdamW(fused=True)`, and a softshrink after the step. All ways must
reach the same validation accuracies. Times are those of the whole run; where code is compiled, once with nothing in
the caches of the compiler, and once more as in a later process.

    python benchmarks/sweep.py --write
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from common import report, start
from sklearn.datasets import load_digits
from torch import Tensor, nn

import funcreg as fr

BATCH, DECAY = 32, 1e-2
REFERENCE = "loop over trainings, `AdamW(fused=True)`, softshrink"


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and digits, for training and for validation."""
    found: Any = load_digits()
    images, labels = torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, valid = order[360:], order[:360]
    return images[train], labels[train], images[valid], labels[valid]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def configurations(epochs: int, quick: bool) -> list[tuple[float, float, int]]:
    return [(rate, strength, epochs) for rate, strength in product(*grid(quick).values())]


def grid(quick: bool) -> dict[str, list[float]]:
    count = 2 if quick else 8
    return {"rate": torch.logspace(-3, -1.5, count).tolist(), "strength": torch.logspace(-5, -2, count).tolist()}


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.argmax(-1) == labels).float().mean()


def train(config: tuple[float, float, int]) -> float:
    """One training by hand, and its accuracy; it measures once, at the end."""
    rate, strength, epochs = config
    images, labels, valid_images, valid_labels = load()
    torch.manual_seed(0)
    model = network()
    matrices = [w for w in model.parameters() if w.ndim > 1]
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=DECAY, fused=True)
    for _ in range(epochs):
        order = torch.randperm(len(labels))
        for k in range(len(labels) // BATCH):
            rows = order[k * BATCH : (k + 1) * BATCH]
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            with torch.no_grad():
                for w in matrices:
                    w.copy_(F.softshrink(w, rate * strength))
    with torch.no_grad():
        return float(accuracy(model(valid_images), valid_labels))


def factory(rate: Any, strength: Any) -> fr.Transform:
    return fr.chain(fr.adamw(rate, weight_decay=DECAY), fr.soft_threshold(rate * strength, mask=fr.matrices))


def loop(epochs: int, quick: bool) -> list[float]:
    return [train(config) for config in configurations(epochs, quick)]


def processes(epochs: int, quick: bool) -> list[float]:
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(train, configurations(epochs, quick)))


def swept(epochs: int, quick: bool, compile: bool) -> list[float]:
    images, labels, *valid = load()
    options: dict[str, Any] = {"batch_size": BATCH, "validation": valid, "score": accuracy, "compile": compile}
    result = fr.sweep(network, F.cross_entropy, factory, grid(quick), (images, labels), epochs=epochs, **options)
    return [row["score"] for row in result.rows]


def again(epochs: int, quick: bool) -> list[float]:
    """As in a later process: nothing of the compiler in memory, its files still there."""
    torch.compiler.reset()
    return swept(epochs, quick, True)


WAYS: dict[str, Callable[[int, bool], list[float]]] = {
    REFERENCE: loop,
    "the same in two processes of one thread": processes,
    "`sweep`": lambda epochs, quick: swept(epochs, quick, False),
    "`sweep(compile=True)`, nothing cached": lambda epochs, quick: swept(epochs, quick, True),
    "`sweep(compile=True)`, cached": again,
}


def main() -> None:
    options = start(__doc__, epochs="passes over the data, 200 unless told")
    epochs = int(options.epochs or (2 if options.quick else 200))
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for name, way in WAYS.items():
            begin = time.perf_counter()
            found = way(epochs, options.quick)
            rows[name] = {"seconds": time.perf_counter() - begin, "best": max(found), "mean": statistics.mean(found)}
            print(f"{name:54} {rows[name]['seconds']:8.1f} s, accuracy {max(found):.3f}, mean {rows[name]['mean']:.3f}")
            if not options.quick:  # Other minibatches, and so not the same bits.
                assert abs(rows[name]["best"] - rows[REFERENCE]["best"]) < 0.01, "another accuracy of the best"
                assert abs(rows[name]["mean"] - rows[REFERENCE]["mean"]) < 0.01, "another accuracy of the grid"
    report("sweep", {"reference": REFERENCE, "epochs": epochs, "rows": rows}, options.write)


if __name__ == "__main__":
    main()
