"""Checkpoints: parameters and states as one flat dict of tensors, which every file format takes.

Files keep tensors by name. They do not keep named tuples: `torch.load` refuses their types unless it knows them,
safetensors takes tensors alone, and distributed checkpoints write a tuple as one opaque object of one process.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funcreg.core.masks import listed
from funcreg.core.ranges import flags
from funcreg.core.tree import restored, structure, tree_paths, tree_types
from funcreg.core.wording import type_of

#: The format of the dict. A change that older readers cannot read gets another number.
VERSION = 1
#: An entry of two integers: the format, and a checksum of the types of states, which may have equal names.
_HEADER = "funcreg.version"


def to_state_dict(state: Any) -> dict[str, Tensor]:
    r"""A flat dict of the tensors of a tree, with dotted names such as `1.mu.layer.weight`.

    For `torch.save`, safetensors and `torch.distributed.checkpoint`. As in `Module.state_dict`, tensors are the
    tree's own where possible: save them, or copy them, before the next donating step. A tensor is copied if it is not
    contiguous, shares memory with another leaf, or is a small part of a large storage, which a file would keep whole.
    Sharded tensors (`DTensor`) stay sharded.

    Args:
        state: A state, parameters, or any tree of tensors, such as `{"params": params, "state": state, "epoch": 3}`.
            Numbers are written as tensors.

    Raises:
        TypeError: A leaf is no dense tensor and no number.
        ValueError: Two leaves have one name, as in `{"a.b": x, "a": {"b": y}}`, or a whole number is none of 64 bits.

    Example:
        >>> tx, params = chain(clip(1.0), trace(0.9)), {"weight": torch.zeros(2)}
        >>> flat = to_state_dict(tx.init(params))
        >>> flat["1.trace.weight"]
        tensor([0., 0.])
        >>> list(flat)
        ['1.trace.weight', 'funcreg.version']
    """
    flat: dict[str, Tensor] = {}
    used: set[Any] = set()
    for name, leaf in _named(state):
        flat[name] = _own(_tensor(name, leaf), used)
    flat[_HEADER] = _header(state)
    return flat


def from_state_dict(template: Any, flat: Mapping[str, Any], strict: bool = True) -> Any:
    r"""A tree like `template` with the numbers of a flat dict that `to_state_dict` made.

    Its tensors are new: neither the template nor the dict is written to or shares memory with it. They have the
    template's devices, dtypes, strides and placements.

    Args:
        template: Tree of the structure, shapes and dtypes that are expected, such as `tx.init(params)`.
        flat: What was saved, by name.
        strict: Whether names and dtypes must be those of the template. If not, leaves whose names are missing are
            copies of the template's, names it does not know are passed over, and dtypes are converted.

    Raises:
        ValueError: Names are missing or unexpected, a shape or dtype differs, the state is that of another chain, or
            the dict was written in a format that this version does not know.
        TypeError: `flat` is no dict, or an entry is no tensor.

    Example:
        >>> tx, params = trace(0.9), {"weight": torch.zeros(2)}
        >>> flat = {**to_state_dict(tx.init(params)), "trace.weight": torch.ones(2)}
        >>> from_state_dict(tx.init(params), flat)
        TraceState(trace={'weight': tensor([1., 1.])})
    """
    if not isinstance(flat, Mapping):
        raise TypeError(
            f"flat is {type_of(flat)}; expected a dict of tensors that to_state_dict made, as torch.load returns it"
        )
    flags(strict=strict)
    if isinstance(template, Mapping) and _HEADER in template:
        raise ValueError(
            "template is a flat dict that to_state_dict made; expected a tree like the one that was saved, as in "
            "from_state_dict(tx.init(params), flat). Are template and flat swapped?"
        )
    leaves, spec = structure(template)
    known = _named(template)
    _check_format(flat, strict)
    _check_names([name for name, _ in known], flat, strict)
    for name, leaf in known:
        if name in flat:
            _check_fits(name, _tensor(name, leaf), flat[name], strict)
    if strict and not torch.equal(flat[_HEADER].cpu(), _header(template)):
        raise ValueError(
            f"all names and shapes fit, but they are of states of other types; expected {listed(tree_types(template))}"
            ". Is it the state of another chain?"
        )
    with torch.no_grad():
        new = [_filled(leaf, flat.get(name, leaf)) for (name, _), leaf in zip(known, leaves, strict=True)]
    return restored(spec, new)


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their names, or an error for two of one name; a tree that is one leaf is `value`."""
    found: dict[str, Any] = {}
    for name, leaf in zip(tree_paths(tree), structure(tree)[0], strict=True):
        if name in found or name == _HEADER:
            raise ValueError(
                f"two leaves are called '{name}' when their paths are dotted. Does a key have a dot, or is one key a "
                "number and another the same number as a string?"
            )
        found[name or "value"] = leaf
    return list(found.items())


