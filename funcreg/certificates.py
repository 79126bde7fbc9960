"""Certificates: is this a solution, from which strength on is everything zero, how sparse is it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcreg._typing import Hyper, Mask, Params
from funcreg.penalty import Penalty
from funcreg.regularizing import check_penalty
from funcreg.transform import nonnegative
from funcreg.tree import check_params, keep, mask_leaves, tree_leaves, tree_map


def kkt_residual(
    params: Params,
    grads: Params,
    penalty: Penalty,
    *hyper: Hyper,
    strength: Hyper = 1.0,
    mask: Mask | None = None,
    **options: Any,
) -> Tensor:
    r"""How far from a solution: :math:`\max_i |r_i|`, :math:`r` the shortest in :math:`\nabla f + \lambda \partial g`.

    It is 0 exactly at a minimum of :math:`f + \lambda g`, and in the units of the gradient. For `l1`, an entry that
    is not 0 counts :math:`|\nabla_i f + \lambda \operatorname{sign}(w_i)|`, a zero
    :math:`\max(|\nabla_i f| - \lambda, 0)`. Leaves out of the mask count :math:`|\nabla_i f|`. A penalty without a
    residual rule of its own is judged by the residual of its proximal operator,
    :math:`w - \operatorname{prox}_{\lambda g}(w - \nabla f)`.

    Args:
        params: Parameters :math:`w`.
        grads: Gradients of the loss :math:`f` alone, without the penalty, at `params`.
        penalty: A penalty :math:`g` such as `l1`.
        hyper: Its hyperparameters.
        strength: :math:`\lambda`: number of at least 0, tensor, or a tree of them like the parameters.
        mask: Leaves on which the penalty acts.
        options: Static options of the penalty, such as `dim`.

    Shape:
        A 0-dim tensor.

    Example:
        The minimum of :math:`\frac{1}{2} (w - 1)^2 + \frac{1}{2} |w|` is at 0.5.

        >>> w = torch.tensor([0.5])
        >>> kkt_residual({"w": w}, {"w": w - 1}, l1, strength=0.5)
        tensor(0.)
        >>> kkt_residual({"w": w + 0.25}, {"w": w - 0.75}, l1, strength=0.5)
        tensor(0.2500)
    """
    nonnegative(strength=strength)
    check_penalty(penalty, hyper, options)
    residual = penalty.residual(params, grads, *hyper, strength=strength, mask=mask, **options)
    return _largest(residual)


def _largest(tree: Params) -> Tensor:
    sizes = [leaf.abs().amax() for leaf in tree_leaves(tree) if leaf.numel()]
    if not sizes:
        return torch.zeros(())
    dtype = sizes[0].dtype
    for size in sizes[1:]:
        dtype = torch.promote_types(dtype, size.dtype)
    return torch.stack([size.to(sizes[0].device, dtype) for size in sizes]).amax()


def lambda_max(grads: Params, penalty: Penalty, *hyper: Hyper, mask: Mask | None = None, **options: Any) -> Tensor:
    r"""Least strength that makes zero a solution, :math:`\min \{\lambda : -\nabla f(0) \in \lambda \partial g(0)\}`.

    For `l1` this is :math:`\max_i |\nabla_i f(0)|`; a path of strengths starts here. It is found from the definition,
    as the least step whose proximal operator takes all gradients to zero, and so holds for every convex penalty:
    bisection over the 64 bits of a number, exact to the last one. Infinite for a penalty that makes no zeros.

    Args:
        grads: Gradients of the loss at zero. Leaves that carry no penalty, such as an intercept, are fitted first.
        penalty: A convex penalty such as `l1`.
        hyper: Its hyperparameters.
        mask: Leaves on which the penalty acts; the others are not looked at.
        options: Static options of the penalty, such as `dim`.

    Shape:
        A 0-dim tensor of float64.

    Example:
        >>> lambda_max({"weight": torch.tensor([0.5, -2.0])}, l1)
        tensor(2., dtype=torch.float64)
        >>> lambda_max({"weight": torch.tensor([0.5, -2.0])}, elastic, 1.0, 0.25)
        tensor(8., dtype=torch.float64)
    """
    check_penalty(penalty, hyper, options)
    check_params(grads, "grads")
    chosen = grads if mask is None else keep(grads, mask_leaves(mask, grads))
    slopes = tree_map(lambda g: g.to(torch.complex128 if g.is_complex() else torch.float64), chosen)

    def vanish(strength: Tensor) -> Tensor:
        landed = penalty.prox(slopes, strength, *hyper, **options)
        return _largest(landed) == 0

    size = _largest(slopes).to(torch.float64)
    # Non-negative floats are ordered like their bits.
    low, high = torch.zeros_like(size).view(torch.int64), (size * 2.0**200).view(torch.int64)
    reachable = vanish(size * 2.0**200)
    for _ in range(64):
        middle = low + (high - low) // 2
        gone = vanish(middle.view(torch.float64))
        low, high = torch.where(gone, low, middle), torch.where(gone, middle, high)
    least = torch.where(vanish(torch.zeros_like(size)), torch.zeros_like(size), high.view(torch.float64))
    return torch.where(reachable, least, torch.where(size.isnan(), size, torch.inf))


def sparsity(params: Params, mask: Mask | None = None) -> Tensor:
    r"""The share of entries that are exactly zero, from 0 to 1.

    Args:
        params: A tree of tensors.
        mask: Leaves that are counted; by default all.

    Shape:
        A 0-dim tensor.

    Example:
        >>> sparsity({"weight": torch.tensor([0.0, 2.0, 0.0]), "bias": torch.tensor([1.0])})
        tensor(0.5000)
    """
    check_params(params)
    leaves = tree_leaves(params if mask is None else keep(params, mask_leaves(mask, params)))
    entries = sum(leaf.numel() for leaf in leaves)
    zeros = [(leaf == 0).sum().to(leaves[0].device) for leaf in leaves]
    return torch.stack(zeros).sum() / entries if entries else torch.zeros(())
