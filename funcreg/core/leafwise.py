"""Functions of tensors over the leaves of trees: with scalars of a tree, in the precision they need, and summed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Params, Scalar, Updates
from funcreg.core.checks import alike, check_alike, check_params, fits
from funcreg.core.construction import written
from funcreg.core.sharding import OVER, any_sharded, apply, like, reduce, whole
from funcreg.core.tree import (
    at_leaf,
    broadcast,
    flatten,
    kind_of,
    leaves_like,
    level,
    tree_leaves,
    tree_map,
    tree_paths,
)
from funcreg.core.undocumented import (
    all_members,
    has_tangents,
    is_batched,
    is_traced,
    is_transformed,
    versions,
    without_levels,
)

F = TypeVar("F", bound=Callable[..., Any])
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
#: Types of devices for which torch casts by itself.
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
#: The greatest number of float32.
_MOST_32 = torch.finfo(torch.float32).max
_BARE = (Tensor, torch.nn.Parameter)


def without_autocast(f: F) -> F:
    """A function that computes in the precision of its arguments, also where `torch.autocast` is on."""

    @functools.wraps(f)
    def exact(*args: Any, **kwargs: Any) -> Any:
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return exact(*args, **kwargs)
        return f(*args, **kwargs)

    return exact  # pyright: ignore[reportReturnType]  # It takes and returns what the function does.


def increment(steps: Tensor) -> Tensor:
    """The number of steps after one more; the greatest one of its dtype stays, where 1 more would be negative."""
    return steps + (steps < torch.iinfo(steps.dtype).max)


def widen(x: Tensor) -> Tensor:
    """A tensor in the precision in which it is computed with: float32 at least."""
    return x.to(torch.float32) if x.dtype in _SIXTEEN_BITS else x


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and moments of a tensor: float32 for 16-bit numbers, which saturate; else its own."""
    return torch.float32 if dtype in _SIXTEEN_BITS else dtype


def exact_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products and differences of entries of any size are found."""
    return x.dtype if x.device.type == "mps" else torch.float64


def compute(f: Callable[..., Tensor], tree: Any, *rest: Any, hyper: Sequence[Hyper] = ()) -> Any:
    """Map arithmetic over tensors: `f` sees float32 at least, results have the dtype of the leaves of `tree`.

    Args:
        f: Function of one leaf of each tree, then of each hyperparameter's value there.
        tree: Tree of tensors that the results are like.
        rest: Trees of the same structure and shapes.
        hyper: Numbers, tensors, or prefix trees of them.
    """
    leaves, rebuild = flatten(tree)
    results = _compute(f, tree, leaves, rest, hyper)
    return rebuild([x if x.dtype == w.dtype else x.to(w.dtype) for x, w in zip(results, leaves, strict=True)])


def compute_wide(f: Callable[..., Tensor], tree: Any, *rest: Any, hyper: Sequence[Hyper] = ()) -> Any:
    """`compute` with results in the precision they were computed in."""
    leaves, rebuild = flatten(tree)
    return rebuild(_compute(f, tree, leaves, rest, hyper))


def compute_leaves(f: Callable[..., Tensor], tree: Any, *rest: Any, hyper: Sequence[Hyper] = ()) -> list[Tensor]:
    """`compute_wide` with results in a list."""
    return _compute(f, tree, tree_leaves(tree), rest, hyper)


def _compute(
    f: Callable[..., Tensor], tree: Any, leaves: list[Tensor], rest: Sequence[Any], hyper: Sequence[Hyper]
) -> list[Tensor]:
    rows = _rows(tree, leaves, rest, hyper)
    results: list[Tensor] = []
    sharded = any_sharded([x for row in rows for x in row])
    for row in rows:
        try:
            made = apply(f, row) if sharded and any_sharded(row) else f(*row)
        except ValueError as error:
            raise ValueError(f"{at_leaf(tree_paths(tree)[len(results)])}{error}") from error
        results.append(laid_out_as(row[0], made) if isinstance(made, Tensor) else made)
    return results


def held(value: Any, leaf: Tensor) -> Any:
    """A number beside a leaf whose dtype holds none as large: infinite, as arithmetic makes it and `clamp` does not."""
    if isinstance(value, Tensor) or not abs(value) > _MOST_32 or abs(value) <= torch.finfo(wide(leaf.dtype)).max:
        return value
    return math.copysign(math.inf, value)


def laid_out_as(leaf: Tensor, made: Tensor) -> Tensor:
    """What was made of a leaf, in the order in memory that `view` and torch's fused optimizers take for granted."""
    return made.contiguous() if leaf.is_contiguous() and not made.is_contiguous() else made


