"""Transforms made of transforms: on some leaves, by label, or only when all is finite."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Mask, Params, Scalar, State, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import beside, compute, is_finite, reduce_leaves, scalar_device, total, widen
from funcreg.core.masks import Selection, chosen_by, hidden, keep, mask_leaves, merge
from funcreg.core.ranges import flags, number, whole_number
from funcreg.core.tree import broadcast, tree_leaves, tree_map, tree_paths
from funcreg.core.wording import type_of
from funcreg.transforms.factory_checks import check_selection, check_transforms, positive
from funcreg.transforms.holding import of_chosen, zeroed
from funcreg.transforms.transform import (
    Choice,
    EmptyState,
    Transform,
    around,
    counter,
    either,
    everywhere,
    memoryless,
    public_state,
    warn,
)

# Some leaves


@public_state
class MaskedState(NamedTuple):
    """The state of `masked`: it holds nothing for a leaf that is left out.

    Example:
        >>> masked(trace(0.9), {"w": False, "b": True}).init({"w": torch.zeros(2), "b": torch.zeros(1)})
        MaskedState(inner_state=TraceState(trace={'w': ABSENT, 'b': tensor([0.])}))
    """

    inner_state: State


@remembered
def masked(inner: Transform, mask: Mask, *, mask_compatible_extra_args: bool = False) -> Transform:
    r"""Apply a transform to some leaves; the updates of the others pass.

    The inner transform sees a tree without the other leaves, so that it keeps no state for them.

    Args:
        inner: Transform of the chosen leaves.
        mask: Tree of bools like the parameters, a prefix of one, or a function that makes it from parameters, such
            as `select("*.weight")`. True means apply.
        mask_compatible_extra_args: Whether extra arguments that are trees like the parameters are masked too. `grad`
            always is, and of `value_fn` the other leaves are where they are.

    Raises:
        TypeError: The mask is a string, or has a leaf that is no bool; the message names it.
        ValueError: The mask does not fit the parameters.

    Example:
        >>> tx = masked(scale(2.0), {"weight": True, "bias": False})
        >>> params = {"weight": torch.zeros(1), "bias": torch.zeros(1)}
        >>> tx.update({"weight": torch.ones(1), "bias": torch.ones(1)}, tx.init(params), params)[0]
        {'weight': tensor([2.]), 'bias': tensor([1.])}
    """
    check_transforms("masked", [inner])
    check_selection(mask)
    flags(mask_compatible_extra_args=mask_compatible_extra_args)

    def init(params: Params) -> MaskedState:
        return MaskedState(inner.begin(keep(params, mask_leaves(mask, params))))

    def update(updates: Updates, state: MaskedState, params: Params, **extra: Any) -> tuple[Updates, MaskedState]:
        bools = mask_leaves(mask, params)
        if mask_compatible_extra_args:
            names = tree_paths(params)
            extra = {key: keep(tree, bools) if tree_paths(tree) == names else tree for key, tree in extra.items()}
        extra = of_chosen(extra, params, bools)
        new, after = inner.update(keep(updates, bools), state.inner_state, keep(params, bools), **inner.accepted(extra))
        return merge(updates, new, bools), MaskedState(after)

    def spares(params: Params) -> list[bool]:
        bools = mask_leaves(mask, params)
        inside = iter(inner.spares(keep(params, bools)) if inner.spares is not None else [False] * sum(bools))
        return [next(inside) if chosen else True for chosen in bools]

    def within(choose: Choice) -> Choice:
        def chosen_within(params: Params) -> list[bool]:
            bools = mask_leaves(mask, params)
            inside = iter(choose(keep(params, bools)))
            return [next(inside) if chosen else False for chosen in bools]

        return chosen_within

    covers = inner.covers
    return around(
        inner,
        init,
        update,
        MaskedState,
        frozen=None if inner.frozen is None else within(inner.frozen),
        spares=spares,
        covers=covers if covers is None or mask is True else within(covers),
    )


@remembered
def freeze(mask: Mask) -> Transform:
    r"""Hold leaves where they are: their updates become 0.

    In a chain, at any place, a frozen leaf is as good as not there: no transform of the chain moves it, keeps state
    for it or counts it in a norm. A mask that is a function is asked once, about all leaves. Functions that are masks
    of other links are asked about the leaves that are left: choose by name, shape or module, not by the place in a
    list of leaves.

    Args:
        mask: Tree of bools like the parameters, a prefix of one, or a function. True means hold.

    Raises:
        ValueError: The mask does not fit; or it goes by the places of leaves, and stands in a wrapper in a chain, where
            it would be asked again about those that are left.

    Example:
        >>> tx = chain(freeze({"body": True, "head": False}), add_decayed_weights(0.1))
        >>> params = {"body": torch.ones(1), "head": torch.ones(1)}
        >>> tx.update({"body": torch.ones(1), "head": torch.ones(1)}, tx.init(params), params)[0]
        {'body': tensor([0.]), 'head': tensor([1.1000])}
    """
    check_selection(mask)

    def update(updates: Updates, state: State, params: Params) -> tuple[Updates, State]:
        held = mask_leaves(mask, params)
        return zeroed(updates, held), state

    def init(params: Params) -> EmptyState:
        mask_leaves(mask, params)  # A mask that does not fit is said here.
        return EmptyState()

    held = lambda params: mask_leaves(mask, params)
    tx = Transform(init, update, frozen=held, covers=held)
    tx.unheld = memoryless(lambda updates, params: updates)
    return tx


@remembered
def set_to_zero() -> Transform:
    r"""Replace updates by zeros.

    What comes later in a chain may still move the parameters; to hold them, use `freeze`.

    Example:
        >>> params = {"weight": torch.zeros(2)}
        >>> set_to_zero().update({"weight": torch.ones(2)}, EmptyState(), params)
        ({'weight': tensor([0., 0.])}, EmptyState())
    """
    return memoryless(lambda updates, params: tree_map(torch.zeros_like, updates), spares=everywhere, covers=everywhere)


@public_state
class PartitionState(NamedTuple):
    """The state of `partition`.

    Example:
        >>> partition({"all": trace(0.9)}, "all").init(torch.zeros(1))
        PartitionState(inner_states={'all': TraceState(trace=tensor([0.]))})
    """

    inner_states: dict[Hashable, State]  # By label.


@remembered
def partition(
    transforms: Mapping[Hashable, Transform], param_labels: Any, *, mask_compatible_extra_args: bool = False
) -> Transform:
    r"""Apply to each leaf the transform of its label.

    Args:
        transforms: From label to transform.
        param_labels: Tree of labels like the parameters, a prefix of one, or a function that makes it from
            parameters.
        mask_compatible_extra_args: Whether extra arguments that are trees like the parameters are divided too.

    Raises:
        ValueError: A leaf has a label without a transform; the message names both.

    Example:
        >>> tx = partition({"slow": scale(0.1), "fast": scale(1.0)}, {"body": "slow", "head": "fast"})
        >>> params = {"body": torch.zeros(1), "head": torch.zeros(1)}
        >>> tx.update({"body": torch.ones(1), "head": torch.ones(1)}, tx.init(params), params)[0]
        {'body': tensor([0.1000]), 'head': tensor([1.])}
    """
    _check_labelled(transforms)
    flags(mask_compatible_extra_args=mask_compatible_extra_args)
    transforms = dict(transforms)

    def labels(params: Params) -> list[Any]:
        return _labels(param_labels, params, transforms)

    def members(label: Hashable) -> Transform:
        return masked(
            transforms[label],
            Selection(lambda params: [value == label for value in labels(params)], optional=True),
            mask_compatible_extra_args=mask_compatible_extra_args,
        )

    parts = {label: members(label) for label in transforms}

    def init(params: Params) -> PartitionState:
        found = labels(params)
        if not callable(param_labels):  # A function may know labels that this tree has no use for.
            _warn_of_unused(parts, found, params)
        return PartitionState({label: tx.begin(params).inner_state for label, tx in parts.items()})

    def update(updates: Updates, state: PartitionState, params: Params, **extra: Any) -> tuple[Updates, PartitionState]:
        if set(state.inner_states) != set(parts):
            came = ", ".join(map(repr, state.inner_states))
            raise ValueError(
                f"partition of {', '.join(map(repr, parts))} got a state of {came}; was it made by its init?"
            )
        new = {}
        for label, tx in parts.items():
            updates, after = tx.update(updates, MaskedState(state.inner_states[label]), params, **tx.accepted(extra))
            new[label] = after.inner_state
        return updates, PartitionState(new)

    holding = [tx.frozen for tx in parts.values() if tx.frozen is not None]
    covers = [tx.covers for tx in parts.values() if tx.covers is not None]
    stepping = all([tx.covers is everywhere for tx in transforms.values()])

    def spares(params: Params) -> list[bool]:
        # A part spares what is not its own: spared by all is what its own part spares.
        choices = [tx.spares(params) for tx in parts.values() if tx.spares is not None]
        return [all(bools) for bools in zip(*choices, strict=True)]

    return Transform(
        init,
        update,
        frozen=either(*holding) if holding else None,
        state=PartitionState,
        descends=any(tx.descends for tx in parts.values()),
        spares=spares,
        stages=[stage for tx in parts.values() for stage in tx.stages],
        covers=everywhere if stepping else either(*covers) if covers else None,
        forwards_to=list(parts.values()),
    )


def _check_labelled(transforms: Any) -> None:
    """Raise an error for what is no dict from label to transform."""
    if not isinstance(transforms, Mapping):
        raise TypeError(
            f"partition got transforms as {type_of(transforms)}; expected a dict from label to transform, such "
            "as {'slow': sgd(0.01), 'fast': sgd(0.1)}"
        )
    if not transforms:
        raise ValueError("partition got no transforms; expected a dict from label to transform")
    if None in transforms:
        raise TypeError("partition has the label None, which stands for no leaf in a tree; expected a string, say")
    for label, tx in transforms.items():
        if not isinstance(tx, Transform):
            check_transforms(f"partition, labelled {label!r},", [tx])


def _labels(param_labels: Any, params: Params, transforms: Mapping[Hashable, Transform]) -> list[Any]:
    """The label of each leaf."""
    found, params = chosen_by(param_labels, params, "param_labels")
    values = broadcast(found, params, "param_labels")
    for i, value in enumerate(values):
        if not isinstance(value, Hashable) or value not in transforms:
            raise ValueError(
                f"leaf '{tree_paths(params)[i]}' has the label {value!r}; expected one of "
                f"{', '.join(map(repr, transforms))}, for which there is a transform"
            )
    return values


def _warn_of_unused(labels: Iterable[Hashable], found: Sequence[Hashable], params: Params) -> None:
    unused = [label for label in labels if label not in found]
    if found and unused and not hidden(params):
        warn(
            f"no leaf has the label {' or '.join(map(repr, unused))}, whose transform does nothing; leaves have "
            f"{', '.join(dict.fromkeys(map(repr, found)))}. Is a label misspelled?"
        )


# Only when all is finite


@public_state
class ApplyIfFiniteState(NamedTuple):
    """The state of `apply_if_finite`.

    Example:
        >>> apply_if_finite(identity(), 3).init(torch.zeros(1)).total_notfinite
        tensor(0, dtype=torch.int32)
    """

    notfinite_count: Tensor  # Updates in a row that were not finite, int32.
    last_finite: Tensor  # Whether the last update was finite, bool.
    total_notfinite: Tensor  # Updates in all that were not finite, int32.
    inner_state: State


@remembered
def apply_if_finite(inner: Transform, max_consecutive_errors: int) -> Transform:
    r"""Skip an update that has an infinity or a NaN: updates become 0 and the inner state stays.

    Gradients of a loss that was multiplied by a scale, so that small ones are not lost in float16, are divided by it
    if `update` gets it, `loss_scale=scale`, in float32 and before anything else: an infinity that the scale made is
    seen, and `state.last_finite` says whether to lower it.

    Args:
        inner: Transform of the updates that are finite.
        max_consecutive_errors: Number of updates in a row that are skipped; one more is let through, so that a
            model that has diverged shows it.

    Example:
        >>> tx, params = apply_if_finite(trace(0.9), 3), {"weight": torch.zeros(1)}
        >>> updates, state = tx.update({"weight": torch.tensor([float("inf")])}, tx.init(params), params)
        >>> updates, state.total_notfinite
        ({'weight': tensor([0.])}, tensor(1, dtype=torch.int32))
        >>> tx.update({"weight": torch.tensor([512.0])}, tx.init(params), params, loss_scale=256.0)[0]
        {'weight': tensor([2.])}
    """
    check_transforms("apply_if_finite", [inner])
    if isinstance(max_consecutive_errors, bool) or not isinstance(number(max_consecutive_errors), int):
        raise TypeError(f"max_consecutive_errors is {max_consecutive_errors!r}; expected a whole number of at least 0")
    max_consecutive_errors = whole_number("max_consecutive_errors", max_consecutive_errors, 0)

    def init(params: Params) -> ApplyIfFiniteState:
        good = torch.ones((), dtype=torch.bool, device=scalar_device(params))
        return ApplyIfFiniteState(counter(params), good, counter(params), inner.begin(params))

    def update(
        updates: Updates,
        state: ApplyIfFiniteState,
        params: Params,
        *,
        loss_scale: Scalar | None = None,
        **extra: Any,
    ) -> tuple[Updates, ApplyIfFiniteState]:
        if loss_scale is not None:
            positive(loss_scale=loss_scale)
            updates = compute(lambda u, s: u / s, tree_map(widen, updates), hyper=(loss_scale,))
        wrong = total(reduce_leaves(lambda u: ~is_finite(u), updates)).to(state.last_finite.device)
        finite = wrong == 0
        errors = torch.where(finite, torch.zeros_like(state.notfinite_count), state.notfinite_count + 1)
        go = finite | (errors > max_consecutive_errors)
        new, after = inner.update(updates, state.inner_state, params, **inner.accepted(extra))
        new = compute(lambda u, go: torch.where(go, u, torch.zeros_like(u)), new, hyper=(go,))
        after = pick(go, after, state.inner_state)
        count = state.total_notfinite + (~finite).to(torch.int32)
        return new, ApplyIfFiniteState(errors, finite, count, after)

    return around(inner, init, update, ApplyIfFiniteState)


def pick(chosen: Tensor, new: Any, old: Any) -> Any:
    """A tree where a condition holds, else another one like it, whose dtypes it takes."""
    for name, x in zip(tree_paths(old), tree_leaves(old), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"'{name}' of a state is {x!r}; expected a tensor, for a wrapper chooses between this and the next one "
                "by a condition that it does not read. Does init of a transform of yours make it? torch.tensor(...)."
            )
    return tree_map(lambda a, b: torch.where(beside(chosen, b), a.to(b.dtype), b), new, old)
