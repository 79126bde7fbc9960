"""The ATen operations of a forward pass, with the tensors that they take and give, in their order."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from funcreg.core.undocumented import dispatch_mode
from funcreg.core.wording import type_of
from funcreg.networks.agreement import arguments, drawing


class Ref(NamedTuple):
    """A tensor of a recording. Views with one memory and one layout are one tensor."""

    place: tuple[Any, ...]  # Device, address, strides.
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: tuple[Any, ...]  # What it shares with its views.


class Operation(NamedTuple):
    """An operation, its tensors replaced by what stands for them."""

    function: Any  # An ATen overload.
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Ref]
    written: list[Ref]  # Arguments that it writes into.
    module: str  # Name of the module whose forward ran it.
    needed: bool = True  # Whether outputs depend on it.

    @property
    def name(self) -> str:
        return self.function._schema.name.removeprefix("aten::")


class Recording(NamedTuple):
    """What a forward pass did."""

    operations: list[Operation]
    parameters: dict[str, Ref]
    buffers: dict[str, Ref]
    outputs: list[Ref]
    numbers: Mapping[Ref, float] = MappingProxyType({})  # Of tensors of one entry that the code makes of a number.
    unseen: str = ""  # Why it is not known what it does in training, where it uses other parameters then.


def record(module: nn.Module, example_inputs: Any, training: bool = False) -> Recording:
    """Run a module once, in evaluation and without gradients, and write down what it does.

    Where it leaves parameters unused, it runs a second time, as in training, for it may take another branch there.

    Args:
        module: A module; its modes of training are restored.
        example_inputs: A tensor, a tuple of arguments, a dict of keyword arguments, or a tuple of both.
        training: Whether it runs as in training, and no second time.

    Raises:
        ValueError: The module raises an error on them, or a tensor has no memory.
    """
    args, kwargs = arguments(example_inputs)
    parameters = {name: _ref(w) for name, w in module.named_parameters()}
    # Others, such as the sparse matrix of a graph, have no entries of channels.
    buffers = {name: _ref(x) for name, x in module.named_buffers() if x.layout == torch.strided}
    modes = {layer: layer.training for layer in module.modules()}
    recorder = _Recorder()
    run = lambda: module(*args, **kwargs)
    unseen = ""
    try:
        module.train(training)
        made: list[Any] = []
        if not training:
            made.append(_written_down(module, recorder, run))
        elif unseen := _in_training(module, recorder, run, made):
            raise Unrecorded(f"{type(module).__name__} failed on example_inputs in training: {unseen}")
        used = {ref for each in recorder.operations for ref in refs_in([each.args, each.kwargs])}
        if not training and not used.issuperset(parameters.values()):
            module.train()
            unseen = _in_training(module, recorder, run, made)
    except Unrecorded:
        raise
    except Exception as error:
        raise ValueError(_failure(module, recorder, error, args, kwargs)) from error
    finally:
        for layer, mode in modes.items():
            layer.training = mode
    outputs = [_ref(x) for x in tensors_in(made)]
    operations, numbers = _needed(recorder.operations, outputs), recorder.numbers
    changed = {ref.storage for operation in operations for ref in operation.written}
    constants = {ref: number for ref, number in numbers.items() if ref.storage not in changed}
    return Recording(operations, parameters, buffers, outputs, constants, unseen)


def _written_down(module: nn.Module, recorder: _Recorder, run: Callable[[], Any]) -> Any:
    with torch.no_grad(), _named(module, recorder), _Plain(recorder), _mode(recorder), drawing(module):
        return run()


def _in_training(module: nn.Module, recorder: _Recorder, run: Callable[[], Any], made: list[Any]) -> str:
    """Write down what a module does in training, too, with its buffers as they were in the end; or why it cannot be."""
    before = [(x, x.clone()) for x in module.buffers()]
    count = len(recorder.operations)
    try:
        made.append(_written_down(module, recorder, run))
        return ""
    except Exception as error:  # Such as of a normalization over a single example.
        del recorder.operations[count:], recorder.running[:]
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    finally:
        with torch.no_grad():
            for x, old in before:
                x.copy_(old)


def refs_in(value: Any) -> list[Ref]:
    """What stands for tensors in the arguments of an operation."""
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, dict):
        return [ref for each in value.values() for ref in refs_in(each)]
    return [ref for each in value for ref in refs_in(each)] if isinstance(value, (tuple, list)) else []


def _needed(operations: list[Operation], outputs: list[Ref]) -> list[Operation]:
    """The operations, marked by whether outputs depend on them."""
    storages, marked = {ref.storage for ref in outputs}, []
    for operation in reversed(operations):
        needed = any([ref.storage in storages for ref in (*operation.results, *operation.written)])
        if needed:
            storages.update([ref.storage for ref in refs_in([operation.args, operation.kwargs])])
        marked.append(operation._replace(needed=needed))
    return marked[::-1]


class Unrecorded(ValueError):
    """A forward pass whose tensors cannot be told apart, or one that fails in training."""


def _failure(module: nn.Module, recorder: _Recorder, error: Exception, args: Any, kwargs: Any) -> str:
    """What the inputs are, what the forward of the module takes, and where it failed."""
    given = [*map(_described, args), *[f"{name}={_described(value)}" for name, value in kwargs.items()]]
    try:
        wanted = f"Its forward takes {inspect.signature(module.forward)}"
    except (TypeError, ValueError):  # Of no function written in Python.
        wanted = "Is it called with these arguments elsewhere?"
    inside = recorder.running[-1] if recorder.running else ""
    where = f" in '{inside}', {type_of(module.get_submodule(inside))}" if inside else ""
    return (
        f"{type(module).__name__} failed{where} on example_inputs, which are ({', '.join(given)}): "
        f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}. {wanted}; expected a tuple of positional "
        "arguments, a dict of keyword arguments, or a tuple of both, of the shapes, dtypes and device that it runs on"
    )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device.type}"
    return type(value).__name__


def _ref(x: Tensor) -> Ref:
    if x.numel() and not x.data_ptr():
        raise Unrecorded(
            f"a tensor of shape {tuple(x.shape)} on the {x.device.type} device has no memory, by which tensors are "
            "told apart here; expected a module and inputs with numbers in them, as to_empty(device='cpu') gives"
        )
    layout = tuple(stride if n > 1 else 0 for n, stride in zip(x.shape, x.stride(), strict=True))
    return Ref((x.device, x.data_ptr(), layout), tuple(x.shape), x.dtype, (x.device, x.untyped_storage().data_ptr()))


def tensors_in(made: Any) -> Iterator[Tensor]:
    """The tensors of what a module returns, however it is packed. A cache of keys and values is no output."""
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, Mapping):
        for each in made.values():
            yield from tensors_in(each)
    elif isinstance(made, (tuple, list, set)):
        for each in made:
            yield from tensors_in(each)
    elif type(made).__name__.endswith("Cache"):
        return
    elif dataclasses.is_dataclass(made) or (hasattr(made, "__dict__") and not callable(made)):
        yield from tensors_in(vars(made))


@contextlib.contextmanager
def _named(module: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Let a recorder know which module is running."""

    def leave(*_: Any) -> None:
        recorder.running.pop()

    hooks = []
    for name, layer in module.named_modules():
        hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: recorder.running.append(name)))
        hooks.append(layer.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Plain(TorchFunctionMode):
    """Keeps modules of torch from fast paths that are one operation, as any mode of this kind does.

    Recurrent layers it writes down as one operation, which they are on some devices alone.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        whole = None if kwargs else _as_one(func, args)
        if whole is None:
            return func(*args, **(kwargs or {}))
        return self._recorder.whole(whole, func, args)


#: Functions of torch that are recorded as one operation, however they are computed.
_WHOLE = ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")


def _as_one(func: Any, args: Sequence[Any]) -> Any:
    """The ATen overload of a function that is recorded as one operation, None for all others."""
    name = getattr(func, "__name__", "")
    if not isinstance(func, types.BuiltinFunctionType) or name not in (*_WHOLE, "_pad_packed_sequence"):
        return None
    packet = getattr(torch.ops.aten, name)
    if name not in _WHOLE[:4]:
        return packet.default
    return packet.data if isinstance(args[3], (list, tuple)) else packet.input  # Packed sequences, or plain ones.


#: What makes a tensor of numbers of Python.
_LIFTS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}


class _Recorder:
    """Writes operations down as they happen."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.running: list[str] = []
        self.numbers: dict[Ref, float] = {}
        self._alive: list[Any] = []  # No address is used twice.
        self._inside = False  # An operation that is written down as one.

    def whole(self, overload: Any, func: Any, args: tuple[Any, ...]) -> Any:
        """The results of a function, which is written down as one operation."""
        self._inside = True
        try:
            made = func(*args)
        finally:
            self._inside = False
        self._write(overload, args, {}, made, [], (_refs(args), {}))
        return made

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The results of an operation, which is written down."""
        if self._inside:
            return func(*args, **kwargs)
        arguments = func._schema.arguments
        given = [*zip([each.name for each in arguments], args, strict=False), *kwargs.items()]
        writes = {each.name for each in arguments if each.alias_info is not None and each.alias_info.is_write}
        into = [x for name, value in given if name in writes for x in _tensors(value)]
        if torch.Tag.inplace_view in func.tags:  # It changes the shape of its argument, and none of its numbers.
            into = []
        before = _refs(args), _refs(kwargs)
        made = func(*args, **kwargs)
        self._write(func, args, kwargs, made, into, before)
        return made

    def _write(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made: Any,
        into: list[Tensor],
        before: tuple[Any, dict[str, Any]],
    ) -> None:
        results = _tensors(made)
        self._alive += [x.untyped_storage() for x in (*results, *_tensors(args), *_tensors(list(kwargs.values())))]
        refs = [_ref(x) for x in into]
        if func in _LIFTS and results and results[0].numel() == 1 and not results[0].is_complex():
            self.numbers[_ref(results[0])] = float(results[0])
        here = self.running[-1] if self.running else ""
        self.operations.append(Operation(func, *before, [_ref(x) for x in results], refs, here))


def _mode(recorder: _Recorder) -> Any:
    """A mode in which a recorder sees each operation."""

    class Dispatched(dispatch_mode()):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return recorder.dispatch(func, args, kwargs or {})

    return Dispatched()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.layout == torch.strided else []
    return [x for each in value for x in _tensors(each)] if isinstance(value, (tuple, list)) else []


def _refs(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _ref(value) if value.layout == torch.strided else value
    if isinstance(value, dict):
        return {key: _refs(each) for key, each in value.items()}
    return type(value)(map(_refs, value)) if type(value) in (tuple, list) else value
