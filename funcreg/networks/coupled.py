"""Groups that span leaves: what belongs to one channel of a network shares a norm, and lives or dies together.

A family of groups says along which dimension of each leaf its groups run. Gathered by group, the leaves of a family
are the rows of one matrix, and any penalty of rows becomes a penalty of such groups: the mathematics stays where it
is. The same families tell which slices of which leaves a dead group takes with it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from funcreg.core._typing import Hyper, Mask, Params
from funcreg.core.construction import remembered
from funcreg.core.leafwise import laid_out_as, total
from funcreg.core.masks import chosen_by, mask_leaves
from funcreg.core.sharding import like, whole
from funcreg.core.tree import flatten, leaves_like, tree_leaves, tree_paths
from funcreg.core.undocumented import is_compiling
from funcreg.core.wording import type_of
from funcreg.networks.families import (
    Along,
    Family,
    Groups,
    Place,
    families_of,
    gather,
    overlapping,
    places_of,
    scatter,
    width_of,
)
from funcreg.networks.removal import count_alive
from funcreg.regularizers.penalty import Penalty, Sum

#: For each family its number, and what a rule of rows takes: leaves, and what is like them, as matrices, and options.
Matrices: TypeAlias = Iterable[tuple[int, list[Tensor], dict[str, Any]]]
#: From matrices, with a metric or without, a step and hyperparameters to the proximal point of each.
LandRows: TypeAlias = Callable[[Matrices, Hyper, Sequence[Hyper]], Iterable[Tensor]]


@remembered
def coupled(penalty: Penalty, groups: Groups) -> Penalty:
    r"""A penalty of groups that span leaves, such as :math:`\sum_g c_g \sqrt{\sum_l \|w_{l,g}\|^2}`.

    A channel of a network is a filter, its bias, the scale and shift of its normalization and the slice of the next
    layer that reads it. With one norm they become zero together, and the channel can be taken out (`remove_dead`).
    Leaves that no family names carry no penalty. The leaves of a family share one step: strengths that differ
    between families or groups are `weights`.

    A leaf may be penalized in two families, as a hidden layer is by its outputs and by its inputs. Value and gradient
    take that; a proximal operator of groups that overlap has no closed form, and raises. `channel_groups` makes
    families that do not overlap.

    Args:
        penalty: A penalty of groups whose groups are rows: `group_lasso`, `sparse_group_lasso` or one of your own. Its
            hyperparameters and options remain, without `dim`; `weights` may also be a list, one for each family.
        groups: A family, a list of families, or a function that makes them from parameters. A family is a dict from
            dotted names of leaves to the dimension along which its groups run, or to an `Along`.

    Raises:
        ValueError: There is no family, or one without a leaf that is penalized; later, from the parameters, a family
            names what is no leaf, or a leaf has not the groups that its family has.

    Example:
        Two units: the rows of one layer, its biases, and the columns of the next.

        >>> params = {
        ...     "0.weight": torch.tensor([[2.0, 2.0], [0.1, 0.2]]),
        ...     "0.bias": torch.tensor([4.0, 0.2]),
        ...     "2.weight": torch.tensor([[5.0, 0.4]]),
        ... }
        >>> units = coupled(group_lasso, {"0.weight": 0, "0.bias": 0, "2.weight": 1})
        >>> units(params)
        tensor(7.5000)
        >>> units.prox(params, 3.5)
        {'0.weight': tensor([[1., 1.],
                [0., 0.]]), '0.bias': tensor([2., 0.]), '2.weight': tensor([[2.5000, 0.0000]])}

    References:
        Wen, Wu, Wang, Chen & Li, *Learning structured sparsity in deep neural networks*, 2016.
        Fang, Ma, Song, Mi & Wang, *DepGraph: towards any structural pruning*, 2023.
    """
    if not isinstance(penalty, Penalty):
        raise TypeError(
            f"penalty is {type_of(penalty)}; expected a Penalty of rows such as group_lasso, as in "
            "coupled(group_lasso, groups)"
        )
    if isinstance(groups, torch.nn.Module):
        raise TypeError(f"groups is {type_of(groups)}; expected families of it, as channel_groups(module, (x,)) finds")
    if not callable(groups):
        families_of(groups)
    return _coupled(penalty, groups, functools.partial(_each_landed, penalty))


def _each_landed(penalty: Penalty, matrices: Matrices, step: Hyper, hyper: Sequence[Hyper]) -> Iterator[Tensor]:
    """The proximal points of matrices, one after another."""
    for _, (w, *h), options in matrices:
        yield penalty.prox(w, step, *hyper, metric=h[0] if h else None, **options)


def _coupled(penalty: Penalty, groups: Groups, land_rows: LandRows) -> Penalty:
    """As `coupled`, with what lands rows."""
    rules = _Rules(penalty, groups, land_rows)

    def rule(params: Params, *hyper: Hyper, **options: Any) -> Tensor:
        return rules.value(params, *hyper, **options)

    signature = inspect.signature(penalty)
    rule.__name__, rule.__doc__ = f"coupled_{penalty.__name__}", penalty.__doc__
    kept = [parameter for parameter in signature.parameters.values() if parameter.name != "dim"]
    vars(rule)["__signature__"] = signature.replace(parameters=kept)
    return Penalty(
        rules.value,
        rules.gradient,
        rules.proximal,
        residual=rules.residual,
        rule=rule,
        in_metric=rules.in_metric,
        bounds=penalty.bounds,
        has_gradient=penalty.has_gradient,
        convex=penalty.is_convex,
    )


class _Rules:
    """The rules of a penalty of groups that span leaves, from those of a penalty of rows."""

    def __init__(self, penalty: Penalty, groups: Groups, land_rows: LandRows) -> None:
        self._penalty, self._groups, self._land_rows = penalty, groups, land_rows
        self._in_rows = {"dim": ...} if "dim" in inspect.signature(penalty).parameters else {}

    def value(self, params: Params, *hyper: Hyper, **options: Any) -> Tensor:
        _shared(hyper)
        return total([self._penalty(w, *hyper, **own) for w, own in self._matrices(params, options)])

    def gradient(self, params: Params, *hyper: Hyper, **options: Any) -> Params:
        _shared(hyper)
        slope = lambda matrices: (self._penalty.grad(w, *hyper, **own) for _, (w,), own in matrices)
        slopes = self._mapped(slope, self._families(params), params, onto=None, options=options)
        leaves, rebuild = flatten(params)
        return rebuild([torch.zeros_like(w) if g is None else g for w, g in zip(leaves, slopes, strict=True)])

    def proximal(
        self, params: Params, step: Hyper, *hyper: Hyper, metric: Params | None = None, **options: Any
    ) -> Params:
        _shared((step, *hyper))
        trees = (params,) if metric is None else (params, metric)
        land = lambda matrices: self._land_rows(matrices, step, hyper)
        landed = self._mapped(land, self._apart(params), *trees, onto=params, options=options)
        leaves, rebuild = flatten(params)
        return rebuild([w if z is None else z for w, z in zip(leaves, landed, strict=True)])

    def in_metric(self, params: Params, *hyper: Hyper, **options: Any) -> bool:
        return all([self._penalty.in_metric(w, *hyper, **own) for w, own in self._matrices(params, options)])

    def residual(self, params: Params, grads: Params, strength: Hyper, *hyper: Hyper, **options: Any) -> Params:
        _shared((strength, *hyper))
        left = lambda matrices: (
            self._penalty.residual(w, g, *hyper, strength=strength, **own) for _, (w, g), own in matrices
        )
        found = self._mapped(left, self._apart(params), params, grads, onto=grads, options=options)
        leaves, rebuild = flatten(grads)
        return rebuild([g if r is None else r for g, r in zip(leaves, found, strict=True)])

    def _families(self, params: Params) -> list[list[Place]]:
        return [[place for place in family if place.along.penalized] for family in places_of(self._groups, params)]

    def _apart(self, params: Params) -> list[list[Place]]:
        """The families, if no entry is in two of them."""
        found, leaves = self._families(params), tree_leaves(params)
        used: dict[int, list[Along]] = {}
        for family in found:
            for leaf, along in family:
                used.setdefault(leaf, []).append(along)
        for leaf, alongs in used.items():
            if overlapping(leaves[leaf], alongs):
                raise ValueError(
                    f"leaf '{tree_paths(params)[leaf]}' is in {len(alongs)} families of groups: where groups "
                    f"overlap, {self._penalty.__name__} has a value and a gradient, but no proximal operator. Leave "
                    "the leaf to one family, and write Along(dim, penalized=False) in the others."
                )
        return found

    def _matrices(self, params: Params, options: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Each family of penalized leaves as a matrix, with its options."""
        leaves, found = tree_leaves(params), self._families(params)
        for i, family in enumerate(found):
            if family:
                yield _rows(leaves, family), self._options(i, len(found), options)

    def _options(self, family: int, count: int, options: dict[str, Any]) -> dict[str, Any]:
        """The options of one of the families."""
        weights = options.get("weights")
        if not isinstance(weights, (list, tuple)):
            return {**options, **self._in_rows}
        if len(weights) != count:
            raise ValueError(f"weights has {len(weights)} entries; expected {count}, one for each family of groups")
        return {**options, **self._in_rows, "weights": weights[family]}

    def _mapped(
        self,
        f: Callable[[Matrices], Iterable[Tensor]],
        found: list[list[Place]],
        *trees: Params,
        onto: Params | None,
        options: dict[str, Any],
    ) -> list[Tensor | None]:
        """For each leaf what `f` makes of the rows of its families, None if it has none.

        Entries without a family are those of `onto`; without it they are zero, and families that overlap add up.
        """
        leaves = tree_leaves(trees[0])
        columns = [leaves, *[leaves_like(trees[0], tree) for tree in trees[1:]]]
        bases = leaves if onto is None else tree_leaves(onto)
        results: list[Tensor | None] = [None] * len(leaves)
        numbers = [i for i, family in enumerate(found) if family]
        several = (
            (i, [_rows(column, found[i]) for column in columns], self._options(i, len(found), options)) for i in numbers
        )
        for i, own_rows in zip(numbers, f(several), strict=True):
            family = found[i]
            widths = [width_of(leaves[leaf], along) for leaf, along in family]
            for (leaf, along), part in zip(family, own_rows.split(widths, 1), strict=True):
                earlier = results[leaf]
                base = whole(bases[leaf] if earlier is None else earlier)
                own = _like(part, leaves[leaf])
                if len(family) > 1:  # Else the leaf would keep the memory of all.
                    own = own.clone(memory_format=torch.contiguous_format)
                spread = scatter(own, torch.zeros_like(base) if onto is None else base, along)
                made = like(laid_out_as(base, spread), leaves[leaf])
                results[leaf] = made if onto is not None or earlier is None else earlier + made
        return results


