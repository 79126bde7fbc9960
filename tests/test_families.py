"""Families whose groups are a part of a leaf, lie in several places of it, or follow an order of their own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import DEVICE, assert_equal, normal, tensors
from networks import all_or_nothing
from torch import nn
from torch.func import functional_call, grad, vmap

import funcreg as fr


def chosen(entries):
    """A part of a leaf, taken out and put back."""
    return lambda w, dim: w.index_select(dim, torch.tensor(entries, device=DEVICE))


# Shapes of leaves, families over parts of them, and the same families over leaves that are these parts.
PARTS = {
    "parts of one dimension": (
        {"w": (7, 3), "b": (4,), "free": (2,)},
        [{"w": fr.Along(0, start=3), "b": 0}],
        {"w": (0, [[3, 4, 5, 6]]), "b": (0, [[0, 1, 2, 3]])},
        [{"w/0": 0, "b/0": 0}],
    ),
    "two families side by side": (
        {"a": (4, 2), "b": (3, 2), "read": (5, 7)},
        [{"a": 0, "read": fr.Along(1, stop=4)}, {"b": 0, "read": fr.Along(-1, start=4, stop=7)}],
        {"a": (0, [[0, 1, 2, 3]]), "b": (0, [[0, 1, 2]]), "read": (1, [[0, 1, 2, 3], [4, 5, 6]])},
        [{"a/0": 0, "read/0": 1}, {"b/0": 0, "read/1": 1}],
    ),
    "packed heads after something else": (
        {"in": (16, 2), "out": (2, 6)},
        [{"in": fr.Along(0, size=3, packed=2, start=4), "out": fr.Along(1, size=3)}],
        {"in": (0, [list(range(4, 16))]), "out": (1, [list(range(6))])},
        [{"in/0": fr.Along(0, size=3, packed=2), "out/0": fr.Along(1, size=3)}],
    ),
    "an order of their own": (
        {"w": (6, 2), "b": (2,)},
        [{"w": fr.Along(0, entries=((5, 1), (0, 2))), "b": 0}],
        {"w": (0, [[5, 1, 0, 2]]), "b": (0, [[0, 1]])},
        [{"w/0": fr.Along(0, size=2), "b/0": 0}],
    ),
    "several places of one leaf": (
        {"w": (6, 6), "b": (2,)},
        [{"w": (fr.Along(0, stop=2), fr.Along(0, start=4), fr.Along(1, size=3, penalized=False)), "b": 0}],
        {"w": (0, [[0, 1], [4, 5]]), "b": (0, [[0, 1]])},
        [{"w/0": 0, "w/1": 0, "b/0": 0}],
    ),
}
every_part = pytest.mark.parametrize(("shapes", "groups", "cut", "same"), PARTS.values(), ids=PARTS)


def parted(params, cut):
    """The parts of leaves that groups are in, as leaves of their own."""
    return {
        f"{name}/{i}": chosen(entries)(params[name], dim)
        for name, (dim, several) in cut.items()
        for i, entries in enumerate(several)
    }


def joined(params, parts, cut):
    """Parameters with these parts in their places."""
    made = {name: w.clone() for name, w in params.items()}
    for name, (dim, several) in cut.items():
        for i, entries in enumerate(several):
            made[name].movedim(dim, 0)[entries] = parts[f"{name}/{i}"].movedim(dim, 0)
    return made


@every_part
def test_a_part_of_a_leaf_is_penalized_as_a_leaf_of_its_own(shapes, groups, cut, same):
    params, g = tensors(shapes), tensors(shapes, 1)
    h = fr.tree_map(lambda w: 1 + w.abs(), g)
    p, q = fr.coupled(fr.sparse_group_lasso, groups), fr.coupled(fr.sparse_group_lasso, same)
    parts = parted(params, cut)
    for options in ({}, {"weights": "sqrt_size"}):
        torch.testing.assert_close(p(params, 0.4, 0.3, **options), q(parts, 0.4, 0.3, **options))
        slopes = joined(fr.tree_map(torch.zeros_like, params), q.grad(parts, 0.4, 0.3, **options), cut)
        assert_equal(p.grad(params, 0.4, 0.3, **options), slopes)
        assert_equal(grad(lambda w, o=options: p(w, 0.4, 0.3, **o))(params), slopes, rtol=1e-12, atol=1e-14)
        for metric in (None, h):
            z = q.prox(parts, 0.9, 0.4, 0.3, metric=metric and parted(metric, cut), **options)
            assert_equal(p.prox(params, 0.9, 0.4, 0.3, metric=metric, **options), joined(params, z, cut))
        r = q.residual(parts, parted(g, cut), 0.4, 0.3, **options)
        assert_equal(p.residual(params, g, 0.4, 0.3, **options), joined(g, r, cut))


@pytest.mark.slow
@every_part
def test_it_is_mapped_compiled_and_fused_as_it_is_written(shapes, groups, cut, same):
    p, members = fr.coupled(fr.group_lasso, groups), [tensors(shapes, seed) for seed in range(2)]
    everything = lambda w: (p(w), p.grad(w), p.prox(w, 1.0), p.residual(w, w))
    mapped = vmap(everything)(fr.tree_map(lambda *w: torch.stack(w), *members))
    assert_equal(fr.tree_map(lambda x: x[1], mapped), everything(members[1]), rtol=1e-12, atol=1e-14)
    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    assert_equal(compiled(members[0]), everything(members[0]), rtol=1e-12, atol=1e-14)
    tx = fr.prox_adam(0.1, p, strength=3.0)
    step = fr.fuse(tx, backend="eager")
    params, state = step.init(tensors(shapes))
    params, _ = step(params, tensors(shapes, 5), state)
    updates, _ = tx.update(tensors(shapes, 5), tx.init(members[0]), members[0])
    assert_equal(params, fr.apply_updates(members[0], updates), rtol=1e-12, atol=1e-14)


@every_part
def test_what_is_dead_in_a_part_goes_and_the_rest_stays(shapes, groups, cut, same):
    params = tensors(shapes)
    weights = [torch.tensor([1e6, 0.0] + [0.0] * (n - 2), device=DEVICE) for n in counts(groups, params)]
    dead = fr.coupled(fr.group_lasso, groups).prox(params, 1.0, weights=weights)
    smaller = fr.remove_dead(dead, groups)
    gone: dict[tuple[str, int], int] = {}
    for family in groups:
        for name, where in family.items():
            for a in several(where):
                place = name, a.dim % params[name].ndim
                gone[place] = gone.get(place, 0) + (a.size * a.packed if a.entries is None else len(a.entries[0]))
    for (name, dim), less in gone.items():
        assert smaller[name].shape[dim] == params[name].shape[dim] - less
    # What stays is what it was, but for columns that only dead groups are read by.
    living = read_by_living(dead, groups)
    total = lambda tree: {name: w.square().sum() for name, w in tree.items()}
    assert_equal(total(smaller), total(living), rtol=1e-14)


def several(where):
    parts = where if isinstance(where, tuple) and not isinstance(where, fr.Along) else (where,)
    return [a if isinstance(a, fr.Along) else fr.Along(a) for a in parts]


def counts(groups, params):
    found = []
    for family in groups:
        name, where = next(iter(family.items()))
        a = several(where)[0]
        stop = params[name].shape[a.dim] if a.stop is None else a.stop
        found.append((stop - a.start) // (a.size * a.packed) if a.entries is None else len(a.entries))
    return found


def read_by_living(params, groups):
    """Parameters with zeros also where the first group of each family is read."""
    made = {name: w.clone() for name, w in params.items()}
    for family in groups:
        for name, where in family.items():
            for a in several(where):
                stop = made[name].shape[a.dim] if a.stop is None else a.stop
                block = (stop - a.start) // a.packed
                places = [a.start + k * block + s for k in range(a.packed) for s in range(a.size)]
                made[name].movedim(a.dim, 0)[list(a.entries[0]) if a.entries else places] = 0
    return made


def test_entries_in_two_families_have_no_prox_and_entries_side_by_side_have_one():
    params = tensors({"w": (4, 4)})
    for groups in (
        [{"w": fr.Along(0, stop=2)}, {"w": fr.Along(0, start=1)}],
        [{"w": fr.Along(0, stop=2)}, {"w": fr.Along(0, entries=((1,), (3,)))}],
        [{"w": (fr.Along(0, stop=2), fr.Along(1, stop=2))}],
    ):
        p = fr.coupled(fr.group_lasso, groups)
        assert_equal(p.grad(params), grad(p)(params), rtol=1e-12, atol=1e-14)
        with pytest.raises(ValueError, match="leaf 'w' is in 2 families of groups: where groups overlap"):
            p.prox(params, 1.0)
    fr.coupled(fr.group_lasso, [{"w": fr.Along(0, entries=((0,), (3,)))}, {"w": fr.Along(-2, start=1, stop=3)}]).prox(
        params, 1.0
    )


@pytest.mark.parametrize(
    ("along", "message"),
    [
        (fr.Along(0, start=-1), "expected a start of at least 0 and a later stop"),
        (fr.Along(0, start=2, stop=2), "expected a start of at least 0 and a later stop"),
        (fr.Along(0, start=4), r"dimension 0 of shape \(4, 3\) ends before Along\(0, start=4\)"),
        (fr.Along(0, stop=5), r"dimension 0 of shape \(4, 3\) ends before Along\(0, stop=5\)"),
        (fr.Along(0, size=2, start=1), r"\(4, 3\) from 1 to 4 is no multiple of 2"),
        (fr.Along(0, size=2, entries=((1,),)), "expected entries, or what says them by their order"),
        (fr.Along(0, entries=()), "expected as many entries in each group, at least one"),
        (fr.Along(0, entries=((0, 1), (2,))), "expected as many entries in each group, at least one"),
        (fr.Along(0, entries=((0, 1), (1, 2))), "expected no entry twice"),
        (fr.Along(0, entries=((0, 4),)), "has no such entries as"),
        (fr.Along(0, entries=((-1,),)), "has no such entries as"),
    ],
)
def test_parts_that_a_leaf_has_not_are_errors(along, message):
    params = tensors({"w": (4, 3)})
    for use in (lambda: fr.coupled(fr.group_lasso, {"w": along})(params), lambda: fr.remove_dead(params, {"w": along})):
        with pytest.raises(ValueError, match=message):
            use()


def test_parts_print_as_written_and_come_back_from_a_pickle():
    for along, text in (
        (fr.Along(0, start=2, stop=4, penalized=False), "Along(0, penalized=False, start=2, stop=4)"),
        (fr.Along(1, entries=((0, 2), (1, 3))), "Along(1, entries=((0, 2), (1, 3)))"),
    ):
        assert repr(along) == text
        assert eval(text, {"Along": fr.Along}) == pickle.loads(pickle.dumps(along)) == copy.copy(along) == along
    with pytest.raises(TypeError, match=r"groups maps 'w' to \(\); expected"):
        fr.coupled(fr.group_lasso, {"w": ()})


# Removal


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).double().eval()
    with torch.no_grad():
        for w in (*list(net[0].parameters()), *list(net[1].parameters())):
            w[[0, 2, 5]] = 0
        net[3].weight[:, [0, 2, 5]] = 0
    return net.to(DEVICE), fr.channel_groups(net)


def test_parameters_and_buffers_come_in_one_tree():
    net, groups = small()
    tree = fr.with_buffers(net)
    assert list(tree) == [*dict(net.named_parameters()), *dict(net.named_buffers())]
    assert not any(w.requires_grad for w in tree.values())
    smaller = fr.resized(net, fr.remove_dead(tree, groups))
    x = normal(torch.Generator().manual_seed(1), 4, 3).double()
    torch.testing.assert_close(smaller(x), net(x))
    assert smaller[0].out_features == 5
    with pytest.raises(TypeError, match=r"module is a dict; expected a torch\.nn\.Module"):
        fr.with_buffers({})  # pyright: ignore[reportArgumentType]


@all_or_nothing
@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (2, 6), (3, 6), (4, 8), (16, 8)])
def test_numbers_of_channels_are_rounded_up_with_dead_ones(multiple, width):
    net, groups = small()
    smaller = fr.resized(net, fr.remove_dead(fr.with_buffers(net), groups, round_to=multiple))
    x = normal(torch.Generator().manual_seed(1), 4, 3).double()
    torch.testing.assert_close(smaller(x), net(x))
    assert smaller[0].out_features == width
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match=r"round_to is .*; expected a whole number of at least 1"):
            fr.remove_dead(fr.with_buffers(net), groups, round_to=wrong)


def test_the_state_of_a_transform_is_sliced_as_its_parameters_are():
    net, groups = small()
    params = {n: w.detach().clone() for n, w in net.named_parameters()}
    tx = fr.chain(fr.clip_by_global_norm(1.0), fr.adam(0.1))
    state, average = tx.init(params), {"average": dict(params), "of": 3}
    for seed in range(3):  # Moments of dead channels are not zero.
        _, state = tx.update(tensors({n: w.shape for n, w in params.items()}, seed), state, params)
    whole = fr.with_buffers(net)
    for tree in (params, whole):
        smaller, moments, mean = fr.remove_dead(tree, groups, state, average)
        assert_equal(smaller, fr.remove_dead(tree, groups))
        assert_equal(mean["average"], fr.remove_dead(params, groups))
        assert mean["of"] == 3
        shapes = [w.shape for w in fr.tree_leaves(tx.init(fr.remove_dead(params, groups)))]
        assert [w.shape for w in fr.tree_leaves(moments)] == shapes
    kept = params["0.weight"].any(1)
    first = fr.tree_paths(state).index(next(path for path in fr.tree_paths(state) if "mu.0.weight" in path))
    assert_equal(fr.tree_leaves(moments)[first], fr.tree_leaves(state)[first][kept])
    smaller = fr.remove_dead(params, groups)
    grads = fr.tree_map(torch.ones_like, smaller)
    tx.update(grads, moments, smaller)  # Training goes on.
    with pytest.raises(ValueError, match=r"a state has the leaf '.*' of shape .*; expected the same"):
        fr.remove_dead(params, groups, moments)


@all_or_nothing
@pytest.mark.parametrize("named", [False, True])
def test_the_state_of_a_torch_optimizer_is_sliced_as_its_parameters_are(named):
    net, groups = small()
    entries = list(net.named_parameters())[::-1] if named else list(net.parameters())
    optimizer = torch.optim.Adam(entries, lr=0.1)
    x = normal(torch.Generator().manual_seed(1), 4, 3).double()
    before = copy.deepcopy(net.state_dict())
    net(x).square().sum().backward()
    optimizer.step()
    net.load_state_dict(before)  # The moments are there, and the dead channels too.
    tree, state = fr.remove_dead(fr.with_buffers(net), groups, optimizer.state_dict())
    smaller = fr.resized(net, tree)
    entries = list(smaller.named_parameters())[::-1] if named else list(smaller.parameters())
    again = torch.optim.Adam(entries, lr=0.1)
    again.load_state_dict(state)
    for each in (net, smaller):
        each.zero_grad()
        each(x).square().sum().backward()
    again.step()
    optimizer.step()
    alive = before["0.weight"].any(1)
    torch.testing.assert_close(smaller[0].weight, net[0].weight[alive])
    torch.testing.assert_close(smaller[3].weight, net[3].weight[:, alive])
    with pytest.raises(ValueError, match="the state of an optimizer is for 70 parameters"):
        fr.remove_dead(tree, groups, {"state": {}, "param_groups": [{"params": list(range(70))}]})


def rows_dead():
    """Layers of one shape with two dead units each, at other places in each, and their groups."""
    net = nn.Sequential(*[nn.Linear(6, 6, dtype=torch.float64) for _ in range(4)])
    groups = [{f"{i}.weight": 0, f"{i}.bias": 0, f"{i + 1}.weight": fr.Along(1, penalized=False)} for i in range(3)]
    with torch.no_grad():
        for i in range(3):
            net[i].weight[i : i + 2], net[i].bias[i : i + 2] = 0, 0
    return net, groups


def by_layer(net, named):
    """Groups of an optimizer in another order than the network's."""
    return [{"params": list(net[i].named_parameters(f"{i}") if named else net[i].parameters())} for i in (2, 0, 3, 1)]


