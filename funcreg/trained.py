"""What a sweep trains, a module or a tree of parameters as one function, and on which rows of which data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from funcreg.ensemble import seeded, stack
from funcreg.grids import Config
from funcreg.inputs import NO_NUMBERS, as_data, first_line, misfit
from funcreg.tree import check_params, tree_leaves, tree_map


class Model:
    """A module, a function that makes modules, or a tree of parameters, and the loss of it.

    Args:
        source: One of the three.
        loss: The loss of outputs and targets, or of parameters and a batch.
        score: The score of the same arguments.
        seeds: Number of seeds, or a list of them.
        hyper: Names of hyperparameters.
    """

    def __init__(
        self,
        source: Any,
        loss: Callable[..., Tensor],
        score: Callable[..., Tensor] | None,
        seeds: int | Sequence[int],
        hyper: list[str],
    ) -> None:
        self.loss, self.score, self.hyper = loss, score, hyper
        self.maps_score = True  # Whether it is called by vmap, or for one member after the other.
        self.seeds = list(range(seeds) if isinstance(seeds, int) else seeds)
        if not self.seeds:
            raise ValueError(f"seeds is {seeds!r}; expected at least one")
        self._training: nn.Module | None = None
        drawn = callable(source) and not isinstance(source, nn.Module)
        if not drawn and len(self.seeds) > 1:
            raise ValueError(
                f"seeds is {seeds!r}, and all members begin with the weights that were given; expected a function that "
                "makes them, as in lambda: Sequential(...)"
            )
        members: list[Any] = [seeded(source, each) for each in self.seeds] if drawn else [source]
        if isinstance(members[0], nn.Module):
            trees: list[Any] = [self._opened(member, drawn) for member in members]
            self._keep(members[0])
        else:
            trees = [(member, {}) for member in members]
        check_params(trees[0][0], "model")
        self.start = stack(trees)

    def _opened(self, module: nn.Module, drawn: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters that are trained, and what changes or differs beside them."""
        named = dict(module.named_parameters())
        params: dict[str, Tensor] = {name: w for name, w in named.items() if w.requires_grad}
        if not params:
            raise ValueError(f"the {type(module).__name__} has no parameters that require a gradient: nothing to train")
        # What requires no gradient stays in the module, once for all members, if it is the same for all.
        fixed = {name: w for name, w in named.items() if not w.requires_grad and drawn}
        return params, {**fixed, **dict(module.named_buffers())}

    def _keep(self, module: nn.Module) -> None:
        """Copies of the module, one in each mode: the user's own stays as it is."""
        self._training, self._evaluating = (copy.deepcopy(module) for _ in range(2))
        if not module.training:  # Else layers that were put into another mode stay in it.
            self._training.train()
        self._evaluating.eval()
        first: dict[int, str] = {}
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        self._names = {name: first.setdefault(id(w), name) for name, w in named}  # Tied ones have one name.

    def arguments(self, params: Any, buffers: Any, batch: Any, train: bool) -> tuple[tuple[Any, ...], Any]:
        """What the loss is called with, and the buffers after a forward pass, which changes copies of them."""
        module = self._training if train else self._evaluating if self._training is not None else None
        if module is None:
            return (params, *batch), buffers
        inputs, *targets = batch
        own = {**params, **{name: b.clone() for name, b in buffers.items()}}
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        outputs = functional_call(module, own, args if isinstance(args, tuple) else (args,), kwargs)
        return (outputs, *targets), {name: own[name] for name in buffers}

    def measured(self, params: Any, buffers: Any, hyper: Config, batch: Any) -> tuple[Tensor, Any]:
        """Loss and score on validation rows; instead of a score that no map takes, the outputs of a module.

        Where there is no score, the loss stands in its place.
        """
        args, _ = self.arguments(params, buffers, batch, False)
        value = self.loss(*args, **hyper)
        if self.score is None or not self.maps_score:
            return value, value if self.score is None or self._training is None else args[0]
        return value, torch.as_tensor(self.score(*args)).to(value.device, value.dtype)

    def scores(self, params: Any, outputs: list[Any], batches: list[Any]) -> Tensor:
        """The scores of some members, one after the other, on all of several pieces of rows, on the CPU."""
        stacked = params if self._training is None else tree_map(lambda *pieces: torch.cat(pieces, 1), *outputs)
        rows = tree_map(lambda *pieces: torch.cat(pieces), *batches)
        targets = rows if self._training is None else rows[1:]
        found = [
            _as_number(self._scored((tree_map(lambda w, k=k: w[k], stacked), *targets)))
            for k in range(len(tree_leaves(params)[0]))
        ]
        return torch.tensor(found, dtype=torch.float64, device="cpu")

    def _scored(self, args: tuple[Any, ...]) -> Any:
        """The score of one member; NaN where its outputs are not finite, which a library may refuse."""
        args = tree_map(lambda x: x.detach().to("cpu"), args)
        if self.score is None or not all([bool(x.isfinite().all()) for x in tree_leaves(args[0])]):
            return math.nan
        return self.score(*args)

    # What is wrong is said before any training, where each call is of one member

    def check(self, hyper: Config, batch: Any) -> None:
        """Call the loss for one member, where errors say what is wrong, and then by `vmap` for those of all seeds."""
        params, buffers = (tree_map(lambda w: w[0], tree) for tree in self.start)
        try:
            args, _ = seeded(lambda: self.arguments(params, buffers, batch, True), 0)
        except (RuntimeError, TypeError) as error:
            cause = misfit(error, {"the parameters": params, "data": batch})
            if not cause:
                raise
            raise TypeError(f"the module failed on a batch: {first_line(error)}. {cause}") from error
        try:
            value = self.loss(*args, **hyper)
        except (RuntimeError, TypeError, ValueError) as error:
            cause = misfit(error, {"argument": args}, self.loss)
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(f"the loss failed: {first_line(error)}. It was given {_shapes(args)}. {cause}") from error
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            came = f"of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"loss returned {came}; expected a scalar, the mean over the rows of a batch")

        def one(params: Any, buffers: Any) -> Tensor:
            return self.loss(*self.arguments(params, buffers, batch, True)[0], **hyper)

        try:
            seeded(lambda: vmap(grad(one), randomness="different")(*self.start), 0)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                "model and loss run for one member, but not for all at once under vmap: "
                f"{first_line(error)}. {NO_NUMBERS}"
            ) from error

    def check_score(self, batch: Any) -> None:
        """Call the score by `vmap` or, if it reads numbers from tensors, for one member, and see what it returns."""

        def one(params: Any, buffers: Any) -> Tensor:
            return torch.as_tensor(self.score(*self.arguments(params, buffers, batch, False)[0]))  # pyright: ignore[reportOptionalCall]  # There is one.

        try:
            shape = seeded(lambda: vmap(one, randomness="different")(*self.start), 0).shape[1:]
        except Exception:  # Whatever a library raises for a tensor without numbers; another cause is raised below anew.
            self.maps_score = False
            params, buffers = (tree_map(lambda w: w[0], tree) for tree in self.start)
            args, _ = seeded(lambda: self.arguments(params, buffers, batch, False), 0)
            try:
                value = self._scored(args)
            except (RuntimeError, TypeError, ValueError) as error:
                raise TypeError(
                    f"the score failed: {first_line(error)}. Called like the loss, it was given {_shapes(args)}."
                ) from error
            _as_number(value)
        else:
            if shape:
                raise ValueError(f"score returned shape {tuple(shape)}; expected a number, a mean over rows")

    def repeated(self, configs: int, folds: int) -> tuple[Any, Any]:
        """Where members begin: configurations one after another, each with all seeds; of folds, one dimension more."""

        def rows(w: Tensor) -> Tensor:
            w = w.repeat(configs, *[1] * (w.ndim - 1))
            return w.unsqueeze(1).expand(-1, folds, *w.shape[1:]).clone() if folds > 1 else w

        return tree_map(rows, self.start)

    def loadable(self, params: Any, buffers: Any) -> Any:
        """A tree of parameters as it is; of a module, what its `load_state_dict` takes."""
        if self._training is None:
            return params
        found = {**params, **buffers}
        return {
            name: found.get(self._names.get(name, name), value) for name, value in self._evaluating.state_dict().items()
        }


