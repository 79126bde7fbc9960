"""Constraints by several linear equations and inequalities at once: sections of boxes, polyhedra.

Which inequalities hold with equality is found by a number of iterations that is fixed, so that nothing branches on a
value; with these the projection is linear, and is computed once more in closed form, with its derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Scalar
from funcreg.core.equations import solved
from funcreg.core.leafwise import exact_dtype
from funcreg.core.ranges import check_numbers, known_true
from funcreg.regularizers.constraint import constraint
from funcreg.regularizers.constraints import bounds_like, check_bounds, clamp
from funcreg.regularizers.grouped import grouped, relative, ungrouped
from funcreg.regularizers.penalties import Dim, group_dims

_AT_LEAST_0 = (0.0, math.inf)


def _beside(x: Scalar, w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A hyperparameter for each entry of a leaf, beside its groups."""
    return grouped(torch.as_tensor(x, dtype=w.dtype, device=w.device).broadcast_to(w.shape), dims)


def _one_a_group(x: Scalar, w: Tensor, dims: tuple[int, ...]) -> Tensor:
    x = torch.as_tensor(x, dtype=w.dtype, device=w.device)
    return _beside(x, w, dims)[..., :1] if x.ndim else x


# Sections of boxes


def _section(x: Tensor, h: Tensor, low: Tensor, high: Tensor, normal: Tensor, offset: Tensor) -> Tensor:
    r"""The point :math:`z_i = \min(\max(x_i - \mu a_i / h_i, l_i), u_i)` with :math:`\langle a, z \rangle = b`.

    The sum falls in :math:`\mu`, and is linear between the places where an entry meets a bound: a bisection over those,
    in their order, finds which entries are free; their :math:`\mu` has a closed form.
    """
    dtype = x.dtype
    x, h, low, high, normal, offset = (each.to(exact_dtype(x)) for each in (x, h, low, high, normal, offset))
    slope, level = normal / h, normal == 0
    at = lambda mu: clamp(torch.where(level, x, x - mu * slope), low, high)
    through = lambda z: torch.where(level, torch.zeros_like(z), normal * z).sum(-1, keepdim=True)
    safe = torch.where(level, torch.ones_like(slope), slope)
    places = torch.cat([(x - low) / safe, (x - high) / safe], -1)
    places = torch.where(torch.cat([level, level], -1), math.inf, places).sort(-1).values
    count = places.shape[-1]
    found = torch.zeros_like(offset * through(x), dtype=torch.int64)  # How many places lie before the root.
    for bit in reversed(range(count.bit_length())):
        tried = found + 2**bit
        mu = places.gather(-1, (tried - 1).clamp(max=count - 1))
        found = torch.where((tried <= count) & (through(at(mu)) >= offset), tried, found)
    before = places.gather(-1, (found - 1).clamp(min=0)).masked_fill(found == 0, -math.inf)
    after = places.gather(-1, found.clamp(max=count - 1)).masked_fill(found == count, math.inf)
    middle = torch.where(
        before == -math.inf, after - 1, torch.where(after == math.inf, before + 1, (before + after) / 2)
    )
    middle = torch.where((before == -math.inf) & (after == math.inf), torch.zeros_like(middle), middle)
    moved = x - torch.where(level, torch.zeros_like(x), middle * slope)
    free = ~level & (moved > low) & (moved < high)
    stiffness = torch.where(free, normal * slope, torch.zeros_like(x)).sum(-1, keepdim=True)
    reached = through(torch.where(free, x, at(middle)))
    mu = (reached - offset) / torch.where(stiffness == 0, torch.ones_like(stiffness), stiffness)
    z = at(torch.where(stiffness == 0, middle, mu))
    # Once more what is missing, which is known to the rounding of what has landed.
    free = ~level & (z > low) & (z < high)
    stiffness = torch.where(free, normal * slope, torch.zeros_like(x)).sum(-1, keepdim=True)
    missing = torch.where(stiffness == 0, 0.0, (offset - through(z)) / torch.where(stiffness == 0, 1.0, stiffness))
    z = torch.where(free, clamp(z + missing * slope, low, high), z)
    # Beyond what the bounds allow the set is empty.
    edges = torch.stack([torch.where(level, torch.zeros_like(x), normal * bound) for bound in (low, high)])
    least, most = (edges.amin(0).sum(-1, keepdim=True), edges.amax(0).sum(-1, keepdim=True))
    slack = (
        64
        * torch.finfo(dtype).eps  # To which bounds are known.
        * (offset.abs() + torch.where(edges.isinf(), 0.0, edges).abs().sum(0).sum(-1, keepdim=True))
    )
    empty = (offset < least - slack) | (offset > most + slack)
    unknown = empty | (x.isnan() & ~level).any(-1, keepdim=True)
    return (torch.where(unknown, torch.full_like(z, math.nan), z) + 0.0).to(dtype)