def _rows(leaves: Sequence[Tensor], family: Sequence[Place]) -> Tensor:
    """The leaves of a family as one matrix, a group in each row."""
    parts = [gather(whole(leaves[leaf]), along) for leaf, along in family]
    return torch.cat([part.to(parts[0].device) for part in parts], 1) if len(parts) > 1 else parts[0]


def check_groups_are_whole(penalty: Penalty, mask: Mask | None, params: Params) -> None:
    """Raise a ValueError if a mask leaves out a part of a group of `coupled`, which would never be zero as a whole."""
    if (mask is None and not isinstance(penalty, Sum)) or is_compiling():
        return
    names = tree_paths(params)
    bools = [True] * len(names) if mask is None else mask_leaves(mask, params)
    chosen = {name for name, own in zip(names, bools, strict=True) if own}
    lost = split_leaf(penalty, chosen, params)
    if lost is not None:
        raise ValueError(
            f"mask leaves out '{lost}', a part of groups of {penalty!r}, which span leaves and so would never be zero "
            "as a whole. Drop mask=: the groups say already what is penalized."
        )


def split_leaf(penalty: Penalty, chosen: Collection[str], params: Params) -> str | None:
    """The name of a leaf that is not chosen, in a family of `coupled` with one that is; None without such a family.

    In a sum, each term is looked at with the leaves that its own mask chooses.
    """
    names = tree_paths(params)
    if isinstance(penalty, Sum):
        for term in penalty.terms:
            own = {name for name, acts in zip(names, term.places(params), strict=True) if acts}
            lost = split_leaf(term.penalty, own.intersection(chosen), params)
            if lost is not None:
                return lost
        return None
    if not is_coupled(penalty):
        return None
    for family in families_of(chosen_by(_groups_of(penalty), params, "groups")[0]):
        parts = [name for name, along in family if along.penalized and name in names]
        lost = [name for name in parts if name not in chosen]
        if 0 < len(lost) < len(parts):
            return lost[0]
    return None


