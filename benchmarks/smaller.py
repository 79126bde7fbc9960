"""From a penalty to a smaller network, on handwritten digits: what each kind of zeros gives when it is deployed.

Two networks, the residual one of `examples/smaller_resnet.py` and one of three linear layers, are trained for the same
number of epochs, densely and with a penalty. What is zero is taken out, and the rest is compared with the dense
network: accuracy, memory of parameters, and time of a forward pass of 256 images on one core. Beside them stands
torch-pruning (`pip install torch-pruning`, left out where it is not installed): half of the epochs, magnitude pruning
of groups as in its manual, and the other half to recover. Run `python benchmarks/smaller.py --write`.
"""

from __future__ import annotations

import copy
import importlib.util
import runpy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import Row, against, report, saved, start
from torch import Tensor, nn

import funcreg as fr

example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "smaller_resnet.py"))
BATCH, RATE = 128, 2e-3
Data = tuple[Tensor, Tensor, Tensor, Tensor]


class Made(NamedTuple):
    """A network that is to be deployed, and the one as it was trained, whose outputs it should have."""

    trained: nn.Module
    smaller: nn.Module


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def train(net: nn.Module, data: Data, epochs: int, rate: float, penalty: Any = None, **options: Any) -> nn.Module:
    """Train a network with Adam, a falling learning rate, and a penalty."""
    images, labels, *_ = data
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    if penalty is not None:
        fr.regularize(optimizer, penalty, module=net, **options)
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
        scheduler.step()
    return net.eval()


# Ways


def channels(make: Callable[[], nn.Module], data: Data, epochs: int, rate: float, strength: float) -> Made:
    """Filters or units: a group lasso, and the dead ones taken out."""
    net = make()
    groups = fr.channel_groups(net, (data[0][:2],))
    penalty = fr.coupled(fr.group_lasso, groups)
    train(net, data, epochs, rate, penalty, strength=strength, weights="sqrt_size")
    return Made(net, fr.resized(net, fr.remove_dead(fr.with_buffers(net), groups)))


def entries(make: Callable[[], nn.Module], data: Data, epochs: int, rate: float, strength: float) -> Made:
    """Single entries: L1, and matrices in the CSR layout."""
    net = train(make(), data, epochs, rate, fr.l1, strength=strength, mask=fr.matrices)
    smaller = copy.deepcopy(net).requires_grad_(False)
    tree = {name: w.detach() for name, w in smaller.named_parameters()}
    smaller.load_state_dict(fr.to_sparse(tree, mask=fr.matrices), assign=True)
    return Made(net, smaller)


def two_of_four(make: Callable[[], nn.Module], data: Data, epochs: int, rate: float) -> Made:
    """Two of four neighbours: a constraint. Its layout needs a GPU."""
    net = train(make(), data, epochs, rate, fr.n_m_sparsity, mask=fr.matrices)
    return Made(net, net)


def rank(make: Callable[[], nn.Module], data: Data, epochs: int, rate: float, strength: float) -> Made:
    """Rank: the nuclear norm, and two thin layers for one."""
    net = train(make(), data, epochs, rate, fr.nuclear, strength=strength, mask=fr.matrices)
    return Made(net, fr.factorized(net))


def pruned(half: nn.Module, data: Data, epochs: int, rate: float, ratio: float, everywhere: bool) -> Made:
    """torch-pruning: magnitudes of groups, as its manual has it, and training to recover. `half` stays."""
    import torch_pruning as tp  # pyright: ignore[reportMissingImports]

    net = copy.deepcopy(half)
    pruner = tp.pruner.BasePruner(
        net,
        data[0][:2],
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        global_pruning=everywhere,
        ignored_layers=[layer for layer in net.modules() if isinstance(layer, nn.Linear) and layer.out_features == 10],
    )
    pruner.step()
    cut = copy.deepcopy(net).eval()
    train(net, data, epochs, rate)
    return Made(half, nn.ModuleList([cut, net]))  # As it was cut, and after it has recovered.


