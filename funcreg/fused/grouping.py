"""A recorded step cut into groups of leaves that are treated alike, so that few kernels compute with all of them.

Most of a step happens to each leaf by itself: its gradient, its moments and its decay meet only each other and
scalars. These operations are the *subgraph* of the leaf. Leaves whose subgraphs are equal, operation for operation,
form a group. If all operations of a group are elementwise, shapes do not matter: the group is *flat*, its leaves lie
end to end in one vector. If some are not (norms of rows, factors of matrices), leaves of one shape are stacked, and the
subgraph is mapped over the stack. What belongs to no leaf (counters, schedules, bias corrections, a global norm) is
scalar arithmetic, computed once and handed to the kernels: inside of them it would be computed for each entry.

A kernel may need a scalar that another kernel makes, as clipping by a global norm does. Hence stages: the scalars of a
stage, then its kernels. Of an earlier stage a kernel sees scalars only; all else it computes again from its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from funcreg.fused.recording import Node, Record, Value, constant

_aten = torch.ops.aten
_LIKE = {_aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default, _aten._to_copy.default}
#: Of some dimensions of their argument, which keep their place.
_REDUCTIONS = {_aten.sum.dim_IntList, _aten.mean.dim, _aten.amax.default, _aten.amin.default}
#: Operations from which code for stacks of any shape is compiled: several would compile for minutes.
_LONG = 100
#: Entries from which on a call for each leaf costs less than to stack leaves.
_WORTH_A_CALL = 1 << 13

#: What a value belongs to: a subgraph, by one of its leaves; "many" subgraphs; None if only scalars made it.
_Owner = int | Literal["many"] | None


@dataclass
class LeafSubgraph:
    """The operations of one leaf alone, or of leaves that meet."""

    leaves: list[int] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    writes: list[tuple[Value, Value]] = field(default_factory=list)  # The input whose place it takes, and the value.
    exports: list[Value] = field(default_factory=list)  # Scalars, mostly, that are needed outside.

    @property
    def ends(self) -> list[Value]:
        """What its kernel has to compute."""
        return [*(value for _, value in self.writes), *self.exports]


@dataclass
class Group:
    """Subgraphs that are alike, in one kernel."""

    members: list[LeafSubgraph]
    flat: bool

    @property
    def stacked(self) -> bool:
        """Whether its members are computed with side by side, each a row of a stack."""
        return not self.flat and len(self.members) > 1

    @property
    def shape_polymorphic(self) -> bool:
        """Whether code for any shape is compiled: it is long, and of rows alone, so that other groups may share it.

        On a CPU; elsewhere kernels of many sizes compile side by side.
        """
        nodes = self.first.nodes
        if self.flat or len(nodes) < _LONG or self.first.inputs[0].device.type != "cpu":
            return False
        return all([torch.Tag.pointwise in node.op.tags or node.op in _LIKE | _REDUCTIONS for node in nodes])

    def apart(self) -> list[Group]:
        """Groups of one member each if members are so large that a call for each costs less than to stack them."""
        if math.prod(self.first.inputs[0].shape) < _WORTH_A_CALL:
            return [self]
        return [Group([member], self.flat) for member in self.members]

    @property
    def first(self) -> LeafSubgraph:
        """The subgraph that stands for all."""
        return self.members[0]


@dataclass
class Grouping:
    """A record as groups, and what remains."""

    groups: list[Group]
    scalars: list[Node]  # In their order.
    unpacked_outputs: dict[int, Value]  # Outputs that no group writes, by position.
    stages: dict[Value, int]
    summed_stacks: set[Value]  # Stacks of scalars that are only summed.


def group(found: Record, params: int, gradients: int, written: Sequence[Value | None]) -> Grouping:
    """Groups and stages of a recorded step.

    Args:
        found: Its inputs are parameters, then gradients, then all else.
        params: Number of parameters.
        gradients: Number of gradients: as many, or none.
        written: For each output the input whose place it takes, or that it is like; None for one that is like none.
    """
    for i, value in enumerate(found.inputs[: params + gradients]):
        value.role = "parameter" if i < params else "gradient"
    users: dict[Value, list[Node]] = {}
    for node in found.nodes:
        for value in node.inputs:
            users.setdefault(value, []).append(node)
    sums = {node.outputs[0] for node in found.nodes if _only_summed(node, users)}
    owner = _owners(found, params, gradients, written)
    groups = _groups(_subgraphs(found, owner, params, written, users), owner, users, sums)
    alone = [each.first for each in groups if not each.flat and not each.stacked]
    if _release_scalars(found, alone, owner):
        groups = _groups(_subgraphs(found, owner, params, written, users), owner, users, sums)
    unpacked = {
        i: value
        for i, (value, place) in enumerate(zip(found.outputs, written, strict=True))
        if not _writes(owner, value, place)
    }
    scalars = [node for node in found.nodes if not isinstance(owner[node.outputs[0]], int)]
    return Grouping(groups, scalars, unpacked, _stages(found, owner), sums)


def _only_summed(node: Node, users: dict[Value, list[Node]]) -> bool:
    """Whether a node stacks scalars, and all that becomes of the stack is its sum."""
    if node.op is not _aten.stack.default or any([value.shape for value in node.inputs]):
        return False
    return all([user.op is _aten.sum.default for user in users.get(node.outputs[0], ())])


# Subgraphs


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
            for other in others:  # Leaves that meet have one subgraph.
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
    """Give to a subgraph what only it uses, such as the moments of its leaf."""
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
            if owner[value] is None:
                used.setdefault(value, set()).add(mine)
    for value in [*found.inputs, *(value for value, _ in found.captured)]:
        if owner[value] is None:
            owner[value] = _only(used.get(value, ()))


def _only(owners: Iterable[_Owner]) -> int | None:
    """The subgraph among owners, if they are one."""
    found = set(owners)
    mine = found.pop() if len(found) == 1 else None
    return mine if isinstance(mine, int) else None


def _writes(owner: dict[Value, _Owner], value: Value, place: Value | None) -> bool:
    """Whether a subgraph writes an output in the place of an input of its own."""
    # What has no dimensions is not written by kernels: compiled code loses it, if it is of float64.
    if place is None or not place.shape or (value.shape, value.dtype) != (place.shape, place.dtype):
        return False
    mine = owner[value]
    return isinstance(mine, int) and owner[place] == mine


def _subgraphs(
    found: Record,
    owner: dict[Value, _Owner],
    params: int,
    written: Sequence[Value | None],
    users: dict[Value, list[Node]],
) -> list[LeafSubgraph]:
    subgraphs: dict[_Owner, LeafSubgraph] = {}
    wanted: set[Value] = set()
    for i in range(params):
        subgraphs.setdefault(owner[found.inputs[i]], LeafSubgraph()).leaves.append(i)
    for value, place in zip(found.outputs, written, strict=True):
        if place is not None and _writes(owner, value, place):
            subgraphs[owner[value]].writes.append((place, value))
        else:
            wanted.add(value)

    def add_input(value: Value) -> None:
        if value.node is None and isinstance(owner[value], int) and value not in subgraphs[owner[value]].inputs:
            subgraphs[owner[value]].inputs.append(value)

    for node in found.nodes:
        if isinstance(owner[node.outputs[0]], int):
            subgraphs[owner[node.outputs[0]]].nodes.append(node)
        for value in node.inputs:
            add_input(value)
    for subgraph in subgraphs.values():
        for place, value in subgraph.writes:
            add_input(place)
            add_input(value)
        for value in (*subgraph.inputs, *(value for node in subgraph.nodes for value in node.outputs)):
            outside = any([owner[node.outputs[0]] != owner[value] for node in users.get(value, ())])
            if outside or value in wanted:
                subgraph.exports.append(value)
    return [subgraph for subgraph in subgraphs.values() if subgraph.writes or subgraph.exports]


def _release_scalars(found: Record, alone: list[LeafSubgraph], owner: dict[Value, _Owner]) -> bool:
    """Hand the scalar arithmetic of subgraphs that have no like to the scalars; whether there was any."""
    before = dict(owner)
    for subgraph in alone:
        if found.inputs[subgraph.leaves[0]].shape:
            for node in subgraph.nodes:
                if not any([value.shape for value in (*node.inputs, *node.outputs)]):
                    owner.update((value, "many") for value in node.outputs)
            owner.update((value, None) for value in subgraph.inputs if not value.shape)
    return owner != before


# Groups


def _groups(
    subgraphs: list[LeafSubgraph], owner: dict[Value, _Owner], users: dict[Value, list[Node]], sums: set[Value]
) -> list[Group]:
    alike: dict[Any, list[LeafSubgraph]] = {}
    for subgraph in subgraphs:
        stacks = [_summed_by(value, users, sums) for value in subgraph.exports]
        flat, summed = _is_flat(subgraph, owner), None not in stacks
        # Of several leaves in one vector, no scalar can be had but sums over all of them.
        key = (_description(subgraph, bool), *stacks) if flat and summed else _description(subgraph)
        alike.setdefault((flat, summed, key), []).append(subgraph)
    found = [Group(members, flat and (summed or len(members) == 1)) for (flat, summed, _), members in alike.items()]
    return [each for one in found for each in (one.apart() if one.shape_polymorphic else [one])]


def _summed_by(value: Value, users: dict[Value, list[Node]], sums: set[Value]) -> tuple[Value, ...] | None:
    """The stacks that are only summed, if a value goes nowhere else, and once into each."""
    stacks = tuple([node.outputs[0] for node in users.get(value, ())])
    return stacks if stacks and len(set(stacks)) == len(stacks) and sums.issuperset(stacks) else None


def _is_flat(subgraph: LeafSubgraph, owner: dict[Value, _Owner]) -> bool:
    """Whether a subgraph is of one leaf and elementwise, but for sums over all of it that go out."""
    shape, device = subgraph.inputs[0].shape, subgraph.inputs[0].device
    if len(subgraph.leaves) != 1 or not shape or any([value.shape for value in subgraph.exports]):
        return False
    if any([value.shape != shape or value.device != device for value in subgraph.inputs]):
        return False
    made = {value for node in subgraph.nodes for value in node.outputs if not value.shape}
    for node in subgraph.nodes:
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


def _description(subgraph: LeafSubgraph, of_shape: Callable[[Any], Any] = tuple) -> tuple[Any, ...]:
    """What subgraphs that are alike have in common; of a shape, what `of_shape` says of it."""
    names: dict[Value, int] = {}
    said: list[Any] = []

    def say(value: Value) -> None:
        names[value] = len(names)
        said.append((value.dtype, value.device, of_shape(value.shape), value.role))

    def name(arg: Any) -> Any:
        if isinstance(arg, Value):
            return names.get(arg, arg)  # A value from outside stands for itself.
        return tuple([name(each) for each in arg]) if isinstance(arg, list) else constant(arg)

    for value in subgraph.inputs:
        say(value)
    for node in subgraph.nodes:
        said.append((node.op, *map(name, node.args), *node.kwargs, *map(name, node.kwargs.values())))
        for value in node.outputs:
            say(value)
    said.extend((name(place), name(value)) for place, value in subgraph.writes)
    said.extend(map(name, subgraph.exports))
    return tuple(said)


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
