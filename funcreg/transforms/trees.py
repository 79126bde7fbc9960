"""States of optimizers as trees: values found and set by name, and what in a state is like the parameters."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Params, Scalar, State
from funcreg.core.checks import check_tensors, fits
from funcreg.core.construction import written
from funcreg.core.leafwise import compute, without_autocast
from funcreg.core.masks import listed
from funcreg.core.ranges import check_numbers, check_range, number, single
from funcreg.core.tree import ABSENT, Absent, Path, dotted, level, tree_leaves, tree_map, tree_paths
from funcreg.core.wording import type_of
from funcreg.transforms.transform import Transform

#: From the dotted path and the value of a node to whether it is meant.
Filter = Callable[[str, Any], bool]
#: A place in a tree: its path, the names that it goes by, and the node there.
_Place = tuple[Path, frozenset[Any], Any]


# Values by name


def tree_get_all_with_path(tree: Any, key: Any, filtering: Filter | None = None) -> list[tuple[str, Any]]:
    r"""All values of a name in a tree, with their dotted paths.

    Args:
        tree: A state or any tree.
        key: A key of a dict, a field of a named tuple, the name of a type of named tuples, or the end of a dotted path:
            `"steps"`, `"AdamState"`, `"AdamState.steps"`, `"0.steps"`.
        filtering: From the dotted path and a value to whether it is meant; by default all are.

    Example:
        >>> state = chain(trace(0.9), ema(0.9)).init({"w": torch.zeros(1)})
        >>> tree_get_all_with_path(state, "w")
        [('0.trace.w', tensor([0.])), ('1.ema.w', tensor([0.]))]
        >>> tree_get_all_with_path(state, "w", lambda path, value: path.startswith("1."))
        [('1.ema.w', tensor([0.]))]
    """
    return [(dotted(path), value) for path, value in _found(tree, key, filtering)]


def _found(tree: Any, key: Any, filtering: Filter | None) -> list[tuple[Path, Any]]:
    return [(path, node) for path, names, node in _places(tree) if _meant(path, names, node, key, filtering)]


def _meant(path: Path, names: frozenset[Any], node: Any, key: Any, filtering: Filter | None) -> bool:
    return key in names and (filtering is None or filtering(dotted(path), node))


def _visit(node: Any, path: Path, names: frozenset[Any], ends: Sequence[str], places: list[_Place]) -> None:
    """Collect all places of a tree, a node before what is in it; `ends` are the dotted ends of the path to the node."""
    if isinstance(node, Absent):
        return
    opened = None if isinstance(node, Tensor) else level(node)
    kind = type(node).__name__ if hasattr(node, "_fields") else None
    places.append((path, names if kind is None else names | {kind}, node))
    if opened is None:
        return
    for key, child in zip(opened[0], opened[1], strict=True):
        longer = [f"{end}.{key}" for end in ends]
        # A place in a tuple is a name only before others; a key of a dict that is no string is found as it is.
        own = [key] if isinstance(node, dict) else [] if kind is None else [key, f"{kind}.{key}"]
        if kind is not None and key == "steps":
            own.append("count")  # Its name in optax, which is a method of tuples here.
        shown = [str(key)] if kind is None else own
        _visit(child, (*path, key), frozenset([*own, *longer]), [*shown, *longer], places)


def _places(tree: Any) -> list[_Place]:
    places: list[_Place] = []
    _visit(tree, (), frozenset(), (), places)
    return places


def tree_get(tree: Any, key: Any, default: Any = None, filtering: Filter | None = None) -> Any:
    r"""The value of a name in a tree.

    Args:
        tree: A state or any tree.
        key: A key of a dict, a field of a named tuple, the name of a type of named tuples, or the end of a dotted path:
            `"learning_rate"`, `"AdamState"`, `"AdamState.mu"`, `"0.mu"`.
        default: What is returned if there is no such value.
        filtering: From the dotted path and a value to whether it is meant.

    Raises:
        KeyError: There are several such values; the message says where.

    Example:
        >>> state = chain(scale_by_adam(), ema(0.9)).init({"w": torch.zeros(1)})
        >>> tree_get(state, "mu")
        {'w': tensor([0.])}
        >>> tree_get(state, "AdamState.steps"), tree_get(state, "momentum", default=0.0)
        (tensor(0, dtype=torch.int32), 0.0)
        >>> tree_get(state, "steps", filtering=lambda path, value: path == "1.steps")
        tensor(0, dtype=torch.int32)
    """
    found = _found(tree, key, filtering)
    if len(found) > 1:
        raise KeyError(
            f"several values are called {key!r}: {listed([dotted(path) for path, _ in found])}; expected one. Say "
            f"which, as in {_longest(tree, found[0][0], key)!r}, or with filtering=lambda path, value: ..."
        )
    return found[0][1] if found else default


def _longest(tree: Any, path: Path, key: Any) -> str:
    """A name for a place that is found once, the shortest there is."""
    places = _places(tree)
    own = next(names for where, names, _ in places if where == path)
    alone = [name for name in own if sum([name in names for _, names, _ in places]) == 1 and isinstance(name, str)]
    return min(alone, key=lambda name: (name[:1].isdigit(), len(name)), default=dotted(path))


def tree_set(tree: Any, filtering: Filter | None = None, /, **values: Any) -> Any:
    r"""A tree with other values at some names, wherever they are found.

    A number or a tensor that takes the place of a tensor, or of a tree of them, gets their dtypes, devices and shapes,
    and memory of its own: a learning rate that is set in the state of a fused step compiles nothing anew. Other values
    are put as they are. For names with dots write `tree_set(state, **{"AdamState.steps": 0})`.

    Args:
        tree: A state or any tree, which stays as it is.
        filtering: From the dotted path and a value to whether it is meant; by default all of the name are.
        values: By name, as in `tree_get`, what is put in the place of each value of the name.

    Raises:
        KeyError: A name is not found; the message lists those there are.
        ValueError: A tensor does not broadcast to the shape of the one whose place it takes.
        TypeError: What takes the place of a tensor of numbers is neither a number nor a tensor, such as a string.

    Example:
        >>> state = scale_by_adam().init({"w": torch.zeros(2)})
        >>> tree_set(state, steps=7).steps
        tensor(7, dtype=torch.int32)
        >>> tree_set(state, lambda path, value: path.startswith("nu"), w=1.0)
        AdamState(steps=tensor(0, dtype=torch.int32), mu={'w': tensor([0., 0.])}, nu={'w': tensor([1., 1.])})
    """
    if not values:
        raise TypeError("tree_set got no values; expected some by name, as in tree_set(state, learning_rate=0.1)")
    places = _places(tree)
    chosen: dict[Path, Any] = {}
    for key, value in values.items():
        meant = [path for path, names, node in places if _meant(path, names, node, key, filtering)]
        if not meant:
            raise KeyError(_unknown(key, places, filtering))
        chosen.update(dict.fromkeys(meant, value))
    return _with(tree, (), chosen)


def _unknown(key: Any, places: list[_Place], filtering: Filter | None) -> str:
    if any([key in names for _, names, _ in places]):
        return f"no value called {key!r} is let through by filtering={written(filtering)}"
    words = [name for _, names, _ in places for name in sorted(map(str, names))]
    known = [name for name in dict.fromkeys(words) if not any([name.endswith(f".{other}") for other in words])]
    near = difflib.get_close_matches(str(key), known, 1)
    hint = f" Do you mean {near[0]!r}?" if near else ""
    return f"no value is called {key!r}; expected one of {listed(known)}, or the end of a dotted path.{hint}"


def _with(node: Any, path: Path, chosen: dict[Path, Any]) -> Any:
    if path in chosen:
        return _put(dotted(path), node, chosen[path])
    opened = None if isinstance(node, Tensor) else level(node)
    if opened is None:
        return node
    keys, children, rebuild = opened
    return rebuild([_with(child, (*path, key), chosen) for key, child in zip(keys, children, strict=True)])


def _put(path: str, old: Any, new: Any) -> Any:
    """A new value for an old one: like it if it is a number, a tensor or a tree of its structure, else as it is."""
    new = number(new)
    if not isinstance(old, Tensor):
        if not any([isinstance(leaf, Tensor) for leaf in tree_leaves(old)]):
            return new
        if isinstance(new, (bool, int, float, Tensor)):
            return tree_map(lambda a: _put(path, a, new), old)
        return tree_map(lambda a, b: _put(path, a, b), old, new) if tree_paths(old) == tree_paths(new) else new
    if isinstance(new, (bool, int, float)):
        return torch.full_like(old, new)
    if not isinstance(new, Tensor):
        if old.is_floating_point():  # A rate, a decay or a moment, which the next update would miss.
            raise TypeError(f"'{path}' is set to {written(new)}, where a number is; expected a number or a tensor")
        return new
    if not fits(new, old.shape):
        raise ValueError(
            f"'{path}' is set to a tensor of shape {tuple(new.shape)}; expected {tuple(old.shape)}, the shape of what "
            "is there, or one that broadcasts to it"
        )
    # Cloned, because leaves of a state never share memory, and a donated step writes into them.
    return new.to(old.device, old.dtype).expand(old.shape).clone()


# What is like the parameters


def tree_map_params(
    initable: Transform | Callable[[Params], State],
    f: Callable[..., Any],
    state: State,
    /,
    *rest: Any,
    transform_non_params: Callable[[Any], Any] | None = None,
    is_leaf: Callable[[Any], bool] | None = None,
) -> State:
    r"""Map over what in a state is like the parameters: moments, averages, copies, and not counters.

    It is found by asking `init` for the state of a placeholder: what comes back as the placeholder is like the
    parameters. Leaves that a mask or a label leaves out of a part of the state are walked past.

    Args:
        initable: The transform whose state it is, or a function from parameters to a state.
        f: From a leaf, and the leaves of other trees at its place, to a new leaf.
        state: The state.
        rest: Trees like the parameters, or prefixes of such, such as one device for all.
        transform_non_params: What is done with all other leaves; by default they stay.
        is_leaf: From a node to whether it goes to `f` as a whole.

    Raises:
        ValueError: The state is that of another transform, or a tree does not fit.
        TypeError: `init` needs the tensors of parameters, and takes no placeholder for them.

    Example:
        >>> tx, params = adam(0.1), {"w": torch.zeros(2)}
        >>> tree_map_params(tx, lambda m: m.bfloat16(), tx.init(params))[0].mu
        {'w': tensor([0., 0.], dtype=torch.bfloat16)}
        >>> tree_map_params(tx, lambda m, w: tuple(w.shape), tx.init(params), params, transform_non_params=str)[0]
        AdamState(steps='tensor(0, dtype=torch.int32)', mu={'w': (2,)}, nu={'w': (2,)})
    """
    if not callable(f):
        raise TypeError(f"f is {type_of(f)}; expected a function of a leaf, as in tree_map_params(tx, f, state)")
    marked = _marked(initable)
    keep = (lambda leaf: leaf) if transform_non_params is None else transform_non_params

    def walk(mark: Any, node: Any, path: Path) -> Any:
        if isinstance(mark, Absent):
            return _map_like(f, node, rest, is_leaf, path)
        opened = level(mark)
        # A placeholder has no leaves that a wrapper could make one vector of.
        if opened is None or (type(mark) is tuple and not mark and isinstance(node, Tensor)):
            return keep(node)
        inside = level(node)
        if inside is None or opened[0] != inside[0] or type(mark) is not type(node):
            where = f"'{dotted(path)}' of the state" if path else "the state"
            raise ValueError(
                f"{where} is {type_of(node)} of {listed(_keys(inside))}; expected {type_of(mark)} of "
                f"{listed(_keys(opened))}, as {written(initable)} makes it. Is it the state of another transform?"
            )
        rows = zip(opened[0], opened[1], inside[1], strict=True)
        return inside[2]([walk(m, child, (*path, key)) for key, m, child in rows])

    return walk(marked, state, ())


def _keys(opened: Any) -> list[str]:
    return ["nothing"] if opened is None or not opened[0] else [repr(key) for key in opened[0]]


def _marked(initable: Any) -> Any:
    """A state with `ABSENT` at each place of a tree like the parameters."""
    init = initable.begin if isinstance(initable, Transform) else getattr(initable, "init", initable)
    if not callable(init) or isinstance(initable, type):
        raise TypeError(
            f"tree_map_params got {initable!r}; expected the transform whose state it is, or a function from "
            "parameters to a state"
        )
    try:
        return init(ABSENT)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"init of {written(initable)} took no placeholder for the parameters: {type(error).__name__}: {error}. "
            "tree_map_params finds what is like the parameters with it; an init that maps over its parameters, as with "
            "tree_map, takes one."
        ) from error


def _map_like(
    f: Callable[..., Any], node: Any, rest: Sequence[Any], is_leaf: Callable[[Any], bool] | None, path: Path
) -> Any:
    """`f` of each leaf, and of what the other trees have there."""
    whole = is_leaf is not None and is_leaf(node)
    if isinstance(node, Absent) and not whole:
        return node
    opened = level(node)
    if opened is None or whole:
        return f(node, *rest)
    keys, children, rebuild = opened
    columns = [_below(tree, keys, path) for tree in rest]
    return rebuild(
        [
            _map_like(f, child, [column[i] for column in columns], is_leaf, (*path, keys[i]))
            for i, child in enumerate(children)
        ]
    )


def _below(tree: Any, keys: list[Any], path: Path) -> list[Any]:
    opened = level(tree)
    if opened is None:  # One value for all that is below.
        return [tree] * len(keys)
    found = dict(zip(opened[0], opened[1], strict=True))
    if set(found) != set(keys):
        raise ValueError(
            f"a tree given to tree_map_params has {listed(map(repr, found))} at '{dotted(path)}'; expected "
            f"{listed(map(repr, keys))}, as in the state. Is it like the parameters?"
        )
    return [found[key] for key in keys]


# Copies that follow


@without_autocast
def incremental_update(new_tensors: Params, old_tensors: Params, step_size: Scalar) -> Params:
    r"""A moving average, moved on by new values, :math:`\theta' = s w + (1 - s) \theta`.

    It is computed in float32 at least, and stays in the dtype of the average.

    Args:
        new_tensors: The parameters :math:`w`.
        old_tensors: Their average :math:`\theta`.
        step_size: :math:`s`, from 0 to 1: a number, or a tensor without dimensions.

    Example:
        >>> incremental_update({"w": torch.tensor([1.0])}, {"w": torch.tensor([0.0])}, 0.25)
        {'w': tensor([0.2500])}

    References:
        Polyak & Juditsky, *Acceleration of stochastic approximation by averaging*, 1992.
    """
    check_range("step_size", step_size, 0.0, 1.0)
    return compute(lambda old, new, s: s * new + (1 - s) * old, old_tensors, new_tensors, hyper=(step_size,))


@without_autocast
def periodic_update(
    new_tensors: Params, old_tensors: Params, steps: int | Tensor, update_period: int | Tensor
) -> Params:
    r"""A copy of parameters that is renewed every few steps: :math:`w` where :math:`k` divides :math:`t`, else the old.

    Args:
        new_tensors: The parameters :math:`w`.
        old_tensors: The copy, whose dtypes stay.
        steps: :math:`t`, number of steps taken: an int, or a tensor without dimensions.
        update_period: :math:`k`, at least 1.

    Example:
        >>> new, old = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
        >>> periodic_update(new, old, 3, 2), periodic_update(new, old, 4, 2)
        ({'w': tensor([0.])}, {'w': tensor([1.])})

    References:
        Mnih et al., *Human-level control through deep reinforcement learning*, 2015.
    """
    check_range("update_period", update_period, 1)
    single(steps=steps, update_period=update_period)
    check_numbers("steps", steps)
    check_tensors(old_tensors)
    now = steps % update_period == 0
    if not isinstance(now, Tensor):
        devices = [leaf.device for leaf in tree_leaves(old_tensors)]
        now = torch.full((), now, dtype=torch.bool, device=devices[0] if devices else "cpu")
    return compute(lambda old, new, now: torch.where(now, new, old), old_tensors, new_tensors, hyper=(now,))
