"""Wrappers: when a transform acts, on how many steps together, on which leaves, on which layout.

A wrapper computes its transform at every step and chooses by `torch.where`: nothing branches on a tensor, so it is the
same eager, under vmap and in one graph. What is not chosen has no effect, also where it is NaN.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Params, Scalar, Schedule, State, Updates
from funcreg.core.construction import Call, remembered
from funcreg.core.leafwise import (
    beside,
    compute,
    compute_wide,
    gathered,
    increment,
    is_finite,
    reduce_leaves,
    scalar_device,
    spread_like,
    squared,
    total,
    zeros,
)
from funcreg.core.ranges import check_range, flags, number, whole_number
from funcreg.core.tree import tree_leaves, tree_map
from funcreg.core.undocumented import is_compiling
from funcreg.core.wording import type_of
from funcreg.transforms.chains import chain
from funcreg.transforms.combine import freeze, partition, pick
from funcreg.transforms.factory_checks import check_transforms, dtypes
from funcreg.transforms.holding import as_seen
from funcreg.transforms.transform import (
    Choice,
    Transform,
    around,
    at_step,
    counter,
    everywhere,
    init_empty_state,
    public_state,
    warn,
)

#: optax's older name of `partition`.
multi_transform = partition


# What wrappers are made of


class Named(Transform):
    """Stands among the transforms that a wrapper forwards to for extra arguments that the wrapper takes itself."""

    def __init__(self, accepts: Callable[[str], bool]) -> None:
        super().__init__(init_empty_state, lambda updates, state, params: (updates, state))
        self._accepts = accepts

    def accepts(self, name: str) -> bool:
        """Whether it takes an extra argument of this name."""
        return self._accepts(name)


def or_zeros(chosen: Tensor, updates: Updates) -> Updates:
    """Updates where a condition holds, else zeros: not a product, which would be NaN where an update is."""
    return tree_map(lambda u: torch.where(beside(chosen, u), u, torch.zeros_like(u)), updates)


def decision(value: Any, params: Params, said: str) -> Tensor:
    """What a user's function decided, as a tensor of one bool."""
    value = number(value)
    if isinstance(value, bool):
        return torch.full((), value, dtype=torch.bool, device=scalar_device(params))
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.ndim:
        came = f"a tensor of {value.dtype} and shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{said} returned {came}; expected one bool, or a tensor of one bool without dimensions")
    return value


def named_by(function: Callable[..., Any], extra: dict[str, Any], first: int) -> dict[str, Any]:
    """Those of some extra arguments that a function names after its first parameters or, with `**`, all."""
    parameters = list(inspect.signature(function).parameters.values())
    if any([p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters]):
        return extra
    names = [p.name for i, p in enumerate(parameters) if i >= first or p.kind is inspect.Parameter.KEYWORD_ONLY]
    return {name: extra[name] for name in names if name in extra}


def check_function(name: str, function: Any, expected: str) -> None:
    """Raise a TypeError for what is given as a function, but is none."""
    if not callable(function) or isinstance(function, type) or isinstance(getattr(function, "kind", None), str):
        raise TypeError(f"{name} is {function!r}; expected {expected}")


