"""The fused step: what compiles, what donation does, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases import assert_equal, draw
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

import funcreg as fr


def adamw_chain():
    return fr.chain(
        fr.clip_by_global_norm(1.0),
        fr.scale_by_adam(),
        fr.add_decayed_weights(1e-2, mask=fr.matrices),
        fr.scale_by_learning_rate(fr.warmup_cosine_decay_schedule(0.0, 0.1, 2, 10)),
        fr.soft_threshold(fr.linear_schedule(0.01, 0.0, 10)),
    )


def small(seed=0, dtype=torch.float32):
    """A tree small enough for the real compiler."""
    return {name: draw(seed, dtype)["head"]._asdict()[name] for name in ("weight", "bias")}


COMPILED = {
    "adamw with threshold": adamw_chain,
    "prox_adam of groups": lambda: fr.prox_adam(0.1, fr.group_lasso, strength=0.5),
    "fista": lambda: fr.fista(0.1, fr.l1, strength=0.5),
    "lamb, partly frozen": lambda: fr.chain(fr.lamb(0.1), fr.freeze(fr.select("bias"))),
}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "donate"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
@pytest.mark.parametrize("make", COMPILED.values(), ids=COMPILED)
def test_inductor_computes_what_eager_code_does(make, dtype, donate):
    step = fr.fuse(make(), donate=donate)
    params, state = step.init(small(dtype=dtype))
    expected, eager = small(dtype=dtype), make().init(small(dtype=dtype))
    for n in range(3):
        grads = small(n + 1, dtype)
        updates, eager = make().update(grads, eager, expected)
        expected = fr.apply_updates(expected, updates)
        params, state = step(params, grads, state)
    tolerance = {"rtol": 2e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 1e-2}
    assert_equal((params, state), (expected, eager), **tolerance)
    if dtype == torch.float32:
        assert_equal(fr.tree_map(lambda w: w == 0, params), fr.tree_map(lambda w: w == 0, expected))


@pytest.mark.slow
def test_an_ensemble_compiles_into_one_step():
    strengths = torch.tensor([0.1, 0.5, 2.0])
    step = fr.fuse(fr.ensemble(lambda s: fr.prox_adam(0.1, fr.l1, strength=s), strengths), donate=True)
    members = [small(seed) for seed in range(3)]
    stack = lambda trees: fr.tree_map(lambda *leaves: torch.stack(leaves), *trees)
    params, state = step.init(stack(members))
    alone = [fr.prox_adam(0.1, fr.l1, strength=float(s)) for s in strengths]
    states = [tx.init(member) for tx, member in zip(alone, members, strict=True)]
    for n in range(3):
        grads = [small(10 * n + i) for i in range(3)]
        params, state = step(params, stack(grads), state)
        for i, tx in enumerate(alone):
            updates, states[i] = tx.update(grads[i], states[i], members[i])
            members[i] = fr.apply_updates(members[i], updates)
    assert_equal(params, stack(members), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("donate", [False, True])
def test_one_compilation_serves_a_whole_schedule(donate):
    counter = CompileCounterWithBackend("aot_eager")
    step = fr.fuse(adamw_chain(), donate=donate, backend=counter)
    params, state = step.init(draw())
    params, state = step(params, draw(), state)
    compiled = counter.frame_count
    for n in range(12):
        params, state = step(params, draw(n), state)
    assert counter.frame_count == compiled > 0


def test_hyperparameters_held_as_tensors_compile_nothing_anew():
    rate, strength = torch.tensor(0.1), torch.tensor(0.5)
    counter = CompileCounterWithBackend("aot_eager")
    step = fr.fuse(fr.prox_sgd(rate, fr.l1, strength=strength), backend=counter)
    params, state = step.init(draw())
    compiled = []
    for factor in (1.0, 0.5, 0.25):
        rate.fill_(0.1 * factor), strength.fill_(factor)
        expected, _ = (tx := fr.prox_sgd(0.1 * factor, fr.l1, strength=factor)).update(draw(1), tx.init(params), params)
        after, state = step(params, draw(1), state)
        assert_equal(after, fr.apply_updates(params, expected), rtol=1e-6, atol=1e-7)
        compiled.append(counter.frame_count)
    assert compiled[0] == compiled[-1] > 0


def test_many_steps_live_side_by_side():
    for rate in range(1, 12):
        step = fr.fuse(fr.sgd(float(rate)), backend="eager")
        params, state = step.init({"w": torch.ones(2)})
        params, state = step(params, {"w": torch.ones(2)}, state)
        assert_equal(params, {"w": torch.full((2,), 1.0 - rate)})


def test_donation_writes_in_place_and_keeps_nothing():
    step = fr.fuse(adamw_chain(), donate=True, backend="aot_eager")
    params, state = step.init(draw())
    grads = draw(1)
    places = [leaf.data_ptr() for leaf in fr.tree_leaves((params, state))]
    after, new = step(params, grads, state)
    assert after is params
    assert new is state
    assert places == [leaf.data_ptr() for leaf in fr.tree_leaves((after, new))]
    assert_equal(grads, draw(1))


def test_without_donation_arguments_stay_as_they_were():
    step = fr.fuse(adamw_chain(), backend="aot_eager")
    params, state = step.init(draw())
    step(params, draw(1), state)
    assert_equal((params, state), fr.fuse(adamw_chain()).init(draw()))


def test_init_gives_copies_of_its_own():
    model = torch.nn.Linear(3, 2)
    params, _ = fr.fuse(fr.sgd(0.1), donate=True).init(dict(model.named_parameters()))
    assert not any(leaf.requires_grad for leaf in params.values())
    assert params["weight"].data_ptr() != model.weight.data_ptr()
    tied = torch.ones(2)
    params, _ = fr.fuse(fr.sgd(0.1), donate=True).init({"a": tied, "b": tied, "c": tied.expand(3, 2)})
    assert len({leaf.data_ptr() for leaf in params.values()}) == 3


def test_donation_refuses_what_it_cannot_do_and_changes_nothing():
    step = fr.fuse(fr.chain(fr.trace(0.9), fr.scale(-0.1)), donate=True, backend="eager")
    state = step.init({"a": torch.ones(2), "b": torch.ones(2)})[1]
    grads = {"a": torch.ones(2), "b": torch.ones(2)}
    tied = torch.ones(2)
    with pytest.raises(ValueError, match=r"params 'a' and params 'b' share memory"):
        step({"a": tied, "b": tied}, grads, state)
    long = torch.ones(4)
    with pytest.raises(ValueError, match="share memory"):
        step({"a": long[:2], "b": long[1:3]}, grads, state)
    with pytest.raises(ValueError, match=r"params 'b' requires grad.*step.init"):
        step({"a": tied, "b": torch.ones(2, requires_grad=True)}, grads, state)
    with pytest.raises(ValueError, match="expanded"):
        step({"a": tied, "b": torch.ones(1).expand(2)}, grads, state)
    with pytest.raises(ValueError, match=r"grads 'a' shares memory with params or state"):
        step({"a": tied, "b": torch.ones(2)}, {"a": tied, "b": torch.ones(2)}, state)
    with pytest.raises(ValueError, match=r"grads 'b' has shape \(3,\); expected \(2,\)"):
        step({"a": tied, "b": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(3)}, state)
    assert torch.equal(tied, torch.ones(2))
    assert_equal(state, step.init({"a": torch.ones(2), "b": torch.ones(2)})[1])
    halves = {"a": long[:2], "b": long[2:]}  # Views of one buffer that do not overlap are good.
    step(halves, grads, state)
    assert_equal(halves, {"a": torch.full((2,), 0.9), "b": torch.full((2,), 0.9)}, rtol=1e-6)


def test_a_state_of_another_chain_is_refused():
    step = fr.fuse(fr.chain(fr.trace(0.9), fr.scale(-0.1)), backend="eager")
    params, state = step.init({"w": torch.ones(2)})
    with pytest.raises(Exception, match="Was it made by this chain's init"):
        step(params, {"w": torch.ones(2)}, (*state, ()))
    with pytest.raises(TypeError, match=r"fuse got a function; expected a Transform"):
        fr.fuse(fr.sgd)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("make", [
    fr.scale_by_adam,
    lambda: fr.chain(fr.clip_by_global_norm(1.0), fr.scale_by_adam(), fr.add_decayed_weights(0.01)),
    lambda: fr.chain(fr.scale_by_rms(), fr.soft_threshold(0.1)),
])  # fmt: skip
def test_a_chain_that_goes_uphill_is_told(make):
    with pytest.warns(UserWarning, match=r"fuse got .* uphill\. End it with scale_by_learning_rate"):
        fr.fuse(make(), backend="eager")


@pytest.mark.parametrize("make", [
    lambda: fr.chain(fr.scale_by_adam(), fr.scale(-0.1)),
    lambda: fr.chain(fr.scale_by_adam(), fr.scale_by_schedule(lambda n: -0.1)),
    lambda: fr.chain(fr.scale_by_adam(), fr.stateless(lambda updates, params: fr.tree_map(torch.neg, updates))),
    lambda: fr.masked(fr.adamw(0.1), fr.matrices),
    lambda: fr.inject_hyperparams(fr.adamw)(learning_rate=0.1),
    fr.set_to_zero,
    lambda: fr.Transform(lambda params: (), lambda updates, state, params: (updates, state)),
])  # fmt: skip
def test_a_chain_that_goes_downhill_or_that_nobody_knows_is_not(make):
    fr.fuse(make(), backend="eager")


def test_steps_record_no_history_also_for_parameters_that_require_grad():
    model = torch.nn.Linear(3, 2)
    step = fr.fuse(fr.sgd(0.1), backend="aot_eager")
    params = dict(model.named_parameters())
    after, _ = step(params, {name: torch.ones_like(w) for name, w in params.items()}, fr.sgd(0.1).init(params))
    assert not any(leaf.requires_grad for leaf in after.values())


def test_inside_vmap_and_grad_a_step_is_its_plain_functions():
    step, params = fr.fuse(fr.sgd(0.1)), torch.ones(3, 2)
    state = step.init(params)[1]
    after = vmap(lambda w: step(w, 2 * w, state)[0])(params)
    assert_equal(after, torch.full((3, 2), 0.8), rtol=1e-6)
    assert_equal(grad(lambda w: step(w, 2 * w, state)[0].sum())(params), torch.full((3, 2), 0.8), rtol=1e-6)
    with pytest.raises(ValueError, match=r"inside vmap or grad.*ensemble"):
        vmap(lambda w: fr.fuse(fr.sgd(0.1), donate=True)(w, w, state)[0])(params)


def test_training_may_be_differentiated_through_with_the_plain_functions():
    tx, x = fr.adam(0.1), torch.randn(20, 3, dtype=torch.float64)
    loss = lambda p: (x @ p["w"]).square().mean()

    def trained(decay):
        params = {"w": torch.ones(3, dtype=torch.float64)}
        state = tx.init(params)
        for _ in range(3):
            slope = grad(lambda p: loss(p) + decay * fr.half_l2(p))(params)
            updates, state = tx.update(slope, state, params)
            params = fr.apply_updates(params, updates)
        return loss(params)

    at = torch.tensor(0.5, dtype=torch.float64)
    numeric = (trained(at + 1e-6) - trained(at - 1e-6)) / 2e-6
    torch.testing.assert_close(grad(trained)(at), numeric, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(vmap(trained)(torch.stack([at, 2 * at])), torch.stack([trained(at), trained(2 * at)]))


@pytest.mark.slow
def test_memory_does_not_grow_over_donated_steps():
    code = """
