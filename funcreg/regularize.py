"""Penalties on any torch optimizer: a hook after its step applies their proximal operator, with that step's size.

An optimizer goes down once, and a hook follows: it reads the step and the metric from the optimizer's state
(`denominators`), makes trees of the parameters that moved, and lands them with the mathematics of `proximal`, leaf by
leaf or through `fuse`.
"""

from __future__ import annotations

import functools
import operator
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from funcreg._typing import Hyper, Mask, Params, Scalar, Schedule
from funcreg.checks import shared_leaf
from funcreg.construction import Call, written
from funcreg.coupled import is_coupled, landed_by, linked, named_leaves, split_leaf
from funcreg.denominators import (
    NOTE_COPY,
    OF_ANY_SIZE,
    RUNS_AWAY,
    Entries,
    Rule,
    buffered,
    gain,
    inner_optimizers,
    known_number,
    rule_of,
    steps_as_torch,
    unwrapped,
)
from funcreg.descent import check_inner_steps
from funcreg.frozen import gradients_of
from funcreg.landing import (
    CompiledLanding,
    CompiledRows,
    EndToEnd,
    Sets,
    Task,
    acts_on_entries,
    laid_out,
    land_in_sets,
)
from funcreg.leafwise import global_norm, widen
from funcreg.masks import listed
from funcreg.notices import warn_user
from funcreg.parameter_names import Moved, ParameterNames
from funcreg.penalty import Penalty
from funcreg.ranges import concrete
from funcreg.regularizing import check_penalty, check_strength, projects
from funcreg.remarks import Remarks, has_numbers, say_composed
from funcreg.rounding import is_narrow
from funcreg.selection import plain_names
from funcreg.transform import (
    Transform,
    check_selection,
    flags,
    is_scheduled,
    positive,
)
from funcreg.tree import ABSENT, tree_leaves
from funcreg.undocumented import copy_all, is_compiling, versions
from funcreg.wrapping import matched

#: Entries from which on a compiled step saves more than its first call costs.
_WORTH_COMPILING = 1 << 20
#: Numbers of steps after which it is seen what is left, and after which again: few, because a GPU is waited for.
_LOOKS, _AGAIN = (1, 10, 30, 100), 1000
#: Steps after which a leaf that never had a gradient is said, where others of its groups have.
_PATIENCE = 100
#: What a metric is made of for a leaf that the optimizer has never moved: so much that the leaf stays where it is.
_IMMOVABLE = 1e8
#: Families of groups up to which one compilation of all that is done to them pays.
_FEW = 8
#: Sets of leaves for which a compiled step is kept.
_LAYOUTS = 4


