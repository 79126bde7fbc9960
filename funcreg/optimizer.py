"""Any chain as a `torch.optim.Optimizer`, for loops, schedulers and trainers that expect one.

Hyperparameters stand in the param groups, where schedulers and people change them. A step reads them into tensors
that the chains hold, so that no new value compiles anything. State stands in `optimizer.state`, by parameter, where
torch saves, loads, moves and shards it; at each step it is put together to the trees that a chain knows.
"""

from __future__ import annotations

import copy
import inspect
import operator
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcreg._typing import Params, State, Updates
from funcreg.construction import written
from funcreg.fused import FusedStep
from funcreg.group_values import GroupValues
from funcreg.hyperparams import Injected
from funcreg.notices import warn_user
from funcreg.shards import is_spread
from funcreg.transform import FOR_ANY, Transform
from funcreg.tree import (
    ABSENT,
    apply_updates,
    dotted,
    leaf_paths,
    leaves_like,
    listed,
    restored,
    structure,
    tree_leaves,
    tree_map,
)

#: Entries of a param group that torch and trainers keep there for themselves.
_OTHERS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "lr_scale")
#: Options of torch's optimizers, and what stands for them here.
_HABITS = {
    "foreach": "A step is compiled for all tensors at once without it.",
    "fused": "A step is compiled for all tensors at once without it.",
    "capturable": "Counters are tensors where the parameters are without it.",
    "differentiable": "To differentiate through steps, call update of the chain and apply_updates.",
    "maximize": "Minimize the negative of the loss.",
}
_PLAIN = (Tensor, torch.nn.Parameter)


