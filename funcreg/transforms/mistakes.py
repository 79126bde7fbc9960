"""What is likely to be a mistake in a chain, told from its links in their order and the leaves on which they act."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from funcreg.core._typing import Params
from funcreg.core.construction import written
from funcreg.core.masks import keep, listed
from funcreg.core.rounding import is_narrow
from funcreg.core.tree import tree_leaves, tree_paths
from funcreg.regularizers.composition import Term, apart, composes
from funcreg.regularizers.penalty import Penalty, Sum
from funcreg.transforms.averaging import lookahead, schedule_free
from funcreg.transforms.chains import changes, named_chain
from funcreg.transforms.clipping import zero_nans
from funcreg.transforms.combine import apply_if_finite, masked, set_to_zero
from funcreg.transforms.placement import CLIMBING, decay_of, every_part, parts_of
from funcreg.transforms.precision import with_master_weights, with_stochastic_rounding
from funcreg.transforms.regularizing import add_penalty, project, projects, proximal, soft_threshold
from funcreg.transforms.scaling import ema, scale_by_schedule, trace
from funcreg.transforms.transform import Transform, at_step, raw_leaves, stateless


@dataclass(frozen=True)
class Entry:
    """A transform where it stands: what it gets to see of the parameters, and under which labels."""

    tx: Transform
    depth: int
    place: str
    params: Params | None  # Those that it is given; None if there are none.
    branch: tuple[tuple[Any, str], ...]  # Of each parting on the way to it, which, and the way that was taken.
    around: tuple[Transform, ...] = ()  # The transforms that it is inside of.
    is_leaf: bool = True  # Whether it is made of no others, or makes a step of its own.
    chosen: bool = False  # Whether a mask or a label chose the leaves that it is given.
    held: frozenset[str] = frozenset()  # Names of leaves that another link freezes.
    acts_on: frozenset[str] | None = None  # Names of leaves; None without parameters.

    @property
    def name(self) -> str:
        made_by = self.tx.made_by
        return "" if made_by is None else made_by.function.__name__

    def argument(self, name: str) -> Any:
        return None if self.tx.made_by is None else self.tx.made_by.arguments.get(name)

    @property
    def is_climbing(self) -> bool:
        """Whether it is part of what a wrapper goes uphill with, on purpose."""
        inside = zip(self.around, (*self.around, self.tx)[1:], strict=True)
        calls = [(outer.made_by, part) for outer, part in inside if outer.made_by is not None]
        return any([call.arguments.get(name) is part for call, part in calls for name in CLIMBING])

    @property
    def penalty(self) -> Penalty | None:
        """The penalty that it applies; a constraint is none."""
        found = self.argument("penalty")
        return found if isinstance(found, Penalty) and not projects(found) else None

    def leaves(self) -> list[tuple[str, Any]]:
        """Names and tensors on which it acts."""
        if self.params is None or self.acts_on is None:
            return []
        rows = zip(tree_paths(self.params), tree_leaves(self.params), strict=True)
        return [(name, w) for name, w in rows if name in self.acts_on]


def made(tx: Transform, *functions: Callable[..., Transform]) -> bool:
    return tx.made_by is not None and any([tx.made_by.function is function for function in functions])


def mistakes(entries: list[Entry], several: bool, whole: Params | None) -> list[str]:
    """What is likely to be wrong with transforms in the order in which they act, of all parameters."""
    links = [entry for entry in entries if entry.is_leaf]
    return [
        *_penalty_before_a_denominator(links),
        *_rates_before_a_denominator(links),
        *_changes_after_landing(links),
        *_changes_after_rounding(entries),
        *_constant_thresholds(links),
        *_projections_in_another_metric(links),
        *_sets_after_sets(links),
        *_averages_of_zeros(entries),
        *_penalties_of_vectors(links, whole),
        *_penalized_twice(links),
        *_out_of_order(links),
        *_uphill(links, several),
        *_moved_again(links),
        *_never_moved(links),
        *_late_for_memories(links),
        *_left_raw(entries, whole),
        *_beside_gathered(entries),
        *_lost_in_sixteen_bits(links),
    ]


def _meet(a: Entry, b: Entry) -> bool:
    """Whether two transforms act on one leaf, as far as is known."""
    apart = any([p == q and x != y for p, x in a.branch for q, y in b.branch])
    if a.acts_on is None or b.acts_on is None or apart:
        return not apart and not any([_may_differ(m, n) for m in _masks(a) for n in _masks(b)])
    return bool(a.acts_on & b.acts_on)


def _masks(entry: Entry) -> list[Any]:
    """The masks through which a transform sees parameters."""
    around = [tx.made_by.arguments.get("mask") for tx in entry.around if tx.made_by is not None and made(tx, masked)]
    return [mask for mask in (*around, entry.argument("mask")) if mask is not None]


def _may_differ(mask: Any, other: Any) -> bool:
    """Whether two masks may choose other leaves; those that are written alike choose the same, but for functions."""
    own, its = written(mask), written(other)
    return mask is not other and (own != its or "<lambda>" in own)


# In which order


#: Scalers that do not divide each entry by a size of its gradients.
_UNDIVIDED = (
    *("scale_by_trust_ratio", "scale_by_param_block_norm", "scale_by_param_block_rms", "scale_by_polyak"),
    *("scale_by_lbfgs", "scale_by_zoom_linesearch", "scale_by_backtracking_linesearch"),
    *("scale_by_optimistic_gradient", "scale_by_optimistic_gradient_v2"),
)


def _divides(entry: Entry) -> bool:
    """Whether a transform divides updates by a size of their own, so that a factor of all is lost."""
    own = entry.name.startswith("scale_by_") and entry.tx.rate is None and entry.name not in _UNDIVIDED
    return entry.tx.metric is not None or own


def _behind(
    links: list[Entry], is_early: Callable[[Entry], bool], is_late: Callable[[Entry], bool]
) -> Iterator[tuple[Entry, Entry]]:
    """Links of one kind, each with the first of another kind that stands behind it and acts on one of its leaves."""
    for i, entry in enumerate(links):
        later = (each for each in links[i + 1 :] if is_late(each) and _meet(entry, each))
        if is_early(entry) and (found := next(later, None)) is not None:
            yield entry, found


def _penalty_before_a_denominator(links: list[Entry]) -> Iterator[str]:
    for entry, later in _behind(links, lambda each: tuple(each.tx.stages) == ("adds",), _divides):
        if decay_of(entry.tx) is not None:
            yield (
                f"{entry.tx!r} stands before {later.tx!r}, which divides it by the size of the gradients: weights with "
                "large gradients decay less. If the decay of AdamW was meant, put it between that and the learning "
                "rate, or write with_weight_decay(..., 'decoupled', ...)."
            )
        elif made(entry.tx, add_penalty):
            yield (
                f"{entry.tx!r} stands before {later.tx!r}, which divides it by the size of the gradients: each weight "
                "is pulled with another strength, as it is by a penalty in the loss, and none becomes exactly zero. "
                "prox_adam, or proximal_step, takes the penalty apart from the gradients."
            )


def _rates_before_a_denominator(links: list[Entry]) -> Iterator[str]:
    has_rate = lambda each: each.tx.rate is not None and "steps" in each.tx.stages
    for entry, later in _behind(links, has_rate, _divides):
        yield (
            f"{entry.tx!r} stands before {later.tx!r}, which divides updates by their own size: the learning rate is "
            "divided out, and steps are of size 1. Put it last."
        )


def _changes_after_landing(links: list[Entry]) -> Iterator[str]:
    for entry, later in _behind(links, lambda each: "lands" in each.tx.stages, _changes):
        scales = " scales or clips" if _scales(later) else " changes"
        yield (
            f"{later.tx!r} stands after {entry.tx!r} and{scales} its updates, which loses exact zeros and what lies in "
            "a set. Put what lands last."
        )


def _changes_after_rounding(entries: list[Entry]) -> Iterator[str]:
    for entry in entries:
        if not made(entry.tx, with_master_weights, with_stochastic_rounding):
            continue
        last = max(
            [i for i, each in enumerate(entries) if each is entry or any([tx is entry.tx for tx in each.around])]
        )
        later = [each for each in entries[last + 1 :] if each.is_leaf and each.tx.frozen is None and _meet(entry, each)]
        narrow = {name for name, w in entry.leaves() if is_narrow(w.dtype)}
        if entry.params is not None:  # Leaves of other dtypes are what they become.
            later = [each for each in later if narrow.intersection(each.acts_on or ())]
        changing = next((each for each in later if _changes(each) or "lands" in each.tx.stages), None)
        averages = entry.params is None or narrow
        averaging = next((tx for tx in entry.around if averages and made(tx, lookahead, schedule_free)), None)
        if changing is not None or averaging is not None:
            other = changing.tx if changing is not None else averaging
            yield (
                f"{other!r} changes the updates of {entry.tx!r}, which end at numbers of sixteen bits: what it changes "
                "is rounded away, or undone by the copies at the next step. Put it inside."
            )


def _changes(entry: Entry) -> bool:
    return "lands" not in entry.tx.stages and changes(entry.tx)


def _scales(entry: Entry) -> bool:
    words = ("clip", "adaptive_grad_clip", "normalize", "scale")
    return "scales" in entry.tx.stages or entry.name.startswith(words)


def _out_of_order(links: list[Entry]) -> Iterator[str]:
    for i, entry in enumerate(links):
        after_step = [e for e in links[:i] if "steps" in e.tx.stages and _meet(entry, e)]
        if after_step and "adds" in entry.tx.stages and "steps" not in entry.tx.stages:
            yield f"{entry.tx!r} adds a gradient to the step of {after_step[-1].tx!r}, and goes uphill. Put it before."
        early = [e for e in links[:i] if "follows" in e.tx.stages and _meet(entry, e)]
        if early and "steps" in entry.tx.stages:
            yield f"{early[0].tx!r} stands before {entry.tx!r}, which turns its sign: it goes uphill. Put it after."


def _turns(tx: Transform) -> bool:
    return "steps" in tx.stages or "flips" in tx.stages or _sign(tx) < 0


#: Numbers of steps at which a schedule is asked for its sign.
_ASKED = (0, 1, 10, 100, 1000, 10000)


def _values(schedule: Any) -> set[float]:
    """What a schedule is at some steps; nothing where it cannot be asked."""
    try:
        return {float(at_step(schedule, n)) for n in _ASKED}
    except (
        TypeError,
        ValueError,
        RuntimeError,
        LookupError,
        ArithmeticError,
    ):  # In steps it is asked again, and raises.
        return set()


def _sign(tx: Transform) -> int:
    """The sign of the schedule that `scale_by_schedule` multiplies by; 0 for that of others, and one that changes."""
    if not made(tx, scale_by_schedule):
        return 0
    values = _values(tx.rate)
    if not values:
        return 0
    least, greatest = min(values), max(values)
    return 1 if least >= 0 < greatest else -1 if least < 0 >= greatest else 0


def _climb(parts: list[Transform]) -> bool:
    """Whether all of these transforms are known, and none of them turns the sign of a gradient."""
    return all(map(_is_known, parts)) and not any(map(_turns, parts))


def _is_known(tx: Transform) -> bool:
    """Whether a transform tells what it does to the sign of a gradient: a function of the user's own does not."""
    return tx.made_by is not None and not made(tx, stateless) and not (callable(tx.rate) and not _sign(tx))


