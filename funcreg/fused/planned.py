"""Functions of trees that run by plans: one for trees of each structure, and the last call that was checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcreg.core import undocumented
from funcreg.core._typing import Params
from funcreg.core.construction import Remembering
from funcreg.core.tree import reader, restored, tree_paths
from funcreg.fused.donation import Donated, reach_of
from funcreg.fused.lowering import Compiler, say_once
from funcreg.fused.plan import Call, Plan
from funcreg.fused.recording import Record, placeholder, record

#: Structures of trees for which a function keeps a plan.
_PLANS = 32
#: Some trees or their structures, and their leaves.
Trees = Sequence[Any]
Columns = Sequence[list[Any]]


class Checked:
    """A call that was checked, and what tells whether a later one needs to be checked again.

    Its arguments are some parameters, as many gradients if it is a step, and all else.
    """

    def __init__(
        self, plan: Plan, trees: Trees, specs: Trees, arguments: list[Any], count: int, donated: Donated | None
    ) -> None:
        self.plan, self.specs, self.count, self._donated = plan, specs, count, donated
        self._readers = list(map(reader, trees))
        self._matches = undocumented.tensor_checks(arguments)
        self._has_views = any([x.is_neg() or x.is_conj() for x in arguments])
        # Leaves that begin where those of a vector do lie in it only if they are contiguous.
        lie_in_order = lambda part: all([arguments[i].is_contiguous() for i in part.positions])
        self._parts = list(filter(lie_in_order, plan.parts("parameter", "state", "gradient")))
        if donated is not None:
            addresses = list(map(Tensor.data_ptr, arguments))
            self._others = addresses[:count] + addresses[2 * count :]
            self._gradients = addresses[count : 2 * count]  # Where they are known to lie apart from donated leaves.
            self._sizes = list(map(reach_of, arguments[count : 2 * count]))

    def call(self, trees: Trees) -> Call | None:
        """The call on other trees; None if they have to be checked."""
        arguments: list[Any] = []
        for read, tree in zip(self._readers, trees, strict=True):
            leaves = read(tree)
            if leaves is None:
                return None
            arguments += leaves
        arguments += self.plan.captured
        if not self._matches(*arguments):
            return None
        addresses = list(map(Tensor.data_ptr, arguments))
        if self._donated is not None:
            begin, end = self.count, 2 * self.count
            if addresses[:begin] + addresses[end:] != self._others:
                return None
            gradients = addresses[begin:end]
            if gradients != self._gradients and self._donated.overlap(gradients, self._sizes):
                return None
            self._gradients = gradients
        return self.located(arguments, addresses)

    def located(self, arguments: list[Any], addresses: list[int]) -> Call:
        """A call with arguments that begin at some addresses, and the vectors in which they lie."""
        if self._has_views:
            arguments = [x.resolve_conj().resolve_neg() for x in arguments]
        found = {part: part.find(addresses) for part in self._parts}
        return Call(arguments, {part: vector for part, vector in found.items() if vector is not None})


class Planned(Remembering):
    """A function of trees, plans for trees of known structures, and the last call that was checked."""

    #: The leaves of what is computed from trees, or an error that says what is wrong with these.
    _results: Callable[..., list[Any]]

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        if not isinstance(backend, str) and not callable(backend):
            raise TypeError(f"backend is {backend!r}; expected the name of a backend of torch.compile, or a function")
        self._compiler = Compiler(backend)
        self._plans: dict[Any, Plan | None] = {}  # None where the function could not be recorded.
        self._last: Checked | None = None

    def _plan_of(self, found: Record, columns: Columns) -> Plan:
        """The plan of a record of `_results`, of trees with these leaves."""
        raise NotImplementedError

    def _plan(self, trees: Trees, columns: Columns, specs: Trees) -> Plan | None:
        """The plan for trees like these, made if they are new; None if that is impossible."""
        key = (tuple(specs), *(tuple(map(like, column)) for column in columns))
        _check_memory(trees[0], columns[0])
        try:
            known = self._plans.get(key)
            if key in self._plans and (known is None or known.is_valid):
                return known
            if len(self._plans) >= _PLANS:  # Trees, or numbers among extra arguments, that differ at every call.
                del self._plans[next(iter(self._plans))]
            stand_ins = [[placeholder(x) if isinstance(x, Tensor) else x for x in column] for column in columns]
            function = lambda *_: self._results(*map(restored, specs, stand_ins))
            made = self._plan_of(record(function, *(x for column in stand_ins for x in column)), columns)
        except Exception as error:
            # Of copies: what cannot be recorded may write into its arguments, and the step itself is yet to come.
            self._results(
                *[restored(spec, list(map(copied, column))) for spec, column in zip(specs, columns, strict=True)]
            )
            say_once(f"this is computed leaf by leaf, which is slow for many leaves: {type(error).__name__}: {error}")
            made = None
        try:
            self._plans[key] = made
        except TypeError:  # An extra argument without a hash, which was said.
            return None
        return made

    def _check(
        self, plan: Plan, trees: Trees, columns: Columns, specs: Trees, donated: Donated | None = None
    ) -> tuple[Checked, Call]:
        """A call on trees that were checked; later ones are compared with it."""
        arguments = [*(x for column in columns for x in column if isinstance(x, Tensor)), *plan.captured]
        checked = Checked(plan, trees, specs, arguments, len(columns[0]), donated)
        self._last = checked if len(trees) == len(columns) else None  # With extra arguments, each call is checked.
        return checked, checked.located(arguments, list(map(Tensor.data_ptr, arguments)))


def copied(x: Any) -> Any:
    """A contiguous copy of a tensor, with its numbers as they are in memory."""
    return x.clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg() if isinstance(x, Tensor) else x


def _check_memory(params: Params, leaves: list[Any]) -> None:
    """Raise an error for parameters without numbers."""
    are_meta = [x.is_meta for x in leaves]
    if any(are_meta):
        raise ValueError(
            f"leaf '{tree_paths(params)[are_meta.index(True)]}' is on the meta device, without memory to step in; "
            "expected parameters that have numbers, as after module.to_empty(device=...) and its initialization"
        )


def like(x: Any) -> tuple[Any, ...]:
    """What a plan is made for."""
    return (type(x), x.shape, x.dtype, x.device, x.layout) if isinstance(x, Tensor) else (type(x), x)