class Optimizer(torch.optim.Optimizer):
    r"""Any chain as a real `torch.optim.Optimizer`.

    The factory makes the chain of each param group from the group's values, which torch's schedulers, or you, may
    change between steps: nothing is compiled anew for another number. `step` computes what `update` and
    `apply_updates` of the chain do, compiled for all groups at once, and writes into the parameters where they are.

    A chain acts on the parameters of its group as on one tree, so a global norm is that of a group. A parameter
    without a gradient counts as a gradient of zero there, and neither it nor its state moves; it has no state before
    its first gradient. Parameters that get theirs at a later step than others of the group start counters of their own
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
        compile: Whether the step is compiled by `fuse`; or the backend of `torch.compile` to do it with.
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
        self._names = _hyperparameters(factory, hyper)
        if "lr" not in hyper and isinstance(default := _default(factory, self._names.get("lr")), float):
            hyper["lr"] = default  # Where schedulers look for it.
        self._forget()
        super().__init__(params.items() if isinstance(params, Mapping) else params, hyper)

    def _forget(self) -> None:
        """Begin with no chain made and nothing compiled."""
        self._values: list[GroupValues] = []
        self._chains: list[Transform] = []
        self._parts: list[_Part] | None = None
        self._begun: set[Tensor] = set()  # The parameters in parts.
        self._held: list[Tensor] = []  # Those of all groups, when parts were made.
        self._count = 0  # Of parameters with states, when parts were made.
        self._steps: dict[Any, FusedStep | _Eager] = {}  # By the parts that have gradients.
        self._packed = False  # Whether states lie where the last step that was made likes them.
        self._wanted: dict[str, bool] = {}  # Which extra arguments a chain takes.
        self._plain = False  # Whether nothing is compiled any more.
        self._said_nothing = False  # Whether it was said that a step has no effect.
        # What compiles a training loop leaves the step out, which compiles its own.
        self._advance: Any = torch.compiler.disable(self._update)

    # Groups

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with values of its own or those of the constructor.

        Raises:
            TypeError: A hyperparameter of the factory has no value, or a parameter no name where others have one.
            ValueError: A hyperparameter is out of its range.
        """
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        try:
            names = group.get("param_names", [])
            if len({*names}) < len(names):
                twice = {name for name in names if names.count(name) > 1}
                raise ValueError(f"param group {index} has several parameters called {listed(sorted(twice))}")
            self._make_chain(index)
        except Exception:
            del self.param_groups[-1]  # So that a failed call changes nothing.
            raise
        taken = {*self._names, *_OTHERS}
        for name in [name for name, value in group.items() if name not in taken and _is_number(name, value)]:
            warn_user(
                f"param group {index} has {name}={written(group[name])}, which the factory does not take: it has no "
                f"effect. The factory takes {listed(self._names)}.",
            )

    def _given(self, index: int) -> dict[str, Any]:
        """The hyperparameters of a group by the factory's names."""
        group = self.param_groups[index]
        given = {name: group[key] for key, name in self._names.items() if key in group}
        if isinstance(given.get(self._names.get("lr", "")), int):
            given[self._names["lr"]] = float(group["lr"])  # It will not stay a whole number.
        return given

    def _make_chain(self, index: int) -> None:
        """Make the chain of a group: once on the CPU, where numbers are checked, and once for steps."""
        given = self._given(index)
        _check_complete(self._factory, self._names, given, index)
        values = GroupValues(given, self._names.get("lr"), self.param_groups[index]["params"])
        self._called(index, values.readable())
        made = values.made(lambda tree: self._called(index, tree))
        self._values[index:] = [values, *self._values[index + 1 :]]
        self._chains[index:] = [made, *self._chains[index + 1 :]]
        self._parts = None  # The states may not be those of the new chain.
        self._steps.clear()
        self._wanted.clear()

    def _called(self, index: int, given: dict[str, Any]) -> Transform:
        """What the factory makes, or an error that names the group."""
        try:
            made = self._factory(**given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"param group {index}: {error}") from error
        if not isinstance(made, Transform):
            came = "None; lacks it a return?" if made is None else f"a {type(made).__name__}."
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
            raise TypeError(f"closure is a {type(closure).__name__}; expected a function. A loss goes as value=loss")
        extra = self._wanted_of(extra)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if loss is not None and self._wants("value"):
                extra = {"value": loss.detach() if isinstance(loss, Tensor) else loss, **extra}
        returned_none = closure is not None and loss is None
        hint = " The closure returned None; lacks it `return loss`?" if returned_none else ""
        self._advance(extra, closure, hint)
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

    @torch.no_grad()
    def _update(self, extra: dict[str, Any], closure: Callable[[], Any] | None, hint: str) -> None:
        self._read_groups()
        fresh = not self.state
        found = [(part, [p.grad for p in part.params]) for part in self._find_parts()]
        found = [(part, grads) for part, grads in found if any([g is not None for g in grads])]
        parts = [part for part, _ in found]
        if not parts and fresh:
            self._say_nothing_moves()
        if not parts or (fresh and self._makes_states_alone(parts)):
            return
        searches = (closure is not None or "value_fn" in extra) and any([_searches(tx) for tx in self._chains])
        step = _Eager(_beside([self._chains[part.group] for part in parts])) if searches else self._step_of(parts)
        params = [part.tree(part.params) for part in parts]
        grads = [part.tree(list(map(_filled, part.params, grads))) for part, grads in found]
        states = [restored(part.spec, self._leaves(part)) for part in parts]
        kept = [x for part, grads in found for x in self._kept(part, grads)]
        before = [x.clone() for x in kept]
        if searches:
            grads, extra = self._searched(parts, grads, extra, closure)
        self._take(step, params, grads, states, extra, hint)
        for x, old in zip(kept, before, strict=True):
            x.copy_(old)
        if not self._packed and isinstance(step, FusedStep):
            for part, state in zip(parts, step.packed_state(params, grads, states, **extra), strict=True):
                for p, entries in _entries(part, tree_leaves(state)).items():
                    self.state[p].update(entries)
        self._packed = True

    def _say_nothing_moves(self) -> None:
        """Warn, once, of a first step without any gradient."""
        if not self._said_nothing:
            self._said_nothing = True
            warn_user(
                "a step has no effect, because no parameter of this optimizer has a gradient. Is backward() missing, "
                "are all frozen, or has the module others by now, as after load_state_dict(assign=True)?",
            )

    def _take(
        self, step: FusedStep | _Eager, params: Params, grads: Updates, states: State, extra: Any, hint: str
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
        self, parts: list[_Part], grads: list[Updates], extra: dict[str, Any], closure: Callable[[], Any] | None
    ) -> tuple[list[Updates], dict[str, Any]]:
        """Gradients and extra arguments of a line search, which asks a closure for losses elsewhere."""
        if len(parts) > 1:
            raise ValueError(
                f"a line search has to see all parameters at once, and these are {len(parts)} trees, of "
                f"{len({part.group for part in parts})} param groups; expected one group, whose parameters have "
                "gradients from the first step on. Leave others out of the optimizer."
            )
        grads = tree_map(torch.clone, grads)  # Into those of the parameters the closure writes.
        objective = _objective(parts[0], closure)
        return grads, {"grad": grads[0], **({} if objective is None else {"value_fn": objective}), **extra}

    def _makes_states_alone(self, parts: list[_Part]) -> bool:
        """Whether this first step has no rates and no gradients, as that by which distributed checkpoints make states.

        It may come after the parameters were loaded, which a constant threshold or a projection would move.
        """
        rates = [group["lr"] for group in self.param_groups if "lr" in group]
        if not rates or any([rate != 0 for rate in rates]):
            return False
        return not any([(p.grad != 0).any() for part in parts for p in part.params if p.grad is not None])

    def _step_of(self, parts: list[_Part]) -> FusedStep | _Eager:
        """The step for some parts side by side."""
        key = tuple([part.key for part in parts])
        if key not in self._steps:
            tx = _beside([self._chains[part.group] for part in parts])
            backend = False if self._plain else "inductor" if self._compile is True else self._compile
            known = all([type(p) in _PLAIN or is_spread(p) for part in parts for p in part.params])
            self._steps[key] = FusedStep(tx, True, backend, loose=True) if backend and known else _Eager(tx)
            self._packed = False
        return self._steps[key]

    def _leaves(self, part: _Part) -> list[Tensor]:
        """The leaves of the state of a part."""
        entries = list(map(self.state.__getitem__, part.params))
        return [entries[i][name] for i, name in part.slots]

    def _kept(self, part: _Part, grads: list[Tensor | None]) -> list[Tensor]:
        """The parameters without a gradient and their states, which a step leaves as they are."""
        without = {i for i, g in enumerate(grads) if g is None}
        if not without:
            return []
        slots = [slot for n, slot in enumerate(part.slots) if slot[0] in without and n not in part.shared]
        return [part.params[i] for i in sorted(without)] + [self.state[part.params[i]][name] for i, name in slots]

    # States

    def _find_parts(self) -> list[_Part]:
        """The parameters that have states, in parts that began together; new ones begin here."""
        held = [p for group in self.param_groups for p in group["params"]]
        same = len(held) == len(self._held) and all(map(operator.is_, held, self._held))
        if self._parts is None or not same or len(self.state) != self._count:  # Loaded, replaced, or cleared.
            self._parts = [part for index in range(len(self.param_groups)) for part in self._resumed(index)]
            self._begun = {p for part in self._parts for p in part.params}
            self._count, self._packed, self._held = len(self.state), False, held
        everything = len(held)
        if len(self._begun) == everything:
            return self._parts
        made = []
        for index, group in enumerate(self.param_groups):
            new = [i for i, p in enumerate(group["params"]) if p.grad is not None and p not in self._begun]
            if new:
                made.append(self._begin(index, new))
        parts = [*self._parts, *[part for part, _ in made]]
        refused = [part.refused for part in parts if part.refused is not None]
        if made and len(refused) == len(parts) and sum([len(part.params) for part in parts]) == everything:
            raise refused[0]  # A mask that chooses nothing in any group.
        for part, leaves in made:
            self.state.update(_entries(part, leaves))
            self._begun.update(part.params)
        self._parts, self._count, self._packed = parts, len(self.state), self._packed and not made
        return parts

    def _begin(self, index: int, which: Sequence[int]) -> tuple[_Part, list[Tensor]]:
        """Some parameters of a group as a part, and the leaves of the state that their chain begins with."""
        group = self.param_groups[index]
        params, names = [group["params"][i] for i in which], group.get("param_names")
        keys = [_Name(i if names is None else names[i]) for i in which]
        state, rest, refused = self._init(index, dict(zip(keys, map(Tensor.detach, params), strict=True)))
        leaves, spec = structure(state)
        owners = {key: i for i, key in enumerate(keys)}
        slots, shared = [], set()
        for i, path in enumerate(leaf_paths(state)):
            name = next((key for key in path if isinstance(key, _Name)), None)
            slots.append((0 if name is None else owners[name], _slot(path)))
            shared |= {i} if name is None else set()
        return _Part(index, params, keys, rest, refused, spec, slots, shared, (index, tuple(keys))), leaves

    def _init(self, index: int, tree: Params) -> tuple[State, Params, ValueError | None]:
        """What a chain begins with on some parameters, what stands for the others, and what it has against its group.

        A mask may choose none of these parameters if it chooses others: of the group, or of another one.
        """
        init, group = self._chains[index].init, self.param_groups[index]
        try:
            return init(tree), {}, None
        except ValueError as error:
            refused: ValueError | None = error
        names = [_Name(name) for name in group.get("param_names", range(len(group["params"])))]
        rest: Params = {name: ABSENT for name in names if name not in tree}
        if rest:
            try:
                init(dict(zip(names, map(Tensor.detach, group["params"]), strict=True)))
                refused = None
            except ValueError as error:
                refused = error
        if refused is not None and "param_names" not in group and "matches no leaf" in str(refused):
            refused = ValueError(f"{refused}. For names, give the optimizer model.named_parameters().")
        if refused is not None and len(self.param_groups) == 1:
            raise refused
        if refused is not None:
            rest[_Name("the other groups")] = ABSENT
        try:
            return init({**tree, **rest}), rest, refused
        except ValueError as error:
            raise refused or error from None

    def _resumed(self, index: int) -> list[_Part]:
        """The parts of a group whose states were loaded: parameters with equal counters began together."""
        params = self.param_groups[index]["params"]
        begun = [i for i, p in enumerate(params) if p in self.state]
        if not begun:
            return []
        whole, leaves = self._begin(index, begun)
        # Looking a parameter up leaves an empty dict in `state`: one that should have entries has not begun.
        if waiting := {p for p, entries in _entries(whole, leaves).items() if entries and not self.state[p]}:
            begun = [i for i in begun if params[i] not in waiting]
            if not begun:
                return []
            whole, leaves = self._begin(index, begun)
        self._check_states(whole, leaves)
        counters = {whole.slots[i][1] for i in whole.shared}
        together: dict[Any, list[int]] = {}
        for i in begun:
            found = self.state[params[i]]
            together.setdefault(tuple([str(found[name].tolist()) for name in sorted(counters)]), []).append(i)
        parts = [whole] if len(together) == 1 else [self._begin(index, which)[0] for which in together.values()]
        for part in parts:
            for name in counters:
                for p in part.params[1:]:
                    self.state[p][name] = self.state[part.params[0]][name]
        return parts

    def _check_states(self, part: _Part, leaves: list[Tensor]) -> None:
        """Raise an error if the states of parameters are not those of their chain."""
        expected = _entries(part, leaves)
        for p, name in zip(part.params, part.names, strict=True):
            found, like = self.state[p], expected[p]
            if set(found) != set(like):
                raise ValueError(
                    f"the state of parameter '{name}' has {listed(found) or 'no entries'}; expected "
                    f"{listed(like) or 'none'}. Is it the state of another chain, or of an optimizer of torch?"
                )
            for entry, leaf in like.items():
                if found[entry].shape != leaf.shape:
                    raise ValueError(
                        f"the state {entry} of parameter '{name}' has shape {tuple(found[entry].shape)}; expected "
                        f"{tuple(leaf.shape)}. Are the parameters in another order, or of another model?"
                    )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned: values of groups, and states in the dtypes in which they were saved.

        Raises:
            ValueError: It is of other groups, another chain or other parameters; nothing is changed then.
        """
        before = self.state, self.param_groups
        # Torch converts states to the dtype of their parameters, and so loses counters and moments of bfloat16 ones.
        hide = lambda _, saved: {**saved, "state": {k: _hidden(v) for k, v in saved["state"].items()}}
        last = self.register_load_state_dict_pre_hook(hide)
        try:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                for key, value in self.defaults.items():
                    if key in self._names:
                        group.setdefault(key, value)
            self._read_groups()
            self._find_parts()
        except Exception:
            self.state, self.param_groups, self._parts = *before, None
            raise
        finally:
            last.remove()

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        own = {"_factory": self._factory, "_compile": self._compile, "_names": self._names}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        found = state.get("state", {})
        for p, entries in found.items():
            if isinstance(entries, dict) and isinstance(p, Tensor):
                found[p] = {k: v.shown(p) if isinstance(v, _Hidden) else v for k, v in entries.items()}
        super().__setstate__(state)
        if "_steps" not in self.__dict__:
            self._forget()
        self._parts = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimizer:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__({k: v if k == "_factory" else copy.deepcopy(v, memo) for k, v in self.__getstate__().items()})
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


class _Name(str):
    """The name of a parameter as a key: told from the keys of states that are called the same."""


@dataclass
class _Part:
    """Parameters of a group that got their first gradients at the same step, and so have their counters in common."""

    group: int
    params: list[Tensor]
    names: list[_Name]
    rest: Params  # Stands for parameters of the optimizer that are not in this part, where a chain has to know of them.
    refused: ValueError | None  # What the chain says of these parameters alone.
    spec: Any  # The structure of their state.
    slots: list[tuple[int, str]]  # For each leaf of it, the parameter in whose state it is, and under which name.
    shared: set[int]  # Leaves of no parameter alone, which are in the states of all.
    key: Any

    def tree(self, leaves: Sequence[Tensor]) -> Params:
        """Leaves, one for each parameter, as a tree that the chain knows."""
        return {**dict(zip(self.names, leaves, strict=True)), **self.rest}


def _is_number(name: str, value: Any) -> bool:
    """Whether an entry of a group looks like a hyperparameter: a number, or an option of torch's optimizers."""
    return (name in _HABITS and value is True) or type(value) in (int, float) or isinstance(value, Tensor)


