"""The steps of an optimizer as a penalty follows them: which leaves moved, how far, and where they land."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from funcreg.core._typing import Params, Scalar
from funcreg.core.frozen import gradients_of
from funcreg.core.leafwise import widen
from funcreg.core.masks import listed
from funcreg.core.rounding import is_narrow
from funcreg.core.tree import ABSENT, tree_leaves
from funcreg.core.undocumented import copy_all, is_traced, versions
from funcreg.networks.coupled import is_coupled
from funcreg.torch_optim.denominators import Entries, buffered, gain, known_number
from funcreg.torch_optim.landing import CompiledLanding, EndToEnd, Sets, Task, acts_on_entries, laid_out, land_in_sets
from funcreg.torch_optim.parameter_names import Moved, ParameterNames
from funcreg.torch_optim.penalized_parameters import PenalizedParameters
from funcreg.torch_optim.remarks import Remarks
from funcreg.transforms.regularizing import projects
from funcreg.transforms.transform import is_scheduled

#: Entries from which on a compiled step saves more than its first call costs.
_WORTH_COMPILING = 1 << 20
#: What a metric is made of for a leaf that the optimizer has never moved: so much that the leaf stays where it is.
_IMMOVABLE = 1e8
#: Sets of leaves for which a compiled step is kept.
_LAYOUTS = 4
_PLAIN = (Tensor, nn.Parameter)


class FollowedSteps(PenalizedParameters):
    """What moves in the steps of an optimizer, and how it lands; see `regularize`.

    Args:
        optimizer: The optimizer.
        task: What is computed.
        names: The names of its parameters.
        compile: Whether to compile the step, or None for where it pays.
    """

    def __init__(self, optimizer: Optimizer, task: Task, names: ParameterNames, compile: bool | None) -> None:
        self._compile = compile
        super().__init__(optimizer, task, names)
        self._acts_on_entries = self._inner is None and acts_on_entries(self._task)
        self._notes: dict[Tensor, Any] = {}
        self._starts: dict[Tensor, Tensor] = {}
        self._buffers: dict[int, Scalar] = {}  # The sum of the weights of gradients in the buffers of a group.
        self._seen: tuple[list[Any], ...] = ()  # Parameters, their gradients as far as None, groups,
        self._moving: list[Moved] = []  # and what moves of them;
        self._held: set[Moved] = set()  # what stays, and may share groups with what moves;
        self._leaves: list[Moved] = []  # both;
        self._absent: Params = {}  # what stands for the others.
        self._entries = 0  # Of what moves or is held.
        self._ever: set[str] = set()  # What has moved in any of the steps.
        self._counted: list[Any] = []
        self._written_to: list[int] = []  # How often counters were.
        self._classes: list[int] = []
        self._layouts: dict[Any, CompiledLanding | None] = {}
        self._ends: tuple[EndToEnd | None, Any, Any] = None, None, None  # For what moves and its classes, as they were.
        self._had: set[Tensor] = set()  # What had a gradient before or in a step that may take it away.
        self._remarks = Remarks(self, names)

    def _note_gradients(self, optimizer: Optimizer) -> None:
        params = [w for group in optimizer.param_groups for w in group["params"]]
        self._had |= {w for w, g in zip(params, gradients_of(params), strict=True) if g is not None}

    def _seeing(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure after which it is seen which parameters have gradients."""

        def seen() -> Any:
            loss = closure()
            self._note_gradients(optimizer)
            return loss

        return seen

    def _penalized(self, leaves: list[Moved]) -> list[Moved]:
        """Those on which the penalty acts."""
        return [m for m in leaves if m.name in self._touched]

    def _read_added(self, optimizer: Optimizer) -> None:
        """Read the names of parameters that the optimizer got, or that got another shape or dtype, since the last step.

        What is kept from step to step, such as places in compiled kernels, is of those that were there before.
        """
        params = [w for group in optimizer.param_groups for w in group["params"]]
        if not self._names.are_of(params):
            self._seen, self._layouts, self._ends = (), {}, (None, None, None)
            try:
                self._names.read(optimizer)
                self._check_added()
            except BaseException:
                self._names.forget()  # So that the next step raises this error again, and does not go on with a part.
                raise

    def _moved(self, optimizer: Optimizer) -> list[Moved]:
        groups = [group["params"] for group in optimizer.param_groups]
        params = [w for group in groups for w in group]
        if [*map(id, params)] != self._names.ids:  # A closure may add some.
            self._read_added(optimizer)
        still = [g is None and w not in self._had for w, g in zip(params, gradients_of(params), strict=True)]
        seen = [*map(id, params)], still, [*map(len, groups)]
        if seen == self._seen:
            return self._moving
        names, chosen = self._names.names, self._names.chosen
        places = [i for i, group in enumerate(groups) for _ in group]
        rows = zip(params, places, still, strict=True)
        moved = [Moved(names[w], w, i) for w, i, stays in rows if not stays]
        # Until all is found out, nothing is: an interrupt in between must not leave a part.
        self._seen, self._moving, self._counted = (), [m for m in moved if m.name in chosen], []
        self._ever.update([m.name for m in self._moving])
        stays = {*names.values()}.difference([m.name for m in self._moving])
        held = stays.intersection(set().union(*self._linked))
        rows = zip(params, places, strict=True)
        self._leaves = [Moved(names[w], w, i) for w, i in rows if names[w] in held or names[w] not in stays]
        self._held = {m for m in self._leaves if m.name in held}
        self._entries = sum([m.w.numel() for m in self._leaves])
        self._absent = {name: ABSENT for name in names.values() if name in stays - held}
        self._seen = seen
        if any(still):
            self._remarks.of_replaced()
            self._remarks.of_frozen(optimizer, params)
        return self._moving

    def _columns(self, groups: list[Entries], moved: list[Moved], entries: list[Entries]) -> list[tuple[Scalar, ...]]:
        """The scalars of each class of parameters: those of one group that have seen as many steps, or stay."""
        rule, leaves = self._task.rule, self._leaves
        counted = [each["step"] for each in entries] if rule.counts else [m.group for m in leaves]
        # Counters that were the same, and were written to equally often since, are the same: read once, for devices.
        before, self._written_to = self._written_to, versions([x for x in counted if isinstance(x, Tensor)])
        apart = len({x - y for x, y in zip(self._written_to, before, strict=False)}) > 1
        if apart or len(counted) != len(self._counted) or not all(map(operator.is_, counted, self._counted)):
            self._counted = []  # Until there are classes of these.
            stay = [rule.counts and m in self._held for m in leaves]
            keys = list(zip([m.group for m in leaves], _numbers(counted), stay, strict=True))
            numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
            self._classes, self._counted = [numbers[key] for key in keys], counted
        firsts = [self._classes.index(i) for i in range(max(self._classes) + 1)]
        factors = self._gains(groups, {m.group for m in leaves}, {m.group for m in moved}) if rule.buffers else {}
        columns = []
        for i in firsts:
            group = leaves[i].group
            rate, *rest = rule.scalars(entries[i], groups[group])
            columns.append((rate * factors[group] if group in factors else rate, *rest))
        return columns

    def _gains(self, groups: list[Entries], wanted: set[int], moved: set[int]) -> dict[int, Scalar]:
        """By how much the directions of some groups exceed a gradient, also while a scheduler changes momentum."""
        found: dict[int, Scalar] = {}
        for i in wanted:
            momentum = groups[i]["momentum"]
            if isinstance(momentum, Tensor) or momentum != 0:
                if i in moved or i not in self._buffers:
                    self._buffers[i] = buffered(groups[i], self._buffers.get(i))
                found[i] = gain(groups[i], self._buffers[i])
        return found

    def _land(self, optimizer: Optimizer, moved: list[Moved], values: Any, skipped: Tensor | None, looks: bool) -> None:
        task, groups, leaves = self._task, optimizer.param_groups, self._leaves
        # Without a look that makes an entry where there is none: the state stays what it was.
        entries = [optimizer.state.get(m.w, {}) for m in leaves]
        known = optimizer.state.get(moved[0].w, {})  # For the scalars of leaves that have no state yet.
        columns = self._columns(groups, moved, [each or known for each in entries])
        sets = self._sets(moved, columns, groups) if task.penalty.couples_leaves else None
        keeps = torch.is_grad_enabled()
        classes = {m.name: i for m, i in zip(leaves, self._classes, strict=True)}
        sources = None
        if task.rule.source is not None:
            rows = zip(leaves, entries, strict=True)
            sources = self._tree({m.name: self._source(m, each, groups[m.group]) for m, each in rows})
        narrow = looks and "rounding" not in self._remarks.said and any([is_narrow(m.w.dtype) for m in moved])
        if narrow and self._remarks.keeps_pace(groups, values):
            wide = self._tree({m.name: widen(m.w.detach()) for m in leaves})
            starts = wide if self._inner is None else self._tree({m.name: widen(self._starts[m.w]) for m in leaves})
            self._remarks.of_rounding(moved, wide, self._landed(starts, wide, sources, columns, classes, values, sets))
        written = self._written(moved)
        may_compile = not keeps and self._may_compile()
        alone = may_compile and skipped is None and self._compiled_rows is None
        if alone and self._land_compiled(written, sources, columns, classes, values, sets):
            return
        if self._acts_on_entries and not keeps:
            landed = self._landed_by_entries(sources, columns, classes, values)
        else:
            reached = self._tree({m.name: m.w.clone() if keeps else m.w.detach() for m in leaves})
            starts = reached if self._inner is None else self._tree({m.name: self._starts[m.w] for m in leaves})
            by_rows = self._compiled_rows if may_compile and _are_plain(reached, sources) else None
            landed = self._landed(starts, reached, sources, columns, classes, values, sets, by_rows)
        found = [landed[m.name] for m in written]
        if skipped is not None:
            found = [torch.where(skipped.to(m.w.device) > 0, m.w, z) for m, z in zip(written, found, strict=True)]
        if keeps or any([type(m.w) not in _PLAIN for m in written]):
            for m, z in zip(written, found, strict=True):
                m.w.copy_(z)
        else:
            copy_all([m.w for m in written], found)

    def _tree(self, leaves: dict[str, Tensor]) -> Params:
        """The tree of the parameters, of those that are landed."""
        return {**leaves, **self._absent}

    def _land_compiled(
        self,
        written: list[Moved],
        sources: Params | None,
        columns: Any,
        classes: dict[str, int],
        values: Any,
        sets: Any,
    ) -> bool:
        """Whether parameters were landed by compiled code."""
        leaves, read_from = self._leaves, sources
        if read_from is None:  # Not read where there is no metric; gradients stand for what is like the parameters.
            read_from = self._tree({m.name: torch.zeros_like(m.w) if m.w.grad is None else m.w.grad for m in leaves})
        params = self._tree({m.name: m.w for m in leaves})
        compiled = self._layout(params, read_from, classes, columns, values, sets)
        if compiled is None:
            return False
        before = [(m.w, m.w.detach().clone()) for m in leaves if m not in written] if self._held else []
        compiled(params, read_from, columns, values)
        for w, x in before:
            w.copy_(x)
        return True

    def _landed_by_entries(
        self, sources: Params | None, columns: Any, classes: dict[str, int], values: Any
    ) -> dict[str, Tensor]:
        """Where all parameters land, end to end in one vector, by a penalty that acts on entries alone."""
        reached = {m.name: m.w.detach() for m in self._leaves}
        ends, moving, numbers = self._ends
        if ends is None or moving is not self._moving or numbers is not self._classes:
            ends = EndToEnd(reached, sources, classes)
            self._ends = ends, self._moving, self._classes
        return ends.land(self._task, reached, sources, columns, values)

    def _landed(
        self,
        starts: Params,
        reached: Params,
        sources: Params | None,
        columns: Any,
        classes: Any,
        values: Any,
        sets: Any,
        task: Task | None = None,
    ) -> Params:
        task = self._task if task is None else task
        if sets is not None:
            return land_in_sets(task, starts, reached, sources, columns, classes, values, self._inner, sets)
        return task.land(starts, reached, sources, laid_out(columns, classes, reached), values, self._inner)

    def _source(self, m: Moved, state: Entries, group: Entries) -> Tensor:
        """What the metric of a leaf is made of."""
        source = self._task.rule.source
        assert source is not None
        if not state and m in self._held:  # It has never had a gradient.
            return torch.full_like(m.w, _IMMOVABLE, dtype=widen(m.w).dtype)
        return source(m.w, state, group, self._notes.get(m.w))

    def _written(self, moved: list[Moved]) -> list[Moved]:
        """The leaves that are landed: those that moved, and of a set that couples leaves all, or it would not hold."""
        if not self._held or not projects(self._task.penalty):
            return moved
        frozen = [m.name for m in self._held if not m.w.requires_grad]
        if frozen:
            raise ValueError(
                f"{self._task.penalty.__name__} couples leaves, and {listed(frozen)} of them are frozen, by "
                "requires_grad=False, so that the set may not be reached. Leave them out of it."
            )
        return self._leaves

    def _sets(self, moved: list[Moved], columns: list[tuple[Scalar, ...]], groups: list[Entries]) -> Sets:
        """Which leaves take one step: those that share groups, and what has the same learning rate."""
        rule, numbers = self._task.rule, dict(zip([m.name for m in self._leaves], self._classes, strict=True))
        rates: dict[int, Any] = {}
        for m in self._leaves:
            rates[m.group] = known_number(groups[m.group]["lr"] if rule.counts else columns[numbers[m.name]][0])
        places, moving = {m.name: m.group for m in self._leaves}, {m.name for m in moved}
        firsts: dict[Any, int] = {}
        first: dict[str, int] = {}
        for each in self._linked:
            names = sorted(each)
            own = [name for name in names if name in moving]
            self._check_one_rate({name: places[name] for name in own}, rates)
            name = next(iter(own), names[0])
            number = firsts.setdefault(rates[places[name]], numbers[name])
            first.update(dict.fromkeys(names, number))
        return Sets(first, is_coupled(self._task.penalty))

    def _may_compile(self) -> bool:
        if self._inner is not None or self._compile is False or is_traced():
            return False
        if self._compile is None and self._compiled_rows is not None and self._task.rule.source is None:
            return False  # Without a metric, most of the time goes to gathering rows.
        return self._compile is True or self._entries >= _WORTH_COMPILING

    def _layout(
        self, params: Params, sources: Params, classes: dict[str, int], columns: Any, values: Any, sets: Sets | None
    ) -> CompiledLanding | None:
        """The compiled step for these leaves; None if they come in more than a few sets, or are no plain tensors."""
        key = tuple(classes.items()), None if sets is None else tuple(sets.first.items())
        if key not in self._layouts and len(self._layouts) < _LAYOUTS:
            scheduled_trees = [
                x for x in (self._task.strength, *self._task.hyper) if is_scheduled(x) and not callable(x)
            ]
            fits = _are_plain(params, sources) and not scheduled_trees
            self._layouts[key] = CompiledLanding(self._task, params, classes, columns, values, sets) if fits else None
        return self._layouts.get(key)


def _are_plain(*trees: Params) -> bool:
    """Whether a compiled step takes the leaves of some trees."""
    return all([type(x) in _PLAIN and x.layout == torch.strided for x in tree_leaves(trees)])


def _numbers(counted: list[Any]) -> list[Any]:
    """Counters as numbers, read from each device at once."""
    tensors = [x for x in counted if isinstance(x, Tensor)]
    if len(tensors) < len(counted):
        return [float(x) for x in counted]
    if len({x.device for x in tensors}) > 1 or any([type(x) is not Tensor for x in tensors]):
        return [x.item() for x in tensors]
    return torch.stack(tensors).tolist()
