"""Ensembles: stacks of members, and one transform for a stack, each member with hyperparameters of its own."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap

from funcreg.core._typing import Hyper, Mask, Params, State, Updates
from funcreg.core.construction import Call, remembered
from funcreg.core.masks import Selection, check_mask, mask_leaves
from funcreg.core.ranges import whole_number
from funcreg.core.tree import flatten, leaves_like, tree_leaves, tree_map, tree_paths
from funcreg.core.undocumented import is_compiling
from funcreg.core.wording import type_of
from funcreg.transforms.factory_checks import check_no_torchs
from funcreg.transforms.transform import Choice, Transform, everywhere


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
    made = [_member(make, hyper, k) for k in range(1 if is_compiling() else members)]

    def init(params: Params) -> State:
        for name, leaf in zip(tree_paths(params), tree_leaves(params), strict=True):
            if not leaf.ndim or len(leaf) != members:
                raise ValueError(
                    f"ensemble of {members} members got the leaf '{name}' of shape {tuple(leaf.shape)}; expected "
                    f"stacked parameters, of shape ({members}, ...). stack([...]) stacks trees or modules, and "
                    f"replicate(params, {members}) copies of one."
                )
        # vmap knows fewer trees than this library: None is no leaf here, and types that optree was told of are nodes.
        leaves, rebuild = flatten(params)
        rebuilt: list[Callable[[Iterable[Any]], State]] = []

        def one(leaves: list[Tensor], *h: Hyper) -> list[Tensor]:
            found, join = flatten(make(*h).init(rebuild(leaves)))
            rebuilt.append(join)
            return found

        # Members that draw random numbers draw their own. What all begin with alike comes back as one entry, expanded.
        found = vmap(one, randomness="different")(leaves, *hyper)
        return rebuilt[0](map(torch.clone, found))

    def update(updates: Updates, state: State, params: Params, **extra: Any) -> tuple[Updates, State]:
        for name, value in zip(tree_paths(extra), tree_leaves(extra), strict=True):
            if isinstance(value, Tensor) and value.ndim and len(value) != members:
                raise ValueError(
                    f"ensemble of {members} members got the extra argument '{name}' of shape {tuple(value.shape)}; "
                    f"expected one entry a member, ({members}, ...), or a number or 0-dim tensor for all"
                )
        # What is no stack of members is the same for all.
        over = tree_map(lambda x: 0 if isinstance(x, Tensor) and x.ndim else None, extra)

        # Trees are taken apart here: where this is traced, `vmap` would take longer for it than all the rest.
        leaves, rebuild = flatten((updates, state, params))
        rebuilt: list[Callable[[Iterable[Any]], Any]] = []

        def one(leaves: list[Tensor], extra: dict[str, Any], *h: Hyper) -> list[Tensor]:
            tx, (updates, state, params) = make(*h), rebuild(leaves)
            found, join = flatten(tx.update(updates, state, params, **tx.accepted(extra)))
            rebuilt.append(join)
            return found

        found = vmap(one, in_dims=(0, over, *(0 for _ in hyper)))(leaves, extra, *hyper)
        return rebuilt[0](found)

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
    check_no_torchs("make", make)
    _check_arguments(make, hyper)
    counts: dict[str, int] = {}
    for name, value in zip(tree_paths(hyper), tree_leaves(hyper), strict=True):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"ensemble got {value!r} as hyperparameter {name}; expected a tensor with one entry a member. "
                "torch.as_tensor(...) makes one of a list or an array; what is the same for all belongs in make."
            )
        if not value.ndim:
            raise ValueError(
                f"ensemble got a tensor without dimensions as hyperparameter {name}; expected one with one entry a "
                "member. What is the same for all belongs in make."
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


# Stacks


class Members(NamedTuple):
    """The stacked parameters and buffers of modules, dicts with the names that the modules give them.

    Example:
        >>> params, buffers = stack([torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)])
        >>> buffers["running_mean"].shape
        torch.Size([2, 3])
    """

    params: dict[str, Tensor]  # One member along the first dimension of every leaf.
    buffers: dict[str, Tensor]  # Of the same form, such as the running statistics of BatchNorm.


def _opened(member: Any) -> Any:
    """A tree as it is, and a module as the trees of its parameters and buffers."""
    if not isinstance(member, nn.Module):
        return member
    return Members(dict(member.named_parameters()), dict(member.named_buffers()))


def stack(members: Iterable[Any]) -> Any:
    """Stack trees, one member along the first dimension of every leaf; of modules, their parameters and buffers.

    Leaves are copies without autograd history. Parameters, states, buffers and whole modules stack alike.

    Args:
        members: Trees of tensors of one structure, or modules of one kind, which give `Members(params, buffers)`.

    Raises:
        ValueError: There are no members, or a leaf of one has another shape, dtype or device, or is no tensor; the
            message names leaf and member.

    Example:
        >>> stack([{"weight": torch.zeros(3)}, {"weight": torch.ones(3)}])
        {'weight': tensor([[0., 0., 0.],
                [1., 1., 1.]])}
        >>> params, buffers = stack([torch.nn.Linear(3, 2) for _ in range(4)])
        >>> params["weight"].shape
        torch.Size([4, 2, 3])
    """
    if isinstance(members, (nn.Module, Tensor, dict, str)):
        raise TypeError(f"stack got {type_of(members)}; expected a list of members. replicate repeats one.")
    trees = [_opened(member) for member in members]
    if not trees:
        raise ValueError("stack got no members; expected at least one")
    rows = [leaves_like(trees[0], tree, ("member 0", f"member {k}")) for k, tree in enumerate(trees)]
    for name, *column in zip(tree_paths(trees[0]), *rows, strict=True):
        _check_column(name, column)
    return tree_map(lambda *leaves: torch.stack([leaf.detach() for leaf in leaves]), *trees)


def _check_column(name: str, column: list[Any]) -> None:
    """Raise an error if the leaves of one name do not stack."""
    first = column[0]
    for k, leaf in enumerate(column):
        if not isinstance(leaf, Tensor):
            raise ValueError(f"member {k} has {type_of(leaf)} at '{name}'; expected a tensor")
        if isinstance(leaf, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ValueError(f"'{name}' of member {k} has no shape yet; call its module once before it is stacked")
        if leaf.shape != first.shape or leaf.dtype != first.dtype or leaf.device != first.device:
            came, expected = (f"{tuple(each.shape)}, {each.dtype} on {each.device}" for each in (leaf, first))
            raise ValueError(f"'{name}' of member {k} is of {came}; expected {expected}, as in member 0")


def unstack(members: Any) -> list[Any]:
    """The members of a stack, a list of trees: the inverse of `stack`. Leaves are views of the stack.

    Args:
        members: Tree of tensors with one member along the first dimension of each.

    Raises:
        ValueError: A leaf has no first dimension, or one of another size.

    Example:
        >>> unstack({"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
        [{'weight': tensor([1., 2.])}, {'weight': tensor([3., 4.])}]

        A member of a stack of modules is loaded into a module:

        >>> module = torch.nn.BatchNorm1d(3)
        >>> params, buffers = unstack(replicate(module, 2))[1]
        >>> module.load_state_dict({**params, **buffers})
        <All keys matched successfully>
    """
    sizes = {name: _size(leaf) for name, leaf in zip(tree_paths(members), tree_leaves(members), strict=True)}
    if len(set(sizes.values())) != 1 or None in sizes.values():
        came = ", ".join(f"{size} at '{name}'" for name, size in list(sizes.items())[:6]) or "no leaves"
        raise ValueError(f"unstack got {came}; expected tensors whose first dimensions have one size")
    return [tree_map(lambda leaf, k=k: leaf[k], members) for k in range(next(iter(sizes.values())) or 0)]


def _size(leaf: Any) -> int | None:
    return len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else None


def replicate(member: Any, members: int) -> Any:
    """A stack of copies of one tree, or of the parameters and buffers of one module; they share no memory.

    Args:
        member: Tree of tensors, or a module, which gives `Members(params, buffers)`.
        members: Number of copies.

    Example:
        >>> replicate({"weight": torch.tensor([1.0, 2.0])}, 3)
        {'weight': tensor([[1., 2.],
                [1., 2.],
                [1., 2.]])}
    """
    return stack([member] * whole_number("members", members))


def init_ensemble(make: Callable[[], Any], seeds: int | Iterable[int]) -> Any:
    """A stack of freshly made members, each with the random numbers of its own seed.

    The state of torch's random number generators is the same afterwards. A member does not depend on the others:
    seed 3 gives the same one in every ensemble.

    Args:
        make: Function without arguments that makes a module, which gives `Members(params, buffers)`, or a tree.
        seeds: Seeds, one a member; a number n stands for 0 to n - 1.

    Example:
        >>> params, buffers = init_ensemble(lambda: torch.nn.Linear(3, 2), 8)
        >>> params["weight"].shape, len(params["bias"].unique())
        (torch.Size([8, 2, 3]), 16)
    """
    if isinstance(make, nn.Module) or not callable(make):
        hint = " replicate stacks copies of one." if isinstance(make, nn.Module) else ""
        raise TypeError(f"make is {type_of(make)}; expected a function that makes a module or a tree.{hint}")
    return stack([seeded(make, seed) for seed in whole_seeds(seeds)])


def whole_seeds(seeds: Any) -> list[int]:
    """Seeds, one a member; a number n stands for 0 to n - 1."""
    try:
        found = list(map(operator.index, seeds)) if isinstance(seeds, Iterable) else list(range(operator.index(seeds)))
    except TypeError as error:
        raise TypeError(f"seeds is {seeds!r}; expected a number of seeds, or a list of whole numbers") from error
    if not found or isinstance(seeds, bool):
        raise ValueError(f"seeds is {seeds!r}; expected at least one")
    return found


def seeded(make: Callable[[], Any], seed: int) -> Any:
    """What a function returns if torch's generators begin at a seed; they are afterwards where they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return make()


def _first(params: Params) -> Params:
    """The first member of a stack."""
    for name, w in zip(tree_paths(params), tree_leaves(params), strict=True):
        if not w.ndim:
            raise ValueError(
                f"the leaf '{name}' has no dimensions; expected members along the first dimension of each leaf. A mask "
                "for one member needs no stacked"
            )
    return tree_map(lambda w: w[0], params)


def stacked(mask: Mask) -> Selection:
    """A mask for stacks, from a mask for one member, which sees shapes without their first dimension.

    Inside `ensemble` and `vmap` masks see one member anyway. A tree of bools, or a glob, fits both.

    Args:
        mask: Mask for one member.

    Example:
        >>> members = {"weight": torch.ones(4, 2, 3), "bias": torch.ones(4, 2)}
        >>> stacked(matrices)(members)
        {'weight': True, 'bias': False}
    """
    check_mask(mask)
    selection = Selection(lambda params: mask_leaves(mask, _first(params)))
    if not is_compiling():
        selection.made_by = Call(stacked, (mask,), {})
    return selection
