"""The choice of a strength by cross-validation."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor
from torch.func import vmap

from funcreg.core._typing import Hyper, Mask, Params
from funcreg.core.inputs import as_data, check_call, check_names, explained
from funcreg.core.notices import warn_user
from funcreg.core.summaries import choice_line, choice_text
from funcreg.core.tree import tree_leaves, tree_map
from funcreg.regularizers.penalty import Penalty
from funcreg.solvers.minimize import Problem
from funcreg.solvers.strengths import NAMED_ELSEWHERE, begun, how_many, is_convex, is_quadratic, solve_several
from funcreg.transforms.transform import public_state


@public_state
class CrossValidation(NamedTuple):
    """What `cross_validate` found.

    Example:
        >>> x = torch.eye(4, dtype=torch.float64)
        >>> def loss(w, x, y):
        ...     return (x @ w - y).square().mean() / 2
        >>> cross_validate(loss, x[0], l1, data=(x, x[:, 0]), folds=2, strengths=[0.5, 0.1]).scores.shape
        torch.Size([2, 2])
    """

    strengths: Tensor  # Falling.
    scores: Tensor  # The loss on what was held out, a row for each fold.
    mean: Tensor  # Over folds.
    standard_error: Tensor
    best: Tensor  # The strength of the least mean.
    one_standard_error: Tensor  # The greatest whose mean is within one standard error of it.
    params: Params  # Fitted to all data with the best strength.
    converged: Tensor  # For each score, whether its fit has.

    def __repr__(self) -> str:
        return choice_line(self)

    def __str__(self) -> str:
        return choice_text(self)


def cross_validate(
    loss: Callable[..., Tensor],
    params: Params,
    penalty: Penalty,
    *hyper: Hyper,
    data: tuple[Any, ...],
    folds: SupportsIndex | Iterable[Any] = 5,
    strengths: Tensor | Sequence[float] | None = None,
    count: int = 100,
    ratio: float = 1e-3,
    mask: Mask | None = None,
    tol: float | None = None,
    max_steps: int = 10_000,
    compile: bool | str | Callable[..., Any] = False,
    **options: Any,
) -> CrossValidation:
    r"""Choose a strength by the loss on held-out samples; all folds and some strengths at a time in one ensemble.

    Args:
        loss: `loss(params, *data)`, a mean over samples.
        params: Parameters like those wanted.
        penalty: A penalty :math:`g`.
        hyper: Its hyperparameters.
        data: Tensors, or trees of them, with one entry a sample along the first dimension.
        folds: Number of folds, at least 2: consecutive samples, as scikit-learn's `KFold`. Or, for each fold, the
            places of the samples that are held out, a mask of them, or a pair (fitted, held out) of places.
        strengths: Numbers of at least 0; by default those of `regularization_path` on all data.
        count: Number of strengths.
        ratio: The least strength as a share of the greatest.
        mask: Leaves on which the penalty acts.
        tol: Greatest `kkt_residual` of a solution; by default that of `minimize`, in units of the gradient
            at zero where that is far from 1.
        max_steps: Steps for each strength after which to give up.
        compile: Whether to compile steps, for calls to come; or a backend of `torch.compile`: see `minimize`.
        options: Static options of the penalty.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(40, 5, dtype=torch.float64, generator=generator)
        >>> y = x[:, 0] + 0.1 * torch.randn(40, dtype=torch.float64, generator=generator)
        >>> def loss(w, x, y):
        ...     return (x @ w - y).square().mean() / 2
        >>> found = cross_validate(loss, torch.zeros(5, dtype=torch.float64), l1, data=(x, y), count=20)
        >>> found.params != 0
        tensor([ True, False, False, False, False])
    """
    check_names(
        "cross_validate", options, {**NAMED_ELSEWHERE, "args": "what the loss takes after params are its data="}
    )
    problem = Problem(explained(loss), penalty, hyper, mask, tol, max_steps, options, compile)
    problem.check(params, 1.0, ())
    data = as_data(data, params)
    check_call(loss, data)
    held_out = _folds(folds, len(tree_leaves(data)[0]), tree_leaves(data)[0].device)
    problem, falling, _, start = begun("cross_validate", problem, data, params, strengths, count, ratio)
    scores = torch.empty(len(held_out), len(falling), dtype=falling.dtype, device=falling.device)
    converged, near = torch.empty_like(scores, dtype=torch.bool), start
    for size in {(len(tests), len(trains)) for tests, trains in held_out}:  # Folds of one size are one ensemble.
        which = [i for i, (tests, trains) in enumerate(held_out) if (len(tests), len(trains)) == size]
        tests, trains = (torch.stack([held_out[i][k] for i in which]) for k in (0, 1))
        scores[which], converged[which], near = _scores(problem, start, data, tests, trains, falling)
    mean = scores.mean(0)
    if not bool(mean.isfinite().all()):
        raise ValueError(
            f"the loss on held-out samples is {float(mean[~mean.isfinite()][0])} for some strengths; expected finite "
            "numbers. Are there such in data?"
        )
    if not bool(converged.all()):
        warn_user(
            f"cross_validate: {int((~converged).sum())} of {converged.numel()} fits have not converged; see "
            "`converged`. A greater tol or max_steps may help, or columns of mean 0 and equal scale.",
        )
    error = scores.std(0) / len(held_out) ** 0.5
    least = int(mean.argmin())
    simplest = int((mean <= mean[least] + error[least]).int().argmax())
    if is_convex(problem):  # Else the result depends on where it begins.
        start = tree_map(lambda w: w[least], near)
    fitted = problem.solve(start, falling[least], data).params
    return CrossValidation(falling, scores, mean, error, falling[least], falling[simplest], fitted, converged)


def _folds(folds: SupportsIndex | Iterable[Any], samples: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For each fold the places of samples that are held out, and of the others."""
    if isinstance(folds, SupportsIndex) and not getattr(folds, "ndim", 0):  # Arrays have an index, too.
        count = operator.index(folds)
        if isinstance(folds, bool) or not 2 <= count <= samples:
            raise ValueError(f"folds is {folds!r}; expected a whole number from 2 to the number of samples, {samples}")
        given: list[Any] = list(torch.arange(samples).tensor_split(count))
    elif isinstance(folds, Iterable) and not isinstance(folds, (str, bytes)):
        given = list(folds)
    else:
        hint = ". Of scikit-learn it is folds.split(x, y)" if hasattr(folds, "split") else ""
        raise TypeError(
            f"folds is {folds!r}; expected a whole number, or for each fold the places that it holds out{hint}"
        )
    if len(given) < 2:
        raise ValueError(f"folds are {len(given)}; expected at least 2, or there is no standard error")
    found = []
    for k, fold in enumerate(given):
        pair = isinstance(fold, tuple) and len(fold) == 2  # Of scikit-learn: samples to fit, and samples held out.
        tests = _places(fold[1] if pair else fold, k, samples)
        trains = _places(fold[0], k, samples) if pair else (~_held(tests, samples)).nonzero()[:, 0]
        if not len(trains) or bool((_held(tests, samples) & _held(trains, samples)).any()):
            raise ValueError(f"fold {k} holds out all samples, or some that it fits")
        found.append((tests.to(device), trains.to(device)))
    return found


