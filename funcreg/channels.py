"""The channels of any network: traced on example inputs, and offered as families where they can go without a trace."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funcreg._typing import Params
from funcreg.atoms import UNKNOWN
from funcreg.coupled import sequence_groups
from funcreg.families import Along, Family, Where
from funcreg.flow import Flow, Fold
from funcreg.layers import PIXELS, rule_of
from funcreg.masks import listed
from funcreg.ranges import flags
from funcreg.removal import count_alive
from funcreg.resizing import check_copied
from funcreg.sharding import check_whole_module
from funcreg.steadiness import unsteady
from funcreg.tracing import record
from funcreg.trying import Trial, refused
from funcreg.widths import Heads, Rule, heads_before, packs_unequally
from funcreg.wording import type_of
from funcreg.wrapping import inner_module, without_wrappers


class ChannelGroups(list[Family]):
    """Families of groups, with what is known of them: a list that prints as a table, and explains itself.

    `channel_groups` makes it of a network. The table says for each family which layers give its channels, how many
    groups there are, and how many parameters go with each of them.

    Args:
        families: The families, dicts from names of leaves to where groups lie in them.
        counts: The number of groups of each family.
        sizes: The number of parameters that a group carries, also those that are not penalized.
        layers: The layers whose outputs they are, for each family.
        kept: Why other dimensions of parameters are kept: their places by the reason.
        round_to: What numbers of channels stay multiples of in `remove_dead`.
        necks: For each family whether outputs are the same at every input once all of its groups are dead.
        notes: What will be seen at the end alone, when the network is made smaller.
        least: How many groups of each family `remove_dead` leaves at least, one where none are given.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 6))
        >>> net = torch.nn.Sequential(*net, torch.nn.ReLU(), torch.nn.Linear(6, 1))
        >>> groups = channel_groups(net, (torch.ones(1, 2),))
        >>> groups
        channels of  groups  parameters each
        2                 6                6
        >>> print(groups.explain())  # doctest: +ELLIPSIS
        6 groups in 1 family:
        ...
        - normalized over channels (native_layer_norm, '1'):
            0.weight, dimension 0 of 4
        ...
    """

    def __init__(
        self,
        families: Iterable[Family] = (),
        counts: Sequence[int] = (),
        sizes: Sequence[int] = (),
        layers: Sequence[tuple[str, ...]] = (),
        kept: dict[str, list[str]] | None = None,
        round_to: int = 1,
        necks: Sequence[bool] = (),
        notes: Sequence[str] = (),
        least: Sequence[int] = (),
    ) -> None:
        super().__init__(families)
        self.counts, self.sizes, self.layers = list(counts), list(sizes), list(layers)
        self.kept = dict(kept or {})
        self.round_to, self.necks, self.notes, self.least = round_to, list(necks), list(notes), list(least)

    def __repr__(self) -> str:
        if len(self.counts) != len(self):
            return super().__repr__()
        rows = _rows([_shortened(layers) for layers in self.layers], self.counts, self.sizes)
        head = ("channels of", "groups", "parameters each")
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            f"{name:<{widths[0]}}  {count:>{widths[1]}}  {size:>{widths[2]}}" for name, count, size in (head, *rows)
        ]
        return "\n".join(lines)

    def left(self, params: Params) -> list[int]:
        """How many groups of each family are not zero, to be watched while a network is trained.

        Args:
            params: Tree of its parameters, also with buffers.

        Example:
            >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 1))
            >>> groups = channel_groups(net, (torch.ones(1, 2),))
            >>> with torch.no_grad():
            ...     for w in (net[0].weight[0], net[0].bias[0], net[1].weight[:, 0]):
            ...         w.zero_()
            >>> groups.left(with_buffers(net))
            [3]
        """
        return [alive.left for alive in count_alive(params, self)]

    def explain(self) -> str:
        """Which channels there are, and why the others are kept."""
        families = "1 family" if len(self) == 1 else f"{len(self)} families"
        lines = [f"{sum(self.counts)} groups in {families}:", repr(self)]
        if self.kept:
            lines += ["", "Kept:"]
        for reason, places in _alike(self.kept).items():
            lines += [f"- {reason}:", *[f"    {place}" for place in places]]
        if self.notes:
            lines += ["", *dict.fromkeys(_patterns(self.notes).values())]
        return _Text("\n".join(lines))


def _rows(names: Sequence[str], counts: Sequence[int], sizes: Sequence[int]) -> list[tuple[str, str, str]]:
    """The rows of a table of families, one for those of numbered layers that are alike."""
    alike: dict[tuple[str, int, int], list[str]] = {}
    for name, count, size in zip(names, counts, sizes, strict=True):
        alike.setdefault((_NUMBER.sub("*", name), count, size), []).append(name)
    rows: list[tuple[str, str, str]] = []
    for (_, count, size), here in alike.items():
        labels = here if len(here) < _MANY else [f"{_pattern(here)} ({len(here)} families)"]
        rows += [(label, f"{count}", f"{size:,}") for label in labels]
    return rows


def _alike(kept: dict[str, list[str]]) -> dict[str, list[str]]:
    """Places by the reason why they are kept, those of numbered layers that are alike in one line."""
    patterns, found = _patterns(kept), {}
    for reason, places in kept.items():
        found.setdefault(patterns[reason], []).extend(places)
    return {reason: list(dict.fromkeys(_patterns(places).values())) for reason, places in found.items()}


#: How many numbered layers that are alike stand in one line.
_MANY = 3
#: The number of a layer in a name.
_NUMBER = re.compile(r"(?<![^.'\s])(\d+)(?=[.',]|$)")


def _patterns(texts: Iterable[str]) -> dict[str, str]:
    """For each text one that stands for all that are like it but for the numbers of layers."""
    alike: dict[str, list[str]] = {}
    for text in texts:
        alike.setdefault(_NUMBER.sub("*", text), []).append(text)
    return {text: text if len(here) < _MANY else _pattern(here) for here in alike.values() for text in here}


def _pattern(texts: Sequence[str]) -> str:
    """Texts about numbered layers as one, with a star for the numbers in which they differ."""
    columns = zip(*[_NUMBER.split(text) for text in texts], strict=True)
    return "".join([column[0] if len(set(column)) == 1 else "*" for column in columns])


def _shortened(names: Sequence[str]) -> str:
    names = [name or "the module itself" for name in names]
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


class _Text(str):
    """Text that shows itself as it reads."""

    __slots__ = ()
    __repr__ = str.__str__


class _Slot(NamedTuple):
    """The entries of a dimension of a leaf that belong to the groups of a family."""

    name: str
    dim: int
    rows: Tensor  # The entries of each group.
    writes: bool  # Whether what is computed has the channel because of them.
    reads: bool  # Whether sums run over them.
    fold: Fold | None = None  # What they read from a dead channel, if it is not 0.


#: Why channels cannot go unless what reads them is zero, by what else could be done; under None if nothing can.
_Demands: TypeAlias = dict[Fold | None, str]


def channel_groups(
    module: nn.Module,
    example_inputs: Any = None,
    *,
    prefix: str = "",
    layers: Sequence[str] | None = None,
    types: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
    round_to: int = 1,
    rules: Mapping[type[nn.Module], Rule] | None = None,
    inside_heads: bool = False,
) -> list[Family]:
    """The channels of a network that can go without another output, as families of groups for `coupled`.

    The module runs once on the example inputs, and channels are followed through all that it does: layers of any kind,
    residual sums, gates, concatenations, splits and views, attention, whose heads go whole unless features inside them
    are asked for, and recurrent layers, whose hidden units go from all gates, layers and directions, if they begin with
    zeros. A channel has its filter and bias, in all layers whose outputs are summed, and the scale and shift of a
    normalization after them: once all of these are zero it is zero at every input, whatever the layers that read it, so
    that it can be taken out (`remove_dead`, `resized`). The slices of layers that read it have a part in its norm, too,
    if the outputs of these do not form groups. Where they do, the slice is not penalized a second time, because groups
    that overlap have no exact proximal operator; it goes when the channel does, with the running statistics. A dead
    channel that is another constant there, 0.5 after a sigmoid, goes too if the bias of the layer that reads it can
    take what it gives (`Along.constant`): not so in a convolution that pads with zeros, or one without a bias, or where
    it is another number on inputs of other sizes or values, with other numbers as arguments, or in training.

    The families are tried out before they are offered: some of their groups are set to zero and taken out by the code
    of `remove_dead` and `resized`, in a copy with weights that are drawn, and outputs have to be the same, on inputs of
    a few other sizes, too, that the network takes. Where they are not, because the forward holds a width or a count as
    a number that nothing tells, the families are kept, and `explain()` names the module, what it holds, and the remedy.
    Where a network takes more than 2 GiB, or draws random numbers in evaluation, it has to run and no more, and
    `explain()` says so.

    Only what is exact is offered. Channels that a `LayerNorm` averages over, that a softmax runs over, that would be
    a constant which no bias takes where they are dead, or that reach an operation that cannot be followed are kept;
    `groups.explain()` says which and why. What else the forward pass does on other inputs is not seen.

    Parameters that are frozen have no part in a norm, for no training makes them zero: unless they are zero, channels
    that they give are kept where what reads them is not penalized. It is otherwise where all parameters are frozen, as
    of a network that is trained no more, and for layers that `layers` has by their names. What is frozen or set free
    after that is not seen.

    Args:
        module: A module; of one that torch.compile or data parallel wraps the module inside, by whose names families
            are called. Without example inputs it has to be `torch.nn.Sequential`, also nested, of linear layers,
            convolutions, `BatchNorm`, pooling, dropout, `Flatten`, and activations that take 0 to 0.
        example_inputs: What the module is called with: a tensor, a tuple of arguments, a dict of keyword arguments, or
            a tuple of such a tuple and such a dict. A small batch will do.
        prefix: Name of the module inside the one whose parameters are penalized, such as `"features"`.
        layers: Names of the layers whose outputs form groups, with example inputs also patterns such as
            `"*.mlp.*"`; by default all. With every second layer each norm is of all that belongs to a channel.
        types: Types of layers whose outputs form groups, such as `torch.nn.Conv2d`; by default all.
        round_to: Numbers of channels stay multiples of this one in `remove_dead`.
        rules: For types of modules with numbers of their own what sets these, as `resized` takes them.
        inside_heads: Whether features inside the heads of attention form groups, in place of whole heads. A feature
            goes from all heads of a layer at once, for these have one width: of values alone where the code leaves
            their width free, of queries and keys together where the scale of scores is a number of its own, and of all
            three where they share one width. Give `resized` the same option.

    Raises:
        ValueError: No channels can go; the module fails on the example inputs; without them, channels cannot be
            followed through a layer; or `layers`, `types` or `rules` names what is not there, or has no channels that
            could go; or `inside_heads` is given for a network without attention.

    Example:
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 10)
        ... )
        >>> channel_groups(net)
        [{'0.weight': 0, '0.bias': 0, '3.weight': Along(1, size=36)}]
        >>> deep = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        >>> channel_groups(deep, layers=["0"])
        [{'0.weight': 0, '0.bias': 0, '1.weight': 1}]

        Of any module, on example inputs:

        >>> block = torch.nn.TransformerEncoderLayer(16, nhead=4, dim_feedforward=32)
        >>> groups = channel_groups(block, (torch.ones(3, 1, 16),))
        >>> groups
        channels of  groups  parameters each
        self_attn         4              268
        linear1          32               33
        >>> groups[0]["self_attn.in_proj_weight"]
        Along(0, size=4, packed=3)

    References:
        Fang, Ma, Song, Mi & Wang, *DepGraph: towards any structural pruning*, 2023.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is {type_of(module)}; expected torch.nn.Sequential, or any torch.nn.Module")
    if isinstance(example_inputs, str):  # The name of the part, where the inputs stand now.
        example_inputs, prefix = None, example_inputs
    if not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1:
        raise ValueError(f"round_to is {round_to!r}; expected a whole number of at least 1")
    flags(inside_heads=inside_heads)
    lazy = next((name for name, w in module.named_parameters() if is_lazy(w)), None)
    if lazy is not None:
        raise ValueError(f"'{lazy}' has no shape yet; run the module once on some inputs, which gives it one")
    check_whole_module("channel_groups", module)
    if (inner := inner_module(module)) is not module:
        module, layers = inner, layers if layers is None or isinstance(layers, str) else without_wrappers(tuple(layers))
    if example_inputs is None:
        if rules or inside_heads:
            name = "rules" if rules else "inside_heads"
            raise ValueError(f"{name} has no effect without example_inputs, on which families are tried out; give both")
        families = sequence_groups(module, prefix, layers)
        if types is None and round_to == 1:
            return families
        return _chosen_in_sequence(module, families, prefix, types, round_to)
    check_copied(module, rules)
    frozen = _frozen(module, layers)
    flow = _followed(module, example_inputs, inside_heads, frozen)
    found = _Found(module, flow, [], frozen)
    found = _steady(_narrower(found._replace(families=_families(flow, found.trained(), frozen))), example_inputs)
    _check_some(found)
    if inside_heads and (layers is not None or types is not None):  # What goes together is one family before.
        found, _ = _running(found, example_inputs, rules or {}, round_to, inside_heads)
        _check_some(found)
    some = _chosen(module, found.owners(), layers, types)
    found = found._replace(families=[slots for slots, here in zip(found.families, some, strict=True) if here])
    found, notes = _running(found, example_inputs, rules or {}, round_to, inside_heads)
    if layers is None or len(layers):  # Of no layers there are none.
        _check_some(found)
        _check_layers(found, layers)
    inside = lambda name: f"{prefix}.{name}" if prefix else name
    parameters = dict(module.named_parameters())
    return ChannelGroups(
        found.written(inside),
        [len(slots[0].rows) for slots in found.families],
        [_size(slots, parameters) for slots in found.families],
        [tuple(map(inside, names)) for names in found.owners()],
        {reason: list(map(inside, places)) for reason, places in found.kept().items()},
        round_to,
        () if prefix else found.flow.necks([_sets(found.flow, slots) for slots in found.families]),
        notes,
        found.least,
    )


