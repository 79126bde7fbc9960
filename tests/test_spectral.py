"""Singular values against scipy and torch's own derivatives, and the laws of penalties that have a gradient alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import CONSTRAINTS, GRADIENT_ALONE, PENALTIES, assert_equal, draw, flat, normal
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

import funcreg as fr

every_gradient = pytest.mark.parametrize("case", GRADIENT_ALONE.values(), ids=GRADIENT_ALONE)
LIFTED = fr.on_singular_values(fr.elastic)
SPECTRAL = {
    "nuclear": lambda w: fr.nuclear.prox(w, 0.3),
    "spectral": lambda w: fr.spectral.prox(w, 0.3),
    "elastic": lambda w: LIFTED.prox(w, 0.5, 0.6, 0.5),
    "spectral_ball": lambda w: fr.spectral_ball.project(w, 0.9),
    "nuclear_ball": lambda w: fr.nuclear_ball.project(w, 1.1),
    "stiefel": fr.stiefel.project,
}
every_map = pytest.mark.parametrize("f", SPECTRAL.values(), ids=SPECTRAL)


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return normal(generator, *shape, dtype=dtype)


# Singular values


@every_map
def test_filters_and_vectors_are_read_as_matrices(f):
    w = random(3, 2, 2, 2)
    torch.testing.assert_close(f(w), f(w.reshape(3, 8)).reshape(w.shape))
    torch.testing.assert_close(f(w[0, 0, 0]), f(w[0, 0, 0][:, None])[:, 0])
    torch.testing.assert_close(f(w[0, 0, 0, 0]), f(w[0, 0, 0, :1])[0])


@every_map
@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 2)])
def test_derivatives_are_those_of_small_differences(f, shape):
    w, d = random(*shape), random(*shape, seed=1)
    value, exact = jvp(f, (w,), (d,))
    torch.testing.assert_close(value, f(w))
    torch.testing.assert_close(exact, (f(w + 1e-6 * d) - f(w - 1e-6 * d)) / 2e-6, rtol=1e-6, atol=1e-8)
    jacobian = jacrev(f)(w)
    torch.testing.assert_close(torch.einsum("ijkl,kl->ij", jacobian, d), exact, rtol=1e-11, atol=1e-12)
    batch = torch.stack([w, d])
    torch.testing.assert_close(vmap(jacrev(f))(batch)[0], jacobian, rtol=1e-11, atol=1e-12)


FORWARD_TWICE = {
    **{name: lambda w, f=f: f(w).square().sum() for name, f in SPECTRAL.items()},
    "value": fr.nuclear,
    "orthogonality": fr.orthogonality,
    "images": lambda w: fr.isotropic_total_variation.prox(w, 0.1).square().sum(),
}


@pytest.mark.parametrize("f", FORWARD_TWICE.values(), ids=FORWARD_TWICE)
def test_forward_derivatives_of_each_other_are_refused_and_others_right(f):
    w, u, v = (random(3, 2, seed=seed) for seed in range(3))
    along = lambda w: jvp(f, (w,), (u,))[1]
    change = (along(w + 1e-5 * v) - along(w - 1e-5 * v)) / 2e-5
    torch.testing.assert_close((grad(along)(w) * v).sum(), change, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((jvp(grad(f), (w,), (v,))[1] * u).sum(), change, rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match="expected one of them in reverse"):
        jvp(along, (w,), (v,))


@every_map
def test_pull_backs_are_differentiated_in_what_they_pull_and_after_the_call_that_made_them(f):
    w, d = random(3, 4), random(3, 4, seed=1)
    pull = vjp(f, w)[1]
    # What pulls back is linear: its own pull-back pushes forward.
    pushed = vjp(lambda v: pull(v)[0], torch.zeros_like(w))[1](d)[0]
    torch.testing.assert_close(pushed, jvp(f, (w,), (d,))[1], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(vmap(lambda v: pull(v)[0])(d[None])[0], pull(d)[0])


@every_map
def test_derivatives_are_finite_at_zero_and_where_singular_values_are_equal(f):
    eye = torch.eye(3, dtype=torch.float64)
    turned = torch.linalg.qr(random(3, 3))[0]
    for w in (eye, 2 * turned, 0 * eye, eye[:2], 2 * eye[:, :2], torch.ones_like(eye), torch.diag(eye[0])):
        assert grad(lambda w: f(w).square().sum() + f(w).sum())(w).isfinite().all()
        assert vmap(grad(lambda w: f(w).square().sum()))(torch.stack([w, w])).isfinite().all()


@every_map
def test_derivatives_where_singular_values_are_equal_are_those_of_small_differences(f):
    if f is SPECTRAL["spectral"] or f is SPECTRAL["nuclear_ball"]:
        w = torch.diag(torch.tensor([1.7, 0.4, 0.4], dtype=torch.float64))  # Of two that are level and cut, one leads.
    else:
        w = 1.7 * torch.linalg.qr(random(3, 3))[0]
    d = random(3, 3, seed=1)
    exact = jvp(f, (w,), (d,))[1]
    torch.testing.assert_close(exact, (f(w + 1e-6 * d) - f(w - 1e-6 * d)) / 2e-6, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derivatives_in_steps_radii_and_complex_matrices_are_right(dtype):
    w = random(3, 4, dtype=dtype)
    for f in (
        lambda w, t: fr.nuclear.prox(w, t),
        lambda w, t: fr.spectral.prox(w, t),
        lambda w, t: fr.spectral_ball.project(w, t),
        lambda w, t: fr.nuclear_ball.project(w, t),
        lambda w, t: fr.on_singular_values(fr.elastic)(w, t, 0.3),
    ):
        step = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(f, (w.clone().requires_grad_(), step))
        _, forward = jvp(lambda t, f=f: f(w, t), (step.detach(),), (torch.ones_like(step),))
        torch.testing.assert_close(forward, (f(w, 0.8 + 1e-6) - f(w, 0.8 - 1e-6)) / 2e-6, rtol=1e-6, atol=1e-7)


def test_second_derivatives_of_values_are_those_of_torch_where_torch_has_them():
    w = random(3, 4)
    for ours, theirs in (
        (fr.nuclear, lambda w: torch.linalg.svdvals(w).sum()),
        (fr.spectral, lambda w: torch.linalg.svdvals(w).amax()),
        (fr.srip, lambda w: (torch.linalg.svdvals(w).square() - 1).abs().amax()),
    ):
        torch.testing.assert_close(hessian(ours)(w), jacrev(jacrev(theirs))(w), rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(jacrev(jacrev(ours))(w), hessian(ours)(w), rtol=1e-10, atol=1e-11)


def test_gradients_of_low_rank_are_those_of_least_norm():
    u, v = random(5, 2), random(2, 4, seed=1)
    w = u @ v  # Its two small singular values are rounding, not zero.
    left, _, right = torch.linalg.svd(w)
    torch.testing.assert_close(fr.nuclear.grad(w), left[:, :2] @ right[:2])
    torch.testing.assert_close(grad(fr.nuclear)(w), fr.nuclear.grad(w))


def test_proximal_operators_shrink_and_level_singular_values():
    w = random(4, 6)
    s = torch.linalg.svdvals(w)
    for step in (0.1, 0.7, 1.5):
        torch.testing.assert_close(torch.linalg.svdvals(fr.nuclear.prox(w, step)), fr.shrink(s, step))
        level = torch.linalg.svdvals(fr.spectral.prox(w, step))
        torch.testing.assert_close((s - level).sum(), torch.tensor(step, dtype=torch.float64))
        torch.testing.assert_close(level, s.clamp(max=level[0].item()))
    assert not fr.spectral.prox(w, s.sum() + 1e-9).any()


def test_moreau_joins_the_nuclear_norm_and_the_spectral_ball():
    w = random(4, 6)
    torch.testing.assert_close(fr.nuclear.prox(w, 0.8) + fr.spectral_ball.project(w, 0.8), w)
    torch.testing.assert_close(fr.spectral.prox(w, 0.8) + fr.nuclear_ball.project(w, 0.8), w)


def test_polar_factors_are_those_of_scipy():
    from scipy.linalg import polar

    for shape in ((3, 3), (5, 3), (3, 5)):
        w = random(*shape)
        expected = polar(w.cpu().numpy())[0]
        np.testing.assert_allclose(fr.stiefel.project(w).cpu().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_lifted_penalties_are_the_named_ones():
    lifted = fr.on_singular_values(fr.l1)
    params = draw()
    torch.testing.assert_close(lifted(params), fr.nuclear(params))
    assert_equal(lifted.grad(params), fr.nuclear.grad(params), rtol=1e-12, atol=1e-14)
    assert_equal(lifted.prox(params, 0.4), fr.nuclear.prox(params, 0.4), rtol=1e-12, atol=1e-14)
    frobenius = fr.on_singular_values(fr.l2)
    torch.testing.assert_close(frobenius(params), fr.l2(params))
    assert_equal(frobenius.prox(params, 0.4), fr.l2.prox(params, 0.4), rtol=1e-12, atol=1e-14)
    assert repr(lifted) == "on_singular_values(l1)"
    with pytest.raises(ValueError, match="expected a separable one"):
        fr.on_singular_values(fr.group_lasso)


@pytest.mark.parametrize("step", [0.4, 1.9, 3.0])
def test_a_nonconvex_rule_on_singular_values_has_the_global_minimum(step):
    gamma = 2.0
    for seed in range(5):
        w = 1.5 * random(2, 2, seed=seed)
        z = fr.spectral_mcp.prox(w, step, 1.0, gamma)
        objective = lambda z, w=w: 0.5 * (z - w).square().sum() + step * fr.spectral_mcp(z, 1.0, gamma)
        others = torch.cat([s * random(300, 2, 2, seed=9) + c * z for s in (1e-3, 0.1, 2.0) for c in (0.0, 1.0)])
        rests = [w, torch.zeros_like(w), *(fr.spectral_mcp.prox(w, other, 1.0, gamma) for other in (0.1, 1.0, 5.0))]
        assert (vmap(objective)(torch.cat([others, torch.stack(rests)])) >= objective(z) - 1e-12).all()
        assert grad(lambda w: fr.spectral_mcp.prox(w, step, 1.0, gamma).sum())(w).isfinite().all()


def test_powers_of_singular_values_are_the_named_penalties():
    params = draw()
    for p, named in ((1, fr.nuclear), (2, fr.l2), (2 / 3, fr.on_singular_values(fr.l_two_thirds))):
        torch.testing.assert_close(fr.schatten(params, p=p), named(params))
        assert_equal(fr.schatten.prox(params, 0.3, p=p), named.prox(params, 0.3), rtol=1e-11, atol=1e-13)
    with pytest.raises(ValueError, match="expected 1/2, 2/3, 1 or 2"):
        fr.schatten(params, p=3)


def test_a_metric_takes_inner_steps():
    w, h = random(4, 5), 10 ** random(4, 5, seed=1).clamp(-1, 1)
    others = [size * random(4, 5, seed=seed) for seed in range(20) for size in (1e-5, 1e-3, 0.1)]
    for penalty, options in (
        (fr.nuclear, {}),
        (fr.spectral, {}),
        (fr.on_singular_values(fr.elastic), {"alpha": 1.0, "rho": 0.5}),
    ):
        with pytest.raises(ValueError, match=r"no closed proximal operator in a metric.*inner_steps"):
            penalty.prox(w, 0.5, metric=h, **options)
        z = penalty.prox(w, 0.5, metric=h, inner_steps=150, **options)
        objective = lambda z, p=penalty, o=options: 0.5 * (h * (z - w).square()).sum() + 0.5 * p(z, **o)
        assert all(objective(z + other) >= objective(z) - 1e-10 for other in others)
        constant = penalty.prox(w, 0.5, metric=torch.full_like(w, 4.0), inner_steps=1, **options)
        torch.testing.assert_close(constant, penalty.prox(w, 0.125, **options))


def test_prox_adam_solves_the_problem_of_low_rank():
    target, curvature = random(4, 3), 0.5 + random(4, 3, seed=1).square()
    slope = lambda w: curvature * (w - target)
    tx, w = fr.prox_adam(1.0, fr.nuclear, strength=0.8, eps=1.0, inner_steps=15), torch.zeros(4, 3, dtype=torch.float64)
    state = tx.init(w)
    for n in range(300):
        updates, state = tx.update(slope(w), state, w)
        w = fr.apply_updates(w, updates)
        if n >= 20 and updates.abs().max() <= 1e-12:  # It stays there.
            break
    assert torch.linalg.matrix_rank(w) == 2
    assert fr.kkt_residual(w, slope(w), fr.nuclear, strength=0.8) < 1e-6


def test_lambda_max_of_the_nuclear_norm_is_the_spectral_norm():
    params = draw()
    largest = max(fr.spectral(w) for w in fr.tree_leaves(params))
    torch.testing.assert_close(fr.lambda_max(params, fr.nuclear), largest, rtol=1e-14, atol=0)


def test_a_fused_step_of_low_rank_is_the_plain_one():
    params, grads = draw(), draw(1)
    tx = fr.prox_sgd(0.1, fr.nuclear, strength=0.5, mask=fr.matrices)
    updates, _ = tx.update(grads, tx.init(params), params)
    found, _ = fr.fuse(tx, backend="eager")(params, grads, tx.init(params))
    assert_equal(found, fr.apply_updates(params, updates), rtol=1e-12, atol=1e-14)


def assert_compiled_is_plain(everything):
    """At matrices with distinct, equal and zero singular values, where derivatives are finite, too."""
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    eye = torch.eye(3, dtype=torch.float64)
    for w in (
        random(3, 3),
        eye,
        torch.linalg.qr(random(3, 3))[0].contiguous(),
        torch.zeros_like(eye),
        torch.diag(eye[0]),
    ):
        found = compiled(w)
        assert flat(found).isfinite().all()
        assert_equal(found, everything(w), rtol=1e-12, atol=1e-14)


@every_map
@pytest.mark.slow
def test_compiled_maps_have_the_same_derivatives_where_singular_values_are_equal_or_zero(f):
    slope = grad(lambda w: f(w).square().sum() + f(w).sum())

    def everything(w):
        return slope(w), vmap(slope)(torch.stack([w, 2 * w])), jvp(f, (w,), (torch.ones_like(w),))  # And f(w).

    assert_compiled_is_plain(everything)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nuclear", "spectral", "schatten", "spectral_mcp", "srip"])
def test_compiled_values_have_the_same_derivatives_where_singular_values_are_equal_or_zero(name):
    case = (PENALTIES | GRADIENT_ALONE)[name]

    def slope(w):
        first = grad(case.value)(w)
        return first.sum(), first

    def everything(w):  # Second derivatives, first ones on the way to them.
        return case.value(w), grad(slope, has_aux=True)(w), vmap(grad(case.value))(torch.stack([w, 2 * w]))

    assert_compiled_is_plain(everything)


def test_compiled_code_has_derivatives_in_steps_and_of_parameters():
    def loss(w, step):
        return fr.nuclear(w) + fr.spectral.prox(w, step).square().sum() + fr.nuclear_ball.project(w, step).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for w in (random(3, 3), torch.eye(3, dtype=torch.float64)):
        arguments = w.requires_grad_(), torch.tensor(0.4, requires_grad=True)
        expected = torch.autograd.grad(loss(*arguments), arguments)
        assert_equal(torch.autograd.grad(compiled(*arguments), arguments), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nuclear", "spectral_ball"])
def test_the_compiler_of_kernels_changes_nothing(name):
    f = SPECTRAL[name]
    slope = grad(lambda w: f(w).square().sum())
    everything = lambda w: (f(w), slope(w), vmap(slope)(torch.stack([w, 2 * w])))
    compiled = torch.compile(everything, fullgraph=True)
    for w in (random(4, 3), torch.eye(4, 3, dtype=torch.float64)):
        assert_equal(compiled(w), everything(w), rtol=1e-11, atol=1e-13)


def test_one_number_is_taken_for_each_matrix():
    w = random(3, 4)
    torch.testing.assert_close(fr.nuclear.prox(w, torch.tensor([[0.4]])), fr.nuclear.prox(w, 0.4), check_dtype=False)
    with pytest.raises(ValueError, match=r"step has shape \(3, 1\); expected one number for each leaf"):
        fr.nuclear.prox(w, torch.ones(3, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_infinities_and_nan_make_a_matrix_of_nan(dtype):
    for bad in (math.nan, math.inf):
        params = {"a": random(3, 4).to(dtype), "b": random(3, 4).to(dtype)}
        params["a"][0, 0] = bad
        for case in (PENALTIES["nuclear"], PENALTIES["spectral"], CONSTRAINTS["stiefel"]):
            z = case.prox(params, 0.5)
            assert z["a"].isnan().all()
            assert z["b"].isfinite().all()
            assert case.value(params).isnan()


# Gradient alone


@every_gradient
def test_value_is_the_sum_of_the_equation_over_leaves(case):
    params = draw()
    expected = sum(case.equation(w) for w in fr.tree_leaves(params))
    torch.testing.assert_close(case.value(params), expected, rtol=1e-13, atol=0)


@every_gradient
def test_gradient_is_that_of_autograd_away_from_kinks(case):
    params = fr.tree_map(lambda w: w + 0.1 * (w == 0), draw())
    found = case.grad(params)
    assert_equal(found, grad(case.value)(params), rtol=1e-11, atol=1e-13)
    plain = grad(lambda p: sum(case.equation(w) for w in fr.tree_leaves(p)))(params)
    assert_equal(found, plain, rtol=1e-10, atol=1e-12)
    value, slope = jvp(case.value, (params,), (draw(1),))
    torch.testing.assert_close(slope, flat(found) @ flat(draw(1)), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(value, case.value(params))
    twice = grad(lambda p: (flat(grad(case.value)(p)) * flat(draw(1))).sum())(params)
    once = grad(lambda p: (flat(case.grad(p)) * flat(draw(1))).sum())(params)
    assert_equal(twice, once, rtol=1e-9, atol=1e-10)


@every_gradient
def test_gradients_are_finite_at_zero_and_at_the_identity(case):
    eye = torch.eye(3, dtype=torch.float64)
    for w in (0 * eye, eye, torch.ones_like(eye)):
        assert case.grad(w).isfinite().all()
        assert grad(case.value)(w).isfinite().all()
        assert hessian(case.value)(w).isfinite().all()
    assert not case.grad(0 * eye).any()


@every_gradient
def test_proximal_operators_that_are_not_known_say_so(case):
    with pytest.raises(ValueError, match=rf"{case.penalty.__name__} has no proximal operator.*add_penalty"):
        case.prox(draw(), 0.5)


@every_gradient
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept_nan_goes_through_and_every_shape_is_taken(case, dtype):
    params = draw(dtype=dtype)
    assert {w.dtype for w in fr.tree_leaves(case.grad(params))} == {dtype}
    assert case.value(params).dtype == torch.float32
    torch.testing.assert_close(
        case.value(params).double(), case.value(fr.tree_map(lambda w: w.double(), params)), rtol=1e-5, atol=1e-5
    )
    params["head"].weight[1, 1] = math.nan
    assert case.value(params).isnan()
    assert case.grad(params)["head"].weight[1, 1].isnan()
    for leaf in (torch.tensor(0.7), torch.zeros(0), torch.zeros(0, 3), torch.zeros(3, 0), random(3, 4).T):
        assert case.grad(leaf).shape == leaf.shape
        assert case.value(leaf).isfinite()


@every_gradient
def test_vmap_is_a_loop_over_members(case):
    batch = random(3, 4, 3)
    hyper = [torch.tensor([h, h / 2, h / 3]) for h in case.hyper]
    p, options = case.penalty, case.options
    values = vmap(lambda w, *h: p(w, *h, **options))(batch, *hyper)
    slopes = vmap(lambda w, *h: p.grad(w, *h, **options))(batch, *hyper)
    traced = vmap(grad(lambda w, *h: p(w, *h, **options)))(batch, *hyper)
    for i, w in enumerate(batch):
        h = [x[i] for x in hyper]
        torch.testing.assert_close(values[i], p(w, *h, **options), rtol=1e-12, atol=0)
        torch.testing.assert_close(slopes[i], p.grad(w, *h, **options), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(traced[i], slopes[i], rtol=1e-11, atol=1e-13)


@pytest.mark.slow
@every_gradient
def test_compiling_the_whole_changes_nothing(case):
    def everything(w):
        return case.value(w), grad(case.value)(w), case.grad(w)

    w = random(4, 3)
    assert_equal(
        torch.compile(everything, fullgraph=True, backend="aot_eager")(w), everything(w), rtol=1e-12, atol=1e-14
    )


def test_orthonormal_matrices_cost_nothing():
    for w in (fr.stiefel.project(random(3, 5)), fr.stiefel.project(random(5, 3))):
        for penalty in (fr.orthogonality, fr.srip):
            assert penalty(w) < 1e-14
    assert fr.orthogonality_offdiagonal(torch.diag(torch.tensor([1.0, 2.0]))) == 0
    assert fr.keras_orthogonal(random(1, 4)) == 0
    with pytest.raises(ValueError, match="mode is 'both'"):
        fr.keras_orthogonal(random(2, 2), mode="both")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_furthest_singular_value_is_known_where_squares_overflow(dtype):
    w = (1e20 * random(3, 4)).to(dtype)
    expected = fr.srip.grad(w.double())
    slack = torch.finfo(dtype).eps * expected.abs().amax().item()
    torch.testing.assert_close(fr.srip.grad(w).double(), expected, rtol=0, atol=4 * slack)
    torch.testing.assert_close(fr.srip.grad(1e-20 * w), fr.srip.grad((1e-20 * w).double()).to(dtype))


def test_two_rows_cost_the_cosine_between_them_whatever_their_norms():
    w = torch.tensor([[1.0, 2.0, -1.0], [0.5, -1.0, 3.0]], dtype=torch.float64)
    cosine = 4.5 / (6 * 10.25) ** 0.5
    torch.testing.assert_close(fr.keras_orthogonal(w, 0.1).item(), 0.1 * cosine, rtol=1e-14, atol=0)


def test_hoyer_counts_entries_whatever_their_scale():
    for count in (1, 3, 5):
        w = torch.zeros(8, dtype=torch.float64)
        w[:count] = 0.3
        for scale in (1e-200, 1.0, 1e200):
            torch.testing.assert_close(fr.hoyer_square(scale * w).item(), float(count), rtol=1e-14, atol=0)
    rows = fr.hoyer_square(torch.tensor([[1.0, 1.0], [2.0, 0.0]]), dim=1)
    assert rows == 3


def test_descent_on_orthogonality_ends_on_the_stiefel_manifold():
    w, tx = 0.5 * random(3, 5), fr.chain(fr.add_penalty(fr.orthogonality), fr.scale(-0.05))
    state = tx.init(w)
    for _ in range(200):
        updates, state = tx.update(torch.zeros_like(w), state, w)
        w = fr.apply_updates(w, updates)
    assert fr.stiefel(w) == 0


def test_penalties_that_tell_entries_apart_are_not_lifted():
    for unequal in (torch.tensor([1.0, 2.0]) * fr.l1, fr.l1.given(mask=fr.matrices), fr.mcp.given(torch.ones(3), 2.0)):
        with pytest.raises(ValueError, match="all singular values alike"):
            fr.on_singular_values(unequal)
    w = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    assert fr.on_singular_values(2.0 * fr.l1 + fr.half_l2)(w) == 2 * 3.5 + (9 + 0.25) / 2
