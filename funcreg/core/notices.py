"""Warnings that point at the user's line: the first one outside of this package and of what calls its hooks."""

from __future__ import annotations

import sys
import warnings

import torch

#: What lies between the user's line and a warning: torch wraps steps of optimizers, Python context managers, and
#: trainers call them.
_BETWEEN = ("funcreg", "torch", "contextlib", "functools")
_BETWEEN += ("lightning", "lightning_fabric", "pytorch_lightning", "accelerate", "transformers", "skorch")
_BETWEEN += ("sklearn", "joblib")  # Searches that fit estimators, of skorch for one.


def warn_user(message: str) -> None:
    """Warn of the line of the user's that led here; not while a compiler reads this call."""
    if torch.compiler.is_dynamo_compiling():
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
