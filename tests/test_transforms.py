"""The laws of transforms: each test holds for every row of the table."""

from __future__ import annotations

import copy
import doctest
import inspect
import pickle
import re
import sys
import types
import warnings

import cases
import pytest
import torch
from cases import DEVICE, HEAD, TRANSFORMS, Layer, Seen, assert_equal, cpu_only, draw, flat, joint, stacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

import funcreg as fr
from funcreg.core.tree import ABSENT


def rows(which=lambda case: True):
    chosen = {name: case for name, case in TRANSFORMS.items() if which(case)}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen)


every_transform = rows()
every_transform_with_an_equation = rows(lambda case: case.equation)
every_differentiable_transform = rows(lambda case: case.differentiable)


def run(tx, steps=3, seed=0, dtype=torch.float64, params=None):
    """Updates and states of a transform over random gradients, parameters moving along."""
    params = draw(seed, dtype) if params is None else params
    state = tx.init(params)
    for n in range(steps):
        grads = fr.tree_map(lambda w, g: g.to(w.dtype), params, draw(seed + 10 + n))
        updates, state = tx.update(grads, state, params)
        params = fr.apply_updates(params, fr.tree_map(lambda u: 0.1 * u, updates))
    return updates, state, params


@every_transform_with_an_equation
def test_updates_are_those_of_the_equation(case):
    for factor in (1.0, 0.6):
        tx, params, seen = case.make(factor), draw(), None
        state = tx.init(params)
        for n in range(4):
            grads = draw(seed=n + 1)
            leaves = list(zip(fr.tree_leaves(params), fr.tree_leaves(grads), strict=True))
            seen = seen or [Seen([], [], []) for _ in leaves]
            for leaf, (w, g) in zip(seen, leaves, strict=True):
                leaf.ws.append(w), leaf.gs.append(g), leaf.norms.append(flat(grads).square().sum().sqrt())
            updates, state = tx.update(grads, state, params)
            for leaf, u in zip(seen, fr.tree_leaves(updates), strict=True):
                torch.testing.assert_close(u, case.equation(leaf, factor).to(u.dtype), rtol=1e-11, atol=1e-13)
            params = fr.apply_updates(params, fr.tree_map(lambda u: 0.1 * u, updates))


@every_transform
def test_update_leaves_its_arguments_as_they_were(case):
    tx, params, grads = case.make(), draw(), draw(seed=1)
    state = tx.init(params)
    for _ in range(2):
        before = copy.deepcopy((grads, state, params))
        new = tx.update(grads, state, params)
        assert_equal((grads, state, params), before)
        state = new[1]


@every_transform
def test_state_and_updates_keep_structure_shape_and_dtype(case):
    describe = lambda tree: [(x.dtype, x.shape, x.device) for x in fr.tree_leaves(tree)]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tx, params = case.make(), draw(dtype=dtype)
        state = tx.init(params)
        updates, after, _ = run(tx, steps=3, dtype=dtype)
        assert fr.tree_paths(after) == fr.tree_paths(state)
        assert describe(after) == describe(state)
        assert describe(updates) == describe(case.updates_like(params))


@every_transform
def test_leaves_of_state_and_updates_share_no_memory(case):
    tx = case.make()
    first = tx.init(draw())
    updates, state, _ = run(tx)
    places = [leaf.data_ptr() for leaf in fr.tree_leaves(first)]
    assert len(set(places)) == len(places)
    places = [leaf.data_ptr() for leaf in fr.tree_leaves((updates, state))]
    assert len(set(places)) == len(places)


@every_transform
def test_what_is_made_lies_with_the_parameters_whatever_the_default_device(case):
    def last():
        tx = case.make()
        return tx.update(grads, tx.init(params), params)

    params, grads = draw(), draw(1)
    expected = last()
    with torch.device("meta"):
        found = last()
    assert_equal(found, expected)


@rows(lambda case: not case.wide)
def test_sixteen_bit_updates_are_those_of_float32_rounded(case):
    grads = fr.tree_map(lambda g: g.bfloat16(), draw(10))
    tx, params = case.make(), draw(dtype=torch.bfloat16)
    narrow, _ = tx.update(grads, tx.init(params), params)
    master = fr.tree_map(lambda w: w.float(), params)
    wide, _ = tx.update(fr.tree_map(lambda g: g.float(), grads), tx.init(master), master)
    assert_equal(narrow, fr.tree_map(lambda u: u.bfloat16(), wide), rtol=1e-2, atol=1e-3)


