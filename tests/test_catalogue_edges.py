"""Edges of the catalogue at which an adversary found it wrong: each test failed once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import funcreg as fr

# Networks


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(6, 9), nn.AvgPool1d(3, 1, 1), nn.Linear(9, 3)],
        [nn.Conv2d(1, 2, 3), nn.Flatten(), nn.MaxPool1d(3, 1, 1), nn.Linear(72, 3)],
        [nn.Conv1d(1, 6, 3), nn.AvgPool2d(3, 1, 1), nn.Conv1d(6, 5, 3)],
        [nn.Linear(6, 9), nn.Upsample(9), nn.Linear(9, 3)],
    ],
)
def test_channels_are_not_followed_through_what_pools_over_them(layers):
    with pytest.raises(ValueError, match="it may mix them"):
        fr.channel_groups(nn.Sequential(*layers))


def test_channels_are_not_followed_through_layers_that_share_a_parameter():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    with pytest.raises(ValueError, match="'1', a Linear: it shares a parameter with '0'"):
        fr.channel_groups(nn.Sequential(first, second, nn.Linear(3, 2)))


def test_resized_keeps_layers_that_share_a_parameter_sharing_it():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    smaller = fr.resized(net, {"0.weight": torch.ones(3, 3)})
    assert smaller[0].weight is smaller[1].weight
    assert torch.equal(smaller[1].weight, torch.ones(3, 3))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_resized_narrows_a_convolution_of_several_filters_for_each_channel(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 4, 1), kind(4, 12, 2, groups=4), nn.Conv1d(12, 2, 1)).double()
    by_channel = fr.Along(0, size=3)
    family = {
        "0.weight": 0,
        "0.bias": 0,
        "1.weight": by_channel if kind is nn.Conv1d else 0,
        "1.bias": by_channel,
        "2.weight": fr.Along(1, size=3),
    }
    dead = fr.coupled(fr.l1, family).prox(dict(net.named_parameters()), 0.0)
    dead = {name: w.detach().clone() for name, w in dead.items()}
    for name, width in (("0.weight", 1), ("0.bias", 1), ("1.bias", 3), ("1.weight", 3 if kind is nn.Conv1d else 1)):
        dead[name][width : 2 * width] = 0
    dead["2.weight"][:, 3:6] = 0
    whole = copy.deepcopy(net)
    whole.load_state_dict(dead)
    smaller = fr.resized(whole, fr.remove_dead(dead, family))
    x = torch.randn(3, 2, 7, dtype=torch.float64)
    assert (smaller[1].in_channels, smaller[1].out_channels, smaller[1].groups) == (3, 9, 3)
    torch.testing.assert_close(smaller(x), whole(x), rtol=1e-14, atol=1e-14)


def test_resized_refuses_to_change_a_convolution_to_groups_of_several_widths():
    net = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2, bias=False))
    with pytest.raises(ValueError, match="belongs to a convolution of 2 groups"):
        fr.resized(net, {"0.weight": torch.ones(5, 2, 3)})


# Constraints


def test_what_a_projection_cannot_bring_into_the_set_is_outside_of_it():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert fr.l2_sphere(torch.zeros(3)) == torch.inf
    assert fr.l2_sphere(rows, torch.tensor([[1.0], [5.0]]), dim=1) == torch.inf
    assert fr.l2_sphere(rows, torch.tensor([[0.0], [5.0]]), dim=1) == 0
    assert fr.l2_sphere({"none": torch.zeros(0, 3), "one": torch.ones(1)}) == 0
    assert fr.hyperplane(torch.ones(3), 0.0, 1.0) == torch.inf
    assert fr.hyperplane(torch.ones(3), 0.0, 0.0) == 0
    assert fr.halfspace(torch.ones(3), 0.0, -1.0) == torch.inf
    assert fr.halfspace(torch.ones(3), 0.0, 1.0) == 0


def test_the_simplex_of_a_tree_refuses_complex_leaves():
    with pytest.raises(TypeError, match="simplex takes real numbers"):
        fr.projection_simplex({"w": torch.ones(2, dtype=torch.complex64)})


# Wrong input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fr.ftrl(0.0, fr.l1), "learning_rate is 0.0; expected a number above 0"),
        (lambda: fr.ftrl(0.1, fr.l1, beta=0.0), "beta is 0.0; expected a number above 0"),
        (lambda: fr.rmda(0.1, fr.l1, momentum=1.0), "momentum is 1.0; expected a number of at least 0 and below 1"),
        (lambda: fr.ramda(0.1, fr.l1, momentum=1.5), "momentum is 1.5; expected a number of at least 0 and below 1"),
    ],
)
def test_numbers_at_which_a_transform_would_not_move_or_not_be_defined_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_nonnegative_form_of_no_penalty_is_an_error():
    with pytest.raises(TypeError, match="inner is 3; expected a separable Penalty"):
        fr.nonnegative_form(3)  # pyright: ignore[reportArgumentType]


# Certificates


def test_the_gap_of_labels_of_minus_one_is_no_number():
    x = torch.eye(3)
    gap = [
        fr.duality_gap(lambda p: x @ p["w"], {"w": torch.ones(3)}, torch.tensor(y), fr.l1, loss="logistic")
        for y in ([0.0, 1.0, 1.0], [-1.0, 1.0, 1.0])
    ]
    assert gap[0] > 0
    assert gap[1].isnan()
