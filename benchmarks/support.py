"""Which way to zeros keeps them under the noise of batches: a small network on handwritten digits.

A weight that is zero after one epoch should be zero after the next. For each optimizer, with L1 on the matrices: the
accuracy, the share of exact zeros, and the change of the support from one epoch to the next over the last ten epochs,
as a share of the weights that are alive. Seeds are members of one ensemble. Run `python benchmarks/support.py`; it
writes `benchmarks/support.json` and the tables of the pages.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import tables
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad, vmap

import funcreg as fr

HERE = pathlib.Path(__file__).parent
BATCH, HIDDEN, LATE = 64, 64, 10
STRENGTH = 1e-3


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and digits, for training and for testing."""
    data: Any = load_digits()
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[500:], order[:500]
    return images[train], labels[train], images[test], labels[test]


def logits(params: Any, images: Tensor) -> Tensor:
    hidden = F.relu(images @ params["hidden"]["weight"].mT + params["hidden"]["bias"])
    return hidden @ params["output"]["weight"].mT + params["output"]["bias"]


def loss(params: Any, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits(params, images), labels)


def draw(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def layer(inputs: int, outputs: int) -> dict[str, Tensor]:
        weight = (2 * torch.rand(outputs, inputs, generator=generator) - 1) / inputs**0.5
        return {"weight": weight, "bias": torch.zeros(outputs)}

    return {"hidden": layer(64, HIDDEN), "output": layer(HIDDEN, 10)}


def ways(steps: int) -> dict[str, fr.Transform]:
    l1: dict[str, Any] = {"strength": STRENGTH, "mask": fr.matrices}
    fading = fr.linear_schedule(0.9, 0.0, steps // 2)
    cosine = fr.cosine_decay_schedule
    return {
        "`add_penalty`, Adam": fr.chain(fr.add_penalty(fr.l1, **l1), fr.adam(3e-3)),
        "`prox_sgd`": fr.prox_sgd(0.3, fr.l1, **l1),
        "`prox_sgd`, momentum": fr.prox_sgd(0.03, fr.l1, momentum=0.9, **l1),
        "`prox_sgd`, momentum, cosine": fr.prox_sgd(cosine(0.1, steps), fr.l1, momentum=0.9, **l1),
        "`prox_adam`": fr.prox_adam(3e-3, fr.l1, **l1),
        "`prox_adam`, cosine": fr.prox_adam(cosine(1e-2, steps), fr.l1, **l1),
        "`rmda`": fr.rmda(0.3, fr.l1, **l1),
        "`rmda`, momentum fading": fr.rmda(0.3, fr.l1, momentum=fading, **l1),
        "`ramda`": fr.ramda(3e-3, fr.l1, **l1),
        "`ramda`, momentum fading": fr.ramda(3e-3, fr.l1, momentum=fading, **l1),
        "`ftrl`": fr.ftrl(0.3, fr.l1, **l1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="stability of exact zeros under the noise of batches")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)  # Matrices this small are no work to share between cores.
    images, labels, test_images, test_labels = load()
    batches = len(labels) // BATCH
    start = fr.tree_map(lambda *leaves: torch.stack(leaves), *[draw(seed) for seed in range(options.seeds)])
    slopes = vmap(grad(loss))
    rows = []
    print(f"{'way':30} {'accuracy':>9} {'loss + l1':>10} {'zeros':>8} {'change of support in an epoch':>30}")
    for name, tx in ways(options.epochs * batches).items():
        generator = torch.Generator().manual_seed(1)
        params, state = start, vmap(tx.init)(start)
        alive, changes = None, []
        for epoch in range(options.epochs):
            orders = [torch.randperm(len(labels), generator=generator) for _ in range(options.seeds)]
            for batch in torch.stack(orders)[:, : batches * BATCH].split(BATCH, dim=1):
                updates, state = vmap(tx.update)(slopes(params, images[batch], labels[batch]), state, params)
                params = fr.apply_updates(params, updates)
            weights = torch.cat([params[layer]["weight"].reshape(-1) for layer in params])
            before, alive = alive, weights != 0
            if before is not None and epoch >= options.epochs - LATE:
                changes.append(float((before != alive).sum() / alive.sum().clamp(min=1)))
        guesses = vmap(logits, in_dims=(0, None))(params, test_images).argmax(-1)
        losses = vmap(loss, in_dims=(0, None, None))(params, images, labels)
        penalties = vmap(lambda p: fr.l1(p, mask=fr.matrices))(params)
        row = {
            "way": name,
            "accuracy": float((guesses == test_labels).double().mean()),
            "objective": float((losses + STRENGTH * penalties).mean()),
            "zeros": float(fr.sparsity(params, fr.matrices)),
            "change": sum(changes) / max(len(changes), 1),
        }
        rows.append(row)
        print(
            f"{name:30} {100 * row['accuracy']:7.1f} % {row['objective']:10.4f} {100 * row['zeros']:6.1f} % "
            f"{100 * row['change']:28.2f} %",
            flush=True,
        )
    result = {"strength": STRENGTH, "batch": BATCH, "epochs": options.epochs, "seeds": options.seeds, "rows": rows}
    (HERE / "support.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    tables.write()


if __name__ == "__main__":
    main()
