"""The parameters of an optimizer of torch by name, and which of them a mask chooses."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from funcreg.core._typing import Mask, Params
from funcreg.core.frozen import frozen_beside_others
from funcreg.core.masks import listed, mask_leaves
from funcreg.core.selection import plain_names
from funcreg.core.tree import ABSENT
from funcreg.core.wording import type_of


class ParameterNames:
    """The names of the parameters of an optimizer, and which of them are penalized."""

    def __init__(self, optimizer: Optimizer, module: nn.Module | None, mask: Mask | None) -> None:
        self.module, self.mask = module, mask
        self.names: dict[Tensor, str] = {}
        self.read(optimizer)

    def read(self, optimizer: Optimizer) -> None:
        """Name all parameters that the optimizer has now; those that it had keep their names."""
        raw = _names(optimizer, self.module)
        new = [w for w in raw if w not in self.names]
        plain = {**self.names, **dict(zip(new, plain_names(tuple([raw[w] for w in new])), strict=True))}
        short = {w: plain[w] for w in raw}
        self.names = short if len(set(short.values())) == len(short) else raw
        self._plain = {name: self.names[w] for w, name in raw.items()}
        params = self.params()
        try:
            bools = [True] * len(params) if self.mask is None else mask_leaves(self._own(self.mask), params)
        except ValueError as error:
            said = str(error).rstrip(".")
            if self.module is None and not any("param_names" in group for group in optimizer.param_groups):
                raise ValueError(f"{said}. Parameters have no names without module=, the module of them.") from error
            if tied := self._tied():
                raise ValueError(f"{said}. Tied parameters go by their first name: {listed(tied)}.") from error
            if lacking := self._lacking():
                raise ValueError(f"{said}. The module has {lacking}.") from error
            raise
        # In the order of leaves, which is that of sorted keys.
        self.chosen = {name for name, chosen in zip(sorted(params), bools, strict=True) if chosen}
        self.count = len(params)
        self.ids, self._forms = [*map(id, raw)], _forms([*raw])

    def forget(self) -> None:
        """Take those that were read last for others than the optimizer has, so that they are read anew."""
        self.ids = []

    def are_of(self, params: list[Tensor]) -> bool:
        """Whether these are the parameters that were read last, of the shapes and dtypes that they had then."""
        return self.ids == [*map(id, params)] and self._forms == _forms(params)

    def _tied(self) -> list[str]:
        """The other names of parameters that are in the module more than once, and the first of each."""
        every = [] if self.module is None else self.module.named_parameters(remove_duplicate=False)
        pairs = [(plain_names((name,))[0], self.names[w]) for name, w in every if w in self.names]
        return [f"{again} is {first}" for again, first in pairs if again != first]

    def _lacking(self) -> str:
        """What parameters the module has that the optimizer does not hold, for an error."""
        every = {} if self.module is None else dict(self.module.named_parameters())
        lost = {name: w for name, w in every.items() if w not in self.names}
        why = " and which are frozen" if not any([w.requires_grad for w in lost.values()]) else ""
        return f"{listed(plain_names(tuple(lost)))}, too, which the optimizer was not given{why}" if lost else ""

    def _own(self, mask: Mask) -> Mask:
        """A mask by the names of the module as one by the names here."""
        if not isinstance(mask, dict):
            return mask
        lost = [name for name, chosen in mask.items() if chosen is True and not self._knows(name)]
        if lost:
            raise ValueError(f"mask chooses {lost[0]!r}, which the optimizer does not hold; it holds {self._listed()}")
        return self.renamed({name: chosen for name, chosen in mask.items() if self._knows(name)})

    def renamed(self, tree: Any) -> Any:
        """A tree by the names of the module as one by the names here, without prefixes of wrappers."""
        return {self._plain.get(name, name): x for name, x in tree.items()} if isinstance(tree, dict) else tree

    def completed(self, tree: Any) -> Any:
        """A tree of hyperparameters by the names here; those that the mask leaves out need no value."""
        if not isinstance(tree, dict):
            return tree
        given = {name: x for name, x in self.renamed(tree).items() if name not in self._later()}
        self._check_are_parameters(given)
        return {**dict.fromkeys(set(self.names.values()) - self.chosen, 0.0), **given}

    def _check_are_parameters(self, tree: dict[str, Any]) -> None:
        """Raise an error for what a `state_dict` has beside parameters: other names of tied ones, and buffers."""
        if self.module is None or not set(tree) - set(self.names.values()):
            return
        buffers = plain_names(tuple([name for name, _ in self.module.named_buffers(remove_duplicate=False)]))
        tied = [each for each in self._tied() if each.split()[0] in tree]
        others = tied + [f"{name} is a buffer" for name in buffers if name in tree]
        if others:
            raise ValueError(
                f"a hyperparameter names what is no parameter of its own: {listed(others)}. Of a state_dict take "
                "{name: saved[name] for name, _ in model.named_parameters()}; tied parameters go by their first name."
            )

    def _later(self) -> set[str]:
        """The names in the module of parameters that the optimizer may get later."""
        if self.module is None:
            return set()
        known = tuple([name for name, w in self.module.named_parameters() if w not in self.names])
        return {*known, *plain_names(known)} - {*self.names.values()}

    def _knows(self, name: str) -> bool:
        return name in self._plain or name in self._plain.values()

    def _listed(self) -> str:
        return ", ".join(list(self._plain.values())[:20])

    def tree(self, leaves: dict[str, Any]) -> dict[str, Any]:
        """A tree of some leaves, without the others."""
        return {name: leaves.get(name, ABSENT) for name in self.names.values()}

    def params(self) -> Params:
        return {name: w.detach() for w, name in self.names.items()}

    def penalized(self) -> dict[str, Tensor]:
        return {name: w for w, name in self.names.items() if name in self.chosen}

    def frozen(self) -> set[str]:
        """The names of parameters that are frozen beside others."""
        held = frozen_beside_others([*self.names])
        return {name for name, is_frozen in zip(self.names.values(), held, strict=True) if is_frozen}

    def replaced(self) -> list[str]:
        """The names of parameters that the module does not have any more."""
        known = None if self.module is None else set(self.module.parameters())
        return [] if known is None else [name for w, name in self.names.items() if w not in known]


def _forms(params: list[Tensor]) -> list[Any]:
    return [(w.dtype, w.device, w.shape) for w in params]


def _names(optimizer: Optimizer, module: nn.Module | None) -> dict[Tensor, str]:
    """The names of all parameters: those in the module, those that the optimizer was given, or their places.

    Of two modules the optimizer may be given equal names; these have the group before them, or are named by place.
    """
    known = {} if module is None else {w: name for name, w in module.named_parameters()}
    often = Counter([name for group in optimizer.param_groups for name in group.get("param_names") or ()])
    found: dict[Tensor, str] = {}
    for i, group in enumerate(optimizer.param_groups):
        given = group.get("param_names") or []
        for j, w in enumerate(group["params"]):
            if module is not None and w not in known:
                some = any([x in known for each in optimizer.param_groups for x in each["params"]])
                several = (
                    " For an optimizer of several modules give one that holds them, module=ModuleList([a, b]); for a "
                    "part of a module the whole, and a mask such as select('encoder.*')."
                )
                raise ValueError(
                    f"parameter {j} of param group {i}, of shape {tuple(w.shape)}, is not in module, "
                    f"{type_of(module)}. Was the optimizer made for another module, or before its parameters "
                    f"were replaced, as by to() or a wrapper?{several if some else ''}"
                )
            if w in found:
                raise ValueError(
                    f"parameter {j} of param group {i} is there again, after '{found[w]}': a step moves it twice, and "
                    "would penalize it once. Give the optimizer each once, as model.parameters() has tied weights."
                )
            name = known[w] if module is not None else given[j] if given else None
            if name is not None and module is None and often[name] > 1:
                name = f"groups.{i}.{name}" if given.count(name) == 1 else None
            found[w] = f"groups.{i}.params.{j}" if name is None else name
            if is_lazy(w):
                raise ValueError(
                    f"parameter '{found[w]}' is not initialized; run the module once, so that it gets its shape"
                )
    return found


class Moved(NamedTuple):
    """A penalized parameter that a step has moved."""

    name: str
    w: Tensor
    group: int
