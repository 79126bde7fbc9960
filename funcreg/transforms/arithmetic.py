"""Arithmetic of trees of tensors, leaf by leaf, and their sums, norms and products, under optax's names.

Sixteen-bit leaves are computed with in float32. The names are those of `optax.tree_utils`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Params, Scalar
from funcreg.core.checks import check_tensors
from funcreg.core.construction import written
from funcreg.core.leafwise import compute, compute_wide, global_norm, reduce_leaves, squared, total, without_autocast
from funcreg.core.ranges import check_numbers, concrete, flags, ordered
from funcreg.core.tree import at_leaf, leaves_like, tree_leaves, tree_map, tree_paths
from funcreg.transforms.factory_checks import dtypes


def _combined(f: Callable[..., Tensor], tree: Params, *rest: Params) -> Params:
    """Arithmetic of several trees, whose results have the dtype that holds those of all."""
    check_tensors(tree, *rest)
    columns = [tree_leaves(tree), *[leaves_like(tree, other) for other in rest]]
    kinds = [functools.reduce(torch.promote_types, [x.dtype for x in row]) for row in zip(*columns, strict=True)]
    results = iter(kinds)
    return tree_map(lambda x: x.to(next(results)) if x.is_floating_point() else x, compute_wide(f, tree, *rest))


@without_autocast
def tree_add(tree: Params, other: Params, *others: Params) -> Params:
    r"""The sum of trees, :math:`x + y + \ldots`, leaf by leaf.

    Args:
        other: Tree like the first.
        others: More of them.

    Example:
        >>> tree_add({"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}, {"w": torch.tensor([4.0])})
        {'w': tensor([7.])}
    """
    return _combined(lambda *xs: functools.reduce(torch.add, xs), tree, other, *others)


@without_autocast
def tree_sub(tree: Params, other: Params) -> Params:
    r"""The difference of two trees, :math:`x - y`, leaf by leaf.

    Args:
        other: Tree like the first.

    Example:
        >>> tree_sub({"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])})
        {'w': tensor([-1.])}
    """
    return _combined(torch.sub, tree, other)


@without_autocast
def tree_mul(tree: Params, other: Params) -> Params:
    r"""The product of two trees, :math:`x y`, entry by entry.

    Args:
        other: Tree like the first.

    Example:
        >>> tree_mul({"w": torch.tensor([3.0])}, {"w": torch.tensor([2.0])})
        {'w': tensor([6.])}
    """
    return _combined(torch.mul, tree, other)


@without_autocast
def tree_div(tree: Params, other: Params) -> Params:
    r"""The quotient of two trees, :math:`x / y`, entry by entry.

    Args:
        other: Tree like the first.

    Example:
        >>> tree_div({"w": torch.tensor([3.0])}, {"w": torch.tensor([2.0])})
        {'w': tensor([1.5000])}
    """
    return _combined(torch.div, tree, other)


@without_autocast
def tree_scale(scalar: Hyper, tree: Params) -> Params:
    r"""A number times a tree, :math:`c x`, in the dtypes of the tree.

    Args:
        scalar: Number, tensor, or a tree of them like the other or a prefix of it.

    Example:
        >>> tree_scale(0.5, {"w": torch.tensor([3.0])})
        {'w': tensor([1.5000])}
    """
    check_numbers("scalar", scalar)
    check_tensors(tree)
    return compute(lambda x, c: c * x, tree, hyper=(scalar,))


@without_autocast
def tree_add_scale(tree: Params, scalar: Hyper, other: Params) -> Params:
    r"""A tree and a number times another, :math:`x + c y`, in the dtypes of the first.

    Args:
        scalar: Number, tensor, or a tree of them like the others or a prefix of them.
        other: Tree like the first.

    Example:
        >>> tree_add_scale({"w": torch.tensor([1.0])}, -0.5, {"w": torch.tensor([4.0])})
        {'w': tensor([-1.])}
    """
    check_tensors(tree)
    return compute(lambda x, y, c: x + c * y, tree, other, hyper=(scalar,))


@without_autocast
def tree_where(condition: Hyper, tree: Params, other: Params) -> Params:
    r"""Entries of one tree where a condition holds, and of another where it does not.

    Args:
        condition: A bool, a tensor of them that broadcasts, or a tree of such like the others or a prefix of it.
        other: Tree like the first.

    Example:
        >>> x, y = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])}
        >>> tree_where(torch.tensor([True, False]), x, y)
        {'w': tensor([1., 4.])}
    """
    check_numbers("condition", condition)
    check_tensors(tree)

    def chosen(x: Tensor, y: Tensor, condition: Any) -> Tensor:
        if isinstance(condition, bool):
            return (x if condition else y).clone()
        return torch.where(condition, x, y)

    return compute(chosen, tree, other, hyper=(condition,))


@without_autocast
def tree_clip(tree: Params, min_value: Hyper | None = None, max_value: Hyper | None = None) -> Params:
    r"""A tree with all entries between two bounds; NaN goes through.

    Args:
        min_value: Least value: number, tensor, or a tree of them; None for none.
        max_value: Greatest value.

    Raises:
        ValueError: Bounds cross.

    Example:
        >>> tree_clip({"w": torch.tensor([-3.0, 0.5])}, -1.0, 1.0)
        {'w': tensor([-1.0000,  0.5000])}
    """
    for name, bound in (("min_value", min_value), ("max_value", max_value)):
        if bound is not None:
            check_numbers(name, bound)
    check_tensors(tree)
    if min_value is not None and max_value is not None:
        compute(_check_bounds, tree, hyper=(min_value, max_value))
    if min_value is not None:
        tree = compute(lambda x, low: ordered(x).clamp(min=low), tree, hyper=(min_value,))
    if max_value is not None:
        tree = compute(lambda x, high: ordered(x).clamp(max=high), tree, hyper=(max_value,))
    return tree


def _check_bounds(x: Tensor, low: Any, high: Any) -> Tensor:
    """A leaf as it is, or an error if bounds are known and cross."""
    least, most = concrete(low), concrete(high)
    if least is not None and most is not None and bool(torch.as_tensor(least > most).any()):
        raise ValueError(
            f"min_value is {written(low)} and max_value {written(high)}; expected the least value first. Are they "
            "swapped?"
        )
    return x


# Numbers of a tree


@without_autocast
def tree_sum(tree: Params) -> Tensor:
    r"""The sum of all entries of a tree, in float32 at least: a tensor without dimensions.

    Example:
        >>> tree_sum({"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(4.0)})
        tensor(7.)
    """
    check_tensors(tree)
    return total(reduce_leaves(lambda x: x, tree))


def tree_max(tree: Params) -> Tensor:
    r"""The greatest entry of a tree: a tensor without dimensions, minus infinity if there is none.

    Example:
        >>> tree_max({"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(4.0)})
        tensor(4.)
    """
    return _extreme([x.amax() for x in _ordered_leaves(tree) if x.numel()], torch.maximum, -torch.inf)


def tree_min(tree: Params) -> Tensor:
    r"""The least entry of a tree: a tensor without dimensions, infinity if there is none.

    Example:
        >>> tree_min({"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(4.0)})
        tensor(1.)
    """
    return _extreme([x.amin() for x in _ordered_leaves(tree) if x.numel()], torch.minimum, torch.inf)


def _ordered_leaves(tree: Params) -> list[Tensor]:
    check_tensors(tree)
    leaves = tree_leaves(tree)
    for i, x in enumerate(leaves):
        if x.is_complex():
            raise ValueError(f"{at_leaf(tree_paths(tree)[i])}it is complex; expected real numbers, which have an order")
    return leaves


def _extreme(found: list[Tensor], f: Callable[[Tensor, Tensor], Tensor], start: float) -> Tensor:
    return functools.reduce(lambda a, b: f(a, b.to(a.device)), found) if found else torch.tensor(start)


def tree_size(tree: Params) -> int:
    r"""The number of entries of a tree.

    Example:
        >>> tree_size({"w": torch.zeros(2, 3), "b": torch.tensor(4.0)})
        7
    """
    check_tensors(tree)
    return sum(x.numel() for x in tree_leaves(tree))


@without_autocast
def tree_norm(
    tree: Params, ord: int | float | Literal["inf", "infinity"] | None = None, squared: bool = False
) -> Tensor:
    r"""The norm of all entries of a tree as one vector, :math:`\|x\|_2`, :math:`\|x\|_1` or :math:`\|x\|_\infty`.

    Sixteen-bit leaves are summed in float32; the gradient at zero is zero.

    Args:
        ord: Which norm: 2 or None, 1, or infinity.
        squared: Whether its square is returned.

    Shape:
        A 0-dim tensor.

    Example:
        >>> tree = {"w": torch.tensor([3.0, -4.0])}
        >>> tree_norm(tree), tree_norm(tree, 1), tree_norm(tree, float("inf")), tree_norm(tree, squared=True)
        (tensor(5.), tensor(7.), tensor(4.), tensor(25.))
    """
    flags(squared=squared)
    check_tensors(tree)
    if ord is None or ord == 2:
        return _sum_of_squares(tree) if squared else global_norm(tree)
    if ord == 1:
        size = total(reduce_leaves(lambda x: x.abs(), tree))
    elif ord in (torch.inf, "inf", "infinity"):
        sizes = reduce_leaves(lambda x: x.abs(), [x for x in tree_leaves(tree) if x.numel()], op="max")
        size = functools.reduce(lambda a, b: torch.maximum(a, b.to(a.device)), sizes) if sizes else torch.zeros(())
    else:
        raise ValueError(f"ord is {ord!r}; expected 1, 2, float('inf'), or None for 2")
    return size.square() if squared else size


def _sum_of_squares(tree: Params) -> Tensor:
    return total(reduce_leaves(squared, tree))


@without_autocast
def tree_vdot(tree: Params, other: Params) -> Tensor:
    r"""The inner product of two trees, :math:`\sum_i \bar x_i y_i`, in float32 at least.

    Args:
        other: Tree like the first.

    Shape:
        A 0-dim tensor.

    Example:
        >>> tree_vdot({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -1.0])})
        tensor(1.)
    """
    check_tensors(tree)
    return total(reduce_leaves(lambda x, y: x.conj() * y if x.is_complex() else x * y, tree, other))


# Trees like another


def tree_zeros_like(tree: Params, dtype: torch.dtype | None = None) -> Params:
    r"""A tree of zeros of the same shapes, on the same devices.

    Args:
        dtype: Dtype of all leaves; by default each has its own.

    Example:
        >>> tree_zeros_like({"w": torch.ones(2)}, torch.bfloat16)
        {'w': tensor([0., 0.], dtype=torch.bfloat16)}
    """
    check_tensors(tree)
    return tree_map(lambda x: torch.zeros_like(x, dtype=dtype), tree)


def tree_ones_like(tree: Params, dtype: torch.dtype | None = None) -> Params:
    r"""A tree of ones of the same shapes, on the same devices.

    Args:
        dtype: Dtype of all leaves; by default each has its own.

    Example:
        >>> tree_ones_like({"w": torch.zeros(2)})
        {'w': tensor([1., 1.])}
    """
    check_tensors(tree)
    return tree_map(lambda x: torch.ones_like(x, dtype=dtype), tree)


def tree_full_like(tree: Params, fill_value: Scalar, dtype: torch.dtype | None = None) -> Params:
    r"""A tree of one number, of the same shapes and on the same devices.

    Args:
        fill_value: The number, also as a tensor without dimensions.
        dtype: Dtype of all leaves; by default each has its own.

    Example:
        >>> tree_full_like({"w": torch.zeros(2)}, 0.5)
        {'w': tensor([0.5000, 0.5000])}
    """
    check_numbers("fill_value", fill_value)
    check_tensors(tree)
    return tree_map(lambda x: torch.zeros_like(x, dtype=dtype) + _as(fill_value, dtype or x.dtype, x.device), tree)


def _as(value: Scalar, dtype: torch.dtype, device: torch.device) -> Scalar:
    return value.to(device, dtype) if isinstance(value, Tensor) else value


def tree_cast(tree: Params, dtype: torch.dtype | None) -> Params:
    r"""A tree in another dtype: floating point leaves alone, as `Module.to` has it, so that counters stay whole.

    Complex leaves stay complex, of the precision of the dtype. A leaf that has it already is returned itself.

    Args:
        dtype: Dtype of floating point numbers; None leaves the tree as it is.

    Example:
        >>> tree_cast({"w": torch.ones(2), "steps": torch.tensor(3)}, torch.bfloat16)
        {'w': tensor([1., 1.], dtype=torch.bfloat16), 'steps': tensor(3)}
    """
    if dtype is None:
        return tree
    dtypes(dtype=dtype)
    pair = dtype if dtype.is_complex else torch.complex128 if dtype == torch.float64 else torch.complex64

    check_tensors(tree)
    return tree_map(lambda x: x.to(pair) if x.is_complex() else x.to(dtype) if x.is_floating_point() else x, tree)


def tree_cast_like(tree: Params, other: Params) -> Params:
    r"""A tree in the dtypes of another.

    Args:
        other: Tree of the same structure.

    Example:
        >>> tree_cast_like({"w": torch.ones(2)}, {"w": torch.zeros(5, dtype=torch.float64)})
        {'w': tensor([1., 1.], dtype=torch.float64)}
    """
    check_tensors(tree, other)
    return tree_map(lambda x, y: x.to(y.dtype), tree, other)
