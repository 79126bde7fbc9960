"""The penalties. Each is one block: its rules, and the value with its documentation.

A rule sees one leaf, in float32 at least, and hyperparameters that may be 0-dim tensors: it never branches on a
value. Norms are sums of squares under a safe root, because `vector_norm` loses digits in float32 on a CPU and has
no second derivative at zero.
"""

from __future__ import annotations

import math
from types import EllipsisType
from typing import Any, Literal

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Scalar
from funcreg.core.leafwise import bare, euclidean, held, sign, squared, step_times, times
from funcreg.core.ranges import check_sign
from funcreg.core.tree import tree_map
from funcreg.regularizers.composition import Structure, Term
from funcreg.regularizers.grouped import in_units, root_of_mean
from funcreg.regularizers.lifting import penalty

#: The dimensions that a group reduces: `...` all but the first, None all.
Dim = int | tuple[int, ...] | EllipsisType | None
#: What multiplies the norm of a group: None for 1, the root of its size, or a tensor with one entry a group.
Weights = Literal["sqrt_size"] | Tensor | None

_AT_LEAST_0 = (0.0, math.inf)
_SHARE = (0.0, 1.0)


def shrink(w: Tensor, threshold: Scalar) -> Tensor:
    r"""Soft thresholding of one tensor, :math:`\operatorname{sign}(w) \max(|w| - t, 0)`.

    Zeros are +0.0, NaN goes through, a complex entry keeps its phase.

    Args:
        w: Tensor.
        threshold: :math:`t`: a number of at least 0, or a tensor that broadcasts against `w`.

    Example:
        >>> shrink(torch.tensor([3.0, -0.5]), 1.0)
        tensor([2., 0.])
    """
    check_sign("threshold", threshold)
    return shrunk(w, threshold)


def shrunk(w: Tensor, threshold: Scalar) -> Tensor:
    """`shrink` inside a rule, whose threshold is known to be no negative number."""
    if w.is_complex():
        size = w.abs()
        # Adding zero turns -0.0 into +0.0.
        return w * ((size - threshold).relu() / torch.where(size == 0, torch.ones_like(size), size)) + 0.0
    if not isinstance(threshold, Tensor) or (bare(w) and bare(threshold)):
        bound: Any = held(threshold, w)  # The types of clamp know no such union.
        return w - w.clamp(-bound, bound)
    # The same, but for derivatives: between the two ends of a clamp a threshold of 0 is a tie, which splits them.
    return w - torch.where(w.abs() <= threshold, w, w.sign() * threshold)


def _l1_proximal(w: Tensor, step: Scalar) -> Tensor:
    return shrunk(w, step)


def _l1_residual(w: Tensor, g: Tensor, strength: Scalar) -> Tensor:
    return torch.where(w == 0, shrunk(g, strength), g + times(strength, sign(w)))


@penalty(
    gradient=sign,
    proximal=_l1_proximal,
    residual=_l1_residual,
    separable=True,
    structure=Structure(needs=("signs",), keeps=("signs", "order")),
)
def l1(w: Tensor) -> Tensor:
    r"""Sum of magnitudes, :math:`\sum_i |w_i|`.

    The gradient is the sign, 0 at 0, and never gives a zero; the proximal operator is soft thresholding,
    :math:`\operatorname{sign}(w) \max(|w| - \text{step}, 0)`, and does.

    Example:
        >>> params = {"weight": torch.tensor([3.0, -0.5])}
        >>> l1(params), l1.grad(params), l1.prox(params, 1.0)
        (tensor(3.5000), {'weight': tensor([ 1., -1.])}, {'weight': tensor([2., 0.])})

    References:
        Tibshirani, *Regression shrinkage and selection via the lasso*, 1996.
    """
    return w.abs()


def _l2_gradient(w: Tensor) -> Tensor:
    return 2 * w


def _l2_proximal(w: Tensor, step: Scalar) -> Tensor:
    return w / (1 + 2 * step) + 0.0  # +0.0 also from -0.0.


def _l2_residual(w: Tensor, g: Tensor, strength: Scalar) -> Tensor:
    return g + times(strength, _l2_gradient(w))


@penalty(
    gradient=_l2_gradient,
    proximal=_l2_proximal,
    residual=_l2_residual,
    separable=True,
    structure=Structure(curvature=lambda: 2.0),
)
def l2(w: Tensor) -> Tensor:
    r"""Sum of squares, :math:`\sum_i w_i^2`. No root, and no factor one half.

    This is what Keras calls L2 and what most code adds to a loss. Its gradient is :math:`2 w`; the `weight_decay`
    of PyTorch and optax adds :math:`w`, which is `half_l2`.

    Example:
        >>> params = {"weight": torch.tensor([3.0, -1.0])}
        >>> l2(params), l2.grad(params), l2.prox(params, 0.5)
        (tensor(10.), {'weight': tensor([ 6., -2.])}, {'weight': tensor([ 1.5000, -0.5000])})

    References:
        Hoerl & Kennard, *Ridge regression*, 1970.
    """
    return squared(w)


