"""Noise against the published generator that it is made with, as samples of a posterior, and under maps and steps."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from cases import DEVICE, normal
from torch.func import grad, vmap
from torch.testing import assert_close

import funcreg as fr

WORD = 2**64


def words(seed: int, count: int) -> list[int]:
    """SplitMix64 in whole numbers of Python."""
    found = []
    for i in range(1, count + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) % WORD
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
        found.append(z ^ (z >> 31))
    return found


def box_muller(word: int) -> float:
    first, second = ((half + 0.5) / 2**32 for half in (word >> 32, word % 2**32))
    return math.sqrt(-2 * math.log(first)) * math.cos(2 * math.pi * second)


def mixed(z: int) -> int:
    return words((z - 0x9E3779B97F4A7C15) % WORD, 1)[0]


def drawn(tx, params, steps=1):
    """The noise of one step after others."""
    state, zeros = tx.init(params), fr.tree_map(torch.zeros_like, params)
    for _ in range(steps):
        updates, state = tx.update(zeros, state, params)
    return updates, state


def test_the_words_are_those_of_the_published_generator():
    # The first outputs of the reference implementation for this seed.
    assert words(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("key", [0, 7, -1, 2**63 + 5])
def test_noise_is_that_of_key_step_and_place(key):
    params = {"a": torch.zeros(2, 3, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    tx, golden = fr.add_noise(1.0, 0.0, key), 0x9E3779B97F4A7C15
    for steps in (1, 2, 3):
        updates, _ = drawn(tx, params, steps)
        here = mixed((mixed(key % WORD) + steps * golden) % WORD)
        for number, (name, w) in enumerate(params.items(), start=1):
            leaf = mixed((here + number * golden) % WORD)
            expected = [box_muller(word) for word in words(leaf, w.numel())]
            assert_close(updates[name].flatten(), torch.tensor(expected, dtype=w.dtype), rtol=1e-9, atol=1e-9)


def test_noise_is_normal():
    (x,) = fr.tree_leaves(drawn(fr.add_noise(1.0, 0.0, 0), {"w": torch.zeros(200_000, dtype=torch.float64)})[0])
    assert abs(x.mean()) < 4 / math.sqrt(len(x))
    # The greatest distance to the distribution function, at a level of one in ten thousand.
    below = 0.5 * (1 + torch.erf(x.sort().values / math.sqrt(2)))
    places = torch.arange(1, len(x) + 1, dtype=x.dtype) / len(x)
    assert (below - places).abs().max() < 2.2 / math.sqrt(len(x))
    # Neither neighbours, nor what lies at one place in two steps or two leaves, is correlated.
    pairs = [(x[1:], x[:-1]), (x, drawn(fr.add_noise(1.0, 0.0, 0), {"w": x}, steps=2)[0]["w"])]
    pairs += [(x, drawn(fr.add_noise(1.0, 0.0, 1), {"w": x})[0]["w"])]
    twice = drawn(fr.add_noise(1.0, 0.0, 0), {"a": x, "b": x})[0]
    for a, b in [*pairs, (twice["a"], twice["b"])]:
        assert abs((a * b).mean()) < 4 / math.sqrt(len(x))


def test_its_variance_falls_as_that_of_optax():
    """The law of optax's own test: at the i-th update the scale is the root of eta / i ** gamma."""
    tx = fr.add_noise(0.3, 0.55, 0)
    for step in range(1, 5):
        noise, _ = drawn(tx, torch.zeros(20_000), step)
        assert float(noise.std()) == pytest.approx(math.sqrt(0.3 / step**0.55), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128])
def test_all_dtypes_get_the_same_noise(dtype):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    same, exact = (drawn(fr.add_noise(0.5, 0.0, 0), torch.zeros(1000, dtype=d))[0] for d in (dtype, wide))
    assert same.dtype == dtype
    assert_close(same.to(wide), exact, rtol=max(1e-5, 2 * torch.finfo(dtype).eps), atol=1e-5)
    assert float(exact.abs().square().mean()) == pytest.approx(0.5, rel=0.1)  # Of both parts together.


# Keys


def test_its_state_is_a_count_and_a_key():
    state = fr.add_noise(1.0, 0.0, 5).init({"w": torch.zeros(3)})
    assert isinstance(state, fr.AddNoiseState)
    assert (state.steps.dtype, state.key.dtype) == (torch.int32, torch.int64)


def test_a_generator_gives_its_next_key_at_each_init():
    params = {"w": torch.zeros(5, device=DEVICE)}
    generator = torch.Generator().manual_seed(0)
    tx = fr.add_noise(1.0, 0.0, generator)
    first, second = drawn(tx, params)[0], drawn(tx, params)[0]
    assert (first["w"] != second["w"]).all()
    again = drawn(fr.add_noise(1.0, 0.0, torch.Generator().manual_seed(0)), params)[0]
    assert_close(again, first, rtol=0, atol=0)


