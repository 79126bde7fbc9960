"""Whether a rule on a whole tensor may be computed on pieces of it, found by running the rule on shapes alone.

A tensor is cut along some of its dimensions. A rule that computes entry by entry along these may run on each piece; one
that sums, sorts or differences along them may not. The rule is run on tensors without memory, at the size of the
whole and at two other sizes along the cuts. Each operation says where in its result the cuts are, or couples entries
across a cut, or is not known; and runs that differ in an operation or a number show a rule that depends on the size of
what it gets. No memory and no number is read: every process finds the same.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.undocumented import tracing_tools

#: For each dimension of a tensor, what names the cut along it, or None. Tensors with equal cuts have pieces that fit.
Cuts = tuple[Any, ...]


class Result(NamedTuple):
    """What a rule makes of a whole tensor: its shape, and where it is cut if its arguments are."""

    shape: torch.Size
    cuts: Cuts


class Coupled(Exception):
    """An operation couples entries across a cut, or it is not known whether it does."""


def local_result(f: Callable[..., Any], row: Sequence[Any], cuts: Sequence[Cuts], pieces: int = 2) -> Result | None:
    """What a rule that may run on pieces makes of whole tensors; None for a rule that may not.

    Args:
        f: Rule of tensors and other arguments.
        row: The arguments.
        cuts: The cuts of each of them; empty for what is no tensor.
        pieces: Into how many pieces they are cut.
    """
    key = _key((f, *row)), tuple(cuts), pieces
    try:
        if key in _known:
            return _known[key]
    except TypeError:  # Something in it has no hash.
        return _found(f, row, cuts, pieces)
    if len(_known) > 10_000:
        _known.clear()
    _known[key] = found = _found(f, row, cuts, pieces)
    return found


_known: dict[Any, Result | None] = {}


def _found(f: Callable[..., Any], row: Sequence[Any], cuts: Sequence[Cuts], pieces: int) -> Result | None:
    found = local_results(lambda *row: [f(*row)], row, cuts, pieces)
    return None if found is None else found[0]


def local_results(
    f: Callable[..., Sequence[Any]], row: Sequence[Any], cuts: Sequence[Cuts], pieces: int
) -> list[Result] | None:
    """`local_result` of a function with several results, which is not kept. A cut dimension of one entry gets more."""
    sizes = [lambda n: n if n > 1 else 3, lambda n: max(n, 3) + 1, lambda n: max(2, -(-n // pieces))]
    runs: list[tuple[list[Result], list[Any]]] = []

    def run() -> None:
        with suppress(Exception):  # It needs memory, or the size is wrong: on the whole the rule will show its error.
            runs.extend([_run(f, row, cuts, size) for size in sizes])

    # A thread has none of the modes and transforms that are at work here, whose tensors would hide those of the run.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if len(runs) < len(sizes):
        return None
    first, record = runs[0]
    where = [result.cuts for result in first]
    return first if all([[r.cuts for r in others] == where and own == record for others, own in runs]) else None


def _run(
    f: Callable[..., Any], row: Sequence[Any], cuts: Sequence[Cuts], size: Callable[[int], int]
) -> tuple[list[Result], list[Any]]:
    """A function run on shapes that have other sizes along the cuts, and what it did."""
    follow = _follower()
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
    return found, follow.record


def _follower() -> Any:
    """A mode that follows cuts through operations."""
    mode, _ = tracing_tools()

    class Follow(mode):
        def __init__(self) -> None:
            super().__init__()
            self.record: list[Any] = []
            self._cuts: dict[int, Cuts] = {}
            self._kept: list[Tensor] = []  # So that no id is given twice.

        def mark(self, x: Tensor, cuts: Cuts) -> None:
            self._cuts[id(x)] = tuple(cuts)
            self._kept.append(x)

        def cuts(self, x: Tensor) -> Cuts:
            return self._cuts.get(id(x), (None,) * x.ndim)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            name = func.overloadpacket.__name__
            moves = name in _VIEWS
            self.record.append((func, None if moves else tuple(map(_plain, (*args, *kwargs.values())))))
            made = out if isinstance(out, (tuple, list)) else (out,)
            for x in made:
                if isinstance(x, Tensor):
                    self.mark(x, _cuts_of(self, func, name, args, kwargs, x))
            return out

    return Follow()


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
        return _reduced(own, args, kwargs, out)
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


def _reduced(own: Cuts, args: Any, kwargs: Any, out: Tensor) -> Cuts:
    given = kwargs.get("dim", args[1] if len(args) > 1 else None)
    gone = _dims(given, len(own)) if given is not None and given != [] else set(range(len(own)))
    if any([own[d] is not None for d in gone]):
        raise Coupled("a sum over a cut")
    return own if out.ndim == len(own) else tuple([cut for d, cut in enumerate(own) if d not in gone])


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
