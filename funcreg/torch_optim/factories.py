"""Factories of an optimizer: functions of the hyperparameters of a param group to a chain, and what they take."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from funcreg.core.construction import torchs, written
from funcreg.core.masks import listed
from funcreg.core.wording import type_of
from funcreg.transforms.hyperparams import Injected
from funcreg.transforms.transform import Transform

#: Options of torch's optimizers, and what stands for them here.
_HABITS = {
    "foreach": "A step is compiled for all tensors at once without it.",
    "fused": "A step is compiled for all tensors at once without it.",
    "capturable": "Counters are tensors where the parameters are without it.",
    "differentiable": "To differentiate through steps, call update of the chain and apply_updates.",
    "maximize": "Minimize the negative of the loss.",
    "amsgrad": "It is an optimizer of its own, fr.amsgrad.",
}


def is_number(name: str, value: Any) -> bool:
    """Whether an entry of a group looks like a hyperparameter: a number, some, or an option of torch's optimizers."""
    if isinstance(value, (tuple, list)) and value and name != "params":
        return all([is_number(name, each) for each in value])
    return (name in _HABITS and value is True) or type(value) in (int, float) or isinstance(value, Tensor)


def hyperparameters(factory: Any, hyper: dict[str, Any]) -> dict[str, str]:
    """The parameters of a factory, by what they are called in groups; or an error for those it does not take."""
    if not callable(factory) or isinstance(factory, Transform):
        is_shown = isinstance(factory, (Transform, str, int, float, type(None)))
        came = written(factory) if is_shown else type_of(factory)
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
        here = torchs({*names.values()}).get(name)
        reason = "Add it to the parameters of the factory, if a transform is to see it."
        reason = _HABITS.get(name, reason if here is None else f"It is a name of torch.optim; here that is {here}.")
        if name == names.get("lr"):
            reason = "Its learning_rate is called lr here, as in torch."
        raise TypeError(f"the factory does not take {name}; it takes {listed(names) or 'nothing'}. {reason}")
    if reserved := [name for name in names if name in ("params", "param_names")]:
        raise TypeError(f"a parameter of the factory is called {reserved[0]}, as the parameters of a group are")
    return names


def default_of(factory: Any, name: str | None) -> Any:
    """The default of a parameter of a factory."""
    return None if name is None else inspect.signature(factory).parameters[name].default


def check_complete(factory: Any, names: dict[str, str], given: dict[str, Any], index: int) -> None:
    """Raise an error if a group has no value for what a factory requires."""
    parameters = inspect.signature(factory).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = {name for name, p in parameters.items() if p.default is p.empty and p.kind in kinds}
    missing = [key for key, name in names.items() if name in required and name not in given]
    if "penalty" in missing and getattr(factory, "__module__", "").startswith("funcreg"):
        raise TypeError(
            f"the factory takes a penalty, which is no value of a param group; expected one that has it inside, such "
            f"as lambda lr, strength: fr.{factory.__name__}(lr, fr.l1, strength=strength)"
        )
    if missing:
        raise TypeError(
            f"param group {index} has no value for {listed(missing)}, which the factory takes; give Optimizer(params, "
            f"factory, {', '.join(f'{name}=...' for name in missing)}), or each group its own"
        )