def test_global_random_numbers_are_neither_used_nor_moved():
    before = torch.get_rng_state()
    for key in (3, torch.tensor(3), torch.Generator().manual_seed(3)):
        drawn(fr.add_noise(1.0, 0.0, key), torch.zeros(3))
    members = torch.zeros(4, 3)
    fr.ensemble(lambda eta: fr.add_noise(eta, 0.0, 3), torch.ones(4)).init(members)
    assert (torch.get_rng_state() == before).all()


def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped(tmp_path):
    params, tx = {"w": torch.zeros(5)}, fr.add_noise(1.0, 0.55, torch.Generator().manual_seed(0))
    _, state = drawn(tx, params, steps=3)
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    other = fr.add_noise(1.0, 0.55, 99)  # The key is that of the state.
    assert_close(other.update(params, loaded, params), tx.update(params, state, params), rtol=0, atol=0)


@pytest.mark.parametrize("key", [3, torch.Generator().manual_seed(3)])
def test_members_of_an_ensemble_draw_their_own_noise(key):
    members = {"w": torch.zeros(4, 50)}
    tx = fr.ensemble(lambda eta: fr.chain(fr.sgd(0.1), fr.add_noise(eta, 0.0, key)), torch.ones(4))
    updates, _ = tx.update(members, tx.init(members), members)
    assert len(updates["w"].unique()) == 200


def test_members_with_keys_of_their_own_are_a_loop_over_keys():
    keys, members = torch.arange(4), {"w": torch.zeros(4, 50)}
    tx = fr.ensemble(lambda key: fr.add_noise(1.0, 0.0, key), keys)
    updates, _ = tx.update(members, tx.init(members), members)
    for key, noise in zip(keys.tolist(), updates["w"], strict=True):
        assert_close(drawn(fr.add_noise(1.0, 0.0, key), {"w": torch.zeros(50)})[0]["w"], noise, rtol=0, atol=0)


def test_vmap_decides_whether_members_differ():
    members, tx = torch.zeros(4, 50), fr.add_noise(1.0, 0.0, 3)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(tx.init)(members)
    for randomness, different in (("different", 200), ("same", 50)):
        state = vmap(tx.init, randomness=randomness)(members)
        key = state.key.expand(4)
        noise = vmap(lambda w, key: tx.update(w, fr.AddNoiseState(torch.zeros((), dtype=torch.int32), key), w)[0])
        assert len(noise(members, key).unique()) == different


@pytest.mark.parametrize("key", ["3", 0.5, True, torch.tensor(0.5), torch.arange(2), torch.tensor(True)])
def test_other_keys_are_refused(key):
    with pytest.raises(TypeError, match=r"key is .*expected an int"):
        fr.add_noise(1.0, 0.0, key)


def test_a_seed_is_a_key():
    for make in (
        lambda **key: fr.add_noise(0.1, 0.5, **key),
        lambda **key: fr.noisy_sgd(0.1, **key),
        lambda **key: fr.chain(fr.differentially_private_aggregate(1.0, 0.1, **key), fr.sgd(0.1)),
    ):
        params, examples = {"w": torch.ones(3, device=DEVICE)}, {"w": torch.ones(2, 3, device=DEVICE)}
        grads = examples if "private" in str(make(key=7)) else params
        steps = [tx.update(grads, tx.init(params), params)[0] for tx in (make(key=7), make(seed=7))]
        assert torch.equal(steps[0]["w"], steps[1]["w"])
        with pytest.raises(TypeError, match=r"got no key; expected key=, an int"):
            make()
        with pytest.raises(TypeError, match=r"got key= and seed=, which are names of the same"):
            make(key=1, seed=1)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="64 bits"):
        fr.add_noise(1.0, 0.0, 2**64)
    with pytest.raises(ValueError, match="eta is -1"):
        fr.add_noise(-1, 0.0, 0)
    with pytest.raises(ValueError, match="gamma is -1"):
        fr.add_noise(1.0, -1, 0)
    with pytest.raises(TypeError, match="follows no schedule"):
        fr.add_noise(1.0, lambda count: 0.0, 0)


# In a step


@pytest.mark.slow
@pytest.mark.parametrize("donate", [False, True])
def test_a_compiled_step_draws_the_same(donate):
    """The chain is recorded: warnings are errors here, and a step that falls back to leaf by leaf warns."""
    params = {
        "a": torch.ones(6, 5, device=DEVICE),
        "b": torch.ones(6, 5, device=DEVICE),
        "c": torch.ones(7, device=DEVICE),
    }
    tx = fr.chain(fr.sgd(0.1), fr.add_noise(lambda count: 0.01, 0.55, 3))
    step = fr.fuse(tx, donate=donate, backend="aot_eager")
    moved, owned = step.init(params)
    state = tx.init(params)
    for _ in range(3):
        grads = fr.tree_map(lambda w: w - 0.5, params)
        moved, owned = step(moved, fr.tree_map(torch.clone, grads), owned)
        updates, state = tx.update(grads, state, params)
        params = fr.apply_updates(params, updates)
        assert_close(moved, params)
    assert len(torch.cat([w.flatten() for w in params.values()]).unique()) == 67


