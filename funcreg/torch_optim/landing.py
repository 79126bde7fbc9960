"""What the hook of a regularized optimizer computes: the proximal point of what a step reached, plain or compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Params, Scalar, Schedule
from funcreg.core.inputs import at
from funcreg.core.leafwise import check_has_numbers, compute, compute_wide, product, scalar_device
from funcreg.core.tree import ABSENT, Absent, leaf_paths, tree_leaves
from funcreg.fused.memory import Pieces
from funcreg.fused.step import FusedStep
from funcreg.networks.coupled import Matrices
from funcreg.regularizers.composition import Term
from funcreg.regularizers.penalty import Penalty
from funcreg.torch_optim.denominators import Rule
from funcreg.transforms.factory_checks import nonnegative
from funcreg.transforms.proximal import land
from funcreg.transforms.transform import Transform, at_step, check_fit, is_scheduled

#: Entries up to which leaves are laid end to end, where that takes fewer operations and as much time for each.
_SMALL = 1 << 14


class Task(NamedTuple):
    """A penalty with all that it takes, and the rule of the optimizer that it follows."""

    penalty: Penalty
    hyper: tuple[Hyper | Schedule, ...]
    strength: Hyper | Schedule
    options: dict[str, Any]
    rule: Rule
    inner_steps: int | None
    max_step: Scalar | None

    @property
    def is_scheduled(self) -> bool:
        return is_scheduled(self.strength, *self.hyper)

    def at(self, steps: int) -> tuple[Hyper, ...]:
        """Strength and hyperparameters at a step."""
        strength, *hyper = (at_step(value, steps) for value in (self.strength, *self.hyper))
        if self.is_scheduled or isinstance(strength, Tensor):  # A tensor may have been changed in place.
            nonnegative(strength=strength)
        return (strength, *hyper)

    def inner(self, params: Params) -> int | None:
        """How many inner steps are taken; None for the penalty's own rule."""
        if self.inner_steps is not None or self.rule.source is None:
            return self.inner_steps
        _, *values = self.at(0)
        return None if self.penalty.in_metric(params, *values, **self.options) else 1

    def land(
        self,
        start: Params,
        reached: Params,
        sources: Params | None,
        scalars: Sequence[Hyper],
        values: Sequence[Hyper],
        count: int | None,
        common: Scalar | None = None,
    ) -> Params:
        """The proximal point of what an optimizer reached.

        Args:
            start: The parameters before the step, of which the first of inner steps needs to know.
            reached: The parameters after it.
            sources: What the metric is made of.
            scalars: The step and what else the metric is made of, each one for all leaves or a tree.
            values: Strength and hyperparameters.
            count: Number of inner steps.
            common: For leaves that take one step, and may have others, which then are in the metric: that step.
        """
        rate, *rest = scalars
        h = None if sources is None else compute_wide(self.rule.metric, sources, hyper=rest)
        if h is not None and self.max_step is not None:
            h = compute_wide(lambda h, r, m: h.clamp(min=r / m), h, hyper=(rate, self.max_step))
        if common is not None:
            if h is not None and isinstance(rate, dict):
                h = compute_wide(lambda h, r, c: h * _ratio(c, r), h, hyper=(rate, common))
            rate = common
        step = product(reached, rate, values[0])
        return land(start, reached, step, h, self.penalty, list(values[1:]), count, None, self.options)

    def term(self) -> Term:
        """The penalty with its hyperparameters at the first step, without its strength."""
        _, *hyper = self.at(0)
        return Term(self.penalty, (), tuple(hyper), tuple(self.options.items()))

    def value(self, params: Params, steps: int) -> Tensor:
        """Strength times penalty."""
        strength, *values = self.at(steps)
        return self.penalty.weighted_value(params, strength, *values, **self.options)

    def check(self, params: Params) -> set[str]:
        """The leaves that a proximal step touches, or the error that it would raise; without computing it, if possible.

        Raises:
            ValueError: There is no such step for these parameters.
        """
        values = self.at(0)
        check_fit(params, None, *values)
        self._check_has_numbers(params, values)
        try:
            likes = {k: w if isinstance(w, Absent) else torch.empty_like(w, device="meta") for k, w in params.items()}
            return self._touched(likes, values)
        except (NotImplementedError, RuntimeError):  # Something has to see numbers.
            return self._touched(params, values)

    def _check_has_numbers(self, params: Params, values: Sequence[Hyper]) -> None:
        """Raise an error for tensors on the meta device, on which the try below, of shapes, would say nothing."""
        own = [x for part in self.term().parts() for x in (*part.factors, *part.hyper)]
        named = [("strength", values[0]), *[("a hyperparameter", x) for x in (*values[1:], *own)]]
        found = [
            (at(name, path), x)
            for name, tree in named
            for path, x in zip(leaf_paths(tree), tree_leaves(tree), strict=True)
        ]
        for leaf in tree_leaves(params)[:1]:
            for name, x in found:
                check_has_numbers(x, leaf, name)

    def _touched(self, params: Params, values: Sequence[Hyper]) -> set[str]:
        h = None
        if self.rule.source is not None:
            h = {k: w if isinstance(w, Absent) else torch.ones_like(w.real) for k, w in params.items()}
        step, count = product(params, 1.0, values[0]), self.inner(params)
        landed = land(params, params, step, h, self.penalty, [*values[1:]], count, None, self.options)
        return {k for k, w in params.items() if not isinstance(w, Absent) and landed[k] is not w}


