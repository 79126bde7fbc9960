"""Groups that span leaves: one norm for a channel, which lives or dies whole, and then goes."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re

import pytest
import torch
from cases import DEVICE, assert_equal, flat, tensors
from networks import all_or_nothing
from torch import nn
from torch.func import functional_call, grad, hessian, vmap

import funcreg as fr

# Shapes of leaves and families of groups over them.
FAMILIES = {
    "a convolution and what is around it": (
        {
            "conv.weight": (4, 3, 2, 2),
            "conv.bias": (4,),
            "norm.weight": (4,),
            "next.weight": (5, 4, 3, 3),
            "free": (2,),
        },
        [{"conv.weight": 0, "conv.bias": 0, "norm.weight": 0, "next.weight": 1}],
    ),
    "a linear layer after a flattening": (
        {"conv": (4, 2, 3), "linear": (5, 24)},
        [{"conv": 0, "linear": fr.Along(1, size=6)}],
    ),
    "heads of packed attention": (
        {"in": (18, 4), "bias": (18,), "out": (4, 6)},
        [{"in": fr.Along(0, size=3, packed=3), "bias": fr.Along(0, size=3, packed=3), "out": fr.Along(-1, size=3)}],
    ),
    "two families, and leaves that only follow": (
        {"a": (3, 2), "b": (4, 3), "c": (2, 4), "statistics": (3,)},
        [
            {"a": 0, "b": fr.Along(1, penalized=False), "statistics": fr.Along(0, penalized=False)},
            {"b": 0, "c": 1, "absent": fr.Along(0, penalized=False)},
        ],
    ),
}
every_family = pytest.mark.parametrize(("shapes", "groups"), FAMILIES.values(), ids=FAMILIES)


def labels(shape, where, groups):
    """For each entry of a leaf the number of its group."""
    along = where if isinstance(where, fr.Along) else fr.Along(where)
    dim = along.dim % len(shape)
    index = torch.arange(shape[dim], device=DEVICE) // along.size % groups
    return index.reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


def squares(params, family):
    """The squared norm of each group, entry by entry from the numbers of groups."""
    family = {name: w for name, w in family.items() if not isinstance(w, fr.Along) or w.penalized}
    name, where = next(iter(family.items()))
    along = where if isinstance(where, fr.Along) else fr.Along(where)
    count = params[name].shape[along.dim] // (along.size * along.packed)
    found = torch.zeros(count, dtype=torch.float64, device=DEVICE)
    for name, where in family.items():
        w = params[name]
        found = found.index_add(0, labels(w.shape, where, count).reshape(-1), w.square().reshape(-1))
    return found


@every_family
def test_the_value_is_the_sum_of_norms_over_all_leaves_of_a_group(shapes, groups):
    params = tensors(shapes)
    p = fr.coupled(fr.group_lasso, groups)
    expected = sum(squares(params, family).sqrt().sum() for family in groups)
    torch.testing.assert_close(p(params), expected, rtol=1e-14, atol=0)
    assert_equal(p.grad(params), grad(p)(params), rtol=1e-12, atol=1e-14)
    ones = fr.tree_map(torch.ones_like, params)  # Each group's norm is then the root of its size.
    torch.testing.assert_close(p(ones, weights="sqrt_size"), sum(squares(ones, f).sum() for f in groups))


@every_family
@pytest.mark.parametrize("weighed", [False, True])
def test_the_prox_minimizes_its_objective_also_in_a_metric(shapes, groups, weighed):
    params = tensors(shapes)
    h = fr.tree_map(lambda w: 10**w, tensors(shapes, 9)) if weighed else fr.tree_map(torch.ones_like, params)
    p = fr.coupled(fr.group_lasso, groups)

    def objective(z, step):
        return 0.5 * (flat(h) * (flat(z) - flat(params)).square()).sum() + step * p(z)

    for step in (0.3, 1.5, 4.0, 100.0):
        z = p.prox(params, step, metric=h if weighed else None)
        least = objective(z, step)
        for seed in range(20):
            for size in (1e-5, 1e-2, 1.0):
                other = fr.tree_map(lambda a, d, size=size: a + size * d, z, tensors(shapes, seed + 20))
                assert objective(other, step) >= least - 1e-9
        for family in groups:  # All leaves of a group are zero or none is.
            gone = squares(z, family) == 0
            for name, where in family.items():
                if name in z and not (isinstance(where, fr.Along) and not where.penalized):
                    assert torch.equal(z[name] == 0, gone[labels(z[name].shape, where, len(gone))])
        slope = fr.tree_map(lambda a, b, h: h * (a - b), z, params, h)
        assert fr.kkt_residual(z, slope, p, strength=step) < 1e-10 * step


@pytest.mark.parametrize(
    ("base", "hyper"), [(fr.group_lasso, ()), (fr.sparse_group_lasso, (0.5, 0.4))], ids=["group", "sparse group"]
)
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("weights", [None, "sqrt_size"])
def test_over_a_single_leaf_it_is_the_penalty_itself(base, hyper, dim, weights):
    params, g = tensors({"w": (3, 4, 5)}), tensors({"w": (3, 4, 5)}, 1)
    h = fr.tree_map(lambda w: 1 + w.abs(), g)
    one, options = fr.coupled(base, {"w": dim}), {"weights": weights}
    same = {**options, "dim": tuple(d for d in range(3) if d != dim % 3)}
    close = {"rtol": 1e-13, "atol": 1e-15}
    torch.testing.assert_close(one(params, *hyper, **options), base(params, *hyper, **same), rtol=1e-14, atol=0)
    assert_equal(one.grad(params, *hyper, **options), base.grad(params, *hyper, **same), **close)
    for step in (0.2, 2.0):
        for metric in (None, h):
            assert_equal(
                one.prox(params, step, *hyper, metric=metric, **options),
                base.prox(params, step, *hyper, metric=metric, **same),
                **close,
            )
    assert_equal(one.residual(params, g, *hyper, **options), base.residual(params, g, *hyper, **same), **close)


@pytest.mark.parametrize(
    ("base", "hyper"),
    [
        (fr.group_lasso, ()),
        (fr.group_l0, ()),
        (fr.group_mcp, (1.0, 3.0)),
        (fr.group_scad, (1.0, 3.7)),
        (fr.group_l_half, ()),
        (fr.group_top_k, (1,)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_it_is_convex_where_its_penalty_of_rows_is(base, hyper):
    units, params = fr.coupled(base, {"a": 0, "b": 0}), {"a": torch.ones(2, 2), "b": torch.ones(2)}
    assert units.is_convex(*hyper) == base.is_convex(*hyper) == (base is fr.group_lasso)
    if base is not fr.group_lasso:
        with pytest.raises(ValueError, match=f"coupled.*{base.__name__}.* is not known to be convex"):
            units.prox_dual(params, 0.5, *hyper)


@every_family
def test_groups_of_zeros_have_no_gradient_and_no_nan(shapes, groups):
    p, zeros = fr.coupled(fr.group_lasso, groups), fr.tree_map(torch.zeros_like, tensors(shapes))
    h = fr.tree_map(torch.ones_like, zeros)
    assert not flat(p.grad(zeros)).any()
    assert not flat(grad(p)(zeros)).any()
    assert flat(hessian(p)(zeros)).isfinite().all()
    for params in (zeros, tensors(shapes)):
        for metric in (None, h):
            through = grad(lambda w, metric=metric: flat(p.prox(w, 2.0, metric=metric)).square().sum())(params)
            assert flat(through).isfinite().all()
    assert_equal(p.prox(zeros, 0.0), zeros)


@pytest.mark.parametrize("name", ["a convolution and what is around it", "heads of packed attention"])
@pytest.mark.slow
def test_vmap_is_a_loop_and_compiling_changes_nothing(name):
    shapes, groups = FAMILIES[name]
    p = fr.coupled(fr.sparse_group_lasso, groups)
    members = [tensors(shapes, seed) for seed in range(3)]
    stacked = fr.tree_map(lambda *leaves: torch.stack(leaves), *members)
    h = fr.tree_map(lambda w: 1 + w.abs(), members[0])
    steps = torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)

    def everything(params, step):
        z = p.prox(params, step, 1.0, 0.1, metric=h), p.prox(params, step, step, 0.1)
        return p(params, step, 0.1), p.grad(params, 1.0, 0.1), z, p.residual(params, h, 1.0, 0.1)

    mapped = vmap(everything)(stacked, steps)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for i, (member, step) in enumerate(zip(members, steps, strict=True)):
        expected = everything(member, step)
        assert_equal(fr.tree_map(lambda x, i=i: x[i], mapped), expected, rtol=1e-11, atol=1e-13)
        assert_equal(compiled(member, step), expected, rtol=1e-11, atol=1e-13)


OPTIMIZERS = {
    "prox_adam": lambda p: fr.prox_adam(0.1, p, strength=1.0, weights="sqrt_size"),
    "prox_sgd": lambda p: fr.prox_sgd(fr.linear_schedule(0.1, 0.0, 10), p, strength=2.0, momentum=0.5),
    "a chain": lambda p: fr.chain(fr.clip_by_global_norm(1.0), fr.sgd(0.1), fr.proximal(p, 0.3)),
    "a gradient": lambda p: fr.chain(fr.add_penalty(p, strength=0.3), fr.adam(0.1)),
}


def follow(tx, step, shapes, dtype=torch.float64, **tolerance):
    """Steps, fused and plain, from the same parameters."""
    params, state = step.init(tensors(shapes, dtype=dtype))
    expected, eager = tensors(shapes, dtype=dtype), tx.init(tensors(shapes, dtype=dtype))
    for n in range(4):
        grads = tensors(shapes, n + 1, dtype)
        updates, eager = tx.update(grads, eager, expected)
        expected = fr.apply_updates(expected, updates)
        params, state = step(params, grads, state)
        assert_equal((params, state), (expected, eager), **tolerance)
        assert_equal(fr.tree_map(lambda w: w == 0, params), fr.tree_map(lambda w: w == 0, expected))
    return params


@every_family
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.filterwarnings("error")  # Also when a step cannot be packed.
def test_the_packed_step_is_the_plain_one(shapes, groups, make, donate):
    tx = make(fr.coupled(fr.group_lasso, groups))
    follow(tx, fr.fuse(tx, donate=donate, backend="eager"), shapes, rtol=1e-11, atol=1e-12)


@pytest.mark.slow
def test_the_compiled_step_is_the_plain_one():
    shapes, groups = FAMILIES["a convolution and what is around it"]
    tx = fr.prox_adam(0.1, fr.coupled(fr.group_lasso, groups), strength=60.0)
    params = follow(tx, fr.fuse(tx, donate=True), shapes, torch.float32, rtol=2e-5, atol=1e-6)
    assert 0 < fr.sparsity(params) < 1


def test_members_of_an_ensemble_have_strengths_of_their_own():
    shapes, groups = FAMILIES["a linear layer after a flattening"]
    p, strengths = fr.coupled(fr.group_lasso, groups), torch.tensor([0.0, 3.0, 100.0], dtype=torch.float64)
    step = fr.fuse(fr.ensemble(lambda strength: fr.prox_adam(0.1, p, strength=strength), strengths), backend="eager")
    stack = lambda seed: fr.tree_map(lambda w: torch.stack([w] * 3), tensors(shapes, seed))
    params, state = step.init(stack(0))
    params, state = step(params, stack(1), state)
    for i, strength in enumerate(strengths):
        tx = fr.prox_adam(0.1, p, strength=strength)
        updates, _ = tx.update(tensors(shapes, 1), tx.init(tensors(shapes)), tensors(shapes))
        alone = fr.apply_updates(tensors(shapes), updates)
        assert_equal(fr.tree_map(lambda w, i=i: w[i], params), alone, rtol=1e-12, atol=1e-14)
    assert not params["linear"][2].any()


@pytest.mark.parametrize("make", [fr.fista, fr.prox_adam], ids=["fista", "prox_adam"])
@pytest.mark.slow
def test_the_optimizers_solve_the_problem_of_the_concatenated_rows(make):
    x = tensors({"x": (200, 6)})["x"]
    true = tensors({"w": (4, 6)}, 1)["w"] * torch.tensor([[1.0], [0.0], [1.0], [0.02]], device=DEVICE)
    loss = lambda w: (x @ (w - true).T).square().mean(0).sum() / 2
    split = lambda params: loss(torch.cat([params["a"], params["b"].reshape(4, 2)], 1))
    p = fr.coupled(fr.group_lasso, {"a": 0, "b": fr.Along(0, size=2)})
    params = fr.tree_map(torch.zeros_like, tensors({"a": (4, 4), "b": (8,)}))
    whole = {"w": torch.zeros_like(true)}
    for problem, penalty, start in ((split, p, params), (lambda q: loss(q["w"]), fr.group_lasso, whole)):
        tx, at = make(0.1, penalty, strength=0.2), start
        state = tx.init(at)
        for _ in range(1200 if make is fr.prox_adam else 200):
            updates, state = tx.update(grad(problem)(at), state, at)
            at = fr.apply_updates(at, updates)
        assert fr.kkt_residual(at, grad(problem)(at), penalty, strength=0.2) < 1e-8
        start.update(at)
    joined = torch.cat([params["a"], params["b"].reshape(4, 2)], 1)
    torch.testing.assert_close(joined, whole["w"], rtol=1e-6, atol=1e-7)
    assert (joined == 0).all(1).tolist() == [False, True, False, True]


def test_masks_and_leaves_without_a_family():
    shapes, groups = FAMILIES["a convolution and what is around it"]
    params, p = tensors(shapes), fr.coupled(fr.group_lasso, groups)
    assert_equal({"free": p.prox(params, 100.0)["free"]}, {"free": params["free"]})
    assert not p.grad(params)["free"].any()
    assert_equal(p.residual(params, params)["free"], params["free"])
    head = fr.coupled(fr.group_lasso, {"conv.weight": 0, "conv.bias": 0})
    mask = fr.select("conv.*")
    torch.testing.assert_close(p(params, mask=mask), head(params))
    assert_equal(p.prox(params, 0.5, mask=mask), head.prox(params, 0.5))
    h = fr.tree_map(lambda w: 1 + w.abs(), params)
    assert_equal(p.prox(params, 0.5, mask=mask, metric=h), head.prox(params, 0.5, metric=h))


def test_weights_are_for_groups_and_families():
    shapes, groups = FAMILIES["two families, and leaves that only follow"]
    params = tensors(shapes)
    first, second = (squares(params, family).sqrt() for family in groups)
    p, c = fr.coupled(fr.group_lasso, groups), torch.tensor([1.0, 10.0, 0.0], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(p(params, weights=[c, None]), (c * first).sum() + second.sum())
    torch.testing.assert_close(p(params, weights=("sqrt_size", None)), 2**0.5 * first.sum() + second.sum())
    z = p.prox(params, 0.5, weights=[c, None])
    assert not z["a"][1].any()
    assert_equal(z["a"][2], params["a"][2])
    with pytest.raises(ValueError, match=r"weights has 1 entries; expected 2, one for each family"):
        p(params, weights=[None])
    with pytest.raises(ValueError, match="weights has 3 entries; expected 4, one for each group"):
        p(params, weights=c)


def test_a_family_may_mix_dtypes():
    shapes, groups = FAMILIES["a convolution and what is around it"]
    exact = tensors(shapes)
    params = {**exact, "conv.weight": exact["conv.weight"].bfloat16(), "next.weight": exact["next.weight"].float()}
    exact = fr.tree_map(lambda w: w.double(), params)
    p = fr.coupled(fr.group_lasso, groups)
    assert p(params).dtype == torch.float64
    torch.testing.assert_close(p(params), p(exact))
    z = p.prox(params, 0.5)
    assert [w.dtype for w in z.values()] == [w.dtype for w in params.values()]
    assert_equal(fr.tree_map(lambda w: w.double(), z), p.prox(exact, 0.5), rtol=1e-2)
    mixed = {"a": torch.tensor([3.0 + 0j]), "b": torch.tensor([4.0])}
    assert_equal(
        fr.coupled(fr.group_lasso, {"a": 0, "b": 0}).prox(mixed, 2.5), {"a": mixed["a"] / 2, "b": mixed["b"] / 2}
    )


def test_groups_that_overlap_have_a_value_and_a_gradient_but_no_prox():
    params = tensors({"w": (3, 4), "b": (3,)})
    p = fr.coupled(fr.group_lasso, [{"w": 0, "b": 0}, {"w": 1}])
    columns = params["w"].square().sum(0).sqrt().sum()
    torch.testing.assert_close(p(params), columns + fr.coupled(fr.group_lasso, {"w": 0, "b": 0})(params))
    assert_equal(p.grad(params), grad(p)(params), rtol=1e-12, atol=1e-14)
    for use in (lambda: p.prox(params, 1.0), lambda: p.residual(params, params)):
        with pytest.raises(ValueError, match=r"leaf 'w' is in 2 families of groups: where groups overlap"):
            use()


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ({"v": 0}, ValueError, r"groups names 'v', which is no leaf; the leaves are b, w"),
        ({"w": 2}, ValueError, r"at leaf 'w': its shape \(3, 4\) has no dimension 2"),
        ({"w": 1, "b": 0}, ValueError, r"leaf 'b' of shape \(3,\) has 3 groups .* and 'w' has 4"),
        ({"w": fr.Along(1, size=3)}, ValueError, r"at leaf 'w': dimension 1 of shape \(3, 4\) is no multiple of 3"),
        ({"w": fr.Along(1, size=0)}, ValueError, r"at leaf 'w': groups has .* of at least 1"),
        ({"w": "rows"}, TypeError, r"groups maps 'w' to 'rows'; expected the name of a leaf, and an int or an Along"),
        ({"w": True}, TypeError, r"groups maps 'w' to True"),
        ("w", TypeError, r"groups is 'w'; expected a dict"),
    ],
)
def test_groups_that_do_not_fit_are_errors(groups, error, message):
    params = tensors({"w": (3, 4), "b": (3,)})
    with pytest.raises(error, match=message):
        fr.coupled(fr.group_lasso, groups)(params)
    with pytest.raises(error, match=message):
        fr.remove_dead(params, groups)


def test_what_leaves_of_a_group_share_cannot_be_a_tree():
    params = tensors({"w": (3, 4), "b": (3,)})
    p = fr.coupled(fr.group_lasso, {"w": 0, "b": 0})
    with pytest.raises(ValueError, match=r"is a dict; expected a number or a tensor.*weights="):
        p.prox(params, {"w": 1.0, "b": 2.0})
    with pytest.raises(TypeError, match=r"coupled_group_lasso takes no hyperparameters and the keywords weights"):
        p(params, dim=0)
    with pytest.raises(TypeError, match=r"expected a Penalty of rows"):
        fr.coupled("group_lasso", {"w": 0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"groups is a Linear; expected families of it, as channel_groups\(module"):
        fr.coupled(fr.group_lasso, nn.Linear(3, 4))


# Networks


def statistics(net, seed=0):
    """A network in float64, in evaluation, that has seen something."""
    torch.manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for x in (*layer.parameters(), *layer.buffers()):
                if x.is_floating_point():
                    nn.init.uniform_(x, 0.5, 1.5)
    return net.double().eval().to(DEVICE)


def block(inputs, outputs, kind=nn.Conv2d, norm=nn.BatchNorm2d, **options):
    return nn.Sequential(kind(inputs, outputs, 3, **options), norm(outputs), nn.ReLU())


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 3)), (5,)),
    "linear with norms": (
        lambda: nn.Sequential(
            nn.Linear(5, 7), nn.BatchNorm1d(7), nn.SiLU(), nn.Dropout(), nn.Linear(7, 6, bias=False), nn.Linear(6, 3)
        ),
        (5,),
    ),
    "convolutions, flattened": (
        lambda: nn.Sequential(
            block(2, 6),
            nn.MaxPool2d(2),
            block(6, 5),
            nn.Flatten(),
            nn.BatchNorm1d(20),
            nn.Linear(20, 8),
            nn.ReLU(),
            nn.Linear(8, 3),
        ),
        (2, 10, 10),
    ),
    "convolutions, pooled": (
        lambda: nn.Sequential(
            block(2, 6, padding=1), block(6, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3), nn.Softmax(1)
        ),
        (2, 6, 6),
    ),
    "depthwise": (
        lambda: nn.Sequential(block(2, 6), block(6, 6, groups=6), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)),
        (2, 8, 8),
    ),
    "transposed, of one dimension": (
        lambda: nn.Sequential(
            nn.BatchNorm1d(2),
            block(2, 5, nn.Conv1d, nn.BatchNorm1d),
            nn.ConvTranspose1d(5, 4, 3),
            nn.ELU(),
            nn.ConvTranspose1d(4, 3, 2),
        ),
        (2, 9),
    ),
    "norms without statistics": (
        lambda: nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 3)
        ),
        (5,),
    ),
}
every_net = pytest.mark.parametrize(("make", "shape"), NETS.values(), ids=NETS)


@every_net
def test_a_network_without_its_dead_channels_has_the_same_outputs(make, shape):
    net, x = statistics(make()), torch.randn(4, *shape, dtype=torch.float64, device=DEVICE)
    groups = fr.channel_groups(net)
    params, buffers = {n: w.detach() for n, w in net.named_parameters()}, dict(net.named_buffers())
    p = fr.coupled(fr.group_lasso, groups)
    norms = [squares(params, family).sqrt() for family in groups]
    weights = [(c.sort()[1].sort()[1] < len(c) // 2).double() * 1e6 for c in norms]  # The smaller half of each.
    dead = p.prox(params, 1.0, weights=weights)
    smaller = fr.resized(net, fr.remove_dead({**dead, **buffers}, groups))
    torch.testing.assert_close(smaller(x), functional_call(net, dead, (x,)), rtol=1e-12, atol=1e-12)
    for family, c in zip(groups, norms, strict=True):
        name, along = next(iter(family.items()))
        assert smaller.get_parameter(name).shape[along] == len(c) - len(c) // 2
    assert_equal(dict(fr.resized(net, params).named_parameters()), dict(net.named_parameters()))
    # In training too, without random numbers: what is removed had no part in anything.
    for module in (net, smaller):
        module.train()
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
    expected = functional_call(net, (dead, {n: b.clone() for n, b in buffers.items()}), (x,))
    torch.testing.assert_close(smaller(x), expected, rtol=1e-10, atol=1e-10)


@every_net
def test_families_of_a_network_do_not_overlap_and_miss_only_the_last_bias(make, shape):
    net = make()
    penalized = [
        name
        for family in fr.channel_groups(net)
        for name, where in family.items()
        if not isinstance(where, fr.Along) or where.penalized
    ]
    assert len(set(penalized)) == len(penalized)
    layers = [n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    left = {name for name, _ in net.named_parameters()} - set(penalized)
    assert left - {"0.weight", "0.bias"} == {f"{layers[-1]}.bias"}  # And a norm before the first layer.
    inside = fr.channel_groups(net, "part")
    assert [f"part.{name}" for family in fr.channel_groups(net) for name in family] == [n for f in inside for n in f]


@all_or_nothing
@pytest.mark.parametrize(
    ("make", "shape", "start"),
    [
        (*net, start)
        for name, net in NETS.items()
        for start in (0, 1)
        if (name, start) != ("norms without statistics", 1)  # It has one layer that another one reads.
    ],
)
def test_every_second_layer_has_norms_of_all_that_belongs_to_a_channel(make, shape, start):
    net, x = statistics(make()), torch.randn(4, *shape, dtype=torch.float64, device=DEVICE)
    owners = [next(iter(family)).rpartition(".")[0] for family in fr.channel_groups(net)]
    chosen = owners[start::2]
    groups = fr.channel_groups(net, layers=chosen)
    assert [next(iter(family)).rpartition(".")[0] for family in groups] == chosen
    params, buffers = {n: w.detach() for n, w in net.named_parameters()}, dict(net.named_buffers())
    for family in groups:
        norm = squares(params, {n: w for n, w in family.items() if n in params}).sqrt()
        torch.testing.assert_close(fr.coupled(fr.group_lasso, family)(params), norm.sum(), rtol=1e-12, atol=1e-12)
        assert all(not isinstance(along, fr.Along) or along.penalized for n, along in family.items() if n in params)
    dead = fr.coupled(fr.group_lasso, groups).prox(params, 1e6)
    smaller = fr.resized(net, fr.remove_dead({**dead, **buffers}, groups))
    torch.testing.assert_close(smaller(x), functional_call(net, dead, (x,)), rtol=1e-12, atol=1e-12)


def test_it_has_a_rule_in_a_metric_where_its_penalty_of_rows_has_one():
    params = {"0.weight": torch.ones(2, 3), "2.weight": torch.ones(1, 2)}
    groups = {"0.weight": 0, "2.weight": 1}
    own = fr.penalty(
        gradient=lambda w: fr.group_lasso.grad(w),
        proximal=lambda w, step: fr.group_lasso.prox(w, step),
        separable=False,
    )(lambda w: w.square().sum(1).sqrt())
    assert fr.coupled(fr.group_lasso, groups).in_metric(params)
    shared = fr.coupled(own, groups)
    assert not shared.in_metric(params)
    tx = fr.prox_adam(0.1, shared, strength=1e3)  # One number of the metric for all leaves.
    updates, _ = tx.update(params, tx.init(params), params)
    assert not any(w.any() for w in fr.apply_updates(params, updates).values())


def test_layers_that_form_groups_are_layers_that_others_read():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    for wrong in (["2"], ["1"], "0"):
        with pytest.raises(ValueError, match=r"layers is .*; expected names among '0'"):
            fr.channel_groups(net, layers=wrong)
    assert fr.channel_groups(net, layers=[]) == []


def test_layers_that_channels_are_followed_through_keep_zeros():
    followed = set()
    for name, kind in vars(nn).items():
        if not isinstance(kind, type) or not issubclass(kind, nn.Module) or name.startswith("Lazy"):
            continue
        try:
            layer = kind(2) if "Pool" in name or "Pad" in name else kind()
            pixels = int(next((d for d in "13" if name.endswith(d + "d")), "2"))
            convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[pixels - 1]
            fr.channel_groups(nn.Sequential(convolution(1, 3, 1), layer, convolution(3, 1, 1)))
        except (Warning, TypeError, ValueError):  # Deprecated, in need of other arguments, or refused.
            continue
        followed.add(name)
        layer = kind(scale_factor=2) if isinstance(layer, nn.Upsample) else layer
        assert not layer(torch.zeros(2, 3, *[4] * pixels)).any(), name
    assert {"ReLU", "GELU", "Dropout2d", "MaxPool2d", "AdaptiveAvgPool3d", "Identity"} <= followed
    assert not {"Sigmoid", "Softplus", "LayerNorm", "PReLU", "AlphaDropout", "InstanceNorm2d"} & followed


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1)], r"through '1', a Sigmoid: it may mix them"),
        ([nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1)], r"'1', a LayerNorm"),
        ([nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 1, 1)], r"'1', a Conv2d: it has groups=2"),
        ([nn.Conv2d(2, 4, 1), nn.Linear(4, 1)], r"'1', a Linear: a Flatten belongs between"),
        ([nn.Linear(2, 4), nn.Conv1d(4, 1, 1)], r"'1', a Conv1d: it takes pixels"),
        ([nn.Linear(2, 3), nn.Linear(4, 1)], r"'1', a Linear: it takes 4 channels, and 3 come in"),
        ([nn.Conv1d(2, 3, 1), nn.Flatten(), nn.Linear(4, 1)], r"'2', a Linear: it takes 4 channels, and 3 come in"),
        ([nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 1)], r"'1', a BatchNorm1d: without a scale"),
        ([nn.Linear(2, 3), nn.Bilinear(3, 3, 2), nn.Linear(2, 1)], r"'1', a Bilinear"),
        ([nn.Linear(3, 3)] * 2, r"'1', a Linear: it is used twice"),
        ([nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), nn.Linear(3, 1)], r"no parameter weight"),
    ],
)
def test_networks_whose_channels_cannot_be_followed_are_errors(layers, message):
    with pytest.raises(ValueError, match=message):
        fr.channel_groups(nn.Sequential(*layers))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Own(), r"got an Own; expected torch.nn.Sequential.*prefix="),
        (nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 1)]), "got a ModuleList; expected torch.nn.Sequential"),
        (nn.Linear(2, 3), "got a Linear; expected torch.nn.Sequential"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(6, 3)),
            "no layer whose channels another one reads: the sequence has '1'",
        ),
        (nn.Sequential(Own(), Own()), "no linear layer or convolution.* are not seen"),
        (nn.Sequential(), "no layer whose channels another one reads"),
    ],
)
def test_networks_without_groups_are_errors(module, message):
    with pytest.raises(ValueError, match=message):
        fr.channel_groups(module)
    with pytest.raises(TypeError, match=r"module is a list; expected torch\.nn"):
        fr.channel_groups([nn.Linear(2, 3)])  # pyright: ignore[reportArgumentType]


EMPTY_GROUPS = {
    "no family": ([], "groups has no family"),
    "an empty family": ({}, "family 0 of groups names no leaf"),
    "one family of two": ([{"a": 0}, {}], "family 1 of groups names no leaf"),
    "nothing penalized": ({"a": fr.Along(0, penalized=False)}, "family 0 of groups names only leaves .*: a;"),
}


@pytest.mark.parametrize(("groups", "message"), EMPTY_GROUPS.values(), ids=EMPTY_GROUPS)
def test_groups_that_penalize_nothing_are_errors(groups, message):
    params = {"a": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        fr.coupled(fr.group_lasso, groups)
    for use in (fr.coupled(fr.group_lasso, lambda params: groups), lambda params: fr.remove_dead(params, groups)):
        with pytest.raises(ValueError, match=message):
            use(params)


def test_families_of_a_deep_network_are_printed_and_named_in_messages_by_the_first():
    families = [{f"{i}.weight": 0, f"{i}.bias": 0, f"{i + 1}.weight": fr.Along(1)} for i in range(50)]
    few, many = fr.coupled(fr.group_lasso, families[:3]), fr.coupled(fr.group_lasso, families)
    assert all(name in repr(few) for family in families[:3] for name in family)
    first = "{'0.weight': 0, '0.bias': 0, '1.weight': Along(1)}"
    assert repr(many) == f"coupled(group_lasso, [{first}, ... 49 more])"
    with pytest.warns(UserWarning, match="stands after") as caught:
        fr.chain(fr.prox_sgd(0.1, many), fr.scale(0.5))
    assert len(str(caught[0].message)) < 400


def test_places_of_groups_print_as_written_and_come_back_from_a_pickle():
    along = fr.Along(1, size=3, penalized=False)
    assert repr(along) == "Along(1, size=3, penalized=False)"
    assert pickle.loads(pickle.dumps(along)) == copy.deepcopy(along) == along
    assert repr(fr.Along(0)) == "Along(0)"
    file = io.BytesIO()
    torch.save({"0.weight": along}, file)
    file.seek(0)
    assert torch.load(file) == {"0.weight": along}  # Of weights only.


@all_or_nothing
def test_what_is_resized_must_be_known():
    net = nn.Sequential(nn.Linear(2, 3), nn.NLLLoss(torch.ones(3)))
    with pytest.raises(ValueError, match=r"resized got '0.scale', which the module has not"):
        fr.resized(net, {"0.scale": torch.ones(3)})
    with pytest.raises(ValueError, match=r"'1.weight' has another shape .* change a NLLLoss"):
        fr.resized(net, {"1.weight": torch.ones(2)})
    normal = block(1, 3)
    with pytest.raises(ValueError, match=r"of '1'. Are its running statistics missing"):
        fr.resized(normal, fr.remove_dead({n: w[:2] for n, w in normal.named_parameters()}, {"0.weight": 0}))
    frozen = nn.Linear(2, 3).requires_grad_(False)
    narrow = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
    assert not fr.resized(frozen, narrow).get_parameter("weight").requires_grad
    with pytest.raises(ValueError, match=r"bias of '' has 3 entries, and its weight gives 1 channels"):
        fr.resized(frozen, {"weight": torch.ones(1, 2)})
    with pytest.raises(ValueError, match="resized got a tree without leaves"):
        fr.resized(net, {})
    with pytest.raises(TypeError, match=r"resized got a float for '0\.weight'; expected a tensor"):
        fr.resized(net, {"0.weight": 1.0})
    with pytest.raises(TypeError, match=r"module is a dict; expected a torch\.nn"):
        fr.resized({}, {})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("layers", "families", "message"),
    [
        ([nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)], {"0.weight": 0, "0.bias": 0}, "'0' gives 3 .* '2' takes 8,"),
        ([nn.Linear(2, 8), nn.Linear(8, 2)], {"1.weight": 1}, "'0' gives 8 channels and '1' takes 3,"),
        ([nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 1)], {"0.weight": 0, "0.bias": 0}, "'0' gives 3 .* '1' takes 8"),
        (
            [nn.Conv2d(2, 8, 1), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), nn.Conv2d(8, 2, 1)],
            {"0.weight": 0, "0.bias": 0, "2.weight": 1},
            "'0' gives 3 .* '1.0' takes 8",
        ),
        (
            [nn.Conv2d(2, 8, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 2)],
            {"0.weight": 0, "0.bias": 0},
            "'0' gives 3 .* '3' takes 32",
        ),
        ([nn.Linear(2, 8), nn.LayerNorm(8), nn.Linear(8, 2)], {"0.weight": 0, "0.bias": 0, "2.weight": 1}, "'1' takes"),
        ([nn.Conv1d(2, 8, 1), nn.GroupNorm(4, 8)], {"0.weight": 0, "0.bias": 0}, "'1' takes 8"),
        ([nn.Conv1d(2, 8, 1), nn.InstanceNorm1d(8, affine=True)], {"0.weight": 0, "0.bias": 0}, "'1' takes 8"),
        ([nn.Linear(2, 8), nn.PReLU(8)], {"0.weight": 0, "0.bias": 0}, "'1' takes 8"),
        ([nn.Linear(2, 8), nn.Sigmoid(), nn.Linear(8, 2)], {"0.weight": 0, "0.bias": 0}, "'2' takes 8"),
        ([nn.Embedding(5, 8), nn.Linear(8, 2)], {"1.weight": 1}, "'0' gives 8 channels and '1' takes 3"),
    ],
)
def test_layers_that_do_not_meet_after_a_removal_are_an_error(layers, families, message):
    net = nn.Sequential(*layers)
    params = {name: w.detach().clone() for name, w in net.named_parameters()}
    for name, dim in families.items():
        params[name].movedim(dim, 0)[3:] = 0
    smaller = fr.remove_dead(params, families)
    for module, prefix in ((net, ""), (nn.ModuleDict({"part": net}), "part.")):
        with pytest.raises(ValueError, match=re.sub(r"'(?=\d)", f"'{prefix}", message)):
            fr.resized(module, {prefix + name: w for name, w in smaller.items()})


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(2, 8, 1), nn.LayerNorm(8), nn.Linear(8, 2)],  # These act on pixels.
        [nn.Conv2d(2, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 2, 1)],
        [nn.Linear(2, 8), nn.GLU(), nn.Linear(4, 2)],
        [nn.Linear(2, 8), nn.Sequential(nn.Bilinear(8, 8, 2)), nn.Linear(2, 8)],
    ],
)
def test_layers_between_which_channels_cannot_be_followed_are_left_to_the_user(layers):
    net = nn.Sequential(*layers)
    params = {name: w.detach()[:4] if name.startswith("0.") else w.detach() for name, w in net.named_parameters()}
    fr.resized(net, params)


def test_one_group_stays_of_a_family_that_is_all_dead():
    params = fr.tree_map(torch.zeros_like, tensors({"a": (3, 2), "b": (4, 6), "c": (2,)}))
    with pytest.warns(UserWarning, match=r"all groups are dead in the family of 'a' \(3 groups\), of which one stays"):
        smaller = fr.remove_dead(params, {"a": 0, "b": fr.Along(1, size=2)})
    assert {name: tuple(w.shape) for name, w in smaller.items()} == {"a": (1, 2), "b": (4, 2), "c": (2,)}
    whole = tensors({"a": (3, 2), "b": (4, 6), "c": (2,)})
    with pytest.warns(UserWarning, match="found no dead group"):
        assert_equal(fr.remove_dead(whole, {"a": 0, "b": fr.Along(1, size=2)}), whole)
    nan = {"a": torch.tensor([[math.nan], [0.0]])}
    assert fr.remove_dead(nan, {"a": 0})["a"].isnan().all()  # What is not a number is not zero.


def test_dead_heads_of_attention_may_be_removed():
    def attention(params, x, size=3):
        q, k, v = (x @ params["in"].T + params["bias"]).unflatten(-1, (3, -1, size)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        return seen.transpose(1, 2).flatten(2) @ params["out"].T

    heads = {"in": fr.Along(0, 3, 3), "bias": fr.Along(0, 3, 3), "out": fr.Along(1, 3)}
    params = tensors({"in": (36, 5), "bias": (36,), "out": (5, 12), "x": (2, 7, 5)})
    x = params.pop("x")
    c = torch.tensor([0.0, 1e3, 0.1, 1e3], dtype=torch.float64, device=DEVICE)
    dead = fr.coupled(fr.group_lasso, heads).prox(params, 1.0, weights=c)
    smaller = fr.remove_dead(dead, heads)
    assert smaller["out"].shape == (5, 6)
    torch.testing.assert_close(attention(smaller, x), attention(dead, x), rtol=1e-12, atol=1e-12)