def counted_steps(net, groups):
    optimizer = torch.optim.Adam(groups, lr=0.0)
    for w in net.parameters():
        w.grad = torch.arange(w.numel(), dtype=w.dtype).view_as(w)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("told", ["by names", "by names=", "by distributed names"])
def test_moments_are_those_of_their_parameters_whatever_the_order_of_groups(told):
    net, families = rows_dead()
    optimizer = counted_steps(net, by_layer(net, told == "by names"))
    known = {w: name for name, w in net.named_parameters()}
    order = [known[w] for group in optimizer.param_groups for w in group["params"]]
    state = optimizer.state_dict()
    if told == "by distributed names":
        state = {
            "state": {order[number]: entries for number, entries in state["state"].items()},
            "param_groups": [
                {**group, "params": [order[n] for n in group["params"]]} for group in state["param_groups"]
            ],
        }
    tree = fr.with_buffers(net)
    options = {"names": order} if told == "by names=" else {}
    _, moments = fr.remove_dead(tree, families, state, **options)
    gradients, expected = {name: w.grad for name, w in net.named_parameters()}, {}
    for i in range(4):
        stays = [n for n in range(6) if i == 3 or n not in (i, i + 1)]
        read = [n for n in range(6) if i == 0 or n not in (i - 1, i)]
        expected[f"{i}.weight"] = gradients[f"{i}.weight"][stays][:, read]
        expected[f"{i}.bias"] = gradients[f"{i}.bias"][stays]
    numbers = [number for group in moments["param_groups"] for number in group["params"]]
    found = {name: 10 * moments["state"][number]["exp_avg"] for name, number in zip(order, numbers, strict=True)}
    torch.testing.assert_close(found, expected)