def climbs(tx: Transform) -> bool:
    """Whether a transform is known to lead uphill, where its updates are applied as they are."""
    return "steps" not in tx.stages and not made(tx, set_to_zero) and _climb(every_part(tx))


def uphill(tx: Transform, got: str) -> str | None:
    """What is wrong with a chain that leads uphill, behind words that say where it came from; None if it does not."""
    if not climbs(tx):
        return None
    return (
        f"{got} {tx!r}, in which nothing turns the sign of the gradient, so that steps go uphill. End it with "
        "scale_by_learning_rate(lr)."
    )


def _uphill(links: list[Entry], several: bool) -> Iterator[str]:
    downhill = [entry for entry in links if not entry.is_climbing]
    if several and downhill and _climb([entry.tx for entry in downhill]):
        yield (
            "no link has a learning rate that turns the sign: applied as they are, updates go uphill. End with "
            "scale_by_learning_rate."
        )
    turning = [entry for entry in downhill if _turns(entry.tx)]
    for i, entry in enumerate(turning):
        before = [each for each in turning[:i] if _meet(entry, each)]
        last = not any([_meet(entry, each) for each in turning[i + 1 :]])
        if last and len(before) % 2:
            yield (
                f"{entry.tx!r} turns the sign that {before[-1].tx!r} has turned: updates go uphill, which is right for "
                "an objective that is to be made large. Else take one of them out."
            )


