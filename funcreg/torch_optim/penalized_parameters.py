"""The parameters of an optimizer on which a penalty acts, and errors for those on which it cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from funcreg.core.checks import shared_leaf
from funcreg.core.construction import written
from funcreg.core.frozen import gradients_of
from funcreg.core.masks import listed
from funcreg.core.ranges import concrete
from funcreg.core.selection import plain_names
from funcreg.core.wrapping import matched
from funcreg.networks.coupled import landed_by, linked, named_leaves, split_leaf
from funcreg.torch_optim.denominators import OF_ANY_SIZE, RUNS_AWAY, Entries, buffered, gain, known_number
from funcreg.torch_optim.landing import CompiledRows, Task
from funcreg.torch_optim.optimizer_hooks import OWN
from funcreg.torch_optim.parameter_names import ParameterNames
from funcreg.torch_optim.remarks import say_composed
from funcreg.transforms.regularizing import projects

#: Families of groups up to which one compilation of all that is done to them pays.
_FEW = 8


class PenalizedParameters:
    """The parameters of an optimizer on which a penalty acts.

    Args:
        optimizer: The optimizer.
        task: What is computed.
        names: The names of its parameters.
    """

    def __init__(self, optimizer: Optimizer, task: Task, names: ParameterNames) -> None:
        self._names = names
        self._given = task.strength, *task.hyper
        self._task = task
        self._seen_groups: list[Any] = []  # What was checked for the next step.
        self._inner = self._checked()
        self._check_once(optimizer)
        self._check_rates(optimizer)

    def _checked(self) -> int | None:
        """The number of inner steps, after a try that raises the errors of the first step now."""
        strength, *hyper = map(self._names.completed, self._given)
        self._task = self._task._replace(strength=strength, hyper=tuple(hyper))
        leaves = self._names.penalized()
        if self._task.rule.source is not None:
            for name, w in leaves.items():
                if w.is_complex():
                    raise ValueError(
                        f"parameter '{name}' is complex, and this optimizer divides its real and imaginary parts by "
                        "numbers of their own, for which no proximal operator is known. Leave it out with mask=, or "
                        "take SGD."
                    )
        tree = self._names.tree({name: w.detach() for name, w in leaves.items()})
        self._check_names_are_held()
        with torch.no_grad():
            self._touched = touched = self._task.check(tree)
            self._check_anchors()
            self._check_groups_are_whole()
            inner = self._task.inner(tree)
        found = [each & touched for each in linked(self._task.penalty, tree)]
        alone = touched.difference(*found) if self._task.penalty.couples_leaves else set()
        self._linked = [each for each in found if each] + [{name} for name in sorted(alone)]
        self._compiled_rows = self._with_compiled_rows()
        return inner

    def _check_anchors(self) -> None:
        """Raise an error for a hyperparameter in the memory of a parameter, which moves along at every step."""
        for part in self._task.term().parts():
            name = shared_leaf(self._acted_on(), [*part.factors, *part.hyper])
            if name is not None:
                raise ValueError(
                    f"{part.penalty.__name__} got a tensor that shares memory with parameter '{name}', as state_dict() "
                    "and detach() give them: every step of the optimizer would move both. Give a copy, as by "
                    "w.detach().clone() or copy.deepcopy(model.state_dict())."
                )

    def _check_added(self) -> None:
        """The same after the optimizer got other parameters."""
        try:
            self._inner = self._checked()
        except ValueError as error:
            raise ValueError(
                f"{error} The optimizer got other parameters after regularize: with module=, trees of strengths may "
                "name those that come later."
            ) from error

    def _check_groups_are_whole(self) -> None:
        """Raise an error if a mask leaves out a part of a group that spans leaves."""
        lost = split_leaf(self._task.penalty, self._names.chosen, self._names.params())
        if lost is not None:
            raise ValueError(
                f"mask leaves out '{lost}', a part of groups of {self._task.penalty!r}, which span leaves and so "
                "would never be zero as a whole. Drop mask=: the groups say already what is penalized."
            )

    def _check_names_are_held(self) -> None:
        """Raise an error if groups name parameters of the module that the optimizer was not given."""
        params, module = self._names.params(), self._names.module
        if module is None or not self._task.penalty.couples_leaves:
            return
        named = tuple(dict.fromkeys(named_leaves(self._task.penalty, params)))
        lost = [name for name in matched(named, tuple(params)) if name not in params]
        raw = dict(module.named_parameters())
        own = dict(zip(plain_names(tuple(raw)), raw.values(), strict=True))
        found = [name for name in plain_names(tuple(lost)) if name in own]
        if found:
            why = (
                " They are frozen, requires_grad=False." if not any([own[name].requires_grad for name in found]) else ""
            )
            raise ValueError(
                f"groups names {listed(map(repr, found))}, of the module, but not among the "
                f"{len(params)} parameters that the optimizer was given.{why} Leave their layers out of the groups, as "
                "by channel_groups(..., layers=...), or give them to the optimizer."
            )

    def _check_rates(self, optimizer: Optimizer, moving: bool = False) -> None:
        """Raise an error if leaves that share groups, all or those that move, have learning rates of their own."""
        groups, rule = optimizer.param_groups, self._task.rule
        anyhow = projects(self._task.penalty) and rule.source is None and not rule.buffers  # After a step of any size.
        if anyhow or not self._task.penalty.couples_leaves:
            return
        rates = [known_number(group.get("lr", 1.0)) for group in groups]
        if rule.buffers:
            rates = [_buffered_rate(rate, group) for rate, group in zip(rates, groups, strict=True)]
        params = [(w, i) for i, group in enumerate(groups) for w in group["params"]]
        rows = zip(params, gradients_of([w for w, _ in params]), strict=True)
        places = {self._names.names[w]: i for (w, i), g in rows if not moving or g is not None}
        for each in self._linked:
            self._check_one_rate({name: places[name] for name in each if name in places}, rates)

    def _check_groups(self, optimizer: Optimizer, waits: bool) -> None:
        """Raise an error, before a step, for numbers of param groups that no proximal step can follow.

        Args:
            optimizer: The optimizer.
            waits: Whether gradients come from a closure, so that it is not known yet what will move.
        """
        rule, groups = self._task.rule, optimizer.param_groups
        seen = [(known_number(group.get("lr")), group.get("momentum"), group.get("dampening")) for group in groups]
        if rule is OF_ANY_SIZE or seen == self._seen_groups:
            return
        for i, group in enumerate(groups):
            if not any([self._names.names.get(w) in self._names.chosen for w in group["params"]]):
                continue
            rate, momentum = concrete(group.get("lr", 1.0)), group.get("momentum", 0.0)
            if rate is not None and not bool(rate >= 0):
                raise ValueError(
                    f"param group {i} has the learning rate {group['lr']}, with which its step goes uphill; expected a "
                    "number of at least 0"
                )
            if not rule.buffers or (not isinstance(momentum, Tensor) and momentum == 0):
                continue
            if group.get("centered", False) and not projects(self._task.penalty):
                raise ValueError(f"param group {i} has got momentum {written(momentum)}: {RUNS_AWAY}.")
            buffered(group, None)  # For its errors.
        if not waits:
            self._check_rates(optimizer, moving=True)
        self._seen_groups = seen

    def _acted_on(self) -> dict[str, Tensor]:
        """The parameters on which the penalty acts, which may have masks and patterns of its own."""
        return {name: w for name, w in self._names.penalized().items() if name in self._touched}

    def _check_once(self, optimizer: Optimizer) -> None:
        """Raise an error if another penalty is on the same parameters already."""
        mine = self._task.penalty
        for other in vars(optimizer).get(OWN, []):
            theirs, own = other._task.penalty, {id(w) for w in self._acted_on().values()}
            shared = {name: w for name, w in other._acted_on().items() if id(w) in own}
            alike = mine is theirs or written(mine) == written(theirs)
            if shared and (alike or not (projects(mine) or projects(theirs))):
                again = (
                    "remove() it first, on what regularize returned then; where a cell of a notebook is run again, "
                    "let it make the optimizer, too"
                )
                remedy = again if alike else "Regularize with their sum, as in regularize(optimizer, a + b)"
                raise ValueError(
                    f"'{next(iter(shared))}' is regularized already, by {other!r}; one proximal operator after "
                    f"the other is not that of both. {remedy}."
                )
            if shared:
                say_composed(self._task, other._task, shared)

    def _check_one_rate(self, places: dict[str, int], rates: Any) -> None:
        """Raise an error if leaves that share groups, by their param groups, take steps of several lengths."""
        names = sorted(places)
        other = next((name for name in names if rates[places[name]] != rates[places[names[0]]]), None)
        if other is not None:
            raise ValueError(
                f"{self._task.penalty.__name__} couples leaves, which have to take one step; those of '{names[0]}' and "
                f"'{other}', which share groups, differ, {rates[places[names[0]]]} and {rates[places[other]]} (the "
                "learning rate, times 1 / (1 - momentum) for a buffer). Give their param groups one learning rate and "
                "momentum, leave their layers out of the groups, as by channel_groups(..., layers=...), or regularize "
                "leaf by leaf, with group_lasso."
            )

    def _with_compiled_rows(self) -> Task | None:
        """The task with compiled kernels of rows in it, if its penalty has many families of groups."""
        if len(self._linked) <= _FEW:
            return None
        through = landed_by(self._task.penalty, CompiledRows)
        return None if through is self._task.penalty else self._task._replace(penalty=through)


def _buffered_rate(rate: Any, group: Entries) -> Any:
    """The rate of a group whose buffer has been filled; a pair of numbers where one of them is a tensor's identity."""
    momentum = group["momentum"]
    if isinstance(momentum, Tensor) or isinstance(group["lr"], Tensor):
        return rate, known_number(momentum)
    return rate * gain(group, buffered(group, None)) if momentum else rate