def regularize(
    optimizer: Optimizer,
    penalty: Penalty,
    *hyper: Hyper | Schedule,
    strength: Hyper | Schedule = 1.0,
    module: nn.Module | None = None,
    mask: Mask | None = None,
    metric: Callable[[Entries, Entries], Any] | None = None,
    inner_steps: int | None = None,
    max_step: Scalar | None = None,
    compile: bool | None = None,
    **options: Any,
) -> Regularization:
    r"""Penalize what a torch optimizer trains, :math:`f + \lambda g`, with exact zeros, as `prox_sgd` and `prox_adam`.

    After each `optimizer.step()` a hook applies the proximal operator of the penalty, with the step that was taken:
    the learning rate that the group has now, whatever its scheduler; 1 / (1 - momentum) for a buffer; the denominators
    of Adam and its kin. Nothing else changes, and the `state_dict` of the optimizer neither. Gradients are those of the
    loss without the penalty, which counts once a step, also where gradients are accumulated.

    It follows SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta and Adafactor, in all their variants,
    and others if `metric` is given. A constraint, as in `regularize(optimizer, max_norm, 3.0)`, follows any optimizer
    but LBFGS: in the metric if there is one, else to the nearest point.

    A parameter without a gradient in a step stays where it is, as the optimizer leaves it; where `coupled` has it in
    groups with others, it counts in their norms, and a warning names it if it had none in a hundred steps. The
    parameters of one family have one learning rate, families may have others. Steps that a `GradScaler` skips are none.
    A frozen parameter (`requires_grad=False`, beside others) is left alone, also where a gradient was left in it, with
    which torch may move it on: a warning names it. An entry whose gradient is always 0 (an unused row of an embedding,
    a dead unit) has the metric :math:`\epsilon` under Adam, Adagrad and RMSprop, and goes to zero at once; leave it out
    with `mask`, raise `eps`, or give `max_step`.

    Like any hook of torch, it is no part of the optimizer's `state_dict`, and copies and pickles of an optimizer are
    without it, as their first step warns: call `regularize` again on these, and after the model was built anew, before
    it is trained on. To pickle the optimizer for a machine without funcreg, `remove()` it first.

    Args:
        optimizer: The optimizer. Groups and parameters may be added to it later.
        penalty: A penalty :math:`g` with a proximal operator, a sum of such, or a constraint.
        hyper: Its hyperparameters: numbers, tensors, schedules or trees.
        strength: :math:`\lambda`: number of at least 0, tensor, which may be changed in place, schedule from the number
            of steps, or a tree of them by the names of parameters, of those that `mask` chooses, and with `module` also
            of those that the optimizer gets later. For a mean loss 1 is very strong, 1e-5 to 1e-2 usual. Where it makes
            zeros of everything, or of all groups of a family of `coupled` that everything goes through, a warning says
            so, unless it is a number above 1.
        module: The module with these parameters, for their names: needed for masks, trees and groups that go by names,
            unless the optimizer was made from `named_parameters()`. Prefixes of wrappers (`module.`, `_orig_mod.`) are
            left out of names.
        mask: Parameters on which the penalty acts, among those of the optimizer; by default all of them.
        metric: For optimizers that are not known: from the state of a parameter, and its param group, to by what the
            step divides `lr` times a mean gradient, a number or a tensor.
        inner_steps: For a penalty without a proximal operator in a metric, as in `proximal_step`.
        max_step: Greatest :math:`\eta / h` of the proximal step, above 0; where that is less than the step of the
            optimizer, the penalty is weaker. None for no bound.
        compile: Whether to compile the step, by default where a million entries or more are penalized (for `coupled`
            with more than eight families: in a metric alone). The first step then takes seconds, for the families of
            channels of a deep network up to half a minute; the next process finds what was compiled on the disk.
        options: Static options of the penalty, such as `dim`.

    Raises:
        ValueError: The optimizer has no step that a penalty can follow, the penalty no proximal operator, the mask
            chooses nothing, the module has not the parameters of the optimizer, or they are regularized already.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([5.0, 0.1]))
        >>> optimizer = torch.optim.Adam([w], lr=0.1)
        >>> handle = regularize(optimizer, l1, strength=0.3)
        >>> for _ in range(400):
        ...     optimizer.zero_grad()
        ...     (0.5 * (w - torch.tensor([1.0, 0.2])).square()).sum().backward()
        ...     optimizer.step()
        >>> w.detach(), handle.penalty_value()
        (tensor([0.7000, 0.0000]), tensor(0.2100))
        >>> handle
        regularize(Adam, l1, strength=0.3) on 1 of 1 parameters
        >>> handle.remove()

    References:
        Yun, Lozano & Yang, *Adaptive proximal gradient methods for structured neural networks*, 2021.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is {_described(optimizer)}; expected one of torch, such as torch.optim.AdamW(...), as in "
            "regularize(optimizer, l1, strength=1e-4, module=model)"
        )
    if module is not None and not isinstance(module, nn.Module):
        raise TypeError(f"module is {_described(module)}; expected the torch.nn.Module that the optimizer trains")
    values, static = check_penalty(penalty, hyper, options)
    check_strength(penalty, strength)
    check_selection(mask)
    check_inner_steps(inner_steps)
    if max_step is not None:
        positive(max_step=max_step)
    if compile is not None:
        flags(compile=compile)
    optimizer = unwrapped(optimizer)
    _check_moves_itself(optimizer, penalty)
    _say_unread(optimizer)
    rule = rule_of(optimizer, metric, projects(penalty))
    task = Task(penalty, values, strength, static, rule, inner_steps, max_step)
    given = {"strength": strength, "mask": mask, "inner_steps": inner_steps, "max_step": max_step}
    if projects(penalty):
        del given["strength"]  # Of which a set knows nothing.
    shown = {k: v for k, v in given.items() if v is not None}
    call = Call(regularize, (type(optimizer), penalty, *hyper), {**shown, **options})
    return Regularization(optimizer, task, ParameterNames(optimizer, module, mask), compile, str(call))


def _check_moves_itself(optimizer: Optimizer, penalty: Penalty) -> None:
    """Raise an error for a wrapper, whose hooks are not called where the optimizer inside it takes a step."""
    inside = inner_optimizers(optimizer)
    if inside:
        calls = listed([f"regularize(optimizer.{name}, {written(penalty)}, ...)" for name in inside])
        raise ValueError(
            f"{type(optimizer).__name__} holds {listed(inside)}, which takes its steps: a hook on the outer one may "
            f"never be called, as in SAM, and does not see the state. Expected the optimizer inside, {calls}."
        )


def _say_unread(optimizer: Optimizer) -> None:
    """Warn of strengths that stand in param groups, as those of `Optimizer` do, and have no effect here."""
    for i, group in enumerate(optimizer.param_groups):
        if "strength" in group and "strength" not in optimizer.defaults:
            warn_user(
                f"param group {i} has strength={written(group['strength'])}, which regularize does not read: it has no "
                "effect. Give strength= a tree of numbers by the names of parameters, or call regularize for each "
                "group, with a mask."
            )


def _described(optimizer: Any) -> str:
    if isinstance(optimizer, LRScheduler):
        return f"the scheduler {type(optimizer).__name__}"
    if isinstance(optimizer, type):
        return f"the class {optimizer.__name__}"
    if isinstance(optimizer, Penalty):
        return f"the {optimizer.kind} {optimizer.__name__}"
    if isinstance(optimizer, (Transform, str)):
        return repr(optimizer)
    library = type(optimizer).__module__.partition(".")[0]
    return f"a {type(optimizer).__name__}" + (f" of {library}" if library not in ("builtins", "torch") else "")


class Regularization:
    """A penalty on an optimizer; see `regularize`.

    Args:
        optimizer: The optimizer.
        task: What is computed.
        names: The names of its parameters.
        compile: Whether to compile the step, or None for where it pays.
        said: The call, as it is written.
    """

    def __init__(
        self, optimizer: Optimizer, task: Task, names: ParameterNames, compile: bool | None, said: str
    ) -> None:
        self._names, self._said, self._compile = names, said, compile
        self._given = task.strength, *task.hyper
        self._task = task
        self._optimizer = weakref.ref(optimizer)
        self.steps = 0
        self._inner = self._checked()
        self._acts_on_entries = self._inner is None and acts_on_entries(self._task)
        self._check_once(optimizer)
        self._check_rates(optimizer)
        self._notes: dict[Tensor, Any] = {}
        self._starts: dict[Tensor, Tensor] = {}
        self._buffers: dict[int, Scalar] = {}  # The sum of the weights of gradients in the buffers of a group.
        self._seen: tuple[list[Any], ...] = ()  # Parameters, their gradients as far as None, groups,
        self._moving: list[Moved] = []  # and what moves of them;
        self._held: set[Moved] = set()  # what stays, and may share groups with what moves;
        self._leaves: list[Moved] = []  # both;
        self._absent: Params = {}  # what stands for the others.
        self._entries = 0  # Of what moves or is held.
        self._ever: set[str] = set()  # What has moved in any of the steps
        self._taken = 0  # that were seen.
        self._counted: list[Any] = []
        self._written_to: list[int] = []  # How often counters were.
        self._classes: list[int] = []
        self._layouts: dict[Any, CompiledLanding | None] = {}
        self._ends: tuple[EndToEnd | None, Any, Any] = None, None, None  # For what moves and its classes, as they were.
        #: Whether the step of the optimizer may set gradients to None, or call that of its base, which has hooks, too.
        self._watches = not steps_as_torch(type(optimizer))
        self._had: set[Tensor] = set()  # What had a gradient before such a step, or in it.
        self._restored = self._is_copy = False
        self._remarks = Remarks(self, names)
        self._values: tuple[Hyper, ...] = ()  # Strength and hyperparameters of the next step,
        self._seen_groups: list[Any] = []  # and what was checked for it.
        self._hooks = [optimizer.register_step_pre_hook(self._before)]
        if task.is_scheduled:
            self._hooks.append(optimizer.register_load_state_dict_post_hook(self._loaded))
        if _OWN not in vars(optimizer):
            vars(optimizer)[_OWN] = _Landings(optimizer)
        vars(optimizer)[_OWN].add(self)
        _see_to_copies(optimizer)
        self._remarks.of_what_cannot_die(optimizer, task.penalty.__name__, self._linked)
        self._remarks.of_decay(optimizer, self._task, self._touched)
        self._remarks.of_evaluation(optimizer)
        if names.module is not None and not projects(task.penalty):
            self._remarks.of_scales(names.module, self._acted_on())

    @property
    def strength(self) -> Any:
        """What `regularize` was given. It cannot be set: a tensor is changed in place."""
        return self._task.strength

    @strength.setter
    def strength(self, value: Any) -> None:
        raise AttributeError(
            f"the strength of {self!r} is not set from outside. Give regularize a tensor, strength=torch.tensor(...), "
            "which is read at every step, and change it in place, or a schedule."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what is private, and refuse what would have no effect, such as `handle.mask = ...`."""
        if not name.startswith("_") and name not in ("steps", "strength"):
            raise AttributeError(
                f"{name} of {self!r} cannot be set: nothing would read it. remove() this, and call regularize again."
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """What a handle does not have; where it is taken for its optimizer, the error says so."""
        hint = ""
        if hasattr(Optimizer, name) or name in ("param_groups", "state", "defaults"):
            hint = (
                f". It is what regularize returns, not the optimizer, which stays what it was: optimizer.{name}, after "
                "regularize(optimizer, ...) on a line of its own"
            )
        raise AttributeError(f"'{type(self).__name__}' object has no attribute {name!r}{hint}", name=name, obj=self)

    def __repr__(self) -> str:
        on = f"{self._said} on {len(self._touched)} of {self._names.count} parameters"
        return f"{on} (a copy, which no optimizer follows)" if self._is_copy else on

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has: the penalty and its parameters, without the optimizer, on which it has no hook.

        Modules that hold a handle are copied and saved with it.
        """
        kept: dict[str, Any] = {
            "_task": self._task._replace(rule=_NO_RULE),
            "_optimizer": _no_optimizer,
            "_remarks": None,
            "_compiled_rows": None,
            "_ends": (None, None, None),
        }
        empty = {name: type(vars(self)[name])() for name in _OF_STEPS}
        return {**vars(self), **kept, **empty, "_is_copy": True}

    def remove(self) -> None:
        """Take the penalty off: steps from now on are those of the optimizer alone."""
        for hook in self._hooks:
            hook.remove()
        self._notes, self._starts, self._layouts, self._ends = {}, {}, {}, (None, None, None)
        optimizer = self._optimizer()
        if optimizer is not None and self in vars(optimizer).get(_OWN, []):
            vars(optimizer)[_OWN].drop(self, optimizer)
            _see_to_copies(optimizer)

    def penalty_value(self) -> Tensor:
        r"""The value :math:`\lambda g(w)` of the parameters as they are now, a 0-dim tensor: for logs."""
        with torch.no_grad():
            leaves = {name: w.detach() for name, w in self._names.penalized().items()}
            return self._task.value(self._names.tree(leaves), self.steps)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, from which schedules go on, and the sums of weights in momentum buffers."""
        return {"steps": self.steps, "buffers": dict(self._buffers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, or from a number of steps that a trainer knows, `{"steps": 20}`.

        To be called after `load_state_dict` of the optimizer.
        """
        known = isinstance(state, dict) and isinstance(state.get("buffers", {}), dict)
        if not known or type(state.get("steps")) is not int or state["steps"] < 0:
            raise ValueError(f"state is {state!r}; expected what state_dict() of such a handle returns")
        if self._is_copy:
            warn_user(f"{self!r} has no effect: call regularize on the optimizer of these parameters, and load that.")
        self.steps, self._buffers, self._restored = state["steps"], dict(state.get("buffers", {})), False

    # Checks

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
        for other in vars(optimizer).get(_OWN, []):
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

    # The step

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Note what has to be known from before a step, and raise the errors of what follows it, as far as known."""
        self._read_added(optimizer)
        self._values, note = self._task.at(self.steps), self._task.rule.note
        self._check_groups(optimizer, waits=any(map(callable, [*args[1:], *kwargs.values()])))
        if self.steps == 0:
            self._remarks.of_uninitialized(optimizer)
            if self._task.rule.source is not None:
                self._remarks.note_begun(self._acted_on())
        if note is not None or self._inner is not None:
            with torch.no_grad():
                for w in self._names.penalized().values():
                    if note is not None:
                        self._notes[w] = note(w, optimizer.state.get(w, {}))
                    if self._inner is not None:
                        self._starts[w] = w.detach().clone()
        if not self._watches:
            return None
        if not _is_in_a_step(optimizer):
            self._had = set()
        self._note_gradients(optimizer)
        seeing = lambda x: self._seeing(optimizer, x) if callable(x) else x
        return (args[0], *map(seeing, args[1:])), {name: seeing(x) for name, x in kwargs.items()}

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

    def after(self, optimizer: Optimizer) -> None:
        """Land where a step has led."""
        skipped = getattr(optimizer, "found_inf", None)  # Of a GradScaler, whose optimizer skips inside its kernel.
        if isinstance(skipped, Tensor) and skipped.device.type == "cpu":
            if skipped.item():
                return
            skipped = None
        if _is_empty(optimizer):
            return
        if self._restored:
            self._restored = False
            warn_user(
                f"the optimizer was restored, but {self!r} follows a schedule from step {self.steps}. Save "
                "handle.state_dict() beside the optimizer's, and load it after that.",
            )
        moved = self._moved(optimizer)
        if not moved:
            self._remarks.of_standing_still(self.steps, all(self._seen[1]))
            return
        self._remarks.of_moving()
        values, self.steps = self._values, self.steps + 1
        differentiable = any([group.get("differentiable", False) for group in optimizer.param_groups])
        due = self.steps in _LOOKS or self.steps % _AGAIN == 0
        if due:  # Those that were replaced keep their last gradients.
            self._remarks.of_replaced()
        # Some layers begin with zeros, which a step of 0 leaves.
        looks = due and (self._remarks.waits or has_numbers(self._penalized(moved)))
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            self._land(optimizer, moved, values, skipped, looks)
        if self.steps == 1:
            self._remarks.of_lost(self._acted_on(), type(optimizer).__name__)
        if looks:
            self._remarks.of_zeros(self._penalized(self._leaves), self._task, optimizer.param_groups, self.steps)
            self._remarks.of_dead(self._leaves, self._task, self.steps, self._call(optimizer))
        self._taken += 1
        if self._taken == _PATIENCE:
            never = set[str]().union(*self._linked) - self._ever
            self._remarks.of_never_moved(never, self._taken, self._call(optimizer))

    def _call(self, optimizer: Optimizer) -> str:
        return f"regularize({type(optimizer).__name__}, {self._task.penalty.__name__}, ...)"

    def _penalized(self, leaves: list[Moved]) -> list[Moved]:
        """Those on which the penalty acts."""
        return [m for m in leaves if m.name in self._touched]

    def _read_added(self, optimizer: Optimizer) -> None:
        """Read the names of parameters that the optimizer got since the last step."""
        if sum([len(group["params"]) for group in optimizer.param_groups]) != self._names.count:
            self._names.read(optimizer)
            self._check_added()
            self._layouts = {}  # Of trees of strengths that may have gained leaves.

    def _moved(self, optimizer: Optimizer) -> list[Moved]:
        groups = [group["params"] for group in optimizer.param_groups]
        params = [w for group in groups for w in group]
        self._read_added(optimizer)
        still = [g is None and w not in self._had for w, g in zip(params, gradients_of(params), strict=True)]
        seen = [*map(id, params)], still, [*map(len, groups)]
        if seen == self._seen:
            return self._moving
        if any([w not in self._names.names for w, stays in zip(params, still, strict=True) if not stays]):
            self._names.read(optimizer)
        names, chosen = self._names.names, self._names.chosen
        places = [i for i, group in enumerate(groups) for _ in group]
        rows = zip(params, places, still, strict=True)
        moved = [Moved(names[w], w, i) for w, i, stays in rows if not stays]
        self._seen, self._moving, self._counted = seen, [m for m in moved if m.name in chosen], []
        self._ever.update([m.name for m in self._moving])
        stays = {*names.values()}.difference([m.name for m in self._moving])
        held = stays.intersection(set().union(*self._linked))
        rows = zip(params, places, strict=True)
        self._leaves = [Moved(names[w], w, i) for w, i in rows if names[w] in held or names[w] not in stays]
        self._held = {m for m in self._leaves if m.name in held}
        self._entries = sum([m.w.numel() for m in self._leaves])
        self._absent = {name: ABSENT for name in names.values() if name in stays - held}
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
            self._counted = counted
            stay = [rule.counts and m in self._held for m in leaves]
            keys = list(zip([m.group for m in leaves], _numbers(counted), stay, strict=True))
            numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
            self._classes = [numbers[key] for key in keys]
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

    def _land(
        self, optimizer: Optimizer, moved: list[Moved], values: Any, skipped: Tensor | None, looks: bool = False
    ) -> None:
        task, groups = self._task, optimizer.param_groups
        tree, leaves = lambda leaves: {**leaves, **self._absent}, self._leaves
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
            sources = tree({m.name: self._source(m, each, groups[m.group]) for m, each in rows})
        narrow = looks and "rounding" not in self._remarks.said and any([is_narrow(m.w.dtype) for m in moved])
        if narrow and self._remarks.keeps_pace(groups, values):
            wide = tree({m.name: widen(m.w.detach()) for m in leaves})
            starts = wide if self._inner is None else tree({m.name: widen(self._starts[m.w]) for m in leaves})
            self._remarks.of_rounding(moved, wide, self._landed(starts, wide, sources, columns, classes, values, sets))
        written = self._written(moved)
        may_compile = not keeps and self._may_compile()
        if may_compile and skipped is None and self._compiled_rows is None:
            # Gradients are not read where there is no metric, but stand for what is like the parameters.
            read_from = sources
            if read_from is None:
                read_from = tree({m.name: torch.zeros_like(m.w) if m.w.grad is None else m.w.grad for m in leaves})
            params = tree({m.name: m.w for m in leaves})
            compiled = self._layout(params, read_from, classes, columns, values, sets)
            if compiled is not None:
                before = [(m.w, m.w.detach().clone()) for m in leaves if m not in written] if self._held else []
                compiled(params, read_from, columns, values)
                for w, x in before:
                    w.copy_(x)
                return
        if self._acts_on_entries and not keeps:
            reached = {m.name: m.w.detach() for m in leaves}
            ends, moving, numbers = self._ends
            if ends is None or moving is not self._moving or numbers is not self._classes:
                ends = EndToEnd(reached, sources, classes)
                self._ends = ends, self._moving, self._classes
            landed = ends.land(task, reached, sources, columns, values)
        else:
            reached = tree({m.name: m.w.clone() if keeps else m.w.detach() for m in leaves})
            starts = reached if self._inner is None else tree({m.name: self._starts[m.w] for m in leaves})
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

    def _with_compiled_rows(self) -> Task | None:
        """The task with compiled kernels of rows in it, if its penalty has many families of groups."""
        if len(self._linked) <= _FEW:
            return None
        through = landed_by(self._task.penalty, CompiledRows)
        return None if through is self._task.penalty else self._task._replace(penalty=through)

    def _may_compile(self) -> bool:
        if self._inner is not None or self._compile is False or is_compiling():
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

    def _loaded(self, optimizer: Optimizer) -> None:
        # Accelerate loads a state without entries, to move a new optimizer to its device.
        self._restored = self._task.is_scheduled and len(optimizer.state) > 0


class _Landings(list[Regularization]):
    """The penalties on an optimizer, in the order in which they land: constraints last, or they would not hold.

    One hook for all stands where the first of them came, among other hooks of the optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__()
        self._watches = not steps_as_torch(type(optimizer))
        self._hook = optimizer.register_step_post_hook(self._after)

    def add(self, each: Regularization) -> None:
        self.append(each)
        self.sort(key=lambda each: projects(each._task.penalty))

    def drop(self, each: Regularization, optimizer: Optimizer) -> None:
        self.remove(each)
        if not self:
            self._hook.remove()
            del vars(optimizer)[_OWN]

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._watches and _is_in_a_step(optimizer):
            return
        for each in [*self]:
            each.after(optimizer)


class _Lost:
    """Warns at the first step of an optimizer that was copied or read from a file, and so lost its penalties."""

    def __init__(self, said: list[str]) -> None:
        self._said = said

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._said and not vars(optimizer).get(_OWN):
            warn_user(
                f"this {type(optimizer).__name__} is a copy, and is without {listed(self._said)}: torch does not copy "
                "hooks. Call regularize on it as well; where that is not wanted, remove() the penalty before the copy."
            )
        self._said = []


def _see_to_copies(optimizer: Optimizer) -> None:
    """Let copies of an optimizer notice that its penalties are missing; those of one without any are made as ever."""
    said = [repr(each) for each in vars(optimizer).get(_OWN, [])]
    if said:
        vars(optimizer)["__reduce_ex__"] = functools.partial(_reduced, weakref.ref(optimizer))
        vars(optimizer)[NOTE_COPY] = functools.partial(_note_copy, said)
    else:
        vars(optimizer).pop("__reduce_ex__", None)
        vars(optimizer).pop(NOTE_COPY, None)


def _reduced(ref: weakref.ref[Optimizer], protocol: Any) -> Any:
    """How an optimizer is copied and pickled: as ever, and a hook of the copy notices that penalties are missing."""
    optimizer = ref()
    assert optimizer is not None  # It is being copied.
    function, args, state = type(optimizer).__reduce_ex__(optimizer, protocol)[:3]
    return _copied, (function, args, state, vars(optimizer)[NOTE_COPY])


def _copied(function: Callable[..., Any], args: tuple[Any, ...], state: Any, note: Any) -> Optimizer:
    made = function(*args)
    made.__setstate__(state)
    note(made)
    return made


def _note_copy(said: list[str], made: Optimizer) -> None:
    made.register_step_post_hook(_Lost(said))


def _no_optimizer() -> None:
    """What the optimizer of a copy is."""


def _no_step(*_: Any) -> Any:
    raise RuntimeError("a copy of a regularization takes no steps")


#: What a copy has for the step and the metric of an optimizer, and what it does not have of steps.
_NO_RULE = Rule(_no_step, metric=_no_step)
_OF_STEPS = (
    *("_hooks", "_notes", "_starts", "_layouts", "_seen", "_moving", "_held", "_leaves", "_absent", "_ever"),
    *("_had", "_counted", "_written_to", "_classes", "_values", "_seen_groups"),
)
#: Where an optimizer keeps the penalties on it.
_OWN = "_funcreg_regularizations"
_PLAIN = (Tensor, nn.Parameter)


def _are_plain(*trees: Params) -> bool:
    """Whether a compiled step takes the leaves of some trees."""
    return all([type(x) in _PLAIN and x.layout == torch.strided for x in tree_leaves(trees)])


def _buffered_rate(rate: Any, group: Entries) -> Any:
    """The rate of a group whose buffer has been filled; a pair of numbers where one of them is a tensor's identity."""
    momentum = group["momentum"]
    if isinstance(momentum, Tensor) or isinstance(group["lr"], Tensor):
        return rate, known_number(momentum)
    return rate * gain(group, buffered(group, None)) if momentum else rate


def _is_in_a_step(optimizer: Optimizer) -> bool:
    """Whether hooks are called in a step that another step of the same optimizer calls, as `super().step()`.

    Torch calls them in both, or in the outer one alone, as classes happen to have been used before.
    """
    calls = sys._getframe(2)  # What calls the hooks.
    frame = calls.f_back
    while frame is not None:
        if frame.f_code is calls.f_code and any([x is optimizer for x in frame.f_locals.values()]):
            return True
        frame = frame.f_back
    return False


def _is_empty(optimizer: Optimizer) -> bool:
    """Whether a step has neither length nor gradient, such as torch makes to see the entries of a state."""
    groups = optimizer.param_groups
    if is_compiling() or any([known_number(group.get("lr", 1.0)) != 0 for group in groups]):
        return False
    grads = [w.grad for group in groups for w in group["params"] if w.grad is not None]
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return bool(grads) and not capturing and not any([g.is_sparse for g in grads]) and global_norm(grads).item() == 0


def _numbers(counted: list[Any]) -> list[Any]:
    """Counters as numbers, read from each device at once."""
    tensors = [x for x in counted if isinstance(x, Tensor)]
    if len(tensors) < len(counted):
        return [float(x) for x in counted]
    if len({x.device for x in tensors}) > 1 or any([type(x) is not Tensor for x in tensors]):
        return [x.item() for x in tensors]
    return torch.stack(tensors).tolist()
