"""Paths of solutions, one for each of some strengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from funcreg.core._typing import Hyper, Mask, Params
from funcreg.core.inputs import as_tensors, check_call, check_names, explained
from funcreg.core.summaries import path_line, path_text
from funcreg.core.tree import tree_map
from funcreg.regularizers.penalty import Penalty
from funcreg.solvers.certificates import sparsity
from funcreg.solvers.minimize import Problem, Solution
from funcreg.solvers.strengths import NAMED_ELSEWHERE, begun, how_many, is_quadratic, solve_several
from funcreg.transforms.transform import public_state


@public_state
class Path(NamedTuple):
    """Solutions from the greatest strength to the least, or in the order of `strengths=`; see `regularization_path`.

    Example:
        >>> path = regularization_path(lambda w: (w - 1).square().sum() / 2, torch.zeros(2), l1, count=3, ratio=0.25)
        >>> path.strengths, path.params
        (tensor([1.0000, 0.5000, 0.2500]), tensor([[0.0000, 0.0000],
                [0.5000, 0.5000],
                [0.7500, 0.7500]]))
    """

    strengths: Tensor
    params: Params  # Stacked along a first dimension.
    losses: Tensor  # Without the penalty.
    residuals: Tensor  # Those of `minimize`.
    sparsity: Tensor  # Shares of exact zeros on the leaves of the mask.
    steps: Tensor
    converged: Tensor

    def __repr__(self) -> str:
        return path_line(self)

    def __str__(self) -> str:
        return path_text(self)


def regularization_path(
    loss: Callable[..., Tensor],
    params: Params,
    penalty: Penalty,
    *hyper: Hyper,
    strengths: Tensor | Sequence[float] | None = None,
    count: int = 100,
    ratio: float = 1e-3,
    args: tuple[Any, ...] = (),
    mask: Mask | None = None,
    tol: float | None = None,
    max_steps: int = 10_000,
    compile: bool | str | Callable[..., Any] = False,
    **options: Any,
) -> Path:
    r"""Solutions of :math:`f + \lambda g` for many strengths, from the one on that makes all zero down.

    Strengths fall geometrically from `lambda_max`, at the loss's minimum over what carries no penalty. Some at a time
    are solved as one ensemble, from the last solution before them, whose zeros are most of those to come.

    With a penalty that is not convex, the greatest strength is that from which on the first proximal step of `minimize`
    leaves all at zero, and solutions are what `minimize` finds, not always minima.

    Args:
        loss: `loss(params, *args)`, a scalar with a first and second derivative.
        params: Parameters like those wanted; those without a penalty are where their fit begins. Where the loss has no
            value at zeros, as that of a precision matrix, `strengths` are solved from here on.
        penalty: A penalty :math:`g`. The strengths multiply it, also `elastic.given(1.0, 0.5)`.
        hyper: Its hyperparameters.
        strengths: Numbers of at least 0, solved in falling order and given back in their own; by default `count` of
            them are found.
        count: Number of strengths, at least 1.
        ratio: The least strength as a share of the greatest, above 0 and below 1.
        args: What else the loss takes: trees of tensors.
        mask: Leaves on which the penalty acts.
        tol: Greatest `kkt_residual` of a solution; by default that of `minimize`, in units of the gradient
            at zero where that is far from 1.
        max_steps: Steps for each strength after which to give up.
        compile: Whether to compile steps, for calls to come; or a backend of `torch.compile`: see `minimize`.
        options: Static options of the penalty, such as `dim`.

    Raises:
        ValueError: The penalty makes no zeros, so that no strength is the greatest, and no strengths were given.

    Example:
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> y = torch.tensor([2.0, 1.0], dtype=torch.float64)
        >>> def loss(w, x, y):
        ...     return (x @ w - y).square().sum() / 2
        >>> regularization_path(loss, torch.zeros_like(y), l1, strengths=[1.5, 0.5], args=(x, y)).params
        tensor([[0.5000, 0.0000],
                [1.5000, 0.5000]], dtype=torch.float64)

    References:
        Friedman, Hastie & Tibshirani, *Regularization paths for generalized linear models via coordinate
        descent*, 2010.
    """
    check_names(
        "regularization_path", options, {**NAMED_ELSEWHERE, "data": "what the loss takes after params are its args="}
    )
    problem = Problem(explained(loss), penalty, hyper, mask, tol, max_steps, options, compile)
    problem.check(params, 1.0, args)
    check_call(loss, args)
    args = as_tensors(args, "args", params)
    objective = lambda point: problem.loss(point, *args)
    problem, falling, order, start = begun("regularization_path", problem, args, params, strengths, count, ratio)
    problem = replace(problem, quadratic=is_quadratic(objective, start))
    found: list[Solution] = []
    done = 0
    while done < len(falling):
        some = falling[done : done + how_many(falling, done, start, args, problem)]
        found.append(solve_several(problem, start, args, some))
        start, done = tree_map(lambda w: w[-1], found[-1].params), done + len(some)
    whole = tree_map(lambda *parts: torch.cat(parts).index_select(0, order), *found)
    losses = vmap(objective)(whole.params)
    zeros = vmap(lambda point: sparsity(point, mask))(whole.params)
    strengths = falling.index_select(0, order)
    return Path(strengths, whole.params, losses, whole.residual, zeros, whole.steps, whole.converged)