def _ratio(step: Scalar, own: Scalar) -> Scalar:
    """By how much a step exceeds a leaf's own, which is 0 only if both are: nothing moves then, in any metric."""
    if isinstance(own, Tensor):
        return torch.where(own == 0, torch.ones_like(own), step / own)
    return step / own if own else 1.0


def acts_on_entries(task: Task) -> bool:
    """Whether a penalty is one rule for each entry, with numbers that are the same for all leaves."""
    strength, parts = task.at(0)[0], task.term().parts()
    numbers = [strength, *[x for part in parts for x in (*part.factors, *part.hyper)]]
    single = all([isinstance(x, (int, float)) or (isinstance(x, Tensor) and not x.ndim) for x in numbers])
    return single and all([part.penalty.separable is True and part.mask is None for part in parts])


class EndToEnd:
    """Leaves of which small ones of one class are a single leaf, for a rule for each entry.

    Args:
        leaves: The leaves.
        sources: What the metric is made of.
        classes: Which of them take one step.
    """

    def __init__(self, leaves: dict[str, Tensor], sources: dict[str, Tensor] | None, classes: dict[str, int]) -> None:
        runs: dict[Any, list[str]] = {}
        for name, w in leaves.items():
            with_source = (w,) if sources is None else (w, sources[name])
            small = w.numel() <= _SMALL and all(
                [type(x) is Tensor and x.layout == torch.strided and x.shape == w.shape for x in with_source]
            )
            key = (classes[name], *[(x.dtype, x.device) for x in with_source]) if small else name
            runs.setdefault(key, []).append(name)
        self._runs = {run[0]: run for run in runs.values()}
        self._pieces = {label: Pieces([leaves[n].shape for n in run]) for label, run in self._runs.items() if run[1:]}
        self._classes = {label: classes[label] for label in self._runs}

    def land(
        self,
        task: Task,
        leaves: dict[str, Tensor],
        sources: dict[str, Tensor] | None,
        columns: Sequence[Sequence[Any]],
        values: Sequence[Hyper],
    ) -> dict[str, Tensor]:
        """The proximal points of leaves like these."""
        reached = self._joined(leaves)
        scalars = laid_out(columns, self._classes, reached)
        joined = None if sources is None else self._joined(sources)
        landed = task.land(reached, reached, joined, scalars, values, None)
        found = {}
        for label, run in self._runs.items():
            made = self._pieces[label].of(landed[label]) if label in self._pieces else [landed[label]]
            found.update(zip(run, made, strict=True))
        return found

    def _joined(self, of: dict[str, Tensor]) -> dict[str, Tensor]:
        one = lambda label, run: torch.cat(self._pieces[label].flat([of[name] for name in run]))
        return {label: one(label, run) if label in self._pieces else of[label] for label, run in self._runs.items()}


class Sets(NamedTuple):
    """Which leaves of a penalty that couples leaves take one step."""

    first: dict[str, int]
    """By the name of a leaf the class whose step it takes."""
    apart: bool
    """Whether leaves that take one step may be landed without the others."""


def land_in_sets(
    task: Task,
    start: Params,
    reached: Params,
    sources: Params | None,
    columns: Sequence[Sequence[Any]],
    classes: dict[str, int],
    values: Sequence[Hyper],
    count: int | None,
    sets: Sets,
) -> Params:
    """The proximal points for a penalty that couples leaves: the leaves of each set with the step that they share."""
    scalars, found = laid_out(columns, classes, reached), dict(reached)
    for first in dict.fromkeys(sets.first.values()):
        own = {name for name, number in sets.first.items() if number == first}
        whole = not sets.apart or len(own) == len(sets.first)
        trees = [x if whole or not isinstance(x, dict) else _only(x, own) for x in (start, reached, sources, *scalars)]
        begin, goal, h, *numbers = trees
        landed = task.land(begin, goal, h, numbers, values, count, columns[first][0])
        found.update({name: landed[name] for name in own})
    return found


def _only(tree: Params, names: set[str]) -> Params:
    return {name: x if name in names else ABSENT for name, x in tree.items()}


class _Slots(NamedTuple):
    """What a compiled step reads anew: scalars of each class of leaves, and values that follow a schedule."""

    scalars: list[list[Tensor]]
    values: list[Tensor]


