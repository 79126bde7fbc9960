"""Other runs of a network, on inputs like those that are given, which may tell what these do not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from funcreg.core.leafwise import widen
from funcreg.core.tree import tree_leaves, tree_map
from funcreg.networks.agreement import Agreement, Exchange, arguments

#: How many other inputs there are at least and at most, and how many entries a tensor among them may have.
_LEAST, _MOST, _ENTRIES = 8, 48, 1 << 12
#: Bytes up to which tensors are copied, and what is read by all runs together where these are more than a few.
_COPIED, _READ, _LEAVES = 1 << 31, 1 << 33, 1 << 14


def other_runs(module: nn.Module, inputs: Any, lengths: Sequence[int] = ()) -> Iterator[Iterator[Agreement]]:
    """What a network gives in other runs: for each of them in several ways, as far as it takes it.

    It computes with weights of usual size first, for its own may hide what differs: a last layer that begins at zero, a
    scale of 1e-5. All of it is on the CPU, where an index that is out of range is an error and no more.

    Args:
        module: The network.
        inputs: What it is called with.
        lengths: Sizes that inputs are to have, too.
    """
    leaves = [*module.parameters(), *module.buffers()]
    bytes_read = sum([x.nbytes for x in leaves if _is_dense(x)])
    large, runs = (
        bytes_read > _COPIED,
        max(_LEAST, min(_MOST, _READ // max(1, bytes_read), _LEAVES // max(1, len(leaves)))),
    )
    if large and any([x.device.type != "cpu" for x in leaves]):
        return
    factors = {} if large else {name: _factor(w) for name, w in module.named_parameters() if w.is_floating_point()}
    usual = lambda name, x: widen(x.to("cpu")) * factors.get(name, 1.0) if x.is_floating_point() else x.to("cpu")
    wide = lambda name, x: widen(x.to("cpu")) if x.is_floating_point() else x.to("cpu")
    ways: list[tuple[Exchange | None, Callable[[Any], Any]]] = [(None, lambda x: x)]
    if not large:
        ways = [(usual, widened), (wide, widened), (lambda name, x: x.to("cpu"), lambda x: x)]
    here = tree_map(lambda x: x.to("cpu") if isinstance(x, Tensor) else x, arguments(inputs))
    for other in itertools.islice(inputs_like(here, lengths), runs):
        yield _agreements(module, [(exchange, change(other)) for exchange, change in ways])


def _agreements(module: nn.Module, ways: Sequence[tuple[Exchange | None, Any]]) -> Iterator[Agreement]:
    for exchange, inputs in ways:
        try:
            agreement = Agreement(module, inputs, exchange)
        except ValueError:  # It takes no such inputs.
            continue
        if not any([bool(x.isnan().any()) for x in agreement.expected]):
            yield agreement


def _is_dense(x: Any) -> bool:
    """Whether this is a tensor that can be cut: a sparse one, such as the matrix of a graph, stays as it is."""
    return isinstance(x, Tensor) and x.layout == torch.strided


def widened(inputs: Any) -> Any:
    """Inputs in float32 where they have sixteen bits: rounding would hide what outputs are to tell."""
    return tree_map(lambda x: widen(x) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def _factor(w: Tensor) -> float:
    """What makes the entries of a parameter that are not zero of usual size, so that sums of them are, too."""
    w = w.detach().float()
    count = int(w.count_nonzero())
    size = float(w.square().sum()) ** 0.5
    return (count / max(1, w[0].numel() if w.ndim > 1 else 1)) ** 0.5 / size if size else 1.0


def other_sizes(inputs: Any) -> Iterator[Any]:
    """Inputs of other sizes, each of them twice as large or half as large: longer ones, and other images.

    Dimensions of one entry have two first, as a single step may hide a width. Inputs of thousands of entries are made
    no larger.
    """
    given = arguments(inputs)
    several = list(filter(_is_dense, tree_leaves(given)))
    for some in sizes_in(several):
        news = [(only, n, new) for only, n in some for new in (2 * n, (n + 1) // 2) if new != n]
        for only, n, new in sorted(news, key=lambda each: (each[1] > 1, each[2] < each[1])):
            change = lambda x, only=only, n=n, new=new: with_size(x, only, n, new)
            small = all([change(x.to("meta")).numel() <= max(_ENTRIES, x.numel()) for x in several])
            if small and may_have(several, n, new):
                yield tree_map(change, given)


def inputs_like(inputs: Any, lengths: Sequence[int] = ()) -> Iterator[Any]:
    """The inputs themselves, larger numbers, other entries, and other sizes, of entries that are drawn from theirs."""
    yield inputs
    if any([isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves(inputs)]):
        yield tree_map(lambda x: 100 * x if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
    yield tree_map(_drawn, inputs)
    changes = list(_sizes(list(filter(_is_dense, tree_leaves(inputs))), lengths))
    for anew in (_drawn, lambda x: x):
        for change in changes:
            yield tree_map(lambda x, anew=anew, change=change: anew(change(x)), inputs)


#: A size, and the only dimension that is to have another one, None for all that have it.
_Place: TypeAlias = tuple[int | None, int]


def sizes_in(several: Sequence[Tensor]) -> tuple[list[_Place], list[_Place]]:
    """The sizes of tensors, and their dimensions of sizes that come more than once.

    Dimensions of one size may be the same thing, as the positions of words and of a mask, or not.
    """
    places = dict.fromkeys([(dim, n) for x in several for dim, n in enumerate(x.shape) if n])
    alike = dict.fromkeys([(None, n) for _, n in places])
    return [*alike], [(dim, n) for dim, n in places if len([m for _, m in places if m == n]) > 1]


def may_have(several: Sequence[Tensor], n: int, new: int) -> bool:
    """Whether tensors may get another size: a larger one on the CPU alone, where an index out of range is an error.

    Elsewhere it may end the process. Two in place of one is less than any table of positions has.
    """
    return new <= max(2, n) or all([x.device.type == "cpu" for x in several])


def _sizes(several: Sequence[Tensor], lengths: Sequence[int]) -> Iterator[Callable[[Any], Any]]:
    """Functions that give all tensors another size where they have one of today, or only along one dimension."""
    alike, apart = sizes_in(several)
    longer = lambda n: sorted({2 * n, *[length for length in lengths if length > n]}, reverse=True)
    news = [[(only, n, new) for new in (*longer(n), (n + 1) // 2) if new != n] for only, n in (*alike, *apart)]
    for only, n, new in [each for some in itertools.zip_longest(*news) for each in some if each is not None]:
        made = lambda x, only=only, n=n, new=new: with_size(x, only, n, new)
        if all([made(x.to("meta")).numel() <= max(_ENTRIES, 4 * x.numel()) for x in several]):
            yield made


def with_size(x: Any, only: int | None, n: int, new: int) -> Any:
    """A tensor whose entries come again, or some of which are left out, along dimensions of a size."""
    if _is_dense(x):
        for dim in [dim for dim, size in enumerate(x.shape) if size == n and only in (None, dim)]:
            x = torch.cat([x] * -(-new // n), dim).narrow(dim, 0, new)
    return x


def _drawn(x: Any) -> Any:
    """Entries that are drawn from those of a tensor, so that an index is none that is larger."""
    if not _is_dense(x) or not x.numel():
        return x
    places = torch.randint(x.numel(), x.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return x.reshape(-1)[places]