def _sectioned(
    w: Tensor, h: Tensor | None, lower: Scalar, upper: Scalar, normal: Scalar, offset: Scalar, dim: Dim
) -> Tensor:
    if not w.numel():
        return w.clone()
    dims = group_dims(w, dim)
    x = grouped(w, dims)
    weights = torch.ones_like(x) if h is None else relative(grouped(h, dims))
    low, high, normals = (_beside(value, w, dims) for value in (lower, upper, normal))
    return ungrouped(_section(x, weights, low, high, normals, _one_a_group(offset, w, dims)), w, dims)


def _box_section_metric(
    w: Tensor, h: Tensor, lower: Scalar, upper: Scalar, normal: Scalar = 1.0, offset: Scalar = 0.0, *, dim: Dim = None
) -> Tensor:
    return _sectioned(w, h, lower, upper, normal, offset, dim)


def _box_section_normal(
    w: Tensor,
    g: Tensor,
    slack: Scalar,
    lower: Scalar,
    upper: Scalar,
    normal: Scalar = 1.0,
    offset: Scalar = 0.0,
    *,
    dim: Dim = None,
) -> Tensor:
    low, high = bounds_like(w, lower, upper)
    at_low, at_high = w <= low + slack * low.abs(), w >= high - slack * high.abs()
    # What is left is the way of steepest descent: the nearest direction that stays in the set.
    down = torch.where(at_low & (low > -math.inf), torch.zeros_like(w), torch.full_like(w, -math.inf))
    up = torch.where(at_high & (high < math.inf), torch.zeros_like(w), torch.full_like(w, math.inf))
    return -_sectioned(-g, None, down, up, normal, 0.0, dim)


def _check_box_section(lower: Hyper, upper: Hyper, normal: Hyper, offset: Hyper) -> None:
    check_bounds(lower, upper)


@constraint(metric=_box_section_metric, check=_check_box_section, real=True, residual=_box_section_normal)
def box_section(
    w: Tensor, lower: Scalar, upper: Scalar, normal: Scalar = 1.0, offset: Scalar = 0.0, *, dim: Dim = None
) -> Tensor:
    r"""Intervals and one equation, :math:`l_i \le w_i \le u_i` and :math:`\langle a, w_g \rangle = b`.

    The simplex with bounds: portfolios whose shares have limits, dual variables of support vector machines. The
    projection is exact.

    Args:
        lower: :math:`l`: number, tensor that broadcasts against a leaf, or a tree of them; may be `-math.inf`.
        upper: :math:`u`, at least `lower`; may be `math.inf`.
        normal: :math:`a`: number, tensor that broadcasts against a leaf, or a tree of them.
        offset: :math:`b`: number, tensor that broadcasts against the groups, or a tree of them. One that no point
            within the bounds has leaves an empty set, whose projection is NaN.
        dim: Dimensions that lie inside a group; by default each leaf is one group. See `l2_ball`.

    Raises:
        ValueError: Bounds cross.

    Example:
        >>> box_section.project({"shares": torch.tensor([0.9, 0.5, -1.0])}, 0.0, 0.6, 1.0, 1.0)
        {'shares': tensor([0.6000, 0.4000, 0.0000])}

    References:
        Kiwiel, *Breakpoint searching algorithms for the continuous quadratic knapsack problem*, 2008.
    """
    return _sectioned(w, None, lower, upper, normal, offset, dim)


