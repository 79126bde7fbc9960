"""States by name, what in them is like the parameters, and arithmetic of trees, beside optax."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from cases import DEVICE, TRANSFORMS, assert_equal, cpu_only, draw
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.testing import assert_close

import funcreg as fr
from funcreg.core.tree import ABSENT


def state():
    tx = fr.chain(fr.clip(1.0), fr.named_chain(("adam", fr.scale_by_adam()), ("slow", fr.ema(0.9))))
    return tx.init({"fc.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(2)})


# Found


@pytest.mark.parametrize(
    ("key", "paths"),
    [
        ("mu", ["1.adam.mu"]),
        ("steps", ["1.adam.steps", "1.slow.steps"]),
        ("slow", ["1.slow"]),
        ("slow.steps", ["1.slow.steps"]),
        ("AdamState", ["1.adam"]),
        ("AdamState.steps", ["1.adam.steps"]),
        ("EmaState.ema.fc.bias", ["1.slow.ema.fc.bias"]),
        ("fc.bias", ["1.adam.mu.fc.bias", "1.adam.nu.fc.bias", "1.slow.ema.fc.bias"]),
        ("bias", []),
        ("0", []),
        (0, []),
        ("1.adam.steps", ["1.adam.steps"]),
    ],
)
def test_values_are_found_by_key_field_type_and_the_end_of_their_path(key, paths):
    found = fr.tree_get_all_with_path(state(), key)
    assert [path for path, _ in found] == paths
    if len(paths) == 1:
        assert fr.tree_get(state(), key) is not None


def test_values_in_values_of_the_same_name_are_found_too():
    tree = {"a": {"a": 1, "b": ({"a": 2},)}, 3: {"c": 4}}
    assert fr.tree_get_all_with_path(tree, "a") == [("a", tree["a"]), ("a.a", 1), ("a.b.0.a", 2)]
    assert fr.tree_get(tree, 3) == {"c": 4}
    assert fr.tree_set(tree, lambda path, value: isinstance(value, int), a=9) == {
        "a": {"a": 9, "b": ({"a": 9},)},
        3: {"c": 4},
    }
    assert fr.tree_set(tree, a=9) == {"a": 9, 3: {"c": 4}}


def test_counters_are_found_and_set_under_the_name_of_optax_too():
    state = fr.scale_by_adam().init({"w": torch.ones(2)})
    assert fr.tree_get(state, "count") is state.steps
    assert int(fr.tree_set(state, count=7).steps) == 7


def test_one_of_several_is_chosen_by_more_of_its_path_or_by_a_function():
    with pytest.raises(KeyError, match=r"several values are called 'steps': 1.adam.steps, 1.slow.steps; .*adam.steps"):
        fr.tree_get(state(), "steps")
    assert fr.tree_get(state(), "steps", filtering=lambda path, value: "slow" in path) == 0
    assert fr.tree_get(state(), "steps", 7, lambda path, value: False) == 7
    assert fr.tree_get(state(), "moments") is None


def test_what_a_mask_left_out_is_not_found():
    masked = fr.masked(fr.trace(0.9), {"a": True, "b": False}).init({"a": torch.ones(1), "b": torch.ones(1)})
    assert fr.tree_get_all_with_path(masked, "b") == []


def test_names_that_are_not_there_are_said_with_those_that_are():
    with pytest.raises(KeyError, match=r"no value is called 'learning_rat'.*Do you mean 'learning_rate'"):
        fr.tree_set({"learning_rate": torch.ones(())}, learning_rat=1.0)
    with pytest.raises(KeyError, match=r"no value called 'mu' is let through by filtering"):
        fr.tree_set(state(), lambda path, value: False, mu=1.0)
    with pytest.raises(TypeError, match="got no values"):
        fr.tree_set(state())
    with pytest.raises(ValueError, match=r"'1.adam.mu.fc.bias' is set to a tensor of shape \(3,\); expected \(2,\)"):
        fr.tree_set(state(), **{"mu.fc.bias": torch.ones(3)})


# Set


def test_what_is_set_is_like_what_was_there_and_in_memory_of_its_own():
    before, value = state(), torch.tensor(3.0, dtype=torch.float64)
    after = fr.tree_set(before, steps=value, mu=value, nu={"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(1)})
    assert_equal(before, state())
    assert after[1]["adam"].steps.dtype == torch.int32
    assert [after[1][name].steps.item() for name in ("adam", "slow")] == [3, 3]
    assert (after[1]["adam"].mu["fc.weight"] == 3).all()
    assert after[1]["adam"].nu["fc.bias"].shape == (2,)
    places = [leaf.data_ptr() for leaf in [*fr.tree_leaves(after), value]]
    assert len(set(places)) == len(places)


def test_other_values_are_put_as_they_are():
    assert fr.tree_set(state(), steps=None)[1]["slow"].steps is None
    assert fr.tree_set(state(), EmptyState=fr.EmptyState())[0] == fr.EmptyState()
    assert fr.tree_set(state(), mu={"other": 1})[1]["adam"].mu == {"other": 1}


def injected():
    """A transform whose learning rate lives in its state."""

    def init(params):
        return {"hyperparams": {"learning_rate": torch.tensor(0.5)}, "steps": torch.zeros((), dtype=torch.int32)}

    def update(updates, state, params):
        rate = state["hyperparams"]["learning_rate"]
        return fr.tree_map(lambda u: -rate * u, updates), {**state, "steps": state["steps"] + 1}

    return fr.chain(fr.trace(0.9), fr.Transform(init, update))


@pytest.mark.parametrize("donate", [False, True])
def test_a_hyperparameter_that_is_set_in_a_fused_state_compiles_nothing_anew(donate):
    tx, counter = injected(), CompileCounterWithBackend("aot_eager")
    step = fr.fuse(tx, donate=donate, backend=counter)
    start = {"w": torch.ones(4, 3), "b": torch.ones(4)}
    params, state = step.init(start)
    expected, eager = start, tx.init(start)
    frames = []
    for rate in (0.5, 0.25, torch.tensor(0.125, dtype=torch.float64), 1):
        grads = fr.tree_map(lambda w: w * 0.5 + 1.0, start)
        state, eager = (fr.tree_set(each, learning_rate=rate) for each in (state, eager))
        assert fr.tree_get(state, "learning_rate").dtype == torch.float32
        params, state = step(params, grads, state)
        updates, eager = tx.update(grads, eager, expected)
        expected = fr.apply_updates(expected, updates)
        assert_close((params, state), (expected, eager), rtol=1e-6, atol=1e-6)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1] > 0


def test_reading_and_setting_map_over_members_and_compile_in_one_graph():
    members = torch.arange(3.0)
    one = injected().init({"w": torch.zeros(2)})
    many = vmap(lambda rate: fr.tree_set(one, learning_rate=rate))(members)
    assert_close(fr.tree_get(many, "learning_rate"), members)
    compiled = torch.compile(
        lambda s, v: (fr.tree_set(s, learning_rate=v, steps=4), fr.tree_get(s, "trace")),
        fullgraph=True,
        backend="eager",
    )
    assert_close(compiled(one, torch.tensor(2.0))[0], fr.tree_set(one, learning_rate=2.0, steps=4))
    slope = grad(lambda rate: fr.tree_get(fr.tree_set(one, learning_rate=rate), "learning_rate") ** 2)(
        torch.tensor(3.0)
    )
    assert slope == 6


# Like the parameters


# What is kept of a leaf in its place, in other dimensions.
REDUCED = {
    **dict.fromkeys(("scale_by_factored_rms", "adafactor"), "means over rows and over columns"),
    **dict.fromkeys(("scale_by_novograd", "novograd"), "one number for each leaf, with its number of dimensions"),
    **dict.fromkeys(
        ("scale_by_sm3", "scale_by_sm3 of means", "sm3", "proximal_step of SM3"), "a vector for each dimension"
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_like_the_parameters_is_found_in_every_state(name):
    """The leaves that are mapped over are those that have the shape and place of a leaf of the parameters."""
    tx, params = TRANSFORMS[name].make(), draw()
    seen = []
    found = fr.tree_map_params(
        tx, lambda m, w: seen.append((m.shape, w.shape)) or "like", tx.init(params), params, transform_non_params=str
    )
    # A flag for each leaf has no dimensions.
    assert all([a == b or not a for a, b in seen]) == (name not in REDUCED)
    ends = tuple(fr.tree_paths(params))
    for path, leaf in zip(fr.tree_paths(found), fr.tree_leaves(found), strict=True):
        several = name in REDUCED and path.rpartition(".")[0].endswith(ends)  # In the place of one leaf.
        assert (leaf == "like") == (path.endswith(ends) or several)
    compared = fr.tree_map_params(tx, lambda m: m.clone(), tx.init(params))
    assert_equal(compared, tx.init(params))


def test_masks_and_labels_of_users_are_not_asked_about_a_placeholder():
    params = {"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2)}
    tx = fr.chain(
        fr.masked(fr.trace(0.9), lambda params: {name: w.ndim > 1 for name, w in params.items()}),
        fr.partition(
            {"x": fr.ema(0.5), "y": fr.identity()}, lambda params: {n: "x" if "bias" in n else "y" for n in params}
        ),
    )
    found = fr.tree_map_params(tx, lambda m, device: device, tx.init(params), {"a.weight": "one", "a.bias": "two"})
    assert found[0].inner_state.trace == {"a.weight": "one", "a.bias": ABSENT}
    assert found[1].inner_states["x"].ema == {"a.weight": ABSENT, "a.bias": "two"}
    moved = fr.tree_map_params(tx, lambda m, device: device, tx.init(params), "all")
    assert moved[0].inner_state.trace["a.weight"] == "all"
    left_out = fr.tree_map_params(
        tx, lambda m, w: type(m).__name__, tx.init(params), params, is_leaf=lambda m: m == ABSENT or False
    )
    assert left_out[0].inner_state.trace == {"a.weight": "Tensor", "a.bias": "Absent"}


def test_members_of_an_ensemble_are_unstacked_without_a_look_at_counters():
    tx = fr.ensemble(lambda rate: fr.adam(rate), torch.ones(3))
    params = {"w": torch.arange(6.0).reshape(3, 2)}
    _, state = tx.update(params, tx.init(params), params)
    second = fr.tree_map_params(tx, lambda m: m[1], state)
    assert second[0].mu["w"].shape == (2,)


def test_wrong_states_and_trees_are_refused_with_the_place():
    tx, params = fr.adam(0.1), {"w": torch.zeros(2)}
    with pytest.raises(
        ValueError, match=r"'0' of the state is a TraceState of 'trace'; expected an AdamState of 'steps'"
    ):
        fr.tree_map_params(tx, lambda m: m, fr.sgd(0.1, 0.9).init(params))
    with pytest.raises(ValueError, match=r"has 'v' at '0.mu'; expected 'w'"):
        fr.tree_map_params(tx, lambda m, w: m, tx.init(params), {"v": 1})
    with pytest.raises(TypeError, match="expected the transform whose state it is"):
        fr.tree_map_params(torch.zeros(2), lambda m: m, tx.init(params))
    with pytest.raises(TypeError, match="f is a tuple"):
        fr.tree_map_params(tx, tx.init(params), lambda m: m)
    with pytest.raises(TypeError, match="took no placeholder for the parameters: TypeError"):
        fr.tree_map_params(lambda params: params["w"] + 1, lambda m: m, torch.ones(2))


# Arithmetic


def jax_tree(tree, jnp):
    return {name: jnp.asarray(x.cpu().numpy()) for name, x in tree.items()}


def trees(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 2), "b": (), "c": (4,)}
    return {
        n: torch.randn(s, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE, dtype)
        for n, s in shapes.items()
    }


ARITHMETIC = {
    "add": lambda lib, x, y: lib.tree_add(x, y, x),
    "sub": lambda lib, x, y: lib.tree_sub(x, y),
    "mul": lambda lib, x, y: lib.tree_mul(x, y),
    "div": lambda lib, x, y: lib.tree_div(x, y),
    "scale": lambda lib, x, y: lib.tree_scale(0.3, x),
    "add_scale": lambda lib, x, y: lib.tree_add_scale(x, -0.3, y),
    "clip": lambda lib, x, y: lib.tree_clip(x, -0.5, 0.7),
    "clip below": lambda lib, x, y: lib.tree_clip(x, -0.5),
    "sum": lambda lib, x, y: {"": lib.tree_sum(x)},
    "max": lambda lib, x, y: {"": lib.tree_max(x)},
    "min": lambda lib, x, y: {"": lib.tree_min(x)},
    "norm": lambda lib, x, y: {"": lib.tree_norm(x)},
    "norm 1": lambda lib, x, y: {"": lib.tree_norm(x, 1)},
    "norm 2 squared": lambda lib, x, y: {"": lib.tree_norm(x, ord=2, squared=True)},
    "norm inf": lambda lib, x, y: {"": lib.tree_norm(x, ord="inf")},
    "norm inf squared": lambda lib, x, y: {"": lib.tree_norm(x, math.inf, squared=True)},
    "vdot": lambda lib, x, y: {"": lib.tree_vdot(x, y)},
    "zeros_like": lambda lib, x, y: lib.tree_zeros_like(x),
    "ones_like": lambda lib, x, y: lib.tree_ones_like(x),
    "full_like": lambda lib, x, y: lib.tree_full_like(x, 0.25),
    "cast_like": lambda lib, x, y: lib.tree_cast_like(x, y),
    "incremental": lambda lib, x, y: lib.incremental_update(x, y, 0.3),
    "periodic, now": lambda lib, x, y: lib.periodic_update(x, y, 6, 3),
    "periodic, later": lambda lib, x, y: lib.periodic_update(x, y, 7, 3),
}
every_operation = pytest.mark.parametrize("f", ARITHMETIC.values(), ids=ARITHMETIC)


@cpu_only
def test_arithmetic_is_that_of_optax():
    optax = pytest.importorskip("optax")
    jax = pytest.importorskip("jax")
    from types import SimpleNamespace

    with jax.enable_x64(True):
        names = {name: getattr(optax.tree_utils, name) for name in dir(optax.tree_utils) if name.startswith("tree_")}
        lib = SimpleNamespace(
            **names, incremental_update=optax.incremental_update, periodic_update=optax.periodic_update
        )
        x, y = trees(), trees(1)
        for name, f in ARITHMETIC.items():
            expected = f(lib, jax_tree(x, jax.numpy), jax_tree(y, jax.numpy))
            found = f(fr, x, y)
            assert list(found) == list(expected), name
            for key, leaf in found.items():
                assert_close(leaf, torch.tensor(expected[key].tolist(), dtype=leaf.dtype), rtol=1e-12, atol=1e-12)


@every_operation
def test_arithmetic_maps_over_members_and_compiles_in_one_graph(f):
    x, y = trees(), trees(1)
    alone = f(fr, x, y)
    many = vmap(lambda x, y: f(fr, x, y))(*[fr.tree_map(lambda w: torch.stack([w, 2 * w]), tree) for tree in (x, y)])
    assert_close(fr.tree_map(lambda w: w[0], many), alone)
    assert_close(torch.compile(lambda x, y: f(fr, x, y), fullgraph=True, backend="eager")(x, y), alone)


@every_operation
def test_sixteen_bit_trees_are_computed_in_float32_and_stay_what_they_are(f):
    x, y = trees(dtype=torch.bfloat16), trees(1, torch.bfloat16)
    exact = f(fr, *[fr.tree_map(lambda w: w.float(), tree) for tree in (x, y)])
    for key, leaf in f(fr, x, y).items():
        assert leaf.dtype == (torch.bfloat16 if key or f in (ARITHMETIC["max"], ARITHMETIC["min"]) else torch.float32)
        assert_close(leaf, exact[key].to(leaf.dtype), rtol=0, atol=0)


def test_trees_of_two_precisions_have_the_greater_one():
    x, y = trees(dtype=torch.bfloat16), trees(1, torch.float32)
    assert {leaf.dtype for leaf in fr.tree_sub(x, y).values()} == {torch.float32}
    assert {leaf.dtype for leaf in fr.tree_add_scale(x, 2.0, y).values()} == {torch.bfloat16}
    assert {leaf.dtype for leaf in fr.incremental_update(x, y, 0.5).values()} == {torch.float32}


def test_products_of_complex_trees_conjugate_the_first():
    x, y = ({"w": torch.tensor([1 + 2j, 3 - 1j]) * factor} for factor in (1, 1j))
    assert fr.tree_vdot(x, y) == torch.vdot(x["w"], y["w"])
    assert_close(fr.tree_norm(x), torch.linalg.vector_norm(x["w"]))
    assert_close(fr.tree_norm(x, 1), torch.linalg.vector_norm(x["w"], 1))


def test_the_gradient_of_a_norm_at_zero_is_zero():
    for ord_ in (None, 1, 2):
        assert grad(lambda w, o=ord_: fr.tree_norm({"w": w}, o))(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("tree", [{}, {"w": torch.zeros(0)}])
def test_trees_without_entries_have_numbers_too(tree):
    assert [fr.tree_norm(tree, ord_) for ord_ in (None, 1, 2, math.inf)] == [0, 0, 0, 0]
    assert (fr.tree_sum(tree), fr.tree_size(tree), fr.tree_vdot(tree, tree)) == (0, 0, 0)
    assert (fr.tree_max(tree), fr.tree_min(tree)) == (-math.inf, math.inf)


def test_casts_leave_counters_whole_and_complex_numbers_complex():
    tree = {
        "w": torch.ones(2),
        "steps": torch.tensor(300, dtype=torch.int32),
        "z": torch.ones(1, dtype=torch.complex64),
    }
    kinds = {name: leaf.dtype for name, leaf in fr.tree_cast(tree, torch.bfloat16).items()}
    assert kinds == {"w": torch.bfloat16, "steps": torch.int32, "z": torch.complex64}
    assert fr.tree_cast(tree, torch.float64)["z"].dtype == torch.complex128
    assert fr.tree_cast(tree, None) is tree
    with pytest.raises(TypeError, match="dtype is 'float32'"):
        fr.tree_cast(tree, "float32")


def test_entries_are_chosen_by_a_condition():
    x, y = trees(), trees(1)
    assert_equal(fr.tree_where(True, x, y), x)
    assert_equal(fr.tree_where({"a": True, "b": False, "c": torch.tensor(False)}, x, y), {**y, "a": x["a"]})
    mask = fr.tree_map(lambda w: w > 0, x)
    assert_equal(fr.tree_where(mask, x, y), fr.tree_map(lambda m, a, b: torch.where(m, a, b), mask, x, y))


OF_TENSORS = {
    "tree_add": lambda x, y: fr.tree_add(y, x),
    "tree_sub": lambda x, y: fr.tree_sub(x, y),
    "tree_mul": lambda x, y: fr.tree_mul(x, y),
    "tree_div": lambda x, y: fr.tree_div(x, y),
    "tree_scale": lambda x, y: fr.tree_scale(0.5, x),
    "tree_add_scale": lambda x, y: fr.tree_add_scale(x, 0.5, y),
    "tree_where": lambda x, y: fr.tree_where(True, x, y),
    "tree_clip": lambda x, y: fr.tree_clip(x, -1.0, 1.0),
    "tree_sum": lambda x, y: fr.tree_sum(x),
    "tree_max": lambda x, y: fr.tree_max(x),
    "tree_min": lambda x, y: fr.tree_min(x),
    "tree_size": lambda x, y: fr.tree_size(x),
    "tree_norm": lambda x, y: fr.tree_norm(x),
    "tree_norm of order 1": lambda x, y: fr.tree_norm(x, 1),
    "tree_norm of infinite order": lambda x, y: fr.tree_norm(x, math.inf),
    "tree_vdot": lambda x, y: fr.tree_vdot(x, y),
    "tree_zeros_like": lambda x, y: fr.tree_zeros_like(x),
    "tree_ones_like": lambda x, y: fr.tree_ones_like(x),
    "tree_full_like": lambda x, y: fr.tree_full_like(x, 0.5),
    "tree_cast": lambda x, y: fr.tree_cast(x, torch.float32),
    "tree_cast_like": lambda x, y: fr.tree_cast_like(y, x),
    "periodic_update": lambda x, y: fr.periodic_update(y, x, 4, 2),
}


@pytest.mark.parametrize("call", OF_TENSORS.values(), ids=OF_TENSORS)
@pytest.mark.parametrize(("leaf", "is_"), [(0.5, "0.5"), (3, "3"), ("x", "'x'"), (numpy.ones(2), "a numpy.ndarray")])
def test_a_leaf_that_is_no_tensor_is_named(call, leaf, is_):
    x = {"a": torch.ones(2), "b": {"w": leaf}}
    with pytest.raises(TypeError, match=f"tree 'b.w' is {is_}; expected a tensor"):
        call(x, {"a": torch.ones(2), "b": {"w": torch.ones(2)}})


def test_wrong_arguments_of_arithmetic_are_said():
    x = trees()
    with pytest.raises(ValueError, match="it lacks 'a'"):
        fr.tree_add(x, {"b": x["b"], "c": x["c"]})
    with pytest.raises(ValueError, match=r"'c' has shape \(1,\); expected \(4,\)"):
        fr.tree_add(x, {**x, "c": torch.ones(1, dtype=torch.float64)})
    with pytest.raises(ValueError, match="ord is 3; expected"):
        fr.tree_norm(x, 3)
    with pytest.raises(ValueError, match="step_size is"):
        fr.incremental_update(x, x, 1.5)
    with pytest.raises(ValueError, match="update_period is 0"):
        fr.periodic_update(x, x, 1, 0)


def test_periodic_copies_follow_a_counter_that_is_a_tensor():
    new, old = trees(), trees(1)
    now = vmap(lambda steps: fr.periodic_update(new, old, steps, 2))(torch.arange(4))
    for n in range(4):
        assert_equal(fr.tree_map(lambda w, n=n: w[n], now), old if n % 2 else new)


def test_a_rate_or_a_moment_is_set_to_numbers_alone():
    rated = fr.inject_hyperparams(fr.adam)(0.1).init({"w": torch.ones(2)})
    for wrong, said in ((None, "None"), ("0.1", "'0.1'"), (lambda count: 0.1, "<lambda>")):
        with pytest.raises(TypeError, match=rf"'hyperparams.learning_rate' is set to {said}, where a number is"):
            fr.tree_set(rated, learning_rate=wrong)
    with pytest.raises(TypeError, match=r"'inner_state.0.mu.w' is set to None"):
        fr.tree_set(rated, w=None)


def test_bounds_that_cross_are_refused_with_the_leaf():
    tree = {"w": torch.ones(2)}
    for low, high in ((1.0, -1.0), (torch.tensor([0.0, 2.0]), 1.0), ({"w": 1.0}, {"w": torch.tensor(0.5)})):
        with pytest.raises(ValueError, match=r"at leaf 'w': min_value is .* and max_value .*Are they swapped\?"):
            fr.tree_clip(tree, low, high)
    assert fr.tree_clip(tree, 0.5, 0.5)["w"].tolist() == [0.5, 0.5]
    assert fr.tree_clip(tree, torch.tensor([0.0, 0.5]), 0.5)["w"].tolist() == [0.5, 0.5]
    vmap(lambda low: fr.tree_clip(tree, low, 1.0))(torch.tensor([0.0, 2.0]))  # Not read, and no error.
