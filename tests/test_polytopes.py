"""Polytopes beside the laws of the table: closed forms, other solvers, batches of plans, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from cases import assert_equal, drawn, uniform
from scipy.optimize import linear_sum_assignment, minimize
from torch.func import grad, jvp, vmap

import funcreg as fr
from funcreg.regularizers.orders import falling_fit

# Sections of boxes


def test_a_section_without_an_upper_bound_is_the_simplex_and_without_any_a_plane():
    x, h = drawn(5, 7), uniform(torch.Generator().manual_seed(1), 5, 7) + 0.1
    for metric in (None, h):
        found = fr.box_section.project(x, 0.0, math.inf, 1.0, 1.5, dim=-1, metric=metric)
        assert_equal(found, fr.simplex.project(x, 1.5, dim=-1, metric=metric), rtol=1e-12, atol=1e-14)
        normals = drawn(7, seed=2)
        found = fr.box_section.project(x, -math.inf, math.inf, normals, 0.3, dim=-1, metric=metric)
        assert_equal(found, fr.hyperplane.project(x, normals, 0.3, dim=-1, metric=metric), rtol=1e-11, atol=1e-13)


def test_sections_meet_the_conditions_of_optimality():
    for seed in range(20):
        x, a = 3 * drawn(6, seed=seed), drawn(6, seed=seed + 50)
        a[seed % 6] = 0.0
        low, high = -drawn(6, seed=seed + 90).abs(), drawn(6, seed=seed + 130).abs()
        offset = float((a * (low + 0.3 * (high - low))).sum())
        z = fr.box_section.project(x, low, high, a, offset)
        torch.testing.assert_close((a * z).sum(), torch.tensor(offset, dtype=torch.float64), rtol=1e-12, atol=1e-13)
        assert ((z >= low) & (z <= high)).all()
        free = (z > low) & (z < high) & (a != 0)
        if free.any():
            mu = ((x - z) / a)[free]
            assert mu.max() - mu.min() < 1e-11
            slack = x - mu.mean() * a - z  # It pushes against the bounds that are met.
            assert (slack[z == low] <= 1e-11).all()
            assert (slack[z == high] >= -1e-11).all()


def test_an_empty_section_is_nan_and_crossed_bounds_are_refused():
    x = drawn(4)
    assert fr.box_section.project(x, 0.0, 0.1, 1.0, 2.0).isnan().all()
    assert fr.box_section.project(x, 0.0, 0.1, 1.0, 0.4).tolist() == pytest.approx([0.1] * 4)
    assert not fr.box_section.project(x, -0.0, 0.1, 1.0, 0.0).any()
    with pytest.raises(ValueError, match=r"lower is 1\.0 and upper is 0\.0"):
        fr.box_section.project(x, 1.0, 0.0, 1.0, 0.5)


# Equations and inequalities


def test_an_affine_set_of_one_equation_is_a_plane_and_rows_may_depend_on_each_other():
    x, a = drawn(3, 5), drawn(5, seed=1)
    plane = fr.hyperplane.project(x, a, 0.7, dim=-1)
    for matrix, offset in ((a[None], 0.7), (torch.stack([a, 2 * a]), torch.tensor([0.7, 1.4], dtype=torch.float64))):
        assert_equal(fr.affine_set.project(x, matrix=matrix, offset=offset, dim=-1), plane, rtol=1e-11, atol=1e-13)
        assert fr.affine_set(plane, matrix=matrix, offset=offset, dim=-1) == 0
    clash = {"matrix": torch.stack([a, a]), "offset": torch.tensor([0.0, 1.0], dtype=torch.float64), "dim": -1}
    assert fr.affine_set(fr.affine_set.project(x, **clash), **clash) == math.inf


@pytest.mark.parametrize(("size", "count"), [(3, 2), (6, 9), (10, 25)])
def test_polyhedra_are_those_of_another_solver(size, count):
    matrix, offset = drawn(count, size), uniform(torch.Generator().manual_seed(1), count)
    equation = drawn(1, size, seed=2)
    for equations in (None, (equation, 0.0)):
        for seed in range(3):
            x = 3 * drawn(size, seed=seed + 7)
            z = fr.polyhedron.project(x, matrix=matrix, offset=offset, equations=equations)
            assert fr.polyhedron(z, matrix=matrix, offset=offset, equations=equations) == 0
            conditions = [{"type": "ineq", "fun": lambda v: (offset - matrix @ torch.tensor(v)).cpu().numpy()}]
            if equations is not None:
                conditions.append({"type": "eq", "fun": lambda v: (equation @ torch.tensor(v)).cpu().numpy()})
            other = minimize(
                lambda v, x=x: 0.5 * ((v - x.cpu().numpy()) ** 2).sum(),
                torch.zeros(size, dtype=torch.float64).cpu().numpy(),
                jac=lambda v, x=x: v - x.cpu().numpy(),
                constraints=conditions,
                method="SLSQP",
                options={"ftol": 1e-15, "maxiter": 500},
            )
            torch.testing.assert_close(z, torch.tensor(other.x), rtol=1e-6, atol=1e-6)
            assert 0.5 * (z - x).square().sum() <= other.fun + 1e-9


def test_polyhedra_of_more_conditions_than_entries_are_met_in_batches():
    matrix, offset = drawn(30, 8), uniform(torch.Generator().manual_seed(1), 30)
    z = fr.polyhedron.project(3 * drawn(20, 8, seed=3), matrix=matrix, offset=offset, dim=-1)
    assert (z @ matrix.T - offset).max() < 1e-12
    one = vmap(lambda w: fr.polyhedron.project(w, matrix=matrix, offset=offset))(3 * drawn(20, 8, seed=3))
    assert_equal(one, z, rtol=1e-12, atol=1e-14)


def test_falling_sequences_are_a_polyhedron():
    x = drawn(6)
    falls = torch.eye(6, dtype=torch.float64)[1:] - torch.eye(6, dtype=torch.float64)[:-1]
    z = fr.polyhedron.project(x, matrix=falls)
    assert_equal(z, falling_fit(x[None])[0], rtol=1e-11, atol=1e-13)


def test_systems_that_do_not_fit_are_refused_with_the_leaf():
    params = {"w": torch.ones(2, 3)}
    for constraint in (fr.affine_set, fr.polyhedron):
        with pytest.raises(ValueError, match=r"at leaf 'w': matrix has shape \(1, 4\); expected \(..., 6\)"):
            constraint.project(params, matrix=torch.ones(1, 4))
        with pytest.raises(
            ValueError, match=r"offset has shape \(3,\); expected one number, or one for each of 2 rows"
        ):
            constraint.project(params, matrix=torch.ones(2, 3), offset=torch.ones(3), dim=-1)
        with pytest.raises(TypeError, match="complex"):
            constraint.project({"w": torch.ones(2, dtype=torch.complex64)}, matrix=torch.ones(1, 2))
    with pytest.raises(ValueError, match="equations is no pair"):
        fr.polyhedron.project(params, matrix=torch.ones(1, 6), equations=torch.ones(1, 6))
    with pytest.raises(TypeError, match="matrix"):
        fr.polyhedron.project(params)


def test_sections_of_boxes_far_from_a_point_have_their_sums():
    for scale in (1e3, 1e8, 1e12):
        z = fr.box_section.project((scale * drawn(9)).float(), -1.0, 1.0, 1.0, 0.5)
        assert float(z.double().sum()) == pytest.approx(0.5, abs=1e-6)
        assert float(z.abs().max()) <= 1


# Transport plans


def conditions_of(z, x):
    """How far a plan is from one that is nearest: by pairs of rows and columns that carry something."""
    gap, there = x - z, z > 1e-12
    worst = torch.zeros((), dtype=z.dtype)
    for i in range(len(z)):
        for k in range(len(z)):
            for j in range(z.shape[1]):
                for m in range(z.shape[1]):
                    if there[i, j] and there[k, m]:  # A little more on the other two corners costs no less.
                        worst = torch.maximum(worst, gap[i, m] + gap[k, j] - gap[i, j] - gap[k, m])
    return worst


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0, 1e4, 1e6])
def test_plans_have_their_sums_and_no_exchange_brings_them_nearer(scale):
    rows, columns = [0.2, 0.5, 0.3], [0.1, 0.2, 0.3, 0.4]
    for seed in range(5):
        x = scale * drawn(3, 4, seed=seed)
        z = fr.transport.project(x, 2.0, rows=rows, columns=columns)
        whole = 2 * torch.tensor(rows, dtype=torch.float64), 2 * torch.tensor(columns, dtype=torch.float64)
        torch.testing.assert_close(z.sum(1), whole[0], rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(z.sum(0), whole[1], rtol=1e-13, atol=1e-14)
        coarse = fr.transport.project(x.float(), 2.0, rows=rows, columns=columns)
        torch.testing.assert_close(coarse.sum(1), whole[0].float(), rtol=1e-6, atol=0)
        assert (z >= 0).all()
        assert conditions_of(z, x) < 1e-11 * max(1.0, scale)
        assert fr.transport(z, 2.0, rows=rows, columns=columns) == 0


@pytest.mark.parametrize(("rows", "columns", "scale"), [(12, 9, 1.0), (30, 40, 5.0), (40, 40, 0.1)])
def test_plans_of_many_rows_have_their_sums(rows, columns, scale):
    z = fr.transport.project(scale * drawn(rows, columns), 1.0)
    torch.testing.assert_close(z.sum(1), torch.full((rows,), 1 / rows, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(z.sum(0), torch.full((columns,), 1 / columns, dtype=torch.float64), rtol=1e-12, atol=0)
    assert fr.transport(z, 1.0) == 0


def test_far_from_the_polytope_of_birkhoff_the_nearest_point_is_the_best_assignment():
    x = drawn(7, 7)
    best = linear_sum_assignment(x.cpu().numpy(), maximize=True)
    for scale in (1e3, 1e6, 1e9):
        z = fr.birkhoff.project(scale * x)
        assert z[best].tolist() == pytest.approx([1.0] * 7)
        assert (z != 0).sum() == 7


def test_a_plan_that_is_not_found_is_nan_and_no_other_point():
    for seed in range(20):
        broken = drawn(3, 3, seed=seed).index_fill(1, torch.tensor([seed % 3]), float("nan"))
        assert fr.birkhoff.project(broken).isnan().all()
        assert fr.transport.project(torch.where(torch.eye(3) > 0, drawn(3, 3), broken)).isnan().all()
    far = torch.stack([1e20 * drawn(6, 6), drawn(6, 6)])
    for found in (torch.func.vmap(fr.birkhoff.project)(far), torch.stack([fr.birkhoff.project(x) for x in far])):
        assert found[0].isnan().all()
        torch.testing.assert_close(found[1], fr.birkhoff.project(far[1]), rtol=0, atol=1e-12)


def test_rows_without_a_share_carry_nothing():
    z = fr.transport.project(drawn(3, 4), 2.0, rows=[1.0, 0.0, 1.0], columns=[1.0, 2.0, 3.0, 0.0])
    assert not z[1].any()
    assert not z[:, 3].any()
    assert z.sum().item() == pytest.approx(2.0)
    assert not fr.transport.project(drawn(3, 4), 0.0).any()


@pytest.mark.parametrize("shape", [(2, 2), (4, 4), (3, 5), (1, 4), (4, 1)])
def test_a_plan_of_nothing_has_the_derivative_of_a_small_one(shape):
    x, d = drawn(*shape), drawn(*shape, seed=1)
    f = lambda total: (fr.transport.project(x, total) * d).sum()
    none, some = (torch.tensor(total, dtype=torch.float64) for total in (0.0, 1e-7))
    expected = f(some) / some
    torch.testing.assert_close(grad(f)(none), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(jvp(f, (none,), (torch.ones_like(none),))[1], expected, rtol=1e-6, atol=1e-8)
    assert f(none) == 0
    assert not grad(lambda w: (fr.transport.project(w, 0.0) * d).sum())(x).any()
    assert fr.transport.project(x.index_fill(1, torch.tensor([0]), math.nan), 0.0).isnan().any()
    assert vmap(grad(f))(torch.stack([none, some])).isfinite().all()


def test_plans_have_derivatives_batches_and_dtypes():
    x, d = drawn(4, 4), drawn(4, 4, seed=1)
    project = lambda w: fr.birkhoff.project(w)
    _, along = jvp(project, (x,), (d,))
    torch.testing.assert_close(along, (project(x + 1e-6 * d) - project(x - 1e-6 * d)) / 2e-6, rtol=1e-6, atol=1e-8)
    back = grad(lambda w: (project(w) * d).sum())(x)
    torch.testing.assert_close((back * d).sum(), (along * d).sum())
    assert_equal(vmap(project)(torch.stack([x, d])), torch.stack([project(x), project(d)]), rtol=1e-12, atol=1e-14)
    for dtype in (torch.float32, torch.bfloat16):
        z = project(x.to(dtype))
        assert z.dtype == dtype
        assert fr.birkhoff(z) == 0
    wide = project(drawn(2, 6))
    torch.testing.assert_close(wide.sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(wide.sum(0), torch.full((6,), 1 / 3, dtype=torch.float64))


def test_shares_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"rows has shape \(2,\); expected \(3,\), one for each of the rows"):
        fr.transport.project({"w": torch.ones(3, 2)}, rows=[0.5, 0.5])
    for rows in ([-1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [math.nan, 1.0, 1.0]):
        with pytest.raises(ValueError, match=r"at leaf 'w': rows is \[.*\]; expected shares of at least 0"):
            fr.transport.project({"w": torch.ones(3, 2)}, rows=rows)
    with pytest.raises(ValueError, match=r"columns is \[0.5, -0.5\]"):
        fr.transport({"w": torch.ones(3, 2)}, columns=[0.5, -0.5])
    with pytest.raises(ValueError, match="total of transport is -1"):
        fr.transport.project(torch.ones(3, 2), -1.0)


@pytest.mark.slow
def test_small_polytopes_compile_into_one_graph():
    w = drawn(2, 2)
    both = lambda w: (
        fr.birkhoff.project(w),
        fr.polyhedron.project(w, matrix=[[1.0, 1.0]], offset=0.1, dim=-1),
        grad(lambda w: fr.polyhedron.project(w, matrix=[[1.0, 1.0]], offset=0.1, dim=-1).square().sum())(w),
    )
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    assert_equal(compiled(w), both(w), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_members_of_a_chain_stay_in_a_polytope():
    for constraint, hyper, options in (
        (fr.box_section, (0.0, 0.6, 1.0, 1.0), {}),
        (fr.birkhoff, (), {}),
        (fr.polyhedron, (), {"matrix": [[1.0] * 9], "offset": 1.0}),
    ):
        tx, params = fr.chain(fr.sgd(0.1), fr.project(constraint, *hyper, **options)), {"w": drawn(3, 3)}
        step = fr.fuse(tx, backend="eager")
        fused, fused_state = step.init(params)
        state = tx.init(params)
        for n in range(3):
            updates, state = tx.update({"w": drawn(3, 3, seed=n)}, state, params)
            params = fr.apply_updates(params, updates)
            fused, fused_state = step(fused, {"w": drawn(3, 3, seed=n)}, fused_state)
        assert constraint(params, *hyper, **options) == 0
        assert_equal(fused, params, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(
    "project",
    [
        lambda w: fr.birkhoff.project(w),
        lambda w: fr.transport.project(w, 1.0, rows=[0.4, 0.6]),
        lambda w: fr.polyhedron.project(w, matrix=[[1.0, 1.0], [-1.0, 0.0]], offset=[0.5, 0.2], dim=-1),
    ],
)
def test_projections_of_many_steps_are_traced_in_one_graph(project):
    """Of small leaves: each step is a part of the graph, so that the table leaves these rows out."""
    w = drawn(2, 2)
    compiled = torch.compile(
        lambda w: (project(w), grad(lambda w: project(w).square().sum())(w)), backend="eager", fullgraph=True
    )
    assert_equal(compiled(w), (project(w), grad(lambda w: project(w).square().sum())(w)), rtol=1e-10, atol=1e-12)