import resource, torch, funcreg as fr
step = fr.fuse(fr.adamw(1e-3), donate=True, backend="aot_eager")
params, state = step.init({"w": torch.zeros(1000, 1000)})
grads = {"w": torch.ones(1000, 1000)}
for _ in range(5):
    params, state = step(params, grads, state)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(10):
    params, state = step(params, grads, state)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 8000  # Kilobytes: two tensors of this size.


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    ("tx", "state", "message"),
    [
        (fr.adam(0.1), fr.sgd(0.1, 0.9), "Was it made by"),
        (fr.prox_sgd(0.1, fr.l1, strength={"w": 1.0}), fr.prox_sgd(0.1, fr.l1), "lacks 'b'"),
        (fr.prox_sgd(0.1, fr.l1, mask=fr.select("x*")), fr.prox_sgd(0.1, fr.l1), "matches no leaf"),
        (fr.prox_sgd(0.1, fr.group_lasso, dim=1), fr.prox_sgd(0.1, fr.l1), "at leaf 'b': dim=1"),
    ],
)
def test_what_is_wrong_is_said_as_in_eager_code_and_changes_nothing(tx, state, message, donate):
    params = {"w": torch.ones(4, 5), "b": torch.ones(4)}
    before = fr.tree_map(torch.clone, params)
    with pytest.raises(ValueError, match=message):
        fr.fuse(tx, donate=donate, backend="aot_eager")(params, fr.tree_map(torch.clone, params), state.init(params))
    assert_equal(params, before)


