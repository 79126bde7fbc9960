"""Paths of strengths, and the choice of one by cross-validation."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor
from torch.func import grad, vmap

from funcreg._typing import Hyper, Mask, Params
from funcreg.certificates import lambda_max, least_strength, null_model, sparsity
from funcreg.composition import Term
from funcreg.constraint import Constraint
from funcreg.inputs import LinAlgError, as_data, as_tensors, check_call, check_names, explained, first_line
from funcreg.leafwise import check_has_numbers, wide
from funcreg.minimize import Problem, Solution
from funcreg.notices import warn_user
from funcreg.penalty import Penalty, Sum
from funcreg.proximal_newton import SMALL
from funcreg.ranges import check_range, number
from funcreg.summaries import choice_line, choice_text, path_line, path_text
from funcreg.transform import public_state
from funcreg.tree import flatten, tree_leaves, tree_map
from funcreg.undocumented import is_batched, without_levels

#: What others call what is called otherwise here.
_ELSEWHERE = {
    "strength": "it chooses from many, and strengths= gives those; minimize solves for one",
    "alphas": "strengths= gives them",
    "lambdas": "strengths= gives them",
    "cv": "folds= gives their number, or the places that each holds out",
}
#: Strengths that are solved at once, of a quadratic loss however far apart they are.
_TOGETHER = 5
#: Shares of the strength before, down to which others are solved with it: of few entries, and of many.
_NEAR, _NEAR_LARGE = 0.2, 0.5
#: Entries of the Hessians of all that are solved at once, and products of their entries and the samples.
_ENTRIES, _TERMS = 2**18, 2**26


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
        "regularization_path", options, {**_ELSEWHERE, "data": "what the loss takes after params are its args="}
    )
    problem = Problem(explained(loss), penalty, hyper, mask, tol, max_steps, options, compile)
    problem.check(params, 1.0, args)
    check_call(loss, args)
    args = as_tensors(args, "args", params)
    objective = lambda point: problem.loss(point, *args)
    _check_strengths("regularization_path", problem, objective, params, strengths)
    free = _free(problem, params)
    start = _start(objective, params, free, strengths)
    falling, order = _strengths(strengths, count, ratio, problem, args, params, start, free)
    problem = _in_units(problem, args, params, start, free)
    problem = replace(problem, quadratic=_is_quadratic(objective, start))
    found: list[Solution] = []
    done = 0
    while done < len(falling):
        some = falling[done : done + _count(falling, done, start, args, problem)]
        found.append(_solved(problem, start, args, some))
        start, done = tree_map(lambda w: w[-1], found[-1].params), done + len(some)
    whole = tree_map(lambda *parts: torch.cat(parts).index_select(0, order), *found)
    losses = vmap(objective)(whole.params)
    zeros = vmap(lambda point: sparsity(point, mask))(whole.params)
    strengths = falling.index_select(0, order)
    return Path(strengths, whole.params, losses, whole.residual, zeros, whole.steps, whole.converged)


def _check_strengths(
    call: str, problem: Problem, objective: Callable[[Params], Tensor], params: Params, strengths: Any
) -> None:
    """Raise an error where there is no choice of strengths: for constraints, without penalized leaves, under `vmap`."""
    if isinstance(problem.penalty, Constraint):
        raise ValueError(f"{problem.penalty!r} is the same for all strengths; minimize finds the one solution")
    if not any(_penalized(problem, params)):
        raise ValueError(
            f"{problem.penalty!r} acts on no leaf, so that all strengths have one solution; is mask right?"
        )
    seen = [objective(params), *tree_leaves([strengths, *problem.hyper])]
    if any([isinstance(x, Tensor) and is_batched(without_levels(x)) for x in seen]):
        raise TypeError(
            f"{call} was called inside of vmap, where the numbers by which it chooses strengths and entries cannot be "
            "read. Map minimize over strengths or data, or call it once for each member."
        )


def _penalized(problem: Problem, params: Params) -> list[bool]:
    values, options = problem.penalty.bind(*problem.hyper, **problem.options)
    return Term(problem.penalty, (), values, tuple(options.items()), problem.mask).acts(params)


def _free(problem: Problem, params: Params) -> list[Tensor]:
    """For each leaf which entries carry no penalty: all where it does not act, and those whose weight is 0."""
    leaves, rebuild = flatten(params)
    acts = _penalized(problem, params)
    if not isinstance(problem.penalty, Sum):  # What has no weights acts on all entries of a leaf.
        return [torch.full_like(w, not here, dtype=torch.bool) for w, here in zip(leaves, acts, strict=True)]
    # A penalty that makes zeros takes small entries to 0, and one that does not makes them smaller.
    signs = [1 - 2 * (torch.arange(w.numel(), device=w.device) % 2).reshape(w.shape) for w in leaves]
    small = [1e-6 * sign.to(wide(w.dtype)) for w, sign in zip(leaves, signs, strict=True)]
    landed = problem.penalty.prox(rebuild(small), 1.0, *problem.hyper, mask=problem.mask, **problem.options)
    stays = [z == w for z, w in zip(tree_leaves(landed), small, strict=True)]
    separable = problem.penalty.separable is True
    return [x if separable else torch.full_like(x, bool(x.all())) for x in stays]


def _start(objective: Callable[[Params], Tensor], params: Params, free: list[Tensor], strengths: Any) -> Params:
    """Where a path begins: at zeros, and what carries no penalty at the minimum; or at `params`.

    A loss may have no value at zeros, as that of a precision matrix. Then no strength is known to make all zero, and
    those that are given are solved from `params` on.
    """
    cause = "The gradient there is NaN or infinite"
    try:
        start = _null(objective, params, free)
        if all([bool(x.isfinite().all()) for x in (objective(start), *tree_leaves(grad(objective)(start)))]):
            return start
    except LinAlgError as error:
        cause = first_line(error.__cause__ or error)
    if strengths is None:
        raise ValueError(
            "the loss or its gradient is not finite at zero, from where strengths are found, so that no path can "
            f"begin: {cause}. Is there NaN in args? Else, as of log(w) or logdet(w), give strengths=, and params at "
            "which the loss is finite."
        )
    return tree_map(lambda w: w.detach(), params)


def _null(objective: Callable[[Params], Tensor], params: Params, free: list[Tensor]) -> Params:
    """Zeros, and what carries no penalty at the minimum."""
    leaves, rebuild = flatten(params)
    places = [x.reshape(-1).nonzero()[:, 0] for x in free]

    def whole(values: list[Tensor]) -> Params:
        rows = zip(leaves, places, values, strict=True)
        return rebuild([w.new_zeros(w.numel()).index_copy(0, at, x).reshape(w.shape) for w, at, x in rows])

    start = [w.detach().reshape(-1).index_select(0, at) for w, at in zip(leaves, places, strict=True)]
    return whole(null_model(lambda values: objective(whole(values)), start, mask=False))


def _strengths(
    given: Tensor | Sequence[float] | None,
    count: int,
    ratio: float,
    problem: Problem,
    args: tuple[Any, ...],
    params: Params,
    start: Params,
    free: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Strengths in falling order, and where each that was given lies among them."""
    like = tree_leaves(start)[0]
    if given is not None:
        values = _as_strengths(given, like.dtype)
        if values.ndim != 1 or not len(values):
            raise ValueError(f"strengths have shape {tuple(values.shape)}; expected a list of numbers")
        check_range("strengths", values, 0.0)
        check_has_numbers(values, like, "strengths")
        values = values.to(like.device)
        falling = values.argsort(descending=True, stable=True)
        return values.index_select(0, falling), falling.argsort()
    if type(number(count)) is not int or count < 1:
        raise ValueError(f"count is {count!r}; expected a whole number of at least 1")
    check_range("ratio", ratio, 0.0, 1.0, open_low=True, open_high=True)
    slopes = _slopes(problem, args, start, free)
    most = lambda_max(slopes, problem.penalty, *problem.hyper, mask=problem.mask, **problem.options)
    if not _is_convex(problem) and any([bool(g.any()) for g in tree_leaves(slopes)]):
        most = _NoDerivative.apply(_greatest(problem, args, start, free, slopes).detach(), most)
    known = float(most.detach())
    if known == 0 and any([bool(g.any()) for g in tree_leaves(slopes)]):
        raise ValueError(
            f"the gradient of the loss at zero points nowhere that {problem.penalty!r} lets parameters go, so that "
            "zero is the solution for every strength and no path can begin. Is it one-sided, and the sign another one?"
        )
    if known == 0 or _is_chance(problem, args, params, free, slopes):
        raise ValueError(
            "the gradient of the loss at zero is 0 up to rounding, so that zero is the solution for every strength and "
            "no path can begin. Are the targets constant, or do they not come in? Does what carries no penalty tell "
            "them already?"
        )
    if math.isinf(known):
        raise ValueError(
            f"lambda_max of {problem.penalty!r} is {known}; no path can begin there. A penalty without zeros, "
            "such as half_l2, has no greatest strength: give strengths=."
        )
    shares = torch.arange(count, dtype=torch.float64, device=most.device) / max(count - 1, 1)
    return (most * ratio**shares).to(like.dtype), torch.arange(count, device=most.device)


