"""The channels of any network: traced on example inputs, and offered as families where they can go without a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from funcreg.core.masks import listed
from funcreg.core.ranges import flags, whole_number
from funcreg.core.sharding import check_whole_module
from funcreg.core.wording import type_of
from funcreg.core.wrapping import inner_module, without_wrappers
from funcreg.networks.atoms import UNKNOWN
from funcreg.networks.blame import refused
from funcreg.networks.channel_families import Found, find
from funcreg.networks.channel_tables import ChannelGroups, alike
from funcreg.networks.coupled import sequence_groups
from funcreg.networks.families import Family
from funcreg.networks.flow import Flow
from funcreg.networks.layers import rule_of
from funcreg.networks.resizing import check_copied
from funcreg.networks.steadiness import unsteady
from funcreg.networks.tracing import record
from funcreg.networks.trying import Trial
from funcreg.networks.widths import Heads, Rule, heads_before, packs_unequally


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
    round_to = whole_number("round_to", round_to)
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
        return _in_sequence(module, prefix, layers, types, round_to)
    check_copied(module, rules)
    frozen = _frozen(module, layers)
    running = lambda found: _running(found, example_inputs, rules or {}, round_to, inside_heads)
    found = _narrower(find(module, _followed(module, example_inputs, inside_heads, frozen), frozen))
    found = _steady(found, example_inputs)
    _check_some(found)
    if inside_heads and (layers is not None or types is not None):  # What goes together is one family before.
        found, _ = running(found)
        _check_some(found)
    found, notes = running(found.chosen(_chosen(module, found.owners(), layers, types)))
    if layers is None or len(layers):  # Of no layers there are none.
        _check_some(found)
        _check_layers(found, layers)
    return _offered(found, prefix, round_to, notes)


def _offered(found: Found, prefix: str, round_to: int, notes: Sequence[str]) -> ChannelGroups:
    inside = lambda name: f"{prefix}.{name}" if prefix else name
    return ChannelGroups(
        found.written(inside),
        found.counts(),
        found.sizes(),
        [tuple(map(inside, names)) for names in found.owners()],
        {reason: list(map(inside, places)) for reason, places in found.kept().items()},
        round_to,
        () if prefix else found.flow.necks([found.sets(i) for i in range(len(found.families))]),
        notes,
        found.least,
    )


def _followed(module: nn.Module, inputs: Any, inside_heads: bool, frozen: Mapping[str, float]) -> Flow:
    """The channels of a forward pass; inside heads once these are known from a first pass over what it did."""
    flow = Flow(record(module, inputs), rule_of, lambda name: _packs_unequally(module, name), frozen=frozen)
    ends = flow.ends()
    if any([bool(torch.isin(ids, ends).all()) for ids in flow.preferred]):  # For nothing: the others may go.
        flow = flow.again(kept=ends)
    if not inside_heads:
        return flow
    if not flow.multiplies:
        raise ValueError(
            f"inside_heads has no effect, because {type(module).__name__} multiplies no two tensors of channels, as "
            "attention does with queries and keys"
        )
    return flow.again(inside=flow.heads())


def _narrower(found: Found) -> Found:
    """The families once convolutions none of whose groups may go keep all of them, each with fewer channels."""
    flow = found.flow
    kept = lambda ids: bool((flow.atoms.closed()[flow.atoms.find(ids)] >= 0).all())
    narrow = {name for name, several in flow.grouped.items() if all([kept(ids) for ids in several])}
    if not narrow:
        return found
    return find(found.module, flow.again(narrow=narrow), found.frozen)


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


def _steady(found: Found, inputs: Any) -> Found:
    """The families whose dead channels are the same constants on other inputs, where what reads them stays."""
    none, flow = torch.zeros(0, dtype=torch.int64), found.flow
    families = [found.sets(i) if stays else none for i, stays in enumerate(found.stays())]
    follow = lambda recording: flow.again(recording=recording)
    return found.closed(unsteady(found.module, inputs, flow, follow, families))


def _check_some(found: Found) -> None:
    if not found.families:
        if not list(found.module.parameters()):
            raise ValueError(
                f"channel_groups found no parameters in {type(found.module).__name__}. Is it quantized? A network is "
                "made smaller before that."
            )
        single = [name for name, w in found.module.named_parameters() if w.ndim > 1 and w.shape[0] == 1]
        only = {"they are the only one of their layer, as where all others were dead": single} if single else {}
        raise ValueError(
            f"channel_groups found no channels in {type(found.module).__name__} that could go. Kept are\n"
            f"{_reasons({**found.kept(), **only})}"
        )


def _running(
    found: Found, inputs: Any, rules: Mapping[type[nn.Module], Rule], round_to: int, inside_heads: bool
) -> tuple[Found, list[str]]:
    """The families without which the network runs, and notes about what will be seen at the end alone."""
    if not found.families:
        return found, []
    counts = found.counts()
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
    least = [n for i, n in enumerate(trial.least) if i not in reasons]
    two = {owners: why for i, why in trial.needs_two.items() if (owners := found.owners()[i]) and i not in reasons}
    untold = trial.untold([i for i in range(len(counts)) if i not in reasons])
    found = found.closed(found.turned(reasons))._replace(least=least)
    return found, _notes(found, trial, two, untold) if found.families else []


def _notes(
    found: Found, trial: Trial, two: Mapping[tuple[str, ...], str], untold: Sequence[tuple[type, str]]
) -> list[str]:
    """What will be seen at the end alone.

    Args:
        found: Families without which the network runs.
        trial: What was tried.
        two: Why at least two channels of some layers stay.
        untold: Numbers of types of modules that outputs do not tell.
    """
    shown = lambda several: [f"{kind.__name__}.{attribute}" for kind, attribute in several]
    notes = [
        f"'{name}', an LSTM, has to keep more hidden units than projections of them (proj_size < hidden_size)"
        for name, layer in found.module.named_modules()
        if isinstance(layer, nn.LSTM) and layer.proj_size and any([name in names for names in found.owners()])
    ]
    notes += [f"At least two channels of {listed(layers)} stay: {why}" for layers, why in two.items()]
    if numbers := sorted({*shown(trial.unsettled)}):
        notes.append(f"Give resized example_inputs too, to tell what becomes of {', '.join(numbers)}")
    if untold:
        notes.append(
            f"Outputs do not tell whether {listed(shown(untold))} changes, on these inputs or on others like them"
        )
    if trial.uncompared is not None:
        notes.append(
            f"Outputs were not compared, because {trial.uncompared}: give resized example_inputs, if that helps"
        )
    if unseen := found.flow.recording.unseen:
        notes.append(
            "Some parameters are not used in evaluation, and in training the module fails on example_inputs, so that "
            f"their layers may not fit after: {unseen}"
        )
    return notes


def _pairs(found: Found, reasons: Mapping[int, str]) -> list[tuple[int, ...]]:
    """Features of queries and keys, and those of values beside them, that cannot go one without the other.

    A module that holds one width for all three may run without the same number of features of each.
    """
    owners = [{name.rpartition(".")[0] for name in names} for names in found.owners()]
    multiplied, pairs = found.multiplied(), dict[int, int]()
    of_heads = found.of_heads()
    for i in [i for i in reasons if multiplied[i] is not None]:
        for j in [j for j in reasons if multiplied[j] is None and j not in pairs.values()]:
            sets = found.sets(j)
            alike = owners[i] == owners[j] and len(sets) == found.counts()[i]
            if alike and bool(torch.isin(sets, of_heads).all()):
                pairs[i] = j
                break
    return list(pairs.items())


def _together(found: Found, reasons: Mapping[int, str], several: Sequence[tuple[int, ...]]) -> Found:
    """The families once some are one with others, group by group, and the others that were refused are closed."""
    families = list(found.families)
    for i, *others in several:
        slots = {(slot.name, slot.dim): slot for slot in families[i]}
        for j in others:
            found.flow.atoms.join(found.sets(i), found.sets(j), "")
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


def _check_layers(found: Found, layers: Sequence[str] | None) -> None:
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


def _reasons(kept: dict[str, list[str]]) -> str:
    return "\n".join([f"- {reason}: {listed(places)}" for reason, places in alike(kept).items()])


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


def _in_sequence(
    module: nn.Module, prefix: str, layers: Sequence[str] | None, types: Any, round_to: int
) -> list[Family]:
    """The families of a sequence of layers, which are seen without a run."""
    families = sequence_groups(module, prefix, layers)
    if types is None and round_to == 1:
        return families
    owners = [next(iter(family)).rpartition(".")[0] for family in families]
    inside = [name.removeprefix(f"{prefix}.") if prefix else name for name in owners]
    here = _chosen(module, [[name] for name in inside], None, types)
    return ChannelGroups([family for family, chosen in zip(families, here, strict=True) if chosen], round_to=round_to)
