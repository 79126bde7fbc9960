"""Networks as wide as the parameters that they are given."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from funcreg.core._typing import Params
from funcreg.core.leafwise import widen
from funcreg.core.masks import listed
from funcreg.core.notices import warn_user
from funcreg.core.ranges import flags
from funcreg.core.rounding import is_narrow
from funcreg.core.sharding import check_whole_module
from funcreg.core.tree import tree_leaves, tree_paths
from funcreg.core.wording import type_of, with_article
from funcreg.core.wrapping import inner_module, matched
from funcreg.networks.agreement import Agreement, Failure, draws
from funcreg.networks.copies import check_functions, copied
from funcreg.networks.coupled import layers_in_sequence
from funcreg.networks.settling import Problem, are_same, decide, lengths, settle
from funcreg.networks.stored import Stored, stored_widths, takes_parts
from funcreg.networks.variations import other_runs, widened
from funcreg.networks.widths import (
    CONVOLUTIONS,
    NORMS,
    Given,
    Place,
    Rule,
    changes,
    check_heads,
    follow,
    follow_bare,
    follow_configs,
    gave_and_gives,
    gives,
    tensors,
)


def resized(
    module: nn.Module,
    params: Params,
    example_inputs: Any = None,
    *,
    rules: Mapping[type[nn.Module], Rule] | None = None,
    inside_heads: bool = False,
) -> nn.Module:
    """A copy of a module with the parameters and buffers that are given, its layers as wide as these are.

    What layers say about their widths follows: linear layers, convolutions (transposed, depthwise, of groups that go
    whole or become narrower alike), normalizations, embeddings, `MultiheadAttention`, recurrent layers, `Bilinear` and
    `PReLU`, and of Hugging Face `Conv1D`, normalizations, and attention, whose counts of heads, or the widths of these
    with `inside_heads`, follow its projections. All else stays as it was: names of parameters, ties between them,
    hooks, `requires_grad`, modes. Of a module that torch.compile or data parallel wraps the one inside is copied, and
    comes back without the wrapper: compile or wrap it anew.

    A module with a forward of its own may hold a width as a number that its forward uses. If such a number, or one
    that is named as a count of heads or groups, could be one that changed, it is an error, unless `example_inputs` show
    what it is, or there is a rule for it. It changes where outputs need that. Where they are equal with either value,
    inputs like the examples are tried, longer ones and larger numbers, on the CPU and with weights of usual size. What
    these do not tell stays as it was, and a warning names it; a number with the name of a width follows if all that is
    as wide changed.

    That layers still meet is checked inside each `torch.nn.Sequential`. Elsewhere, and of counts of other names or in
    the code, the example inputs show it; `channel_groups` has tried that out for what it offers.

    Args:
        module: The network. It stays as it was.
        params: Tree of parameters and buffers by their names in the module, such as `remove_dead` gives, or the
            `state_dict` of a network that was resized before.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments. Both networks run on them in
            evaluation, and their outputs have to agree up to the rounding of what they compute with; the module holds
            the zeros itself then, as it does after `regularize`.
        rules: For types of modules with numbers of their own what sets these, called as `rule(layer, before)` with the
            layer that has its new parameters, its children done, and the layer as it was.
        inside_heads: Whether heads of attention are narrower where its projections are, and not fewer: what
            `channel_groups` was told.

    Raises:
        TypeError: What is given is no module, no tree of tensors, or no rules for types, or the module or a part of it
            is compiled by torch.jit or made by torch.export.
        ValueError: There is no leaf, or no layer that a rule is for, or the module has no such parameter, a layer of
            another kind changes its width, some parameters or buffers of a layer are of another width than others, as
            without the running statistics of a normalization, a parametrized or pruned weight changes its shape,
            parameters that are tied are given different values, a module stores a width that nobody knows of, a layer
            of a `torch.nn.Sequential` gives other channels than the next one takes, heads were taken out of attention
            whole and `inside_heads` is True or the other way round, or outputs are others.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     for w in (net[0].weight, net[0].bias, net[2].weight.T):
        ...         w[5:] = 0
        >>> units = {"0.weight": 0, "0.bias": 0, "2.weight": 1}
        >>> resized(net, remove_dead(dict(net.named_parameters()), units), torch.ones(1, 3))
        Sequential(
          (0): Linear(in_features=3, out_features=5, bias=True)
          (1): ReLU()
          (2): Linear(in_features=5, out_features=2, bias=True)
        )

        A module whose forward uses a width that it stores, and a rule that sets it:

        >>> class Rows(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.width, self.first, self.last = 8, torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)
        ...
        ...     def forward(self, x):
        ...         return self.last(self.first(x).reshape(-1, self.width))
        >>> def follow(layer, before):
        ...     layer.width = layer.first.out_features
        >>> tree = {"first.weight": torch.ones(5, 3), "first.bias": torch.ones(5), "last.weight": torch.ones(2, 5)}
        >>> resized(Rows(), tree, rules={Rows: follow}).width
        5
    """
    check_whole_module("resized", module)
    module = inner_module(module)
    check_copied(module, rules)
    given = {name: leaf.detach().clone() for name, leaf in as_given(module, params).items()}
    flags(inside_heads=inside_heads)
    smaller, unknown = narrowed(module, given, rules or {}, inside_heads)
    check_heads(module, smaller, inside_heads, tuple(rules or ()))
    _settle(module, smaller, unknown, example_inputs)
    if example_inputs is None and (left := _left_as_they_were(module, smaller, given)):
        warn_user(
            f"resized was given no {listed(left)}, with dimensions as wide as some that changed: buffers that a "
            "state_dict leaves out stay what they are in the module. Where they belong to channels, keep and give "
            "with_buffers(smaller) instead; else give example_inputs, on which outputs are compared."
        )
    return smaller


def _left_as_they_were(module: nn.Module, smaller: nn.Module, given: dict[str, Tensor]) -> list[str]:
    """Buffers that are not given, with a dimension as wide as one that changed."""
    pairs = [pair for _, old, new in changes(smaller, module) for pair in zip(old.shape, new.shape, strict=True)]
    widths = {old for old, new in pairs if old != new}
    known = tensors(module)
    held = {id(known[name]) for name in given}
    return [name for name, x in module.named_buffers() if id(x) not in held and widths.intersection(x.shape)]


def check_copied(module: nn.Module, rules: Mapping[type[nn.Module], Rule] | None) -> None:
    """Raise an error unless a module can be copied with other widths, and has the types that rules are for."""
    for name, layer in module.named_modules():
        what = f"'{name}' in the module" if name else "module"
        if isinstance(layer, torch.jit.ScriptModule):  # Which takes no hooks, and cannot be copied inside another one.
            raise TypeError(f"{what} is compiled by torch.jit; expected the module that it was made of")
        if isinstance(layer, torch.fx.GraphModule) and "train" in vars(layer):  # It raises: the mode is in the graph.
            raise TypeError(f"{what} was made by torch.export, with its widths; expected the module that was exported")
    check_functions(module)
    for kind, rule in (rules or {}).items():
        if not isinstance(kind, type) or not callable(rule):
            raise TypeError(f"rules maps {kind!r} to {rule!r}; expected a type of module and a function")
        if not any(isinstance(layer, kind) for layer in module.modules()):
            raise ValueError(f"rules has one for {kind.__name__}, and the module has no such layer")


def narrowed(
    module: nn.Module, given: dict[str, Tensor], rules: Mapping[type[nn.Module], Rule], inside_heads: bool = False
) -> tuple[nn.Module, list[Stored]]:
    """A copy of a module that holds these tensors, its layers as wide as they are, and what no rule knows in it.

    Raises:
        ValueError: A layer has not the parameters that belong to it, or layers do not meet.
    """
    smaller = _copied(module, given)
    unknown = _follow(module, smaller, rules, inside_heads)
    follow_configs(module, smaller)
    for (name, old), new in zip(module.named_modules(), smaller.modules(), strict=True):
        if type(old).forward is nn.Sequential.forward:
            _check_meeting(layers_in_sequence(old, name), layers_in_sequence(new, name))
    return smaller, unknown


def as_given(module: nn.Module, params: Params) -> dict[str, Tensor]:
    """The tensors that are given, by their names, or an error if the module has not such ones."""
    if tree_paths(params) == [""]:
        raise TypeError(f"params is {type_of(params)}; expected a tree of parameters and buffers by their names")
    known = tensors(module)
    names = matched(tuple(tree_paths(params)), tuple(known))  # Of another wrapper, or of none.
    given = dict(zip(names, tree_leaves(params), strict=True))
    if not given:
        raise ValueError("resized got a tree without leaves; expected parameters and buffers by their names")
    first: dict[int, str] = {}  # The name under which each tensor of the module was given first.
    for name, leaf in given.items():
        if name not in known:
            raise ValueError(f"resized got '{name}', which the module has not; it has {listed(known)}")
        if not isinstance(leaf, Tensor):
            raise TypeError(f"resized got {type_of(leaf)} for '{name}'; expected a tensor")
        old, other = known[name], first.setdefault(id(known[name]), name)
        if leaf.ndim != old.ndim:
            raise ValueError(f"resized got {leaf.ndim} dimensions for '{name}'; the module has {old.ndim}")
        if leaf is not given[other] and not (leaf.shape == given[other].shape and torch.equal(leaf, given[other])):
            raise ValueError(
                f"'{name}' and '{other}' are one tensor in the module, and are given two; expected the same one. "
                "Does a family name one of them, and not the other?"
            )
        if leaf.shape != old.shape and _is_part(module, name):
            raise ValueError(
                f"'{name}' has another shape than in the module, and a weight is computed from it; expected a plain "
                "parameter. Call torch.nn.utils.parametrize.remove_parametrizations or prune.remove first."
            )
    return given


def _is_part(module: nn.Module, name: str) -> bool:
    """Whether a parametrization, or a hook as of `torch.nn.utils.prune`, computes a weight from a parameter."""
    path, _, own = name.rpartition(".")
    layer = module.get_submodule(path)
    computed = vars(layer).get(own.rpartition("_")[0])
    return isinstance(layer, parametrize.ParametrizationList) or isinstance(computed, Tensor)


def _copied(module: nn.Module, given: dict[str, Tensor]) -> nn.Module:
    """A copy of a module with other parameters and buffers; what shares a tensor shares the new one."""
    known = tensors(module)
    memo: dict[int, Any] = {}
    for layer in module.modules():  # What hooks have computed is computed anew, and cannot be copied.
        made = [x for x in vars(layer).values() if isinstance(x, Tensor) and not x.is_leaf]
        memo.update({id(x): x.detach().clone() for x in made})
    for name, leaf in given.items():
        old = known[name]
        memo.setdefault(id(old), nn.Parameter(leaf, old.requires_grad) if isinstance(old, nn.Parameter) else leaf)
    new = copied(module, memo)
    made = tensors(new)
    for name in given:
        if made.get(name) is not memo[id(known[name])]:
            raise ValueError(
                f"a copy of {type(module).__name__} has not the '{name}' that it was given: a layer copies itself in a "
                "way of its own, as those of Keras do from their configuration. Build the network anew with these "
                "shapes, and load what remove_dead returned"
            )
    return new


def _follow(
    module: nn.Module, smaller: nn.Module, rules: Mapping[type[nn.Module], Rule], inside_heads: bool
) -> list[Stored]:
    """Make what the layers say of their widths what these are, and find the numbers that no rule knows."""
    before, layers = dict(module.named_modules()), dict(smaller.named_modules())
    alone = [name for name, layer in layers.items() if not layer._modules]
    around = [name for name, layer in layers.items() if layer._modules]
    came: list[Given] = []
    known: dict[str, frozenset[str]] = {}
    moved = {path for name, _, _ in changes(smaller, module) for path in _holders(name)}
    for name in (*alone, *reversed(around)):  # Children before what holds them, and these in their order.
        layer, old = layers[name], before[name]
        if name in moved:
            rule = next((rules[kind] for kind in type(layer).__mro__ if kind in rules), None)
            if rule is not None:
                rule(layer, old)
            elif (found := follow(Place(name, layer, old, came, inside_heads))) is not None:
                known[name] = found
        elif not layer._modules and not tensors(layer):
            follow_bare(layer, came)
        if gives(layer):
            came.append(gave_and_gives(old, layer))
    known.update({name: frozenset() for name in around if name not in known and takes_parts(module, smaller, name)})
    several = [stored_widths(module, smaller, name, found, inside_heads) for name, found in known.items()]
    return [each for stored in several for each in stored]


def _holders(name: str) -> list[str]:
    """The paths of all modules that hold a tensor, the outermost with the empty one."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _settle(module: nn.Module, smaller: nn.Module, unknown: list[Stored], inputs: Any) -> None:
    """Give numbers that nobody knows the values with which outputs are equal, or raise an error."""
    if inputs is None:
        if unknown:
            raise ValueError(f"{_said(smaller, unknown)}. {_HINT}")
        return
    problem = _comparison(module, smaller, inputs)
    wrong = settle(smaller, unknown, problem)
    if wrong is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # They were given when the networks ran on what is given.
            untold = decide(smaller, unknown, problem, other_runs(module, inputs, lengths(unknown)))
        if untold:
            warn_user(_untold(smaller, untold))
        return
    if isinstance(wrong, str) and draws(module, inputs):
        raise ValueError(
            f"the smaller network cannot be compared with the module, whose outputs depend on random numbers: {wrong}. "
            "It draws in evaluation, as by dropout with training=True, and layers of another width draw other numbers. "
            f"Give no example_inputs{'' if not unknown else f', and rules, for {_said(smaller, unknown)}'}"
        )
    first = f"it fails on example_inputs: {wrong}" if isinstance(wrong, Failure) else wrong
    if not unknown:
        raise ValueError(
            f"the smaller network is not the module: {first}. Does the module hold the zeros itself, and do the "
            "families given to remove_dead name all that belongs to a channel?"
        )
    raise ValueError(
        f"the smaller network is not the module: {first}. {_said(smaller, unknown)}. {_HINT}. Of a network that was "
        "trained on since outputs tell nothing: save the module itself, or give rules"
    )


