"""Tensors that are sharded over processes: a rule on one leaf runs on the shard where it can, else on the whole.

A rule never sees a `DTensor`. Where it computes entry by entry along the dimensions that are cut, which `locality`
finds out, it runs on the local shards, and its result is a `DTensor` of the same placements. Where all that it does
across a cut is to sum, its sums are completed between processes. Else the leaf is gathered, the rule runs on the whole
in each process, and its result is cut again, which needs no communication. Sums of terms are one collective for all
leaves. What is done depends on shapes and placements alone, and so is the same in all processes.

Derivatives run through all of this, of `backward` and of `torch.func`, inside of which a `DTensor` does not show that
it is one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core.locality import Cuts, Result, Summed, completing, local_result, summed_result
from funcreg.core.tree import at_leaf
from funcreg.core.undocumented import is_batched, is_compiling, is_transformed, without_levels
from funcreg.core.wording import type_of


def _distributed() -> Any:
    """The module of sharded tensors, if the program has imported it."""
    return sys.modules.get("torch.distributed.tensor")


def is_sharded(x: Any) -> bool:
    """Whether something is a `DTensor`, also inside of `torch.func.grad`.

    In compiled code none is: there operations are on sharded tensors themselves.
    """
    if not isinstance(x, Tensor) or is_compiling():
        return False
    found = _distributed()
    return found is not None and isinstance(without_levels(x), getattr(found, "DTensor", ()))


def any_sharded(values: Sequence[Any]) -> bool:
    """Whether one of some values is a `DTensor`."""
    if is_compiling() or _distributed() is None:
        return False
    if not is_transformed(lambda: list(values)):  # None is inside of another tensor.
        return holds_sharded(values)
    return any([is_sharded(x) for x in values])


def holds_sharded(values: Sequence[Any]) -> bool:
    """`any_sharded` of values that no transform of `torch.func` wraps."""
    found = _distributed()
    return found is not None and any([isinstance(x, getattr(found, "DTensor", ())) for x in values])


class Layout(NamedTuple):
    """How a tensor is spread over processes."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size

    def cuts(self) -> set[int]:
        """The dimensions along which it is cut."""
        return {p.dim for p in self.placements if _cuts(p)}

    def pieces(self) -> int:
        """Into how many pieces it is cut."""
        return math.prod([self.mesh.size(i) for i in self.cutting()])

    def small(self) -> tuple[int, ...]:
        """Which of the sizes 0 and 1 some piece may have along a cut."""
        found: set[int] = set()
        for d in self.cuts():
            counts = [self.mesh.size(i) for i in self.cutting() if self.placements[i].dim == d]
            pieces, n = math.prod(counts), self.shape[d]
            most = -(-n // pieces)
            if len(counts) > 1:  # Cut twice: pieces may be smaller than of one cut by as much as a cut rounds up.
                found.update(range(max(0, n // pieces - 1), 2))
            elif n:
                rest = n - most * ((n - 1) // most)  # Of the last one that has any.
                found.update([size for size in (most, rest, 0) if size < 2 and (size or most * (pieces - 1) >= n)])
        return tuple(sorted(found))

    def strided(self) -> bool:
        """Whether pieces are laid otherwise than one after another, as of a dimension that is cut twice."""
        return any([_cuts(p) and type(p) is not _distributed().Shard for p in self.placements])

    def cutting(self) -> tuple[int, ...]:
        """The dimensions of the mesh over which it is cut."""
        return tuple(i for i, p in enumerate(self.placements) if _cuts(p))


def _cuts(placement: Any) -> bool:
    return hasattr(placement, "dim") and not placement.is_partial()


def layout(x: Tensor) -> Layout:
    """How a `DTensor` is spread; sums that are not yet made count as made."""
    x = without_levels(x)
    whole = _distributed().Replicate()
    placements = tuple(whole if p.is_partial() else p for p in _of(x).placements)
    return Layout(_of(x).device_mesh, placements, x.shape)


def _of(x: Any) -> Any:
    """A tensor that is known to be a `DTensor`, which types do not tell."""
    return x


def _later(placements: Sequence[Any]) -> tuple[Any, ...]:
    """Placements of a batch of such tensors, members first."""
    return tuple(_distributed().Shard(p.dim + 1) if _cuts(p) else p for p in placements)


# Crossing between a tensor and its shards


def _run(function: Any, x: Tensor, *args: Any) -> Tensor:
    """Call an autograd function, or what it computes alone where nothing is differentiated or batched."""
    if is_transformed(lambda: [x]) or _differentiated(x):
        return function.apply(x, *args)
    with torch.no_grad():
        return function.forward(x, *args)


class _Local(torch.autograd.Function):
    """The shard of this process. Its gradients are shards, of a sum where `summed` names dimensions of the mesh."""

    @staticmethod
    def forward(x: Any, placements: Any, summed: tuple[int, ...]) -> Tensor:
        moved = x if x.placements == placements else _contiguous(x).redistribute(placements=placements)
        return moved.to_local().detach()  # The shard itself may be what is returned.

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, placements, summed = inputs
        partial = _distributed().Partial()
        back = tuple(partial if i in summed else p for i, p in enumerate(placements))
        ctx.layout = Layout(_of(without_levels(x)).device_mesh, back, x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _run(_Wrapped, grads[0], ctx.layout), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        x, placements, summed = args
        return _run(_Local, x.movedim(in_dims[0], 0), _later(placements), summed), 0


def _dense(x: Tensor) -> Tensor:
    """With contiguous memory; autograd gives zeros without any, which torch 2.9 does not gather."""
    return x.contiguous() if x.data_ptr() or not x.numel() else x.clone()


def _contiguous(x: Any) -> Any:
    """A sharded tensor with contiguous shards, which torch 2.9 needs to gather them."""
    own = x.to_local()
    if own.is_contiguous():
        return x
    return _distributed().DTensor.from_local(
        own.contiguous(), x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )


class _Wrapped(torch.autograd.Function):
    """A sharded tensor of the shards in all processes."""

    @staticmethod
    def forward(x: Any, layout: Layout) -> Tensor:
        mesh, placements, shape = layout
        stride = torch.empty(shape, device="meta").stride()
        return _distributed().DTensor.from_local(
            _dense(x.detach()), mesh, placements, run_check=False, shape=shape, stride=stride
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        placements, copies = inputs[1].placements, _distributed().Replicate()
        ctx.placements = tuple(copies if p.is_partial() else p for p in placements)
        ctx.summed = tuple(i for i, p in enumerate(placements) if p.is_partial())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _run(_Local, grads[0], ctx.placements, ctx.summed), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        x, layout = args
        many = Layout(layout.mesh, _later(layout.placements), torch.Size((info.batch_size, *layout.shape)))
        return _run(_Wrapped, x.movedim(in_dims[0], 0), many), 0


class _Whole(torch.autograd.Function):
    """The whole of a sharded tensor, gathered in each process."""

    @staticmethod
    def forward(x: Any) -> Tensor:
        return _contiguous(x).full_tensor().detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.layout = layout(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _run(_Cut, grads[0], ctx.layout)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _run(_Whole, args[0].movedim(in_dims[0], 0)), 0


class _Cut(torch.autograd.Function):
    """A sharded tensor of what every process has as a whole; nothing is communicated."""

    @staticmethod
    def forward(x: Any, layout: Layout) -> Tensor:
        sharded = _distributed()
        mesh, placements, _ = layout
        copies = [sharded.Replicate()] * mesh.ndim
        whole = sharded.DTensor.from_local(_dense(x.detach()), mesh, copies, run_check=False)
        return whole.redistribute(placements=placements)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _run(_Whole, grads[0]), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        x, layout = args
        return _run(_Cut, x.movedim(in_dims[0], 0), layout._replace(placements=_later(layout.placements))), 0


class _Gathered(torch.autograd.Function):
    """The sum, or the maximum, over the processes along some dimensions of a mesh."""

    @staticmethod
    def forward(x: Any, mesh: Any, over: tuple[int, ...], op: str) -> Tensor:
        sharded = _distributed()
        placements = [sharded.Partial(op) if i in over else sharded.Replicate() for i in range(mesh.ndim)]
        return sharded.DTensor.from_local(_dense(x.detach()), mesh, placements, run_check=False).full_tensor()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, *ctx.how = inputs
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        mesh, over, op = ctx.how
        if op == "sum":
            return _run(_Entering, grads[0], mesh, over), None, None, None
        x, most = ctx.saved_tensors
        here = (x == most).to(x.dtype)
        return grads[0] * here / _run(_Gathered, here, mesh, over, "sum"), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _run(_Gathered, *args), in_dims[0]


class _Entering(torch.autograd.Function):
    """What all processes have alike, as it meets shards: its gradient is the sum of what each process finds."""

    @staticmethod
    def forward(x: Any, mesh: Any, over: tuple[int, ...]) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, *ctx.how = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _run(_Gathered, grads[0], *ctx.how, "sum"), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _run(_Entering, *args), in_dims[0]


def whole(x: Any) -> Any:
    """A sharded tensor gathered in each process; anything else as it is."""
    return _run(_Whole, x) if is_sharded(x) else x


#: What to do about sharded tensors, and about modules that have them.
_GATHER = "Gather them first, by w.full_tensor() in all processes"
_EARLIER = "Call it before fully_shard or parallelize_module, or on a module that loaded the whole state dict"


def check_whole_module(what: str, module: torch.nn.Module) -> None:
    """Raise an error for what is no module, and `check_whole` of its parameters."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module is {type_of(module)}; expected a torch.nn.Module")
    named = dict(module.named_parameters())
    check_whole(what, list(named), list(named.values()), _EARLIER)


def check_whole(what: str, names: Sequence[str], leaves: Sequence[Any], remedy: str = _GATHER) -> None:
    """Raise an error, in all processes alike, for a leaf that is sharded, where numbers of whole tensors are read."""
    for name, leaf in zip(names, leaves, strict=True):
        if is_sharded(leaf):
            raise TypeError(
                f"{what} got '{name}' as a sharded tensor (DTensor) with {layout(leaf).placements}; expected "
                f"tensors that every process has as a whole. {remedy}."
            )


def like(x: Tensor, leaf: Any) -> Tensor:
    """What every process has as a whole, sharded as a leaf is; as it is beside a leaf that is not sharded."""
    return _run(_Cut, x, layout(leaf)) if is_sharded(leaf) and not is_sharded(x) else x


def shard(x: Any) -> Any:
    """The shard of this process of a tensor that nothing is differentiated by; anything else as it is."""
    return x.to_local() if holds_sharded((x,)) else x


def of_shard(x: Any, layout: Layout | None) -> Any:
    """A sharded tensor of the shards in all processes; without a layout the tensor itself."""
    if layout is None:
        return x
    with torch.no_grad():
        return _Wrapped.forward(x, layout)


# Rules on one leaf


def apply(f: Callable[..., Any], row: Sequence[Any]) -> Any:
    """A rule of one leaf and what belongs to it, of which one at least is sharded."""
    made, found, spread = _compute(f, row)
    if spread is None or not isinstance(made, Tensor):
        return made
    if found is None:
        return _run(_Cut, made, spread) if made.shape == spread.shape else made
    return _run(_Wrapped, made, _spread_of(found, spread)) if made.ndim and any_cut(found) else made


def any_cut(found: Result) -> bool:
    """Whether a result is cut, and not the same in every process."""
    return any([cut is not None for cut in found.cuts])


def _compute(
    f: Callable[..., Any], row: Sequence[Any], entrywise: bool = False
) -> tuple[Any, Result | None, Layout | None]:
    """What a rule makes; of shards, with the result for the whole tensor, or of the whole, with None."""
    spread = layout(row[0]) if is_sharded(row[0]) else None
    if spread is not None:
        cuts = [_cuts_beside(x, spread) for x in row]
        if entrywise:
            return (
                f(*[_shard(x, own, spread) for x, own in zip(row, cuts, strict=True)]),
                Result(spread.shape, cuts[0]),
                spread,
            )
        # A dimension of one entry broadcasts as a whole, and not as a piece.
        fit = bool(spread.cuts()) and all([spread.shape[d] > 1 for d in spread.cuts()])
        found = local_result(f, row, cuts, spread.pieces(), spread.small()) if fit else None
        if found is not None and _placeable(found, spread):
            return f(*[_shard(x, own, spread) for x, own in zip(row, cuts, strict=True)]), found, spread
        summed = _summed(f, row, cuts, spread) if fit and found is None else None
        if summed is not None:
            shards = [_shard(x, own, spread) for x, own in zip(row, cuts, strict=True)]
            with completing(summed, lambda x, over: _total(x, over, spread)):
                return f(*shards), summed.result, spread
    return f(*[whole(x) for x in row]), None, spread


def _summed(f: Callable[..., Any], row: Sequence[Any], cuts: Sequence[Cuts], spread: Layout) -> Summed | None:
    """How a rule runs on shards if sums over processes complete its own; not where something differentiates it."""
    tensors = [x for x in row if isinstance(x, Tensor)]
    if is_transformed(lambda: tensors) or any(map(_differentiated, tensors)):
        return None
    found = summed_result(f, row, cuts, spread.pieces(), spread.small())
    if found is None:
        return None
    whole = not any_cut(found.result) and found.result.shape != spread.shape
    return found if whole or _placeable(found.result, spread) else None


def _total(x: Tensor, over: Cuts, spread: Layout) -> Tensor:
    """The sum over the processes between which some dimensions are cut."""
    return _run(
        _Gathered, x, spread.mesh, tuple([i for i in spread.cutting() if spread.placements[i].dim in over]), "sum"
    )


def _placeable(found: Result, spread: Layout) -> bool:
    """Whether a result is one number in every process, or is cut along all dimensions that the leaf is cut along."""
    cuts = [cut for cut in found.cuts if cut is not None]
    if not cuts:
        return math.prod(found.shape) == 1
    strided = spread.strided()
    same = len(found.cuts) == len(spread.shape) and all([cut in (None, d) for d, cut in enumerate(found.cuts)])
    return sorted(cuts) == sorted(spread.cuts()) and (same or not strided)


def _spread_of(found: Result, spread: Layout) -> Layout:
    """How a result of shards is spread."""
    placements = tuple(_moved(p, found.cuts.index(p.dim)) if _cuts(p) else p for p in spread.placements)
    return Layout(spread.mesh, placements, found.shape)


def _moved(placement: Any, dim: int) -> Any:
    return placement if placement.dim == dim else _distributed().Shard(dim)


def _cuts_beside(x: Any, spread: Layout) -> Cuts:
    """The cuts of a tensor that broadcasts against a leaf: those of the leaf where it has all of its entries."""
    if not isinstance(x, Tensor):
        return ()
    cuts, shift = spread.cuts(), len(spread.shape) - x.ndim
    if shift < 0 or (shift and spread.strided()):
        return (None,) * x.ndim
    return tuple(
        [d + shift if d + shift in cuts and n == spread.shape[d + shift] else None for d, n in enumerate(x.shape)]
    )


def _shard(x: Any, cuts: Cuts, spread: Layout) -> Any:
    """What a process needs of a leaf, or of what is beside it, to compute on its shard of the leaf."""
    if not isinstance(x, Tensor):
        return x
    sharded, shift = _distributed(), len(spread.shape) - x.ndim
    own: list[Any] = []
    for p in spread.placements:
        here = _cuts(p) and p.dim in cuts
        own.append(_moved(p, p.dim - shift) if here else sharded.Replicate())
    summed = tuple(i for i, p in enumerate(own) if _cuts(spread.placements[i]) and not _cuts(p))
    if is_sharded(x) and layout(x).mesh == spread.mesh:
        return _run(_Local, x, tuple(own), summed)
    x = whole(x)
    if any([_cuts(p) for p in own]):
        return _run(_Local, _run(_Cut, x, Layout(spread.mesh, tuple(own), x.shape)), tuple(own), summed)
    return _run(_Entering, x, spread.mesh, summed) if summed and _differentiated(x) else x


def _differentiated(x: Tensor) -> bool:
    return is_batched(x) or (torch.is_grad_enabled() and x.requires_grad)


# Sums over leaves


#: What is made of the terms of a leaf. The largest is of terms of at least 0: it is 0 if there are none.
OVER: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda terms: terms.sum(),
    "max": lambda terms: terms.amax() if terms.numel() else terms.sum(),
    "any": lambda terms: terms.any(),
}


def reduce(
    f: Callable[..., Tensor],
    rows: Sequence[Sequence[Any]],
    op: str,
    name: Callable[[int], str],
    entrywise: bool = False,
) -> list[Tensor]:
    """For each leaf the sum of the terms that a rule makes of it, or what else is over them; one collective for all.

    Args:
        f: Rule of one leaf and what belongs to it.
        rows: Arguments of the rule, a row for each leaf.
        op: What is made of the terms of a leaf, one of `OVER`.
        name: From the number of a leaf to what errors call it.
        entrywise: Whether the rule is known to make one term of each entry of a leaf.
    """
    results: list[Any] = [None] * len(rows)
    waiting: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        try:
            made, found, spread = _compute(f, row, entrywise)
            results[i] = OVER[op](made)
        except ValueError as error:
            raise ValueError(f"{at_leaf(name(i))}{error}") from error
        if found is not None and spread is not None and any_cut(found):
            waiting.setdefault((spread.mesh, spread.cutting(), results[i].dtype, results[i].device), []).append(i)
    for (mesh, over, _, _), places in waiting.items():
        own = torch.stack([results[i] for i in places])
        if op == "any":
            found = _run(_Gathered, own.to(torch.int32), mesh, over, "max") > 0
        else:
            found = _run(_Gathered, own, mesh, over, op)
        for i, one in zip(places, found.unbind(), strict=True):
            results[i] = one
    return results
