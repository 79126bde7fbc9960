"""What `remove_dead` says where nothing goes, or everything."""

from __future__ import annotations

import re
import warnings

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
        assert "all groups are dead in the family of '0.weight' (7 groups) after 10" in said[0]
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
