"""Layers of low rank as two thin ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcreg.core.masks import listed
from funcreg.core.notices import warn_user
from funcreg.core.ranges import check_range
from funcreg.core.sharding import check_whole_module
from funcreg.core.wording import type_of
from funcreg.networks.copies import check_functions, copied, used_by_functions
from funcreg.networks.widths import CONVOLUTIONS, TRANSPOSED, is_conv1d


class Factors(nn.Sequential):
    """A layer of low rank as two thin ones. Where they are linear, `weight` is the product of theirs."""

    @property
    def weight(self) -> Tensor:
        first, second = self
        if isinstance(second, nn.Linear) and isinstance(first, (nn.Linear, nn.Embedding)):
            return first.weight @ second.weight.T if isinstance(first, nn.Embedding) else second.weight @ first.weight
        raise AttributeError(f"weight of {type(first).__name__} and {type(second).__name__}")

    @property
    def bias(self) -> Any:
        return self[-1].bias

    def extra_repr(self) -> str:
        return f"rank={_thin(self)}, parameters={_count(self)}"


def factorized(
    module: nn.Module,
    tolerance: float = 1e-5,
    *,
    layers: Sequence[str] | None = None,
    state: Mapping[str, Any] | None = None,
) -> nn.Module:
    r"""A copy of a module whose layers of low rank are two thin ones each, with equal outputs up to a tolerance.

    Singular values of a weight that are at most `tolerance` times the largest one :math:`\sigma_1` go, so that it
    changes by at most `tolerance` :math:`\cdot \sigma_1` in the spectral norm: an output :math:`W x + b` by at most
    `tolerance` :math:`\cdot \sigma_1 \|x\|_2`, and rounding. Penalties of singular values (`nuclear`, `schatten`,
    `spectral_mcp`) with their proximal step make the others zero.

    A linear layer of rank r becomes `Linear(in, r, bias=False)` and `Linear(r, out)`; a convolution becomes one to r
    channels with its kernel and one of kernel size 1, or these in the other order, whichever are smaller. Where a
    layer had `name.weight` and `name.bias` there are `name.0.weight`, `name.1.weight` and `name.1.bias`. Layers stay
    as they are where two would not have fewer parameters, where they share their weight, have hooks or are
    parametrized, in several groups, and inside `MultiheadAttention`.

    Args:
        module: The network. It stays as it was.
        tolerance: Share of the largest singular value up to which singular values go, from 0 and below 1.
        layers: Names of the layers that are to be made thin; by default all linear layers and convolutions where it
            pays. Only here embeddings count, whose rows are cheap to look up as they are.
        state: The `state_dict` of a module that `factorized` gave. Layers become two thin ones where it has two, and
            hold what it holds; `tolerance` and `layers` have no part in it.

    Raises:
        TypeError: What is given is no module.
        ValueError: `layers` names a layer that cannot be two, or of which two would not be smaller.

    Warns:
        UserWarning: Without `layers`, nothing becomes smaller.

    Example:
        >>> layer = torch.nn.Linear(64, 32)
        >>> layer.weight.data = torch.outer(torch.arange(32.0), torch.ones(64))
        >>> factorized(layer)
        Factors(
          rank=1, parameters=128
          (0): Linear(in_features=64, out_features=1, bias=False)
          (1): Linear(in_features=1, out_features=32, bias=True)
        )

    References:
        Eckart & Young, *The approximation of one matrix by another of lower rank*, 1936.
        Jaderberg, Vedaldi & Zisserman, *Speeding up convolutional neural networks with low rank expansions*, 2014.
    """
    check_whole_module("factorized", module)
    check_range("tolerance", tolerance, 0.0, 1.0, open_high=True)
    check_functions(module)
    smaller = copied(module)
    if state is not None:
        return _read(smaller, state)
    named = dict(smaller.named_modules())
    if isinstance(layers, str) or not set(layers or ()) <= set(named):
        known = listed([repr(name) for name in named if name]) if len(named) > 1 else "'', the module itself"
        where = f", in a list: [{layers!r}]" if isinstance(layers, str) else ""
        raise ValueError(f"layers is {layers!r}; expected names among {known}{where}")
    refused = _refused(smaller)
    made: dict[int, nn.Module] = {}
    said: list[str] = []
    for name in named if layers is None else layers:
        layer = named[name]
        if name not in refused and (layers is not None or not isinstance(layer, nn.Embedding)):
            if not layer.get_parameter("weight").isfinite().all():
                raise ValueError(f"the weight of '{name}' has entries that are not finite, and so no singular values")
            plan = _plan(layer, tolerance)
            if plan.parameters < plan.dense:
                made[id(layer)] = _split(layer, plan)
                continue
            said.append(f"'{name}' has rank {plan.rank} of {plan.full}, {plan.parameters} parameters for {plan.dense}")
        if layers is not None:
            raise ValueError(f"layers names '{name}', which cannot be two thin layers: {refused.get(name) or said[-1]}")
    if layers is None and not made:
        kinds = (nn.Linear, *CONVOLUTIONS)
        said += [f"'{name}' stays: {why}" for name, why in refused.items() if isinstance(named[name], kinds)]
        warn_user(
            f"factorized found no layer that is smaller as two at tolerance={tolerance}: "
            f"{'; '.join(said[:10]) or 'no linear layer or convolution of one group'}. Low rank comes from the "
            "proximal step of a penalty of singular values such as nuclear, not from a term in the loss",
        )
    return _replaced(smaller, made)


class _Plan(NamedTuple):
    """How a layer would be two thin ones."""

    rank: int
    full: int  # The largest rank that it could have.
    parameters: int  # Of the two weights.
    dense: int  # Of the weight.
    early: bool  # Whether the kernel of a convolution is in the first of the two.


def _refused(module: nn.Module) -> dict[str, str]:
    """For the name of each module that is left as it is the reason."""
    shared = Counter([id(w) for layer in module.modules() for w in layer._parameters.values() if w is not None])
    used, reasons = used_by_functions(module), dict[str, str]()
    for name, layer in module.named_modules():
        w = layer._parameters.get("weight")
        if type(layer) not in (nn.Linear, nn.Embedding, *CONVOLUTIONS) and not is_conv1d(layer):
            reasons[name] = f"it is {type_of(layer)}; is it parametrized?"
        elif w is None:
            reasons[name] = "its weight is no parameter; is it parametrized or pruned?"
        elif shared[id(w)] > 1:
            reasons[name] = "it shares its weight with another layer"
        elif getattr(layer, "groups", 1) > 1:
            reasons[name] = f"it is a convolution of {layer.groups} groups"
        elif getattr(layer, "max_norm", None) is not None:
            reasons[name] = "it has max_norm, which changes its weight as it is used"
        elif layer._forward_hooks or layer._forward_pre_hooks:
            reasons[name] = "it has hooks"
        elif "forward" in vars(layer):
            reasons[name] = "its forward is another function than that of its class"
        elif used.intersection([id(layer), id(w), id(getattr(layer, "bias", None))]):
            reasons[name] = "a function that replaces a forward, or is a hook, uses it"
    return reasons


def _matrix(layer: Any, early: bool) -> Tensor:
    """The weight as a matrix from what comes in to what goes out, in the precision of a decomposition.

    The kernel of a convolution is on the side that is first if it is early, and else on the other.
    """
    w = layer.weight.detach()
    w = w if w.dtype in (torch.float64, torch.complex64, torch.complex128) else w.float()
    if isinstance(layer, nn.Embedding) or is_conv1d(layer):
        return w.T
    w = w.transpose(0, 1) if isinstance(layer, TRANSPOSED) else w  # What goes out, what comes in, kernel.
    return w.flatten(1) if early else w.movedim(1, -1).flatten(0, -2)


def _plan(layer: Any, tolerance: float) -> _Plan:
    """The smaller of the ways to make a layer two."""
    plans: list[_Plan] = []
    for early in (True, False) if isinstance(layer, CONVOLUTIONS) and layer.weight[0, 0].numel() > 1 else (True,):
        m = _matrix(layer, early)
        values = torch.linalg.svdvals(m)
        rank = max(int((values > tolerance * values[:1]).sum()), 1)
        plans.append(_Plan(rank, min(m.shape), rank * sum(m.shape), m.numel(), early))
    return min(plans, key=lambda plan: plan.parameters)


def _split(layer: Any, plan: _Plan) -> Factors:
    """Two thin layers whose product is the weight of a layer."""
    u, s, v = torch.linalg.svd(_matrix(layer, plan.early), full_matrices=False)
    root = s[: plan.rank].sqrt()  # Both of a size, so that one learning rate is right for both.
    out, into = u[:, : plan.rank] * root, root[:, None] * v[: plan.rank]
    made = _thin_layers(layer, plan.rank, plan.early)
    for new, w in zip(made, (into, out), strict=True):
        new.weight = nn.Parameter(_shaped(new, w).to(layer.weight).contiguous(), layer.weight.requires_grad)
    if getattr(layer, "bias", None) is not None:
        made[1].bias = layer.bias
    return made.train(layer.training)


def _shaped(layer: Any, w: Tensor) -> Tensor:
    """A matrix from what comes in to what goes out as the weight of a layer."""
    if isinstance(layer, nn.Embedding):
        return w.T
    if not isinstance(layer, CONVOLUTIONS):
        return w
    kernel = layer.kernel_size
    if w.shape[0] == layer.out_channels:  # The kernel is with what comes in, or is of size 1.
        w = w.unflatten(1, (layer.in_channels, *kernel))
    else:
        w = w.unflatten(0, (layer.out_channels, *kernel)).movedim(-1, 1)
    return w.transpose(0, 1) if isinstance(layer, TRANSPOSED) else w


def _thin_layers(layer: Any, rank: int, early: bool) -> Factors:
    """Two layers of the kinds that a layer becomes, their weights yet to be set."""
    options: dict[str, Any] = {"device": "meta", "dtype": layer.weight.dtype}
    bias = getattr(layer, "bias", None) is not None
    if isinstance(layer, nn.Embedding):
        rows = {"padding_idx": layer.padding_idx, "scale_grad_by_freq": layer.scale_grad_by_freq}
        first = nn.Embedding(layer.num_embeddings, rank, sparse=layer.sparse, **rows, **options)
        return Factors(first, nn.Linear(rank, layer.embedding_dim, bias=False, **options))
    if not isinstance(layer, CONVOLUTIONS):
        into, out = (layer.nx, layer.nf) if is_conv1d(layer) else (layer.in_features, layer.out_features)
        return Factors(nn.Linear(into, rank, bias=False, **options), nn.Linear(rank, out, bias=bias, **options))
    own = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    if isinstance(layer, TRANSPOSED):
        own["output_padding"] = layer.output_padding
    kind, point = type(layer), (nn.Conv1d, nn.Conv2d, nn.Conv3d)[layer.weight.ndim - 3]
    into, out = layer.in_channels, layer.out_channels
    if early:
        first = kind(into, rank, bias=False, **own, **options)
        return Factors(first, point(rank, out, 1, bias=bias, **options))
    return Factors(point(into, rank, 1, bias=False, **options), kind(rank, out, bias=bias, **own, **options))


def _replaced(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A module with others in the places of those with these identities."""
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in made:
                parent._modules[name] = made[id(child)]
    return made.get(id(module), module)


