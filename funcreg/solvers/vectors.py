"""A loss and a penalty on trees as functions of one vector, and of all tensors that they were given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from funcreg.core._typing import Hyper, Mask, Params
from funcreg.core.construction import held_tensors, made_with
from funcreg.core.inputs import at
from funcreg.core.leafwise import product, wide
from funcreg.core.masks import kept_by
from funcreg.core.tree import flatten, leaf_paths, tree_leaves
from funcreg.core.undocumented import has_tangents, is_batched
from funcreg.core.wording import type_of
from funcreg.regularizers.penalty import Penalty, Sum
from funcreg.solvers.certificates import kkt_residual
from funcreg.solvers.graphs import Graphs


@dataclass(frozen=True)
class Flat:
    """A problem in functions of one vector and of all tensors that it was given."""

    read: Callable[[Tensor, Any], Tensor]  # The loss.
    land: Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # The proximal point of a vector, a step and a metric.
    value: Callable[[Tensor, Any], Tensor]  # The penalty.
    residual: Callable[[Tensor, Tensor, Any], Tensor]  # Of a vector and the gradient there.
    begin: Callable[[Any], Tensor]  # The vector at which to begin.
    tree: Callable[[Tensor], Params]
    narrowed: Callable[[Tensor], Flat]  # The problem of some places of the vector, where the others are 0.
    in_metric: bool  # Whether the penalty has a rule in a metric.
    separable: bool  # Whether it is a sum over entries.
    convex: bool  # Whether the penalty is.
    has_rule: bool  # Whether the residual is that of a rule, in units of the gradient.
    tol: float
    max_steps: int
    own: int  # How many of the tensors are parameters.
    names: Callable[[], list[str]]  # What errors call the tensors.
    kept: Tensor | None  # Places of the entries that may move, in a vector of all; None for all.
    #: For each enclosing `vmap`, from the inside out: which tensors have members along their first dimension.
    levels: tuple[tuple[int | None, ...], ...] = ()
    sizes: tuple[int, ...] = ()  # How many members each has.
    #: Graphs of functions of members; None to call them as they are.
    graphs: Graphs | None = None
    quadratic: bool = False  # Whether the loss seems to be, so that it has one Hessian.
    penalty_is_known: bool = True  # Whether all that it computes is known from its name.

    def mapped(self, dims: tuple[int | None, ...], size: int, tensors: list[Tensor]) -> tuple[Flat, list[Tensor]]:
        """The problem of a stack of members, whose tensors have them along their first dimension, and the tensors."""
        levels, sizes = [*self.levels, dims], (*self.sizes, size)
        if len(levels) == 1:
            return replace(self, levels=tuple(levels), sizes=sizes), tensors
        # Mapped over maps, `mse_loss` and others of torch fail where outputs have members and targets have none.
        spread = list(tensors)
        for i in range(len(tensors)):
            shared = [level[i] is None for level in levels]
            x = spread[i]
            if any(shared) and (i < self.own or x.ndim - shared.count(False) <= 1):
                for k in reversed(range(len(levels))):
                    if shared[k]:
                        place = len(levels) - 1 - k
                        x = x.unsqueeze(place).expand(*x.shape[:place], sizes[k], *x.shape[place:])
                        levels[k] = (*levels[k][:i], 0, *levels[k][i + 1 :])
                spread[i] = x
        return replace(self, levels=tuple(levels), sizes=sizes), spread

    def over_members(self, f: Callable[..., Any], name: Hashable = None, tuples: int = 1) -> Callable[..., Any]:
        """A function of some tuples like the tensors, and of what has one entry for each member, for all members.

        Args:
            f: The function for one member.
            name: What it is called among graphs; None for what none is made of.
            tuples: Number of tuples.
        """
        for dims in self.levels:
            f = _vmapped(f, dims, tuples)
        return f if self.graphs is None or name is None else self.graphs.of(name, f, self.kept)


def _vmapped(f: Callable[..., Any], dims: tuple[int | None, ...], tuples: int) -> Callable[..., Any]:
    return lambda *given: vmap(f, in_dims=(*[dims] * tuples, *[0] * (len(given) - tuples)))(*given)


def _has_rule(penalty: Penalty) -> bool:
    if isinstance(penalty, Sum):
        return all([_has_rule(term.penalty) for term in penalty.terms])
    return penalty.has_residual


def _followed(penalty: Penalty, options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors that a penalty holds, as in `c * l1`, and options of them, where there may be derivatives or maps."""
    held = held_tensors(penalty)
    given = {name: x for name, x in options.items() if any([isinstance(leaf, Tensor) for leaf in tree_leaves(x)])}
    tensors = [*held, *[leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]]
    is_followed = any([x.requires_grad or is_batched(x) for x in tensors]) or has_tangents()
    return (held, given) if is_followed else ([], {})


