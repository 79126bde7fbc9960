"""Gradients of single examples, clipped before they are summed: what differential privacy needs.

`vmap(grad(loss), in_dims=(None, 0))` gives a tree of gradients whose leaves have one more dimension, the first, with an
entry for each example.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Params, Scalar, Updates
from funcreg.core.checks import check_params
from funcreg.core.leafwise import beside, safe_sqrt, squared, wide, widen
from funcreg.core.ranges import check_range, flags, scalars
from funcreg.core.sharding import check_whole
from funcreg.core.tree import flatten, leaves_like, tree_leaves, tree_paths


def per_example_global_norm_clip(grads: Updates, l2_norm_clip: Scalar) -> tuple[Updates, Tensor]:
    r"""Sum gradients of examples, each scaled to at most a norm, :math:`\sum_i g_i \min(1, c / \|g_i\|)`.

    With noise of standard deviation :math:`\sigma c` on the sum this is DP-SGD: `differentially_private_aggregate` has
    both, for a chain.

    Args:
        grads: Gradients: a tree whose leaves have the examples as their first dimension.
        l2_norm_clip: :math:`c`, at least 0.

    Raises:
        ValueError: Leaves differ in the number of examples, or have no dimension for them; the message names one.

    Returns:
        The sum, a tree like the parameters, and the number of gradients that were scaled, int32.

    Example:
        >>> grads = {"weight": torch.tensor([[3.0, 0.0], [0.5, 0.0]]), "bias": torch.tensor([4.0, 0.0])}
        >>> total, clipped = per_example_global_norm_clip(grads, 1.0)
        >>> total, int(clipped)
        ({'weight': tensor([1.1000, 0.0000]), 'bias': tensor(0.8000)}, 1)

    References:
        Abadi et al., *Deep learning with differential privacy*, 2016.
    """
    check_range("l2_norm_clip", l2_norm_clip)
    (l2_norm_clip,) = scalars(l2_norm_clip=l2_norm_clip)
    count = check_examples(grads, "per_example_global_norm_clip")
    leaves, rebuild = flatten(grads)
    squares = [_squares(g) for g in leaves]
    device = leaves[0].device
    joint = torch.stack([x.to(device) for x in _of_one_dtype(squares)]).sum(0)
    factors, clipped = _factors(safe_sqrt(joint), l2_norm_clip)
    return rebuild([_weighted(g, factors.to(g.device), count) for g in leaves]), clipped


def per_example_layer_norm_clip(
    grads: Updates, global_l2_norm_clip: Scalar, uniform: bool = True
) -> tuple[Updates, Any]:
    r"""Sum gradients of examples, each leaf of each scaled to at most a share of a norm.

    The squares of the norms of all leaves, of which there are :math:`K`, sum to at most :math:`c^2`, as if the whole
    gradient were scaled. A leaf with large gradients takes nothing away from the others.

    Args:
        grads: Gradients: a tree whose leaves have the examples as their first dimension.
        global_l2_norm_clip: :math:`c`, at least 0.
        uniform: Whether each leaf has the norm :math:`c / \sqrt{K}`; False for :math:`c \sqrt{D_k / D}`, by its share
            of all entries.

    Raises:
        ValueError: Leaves differ in the number of examples, or have no dimension for them; the message names one.

    Returns:
        The sum, a tree like the parameters, and a tree of the numbers of gradients that were scaled, int32.

    Example:
        >>> grads = {"weight": torch.tensor([[3.0, 0.0], [0.5, 0.0]]), "bias": torch.tensor([4.0, 0.0])}
        >>> total, clipped = per_example_layer_norm_clip(grads, 2.0**0.5)
        >>> total, clipped["weight"]
        ({'weight': tensor([1.5000, 0.0000]), 'bias': tensor(1.)}, tensor(1, dtype=torch.int32))

    References:
        McMahan, Ramage, Talwar & Zhang, *Learning differentially private recurrent language models*, 2018.
    """
    check_range("global_l2_norm_clip", global_l2_norm_clip)
    (global_l2_norm_clip,) = scalars(global_l2_norm_clip=global_l2_norm_clip)
    flags(uniform=uniform)
    count = check_examples(grads, "per_example_layer_norm_clip")
    leaves, rebuild = flatten(grads)
    sizes = [1 if uniform else g.shape[1:].numel() for g in leaves]
    everything = max(sum(sizes), 1)
    sums, clipped = [], []
    for g, size in zip(leaves, sizes, strict=True):
        most = global_l2_norm_clip * math.sqrt(size / everything)
        factors, several = _factors(safe_sqrt(_squares(g)), most)
        sums.append(_weighted(g, factors, count))
        clipped.append(several)
    return rebuild(sums), rebuild(clipped)


def check_examples(grads: Updates, name: str, params: Params | None = None) -> int:
    """The number of examples, the same for all leaves; with parameters, each leaf is like one but for that."""
    check_params(grads, "grads")
    if params is not None:
        _check_like(grads, params, name)
    leaves, paths = tree_leaves(grads), tree_paths(grads)
    check_whole(name, paths, leaves)
    if not leaves:
        raise ValueError(f"{name} got a tree without leaves; expected gradients of examples")
    for path, g in zip(paths, leaves, strict=True):
        if not g.ndim or g.shape[0] != leaves[0].shape[0]:
            expected = f"{leaves[0].shape[0]}, as '{paths[0]}' has" if leaves[0].ndim else "a number of them"
            raise ValueError(
                f"grads '{path}' has shape {tuple(g.shape)}; expected the examples as its first dimension, {expected}. "
                "vmap(grad(loss), in_dims=(None, 0)) makes such gradients"
            )
    return leaves[0].shape[0]


def _check_like(grads: Updates, params: Params, name: str) -> None:
    paths, leaves = tree_paths(params), tree_leaves(params)
    for path, w, g in zip(paths, leaves, leaves_like(params, grads, ("params", "updates")), strict=True):
        if g.shape[1:] != w.shape or not g.ndim:
            shape = ", ".join(["examples", *map(str, w.shape)])
            raise ValueError(
                f"updates '{path}' has shape {tuple(g.shape)}; expected ({shape}), because {name} "
                "takes gradients of single examples. vmap(grad(loss), in_dims=(None, 0)) makes such gradients"
            )


def _squares(g: Tensor) -> Tensor:
    """For each example the sum of squares, in float32 at least."""
    return squared(widen(g)).flatten(1).sum(1) if g.ndim > 1 else squared(widen(g))


def _of_one_dtype(values: list[Tensor]) -> list[Tensor]:
    dtype = values[0].dtype
    for x in values[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in values]


def _factors(norms: Tensor, most: Scalar) -> tuple[Tensor, Tensor]:
    """What each gradient is multiplied by, and how many are not whole."""
    zero, most = norms == 0, beside(most, norms)
    factors = torch.where(zero, 1.0, (most / torch.where(zero, 1.0, norms)).clamp(max=1.0)).to(norms.dtype)
    return factors, (factors < 1).sum(dtype=torch.int32)


def _weighted(g: Tensor, factors: Tensor, count: int) -> Tensor:
    x = widen(g)
    weights = factors.to(wide(g.real.dtype)).reshape(count, *[1] * (g.ndim - 1))
    return (weights * x).sum(0).to(g.dtype)
