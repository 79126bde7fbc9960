"""Certificates: is this a solution, how far from one is it, from which strength on is everything zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad, grad_and_value, jacrev, vjp, vmap
from torch.nn.functional import softplus

from funcreg.core._typing import Hyper, Mask, Params, Scalar
from funcreg.core.checks import check_params
from funcreg.core.leafwise import compute, reduce_leaves, total
from funcreg.core.masks import keep, kept_by, mask_leaves
from funcreg.core.ranges import concrete
from funcreg.core.tree import flatten, tree_leaves, tree_map, tree_paths
from funcreg.core.undocumented import has_tangents, is_transformed
from funcreg.networks.deployment import computed_parameters
from funcreg.regularizers.composition import Term, split
from funcreg.regularizers.penalty import Penalty, Sum
from funcreg.transforms.factory_checks import nonnegative
from funcreg.transforms.regularizing import check_penalty


def kkt_residual(
    params: Params,
    grads: Params,
    penalty: Penalty,
    *hyper: Hyper,
    strength: Hyper = 1.0,
    mask: Mask | None = None,
    **options: Any,
) -> Tensor:
    r"""How far from a solution: :math:`\max_i |r_i|`, :math:`r` the shortest in :math:`\nabla f + \lambda \partial g`.

    It is 0 exactly at a minimum of :math:`f + \lambda g`, and in the units of the gradient. For `l1`, an entry that
    is not 0 counts :math:`|\nabla_i f + \lambda \operatorname{sign}(w_i)|`, a zero
    :math:`\max(|\nabla_i f| - \lambda, 0)`. Leaves out of the mask count :math:`|\nabla_i f|`.

    For a constraint :math:`r` is what is left of the gradient by the normals of the set: all of it inside the set, only
    what points along or out of the boundary on it, and infinite outside of the set.

    A penalty or constraint without a residual rule of its own is judged by the residual of its proximal operator,
    :math:`w - \operatorname{prox}_{\lambda g}(w - \nabla f)`. That is 0 at the same points, but a length in
    parameters, and not in the units of the gradient. Of what the library has, these are `spectral`,
    `on_singular_values`, `schatten`, `spectral_mcp`, `rank_envelope`, `slope`, `oscar`, `isotropic_total_variation` and
    `hierarchical`. One without a proximal operator either, as `orthogonality`, is an error.

    Args:
        params: Parameters :math:`w`.
        grads: Gradients of the loss :math:`f` alone, without the penalty, at `params`.
        penalty: A penalty :math:`g` such as `l1`.
        hyper: Its hyperparameters.
        strength: :math:`\lambda`: number of at least 0, tensor, or a tree of them like the parameters.
        mask: Leaves on which the penalty acts.
        options: Static options of the penalty, such as `dim`.

    Shape:
        A 0-dim tensor.

    Example:
        The minimum of :math:`\frac{1}{2} (w - 1)^2 + \frac{1}{2} |w|` is at 0.5.

        >>> w = torch.tensor([0.5])
        >>> kkt_residual({"w": w}, {"w": w - 1}, l1, strength=0.5)
        tensor(0.)
        >>> kkt_residual({"w": w + 0.25}, {"w": w - 0.75}, l1, strength=0.5)
        tensor(0.2500)
    """
    nonnegative(strength=strength)
    check_penalty(penalty, hyper, options)
    residual = penalty.residual(params, grads, *hyper, strength=strength, mask=mask, **options)
    return _largest(residual)


def _largest(tree: Params) -> Tensor:
    leaves = [leaf for leaf in tree_leaves(tree) if leaf.numel()]
    sizes = reduce_leaves(lambda r: r.abs(), leaves, op="max")
    if not sizes:
        return torch.zeros(())
    dtype = sizes[0].dtype
    for size in sizes[1:]:
        dtype = torch.promote_types(dtype, size.dtype)
    return torch.stack([size.to(sizes[0].device, dtype) for size in sizes]).amax()


def lambda_max(grads: Params, penalty: Penalty, *hyper: Hyper, mask: Mask | None = None, **options: Any) -> Tensor:
    r"""Least strength that makes zero a solution, :math:`\min \{\lambda : -\nabla f(0) \in \lambda \partial g(0)\}`.

    For `l1` this is :math:`\max_i |\nabla_i f(0)|`; a path of strengths starts here. It is found from the definition,
    as the least step whose proximal operator takes all gradients to zero, and so holds for every convex penalty: along
    lines and by bisection, exact to the last bit. Infinite for a penalty that makes no zeros.
    It has first and second derivatives in the gradients, the hyperparameters and tensors in the penalty.

    Args:
        grads: Gradients of the loss at zero. Leaves that carry no penalty, such as an intercept, are fitted first,
            which `null_model` does.
        penalty: A convex penalty such as `l1`.
        hyper: Its hyperparameters.
        mask: Leaves on which the penalty acts; the others are not looked at, nor those on which no term of a sum acts.
        options: Static options of the penalty, such as `dim`.

    Shape:
        A 0-dim tensor of float64.

    Example:
        >>> lambda_max({"weight": torch.tensor([0.5, -2.0])}, l1)
        tensor(2., dtype=torch.float64)
        >>> lambda_max({"weight": torch.tensor([0.5, -2.0])}, elastic, 1.0, 0.25)
        tensor(8., dtype=torch.float64)
    """
    check_penalty(penalty, hyper, options)
    check_params(grads, "grads")
    if isinstance(grads, dict) and grads and not tree_leaves(grads):
        raise ValueError("grads has None for every leaf, and so no strength is known. Was backward() called?")
    chosen = kept_by(mask, grads)
    values, own = penalty.bind(*hyper, **options)
    chosen = keep(chosen, Term(penalty, (), values, tuple(own.items())).acts(chosen))
    downhill = tree_map(lambda g: -g.to(torch.complex128 if g.is_complex() else torch.float64), chosen)

    land = lambda strength: penalty.prox(downhill, strength, *hyper, **options)
    size = _largest(downhill).to(torch.float64).detach()
    return _with_derivatives(least_strength(size, lambda strength: _largest(land(strength))), land)


def _with_derivatives(least: Tensor, land: Callable[[Tensor], Params]) -> Tensor:
    """The least strength, as a function of all that the landing depends on.

    Just below it what lands is small and not zero: its length along its direction has the least strength as its root.
    Two of Newton's steps from a constant to a root have its first and second derivatives.
    """
    least = least.detach()
    root, below = torch.where((least > 0) & least.isfinite(), least, 1.0), 1 - 2.0**-26
    landed = land(root * below)
    if not any([x.requires_grad for x in tree_leaves(landed)]) and not (is_transformed() or has_tangents()):
        return least
    unit = _largest(landed).detach()
    direction = tree_map(lambda x: x.detach() / torch.where(unit > 0, unit, 1.0), landed)
    along = lambda x, d: (x.conj() * d).real if x.is_complex() else x * d
    length = lambda strength: total(reduce_leaves(along, land(strength), direction))
    for _ in range(2):  # At the root itself what lands is flat.
        slope, value = grad_and_value(length)(root * below)
        falls = slope < 0
        root = root * below - torch.where(falls, value / torch.where(falls, slope, -1.0), 0.0)
    return least + torch.where(least == 0, 0.0, root - root.detach())


def least_strength(size: Tensor, left: Callable[[Tensor], Tensor]) -> Tensor:
    """The least strength, exact to the last bit, that leaves nothing; infinite if there is none.

    Args:
        size: Tensor of float64, of how large gradients are: strengths go up to :math:`2^{200}` times as much.
        left: From a strength to how large what it leaves is.
    """
    limits = torch.finfo(size.dtype)
    known = torch.where(size.isnan(), torch.ones_like(size), size)  # A step is a number; what lands is NaN anyway.
    low, high = torch.full_like(size, limits.tiny), (known * 2.0**200).clamp(max=limits.max)
    vanish = lambda strength: left(strength) == 0
    reachable = vanish(high)
    if concrete(size) is not None and concrete(reachable) is not None:
        if not reachable:  # As of a total variation, which has no strength that makes zeros.
            return torch.where(size.isnan(), size, torch.inf)
        low, high = _along_lines(low, high, known, left)
    for _ in range(66):  # 12 halve the range of magnitudes until it is a factor of 2, 53 the numbers in that.
        if (found := concrete(high <= torch.nextafter(low, high))) is not None and found:
            break
        middle = torch.where(high > 2 * low, low.sqrt() * high.sqrt(), low + (high - low) / 2)
        gone = vanish(middle)
        low, high = torch.where(gone, low, middle), torch.where(gone, middle, high)
    least = torch.where(vanish(torch.zeros_like(size)), torch.zeros_like(size), high)
    return torch.where(reachable, least, torch.where(size.isnan(), size, torch.inf))


def _along_lines(low: Tensor, high: Tensor, size: Tensor, left: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A strength that leaves something and one that leaves nothing, nearer to each other where that is soon found.

    What is left falls along a line, or nearly, until there is nothing. The search goes to where the line through the
    last two points ends, or less far if that passes the end, until two lines end at one place; the end is then a few
    numbers away on either side.
    """
    before, value, at, end = torch.zeros_like(size), size, size, size
    share = 0.5  # How far to go where the end was passed: a little less first after a step along a line.
    for _ in range(20):
        found = left(at).to(size.dtype)
        if found == 0:
            high, at, share = at, before + share * (at - before), 0.5
            continue
        if not found < value:
            break
        end, last = at + found / (value - found) * (at - before), end
        low, before, value, at, share = at, at, found, end, 0.9375
        if (end - last).abs() < 2.0**-44 * end:
            break
    for width in (2.0**-51, 2.0**-48, 2.0**-44, 2.0**-40):
        for near in (end * (1 - width), end * (1 + width)):
            if low < near < high:
                low, high = (low, near) if left(near) == 0 else (near, high)
        if high < end * (1 + 2 * width) and low > end * (1 - 2 * width):
            break
    return low, high