@every_transform
def test_vmap_is_a_loop_over_members(case):
    tx = case.make()
    members = [draw(seed) for seed in range(3)]
    grads = [[draw(10 * n + seed) for seed in range(3)] for n in range(2)]
    batch = stacked(members)
    state = vmap(tx.init)(batch) if fr.tree_leaves(tx.init(members[0])) else tx.init(members[0])
    states = [tx.init(member) for member in members]
    for step in grads:
        updates, state = vmap(tx.update)(stacked(step), state, batch)
        for i, member in enumerate(members):
            alone, states[i] = tx.update(step[i], states[i], member)
            assert_equal(fr.tree_map(lambda u, i=i: u[i], updates), alone, rtol=1e-11, atol=1e-13)


@every_transform
def test_members_of_an_ensemble_have_hyperparameters_of_their_own(case):
    factors = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    tx, alone = fr.ensemble(case.make, factors), [case.make(float(h)) for h in factors]
    members = [draw(seed) for seed in range(3)]
    state, states = tx.init(stacked(members)), [t.init(member) for t, member in zip(alone, members, strict=True)]
    for n in range(2):
        grads = [draw(10 * n + seed + 5) for seed in range(3)]
        updates, state = tx.update(stacked(grads), state, stacked(members))
        for i, t in enumerate(alone):
            expected, states[i] = t.update(grads[i], states[i], members[i])
            assert_equal(fr.tree_map(lambda u, i=i: u[i], updates), expected, rtol=1e-6, atol=1e-9)
            assert {u.dtype for u in fr.tree_leaves(updates)} == {torch.float64}


# Each function once: rows of one function differ in options, not in what the compiler traces of its checks. Many a
# compilation, which costs by itself as much as a row.
ONCE = list({name.split()[0]: name for name in reversed(TRANSFORMS)}.values())


@pytest.mark.slow
@pytest.mark.parametrize("names", [ONCE[n::16] for n in range(16)], ids=range(16))
def test_chains_made_inside_a_compiled_vmap_are_those_of_a_loop(names):
    factors = torch.tensor([0.5, 1.5], dtype=torch.float64)
    old = torch.__version__ < "2.10"
    cases = {name: TRANSFORMS[name] for name in names if not (old and TRANSFORMS[name].newer)}
    chains = {name: fr.ensemble(case.make, factors) for name, case in cases.items()}
    params = {"w": torch.stack([draw(seed)["head"].weight for seed in range(2)])}
    grads = {"w": torch.stack([draw(seed + 5)["head"].weight for seed in range(2)])}

    def steps(grads, states, params):
        return {name: tx.update(grads, states[name], params) for name, tx in chains.items()}

    states = {name: tx.init(params) for name, tx in chains.items()}
    compiled = torch.compile(steps, fullgraph=True, backend="eager")
    assert_equal(compiled(grads, states, params), steps(grads, states, params), rtol=1e-9, atol=1e-12)


PURE = ["sgd", "adamw", "prox_adam of groups", "chain", "partition", "apply_if_finite", "scale_by_learning_rate"]


@pytest.mark.filterwarnings("ignore:fuse got .* steps go uphill")  # Wrappers of directions.
# Steps of every transform with a backend that only runs graphs are in test_plan.py. What AOTAutograd makes of a graph
# takes seconds, and differs by its operations: for some rows of all kinds.
@pytest.mark.parametrize("name", PURE)
@pytest.mark.parametrize("donate", [False, True])
def test_fused_steps_are_the_eager_ones_and_compile_once(name, donate):
    def small(seed):
        return {"head": draw(seed)["head"]}

    tx = TRANSFORMS[name].make()
    counter = CompileCounterWithBackend("aot_eager" if donate else "eager")
    step = fr.fuse(tx, donate=donate, backend=counter)
    params, state = step.init(small(0))
    expected, eager = small(0), tx.init(small(0))
    compiled = []
    for n in range(4):
        updates, eager = tx.update(small(n + 1), eager, expected)
        expected = fr.apply_updates(expected, updates)
        before = [leaf.data_ptr() for leaf in fr.tree_leaves((params, state))]
        params, state = step(params, small(n + 1), state)
        assert_equal((params, state), (expected, eager), rtol=1e-11, atol=1e-12)
        assert not donate or before == [leaf.data_ptr() for leaf in fr.tree_leaves((params, state))]
        compiled.append(counter.frame_count)
    assert compiled[0] == compiled[-1] > 0


