"""What a chain does, link by link, in words and formulas, on which leaves, and what is likely to be a mistake in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from funcreg.core._typing import Params
from funcreg.core.masks import chosen_by, keep, listed, mask_leaves
from funcreg.core.notation import plain
from funcreg.core.tree import broadcast, tree_leaves, tree_map, tree_paths
from funcreg.reports.report import readable
from funcreg.transforms.chains import named_chain
from funcreg.transforms.combine import freeze, masked, partition
from funcreg.transforms.ensemble import ensemble
from funcreg.transforms.factory_checks import check_transforms
from funcreg.transforms.hyperparams import Injected
from funcreg.transforms.mistakes import Entry, made, mistakes, penalized
from funcreg.transforms.monitoring import monitor
from funcreg.transforms.per_leaf import PerLeaf
from funcreg.transforms.transform import Transform


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
    stays while the step size does not, a mask that chooses nothing, decay of biases and scales, two decays of one leaf,
    a penalty that a preconditioner divides, zeros that are averaged, updates that go uphill, also those of leaves that
    a mask leaves to their raw gradients; leaves that `set_to_zero` does not hold, and those that a learning rate of 0
    never moves; NaN that becomes zero after a moment has kept it; clipping, noise and moments of each of those that
    `MultiSteps` gathers, and steps of sixteen-bit leaves that are rounded away; for a module also defaults that are
    meant for weights with their inputs first.

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
    entries = list(_walk(Entry(tx, 0, "", whole, ()), whole, faults))
    rows = [_row(entry, whole) for entry in entries]
    laid_out = [] if not isinstance(params, nn.Module) else list(_otherwise_laid_out(entries, params))
    return Description(rows, faults + mistakes(_in_order(entries), len(entries) > 1, whole) + laid_out)


# Link by link


def _walk(entry: Entry, whole: Params | None, faults: list[str]) -> Iterator[Entry]:
    tx, params = entry.tx, entry.params
    children = _children(tx)
    itself = _steps_itself(tx, children)
    seen, held, acts_on = params, entry.held, None
    if params is not None:
        chosen, frozen, acts = _chosen(entry, faults)
        acts_on = frozenset(_names(params, acts))
        if children:  # Which are asked about frozen leaves too: one of them freezes those.
            seen, held = keep(params, chosen), held | frozenset(_names(params, frozen))
    yield replace(entry, is_leaf=not children or itself, acts_on=acts_on)
    labels = _labels(tx, seen, faults) if made(tx, partition) else None
    parts = len(children) > 1 and not _joins(tx)
    for i, (place, child) in enumerate(children):
        under = seen
        if labels is not None and seen is not None:
            under = keep(seen, [str(label) == place for label in labels])
        elif tx.links or itself:
            under = params
        elif made(tx, ensemble) and seen is not None:
            under = tree_map(lambda w: w[0], seen)
        own = place or str(i + 1)
        inner = Entry(
            child,
            entry.depth + 1,
            own,
            under,
            # Two partitions by the same labels part in the same way, as far as is known.
            (*entry.branch, (tuple(name for name, _ in children), own)) if parts else entry.branch,
            (*entry.around, tx),
            chosen=entry.chosen or made(tx, masked, partition),
            held=held,
        )
        yield from _walk(inner, whole, faults)


def _joins(tx: Transform) -> bool:
    """Whether each of the transforms that it is made of gets the updates of the one before."""
    return bool(tx.links) or made(tx, named_chain)


def _steps_itself(tx: Transform, children: list[tuple[str, Transform]]) -> bool:
    """Whether a transform that is made of others makes a step downhill that none of these makes."""
    return bool(children) and "steps" in tx.stages and not any(["steps" in child.stages for _, child in children])


def _in_order(entries: list[Entry]) -> list[Entry]:
    """Transforms as they act: what makes a step of its own does so after those that it is made of."""

    def last(i: int) -> int:
        deeper = [each.depth > entries[i].depth for each in entries[i + 1 :]]
        return i + (deeper.index(False) if False in deeper else len(deeper))

    # After the last of these, which has no others in it.
    acts_at = lambda i: (last(i), -i) if entries[i].is_leaf else (i, -i)
    return [entries[i] for i in sorted(range(len(entries)), key=acts_at)]


def _children(tx: Transform) -> list[tuple[str, Transform]]:
    """What a transform is made of, with names and labels where there are some."""
    if made(tx, monitor):  # Measures are no links.
        return []
    if tx.links:
        return [("", link) for link in tx.links]
    if made(tx, ensemble):
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
        labels, seen = chosen_by(tx.made_by.arguments["param_labels"], params, "param_labels")
        return broadcast(labels, seen, "param_labels")
    except (TypeError, ValueError) as error:
        faults.append(f"{tx!r}: {error}")
        return [None] * len(tree_leaves(params))


def _names(params: Params, bools: list[bool]) -> list[str]:
    return [name for name, chosen in zip(tree_paths(params), bools, strict=True) if chosen]


def _chosen(entry: Entry, faults: list[str]) -> tuple[list[bool], list[bool], list[bool]]:
    """For each parameter whether a mask lets it through, whether it is frozen, and whether the transform acts on it.

    A mask that fits none of them is a mistake.
    """
    tx, params = entry.tx, entry.params
    free = [name not in entry.held for name in tree_paths(params)]
    none = [False] * len(free)
    try:
        frozen = none if tx.frozen is None else tx.frozen(params)
        if made(tx, freeze):
            return frozen, frozen, frozen
        # The mask of an optimizer is that of one of its links, which has it too.
        children = _children(tx)
        own = made(tx, masked) or not children or _steps_itself(tx, children)
        mask = entry.argument("mask") if own else None
        chosen = free
        if mask is not None:  # Which sees no frozen leaf.
            inside = iter(mask_leaves(mask, keep(params, free)))
            chosen = [f and next(inside) for f in free]
        if own:  # Masks of its terms, and patterns, may fit none of these either.
            penalized(replace(entry, acts_on=frozenset(_names(params, chosen))))
    except (TypeError, ValueError) as error:
        faults.append(f"{tx!r}: {error}")
        return none, [True] * len(free), none
    if made(tx, masked):
        return [c or z for c, z in zip(chosen, frozen, strict=True)], frozen, chosen
    return [True] * len(free), frozen, [c and not z for c, z in zip(chosen, frozen, strict=True)]


def _row(entry: Entry, whole: Params | None) -> Row:
    note = "" if entry.acts_on is None or not entry.is_leaf else _note(entry, whole)
    if note and made(entry.tx, freeze):
        note = f"holds {note}"
    elif note and "steps" in entry.tx.stages and entry.argument("mask") is not None:
        note = f"penalizes {note}, which take plain steps"
    if note and isinstance(entry.penalty, PerLeaf):
        note = f"{note}: {_parts(entry, entry.penalty)}"
    leaves = None if entry.acts_on is None else tuple(name for name in tree_paths(whole) if name in entry.acts_on)
    return Row(entry.depth, entry.place, repr(entry.tx), _what(entry.tx), leaves, note)


def _parts(entry: Entry, penalty: PerLeaf) -> str:
    """For each pattern of `per_leaf` how many leaves carry its penalty."""
    acting = keep(entry.params, [name in (entry.acts_on or ()) for name in tree_paths(entry.params)])
    owners, sizes, said = penalty.owners(acting), [w.numel() for _, w in entry.leaves()], []
    for part, pattern in [*enumerate(penalty.patterns()), (None, "no pattern")]:
        own = [size for size, owner in zip(sizes, owners, strict=True) if owner == part]
        if own or part is not None:
            said.append(f"{pattern} {len(own)} leaves, {sum(own)} numbers")
    return "; ".join(said)


def _what(tx: Transform) -> str:
    """The first paragraph of the documentation of what made a transform, and the formula that follows it."""
    documented = tx._update if tx.made_by is None else tx.made_by.function
    paragraphs = (inspect.getdoc(getattr(documented, "func", documented)) or "").split("\n\n")
    below = [paragraph for paragraph in paragraphs[1:2] if paragraph.startswith(".. math::")]
    return plain("\n".join([paragraphs[0], *below]))


def _note(entry: Entry, whole: Params) -> str:
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


# The layout of weights


def _otherwise_laid_out(entries: list[Entry], module: nn.Module) -> Iterator[str]:
    """Defaults of optax, for weights with their inputs first, on layers of torch, which have their outputs first."""
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    weights = {id(layer.weight) for layer in layers}
    first = {name for name, w in module.named_parameters() if id(w) in weights}
    for entry in entries:
        own = [(name, w) for name, w in entry.leaves() if name in first]
        if own and entry.name == "adaptive_grad_clip" and entry.argument("axis") is None:
            yield (
                f"{entry.tx!r} takes the last dimension for that of units, as optax does; of "
                f"{listed(name for name, _ in own)} it is the first. Write adaptive_grad_clip(..., axis=...), with "
                "three dots for the axis."
            )
        lengths = [name for name, w in own if w.ndim == 2 and w.shape[0] != w.shape[1]]
        given = entry.argument("muon_weight_dimension_numbers"), entry.argument("consistent_rms")
        if lengths and entry.name == "muon" and given == (None, None):
            yield (
                f"{entry.tx!r} takes the first dimension for that of inputs, as optax does; of {listed(lengths)} it is "
                "that of outputs, so that the steps of these have another length. Give "
                "muon_weight_dimension_numbers, with MuonDimensionNumbers(1, 0) for each matrix."
            )
