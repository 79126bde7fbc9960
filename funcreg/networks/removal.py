"""Dead groups taken out: of parameters, of the buffers beside them, and of states that are shaped like them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from funcreg.core._typing import Params
from funcreg.core.leafwise import gathered
from funcreg.core.masks import listed
from funcreg.core.notices import warn_user
from funcreg.core.ranges import whole_number
from funcreg.core.sharding import whole
from funcreg.core.tree import flatten, tree_paths
from funcreg.core.wording import type_of
from funcreg.core.wrapping import matched, without_wrappers
from funcreg.networks.families import Along, Family, Groups, Place, count_of, gather, places_of, within


def with_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module in one tree, by their names, to be read and sliced.

    The tensors are those of the module, detached: they share its memory. Buffers that a checkpoint leaves out are
    among them. A tensor that several layers share comes once, under its first name.

    Args:
        module: A module.

    Raises:
        TypeError: What is given is no module.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.BatchNorm1d(3))
        >>> list(with_buffers(net))
        ['0.weight', '1.weight', '1.bias', '1.running_mean', '1.running_var', '1.num_batches_tracked']
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is {type_of(module)}; expected a torch.nn.Module")
    parameters = {name: w.detach() for name, w in module.named_parameters()}
    return {**parameters, **{name: nn.Buffer(x.detach()) for name, x in module.named_buffers()}}


class _Cut(NamedTuple):
    """What stays of a leaf."""

    shape: torch.Size  # Of the leaf before.
    kept: dict[int, Tensor]  # By dimension the entries that stay.


def remove_dead(
    params: Params, groups: Groups, *states: Any, round_to: int | None = None, names: Sequence[str] | None = None
) -> Any:
    """A smaller tree, without the groups all of whose penalized entries are zero.

    Leaves that no family names stay as they are; buffers may be among the leaves (`with_buffers`), and are sliced if
    a family names them. Where a dead channel is a constant that is not 0 the bias of what reads it takes this (see
    `Along`). One group of a family always stays, so that no layer is left without entries, and two where
    `channel_groups` found that the network needs them. Sharded leaves come back whole. The numbers of groups depend on
    what is in the tensors, so that this is no step to be compiled or mapped over.

    Args:
        params: Tree of parameters, also with the buffers of their module.
        groups: The families that the penalty had; see `coupled`.
        states: Trees that hold others like the parameters, to be sliced as these are: the state of an optimizer, an
            average of weights, a dict in which names of parameters are within others, `state.0.weight.exp_avg`, as
            distributed checkpoints have it; `optimizer.state_dict()` of a torch optimizer that was made of
            `module.named_parameters()`, also in groups with names of their own, or of `module.parameters()` in one
            group, whose order is that of the tree; or checkpoints, dicts and lists that hold these. With them a tuple
            comes back. They are sliced and no more: no bias in them takes a constant, which is right for moments. An
            average of weights has its own entries where a channel is dead today, and is another network without them:
            begin it anew from the smaller parameters.
        round_to: Numbers of channels stay multiples of this one, for hardware that likes them; dead channels fill
            them up. By default what `channel_groups` was told, else 1.
        names: The names of the parameters of a torch optimizer, in the order in which its groups have them, where its
            state does not say them: `[known[w] for group in optimizer.param_groups for w in group["params"]]` with
            `known = {w: name for name, w in module.named_parameters()}`.

    Raises:
        TypeError: A state is an optimizer or a module, and not the tree of its tensors.
        ValueError: A leaf has not the groups that its family has, a state has a leaf of whose shape it is not known
            which entries go with those of its parameter (means of rows and columns of `row_var`, `col_var` and of SM3
            are; those of `scale_by_factored_rms` have to begin anew), or a state of a torch optimizer does not say
            which parameters it is for: it has no names, and several groups or another number of parameters than the
            tree.

    Warns:
        UserWarning: A state has no leaf that is like a parameter. Nothing is taken out, with how near to zero the
            smallest group is and what keeps groups that are zero otherwise; or all groups of a family are dead that
            everything goes through.

    Example:
        >>> params = {"0.weight": torch.tensor([[0.0], [3.0]]), "2.weight": torch.tensor([[1.0, 2.0]])}
        >>> families = {"0.weight": 0, "2.weight": Along(1, penalized=False)}
        >>> remove_dead(params, families)
        {'0.weight': tensor([[3.]]), '2.weight': tensor([[2.]])}
        >>> state = trace(0.9).init(params)
        >>> params, state = remove_dead(params, families, state)
        >>> state
        TraceState(trace={'0.weight': tensor([[0.]]), '2.weight': tensor([[0.]])})

        Where the first channel is 0.5 when it is dead, as after a sigmoid, the bias takes 0.5 * 4:

        >>> params = {"w": torch.tensor([[0.0], [3.0]]), "read": torch.tensor([[4.0, 2.0]]), "b": torch.tensor([1.0])}
        >>> remove_dead(params, {"w": 0, "read": Along(1, penalized=False, constant=0.5, bias="b")})
        {'w': tensor([[3.]]), 'read': tensor([[2.]]), 'b': tensor([3.])}
    """
    multiple = whole_number("round_to", getattr(groups, "round_to", 1) if round_to is None else round_to)
    for state in states:
        _check_holds_tensors(state)
    if names is not None and not any([_of_torch_in(state) for state in states]):
        raise ValueError("names has no effect without the state_dict of a torch optimizer; give both, or neither")
    paths = tree_paths(params)
    leaves, rebuild = flatten(gathered(params))
    places, least = places_of(groups, params), getattr(groups, "least", [])
    least = least if len(least) == len(places) else [1] * len(places)
    families = [_Family(i, each, _used(leaves, each), least[i]) for i, each in enumerate(places)]
    families = [family for family in families if len(family.used)]  # Penalized leaves may not be here.
    if (problem := _problem(paths, leaves, families, groups, multiple)) is not None:
        warn_user(problem)
    staying = [
        (family.places, _staying(family.used.any(0), family.places, multiple, family.least)) for family in families
    ]
    made, cuts = _without(paths, leaves, staying)
    by_name = {paths[leaf]: cut for leaf, cut in cuts.items()}
    smaller = rebuild(made)
    if not states:
        return smaller
    shapes = {name: leaf.shape for name, leaf in zip(paths, leaves, strict=True)}
    order = None if names is None else list(names)
    of_torch = lambda state: _cut_torch_state(state, by_name, shapes, order or _names_in(state, params, shapes))
    return smaller, *[_cut_state(state, by_name, shapes, of_torch) for state in states]


class _Family(NamedTuple):
    """A family of groups, and what is left of it."""

    number: int
    places: list[Place]
    used: Tensor  # For each penalized leaf and each group whether an entry is not zero.
    least: int  # How many groups stay, whatever is dead.

    def staying(self, multiple: int) -> Tensor:
        """Which groups stay."""
        return _staying(self.used.any(0), self.places, multiple, self.least)


class Alive(NamedTuple):
    """How many groups a family has, and how many of them are not zero."""

    total: int
    left: int


def count_alive(params: Params, groups: Groups) -> list[Alive]:
    """For each family how many groups there are, and in how many of them a penalized entry is not zero."""
    leaves = flatten(gathered(params))[0]
    used = [_used(leaves, family) for family in places_of(groups, params)]
    return [Alive(each.shape[1], int(each.any(0).sum())) for each in used]


def _used(leaves: list[Tensor], family: list[Place]) -> Tensor:
    """For each penalized leaf of a family and each group whether an entry is not zero."""
    marks = [(gather(leaves[leaf], along) != 0).any(1).cpu() for leaf, along in family if along.penalized]
    return torch.stack(marks) if marks else torch.zeros(0, 0, dtype=torch.bool, device="cpu")


def without(
    params: dict[str, Tensor], families: Sequence[Family], left: Sequence[int], round_to: int
) -> dict[str, Tensor]:
    """Leaves by their names with only some groups of each family, whatever is in them.

    Args:
        params: The leaves.
        families: The families.
        left: How many groups of each stay, at least.
        round_to: Numbers of channels stay multiples of this one.
    """
    names, (leaves, rebuild) = tree_paths(params), flatten(params)
    staying: list[tuple[list[Place], Tensor]] = []
    for places, count in zip(places_of(families, params), left, strict=True):
        leaf, along = places[0]
        alive = torch.arange(count_of(leaves[leaf], along), device="cpu") < count
        staying.append((places, _staying(alive, places, round_to)))
    return rebuild(_without(names, leaves, staying)[0])


def _without(
    names: list[str], leaves: list[Tensor], families: Sequence[tuple[list[Place], Tensor]]
) -> tuple[list[Tensor], dict[int, _Cut]]:
    """Leaves with only those groups of each family that stay, and what was cut of which."""
    cuts: dict[int, _Cut] = {}
    biases: dict[int, Tensor] = {}
    for places, alive in families:
        for leaf, along in places:
            if along.bias is not None:
                _fold(names, leaves, leaf, along, alive, biases)
            kept = cuts.setdefault(leaf, _Cut(leaves[leaf].shape, {})).kept
            dim = along.dim % leaves[leaf].ndim
            stays = within(alive, leaves[leaf], along)
            kept[dim] = kept[dim] & stays if dim in kept else stays
    folded = [biases.get(i, leaf) for i, leaf in enumerate(leaves)]
    return [_cut(leaf, cuts[i]) if i in cuts else leaf for i, leaf in enumerate(folded)], cuts


def _staying(alive: Tensor, family: list[Place], multiple: int, least: int = 1) -> Tensor:
    """Which groups of a family stay: those that are alive, at least one or more, and dead ones up to a multiple."""
    first = next(along for _, along in family if along.penalized)
    share = multiple // gcd(multiple, first.size if first.entries is None else len(first.entries[0]))
    wanted = min(len(alive), max(least, -(-int(alive.sum()) // share) * share))
    spare = (~alive).nonzero()[:, 0]
    alive[spare[: wanted - int(alive.sum())]] = True
    return alive


# What a user would not see


def _problem(names: list[str], leaves: list[Tensor], families: list[_Family], groups: Any, multiple: int) -> str | None:
    """What to warn of: nothing goes, or so much that the network gives the same at every input."""
    total = sum([family.used.shape[1] for family in families])
    dead = sum([int((~family.used.any(0)).sum()) for family in families])
    if families and not dead:
        return (
            f"remove_dead found no dead group, and takes nothing out: in each of the {total} groups some penalized "
            f"entry is not zero. {_nearest(names, leaves, families)} Exact zeros come from the proximal step of the "
            "penalty, regularize(optimizer, coupled(group_lasso, groups), strength=...) or an optimizer such as "
            "prox_adam, and not from a term in the loss; and the strength has to be great enough"
        )
    if dead and all(
        [bool(_staying(family.used.any(0), family.places, multiple, family.least).all()) for family in families]
    ):
        rounded = f"numbers of channels are multiples of round_to={multiple}, or " if multiple > 1 else ""
        return (
            f"remove_dead takes nothing out: {dead} of {total} groups are dead, and all of them stay, so that {rounded}"
            "one of each family is left"
        )
    necks: list[bool] = getattr(groups, "necks", [])
    necks = necks if necks and len(necks) == len(groups) else []  # Families may have come or gone since it was made.
    gone = [family for family in families if not family.used.any()]
    if len(gone) < len(families):
        gone = [family for family in gone if not necks or necks[family.number]]
    if not gone:
        return None
    which = listed([f"{_title(names, family)} ({family.used.shape[1]} groups)" for family in gone])
    end = "The network gives the same at every input"
    if not necks:
        end = "Unless something goes around it, the network gives the same at every input"
    elif not any([necks[family.number] for family in gone]):
        end = "Of the network there is left what goes around all groups"
    return (
        f"all groups are dead in the family of {which}, of which one stays. {end}: is the strength too great, or "
        "training with it too long?"
    )


def _title(names: list[str], family: _Family) -> str:
    """The first penalized leaf of a family."""
    return f"'{next(names[leaf] for leaf, along in family.places if along.penalized)}'"


def _nearest(names: list[str], leaves: list[Tensor], families: list[_Family]) -> str:
    """What keeps groups that are mostly zero, or else how small the smallest group is."""
    mostly: list[tuple[int, str]] = []
    norms: list[tuple[float, float, str]] = []
    for family in families:
        penalized = [place for place in family.places if place.along.penalized]
        parts = [gather(leaves[leaf].detach(), along) for leaf, along in penalized]
        sizes = torch.tensor([[part.shape[1]] for part in parts], device="cpu")
        empty = 2 * (family.used * sizes).sum(0) < sizes.sum()
        left = [names[leaf] for (leaf, _), used in zip(penalized, family.used[:, empty].any(1), strict=True) if used]
        mostly.append((int(empty.sum()), f"of {_title(names, family)} all is zero but {listed(map(repr, left))}"))
        norm = torch.stack([part.abs().float().square().sum(1).cpu() for part in parts]).sum(0).sqrt()
        norms.append((float(norm.min()), float(norm.max()), f"{_title(names, family)}, number {int(norm.argmin())}"))
    count, what = max(mostly)
    if count:
        return f"In {count} groups of the family {what}. Does a mask leave that out, or has it another optimizer?"
    (least, _, where), greatest = min(norms), max([norm for _, norm, _ in norms])
    return f"The nearest to zero is in the family of {where}, of norm {least:.2g}; the greatest is {greatest:.2g}."


def _fold(
    names: list[str], leaves: list[Tensor], leaf: int, along: Along, alive: Tensor, biases: dict[int, Tensor]
) -> None:
    """Add what dead channels give to the outputs of a layer to its bias."""
    w, dim = leaves[leaf], along.dim % leaves[leaf].ndim
    if along.bias not in names or dim > 1 or w.ndim < 2:
        raise ValueError(
            f"at leaf '{names[leaf]}': groups has {along}; expected a bias among the leaves {listed(names)}, and a "
            f"weight whose first dimensions are inputs and outputs. It is of shape {tuple(w.shape)}"
        )
    number = names.index(along.bias)
    bias = biases.get(number, leaves[number])
    gone = (~within(alive, w, along)).nonzero()[:, 0].to(w.device)
    given = (
        w.index_select(dim, gone)
        .movedim(1 - dim, 0)
        .flatten(1)
        .sum(1, dtype=torch.promote_types(w.dtype, torch.float32))
    )
    if bias.shape != given.shape:
        raise ValueError(
            f"leaf '{along.bias}' of shape {tuple(bias.shape)} is to take the constants that '{names[leaf]}' of shape "
            f"{tuple(w.shape)} reads; expected {len(given)} entries"
        )
    biases[number] = (bias + along.constant * given).to(bias.dtype)


#: How tensors of so many dimensions may lie in memory with channels last.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _cut(leaf: Tensor, cut: _Cut) -> Tensor:
    """What stays of a leaf, with channels last in memory if it has them so."""
    made = leaf
    for dim, kept in cut.kept.items():
        made = made.index_select(dim, kept.nonzero()[:, 0].to(leaf.device))
    last = _CHANNELS_LAST.get(leaf.ndim)
    if last is not None and not leaf.is_contiguous() and leaf.is_contiguous(memory_format=last):
        return made.contiguous(memory_format=last)
    return made


# States


class _Hidden:
    """A leaf of a tree, whatever it holds."""

    def __init__(self, made: Any) -> None:
        self.made = made


def _check_holds_tensors(state: Any) -> None:
    """Raise an error for an object where its tensors are expected, also inside a checkpoint."""
    if isinstance(state, nn.Module):
        tree = "with_buffers(average)" if isinstance(state, AveragedModel) else "with_buffers(module)"
        raise TypeError(f"a state is the module {type(state).__name__}; expected the tree of its tensors, {tree}")
    if isinstance(state, Optimizer):
        raise TypeError(
            f"a state is the optimizer {type(state).__name__}; expected its tensors, optimizer.state_dict()"
        )
    for inner in _inside(state):
        _check_holds_tensors(inner)


def _inside(state: Any) -> Iterable[Any]:
    """What a container holds; nothing for anything else."""
    return state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()


def _of_torch_in(state: Any) -> bool:
    """Whether a state is of a torch optimizer, or has one in it."""
    return _is_of_torch(state) or any([_of_torch_in(each) for each in _inside(state)])


def _with_sliced(state: Any, of_torch: Callable[[Any], Any]) -> Any:
    """A state in which what is of torch optimizers is sliced, and hidden."""
    if _is_of_torch(state):
        return _Hidden(of_torch(state))
    return _rebuilt(state, lambda inner: _with_sliced(inner, of_torch)) if _of_torch_in(state) else state


def _shown(state: Any) -> Any:
    """The same with what was hidden."""
    return state.made if isinstance(state, _Hidden) else _rebuilt(state, _shown)


def _rebuilt(state: Any, each: Callable[[Any], Any]) -> Any:
    """A container with something else for what is in it; anything else as it is."""
    if isinstance(state, dict):
        made = copy.copy(state)
        made.update({key: each(inner) for key, inner in state.items()})
        return made
    if isinstance(state, (list, tuple)):
        made = [each(inner) for inner in state]
        return type(state)(*made) if hasattr(state, "_fields") else type(state)(made)
    return state


def _cut_state(state: Any, cuts: dict[str, _Cut], shapes: dict[str, torch.Size], of_torch: Callable[[Any], Any]) -> Any:
    """A state whose leaves that are like parameters are sliced as these are, and what is of torch optimizers in it."""
    if _is_of_torch(state):
        return of_torch(state)
    if _of_torch_in(state):
        return _shown(_cut_leaves(_with_sliced(state, of_torch), cuts, shapes))
    return _cut_leaves(state, cuts, shapes)


def _cut_leaves(state: Any, cuts: dict[str, _Cut], shapes: dict[str, torch.Size]) -> Any:
    leaves, rebuild = flatten(state)
    plain = dict(zip(without_wrappers(tuple(shapes)), shapes, strict=True))
    paths, made, known = tree_paths(state), [], any([isinstance(leaf, _Hidden) for leaf in leaves])
    for path, short, leaf in zip(paths, without_wrappers(tuple(paths)), leaves, strict=True):
        name, along = next((plain[end] for end in _ends(short) if end in plain), None), None
        if name is None and isinstance(leaf, Tensor):  # Named as `state.0.weight.exp_avg`.
            inner = [plain[part] for part in _beginnings(short) if part in plain]
            name = next((name for name in inner if _fits(leaf.shape, shapes[name])), None)
            if name is None and inner:
                along = _dimension_of(short, leaf, shapes[inner[0]])
                name = None if along is None else inner[0]
        known = known or name is not None
        made.append(leaf if name is None else _cut_like(leaf, path, name, cuts, shapes, along))
    if not known:
        _say_unknown(paths, leaves, shapes)
    return rebuild(made)


def _say_unknown(paths: list[str], leaves: list[Any], shapes: dict[str, torch.Size]) -> None:
    """Warn of a state in which no leaf is like a parameter, but for one of counters and settings alone."""
    found = [path for path, leaf in zip(paths, leaves, strict=True) if isinstance(leaf, Tensor) and leaf.numel() > 1]
    if found:
        warn_user(
            f"remove_dead leaves a state as it is, for no name in it is that of a leaf of the tree: it has "
            f"{listed(map(repr, found))}, and the tree {listed(map(repr, shapes))}. Expected a tree in which names of "
            "parameters are names, or ends or parts of them, or the state_dict() of a torch optimizer."
        )


def _dimension_of(path: str, leaf: Tensor, shape: torch.Size) -> int | None:
    """The dimension of a parameter along which a vector has a number for each entry, if its name says it, as in SM3."""
    number = path.rpartition(".")[2]
    dim = int(number) if number.isdecimal() else len(shape)
    return dim if leaf.shape == shape[dim : dim + 1] and dim < len(shape) else None


def _fits(shape: torch.Size, whole: torch.Size) -> bool:
    """Whether a shape is that of a parameter, of which dimensions may be one entry long."""
    return len(shape) == len(whole) and all([n in (1, m) for n, m in zip(shape, whole, strict=True)])


def _ends(path: str) -> Iterator[str]:
    """A dotted path, and what is left of it without its first parts."""
    yield path
    while path:
        _, _, path = path.partition(".")
        yield path


def _beginnings(path: str) -> Iterator[str]:
    """What is left of a dotted path without its last parts, and of that without its first ones."""
    while path := path.rpartition(".")[0]:
        yield from filter(None, _ends(path))


def _cut_like(
    leaf: Any,
    path: str,
    name: str,
    cuts: dict[str, _Cut],
    shapes: dict[str, torch.Size],
    along: int | None = None,
) -> Any:
    """A leaf of a state, sliced as its parameter is; a number that belongs to the whole parameter stays.

    Args:
        leaf: The leaf.
        path: Its name in the state.
        name: The name of its parameter.
        cuts: What stays of the parameters that are sliced.
        shapes: The shapes of all.
        along: The dimension of the parameter that is the only one of the leaf, where that is known.
    """
    if not isinstance(leaf, Tensor) or (leaf.numel() == 1 and leaf.shape != shapes[name]):
        return leaf
    dims = _dimensions(leaf.shape, shapes[name]) if along is None else {along: 0}
    if name in cuts and {"v_row", "v_col"} & {*path.replace(" ", ".").split(".")}:
        dims = None  # Which dimensions are factored depends on their sizes, so that others may be afterwards.
    if dims is None:
        raise ValueError(
            f"a state has the leaf '{path}' of shape {tuple(leaf.shape)}, and '{name}' is of shape "
            f"{tuple(shapes[name])}; expected the same, or one in which it shows which dimensions are left out, for it "
            "to be sliced. Is it a state of these parameters, not yet made smaller? If it is, leave it out, and begin "
            "this moment anew: init of the smaller parameters, or an optimizer without a loaded state."
        )
    if name not in cuts:
        return leaf
    kept = {dims[dim]: kept for dim, kept in cuts[name].kept.items() if dim in dims}
    return _cut(whole(leaf), _Cut(leaf.shape, kept))


def _dimensions(shape: torch.Size, whole: torch.Size) -> dict[int, int] | None:
    """The dimensions of a parameter that a moment has, and which of its own these are; None if that is in doubt."""
    if _fits(shape, whole):
        return {dim: dim for dim, (n, m) in enumerate(zip(shape, whole, strict=True)) if n == m}
    found = [dims for dims in combinations(range(len(whole)), len(shape)) if [whole[dim] for dim in dims] == [*shape]]
    return {dim: i for i, dim in enumerate(found[0])} if len(found) == 1 else None


# States of torch's optimizers


def _is_of_torch(state: Any) -> bool:
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        return False
    groups = state.get("param_groups")
    return isinstance(groups, list) and all([isinstance(group, dict) and "params" in group for group in groups])


def _numbers(state: dict[str, Any]) -> list[Any]:
    """What a state dict calls its parameters: numbers, or names in those of distributed checkpoints."""
    return [number for group in state["param_groups"] for number in group["params"]]


def _names_in(state: dict[str, Any], params: Params, shapes: dict[str, torch.Size]) -> list[str]:
    """The names of the parameters of a state dict that says them, or whose order can only be that of the tree."""
    numbers = _numbers(state)
    named = [name for group in state["param_groups"] for name in group.get("param_names") or ()]
    if len(named) == len(numbers):
        return named
    if all([isinstance(number, str) for number in numbers]):
        return numbers
    order = _parameters_in_order(params)
    if len(state["param_groups"]) > 1 or order is None or len(order) != len(numbers):
        which = listed(shapes if order is None else order)
        raise ValueError(
            f"the state of an optimizer is for {len(numbers)} parameters in {len(state['param_groups'])} groups, and "
            f"does not say their names; the tree has the parameters {which}. Only of one group that was made of all "
            "of them, as module.parameters() in the order of with_buffers(module), are the names known. Make the "
            "optimizer of module.named_parameters(), or its groups of lists of (name, parameter), or give names=, "
            "the names in the order of its groups."
        )
    return order


def _parameters_in_order(params: Params) -> list[str] | None:
    """The names of the parameters of a tree in the order that it has them, or None where only a sorted one is known."""
    if isinstance(params, (list, tuple)) and all([isinstance(leaf, Tensor) for leaf in params]):
        return tree_paths(params)
    if not isinstance(params, dict) or not all([isinstance(leaf, Tensor) for leaf in params.values()]):
        return None
    return [name for name, leaf in params.items() if not _is_buffer(name, leaf)]


def _is_buffer(name: str, leaf: Tensor) -> bool:
    """Whether a leaf is a buffer, as `with_buffers` marks it, or by what a `state_dict` calls it."""
    own = name.rpartition(".")[2]
    counts = not (leaf.is_floating_point() or leaf.is_complex())
    return isinstance(leaf, nn.Buffer) or counts or own in ("running_mean", "running_var")


def _cut_torch_state(
    state: dict[str, Any], cuts: dict[str, _Cut], shapes: dict[str, torch.Size], named: list[str]
) -> dict[str, Any]:
    """The state dict of a torch optimizer, whose parameters have these names."""
    numbers, named = _numbers(state), list(matched(tuple(named), tuple(shapes)))
    unknown = [name for name in named if name not in shapes]
    if len(named) != len(numbers) or unknown:
        raise ValueError(
            f"the state of an optimizer is for {len(numbers)} parameters, {listed(named)}, and the tree has the leaves "
            f"{listed(shapes)}; expected it of the same ones. Make the optimizer from module.named_parameters()."
        )
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise ValueError(
            f"the state of an optimizer has two parameters that are called '{twice}', as of two modules; expected "
            "each name once. Give names=, or the optimizer other names."
        )
    names = dict(zip(numbers, named, strict=True))

    def sliced(name: str, path: str, key: Any, x: Any) -> Any:
        along = _dimension_of(f"{name}.{key}", x, shapes[name]) if isinstance(x, Tensor) else None
        return _cut_like(x, f"{path} ('{name}')", name, cuts, shapes, along)

    own = lambda x: x.clone() if isinstance(x, Tensor) else x  # torch's optimizers write into what they are given.
    made = {
        number: {key: own(sliced(names[number], f"{number}.{key}", key, x)) for key, x in entries.items()}
        for number, entries in state["state"].items()
    }
    return {**state, "state": made}