@every_transform
def test_masked_leaves_have_no_state_and_their_updates_pass(case):
    tx, params, grads = case.make(), draw(), draw(1)
    masked = fr.masked(tx, HEAD)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* would go uphill")  # The body, where this makes steps.
        state = masked.init(params)
    head = {"head": params["head"]}
    assert len(fr.tree_leaves(state)) == len(fr.tree_leaves(tx.init(head)))
    updates, _ = masked.update(grads, state, params)
    alone, _ = tx.update({"head": grads["head"]}, tx.init(head), head)
    assert_equal(updates["head"], alone["head"], rtol=1e-12, atol=1e-14)
    assert_equal(updates["body"], grads["body"])


@every_transform
def test_frozen_leaves_stay_wherever_freeze_stands(case):
    params, grads, free = draw(), draw(1), {"body": draw()["body"]}
    alone = case.make()
    expected, _ = alone.update({"body": grads["body"]}, alone.init(free), free)
    for order in ((fr.freeze(HEAD), case.make()), (case.make(), fr.freeze(HEAD))):
        for tx in (fr.chain(*order), fr.chain(fr.chain(*order)), fr.named_chain(("a", order[0]), ("b", order[1]))):
            state = tx.init(params)
            updates, after = tx.update(grads, state, params)
            assert not flat(updates["head"]).any()
            assert_equal(updates["body"], expected["body"], rtol=1e-12, atol=1e-14)
            assert len(fr.tree_leaves(state)) == len(fr.tree_leaves(after)) == len(fr.tree_leaves(alone.init(free)))


def first(params):
    """A mask of the first leaf that it sees."""
    return {name: i == 0 for i, name in enumerate(params)}


@pytest.mark.parametrize(
    "make",
    [
        lambda: fr.chain(fr.freeze(first), fr.sgd(0.1)),
        lambda: fr.chain(fr.add_decayed_weights(0.0), fr.chain(fr.chain(fr.sgd(0.1), fr.freeze(first)))),
        lambda: fr.named_chain(("a", fr.named_chain(("b", fr.freeze(first)), ("c", fr.sgd(0.1))))),
        lambda: fr.chain(fr.selective_transform(fr.sgd(0.1), freeze_mask=first)),
        lambda: fr.partition({True: fr.freeze(True), False: fr.sgd(0.1)}, first),
        lambda: fr.MultiSteps(fr.chain(fr.freeze(first), fr.sgd(0.1)), 1),
        lambda: fr.proximal_step(
            fr.chain(fr.scale_by_rms(0.0, 1.0), fr.freeze(first)), 0.1 * 2**0.5, fr.l1, strength=0.0
        ),
    ],
)
def test_a_mask_that_goes_by_places_is_asked_about_all_leaves(make):
    tx, params = make(), {name: torch.ones(2, dtype=torch.float64) for name in "abc"}
    updates, _ = tx.update(params, tx.init(params), params)
    assert_equal(updates, {"a": 0 * params["a"], **{name: -0.1 * params[name] for name in "bc"}}, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fr.partition({True: fr.freeze(True), False: fr.sgd(0.1)}, first),
        lambda: fr.masked(fr.freeze(True), first),
        lambda: fr.MultiSteps(fr.chain(fr.freeze(first), fr.sgd(0.1)), 2),
    ],
)
def test_a_mask_that_would_freeze_more_leaves_in_a_chain_is_refused(make):
    params = {name: torch.ones(2) for name in "abc"}
    for tx in (fr.chain(make()), fr.chain(fr.chain(fr.identity(), make()))):
        with pytest.raises(ValueError, match=r"freezes other leaves, b, where those that it freezes are left out"):
            tx.init(params)


