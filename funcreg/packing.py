"""A recorded step cut into few kernels: leaves that are treated alike are computed with as one.

Most of a step happens to each leaf by itself: its gradient, its moments and its decay meet only each other and
scalars. That private computation is the *home* of the leaf. Homes that are alike, operation for operation, form a
group. If all operations of a group are elementwise, shapes do not matter: leaves lie end to end in flat buffers, and
one kernel serves all of them. If some are not (norms of rows, factors of matrices), leaves of one shape are stacked,
and the home is mapped over the stack; if its code is long and all of rows, groups that differ in sizes alone are
*kin*, and one code serves them. What belongs to no home (counters, schedules, bias corrections, a global norm) is
scalar arithmetic, computed once and handed to the kernels: inside of them it would be computed for each entry.

A kernel may need a scalar that another kernel makes, as clipping by a global norm does. Hence stages: the scalars of a
stage, then its kernels. Of an earlier stage a kernel sees scalars only; all else it computes again from its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from funcreg.recording import Node, Record, Value, constant

_aten = torch.ops.aten
_LIKE = {_aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default, _aten._to_copy.default}
#: Of some dimensions of their argument, which keep their place.
_OF_ROWS = {_aten.sum.dim_IntList, _aten.mean.dim, _aten.amax.default, _aten.amin.default}

#: What a value belongs to: a home, by one of its leaves; "many" homes; None if only what is shared made it.
_Owner = int | Literal["many"] | None


@dataclass
class Home:
    """The private computation of a leaf, or of leaves that meet."""

    leaves: list[int] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    writes: list[tuple[Value, Value]] = field(default_factory=list)  # The input whose place it takes, and the value.
    exports: list[Value] = field(default_factory=list)  # Scalars, mostly, that are needed outside.


@dataclass
class Group:
    """Homes that are alike, in one kernel."""

    homes: list[Home]
    flat: bool
    summed: bool = False  # Whether exports are wanted only as sums over all homes.
    kin: bool = False  # Whether another group differs from it in nothing but sizes, and one code is to serve both.

    @property
    def stacked(self) -> bool:
        """Whether its homes are computed with side by side, each a row of a stack."""
        return not self.flat and (self.kin or len(self.homes) > 1)

    @property
    def first(self) -> Home:
        """The home that stands for all."""
        return self.homes[0]


@dataclass
class Packing:
    """A record as groups, and what remains."""

    groups: list[Group]
    scalars: list[Node]  # In their order.
    loose: dict[int, Value]  # Outputs that no group writes, by position.
    stages: dict[Value, int]
    sums: set[Value]  # Stacks of scalars that are only summed.


def pack(found: Record, params: int, gradients: int, written: Sequence[Value | None]) -> Packing:
    """Groups and stages of a recorded step.

    Args:
        found: Its inputs are parameters, then gradients, then all else.
        params: Number of parameters.
        gradients: Number of gradients: as many, or none.
        written: For each output the input whose place it takes, or that it is like; None for one that is like none.
    """
    users: dict[Value, list[Node]] = {}
    for node in found.nodes:
        for value in node.inputs:
            users.setdefault(value, []).append(node)
    sums = {node.outputs[0] for node in found.nodes if _only_summed(node, users)}
    owner = _owners(found, params, gradients, written)
    groups = _groups(_homes(found, owner, params, written, users), owner, users, sums)
    alone = [group.first for group in groups if not group.flat and not group.stacked]
    if _hand_out_scalars(found, alone, owner):
        groups = _groups(_homes(found, owner, params, written, users), owner, users, sums)
    loose = {
        i: value
        for i, (value, place) in enumerate(zip(found.outputs, written, strict=True))
        if not _writes(owner, value, place)
    }
    scalars = [node for node in found.nodes if not isinstance(owner[node.outputs[0]], int)]
    return Packing(groups, scalars, loose, _stages(found, owner), sums)


def _only_summed(node: Node, users: dict[Value, list[Node]]) -> bool:
    """Whether a node stacks scalars, and all that becomes of the stack is its sum."""
    if node.op is not _aten.stack.default or any([value.shape for value in node.inputs]):
        return False
    return all([user.op is _aten.sum.default for user in users.get(node.outputs[0], ())])


# Homes


def _owners(found: Record, params: int, gradients: int, written: Sequence[Value | None]) -> dict[Value, _Owner]:
    parent = list(range(params))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    owner: dict[Value, _Owner] = dict.fromkeys(found.inputs)
    owner.update((value, None) for value, _ in found.captured)
    owner.update((value, i % params) for i, value in enumerate(found.inputs[: params + gradients]))
    for node in found.nodes:
        large: set[int] = set()
        small: set[int] = set()
        many = False
        for value in node.inputs:
            mine = owner[value]
            if isinstance(mine, int):
                (large if value.shape else small).add(root(mine))
            elif mine is not None:
                many = True
        made: _Owner = None
        if large:
            made, *others = sorted(large)
            for other in others:  # Leaves that meet live together.
                parent[other] = made
        elif len(small) == 1:
            (made,) = small
        elif small or many:
            made = "many"
        for value in node.outputs:
            owner[value] = made
    for value, mine in owner.items():
        if isinstance(mine, int):
            owner[value] = root(mine)
    _claim(found, owner, written)
    return owner


def _claim(found: Record, owner: dict[Value, _Owner], written: Sequence[Value | None]) -> None:
    """Give to a home what only it uses, such as the moments of its leaf."""
    used: dict[Value, set[_Owner]] = {}
    for value, place in zip(found.outputs, written, strict=True):
        if place is not None and isinstance(owner[value], int) and value.shape == place.shape:
            used.setdefault(place, set()).add(owner[value])
    for node in reversed(found.nodes):
        mine = owner[node.outputs[0]]
        if mine is None and all([value.shape for value in node.outputs]):
            mine = _only([by for value in node.outputs for by in used.get(value, ())])
            owner.update((value, mine) for value in node.outputs)
        for value in node.inputs:
            used.setdefault(value, set()).add(mine)
    for value in [*found.inputs, *(value for value, _ in found.captured)]:
        if owner[value] is None:
            owner[value] = _only(used.get(value, ()))


def _only(owners: Iterable[_Owner]) -> int | None:
    """The home among owners, if they are one."""
    found = set(owners)
    mine = found.pop() if len(found) == 1 else None
    return mine if isinstance(mine, int) else None


def _writes(owner: dict[Value, _Owner], value: Value, place: Value | None) -> bool:
    """Whether a home writes an output in the place of an input of its own."""
    # What has no dimensions is not written by kernels: compiled code loses it, if it is of float64.
    if place is None or not place.shape or (value.shape, value.dtype) != (place.shape, place.dtype):
        return False
    mine = owner[value]
    return isinstance(mine, int) and owner[place] == mine


def _homes(
    found: Record,
    owner: dict[Value, _Owner],
    params: int,
    written: Sequence[Value | None],
    users: dict[Value, list[Node]],
) -> list[Home]:
    homes: dict[_Owner, Home] = {}
    seen: set[Value] = set()
    wanted: set[Value] = set()
    for i in range(params):
        homes.setdefault(owner[found.inputs[i]], Home()).leaves.append(i)
    for value, place in zip(found.outputs, written, strict=True):
        if place is not None and _writes(owner, value, place):
            homes[owner[value]].writes.append((place, value))
        else:
            wanted.add(value)

    def takes(value: Value) -> None:
        if value.node is None and value not in seen and isinstance(owner[value], int):
            seen.add(value)
            homes[owner[value]].inputs.append(value)

    for node in found.nodes:
        if isinstance(owner[node.outputs[0]], int):
            homes[owner[node.outputs[0]]].nodes.append(node)
        for value in node.inputs:
            takes(value)
    for home in homes.values():
        for place, value in home.writes:
            takes(place)
            takes(value)
        for value in (*home.inputs, *(value for node in home.nodes for value in node.outputs)):
            outside = [True for node in users.get(value, ()) if owner[node.outputs[0]] != owner[value]]
            if outside or value in wanted:
                home.exports.append(value)
    return [home for home in homes.values() if home.writes or home.exports]


def _hand_out_scalars(found: Record, homes: list[Home], owner: dict[Value, _Owner]) -> bool:
    """Give the scalar arithmetic of homes that have no like to the scalars; whether there was any."""
    before = dict(owner)
    for home in homes:
        if found.inputs[home.leaves[0]].shape:
            for node in home.nodes:
                if not any([value.shape for value in (*node.inputs, *node.outputs)]):
                    owner.update((value, "many") for value in node.outputs)
            owner.update((value, None) for value in home.inputs if not value.shape)
    return owner != before


# Groups


def _groups(
    homes: list[Home], owner: dict[Value, _Owner], users: dict[Value, list[Node]], sums: set[Value]
) -> list[Group]:
    alike: dict[Any, list[Home]] = {}
    for home in homes:
        key = _description(home, users, sums) if _flat(home, owner) else _description(home)
        alike.setdefault(key, []).append(home)
    groups: list[Group] = []
    for (flat, *_), members in alike.items():
        summed = [_summed_by(value, users, sums) is not None for value in members[0].exports]
        if not flat or len(members) == 1 or all(summed):
            if flat:  # Neighbours that differ in their first dimension alone are copied together as they are.
                members.sort(key=lambda home: home.inputs[0].shape[1:])
            groups.append(Group(members, flat, summed=flat and len(members) > 1))
            continue
        stacked: dict[Any, list[Home]] = {}
        for home in members:
            stacked.setdefault(_description(home), []).append(home)
        groups.extend(Group(each, False) for each in stacked.values())
    families: dict[Any, list[Group]] = {}
    for group in groups:
        if not group.flat and _of_any_sizes(group.first):
            families.setdefault(_description(group.first, sizes=False), []).append(group)
    for group in [group for family in families.values() if len(family) > 1 for group in family]:
        group.kin = True
    return groups


#: Operations from which one code for all sizes is worth its slower run: several would compile for minutes.
_LONG = 100
#: Entries of a row up to which code for rows of that length is faster than code for any.
_SHORT = 32


def sizes_known(shape: Sequence[int]) -> tuple[int | None, ...]:
    """The sizes that code for leaves of any sizes is made for: 1, and the length of short rows; None is any other."""
    return tuple([size if size <= (_SHORT if i == len(shape) - 1 else 1) else None for i, size in enumerate(shape)])


def _of_any_sizes(home: Home) -> bool:
    """Whether one code is to serve homes that differ in the sizes of their leaves.

    It is long, and no size is written in it: all is entry by entry or of rows, on a CPU. Elsewhere kernels of many
    sizes compile side by side.
    """
    if len(home.nodes) < _LONG or home.inputs[0].device.type != "cpu":
        return False
    made = {value for node in home.nodes for value in node.outputs}
    outside = [value for node in home.nodes for value in node.inputs if value.shape and value not in made]
    shapes = {value.shape for value in [*home.inputs, *outside]}
    if any([len(value.shape) != len(home.inputs[0].shape) for value in made]):
        return False
    if not all([torch.Tag.pointwise in node.op.tags or node.op in _LIKE | _OF_ROWS for node in home.nodes]):
        return False
    return len(shapes) == 1 and 0 not in shapes.pop()


def _summed_by(value: Value, users: dict[Value, list[Node]], sums: set[Value]) -> tuple[Value, ...] | None:
    """The stacks that are only summed, if a value goes nowhere else, and once into each."""
    stacks = tuple([node.outputs[0] for node in users.get(value, ())])
    return stacks if stacks and len(set(stacks)) == len(stacks) and sums.issuperset(stacks) else None


def _flat(home: Home, owner: dict[Value, _Owner]) -> bool:
    """Whether a home is one leaf and elementwise, but for sums over all of it that go out."""
    shape, device = home.inputs[0].shape, home.inputs[0].device
    if len(home.leaves) != 1 or not shape or any([value.shape for value in home.exports]):
        return False
    if any([value.shape != shape or value.device != device for value in home.inputs]):
        return False
    made = {value for node in home.nodes for value in node.outputs if not value.shape}
    for node in home.nodes:
        out = node.outputs[0]
        if any([value in made for value in node.inputs]) or out.device != device:
            return False
        if node.op is _aten.sum.default and node.inputs[0].shape == shape:
            continue
        if out.shape != shape or not (torch.Tag.pointwise in node.op.tags or node.op in _LIKE):
            return False
        if any([value.shape and (value.shape != shape or owner[value] != owner[out]) for value in node.inputs]):
            return False
    return True


def _description(
    home: Home, users: dict[Value, list[Node]] | None = None, sums: set[Value] | None = None, sizes: bool = True
) -> tuple[Any, ...]:
    """What homes that are alike have in common; with users and sums, flat ones, and without sizes, kin."""
    flat = users is not None and sums is not None
    names: dict[Value, int] = {}
    told: list[Any] = [flat]

    def tell(value: Value) -> None:
        names[value] = len(names)
        shape = bool(value.shape) if flat else value.shape if sizes else sizes_known(value.shape)
        told.append((value.dtype, value.device, shape, value.held))

    def name(arg: Any) -> Any:
        if isinstance(arg, Value):
            return names.get(arg, arg)  # A value from outside stands for itself.
        return tuple([name(each) for each in arg]) if isinstance(arg, list) else constant(arg)

    for value in home.inputs:
        tell(value)
    for node in home.nodes:
        told.append((node.op, *map(name, node.args), *node.kwargs, *map(name, node.kwargs.values())))
        for value in node.outputs:
            tell(value)
    told.append(tuple([(names[place], names.get(value, value)) for place, value in home.writes]))
    told.append(tuple([names[value] for value in home.exports]))
    if users is not None and sums is not None:
        told.append(tuple([_summed_by(value, users, sums) for value in home.exports]))
    return tuple(told)


def _stages(found: Record, owner: dict[Value, _Owner]) -> dict[Value, int]:
    stages = dict.fromkeys([*found.inputs, *(value for value, _ in found.captured)], 0)
    for node in found.nodes:
        mine = owner[node.outputs[0]]
        stage = 0
        for value in node.inputs:
            after = isinstance(owner[value], int) and owner[value] != mine
            stage = max(stage, stages[value] + after)
        for value in node.outputs:
            stages[value] = stage
    return stages
