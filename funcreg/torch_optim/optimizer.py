"""Any chain as a `torch.optim.Optimizer`, for loops, schedulers and trainers that expect one.

Hyperparameters stand in the param groups, where schedulers and people change them. A step reads them into tensors
that the chains hold, so that no new value compiles anything. State stands in `optimizer.state`, by parameter, where
torch saves, loads, moves and shards it; at each step it is put together to the trees that a chain knows.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from funcreg.core._typing import Params, State, Updates
from funcreg.core.construction import written
from funcreg.core.frozen import frozen_beside_others
from funcreg.core.masks import listed
from funcreg.core.notices import warn_user
from funcreg.core.tree import restored, tree_leaves, tree_map
from funcreg.core.wording import type_of
from funcreg.fused.shards import is_spread
from funcreg.fused.step import FusedStep
from funcreg.torch_optim.denominators import NOTE_COPY
from funcreg.torch_optim.factories import check_complete, default_of, hyperparameters, is_number
from funcreg.torch_optim.group_values import GroupValues
from funcreg.torch_optim.optimizer_state import Part, Parts, by_name, hidden_from_torch, show_to_torch
from funcreg.torch_optim.optimizer_steps import PLAIN, Eager, beside, objective, searches
from funcreg.transforms.mistakes import uphill
from funcreg.transforms.transform import FOR_ANY, Transform

#: Entries of a param group that torch and trainers keep there for themselves.
_OTHERS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "lr_scale")
#: So many steps in a row without a gradient are no loop that skips a batch.
_STILL = 3


class Optimizer(torch.optim.Optimizer):
    r"""Any chain as a real `torch.optim.Optimizer`.

    The factory makes the chain of each param group from the group's values, which torch's schedulers, or you, may
    change between steps: nothing is compiled anew for another number. `step` computes what `update` and
    `apply_updates` of the chain do, compiled for all groups at once, and writes into the parameters where they are.

    A chain acts on the parameters of its group as on one tree, so a global norm is that of a group. A parameter
    without a gradient counts as a gradient of zero there, and neither it nor its state moves; it has no state before
    its first gradient. Counters are those of the tree, also while a parameter has no gradient: after some first steps
    without one it has the bias correction of the others in Adam, where torch counts the steps of each. Nor does one
    move that is frozen, `requires_grad=False`, beside others, also where a gradient was left in it, by which torch
    would move it on. Parameters that get theirs at a later step than others of the group start counters of their own
    and are a tree of their own, as if they were added by `add_param_group` then.

    Args:
        params: Parameters, `model.named_parameters()` or a dict of them, or a list of dicts: groups with values of
            their own. With names, masks such as `select("*.weight")` know them; without, parameters are called "0",
            "1" ... in their group.
        factory: Function of the hyperparameters of a group to a transform, such as
            `lambda lr, strength: prox_adam(lr, l1, strength=strength)`, or `adamw` itself, whose `learning_rate` is
            the group's `lr`. Masks, penalties and options belong in it. Floats reach it as 0-dim tensors, and what it
            computes from them (`0.1 * lr`) follows their values; ints, bools and strings come as they are. It is called
            at construction, and anew where one of the latter changes, or a float that it made a number of, by `float`
            or a branch: then nothing is compiled any more, and a warning says so. To pickle the optimizer, define it
            with `def` in a module.
        compile: Whether the step is compiled by `fuse`; or the backend of `torch.compile` to do it with. The first step
            then takes seconds; with `coupled` over all families of a deep network, in the metric of Adam, it takes
            minutes, for which `regularize` has a shorter way.
        hyper: Hyperparameters of the factory for groups that do not name their own: numbers, 0-dim tensors, or dicts
            and tuples of them.

    Raises:
        TypeError: The factory lacks a hyperparameter, does not take one, or returns no transform.
        ValueError: A hyperparameter is out of its range, also at a later step.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = Optimizer(
        ...     model.named_parameters(),
        ...     lambda lr, strength: prox_sgd(lr, l1, strength=strength, mask=matrices),
        ...     lr=0.1, strength=50.0, compile=False,
        ... )
        >>> model(torch.ones(1, 2)).square().sum().backward()
        >>> optimizer.step()
        >>> model.weight
        Parameter containing:
        tensor([[0., 0.]], requires_grad=True)
    """

    def __init__(
        self,
        params: Any,
        factory: Callable[..., Transform],
        *,
        compile: bool | str | Callable[..., Any] = True,
        **hyper: Any,
    ) -> None:
        if isinstance(params, torch.nn.Module):
            raise TypeError(f"params is the module {type(params).__name__}; expected its named_parameters()")
        if isinstance(params, torch.optim.Optimizer):
            raise TypeError(
                f"params is the optimizer {type(params).__name__}; expected parameters, model.named_parameters(). A "
                "penalty on an optimizer of torch is regularize(optimizer, l1)."
            )
        if not (isinstance(compile, (bool, str)) or callable(compile)):
            raise TypeError(f"compile is {compile!r}; expected True, False or a backend of torch.compile")
        self._factory, self._compile = factory, compile
        self._names = hyperparameters(factory, hyper)
        if "lr" not in hyper and isinstance(default := default_of(factory, self._names.get("lr")), float):
            hyper["lr"] = default  # Where schedulers look for it.
        self._forget()
        super().__init__(params.items() if isinstance(params, Mapping) else params, hyper)

    def _forget(self) -> None:
        """Begin with no chain made and nothing compiled."""
        self._values: list[GroupValues] = []
        self._chains: list[Transform] = []
        self._parts = Parts()
        self._steps: dict[Any, FusedStep | Eager] = {}  # By the parts that have gradients.
        self._wanted: dict[str, bool] = {}  # Which extra arguments a chain takes.
        self._plain = False  # Whether nothing is compiled any more.
        self._said_climbs = False  # Whether it was said that a step goes uphill.
        self._said_unread = False  # Whether it was said that a chain has nothing of a value.
        self._said_untaken = set[tuple[int, str]]()  # Of which numbers in groups it was said that they reach no chain.
        self._said_nothing = False  # Whether it was said that a step has no effect.
        self._still = 0  # Number of the last steps that had none.
        # What compiles a training loop leaves the step out, which compiles its own. The function, not its method, which
        # would hold this optimizer, and so its parameters, until the garbage collector runs.
        self._advance: Any = torch.compiler.disable(type(self)._attempt)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, and refuse what stands in param groups, as `optimizer.strength = ...` has no effect."""
        if name in vars(self).get("_names", ()):
            raise AttributeError(
                f"{name} cannot be set as an attribute, which nothing reads: it stands in each param group, as in "
                f"optimizer.param_groups[0][{name!r}] = {value!r}"
            )
        super().__setattr__(name, value)

    # Groups

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with values of its own or those of the constructor.

        Raises:
            TypeError: A hyperparameter of the factory has no value.
            ValueError: A hyperparameter is out of its range, or parameters have no names where others have them.
        """
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        try:
            names = group.get("param_names", [])
            if len({*names}) < len(names):
                twice = {name for name in names if names.count(name) > 1}
                raise ValueError(f"param group {index} has several parameters called {listed(sorted(twice))}")
            last = {w: i for i, w in enumerate(group["params"])}
            again = next((i for i, w in enumerate(group["params"]) if last[w] != i), None)
            if again is not None:
                which, there = f"'{names[again]}'" if names else f"{again}", last[group["params"][again]]
                raise ValueError(
                    f"parameter {which} of param group {index} is there again, at place {there}; expected each once, "
                    "as model.parameters() has tied weights"
                )
            lazy = next((i for i, w in enumerate(group["params"]) if is_lazy(w)), None)
            if lazy is not None:
                which = f"'{names[lazy]}'" if names else f"{lazy} of param group {index}"
                raise ValueError(
                    f"parameter {which} is not initialized; run the module once, so that it gets its shape"
                )
            self._make_chain(index)
        except BaseException:
            del self.param_groups[-1]  # So that a failed call changes nothing, nor one that is interrupted.
            raise
        self._say_untaken(index)

    def _say_untaken(self, index: int) -> None:
        """Warn, once for each, of numbers that stand in a group, or were set there since, and reach no chain."""
        for name, value in self.param_groups[index].items():
            known = name in self._names or name in _OTHERS or (index, name) in self._said_untaken
            if not known and is_number(name, value):
                self._said_untaken.add((index, name))
                warn_user(
                    f"param group {index} has {name}={written(value)}, which the factory does not take: it has no "
                    f"effect. The factory takes {listed(self._names)}.",
                )

    def _given(self, index: int) -> dict[str, Any]:
        """The hyperparameters of a group by the factory's names."""
        group = self.param_groups[index]
        given = {name: group[key] for key, name in self._names.items() if key in group}
        rate = given.get(self._names.get("lr", ""))
        if isinstance(rate, int):
            given[self._names["lr"]] = float(rate)  # It will not stay a whole number.
        elif isinstance(rate, Tensor) and rate.ndim and rate.numel() == 1:
            given[self._names["lr"]] = rate.reshape(())  # Torch takes any shape, also beside a leaf without dimensions.
        return given

    def _make_chain(self, index: int) -> None:
        """Make the chain of a group: once on the CPU, where numbers are checked, and once for steps."""
        given = self._given(index)
        check_complete(self._factory, self._names, given, index)
        rate = self.param_groups[index].get("lr")
        if isinstance(rate, Tensor) and rate.numel() != 1:
            raise ValueError(
                f"param group {index}: lr is a tensor of shape {tuple(rate.shape)}; expected one number. Parameters "
                "with learning rates of their own go in groups of their own."
            )
        values = GroupValues(given, self._names.get("lr"), self.param_groups[index]["params"])
        readable = self._called(index, values.readable())
        made = values.made(lambda tree: self._called(index, tree))
        if climbs := uphill(readable, f"param group {index}: the factory makes"):
            self._say_climbs(climbs)
        elif unread := values.unread(made):
            self._say_unread(index, readable, unread)
        self._values[index:] = [values, *self._values[index + 1 :]]
        self._chains[index:] = [made, *self._chains[index + 1 :]]
        self._parts.forget()  # The states may not be those of the new chain.
        self._steps.clear()
        self._wanted.clear()

    def _say_climbs(self, message: str) -> None:
        """Warn, once, that steps go uphill."""
        if not self._said_climbs:
            self._said_climbs = True
            warn_user(message)

    def _say_unread(self, index: int, made: Transform, names: list[str]) -> None:
        """Warn, once, of values that do not reach the chain."""
        if not self._said_unread:
            self._said_unread = True
            warn_user(
                f"param group {index}: the factory makes {made!r}, in which there is nothing of {listed(names)}, so "
                "that neither its value nor a scheduler that changes it has an effect. Hand it on, as in lambda lr: "
                "fr.adamw(lr), or leave it out."
            )

    def _called(self, index: int, given: dict[str, Any]) -> Transform:
        """What the factory makes, or an error that names the group."""
        try:
            made = self._factory(**given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"param group {index}: {error}") from error
        if not isinstance(made, Transform):
            came = "None; lacks it a return?" if made is None else f"{type_of(made)}."
            raise TypeError(f"the factory returned {came} Expected a Transform, as in lambda lr: fr.adamw(lr)")
        if made.examples:
            raise TypeError(
                f"the factory made {made!r}, which takes gradients of single examples; a parameter has that of their "
                "mean. Take vmap(grad(loss)), and update and apply_updates of the chain."
            )
        return made

    def _read_groups(self) -> None:
        """Let the chains see the values that stand in the groups."""
        for index, group in enumerate(self.param_groups):
            given = self._given(index)
            if index >= len(self._values) or not self._values[index].fits(given, group["params"]):
                self._make_chain(index)
            elif lost := self._values[index].lost():
                self._make_chain(index)
                self._say_made_anew(index, lost)
            elif self._values[index].unchecked():
                self._called(index, self._values[index].readable())  # For its checks of ranges.
                self._values[index].check()
            self._values[index].write()

    def _say_made_anew(self, index: int, names: list[str]) -> None:
        """Warn, once, that a factory makes numbers of its arguments, and compile no more."""
        if self._plain:
            return
        self._plain = True
        warn_user(
            f"param group {index}: the factory makes a number of {listed(names)}, by float(), item() or a comparison, "
            "and so its chain is made anew wherever that changes; steps of this optimizer are no longer compiled, "
            "which would take seconds each time. Hand the tensor on as it is, or compute with it (0.1 * lr); for a "
            "branch on it take torch.where, for min and max clamp.",
        )

    # Steps

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]  # Those of torch take no extra arguments.
        self, closure: Callable[[], Any] | None = None, **extra: Any
    ) -> Any:
        """Take one step, and return what the closure, called before, returned.

        Args:
            closure: Function that clears gradients, calls `backward` on a loss and returns it. A chain that takes the
                `value` of the loss, as `reduce_on_plateau`, gets it; one with a line search, as `lbfgs`, calls the
                closure again for each trial, with other numbers in the parameters.
            extra: Extra arguments of the chains, such as `value=loss` where there is no closure.

        Raises:
            TypeError: A chain needs an extra argument that did not come, or none takes one that came.
        """
        if closure is not None and not callable(closure):
            raise TypeError(f"closure is {type_of(closure)}; expected a function. A loss goes as value=loss")
        extra = self._wanted_of(extra)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if loss is not None and self._wants("value"):
                extra = {"value": loss.detach() if isinstance(loss, Tensor) else loss, **extra}
        returned_none = closure is not None and loss is None
        hint = " The closure returned None; lacks it `return loss`?" if returned_none else ""
        self._advance(self, extra, closure, hint)
        return loss

    def _wants(self, name: str) -> bool:
        """Whether a chain takes an extra argument of this name."""
        if len(self._chains) < len(self.param_groups):  # In a copy, which has made none.
            self._read_groups()
        if name not in self._wanted:
            self._wanted[name] = any([tx.accepts(name) for tx in self._chains])
        return self._wanted[name]

    def _wanted_of(self, extra: dict[str, Any]) -> dict[str, Any]:
        """The extra arguments that a chain takes; an error for others, but for those that loops hand to all."""
        found = {name: x for name, x in extra.items() if self._wants(name)}
        unknown = [name for name in extra if name not in found and name not in FOR_ANY]
        if unknown:
            raise TypeError(
                f"step got the extra argument {unknown[0]!r}, which no chain of this optimizer takes. Is it "
                "misspelled, or does the factory lack the transform that it is for?"
            )
        return found

    def _attempt(self, extra: dict[str, Any], closure: Callable[[], Any] | None, hint: str) -> None:
        """Take a step; of one that fails, the states that began in it are gone again."""
        had = [*self.state]
        try:
            self._update(extra, closure, hint)
        except BaseException:  # Also an interrupt, as of a first step that compiles.
            for p in {*self.state}.difference(had):
                del self.state[p]
            self._parts.forget()
            raise

    @torch.no_grad()
    def _update(self, extra: dict[str, Any], closure: Callable[[], Any] | None, hint: str) -> None:
        self._read_groups()
        for index in range(len(self.param_groups)):
            self._say_untaken(index)
        fresh = not self.state
        frozen = self._frozen()
        known = self._parts.find(self._chains, self.param_groups, self.state, frozen)
        gradient = lambda p: None if p in frozen else p.grad
        found = [(part, list(map(gradient, part.params))) for part in known]
        found = [(part, grads) for part, grads in found if any([g is not None for g in grads])]
        parts = [part for part, _ in found]
        self._still = 0 if parts else self._still + 1
        if not parts and (fresh or self._still == _STILL):
            self._say_nothing_moves()
        if not parts or (fresh and self._makes_states_alone(parts)):
            return
        asks = (closure is not None or "value_fn" in extra) and any([searches(tx) for tx in self._chains])
        step = Eager(beside([self._chains[part.group] for part in parts])) if asks else self._step_of(parts)
        params = [part.tree(part.params) for part in parts]
        grads = [part.gradients(grads) for part, grads in found]
        try:
            states = [restored(part.spec, part.leaves(self.state)) for part in parts]
        except KeyError:  # A state was emptied, as by `optimizer.state[parameter] = {}`, and begins anew.
            self._parts.forget()
            self._update(extra, closure, hint)
            return
        kept = [x for part, grads in found for x in part.kept(self.state, grads)]
        before = [x.clone() for x in kept]
        if asks:
            grads, extra = self._searched(parts, grads, extra, closure)
        try:
            self._take(step, params, grads, states, extra, hint)
        finally:  # Also after an interrupt in the middle of it.
            for x, old in zip(kept, before, strict=True):
                x.copy_(old)
        if not self._parts.packed and isinstance(step, FusedStep):
            for part, state in zip(parts, step.packed_state(params, grads, states, **extra), strict=True):
                for p, entries in part.entries(tree_leaves(state)).items():
                    self.state[p].update(entries)
        self._parts.packed = True

    def _frozen(self) -> set[Tensor]:
        """The parameters that count as without a gradient, whatever was left in theirs."""
        params = [p for group in self.param_groups for p in group["params"]]
        return {p for p, frozen in zip(params, frozen_beside_others(params), strict=True) if frozen}

    def _say_nothing_moves(self) -> None:
        """Warn, once, of a first step without any gradient, or of several in a row."""
        if not self._said_nothing:
            self._said_nothing = True
            warn_user(
                "a step has no effect, because no parameter of this optimizer has a gradient. Is backward() missing, "
                "are all frozen, or has the module others by now, as after load_state_dict(assign=True)?",
            )

    def _take(
        self, step: FusedStep | Eager, params: Params, grads: Updates, states: State, extra: Any, hint: str
    ) -> None:
        """Take a step, or raise an error that says how a chain gets what it lacks."""
        try:
            step(params, grads, states, **extra)
        except TypeError as error:
            lacks = ("missing" in str(error) and "argument" in str(error)) or " needs the " in str(error)
            if not lacks:
                raise
            by_name = "" if "value_fn" in str(error) else ", or by its name, as in step(value=loss)"
            raise TypeError(
                f"a chain of this optimizer needs an extra argument, which step() did not get: {error}. Here it comes "
                f"by step(closure), where the closure returns the loss{by_name}.{hint}"
            ) from error

    def _searched(
        self, parts: list[Part], grads: list[Updates], extra: dict[str, Any], closure: Callable[[], Any] | None
    ) -> tuple[list[Updates], dict[str, Any]]:
        """Gradients and extra arguments of a line search, which asks a closure for losses elsewhere."""
        if len(parts) > 1:
            raise ValueError(
                f"a line search has to see all parameters at once, and these are {len(parts)} trees, of "
                f"{len({part.group for part in parts})} param groups; expected one group, whose parameters have "
                "gradients from the first step on. Leave others out of the optimizer."
            )
        grads = tree_map(torch.clone, grads)  # Into those of the parameters the closure writes.
        value_fn = objective(parts[0], closure)
        return grads, {"grad": grads[0], **({} if value_fn is None else {"value_fn": value_fn}), **extra}

    def _makes_states_alone(self, parts: list[Part]) -> bool:
        """Whether this first step has no rates and no gradients, as that by which distributed checkpoints make states.

        It may come after the parameters were loaded, which a constant threshold or a projection would move.
        """
        rates = [group["lr"] for group in self.param_groups if "lr" in group]
        if not rates or any([rate != 0 for rate in rates]):
            return False
        return not any([(p.grad != 0).any() for part in parts for p in part.params if p.grad is not None])

    def _step_of(self, parts: list[Part]) -> FusedStep | Eager:
        """The step for some parts side by side."""
        key = tuple([part.key for part in parts])
        if key not in self._steps:
            tx = beside([self._chains[part.group] for part in parts])
            backend = False if self._plain else "inductor" if self._compile is True else self._compile
            known = all([type(p) in PLAIN or is_spread(p) for part in parts for p in part.params])
            self._steps[key] = FusedStep(tx, True, backend, loose=True) if backend and known else Eager(tx)
            self._parts.packed = False
        return self._steps[key]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned: values of groups, and states in the dtypes in which they were saved.

        Parameters that have names here and there are found by these, whatever their order in a group.

        Raises:
            ValueError: It is of other groups, another chain or other parameters; nothing is changed then.

        Warns:
            UserWarning: Parameters have other names there, and go by their place.
        """
        before = self.state, self.param_groups
        # Torch converts states to the dtype of their parameters, and so loses counters and moments of bfloat16 ones.
        last = self.register_load_state_dict_pre_hook(
            lambda _, saved: hidden_from_torch(by_name(saved, self.param_groups))
        )
        try:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                for key, value in self.defaults.items():
                    if key in self._names:
                        group.setdefault(key, value)
            self._read_groups()
            self._parts.find(self._chains, self.param_groups, self.state)
        except BaseException:
            self.state, self.param_groups = before
            self._parts.forget()
            raise
        finally:
            last.remove()

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        own = {"_factory": self._factory, "_compile": self._compile, "_names": self._names}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        show_to_torch(state.get("state", {}))
        super().__setstate__(state)
        if "_steps" not in self.__dict__:
            self._forget()
        self._parts.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimizer:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__({k: v if k == "_factory" else copy.deepcopy(v, memo) for k, v in self.__getstate__().items()})
        if NOTE_COPY in vars(self):
            vars(self)[NOTE_COPY](made)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        try:
            pickle.dumps(self._factory)
        except Exception as error:
            raise pickle.PicklingError(
                f"this optimizer cannot be pickled, because its factory {written(self._factory)} cannot: {error}. "
                "Define the factory with def at the top of a module, or save optimizer.state_dict(), which needs none."
            ) from error
        return super().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        lines = [f"Optimizer of {written(self._factory)} ("]
        for index, group in enumerate(self.param_groups):
            count = sum([p.numel() for p in group["params"]])
            lines.append(f"Parameter Group {index}: {len(group['params'])} tensors, {count} entries")
            lines += [f"    {k}: {written(v)}" for k, v in sorted(group.items()) if k not in ("params", "param_names")]
        return "\n".join([*lines, ")"])
