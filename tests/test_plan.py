"""The packed step: leaves in shared buffers, few kernels, and the numbers of the plain functions."""

from __future__ import annotations

import copy
import functools
import io
import warnings

import pytest
import torch
from cases import PENALTIES, TRANSFORMS, assert_equal, draw, normal
from torch._dynamo.testing import CompileCounterWithBackend

import funcreg as fr
from funcreg.fused import grouping, plan

#: Links of a chain are fused here by themselves.
pytestmark = pytest.mark.filterwarnings("ignore:fuse got .* steps go uphill")

every_transform = pytest.mark.parametrize("case", TRANSFORMS.values(), ids=TRANSFORMS)
every_penalty = pytest.mark.parametrize("case", PENALTIES.values(), ids=PENALTIES)


@pytest.fixture
def small_buffers(monkeypatch):
    """Leaves of a dozen entries are large here, and a few dozen fill a buffer."""
    monkeypatch.setattr(plan, "SEPARATE", {"cpu": (13, 20)})


def forest(seed=0, dtype=torch.float64, layers=3):
    """Several layers of the same shapes, and leaves without entries or dimensions."""
    trees = {f"layer{i}": draw(10 * seed + i, dtype) for i in range(layers)}
    return {**trees, "none": torch.zeros(0, 3, dtype=dtype), "single": draw(seed + 7, dtype)["head"].bias[1]}


#: Enough to fill a buffer and begin another, and recorded sooner than more.
two_layers = functools.partial(forest, layers=2)


def follow(
    tx, step, params, state, steps=3, dtype=torch.float64, grads=forest, then=lambda params, state: None, **tolerance
):
    """Run a step beside the plain functions, comparing after each."""
    expected = copy.deepcopy(params), tx.init(copy.deepcopy(params))
    for n in range(1, steps + 1):
        updates, after = tx.update(grads(n, dtype), expected[1], expected[0])
        expected = fr.apply_updates(expected[0], updates), after
        params, state = step(params, grads(n, dtype), state)
        assert_equal((params, state), expected, **tolerance)
        then(params, state)
    return params, state


def from_a_file(tx, step, grads=forest):
    """Steps from parameters and a state that lie as they were loaded, not as `step.init` packs them."""
    params = grads()
    stored = io.BytesIO()
    torch.save(fr.tree_leaves(tx.init(params)), stored)
    stored.seek(0)
    loaded = iter(torch.load(stored, weights_only=True))
    state = fr.tree_map(lambda x: next(loaded), tx.init(params))
    follow(tx, step, params, state, grads=grads, rtol=1e-11, atol=1e-12)


@every_transform
@pytest.mark.parametrize("donate", [pytest.param(False, marks=pytest.mark.slow), True])
def test_steps_are_the_plain_ones_packed_or_as_leaves_lie_and_compile_once(case, donate, small_buffers):
    tx, counter = case.make(), CompileCounterWithBackend("eager")
    step = fr.fuse(tx, donate=donate, backend="eager" if donate else counter)  # test_fused counts those that donate.
    params, state = step.init(two_layers())
    places = lambda *trees: [leaf.data_ptr() for leaf in fr.tree_leaves(trees)]
    before, compiled = places(params, state), []

    def then(params, state):
        compiled.append(counter.frame_count)
        assert not donate or places(params, state) == before

    follow(tx, step, params, state, grads=two_layers, then=then, rtol=1e-11, atol=1e-12)
    if not donate:
        assert compiled[0] == compiled[-1] > 0
        from_a_file(tx, step, two_layers)  # The same record serves leaves that are copied together.


@pytest.mark.slow
@every_transform
def test_packed_steps_take_sixteen_bits(case, small_buffers):
    tx = case.make()
    step = fr.fuse(tx, donate=True, backend="eager")
    params, state = step.init(two_layers(dtype=torch.bfloat16))
    follow(tx, step, params, state, dtype=torch.bfloat16, grads=two_layers, rtol=2e-2, atol=1e-2)