def _followed(module: nn.Module, inputs: Any, inside_heads: bool, frozen: Mapping[str, float]) -> Flow:
    """The channels of a forward pass; inside heads once these are known from a first pass over what it did."""
    recording, unequal = record(module, inputs), lambda name: _packs_unequally(module, name)
    flow = Flow(recording, rule_of, unequal, None, frozen)
    ends = flow.ends()
    if any([bool(torch.isin(ids, ends).all()) for ids in flow.preferred]):  # For nothing: the others may go.
        flow = Flow(recording, rule_of, unequal, None, frozen, kept=ends)
    if not inside_heads:
        return flow
    if not flow.multiplies:
        raise ValueError(
            f"inside_heads has no effect, because {type(module).__name__} multiplies no two tensors of channels, as "
            "attention does with queries and keys"
        )
    return Flow(recording, rule_of, unequal, flow.heads(), frozen, kept=flow.kept)


def _narrower(found: _Found) -> _Found:
    """The families once convolutions none of whose groups may go keep all of them, each with fewer channels."""
    flow = found.flow
    kept = lambda ids: bool((flow.atoms.closed()[flow.atoms.find(ids)] >= 0).all())
    narrow = {name for name, several in flow.grouped.items() if all([kept(ids) for ids in several])}
    if not narrow:
        return found
    again = Flow(
        flow.recording,
        rule_of,
        lambda name: _packs_unequally(found.module, name),
        flow.inside,
        found.frozen,
        narrow,
        flow.kept,
    )
    return found._replace(flow=again, families=_families(again, found.trained(), found.frozen))


