"""The call that makes a fused step of a chain, and says what a step of it would do that nobody wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from funcreg.core.construction import remembered
from funcreg.core.notices import warn_user
from funcreg.fused.step import FusedStep
from funcreg.transforms.mistakes import uphill
from funcreg.transforms.transform import Transform


@remembered
def fuse(tx: Transform, donate: bool = False, *, backend: str | Callable[..., Any] = "inductor") -> FusedStep:
    r"""Compile `update` and `apply_updates` into one step, `step(params, grads, state) -> (params, state)`.

    On the first call the chain is recorded, leaves that are treated alike are packed together, and few kernels are
    compiled for all of them, whatever the number of leaves. What is a tensor (a counter, a strength held as a tensor)
    is read at every step; what is Python (a mask, a float, a closure) is read once. The step records no autograd
    history: to differentiate through training steps, call `tx.update` and `apply_updates`. Called inside `vmap` or
    `grad`, a step that does not donate is these plain functions. Results differ from theirs by rounding.

    A step pickles and copies as the call that made it, and then compiles anew.

    Args:
        tx: The transform; its updates are added to the parameters.
        donate: Whether the step may write the new parameters and state into the tensors it was given. It then
            allocates nothing that lasts, and returns the same tensors; nobody else may be using them. Interrupted in
            the middle (Ctrl-C), it may have written a part of them, as any step of `torch.optim`: go on from a copy.
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
    made = FusedStep(tx, donate, backend)
    if climbs := uphill(tx, "fuse got"):
        warn_user(climbs)
    return made
