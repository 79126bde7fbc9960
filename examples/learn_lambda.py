"""Learn 64 strengths, one for each pixel of handwritten digits, by derivatives of the solution.

The inner problems, a logistic regression for each digit, are solved by `minimize` as one ensemble. Their solutions have
derivatives in every strength, by which the loss on samples that they have not seen goes down. At last it is compared,
on samples that were used for neither, with that of the best single strength out of sixteen.

    python examples/learn_lambda.py
"""

import argparse
import itertools

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot
from tqdm import trange

import funcreg as fr

Samples = tuple[Tensor, Tensor]
Params = dict[str, Tensor]


def samples(fitted: int, held_out: int) -> list[Samples]:
    """Pixels, and for each digit whether it is that: some samples to fit, some to choose strengths by, and the rest."""
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels)[order] / 16, one_hot(torch.tensor(digits)[order]).double()
    cuts = (0, fitted, fitted + held_out, len(y))
    return [(x[i:j], y[i:j]) for i, j in itertools.pairwise(cuts)]


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(x @ params["weight"] + params["bias"], y)


def fit(strengths: Tensor, x: Tensor, y: Tensor) -> Params:
    """The minima for one strength a pixel, a digit in each row."""
    begin = {"weight": torch.zeros(64, dtype=torch.float64), "bias": torch.zeros((), dtype=torch.float64)}
    strength = {"weight": strengths, "bias": 0.0}
    one = lambda y: fr.minimize(loss, begin, fr.half_l2, strength=strength, args=(x, y), tol=1e-6).params
    return vmap(one, in_dims=1)(y)


def judged(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """The loss of all digits."""
    return vmap(loss, in_dims=(0, None, 1))(params, x, y).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    fitted, held_out, new = samples(200, 800)

    singles = torch.logspace(-6, -1, 16, dtype=torch.float64)
    losses = vmap(lambda strength: judged(fit(strength.expand(64), *fitted), *held_out))(singles)  # At once.
    best = singles[losses.argmin()]
    single = judged(fit(best.expand(64), *fitted), *new)

    logs = best.log().expand(64).clone()
    tx = fr.adam(0.15)
    state = tx.init(logs)
    outer = grad(lambda logs: judged(fit(logs.exp(), *fitted), *held_out))
    for _ in trange(options.steps, desc="strengths", disable=None):
        updates, state = tx.update(outer(logs), state, logs)
        logs = fr.apply_updates(logs, updates)
    learned = judged(fit(logs.exp(), *fitted), *new)

    print(f"the best single strength, {best:.1e}: loss {single:.4f} on new samples")
    print(f"64 strengths, from {logs.min().exp():.1e} to {logs.max().exp():.1e}: loss {learned:.4f}")
    assert learned < single


if __name__ == "__main__":
    main()
