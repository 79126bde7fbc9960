"""Masks: trees of bools, functions that make them, and selections that compose."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Mask, Params
from funcreg.core.checks import check_params, leaf_name
from funcreg.core.construction import Call, Remembering, written
from funcreg.core.notices import warn_user
from funcreg.core.ranges import flags
from funcreg.core.tree import ABSENT, Absent, broadcast, flatten, kind_of, level, tree_leaves, tree_paths
from funcreg.core.undocumented import dynamo_asks, is_compiling
from funcreg.core.wording import type_of


def check_mask(mask: Mask | None) -> None:
    """Raise a TypeError if a mask is a string or a list of them, a class or a module."""
    if isinstance(mask, (str, bytes)):
        raise TypeError(
            f"mask is the string {mask!r}; expected a tree of bools or a function. Do you mean select({mask!r})?"
        )
    if isinstance(mask, (list, tuple, set, frozenset)) and mask and all([isinstance(name, str) for name in mask]):
        names = ", ".join(map(repr, mask))
        raise TypeError(
            f"mask is a list of strings; expected a tree of bools or a function. Do you mean select({names})?"
        )
    if isinstance(mask, type):
        name = mask.__name__
        raise TypeError(
            f"mask is the class {name}; expected a tree of bools or a function. Do you mean select({name}, module=...)?"
        )
    if isinstance(mask, torch.nn.Module):
        raise TypeError(
            f"mask is a module, {type_of(mask)}; expected a tree of bools or a function. The parameters of a "
            'layer are chosen by its name, as in select("encoder.*").'
        )


def mask_leaves(mask: Mask, params: Params) -> list[bool]:
    """A mask as one bool for each leaf.

    A mask that chooses no leaf would do nothing in silence, and is refused; but not the mask False, nor a selection
    that says that it may choose none, nor where an outer mask has left leaves out.
    """
    values = mask_bools(mask, params)
    if values and not any(values) and not _may_choose_none(mask) and not hidden(params):
        said = f"mask={written(mask)}" if callable(mask) else "mask"
        raise ValueError(
            f"{said} chooses no leaf, and would have no effect. The leaves are {listed(tree_paths(params))}. If that "
            "is meant, write mask=False."
        )
    return values


def _may_choose_none(mask: Mask) -> bool:
    return mask is False or (isinstance(mask, Selection) and mask.optional)


def mask_bools(mask: Mask, params: Params) -> list[bool]:
    """A mask as one bool for each leaf, which may all be False."""
    check_mask(mask)
    found, params = chosen_by(mask, params)
    if found is None:
        said = f"the mask {written(mask)} returned None" if callable(mask) else "mask is None"
        raise TypeError(f"{said}; expected a tree of bools like the parameters")
    values = broadcast(found, params, "mask")
    for i, value in enumerate(values):
        if not isinstance(value, bool):
            name = leaf_name("mask at", tree_paths(params)[i])
            raise TypeError(f"{name} is {kind_of(value)}; expected True (apply) or False{_mask_hint(value)}")
    return values


def _mask_hint(value: Any) -> str:
    if isinstance(value, Tensor):
        return ". A mask chooses whole leaves, not entries of them; bool(...) makes a bool of a tensor with one entry"
    if isinstance(value, (str, bytes)):
        return ". For names, use select"
    return ". bool(...) makes a Python bool of it" if type(value).__module__ == "numpy" else ""


def listed(names: Iterable[str]) -> str:
    """Names for an error text, the first twenty if there are many more; a tree that is one leaf has no name."""
    names = [name or "the tree itself" for name in names]
    return ", ".join(names) if len(names) < 30 else f"{', '.join(names[:20])} and {len(names) - 20} more"


def chosen_by(function: Any, params: Params, name: str = "mask") -> tuple[Any, Params]:
    """A tree, or what a user's function makes of parameters, and the parameters that it is for.

    The function sees no leaf that an outer mask left out: dictionaries go without their keys.

    Raises:
        TypeError: The function raised one, or an AttributeError, as one does that expects a leaf; see the hint.
    """
    if not callable(function):
        return function, params
    if isinstance(params, Absent):  # There is nothing to choose from, nor a tree that a user's function knows.
        return params, params
    if isinstance(function, Selection):
        return function.choose(params), params
    seen = _visible(params)
    try:
        found = function(seen)
        return found, params if seen is not params and _fits(found, params, name) else seen
    except (AttributeError, TypeError) as error:
        if isinstance(seen, Tensor):
            raise
        hint = ", or take select(min_ndim=2), matrices or select('*.weight')" if name == "mask" else ""
        raise TypeError(
            f"{name}={written(function)} raised {type(error).__name__}: {error}. The function gets the whole tree of "
            "parameters, once, and returns a tree like it. For a rule of one leaf, write "
            f"lambda params: tree_map(lambda w: ..., params){hint}."
        ) from error


def _fits(found: Any, params: Params, name: str) -> bool:
    """Whether a tree is one for all leaves, also for those left out, as where a function returns one that it knows."""
    try:
        broadcast(found, params, name)
    except (TypeError, ValueError):
        return False
    return True


def _visible(node: Any) -> Any:
    if isinstance(node, Tensor) or (opened := level(node)) is None or not hidden(node):
        return node
    keys, children, rebuild = opened
    if isinstance(node, dict):
        return {key: _visible(node[key]) for key in node if not isinstance(node[key], Absent)}
    return rebuild([_visible(child) for child in children]) if keys else node


def keep(tree: Any, mask: Sequence[bool]) -> Any:
    """A tree without the leaves whose bool is False."""
    leaves, rebuild = flatten(tree)
    return rebuild([leaf if kept else ABSENT for leaf, kept in zip(leaves, mask, strict=True)])


def merge(tree: Any, kept: Any, mask: Sequence[bool]) -> Any:
    """A tree with the leaves of `kept`, which `keep(tree, mask)` is like, put in their places."""
    leaves, rebuild = flatten(tree)
    new = iter(tree_leaves(kept))
    return rebuild([next(new) if here else leaf for leaf, here in zip(leaves, mask, strict=True)])


def kept_by(mask: Mask | None, params: Params, tree: Any = None) -> Any:
    """The leaves of parameters, or of a tree like them, that a mask keeps; without a mask all of them."""
    tree = params if tree is None else tree
    return tree if mask is None else keep(tree, mask_leaves(mask, params))


def on_mask(mask: Mask | None, params: Params, act: Callable[[Params], Params], rest: Params) -> Params:
    """`act` on the leaves that a mask keeps; the other leaves are those of `rest`."""
    if mask is None:
        return act(params)
    bools = mask_leaves(mask, params)
    return merge(rest, act(keep(params, bools)), bools)


class Selection(Remembering):
    """A mask that is made from parameters when it is used, and composes with `&`, `|` and `~`.

    Args:
        choose: From parameters to one bool for each leaf.
        doc: Docstring of this selection.
        name: Name of this selection in its module, for one that every pickle refers to.
        optional: Whether it may rightly choose no leaf at all.
        facts: From parameters to what decides about each leaf, in words.
    """

    def __init__(
        self,
        choose: Callable[[Params], list[bool]],
        doc: str | None = None,
        name: str | None = None,
        optional: bool = False,
        facts: Callable[[Params], list[str]] | None = None,
    ) -> None:
        flags(optional=optional)
        self._choose, self.facts = choose, facts
        self.__doc__ = doc or type(self).__doc__
        self._name = name
        self.optional = optional

    kind = "selection"

    def __call__(self, params: Params) -> Any:
        return self.choose(params)

    def choose(self, params: Params) -> Any:
        """A tree of bools like the parameters."""
        return flatten(params)[1](self._choose(params))

    def __and__(self, other: Mask) -> Selection:
        return self._with(operator.and_, other)

    def __or__(self, other: Mask) -> Selection:
        return self._with(operator.or_, other)

    def __invert__(self) -> Selection:
        made = Selection(lambda params: [not chosen for chosen in self._choose(params)])
        return made if is_compiling() else made._made_by(operator.invert, self)

    __rand__, __ror__ = __and__, __or__

    def _with(self, f: Callable[[Any, Any], Any], other: Mask) -> Selection:
        check_mask(other)
        made = Selection(
            lambda params: [f(a, b) for a, b in zip(self._choose(params), mask_bools(other, params), strict=True)]
        )
        return made if is_compiling() else made._made_by(f, self, other)

    def _made_by(self, function: Callable[..., Any], *args: Any) -> Selection:
        self.made_by = Call(function, args, {})
        return self

    def __bool__(self) -> bool:
        if dynamo_asks():
            return True
        raise TypeError(
            f"{self!r} has no truth value: it chooses leaves once it gets parameters. Write ~a for `not a`, a & b for "
            "`a and b`, a | b for `a or b`."
        )

    def __repr__(self) -> str:
        if self._name is not None or self.made_by is None:
            return self._name or f"Selection({written(self._choose)})"
        sign = _SIGNS.get(self.made_by.function)
        if sign is None:
            return str(self.made_by)
        strength, between = sign
        operands = [
            f"({operand!r})" if isinstance(operand, Selection) and operand._strength() < least else written(operand)
            for least, operand in enumerate(self.made_by.args, start=strength)
        ]
        return f"~{operands[0]}" if len(operands) == 1 else between.join(operands)

    def _strength(self) -> int:
        """How strongly what is printed is held together."""
        return _SIGNS.get(self.made_by.function, _ATOM)[0] if self.made_by else _ATOM[0]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._name or super().__reduce_ex__(protocol)


_SIGNS: dict[Any, tuple[int, str]] = {operator.or_: (0, " | "), operator.and_: (1, " & "), operator.invert: (2, "~")}
_ATOM = (3, "")


def dimensions(params: Params) -> list[int]:
    """The number of dimensions of each leaf."""
    leaves = tree_leaves(params)
    if not all([isinstance(leaf, Tensor) for leaf in leaves]):
        check_params(params)
    return [leaf.ndim for leaf in leaves]


def counted(ndim: int) -> str:
    """A number of dimensions in words."""
    return f"{ndim} dimension{'' if ndim == 1 else 's'}"


def hidden(node: Any) -> bool:
    """Whether an outer mask left leaves out, so that a glob may rightly match none of the rest."""
    opened = level(node)
    return isinstance(node, Absent) or (opened is not None and any(hidden(child) for child in opened[1]))


def _of_matrices(params: Params) -> list[bool]:
    found = dimensions(params)
    if len(found) > 1 and min(found) > 1:
        _look_for_stacks(params)
    return [ndim >= 2 for ndim in found]


def _look_for_stacks(params: Params) -> None:
    """Raise an error for what can only be stacked members, a bias of two dimensions; warn of what looks like them.

    These have leaves of one first size, and biases of the shape with which weights begin: (members, units).
    """
    leaves = tree_leaves(params)
    if any([len(leaf) != len(leaves[0]) for leaf in leaves]):
        return
    begins = {tuple(leaf.shape[:2]) for leaf in leaves if leaf.ndim > 2}
    for name, leaf in zip(tree_paths(params), leaves, strict=True):
        said = (
            f"matrices got '{name}' of shape {tuple(leaf.shape)}, and all leaves have {len(leaf)} entries along the "
            "first dimension: stacked members, whose biases look like matrices? Take stacked(matrices), or call inside "
            "vmap or ensemble. If these are no stacks, take select(min_ndim=2)."
        )
        last = name.split(".")[-1]
        if last == "bias" or (leaf.ndim == 2 and "bias" in last.split("_")):  # As those of attention and recurrence.
            raise ValueError(said)
        if leaf.ndim == 2 and tuple(leaf.shape) in begins and leaf.shape[0] != leaf.shape[1]:
            warn_user(said)
            return


matrices = Selection(
    _of_matrices,
    name="matrices",
    facts=lambda params: [counted(ndim) for ndim in dimensions(params)],
    doc="""A mask that is True for leaves of two or more dimensions.

    These are the weights of linear, convolution and embedding layers, not biases or the scales of normalization
    layers. The same as `select(min_ndim=2)`, but for stacked members, which are refused where a bias gives them away,
    and warned of where a leaf looks like one: `stacked(matrices)` is for them.

    Example:
        >>> matrices({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
        {'weight': True, 'bias': False}
    """,
)
