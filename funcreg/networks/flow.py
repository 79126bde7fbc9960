"""The atoms of all tensors of a forward pass, found one operation after the other.

A rule gets the operation and the atoms of its arguments, and gives the atoms of its results. Whatever it gives no
atoms to it has closed: an operation without a rule closes all that reach it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from funcreg.networks.atoms import UNKNOWN, Atoms, Component
from funcreg.networks.tracing import Operation, Recording, Ref, refs_in
from funcreg.networks.widths import Heads

Components = list[Component]
Rule = Callable[["Flow", Operation], Sequence[Components]]
R = TypeVar("R", bound=Rule)
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[R], R]:
    """Let a function be the rule of these operations."""

    def register(function: R) -> R:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


#: Products, which are zero where one of their factors is, and what leaves zeros as they are.
_PRODUCTS = {"mul", "mm", "bmm", "matmul"}
_OF_ZEROS = {"view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "sum"}
#: Why atoms are closed along a dimension whose entries go by others, too.
SHARED = "they share a dimension with others"


class Fold(NamedTuple):
    """A constant that a weight reads from dead channels, and the bias beside it, which can take it."""

    weight: str
    dim: int
    constant: float
    bias: str


class _Parts(NamedTuple):
    """Unequal parts that are taken of a dimension, which can go on as long as each has its share of every channel."""

    ids: Tensor
    taken: set[tuple[int, int]]  # First entries and lengths.
    reason: str
    queries: int  # Entries that are of queries where these share one head of keys and values, else 0.


class _Cuts(NamedTuple):
    """Unequal parts that are taken of a dimension, each of which can go on by itself if the code follows."""

    ids: Tensor
    reason: str
    taken: dict[int, set[int]]  # First entries of parts, by their lengths.


class Flow:
    """The atoms of all tensors of a recording, found one operation after the other.

    Args:
        recording: What a forward pass did.
        rule_of: The rule of each operation.
        packs_unequally: The heads of a module, by its name, if it is attention that packs more queries than keys and
            values, and `resized` knows how many heads it has of each; else None.
        inside: Atoms of heads that another pass over the recording has found, which go by their features in this one;
            None if heads go whole.
        frozen: What entries of parameters are that no training makes zero: 0, or not a number for any other.
        narrow: Names of modules whose convolutions in groups keep all of these, each with fewer channels.
        kept: Atoms of leaves that another pass has closed: where entries of one dimension go by two, by the others.
    """

    def __init__(
        self,
        recording: Recording,
        rule_of: Callable[[Operation], Rule],
        packs_unequally: Callable[[str], Heads | None] = lambda name: None,
        inside: Tensor | None = None,
        frozen: Mapping[str, float] = MappingProxyType({}),
        narrow: Container[str] = (),
        kept: Tensor | None = None,
    ) -> None:
        self.atoms = Atoms()
        self.inside, self.narrow, self.kept = inside, narrow, kept
        self.preferred: list[Tensor] = []  # Atoms by which entries go that could go by others as well.
        self.grouped: dict[str, list[Tensor]] = {}  # Channels that convolutions in groups give, by modules.
        self.recording = recording
        self._rule_of, self._packs_unequally, self._frozen = rule_of, packs_unequally, frozen
        self._parts: dict[tuple[Ref, int], _Parts] = {}
        self._cuts: dict[tuple[Ref, int], _Cuts] = {}
        self.divided = _divided(recording)
        self.known: dict[Ref, Components] = {}
        self.weights: set[Ref] = set()  # Parameters, buffers, and what is computed from them alone.
        self.starts: dict[str, list[tuple[int, int, int]]] = {}  # By leaf: dimension, first atom, number of atoms.
        self._fixed: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]  # Atoms of leaves that are not known to be 0.
        self.used: set[Ref] = set()
        self.operation: Operation | None = None

        # Atoms that go only if the weights that read them are penalized, or a bias takes what they give.
        self.demands: list[tuple[Tensor, str, Fold | None]] = []
        self.summed: list[Tensor] = []  # Atoms that the operation has taken as the terms of a sum.
        self.multiplies = False  # Whether some atoms come to a product of two tensors.
        self.one_weight = False  # Whether a softmax runs over a single entry, so that outputs do not tell its scale.
        self._heads: list[Tensor] = []  # Atoms that came to a product of two tensors as those of heads.
        #: Atoms that are summed over, which may go if no number of the forward pass comes from how many there are.
        self._tried: list[tuple[Tensor, str]] = []
        self._several: list[tuple[Tensor, str]] = []  # Atoms that differ along more than one dimension.
        self._parameters = recording.parameters
        self._stored = {ref.storage for ref in recording.parameters.values()}
        self._uses = _uses(recording)
        self._alike: dict[Ref, set[int]] = {}  # Dimensions along which all entries of whole numbers are the same.
        self._shapes: dict[tuple[Any, ...], set[Ref]] = {}  # Tensors with atoms by their storage.
        self._enter_leaves()
        for operation in recording.operations:
            self._follow(operation)
        self.operation = None
        self._close_ends()

    def again(
        self,
        recording: Recording | None = None,
        inside: Tensor | None = None,
        narrow: Container[str] | None = None,
        kept: Tensor | None = None,
    ) -> Flow:
        """The atoms of another recording, or of this one with other arguments."""
        return Flow(
            self.recording if recording is None else recording,
            self._rule_of,
            self._packs_unequally,
            self.inside if inside is None else inside,
            self._frozen,
            self.narrow if narrow is None else narrow,
            self.kept if kept is None else kept,
        )

    def _close_ends(self) -> None:
        """Close what cannot go by all that the pass did: outputs, leaves without a use, and parts that are not all."""
        for ref in self.recording.outputs:
            self.used.add(ref)
            self.atoms.close_all(self.of(ref), "they are an output of the network")
        unused = "the forward pass did not use them"
        if not self.recording.unseen:
            unused += " in evaluation or training, and what they read may go: give inputs that use them, if any do"
        for name, ref in self._parameters.items():
            if ref not in self.used:
                for _, first, count in self.starts[name]:
                    self.atoms.close(torch.arange(first, first + count), unused)
        self._straighten()
        if self.one_weight and self.inside is None:
            for ids, reason in self._tried:
                self.atoms.close(ids, f"{reason}, which a softmax over one entry would hide")
        for parts in self._parts.values():
            self._check_parts(parts)
        for (ref, dim), cuts in self._cuts.items():
            self._check_cuts(cuts, ref.shape[dim])

    def _enter_leaves(self) -> None:
        """Give atoms to parameters and buffers."""
        for name, ref in self._parameters.items():
            self._enter(name, ref, self._frozen.get(name, 0.0))
        for name, ref in self.recording.buffers.items():
            if ref.dtype.is_floating_point or ref.dtype.is_complex:
                self._enter(name, ref, UNKNOWN)
            self.weights.add(ref)

    def _enter(self, name: str, ref: Ref, dead: float) -> None:
        self.weights.add(ref)
        components: Components = []
        self.starts[name] = []
        if ref in self.known:  # A tensor under two names.
            return
        for dim, size in enumerate(ref.shape):
            if size > 1:
                ids = self.atoms.new(size)
                self._fixed += [ids] if math.isnan(dead) else []
                self.starts[name].append((dim, int(ids[0]), size))
                shape = [size if d == dim else 1 for d in range(len(ref.shape))]
                components.append(Component(ids.reshape(shape), dead))
        self._note(ref, components)

    def of(self, value: Any) -> Components:
        """The atoms of an argument."""
        return self.atoms.settle(self.known.get(value, ())) if isinstance(value, Ref) else []

    def reason(self, what: str) -> str:
        """Why atoms are closed by the operation that is followed."""
        operation = self.operation
        assert operation is not None
        names = [f"'{operation.module}'"] if operation.module else []
        return f"{what} ({', '.join([operation.name.strip('_'), *names])})"

    def rigid(self, x: Ref, dims: Sequence[int], what: str) -> Components:
        """The atoms of an argument once these dimensions keep all their entries."""
        return self.atoms.rigid(self.of(x), [dim % len(x.shape) for dim in dims], self.reason(what))

    def close_index(self, value: Any) -> None:
        """Close what an index depends on."""
        for ref in refs_in(value):
            self.atoms.close_all(self.of(ref), self.reason("they are used as an index"))

    def write(self, refs: Sequence[Any], components: Sequence[Components]) -> None:
        """Note that what is computed has these atoms of weights."""
        for ref, operand in zip(refs, components, strict=True):
            if ref in self.weights:
                for component in operand:
                    self.atoms.write(component.ids)

    def merged(self, refs: Sequence[Any], group: Mapping[int, Component]) -> Tensor:
        """The atoms of what is computed of operands that have met; of weights it is noted of which ones."""
        first, *others = [group[i].ids for i in group]
        if all([ref in self.weights for ref in refs]):
            self.atoms.compute(first, others)
        return first

    def fold(self, weight: Ref, atoms: Tensor, constant: float, bias: Any) -> Fold | None:
        """How a bias takes a constant that a weight reads, if both are parameters that nothing else uses."""
        name, other = self._leaf(weight), self._leaf(bias)
        if name is None or other is None or len(bias.shape) != 1 or math.isnan(constant):
            return None
        found = [dim for dim, first, count in self.starts[name] if ((atoms >= first) & (atoms < first + count)).all()]
        return Fold(name, found[0], constant, other) if found and found[0] < 2 else None

    def ends(self) -> Tensor:
        """The atoms of leaves that are closed, but for those that are only because others were preferred."""
        count = max([first + size for places in self.starts.values() for _, first, size in places], default=0)
        ids, only = torch.arange(count), [reason.startswith(SHARED) for reason in self.atoms.reasons]
        reasons = self.atoms.closed()[self.atoms.find(ids)]
        return ids[(reasons >= 0) & ~torch.tensor(only)[reasons]]

    def is_kept(self, ids: Tensor) -> bool:
        """Whether another pass has closed some atoms."""
        return self.kept is not None and bool(torch.isin(ids, self.kept).all())

    def is_fixed(self, ids: Tensor) -> bool:
        """Whether atoms are of leaves that no training makes zero."""
        return bool(torch.isin(ids, torch.cat(self._fixed)).all())

    def heads(self) -> Tensor:
        """The atoms of heads, and of their features."""
        return torch.cat([torch.zeros(0, dtype=torch.int64), *self._heads])

    def meet_heads(self, components: Components, ndim: int) -> None:
        """Note which atoms come to a product of two tensors by a dimension that is none of the two of its matrices."""
        self.multiplies = self.multiplies or bool(components)
        self._heads += [c.ids.reshape(-1) for c in components if c.dims - {ndim - 1, ndim - 2}]

    def by_features(self, components: Components) -> Components:
        """Components that a view has given several dimensions, by the last of these if they are of heads."""
        if self.inside is None:
            return components
        made: Components = []
        for c in components:
            here = len(c.dims) > 1 and bool(torch.isin(c.ids, self.inside).any())
            made += self.atoms.rigid([c], sorted(c.dims)[:-1], "") if here else [c]
        return made

    def multiply(self, ids: Tensor, dead: bool) -> None:
        """End the way of channels in a product of two tensors, whose scale may go by their number."""
        reason = self.reason("a product of two tensors of channels, whose scale may go by their number")
        if dead:
            self.try_out(ids, reason)
        else:
            self.atoms.close(ids, reason)

    def try_out(self, ids: Tensor, reason: str) -> None:
        """Note that channels go only if no number of the forward pass comes from how many there are."""
        self._tried.append((ids.reshape(-1), reason))

    def multiplied(self, sets: Tensor) -> str | None:
        """Why some sets may go only if all numbers of the forward pass are tried out, if they may not else."""
        cut = [(cuts.ids, cuts.reason) for cuts in self._cuts.values()]
        found = [reason for ids, reason in (*self._tried, *cut) if torch.isin(self.atoms.find(ids), sets).any()]
        return found[0] if found else None

    def part(self, x: Ref, component: Component, dim: int, start: int, length: int) -> Component | None:
        """The atoms of one of several unequal parts, as of queries, keys and values; None if they cannot go.

        Where parts end is a number in the code. It can follow in attention whose counts of heads are known, if every
        group of heads has its share of each part, which is seen in the end.
        """
        operation = self.operation
        heads = None if operation is None else self._packs_unequally(operation.module)
        if heads is None or dim not in component.dims:
            return None
        apart = x.shape[dim:] == (heads.queries + 2 * heads.keys, heads.size)  # A view has made heads a dimension.
        reason = self.reason("unequal parts are taken")
        if apart and self.inside is None:
            component = next(iter(self.atoms.rigid([component], component.dims - {dim}, reason)), component)
        if component.dims != {dim}:
            return None
        queries = heads.queries * (1 if apart else heads.size) if heads.keys == 1 else 0
        new = _Parts(component.ids, set(), reason, queries)
        self._parts.setdefault((x, dim), new).taken.add((start, length))
        self.summed.append(component.ids)  # What is left goes with other parts.
        if apart and length == 1:  # Of a single head its features go on, as atoms that are of no leaf.
            return Component(self.atoms.new(heads.size).reshape([1] * (dim + 1) + [-1]), UNKNOWN)
        return Component(component.ids.narrow(dim, start, length), component.dead)

    def cut(self, x: Ref, component: Component, dim: int, start: int, length: int) -> Component:
        """The atoms of one of several unequal parts. Their sizes are numbers; that these follow is seen by trying out.

        One number may be the size of several parts, so that equal ones go together.
        """
        cuts = self._cuts.setdefault((x, dim), _Cuts(component.ids, self.reason("unequal parts are taken"), {}))
        starts = cuts.taken.setdefault(length, set())
        part = component.ids.narrow(dim, start, length)
        for other in starts:
            self.atoms.join(component.ids.narrow(dim, other, length), part, cuts.reason)
        starts.add(start)
        self.summed.append(component.ids)  # What is left goes with other parts.
        return Component(part, component.dead)

    def _check_cuts(self, cuts: _Cuts, size: int) -> None:
        """Close atoms of unequal parts unless these are all that there is, each of it once."""
        if not _are_all([(start, length) for length, starts in cuts.taken.items() for start in starts], size):
            self.atoms.close(cuts.ids, cuts.reason)

    def _check_parts(self, parts: _Parts) -> None:
        """Close atoms of unequal parts unless these are all that there is, with a share of each set in every part.

        Where all queries have one head of keys and values, these stay, and heads of queries go alone.
        """
        ids = parts.ids.reshape(-1)
        shared = parts.queries > 0 and (0, parts.queries) in parts.taken
        if shared:
            self.atoms.close(ids[parts.queries :], parts.reason)
        sets = self.atoms.find(ids)
        kinds, begin = sets.unique(), 0
        for start, length in sorted(parts.taken):
            found, counts = sets[start : start + length].unique(return_counts=True)
            whole = shared or (torch.equal(found, kinds) and not bool((counts != counts[0]).any()))
            if start != begin or not whole:
                break
            begin = start + length
        if begin != len(sets):
            self.atoms.close(parts.ids, parts.reason)

    def necks(self, families: Sequence[Tensor]) -> list[bool]:
        """For each of some families of sets whether outputs are the same at every input once all of it is dead."""
        numbers = torch.full((len(self.atoms.parents),), -1)
        for i, sets in enumerate(families):
            numbers[sets] = i
        # The families without which each tensor is a constant; tensors that are constants anyhow are not among them.
        cuts: dict[Ref, frozenset[int]] = {}
        zeros: dict[Ref, frozenset[int]] = {}  # Those without which it is zero.
        made: set[Ref] = set()
        for operation in self.recording.operations:
            given = refs_in([operation.args, operation.kwargs])
            cuts.update({ref: frozenset[int]() for ref in given if ref not in made and ref not in self.weights})
            before = [cuts[ref] for ref in given if ref in cuts]
            changed = [other for ref in operation.written for other in self._shapes.get(ref.storage, ())]
            if before:
                cuts.update(dict.fromkeys(changed, frozenset[int]()))  # Views of what is written into.
                zeros.update(dict.fromkeys(changed, frozenset[int]()))
            is_zero = operation.name in _PRODUCTS or (operation.name in _OF_ZEROS and len(given) == 1)
            zero = frozenset[int]().union(*[zeros.get(ref, ()) for ref in given if is_zero])
            for ref in (*operation.results, *operation.written):
                if before and ref not in self.weights:
                    zeros[ref] = zero | self._killers(ref, numbers, of_zeros=True)
                    cuts[ref] = frozenset.intersection(*before) | self._killers(ref, numbers) | zeros[ref]
            made.update([*operation.results, *operation.written])
        ends = [cuts[ref] for ref in self.recording.outputs if ref in cuts]
        found = frozenset.intersection(*ends) if ends else frozenset[int]()
        return [i in found for i in range(len(families))]

    def _killers(self, ref: Ref, numbers: Tensor, of_zeros: bool = False) -> frozenset[int]:
        """The families each of which has all entries of a tensor, or those alone that leave zeros there."""
        known = [c for c in self.known.get(ref, ()) if c.dead == 0 or not of_zeros]
        found = [numbers[self.atoms.find(c.ids)].unique() for c in known]
        return frozenset([int(each) for each in found if each.numel() == 1 and int(each) >= 0])

    def is_parameter(self, ref: Ref) -> bool:
        """Whether a tensor is a parameter, or a view of one."""
        return ref.storage in self._stored

    def _leaf(self, ref: Any) -> str | None:
        """The name of a parameter that is used once, as it is or with its dimensions in another order."""
        if not isinstance(ref, Ref) or self._uses.get(ref.storage) != 1:
            return None
        order = lambda x: (x.dtype, x.place[:2], sorted(zip(x.shape, x.place[2], strict=True)))
        return next((name for name, own in self._parameters.items() if order(own) == order(ref)), None)

    def _follow(self, operation: Operation) -> None:
        self.operation = operation
        given = [ref for value in (operation.args, operation.kwargs) for ref in refs_in(value)]
        self.used.update(given)
        self._note_alike(operation, given)
        self.summed = []
        before = [c.ids.reshape(-1) for ref in given for c in self.of(ref)]
        found = self._rule_of(operation)(self, operation)
        self._close_dropped(before, [c.ids for components in found for c in components])
        if given and all([ref in self.weights for ref in given]):
            self.weights.update(operation.results)
        for i, ref in enumerate(operation.results):
            components = list(found[i]) if i < len(found) else []
            if ref in operation.written or any([ref.storage == into.storage for into in operation.written]):
                self._overwrite(ref, components)
            self._note(ref, components)

    def _close_dropped(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Close what has reached an operation, did not come out of it, and did not end in a sum."""
        if before:
            seen = [
                self.atoms.find(ids.reshape(-1)) for ids in (*after, *self.summed, torch.zeros(1, dtype=torch.int64))
            ]
            given = self.atoms.find(torch.cat(list(before)))
            dropped = given[~torch.isin(given, torch.cat(seen))]
            if len(dropped):
                self.atoms.close(dropped.unique(), self.reason("they do not come out of an operation"))

    def _note(self, ref: Ref, components: Components) -> None:
        self.known[ref] = components
        self._shapes.setdefault(ref.storage, set()).add(ref)
        where = self.operation
        for component in components:
            if len(component.dims) > 1:
                name = "" if where is None else self.reason("they are counted together")
                self._several.append((component.ids, name))

    def alike(self, ref: Ref, dim: int) -> bool:
        """Whether all entries of an index along a dimension are known to be the same, as where it was expanded."""
        return dim < 0 or ref.place[2][dim] == 0 or dim in self._alike.get(ref, ())

    def _note_alike(self, operation: Operation, given: Sequence[Ref]) -> None:
        function = operation.function
        same = torch.Tag.pointwise in function.tags and torch.Tag.nondeterministic_seeded not in function.tags
        found: dict[Ref, set[int]] = {}
        for made in operation.results if same or operation.name in _COPIES else ():
            if made.dtype in (torch.int64, torch.int32):
                ndim = len(made.shape)  # Shapes are aligned at their ends.
                alike = lambda dim, ndim=ndim: all([self.alike(ref, dim - ndim + len(ref.shape)) for ref in given])
                found[made] = {dim for dim in range(ndim) if alike(dim)}
        changed = {ref.storage for ref in operation.written}
        for ref in [ref for ref in self._alike if ref.storage in changed]:
            del self._alike[ref]
        self._alike.update(found)

    def _overwrite(self, ref: Ref, components: Components) -> None:
        """Views of what an operation has written into hold other numbers now."""
        before = {c.dead for c in self.known.get(ref, ())}
        if before == {c.dead for c in components} and not any([math.isnan(dead) for dead in before]):
            return
        for other in self._shapes.get(ref.storage, ()):
            if other != ref:
                self.known[other] = [Component(ids, UNKNOWN) for ids, _ in self.known[other]]

    def _straighten(self) -> None:
        """Join atoms until those of each tensor go by whole slices, of its last dimension where nothing else says."""
        changed = True
        while changed:
            changed = False
            for ids, reason in self._several:
                for component in self.atoms.settle([Component(ids, 0.0)]):
                    dims = sorted(component.dims)
                    if len(dims) > 1:
                        before = self.atoms.find(component.ids)
                        self.atoms.rigid([component], dims[:-1], reason)
                        # Slices with entries of no channel, as padding has, are closed, and differ for good.
                        changed = changed or not torch.equal(before, self.atoms.find(component.ids))