@every_differentiable_transform
def test_updates_are_differentiable_in_gradients_and_parameters(case):
    tx, params = case.make(), draw()

    def last(grads, params):
        state = tx.init(params)
        _, state = tx.update(draw(2), state, params)
        updates, _ = tx.update(grads, state, params)
        return (flat(updates) * flat(draw(3))).sum()

    slope = grad(last)(draw(1), params)
    assert flat(slope).isfinite().all()
    assert flat(slope).any()
    assert flat(grad(last, argnums=1)(draw(1), params)).isfinite().all()
    at = lambda t: last(fr.tree_map(lambda g, d: g + t * d, draw(1), draw(4)), params)
    torch.testing.assert_close(flat(slope) @ flat(draw(4)), (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-4, atol=1e-5)


@every_transform
def test_state_goes_through_a_file(case, tmp_path):
    _, state, _ = run(case.make())
    torch.save(fr.tree_leaves(state), tmp_path / "state.pt")
    leaves = torch.load(tmp_path / "state.pt", weights_only=True)
    for a, b in zip(leaves, fr.tree_leaves(state), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:centralize makes every update")  # Of matrices of one column.
@pytest.mark.filterwarnings("ignore:.* begins without parameters")
@every_transform
def test_trees_without_leaves_or_entries_are_taken(case):
    entries = {"w": torch.ones(()), "m": torch.ones(1, 1)}, torch.ones(3, 1), {"w": torch.zeros(0, 2)}
    for params in ({}, (), {"a": None}, *entries):
        tx = case.make()
        updates, _ = tx.update(params, tx.init(params), params)
        assert fr.tree_paths(updates) == fr.tree_paths(params)


@every_transform
def test_wrong_trees_are_said_with_the_leaf(case):
    tx, params = case.make(), draw()
    state = tx.init(params)
    wrong = draw(1)
    wrong["body"]["filters"] = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"updates 'body.filters' has shape \(3, 2\); expected \(3, 2, 2, 2\)"):
        tx.update(wrong, state, params)
    del wrong["body"]["filters"]
    with pytest.raises(ValueError, match=r"updates does not match params: it lacks 'body\.filters'"):
        tx.update(wrong, state, params)
    with pytest.raises(TypeError, match=r"params 'head.bias' is a tensor of torch.int64; is it a buffer"):
        tx.init({"head": {"bias": torch.ones(3, dtype=torch.int64)}})
    with pytest.raises(TypeError, match=r"params 'head.bias' is 0.5; expected a tensor"):
        tx.init({"head": {"bias": 0.5}})


@every_transform
def test_a_gradient_that_is_none_is_zeros_where_its_leaf_is_left_out_and_else_an_error_that_names_it(case):
    tx, params = case.make(), draw()
    state = tx.init(params)
    spared = tx.spares(params) if tx.spares is not None else [False] * len(fr.tree_leaves(params))
    for i, (path, may) in enumerate(zip(fr.tree_paths(params), spared, strict=True)):
        leaves = fr.tree_leaves(draw(1))
        with_none, with_zeros = ([x if n == i else g for n, g in enumerate(leaves)] for x in (None, 0 * leaves[i]))
        with_none, with_zeros = (
            {"head": Layer(g[2], g[3]), "body": {"filters": g[0], "scale": (g[1],)}} for g in (with_none, with_zeros)
        )
        if may:
            assert_equal(tx.update(with_none, state, params), tx.update(with_zeros, state, params))
        else:
            with pytest.raises(ValueError, match=rf"updates '{path}' is None; expected a tensor.*no gradient.*Freeze"):
                tx.update(with_none, state, params)


@every_transform
def test_gradients_without_arithmetic_are_refused_with_the_leaf(case):
    tx, params = case.make(), draw()
    state = tx.init(params)
    for wrong, message in (
        (torch.zeros(5, dtype=torch.int64), "int64"),
        (torch.zeros(5).to_sparse(), "layout.*to_dense.*sparse=False"),
        (torch.zeros(5, dtype=torch.float8_e4m3fn), "float8"),
    ):
        grads = {**draw(1), "body": {**draw(1)["body"], "scale": (wrong.to(DEVICE),)}}
        with pytest.raises(TypeError, match=rf"updates 'body.scale.0' .*{message}"):
            tx.update(grads, state, params)


@every_transform
def test_extra_arguments_of_other_links_are_passed_by_and_those_of_none_are_refused(case):
    tx, params = case.make(), draw()
    taking = fr.Transform(fr.init_empty_state, lambda updates, state, params, loss: (updates, state))
    both = fr.chain(taking, tx)
    updates, _ = both.update(draw(1), both.init(params), params, loss=torch.ones(()))
    assert_equal(updates, tx.update(draw(1), tx.init(params), params)[0])
    if case.drops:
        assert_equal(tx.update(draw(1), tx.init(params), params, loss=torch.ones(()))[0], updates)
        return
    with pytest.raises(TypeError, match=r"^update got the extra argument 'loss', which no transform of .* takes"):
        tx.update(draw(1), tx.init(params), params, loss=torch.ones(()))


def test_extra_arguments_reach_the_links_that_name_them():
    def scaled(updates, state, params, *, value):
        return fr.tree_map(lambda u: u * value, updates), state

    tx = fr.chain(fr.scale(2.0), fr.masked(fr.Transform(fr.init_empty_state, scaled), True), fr.identity())
    params = {"w": torch.ones(1)}
    updates, _ = tx.update(params, tx.init(params), params, value=3.0)
    assert updates == {"w": torch.tensor([6.0])}
    with pytest.raises(TypeError, match="extra argument 'other'"):
        tx.update(params, tx.init(params), params, value=3.0, other=None)
    with pytest.raises(TypeError, match="value"):
        tx.update(params, tx.init(params), params)


def test_prox_adam_moves_groups_to_the_minimum_in_its_metric():
    tx, adam, params = TRANSFORMS["prox_adam of groups"].make(), fr.scale_by_adam(eps=0.1), draw()
    updates, _ = tx.update(draw(1), tx.init(params), params)
    direction, state = adam.update(draw(1), adam.init(params), params)
    h = adam.metric(state)
    reached = fr.tree_map(lambda w, d: w - 0.1 * d, params, direction)
    landed = fr.sparse_group_lasso.prox(reached, 0.1, 1.0, 0.5, metric=h)
    assert_equal(fr.apply_updates(params, updates), landed, rtol=1e-12, atol=1e-15)


def test_a_penalty_of_a_users_own_tells_whether_it_has_a_rule_in_a_metric():
    from cases import huber, joint

    params, ones = draw(), fr.tree_map(torch.ones_like, draw())
    rows = fr.penalty(gradient=lambda w: w, proximal=lambda w, step: w)(lambda w: w.square().sum(-1).sqrt())
    for penalty in (joint, rows):
        assert not penalty.in_metric(params)
        with pytest.raises(ValueError, match=r"in a metric: it couples entries.*give @penalty a metric= rule"):
            penalty.prox(params, 0.1, metric=ones)
        tx = fr.prox_adam(0.1, penalty)  # One number for all that may be coupled.
        tx.update(params, tx.init(params), params)
    assert huber.in_metric(params, 0.5)
    tx = fr.prox_adam(0.1, huber, 0.5)  # One term an entry: separable, so the metric comes for free.
    tx.update(params, tx.init(params), params)


def test_clipping_at_norm_zero_is_not_nan():
    zero = {"w": torch.zeros(2)}
    for tx in (
        fr.clip_by_global_norm(0.0),
        fr.clip_by_global_norm(1.0),
        fr.clip_by_block_rms(1.0),
        fr.scale_by_trust_ratio(),
    ):
        assert not flat(tx.update(zero, tx.init(zero), zero)[0]).any()
    bad = {"w": torch.tensor([float("nan"), 1.0])}
    assert flat(fr.clip_by_global_norm(1.0).update(bad, fr.EmptyState(), bad)[0]).isnan().all()


def test_the_trust_ratio_may_be_beyond_the_range_of_float32():
    params, grads = {"w": torch.tensor(40.0), "v": torch.tensor([3.0, 4.0])}, {"w": torch.tensor(1e-38)}
    grads["v"] = torch.tensor([0.6e-37, -0.8e-37])
    tx = fr.scale_by_trust_ratio(trust_coefficient=100.0)
    expected = {"w": torch.tensor(4000.0), "v": torch.tensor([300.0, -400.0])}
    assert_equal(tx.update(grads, tx.init(params), params)[0], expected, rtol=1e-6)


def test_zeros_survive_in_every_dtype_also_where_gradients_have_another():
    for own, other in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float16, torch.float16),
    ):
        params = {"w": torch.randn(1000).to(own)}
        grads = {"w": torch.randn(1000).to(other)}
        for tx in (
            fr.chain(fr.scale(-0.1), fr.soft_threshold(0.5)),
            fr.prox_sgd(0.1, fr.l1, strength=5.0),
            fr.prox_adam(0.1, fr.l1, strength=5.0),
            fr.fista(0.1, fr.l1, strength=5.0),
        ):
            updates, _ = tx.update(grads, tx.init(params), params)
            after = fr.apply_updates(params, updates)
            reached = fr.tree_map(lambda w, g: w.float() - 0.1 * g.float(), params, grads)
            assert after["w"].dtype == own
            if not fr.tree_leaves(tx.init(params)):
                assert not after["w"][reached["w"].abs() < 0.49].any()
            assert (after["w"] == 0).any()
            assert not torch.signbit(after["w"][after["w"] == 0]).any()


