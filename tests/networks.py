"""Networks with dead groups, for tests that take them out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcreg as fr

Families = list[dict[str, Any]]
#: For tests in which nothing is dead, or everything, as `remove_dead` says.
all_or_nothing = pytest.mark.filterwarnings("ignore:all groups are dead", "ignore:remove_dead (found|takes)")


def kept(dim: int, size: int = 1, packed: int = 1) -> fr.Along:
    """Entries that go with their group and have no part in its norm."""
    return fr.Along(dim, size, packed, penalized=False)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def labels(leaf: Tensor, where: int | fr.Along) -> tuple[Tensor, int]:
    """For each entry of a leaf the number of its group, and how many groups there are."""
    along = where if isinstance(where, fr.Along) else fr.Along(where)
    dim = along.dim % leaf.ndim
    count = leaf.shape[dim] // (along.size * along.packed)
    index = torch.arange(leaf.shape[dim], device=leaf.device) // along.size % count
    return index.reshape([-1 if d == dim else 1 for d in range(leaf.ndim)]).expand(leaf.shape), count


def halve(module: nn.Module, families: Families, seed: int = 0) -> nn.Module:
    """Draw all parameters and statistics, and zero what is penalized in a random half of each family's groups.

    Weights keep the size of what goes through them, so that outputs tell inputs apart.

    Families take turns in losing a group more than half, so that layers come to differ in width.
    """
    generator = torch.Generator().manual_seed(seed)
    known = tensors(module)
    for name, x in known.items():
        if x.is_floating_point() and x.layout == torch.strided and "inv_freq" not in name:
            size = (4 / (x.numel() / len(x))) ** 0.5 if x.ndim > 1 else 0.2
            drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu") * size
            positive = "running" in name or (x.ndim == 1 and name.endswith("weight"))
            x.data = (drawn.abs() + 0.5 if positive else drawn).to(x)
    for i, family in enumerate(families):
        first, where = next(iter(family.items()))
        count = labels(known[first], where)[1]
        gone = torch.randperm(count, generator=generator, device="cpu") < count // 2 + i // 2 % 2 * (count > 3)
        for name, along in family.items():
            if name in known and (not isinstance(along, fr.Along) or along.penalized):
                known[name].data[gone.to(known[name].device)[labels(known[name], along)[0]]] = 0
    return module


def smaller(module: nn.Module, families: Families, example_inputs: Any = None, **options: Any) -> nn.Module:
    """A module without its dead groups."""
    return fr.resized(module, fr.remove_dead(tensors(module), families), example_inputs, **options)
