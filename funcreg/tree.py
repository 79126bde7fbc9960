"""Trees of tensors: flattening, mapping, arithmetic and selection. The only module that knows optree.

Eager code flattens with optree. Traced code walks the tree in plain Python, which every version of
`torch.compile` follows; the same walk finds the path of a leaf when two trees do not match.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import optree
import torch
from torch import Tensor

from funcreg._typing import Hyper, Mask, Params, Scalar, Updates
from funcreg.construction import Call, Remembering, written
from funcreg.notices import warn_user
from funcreg.ranges import flags
from funcreg.sharding import OVER, any_sharded, apply, like, reduce, whole
from funcreg.undocumented import (
    dynamo_asks,
    has_tangents,
    is_batched,
    is_compiling,
    is_traced,
    is_transformed,
    without_levels,
)

Path = tuple[Any, ...]


class Absent(NamedTuple):
    """Stands where a mask left a leaf out: a node without leaves, which every map walks past."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = Absent()
torch.serialization.add_safe_globals([Absent])  # States with leaves that a mask left out go through torch.load.


# Structure


#: Keys, children and what builds such a node from new children. A bare tuple and lists, which trace fast.
_Opened = tuple[list[Any], list[Any], Callable[[list[Any]], Any]]


def _open(node: Any) -> _Opened | None:
    """One level of a tree, children in optree's order, or None for a leaf."""
    if isinstance(node, (Tensor, int, float, str)):
        return None
    kind: Any = type(node)
    if kind is dict or kind is OrderedDict:
        order = list(node)
        keys = order if kind is OrderedDict or len(order) < 2 else _sorted_keys(order)

        def rebuild(children: list[Any]) -> Any:
            found = dict(zip(keys, children, strict=True))
            return kind([(key, found[key]) for key in order])

        return keys, [node[key] for key in keys], rebuild
    fields = getattr(node, "_fields", None)
    if isinstance(node, tuple) and fields is not None:
        return list(fields), list(node), lambda children: kind(*children)
    if kind is tuple or kind is list:
        return list(range(len(node))), list(node), lambda children: kind(children)
    if node is None:
        return [], [], lambda children: None
    return None if torch.compiler.is_dynamo_compiling() else _open_registered(node)


def level(node: Any) -> _Opened | None:
    """Keys and children of a node, and what builds such a node from new children; None for a leaf."""
    return _open(node)


def _open_registered(node: Any) -> _Opened | None:
    """One level of a node of a type that optree was told of."""
    if optree.tree_is_leaf(node):
        return None
    children, metadata, entries, unflatten = optree.tree_flatten_one_level(node)
    return list(entries), list(children), lambda children: unflatten(metadata, children)


def _sorted_keys(keys: list[Any]) -> list[Any]:
    try:
        return sorted(keys)
    except TypeError:  # Keys of several types, which optree sorts by type first.
        return sorted(keys, key=lambda key: (f"{type(key).__module__}.{type(key).__qualname__}", key))


def _walk(node: Any, leaves: list[Any]) -> Callable[[Any], Any] | None:
    """Append the leaves of a tree; return what builds such a tree from an iterator of new ones, None for a leaf."""
    kind: Any = type(node)
    order: Any
    if kind is dict:
        order = list(node)
        keys = order if len(order) < 2 else _sorted_keys(order)
    elif kind is tuple or (isinstance(node, tuple) and hasattr(node, "_fields")):
        order = keys = range(len(node))
    else:
        return _walk_others(node, leaves)
    builders: list[Callable[[Any], Any] | None] = []
    for key in keys:  # Without calls and comprehensions: traced code pays for each.
        child = node[key]
        if isinstance(child, Tensor):
            leaves.append(child)
            builders.append(None)
        else:
            builders.append(_walk(child, leaves))

    def build(new: Any) -> Any:
        built: dict[Any, Any] = dict.fromkeys(order)
        for key, builder in zip(keys, builders, strict=True):
            built[key] = next(new) if builder is None else builder(new)
        if kind is dict:
            return built
        return kind(built.values()) if kind is tuple else kind(*built.values())

    return build


def _walk_others(node: Any, leaves: list[Any]) -> Callable[[Any], Any] | None:
    """The same for leaves, and for nodes that are neither dicts nor tuples."""
    opened = _open(node)
    if opened is None:
        leaves.append(node)
        return None
    _, children, rebuild = opened
    builders = [_walk(child, leaves) for child in children]
    return lambda new: rebuild([next(new) if builder is None else builder(new) for builder in builders])


def flatten(tree: Any) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """The leaves of a tree, and the function that builds such a tree from new leaves."""
    if torch.compiler.is_dynamo_compiling():
        if isinstance(tree, Tensor):
            return [tree], lambda new: next(iter(new))
        leaves: list[Any] = []
        builder = _walk(tree, leaves)
        return leaves, lambda new: next(iter(new)) if builder is None else builder(iter(new))
    leaves, spec = optree.tree_flatten(tree)
    return leaves, lambda new: optree.tree_unflatten(spec, new)


