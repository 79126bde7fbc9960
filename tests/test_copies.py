"""Functions that modules hold use the copy of a module, and not the module that was copied."""

import functools
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import funcreg as fr
from funcreg.networks.copies import copied
from tests.cases import DEVICE


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return x + self.last(F.relu(self.first(x)))


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), Block(), nn.Linear(6, 3)).double().to(DEVICE)


def doubled(block, x, by=2):
    return x + by * block.last(F.relu(block.first(x)))


def twice(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return 2 * function(*args, **kwargs)

    return call


def method(net):
    net[1].forward = types.MethodType(doubled, net[1])


def partial(net):
    net[1].forward = functools.partial(doubled, net[1], by=3)


def closure(net):
    block = net[1]
    net[1].forward = lambda x: doubled(block, x)


def default(net):
    net[1].forward = lambda x, block=net[1]: doubled(block, x)


def decorated(net):
    net[1].forward = twice(net[1].forward)
    net[1].first.forward = twice(net[1].first.forward)


def compiled(net):
    net[1].forward = torch.compile(net[1].forward, backend="eager")


def nested(net):
    inner = twice(net[1].last.forward)
    net[1].last.forward = functools.partial(lambda function, x: function(x), inner)


def hook(net):
    other = net[0]
    net[2].register_forward_pre_hook(lambda module, args: (args[0] * other.bias,))


def weight(net):
    scale = net[0].bias
    net[2].register_forward_pre_hook(lambda module, args: (args[0] * scale,))


def listed(net):
    block = net[1]
    block.steps = [lambda x: block.first(x), F.relu, (lambda x: block.last(x), "last")]
    block.forward = lambda x: x + block.steps[2][0](block.steps[1](block.steps[0](x)))


def itself(net):
    block = net[1]

    def forward(x, deep=True):
        return forward(x, deep=False) if deep else doubled(block, x)

    block.forward = forward


def holder(net):
    class Holder:
        block = None

        def forward(self, x):
            return doubled(self.block, x)

    held = Holder()
    held.block = net[1]
    net[1].forward = held.forward


REPLACED = (method, partial, closure, default, decorated, compiled, nested, hook, weight, listed, itself, holder)


@pytest.mark.parametrize("replace", REPLACED)
def test_a_smaller_network_computes_with_its_own_weights_where_functions_are_replaced(replace):
    net = network()
    replace(net)
    x = torch.randn(4, 5, dtype=torch.float64, device="cpu").to(DEVICE)
    groups = fr.channel_groups(net, (x,))
    assert {"1.first.weight"} <= {name for family in groups for name in family}
    with torch.no_grad():
        for w in (net[1].first.weight, net[1].first.bias, net[1].last.weight.T):
            w[5:] = 0
        expected = net(x)
        smaller: Any = fr.resized(net, fr.remove_dead(fr.with_buffers(net), groups), (x,))
        assert smaller[1].first.out_features == 5
        for w in net.parameters():
            w.fill_(float("nan"))
        torch.testing.assert_close(smaller(x), expected, rtol=1e-12, atol=1e-12)


def test_copies_of_compiled_functions_are_right_without_what_torch_does_not_document(monkeypatch):
    monkeypatch.setattr("funcreg.core.undocumented.ORIGINAL", "another name")
    test_a_smaller_network_computes_with_its_own_weights_where_functions_are_replaced(compiled)
    test_thin_layers_are_those_of_the_copy(compiled)


@pytest.mark.parametrize("replace", REPLACED)
def test_thin_layers_are_those_of_the_copy(replace):
    net = network()
    replace(net)
    with torch.no_grad():
        for layer in (net[0], net[1].first, net[1].last, net[2]):
            layer.weight.copy_(torch.outer(layer.weight[:, 0], layer.weight[0]))
        x = torch.randn(2, 5, dtype=torch.float64, device="cpu").to(DEVICE)
        expected, thin = net(x), fr.factorized(net)
        for w in net.parameters():
            w.fill_(float("nan"))
        torch.testing.assert_close(thin(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("replace", "said"), [
    (decorated, "its forward is another function than that of its class"),
    (listed, "a function that replaces a forward, or is a hook, uses it"),
])  # fmt: skip
def test_a_layer_whose_forward_is_another_or_that_a_function_uses_is_not_made_thin(replace, said):
    net = network()
    replace(net)
    if replace is listed:
        layer = net[1].first
        net[1].forward = lambda x: x + F.linear(layer(x), layer.weight.T)
    with pytest.raises(ValueError, match=said):
        fr.factorized(net, layers=["1.first"])


def test_functions_that_use_no_part_stay_what_they_are():
    net, seen, kept = network(), [], torch.ones(3)
    log = lambda module, args, made: seen.append(made.sum() * kept.sum())
    net[0].register_forward_hook(log)
    made = copied(net)
    assert [*made[0]._forward_hooks.values()] == [log]
    made(torch.ones(1, 5, dtype=torch.float64, device=DEVICE))
    assert len(seen) == 1


GLOBAL = network()


def through_another(x):
    return doubled(GLOBAL[1], x)


@pytest.mark.parametrize("forward", [lambda x: doubled(GLOBAL[1], x), lambda x: through_another(x)])
@pytest.mark.parametrize("call", [fr.channel_groups, fr.resized, fr.factorized])
def test_a_part_that_a_function_has_by_a_global_name_is_an_error_that_names_both(forward, call):
    GLOBAL[1].forward = forward
    x = torch.ones(1, 5, dtype=torch.float64, device=DEVICE)
    given = {fr.channel_groups: (x,), fr.resized: (fr.with_buffers(GLOBAL),), fr.factorized: ()}[call]
    with pytest.raises(ValueError, match=r"'1.forward' .* uses the module itself by the global name 'GLOBAL'"):
        call(GLOBAL, *given)


class Borrows(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(12, 6)

    def forward(self, x):
        return self.last(F.relu(BORROWED[0](x)))


BORROWED = [nn.Linear(6, 12)]


def test_code_that_runs_parts_of_the_module_that_was_copied_is_an_error():
    x = torch.ones(1, 6, device=DEVICE)
    net = nn.Sequential(Borrows(), BORROWED[0], nn.ReLU(), nn.Linear(12, 2)).to(DEVICE)
    with pytest.raises(
        ValueError, match=r"a copy of Sequential runs '1', a Linear, of the module that it is a copy of"
    ):
        fr.channel_groups(net, (x,))
