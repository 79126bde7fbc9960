"""The run of a sweep: stacks of members in training, who of them goes on, and what is kept of each."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from funcreg.core.construction import held_tensors, tells_all
from funcreg.core.grids import Config, Split, grouped
from funcreg.core.leafwise import apply_updates
from funcreg.core.masks import listed
from funcreg.core.notices import warn_user
from funcreg.core.rounding import signed
from funcreg.core.tree import tree_leaves, tree_map
from funcreg.fused.lowering import say_once
from funcreg.training.draws import Draws
from funcreg.training.trained import Model, Splits, Uses
from funcreg.transforms.mistakes import uphill
from funcreg.transforms.transform import FOR_ANY, Transform

#: Share of rows that are out of training, from which on the others are stacked anew.
_SPARSE = 0.25


@dataclass
class Group:
    """Configurations that one map can train, since they differ in numbers alone."""

    step: Callable[..., Any]  # One step of all members of a block.
    plain: Callable[..., Any]  # The same where all members go on.
    init: Callable[..., Any]
    measure: Callable[..., Any]
    size: int  # Most rows in a block.


@dataclass
class Block:
    """Rows that are trained by one map: along the first dimension of the trees, of folds those along the second."""

    group: Group
    rows: list[int]  # Their indices; there may be fewer than rows in the trees, the rest only fill a compiled shape.
    hyper: dict[str, Tensor]
    params: Any
    buffers: Any
    state: Any
    alive: Tensor  # Which members go on.


class Run:
    """Members in training, epoch by epoch.

    Args:
        model: What is trained.
        make: The factory of transforms.
        configs: One configuration for each row of the grid; rows of the sweep are these, each with all seeds.
        names: Which hyperparameters go to the factory, and which elsewhere.
        splits: Data, rows of each fold, and batches.
        epochs: Number of epochs.
        static: Names of hyperparameters that stay numbers of Python.
        patience: Epochs without improvement after which a member stops.
        halving: The share of rows that goes on at a rung is one over this.
        chunk_size: Most rows in a block.
        compile: Whether to compile steps, or with which backend.
        seed: With the seed of a member, what its random numbers follow from.
    """

    def __init__(
        self,
        model: Model,
        make: Callable[..., Transform],
        configs: list[Config],
        names: Split,
        splits: Splits,
        epochs: int,
        static: Sequence[str],
        *,
        patience: int | None,
        halving: int | None,
        chunk_size: int | None,
        compile: bool | str | Callable[..., Any],
        seed: int,
    ) -> None:
        self.model, self.make, self.names, self.splits = model, make, names, splits
        self.epochs, self._patience, self._compile = epochs, patience, compile
        self.configs = [config for config in configs for _ in model.seeds]
        self._seeds = [signed(each + (seed << 32)) for each in model.seeds]
        self.folds = len(splits.train)
        self._uneven = len(set(splits.steps)) > 1  # Folds whose epoch is over wait for the others.
        self._freezes = patience is not None or halving is not None or self._uneven
        self.params, self.buffers = model.repeated(len(configs), self.folds)
        leaves = tree_leaves(self.params)
        self.device, self._dtype = leaves[0].device, torch.promote_types(torch.float32, leaves[0].dtype.to_real())
        rows = len(self.configs)
        self._rungs = _rungs(rows, epochs, halving) if halving else {}
        # On the CPU, where it is decided who goes on.
        self._best = torch.full((rows, self.folds), math.inf, dtype=torch.float64, device="cpu")
        self._loss = self._best.clone()
        self._epoch = torch.zeros((rows, self.folds), dtype=torch.int64, device="cpu")
        self._trained = self._epoch.clone()
        self._status = [["done"] * self.folds for _ in range(rows)]
        self._history: dict[str, list[Tensor]] = {name: [] for name in ("loss", "train_loss", "score")}
        self.blocks = [block for group in grouped(self.configs, static) for block in self._begin(*group, chunk_size)]

    # Members

    def _begin(self, shared: Config, rows: list[int], chunk_size: int | None) -> list[Block]:
        """The blocks of a group, from its configurations."""
        varying = [name for name in self.configs[0] if name not in shared]
        columns = {name: self._column([self.configs[k][name] for k in rows]) for name in varying}
        takes = self._check(shared, columns, rows)
        if self._compile and self.model.not_compiled:
            self._compile = False
            names = ", ".join(self.model.not_compiled)
            say_once(f"sweep runs without a compiler, with equal results: there {names} would draw other numbers")
        count = math.ceil(len(rows) / min(chunk_size or len(rows), len(rows)))
        group = self._group(shared, math.ceil(len(rows) / count), takes)
        seeds = torch.tensor([self._seeds[k % len(self._seeds)] for k in rows], dtype=torch.int64, device="cpu")
        index = torch.tensor(rows, device=self.device)
        params, buffers = (tree_map(lambda w: w[index], tree) for tree in (self.params, self.buffers))
        blocks = []
        for start in range(0, len(rows), group.size):
            places = list(range(start, min(start + group.size, len(rows))))
            trees = ({name: h.to(self.device) for name, h in {**columns, "seed": seeds}.items()}, params, buffers)
            hyper, own, its = _at(trees, self._filled(places, group))
            state = tree_map(torch.clone, group.init(hyper, own))  # What all begin with alike comes back expanded.
            blocks.append(self._block(group, [rows[k] for k in places], (hyper, own, its, state)))
        return blocks

    def _column(self, values: list[Any]) -> Tensor:
        whole = all(isinstance(value, int) for value in values)
        return torch.tensor(values, dtype=torch.int64 if whole else self._dtype, device="cpu")

    def _check(self, shared: Config, columns: dict[str, Tensor], rows: list[int]) -> list[str]:
        """Make the transform of each configuration here, where hyperparameters have values, and call the loss once.

        What comes back are the names of the extra arguments that the transforms take.
        """
        takes: list[str] = []
        for place, row in enumerate(rows):
            config = {**shared, **{name: h[place] for name, h in columns.items()}}
            names = ", ".join(columns)
            hint = f"The hyperparameters {names} come as 0-dim tensors; static= names those that have to be numbers of"
            hint = f". {hint} Python"
            try:
                with Uses(config) as uses:
                    tx: Any = self.make(**{name: config[name] for name in self.names.make})
            except ValueError as error:
                hint = hint if "tensor(" in str(error) and "whole number" in str(error) else ""
                raise ValueError(f"with {self.configs[row]}: {error}{hint}") from error
            except TypeError as error:
                if not columns or not ("tensor(" in str(error) or "Tensor" in str(error)):
                    raise
                raise TypeError(f"{error}{hint}") from error
            if not isinstance(tx, Transform):
                name = getattr(self.make, "__name__", "make")
                hint = " Is a return missing?" if tx is None else ""
                raise TypeError(f"{name} returned {tx!r} with {self.configs[row]}; expected a Transform.{hint}")
            takes += [name for name in FOR_ANY if name not in takes and tx.accepts(name)]
            if not place:
                if climbs := uphill(tx, "the factory makes"):
                    warn_user(climbs)
                else:
                    self._tell_unread(tx, config, uses.found)
                tx.init(tree_map(lambda w: w[0], self.model.start[0]))  # Its masks see one member here.
                batch = next(self.splits.batches(0, self.device))
                one = tree_map(lambda x: x[0], batch) if self.folds > 1 else batch
                known = {name: _to(config[name], self.device) for name in self.names.trained}
                self.model.check(known, one)
                if self.splits.valid:
                    held = next(self.splits.validation(0, self.device))[1]
                    self.model.check_validation(known, held)
                    if self.model.score is not None:
                        self.model.check_score(known, held)
                self.model.tell_unused(known)
        return takes

    def _tell_unread(self, tx: Transform, config: Config, used: set[str]) -> None:
        """Warn of hyperparameters that the factory takes, and of which nothing is in what it makes."""
        held = {id(x) for x in held_tensors(tx)}
        given = [name for name in self.names.make if isinstance(config[name], Tensor)]
        unread = [name for name in given if name not in used and id(config[name]) not in held]
        if unread and tells_all(tx):
            warn_user(
                f"the factory makes {tx!r}, in which there is nothing of {listed(unread)}, which the grid has: members "
                "that differ in nothing else are alike. Hand it on, as in lambda lr: fr.adamw(lr), or leave it out."
            )

    def _group(self, shared: Config, size: int, takes: list[str]) -> Group:
        make, model, names = self.make, self.model, self.names

        def transform(hyper: dict[str, Tensor]) -> Transform:
            config = {**shared, **hyper}
            return make(**{name: config[name] for name in names.make})

        def init(hyper: dict[str, Tensor], params: Any) -> Any:
            with Draws(hyper["seed"], torch.full_like(hyper["seed"], -1)):  # For chains that draw their key.
                return transform(hyper).init(params)

        def step(
            params: Any, buffers: Any, state: Any, alive: Tensor | None, hyper: Any, count: Any, batch: Any
        ) -> Any:
            def objective(params: Any) -> tuple[Tensor, Any]:
                with model.drawing(hyper["seed"], count):
                    args, own = model.arguments(params, buffers, batch, True, {**shared, **hyper})
                    return model.value(args, {**shared, **hyper}), own

            grads, (value, changed) = grad_and_value(objective, has_aux=True)(params)
            known = {"value": value, "grad": grads, "value_fn": lambda params: objective(params)[0]}
            extra = {name: known[name] for name in takes}
            updates, after = transform(hyper).update(grads, state, params, **extra)
            new = (apply_updates(params, updates), changed, after)
            if alive is not None:  # A member that is out keeps all it has; nothing is compiled anew for it.
                new = tree_map(lambda a, b: torch.where(alive, a, b), new, (params, buffers, state))
            return (*new, value)

        def measure(params: Any, buffers: Any, hyper: dict[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
            with model.drawing(hyper["seed"], torch.full_like(hyper["seed"], -2)):
                return model.measured(params, buffers, {**shared, **hyper}, batch)

        def together(params: Any, buffers: Any, state: Any, alive: Tensor, *others: Any) -> Any:
            return mapped(params, buffers, state, *others)

        stepping = lambda params, buffers, state, *others: step(params, buffers, state, None, *others)
        mapped = self._over_members(stepping, 3)
        freezing, plain = self._over_members(step, 4), together
        if self._compile:  # One code for all epochs: that which freezes, if members can stop.
            backend = "inductor" if self._compile is True else self._compile
            freezing = plain = _compiled(freezing if self._freezes else plain, backend, takes)
        over_rows = vmap(measure, in_dims=(0, 0, 0, None), randomness="different")
        return Group(freezing, plain, self._over_init(init), over_rows, size)

    def _over_members(self, f: Callable[..., Any], trees: int) -> Callable[..., Any]:
        """Map a function of trees of members, hyperparameters of rows, a count and a batch over rows and folds."""
        if self.folds > 1:
            f = vmap(f, in_dims=(*[0] * trees, None, None, 0), randomness="different")
        return vmap(f, in_dims=(*[0] * trees, 0, None, None), randomness="different")

    def _over_init(self, init: Callable[..., Any]) -> Callable[..., Any]:
        inner = vmap(init, in_dims=(None, 0), randomness="different") if self.folds > 1 else init
        return vmap(inner, randomness="different")

    def _filled(self, places: list[int], group: Group) -> Tensor:
        """Places of rows in a stack; in compiled code the last is repeated up to the size of a block."""
        fill = group.size - len(places) if self._compile else 0
        return torch.tensor(places + places[-1:] * fill, device=self.device)

    def _block(self, group: Group, rows: list[int], trees: tuple[Any, Any, Any, Any]) -> Block:
        hyper, params, buffers, state = trees
        count = len(tree_leaves(params)[0])
        alive = torch.zeros((count, self.folds), dtype=torch.bool, device="cpu")
        alive[: len(rows)] = torch.tensor([[s == "done" for s in self._status[row]] for row in rows], device="cpu")
        return Block(group, rows, hyper, params, buffers, state, self._as_members(alive))

    def _as_members(self, x: Tensor) -> Tensor:
        """Rows by folds, as the trees have them."""
        return (x if self.folds > 1 else x[:, 0]).to(self.device)

    # Training

    @torch.no_grad()
    def epoch(self, epoch: int, order: torch.Generator) -> None:
        """Train all members for an epoch, measure them, and take those out that stop."""
        rows = len(self.configs)
        nothing = torch.full((rows, self.folds), math.nan, dtype=torch.float64, device="cpu")
        now = {name: nothing.clone() for name in self._history}
        seed = int(torch.randint(2**62, (), generator=order, device="cpu"))
        for block in self.blocks:
            train_loss = self._train(block, epoch, seed)
            now["train_loss"][block.rows] = train_loss
            loss, score = self._measure(block) if self.splits.valid else (train_loss, train_loss)
            now["loss"][block.rows], now["score"][block.rows] = loss, score
        for name, values in now.items():
            out = torch.tensor([[s != "done" for s in each] for each in self._status], device="cpu")
            self._history[name].append(values.masked_fill(out, math.nan))
        self._keep(epoch)
        self._stop(epoch)
        self._restack()

    def _train(self, block: Block, epoch: int, seed: int) -> Tensor:
        """An epoch of a block, and its mean losses."""
        steps = torch.tensor(self.splits.steps, device=self.device)
        count = torch.full((), epoch << 32, dtype=torch.int64, device=self.device)  # However many steps others have.
        everyone = bool(block.alive.all())
        total = torch.zeros((), device=self.device)
        for k, batch in enumerate(self.splits.batches(seed, self.device)):
            going = k < steps if self._uneven else None
            waits = self._uneven and k >= min(self.splits.steps)
            alive = block.alive & going if waits and going is not None else block.alive
            step = block.group.plain if everyone and not waits else block.group.step
            *trees, value = step(block.params, block.buffers, block.state, alive, block.hyper, count, batch)
            block.params, block.buffers, block.state = trees
            total = total + (value if going is None else torch.where(going, value, 0))
            count = count + 1
        return self._as_rows(total / (steps if self.folds > 1 else steps[0]), block)

    def _as_rows(self, values: Tensor, block: Block) -> Tensor:
        """Values of the members of a block on the CPU, rows by folds."""
        return values.reshape(-1, self.folds)[: len(block.rows)].to("cpu", torch.float64)

    def _measure(self, block: Block) -> tuple[Tensor, Tensor]:
        """Losses and scores on validation rows."""
        columns = []
        for fold in range(self.folds):
            trees: Any = (block.params, block.buffers)
            if self.folds > 1:
                trees = tree_map(lambda w, fold=fold: w[:, fold], trees)
            columns.append(self._of_fold(block, trees, fold))
        loss, score = (torch.stack(list(each), 1) for each in zip(*columns, strict=True))
        return self._as_rows(loss, block), self._as_rows(score, block)

    def _of_fold(self, block: Block, trees: Any, fold: int) -> tuple[Tensor, Tensor]:
        """Losses and scores of the members of a block on the validation rows of a fold."""
        mapped = self.model.maps_score
        losses, found, batches = [], [], []
        for share, batch in self.splits.validation(fold, self.device):
            loss, other = block.group.measure(*trees, block.hyper, batch)
            losses.append(share * loss)
            found.append(share * other if mapped else other)
            batches += [] if mapped else [batch]
        score = torch.stack(found).sum(0) if mapped else self.model.scores(trees[0], found, batches)
        return torch.stack(losses).sum(0), score

    def _values(self, epoch: int = -1) -> Tensor:
        """What is minimized at an epoch."""
        return self._history["loss"][epoch] if self.model.score is None else -self._history["score"][epoch]

    def _keep(self, epoch: int) -> None:
        """Keep the parameters of members that are in training, or with patience, that have improved."""
        value = self._values()
        finite = value.isfinite() & self._history["train_loss"][-1].isfinite()
        loss = self._history["loss"][-1]  # It decides between equal scores.
        better = (value < self._best) | ((value == self._best) & (loss < self._loss))
        keep = finite & better if self._patience else finite
        self._best, self._loss = torch.where(keep, value, self._best), torch.where(keep, loss, self._loss)
        self._epoch = torch.where(keep, epoch + 1, self._epoch)
        for block in self.blocks:
            index = torch.tensor(block.rows, device=self.device)
            mask = self._as_members(keep[block.rows])
            for kept, new in ((self.params, block.params), (self.buffers, block.buffers)):
                for old, w in zip(tree_leaves(kept), tree_leaves(new), strict=True):
                    where = mask.reshape(*mask.shape, *[1] * (w.ndim - mask.ndim))
                    old[index] = torch.where(where, w[: len(index)], old[index])
        for row, each in enumerate(self._status):
            for fold, status in enumerate(each):
                if status == "done":
                    self._trained[row, fold] = epoch + 1
                    if not finite[row, fold]:
                        each[fold] = "diverged"

    def _stop(self, epoch: int) -> None:
        """Mark members that have not improved for long, and at a rung, all but the best rows."""
        last = epoch + 1
        for row, each in enumerate(self._status):
            for fold, status in enumerate(each):
                if self._patience and status == "done" and last - int(self._epoch[row, fold]) >= self._patience:
                    each[fold] = "stopped"
        if last in self._rungs:
            # Stopped members compete with their best; what diverged or was dropped before is out.
            racing = [k for k, each in enumerate(self._status) if not {"dropped", "diverged"} & set(each)]
            racing.sort(key=lambda k: float(self._best[k].mean()))
            for row in racing[self._rungs[last] :]:
                self._status[row] = ["dropped"] * self.folds

    def _restack(self) -> None:
        """Blocks of what goes on, without the rows that are out, if that saves work."""
        groups = {id(block.group): block.group for block in self.blocks}
        blocks: list[Block] = []
        for group in groups.values():
            own = [block for block in self.blocks if block.group is group]
            going = [(b, k) for b, block in enumerate(own) for k, row in enumerate(block.rows) if self._goes_on(row)]
            everything = sum(len(block.rows) for block in own)
            needed = math.ceil(len(going) / group.size)
            saves = needed < len(own) if self._compile else len(going) <= (1 - _SPARSE) * everything
            blocks += self._stacked(group, own, going) if saves else [self._again(block) for block in own]
        self.blocks = blocks

    def _goes_on(self, row: int) -> bool:
        return "done" in self._status[row]

    def _again(self, block: Block) -> Block:
        return self._block(block.group, block.rows, (block.hyper, block.params, block.buffers, block.state))

    def _stacked(self, group: Group, own: list[Block], going: list[tuple[int, int]]) -> list[Block]:
        """New blocks of some rows of old ones."""
        if not going:
            return []
        sizes = [len(tree_leaves(block.params)[0]) for block in own]
        trees = [(block.hyper, block.params, block.buffers, block.state) for block in own]
        whole = tree_map(lambda *leaves: torch.cat(leaves), *trees)
        places = [sum(sizes[:b]) + k for b, k in going]
        rows = [own[b].rows[k] for b, k in going]
        size = group.size if self._compile else math.ceil(len(rows) / math.ceil(len(rows) / group.size))
        return [
            self._block(group, rows[k : k + size], _at(whole, self._filled(places[k : k + size], group)))
            for k in range(0, len(rows), size)
        ]

    # What came of it

    def summary(self, epoch: int) -> dict[str, Any]:
        """What progress tells after an epoch."""
        going = sum(each.count("done") for each in self._status)
        best = float(self._best.mean(1).min())
        told = {"loss": best} if self.model.score is None else {"score": -best}
        return {"epoch": epoch + 1, "epochs": self.epochs, "members": going, **told}

    def history(self) -> dict[str, Tensor]:
        """The measurements of all epochs."""
        names = ["loss", "train_loss"] + ["score"] * (self.model.score is not None)
        found = {name: torch.stack(self._history[name]) for name in names}
        return found if self.folds > 1 else {name: x[..., 0] for name, x in found.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each row, with numbers of Python."""
        seeds = self.model.seeds
        at = (self._epoch - 1).clamp(min=0).unsqueeze(0)
        kept = {name: torch.stack(x).gather(0, at)[0] for name, x in self._history.items() if x}
        rows = []
        for k, config in enumerate(self.configs):
            row: dict[str, Any] = {**config, "seed": seeds[k % len(seeds)]}
            for name in ("loss", "score") if self.model.score is not None else ("loss",):
                row[name] = float(kept[name][k].mean())
                if self.folds > 1:
                    row[f"{name}_std"] = float(kept[name][k].std(correction=0))
            row["train_loss"] = float(kept["train_loss"][k].mean())
            row["epoch"], row["epochs"] = int(self._epoch[k].max()), int(self._trained[k].max())
            order = ("diverged", "dropped", "done", "stopped")
            row["status"] = next(status for status in order if status in self._status[k])
            if self.folds > 1:
                row["folds"] = kept["loss"][k].tolist()
            rows.append(row)
        return rows


