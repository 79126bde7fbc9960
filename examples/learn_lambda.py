"""Learn 64 strengths, one for each pixel, by derivatives of the solution: a logistic regression on handwritten digits.

The inner problem is solved by `minimize`. Its solution has a derivative in every strength, by which the loss on samples
that it has not seen goes down. At last it is compared, on samples that were used for neither, with the best single
strength out of thirty.

    python examples/learn_lambda.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import trange

import funcreg as fr

Samples = tuple[Tensor, Tensor]


def samples(count: int) -> tuple[Samples, Samples, Samples]:
    """Threes and eights: some to fit, as many to choose strengths by, and the rest."""
    pixels, digits = load_digits(return_X_y=True)
    chosen = (digits == 3) | (digits == 8)
    x, y = torch.tensor(pixels[chosen]) / 16, torch.tensor(digits[chosen] == 3).double()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    first, second, rest = ((x[i:j], y[i:j]) for i, j in ((0, count), (count, 2 * count), (2 * count, None)))
    return first, second, rest


def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(x @ params["weight"] + params["bias"], y)


def fit(strengths: Tensor, fitted: Samples) -> dict[str, Tensor]:
    """The minimum for one strength a pixel."""
    begin = {"weight": torch.zeros(64, dtype=torch.float64), "bias": torch.zeros((), dtype=torch.float64)}
    found = fr.minimize(loss, begin, fr.half_l2, strength={"weight": strengths, "bias": 0.0}, args=fitted, tol=1e-6)
    return found.params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    fitted, held_out, new = samples(100)
    judged = lambda logs: loss(fit(logs.exp(), fitted), *held_out)

    singles = torch.logspace(-6, -1, 30, dtype=torch.float64)
    losses = vmap(judged)(singles.log().unsqueeze(1).expand(30, 64))
    best = singles[losses.argmin()]
    single = fit(best.expand(64), fitted)

    logs = best.log().expand(64).clone()
    tx = fr.adam(0.1)
    state = tx.init(logs)
    for _ in trange(options.steps, desc="strengths", disable=None):
        updates, state = tx.update(grad(judged)(logs), state, logs)
        logs = fr.apply_updates(logs, updates)
    learned = fit(logs.exp(), fitted)

    print(f"the best single strength, {best:.1e}: loss {loss(single, *new):.4f} on new samples")
    print(f"64 strengths, from {logs.min().exp():.1e} to {logs.max().exp():.1e}: loss {loss(learned, *new):.4f}")
    assert loss(learned, *new) < loss(single, *new)


if __name__ == "__main__":
    main()
