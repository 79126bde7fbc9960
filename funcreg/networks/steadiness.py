"""Whether dead channels are the same constants on other inputs: the forward pass is followed on some of them.

What a bias takes of a dead channel is one number. The forward may compute it with numbers of its run: a size, an
argument, what it reads from a tensor, whether it is training.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcreg.core.tree import tree_leaves, tree_map
from funcreg.networks.agreement import arguments
from funcreg.networks.flow import Flow
from funcreg.networks.tracing import Recording, record, refs_in
from funcreg.networks.variations import may_have, sizes_in, with_size

#: What reads a number from a tensor.
_READS = ("_local_scalar_dense", "item")


class _Run(NamedTuple):
    """Another run of a network."""

    what: str  # What is another one in it.
    inputs: Sequence[Any]  # Of which the network gets the first that it takes.
    training: bool = False
    weights: bool = False  # Whether parameters and buffers are others, too.


def unsteady(
    module: nn.Module, inputs: Any, flow: Flow, follow: Callable[[Recording], Flow], families: Sequence[Tensor]
) -> dict[int, str]:
    """The families whose dead channels are another constant in another run, by their numbers, and what it is there.

    Args:
        module: The network. It stays as it is.
        inputs: What it is called with.
        flow: What was found on them.
        follow: What finds the same in another run.
        families: For each family atoms of parameters in it, none for one that no constant matters to.
    """
    given = arguments(inputs)
    here = [_constants(flow, ids) for ids in families]
    numbers = any([type(x) in (int, float) for x in tree_leaves(given)]) or bool(_read(flow))
    due = [i for i, ids in enumerate(families) if len(ids) and (here[i] or numbers)]
    found: dict[int, str] = {}
    runs = [*_with_numbers(given, flow), *(_without_numbers(given) if any(here) else ())]
    for run in runs if due else ():
        other = _followed(module, run, follow)
        if other is None:
            continue
        for i in due:
            if i not in found and (wrong := _unlike(here[i], _constants(other, families[i]), run.training)):
                found[i] = f"a dead one is {wrong} {run.what}"
        if len(found) == len(due):
            break
    return found


def _constants(flow: Flow, ids: Tensor) -> dict[tuple[str, int] | None, float]:
    """What weights read from dead channels, by the weight and its dimension; not a number where no bias takes it."""
    sets, found = flow.atoms.find(ids), dict[Any, float]()
    for atoms, _, fold in flow.demands if len(ids) else ():
        if bool(torch.isin(flow.atoms.find(atoms), sets).any()):
            found[None if fold is None else (fold.weight, fold.dim)] = math.nan if fold is None else fold.constant
    return found


def _unlike(here: dict[Any, float], there: dict[Any, float], training: bool) -> str | None:
    """Constants that two runs do not share. In training dropout makes what is no constant of them."""
    for key in {**here, **there}:
        one, other = here.get(key, 0.0), there.get(key, 0.0)
        if training and (key not in there or math.isnan(other)):
            continue
        if math.isnan(one) != math.isnan(other) or abs(one - other) > 1e-6 * max(abs(one), abs(other)):
            return f"{_number(one)} here, and {_number(other)}"
    return None


def _number(x: float) -> str:
    return "no constant" if math.isnan(x) else f"{x:.4g}"


def _read(flow: Flow) -> list[bool]:
    """For each number that is read from a tensor whether it is one of parameters or buffers."""
    reads = [operation for operation in flow.recording.operations if operation.name in _READS]
    return [all([ref in flow.weights for ref in refs_in(list(operation.args))]) for operation in reads]


def _followed(module: nn.Module, run: _Run, follow: Callable[[Recording], Flow]) -> Flow | None:
    """What was found in another run, None if the network does not take it."""
    for inputs in run.inputs:
        with contextlib.suppress(ValueError), _scaled(module if run.weights else None):
            return follow(record(module, inputs, run.training))
    return None


@contextlib.contextmanager
def _scaled(module: nn.Module | None) -> Iterator[None]:
    """Parameters and buffers of a module at half of what they are."""
    several = [] if module is None else [*module.parameters(), *module.buffers()]
    before = [(x, x.detach().clone()) for x in several if x.is_floating_point()]
    try:
        with torch.no_grad():
            for x, _ in before:
                x.mul_(0.5)
        yield
    finally:
        with torch.no_grad():
            for x, old in before:
                x.copy_(old)


def _with_numbers(given: tuple[tuple[Any, ...], dict[str, Any]], flow: Flow) -> Iterator[_Run]:
    """Other runs of a network that takes or reads numbers, some of which it may not take."""
    leaves = tree_leaves(given)
    if any([type(x) is float for x in leaves]):
        yield _Run("with other numbers in its arguments", [tree_map(_other_number, given)])
    if any([type(x) is int for x in leaves]):
        yield _Run("with other whole numbers in its arguments", [tree_map(_other_count, given)])
    if (reads := _read(flow)) and not all(reads):
        yield _Run("with other values of its inputs", [tree_map(_other_values, given)])
    if any(reads):
        yield _Run("with other parameters and buffers", [given], weights=True)


def _without_numbers(given: tuple[tuple[Any, ...], dict[str, Any]]) -> Iterator[_Run]:
    """Other runs of any network."""
    yield _Run("in training", [given], training=True)
    for changes in _sizes([x for x in tree_leaves(given) if isinstance(x, Tensor)]):
        yield _Run("on inputs of other sizes", [tree_map(change, given) for change in changes])


def _other_number(x: Any) -> Any:
    return 0.5 * x + 0.25 if isinstance(x, float) else x


def _other_count(x: Any) -> Any:
    return x + 1 if type(x) is int else x


def _other_values(x: Any) -> Any:
    """Values of the same signs, and whole numbers that are nowhere larger, as indices may not be."""
    if not isinstance(x, Tensor) or x.dtype == torch.bool:
        return x
    return x * 0.5 if x.is_floating_point() or x.is_complex() else torch.where(x > 0, x // 2, x)


def _sizes(several: Sequence[Tensor]) -> Iterator[list[Callable[[Any], Any]]]:
    """Functions that give all tensors another size where they have one of today: twice it, or about half of it."""
    for dim, n in itertools.chain(*sizes_in(several)):
        news = [new for new in (2 * n, (n + 1) // 2) if new not in (0, n) and may_have(several, n, new)]
        yield [lambda x, dim=dim, n=n, new=new: with_size(x, dim, n, new) for new in news]