def test_random_numbers_of_other_transforms_fall_back_with_a_warning():
    torch_noise = fr.stateless(lambda updates, params: fr.tree_map(lambda u: u + torch.randn_like(u), updates))
    step = fr.fuse(torch_noise, backend="eager")
    params = {"w": torch.zeros(100)}
    with pytest.warns(UserWarning, match="random"):
        first, state = step(params, params, torch_noise.init(params))
    second, _ = step(params, params, state)
    assert len(torch.cat([first["w"], second["w"]]).unique()) == 200


# Langevin dynamics


def test_langevin_dynamics_samples_a_gaussian_posterior():
    r"""Mean and covariance of a linear model with known noise and a Gaussian prior.

    The posterior of a quadratic loss is Gaussian. Steps of size :math:`\eta` along :math:`U` of curvature :math:`c`
    widen it by :math:`1 / (1 - \eta c / 2)`, which is part of what is expected.
    """
    generator, chains, examples = torch.Generator().manual_seed(0), 1000, 50
    x = normal(generator, examples, 2) * torch.tensor([1.0, 0.5])
    y = x @ torch.tensor([1.0, -2.0], dtype=torch.float64) + normal(generator, examples)
    precision = x.T @ x + torch.eye(2)  # Noise and prior of variance 1.
    mean = torch.linalg.solve(precision, x.T @ y)

    def loss(w):
        return (y - x @ w).square().mean() / 2

    rate = 0.1
    tx = fr.ensemble(
        lambda key: fr.chain(
            fr.add_penalty(fr.half_l2, strength=1 / examples),
            fr.sgd(rate),
            fr.add_noise(2 * rate / examples, 0.0, key),
        ),
        torch.arange(chains),
    )
    members = torch.zeros(chains, 2, dtype=torch.float64)
    state, samples = tx.init(members), []
    for step in range(300):
        updates, state = tx.update(vmap(grad(loss))(members), state, members)
        members = fr.apply_updates(members, updates)
        if step >= 100 and step % 20 == 0:
            samples.append(members)
    drawn = torch.cat(samples)
    values, directions = torch.linalg.eigh(precision)
    wider = directions @ torch.diag(1 / (values * (1 - rate * values / examples / 2))) @ directions.T
    spread = wider.diagonal().sqrt()
    assert ((drawn.mean(0) - mean).abs() < 0.06 * spread).all()
    assert_close(torch.cov(drawn.T), wider, rtol=0.06, atol=0.06 * float(spread.prod()))
    assert statistics.mean((wider / torch.linalg.inv(precision)).diagonal().tolist()) < 1.08  # Close to the posterior.


# Means of clipped gradients of examples


def test_the_mean_of_clipped_gradients_is_that_of_the_formula_with_the_noise_of_add_noise():
    generator = torch.Generator().manual_seed(1)
    params = {"w": normal(generator, 2, 3), "b": normal(generator, 4)}
    sizes = torch.tensor([0.1, 0.3, 1.0, 2.0, 5.0], dtype=torch.float64)
    grads = fr.tree_map(lambda w: torch.einsum("i,i...->i...", sizes, normal(generator, 5, *w.shape)), params)
    norms = torch.cat([g.flatten(1) for g in fr.tree_leaves(grads)], 1).norm(dim=1)
    shares = (1.5 / norms).clamp(max=1.0)
    assert 0 < (shares < 1).sum() < 5
    plain, noisy = (fr.differentially_private_aggregate(1.5, sigma, key=7) for sigma in (0.0, 2.0))
    clipped, _ = plain.update(grads, plain.init(params), params)
    assert_close(clipped, fr.tree_map(lambda g: torch.einsum("i,i...->...", shares, g) / 5, grads), rtol=1e-12, atol=0)
    state = noisy.init(params)
    for _ in range(2):
        found, state = noisy.update(grads, state, params)
    one, still = fr.add_noise(1.0, 0.0, key=7), fr.tree_map(torch.zeros_like, params)
    _, begun = one.update(still, one.init(params), params)
    noise, _ = one.update(still, begun, params)
    expected = fr.tree_map(lambda c, x: c + 2.0 * 1.5 / 5 * x, clipped, noise)
    assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert int(state.steps) == 2
    assert isinstance(state, fr.DifferentiallyPrivateAggregateState)