def _frozen(module: nn.Module, layers: Sequence[str] | None) -> dict[str, float]:
    """The parameters that no training makes zero, but those of layers that are named; none if it is of no training.

    With each what its entries are: 0 if they are all zero, else not a number.
    """
    parameters = dict(module.named_parameters())
    if not any([w.requires_grad for w in parameters.values()]):
        return {}
    named = lambda name: name.rpartition(".")[0] in (layers or ())
    fixed = {name: w for name, w in parameters.items() if not w.requires_grad and not named(name)}
    return {name: UNKNOWN if bool(w.to(torch.bool).any()) else 0.0 for name, w in fixed.items()}


def _steady(found: _Found, inputs: Any) -> _Found:
    """The families whose dead channels are the same constants on other inputs, where what reads them stays."""
    module, flow, frozen = found.module, found.flow, found.frozen
    trained, written = found.trained(), _shared(found.families)
    none = torch.zeros(0, dtype=torch.int64)
    stay = [any([_stays(slot, trained, written) for slot in slots]) for slots in found.families]
    families = [_sets(flow, slots) if here else none for slots, here in zip(found.families, stay, strict=True)]
    follow = lambda recording: Flow(
        recording, rule_of, lambda name: _packs_unequally(module, name), flow.inside, frozen, flow.narrow, flow.kept
    )
    return found.closed(unsteady(module, inputs, flow, follow, families))


