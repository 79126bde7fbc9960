"""Total variation of images beside the laws of the table: other solvers, known solutions, sizes, derivatives."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from cases import assert_equal, drawn, normal
from torch.func import grad, jacrev, jvp, vmap

import funcreg as fr
from funcreg.regularizers.dissection import Equations

variation = fr.isotropic_total_variation


def differences(z):
    down, right = torch.zeros_like(z), torch.zeros_like(z)
    down[:-1], right[:, :-1] = z.diff(dim=0), z.diff(dim=1)
    return torch.stack([down, right])


def dual(x, step, steps=20000):
    """The image and its multipliers by a plain projected gradient method of the dual problem, with momentum."""
    p = q = torch.zeros(2, *x.shape, dtype=torch.float64)
    t = 1.0

    def image(p):
        down, right = p[0, :-1], p[1, :, :-1]
        z = x.clone()
        z[:-1] += step * down
        z[1:] -= step * down
        z[:, :-1] += step * right
        z[:, 1:] -= step * right
        return z

    for n in range(steps):
        new = q + differences(image(q)) / (8 * step)
        new = new / new.square().sum(0).sqrt().clamp(min=1)
        t, before = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        moved = n % 100 == 99 and (new - p).abs().max()
        q, p = new + (before - 1) / t * (new - p), new
        if n % 100 == 99 and moved <= 1e-12:
            break
    return image(p), p


@pytest.mark.parametrize(
    ("shape", "step"), [((4, 5), 0.2), pytest.param((6, 3), 0.7, marks=pytest.mark.slow), ((2, 9), 2.0), ((7, 7), 0.4)]
)
def test_the_nearest_image_is_that_of_another_method(shape, step):
    x = drawn(*shape)
    z = variation.prox(x, step)
    other, multipliers = dual(x, step)
    torch.testing.assert_close(z, other, rtol=0, atol=1e-6)
    # Its objective is no more than that of the dual problem: there is none lower.
    gap = 0.5 * (z - x).square().sum() + step * variation(z) - (0.5 * x.square().sum() - 0.5 * other.square().sum())
    assert -1e-9 < gap < 1e-6
    v = differences(z)
    size = v.square().sum(0).sqrt()
    edge = size > 1e-8
    torch.testing.assert_close((v / size)[:, edge], multipliers[:, edge], rtol=0, atol=1e-3)


def test_images_have_their_known_solutions():
    x = drawn(4, 6)
    line = x[:1]
    assert_equal(variation.prox(line, 0.5), fr.total_variation.prox(line, 0.5), rtol=1e-9, atol=1e-11)
    assert_equal(variation.prox(x, 0.5, dim=1), fr.total_variation.prox(x, 0.5), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(variation(x, dim=1), fr.total_variation(x))
    assert_equal(variation.prox(x, math.inf), torch.full_like(x, float(x.mean())), rtol=1e-12, atol=1e-13)
    assert_equal(variation.prox(torch.ones(3, 3), 2.0), torch.ones(3, 3))
    # A square on a ground: each loses the jump at its rim, over its own area.
    square = torch.zeros(1, 12, dtype=torch.float64)
    square[0, 4:8] = 1.0
    expected = 0.1 / 4 + square * (1 - 3 * 0.1 / 4)
    assert_equal(variation.prox(square, 0.1), expected, rtol=1e-10)


def test_regions_are_exactly_equal():
    x = torch.zeros(8, 8, dtype=torch.float64)
    x[2:6, 2:6] = 1.0
    z = variation.prox(x + 0.05 * drawn(8, 8), 0.3)
    assert len(z.unique()) < 30


def test_turned_and_stacked_images_go_with_their_own():
    x = drawn(3, 5, 4)
    z = variation.prox(x, 0.4)
    assert_equal(z[1], variation.prox(x[1], 0.4), rtol=1e-10, atol=1e-12)
    assert_equal(variation.prox(x.movedim(0, 2), 0.4, dim=(0, 1)), z.movedim(0, 2), rtol=1e-10, atol=1e-12)
    steps = torch.tensor([0.1, 0.4, 3.0], dtype=torch.float64).reshape(3, 1, 1)
    own = torch.stack([variation.prox(image, float(s)) for image, s in zip(x, steps.flatten(), strict=True)])
    assert_equal(variation.prox(x, steps), own, rtol=1e-10, atol=1e-12)
    volume = variation.prox(x, 0.4, dim=(0, 1, 2))
    objective = lambda z: 0.5 * (z - x).square().sum() + 0.4 * variation(z, dim=(0, 1, 2))
    assert all(objective(volume) <= objective(volume + size * drawn(3, 5, 4, seed=7)) for size in (1e-4, 1e-2, 1.0))


def test_derivatives_are_those_of_differences():
    x, tangent = drawn(4, 4), drawn(4, 4, seed=1)
    point = lambda x, step: variation.prox(x, step)
    step = torch.tensor(0.3, dtype=torch.float64)
    near = 1e-6
    expected = (point(x + near * tangent, step) - point(x - near * tangent, step)) / (2 * near)
    torch.testing.assert_close(jvp(lambda x: point(x, step), (x,), (tangent,))[1], expected, rtol=1e-4, atol=1e-6)
    matrix = jacrev(lambda x: point(x, step))(x).reshape(16, 16)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-7, atol=1e-9)  # As of every proximal operator.
    by_step = (point(x, step + near) - point(x, step - near)) / (2 * near)
    torch.testing.assert_close(jvp(lambda s: point(x, s), (step,), (step / step,))[1], by_step, rtol=1e-4, atol=1e-6)
    assert grad(lambda x: grad(lambda x: point(x, step).square().sum())(x).square().sum())(x).isfinite().all()


def along(x, d):
    """The next entry along a dimension minus this one; 0 at the end."""
    return torch.cat([x.diff(dim=d), torch.zeros_like(x.narrow(d, 0, 1))], d)


def solved(shape, step, count=2):
    """An image that is solved, and one of which it is the nearest: from multipliers that certify it."""
    places = torch.meshgrid(*[torch.linspace(0, 1, n, dtype=torch.float64) for n in shape], indexing="ij")
    near = torch.stack([place - 0.5 for place in places]).square().sum(0) < 0.1
    z = near.double() + 0.4 * (5 * places[0]).sin() * (places[-1] > 0.5)
    dims = range(-count, 0)
    v, p = torch.stack([along(z, d) for d in dims]), drawn(count, *shape)
    norm = v.square().sum(0).sqrt()
    p = torch.where(norm > 0, v / norm, p / p.square().sum(0).sqrt() * drawn(*shape, seed=1).sigmoid())
    x = z.clone()
    for held, d in zip(p, dims, strict=True):
        held = step * held.narrow(d, 0, z.shape[d] - 1)
        x.narrow(d, 0, z.shape[d] - 1).sub_(held)
        x.narrow(d, 1, z.shape[d] - 1).add_(held)
    return z, x


@pytest.mark.parametrize(
    ("shape", "step", "count"),
    [
        ((37, 32), 0.05, 2),
        ((2, 13, 30), 0.2, 2),
        ((1500,), 0.3, 1),
        ((5, 6, 9), 0.1, 3),
        pytest.param((64, 128), 0.1, 2, marks=pytest.mark.slow),
    ],
)
def test_images_of_any_size_have_the_solution_that_their_multipliers_certify(shape, step, count):
    z, x = solved(shape, step, count)
    dim = tuple(range(-count, 0))
    assert_equal(variation.prox(x, step, dim=dim), z, atol=1e-13)
    assert fr.kkt_residual(z, z - x, variation, strength=step, dim=dim) < 1e-13


def test_large_images_go_with_their_own_in_maps_and_low_precision():
    z, x = solved((33, 32), 0.1)
    steps = torch.tensor([0.02, 0.1], dtype=torch.float64, device=x.device)
    assert_equal(vmap(lambda step: variation.prox(x, step))(steps)[1], z, atol=1e-12)
    broken = torch.stack([x, x])
    broken[0, 3, 3] = math.nan
    found = variation.prox(broken, 0.1)
    assert found[0].isnan().all()
    assert_equal(found[1], z, atol=1e-12)
    assert_equal(variation.prox(x.float(), 0.1), z.float(), atol=1e-6)


def test_derivatives_of_large_images_are_those_of_differences():
    x, tangent, cotangent = (
        solved((33, 32), 0.1)[1] + 0.05 * drawn(33, 32),
        drawn(33, 32, seed=1),
        drawn(33, 32, seed=2),
    )
    point, near = lambda x: variation.prox(x, 0.1), 1e-6
    moved = jvp(point, (x,), (tangent,))[1]
    expected = (point(x + near * tangent) - point(x - near * tangent)) / (2 * near)
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-7)
    pulled = grad(lambda x: (cotangent * point(x)).sum())(x)
    torch.testing.assert_close((pulled * tangent).sum(), (cotangent * moved).sum())


def test_derivatives_stay_where_differences_are_tiny():
    """Along a ridge differences become ever smaller; they are no regions."""
    g = torch.Generator().manual_seed(5)
    x, tangent = solved((24, 21), 0.1)[1] + 0.05 * normal(g, 24, 21), normal(g, 24, 21)
    point, near = lambda x: variation.prox(x, 0.3), 1e-5
    expected = (point(x + near * tangent) - point(x - near * tangent)) / (2 * near)
    torch.testing.assert_close(jvp(point, (x,), (tangent,))[1], expected, rtol=1e-5, atol=1e-6)


def test_steps_and_solutions_of_large_images_are_theirs():
    z, x = solved((33, 32), 0.1)
    found = fr.minimize(lambda w: (w - x).square().sum() / 2, torch.zeros_like(x), variation, strength=0.1)
    assert found.converged
    assert_equal(found.params, z, atol=1e-10)
    step = fr.fuse(fr.prox_sgd(1.0, variation, strength=0.1), backend="eager")
    params, state = step.init({"w": torch.zeros_like(x)})
    params, _ = step(params, {"w": params["w"] - x}, state)
    assert_equal(params["w"], z, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_near_is_lower_where_a_metric_spans_thirty_orders_of_magnitude(seed):
    x, h = drawn(9, 13, seed=seed), (15 * drawn(9, 13, seed=seed + 10)).exp()
    z = variation.prox(x, 0.3, metric=h)
    objective = lambda w: (h * (w - x).square()).sum() / 2 + 0.3 * variation(w)
    others = [x, torch.full_like(x, float((h * x).sum() / h.sum())), *[z + s * drawn(9, 13) for s in (1e-8, 1e-3)]]
    assert objective(z) <= min(map(objective, others)) * (1 + 1e-9)


def test_no_strength_is_the_least_that_makes_images_zero():
    assert fr.lambda_max(drawn(4, 4), variation) == math.inf


@pytest.mark.parametrize("shape", [(1,), (50,), (1, 9), (16, 5), (9, 21), (5, 6, 7), (9, 1, 12)])
def test_equations_of_neighbours_are_solved_as_those_of_a_matrix(shape):
    count, size = len(shape), math.prod(shape)
    h, q, f = drawn(2, *shape).exp(), drawn(count, count, 2, *shape, seed=1), drawn(2, *shape, seed=2)
    bend = torch.einsum("ab...,cb...->ac...", q, q)
    slopes = [
        along(torch.eye(size, dtype=f.dtype, device=f.device).reshape(size, *shape), d) for d in range(1, count + 1)
    ]
    rows = [slope.reshape(size, size).T for slope in slopes]
    pairs = [(i, j) for i in range(count) for j in range(count)]
    matrix = h.reshape(2, -1).diag_embed() + sum(
        [rows[i].T @ bend[i, j].reshape(2, -1, 1).mul(rows[j]) for i, j in pairs]
    )
    expected = torch.linalg.solve(matrix, f.reshape(2, -1, 1)).reshape(f.shape)
    assert_equal(Equations(h, [list(row) for row in bend]).solved(f), expected, rtol=1e-9, atol=1e-10)


def test_a_noisy_photograph_becomes_smooth():
    rows = torch.linspace(0, 1, 20, dtype=torch.float64)
    clean = (rows[:, None] + rows[None] > 1).double()
    noisy = clean + 0.2 * drawn(20, 20)
    z = variation.prox(noisy, 0.2)
    assert (z - clean).square().mean() < 0.2 * (noisy - clean).square().mean()


def test_an_optimizer_finds_equal_regions():
    x = drawn(5, 5)
    tx, params = fr.prox_sgd(0.5, variation, strength=0.3), {"w": torch.zeros(5, 5, dtype=torch.float64)}
    state = tx.init(params)
    for _ in range(28):
        updates, state = tx.update({"w": params["w"] - x}, state, params)
        params = fr.apply_updates(params, updates)
    torch.testing.assert_close(params["w"], variation.prox(x, 0.3), rtol=0, atol=1e-7)


@pytest.mark.slow
def test_it_is_traced_in_one_graph():
    x = drawn(3, 3)
    compiled = torch.compile(lambda x: (variation(x), variation.prox(x, 0.3)), fullgraph=True, backend="eager")
    assert_equal(compiled(x), (variation(x), variation.prox(x, 0.3)), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_it_may_be_loaded_once_more():
    script = """
        import importlib, sys
        import torch
        import funcreg.regularizers.images
        importlib.reload(funcreg.regularizers.images)
        for name in [name for name in sys.modules if name.partition(".")[0] == "funcreg"]:
            del sys.modules[name]
        import funcreg as fr
        print(fr.isotropic_total_variation.prox(torch.tensor([[1.0, 0.0]]), 0.25))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "tensor([[0.7500, 0.2500]])"


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match="a leaf is complex; expected real numbers"):
        variation.prox(torch.ones(2, 2, dtype=torch.complex64), 1.0)
    with pytest.raises(ValueError, match="which has no dimension 2"):
        variation(torch.ones(2, 2), dim=(1, 2))
    with pytest.raises(ValueError, match=r"dim is '1'; expected an int, or a tuple"):
        variation(torch.ones(2, 2), dim="1")
