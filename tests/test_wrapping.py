"""Modules inside torch.compile or data parallel: all that goes by names sees through the wrapper."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import DEVICE, normal
from torch import nn

import funcreg as fr

X = normal(torch.Generator().manual_seed(0), 4, 6, dtype=torch.float32)


def compiled(net):
    return torch.compile(net, backend="eager")


def compiled_inside(net):
    net[0] = torch.compile(net[0], backend="eager")
    return net


every_wrapper = pytest.mark.parametrize(
    "wrap",
    [compiled, nn.DataParallel, lambda net: compiled(nn.DataParallel(net)), compiled_inside],
    ids=["compiled", "data parallel", "both", "compiled inside"],
)


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 3))
    with torch.no_grad():
        for w in (net[0][0].weight, net[0][0].bias, net[0][1].weight, net[0][1].bias):
            w[2:5] = 0
        net[1].weight[:, 2:5] = 0
    return net.eval().to(DEVICE)


@every_wrapper
@pytest.mark.parametrize("found_in", ["the wrapper", "the network"])
def test_a_wrapped_network_is_made_smaller_as_it_is_without_its_wrapper(wrap, found_in):
    net = network()
    plain = copy.deepcopy(net)
    module = wrap(net)
    groups = fr.channel_groups(module if found_in == "the wrapper" else plain, (X,))
    optimizer = torch.optim.Adam(module.named_parameters(), lr=0.0)
    handle = fr.regularize(optimizer, fr.coupled(fr.group_lasso, groups), strength=1e-3, module=module)
    module(X).square().sum().backward()
    optimizer.step()
    handle.remove()
    tree, state = fr.remove_dead(fr.with_buffers(module), groups, optimizer.state_dict())
    smaller = fr.resized(module, tree, (X,))
    assert [len(w) for name, w in smaller.named_parameters() if name.endswith(".0.weight")] == [5]
    torch.testing.assert_close(smaller(X), plain(X))
    again = torch.optim.Adam(smaller.named_parameters())
    again.load_state_dict(state)
    assert all(again.state[w]["exp_avg"].shape == w.shape for w in smaller.parameters())


@every_wrapper
def test_an_optimizer_of_a_chain_takes_groups_of_a_wrapped_network(wrap):
    net = network()
    groups = fr.channel_groups(net, (X,))
    module = wrap(net)
    penalty = fr.coupled(fr.group_lasso, groups)
    optimizer = fr.Optimizer(module.named_parameters(), lambda lr: fr.prox_sgd(lr, penalty, strength=1e3), lr=1.0)
    module(X).square().sum().backward()
    optimizer.step()
    assert all(w.count_nonzero() == 0 for name, w in module.named_parameters() if name.endswith("0.weight"))


@every_wrapper
def test_a_checkpoint_and_a_state_of_a_wrapped_network_are_those_of_the_network(wrap):
    net = network()
    groups, plain = fr.channel_groups(net, (X,)), copy.deepcopy(net)
    tree = fr.with_buffers(wrap(net))
    moments = fr.trace(0.9).init({name: x.detach() for name, x in plain.named_parameters()})
    smaller, state = fr.remove_dead(tree, groups, moments)
    assert state.trace["0.0.weight"].shape == (5, 6)
    torch.testing.assert_close(fr.resized(plain, smaller, (X,))(X), plain(X))


def test_layers_may_be_called_as_in_the_wrapper():
    module = compiled(network())
    assert next(iter(fr.channel_groups(module, (X,), layers=["_orig_mod.0.0"])[0])) == "0.0.weight"
    assert next(iter(fr.channel_groups(module)[0])) == "0.0.weight"


def test_a_name_that_is_in_no_wrapper_is_an_error():
    with pytest.raises(ValueError, match=r"'_orig_mod\.1\.weight', which is no leaf"):
        fr.coupled(fr.group_lasso, {"_orig_mod.1.weight": 0})({"0.weight": torch.ones(2, 2, device=DEVICE)})
