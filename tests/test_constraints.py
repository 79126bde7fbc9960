"""The laws of constraints: each test holds for every row of the table."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from cases import CONSTRAINTS, DEVICE, Layer, assert_equal, draw, draw_fours, flat, known, normal
from scipy.optimize import nnls
from torch.func import grad, jvp, vmap

import funcreg as fr


def rows_where(field):
    chosen = {name: case for name, case in CONSTRAINTS.items() if not getattr(case, field)}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen)


every_constraint = pytest.mark.parametrize("case", CONSTRAINTS.values(), ids=CONSTRAINTS)
every_convex_constraint = rows_where("nonconvex")
every_compiled_constraint = rows_where("uncompiled")
every_constraint_of_infinities = rows_where("finite")


def distance(x, z, metric=None):
    h = torch.ones(()) if metric is None else flat(metric)
    return (h * (flat(z) - flat(x)).abs().square()).sum()


def members(case, near, sizes=(1e-3, 0.1, 1.0)):
    """Allowed trees around a tree: the rule of the row on the tree itself, on neighbours and on others."""
    others = [draw_fours(seed, scale=scale) for seed in range(15) for scale in (0.1, 1.0, 3.0)]
    close = [fr.tree_map(lambda a, d, s=s: a + s * d, near, draw_fours(seed)) for seed in range(10) for s in sizes]
    return [fr.tree_map(case.member, tree) for tree in (near, *close, *others)]


@every_constraint
@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_projections_are_allowed(case, scale):
    z = case.project(draw_fours(scale=scale))
    assert all(case.violation(leaf) <= 1e-14 * max(1.0, scale) for leaf in fr.tree_leaves(z))
    assert case.value(z) == 0


@every_constraint
def test_the_value_is_zero_in_the_set_and_infinite_outside(case):
    trees = [*members(case, draw_fours()), *(draw_fours(seed, scale=5.0) for seed in range(5))]
    outside = [any(case.violation(leaf) > 1e-12 for leaf in fr.tree_leaves(tree)) for tree in trees]
    expected = [math.inf if each else 0.0 for each in outside]
    assert vmap(case.value)(fr.tree_map(lambda *leaves: torch.stack(leaves), *trees)).tolist() == expected
    for first in {expected.index(each) for each in expected}:  # One of each kind alone.
        assert case.value(trees[first]) == expected[first]


@every_constraint
def test_a_projection_of_a_projection_is_itself(case):
    z = case.project(draw_fours(scale=3.0))
    assert_equal(case.project(z), z, rtol=1e-13, atol=1e-14)


@every_constraint
@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_no_allowed_point_is_nearer(case, scale):
    x = draw_fours(scale=scale)
    z = case.project(x)
    least = distance(x, z)
    for member in members(case, x):
        assert distance(x, member) >= least - 1e-12 * max(1.0, least)
        if not case.nonconvex:
            # Seen from the projection, the point and the set lie to different sides.
            assert (flat(x) - flat(z)) @ (flat(member) - flat(z)) <= 1e-11 * scale


@every_constraint
def test_in_small_dimensions_no_allowed_point_of_a_grid_is_nearer(case):
    axis = torch.linspace(-2, 2, 9, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis, axis, axis) + 1e-3
    allowed = vmap(case.member)(grid)
    for x in grid[::331]:
        assert ((allowed - x).square().sum(-1) >= distance(x, case.project(x)) - 1e-12).all()


@every_constraint
def test_the_proximal_operator_is_the_projection_for_every_step(case):
    x = draw_fours()
    for step in (0.0, 0.3, torch.tensor(100.0)):
        assert_equal(case.prox(x, step), case.project(x))


@every_constraint
def test_the_gradient_is_zero(case):
    for params in (draw_fours(), case.project(draw_fours())):
        zeros = fr.tree_map(torch.zeros_like, params)
        assert_equal(case.grad(params), zeros)
        assert_equal(grad(case.value)(params), zeros)
        value, slope = jvp(case.value, (params,), (draw_fours(1),))
        assert value == case.value(params)
        assert slope == 0


@every_convex_constraint
def test_projections_are_firmly_nonexpansive(case):
    for seed in range(10):
        x, y = draw_fours(seed), draw_fours(seed + 100, scale=2.0)
        moved = flat(case.project(x)) - flat(case.project(y))
        assert moved @ moved <= moved @ (flat(x) - flat(y)) + 1e-12


@every_constraint
def test_nan_goes_through(case):
    params = draw_fours()
    params["head"].weight[1, 1] = math.nan
    assert case.value(params).isnan()
    assert case.project(params)["head"].weight[1, 1].isnan()
    assert case.grad(params)["head"].weight[1, 1].isnan()
    assert not flat({"bias": case.project(params)["head"].bias}).isnan().any()


@every_constraint
def test_nan_is_every_entry_whose_nearest_point_depends_on_it(case):
    drawn = fr.tree_map(lambda w: 3 * w, draw_fours())
    params = {"weight": drawn["head"].weight, "bias": drawn["head"].bias}
    metrics = (None, fr.tree_map(lambda w: w.abs() + 0.5, params)) if case.metric else (None,)
    for metric in metrics:
        found = []
        for value in (math.nan, 0.1, 30.0):
            params["weight"][1, 1] = value
            found += [case.project(params, metric=metric)["weight"]]
        nothing, near, far = found
        assert case.ranked or nothing[near != far].isnan().all()


@every_constraint_of_infinities
def test_infinities_have_a_projection(case):
    for entries in ([math.inf, 1.0, -2.0, 0.5], [math.inf, 1.0, math.inf, 0.5], [-math.inf, 0.3, 0.1, -0.2]):
        x = torch.tensor([entries, [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
        z = case.project(x)
        assert not z.isnan().any()
        assert case.value(z) == 0


#: From a unit of the parameters to the hyperparameters in it.
IN_UNITS = {
    fr.simplex: lambda unit: (1.5 * unit,),
    fr.l1_ball: lambda unit: (0.7 * unit,),
    fr.l2_ball: lambda unit: (0.7 * unit,),
    fr.hyperplane: lambda unit: (1.0, 0.6 * unit),
    fr.halfspace: lambda unit: (1.0, -0.6 * unit),
    fr.box_section: lambda unit: (-0.3 * unit, 0.7 * unit, 2.0, 0.6 * unit),
}


@pytest.mark.parametrize(("constraint", "hyper"), IN_UNITS.items(), ids=[str(c) for c in IN_UNITS])
def test_units_of_parameters_and_of_metrics_change_nothing_in_float32(constraint, hyper):
    x, h = draw_fours(dtype=torch.float32), fr.tree_map(lambda w: 10 ** (w / 2), draw_fours(5, dtype=torch.float32))
    expected = constraint.project(x, *hyper(1.0), metric=h)
    for unit, scale in ((1e25, 1e19), (1e25, 1e-19), (1e-25, 1e19), (1e-25, 1e-19)):
        far, metric = fr.tree_map(lambda w, c=unit: w * c, x), fr.tree_map(lambda w, c=scale: w * c, h)
        found = constraint.project(far, *hyper(unit), metric=metric)
        assert_equal(fr.tree_map(lambda z, c=unit: z / c, found), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "ball", [fr.linf_ball, fr.l1_ball, fr.l2_ball, fr.max_norm, fr.spectral_ball, fr.nuclear_ball], ids=str
)
def test_a_ball_of_infinite_radius_changes_nothing_and_derivatives_neither(ball):
    x, weights = draw_fours(), draw_fours(1)
    for radius in (math.inf, torch.tensor(math.inf)):
        assert_equal(ball.project(x, radius), x)
        through = grad(lambda p, r=radius: (flat(ball.project(p, r)) * flat(weights)).sum())
        assert_equal(through(x), weights, rtol=1e-12)


@every_constraint
def test_zero_has_a_projection_and_a_derivative(case):
    zeros = fr.tree_map(torch.zeros_like, draw_fours())
    z = case.project(zeros)
    assert all(case.violation(leaf) <= 1e-14 for leaf in fr.tree_leaves(z))
    through = grad(lambda p: (flat(case.project(p)) * flat(draw_fours())).sum())
    assert flat(through(zeros)).isfinite().all()
    ones = fr.tree_map(torch.ones_like, zeros)  # All ties.
    assert flat(through(ones)).isfinite().all()
    assert all(case.violation(leaf) <= 1e-14 for leaf in fr.tree_leaves(case.project(ones)))


@every_constraint
def test_zeros_are_positive_zeros(case):
    params = fr.tree_map(lambda w: torch.where(w.abs() < 0.5, -0.0, w), draw_fours())
    for scale in (0.01, 1.0, 100.0):
        z = flat(case.project(fr.tree_map(lambda w, s=scale: w * s, params)))
        assert not torch.signbit(z[z == 0]).any()


@every_constraint
def test_derivatives_are_those_of_small_differences(case):
    x, direction = draw_fours(scale=2.0), draw_fours(1)
    along = lambda t: case.project(fr.tree_map(lambda a, d: a + t * d, x, direction))
    zero = torch.zeros((), dtype=torch.float64)
    _, exact = jvp(lambda t: flat(along(t)), (zero,), (zero + 1,))
    expected = (flat(along(1e-6)) - flat(along(-1e-6))) / 2e-6
    torch.testing.assert_close(exact, expected, rtol=1e-7, atol=1e-8)
    back = grad(lambda p: (flat(case.project(p)) * flat(draw_fours(2))).sum())(x)
    torch.testing.assert_close(flat(back) @ flat(direction), exact @ flat(draw_fours(2)), rtol=1e-11, atol=1e-12)


@every_constraint
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_projections_are_allowed_in_every_one(case, dtype):
    params = draw_fours(dtype=dtype, scale=3.0)
    z = case.project(params)
    assert {w.dtype for w in fr.tree_leaves(z)} == {dtype}
    assert case.value(z) == 0
    assert case.value(z).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    hyper = [torch.tensor(h, dtype=torch.float64) if isinstance(h, float) else h for h in case.hyper]
    assert_equal(case.penalty.project(params, *hyper, **case.options), z, rtol=1e-6)


@every_constraint
def test_leaves_of_every_shape_are_taken(case):
    leaves = [
        torch.tensor(0.7),
        torch.zeros(0),
        torch.zeros(0, 4),
        torch.zeros(4, 0),
        torch.randn(4, 4).T,
        torch.randn(2, 3, 4)[:, 1],
    ]
    for leaf in (leaf.double() for leaf in leaves):
        if leaf.ndim < case.least_ndim:
            with pytest.raises(ValueError, match="has no dimension"):
                case.project(leaf)
            continue
        z = case.project(leaf)
        assert z.shape == leaf.shape
        assert case.violation(z) <= 1e-14
        assert case.value(z) == 0
        if case.metric:
            assert_equal(case.project(leaf, metric=torch.ones_like(leaf)), z, rtol=1e-14, atol=1e-15)


@every_constraint
def test_vmap_is_a_loop_over_members(case):
    trees = [{"a": draw_fours(seed)["head"].weight, "b": draw_fours(seed + 9)["head"].bias} for seed in range(3)]
    stacked = fr.tree_map(lambda *leaves: torch.stack(leaves), *trees)
    hyper = [torch.tensor(case.batch(h)) if isinstance(h, float) else h for h in case.hyper]
    dims = tuple(0 if isinstance(h, torch.Tensor) else None for h in hyper)
    project = lambda w, *h: case.penalty.project(w, *h, **case.options)
    slope = grad(lambda w, *h: flat(project(w, *h)).square().sum())
    points = vmap(project, in_dims=(0, *dims))(stacked, *hyper)
    slopes = vmap(slope, in_dims=(0, *dims))(stacked, *hyper)
    values = vmap(lambda w, *h: case.penalty(w, *h, **case.options), in_dims=(0, *dims))(points, *hyper)
    assert not values.any()
    for i, tree in enumerate(trees):
        h = [x[i] if isinstance(x, torch.Tensor) else x for x in hyper]
        member = lambda batch, i=i: fr.tree_map(lambda w: w[i], batch)
        assert_equal(member(points), project(tree, *h), rtol=1e-12, atol=1e-15)
        assert_equal(member(slopes), slope(tree, *h), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@every_compiled_constraint
def test_compiling_the_whole_changes_nothing(case):
    def everything(params):
        through = grad(lambda p: flat(case.project(p)).square().sum())
        return case.value(params), case.grad(params), case.project(params), through(params)

    params = {"w": draw_fours()["head"].weight}
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(params), everything(params), rtol=1e-12, atol=1e-15)


@every_constraint
def test_a_metric_weighs_the_distance(case):
    x, h = draw_fours(), fr.tree_map(lambda w: 10**w, draw_fours(3))
    if not case.metric:
        with pytest.raises(ValueError, match="metric"):
            case.project(x, metric=h)
        return
    z = case.project(x, metric=h)
    assert all(case.violation(leaf) <= 1e-14 for leaf in fr.tree_leaves(z))
    for member in members(case, x):
        assert distance(x, member, h) >= distance(x, z, h) - 1e-12
        if not case.nonconvex:
            assert (flat(h) * (flat(x) - flat(z))) @ (flat(member) - flat(z)) <= 1e-11
    constant = fr.tree_map(lambda w: torch.full_like(w, 4.0), x)
    assert_equal(case.project(x, metric=constant), case.project(x), rtol=1e-12, atol=1e-14)


@every_constraint
def test_a_mask_hides_leaves(case):
    params, mask = draw_fours(scale=3.0), fr.select("head.*")
    head = {"head": params["head"]}
    assert_equal(case.project(params, mask=mask), {**params, "head": case.project(head)["head"]})
    assert case.value(case.project(params, mask=mask), mask=mask) == 0


@every_constraint
def test_complex_entries_keep_their_phase_or_are_refused(case):
    w = {"w": torch.complex(draw_fours()["head"].weight, draw_fours(1)["head"].weight)}
    if not case.complex:
        with pytest.raises(TypeError, match="leaf 'w' is complex"):
            case.project(w)
        return
    z = case.project(w)
    assert case.violation(z["w"]) <= 1e-14
    turned = case.project({"w": w["w"] * 1j})
    assert_equal(turned, {"w": z["w"] * 1j}, rtol=1e-14, atol=1e-15)


@every_constraint
def test_arguments_stay_as_they_were(case):
    params = draw_fours()
    before = copy.deepcopy(params)
    z = case.project(params)
    case.value(params)
    assert_equal(params, before)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(fr.tree_leaves(params), fr.tree_leaves(z), strict=True))


@every_constraint
def test_parameters_stay_allowed_at_the_end_of_a_chain(case):
    params = draw_fours()
    tx = fr.chain(fr.trace(0.9), fr.scale(-0.3), fr.project(case.penalty, *case.hyper, **case.options))
    state = tx.init(params)
    for n in range(5):
        updates, state = tx.update(draw_fours(n), state, params)
        params = fr.apply_updates(params, updates)
        assert all(case.violation(leaf) <= 1e-14 for leaf in fr.tree_leaves(params))
        assert case.value(params) == 0


# Residuals


def residual(case, w, g):
    return case.penalty.residual(w, g, *case.hyper, **case.options)


@every_constraint
def test_the_residual_is_how_a_small_step_downhill_moves(case):
    small = 1e-7
    for seed in range(5):
        g, inside = draw_fours(seed + 50), draw_fours(seed, scale=0.3)
        points = [case.project(draw_fours(seed, scale=2.0))]
        if not case.nonconvex:
            points.append(fr.tree_map(case.member, inside))
        for w in points:
            moved = case.project(fr.tree_map(lambda w, g: w - small * g, w, g))
            expected = fr.tree_map(lambda w, z: (w - z) / small, w, moved)
            assert_equal(residual(case, w, g), expected, rtol=1e-5, atol=1e-6)


@every_constraint
def test_the_residual_is_zero_at_a_solution_and_infinite_outside(case):
    x = draw_fours(scale=2.0)
    w = case.project(x)
    slope = fr.tree_map(lambda a, b: a - b, w, x)
    kkt = lambda w, g: fr.kkt_residual(w, g, case.penalty, *case.hyper, **case.options)
    assert kkt(w, slope) <= 1e-13
    assert kkt(w, fr.tree_map(lambda s, g: s + g, slope, draw_fours(3))) > 1e-2
    outside = [tree for far in (-5, 5) if case.value(tree := fr.tree_map(lambda w, far=far: 3 * w + far, w)) > 0]
    assert outside
    assert all(kkt(tree, slope) == math.inf for tree in outside)
    for dtype in (torch.bfloat16, torch.float32):
        near = case.project(draw_fours(dtype=dtype, scale=2.0))
        assert flat(residual(case, near, draw_fours(1, dtype=dtype))).isfinite().all()


@every_constraint
def test_residuals_compose_with_vmap(case):
    trees = [{"a": case.project(draw_fours(seed)["head"].weight)} for seed in range(3)]
    slopes = [{"a": draw_fours(seed + 9)["head"].weight} for seed in range(3)]
    stacked = [fr.tree_map(lambda *leaves: torch.stack(leaves), *each) for each in (trees, slopes)]
    both = vmap(lambda w, g: residual(case, w, g))(*stacked)
    for i in range(3):
        expected = residual(case, trees[i], slopes[i])
        assert_equal(fr.tree_map(lambda r, i=i: r[i], both), expected, rtol=1e-10, atol=1e-12)


def corners(w, signs=(-1.0, 1.0)):
    """The subgradients of the sum of magnitudes that span all others."""
    choices = [signs if x == 0 else (float(x.sign()),) for x in w]
    return [torch.tensor(corner, dtype=w.dtype) for corner in itertools.product(*choices)]


def units(w, where, sign):
    return [sign * row for row, chosen in zip(torch.eye(len(w), dtype=w.dtype), where, strict=True) if chosen]


# From a point of a set to vectors whose sums with weights of at least 0 are its normals there.
NORMALS = {
    "nonnegative": (fr.nonnegative, (), lambda w: units(w, w == 0, -1.0)),
    "box": (fr.box, (-0.5, 0.5), lambda w: units(w, w == -0.5, -1.0) + units(w, w == 0.5, 1.0)),
    "linf_ball": (fr.linf_ball, (0.5,), lambda w: units(w, w == -0.5, -1.0) + units(w, w == 0.5, 1.0)),
    "l1_ball": (fr.l1_ball, (1.0,), lambda w: corners(w) if w.abs().sum() > 1 - 1e-12 else []),
    "l2_ball": (fr.l2_ball, (1.0,), lambda w: [w] if w.square().sum() > 1 - 1e-12 else []),
    "simplex": (fr.simplex, (1.0,), lambda w: [torch.ones_like(w), -torch.ones_like(w), *units(w, w == 0, -1.0)]),
    "hyperplane": (fr.hyperplane, (1.0, 0.3), lambda w: [torch.ones_like(w), -torch.ones_like(w)]),
    "halfspace": (fr.halfspace, (1.0, 0.3), lambda w: [torch.ones_like(w)] if w.sum() > 0.3 - 1e-12 else []),
    "nonnegative_form": (fr.nonnegative_form(fr.l1), (), lambda w: units(w, w == 0, -1.0)),
    "nonnegative_form of a ridge": (fr.nonnegative_form(fr.anchored_l2), (0.3,), lambda w: units(w, w == 0, -1.0)),
}


@pytest.mark.parametrize("name", NORMALS)
def test_the_residual_is_the_distance_of_the_gradient_from_the_normals(name):
    penalty, hyper, normals = NORMALS[name]
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        x, g = normal(generator, 2, 5)
        w = penalty.prox(x * (0.2 if seed % 4 == 0 else 1.5), 0.3, *hyper)
        slope = g + penalty.grad(w, *hyper)
        if penalty.__name__ == "nonnegative l1":
            slope = g + 1.0  # Also at zero, where the least slope of the magnitude is 0, and the next one 1.
        spanned = normals(w)
        least = nnls(torch.stack(spanned, 1).cpu().numpy(), -slope.cpu().numpy())[1] if spanned else float(slope.norm())
        found = penalty.residual(w, g, *hyper)
        assert abs(float(found.norm()) - least) <= 1e-9
        assert np.isfinite(least)


def test_the_residual_has_the_units_of_the_gradient():
    w, g = torch.tensor([1e-6]), torch.tensor([1.0])
    assert fr.kkt_residual(w, g, fr.nonnegative) == 1
    assert fr.kkt_residual(w, g, fr.nonnegative_form(fr.l1)) == 2
    assert fr.kkt_residual(-w, g, fr.nonnegative) == fr.kkt_residual(-w, g, fr.nonnegative_form(fr.l1)) == math.inf
    assert fr.kkt_residual(0 * w, g, fr.nonnegative) == fr.kkt_residual(0 * w, g, fr.nonnegative_form(fr.l1)) == 0
    assert fr.kkt_residual(0 * w, -2 * g, fr.nonnegative_form(fr.l1)) == 1
    points = (fr.l2_ball, fr.l1_ball, fr.linf_ball, fr.simplex, fr.l2_sphere, fr.spectral_ball, fr.nuclear_ball)
    assert all(fr.kkt_residual(torch.zeros(3), torch.ones(3), set_, 0.0) == 0 for set_ in points)  # A single point.


def test_a_sphere_has_a_point_for_zero():
    w = {"a": torch.zeros(2, 2), "b": torch.zeros(3, dtype=torch.complex64)}
    z = fr.l2_sphere.project(w, 2.0)
    assert_equal(z["a"], torch.ones(2, 2))
    assert fr.l2_sphere(z, 2.0) == 0
    assert fr.l2_sphere.project(torch.zeros(3, 4), dim=1).square().sum(1).tolist() == [1, 1, 1]
    joint = fr.projection_l2_sphere({"a": torch.zeros(2), "b": torch.zeros(2)})
    assert joint["a"].tolist() == joint["b"].tolist() == [0.5, 0.5]
    assert fr.stiefel(fr.stiefel.project(torch.zeros(3, 2))) == 0


@every_constraint
def test_autocast_changes_nothing(case):
    params = draw_fours(dtype=torch.float32)

    def everything():
        through = grad(lambda p: flat(case.project(p)).square().sum())(params)
        left = residual(case, case.project(params), params)
        return case.value(params), case.project(params), through, left

    expected = everything()
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        assert_equal(everything(), expected)


@pytest.mark.parametrize("given", [fr.l1_ball.given(1.0), fr.l1_ball.given(1.0) + fr.nonnegative], ids=repr)
def test_constraints_with_their_numbers_are_constraints_wherever_one_is_expected(given, recwarn):
    params = torch.tensor([2.0, -1.0, 0.5])
    tx = fr.project(given)
    moved = params + tx.update(params, tx.init(params), params)[0]
    assert_equal(moved, given.prox(2 * params, 1.0))
    assert given(moved) == 0
    fr.chain(fr.MultiSteps(fr.sgd(0.1), 2), fr.proximal(given, 0.0))
    assert not recwarn.list
    said = str(fr.describe(fr.chain(fr.adam(0.1), fr.project(given)), params))
    assert "goes to the nearest point of the set" in said
    with pytest.raises(ValueError, match="is the same for all strengths"):
        fr.regularization_path(lambda w: (w - 1).square().sum(), params, given, count=3)
    with pytest.raises(TypeError, match="Use project"):
        fr.add_penalty(given)
    with pytest.raises(AttributeError, match=r"prox\(params, 1.0\) is the nearest point"):
        given.project(params)
    with pytest.raises(TypeError, match=r"constraint is 0.5 \* l1; expected one such as simplex"):
        fr.project(0.5 * fr.l1)


@every_constraint
def test_constraints_pickle_and_copy(case):
    params, given = draw_fours(), case.penalty.given(*case.hyper, **case.options)
    for p, hyper, options in ((case.penalty, case.hyper, case.options), (given, (), {}), (0.5 * given, (), {})):
        for other in (pickle.loads(pickle.dumps(p)), copy.deepcopy(p)):
            assert repr(other) == repr(p)
            assert_equal(other.prox(params, 0.5, *hyper, **options), p.prox(params, 0.5, *hyper, **options))
            assert other(params, *hyper, **options) == p(params, *hyper, **options)


@every_constraint
def test_numbers_out_of_their_bounds_are_refused_also_in_tensors(case):
    params = {"w": draw_fours()["head"].weight}
    for i, name in enumerate([p for p in case.penalty.__signature__.parameters if p != "params"][: len(case.hyper)]):
        least = case.penalty.bounds.get(name, (-math.inf, math.inf))[0]
        for value in (least - 1, math.nan):
            if not math.isinf(value):
                for wrong in (value, known(value), {"w": known(value)}):
                    hyper = [*case.hyper[:i], wrong, *case.hyper[i + 1 :]]
                    with pytest.raises(ValueError, match=f"{value:g}"):
                        case.penalty.project(params, *hyper, **case.options)
                    with pytest.raises(ValueError, match=f"{value:g}"):
                        fr.project(case.penalty, *hyper, **case.options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: fr.n_m_sparsity.project(w, 5, 4), "n of n_m_sparsity with m=4 is 5; expected a number from 0 to 4"),
        (lambda w: fr.n_m_sparsity.project(w, known(5), 4), "n of n_m_sparsity with m=4 is 5"),
        (lambda w: fr.n_m_sparsity.project(w, 1.5, 4), "n of n_m_sparsity is 1.5; expected a whole number"),
        (lambda w: fr.project(fr.n_m_sparsity, 5, 4), "is 5; expected a number from 0 to 4"),
        (lambda w: fr.top_k.project(w, known(0.5)), r"k of top_k is tensor\(0.5\); expected a whole number: a tenth"),
        (
            lambda w: fr.box.project(w, {"w": known([0.0, 2.0, 0.0, 0.0])}, 1.0),
            "at leaf 'w': lower is 2.0 and upper is 1.0",
        ),
        (lambda w: fr.min_max_norm.project(w, 0.5, {"w": 0.25}), "at leaf 'w': shortest is 0.5 and longest is 0.25"),
        (lambda w: fr.project(fr.box, 0.0, known(-1.0)), "lower is 0.0 and upper is -1.0"),
        (lambda w: fr.projection_hypercube(w, known(-1.0)), "lower is 0.0 and upper is -1.0"),
        (lambda w: fr.projection_l1_sphere(w, known(-1.0)), "scale is -1.0"),
        (lambda w: fr.group_lasso(w, weights=known([-1.0])), "weights of group_lasso has the entry -1.0"),
        (lambda w: fr.slope(w, known([1.0, 0.5, 0.5, -0.5])), "weights of slope has the entry -0.5"),
    ],
)
def test_numbers_that_no_set_has_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call({"w": torch.ones(1, 4)})


def test_projected_descent_finds_the_minimum_over_the_set():
    target = torch.tensor([0.5, 0.9, -1.0, 0.2], dtype=torch.float64)
    curvature = torch.tensor([1.0, 3.0, 2.0, 0.5], dtype=torch.float64)
    tx, w = fr.chain(fr.scale(-0.3), fr.project(fr.simplex)), torch.zeros(4, dtype=torch.float64)
    state = tx.init(w)
    for _ in range(300):
        updates, state = tx.update(curvature * (w - target), state, w)
        w = fr.apply_updates(w, updates)
    torch.testing.assert_close(w, fr.simplex.project(target, metric=curvature), rtol=0, atol=1e-13)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_a_sparse_simplex_is_the_nearest_of_all_choices_of_entries(k):
    x = normal(torch.Generator().manual_seed(k), 5, 6)
    found = fr.sparse_simplex.project(x, k, 1.3, dim=-1)
    assert ((found != 0).sum(1) <= k).all()
    torch.testing.assert_close(found.sum(1), torch.full_like(x[:, 0], 1.3), rtol=1e-12, atol=0)
    for row, z in zip(x, found, strict=True):
        near = lambda chosen, row=row: fr.simplex.project(row[list(chosen)], 1.3)
        least = min(
            (row.index_copy(0, row.new_tensor(c).long(), near(c) - row[list(c)]).square().sum())
            for c in itertools.combinations(range(6), k)
        )
        torch.testing.assert_close((row - z).square().sum(), least, rtol=1e-12, atol=0)
    members = fr.sparse_simplex.project(x, torch.tensor([[1.0]] * 2 + [[2.0]] * 3, device=DEVICE), 1.3, dim=-1)
    assert [int((z != 0).sum()) <= n for z, n in zip(members, (1, 1, 2, 2, 2), strict=True)] == [True] * 5


def test_counts_in_a_metric_know_magnitudes_of_any_size():
    w = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    for size, metric in itertools.product((1e-37, 1e-20, 1e20, 1e37), (1e-30, 1.0, 1e30)):
        x, h = size * w, torch.full_like(w, metric)
        assert_equal(fr.top_k.prox(x, 1.0, 1, metric=h), x * (w == 4))
        assert_equal(fr.n_m_sparsity.prox(x, 1.0, 1, 4, metric=h), x * (w == 4))
        assert_equal(fr.group_top_k.prox(x.T, 1.0, 1, metric=h.T), x.T * (w.T == 4))
    h = torch.tensor([[1e30, 1e29, 1e28, 1e27]])
    assert_equal(fr.top_k.prox(1e30 * w, 1.0, 1, metric=h), 1e30 * w * (w == 1))


def test_of_equal_magnitudes_the_first_are_kept():
    w = torch.tensor([1.0, -2.0, 2.0, 2.0, -2.0, 0.0])
    assert fr.top_k.project(w, 2).tolist() == [0, -2, 2, 0, 0, 0]
    assert fr.n_m_sparsity.project(w, 1, 3).tolist() == [0, -2, 0, 2, 0, 0]
    assert not fr.top_k.project(w, 0).any()
    assert fr.top_k.project(w, 9).tolist() == w.tolist()


def test_groups_may_have_radii_of_their_own():
    w, radii = draw_fours()["body"]["filters"].double(), torch.tensor([0.1, 0.4]).double()
    for constraint, size in (
        (fr.l2_ball, lambda x: x.square().sum().sqrt()),
        (fr.l1_ball, lambda x: x.abs().sum()),
        (fr.simplex, lambda x: x.sum()),
    ):
        z = constraint.project(w, radii.reshape(2, 1, 1, 1), dim=...)
        torch.testing.assert_close(torch.stack([size(row) for row in z]), radii)
    counts = fr.top_k.project(w, torch.tensor([1, 3]).reshape(2, 1, 1, 1), dim=...)
    assert (counts != 0).sum((1, 2, 3)).tolist() == [1, 3]


def test_planes_may_have_normals_for_each_leaf():
    params = draw()
    normals = draw(1)
    z = fr.hyperplane.project(params, normals, 0.25)
    for a, x, y in zip(fr.tree_leaves(normals), fr.tree_leaves(params), fr.tree_leaves(z), strict=True):
        torch.testing.assert_close((a * y).sum(), torch.tensor(0.25, dtype=torch.float64))
        moved = (y - x) / a
        torch.testing.assert_close(moved[a != 0], moved[a != 0].mean().expand(moved[a != 0].shape))
    zeros = fr.tree_map(torch.zeros_like, normals)
    assert_equal(fr.hyperplane.project(params, zeros, 1.0), params)
    assert_equal(fr.halfspace.project(params, zeros, 1.0), params)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norms_stay_in_the_range_of_float32(size):
    w = torch.tensor([3 * size, 4 * size])
    torch.testing.assert_close(fr.l2_sphere.project(w), torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(fr.l2_ball.project(w, 2.5 * size), w / 2)
    assert fr.l2_ball(w, 2.5 * size) == math.inf
    assert fr.l2_ball(w, 6 * size) == 0


def test_sums_are_as_exact_for_large_numbers_as_for_small_ones():
    w = torch.tensor([1e8, 1e8 - 8, 3.0])
    assert fr.simplex.project(w, 16.0).tolist() == [12, 4, 0]


def test_empty_sets_and_wrong_arguments_are_refused():
    w = {"w": torch.ones(4)}
    with pytest.raises(ValueError, match=r"lower is 1\.0 and upper is 0\.0"):
        fr.box.project(w, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"lower is 2\.0 and upper is 1\.0"):
        fr.project(fr.box, {"w": 2.0}, {"w": 1.0})
    with pytest.raises(ValueError, match=r"shortest is 2\.0 and longest is 1\.0; expected shortest <= longest"):
        fr.min_max_norm.project(torch.ones(2, 2), 2.0, 1.0)
    with pytest.raises(ValueError, match=r"lower is 2\.0 and upper is 0\.0"):
        fr.box.project(w, known(2.0), known([0.0, 3.0, 3.0, 3.0]))
    # Where numbers are not known, the projection on an empty set is no number.
    batched = vmap(lambda high: fr.box.project(w, 2.0, high))(torch.tensor([[0.0, 3.0, 3.0, 3.0]]))
    assert batched["w"].isnan().tolist() == [[True, False, False, False]]
    for constraint in (fr.l2_ball, fr.l1_ball, fr.linf_ball, fr.simplex, fr.max_norm, fr.l2_sphere, fr.top_k):
        with pytest.raises(ValueError, match="-1"):
            constraint.project(w, -1.0)
    with pytest.raises(ValueError, match=r"at leaf 'w'.*no multiple of m=3"):
        fr.n_m_sparsity.project(w, 2, 3)
    with pytest.raises(ValueError, match="expected a whole number"):
        fr.n_m_sparsity.project(w, 2, torch.tensor(4))
    with pytest.raises(TypeError, match="For a penalty use proximal"):
        fr.project(fr.l1)
    with pytest.raises(TypeError, match="takes radius and the keywords dim; got metrik"):
        fr.l2_ball.project(w, metrik=1)


def test_constraints_look_like_functions():
    assert repr(fr.box) == "<constraint box(params, lower, upper)>"
    assert fr.simplex.__name__ == "simplex"


def test_a_rule_alone_is_a_constraint():
    @fr.constraint
    def symmetric(w):
        return (w + w.mT) / 2

    @fr.constraint()
    def called(w):
        return (w + w.mT) / 2

    w = torch.tensor([[1.0, 2.0], [4.0, 3.0]], device=DEVICE)
    assert_equal(symmetric.project(w), called.project(w))
    assert symmetric(w) == torch.inf
    assert symmetric(symmetric.project(w)) == 0


def test_constraints_may_be_written_by_users_on_trees():
    def same(params, *, metric=None):
        mean = torch.stack([w.mean() for w in fr.tree_leaves(params)]).mean()
        return fr.tree_map(lambda w: mean.expand_as(w).clone(), params)

    tied = fr.Constraint(same)
    params = Layer(torch.tensor([1.0, 3.0]), torch.tensor([4.0]))
    assert tied(params) == math.inf
    assert tied(tied.project(params)) == 0
    assert repr(tied) == "<constraint same(params)>"
    with pytest.raises(TypeError, match="got metric"):
        tied(params, metric=1)

    @fr.constraint(separable=True, real=True)
    def whole(w):
        """Whole numbers."""
        return w.round()

    assert whole.project(torch.tensor([0.7]), metric=torch.ones(1)).tolist() == [1.0]


# Projections of whole trees


def test_projections_of_a_tree_are_those_of_its_leaves_as_one_vector():
    params, normal = draw(), draw(1)
    for joint, single in (
        (fr.projection_simplex, lambda w, s: fr.simplex.project(w, s)),
        (fr.projection_l1_ball, lambda w, s: fr.l1_ball.project(w, s)),
        (fr.projection_l2_ball, lambda w, s: fr.l2_ball.project(w, s)),
        (fr.projection_l2_sphere, lambda w, s: fr.l2_sphere.project(w, s)),
        (fr.projection_linf_ball, lambda w, s: fr.linf_ball.project(w, s)),
        (fr.projection_hypercube, lambda w, s: fr.box.project(w, 0, s)),
        (lambda w, s: fr.projection_hyperplane(w, normal, s), lambda w, s: fr.hyperplane.project(w, flat(normal), s)),
        (lambda w, s: fr.projection_halfspace(w, normal, s), lambda w, s: fr.halfspace.project(w, flat(normal), s)),
        (lambda w, s: fr.projection_box(w, -s, s), lambda w, s: w.clamp(-s, s)),
        (lambda w, s: fr.projection_non_negative(w), lambda w, s: w.relu()),
    ):
        for scale in (0.5, torch.tensor(3.0)):
            assert_equal(flat(joint(params, scale)), single(flat(params), scale))
        scales = torch.tensor([0.5, 3.0])
        both = vmap(lambda s, joint=joint: joint(params, s))(scales)
        for i, s in enumerate(scales):
            assert_equal(fr.tree_map(lambda w, i=i: w[i], both), joint(params, s), rtol=1e-14, atol=1e-15)
        assert flat(grad(lambda p, joint=joint: flat(joint(p, 0.5)).square().sum())(params)).isfinite().all()
        kept = joint(fr.tree_map(lambda w: w.bfloat16(), params), 0.5)
        assert {w.dtype for w in fr.tree_leaves(kept)} == {torch.bfloat16}


def test_the_l1_sphere_is_reached_also_from_zeros():
    for params in (draw(), fr.tree_map(torch.zeros_like, draw())):
        z = fr.projection_l1_sphere(params, 100.0)
        torch.testing.assert_close(flat(z).abs().sum(), torch.tensor(100.0, dtype=torch.float64))


def test_a_tree_along_itself_is_itself():
    params = draw()
    assert_equal(fr.projection_vector(params, fr.tree_map(lambda w: 2 * w, params)), params, rtol=1e-13, atol=1e-14)
    zeros = fr.tree_map(torch.zeros_like, params)
    assert_equal(fr.projection_vector(params, zeros), zeros)
    assert fr.projection_simplex({}) == {}


def test_projections_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="scale is -1"):
        fr.projection_simplex(torch.ones(2), -1)
    with pytest.raises(ValueError, match="radius of l2_ball is -1"):
        fr.projection_l2_ball(torch.ones(2), -1)
    with pytest.raises(ValueError, match="lower is 0 and upper is -1"):
        fr.projection_hypercube(torch.ones(2), -1)
    with pytest.raises(ValueError, match=r"the vector 'w' has shape \(3,\)"):
        fr.projection_vector({"w": torch.ones(2)}, {"w": torch.ones(3)})
