"""The fused step where memory, threads and modes are unusual: the numbers of the plain functions, or an error."""

from __future__ import annotations

import copy
import gc
import math
import threading
import warnings
import weakref
from collections import OrderedDict, defaultdict
from typing import NamedTuple

import pytest
import torch
from cases import DEVICE, normal
from torch.autograd import forward_ad

import funcreg as fr
from funcreg.fused import plan as plans

#: Links of a chain are fused here by themselves.
pytestmark = pytest.mark.filterwarnings("ignore:fuse got .* steps go uphill")


def plain(tx, params, grads, state, **extra):
    """The plain functions, on copies."""
    params, grads, state = copy.deepcopy((params, grads, state))
    updates, state = tx.update(grads, state, params, **extra)
    return fr.apply_updates(params, updates), state


def check(tx, step, params, grads, state, **extra):
    """One step, compared with the plain functions."""
    expected = plain(tx, params, grads, state, **extra)
    results = step(params, grads, state, **extra)
    for x, y in zip(fr.tree_leaves(results), fr.tree_leaves(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    return results


def square(value=1.0):
    return {"a": torch.arange(9.0).reshape(3, 3) * value, "b": torch.full((3, 3), value)}


# Numbers


@pytest.mark.parametrize("first", ["foreign", "packed"])
def test_packed_gradients_where_the_first_buffer_has_one_entry(first, monkeypatch):
    monkeypatch.setattr(plans, "SEPARATE", {"cpu": (13, 20)})
    tx = fr.trace(0.5)
    step = fr.fuse(tx, donate=True)
    params, state = step.init({"a": torch.ones(1), "b": torch.ones(40), "c": torch.ones(50)})
    if first == "foreign":
        params, state = check(tx, step, params, fr.tree_map(torch.ones_like, params), state)
    mine = step.gradients(params)
    fr.tree_map(lambda g: g.fill_(2.0), mine)
    check(tx, step, params, mine, state)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_call_without_extra_arguments_after_one_with_them(backend):
    tx = fr.Transform(
        fr.init_empty_state, lambda u, s, p, *, neg=False: (fr.tree_map(lambda x: -x if neg else x, u), s)
    )
    step = fr.fuse(tx, backend=backend)
    params, state = step.init({"w": torch.zeros(3)})
    grads = {"w": torch.ones(3)}
    params, state = step(params, grads, state, neg=True)
    check(tx, step, params, grads, state)


def test_a_call_without_a_tensor_that_the_last_call_had():
    tx = fr.Transform(fr.init_empty_state, lambda u, s, p, *, value=1.0: (fr.tree_map(lambda x: x * value, u), s))
    step = fr.fuse(tx, backend="eager")
    params, state = step.init({"w": torch.zeros(3)})
    grads = {"w": torch.ones(3)}
    params, state = step(params, grads, state, value=2.0)
    check(tx, step, params, grads, state)


@pytest.mark.parametrize("donate", [False, True])
def test_moments_that_swap_their_memory(donate):
    tx = fr.trace(0.9)
    step = fr.fuse(tx, donate=donate, backend="eager")
    params, state = step.init(square())
    for _ in range(3):
        params, state = step(params, square(), state)
    moment = state.trace
    moment["a"].data, moment["b"].data = moment["b"].data, moment["a"].data
    check(tx, step, params, square(), state)


class Layer(NamedTuple):
    weight: object
    bias: object


FORMS = {
    "leaf": lambda a, b, c: a,
    "tuple": lambda a, b, c: (a, b, c),
    "pair": lambda a, b, c: (a, b),
    "list": lambda a, b, c: [a, [b], (), c],
    "named tuple": lambda a, b, c: Layer(a, Layer(b, c)),
    "dict": lambda a, b, c: {"z": a, "a": {"z": b, "a": (c,)}, "none": None},
    "ordered dict": lambda a, b, c: OrderedDict(z=a, a=[b], m=c),
    "default dict": lambda a, b, c: defaultdict(list, z=a, a=[b], m=c),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_trees_of_every_form_are_results_that_never_change(form):
    tx = fr.chain(fr.scale_by_adam(), fr.scale(-0.1))
    step = fr.fuse(tx, backend="eager")
    trees = step.init(form(torch.ones(3), torch.ones(2, 2), torch.tensor(2.0)))
    held = []
    for i in range(12):
        params, state = trees
        grads = fr.tree_map(lambda w, i=i: torch.full_like(w, i - 3.0), params)
        new = check(tx, step, params, grads, state)
        assert fr.tree_map(type, new) == fr.tree_map(type, trees)
        if i % 3:
            held.append((new, copy.deepcopy(new)))
        if i % 5 == 4:
            held.append((params, copy.deepcopy(params)))
            del held[0]
        trees = new
        del params, state
    for found, before in held:
        fr.tree_map(lambda x, y: torch.testing.assert_close(x, y, rtol=0, atol=0), found, before)


def test_what_callers_do_to_trees_stays_theirs():
    tx = fr.trace(0.5)
    step = fr.fuse(tx, backend="eager")
    grads = {"a": torch.ones(3), "b": {"c": torch.ones(2)}}
    params, state = step.init(grads)
    for i in range(6):
        params, state = check(tx, step, params, grads, state)
        if i % 2:
            params["b"]["c"] = torch.full((2,), float(i))
            state.trace["b"] = {"c": torch.full((2,), -float(i))}
        if i == 4:
            params["b"] = dict(reversed([("c", params["b"]["c"])]))
            params = dict(reversed(params.items()))
    with pytest.raises(ValueError, match="new"):
        step({**params, "new": torch.ones(2)}, grads, state)


@pytest.mark.parametrize("donate", [False, True])
def test_a_moment_that_moved_while_a_view_came(donate):
    tx = fr.trace(0.9)
    step = fr.fuse(tx, donate=donate, backend="eager")
    params, state = step.init(square())
    for _ in range(3):
        params, state = step(params, square(), state)
    view = state.trace["a"].detach()
    state.trace["b"].data = torch.full((3, 3), 100.0)
    check(tx, step, params, square(), state)
    del view


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("how", ["data", "t_"])
def test_parameters_that_were_transposed_in_place(donate, how):
    tx = fr.trace(0.9)
    step = fr.fuse(tx, donate=donate, backend="eager")
    params, state = step.init(square())
    for _ in range(3):
        params, state = step(params, square(), state)
    if how == "data":
        params["a"].data = params["a"].data.T
    else:
        params["a"].t_()
    check(tx, step, params, square(), state)


def test_memory_is_not_free_when_a_leaf_left_it_and_a_view_came():
    tx = fr.sgd(0.1)
    step = fr.fuse(tx, backend="eager")
    grads = {"w": torch.ones(4), "b": torch.ones(2)}
    params, state = step.init({"w": torch.zeros(4), "b": torch.zeros(2)})
    params, state = step(params, grads, state)
    params, state = step(params, grads, state)
    held = params["w"].detach()
    before = held.clone()
    params["b"].data = torch.full((2,), 7.0)
    for _ in range(5):
        params, state = check(tx, step, params, grads, state)
    torch.testing.assert_close(held, before)


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("kind", ["untyped_storage", "storage"])
def test_memory_is_not_free_when_somebody_holds_its_storage(kind):
    step = fr.fuse(fr.sgd(0.1), backend="eager")
    params, state = step.init({"w": torch.zeros(4)})
    params, state = step(params, {"w": torch.ones(4)}, state)
    held = getattr(params["w"], kind)()
    before = list(held)
    for _ in range(4):
        params, state = step(params, {"w": torch.ones(4)}, state)
    assert list(held) == before


def test_steps_of_several_threads():
    tx, n, wrong = fr.adam(0.1), 300_000, []
    step = fr.fuse(tx, backend="eager")

    def work(k):
        params, state = step.init({"w": torch.full((n,), float(k)), "b": torch.full((300,), float(k))})
        expected = copy.deepcopy((params, state))
        for i in range(40):
            grads = {"w": torch.full((n,), float(k + i)), "b": torch.full((300,), float(k))}
            params, state = step(params, grads, state)
            expected = plain(tx, expected[0], grads, expected[1])
            if not torch.allclose(params["w"], expected[0]["w"], atol=1e-4):
                wrong.append((k, i))
                return

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("donate", [False, True])
def test_parameters_without_memory_are_named(donate):
    params = {"a": {"b": torch.ones(3, device="meta")}}
    tx = fr.adam(0.1)
    step = fr.fuse(tx, donate=donate, backend="eager")
    for call in (
        lambda: step.init(params),
        lambda: step(params, params, tx.init(params)),
        lambda: fr.value_and_grad(fr.l1, backend="eager")(params),
    ):
        with pytest.raises(ValueError, match=r"leaf 'a\.b' is on the meta device.*to_empty"):
            call()


@pytest.mark.parametrize("donate", [False, True])
def test_arguments_in_the_order_of_update_are_told_that_of_a_step(donate):
    params = {"w": torch.ones(3, device=DEVICE)}
    step = fr.fuse(fr.adam(0.1), donate=donate, backend="eager")
    params, state = step.init(params)
    grads = fr.tree_map(torch.ones_like, params)
    for wrong in [(grads, state, params), (params, state, grads), (state, grads, params)]:
        with pytest.raises(ValueError, match=r"expected step\(params, grads, state\)"):
            step(*wrong)


@pytest.mark.parametrize("donate", [False, True])
def test_a_number_in_a_state_is_told_to_be_a_tensor(donate):
    step = fr.fuse(fr.inject_hyperparams(fr.sgd)(0.5), donate=donate, backend="eager")
    params, state = step.init({"w": torch.ones(3, device=DEVICE)})
    state.hyperparams["learning_rate"] = 0.25
    grads = {"w": torch.ones(3, device=DEVICE)}
    if donate:
        with pytest.raises(TypeError, match=r"'hyperparams.learning_rate' is 0.25; expected a tensor.*torch.tensor"):
            step(params, grads, state)
        state.hyperparams["learning_rate"] = torch.tensor(0.25, dtype=torch.float64, device=DEVICE)
        params, _ = step(params, grads, state)
    else:
        with pytest.warns(UserWarning, match=r"state holds 0.25 where tensors come out; set tensors, or by tree_set"):
            params, _ = step(params, grads, state)
    assert params["w"].tolist() == [0.75] * 3


def test_gradients_that_lie_in_donated_memory_are_refused_at_every_step():

    def update(updates, state, params):
        new = fr.tree_map(lambda s, w: s + w, state, params)
        return fr.tree_map(lambda u: -0.5 * u, updates), new

    tx = fr.Transform(lambda params: fr.tree_map(torch.ones_like, params), update)
    step = fr.fuse(tx, donate=True, backend="eager")
    params, state = step.init({"a": torch.full((30,), 7.0), "b": torch.full((4,), 7.0)})
    for _ in range(2):
        step(params, fr.tree_map(torch.ones_like, params), state)
    with pytest.raises(ValueError, match="shares memory"):
        step(params, state, state)


def test_gradients_that_overlap_donated_memory_are_refused():
    tx = fr.trace(0.9)
    step = fr.fuse(tx, donate=True, backend="eager")
    memory = normal(torch.Generator().manual_seed(0), 600_001, dtype=torch.float32)
    params, grads = {"w": memory[1:]}, {"w": memory[:-1]}
    with pytest.raises(ValueError, match="shares memory"):
        step(params, grads, tx.init(params))


def test_conjugated_views_that_lie_one_after_another():
    memory = torch.complex(torch.arange(8.0), torch.arange(1.0, 9.0))
    params = {"a": memory[:4].conj(), "b": memory[4:]}
    tx = fr.scale(-0.1)
    check(tx, fr.fuse(tx, backend="eager"), params, fr.tree_map(torch.ones_like, params), tx.init(params))


def test_value_and_grad_outside_of_autocast_after_inside():

    @fr.penalty(gradient=lambda w: 4 * (w @ w.T) @ w, proximal=lambda w, step: w)
    def gram(w):
        return (w @ w.T).square().sum()

    params = {"w": normal(torch.Generator().manual_seed(0), 6, 5, dtype=torch.float32)}
    f = fr.value_and_grad(gram, backend="eager")
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        f(params)
    torch.testing.assert_close(f(params), (gram(params), gram.grad(params)))


# Errors where eager code has none


@pytest.mark.parametrize("rule", ["divided", "multiplied"])
def test_scalars_of_another_leaf_may_need_a_conversion(rule):
    if rule == "divided":
        tx = fr.stateless(lambda u, p: {"a": u["a"], "b": u["b"] / p["a"].sum()})
    else:
        tx = fr.stateless(lambda u, p: {"a": u["a"], "b": u["b"] * p["a"].sum()})
    step = fr.fuse(tx, backend="aot_eager")
    dtype = torch.float32 if rule == "divided" else torch.float64
    params, state = step.init({"a": torch.ones(3, dtype=dtype), "b": torch.ones(5)})
    check(tx, step, params, fr.tree_map(torch.ones_like, params), state)


@pytest.mark.parametrize("donate", [False, True])
def test_a_step_after_one_in_inference_mode(donate):
    tx = fr.trace(0.9)
    step = fr.fuse(tx, donate=donate, backend="eager")
    params, state = step.init(square())
    with torch.inference_mode():
        step(params, square(), state)
    check(tx, step, params, square(), state)


def test_init_in_inference_mode_of_a_state_with_counters():
    tx = fr.adam(0.1)
    step = fr.fuse(tx, donate=True, backend="eager")
    with torch.inference_mode():
        params, state = step.init(square())
    step(params, square(), state)


def test_value_and_grad_after_inference_mode():
    f = fr.value_and_grad(fr.l1, backend="eager")
    with torch.inference_mode():
        f(square())
    f(square())


def test_sign_of_dual_tensors():
    with forward_ad.dual_level():
        w = forward_ad.make_dual(torch.tensor([1.0, -2.0]), torch.ones(2))
        torch.testing.assert_close(forward_ad.unpack_dual(fr.l1.grad({"w": w})["w"]).primal, torch.tensor([1.0, -1.0]))


def test_extra_arguments_that_have_no_hash():
    tx = fr.Transform(fr.init_empty_state, lambda u, s, p, *, names: (fr.tree_map(lambda x: x * len(names), u), s))
    step = fr.fuse(tx, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That nothing is compiled.
        params, state = step.init(square(), names={"x", "y"})
        check(tx, step, params, square(), state, names={"x", "y"})


def test_gradients_of_a_chain_that_cannot_be_recorded():
    tx = fr.stateless(lambda u, p: fr.tree_map(lambda x: x * torch.rand_like(x), u))
    step = fr.fuse(tx, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        params, _ = step.init(square())
    assert not any(leaf.any() for leaf in fr.tree_leaves(step.gradients(params)))


# Zeros of the wrong sign


def test_roots_of_minus_zero_plus_zero():
    tx = fr.stateless(lambda u, p: fr.tree_map(lambda u: 1 / (u + 0.0).sqrt(), u))
    step = fr.fuse(tx, backend="eager")
    params, state = step.init({"w": torch.zeros(2)})
    check(tx, step, params, {"w": torch.tensor([-0.0, 0.0])}, state)


def test_zeros_that_where_takes_instead_of_nan():
    tx = fr.stateless(lambda u, p: fr.tree_map(lambda u, w: 1 / torch.where(u != u, u, u * 0 + w), u, p))
    step = fr.fuse(tx, backend="eager")
    params, state = step.init({"w": torch.zeros(20)})
    check(tx, step, params, {"w": torch.full((20,), -0.0)}, state)


# Memory


def test_plans_that_were_let_go_keep_no_memory():
    step = fr.fuse(fr.trace(0.9), donate=True, backend="eager")
    f = fr.value_and_grad(fr.l1, backend="eager")
    for n in range(1, 60):
        step.init({"w": torch.ones(n)})
        f({"w": torch.ones(n)})
    assert len(step._plans) <= 32
    assert len(f._plans) <= 32


def test_a_donating_step_does_not_hold_parameters():
    tx = fr.trace(0.9)
    step = fr.fuse(tx, donate=True, backend="eager")
    params = square()
    state = tx.init(params)
    step(params, square(), state)
    held = weakref.ref(params["a"])
    del params, state
    gc.collect()
    assert held() is None


def test_memory_that_a_leaf_left_is_let_go():
    step = fr.fuse(fr.sgd(0.1), backend="eager")
    params, state = step.init(square())
    for _ in range(20):
        params["a"].data = params["a"].data.clamp(-1, 1)
        params, state = step(params, square(), state)
    (plan,) = step._plans.values()
    assert plan is not None
    (part,) = plan.parts("parameter")
    assert len(part._used) + len(part._free) <= 3


def test_results_have_no_gradients_of_their_past():
    step = fr.fuse(fr.sgd(0.1), backend="eager")
    params, state = step.init(square())
    params, state = step(params, square(), state)
    params["a"].grad = torch.ones(3, 3)
    for _ in range(4):
        params, state = step(params, square(), state)
        assert params["a"].grad is None


def test_gradients_of_penalties_have_no_negative_zeros():
    f = fr.value_and_grad(fr.elastic, 0.7, 0.5, strength=torch.tensor(0.25), backend="eager")
    params = {"w": torch.full((20,), -0.0), "b": torch.full((3,), -0.0)}
    plainly = fr.elastic.grad(params, 0.7, 0.5)
    for name, slope in f(params)[1].items():
        assert torch.equal(torch.signbit(slope), torch.signbit(plainly[name]))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradients_of_penalties_where_numbers_end(backend):
    ends = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 2.0, -3e38, math.inf, -math.inf, math.nan])
    params = {"w": ends.repeat(3), "b": ends[:5], "c": ends.flip(0).view(3, 3)}
    rtol = 0 if torch.device(DEVICE).type == "cpu" else 1e-7  # A GPU rounds a product and a sum together once.
    for penalty, hyper in ((fr.l1, ()), (fr.elastic, (0.5, 0.25)), (fr.huber, (1.0,))):
        _, slopes = fr.value_and_grad(penalty, *hyper, backend=backend)(params)
        for name, expected in penalty.grad(params, *hyper).items():
            torch.testing.assert_close(slopes[name], expected, rtol=rtol, atol=0, equal_nan=True)
            zero = expected == 0
            assert torch.equal(torch.signbit(slopes[name][zero]), torch.signbit(expected[zero]))
        finite = fr.tree_map(lambda w: w.nan_to_num(0.5, 2.0, -2.0), params)
        value, _ = fr.value_and_grad(penalty, *hyper, backend=backend)(finite)
        torch.testing.assert_close(value, penalty(finite, *hyper))


def test_signs_of_nan_that_no_sum_tells():
    careful = lambda w: torch.where(w != w, w, w.sign())
    define = fr.penalty(gradient=careful, proximal=lambda w, step: w)
    quiet, loud = define(lambda w: w.abs().nan_to_num(0.0)), define(lambda w: 2 * w.abs())
    params = {"w": torch.tensor([1.0, math.nan, -2.0]), "b": torch.tensor([0.0])}
    for penalty in (quiet, loud):
        _, slopes = fr.value_and_grad(penalty, backend="eager")(params)
        torch.testing.assert_close(slopes["w"], careful(params["w"]), rtol=0, atol=0, equal_nan=True)
        assert slopes["b"] == 0


def test_packed_gradients_under_another_default_device(monkeypatch):
    monkeypatch.setattr(plans, "SEPARATE", {"cpu": (13, 20)})
    tx = fr.chain(fr.clip_by_global_norm(0.5), fr.trace(0.9))
    step = fr.fuse(tx, donate=True, backend="eager")
    params, state = step.init({"a": torch.ones(30), "b": torch.ones(50), "c": torch.ones(3)})
    mine = step.gradients(params)
    fr.tree_map(lambda g: g.fill_(1.0), mine)
    with torch.device("meta"):
        check(tx, step, params, mine, state)


def test_numbers_as_extra_arguments_under_another_default_device():
    tx = fr.Transform(fr.init_empty_state, lambda u, s, p, *, value: (fr.tree_map(lambda x: x * value, u), s))
    step = fr.fuse(tx, backend="eager")
    params, state = step.init(square(), value=1.0)
    with torch.device("meta"):
        check(tx, step, params, fr.tree_map(torch.clone, params), state, value=2.0)


@pytest.mark.filterwarnings("error:this is computed leaf by leaf")
def test_what_looks_for_infinities_is_recorded_for_complex_leaves_too():
    tx = fr.apply_if_finite(fr.MultiSteps(fr.sgd(0.1), 2, should_skip_update_fn=fr.skip_not_finite), 2)
    step, params = fr.fuse(tx, backend="eager"), {"a": torch.tensor([1 + 2j, -3j])}
    check(tx, step, params, {"a": torch.tensor([1 + 2j, complex(1.0, math.inf)])}, tx.init(params))
