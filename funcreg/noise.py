"""Noise for gradients, each number of which is a function of a key, a step and its place.

Such noise has no hidden state: a run that goes on from a saved state draws what it would have drawn, steps compile and
map, and a tensor gets the same numbers on every device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg._typing import Params, Scalar, Schedule, Updates
from funcreg.construction import remembered
from funcreg.ranges import scalars
from funcreg.transform import Transform, at_step, counter, finite_nonnegative, public_state
from funcreg.tree import compute, flatten, scalar_device, tree_leaves
from funcreg.undocumented import is_batched, is_transformed


def _signed(word: int) -> int:
    """The int64 with the last 64 bits of a number."""
    return (word + 2**63) % 2**64 - 2**63


#: The constants of SplitMix64. Products of int64 tensors are taken modulo 2^64.
_GOLDEN, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@public_state
class AddNoiseState(NamedTuple):
    """The state of `add_noise`.

    Example:
        >>> add_noise(0.1, 0.55, key=7).init(torch.zeros(1)).steps
        tensor(0, dtype=torch.int32)
    """

    steps: Tensor  # Number of updates made, int32.
    key: Tensor  # What the noise of all steps is made from, int64.


@remembered
def add_noise(eta: Scalar | Schedule, gamma: Scalar, key: int | Tensor | torch.Generator) -> Transform:
    r"""Add Gaussian noise to updates, :math:`u' = u + \sqrt{\eta / t^\gamma} \, \xi`, :math:`\xi \sim N(0, 1)`.

    After the step of `sgd`, with the right variance, this is Langevin dynamics (SGLD), whose parameters are samples of
    a posterior: for a loss that is a mean over :math:`n` examples plus the prior's penalty,
    `chain(sgd(rate), add_noise(2 * rate / n, 0.0, key))`.

    Noise is a function of key, step, and place in the tree: a run that goes on from a saved state draws what it would
    have drawn. An ensemble draws other noise for each member. Under `vmap` of your own members differ if their keys do
    (a tensor of keys, mapped over), or if `init` is mapped with `randomness="different"`.

    Args:
        eta: :math:`\eta`: variance of the noise at the first step, number of at least 0, tensor or schedule.
        gamma: :math:`\gamma`, at least 0: how fast the variance falls. 0 keeps it.
        key: Where the noise comes from: an int, a 0-dim tensor of an integer, or a generator, from which `init` draws.

    Example:
        >>> tx, params = add_noise(0.25, 0.0, key=0), {"weight": torch.zeros(10_000)}
        >>> updates, state = tx.update({"weight": torch.ones(10_000)}, tx.init(params), params)
        >>> round(float(updates["weight"].mean()), 1), round(float(updates["weight"].std()), 1)
        (1.0, 0.5)

    References:
        Neelakantan and others, *Adding gradient noise improves learning for very deep networks*, 2015.
        Welling & Teh, *Bayesian learning via stochastic gradient Langevin dynamics*, 2011.
        Steele, Lea & Flood, *Fast splittable pseudorandom number generators*, 2014.
    """
    finite_nonnegative(eta=eta, gamma=gamma)
    (gamma,) = scalars(gamma=gamma)
    _check_key(key)

    def init(params: Params) -> AddNoiseState:
        return AddNoiseState(counter(params), _first_key(key, params))

    def update(updates: Updates, state: AddNoiseState, params: Params) -> tuple[Updates, AddNoiseState]:
        steps = state.steps + 1
        size = (at_step(eta, state.steps) / steps.to(torch.float64) ** gamma) ** 0.5
        here = _mixed(state.key + _GOLDEN * steps.to(torch.int64))
        leaves, rebuild = flatten(params)
        noise = rebuild([_normal(_mixed(here + _signed(_GOLDEN * (i + 1))), w) for i, w in enumerate(leaves)])
        moved = compute(lambda u, x, s: u + s * x, updates, noise, hyper=(size,))
        return moved, AddNoiseState(steps, state.key)

    return Transform(init, update, state=AddNoiseState)


def _check_key(key: Any) -> None:
    if isinstance(key, torch.Generator) or (isinstance(key, int) and not isinstance(key, bool)):
        if isinstance(key, int) and not -(2**63) <= key < 2**64:
            raise ValueError(f"key is {key}; expected an integer of 64 bits")
        return
    if isinstance(key, Tensor) and not key.ndim and key.dtype in _INTEGERS:
        return
    came = f"a tensor of {key.dtype} and shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
    hint = ". In an ensemble, each member takes one entry of a tensor of keys" if isinstance(key, Tensor) else ""
    raise TypeError(f"key is {came}; expected an int, a 0-dim tensor of an integer, or a torch.Generator{hint}")


def _first_key(key: int | Tensor | torch.Generator, params: Params) -> Tensor:
    device = scalar_device(params)
    if isinstance(key, Tensor):
        return _mixed(key.to(device, torch.int64))
    mapped = is_transformed() and any([is_batched(w) for w in tree_leaves(params)])
    if isinstance(key, int) and not mapped:
        return _mixed(torch.full((), _signed(key), dtype=torch.int64, device=device))
    # vmap gives each of its members a number of its own, or says that it must be told to.
    source = torch.Generator("cpu").manual_seed(key % 2**63) if isinstance(key, int) else key
    low, high = -(2**63), 2**63 - 1
    drawn = torch.randint(low, high, (), generator=source, dtype=torch.int64, device=source.device)
    return drawn.to(device)


def _mixed(z: Tensor) -> Tensor:
    """A word of 64 bits that looks random, for each word: the last part of SplitMix64."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shifted to the right, with zeros coming in: torch's own operation brings in copies of the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _normal(key: Tensor, w: Tensor) -> Tensor:
    """Normal numbers like a tensor, by the method of Box and Muller, in float32 at least."""
    real = torch.float64 if w.dtype in (torch.float64, torch.complex128) else torch.float32
    places = torch.arange(1, w.numel() + 1, device=w.device).reshape(w.shape)
    bits = _mixed(key.to(w.device) + _GOLDEN * places)
    first, second = (((half.to(real) + 0.5) * 2.0**-32) for half in (_shifted(bits, 32), bits & (2**32 - 1)))
    radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
    if w.is_complex():
        return torch.complex(radius * angle.cos(), radius * angle.sin()) / math.sqrt(2)
    return radius * angle.cos()