def _slopes(problem: Problem, args: tuple[Any, ...], point: Params, free: list[Tensor]) -> Params:
    """The gradient of the loss in what carries a penalty, zeros elsewhere."""
    leaves, rebuild = flatten(grad(lambda params: problem.loss(params, *args))(point))
    return rebuild([torch.where(x, 0, g) for g, x in zip(leaves, free, strict=True)])


def _greatest_of(slopes: Params) -> float:
    return max([float(g.detach().abs().amax()) for g in tree_leaves(slopes) if g.numel()], default=0.0)


def _is_chance(problem: Problem, args: tuple[Any, ...], params: Params, free: list[Tensor], slopes: Params) -> bool:
    """Whether slopes are what rounding has left of those before the fit of what carries no penalty."""
    leaves, rebuild = flatten(params)
    point = rebuild([torch.where(x, w.detach(), 0) for w, x in zip(leaves, free, strict=True)])
    try:
        before = _greatest_of(grad(lambda params: problem.loss(params, *args))(point))
    except LinAlgError:  # The loss has no value there.
        return False
    return _greatest_of(slopes) <= _digits(params) * before


def _in_units(problem: Problem, args: tuple[Any, ...], params: Params, start: Params, free: list[Tensor]) -> Problem:
    """A problem whose tolerance, unless given, follows the gradient at zero where that is far from 1.

    Of data in small units zeros would be called solutions; of data in great ones nothing would, for rounding. It
    follows in steps of 100, so that what was compiled for some data serves for others.
    """
    if problem.tol is not None:
        return problem
    slopes, usual = _slopes(problem, args, start, free), problem.tolerance(start)
    size = _greatest_of(slopes)
    reached = _digits(start) * size
    if 0 < size < 0.01 and not _is_chance(problem, args, params, free, slopes):
        return replace(problem, tol=usual * 100.0 ** math.ceil(math.log(size, 100)))
    if usual < reached < math.inf:
        return replace(problem, tol=usual * 100.0 ** math.ceil(math.log(reached / usual, 100)))
    return problem