def linked(penalty: Penalty, params: Params) -> list[set[str]]:
    """Sets of names of leaves that are landed together: the families of `coupled`, also in a sum, that share no leaf.

    Families with a leaf in common are one set. Of a penalty of another kind that couples leaves all are one.
    """
    found: list[set[str]] = []
    for family in _families(penalty, params):
        shared = [each for each in found if each & family]
        found = [each for each in found if not each & family]
        found.append(family.union(*shared))
    return found


def landed_by(penalty: Penalty, landing: Callable[[Penalty], LandRows]) -> Penalty:
    """A penalty in which `coupled`, also in a sum, leaves rows to what `landing` makes; the same one if it has none."""
    if isinstance(penalty, Sum):
        terms = penalty.terms
        made = [term._replace(penalty=landed_by(term.penalty, landing)) for term in terms]
        same = all([new.penalty is old.penalty for new, old in zip(made, terms, strict=True)])
        return penalty if same else Sum(tuple(made))
    if not is_coupled(penalty):
        return penalty
    of_rows, groups = _made_of(penalty)
    return _coupled(of_rows, groups, landing(of_rows))


def is_coupled(penalty: Penalty) -> bool:
    """Whether a penalty is one that `coupled` made, not a sum with it."""
    return penalty.made_by is not None and penalty.made_by.function.__name__ == "coupled"


