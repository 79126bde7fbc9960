"""Ensembles: one transform for a stack of members, each with hyperparameters of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from funcreg._typing import Hyper, Params, State, Updates
from funcreg.construction import remembered
from funcreg.transform import Choice, Transform, everywhere
from funcreg.tree import tree_leaves, tree_map, tree_paths


@remembered
def ensemble(make: Callable[..., Transform], *hyper: Hyper) -> Transform:
    r"""A transform of stacked parameters, one member along the first dimension of every leaf, by `vmap`.

    Member :math:`k` is updated by `make(hyper[0][k], ...)`: it has its own strength, learning rate, counter and
    global norm. Shapes, and so masks by `ndim`, are those of one member.

    Args:
        make: From the hyperparameters of one member, 0-dim tensors, to its transform.
        hyper: Tensors, or trees of tensors, with one entry a member along the first dimension.

    Raises:
        TypeError: `make` takes another number of hyperparameters, or returns no transform.
        ValueError: A hyperparameter is no tensor with one entry a member, the numbers of members differ, or `make`
            refuses the hyperparameters of a member; the message says which.

    Example:
        >>> tx = ensemble(lambda rate: sgd(rate), torch.tensor([0.1, 1.0]))
        >>> params = {"weight": torch.zeros(2, 3)}  # Two members.
        >>> tx.update({"weight": torch.ones(2, 3)}, tx.init(params), params)[0]
        {'weight': tensor([[-0.1000, -0.1000, -0.1000],
                [-1.0000, -1.0000, -1.0000]])}
    """
    members = _members(make, hyper)
    made = [_member(make, hyper, k) for k in range(1 if torch.compiler.is_compiling() else members)]

    def init(params: Params) -> State:
        for name, leaf in zip(tree_paths(params), tree_leaves(params), strict=True):
            if not leaf.ndim or len(leaf) != members:
                raise ValueError(
                    f"ensemble of {members} members got the leaf '{name}' of shape {tuple(leaf.shape)}; expected "
                    f"stacked parameters, of shape ({members}, ...). torch.func.stack_module_state stacks modules."
                )
        state = vmap(lambda params, *h: make(*h).init(params))(params, *hyper)
        return tree_map(torch.clone, state)  # What all members begin with alike comes back as one entry, expanded.

    def update(updates: Updates, state: State, params: Params, **extra: Any) -> tuple[Updates, State]:
        for name, value in zip(tree_paths(extra), tree_leaves(extra), strict=True):
            if isinstance(value, Tensor) and value.ndim and len(value) != members:
                raise ValueError(
                    f"ensemble of {members} members got the extra argument '{name}' of shape {tuple(value.shape)}; "
                    f"expected one entry a member, ({members}, ...), or a number or 0-dim tensor for all"
                )
        # What is no stack of members is the same for all.
        over = tree_map(lambda x: 0 if isinstance(x, Tensor) and x.ndim else None, extra)

        def one(updates: Updates, state: State, params: Params, extra: dict[str, Any], *h: Hyper) -> Any:
            tx = make(*h)
            return tx.update(updates, state, params, **tx.accepted(extra))

        return vmap(one, in_dims=(0, 0, 0, over, *(0 for _ in hyper)))(updates, state, params, extra, *hyper)

    def of_member(choose: Choice | None) -> Choice | None:
        return None if choose is None else lambda params: choose(tree_map(lambda w: w[0], params))

    first = made[0]
    return Transform(
        init,
        update,
        frozen=of_member(first.frozen),
        descends=first.descends,
        spares=of_member(first.spares),
        stages=first.stages,
        covers=first.covers if first.covers is everywhere else of_member(first.covers),
        forwards_to=[first],
    )


def _members(make: Any, hyper: tuple[Any, ...]) -> int:
    """The number of members, or an error that says which hyperparameter has not one entry for each."""
    if not callable(make):
        hint = "; the function that made it, as in lambda rate: sgd(rate)" if isinstance(make, Transform) else ""
        raise TypeError(f"make is {make!r}; expected a function from hyperparameters to a transform{hint}")
    _check_arguments(make, hyper)
    counts: dict[str, int] = {}
    for name, value in zip(tree_paths(hyper), tree_leaves(hyper), strict=True):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"ensemble got {value!r} as hyperparameter {name}; expected a tensor with one entry a member. "
                "torch.as_tensor(...) makes one of a list or an array; what is the same for all belongs into make."
            )
        if not value.ndim:
            raise ValueError(
                f"ensemble got a tensor without dimensions as hyperparameter {name}; expected one with one entry a "
                "member. What is the same for all belongs into make."
            )
        counts[name] = len(value)
    if not counts:
        raise ValueError("ensemble got no hyperparameters; expected tensors with one entry a member")
    if len(set(counts.values())) > 1:
        came = ", ".join(f"{count} for hyperparameter {name}" for name, count in counts.items())
        raise ValueError(f"ensemble got different numbers of members: {came}; expected one number for all")
    members = next(iter(counts.values()))
    if not members:
        raise ValueError("ensemble got hyperparameters without entries; expected one entry for each member")
    return members


def _check_arguments(make: Callable[..., Any], hyper: tuple[Any, ...]) -> None:
    try:
        signature = inspect.signature(make)
    except ValueError:  # Some functions that are not written in Python have none.
        return
    try:
        signature.bind(*hyper)
    except TypeError as error:
        takes = f"{getattr(make, '__name__', 'make')}({', '.join(signature.parameters)})"
        raise TypeError(f"ensemble got {len(hyper)} hyperparameters for {takes}: {error}") from error


def _member(make: Callable[..., Transform], hyper: tuple[Any, ...], k: int) -> Transform:
    """The transform of one member, whose hyperparameters are checked here: under vmap they have no values."""
    try:
        tx: Any = make(*(tree_map(lambda h: h[k], value) for value in hyper))
    except ValueError as error:
        raise ValueError(f"at member {k} of the ensemble: {error}") from error
    if not isinstance(tx, Transform):
        name = getattr(make, "__name__", "make")
        hint = " Is a return missing?" if tx is None else " Is it called, as in identity()?" if callable(tx) else ""
        raise TypeError(f"{name} returned {tx!r} for member {k}; expected a Transform.{hint}")
    return tx
