"""Line searches and L-BFGS: their conditions, their ends, and Newton's steps written out."""

from __future__ import annotations

import pytest
import torch
from cases import assert_equal, cpu_only, draw, flat
from torch.func import grad, grad_and_value, vmap
from torch.testing import assert_close

import funcreg as fr

SEARCHES = {
    "zoom": lambda **o: fr.chain(fr.sgd(1.0), fr.scale_by_zoom_linesearch(**{"max_linesearch_steps": 20, **o})),
    "backtracking": lambda **o: fr.chain(
        fr.sgd(1.0),
        fr.scale_by_backtracking_linesearch(
            **{"max_backtracking_steps": 20, "decrease_factor": 0.5, "store_grad": True, **o}
        ),
    ),
    "lbfgs": lambda **o: fr.lbfgs(**o),
}
every_search = pytest.mark.parametrize("make", SEARCHES.values(), ids=SEARCHES)


def rosenbrock(params):
    x, y = params["x"], params["y"]
    return ((1 - x) ** 2 + 100 * (y - x * x) ** 2).sum()


def valley(params):
    return sum(((w - 1) ** 4).sum() + (2.0 * w * w).sum() for w in fr.tree_leaves(params))


def start():
    return {"x": torch.tensor([-1.2, 0.5], dtype=torch.float64), "y": torch.tensor([1.0, 2.0], dtype=torch.float64)}


def descend(tx, f, params, steps, **extra):
    state = tx.init(params)
    for _ in range(steps):
        slope, value = grad_and_value(f)(params, **extra)
        updates, state = tx.update(slope, state, params, value=value, grad=slope, value_fn=f, **extra)
        params = fr.apply_updates(params, updates)
    return params, state


def test_lbfgs_finds_the_end_of_the_valley_of_rosenbrock():
    params, _ = descend(fr.lbfgs(), rosenbrock, start(), 60)
    assert_close(flat(params), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-8)


@every_search
def test_no_step_goes_uphill(make):
    tx, params = make(), start()
    state = tx.init(params)
    for _ in range(15):
        slope, value = grad_and_value(rosenbrock)(params)
        updates, state = tx.update(slope, state, params, value=value, grad=slope, value_fn=rosenbrock)
        params = fr.apply_updates(params, updates)
        assert rosenbrock(params) < value


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e2])
def test_a_zoom_ends_where_the_conditions_of_wolfe_hold(scale):
    tx = fr.chain(fr.sgd(scale), fr.scale_by_zoom_linesearch(40, curv_rtol=0.1, initial_guess_strategy="one"))
    params = start()
    slope, value = grad_and_value(rosenbrock)(params)
    updates, state = tx.update(slope, tx.init(params), params, value=value, grad=slope, value_fn=rosenbrock)
    after, there = grad_and_value(rosenbrock)(fr.apply_updates(params, updates))
    step = float(state[1].learning_rate)
    along = -scale * flat(slope)
    assert there <= value + 1e-4 * step * (along @ flat(slope))
    assert abs(along @ flat(after)) <= 0.1 * abs(along @ flat(slope)) + 1e-12
    assert_close(flat(state[1].grad), flat(after))
    assert_close(state[1].value, there)
    assert float(state[1].info.decrease_error) == float(state[1].info.curvature_error) == 0


@every_search
def test_members_search_as_they_do_alone(make):
    tx = make()
    members = [{"x": torch.tensor([a]).double(), "y": torch.tensor([b]).double()} for a, b in ((-1.2, 1), (3, -2))]
    stacked = fr.tree_map(lambda *xs: torch.stack(xs), *members)
    state = vmap(tx.init)(stacked)

    def one(params, state):
        slope, value = grad_and_value(rosenbrock)(params)
        updates, state = tx.update(slope, state, params, value=value, grad=slope, value_fn=rosenbrock)
        return fr.apply_updates(params, updates), state

    for _ in range(4):
        stacked, state = vmap(one)(stacked, state)
    for i, member in enumerate(members):
        alone, kept = descend(tx, rosenbrock, member, 4)
        assert_equal(fr.tree_map(lambda w, i=i: w[i], stacked), alone, rtol=1e-8, atol=1e-10)
        assert_equal(fr.tree_map(lambda w, i=i: w[i], state), kept, rtol=1e-7, atol=1e-9)


HELD = fr.select("y")
SOME_LEAVES = {
    "freeze": lambda tx: fr.chain(fr.freeze(HELD), tx),
    "selective_transform": lambda tx: fr.selective_transform(tx, freeze_mask=HELD),
    "partition": lambda tx: fr.partition({"x": tx, "y": fr.set_to_zero()}, {"x": "x", "y": "y"}),
    "masks of extra arguments": lambda tx: fr.partition(
        {"x": tx, "y": fr.set_to_zero()}, {"x": "x", "y": "y"}, mask_compatible_extra_args=True
    ),
}