MIXED = {
    "masks by name and dimensions": lambda: fr.chain(
        fr.scale_by_adam(),
        fr.add_decayed_weights(0.1, mask=fr.select("layer1.*") & fr.matrices),
        fr.scale_by_learning_rate(0.1),
        fr.soft_threshold(0.005, mask=fr.select("layer[02].*.weight")),
    ),
    "a mask by shape": lambda: fr.masked(fr.trace(0.5), lambda params: fr.tree_map(lambda w: w.numel() > 5, params)),
    "strengths for parts": lambda: fr.add_decayed_weights(
        {"layer0": 0.1, "layer1": torch.tensor(0.2), "layer2": lambda count: 0.3 / (1 + count), "none": 0, "single": 1}
    ),
    "a strength for each entry": lambda: fr.prox_sgd(0.1, fr.l1, strength=fr.tree_map(torch.abs, forest(5))),
    "labels": lambda: fr.partition(
        {"slow": fr.adam(0.01), "fast": fr.prox_adam(0.1, fr.l1, strength=0.2), "still": fr.set_to_zero()},
        {"layer0": "slow", "layer1": "fast", "layer2": "slow", "none": "still", "single": "fast"},
    ),
    "freeze": lambda: fr.chain(fr.clip_by_global_norm(0.5), fr.lamb(0.1), fr.freeze(fr.select("layer1.*"))),
    "two norms": lambda: fr.chain(
        fr.clip_by_global_norm(2.0), fr.masked(fr.clip_by_global_norm(0.5), fr.matrices), fr.trace(0.9), fr.scale(-0.1)
    ),
    "a norm of what a norm scaled": lambda: fr.chain(
        fr.clip_by_global_norm(1.0), fr.sgd(0.1), fr.clip_by_global_norm(0.01)
    ),
    "rows, then all": lambda: fr.chain(fr.prox_sgd(0.1, fr.group_lasso, strength=0.5), fr.clip_by_global_norm(0.1)),
    "leaves that meet": lambda: fr.stateless(_meeting),
    "a user's norm": lambda: fr.stateless(_joint),
    "a user's norms of leaves": lambda: fr.stateless(
        lambda u, p: fr.tree_map(lambda u, w: u - w / (1 + torch.linalg.vector_norm(w)), u, p)
    ),
    "finite, with labels": lambda: fr.apply_if_finite(
        fr.partition({True: fr.adam(0.1), False: fr.lion(0.01)}, lambda p: fr.matrices(p)), 2
    ),
}


def _meeting(updates, params):
    """The biases of two layers follow their sum."""
    both = updates["layer0"]["head"].bias + updates["layer2"]["head"].bias
    changed = dict(updates)
    for name in ("layer0", "layer2"):
        changed[name] = {
            **updates[name],
            "head": updates[name]["head"]._replace(bias=both * (2 if name == "layer0" else 3)),
        }
    return changed


def _joint(updates, params):
    """A norm over everything, added up in a loop."""
    size = 1.0
    for leaf in fr.tree_leaves(params):
        size = size + leaf.square().sum()
    return fr.tree_map(lambda u: u / size, updates)


@pytest.mark.parametrize("make", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("donate", [False, True])
def test_leaves_are_treated_each_as_it_should(make, donate, small_buffers):
    step = fr.fuse(make(), donate=donate, backend="eager")
    follow(make(), step, *step.init(forest()), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("make", MIXED.values(), ids=MIXED)
def test_donating_steps_take_leaves_that_lie_elsewhere(make, small_buffers):
    from_a_file(make(), fr.fuse(make(), donate=True, backend="eager"))


@pytest.mark.parametrize("donate", [False, True])
def test_trees_of_many_dtypes_are_packed_apart(donate, small_buffers):
    dtypes = {"a": torch.float32, "b": torch.float64, "c": torch.bfloat16, "d": torch.complex64}

    def mixed(seed=0, dtype=None):
        return {name: draw(seed + i, dtype)["head"] for i, (name, dtype) in enumerate(dtypes.items())}

    tx = fr.chain(fr.clip_by_global_norm(1.0), fr.scale_by_adam(), fr.scale(-0.1), fr.soft_threshold(0.05))
    step = fr.fuse(tx, donate=donate, backend="eager")
    follow(tx, step, *step.init(mixed()), grads=mixed, rtol=1e-2, atol=1e-3)


def counting():
    made = []

    def backend(module, inputs):
        made.append(module)
        return module.forward

    return made, backend


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda: fr.chain(fr.adam(0.1), fr.soft_threshold(0.1)), 2),
        (lambda: fr.adamw(0.1, mask=fr.matrices), 3),
        (lambda: fr.chain(fr.clip_by_global_norm(1.0), fr.adamw(0.1, mask=fr.matrices)), 6),
        (lambda: fr.prox_adam(0.1, fr.l1, mask=fr.matrices), 3),
        (lambda: fr.lamb(0.1), 4),
    ],
)
def test_the_number_of_kernels_does_not_grow_with_that_of_leaves(make, most):
    for count in (3, 40):
        params = {f"w{i}": torch.ones(3, 2) for i in range(count)} | {f"b{i}": torch.ones(3) for i in range(count)}
        made, backend = counting()
        step = fr.fuse(make(), donate=True, backend=backend)
        step(*(step.init(params)[i] if i != 1 else params for i in (0, 1)), step.init(params)[1])
        assert len(made) <= most


