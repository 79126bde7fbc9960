"""Random bits that are a function of a key, a step and a place, and rounding to sixteen bits that is right on average.

Such bits have no hidden state: a run that goes on from a saved state draws what it would have drawn, steps compile and
map, and a tensor gets the same bits on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Params
from funcreg.core.leafwise import scalar_device
from funcreg.core.tree import tree_leaves
from funcreg.core.undocumented import is_batched, is_transformed


def signed(word: int) -> int:
    """The int64 with the last 64 bits of a number."""
    return (word + 2**63) % 2**64 - 2**63


#: The constants of SplitMix64. Products of int64 tensors are taken modulo 2^64.
_GOLDEN, _FIRST, _SECOND = map(signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_key(key: Any) -> None:
    """Raise an error for what is no key: an int, a 0-dim tensor of an integer, or a generator."""
    if isinstance(key, torch.Generator) or (isinstance(key, int) and not isinstance(key, bool)):
        if isinstance(key, int) and not -(2**63) <= key < 2**64:
            raise ValueError(f"key is {key}; expected an integer of 64 bits")
        return
    if isinstance(key, Tensor) and not key.ndim and key.dtype in _INTEGERS:
        return
    came = f"a tensor of {key.dtype} and shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
    hint = ". In an ensemble, each member takes one entry of a tensor of keys" if isinstance(key, Tensor) else ""
    raise TypeError(f"key is {came}; expected an int, a 0-dim tensor of an integer, or a torch.Generator{hint}")


def one_key(name: str, key: Any, seed: Any) -> Any:
    """The key of a transform that takes it by either name.

    Raises:
        TypeError: There is none, or there are two.
    """
    if key is not None and seed is not None:
        raise TypeError(f"{name} got key= and seed=, which are names of the same; expected one of them")
    if key is None and seed is None:
        raise TypeError(
            f"{name} got no key; expected key=, an int, a 0-dim tensor of an integer, or a torch.Generator. With one "
            "chosen for you, all runs would have the same noise."
        )
    check_key(seed if key is None else key)
    return seed if key is None else key


def first_key(key: int | Tensor | torch.Generator, params: Params) -> Tensor:
    """The key that a state keeps, int64."""
    device = scalar_device(params)
    if isinstance(key, Tensor):
        return mixed(key.to(device, torch.int64))
    leaves = tree_leaves(params)
    mapped = is_transformed() and any([is_batched(w) for w in leaves])
    if isinstance(key, int) and not mapped:
        return mixed(torch.full((), signed(key), dtype=torch.int64, device=device))
    if not leaves:  # Nothing will be drawn; a generator that is asked would go on.
        return torch.zeros((), dtype=torch.int64, device=device)
    # vmap gives each of its members a number of its own, or says that it must be told to.
    source = torch.Generator("cpu").manual_seed(key % 2**63) if isinstance(key, int) else key
    low, high = -(2**63), 2**63 - 1
    drawn = torch.randint(low, high, (), generator=source, dtype=torch.int64, device=source.device)
    return drawn.to(device)


def mixed(z: Tensor) -> Tensor:
    """A word of 64 bits that looks random, for each word: the last part of SplitMix64."""
    z = (z ^ shifted(z, 30)) * _FIRST
    z = (z ^ shifted(z, 27)) * _SECOND
    return z ^ shifted(z, 31)


def shifted(z: Tensor, bits: int) -> Tensor:
    """Shifted to the right, with zeros coming in: torch's own operation brings in copies of the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def words(key: Tensor, steps: Tensor, params: Params) -> list[Tensor]:
    """For each leaf a word of 64 bits for each of its entries, for one step."""
    here = mixed(key + _GOLDEN * steps.to(torch.int64))
    return [_words(mixed(here + signed(_GOLDEN * (i + 1))), w) for i, w in enumerate(tree_leaves(params))]


def _words(key: Tensor, w: Tensor) -> Tensor:
    # Inductor computes products of an index as addresses, and wrongly where they exceed 64 bits (torch 2.13, the last
    # entries of a loop on a CPU). After this operation, which changes no number, an index is a number to it.
    places = (torch.arange(1, w.numel() + 1, device=w.device) & (2**62 - 1)).reshape(w.shape)
    return mixed(key.to(w.device) + _GOLDEN * places)


#: Digits of numbers of sixteen bits, and the exponent below which their steps no longer shrink. Steps of bfloat16 below
#: 1e-38 would have no float32 inverse.
_SIXTEEN = {torch.bfloat16: (8, -118), torch.float16: (11, -14)}


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether numbers have sixteen bits."""
    return dtype in _SIXTEEN


def digits(dtype: torch.dtype) -> int:
    """How many binary digits numbers of sixteen bits have."""
    return _SIXTEEN[dtype][0]


def rounded(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    r"""One of the two sixteen-bit numbers around each entry, the nearer the likelier: the mean is the entry.

    The result is float32. With arithmetic alone, which maps, compiles, and stays where a compiler drops a conversion.

    Args:
        x: Tensor of float32.
        bits: Random integers like it, of which the last sixteen bits, or thirteen, count.
        dtype: `torch.bfloat16` or `torch.float16`.
    """
    places, least = _SIXTEEN[dtype]
    size = x.abs()
    unit = (size.clamp(min=2.0**least).log2().floor() - (places - 1)).exp2()
    behind = 24 - places  # Of float32, behind the digits that stay.
    steps = (size / unit + (bits & (2**behind - 1)).to(x.dtype) * 2.0**-behind).floor()
    return torch.where(x.isfinite(), x.sign() * (steps * unit), x)