def _families(penalty: Penalty, params: Params) -> list[set[str]]:
    names = tree_paths(params)
    if isinstance(penalty, Sum):
        found: list[set[str]] = []
        for term in penalty.terms:
            own = {name for name, acts in zip(names, term.places(params), strict=True) if acts}
            found += [family & own for family in _families(term.penalty, params)]
        return [family for family in found if family]
    if not penalty.couples_leaves:
        return []
    if not is_coupled(penalty):
        return [set(names)]
    places = places_of(_groups_of(penalty), params)
    found = [{names[place.leaf] for place in family if place.along.penalized} for family in places]
    return [family for family in found if family]


def _made_of(penalty: Penalty) -> tuple[Penalty, Groups]:
    """What `coupled` was given."""
    call = penalty.made_by
    assert call is not None  # It is made by coupled.
    given = inspect.signature(coupled).bind(*call.args, **call.kwargs).arguments
    return given["penalty"], given["groups"]


def _groups_of(penalty: Penalty) -> Groups:
    return _made_of(penalty)[1]


def named_leaves(penalty: Penalty, params: Params) -> list[str]:
    """The names of leaves that `coupled`, also in a sum, has in its groups and penalizes."""
    if isinstance(penalty, Sum):
        return [name for term in penalty.terms for name in named_leaves(term.penalty, params)]
    if not is_coupled(penalty):
        return []
    families = families_of(chosen_by(_groups_of(penalty), params, "groups")[0])
    return [name for family in families for name, along in family if along.penalized]


class Extinct(NamedTuple):
    """A family of which no group is left."""

    title: str  # The name of its first penalized leaf.
    groups: int
    neck: bool | None  # Whether outputs are the same at every input without it; None if that is not known.