def test_hyperparameters_may_be_trees_with_schedules_among_their_leaves():
    params, grads = draw(), draw(1)
    decay = {
        "head": 0.1,
        "body": {"filters": lambda count: 0.2 / (count + 1), "scale": torch.tensor(0.3, dtype=torch.float64)},
    }
    tx = fr.add_decayed_weights(decay)
    state = tx.init(params)
    for n in range(2):
        updates, state = tx.update(grads, state, params)
        for strength, part in ((0.1, "head"), (0.2 / (n + 1), "filters"), (0.3, "scale")):
            pick = (lambda t: t["head"]) if part == "head" else (lambda t, part=part: t["body"][part])
            expected = fr.tree_map(lambda g, w, s=strength: g + s * w, pick(grads), pick(params))
            assert_equal(pick(updates), expected, rtol=1e-6)
    tx = fr.sgd({"head": 0.1, "body": 0.0})
    assert not flat(tx.update(grads, tx.init(params), params)[0]["body"]).any()
    tx = fr.chain(fr.masked(fr.add_decayed_weights(decay), HEAD), fr.freeze({"head": False, "body": True}))
    assert not flat(tx.update(grads, tx.init(params), params)[0]["body"]).any()


def test_apply_if_finite_skips_until_it_has_skipped_enough():
    tx, params = fr.apply_if_finite(fr.trace(0.5), 2), {"w": torch.zeros(2)}
    state = tx.init(params)
    bad = {"w": torch.tensor([float("nan"), 1.0])}
    good = {"w": torch.ones(2)}
    _, state = tx.update(good, state, params)
    for n in (1, 2):
        updates, state = tx.update(bad, state, params)
        assert not updates["w"].any()
        assert (state.notfinite_count, state.last_finite) == (n, False)
        assert torch.equal(state.inner_state.trace["w"], torch.ones(2))
    updates, state = tx.update(bad, state, params)
    assert updates["w"][0].isnan()
    assert state.total_notfinite == 3


