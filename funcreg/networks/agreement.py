"""What networks give on example inputs, and whether two of them give the same."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from funcreg.core.wording import type_of, with_article

#: What a network computes with in place of a parameter or buffer, by its name.
Exchange: TypeAlias = Callable[[str, Tensor], Tensor]


class Agreement:
    """The outputs of a network on example inputs, and whether another one has them, too.

    Args:
        module: The network.
        inputs: What it is called with.
        exchange: What both compute with in place of their tensors, if it is something else.
    """

    def __init__(self, module: nn.Module, inputs: Any, exchange: Exchange | None = None) -> None:
        self.inputs = arguments(inputs)
        self.module, self.exchange = module, exchange
        self.rounding = rounding(module, self.inputs, exchange)
        found, self.drew = run(module, *self.inputs, exchange=exchange)  # What it gives, and whether it drew numbers.
        if isinstance(found, Failure):
            raise ValueError(f"the module itself fails on example_inputs: {found}")
        self.expected = found
        if not found:
            raise ValueError(f"{type(module).__name__} gives no tensors on example_inputs that could be compared")

    def problem(self, other: nn.Module, least: float = 0.0) -> Failure | str | None:
        """What is wrong with another network, None if its outputs are those of the first, up to a share at least."""
        found = outputs(other, *self.inputs, exchange=self.exchange)
        if isinstance(found, Failure):
            return found
        return unlike(self.expected, found) or unequal(self.expected, found, max(least, self.rounding))


class Failure(NamedTuple):
    """An error of a forward pass, and where it was raised."""

    path: str  # Name of the module whose forward ran, empty for the network itself.
    kind: str  # Its type.
    error: str

    def __str__(self) -> str:
        where = f"'{self.path}', {with_article(self.kind)}" if self.path else "its own forward"
        return f"in {where}: {self.error}"


def unlike(expected: list[Tensor], found: list[Tensor]) -> str | None:
    """How many outputs there are, or how they are shaped, where it is another number or shape."""
    if len(found) != len(expected):
        return f"it gives {len(found)} tensors, and the module {len(expected)}"
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a.shape != b.shape:
            return f"output {i} of it has shape {tuple(b.shape)}, and that of the module {tuple(a.shape)}"
    return None


def unequal(expected: list[Tensor], found: list[Tensor], least: float = 0.0) -> str | None:
    """Which of some outputs differ by more than rounding, and than a share of the largest entry, and by how much."""
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        if (a.is_floating_point() or a.is_complex()) and a.numel():
            # Infinities that mask something out are equal, and what is no number in both.
            gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0, (a - b).abs()).max()
            size = a.abs().masked_fill(~a.isfinite(), 0).max()
            if not gap <= max(least, torch.finfo(a.dtype).eps ** 0.5) * size:  # Not a number is no agreement.
                share = gap / size
                return f"output {i} of it differs from that of the module by {share:.1e} of the largest entry"
        elif not torch.equal(a, b):
            return f"output {i} of it differs from that of the module"
    return None


def rounding(
    module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], exchange: Exchange | None = None
) -> float:
    """The share of the largest entry by which outputs may differ that are computed with such tensors.

    What is computed in float32 does not get more exact by a float64 number that multiplies it.
    """
    leaves = (*module.named_parameters(), *module.named_buffers())
    own = [(name, torch.empty(0, dtype=x.dtype, device=x.device)) for name, x in leaves]
    given = [x if exchange is None else exchange(name, x) for name, x in own]
    several = [x for x in (*given, *_tensors(inputs)) if x.is_floating_point() and x.element_size() > 1]
    return max([torch.finfo(x.dtype).eps for x in several], default=0.0) ** 0.5


def outputs(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seed: int = 0,
    exchange: Exchange | None = None,
) -> list[Tensor] | Failure:
    """The tensors that a network gives in evaluation, or what went wrong; its random numbers are those of a seed."""
    return run(network, args, kwargs, seed, exchange)[0]


def run(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seed: int = 0,
    exchange: Exchange | None = None,
) -> tuple[list[Tensor] | Failure, bool]:
    """As `outputs`, and whether numbers were drawn from a generator that the seed is for."""
    running = list[str]()
    with _evaluated(network), _followed(network, running), drawing(network, seed) as drew, torch.no_grad():
        try:
            own = {name: x.clone() for name, x in network.named_buffers()}
            if exchange is not None:
                own = {name: exchange(name, x) for name, x in (*own.items(), *network.named_parameters())}
            return list(_tensors(functional_call(network, own, args, kwargs))), drew()
        except Exception as error:
            path = running[-1] if running else ""
            said = str(error).strip().partition("\n")[0]
            kind = type(network.get_submodule(path)).__name__
            return Failure(path, kind, f"{type(error).__name__}: {said}"), drew()


def draws(network: nn.Module, inputs: Any) -> bool:
    """Whether outputs depend on random numbers, or it fails, as where a part of what is long is drawn."""
    args, kwargs = arguments(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # They were given when the network itself ran.
        first, again = (outputs(network, args, kwargs, seed) for seed in (0, 1))
    if isinstance(first, Failure) or isinstance(again, Failure):
        return True
    return (unlike(first, again) or unequal(first, again, rounding(network, (args, kwargs)))) is not None


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call, of a tensor, a tuple, a dict, or a tuple of both."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if not isinstance(inputs, (tuple, list)):
        raise TypeError(
            f"example_inputs is {type_of(inputs)}; expected a tuple of the arguments of the module, or a dict "
            "of its keyword arguments"
        )
    if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return inputs[0], inputs[1]
    return tuple(inputs), {}


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


@contextmanager
def drawing(network: nn.Module, seed: int = 0) -> Iterator[Callable[[], bool]]:
    """Let a network draw from generators that begin anew, leave the user's as they were, and say if it drew any."""
    devices = list({w.device for w in network.parameters() if w.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        states = lambda: [torch.default_generator.get_state(), *map(torch.cuda.get_rng_state, devices)]
        before = states()
        yield lambda: not all(map(torch.equal, before, states()))


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