def _written(families: Iterable[Sequence[_Slot]]) -> set[str]:
    """The leaves that give channels to what is computed."""
    return {slot.name for slots in families for slot in slots if slot.writes}


def _shared(families: Iterable[Sequence[_Slot]]) -> set[str]:
    """The leaves that are in no norm of what they read: they give channels, or read some along several dimensions."""
    families = list(families)
    dims = {(slot.name, slot.dim) for slots in families for slot in slots}
    several = Counter([name for name, _ in dims])
    return _written(families) | {name for name, count in several.items() if count > 1}


def _stays(slot: _Slot, trained: Mapping[str, Any], written: set[str]) -> bool:
    """Whether what reads a channel is as it is once that is dead, because it is not penalized with it."""
    return slot.reads and not slot.writes and (slot.name in written or slot.name not in trained)


class _Found(NamedTuple):
    """Families that were found in a network."""

    module: nn.Module
    flow: Flow
    families: list[list[_Slot]]
    frozen: Mapping[str, float]  # Parameters that no training makes zero.
    least: Sequence[int] = ()  # How many groups of each stay, whatever is dead.

    def trained(self) -> dict[str, Any]:
        """The parameters that training may make zero."""
        return {name: w for name, w in self.module.named_parameters() if name not in self.frozen}

    def owners(self) -> list[tuple[str, ...]]:
        """For each family the layers whose outputs they are."""
        return [
            tuple(dict.fromkeys([slot.name.rpartition(".")[0] for slot in slots if slot.writes]))
            for slots in self.families
        ]

    def written(self, inside: Callable[[str], str] = lambda name: name) -> list[Family]:
        """The families as dicts."""
        leaves = (*self.module.named_parameters(), *self.module.named_buffers())
        shapes, trained = {name: tuple(x.shape) for name, x in leaves}, self.trained()
        families = [_family(slots, self.families, trained, shapes, inside) for slots in self.families]
        return [{inside(name): where for name, where in family.items()} for family in families]

    def multiplied(self) -> list[str | None]:
        """For each family why it may go only if it is tried out, None if it is exact anyhow."""
        return [self.flow.multiplied(_sets(self.flow, slots)) for slots in self.families]

    def is_of_heads(self, family: int) -> bool:
        """Whether the groups of a family are features inside of heads."""
        return bool(torch.isin(_sets(self.flow, self.families[family]), self.of_heads()).all())

    def of_heads(self) -> Tensor:
        """The atoms of features inside of heads."""
        inside, atoms = self.flow.inside, self.flow.atoms
        if inside is None:
            return torch.zeros(0, dtype=torch.int64)
        return atoms.find(inside[inside < len(atoms.parents)])  # Those of no leaf may be of an earlier pass alone.

    def turned(self, reasons: Mapping[int, str]) -> dict[int, str]:
        """Why families are refused, with the sum over them, or the buffer that goes with queries and keys."""
        parameters, multiplied, found = dict(self.module.named_parameters()), self.multiplied(), dict(reasons)
        if self.flow.inside is None:
            return {i: reason if multiplied[i] is None else f"{multiplied[i]}: {reason}" for i, reason in found.items()}
        for i, reason in reasons.items():
            buffers = [slot.name for slot in self.families[i] if slot.name not in parameters]
            if multiplied[i] is not None and buffers:
                found[i] = (
                    f"features of queries and keys are scaled by '{buffers[0]}', or turned by it in pairs as rotary "
                    f"embeddings do, and cannot go with its entries: {reason}"
                )
        return found

    def closed(self, reasons: Mapping[int, str]) -> _Found:
        """The families without some of them, by their numbers, which are kept for these reasons."""
        for i, reason in reasons.items():
            for slot in self.families[i]:
                for dim, first, _ in self.flow.starts[slot.name]:
                    if dim == slot.dim:
                        self.flow.atoms.close(slot.rows.reshape(-1) + first, reason)
        return self._replace(families=[slots for i, slots in enumerate(self.families) if i not in reasons])

    def kept(self) -> dict[str, list[str]]:
        """The dimensions of parameters that are kept, by the reason."""
        return _kept(self.flow)