ROWS = {f"w{i}": (3 * i + 2, 35 + 8 * (i % 4)) for i in range(6)} | {"short": (4, 3), "long": (9, 3), "one": (1, 40)}


@pytest.mark.parametrize("donate", [False, True])
def test_the_number_of_long_kernels_does_not_grow_with_that_of_shapes(donate, monkeypatch):
    monkeypatch.setattr(grouping, "_LONG", 10)
    shapes = {**ROWS, "w7": ROWS["w1"], "conv": (2, 3, 4, 40), "other conv": (5, 2, 7, 50)}
    trees = lambda seed=0, dtype=None: {
        name: draw_normal(shape, seed + i) for i, (name, shape) in enumerate(shapes.items())
    }
    made, backend = counting()
    tx = fr.prox_sgd(0.1, fr.group_lasso, strength=0.5, momentum=0.9)
    step = fr.fuse(tx, donate=donate, backend=backend)
    follow(tx, step, *step.init(trees()), grads=trees, steps=4, rtol=1e-9, atol=1e-12)
    assert len(made) <= 5  # Scalars, long rows, short rows, a single row, kernels of convolutions.


def draw_normal(shape, seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    return normal(generator, *shape)


LONG = {
    "prox_adam": lambda like: fr.prox_adam(0.1, fr.group_lasso, strength=0.5),
    "strengths of leaves": lambda like: fr.prox_sgd(0.1, fr.group_lasso, strength=fr.tree_map(torch.mean, like)),
    "norms of leaves": lambda like: fr.lamb(0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", LONG.values(), ids=LONG)
def test_inductor_makes_one_code_for_rows_of_many_sizes(make, monkeypatch):
    monkeypatch.setattr(grouping, "_LONG", 10)
    shapes = {name: (*shape[:-1], 100 * shape[-1]) for name, shape in ROWS.items()}
    trees = lambda seed=0, dtype=None: {name: draw_normal(shape, seed) for name, shape in shapes.items()}
    tx = make(fr.tree_map(torch.abs, trees()))
    step = fr.fuse(tx)
    follow(tx, step, *step.init(trees()), grads=trees, rtol=1e-6, atol=1e-8)


def test_results_that_somebody_holds_never_change():
    tx = fr.chain(fr.trace(0.9), fr.scale(-0.1))
    step = fr.fuse(tx, backend="eager")
    params, state = step.init(forest())
    kept, copies = [], []
    for n in range(6):
        params, state = step(params, forest(n), state)
        # A whole tree, a leaf, a view of a leaf, and a state.
        kept.append([params, params["layer0"]["head"].bias, params["layer1"]["body"]["filters"][0], state][n % 4])
        copies.append(copy.deepcopy(kept[-1]))
    for held, before in zip(kept, copies, strict=True):
        assert_equal(held, before)


def test_results_that_nobody_holds_are_written_over():
    step = fr.fuse(fr.sgd(0.1), backend="eager")
    params, state = step.init({"w": torch.zeros(5, 3), "b": torch.zeros(5)})
    places = set()
    for _ in range(10):
        params, state = step(params, {"w": torch.ones(5, 3), "b": torch.ones(5)}, state)
        places.add(params["w"].data_ptr())
    assert len(places) == 2
    torch.testing.assert_close(params["w"], torch.full((5, 3), -1.0))


def test_gradients_may_lie_where_the_step_reads_them(small_buffers):
    tx = fr.adam(0.1)
    step, plain = fr.fuse(tx, donate=True, backend="eager"), fr.fuse(tx, donate=True, backend="eager")
    params, state = step.init(forest())
    expected, other = plain.init(forest())
    grads = step.gradients(params)
    assert not any(leaf.any() for leaf in fr.tree_leaves(grads))
    for n in range(3):
        fr.tree_map(lambda place, g: place.copy_(g), grads, forest(n))
        params, state = step(params, grads, state)
        expected, other = plain(expected, forest(n), other)
        assert_equal((params, state), (expected, other))
    with pytest.raises(ValueError, match="call init first"):
        step.gradients({"w": torch.ones(2)})


@pytest.mark.parametrize("donate", [False, True])
def test_gradients_of_any_layout_are_taken(donate):
    params = {"a": torch.randn(6, 4), "b": torch.randn(6, 4), "big": torch.randn(400, 200)}
    layouts = [
        lambda x: x.clone(),
        lambda x: x.T.contiguous().T,
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x[:1].expand(x.shape),
    ]
    tx = fr.chain(fr.trace(0.9), fr.scale(-0.1))
    step = fr.fuse(tx, donate=donate, backend="eager")
    owned, state = step.init(params)
    eager = tx.init(params)
    for layout in layouts * 2:
        grads = fr.tree_map(lambda w, layout=layout: layout(torch.sin(w)), params)
        updates, eager = tx.update(grads, eager, params)
        params = fr.apply_updates(params, updates)
        owned, state = step(owned, grads, state)
        assert_equal((owned, state), (params, eager), rtol=1e-6, atol=1e-7)


def test_tensors_that_a_chain_holds_are_read_at_every_step():
    anchor = forest(3)
    pull = fr.stateless(lambda u, p: fr.tree_map(lambda u, w, a: u + 0.1 * (w - a), u, p, anchor))
    step = fr.fuse(pull, donate=True, backend="eager")
    params, state = step.init(forest())
    for factor in (1.0, 2.0):
        fr.tree_map(lambda a, factor=factor: a.mul_(factor), anchor)
        expected = fr.apply_updates(params, pull.update(forest(1), pull.init(params), params)[0])
        params, state = step(params, forest(1), state)
        assert_equal(params, expected, rtol=1e-12, atol=1e-14)


def test_extra_arguments_are_part_of_the_step():
    def scaled(updates, state, params, *, value, weights, name):
        assert name == "x"
        return fr.tree_map(lambda u, a: u * value * a, updates, weights), state

    tx = fr.Transform(fr.init_empty_state, scaled)
    step = fr.fuse(tx, donate=True, backend="eager")
    params, state = step.init(forest(), value=1.0, weights=forest(), name="x")
    for value in (2.0, torch.tensor(3.0, dtype=torch.float64), 4.0):
        extra = {"value": value, "weights": forest(4), "name": "x"}
        expected = fr.apply_updates(params, tx.update(forest(1), state, params, **extra)[0])
        params, state = step(params, forest(1), state, **extra)
        assert_equal(params, expected, rtol=1e-12, atol=1e-14)


U = torch.float64
TWO = lambda p: {"a": p["w"] * 2, "b": p["w"] * 3}
KEEPS = {
    "old parameters": (TWO, lambda u, s, p: (u, {"a": p["w"], "b": s["a"]})),
    "a view of old parameters": (TWO, lambda u, s, p: (u, {"a": p["w"].T, "b": s["a"].T})),
    "two leaves that change places": (
        TWO,
        lambda u, s, p: ({"w": u["w"] + s["a"] + 2 * s["b"]}, {"a": s["b"], "b": s["a"]}),
    ),
    "views that change places": (TWO, lambda u, s, p: (u, {"a": s["b"][:], "b": s["a"][:]})),
    "what is not contiguous": (
        TWO,
        lambda u, s, p: ({"w": u["w"] + s["a"]}, {"a": s["a"].T, "b": u["w"].T.reshape(3, 3)}),
    ),
}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("row", KEEPS.values(), ids=KEEPS)
def test_old_numbers_may_go_to_new_places(row, donate, backend):
    tx = fr.Transform(*row)
    square = lambda n, dtype: {"w": normal(torch.Generator().manual_seed(n), 3, 3, dtype=U)}
    step = fr.fuse(tx, donate=donate, backend=backend)
    follow(tx, step, *step.init(square(0, U)), grads=square, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("donate", [False, True])
def test_leaves_without_dimensions_are_steps_like_others(donate, backend):
    shared = fr.stateless(lambda u, p: {"p": u["p"], "q": u["q"] * p["p"], "w": u["w"] * p["p"]})
    grads = lambda n, dtype: {
        "p": torch.tensor(n + 1.0, dtype=U),
        "q": torch.ones(3, 2, dtype=U),
        "w": torch.ones(5, dtype=U),
    }
    for tx in (shared, fr.chain(fr.clip_by_global_norm(1.0), fr.adam(0.1))):
        step = fr.fuse(tx, donate=donate, backend=backend)
        follow(tx, step, *step.init(grads(1, U)), grads=grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("donate", [False, True])
def test_one_step_serves_many_dtypes_and_layouts(donate):
    tx = fr.chain(fr.clip_by_global_norm(0.1), fr.scale(1.0))
    step = fr.fuse(tx, donate=donate, backend="aot_eager")
    for dtype in (torch.float32, U, torch.bfloat16, torch.float32):
        params = lambda n, dtype=dtype: {"a": torch.ones(4, dtype=dtype), "b": torch.full((3,), n + 1.0, dtype=dtype)}
        grads = lambda n, _, params=params: params(n)
        follow(
            tx,
            step,
            params(0),
            tx.init(params(0)),
            grads=grads,
            steps=2,
            rtol=1e-2 if dtype is torch.bfloat16 else 1e-6,
        )
    memory = torch.zeros(8)
    step({"w": memory[::2]}, {"w": torch.ones(4)}, tx.init({"w": memory[::2]}))
    assert not memory[1::2].any()
    if donate:
        torch.testing.assert_close(memory[::2], torch.full((4,), 0.05))


def test_extra_arguments_of_other_shapes_and_strides_are_not_mixed_up():
    tx = fr.Transform(
        fr.init_empty_state,
        lambda u, s, p, *, A: (fr.tree_map(lambda u: u * (A * torch.arange(A.shape[1])).sum(), u), s),
    )
    step = fr.fuse(tx, backend="aot_eager")
    params, A = {"w": torch.ones(3)}, torch.arange(16.0).reshape(4, 4)
    for given in (A, A.T, A[::2], A[:2, :2], A.double()):
        expected = fr.apply_updates(params, tx.update(params, fr.EmptyState(), params, A=given)[0])
        assert_equal(step(params, params, fr.EmptyState(), A=given)[0], expected)


@pytest.mark.parametrize(
    "shapes", [[(4, 3), (2, 3), (1, 3)], [(3, 0), (2, 0)], [(2, 3), (3, 2)], [(5, 1, 2), (4, 1, 2)]]
)
def test_leaves_that_differ_in_their_first_dimension(shapes):
    tx = fr.chain(fr.trace(0.9), fr.scale(-0.1))
    tree = lambda seed: {str(i): torch.randn(shape) + seed for i, shape in enumerate(shapes)}
    for donate in (False, True):
        step = fr.fuse(tx, donate=donate, backend="eager")
        grads = tree(1)
        follow(
            tx,
            step,
            *step.init(tree(0)),
            grads=lambda n, _, grads=grads: fr.tree_map(lambda g: g * n, grads),
            rtol=1e-6,
        )


def test_plans_of_other_layouts_share_no_memory():
    def update(updates, state, params, *, rows):
        return fr.tree_map(lambda u: u / u.norm(dim=1, keepdim=True) if rows else 2 * u, updates), state

    tx = fr.Transform(fr.init_empty_state, update)
    step = fr.fuse(tx, donate=True, backend="eager")
    params, state = step.init({"a": torch.ones(4, 3), "b": torch.ones(2, 3)}, rows=False)
    for rows in (False, True, False):
        grads = fr.tree_map(torch.ones_like, params)
        expected = fr.apply_updates(params, update(grads, state, params, rows=rows)[0])
        params, state = step(params, grads, state, rows=rows)
        assert_equal(params, expected)


def test_a_tensor_that_was_given_other_memory_is_read_there():
    step = fr.fuse(fr.sgd(0.1), donate=True, backend="eager")
    params, state = step.init({"w": torch.ones(3)})
    params["w"].data = torch.zeros(3)
    step(params, {"w": torch.ones(3)}, state)
    torch.testing.assert_close(params["w"], torch.full((3,), -0.1))


def test_a_moment_that_was_given_other_memory_is_read_there():
    tx = fr.trace(0.5)
    step = fr.fuse(tx, donate=True, backend="eager")
    params, state = step.init({"w": torch.zeros(3), "b": torch.zeros(2)})
    grads = {"w": torch.ones(3), "b": torch.ones(2)}
    params, state = step(params, grads, state)
    view = state.trace["w"].data  # Kept, so that as many tensors lie in this memory as before.
    state.trace["b"].data = torch.full((2,), 8.0)
    del view
    params, state = step(params, grads, state)
    torch.testing.assert_close(params["b"], torch.full((2,), 6.0))


@pytest.mark.parametrize("by", [0.0, -0.0, 1e-45, 3e-39, -1e-39, 2e38, float("inf"), float("nan"), -3.0, 1e-60, 1e60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_division_by_a_scalar_is_division_whatever_the_scalar(by, dtype):
    entries = torch.tensor([0.0, -0.0, 1.0, -3e38, 1e-38, 2e-45, float("inf"), float("nan")])
    tx = fr.Transform(fr.init_empty_state, lambda u, s, p, *, by: (fr.tree_map(lambda u: u / by, u), s))
    step = fr.fuse(tx, backend="aot_eager")
    params, by = {"w": torch.zeros(8)}, torch.tensor(by, dtype=dtype)
    after, _ = step(params, {"w": entries}, fr.EmptyState(), by=by)
    expected = (entries.double() / by.float().double()).float()  # As where a tensor meets a scalar.
    torch.testing.assert_close(after["w"], expected, rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("donate", [False, True])
def test_packed_gradients_are_read_where_they_lie(donate, small_buffers):
    tx = fr.chain(fr.clip_by_global_norm(0.5), fr.scale_by_adam(), fr.add_decayed_weights(0.1), fr.scale(-0.1))
    step = fr.fuse(tx, donate=donate, backend="aot_eager")
    params, state = step.init({f"w{i}": torch.full((n,), float(n)) for i, n in enumerate((3, 40, 5, 17, 30, 2, 9, 14))})
    expected = copy.deepcopy((params, state))
    mine = step.gradients(params)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        grads = fr.tree_map(lambda w, g=generator: normal(g, *w.shape, dtype=w.dtype), params)
        fr.tree_map(lambda place, g: place.copy_(g), mine, grads)
        updates, after = tx.update(grads, expected[1], expected[0])
        expected = fr.apply_updates(expected[0], updates), after
        params, state = step(params, mine, state)
        assert_equal((params, state), expected, rtol=1e-5, atol=1e-6)
    mine["w1"].data = torch.zeros(40)  # Another place: it is read there.
    updates, after = tx.update(mine, expected[1], expected[0])
    params, state = step(params, mine, state)
    assert_equal(params, fr.apply_updates(expected[0], updates), rtol=1e-5, atol=1e-6)


def test_memory_of_leaves_with_a_gradient_is_not_used_again():
    step = fr.fuse(fr.sgd(0.1), backend="eager")
    params, state = step.init({"w": torch.ones(1)})
    for _ in range(4):
        params["w"].requires_grad_()
        params["w"].square().sum().backward()
        torch.testing.assert_close(params["w"].grad, 2 * params["w"].detach())
        params, state = step(params, {"w": params["w"].grad}, state)
        assert not params["w"].requires_grad


def test_dictionaries_keep_the_order_of_their_keys():
    step = fr.fuse(fr.sgd(0.1), backend="eager")
    for names in (("a", "b"), ("b", "a"), ("a", "b")):
        params = {name: torch.ones(2) for name in names}
        for _ in range(3):
            params, _ = step(params, params, fr.sgd(0.1).init(params))
            assert tuple(params) == names


def test_zeros_of_both_signs_are_two_constants():
    tx = fr.stateless(
        lambda u, p: {n: torch.copysign(x, torch.full_like(x, 0.0 if n == "a" else -0.0)) for n, x in u.items()}
    )
    step, params = fr.fuse(tx, backend="eager"), {"a": torch.zeros(2), "b": torch.zeros(2)}
    after, _ = step(params, {"a": torch.ones(2), "b": torch.ones(2)}, fr.EmptyState())
    assert (after["a"].tolist(), after["b"].tolist()) == ([1.0, 1.0], [-1.0, -1.0])


def test_captured_tensors_and_arguments_are_told_apart():
    held = torch.full((5,), 2.0)
    tx = fr.Transform(fr.init_empty_state, lambda u, s, p, *, A: ({"a": u["a"] * held, "b": u["b"] * A}, s))
    step, params = fr.fuse(tx, backend="eager"), {"a": torch.zeros(5), "b": torch.zeros(5)}
    ones = {"a": torch.ones(5), "b": torch.ones(5)}
    after, _ = step(params, ones, fr.EmptyState(), A=torch.full((5,), 3.0))
    assert (after["a"][0], after["b"][0]) == (2.0, 3.0)


def test_numbers_in_a_state_are_refused_where_they_cannot_be_written():
    tx = fr.Transform(lambda p: 0, lambda u, s, p: (u, s + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TypeError, match=r"state.*is 0; expected a tensor"):
            fr.fuse(tx, donate=True, backend="eager")({"w": torch.ones(2)}, {"w": torch.ones(2)}, 0)


# What falls back


@pytest.mark.slow
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        lambda u, p: u if fr.global_norm(u) > 1 else fr.tree_map(torch.zeros_like, u),
        lambda u, p: fr.tree_map(lambda u: u * float(u.sum()), u),
        lambda u, p: fr.tree_map(lambda u: u.index_fill(0, torch.tensor([0]), 3.0), u),
        lambda u, p: fr.tree_map(lambda u: torch._foreach_add([u], 1.0)[0], u),
    ],
)
def test_whatever_a_transform_does_there_is_a_step(rule, donate):
    tx = fr.stateless(rule)
    params = {"a": torch.ones(4), "b": torch.ones(4)}
    step = fr.fuse(tx, donate=donate, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        follow(tx, step, params, fr.EmptyState(), grads=lambda n, dtype: {"a": torch.ones(4) * n, "b": torch.ones(4)})


def test_inference_mode_leaves_no_traces():
    step = fr.fuse(fr.sgd(0.1, 0.9), donate=True, backend="eager")
    with torch.inference_mode():
        params, state = step.init({"w": torch.zeros(3)})
    params, state = step(params, {"w": torch.ones(3)}, state)
    torch.testing.assert_close(params["w"], torch.full((3,), -0.1))


def test_what_cannot_be_recorded_is_compiled_leaf_by_leaf_and_said_once():
    def doubled(updates, params):
        return fr.tree_map(lambda u: u.clone().mul_(2), updates)

    for donate in (False, True):
        step = fr.fuse(fr.stateless(doubled), donate=donate, backend="aot_eager")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            params, state = step.init({"w": torch.ones(3)})
            for _ in range(2):
                params, state = step(params, {"w": torch.ones(3)}, state)
        assert [("leaf by leaf" in str(w.message), "in place" in str(w.message)) for w in said] == [(True, True)][
            : 1 - donate
        ]
        assert_equal(params, {"w": torch.full((3,), 5.0)})


def written_in_place(decay):
    def update(updates, state, params):
        for name, u in updates.items():
            state[name].mul_(decay).add_(u.mul_(0.5))
        return fr.tree_map(torch.clone, state), state

    return fr.Transform(lambda params: fr.tree_map(torch.zeros_like, params), update)


@pytest.mark.parametrize("donate", [False, True])
def test_a_transform_that_writes_in_place_is_called_once_a_step_and_not_on_what_init_is_given(donate):
    tx, begin = fr.chain(written_in_place(0.9), fr.sgd(0.1)), {"w": torch.tensor([1.0, -2.0])}
    step = fr.fuse(tx, donate=donate, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        params, state = step.init(begin)
    assert_equal(begin, {"w": torch.tensor([1.0, -2.0])})
    assert_equal(tx.init(begin), state)
    expected, trace = begin["w"].clone(), torch.zeros(2)
    for n in range(3):
        params, state = step(params, {"w": torch.ones(2) * n}, state)
        trace = 0.9 * trace + 0.5 * n
        expected -= 0.1 * trace
    torch.testing.assert_close(params["w"], expected)


def test_a_transform_that_writes_in_place_is_called_once_a_step_of_an_optimizer():
    w, plain = torch.nn.Parameter(torch.ones(3)), torch.ones(3)
    optimizer = fr.Optimizer([("w", w)], lambda lr: fr.chain(written_in_place(0.9), fr.sgd(lr)), lr=0.1)
    trace = torch.zeros(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(1, 4):
            w.grad = torch.ones(3) * n
            optimizer.step()
            trace = 0.9 * trace + 0.5 * n
            plain -= 0.1 * trace
    torch.testing.assert_close(w.detach(), plain)


@pytest.mark.parametrize("donate", [False, True])
def test_without_a_compiler_the_packed_step_runs_with_equal_results_and_says_so_once(donate):
    def broken(module, inputs):
        raise RuntimeError("no compiler here")

    tx = fr.chain(fr.clip_by_global_norm(1.0), fr.adamw(0.1, mask=fr.matrices))
    step = fr.fuse(tx, donate=donate, backend=broken)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        follow(tx, step, *step.init(forest()), rtol=1e-11, atol=1e-12)
    assert len(said) == 1
    assert "without compiled kernels" in str(said[0].message)
    assert "no compiler here" in str(said[0].message)


def test_steps_do_not_compile_where_that_is_forbidden():
    def refused(*_):
        raise AssertionError

    tx = fr.chain(fr.scale_by_adam(), fr.scale(-0.1))
    params, grads = {"a": torch.ones(3)}, {"a": torch.full((3,), 2.0)}
    expected = fr.apply_updates(params, tx.update(grads, tx.init(params), params)[0])
    step = fr.fuse(tx, backend=refused)
    with torch._dynamo.config.patch(disable=True):
        for _ in range(2):
            torch.testing.assert_close(step(params, grads, tx.init(params))[0], expected)


def test_a_state_that_changes_its_shape_is_refused():
    grows = fr.Transform(lambda p: torch.zeros(1), lambda u, s, p: (u, torch.cat([s, s])))
    step = fr.fuse(grows, donate=True, backend="eager")
    with pytest.raises(ValueError, match=r"state.*shape \(2,\); expected \(1,\)"):
        step({"w": torch.ones(2)}, {"w": torch.ones(2)}, torch.zeros(1))


# Penalties in one pass


@every_penalty
def test_values_and_gradients_in_one_pass_are_the_plain_ones(case, small_buffers):
    params = {f"layer{i}": draw(i) for i in range(3)}
    strength = torch.tensor(0.5, dtype=torch.float64)
    if not case.penalty.has_gradient:
        with pytest.raises(TypeError, match="whose gradient is 0 everywhere"):
            fr.value_and_grad(case.penalty, *case.hyper, **case.options)
        return
    f = fr.value_and_grad(
        case.penalty, *case.hyper, strength=strength, mask=fr.matrices, backend="eager", **case.options
    )
    for factor in (1.0, 3.0):
        strength.fill_(0.5 * factor)
        value, slopes = f(params)
        torch.testing.assert_close(value, strength * case.value(params, mask=fr.matrices), rtol=1e-12, atol=0)
        expected = fr.tree_map(lambda g: strength * g, case.grad(params, mask=fr.matrices))
        assert_equal(slopes, expected, rtol=1e-12, atol=1e-15)


def test_values_and_gradients_read_packed_parameters_as_one_vector():
    params, _ = fr.fuse(fr.adam(0.1), donate=True, backend="eager").init(forest())
    for owned in (params, forest()):
        f = fr.value_and_grad(fr.elastic, 0.3, 0.6, backend="eager")
        value, slopes = f(owned)
        torch.testing.assert_close(value, fr.elastic(owned, 0.3, 0.6))
        assert_equal(slopes, fr.elastic.grad(owned, 0.3, 0.6), rtol=1e-12, atol=1e-15)


def test_values_and_gradients_inside_vmap_are_the_plain_functions():
    f = fr.value_and_grad(fr.l1, strength=2.0)
    value, slopes = torch.func.vmap(f)(torch.tensor([[1.0, -2.0], [0.0, 3.0]]))
    assert value.tolist() == [6.0, 6.0]
    assert slopes.tolist() == [[2.0, -2.0], [0.0, 2.0]]