def _compiled(step: Callable[..., Any], backend: str | Callable[..., Any], takes: list[str]) -> Callable[..., Any]:
    """A step compiled, or as it is where that takes too long or does not work."""
    if "value_fn" in takes:
        say_once(
            "sweep runs chains that take value_fn, as line searches do, without a compiler, with equal results: it "
            "would compile the loss once for each trial, for minutes"
        )
        return step

    def call_step(*args: Any) -> Any:
        return step(*args)

    # Torch compiles one code some eight times at most, and all that vmap makes have one: so each group has its own.
    own = types.FunctionType(call_step.__code__.replace(), globals(), "step", None, call_step.__closure__)
    chosen = compiled = torch.compile(own, fullgraph=True, backend=backend)

    def call(*args: Any) -> Any:
        nonlocal chosen
        try:
            return chosen(*args)
        except Exception as error:
            if chosen is not compiled:
                raise
            found = step(*args)  # Or the error of the step itself.
            chosen = step
            say_once(f"sweep runs without a compiler, with equal results: {' '.join(str(error).split())[:300]}")
            return found

    return call


def _rungs(rows: int, epochs: int, halving: int) -> dict[int, int]:
    """From the number of epochs done to the number of rows that go on."""
    found: dict[int, int] = {}
    for k in range(int(math.log(rows, halving) + 1e-9), 0, -1):
        rows = math.ceil(rows / halving)
        found[max(1, math.ceil(epochs / halving**k))] = rows
    return {at: left for at, left in found.items() if at < epochs}


def _at(trees: Any, places: Tensor) -> Any:
    return tree_map(lambda w: w[places], trees)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
