"""Functions of tensors, recorded once and then run as graphs of operations, without what Python did to make them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize

from funcreg.core import undocumented
from funcreg.core.tree import restored, structure, tree_leaves
from funcreg.fused.lowering import say_once
from funcreg.fused.recording import CannotRecordError, Record, constant, placeholder, record

_aten = torch.ops.aten
#: What makes a tensor of numbers of Python.
_LIFTS = {_aten.lift_fresh.default, _aten.lift_fresh_copy.default}
#: Most numbers of Python in a tensor that a function makes at every call.
_FEW = 1000
#: Graphs that are kept.
_MOST = 1024

#: From what is computed, and how, to the graph, or to the reason why there is none.
_made: dict[Any, Any] = {}
#: Short keys for long ones.
_keys: dict[Any, object] = {}
_compiled: dict[Any, Callable[..., Any]] = {}


def _remember(known: dict[Any, Any], key: Any, value: Any) -> Any:
    """Keep what was made, and no more than some of it."""
    while len(known) >= _MOST:
        known.pop(next(iter(known)), None)
    known[key] = value
    return value


class Same:
    """An object as a key: equal to itself alone."""

    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x

    def __hash__(self) -> int:
        return id(self.x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.x is self.x


def key_of(tree: Any) -> Hashable:
    """Structures, numbers and texts by what they are, other leaves by identity."""
    leaves, spec = structure(tree)
    return spec, *(constant(x) if isinstance(x, (int, float, complex, str)) else Same(x) for x in leaves)


def like(x: Tensor) -> Hashable:
    """What a graph depends on of a tensor."""
    return x.shape, x.dtype, x.device


def with_more(kept: Tensor) -> Tensor:
    """Places where a vector of bools is true, and of others so many that few numbers of places occur.

    A graph serves for one number of places.
    """
    places = kept.nonzero()[:, 0]
    # Numbers of two binary digits, such as 8, 12, 16, 24.
    step = 1 << max(len(places).bit_length() - 2, 2)
    most = min(-(-len(places) // step) * step, len(kept))
    others = (~kept).nonzero()[: most - len(places), 0]
    return torch.cat([places, others]).sort().values


# What a function computes


def watch(f: Callable[..., Any], *known: Tensor) -> tuple[Hashable, list[Tensor]]:
    """What a function of tensors computes, as a key, and the tensors that it holds without getting them.

    The key has each operation with its arguments, and the types of those that differentiate it. The function may have
    other code, hold other tensors of the same shapes, and be another object at each call.

    Raises:
        CannotRecordError: It reads a number from a tensor, or draws random numbers.
    """
    try:
        return _watch(f, known, differentiate=True)
    except CannotRecordError:
        raise
    except RuntimeError:  # Tensors of inference mode, which the function may hold, take no part in autograd.
        return _watch(f, known, differentiate=False)


def _watch(f: Callable[..., Any], known: Sequence[Tensor], *, differentiate: bool) -> tuple[Hashable, list[Tensor]]:
    watcher = _Watcher(known)
    with torch.set_grad_enabled(differentiate), _watching()(watcher):
        found = f(*known)
    for x in found if isinstance(found, tuple) else (found,):
        watcher.add_derivatives(x)
    return tuple(watcher.seen), watcher.held


@functools.cache
def _watching() -> Any:
    """A mode in which a watcher sees each operation."""

    class Watching(undocumented.dispatch_mode()):
        def __init__(self, watcher: _Watcher) -> None:
            super().__init__()
            self._watcher = watcher

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self._watcher.see(func, args, kwargs or {}, out)
            return out

    return Watching


class _Watcher:
    """Writes down what operations get, each tensor as a number."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        self.seen: list[Hashable] = []
        self.held: list[Tensor] = []
        self._alive = list(known)  # So that no other tensor gets its place in memory.
        self._numbers = {id(x): i for i, x in enumerate(known)}

    def see(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CannotRecordError("it draws random numbers")
        if func in _LIFTS:
            self._add_numbers(args[0])
        self.seen.append((func, *map(self._key, args), *((name, self._key(x)) for name, x in kwargs.items())))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, Tensor):
                self._number(x)
            elif x is not None and any([isinstance(arg, Tensor) for arg in args]):
                raise CannotRecordError("it reads a number from a tensor")

    def add_derivatives(self, x: Any) -> None:
        """Write down what differentiates the operations that made a tensor."""
        nodes, met = [getattr(x, "grad_fn", None)], set()
        while nodes:
            node = nodes.pop()
            self.seen.append(type(node))
            for other, _ in () if node is None else node.next_functions:
                if other not in met:
                    met.add(other)
                    nodes.append(other)

    def _add_numbers(self, x: Tensor) -> None:
        if id(x) in self._numbers:
            return
        if x.numel() > _FEW:
            raise CannotRecordError(f"it makes a tensor of {x.numel()} numbers at every call")
        self.seen.append((like(x), str(x.tolist())))
        self._number(x)

    def _number(self, x: Tensor) -> int:
        if id(x) not in self._numbers:
            self._numbers[id(x)] = len(self._alive)
            self._alive.append(x)
        return self._numbers[id(x)]

    def _key(self, arg: Any) -> Hashable:
        if isinstance(arg, Tensor):
            if id(arg) in self._numbers:
                return Same, self._numbers[id(arg)]
            self.held.append(arg)
            return Tensor, self._number(arg), like(arg)
        return tuple([self._key(x) for x in arg]) if isinstance(arg, (list, tuple)) else constant(arg)


