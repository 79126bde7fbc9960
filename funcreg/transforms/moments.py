"""Moving averages of updates and of their squares, and what is divided by them.

Moments of 16-bit parameters are kept in float32; pass a dtype to keep them smaller. A second moment of sixteen bits is
rounded up or down at random, because rounded to the nearest it would stop moving. Bias corrections are float64 scalars:
in float32, `1 - b**t` loses six digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funcreg.core._typing import Params, Scalar, Updates
from funcreg.core.leafwise import compute, compute_wide, increment, safe_sqrt, squared, wide, widen
from funcreg.core.rounding import is_narrow, rounded, words
from funcreg.core.tree import flatten, tree_leaves, tree_map
from funcreg.transforms.factory_checks import dtypes


def average(moments: Params, values: Params, decay: Scalar) -> Params:
    """Exponential moving average, in working precision."""
    return compute_wide(lambda m, x, b: b * m + (1 - b) * x, moments, values, hyper=(decay,))


def average_square(moments: Params, values: Params, decay: Scalar) -> Params:
    """Exponential moving average of squared magnitudes, in working precision."""
    return compute_wide(lambda m, x, b: b * m + (1 - b) * squared(x), moments, values, hyper=(decay,))


def stored(moments: Params, like: Params) -> Params:
    """Moments in the dtype in which the state keeps them."""
    return tree_map(lambda m, kept: m.to(kept.dtype), moments, like)


#: The key of the bits with which second moments are rounded.
_KEY = 0x243F6A8885A308D3


def stored_square(moments: Params, like: Params, steps: Tensor) -> Params:
    """Second moments in the dtype in which the state keeps them: those of sixteen bits right on average."""
    if not any([is_narrow(kept.dtype) for kept in tree_leaves(like)]):
        return stored(moments, like)
    leaves, rebuild = flatten(moments)
    bits = words(torch.full_like(steps, _KEY, dtype=torch.int64), steps, moments)
    rows = zip(leaves, tree_leaves(like), bits, strict=True)
    return rebuild([(rounded(v, b, v0.dtype) if is_narrow(v0.dtype) else v).to(v0.dtype) for v, v0, b in rows])


def real_zeros(params: Params, value: Scalar = 0.0, dtype: torch.dtype | None = None) -> Params:
    """Accumulators of squared magnitudes, which are real."""

    def made(w: Tensor) -> Tensor:
        kept = dtype or wide(w.real.dtype)
        # In its dtype also where the leaf has no dimensions, and so no say beside a tensor of a wider one.
        return (torch.zeros_like(w.real, dtype=kept) + value).to(kept)

    return tree_map(made, params)


def bias_correction(decay: Scalar, steps: Tensor) -> Tensor:
    r"""What a moving average that began at zero lacks, :math:`1 - \beta^t`, in float64."""
    return 1 - decay ** steps.to(torch.float64)


def check_real(nu_dtype: torch.dtype | None) -> None:
    """Raise a TypeError for what is no dtype of real numbers, which squared magnitudes are."""
    dtypes(nu_dtype=nu_dtype)
    if nu_dtype is not None and nu_dtype.is_complex:
        raise TypeError(f"nu_dtype is {nu_dtype}; expected a dtype of real numbers, which squared magnitudes are")


def corrected_mean(mu: Params, updates: Updates, b1: Scalar, steps: Tensor, nesterov: bool) -> Params:
    """A moving average without the weight of the zero that it began with, one step ahead if `nesterov`."""
    if not nesterov:
        return compute(lambda m, c: m * c, mu, hyper=(1 / bias_correction(b1, steps),))
    ahead, here = bias_correction(b1, increment(steps)), bias_correction(b1, steps)
    return compute(lambda m, u, b, c, d: b * m / c + (1 - b) * u / d, mu, updates, hyper=(b1, ahead, here))


def adam_metric(nu: Params, missing: Scalar, eps: Scalar, eps_root: Scalar) -> Params:
    """What Adam divides by, the root of a mean square that lacks a share at its beginning."""
    nu = tree_map(widen, nu)
    factor = 1 / missing  # Entries are multiplied, which takes a fraction of the time of a division.
    if isinstance(eps_root, (int, float)) and eps_root == 0:  # By default: nothing to add, in no pass.
        return compute(lambda v, c, e: safe_sqrt(v * c) + e, nu, hyper=(factor, eps))
    return compute(lambda v, c, e, r: safe_sqrt(v * c + r) + e, nu, hyper=(factor, eps, eps_root))