# Several equations


def _system(w: Tensor, matrix: Any, offset: Any, size: int, name: str) -> tuple[Tensor, Tensor]:
    """A matrix of rows and right-hand sides where the leaf is, or an error that says why they do not fit it."""
    check_numbers(name, matrix)
    check_numbers("offset", offset)
    a = torch.as_tensor(matrix, dtype=w.dtype, device=w.device)
    b = torch.as_tensor(offset, dtype=w.dtype, device=w.device)
    if a.ndim != 2 or a.shape[1] != size:
        raise ValueError(
            f"{name} has shape {tuple(a.shape)}; expected (..., {size}), one row for each condition and one column for "
            f"each entry of a group of this leaf of shape {tuple(w.shape)}. Choose groups with dim=, leaves with mask="
        )
    if b.ndim > 1 or (b.ndim and b.shape[0] not in (1, a.shape[0])):
        raise ValueError(
            f"offset has shape {tuple(b.shape)}; expected one number, or one for each of {a.shape[0]} rows"
        )
    return a, b.expand(a.shape[0])


def _times(rows: Tensor, x: Tensor) -> Tensor:
    """Inner products of a vector with each of some rows."""
    return (rows * x.unsqueeze(-2)).sum(-1)


def _combined(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows * weights.unsqueeze(-1)).sum(-2)  # No product of matrices, whose derivative autocast would round.


def _affine(w: Tensor, h: Tensor | None, matrix: Any, offset: Any, dim: Dim) -> Tensor:
    if not w.numel():
        return w.clone()
    dims = group_dims(w, dim)
    x = grouped(w, dims)
    rows, offsets = _system(w, matrix, offset, x.shape[-1], "matrix")
    root = torch.ones_like(x[..., :1]) if h is None else relative(grouped(h, dims)).sqrt()
    z = _held(x * root, *_of_length_1(rows / root.unsqueeze(-2), offsets), torch.ones_like(offsets, dtype=torch.bool))
    return ungrouped(z / root, w, dims)


def _affine_metric(w: Tensor, h: Tensor, *, matrix: Any, offset: Any = 0.0, dim: Dim = None) -> Tensor:
    return _affine(w, h, matrix, offset, dim)


def _affine_normal(w: Tensor, g: Tensor, slack: Scalar, *, matrix: Any, offset: Any = 0.0, dim: Dim = None) -> Tensor:
    return _affine(g, None, matrix, 0.0, dim)