# Graphs


class Graphs:
    """Functions of one problem as graphs, recorded once for all problems that compute alike.

    Args:
        key: What tells apart problems that do not.
        backend: A backend of `torch.compile`.
        call: What warnings call it.
    """

    def __init__(self, key: Hashable, backend: Any, call: str) -> None:
        self._key, self._backend, self._call = key, backend, call
        self._held: list[Tensor] = []

    def knowing(self, f: Callable[..., Any], key: Hashable, known: Sequence[Tensor]) -> Graphs | None:
        """Graphs of functions that call a function, from what it computes of some tensors; None if it has none."""
        try:
            seen, held = watch(f, *known)
        except CannotRecordError as error:
            self._say(error)
            return None
        key = (self._key, key, seen)
        made = Graphs(_keys.get(key) or _remember(_keys, key, object()), self._backend, self._call)
        made._held = self.arranged(held)
        return made

    def arranged(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors as compiled code takes them."""
        plain = lambda x: self._backend == "eager" or x.layout is not torch.strided
        return [x if plain(x) else x.contiguous() for x in tensors]

    def of(self, name: Hashable, f: Callable[..., Any], held: Tensor | None = None) -> Callable[..., Any]:
        """A function of trees of tensors as a graph.

        Args:
            name: What tells it apart from others.
            f: The function, which is called if there is no graph of it.
            held: A tensor that this one holds, too.
        """
        key = (self._key, self._backend, name, None if held is None else like(held))
        also = self._held if held is None else [*self._held, held]

        def call(*given: Any) -> Any:
            graph = _made.get(key)
            if graph is None:
                graph = _remember(_made, key, self._graph(f, given, also))
            return f(*given) if isinstance(graph, str) else graph(tree_leaves(given), also)

        return call

    def _graph(self, f: Callable[..., Any], given: Any, held: list[Tensor]) -> Any:
        try:
            return _Graph(f, given, held, self._backend, self._say)
        except Exception as error:  # The function is then called as it is, and says itself what is wrong with it.
            self._say(error)
            return str(error)

    def _say(self, error: Exception) -> None:
        reason = " ".join(str(error).split())[:300]
        say_once(f"{self._call} runs without compiled steps, with equal results: {reason or type(error).__name__}")


class _Graph:
    """A function as a graph, and where its arguments come from."""

    def __init__(
        self,
        f: Callable[..., Any],
        given: Any,
        held: list[Tensor],
        backend: Any,
        say: Callable[[Exception], None],
    ) -> None:
        leaves, spec = structure(given)
        shapes: list[Any] = []

        def of_leaves(*leaves: Tensor) -> list[Tensor]:
            results, shape = structure(f(*restored(spec, leaves)))
            shapes.append(shape)
            return results

        try:
            found = record(of_leaves, *map(placeholder, leaves))
        except CannotRecordError:  # What writes into memory of its own, as some derivatives do, is recorded without.
            found = record(functionalize(of_leaves, remove="mutations"), *map(placeholder, leaves))
        self._shape = shapes[0]
        places = {_where(x): i for i, x in enumerate(held)}
        for _, x in found.captured:
            placeholder(x)  # Or an error, for a layout that no record has.
        #: What comes after the leaves: numbers of tensors that are held, and constants.
        self._rest = [places.get(_where(x), x) for _, x in found.captured]
        self._is_plain = backend == "eager"
        graph = _written(found)
        self._run = graph.forward if self._is_plain else _compile(graph, self._arguments(leaves, held), backend, say)

    def _arguments(self, leaves: list[Tensor], held: list[Tensor]) -> list[Tensor]:
        return [*leaves, *[held[x] if isinstance(x, int) else x for x in self._rest]]

    def __call__(self, leaves: list[Tensor], held: list[Tensor]) -> Any:
        args = self._arguments(leaves, held)
        return restored(self._shape, self._run(*(args if self._is_plain else [x.contiguous() for x in args])))


def _where(x: Tensor) -> Any:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device


def _written(found: Record) -> fx.GraphModule:
    """A record as a graph."""
    graph = fx.Graph()
    values: dict[Any, Any] = {}
    for value in [*found.inputs, *(value for value, _ in found.captured)]:
        values[value] = graph.placeholder(f"x{len(values)}")
    for node in found.nodes:
        node.run(values, graph.call_function)
    graph.output(tuple([values[value] for value in found.outputs]))
    return fx.GraphModule(torch.nn.Module(), graph)


def _compile(
    graph: fx.GraphModule, args: Sequence[Tensor], backend: Any, say: Callable[[Exception], None]
) -> Callable[..., Any]:
    """What computes as a graph does; it itself where the backend does not work."""
    key = (graph.code, Same(backend) if callable(backend) else backend, *map(like, args))
    if key not in _compiled:
        # A tensor that comes twice would be taken for one argument, so that none of them comes at all.
        like_args = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in args]
        try:
            with undocumented.imports_may_warn():
                if undocumented.compilation_is_forbidden():
                    return graph.forward
                made = undocumented.compile_directly(graph, like_args, backend, False)
        except Exception as error:
            say(error)
            made = graph.forward
        _remember(_compiled, key, made)
    return _compiled[key]
