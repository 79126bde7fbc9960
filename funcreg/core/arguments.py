"""What a penalty takes: hyperparameters in their order, within bounds, and options; else errors that say how."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Params
from funcreg.core.checks import leaf_name, shared_leaf
from funcreg.core.construction import Remembering
from funcreg.core.notices import warn_user
from funcreg.core.ranges import check_range, concrete
from funcreg.core.tree import dotted, map_with_path, tree_leaves

AT_LEAST_0 = (0.0, math.inf)
ABOVE_0 = (sys.float_info.min, math.inf)
#: Bounds of what means nothing at infinity.
FINITE = (0.0, sys.float_info.max)
FINITE_ABOVE_0 = (sys.float_info.min, sys.float_info.max)
#: In the place of an argument that did not come.
LACKING: Any = inspect.Parameter.empty

#: What other libraries call hyperparameters and options.
_ELSEWHERE = {"l1_ratio": "rho", "lam": "alpha", "lambda_": "alpha", "axis": "dim", "dims": "dim", "weight": "weights"}
#: What a strength is called elsewhere.
_STRENGTHS = {"alpha", "l1", "l1_lambda", "lam", "lamb", "lambd", "lambda_", "lmbda", "reg", "strength", "weight_decay"}


class TakesHyper(Remembering):
    """What is called with hyperparameters and options that it knows by name."""

    __name__: str
    bounds: dict[str, tuple[float, float]]
    _hyper: tuple[inspect.Parameter, ...]
    _options: frozenset[str]
    #: From what others call its arguments to what an error adds.
    hints: Mapping[str, str] = {}

    def bind(self, *hyper: Hyper, **options: Any) -> tuple[tuple[Hyper, ...], dict[str, Any]]:
        """Hyperparameters in their order and options, or an error that says what this penalty takes."""
        if len(hyper) > len(self._hyper):
            spans = any([isinstance(value, list) and value and isinstance(value[0], dict) for value in hyper])
            hint = f"Groups that span leaves go in by coupled({self._as_called()}, groups)." if spans else ""
            raise TypeError(f"{self._takes()}; got {len(hyper)} hyperparameters. {hint or self._how_strong()}")
        values = list(hyper)
        if options:  # Most calls have none, and traced code pays for each look at them.
            self._check_names(options)
        for parameter in self._hyper[len(hyper) :]:
            value = options.pop(parameter.name, parameter.default)
            if value is inspect.Parameter.empty:
                packed = any(isinstance(given, tuple) for given in values)
                raise TypeError(
                    f"{self._takes()}; {parameter.name} is missing"
                    + (". Is a * missing before a tuple?" if packed else "")
                )
            values.append(value)
        if options:
            twice = [name for name in options if name not in self._options]
            if twice:
                raise TypeError(f"{self._takes()}; got {', '.join(twice)} by position and by name")
        for parameter, value in zip(self._hyper, values, strict=True):
            bounds = self.bounds.get(parameter.name)
            if bounds is None or type(value) is not float or not bounds[0] <= value <= bounds[1]:
                check_hyper(f"{parameter.name} of {self.__name__}", value, bounds)
        weights = options.get("weights") if options else None
        for tensor in weights if isinstance(weights, (list, tuple)) else (weights,):
            if isinstance(tensor, Tensor):
                check_hyper(f"weights of {self.__name__}", tensor, AT_LEAST_0)
        return tuple(values), options

    def _check_given(self, form: str = "", **given: Any) -> None:
        """Raise an error, with the right way to write it, for arguments that did not come."""
        lacking = [name for name, value in given.items() if value is LACKING]
        if not lacking:
            return
        name, row = self._as_called(), ", ".join([*given, *[p.name for p in self._hyper]])
        call = f"{name}.{form}" if form else name
        hint = "" if form else f". What takes a {self.kind} as an argument gets it as it is, {self.__name__}, uncalled."
        hint = ". The step is the learning rate times the strength." if lacking == ["step"] else hint
        raise TypeError(f"{call} lacks {' and '.join(lacking)}; expected {call}({row}){hint}")

    def _check_names(self, options: Collection[str]) -> None:
        known = {p.name for p in self._hyper} | self._options
        unknown = [name for name in options if name not in known]
        if unknown:
            hint = _other_name(unknown[0], known) or self._hint(unknown)
            if not hint and _STRENGTHS.intersection(unknown):
                hint = f". {self._how_strong()}"
            raise TypeError(f"{self._takes()}; got {', '.join(unknown)}{hint}")

    def _hint(self, names: Collection[str]) -> str:
        return self.hints[next(iter(names))] if self.hints.keys() >= {*names} else ""

    def _takes(self) -> str:
        takes = f"{self.__name__} takes {', '.join(p.name for p in self._hyper) or 'no hyperparameters'}"
        return takes + (f" and the keywords {', '.join(sorted(self._options))}" if self._options else "")

    def _how_strong(self) -> str:
        name = self._as_called()
        return (
            f"Its strength is a factor, 1e-4 * {name}(params), also of the step, {name}.prox(params, 1e-4 * rate); or "
            f"strength=1e-4 where it is an argument, as in regularize(optimizer, {self.__name__}, strength=1e-4)."
        )

    def _as_called(self) -> str:
        """The name, such that a call or an attribute may follow."""
        return f"({self.__name__})" if " " in self.__name__ else self.__name__

    def without_defaults(self, values: tuple[Hyper, ...]) -> tuple[Hyper, ...]:
        """Hyperparameters without the last ones that are what they would be anyway."""
        kept = len(values)
        while kept and self._hyper[kept - 1].default is values[kept - 1]:
            kept -= 1
        return values[:kept]


def check_hyper(name: str, value: Hyper, bounds: tuple[float, float] | None) -> None:
    """Raise an error if a number of a hyperparameter is none, or outside of its bounds, as far as it is known."""
    if isinstance(value, (dict, list, tuple)):  # By the walk over trees, which knows every kind of node.
        map_with_path(lambda path, leaf: check_hyper(f"{name} at '{dotted(path)}'", leaf, bounds), value)
        return
    if bounds is not None:
        least, greatest = bounds
        if isinstance(value, Tensor) and not value.ndim and value.is_floating_point():
            known = concrete(value)
            if known is None or least <= float(known) <= greatest:
                return
        above_0, finite = least == sys.float_info.min, greatest == sys.float_info.max
        least, greatest = 0.0 if above_0 else least, math.inf if finite else greatest
        check_range(name, value, least, greatest, open_low=above_0, finite=finite)
    elif not isinstance(value, Tensor) or not (value.ndim or value.is_complex()):
        check_range(name, value, -math.inf)


def _other_name(name: str, known: Collection[str]) -> str:
    own = _ELSEWHERE.get(name)
    return f". {name} of other libraries is {own} here." if own in known else ""


def say_shared(penalty: TakesHyper, params: Params, values: tuple[Hyper, ...]) -> None:
    """Warn of an anchor in the memory of parameters of a module, which moves along where these are written into."""
    if all([isinstance(value, (int, float)) for value in values]) or not torch.is_grad_enabled():
        return
    name = shared_leaf(params, values)
    if name is not None and any([type(w) is torch.nn.Parameter and w.requires_grad for w in tree_leaves(params)]):
        warn_user(
            f"{penalty.__name__} got a tensor that shares memory with {leaf_name('params', name)}, as state_dict() and "
            "detach() give them: an optimizer that writes into the parameter moves both, and the penalty has no effect "
            "on it. Give a copy, as by w.detach().clone() or copy.deepcopy(model.state_dict())."
        )
