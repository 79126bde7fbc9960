"""Ensembles: one transform for a stack of members, each with hyperparameters of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from funcreg._typing import Hyper, Params, State, Updates
from funcreg.transform import Transform
from funcreg.tree import tree_leaves, tree_map


def ensemble(make: Callable[..., Transform], *hyper: Hyper) -> Transform:
    r"""A transform of stacked parameters, one member along the first dimension of every leaf, by `vmap`.

    Member :math:`k` is updated by `make(hyper[0][k], ...)`: it has its own strength, learning rate, counter and
    global norm. Shapes, and so masks by `ndim`, are those of one member.

    Args:
        make: From the hyperparameters of one member, 0-dim tensors, to its transform.
        hyper: Tensors, or trees of tensors, with one entry a member along the first dimension.

    Raises:
        ValueError: The numbers of members differ.

    Example:
        >>> tx = ensemble(lambda rate: sgd(rate), torch.tensor([0.1, 1.0]))
        >>> params = {"weight": torch.zeros(2, 3)}  # Two members.
        >>> tx.update({"weight": torch.ones(2, 3)}, tx.init(params), params)[0]
        {'weight': tensor([[-0.1000, -0.1000, -0.1000],
                [-1.0000, -1.0000, -1.0000]])}
    """
    counts = {len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in tree_leaves(hyper)}
    if len(counts) != 1 or None in counts:
        raise ValueError("ensemble needs hyperparameters that are tensors with one entry a member, all of one length")
    members = counts.pop()

    def init(params: Params) -> State:
        for leaf in tree_leaves(params):
            if not leaf.ndim or len(leaf) != members:
                raise ValueError(
                    f"ensemble of {members} members got a leaf of shape {tuple(leaf.shape)}; expected stacked "
                    f"parameters, of shape ({members}, ...). torch.func.stack_module_state stacks modules."
                )
        state = vmap(lambda params, *h: make(*h).init(params))(params, *hyper)
        return tree_map(torch.clone, state)  # What all members begin with alike comes back as one entry, expanded.

    def update(updates: Updates, state: State, params: Params, **extra: Any) -> tuple[Updates, State]:
        # What is no stack of members is the same for all.
        over = tree_map(lambda x: 0 if isinstance(x, Tensor) and x.ndim else None, extra)

        def one(updates: Updates, state: State, params: Params, extra: dict[str, Any], *h: Hyper) -> Any:
            return make(*h).update(updates, state, params, **extra)

        return vmap(one, in_dims=(0, 0, 0, over, *(0 for _ in hyper)))(updates, state, params, extra, *hyper)

    within = make(*(tree_map(lambda h: h[0], value) for value in hyper)).frozen

    def frozen(params: Params) -> list[bool]:
        assert within is not None
        return within(tree_map(lambda w: w[0], params))

    return Transform(init, update, frozen=None if within is None else frozen)
