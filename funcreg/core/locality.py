"""Whether a rule on a whole tensor may be computed on pieces of it, found by running the rule on shapes alone.

A tensor is cut along some of its dimensions. A rule that computes entry by entry along these may run on each piece; one
that sorts or differences along them may not, and one that sums along them may if its sums are completed. The rule is
run on tensors without memory, at the size of the whole and at other sizes along the cuts. Each operation says where in
its result the cuts are, or couples entries across a cut, or is not known; and runs that differ in an operation or a
number show a rule that depends on the size of what it gets. No memory and no number is read: every process finds the
same.
"""

from __future__ import annotations

import math
import threading
import types
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from funcreg.core.undocumented import dispatch_mode

T = TypeVar("T")
#: For each dimension of a tensor, what names the cut along it, or None. Tensors with equal cuts have pieces that fit.
Cuts = tuple[Any, ...]


class Result(NamedTuple):
    """What a rule makes of a whole tensor: its shape, and where it is cut if its arguments are."""

    shape: torch.Size
    cuts: Cuts


class Sum(NamedTuple):
    """A sum, a mean or an `any` over pieces, which is to be completed by a sum over processes."""

    cuts: Cuts  # Those that it reduces over.
    entries: int  # Of how many entries of the whole a mean is; 1 for what is none.


class Summed(NamedTuple):
    """What a rule makes of whole tensors if some of its sums are completed."""

    result: Result
    reductions: tuple[Any, ...]  # All operations of the rule that may need to be completed, in their order.
    sums: dict[int, Sum]  # Those that do, by their numbers.


class Coupled(Exception):
    """An operation couples entries across a cut, or it is not known whether it does."""


def local_result(
    f: Callable[..., Any], row: Sequence[Any], cuts: Sequence[Cuts], pieces: int, small: Sequence[int]
) -> Result | None:
    """What a rule that may run on pieces makes of whole tensors; None for a rule that may not.

    Args:
        f: Rule of tensors and other arguments.
        row: The arguments.
        cuts: The cuts of each of them; empty for what is no tensor.
        pieces: Into how many pieces they are cut.
        small: Sizes below 2 along the cuts that some pieces have: rules may take them for dimensions that broadcast.
    """
    small = tuple([n for n in small if n == 1])  # What is made of no entries is no entries.
    key = _key((f, *row)), tuple(cuts), pieces, small
    return _kept(key, lambda: _found(f, row, cuts, pieces, small))


_known: dict[Any, Any] = {}
#: Sums of a rule up to which completing each costs less than the whole.
_MOST = 4


def _kept(key: Any, find: Callable[[], T]) -> T:
    """What was found under a key, or is found now, and kept for the next time."""
    try:
        if key in _known:
            return _known[key]
    except TypeError:  # Something in it has no hash.
        return find()
    if len(_known) > 10_000:
        _known.clear()
    _known[key] = found = find()
    return found


def _found(
    f: Callable[..., Any], row: Sequence[Any], cuts: Sequence[Cuts], pieces: int, small: Sequence[int]
) -> Result | None:
    found = local_results(lambda *row: [f(*row)], row, cuts, pieces, small)
    return None if found is None else found[0]


def summed_result(
    f: Callable[..., Any], row: Sequence[Any], cuts: Sequence[Cuts], pieces: int, small: Sequence[int]
) -> Summed | None:
    """How a rule that sums over cuts may run on pieces; None if it does something else across them, or no sum.

    Args:
        f: Rule of tensors and other arguments.
        row: The arguments.
        cuts: The cuts of each of them; empty for what is no tensor.
        pieces: Into how many pieces they are cut.
        small: Sizes below 2 along the cuts that some pieces have: all processes know what the rule does there.
    """
    key = _key((f, *row)), tuple(cuts), pieces, tuple(small), "sums"
    return _kept(key, lambda: _found_sums(f, row, cuts, pieces, small))