def _hyperparameters(factory: Any, hyper: dict[str, Any]) -> dict[str, str]:
    """The parameters of a factory, by what they are called in groups; or an error for those it does not take."""
    if not callable(factory) or isinstance(factory, Transform):
        is_shown = isinstance(factory, (Transform, str, int, float, type(None)))
        came = written(factory) if is_shown else f"a {type(factory).__name__}"
        raise TypeError(
            f"factory is {came}; expected a function from the values of a group to a Transform, fr.adamw itself or "
            "lambda lr: fr.adamw(lr), whose values follow by name, as in Optimizer(params, fr.adamw, lr=1e-3)"
        )
    if isinstance(factory, Injected):
        raise TypeError(
            f"factory is {written(factory)}, whose hyperparameters stand in the state, where neither schedulers nor "
            "groups would change them; expected the factory itself: an Optimizer keeps its numbers in tensors anyway"
        )
    kind = getattr(factory, "kind", None)
    if isinstance(kind, str):
        raise TypeError(
            f"factory is the {kind} {factory.__name__}; expected a function that makes a Transform, such as "
            f"lambda lr, strength: fr.prox_adam(lr, {factory.__name__}, strength=strength)"
        )
    if isinstance(factory, type) and issubclass(factory, torch.optim.Optimizer):
        raise TypeError(
            f"factory is the optimizer {factory.__name__} of torch; expected a function that makes a Transform, such "
            "as fr.adamw. For a penalty on an optimizer of torch, there is regularize."
        )
    parameters = inspect.signature(factory).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if only := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]:
        raise TypeError(f"the factory takes {listed(only)} by position alone; expected parameters that have a name")
    names = {name: name for name in named}
    if "lr" not in names and "learning_rate" in names:
        del names["learning_rate"]
        names = {"lr": "learning_rate", **names}
    for name in hyper:
        if name in names or (name not in _HABITS and any(p.kind is p.VAR_KEYWORD for p in parameters)):
            names.setdefault(name, name)
            continue
        reason = _HABITS.get(name, "Add it to the parameters of the factory, if a transform is to see it.")
        raise TypeError(f"the factory does not take {name}; it takes {listed(names) or 'nothing'}. {reason}")
    if reserved := [name for name in names if name in ("params", "param_names")]:
        raise TypeError(f"a parameter of the factory is called {reserved[0]}, as the parameters of a group are")
    return names


