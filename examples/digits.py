"""Sixteen strengths of L1 on handwritten digits, trained at once as one ensemble.

Each member of the ensemble is the same small network with a strength of its own. One `vmap` takes all their gradients,
and one fused proximal step moves them all, so that weights become exactly zero. The table and the picture show how
much of the network the digits need.

    python examples/digits.py
    python examples/digits.py --steps 20
"""

import argparse
from collections import OrderedDict

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.func import functional_call, grad, vmap
from tqdm import tqdm

import funcreg as fr

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # After the choice of a backend that needs no screen.

BATCH = 256


def load() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of 8 x 8 pixels and their digits, for training and for testing."""
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    train, test = train_test_split(torch.arange(len(labels)), test_size=500, random_state=0, stratify=labels)
    return images[train], labels[train], images[test], labels[test]


def main() -> None:
    parser = argparse.ArgumentParser(description="L1 of sixteen strengths on handwritten digits")
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    parser.add_argument("--out", default="digits.png", help="where the picture goes")
    options = parser.parse_args()

    torch.manual_seed(0)
    # Matrices this small gain nothing from a second core, and lose much by waiting for it when it is busy.
    torch.set_num_threads(1)
    images, labels, test_images, test_labels = load()

    model = nn.Sequential(OrderedDict(hidden=nn.Linear(64, 64), relu=nn.ReLU(), output=nn.Linear(64, 10)))
    strengths = torch.cat([torch.zeros(1), torch.logspace(-5, -2, 15)])  # The first member has no penalty.

    def logits(params, images):
        return functional_call(model, params, (images,))

    def loss(params, images, labels):
        return F.cross_entropy(logits(params, images), labels)

    # The penalty is nowhere in the loss: the step has it, and biases are free of it.
    rate = fr.cosine_decay_schedule(0.3, options.steps)
    tx = fr.ensemble(
        lambda strength: fr.prox_sgd(rate, fr.l1, strength=strength, momentum=0.9, mask=fr.matrices), strengths
    )
    step = fr.fuse(tx, donate=True)

    # All members start from the same weights, so that only the strength tells them apart.
    before = {name: w.detach() for name, w in model.named_parameters()}
    params, state = step.init({name: w.expand(len(strengths), *w.shape) for name, w in before.items()})
    gradients = vmap(grad(loss), in_dims=(0, None, None))

    for _ in tqdm(range(options.steps), desc=f"{len(strengths)} networks"):
        batch = torch.randint(len(labels), (BATCH,))
        params, state = step(params, gradients(params, images[batch], labels[batch]), state)

    # One number a member, each found by the same vmap.
    losses = vmap(loss, in_dims=(0, None, None))(params, images, labels)
    penalties = strengths * vmap(lambda params: fr.l1(params, mask=fr.matrices))(params)
    guesses = vmap(logits, in_dims=(0, None))(params, test_images).argmax(-1)
    accuracies = (guesses == test_labels).double().mean(-1)
    zeros = vmap(lambda params: fr.sparsity(params, fr.matrices))(params)
    # A hidden neuron is left if something comes in and something goes out.
    neurons = ((params["hidden.weight"] != 0).any(2) & (params["output.weight"] != 0).any(1)).sum(-1)

    print(f"{'lambda':>9} {'data loss':>10} {'penalty':>9} {'accuracy':>10} {'zeros':>9} {'neurons':>8}")
    for row in zip(strengths, losses, penalties, 100 * accuracies, 100 * zeros, neurons, strict=True):
        print("{:9.1e} {:10.4f} {:9.4f} {:8.1f} % {:7.1f} % {:8d}".format(*(number.item() for number in row)))

    # The strongest penalty that costs at most half a percent. This marks a line of the picture; to select a model,
    # it would have to be found on images that are neither trained nor tested on.
    chosen = int((accuracies >= accuracies[0] - 0.005).nonzero().max())
    print(
        f"lambda = {strengths[chosen]:.1e}: {100 * zeros[chosen]:.1f} % of the weights are exactly zero, "
        f"{neurons[chosen]} of 64 neurons are left, and accuracy is {100 * accuracies[chosen]:.1f} % "
        f"({100 * accuracies[0]:.1f} % without penalty)."
    )
    draw(options.out, before, params, strengths, accuracies, zeros, chosen)


def draw(out, before, params, strengths, accuracies, zeros, chosen) -> None:
    """Left, what a strength costs and brings; right, the weights before training, and after without and with L1."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")

    left.semilogx(strengths[1:], 100 * accuracies[1:], "o-", color="tab:blue", label="test accuracy")
    left.semilogx(strengths[1:], 100 * zeros[1:], "s-", color="tab:orange", label="weights that are exactly zero")
    left.axhline(100 * accuracies[0], color="tab:blue", linestyle=":", label="test accuracy without penalty")
    if chosen > 0:
        left.axvline(strengths[chosen], color="tab:green", linestyle="--", label=f"λ = {strengths[chosen]:.2g}")
    left.set(xlabel="strength of L1, λ", ylabel="%", ylim=(-3, 105), title="One network for each strength")
    left.legend(loc=(0.2, 0.06))

    def weights(params):
        return torch.cat([w.flatten() for w in params.values() if w.ndim == 2])

    plain, sparse = ({name: w[k] for name, w in params.items()} for k in (0, chosen))
    bins = torch.linspace(-1.5, 1.5, 62)
    share = f"after training with λ = {strengths[chosen]:.2g}: {100 * zeros[chosen]:.0f} % exactly zero"
    right.hist(weights(before), bins, color="lightgray", label="before training")
    right.hist(weights(plain), bins, histtype="step", color="tab:blue", label="after training without penalty")
    right.hist(weights(sparse), bins, histtype="step", color="tab:green", linewidth=1.5, label=share)
    right.set(xlabel="weight", ylabel="number of weights", yscale="log", ylim=(0.7, 1e5), title="Before and after")
    right.legend(loc="upper right")
    figure.savefig(out, dpi=120)
    print(f"picture in {out}")


if __name__ == "__main__":
    main()
