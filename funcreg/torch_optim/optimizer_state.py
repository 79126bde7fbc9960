"""The states of an optimizer's parameters, which torch keeps one by one, as the trees that chains know.

Parameters of a group that began together have one tree, and their counters in common. What belongs to no parameter
alone is in the state of each.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Params, State
from funcreg.core.checks import check_dense
from funcreg.core.construction import written
from funcreg.core.masks import listed
from funcreg.core.notices import warn_user
from funcreg.core.tree import ABSENT, dotted, leaf_paths, structure
from funcreg.core.wrapping import plain_names
from funcreg.transforms.transform import Transform

#: What `param_groups` and `state` of an optimizer are.
Groups = Sequence[dict[str, Any]]
Entries = Any


class Name(str):
    """The name of a parameter as a key: told from the keys of states that are called the same."""


@dataclass
class Part:
    """Parameters of a group that got their first gradients at the same step, and so have their counters in common."""

    group: int
    params: list[Tensor]
    names: list[Name]
    rest: Params  # Stands for parameters of the optimizer that are not in this part, where a chain has to know of them.
    refused: ValueError | None  # What the chain says of these parameters alone.
    spec: Any  # The structure of their state.
    slots: list[tuple[int, str]]  # For each leaf of it, the parameter in whose state it is, and under which name.
    shared: set[int]  # Leaves of no parameter alone, which are in the states of all.
    key: Any

    def tree(self, leaves: Sequence[Tensor]) -> Params:
        """Leaves, one for each parameter, as a tree that the chain knows."""
        return {**dict(zip(self.names, leaves, strict=True)), **self.rest}

    def gradients(self, grads: Sequence[Tensor | None]) -> Params:
        """Gradients, one for each parameter, as such a tree, with zeros where there is none.

        Raises:
            TypeError: One is sparse.
        """
        for name, gradient in zip(self.names, grads, strict=True):
            if gradient is not None and gradient.layout is not torch.strided:
                check_dense(f"the gradient of '{name}', in param group {self.group},", gradient)
        return self.tree(list(map(filled, self.params, grads)))

    def entries(self, leaves: Sequence[Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """The leaves of a state by parameter and name; what belongs to none alone, such as a counter, is with each."""
        found: dict[Tensor, dict[str, Tensor]] = {p: {} for p in self.params}
        for i, ((owner, name), leaf) in enumerate(zip(self.slots, leaves, strict=True)):
            for p in self.params if i in self.shared else [self.params[owner]]:
                found[p][name] = leaf
        return found

    def leaves(self, state: Entries) -> list[Tensor]:
        """The leaves of the state of this part, out of that of an optimizer."""
        entries = list(map(state.__getitem__, self.params))
        return [entries[i][name] for i, name in self.slots]

    def kept(self, state: Entries, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """The parameters without a gradient and their states, which a step leaves as they are."""
        without = {i for i, g in enumerate(grads) if g is None}
        if not without:
            return []
        slots = [slot for n, slot in enumerate(self.slots) if slot[0] in without and n not in self.shared]
        return [self.params[i] for i in sorted(without)] + [state[self.params[i]][name] for i, name in slots]


class Parts:
    """The parameters of an optimizer that have states, in parts that began together."""

    def __init__(self) -> None:
        self.packed = False  # Whether states lie where the last step that was made likes them.
        self._known: list[Part] | None = None
        self._begun: set[Tensor] = set()  # The parameters in parts.
        self._held: list[Tensor] = []  # Those of all groups, when parts were made.
        self._count = 0  # Of parameters with states, when parts were made.

    def forget(self) -> None:
        """Read states anew: they were loaded, or may not be those of the chains."""
        self._known = None

    def find(
        self, chains: Sequence[Transform], groups: Groups, state: Entries, frozen: Collection[Tensor] = ()
    ) -> list[Part]:
        """All parts; parameters with a gradient, not frozen and without a state, begin here."""
        held = [p for group in groups for p in group["params"]]
        same = len(held) == len(self._held) and all(map(operator.is_, held, self._held))
        if self._known is None or not same or len(state) != self._count:  # Loaded, replaced, or cleared.
            self._known = [part for i in range(len(groups)) for part in _resumed(chains[i].init, groups, i, state)]
            self._begun = {p for part in self._known for p in part.params}
            self._count, self.packed, self._held = len(state), False, held
        everything = len(held)
        if len(self._begun) == everything:
            return self._known
        made = []
        for i, group in enumerate(groups):
            begins = lambda p: p.grad is not None and p not in self._begun and p not in frozen
            new = [j for j, p in enumerate(group["params"]) if begins(p)]
            if new:
                made.append(_begin(chains[i].init, groups, i, new))
        parts = [*self._known, *[part for part, _ in made]]
        refused = [part.refused for part in parts if part.refused is not None]
        if made and len(refused) == len(parts) and sum([len(part.params) for part in parts]) == everything:
            raise refused[0]  # A mask that chooses nothing in any group.
        for part, leaves in made:
            state.update(part.entries(leaves))
            self._begun.update(part.params)
        self._known, self._count, self.packed = parts, len(state), self.packed and not made
        return parts


def _begin(
    init: Callable[[Params], State], groups: Groups, index: int, which: Sequence[int]
) -> tuple[Part, list[Tensor]]:
    """Some parameters of a group as a part, and the leaves of the state that their chain begins with."""
    group = groups[index]
    params, names = [group["params"][i] for i in which], group.get("param_names")
    keys = [Name(i if names is None else names[i]) for i in which]
    state, rest, refused = _first(init, groups, index, dict(zip(keys, map(Tensor.detach, params), strict=True)))
    leaves, spec = structure(state)
    owners = {key: i for i, key in enumerate(keys)}
    slots, shared = [], set()
    for i, path in enumerate(leaf_paths(state)):
        name = next((key for key in path if isinstance(key, Name)), None)
        slots.append((0 if name is None else owners[name], _slot(path)))
        shared |= {i} if name is None else set()
    return Part(index, params, keys, rest, refused, spec, slots, shared, (index, tuple(keys))), leaves


def _slot(path: tuple[Any, ...]) -> str:
    """The name of a leaf in the state of its parameter."""
    return dotted(tuple(key for key in path if not isinstance(key, Name))) or "value"


def _first(
    init: Callable[[Params], State], groups: Groups, index: int, tree: Params
) -> tuple[State, Params, ValueError | None]:
    """What a chain begins with on some parameters, what stands for the others, and what it has against its group.

    A mask may choose none of these parameters if it chooses others: of the group, or of another one.
    """
    group = groups[index]
    try:
        return init(tree), {}, None
    except ValueError as error:
        refused: ValueError | None = error
    names = [Name(name) for name in group.get("param_names", range(len(group["params"])))]
    rest: Params = {name: ABSENT for name in names if name not in tree}
    if rest:
        try:
            init(dict(zip(names, map(Tensor.detach, group["params"]), strict=True)))
            refused = None
        except ValueError as error:
            refused = error
    if refused is not None and "param_names" not in group and "matches no leaf" in str(refused):
        refused = ValueError(f"{refused}. For names, give the optimizer model.named_parameters().")
    if refused is not None and len(groups) == 1:
        raise refused
    if refused is not None:
        rest[Name("the other groups")] = ABSENT
    try:
        return init({**tree, **rest}), rest, refused
    except ValueError as error:
        raise refused or error from None


def _resumed(init: Callable[[Params], State], groups: Groups, index: int, state: Entries) -> list[Part]:
    """The parts of a group whose states were loaded: parameters with equal counters began together."""
    params = groups[index]["params"]
    begun = [i for i, p in enumerate(params) if p in state]
    if not begun:
        return []
    whole, leaves = _begin(init, groups, index, begun)
    # Looking a parameter up leaves an empty dict in `state`: one that should have entries has not begun.
    if waiting := {p for p, entries in whole.entries(leaves).items() if entries and not state[p]}:
        begun = [i for i in begun if params[i] not in waiting]
        if not begun:
            return []
        whole, leaves = _begin(init, groups, index, begun)
    _check_states(whole, leaves, state)
    _take_numbers(whole, leaves, state)
    counters = {whole.slots[i][1] for i in whole.shared}
    together: dict[Any, list[int]] = {}
    for i in begun:
        found = state[params[i]]
        together.setdefault(tuple([str(found[name].tolist()) for name in sorted(counters)]), []).append(i)
    parts = [whole] if len(together) == 1 else [_begin(init, groups, index, which)[0] for which in together.values()]
    for part in parts:
        for name in counters:
            for p in part.params[1:]:
                state[p][name] = state[part.params[0]][name]
    return parts


def _check_states(part: Part, leaves: list[Tensor], state: Entries) -> None:
    """Raise an error if the states of parameters are not those of their chain."""
    expected = part.entries(leaves)
    for p, name in zip(part.params, part.names, strict=True):
        found, like = state[p], expected[p]
        if set(found) != set(like):
            raise ValueError(
                f"the state of parameter '{name}' has {listed(found) or 'no entries'}; expected "
                f"{listed(like) or 'none'}. Is it the state of another chain, or of an optimizer of torch?"
            )
        for entry, leaf in like.items():
            if not isinstance(found[entry], Tensor) and (leaf.ndim or type(found[entry]) not in (int, float)):
                raise ValueError(
                    f"the state {entry} of parameter '{name}' is {written(found[entry])}; expected a tensor of shape "
                    f"{tuple(leaf.shape)}. What was done to it after state_dict()?"
                )
            if isinstance(found[entry], Tensor) and found[entry].shape != leaf.shape:
                raise ValueError(
                    f"the state {entry} of parameter '{name}' has shape {tuple(found[entry].shape)}; expected "
                    f"{tuple(leaf.shape)}. Are the parameters in another order, or of another model?"
                )


def _take_numbers(part: Part, leaves: list[Tensor], state: Entries) -> None:
    """Make tensors like those of the chain of numbers and of counters in other dtypes, as other programs save them."""
    for p, like in part.entries(leaves).items():
        for entry, leaf in like.items():
            found = state[p][entry]
            if not isinstance(found, Tensor):
                state[p][entry] = torch.full_like(leaf, found)
            elif not leaf.ndim and not leaf.is_floating_point():
                state[p][entry] = found.to(leaf.dtype)


# Loaded and saved


class _Hidden:
    """A tensor that torch does not see, and so does not convert."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def shown(self, param: Tensor) -> Tensor:
        """A copy where the parameter is."""
        return self._tensor.detach().to(param.device, copy=True)