def _check_some(found: _Found) -> None:
    if not found.families:
        single = [name for name, w in found.module.named_parameters() if w.ndim > 1 and w.shape[0] == 1]
        only = {"they are the only one of their layer, as where all others were dead": single} if single else {}
        raise ValueError(
            f"channel_groups found no channels in {type(found.module).__name__} that could go. Kept are\n"
            f"{_reasons({**found.kept(), **only})}"
        )


def _running(
    found: _Found, inputs: Any, rules: Mapping[type[nn.Module], Rule], round_to: int, inside_heads: bool
) -> tuple[_Found, list[str]]:
    """The families without which the network runs, and notes about what will be seen at the end alone."""
    if not found.families:
        return found, []
    counts = [len(slots[0].rows) for slots in found.families]
    summed = {i: reason for i, reason in enumerate(found.multiplied()) if reason is not None}
    multiplied = [i in summed for i in range(len(counts))]
    trial = Trial(found.module, inputs, found.written(), counts, rules, round_to, inside_heads, multiplied)
    if not trial.agrees(range(len(counts))) and trial.failure is not None:
        return found.closed(summed), [
            "Not tried out, so that resized may refuse what is offered here: with other numbers in its weights "
            f"{type(found.module).__name__} fails {trial.failure}"
        ]
    plain = [i for i, slots in enumerate(found.families) if not any([slot.fold for slot in slots])]
    reasons, together = refused(trial, [] if inside_heads else plain)
    if trial.uncompared is not None:
        why = f"and outputs were not compared, because {trial.uncompared}"
        reasons = {**{i: f"{reason}, {why}" for i, reason in summed.items() if not found.is_of_heads(i)}, **reasons}
    if several := _pairs(found, reasons) if inside_heads else together:
        return _running(_together(found, reasons, several), inputs, rules, round_to, inside_heads)
    two = {owners: why for i, why in trial.needs_two.items() if (owners := found.owners()[i]) and i not in reasons}
    least = [n for i, n in enumerate(trial.least) if i not in reasons]
    found = found.closed(found.turned(reasons))._replace(least=least)
    numbers = sorted({f"{kind.__name__}.{attribute}" for kind, attribute in trial.unsettled})
    notes = [
        f"'{name}', an LSTM, has to keep more hidden units than projections of them (proj_size < hidden_size)"
        for name, layer in found.module.named_modules()
        if isinstance(layer, nn.LSTM) and layer.proj_size and any([name in names for names in found.owners()])
    ]
    notes += [f"At least two channels of {listed(layers)} stay: {why}" for layers, why in two.items()]
    notes += [f"Give resized example_inputs too, to tell what becomes of {', '.join(numbers)}"] if numbers else []
    taken = [i for i in range(len(counts)) if i not in reasons]
    if untold := [f"{kind.__name__}.{attribute}" for kind, attribute in trial.untold(taken)]:
        notes.append(f"Outputs do not tell whether {listed(untold)} changes, on these inputs or on others like them")
    if trial.uncompared is not None:
        notes.append(
            f"Outputs were not compared, because {trial.uncompared}: give resized example_inputs, if that helps"
        )
    if found.flow.unseen:
        notes.append(
            "Some parameters are not used in evaluation, and in training the module fails on example_inputs, so that "
            f"their layers may not fit after: {found.flow.unseen}"
        )
    return found, notes if found.families else []