def _comparison(module: nn.Module, smaller: nn.Module, inputs: Any) -> Problem:
    """What is wrong with a smaller network; both compute in float32, if that can be, where they have sixteen bits."""
    narrow = any([is_narrow(x.dtype) for x in tensors(module).values()])
    try:
        agreement = Agreement(_widened(module), widened(inputs)) if narrow else Agreement(module, inputs)
    except ValueError:
        if not narrow:
            raise
        narrow, agreement = False, Agreement(module, inputs)  # Dtypes stand in its code.
    return lambda: agreement.problem(_widened(smaller) if narrow else smaller)


def _widened(module: nn.Module) -> nn.Module:
    return _copied(module, {name: widen(x.detach()) for name, x in tensors(module).items() if is_narrow(x.dtype)})


_HINT = (
    "Give example_inputs, on which the outputs have to stay equal, or say what such a module stores by "
    "rules={type: function}, called with the layer and the layer as it was; one that does nothing leaves it as it is. "
    "channel_groups leaves its channels where layers= names others"
)


def _untold(smaller: nn.Module, several: list[Stored]) -> str:
    one = several[0]
    kind, now = type(smaller.get_submodule(one.path)).__name__, one.now(smaller)
    shown = lambda x: f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"{x!r}"
    other = listed(dict.fromkeys([shown(x) for x in (one.value, *one.others) if not are_same([x], [now])]))
    more = f"; there are {len(several) - 1} more like it" if len(several) > 1 else ""
    changed = f"changed to {other}" if other else "changed"
    return (
        f"resized leaves {one.attribute}={shown(now)} of '{one.path}', {with_article(kind)}, though it could be a "
        f"width that {changed}: outputs are the same with either{more}. Give example_inputs on which it matters, or "
        f"rules={{{kind}: function}}, where a function that does nothing leaves it as it is"
    )