def test_moments_whose_parameters_are_not_known_are_refused():
    net, families = rows_dead()
    tree, grouped = fr.with_buffers(net), counted_steps(net, by_layer(net, False)).state_dict()
    with pytest.raises(ValueError, match=r"8 parameters in 4 groups, and does not say their names.*named_parameters"):
        fr.remove_dead(tree, families, grouped)
    some = counted_steps(net, [*net[1:].parameters()]).state_dict()  # The first layer is frozen.
    with pytest.raises(ValueError, match="6 parameters in 1 groups, and does not say their names"):
        fr.remove_dead(tree, families, some)
    nested = {str(i): {"weight": net[i].weight.detach(), "bias": net[i].bias.detach()} for i in range(4)}
    with pytest.raises(ValueError, match="does not say their names"):  # A nested tree has its own order.
        fr.remove_dead(nested, families, counted_steps(net, [*net.parameters()]).state_dict())
    with pytest.raises(ValueError, match="names has no effect without the state_dict"):
        fr.remove_dead(tree, families, names=list(tree))
    with pytest.raises(ValueError, match=r"two parameters that are called '0\.weight'"):
        fr.remove_dead(tree, families, grouped, names=["0.weight"] * 8)


def test_buffers_among_parameters_do_not_move_the_order_of_an_optimizer():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net.register_buffer("scale", torch.ones(4))
    families = dict.fromkeys(("2.weight", "2.bias", "3.weight", "3.bias"), 0)
    families |= {name: fr.Along(at, penalized=False) for name, at in (("4.weight", 1), ("3.running_mean", 0))}
    with torch.no_grad():
        for name in ("2.weight", "2.bias", "3.weight", "3.bias"):
            net.get_parameter(name)[1] = 0
    state = counted_steps(net, net.parameters()).state_dict()
    for tree in (fr.with_buffers(net), {name: x for name, x in net.state_dict().items() if name != "scale"}):
        _, smaller = fr.remove_dead(tree, families, state)
        bias = smaller["state"][5]["exp_avg"]  # Of the second linear layer.
        torch.testing.assert_close(10 * bias, torch.tensor([0.0, 2.0, 3.0]))


def test_functional_calls_take_the_tree_of_parameters_and_buffers():
    net, _ = small()
    x = normal(torch.Generator().manual_seed(1), 4, 3).double()
    torch.testing.assert_close(functional_call(net, fr.with_buffers(net), (x,)), net(x))


def test_trees_without_the_names_of_a_module_are_told_how_to_have_them():
    net = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"groups names 'weight', .* with_buffers\(module\)"):
        fr.remove_dead(net, {"weight": 0})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"groups names 'weight', .* have no names without module="):
        fr.regularize(optimizer, fr.coupled(fr.group_lasso, {"weight": 0}), strength=0.1)
    with pytest.raises(TypeError, match="penalty is a dict; expected a Penalty such as l1"):
        fr.lambda_max(fr.l1, dict(net.named_parameters()))  # pyright: ignore[reportArgumentType]