@every_search
@pytest.mark.parametrize("around", SOME_LEAVES.values(), ids=SOME_LEAVES)
def test_a_search_over_some_leaves_finds_what_one_of_these_alone_does(make, around):
    params = start()
    alone = lambda chosen, scale: scale * rosenbrock({"x": chosen["x"], "y": params["y"]})
    expected, _ = descend(make(), alone, {"x": params["x"]}, 4, scale=torch.tensor(0.5))
    found, _ = descend(around(make()), lambda p, scale: scale * rosenbrock(p), params, 4, scale=torch.tensor(0.5))
    assert_close(found, {**expected, "y": params["y"]}, rtol=1e-12, atol=0)


@every_search
def test_a_search_over_a_vector_is_one_over_all_leaves(make):
    expected, _ = descend(make(), rosenbrock, start(), 4)
    assert_close(descend(fr.flatten(make()), rosenbrock, start(), 4)[0], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("around", "params"),
    [(SOME_LEAVES["freeze"], start()), (fr.flatten, {"x": torch.ones(2, 2)})],
    ids=["freeze", "flatten"],
)
def test_gradients_of_other_leaves_are_no_gradients_of_all(around, params):
    f = lambda p: sum((leaf**2).sum() for leaf in fr.tree_leaves(p))
    tx, value_and_grad = around(fr.lbfgs()), fr.value_and_grad_from_state(f)
    state = tx.init(params)
    for _ in range(2):
        value, slope = value_and_grad(params, state=state)
        assert_close((slope, value), grad_and_value(f)(params))
        updates, state = tx.update(slope, state, params, value=value, grad=slope, value_fn=f)
        params = fr.apply_updates(params, updates)


def test_plain_code_stops_where_a_step_will_do_and_the_rest_of_masked_trials_is_left_out():
    calls = []

    def f(params):
        calls.append(None)
        return valley(params)

    params = draw()
    tx = fr.chain(fr.sgd(0.01), fr.scale_by_zoom_linesearch(3))
    slope, value = grad_and_value(valley)(params)
    plain, state = tx.update(slope, tx.init(params), params, value=value, grad=slope, value_fn=f)
    assert len(calls) == int(state[1].info.num_linesearch_steps) < 3
    # Where nothing can be read, all trials are made, and those after the last are left out.
    many = lambda tree: fr.tree_map(lambda x: x.unsqueeze(0), tree)
    given = (slope, value, tx.init(params), params)
    masked = vmap(lambda g, v, s, p: tx.update(g, s, p, value=v, grad=g, value_fn=f))(*map(many, given))
    assert len(calls) == int(state[1].info.num_linesearch_steps) + 3
    assert_equal(masked, many((plain, state)), rtol=1e-12, atol=1e-12)


def test_the_two_passes_of_lbfgs_are_the_matrix_written_out():
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64, device="cpu")
    hessian = root @ root.T + torch.eye(5, dtype=torch.float64, device="cpu")
    tx, w = fr.scale_by_lbfgs(3), torch.randn(5, generator=generator, dtype=torch.float64, device="cpu")
    state, moved, turned, before = tx.init(w), [], [], None
    for n in range(6):
        g = hessian @ w
        if before is not None:
            moved, turned = [*moved, w - before[0]][-3:], [*turned, g - before[1]][-3:]
        size = 1 / max(1.0, float(g.norm()))
        if moved:
            size = float(moved[-1] @ turned[-1] / (turned[-1] @ turned[-1]))
        inverse = size * torch.eye(5, dtype=torch.float64, device="cpu")
        for s, y in zip(moved, turned, strict=True):
            v = torch.eye(5, dtype=torch.float64, device="cpu") - torch.outer(s, y) / (s @ y)
            inverse = v @ inverse @ v.T + torch.outer(s, s) / (s @ y)
        direction, state = tx.update(g, state, w)
        assert_close(direction, inverse @ g, rtol=1e-9, atol=1e-11, msg=f"step {n}")
        before, w = (w, g), w - 0.3 * direction


