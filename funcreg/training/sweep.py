"""Sweeps: many trainings with hyperparameters of their own, as one run that is mapped over them."""

from __future__ import annotations

import importlib
import importlib.util
import math
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from funcreg.core.grids import Config, configurations, split_names
from funcreg.core.inputs import as_data
from funcreg.core.notices import warn_user
from funcreg.core.summaries import table
from funcreg.core.tree import tree_map
from funcreg.training.runs import Run
from funcreg.training.trained import Model, make_splits
from funcreg.transforms.ensemble import seeded
from funcreg.transforms.transform import Transform

Progress = Callable[[dict[str, Any]], Any]
#: Rows that are printed, at most.
_MOST = 40


class Sweep:
    """What came of a sweep: rows, parameters and the course of the losses.

    Printed, it is a table, best row first, with the index of each row, which `member` and `hyper` take.

    Args:
        rows: One dict for each configuration and seed, in the order of the grid: the hyperparameters, `seed`, `loss`
            (on validation rows, without penalties; the mean over folds), `score` if there is one, `train_loss`,
            `epoch` (that of the parameters), `epochs` trained, `status` ("done", "stopped" early, "dropped" by
            halving, "diverged"), and of folds `loss_std`, `score_std` and the list `folds` of losses.
        params: Stacked parameters, one row along the first dimension, of folds one fold along the second.
        buffers: Stacked buffers of a module, such as the running statistics of BatchNorm, of the same form.
        history: Tensors `loss`, `train_loss` and `score`, epochs by rows, of folds by folds; NaN where none was
            measured.
        model: What was trained.

    Example:
        >>> x = torch.linspace(-1, 1, 64).unsqueeze(1)
        >>> result = sweep(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, sgd, {"learning_rate": [1e-3, 0.1]},
        ...                (x, 2 * x), epochs=20, batch_size=16)
        >>> result.best["learning_rate"], result.best["status"]
        (0.1, 'done')
        >>> module = torch.nn.Linear(1, 1)
        >>> module.load_state_dict(result.member())
        <All keys matched successfully>
    """

    def __init__(
        self, rows: list[dict[str, Any]], params: Any, buffers: Any, history: dict[str, Tensor], model: Model
    ) -> None:
        self.rows, self.params, self.buffers, self.history = rows, params, buffers, history
        self._model = model

    @property
    def ranking(self) -> list[int]:
        """Indices of the rows from best to worst: by score if there is one (equal ones by loss), else by loss."""

        def key(k: int) -> tuple[bool, float, float, float]:
            row = self.rows[k]
            value = -row["score"] if "score" in row else row["loss"]
            late = row["epochs"] if row["status"] == "dropped" else math.inf  # What was dropped later was better.
            return row["status"] == "diverged" or math.isnan(value), -late, value, row["loss"]

        return sorted(range(len(self.rows)), key=key)

    @property
    def best(self) -> dict[str, Any]:
        """The best row."""
        return self.rows[self.ranking[0]]

    def hyper(self, row: int | None = None) -> Config:
        """The hyperparameters of a row, of the best one if none is given: a configuration for another sweep."""
        chosen = self.rows[self._index(row)]
        return {name: chosen[name] for name in self._model.hyper}

    def member(self, row: int | None = None, fold: int | None = None) -> Any:
        """The parameters of a row, of the best one if none is given, as `module.load_state_dict` takes them.

        Of a sweep that began with a tree of parameters it is a tree like that one. Each fold has parameters of its own,
        which have not seen the rows that it holds out: `fold` says which. To have those of all rows, train the best
        configuration once more, `sweep(..., [result.hyper()], data, validation=0)`.
        """
        k = self._index(row)
        count = len(self.rows[k].get("folds", ()))
        if not count and fold is not None and fold != 0:
            raise ValueError(f"fold is {fold!r}; expected None, because the sweep had no folds, as folds=3 makes them")
        if count and fold is None:
            raise ValueError(
                f"the sweep had {count} folds, and its members have parameters for each; give fold=, from 0 to "
                f"{count - 1}. For a training on all rows: sweep(..., [result.hyper()], data, validation=0).member()."
            )
        at = (k, _place("fold", fold, count)) if count else (k,)
        return self._model.loadable(*(tree_map(lambda w: w[at].clone(), tree) for tree in (self.params, self.buffers)))

    def _index(self, row: int | None) -> int:
        return self.ranking[0] if row is None else _place("row", row, len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        columns = [name for name in self.rows[0] if name != "folds"]
        if len({row["seed"] for row in self.rows}) == 1:
            columns.remove("seed")
        shown = self.ranking if len(self.rows) <= _MOST else self.ranking[: _MOST - 5]
        lines = table([["row", *columns], *([str(k), *(_cell(self.rows[k][name]) for name in columns)] for k in shown)])
        rest = len(self.rows) - len(shown)
        return lines + (f"\n... {rest} more, in .rows" if rest else "")


def _place(name: str, given: Any, count: int) -> int:
    """An index, which may count from the end, or an error that says from where to where there are any."""
    try:
        index = operator.index(given)
    except TypeError as error:
        raise TypeError(f"{name} is {given!r}; expected a whole number") from error
    if isinstance(given, bool) or not -count <= index < count:
        raise IndexError(f"{name} is {given!r}; expected a whole number from 0 to {count - 1}")
    return index % count


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return getattr(value, "__name__", None) or str(value)


def sweep(
    model: Any,
    loss: Callable[..., Tensor],
    make: Callable[..., Transform],
    grid: Mapping[str, Any] | Iterable[Config],
    data: Any,
    *,
    epochs: int,
    batch_size: int = 128,
    draws: int | None = None,
    seeds: int | Sequence[int] = 1,
    validation: Any = None,
    folds: int | Iterable[Any] | None = None,
    score: Callable[..., Tensor] | None = None,
    patience: int | None = None,
    halving: int | None = None,
    chunk_size: int | None = None,
    compile: bool | str | Callable[..., Any] = False,
    static: Sequence[str] = (),
    progress: bool | Progress = False,
    seed: int = 0,
) -> Sweep:
    r"""Train one member for each configuration of hyperparameters, seed and fold, all at once, by `vmap`.

    Every member is trained as if it were alone: it has its own hyperparameters, state, buffers and random numbers. All
    see the same batches, so that only their hyperparameters and seeds tell them apart. What a member draws, in dropout
    and that of attention, by `rand`, `randn`, `randint`, `randperm`, `normal`, `bernoulli` and their like, in place,
    and as the key of a chain's noise, follows from its seed, whoever is trained beside it. What torch draws otherwise
    (`poisson`, by a generator, in recurrent layers with dropout, in a `vmap` of the loss) does not: members draw
    different numbers there, the same again only among the same members, and a warning says so.

    Numbers become 0-dim tensors with one value for each member, as in `ensemble`; what is no number (a penalty, a
    flag, None) splits the members into groups that are trained beside each other.

    Args:
        model: A module, whose weights all members begin with; a function without arguments that makes a module, which
            is called for each seed; or a tree of parameters.
        loss: Of a module, `loss(outputs, *targets)`; of a tree, `loss(params, *batch)`. A mean over the rows of a
            batch. Hyperparameters that `make` does not take and `loss` names go to it by keyword, those that the
            `forward` of a module names to that, and others to the attributes of its layers that have their names.
        make: From the hyperparameters of one member, by keyword, to its transform. Those that take `value`, `grad` or
            `value_fn`, such as `reduce_on_plateau`, `polyak_sgd` and `lbfgs`, get those of the batch.
        grid: From names of hyperparameters to lists or tensors of values, of which all combinations are trained; or a
            list of dicts, one for each configuration. With `draws`, values may be distributions of torch or scipy. A
            name may be that of an attribute, `"3.p"`, or a glob, `"*.p"` for the rates of all layers of dropout.
        data: Tensors with one row an example, `(inputs, *targets)`, or a `TensorDataset`. Arrays of numpy or pandas and
            lists of numbers become tensors in the dtype of the parameters. A tuple of inputs stands for
            several arguments of the module, a dict for keywords.
        epochs: Number of passes over the training rows, of each fold over its own; a fold with fewer rows waits.
        batch_size: Rows in a batch, for all folds no more than the smallest has. What does not fill the last batch of
            an epoch waits for the next one.
        draws: Number of random draws from the grid, instead of all its combinations.
        seeds: Number of seeds, or a list of them, for the initial weights and random numbers: every configuration is
            trained with each.
        validation: Share of the rows held out for validation (0.2 unless there are folds), 0 for none; or other data
            of the same form.
        folds: Number of folds, or a list of pairs of row indices (for training, for validation): every configuration is
            trained on each.
        score: Function of the arguments of `loss` to a number that is better if higher, a mean over rows. It ranks
            rows instead of the loss, which decides between equal scores. One that reads numbers from tensors, such as a
            metric of scikit-learn, is called for one member after the other, with tensors on the CPU and all validation
            rows at once.
        patience: Stop members that have not improved on validation rows for so many epochs; they keep their best
            parameters. Without it, members have the parameters of the last epoch.
        halving: Successive halving: after :math:`E/\eta^k` of :math:`E` epochs go on with the best of
            :math:`\eta = ` `halving` rows, for all k that leave one.
        chunk_size: Most rows that are mapped over at once, for less memory.
        compile: Whether to compile the training step as a whole, for some seconds; or a backend of `torch.compile`.
            Chains that take `value_fn` are not compiled, nor models that draw by `rand` or `randn`, nor what the
            compiler does not take: a warning says so.
        static: Names of hyperparameters that `make` or `loss` need as numbers of Python, such as a count of entries.
        progress: True for a bar (of tqdm if it is installed), or a function that is given a dict after each epoch:
            `epoch`, `epochs`, `members` still in training, and the best `loss` or `score` so far.
        seed: Seed of splits, batches and draws, and with those of members, of their random numbers. Torch's own
            generators are afterwards where they were.

    Raises:
        TypeError: Nobody takes a hyperparameter of the grid, `make` returns no transform, or data are no tensors.
        ValueError: A configuration is refused by `make`, the rows of the data differ, or there are too few of them.

    Example:
        >>> x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] > 0).long()
        >>> result = sweep(
        ...     lambda: torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)),
        ...     torch.nn.functional.cross_entropy,
        ...     lambda lr, strength: prox_adam(lr, l1, strength=strength, mask=matrices),
        ...     {"lr": [1e-3, 1e-2], "strength": torch.logspace(-4, -2, 3)},
        ...     (x, y),
        ...     epochs=20,
        ...     batch_size=32,
        ...     score=lambda outputs, y: (outputs.argmax(-1) == y).double().mean(),
        ... )
        >>> len(result), result.best["lr"], result.best["score"] > 0.9
        (6, 0.01, True)

    References:
        Jamieson & Talwalkar, *Non-stochastic best arm identification and hyperparameter optimization*, 2016.
    """
    epochs, batch_size = _whole("epochs", epochs), _whole("batch_size", batch_size)
    draws = None if draws is None else _whole("draws", draws)
    limits = {"patience": patience, "halving": halving, "chunk_size": chunk_size}
    limits = {name: None if value is None else _whole(name, value) for name, value in limits.items()}
    try:
        seed = operator.index(seed)
    except TypeError as error:
        raise TypeError(f"seed is {seed!r}; expected a whole number") from error
    if limits["halving"] == 1:
        raise ValueError("halving is 1, which drops nothing; expected at least 2")
    configs = configurations(grid, draws, seed)
    for name, function in (("loss", loss), ("score", score)):
        if not callable(function) and (name == "loss" or function is not None):
            raise TypeError(f"{name} is {function!r}; expected a function of outputs and targets")
    trained = Model(model, loss, score, seeds, list(configs[0]))
    names = split_names(list(configs[0]), make, loss, trained.module)
    trained.give(names)
    start = trained.start[0]
    tensors = as_data(data, start)
    splits = make_splits(tensors, validation, folds, batch_size, seed, start)
    if not splits.valid and score is not None:
        raise ValueError("score came without validation rows; give validation= or folds=")

    def train() -> Run:
        run = Run(trained, make, configs, names, splits, epochs, static, compile=compile, seed=seed, **limits)
        order = torch.Generator().manual_seed(seed)
        with _reporter(progress, epochs) as report:
            for epoch in range(epochs):
                if not run.blocks:
                    break
                run.epoch(epoch, order)
                report(run.summary(epoch))
        return run

    run = seeded(train, seed)
    rows = run.rows()
    if all([row["status"] == "diverged" for row in rows]):
        warn_user(
            f"all {len(rows)} rows of the sweep have diverged: their parameters are the last that were finite. Are the "
            "learning rates too great, or is there NaN in data?"
        )
    return Sweep(rows, run.params, run.buffers, run.history(), trained)


def _whole(name: str, value: Any) -> int:
    """A whole number of at least 1, as it is or of numpy."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
    return count


@contextmanager
def _reporter(progress: bool | Progress, epochs: int) -> Iterator[Progress]:
    """What is called after each epoch."""
    if not isinstance(progress, bool):
        if not callable(progress):
            raise TypeError(f"progress is {progress!r}; expected True, False or a function of a dict")
        yield progress
    elif progress and importlib.util.find_spec("tqdm") is not None:
        with importlib.import_module("tqdm.auto").tqdm(total=epochs, unit="epoch") as bar:

            def advance(now: dict[str, Any]) -> None:
                bar.set_postfix({name: _cell(now[name]) for name in now if name not in ("epoch", "epochs")})
                bar.update()

            yield advance
    else:
        yield _print_line if progress else lambda now: None


def _print_line(now: dict[str, Any]) -> None:
    print(", ".join(f"{name} {_cell(value)}" for name, value in now.items()), file=sys.stderr)