def obeyed(rule: Callable[..., Tensor], leaf: Tensor, *row: Any, **options: Any) -> Tensor:
    """What a rule makes of a leaf, or an error if that is not of the leaf's shape, or if the leaf was written into."""
    before = None if is_traced() else versions([leaf])
    made: Any = rule(leaf, *row, **options)
    if not isinstance(made, Tensor) or made.shape != leaf.shape:
        raise ValueError(
            f"{written(rule)} returned {kind_of(made)}; expected a tensor of shape {tuple(leaf.shape)}, as the leaf has"
        )
    if before is not None and versions([leaf]) != before:
        raise ValueError(
            f"{written(rule)} wrote into the leaf that it was given; expected a function that makes a new tensor, "
            "w.clamp(max=1.0) and not w.clamp_(max=1.0)"
        )
    return made


def _rows(tree: Any, leaves: list[Tensor], rest: Sequence[Any], hyper: Sequence[Hyper]) -> list[tuple[Any, ...]]:
    """For each leaf what a rule of it sees."""
    trees = [leaves, *[alike(tree, leaves, other, ("the parameters", "the state or updates")) for other in rest]]
    # Without calls for what most leaves do not need: traced code pays for each call of each leaf.
    columns: list[list[Any]] = [[x if x.dtype not in _SIXTEEN_BITS else widen(x) for x in column] for column in trees]
    for value in hyper:
        if isinstance(value, (int, float)):
            columns.append([held(value, leaf) for leaf in leaves] if abs(value) > _MOST_32 else [value] * len(leaves))
        else:
            spread = broadcast(value, tree, "a hyperparameter")
            for i, x in zip(range(len(spread)), spread, strict=True):
                if isinstance(x, Tensor) and x.is_meta:
                    check_has_numbers(x, leaves[i], place=at_leaf(tree_paths(tree)[i]))
                if isinstance(x, Tensor) and x.ndim and not fits(x, leaves[i].shape):
                    raise ValueError(
                        f"{at_leaf(tree_paths(tree)[i])}a hyperparameter has shape {tuple(x.shape)}; expected one "
                        f"that broadcasts to {tuple(leaves[i].shape)}, the shape of the leaf"
                    )
            columns.append([beside(x, leaf) for x, leaf in zip(spread, leaves, strict=True)])
    return list(zip(*columns, strict=True))


def reduce_leaves(
    f: Callable[..., Tensor], tree: Any, *rest: Any, hyper: Sequence[Hyper] = (), op: str = "sum"
) -> list[Tensor]:
    """For each leaf the sum of the terms that a function makes of it, a tensor without dimensions.

    Over sharded leaves it is the same in every process, and takes one collective for all of them.

    Args:
        f: As in `compute`.
        tree: Tree of tensors.
        rest: Trees of the same structure and shapes.
        hyper: Numbers, tensors, or prefix trees of them.
        op: `"sum"`, `"any"`, or `"max"` for the largest of terms of at least 0, which is 0 where there are none.
    """
    if any_sharded(tree_leaves((tree, rest, hyper))):
        name = lambda i: tree_paths(tree)[i]
        return reduce(f, _rows(tree, tree_leaves(tree), rest, hyper), op, name)
    over = OVER[op]
    return compute_leaves(lambda *row: over(f(*row)), tree, *rest, hyper=hyper)


def gathered(tree: Any) -> Any:
    """A tree whose sharded leaves are whole in every process; the tree itself if none is sharded."""
    leaves, rebuild = flatten(tree)
    return rebuild(map(whole, leaves)) if any_sharded(leaves) else tree


def spread_like(tree: Any, params: Any) -> Any:
    """A tree of whole leaves, each sharded as that of the parameters is."""
    leaves, rebuild = flatten(params)
    if not any_sharded(leaves):
        return tree
    return rebuild([like(x, leaf) for x, leaf in zip(leaves_like(params, tree), leaves, strict=True)])


def beside(value: Any, leaf: Tensor) -> Any:
    """A value where the leaf is: trees may span devices, a counter lies on one."""
    if not isinstance(value, Tensor) or value.device == leaf.device:
        return value
    check_has_numbers(value, leaf)
    return value.to(leaf.device)


