"""What a call may be given: parameters, and trees like them; errors that name the leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Params, Updates
from funcreg.core.tree import dotted, flatten, kind_of, leaves_like, map_with_path, tree_leaves, tree_paths
from funcreg.core.undocumented import is_traced, is_transformed

#: The dtypes that arithmetic is defined in: eight-bit floats are for storage, and complex32 has few operators.
_NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)


def check_params(params: Any, name: str = "params") -> None:
    """Raise an error that names the first leaf that is not a dense tensor of real or complex numbers."""
    if params is None:
        _check_leaf(name, None)
    for leaf in tree_leaves(params):
        fits = isinstance(leaf, Tensor) and leaf.dtype in _NUMBERS and leaf.layout is torch.strided
        if not fits or type(leaf) in _LAZY:
            map_with_path(lambda path, leaf: _check_leaf(leaf_name(name, dotted(path)), leaf), params)


def shared_leaf(params: Params, others: Any) -> str | None:
    """The name of a leaf that lies in memory where one of some other tensors does, as those of a `state_dict` do.

    Such a tensor moves along with a parameter that is written into, and is no anchor of it. Nothing is known of tensors
    whose memory cannot be seen here and now: sharded, traced and batched ones.
    """
    tensors = [x for x in tree_leaves(others) if isinstance(x, Tensor) and x.ndim]
    if not tensors or is_traced() or is_transformed(lambda: tensors):
        return None
    places = {x.data_ptr(): name for name, x in zip(tree_paths(params), tree_leaves(params), strict=True) if _lies(x)}
    return next((places[x.data_ptr()] for x in tensors if _lies(x) and x.data_ptr() in places), None)


def _lies(x: Any) -> bool:
    """Whether a tensor has memory of its own kind, at an address that is known."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided and x.device.type != "meta"
    return plain and x.numel() > 0


def check_written(names: Sequence[str], leaves: Sequence[Any]) -> None:
    """Raise a TypeError for a leaf that nothing can be written into, as a number that was set in a state."""
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{name} is {leaf!r}; expected a tensor, into which the next one can be written: torch.tensor(0.1), "
                "not 0.1, or tree_set(state, learning_rate=0.1), which makes one"
            )


def leaf_name(tree: str, path: str) -> str:
    return f"{tree} '{path}'" if path else tree


def _check_leaf(name: str, leaf: Any) -> None:
    if type(leaf) in _LAZY:
        raise ValueError(f"{name} has no shape yet; run its module once on some inputs, which makes it a tensor")
    if isinstance(leaf, Tensor):
        _check_numbers(name, leaf, "is it a buffer?", _REMEDY)
        return
    raise TypeError(
        f"{name} is {kind_of(leaf)}; expected a tensor of floating point or complex numbers. {_leaf_hint(leaf)}"
    )


#: Parameters of lazy modules that have not run.
_LAZY = (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)
_REMEDY = "The parameters of a module are dict(module.named_parameters())."


def _leaf_hint(leaf: Any) -> str:
    """What to do about something that is no tensor where a leaf of parameters is expected."""
    if isinstance(leaf, Mapping) or dataclasses.is_dataclass(leaf):
        return f"Make a dict of it, {'dict' if isinstance(leaf, Mapping) else 'vars'}(...): this type is no tree."
    if isinstance(leaf, (int, float)) or hasattr(leaf, "__array__"):
        return "torch.as_tensor(...) makes a tensor of it."
    if isinstance(leaf, Iterable) and not isinstance(leaf, (str, Iterator, torch.nn.Module)):
        return f"Make a list or a dict of it: this type is no tree. {_REMEDY}"
    return _REMEDY


def check_tensors(*trees: Any) -> None:
    """Raise a TypeError for the first leaf of some trees that is no tensor, of whatever dtype."""
    for tree in trees:
        for i, leaf in enumerate(tree_leaves(tree)):
            if not isinstance(leaf, Tensor):
                name = leaf_name("tree", tree_paths(tree)[i])
                raise TypeError(f"{name} is {kind_of(leaf)}; expected a tensor. {_leaf_hint(leaf)}")


def check_dense(name: str, leaf: Tensor) -> None:
    """Raise a TypeError for a tensor of another layout."""
    if leaf.layout is not torch.strided:
        raise TypeError(
            f"{name} has the layout {leaf.layout}; expected a dense tensor. Call to_dense() on it; an embedding gives "
            "dense gradients with sparse=False."
        )


def _check_numbers(name: str, leaf: Tensor, cause: str, remedy: str) -> None:
    """Raise a TypeError if a tensor has no arithmetic: integers, eight-bit floats, sparse layouts."""
    check_dense(name, leaf)
    if leaf.dtype in _NUMBERS:
        return
    if leaf.is_floating_point() or leaf.is_complex():
        better = "complex64" if leaf.is_complex() else "bfloat16 or float32"
        raise TypeError(
            f"{name} is a tensor of {leaf.dtype}, which torch stores but hardly computes with. Keep the values that "
            f"are trained in {better}, and convert them for the forward pass."
        )
    raise TypeError(
        f"{name} is a tensor of {leaf.dtype}; {cause} Expected a tensor of floating point or complex numbers. {remedy}"
    )


