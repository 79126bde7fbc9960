"""Laws of separable penalties, one entry at a time: proximal operators are global minima in every regime."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases import assert_equal, cpu_only, draw, flat
from torch import Tensor
from torch.func import grad, vmap

import funcreg as fr


@dataclass(frozen=True)
class Entry:
    penalty: fr.Penalty
    equation: Callable[..., Tensor]  # Of tensors: entries and hyperparameters.
    hypers: list[tuple[float, ...]]
    jumps: Callable[..., list[float]] | None = None  # From a step and hyperparameters to where the operator jumps.
    zeros: bool = True  # Makes zeros, or returns entries to the anchor.


def _scad(z: Tensor, t: float, a: float) -> Tensor:
    size = z.abs()
    middle = (2 * a * t * size - size.square() - t * t) / (2 * (a - 1))
    return torch.where(size <= t, t * size, torch.where(size <= a * t, middle, 0.5 * t * t * (a + 1)))


def _mcp(z: Tensor, t: float, gamma: float) -> Tensor:
    size = z.abs()
    return torch.where(size <= gamma * t, t * size - size.square() / (2 * gamma), 0.5 * gamma * t * t)


def _huber(z: Tensor, delta: float) -> Tensor:
    return torch.nn.functional.huber_loss(z, torch.zeros_like(z), reduction="none", delta=delta)


ENTRIES = {
    "l0": Entry(fr.l0, lambda z: (z != 0).to(z.dtype), [()], lambda s: [math.sqrt(2 * s)]),
    "l_half": Entry(fr.l_half, lambda z: z.abs().sqrt(), [()], lambda s: [1.5 * s ** (2 / 3)]),
    "l_two_thirds": Entry(fr.l_two_thirds, lambda z: z.abs().pow(2 / 3), [()], lambda s: [2 * (2 * s / 3) ** 0.75]),
    "log_sum": Entry(fr.log_sum, lambda z, e: (1 + z.abs() / e).log(), [(0.05,), (0.5,), (1.0,), (2.0,), (30.0,)]),
    "mcp": Entry(
        fr.mcp,
        _mcp,
        [(1.0, 3.0), (0.3, 1.5), (2.0, 0.4), (0.7, 1.0), (0.0, 3.0)],
        lambda s, t, gamma: [t * s, t * gamma, t * math.sqrt(gamma * s)],
    ),
    "scad": Entry(
        fr.scad,
        _scad,
        [(1.0, 3.7), (0.4, 2.0), (0.8, 2.5), (0.2, 12.0), (0.0, 3.7)],
        lambda s, t, a: [t * s, t * (1 + s), t * a, t * (a + 1 + s) / 2, t * math.sqrt((a + 1) * s)],
    ),
    "capped_l1": Entry(
        fr.capped_l1,
        lambda z, top: z.abs().clamp(max=top),
        [(0.6,), (0.05,), (2.5,), (0.0,)],
        lambda s, top: [s, top + s / 2, math.sqrt(2 * top * s)],
    ),
    "huber": Entry(fr.huber, _huber, [(0.5,), (3.0,), (1e-3,)], zeros=False),
    "anchored_l1": Entry(fr.anchored_l1, lambda z, a: (z - a).abs(), [(0.4,), (-2.0,), (0.0,)]),
    "anchored_l2": Entry(fr.anchored_l2, lambda z, a: (z - a).square(), [(0.4,), (-2.0,), (0.0,)], zeros=False),
    "ewc": Entry(
        fr.ewc, lambda z, a, f: 0.5 * f * (z - a).square(), [(0.4, 2.0), (-2.0, 0.1), (0.7, 0.0)], zeros=False
    ),
    "etp": Entry(
        fr.etp,
        lambda z, g: -torch.expm1(-g * z.abs()) / -math.expm1(-g),
        [(0.05,), (0.5,), (1.0,), (3.0,), (20.0,)],
    ),
    "geman": Entry(fr.geman, lambda z, g: z.abs() / (z.abs() + g), [(0.05,), (0.5,), (1.0,), (2.0,), (30.0,)]),
    "relaxed_mumford_shah": Entry(
        fr.relaxed_mumford_shah,
        lambda z, alpha, kappa: (alpha * z.square()).clamp(max=kappa),
        [(1.0, 2.0), (0.2, 0.3), (3.0, 0.1), (0.0, 1.0), (1.0, 0.0)],
        lambda s, alpha, kappa: [math.sqrt(kappa * (1 + 2 * alpha * s) / alpha)] if alpha else [1.0],
        zeros=False,
    ),
    "l0_envelope": Entry(
        fr.l0_envelope,
        lambda z, g: 1 - g / 2 * (math.sqrt(2 / g) - z.abs()).clamp(min=0).square(),
        [(0.3,), (1.0,), (2.0,), (40.0,)],
        lambda s, g: [math.sqrt(2 * g) * s, math.sqrt(2 / g), math.sqrt(2 * s)],
    ),
}
every_entry = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
# Among them the bounds of the regimes: gamma, a - 1, a + 1, epsilon^2, 2 theta, and their neighbours.
STEPS = [0.0, 0.01, 0.1, 0.25, 0.3999, 0.4, 0.5, 1.0, 1.2, 1.49999, 1.5, 2.7, 3.0, 3.00001, 4.7, 5.0, 13.0, 40.0]


def centre(entry: Entry, hyper: tuple[float, ...]) -> float:
    return hyper[0] if entry.penalty in (fr.anchored_l1, fr.anchored_l2, fr.ewc) else 0.0


def entries_near(entry: Entry, step: float, hyper: tuple[float, ...]) -> Tensor:
    """Entries over a range, and on both sides of every place where the operator jumps or bends."""
    places = torch.tensor(entry.jumps(step, *hyper) if entry.jumps else [step], dtype=torch.float64)
    near = torch.cat([places * (1 + d) for d in (-1e-3, -1e-9, -1e-15, 0.0, 1e-15, 1e-9, 1e-3)])
    near = torch.cat([near, -near, torch.linspace(-6, 6, 41, dtype=torch.float64)])
    return near + centre(entry, hyper)


def least(objective: Callable[[Tensor], Tensor], x: Tensor, low: Tensor, high: Tensor, kept: list[Tensor]) -> Tensor:
    """The least value of a function of one number for each entry of x: a grid, then finer ones around its best."""
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None]
    best = torch.stack([objective(z) for z in kept]).amin(0)
    for _ in range(4):
        z = low + (high - low) * t
        values = objective(z)
        best = torch.minimum(best, values.amin(0))
        middle, width = z.gather(0, values.argmin(0, keepdim=True))[0], (high - low) / (len(t) - 1)
        low, high = torch.maximum(middle - width, low), torch.minimum(middle + width, high)
        t = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    return best


@every_entry
def test_the_value_is_the_sum_of_its_equation(entry):
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    for hyper in entry.hypers:
        torch.testing.assert_close(entry.penalty(z, *hyper), entry.equation(z, *hyper).sum(), rtol=1e-14, atol=0)


@every_entry
def test_the_gradient_is_the_slope_of_the_value(entry):
    z = torch.linspace(-6, 6, 100, dtype=torch.float64)
    for hyper in entry.hypers:
        slope = (entry.equation(z + 1e-6, *hyper) - entry.equation(z - 1e-6, *hyper)) / 2e-6
        torch.testing.assert_close(entry.penalty.grad(z, *hyper), slope, rtol=1e-5, atol=1e-5)
        assert_equal(grad(entry.penalty)(z, *hyper), entry.penalty.grad(z, *hyper), rtol=1e-13, atol=1e-15)


@every_entry
@pytest.mark.parametrize("nonnegative", [False, True])
def test_prox_is_the_global_minimum_in_every_regime(entry, nonnegative):
    p = fr.nonnegative_form(entry.penalty) if nonnegative else entry.penalty
    for hyper, step in itertools.product(entry.hypers, STEPS):
        x = entries_near(entry, step, hyper)
        z = p.prox(x, step, *hyper)
        objective = lambda z, x=x, step=step, hyper=hyper: 0.5 * (z - x) ** 2 + step * entry.equation(z, *hyper)
        mid = torch.full_like(x, centre(entry, hyper))
        low, high = torch.minimum(x, mid) - 1e-3, torch.maximum(x, mid) + 1e-3
        kept = [x, mid]
        if nonnegative:
            assert (z >= 0).all()
            low, high, kept = low.relu(), high.relu(), [y.relu() for y in (x, mid)]
        gap = objective(z) - least(objective, x, low, high, kept)
        assert gap.max() <= 1e-12, (hyper, step, x[gap.argmax()], z[gap.argmax()])


@pytest.mark.parametrize(
    ("prox", "tie", "lower"),
    [
        (lambda x: fr.l0.prox(x, 0.5), 1.0, 0.0),
        (lambda x: fr.l_half.prox(x, 1.0), 1.5, 0.0),
        (lambda x: fr.l_two_thirds.prox(x, 1.5), 2.0, 0.0),
        (lambda x: fr.mcp.prox(x, 4.0, 1.0, 4.0), 4.0, 0.0),
        (lambda x: fr.scad.prox(x, 3.0, 1.0, 3.0), 3.5, 0.5),
        (lambda x: fr.scad.prox(x, 9.0, 1.0, 3.0), 6.0, 0.0),
        (lambda x: fr.capped_l1.prox(x, 1.0, 1.0), 1.5, 0.5),
        (lambda x: fr.capped_l1.prox(x, 8.0, 1.0), 4.0, 0.0),
    ],
    ids=["l0", "l_half", "l_two_thirds", "mcp", "scad", "scad far", "capped_l1", "capped_l1 far"],
)
def test_at_a_tie_the_smaller_point_is_taken(prox, tie, lower):
    x = torch.tensor([tie, tie * (1 + 1e-12)], dtype=torch.float64)
    for z in (prox(x), -prox(-x)):
        assert z[0] == lower
        assert z[1] > lower + 0.6
    assert torch.signbit(prox(-x)).tolist() == [lower != 0, True]  # No -0.0.


@every_entry
def test_prox_is_monotone_and_between_the_entry_and_the_centre(entry):
    x = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    for hyper, step in itertools.product(entry.hypers, STEPS):
        z, mid = entry.penalty.prox(x, step, *hyper), centre(entry, hyper)
        assert (z.diff() >= -1e-14).all()
        assert (z >= torch.minimum(x, torch.full_like(x, mid)) - 1e-14).all()
        assert (z <= torch.maximum(x, torch.full_like(x, mid)) + 1e-14).all()
        if not mid:
            assert_equal(entry.penalty.prox(-x, step, *hyper), -z)


@every_entry
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_step_zero_is_the_identity_to_the_last_bit(entry, dtype):
    x = torch.cat([torch.randn(200), 1e-3 * torch.randn(200), 1e4 * torch.randn(50), torch.tensor([0.0, -0.0])])
    tiny = torch.finfo(dtype).tiny
    ends = torch.tensor([tiny, -tiny, tiny / 16, -tiny / 8, math.inf, -math.inf], dtype=torch.float64)
    x = torch.cat([x.to(dtype), ends.to(dtype)])
    for hyper in entry.hypers:
        for step in (0.0, torch.tensor(0.0), torch.zeros_like(x)):
            assert torch.equal(entry.penalty.prox(x, step, *hyper), x)


@every_entry
def test_infinities_stay_and_an_infinite_step_leads_to_the_centre(entry):
    far = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    near = torch.tensor([5.0, -2.0, 0.1, 0.0, -0.0, math.nan], dtype=torch.float64)
    for hyper in entry.hypers:
        for step in STEPS:
            assert torch.equal(entry.penalty.prox(far, step, *hyper), far)
        if not all(hyper):
            continue  # Nothing times infinity.
        for step in (math.inf, torch.tensor(math.inf), torch.full_like(near, math.inf)):
            z = entry.penalty.prox(near, step, *hyper)
            assert z[-1].isnan()
            assert (z[:-1] == centre(entry, hyper)).all()
            slopes = grad(lambda x, s=step, h=hyper: entry.penalty.prox(x, s, *h).sum())(near)
            assert (slopes[:-1] == 0).all()


@every_entry
def test_float32_agrees_with_float64_over_the_range_of_numbers(entry):
    x = torch.logspace(-18, 18, 400, dtype=torch.float64).float()
    x = torch.cat([x, -x])
    for hyper, step in itertools.product(entry.hypers, [1e-30, 1e-6, 0.3, 2.9, 100.0, 1e6]):
        found = entry.penalty.prox(x, step, *hyper).double()
        exact = entry.penalty.prox(x.double(), step, *hyper)
        slack = 2e-6 * torch.maximum(x.double().abs(), torch.tensor(abs(centre(entry, hyper))).double())
        assert ((found - exact).abs() <= slack).all(), (hyper, step)


@cpu_only
@every_entry
def test_a_metric_may_take_steps_out_of_the_range_of_float32(entry):
    """Where that can be read: steps below 1e-38 and above 1e38, at which entries beyond 1e-19 and 1e19 jump."""
    x = 1.1 * torch.logspace(-37, 37, 149, dtype=torch.float64).float()
    for hyper, step, metric in itertools.product(entry.hypers, [3e-30, 0.7, 2e30], [1e-30, 1e-12, 1e12, 1e30]):
        h = torch.full_like(x, metric)
        found = entry.penalty.prox(x, step, *hyper, metric=h).double()
        exact = entry.penalty.prox(x.double(), step, *hyper, metric=h.double())
        slack = 2e-6 * torch.maximum(x.double().abs(), torch.tensor(abs(centre(entry, hyper))).double()) + 1e-38
        assert ((found - exact).abs() <= slack).all(), (hyper, step, metric)


@every_entry
def test_each_entry_may_have_its_own_step_and_hyperparameters(entry):
    x = 3 * torch.randn(40, dtype=torch.float64)
    steps = 10 ** torch.linspace(-2, 2, 40, dtype=torch.float64)
    for hyper in entry.hypers:
        rows = [h * torch.linspace(1, 2, 40, dtype=torch.float64) for h in hyper]
        together = entry.penalty.prox({"w": x}, {"w": steps}, *({"w": row} for row in rows))["w"]
        alone = [entry.penalty.prox(x[i], float(steps[i]), *(float(r[i]) for r in rows)) for i in range(40)]
        assert_equal(together, torch.stack(alone), rtol=1e-14, atol=1e-15)
        mapped = vmap(entry.penalty.prox)(x, steps, *rows)
        assert_equal(mapped, together, rtol=1e-14, atol=1e-15)
        # In the metric h of Adam, the step of each entry is step / h: every regime in one call.
        metric = {"w": 1 / steps}
        in_metric = entry.penalty.prox({"w": x}, 1.0, *({"w": row} for row in rows), metric=metric)["w"]
        assert_equal(in_metric, together, rtol=1e-12, atol=1e-13)


@every_entry
def test_derivatives_through_prox_are_finite_everywhere_and_right(entry):
    for hyper, step in itertools.product(entry.hypers, [0.0, 1e-4, 0.4, 1.5, 3.0, 4.7, 40.0]):
        x = torch.cat([entries_near(entry, step, hyper), torch.zeros(2, dtype=torch.float64)])
        rows = [torch.full_like(x, v) for v in (step, *hyper)]
        total = lambda x, *rows: entry.penalty.prox(x, *rows).sum()
        slopes = grad(total, argnums=tuple(range(1 + len(rows))))(x, *rows)
        assert slopes[0].isfinite().all()
        if step and all(hyper):
            assert all(slope.isfinite().all() for slope in slopes)
        if not step:
            continue
        d = 1e-7
        ahead, behind = entry.penalty.prox(x + d, step, *hyper), entry.penalty.prox(x - d, step, *hyper)
        here = entry.penalty.prox(x, step, *hyper)
        smooth = ((ahead + behind - 2 * here).abs() < 1e-12) & (x != 0)
        steep = slopes[0].abs() > 5  # Beside a jump that is about to open.
        torch.testing.assert_close(
            slopes[0][smooth & ~steep], ((ahead - behind) / (2 * d))[smooth & ~steep], rtol=1e-4, atol=1e-5
        )
        assert smooth.sum() > 20


@every_entry
def test_the_residual_is_zero_at_a_point_that_cannot_be_bettered(entry):
    b = torch.tensor([3.0, 1.7, -0.9, 0.2, 0.0, -6.0], dtype=torch.float64)
    for hyper, strength in itertools.product(entry.hypers, [0.0, 0.3, 1.4]):
        z = entry.penalty.prox(b, strength, *hyper)
        assert fr.kkt_residual(z, z - b, entry.penalty, *hyper, strength=strength) <= 1e-13
    hyper = entry.hypers[0]
    assert fr.kkt_residual(b, torch.ones_like(b), entry.penalty, *hyper, strength=0.0) == 1
    left = lambda s: fr.kkt_residual(b, 0.3 * b, entry.penalty, *hyper, strength=s)
    at = torch.tensor(0.4, dtype=torch.float64)
    slope = (left(at + 1e-6) - left(at - 1e-6)) / 2e-6
    torch.testing.assert_close(torch.func.grad(left)(at), slope, rtol=1e-5, atol=1e-8)
    assert entry.penalty.residual(b, b * math.nan, *hyper).isnan().all()


# What the names mean


@pytest.mark.parametrize("limit", [fr.etp, fr.l0_envelope], ids=["etp", "l0_envelope"])
@pytest.mark.parametrize("gamma", [math.inf, torch.tensor(math.inf, dtype=torch.float64)], ids=["number", "tensor"])
def test_what_levels_off_at_once_is_l0(limit, gamma):
    params = draw()
    assert limit(params, gamma) == fr.l0(params)
    assert_equal(limit.grad(params, gamma), fr.l0.grad(params))
    for step in (0.0, 0.1, 1.0, 30.0):
        assert_equal(limit.prox(params, step, gamma), fr.l0.prox(params, step))


def test_limits_are_the_penalties_they_lead_to():
    params = draw()
    for limit, hyper, plain in (
        (fr.mcp, (1.0, math.inf), fr.l1),
        (fr.scad, (1.0, math.inf), fr.l1),
        (fr.capped_l1, (math.inf,), fr.l1),
        (fr.anchored_l1, (0.0,), fr.l1),
        (fr.huber, (math.inf,), fr.half_l2),
        (fr.anchored_l2, (0.0,), fr.l2),
        (fr.ewc, (0.0, 1.0), fr.half_l2),
        (fr.relaxed_mumford_shah, (1.0, math.inf), fr.l2),
        (fr.log_sum, (math.inf,), 0.0 * fr.l1),
        (fr.geman, (math.inf,), 0.0 * fr.l1),
        (1e200 * fr.log_sum.given(1e200), (), fr.l1),
        (1e200 * fr.geman.given(1e200), (), fr.l1),
        (fr.geman, (1e-200,), fr.l0),
        (fr.etp, (1e300,), fr.l0),
        (fr.group_mcp, (1.0, math.inf), fr.group_lasso),
        (fr.group_scad, (1.0, math.inf), fr.group_lasso),
    ):
        torch.testing.assert_close(limit(params, *hyper), plain(params), rtol=1e-14, atol=0)
        assert_equal(limit.grad(params, *hyper), plain.grad(params), rtol=1e-14, atol=1e-150)
        for step in (0.1, 1.0, 30.0):
            assert_equal(limit.prox(params, step, *hyper), plain.prox(params, step), rtol=1e-14, atol=1e-15)
        slopes = lambda p, *hyper: grad(lambda w, s: (flat(p.prox(w, s, *hyper)) * flat(draw(1))).sum(), argnums=(0, 1))
        at = params, torch.tensor(0.8, dtype=torch.float64)
        assert_equal(slopes(limit, *hyper)(*at), slopes(plain)(*at), rtol=1e-12, atol=1e-14)


def test_an_anchor_is_a_tree_like_the_parameters():
    params, anchor = draw(), draw(1)
    fisher = fr.tree_map(torch.square, draw(2))
    change = flat(params) - flat(anchor)
    torch.testing.assert_close(fr.anchored_l1(params, anchor), change.abs().sum())
    torch.testing.assert_close(fr.anchored_l2(params, anchor), change @ change)
    torch.testing.assert_close(fr.ewc(params, anchor, fisher), 0.5 * (flat(fisher) * change) @ change)
    for p, hyper in ((fr.anchored_l1, (anchor,)), (fr.anchored_l2, (anchor,)), (fr.ewc, (anchor, fisher))):
        assert_equal(p.grad(params, *hyper), grad(p)(params, *hyper), rtol=1e-13)
        assert_equal(p.prox(anchor, 0.7, *hyper), anchor, rtol=1e-15)
        with pytest.raises(ValueError, match="lacks 'head'"):
            p.prox(params, 0.7, *({"body": h["body"]} for h in hyper))
        with pytest.raises(ValueError, match=r"'head\.weight': a hyperparameter has shape \(5,\)"):
            p(params, *({**h, "head": h["head"]._replace(weight=torch.zeros(5))} for h in hyper))
    # Most weights are back, to the last bit, in any dtype.
    for dtype in (torch.float32, torch.bfloat16):
        start = draw(1, dtype)
        moved = fr.tree_map(lambda a, w: a + 0.1 * w, start, draw(2, dtype))
        assert_equal(fr.anchored_l1.prox(moved, 10.0, start), start)


def test_weights_are_trees_of_strengths():
    params, weights = draw(), fr.tree_map(torch.abs, draw(1))
    terms = flat(weights) * flat(params).abs()
    torch.testing.assert_close(fr.elastic(params, weights, 1.0), terms.sum())
    torch.testing.assert_close(fr.ewc(params, 0.0, weights), 0.5 * (flat(weights) * flat(params)) @ flat(params))
    assert_equal(fr.elastic.prox(params, 0.5, weights, 1.0), fr.l1.prox(params, fr.tree_map(lambda h: h / 2, weights)))
    kept = fr.l0.prox(params, weights)
    stays = flat(params).square() > 2 * flat(weights)
    assert torch.equal(flat(kept), torch.where(stays, flat(params), 0.0))
    residual = fr.log_sum.residual(params, fr.tree_map(torch.zeros_like, params), 0.5, strength=weights)
    assert_equal(residual, fr.tree_map(lambda h, g: h * g, weights, fr.log_sum.grad(params, 0.5)), rtol=1e-14)


def test_trees_of_hyperparameters_stand_in_fused_steps():
    anchor, fisher = draw(1), fr.tree_map(torch.square, draw(2))
    strengths = fr.tree_map(lambda w: w.abs() + 0.1, draw(3))
    for tx in (
        fr.chain(fr.add_penalty(fr.ewc, anchor, fisher, strength=0.5), fr.sgd(0.1)),
        fr.prox_adam(0.1, fr.anchored_l1, anchor, strength=2.0, eps=0.1),
        fr.prox_adam(0.1, fr.mcp, strengths, 3.0, eps=0.1),
        fr.prox_sgd(0.5, fr.nonnegative_form(fr.l0), strength=strengths),
    ):
        params, step = draw(), fr.fuse(tx, backend="eager")
        fused, state = (params, tx.init(params)), tx.init(params)
        for seed in range(4, 8):
            updates, state = tx.update(draw(seed), state, params)
            params = fr.apply_updates(params, updates)
            fused = step(fused[0], draw(seed), fused[1])
        assert_equal(fused, (params, state), rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_prox_adam_solves_nonconvex_and_anchored_problems():
    b = torch.tensor([4.0, 2.0, 0.3, -0.1, -3.0], dtype=torch.float64)
    anchor = {"w": torch.tensor([4.0, 0.0, 0.0, 1.0, -2.0], dtype=torch.float64)}
    for penalty, hyper, strength in (
        (fr.mcp, (0.5, 3.0), 1.0),
        (fr.scad, (0.5, 3.7), 1.0),
        (fr.log_sum, (1.0,), 0.5),
        (fr.capped_l1, (1.5,), 0.5),
        (fr.anchored_l1, (anchor,), 0.5),
        (fr.ewc, (anchor, {"w": b.square()}), 0.5),
    ):
        tx, params = fr.prox_adam(0.05, penalty, *hyper, strength=strength, eps=0.1), {"w": torch.ones_like(b)}
        state = tx.init(params)
        for _ in range(1500):
            updates, state = tx.update({"w": params["w"] - b}, state, params)
            params = fr.apply_updates(params, updates)
        slopes = {"w": params["w"] - b}
        assert fr.kkt_residual(params, slopes, penalty, *hyper, strength=strength) < 1e-6, penalty


# Wrong input


def test_wrong_hyperparameters_are_told():
    w = torch.ones(2)
    for wrong, message in (
        (lambda: fr.mcp(w, -1.0, 3.0), "strength of mcp is -1"),
        (lambda: fr.mcp(w, 1.0, 0.0), "gamma of mcp is 0"),
        (lambda: fr.scad.prox(w, 1.0, 1.0, 1.5), "a of scad is 1.5"),
        (lambda: fr.log_sum.grad(w, 0), "epsilon of log_sum is 0"),
        (lambda: fr.capped_l1(w, -0.1), "threshold of capped_l1 is -0.1"),
        (lambda: fr.huber(w, -0.1), "delta of huber is -0.1"),
        (lambda: fr.ewc(w, 0.0, -2.0), "fisher of ewc is -2"),
        (lambda: fr.nonnegative_form(fr.nuclear), "separable=True"),
        (lambda: fr.nonnegative_form(fr.l1)({"w": torch.ones(2, dtype=torch.complex64)}), "'w'.*complex"),
        (lambda: fr.nonnegative_form(fr.mcp).prox(w, 1.0, 1.0, -3.0), "gamma of nonnegative mcp is -3"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(TypeError, match="anchor is missing"):
        fr.anchored_l2(w)


# Non-negative forms


def test_a_nonnegative_form_is_its_penalty_on_weights_of_at_least_zero():
    p, params = fr.nonnegative_form(fr.elastic), fr.tree_map(torch.abs, draw())
    assert repr(p) == "nonnegative_form(elastic)"
    assert p.separable
    assert p(params, 0.3, 0.5) == fr.elastic(params, 0.3, 0.5)
    assert p(draw(), 0.3, 0.5) == math.inf
    assert_equal(p.grad(params, 0.3, 0.5), fr.elastic.grad(params, 0.3, 0.5))
    assert_equal(p.prox(params, 0.7, 0.3, 0.5), fr.elastic.prox(params, 0.7, 0.3, 0.5))
    assert_equal(p.prox(draw(), 0.0, 0.3, 0.5), fr.tree_map(lambda w: w.clamp(min=0.0), draw()))
    h = fr.tree_map(lambda w: w.abs() + 0.1, draw(1))
    below_zero = fr.tree_map(lambda w: fr.elastic.prox(w, 0.7, 0.3, 0.5).relu(), draw())
    assert_equal(p.prox(draw(), 0.7, 0.3, 0.5), below_zero)
    assert (flat(p.prox(draw(), 0.7, 0.3, 0.5, metric=h)) >= 0).all()
    masked = p.prox(draw(), 0.7, 0.3, 0.5, mask=fr.select("head.*"))
    assert_equal(masked["body"], draw()["body"])
    with torch.device("meta"):
        here = p(params, 0.3, 0.5), p.prox(params, 0.7, 0.3, 0.5)
    assert_equal(here, (p(params, 0.3, 0.5), p.prox(params, 0.7, 0.3, 0.5)))
    assert p({"w": torch.tensor([])}, 0.3, 0.5) == p({}, 0.3, 0.5) == 0
    assert p(fr.tree_map(lambda w: w.bfloat16(), params), 0.3, 0.5).dtype == torch.float32
    assert p.prox(torch.tensor(-1.0, dtype=torch.float16), 0.7, 0.3, 0.5).dtype == torch.float16
    nan = p.prox(torch.tensor([math.nan, -1.0]), 0.7, 0.3, 0.5)
    assert nan[0].isnan()
    assert nan[1] == 0


def test_a_nonnegative_form_stands_wherever_a_penalty_does():
    p = fr.nonnegative_form(fr.l1)
    b = torch.tensor([2.0, 0.2, -3.0], dtype=torch.float64)
    tx, params = fr.prox_adam(0.1, p, strength=0.5, b2=0.99), {"w": torch.ones_like(b)}
    state, step = tx.init(params), torch.compile(tx.update, fullgraph=True, backend="aot_eager")
    for _ in range(1000):
        updates, state = step({"w": params["w"] - b}, state, params)
        params = fr.apply_updates(params, updates)
    torch.testing.assert_close(params["w"], torch.tensor([1.5, 0.0, 0.0], dtype=torch.float64))
    assert fr.kkt_residual(params, {"w": params["w"] - b}, p, strength=0.5) < 1e-6
    steps = torch.tensor([0.1, 0.5])
    members = vmap(lambda s: p.prox(params, s)["w"])(steps)
    assert_equal(members, torch.stack([p.prox(params, float(s))["w"] for s in steps]), rtol=1e-7)