def _moved_again(links: list[Entry]) -> Iterator[str]:
    for entry, later in _behind(links, lambda each: made(each.tx, set_to_zero), _moves_by_itself):
        yield (
            f"{later.tx!r} stands after {entry.tx!r} and moves the leaves whose updates that has made zero: they are "
            "not held. chain(freeze(mask), ...) holds them, wherever it stands."
        )


def _never_moved(links: list[Entry]) -> Iterator[str]:
    for i, entry in enumerate(links):
        rate = entry.tx.rate if entry.argument("learning_rate") is None else entry.argument("learning_rate")
        always = callable(rate) and _values(rate) == {0.0}
        moves = any([_moves_by_itself(each) and _meet(entry, each) for each in links[i + 1 :]])
        if (always or (isinstance(rate, (int, float)) and rate == 0)) and not moves:
            yield (
                f"{entry.tx!r} multiplies updates by 0{' at every step' if always else ''}: its leaves never "
                "move. Where they are to be held, freeze(mask) says so."
            )


#: What remembers updates, beside what has a metric.
_REMEMBERING = (
    *("trace", "ema", "scale_by_lion", "scale_by_muon", "scale_by_optimistic_gradient", "scale_by_sm3"),
    *("scale_by_rprop", "scale_by_lbfgs"),
)