def _off(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """By how much left sides exceed right ones, and how much of that may be rounding."""
    sizes = a.abs().sum(-1) * x.abs().amax(-1, keepdim=True) + b.abs()
    return _times(a, x) - b, 64 * torch.finfo(x.dtype).eps * sizes


def _no_affine_set(w: Tensor, *, matrix: Any, offset: Any = 0.0, dim: Dim = None) -> Tensor:
    x = grouped(_affine(w, None, matrix, offset, dim), group_dims(w, dim))
    off, rounding = _off(x, *_system(w, matrix, offset, x.shape[-1], "matrix"))
    return (off.abs() > rounding).any().expand(w.shape)


@constraint(metric=_affine_metric, real=True, missed=_no_affine_set, residual=_affine_normal)
def affine_set(w: Tensor, *, matrix: Any, offset: Any = 0.0, dim: Dim = None) -> Tensor:
    r"""Several linear equations, :math:`A w_g = b`: `hyperplane` of more than one.

    Rows of the matrix may depend on each other. If equations contradict each other, the set is empty: there is no
    projection, and the value of what comes back is infinite.

    Args:
        matrix: :math:`A`: a matrix with one row for each equation and one column for each entry of a group.
        offset: :math:`b`: number, or one for each equation.
        dim: Dimensions that lie inside a group; by default each leaf is one group. See `l2_ball`.

    Raises:
        ValueError: The matrix does not fit the groups of a leaf.

    Example:
        >>> matrix = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0]])
        >>> affine_set.project({"weight": torch.tensor([1.0, 2.0, 6.0])}, matrix=matrix, offset=[3.0, 0.0])
        {'weight': tensor([-0.5000, -0.5000,  4.0000])}

    References:
        Goldstein, *Convex programming in Hilbert space*, 1964.
    """
    return _affine(w, None, matrix, offset, dim)


# Several inequalities


def _nearest(x: Tensor, rows: Tensor, offsets: Tensor, equal: Tensor) -> Tensor:
    r"""The point :math:`x - C^\top \lambda` nearest to :math:`x` with :math:`C z \le d`, and equality where asked for.

    The dual problem has multipliers of at least 0, and is solved by the active set method of Lawson and Hanson. Each
    step solves for the active ones; then either adds the condition that is broken most, or, where a multiplier would
    be negative, goes as far as none is and drops that one. All problems of a batch take equally many steps: until no
    condition comes or goes, where numbers can be read.
    """
    rows, offsets = _of_length_1(rows, offsets)
    gram = rows @ rows.mT
    pull, rounding = _off(x, rows, offsets)
    active = equal.expand(pull.shape)
    multipliers = torch.zeros_like(pull)
    places = torch.arange(pull.shape[-1], device=x.device)
    for _ in range(3 * pull.shape[-1] + 1):
        solved = _tied(gram, pull, active)
        negative = active & ~equal & (solved <= 0)
        stuck = negative.any(-1, keepdim=True)
        gap = torch.where(negative, multipliers - solved, torch.ones_like(solved))
        reach = torch.where(negative, multipliers / torch.where(gap == 0, torch.ones_like(gap), gap), math.inf)
        furthest = reach.amin(-1, keepdim=True)
        part = torch.where(stuck, furthest, torch.ones_like(furthest))
        dropped = negative & (reach <= furthest)
        multipliers = torch.where(dropped, torch.zeros_like(pull), multipliers + part * (solved - multipliers))
        over = pull - _times(gram, multipliers)
        broken = torch.where(active | (over <= rounding / 8), -math.inf, over)
        worst = (places == broken.argmax(-1, keepdim=True)) & (broken > 0)
        before, active = active, torch.where(stuck, active & ~dropped, active | worst)
        if known_true(active == before):
            break
    # In closed form once more, for the derivative, and for the last digits.
    z = _held(x, rows, offsets, active & (equal | (_tied(gram, pull, active) > 0)))
    return torch.where(x.isnan().any(-1, keepdim=True), torch.full_like(z, math.nan), z) + 0.0


def _of_length_1(rows: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    lengths = (rows * rows).sum(-1).sqrt()
    unit = torch.where(lengths == 0, torch.ones_like(lengths), lengths)
    return rows / unit.unsqueeze(-1), offsets / unit


def _held(x: Tensor, rows: Tensor, offsets: Tensor, active: Tensor) -> Tensor:
    """The nearest point where the active conditions hold with equality; thrice, against rounding."""
    gram = rows @ rows.mT
    for _ in range(3):
        x = x - _combined(rows, _tied(gram, _times(rows, x) - offsets, active))
    return x


def _tied(gram: Tensor, pull: Tensor, active: Tensor) -> Tensor:
    """The multipliers with which the active conditions hold with equality; those of the others are 0."""
    both = active.unsqueeze(-1) & active.unsqueeze(-2)
    # Conditions may depend on each other: a little is added.
    little = torch.where(active, 64 * torch.finfo(gram.dtype).eps, 1.0).to(gram.dtype)
    stiff = torch.where(both, gram, torch.zeros_like(gram)) + torch.diag_embed(little)
    found = solved(stiff, torch.where(active, pull, torch.zeros_like(pull)))
    return torch.where(active, found, torch.zeros_like(pull))


def _conditions(w: Tensor, size: int, matrix: Any, offset: Any, equations: Any) -> tuple[Tensor, Tensor, Tensor]:
    """All rows and right-hand sides, and which of them are equations."""
    rows, bounds = _system(w, matrix, offset, size, "matrix")
    equal = torch.zeros_like(bounds, dtype=torch.bool)
    if equations is None:
        return rows, bounds, equal
    if not isinstance(equations, (tuple, list)) or len(equations) != 2:
        raise ValueError("equations is no pair; expected a matrix and an offset, as in equations=(A, b)")
    a, b = _system(w, equations[0], equations[1], size, "the matrix of equations")
    return torch.cat([a, rows]), torch.cat([b, bounds]), torch.cat([torch.ones_like(b, dtype=torch.bool), equal])


def _within(w: Tensor, h: Tensor | None, matrix: Any, offset: Any, equations: Any, dim: Dim) -> Tensor:
    if not w.numel():
        return w.clone()
    dims = group_dims(w, dim)
    x = grouped(w, dims)
    rows, bounds, equal = _conditions(w, x.shape[-1], matrix, offset, equations)
    if h is None:
        return ungrouped(_nearest(x, rows, bounds, equal), w, dims)
    root = relative(grouped(h, dims)).sqrt()
    return ungrouped(_nearest(x * root, rows / root.unsqueeze(-2), bounds, equal) / root, w, dims)


def _polyhedron_metric(
    w: Tensor, h: Tensor, *, matrix: Any, offset: Any = 0.0, equations: Any = None, dim: Dim = None
) -> Tensor:
    return _within(w, h, matrix, offset, equations, dim)


def _polyhedron_normal(
    w: Tensor, g: Tensor, slack: Scalar, *, matrix: Any, offset: Any = 0.0, equations: Any = None, dim: Dim = None
) -> Tensor:
    if not w.numel():
        return g.clone()
    dims = group_dims(w, dim)
    x = grouped(w, dims)
    rows, bounds, equal = _conditions(w, x.shape[-1], matrix, offset, equations)
    off, rounding = _off(x, rows, bounds)
    met = equal | (off >= -rounding)
    # What is left is the way of steepest descent: the nearest direction that breaks no condition that is met.
    rows = torch.where(met.unsqueeze(-1), rows, torch.zeros_like(rows))
    way = _nearest(-grouped(g, dims), rows, torch.zeros_like(off), equal)
    return ungrouped(-way, w, dims)


def _no_polyhedron(w: Tensor, *, matrix: Any, offset: Any = 0.0, equations: Any = None, dim: Dim = None) -> Tensor:
    x = grouped(_within(w, None, matrix, offset, equations, dim), group_dims(w, dim))
    rows, bounds, equal = _conditions(w, x.shape[-1], matrix, offset, equations)
    off, rounding = _off(x, rows, bounds)
    return (torch.where(equal, off.abs(), off) > rounding).any().expand(w.shape)


@constraint(metric=_polyhedron_metric, real=True, missed=_no_polyhedron, residual=_polyhedron_normal)
def polyhedron(w: Tensor, *, matrix: Any, offset: Any = 0.0, equations: Any = None, dim: Dim = None) -> Tensor:
    r"""Several linear inequalities, and equations, :math:`C w_g \le d` and :math:`A w_g = b`.

    The projection finds the conditions that are met by an active set method of three steps for each condition, which is
    almost always enough, and is then exact to rounding. The value tells: it is infinite, also of a projection, where a
    condition is broken by more than rounding. An empty set has no projection. For some dozens of conditions; those of
    hundreds take long.

    Args:
        matrix: :math:`C`: a matrix with one row for each inequality and one column for each entry of a group.
        offset: :math:`d`: number, or one for each inequality.
        equations: :math:`A` and :math:`b`, a pair of the same kind; None for no equation.
        dim: Dimensions that lie inside a group; by default each leaf is one group. See `l2_ball`.

    Raises:
        ValueError: A matrix does not fit the groups of a leaf.

    Example:
        >>> falls = torch.tensor([[-1.0, 1.0, 0.0], [0.0, -1.0, 1.0]])
        >>> polyhedron.project({"weight": torch.tensor([1.0, 3.0, 0.5])}, matrix=falls)
        {'weight': tensor([2.0000, 2.0000, 0.5000])}

    References:
        Lawson & Hanson, *Solving least squares problems*, 1974.
        Boyle & Dykstra, *A method for finding projections onto the intersection of convex sets in Hilbert spaces*,
        1986.
    """
    return _within(w, None, matrix, offset, equations, dim)
