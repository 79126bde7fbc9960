"""Numbers in modules that may be widths which changed, where no rule says what they are."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from funcreg.networks.widths import HEAD_COUNTS, SIZES, changes, head_count, heads_before, tensors


class Stored(NamedTuple):
    """A number that a module with a forward of its own may use as a width."""

    path: str
    attribute: str  # Dotted where it is in a configuration.
    value: Any
    others: tuple[Any, ...]  # What it may have to be now.
    named: bool = False  # Whether it has the name of a width, and every dimension of this size changed.
    shared: Any = None  # The configuration that it is in.
    near: bool = True  # Whether code of the module itself mentions it, or may, and not only what is around it.

    def now(self, root: nn.Module) -> Any:
        """What it is."""
        return getattr(self.holder(root), self.attribute.rpartition(".")[2])

    def holder(self, root: nn.Module) -> Any:
        """The module, or the configuration, that it is an attribute of."""
        owner, layer = self.attribute.rpartition(".")[0], root.get_submodule(self.path)
        return getattr(layer, owner) if owner else layer

    def share_again(self, root: nn.Module) -> None:
        """Give back the configuration that modules share, where a copy of it says the same."""
        owner, layer = self.attribute.rpartition(".")[0], root.get_submodule(self.path)
        if owner and getattr(layer, owner) is not self.shared:
            here, there = vars(getattr(layer, owner)), vars(self.shared)
            if here.keys() == there.keys() and all(here[key] is there[key] for key in here):
                setattr(layer, owner, self.shared)

    def assign(self, root: nn.Module, value: Any) -> None:
        """Set it. A configuration that other modules share is copied for this one."""
        owner, _, own = self.attribute.rpartition(".")
        holder = self.holder(root)
        if getattr(holder, own) is value:
            return
        if owner:
            holder = copy.copy(holder)
            setattr(root.get_submodule(self.path), owner, holder)
        setattr(holder, own, value)


#: How often a number counts as read if that cannot be seen.
_UNSEEN = 1 << 40


@contextlib.contextmanager
def reading(root: nn.Module, several: Sequence[Stored]) -> Iterator[Counter[int]]:
    """How often code reads numbers meanwhile, by their places, and those very often of which it cannot be seen.

    Their classes have properties of their names as long as it takes, which read and write what instances hold.
    """
    read, names = Counter[int](), dict[tuple[type, str], dict[int, set[int]]]()
    modules = {id(layer): set[int]() for layer in root.modules()}  # Of which none is a copy of another one.
    for i, each in enumerate(several):
        holder, own = each.holder(root), each.attribute.rpartition(".")[2]
        names.setdefault((type(holder), own), {}).setdefault(id(holder), set()).add(i)
        if own not in vars(holder):
            read[i] = _UNSEEN
    with contextlib.ExitStack() as stack:
        for (kind, own), places in names.items():
            if not _watch(kind, own, {**modules, **places}, read, stack):
                read.update(dict.fromkeys(itertools.chain(*places.values()), _UNSEEN))
        yield read


def _watch(
    kind: type, name: str, places: Mapping[int, Set[int]], read: Counter[int], stack: contextlib.ExitStack
) -> bool:
    """Let what reads an attribute of the instances of a class add their places, those of all for a copy of one."""
    every = frozenset().union(*places.values())

    def get(holder: Any) -> Any:
        read.update(places.get(id(holder), every))
        if name in vars(holder):
            return vars(holder)[name]
        raise AttributeError(f"{type(holder).__name__!r} object has no attribute {name!r}")

    if any([name in vars(base) for base in kind.__mro__]):  # Which would be hidden.
        return False
    try:
        setattr(kind, name, property(get, lambda holder, value: vars(holder).update({name: value})))
    except (AttributeError, TypeError):  # Of a class that is built in.
        return False
    stack.callback(delattr, kind, name)
    return True


#: What every module has.
_INTERNAL = frozenset(vars(nn.Module()))
#: Names of widths that are set even where nothing uses them, so that they say what is.
_LABELS = frozenset(
    f"{kind}_{what}" for kind in ("in", "out", "hidden", "num") for what in ("features", "channels")
) | {"hidden_size", "head_hidden_size", "intermediate_size", "hidden_dim", "embed_dim"}
#: What is in other names of widths.
_WIDTHS = ("dim", "width", "hidden", "inner", "channels", "features")
#: Layers without parameters that hold widths, or counts of what these are divided into.
_BARE: dict[type, tuple[str, ...]] = {
    nn.GroupNorm: ("num_groups", "num_channels"),
    nn.ChannelShuffle: ("groups",),
    nn.Unflatten: ("unflattened_size",),
}
#: Names of functions that take parts of given sizes, how many equal ones of these there may be beside a last one, and
#: how many choices of sizes are looked at.
_SPLITS, _TIMES, _CHOICES = {"split", "split_with_sizes", "tensor_split", "narrow"}, 4, 256
#: Short names for a count of heads.
_SHORT = ("h", "nh", "n_h")
#: Endings of names of numbers that count words, classes, positions, pixels or layers, and no channels.
_OTHER_COUNTS = (
    *("vocab_size", "num_labels", "num_classes", "token_id", "num_buckets", "max_distance", "num_experts"),
    *("num_layers", "n_layer", "n_layers", "num_hidden_layers", "position_embeddings", "positions"),
    *("context_length", "max_length", "block_size", "image_size", "patch_size", "kernel_size", "num_patches"),
    *("window", "window_size", "max_len", "max_seq_len", "seq_len", "seq_length", "n_ctx", "ratio", "stride"),
)


def stored_widths(
    module: nn.Module, smaller: nn.Module, path: str, known: frozenset[str], inside_heads: bool = False
) -> Iterator[Stored]:
    """The numbers in a module that may be widths which changed, and that a forward mentions.

    Numbers with the name of a width that nothing mentions are set to what it is.
    """
    layer, before = smaller.get_submodule(path), module.get_submodule(path)
    moves, near = _moves(layer, before)
    own, named = _mentioned(layer), mentioned(smaller, path)
    sizes = _parts(module, smaller, path) if _SPLITS & {*(own or ())} else _NO_PARTS
    unchanged = {*HEAD_COUNTS} if inside_heads else set[str]()  # Heads are narrower, and not fewer.
    held = vars(before).values() if inside_heads and near and heads_before(before) is None else ()
    beside = {value for value in held if type(value) is int}
    for name, value in list(vars(layer).items()):
        if name in _INTERNAL or name in known or name in unchanged:
            continue
        readers = own if is_count(name) else named
        # Functions outside of the module read counts from it, too, as those of attention do.
        if readers is not None and name not in readers and not (near and is_count(name)):
            now = _only(layer, before, value) if name in _LABELS else None
            if now is not None:
                setattr(layer, name, now)
        elif _is_config(value):
            for key in sorted({*(own or vars(value))} - unchanged):
                number = getattr(value, key, None)
                count = head_count(layer, before, key, number) if own is not None else None
                if count is not None:
                    Stored(path, f"{name}.{key}", number, ()).assign(smaller, count)
                elif others := _others(key, number, moves, beside):
                    yield Stored(path, f"{name}.{key}", number, others, _named(layer, before, key, number), value)
        elif others := _with_shares(_others(name, value, moves, beside, sizes), name, value, moves, before):
            near_by = own is None or name in own
            yield Stored(path, name, value, others, _named(layer, before, name, value), near=near_by)
    for child, inner in layer._modules.items():
        for name in _BARE.get(type(inner), ()) if inner is not None and not tensors(inner) else ():
            if others := _others(name, getattr(inner, name), moves):
                named = name == "num_channels"  # Which no forward reads.
                yield Stored(f"{path}.{child}" if path else child, name, getattr(inner, name), others, named)


def unknown_counts(module: nn.Module, smaller: nn.Module, path: str) -> dict[str, int]:
    """Numbers that the forward of a module mentions, and that may count what went, though no name tells that."""
    layer, before = smaller.get_submodule(path), module.get_submodule(path)
    moves, _ = _moves(layer, before)
    named = (_mentioned(layer) or {*vars(before)}) - {*_INTERNAL, *SIZES}
    found: dict[str, int] = {}
    for name, value in vars(before).items():
        plain = type(value) is int and value > 1 and name in named
        divides = plain and any([a % value == value * b % a == 0 for a, bs in moves.items() for b in bs])
        if divides and vars(layer).get(name) == value and not name.endswith(_OTHER_COUNTS):
            found[name] = value
    return found


def _moves(layer: nn.Module, before: nn.Module) -> tuple[dict[int, set[int]], bool]:
    """For each width that changed what it became, and whether one of a layer that the module holds itself did."""
    moves: dict[int, set[int]] = {}
    near = False
    for leaf, old, new in changes(layer, before):
        near = near or leaf.count(".") < 2
        for a, b in zip(old.shape, new.shape, strict=True):
            if a != b:
                moves.setdefault(a, set()).add(b)
    return moves, near


class _Parts(NamedTuple):
    """What sizes of parts may have to be now, where a forward takes parts by their sizes."""

    wholes: Mapping[int, set[int]] = MappingProxyType({})  # What widths became, also those around a module.
    rest: Mapping[int, set[int]] = MappingProxyType({})  # What is left of them once others are taken off.


_NO_PARTS = _Parts()


def takes_parts(module: nn.Module, smaller: nn.Module, path: str) -> bool:
    """Whether a module none of whose widths changed takes parts of one around it that did, by sizes of its own."""
    layer = smaller.get_submodule(path)
    if type(layer).__module__.startswith("torch.nn.") or _SPLITS.isdisjoint(_mentioned(layer) or ()):
        return False
    return bool(tensors(layer) and _around(module, smaller, path))


def _around(module: nn.Module, smaller: nn.Module, path: str) -> dict[int, set[int]]:
    """What widths of a module and of the one around it became, where these changed."""
    outside = path.rpartition(".")[0]
    return _moves(smaller.get_submodule(outside), module.get_submodule(outside))[0]


def _parts(module: nn.Module, smaller: nn.Module, path: str) -> _Parts:
    new, own = tensors(smaller.get_submodule(path)), dict[int, set[int]]()
    for name, x in tensors(module.get_submodule(path)).items():
        for a, b in zip(x.shape, new[name].shape, strict=True):
            own.setdefault(a, set()).add(b)
    wholes, rest = _around(module, smaller, path), dict[int, set[int]]()
    for whole, now in wholes.items():
        for part, parts in [(part, parts) for part, parts in own.items() if part > 1]:
            for times in range(1, min(_TIMES, (whole - 1) // part) + 1):
                left = {b - times * c for b in now for c in parts if b > times * c}
                rest.setdefault(whole - times * part, set()).update(left)
    return _Parts(wholes, {n: left for n, left in rest.items() if n not in own and left})


def _sizes_now(sizes: Sequence[int], moves: dict[int, set[int]], parts: _Parts) -> list[list[int]]:
    """What several widths may have to be now: if they are parts of one that changed, first what sums to what it became.

    What it became may be no dimension of any layer, as where it is joined of what one gives and of what passes by.
    """
    made = [max(moves.get(n, {n})) if n > 1 else n for n in sizes]
    if sum(sizes) not in parts.wholes:
        return [made] if made != [*sizes] else []
    kinds = sorted({*sizes})
    options = [sorted({*moves.get(n, ()), *parts.rest.get(n, ()), n}, reverse=True) for n in kinds]
    choices = [
        [choice[kinds.index(n)] for n in sizes] for choice in itertools.islice(itertools.product(*options), _CHOICES)
    ]
    found = [now for now in choices if now != [*sizes]]
    return sorted(found, key=lambda now: sum(now) not in parts.wholes[sum(sizes)])


def _others(
    name: str,
    value: Any,
    moves: dict[int, set[int]],
    beside: Set[int] = frozenset(),
    parts: _Parts = _NO_PARTS,
) -> tuple[Any, ...]:
    """What a number, or several, may have to be now; nothing if it has nothing to do with a width that changed.

    Args:
        name: The name of the number.
        value: The number.
        moves: For each width that changed what it became.
        beside: Numbers that may count heads, of which there are as many as before: it may be the width of one.
        parts: What sizes of parts may have to be, if the forward takes some.
    """
    if isinstance(value, bool) or name.endswith(_OTHER_COUNTS):
        return ()
    if isinstance(value, int):
        found = {*moves.get(value, ()), *parts.rest.get(value, ())} if value > 1 else set[int]()
        if name in _LABELS:  # A layer for each of equal parts has a width that divides it.
            found |= {value // a * b for a, bs in moves.items() for b in bs if a > 1 and value % a == 0}
        divides = is_count(name) or any([value * count in moves for count in beside])
        if divides and value > 1:  # As many fewer as what it divides is narrower.
            found |= {value * b // a for a, bs in moves.items() for b in bs if a % value == value * b % a == 0}
        others = sorted(found - {value}, reverse=True)
        return (value, *others) if others and beside else tuple(others)  # It may be one that counts heads itself.
    if isinstance(value, Tensor):
        return (value,) if any(n in moves for n in value.shape) else ()
    if isinstance(value, (list, tuple)) and value and all(type(n) is int for n in value):
        if not any(n > 1 and (n in moves or n in parts.rest) for n in value):
            return ()
        made = _sizes_now(value, moves, parts)
        return tuple([type(value)(each) for each in made]) if type(value) in (list, tuple) else (value,)
    return ()


def _with_shares(
    others: tuple[Any, ...], name: str, value: Any, moves: dict[int, set[int]], before: nn.Module
) -> tuple[Any, ...]:
    """What a number may be, and what it may be as the width of equal parts, as of a gate beside what it multiplies.

    Such a number has a name as widths have, and is no dimension that stays as it was.
    """
    known = name in _LABELS or (any([word in name for word in _WIDTHS]) and "head" not in name)
    if type(value) is not int or value < 2 or not known or name.endswith(_OTHER_COUNTS):
        return others
    if value not in moves and any([value in x.shape for x in tensors(before).values()]):
        return others
    found = {b // times for times in range(2, _TIMES + 1) for b in moves.get(times * value, ()) if b % times == 0}
    return (*others, *sorted(found.difference(others, [value]), reverse=True))


def is_count(name: str) -> bool:
    """Whether a number has the name of one that divides a width."""
    return ("head" in name.lower() or "group" in name.lower() or name in _SHORT) and name not in {*SIZES, *_LABELS}


def _is_config(value: Any) -> bool:
    plain = (nn.Module, Tensor, type, types.FunctionType, types.MethodType, types.ModuleType)
    return hasattr(value, "__dict__") and not isinstance(value, plain)


def is_told_by_name(name: str) -> bool:
    """Whether a number has the name of a width or of a count of what divides one, which is all that it says."""
    return name in _LABELS or is_count(name)


def _named(layer: nn.Module, before: nn.Module, name: str, value: Any) -> bool:
    """Whether a number has the name of a width, and all that is as wide changed alike."""
    return name in _LABELS and _only(layer, before, value) is not None


def _only(layer: nn.Module, before: nn.Module, value: Any) -> int | None:
    """What every dimension of this size is now, None if there is none or they are not one."""
    if type(value) is not int:
        return None
    new = tensors(layer)
    found = {
        b for name, x in tensors(before).items() for a, b in zip(x.shape, new[name].shape, strict=True) if a == value
    }
    return found.pop() if len(found) == 1 else None


def mentioned(root: nn.Module, path: str) -> frozenset[str] | None:
    """The names that the forward of a module, and those of the modules around it, mention; None if one is unknown."""
    names: set[str] = set()
    while True:
        found = _mentioned(root.get_submodule(path))
        if found is None:
            return None
        names |= found
        if not path:
            return frozenset(names)
        path = path.rpartition(".")[0]


def _mentioned(layer: nn.Module) -> set[str] | None:
    """The names in the code of a forward, and in the methods and functions beside it that it calls."""
    names: set[str] = set()
    seen: set[Any] = set()
    todo: list[Any] = [*_methods(type(layer), "forward"), *_methods(type(layer), "__call__")]
    if (own := vars(layer).get("forward")) is not None:
        if not isinstance(own, types.MethodType) or own.__self__ is not layer:
            return None  # Replaced in this instance alone, by whatever it is.
        todo.append(own.__func__)  # One of several of its methods.
    while todo:
        function = inspect.unwrap(todo.pop())
        if function in seen:
            continue
        seen.add(function)
        if not isinstance(function, types.FunctionType):
            return None
        here = _names(function.__code__)
        for name in here - names:
            todo += _methods(type(layer), name)
            other = function.__globals__.get(name)
            if isinstance(other, types.FunctionType) and other.__module__ == function.__module__:
                todo.append(other)
        names |= here
    return names


def _methods(kind: type, name: str) -> Iterator[Any]:
    """The definition of a method or property in a class, and those in its bases that it may call by `super` or name."""
    called: Set[str] | None = None  # What the definitions before mention.
    for base in kind.__mro__:
        found = None if base in (nn.Module, object) else vars(base).get(name)
        if isinstance(found, property):
            found = found.fget
        if isinstance(found, (staticmethod, classmethod)):
            found = found.__func__
        if isinstance(found, types.FunctionType) and (called is None or {"super", base.__name__} & called):
            yield found
            own = inspect.unwrap(found)
            code = own.__code__ if isinstance(own, types.FunctionType) else found.__code__
            called = {*_names(code), *code.co_freevars, *(called or ())}


def _names(code: types.CodeType) -> set[str]:
    """Names and strings in code, and in the code inside it."""
    names = {*code.co_names, *[each for each in code.co_consts if isinstance(each, str)]}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            names |= _names(inner)
    return names