@every_search
def test_what_a_search_has_seen_begins_the_next_update(make):
    tx, params = make(), start()
    calls = []

    def f(params):
        calls.append(None)
        return rosenbrock(params)

    value_and_grad = fr.value_and_grad_from_state(f)
    state, expected, kept = tx.init(params), params, tx.init(params)
    for n in range(4):
        before = len(calls)
        value, slope = value_and_grad(params, state=state)
        assert (len(calls) > before) == (n == 0)
        updates, state = tx.update(slope, state, params, value=value, grad=slope, value_fn=f)
        params = fr.apply_updates(params, updates)
        slope, value = grad_and_value(rosenbrock)(expected)
        updates, kept = tx.update(slope, kept, expected, value=value, grad=slope, value_fn=rosenbrock)
        expected = fr.apply_updates(expected, updates)
    assert_equal(params, expected, rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="the state has 0 line searches that store a gradient; expected one"):
        value_and_grad(params, state=fr.adam(0.1).init(params))
    # In an ensemble, nothing is read.
    stacked = fr.tree_map(lambda w: torch.stack([w, w]), params)
    many = fr.tree_map(lambda s: torch.stack([s, s]), state)
    value, slope = vmap(lambda p, s: value_and_grad(p, state=s))(stacked, many)
    assert_close(value[0], rosenbrock(params), rtol=1e-9, atol=1e-12)
    assert_equal(fr.tree_map(lambda g: g[1], slope), grad(rosenbrock)(params), rtol=1e-7, atol=1e-9)


@every_search
def test_data_of_the_objective_are_given_by_name(make):
    def f(params, x, y):
        return (x @ params["w"] - y).square().mean()

    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    params, _ = descend(make(), f, {"w": torch.zeros(3, dtype=torch.float64)}, 40, x=x, y=y)
    assert_close(params["w"], torch.linalg.lstsq(x, y.unsqueeze(1)).solution.squeeze(1), rtol=0, atol=1e-4)
    tx, slope = make(), grad(f)(params, x, y)
    with pytest.raises(TypeError, match=r"got the extra argument 'z', which value_fn does not take"):
        tx.update(slope, tx.init(params), params, value=1.0, grad=slope, value_fn=f, x=x, y=y, z=x)


@every_search
def test_an_objective_that_is_nan_makes_no_step_and_float32_is_kept(make):
    params = {"w": torch.ones(3)}
    tx = make()
    nan = lambda params: params["w"].sum() * float("nan")
    ones = fr.tree_map(torch.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params, value=1.0, grad=ones, value_fn=nan)
    assert not updates["w"].any()
    assert updates["w"].dtype == torch.float32
    updates, _ = tx.update(ones, tx.init(params), params, value=3.0, grad=ones, value_fn=lambda p: p["w"].sum())
    assert updates["w"].dtype == torch.float32
    assert updates["w"].all()


@every_search
def test_trained_steps_are_differentiable(make):
    def trained(scale):
        f = lambda params: ((params["w"] - 1) ** 4).sum() + scale * params["w"].square().sum()
        params, _ = descend(make(), f, {"w": torch.tensor([3.0, -2.0], dtype=torch.float64)}, 3)
        return params["w"].sum()

    at = torch.tensor(1.3, dtype=torch.float64)
    assert_close(grad(trained)(at), (trained(at + 1e-6) - trained(at - 1e-6)) / 2e-6, rtol=1e-3, atol=1e-6)


WRONG = {
    "no objective": (
        lambda: SEARCHES["lbfgs"]().update(ONES, SEARCHES["lbfgs"]().init(ONES), ONES),
        "needs the objective",
    ),
    "no function": (
        lambda: SEARCHES["backtracking"]().update(
            ONES, SEARCHES["backtracking"]().init(ONES), ONES, value=1.0, grad=ONES, value_fn=3.0
        ),
        "scale_by_backtracking_linesearch needs the objective; expected update",
    ),
    "no value": (
        lambda: SEARCHES["zoom"]().update(ONES, SEARCHES["zoom"]().init(ONES), ONES, grad=ONES, value_fn=valley),
        "scale_by_zoom_linesearch needs the value",
    ),
    "trials": (lambda: fr.scale_by_zoom_linesearch(0), "max_linesearch_steps is 0; expected a whole number of at l"),
    "steps": (lambda: fr.scale_by_backtracking_linesearch(2.5), "max_backtracking_steps is 2.5; expected a whole"),
    "guess": (
        lambda: fr.scale_by_zoom_linesearch(5, initial_guess_strategy="two"),
        "initial_guess_strategy is 'two'; expected 'one' or 'keep'",
    ),
    "memory": (lambda: fr.lbfgs(memory_size=0), "memory_size is 0; expected a whole number of at least 1"),
    "search": (lambda: fr.lbfgs(linesearch=fr.scale_by_zoom_linesearch), "argument 0 of lbfgs is a function; expected"),
    "no function of parameters": (lambda: fr.value_and_grad_from_state(3.0), "got 3.0; expected a function"),
}
ONES = {"w": torch.ones(3)}


@cpu_only
@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_work_is_said_with_its_cause(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
