"""Seeing what a penalty did: a table of all leaves, of what became of them, and the value of each term of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from funcreg.core._typing import Hyper, Mask, Params
from funcreg.core.checks import check_params, shared_leaf
from funcreg.core.construction import written
from funcreg.core.leafwise import global_norm
from funcreg.core.masks import keep, listed, mask_bools
from funcreg.core.notices import warn_user
from funcreg.core.ranges import flags
from funcreg.core.selection import reasons
from funcreg.core.sharding import whole
from funcreg.core.tree import flatten, tree_leaves, tree_paths
from funcreg.core.undocumented import is_traced, is_transformed
from funcreg.networks.deployment import computed_parameters
from funcreg.regularizers.composition import Term
from funcreg.regularizers.penalty import Penalty
from funcreg.transforms.per_leaf import PerLeaf
from funcreg.transforms.regularizing import check_penalty

#: Numbers of one leaf by name.
Row: TypeAlias = dict[str, Any]
#: A header, and what stands below it for a row.
_Column: TypeAlias = tuple[str, Callable[[Row], str]]


@dataclass(frozen=True, repr=False)
class Report:
    """What `report` and `compare` return: rows as plain dicts, which print as a table.

    Args:
        rows: A dict for each leaf, with numbers of Python; None where a leaf has no such number.
        total: The same for all leaves together.
        columns: What is printed: headers, and functions from a row to a text.

    Example:
        >>> report({"weight": torch.zeros(2, 3)}).rows[0]["dead_columns"]
        3
    """

    rows: list[Row]
    total: Row
    columns: tuple[_Column, ...] = field(compare=False)

    def __str__(self) -> str:
        cells = [[header for header, _ in self.columns]]
        cells += [[write(row) for _, write in self.columns] for row in [*self.rows, self.total]]
        shown = [column for column in zip(*cells, strict=True) if any(column[1:])]
        widths = [max(map(len, column)) for column in shown]
        lines = []
        for line in zip(*shown, strict=True):
            first, *rest = zip(line, widths, strict=True)
            lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip())
        return "\n".join(lines)

    __repr__ = __str__


# One tree


def report(
    params: Params | nn.Module,
    penalty: Penalty | None = None,
    *hyper: Hyper,
    strength: Hyper = 1.0,
    mask: Mask | None = None,
    rank: bool = True,
    **options: Any,
) -> Report:
    r"""What is in each leaf: exact zeros, dead rows and columns, norms, rank, and its share of a penalty.

    A row is dead if all entries of one index of the first dimension are 0 (a unit, a filter), a column if those of one
    index of the second are (an input). The effective rank is :math:`\exp(-\sum_i p_i \log p_i)`,
    :math:`p_i = \sigma_i / \sum_j \sigma_j`, of the singular values of a leaf as a matrix of rows. A penalty that
    couples leaves has no value on one of them: there the share is that of :math:`\langle w, \nabla g(w) \rangle`,
    which for norms adds up to the value.

    Args:
        params: Tree of tensors, or a module: its parameters, where it is pruned or parametrized the weights
            that it computes with.
        penalty: A penalty whose value is shared out; by default none.
        hyper: Its hyperparameters.
        strength: What multiplies it: number of at least 0, tensor, or a tree of them like the parameters.
        mask: Leaves on which the penalty acts. All leaves are listed.
        rank: Whether effective ranks are computed, which takes long for matrices of many thousand rows and columns.
        options: Static options of the penalty, such as `dim`.

    Raises:
        TypeError: It is called inside of `vmap`, `grad` or compiled code, where there are no numbers to read.

    Example:
        >>> params = {"weight": torch.tensor([[3.0, 0.0], [0.0, 0.0]]), "bias": torch.tensor([1.0, 0.0])}
        >>> print(report(params, l1, strength=0.1, mask=matrices))
                shape  entries   zeros  dead rows  dead columns  l1 norm  l2 norm  effective rank  penalty  share
        weight  2 x 2        4  75.0 %     1 of 2        1 of 2        3        3             1.0      0.3  100 %
        bias        2        2  50.0 %                                 1        1                        0    0 %
        total                6  66.7 %     1 of 2        1 of 2        4     3.16                      0.3  100 %

    References:
        Roy & Vetterli, *The effective rank: a measure of effective dimensionality*, 2007.
    """
    flags(rank=rank)
    params = readable("report", computed_parameters(params))
    rows = [_described(name, w, rank) for name, w in zip(tree_paths(params), tree_leaves(params), strict=True)]
    if penalty is None:
        if hyper or options or mask is not None or not (isinstance(strength, (int, float)) and strength == 1):
            raise TypeError("report got hyperparameters, a strength, a mask or options, and no penalty that takes them")
    else:
        check_penalty(penalty, hyper, options)
        for row, (value, share) in zip(rows, _shares(params, penalty, hyper, strength, mask, options), strict=True):
            row.update(penalty=value, share=share)
    return Report(_as_written(rows, params), _summed(rows), _COLUMNS)


def readable(name: str, params: Params | nn.Module) -> Params:
    """Parameters whose numbers can be read, without their history."""
    params = _parameters(params)
    for path, w in zip(tree_paths(params), tree_leaves(params), strict=True):
        if isinstance(w, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ValueError(f"'{path}' has no shape yet; call its module once before {name} reads it")
        if isinstance(w, Tensor) and w.is_meta:
            raise ValueError(f"'{path}' is on the device meta, where tensors have no numbers for {name} to read")
    check_params(params)
    leaves, rebuild = flatten(params)
    if not leaves:
        raise ValueError(f"{name} got no parameters, so that there would be no rows; expected at least one tensor")
    if is_traced() or is_transformed(lambda: leaves):
        raise TypeError(
            f"{name} reads numbers from tensors, and was called inside of vmap, grad or compiled code, where there are "
            "none. penalties(params, ...) works there; of an ensemble, give the parameters of one member."
        )
    return rebuild([w.detach() for w in leaves])


def _parameters(params: Params | nn.Module) -> Params:
    return dict(params.named_parameters()) if isinstance(params, nn.Module) else params


def _as_written(rows: list[Row], params: Params) -> list[Row]:
    """Rows in the order in which a dict has its leaves; trees sort them."""
    order = {name: i for i, name in enumerate(params)} if isinstance(params, dict) else {}
    return sorted(rows, key=lambda row: order.get(row["name"], 0))


def _described(name: str, w: Tensor, rank: bool) -> Row:
    w = whole(w)  # One sharded leaf at a time.
    exact = {} if w.device.type == "mps" else {"dtype": torch.float64}
    dead: Row = {}
    alive = w != 0
    for key, dim in (("rows", 0), ("columns", 1)):
        has = w.ndim > 1
        dead[f"dead_{key}"] = int((~alive.transpose(0, dim).flatten(1).any(1)).sum()) if has else None
        dead[key] = w.shape[dim] if has else None
    return {
        "name": name,
        "shape": tuple(w.shape),
        "numel": w.numel(),
        "zeros": w.numel() - int(alive.sum()),
        **dead,
        "l1": w.abs().sum(**exact).item(),
        "l2_norm": global_norm(w).item(),
        "effective_rank": _effective_rank(w) if rank and w.ndim > 1 else None,
    }


def _effective_rank(w: Tensor) -> float:
    """From the eigenvalues of the smaller Gram matrix: errors of 1e-8 of the largest singular value weigh nothing."""
    matrix = w.flatten(1).to("cpu" if w.device.type == "mps" else w.device)
    matrix = matrix.to(torch.complex128 if w.is_complex() else torch.float64)
    if not matrix.numel() or not matrix.any():
        return 0.0
    if not bool(torch.isfinite(torch.view_as_real(matrix) if w.is_complex() else matrix).all()):
        return math.nan
    matrix = matrix / matrix.abs().amax()  # Squares stay in range.
    gram = matrix @ matrix.mH if matrix.shape[0] <= matrix.shape[1] else matrix.mH @ matrix
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()


def _shares(
    params: Params, penalty: Penalty, hyper: Any, strength: Hyper, mask: Mask | None, options: dict[str, Any]
) -> list[tuple[float, float | None]]:
    """For each leaf what it adds to a penalty, and which share of it that is, None if the whole is 0 or infinite."""
    term = Term(penalty, (strength,), hyper, tuple(options.items()), mask)
    parts = [sum(column) for column in zip(*(_parts(params, each) for each in term.parts()), strict=True)]
    whole = sum(parts)
    known = math.isfinite(whole) and whole != 0
    return [(part, part / whole if known else None) for part in parts]


def _parts(params: Params, term: Term) -> list[float]:
    """For each leaf what it adds to a penalty that is no sum of others."""
    leaves = tree_leaves(params)
    if not term.penalty.couples_leaves:
        places = enumerate(term.places(params))
        alone = [[i == j for j in range(len(leaves))] if acts else None for i, acts in places]
        return [0.0 if here is None else term.value(keep(params, here)).item() for here in alone]
    value = term.value(params).item()
    slopes = [
        (whole(w).conj() * whole(g)).sum().real.item()
        for w, g in zip(leaves, tree_leaves(term.grad(params)), strict=True)
    ]
    scale = value / sum(slopes) if sum(slopes) else 0.0  # 1 for norms.
    return [scale * slope for slope in slopes]


def _summed(rows: Sequence[Row]) -> Row:
    total: Row = {"name": "total", "shape": None}
    for key in ("numel", "zeros", "dead_rows", "rows", "dead_columns", "columns", "l1", "penalty", "share"):
        values = [row[key] for row in rows if row.get(key) is not None]
        total[key] = sum(values) if values else None
    total["l2_norm"] = math.hypot(*(row["l2_norm"] for row in rows))
    total["effective_rank"] = None
    return total


# Two trees


def compare(before: Params | nn.Module, after: Params | nn.Module, *, rank: bool = True) -> Report:
    r"""What became of each leaf: its zeros, dead rows, norms and rank before and after, and how far it moved.

    Rows have the numbers of `report`, once with `_before` and once with `_after` in their names, and `change`,
    :math:`\|w' - w\|_2 / \|w\|_2`. A leaf may have lost rows or columns in between (`remove_dead`); then it has none.

    Args:
        before: Tree of tensors, or a module. Of a module that an optimizer trains it is a copy, made before.
        after: The same later: leaves of the same names.
        rank: Whether effective ranks are computed.

    Raises:
        ValueError: A leaf of one is not in the other.

    Example:
        >>> before = {"w": torch.tensor([[3.0, 4.0], [0.5, 0.0]])}
        >>> print(compare(before, {"w": torch.tensor([[3.0, 3.5], [0.0, 0.0]])}, rank=False))
               shape             zeros         dead rows  dead columns     l1 norm       l2 norm  change
        w      2 x 2  25.0 % -> 50.0 %  0 of 2 -> 1 of 2        0 of 2  7.5 -> 6.5  5.02 -> 4.61  14.1 %
        total         25.0 % -> 50.0 %  0 of 2 -> 1 of 2        0 of 2  7.5 -> 6.5  5.02 -> 4.61  14.1 %
    """
    flags(rank=rank)
    before, after = (readable("compare", computed_parameters(tree)) for tree in (before, after))
    say_same_memory("compare", before, after)
    first, second = (dict(zip(tree_paths(tree), tree_leaves(tree), strict=True)) for tree in (before, after))
    for some, others, here, there in ((first, second, "before", "after"), (second, first, "after", "before")):
        for name in some:
            if name not in others:
                raise ValueError(f"leaf '{name}' of {here} is not in {there}, whose leaves are {listed(others)}")
    pairs = [(_described(name, first[name], rank), _described(name, second[name], rank)) for name in first]
    rows = [_joined(old, new, _change(first[old["name"]], second[old["name"]])) for old, new in pairs]
    moved = [first[name].shape == second[name].shape for name in first]
    change = None
    if all(moved):
        leaves = [(first[name], second[name]) for name in first]
        change = _ratio(
            math.hypot(*(_distance(a, b) for a, b in leaves)), math.hypot(*(global_norm(a).item() for a, _ in leaves))
        )
    totals = (_summed([old for old, _ in pairs]), _summed([new for _, new in pairs]))
    return Report(_as_written(rows, before), _joined(*totals, change), _COMPARED)


def say_same_memory(name: str, before: Params, after: Params) -> None:
    """Warn of weights before and after a training that lie in the same memory, as `detach()` gives them."""
    pairs = [(a, b) for a, b in zip(tree_leaves(before), tree_leaves(after), strict=False) if a.ndim and a.numel()]
    if pairs and all([shared_leaf(a, b) is not None for a, b in pairs]):
        warn_user(
            f"{name} got weights of before and after that lie in the same memory: both are what they are now, for an "
            "optimizer writes into the parameters of a module. Keep a copy before training, as by "
            "copy.deepcopy(model) or w.detach().clone()."
        )


def _joined(old: Row, new: Row, change: float | None) -> Row:
    numbers = {
        f"{key}_{when}": row.get(key) for key in old if key != "name" for when, row in (("before", old), ("after", new))
    }
    return {"name": old["name"], **numbers, "change": change}


def _distance(a: Tensor, b: Tensor) -> float:
    a = whole(a)
    return global_norm(whole(b).to(a.device, a.dtype) - a).item()


def _change(a: Tensor, b: Tensor) -> float | None:
    return _ratio(_distance(a, b), global_norm(a).item()) if a.shape == b.shape else None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else 0.0 if not part else None


# Terms of a loss


def penalties(
    params: Params | nn.Module, components: Mapping[str, Any] | Penalty, *, mask: Mask | None = None
) -> dict[str, Any]:
    r"""The values of several penalties by name, :math:`\{n: g_n(w)\}`, for a loss and for what is logged beside it.

    It works inside `grad` (with `has_aux=True`, say), `vmap` and compiled code.

    Args:
        params: Tree of tensors, or a module, whose parameters are taken with their history.
        components: From names to penalties, scaled or not, with hyperparameters given; or a penalty that `per_leaf`
            made, whose names are its patterns.
        mask: Leaves on which all of them act; by default each acts on its own.

    Raises:
        ValueError: There is no component.
        TypeError: A component is no penalty, or lacks hyperparameters.

    Example:
        >>> params = {"weight": torch.tensor([[3.0, -4.0], [0.0, 0.0]])}
        >>> parts = penalties(params, {"l1": 0.1 * l1, "rows": group_lasso, "elastic": elastic.given(0.1, rho=0.5)})
        >>> parts
        {'l1': tensor(0.7000), 'rows': tensor(5.), 'elastic': tensor(0.9750)}
        >>> sum(parts.values())  # What a loss adds.
        tensor(6.6750)
    """
    if isinstance(components, PerLeaf):
        return components.parts(_parameters(params), mask)
    if not isinstance(components, Mapping):
        raise TypeError(f"components is {components!r}; expected a dict from names to penalties, such as {{'l1': l1}}")
    if not components:
        raise ValueError("components is empty, so that there would be no values; expected at least one penalty")
    params = _parameters(params)
    values = {}
    for name, penalty in components.items():
        if not isinstance(penalty, Penalty):
            raise TypeError(f"component '{name}' is {penalty!r}; expected a Penalty, such as elastic.given(0.1, 0.5)")
        try:
            values[name] = penalty(params, mask=mask)
        except (TypeError, ValueError) as error:
            raise type(error)(f"at component '{name}': {error}") from error
    return values


# Masks


def explain(what: Any, params: Params | nn.Module | None = None) -> Any:
    r"""Which leaves a mask chooses, or which part of `per_leaf` each belongs to, leaf by leaf, and why.

    Masks that `select`, `matrices` and `no_bias_norm_embed` make, and those made of them with `&`, `|` and `~`, say
    what decided: the pattern that matched, the dimensions or the layer. A tree of bools or a function of your own has
    no reasons. Any object with a method `explain` is asked itself. Rows are plain dicts, as `.rows`.

    Args:
        what: A mask, a penalty that `per_leaf` made, or an object with a method `explain`.
        params: Tree of tensors, or a module, whose parameters are taken.

    Example:
        >>> params = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}
        >>> explain(select("fc.*") & ~select("*.bias"), params)
                   shape  entries  chosen                                      why
        fc.weight  2 x 3        6     yes  matches 'fc.*', does not match '*.bias'
        fc.bias        2        2      no                         matches '*.bias'
        total                   8       6       1 of 2 leaves, 75 % of the entries
    """
    own = getattr(what, "explain", None)
    if callable(own) and not isinstance(what, type):
        return own() if params is None else own(params)
    if params is None:
        raise TypeError(
            f"explain got {written(what)} and no parameters; expected explain(mask, params), because a mask chooses "
            "once it gets parameters"
        )
    params = _parameters(params)
    check_params(params)
    leaves, names = tree_leaves(params), tree_paths(params)
    if isinstance(what, PerLeaf):
        owners = what.owners(params)
        chosen = [owner is not None for owner in owners]
        why = ["" if owner is None else what.described(owner) for owner in owners]
    elif isinstance(what, Penalty):
        raise TypeError(f"explain got the {what.kind} {what!r}; expected a mask, or a penalty that per_leaf made")
    else:
        chosen, why = mask_bools(what, params), reasons(what, params)
    rows: list[Row] = [
        {"name": name, "shape": tuple(w.shape), "numel": w.numel(), "chosen": yes, "why": text}
        for name, w, yes, text in zip(names, leaves, chosen, why, strict=True)
    ]
    entries = sum([row["numel"] for row in rows])
    kept = sum([row["numel"] for row in rows if row["chosen"]])
    share = _percent(kept, entries, digits=0)
    total = {"name": "total", "shape": None, "numel": entries, "chosen": kept, "why": ""}
    total["why"] = f"{sum(chosen)} of {len(rows)} leaves{f', {share} of the entries' if share else ''}"
    return Report(_as_written(rows, params), total, _EXPLAINED)


_EXPLAINED: tuple[_Column, ...] = (
    ("", lambda row: row["name"]),
    ("shape", lambda row: _shape(row["shape"])),
    ("entries", lambda row: str(row["numel"])),
    ("chosen", lambda row: ("yes" if row["chosen"] else "no") if row["shape"] is not None else str(row["chosen"])),
    ("why", lambda row: row["why"]),
)


# Tables


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _percent(part: float | None, whole: float | None = 1.0, digits: int = 1) -> str:
    return "" if part is None or not whole else f"{100 * part / whole:.{digits}f} %"


def _of(part: int | None, whole: int | None) -> str:
    return "" if part is None else f"{part} of {whole}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else " x ".join(map(str, shape))


def _rank(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


_COLUMNS: tuple[_Column, ...] = (
    ("", lambda row: row["name"]),
    ("shape", lambda row: _shape(row["shape"])),
    ("entries", lambda row: str(row["numel"])),
    ("zeros", lambda row: _percent(row["zeros"], row["numel"])),
    ("dead rows", lambda row: _of(row["dead_rows"], row["rows"])),
    ("dead columns", lambda row: _of(row["dead_columns"], row["columns"])),
    ("l1 norm", lambda row: _number(row["l1"])),
    ("l2 norm", lambda row: _number(row["l2_norm"])),
    ("effective rank", lambda row: _rank(row["effective_rank"])),
    ("penalty", lambda row: _number(row.get("penalty"))),
    ("share", lambda row: _percent(row.get("share"), digits=0)),
)


def _both(header: str) -> _Column:
    """A column of `report` before and after, once where nothing changed."""
    write = dict(_COLUMNS)[header]

    def both(row: Row) -> str:
        old, new = (
            write({key.removesuffix(f"_{when}"): value for key, value in row.items() if key.endswith(f"_{when}")})
            for when in ("before", "after")
        )
        return old if old == new else f"{old} -> {new}"

    return header, both


_COMPARED: tuple[_Column, ...] = (
    ("", lambda row: row["name"]),
    *map(_both, ("shape", "zeros", "dead rows", "dead columns", "l1 norm", "l2 norm", "effective rank")),
    ("change", lambda row: _percent(row["change"])),
)
