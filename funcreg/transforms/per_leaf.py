"""Another penalty for each kind of leaf, as one penalty."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Params
from funcreg.core.construction import remembered, written
from funcreg.core.leafwise import total
from funcreg.core.masks import Selection, check_mask, hidden, keep, kept_by, listed, mask_leaves
from funcreg.core.selection import named_by, plain_names, rule
from funcreg.core.tree import broadcast, flatten, tree_leaves, tree_paths
from funcreg.core.undocumented import is_compiling
from funcreg.core.wording import type_of
from funcreg.regularizers.composition import Term
from funcreg.regularizers.penalty import Penalty, Sum
from funcreg.transforms.transform import Transform

#: A glob or a regular expression over dotted names, or a mask.
Pattern = str | re.Pattern[str] | Mask


@remembered
def per_leaf(parts: Mapping[Pattern, Penalty] | Sequence[tuple[Pattern, Penalty]]) -> Penalty:
    r"""A penalty of its own for each kind of leaf: a leaf carries that of the first pattern which it matches.

    The whole is a penalty like any other, :math:`\sum_k g_k(w_{L_k})` over leaves :math:`L_k` that do not overlap: its
    gradient and its proximal operator are those of the parts, each on its own leaves, and always exact. Leaves that no
    pattern matches carry no penalty. `per_leaf(...).parts(params)` has the value of each part by its pattern, for logs.

    Args:
        parts: From patterns to penalties with their hyperparameters given: globs over dotted names (`"conv*"`),
            regular expressions that match whole names, selections such as `matrices`, or masks. As pairs, where a mask
            is a dict.

    Raises:
        ValueError: A pattern matches no leaf, or only leaves that patterns before it have taken.
        TypeError: A part is no penalty, or lacks hyperparameters.

    Example:
        >>> layers = per_leaf({"conv*": 0.1 * l1, "head.*": group_lasso.given(strength=0.5)})
        >>> params = {"conv.weight": torch.tensor([3.0, -1.0]), "head.weight": torch.tensor([[3.0, 4.0]])}
        >>> layers(params), layers.parts(params)
        (tensor(2.9000), {'conv*': tensor(0.4000), 'head.*': tensor(2.5000)})
        >>> layers.prox(params, 2.0)
        {'conv.weight': tensor([ 2.8000, -0.8000]), 'head.weight': tensor([[2.4000, 3.2000]])}
        >>> tx = prox_adam(1e-3, layers)
    """
    pairs = list(parts.items()) if isinstance(parts, Mapping) else parts
    if not isinstance(pairs, (list, tuple)) or not all([isinstance(p, tuple) and len(p) == 2 for p in pairs]):
        raise TypeError(
            f"per_leaf got {type_of(parts)}; expected a dict from patterns to penalties, such as "
            '{"conv*": 1e-4 * l1}, or pairs of them'
        )
    if not pairs:
        raise ValueError("per_leaf got no parts, and would have no effect; expected at least one pattern and penalty")
    for pattern, penalty in pairs:
        if not isinstance(pattern, (str, re.Pattern)):
            _check_pattern(pattern, penalty)
        if not isinstance(penalty, Penalty):
            raise TypeError(f"per_leaf has {penalty!r} for {written(pattern)}; expected a Penalty, such as 1e-4 * l1")
    return PerLeaf(parts, tuple((pattern, _given(pattern, penalty)) for pattern, penalty in pairs))


def _check_pattern(pattern: Any, penalty: Any) -> None:
    """Raise a TypeError for what chooses no leaves."""
    number = isinstance(pattern, (int, float, Tensor)) and not isinstance(pattern, bool)
    if pattern is None or number or isinstance(pattern, (Penalty, Transform)):
        swapped = ". Are pattern and penalty swapped?" if isinstance(pattern, Penalty) else ""
        raise TypeError(
            f"per_leaf has the pattern {written(pattern)}; expected a glob over names such as 'conv*', a regular "
            f"expression, a selection such as matrices, or a mask{swapped}"
        )
    check_mask(pattern)


def _given(pattern: Pattern, penalty: Penalty) -> Penalty:
    if isinstance(penalty, Sum):
        return penalty
    try:
        return penalty.given()
    except TypeError as error:
        raise TypeError(f"at pattern {written(pattern)} of per_leaf: {error}") from error


class PerLeaf(Sum):
    """What `per_leaf` returns: a sum whose terms act on leaves that do not overlap."""

    def __init__(self, given: Any, parts: tuple[tuple[Pattern, Penalty], ...]) -> None:
        self._given, self._parts = given, parts
        self._rules = [rule(p) if isinstance(p, (str, re.Pattern)) else None for p, _ in parts]
        super().__init__(tuple(Term(part, mask=self._mask(i)) for i, (_, part) in enumerate(parts)))

    def _mask(self, i: int) -> Selection:
        return Selection(lambda params: [owner == i for owner in self.owners(params)], optional=True)

    @property
    def __name__(self) -> str:
        return "per_leaf" if is_compiling() else f"per_leaf({written(self._given)})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return per_leaf, (self._given,)

    # Leaves and their parts

    def owners(self, params: Params) -> list[int | None]:
        """For each leaf the number of its part, or None; or an error for a part without leaves."""
        names = tuple(tree_paths(params))
        plain = plain_names(names)
        owners: list[int | None] = [None] * len(names)
        partial = hidden(params)  # A mask left leaves out, and so a part may rightly have none.
        for i, ((pattern, _), named) in enumerate(zip(self._parts, self._rules, strict=True)):
            matches = mask_leaves(pattern, params) if named is None else named_by(*named, names, plain)
            free = [match and owner is None for match, owner in zip(matches, owners, strict=True)]
            if names and not any(free) and not partial:
                raise ValueError(_no_leaf(pattern, names, matches))
            owners = [i if mine else owner for mine, owner in zip(free, owners, strict=True)]
        return owners

    def patterns(self) -> list[str]:
        """The patterns as they are written, one for each part."""
        pairs = zip(self._parts, self._rules, strict=True)
        return [written(pattern) if named is None else named[0] for (pattern, _), named in pairs]

    def described(self, i: int) -> str:
        """A part, its pattern and its penalty, as they are written."""
        return f"{self.patterns()[i]}: {self._parts[i][1]!r}"

    def parts(self, params: Params, mask: Mask | None = None) -> dict[str, Tensor]:
        """The value of each part by its pattern, which add up to the value of the whole."""
        chosen = kept_by(mask, params)
        values = [part(own) for part, _, (own,) in self._split(chosen)]
        return dict(zip(self.patterns(), values, strict=True))

    def _split(self, params: Params, *trees: Hyper) -> Iterator[tuple[Penalty, list[bool], list[Any]]]:
        """Each part, its leaves, and the parameters and other trees, or numbers for all, there."""
        owners = self.owners(params)
        wholes = [params, *[_spread(tree, params) for tree in trees]]
        for i, (_, part) in enumerate(self._parts):
            mine = [owner == i for owner in owners]
            yield part, mine, [keep(tree, mine) if spread else tree for tree, spread in _marked(wholes, trees)]

    def _merged(self, params: Params, rest: list[Any], act: Callable[..., Params], *trees: Hyper) -> Params:
        """A tree of what `act` makes of each part and its leaves; other leaves are those of `rest`."""
        leaves = list(rest)
        for part, mine, own in self._split(params, *trees):
            new = iter(tree_leaves(act(part, *own)))
            leaves = [next(new) if here else leaf for here, leaf in zip(mine, leaves, strict=True)]
        return flatten(params)[1](leaves)

    # The three rules

    def _value(self, params: Params) -> Tensor:
        return total([part(own) for part, _, (own,) in self._split(params)])

    def _gradient(self, params: Params) -> Params:
        rest = [torch.zeros_like(w) for w in tree_leaves(params)]
        return self._merged(params, rest, lambda part, own: part.grad(own))

    def _proximal(self, params: Params, step: Hyper, metric: Params | None = None) -> Params:
        return self._merged(
            params,
            tree_leaves(params),
            lambda part, own, step, metric: part.prox(own, step, metric=metric),
            step,
            metric,
        )

    def _residual(self, params: Params, grads: Params, strength: Hyper) -> Params:
        return self._merged(
            params,
            tree_leaves(grads),
            lambda part, own, grads, strength: part.residual(own, grads, strength=strength),
            grads,
            strength,
        )

    def in_metric(self, params: Params, *hyper: Hyper, mask: Mask | None = None, **options: Any) -> bool:
        self.bind(*hyper, **options)
        chosen = kept_by(mask, params)
        return all([part.in_metric(own) for part, _, (own,) in self._split(chosen)])

    def _weighted(self, params: Params, weights: Hyper) -> Tensor:
        return total([part.weighted_value(own, c) for part, _, (own, c) in self._split(params, weights)])

    def _weigh(self, params: Params, weights: Hyper) -> Hyper:
        for part, _, (own, c) in self._split(params, weights):
            part.weigh(own, c)
        return weights


def _is_one(tree: Hyper) -> bool:
    return tree is None or isinstance(tree, (int, float)) or (isinstance(tree, Tensor) and not tree.ndim)


def _spread(tree: Hyper, params: Params) -> Hyper:
    """A tree like the parameters from a prefix of one; what is one number, or None, stays."""
    return tree if _is_one(tree) else flatten(params)[1](broadcast(tree, params, "a hyperparameter"))


def _marked(wholes: list[Any], trees: tuple[Hyper, ...]) -> list[tuple[Any, bool]]:
    """Trees, and whether each has leaves to choose from."""
    return [(wholes[0], True), *[(tree, not _is_one(given)) for tree, given in zip(wholes[1:], trees, strict=True)]]


def _no_leaf(pattern: Pattern, names: Sequence[str], matches: Sequence[bool]) -> str:
    """Why a part of `per_leaf` has no leaf."""
    said = f"per_leaf has {written(pattern)}, which"
    taken = [name for name, match in zip(names, matches, strict=True) if match]
    if taken:
        return (
            f"{said} matches {listed(taken)} alone, and patterns before it have taken all of these: a leaf belongs to "
            "the first that it matches. Put it before them."
        )
    text = pattern.replace("*", "") if isinstance(pattern, str) else getattr(pattern, "pattern", "")
    near = difflib.get_close_matches(text, names, 3, 0.4)
    close = f" Do you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{said} matches no leaf; the leaves are {listed(names)}.{close}"
