"""Wrappers where the laws of all transforms do not look: what they are for, in every place, and what they refuse."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from cases import TRANSFORMS, assert_equal, draw, every_other, flat
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

import funcreg as fr

NAN, INF = float("nan"), float("inf")
#: Wrappers around a transform that takes an extra argument, and steps of it that are real ones.
AROUND = {
    "chain": lambda tx: fr.chain(tx),
    "named_chain": lambda tx: fr.named_chain(("a", tx)),
    "masked": lambda tx: fr.masked(tx, True),
    "partition": lambda tx: fr.partition({"all": tx}, "all"),
    "multi_transform": lambda tx: fr.multi_transform({"all": tx}, "all"),
    "apply_if_finite": lambda tx: fr.apply_if_finite(tx, 3),
    "selective_transform": lambda tx: fr.selective_transform(tx, freeze_mask=False),
    "flatten": lambda tx: fr.flatten(tx),
    "inject_hyperparams": lambda tx: fr.inject_hyperparams(lambda rate: fr.chain(tx, fr.scale(rate)))(1.0),
    "MultiSteps": lambda tx: fr.MultiSteps(tx, 2),
    "conditionally_transform": lambda tx: fr.conditionally_transform(tx, every_other),
    "conditionally_mask": lambda tx: fr.conditionally_mask(tx, every_other),
    "lookahead": lambda tx: fr.lookahead(tx, 3, 0.5),
    "schedule_free": lambda tx: fr.schedule_free(tx, 1.0, b1=1e-9),
    "sam": lambda tx: fr.sam(tx, fr.scale(0.0)),
    "with_extra_args": lambda tx: fr.with_extra_args(tx),
    "ensemble": lambda tx: fr.ensemble(lambda h: tx, torch.ones(4)),
}
every_wrapper = pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)


def small(seed=0, dtype=torch.float64):
    return {"w": draw(seed, dtype)["head"].weight, "b": draw(seed, dtype)["head"].bias}


def train(tx, steps, params=None, seed=0):
    """Parameters and state after some steps along random gradients."""
    params = small(seed) if params is None else params
    state = tx.init(params)
    for n in range(steps):
        updates, state = tx.update(small(n + 1), state, params)
        params = fr.apply_updates(params, updates)
    return params, state


def fused(tx, steps, backend="eager", params=None):
    params = small() if params is None else params
    step = fr.fuse(tx, backend=backend)
    params, state = step.init(params)
    for n in range(steps):
        params, state = step(params, small(n + 1), state)
    return params, state


# Extra arguments and parameters, through all of them


def by_value(updates, state, params, *, value, times=1.0):
    return fr.tree_map(lambda u: -u * value * times, updates), state


@every_wrapper
def test_extra_arguments_reach_what_is_inside_and_misspelled_ones_nobody(around):
    inner = fr.Transform(fr.init_empty_state, by_value, stages=["scales"])
    tx, params, grads = around(inner), small(), small(1)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params, value=torch.tensor(3.0), times=2.0)
        params = fr.apply_updates(params, updates)
    assert_equal(updates, fr.tree_map(lambda g: -6.0 * g, grads), rtol=1e-6, atol=1e-6)
    if around is AROUND["with_extra_args"]:
        return
    with pytest.raises(TypeError, match="extra argument 'tmies', which no transform of"):
        tx.update(grads, state, params, value=1.0, tmies=2.0)


@every_wrapper
def test_parameters_that_are_left_out_are_named(around):
    tx, params = around(fr.add_decayed_weights(0.1)), small()
    with pytest.raises(TypeError, match="params"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="params is None"):
        tx.update(params, tx.init(params), None)


@every_wrapper
def test_what_is_frozen_inside_stays_and_what_is_masked_is_alone(around):
    params, grads = small(), small(1)
    tx = around(fr.chain(fr.freeze({"w": True, "b": False}), fr.add_decayed_weights(0.1)))
    if around is AROUND["flatten"]:  # It has one leaf.
        with pytest.raises(ValueError, match="mask"):
            tx.init(params)
        return
    if around is AROUND["conditionally_transform"]:  # It holds at some steps.
        return
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(grads, state, params)
        assert not updates["w"].any()
        params = fr.apply_updates(params, updates)
    outer = fr.chain(fr.add_decayed_weights(0.1), tx)  # Wherever freeze stands, it holds.
    assert not outer.update(grads, outer.init(params), params)[0]["w"].any()


# Gradients of several calls


def test_accumulated_steps_are_those_of_the_mean_gradient():
    tx = fr.MultiSteps(fr.adamw(0.1, weight_decay=0.3), 3)
    found, state = train(tx, 12)
    alone = fr.adamw(0.1, weight_decay=0.3)
    params = small()
    inner = alone.init(params)
    for n in range(4):
        mean = fr.tree_map(lambda *gs: sum(gs) / 3, *(small(3 * n + i + 1) for i in range(3)))
        updates, inner = alone.update(mean, inner, params)
        params = fr.apply_updates(params, updates)
    assert_equal(found, params, rtol=1e-12, atol=1e-14)
    assert_equal(state.inner_opt_state, inner, rtol=1e-12, atol=1e-14)
    assert (state.mini_step, state.gradient_step) == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["eager", "fused"])
def test_a_prox_inside_does_nothing_between_real_steps_and_its_zeros_are_exact(dtype, how):
    tx = fr.MultiSteps(fr.prox_sgd(0.1, fr.l1, strength=4.0), 3)
    params = small(dtype=dtype)
    step = fr.fuse(tx, backend="eager")
    state = tx.init(params)
    for n in range(6):
        grads = small(n + 1, dtype)
        if how == "fused":
            after, state = step(params, grads, state)
        else:
            updates, state = tx.update(grads, state, params)
            after = fr.apply_updates(params, updates)
        if n % 3 != 2:
            assert_equal(after, params)
        params = after
    zeros = flat(params) == 0
    assert 3 < zeros.sum() < zeros.numel()
    assert not torch.signbit(flat(params)[zeros]).any()


def test_a_penalty_and_decay_count_once_a_real_step():
    still = {"w": torch.zeros(2, dtype=torch.float64)}
    params = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    for inner in (fr.add_penalty(fr.l2, strength=0.5), fr.add_decayed_weights(1.0)):
        tx = fr.MultiSteps(fr.chain(inner, fr.scale_by_learning_rate(0.1)), 4)
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(still, state, params)
        assert_equal(updates, {"w": -0.1 * params["w"]}, rtol=1e-12)


def test_what_is_skipped_is_as_if_it_had_not_been():
    for rule in (fr.skip_not_finite, functools.partial(fr.skip_large_updates, max_squared_norm=1e4)):
        tx = fr.MultiSteps(fr.adam(0.1), 2, should_skip_update_fn=rule)
        params = small()
        state = clean = tx.init(params)
        for n in range(4):
            bad = fr.tree_map(lambda g: g * NAN, small(20))
            updates, state = tx.update(bad, state, params)
            assert not flat(updates).any()
            assert state.skip_state["should_skip"]
            assert not tx.has_updated(state)
            updates, state = tx.update(small(n + 1), state, params)
            assert tx.has_updated(state) == (n % 2 == 1)
            expected, clean = tx.update(small(n + 1), clean, params)
            assert_equal(updates, expected)
            assert_equal(state, clean)
            assert not state.skip_state["should_skip"]
    large = functools.partial(fr.skip_large_updates, max_squared_norm=fr.linear_schedule(1e4, 0.0, 1))
    tx = fr.MultiSteps(fr.sgd(0.1), 1, should_skip_update_fn=large)
    _, state = tx.update(small(1), tx.init(params), params)
    assert state.gradient_step == 1
    assert tx.update(small(1), state, params)[1].gradient_step == 1


def test_masks_stand_inside_and_outside_of_accumulation():
    mask = {"w": True, "b": False}
    inside = fr.MultiSteps(fr.chain(fr.masked(fr.trace(0.9), mask), fr.scale_by_learning_rate(0.1)), 2)
    outside = fr.chain(fr.masked(fr.MultiSteps(fr.trace(0.9), 2), mask), fr.scale_by_learning_rate(0.1))
    (a, inner), (b, outer) = train(inside, 4), train(outside, 4)
    assert_equal(a["w"], b["w"], rtol=1e-12, atol=1e-14)
    assert fr.tree_paths(inner.acc_grads) == ["b", "w"]
    assert fr.tree_paths(outer[0].inner_state.acc_grads) == ["w"]
    assert not torch.equal(a["b"], b["b"])  # Outside, the other leaf takes each step.


def test_k_may_be_a_tensor_of_each_member_or_a_schedule():
    every = torch.tensor([1, 2, 3])
    tx = fr.ensemble(lambda k: fr.MultiSteps(fr.sgd(0.1), k), every)
    params = fr.replicate(small(), 3)
    state = tx.init(params)
    for n in range(6):
        updates, state = tx.update(fr.replicate(small(n + 1), 3), state, params)
        went = [bool(flat(u).any()) for u in fr.unstack(updates)]
        assert went == [(n + 1) % int(k) == 0 for k in every]
    tx = fr.MultiSteps(fr.sgd(0.1), lambda count: 1 + count)
    _, state = train(tx, 6)
    assert (state.gradient_step, state.mini_step) == (3, 0)


def test_sixteen_bit_gradients_are_averaged_in_float32():
    params = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    tx = fr.MultiSteps(fr.sgd(1.0), 300, use_grad_mean=False)
    state = tx.init(params)
    for _ in range(300):
        updates, state = tx.update({"w": torch.ones(1, dtype=torch.bfloat16)}, state, params)
    assert updates["w"] == -300  # In bfloat16, the sum would stay at 256.


def test_summed_steps_after_a_prox_are_warned_of():
    with pytest.warns(UserWarning, match="apply_every.* stands after .*prox_sgd"):
        fr.chain(fr.prox_sgd(0.1, fr.l1), fr.apply_every(2))


def test_a_threshold_that_would_act_between_real_steps_is_warned_of():
    every = fr.MultiSteps(fr.sgd(0.1), 4)
    for make in (
        lambda: fr.chain(every, fr.soft_threshold(0.1)),
        lambda: fr.chain(fr.masked(every, True), fr.proximal(fr.half_l2, 0.1, mask=fr.matrices)),
        lambda: fr.chain(fr.sgd(0.1), fr.apply_every(4), fr.soft_threshold(0.1)),
    ):
        with pytest.warns(UserWarning, match="it acts at every call, between these steps too. Put it inside"):
            make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fr.chain(every, fr.project(fr.nonnegative))
        fr.MultiSteps(fr.chain(fr.sgd(0.1), fr.soft_threshold(0.1)), 4)


@pytest.mark.parametrize(
    "tx", [fr.MultiSteps(fr.sgd(0.1), 2, use_grad_mean=False), fr.chain(fr.sgd(0.1), fr.apply_every(2))]
)
def test_a_gradient_that_is_not_finite_is_gone_with_its_round(tx):
    params, state, found = torch.ones(2), tx.init(torch.ones(2)), []
    for spoilt in (INF, 1.0, 1.0, 1.0):
        updates, state = tx.update(torch.tensor([1.0, spoilt]), state, params)
        found.append(updates)
    assert_equal(torch.stack(found), torch.tensor([[0.0, 0.0], [-0.2, -INF], [0.0, 0.0], [-0.2, -0.2]]))


# At some steps


def test_a_nan_at_a_step_that_does_not_count_is_not_seen():
    root = fr.stateless(lambda updates, params: fr.tree_map(lambda u: u.sqrt(), updates))
    params, grads = {"w": torch.zeros(2)}, {"w": torch.tensor([-1.0, 4.0])}
    for wrap, expected in ((fr.conditionally_transform, [-1.0, 4.0]), (fr.conditionally_mask, [0.0, 0.0])):
        tx = wrap(fr.chain(root, fr.trace(0.5)), every_other)
        updates, state = tx.update(grads, tx.init(params), params)
        assert updates["w"].tolist() == expected
        assert not flat(state.inner_state).any()


def test_a_condition_may_be_a_bool_or_ask_for_the_loss():
    params, grads = small(), small(1)
    for answer in (True, False):
        tx = fr.conditionally_mask(fr.sgd(0.1), lambda step, answer=answer: answer)
        assert flat(tx.update(grads, tx.init(params), params)[0]).any() == answer
    tx = fr.conditionally_mask(fr.sgd(0.1), lambda step, *, value, **rest: value < 1, forward_extra_args=True)
    for value in (0.5, 2.0):
        updates, _ = tx.update(grads, tx.init(params), params, value=torch.tensor(value), other=0)
        assert flat(updates).any() == (value < 1)
    plain = fr.conditionally_mask(fr.sgd(0.1), lambda step, value=0.0: value == 0.0)
    assert flat(plain.update(grads, plain.init(params), params, value=1.0)[0]).any()  # It was not to get it.


def test_steps_that_would_let_gradients_pass_uphill_are_warned_of():
    with pytest.warns(UserWarning, match="gradients pass as they are, and go uphill. Take conditionally_mask"):
        fr.conditionally_transform(fr.sgd(0.1), every_other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fr.chain(fr.sgd(0.1), fr.conditionally_transform(fr.soft_threshold(0.1), every_other))


def test_leaves_may_be_held_at_first():
    tx = fr.chain(fr.adamw(0.1), fr.conditionally_transform(fr.freeze({"w": True, "b": False}), lambda step: step < 2))
    params, state = train(tx, 2)
    assert torch.equal(params["w"], small()["w"])
    updates, _ = tx.update(small(3), state, params)
    assert updates["w"].all()


def test_selected_leaves_are_held_whatever_else_a_chain_does():
    frozen = {"w": True, "b": False}
    tx = fr.chain(fr.selective_transform(fr.adam(0.1), freeze_mask=frozen), fr.project(fr.nonnegative))
    params, state = train(tx, 3)
    assert torch.equal(params["w"], small()["w"])
    assert fr.tree_paths(state)[1:] == ["0.0.0.mu.b", "0.0.0.nu.b"] or "w" not in str(fr.tree_paths(state))
    assert (params["b"] >= 0).all()


# One vector


def test_leaves_of_several_dtypes_go_through_one_vector_and_keep_theirs():
    params = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2, 2)}
    tx = fr.flatten(fr.adam(0.1))
    updates, state = tx.update(params, tx.init(params), params)
    assert [u.dtype for u in fr.tree_leaves(updates)] == [torch.bfloat16, torch.float32]
    assert state[0].mu.shape == (6,)
    with pytest.raises(ValueError, match="real and complex leaves"):
        tx.init({"a": torch.ones(1), "b": torch.ones(1, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="leaves on cpu, meta; expected one device"):
        tx.init({"a": torch.ones(1, device="cpu"), "b": torch.ones(1, device="meta")})


# Hyperparameters in the state


FACTORIES = {
    "adamw": lambda make: make(fr.adamw)(0.1, weight_decay=0.3, mask=fr.matrices),
    "sgd": lambda make: make(fr.sgd)(learning_rate=0.1, momentum=0.9, nesterov=True),
    "prox_sgd": lambda make: make(fr.prox_sgd)(0.1, fr.elastic, 0.3, 0.5, strength=0.2, momentum=0.5),
    "prox_adam": lambda make: make(fr.prox_adam)(0.1, fr.group_lasso, dim=0, strength=0.2, max_step=0.3),
    "lion": lambda make: make(fr.lion)(0.01),
    "a chain": lambda make: make(lambda norm, rate: fr.chain(fr.clip_by_global_norm(norm), fr.sgd(rate)))(0.5, 0.1),
    "a preconditioner": lambda make: fr.proximal_step(
        make(fr.scale_by_adam)(b2=0.9, eps=0.1), 0.1, fr.l1, strength=0.3
    ),
}


@pytest.mark.parametrize("made", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_injected_is_plain(made, dtype):
    params = small(dtype=dtype)
    injected, plain = made(fr.inject_hyperparams), made(lambda factory: factory)
    states = injected.init(params), plain.init(params)
    for n in range(3):
        grads = small(n + 1, dtype)
        a, b = injected.update(grads, states[0], params), plain.update(grads, states[1], params)
        # A tensor for a number may round once more: of a penalty the points, of which updates are differences.
        reached = [fr.apply_updates(params, u) if made is FACTORIES["prox_adam"] else u for u in (a[0], b[0])]
        assert_equal(*reached, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).tiny)
        states, params = (a[1], b[1]), fr.apply_updates(params, b[0])


def test_what_is_set_is_used_and_compiles_nothing_anew():
    tx = fr.inject_hyperparams(fr.prox_sgd)(0.1, fr.l1, strength=0.5)
    counter = CompileCounterWithBackend("eager")
    step = fr.fuse(tx, backend=counter)
    params, state = step.init(small())
    frames = []
    for rate in (0.1, 0.2, 0.05):
        hyper = {**state.hyperparams, "learning_rate": torch.full_like(state.hyperparams["learning_rate"], rate)}
        state = state._replace(hyperparams=hyper)
        alone = fr.prox_sgd(rate, fr.l1, strength=0.5)
        updates, _ = alone.update(small(3), alone.init(params), params)
        expected = fr.apply_updates(params, updates)
        params, state = step(params, small(3), state)
        assert_equal(params, expected, rtol=1e-12, atol=1e-14)
        assert state.hyperparams["learning_rate"] == rate
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1] > 0


def test_a_number_of_python_may_be_set_also_between_eager_steps():
    tx, params = fr.inject_hyperparams(fr.sgd)(0.1), small()
    state = tx.init(params)
    state.hyperparams["learning_rate"] = 1
    updates, after = tx.update(small(1), state, params)
    assert_equal(updates, fr.tree_map(lambda g: -g, small(1)))
    assert after.hyperparams["learning_rate"].dtype == torch.float64
    assert tx.init(params).hyperparams["learning_rate"] == 0.1  # The first state is another one.


def test_hyperparameters_of_a_stack_of_states_are_each_members_own():
    tx = fr.inject_hyperparams(fr.adamw)(0.1)
    params = fr.replicate(small(), 3)
    state = vmap(tx.init, randomness="error")(params)
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    state = fr.tree_map(torch.clone, state)._replace(hyperparams={**state.hyperparams, "learning_rate": rates})
    updates, _ = vmap(tx.update)(fr.replicate(small(1), 3), state, params)
    for rate, found in zip(rates.tolist(), fr.unstack(updates), strict=True):
        alone = fr.adamw(rate)
        assert_equal(found, alone.update(small(1), alone.init(small()), small())[0], rtol=1e-12, atol=1e-14)


def test_scheduled_hyperparameters_follow_and_show_the_value_that_was_used():
    tx = fr.inject_hyperparams(fr.adam)(fr.linear_schedule(0.1, 0.0, 10), b1=lambda count: 0.9 - 0.1 * count)
    _, state = train(tx, 3)
    assert state.hyperparams["learning_rate"] == pytest.approx(0.08)
    assert state.hyperparams["b1"] == pytest.approx(0.7)
    assert state.steps == 3


def test_trees_of_hyperparameters_are_injected_leaf_by_leaf():
    tx = fr.inject_hyperparams(fr.sgd)({"w": 0.1, "b": lambda count: 0.5 / (1 + count)})
    _, state = train(tx, 2)
    assert state.hyperparams["learning_rate"]["b"] == 0.25
    state.hyperparams["learning_rate"]["w"] = 0.0
    updates, _ = tx.update(small(1), state, small())
    assert not updates["w"].any()
    assert updates["b"].any()


def test_a_derivative_goes_through_a_hyperparameter_in_the_state():
    tx = fr.inject_hyperparams(fr.sgd)(0.1, momentum=0.9)
    params, state = small(), tx.init(small())

    def after(rate):
        hyper = {**state.hyperparams, "learning_rate": rate}
        return flat(tx.update(small(1), state._replace(hyperparams=hyper), params)[0]).sum()

    torch.testing.assert_close(grad(after)(torch.tensor(0.1, dtype=torch.float64)), -flat(small(1)).sum())


def test_what_is_no_number_stays_an_argument():
    hyper = lambda tx: list(tx.init(small()).hyperparams)
    inject = fr.inject_hyperparams
    assert hyper(inject(fr.sgd)(0.1)) == ["learning_rate"]
    assert hyper(inject(fr.adamw)(0.1, mask=lambda p: {"w": True, "b": False}))[-1] == "weight_decay"
    assert hyper(inject(fr.adamw, "eps")(0.1)) == ["learning_rate", "b1", "b2", "eps_root", "weight_decay"]
    assert hyper(inject(fr.prox_sgd)(0.1, fr.elastic, 0.3, 0.5)) == ["learning_rate", "hyper_0", "hyper_1", "strength"]
    assert hyper(inject(fr.apply_if_finite)(fr.sgd(0.1), 3)) == []  # Annotated as a whole number.
    assert hyper(inject(fr.MultiSteps)(fr.sgd(0.1), 3)) == ["every_k_schedule"]


def test_what_cannot_be_injected_is_said():
    def cosine(rate, steps):
        return fr.sgd(fr.cosine_decay_schedule(rate, steps))

    assert list(fr.inject_hyperparams(cosine, "steps")(0.1, 9).init(small()).hyperparams) == ["rate"]
    for call, message in (
        (lambda: fr.inject_hyperparams(cosine)(0.1, 9), "decay_steps is tensor.*named in static_args.*rate, steps"),
        (lambda: fr.inject_hyperparams(fr.sgd(0.1)), "inner_factory is .*before it is called"),
        (
            lambda: fr.inject_hyperparams(torch.optim.Adam),
            "inner_factory is the optimizer Adam of torch.*such as fr.adamw",
        ),
        (lambda: fr.ensemble(torch.optim.SGD, torch.ones(2)), "make is the optimizer SGD of torch"),
        (lambda: fr.inject_hyperparams(fr.sgd)(), "missing 1 required positional argument"),
        (
            lambda: fr.inject_hyperparams(fr.sgd)(0.1, lr=1.0),
            "got 'lr', which it does not take; it takes learning_rate",
        ),
        (lambda: fr.inject_hyperparams(fr.sgd)(0.1, learning_rate=1.0), "several values for .*'learning_rate'"),
        (lambda: fr.inject_hyperparams(fr.sgd)(*range(9)), "takes 4 positional arguments, but got 9"),
        (lambda: fr.inject_hyperparams(lambda rate: None)(0.1), "returned None; expected a Transform"),
        (lambda: fr.inject_hyperparams(fr.sgd, hyperparam_dtype=torch.int64), "expected a dtype of floating point"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(ValueError, match="static_args names 'lr', which sgd does not take"):
        fr.inject_hyperparams(fr.sgd, static_args=["lr"])
    with pytest.raises(ValueError, match=r"learning_rate is -0\.1; expected a number of at least 0"):
        fr.inject_hyperparams(fr.sgd)(-0.1)
    tx = fr.inject_hyperparams(fr.sgd)(0.1)
    state = tx.init(small())
    for hyper, message in (
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"lr": 1.0}, "lacks 'learning_rate', has 'lr', unknown to"),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(small(1), state._replace(hyperparams=hyper), small())


# Slow weights and averages


def test_pairs_of_parameters_go_the_way_of_plain_ones():
    tx = fr.lookahead(fr.adam(0.1), 3, 0.5)
    plain, state = train(tx, 7)
    for both in (False, True):
        pair = fr.LookaheadParams.init_synced(small())
        begun = tx.init(pair)
        for n in range(7):
            grads = small(n + 1)
            given = fr.LookaheadParams(grads, fr.tree_map(torch.zeros_like, grads)) if both else grads
            updates, begun = tx.update(given, begun, pair)
            pair = fr.apply_updates(pair, updates)
        assert_equal(pair.fast, plain)
        assert_equal(pair.slow, state.slow)
        assert begun.slow == ()
    assert_equal(begun.fast_state, state.fast_state)


def test_pairs_of_parameters_take_fused_steps_in_chains():
    tx = fr.chain(fr.clip_by_global_norm(1.0), fr.lookahead(fr.sgd(0.1), 2, 0.5))
    params, state = fr.LookaheadParams.init_synced(small()), None
    step = fr.fuse(tx, backend="eager")
    loss = lambda pair: flat(pair.fast).square().sum()
    state, eager, other = tx.init(params), tx.init(params), params
    for _ in range(3):
        updates, eager = tx.update(grad(loss)(other), eager, other)
        other = fr.apply_updates(other, updates)
        params, state = step(params, grad(loss)(params), state)
    assert_equal((params, state), (other, eager), rtol=1e-12, atol=1e-14)


def test_states_of_pairs_and_of_plain_parameters_are_told_apart():
    tx, pair = fr.lookahead(fr.sgd(0.1), 2, 0.5), fr.LookaheadParams.init_synced(small())
    with pytest.raises(ValueError, match="got LookaheadParams, and a state that was begun with plain parameters"):
        tx.update(small(1), tx.init(small()), pair)
    with pytest.raises(ValueError, match="got plain parameters, and a state that was begun with LookaheadParams"):
        tx.update(small(1), tx.init(pair), small())
    with pytest.raises(ValueError, match=r"updates does not match params: it lacks 'fast.b'"):
        tx.update({"w": small()["w"]}, tx.init(pair), pair)


def test_a_fresh_start_after_synchronization_is_one_at_the_slow_weights():
    tx = fr.lookahead(fr.fista(0.1, fr.l1, strength=0.1), 2, 0.5, reset_state=True)
    params, state = train(tx, 2)
    assert_equal(state.fast_state.solution, params, rtol=1e-12, atol=1e-14)
    assert state.fast_state.steps == 0


def test_points_of_a_projection_stay_in_its_set_and_so_do_their_averages():
    base = fr.chain(fr.sgd(0.3), fr.project(fr.nonnegative))
    tx, params = fr.schedule_free(base, 0.3, b1=0.5), fr.tree_map(torch.abs, small())
    state = tx.init(params)
    for n in range(20):
        updates, state = tx.update(small(n + 1), state, params)
        params = fr.apply_updates(params, updates)
        assert (flat(state.z) >= 0).all()
        assert (flat(params) >= -1e-15).all()
        assert (flat(fr.schedule_free_eval_params(state, params)) >= -1e-15).all()
    assert (flat(state.z) == 0).any()


def test_averages_of_sixteen_bit_parameters_are_weighed_in_float64():
    tx, params = fr.schedule_free_sgd(0.1), {"w": torch.ones(1, dtype=torch.bfloat16)}
    state = tx.init(params)
    for _ in range(300):
        _, state = tx.update({"w": torch.zeros(1, dtype=torch.bfloat16)}, state, params)
    torch.testing.assert_close(state.weight_sum, torch.tensor(3.0, dtype=torch.float64))
    assert state.z["w"].dtype == torch.float32


def test_averages_of_stacked_members_are_asked_for_under_vmap():
    tx = fr.ensemble(lambda b1: fr.schedule_free_sgd(0.1, b1=b1), torch.tensor([0.5, 0.9], dtype=torch.float64))
    params = fr.replicate(small(), 2)
    updates, state = tx.update(fr.replicate(small(1), 2), tx.init(params), params)
    params = fr.apply_updates(params, updates)
    with pytest.raises(ValueError, match=r"stacked members.*vmap"):
        fr.schedule_free_eval_params(state, params)
    found = vmap(fr.schedule_free_eval_params)(state, params)
    for b1, member in zip((0.5, 0.9), fr.unstack(found), strict=True):
        alone = fr.schedule_free_sgd(0.1, b1=b1)
        new, other = train(alone, 1)
        assert_equal(member, fr.schedule_free_eval_params(other, new), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("period", [1, 2, 3])
def test_opaque_and_visible_climbs_end_at_the_same_point(period):
    loss = lambda params: (flat(params).square() - 1).square().sum()
    make = lambda opaque: fr.sam(fr.sgd(0.01, momentum=0.9), fr.sgd(0.02), period, opaque_mode=opaque)
    params, visible = small(), make(False)
    state = visible.init(params)
    for _ in range(3 * period):
        updates, state = visible.update(grad(loss)(params), state, params)
        params = fr.apply_updates(params, updates)
    other, opaque = small(), make(True)
    step = fr.fuse(opaque, backend="eager")
    begun = opaque.init(other)
    for n in range(3):
        given = {"grad_fn": lambda params, i: grad(loss)(params)}
        if n == 1:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="fuse runs this chain without a compiler")
                other, begun = step(other, grad(loss)(other), begun, **given)
        else:
            updates, begun = opaque.update(grad(loss)(other), begun, other, **given)
            other = fr.apply_updates(other, updates)
    assert_equal(other, params, rtol=1e-10, atol=1e-12)


def test_a_sharp_step_lands_at_exact_zeros():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        params = small(dtype=dtype)
        tx = fr.sam(fr.prox_sgd(0.1, fr.l1, strength=5.0), fr.sgd(0.05))
        state = tx.init(params)
        for n in range(4):
            updates, state = tx.update(small(n + 1, dtype), state, params)
            params = fr.apply_updates(params, updates)
        zeros = flat(params) == 0
        assert 3 < zeros.sum() < zeros.numel()


def test_gradient_functions_are_asked_for_where_they_are_used():
    tx, params = fr.sam(fr.sgd(0.1), fr.sgd(0.1), opaque_mode=True), small()
    with pytest.raises(TypeError, match="opaque mode got no grad_fn; expected update"):
        tx.update(small(1), tx.init(params), params)
    tx = fr.sam(fr.sgd(0.1), fr.sgd(0.1))
    with pytest.raises(TypeError, match="extra argument 'grad_fn', which no transform of"):
        tx.update(small(1), tx.init(params), params, grad_fn=grad)


# Measurements


def test_measures_see_updates_parameters_and_the_loss():
    tx = fr.chain(
        fr.snapshot("before", fr.global_norm),
        fr.clip_by_global_norm(1.0),
        fr.monitor(
            {
                "after": fr.global_norm,
                "sparsity": lambda updates, params: fr.sparsity(params),
                "l1": fr.l1,
                "loss": lambda updates, params, value: value,
                "mean loss": fr.measure_with_ema(lambda updates, *, value: value, 0.5),
                "whole": lambda updates: updates,
                "momentum": fr.trace(0.5),
                "number": lambda updates: 3,
            }
        ),
        fr.sgd(0.1),
    )
    params, grads = small(), fr.tree_map(lambda g: 5 * g, small(1))
    state = tx.init(params)
    assert fr.tree_paths(state) == fr.tree_paths(tx.update(grads, state, params, value=torch.tensor(1.0))[1])
    for value in (1.0, 4.0):
        updates, state = tx.update(grads, state, params, value=torch.tensor(value))
    found = state[2].measurements
    clipped = fr.clip_by_global_norm(1.0).update(grads, fr.EmptyState(), params)[0]
    assert_equal(updates, fr.tree_map(lambda u: -0.1 * u, clipped))
    torch.testing.assert_close(state[0].measurement["before"], fr.global_norm(grads))
    torch.testing.assert_close(found["after"], torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(found["l1"], fr.l1(clipped))
    assert (found["loss"], found["number"]) == (4.0, 3)
    torch.testing.assert_close(found["mean loss"], torch.tensor(3.0, dtype=torch.float64))
    assert_equal(found["whole"], clipped)
    assert_equal(found["momentum"], fr.tree_map(lambda u: 1.5 * u, clipped), rtol=1e-12)
    assert found["whole"]["w"].data_ptr() != updates["w"].data_ptr()


def test_measures_are_the_same_in_fused_steps_and_for_members():
    make = lambda rate: fr.chain(
        fr.sgd(rate),
        fr.monitor({"norm": fr.global_norm, "large": fr.measure_with_ema(lambda u: fr.global_norm(u) > 0.3, 0.9)}),
    )
    _, state = train(make(0.1), 3)
    _, other = fused(make(0.1), 3)
    assert_equal(other, state, rtol=1e-12, atol=1e-14)
    tx, params = fr.ensemble(make, torch.tensor([0.1, 1.0], dtype=torch.float64)), fr.replicate(small(), 2)
    _, state = tx.update(fr.replicate(small(1), 2), tx.init(params), params)
    norms = state[1].measurements["norm"]
    torch.testing.assert_close(norms[1], 10 * norms[0])
    assert norms.shape == (2,)


def test_measures_that_are_none_are_named():
    for call, message in (
        (lambda: fr.monitor([fr.global_norm]), "measures is a list; expected a dict"),
        (lambda: fr.monitor({"norm": 3.0}), "at 'norm': measure is 3.0; expected a function of updates"),
        (lambda: fr.snapshot(fr.global_norm, "norm"), "measure_name is .*; expected a name"),
        (lambda: fr.measure_with_ema(fr.trace(0.5), 0.5), "measure is trace.*; expected a function of updates"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(ValueError, match="monitor got no measures"):
        fr.monitor({})


# In an optimizer of torch, and in what else is wrong


@pytest.mark.filterwarnings("ignore:param group 0. .* go uphill")  # A monitor takes no steps.
def test_wrapped_chains_are_optimizers_of_torch():
    for name in ("MultiSteps of a prox", "lookahead", "schedule_free", "sam", "conditionally_mask", "monitor"):
        weights = {key: torch.nn.Parameter(w) for key, w in small().items()}
        make = TRANSFORMS[name].make
        optimizer = fr.Optimizer(weights, lambda scale, make=make: fr.chain(make(scale)), scale=1.0, compile=False)
        params, tx = small(), make(1.0)
        state = tx.init(params)
        for n in range(4):
            for key, w in weights.items():
                w.grad = small(n + 1)[key]
            optimizer.step()
            updates, state = tx.update(small(n + 1), state, params)
            params = fr.apply_updates(params, updates)
        assert_equal({key: w.detach() for key, w in weights.items()}, params, rtol=1e-12, atol=1e-14)


def test_an_optimizer_of_torch_wants_the_factory_as_it_is():
    weights = [torch.nn.Parameter(torch.ones(1))]
    with pytest.raises(
        TypeError, match=r"factory is inject_hyperparams\(sgd\), whose hyperparameters stand in the state"
    ):
        fr.Optimizer(weights, fr.inject_hyperparams(fr.sgd), lr=0.1)


def test_slow_weights_of_one_tensor_go_through_one_graph():
    tx, w = fr.lookahead(fr.sgd(0.1), 2, 0.5), torch.ones(3)
    compiled = torch.compile(lambda g, s, p: tx.update(g, s, p), fullgraph=True, backend="eager")
    assert_equal(compiled(w, tx.init(w), w), tx.update(w, tx.init(w), w))


def test_periods_conditions_and_ranges_are_checked_where_they_are_given():
    sgd = fr.sgd(0.1)
    for call, message in (
        (lambda: fr.MultiSteps(sgd, 0), "every_k_schedule is 0; expected a number of at least 1"),
        (lambda: fr.lookahead(sgd, 0, 0.5), "sync_period is 0; expected a whole number of at least 1"),
        (lambda: fr.lookahead(sgd, 2, 1.5), "slow_step_size is 1.5; expected a number from 0 to 1"),
        (lambda: fr.sam(sgd, sgd, 0), "sync_period is 0"),
        (lambda: fr.schedule_free(sgd, 0.1, b1=0.0), "b1 is 0.0; expected a number above 0"),
        (lambda: fr.schedule_free_sgd(-0.1), "learning_rate is -0.1"),
        (lambda: fr.schedule_free_sgd(0.1, 0), "warmup_steps is 0"),
        (lambda: fr.apply_every(0), "k is 0"),
        (lambda: fr.schedule_free_eval_params((), small()), "state is a tuple; expected the ScheduleFreeState"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in (
        (lambda: fr.MultiSteps(fr.sgd, 2), "argument 0 of MultiSteps is a function; expected a Transform"),
        (lambda: fr.MultiSteps(sgd, 2.5), "every_k_schedule is 2.5; expected a whole number"),
        (lambda: fr.MultiSteps(sgd, {"w": 2}), "every_k_schedule is a dict; expected a number, one for all leaves"),
        (lambda: fr.MultiSteps(sgd, 2, should_skip_update_fn=True), "should_skip_update_fn is True; expected a func"),
        (lambda: fr.apply_every(lambda count: 2), "k is .*; expected a number. MultiSteps takes a schedule"),
        (lambda: fr.conditionally_mask(sgd, True), "should_transform_fn is True; expected a function"),
        (lambda: fr.conditionally_mask(sgd, lambda step: 1).init(small()), None),
        (lambda: fr.schedule_free(sgd, {"w": 0.1, "b": 0.1}), "learning_rate is a tree; expected a number"),
        (lambda: fr.schedule_free_sgd(fr.constant_schedule(0.1), 3), "is a schedule, and warmup_steps is given too"),
    ):
        if message is None:
            call()
            continue
        with pytest.raises(TypeError, match=message):
            call()
    for answer, said in (
        (1, "returned 1; expected one bool"),
        (torch.ones(2) > 0, r"a tensor of torch.bool and shape"),
    ):
        tx = fr.conditionally_mask(sgd, lambda step, answer=answer: answer)
        with pytest.raises(TypeError, match=said):
            tx.update(small(1), tx.init(small()), small())
    with pytest.raises(TypeError, match="should_skip_update_fn returned True; expected a pair"):
        fr.MultiSteps(sgd, 2, should_skip_update_fn=lambda updates, step, params: True).init(small())


@pytest.mark.slow
def test_wrappers_go_through_the_real_compiler():
    for name in ("MultiSteps of a prox", "inject_hyperparams", "schedule_free_adamw"):
        tx = TRANSFORMS[name].make()
        assert_equal(fused(tx, 4, "inductor"), train(tx, 4), rtol=1e-9, atol=1e-12)


def test_lookahead_averages_zeros_away_and_the_optimizer_inside_makes_them_again():
    goal = torch.tensor([1.0, 0.2])
    prox = fr.prox_sgd(0.5, fr.l1, strength=0.3)
    tx, params = fr.lookahead(prox, 2, 0.5), {"w": torch.tensor([2.0, 2.0])}
    state = tx.init(params)
    for _ in range(6):
        updates, state = tx.update({"w": params["w"] - goal}, state, params)
        params = fr.apply_updates(params, updates)
    assert state.slow["w"].all()
    params, begun = state.slow, prox.init(state.slow)
    for _ in range(20):
        updates, begun = prox.update({"w": params["w"] - goal}, begun, params)
        params = fr.apply_updates(params, updates)
    assert params["w"][1] == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda tx: fr.apply_if_finite(tx, 2),
        lambda tx: fr.MultiSteps(tx, 2),
        lambda tx: fr.conditionally_mask(tx, lambda step: step > 0),
        lambda tx: fr.lookahead(tx, 1, 0.5, reset_state=True),
        lambda tx: fr.sam(tx, tx, 2),
    ],
)
def test_a_number_in_a_state_that_is_chosen_by_a_condition_is_named(make):
    counts = fr.Transform(lambda params: {"calls": 1}, lambda u, state, params: (u, {"calls": state["calls"] + 1}))
    params = {"w": torch.ones(2)}
    with pytest.raises(TypeError, match=r"'calls' of a state is \d; expected a tensor"):
        make(counts).update(params, make(counts).init(params), params)


@pytest.mark.parametrize(
    "make",
    [
        lambda key: fr.inject_hyperparams(fr.noisy_sgd)(1e-2, key=key),
        lambda key: fr.inject_hyperparams(fr.add_noise)(1.0, 0.5, key),
        lambda key: fr.inject_hyperparams(fr.dpsgd)(1e-2, 1.0, 0.5, seed=key),
    ],
    ids=["noisy_sgd", "add_noise", "dpsgd"],
)
@pytest.mark.parametrize("key", [3, torch.tensor(3)], ids=["int", "tensor"])
def test_the_key_of_a_generator_is_no_hyperparameter(make, key):
    tx, params = make(key), {"w": torch.ones(2)}
    updates = {"w": torch.ones(3, 2)} if "dpsgd" in repr(tx) else params
    state = tx.init(params)
    assert "learning_rate" in state.hyperparams or "eta" in state.hyperparams
    assert not {"key", "seed"} & state.hyperparams.keys()
    again, _ = make(key).update(updates, make(key).init(params), params)
    assert_equal(tx.update(updates, state, params)[0], again)