def check_has_numbers(value: Any, leaf: Tensor, name: str = "a strength or hyperparameter", place: str = "") -> None:
    """Raise a ValueError for a tensor on the meta device beside a leaf that has numbers."""
    if isinstance(value, Tensor) and value.is_meta and not leaf.is_meta:
        raise ValueError(
            f"{place}got {name} on meta, a device without numbers; expected a tensor on {leaf.device}, where the leaf "
            "is. Was it made under torch.device('meta')?"
        )


def times(c: Scalar, x: Tensor) -> Tensor:
    """A weight times terms or slopes; an infinite weight leaves zeros what they are, as its proximal operator does."""
    if isinstance(c, (int, float)) and c != math.inf:
        return c * x
    if isinstance(c, Tensor) and not c.ndim and _seen_finite(c):
        return c * x  # In one pass, where a look at the number costs less than two more.
    finite = torch.where(c == math.inf, 1.0, c) if isinstance(c, Tensor) else 1.0
    spread = torch.where(x == 0, finite, c)
    # A number in a tensor does not widen what it multiplies, also where it is spread out.
    return (spread if isinstance(c, Tensor) and c.ndim else spread.to(x.real.dtype)) * x


def _seen_finite(c: Tensor) -> bool:
    """Whether a number can be read, of each member of a batch, and is infinite nowhere."""
    if is_traced():
        return False
    found = all_members(c)
    return readable(found) and not (found.detach() == math.inf).any().item()


def step_times(step: Scalar, *strengths: Scalar) -> Scalar:
    """A step times strengths, all of at least 0: 0 where one of them is, also beside an infinite one."""
    return functools.reduce(_times, strengths, step)


def _times(a: Scalar, b: Scalar) -> Scalar:
    if not isinstance(a, Tensor):
        return _number_times(a, b)
    if not isinstance(b, Tensor):
        return _number_times(b, a)
    if bool(a.ndim) == bool(b.ndim):
        return _finite_beside(a, b) * _finite_beside(b, a)
    # As torch has it, the dtype is that of what has dimensions, also where the other one is spread out beside it.
    one, many = (a, b) if b.ndim else (b, a)
    if not many.is_floating_point():
        return _finite_beside(one, many) * _finite_beside(many, one)
    one = one.to(wide(many.dtype))
    return (_finite_beside(one, many) * _finite_beside(many, one)).to(many.dtype)


def _number_times(c: float, x: Scalar) -> Scalar:
    if not isinstance(x, Tensor):
        return 0.0 if (c, x) in ((0, math.inf), (math.inf, 0)) else c * x
    if c == 0:
        return c * _finite(x)
    if c != math.inf:
        return c * x
    spread = torch.where(x == 0, _MOST, c)
    return (spread.to(x.dtype) if x.is_floating_point() else spread) * x


def _finite_beside(a: Tensor, b: Tensor) -> Tensor:
    """A number, as a finite one where another one is 0."""
    return torch.where(b == 0, _finite(a), a)


def _finite(a: Tensor) -> Tensor:
    return a.clamp(max=_MOST) if a.is_floating_point() else a


#: A number whose product with 0 is 0, in any dtype.
_MOST = 2.0**15


def product(params: Params, *factors: Hyper) -> Hyper:
    """The product of steps and strengths: a scalar, or a tree like the parameters if a factor is a tree."""
    if all(level(factor) is None for factor in factors):
        return step_times(*factors)
    rows = zip(*(broadcast(factor, params, "a hyperparameter") for factor in factors), strict=True)
    return flatten(params)[1]([step_times(*row) for row in rows])


def scalar_device(params: Params) -> torch.device:
    """Where counters lie: with the parameters, to be batched with them; on the CPU if those span devices."""
    devices = {leaf.device for leaf in tree_leaves(params)}
    single = len(devices) == 1 and next(iter(devices)).type != "mps"  # No float64 there.
    return next(iter(devices)) if single else torch.device("cpu")


def zeros(params: Params, dtype: torch.dtype | None = None) -> Any:
    """Accumulators at zero, each in its own memory, in `dtype` or in float32 at least."""
    return tree_map(lambda w: torch.zeros_like(w, dtype=kept_dtype(w, dtype)), params)


