"""Zeros out of the training: sparse layouts, and the masks of `torch.nn.utils.prune`.

Exact zeros save nothing while a tensor is dense. What is here hands them to the parts of PyTorch that use them, and
warns or raises where there is nothing to hand over.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from funcreg.core._typing import Mask, Params
from funcreg.core.checks import check_params
from funcreg.core.masks import listed, mask_leaves
from funcreg.core.notices import warn_user
from funcreg.core.ranges import check_range
from funcreg.core.sharding import check_whole, check_whole_module
from funcreg.core.tree import flatten, tree_paths
from funcreg.core.wording import type_of

# Sparse layouts


def to_sparse(
    params: Params,
    layout: torch.layout | str = torch.sparse_csr,
    *,
    mask: Mask | None = None,
    min_sparsity: float = 0.0,
) -> Params:
    """The same tree, with the matrices that gain by it in a sparse layout.

    A matrix is converted if it takes less memory then: in CSR from about two thirds of zeros on in float32, in 2:4 if
    no four neighbours in a row have more than two entries that are not zero (`n_m_sparsity` trains that), and PyTorch
    has a kernel for its shape and dtype. All other leaves stay dense and share memory with those that were given.
    Nothing that is returned requires a gradient.

    The tree goes into `torch.func.functional_call`, or into the module by `load_state_dict(tree, assign=True,
    strict=False)`. Linear layers compute with sparse weights; embeddings, packed attention and the inference path of
    `TransformerEncoderLayer` do not: leave them out by `mask=select(torch.nn.Linear, module=net)`. On a CPU products
    with CSR need float32 or float64, and are faster than dense ones from about 97 % of zeros on, or 95 % for single
    inputs; `torch.compile` breaks its graph at them.

    Args:
        params: A tree of tensors.
        layout: `torch.sparse_csr`, or "2:4" for the semi-structured layout of NVIDIA GPUs.
        mask: Leaves that may be converted; by default all.
        min_sparsity: Least share of zeros of a matrix that is converted, from 0 to 1.

    Raises:
        TypeError: `layout` is neither of these.
        ValueError: There is a mask, and nothing that it chooses can be converted; or "2:4" comes with a matrix that is
            not on a GPU.

    Warns:
        UserWarning: Without a mask, nothing can be converted; or PyTorch has no kernel for a matrix in the 2:4 pattern.

    Example:
        >>> sparse = to_sparse({"weight": torch.eye(8), "bias": torch.zeros(8)})
        >>> sparse["weight"].layout, sparse["bias"].layout
        (torch.sparse_csr, torch.strided)
        >>> torch.nn.functional.linear(torch.arange(8.0), **sparse)
        tensor([0., 1., 2., 3., 4., 5., 6., 7.])

    References:
        Mishra et al., *Accelerating sparse deep neural networks*, 2021.
    """
    if layout not in (torch.sparse_csr, "2:4"):
        raise TypeError(f'layout is {layout!r}; expected torch.sparse_csr or "2:4"')
    check_range("min_sparsity", min_sparsity, 0.0, 1.0)
    check_params(params)
    leaves, rebuild = flatten(params)
    check_whole("to_sparse", tree_paths(params), leaves)
    chosen = [leaf.ndim == 2 for leaf in leaves] if mask is None else mask_leaves(mask, params)
    made = [leaf.detach() for leaf in leaves]
    converted, refused = 0, list[str]()
    for i, (name, leaf) in enumerate(zip(tree_paths(params), list(made), strict=True)):
        if not chosen[i] or leaf.ndim != 2 or leaf.layout != torch.strided or type(leaf) not in _PLAIN:
            continue
        if layout == "2:4" and leaf.device.type != "cuda":
            raise ValueError(f"leaf '{name}' is on the {leaf.device.type}; the 2:4 layout needs an NVIDIA GPU")
        if _share(leaf) < min_sparsity:
            continue
        if layout == torch.sparse_csr and _csr_saves(leaf):
            made[i], converted = _quiet_csr(leaf), converted + 1
        elif layout == "2:4" and _is_2_of_4(leaf):
            try:
                made[i], converted = _quiet_semi_structured(leaf), converted + 1
            except RuntimeError as error:  # PyTorch says by it which shapes and dtypes it has no kernel for.
                refused.append(f"'{name}' ({str(error).strip().splitlines()[0]})")
    if refused:
        warn_user(f"to_sparse left matrices in the 2:4 pattern dense: {'; '.join(refused)}")
    elif not converted:
        _nothing(mask, leaves, chosen, f"to_sparse found no matrix that is smaller in the layout {layout}")
    return rebuild(made)


_PLAIN = (Tensor, nn.Parameter)


def _share(w: Tensor) -> float:
    return float((w == 0).sum()) / max(w.numel(), 1)


def _csr_saves(w: Tensor) -> bool:
    """Whether values, columns and the starts of rows are less than the matrix."""
    entries, index = int((w != 0).sum()), 8
    return entries * (w.element_size() + index) + (len(w) + 1) * index < w.numel() * w.element_size()


def _is_2_of_4(w: Tensor) -> bool:
    return w.shape[1] % 4 == 0 and w.numel() > 0 and bool(((w.reshape(-1, 4) != 0).sum(1) <= 2).all())


def _quiet_csr(w: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return w.to_sparse_csr()


def _quiet_semi_structured(w: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor")
        return torch.sparse.to_sparse_semi_structured(w.contiguous())


def _nothing(mask: Mask | None, leaves: list[Tensor], chosen: list[bool], what: str) -> None:
    """Warn that nothing is done, or raise if a mask says that something was meant."""
    zeros = sum(int((leaf == 0).sum()) for leaf, here in zip(leaves, chosen, strict=True) if here)
    entries = sum(leaf.numel() for leaf, here in zip(leaves, chosen, strict=True) if here)
    cause = (
        "" if zeros else ". Exact zeros come from a proximal step (prox_adam, regularize), not from a term in the loss"
    )
    message = f"{what}: {zeros} of {entries} entries {'' if mask is None else 'that the mask chooses '}are zero{cause}"
    if mask is not None:
        raise ValueError(message)
    warn_user(message)


# The masks of torch.nn.utils.prune


def to_prune(module: nn.Module, mask: Mask | None = None) -> nn.Module:
    """Hold the zeros of a module by the masks of `torch.nn.utils.prune`, in place.

    Each parameter `weight` with zeros becomes `weight_orig` and a buffer `weight_mask`, as `prune.custom_from_mask`
    makes them, so that training goes on, without the penalty and its shrinkage, and zeros stay zero. A module that is
    pruned already gets the new zeros besides. `prune.remove(layer, "weight")` makes the zeros permanent.

    Args:
        module: A module that was trained to have zeros. An optimizer made before refers to the same parameters.
        mask: Parameters that are pruned if they have zeros; by default those of two or more dimensions, because
            biases often begin at zero.

    Raises:
        ValueError: There is a mask, and no parameter that it chooses has zeros; or one that has is parametrized.

    Warns:
        UserWarning: Without a mask, nothing has zeros.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> layer.weight.data = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
        >>> to_prune(layer).weight_mask
        tensor([[0., 1.],
                [1., 0.]])
    """
    check_whole_module("to_prune", module)
    places = list(_parameters(module))
    params = {path: w for path, _, _, w in places}
    chosen = {path: w.ndim >= 2 for path, w in params.items()}
    if mask is not None:
        chosen = dict(zip(tree_paths(params), mask_leaves(mask, params), strict=True))
    found = [place for place in places if chosen[place[0]] and bool((place[3] == 0).any())]
    for path, layer, _, _ in found:
        if isinstance(layer, parametrize.ParametrizationList):
            raise ValueError(
                f"'{path}' is inside a parametrization, whose zeros need not be those of the weight; expected a plain "
                "parameter. Call torch.nn.utils.parametrize.remove_parametrizations first."
            )
    for _, layer, own, w in found:
        prune.custom_from_mask(layer, own.removesuffix("_orig") if _is_pruned(layer, own) else own, w.detach() != 0)
    if not found:
        what = f"to_prune found nothing to prune in {type(module).__name__}"
        _nothing(mask, list(params.values()), [chosen[path] for path in params], what)
    for layer in module.modules():
        is_attention = isinstance(layer, nn.MultiheadAttention) and prune.is_pruned(layer.out_proj)
        if is_attention and _compute_projection not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_compute_projection)
    return module


def _compute_projection(attention: nn.MultiheadAttention, inputs: Any) -> None:
    """Compute the pruned weight of a projection that attention reads without a call of it, and so without its hooks."""
    layer = attention.out_proj
    for name in ("weight", "bias"):
        if hasattr(layer, f"{name}_mask"):
            setattr(layer, name, getattr(layer, f"{name}_orig") * getattr(layer, f"{name}_mask"))


class Pruned(NamedTuple):
    """What `from_prune` reads from a pruned module.

    Example:
        >>> Pruned({"weight": torch.zeros(1)}, {"weight": torch.tensor([False])}).kept
        {'weight': tensor([False])}
    """

    params: Params  # The parameters by the names they have without pruning, zeros where they are pruned.
    kept: Params  # For each of them a tensor of bools, False where it is pruned.


def computed_parameters(params: Params | nn.Module) -> Params:
    """The parameters of a module, where it is pruned or parametrized the weights it computes with; a tree as it is."""
    if not isinstance(params, nn.Module):
        return params
    found = from_prune(params).params if prune.is_pruned(params) else dict(params.named_parameters())
    for path, layer in params.named_modules():
        own: Any = getattr(layer, "parametrizations", {}) if parametrize.is_parametrized(layer) else {}
        prefix = f"{path}." if path else ""
        for name, parametrizations in own.items():
            inside = f"{prefix}parametrizations.{name}."
            found = {called: w for called, w in found.items() if not called.startswith(inside)}
            found[f"{prefix}{name}"] = _computed(parametrizations)
    if not found:
        raise ValueError(
            f"the {type(params).__name__} has no parameters to read. Are layers in a plain list, which a module does "
            "not see into, where a ModuleList belongs? Are weights packed, as quantization packs them?"
        )
    return found


@torch.no_grad()
def _computed(parametrizations: nn.Module) -> Tensor:
    """The weight that parametrizations compute in evaluation, where spectral norm does not go on with its vectors."""
    training = [layer for layer in parametrizations.modules() if layer.training]
    parametrizations.eval()
    try:
        return parametrizations().detach()
    finally:
        for layer in training:
            layer.training = True


def from_prune(module: nn.Module) -> Pruned:
    """The parameters of a module pruned by `torch.nn.utils.prune`, by their plain names, and what is kept of them.

    The parameters are those that the module computes with, for a module of the same kind that is not pruned
    (`functional_call`, `load_state_dict(..., strict=False)`), for `to_sparse` or `remove_dead`. A chain that trains
    them and keeps their zeros ends with `project(box, lower, upper)`, both bounds 0 where nothing is kept.

    Args:
        module: A module of which at least one parameter is pruned. It stays as it is.

    Raises:
        ValueError: Nothing is pruned.

    Example:
        >>> layer = torch.nn.utils.prune.l1_unstructured(torch.nn.Linear(2, 2), "weight", amount=3)
        >>> params, kept = from_prune(layer)
        >>> sorted(params), int(kept["weight"].sum())
        (['bias', 'weight'], 1)
    """
    check_whole_module("from_prune", module)
    places = list(_parameters(module))
    if not any([_is_pruned(layer, own) for _, layer, own, _ in places]):
        raise ValueError(
            f"from_prune got {type_of(module)} of which nothing is pruned: no parameter has a buffer *_mask "
            f"beside it. The parameters are {listed(path for path, *_ in places)}. Was prune.remove called? Then they "
            "have their zeros already."
        )
    params: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # What is kept of the parameters before, by their identity.
    for path, layer, own, w in places:
        here, name, value = torch.ones_like(w, dtype=torch.bool), path, w.detach()
        if _is_pruned(layer, own):
            factor: Tensor = getattr(layer, f"{own.removesuffix('_orig')}_mask")
            here, name = factor != 0, path.removesuffix("_orig")
            value = factor.to(w.dtype) * value  # As prune does; what the last forward left in the layer may be older.
        if id(w) in seen and torch.equal(seen[id(w)], here):
            continue  # A tied parameter, which has the first of its names, as in named_parameters().
        seen.setdefault(id(w), here)
        params[name], kept[name] = value, here
    return Pruned(params, kept)


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter with its path, its layer and its name there; a tied one wherever it is."""
    for prefix, layer in module.named_modules():
        for own, w in layer.named_parameters(recurse=False):
            yield f"{prefix}.{own}" if prefix else own, layer, own, w


def _is_pruned(layer: nn.Module, own: str) -> bool:
    return own.endswith("_orig") and f"{own.removesuffix('_orig')}_mask" in layer._buffers
