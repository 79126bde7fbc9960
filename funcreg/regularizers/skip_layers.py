"""LassoNet: features of a network that vanish as a whole, first layer and skip layer together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from funcreg.core._typing import Params, Scalar
from funcreg.core.construction import remembered
from funcreg.core.leafwise import euclidean, gathered, running_sum, sign, spread_like, squared, widen
from funcreg.core.sharding import whole
from funcreg.core.tree import flatten, tree_paths
from funcreg.regularizers.grouped import grouped, ungrouped
from funcreg.regularizers.penalty import Penalty

_AT_LEAST_0 = (0.0, math.inf)


def _skipping(theta: Tensor, size: Tensor, force: Scalar, ratio: Scalar) -> tuple[Tensor, Tensor]:
    """Skip weights of each feature after a proximal step, and the bound of its weights in the first layer.

    Args:
        theta: Skip weights, a row for each feature.
        size: Magnitudes in the first layer, after soft thresholding.
        force: The threshold of the norm of skip weights.
        ratio: The bound over that norm.
    """
    norms = euclidean(theta, (theta.ndim - 1,))
    sorted_, none = size.sort(dim=-1, descending=True).values, torch.zeros_like(norms)
    # With the s largest entries of the first layer at the bound, what the norm would be; the first s that fits.
    pushes = torch.cat([none, running_sum(sorted_)], -1)
    counts = torch.arange(pushes.shape[-1], dtype=norms.dtype, device=norms.device)
    landed = (norms - force + ratio * pushes).relu() / (1 + counts * ratio**2)
    fits = ratio * landed >= torch.cat([sorted_, none], -1)
    landed = landed.gather(-1, fits.to(torch.int64).argmax(-1, keepdim=True))
    even = torch.full_like(theta, 1 / math.sqrt(max(1, theta.shape[-1])))
    way = torch.where(norms == 0, even, theta / torch.where(norms == 0, 1.0, norms))
    return way * landed, ratio * landed


def _skipping_in_metric(
    theta: Tensor, h: Tensor, size: Tensor, k: Tensor, force: Scalar, ratio: Scalar
) -> tuple[Tensor, Tensor]:
    r"""`_skipping` where :math:`h` and :math:`k` weigh the squared distances of skip weights and of the first layer.

    Skip weights of norm b are :math:`h_i v_i / (h_i + \mu)` with some :math:`\mu > -\min h`. The cost of b is convex,
    with derivative :math:`-\mu b + \text{force} - M \sum_i k_i (s_i - M b)_+`, and falls in :math:`\mu`: its root is
    bisected. Two steps of Newton's method then make it exact, and give it derivatives.
    """
    # In units of the greatest metric and magnitude of a feature, so that no power leaves the range of float32.
    most = torch.cat([h, k], -1).amax(-1, keepdim=True)
    h, k, force = h / most, k / most, force / most
    total = euclidean(h * theta, (theta.ndim - 1,)) + ratio * (k * size).sum(-1, keepdim=True)
    alive = total > force
    length = torch.cat([theta.abs(), size], -1).amax(-1, keepdim=True)
    length = torch.where(alive, length, 1.0)
    least = h.amin(-1, keepdim=True)
    softest = h == least
    # What leaves zero goes where the metric is least.
    stuck = ~((theta != 0) & softest).any(-1, keepdim=True)
    pull = torch.where(softest & stuck, torch.finfo(h.dtype).eps, h * theta / length)
    # The dead branch computes with ones, so that no derivative through it is NaN.
    pull, size, force = torch.where(alive, pull, 1.0), size / length, force / length

    def at(far: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm of skip weights, derivative of the cost there, and its own in far."""
        scale = h - least + far
        norm = squared(pull / scale).sum(-1, keepdim=True).sqrt()
        over = size - ratio * norm
        push = ratio * (k * over.relu()).sum(-1, keepdim=True)
        stiffness = ratio**2 * (k * (over > 0)).sum(-1, keepdim=True)
        fall = -(squared(pull) / (scale * scale.square())).sum(-1, keepdim=True) / norm
        return norm, (least - far) * norm + force - push, (least - far + stiffness) * fall - norm

    low, high = torch.full_like(total, -60.0), torch.full_like(total, 50.0)
    for _ in range(42):
        middle = (low + high) / 2
        rising = at(middle.exp())[1] > 0
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    ends = low.exp(), high.exp()
    far = ends[1]
    for _ in range(2):  # In 1 / far, where the derivative is concave: from this side only rounding passes the root.
        _, slope, bend = at(far)
        far = torch.clamp(far / (1 + slope / (bend * far)), *ends)
    norm = at(far)[0]
    gone = torch.where(total.isnan(), total, 0.0)
    kept, bound = torch.where(alive, length * pull / (h - least + far), gone), length * ratio * norm
    return kept, torch.where(alive, bound, gone)


