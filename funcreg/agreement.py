"""Whether two networks give the same outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Agreement:
    """The outputs of a network on example inputs, and whether another one has them, too."""

    def __init__(self, module: nn.Module, inputs: Any) -> None:
        self.args, self.kwargs = arguments(inputs)
        self.module = module
        self.expected = self._outputs(module)
        if isinstance(self.expected, str):
            raise ValueError(f"the module itself fails on example_inputs: {self.expected}")
        if not self.expected:
            raise ValueError(f"{type(module).__name__} gives no tensors on example_inputs that could be compared")

    def problem(self, other: nn.Module) -> str | None:
        """What is wrong with another network, None if its outputs are those of the first."""
        found = self._outputs(other)
        if isinstance(found, str):
            return f"it fails on example_inputs: {found}"
        assert not isinstance(self.expected, str)  # Checked when it was made.
        if len(found) != len(self.expected):
            return f"it gives {len(found)} tensors, and the module {len(self.expected)}"
        for i, (a, b) in enumerate(zip(self.expected, found, strict=True)):
            if a.shape != b.shape:
                return f"output {i} of it has shape {tuple(b.shape)}, and that of the module {tuple(a.shape)}"
            if (a.is_floating_point() or a.is_complex()) and a.numel():
                gap = torch.where(a == b, 0, (a - b).abs()).max()  # Infinities that mask something out are equal.
                size = a.abs().masked_fill(~a.isfinite(), 0).max()
                if not gap <= torch.finfo(a.dtype).eps ** 0.5 * size:  # Not a number is no agreement.
                    share = gap / size
                    return f"output {i} of it differs from that of the module by {share:.1e} of the largest entry"
            elif not torch.equal(a, b):
                return f"output {i} of it differs from that of the module"
        return None

    def _outputs(self, network: nn.Module) -> list[Tensor] | str:
        """The tensors that a network gives in evaluation, or what went wrong and where."""
        buffers = {name: x.clone() for name, x in network.named_buffers()}
        running: list[str] = []
        with _evaluated(network), _followed(network, running), torch.no_grad():
            try:
                return list(_tensors(functional_call(network, buffers, self.args, self.kwargs)))
            except Exception as error:
                where = running[-1] if running else ""
                where = f"'{where}', a {type(network.get_submodule(where)).__name__}" if where else "its own forward"
                return f"in {where}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call, of a tensor, a tuple or a dict."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


@contextmanager
def _evaluated(network: nn.Module) -> Iterator[None]:
    modes = [(layer, layer.training) for layer in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training


@contextmanager
def _followed(network: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep a list of the names of the modules that are running."""

    def left(*_: Any) -> None:  # What a hook returns would be the output.
        running.pop()

    handles = []
    for name, layer in network.named_modules():
        handles.append(layer.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(layer.register_forward_hook(left))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a network gives."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from _tensors(each)
    elif isinstance(output, (list, tuple)):
        for each in output:
            yield from _tensors(each)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from _tensors(getattr(output, field.name))
