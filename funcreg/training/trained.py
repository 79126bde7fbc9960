"""What a sweep trains, a module or a tree of parameters as one function, and on which rows of which data."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.overrides import TorchFunctionMode

from funcreg.core.checks import check_params
from funcreg.core.grids import Config, Split, attributes
from funcreg.core.inputs import NO_NUMBERS, as_data, first_line, misfit
from funcreg.core.masks import listed
from funcreg.core.notices import warn_user
from funcreg.core.ranges import number
from funcreg.core.tree import tree_leaves, tree_map
from funcreg.core.undocumented import CALLS_COMPILED, DRAWS_AGAIN, dispatch_mode, raised_in
from funcreg.core.wording import type_of
from funcreg.networks.copies import copied
from funcreg.training.draws import Draws
from funcreg.transforms.ensemble import seeded, stack, whole_seeds


class Uses(TorchFunctionMode):
    """A context that tells which of some tensors any function of torch takes."""

    def __init__(self, tensors: Config) -> None:
        super().__init__()
        self._names = {id(x): name for name, x in tensors.items() if isinstance(x, Tensor)}
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._look((args, kwargs))
        return func(*args, **(kwargs or {}))

    def _look(self, x: Any) -> None:
        if isinstance(x, (tuple, list, dict)):
            for each in x.values() if isinstance(x, dict) else x:
                self._look(each)
        elif id(x) in self._names:
            self.found.add(self._names[id(x)])


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
        for name, given in (("loss", loss), ("score", score)):
            if isinstance(given, type) and issubclass(given, nn.Module):
                raise TypeError(f"{name} is the class {given.__name__}; expected what it makes, {given.__name__}()")
        self.loss, self.score, self.hyper = loss, score, hyper
        self.maps_score = True  # Whether it is called by vmap, or for one member after the other.
        self.seeds = whole_seeds(seeds)
        self._draws = False  # Whether it draws random numbers.
        self.not_compiled: list[str] = []  # Functions by which it draws others in compiled code.
        self._used: set[str] = set()  # Which hyperparameters any operation takes.
        self._warned = False
        self._by_gradient = False  # Whether modules are measured as they are trained, with a map of the derivative.
        self._training: nn.Module | None = None
        drawn = callable(source) and not isinstance(source, nn.Module)
        if drawn:
            _check_needs_nothing(source)
        if not drawn and len(self.seeds) > 1:
            raise ValueError(
                f"seeds is {seeds!r}, and all members begin with the weights that were given; expected a function that "
                "makes them, as in lambda: Sequential(...)"
            )
        self.names = Split((), ())  # Which hyperparameters go where,
        self._places: list[tuple[str, str, str]] = []  # and to which attribute of which layer.
        members: list[Any] = [seeded(source, each) for each in self.seeds] if drawn else [source]
        if isinstance(members[0], nn.Module):
            trees: list[Any] = [self._opened(member, drawn) for member in members]
            self._keep(members[0])
        else:
            trees = [(member, {}) for member in members]
        check_params(trees[0][0], "model")
        self.start = stack(trees)

    def __getstate__(self) -> dict[str, Any]:
        """Without its functions: what came of a sweep does not call them, and no file holds those without a name."""
        return {**vars(self), "loss": None, "score": None}

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
        self._training, self._evaluating = (copied(module) for _ in range(2))
        if not module.training:  # Else layers that were put into another mode stay in it.
            self._training.train()
        self._evaluating.eval()
        first: dict[int, str] = {}
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        self._names = {name: first.setdefault(id(w), name) for name, w in named}  # Tied ones have one name.

    @property
    def module(self) -> nn.Module | None:
        """A copy of the module that is trained; None of a tree."""
        return self._training

    def give(self, names: Split) -> None:
        """Say which hyperparameters the loss and the module get, before any call of them."""
        self.names = names
        if self._training is not None:
            self._places = [(name, *at) for name in names.attributes for at in attributes(self._training, name)]
            first: dict[tuple[str, str], str] = {}
            for name, *at in self._places:
                if first.setdefault((at[0], at[1]), name) != name:
                    raise ValueError(
                        f"the grid has {first[at[0], at[1]]!r} and {name!r}, which are both "
                        f"'{'.'.join(filter(None, at))}' of the module; expected one of them, or globs that match apart"
                    )

    def value(self, args: tuple[Any, ...], hyper: Config) -> Any:
        """The loss of what it is called with."""
        return self.loss(*args, **{name: hyper[name] for name in self.names.loss})

    def _called(self, module: nn.Module, own: Any, args: Any, kwargs: Any, hyper: Config) -> Any:
        """The outputs of a module whose forward, or whose layers, have hyperparameters of one member."""
        kwargs = {**kwargs, **{name: hyper[name] for name in self.names.forward}}
        places = [(module.get_submodule(path), key, hyper[name]) for name, path, key in self._places]
        before = [getattr(layer, key) for layer, key, _ in places]
        for layer, key, x in places:
            setattr(layer, key, x)
        try:
            return functional_call(module, own, args, kwargs)
        finally:
            for (layer, key, _), x in zip(places, before, strict=True):
                setattr(layer, key, x)

    def arguments(
        self, params: Any, buffers: Any, batch: Any, train: bool, hyper: Config
    ) -> tuple[tuple[Any, ...], Any]:
        """What the loss is called with, and the buffers after a forward pass, which changes copies of them."""
        module = self._training if train else self._evaluating if self._training is not None else None
        if module is None:
            return (params, *batch), buffers
        inputs, *targets = batch
        own = {**params, **{name: b.clone() for name, b in buffers.items()}}
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        args = args if isinstance(args, tuple) else (args,)
        if train or not self._by_gradient:
            outputs = self._called(module, own, args, kwargs, hyper)
        else:
            call = lambda params: self._called(module, {**own, **params}, args, kwargs, hyper)
            outputs = vjp(call, params)[0]
        return (outputs, *targets), {name: own[name] for name in buffers}

    def drawing(self, seed: Tensor, step: Tensor) -> AbstractContextManager[Any]:
        """A context in which a member draws the random numbers of its seed; none where none are drawn."""
        return Draws(seed, step) if self._draws else nullcontext()

    def measured(self, params: Any, buffers: Any, hyper: Config, batch: Any) -> tuple[Tensor, Any]:
        """Loss and score on validation rows; instead of a score that no map takes, the outputs of a module.

        Where there is no score, the loss stands in its place.
        """
        args, _ = self.arguments(params, buffers, batch, False, hyper)
        value = self.value(args, hyper)
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
        value = self._tried(
            lambda: self.arguments(params, buffers, batch, True, hyper)[0], hyper, params, batch, "data"
        )
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            came = f"of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"loss returned {came}; expected a scalar, the mean over the rows of a batch")

        def slope(params: Any, buffers: Any, hyper: Config) -> Any:
            value = lambda params: self.value(self.arguments(params, buffers, batch, True, hyper)[0], hyper)
            return grad(value)(params)

        try:
            self._mapped(slope, hyper)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(_under_vmap(error, hyper, self._training)) from error

    def check_validation(self, hyper: Config, batch: Any) -> None:
        """Call the loss on rows that are held out, for one member and by `vmap`, and find out how they are measured."""
        params, buffers = (tree_map(lambda w: w[0], tree) for tree in self.start)
        self._tried(lambda: self.arguments(params, buffers, batch, False, hyper)[0], hyper, params, batch, "validation")

        def one(params: Any, buffers: Any, hyper: Config) -> Tensor:
            return self.value(self.arguments(params, buffers, batch, False, hyper)[0], hyper)

        try:
            self._mapped(one, hyper)
        except (RuntimeError, TypeError, ValueError):
            # Torch maps recurrent layers, and perhaps others, only where a derivative is to be taken.
            self._by_gradient = True
            try:
                self._mapped(one, hyper)
            except (RuntimeError, TypeError, ValueError) as error:
                raise TypeError(_under_vmap(error, hyper, self._training)) from error

    def tell_unused(self, hyper: Config) -> None:
        """Warn of hyperparameters that came in tensors, and that nothing took in the calls for one member."""
        unused = [name for name, x in hyper.items() if isinstance(x, Tensor) and name not in self._used]
        if unused:
            warn_user(
                f"no operation of the loss{'' if self._training is None else ' or the module'} takes {listed(unused)}, "
                "which the grid has: members that differ in nothing else are alike. Is it an attribute that forward "
                "does not read, such as one from which the module was built?"
            )

    def _tried(
        self, arguments: Callable[[], tuple[Any, ...]], hyper: Config, params: Any, batch: Any, name: str
    ) -> Any:
        """The loss of one member, or an error that says why there is none; and whether it draws random numbers."""
        rows = "a batch" if name == "data" else "rows of validation"
        device = tree_leaves(params)[0].device
        before, zero = _generators(device), torch.zeros((), dtype=torch.int64, device=device)
        with Draws(zero, zero) as draws, Uses(hyper) as uses:
            try:
                args = arguments()
            except (RuntimeError, TypeError) as error:
                cause = misfit(error, {"the parameters": params, name: batch})
                if not cause and name == "data":
                    raise
                raise TypeError(f"the module failed on {rows}: {first_line(error)}. {cause}".rstrip()) from error
            if self._training is not None:
                _check_rows_meet(self.loss, args, rows)
            try:
                value = self.value(args, hyper)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                cause = misfit(error, {"argument": args}, self.loss)
                kind = ValueError if isinstance(error, (ValueError, IndexError)) else TypeError
                raise kind(
                    f"the loss failed on {rows}: {first_line(error)}. It was given {_shapes(args)}. {cause}".rstrip()
                ) from error
        self._draws |= draws.calls > 0
        self._used |= uses.found
        self.not_compiled = list(dict.fromkeys([*self.not_compiled, *draws.not_compiled()]))
        again = lambda: self.value(arguments(), hyper)
        drawn = not all(map(torch.equal, _generators(device), before))
        if not self._warned and (draws.by_generators or (drawn and _draws_here(again, zero))):
            self._warned = True
            warn_user(
                "the model draws random numbers in a way that does not follow the seeds of members, as recurrent "
                "layers with dropout and generators of its own do: members draw different ones, which also depend on "
                "which others are trained. What rand, randn, bernoulli and dropout draw does follow them."
            )
        return value

    def _mapped(self, function: Callable[..., Any], hyper: Config) -> Any:
        """A function of parameters, buffers and hyperparameters for the members of all seeds, by `vmap`."""
        count, numbers = len(self.seeds), {name: h for name, h in hyper.items() if isinstance(h, Tensor)}

        def member(params: Any, buffers: Any, seed: Tensor, numbers: Config) -> Any:
            with self.drawing(seed, torch.zeros_like(seed)):
                return function(params, buffers, {**hyper, **numbers})

        seeds = torch.tensor(self.seeds, device=tree_leaves(self.start[0])[0].device)
        many = tree_map(lambda h: h.expand(count, *h.shape), numbers)
        params, buffers = self.start
        return seeded(lambda: vmap(member, randomness="different")(params, buffers, seeds, many), 0)

    def check_score(self, hyper: Config, batch: Any) -> None:
        """Call the score by `vmap` or, if it reads numbers from tensors, for one member, and see what it returns."""

        def one(params: Any, buffers: Any, hyper: Config) -> Tensor:
            return torch.as_tensor(self.score(*self.arguments(params, buffers, batch, False, hyper)[0]))  # pyright: ignore[reportOptionalCall]  # There is one.

        try:
            shape = self._mapped(one, hyper).shape[1:]
        except Exception:  # Whatever a library raises for a tensor without numbers; another cause is raised below anew.
            self.maps_score = False
            params, buffers = (tree_map(lambda w: w[0], tree) for tree in self.start)
            args, _ = seeded(lambda: self.arguments(params, buffers, batch, False, hyper), 0)
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


def _draws_here(call: Callable[[], Any], key: Tensor) -> bool:
    """Whether it was a call that has drawn from torch's generators, and not another thread.

    Operations of other libraries do not say whether they draw.
    """
    found = []

    class Watching(dispatch_mode()):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if torch.Tag.nondeterministic_seeded in func.tags or func.namespace not in ("aten", "prims"):
                found.append(func)
            return func(*args, **(kwargs or {}))

    with Draws(key, key), Watching():
        call()
    return bool(found)


def _generators(device: torch.device) -> list[Tensor]:
    """The states of torch's generators."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


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
    def steps(self) -> list[int]:
        """Batches in an epoch of each fold."""
        return [len(rows) // self.batch_size for rows in self.train]

    def batches(self, seed: int, device: torch.device) -> Iterator[Any]:
        """The batches of an epoch; of folds, each has one for every fold along the first dimension.

        A fold whose epoch is over begins again, until that of the greatest is.
        """
        shuffled = [rows[_shuffle(len(rows), seed)].split(self.batch_size) for rows in self.train]
        for k in range(max(self.steps)):
            rows = torch.stack([each[k % n] for each, n in zip(shuffled, self.steps, strict=True)])
            yield taken(self.data, rows if len(self.train) > 1 else rows[0], device)

    def validation(self, fold: int, device: torch.device) -> Iterator[tuple[float, Any]]:
        """The validation rows of a fold in pieces, each with its share of them."""
        rows = self.valid[fold]
        for piece in rows.split(max(self.batch_size, 1024)):
            yield len(piece) / len(rows), taken(self.valid_data, piece, device)


def _shuffle(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")


def make_splits(
    data: Any, validation: Any, folds: int | Iterable[Any] | None, batch_size: int, seed: int, params: Any
) -> Splits:
    """Rows for training and for validation, by one share, other data, or folds."""
    count = len(tree_leaves(data)[0])
    shuffled = _shuffle(count, seed)
    other, valid, validation = data, [], number(validation)
    if folds is not None:
        if validation is not None:
            raise ValueError(
                "validation and folds came together; expected one: folds hold validation rows of their own out"
            )
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
    sizes = [len(rows) for rows in train]
    size = min(batch_size, *sizes)
    if not size or any(not len(rows) for rows in valid):
        raise ValueError(f"data of {count} rows leave none for training or validation")
    if size < batch_size and max(sizes) > size + 1:
        warn_user(
            f"batch_size is {batch_size}, and the smallest fold has {size} rows for training: batches of all folds are "
            f"of {size}"
        )
    return Splits(data, other, train, valid, size)


def _folds(shuffled: Tensor, folds: Any) -> tuple[list[Tensor], list[Tensor]]:
    count = len(shuffled)
    folds = number(folds)
    if isinstance(folds, int):
        if isinstance(folds, bool) or not 2 <= folds <= count:
            raise ValueError(f"folds is {folds!r}; expected a number from 2 to that of the rows, {count}")
        valid = list(shuffled.tensor_split(folds))
        return [torch.cat([*valid[:k], *valid[k + 1 :]]) for k in range(folds)], valid
    if isinstance(folds, str) or not isinstance(folds, Iterable):
        raise TypeError(
            f"folds is {folds!r}; expected a number, or pairs of row indices, (for training, for validation), as "
            "list(KFold(5).split(x)) has them"
        )
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


def _under_vmap(error: Exception, hyper: Config, module: nn.Module | None) -> str:
    """Why what runs for one member does not run for all."""
    layers = () if module is None else module.named_modules()
    counting = [f"'{name}'" for name, layer in layers if getattr(layer, "momentum", 0.0) is None]
    if counting and "calling .item()" in str(error):
        return (
            f"{listed(counting)} has momentum=None, for which a layer reads its count of batches as a number, as "
            "nothing can under vmap; expected a momentum, such as 0.1"
        )
    names = ", ".join(name for name, h in hyper.items() if isinstance(h, Tensor))
    taker = "loss takes" if module is None else "loss or the module takes"
    hint = f" The {taker} {names} as 0-dim tensors; static= names those that have to be numbers of Python."
    said = "" if "calling .item()" in str(error) else f": {first_line(error)}"  # What follows says that better.
    if raised_in(error, CALLS_COMPILED):
        return (
            f"model and loss run for one member, but not for all at once under vmap{said}. A function in them was made "
            "by torch.compile; give the plain one. compile=True compiles the whole step of all members"
        )
    if raised_in(error, DRAWS_AGAIN):
        return (
            "model and loss run for one member, but not for all at once under vmap: nn.init.trunc_normal_ draws again "
            "until all numbers lie within the bounds. Numbers within two deviations, with one draw, are "
            "math.sqrt(2) * torch.erfinv(0.9545 * (2 * torch.rand_like(w) - 1)) times the deviation"
        )
    if "random" in said:
        return (
            f"model and loss run for one member, but not for all at once under vmap{said}. Each member draws its own: "
            "by torch.rand, randn, rand_like, randn_like or bernoulli, without out= and a generator, or in place into "
            "what torch.empty, empty_like or x.new_empty has made there"
        )
    return (
        f"model and loss run for one member, but not for all at once under vmap{said}. {NO_NUMBERS}{hint * bool(names)}"
    )


def _check_needs_nothing(source: Callable[..., Any]) -> None:
    """Raise a TypeError for a function that makes modules, if it cannot be called without arguments."""
    try:
        signature = inspect.signature(source)
    except (TypeError, ValueError):  # Some functions that are not written in Python have none.
        return
    try:
        signature.bind()
    except TypeError as error:
        raise TypeError(
            f"model is {getattr(source, '__name__', 'a function')}{signature}; expected a module, or a function "
            f"without arguments that makes one: {error}. Widths and depths make parameters of other shapes, "
            "which have no stack: call sweep once for each, as with lambda: make(width)."
        ) from error


def _check_rows_meet(loss: Any, args: tuple[Any, ...], rows: str) -> None:
    """Raise an error for a loss of torch that would compare the output of each row with the targets of all."""
    kind = loss if isinstance(loss, nn.Module) else getattr(loss, "__module__", None)
    name = type(kind).__module__ if isinstance(kind, nn.Module) else str(kind)
    if not name.startswith("torch.nn") or len(args) < 2:
        return
    outputs, targets = args[:2]
    if not all([isinstance(x, Tensor) and x.is_floating_point() for x in (outputs, targets)]):
        return
    if outputs.ndim != targets.ndim and outputs.numel() == targets.numel():
        raise ValueError(
            f"the loss fails on {rows}: it was given {_shapes(args)}, so that each output would be compared with "
            "the targets of all rows. Give both one shape: targets y.unsqueeze(-1), or a module that ends with "
            "nn.Flatten(0)."
        )


def _shapes(args: tuple[Any, ...]) -> str:
    """What a loss is called with, for an error text."""
    kinds = [f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type_of(x) for x in args]
    return " and ".join(kinds)


def _as_number(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError) as error:
        came = f"shape {tuple(score.shape)}" if hasattr(score, "shape") else repr(score)
        raise ValueError(f"score returned {came}; expected a number, better if higher") from error