def _late_for_memories(links: list[Entry]) -> Iterator[str]:
    remembers = lambda each: each.tx.metric is not None or each.name in _REMEMBERING
    clears = lambda each: made(each.tx, zero_nans)
    for entry, later in _behind(links, remembers, clears):
        before = [each for each in links[: links.index(entry)] if clears(each) and _meet(each, entry)]
        if not before and not any([made(tx, apply_if_finite) for tx in entry.around]):
            yield (
                f"{later.tx!r} stands after {entry.tx!r}, which keeps the first NaN that it sees: from then on the "
                "updates of that entry are 0, and it never moves again. Put it first."
            )


def _moves_by_itself(entry: Entry) -> bool:
    """Whether a transform moves parameters whose updates are zero, by a decay, a penalty or a threshold."""
    pulls = decay_of(entry.tx) is not None or entry.penalty is not None
    return pulls or made(entry.tx, soft_threshold)


def _left_raw(entries: list[Entry], whole: Params | None) -> Iterator[str]:
    if whole is None:
        return
    try:
        said = raw_leaves(next(entry.tx for entry in entries if not entry.depth), whole)
    except (TypeError, ValueError):  # Of a mask or of labels that do not fit, which was said.
        return
    if said is not None:
        yield said


def _beside_gathered(entries: list[Entry]) -> Iterator[str]:
    """What stands beside a link that gathers gradients, and not in it: it acts at every call."""
    for entry in entries:
        links = parts_of(entry.tx) if entry.tx.links or made(entry.tx, named_chain) else []
        waiting = [i for i, link in enumerate(links) if "waits" in link.stages]
        if not waiting:
            continue
        gathers = links[waiting[0]]
        for place, some in (("before", links[: waiting[0]]), ("after", links[waiting[0] + 1 :])):
            for part in [each for link in some for each in every_part(link)]:
                reason = _at_every_call(part, place)
                if reason is not None:
                    yield (
                        f"{part!r} stands {place} {gathers!r}, which makes a step of several gradients: {reason}. Put "
                        "it inside, to act once a step."
                    )


def _at_every_call(tx: Transform, place: str) -> str | None:
    """What is wrong with a transform that acts at every gradient, where several make a step."""
    name = "" if tx.made_by is None else tx.made_by.function.__name__
    if name == "add_noise":
        before = "the noise is averaged with them, and smaller than it says"
        return before if place == "before" else "it adds noise at every call, between these steps, too"
    if place == "after":
        return None
    if name.startswith(("clip", "adaptive_grad_clip", "normalize")):
        return "it changes each of them, and not their mean"
    if tx.metric is not None or name in (trace.__name__, ema.__name__):
        return "its memory is one of single gradients, and not of steps"
    return None


