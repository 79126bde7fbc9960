"""The fused step: a whole chain and the addition to the parameters, compiled as one graph."""

from __future__ import annotations

import types
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level

from funcreg._typing import Params, State, Updates
from funcreg.transform import Transform
from funcreg.tree import apply_updates, check_alike, check_params, leaves_like, tree_leaves, tree_map, tree_paths


def fuse(tx: Transform, donate: bool = False, *, backend: str | Callable[..., Any] = "inductor") -> FusedStep:
    r"""Compile `update` and `apply_updates` into one step, `step(params, grads, state) -> (params, state)`.

    The chain is traced once, into one full graph, and compiled on the first call; a schedule, a counter or a
    hyperparameter held as a tensor compiles nothing anew. The step records no autograd history: to differentiate
    through training steps, call `tx.update` and `apply_updates`. Called inside `vmap` or `grad`, a step that does
    not donate is these plain functions.

    Args:
        tx: The transform; its updates are added to the parameters.
        donate: Whether the step may write the new parameters and state into the tensors it was given. It then
            allocates nothing that lasts, and returns the same tensors; nobody else may be using them.
        backend: Backend of `torch.compile`; `"eager"` and `"aot_eager"` need no compiler.

    Raises:
        TypeError: `tx` is not a transform.

    Example:
        >>> step = fuse(chain(scale(-0.1), soft_threshold(0.25)), donate=True, backend="aot_eager")
        >>> params, state = step.init({"weight": torch.tensor([1.0, -0.3])})
        >>> params, state = step(params, {"weight": torch.tensor([0.5, -0.5])}, state)
        >>> params
        {'weight': tensor([0.7000, 0.0000])}
    """
    return FusedStep(tx, donate, backend)


class FusedStep:
    """A compiled training step; see `fuse`."""

    def __init__(self, tx: Transform, donate: bool, backend: str | Callable[..., Any]) -> None:
        if not isinstance(tx, Transform):
            raise TypeError(f"fuse got a {type(tx).__name__}; expected a Transform, as in fuse(adamw(1e-3))")
        self._tx, self._donate = tx, donate
        self._owned: list[Any] = []

        def pure(params: Params, grads: Updates, state: State, extra: dict[str, Any]) -> tuple[Params, State]:
            updates, new = tx.update(grads, state, params, **extra)
            return apply_updates(params, updates), new

        self._pure = pure

        def in_place(params: Params, grads: Updates, state: State, extra: dict[str, Any]) -> list[Tensor]:
            new = pure(params, grads, state, extra)
            scalars = []
            for old, leaf in zip(tree_leaves((params, state)), leaves_like((params, state), new), strict=True):
                if old.ndim:
                    old.copy_(leaf)
                else:
                    scalars.append(leaf)
            return scalars

        self._compiled = torch.compile(
            _with_code_of_its_own(in_place if donate else pure), fullgraph=True, backend=backend
        )

    def init(self, params: Params) -> tuple[Params, State]:
        """Parameters and state for this step to own: copies that share no memory and need no gradient."""
        check_params(params)
        owned = tree_map(lambda w: w.detach().clone(memory_format=torch.contiguous_format), params)
        return owned, self._tx.init(owned)

    def __call__(self, params: Params, grads: Updates, state: State, **extra: Any) -> tuple[Params, State]:
        """New parameters and state; with donation, in the tensors of the old ones."""
        check_params(params)
        check_alike(params, grads, ("params", "grads"))
        if maybe_current_level() is not None:  # Inside vmap or grad.
            if self._donate:
                raise ValueError(
                    "a donating step was called inside vmap or grad, which cannot write in place. For members with "
                    "hyperparameters of their own, fuse(ensemble(...)); else fuse without donate=True."
                )
            return self._pure(params, grads, state, extra)
        if self._donate:
            self._check_donated(params, grads, state)
        with torch.no_grad():
            try:
                result = self._compiled(params, grads, state, extra)
            except Exception:
                # The compiler wraps what tracing raises. If the call is at fault, the plain functions say how, and
                # which leaf; if not, the compiler's own error goes on.
                self._pure(params, grads, state, extra)
                raise
            if not self._donate:
                return result
            # Out of the graph: compiled code loses what is written into a float64 input without dimensions.
            for old, new in zip((leaf for leaf in tree_leaves((params, state)) if not leaf.ndim), result, strict=True):
                old.copy_(new)
        return params, state

    def _check_donated(self, params: Params, grads: Updates, state: State) -> None:
        owned = tree_leaves((params, state))
        for i, leaf in enumerate(owned):
            if leaf.requires_grad:
                name = _names(params, state)[i]
                raise ValueError(
                    f"{name} requires grad and cannot be donated. step.init(params) gives copies that can."
                )
        if len(owned) != len(self._owned) or any(a is not b for a, b in zip(owned, self._owned, strict=True)):
            _check_apart(_names(params, state), owned)
            self._owned = owned
        memory = {leaf.untyped_storage().data_ptr() for leaf in owned if leaf.numel()}
        for i, leaf in enumerate(tree_leaves(grads)):
            if leaf.numel() and leaf.untyped_storage().data_ptr() in memory:
                raise ValueError(
                    f"grads '{tree_paths(grads)[i]}' shares memory with params or state, which are donated and so "
                    "overwritten. Pass a copy of it."
                )


def _names(params: Params, state: State) -> list[str]:
    """What errors call the leaves of both."""
    return [f"params '{name}'" for name in tree_paths(params)] + [f"state '{name}'" for name in tree_paths(state)]


def _check_apart(names: list[str], leaves: list[Tensor]) -> None:
    """Raise an error for two leaves, or two entries of one, in the same memory."""
    spans = []
    for name, leaf in zip(names, leaves, strict=True):
        if not leaf.numel():
            continue
        reach = 0  # Of the dimensions with smaller strides.
        for stride, size in sorted(zip(leaf.stride(), leaf.shape, strict=True)):
            if size > 1 and stride <= reach:
                raise ValueError(f"{name} is an expanded tensor, whose entries share memory, and cannot be donated")
            reach += (size - 1) * stride
        last = sum((size - 1) * abs(stride) for size, stride in zip(leaf.shape, leaf.stride(), strict=True))
        start = leaf.data_ptr()
        spans.append((start, start + (last + 1) * leaf.element_size(), name))
    spans.sort()
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            raise ValueError(
                f"{first} and {second} share memory and cannot be donated. Are weights tied? "
                "step.init(params) gives copies that share nothing."
            )


def _with_code_of_its_own(f: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function with its own code object, to which compiled code is tied, up to a limit of versions."""
    assert isinstance(f, types.FunctionType)
    return types.FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