def _half_l2_gradient(w: Tensor) -> Tensor:
    return w.clone()


def _half_l2_proximal(w: Tensor, step: Scalar) -> Tensor:
    return w / (1 + step) + 0.0  # +0.0 also from -0.0.


def _half_l2_residual(w: Tensor, g: Tensor, strength: Scalar) -> Tensor:
    return g + times(strength, w)


@penalty(
    gradient=_half_l2_gradient,
    proximal=_half_l2_proximal,
    residual=_half_l2_residual,
    separable=True,
    structure=Structure(curvature=lambda: 1.0),
)
def half_l2(w: Tensor) -> Tensor:
    r"""Half the sum of squares, :math:`\frac{1}{2} \sum_i w_i^2`, whose gradient is :math:`w`.

    With strength :math:`\lambda` this is the `weight_decay` :math:`\lambda` of `torch.optim.SGD` and of optax.

    Example:
        >>> params = {"weight": torch.tensor([3.0, -1.0])}
        >>> half_l2(params), half_l2.grad(params), half_l2.prox(params, 1.0)
        (tensor(5.), {'weight': tensor([ 3., -1.])}, {'weight': tensor([ 1.5000, -0.5000])})
    """
    return squared(w) / 2


def _elastic_gradient(w: Tensor, alpha: Scalar, rho: Scalar) -> Tensor:
    return times(step_times(alpha, rho), sign(w)) + times(step_times(alpha, 1 - rho), w)


def _elastic_proximal(w: Tensor, step: Scalar, alpha: Scalar, rho: Scalar) -> Tensor:
    return (
        shrunk(w, step_times(step, alpha, rho)) / (1 + step_times(step, alpha, 1 - rho)) + 0.0
    )  # +0.0 also from -0.0.


def _elastic_residual(w: Tensor, g: Tensor, strength: Scalar, alpha: Scalar, rho: Scalar) -> Tensor:
    at_zero = shrunk(g, step_times(strength, alpha, rho))
    return torch.where(w == 0, at_zero, g + _elastic_gradient(w, step_times(strength, alpha), rho))


def _elastic_parts(alpha: Hyper, rho: Hyper) -> list[Term]:
    return [Term(l1, (alpha, rho)), Term(half_l2, (alpha, _rest(rho)))]


def _rest(rho: Hyper) -> Hyper:
    """The share of the other part, for a number or a tree of them."""
    return tree_map(lambda rho: 1 - rho, rho)


@penalty(
    gradient=_elastic_gradient,
    proximal=_elastic_proximal,
    residual=_elastic_residual,
    separable=True,
    bounds={"alpha": _AT_LEAST_0, "rho": _SHARE},
    structure=Structure(parts=_elastic_parts),
)
def elastic(w: Tensor, alpha: Scalar, rho: Scalar) -> Tensor:
    r"""Elastic net, :math:`\alpha (\rho \|w\|_1 + \frac{1 - \rho}{2} \|w\|_2^2)`.

    `elastic(params, alpha, 1)` is `alpha * l1(params)`; `elastic(params, alpha, 0)` is `alpha * half_l2(params)`.
    These are scikit-learn's `alpha` and `l1_ratio`, glmnet's `lambda` and `alpha`.

    Args:
        alpha: Strength, at least 0.
        rho: Share of the :math:`\ell_1` term, from 0 (ridge) to 1 (lasso).

    Example:
        >>> elastic({"weight": torch.tensor([3.0, -4.0])}, alpha=0.1, rho=0.5)
        tensor(0.9750)
        >>> elastic.prox({"weight": torch.tensor([3.0, -0.5])}, 1.0, alpha=2.0, rho=0.5)
        {'weight': tensor([1., 0.])}

    References:
        Zou & Hastie, *Regularization and variable selection via the elastic net*, 2005.
    """
    return times(step_times(alpha, rho), w.abs()) + times(step_times(alpha, (1 - rho) / 2), squared(w))


# What Keras calls two strengths of their own.
elastic.hints = dict.fromkeys(
    ("l1", "l2"),
    ". Two strengths of their own become alpha and rho by a converter, as in elastic(params, "
    "*elastic_from_keras(l1=1e-3, l2=1e-4)).",
)


# Groups