def _pairs(found: _Found, reasons: Mapping[int, str]) -> list[tuple[int, ...]]:
    """Features of queries and keys, and those of values beside them, that cannot go one without the other.

    A module that holds one width for all three may run without the same number of features of each.
    """
    owners = [{name.rpartition(".")[0] for name in names} for names in found.owners()]
    multiplied, pairs = found.multiplied(), dict[int, int]()
    of_heads = found.of_heads()
    for i in [i for i in reasons if multiplied[i] is not None]:
        for j in [j for j in reasons if multiplied[j] is None and j not in pairs.values()]:
            sets = _sets(found.flow, found.families[j])
            alike = owners[i] == owners[j] and len(sets) == len(found.families[i][0].rows)
            if alike and bool(torch.isin(sets, of_heads).all()):
                pairs[i] = j
                break
    return list(pairs.items())


def _together(found: _Found, reasons: Mapping[int, str], several: Sequence[tuple[int, ...]]) -> _Found:
    """The families once some are one with others, group by group, and the others that were refused are closed."""
    families = list(found.families)
    for i, *others in several:
        slots = {(slot.name, slot.dim): slot for slot in families[i]}
        for j in others:
            found.flow.atoms.join(_sets(found.flow, families[i]), _sets(found.flow, families[j]), "")
            for slot in families[j]:
                same = slots.get((slot.name, slot.dim))
                if same is not None:
                    writes, reads = same.writes or slot.writes, same.reads or slot.reads
                    slot = same._replace(rows=torch.cat([same.rows, slot.rows], 1), writes=writes, reads=reads)
                slots[slot.name, slot.dim] = slot
        families[i] = list(slots.values())
    joined = {i for some in several for i in some}
    found = found.closed(found.turned({i: reason for i, reason in reasons.items() if i not in joined}))
    gone = {*reasons} - {some[0] for some in several}
    return found._replace(families=[slots for i, slots in enumerate(families) if i not in gone])


def _check_layers(found: _Found, layers: Sequence[str] | None) -> None:
    """Raise a ValueError for the first of some layers that does not run without a part of its channels."""
    known = [name for names in found.owners() for name in names]
    for glob in layers or ():
        if not any([fnmatchcase(name, glob) for name in known]):
            raise ValueError(
                f"layers has {glob!r}, whose channels are found and cannot go. Kept are\n{_reasons(found.kept())}"
            )


def _packs_unequally(module: nn.Module, name: str) -> Heads | None:
    layer = module.get_submodule(name)
    if isinstance(layer, nn.MultiheadAttention):  # Of keys that are values it packs queries, and both of the others.
        return Heads(layer.head_dim, layer.num_heads, layer.num_heads)
    heads = heads_before(layer)
    return heads if packs_unequally(layer, heads) else None


def _sets(flow: Flow, slots: list[_Slot]) -> Tensor:
    """The sets of atoms of the groups of a family."""
    name, dim, rows = slots[0][:3]
    first = next(first for here, first, _ in flow.starts[name] if here == dim)
    return flow.atoms.find(rows[:, 0] + first)


