"""Penalties as priors on handwritten digits: the best weights, a deep ensemble, and samples of the posterior.

A network learns from a hundred images. Its ridge penalty is a Gaussian prior, so that training finds the weights of
highest posterior probability (MAP). Eight members trained at once from different starts are a deep ensemble; Langevin
dynamics (SGLD) goes on from each of them and samples weights. Both average probabilities, and know better what they do
not know: the table has the log loss and the calibration error on images that nobody was trained on.

    python examples/bayesian.py
    python examples/bayesian.py --steps 20
"""

import argparse
from collections import OrderedDict, deque

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.func import functional_call, grad, vmap
from tqdm import tqdm

import funcreg as fr

MEMBERS, EXAMPLES = 8, 100


def load() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of 8 x 8 pixels and their digits, few for training and many for testing."""
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    train, test = train_test_split(torch.arange(len(labels)), train_size=EXAMPLES, random_state=0, stratify=labels)
    return images[train], labels[train], images[test], labels[test]


def calibration_error(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """The expected calibration error: how far confidence and accuracy are apart, in bins of confidence, on average."""
    confidence, guesses = probabilities.max(-1)
    right = (guesses == labels).double()
    which = (confidence * bins).long().clamp(max=bins - 1)
    gaps = [abs((confidence[which == k] - right[which == k]).sum().item()) for k in range(bins)]
    return sum(gaps) / len(labels)


def scores(probabilities: torch.Tensor, labels: torch.Tensor) -> tuple[float, float, float]:
    """Accuracy, log loss and calibration error."""
    accuracy = (probabilities.argmax(-1) == labels).double().mean().item()
    log_loss = F.nll_loss(probabilities.log(), labels).item()
    return accuracy, log_loss, calibration_error(probabilities, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description="MAP, a deep ensemble and Langevin dynamics on handwritten digits")
    parser.add_argument("--steps", type=int, default=1000, help="steps of training, and of sampling")
    parser.add_argument("--scale", type=float, default=10.0, help="standard deviation of a weight in the prior")
    parser.add_argument("--temperature", type=float, default=0.1, help="of the samples; 1 for the posterior itself")
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)  # Matrices this small gain nothing from a second core.
    images, labels, test_images, test_labels = load()

    def network() -> nn.Module:
        return nn.Sequential(OrderedDict(hidden=nn.Linear(64, 64), relu=nn.ReLU(), output=nn.Linear(64, 10)))

    model, modules = network(), [network() for _ in range(MEMBERS)]
    starts = {name: torch.stack([dict(m.named_parameters())[name].detach() for m in modules])
              for name, _ in model.named_parameters()}  # fmt: skip

    def logits(params, images):
        return functional_call(model, params, (images,))

    def loss(params):
        return F.cross_entropy(logits(params, images), labels)

    # The loss is a mean over examples, and so is the logarithm of the prior: 1 / (n s^2) times half the squares.
    prior = fr.add_penalty(fr.half_l2, strength=1 / (EXAMPLES * options.scale**2), mask=fr.matrices)
    gradients = vmap(grad(loss))

    def run(make, params, label):
        """Parameters after each step of an ensemble, one member for each key."""
        step = fr.fuse(fr.ensemble(make, torch.arange(MEMBERS)), donate=True)
        params, state = step.init(params)
        for _ in tqdm(range(options.steps), desc=label):
            params, state = step(params, gradients(params), state)
            yield params

    rates = fr.cosine_decay_schedule(1e-2, options.steps)
    (best,) = deque(run(lambda key: fr.chain(prior, fr.adam(rates)), starts, "training"), maxlen=1)
    members = {name: w.clone() for name, w in best.items()}

    def guess(params):
        return vmap(logits, in_dims=(0, None))(params, test_images).softmax(-1)

    # Langevin dynamics: plain steps downhill, and noise of variance 2 rate / n. Samples of networks are better a little
    # colder than the posterior (Wenzel and others, How good is the Bayes posterior in deep neural networks really?).
    rate = 0.05
    variance = options.temperature * 2 * rate / EXAMPLES
    sampler = lambda key: fr.chain(prior, fr.sgd(rate), fr.add_noise(variance, 0.0, key))
    drawn, every = [], max(options.steps // 20, 1)
    for i, sample in enumerate(run(sampler, members, "sampling")):
        if i % every == 0 and i >= options.steps // 4:
            drawn.append(guess(sample).mean(0))

    each = guess(members)
    alone = torch.tensor([scores(probabilities, test_labels) for probabilities in each]).mean(0).tolist()
    rows = {
        "one member (MAP), mean of 8": alone,
        "deep ensemble of 8": scores(each.mean(0), test_labels),
        "Langevin dynamics, 8 chains": scores(torch.stack(drawn).mean(0), test_labels),
    }
    print(f"{'':30} {'accuracy':>9} {'log loss':>9} {'calibration error':>18}")
    for name, (accuracy, log_loss, error) in rows.items():
        print(f"{name:30} {100 * accuracy:7.1f} % {log_loss:9.3f} {100 * error:16.1f} %")


if __name__ == "__main__":
    main()
