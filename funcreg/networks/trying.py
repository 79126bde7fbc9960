"""Families tried out before they are offered: taken out of a copy, whose forward has to run, and to give the same.

What `remove_dead` and `resized` do is done by their own code, so that what would be refused after training is known
before. Outputs are compared, with and without groups that are set to zero, of a network with weights that are drawn.
Where they are not the same at once, the leaves of families are single numbers at first, expanded to the shapes that are
left, and all other tensors are shared with the network, so that it costs less to find which families are to blame.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from funcreg.core.leafwise import widen
from funcreg.networks.agreement import Agreement, Failure, arguments, draws, outputs, rounding, unequal, unlike
from funcreg.networks.attempts import Attempts
from funcreg.networks.batches import Examples
from funcreg.networks.computing import Computed, Numbers, other_number
from funcreg.networks.copies import running
from funcreg.networks.families import Family, parts, within
from funcreg.networks.refusals import ONE_LEFT, SOME_GONE, Refusal, around, line, named, reason
from funcreg.networks.removal import with_buffers, without
from funcreg.networks.resizing import as_given, narrowed, widened
from funcreg.networks.settling import Problem, Settled, decide, lengths, settle
from funcreg.networks.stored import Stored
from funcreg.networks.variations import other_runs, other_sizes
from funcreg.networks.widths import CONVOLUTIONS, Rule

#: A way to take groups out, and whether outputs are compared, or it only has to run.
_Stage: TypeAlias = tuple[str, bool]
#: Bytes up to which leaves are copied.
_COPIED = 1 << 31
#: How many other sizes inputs have at most.
_SIZES = 4


class Trial:
    """Whether a network runs without groups of its families.

    Args:
        module: The network. It stays as it is.
        inputs: What it is called with.
        families: The families.
        counts: The number of groups of each.
        rules: As `resized` takes them.
        round_to: What numbers of channels stay multiples of.
        inside_heads: Whether features inside heads are among them, from whose number no scale may come.
        multiplied: Whether each family is of channels that are summed over, such as features of queries and keys, which
            may have to be as many as of values.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Any,
        families: Sequence[Family],
        counts: Sequence[int],
        rules: Mapping[type[nn.Module], Rule],
        round_to: int,
        inside_heads: bool = False,
        multiplied: Sequence[bool] = (),
    ) -> None:
        self.module, self.families = module, families
        self._inputs, self._rules = arguments(inputs), rules
        self.counts, self._round_to = counts, round_to
        self._inside_heads, self._sums = inside_heads, inside_heads or any(multiplied)
        self._leaves = with_buffers(module)
        self._shapes = {name: torch.empty_like(w, device="meta") for name, w in self._leaves.items()}
        self._numbers = {name for family in families for name in family}
        holders = [self.holder(i) for i in range(len(families))]
        self._attempts = Attempts(families, counts, self._leaves, holders, multiplied if inside_heads else ())
        self.least = self._attempts.least  # How many groups of each stay, whatever is dead,
        self.needs_two: dict[int, str] = {}  # and why two of some do.
        self.unsettled: set[tuple[type, str]] = set()  # Types of modules with numbers that outputs may have to tell.
        self.stage: _Stage = ("", False)  # What was tried last.
        self._how = ""  # How many channels are left.
        self._scale: str | None = None  # How a number comes from shapes.
        self.uncompared: str | None = None  # Why outputs were not compared.
        self._settled: dict[str, Settled] = defaultdict(dict)  # By the way in which groups went.
        self._at_once: dict[Any, bool] = {}  # Whether outputs were the same, by what is chosen and what is left.
        self._examples = Examples()
        self._unknown: set[frozenset[int]] = set()  # Families without which numbers are unknown.

    @property
    def failure(self) -> str | None:
        """Why nothing can be tried."""
        return self._reference if isinstance(self._reference, str) else None

    @functools.cached_property
    def _reference(self) -> tuple[list[Tensor], Computed] | str:
        """What the network gives with leaves that are single numbers, and what it computes with, or why it does not.

        Shapes may go by what is in tensors: so of the whole network with such leaves.
        """
        try:
            network = narrowed(self.module, self._tree([], []), {})[0]
            with running(self.module) as ran, self._written_down() as numbers:
                found = self._outputs(network)
        except Exception as error:  # Such as of modules that cannot be copied.
            return f"to be copied: {line(error)}"
        if ran:
            raise ValueError(
                f"a copy of {type(self.module).__name__} runs {named(self.module, ran[-1])} of the module that it is "
                "a copy of, as a smaller one would, too: its code has it by a global name, or in an object that is not "
                "copied. Let each module use what it holds itself"
            )
        return f"{found}" if isinstance(found, Failure) else (found, numbers)

    def problem(self, chosen: Sequence[int], stage: _Stage | None = None) -> Refusal | None:
        """What goes wrong without some of the groups of these families, None if nothing does.

        Args:
            chosen: The numbers of the families.
            stage: What is tried, all if it is None: of many families, which one is to blame is seen where all failed.
        """
        ways, seen = dict(self._attempts.each(chosen)), dict[tuple[int, ...], str]()
        for way, left in ways.items():
            first = seen.setdefault(left, way)
            if stage is None and first == way and self._agrees(way, chosen, left):
                continue
            for compared in (False, True):
                if stage != (way, compared) if stage else first != way or (compared and self._comparable is None):
                    continue
                self.stage, self._scale = (way, compared), None
                self._how = ONE_LEFT if first == "one" else SOME_GONE
                found = self._difference(chosen, left) if compared else self._problem_with(chosen, left)
                if found is not None:
                    return found
        return None

    def agrees(self, chosen: Sequence[int]) -> bool:
        """Whether all is well without some of the groups of these families, found with as few runs as may be."""
        return all(
            self._agrees(way, chosen, left) for way, left in self._attempts.each(chosen)
        )  # None after one that fails.

    def _agrees(self, way: str, chosen: Sequence[int], left: tuple[int, ...]) -> bool:
        """Whether outputs are the same without some groups, of a network with no numbers that nobody knows.

        Both networks run with weights that are drawn, which proves what the other runs of `problem` prove: what gives
        the same has shapes as they are to be, and the whole network is seen to give numbers and to draw none. Where
        weights are drawn in another dtype, the smaller network has to run in its own, too. What is wrong is not asked.
        """
        key = frozenset(zip(chosen, left, strict=True))
        if key not in self._at_once:
            self.stage, self._scale, self._how = (way, True), None, ONE_LEFT if way == "one" else SOME_GONE
            self._at_once[key] = self._agree_at_once(chosen, left)
        return self._at_once[key]

    def _agree_at_once(self, chosen: Sequence[int], left: tuple[int, ...]) -> bool:
        if self._usual is None or vars(self).get("_comparable", self._usual) is not self._usual:
            return False
        if frozenset(chosen) in self._unknown:
            return False
        tree, inputs = self._usual
        try:
            if any([tree[name].dtype != w.dtype for name, w in self._leaves.items()]):
                smaller, unknown = self._narrowed(self._tree(chosen, left))
                if not unknown and isinstance(self._outputs(smaller), Failure):
                    return False
            dead, given = self._dead(chosen, left, tree)
            smaller, unknown = self._narrowed(given)
            if unknown:
                self._unknown.add(frozenset(chosen))
                return False
            whole = narrowed(self.module, dead, {})[0]
            if left == self._attempts.half(chosen):
                return self._alike_on_several(whole, smaller, inputs)
            # What a dimension of one entry is broadcast with shows in a batch of several.
            some = inputs if self._how == ONE_LEFT else self._examples.enough(inputs)
            return self._agreement(whole, smaller, some) is not None
        except Exception:  # `problem` tells what is refused, and what fails.
            return False

    def _alike_on_several(self, whole: nn.Module, smaller: nn.Module, inputs: Any) -> bool:
        """Whether two networks give the same numbers on inputs, and on such of other sizes that the first takes."""
        given, taken = self._agreement(whole, smaller, inputs), 0
        if given is None:
            return False
        for other in vars(self).get("_other_sizes") or other_sizes(inputs):
            with contextlib.suppress(ValueError):  # It may not take it, or fail with groups that are zero.
                found = self._agreement(whole, smaller, self._examples.enough(other))
                if found is None:
                    return False
                self._examples.compare(given, found)
                taken += 1
            if taken == _SIZES:
                break
        return True

    def _agreement(self, whole: nn.Module, smaller: nn.Module, inputs: Any) -> Agreement | None:
        """What a network gives on inputs if the smaller one gives it, too: numbers, none of which are drawn."""
        with self._written_down() as numbers:
            agreement = _quiet(Agreement, whole, inputs)
        if agreement.drew or any([bool(x.isnan().any()) for x in agreement.expected]):
            return None
        with running(self.module) as ran:
            wrong = self._unequal(agreement, smaller, numbers)
        return agreement if wrong is None and not ran else None

    def runs_alike(self, chosen: Sequence[int]) -> bool:
        """Whether the network runs without one group of each of these families."""
        self.stage, self._scale, self._how = ("all but one", False), None, SOME_GONE
        return self._problem_with(chosen, self._attempts.all_but_one(chosen)) is None

    def runs_with_two(self, chosen: Sequence[int], problem: Refusal, stage: _Stage) -> bool:
        """Whether all is well if two groups of each of these families stay, where it is not with one: then they do."""
        if not problem.of_one or any([self.least[i] > 1 for i in chosen]):
            return False
        for i in chosen:
            self.least[i] = 2
        if self.problem(chosen, stage) is None:
            self.needs_two.update(dict.fromkeys(chosen, problem.reason))
            return True
        for i in chosen:
            self.least[i] = 1
        return False

    def _tree(self, chosen: Sequence[int], left: Sequence[int]) -> dict[str, Tensor]:
        """All tensors, with so many groups of these families."""
        families = [self.families[i] for i in chosen]
        shapes = without(self._shapes, families, left, self._round_to) if families else self._shapes
        of = lambda name, w: _number(w, shapes[name].shape) if name in self._numbers else w
        return {name: of(name, w) for name, w in self._leaves.items()}

    def _problem_with(self, chosen: Sequence[int], left: Sequence[int]) -> Refusal | None:
        tree = self._tree(chosen, left)
        try:
            smaller, unknown = self._narrowed(tree)
        except Exception as error:  # Of a rule of the user's, too.
            return self._refusal(f"resized refuses what is left: {line(error)}", self._holder(chosen))
        wrong = settle(smaller, unknown, lambda: self._wrong(smaller), self._settled[self.stage[0]])
        if wrong is None:
            self.unsettled.update([(type(smaller.get_submodule(each.path)), each.attribute) for each in unknown])
            return None
        return self._said(smaller, wrong, unknown, chosen)

    def _wrong(self, smaller: nn.Module) -> Failure | str | None:
        assert not isinstance(self._reference, str)  # Else nothing is tried.
        expected, whole = self._reference
        with self._written_down() as numbers:
            found = self._outputs(smaller)
        wrong = found if isinstance(found, Failure) else unlike(expected, found)
        return wrong or self._other_number(whole, numbers)

    @contextlib.contextmanager
    def _written_down(self) -> Iterator[Computed]:
        """The numbers that a network computes with, if sums over channels are tried out; no mode is on else."""
        with Numbers() if self._sums else contextlib.nullcontext(Numbers()) as seen:
            yield seen.found

    def _other_number(self, whole: Computed, smaller: Computed) -> str | None:
        found = other_number(whole, smaller)
        self._scale = found or self._scale
        return found

    @functools.cached_property
    def _usual(self) -> tuple[dict[str, Tensor], Any] | None:
        """Tensors that are drawn, and inputs for them; None where they are too many to be copied.

        Its own may hide what is wrong: a last layer that begins at zero, a scale of 1e-5, sixteen bits.
        """
        if sum([w.nbytes for w in self._leaves.values() if w.layout == torch.strided]) > _COPIED:
            return None
        drawn = {name: _drawn(self.module, name, w) for name, w in sorted(self._leaves.items())}
        return {name: widen(w) if w.is_floating_point() else w for name, w in drawn.items()}, widened(self._inputs)

    @functools.cached_property
    def _comparable(self) -> tuple[dict[str, Tensor], Any] | None:
        """Tensors and inputs of a network whose outputs tell what shapes do not; None where none do.

        Weights are drawn. Where it does not run with such, they are to have its own dtypes, or to be its own.
        """
        if self._usual is None:
            self.uncompared = "its tensors are large"
            return None
        own = {name: self._usual[0][name].to(w.dtype) for name, w in self._leaves.items()}
        for each in (self._usual, (own, self._inputs), (self._leaves, self._inputs)):
            tree, inputs = each
            network = narrowed(self.module, tree, {})[0]
            first, again = (self._outputs(network, inputs, seed) for seed in (0, 1))
            if isinstance(first, Failure) or isinstance(again, Failure) or not first:
                continue
            if any([bool(x.isnan().any()) for x in first]):
                continue
            if unlike(first, again) or unequal(first, again, rounding(network, inputs)):
                self.uncompared = "they depend on random numbers"
                return None
            return each
        self.uncompared = "they are no numbers"
        return None

    def _difference(self, chosen: Sequence[int], left: Sequence[int]) -> Refusal | None:
        """What goes wrong with outputs, when groups are zero in a network whose outputs can be compared, and gone."""
        assert self._comparable is not None
        tree, inputs = self._comparable
        whole, smaller, unknown = self._both(chosen, left, tree)
        problem = self._compared(whole, smaller, inputs)
        if left == self._attempts.half(chosen):
            problem = self._compared_in_turn(problem, whole, smaller)
        wrong = settle(smaller, unknown, problem, self._settled[self.stage[0]])
        return None if wrong is None else self._said(smaller, wrong, unknown, chosen)

    def _compared_in_turn(self, given: Problem, whole: nn.Module, smaller: nn.Module) -> Problem:
        """What is wrong on the inputs that are given, or on such of other sizes, which may take another branch."""

        @functools.cache
        def several() -> list[tuple[Any, Problem]]:
            found: list[tuple[Any, Problem]] = []
            for inputs in self._other_sizes:
                with contextlib.suppress(ValueError):  # With groups that are zero it may fail.
                    found.append((inputs, self._compared(whole, smaller, inputs)))
            return found

        def problem() -> Failure | str | None:
            wrong = given()
            for inputs, other in several() if wrong is None else ():
                if (found := other()) is not None and not draws(whole, inputs):
                    where = "on inputs of other sizes"
                    said = f"{found.error}, {where}" if isinstance(found, Failure) else f"{where} {found}"
                    return found._replace(error=said) if isinstance(found, Failure) else said
            return wrong

        return problem

    @functools.cached_property
    def _other_sizes(self) -> list[Any]:
        """Inputs of a few other sizes that the network takes, and gives numbers on."""
        assert self._comparable is not None
        tree, inputs = self._comparable
        network = narrowed(self.module, tree, {})[0]
        runs = ((other, self._outputs(network, other)) for other in other_sizes(inputs))
        takes = lambda found: not isinstance(found, Failure) and not any([bool(x.isnan().any()) for x in found])
        return [other for other, _ in itertools.islice(filter(lambda run: takes(run[1]), runs), _SIZES)]

    def untold(self, chosen: Sequence[int]) -> list[tuple[type, str]]:
        """Types of modules with numbers of which outputs do not tell what they are without half of these groups."""
        if not (self.unsettled and chosen and self._comparable):
            return []
        tree, inputs = self._comparable
        whole, smaller, unknown = self._both(chosen, self._attempts.half(chosen), tree)
        problem = self._compared_in_turn(self._compared(whole, smaller, inputs), whole, smaller)
        if settle(smaller, unknown, problem, self._settled["half"]) is not None:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = decide(smaller, unknown, problem, other_runs(whole, inputs, lengths(unknown)))
        return list(dict.fromkeys([(type(smaller.get_submodule(each.path)), each.attribute) for each in found]))

    def _both(
        self, chosen: Sequence[int], left: Sequence[int], tree: dict[str, Tensor]
    ) -> tuple[nn.Module, nn.Module, list[Stored]]:
        """The network with these tensors, with groups that are zero, and without them; and what no rule knows there."""
        dead, given = self._dead(chosen, left, tree)
        return narrowed(self.module, dead, {})[0], *self._narrowed(given)

    def _narrowed(self, tree: dict[str, Tensor]) -> tuple[nn.Module, list[Stored]]:
        return narrowed(self.module, as_given(self.module, tree), self._rules, self._inside_heads)

    def _dead(
        self, chosen: Sequence[int], left: Sequence[int], tree: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """These tensors with groups that are zero, and without them."""
        dead, copied = dict(tree), set[str]()
        for i, count in zip(chosen, left, strict=True):
            alive = torch.arange(self.counts[i], device="cpu") < count
            for name, along in [(name, each) for name, where in self.families[i].items() for each in parts(where)]:
                if along.penalized:
                    # As it lies in memory, for a view of a weight that is computed from it.
                    w = dead[name] if name in copied else dead[name].detach().clone()
                    gone = (~within(alive, w, along)).nonzero()[:, 0]
                    dead[name] = w.index_fill_(along.dim, gone.to(w.device), 0)
                    copied.add(name)
        return dead, without(dead, [self.families[i] for i in chosen], left, self._round_to)

    def _compared(self, whole: nn.Module, smaller: nn.Module, inputs: Any) -> Problem:
        with self._written_down() as numbers:
            agreement = _quiet(Agreement, whole, inputs)
        return lambda: self._unequal(agreement, smaller, numbers)

    def _unequal(self, agreement: Agreement, smaller: nn.Module, whole: Computed) -> Failure | str | None:
        with warnings.catch_warnings(), self._written_down() as numbers:
            warnings.simplefilter("ignore")
            # With one channel left rounding may be a greater share of outputs; what broadcasts makes others of them.
            wrong = agreement.problem(smaller, 1e-3 if self._how == ONE_LEFT else 0.0)
        return wrong if isinstance(wrong, Failure) else self._other_number(whole, numbers) or wrong

    def _outputs(self, network: nn.Module, inputs: Any = None, seed: int = 0) -> list[Tensor] | Failure:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # They were given when the network itself ran.
            args, kwargs = self._inputs if inputs is None else inputs
            return outputs(network, args, kwargs, seed)

    def _refusal(self, why: str, path: str) -> Refusal:
        return Refusal(why, around(self.module, path), self._how == ONE_LEFT)

    def _said(
        self, smaller: nn.Module, wrong: Failure | str, unknown: Sequence[Stored], chosen: Sequence[int]
    ) -> Refusal:
        """What is wrong, the module whose code is to blame, what it holds, and the remedy."""
        holder = around(self.module, self._holder(chosen))
        if self._scale is not None:  # All else that was tried fails, too, in another way.
            return self._refusal(f"in {named(self.module, holder)} {self._scale}", holder)
        path = around(self.module, wrong.path) if isinstance(wrong, Failure) else holder
        run = (lambda: self._outputs(smaller)) if len(chosen) == 1 else None
        return self._refusal(reason(self.module, smaller, wrong, unknown, path, self._how, run), path)

    def holder(self, family: int) -> str:
        """The innermost module with a forward of its own that holds all leaves of a family."""
        path = around(self.module, self._holder([family]))
        while path and isinstance(self.module.get_submodule(path), (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            path = path.rpartition(".")[0]
        return path

    def _holder(self, chosen: Sequence[int]) -> str:
        """The innermost module that holds all leaves of some families."""
        paths = [name.split(".")[:-1] for i in chosen for name in self.families[i]]
        alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        return ".".join([parts[0] for parts in alike])


def _quiet(made: type[Agreement], *args: Any) -> Agreement:
    """What networks give without a warning: those were given when the network itself ran."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made(*args)


def _number(w: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of one number, whatever its shape: 1 for vectors, and what takes a mean for more dimensions."""
    mean = 1 / max(1, math.prod(shape[1:])) if w.is_floating_point() or w.is_complex() else 0
    return w.new_full((), mean).expand(shape)


def _drawn(module: nn.Module, name: str, w: Tensor) -> Tensor:
    """Random numbers of usual size for a parameter; a buffer as it is, and what is frozen at zero beside others.

    They are of the dtype of the parameter, of float32 where that has sixteen bits.
    """
    path, _, own = name.rpartition(".")
    layer = module.get_submodule(path)
    parameter = layer._parameters.get(own)
    if parameter is None or not w.is_floating_point():
        return w
    if not parameter.requires_grad and any([p.requires_grad for p in module.parameters()]) and not bool(w.any()):
        return w
    dtype = torch.promote_types(w.dtype, torch.float32)
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()))
    if w.ndim < 2:
        return (0.5 + torch.rand(w.shape, generator=generator, device="cpu")).to(w.device, dtype)
    takes = w[0].numel() if isinstance(layer, CONVOLUTIONS) else max(w.shape[1:])
    return (torch.randn(w.shape, generator=generator, device="cpu") / max(1, takes) ** 0.5).to(w.device, dtype)
