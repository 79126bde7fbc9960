"""What a chain does, link by link, in words and formulas, on which leaves, and what is likely to be a mistake in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from funcreg._typing import Params
from funcreg.combine import freeze, masked, partition
from funcreg.constraints import Constraint
from funcreg.construction import written
from funcreg.decay import arguments_of, decay_of
from funcreg.ensemble import ensemble
from funcreg.hyperparams import Injected
from funcreg.notation import plain
from funcreg.penalty import Penalty
from funcreg.regularizing import proximal, soft_threshold
from funcreg.report import readable
from funcreg.scaling import ema, scale_by_trust_ratio, trace
from funcreg.transform import Transform, check_transforms
from funcreg.tree import broadcast, chosen_by, keep, listed, mask_leaves, tree_leaves, tree_map, tree_paths


class Row(NamedTuple):
    """One transform of a description."""

    depth: int  # 0 for the whole, 1 for its links, 2 for theirs.
    place: str  # Number, name or label among its neighbours; empty for the whole.
    link: str  # As it was written.
    what: str  # What it does, with its formula; empty if that is not known.
    leaves: tuple[str, ...] | None  # Names of the leaves on which it acts; None without parameters.
    note: str  # Which leaves and how many numbers those are, in words.


@dataclass(frozen=True, repr=False)
class Description:
    """What `describe` returns; it prints as a text.

    Args:
        rows: One for each transform, from the outermost in: depth, place, link, what, leaves, note.
        warnings: What is likely to be a mistake, a sentence each.

    Example:
        >>> found = describe(prox_sgd(0.1, l1))
        >>> found.rows[0].link, found.warnings
        ('prox_sgd(0.1, l1)', [])
    """

    rows: list[Row]
    warnings: list[str]

    def __str__(self) -> str:
        lines = [line for row in self.rows for line in _written(row)]
        return "\n".join([*lines, *(f"Warning: {warning}" for warning in self.warnings)])

    __repr__ = __str__


def _written(row: Row) -> list[str]:
    margin = "    " * row.depth
    head = f"{row.place}. {row.link}" if row.place.isdigit() else f"{row.place}: {row.link}" if row.place else row.link
    return [f"{margin}{head}", *(f"{margin}    {text}" for text in (row.what, row.note) if text)]


def describe(tx: Transform, params: Params | nn.Module | None = None) -> Description:
    r"""Say what a transform does, link by link, in words and formulas, and warn of known mistakes.

    Among them: decay before Adam where that of AdamW was meant, a proximal step that is not last, or whose threshold
    stays while the step size does not, a mask that chooses nothing, decay of biases and scales, two decays of one leaf.

    Args:
        tx: Any transform: an optimizer, a chain, a wrapper, or one of your own, which is shown by its name.
        params: Tree of tensors, or a module, whose parameters are taken: then leaves are named and counted.

    Example:
        >>> params = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
        >>> describe(chain(trace(0.9), add_decayed_weights(0.1, mask=matrices), scale_by_learning_rate(0.1)), params)
        chain(trace(0.9), add_decayed_weights(0.1, mask=matrices), scale_by_learning_rate(0.1))
            Apply transforms one after another; each gets the updates of the one before.
            1. trace(0.9)
                Replace updates by their decayed sum, mₜ = uₜ + β mₜ₋₁: the momentum of torch.optim.SGD.
                all 2 leaves, 8 numbers
            2. add_decayed_weights(0.1, mask=matrices)
                Add λ w to updates, the gradient of λ/2 ‖w‖₂².
                1 of 2 leaves, 6 of 8 numbers: weight; not bias
            3. scale_by_learning_rate(0.1)
                Multiply updates by minus the learning rate, u' = -ηₜ u: the last step of a descent.
                all 2 leaves, 8 numbers
        >>> describe(sgd(0.1)).warnings
        []
    """
    check_transforms("describe", [tx])
    whole = None if params is None else readable("describe", params)
    faults: list[str] = []
    entries = list(_walk(_Entry(tx, 0, "", whole, ()), whole, faults))
    rows = [_row(entry, whole) for entry in entries]
    return Description(rows, faults + _mistakes([entry for entry in entries if entry.is_leaf], len(entries) > 1))


# Link by link


@dataclass(frozen=True)
class _Entry:
    """A transform where it stands: what it gets to see of the parameters, and under which labels."""

    tx: Transform
    depth: int
    place: str
    params: Params | None  # Those that it is given; None if there are none.
    branch: tuple[str, ...]  # Labels on the way to it: two branches of a partition never meet.
    is_leaf: bool = True  # Whether it is made of no others.
    held: frozenset[str] = frozenset()  # Names of leaves that another link freezes.
    acts_on: frozenset[str] | None = None  # Names of leaves; None without parameters.

    @property
    def name(self) -> str:
        made_by = self.tx.made_by
        return "" if made_by is None else made_by.function.__name__

    def argument(self, name: str) -> Any:
        return None if self.tx.made_by is None else arguments_of(self.tx.made_by).get(name)


def _walk(entry: _Entry, whole: Params | None, faults: list[str]) -> Iterator[_Entry]:
    tx, params = entry.tx, entry.params
    children = _children(tx)
    chosen = None if params is None else _chosen(entry, faults)
    seen = None if params is None or chosen is None else keep(params, chosen)
    acts_on = None if seen is None else frozenset(tree_paths(seen))
    held = entry.held
    if tx.links and acts_on is not None:
        held |= frozenset(tree_paths(params)) - acts_on
    yield replace(entry, is_leaf=not children, acts_on=acts_on)
    labels = _labels(tx, seen, faults) if _made(tx, partition) else None
    for i, (place, child) in enumerate(children):
        under = seen
        if labels is not None and seen is not None:
            under = keep(seen, [str(label) == place for label in labels])
        elif tx.links:
            under = params  # Of which no link but the one that freezes them sees those held.
        elif _made(tx, ensemble) and seen is not None:
            under = tree_map(lambda w: w[0], seen)
        branch = (*entry.branch, place) if _made(tx, partition) else entry.branch
        inner = _Entry(child, entry.depth + 1, place or str(i + 1), under, branch, held=held)
        yield from _walk(inner, whole, faults)


def _made(tx: Transform, function: Callable[..., Transform]) -> bool:
    return tx.made_by is not None and tx.made_by.function is function


def _children(tx: Transform) -> list[tuple[str, Transform]]:
    """What a transform is made of, with names and labels where there are some."""
    if tx.links:
        return [("", link) for link in tx.links]
    if _made(tx, ensemble):
        return [("each member, here the first", part) for part in tx.forwards_to]
    if tx.made_by is None:
        return [("", part) for part in tx.forwards_to]
    if isinstance(tx.made_by.function, Injected):  # What a factory makes is in no argument.
        return [("", tx.made_by.function.factory(*tx.made_by.args, **tx.made_by.kwargs))]
    return _named(None, [*tx.made_by.args, *tx.made_by.kwargs.values()])


def _named(name: Any, value: Any) -> list[tuple[str, Transform]]:
    if isinstance(value, Transform):
        return [("" if name is None else str(name), value)]
    if isinstance(value, dict):
        return [found for key, each in value.items() for found in _named(key, each)]
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        if len(value) == 2 and isinstance(value[0], str):
            return _named(*value)
        return [found for each in value for found in _named(None, each)]
    return []


def _labels(tx: Transform, params: Params | None, faults: list[str]) -> list[Any] | None:
    if params is None or tx.made_by is None:
        return None
    try:
        labels, seen = chosen_by(arguments_of(tx.made_by)["param_labels"], params, "param_labels")
        return broadcast(labels, seen, "param_labels")
    except (TypeError, ValueError) as error:
        faults.append(f"{tx!r}: {error}")
        return [None] * len(tree_leaves(params))


def _chosen(entry: _Entry, faults: list[str]) -> list[bool]:
    """On which of its parameters a transform acts; a mask that fits none of them is a mistake."""
    tx, params = entry.tx, entry.params
    every = [True] * len(tree_leaves(params))
    try:
        if _made(tx, freeze) and tx.frozen is not None:
            return tx.frozen(params)
        # The mask of an optimizer is that of one of its links, which has it too.
        mask = entry.argument("mask") if _made(tx, masked) or not _children(tx) else None
        bools = every if mask is None else mask_leaves(mask, params)
        held = every if tx.frozen is None or _made(tx, masked) else [not h for h in tx.frozen(params)]
    except (TypeError, ValueError) as error:
        faults.append(f"{tx!r}: {error}")
        return [False] * len(every)
    free = [name not in entry.held for name in tree_paths(params)]
    return [all(each) for each in zip(bools, held, free, strict=True)]


def _row(entry: _Entry, whole: Params | None) -> Row:
    note = "" if entry.acts_on is None or not entry.is_leaf else _note(entry, whole)
    if note and _made(entry.tx, freeze):
        note = f"holds {note}"
    elif note and "steps" in entry.tx.stages and entry.argument("mask") is not None:
        note = f"penalizes {note}, which take plain steps"
    leaves = None if entry.acts_on is None else tuple(name for name in tree_paths(whole) if name in entry.acts_on)
    return Row(entry.depth, entry.place, repr(entry.tx), _what(entry.tx), leaves, note)


def _what(tx: Transform) -> str:
    """The first paragraph of the documentation of what made a transform, and the formula that follows it."""
    documented = tx._update if tx.made_by is None else tx.made_by.function
    paragraphs = (inspect.getdoc(getattr(documented, "func", documented)) or "").split("\n\n")
    below = [paragraph for paragraph in paragraphs[1:2] if paragraph.startswith(".. math::")]
    return plain("\n".join([paragraphs[0], *below]))


def _note(entry: _Entry, whole: Params) -> str:
    names, leaves = tree_paths(whole), tree_leaves(whole)
    acts_on = entry.acts_on or frozenset()
    chosen = [name for name in names if name in acts_on]
    numbers = sum(w.numel() for w in leaves)
    if len(chosen) == len(names):
        return f"all {len(names)} leaves, {numbers} numbers"
    if not chosen:
        return "no leaf"
    some = sum(w.numel() for name, w in zip(names, leaves, strict=True) if name in acts_on)
    others = listed(name for name in names if name not in acts_on)
    return f"{len(chosen)} of {len(names)} leaves, {some} of {numbers} numbers: {listed(chosen)}; not {others}"


# Mistakes


def _meet(a: _Entry, b: _Entry) -> bool:
    """Whether two transforms act on one leaf, as far as is known."""
    if a.acts_on is not None and b.acts_on is not None:
        return bool(a.acts_on & b.acts_on)
    return all(x == y for x, y in zip(a.branch, b.branch, strict=False))


def _mistakes(entries: list[_Entry], several: bool) -> list[str]:
    """What is likely to be wrong with transforms in their order."""
    found = [
        *_decay_before_a_denominator(entries),
        *_changes_after_landing(entries),
        *_constant_thresholds(entries),
        *_decay_of_vectors(entries),
        *_penalized_twice(entries),
        *_out_of_order(entries),
    ]
    known = all(entry.tx.made_by is not None and not callable(entry.tx.rate) for entry in entries)
    steps = any({"steps", "flips"} & set(entry.tx.stages) for entry in entries)
    if several and known and not steps:
        found.append(
            "no link has a learning rate that turns the sign: applied as they are, updates go uphill. End with "
            "scale_by_learning_rate."
        )
    return found


def _divides(entry: _Entry) -> bool:
    """Whether a transform divides updates by a size of their own, so that a factor of all is lost."""
    own = entry.name.startswith("scale_by_") and entry.tx.rate is None and not _made(entry.tx, scale_by_trust_ratio)
    return entry.tx.metric is not None or own


def _decay_before_a_denominator(entries: list[_Entry]) -> Iterator[str]:
    for i, entry in enumerate(entries):
        if decay_of(entry.tx) is None or tuple(entry.tx.stages) != ("adds",):
            continue
        later = next((each for each in entries[i + 1 :] if _divides(each) and _meet(entry, each)), None)
        if later is not None:
            yield (
                f"{entry.tx!r} stands before {later.tx!r}, which divides it by the size of the gradients: weights with "
                "large gradients decay less. If the decay of AdamW was meant, put it between that and the learning "
                "rate, or write with_weight_decay(..., 'decoupled', ...)."
            )


def _changes_after_landing(entries: list[_Entry]) -> Iterator[str]:
    for i, entry in enumerate(entries):
        if "lands" not in entry.tx.stages:
            continue
        later = [each for each in entries[i + 1 :] if _changes(each) and _meet(entry, each)]
        if later:
            scales = " scales or clips" if _scales(later[0]) else " changes"
            yield (
                f"{later[0].tx!r} stands after {entry.tx!r} and{scales} its updates, which loses exact zeros and what "
                "lies in a set. Put what lands last."
            )


def _changes(entry: _Entry) -> bool:
    tx = entry.tx
    unit = isinstance(tx.rate, (int, float)) and tx.rate == 1.0 and "flips" not in tx.stages
    return "lands" not in tx.stages and tx.frozen is None and not unit


def _scales(entry: _Entry) -> bool:
    words = ("clip", "adaptive_grad_clip", "normalize", "scale")
    return "scales" in entry.tx.stages or entry.name.startswith(words)


def _constant_thresholds(entries: list[_Entry]) -> Iterator[str]:
    for i, entry in enumerate(entries):
        step = entry.argument("threshold" if _made(entry.tx, soft_threshold) else "step")
        raw = _made(entry.tx, soft_threshold) or _made(entry.tx, proximal)
        if not raw or callable(step) or isinstance(entry.argument("penalty"), Constraint):
            continue
        before = [each for each in entries[:i] if _meet(entry, each)]
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
        if reasons:
            yield (
                f"{entry.tx!r} solves a problem of another strength than it seems, because {', and '.join(reasons)}. "
                "prox_sgd and prox_adam scale it as they must."
            )


def _decay_of_vectors(entries: list[_Entry]) -> Iterator[str]:
    for entry in entries:
        if decay_of(entry.tx) is None or entry.acts_on is None:
            continue
        names = [
            name
            for name, w in zip(tree_paths(entry.params), tree_leaves(entry.params), strict=True)
            if w.ndim < 2 and name in entry.acts_on
        ]
        if names:
            yield (
                f"{entry.tx!r} decays {listed(names)}, of fewer than two dimensions: biases and scales of "
                "normalizations are left alone by mask=matrices."
            )


#: Penalties whose gradient is a decay.
_RIDGES = ("l2", "half_l2", "elastic")


def _pulls(entry: _Entry) -> Iterator[str]:
    """What a transform penalizes: decays are one kind, each penalty one of its own name."""
    if decay_of(entry.tx) is not None:
        yield "decay"
    penalty = entry.argument("penalty")
    if isinstance(penalty, Penalty) and not isinstance(penalty, Constraint):
        yield "decay" if penalty.__name__ in _RIDGES else penalty.__name__


def _penalized_twice(entries: list[_Entry]) -> Iterator[str]:
    for i, entry in enumerate(entries):
        for pull in _pulls(entry):
            again = next((e for e in entries[i + 1 :] if pull in _pulls(e) and _meet(entry, e)), None)
            twice = list(_pulls(entry)).count(pull) > 1
            if again is not None or twice:
                both = f"{entry.tx!r} twice" if again is None else f"{entry.tx!r} and again by {again.tx!r}"
                yield f"the same leaves {'decay' if pull == 'decay' else f'are penalized by {pull}'}, by {both}."
                return


def _out_of_order(entries: list[_Entry]) -> Iterator[str]:
    for i, entry in enumerate(entries):
        after_step = [e for e in entries[:i] if "steps" in e.tx.stages and _meet(entry, e)]
        if after_step and "adds" in entry.tx.stages and "steps" not in entry.tx.stages:
            yield f"{entry.tx!r} adds a gradient to the step of {after_step[-1].tx!r}, and goes uphill. Put it before."
        early = [e for e in entries[:i] if "follows" in e.tx.stages and _meet(entry, e)]
        if early and "steps" in entry.tx.stages:
            yield f"{early[0].tx!r} stands before {entry.tx!r}, which turns its sign: it goes uphill. Put it after."
