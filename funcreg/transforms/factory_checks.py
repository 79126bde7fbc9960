"""What a factory of transforms may be given: errors for hyperparameters, masks and transforms that are none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Scalar
from funcreg.core.masks import check_mask
from funcreg.core.ranges import check_range, scalars
from funcreg.core.tree import dotted, map_with_path
from funcreg.core.undocumented import is_compiling, is_transformed
from funcreg.core.wording import type_of
from funcreg.transforms.schedules import KnownSchedule
from funcreg.transforms.transform import Transform, value_at


def _each(hyper: dict[str, Hyper], low: float = 0.0, **options: Any) -> None:
    for name, value in hyper.items():
        if value is None or isinstance(value, (Tensor, float, int)):
            check_range(name, value, low, **options)
        else:
            place = lambda path, name=name: f"{name} at '{dotted(path)}'" if path else name
            map_with_path(lambda path, leaf, place=place: _check_leaf(place(path), leaf, low, options), value)


def _check_leaf(name: str, leaf: Any, low: float, options: dict[str, Any]) -> None:
    check_range(name, leaf, low, **options)
    if callable(leaf) and not is_compiling() and not is_transformed():
        for count in (0, *(leaf.turns if isinstance(leaf, KnownSchedule) else ())):
            steps = torch.tensor(count, dtype=torch.int32, device="cpu")
            check_range(f"{name} at step {count}", value_at(leaf, steps), low, **options)


def nonnegative(**hyper: Hyper) -> None:
    """Raise an error for the first of these hyperparameters that is below 0, NaN, or no number."""
    _each(hyper)


def finite(**hyper: Hyper) -> None:
    """Raise an error for the first of these hyperparameters that is infinite, NaN, or no number."""
    _each(hyper, low=-torch.inf, finite=True)


def finite_nonnegative(**hyper: Hyper) -> None:
    """Raise an error for the first of these hyperparameters that is below 0, infinite, NaN, or no number."""
    _each(hyper, finite=True)


def positive(**hyper: Hyper) -> None:
    """Raise an error for the first of these hyperparameters that is at most 0, NaN, or no number."""
    _each(hyper, open_low=True)


def below_one(**hyper: Hyper) -> None:
    """Raise an error for the first of these hyperparameters that is below 0, at least 1, NaN, or no number."""
    _each(hyper, high=1.0, open_high=True)


def share(**hyper: Hyper) -> None:
    """Raise an error for the first of these hyperparameters that is below 0, above 1, NaN, or no number."""
    _each(hyper, high=1.0)


def without_momentum(momentum: Scalar | None, **given: Any) -> None:
    """Raise a ValueError for a momentum out of range, or the first of its options without effect, as there is none."""
    if momentum is not None:
        scalars(momentum=momentum)
        below_one(momentum=momentum)
    for name, value in given.items():
        if momentum is None and value is not None and value is not False:
            raise ValueError(f"{name} is {value!r}; it has no effect without momentum. Give momentum=, such as 0.9.")


def dtypes(**given: Any) -> None:
    """Raise a TypeError for the first of these dtypes that no moments can be kept in."""
    for name, value in given.items():
        if value is not None and not (isinstance(value, torch.dtype) and (value.is_floating_point or value.is_complex)):
            raise TypeError(f"{name} is {value!r}; expected a dtype of floating point numbers such as torch.bfloat16")


def check_selection(mask: Mask | None) -> None:
    """Raise a TypeError for what is given as a mask, but is none."""
    check_mask(mask)
    if isinstance(mask, (Transform, Tensor, int, float)) and not isinstance(mask, bool):
        came = f"the transform {mask!r}" if isinstance(mask, Transform) else f"the {type(mask).__name__} {mask!r}"
        raise TypeError(
            f"mask is {came}; expected a tree of bools, or a function that makes one from parameters, such as "
            "matrices or select('*.weight')"
        )


def check_transforms(what: str, transforms: Any) -> None:
    """Raise a TypeError for the first argument that is not a transform."""
    for i, tx in enumerate(transforms):
        if not isinstance(tx, Transform):
            raise TypeError(f"argument {i} of {what} is {_described(tx, what)}")


def check_no_torchs(name: str, make: Any) -> None:
    """Raise a TypeError for a class of torch's optimizers where a function that makes a transform is expected."""
    if isinstance(make, type) and issubclass(make, torch.optim.Optimizer):
        raise TypeError(
            f"{name} is the optimizer {make.__name__} of torch, which changes its parameters itself; expected a "
            "function that makes a Transform, such as fr.adamw"
        )


def _described(tx: Any, what: str) -> str:
    came = f"{type_of(tx)}; expected a Transform."
    if isinstance(tx, (list, tuple)):
        if what == "chain" and len(tx) == 2 and isinstance(tx[0], str):
            return f"{came} Transforms with names go to named_chain."
        if hasattr(tx, "init") and hasattr(tx, "update"):  # A pair of functions with names.
            library = type(tx).__module__.partition(".")[0]
            return f"{came} It is one of {library}; most of optax is here under the same name, such as fr.adamw."
        return f"{came} Are they to be given one by one, as in {what}(*transforms)?"
    if isinstance(tx, torch.optim.Optimizer) and type(tx).__module__.startswith("funcreg."):
        return (
            f"{came} It makes its chain of the values of a group; give {what} what the factory makes, as adamw(1e-3)."
        )
    if isinstance(tx, torch.optim.Optimizer):
        return f"{came} An optimizer of torch changes its parameters itself; take one of funcreg such as adamw."
    kind, name = getattr(tx, "kind", None), getattr(tx, "__name__", repr(tx))
    if isinstance(kind, str):
        link = {
            "penalty": f"A link of it is add_penalty({name}) before the step, or proximal({name}, step) after it.",
            "constraint": f"A link of it is project({name}, ...), after the step.",
            "selection": f"Leaves are chosen by masked(tx, {name}).",
        }
        return f"the {kind} {name}; expected a Transform. {link.get(kind, '')}".strip()
    if callable(tx):
        return f"{came} Is it called, as in identity()? A function of updates and params goes through stateless."
    return came