def null_model(loss: Callable[[Params], Tensor], params: Params, mask: Mask, steps: int = 30) -> Params:
    r"""Parameters where a path of strengths begins: zero where a mask is True, and the rest fitted.

    The leaves that carry no penalty (an intercept, a bias) are moved to the minimum of the loss by Newton's method, so
    that `lambda_max` of the gradients there is the strength from which on all others are zero.

    Args:
        loss: From parameters to a scalar; smooth, and convex in the leaves that carry no penalty.
        params: A tree of tensors; those of the leaves that are fitted are the start.
        mask: Leaves on which the penalty acts; the others are fitted, and should have few entries in all: the second
            derivative is a matrix of them.
        steps: Number of Newton steps; the best of step sizes 1, 1/2, 1/4 ... is taken.

    Example:
        The mean of the targets is the intercept of a model without weights:

        >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1.0, 2.0, 6.0])
        >>> def loss(params):
        ...     return (x @ params["weight"] + params["bias"] - y).square().mean() / 2
        >>> start = null_model(loss, {"weight": torch.ones(1), "bias": torch.zeros(())}, mask=select("weight"))
        >>> start
        {'weight': tensor([0.]), 'bias': tensor(3.)}
        >>> lambda_max(torch.func.grad(loss)(start), l1, mask=select("weight"))
        tensor(1.6667, dtype=torch.float64)
    """
    check_params(params)
    bools = mask_leaves(mask, params)
    leaves, rebuild = flatten(params)
    free = [leaf for leaf, penalized in zip(leaves, bools, strict=True) if not penalized]
    sizes = [leaf.numel() for leaf in free]

    def model(point: Tensor) -> Params:
        found = iter(point.split(sizes))
        return rebuild(
            [
                torch.zeros_like(leaf) if penalized else next(found).reshape(leaf.shape).to(leaf.dtype)
                for leaf, penalized in zip(leaves, bools, strict=True)
            ]
        )

    if not sum(sizes):
        return tree_map(lambda w: torch.zeros_like(w), params) if not free else model(free[0].reshape(-1))
    point = torch.cat([leaf.reshape(-1) for leaf in free])
    objective = lambda point: loss(model(point))
    # Zero at last: whatever the loss does, no step makes it worse.
    reaches = torch.cat([0.5 ** torch.arange(20, device=point.device), torch.zeros(1, device=point.device)]).to(point)
    idle = 0
    for _ in range(steps):
        # Of least norm, where the minimum is not unique: biases of all classes may move together.
        direction = torch.linalg.pinv(jacrev(grad(objective))(point), hermitian=True) @ grad(objective)(point)
        candidates = point - reaches[:, None] * direction
        losses = vmap(objective)(candidates)
        losses = torch.where(losses.isnan(), torch.inf, losses)
        best = losses.argmin()
        point = candidates.index_select(0, best[None])[0]
        lower = concrete(losses.amin() < losses[-1])
        idle = idle + 1 if isinstance(lower, Tensor) and not bool(lower) else 0
        if idle == 2:  # The first of them may still bring the gradient nearer to 0.
            break
    return model(point)


