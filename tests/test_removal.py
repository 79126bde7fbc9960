"""What `remove_dead` says where nothing goes, or everything."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict

import pytest
import torch
from cases import DEVICE
from test_channels import NETWORKS, Net, linears, network, vectors, without_half
from torch import nn

import funcreg as fr


def layers(*widths):
    return lambda: nn.Sequential(*linears(*widths))


def zero(net, *names):
    with torch.no_grad():
        for name, w in net.named_parameters():
            if name in names:
                w.zero_()
    return net


def removed(net, groups, **options):
    return fr.remove_dead(fr.with_buffers(net), groups, **options)


def test_nothing_dead_is_told_with_how_near_to_zero_the_smallest_group_is():
    net = network(layers(5, 7, 6, 3))
    with torch.no_grad():
        for w in (net[1].weight, net[1].bias):
            w[4] *= 1e-3
        net[2].weight[:, 4] *= 1e-3
    groups = fr.channel_groups(net, vectors())
    with pytest.warns(UserWarning, match=r"found no dead group.* each of the 13 groups.*of '1.weight', number 4, of "):
        smaller = removed(net, groups)
    assert {name: w.shape for name, w in smaller.items()} == {n: w.shape for n, w in net.named_parameters()}
    with pytest.warns(UserWarning, match="found no dead group"):
        removed(net, list(groups))


def test_what_keeps_groups_that_are_zero_otherwise_is_named():
    net = zero(network(layers(5, 7, 6, 3)), "0.weight", "1.weight")
    groups = fr.channel_groups(net, vectors())
    with pytest.warns(UserWarning, match=r"In 7 groups of the family of '0.weight' all is zero but '0.bias'. Does a m"):
        removed(net, groups)


def test_a_fresh_network_whose_biases_are_zero_is_not_told_that_its_weights_are_left_out():
    net = zero(network(layers(5, 7, 6, 3)), "0.bias", "1.bias")
    with pytest.warns(UserWarning, match="The nearest to zero is in the family of"):
        removed(net, fr.channel_groups(net, vectors()))


def test_dead_groups_that_all_stay_are_told():
    net = network(layers(5, 7, 3))
    with torch.no_grad():
        net[0].weight[0] = net[0].bias[0] = 0
        net[1].weight[:, 0] = 0
    groups = fr.channel_groups(net, vectors(), round_to=8)
    with pytest.warns(UserWarning, match=r"takes nothing out: 1 of 7 groups are dead, .* multiples of round_to=8"):
        removed(net, groups)
    assert removed(net, groups, round_to=1)["0.weight"].shape == (6, 5)
    last = {"0.weight": torch.zeros(1, 5), "1.weight": torch.ones(3, 1)}
    with pytest.warns(UserWarning, match=r"1 of 1 groups are dead, and all of them stay, so that one of each family"):
        fr.remove_dead(last, [{"0.weight": 0, "1.weight": fr.Along(1, penalized=False)}])


def residual(run=lambda net, x: net.last((y := net.first(x)) + net.down(net.up(y).relu()))):
    parts = {"first": nn.Linear(5, 6), "up": nn.Linear(6, 8), "down": nn.Linear(8, 6), "last": nn.Linear(6, 3)}
    return network(lambda: Net(run, **parts))


def test_a_layer_that_dies_whole_is_told_where_nothing_goes_around_it():
    net = residual()
    groups = fr.channel_groups(net, vectors())
    assert groups.layers == [("first", "down"), ("up",)]
    assert groups.necks == [True, False]
    zero(net, "up.weight", "up.bias")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert removed(net, groups)["up.weight"].shape == (1, 6)  # A block that goes whole leaves its residual sum.
    zero(net, "first.weight", "first.bias", "down.weight", "down.bias", "last.weight")
    with pytest.warns(
        UserWarning, match=r"dead in the family of 'first.weight' \(6 groups\).*The network gives the same"
    ):
        removed(net, groups)
    with pytest.warns(UserWarning, match="Unless something goes around it"):
        removed(net, list(groups))
    groups.pop()  # Then it is not known any more which family is which.
    with pytest.warns(UserWarning, match="Unless something goes around it"):
        removed(net, groups)
    with pytest.warns(UserWarning, match="Unless something goes around it"):
        removed(net, lambda params: list(groups))
    inside = fr.channel_groups(net, vectors(), prefix="part")
    assert not inside.necks  # What is around the part is not known.


def test_that_only_what_goes_around_is_left_is_told():
    net = residual(lambda net, x: net.last(net.first(x) + net.down(net.up(net.first(x)).relu())) + x[:, :3])
    groups = fr.channel_groups(net, vectors())
    assert not any(groups.necks)
    with pytest.warns(UserWarning, match="Of the network there is left what goes around all groups"):
        removed(zero(net, *dict(net.named_parameters())), groups)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_family_is_a_neck_where_outputs_are_the_same_once_it_is_dead(name):
    make, inputs, _ = NETWORKS[name]
    net, seen = network(make), inputs()
    groups = fr.channel_groups(net, seen)
    assert len(groups.necks) == len(groups)
    params = dict(net.named_parameters())
    for family, count, neck in zip(groups, groups.counts, groups.necks, strict=True):
        gone = [torch.full((count,), 1e9, dtype=torch.float64, device=DEVICE)]
        dead = fr.coupled(fr.group_lasso, [family]).prox(params, 1.0, weights=gone)
        with torch.no_grad():
            made = torch.func.functional_call(net, dead, seen)
        made = made[0] if isinstance(made, tuple) else made
        assert (float((made[0] - made[1]).abs().max()) < 1e-9) == neck


def test_a_state_is_sliced_alone():
    net = network(layers(5, 7, 3))
    groups = fr.channel_groups(net, vectors())
    dead = without_half(net, groups)
    average = {name: torch.ones_like(w) for name, w in dead.named_parameters()}
    _, mean = fr.remove_dead(fr.with_buffers(dead), groups, average)
    assert mean["0.weight"].shape == (4, 5)
    assert all((w == 1).all() for w in mean.values())


def test_a_state_that_has_names_within_its_own_is_sliced():
    net = network(layers(5, 7, 3))
    groups = fr.channel_groups(net, vectors())
    dead = without_half(net, groups)
    moments = {
        name: {"exp_avg": w.detach(), "step": torch.tensor(3.0, device=DEVICE)} for name, w in dead.named_parameters()
    }
    flat = {f"state.{name}.{key}": x for name, own in moments.items() for key, x in own.items()}
    flat["param_groups.0.weight.betas"] = (0.9, 0.999)
    smaller, by_name, of_checkpoint = fr.remove_dead(fr.with_buffers(dead), groups, moments, flat)
    assert smaller["0.weight"].shape == (4, 5)
    for name in moments:
        torch.testing.assert_close(by_name[name]["exp_avg"], smaller[name])
        torch.testing.assert_close(of_checkpoint[f"state.{name}.exp_avg"], smaller[name])


def trained(make, *widths, named=True):
    """A network after a step of an optimizer, with half its channels dead, and the state and the groups."""
    net = network(layers(*widths)).float()
    seen = (vectors()[0].float(),)
    groups = fr.channel_groups(net, seen)
    optimizer = make([*net.named_parameters()] if named else [*net.parameters()])
    net(*seen).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        for family, count in zip(groups, groups.counts, strict=True):
            alive = torch.arange(count, device=DEVICE) < (count + 1) // 2
            for name, where in family.items():
                along = where if isinstance(where, fr.Along) else fr.Along(where)
                w = net.get_parameter(name).movedim(along.dim, 0)
                w[~alive] = 0
    return net, optimizer, groups


def test_states_of_optimizers_are_sliced_wherever_they_stand_in_a_checkpoint():
    net, optimizer, groups = trained(torch.optim.Adam, 5, 7, 3)
    tree, state = fr.with_buffers(net), optimizer.state_dict()
    _, alone = fr.remove_dead(tree, groups, state)
    assert alone["state"][0]["exp_avg"].shape == (4, 5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict()
    checkpoint = {
        "state_dict": OrderedDict((f"net.{name}", w) for name, w in net.state_dict().items()),
        "optimizer_states": [state],
        "lr_schedulers": [scheduler],
        "epoch": 3,
        "none": None,
        "random": torch.get_rng_state(),
    }
    for given, found in (
        ({"optimizer": state, "epoch": 3}, lambda made: made["optimizer"]),
        ([state], lambda made: made[0]),
        (({"inner": (state, 1)},), lambda made: made[0]["inner"][0]),
        (checkpoint, lambda made: made["optimizer_states"][0]),
        ({**state, "extra": 1}, lambda made: made),
    ):
        smaller, made = fr.remove_dead(tree, groups, given)
        assert type(made) is type(given)
        for number, entries in found(made)["state"].items():
            for key, x in entries.items():
                torch.testing.assert_close(x, alone["state"][number][key])
        _, made = fr.remove_dead(tree, groups, given, names=list(tree))
        assert found(made)["state"][0]["exp_avg"].shape == (4, 5)
    _, made = fr.remove_dead(tree, groups, checkpoint)
    for name, w in smaller.items():
        torch.testing.assert_close(made["state_dict"][f"net.{name}"], w)
    assert {key: made[key] for key in ("lr_schedulers", "epoch", "none")} == {
        "lr_schedulers": [scheduler],
        "epoch": 3,
        "none": None,
    }
    assert checkpoint["optimizer_states"][0]["state"][0]["exp_avg"].shape == (7, 5)


def test_objects_in_place_of_their_tensors_are_refused():
    net, optimizer, groups = trained(torch.optim.Adam, 5, 7, 3)
    tree = fr.with_buffers(net)
    chain = fr.Optimizer(net.named_parameters(), lambda lr: fr.adam(lr), lr=0.1)
    for given, match in (
        (optimizer, r"the optimizer Adam; expected its tensors, optimizer.state_dict\(\)"),
        ({"optimizer": [optimizer]}, "the optimizer Adam"),
        (chain, "the optimizer Optimizer"),
        (net, r"the module Sequential; expected the tree of its tensors, with_buffers\(module\)"),
        (torch.optim.swa_utils.AveragedModel(net), r"AveragedModel; .* with_buffers\(average\)"),
    ):
        with pytest.raises(TypeError, match=match):
            fr.remove_dead(tree, groups, given)
    average = torch.optim.swa_utils.AveragedModel(net)
    for given in (fr.with_buffers(average), average.module.state_dict(), average.state_dict()):
        _, made = fr.remove_dead(tree, groups, given)
        assert [w.shape for name, w in made.items() if name.endswith("0.weight")] == [(4, 5)]


def test_a_state_that_is_like_no_parameter_is_told():
    net, _, groups = trained(torch.optim.Adam, 5, 7, 3)
    tree = fr.with_buffers(net)
    with pytest.warns(UserWarning, match=r"leaves a state as it is.* it has 'a.0', 'a.1', and the tree '0.bias'"):
        fr.remove_dead(tree, groups, {"a": [torch.ones(7, 5), torch.ones(7)], "steps": torch.tensor(1)})
    plain = fr.sgd(0.1).init(tree)
    sgd = torch.optim.SGD(net.named_parameters()).state_dict()
    for quiet in ({}, [], {"steps": 3, "loss": torch.tensor(1.0)}, plain, sgd, {"optimizer": sgd}):
        fr.remove_dead(tree, groups, quiet)


@pytest.mark.parametrize("widths", [(5, 7, 3), (5, 5, 5)], ids=["rectangles", "squares"])
def test_moments_of_rows_and_columns_are_sliced(widths):
    net, optimizer, groups = trained(torch.optim.Adafactor, *widths)
    state, half = optimizer.state_dict(), (widths[1] + 1) // 2
    flat = {f"state.{i}.{key}": x for i, own in state["state"].items() for key, x in own.items()}
    flat = {key.replace("state.0", "state.0.weight"): x for key, x in flat.items() if key.startswith("state.0")}
    smaller, made, other = fr.remove_dead(fr.with_buffers(net), groups, state, flat)
    for row, column in (
        (made["state"][0]["row_var"], made["state"][0]["col_var"]),
        (other["state.0.weight.row_var"], other["state.0.weight.col_var"]),
    ):
        torch.testing.assert_close(row, state["state"][0]["row_var"][:half])
        torch.testing.assert_close(column, state["state"][0]["col_var"])
    torch.testing.assert_close(made["state"][2]["col_var"], state["state"][2]["col_var"][:, :half])
    net = fr.resized(net, smaller)
    again = torch.optim.Adafactor(net.named_parameters())
    again.load_state_dict(made)
    net(vectors()[0].float()).sum().backward()
    again.step()
    params = {name: w.detach() for name, w in trained(torch.optim.Adam, *widths)[0].named_parameters()}
    tx = fr.sm3(0.1)
    sums = tx.update(fr.tree_map(torch.ones_like, params), tx.init(params), params)[1]
    small, after = fr.remove_dead(params, groups, sums)
    assert [w.shape for w in fr.tree_leaves(after)] == [w.shape for w in fr.tree_leaves(tx.init(small))]


def test_moments_that_cannot_be_sliced_are_told():
    net, _, groups = trained(torch.optim.Adam, 5, 7, 3)
    tree = {name: w.detach().clone() for name, w in net.named_parameters()}
    tx = fr.scale_by_factored_rms(min_dim_size_to_factor=2)
    anew = r"expected the same, or .* begin this moment anew"
    with pytest.raises(ValueError, match=rf"leaf 'v_(row|col).*0.weight' of shape \(.*{anew}"):
        fr.remove_dead(tree, groups, tx.init(tree))
    chain = fr.Optimizer(net.named_parameters(), lambda: fr.chain(tx, fr.scale(-0.1)), compile=False)
    net(vectors()[0].float()).sum().backward()
    chain.step()
    with pytest.raises(ValueError, match=anew):
        fr.remove_dead(tree, groups, chain.state_dict())
    with pytest.raises(ValueError, match=anew):
        fr.remove_dead(tree, groups, {"0.weight": torch.ones(35)})


# While a network is trained


def steps(net, optimizer, count):
    """What a loop is warned of."""
    said = []
    for _ in range(count):
        optimizer.zero_grad()
        net(*vectors()).square().mean().mul(1e-3).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said += [str(each.message) for each in caught]
    return said


def test_a_family_that_dies_while_a_network_is_trained_is_told_once_by_its_name():
    net = network(layers(5, 7, 6, 3)).float()
    groups = fr.channel_groups(net, (vectors()[0].float(),))
    whole = {name: w.detach().clone() for name, w in net.named_parameters()}
    first = fr.ChannelGroups(groups[:1], groups.counts[:1], necks=groups.necks[:1])
    for given, end in (
        (first, r": the network gives the same at every input from now on. Its strength .* grow from 0"),
        (list(first), r": unless something goes around it, the network gives the same"),
    ):
        net.load_state_dict(whole)
        optimizer = torch.optim.SGD(net.double().parameters(), lr=0.1)
        penalty = 1e-6 * fr.half_l2 + fr.coupled(fr.group_lasso, given)  # Also in a sum.
        fr.regularize(optimizer, penalty, strength=0.9, module=net)
        said = steps(net, optimizer, 101)
        assert len(said) == 1
        assert "all groups are dead in the family of '0.weight' (7 groups) after 30 steps" in said[0]
        assert re.search(end, said[0])
    net.load_state_dict(whole)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    fr.regularize(optimizer, fr.coupled(fr.group_lasso, first), strength=fr.linear_schedule(0, 1e-6, 50), module=net)
    assert not steps(net, optimizer, 101)


def test_a_block_that_dies_whole_beside_a_sum_is_no_warning():
    net = residual()
    groups = fr.channel_groups(net, vectors())
    block = fr.ChannelGroups(groups[1:], groups.counts[1:], necks=groups.necks[1:])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    fr.regularize(optimizer, fr.coupled(fr.group_lasso, block), strength=0.9, module=net)
    assert not steps(net, optimizer, 101)
    assert block.left(dict(net.named_parameters())) == [0]
