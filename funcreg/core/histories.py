"""Autograd histories that grow from update to update, which a loop seldom means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Params, State
from funcreg.core.notices import warn_user
from funcreg.core.tree import tree_leaves
from funcreg.core.undocumented import is_compiling, is_transformed

#: So many updates, one after another in one graph of autograd, are a loop that nobody means to differentiate.
LONG = 100
_UPDATES = "funcreg updates"


def watch_history(params: Params, state: State) -> None:
    """Warn, at one update of a loop, if each update became a part of the autograd graph of the next.

    Parameters that require a gradient make it so, and memory grows without end. Unrolled differentiation means it, but
    not for so many steps: so the number of updates is written to the graph, at the node that brought each of them its
    parameters or its state.
    """
    if is_compiling() or not torch.is_grad_enabled() or is_transformed():
        return
    leaves = tree_leaves(params)
    if not any([leaf.requires_grad for leaf in leaves]):
        return
    depths = [_count(tree) for tree in (leaves, tree_leaves(state))]
    if LONG in depths:
        warn_user(
            f"{LONG} updates lie in one autograd history, which keeps the tensors of all of them: parameters require "
            "a gradient, and updates are made while autograd records. Call update and apply_updates under "
            "torch.no_grad(), or detach the parameters, unless you differentiate through all these steps."
        )


def _count(leaves: list[Any]) -> int:
    """How many updates lie in the history of what an update got, by one of its leaves; 0 if that is known already."""
    node = next((leaf.grad_fn for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None), None)
    if node is None or _UPDATES in _notes(node):
        return 0  # No history, or counted by the chain around this transform.
    near, before = [node], 0
    for _ in range(5):  # A few operations, such as conversions, lie between what one update got and the next.
        near = [earlier for each in near for earlier, _ in each.next_functions if earlier is not None][:32]
        before = max([before, *(_notes(each).get(_UPDATES, 0) for each in near)])
    _notes(node)[_UPDATES] = before + 1
    return before + 1


def _notes(node: Any) -> dict[str, Any]:
    """What is written to a node of autograd: a dict, which torch's types take for a method."""
    return node.metadata