def _default(factory: Any, name: str | None) -> Any:
    return None if name is None else inspect.signature(factory).parameters[name].default


def _check_complete(factory: Any, names: dict[str, str], given: dict[str, Any], index: int) -> None:
    parameters = inspect.signature(factory).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = {name for name, p in parameters.items() if p.default is p.empty and p.kind in kinds}
    missing = [key for key, name in names.items() if name in required and name not in given]
    if missing:
        raise TypeError(
            f"param group {index} has no value for {listed(missing)}, which the factory takes; give Optimizer(params, "
            f"factory, {', '.join(f'{name}=...' for name in missing)}), or each group its own"
        )


def _entries(part: _Part, leaves: list[Tensor]) -> dict[Tensor, dict[str, Tensor]]:
    """The leaves of a state by parameter and name; what belongs to none alone, such as a counter, is with each."""
    found: dict[Tensor, dict[str, Tensor]] = {p: {} for p in part.params}
    for i, ((owner, name), leaf) in enumerate(zip(part.slots, leaves, strict=True)):
        for p in part.params if i in part.shared else [part.params[owner]]:
            found[p][name] = leaf
    return found


def _slot(path: tuple[Any, ...]) -> str:
    """The name of a leaf in the state of its parameter."""
    return dotted(tuple(key for key in path if not isinstance(key, _Name))) or "value"