def _families(flow: Flow, parameters: dict[str, Any], frozen: Iterable[str]) -> list[list[_Slot]]:
    """The slots of each family of sets of atoms that may go, alike in which leaves they are."""
    roots = flow.atoms.find(flow.atoms.parents)
    free = flow.atoms.closed()[roots] < 0
    read, written = flow.atoms.marked()
    members: dict[int, dict[tuple[str, int], list[int]]] = {}
    uses: dict[tuple[str, int, int], tuple[bool, bool]] = {}
    for name, places in flow.starts.items():
        for dim, first, count in places:
            entries = free[first : first + count].nonzero()[:, 0]
            atoms = entries + first
            columns = (x.tolist() for x in (entries, roots[atoms], read[atoms], written[atoms]))
            for entry, root, is_read, is_written in zip(*columns, strict=True):
                members.setdefault(root, {}).setdefault((name, dim), []).append(entry)
                before = uses.get((name, dim, root), (False, False))
                uses[name, dim, root] = before[0] or is_read, before[1] or is_written
    # Layers that only read a channel do not make it.
    writes = {place for place, use in uses.items() if place[0] in parameters and use != (True, False)}
    demands: dict[int, _Demands] = {}
    for ids, reason, fold in flow.demands:
        for root in flow.atoms.find(ids).unique().tolist():
            demands.setdefault(root, {})[fold] = reason
    alike: dict[tuple[Any, ...], list[int]] = {}
    for root, slots in members.items():
        kind = tuple(
            (slot, len(entries), (*slot, root) in writes, uses[(*slot, root)][0]) for slot, entries in slots.items()
        )
        alike.setdefault((tuple(demands.get(root, ())), kind), []).append(root)
    found: list[tuple[list[_Slot], _Demands]] = []
    for (_, kind), sets in alike.items():
        if len(sets) == 1 or not any([is_written for _, _, is_written, _ in kind]):
            reason = _fixed([name for (name, _), *_ in kind], frozen) or "a single channel of its kind"
            flow.atoms.close(torch.tensor(sets), reason)
            continue
        rows = [torch.tensor([members[root][slot] for root in sets]) for slot, *_ in kind]
        here = demands.get(sets[0], {})
        folds = {(fold.weight, fold.dim): fold for fold in here if fold is not None}
        slots = [
            _Slot(name, dim, own, w, r, folds.get((name, dim)))
            for ((name, dim), _, w, r), own in zip(kind, rows, strict=True)
        ]
        found.append((slots, here))
    return _exact(flow, found, parameters, frozen)


def _exact(
    flow: Flow, found: list[tuple[list[_Slot], _Demands]], parameters: dict[str, Any], frozen: Iterable[str]
) -> list[list[_Slot]]:
    """The families that are exact with families that do not overlap; the others are closed."""
    while True:
        families = [slots for slots, _ in found]
        written = _shared(families)
        for slots, demands in found:
            # Weights that read a channel that is never zero are zero themselves, if they are penalized.
            lacking = [slot for slot in slots if _stays(slot, parameters, written) and slot.fold is None]
            overlap = None if _is_free(slots, families) else "another family has these entries along another dimension"
            refused = overlap or (demands.get(None) if lacking else None)
            if refused is not None and overlap is None:
                refused = _fixed([slot.name for slot in slots if not slot.reads], frozen) or refused
            if refused is not None:
                places = [
                    (first, slot) for slot in slots for dim, first, _ in flow.starts[slot.name] if dim == slot.dim
                ]
                for first, slot in places:
                    flow.atoms.close(slot.rows.reshape(-1) + first, refused)
                found = [each for each in found if each[0] is not slots]
                break
        else:
            return families


def _fixed(names: Iterable[str], frozen: Iterable[str]) -> str | None:
    """Why no training makes channels zero, if one of these leaves that give them is frozen."""
    name = next((name for name in names if name in frozen), None)
    if name is None:
        return None
    return f"'{name}' is frozen (requires_grad=False), so that no training makes it zero; layers= may name its layer"


def _is_free(slots: list[_Slot], found: list[list[_Slot]]) -> bool:
    """Whether no leaf that these write is written along another dimension by a family before, or by this one."""
    for slot in slots:
        if slot.writes:
            for others in found:
                dims = [other.dim for other in others if other.writes and other.name == slot.name]
                if any([dim < slot.dim for dim in dims]):
                    return False
    return True