def _read(module: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """A module with thin layers where a state has them, and what it holds."""
    made: dict[int, nn.Module] = {}
    refused = _refused(module)
    for name, layer in module.named_modules():
        first, second = (state.get(f"{name}.{i}.weight" if name else f"{i}.weight") for i in (0, 1))
        if name not in refused and first is not None and second is not None:
            early = not isinstance(layer, CONVOLUTIONS) or first[0, 0].numel() > 1 or second[0, 0].numel() == 1
            rank = first.shape[1] if isinstance(layer, (nn.Embedding, *TRANSPOSED)) and early else first.shape[0]
            w = layer.get_parameter("weight")
            thin = _thin_layers(layer, rank, early).to_empty(device=w.device)
            made[id(layer)] = thin.requires_grad_(w.requires_grad).train(layer.training)
    if not made:
        raise ValueError(
            f"state has no thin layers of this {type(module).__name__}; expected the state_dict of what factorized gave"
        )
    whole = _replaced(module, made)
    whole.load_state_dict(state)
    return whole


def _thin(factors: Factors) -> int:
    """The number of features or channels between two thin layers."""
    second: Any = factors[-1]
    return second.in_features if isinstance(second, nn.Linear) else second.in_channels


def _count(module: nn.Module) -> int:
    return sum([math.prod(w.shape) for w in module.parameters()])