# Data


def taken(data: Any, rows: Tensor, device: torch.device) -> Any:
    """Some rows of data, on a device."""
    return tree_map(lambda x: x[rows.to(x.device)].to(device), data)


class Splits(NamedTuple):
    """Which rows each fold is trained and validated on; without folds, there is one."""

    data: Any
    valid_data: Any  # The same, or other data for validation.
    train: list[Tensor]  # Row indices, for each fold.
    valid: list[Tensor]  # The same, empty if nothing is validated.
    batch_size: int

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return min(len(rows) for rows in self.train) // self.batch_size

    def batches(self, order: torch.Generator, device: torch.device) -> Iterator[Any]:
        """The batches of an epoch; of folds, each has one for every fold along the first dimension."""
        shuffled = [rows[torch.randperm(len(rows), generator=order, device="cpu")] for rows in self.train]
        for k in range(self.steps):
            rows = torch.stack([each[k * self.batch_size : (k + 1) * self.batch_size] for each in shuffled])
            yield taken(self.data, rows if len(self.train) > 1 else rows[0], device)

    def validation(self, fold: int, device: torch.device) -> Iterator[tuple[float, Any]]:
        """The validation rows of a fold in pieces, each with its share of them."""
        rows = self.valid[fold]
        for piece in rows.split(max(self.batch_size, 1024)):
            yield len(piece) / len(rows), taken(self.valid_data, piece, device)


