"""Families of groups that span leaves: where in each leaf a group lies, and its entries gathered to rows and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funcreg.core._typing import Params
from funcreg.core.masks import chosen_by, hidden, listed
from funcreg.core.ranges import flags
from funcreg.core.tree import tree_leaves, tree_paths
from funcreg.core.wrapping import matched


class Along(NamedTuple):
    """How the groups of a family lie in a leaf, where a dimension alone does not say it.

    The dimension counts `packed` blocks, in each of them every group, and of each group `size` entries.

    Args:
        dim: Dimension of the leaf along which the groups run.
        size: Number of consecutive entries that belong to one group: the pixels of a channel in a linear layer that
            comes after `Flatten`, the features of an attention head.
        packed: Number of blocks laid end to end, 3 where queries, keys and values share a matrix.
        penalized: Whether these entries are in the norm of their group. False for entries that a dead group leaves
            without use and that `remove_dead` takes with it, such as the inputs of a layer whose own outputs form
            groups.
        start: First entry of the dimension that the groups count, where they are a part of it: the channels of one of
            several layers whose outputs are laid side by side.
        stop: The entry after the last one; None for the end of the dimension.
        entries: The entries of each group, a tuple of them for each, where they follow no such order. They stand
            instead of `size`, `packed`, `start` and `stop`.
        constant: What a dead channel is where these entries, which are not penalized then, read it: 0.5 after a
            sigmoid. `remove_dead` adds this times their sum to the bias.
        bias: Name of the bias of the weight that these entries are of, a matrix or the kernel of a convolution.

    Example:
        The heads of `torch.nn.MultiheadAttention`, four of eight features:

        >>> attention = torch.nn.MultiheadAttention(32, 4)
        >>> heads = {"in_proj_weight": Along(0, size=8, packed=3), "in_proj_bias": Along(0, size=8, packed=3)}
        >>> heads["out_proj.weight"] = Along(1, size=8)
        >>> params = {name: torch.ones_like(w) for name, w in attention.named_parameters()}
        >>> coupled(group_lasso, heads)(params)  # Of 3 * 8 * 32 + 3 * 8 + 32 * 8 entries each.
        tensor(129.4913)

        The second and the third of the three columns, and groups in an order of their own:

        >>> coupled(group_lasso, {"w": Along(1, start=1)})({"w": torch.tensor([[9.0, 3.0, 1.0], [9.0, 4.0, 0.0]])})
        tensor(6.)
        >>> coupled(group_lasso, {"w": Along(0, entries=((0, 2), (1, 3)))})({"w": torch.tensor([3.0, 1.0, 4.0, 0.0])})
        tensor(6.)
    """

    dim: int
    size: int = 1
    packed: int = 1
    penalized: bool = True
    start: int = 0
    stop: int | None = None
    entries: tuple[tuple[int, ...], ...] | None = None
    constant: float = 0.0
    bias: str | None = None

    def __repr__(self) -> str:
        given = [
            f", {name}={getattr(self, name)!r}"
            for name, default in self._field_defaults.items()
            if getattr(self, name) != default
        ]
        return f"Along({self.dim!r}{''.join(given)})"


torch.serialization.add_safe_globals([Along])  # A family may be saved beside the parameters that it is for.

#: Where the groups of a family lie in a leaf; a tuple if in several places of it.
Where: TypeAlias = int | Along | tuple[int | Along, ...]
#: From the dotted names of the leaves of a family to the dimension along which its groups run.
Family: TypeAlias = dict[str, Where]
#: Families of groups, or a function that makes them from parameters.
Groups: TypeAlias = Family | Sequence[Family] | Callable[[Params], Family | Sequence[Family]]


class Place(NamedTuple):
    """Where the groups of a family lie in one leaf."""

    leaf: int  # Its number among the leaves.
    along: Along


def parts(where: Where) -> list[Along]:
    """What a family says of a leaf, as a list of `Along`."""
    several: Any = where if isinstance(where, tuple) and not isinstance(where, Along) else (where,)
    made: list[Any] = [
        Along(each) if isinstance(each, int) and not isinstance(each, bool) else each for each in several
    ]
    return made


def families_of(found: Any) -> list[list[tuple[str, Along]]]:
    """Families as lists of names and places, or an error if there is none, or one that penalizes nothing."""
    families = [found] if isinstance(found, dict) else found
    if not isinstance(families, (list, tuple)) or not all([isinstance(family, dict) for family in families]):
        raise TypeError(f"groups is {found!r}; expected a dict from names of leaves to dimensions, or a list of them")
    if not families:
        raise ValueError("groups has no family, so that nothing would be penalized; expected at least one")
    made = [[(name, along) for name, where in family.items() for along in _checked(name, where)] for family in families]
    for i, family in enumerate(made):
        if not any([along.penalized for _, along in family]):
            names = ", ".join(dict.fromkeys([name for name, _ in family]))
            what = f"names only leaves that are not penalized: {names}" if family else "names no leaf"
            raise ValueError(f"family {i} of groups {what}; expected one that is penalized, or the family left out")
    return made


def _checked(name: Any, where: Any) -> list[Along]:
    found = parts(where)
    if not isinstance(name, str) or not found or not all([isinstance(along, Along) for along in found]):
        raise TypeError(f"groups maps {name!r} to {where!r}; expected the name of a leaf, and an int or an Along")
    for along in found:
        flags(penalized=along.penalized)
        if along.size < 1 or along.packed < 1:
            raise ValueError(f"at leaf '{name}': groups has {along}; expected a size and packed blocks of at least 1")
        if along.start < 0 or (along.stop is not None and along.stop <= along.start):
            raise ValueError(f"at leaf '{name}': groups has {along}; expected a start of at least 0 and a later stop")
        if along.entries is not None:
            _check_entries(name, along, along.entries)
        if (along.constant != 0) != (along.bias is not None) or (along.constant != 0 and along.penalized):
            raise ValueError(
                f"at leaf '{name}': groups has {along}; expected a constant with the bias that takes it, of entries "
                "that are not penalized"
            )
    return found


def _check_entries(name: str, along: Along, groups: tuple[tuple[int, ...], ...]) -> None:
    said = f"at leaf '{name}': groups has {along}; expected"
    if along != along._replace(size=1, packed=1, start=0, stop=None):
        raise ValueError(f"{said} entries, or what says them by their order, and not both")
    if len({len(group) for group in groups}) != 1 or not all(groups):
        raise ValueError(f"{said} as many entries in each group, at least one")
    if len({entry for group in groups for entry in group}) < len(groups) * len(groups[0]):
        raise ValueError(f"{said} no entry twice")


def _entries(along: Along, length: int) -> Sequence[int]:
    """The entries of a dimension of some length that belong to groups."""
    if along.entries is not None:
        return [entry for group in along.entries for entry in group]
    return range(along.start, length if along.stop is None else along.stop)


def _known(names: list[str], leaves: list[Any]) -> str:
    """What errors say of the leaves that there are, and why they may be others than those of a module."""
    known = f"the leaves are {listed(names)}"
    if not any([isinstance(leaf, Tensor) for leaf in leaves]):
        return f"{known}. Of a module give the tree of its parameters and buffers: with_buffers(module)"
    if all(["params" in name.split(".") for name in names]):
        return f"{known}. Parameters of an optimizer have no names without module=, the module of them"
    return (
        f"{known}. Parameters that are frozen or that an optimizer was not given are no leaves there: leave their "
        "layers out, as by channel_groups(..., layers=...), or give them as well"
    )


def places_of(groups: Groups, params: Params) -> list[list[Place]]:
    """Where the groups of each family lie, or an error that names the leaf that has not the groups of its family."""
    names, leaves = tree_paths(params), tree_leaves(params)
    numbers = {name: i for i, name in enumerate(names)}
    if not leaves:
        return []
    masked = hidden(params)
    places: list[list[Place]] = []
    families = families_of(chosen_by(groups, params, "groups")[0])
    called = [name for family in families for where in family for name in (where[0], where[1].bias) if name is not None]
    called = tuple(dict.fromkeys(called))
    own = dict(zip(called, matched(called, tuple(names)), strict=True))  # Wrappers of the module may have come or gone.
    for family in families:
        found: list[Place] = []
        for name, along in family:
            if own[name] in numbers:
                bias = None if along.bias is None else own[along.bias]
                found.append(Place(numbers[own[name]], along if bias == along.bias else along._replace(bias=bias)))
            elif along.penalized and not masked:
                raise ValueError(f"groups names '{name}', which is no leaf; {_known(names, leaves)}")
        counts = [_count(names[leaf], leaves[leaf], along) for leaf, along in found]
        for (leaf, along), count in zip(found, counts, strict=True):
            if count != counts[0]:
                raise ValueError(
                    f"leaf '{names[leaf]}' of shape {tuple(leaves[leaf].shape)} has {count} groups by {along}, and "
                    f"'{names[found[0].leaf]}' has {counts[0]}; the leaves of a family have the same groups"
                )
        places.append(found)
    if masked and not any([place.along.penalized for found in places for place in found]):
        raise ValueError(
            f"groups names no leaf that a mask or freeze has left: those are {listed(names)}. The penalty would "
            "have no effect. Is the mask the wrong way round?"
        )
    return places


def _count(name: str, leaf: Tensor, along: Along) -> int:
    """The number of groups in a leaf."""
    if not -leaf.ndim <= along.dim < leaf.ndim:
        raise ValueError(f"at leaf '{name}': its shape {tuple(leaf.shape)} has no dimension {along.dim}")
    length, share = leaf.shape[along.dim], along.size * along.packed
    if along.entries is not None:
        if not all([0 <= entry < length for entry in _entries(along, length)]):
            raise ValueError(
                f"at leaf '{name}': dimension {along.dim} of shape {tuple(leaf.shape)} has no such entries as {along}"
            )
        return len(along.entries)
    if along.start >= length or (along.stop or 0) > length:
        raise ValueError(f"at leaf '{name}': dimension {along.dim} of shape {tuple(leaf.shape)} ends before {along}")
    if len(_entries(along, length)) % share:
        what = "" if (along.start, along.stop) == (0, None) else f"from {along.start} to {along.stop or length} "
        raise ValueError(
            f"at leaf '{name}': dimension {along.dim} of shape {tuple(leaf.shape)} {what}is no multiple of {share}, "
            f"as {along} needs it to be"
        )
    return len(_entries(along, length)) // share


def overlapping(leaf: Tensor, places: Sequence[Along]) -> bool:
    """Whether some entries of a leaf lie in two of several places."""
    for one, other in combinations(places, 2):
        if one.dim % leaf.ndim != other.dim % leaf.ndim:
            return True
        length = leaf.shape[one.dim]
        a, b = _entries(one, length), _entries(other, length)
        if isinstance(a, range) and isinstance(b, range):
            if max(a.start, b.start) < min(a.stop, b.stop):
                return True
        elif set(a) & set(b):
            return True
    return False


def _covers(leaf: Tensor, along: Along) -> bool:
    """Whether the groups are all of the leaf, in their order."""
    return along.entries is None and along.start == 0 and along.stop in (None, leaf.shape[along.dim])


def _chosen(along: Along, device: torch.device) -> Tensor:
    return torch.tensor(_entries(along, 0), device=device)


def _front(leaf: Tensor, along: Along) -> Tensor:
    """The part of a leaf that groups are in, their dimension in front."""
    front = leaf.movedim(along.dim, 0)
    if along.entries is not None:
        return front.index_select(0, _chosen(along, leaf.device))
    return front if _covers(leaf, along) else front[along.start : along.stop]


def _blocks(leaf: Tensor, along: Along) -> tuple[int, int]:
    """The number of blocks, and of groups in each of them."""
    if along.entries is not None:
        return 1, len(along.entries)
    return along.packed, len(_entries(along, leaf.shape[along.dim])) // (along.size * along.packed)


def count_of(leaf: Tensor, along: Along) -> int:
    """The number of groups that have entries in a leaf."""
    return _blocks(leaf, along)[1]


def gather(leaf: Tensor, along: Along) -> Tensor:
    """A leaf as a matrix, the entries of a group in each row."""
    (packed, count), width = _blocks(leaf, along), width_of(leaf, along)
    return _front(leaf, along).reshape(packed, count, width // packed).movedim(1, 0).reshape(count, width)


def scatter(rows: Tensor, base: Tensor, along: Along) -> Tensor:
    """A leaf with what `gather` made a matrix of in its place, and of `base` what is in no group."""
    (packed, count), width = _blocks(base, along), width_of(base, along)
    shape = list(base.movedim(along.dim, 0).shape)
    shape[0] = len(_entries(along, shape[0]))
    front = rows.reshape(count, packed, width // packed).movedim(1, 0).reshape(shape)
    if _covers(base, along):
        return front.movedim(0, along.dim)
    whole = base.movedim(along.dim, 0)
    if along.entries is not None:
        made = whole.index_copy(0, _chosen(along, base.device), front)
    else:
        made = torch.cat([whole[: along.start], front, whole[along.start + shape[0] :]])
    return made.movedim(0, along.dim)


def width_of(leaf: Tensor, along: Along) -> int:
    """The number of entries of a group in a leaf."""
    dims = leaf.movedim(along.dim, 0).shape
    each = along.size * along.packed if along.entries is None else len(along.entries[0])
    return each * math.prod(dims[1:])


def within(alive: Tensor, leaf: Tensor, along: Along) -> Tensor:
    """For each entry of the dimension whether it stays, once only these groups do; what is in no group stays."""
    length = leaf.shape[along.dim]
    size = len(along.entries[0]) if along.entries is not None else along.size
    here = alive[None, :, None].expand(along.packed, -1, size).reshape(-1)
    stays = torch.ones(length, dtype=torch.bool)
    stays[torch.tensor(_entries(along, length))] = here
    return stays


def grouped_matrices(groups: Groups, params: Params) -> list[tuple[list[str], list[Tensor]]]:
    """For each family the names of its penalized leaves, and these as matrices with a group in each row."""
    names, leaves = tree_paths(params), tree_leaves(params)
    found = [[place for place in family if place.along.penalized] for family in places_of(groups, params)]
    return [
        ([names[leaf] for leaf, _ in family], [gather(leaves[leaf], along) for leaf, along in family])
        for family in found
    ]
