"""What `regularize` warns of, each once: what has no effect or acts twice, and strengths that leave nothing."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from funcreg.core._typing import Hyper, Params
from funcreg.core.construction import written
from funcreg.core.frozen import frozen_beside_others
from funcreg.core.leafwise import product
from funcreg.core.masks import listed
from funcreg.core.notices import warn_user
from funcreg.core.ranges import concrete, is_readable
from funcreg.core.rounding import is_narrow
from funcreg.core.selection import computed_from
from funcreg.core.tree import broadcast, tree_paths
from funcreg.core.undocumented import is_compiling
from funcreg.networks.coupled import extinct
from funcreg.regularizers.composition import apart, composes
from funcreg.torch_optim.denominators import Entries, known_number
from funcreg.torch_optim.landing import Task
from funcreg.torch_optim.parameter_names import Moved, ParameterNames
from funcreg.transforms.regularizing import projects

#: Penalties whose gradient is a decay to zero.
_RIDGES = ("l2", "half_l2")
#: Constraints of counts, which are of one leaf, or of runs of its entries.
_COUNTS = ("top_k", "group_top_k", "n_m_sparsity")
#: Steps without any gradient after which it is said: more than a critic takes between two of its generator.
_IDLE = 20


class Remarks:
    """The warnings about one penalty on an optimizer, and what of them was said.

    Args:
        on: What is followed, as its `repr` says.
        names: The names of the optimizer's parameters.
    """

    def __init__(self, on: object, names: ParameterNames) -> None:
        # It holds these remarks, and would be held, with all parameters, until the garbage collector runs.
        self._ref, self._names = weakref.ref(on), names
        self.said = set[str]()
        self.waits = False  # Whether all entries were zero while a momentum buffer was filled.
        self._pace: list[Any] = []
        self._idle = 0  # In how many steps, up to now, the optimizer has moved nothing.
        self._rows: dict[str, Tensor] = {}  # Which of embeddings were not zero before the first step,
        self._begun = set[str]()  # and which other leaves.

    @property
    def _on(self) -> object:
        return self._ref()

    # Of a new penalty

    def of_scales(self, module: nn.Module, acted_on: dict[str, Tensor]) -> None:
        """Warn of penalized parameters from which a parametrization computes the weight, once for each kind."""
        computed, kinds = computed_from(module), dict[Any, list[str]]()
        for name, w in acted_on.items():
            if w in computed:
                kinds.setdefault(computed[w], []).append(name)
        for (kind, effect), found in kinds.items():
            name = found[0]
            size = f"{name[:-2]}_g" if name.endswith("_v") else name.replace("original1", "original0")
            warn_user(f"{self._on!r} penalizes {listed(found)}, {kind}: {effect.format(name=name, size=size)}.")

    def of_what_cannot_die(self, optimizer: Optimizer, penalty: str, linked: Sequence[set[str]]) -> None:
        """Warn if every family of groups has a leaf that is frozen."""
        params = [w for group in optimizer.param_groups for w in group["params"]]
        rows = zip(params, frozen_beside_others(params), strict=True)
        frozen = [self._names.names[w] for w, is_frozen in rows if is_frozen]
        if linked and all([each.intersection(frozen) for each in linked]):
            named = [repr(name) for name in frozen if name in set().union(*linked)]
            warn_user(
                f"in each family of groups of {penalty} something is frozen, by requires_grad=False: {listed(named)}. "
                "As long as it is, no group can become zero. Leave these layers out of the groups, as by "
                "channel_groups(..., layers=...)."
            )

    def of_counts(self, task: Task, acted_on: dict[str, Tensor]) -> None:
        """Warn of a constraint of counts that no leaf is large enough for."""
        counts = [part for part in task.term().parts() if part.penalty.__name__ in _COUNTS]
        leaves = {name: w.detach() for name, w in acted_on.items()}
        if task.is_scheduled or not (counts and leaves) or is_compiling() or not all(map(is_readable, leaves.values())):
            return
        full = {name: torch.ones_like(w) for name, w in leaves.items()}
        for part in counts:
            kept = part.prox(self._names.tree(full), 1.0, None)
            if all([bool((kept[name] != 0).all()) for name in full]):
                warn_user(
                    f"{self._on!r} has no effect: {part.title()} keeps all entries of {listed(map(repr, full))}. It "
                    "counts those of a leaf, or of a group of its entries, and not of the network."
                )

    def of_decay(self, optimizer: Optimizer, task: Task, touched: set[str]) -> None:
        """Warn of a ridge on parameters that the optimizer lets decay already, as AdamW does by default."""
        ridged = self._ridged(task) & touched
        for group in optimizer.param_groups:
            decay = group.get("weight_decay", 0.0)
            twice = [self._names.names[w] for w in group["params"] if self._names.names[w] in ridged]
            if twice and isinstance(decay, (int, float)) and decay:
                warn_user(
                    f"{listed(twice)} would decay twice, by weight_decay={decay} of {type(optimizer).__name__} and by "
                    f"{self._on!r}. Leave one out, as by weight_decay=0.0."
                )
                return

    def of_evaluation(self, optimizer: Optimizer) -> None:
        """Warn of an optimizer that puts other numbers into the parameters for an evaluation."""
        if all([callable(getattr(optimizer, name, None)) for name in ("train", "eval")]):
            warn_user(
                f"{type(optimizer).__name__} has train() and eval(), as schedule-free optimizers that put averages "
                f"into the parameters: {self._on!r} lands where steps lead, and zeros and constraints need not hold "
                "after eval(). Take an optimizer that evaluates what it trains, or regularize as a term of the loss."
            )

    def _ridged(self, task: Task) -> set[str]:
        """The parameters on which a ridge acts, with a strength that is not known to be 0."""
        params = self._names.tree({name: w.detach() for name, w in self._names.penalized().items()})
        found = set[str]()
        for part in task.term().parts():
            if part.penalty.__name__ in _RIDGES:
                factors = broadcast(product(params, 1.0, *part.factors), params, "a factor")
                rows = zip(tree_paths(params), part.places(params), map(concrete, factors), strict=True)
                acts = lambda factor: factor is None or bool(torch.as_tensor(factor, device="cpu").any())
                found.update([name for name, here, factor in rows if here and acts(factor)])
        return found

    # Of param groups

    def of_unread(self, optimizer: Optimizer) -> None:
        """Warn of strengths that stand in param groups, as those of `Optimizer` do, and have no effect here."""
        for i, group in enumerate(optimizer.param_groups):
            if "strength" in group and "strength" not in optimizer.defaults and f"strength {i}" not in self.said:
                self.said.add(f"strength {i}")
                warn_user(
                    f"param group {i} has strength={written(group['strength'])}, which {self._on!r} does not read: it "
                    "has no effect. Give regularize a tensor, and change that in place, a tree of numbers by the names "
                    "of parameters, or call it for each group, with a mask."
                )

    # Of gradients and parameters

    def of_standing_still(self, steps: int, nothing_moves: bool) -> None:
        """Warn of a step without effect if none had any so far, or of many in which the optimizer moves nothing."""
        # None are chosen by mask=False, which is meant, and layers may be frozen later on, while others are trained.
        if not self._names.chosen or self.said & {"replaced", "still"}:
            return
        if steps == 0:
            self.said.add("still")
            warn_user(
                f"{self._on!r} has no effect on this step: none of its parameters has a gradient. Are they frozen, or "
                "did another hook of the optimizer, which came first, or the step itself set gradients to None?",
            )
            return
        self._idle = self._idle + 1 if nothing_moves else 0
        if self._idle == _IDLE:
            self.said.add("still")
            warn_user(
                f"{self._on!r} had no effect in any of {_IDLE} steps after the first {steps}: no parameter of the "
                "optimizer had a gradient. Is another model trained now, a copy or a resized one? Make an optimizer of "
                "its parameters, and regularize that."
            )

    def of_moving(self) -> None:
        """Note a step that has an effect."""
        self._idle = 0

    def of_frozen(self, optimizer: Optimizer, params: list[Tensor]) -> None:
        """Warn of frozen parameters that the optimizer moves on, by a gradient that was left in them."""
        if "frozen" in self.said:
            return
        rows = zip(params, frozen_beside_others(params), strict=True)
        held = [self._names.names[w] for w, frozen in rows if frozen and w.grad is not None]
        names = [name for name in held if name in self._names.chosen]
        if names:
            self.said.add("frozen")
            warn_user(
                f"{self._on!r} leaves out {listed(names)}, frozen by requires_grad=False. But grad is not None there, "
                f"so that {type(optimizer).__name__} may move it on, by momentum or weight decay. Set grad to None, as "
                "zero_grad() does by default."
            )

    def of_replaced(self) -> None:
        """Warn of parameters that training can no longer reach."""
        if "replaced" in self.said:
            return
        gone = [name for name in self._names.replaced() if name in self._names.chosen]
        if gone:
            self.said.add("replaced")
            warn_user(
                f"{self._on!r} has no effect on {listed(gone)}: the optimizer holds parameters that its module no "
                "longer has, as after load_state_dict(assign=True), or where a layer is a new one. Make a new "
                "optimizer, and regularize that."
            )

    def of_uninitialized(self, optimizer: Optimizer) -> None:
        """Warn of torch's fused SGD, whose momentum is what was in memory where its first step is skipped."""
        skipped, state = getattr(optimizer, "found_inf", None), optimizer.state
        if type(optimizer) is not torch.optim.SGD or not isinstance(skipped, Tensor) or is_compiling():
            return
        fused = [group for group in optimizer.param_groups if group["fused"] and group["momentum"] != 0]
        params = [w for group in fused for w in group["params"] if w.grad is not None]
        begins = [w for w in params if state.get(w, {}).get("momentum_buffer") is None]
        if begins and skipped.item():
            warn_user(
                "a GradScaler skips the first step of SGD with fused=True, which then goes on with momentum that torch "
                f"has left uninitialized in {len(begins)} parameters, whatever was in memory: numbers, or NaN. Call "
                "optimizer.state.clear() after this step, or begin with fused=False or a smaller init_scale."
            )

    def note_begun(self, acted_on: dict[str, Tensor]) -> None:
        """Note which rows of embeddings and which leaves are not zero before the first step, for `of_lost`."""
        if is_compiling():
            return
        modules = [] if self._names.module is None else self._names.module.modules()
        tables = {m.weight for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
        plain = {name: w.detach() for name, w in acted_on.items() if type(w) is nn.Parameter}
        plain = {name: w for name, w in plain.items() if is_readable(w)}
        self._rows = {name: (w != 0).any(1) for name, w in plain.items() if acted_on[name] in tables}
        self._begun = {name for name, w in plain.items() if acted_on[name] not in tables and w.any()}

    def of_lost(self, acted_on: dict[str, Tensor], kind: str) -> None:
        """Warn of what the first step made zero because it had no gradient yet."""
        self.of_lost_rows(acted_on, kind)
        begun = {name: w for name, w in acted_on.items() if name in self._begun and is_readable(w.detach())}
        self._begun = set()
        lost = [name for name, w in begun.items() if w.grad is not None and not (w.detach().any() or _any(w.grad))]
        if lost:
            warn_user(
                f"all of {listed(map(repr, lost))} became zero in the first step of {self._on!r}: the gradient was "
                "zero there, as behind a gate, a scale or an adapter that begins with zeros, and "
                f"{kind} divides by no more than eps. What was initialized is lost. Bound the step, as by max_step=1.0."
            )

    def of_lost_rows(self, acted_on: dict[str, Tensor], kind: str) -> None:
        """Warn of rows of embeddings that the first step made zero because its batch had nothing of them."""
        for name, before in self._rows.items():
            w = acted_on[name]
            lost = before & _without_gradient(w) & (w == 0).all(1)
            lost = int(lost.sum()) if is_readable(w.detach()) else 0
            if lost:
                warn_user(
                    f"{lost} of {len(w)} rows of '{name}', an embedding, became zero in the first step of {self._on!r}:"
                    f" they had no gradient yet, and {kind} divides by no more than eps there. Leave it out, as by "
                    f"mask=matrices & ~select('{name}'), or bound the step, as by max_step=1.0."
                )
        self._rows = {}

    def of_never_moved(self, names: set[str], steps: int, call: str) -> None:
        """Warn of leaves that share groups with others, and never had a gradient in many steps."""
        if names:
            warn_user(
                f"{listed(map(repr, sorted(names)))} had no gradient in any of {steps} steps of {call}: they stay "
                "where they are, and keep the groups of which they are a part from becoming zero. Are they frozen, or "
                "not used by the loss? Leave their layers out of the groups, as by channel_groups(..., layers=...)."
            )

    # Of numbers

    def of_zeros(self, moved: list[Moved], task: Task, groups: list[Entries], steps: int) -> None:
        """Warn if no weight is left, unless a strength above 1 says that this is meant."""
        self.waits = False
        if "zeros" in self.said or _is_meant(task) or projects(task.penalty) or has_numbers(moved):
            return
        if task.rule.buffers and steps < 3 * max([_held_before(group) for group in groups]):
            self.waits = True  # The buffer holds few gradients yet, against a step of as many as it will hold.
            return
        self.said.add("zeros")
        warn_user(
            f"all {sum([m.w.numel() for m in moved])} entries are zero after {steps} steps of {self._on!r}: its "
            "strength is above what the gradients of the loss can hold against. For a loss that is a mean, strengths "
            "from 1e-5 to 1e-2 are usual; lambda_max says of a convex problem from where on all is zero.",
        )

    def of_dead(self, leaves: list[Moved], task: Task, steps: int, call: str) -> None:
        """Warn, once for each, of families of `coupled` without which outputs are the same at every input."""
        if "zeros" in self.said or _is_meant(task) or steps == 1:  # Some begin with zeros.
            return
        tree = self._names.tree({m.name: m.w.detach() for m in leaves})
        found = [each for each in extinct(task.penalty, tree) if each.neck is not False]
        new = [each for each in found if f"dead {each.title}" not in self.said]
        self.said.update([f"dead {each.title}" for each in new])
        if not new:
            return
        which = listed([f"'{each.title}' ({each.groups} groups)" for each in new])
        unless = "" if any([each.neck for each in new]) else "unless something goes around it, "
        warn_user(
            f"all groups are dead in the family of {which} after {steps} steps of {call}: {unless}the network gives "
            "the same at every input from now on. Its strength is too great for this family, or comes too early: lower "
            "it, or let it grow from 0 as in strength=linear_schedule(0.0, 1e-3, steps).",
        )

    def of_rounding(self, moved: list[Moved], wide: Params, landed: Params) -> None:
        """Warn if most of what the penalty would change in parameters of sixteen bits is rounded away."""
        changed, lost = 0, 0
        for m in moved:
            if is_narrow(m.w.dtype):
                away = landed[m.name] != wide[m.name]
                changed += int(away.sum())
                lost += int((away & (landed[m.name].to(m.w.dtype) == m.w.detach())).sum())
        if 4 * lost > 3 * changed:
            self.said.add("rounding")
            warn_user(
                f"{self._on!r} leaves {lost} of {changed} entries of sixteen bits that it would change where they are: "
                "its step is less than half the distance to the next number, and is rounded away. Keep parameters in "
                "float32, and compute in sixteen bits by autocast; or take Optimizer with with_master_weights around "
                "a chain such as prox_adam."
            )

    def keeps_pace(self, groups: list[Entries], values: Sequence[Hyper]) -> bool:
        """Whether learning rates and strength are no greater than at the last look: in a warm-up steps are small."""
        before, now = self._pace, [known_number(group.get("lr", 1.0)) for group in groups]
        self._pace = now = [*now, *[x for x in values[:1] if isinstance(x, (int, float))]]
        return len(before) == len(now) and all([x <= y for x, y in zip(now, before, strict=True)])


def say_composed(mine: Task, theirs: Task, shared: dict[str, Tensor]) -> None:
    """Warn of a constraint that lands after something else, where both at once lead elsewhere."""
    first, last = (theirs, mine) if projects(mine.penalty) else (mine, theirs)
    before, after = first.term(), last.term()
    leaves, in_metric = list(shared.values()), mine.rule.source is not None
    missed = apart(before, after)
    exact, two_sets = not missed and composes(after, before, leaves, in_metric), projects(first.penalty)
    if not missed and (composes(before, after, leaves, in_metric) or not (two_sets or exact)):
        return
    ends = (
        "never lies in the first set, because no number is in both"
        if missed
        else "need not lie in the first set, nor be the nearest point of both"
        if two_sets
        else "is not the best of both"
    )
    remedy = "Leave one out, give each parameters of its own by mask=, or write one for both, with @constraint."
    if exact:
        remedy = f"Their sum is exact, regularize(optimizer, {before.title()} + {after.title()}, ...)."
    warn_user(
        f"'{next(iter(shared))}' lands by {before.title()}, and then by {after.title()}: where it ends {ends}. {remedy}"
    )


def _without_gradient(w: Tensor) -> Tensor:
    """Which rows of a matrix have a gradient of zeros, or none in a sparse one."""
    g, nothing = w.grad, torch.ones(len(w), dtype=torch.bool, device=w.device)
    if g is None:
        return ~nothing  # The step has left it where it was.
    return nothing.index_fill_(0, g.coalesce().indices()[0], False) if g.is_sparse else (g == 0).all(1)


def _any(g: Tensor) -> bool:
    """Whether a gradient, which may be a sparse one, has a number that is not zero."""
    return bool((g.coalesce().values() if g.is_sparse else g).any())


def _is_meant(task: Task) -> bool:
    """Whether a strength above 1 says that nothing is to be left."""
    strength = concrete(task.strength)
    return strength is not None and bool((torch.as_tensor(strength, device="cpu") > 1).any())


def _held_before(group: Entries) -> float:
    """How many gradients, besides the last, a momentum buffer holds in the long run."""
    momentum = float(group.get("momentum", 0.0))
    return momentum / max(1 - momentum, 1e-3)


def has_numbers(moved: list[Moved]) -> bool:
    """Whether an entry is not zero, where that can be read without waiting for a device."""
    leaves = [m.w.detach() for m in moved]
    if is_compiling() or not all(map(is_readable, leaves)):
        return False
    return any([bool(w.any()) for w in leaves])  # Mostly the first leaf has some.
