"""Factored, orthogonal, mixed and value-driven steps: equality with torch's optimizers, and what is refused."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, assert_equal, cpu_only, draw, flat, normal
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

import funcreg as fr


def weights(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": normal(generator, *shape) for i, shape in enumerate(shapes)}


def follow(tx, optimizer, params, twins, steps=8, close=None):
    """The steps of a chain and of an optimizer of torch, on the same gradients."""
    state = tx.init(params)
    for n in range(steps):
        grads = weights(*[w.shape for w in params.values()], seed=n + 1)
        updates, state = tx.update(grads, state, params)
        params = fr.apply_updates(params, updates)
        for twin, g in zip(twins.values(), grads.values(), strict=True):
            twin.grad = g.clone()
        optimizer.step()
        for name, twin in twins.items():
            assert_close(params[name], twin.detach(), **(close or {"rtol": 1e-9, "atol": 1e-11}))


def twins_of(params):
    return {name: w.clone().requires_grad_() for name, w in params.items()}


@pytest.mark.parametrize("threshold", [1.0, 1.2])
def test_adafactor_is_that_of_torch_under_its_schedule(threshold):
    params = weights((4, 3), (3, 5), (6,))
    twins = twins_of(params)
    optimizer = torch.optim.Adafactor(twins.values(), lr=0.2, d=threshold, eps=(1e-30, 1e-3))
    # A step of at most the inverse root of the number of steps.
    rate = lambda count: (1 / (count + 1.0).double().sqrt()).clamp(max=0.2)
    tx = fr.adafactor(rate, min_dim_size_to_factor=1, clipping_threshold=threshold)
    follow(tx, optimizer, params, twins)


def test_muon_is_that_of_torch_but_for_its_sums_in_bfloat16():
    params = weights((6, 4), (4, 8))
    twins = twins_of(params)
    optimizer = torch.optim.Muon(twins.values(), lr=0.1, weight_decay=0.2, momentum=0.9, nesterov=False, eps=1e-8)
    tx = fr.muon(
        0.1,
        beta=0.9,
        weight_decay=0.2,
        nesterov=False,
        muon_weight_dimension_numbers=fr.MuonDimensionNumbers(1, 0),
    )
    follow(tx, optimizer, params, twins, close={"rtol": 0, "atol": 2e-2})


def test_plateaus_are_those_of_torch_with_one_value_more_of_patience():
    optimizer = torch.optim.SGD([torch.ones(1)], 1.0)
    other = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=2, cooldown=2, threshold=1e-2, threshold_mode="rel"
    )
    tx, params = fr.reduce_on_plateau(factor=0.5, patience=3, cooldown=2, rtol=1e-2), {"w": torch.ones(1)}
    state = tx.init(params)
    generator = torch.Generator().manual_seed(0)
    losses = (2 + torch.rand(60, generator=generator, device="cpu")) * 0.98 ** torch.arange(60, device="cpu")
    for loss in losses.tolist():
        updates, state = tx.update(params, state, params, value=loss)
        other.step(loss)
        assert float(updates["w"]) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert float(state.scale) < 0.2


@pytest.mark.parametrize("offset", [-3.0, -1.0, 5.0])
def test_a_plateau_of_negative_values_is_one(offset):
    tx, params = fr.reduce_on_plateau(factor=0.5, patience=2), {"w": torch.ones(1)}
    state, scales = tx.init(params), []
    for value in (1.0, 1.0, 1.0, 0.5, 0.5, 0.6, 0.6):
        _, state = tx.update(params, state, params, value=value + offset)
        scales.append(state.scale.item())
    assert scales == [1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_members_of_an_ensemble_have_plateaus_of_their_own():
    tx, params = fr.reduce_on_plateau(factor=0.5, patience=1), {"w": torch.ones(2, 3)}
    state = vmap(tx.init)(params)
    step = vmap(lambda u, s, p, value: tx.update(u, s, p, value=value))
    for n in range(3):
        updates, state = step(params, state, params, torch.tensor([1.0, 1.0 / (n + 1)]))
    assert_equal(updates["w"], torch.tensor([[0.25] * 3, [1.0] * 3]))


def test_a_factored_leaf_keeps_a_number_for_each_row_and_column_alone():
    params = weights((300, 200), (300, 100), (500,))
    state = fr.scale_by_factored_rms().init(params)
    kept = [{name: leaf.numel() for name, leaf in tree.items()} for tree in (state.v_row, state.v_col, state.v)]
    assert kept == [{"w0": 200, "w1": 1, "w2": 1}, {"w0": 300, "w1": 1, "w2": 1}, {"w0": 1, "w1": 30000, "w2": 500}]


PRECONDITIONERS = {
    "factored": fr.scale_by_factored_rms(min_dim_size_to_factor=2),
    "ademamix": fr.scale_by_ademamix(b3=0.9, alpha=3.0),
    "ademamix on schedules": fr.scale_by_ademamix(
        b3=fr.linear_schedule(0.1, 0.95, 20), alpha=fr.linear_schedule(0.0, 2.0, 20)
    ),
    "simplified_ademamix": fr.scale_by_simplified_ademamix(0.5, alpha=2.0),
    "adopt": fr.scale_by_adopt(b2=0.95),
}


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS.values(), ids=PRECONDITIONERS)
def test_a_proximal_step_in_its_metric_ends_at_the_solution_of_the_penalized_problem(preconditioner):
    goal = weights((4, 3), (5,))
    tx = fr.proximal_step(preconditioner, fr.cosine_decay_schedule(0.1, 250), fr.l1, strength=0.4)
    params = fr.tree_map(torch.zeros_like, goal)
    state = tx.init(params)
    for _ in range(250):
        updates, state = tx.update(fr.tree_map(lambda w, g: w - g, params, goal), state, params)
        params = fr.apply_updates(params, updates)
    expected = fr.l1.prox(goal, 0.4)
    assert_close(flat(params), flat(expected), rtol=0, atol=1e-2)
    assert ((flat(params) == 0) == (flat(expected) == 0)).all()


def test_gradients_of_examples_are_clipped_as_in_a_loop():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    loss = lambda params, x, y: (functional_call(model, params, (x,)) - y).square().sum()
    grads = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    for bound in (0.0, 1.0, 5.0, float("inf"), torch.tensor(1.0)):
        total, count = fr.per_example_global_norm_clip(grads, bound)
        each = [fr.tree_map(lambda g, i=i: g[i], grads) for i in range(6)]
        sizes = [float(fr.global_norm(g)) for g in each]
        factors = [min(1.0, float(bound) / size) for size in sizes]
        expected = fr.tree_map(lambda *gs, factors=factors: sum(f * g for f, g in zip(factors, gs, strict=True)), *each)
        assert_equal(total, expected, rtol=1e-12, atol=1e-13)
        assert (int(count), count.dtype) == (sum(f < 1 for f in factors), torch.int32)
        for uniform in (True, False):
            total, counts = fr.per_example_layer_norm_clip(grads, bound, uniform)
            for name, size in (("weight", 12), ("bias", 3)):
                most = float(bound) * (0.5 if uniform else size / 15) ** 0.5
                factors = [min(1.0, most / float(g.norm())) for g in grads[name]]
                assert_close(total[name], sum(f * g for f, g in zip(factors, grads[name], strict=True)))
                assert int(counts[name]) == sum(f < 1 for f in factors)
    compiled = torch.compile(fr.per_example_global_norm_clip, backend="eager", fullgraph=True)
    assert_equal(compiled(grads, 1.0), fr.per_example_global_norm_clip(grads, 1.0), rtol=1e-12)


def test_examples_without_a_gradient_and_in_sixteen_bits_are_summed():
    zero = {"w": torch.zeros(3, 2), "b": torch.zeros(3)}
    for f in (fr.per_example_global_norm_clip, fr.per_example_layer_norm_clip):
        total, count = f(zero, 1.0)
        assert_equal(total, {"w": torch.zeros(2), "b": torch.zeros(())})
        assert not any([bool(n) for n in fr.tree_leaves(count)])
        total, _ = f({"w": torch.full((1000, 2), 0.01, dtype=torch.bfloat16)}, 1.0)
        assert_close(total["w"].float(), torch.full((2,), 10.0), rtol=1e-2, atol=0)
    slope = grad(lambda g: fr.per_example_global_norm_clip({"w": g}, 1.0)[0]["w"].sum())(torch.zeros(3, 2))
    assert slope.isfinite().all()


def test_noise_of_the_right_size_makes_clipped_sums_private():
    # The recipe of the documentation: noise of standard deviation 2 * 1.5 on a sum over 50.
    grads = {"w": torch.ones(50, 10_000, dtype=torch.float64)}
    total, _ = fr.per_example_global_norm_clip(grads, 1.5)
    mean = fr.tree_map(lambda g: g / 50, total)
    tx = fr.add_noise((2 * 1.5 / 50) ** 2, 0.0, key=0)
    updates, _ = tx.update(mean, tx.init(mean), mean)
    assert float((updates["w"] - mean["w"]).std()) == pytest.approx(2 * 1.5 / 50, rel=3e-2)


P = {"w": torch.ones(3, 2), "b": torch.ones(3)}
WRONG = {
    "no value": (
        lambda: step(fr.scale_by_polyak()),
        TypeError,
        r"scale_by_polyak needs the value.*value=loss\)",
    ),
    "no value for a plateau": (lambda: step(fr.reduce_on_plateau()), TypeError, "reduce_on_plateau needs the value"),
    "values of examples": (
        lambda: step(fr.polyak_sgd(), value=torch.ones(3)),
        ValueError,
        r"value has shape \(3,\); expected a number",
    ),
    "a variant": (
        lambda: fr.polyak_sgd(variant="sps++"),
        ValueError,
        r"variant is 'sps\+\+'; expected one of sps, sps",
    ),
    "no tolerance": (lambda: fr.reduce_on_plateau(rtol=0.0), ValueError, "rtol and atol are both 0"),
    "patience": (
        lambda: fr.reduce_on_plateau(patience=0),
        ValueError,
        "patience is 0; expected a whole number of at l",
    ),
    "a bool": (lambda: fr.reduce_on_plateau(cooldown=True), ValueError, "cooldown is True; expected a whole number"),
    "size": (lambda: fr.adafactor(0.1, min_dim_size_to_factor=0), ValueError, "min_dim_size_to_factor is 0; expected"),
    "a decay": (
        lambda: fr.scale_by_factored_rms(decay_rate_fn=0.9),
        TypeError,
        "decay_rate_fn is 0.9; expected a function",
    ),
    "a mask alone": (
        lambda: fr.adafactor(0.1, weight_decay_mask=fr.matrices),
        ValueError,
        "weight_decay_mask has no effect without weight_decay_rate",
    ),
    "a bound": (lambda: fr.scale_by_adopt(clip_value_fn=1.0), TypeError, "clip_value_fn is 1.0; expected a function"),
    "a vector": (
        lambda: fr.scale_by_muon().init(P),
        ValueError,
        r"at leaf 'b': it has shape \(3,\); expected a matrix",
    ),
    "coefficients": (
        lambda: fr.scale_by_muon((1.0, 2.0)),
        ValueError,
        r"ns_coeffs is \(1.0, 2.0\); expected three num",
    ),
    "no coefficients": (lambda: fr.scale_by_muon(3.0), TypeError, r"ns_coeffs is 3.0; expected three numbers"),
    "too many": (
        lambda: fr.muon(0.1, "dion", ns_steps=4),
        ValueError,
        "ns_coeffs has 5 rows; expected at most ns_steps of them, which is 4",
    ),
    "a name": (lambda: fr.muon(0.1, "dino"), ValueError, "ns_coeffs is 'dino'; expected numbers, or one of standard"),
    "steps": (lambda: fr.muon(0.1, ns_steps=0), ValueError, "ns_steps is 0; expected a whole number of at least 1"),
    "preconditioning": (
        lambda: fr.muon(0.1, preconditioning="none"),
        ValueError,
        "preconditioning is 'none'; expected one of frobenius",
    ),
    "numbers for another tree": (
        lambda: fr.muon(0.1, muon_weight_dimension_numbers={"w": fr.MuonDimensionNumbers()}).init(P),
        ValueError,
        "weight_dimension_numbers lacks 'b'; expected a tree like the parameters",
    ),
    "no numbers": (
        lambda: fr.muon(0.1, muon_weight_dimension_numbers={"w": (0, 1), "b": None}).init(P),
        TypeError,
        r"at 'w' is \(0, 1\); expected MuonDimensionNumbers, or None",
    ),
    "a dimension twice": (
        lambda: fr.muon(0.1, muon_weight_dimension_numbers={"w": fr.MuonDimensionNumbers(1, -1), "b": None}).init(P),
        ValueError,
        "at leaf 'w': MuonDimensionNumbers.* name a dimension twice",
    ),
    "a dimension too many": (
        lambda: fr.muon(0.1, muon_weight_dimension_numbers=fr.MuonDimensionNumbers(0, 2)).init(P),
        ValueError,
        "at leaf '[bw]': it has shape .* do not fit",
    ),
    "different examples": (
        lambda: fr.per_example_global_norm_clip({"w": torch.ones(3, 2), "x": torch.ones(4)}, 1.0),
        ValueError,
        r"grads 'x' has shape \(4,\); expected the examples as its first dimension, 3, as 'w' has",
    ),
    "no examples": (
        lambda: fr.per_example_layer_norm_clip({"w": torch.ones(())}, 1.0),
        ValueError,
        r"grads 'w' has shape \(\); expected the examples as its first dimension",
    ),
    "a bound below 0": (
        lambda: fr.per_example_global_norm_clip({"w": torch.ones(3, 2)}, -1.0),
        ValueError,
        "l2_norm_clip is -1.0; expected a number of at least 0",
    ),
    "a schedule for a bound": (
        lambda: fr.per_example_layer_norm_clip({"w": torch.ones(3, 2)}, lambda count: 1.0),
        TypeError,
        "global_l2_norm_clip is the function .*It follows no schedule",
    ),
    "nothing": (lambda: fr.per_example_layer_norm_clip({}, 1.0), ValueError, "got a tree without leaves"),
}


def step(tx, **extra):
    return tx.update(P, tx.init(P), P, **extra)


@cpu_only
@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_work_is_said_with_its_cause(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_orthogonal_steps_have_equal_sizes_in_all_layouts_of_torch():
    params = {"linear": draw()["head"].weight, "filters": draw()["body"]["filters"]}
    numbers = {"linear": fr.MuonDimensionNumbers(1, 0), "filters": fr.MuonDimensionNumbers((1, 2, 3), 0)}
    tx = fr.muon(1.0, preconditioning="spectral", ns_steps=12, muon_weight_dimension_numbers=numbers)
    updates, _ = tx.update(params, tx.init(params), params)
    for name, u in updates.items():
        matrix = u.flatten(1)
        sizes = torch.linalg.svdvals(matrix) / max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        assert (sizes > 0.6).all(), name
        assert (sizes < 1.3).all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("eps_in_sqrt", [True, False])
def test_updates_that_stay_the_same_have_no_spread_and_no_nan(dtype, eps_in_sqrt):
    u = torch.linspace(3.1, 3.3, 50, dtype=dtype, device="cpu").to(DEVICE)
    tx = fr.scale_by_stddev(0.99, 4.0, eps_in_sqrt=eps_in_sqrt, bias_correction=True)
    state = tx.init(u)
    for _ in range(20):  # The mean square is that of the mean, and rounding takes some below it.
        scaled, state = tx.update(u, state, u)
    assert_close(scaled, u / (2 if eps_in_sqrt else 4), rtol=1e-2, atol=0)


def test_an_average_of_adafactor_begins_at_its_offset():
    late, now = fr.scale_by_factored_rms(step_offset=3), fr.scale_by_factored_rms()
    params, grads = torch.zeros(2), [torch.tensor([n + 1.0, -2.0 * n - 1.0]) for n in range(6)]
    state, begun = late.init(params), now.init(params)
    for n, g in enumerate(grads):
        updates, state = late.update(g, state, params)
        if n < 3:
            assert_equal(updates, g.sign())
        else:
            expected, begun = now.update(g, begun, params)
            assert_equal(updates, expected)