def laid_out(columns: Sequence[Sequence[Any]], classes: dict[str, int], tree: Params) -> list[Hyper]:
    """Scalars of each class as hyperparameters: one for all leaves if there is one class, else trees."""
    # Tensors are one if they are the same: inside a compiler, and on a device, their numbers are not known.
    like = lambda x, first: x is first or (not isinstance(x, Tensor) and not isinstance(first, Tensor) and x == first)
    same = lambda i: all([like(column[i], columns[0][i]) for column in columns])
    spread = lambda i: {k: w if isinstance(w, Absent) else columns[classes[k]][i] for k, w in tree.items()}
    return [columns[0][i] if same(i) else spread(i) for i in range(len(columns[0]))]


class _Numbers:
    """0-dim tensors that hold the numbers of a call, so that a compiled step does not change with them."""

    def __init__(self, count: int, tensors: Sequence[Tensor]) -> None:
        wide = any([x.dtype in (torch.float64, torch.complex128) for x in tensors])
        dtype = torch.float64 if wide else torch.float32
        self.tensors = [torch.zeros((), dtype=dtype, device=scalar_device(tensors)) for _ in range(count)]
        self._last: list[Any] = [None] * count

    def read(self, given: Sequence[Any]) -> None:
        """Hold other numbers, which may be tensors."""
        for i, (place, x) in enumerate(zip(self.tensors, given, strict=True)):
            if isinstance(x, Tensor):
                place.copy_(x)
            elif self._last[i] != x:
                place.fill_(x)
            self._last[i] = None if isinstance(x, Tensor) else x


class CompiledLanding:
    """A compiled step for one set of leaves."""

    def __init__(
        self, task: Task, params: Params, classes: dict[str, int], columns: Any, values: Any, sets: Sets | None
    ) -> None:
        self._moving = [i for i, value in enumerate((task.strength, *task.hyper)) if callable(value)]
        self._numbers = _Numbers(sum(map(len, columns)) + len(self._moving), tree_leaves(params))
        found = iter(self._numbers.tensors)
        self._slots = _Slots([[next(found) for _ in column] for column in columns], [*found])
        fixed = list(values)

        def update(sources: Params, slots: _Slots, params: Params) -> tuple[Params, _Slots]:
            given = list(fixed)
            for i, value in zip(self._moving, slots.values, strict=True):
                given[i] = value
            h = None if task.rule.source is None else sources
            scalars = slots.scalars
            if sets is None:
                landed = task.land(params, params, h, laid_out(scalars, classes, params), given, None)
            else:
                landed = land_in_sets(task, params, params, h, scalars, classes, given, None, sets)
            # In the dtype of the parameters, or w + (0 - w) would not be 0.
            return compute(lambda w, z: z - w, params, landed), slots

        self._step = FusedStep(Transform(lambda params: self._slots, update), donate=True, loose=True)

    def __call__(self, params: Params, sources: Params, columns: Any, values: Any) -> None:
        self._numbers.read([x for column in columns for x in column] + [values[i] for i in self._moving])
        self._step(params, sources, self._slots)


class CompiledRows:
    """The proximal operator of rows that `coupled` gathers, compiled once for matrices of many shapes: a `LandRows`.

    The families of a deep network differ in shape and in the number of their leaves. Kernels for each, which gather
    rows as well, compile for minutes; of rows that were gathered by plain operations few kernels serve all.
    """

    def __init__(self, penalty: Penalty, backend: str = "inductor") -> None:
        self._penalty = penalty
        self._options: dict[int, dict[str, Any]] = {}  # By the number of a family, which tells sets of them apart.
        self._in_metric = False
        self._numbers: _Numbers | None = None
        self._step = FusedStep(Transform(lambda rows: [], self._update), False, backend)

    def __call__(self, matrices: Matrices, step: Hyper, hyper: Sequence[Hyper]) -> list[Tensor]:
        found = [*matrices]
        if not found:
            return []
        self._options = {number: options for number, _, options in found}
        self._in_metric = len(found[0][1]) > 1
        rows = {number: own[0] for number, own, _ in found}
        # What is not read stands for what is like the parameters.
        metrics = {n: own[1] if self._in_metric else own[0].new_zeros(()).expand_as(own[0]) for n, own, _ in found}
        if self._numbers is None:
            self._numbers = _Numbers(1 + len(hyper), [*rows.values()])
        self._numbers.read([step, *hyper])
        landed, _ = self._step(rows, metrics, self._numbers.tensors)
        return [landed[number] for number in rows]

    def _update(self, metrics: Params, numbers: list[Tensor], rows: Params) -> tuple[Params, list[Tensor]]:
        step, *hyper = numbers
        landed = {
            number: self._penalty.prox(
                w, step, *hyper, metric=metrics[number] if self._in_metric else None, **self._options[number]
            )
            for number, w in rows.items()
        }
        # In the dtype of the parameters, or w + (0 - w) would not be 0.
        return compute(lambda w, z: z - w, rows, landed), numbers
