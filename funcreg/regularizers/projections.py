"""Projections of a whole tree at once, with the names, arguments and numbers of optax.

The leaves are read as one long vector: one radius, one sum and one plane for all of them. The constraints of
`constraints.py` look at each leaf, or each group of a leaf, by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Params, Scalar
from funcreg.core.checks import check_alike, check_params
from funcreg.core.leafwise import gathered, sign, spread_like, widen
from funcreg.core.ranges import check_range
from funcreg.core.tree import flatten, tree_leaves
from funcreg.regularizers.constraints import (
    box,
    halfspace,
    hyperplane,
    l1_ball,
    l2_ball,
    l2_sphere,
    linf_ball,
    nonnegative,
    simplex,
    simplex_excess,
)


def _joint(f: Callable[..., Tensor], tree: Params, *rest: Params) -> Params:
    """Apply a function of vectors to trees, each read as one vector in float32 at least."""
    check_params(tree)
    for other in rest:
        check_alike(tree, other, ("the tree", "the vector"))
    leaves, rebuild = flatten(tree)
    if not leaves:
        return tree
    device = leaves[0].device
    trees = map(gathered, (tree, *rest))
    columns = [torch.cat([widen(x).to(device).reshape(-1) for x in tree_leaves(t)]) for t in trees]
    parts = f(*columns).split([leaf.numel() for leaf in leaves])
    pairs = zip(parts, leaves, strict=True)
    found = rebuild([part.reshape(leaf.shape).to(leaf.device, leaf.dtype, copy=True) for part, leaf in pairs])
    return spread_like(found, tree)


def projection_non_negative(tree: Params) -> Params:
    r"""The nearest tree whose entries are at least 0.

    Example:
        >>> projection_non_negative({"weight": torch.tensor([2.0, -3.0])})
        {'weight': tensor([2., 0.])}
    """
    return nonnegative.project(tree)


def projection_box(tree: Params, lower: Hyper, upper: Hyper) -> Params:
    r"""The nearest tree whose entries lie in intervals, :math:`l_i \le w_i \le u_i`.

    Args:
        lower: :math:`l`: number, tensor, or a tree of them.
        upper: :math:`u`, at least `lower`.

    Raises:
        ValueError: Numbers cross.

    Example:
        >>> projection_box({"weight": torch.tensor([2.0, -3.0])}, -1.0, 1.5)
        {'weight': tensor([ 1.5000, -1.0000])}
    """
    return box.project(tree, lower, upper)


def projection_hypercube(tree: Params, scale: Hyper = 1) -> Params:
    r"""The nearest tree whose entries lie between 0 and a number, :math:`0 \le w_i \le s`.

    Args:
        scale: :math:`s`: number of at least 0, tensor, or a tree of them.

    Example:
        >>> projection_hypercube({"weight": torch.tensor([2.0, -3.0, 0.5])})
        {'weight': tensor([1.0000, 0.0000, 0.5000])}
    """
    return box.project(tree, 0, scale)


def projection_simplex(tree: Params, scale: Scalar = 1) -> Params:
    r"""The nearest tree of entries that are at least 0 and sum to a number, over all leaves.

    Args:
        scale: The sum, at least 0.

    Example:
        >>> projection_simplex({"a": torch.tensor([0.5, 0.9]), "b": torch.tensor(-1.0)})
        {'a': tensor([0.3000, 0.7000]), 'b': tensor(0.)}
    """
    check_range("scale", scale)
    return _joint(lambda w: simplex.project(w, scale), tree)


def projection_l1_sphere(tree: Params, scale: Scalar = 1) -> Params:
    r"""The nearest tree whose magnitudes sum to a number, :math:`\|w\|_1 = s`.

    An entry that is 0 moves upwards if it has to move. optax leaves it at 0, and the sum short of the number.

    Args:
        scale: :math:`s`, at least 0.

    Example:
        >>> projection_l1_sphere({"a": torch.tensor([0.5, -0.25]), "b": torch.tensor(0.0)}, 1.25)
        {'a': tensor([ 0.6667, -0.4167]), 'b': tensor(0.1667)}
    """
    check_range("scale", scale)
    ways = lambda w: torch.where(w == 0, torch.ones_like(w), sign(w))
    return _joint(lambda w: ways(w) * simplex_excess(w.abs(), scale) + 0.0, tree)


def projection_l1_ball(tree: Params, scale: Scalar = 1) -> Params:
    r"""The nearest tree whose magnitudes sum to at most a number, :math:`\|w\|_1 \le s`.

    Args:
        scale: :math:`s`, at least 0.

    Example:
        >>> projection_l1_ball({"a": torch.tensor([3.0, -2.0]), "b": torch.tensor(0.5)}, 2.0)
        {'a': tensor([ 1.5000, -0.5000]), 'b': tensor(0.)}
    """
    return _joint(lambda w: l1_ball.project(w, scale), tree)


def projection_l2_sphere(tree: Params, scale: Scalar = 1) -> Params:
    r"""The nearest tree of a given norm, :math:`\|w\|_2 = s`.

    A tree of zeros, to which all of them are equally near, becomes one of equal entries.

    Args:
        scale: :math:`s`, at least 0.

    Example:
        >>> projection_l2_sphere({"a": torch.tensor([0.3]), "b": torch.tensor(0.4)})
        {'a': tensor([0.6000]), 'b': tensor(0.8000)}
    """
    return _joint(lambda w: l2_sphere.project(w, scale), tree)


def projection_l2_ball(tree: Params, scale: Scalar = 1) -> Params:
    r"""The nearest tree whose norm is at most a number, :math:`\|w\|_2 \le s`.

    Args:
        scale: :math:`s`, at least 0.

    Example:
        >>> projection_l2_ball({"a": torch.tensor([3.0]), "b": torch.tensor(4.0)})
        {'a': tensor([0.6000]), 'b': tensor(0.8000)}
    """
    return _joint(lambda w: l2_ball.project(w, scale), tree)


def projection_linf_ball(tree: Params, scale: Scalar = 1) -> Params:
    r"""The nearest tree whose largest magnitude is at most a number, :math:`\max_i |w_i| \le s`.

    Args:
        scale: :math:`s`, at least 0.

    Example:
        >>> projection_linf_ball({"a": torch.tensor([3.0, -0.5]), "b": torch.tensor(-4.0)})
        {'a': tensor([ 1.0000, -0.5000]), 'b': tensor(-1.)}
    """
    return linf_ball.project(tree, scale)


def projection_vector(x: Params, a: Params) -> Params:
    r"""The nearest multiple of a tree, :math:`\frac{\langle x, a \rangle}{\langle a, a \rangle} a`.

    Args:
        x: Tree to project.
        a: Tree of the same structure. One of zeros gives zeros.

    Example:
        >>> projection_vector({"a": torch.tensor([3.0, 1.0])}, {"a": torch.tensor([1.0, 1.0])})
        {'a': tensor([2., 2.])}
    """
    # What is left of a point beside the plane through zero.
    return _joint(lambda w, normal: w - hyperplane.project(w, normal, 0.0), x, a)


def projection_hyperplane(x: Params, a: Params, b: Scalar) -> Params:
    r"""The nearest tree on a plane, :math:`\langle a, w \rangle = b`.

    Args:
        x: Tree to project.
        a: Tree of the same structure. One of zeros moves nothing.
        b: Number or 0-dim tensor.

    Example:
        >>> projection_hyperplane({"a": torch.tensor([3.0, 1.0])}, {"a": torch.tensor([1.0, 1.0])}, 2.0)
        {'a': tensor([2., 0.])}
    """
    return _joint(lambda w, normal: hyperplane.project(w, normal, b), x, a)


def projection_halfspace(x: Params, a: Params, b: Scalar) -> Params:
    r"""The nearest tree on one side of a plane, :math:`\langle a, w \rangle \le b`.

    Args:
        x: Tree to project.
        a: Tree of the same structure. One of zeros moves nothing.
        b: Number or 0-dim tensor.

    Example:
        >>> projection_halfspace({"a": torch.tensor([3.0, 1.0])}, {"a": torch.tensor([1.0, 1.0])}, 2.0)
        {'a': tensor([2., 0.])}
    """
    return _joint(lambda w, normal: halfspace.project(w, normal, b), x, a)