def make_splits(
    data: Any, validation: Any, folds: int | Iterable[Any] | None, batch_size: int, seed: int, params: Any
) -> Splits:
    """Rows for training and for validation, by one share, other data, or folds."""
    count = len(tree_leaves(data)[0])
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")
    other, valid = data, []
    if folds is not None:
        if validation is not None:
            raise ValueError("validation and folds came together; folds hold their own validation rows out")
        train, valid = _folds(shuffled, folds)
    elif validation is None or isinstance(validation, (int, float)):
        share = 0.2 if validation is None else float(validation)
        if not 0 <= share < 1:
            raise ValueError(f"validation is {validation}; expected a share of the rows from 0 to below 1, or data")
        held = round(share * count)
        if share and not 0 < held < count:
            raise ValueError(f"{share:g} of {count} rows for validation leaves none on one side")
        train, valid = [shuffled[held:]], [shuffled[:held]] if held else []
    else:
        other, train = as_data(validation, params, "validation"), [shuffled]
        valid = [torch.arange(len(tree_leaves(other)[0]), device="cpu")]
    size = min(batch_size, *(len(rows) for rows in train))
    if not size or any(not len(rows) for rows in valid):
        raise ValueError(f"data of {count} rows leave none for training or validation")
    return Splits(data, other, train, valid, size)


def _folds(shuffled: Tensor, folds: Any) -> tuple[list[Tensor], list[Tensor]]:
    count = len(shuffled)
    if isinstance(folds, int):
        if isinstance(folds, bool) or not 2 <= folds <= count:
            raise ValueError(f"folds is {folds!r}; expected a number from 2 to that of the rows, {count}")
        valid = list(shuffled.tensor_split(folds))
        return [torch.cat([*valid[:k], *valid[k + 1 :]]) for k in range(folds)], valid
    pairs = [tuple(pair) for pair in folds]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError("folds are no pairs of row indices, (for training, for validation), as KFold.split makes them")
    train, valid = ([torch.as_tensor(rows, device="cpu") for rows in side] for side in zip(*pairs, strict=True))
    for rows in (*train, *valid):
        if (
            rows.ndim != 1
            or rows.dtype != torch.int64
            or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count)
        ):
            raise ValueError(f"folds hold {rows}; expected row indices, whole numbers from 0 to {count - 1}")
    return train, valid


def _shapes(args: tuple[Any, ...]) -> str:
    """What a loss is called with, for an error text."""
    kinds = [f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}" for x in args]
    return " and ".join(kinds)


def _as_number(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError) as error:
        came = f"shape {tuple(score.shape)}" if hasattr(score, "shape") else repr(score)
        raise ValueError(f"score returned {came}; expected a number, better if higher") from error
