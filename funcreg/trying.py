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
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from funcreg.agreement import Agreement, Failure, arguments, draws, outputs, rounding, unequal, unlike
from funcreg.batches import Examples
from funcreg.copies import running
from funcreg.families import Family, parts, within
from funcreg.leafwise import widen
from funcreg.masks import listed
from funcreg.removal import with_buffers, without
from funcreg.resizing import as_given, narrowed, widened
from funcreg.settling import Problem, Settled, decide, lengths, settle
from funcreg.stored import Stored, is_count, unknown_counts
from funcreg.variations import other_runs, other_sizes
from funcreg.widths import CONVOLUTIONS, Rule
from funcreg.wording import with_article

#: Functions in the order in which they were called, and the numbers that they were given.
_Computed: TypeAlias = list[tuple[str, tuple[float, ...]]]
#: A way to take groups out, and whether outputs are compared, or it only has to run.
_Stage: TypeAlias = tuple[str, bool]
#: What errors say of the last trial.
_ONE_LEFT, _SOME_GONE = "with one of these channels left", "without some of these channels"
#: Bytes up to which leaves are copied.
_COPIED = 1 << 31
#: How many other sizes inputs have at most.
_SIZES = 4


class Refusal(NamedTuple):
    """What goes wrong without some groups."""

    reason: str
    path: str  # The module whose code is to blame.
    of_one: bool  # Whether one group of each family was left.


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
        self._inside_heads, self._multiplied = inside_heads, multiplied
        self._leaves = with_buffers(module)
        self._shapes = {name: torch.empty_like(w, device="meta") for name, w in self._leaves.items()}
        self._numbers = {name for family in families for name in family}
        self.least = [1] * len(families)  # How many groups of each stay, whatever is dead,
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
    def _reference(self) -> tuple[list[Tensor], _Computed] | str:
        """What the network gives with leaves that are single numbers, and what it computes with, or why it does not.

        Shapes may go by what is in tensors: so of the whole network with such leaves.
        """
        try:
            network = narrowed(self.module, self._tree([], []), {})[0]
            with running(self.module) as ran, self._written_down() as numbers:
                found = self._outputs(network)
        except Exception as error:  # Such as of modules that cannot be copied.
            return f"to be copied: {_line(error)}"
        if ran:
            raise ValueError(
                f"a copy of {type(self.module).__name__} runs {_named(self.module, ran[-1])} of the module that it is "
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
        ways, seen = dict(self._left(chosen)), dict[tuple[int, ...], str]()
        for way, left in ways.items():
            first = seen.setdefault(left, way)
            if stage is None and first == way and self._agrees(way, chosen, left):
                continue
            for compared in (False, True):
                if stage != (way, compared) if stage else first != way or (compared and self._comparable is None):
                    continue
                self.stage, self._scale = (way, compared), None
                self._how = _ONE_LEFT if first == "one" else _SOME_GONE
                found = self._difference(chosen, left) if compared else self._problem_with(chosen, left)
                if found is not None:
                    return found
        return None

    def agrees(self, chosen: Sequence[int]) -> bool:
        """Whether all is well without some of the groups of these families, found with as few runs as may be."""
        return all(self._agrees(way, chosen, left) for way, left in self._left(chosen))  # None after one that fails.

    def _agrees(self, way: str, chosen: Sequence[int], left: tuple[int, ...]) -> bool:
        """Whether outputs are the same without some groups, of a network with no numbers that nobody knows.

        Both networks run with weights that are drawn, which proves what the other runs of `problem` prove: what gives
        the same has shapes as they are to be, and the whole network is seen to give numbers and to draw none. Where
        weights are drawn in another dtype, the smaller network has to run in its own, too. What is wrong is not asked.
        """
        key = frozenset(zip(chosen, left, strict=True))
        if key not in self._at_once:
            self.stage, self._scale, self._how = (way, True), None, _ONE_LEFT if way == "one" else _SOME_GONE
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
            if left == self._allowed(chosen, self._about_half(chosen)):
                return self._alike_on_several(whole, smaller, inputs)
            # What a dimension of one entry is broadcast with shows in a batch of several.
            some = inputs if self._how == _ONE_LEFT else self._examples.enough(inputs)
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
        self.stage, self._scale, self._how = ("all but one", False), None, _SOME_GONE
        return self._problem_with(chosen, self._allowed(chosen, [max(1, self.counts[i] - 1) for i in chosen])) is None

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

    def _left(self, chosen: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Ways to take groups out, by their names, with how many of each family stay."""
        yield "half", self._allowed(chosen, self._about_half(chosen))
        yield "all but a few", self._allowed(chosen, [self._most(i) for i in chosen])
        if self._inside_heads and any([self._multiplied[i] for i in chosen]):
            # Less of queries and keys alone, which the same number of all would hide to be wrong.
            half = [n - n // 2 if self._multiplied[i] else n for i in chosen for n in [self.counts[i]]]
            yield "half of queries", self._allowed(chosen, half)
        # As few as may be left, too: a dimension of one entry is another thing to squeeze and to broadcasting.
        yield "one", self._allowed(chosen, [self.least[i] for i in chosen])

    def _allowed(self, chosen: Sequence[int], left: Sequence[int]) -> tuple[int, ...]:
        """How many groups of each family stay, more of the hidden units that a recurrent layer has projections of."""
        found = {i: min(self.counts[i], max(n, self.least[i])) for i, n in zip(chosen, left, strict=True)}
        for units, projections in self._projected:
            if units in found:
                found[units] = min(self.counts[units], max(found[units], 1 + found.get(*projections)))
        return tuple(found.values())

    @functools.cached_property
    def _projected(self) -> list[tuple[int, tuple[int, int]]]:
        """Families of hidden units, with that of their projections, and how many these are."""
        several: list[tuple[int, tuple[int, int]]] = []
        for name, w in self._leaves.items():
            if name.rpartition(".")[2] == "weight_hr_l0":
                dims = {parts(family[name])[0].dim: i for i, family in enumerate(self.families) if name in family}
                several += [(dims[1], (dims.get(0, -1), len(w)))] if 1 in dims else []
        return several

    def _about_half(self, chosen: Sequence[int]) -> tuple[int, ...]:
        """A half of the groups of each family, of some less, so that layers come to differ in width."""
        # Those that are next to each other differ for every second i, and each second and each third of them, too.
        counts = [(self.counts[i], (i + i // 2) % 2) for i in chosen]
        return tuple([max(1, n - n // 2 - (less if n > 3 else 0)) for n, less in counts])

    def _most(self, family: int) -> int:
        """All groups of a family but one, or a few, so that families of one module differ: one number may count all."""
        n, i = self.counts[family], self._places[family]
        return n - 1 - i % (n - 1) if n > 2 else max(1, n - 1 + i % 2)

    @functools.cached_property
    def _places(self) -> list[int]:
        """The place of each family among those with as many groups in its module."""
        kinds = [(self.holder(i), n) for i, n in enumerate(self.counts)]
        return [kinds[:i].count(kind) for i, kind in enumerate(kinds)]

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
            return self._refusal(f"resized refuses what is left: {_line(error)}", self._holder(chosen))
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
    def _written_down(self) -> Iterator[_Computed]:
        """The numbers that a network computes with, if sums over channels are tried out; no mode is on else."""
        with _Numbers() if self._inside_heads or any(self._multiplied) else contextlib.nullcontext(_Numbers()) as seen:
            yield seen.found

    def _other_number(self, whole: _Computed, smaller: _Computed) -> str | None:
        """The first of the numbers that a smaller network computes with which the whole one does not have.

        Where the scale of scores comes from the number of features outputs may not tell it: a single key has all the
        weight, whatever its score.
        """
        for (name, one), (other_name, other) in zip(whole, smaller, strict=False):
            if (name, one) != (other_name, other):
                self._scale = (
                    f"without some of these channels it computes {other_name} by {_shown(other)}, which was {name} by "
                    f"{_shown(one)}: the scale of scores seems to come from the number of features, as in "
                    "q.size(-1) ** -0.5. Let the module store a scale of its own"
                )
                return self._scale
        return None

    @functools.cached_property
    def _usual(self) -> tuple[dict[str, Tensor], Any] | None:
        """Tensors that are drawn, and inputs for them; None where they are too many to be copied.

        Its own may hide what is wrong: a last layer that begins at zero, a scale of 1e-5, sixteen bits.
        """
        if sum([w.nbytes for w in self._leaves.values()]) > _COPIED:
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
        if left == self._allowed(chosen, self._about_half(chosen)):
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
        whole, smaller, unknown = self._both(chosen, self._allowed(chosen, self._about_half(chosen)), tree)
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

    def _unequal(self, agreement: Agreement, smaller: nn.Module, whole: _Computed) -> Failure | str | None:
        with warnings.catch_warnings(), self._written_down() as numbers:
            warnings.simplefilter("ignore")
            # With one channel left rounding may be a greater share of outputs; what broadcasts makes others of them.
            wrong = agreement.problem(smaller, 1e-3 if self._how == _ONE_LEFT else 0.0)
        return wrong if isinstance(wrong, Failure) else self._other_number(whole, numbers) or wrong

    def _outputs(self, network: nn.Module, inputs: Any = None, seed: int = 0) -> list[Tensor] | Failure:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # They were given when the network itself ran.
            args, kwargs = self._inputs if inputs is None else inputs
            return outputs(network, args, kwargs, seed)

    def _refusal(self, reason: str, path: str) -> Refusal:
        return Refusal(reason, _around(self.module, path), self._how == _ONE_LEFT)

    def _said(
        self, smaller: nn.Module, wrong: Failure | str, unknown: Sequence[Stored], chosen: Sequence[int]
    ) -> Refusal:
        """What is wrong, the module whose code is to blame, what it holds, and the remedy."""
        holder = _around(self.module, self._holder(chosen))
        if self._scale is not None:  # All else that was tried fails, too, in another way.
            return self._refusal(f"in {_named(self.module, holder)} {self._scale}", holder)
        path = _around(self.module, wrong.path) if isinstance(wrong, Failure) else holder
        return self._refusal(self._reason(smaller, wrong, unknown, path, len(chosen) == 1), path)

    def _reason(
        self, smaller: nn.Module, wrong: Failure | str, unknown: Sequence[Stored], path: str, apart: bool
    ) -> str:
        kind = type(self.module.get_submodule(path)).__name__
        here = [each for each in unknown if each.path == path] or list(unknown)
        if here:
            holds = f"{_stores(smaller, here)}, and no other numbers there make it run"
            holds += self._divided(smaller, here) if apart else ""
        else:
            numbers = unknown_counts(self.module, smaller, path)
            such = f" ({listed([f'{name}={value}' for name, value in numbers.items()])})" if numbers else ""
            holds = (
                f"{_named(self.module, path)} may have a width or a count as a number of its own{such}, or in its code"
            )
        what = f"{self._how} the network fails {wrong}" if isinstance(wrong, Failure) else f"{wrong}"
        if self._how == _ONE_LEFT:
            what = what if isinstance(wrong, Failure) else f"{self._how} {wrong}"
            return f"{what}. Let its forward name the dimensions that squeeze takes away, x.flatten(1) or x.squeeze(-1)"
        return (
            f"{what}; {holds}. Let its forward take widths from the shapes of tensors (x.flatten(1), x.shape, -1 in a "
            f"view), or give rules={{{kind}: function}} to channel_groups and resized"
        )

    def _divided(self, smaller: nn.Module, several: Sequence[Stored]) -> str:
        """That the code divides a number by a count, as a width that stays for the width of a head, if it does."""
        is_one = lambda each: type(each.value) is int and is_count(each.attribute.rpartition(".")[2])
        several = [each for each in several if each.others]
        for each in several:  # So that it comes as far as it may.
            each.assign(smaller, each.others[0])
        for each in filter(is_one, several):
            count = _Divisor(each.others[0])
            each.assign(smaller, count)
            self._outputs(smaller)
            each.assign(smaller, each.others[0])
            if count.divided:
                what = f"{count.divided[0]} by {each.attribute}"
                return f", for its code divides {what}, which gives another number where some are gone"
        return ""

    def holder(self, family: int) -> str:
        """The innermost module with a forward of its own that holds all leaves of a family."""
        path = _around(self.module, self._holder([family]))
        while path and isinstance(self.module.get_submodule(path), (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            path = path.rpartition(".")[0]
        return path

    def _holder(self, chosen: Sequence[int]) -> str:
        """The innermost module that holds all leaves of some families."""
        paths = [name.split(".")[:-1] for i in chosen for name in self.families[i]]
        alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        return ".".join([parts[0] for parts in alike])


class _Divisor(int):
    """A number that keeps what is divided by it."""

    def __new__(cls, value: int) -> _Divisor:
        made = super().__new__(cls, value)
        made.divided = []
        return made

    divided: list[int]

    def __rfloordiv__(self, other: int) -> int:
        self.divided.append(other)
        return other // int(self)


class _Numbers(TorchFunctionMode):
    """Writes down the numbers that tensors are computed with, and the functions that take them, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: _Computed = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        given = [*args, *(kwargs or {}).values()]
        counts = _ARITHMETIC.search(name) is not None
        numbers = [float(x) for x in given if isinstance(x, float) or (counts and type(x) is int)]
        if name == "scaled_dot_product_attention" and (kwargs or {}).get("scale") is None:
            numbers.append((args[0] if args else (kwargs or {})["query"]).shape[-1] ** -0.5)
        if numbers:
            self.found.append((name, tuple(numbers)))
        return func(*args, **(kwargs or {}))


#: Functions that compute with whole numbers, where others take them for sizes and dimensions.
_ARITHMETIC = re.compile("mul|div|pow|tensor|full")


def _quiet(made: type[Agreement], *args: Any) -> Agreement:
    """What networks give without a warning: those were given when the network itself ran."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made(*args)


def _shown(numbers: Sequence[float]) -> str:
    return ", ".join([f"{x:.4g}" for x in numbers])


def _line(error: Exception) -> str:
    said = str(error).strip().partition("\n")[0]
    return said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"


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


def _named(module: nn.Module, path: str) -> str:
    kind = type(module.get_submodule(path)).__name__
    return f"{path!r}, {with_article(kind)}," if path else f"{kind}, the network itself,"


def _stores(module: nn.Module, several: Sequence[Stored]) -> str:
    """Which module stores which numbers."""
    path = several[0].path
    show = lambda x: f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"{x!r}"
    return (
        f"{_named(module, path)} stores {listed([f'{x.attribute}={show(x.value)}' for x in several if x.path == path])}"
    )


def _around(module: nn.Module, path: str) -> str:
    """The innermost module around a place that is none of torch's own."""
    while path and type(module.get_submodule(path)).__module__.startswith("torch.nn."):
        path = path.rpartition(".")[0]
    return path


# Which families are to blame


def refused(trial: Trial, joined: Sequence[int] = ()) -> tuple[dict[int, str], list[tuple[int, ...]]]:
    """The families without which the network does not run, by their numbers, with the reason.

    Those of numbered layers that are alike are tried together, and apart only where that fails.

    Args:
        trial: Whether it runs.
        joined: Families that may become one with others.

    Returns:
        The reasons, and sets of families among those refused that go if as many groups of each do: no more is tried
        once there are some.
    """
    kinds: dict[Any, list[int]] = {}
    for i in range(len(trial.families)):
        kinds.setdefault(_kind(trial, i), []).append(i)
    search = _Search(trial, joined)
    search.find(list(kinds.values()))
    return search.reasons, search.together


def _kind(trial: Trial, i: int) -> frozenset[str]:
    """The leaves of a family but for the numbers of layers."""
    return frozenset(map(_numbered, trial.families[i]))


class _Search:
    """Divides kinds of families until each of them runs, or is refused."""

    def __init__(self, trial: Trial, joined: Sequence[int] = ()) -> None:
        self._trial, self._stage, self._joined = trial, trial.stage, joined
        self._known: dict[Any, Refusal | None] = {}
        self.reasons: dict[int, str] = {}
        self.together: list[tuple[int, ...]] = []
        self._alike: dict[Any, bool] = {}  # Whether families run as one.

    def find(self, kinds: list[list[int]]) -> None:
        """Refuse families until the network runs without all others.

        Which are to blame is looked for where all together failed alone, for that is one trial of many.
        """
        while kinds and (problem := self._trial.problem(_families(kinds))) is not None:
            self._stage, before = self._trial.stage, (len(self.reasons), len(self._trial.needs_two))
            kinds = self._running(kinds, problem)
            if before == (len(self.reasons), len(self._trial.needs_two)):  # As where outputs are not always the same.
                self.reasons.update(dict.fromkeys(_families(kinds), problem.reason))
                return
            self.together = list(self._as_one())
            if self.together:
                return

    def _as_one(self) -> Iterator[tuple[int, ...]]:
        """Families among those refused that run if as many groups of each go, as where a number counts all of them.

        They are of one module, where a family of its own for queries and keys, for what mixes scores, and for values
        has a group for each head. Of modules in numbered layers that are alike the first is tried.
        """
        several: dict[tuple[str, int], list[int]] = {}
        for i in [i for i in self._joined if i in self.reasons]:
            several.setdefault((self._trial.holder(i), self._trial.counts[i]), []).append(i)
        for some in several.values():
            kinds: dict[Any, list[int]] = {}
            for i in some:
                kinds.setdefault(_kind(self._trial, i), []).append(i)
            for here in (some, *kinds.values()):
                kind = tuple([_kind(self._trial, i) for i in here])
                if len(here) > 1 and kind not in self._alike:
                    self._alike[kind] = self._trial.runs_alike(here)
                if self._alike.get(kind):
                    yield tuple(here)
                    break

    def _problem(self, chosen: list[int]) -> Refusal | None:
        """What goes wrong without some families, which is not tried a second time."""
        key = self._stage, tuple(chosen), tuple([self._trial.least[i] for i in chosen])
        if key not in self._known:
            self._known[key] = self._trial.problem(chosen, self._stage)
        return self._known[key]

    def _running(self, kinds: list[list[int]], problem: Refusal | None = None) -> list[list[int]]:
        """Those of some kinds of families without which the network runs; all others are refused.

        Args:
            kinds: Families by their kinds.
            problem: What goes wrong without all of them, if that is known.
        """
        problem = problem or (self._problem(_families(kinds)) if kinds else None)
        if problem is None:
            return kinds
        if len(kinds) == 1:
            return self._apart(kinds[0], problem)
        first, second = map(self._running, self._divided(kinds, problem))
        if first and second and self._problem(_families(first + second)) is not None:
            return [*first, *self._beside(first, second)]
        return first + second

    def _divided(self, kinds: list[list[int]], problem: Refusal) -> tuple[list[list[int]], list[list[int]]]:
        """Some kinds in two parts, those that have leaves in layers like the one that failed in the second."""
        families, inside = self._trial.families, f"{_numbered(problem.path)}." if problem.path else ""
        blamed = [any([_numbered(name).startswith(inside) for name in families[kind[0]]]) for kind in kinds]
        if all(blamed) or not any(blamed):
            return kinds[: len(kinds) // 2], kinds[len(kinds) // 2 :]
        first, second = (
            [kind for kind, here in zip(kinds, blamed, strict=True) if here is one] for one in (False, True)
        )
        return first, second

    def _apart(self, kind: list[int], problem: Refusal) -> list[list[int]]:
        """What runs of one kind. Where the first and the last fail alike, all do."""
        if self._trial.runs_with_two(kind, problem, self._stage):
            return [kind]
        if len(kind) == 1:
            self.reasons[kind[0]] = problem.reason
            return []
        first, last = (self._problem([i]) for i in (kind[0], kind[-1]))
        if first is not None and last is not None and (alike := _alike(first.reason, last.reason)) is not None:
            self.reasons.update(dict.fromkeys(kind, alike))
            return []
        return self._running([kind[: len(kind) // 2], kind[len(kind) // 2 :]], problem)

    def _beside(self, first: list[list[int]], second: list[list[int]]) -> Iterator[list[int]]:
        """Those of some kinds that run, with which others do not run all together."""
        taken = _families(first)
        for kind in second:
            problem = self._problem([*taken, *kind])
            if problem is None:
                taken += kind
                yield kind
            else:
                self.reasons.update(dict.fromkeys(kind, problem.reason))


def _families(kinds: list[list[int]]) -> list[int]:
    return [i for kind in kinds for i in kind]


#: The number of a layer in a name, or of entries in a shape.
_NUMBER = re.compile(r"\d+")


def _numbered(name: str) -> str:
    """What names have in common but for numbers."""
    return _NUMBER.sub("*", name)


def _alike(one: str, other: str) -> str | None:
    """Two texts as one, with stars for the numbers by which alone they differ; None if they differ otherwise."""
    if _numbered(one) != _numbered(other):
        return None
    numbers = zip(_NUMBER.findall(one), _NUMBER.findall(other), strict=True)
    stars = iter([a if a == b else "*" for a, b in numbers])
    return _NUMBER.sub(lambda _: next(stars), one)