#: Losses, means over samples: half the squared distance, and the logistic loss of targets from 0 to 1.
Loss = Literal["squared", "logistic"]


def _squared(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    distance = outputs - targets
    return distance, lambda share: (1 - share).square() * distance.square() / 2


def _logistic(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    guesses = outputs.sigmoid()
    # The loss of other targets, such as -1, has no minimum to be near to.
    targets = torch.where((targets < 0) | (targets > 1), math.nan, targets)

    def divergence(share: Tensor) -> Tensor:
        mixed = share * guesses + (1 - share) * targets
        entropy = torch.xlogy(mixed, mixed) + torch.xlogy(1 - mixed, 1 - mixed)
        return entropy + softplus(outputs) - mixed * outputs

    return guesses - targets, divergence


def duality_gap(
    predict: Callable[[Params], Tensor],
    params: Params,
    targets: Tensor,
    penalty: Penalty,
    *hyper: Hyper,
    strength: Scalar = 1.0,
    loss: Loss = "squared",
    **options: Any,
) -> Tensor:
    r"""Bound on how far :math:`f + \lambda g` is from its minimum, for a linear model; 0 at the solution.

    With the gradient of the loss, scaled until it is feasible, as the point of the dual problem, as scikit-learn does:
    for the same problem this is its `dual_gap_`.

    Args:
        predict: From parameters to outputs, samples first: linear in the parameters, but for a constant. Fit an
            intercept first, or centre the samples, and leave it out of `params`.
        params: Parameters; all of them carry the penalty.
        targets: Tensor like the outputs.
        penalty: A norm such as `l1` or `group_lasso`, or a sum of such with ridges, as `elastic` is.
        hyper: Its hyperparameters.
        strength: :math:`\lambda`: number above 0, or 0-dim tensor.
        loss: `"squared"`, half the squared distance, or `"logistic"`, the binary cross-entropy of logits and of targets
            from 0 to 1 (others, such as -1, give NaN); both summed over the outputs of a sample, and averaged over
            samples.
        options: Static options of the penalty, such as `dim`.

    Raises:
        ValueError: The penalty is not a sum of norms and ridges, has no norm in it, or no norm acts on some of the
            parameters.

    Shape:
        A 0-dim tensor.

    Example:
        >>> x, y = torch.eye(2), torch.tensor([3.0, 0.5])
        >>> def predict(params):
        ...     return x @ params["w"]
        >>> duality_gap(predict, {"w": torch.tensor([1.0, 0.0])}, y, l1, strength=0.5)
        tensor(0.2656)
        >>> duality_gap(predict, {"w": torch.tensor([2.0, 0.0])}, y, l1, strength=0.5)
        tensor(0.)

    References:
        Kim, Koh, Lustig, Boyd & Gorinevsky, *An interior-point method for large-scale l1-regularized least squares*,
        2007.
    """
    nonnegative(strength=strength)
    check_penalty(penalty, hyper, options)
    check_params(params)
    if loss not in _LOSSES:
        raise ValueError(f"loss is {loss!r}; expected one of {', '.join(map(repr, _LOSSES))}")
    values, options = penalty.bind(*hyper, **options)
    smooth, norms = split([Term(penalty, (strength,), values, tuple(options.items()))])
    other = [term.penalty.__name__ for term in norms if not term.penalty.structure.needs]
    if other or not norms:
        raise ValueError(
            f"duality_gap of {penalty.__name__}: expected norms such as l1 and group_lasso, and ridges added to them"
            + (f"; {other[0]} is neither" if other else "; there is no norm in it")
        )
    outputs, pull_back = vjp(predict, params)[:2]
    if outputs.shape != targets.shape:
        raise ValueError(f"targets have shape {tuple(targets.shape)}; expected {tuple(outputs.shape)}, as predicted")
    charged = Sum(tuple(norms))
    _check_charged(penalty, Term(charged, (), (), ()).acts(params), params)
    slopes, divergence = _LOSSES[loss](outputs, targets)
    samples = max(outputs.shape[0], 1) if outputs.ndim else 1
    grads: Params = pull_back(slopes / samples)[0]
    for term in smooth:
        grads = compute(lambda g, s: g + s, grads, term.grad(params))
    size = lambda_max(grads, charged)
    _check_feasible(penalty, size, grads)
    share = (1 / size).clamp(max=1.0)  # Of the gradient that is feasible in the dual problem; all of it at a solution.
    along = total(reduce_leaves(lambda g, w: g * w, grads, params))
    ridges = total([term.value(params) for term in smooth]) * (1 - share).square()
    gap = divergence(share).sum() / samples + ridges + share * along + charged(params)
    return gap.to(along.dtype)


def _check_charged(penalty: Penalty, acts: list[bool], params: Params) -> None:
    """Raise an error if no norm acts on a leaf: its gradient would have to be 0 in the dual problem."""
    free = [path for path, charged in zip(tree_paths(params), acts, strict=True) if not charged]
    if free:
        raise ValueError(
            f"duality_gap of {penalty.__name__}: no norm acts on leaf '{free[0]}'; expected parameters that all carry "
            "one. Fit an intercept first, make it a constant of predict, and leave it out of params."
        )


def _check_feasible(penalty: Penalty, size: Tensor, grads: Params) -> None:
    """Raise an error if no multiple of a gradient is feasible in the dual problem, as far as numbers are known."""
    known = concrete(size)
    if isinstance(known, Tensor) and known == math.inf and all([bool(g.isfinite().all()) for g in tree_leaves(grads)]):
        raise ValueError(
            f"duality_gap of {penalty.__name__}: expected norms, which are 0 at zero alone. This one charges nothing "
            "for some parameters that are not zero (a weight of 0, constants in a total variation), along which no "
            "multiple of the gradient is feasible in the dual problem. kkt_residual certifies its solutions."
        )


_LOSSES = {"squared": _squared, "logistic": _logistic}


def sparsity(params: Params | nn.Module, mask: Mask | None = None) -> Tensor:
    r"""The share of entries that are exactly zero, from 0 to 1.

    Args:
        params: A tree of tensors, or a module: its parameters, where it is pruned or parametrized the weights
            that it computes with.
        mask: Leaves that are counted; by default all.

    Shape:
        A 0-dim tensor.

    Example:
        >>> sparsity({"weight": torch.tensor([0.0, 2.0, 0.0]), "bias": torch.tensor([1.0])})
        tensor(0.5000)
    """
    params = computed_parameters(params)
    check_params(params)
    leaves = tree_leaves(kept_by(mask, params))
    entries = sum(leaf.numel() for leaf in leaves)
    zeros = [count.to(leaves[0].device) for count in reduce_leaves(lambda w: w == 0, leaves)]
    return torch.stack(zeros).sum() / entries if entries else torch.zeros(())