def _kept(flow: Flow) -> dict[str, list[str]]:
    """The dimensions of parameters that are kept, by the reason."""
    closed, found = flow.atoms.closed(), {}
    for name, places in flow.starts.items():
        for dim, first, count in places:
            reasons = closed[flow.atoms.find(torch.arange(first, first + count))]
            for reason in reasons.unique().tolist():
                if reason >= 0 and not flow.atoms.reasons[reason].startswith(PIXELS):
                    part = (
                        "" if int((reasons == reason).sum()) == count else f" of them {int((reasons == reason).sum())}"
                    )
                    place = f"{name}, dimension {dim} of {count}{part}"
                    found.setdefault(flow.atoms.reasons[reason], []).append(place)
    return found


def _reasons(kept: dict[str, list[str]]) -> str:
    return "\n".join([f"- {reason}: {listed(places)}" for reason, places in _alike(kept).items()])


def _chosen(module: nn.Module, owners: Sequence[Sequence[str]], layers: Any, types: Any) -> list[bool]:
    """Which families are of layers that `layers` and `types` choose."""
    known = [name for names in owners for name in names]
    if layers is not None:
        single = isinstance(layers, str)
        missing = [glob for glob in layers if not any([fnmatchcase(name, glob) for name in known])]
        if single or missing:
            raise ValueError(
                f"layers is {layers!r}; expected names among {listed(map(repr, dict.fromkeys(known)))}, or patterns "
                f"that match some{f', in a list: [{layers!r}]' if single else ''}. groups.explain() says why others "
                "are kept."
            )
    of_type = lambda name: types is None or isinstance(module.get_submodule(name), types)
    named = lambda name: layers is None or any([fnmatchcase(name, glob) for glob in layers])
    chosen = [any([of_type(name) and named(name) for name in names]) for names in owners]
    if types is not None and not any(chosen):
        raise ValueError(
            f"types is {types!r}; expected types among those of {listed(map(repr, dict.fromkeys(known)))}, which are "
            f"{listed(sorted({type(module.get_submodule(name)).__name__ for name in known}))}"
        )
    return chosen


def _chosen_in_sequence(
    module: nn.Module, families: list[Family], prefix: str, types: Any, round_to: int
) -> list[Family]:
    owners = [next(iter(family)).rpartition(".")[0] for family in families]
    inside = [name.removeprefix(f"{prefix}.") if prefix else name for name in owners]
    here = _chosen(module, [[name] for name in inside], None, types)
    return ChannelGroups([family for family, chosen in zip(families, here, strict=True) if chosen], round_to=round_to)


# Families as they are written


def _family(
    slots: list[_Slot],
    found: list[list[_Slot]],
    parameters: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    inside: Callable[[str], str],
) -> Family:
    written, shared = _written(found), _shared(found)
    family: dict[str, list[Along]] = {}
    for slot in sorted(slots, key=lambda slot: not slot.writes):
        penalized = slot.name in parameters and (slot.writes or slot.name not in shared)
        where = along(slot.dim, slot.rows, shapes[slot.name][slot.dim], penalized)
        if slot.fold is not None and not penalized:
            where = where._replace(constant=slot.fold.constant, bias=inside(slot.fold.bias))
        family.setdefault(slot.name, []).append(where)
    order = {name: i for i, name in enumerate(shapes)}
    ordered = sorted(family, key=lambda name: (name not in written, order[name]))
    return {name: _plain(family[name]) for name in ordered}


def _plain(alongs: list[Along]) -> Where:
    made = [each.dim if each == Along(each.dim) else each for each in alongs]
    return made[0] if len(made) == 1 else tuple(made)


def along(dim: int, rows: Tensor, length: int, penalized: bool = True) -> Along:
    """What says where groups lie, from the entries of each of them."""
    count, entries = rows.shape
    first = int(rows.min())
    for packed in [n for n in range(1, entries + 1) if entries % n == 0]:
        size = entries // packed
        expected = torch.arange(first, first + count * entries).reshape(packed, count, size).movedim(1, 0)
        if torch.equal(rows, expected.reshape(count, entries)):
            stop = first + count * entries
            return Along(dim, size, packed, penalized, first, None if stop == length else stop)
    return Along(dim, penalized=penalized, entries=tuple(map(tuple, rows.tolist())))


def _size(slots: list[_Slot], parameters: dict[str, Any]) -> int:
    """The number of parameters that a group carries, one in its row and its column of one leaf once."""
    of: dict[str, dict[int, int]] = {}  # How many entries of each dimension of a leaf go with a group.
    for slot in slots:
        if slot.name in parameters:
            here = of.setdefault(slot.name, {})
            here[slot.dim] = here.get(slot.dim, 0) + slot.rows.shape[1]
    total = 0
    for name, gone in of.items():
        shape = parameters[name].shape
        total += math.prod(shape) - math.prod([n - gone.get(dim, 0) for dim, n in enumerate(shape)])
    return total
