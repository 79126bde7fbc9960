"""Masks by name, shape and role: what `select` chooses, and the usual choice of what decays."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Mask, Params
from funcreg.core.construction import Call, written
from funcreg.core.masks import Selection, counted, dimensions, hidden, listed, mask_bools
from funcreg.core.tree import kind_of, tree_leaves, tree_paths
from funcreg.core.undocumented import is_compiling, read_once
from funcreg.core.wrapping import plain_names

#: What a shape is compared with: sizes, None for any size, one `...` for any number of sizes, or a function of it.
Shape = tuple[Any, ...] | Callable[[tuple[int, ...]], bool]


class _Layers(NamedTuple):
    """What `select` keeps of a module: names, and no parameters."""

    module: str  # The name of its class.
    chosen: frozenset[str]  # The names of the parameters of the chosen layers, all names where one has several.
    known: frozenset[str]  # The names of all parameters.

    def __repr__(self) -> str:
        return self.module


def _names_of(module: torch.nn.Module) -> dict[Tensor, list[str]]:
    """All names of each parameter."""
    names: dict[Tensor, list[str]] = {}
    for name, w in module.named_parameters(remove_duplicate=False):
        names.setdefault(w, []).append(name)
    return names


def _layers(types: tuple[type[torch.nn.Module], ...], module: torch.nn.Module) -> _Layers:
    """The parameters of the layers of some types in a module, or an error if there are none."""
    names = _names_of(module)
    chosen: set[str] = set()
    others: set[str] = set()
    for layer in module.modules():
        own = [*layer.parameters(recurse=False)]
        for parametrization in getattr(layer, "parametrizations", {}).values():
            own += parametrization.parameters(recurse=False)
        if isinstance(layer, types):
            chosen.update(name for w in own for name in names[w])
        elif own:
            others.add(type(layer).__name__)
    if not chosen:
        raise ValueError(
            f"select got {listed(t.__name__ for t in types)}, and no such layer of this {type(module).__name__} has "
            f"parameters of its own; those that have some are of the types {listed(sorted(others))}"
        )
    return _Layers(
        type(module).__name__, frozenset(chosen), frozenset(name for each in names.values() for name in each)
    )


def _check_patterns(patterns: tuple[Any, ...], module: Any, min_ndim: Any) -> None:
    expected = (
        'expected globs over dotted names, such as "*.weight", regular expressions, such as '
        're.compile(r"layers\\.\\d+\\.weight"), or module types, such as torch.nn.LayerNorm'
    )
    for pattern in patterns:
        if isinstance(pattern, (str, re.Pattern)) and not isinstance(getattr(pattern, "pattern", ""), bytes):
            continue
        if isinstance(pattern, type) and issubclass(pattern, torch.nn.Module):
            continue
        hint = ""
        if isinstance(pattern, torch.nn.Module):
            hint = f". Do you mean its type, or the name of this {type(pattern).__name__}?"
        elif isinstance(pattern, (list, tuple, set, frozenset)):
            hint = ". Give them one by one, as in select(*patterns)."
        came = f"the class {pattern.__name__}" if isinstance(pattern, type) else kind_of(pattern)
        raise TypeError(f"select got {came}; {expected}{hint}")
    if module is not None and not isinstance(module, (torch.nn.Module, _Layers)):
        raise TypeError(f"module is {kind_of(module)}; expected the torch.nn.Module whose parameters these are")
    if not isinstance(min_ndim, int) or isinstance(min_ndim, bool):
        raise TypeError(f"min_ndim is {kind_of(min_ndim)}; expected a number of dimensions, such as 2")
    if min_ndim < 0:
        raise ValueError(f"min_ndim is {min_ndim}; expected a number of dimensions of at least 0")


def _check_shape(shape: Any) -> None:
    if shape is None or (callable(shape) and not isinstance(shape, type)):
        return
    parts: tuple[Any, ...] = shape if isinstance(shape, tuple) else ("none",)
    sizes = [n is None or n is ... or (isinstance(n, int) and not isinstance(n, bool) and n >= 0) for n in parts]
    if not all(sizes) or sum([n is ... for n in parts]) > 1:
        raise TypeError(
            f"shape is {shape!r}; expected a tuple of sizes, with None for any size and at most one ... for any number "
            "of sizes, such as (None, 3) or (..., 3), or a function from a shape to a bool"
        )


def _fits_shape(found: tuple[int, ...], shape: Any) -> bool:
    if shape is None:
        return True
    if not isinstance(shape, tuple):
        fits = shape(found)
        if not isinstance(fits, bool):
            raise TypeError(f"shape={written(shape)} returned {kind_of(fits)} for {found}; expected True or False")
        return fits
    if ... in shape:
        at = shape.index(...)
        after = len(shape) - at - 1
        if len(found) < at + after:
            return False
        found, shape = found[:at] + found[len(found) - after :], shape[:at] + shape[at + 1 :]
    return len(found) == len(shape) and all([n is None or n == size for n, size in zip(shape, found, strict=True)])


def select(
    *patterns: str | re.Pattern[str] | type[torch.nn.Module],
    module: torch.nn.Module | None = None,
    min_ndim: int = 0,
    shape: Shape | None = None,
) -> Selection:
    r"""A mask that is True for the leaves that a name, a module type, a shape or a number of dimensions chooses.

    A leaf is chosen if it matches one of the patterns (or none is given), has at least `min_ndim` dimensions, and has
    the shape. Selections compose: `select("encoder.*") & ~select("*.bias")`.

    Names are matched as they are and as they would be without `torch.compile`, data parallel wrappers and
    parametrizations: `"fc.weight"` matches `_orig_mod.fc.weight`, `module.fc.weight` if all names begin with `module`,
    and `fc.parametrizations.weight.original0`. A tied parameter belongs to each layer that has it.

    Args:
        patterns: Globs over dotted names (`"*.weight"`), regular expressions that match the whole of a name
            (`re.compile(r"layers\.\d+\.weight")`), or module types (`torch.nn.LayerNorm`).
        module: The module whose parameters these are; needed for module types alone. Its names are read here, and
            the module is not kept.
        min_ndim: Least number of dimensions; 2 leaves out biases and the scales of normalization layers.
        shape: Tuple of sizes, with None for any size and `...` for any number of sizes, as in `(None, 3)` and
            `(..., 3, 3)`, or a function from a shape to a bool.

    Raises:
        ValueError: A pattern, or the module types, match no leaf; the message lists the names there are.
        TypeError: A pattern is none of these, or a module type comes without `module`.

    Example:
        >>> params = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}
        >>> select("*.weight")(params)
        {'fc.weight': True, 'fc.bias': False}
        >>> (~select(min_ndim=2))(params)
        {'fc.weight': False, 'fc.bias': True}
        >>> select(shape=(None, 2))(params)
        {'fc.weight': True, 'fc.bias': False}
        >>> select("fc.*") & ~matrices
        select('fc.*') & ~matrices
    """
    _check_patterns(patterns, module, min_ndim)
    _check_shape(shape)
    types = tuple(pattern for pattern in patterns if isinstance(pattern, type))
    by_name = tuple(pattern for pattern in patterns if not isinstance(pattern, type))
    rules = tuple(map(rule, by_name))
    if types and module is None:
        raise TypeError(f"select got the module type {types[0].__name__}; it also needs module=, to look its layers up")
    found = None
    if types and module is not None:
        found = module if isinstance(module, _Layers) else _layers(types, module)
    plain_typed = plain_names(tuple(sorted(found.chosen))) if found else ()

    def in_layers(name: str, plain: str) -> bool:
        return found is not None and (name in found.chosen or (name not in found.known and plain in plain_typed))

    def matched(params: Params) -> tuple[list[bool], list[tuple[bool, ...]]]:
        """For each leaf whether it is of the layers; for each pattern of names which leaves it matches."""
        names = tuple(tree_paths(params))
        plain = plain_names(names)
        named = [named_by(text, kind, names, plain) for text, kind in rules]
        return [in_layers(a, b) for a, b in zip(names, plain, strict=True)], named

    def shaped(params: Params) -> list[bool]:
        sizes = (
            [True] * len(dimensions(params))
            if shape is None
            else [_fits_shape(tuple(leaf.shape), shape) for leaf in tree_leaves(params)]
        )
        return [fits and ndim >= min_ndim for fits, ndim in zip(sizes, dimensions(params), strict=True)]

    def choose(params: Params) -> list[bool]:
        by_type, named = matched(params)
        if not all([any(matches) for matches in named]) and not hidden(params):
            missed = next(p for p, matches in zip(by_name, named, strict=True) if not any(matches))
            raise ValueError(_matches_none(missed, tree_paths(params)))
        if found and not any(by_type) and not hidden(params):
            raise ValueError(
                f"select of {listed([t.__name__ for t in types])} matches no leaf. The {found.module} has "
                f"{listed(sorted(found.chosen))} in such layers; the leaves are {listed(tree_paths(params))}. Are they "
                "named as in this module?"
            )
        chosen = [not patterns or any(row) for row in zip(by_type, *named, strict=True)]
        return [a and b for a, b in zip(chosen, shaped(params), strict=True)]

    def facts(params: Params) -> list[str]:
        by_type, named = matched(params)
        said = [f"of {listed([t.__name__ for t in types])}", *[f"matches {written(p)}" for p in by_name]]
        hits = [[text for text, hit in zip(said, row, strict=True) if hit] for row in zip(by_type, *named, strict=True)]
        rows = zip(hits, tree_leaves(params), shaped(params), strict=True)
        sizes = "" if shape is None else f", shape={written(shape)}"
        limits = f"min_ndim={min_ndim}{sizes}" if min_ndim else sizes[2:]
        return [_fact(patterns, hit, leaf, fits, limits) for hit, leaf, fits in rows]

    selection = Selection(choose, facts=facts)
    if not is_compiling():
        kwargs = {"module": found, "min_ndim": min_ndim, "shape": shape}
        defaults = {"module": None, "min_ndim": 0, "shape": None}
        selection.made_by = Call(select, patterns, {k: v for k, v in kwargs.items() if v != defaults[k]})
    return selection


def _fact(patterns: tuple[Any, ...], hits: list[str], leaf: Tensor, fits: bool, limits: str) -> str:
    """What decides about a leaf: the pattern that it matches, or its shape."""
    if patterns and not hits:
        several = ", ".join([p.__name__ if isinstance(p, type) else written(p) for p in patterns])
        return f"matches none of {several}" if len(patterns) > 1 else f"does not match {several}"
    if limits and not (fits and hits):
        return f"of shape {tuple(leaf.shape)}, {'as' if fits else 'against'} {limits}"
    return hits[0] if hits else "every leaf"


def _matches_none(pattern: str | re.Pattern[str], names: list[str]) -> str:
    inside = [name for name in names if not isinstance(pattern, str) and pattern.search(name)]
    hint = ""
    if inside and not isinstance(pattern, str):
        hint = (
            f". It is found in '{inside[0]}', but is to match the whole of a name; add .* where more may stand, as in "
            f"re.compile({'.*' + pattern.pattern + '.*'!r})"
        )
    return f"select({written(pattern)}) matches no leaf; the leaves are {listed(names)}{hint}"


def rule(pattern: str | re.Pattern[str]) -> tuple[str, int]:
    """A glob, or a regular expression with its flags, as text that compiled code carries."""
    return (pattern, -1) if isinstance(pattern, str) else (pattern.pattern, pattern.flags)


@read_once
def named_by(text: str, flags: int, names: tuple[str, ...], plain: tuple[str, ...]) -> tuple[bool, ...]:
    """Which names, as they are or without wrappers, match a rule."""
    return tuple([_matches(a, text, flags) or _matches(b, text, flags) for a, b in zip(names, plain, strict=True)])


def _matches(name: str, text: str, flags: int) -> bool:
    """Whether a name matches a glob, or a regular expression if flags of one are given."""
    return fnmatch.fnmatchcase(name, text) if flags < 0 else re.fullmatch(text, name, flags) is not None


# Roles


class _Roles(NamedTuple):
    """What `no_bias_norm_embed` keeps of a module: a role for each name, empty for what decays."""

    module: str  # The name of its class.
    roles: dict[str, str]

    def __repr__(self) -> str:
        return self.module


def no_bias_norm_embed(module: torch.nn.Module) -> Selection:
    """A mask of the weights that usually decay: not biases, normalization layers, embeddings, nor vectors.

    What a parameter is, is read from the module, not guessed from its shape alone: embeddings are those of embedding
    layers, a matrix that is tied to an output layer included, and parameters such as `pos_embed` and `cls_token`;
    normalization layers are those whose class is called so (`LayerNorm`, `BatchNorm2d`, `LlamaRMSNorm`); biases have
    `bias` in their names. Scales and other parameters of less than two dimensions decay neither. `explain` prints why
    each leaf is chosen or not.

    Args:
        module: The module whose parameters these are. Its names are read here, and the module is not kept.

    Raises:
        TypeError: It is no module.
        ValueError: No leaf is called as a parameter of the module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
        >>> mask = no_bias_norm_embed(model)
        >>> [name for name, decays in mask(dict(model.named_parameters())).items() if decays]
        ['2.weight']
        >>> tx = adamw(1e-3, weight_decay=0.1, mask=mask)
    """
    if not isinstance(module, (torch.nn.Module, _Roles)):
        raise TypeError(
            f"no_bias_norm_embed got {kind_of(module)}; expected the torch.nn.Module whose parameters these are. By "
            'names and dimensions alone choose with ~select("*bias*") & matrices.'
        )
    found = module if isinstance(module, _Roles) else _roles(module)
    plain = dict(zip(plain_names(tuple(found.roles)), found.roles.values(), strict=True))

    def roles(params: Params) -> list[str]:
        names = tree_paths(params)
        rows = list(zip(names, plain_names(tuple(names)), dimensions(params), strict=True))
        if rows and not any([a in found.roles or b in plain for a, b, _ in rows]) and not hidden(params):
            raise ValueError(
                f"no leaf is called as a parameter of this {found.module}, which has {listed(found.roles)}; the leaves "
                f"are {listed(names)}. Are they of another model, or in a tree with another name in front?"
            )
        return [found.roles.get(a, plain.get(b, _role(b.rpartition(".")[2], ndim))) for a, b, ndim in rows]

    made = Selection(
        lambda params: [not role for role in roles(params)],
        facts=lambda params: [role or "a weight" for role in roles(params)],
    )
    if not is_compiling():
        made.made_by = Call(no_bias_norm_embed, (found,), {})
    return made


def _roles(module: torch.nn.Module) -> _Roles:
    names = _names_of(module)
    roles = {name: "" for own in names.values() for name in own}
    for layer in module.modules():
        own = list(layer.named_parameters(recurse=False))
        for attribute, parametrization in getattr(layer, "parametrizations", {}).items():
            own += [(attribute, w) for w in parametrization.parameters(recurse=False)]
        for attribute, w in own:
            role = _layer_role(layer) or _role(attribute, w.ndim)
            for name in names[w]:
                roles[name] = roles[name] or role
    return _Roles(type(module).__name__, roles)


def _layer_role(layer: torch.nn.Module) -> str:
    kind = type(layer).__name__
    embeds = isinstance(layer, (torch.nn.Embedding, torch.nn.EmbeddingBag)) or re.search(r"Embeddings?(Bag)?$", kind)
    return f"of the layer {kind}" if embeds or re.search(r"Norm(\d+d)?$", kind) else ""


def _role(attribute: str, ndim: int) -> str:
    """What a parameter is by its own name and its number of dimensions; empty for a weight."""
    if "bias" in attribute:
        return "a bias"
    if re.search(r"embed|(^|_)tokens?$", attribute):
        return "an embedding"
    return counted(ndim) if ndim < 2 else ""


# Why


def reasons(mask: Mask, params: Params) -> list[str]:
    """What decides about each leaf, in words; empty where that is not known."""
    if not isinstance(mask, Selection):
        return [""] * len(tree_leaves(params))
    call = mask.made_by
    if mask.facts is not None:
        return mask.facts(params)
    if call is None or call.function not in (operator.and_, operator.or_, operator.invert):
        return [""] * len(tree_leaves(params))
    if call.function is operator.invert:
        return reasons(call.args[0], params)
    decided = call.function is operator.or_  # One operand that says this decides.
    columns = [zip(mask_bools(each, params), reasons(each, params), strict=True) for each in call.args]
    found: list[str] = []
    for row in zip(*columns, strict=True):
        deciding = [fact for chosen, fact in row if chosen == decided] or [fact for _, fact in row]
        alone = any([chosen == decided for chosen, _ in row])
        found.append(", ".join([fact for fact in dict.fromkeys(deciding[:1] if alone else deciding) if fact]))
    return found


class Computed(NamedTuple):
    """What computes a weight from a parameter."""

    kind: str
    effect: str  # What a penalty of the parameter does to the weight.


#: What computes weights from parameters, by the names of torch's classes, and what a penalty of the parameter does.
_KINDS = {
    "_WeightNorm": Computed(
        "the direction of weight norm",
        "shrinking it changes nothing but the strength of later steps, and once all of a direction is zero, it is "
        "divided by its norm of zero: the loss becomes NaN. Leave it out, as in mask=matrices & ~select({name!r}), and "
        "penalize the size beside it, {size!r}: where that is zero, so are the weights",
    ),
    "_SpectralNorm": Computed(
        "what spectral norm divides by its largest singular value",
        "shrinking it changes nothing but the strength of later steps, its exact zeros alone are zeros of the weight, "
        "and once all of it is zero the loss becomes NaN. Leave it out with mask=, or take the parametrization off",
    ),
    "_Orthogonal": Computed(
        "what an orthogonal parametrization makes a rotation of",
        "its zeros are no zeros of the weight, whose norm stays the same. Leave it out with mask=, or take the "
        "parametrization off",
    ),
}


def computed_from(module: torch.nn.Module) -> dict[Tensor, Computed]:
    """The parameters of a module from which something else than pruning computes the weight, and what that is."""
    found: dict[Tensor, Computed] = {}
    for layer in module.modules():
        for parametrizations in getattr(layer, "parametrizations", {}).values():
            names = [type(p).__name__ for p in parametrizations]
            known = [_KINDS[name] for name in names if name in _KINDS]
            unknown = Computed(
                f"what {names[0]} computes a weight from",
                "its zeros and its size need not be those of the weight, which sparsity(module) counts. Leave it out "
                "with mask= if they are not",
            )
            # Of weight norm the first is the size, the second the direction.
            last = [w for name, w in parametrizations.named_parameters(recurse=False) if name != "original0"]
            found.update(dict.fromkeys(last, known[0] if known else unknown))
        for hook in layer._forward_pre_hooks.values():  # The functions that came before parametrizations.
            kind, name = _KINDS.get(f"_{type(hook).__name__}"), getattr(hook, "name", None)
            for own in (f"{name}_v", f"{name}_orig"):
                if kind is not None and isinstance(getattr(layer, own, None), torch.nn.Parameter):
                    found[getattr(layer, own)] = kind
    return found