def test_donation_refuses_entries_that_overlap_and_leaves_that_came_to_require_grad():
    step = fr.fuse(fr.sgd(0.1), donate=True, backend="eager")
    with pytest.raises(ValueError, match="share memory"):
        step(torch.randn(10).as_strided((3, 3), (1, 1)), torch.ones(3, 3), step.init(torch.ones(3, 3))[1])
    params, state = step.init({"w": torch.ones(2, 3).T})
    params, state = step(params, {"w": torch.ones(3, 2)}, state)
    params["w"].requires_grad_(True)
    with pytest.raises(ValueError, match="requires grad"):
        step(params, {"w": torch.ones(3, 2)}, state)


def test_a_donating_step_inside_compiled_code_writes_into_what_it_was_given():
    tx, data = fr.prox_sgd(0.1, fr.l1, strength=0.2), draw(1, torch.float32)
    step = fr.fuse(tx, donate=True, backend="eager")
    params, state = step.init(draw(0, torch.float32))
    expected, plain = fr.tree_map(torch.clone, params), tx.init(params)
    held = fr.tree_leaves(params)
    whole = torch.compile(lambda p, g, s: step(p, g, s), backend="eager", fullgraph=True)
    for _ in range(2):
        updates, plain = tx.update(data, plain, expected)
        expected = fr.apply_updates(expected, updates)
        params, state = whole(params, data, state)
    assert all(a is b for a, b in zip(held, fr.tree_leaves(params), strict=True))
    assert_equal((params, state), (expected, plain), atol=1e-6)