def check_period(name: str, value: Any) -> None:
    """Raise an error for what is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(number(value), int):
        raise TypeError(f"{name} is {value!r}; expected a whole number of at least 1")
    whole_number(name, value)


# At some steps


@public_state
class ConditionallyTransformState(NamedTuple):
    """The state of `conditionally_transform`.

    Example:
        >>> conditionally_transform(scale(2.0), lambda step: step > 5).init(torch.zeros(1))
        ConditionallyTransformState(inner_state=EmptyState(), step=tensor(0, dtype=torch.int32))
    """

    inner_state: State
    step: Tensor  # Number of updates made, int32.


@public_state
class ConditionallyMaskState(NamedTuple):
    """The state of `conditionally_mask`.

    Example:
        >>> conditionally_mask(scale(2.0), lambda step: step > 5).init(torch.zeros(1))
        ConditionallyMaskState(step=tensor(0, dtype=torch.int32), inner_state=EmptyState())
    """

    step: Tensor  # Number of updates made, int32.
    inner_state: State


@remembered
def conditionally_transform(
    inner: Transform, should_transform_fn: Callable[..., Any], forward_extra_args: bool = False
) -> Transform:
    r"""Apply a transform at the steps for which a function says so; at the others updates pass, and its state stays.

    For what begins later, or acts now and then: a threshold after a warm-up, a projection every tenth step; with
    `freeze` at the end of a chain, leaves that are held at first. For updates of zero at the other steps, take
    `conditionally_mask`.

    Args:
        inner: Transform of those steps.
        should_transform_fn: From the number of updates made, a 0-dim int32 tensor, to a bool or a tensor of one.
        forward_extra_args: Whether that function gets those extra arguments that it names, such as `value`.

    Raises:
        TypeError: The function returned something else than one bool.

    Example:
        >>> tx = conditionally_transform(soft_threshold(0.5), lambda step: step >= 1)
        >>> params, still = {"w": torch.tensor([0.25, 2.0])}, {"w": torch.zeros(2)}
        >>> updates, state = tx.update(still, tx.init(params), params)
        >>> apply_updates(params, updates)
        {'w': tensor([0.2500, 2.0000])}
        >>> updates, state = tx.update(still, state, params)
        >>> apply_updates(params, updates)
        {'w': tensor([0.0000, 1.5000])}
    """
    asked = _Condition("conditionally_transform", inner, should_transform_fn, forward_extra_args)
    if "steps" in inner.stages or "flips" in inner.stages:
        warn(
            f"conditionally_transform got {inner!r}, which turns gradients into steps downhill: at the other steps "
            "gradients pass as they are, and go uphill. Take conditionally_mask, whose updates are zero there."
        )
    tx = _at_its_steps(inner, asked, ConditionallyTransformState, pick)
    tx.frozen = None  # What it freezes is held at its steps alone.
    return tx


@remembered
def conditionally_mask(
    inner: Transform, should_transform_fn: Callable[..., Any], forward_extra_args: bool = False
) -> Transform:
    r"""Apply a transform at the steps for which a function says so; at the others updates are 0, and its state stays.

    Args:
        inner: Transform of those steps, such as a whole optimizer.
        should_transform_fn: From the number of updates made, a 0-dim int32 tensor, to a bool or a tensor of one.
        forward_extra_args: Whether that function gets those extra arguments that it names, such as `value`.

    Raises:
        TypeError: The function returned something else than one bool.

    Example:
        Every second step, and never where the loss is huge:

        >>> tx = conditionally_mask(sgd(0.1), lambda step, value: (step % 2 == 1) & (value < 1e3), True)
        >>> params, grads = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
        >>> updates, state = tx.update(grads, tx.init(params), params, value=torch.tensor(2.0))
        >>> updates
        {'w': tensor([0.])}
        >>> tx.update(grads, state, params, value=torch.tensor(2.0))[0]
        {'w': tensor([-0.1000])}
    """
    asked = _Condition("conditionally_mask", inner, should_transform_fn, forward_extra_args)
    return _at_its_steps(inner, asked, ConditionallyMaskState, lambda go, new, updates: or_zeros(go, new))


def _at_its_steps(
    inner: Transform, asked: _Condition, state_of: type[Any], chosen: Callable[..., Updates]
) -> Transform:
    """A transform at the steps at which a condition holds.

    Args:
        inner: The transform, whose state stays at the other steps.
        asked: The condition.
        state_of: What makes a state, of the number of updates made and the state inside.
        chosen: From whether it holds, new updates and those that came to the ones that are let through.
    """

    def init(params: Params) -> State:
        return state_of(step=counter(params), inner_state=inner.begin(params))

    def update(updates: Updates, state: Any, params: Params, **extra: Any) -> tuple[Updates, State]:
        go = asked(state.step, params, extra)
        new, after = inner.update(updates, state.inner_state, params, **inner.accepted(extra))
        after = pick(go, after, state.inner_state)
        return chosen(go, new, updates), state_of(step=increment(state.step), inner_state=after)

    return around(inner, init, update, state_of, stages=["counts"], also=asked.takes)


class _Condition:
    """A user's function of the step, and of extra arguments if they are forwarded."""

    def __init__(self, what: str, inner: Any, function: Any, forward: bool) -> None:
        check_transforms(what, [inner])
        check_function("should_transform_fn", function, "a function of the number of updates made, to a bool")
        flags(forward_extra_args=forward)
        self._function, self._forward = function, forward
        takes = Named(lambda name: name in named_by(function, {name: None}, 1))
        self.takes: list[Transform] = [takes] if forward else []

    def __call__(self, step: Tensor, params: Params, extra: dict[str, Any]) -> Tensor:
        given = named_by(self._function, extra, 1) if self._forward else {}
        return decision(self._function(step, **given), params, "should_transform_fn")