def test_private_descent_trains_from_mapped_gradients_in_chains_and_with_its_hyperparameters_in_the_state():
    torch.manual_seed(0)
    x, y = torch.randn(32, 3, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    params = {"w": torch.zeros(3, dtype=torch.float64), "frozen": torch.ones(2, dtype=torch.float64)}
    loss = lambda params, x, y: (x @ params["w"] + params["frozen"].sum() - y) ** 2
    slopes = lambda params: vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    makes = (
        lambda: fr.dpsgd(0.1, 1.0, 0.5, seed=3, momentum=0.5),
        lambda: fr.inject_hyperparams(fr.dpsgd, static_args="seed")(0.1, 1.0, 0.5, seed=3, momentum=0.5),
        lambda: fr.chain(fr.chain(fr.differentially_private_aggregate(1.0, 0.5, 3)), fr.sgd(0.1, momentum=0.5)),
        lambda: fr.named_chain(("dp", fr.differentially_private_aggregate(1.0, 0.5, 3)), ("go", fr.sgd(0.1, 0.5))),
    )
    ends = []
    for make in makes:
        tx, at = make(), params
        state = tx.init(at)
        for _ in range(5):
            updates, state = tx.update(slopes(at), state, at)
            at = fr.apply_updates(at, updates)
        ends.append(at)
    for end in ends[1:]:
        assert_close(end, ends[0], rtol=1e-12, atol=1e-13)
    held = fr.chain(fr.differentially_private_aggregate(1.0, 0.5, 3), fr.sgd(0.1), fr.freeze(fr.select("frozen")))
    updates, _ = held.update(slopes(params), held.init(params), params)
    assert not updates["frozen"].any()
    assert updates["w"].shape == (3,)


def test_members_have_noise_of_their_own_and_sixteen_bits_are_summed_in_float32():
    params, grads = {"w": torch.zeros(4)}, {"w": torch.ones(3, 4)}

    def move(key):
        tx = fr.differentially_private_aggregate(1.0, 1.0, key)
        return tx.update(grads, tx.init(params), params)[0]["w"]

    many = vmap(move)(torch.arange(2))
    assert_close(many[1], move(torch.tensor(1)))
    assert (many[0] != many[1]).all()
    tx, half = fr.differentially_private_aggregate(1e4, 0.0, 0), {"w": torch.zeros(2, dtype=torch.bfloat16)}
    updates, _ = tx.update({"w": torch.ones(1000, 2, dtype=torch.bfloat16)}, tx.init(half), half)
    assert updates["w"].tolist() == [1.0, 1.0]
    assert updates["w"].dtype == torch.bfloat16


def test_fuse_refuses_what_takes_gradients_of_examples_and_says_what_to_fuse():
    with pytest.raises(TypeError, match=r"fuse got dpsgd.*gradients of single examples.* fuse what comes after it"):
        fr.fuse(fr.dpsgd(0.1, 1.0, 1.0, seed=0))


def test_what_are_no_gradients_of_examples_is_refused():
    params = {"w": torch.zeros(2, 3)}
    tx = fr.dpsgd(0.1, 1.0, 1.0, seed=0)
    with pytest.raises(ValueError, match=r"updates 'w' has shape \(2, 3\); expected \(examples, 2, 3\), because"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="got gradients of no examples; expected one at least"):
        tx.update({"w": torch.zeros(0, 2, 3)}, tx.init(params), params)
    with pytest.raises(ValueError, match=r"takes gradients of single examples, and stands after clip.* Put it first"):
        fr.chain(fr.clip(1.0), fr.differentially_private_aggregate(1.0, 1.0, 0))
    with pytest.raises(ValueError, match=r"noise_multiplier is -1\.0"):
        fr.differentially_private_aggregate(1.0, -1.0, 0)
    with pytest.raises(TypeError, match="got no key; expected key=, an int"):
        fr.differentially_private_aggregate(1.0, 1.0, None)
    with pytest.raises(ValueError, match="nesterov is True; it has no effect without momentum"):
        fr.dpsgd(0.1, 1.0, 1.0, 0, nesterov=True)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: fr.MultiSteps(tx, 2),
        lambda tx: fr.MultiSteps(fr.chain(tx), 2),
        lambda tx: fr.apply_if_finite(tx, 3),
        lambda tx: fr.masked(tx, True),
        lambda tx: fr.with_master_weights(tx),
        lambda tx: fr.lookahead(tx, 5, 0.5),
        lambda tx: fr.ensemble(lambda h: tx, torch.ones(2)),
        lambda tx: fr.chain(fr.MultiSteps(tx, 2), fr.scale(2.0)),
    ],
)
def test_wrappers_around_what_takes_gradients_of_examples_are_refused(wrap):
    with pytest.raises(ValueError, match=r"takes gradients of single examples.* take a larger batch"):
        wrap(fr.dpsgd(0.1, 1.0, 1.0, seed=0))