def extinct(penalty: Penalty, params: Params) -> list[Extinct]:
    """The families of `coupled`, also in a sum, all of whose groups are zero."""
    if isinstance(penalty, Sum):
        return [each for term in penalty.terms for each in extinct(term.penalty, params)]
    if not is_coupled(penalty):
        return []
    groups = _groups_of(penalty)
    families = families_of(chosen_by(groups, params, "groups")[0])
    counts, necks = count_alive(params, groups), getattr(groups, "necks", [])
    necks = necks if len(necks) == len(families) else [None] * len(families)
    return [
        Extinct(next(name for name, along in family if along.penalized), alive.total, neck)
        for family, alive, neck in zip(families, counts, necks, strict=True)
        if alive.total and not alive.left
    ]


def _shared(hyper: Sequence[Hyper]) -> None:
    """Raise an error if a hyperparameter is a tree: leaves that share a norm cannot each have one."""
    for value in hyper:
        if not isinstance(value, (int, float, Tensor)):
            raise ValueError(
                f"a step, strength or hyperparameter is {type_of(value)}; expected a number or a tensor, "
                "because the leaves of a group share it. Strengths for families or groups are weights=."
            )


def _like(x: Tensor, leaf: Tensor) -> Tensor:
    """A result with the dtype and the device of a leaf: a family may mix them."""
    return (x.real if x.is_complex() and not leaf.is_complex() else x).to(leaf.device, leaf.dtype)


# Networks

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
#: Layers that keep channels apart, and take a channel of zeros to a channel of zeros.
_CHANNELWISE = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
#: Layers that do so for channels of pixels, by the number of dimensions of these. Anywhere else they mix channels.
_PIXELWISE = {
    1: (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d, nn.ZeroPad1d, nn.Upsample),
    2: (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d, nn.Upsample),
    3: (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveMaxPool3d, nn.AdaptiveAvgPool3d, nn.ZeroPad3d, nn.Upsample),
}