def _said(smaller: nn.Module, unknown: list[Stored]) -> str:
    each = unknown[0]
    layer = smaller.get_submodule(each.path)
    value = f"a tensor of shape {tuple(each.value.shape)}" if isinstance(each.value, Tensor) else f"{each.value!r}"
    more = f"; there are {len(unknown) - 1} more like it" if len(unknown) > 1 else ""
    return (
        f"'{each.path}', {type_of(layer)}, stores {each.attribute}={value}, which its forward may use for a "
        f"width that changed, and resized knows no rule for it{more}"
    )


# Layers in sequence

#: Layers of entries side by side. After a convolution they act on pixels of a row, unless a Flatten is between.
_ROWS = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
#: Where the layers are that give as many channels as they take.
_BETWEEN = tuple(f"torch.nn.modules.{kind}" for kind in ("activation", "dropout", "padding", "pooling", "upsampling"))


def _check_meeting(before: Iterator[tuple[str, nn.Module]], after: Iterator[tuple[str, nn.Module]]) -> None:
    """Raise a ValueError for the first two layers in sequence that met before and do not meet after."""
    producer: tuple[str, int, int] | None = None  # Its name, and how many channels it gave and gives.
    pixels = flattened = False
    for (name, old), (_, new) in zip(before, after, strict=True):
        had, has = _takes(old), _takes(new)
        if producer is not None and had and has and not (pixels and not flattened and isinstance(old, _ROWS)):
            giver, gave, gives_now = producer
            # As many, or after a Flatten as many pixels of each channel.
            if (had == gave or (flattened and gave and had % gave == 0)) and has * gave != gives_now * had:
                raise ValueError(
                    f"'{giver}' gives {gives_now} channels and '{name}' takes {has}, where they were {gave} and {had}: "
                    "these layers do not meet. Do the families given to remove_dead name both layers, and are the "
                    "parameters of both given?"
                )
        if isinstance(old, (nn.Linear, CONVOLUTIONS, nn.Embedding)):
            producer = name, gives(old), gives(new)
            pixels, flattened = isinstance(old, CONVOLUTIONS), False
        elif isinstance(old, nn.Flatten):
            flattened = True
        elif isinstance(old, (nn.GLU, nn.MultiheadAttention)) or not (
            had or isinstance(old, nn.Identity) or type(old).__module__ in _BETWEEN
        ):
            producer = None  # Whatever it makes of the channels.


def _takes(layer: Any) -> int:
    """The number of channels, features or units that a layer takes, 0 if it takes any or is unknown."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, CONVOLUTIONS):
        return layer.in_channels
    if isinstance(layer, NORMS):
        return layer.num_features
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return layer.normalized_shape[0] if len(layer.normalized_shape) == 1 else 0
    return layer.num_parameters if isinstance(layer, nn.PReLU) and layer.num_parameters > 1 else 0
