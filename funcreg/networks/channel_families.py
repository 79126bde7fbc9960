"""Sets of atoms as families: which of them are exact, and how they are written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from funcreg.networks.families import Along, Family, Where
from funcreg.networks.flow import Flow, Fold
from funcreg.networks.layers import PIXELS


class _Slot(NamedTuple):
    """The entries of a dimension of a leaf that belong to the groups of a family."""

    name: str
    dim: int
    rows: Tensor  # The entries of each group.
    writes: bool  # Whether what is computed has the channel because of them.
    reads: bool  # Whether sums run over them.
    fold: Fold | None = None  # What they read from a dead channel, if it is not 0.


#: Why channels cannot go unless what reads them is zero, by what else could be done; under None if nothing can.
_Demands: TypeAlias = dict[Fold | None, str]


class Found(NamedTuple):
    """Families that were found in a network."""

    module: nn.Module
    flow: Flow
    families: list[list[_Slot]]
    frozen: Mapping[str, float]  # Parameters that no training makes zero.
    least: Sequence[int] = ()  # How many groups of each stay, whatever is dead.

    def trained(self) -> dict[str, Any]:
        """The parameters that training may make zero."""
        return {name: w for name, w in self.module.named_parameters() if name not in self.frozen}

    def owners(self) -> list[tuple[str, ...]]:
        """For each family the layers whose outputs they are."""
        return [
            tuple(dict.fromkeys([slot.name.rpartition(".")[0] for slot in slots if slot.writes]))
            for slots in self.families
        ]

    def counts(self) -> list[int]:
        """The number of groups of each family."""
        return [len(slots[0].rows) for slots in self.families]

    def sizes(self) -> list[int]:
        """The number of parameters that a group of each family carries."""
        parameters = dict(self.module.named_parameters())
        return [_size(slots, parameters) for slots in self.families]

    def sets(self, family: int) -> Tensor:
        """The sets of atoms of the groups of a family."""
        name, dim, rows = self.families[family][0][:3]
        first = next(first for here, first, _ in self.flow.starts[name] if here == dim)
        return self.flow.atoms.find(rows[:, 0] + first)

    def stays(self) -> list[bool]:
        """For each family whether something that reads its channels is as it is once they are dead."""
        trained, written = self.trained(), _shared(self.families)
        return [any([_stays(slot, trained, written) for slot in slots]) for slots in self.families]

    def chosen(self, some: Sequence[bool]) -> Found:
        """Some of the families; the others are not closed."""
        return self._replace(families=[slots for slots, here in zip(self.families, some, strict=True) if here])

    def written(self, inside: Callable[[str], str] = lambda name: name) -> list[Family]:
        """The families as dicts."""
        leaves = (*self.module.named_parameters(), *self.module.named_buffers())
        shapes, trained = {name: tuple(x.shape) for name, x in leaves}, self.trained()
        families = [_family(slots, self.families, trained, shapes, inside) for slots in self.families]
        return [{inside(name): where for name, where in family.items()} for family in families]

    def multiplied(self) -> list[str | None]:
        """For each family why it may go only if it is tried out, None if it is exact anyhow."""
        return [self.flow.multiplied(self.sets(i)) for i in range(len(self.families))]

    def is_of_heads(self, family: int) -> bool:
        """Whether the groups of a family are features inside of heads."""
        return bool(torch.isin(self.sets(family), self.of_heads()).all())

    def of_heads(self) -> Tensor:
        """The atoms of features inside of heads."""
        inside, atoms = self.flow.inside, self.flow.atoms
        if inside is None:
            return torch.zeros(0, dtype=torch.int64)
        return atoms.find(inside[inside < len(atoms.parents)])  # Those of no leaf may be of an earlier pass alone.

    def turned(self, reasons: Mapping[int, str]) -> dict[int, str]:
        """Why families are refused, with the sum over them, or the buffer that goes with queries and keys."""
        parameters, multiplied, found = dict(self.module.named_parameters()), self.multiplied(), dict(reasons)
        if self.flow.inside is None:
            return {i: reason if multiplied[i] is None else f"{multiplied[i]}: {reason}" for i, reason in found.items()}
        for i, reason in reasons.items():
            buffers = [slot.name for slot in self.families[i] if slot.name not in parameters]
            if multiplied[i] is not None and buffers:
                found[i] = (
                    f"features of queries and keys are scaled by '{buffers[0]}', or turned by it in pairs as rotary "
                    f"embeddings do, and cannot go with its entries: {reason}"
                )
        return found

    def closed(self, reasons: Mapping[int, str]) -> Found:
        """The families without some of them, by their numbers, which are kept for these reasons."""
        for i, reason in reasons.items():
            for slot in self.families[i]:
                _close(self.flow, slot, reason)
        return self._replace(families=[slots for i, slots in enumerate(self.families) if i not in reasons])

    def kept(self) -> dict[str, list[str]]:
        """The dimensions of parameters that are kept, by the reason."""
        return _kept(self.flow)


def find(module: nn.Module, flow: Flow, frozen: Mapping[str, float]) -> Found:
    """The families of a flow that are exact; the atoms of the others are closed.

    Args:
        module: The network.
        flow: The atoms of a forward pass of it.
        frozen: Parameters that no training makes zero.
    """
    found = Found(module, flow, [], frozen)
    return found._replace(families=_families(flow, found.trained(), frozen))


def _written(families: Iterable[Sequence[_Slot]]) -> set[str]:
    """The leaves that give channels to what is computed."""
    return {slot.name for slots in families for slot in slots if slot.writes}


def _shared(families: Iterable[Sequence[_Slot]]) -> set[str]:
    """The leaves that are in no norm of what they read: they give channels, or read some along several dimensions."""
    families = list(families)
    dims = {(slot.name, slot.dim) for slots in families for slot in slots}
    several = Counter([name for name, _ in dims])
    return _written(families) | {name for name, count in several.items() if count > 1}


def _stays(slot: _Slot, trained: Mapping[str, Any], written: set[str]) -> bool:
    """Whether what reads a channel is as it is once that is dead, because it is not penalized with it."""
    return slot.reads and not slot.writes and (slot.name in written or slot.name not in trained)


def _families(flow: Flow, parameters: dict[str, Any], frozen: Iterable[str]) -> list[list[_Slot]]:
    """The slots of each family of sets of atoms that may go, alike in which leaves they are."""
    roots = flow.atoms.find(flow.atoms.parents)
    free = flow.atoms.closed()[roots] < 0
    read, written = flow.atoms.marked()
    members: dict[int, dict[tuple[str, int], list[int]]] = {}
    uses: dict[tuple[str, int, int], tuple[bool, bool]] = {}
    for name, places in flow.starts.items():
        for dim, first, count in places:
            entries = free[first : first + count].nonzero()[:, 0]
            atoms = entries + first
            columns = (x.tolist() for x in (entries, roots[atoms], read[atoms], written[atoms]))
            for entry, root, is_read, is_written in zip(*columns, strict=True):
                members.setdefault(root, {}).setdefault((name, dim), []).append(entry)
                before = uses.get((name, dim, root), (False, False))
                uses[name, dim, root] = before[0] or is_read, before[1] or is_written
    # Layers that only read a channel do not make it.
    writes = {place for place, use in uses.items() if place[0] in parameters and use != (True, False)}
    demands: dict[int, _Demands] = {}
    for ids, reason, fold in flow.demands:
        for root in flow.atoms.find(ids).unique().tolist():
            demands.setdefault(root, {})[fold] = reason
    alike: dict[tuple[Any, ...], list[int]] = {}
    for root, slots in members.items():
        kind = tuple(
            (slot, len(entries), (*slot, root) in writes, uses[(*slot, root)][0]) for slot, entries in slots.items()
        )
        alike.setdefault((tuple(demands.get(root, ())), kind), []).append(root)
    found: list[tuple[list[_Slot], _Demands]] = []
    for (_, kind), sets in alike.items():
        if len(sets) == 1 or not any([is_written for _, _, is_written, _ in kind]):
            reason = _fixed([name for (name, _), *_ in kind], frozen) or "a single channel of its kind"
            flow.atoms.close(torch.tensor(sets), reason)
            continue
        rows = [torch.tensor([members[root][slot] for root in sets]) for slot, *_ in kind]
        here = demands.get(sets[0], {})
        folds = {(fold.weight, fold.dim): fold for fold in here if fold is not None}
        slots = [
            _Slot(name, dim, own, w, r, folds.get((name, dim)))
            for ((name, dim), _, w, r), own in zip(kind, rows, strict=True)
        ]
        found.append((slots, here))
    return _exact(flow, found, parameters, frozen)


def _exact(
    flow: Flow, found: list[tuple[list[_Slot], _Demands]], parameters: dict[str, Any], frozen: Iterable[str]
) -> list[list[_Slot]]:
    """The families that are exact with families that do not overlap; the others are closed."""
    while True:
        families = [slots for slots, _ in found]
        written = _shared(families)
        for slots, demands in found:
            # Weights that read a channel that is never zero are zero themselves, if they are penalized.
            lacking = [slot for slot in slots if _stays(slot, parameters, written) and slot.fold is None]
            overlap = None if _is_free(slots, families) else "another family has these entries along another dimension"
            refused = overlap or (demands.get(None) if lacking else None)
            if refused is not None and overlap is None:
                refused = _fixed([slot.name for slot in slots if not slot.reads], frozen) or refused
            if refused is not None:
                for slot in slots:
                    _close(flow, slot, refused)
                found = [each for each in found if each[0] is not slots]
                break
        else:
            return families


def _close(flow: Flow, slot: _Slot, reason: str) -> None:
    for dim, first, _ in flow.starts[slot.name]:
        if dim == slot.dim:
            flow.atoms.close(slot.rows.reshape(-1) + first, reason)


def _fixed(names: Iterable[str], frozen: Iterable[str]) -> str | None:
    """Why no training makes channels zero, if one of these leaves that give them is frozen."""
    name = next((name for name in names if name in frozen), None)
    if name is None:
        return None
    return f"'{name}' is frozen (requires_grad=False), so that no training makes it zero; layers= may name its layer"


def _is_free(slots: list[_Slot], found: list[list[_Slot]]) -> bool:
    """Whether no leaf that these write is written along another dimension by a family before, or by this one."""
    for slot in slots:
        if slot.writes:
            for others in found:
                dims = [other.dim for other in others if other.writes and other.name == slot.name]
                if any([dim < slot.dim for dim in dims]):
                    return False
    return True


def _kept(flow: Flow) -> dict[str, list[str]]:
    """The dimensions of parameters that are kept, by the reason."""
    closed, found = flow.atoms.closed(), {}
    for name, places in flow.starts.items():
        for dim, first, count in places:
            reasons = closed[flow.atoms.find(torch.arange(first, first + count))]
            for reason in reasons.unique().tolist():
                if reason >= 0 and not flow.atoms.reasons[reason].startswith(PIXELS):
                    part = (
                        "" if int((reasons == reason).sum()) == count else f" of them {int((reasons == reason).sum())}"
                    )
                    place = f"{name}, dimension {dim} of {count}{part}"
                    found.setdefault(flow.atoms.reasons[reason], []).append(place)
    return found


def _family(
    slots: list[_Slot],
    found: list[list[_Slot]],
    parameters: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    inside: Callable[[str], str],
) -> Family:
    written, shared = _written(found), _shared(found)
    family: dict[str, list[Along]] = {}
    for slot in sorted(slots, key=lambda slot: not slot.writes):
        penalized = slot.name in parameters and (slot.writes or slot.name not in shared)
        where = _along(slot.dim, slot.rows, shapes[slot.name][slot.dim], penalized)
        if slot.fold is not None and not penalized:
            where = where._replace(constant=slot.fold.constant, bias=inside(slot.fold.bias))
        family.setdefault(slot.name, []).append(where)
    order = {name: i for i, name in enumerate(shapes)}
    ordered = sorted(family, key=lambda name: (name not in written, order[name]))
    return {name: _plain(family[name]) for name in ordered}


def _plain(alongs: list[Along]) -> Where:
    made = [each.dim if each == Along(each.dim) else each for each in alongs]
    return made[0] if len(made) == 1 else tuple(made)


def _along(dim: int, rows: Tensor, length: int, penalized: bool = True) -> Along:
    """What says where groups lie, from the entries of each of them."""
    count, entries = rows.shape
    first = int(rows.min())
    for packed in [n for n in range(1, entries + 1) if entries % n == 0]:
        size = entries // packed
        expected = torch.arange(first, first + count * entries).reshape(packed, count, size).movedim(1, 0)
        if torch.equal(rows, expected.reshape(count, entries)):
            stop = first + count * entries
            return Along(dim, size, packed, penalized, first, None if stop == length else stop)
    return Along(dim, penalized=penalized, entries=tuple(map(tuple, rows.tolist())))


def _size(slots: list[_Slot], parameters: dict[str, Any]) -> int:
    """The number of parameters that a group carries, one in its row and its column of one leaf once."""
    of: dict[str, dict[int, int]] = {}  # How many entries of each dimension of a leaf go with a group.
    for slot in slots:
        if slot.name in parameters:
            here = of.setdefault(slot.name, {})
            here[slot.dim] = here.get(slot.dim, 0) + slot.rows.shape[1]
    total = 0
    for name, gone in of.items():
        shape = parameters[name].shape
        total += math.prod(shape) - math.prod([n - gone.get(dim, 0) for dim, n in enumerate(shape)])
    return total