def structure(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a tree, and what else there is of it, which can be compared and given to `restored`."""
    leaves, spec = optree.tree_flatten(tree)
    return leaves, spec


def restored(spec: Any, leaves: Iterable[Any]) -> Any:
    """A tree of some structure."""
    return optree.tree_unflatten(spec, leaves)


def reader(tree: Any) -> Callable[[Any], list[Any] | None]:
    """A function that reads the leaves of trees of one structure, fast, or returns None for another structure.

    None also for a dict whose keys came in another order, and for nodes of types that optree was told of.
    """
    leaves, spec = structure(tree)
    numbered = optree.tree_unflatten(spec, range(len(leaves)))
    read = _reader(numbered)
    found: list[Any] = []
    if read is not None and not read(numbered, found):
        return lambda other: None
    order = sorted(range(len(leaves)), key=found.__getitem__) if read is not None else [0]
    in_order = order == list(range(len(leaves)))

    def leaves_of(other: Any) -> list[Any] | None:
        out: list[Any] = []
        if read is None:
            return [other]
        if not read(other, out):
            return None
        return out if in_order else [out[i] for i in order]

    return leaves_of


def _reader(node: Any) -> Callable[[Any, list[Any]], bool] | None:
    """What appends the leaves of such a node and says whether there was one; None for a leaf."""
    kind = type(node)
    if kind is int:
        return None
    if kind is dict or kind is OrderedDict:
        keys, children = list(node), list(node.values())
    elif kind is tuple or kind is list or (isinstance(node, tuple) and hasattr(node, "_fields")):
        keys, children = None, list(node)
    elif node is None:
        return lambda other, out: other is None
    else:
        return lambda other, out: False
    count, readers = len(children), [_reader(child) for child in children]
    only_leaves = not any(readers)

    def read(other: Any, out: list[Any]) -> bool:
        if type(other) is not kind or len(other) != count or (keys is not None and list(other) != keys):
            return False
        inside = other if keys is None else other.values()
        if only_leaves:
            out.extend(inside)
            return True
        for child, deeper in zip(inside, readers, strict=True):
            if deeper is None:
                out.append(child)
            elif not deeper(child, out):
                return False
        return True

    return read


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, dictionaries in the order of their sorted keys.

    Example:
        >>> tree_leaves({"b": 1, "a": (2, [3])})
        [2, 3, 1]
    """
    return flatten(tree)[0]


def tree_map(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Build a tree of `f(leaf, ...)` from the leaves of trees of one structure.

    Args:
        f: Function of one leaf of each tree.
        tree: Nested dicts, lists, tuples, named tuples, or one leaf.
        rest: Trees of the same structure.

    Raises:
        ValueError: Two trees differ; the message names the leaf.

    Example:
        >>> tree_map(lambda a, b: a + b, {"x": 1, "y": (2, 3)}, {"x": 10, "y": (20, 30)})
        {'x': 11, 'y': (22, 33)}
    """
    leaves, rebuild = flatten(tree)
    columns = [leaves_like(tree, other) for other in rest]
    return rebuild([f(*row) for row in zip(leaves, *columns, strict=True)])


def leaves_like(tree: Any, other: Any, names: tuple[str, str] = ("the first tree", "a later tree")) -> list[Any]:
    """The leaves of `other`, one for each of `tree`, or an error that names the leaf where they part."""
    if not torch.compiler.is_dynamo_compiling():
        try:
            found = optree.tree_structure(tree).flatten_up_to(other)
        except ValueError:
            found = None  # The walk below finds the place and says it.
        if found is not None:
            return found
    found = []
    _pair(tree, other, found, (), names)
    return found


def _pair(node: Any, other: Any, found: list[Any], path: Path, names: tuple[str, str]) -> None:
    if isinstance(node, Tensor):
        found.append(other)
        return
    if type(node) is dict and type(other) is dict and _same_keys(order := list(node), list(other)):
        keys = places = order if len(order) < 2 else _sorted_keys(order)
        children, others = node, other
    else:
        opened = _open(node)
        if opened is None:
            found.append(other)
            return
        against = _open(other)
        if against is None or not _same_keys(opened[0], against[0]):
            raise ValueError(_difference(opened, against, node, other, path, names))
        keys, children = opened[0], opened[1]
        places, others = range(len(keys)), against[1]
        if keys != against[0]:
            there = dict(zip(against[0], against[1], strict=True))
            others = [there[key] for key in keys]
    for key, place in zip(keys, places, strict=True):
        child = children[place]
        if isinstance(child, Tensor):
            found.append(others[place])
        else:
            _pair(child, others[place], found, (*path, key), names)


def _same_keys(a: list[Any], b: list[Any]) -> bool:
    return a == b or (len(a) == len(b) and all(key in b for key in a))


def _difference(opened: _Opened, against: _Opened | None, node: Any, other: Any, path: Path, names: Any) -> str:
    first, second = names
    where = f" at '{dotted(path)}'" if path else ""
    cause = f"Are {first} and {second} trees of the same model?"
    if against is not None:
        missing = [dotted((*path, key)) for key in opened[0] if key not in against[0]]
        unknown = [dotted((*path, key)) for key in against[0] if key not in opened[0]]
        parts = [f"lacks '{key}'" for key in missing] + [f"has '{key}', unknown to {first}" for key in unknown]
        if not unknown and second == "a hyperparameter":
            cause = (
                f"It needs a number for each leaf, also for one that a mask leaves out, as in {{{missing[0]!r}: 0.0}}."
            )
        parts = parts[:6] + [f"{len(parts) - 6} more"] * (len(parts) > 6)
        if any(["*" in key for key in unknown]):
            cause = "Keys are whole names; globs go to select, and to per_leaf for a penalty and strength of each."
        begins = next((key for key in unknown if any([name.startswith(f"{key}.") for name in missing])), None)
        if begins is not None:
            cause = (
                f"'{begins}' stands for all that begins with it only where dicts are nested; here names are whole. "
                "Parts of a flat dict go by patterns: select, partition, per_leaf."
            )
        return f"{second} does not match {first}: it {', '.join(parts)}. {cause}"
    return f"{second} does not match {first}{where}: expected {kind_of(node)}, got {kind_of(other)}. {cause}"


def kind_of(node: Any) -> str:
    """What a value is, for an error text."""
    if isinstance(node, Tensor):
        return f"a tensor of shape {tuple(node.shape)}"
    if isinstance(node, Absent):
        return "a leaf that a mask leaves out"
    if node is None or isinstance(node, (bool, int, float, str, bytes)):
        return f"{node!r}"
    kind = type(node)
    return f"a {kind.__module__}.{kind.__name__}" if kind.__module__ == "numpy" else f"a {kind.__name__}"


def dotted(path: Path) -> str:
    """A path as users write it: `encoder.0.weight`."""
    return ".".join([str(key) for key in path])


def map_with_path(f: Callable[[Path, Any], Any], tree: Any, path: Path = ()) -> Any:
    """Build a tree of `f(path, leaf)`."""
    if isinstance(tree, Tensor) or (opened := _open(tree)) is None:
        return f(path, tree)
    keys, children, rebuild = opened
    return rebuild([map_with_path(f, child, (*path, key)) for key, child in zip(keys, children, strict=True)])


def tree_paths(tree: Any) -> list[str]:
    """The names of the leaves, dotted, in the order of `tree_leaves`.

    Example:
        >>> tree_paths({"head": {"weight": 0.5, "bias": 1.0}, "body": (2.0,)})
        ['body.0', 'head.bias', 'head.weight']
    """
    return [dotted(path) for path in leaf_paths(tree)]


def leaf_paths(tree: Any) -> list[Path]:
    """The keys on the way to each leaf, in the order of `tree_leaves`."""
    paths: list[Path] = []
    map_with_path(lambda path, leaf: paths.append(path), tree)
    return paths


def tree_types(tree: Any) -> list[str]:
    """The named tuples in a tree and where they are, such as `1.AdamState`."""
    found: list[str] = []
    _find_types(tree, (), found)
    return found


def _find_types(node: Any, path: Path, found: list[str]) -> None:
    opened = _open(node)
    if opened is None:
        return
    if hasattr(node, "_fields"):
        found.append(dotted((*path, type(node).__name__)))
    for key, child in zip(opened[0], opened[1], strict=True):
        _find_types(child, (*path, key), found)


def broadcast(prefix: Any, tree: Any, name: str = "a prefix") -> list[Any]:
    """The value of a prefix tree at each leaf of `tree`: a leaf of the prefix stands for all leaves below it."""
    opened = _open(prefix)
    if opened is None:  # The common case: one value for all.
        return [prefix] * len(tree_leaves(tree))
    values: list[Any] = []
    _spread(prefix, tree, values, (), ("the parameters", name))
    return values


def _spread(prefix: Any, node: Any, values: list[Any], path: Path, names: tuple[str, str]) -> None:
    if isinstance(node, Absent):
        return
    opened = _open(prefix)
    if opened is None:
        values.extend([prefix] * len(tree_leaves(node)))
        return
    against = _open(node)
    if against is None or not _same_keys(opened[0], against[0]):
        there = against or ([], [], lambda children: None)
        raise ValueError(_difference(there, opened if against else None, node, prefix, path, names))
    prefixes = dict(zip(opened[0], opened[1], strict=True))
    for key, child in zip(against[0], against[1], strict=True):
        _spread(prefixes[key], child, values, (*path, key), names)


# What a call may be given


#: The dtypes that arithmetic is defined in: eight-bit floats are for storage, and complex32 has few operators.
_NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)


def check_params(params: Any, name: str = "params") -> None:
    """Raise an error that names the first leaf that is not a dense tensor of real or complex numbers."""
    if params is None:
        _check_leaf(name, None)
    for leaf in tree_leaves(params):
        fits = isinstance(leaf, Tensor) and leaf.dtype in _NUMBERS and leaf.layout is torch.strided
        if not fits or type(leaf) in _LAZY:
            map_with_path(lambda path, leaf: _check_leaf(_named(name, dotted(path)), leaf), params)


def _named(tree: str, path: str) -> str:
    return f"{tree} '{path}'" if path else tree


def _check_leaf(name: str, leaf: Any) -> None:
    if type(leaf) in _LAZY:
        raise ValueError(f"{name} has no shape yet; run its module once on some inputs, which makes it a tensor")
    if isinstance(leaf, Tensor):
        _check_numbers(name, leaf, "is it a buffer?", _REMEDY)
        return
    raise TypeError(
        f"{name} is {kind_of(leaf)}; expected a tensor of floating point or complex numbers. {_leaf_hint(leaf)}"
    )


#: Parameters of lazy modules that have not run.
_LAZY = (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)
_REMEDY = "The parameters of a module are dict(module.named_parameters())."


def _leaf_hint(leaf: Any) -> str:
    """What to do about something that is no tensor where a leaf of parameters is expected."""
    if isinstance(leaf, Mapping) or dataclasses.is_dataclass(leaf):
        return f"Make a dict of it, {'dict' if isinstance(leaf, Mapping) else 'vars'}(...): this type is no tree."
    if isinstance(leaf, (int, float)) or hasattr(leaf, "__array__"):
        return "torch.as_tensor(...) makes a tensor of it."
    if isinstance(leaf, Iterable) and not isinstance(leaf, (str, Iterator, torch.nn.Module)):
        return f"Make a list or a dict of it: this type is no tree. {_REMEDY}"
    return _REMEDY


def _check_numbers(name: str, leaf: Tensor, cause: str, remedy: str) -> None:
    """Raise a TypeError if a tensor has no arithmetic: integers, eight-bit floats, sparse layouts."""
    if leaf.layout is not torch.strided:
        raise TypeError(
            f"{name} has the layout {leaf.layout}; expected a dense tensor. Call to_dense() on it; an embedding gives "
            "dense gradients with sparse=False."
        )
    if leaf.dtype in _NUMBERS:
        return
    if leaf.is_floating_point() or leaf.is_complex():
        better = "complex64" if leaf.is_complex() else "bfloat16 or float32"
        raise TypeError(
            f"{name} is a tensor of {leaf.dtype}, which torch stores but hardly computes with. Keep the values that "
            f"are trained in {better}, and convert them for the forward pass."
        )
    raise TypeError(
        f"{name} is a tensor of {leaf.dtype}; {cause} Expected a tensor of floating point or complex numbers. {remedy}"
    )


def check_alike(tree: Any, other: Any, names: tuple[str, str]) -> None:
    """Raise an error that names the first leaf of `other` that does not fit that of `tree`.

    Leaves fit if they have one shape and device, and are dense tensors of numbers, complex only where those of `tree`
    are.
    """
    leaves = tree_leaves(tree)
    _check_kinds(tree, leaves, _alike(tree, leaves, other, names), names)


def _check_kinds(tree: Any, leaves: list[Tensor], others: list[Any], names: tuple[str, str]) -> None:
    """Raise a TypeError for the first of the others that is not dense, or not of such numbers as the leaf."""
    for i, leaf, found in zip(range(len(leaves)), leaves, others, strict=True):
        if found.dtype == leaf.dtype and found.layout is torch.strided:  # Its own dtype was checked in the first tree.
            continue
        if found.dtype in _NUMBERS and found.layout is torch.strided and (leaf.is_complex() or not found.is_complex()):
            continue
        name = _named(names[1], tree_paths(tree)[i])
        _check_numbers(
            name, found, "is it a mask, an index or a count?", "Gradients are of the dtype of their parameters."
        )
        raise TypeError(
            f"{name} is a tensor of {found.dtype}; expected real numbers, because the leaf in {names[0]} is of "
            f"{leaf.dtype}. Take its real part, if the imaginary part is zero."
        )


def filled(
    params: Params,
    updates: Updates,
    allowed: Sequence[bool] | Callable[[Params], Sequence[bool]] | None = None,
    names: tuple[str, str] = ("params", "updates"),
) -> Updates:
    """Updates, checked as by `check_alike`, with zeros for each None that stands for a leaf where that is allowed.

    `backward` leaves None as the gradient of a parameter that the loss does not use, or that is frozen.

    Args:
        params: Tree of parameters.
        updates: Tree like the parameters, with None for some leaves.
        allowed: One bool for each leaf, whether None may stand there, or a function that makes them from parameters
            and is called only if there is a None; by default None may stand nowhere.
        names: What errors call the two trees.

    Raises:
        ValueError: A leaf is None where it is not allowed, or differs in structure, shape or device.
        TypeError: A leaf is no dense tensor of numbers.
    """
    leaves, rebuild = flatten(params)
    found = leaves_like(params, updates, names)
    complete = all([update is not None for update in found])
    if not complete:
        bools = allowed(params) if callable(allowed) else allowed or [False] * len(leaves)
        rows = zip(leaves, found, bools, strict=True)
        found = [torch.zeros_like(leaf) if update is None and may else update for leaf, update, may in rows]
    _check_leaves(params, leaves, found, names)
    _check_kinds(params, leaves, found, names)
    return updates if complete else rebuild(found)


def _alike(tree: Any, leaves: list[Tensor], other: Any, names: tuple[str, str]) -> list[Tensor]:
    """The leaves of `other`, checked against those of `tree`."""
    others = leaves_like(tree, other, names)
    _check_leaves(tree, leaves, others, names)
    return others


def _check_leaves(tree: Any, leaves: list[Tensor], others: list[Any], names: tuple[str, str]) -> None:
    for i, leaf, found in zip(range(len(leaves)), leaves, others, strict=True):
        if not (isinstance(found, Tensor) and leaf.shape == found.shape and leaf.device == found.device):
            _refuse(leaf, found, names, tree_paths(tree)[i])


def _refuse(leaf: Tensor, found: Any, names: tuple[str, str], path: str) -> None:
    first, second = names
    name = _named(second, path)
    if found is None:
        raise ValueError(
            f"{name} is None; expected a tensor, as in {first}. This parameter got no gradient: backward() leaves None "
            "for a parameter that the loss does not use or that does not require a gradient. Freeze the leaf, as in "
            "chain(freeze(mask), ...), or give zeros for it, torch.zeros_like(parameter)."
        )
    if not isinstance(found, Tensor):
        raise TypeError(f"{name} is {kind_of(found)}; expected a tensor, as in {first}.")
    if leaf.shape != found.shape:
        raise ValueError(
            f"{name} has shape {tuple(found.shape)}; expected {tuple(leaf.shape)}, the shape in {first}. "
            f"Are {first} and {second} of the same model?"
        )
    raise ValueError(f"{name} is on {found.device}; expected {leaf.device}, the device of this leaf in {first}")


# Arithmetic


F = TypeVar("F", bound=Callable[..., Any])
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
#: Types of devices for which torch casts by itself.
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
_BARE = (Tensor, torch.nn.Parameter)


def without_autocast(f: F) -> F:
    """A function that computes in the precision of its arguments, also where `torch.autocast` is on."""

    @functools.wraps(f)
    def exact(*args: Any, **kwargs: Any) -> Any:
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return exact(*args, **kwargs)
        return f(*args, **kwargs)

    return exact  # pyright: ignore[reportReturnType]  # It takes and returns what the function does.


def widen(x: Tensor) -> Tensor:
    """A tensor in the precision in which it is computed with: float32 at least."""
    return x.to(torch.float32) if x.dtype in _SIXTEEN_BITS else x


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and moments of a tensor: float32 for 16-bit numbers, which saturate; else its own."""
    return torch.float32 if dtype in _SIXTEEN_BITS else dtype


def compute(f: Callable[..., Tensor], tree: Any, *rest: Any, hyper: Sequence[Hyper] = ()) -> Any:
    """Map arithmetic over tensors: `f` sees float32 at least, results have the dtype of the leaves of `tree`.

    Args:
        f: Function of one leaf of each tree, then of each hyperparameter's value there.
        tree: Tree of tensors that the results are like.
        rest: Trees of the same structure and shapes.
        hyper: Numbers, tensors, or prefix trees of them.
    """
    leaves, rebuild = flatten(tree)
    results = _compute(f, tree, leaves, rest, hyper)
    return rebuild([x if x.dtype == w.dtype else x.to(w.dtype) for x, w in zip(results, leaves, strict=True)])


def compute_wide(f: Callable[..., Tensor], tree: Any, *rest: Any, hyper: Sequence[Hyper] = ()) -> Any:
    """`compute` with results in the precision they were computed in."""
    leaves, rebuild = flatten(tree)
    return rebuild(_compute(f, tree, leaves, rest, hyper))


def compute_leaves(f: Callable[..., Tensor], tree: Any, *rest: Any, hyper: Sequence[Hyper] = ()) -> list[Tensor]:
    """`compute_wide` with results in a list."""
    return _compute(f, tree, tree_leaves(tree), rest, hyper)


def _compute(
    f: Callable[..., Tensor], tree: Any, leaves: list[Tensor], rest: Sequence[Any], hyper: Sequence[Hyper]
) -> list[Tensor]:
    rows = _rows(tree, leaves, rest, hyper)
    results: list[Tensor] = []
    sharded = any_sharded([x for row in rows for x in row])
    for row in rows:
        try:
            results.append(apply(f, row) if sharded and any_sharded(row) else f(*row))
        except ValueError as error:
            raise ValueError(f"at leaf '{tree_paths(tree)[len(results)]}': {error}") from error
    return results


def _rows(tree: Any, leaves: list[Tensor], rest: Sequence[Any], hyper: Sequence[Hyper]) -> list[tuple[Any, ...]]:
    """For each leaf what a rule of it sees."""
    trees = [leaves, *[_alike(tree, leaves, other, ("the parameters", "the state or updates")) for other in rest]]
    # Without calls for what most leaves do not need: traced code pays for each call of each leaf.
    columns: list[list[Any]] = [[x if x.dtype not in _SIXTEEN_BITS else widen(x) for x in column] for column in trees]
    for value in hyper:
        if isinstance(value, (int, float)):
            columns.append([value] * len(leaves))
        else:
            spread = broadcast(value, tree, "a hyperparameter")
            for i, x in zip(range(len(spread)), spread, strict=True):
                if isinstance(x, Tensor) and x.ndim and not fits(x, leaves[i].shape):
                    raise ValueError(
                        f"at leaf '{tree_paths(tree)[i]}': a hyperparameter has shape {tuple(x.shape)}; expected one "
                        f"that broadcasts to {tuple(leaves[i].shape)}, the shape of the leaf"
                    )
            columns.append([beside(x, leaf) for x, leaf in zip(spread, leaves, strict=True)])
    return list(zip(*columns, strict=True))


def reduce_leaves(
    f: Callable[..., Tensor], tree: Any, *rest: Any, hyper: Sequence[Hyper] = (), op: str = "sum"
) -> list[Tensor]:
    """For each leaf the sum of the terms that a function makes of it, a tensor without dimensions.

    Over sharded leaves it is the same in every process, and takes one collective for all of them.

    Args:
        f: As in `compute`.
        tree: Tree of tensors.
        rest: Trees of the same structure and shapes.
        hyper: Numbers, tensors, or prefix trees of them.
        op: `"sum"`, `"any"`, or `"max"` for the largest of terms of at least 0, which is 0 where there are none.
    """
    if any_sharded(tree_leaves((tree, rest, hyper))):
        name = lambda i: tree_paths(tree)[i]
        return reduce(f, _rows(tree, tree_leaves(tree), rest, hyper), op, name)
    over = OVER[op]
    return compute_leaves(lambda *row: over(f(*row)), tree, *rest, hyper=hyper)


def gathered(tree: Any) -> Any:
    """A tree whose sharded leaves are whole in every process; the tree itself if none is sharded."""
    leaves, rebuild = flatten(tree)
    return rebuild(map(whole, leaves)) if any_sharded(leaves) else tree


def spread_like(tree: Any, params: Any) -> Any:
    """A tree of whole leaves, each sharded as that of the parameters is."""
    leaves, rebuild = flatten(params)
    if not any_sharded(leaves):
        return tree
    return rebuild([like(x, leaf) for x, leaf in zip(leaves_like(params, tree), leaves, strict=True)])


def fits(x: Tensor, shape: Sequence[int]) -> bool:
    """Whether a tensor broadcasts to a shape."""
    ends = zip(reversed(x.shape), reversed(shape), strict=False)
    return x.ndim <= len(shape) and all([n in (1, size) for n, size in ends])


def beside(value: Any, leaf: Tensor) -> Any:
    """A value where the leaf is: trees may span devices, a counter lies on one."""
    return value.to(leaf.device) if isinstance(value, Tensor) and value.device != leaf.device else value


def times(c: Scalar, x: Tensor) -> Tensor:
    """A weight times terms or slopes; an infinite weight leaves zeros what they are, as its proximal operator does."""
    if isinstance(c, (int, float)) and c != math.inf:
        return c * x
    finite = torch.where(c == math.inf, 1.0, c) if isinstance(c, Tensor) else 1.0
    return torch.where(x == 0, finite, c) * x


def product(params: Params, *factors: Hyper) -> Hyper:
    """The product of hyperparameters: a scalar, or a tree like the parameters if a factor is a tree."""
    if all(_open(factor) is None for factor in factors):
        return functools.reduce(operator.mul, factors)
    rows = zip(*(broadcast(factor, params, "a hyperparameter") for factor in factors), strict=True)
    return flatten(params)[1]([functools.reduce(operator.mul, row) for row in rows])


def scalar_device(params: Params) -> torch.device:
    """Where counters lie: with the parameters, to be batched with them; on the CPU if those span devices."""
    devices = {leaf.device for leaf in tree_leaves(params)}
    single = len(devices) == 1 and next(iter(devices)).type != "mps"  # No float64 there.
    return next(iter(devices)) if single else torch.device("cpu")


def zeros(params: Params, dtype: torch.dtype | None = None) -> Any:
    """Accumulators at zero, each in its own memory, in `dtype` or in float32 at least."""
    return tree_map(lambda w: torch.zeros_like(w, dtype=kept_dtype(w, dtype)), params)


def kept_dtype(w: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a state keeps what is like a leaf: complex if and only if the leaf is, whatever `dtype` is."""
    kept = dtype or wide(w.dtype)
    if w.is_complex() and not kept.is_complex:
        return torch.complex128 if kept == torch.float64 else torch.complex64
    return kept if w.is_complex() else _REAL.get(kept, kept)


#: Of complex dtypes those of their parts, which `dtype.to_real()` gives, too, but not where code is compiled.
_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


def total(terms: Sequence[Tensor]) -> Tensor:
    """The sum of scalars; stacked, because a sharded scalar is reduced once a stack and once a `+`."""
    if not terms:
        return torch.zeros(())
    dtype = terms[0].dtype
    for term in terms[1:]:
        dtype = torch.promote_types(dtype, term.dtype)
    return terms[0] if len(terms) == 1 else torch.stack([t.to(terms[0].device, dtype) for t in terms]).sum()


def squared(w: Tensor) -> Tensor:
    """Entry by entry, the squared magnitude, real also for complex entries."""
    return w.real.square() + w.imag.square() if w.is_complex() else w.square()


def bare(w: Tensor) -> bool:
    """Whether operations on a tensor are nothing but arithmetic: neither traced, batched, nor differentiated."""
    if is_traced() or type(w) not in _BARE or (w.requires_grad and torch.is_grad_enabled()):
        return False
    return not has_tangents() and not is_transformed(lambda: [w])


def sign(w: Tensor) -> Tensor:
    """The sign, or the phase of a complex entry; NaN goes through, which `sgn` makes 0."""
    if not w.is_complex() and bare(w):
        signs = w.sign()
        if w.device.type == "cpu" and not math.isnan(w.sum()):  # A look costs less than to write once more.
            return signs
        # The same in a third of the time, but for derivatives. Adding zero turns -0.0 into +0.0.
        return torch.clamp(w, signs, signs, out=signs).add_(0.0)
    return torch.where(w != w, w, w.sgn() if w.is_complex() else w.sign())


def running_sum(x: Tensor) -> Tensor:
    """Sums along the last dimension up to each entry.

    Of a dimension counted from the end, torch sums each shard by itself: compiled code may see sharded tensors.
    """
    return x.cumsum(x.ndim - 1)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root with derivative 0 at 0, of any order: both branches of a `where` are differentiated."""
    if bare(x):
        return x.sqrt()
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).sqrt())


def readable(w: Tensor) -> bool:
    """Whether a number may be read from a tensor: one on the CPU, neither traced nor batched; derivatives may run."""
    if is_traced():
        return False
    w = without_levels(w)
    return type(w) in _BARE and w.device.type == "cpu" and not is_batched(w)


def euclidean(w: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    r"""Euclidean norm over some dimensions, which are kept, or over all; derivatives at zero are 0, of any order.

    Entries whose squares leave the range of their dtype (beyond 1e19 and below 1e-19 in float32) are squared in units
    of a power of two. Where numbers can be read, the others pay nothing for that.

    Args:
        w: Tensor in float32 at least.
        dims: Dimensions that are reduced, of size 1 after it; None for all of them, and a tensor without dimensions.
    """
    if dims == () and not w.is_complex():
        return w.abs()
    if not w.numel() or (is_traced() and _widest(w) is not w):
        return safe_sqrt(_sum_of_squares(_widest(w), dims)).to(w.real.dtype)
    squares = _sum_of_squares(w, dims)
    if not readable(squares):
        return _rescaled_norm(w, dims)
    if _ordinary(squares):
        return safe_sqrt(squares)
    kept = [d for d in range(w.ndim) if dims is not None and d not in dims]
    if not kept or not dims:
        return _rescaled_norm(w, dims)
    # The rare groups alone once more: groups of zeros are among them, and common.
    least, most, _ = _range_of_squares(squares.dtype)
    rare = ~((squares >= least) & (squares <= most))
    rows = w if kept == [0] else w.permute([*kept, *dims]).flatten(0, len(kept) - 1)
    rows = rows.index_select(0, rare.reshape(-1).nonzero()[:, 0])
    if not rows.detach().abs().amax():
        return safe_sqrt(squares)
    norms = _rescaled_norm(rows, tuple(range(1, rows.ndim))).reshape(-1)
    return safe_sqrt(torch.where(rare, torch.ones_like(squares), squares)).index_put((rare,), norms)


def _sum_of_squares(w: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    squares = squared(w)
    if dims is None:
        return squares.sum()
    return squares.sum(dims, keepdim=True) if dims else squares  # sum(()) would reduce them all.


def _widest(w: Tensor) -> Tensor:
    """A tensor of float32 in float64, whose range holds all of its squares; in compiled code that costs no memory."""
    if w.device.type == "mps" or w.dtype not in (torch.float32, torch.complex64):
        return w
    return w.to(torch.complex128 if w.is_complex() else torch.float64)


def _range_of_squares(dtype: torch.dtype) -> tuple[float, float, float]:
    """Between which sums of squares are exact, and the power of two that brings smaller entries into this range."""
    powers = 1024 if dtype == torch.float64 else 128
    return 2.0 ** (-5 * powers // 8), 2.0 ** (5 * powers // 8), 2.0 ** (21 * powers // 32)


def _ordinary(squares: Tensor) -> bool:
    """Whether sums of squares lie in the range in which they are exact."""
    least, most, _ = _range_of_squares(squares.dtype)
    low, high = squares.detach().aminmax()
    return low.item() >= least and high.item() <= most


def _rescaled_norm(w: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """The norm in units of a power of two, chosen for each group by what its squares came to."""
    squares = _sum_of_squares(w.detach(), dims)
    least, most, unit = _range_of_squares(squares.dtype)
    small, large = torch.full_like(squares, unit), torch.full_like(squares, 1 / unit)
    scale = torch.where(squares > most, large, torch.where(squares < least, small, torch.ones_like(squares)))
    return safe_sqrt(_sum_of_squares(w * scale, dims)) / scale


def global_norm(tree: Any) -> Tensor:
    r"""Euclidean norm of all entries of a tree, :math:`\sqrt{\sum_i |x_i|^2}`.

    Sixteen-bit leaves are summed in float32. The gradient at zero is zero.

    Shape:
        A 0-dim tensor.

    Example:
        >>> global_norm({"weight": torch.tensor([3.0]), "bias": torch.tensor([4.0])})
        tensor(5.)
    """
    check_params(tree, "tree")
    leaves = [widen(x) for x in tree_leaves(tree)]
    if any_sharded(leaves):  # Without a look at numbers: all processes are to do the same.
        rows, name = [(x,) for x in leaves], lambda i: tree_paths(tree)[i]
        return safe_sqrt(total(reduce(lambda x: squared(_widest(x)), rows, "sum", name, entrywise=True))).to(
            functools.reduce(torch.promote_types, [x.dtype.to_real() for x in leaves])
        )
    if is_traced() and all([_widest(x) is not x for x in leaves]):
        return safe_sqrt(total([squared(_widest(x)).sum() for x in leaves])).to(torch.float32)
    squares = total([squared(x).sum() for x in leaves])
    if not leaves or (readable(squares) and _ordinary(squares)):
        return safe_sqrt(squares)
    return euclidean(torch.stack([euclidean(x).to(squares.device, squares.dtype) for x in leaves]))


def apply_updates(params: Params, updates: Updates) -> Params:
    r"""Add updates to parameters, :math:`w + u`, in the dtype of the parameters.

    Raises:
        ValueError: The trees, or the shapes of a leaf, differ.

    Example:
        >>> apply_updates({"weight": torch.tensor([1.0, 2.0])}, {"weight": torch.tensor([0.5, -2.0])})
        {'weight': tensor([1.5000, 0.0000])}
    """
    check_params(params)
    check_alike(params, updates, ("params", "updates"))
    return compute(lambda w, u: w + u, params, updates)


# Masks


def check_mask(mask: Mask | None) -> None:
    """Raise a TypeError if a mask is a string or a list of them, a class or a module."""
    if isinstance(mask, (str, bytes)):
        raise TypeError(
            f"mask is the string {mask!r}; expected a tree of bools or a function. Do you mean select({mask!r})?"
        )
    if isinstance(mask, (list, tuple, set, frozenset)) and mask and all([isinstance(name, str) for name in mask]):
        names = ", ".join(map(repr, mask))
        raise TypeError(
            f"mask is a list of strings; expected a tree of bools or a function. Do you mean select({names})?"
        )
    if isinstance(mask, type):
        name = mask.__name__
        raise TypeError(
            f"mask is the class {name}; expected a tree of bools or a function. Do you mean select({name}, module=...)?"
        )
    if isinstance(mask, torch.nn.Module):
        raise TypeError(
            f"mask is a module, a {type(mask).__name__}; expected a tree of bools or a function. The parameters of a "
            'layer are chosen by its name, as in select("encoder.*").'
        )


def mask_leaves(mask: Mask, params: Params) -> list[bool]:
    """A mask as one bool for each leaf.

    A mask that chooses no leaf would do nothing in silence, and is refused; but not the mask False, nor a selection
    that says that it may choose none, nor where an outer mask has left leaves out.
    """
    values = mask_bools(mask, params)
    if values and not any(values) and not _may_choose_none(mask) and not hidden(params):
        said = f"mask={written(mask)}" if callable(mask) else "mask"
        raise ValueError(
            f"{said} chooses no leaf, and would have no effect. The leaves are {listed(tree_paths(params))}. If that "
            "is meant, write mask=False."
        )
    return values


def _may_choose_none(mask: Mask) -> bool:
    return mask is False or (isinstance(mask, Selection) and mask.optional)


def mask_bools(mask: Mask, params: Params) -> list[bool]:
    """A mask as one bool for each leaf, which may all be False."""
    check_mask(mask)
    found, params = chosen_by(mask, params)
    if found is None:
        said = f"the mask {written(mask)} returned None" if callable(mask) else "mask is None"
        raise TypeError(f"{said}; expected a tree of bools like the parameters")
    values = broadcast(found, params, "mask")
    for i, value in enumerate(values):
        if not isinstance(value, bool):
            name = _named("mask at", tree_paths(params)[i])
            raise TypeError(f"{name} is {kind_of(value)}; expected True (apply) or False{_mask_hint(value)}")
    return values


def _mask_hint(value: Any) -> str:
    if isinstance(value, Tensor):
        return ". A mask chooses whole leaves, not entries of them; bool(...) makes a bool of a tensor with one entry"
    if isinstance(value, (str, bytes)):
        return ". For names, use select"
    return ". bool(...) makes a Python bool of it" if type(value).__module__ == "numpy" else ""


def listed(names: Iterable[str]) -> str:
    """Names for an error text, the first twenty if there are many more; a tree that is one leaf has no name."""
    names = [name or "the tree itself" for name in names]
    return ", ".join(names) if len(names) < 30 else f"{', '.join(names[:20])} and {len(names) - 20} more"


def chosen_by(function: Any, params: Params, name: str = "mask") -> tuple[Any, Params]:
    """A tree, or what a user's function makes of parameters, and the parameters that it is for.

    The function sees no leaf that an outer mask left out: dictionaries go without their keys.

    Raises:
        TypeError: The function raised one, or an AttributeError, as one does that expects a leaf; see the hint.
    """
    if not callable(function):
        return function, params
    if isinstance(params, Absent):  # There is nothing to choose from, nor a tree that a user's function knows.
        return params, params
    if isinstance(function, Selection):
        return function.choose(params), params
    seen = _visible(params)
    try:
        found = function(seen)
        return found, params if seen is not params and _fits(found, params, name) else seen
    except (AttributeError, TypeError) as error:
        if isinstance(seen, Tensor):
            raise
        hint = ", or take select(min_ndim=2), matrices or select('*.weight')" if name == "mask" else ""
        raise TypeError(
            f"{name}={written(function)} raised {type(error).__name__}: {error}. The function gets the whole tree of "
            "parameters, once, and returns a tree like it. For a rule of one leaf, write "
            f"lambda params: tree_map(lambda w: ..., params){hint}."
        ) from error


def _fits(found: Any, params: Params, name: str) -> bool:
    """Whether a tree is one for all leaves, also for those left out, as where a function returns one that it knows."""
    try:
        broadcast(found, params, name)
    except (TypeError, ValueError):
        return False
    return True


def _visible(node: Any) -> Any:
    if isinstance(node, Tensor) or (opened := _open(node)) is None or not hidden(node):
        return node
    keys, children, rebuild = opened
    if isinstance(node, dict):
        return {key: _visible(node[key]) for key in node if not isinstance(node[key], Absent)}
    return rebuild([_visible(child) for child in children]) if keys else node


def keep(tree: Any, mask: Sequence[bool]) -> Any:
    """A tree without the leaves whose bool is False."""
    leaves, rebuild = flatten(tree)
    return rebuild([leaf if kept else ABSENT for leaf, kept in zip(leaves, mask, strict=True)])


def merge(tree: Any, kept: Any, mask: Sequence[bool]) -> Any:
    """A tree with the leaves of `kept`, which `keep(tree, mask)` is like, put in their places."""
    leaves, rebuild = flatten(tree)
    new = iter(tree_leaves(kept))
    return rebuild([next(new) if here else leaf for leaf, here in zip(leaves, mask, strict=True)])


class Selection(Remembering):
    """A mask that is made from parameters when it is used, and composes with `&`, `|` and `~`.

    Args:
        choose: From parameters to one bool for each leaf.
        doc: Docstring of this selection.
        name: Name of this selection in its module, for one that every pickle refers to.
        optional: Whether it may rightly choose no leaf at all.
        facts: From parameters to what decides about each leaf, in words.
    """

    def __init__(
        self,
        choose: Callable[[Params], list[bool]],
        doc: str | None = None,
        name: str | None = None,
        optional: bool = False,
        facts: Callable[[Params], list[str]] | None = None,
    ) -> None:
        flags(optional=optional)
        self._choose, self.facts = choose, facts
        self.__doc__ = doc or type(self).__doc__
        self._name = name
        self.optional = optional

    kind = "selection"

    def __call__(self, params: Params) -> Any:
        return self.choose(params)

    def choose(self, params: Params) -> Any:
        """A tree of bools like the parameters."""
        return flatten(params)[1](self._choose(params))

    def __and__(self, other: Mask) -> Selection:
        return self._with(operator.and_, other)

    def __or__(self, other: Mask) -> Selection:
        return self._with(operator.or_, other)

    def __invert__(self) -> Selection:
        made = Selection(lambda params: [not chosen for chosen in self._choose(params)])
        return made if is_compiling() else made._made_by(operator.invert, self)

    __rand__, __ror__ = __and__, __or__

    def _with(self, f: Callable[[Any, Any], Any], other: Mask) -> Selection:
        check_mask(other)
        made = Selection(
            lambda params: [f(a, b) for a, b in zip(self._choose(params), mask_bools(other, params), strict=True)]
        )
        return made if is_compiling() else made._made_by(f, self, other)

    def _made_by(self, function: Callable[..., Any], *args: Any) -> Selection:
        self.made_by = Call(function, args, {})
        return self

    def __bool__(self) -> bool:
        if dynamo_asks():
            return True
        raise TypeError(
            f"{self!r} has no truth value: it chooses leaves once it gets parameters. Write ~a for `not a`, a & b for "
            "`a and b`, a | b for `a or b`."
        )

    def __repr__(self) -> str:
        if self._name is not None or self.made_by is None:
            return self._name or f"Selection({written(self._choose)})"
        sign = _SIGNS.get(self.made_by.function)
        if sign is None:
            return str(self.made_by)
        strength, between = sign
        operands = [
            f"({operand!r})" if isinstance(operand, Selection) and operand._strength() < least else written(operand)
            for least, operand in enumerate(self.made_by.args, start=strength)
        ]
        return f"~{operands[0]}" if len(operands) == 1 else between.join(operands)

    def _strength(self) -> int:
        """How strongly what is printed is held together."""
        return _SIGNS.get(self.made_by.function, _ATOM)[0] if self.made_by else _ATOM[0]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._name or super().__reduce_ex__(protocol)


_SIGNS: dict[Any, tuple[int, str]] = {operator.or_: (0, " | "), operator.and_: (1, " & "), operator.invert: (2, "~")}
_ATOM = (3, "")


def dimensions(params: Params) -> list[int]:
    """The number of dimensions of each leaf."""
    leaves = tree_leaves(params)
    if not all([isinstance(leaf, Tensor) for leaf in leaves]):
        check_params(params)
    return [leaf.ndim for leaf in leaves]


def counted(ndim: int) -> str:
    """A number of dimensions in words."""
    return f"{ndim} dimension{'' if ndim == 1 else 's'}"


def hidden(node: Any) -> bool:
    """Whether an outer mask left leaves out, so that a glob may rightly match none of the rest."""
    opened = _open(node)
    return isinstance(node, Absent) or (opened is not None and any(hidden(child) for child in opened[1]))


def _of_matrices(params: Params) -> list[bool]:
    found = dimensions(params)
    if len(found) > 1 and min(found) > 1:
        _look_for_stacks(params)
    return [ndim >= 2 for ndim in found]


def _look_for_stacks(params: Params) -> None:
    """Raise an error for what can only be stacked members, a bias of two dimensions; warn of what looks like them.

    These have leaves of one first size, and biases of the shape with which weights begin: (members, units).
    """
    leaves = tree_leaves(params)
    if any([len(leaf) != len(leaves[0]) for leaf in leaves]):
        return
    begins = {tuple(leaf.shape[:2]) for leaf in leaves if leaf.ndim > 2}
    for name, leaf in zip(tree_paths(params), leaves, strict=True):
        said = (
            f"matrices got '{name}' of shape {tuple(leaf.shape)}, and all leaves have {len(leaf)} entries along the "
            "first dimension: stacked members, whose biases look like matrices? Take stacked(matrices), or call inside "
            "vmap or ensemble. If these are no stacks, take select(min_ndim=2)."
        )
        last = name.split(".")[-1]
        if last == "bias" or (leaf.ndim == 2 and "bias" in last.split("_")):  # As those of attention and recurrence.
            raise ValueError(said)
        if leaf.ndim == 2 and tuple(leaf.shape) in begins and leaf.shape[0] != leaf.shape[1]:
            warn_user(said)
            return


matrices = Selection(
    _of_matrices,
    name="matrices",
    facts=lambda params: [counted(ndim) for ndim in dimensions(params)],
    doc="""A mask that is True for leaves of two or more dimensions.

    These are the weights of linear, convolution and embedding layers, not biases or the scales of normalization
    layers. The same as `select(min_ndim=2)`, but for stacked members, which are refused where a bias gives them away,
    and warned of where a leaf looks like one: `stacked(matrices)` is for them.

    Example:
        >>> matrices({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
        {'weight': True, 'bias': False}
    """,
)
