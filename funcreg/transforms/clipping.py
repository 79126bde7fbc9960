"""Transforms that bound or clean updates, with optax's names and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Params, Scalar, State, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute, euclidean, global_norm, reduce_leaves
from funcreg.core.masks import listed
from funcreg.core.ranges import concrete, ordered, scalars, single
from funcreg.core.tree import flatten, tree_leaves, tree_map, tree_paths
from funcreg.transforms.factory_checks import finite, finite_nonnegative, nonnegative, positive
from funcreg.transforms.transform import EmptyState, Stage, Transform, memoryless, public_state, warn


@remembered
def clip(max_delta: Scalar) -> Transform:
    r"""Clip each entry of updates to :math:`[-d, d]`.

    Args:
        max_delta: :math:`d`, at least 0.

    Example:
        >>> params = {"weight": torch.zeros(2)}
        >>> clip(1.0).update({"weight": torch.tensor([-3.0, 0.5])}, EmptyState(), params)
        ({'weight': tensor([-1.0000,  0.5000])}, EmptyState())
    """
    nonnegative(max_delta=max_delta)
    (max_delta,) = scalars(max_delta=max_delta)

    def bound(u: Tensor, d: Scalar) -> Tensor:
        d = d + torch.zeros_like(ordered(u))
        return torch.minimum(torch.maximum(u, -d), d)

    return memoryless(lambda updates, params: compute(bound, updates, hyper=(max_delta,)))


@remembered
def clip_by_global_norm(max_norm: Scalar, eps: Scalar = 0.0) -> Transform:
    r"""Scale updates so that their joint norm is at most a bound, :math:`u \min(1, \frac{c}{\|u\| + \epsilon})`.

    Args:
        max_norm: :math:`c`, at least 0.
        eps: :math:`\epsilon`; 1e-6 gives the numbers of `torch.nn.utils.clip_grad_norm_`.

    Example:
        >>> params = {"weight": torch.zeros(2)}
        >>> clip_by_global_norm(1.0).update({"weight": torch.tensor([3.0, 4.0])}, EmptyState(), params)
        ({'weight': tensor([0.6000, 0.8000])}, EmptyState())

    References:
        Pascanu, Mikolov & Bengio, *On the difficulty of training recurrent neural networks*, 2013.
    """
    nonnegative(max_norm=max_norm)
    finite_nonnegative(eps=eps)
    max_norm, eps = scalars(max_norm=max_norm, eps=eps)

    def factor(updates: Updates) -> Tensor:
        norm = global_norm(updates)
        return (max_norm / torch.where(norm == 0, 1.0, norm + eps)).clamp(max=1.0)

    return _by_one_number(factor)


def _by_one_number(factor: Callable[[Updates], Tensor], stages: Collection[Stage] = ()) -> Transform:
    """Multiply all updates by one number of them."""

    def rule(updates: Updates, params: Params) -> Updates:
        if not tree_leaves(updates):
            return updates
        return compute(lambda u, f: u * f, updates, hyper=(factor(updates),))

    return memoryless(rule, stages=stages, factor=factor)


@remembered
def normalize_by_update_norm(scale_factor: Scalar = 1.0, eps: Scalar = 1e-6) -> Transform:
    r"""Scale updates to one joint norm, :math:`c \, u / (\|u\| + \epsilon)`.

    Args:
        scale_factor: :math:`c`; a negative one descends.
        eps: :math:`\epsilon`, at least 0. Updates of norm 0 stay 0.

    Example:
        >>> params = {"weight": torch.zeros(2)}
        >>> normalize_by_update_norm(10.0, eps=0.0).update({"weight": torch.tensor([3.0, 4.0])}, EmptyState(), params)
        ({'weight': tensor([6., 8.])}, EmptyState())
    """
    finite(scale_factor=scale_factor)
    finite_nonnegative(eps=eps)
    scale_factor, eps = scalars(scale_factor=scale_factor, eps=eps)
    single(scale_factor=scale_factor, eps=eps)
    known = concrete(scale_factor)
    negative = known is not None and float(known) < 0

    def factor(updates: Updates) -> Tensor:
        norm = global_norm(updates)
        return scale_factor / torch.where(norm == 0, 1.0, norm + eps)

    return _by_one_number(factor, ["scales", "flips"] if negative else ["scales"])


@remembered
def clip_by_block_rms(threshold: Scalar) -> Transform:
    r"""Scale the update of each leaf so that its root mean square is at most a bound.

    Args:
        threshold: The bound, above 0.

    Example:
        >>> params = {"weight": torch.zeros(2)}
        >>> clip_by_block_rms(1.0).update({"weight": torch.tensor([3.0, 3.0])}, EmptyState(), params)
        ({'weight': tensor([1., 1.])}, EmptyState())

    References:
        Shazeer & Stern, *Adafactor: adaptive learning rates with sublinear memory cost*, 2018.
    """
    positive(threshold=threshold)
    (threshold,) = scalars(threshold=threshold)

    def bound(u: Tensor, t: Scalar) -> Tensor:
        return u / (euclidean(u) / (math.sqrt(max(u.numel(), 1)) * t)).clamp(min=1.0)

    return memoryless(lambda updates, params: compute(bound, updates, hyper=(threshold,)))


@remembered
def adaptive_grad_clip(
    clipping: Scalar, eps: Scalar = 1e-3, axis: int | tuple[int, ...] | EllipsisType | None = None
) -> Transform:
    r"""Scale the update of each unit to at most a share of the unit's norm, :math:`c \max(\|w_i\|, \epsilon)`.

    Args:
        clipping: :math:`c`, at least 0.
        eps: :math:`\epsilon`, the least norm of a unit, so that units at zero may move.
        axis: Dimensions that lie inside a unit. `...` is all but the first: a row of a linear layer, a filter of
            a convolution, as PyTorch lays weights out. None is optax's rule, for weights whose last dimension
            counts the units: the whole of a vector, all dimensions but the last one (a leaf of three dimensions:
            only the first).

    Raises:
        ValueError: A leaf has more than five dimensions, several of them longer than 1, and `axis` is None.

    Example:
        >>> params = {"weight": torch.tensor([[3.0, 4.0], [0.0, 0.0]])}
        >>> tx = adaptive_grad_clip(0.1, axis=...)
        >>> tx.update({"weight": torch.tensor([[0.0, 5.0], [0.0, 0.0]])}, EmptyState(), params)
        ({'weight': tensor([[0.0000, 0.5000],
                [0.0000, 0.0000]])}, EmptyState())

    References:
        Brock, De, Smith & Simonyan, *High-performance large-scale image recognition without normalization*, 2021.
    """
    nonnegative(clipping=clipping)
    finite_nonnegative(eps=eps)
    clipping, eps = scalars(clipping=clipping, eps=eps)
    dims = axis if isinstance(axis, tuple) else (axis,)
    if not (axis is None or axis is ... or all(type(d) is int for d in dims)):
        raise TypeError(f"axis is {axis!r}; expected a dimension, a tuple of them, ... or None")

    def inside(w: Tensor) -> tuple[int, ...]:
        if isinstance(axis, EllipsisType):
            return tuple(range(1, w.ndim))
        if axis is not None:
            dims = (axis,) if isinstance(axis, int) else axis
            if any([not -w.ndim <= d < w.ndim for d in dims]):
                raise ValueError(
                    f"axis={axis} names a dimension that this leaf of shape {tuple(w.shape)} does not have; leave it "
                    "out, as by masked(adaptive_grad_clip(...), matrices)"
                )
            return tuple([d % w.ndim for d in dims])
        if sum(n != 1 for n in w.shape) <= 1:
            return tuple(range(w.ndim))
        if w.ndim > 5:
            raise ValueError(f"it has shape {tuple(w.shape)}; expected at most five dimensions. Say which by axis=.")
        return (0,) if w.ndim <= 3 else tuple(range(w.ndim - 1))

    def bound(u: Tensor, w: Tensor, share: Scalar, least: Scalar) -> Tensor:
        dims = inside(w)
        size, step = (euclidean(x, dims) for x in (w, u))
        most = share * torch.maximum(size, least + torch.zeros_like(size))
        return torch.where(step < most, u, u * (most / step.clamp(min=1e-6)))

    return memoryless(lambda updates, params: compute(bound, updates, params, hyper=(clipping, eps)))


@public_state
class ZeroNansState(NamedTuple):
    """The state of `zero_nans`.

    Example:
        >>> zero_nans().init({"weight": torch.zeros(2)})
        ZeroNansState(found_nan={'weight': tensor(False)})
    """

    found_nan: Params  # For each leaf, whether its last update had a NaN.


@remembered
def zero_nans() -> Transform:
    r"""Replace each NaN in updates by 0, and remember which leaves had one.

    Example:
        >>> tx, params = zero_nans(), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([float("nan"), 1.0])}, tx.init(params), params)
        ({'weight': tensor([0., 1.])}, ZeroNansState(found_nan={'weight': tensor(True)}))
    """

    def init(params: Params) -> ZeroNansState:
        return ZeroNansState(tree_map(lambda w: torch.zeros((), dtype=torch.bool, device=w.device), params))

    def update(updates: Updates, state: State, params: Params) -> tuple[Updates, ZeroNansState]:
        found = flatten(updates)[1](reduce_leaves(lambda u: u.isnan(), updates, op="any"))
        return compute(lambda u: torch.where(u.isnan(), torch.zeros_like(u), u), updates), ZeroNansState(found)

    return Transform(init, update, state=ZeroNansState)


@remembered
def centralize() -> Transform:
    r"""Subtract from the update of each row, or filter, its mean; vectors stay as they are.

    A row of one entry is its own mean, so that its updates are 0: a warning names such leaves.

    Example:
        >>> params = {"weight": torch.zeros(2, 2)}
        >>> centralize().update({"weight": torch.tensor([[1.0, 3.0], [5.0, 6.0]])}, EmptyState(), params)
        ({'weight': tensor([[-1.0000,  1.0000],
                [-0.5000,  0.5000]])}, EmptyState())

    References:
        Yong, Huang, Hua & Zhang, *Gradient centralization: a new optimization technique for deep networks*, 2020.
    """

    def center(u: Tensor) -> Tensor:
        return u - u.mean(tuple(range(1, u.ndim)), keepdim=True) if u.ndim > 1 else u

    def init(params: Params) -> EmptyState:
        rows = zip(tree_paths(params), tree_leaves(params), strict=True)
        still = [name for name, w in rows if w.ndim > 1 and w.numel() == len(w) > 0]
        if still:
            warn(
                f"centralize makes every update of {listed(still)} zero: each row has one entry, which is its mean. "
                "Leave it out, as by masked(centralize(), mask)."
            )
        return EmptyState()

    return Transform(init, lambda updates, state, params: (compute(center, updates), state))