# Thresholds and averages


#: What finds the size of each step out.
_CHOOSING = (
    *("reduce_on_plateau", "scale_by_polyak", "scale_by_zoom_linesearch", "scale_by_backtracking_linesearch"),
    *("scale_by_param_block_norm", "scale_by_param_block_rms", "scale_by_trust_ratio", "normalize_by_update_norm"),
)


def _constant_thresholds(links: list[Entry]) -> Iterator[str]:
    for i, entry in enumerate(links):
        step = entry.argument("threshold" if made(entry.tx, soft_threshold) else "step")
        raw = made(entry.tx, soft_threshold, proximal)
        if not raw or callable(step) or projects(entry.argument("penalty")):
            continue
        before = [each for each in links[:i] if _meet(entry, each)]
        reasons = [
            f"the learning rate follows {written(each.tx.rate)} and the threshold does not"
            for each in before
            if callable(each.tx.rate)
        ]
        reasons += [f"{each.tx!r} gives each entry a step size of its own" for each in before if _divides(each)]
        reasons += [
            f"{each.tx!r} makes steps that are longer in the end"
            for each in before
            if each.name in (trace.__name__, ema.__name__)
        ]
        reasons += [f"{each.tx!r} chooses a step size anew" for each in before if each.name in _CHOOSING]
        if reasons:
            yield (
                f"{entry.tx!r} solves a problem of another strength than it seems, because {', and '.join(reasons)}. "
                "prox_sgd and prox_adam scale it as they must."
            )


def _projections_in_another_metric(links: list[Entry]) -> Iterator[str]:
    for i, entry in enumerate(links):
        found = entry.argument("constraint" if made(entry.tx, project) else "penalty")
        if not made(entry.tx, project, proximal) or not projects(found) or found.separable is True:
            continue
        divides = next((each for each in links[:i] if _divides(each) and _meet(entry, each)), None)
        if divides is not None:
            yield (
                f"{entry.tx!r} goes to the nearest point of the set, and {divides.tx!r} gives each entry a step size "
                "of its own: where entries depend on each other, they end in the set, but not at its best point. "
                "prox_adam, or proximal_step, goes to the nearest point in the metric of the steps."
            )


def _sets_after_sets(links: list[Entry]) -> Iterator[str]:
    into = lambda each: each.argument("constraint" if made(each.tx, project) else "penalty")
    sets = [each for each in links if made(each.tx, project, proximal) and projects(into(each))]
    for first, last in _behind(sets, lambda each: True, lambda each: True):
        before, after = (
            Term(into(each), (), each.argument("hyper"), tuple(each.argument("options").items()))
            for each in (first, last)
        )
        leaves = [w for _, w in first.leaves()]
        if apart(before, after):
            yield (
                f"{last.tx!r} stands after {first.tx!r}, and no number is in both sets: where it ends never lies in "
                "the first. Leave one out, or let masks give each leaves of its own."
            )
        elif not composes(before, after, leaves, False):
            swapped = composes(after, before, leaves, False)
            remedy = "Swap the two" if swapped else "Leave one out, or write one for both, with @constraint"
            yield (
                f"{last.tx!r} stands after {first.tx!r}: where it ends need not lie in the set of that, nor be the "
                f"nearest point of both. {remedy}."
            )


def _averages_of_zeros(entries: list[Entry]) -> Iterator[str]:
    for entry in entries:
        if not made(entry.tx, lookahead, schedule_free):
            continue
        inside = [each for each in entries if any([tx is entry.tx for tx in each.around]) and each.is_leaf]
        zeroing = next(
            (e for e in inside if "lands" in e.tx.stages and (e.penalty is not None or made(e.tx, soft_threshold))),
            None,
        )
        if zeroing is not None:
            yield (
                f"{entry.name} averages the parameters of {zeroing.tx!r}: an entry that is exactly zero in one of them "
                "is not in their mean. Train the last steps without it, or take zeros from the parameters inside."
            )


# Which leaves