def _held(places: Tensor, samples: int) -> Tensor:
    return torch.zeros(samples, dtype=torch.bool, device="cpu").index_fill(0, places, True)


def _places(fold: Any, number: int, samples: int) -> Tensor:
    """The places of the samples in a fold, given as such or as a mask."""
    places = torch.as_tensor(fold).cpu()
    if places.dtype == torch.bool and places.shape == (samples,):
        return places.nonzero()[:, 0]
    whole = not places.is_floating_point() and not places.is_complex() and places.dtype != torch.bool
    if places.ndim != 1 or not whole or not len(places) or int(places.min()) < 0 or int(places.max()) >= samples:
        raise ValueError(
            f"fold {number} is {str(fold)[:60]}; expected the places of the samples that it holds out, from 0 to "
            f"{samples - 1}, a mask of them, or a pair (fitted, held out) as scikit-learn's split gives"
        )
    return places.to(torch.int64)


def _scores(
    problem: Problem, start: Params, data: Any, tests: Tensor, trains: Tensor, strengths: Tensor
) -> tuple[Tensor, Tensor, Params]:
    """The loss on held-out samples, for some folds of one size and all strengths; whether fits have converged; and the
    solutions of one of the folds."""
    rows = lambda places: tree_map(lambda x: x[places], data)
    training, testing = rows(trains), rows(tests)
    begin = tree_map(lambda w: w.expand(len(tests), *w.shape), start)

    def of_fold(begin: Params, training: Any, testing: Any, some: Tensor) -> tuple[Tensor, Tensor, Params]:
        found = solve_several(problem, begin, training, some)
        # One after the other: mapped over maps, `mse_loss` and others of torch fail on targets that a map shares.
        losses = [problem.loss(tree_map(lambda w, k=k: w[k], found.params), *testing) for k in range(len(some))]
        return torch.stack(losses), found.converged, found.params

    columns, converged, solutions, done = [], [], [], 0
    problem = replace(problem, quadratic=is_quadratic(lambda point: problem.loss(point, *data), start))
    while done < len(strengths):
        some = strengths[done : done + how_many(strengths, done, begin, data, problem, len(tests))]
        losses, ended, found = vmap(of_fold, in_dims=(0, 0, 0, None))(begin, training, testing, some)
        begin, done = tree_map(lambda w: w[:, -1], found), done + len(some)
        columns.append(losses)
        converged.append(ended)
        solutions.append(tree_map(lambda w: w[0], found))
    whole = tree_map(lambda *parts: torch.cat(parts), *solutions)
    return torch.cat(columns, 1).to(strengths.dtype), torch.cat(converged, 1), whole