def test_bfloat16_decay_is_not_lost_in_the_moments():
    tx, params = fr.scale_by_adam(), {"w": torch.ones(1, dtype=torch.bfloat16)}
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update({"w": torch.full((1,), 1.0, dtype=torch.bfloat16)}, state, params)
    assert state.nu["w"].dtype == torch.float32
    torch.testing.assert_close(state.nu["w"], torch.tensor([1 - 0.999**3]), rtol=1e-4, atol=0)
    narrow = fr.scale_by_adam(mu_dtype=torch.bfloat16).init({"w": torch.ones(1)})
    assert (narrow.mu["w"].dtype, narrow.nu["w"].dtype) == (torch.bfloat16, torch.float32)


def test_absent_leaves_are_nodes_without_leaves():
    assert fr.tree_leaves({"a": ABSENT, "b": 1}) == [1]
    assert fr.tree_map(lambda x: x + 1, {"a": ABSENT, "b": 1}) == {"a": ABSENT, "b": 2}


def test_nan_in_a_gradient_is_not_hidden_by_signs():
    bad = {"w": torch.tensor([float("nan"), 1.0])}
    for tx in (fr.scale_by_sign(), fr.scale_by_lion(), fr.scale_by_lion(mode="refined"), fr.lion(0.1)):
        updates, _ = tx.update(bad, tx.init(bad), {"w": torch.ones(2)})
        assert updates["w"].isnan().tolist() == [True, False]


@pytest.mark.parametrize("make", [lambda mask: mask, lambda mask: lambda params: mask], ids=["tree", "function"])
def test_a_mask_for_all_leaves_may_be_given_where_some_are_frozen(make):
    params = {name: torch.ones(2) for name in ("a", "b", "c")}
    tx = fr.chain(
        fr.add_decayed_weights(0.5, mask=make({"a": True, "b": False, "c": True})),
        fr.partition({"x": fr.sgd(1.0), "y": fr.sgd(2.0)}, make({"a": "x", "b": "y", "c": "y"})),
        fr.freeze({"a": False, "b": False, "c": True}),
    )
    updates, _ = tx.update(params, tx.init(params), params)
    assert_equal(updates, {"a": torch.full((2,), -1.5), "b": torch.full((2,), -2.0), "c": torch.zeros(2)})
    lost = make({"a": True, "b": False, "d": True})
    with pytest.raises(ValueError, match="'d', unknown to the parameters"):
        fr.chain(fr.add_decayed_weights(0.5, mask=lost), fr.freeze({"a": False, "b": False, "c": True})).init(params)


def test_freeze_inside_an_ensemble_holds_in_the_outer_chain():
    params = {"a": torch.ones(2, 3), "h": torch.ones(2, 3)}
    make = lambda rate: fr.chain(fr.freeze({"a": True, "h": False}), fr.scale(rate))
    tx = fr.chain(fr.ensemble(make, torch.tensor([0.1, 0.2])), fr.add_decayed_weights(0.1))
    updates, _ = tx.update(params, tx.init(params), params)
    assert not updates["a"].any()
    assert updates["h"].all()