def check_alike(tree: Any, other: Any, names: tuple[str, str]) -> None:
    """Raise an error that names the first leaf of `other` that does not fit that of `tree`.

    Leaves fit if they have one shape and device, and are dense tensors of numbers, complex only where those of `tree`
    are.
    """
    leaves = tree_leaves(tree)
    _check_kinds(tree, leaves, alike(tree, leaves, other, names), names)


def _check_kinds(tree: Any, leaves: list[Tensor], others: list[Any], names: tuple[str, str]) -> None:
    """Raise a TypeError for the first of the others that is not dense, or not of such numbers as the leaf."""
    for i, leaf, found in zip(range(len(leaves)), leaves, others, strict=True):
        if found.dtype == leaf.dtype and found.layout is torch.strided:  # Its own dtype was checked in the first tree.
            continue
        if found.dtype in _NUMBERS and found.layout is torch.strided and (leaf.is_complex() or not found.is_complex()):
            continue
        name = leaf_name(names[1], tree_paths(tree)[i])
        _check_numbers(
            name, found, "is it a mask, an index or a count?", "Gradients are of the dtype of their parameters."
        )
        raise TypeError(
            f"{name} is a tensor of {found.dtype}; expected real numbers, because the leaf in {names[0]} is of "
            f"{leaf.dtype}. Take its real part, if the imaginary part is zero."
        )


def filled(
    params: Params,
    updates: Updates,
    allowed: Sequence[bool] | Callable[[Params], Sequence[bool]] | None = None,
    names: tuple[str, str] = ("params", "updates"),
) -> Updates:
    """Updates, checked as by `check_alike`, with zeros for each None that stands for a leaf where that is allowed.

    `backward` leaves None as the gradient of a parameter that the loss does not use, or that is frozen.

    Args:
        params: Tree of parameters.
        updates: Tree like the parameters, with None for some leaves.
        allowed: One bool for each leaf, whether None may stand there, or a function that makes them from parameters
            and is called only if there is a None; by default None may stand nowhere.
        names: What errors call the two trees.

    Raises:
        ValueError: A leaf is None where it is not allowed, or differs in structure, shape or device.
        TypeError: A leaf is no dense tensor of numbers.
    """
    leaves, rebuild = flatten(params)
    found = leaves_like(params, updates, names)
    complete = all([update is not None for update in found])
    if not complete:
        bools = allowed(params) if callable(allowed) else allowed or [False] * len(leaves)
        rows = zip(leaves, found, bools, strict=True)
        found = [torch.zeros_like(leaf) if update is None and may else update for leaf, update, may in rows]
    _check_leaves(params, leaves, found, names)
    _check_kinds(params, leaves, found, names)
    return updates if complete else rebuild(found)


def alike(tree: Any, leaves: list[Tensor], other: Any, names: tuple[str, str]) -> list[Tensor]:
    """The leaves of `other`, checked against those of `tree`."""
    others = leaves_like(tree, other, names)
    _check_leaves(tree, leaves, others, names)
    return others


def _check_leaves(tree: Any, leaves: list[Tensor], others: list[Any], names: tuple[str, str]) -> None:
    for i, leaf, found in zip(range(len(leaves)), leaves, others, strict=True):
        if not (isinstance(found, Tensor) and leaf.shape == found.shape and leaf.device == found.device):
            _refuse(leaf, found, names, tree_paths(tree)[i])


def _refuse(leaf: Tensor, found: Any, names: tuple[str, str], path: str) -> None:
    first, second = names
    name = leaf_name(second, path)
    if found is None:
        raise ValueError(
            f"{name} is None; expected a tensor, as in {first}. This parameter got no gradient: backward() leaves None "
            "for a parameter that the loss does not use or that does not require a gradient. Freeze the leaf, as in "
            "chain(freeze(mask), ...), or give zeros for it, torch.zeros_like(parameter)."
        )
    if not isinstance(found, Tensor):
        raise TypeError(f"{name} is {kind_of(found)}; expected a tensor, as in {first}.")
    if leaf.shape != found.shape:
        raise ValueError(
            f"{name} has shape {tuple(found.shape)}; expected {tuple(leaf.shape)}, the shape in {first}. "
            f"Are {first} and {second} of the same model?"
        )
    raise ValueError(f"{name} is on {found.device}; expected {leaf.device}, the device of this leaf in {first}")


def fits(x: Tensor, shape: Sequence[int]) -> bool:
    """Whether a tensor broadcasts to a shape."""
    ends = zip(reversed(x.shape), reversed(shape), strict=False)
    return x.ndim <= len(shape) and all([n in (1, size) for n, size in ends])