def _found_sums(
    f: Callable[..., Any], row: Sequence[Any], cuts: Sequence[Cuts], pieces: int, small: Sequence[int]
) -> Summed | None:
    runs = _runs(lambda *row: [f(*row)], row, cuts, _sizes(pieces, small), sums=True)
    if runs is None:
        return None
    ([first], follow), *others = runs
    alike = [
        result.cuts == first.cuts and other.record == follow.record and other.sums.keys() == follow.sums.keys()
        for [result], other in others
    ]
    if not all(alike) or not 0 < len(follow.sums) <= _MOST:
        return None
    return Summed(first, tuple(follow.reductions), follow.sums)


def local_results(
    f: Callable[..., Sequence[Any]], row: Sequence[Any], cuts: Sequence[Cuts], pieces: int, small: Sequence[int]
) -> list[Result] | None:
    """`local_result` of a function with several results, which is not kept. A cut dimension of one entry gets more."""
    runs = _runs(f, row, cuts, _sizes(pieces, small))
    if runs is None:
        return None
    (first, follow), *others = runs
    where = [result.cuts for result in first]
    alike = [[r.cuts for r in found] == where and other.record == follow.record for found, other in others]
    return first if all(alike) else None


def _sizes(pieces: int, small: Sequence[int]) -> list[Callable[[int], int]]:
    """From the size of a cut dimension to those at which a rule is run."""
    some = [lambda n: n if n > 1 else 3, lambda n: max(n, 3) + 1, lambda n: max(2, -(-n // pieces))]
    return some + [lambda n, size=size: size for size in small]


def _runs(
    f: Callable[..., Sequence[Any]],
    row: Sequence[Any],
    cuts: Sequence[Cuts],
    sizes: Sequence[Callable[[int], int]],
    sums: bool = False,
) -> list[tuple[list[Result], Any]] | None:
    """What a function makes at each of some sizes, and the mode that followed it; None where it cannot be followed."""
    runs: list[tuple[list[Result], Any]] = []

    def run() -> None:
        with suppress(Exception):  # It needs memory, or the size is wrong: on the whole the rule will show its error.
            runs.extend([_run(f, row, cuts, size, sums) for size in sizes])

    # A thread has none of the modes and transforms that are at work here, whose tensors would hide those of the run.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return runs if len(runs) == len(sizes) else None


def _run(
    f: Callable[..., Sequence[Any]],
    row: Sequence[Any],
    cuts: Sequence[Cuts],
    size: Callable[[int], int],
    sums: bool,
) -> tuple[list[Result], Any]:
    """A function run on shapes that have other sizes along the cuts, and the mode that followed it."""
    follow = _follower(sums)
    inputs: list[Any] = []
    for x, own in zip(row, cuts, strict=True):
        if isinstance(x, Tensor):
            shape = [n if d is None else size(n) for n, d in zip(x.shape, own, strict=True)]
            bare = torch.empty(shape, dtype=x.dtype, device="meta")
            follow.mark(bare, own)
            inputs.append(bare)
        else:
            inputs.append(x)
    with torch.no_grad(), follow:
        made = f(*inputs)
    found = [Result(x.shape, follow.cuts(x)) if isinstance(x, Tensor) else Result(torch.Size(), ()) for x in made]
    return found, follow


def _follower(sums: bool) -> Any:
    """A mode that follows cuts through operations, and, if sums may be completed, writes down which."""

    class Follow(dispatch_mode()):
        def __init__(self) -> None:
            super().__init__()
            self.record: list[Any] = []
            self.reductions: list[Any] = []  # That may be completed.
            self.sums: dict[int, Sum] = {}
            self.completes = sums
            self._cuts: dict[int, Cuts] = {}
            self._kept: list[Tensor] = []  # So that no id is given twice.

        def mark(self, x: Tensor, cuts: Cuts) -> None:
            self._cuts[id(x)] = tuple(cuts)
            self._kept.append(x)

        def cuts(self, x: Tensor) -> Cuts:
            return self._cuts.get(id(x), (None,) * x.ndim)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            out = _made(func, args, kwargs)
            name = func.overloadpacket.__name__
            moves = name in _VIEWS
            self.record.append((func, None if moves else tuple(map(_plain, (*args, *kwargs.values())))))
            if name in _COMPLETED:
                self.reductions.append(func)
            made = out if isinstance(out, (tuple, list)) else (out,)
            for x in made:
                if isinstance(x, Tensor):
                    self.mark(x, _cuts_of(self, func, name, args, kwargs, x))
            return out

    return Follow()


#: From an operation and what its arguments are like to the shape, strides and dtype of what it makes.
_layouts: dict[Any, Any] = {}


def _made(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation makes of tensors without memory.

    Torch computes shapes and dtypes in Python, which takes a tenth of a millisecond: those of real tensors are kept,
    unless an operation writes or gives a view.
    """
    tensors = list(_tensors((*args, *kwargs.values())))
    dtypes = {x.dtype for x in tensors if x.dtype != torch.bool}
    aliases = any([out.alias_info is not None for out in func._schema.returns]) or func._schema.is_mutable
    if aliases or not tensors or len(dtypes) > 1 or any([x.is_complex() or x.device.type != "meta" for x in tensors]):
        return func(*args, **kwargs)
    key = func, torch.get_default_dtype(), _shaped(args), _shaped(tuple(kwargs.items()))
    try:
        kept = _layouts.get(key)
    except TypeError:  # An argument has no hash.
        return func(*args, **kwargs)
    if kept is not None:
        return torch.empty_strided(kept[0], kept[1], dtype=kept[2], device="meta")
    out = func(*args, **kwargs)
    if isinstance(out, Tensor) and out.device.type == "meta":
        if len(_layouts) > 10_000:
            _layouts.clear()
        _layouts[key] = out.shape, out.stride(), out.dtype
    return out


def _shaped(x: Any) -> Any:
    """An argument with what its tensors are like: 1, 1.0 and True are not the same."""
    if isinstance(x, (tuple, list)):
        return tuple(map(_shaped, x))
    return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else (type(x), x)


def _plain(x: Any) -> Any:
    """An argument as it is compared between two runs: numbers, and not tensors."""
    if isinstance(x, (tuple, list)):
        return tuple(map(_plain, x))
    return Tensor if isinstance(x, Tensor) else x


def _key(x: Any, depth: int = 0) -> Any:
    """What decides how a function runs on shapes: its code and what it closes over; shapes of tensors."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype
    if isinstance(x, types.FunctionType) and depth < 12:
        cells = [_key(cell.cell_contents, depth + 1) for cell in x.__closure__ or ()]
        return x.__code__, tuple(cells), _key((x.__defaults__, x.__kwdefaults__), depth + 1)
    if isinstance(x, (tuple, list)):
        return type(x), tuple(_key(part, depth + 1) for part in x)
    if isinstance(x, dict):
        return dict, tuple((name, _key(part, depth + 1)) for name, part in x.items())
    return type(x), x


def completing(found: Summed, total: Callable[[Tensor, Cuts], Tensor]) -> Any:
    """A mode in which a rule runs on a piece.

    Args:
        found: What is known of the rule.
        total: The sum over processes of what each has, over some cuts.
    """

    class Completing(dispatch_mode()):
        def __init__(self) -> None:
            super().__init__()
            self._number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name, kwargs = func.overloadpacket.__name__, kwargs or {}
            if name not in _COMPLETED:
                return func(*args, **kwargs)
            at = self._number
            self._number += 1
            if at >= len(found.reductions) or func is not found.reductions[at]:
                raise RuntimeError(f"a rule computed {func} of a piece, and not of the whole")
            if at not in found.sums:
                return func(*args, **kwargs)
            cuts, entries = found.sums[at]
            made = _SUMS.get(func, func)(*args, **kwargs)
            if name == "any":
                return total(made.to(torch.int32), cuts) > 0
            return total(made, cuts) / entries if name == "mean" else total(made, cuts)

    return Completing()


#: What is completed by a sum over processes.
_COMPLETED = {"sum", "mean", "any"}
_SUMS: dict[Any, Any] = {
    torch.ops.aten.mean.default: torch.ops.aten.sum.default,
    torch.ops.aten.mean.dim: torch.ops.aten.sum.dim_IntList,
}


# Operations


def _cuts_of(follow: Any, func: Any, name: str, args: Any, kwargs: Any, out: Tensor) -> Cuts:
    """Where the result of an operation is cut."""
    tensors = list(_tensors((*args, *kwargs.values())))
    if all([d is None for x in tensors for d in follow.cuts(x)]):
        if name in _RANDOM or name == "lift_fresh" or (not tensors and name not in _CREATED):
            raise Coupled(name)
        return (None,) * out.ndim
    if torch.Tag.pointwise in func.tags or name in _ENTRYWISE:
        return _broadcast(follow, tensors, out)
    own = follow.cuts(tensors[0])
    if name in _LIKE:
        return own
    if name in _REDUCED:
        return _reduced(follow, name, own, args, kwargs, tensors[0], out)
    if name in _ALONG:
        return _along(follow, name, own, args, kwargs, tensors)
    if name in _VIEWS:
        return _VIEWS[name](own, args, tensors[0], out)
    raise Coupled(name)


def _tensors(args: Iterable[Any]) -> Iterable[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (tuple, list)):
            yield from _tensors(x)


_CREATED = {"zeros", "ones", "full", "empty", "arange", "scalar_tensor", "eye", "linspace"}
_RANDOM = {
    "rand_like",
    "randn_like",
    "randint_like",
    "bernoulli",
    "normal",
    "uniform",
    "rand",
    "randn",
    "native_dropout",
}
#: Computed entry by entry, with the shapes of their arguments broadcast, but not marked so in every version of torch.
_ENTRYWISE = {"where", "complex", "polar", "floor_divide", "_to_copy", "copy_", "fill_", "zero_", "isfinite"}
_LIKE = {"zeros_like", "ones_like", "full_like", "empty_like", "detach", "alias", "clone", "_conj", "_neg_view"}
_LIKE |= {"resolve_conj", "resolve_neg", "contiguous", "lift_fresh_copy"}
#: They take away, or keep with one entry, the dimensions that their second argument names; all of them without it.
_REDUCED = {
    "sum",
    "mean",
    "amax",
    "amin",
    "any",
    "all",
    "prod",
    "argmax",
    "argmin",
    "max",
    "min",
    "logsumexp",
    "nansum",
}
#: They work along one dimension, or some, and entry by entry along the others.
_ALONG = {"cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "flip", "_softmax", "gather"}
_ALONG |= {"topk", "cat"}


def _broadcast(follow: Any, tensors: Sequence[Tensor], out: Tensor) -> Cuts:
    cuts: list[int | None] = [None] * out.ndim
    for x in tensors:
        for d, cut in enumerate(follow.cuts(x), start=out.ndim - x.ndim):
            if cut is None:
                continue
            if cuts[d] not in (None, cut):
                raise Coupled("two cuts meet")
            cuts[d] = cut
    for x in tensors:
        for d, cut in enumerate(follow.cuts(x), start=out.ndim - x.ndim):
            if cut is None and cuts[d] is not None and x.shape[d - out.ndim] != 1:
                raise Coupled("a whole tensor meets a piece")
    return tuple(cuts)


def _dims(given: Any, ndim: int) -> set[int]:
    return {d % ndim for d in ([given] if isinstance(given, int) else given)} if ndim else set()


def _reduced(follow: Any, name: str, own: Cuts, args: Any, kwargs: Any, x: Tensor, out: Tensor) -> Cuts:
    given = kwargs.get("dim", args[1] if len(args) > 1 else None)
    gone = _dims(given, len(own)) if given is not None and given != [] else set(range(len(own)))
    if any([own[d] is not None for d in gone]):
        if not follow.completes or name not in _COMPLETED or out.is_complex():
            raise Coupled("a sum over a cut")
        entries = math.prod([x.shape[d] for d in gone]) if name == "mean" else 1
        follow.sums[len(follow.reductions) - 1] = Sum(tuple([own[d] for d in gone if own[d] is not None]), entries)
    if out.ndim == len(own):  # They stay, with one entry.
        return tuple([None if d in gone else cut for d, cut in enumerate(own)])
    return tuple([cut for d, cut in enumerate(own) if d not in gone])


def _along(follow: Any, name: str, own: Cuts, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Cuts:
    if name == "sort" and "stable" in kwargs:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    elif name == "topk":
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
    else:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0 if name == "cat" else -1)
    if name == "flip":
        dim = args[1]
    whole = _dims(dim, len(own))
    if any([own[d] is not None for d in whole]):
        raise Coupled(name)
    if name in ("gather", "cat") and any([follow.cuts(x) != own for x in tensors]):
        raise Coupled(name)
    return own


def _permuted(own: Cuts, args: Any, x: Tensor, out: Tensor) -> Cuts:
    return tuple([own[d] for d in args[1]])


def _transposed(own: Cuts, args: Any, x: Tensor, out: Tensor) -> Cuts:
    order = list(range(len(own)))
    a, b = (args[1], args[2]) if len(args) > 2 else (0, -1)
    if order:
        order[a], order[b] = order[b], order[a]
    return tuple([own[d] for d in order])


def _unsqueezed(own: Cuts, args: Any, x: Tensor, out: Tensor) -> Cuts:
    at = args[1] % out.ndim
    return (*own[:at], None, *own[at:])


def _squeezed(own: Cuts, args: Any, x: Tensor, out: Tensor) -> Cuts:
    if len(args) < 2:
        raise Coupled("which dimensions go depends on sizes")
    gone = {d for d in _dims(args[1], len(own)) if x.shape[d] == 1}
    if any([own[d] is not None for d in _dims(args[1], len(own))]):
        raise Coupled("squeeze")
    return tuple([cut for d, cut in enumerate(own) if d not in gone])


def _expanded(own: Cuts, args: Any, x: Tensor, out: Tensor) -> Cuts:
    return (*([None] * (out.ndim - len(own))), *own)


def _sliced(own: Cuts, args: Any, x: Tensor, out: Tensor) -> Cuts:
    (at,) = _dims(args[1] if len(args) > 1 else 0, len(own))
    if own[at] is not None:
        raise Coupled("slice")
    return own


def _selected(own: Cuts, args: Any, x: Tensor, out: Tensor) -> Cuts:
    (at,) = _dims(args[1], len(own))
    if own[at] is not None:
        raise Coupled("select")
    return (*own[:at], *own[at + 1 :])


def _viewed(own: Cuts, args: Any, x: Tensor, out: Tensor) -> Cuts:
    """A cut dimension stays one if so many entries lie before it as before, and it has its size."""
    if not x.numel() or any([type(n) is not int for n in args[1]]):
        raise Coupled("view")
    cuts: list[int | None] = [None] * out.ndim
    for d, cut in enumerate(own):
        if cut is None:
            continue
        before, at, seen = x.shape[:d].numel(), 0, 1
        while at < out.ndim and (seen < before or (out.shape[at] == 1 and x.shape[d] != 1)):
            seen *= out.shape[at]
            at += 1
        if at == out.ndim or seen != before or out.shape[at] != x.shape[d]:
            raise Coupled("view")
        cuts[at] = cut
    return tuple(cuts)


#: Where the cuts of the results of operations are that move or take entries.
_VIEWS: dict[str, Callable[[Cuts, Any, Tensor, Tensor], Cuts]] = {
    "permute": _permuted,
    "transpose": _transposed,
    "t": _transposed,
    "unsqueeze": _unsqueezed,
    "squeeze": _squeezed,
    "expand": _expanded,
    "slice": _sliced,
    "select": _selected,
    "view": _viewed,
    "_unsafe_view": _viewed,
    "reshape": _viewed,
    "view_as_real": lambda own, args, x, out: (*own, None),
    "view_as_complex": lambda own, args, x, out: own[:-1],
}