def test_gradients_of_a_part_that_nothing_was_written_into_are_said():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    frozen = fr.chain(fr.sgd(0.1), fr.freeze(fr.select("1.bias")))
    step = fr.fuse(frozen, donate=True, backend="eager")
    params, state = step.init(dict(model.named_parameters()))
    gradients = step.gradients(params)
    for _ in range(2):
        for name, g in gradients.items():
            if name != "1.bias":  # It stays where it is whatever its gradient.
                g.fill_(1.0)
        params, state = step(params, gradients, state)
    gradients["1.weight"].fill_(1.0)
    params, state = step(
        params, gradients, state
    )  # Numbers may have been written past torch: noted, and compared next.
    gradients["1.weight"].fill_(1.0)
    with pytest.warns(UserWarning, match=r"at 0.bias, 0.weight since the last step.*set_to_none=False"):
        step(params, gradients, state)


def test_extra_arguments_that_are_objects_are_read_at_every_step():
    def update(updates, state, params, loss):
        return fr.tree_map(lambda u: -loss(u), updates), state

    step = fr.fuse(fr.Transform(lambda params: (), update), donate=True, backend="eager")
    params, grads = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    with pytest.warns(UserWarning, match="an extra argument is a function"):
        step(params, grads, (), loss=lambda u: u)
    for rate in (2.0, 3.0):
        step(params, grads, (), loss=lambda u, rate=rate: rate * u)
    assert params["w"] == -6


@pytest.mark.parametrize("given", [{"donate": "no"}, {"donate": None}, {"backend": 3}])
def test_options_of_the_wrong_kind_are_refused(given):
    (name,) = given
    with pytest.raises(TypeError, match=f"{name} is"):
        fr.fuse(fr.sgd(0.1), **given)
