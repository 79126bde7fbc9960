"""How strong a penalty, which learning rate: sixty-four networks on handwritten digits, trained as one sweep.

A grid of learning rates and strengths of L1 is trained at once, with early stopping of what no longer improves. The
best member is loaded into the module and tested on images that no choice has seen. Where there is no grid but a
search, the same sweep trains the proposals of a round: of Optuna if it is installed, else random draws that are halved.

    python examples/tune.py
    python examples/tune.py --epochs 3 --rates 2 --strengths 2
"""

import argparse
import importlib.util

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import funcreg as fr

RANGES = {"lr": (1e-3, 3e-2), "strength": (1e-5, 1e-2)}


def load():
    """Images of 8 x 8 pixels and their digits, for the sweep and for the test."""
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    rest, test = train_test_split(torch.arange(len(labels)), test_size=400, random_state=0, stratify=labels)
    return (images[rest], labels[rest]), (images[test], labels[test])


def network():
    return nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 10))


def factory(lr, strength):
    return fr.prox_adam(lr, fr.l1, strength=strength, mask=fr.matrices)


def accuracy(outputs, labels):
    return (outputs.argmax(-1) == labels).double().mean()


def on_grid(data, options):
    grid = {
        "lr": torch.logspace(-3, -1.5, options.rates),
        "strength": [0.0, *torch.logspace(-4.5, -2, options.strengths - 1).tolist()],
    }
    return fr.sweep(
        network, F.cross_entropy, factory, grid, data, epochs=options.epochs, batch_size=64,
        score=accuracy, patience=8, compile=options.compile, progress=True,
    )  # fmt: skip


def searched(data, options, rounds=3, proposals=8):
    """Optuna proposes, a sweep trains all proposals of a round; without Optuna, draws that are halved."""
    shared = {"epochs": options.epochs, "batch_size": 64, "score": accuracy}
    if importlib.util.find_spec("optuna") is None:
        draws = {name: fr.log_uniform(*ends) for name, ends in RANGES.items()}
        result = fr.sweep(network, F.cross_entropy, factory, draws, data, draws=rounds * proposals, halving=3, **shared)
        return result.best
    import optuna  # pyright: ignore[reportMissingImports]  # It is optional.

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    for _ in range(rounds):
        trials = [study.ask() for _ in range(proposals)]
        configs = [{name: t.suggest_float(name, *ends, log=True) for name, ends in RANGES.items()} for t in trials]
        result = fr.sweep(network, F.cross_entropy, factory, configs, data, **shared)
        for trial, row in zip(trials, result.rows, strict=True):
            study.tell(trial, row["score"])
    return {**study.best_params, "score": study.best_value}


def main() -> None:
    parser = argparse.ArgumentParser(description="a sweep over learning rates and strengths of L1")
    parser.add_argument("--epochs", type=int, default=40, help="most passes over the training images")
    parser.add_argument("--rates", type=int, default=8, help="learning rates in the grid")
    parser.add_argument("--strengths", type=int, default=8, help="strengths in the grid, zero among them")
    parser.add_argument("--compile", action="store_true", help="compile the step: worth it for long sweeps")
    options = parser.parse_args()
    torch.set_num_threads(1)  # Matrices this small gain nothing from a second core.
    data, (test_images, test_labels) = load()

    result = on_grid(data, options)
    print("\n".join(str(result).splitlines()[:13]))

    model = network()
    for title, row in (("best", result.ranking[0]), ("sparsest within half a percent", sparsest(result))):
        model.load_state_dict(result.member(row))
        model.eval()
        with torch.no_grad():
            right = accuracy(model(test_images), test_labels)
        zeros = fr.sparsity(dict(model.named_parameters()), mask=fr.matrices)
        hyper = ", ".join(f"{name} {value:.2g}" for name, value in result.hyper(row).items())
        print(f"{title}: {hyper}, test accuracy {right:.1%}, {zeros:.0%} of the weights are exactly zero")

    found = searched(data, options)
    print(f"searched: lr {found['lr']:.4f}, strength {found['strength']:.6f}, validation accuracy {found['score']:.1%}")


def sparsest(result) -> int:
    """The row with the most zeros among those that are at most half a percent worse than the best."""
    zeros = torch.func.vmap(lambda params: fr.sparsity(params, mask=fr.matrices))(result.params)
    good = [k for k, row in enumerate(result.rows) if row["score"] >= result.best["score"] - 0.005]
    return max(good, key=lambda k: float(zeros[k]))


if __name__ == "__main__":
    main()
