"""Preconditioners whose second moments take the memory of rows and columns, with optax's names and numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Params, Scalar, Schedule, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute_wide, increment, safe_sqrt, squared, wide
from funcreg.core.ranges import check_range, flags, scalars, single, whole_number
from funcreg.core.sharding import any_sharded, apply
from funcreg.core.tree import flatten, tree_leaves, tree_map
from funcreg.transforms.chains import chain
from funcreg.transforms.clipping import clip_by_block_rms
from funcreg.transforms.directions import scale_by_param_block_rms
from funcreg.transforms.factory_checks import dtypes, finite_nonnegative
from funcreg.transforms.moments import stored
from funcreg.transforms.regularizing import add_decayed_weights
from funcreg.transforms.scaling import ema, scale, scale_by_learning_rate
from funcreg.transforms.transform import Transform, counter, public_state

#: The second longest and the longest dimension of a leaf that is factored, None for any other.
Pair: TypeAlias = tuple[int, int] | None


@public_state
class FactoredState(NamedTuple):
    """The state of `scale_by_factored_rms`. What a leaf does not need is a zero without dimensions.

    Example:
        >>> state = scale_by_factored_rms(min_dim_size_to_factor=2).init(torch.zeros(4, 3))
        >>> state.v_row.shape, state.v_col.shape, state.v.shape
        (torch.Size([1, 3]), torch.Size([4, 1]), torch.Size([]))
    """

    steps: Tensor  # Number of updates made, int32.
    v_row: Params  # Means of squares along the longest dimension, which has size 1.
    v_col: Params  # Means of squares along the second longest one.
    v: Params  # Mean squares of leaves that are not factored.


def power_decay(steps: Any, decay_rate: Scalar) -> Scalar:
    r"""How much of the mean square is kept, :math:`1 - (t + 1)^{-r}`: all of the first steps count alike.

    Args:
        steps: :math:`t`, number of steps taken.
        decay_rate: :math:`r`.

    Example:
        >>> power_decay(torch.tensor(0), 0.8), power_decay(torch.tensor(3), 0.5)
        (tensor(0., dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    count = steps.to(torch.float64) if isinstance(steps, Tensor) else torch.as_tensor(steps, dtype=torch.float64)
    return 1 - (count + 1).clamp(min=1) ** -decay_rate


@remembered
def scale_by_factored_rms(
    factored: bool = True,
    decay_rate: Scalar = 0.8,
    step_offset: int = 0,
    min_dim_size_to_factor: int = 128,
    epsilon: Scalar = 1e-30,
    decay_rate_fn: Callable[[Any, Scalar], Scalar] = power_decay,
) -> Transform:
    r"""Divide updates by the root of a mean square that is a product of rows and columns, :math:`u / \sqrt{v}`.

    For a matrix :math:`v_{ij} = r_i c_j / \bar r`, where :math:`r` and :math:`c` are moving averages of the means of
    :math:`u^2 + \epsilon` along rows and columns: instead of a number for each entry the state has one for each row
    and column. Of a leaf with more dimensions the two longest ones are factored.

    Args:
        factored: Whether large leaves are factored; False keeps a number for each entry.
        decay_rate: How fast the average forgets; see `decay_rate_fn`.
        step_offset: Number of steps taken before the ones that count, as in a run that goes on with other data.
        min_dim_size_to_factor: Size that both dimensions have at least if a leaf is factored.
        epsilon: :math:`\epsilon`, added to squares.
        decay_rate_fn: From the number of steps taken and `decay_rate` to the decay of the average.

    Example:
        >>> tx, params = scale_by_factored_rms(min_dim_size_to_factor=2), {"weight": torch.zeros(2, 2)}
        >>> tx.update({"weight": torch.tensor([[1.0, 2.0], [3.0, 6.0]])}, tx.init(params), params)[0]
        {'weight': tensor([[1., 1.],
                [1., 1.]])}

    References:
        Shazeer & Stern, *Adafactor: adaptive learning rates with sublinear memory cost*, 2018.
    """
    flags(factored=factored)
    check_range("decay_rate", decay_rate, open_low=True, finite=True)
    finite_nonnegative(epsilon=epsilon)
    decay_rate, epsilon = scalars(decay_rate=decay_rate, epsilon=epsilon)
    check_range("step_offset", step_offset, finite=True)
    (step_offset,) = scalars(step_offset=step_offset)
    single(step_offset=step_offset)
    min_dim_size_to_factor = whole_number("min_dim_size_to_factor", min_dim_size_to_factor)
    if not callable(decay_rate_fn):
        raise TypeError(
            f"decay_rate_fn is {decay_rate_fn!r}; expected a function of the number of steps and decay_rate. "
            "For a number, give decay_rate_fn=lambda steps, rate: 0.999."
        )

    def dims(shape: Sequence[int]) -> Pair:
        return _longest(shape, min_dim_size_to_factor) if factored else None

    def begun(params: Params, along: int | None) -> Params:
        return _by_dims(lambda pair, w: _zeros(pair, w, along), dims, params)

    def init(params: Params) -> FactoredState:
        return FactoredState(counter(params), begun(params, 1), begun(params, 0), begun(params, None))

    def averages(updates: Updates, before: Params, decay: Scalar, along: int | None) -> Params:
        average = lambda pair, u, v, b, e: _average(pair, u, v, b, e, along)
        return stored(_by_dims(average, dims, updates, before, hyper=(decay, epsilon)), before)

    def update(updates: Updates, state: FactoredState, params: Params) -> tuple[Updates, FactoredState]:
        decay = decay_rate_fn(state.steps - step_offset, decay_rate)
        new = FactoredState(
            increment(state.steps),
            averages(updates, state.v_row, decay, 1),
            averages(updates, state.v_col, decay, 0),
            averages(updates, state.v, decay, None),
        )
        made = _by_dims(_scaled, dims, updates, new.v_row, new.v_col, new.v)
        return tree_map(lambda u, x: x.to(u.dtype), updates, made), new

    def metric(state: FactoredState) -> Params:
        rows, rebuild = flatten(state.v_row)
        leaves = zip(rows, tree_leaves(state.v_col), tree_leaves(state.v), strict=True)
        return rebuild([_root(dims, *leaf) for leaf in leaves])

    return Transform(init, update, metric, state=FactoredState)


# Of one leaf: what is kept along one of its two factored dimensions, or of all entries where it is not factored


def _longest(shape: Sequence[int], least: int) -> Pair:
    """The second longest and the longest dimension, where both have at least a size."""
    if len(shape) < 2:
        return None
    order = sorted(range(len(shape)), key=lambda d: shape[d])
    return None if shape[order[-2]] < least else (order[-2], order[-1])


def _zeros(pair: Pair, w: Tensor, along: int | None) -> Tensor:
    kind = wide(w.real.dtype)
    if (pair is None) != (along is None):
        return torch.zeros((), dtype=kind, device=w.device)
    w = torch.zeros_like(w.real, dtype=kind)
    return w if pair is None or along is None else w.sum(pair[along], keepdim=True)


def _average(pair: Pair, u: Tensor, v: Tensor, b: Scalar, e: Scalar, along: int | None) -> Tensor:
    if (pair is None) != (along is None):
        return v.clone()
    squares = squared(u) + e
    means = squares if pair is None or along is None else squares.mean(pair[along], keepdim=True)
    return b * v + (1 - b) * means


def _scaled(pair: Pair, u: Tensor, row: Tensor, column: Tensor, v: Tensor) -> Tensor:
    if pair is None:
        return u * _inverse_root(v)
    return u * _inverse_root(_share(row, pair[0])) * _inverse_root(column)


def _root(dims: Callable[[Sequence[int]], Pair], row: Tensor, column: Tensor, v: Tensor) -> Tensor:
    pair = dims(torch.broadcast_shapes(row.shape, column.shape)) if row.ndim else None
    if pair is None:
        return compute_wide(safe_sqrt, v)
    share = compute_wide(lambda r: safe_sqrt(_share(r, pair[0])), row)
    both = share, column
    return apply(lambda r, c: r * safe_sqrt(c), both) if any_sharded(both) else share * safe_sqrt(column)


def _by_dims(
    f: Callable[..., Tensor],
    dims: Callable[[Sequence[int]], Pair],
    tree: Params,
    *rest: Params,
    hyper: Sequence[Scalar] = (),
) -> Params:
    """Map a function of the factored dimensions of a leaf, the leaf, what belongs to it, and hyperparameters.

    Of a sharded leaf the dimensions are those of the whole.
    """
    leaves, rebuild = flatten(tree)
    made: list[Tensor] = []
    for w, *beside in zip(leaves, *map(tree_leaves, rest), strict=True):
        pair = dims(w.shape)
        made.append(compute_wide(lambda *row, pair=pair: f(pair, *row), w, hyper=(*beside, *hyper)))
    return rebuild(made)


def _share(row: Tensor, dim: int) -> Tensor:
    """Each number as a share of the mean along a dimension."""
    mean = row.mean(dim, keepdim=True)
    return row / torch.where(mean == 0, torch.ones_like(mean), mean)


def _inverse_root(v: Tensor) -> Tensor:
    """One over the root, and 1 at 0, where only an update of 0 comes."""
    return torch.where(v == 0, torch.ones_like(v), v) ** -0.5


@remembered
def adafactor(
    learning_rate: Hyper | Schedule | None = None,
    min_dim_size_to_factor: int = 128,
    decay_rate: Scalar = 0.8,
    decay_offset: int = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Scalar | None = 1.0,
    momentum: Scalar | None = None,
    dtype_momentum: torch.dtype = torch.float32,
    weight_decay_rate: Hyper | Schedule | None = None,
    eps: Scalar = 1e-30,
    factored: bool = True,
    weight_decay_mask: Mask | None = None,
) -> Transform:
    r"""Adafactor, :math:`w' = w - \eta \max(\operatorname{rms}(w), 10^{-3}) \operatorname{clip}(g / \sqrt{v})`.

    The mean square :math:`v` of a large matrix is kept as one number for each row and column. Steps are relative to the
    size of a leaf, and clipped to a root mean square. `torch.optim.Adafactor` is this with `min_dim_size_to_factor=1`,
    for matrices and vectors, with the learning rate :math:`\min(\eta, 1 / \sqrt{t})`; its decay is multiplied by
    :math:`\eta` and comes before the step, and it bounds :math:`v` from below where this adds to squares.

    Args:
        learning_rate: :math:`\eta`, relative if `multiply_by_parameter_scale`; None for 1.
        min_dim_size_to_factor: Size that two dimensions have at least if a leaf is factored.
        decay_rate: How fast the mean square forgets: :math:`1 - (t + 1)^{-r}` is kept.
        decay_offset: Number of steps taken before the ones that count.
        multiply_by_parameter_scale: Whether steps are relative to the root mean square of each leaf.
        clipping_threshold: Greatest root mean square of the step of a leaf before the learning rate; None for none.
        momentum: Decay of an average of steps; None for none.
        dtype_momentum: Dtype in which it is kept.
        weight_decay_rate: Share of the weights that is taken away in each step, whatever the learning rate.
        eps: Added to squares.
        factored: Whether large leaves are factored.
        weight_decay_mask: Leaves that decay; True means apply.

    Example:
        >>> tx, params = adafactor(0.1), {"weight": torch.tensor([3.0, 4.0])}
        >>> tx.update({"weight": torch.tensor([7.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.3536,  0.3536])}

    References:
        Shazeer & Stern, *Adafactor: adaptive learning rates with sublinear memory cost*, 2018.
    """
    flags(multiply_by_parameter_scale=multiply_by_parameter_scale)
    dtypes(dtype_momentum=dtype_momentum)
    links = [scale_by_factored_rms(factored, decay_rate, decay_offset, min_dim_size_to_factor, eps)]
    if clipping_threshold is not None:
        links.append(clip_by_block_rms(clipping_threshold))
    if learning_rate is not None:
        links.append(scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        links.append(scale_by_param_block_rms())
    if momentum is not None:
        links.append(ema(momentum, debias=False, accumulator_dtype=dtype_momentum))
    if weight_decay_rate is not None:
        links.append(add_decayed_weights(weight_decay_rate, weight_decay_mask))
    elif weight_decay_mask is not None:
        raise ValueError("weight_decay_mask has no effect without weight_decay_rate. Give weight_decay_rate=.")
    return chain(*links, scale(-1.0))