@every_differentiable_transform
def test_steps_are_differentiable_where_a_gradient_is_zero(case):
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    loss = lambda p: (x @ p["w"] - 1).square().mean()

    def trained(factor):
        params = {"w": torch.tensor([[0.5], [0.7]], dtype=torch.float64)}
        tx = case.make(factor)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grad(loss)(params), state, params)
            params = fr.apply_updates(params, updates)
        return loss(params)

    assert grad(trained)(torch.tensor(0.9, dtype=torch.float64)).isfinite()


@pytest.mark.filterwarnings("ignore:centralize makes every update")  # Of matrices of one column.
@every_transform
def test_state_keeps_its_dtype_when_gradients_and_hyperparameters_are_wider(case):
    for shape in ((), (3,)):
        params = {"w": torch.ones(shape), "m": torch.ones(2, 1)}  # A mask by dimensions chooses one.
        grads = fr.tree_map(lambda w: torch.full_like(w, 0.5, dtype=torch.float64), params)
        tx = case.make(torch.tensor(0.9, dtype=torch.float64))
        state = tx.init(params)
        _, after = tx.update(grads, state, params)
        assert [x.dtype for x in fr.tree_leaves(after)] == [x.dtype for x in fr.tree_leaves(state)]


# What a transform is besides its functions: text, a pickle, a state that goes through files


def step(tx):
    """Updates and state of a first and a second step."""
    params = draw()
    _, state = tx.update(draw(1), tx.init(params), params)
    return tx.update(draw(2), state, params)


@every_transform
def test_a_copy_of_a_transform_makes_the_same_updates(case):
    tx = case.make()
    twin = copy.deepcopy(tx)
    assert repr(twin) == repr(tx)
    assert_equal(step(twin), step(tx))


@every_transform
def test_a_transform_goes_through_pickle_unless_it_was_given_a_function_without_a_name(case):
    tx = case.make()
    if "<lambda>" in repr(tx):
        with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
            pickle.dumps(tx)
        return
    twin = pickle.loads(pickle.dumps(tx))
    assert repr(twin) == repr(tx)
    assert_equal(step(twin), step(tx))


@every_transform
def test_a_transform_prints_as_it_was_written(case, request):
    tx = case.make()
    assert re.fullmatch(r"[A-Za-z_0-9]+\(.*\)", repr(tx))
    assert " at 0x" not in repr(tx)
    if "<lambda>" not in repr(tx):
        own = {"torch": torch, "tensor": torch.tensor, "global_norm": joint}
        twin = eval(repr(tx), {**vars(cases), **vars(fr), **own})
        assert type(twin) is type(tx)
        assert isinstance(twin, fr.Transform)
        assert repr(twin) == repr(tx)
        assert_equal(step(twin), step(tx))


@every_transform
def test_a_state_goes_through_a_file_with_the_defaults_of_torch(case, tmp_path):
    _, state = step(case.make())
    torch.save(state, tmp_path / "state.pt")
    with torch.serialization.safe_globals([Layer]):  # A type of the parameters, which its user tells torch.
        loaded = torch.load(tmp_path / "state.pt")
    for again in (loaded, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert type(again) is type(state)
        assert repr(again) == repr(state)
        assert_equal(again, state)


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("funcreg.adam_family", fr.scale_by_adam),
        ("funcreg.scaling", lambda: fr.trace(0.9)),
        ("funcreg.proximal", lambda: fr.prox_sgd(0.1, fr.l1)),
    ],
)
def test_a_state_is_read_from_a_file_that_knows_its_type_by_a_module(module, make, tmp_path, monkeypatch):
    state = make().init({"w": torch.ones(3, device=DEVICE)})
    with monkeypatch.context() as patch:  # Where it was when the file was written.
        patch.setitem(sys.modules, module, types.SimpleNamespace(**{type(state).__name__: type(state)}))
        patch.setattr(type(state), "__module__", module)
        torch.save(state, tmp_path / "state.pt")
    assert module.encode() in (tmp_path / "state.pt").read_bytes()
    loaded = torch.load(tmp_path / "state.pt")
    assert type(loaded) is type(state)
    assert_equal(loaded, state)


def test_a_transform_of_a_users_own_prints_its_functions():
    def climb(updates, state, params):
        return updates, state

    tx = fr.Transform(fr.init_empty_state, climb)
    assert re.fullmatch(r"Transform\(init=init_empty_state, update=test_a.*climb\)", repr(tx))
    assert repr(fr.chain(tx, fr.scale(2.0))) == f"chain({tx!r}, scale(2.0))"
    assert copy.deepcopy(tx)._update is climb


