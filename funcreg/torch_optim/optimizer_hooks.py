"""Penalties on one optimizer: the hook that lands them in order, and copies that notice that they are missing."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from funcreg.core.leafwise import global_norm
from funcreg.core.masks import listed
from funcreg.core.notices import warn_user
from funcreg.core.undocumented import is_compiling
from funcreg.torch_optim.denominators import NOTE_COPY, known_number, steps_as_torch

#: Where an optimizer keeps the penalties on it.
OWN = "_funcreg_regularizations"


class Lands(Protocol):
    """A penalty on an optimizer."""

    def after(self, optimizer: Optimizer) -> None:
        """Land where a step has led."""
        ...


class Landings(list[Lands]):
    """The penalties on an optimizer, in the order in which they land: constraints last, or they would not hold.

    One hook for all stands where the first of them came, among other hooks of the optimizer.
    """

    def __init__(self, optimizer: Optimizer, is_last: Callable[[Any], bool]) -> None:
        super().__init__()
        self._is_last = is_last
        self._watches = not steps_as_torch(type(optimizer))
        self._hook = optimizer.register_step_post_hook(self._after)

    def add(self, each: Lands) -> None:
        self.append(each)
        self.sort(key=self._is_last)

    def drop(self, each: Lands, optimizer: Optimizer) -> None:
        self.remove(each)
        if not self:
            self._hook.remove()
            del vars(optimizer)[OWN]

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._watches and is_in_a_step(optimizer):
            return
        for each in [*self]:
            each.after(optimizer)


class _Lost:
    """Warns at the first step of an optimizer that was copied or read from a file, and so lost its penalties."""

    def __init__(self, said: list[str]) -> None:
        self._said = said

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._said and not vars(optimizer).get(OWN):
            warn_user(
                f"this {type(optimizer).__name__} is a copy, and is without {listed(self._said)}: torch does not copy "
                "hooks. Call regularize on it as well; where that is not wanted, remove() the penalty before the copy."
            )
        self._said = []


def see_to_copies(optimizer: Optimizer) -> None:
    """Let copies of an optimizer notice that its penalties are missing; those of one without any are made as ever."""
    said = [repr(each) for each in vars(optimizer).get(OWN, [])]
    if said:
        vars(optimizer)["__reduce_ex__"] = functools.partial(_reduced, weakref.ref(optimizer))
        vars(optimizer)[NOTE_COPY] = functools.partial(_note_copy, said)
    else:
        vars(optimizer).pop("__reduce_ex__", None)
        vars(optimizer).pop(NOTE_COPY, None)


def _reduced(ref: weakref.ref[Optimizer], protocol: Any) -> Any:
    """How an optimizer is copied and pickled: as ever, and a hook of the copy notices that penalties are missing."""
    optimizer = ref()
    assert optimizer is not None  # It is being copied.
    function, args, state = type(optimizer).__reduce_ex__(optimizer, protocol)[:3]
    return _copied, (function, args, state, vars(optimizer)[NOTE_COPY])


def _copied(function: Callable[..., Any], args: tuple[Any, ...], state: Any, note: Any) -> Optimizer:
    made = function(*args)
    made.__setstate__(state)
    note(made)
    return made


def _note_copy(said: list[str], made: Optimizer) -> None:
    made.register_step_post_hook(_Lost(said))


def is_in_a_step(optimizer: Optimizer) -> bool:
    """Whether hooks are called in a step that another step of the same optimizer calls, as `super().step()`.

    Torch calls them in both, or in the outer one alone, as classes happen to have been used before.
    """
    calls = sys._getframe(2)  # What calls the hooks.
    frame = calls.f_back
    while frame is not None:
        if frame.f_code is calls.f_code and any([x is optimizer for x in frame.f_locals.values()]):
            return True
        frame = frame.f_back
    return False


def is_empty(optimizer: Optimizer) -> bool:
    """Whether a step has neither length nor gradient, such as torch makes to see the entries of a state."""
    groups = optimizer.param_groups
    if is_compiling() or any([known_number(group.get("lr", 1.0)) != 0 for group in groups]):
        return False
    grads = [w.grad for group in groups for w in group["params"] if w.grad is not None]
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return bool(grads) and not capturing and not any([g.is_sparse for g in grads]) and global_norm(grads).item() == 0
