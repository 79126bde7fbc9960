"""The constant of a dead channel that a bias takes is the same at other sizes, numbers and values of the inputs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE
from test_channels import outputs, without_half
from torch import nn

import funcreg as fr


class Between(nn.Module):
    """Three layers with a function of the hidden units and of what the module is called with between the first two."""

    def __init__(self, between, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c, self.between = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3), between
        if "norm" in between.__code__.co_names:
            self.norm = nn.BatchNorm1d(8)
        if "scale" in between.__code__.co_names:
            self.scale = nn.Parameter(torch.tensor(0.7))
        self.drop = nn.Dropout(0.5)

    def forward(self, x, alpha=1.0, times=1):
        return self.c(torch.tanh(self.b(self.between(self, x, self.a(x), alpha, times))))


def x(*shape):
    torch.manual_seed(0)
    return torch.randn(*shape, device="cpu").to(DEVICE)


OTHERS = {
    "a size": (lambda m, x, h, a, n: F.softplus(h) * x.shape[1] ** -0.5, (x(2, 4, 5),), "of other sizes"),
    "a size of the batch": (lambda m, x, h, a, n: F.softplus(h) / len(x), (x(4, 5),), "of other sizes"),
    "an argument": (lambda m, x, h, a, n: F.softplus(h) * a, {"x": x(4, 5), "alpha": 2.0}, "other numbers"),
    "a number": (lambda m, x, h, a, n: F.softplus(h) * a * n, (x(4, 5), 2.0, 3), "other numbers"),
    "a whole number": (lambda m, x, h, a, n: F.softplus(h) * n, {"x": x(4, 5), "times": 3}, "other whole numbers"),
    "a shift of 0": (lambda m, x, h, a, n: F.relu(h + a), (x(4, 5), 0.0), "other numbers"),
    "an entry": (lambda m, x, h, a, n: F.softplus(h) * x.abs().max().item(), (x(4, 5),), "other values"),
    "a shift by an entry": (lambda m, x, h, a, n: F.relu(h) + float(x[0, 0]), (x(4, 5),), "other values"),
    "a parameter": (lambda m, x, h, a, n: F.softplus(h) * float(m.scale), (x(4, 5),), "other parameters"),
    "training": (lambda m, x, h, a, n: F.softplus(h) * (0.5 if m.training else 1.0), (x(4, 5),), "in training"),
}
ALIKE = {
    "sigmoid": (lambda m, x, h, a, n: h.sigmoid(), (x(4, 5),)),
    "softplus of any sizes": (lambda m, x, h, a, n: F.softplus(h), (x(2, 4, 5),)),
    "an argument that is not for it": (lambda m, x, h, a, n: F.relu(h) * a + F.softplus(h), (x(4, 5), 0.5)),
    "an entry that is not for it": (lambda m, x, h, a, n: h.cos() + h.tanh() * x[0, 0].item(), (x(4, 5),)),
    "dropout in training": (lambda m, x, h, a, n: m.drop(h.sigmoid()), (x(4, 5),)),
    "a normalization in training": (lambda m, x, h, a, n: m.norm(h).sigmoid(), (x(4, 5),)),
    "a normalization that fails in training": (lambda m, x, h, a, n: m.norm(h).sigmoid(), (x(1, 5),)),
    "a size that it needs": (lambda m, x, h, a, n: h.view(4, 3, -1).sigmoid() * x.shape[1] ** -0.5, (x(4, 3, 5),)),
}


def made(between):
    return Between(between).to(DEVICE)


@pytest.mark.parametrize("name", OTHERS)
def test_a_constant_that_other_inputs_change_is_not_taken_by_a_bias(name):
    between, inputs, where = OTHERS[name]
    net = made(between)
    groups = fr.channel_groups(net, inputs)
    assert groups.layers == [("b",)]
    (reason,) = [reason for reason, places in groups.kept.items() if "a.weight, dimension 0 of 8" in places]
    assert reason.startswith("a dead one is")
    assert where in reason


@pytest.mark.parametrize("name", ALIKE)
def test_a_constant_that_is_one_everywhere_is_taken(name):
    between, inputs = ALIKE[name]
    net = made(between).eval()
    before = copy.deepcopy(net.state_dict())
    groups = fr.channel_groups(net, inputs)
    assert ("a",) in [names[:1] for names in groups.layers]
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups))
    assert smaller.a.out_features == 4
    torch.testing.assert_close(outputs(smaller, inputs), outputs(dead, inputs), rtol=1e-4, atol=1e-5)
