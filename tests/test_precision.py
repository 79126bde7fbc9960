"""Parameters and moments of sixteen bits: small steps act, zeros are exact, states stay small."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from cases import DEVICE, TRANSFORMS, assert_equal, draw
from torch.func import vmap

import funcreg as fr
from funcreg.core.rounding import rounded, words

BF16 = torch.bfloat16


def descend(tx, params, grads, steps):
    state = tx.init(params)
    for n in range(steps):
        updates, state = tx.update(grads(n), state, params)
        params = fr.apply_updates(params, updates)
    return params, state


def narrow(tree, dtype=BF16):
    return fr.tree_map(lambda w: w.to(dtype), tree)


def wide(tree):
    return fr.tree_map(lambda w: w.float(), tree)


# Copies in float32


@pytest.mark.parametrize("case", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_parameters_are_the_rounding_of_a_run_in_float32(case, dtype):
    start, grads = narrow(draw(), dtype), [narrow(draw(n + 1), dtype) for n in range(4)]
    tx = case.make()
    params, state = descend(fr.with_master_weights(tx), start, lambda n: grads[n], 4)
    expected, inner = descend(tx, wide(start), lambda n: wide(grads[n]), 4)
    assert_equal(state.master, expected, rtol=1e-5, atol=1e-6)
    assert_equal(params, narrow(state.master, dtype))
    assert {w.dtype for w in fr.tree_leaves(params)} == {dtype}
    assert [x.dtype for x in fr.tree_leaves(state.inner_state)] == [x.dtype for x in fr.tree_leaves(inner)]


SLOW = fr.constant_schedule(1e-3)

#: Optimizers that take 5e-4 of the weights away in each step: a quarter of what moves a one of bfloat16.
DECAYING = {
    "adamw": lambda: fr.adamw(1e-3, weight_decay=0.5),
    "nadamw": lambda: fr.nadamw(1e-3, weight_decay=0.5),
    "lion": lambda: fr.lion(1e-3, weight_decay=0.5),
    "sgd": lambda: fr.chain(fr.add_decayed_weights(0.5), fr.sgd(1e-3)),
    "sgd with nesterov": lambda: fr.chain(fr.add_decayed_weights(0.25), fr.sgd(1e-3, momentum=0.5, nesterov=True)),
    "prox_sgd": lambda: fr.prox_sgd(1e-3, fr.half_l2, strength=0.5),
    "prox_adam": lambda: fr.prox_adam(1e-3, fr.l1, strength=0.0, weight_decay=0.5),
    "a decay of its own": lambda: fr.chain(fr.sgd(1e-3), fr.proximal(fr.half_l2, 5e-4)),
    "adamprox": lambda: fr.adamprox(1e-3, 0.5),
    "adamaxw": lambda: fr.adamaxw(1e-3, weight_decay=0.5),
    "adan": lambda: fr.adan(1e-3, weight_decay=0.5),
    "ademamix": lambda: fr.ademamix(1e-3, weight_decay=0.5),
    "simplified_ademamix": lambda: fr.simplified_ademamix(1e-3, weight_decay=0.5),
    "muon": lambda: fr.muon(1e-3, adam_weight_decay=0.5),
    "adafactor": lambda: fr.adafactor(1e-3, weight_decay_rate=5e-4),
    **{
        kind: lambda kind=kind: fr.with_weight_decay(fr.adam(SLOW), kind, 5e-4 if kind == "independent" else 0.5)
        for kind in ("decoupled", "independent", "cautious", "proximal")
    },
}


@pytest.mark.parametrize("make", DECAYING.values(), ids=DECAYING)
def test_a_decay_that_is_less_than_a_step_of_bfloat16_acts_in_every_optimizer(make):
    start = torch.ones(3, dtype=BF16)
    zeros = torch.zeros_like(start)
    params, state = descend(fr.with_master_weights(make()), start, lambda n: zeros, 200)
    assert abs(float(state.master[0]) - 0.9048) < 1e-3
    assert params[0] == torch.tensor(0.9048).bfloat16()


@pytest.mark.parametrize("make", DECAYING.values(), ids=DECAYING)
def test_such_a_decay_acts_by_stochastic_rounding_too(make):
    start = torch.ones(4000, dtype=BF16)
    zeros = torch.zeros_like(start)
    params, _ = descend(fr.with_stochastic_rounding(make(), 0), start, lambda n: zeros, 20)
    expected, _ = descend(make(), start.float(), lambda n: zeros.float(), 20)
    # Steps of 5e-4 by one of 2^-8, in 4000 places: the mean is off by 1e-4 or so.
    assert abs(float(params.double().mean()) - float(expected[0])) < 5e-4
    assert expected[0] < 0.995


def test_the_optimizer_of_torch_leaves_one_at_one():
    w = torch.nn.Parameter(torch.ones(3, dtype=BF16))
    optimizer = torch.optim.AdamW([w], lr=1e-3, weight_decay=0.1, foreach=False)
    w.grad = torch.zeros_like(w)
    for _ in range(1000):
        optimizer.step()
    assert (w == 1).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: fr.prox_sgd(1e-3, fr.l1, strength=1e-3),
        lambda: fr.chain(fr.sgd(1e-3), fr.soft_threshold(1e-6)),
        lambda: fr.chain(fr.adam(1e-3), fr.soft_threshold(1e-6)),
    ],
)
def test_thresholds_of_a_millionth_act_and_zeros_are_exact(make):
    start = torch.tensor([1.0, -0.5, 2.0**-11], dtype=BF16)
    zeros = torch.zeros_like(start)
    params, state = descend(fr.with_master_weights(make()), start, lambda n: zeros, 500)
    torch.testing.assert_close(state.master, torch.tensor([0.9995, -0.4995, 0.0]), rtol=2e-5, atol=1e-7)
    assert (params[2], state.master[2]) == (0, 0)
    assert not torch.signbit(params[2])


def test_leaves_of_float32_are_their_own_copies_and_frozen_leaves_stay():
    params = {"a": torch.ones(2, dtype=BF16), "b": torch.ones(2), "c": torch.ones(2, dtype=BF16)}
    tx = fr.with_master_weights(fr.chain(fr.freeze({"a": False, "b": False, "c": True}), fr.sgd(0.5)))
    state = tx.init(params)
    assert fr.tree_paths(state.master) == ["a", "c"]
    updates, _ = tx.update(params, state, params)
    assert {name: u.dtype for name, u in updates.items()} == dict.fromkeys("abc", torch.float32)
    assert_equal(fr.apply_updates(params, updates), {"a": 0.5 * params["a"], "b": 0.5 * params["b"], "c": params["c"]})


def test_copies_share_no_memory_and_arguments_stay():
    params = narrow(draw())
    tx = fr.with_master_weights(fr.prox_adam(1e-3, fr.l1))
    state = tx.init(params)
    before = fr.tree_map(torch.clone, (params, state))
    updates, after = tx.update(narrow(draw(1)), state, params)
    assert_equal((params, state), before)
    places = [leaf.data_ptr() for leaf in fr.tree_leaves((params, state, updates, after))]
    assert len(set(places)) == len(places)


def test_what_changes_its_updates_is_warned_of():
    with pytest.warns(UserWarning, match=r"scale\(0.5\) stands after with_master_weights\(adam\(0.1\)\)"):
        fr.chain(fr.with_master_weights(fr.adam(0.1)), fr.scale(0.5))
    with pytest.raises(TypeError, match="argument 0 of with_master_weights is a float; expected a Transform"):
        fr.with_master_weights(0.1)


def test_a_run_goes_on_from_a_file(tmp_path):
    tx, params = fr.with_master_weights(fr.adamw(1e-2)), narrow(draw())
    params, state = descend(tx, params, lambda n: narrow(draw(n + 1)), 2)
    torch.save(fr.to_state_dict({"params": params, "state": state}), tmp_path / "run.pt")
    template = {"params": params, "state": tx.init(params)}
    again = fr.from_state_dict(template, torch.load(tmp_path / "run.pt"))
    assert_equal(again, {"params": params, "state": state})
    updates = [tx.update(narrow(draw(5)), each["state"], each["params"])[0] for each in (again, template | again)]
    assert_equal(*updates)


FUSED = {
    "with_master_weights": lambda: fr.with_master_weights(fr.prox_adam(1e-2, fr.l1, strength=1e-3)),
    "with_stochastic_rounding": lambda: fr.with_stochastic_rounding(fr.adamw(1e-2, weight_decay=0.1), key=3),
    "moments of sixteen bits": lambda: fr.adamw(1e-2, mu_dtype=BF16, nu_dtype=BF16),
    "loss scale": lambda: fr.apply_if_finite(fr.adamw(1e-2), 3),
}


def fused_is_eager(make, donate, backend):
    tx = make()
    step = fr.fuse(tx, donate=donate, backend=backend)
    start = {
        "a": narrow(draw())["body"]["filters"],
        "b": draw()["head"].weight.float(),
        "c": narrow(draw())["head"].bias,
    }
    params, state = step.init(start)
    expected, eager = start, tx.init(start)
    for n in range(4):
        grads = fr.tree_map(lambda w, n=n: (w * 0.5 + 0.1 * n).to(w.dtype), start)
        extra = {"loss_scale": torch.tensor(8.0)} if tx.accepts("loss_scale") else {}
        params, state = step(params, fr.tree_map(torch.clone, grads), state, **extra)
        updates, eager = tx.update(grads, eager, expected, **extra)
        expected = fr.apply_updates(expected, updates)
        assert_equal((params, state), (expected, eager), rtol=1e-2, atol=1e-6)
        if hasattr(state, "master"):
            assert_equal({name: params[name] for name in "ac"}, narrow({name: state.master[name] for name in "ac"}))
            assert_equal(state.master, eager.master, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("donate", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_fused_steps_are_the_eager_ones(make, donate):
    fused_is_eager(make, donate, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_compiled_steps_are_the_eager_ones(make):
    fused_is_eager(make, True, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("make", [DECAYING["adamw"], lambda: fr.with_stochastic_rounding(DECAYING["adamw"](), 0)])
def test_small_decays_act_in_a_compiled_step(make):
    """A compiler that left out the conversions of a rounding would lose what is between."""
    tx = make() if "rounding" in repr(make()) else fr.with_master_weights(make())
    step = fr.fuse(tx, donate=True)
    params, state = step.init({"w": torch.ones(2000, dtype=BF16)})
    zeros = {"w": torch.zeros(2000, dtype=BF16)}
    for _ in range(40):
        params, state = step(params, zeros, state)
    assert abs(float(params["w"].float().mean()) - 0.9995**40) < 2e-3
    assert hasattr(state, "master") or len(params["w"].unique()) > 2


# Rounding that is right on average


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("x", [1.0 + 2.0**-10, 0.99999, -3.1, 1e-3, 1.7e-6, 255.999, 2.0**-26, -1.0 - 2.0**-8])
def test_a_number_goes_to_its_neighbours_and_its_mean_is_right(dtype, x):
    count = 65_536
    found = rounded(torch.full((count,), x), torch.arange(count), dtype)  # Each fraction of a step once.
    assert_equal(found, found.to(dtype).float())
    low, high = found.min(), found.max()
    exact = torch.tensor(x, dtype=torch.float32)
    assert low <= exact <= high
    nearest = exact.to(dtype)
    others = [torch.nextafter(nearest, torch.tensor(end, dtype=dtype)).float() for end in (-math.inf, math.inf)]
    assert set(found.tolist()) <= {float(nearest), *map(float, others)}
    torch.testing.assert_close(found.double().mean(), exact.double(), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_numbers_of_the_dtype_zeros_and_what_is_no_number_stay(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = bits[bits.abs().float() > (2.0**-118 if dtype == BF16 else 0)].float()
    for word in (0, 40_000, 65_535):
        found = rounded(x, torch.full(x.shape, word), dtype)
        assert_equal(found, x)
    special = torch.tensor([0.0, math.inf, -math.inf, math.nan])
    assert_equal(rounded(special, torch.full((4,), 65_535), dtype), special)


def test_bits_are_those_of_key_step_and_place():
    params = {"a": torch.zeros(3, 2), "b": torch.zeros(6)}
    first, second = words(torch.tensor(1), torch.tensor(1), params)
    assert len(torch.cat([first.flatten(), second]).unique()) == 12
    assert not torch.equal(first, words(torch.tensor(1), torch.tensor(2), params)[0])
    assert not torch.equal(first, words(torch.tensor(2), torch.tensor(1), params)[0])


@pytest.mark.slow
def test_bits_are_the_same_in_compiled_code():
    """Also the last of a size that vectors do not divide, where a compiler once had others."""
    params = {"a": torch.zeros(24, dtype=BF16), "b": torch.zeros(3, 7)}
    make = lambda key, steps: words(key, steps, params)
    key, steps = torch.tensor(5), torch.tensor(3, dtype=torch.int32)
    for found, expected in zip(torch.compile(make)(key, steps), make(key, steps), strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("make", DECAYING.values(), ids=DECAYING)
def test_small_decays_act_on_average(make):
    start = torch.ones(4000, dtype=BF16)
    zeros = torch.zeros_like(start)
    tx = fr.with_stochastic_rounding(make(), key=1)
    params, state = descend(tx, start, lambda n: zeros, 60)
    expected, _ = descend(make(), torch.ones(1), lambda n: torch.zeros(1), 60)
    assert abs(params.float().mean() - expected) < 1e-3
    assert params.dtype == BF16
    assert [x.dtype for x in fr.tree_leaves(state.inner_state) if x.numel() > 1] != [BF16]


def test_thresholds_act_on_average_and_what_reaches_zero_stays_there():
    start = torch.cat([torch.ones(4000), torch.full((100,), 2.0**-13)]).to(BF16)
    tx = fr.with_stochastic_rounding(fr.chain(fr.sgd(1.0), fr.soft_threshold(1e-5)), key=2)
    params, _ = descend(tx, start, lambda n: torch.zeros_like(start), 300)
    assert abs(float(params[:4000].float().mean()) - (1 - 3e-3)) < 5e-4
    assert not params[4000:].any()


def test_members_of_an_ensemble_and_keys_round_apart():
    members = torch.ones(3, 500, dtype=BF16)
    tx = fr.ensemble(lambda rate: fr.with_stochastic_rounding(fr.sgd(rate), key=1), torch.full((3,), 1.0))
    updates, _ = tx.update(torch.full_like(members, 1e-3), tx.init(members), members)
    rows = fr.apply_updates(members, updates)
    assert not torch.equal(rows[0], rows[1])
    keys = torch.arange(3)
    one = lambda key, w: fr.with_stochastic_rounding(fr.sgd(1.0), key).init(w).key
    assert len(vmap(one)(keys, members).unique()) == 3
    with pytest.raises(TypeError, match=r"key is 'a'; expected an int"):
        fr.with_stochastic_rounding(fr.sgd(0.1), "a")
    with pytest.raises(TypeError, match="argument 0 of with_stochastic_rounding"):
        fr.with_stochastic_rounding(None, 0)


def test_a_run_with_random_rounding_goes_on_from_its_state():
    tx, params = fr.with_stochastic_rounding(fr.adamw(1e-2), torch.Generator().manual_seed(0)), narrow(draw())
    params, state = descend(tx, params, lambda n: narrow(draw(n + 1)), 2)
    loaded = fr.from_state_dict(tx.init(params), fr.to_state_dict(state))
    assert_equal(tx.update(params, loaded, params), tx.update(params, state, params))


# Moments of sixteen bits

MOMENTS = {
    "scale_by_adam": lambda **given: fr.scale_by_adam(**given),
    "scale_by_amsgrad": lambda **given: fr.scale_by_amsgrad(**given),
    "scale_by_rms": lambda nu_dtype, mu_dtype=None: fr.scale_by_rms(0.999, nu_dtype=nu_dtype),
    "scale_by_stddev": lambda nu_dtype, mu_dtype=None: fr.scale_by_stddev(0.999, eps=0.1, nu_dtype=nu_dtype),
    "adam": lambda **given: fr.adam(1.0, **given),
    "adamw": lambda **given: fr.adamw(1.0, **given),
    "amsgrad": lambda **given: fr.amsgrad(1.0, **given),
    "lamb": lambda **given: fr.lamb(1.0, **given),
    "rmsprop": lambda nu_dtype, mu_dtype=None: fr.rmsprop(1.0, 0.999, nu_dtype=nu_dtype),
}
every_optimizer_with_moments = pytest.mark.parametrize("make", MOMENTS.values(), ids=MOMENTS)


@every_optimizer_with_moments
def test_moments_are_kept_in_float32_unless_told_otherwise(make):
    params = {"w": torch.ones(5, dtype=BF16)}
    kinds = lambda tx, name: {x.dtype for _, x in fr.tree_get_all_with_path(tx.init(params), f"{name}.w")}
    assert kinds(make(nu_dtype=None), "nu") == {torch.float32}
    assert kinds(make(nu_dtype=BF16), "nu") == {BF16}
    assert kinds(make(nu_dtype=torch.float64), "nu") == {torch.float64}
    tx = make(nu_dtype=BF16, mu_dtype=BF16)
    state = tx.init(params)
    _, after = tx.update(params, state, params)
    assert [x.dtype for x in fr.tree_leaves(after)] == [x.dtype for x in fr.tree_leaves(state)]
    assert {x.dtype for x in fr.tree_leaves(state)} - {torch.int32, torch.float32} == {BF16}


@every_optimizer_with_moments
def test_second_moments_of_sixteen_bits_keep_moving(make):
    """Rounded to the nearest, a mean square with a decay of 0.999 stands still at a fraction of what it should be."""
    params = {"w": torch.ones(2000)}
    grads = {"w": torch.full((2000,), 0.5)}
    means = []
    for dtype in (torch.float32, BF16):
        tx = make(nu_dtype=dtype)
        state = tx.init(params)
        for _ in range(300):
            _, state = tx.update(grads, state, params)
        means.append(float(fr.tree_get(state, "nu.w").float().mean()))
    assert means[1] == pytest.approx(means[0], rel=5e-3)


def test_wrong_dtypes_of_moments_are_refused():
    with pytest.raises(TypeError, match="nu_dtype is 'bfloat16'"):
        fr.scale_by_adam(nu_dtype="bfloat16")
    with pytest.raises(TypeError, match=r"nu_dtype is torch.complex64; expected a dtype of real numbers"):
        fr.scale_by_rms(nu_dtype=torch.complex64)


# Scales of a loss


def test_a_loss_scale_is_divided_out_before_anything_else():
    tx, params = fr.apply_if_finite(fr.chain(fr.clip_by_global_norm(1.0), fr.adamw(1e-2)), 3), draw()
    scaled = fr.tree_map(lambda g: 1024 * g, draw(1))
    for scale in (1024.0, torch.tensor(1024.0)):
        found = tx.update(scaled, tx.init(params), params, loss_scale=scale)
        assert_equal(found, tx.update(draw(1), tx.init(params), params))
    assert_equal(tx.update(draw(1), tx.init(params), params)[1].last_finite, torch.tensor(True))
    grads = draw(1)
    many = vmap(lambda s: tx.update(fr.tree_map(lambda g: s * g, grads), tx.init(params), params, loss_scale=s)[0])
    scales = torch.tensor([2.0, 64.0], dtype=torch.float64)
    assert_equal(fr.tree_map(lambda u: u[1], many(scales)), tx.update(draw(1), tx.init(params), params)[0], rtol=1e-12)


def test_small_gradients_of_float16_survive_their_scale_and_overflows_are_seen():
    params = torch.ones(2, dtype=torch.float16)
    tx = fr.apply_if_finite(fr.sgd(1.0), 3)
    updates, state = tx.update(torch.tensor([1e-4, 1e-4]).half(), tx.init(params), params, loss_scale=2.0**16)
    torch.testing.assert_close(updates, torch.full((2,), -1e-4 / 2**16), rtol=1e-3, atol=0)
    updates, state = tx.update(torch.tensor([1.0, math.inf]).half(), state, params, loss_scale=2.0**16)
    assert not updates.any()
    assert (state.total_notfinite, state.last_finite) == (1, False)


def test_loss_scales_go_through_chains_and_out_of_range_are_refused():
    tx, params = fr.chain(fr.masked(fr.apply_if_finite(fr.sgd(1.0), 3), True), fr.identity()), torch.ones(2)
    assert tx.update(torch.ones(2), tx.init(params), params, loss_scale=4.0)[0].tolist() == [-0.25, -0.25]
    with pytest.raises(ValueError, match=r"loss_scale is 0.0; expected a number above 0"):
        tx.update(torch.ones(2), tx.init(params), params, loss_scale=0.0)
    with pytest.raises(TypeError, match=r"extra argument 'loss_scal'"):
        tx.update(torch.ones(2), tx.init(params), params, loss_scal=1.0)
    both = fr.with_master_weights(fr.apply_if_finite(fr.sgd(1.0), 3))
    half = params.half()
    assert both.update(half, both.init(half), half, loss_scale=4.0)[0].tolist() == [-0.25, -0.25]


# What is said before the first step


def sixteen(size, dtype=torch.bfloat16):
    return {"w": (size * draws()).to(dtype), "b": torch.ones(3, device=DEVICE)}


def draws():
    return torch.randn(64, 64, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(DEVICE)


#: Optimizers, sizes of weights, and whether most of their steps are rounded away, as a run of 300 steps shows.
STILL = [
    (lambda: fr.adamw(1e-3), 1.0, True),
    (lambda: fr.adamw(1e-4), 0.1, True),
    (lambda: fr.adamw(1e-5), 0.02, True),
    (
        lambda: fr.chain(fr.clip_by_global_norm(1.0), fr.adam(fr.warmup_cosine_decay_schedule(0.0, 1e-5, 5, 9))),
        0.02,
        True,
    ),
    (lambda: fr.lion(1e-5), 0.02, True),
    (lambda: fr.chain(fr.adam(1e-5), fr.project(fr.linf_ball, 1.0), fr.identity()), 0.02, True),
    (lambda: fr.adamw(1e-3), 0.1, False),
    (lambda: fr.adamw(1e-4), 0.02, False),
    (lambda: fr.adamw(1e-5, weight_decay=1e4), 0.02, False),  # The decay acts by itself.
    (lambda: fr.sgd(1e-5), 0.02, False),  # Gradients may be of any size.
    (lambda: fr.adam(lambda n: 1e-5), 0.02, False),  # As may be what a function says.
    (lambda: fr.chain(fr.adam(1e-5), fr.scale(1e3)), 0.02, False),
    (lambda: fr.lamb(1e-5), 0.02, False),
    (lambda: fr.with_master_weights(fr.adamw(1e-5)), 0.02, False),
    (lambda: fr.with_stochastic_rounding(fr.adamw(1e-5), 0), 0.02, False),
    (lambda: fr.masked(fr.adamw(1e-5), {"w": False, "b": True}), 0.02, False),
    (lambda: fr.chain(fr.freeze(fr.select("w")), fr.adamw(1e-2)), 1.0, False),
    (lambda: fr.adamw(torch.tensor(1e-5)), 0.02, False),  # A tensor may hold more later, as in a warm-up.
]


@pytest.mark.parametrize(("make", "size", "still"), STILL)
def test_steps_that_sixteen_bits_round_away_are_said_by_init(make, size, still):
    for dtype in (torch.bfloat16, torch.float32):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            make().init(sixteen(size, dtype))
        said = [each for each in said if "cannot follow" in str(each.message)]
        assert len(said) == (still and dtype == torch.bfloat16), said
        assert all(each.filename == __file__ for each in said)


def test_ones_follow_steps_down_that_are_too_small_up():
    params = {"scale": torch.ones(8, dtype=torch.bfloat16)}
    tx = fr.adamw(3e-3)
    updates, _ = tx.update(params, tx.init(params), params)  # Warnings are errors.
    assert (fr.apply_updates(params, updates)["scale"] < 1).all()


#: Without small weights and large steps, which grow by the noise of gradients.
MEASURED = [(size, rate) for size in (1.0, 0.1, 0.02) for rate in (1e-3, 1e-4, 1e-5) if (size, rate) != (0.02, 1e-3)]


@pytest.mark.parametrize(("size", "rate"), MEASURED)
def test_what_is_said_of_rounding_is_so(size, rate):
    params, tx = sixteen(size), fr.adamw(rate, weight_decay=1e-3 / rate)
    first, generator = params["w"].float(), torch.Generator("cpu").manual_seed(1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        state = tx.init(params)
    for _ in range(200):
        noise = torch.randn(64, 64, generator=generator, device="cpu").to(DEVICE, torch.bfloat16)
        updates, state = tx.update({"w": noise, "b": params["b"]}, state, params)
        params = fr.apply_updates(params, updates)
    decay = 1 - params["w"].float().norm() / first.norm()  # 0.18 without rounding, but for the noise.
    assert (decay < 0.01) == bool(said)


#: Transforms around what makes steps, and whether these may be larger than they say.
AROUND = {
    "injected": (lambda tx: fr.inject_hyperparams(fr.adamw)(1e-5), True),
    "gathered": (lambda tx: fr.chain(fr.clip(1.0), fr.MultiSteps(tx, 2)), True),
    "if finite": (lambda tx: fr.apply_if_finite(tx, 3), True),
    "labels": (lambda tx: fr.partition({"a": tx, "b": fr.set_to_zero()}, {"w": "a", "b": "b"}), True),
    "lookahead": (lambda tx: fr.lookahead(tx, 5, 0.5), True),
    "names": (lambda tx: fr.named_chain(("clip", fr.clip(1.0)), ("step", tx)), True),
    "a threshold": (lambda tx: fr.prox_adam(1e-5, fr.l1, strength=1.0), True),
    "a proximal step": (lambda tx: fr.proximal_step(fr.scale_by_rms(), 1e-5, fr.l1), True),
    "cautious decay": (lambda tx: fr.with_weight_decay(fr.adam(1e-5), "cautious", 0.1), True),
    "Muon": (lambda tx: fr.muon(1e-5), True),
    "much decay": (lambda tx: fr.apply_if_finite(fr.adamw(1e-5, weight_decay=1e3), 3), False),
    "other steps": (lambda tx: fr.partition({"a": tx, "b": fr.sgd(1.0)}, {"w": "a", "b": "b"}), False),
    "other sizes": (lambda tx: fr.chain(tx, fr.normalize_by_update_norm()), False),
    "wide weights": (fr.with_master_weights, False),
}


@pytest.mark.parametrize(("wrap", "is_said"), AROUND.values(), ids=AROUND)
def test_it_is_said_of_what_is_wrapped(wrap, is_said):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wrap(fr.adamw(1e-5)).init(sixteen(0.1))
    assert [("cannot follow" in str(each.message)) for each in said] == [True] * is_said


def test_it_is_said_by_every_door():
    model = torch.nn.Linear(30, 30, device=DEVICE, dtype=torch.bfloat16)
    params = dict(model.named_parameters())
    with pytest.warns(UserWarning, match="cannot follow"):
        fr.fuse(fr.adam(1e-5), backend="eager").init(params)
    with pytest.warns(UserWarning, match="makes steps of about 1e-05, .* of bias, weight cannot follow") as said:
        fr.chain(fr.clip_by_global_norm(1.0), fr.adamw(1e-5)).init(params)
    assert said[0].filename == __file__
    held = {name: w.detach() for name, w in params.items()}
    torch.compile(lambda p: fr.adam(1e-5).init(p), backend="eager", fullgraph=True)(held)  # Warnings are errors.
    torch.func.vmap(lambda w: fr.adam(1e-5).init(w).__getitem__(0).mu)(held["weight"])
