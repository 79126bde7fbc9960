"""Hidden units of recurrent layers: found by tracing, taken out, and outputs stay."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import DEVICE, drawn
from test_channels import Net, entries, network, outputs, without_half
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import funcreg as fr


def sequences(*shape):
    return (drawn(2, *(shape or (4, 5))),)


def tagger(layer, width=6, run=None, **layers):
    """A recurrent layer, and a linear one that reads what it gives at each step."""
    return Net(run or (lambda net, x: net.last(net.first(x)[0])), first=layer, last=nn.Linear(width, 3), **layers)


def packed(net, x):
    steps = pack_padded_sequence(x, torch.tensor([4, 2], device="cpu"), batch_first=True)
    return net.last(pad_packed_sequence(net.first(steps)[0], batch_first=True)[0])


def unsorted(net, x):
    steps = pack_padded_sequence(x, torch.tensor([2, 4], device="cpu"), batch_first=True, enforce_sorted=False)
    made, (h, _) = net.first(steps)
    return net.last(pad_packed_sequence(made, batch_first=True)[0]) + net.last(h[-1])[:, None]


def stepwise(net, x):
    state = None
    for step in x.unbind(1):
        state = net.first(step, state)
    return net.last(state if isinstance(state, torch.Tensor) else state[0])


def ends(net, x):
    _, (h, c) = net.first(x)
    return net.last(torch.cat([h[-2], h[-1]], 1)) + net.other(c[-1])


def handed_on(net, x):
    _, state = net.first(x)
    return net.last(net.second(x.flip(1), state)[0])


def learned(net, x):
    begin = net.begin.expand(-1, len(x), -1).contiguous()
    return net.last(net.first(x, begin)[0])


LSTM, GRU, RNN = nn.LSTM, nn.GRU, nn.RNN
FIRST = {"batch_first": True}
# What makes a network, and what the hidden size of its first layer is once a random half of all groups is gone.
RECURRENT = {
    "LSTM": lambda: tagger(LSTM(5, 6, **FIRST)),
    "GRU": lambda: tagger(GRU(5, 6)),
    "RNN": lambda: tagger(RNN(5, 6)),
    "RNN with ReLU, without a bias": lambda: tagger(RNN(5, 6, nonlinearity="relu", bias=False)),
    "two layers": lambda: tagger(LSTM(5, 6, num_layers=2)),
    "both directions": lambda: tagger(GRU(5, 6, num_layers=2, bidirectional=True), 12),
    "projections": lambda: tagger(LSTM(5, 6, num_layers=2, proj_size=4), 4),
    "projections in both directions": lambda: tagger(LSTM(5, 6, proj_size=4, bidirectional=True), 8),
    "after a layer": lambda: tagger(
        LSTM(6, 6), run=lambda net, x: net.last(net.first(net.before(x))[0]), before=nn.Linear(5, 6)
    ),
    "one after another": lambda: tagger(
        LSTM(5, 6), 8, lambda net, x: net.last(net.second(net.first(x)[0].relu())[0]), second=GRU(6, 8)
    ),
    "its last states": lambda: tagger(LSTM(5, 6, bidirectional=True, **FIRST), 12, ends, other=nn.Linear(6, 3)),
    "states that are handed on": lambda: tagger(LSTM(5, 6, **FIRST), 6, handed_on, second=LSTM(5, 6, **FIRST)),
    "a state that is learned": lambda: tagger(GRU(5, 6, **FIRST), 6, learned, begin=nn.Parameter(torch.ones(1, 1, 6))),
    "packed sequences": lambda: tagger(GRU(5, 6, **FIRST), 6, packed),
    "packed sequences in another order": lambda: tagger(LSTM(5, 6, **FIRST), 6, unsorted),
    "RNNCell": lambda: tagger(nn.RNNCell(5, 6), 6, stepwise),
    "LSTMCell": lambda: tagger(nn.LSTMCell(5, 6), 6, stepwise),
    "GRUCell": lambda: tagger(nn.GRUCell(5, 6, bias=False), 6, stepwise),
}


@pytest.mark.parametrize("make", RECURRENT.values(), ids=RECURRENT)
def test_a_recurrent_network_without_dead_units_gives_what_it_gave(make):
    net, seen = network(make), sequences()
    before = copy.deepcopy(net.state_dict())
    groups = fr.channel_groups(net, seen)
    assert any("first" in layer for layers in groups.layers for layer in layers)
    fr.coupled(fr.group_lasso, groups).prox(dict(net.named_parameters()), 1.0)  # Has no overlap.
    for seed in range(2):
        dead = without_half(net, groups, seed)
        made = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), seen)
        expected = outputs(dead, seen)
        torch.testing.assert_close(outputs(made, seen), expected, rtol=1e-10, atol=1e-10)
        assert (expected[0] - expected[1]).abs().max() > 1e-6
        assert made.first.hidden_size == 3
        assert entries(made) < 0.65 * entries(net)
    assert all(torch.equal(w, before[name]) for name, w in net.state_dict().items())


def test_a_hidden_unit_is_a_row_of_each_gate_of_every_layer_and_direction():
    net = network(lambda: tagger(LSTM(5, 6, num_layers=2)))
    (family,) = fr.channel_groups(net, sequences())
    rows, columns = fr.Along(0, packed=4), fr.Along(1, penalized=False)
    assert family["first.weight_hh_l0"] == (rows, columns)
    assert family["first.weight_ih_l0"] == family["first.bias_ih_l0"] == family["first.bias_hh_l1"] == rows
    assert family["first.weight_ih_l1"] == (rows, columns)
    assert family["last.weight"] == 1
    groups = fr.channel_groups(net, sequences())
    assert repr(groups).splitlines()[1].split() == [
        "first",
        "6",
        "171",
    ]  # A row and a column of one leaf share an entry.


KEPT = {
    "a state that is given": (
        lambda: tagger(GRU(5, 6), run=lambda net, x, h: net.last(net.first(x, h)[0])),
        lambda: (*sequences(), drawn(1, 4, 6)),
        r"their first state is given, and may not be zero \(gru, 'first'\)",
    ),
    "states that are an output": (
        lambda: tagger(LSTM(5, 6), run=lambda net, x: (net.last((made := net.first(x))[0]), made[1])),
        sequences,
        r"an output of the network",
    ),
    "an average over units": (
        lambda: tagger(GRU(5, 6), run=lambda net, x: net.last(net.norm(net.first(x)[0])), norm=nn.LayerNorm(6)),
        sequences,
        r"normalized over channels",
    ),
}


@pytest.mark.parametrize(("make", "inputs", "reason"), KEPT.values(), ids=KEPT)
def test_hidden_units_that_cannot_go_are_kept_and_the_reason_is_told(make, inputs, reason):
    with pytest.raises(ValueError, match=rf"(?s)found no channels in .*{reason}"):
        fr.channel_groups(network(make), inputs())


def test_a_recurrent_network_is_regularized_made_smaller_and_trained_on():
    net, (x,) = network(lambda: tagger(LSTM(5, 16, **FIRST), 16)).float().train(), sequences()
    x = x.float()
    groups = fr.channel_groups(net, (x,))
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    fr.regularize(optimizer, fr.coupled(fr.group_lasso, groups), strength=0.01, module=net, weights="sqrt_size")
    for _ in range(30):
        optimizer.zero_grad()
        (net(x) - x[..., :3]).square().mean().backward()
        optimizer.step()
    tree, state = fr.remove_dead(fr.with_buffers(net), groups, optimizer.state_dict())
    made = fr.resized(net, tree)
    assert 0 < made.first.hidden_size < 16
    torch.testing.assert_close(made(x), net(x), rtol=1e-5, atol=1e-6)
    going = torch.optim.Adam(made.parameters(), 0.02)
    going.load_state_dict(state)
    made(x.to(DEVICE)).square().mean().backward()
    going.step()


@pytest.mark.parametrize("sizes", [(8, 5), (6, 5), (8, 7)])
def test_more_hidden_units_than_projections_have_to_stay(sizes):
    hidden, projections = sizes
    net = network(lambda: tagger(LSTM(5, hidden, num_layers=2, proj_size=projections), projections))
    groups = fr.channel_groups(net, sequences())
    assert sorted(groups.counts) == sorted(sizes)
    assert "'first', an LSTM, has to keep more hidden units than projections of them" in groups.explain()
    with torch.no_grad():
        for name, w in net.first.named_parameters():
            if "_hr_" in name:
                w[:, 3:] = 0
            else:
                w.view(4, hidden, -1)[:, 3:] = 0
    with pytest.raises(ValueError, match=r"'first', an LSTM, is left 3 hidden units and . projections.*smaller streng"):
        fr.resized(net, fr.remove_dead(fr.with_buffers(net), groups))
