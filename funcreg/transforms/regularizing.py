"""Penalties meet transforms: the gradient of a penalty added to updates, or its proximal operator after the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Params, Schedule, Updates
from funcreg.core.construction import remembered, written
from funcreg.core.leafwise import compute, compute_wide
from funcreg.core.ranges import ordered
from funcreg.core.wording import type_of
from funcreg.regularizers.constraint import Constraint
from funcreg.regularizers.penalties import half_l2, l1
from funcreg.regularizers.penalty import Penalty, Sum
from funcreg.transforms.combine import masked
from funcreg.transforms.factory_checks import check_selection, finite_nonnegative, nonnegative
from funcreg.transforms.transform import Stage, Transform, memoryless, scheduled


def where_masked(mask: Mask | None, tx: Transform) -> Transform:
    """A transform on the leaves of a mask, on all without one."""
    return tx if mask is None else masked(tx, mask)


def check_penalty(
    penalty: Penalty, hyper: tuple[Hyper, ...], options: dict[str, Any]
) -> tuple[tuple[Hyper, ...], dict[str, Any]]:
    """Hyperparameters in their order, also those given by name, and static options, or an error before the first step.

    What is given by name may be a schedule or a tree, too.
    """
    if not isinstance(penalty, Penalty):
        shown = isinstance(penalty, (dict, list, tuple, Tensor, torch.nn.Module, torch.optim.Optimizer))
        what = type_of(penalty) if shown else repr(penalty)
        hint = ". Is it a value? Give the penalty itself, l1 and not l1(params)" if isinstance(penalty, Tensor) else ""
        raise TypeError(f"penalty is {what}; expected a Penalty such as l1, or one made with @penalty{hint}")
    return penalty.bind(*hyper, **options)


def projects(penalty: Penalty) -> bool:
    """Whether a penalty is a constraint, or made of nothing else."""
    if not isinstance(penalty, Sum):
        return isinstance(penalty, Constraint)
    return all([projects(term.penalty) for term in penalty.terms])


def check_strength(penalty: Penalty, strength: Hyper | Schedule) -> None:
    """Raise an error for a strength that is none, and for one that a constraint would not see."""
    nonnegative(strength=strength)
    is_default = isinstance(strength, (int, float)) and strength == 1
    if projects(penalty) and not is_default:
        raise ValueError(f"{written(penalty)} is a constraint, and holds whatever its strength; expected no strength=")


def check_gradient(penalty: Penalty) -> None:
    """Raise a TypeError for a penalty whose gradient is 0 everywhere: descent along it would do nothing."""
    if not penalty.has_gradient:
        remedy = "project" if projects(penalty) else "proximal or prox_sgd"
        raise TypeError(
            f"penalty is the {penalty.kind} {penalty.__name__}, whose gradient is 0 everywhere, or that of a term is; "
            f"adding it would do nothing. Use {remedy}, which applies its proximal operator."
        )


@remembered
def add_decayed_weights(weight_decay: Hyper | Schedule = 0.0, mask: Mask | None = None) -> Transform:
    r"""Add :math:`\lambda w` to updates, the gradient of :math:`\frac{\lambda}{2} \|w\|_2^2`.

    Before `scale_by_adam` this is L2 regularization, as in `torch.optim.Adam(weight_decay=...)`; between it and
    `scale_by_learning_rate`, the weight decay of AdamW. A decay that the learning rate does not scale is
    `proximal(half_l2, weight_decay)` at the end of a chain.

    Args:
        weight_decay: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        mask: Leaves to which it applies; True means apply.

    Example:
        >>> params = {"weight": torch.tensor([1.0, -2.0])}
        >>> tx = add_decayed_weights(0.1)
        >>> tx.update({"weight": torch.zeros(2)}, tx.init(params), params)[0]
        {'weight': tensor([ 0.1000, -0.2000])}

    References:
        Krogh & Hertz, *A simple weight decay can improve generalization*, 1991.
        Loshchilov & Hutter, *Decoupled weight decay regularization*, 2019.
    """
    finite_nonnegative(weight_decay=weight_decay)
    return add_penalty(half_l2, strength=weight_decay, mask=mask)


@remembered
def add_penalty(
    penalty: Penalty,
    *hyper: Hyper | Schedule,
    strength: Hyper | Schedule = 1.0,
    mask: Mask | None = None,
    **options: Any,
) -> Transform:
    r"""Add the gradient of a penalty to updates, :math:`u' = u + \lambda \nabla g(w)`.

    The same as a penalty in the loss, without its value and its part of the backward pass. With `l1` it gives no
    exact zeros: the sign of a weight pulls it to both sides of zero in turn. For zeros use `proximal` or `prox_sgd`.

    Args:
        penalty: A penalty such as `l1`.
        hyper: Its hyperparameters: numbers, tensors, schedules or trees.
        strength: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        mask: Leaves on which the penalty acts; True means apply.
        options: Its static options, such as `dim`.

    Example:
        >>> params = {"weight": torch.tensor([1.0, -2.0])}
        >>> tx = add_penalty(l1, strength=0.1)
        >>> tx.update({"weight": torch.zeros(2)}, tx.init(params), params)[0]
        {'weight': tensor([ 0.1000, -0.1000])}
    """
    finite_nonnegative(strength=strength)
    check_selection(mask)
    hyper, options = check_penalty(penalty, hyper, options)
    check_gradient(penalty)

    def rule(updates: Updates, params: Params, strength: Hyper, *values: Hyper) -> Updates:
        slopes = penalty.grad(params, *values, **options)
        own = penalty.weigh(params, strength, *values, **options)
        return compute(lambda u, g, s: u + s * g, updates, slopes, hyper=(own,))

    return where_masked(mask, scheduled(rule, strength, *hyper, stages=["adds"]))


@remembered
def proximal(
    penalty: Penalty, step: Hyper | Schedule, *hyper: Hyper | Schedule, mask: Mask | None = None, **options: Any
) -> Transform:
    r"""Apply a proximal operator after the step, :math:`u' = \operatorname{prox}_{\text{step} \cdot g}(w + u) - w`.

    It goes last in a chain: what changes updates after it loses the zeros it made. The step is the strength of
    the penalty times the learning rate; under a learning-rate schedule, momentum or Adam it has to follow them,
    which `prox_sgd` and `prox_adam` see to.

    Args:
        penalty: A penalty such as `l1`.
        step: Number of at least 0, tensor, schedule, or a tree of them like the parameters.
        hyper: Hyperparameters of the penalty.
        mask: Leaves on which the penalty acts; True means apply.
        options: Static options of the penalty, such as `dim`.

    Example:
        >>> params = {"weight": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}
        >>> tx = chain(scale(-0.1), proximal(group_lasso, 1.0))
        >>> updates, state = tx.update({"weight": torch.zeros(2, 2)}, tx.init(params), params)
        >>> apply_updates(params, updates)
        {'weight': tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])}

    References:
        Parikh & Boyd, *Proximal algorithms*, 2014.
    """
    nonnegative(step=step)
    check_selection(mask)
    hyper, options = check_penalty(penalty, hyper, options)

    def rule(updates: Updates, params: Params, step: Hyper, *values: Hyper) -> Updates:
        reached = compute_wide(lambda w, u: w + u, params, updates)
        landed = penalty.prox(reached, step, *values, **options)
        # In the dtype of the parameters, or w + (0 - w) would not be 0.
        return compute(lambda w, z: z - w, params, landed)

    # A projection has nothing to do where it was.
    stages: list[Stage] = ["lands"] if projects(penalty) else ["lands", "shrinks"]
    return where_masked(mask, scheduled(rule, step, *hyper, stages=stages))


@remembered
def soft_threshold(threshold: Hyper | Schedule, mask: Mask | None = None) -> Transform:
    r"""Move parameters, after the step, towards zero by a threshold, and to exactly 0 those that would pass it.

    This is `proximal(l1, threshold)`: the raw operator, the same at every step. With plain gradient steps of size
    :math:`\eta` it solves the lasso of strength `threshold` / :math:`\eta`. With momentum, Adam or a learning rate
    that changes it solves another problem; `prox_sgd` and `prox_adam` scale it as they must.

    Args:
        threshold: Number of at least 0, tensor, schedule, or a tree of them like the parameters.
        mask: Leaves to which it applies; True means apply.

    Example:
        >>> params = {"weight": torch.tensor([1.0, -0.2])}
        >>> tx = soft_threshold(0.5)
        >>> updates, state = tx.update({"weight": torch.zeros(2)}, tx.init(params), params)
        >>> apply_updates(params, updates)
        {'weight': tensor([0.5000, 0.0000])}

    References:
        Donoho, *De-noising by soft-thresholding*, 1995.
    """
    nonnegative(threshold=threshold)
    return proximal(l1, threshold, mask=mask)


@remembered
def project(constraint: Penalty, *hyper: Hyper | Schedule, mask: Mask | None = None, **options: Any) -> Transform:
    r"""Keep parameters in a set, :math:`u' = P_C(w + u) - w`.

    It goes last in a chain: after it, parameters lie in the set, to the rounding of one addition. With plain gradient
    steps this is projected gradient descent, and minimizes over the set. After Adam and its variants it does so only
    where each entry is bounded by itself, as by `box`; for other sets `prox_adam` projects in the metric of the steps.

    Args:
        constraint: A constraint such as `simplex`, also one with its numbers, `box.given(0.0, 1.0)`, or a sum of such.
        hyper: Its hyperparameters: numbers, tensors, schedules or trees.
        mask: Leaves on which the constraint acts; True means apply.
        options: Its static options, such as `dim`.

    Example:
        >>> params = {"weight": torch.tensor([1.0, 0.5])}
        >>> tx = chain(scale(-1.0), project(l2_ball, 1.0))
        >>> updates, state = tx.update({"weight": torch.tensor([-2.0, -3.5])}, tx.init(params), params)
        >>> apply_updates(params, updates)
        {'weight': tensor([0.6000, 0.8000])}

    References:
        Goldstein, *Convex programming in Hilbert space*, 1964.
    """
    if not isinstance(constraint, Penalty) or not projects(constraint):
        raise TypeError(f"constraint is {constraint!r}; expected one such as simplex. For a penalty use proximal.")
    return proximal(constraint, 0.0, *hyper, mask=mask, **options)


@remembered
def keep_params_nonnegative() -> Transform:
    r"""Stop at zero each parameter that a step would make negative, :math:`u' = \max(w + u, 0) - w`.

    Example:
        >>> params = {"weight": torch.tensor([1.0, 1.0])}
        >>> keep_params_nonnegative().update({"weight": torch.tensor([-3.0, 1.0])}, EmptyState(), params)
        ({'weight': tensor([-1.,  1.])}, EmptyState())
    """

    def rule(updates: Updates, params: Params) -> Updates:
        # In the dtype of the parameters, or w + (-w) would not be 0.
        return compute(lambda w, u: torch.where(ordered(w) + u < 0, -w, u), params, updates)

    return memoryless(rule, stages=["lands"])
