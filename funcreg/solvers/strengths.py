"""The strengths of a path: the greatest and those below it, where each is solved from, and how many at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from funcreg.core._typing import Params
from funcreg.core.inputs import LinAlgError, first_line
from funcreg.core.leafwise import check_has_numbers, wide
from funcreg.core.ranges import check_range, whole_number
from funcreg.core.tree import flatten, tree_leaves, tree_map
from funcreg.core.undocumented import is_batched, without_levels
from funcreg.regularizers.composition import Term
from funcreg.regularizers.penalty import Sum
from funcreg.solvers.certificates import lambda_max, least_strength, null_model
from funcreg.solvers.minimize import Problem, Solution
from funcreg.solvers.proximal_newton import SMALL
from funcreg.transforms.regularizing import projects

#: What others call what is called otherwise here.
NAMED_ELSEWHERE = {
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


def begun(
    call: str,
    problem: Problem,
    args: tuple[Any, ...],
    params: Params,
    strengths: Any,
    count: int,
    ratio: float,
) -> tuple[Problem, Tensor, Tensor, Params]:
    """A problem for several strengths, these in falling order, where each lies among them, and where a path begins."""
    objective = lambda point: problem.loss(point, *args)
    _check_strengths(call, problem, objective, params, strengths)
    free = _free_leaves(problem, params)
    start = _begin_at(objective, params, free, strengths)
    falling, order = _falling_strengths(strengths, count, ratio, problem, args, params, start, free)
    return _in_units(problem, args, params, start, free), falling, order, start


def _check_strengths(
    call: str, problem: Problem, objective: Callable[[Params], Tensor], params: Params, strengths: Any
) -> None:
    """Raise an error where there is no choice of strengths: for constraints, without penalized leaves, under `vmap`."""
    if projects(problem.penalty):
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


def _free_leaves(problem: Problem, params: Params) -> list[Tensor]:
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


def _begin_at(objective: Callable[[Params], Tensor], params: Params, free: list[Tensor], strengths: Any) -> Params:
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


def _falling_strengths(
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
    count = whole_number("count", count)
    check_range("ratio", ratio, 0.0, 1.0, open_low=True, open_high=True)
    slopes = _slopes(problem, args, start, free)
    most = lambda_max(slopes, problem.penalty, *problem.hyper, mask=problem.mask, **problem.options)
    if not is_convex(problem) and any([bool(g.any()) for g in tree_leaves(slopes)]):
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


def is_convex(problem: Problem) -> bool:
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


def how_many(strengths: Tensor, done: int, start: Params, args: Any, problem: Problem, folds: int = 1) -> int:
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


def solve_several(problem: Problem, start: Params, args: Any, strengths: Tensor) -> Solution:
    """Solutions for some strengths at once, from that of one before."""
    solve = lambda strength: problem.solve(start, strength, args)
    if len(strengths) == 1 and not problem.compile:
        return tree_map(lambda x: x.unsqueeze(0), solve(strengths[0]))
    found = vmap(solve)(_filled(strengths) if problem.compile else strengths)
    return tree_map(lambda x: x[: len(strengths)], found)


def is_quadratic(objective: Callable[[Params], Tensor], start: Params) -> bool:
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