def flat_problem(
    loss: Callable[..., Tensor],
    penalty: Penalty,
    given: tuple[Params, Hyper, tuple[Hyper, ...], tuple[Any, ...]],
    mask: Mask | None,
    options: dict[str, Any],
    tol: float,
    max_steps: int,
) -> tuple[Flat, list[Tensor]]:
    """A problem on a vector, and the tensors that it was given.

    Args:
        loss: From parameters, and what else it takes, to a scalar.
        penalty: A penalty.
        given: Parameters, strength, hyperparameters, and what else the loss takes.
        mask: Leaves on which the penalty acts.
        options: Static options of the penalty.
        tol: Greatest residual of a solution.
        max_steps: Number of steps after which to give up.
    """
    leaves, rebuild = flatten((*given, *_followed(penalty, options)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    own, tree = flatten(given[0])
    dtypes = [w.dtype for w in own]
    dtype = functools.reduce(torch.promote_types, map(wide, dtypes), torch.float32)
    packing = _Packing([w.shape for w in own], [w.numel() for w in own], dtypes, dtype, tree)
    in_metric = penalty.in_metric(given[0], *given[2], mask=mask, **options)
    convex = penalty.is_convex(*given[2], **options)

    def names() -> list[str]:
        rows = zip(("params", "strength", "hyper", "args"), given, strict=True)
        paths = [at(name, path) for name, tree in rows for path in leaf_paths(tree)]
        paths += ["what the penalty holds"] * (len(leaves) - len(paths))
        return [paths[i] for i in places]

    def filled(tensors: Any) -> Any:
        found = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            found[i] = tensor
        return rebuild(found)

    def of_places(kept: Tensor | None) -> Flat:
        part = replace(packing, kept=kept)
        return Flat(
            **_functions(loss, penalty, mask, options, filled, part, in_metric),
            begin=lambda tensors: part.vector(filled(tensors)[0]).clone(),
            tree=lambda x: part.cast(part.unpacked(x)),
            narrowed=lambda some: of_places(some if kept is None else kept.index_select(0, some)),
            in_metric=in_metric,
            separable=penalty.separable is True,
            convex=convex,
            has_rule=_has_rule(penalty),
            tol=tol,
            max_steps=max_steps,
            own=len(own),
            names=names,
            kept=kept,
        )

    return of_places(None), [leaves[i] for i in places]


@dataclass(frozen=True)
class _Packing:
    """A tree as one vector of all its entries, or of those in some places, where the others are 0."""

    shapes: list[torch.Size]
    sizes: list[int]
    dtypes: list[torch.dtype]
    dtype: torch.dtype  # Of the vector.
    tree: Callable[[list[Tensor]], Params]  # From leaves.
    kept: Tensor | None = None  # The places; None for all.

    def vector(self, tree: Params) -> Tensor:
        parts = [w.reshape(-1).to(self.dtype) for w in tree_leaves(tree)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.zeros(0, dtype=self.dtype)
        return whole if self.kept is None else whole.index_select(0, self.kept)

    def unpacked(self, x: Tensor, rest: float = 0.0) -> Params:
        """A tree in the dtype of the vector, with another number in the places that are left out."""
        if self.kept is not None:
            x = x.new_full((*x.shape[:-1], sum(self.sizes)), rest).index_copy(-1, self.kept, x)
        parts = x.split(self.sizes, dim=-1) if len(self.sizes) > 1 else [x] * len(self.sizes)
        rows = zip(parts, self.shapes, strict=True)
        return self.tree([part.reshape((*part.shape[:-1], *shape)) for part, shape in rows])

    def cast(self, point: Params) -> Params:
        """A tree in the dtypes of the parameters."""
        return self.tree([w.to(kind) for w, kind in zip(tree_leaves(point), self.dtypes, strict=True)])


def _functions(
    loss: Callable[..., Tensor],
    penalty: Penalty,
    mask: Mask | None,
    options: dict[str, Any],
    filled: Callable[[Any], Any],
    packing: _Packing,
    in_metric: bool,
) -> dict[str, Any]:
    """The loss and what is asked of the penalty, as functions of a vector and of all tensors that were given."""

    def with_values(tensors: Any) -> tuple[Penalty, Hyper, tuple[Hyper, ...], dict[str, Any]]:
        """The penalty, its strength, hyperparameters and options."""
        _, force, values, _, held, some = filled(tensors)
        return made_with(penalty, iter(held)) if held else penalty, force, values, {**options, **some}

    def read(x: Tensor, tensors: Any) -> Tensor:
        value = loss(packing.cast(packing.unpacked(x)), *filled(tensors)[3])
        if not isinstance(value, Tensor) or value.ndim:
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type_of(value)
            raise ValueError(f"loss returned {came}; expected a tensor without dimensions")
        return value.to(packing.dtype)

    def land(x: Tensor, step: Tensor, metric: Tensor, tensors: Any) -> Tensor:
        at, force, values, static = with_values(tensors)
        point, h = packing.unpacked(x), packing.unpacked(metric, 1.0) if in_metric else None
        whole = product(kept_by(mask, point), step, force)
        return packing.vector(at.prox(point, whole, *values, metric=h, mask=mask, **static))

    def value(x: Tensor, tensors: Any) -> Tensor:
        at, force, values, static = with_values(tensors)
        return at.weighted_value(packing.unpacked(x), force, *values, mask=mask, **static).to(packing.dtype)

    def residual(x: Tensor, slope: Tensor, tensors: Any) -> Tensor:
        at, force, values, static = with_values(tensors)
        point, grads = packing.unpacked(x), packing.unpacked(slope)
        return kkt_residual(point, grads, at, *values, strength=force, mask=mask, **static).to(packing.dtype)

    return {"read": read, "land": land, "value": value, "residual": residual}
