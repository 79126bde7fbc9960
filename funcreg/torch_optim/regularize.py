"""Penalties on any torch optimizer: a hook after its step applies their proximal operator, with that step's size.

An optimizer goes down once, and a hook follows: it reads the step and the metric from the optimizer's state
(`denominators`), makes trees of the parameters that moved, and lands them with the mathematics of `proximal`, leaf by
leaf or through `fuse`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from funcreg.core._typing import Hyper, Mask, Scalar, Schedule
from funcreg.core.construction import Call, written
from funcreg.core.masks import listed
from funcreg.core.notices import warn_user
from funcreg.core.ranges import flags
from funcreg.core.wording import type_of
from funcreg.regularizers.descent import check_inner_steps
from funcreg.regularizers.penalty import Penalty
from funcreg.torch_optim.denominators import (
    Entries,
    Rule,
    held_optimizers,
    inner_optimizers,
    rule_of,
    steps_as_torch,
    unwrapped,
)
from funcreg.torch_optim.followed_steps import FollowedSteps
from funcreg.torch_optim.landing import Task
from funcreg.torch_optim.optimizer_hooks import OWN, Landings, is_empty, is_in_a_step, see_to_copies
from funcreg.torch_optim.parameter_names import ParameterNames
from funcreg.torch_optim.remarks import has_numbers
from funcreg.transforms.factory_checks import check_selection, positive
from funcreg.transforms.regularizing import check_penalty, check_strength, projects
from funcreg.transforms.transform import Transform

#: Numbers of steps after which it is seen what is left, and after which again: few, because a GPU is waited for.
_LOOKS, _AGAIN = (1, 10, 30, 100), 1000
#: Steps after which a leaf that never had a gradient is said, where others of its groups have.
_PATIENCE = 100


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
    of Adam and its variants. Nothing else changes, nor does the `state_dict` of the optimizer. Gradients are those of
    the loss without the penalty, which counts once a step, also where gradients are accumulated.

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
        held = [] if isinstance(optimizer, type) else [name for name, _ in held_optimizers(optimizer)]
        such = "such as torch.optim.AdamW(...), as in regularize(optimizer, l1, strength=1e-4, module=model)"
        if held:
            such = f"the one that it holds, as in {_calls(held, penalty)}"
        raise TypeError(f"optimizer is {_described(optimizer)}; expected one of torch, {such}")
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
        raise ValueError(
            f"{type(optimizer).__name__} holds {listed(inside)}, which takes its steps: a hook on the outer one may "
            "never be called, as in SAM, and does not see the state. Expected the optimizer inside, "
            f"{_calls(inside, penalty)}."
        )


def _calls(inside: list[str], penalty: Penalty) -> str:
    return listed([f"regularize(optimizer.{name}, {written(penalty)}, ...)" for name in inside])


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
    return type_of(optimizer) + (f" of {library}" if library not in ("builtins", "torch") else "")


class Regularization(FollowedSteps):
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
        self._said = said
        super().__init__(optimizer, task, names, compile)
        self._optimizer = weakref.ref(optimizer)
        self.steps = 0
        self._taken = 0  # Steps that were seen.
        #: Whether the step of the optimizer may set gradients to None, or call that of its base, which has hooks, too.
        self._watches = not steps_as_torch(type(optimizer))
        self._restored = self._is_copy = False
        self._values: tuple[Hyper, ...] = ()  # Strength and hyperparameters of the next step.
        self._hooks = [optimizer.register_step_pre_hook(self._before)]
        if task.is_scheduled:
            self._hooks.append(optimizer.register_load_state_dict_post_hook(self._loaded))
        if OWN not in vars(optimizer):
            vars(optimizer)[OWN] = Landings(optimizer, _is_constraint)
        vars(optimizer)[OWN].add(self)
        see_to_copies(optimizer)
        self._remarks.of_what_cannot_die(optimizer, task.penalty.__name__, self._linked)
        self._remarks.of_counts(self._task, self._acted_on())
        self._remarks.of_decay(optimizer, self._task, self._touched)
        self._remarks.of_evaluation(optimizer)
        self._remarks.of_unread(optimizer)
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
        if self._is_copy:
            return f"{on} (a copy, which no optimizer follows)"
        optimizer = self._followed()
        held = [] if optimizer is None else [w for group in optimizer.param_groups for w in group["params"]]
        if optimizer is None or self._names.are_of(held):
            return on
        return f"{on} (the optimizer got others since: it holds {len(held)}, which its next step reads)"

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

    def _followed(self) -> Optimizer | None:
        """The optimizer, until this is removed."""
        optimizer = self._optimizer()
        return optimizer if optimizer is not None and self in vars(optimizer).get(OWN, []) else None

    def remove(self) -> None:
        """Take the penalty off: steps from now on are those of the optimizer alone."""
        for hook in self._hooks:
            hook.remove()
        self._notes, self._starts, self._layouts, self._ends = {}, {}, {}, (None, None, None)
        optimizer = self._optimizer()
        if optimizer is not None and self in vars(optimizer).get(OWN, []):
            vars(optimizer)[OWN].drop(self, optimizer)
            see_to_copies(optimizer)

    def penalty_value(self) -> Tensor:
        r"""The value :math:`\lambda g(w)` of the parameters as they are now, a 0-dim tensor: for logs.

        Of those on which it acts: a frozen parameter, beside others that are not, counts in groups that span leaves
        alone.
        """
        if (optimizer := self._followed()) is not None:
            self._read_added(optimizer)
        frozen = self._names.frozen().difference(*self._linked)
        with torch.no_grad():
            leaves = {name: w.detach() for name, w in self._names.penalized().items() if name not in frozen}
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

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Note what has to be known from before a step, and raise the errors of what follows it, as far as known."""
        self._read_added(optimizer)
        self._remarks.of_unread(optimizer)
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
        if not is_in_a_step(optimizer):
            self._had = set()
        self._note_gradients(optimizer)
        seeing = lambda x: self._seeing(optimizer, x) if callable(x) else x
        return (args[0], *map(seeing, args[1:])), {name: seeing(x) for name, x in kwargs.items()}

    def after(self, optimizer: Optimizer) -> None:
        """Land where a step has led."""
        skipped = getattr(optimizer, "found_inf", None)  # Of a GradScaler, whose optimizer skips inside its kernel.
        if isinstance(skipped, Tensor) and skipped.device.type == "cpu":
            if skipped.item():
                return
            skipped = None
        if is_empty(optimizer):
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

    def _loaded(self, optimizer: Optimizer) -> None:
        # Accelerate loads a state without entries, to move a new optimizer to its device.
        self._restored = self._task.is_scheduled and len(optimizer.state) > 0


def _is_constraint(on: Regularization) -> bool:
    return projects(on._task.penalty)


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
