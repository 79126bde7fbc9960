"""Configurations of a sweep: grids, lists and random draws of hyperparameters, and which of them are numbers."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core.construction import written
from funcreg.core.ranges import check_range, number
from funcreg.core.wording import type_of

Config = dict[str, Any]
#: What is written into the rows beside the hyperparameters.
RESERVED = ("seed", "loss", "loss_std", "score", "score_std", "train_loss", "epoch", "epochs", "status", "folds")


def log_uniform(low: float, high: float) -> torch.distributions.Distribution:
    """Numbers whose logarithms are uniform, for random draws of strengths and learning rates in `sweep`.

    Args:
        low: Least number, above 0.
        high: Greatest number, above `low`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bool((log_uniform(1e-5, 1e-1).sample((1000,)) < 1e-3).float().mean() > 0.45)
        True
    """
    check_range("low", low, open_low=True, finite=True)
    check_range("high", high, low, open_low=True, finite=True)
    uniform = torch.distributions.Uniform(math.log(low), math.log(high))
    return torch.distributions.TransformedDistribution(uniform, torch.distributions.ExpTransform())


def configurations(grid: Any, draws: int | None, seed: int) -> list[Config]:
    """The configurations of a grid, in its order, or some random draws from it."""
    if isinstance(grid, Mapping):
        _check_names(grid)
        axes = {name: _axis(name, values, draws) for name, values in grid.items()}
        if draws is not None:
            return _drawn(axes, draws, seed)
        return [dict(zip(axes, row, strict=True)) for row in itertools.product(*axes.values())]
    if isinstance(grid, (str, Tensor)) or not isinstance(grid, Iterable):
        raise TypeError(
            f"grid is {type_of(grid)}; expected a dict from the names of hyperparameters to their values, or a "
            "list of dicts with one value each"
        )
    if draws is not None:
        raise ValueError("draws came with a list of configurations; expected a dict of values or distributions")
    configs = [dict(config) for config in grid]
    if not configs:
        raise ValueError("grid is an empty list; expected configurations, dicts from names to values")
    for k, config in enumerate(configs):
        _check_names(config)
        if config.keys() != configs[0].keys():
            raise ValueError(
                f"configuration {k} names {sorted(config)}; expected {sorted(configs[0])}, as in the first"
            )
        configs[k] = {name: _plain(value) for name, value in config.items()}
    return configs


def _check_names(config: Mapping[str, Any]) -> None:
    for name in config:
        if not isinstance(name, str) or not name.rpartition(".")[2].isidentifier():
            raise TypeError(f"grid has the key {name!r}; expected the name of a hyperparameter")
        if name in RESERVED:
            raise ValueError(f"a hyperparameter is named '{name}', as a column of the rows is; give it another name")


def _axis(name: str, values: Any, draws: int | None) -> Any:
    """The values of one hyperparameter, or its distribution."""
    if _is_distribution(values):
        if draws is None:
            raise ValueError(
                f"'{name}' is a distribution, and no grid has all of its values; give draws=, their number"
            )
        return values
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) or not hasattr(values, "__len__"):
        raise TypeError(
            f"grid has {written(values)} for '{name}'; expected a list or tensor of values, or a distribution. What is "
            "the same for all belongs in the factory."
        )
    found = [_plain(value) for value in values]
    if not found:
        raise ValueError(f"grid has no values for '{name}'; expected at least one")
    return found


def _plain(value: Any) -> Any:
    """A number in a tensor or of numpy as a number of Python, anything else as it is."""
    # Some numbers of numpy are numbers of Python, too, but are written as what they are.
    plain = isinstance(value, Tensor) or type(value).__module__ == "numpy"
    return value.item() if plain and value.ndim == 0 else number(value)


def _is_distribution(values: Any) -> bool:
    return isinstance(values, torch.distributions.Distribution) or callable(getattr(values, "rvs", None))


def _drawn(axes: dict[str, Any], draws: int, seed: int) -> list[Config]:
    if not any(map(_is_distribution, axes.values())):
        return _drawn_once(axes, draws, seed)
    columns: dict[str, list[Any]] = {}
    with torch.random.fork_rng(()):
        torch.manual_seed(seed)
        for name, values in axes.items():
            if isinstance(values, torch.distributions.Distribution):
                columns[name] = values.sample((draws,)).tolist()
            elif _is_distribution(values):  # Of scipy.
                state = int(torch.randint(2**31, ()))
                columns[name] = [number(value) for value in values.rvs(size=draws, random_state=state)]
            else:
                columns[name] = [values[k] for k in torch.randint(len(values), (draws,)).tolist()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _drawn_once(axes: dict[str, list[Any]], draws: int, seed: int) -> list[Config]:
    """Some combinations of a grid, none of them twice."""
    combinations = math.prod(map(len, axes.values()))
    if draws > combinations:
        raise ValueError(
            f"draws is {draws}, and the grid has {combinations} combinations; expected fewer. Without draws= each is "
            "trained once; seeds= trains each several times."
        )
    configs = []
    for place in random.Random(seed).sample(range(combinations), draws):
        config = {}
        for name, values in axes.items():
            place, k = divmod(place, len(values))
            config[name] = values[k]
        configs.append(config)
    return configs


# Who takes them


class Split(NamedTuple):
    """Names of hyperparameters by where they go."""

    make: tuple[str, ...]  # To the factory of transforms.
    loss: tuple[str, ...]  # To the loss, by keyword.
    forward: tuple[str, ...] = ()  # To the forward of a module, by keyword.
    attributes: tuple[str, ...] = ()  # To attributes of modules, whose names these are, or globs of them.

    @property
    def trained(self) -> tuple[str, ...]:
        """What goes to the loss or the module."""
        return (*self.loss, *self.forward, *self.attributes)


def split_names(
    names: Sequence[str], make: Callable[..., Any], loss: Callable[..., Any], module: torch.nn.Module | None
) -> Split:
    """Where hyperparameters go: to the factory, what it does not take to the loss, the forward or attributes."""
    if not callable(make) or isinstance(make, torch.nn.Module):
        raise TypeError(f"make is {make!r}; expected a function from hyperparameters to a transform")
    if isinstance(make, type) and issubclass(make, torch.optim.Optimizer):
        raise TypeError(
            f"make is the optimizer {make.__name__} of torch, which takes no steps of many members; expected a "
            "function from hyperparameters to a transform, such as fr.adamw, with learning_rate in the grid"
        )
    own, every = _names(make)
    to_make = tuple(name for name in names if name in own or (every and name.isidentifier()))
    rest = [name for name in names if name not in to_make]
    in_loss, in_forward = _names(loss)[0], [] if module is None else _names(module.forward)[0]
    to_loss = tuple(name for name in rest if name in in_loss)
    to_forward = tuple(name for name in rest if name not in in_loss and name in in_forward)
    others = tuple(name for name in rest if name not in (*to_loss, *to_forward))
    unknown = [name for name in others if module is None or not attributes(module, name)]
    if unknown:
        there = "" if module is None else ", nor is it an attribute of the module that is a number, such as '0.p'"
        raise TypeError(
            f"the factory takes {', '.join(own) or 'no hyperparameters'}, and neither it nor the loss"
            f"{'' if module is None else ' nor forward'} names '{unknown[0]}', which is in the grid{there}."
            f"{_near(unknown[0], [name for name in own if name not in names])}"
        )
    try:
        inspect.signature(make).bind(**dict.fromkeys(to_make))
    except TypeError as error:
        if not names:
            raise TypeError(f"grid names no hyperparameters, and the factory needs some: {error}") from error
        raise TypeError(
            f"the factory lacks hyperparameters of the grid, {', '.join(names)}: {error}. What is the same for all "
            f"members goes into a function, as in lambda {', '.join(names)}: {getattr(make, '__name__', 'make')}(...)."
        ) from error
    except ValueError:
        pass  # A function that is not written in Python has no signature: its call says what it lacks.
    return Split(to_make, to_loss, to_forward, others)


def attributes(module: torch.nn.Module, name: str) -> list[tuple[str, str]]:
    """Paths of modules and their attributes that are numbers, as the rate of dropout, whose dotted names match."""
    found = [(path, key) for path, layer in module.named_modules() for key, x in vars(layer).items() if _is_number(x)]
    return [(path, key) for path, key in found if fnmatch.fnmatchcase(f"{path}.{key}" if path else key, name)]


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


#: What others call a hyperparameter that has one of these names here.
_CALLED = {
    **dict.fromkeys(("lr", "eta", "rate", "step_size"), "learning_rate"),
    **dict.fromkeys(("alpha", "lam", "lambda_", "lmbda", "reg", "penalty_strength", "weight"), "strength"),
    **dict.fromkeys(("wd", "decay", "l2"), "weight_decay"),
    **dict.fromkeys(("beta1", "beta_1"), "b1"),
    **dict.fromkeys(("beta2", "beta_2"), "b2"),
    "epsilon": "eps",
    "learning_rate": "lr",
}


def _near(name: str, names: list[str]) -> str:
    """The name that may have been meant, as a sentence."""
    found = difflib.get_close_matches(name, names, 1)
    found = [_CALLED[name.lower()]] if _CALLED.get(name.lower()) in names else found
    return f" Did you mean '{found[0]}'?" if found else ""


def _names(function: Callable[..., Any]) -> tuple[list[str], bool]:
    """The names that a function takes by keyword, and whether it takes all."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return [], True
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    every = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return [parameter.name for parameter in parameters if parameter.kind in by_name], every


def grouped(configs: Sequence[Config], static: Sequence[str]) -> list[tuple[Config, list[int]]]:
    """Configurations that one map can train: groups of one value for all that is no number, with their indices.

    A number that is the same everywhere stays one of Python.
    """
    unknown = [name for name in static if name not in configs[0]]
    if isinstance(static, str) or unknown:
        raise ValueError(f"static is {static!r}; expected a list of names of hyperparameters, {list(configs[0])}")
    fixed = [name for name in configs[0] if name in static or _is_fixed([config[name] for config in configs])]
    groups: list[tuple[Config, list[int]]] = []
    for k, config in enumerate(configs):
        shared = {name: config[name] for name in fixed}
        for other, rows in groups:
            if all(_same(shared[name], other[name]) for name in fixed):
                rows.append(k)
                break
        else:
            groups.append((shared, [k]))
    return groups


def _is_fixed(values: list[Any]) -> bool:
    return not all(map(_is_number, values)) or all(value == values[0] for value in values)


def _same(a: Any, b: Any) -> bool:
    plain = (bool, int, float, str, tuple)
    return a is b or (type(a) is type(b) and isinstance(a, plain) and bool(a == b))
