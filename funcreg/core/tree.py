"""Trees of tensors: flattening, mapping, paths and prefixes. The only module that knows optree.

Eager code flattens with optree. Traced code walks the tree in plain Python, which every version of
`torch.compile` follows; the same walk finds the path of a leaf when two trees do not match.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from funcreg.core.wording import type_of

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
                f"It needs a number for each leaf that no mask leaves out, as in {{{missing[0]!r}: 0.0}}, or is one "
                "number for all."
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
    return f"a numpy.{kind.__name__}" if kind.__module__ == "numpy" else type_of(node)


def dotted(path: Path) -> str:
    """A path as users write it: `encoder.0.weight`."""
    return ".".join([str(key) for key in path])


def at_leaf(path: str) -> str:
    """Where an error comes from, to be said before it; nothing for a tree that is one tensor."""
    return f"at leaf '{path}': " if path else ""


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
    """The value of a prefix tree at each leaf of `tree`: a leaf of the prefix stands for all leaves below it.

    A dict of the prefix may lack keys below which `tree` has no leaves, as where a mask leaves them out.
    """
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
    if against is not None and isinstance(prefix, dict) and isinstance(node, dict):
        rows = [row for row in zip(*against[:2], strict=True) if row[0] in prefix or tree_leaves(row[1])]
        against = [key for key, _ in rows], [child for _, child in rows], against[2]
    if against is None or not _same_keys(opened[0], against[0]):
        there = against or ([], [], lambda children: None)
        raise ValueError(_difference(there, opened if against else None, node, prefix, path, names))
    prefixes = dict(zip(opened[0], opened[1], strict=True))
    for key, child in zip(against[0], against[1], strict=True):
        _spread(prefixes[key], child, values, (*path, key), names)