@remembered
def hierarchical(skip: str, hidden: str, axis: int = -1) -> Penalty:
    r"""LassoNet: :math:`\sum_j \|\theta_j\|_2 + \alpha \|W_j\|_1` under :math:`|W_{ij}| \le M \|\theta_j\|_2`.

    A network gets a linear layer :math:`\theta` that skips it, beside its first layer :math:`W`. A feature :math:`j`
    may be used by the first layer only as far as the skip layer uses it: when :math:`\theta_j` becomes zero, the
    whole network forgets the feature. The value is infinite where the constraint is broken, beyond rounding. The
    gradient is that of the sum of norms. The proximal operator is the global minimum, and keeps the constraint; where
    :math:`\theta_j` was zero and the first layer brings it back, its entries are equal. In a diagonal metric it is the
    minimum, too, to rounding; there the entries of the least metric come back.

    The hyperparameters of the penalty are `ratio`, the :math:`M`, and `alpha`, by default 0.

    Args:
        skip: Dotted name of the weight of the skip layer, such as `"skip.weight"`.
        hidden: Dotted name of the weight of the first layer, such as `"layers.0.weight"`.
        axis: Dimension of both along which features lie; by default the last, as in `torch.nn.Linear`.

    Raises:
        ValueError: There are no such leaves, or they have not the same features; later, from the parameters.

    Example:
        >>> lassonet = hierarchical("skip", "hidden")
        >>> params = {"skip": torch.tensor([[2.0, 0.5]]), "hidden": torch.tensor([[3.0, 0.25], [0.5, 0.0]])}
        >>> lassonet.prox(params, 1.0, ratio=1.0)
        {'skip': tensor([[2., 0.]]), 'hidden': tensor([[2.0000, 0.0000],
                [0.5000, 0.0000]])}

    References:
        Lemhadri, Ruan, Abraham & Tibshirani, *LassoNet: a neural network with feature sparsity*, 2021.
    """

    def pair(params: Params) -> tuple[list[Tensor], list[int], Callable[[Iterable[Tensor]], Params]]:
        """All leaves, the places of the two among them, and the way back to a tree."""
        leaves, rebuild = flatten(params)
        paths = tree_paths(params)
        missing = [name for name in (skip, hidden) if name not in paths]
        if missing:
            raise ValueError(f"hierarchical looks for leaf '{missing[0]}'; the parameters have {', '.join(paths)}")
        places = [paths.index(skip), paths.index(hidden)]
        sizes = [leaves[i].shape[axis] if leaves[i].ndim else 0 for i in places]
        if sizes[0] != sizes[1] or not leaves[places[0]].ndim:
            raise ValueError(
                f"'{skip}' and '{hidden}' have {sizes[0]} and {sizes[1]} features along axis {axis}; expected as many"
            )
        for i in places:
            leaves[i] = whole(leaves[i])
        return leaves, places, lambda found: spread_like(rebuild(found), params)

    def features(w: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """A row for each feature, and the dimensions that it holds."""
        dims = tuple(d for d in range(w.ndim) if d != axis % w.ndim)
        return grouped(widen(w), dims), dims

    def value(params: Params, ratio: Scalar, alpha: Scalar = 0.0) -> Tensor:
        leaves, places, _ = pair(params)
        (theta, _), (inner, _) = [features(leaves[i]) for i in places]
        norms = euclidean(theta, (theta.ndim - 1,))
        slack = 1 + 32 * torch.finfo(norms.dtype).eps
        broken = (inner.abs() > ratio * norms * slack).any()
        total = norms.sum() + alpha * inner.abs().sum()
        return torch.where(broken, torch.inf, total)

    def gradient(params: Params, ratio: Scalar, alpha: Scalar = 0.0) -> Params:
        leaves, places, rebuild = pair(params)
        slopes = [torch.zeros_like(w) for w in leaves]
        theta, dims = features(leaves[places[0]])
        norms = euclidean(theta, (theta.ndim - 1,))
        found = ungrouped(theta / torch.where(norms == 0, math.inf, norms), leaves[places[0]], dims)
        slopes[places[0]] = found.to(leaves[places[0]].dtype)
        slopes[places[1]] = (alpha * sign(widen(leaves[places[1]]))).to(leaves[places[1]].dtype)
        return rebuild(slopes)

    def proximal(
        params: Params, step: Scalar, ratio: Scalar, alpha: Scalar = 0.0, metric: Params | None = None
    ) -> Params:
        if any(isinstance(x, Tensor) and x.ndim for x in (step, ratio, alpha)) or not all(
            isinstance(x, (int, float, Tensor)) for x in (step, ratio, alpha)
        ):
            raise ValueError("hierarchical takes one step, ratio and alpha for both of its leaves, not trees of them")
        leaves, places, rebuild = pair(params)
        (theta, outer_dims), (inner, inner_dims) = [features(leaves[i]) for i in places]
        size = inner.abs() - step * alpha
        if metric is None or not theta.numel():
            kept, bound = _skipping(theta, size.relu(), step, ratio)
        else:
            weights = flatten(gathered(metric))[0]
            (h, _), (k, _) = [features(weights[i]) for i in places]
            size = inner.abs() - step * alpha / k
            kept, bound = _skipping_in_metric(theta, h, size.relu(), k, step, ratio)
        within = sign(inner) * torch.minimum(size.relu(), bound)
        results = list(leaves)
        for i, rows, dims in ((places[0], kept, outer_dims), (places[1], within, inner_dims)):
            results[i] = (ungrouped(rows, leaves[i], dims) + 0.0).to(leaves[i].dtype)
        return rebuild(results)

    value.__name__ = "hierarchical"
    value.__doc__ = f"The penalty of LassoNet of '{skip}' and '{hidden}'."
    return Penalty(value, gradient, proximal, bounds={"ratio": _AT_LEAST_0, "alpha": _AT_LEAST_0})