# Several steps together


def skip_not_finite(updates: Updates, gradient_step: Any, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    """Whether an update has an infinity or a NaN: a rule by which `MultiSteps` skips gradients.

    Args:
        updates: The gradients of one call.
        gradient_step: Number of real steps made, which makes no difference.
        params: The parameters, which make none.

    Example:
        >>> skip_not_finite({"w": torch.tensor([float("nan"), 1.0])}, 0, None)
        (tensor(True), {'should_skip': tensor(True), 'num_not_finite': tensor(1)})
    """
    bad = total(reduce_leaves(lambda u: ~is_finite(u), updates))
    return bad > 0, {"should_skip": bad > 0, "num_not_finite": bad}


def skip_large_updates(
    updates: Updates, gradient_step: Any, params: Params, max_squared_norm: Scalar | Schedule
) -> tuple[Tensor, dict[str, Tensor]]:
    """Whether the squared norm of an update is too large, or NaN: a rule by which `MultiSteps` skips gradients.

    Args:
        updates: The gradients of one call.
        gradient_step: Number of real steps made.
        params: The parameters, which make no difference.
        max_squared_norm: Squared norms of at least this are skipped: number, tensor, or schedule of the real steps.
            `functools.partial(skip_large_updates, max_squared_norm=...)` is what `MultiSteps` takes.

    Example:
        >>> skip_large_updates({"w": torch.tensor([3.0, 4.0])}, 0, None, max_squared_norm=30.0)
        (tensor(False), {'should_skip': tensor(False), 'norm_squared': tensor(25.)})
    """
    norm = total(reduce_leaves(squared, updates))
    large = ~(norm < beside(at_step(max_squared_norm, gradient_step), norm))
    return large, {"should_skip": large.clone(), "norm_squared": norm}


@public_state
class MultiStepsState(NamedTuple):
    """The state of `MultiSteps`.

    Example:
        >>> MultiSteps(sgd(0.1), 4).init(torch.zeros(1)).mini_step
        tensor(0, dtype=torch.int32)
    """

    mini_step: Tensor  # Number of gradients since the last real step, int32.
    gradient_step: Tensor  # Number of real steps, int32.
    inner_opt_state: State
    acc_grads: Params  # Mean, or sum, of the gradients since the last real step.
    skip_state: Any  # What `should_skip_update_fn` said of the last gradient.
    updated: Tensor  # Whether the last call made a real step, bool.


class MultiSteps(Transform):
    r"""One step of a transform for every k gradients, with their mean; zeros at the calls between.

    The same as a k times larger batch. What stands inside counts once a real step: a penalty, weight decay, a prox
    with its exact zeros, schedules. A prox or a decay that stands after it in a chain would act at every call.

    Extra arguments reach the transform inside with the values of the last of the k calls. It is a `Transform`, in
    chains, masks and `fuse` as well.

    Args:
        opt: Transform of the real steps, such as a whole optimizer.
        every_k_schedule: k: whole number of at least 1, tensor, or function of the number of real steps made.
        use_grad_mean: Whether gradients are averaged; else they are summed.
        should_skip_update_fn: From gradients, number of real steps and parameters to a pair: whether to leave this
            gradient out, as if the call had not been, and a tree of tensors that is kept in `skip_state`. Such as
            `skip_not_finite`. None to take all.
        accumulator_dtype: Dtype of the mean; by default that of the parameter, float32 for 16-bit ones. optax's
            default is float32 for all, which rounds gradients of float64.

    Raises:
        TypeError: The function that decides returned something else than a pair of one bool and a tree.

    Example:
        >>> tx, params = MultiSteps(sgd(0.1), 2), {"w": torch.zeros(1)}
        >>> updates, state = tx.update({"w": torch.tensor([1.0])}, tx.init(params), params)
        >>> updates, tx.has_updated(state)
        ({'w': tensor([0.])}, tensor(False))
        >>> updates, state = tx.update({"w": torch.tensor([3.0])}, state, params)
        >>> updates, tx.has_updated(state)
        ({'w': tensor([-0.2000])}, tensor(True))
    """

    def __init__(
        self,
        opt: Transform,
        every_k_schedule: Hyper | Schedule,
        use_grad_mean: bool = True,
        should_skip_update_fn: Callable[..., Any] | None = None,
        accumulator_dtype: torch.dtype | None = None,
    ) -> None:
        check_transforms("MultiSteps", [opt])
        _check_k("every_k_schedule", every_k_schedule)
        flags(use_grad_mean=use_grad_mean)
        if should_skip_update_fn is not None:
            expected = "a function of updates, gradient_step and params, such as skip_not_finite"
            check_function("should_skip_update_fn", should_skip_update_fn, expected)
        dtypes(accumulator_dtype=accumulator_dtype)
        self.inner_opt = opt
        self._every, self._mean, self._skips = every_k_schedule, use_grad_mean, should_skip_update_fn
        self._dtype = accumulator_dtype
        super().__init__(
            self._begin,
            self._advance,
            frozen=opt.frozen,
            state=MultiStepsState,
            descends=opt.descends,
            spares=opt.spares,
            stages=[*opt.stages, "waits", "counts"],
            covers=opt.covers,
            forwards_to=[opt],
        )
        if not is_compiling():
            given = {
                "use_grad_mean": (use_grad_mean, True),
                "should_skip_update_fn": (should_skip_update_fn, None),
                "accumulator_dtype": (accumulator_dtype, None),
            }
            kwargs = {name: value for name, (value, default) in given.items() if value is not default}
            self.made_by = Call(MultiSteps, (opt, every_k_schedule), kwargs)

    def has_updated(self, state: MultiStepsState) -> Tensor:
        """Whether the last call made a real step; optax says so also where a gradient was left out right after one."""
        return state.updated

    def gradient_transformation(self) -> Transform:
        """The transform itself, under optax's name."""
        return self

    def _begin(self, params: Params) -> MultiStepsState:
        steps = counter(params)
        said: Any = ()
        if self._skips is not None:
            _, said = self._decide(tree_map(torch.zeros_like, params), steps, params)
        accumulated = zeros(params, self._dtype)
        went = torch.zeros_like(steps, dtype=torch.bool)
        return MultiStepsState(counter(params), steps, self.inner_opt.begin(params), accumulated, said, went)

    def _decide(self, updates: Updates, steps: Tensor, params: Params) -> tuple[Tensor, Any]:
        """Whether to leave a gradient out, and what to keep of that decision."""
        made: Any = self._skips(updates, steps, params) if self._skips is not None else (False, ())
        if not isinstance(made, tuple) or len(made) != 2:
            raise TypeError(f"should_skip_update_fn returned {made!r}; expected a pair, whether to skip and a tree")
        skip = decision(made[0], params, "should_skip_update_fn")
        # Cloned, because a function may hand one tensor out twice.
        said = lambda x: x.clone() if isinstance(x, Tensor) else torch.as_tensor(x, device=steps.device)
        return skip.to(steps.device), tree_map(said, made[1])

    def _advance(
        self, updates: Updates, state: MultiStepsState, params: Params, **extra: Any
    ) -> tuple[Updates, MultiStepsState]:
        n, opt = state.mini_step, self.inner_opt
        if self._mean:
            summed = compute_wide(lambda a, g, n: a + (g - a) / (n + 1), state.acc_grads, updates, hyper=(n,))
        else:
            summed = compute_wide(lambda a, g: a + g, state.acc_grads, updates)
        given = tree_map(lambda a, g: a.to(g.dtype), summed, updates)
        new, after = opt.update(given, state.inner_opt_state, params, **opt.accepted(extra))
        done = n + 1 >= beside(at_step(self._every, state.gradient_step), n)
        skip, said = self._decide(updates, state.gradient_step, params) if self._skips is not None else (None, ())
        go = done if skip is None else done & ~skip
        kept = tree_map(lambda a, old: torch.where(beside(done, a), 0, a).to(old.dtype), summed, state.acc_grads)
        count = torch.where(done, torch.zeros_like(n), n + 1)
        if skip is not None:
            kept, count = pick(skip, state.acc_grads, kept), torch.where(skip, n, count)
        after = pick(go, after, state.inner_opt_state)
        steps = state.gradient_step + go.to(torch.int32)
        return or_zeros(go, new), MultiStepsState(count, steps, after, kept, said, go)


def _check_k(name: str, value: Any) -> None:
    """Raise an error for a number of steps below 1, or what is none; a function of the step is asked at 0."""
    if isinstance(value, (dict, list, tuple)):
        raise TypeError(f"{name} is {type_of(value)}; expected a number, one for all leaves, or a schedule")
    plain = number(value)
    if isinstance(plain, float) and not plain.is_integer():
        raise TypeError(f"{name} is {value!r}; expected a whole number of at least 1")
    check_range(name, value, 1.0, finite=True)


@public_state
class ApplyEveryState(NamedTuple):
    """The state of `apply_every`.

    Example:
        >>> apply_every(2).init(torch.zeros(1))
        ApplyEveryState(steps=tensor(0, dtype=torch.int32), grad_acc=tensor([0.]))
    """

    steps: Tensor  # Number of updates since the last that was let through, int32.
    grad_acc: Params  # Their sum.


@remembered
def apply_every(k: Scalar = 1) -> Transform:
    r"""Sum updates, and let the sum through at every k-th step; zeros between.

    Other links of a chain act at every step: for the same numbers as a larger batch, take `MultiSteps`.

    Args:
        k: Whole number of at least 1, or a tensor.

    Example:
        >>> tx, params = apply_every(2), {"w": torch.zeros(1)}
        >>> updates, state = tx.update({"w": torch.tensor([1.0])}, tx.init(params), params)
        >>> updates
        {'w': tensor([0.])}
        >>> tx.update({"w": torch.tensor([3.0])}, state, params)[0]
        {'w': tensor([4.])}
    """
    if callable(k):
        raise TypeError(f"k is {k!r}; expected a number. MultiSteps takes a schedule.")
    _check_k("k", k)

    def init(params: Params) -> ApplyEveryState:
        return ApplyEveryState(counter(params), zeros(params))

    def update(updates: Updates, state: ApplyEveryState, params: Params) -> tuple[Updates, ApplyEveryState]:
        n = state.steps
        done = n + 1 >= beside(k, n)
        summed = compute_wide(lambda a, u, n: torch.where(n == 0, 0, a) + u, state.grad_acc, updates, hyper=(n,))
        kept = tree_map(lambda s, a: s.to(a.dtype), summed, state.grad_acc)
        let = compute(lambda u, s, done: torch.where(done, s, 0), updates, summed, hyper=(done,))
        return let, ApplyEveryState(torch.where(done, torch.zeros_like(n), n + 1), kept)

    # Sums of steps end elsewhere than where a prox before it went.
    return Transform(init, update, state=ApplyEveryState, stages=["scales", "waits", "counts"])


# On some leaves, in one vector, with any extra argument


@remembered
def selective_transform(optimizer: Transform, *, freeze_mask: Mask) -> Transform:
    r"""Train the leaves that a mask does not freeze.

    The same as `chain(freeze(freeze_mask), optimizer)`: nothing in a chain around it moves the frozen leaves either,
    which optax's lets happen.

    Args:
        optimizer: Transform of the other leaves.
        freeze_mask: Tree of bools like the parameters, a prefix of one, or a function. True means hold.

    Example:
        >>> tx = selective_transform(sgd(0.1), freeze_mask={"body": True, "head": False})
        >>> params = {"body": torch.ones(1), "head": torch.ones(1)}
        >>> tx.update({"body": torch.ones(1), "head": torch.ones(1)}, tx.init(params), params)[0]
        {'body': tensor([0.]), 'head': tensor([-0.1000])}
    """
    check_transforms("selective_transform", [optimizer])
    return chain(freeze(freeze_mask), optimizer)


@remembered
def flatten(inner: Transform) -> Transform:
    r"""Let a transform see parameters and updates as one vector.

    It has one leaf then: a norm or a trust ratio of each leaf is one of all, rows are entries, and a mask by name or
    shape has nothing to choose from. `fuse` is as fast without it.

    Updates come back in the dtype of each leaf; optax's all have the widest.

    Args:
        inner: Transform of the vector.

    Raises:
        ValueError: Leaves lie on several devices, or only some are complex.

    Example:
        >>> tx = flatten(clip_by_block_rms(1.0))
        >>> params = {"a": torch.zeros(2), "b": torch.zeros(2)}
        >>> tx.update({"a": torch.zeros(2), "b": torch.tensor([4.0, 0.0])}, tx.init(params), params)[0]
        {'a': tensor([0., 0.]), 'b': tensor([2., 0.])}
    """
    check_transforms("flatten", [inner])

    def init(params: Params) -> State:
        return inner.begin(_vector(params))

    def update(updates: Updates, state: State, params: Params, **extra: Any) -> tuple[Updates, State]:
        seen = as_seen(inner.accepted(extra), params, _vector, lambda vector: _unravelled(vector, params))
        new, after = inner.update(_vector(updates), state, _vector(params), **seen)
        return _unravelled(new, updates), after

    def spread(choose: Choice | None) -> Choice | None:
        if choose is None or choose is everywhere:
            return choose
        return lambda params: choose(_vector(params)) * len(tree_leaves(params))

    frozen, spares, covers = map(spread, (inner.frozen, inner.spares, inner.covers))
    return around(inner, init, update, frozen=frozen, spares=spares, covers=covers)


def _vector(tree: Params) -> Any:
    """All entries of a tree in one vector; a tree without leaves if there are none."""
    leaves = tree_leaves(gathered(tree))
    if not leaves:
        return ()
    devices, dtype = {leaf.device for leaf in leaves}, leaves[0].dtype
    if len(devices) > 1:
        came = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"flatten got leaves on {came}; expected one device. Take it out: fuse needs no flatten.")
    if len({leaf.is_complex() for leaf in leaves}) > 1:
        raise ValueError("flatten got real and complex leaves; expected one kind, as a vector has")
    for leaf in leaves[1:]:
        dtype = torch.promote_types(dtype, leaf.dtype)
    return torch.cat([leaf.reshape(-1).to(dtype) for leaf in leaves])


def _unravelled(vector: Any, tree: Updates) -> Updates:
    """The entries of a vector as a tree like another one."""
    leaves = tree_leaves(tree)
    if not leaves:
        return tree
    parts = iter(vector.split([leaf.numel() for leaf in leaves]))
    return spread_like(tree_map(lambda u: next(parts).reshape(u.shape).to(u.dtype), tree), tree)


@remembered
def with_extra_args(tx: Transform) -> Transform:
    r"""Let a transform be handed any extra argument; those that it does not take are dropped.

    Otherwise an extra argument that nobody takes is an error, because as a rule it is misspelled.

    Args:
        tx: The transform.

    Example:
        >>> tx, params = with_extra_args(sgd(0.1)), {"w": torch.zeros(1)}
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params, epoch=3)[0]
        {'w': tensor([-0.1000])}
    """
    check_transforms("with_extra_args", [tx])

    def update(updates: Updates, state: State, params: Params, **extra: Any) -> tuple[Updates, State]:
        return tx.update(updates, state, params, **tx.accepted(extra))

    return around(tx, tx.begin, update, metric=tx.metric, forwards_to=None)


#: optax's name of it.
with_extra_args_support = with_extra_args