#: What gives the same entries, or the same ones several times.
_COPIES = ("clone", "contiguous", "_to_copy", "repeat")


def _are_all(parts: Iterable[tuple[int, int]], size: int) -> bool:
    """Whether parts, by their first entries and lengths, are all of a dimension, each entry once."""
    end = 0
    for start, length in sorted(parts):
        if start != end:
            return False
        end += length
    return end == size


def _divided(recording: Recording) -> set[tuple[Ref, int]]:
    """The tensors, with a dimension, of which slices are all parts, and not all as long."""
    slices: dict[tuple[Ref, int], set[tuple[int, int]]] = {}
    for operation in recording.operations:
        if operation.name == "slice" and (argument(operation, "step", 1) or 1) == 1:
            x, dim = operation.args[0], argument(operation, "dim", 0) % len(operation.args[0].shape)
            start, length = argument(operation, "start") or 0, operation.results[0].shape[dim]
            start = start + x.shape[dim] if start < 0 else start
            if length < x.shape[dim]:
                slices.setdefault((x, dim), set()).add((start, length))
    unequal = lambda parts: len({length for _, length in parts}) > 1
    return {(x, dim) for (x, dim), parts in slices.items() if unequal(parts) and _are_all(parts, x.shape[dim])}


def _uses(recording: Recording) -> dict[Any, float]:
    """How many operations use the memory of each tensor, views aside; infinitely many if one writes into it."""
    uses: dict[Any, float] = {ref.storage: math.inf for ref in recording.outputs}
    for operation in recording.operations:
        views = {ref.storage for ref in operation.results}
        for storage in {ref.storage for ref in refs_in([operation.args, operation.kwargs])} - views:
            uses[storage] = uses.get(storage, 0) + 1
        uses.update({ref.storage: math.inf for ref in operation.written})
    return uses


def unknown(flow: Flow, operation: Operation) -> list[Components]:
    """The rule of operations that none is for."""
    for ref in refs_in([operation.args, operation.kwargs]):
        flow.atoms.close_all(flow.of(ref), flow.reason("an operation that is not followed"))
    return []


def argument(operation: Operation, name: str, default: Any = None) -> Any:
    """An argument of an operation by its name, wherever it stands."""
    for i, argument in enumerate(operation.function._schema.arguments):
        if argument.name == name:
            if i < len(operation.args):
                return operation.args[i]
            if name in operation.kwargs:
                return operation.kwargs[name]
            return default if argument.default_value is None else argument.default_value
    return default
