"""Groups of entries of one leaf along one dimension, and as lengths and directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from funcreg._typing import Scalar
from funcreg.leafwise import safe_sqrt, sign, squared


def grouped(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A leaf with the entries of each group along one last dimension."""
    if not dims:
        return w.unsqueeze(-1)
    return w.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims))


def ungrouped(x: Tensor, w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """What `grouped` made of a leaf, in the shape of that leaf again."""
    if not dims:
        return x.squeeze(-1)
    outer = [n for d, n in enumerate(w.shape) if d not in dims]
    return x.reshape([*outer, *[w.shape[d] for d in dims]]).movedim(tuple(range(-len(dims), 0)), dims)


def of_groups(x: Scalar, w: Tensor, dims: tuple[int, ...]) -> Scalar:
    """A hyperparameter that broadcasts against a leaf, beside the groups of that leaf."""
    return grouped(x.broadcast_to(w.shape), dims)[..., :1] if isinstance(x, Tensor) and x.ndim else x


def polar(w: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The norm of each group and its direction, zero for a group of zeros; computed in units of the largest entry.

    A group with infinite entries points along them alone.
    """
    if not w.numel():
        return squared(w).sum(dims, keepdim=True) if dims else squared(w), w.clone()
    size = w.abs()
    largest = size.amax(dims, keepdim=True) if dims else size
    plain = (largest > 0) & (largest < math.inf)
    unit = torch.where(plain, largest, torch.ones_like(largest))
    infinite = torch.where(size == math.inf, sign(w), torch.zeros_like(w))
    scaled = torch.where(largest == math.inf, infinite, w / unit)
    norms = squared(scaled)
    norms = safe_sqrt(norms.sum(dims, keepdim=True) if dims else norms)
    directions = scaled / torch.where(norms == 0, torch.ones_like(norms), norms)
    return torch.where(largest == math.inf, largest, norms * unit), directions