def _filled(p: Tensor, gradient: Tensor | None) -> Tensor:
    return torch.zeros_like(p, requires_grad=False) if gradient is None else gradient


def _beside(chains: list[Transform]) -> Transform:
    """Chains side by side, each on its own tree in a list."""

    def init(params: list[Params]) -> list[State]:
        return [tx.init(tree) for tx, tree in zip(chains, params, strict=True)]

    def update(updates: list[Updates], state: list[State], params: list[Params], **extra: Any) -> tuple[Any, Any]:
        rows = zip(chains, updates, state, params, strict=True)
        made = [tx.update(*trees, **tx.accepted(extra)) for tx, *trees in rows]
        return [new for new, _ in made], [after for _, after in made]

    return Transform(init, update, forwards_to=chains)


class _Loss(torch.autograd.Function):
    """The loss that a closure computes with some numbers in the parameters, which get theirs back, and its gradient."""

    @staticmethod
    def forward(closure: Callable[[], Any], params: list[Tensor], *leaves: Tensor) -> Any:
        before = [p.detach().clone() for p in params]
        try:
            _write(params, leaves)
            with torch.enable_grad():
                loss = closure()
            if not isinstance(loss, Tensor):
                raise TypeError(f"the closure returned {loss!r}; expected the loss, which a line search compares")
            return loss.detach().clone(), *[_filled(p, p.grad).clone() for p in params]
        finally:
            _write(params, before)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return None, None, *[slopes[0] * g for g in ctx.saved_tensors]


