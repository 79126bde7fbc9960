"""Steps of chains side by side as plain functions, and closures of training loops as functions of parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Params, State, Updates
from funcreg.core.leafwise import apply_updates
from funcreg.core.tree import leaves_like, tree_leaves
from funcreg.torch_optim.optimizer_state import Part, filled
from funcreg.transforms.transform import Transform

PLAIN = (Tensor, torch.nn.Parameter)


def beside(chains: list[Transform]) -> Transform:
    """Chains side by side, each on its own tree in a list."""

    def init(params: list[Params]) -> list[State]:
        return [tx.init(tree) for tx, tree in zip(chains, params, strict=True)]

    def update(updates: list[Updates], state: list[State], params: list[Params], **extra: Any) -> tuple[Any, Any]:
        rows = zip(chains, updates, state, params, strict=True)
        made = [tx.update(*trees, **tx.accepted(extra)) for tx, *trees in rows]
        return [new for new, _ in made], [after for _, after in made]

    return Transform(init, update, forwards_to=chains)


class _Loss(torch.autograd.Function):
    """The loss that a closure computes with some numbers in the parameters, which get theirs back, and its gradient."""

    @staticmethod
    def forward(closure: Callable[[], Any], params: list[Tensor], *leaves: Tensor) -> Any:
        before = [p.detach().clone() for p in params]
        try:
            _write(params, leaves)
            with torch.enable_grad():
                loss = closure()
            if not isinstance(loss, Tensor):
                raise TypeError(f"the closure returned {loss!r}; expected the loss, which a line search compares")
            return loss.detach().clone(), *[filled(p, p.grad).clone() for p in params]
        finally:
            _write(params, before)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return None, None, *[slopes[0] * g for g in ctx.saved_tensors]


def searches(tx: Transform) -> bool:
    """Whether a transform, or one in it, asks for the loss at other points."""
    return "value_fn" in inspect.signature(tx._update).parameters or any([searches(each) for each in tx.forwards_to])


def _write(params: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for p, x in zip(params, leaves, strict=True):
            p.copy_(x)


def objective(part: Part, closure: Callable[[], Any] | None) -> Callable[[Params], Tensor] | None:
    """A closure as a function of the tree of a part."""
    if closure is None:
        return None
    return lambda tree: _Loss.apply(closure, part.params, *[tree[name] for name in part.names])[0]


class Eager:
    """A step as plain functions, written into the tensors that it got."""

    def __init__(self, tx: Transform) -> None:
        self._tx = tx

    def __call__(self, params: Params, grads: Updates, state: State, **extra: Any) -> None:
        updates, after = self._tx.update(grads, state, params, **extra)
        new = leaves_like((params, state), (apply_updates(params, updates), after))
        old = tree_leaves((params, state))
        places = {x.data_ptr() for x in old if type(x) in PLAIN}
        moved = [type(x) in PLAIN and x is not y and x.data_ptr() in places for x, y in zip(new, old, strict=True)]
        # All is read before anything is written.
        for leaf, x in zip(old, [x.clone() if m else x for x, m in zip(new, moved, strict=True)], strict=True):
            leaf.copy_(x)