def _digits(params: Params) -> float:
    """The share of a gradient that is surely more than rounding: what is below three quarters of its digits."""
    return torch.finfo(tree_leaves(params)[0].dtype).eps ** 0.75


def _is_convex(problem: Problem) -> bool:
    return problem.penalty.is_convex(*problem.hyper, **problem.options)


def _greatest(problem: Problem, args: Any, start: Params, free: list[Tensor], slopes: Params) -> Tensor:
    """The strength from which on the first step leaves zeros as they are: where not convex, its length matters."""
    land, kept = problem.landing(start, args), torch.cat([x.reshape(-1) for x in free])
    size = torch.stack([g.detach().abs().amax().double() for g in tree_leaves(slopes) if g.numel()]).amax()
    found = least_strength(size, lambda strength: torch.where(kept, 0.0, land(strength).abs()).amax())
    return found * (1 + 16 * torch.finfo(tree_leaves(start)[0].dtype).eps)  # However the steps of an ensemble round.


class _NoDerivative(torch.autograd.Function):
    """A strength that depends on others, with no derivative in them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(strength: Tensor, others: Tensor) -> Tensor:
        return strength.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept, as there is no derivative."""

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        raise NotImplementedError(
            "the strengths that a path of a penalty that is not convex begins with have no derivatives; give strengths="
        )

    jvp = backward


