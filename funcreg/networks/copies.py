"""Copies of modules whose own functions go on with the copy."""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import types
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from funcreg.core.undocumented import compiled_from

M = TypeVar("M", bound=nn.Module)


def copied(module: M, memo: dict[int, Any] | None = None) -> M:
    """A deep copy of a module, with functions that use the copy where they used the module.

    `copy.deepcopy` leaves functions as they are: a forward that is replaced in an instance, a hook, or a function in a
    list of layers would go on with parts of the module that it holds in its closure or in its defaults. What
    `torch.compile` made of a function is that function again.

    Args:
        module: The module.
        memo: Objects by the `id` of what they stand for in the copy, as `copy.deepcopy` takes them.
    """
    memo = {} if memo is None else memo
    parts = _parts(module)
    made = copy.deepcopy(module, memo)
    functions = _Functions(parts, memo)
    for layer in made.modules():
        for name, value in list(vars(layer).items()):
            if name not in _HOLDERS and (new := functions.of(value)) is not value:
                vars(layer)[name] = new
    return made


def check_functions(module: nn.Module) -> None:
    """Raise a ValueError if a function that a module holds uses a part of it by a global name.

    No copy of the module could let it use its own.
    """
    parts = _parts(module)
    for path, layer in module.named_modules():
        for name, value in vars(layer).items():
            for function in () if name in _HOLDERS else _functions_in(value, set()):
                for known, value in _globals(function, set()):
                    part = value.__self__ if isinstance(value, types.MethodType) else value
                    if (own := parts.get(id(part))) is not None:
                        inside = f"'{own}' in the module" if own else "the module itself"
                        where = f"'{path}.{name}'" if path else f"'{name}'"
                        raise ValueError(
                            f"{where} has a function {function.__qualname__} that uses {inside} by the global name "
                            f"{known!r}, as a smaller copy would, too; expected what uses its arguments. Make it a "
                            "method of the layer, types.MethodType(function, layer), or give it what it uses by "
                            "functools.partial"
                        )


def used_by_functions(module: nn.Module) -> set[int]:
    """The `id` of all modules, parameters and buffers that functions in a module hold themselves."""
    parts, found = _parts(module), set[int]()
    for layer in module.modules():
        for name, value in vars(layer).items():
            for function in () if name in _HOLDERS else _functions_in(value, set()):
                found.update([id(x) for x in _inside(function) if id(x) in parts])
    return found


@contextlib.contextmanager
def running(module: nn.Module) -> Iterator[list[str]]:
    """The names of the modules inside a module that run meanwhile."""
    ran = list[str]()
    named = list(module.named_modules())
    handles = [layer.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name, layer in named]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


#: Attributes of modules that hold no functions.
_HOLDERS = ("_modules", "_parameters", "_buffers")


def _parts(module: nn.Module) -> dict[int, str]:
    """The names of modules, parameters and buffers by their `id`."""
    named: list[tuple[str, Any]] = [*module.named_modules(), *module.named_parameters(), *module.named_buffers()]
    return {id(part): name for name, part in named}


def _functions_in(value: Any, seen: set[int]) -> Iterator[types.FunctionType]:
    """The functions in a value, and those that these hold."""
    if id(value) in seen or isinstance(value, (nn.Module, Tensor)):
        return
    seen.add(id(value))
    if isinstance(value, types.FunctionType):
        yield value
    for each in _inside(value):
        yield from _functions_in(each, seen)


def _inside(value: Any) -> Iterator[Any]:
    """What functions hold, and what is in containers of Python."""
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            if _is_full(cell):
                yield cell.cell_contents
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from vars(value).values()
    elif isinstance(value, types.MethodType):
        yield value.__self__
        yield value.__func__
    elif isinstance(value, functools.partial):
        yield value.func
        yield from value.args
        yield from value.keywords.values()
    elif isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # Of a name that is not yet given a value.
        return False


def _globals(function: types.FunctionType, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """The global names that a function reads, with their values, and those that functions beside it read for it."""
    if id(function) in seen:
        return
    seen.add(id(function))
    for name in _global_names(function.__code__):
        value = function.__globals__.get(name)
        yield name, value
        if isinstance(value, types.FunctionType) and value.__module__ == function.__module__:
            yield from _globals(value, seen)


def _global_names(code: types.CodeType) -> Iterator[str]:
    for each in dis.get_instructions(code):
        if each.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield each.argval
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _global_names(inner)


class _Functions:
    """Functions that use the copies of what they used.

    Args:
        parts: The names of what was copied, by its `id`.
        memo: The copies, by the `id` of what they are of.
    """

    def __init__(self, parts: dict[int, str], memo: dict[int, Any]) -> None:
        self._parts, self._memo = parts, memo
        self._made: dict[int, Any] = {}  # Functions and cells, each copied once.

    def of(self, value: Any) -> Any:
        """A value of the copy, which is changed in place where it can be: itself if its functions use no parts."""
        compiled = compiled_from(value) if isinstance(value, types.FunctionType) else None
        if compiled is not None and self._uses(compiled, set()):
            return self.of(copy.deepcopy(compiled, self._memo))
        if isinstance(value, types.FunctionType):
            return self._rebound(value) if self._uses(value, set()) else value
        if isinstance(value, types.MethodType):
            function = self.of(value.__func__)
            return value if function is value.__func__ else types.MethodType(function, value.__self__)
        if isinstance(value, functools.partial):
            return self._partial(value)
        if isinstance(value, (list, dict)):
            for key, each in list(enumerate(value) if isinstance(value, list) else value.items()):
                if (new := self.of(each)) is not each:
                    value[key] = new
            return value
        if type(value) is tuple:
            several = tuple(map(self.of, value))
            return value if all(a is b for a, b in zip(several, value, strict=True)) else several
        return value

    def _partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        function, args = self.of(value.func), self.of(value.args)
        keywords = {name: self.of(each) for name, each in value.keywords.items()}
        if function is value.func and args is value.args and all(keywords[k] is x for k, x in value.keywords.items()):
            return value
        made = type(value)(function, *args, **keywords)
        made.__dict__.update(value.__dict__)
        return made

    def _uses(self, value: Any, seen: set[int]) -> bool:
        """Whether a value is a part of what was copied, or holds one."""
        if id(value) in self._parts:
            return True
        if id(value) in seen:
            return False
        seen.add(id(value))
        return any([self._uses(each, seen) for each in _inside(value)])

    def _rebound(self, function: types.FunctionType) -> types.FunctionType:
        if id(function) in self._made:
            return self._made[id(function)]
        cells = tuple([self._cell(cell) for cell in function.__closure__ or ()])
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
        self._made[id(function)] = made  # Before what it holds, which may be the function itself.
        for cell, old in zip(cells, function.__closure__ or (), strict=True):
            if cell is not old and not _is_full(cell):
                cell.cell_contents = self._copy(old.cell_contents)
        functools.update_wrapper(made, function)
        vars(made).clear()
        vars(made).update({name: self._copy(each) for name, each in vars(function).items()})
        made.__defaults__ = self._copy(function.__defaults__)
        made.__kwdefaults__ = self._copy(function.__kwdefaults__)
        return made

    def _cell(self, cell: Any) -> Any:
        if not _is_full(cell) or not self._uses(cell.cell_contents, set()):
            return cell
        return self._made.setdefault(id(cell), types.CellType())

    def _copy(self, value: Any) -> Any:
        """A copy of what a function holds, if that uses a part."""
        return self.of(copy.deepcopy(value, self._memo)) if self._uses(value, set()) else value