def _tensor(name: str, leaf: Any) -> Tensor:
    """A leaf as a tensor: numbers become tensors without dimensions."""
    if isinstance(leaf, int) and not -(2**63) <= leaf < 2**63:
        raise ValueError(
            f"'{name}' is {leaf}, which is no integer of 64 bits; expected one from -2^63 to 2^63 - 1, or a float. A "
            "key of 64 bits without a sign is the same less 2^64"
        )
    if isinstance(leaf, (bool, int, float)):
        return torch.tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else None, device="cpu")
    if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
        return leaf
    came = f"a tensor of layout {leaf.layout}" if isinstance(leaf, Tensor) else type_of(leaf)
    raise TypeError(
        f"'{name}' is {came}; expected a dense tensor or a number. The parameters of a module are "
        "dict(module.named_parameters()); what is no tensor is saved beside the dict."
    )


def _header(tree: Any) -> Tensor:
    types = zlib.crc32("\n".join(tree_types(tree)).encode())
    return torch.tensor([VERSION, types], dtype=torch.int64, device="cpu")


def _is_sharded(x: Any) -> bool:
    return hasattr(x, "to_local") and hasattr(x, "placements")


def _own(leaf: Tensor, used: set[Any]) -> Tensor:
    """A detached tensor that is contiguous and alone in its storage: the leaf itself if it can be."""
    leaf = leaf.detach()
    part = leaf.to_local() if _is_sharded(leaf) else leaf  # pyright: ignore[reportAttributeAccessIssue]  # A DTensor.
    if part.device.type == "meta" or not part.numel():
        return leaf
    size, storage = part.numel() * part.element_size(), part.untyped_storage()
    place = (part.device, part.data_ptr())
    alone = place not in used and (part is not leaf or (part.is_contiguous() and storage.nbytes() == size))
    if alone and not part.is_neg() and not part.is_conj():
        used.add(place)
        return leaf
    return leaf.clone() if part is not leaf else leaf.clone(memory_format=torch.contiguous_format).resolve_conj()


def _check_format(flat: Mapping[str, Any], strict: bool) -> None:
    header = flat.get(_HEADER)
    if header is None:
        if strict:
            raise ValueError(
                f"the dict has no entry '{_HEADER}'; was it made by to_state_dict? It has {listed(list(flat))}. With "
                "strict=False it is read without."
            )
        return
    if not (isinstance(header, Tensor) and header.shape == (2,) and header[0].item() == VERSION):
        if not isinstance(header, Tensor) or header.shape != (2,):
            came = f"a tensor of shape {tuple(header.shape)}" if isinstance(header, Tensor) else repr(header)
            raise ValueError(f"'{_HEADER}' is {came}; expected what to_state_dict writes there. Was the dict changed?")
        raise ValueError(
            f"the dict is of format {header[0].item()}; this version of funcreg reads format {VERSION}. Was it written "
            "by a newer one?"
        )


def _check_names(known: list[str], flat: Mapping[str, Any], strict: bool) -> None:
    missing = [name for name in known if name not in flat]
    expected = {*known, _HEADER}
    unexpected = [name for name in flat if name not in expected]
    if strict and (missing or unexpected):
        parts = [f"lacks {listed(missing)}"] * bool(missing)
        parts += [f"has {listed(unexpected)}, unknown to the template"] * bool(unexpected)
        raise ValueError(f"the dict {' and '.join(parts)}. Is it the state of another chain, or of another model?")
    if known and len(missing) == len(known):
        raise ValueError(
            f"the dict has none of the names of the template, {listed(known)}; it has {listed(unexpected)}. Was a "
            "part of a tree saved, or is the dict one inside another?"
        )


def _check_fits(name: str, leaf: Tensor, found: Any, strict: bool) -> None:
    if not isinstance(found, Tensor):
        raise TypeError(f"'{name}' is {type_of(found)}; expected a tensor")
    if found.is_meta or found.layout is not leaf.layout:
        came = "on the meta device, without numbers" if found.is_meta else f"of layout {found.layout}"
        raise ValueError(f"'{name}' is {came}; expected a tensor like that of the template, {leaf.layout}")
    if found.shape != leaf.shape:
        raise ValueError(
            f"'{name}' has shape {tuple(found.shape)}; expected {tuple(leaf.shape)}, the shape in the template. Is it "
            "of another model?"
        )
    if found.dtype != leaf.dtype and (strict or found.is_complex() > leaf.is_complex()):
        hint = "" if found.is_complex() > leaf.is_complex() else ". With strict=False it is converted."
        raise ValueError(
            f"'{name}' is a tensor of {found.dtype}; expected {leaf.dtype}, the dtype in the template{hint}"
        )


def _filled(leaf: Any, found: Any) -> Any:
    """A new leaf like one of the template, with other numbers."""
    if not isinstance(leaf, Tensor):
        return type(leaf)(found.item()) if isinstance(found, Tensor) else found
    if _is_sharded(leaf) and not _is_sharded(found):
        from torch.distributed.tensor import distribute_tensor

        like: Any = leaf  # A DTensor.
        # Every process has the whole tensor, and keeps its part of it.
        found = distribute_tensor(found.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    elif _is_sharded(found) and not _is_sharded(leaf):
        found = found.full_tensor()
    new = torch.empty_like(leaf, requires_grad=False).copy_(found)
    if isinstance(leaf, torch.nn.Parameter):
        return torch.nn.Parameter(new, leaf.requires_grad)
    return new.requires_grad_(leaf.requires_grad)