def sequence_groups(module: nn.Module, prefix: str, layers: Sequence[str] | None) -> list[Family]:
    """The channels of a network of layers in sequence, one family for each layer but the last; see `channel_groups`."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is {type_of(module)}; expected torch.nn.Sequential")
    if type(module).forward is not nn.Sequential.forward:
        raise ValueError(
            f"channel_groups got {type_of(module)}; expected torch.nn.Sequential, because without example "
            "inputs channels are followed through layers in sequence, not through a forward of its own. Give it the "
            "inputs, as in channel_groups(net, (x,)), or the parts that are sequences, as in "
            'channel_groups(net.features, prefix="features").'
        )
    followed = _Followed()
    for name, layer in layers_in_sequence(module, prefix):
        followed.take(name, layer)
    families, names = followed.families, followed.names
    if len(names) < 2:
        raise ValueError(
            "channel_groups found no layer whose channels another one reads: the sequence has "
            f"{', '.join(f'{name!r}' for name in names) or 'no linear layer or convolution'}, and of one layer there "
            "are no groups. Layers inside modules with a forward of their own are not seen."
        )
    made = names[:-1] if layers is None else list(layers)
    if isinstance(layers, str) or not set(made) <= set(names[:-1]):
        raise ValueError(f"layers is {layers!r}; expected names among {', '.join(map(repr, names[:-1]))}")
    for family, after in zip(families, names[1:], strict=False):
        read = family[f"{after}.weight"]
        if after not in made and isinstance(read, Along):
            family[f"{after}.weight"] = read._replace(penalized=True) if read.size > 1 else read.dim
    return [family for family, name in zip(families, names, strict=True) if name in made]


class _Followed:
    """Channels on their way through layers in sequence."""

    def __init__(self) -> None:
        self.families: list[Family] = []
        self.names: list[str] = []  # Of the layers whose outputs these are.
        self._channels = 0  # Of the last family; 0 where no layer has made channels yet.
        self._pixels, self._flattened = 0, False  # How many dimensions a channel's pixels have; whether they are one.
        self._opaque = ""  # A layer that channels cannot be followed through.
        self._seen: dict[int, str] = {}  # Names of the layers before, by the layers and their parameters.

    def take(self, name: str, layer: nn.Module) -> None:
        """Follow channels through the next layer, or raise an error that says why that cannot be."""
        said = f"'{name}', {type_of(layer)}"
        self._note(name, layer, said)
        if isinstance(layer, (nn.Linear, _CONVOLUTIONS)):
            self._take_weight(name, layer, said)
        elif isinstance(layer, _NORMS) and self._channels and not self._opaque:
            self._take_norm(name, layer, said)
        elif isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
            self._flattened = self._flattened or self._pixels > 0
        elif not isinstance(layer, (*_CHANNELWISE, *_PIXELWISE.get(0 if self._flattened else self._pixels, ()))):
            self._opaque = self._opaque or said

    def _note(self, name: str, layer: nn.Module, said: str) -> None:
        """Note the parameters of a layer, which no other one may have."""
        parameters = list(layer.parameters())
        if not parameters:
            return
        if id(layer) in self._seen:
            raise _refuse(said, "it is used twice")
        shared = next((self._seen[id(x)] for x in parameters if id(x) in self._seen), None)
        if shared is not None:
            raise _refuse(said, f"it shares a parameter with '{shared}'")
        self._seen.update(dict.fromkeys(map(id, (layer, *parameters)), name))

    def _take_weight(self, name: str, layer: Any, said: str) -> None:
        linear, transposed = isinstance(layer, nn.Linear), isinstance(layer, _TRANSPOSED)
        if "weight" not in _named(layer):
            raise _refuse(said, "it has no parameter weight; is it parametrized?")
        if linear:
            out, into, apart = layer.out_features, layer.in_features, 1
        else:
            out, into, apart = layer.out_channels, layer.in_channels, layer.groups
        if self._channels:
            if self._opaque:
                raise _refuse(self._opaque, "it may mix them, or turn zeros into other numbers")
            if linear == (self._pixels > 0 and not self._flattened):
                raise _refuse(said, "a Flatten belongs between" if linear else "it takes pixels")
        if apart > 1:
            if not apart == into == out:
                raise _refuse(said, f"it has groups={apart}")
            if self._channels:  # Each channel to itself.
                self._entries(said, into)
                self.families[-1].update(dict.fromkeys([f"{name}.{own}" for own in _named(layer)], 0))
            return
        if self._channels:
            size, dim = self._entries(said, into), 0 if transposed else 1
            self.families[-1][f"{name}.weight"] = Along(dim, size, penalized=False)
        self.families.append({f"{name}.{own}": 1 if transposed and own == "weight" else 0 for own in _named(layer)})
        self.names.append(name)
        self._channels, self._opaque = out, ""
        self._pixels, self._flattened = 0 if linear else layer.weight.ndim - 2, False

    def _take_norm(self, name: str, layer: Any, said: str) -> None:
        size = self._entries(said, layer.num_features)
        if not layer.affine:
            raise _refuse(said, "without a scale and a shift it turns zeros into other numbers")
        family = self.families[-1]
        family.update(dict.fromkeys((f"{name}.weight", f"{name}.bias"), 0 if size == 1 else Along(0, size)))
        statistics = [f"{name}.{own}" for own, x in layer.named_buffers() if x.ndim]
        family.update(dict.fromkeys(statistics, Along(0, size, penalized=False)))

    def _entries(self, said: str, width: int) -> int:
        """The number of entries of a channel, in a dimension that counts channels."""
        if width % self._channels or (width != self._channels and not self._flattened):
            raise _refuse(said, f"it takes {width} channels, and {self._channels} come in")
        return width // self._channels


def _refuse(said: str, reason: str) -> ValueError:
    return ValueError(
        f"channel_groups cannot follow channels through {said}: {reason}. Write the families by hand, or take the "
        "part of the network before or after it."
    )


def _named(layer: nn.Module) -> list[str]:
    return [name for name, _ in layer.named_parameters(recurse=False)]


def layers_in_sequence(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers of nested sequences in their order, with their names."""
    if type(module).forward is not nn.Sequential.forward:
        yield prefix, module
        return
    for name, child in module._modules.items():
        if child is not None:
            yield from layers_in_sequence(child, f"{prefix}.{name}" if prefix else name)