def _searches(tx: Transform) -> bool:
    """Whether a transform, or one in it, asks for the loss at other points."""
    return "value_fn" in inspect.signature(tx._update).parameters or any([_searches(each) for each in tx.forwards_to])


def _write(params: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for p, x in zip(params, leaves, strict=True):
            p.copy_(x)


def _objective(part: _Part, closure: Callable[[], Any] | None) -> Callable[[Params], Tensor] | None:
    """A closure as a function of the tree of a part."""
    if closure is None:
        return None
    return lambda tree: _Loss.apply(closure, part.params, *[tree[name] for name in part.names])[0]


class _Eager:
    """A step as plain functions, written into the tensors that it got."""

    def __init__(self, tx: Transform) -> None:
        self._tx = tx

    def __call__(self, params: Params, grads: Updates, state: State, **extra: Any) -> None:
        updates, after = self._tx.update(grads, state, params, **extra)
        new = leaves_like((params, state), (apply_updates(params, updates), after))
        old = tree_leaves((params, state))
        places = {x.data_ptr() for x in old if type(x) in _PLAIN}
        moved = [type(x) in _PLAIN and x is not y and x.data_ptr() in places for x, y in zip(new, old, strict=True)]
        # All is read before anything is written.
        for leaf, x in zip(old, [x.clone() if m else x for x, m in zip(new, moved, strict=True)], strict=True):
            leaf.copy_(x)


class _Hidden:
    """A tensor that torch does not see, and so does not convert."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def shown(self, param: Tensor) -> Tensor:
        """A copy where the parameter is."""
        return self._tensor.detach().to(param.device, copy=True)


def _hidden(entries: Any) -> Any:
    if not isinstance(entries, dict):
        return entries
    return {name: _Hidden(x) if isinstance(x, Tensor) else x for name, x in entries.items()}