#: The types of the states of all transforms, each with an example of its own.
STATES = """
    fr.AdadeltaState fr.AdamState fr.AdanState fr.AddNoiseState fr.AdemamixState fr.AmsgradState fr.AnchorState
    fr.ApplyEveryState fr.ApplyIfFiniteState fr.BacktrackingLinesearchInfo fr.BeliefState fr.ConditionallyMaskState
    fr.ConditionallyTransformState fr.DifferentiallyPrivateAggregateState fr.DualAveragingState fr.EmaState
    fr.EmptyState fr.FactoredState fr.FistaState fr.FtrlState fr.InjectHyperparamsState fr.LbfgsState fr.LionState
    fr.LookaheadState fr.MaskedState fr.MasterWeightsState fr.MonitorState fr.MultiStepsState fr.MuonState
    fr.NovogradState fr.OptimisticGradientState fr.PartitionState fr.ProximalState fr.ReduceLROnPlateauState
    fr.RmsState fr.RpropState fr.RssState fr.SAMState fr.SM3State fr.ScaleByBacktrackingLinesearchState
    fr.ScaleByZoomLinesearchState fr.ScheduleFreeState fr.ScheduleState fr.SimplifiedAdemamixState fr.SnapshotState
    fr.StddevState fr.StochasticRoundingState fr.TraceState fr.WeighedTraceState fr.ZeroNansState fr.ZoomLinesearchInfo
"""


def types_within(state):
    inside = state.values() if isinstance(state, dict) else state if isinstance(state, (tuple, list)) else ()
    own = {type(state)} if type(state).__module__.startswith("funcreg") and type(state) is not type(ABSENT) else set()
    return own.union(*map(types_within, inside))


@cpu_only
def test_the_types_of_all_states_are_known_and_documented():
    found = set().union(*(types_within(case.make().init(draw())) for case in TRANSFORMS.values()))
    assert sorted(f"fr.{state.__name__}" for state in found) == STATES.split()
    for state in found:
        assert (state.__module__, getattr(fr, state.__name__)) == ("funcreg", state)  # As files know it.
        example = doctest.DocTestParser().get_doctest(
            inspect.getdoc(state), {"torch": torch, **vars(fr)}, state.__name__, None, 0
        )
        assert example.examples
        assert not doctest.DocTestRunner().run(example).failed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda d: fr.scale_by_adam(mu_dtype=d),
        lambda d: fr.trace(0.9, accumulator_dtype=d),
        lambda d: fr.schedule_free_sgd(0.1, state_dtype=d),
    ],
)
def test_moments_of_complex_leaves_keep_their_imaginary_parts_in_a_real_dtype(make, dtype):
    params, grads = {"w": torch.ones(2, dtype=torch.complex64)}, {"w": torch.tensor([1j, 1 + 1j])}
    moved = []
    for tx in (make(dtype), make(None)):
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
        moved.append(updates["w"])
    assert torch.allclose(*moved, rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda d: fr.scale_by_adam(mu_dtype=d),
        lambda d: fr.trace(0.9, accumulator_dtype=d),
        lambda d: fr.schedule_free_sgd(0.1, state_dtype=d),
    ],
)
def test_moments_of_real_leaves_stay_real_in_a_complex_dtype(make):
    params = {"w": torch.ones(2, dtype=torch.bfloat16), "z": torch.ones(2, dtype=torch.complex64)}
    grads = {"w": torch.ones(2, dtype=torch.bfloat16), "z": torch.tensor([1j, 1 + 1j])}
    ends = []
    for tx in (make(torch.complex64), make(torch.float32)):
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
        ends.append((updates, state))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def with_counters(state, count):
    """A state with another number of steps in its counters."""
    return fr.tree_map(lambda x: torch.full_like(x, count) if x.dtype == torch.int32 and not x.ndim else x, state)


@pytest.mark.parametrize("name", [
    "adam", "adamw", "nadamw", "adamax", "adabelief", "adan", "amsgrad", "lamb", "radam", "ademamix", "sgd scheduled",
])  # fmt: skip
def test_counters_do_not_become_negative(name):
    make = getattr(fr, name, None)
    tx = fr.sgd(fr.linear_schedule(0.1, 0.01, 10)) if make is None else make(1e-2)
    params, before = draw(), tx.init(draw())
    for n in range(2):
        _, before = tx.update(draw(n), before, params)
    last = torch.iinfo(torch.int32).max
    updates, after = tx.update(draw(2), with_counters(before, last), params)
    expected, _ = tx.update(draw(2), with_counters(before, last - 1), params)
    assert_equal(updates, expected, rtol=1e-6, atol=1e-12)
    assert all([int(x) == last for x in fr.tree_leaves(after) if x.dtype == torch.int32 and not x.ndim])