def group_dims(w: Tensor, dim: Dim) -> tuple[int, ...]:
    if dim is None:
        return tuple(range(w.ndim))
    if isinstance(dim, EllipsisType):
        return tuple(range(1, w.ndim))
    if not isinstance(dim, (int, tuple, list)):
        raise ValueError(f"dim is {dim!r}; expected an int, a tuple of ints, None or ...")
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    for d in dims:
        if not -w.ndim <= d < w.ndim:
            raise ValueError(
                f"dim={dim} got a leaf of shape {tuple(w.shape)}, which has no dimension {d}. "
                "Leave such leaves out with mask=, as in mask=matrices, or use dim=... (all but the first)."
            )
    dims = tuple(d % w.ndim for d in dims)
    if len(set(dims)) < len(dims):
        raise ValueError(f"dim={dim} names a dimension of a leaf of shape {tuple(w.shape)} twice")
    return dims


def group_norms(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The norm of each group, reduced dimensions kept."""
    return euclidean(w, dims)


def group_sizes(w: Tensor, dims: tuple[int, ...], weights: Weights) -> Any:
    """What multiplies the norm of each group."""
    if weights is None:
        return 1.0
    if isinstance(weights, Tensor):
        groups = [1 if d in dims else n for d, n in enumerate(w.shape)]
        if weights.numel() != math.prod(groups):
            raise ValueError(
                f"weights has {weights.numel()} entries; expected {math.prod(groups)}, one for each group of this "
                "leaf. Leaves with other numbers of groups go to other penalties, by mask= or per_leaf."
            )
        return weights.reshape(groups)
    if weights == "sqrt_size":
        return math.sqrt(math.prod([w.shape[d] for d in dims]))
    raise ValueError(f"weights is {weights!r}; expected None, 'sqrt_size' or a tensor with one entry a group")


def shrink_groups(w: Tensor, threshold: Scalar, dims: tuple[int, ...]) -> Tensor:
    norms = group_norms(w, dims)
    # Adding zero turns -0.0 into +0.0.
    return w * ((norms - threshold).relu() / torch.where(norms == 0, torch.ones_like(norms), norms)) + 0.0


def group_directions(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Each group divided by its norm, zero for a group of zeros, where it has no slope either, as by autograd."""
    norms = group_norms(w, dims)
    return w / torch.where(norms == 0, math.inf, norms)


def shrink_groups_in_metric(w: Tensor, h: Tensor, threshold: Scalar, dims: tuple[int, ...]) -> Tensor:
    r"""Group soft thresholding in a diagonal metric, by the root of :math:`\sum (h w)^2 / (h \theta + t)^2 = 1`.

    References:
        Deleu & Bengio, *Structured sparsity inducing adaptive optimizers for deep learning*, 2021, theorem 1.
    """
    if not w.numel():
        return w.clone()
    if not dims:
        return shrunk(w, threshold / h)
    x, h, size, top = in_units(w, h, dims)
    threshold = threshold / size / top
    norms = euclidean(h * x, dims)
    alive = norms > threshold
    # In units of the norm, so that no power of it leaves the range of float32.
    unit = torch.where(norms == 0, torch.ones_like(norms), norms)
    pulls = h * x / unit
    # The dead branch computes with ones, so that no derivative through it is NaN.
    pulls, weight = torch.where(alive, pulls, torch.ones_like(pulls)), torch.where(alive, h, torch.ones_like(h))
    force = torch.where(alive, threshold / unit, torch.ones_like(norms))
    root = root_of_mean(pulls, weight, force, dims)
    landed = w * (weight * root / (weight * root + force))
    gone = torch.where(norms.isnan(), norms, torch.zeros_like(norms)).to(w.dtype)
    return torch.where(alive, landed, gone) + 0.0


def _group_gradient(w: Tensor, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    return group_sizes(w, dims, weights) * group_directions(w, dims)


def _group_proximal(w: Tensor, step: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    return shrink_groups(w, step_times(step, group_sizes(w, dims, weights)), dims)


def _group_metric(w: Tensor, h: Tensor, step: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    return shrink_groups_in_metric(w, h, step_times(step, group_sizes(w, dims, weights)), dims)


def dims_of_groups(w: Tensor, *, dim: Dim = ..., weights: Weights = None) -> tuple[int, ...]:
    return group_dims(w, dim)


def _group_residual(w: Tensor, g: Tensor, strength: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    dims = group_dims(w, dim)
    force = step_times(strength, group_sizes(w, dims, weights))
    return torch.where(
        group_norms(w, dims) == 0, shrink_groups(g, force, dims), g + times(force, group_directions(w, dims))
    )


@penalty(
    gradient=_group_gradient,
    proximal=_group_proximal,
    metric=_group_metric,
    residual=_group_residual,
    separable=False,
    structure=Structure(needs=("directions",), keeps=("signs", "directions"), groups=dims_of_groups),
)
def group_lasso(w: Tensor, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    r"""Sum of the norms of groups, :math:`\sum_g c_g \|w_g\|_2`, which zeroes whole groups.

    Groups that are told by indices, as those of features, are `tree_lasso(params, groups=((0, 1), (2, 3, 4)))`.

    Args:
        dim: Dimensions that lie inside a group. By default (`...`) all but the first: a group is a row of a matrix
            (all inputs of a unit), a filter of a convolution, a single entry of a bias. An int or a tuple names
            them (0: the columns of a matrix, all outputs of an input). None makes each leaf one group. A transposed
            convolution has its inputs first: `(0, 2, 3)` are its filters.
        weights: The factors :math:`c_g`: None for 1, `"sqrt_size"` for the root of the number of entries of a group
            (Yuan & Lin), or a tensor with one entry for each group.

    Raises:
        ValueError: A leaf has no such dimension.

    Example:
        >>> params = {"weight": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}
        >>> group_lasso(params)
        tensor(5.5000)
        >>> group_lasso.prox(params, 1.0)
        {'weight': tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])}

    References:
        Yuan & Lin, *Model selection and estimation in regression with grouped variables*, 2006.
    """
    dims = group_dims(w, dim)
    return group_sizes(w, dims, weights) * group_norms(w, dims)


def _sparse_group_gradient(w: Tensor, alpha: Scalar, rho: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    return times(alpha, rho * sign(w) + (1 - rho) * _group_gradient(w, dim=dim, weights=weights))


def _sparse_group_proximal(
    w: Tensor, step: Scalar, alpha: Scalar, rho: Scalar, *, dim: Dim = ..., weights: Weights = None
) -> Tensor:
    # In this order: the other one is not the proximal operator of the sum.
    strength = step_times(step, alpha)
    return _group_proximal(
        shrunk(w, step_times(strength, rho)), step_times(strength, 1 - rho), dim=dim, weights=weights
    )


def _sparse_group_metric(
    w: Tensor, h: Tensor, step: Scalar, alpha: Scalar, rho: Scalar, *, dim: Dim = ..., weights: Weights = None
) -> Tensor:
    strength = step_times(step, alpha)
    return _group_metric(
        shrunk(w, step_times(strength, rho) / h), h, step_times(strength, 1 - rho), dim=dim, weights=weights
    )


def _sparse_group_residual(
    w: Tensor, g: Tensor, strength: Scalar, alpha: Scalar, rho: Scalar, *, dim: Dim = ..., weights: Weights = None
) -> Tensor:
    entries = _l1_residual(w, g, step_times(strength, alpha, rho))
    return _group_residual(w, entries, step_times(strength, alpha, 1 - rho), dim=dim, weights=weights)


def _sparse_group_parts(alpha: Hyper, rho: Hyper, **options: Any) -> list[Term]:
    groups = Term(group_lasso, (alpha, _rest(rho)), options=tuple(options.items()))
    return [Term(l1, (alpha, rho)), groups]


@penalty(
    gradient=_sparse_group_gradient,
    proximal=_sparse_group_proximal,
    metric=_sparse_group_metric,
    residual=_sparse_group_residual,
    separable=False,
    bounds={"alpha": _AT_LEAST_0, "rho": _SHARE},
    structure=Structure(parts=_sparse_group_parts, keeps=("signs",), groups=dims_of_groups),
)
def sparse_group_lasso(w: Tensor, alpha: Scalar, rho: Scalar, *, dim: Dim = ..., weights: Weights = None) -> Tensor:
    r"""Zero groups, and zeros inside groups, :math:`\alpha (\rho \|w\|_1 + (1 - \rho) \sum_g c_g \|w_g\|_2)`.

    Args:
        alpha: Strength, at least 0.
        rho: Share of the :math:`\ell_1` term, from 0 (group lasso) to 1 (lasso).
        dim: Dimensions that lie inside a group; see `group_lasso`.
        weights: Factors of the norms; see `group_lasso`.

    Raises:
        ValueError: A leaf has no such dimension.

    Example:
        >>> params = {"weight": torch.tensor([[3.5, 4.5], [0.3, 4.0]])}
        >>> sparse_group_lasso.prox(params, 1.0, alpha=1.0, rho=0.5)
        {'weight': tensor([[2.7000, 3.6000],
                [0.0000, 3.0000]])}

    References:
        Simon, Friedman, Hastie & Tibshirani, *A sparse-group lasso*, 2013.
    """
    dims = group_dims(w, dim)
    inside = w.abs().sum(dims, keepdim=True) if dims else w.abs()
    return times(alpha, rho * inside + (1 - rho) * group_sizes(w, dims, weights) * group_norms(w, dims))


# Of what estimators of the group lasso are told.
group_lasso.hints = sparse_group_lasso.hints = {
    "groups": ". Groups of indices are tree_lasso, as in tree_lasso(params, groups=((0, 1), (2, 3, 4)), axis=1) of the "
    "inputs of a layer; groups that span leaves are coupled(group_lasso, groups)."
}