def _as_strengths(given: Any, dtype: torch.dtype) -> Tensor:
    plain = list(given) if isinstance(given, Iterable) and not hasattr(given, "__array__") else given
    try:
        return torch.as_tensor(plain, dtype=dtype, device=None if isinstance(given, Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"strengths is {str(given)[:60]!r}; expected a list of numbers, or a tensor") from error


def _count(strengths: Tensor, done: int, start: Params, args: Any, problem: Problem, folds: int = 1) -> int:
    """How many strengths of those that are left are solved at once, from the last solution.

    Another member of an ensemble costs little as long as all do less work than it takes to call torch. Far below the
    last strength a loss that is no quadratic function takes more steps, and of many entries more come into question.

    Args:
        strengths: All strengths, in falling order.
        done: How many of them are solved.
        start: The last solution, of each fold.
        args: What the loss takes.
        problem: What is solved.
        folds: How many there are.
    """
    if any([isinstance(x, Tensor) and x.layout is not torch.strided for x in tree_leaves(args)]):
        return 1  # Of products with sparse matrices there is no map over maps.
    leaves = tree_leaves(start)
    size = max(sum(w.numel() for w in leaves) // folds, 1)
    rows = max([len(x) for x in tree_leaves(args) if isinstance(x, Tensor) and x.ndim], default=1)
    support = sum(int((w != 0).sum()) for w in leaves) // folds
    dense = min(size, max(2 * support, SMALL))  # As many entries as may come into question.
    terms = size * max(rows, 1) * (1 if problem.quadratic else dense)  # Each member has a Hessian of its own.
    most = max(1, min(_ENTRIES // dense**2, _TERMS // terms) // folds)
    # One by one: under derivatives torch 2.9 makes no list of a tensor.
    before, *numbers = [float(x) for x in strengths.detach().cpu()[max(done - 1, 0) :]]
    share = _NEAR_LARGE if size > SMALL else 0.0 if problem.quadratic else _NEAR
    near = sum(x >= share * before for x in numbers) + (done == 0)
    return min(most, max(near, _TOGETHER if problem.quadratic else 1))


def _solved(problem: Problem, start: Params, args: Any, strengths: Tensor) -> Solution:
    """Solutions for some strengths at once, from that of one before."""
    solve = lambda strength: problem.solve(start, strength, args)
    if len(strengths) == 1 and not problem.compile:
        return tree_map(lambda x: x.unsqueeze(0), solve(strengths[0]))
    found = vmap(solve)(_filled(strengths) if problem.compile else strengths)
    return tree_map(lambda x: x[: len(strengths)], found)


def _is_quadratic(objective: Callable[[Params], Tensor], start: Params) -> bool:
    """Whether the slope changes by the same from a place to a second as from there to a third in line."""
    leaves, rebuild = flatten(start)
    # In no direction that a loss may be blind to, as softmax is to what is the same for all classes.
    ways = [torch.arange(1, w.numel() + 1, device=w.device).to(w.dtype).cos().reshape(w.shape) for w in leaves]
    places = [rebuild([w + k * way for w, way in zip(leaves, ways, strict=True)]) for k in (0.0, 1.0, 2.0)]
    try:
        slopes = [grad(objective)(place) for place in places]
    except LinAlgError:  # It has no value there.
        return False
    first, second, third = (torch.cat([g.reshape(-1).double() for g in tree_leaves(each)]) for each in slopes)
    noise = 1e3 * torch.finfo(leaves[0].dtype).eps
    return bool(((third - second) - (second - first)).abs().amax() <= noise * torch.stack([first, third]).abs().amax())


def _filled(strengths: Tensor) -> Tensor:
    """Strengths, with the last one again up to a power of 2: a graph serves for one number of members."""
    more = (1 << (len(strengths) - 1).bit_length()) - len(strengths)
    return torch.cat([strengths, strengths[-1:].expand(more)])


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
    check_names("cross_validate", options, {**_ELSEWHERE, "args": "what the loss takes after params are its data="})
    problem = Problem(explained(loss), penalty, hyper, mask, tol, max_steps, options, compile)
    problem.check(params, 1.0, ())
    data = as_data(data, params)
    check_call(loss, data)
    held_out = _folds(folds, len(tree_leaves(data)[0]), tree_leaves(data)[0].device)
    objective = lambda point: problem.loss(point, *data)
    _check_strengths("cross_validate", problem, objective, params, strengths)
    free = _free(problem, params)
    start = _start(objective, params, free, strengths)
    falling, _ = _strengths(strengths, count, ratio, problem, data, params, start, free)
    problem = _in_units(problem, data, params, start, free)
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
    if _is_convex(problem):  # Else the result depends on where it begins.
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
        found = _solved(problem, begin, training, some)
        # One after the other: mapped over maps, `mse_loss` and others of torch fail on targets that a map shares.
        losses = [problem.loss(tree_map(lambda w, k=k: w[k], found.params), *testing) for k in range(len(some))]
        return torch.stack(losses), found.converged, found.params

    columns, converged, solutions, done = [], [], [], 0
    problem = replace(problem, quadratic=_is_quadratic(lambda point: problem.loss(point, *data), start))
    while done < len(strengths):
        some = strengths[done : done + _count(strengths, done, begin, data, problem, len(tests))]
        losses, ended, found = vmap(of_fold, in_dims=(0, 0, 0, None))(begin, training, testing, some)
        begin, done = tree_map(lambda w: w[:, -1], found), done + len(some)
        columns.append(losses)
        converged.append(ended)
        solutions.append(tree_map(lambda w: w[0], found))
    whole = tree_map(lambda *parts: torch.cat(parts), *solutions)
    return torch.cat(columns, 1).to(strengths.dtype), torch.cat(converged, 1), whole