def penalized(entry: Entry) -> list[tuple[str, Any]]:
    """Names and tensors of the leaves on which the penalty of a transform acts, with masks of its own."""
    rows, penalty = entry.leaves(), entry.penalty
    if not isinstance(penalty, Sum) or entry.params is None:
        return rows
    bools = [name in (entry.acts_on or ()) for name in tree_paths(entry.params)]
    terms = [term.acts(keep(entry.params, bools)) for term in penalty.terms]
    return [row for row, *acts in zip(rows, *terms, strict=True) if any(acts)]


def _penalties_of_vectors(links: list[Entry], whole: Params | None) -> Iterator[str]:
    if whole is None or all([w.ndim < 2 for w in tree_leaves(whole)]):
        return  # Coefficients of a linear model are a vector, and no biases.
    for entry in links:
        decays = decay_of(entry.tx) is not None
        if _is_anchored(entry):  # Of what was trained before, biases are worth as much as weights.
            continue
        if not decays and (entry.chosen or not _carries_penalty(entry)):
            continue
        leaves = entry.leaves() if decays else penalized(entry)
        names = [name for name, w in leaves if w.ndim < 2]
        takes = (
            set()
            if entry.tx.made_by is None
            else {"mask", "weight_decay_mask"}.intersection(entry.tx.made_by.arguments)
        )
        how = f"by {min(takes)}=matrices" if takes else "where the decay is a link with mask=matrices"
        if names:
            yield (
                f"{entry.tx!r} {'decays' if decays else 'penalizes'} {listed(names)}, of fewer than two dimensions: "
                f"biases and scales of normalizations are left alone {how}."
            )


def _is_anchored(entry: Entry) -> bool:
    """Whether leaves are drawn to a point that is not zero."""
    penalty = entry.penalty
    of_penalty = penalty is not None and penalty.__name__ in ("anchored_l1", "anchored_l2", "ewc")
    return of_penalty or entry.name.endswith(("_to_anchor", "_to_ema"))


def _carries_penalty(entry: Entry) -> bool:
    """Whether a step or a gradient has a penalty of single leaves; raw operators act where they are told to."""
    penalty = entry.penalty
    apart = penalty is not None and not penalty.couples_leaves
    return apart and ("steps" in entry.tx.stages or made(entry.tx, add_penalty))


#: Penalties whose gradient is a decay.
_RIDGES = ("l2", "half_l2", "elastic")


def _pulls(entry: Entry) -> Iterator[str]:
    """What a transform penalizes: decays are one kind, each penalty one of its own name."""
    if decay_of(entry.tx) is not None:
        yield "decay"
    penalty = entry.penalty
    if penalty is None:
        return
    parts = [penalty]
    if isinstance(penalty, Sum):  # A term with a mask of its own may act elsewhere than the next one.
        parts = [part.penalty for term in penalty.terms for part in term.parts() if part.mask is None]
    names = [part.__name__ for part in parts]
    yield from dict.fromkeys("decay" if name in _RIDGES else name for name in names)


def _penalized_twice(links: list[Entry]) -> Iterator[str]:
    for i, entry in enumerate(links):
        for pull in _pulls(entry):
            again = next((e for e in links[i + 1 :] if pull in _pulls(e) and _meet(entry, e)), None)
            twice = list(_pulls(entry)).count(pull) > 1
            if again is not None or twice:
                both = f"{entry.tx!r} twice" if again is None else f"{entry.tx!r} and again by {again.tx!r}"
                yield f"the same leaves {'decay' if pull == 'decay' else f'are penalized by {pull}'}, by {both}."
                return


def _lost_in_sixteen_bits(links: list[Entry]) -> Iterator[str]:
    for entry in links:
        if not _turns(entry.tx) or any(
            [made(tx, with_master_weights, with_stochastic_rounding) for tx in entry.around]
        ):
            continue
        narrow = [(name, w) for name, w in entry.leaves() if is_narrow(w.dtype)]
        if narrow:
            dtypes = {w.dtype for _, w in narrow}
            shares = [(torch.bfloat16, "bfloat16", 512), (torch.float16, "float16", 4096)]
            least = ", ".join([f"1/{share} of a weight in {name}" for dtype, name, share in shares if dtype in dtypes])
            yield (
                f"{entry.tx!r} makes steps of {listed(name for name, _ in narrow)}: what is smaller than {least} is "
                "rounded away, as is almost all decay. with_master_weights or with_stochastic_rounding around the "
                "optimizer keeps it."
            )
            return