# What is measured


def memory(net: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    total = 0
    for x in (*net.parameters(), *net.buffers()):
        parts = (x.values(), x.crow_indices(), x.col_indices()) if x.layout == torch.sparse_csr else (x,)
        total += sum([part.numel() * part.element_size() for part in parts])
    return total


def stored(net: nn.Module) -> int:
    """Numbers that are kept as parameters."""
    return sum([w.values().numel() if w.layout == torch.sparse_csr else w.numel() for w in net.parameters()])


@torch.no_grad()
def measured(way: str, dense: nn.Module, made: Made, data: Data, quick: bool) -> dict[str, Any]:
    """One row: what is left of the dense network, and what is gained."""
    images, labels = data[2], data[3]
    trained, smaller = made
    cut = smaller
    if isinstance(smaller, nn.ModuleList):
        cut, smaller = smaller
    faster = smaller is not trained  # Else there is nothing to be timed.
    outputs = trained(images)
    row: dict[str, Any] = {
        "way": way,
        "accuracy": float((smaller(images).argmax(1) == labels).double().mean()),
        "parameters": stored(smaller),
        "memory": memory(smaller) / memory(dense),
        "change": float((cut(images) - outputs).abs().max() / outputs.abs().max()),
    }
    inputs = images[:256]
    forward = lambda net: Row(lambda: net(inputs), list)
    row["time"] = against(forward(dense), lambda: forward(smaller), quick, rounds=9, calls=3) if faster else None
    print(row, flush=True)
    return row


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def drawn() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return drawn


def residual(data: Data, epochs: int, quick: bool) -> Iterator[dict[str, Any]]:
    make = seeded(lambda: example["ResNet"](8 if quick else 16))
    dense = train(make(), data, epochs, 1e-2)
    see = lambda way, made: measured(way, dense, made, data, quick)
    yield see("dense", Made(dense, dense))
    for strength in (3e-4, 1e-3, 2e-3):
        yield see(f"channels, strength {strength:g}", channels(make, data, epochs, 1e-2, strength))
    if importlib.util.find_spec("torch_pruning") is not None:
        half = train(make(), data, epochs // 2, 1e-2)
        for ratio, everywhere in ((0.5, False), (0.7, False), (0.8, False), (0.7, True)):
            way = f"torch-pruning, {ratio:.0%} {'of all channels' if everywhere else 'of each layer'}"
            yield see(way, pruned(half, data, epochs - epochs // 2, 1e-2, ratio, everywhere))


def linear(data: Data, epochs: int, quick: bool) -> Iterator[dict[str, Any]]:
    make = seeded(perceptron)
    dense = train(make(), data, epochs, RATE)
    see = lambda way, made: measured(way, dense, made, data, quick)
    yield see("dense", Made(dense, dense))
    yield see("entries: `l1`, `to_sparse`", entries(make, data, epochs, RATE, 3e-4))
    yield see("2:4: `n_m_sparsity`", two_of_four(make, data, epochs, RATE))
    yield see("units: `group_lasso`, `resized`", channels(make, data, epochs, RATE, 2e-4))
    yield see("rank: `nuclear`, `factorized`", rank(make, data, epochs, RATE, 1e-2))


def main() -> None:
    options = start(__doc__, only="residual or linear; numbers of the other one are those that are written already")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    data = example["load"]()
    made = {
        make.__name__: list(make(data, 2 if options.quick else epochs, options.quick))
        for make, epochs in ((residual, 30), (linear, 60))
        if options.only in (None, make.__name__)
    }
    networks = {**saved("smaller").get("networks", {}), **made}
    ordered = {make.__name__: networks[make.__name__] for make in (residual, linear) if make.__name__ in networks}
    report("smaller", {"batch": BATCH, "networks": ordered}, options.write)


if __name__ == "__main__":
    main()