def kept_dtype(w: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a state keeps what is like a leaf: complex if and only if the leaf is, whatever `dtype` is."""
    kept = dtype or wide(w.dtype)
    if w.is_complex() and not kept.is_complex:
        return torch.complex128 if kept == torch.float64 else torch.complex64
    return kept if w.is_complex() else _REAL.get(kept, kept)


#: Of complex dtypes those of their parts, which `dtype.to_real()` gives, too, but not where code is compiled.
_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


def total(terms: Sequence[Tensor]) -> Tensor:
    """The sum of scalars; stacked, because a sharded scalar is reduced once a stack and once a `+`."""
    if not terms:
        return torch.zeros(())
    dtype = terms[0].dtype
    for term in terms[1:]:
        dtype = torch.promote_types(dtype, term.dtype)
    return terms[0] if len(terms) == 1 else torch.stack([t.to(terms[0].device, dtype) for t in terms]).sum()


def squared(w: Tensor) -> Tensor:
    """Entry by entry, the squared magnitude, real also for complex entries."""
    return w.real.square() + w.imag.square() if w.is_complex() else w.square()


def is_finite(w: Tensor) -> Tensor:
    """Entry by entry, whether it is neither infinite nor NaN; torch's own writes in place where entries are complex."""
    return w.real.isfinite() & w.imag.isfinite() if w.is_complex() else w.isfinite()


def bare(w: Tensor) -> bool:
    """Whether operations on a tensor are nothing but arithmetic: neither traced, batched, nor differentiated."""
    if is_traced() or type(w) not in _BARE or (w.requires_grad and torch.is_grad_enabled()):
        return False
    return not has_tangents() and not is_transformed(lambda: [w])


def sign(w: Tensor) -> Tensor:
    """The sign, or the phase of a complex entry; NaN goes through, which `sgn` makes 0."""
    if not w.is_complex() and bare(w):
        signs = w.sign()
        if w.device.type == "cpu" and not math.isnan(w.sum()):  # A look costs less than to write once more.
            return signs
        # The same in a third of the time, but for derivatives. Adding zero turns -0.0 into +0.0.
        return torch.clamp(w, signs, signs, out=signs).add_(0.0)
    return torch.where(w != w, w, w.sgn() if w.is_complex() else w.sign())


def running_sum(x: Tensor) -> Tensor:
    """Sums along the last dimension up to each entry.

    Of a dimension counted from the end, torch sums each shard by itself: compiled code may see sharded tensors.
    """
    return x.cumsum(x.ndim - 1)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root with derivative 0 at 0, of any order: both branches of a `where` are differentiated."""
    if bare(x):
        return x.sqrt()
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).sqrt())


def readable(w: Tensor) -> bool:
    """Whether a number may be read from a tensor: one on the CPU, neither traced nor batched; derivatives may run."""
    if is_traced():
        return False
    w = without_levels(w)
    return type(w) in _BARE and w.device.type == "cpu" and not is_batched(w)


def with_own_step(w: Tensor, step: Scalar, h: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf and the step of each entry in a metric, in float64 where that is seen to leave the range of float32.

    What jumps from zero does so where the square of an entry is as large as its step. Rules of convex penalties have
    nothing to lose there.
    """
    own = step / h
    if own.dtype != torch.float32 or not own.numel() or not readable(own):
        return w, own
    limits, (least, most) = torch.finfo(own.dtype), own.detach().aminmax()
    if most.item() > limits.max or (least.item() < limits.tiny and bool(((own < limits.tiny) & (step != 0)).any())):
        return w.to(torch.complex128 if w.is_complex() else torch.float64), step / h.to(torch.float64)
    return w, own


def euclidean(w: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    r"""Euclidean norm over some dimensions, which are kept, or over all; derivatives at zero are 0, of any order.

    Entries whose squares leave the range of their dtype (beyond 1e19 and below 1e-19 in float32) are squared in units
    of a power of two. Where numbers can be read, the others pay nothing for that.

    Args:
        w: Tensor in float32 at least.
        dims: Dimensions that are reduced, of size 1 after it; None for all of them, and a tensor without dimensions.
    """
    if dims == () and not w.is_complex():
        return w.abs()
    if not w.numel() or (is_traced() and _widest(w) is not w):
        return safe_sqrt(_sum_of_squares(_widest(w), dims)).to(w.real.dtype)
    squares = _sum_of_squares(w, dims)
    if not readable(squares):
        return _rescaled_norm(w, dims)
    if _ordinary(squares):
        return safe_sqrt(squares)
    kept = [d for d in range(w.ndim) if dims is not None and d not in dims]
    if not kept or not dims:
        return _rescaled_norm(w, dims)
    # The rare groups alone once more: groups of zeros are among them, and common.
    least, most, _ = _range_of_squares(squares.dtype)
    rare = ~((squares >= least) & (squares <= most))
    rows = w if kept == [0] else w.permute([*kept, *dims]).flatten(0, len(kept) - 1)
    rows = rows.index_select(0, rare.reshape(-1).nonzero()[:, 0])
    if not rows.detach().abs().amax():
        return safe_sqrt(squares)
    norms = _rescaled_norm(rows, tuple(range(1, rows.ndim))).reshape(-1)
    return safe_sqrt(torch.where(rare, torch.ones_like(squares), squares)).index_put((rare,), norms)


def _sum_of_squares(w: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    squares = squared(w)
    if dims is None:
        return squares.sum()
    return squares.sum(dims, keepdim=True) if dims else squares  # sum(()) would reduce them all.


def _widest(w: Tensor) -> Tensor:
    """A tensor of float32 in float64, whose range holds all of its squares; in compiled code that costs no memory."""
    if w.device.type == "mps" or w.dtype not in (torch.float32, torch.complex64):
        return w
    return w.to(torch.complex128 if w.is_complex() else torch.float64)


def _range_of_squares(dtype: torch.dtype) -> tuple[float, float, float]:
    """Between which sums of squares are exact, and the power of two that brings smaller entries into this range."""
    powers = 1024 if dtype == torch.float64 else 128
    return 2.0 ** (-5 * powers // 8), 2.0 ** (5 * powers // 8), 2.0 ** (21 * powers // 32)


def _ordinary(squares: Tensor) -> bool:
    """Whether sums of squares lie in the range in which they are exact."""
    least, most, _ = _range_of_squares(squares.dtype)
    low, high = squares.detach().aminmax()
    return low.item() >= least and high.item() <= most


def _rescaled_norm(w: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """The norm in units of a power of two, chosen for each group by what its squares came to."""
    squares = _sum_of_squares(w.detach(), dims)
    least, most, unit = _range_of_squares(squares.dtype)
    small, large = torch.full_like(squares, unit), torch.full_like(squares, 1 / unit)
    scale = torch.where(squares > most, large, torch.where(squares < least, small, torch.ones_like(squares)))
    return safe_sqrt(_sum_of_squares(w * scale, dims)) / scale


def global_norm(tree: Any) -> Tensor:
    r"""Euclidean norm of all entries of a tree, :math:`\sqrt{\sum_i |x_i|^2}`.

    Sixteen-bit leaves are summed in float32. The gradient at zero is zero.

    Shape:
        A 0-dim tensor.

    Example:
        >>> global_norm({"weight": torch.tensor([3.0]), "bias": torch.tensor([4.0])})
        tensor(5.)
    """
    check_params(tree, "tree")
    leaves = [widen(x) for x in tree_leaves(tree)]
    if any_sharded(leaves):  # Without a look at numbers: all processes are to do the same.
        rows, name = [(x,) for x in leaves], lambda i: tree_paths(tree)[i]
        return safe_sqrt(total(reduce(lambda x: squared(_widest(x)), rows, "sum", name, entrywise=True))).to(
            functools.reduce(torch.promote_types, [x.dtype.to_real() for x in leaves])
        )
    if is_traced() and all([_widest(x) is not x for x in leaves]):
        return safe_sqrt(total([squared(_widest(x)).sum() for x in leaves])).to(torch.float32)
    squares = total([squared(x).sum() for x in leaves])
    if not leaves or (readable(squares) and _ordinary(squares)):
        return safe_sqrt(squares)
    return euclidean(torch.stack([euclidean(x).to(squares.device, squares.dtype) for x in leaves]))


def apply_updates(params: Params, updates: Updates) -> Params:
    r"""Add updates to parameters, :math:`w + u`, in the dtype of the parameters.

    Raises:
        ValueError: The trees, or the shapes of a leaf, differ.

    Example:
        >>> apply_updates({"weight": torch.tensor([1.0, 2.0])}, {"weight": torch.tensor([0.5, -2.0])})
        {'weight': tensor([1.5000, 0.0000])}
    """
    check_params(params)
    check_alike(params, updates, ("params", "updates"))
    return compute(lambda w, u: w + u, params, updates)