def hidden_from_torch(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved optimizer whose states torch does not convert to the dtypes of their parameters."""
    hide = lambda x: _Hidden(x) if isinstance(x, Tensor) else x
    entries = lambda v: {name: hide(x) for name, x in v.items()} if isinstance(v, dict) else v
    return {**saved, "state": {k: entries(v) for k, v in saved["state"].items()}}


def by_name(saved: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """A saved optimizer in the order, and with the names, of the parameters of these groups.

    Torch goes by place, and takes the names that were saved for those of the parameters: moments of one would be read
    as those of another, and masks would choose others.
    """
    given = saved["param_groups"]
    if [len(group["params"]) for group in given] != [len(group["params"]) for group in groups]:
        return saved  # Torch says what is wrong.
    theirs, own = list(map(_plain, given)), list(map(_plain, groups))
    arranged = []
    for index, (group, here) in enumerate(zip(given, groups, strict=True)):
        order = list(range(len(own[index])))
        if theirs[index] and own[index] and sorted(theirs[index]) == sorted(own[index]):
            order = [theirs[index].index(name) for name in own[index]]
        elif theirs[index] and own[index]:
            _check_places(index, theirs, own)
        kept = {"param_names": here["param_names"]} if own[index] else {}
        arranged.append({**group, "params": [group["params"][i] for i in order] or group["params"], **kept})
    return {**saved, "param_groups": arranged}


def _plain(group: dict[str, Any]) -> list[str]:
    """The names of the parameters of a group, without wrappers; none if they have none, or not each its own."""
    names = group["params"] if all([isinstance(p, str) for p in group["params"]]) else group.get("param_names") or ()
    plain = plain_names(tuple(names))
    return list(plain) if len(set(plain)) == len(plain) == len(group["params"]) else []


def _check_places(index: int, theirs: list[list[str]], own: list[list[str]]) -> None:
    """Raise an error if a parameter of a group has another place in what was saved; warn if it has another name."""
    places = {name: (i, names.index(name)) for i, names in enumerate(theirs) for name in names}
    for j, name in enumerate(own[index]):
        i, there = places.get(name, (index, j))
        if (i, there) != (index, j):
            raise ValueError(
                f"parameter '{name}' is number {j} of param group {index}; in the state that is loaded it is number "
                f"{there} of param group {i}, among other parameters. Is it of another model, or were its groups made "
                "in another way?"
            )
    j = next(j for j, name in enumerate(own[index]) if theirs[index][j] != name)
    warn_user(
        f"the state that is loaded calls number {j} of param group {index} '{theirs[index][j]}', which is "
        f"'{own[index][j]}' here: parameters with other names are read by their place.",
    )


def show_to_torch(state: Entries) -> None:
    """Put the tensors of a state that were hidden where their parameters are."""
    for p, entries in state.items():
        if isinstance(entries, dict) and isinstance(p, Tensor):
            state[p] = {k: v.shown(p) if isinstance(v, _Hidden) else v for k, v in entries.items()}


def filled(p: Tensor, gradient: Tensor | None) -> Tensor:
    """The gradient of a parameter; zeros where there is none."""
    return torch.zeros_like(p, requires_grad=False) if gradient is None else gradient
