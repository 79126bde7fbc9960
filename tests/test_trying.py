"""Families are tried out before they are offered: what `resized` would refuse after training is kept at the start."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE
from test_channels import (
    CONV,
    Net,
    Transformer,
    drawn,
    entries,
    images,
    linears,
    network,
    outputs,
    vectors,
    without_half,
    words,
)
from torch import nn

import funcreg as fr
from funcreg.networks import agreement, trying


class Packed(nn.Module):
    """Attention as nanoGPT writes it: with the width of its input and counts of heads as numbers."""

    def __init__(self, width=32, heads=8):
        super().__init__()
        self.n_head, self.n_embd = heads, width
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (y.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class Narrow(Packed):
    """The same with widths that are taken from tensors."""

    def forward(self, x):
        b, t, _ = x.size()
        q, k, v = (y.view(b, t, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).chunk(3, dim=2))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def narrow(layer, before):
    layer.n_head = before.n_head * layer.c_proj.in_features // before.c_proj.in_features
    layer.__class__ = Narrow


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), Packed(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, layers=4):
        super().__init__()
        self.wte, self.h = nn.Embedding(11, 32), nn.ModuleList(Block() for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(32), nn.Linear(32, 11, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def test_heads_of_nanogpt_are_kept_and_it_is_said_what_would_help():
    net, seen = network(GPT), words()
    groups = fr.channel_groups(net, seen)
    assert groups.layers == [(f"h.{i}.mlp.0",) for i in range(4)]
    said = groups.explain()
    assert "without some of these channels the network fails in 'h.*.attn', a Packed: RuntimeError: " in said
    assert "'h.*.attn', a Packed, stores n_head=8, n_embd=32, and no other numbers there make it run" in said
    assert "for its code divides 32 by n_head, which gives another number where some are gone" in said
    assert "or give rules={Packed: function} to channel_groups and resized" in said
    assert "    h.*.attn.c_attn.weight, dimension 0 of 96" in said.splitlines()
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups))
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-10, atol=1e-10)


def test_a_rule_that_resized_takes_is_taken_before_training_too():
    net, seen, rules = network(GPT), words(), {Packed: narrow}
    groups = fr.channel_groups(net, seen, rules=rules)
    assert len(groups) == 8
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), seen, rules=rules)
    assert [block.attn.n_head for block in smaller.h] == [4] * 4
    assert all(type(block.attn) is Packed for block in net.h)
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="rules has one for Conv2d, and the module has no such layer"):
        fr.channel_groups(net, seen, rules={CONV: narrow})

    with pytest.raises(ValueError, match="rules has no effect without example_inputs, on which families are tried"):
        fr.channel_groups(nn.Sequential(*linears(5, 6, 3)), rules=rules)

    def broken(layer, before):
        raise KeyError("width")

    said = fr.channel_groups(net, seen, rules={Packed: broken}).explain()
    assert "resized refuses what is left: KeyError: 'width'" in said


def test_layers_that_are_alike_are_tried_together(monkeypatch):
    ran = []
    real = agreement.run
    monkeypatch.setattr(agreement, "run", lambda *args, **kwargs: (ran.append(1), real(*args, **kwargs))[1])
    fr.channel_groups(network(lambda: GPT(6)), words(), rules={Packed: narrow})
    # With groups that are zero and without them: a half of each family, also on inputs of four other sizes, one group,
    # and all but one.
    assert len(ran) == 14
    ran.clear()
    fr.channel_groups(network(lambda: GPT(6)), words())
    assert len(ran) < 34  # Several numbers are tried for each of the few sets of families.


class _Wrapped(nn.Sequential):
    """A layer in a class of its own, as those with a normalization are."""


def test_layers_of_one_class_are_told_apart_by_their_names(monkeypatch):
    def make():
        net = GPT(3)
        for block in net.h:
            block.attn.c_attn, block.attn.c_proj = _Wrapped(block.attn.c_attn), _Wrapped(block.attn.c_proj)
            block.mlp = nn.Sequential(_Wrapped(block.mlp[0]), nn.GELU(), _Wrapped(block.mlp[2]))
        return net

    net, tried = network(make), []
    real = trying.Trial.problem
    monkeypatch.setattr(trying.Trial, "problem", lambda *args: (tried.append(1), real(*args))[1])
    groups = fr.channel_groups(net, words())
    assert groups.layers == [(f"h.{i}.mlp.0.0",) for i in range(3)]
    # Of all, of what failed and of the rest, of the first and the last of what failed, and of what is left.
    assert len(tried) <= 6


def test_layers_that_are_asked_for_and_cannot_go_are_an_error():
    net, seen = network(GPT), words()
    with pytest.raises(
        ValueError, match=r"(?s)found no channels in GPT that could go\. Kept are.*a Packed, stores n_h"
    ):
        fr.channel_groups(net, seen, layers=["*.attn.*"])
    with pytest.raises(
        ValueError, match=r"layers has '\*\.attn\.\*', whose channels are found and cannot go\. Kept are"
    ):
        fr.channel_groups(net, seen, layers=["*.mlp.*", "*.attn.*"])
    assert len(fr.channel_groups(net, seen, layers=["*.mlp.*"])) == 4


class LeNet(nn.Module):
    """As in a tutorial of PyTorch."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = CONV(3, 6, 3, padding=1), CONV(6, 16, 3, padding=1)
        self.fc1, self.fc2, self.fc3 = linears(16 * 2 * 2, 12, 10, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, 16 * 2 * 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


@pytest.mark.parametrize("batch", [2, 16])  # Where the batch is divided by it, shapes fail one layer later.
def test_a_width_that_is_written_in_the_code_keeps_the_channels_it_counts(batch):
    net, seen = network(LeNet), (drawn(batch, 3, 8, 8),)
    groups = fr.channel_groups(net, seen)
    assert groups.layers == [("conv1",), ("fc1",), ("fc2",)]
    said = groups.explain()
    assert "LeNet, the network itself, may have a width or a count as a number of its own, or in its code. Let" in said
    assert "(x.flatten(1), x.shape, -1 in a view), or give rules={LeNet: function}" in said
    assert "    conv2.weight, dimension 0 of 16" in said.splitlines()
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups))
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-10, atol=1e-10)


class Reader(nn.Module):
    """The ends of both directions of a recurrent layer, whose width stands in the code."""

    def __init__(self, width=16):
        super().__init__()
        self.reader, self.last = nn.GRU(6, 16, batch_first=True, bidirectional=True), nn.Linear(32, 3)
        self.width = lambda outputs: width or outputs.shape[-1] // 2

    def forward(self, x):
        outputs = self.reader(x)[0]
        n = self.width(outputs)
        return self.last(torch.cat([outputs[:, -1, :n], outputs[:, 0, n:]], -1))


def test_a_width_in_the_code_that_a_single_step_hides_is_seen_with_two():
    x = drawn(4, 1, 6)
    assert fr.channel_groups(network(lambda: Reader(width=None)), (x,)).counts == [16]
    with pytest.raises(ValueError, match=r"differs from that of the module .* or in its code"):
        fr.channel_groups(network(Reader), (x,))


class Long(nn.Module):
    """Takes another way with what is long: by a width in the code, in a window, or a part that is drawn."""

    def __init__(self, way, width=12):
        super().__init__()
        self.way, self.window, self.first, self.last = way, width, nn.Linear(5, width), nn.Linear(width, 3)

    def forward(self, x):
        y, steps = self.first(x).relu(), x.shape[1]
        if self.way == "code" and steps > 6:
            y = y.reshape(len(x), -1, 12).cumsum(1)
        elif self.way == "draws" and steps > 6:
            y = y[:, torch.randperm(steps, device=x.device)[:6]] + torch.rand_like(y[:, :6])
        elif self.way == "fails":
            assert steps == 6
        elif self.way == "window":
            y = y.cumsum(1) - F.pad(y.cumsum(1), (0, 0, self.window, 0))[:, :steps]
        return self.last(y)


def test_a_width_in_the_code_that_is_for_other_sizes_of_inputs_alone_is_seen():
    said = r"fails in 'last', a Linear: .*, on inputs of other sizes; Long, the network itself, may have a width"
    with pytest.raises(ValueError, match=said):
        fr.channel_groups(network(lambda: Long("code")), (drawn(2, 6, 5),))


@pytest.mark.parametrize("way", ["draws", "fails", "window"])
def test_what_other_sizes_of_inputs_do_not_tell_refuses_nothing(way):
    net, seen = network(lambda: Long(way)), (drawn(2, 6, 5),)
    groups = fr.channel_groups(net, seen)
    assert groups.counts == [12]
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), seen)
    assert smaller.window == 12
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-10, atol=1e-10)


def test_a_generator_that_counts_its_channels_keeps_them_and_a_part_of_a_network_has_its_names():
    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(6, 8 * 4), nn.BatchNorm2d(8)
            self.up, self.last = nn.ConvTranspose2d(8, 6, 2, 2), nn.ConvTranspose2d(6, 3, 2, 2)

        def forward(self, z):
            return self.last(self.up(self.norm(self.first(z).view(-1, 8, 2, 2)).relu()).relu())

    groups = fr.channel_groups(network(Generator), (drawn(4, 6),), prefix="generator")
    assert groups.layers == [("generator.up",)]
    assert "    generator.first.weight, dimension 0 of 32" in groups.explain().splitlines()


def test_what_fails_is_found_among_layers_that_are_alike():
    class Viewing(nn.Module):
        def forward(self, x):
            return x.view(len(x), 6)

    layers = [nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), Viewing(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)]
    groups = fr.channel_groups(network(lambda: nn.Sequential(*layers)), vectors())
    assert groups.layers == [("0",), ("4",)]
    assert "in '3', a Viewing: RuntimeError: shape '[4, 6]' is invalid" in groups.explain()


def test_what_does_not_run_together_is_offered_in_part():
    class Tied(nn.Module):
        """Two branches whose widths have to be one, though nothing is computed of both."""

        def __init__(self):
            super().__init__()
            self.a1, self.a2, self.b1, self.b2 = *linears(5, 8, 3), *linears(5, 12, 3)

        def forward(self, x):
            a, b = self.a1(x).relu(), self.b1(x).relu()
            if a.shape[-1] < 8 and b.shape[-1] < 12:
                raise RuntimeError("one of the two has to be whole")
            return self.a2(a) + self.b2(b)

    groups = fr.channel_groups(network(Tied), vectors())
    assert groups.layers == [("a1",)]
    assert "RuntimeError: one of the two has to be whole" in groups.explain()


def test_a_number_that_only_outputs_can_tell_stays_and_is_noted():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.scale = 4, 0.5
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).flatten(2))

    net, seen = network(lambda: Net(lambda net, x: net.part(x), part=Heads())), (drawn(2, 3, 16),)
    groups = fr.channel_groups(net, seen)
    assert groups.counts == [4]
    assert groups.explain().endswith("\n\nGive resized example_inputs too, to tell what becomes of Heads.heads")
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), seen)
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-10, atol=1e-10)


class _Selective(nn.Module):
    """A layer for each half of the channels, as selective kernels have."""

    def __init__(self):
        super().__init__()
        self.in_channels, self.paths = 8, nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 6)])

    def forward(self, x):
        parts = x.split(self.in_channels // 2, -1)
        return sum([layer(part).relu() for layer, part in zip(self.paths, parts, strict=True)])


def test_a_width_that_is_divided_among_layers_follows_what_these_take():
    net = network(lambda: nn.Sequential(nn.Linear(5, 8), _Selective(), nn.Linear(6, 3)))
    seen = (drawn(2, 5),)
    groups = fr.channel_groups(net, seen)
    assert groups.counts == [4, 6]
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), seen)
    assert smaller[1].in_channels == smaller[0].out_features == 4
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-10, atol=1e-10)


class _Partial(nn.Module):
    """A convolution of the first channels alone."""

    def __init__(self):
        super().__init__()
        self.mixed, self.rest = 4, 8
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x):
        return self.joined(*x.split([self.mixed, self.rest], 1))

    def joined(self, x, y):
        return torch.cat([self.conv(x).relu(), y], 1)


class _Sized(_Partial):
    def __init__(self):
        super().__init__()
        del self.mixed, self.rest
        self.sizes = (4, 8)
        self.forward = self.by_sizes  # As some choose among methods.

    def by_sizes(self, x):
        return self.joined(*x.split(self.sizes, 1))


class _Taken(_Partial):
    def __init__(self):
        super().__init__()
        self.rest = None

    def forward(self, x):
        return self.joined(*torch.split(x, [self.mixed, x.shape[1] - self.mixed], 1))


class _Sliced(_Taken):
    def forward(self, x):
        return self.joined(x[:, : self.mixed], x[:, self.mixed :])


@pytest.mark.parametrize("kind", [_Partial, _Sized, _Taken, _Sliced])
@pytest.mark.parametrize("dead", [[0], [1], None])
def test_unequal_parts_go_on_by_themselves_where_their_sizes_are_stored(kind, dead):
    net = network(lambda: nn.Sequential(CONV(3, 12, 1), kind(), kind(), CONV(12, 3, 1)))
    seen = images()
    groups = fr.channel_groups(net, seen)
    assert sorted(groups.counts) == [4, 4, 4, 8]
    killed = without_half(net, groups, among=dead)  # Also where nothing changes in a layer itself.
    smaller = fr.resized(killed, fr.remove_dead(fr.with_buffers(killed), groups), seen)
    assert entries(smaller) < entries(net)
    torch.testing.assert_close(outputs(smaller, seen), outputs(killed, seen), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dead", [(1, 1, 3, 1), (1, 3, 3, 1), (3, 1, 1, 3), (3, 3, 1, 3)])
def test_unequal_parts_go_on_whatever_the_numbers_that_are_left(dead):
    net = network(lambda: nn.Sequential(CONV(3, 12, 1), _Sized(), _Sized(), CONV(12, 3, 1)))
    groups = fr.channel_groups(net, images())
    weights = [
        torch.arange(n, device=DEVICE, dtype=torch.float64) < k for n, k in zip(groups.counts, dead, strict=True)
    ]
    params, weights = dict(net.named_parameters()), [1e9 * each for each in weights]
    killed = copy.deepcopy(net)
    killed.load_state_dict(fr.coupled(fr.group_lasso, groups).prox(params, 1.0, weights=weights))
    smaller = fr.resized(killed, fr.remove_dead(fr.with_buffers(killed), groups), images())
    torch.testing.assert_close(outputs(smaller, images()), outputs(killed, images()), rtol=1e-10, atol=1e-10)


class _Focal(nn.Module):
    """A gate, what it multiplies, and weights of levels, packed in one layer."""

    def __init__(self):
        super().__init__()
        self.sizes = [8, 8, 3]
        self.packed, self.gate, self.last = CONV(6, 19, 1), CONV(8, 8, 1), CONV(8, 6, 1)

    def forward(self, x):
        x, y, levels = self.packed(x).split(self.sizes, 1)
        return self.last(x * self.gate(y * levels.mean(1, keepdim=True)))


def test_parts_of_one_size_go_together_beside_one_of_another():
    net, seen = network(lambda: nn.Sequential(CONV(3, 6, 1), _Focal(), CONV(6, 3, 1))), images()
    groups = fr.channel_groups(net, seen)
    assert groups.counts == [6, 8, 6]
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), seen)
    assert smaller[1].sizes == [4, 4, 3]
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-10, atol=1e-10)


class _Gated(nn.Module):
    """A gate and what it multiplies, the width of each stored, which no parameter has."""

    def __init__(self, inputs):
        super().__init__()
        self.output_dim, self.both, self.norm = 8, nn.Linear(inputs, 16, bias=False), nn.BatchNorm1d(16)

    def forward(self, x):
        x = self.norm(self.both(x))
        return x[:, : self.output_dim] * torch.sigmoid(x[:, self.output_dim :])


def test_the_width_of_equal_parts_follows_where_no_parameter_has_it():
    net, seen = network(lambda: nn.Sequential(_Gated(5), _Gated(8), nn.Linear(8, 3))), vectors()
    groups = fr.channel_groups(net, seen)
    assert groups.counts == [8, 8]
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), seen)
    assert (smaller[0].output_dim, smaller[1].output_dim) == (4, 4)
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-10, atol=1e-10)


class _Heads(nn.Module):
    """Attention whose count of heads has a name that says nothing."""

    def __init__(self):
        super().__init__()
        self.parts, self.qkv, self.out = 4, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = [part.unflatten(-1, (self.parts, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _shuffled(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


#: What is done between two layers by a number in the code, with which the second runs on other widths, too.
COUNTED = {
    "norm of groups": lambda x: F.group_norm(x, 4),
    "scale": lambda x: x * x.shape[1] ** -0.5,
    "halves": lambda x: torch.cat([-x[:, 6:], x[:, :6]], 1) + x,
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_number_in_the_code_with_which_outputs_would_be_others_keeps_the_channels(name):
    act = COUNTED[name]
    forward = lambda net, x: net.b(act(net.a(x).relu()).relu())
    net = network(lambda: Net(forward, a=nn.Conv2d(3, 8, 1, bias=False), b=nn.Conv2d(8, 4, 1)))
    why = "unequal parts are taken" if name == "halves" else "Net, the network itself, may have a width or a count as"
    with pytest.raises(ValueError, match=f"(?s)found no channels in Net that could go. Kept are.*{why}"):
        fr.channel_groups(net, (drawn(2, 3, 4, 4),))


def test_channels_that_are_shuffled_by_a_number_in_the_code_go_in_pairs():
    forward = lambda net, x: net.b(_shuffled(net.a(x).relu()).relu())
    net = network(lambda: Net(forward, a=nn.Conv2d(3, 8, 1, bias=False), b=nn.Conv2d(8, 4, 1)))
    seen = (drawn(2, 3, 4, 4),)
    groups = fr.channel_groups(net, seen)
    assert groups.counts == [4]
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups))
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-5, 0.02])
def test_weights_that_hide_what_is_wrong_do_not(dtype, scale):
    net = network(lambda: Net(lambda net, x: net.part(x), part=_Heads())).to(dtype)
    with torch.no_grad():
        for w in net.parameters():
            w.mul_(scale)
    with pytest.raises(ValueError, match="may have a width or a count"):
        fr.channel_groups(net, (drawn(2, 3, 16).to(dtype),))


def test_networks_that_draw_are_not_compared_and_that_is_noted():
    forward = lambda net, x: net.last(F.dropout(net.first(x).relu(), 0.2))
    groups = fr.channel_groups(network(lambda: Net(forward, first=nn.Linear(5, 8), last=nn.Linear(8, 2))), vectors())
    assert groups.counts == [8]
    assert "Outputs were not compared, because they depend on random numbers" in groups.explain()


def test_sixteen_bits_are_compared_in_float32():
    net = network(lambda: Net(lambda net, x: net.part(x), part=_Heads())).float()
    dead = copy.deepcopy(net).to(torch.bfloat16)
    with torch.no_grad():
        for k in (0, 1, 2):
            dead.part.qkv.weight[16 * k + 8 : 16 * k + 16] = 0
            dead.part.qkv.bias[16 * k + 8 : 16 * k + 16] = 0
        dead.part.out.weight[:, 8:] = 0
        dead.part.out.weight.mul_(0.1)
    tree = fr.with_buffers(dead)
    rows = torch.cat([torch.arange(8, device=DEVICE) + 16 * k for k in (0, 1, 2)])
    tree["part.qkv.weight"], tree["part.qkv.bias"] = tree["part.qkv.weight"][rows], tree["part.qkv.bias"][rows]
    tree["part.out.weight"] = tree["part.out.weight"][:, :8]
    with pytest.raises(ValueError, match="the smaller network is not the module: output 0 of it differs"):
        fr.resized(dead, tree, (drawn(2, 3, 16).to(torch.bfloat16),))


def test_heads_that_a_number_of_another_name_counts_are_kept_unless_there_is_a_rule():
    net, seen = network(lambda: Net(lambda net, x: net.part(x), part=_Heads())), (drawn(2, 3, 16),)
    with pytest.raises(ValueError, match=r"'part', a _Heads, may have a width or a count .* rules={_Heads: function}"):
        fr.channel_groups(net, seen)

    def follow(layer, before):
        layer.parts = layer.out.in_features * before.parts // before.out.in_features

    groups = fr.channel_groups(net, seen, rules={_Heads: follow})
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), rules={_Heads: follow})
    assert smaller.part.parts == 2
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-10, atol=1e-10)


def test_attention_of_ones_own_that_is_not_exchanged_is_kept():
    class Mine(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    net, seen = network(lambda: Net(lambda net, x: x + net.a(x), a=Mine(12, 4, batch_first=True))), (drawn(2, 5, 12),)
    with pytest.raises(
        ValueError, match=r"(?s)Kept are.*resized refuses what is left: 'a' is a Mine, whose 6 features"
    ):
        fr.channel_groups(net, seen)


def test_a_forward_that_goes_by_what_is_in_tensors_is_tried_out_too():
    def run(net, x):
        y = net.first(x)
        rows = int((y.sum(-1) > 0).sum().item())
        return net.last(y.relu())[: max(1, rows)].mean(0)

    net, seen = network(lambda: Net(run, first=nn.Linear(5, 8), last=nn.Linear(8, 3))), vectors()
    groups = fr.channel_groups(net, seen)
    assert (groups.counts, groups.notes) == ([8], [])


def test_where_it_cannot_be_tried_out_that_is_noted():
    def run(net, x):
        if net.first.weight.detach().cpu().numpy()[0, 0] != own:
            raise ArithmeticError("it has other weights")
        return net.last(net.first(x).relu())

    net, seen = network(lambda: Net(run, first=nn.Linear(5, 8), last=nn.Linear(8, 3))), vectors()
    own = net.first.weight.detach().cpu().numpy()[0, 0]
    groups = fr.channel_groups(net, seen)
    assert groups.counts == [8]
    assert groups.explain().endswith(
        "Not tried out, so that resized may refuse what is offered here: with other numbers in its weights Net fails "
        "in its own forward: ArithmeticError: it has other weights"
    )


@pytest.mark.parametrize("holds", [False, True])
def test_what_fails_where_all_features_are_the_same_is_tried_out_with_weights_that_are_drawn(holds):
    def run(net, x):
        y = net.first(x)
        if float(y.std(-1).max()) < 1e-9:
            raise ArithmeticError("all features are the same")
        return net.last(y.relu()) + (y.shape[-1] < 8 and holds)

    net, seen = network(lambda: Net(run, first=nn.Linear(5, 8), last=nn.Linear(8, 3))), vectors()
    groups = fr.channel_groups(net, seen)
    assert groups.counts == [8]
    assert ("Not tried out" in groups.explain()) == holds


def test_an_error_that_one_channel_makes_of_several_examples_is_seen():
    def run(net, x):
        y = net.first(x).relu()
        less = y.squeeze(-1) - y  # Of one channel a square matrix, with the examples along both dimensions.
        return net.last(y) + (less if y.shape[-1] == 1 else y.new_zeros(1)).sum(-1, keepdim=True)

    net, seen = network(lambda: Net(run, first=nn.Linear(5, 8), last=nn.Linear(8, 3))), vectors()
    groups = fr.channel_groups(net, seen)
    assert (groups.counts, groups.least) == ([8], [2])


@pytest.mark.parametrize("mixes", [False, True])
def test_a_few_examples_are_enough_of_those_that_a_network_computes_with_apart(mixes):
    def run(net, x):
        seen.append(len(x))
        y = net.first(x).relu()
        return net.last(y - y.mean(0) if mixes else y)

    seen, net = list[int](), network(lambda: Net(run, first=nn.Linear(5, 8), last=nn.Linear(8, 3)))
    assert fr.channel_groups(net, vectors()).counts == [8]
    few = 4 if mixes else 2
    # As it is; with a half at zero and without it, on twice as many examples, on more features, which it does not take,
    # on half as many examples, and on less features; without one; with one left.
    assert seen == [4, *(4, 4), *(8, 8), 4, *(2, 2), few, *(few, few), *(4, 4)]


@pytest.mark.parametrize("draw", [lambda: torch.rand(()).item(), random.Random(0).random])
def test_outputs_that_are_drawn_are_not_compared_whoever_draws_them(draw):
    net = network(
        lambda: Net(lambda net, x: net.last(net.first(x).relu()) + draw(), first=nn.Linear(5, 8), last=nn.Linear(8, 3))
    )
    groups = fr.channel_groups(net, vectors())
    assert groups.counts == [8]
    assert "Outputs were not compared, because they depend on random numbers" in groups.explain()


@pytest.mark.parametrize("copied", [trying._COPIED, 0])
def test_nothing_of_the_user_is_touched_and_large_weights_are_not_copied(monkeypatch, copied):
    monkeypatch.setattr(trying, "_COPIED", copied)
    net, seen = network(lambda: GPT(2)).train(), words()
    net.h[0].register_forward_hook(lambda *_: None)
    before = copy.deepcopy(fr.with_buffers(net))
    state = torch.random.get_rng_state()
    made = []
    real = torch.Tensor.clone

    def clone(self, *args, **kwargs):
        made.append(tuple(self.shape))
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(torch.Tensor, "clone", clone)
        patch.setattr(torch.Tensor, "__deepcopy__", None)
        groups = fr.channel_groups(net, seen)
    assert any(shape in {tuple(w.shape) for w in net.parameters() if w.ndim > 1} for shape in made) == (copied > 0)
    assert ("Outputs were not compared" in groups.explain()) == (copied == 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(fr.with_buffers(net), before, rtol=0, atol=0)
    assert all(layer.training for layer in net.modules())
    assert all(len(layer._forward_hooks) == (layer is net.h[0]) for layer in net.modules())


def test_a_batch_of_arguments_is_given_to_both():
    def run(net, x, scale=1.0):
        return net.last(net.first(x).relu() * scale)

    net, (x,) = network(lambda: Net(run, first=nn.Linear(5, 8), last=nn.Linear(8, 3))), vectors()
    seen = ((x,), {"scale": 2.0})
    groups = fr.channel_groups(net, seen)
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), seen)
    torch.testing.assert_close(smaller(x), dead(x), rtol=1e-10, atol=1e-10)


def test_outputs_that_are_drawn_are_compared_with_the_same_numbers():
    def run(net, x):
        return net.last((net.first(x) + torch.randn_like(x[:, :1])).relu())

    net, seen = network(lambda: Net(run, first=nn.Linear(5, 8), last=nn.Linear(8, 3))), vectors()
    params = {name: w.detach() for name, w in net.named_parameters()}
    state = torch.random.get_rng_state()
    fr.resized(net, params, seen)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_is_used_in_training_alone_is_seen_with_buffers_as_they_were():
    def run(net, x):
        y = net.norm(net.first(x)).relu()
        return net.last(y) + net.more(y) if net.training else net.last(y)

    parts = {"first": nn.Linear(5, 8), "norm": nn.BatchNorm1d(8), "last": nn.Linear(8, 3), "more": nn.Linear(8, 3)}
    net, seen = network(lambda: Net(run, **parts)), vectors()
    before = copy.deepcopy(fr.with_buffers(net))
    groups = fr.channel_groups(net, seen)
    assert (list(groups[0])[-4:-2], groups.notes) == (["last.weight", "more.weight"], [])
    torch.testing.assert_close(fr.with_buffers(net), before, rtol=0, atol=0)
    groups = fr.channel_groups(net, (seen[0][:1],))  # Of one example there is no variance.
    assert "more.weight" not in groups[0]
    said = "Some parameters are not used in evaluation, and in training the module fails on example_inputs"
    assert said in groups.explain()
    net.run = lambda net, x, y=None: net.last(net.first(x).relu()) if y is None else net.more(net.first(x).relu())
    said = (
        "use them in evaluation or training, and what they read may go: give inputs that use them, if any do:\n    norm"
    )
    assert said in fr.channel_groups(net, seen).explain()


def test_an_exported_module_is_refused_before_training():
    net, seen = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), (torch.ones(4, 2),)
    exported = torch.export.export(net, seen).module()
    for module in (exported, nn.Sequential(exported)):
        with pytest.raises(TypeError, match=r"made by torch\.export, with its widths; expected the module that was"):
            fr.channel_groups(module, seen)


def test_a_module_without_parameters_is_told_so():
    with pytest.raises(ValueError, match=r"no parameters in Sequential\. Is it quantized\? A network is made smaller"):
        fr.channel_groups(nn.Sequential(nn.ReLU(), nn.Flatten()), (torch.ones(4, 2),))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_module_compiled_by_torch_jit_is_refused_before_training():
    net, seen = network(lambda: nn.Sequential(*linears(5, 6, 3))), vectors()
    with pytest.raises(TypeError, match=r"module is compiled by torch\.jit; expected the module that it was made of"):
        fr.channel_groups(torch.jit.trace(net, seen), seen)
    around = nn.Sequential(torch.jit.trace(net, seen), *linears(3, 4, 2))
    with pytest.raises(
        TypeError, match=r"'0' in the module is compiled by torch\.jit; expected the module that it was"
    ):
        fr.channel_groups(around, seen)


def test_how_many_groups_are_left_is_told():
    net, seen = network(Transformer), words()
    groups = fr.channel_groups(net, seen)
    assert groups.left(fr.with_buffers(net)) == groups.counts == [4, 20]
    assert groups.left(fr.with_buffers(without_half(net, groups))) == [2, 10]


def test_one_family_is_one_family():
    net = network(lambda: nn.Sequential(*linears(5, 6, 3)))
    assert fr.channel_groups(net, vectors()).explain().startswith("6 groups in 1 family:")
    net = network(lambda: nn.Sequential(*linears(5, 6, 4, 3)))
    assert fr.channel_groups(net, vectors()).explain().startswith("10 groups in 2 families:")


def test_heads_of_attention_without_a_sum_around_it_go_with_its_inputs_and_outputs():
    def run(net, x):
        return net.last(net.attention(y := net.first(x), y, y)[0].relu())

    parts = {"attention": nn.MultiheadAttention(12, 4, batch_first=True), "last": nn.Linear(12, 3)}
    net, seen = network(lambda: Net(run, first=nn.Linear(5, 12), **parts)), (drawn(2, 7, 5),)
    groups = fr.channel_groups(net, seen)
    assert sorted(groups.counts) == [4, 12, 12]
    dead = without_half(net, fr.ChannelGroups(groups[:2], groups.counts[:2]))
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups))
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [True, False])
def test_images_of_half_precision_and_other_devices_are_tried_where_they_are(groups):
    net = nn.Sequential(CONV(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), CONV(8, 4, 1, groups=4 if groups else 1))
    net = net.append(CONV(4, 2, 1)).bfloat16().eval().to(DEVICE)
    assert fr.channel_groups(net, (images()[0].bfloat16(),)).counts


class Squeezed(nn.Module):
    """A pooled image whose channels a squeeze takes away where one is left."""

    def __init__(self, squeeze):
        super().__init__()
        self.conv, self.inner, self.last, self.squeeze = nn.Conv2d(3, 8, 3), nn.Linear(8, 6), nn.Linear(6, 3), squeeze

    def forward(self, x):
        return self.last(F.relu(self.inner(self.squeeze(F.adaptive_avg_pool2d(F.relu(self.conv(x)), 1)))))


def test_two_of_the_channels_stay_of_which_one_may_not_be_left():
    net = network(lambda: Squeezed(lambda x: x.squeeze()))
    groups = fr.channel_groups(net, images())
    assert (groups.counts, groups.least) == ([8, 6], [2, 1])
    assert "At least two channels of conv stay: with one of these channels left the network" in groups.explain()
    dead = {name: torch.zeros_like(w) for name, w in fr.with_buffers(net).items()}
    dead["last.bias"] = net.last.bias.detach()
    with pytest.warns(UserWarning, match="all groups are dead"):
        smaller = fr.resized(net, fr.remove_dead(dead, groups))
    assert (smaller.conv.out_channels, smaller.inner.out_features) == (2, 1)
    torch.testing.assert_close(smaller(*images()), net.last.bias.expand_as(smaller(*images())))
    apart = lambda x: x.squeeze(-1).squeeze(-1)
    assert fr.channel_groups(network(lambda: Squeezed(apart)), images()).counts == [8, 6]
    rounded = fr.channel_groups(network(lambda: Squeezed(lambda x: x.squeeze())), images(), round_to=2)
    assert rounded.counts == [8, 6]


def test_values_are_compared_where_one_channel_is_left():
    """A sum that broadcasts where one channel is left gives as many entries, and others."""
    wide = lambda x: x.flatten(1) if x.shape[1] > 1 else 2 * x.flatten(1)
    groups = fr.channel_groups(network(lambda: Squeezed(wide)), images())
    assert groups.least == [2, 1]
    assert "with one of these channels left output 0 of it differs" in groups.explain()


# Exact numbers, and what is computed less exactly


class _Rescaled(nn.Module):
    """Outputs in units of their own, which are float64 as numbers from numpy are."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*linears(5, 64, 64, 3))
        self.register_buffer("spread", torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64))

    def forward(self, x):
        return self.net(x) * self.spread


def test_a_network_that_computes_in_float32_is_compared_as_such_where_outputs_are_float64():
    net, (x,) = network(_Rescaled), vectors()
    net.net.float()
    net.spread = net.spread.double()
    x = x.float()
    groups = fr.channel_groups(net, (x,))
    assert (groups.layers, groups.counts) == ([("net.0",), ("net.1",)], [64, 64])
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), (x,))
    torch.testing.assert_close(smaller(x), dead(x), rtol=1e-5, atol=1e-5)


def test_a_float64_network_is_tried_out_with_weights_that_are_float64():
    net, seen = network(lambda: nn.Sequential(*linears(5, 6, 3))).double(), vectors()
    wide = {name: trying._drawn(net, name, w).dtype for name, w in net.named_parameters()}
    assert {*wide.values()} == {torch.float64}
    narrow = net.to(torch.bfloat16)
    assert {trying._drawn(narrow, name, w).dtype for name, w in narrow.named_parameters()} == {torch.float32}
    assert fr.channel_groups(net, (seen[0].to(torch.bfloat16),)).counts == [6]


class _Annotated(nn.Module):
    """Attention as in *The Annotated Transformer*."""

    def __init__(self, h, d_model):
        super().__init__()
        self.d_k, self.h = d_model // h, h
        self.linears = nn.ModuleList([nn.Linear(d_model, d_model) for _ in range(4)])

    def forward(self, query, key, value):
        count = query.size(0)
        query, key, value = [
            made(x).view(count, -1, self.h, self.d_k).transpose(1, 2)
            for made, x in zip(self.linears, (query, key, value), strict=False)
        ]
        weights = (query @ key.transpose(-2, -1) / query.size(-1) ** 0.5).softmax(-1)
        x = (weights @ value).transpose(1, 2).contiguous().view(count, -1, self.h * self.d_k)
        return self.linears[-1](x)


def test_heads_of_the_annotated_transformer_go():
    net, seen = network(lambda: Net(lambda net, x: x + net.part(x, x, x), part=_Annotated(4, 16))), (drawn(2, 5, 16),)
    groups = fr.channel_groups(net, seen)
    assert groups.counts == [4]
    assert groups.notes == ["Give resized example_inputs too, to tell what becomes of _Annotated.h"]
    dead = without_half(net, groups)
    with pytest.raises(ValueError, match="stores h=4, which its forward may use for a width that changed"):
        fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups))
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), seen)
    assert (smaller.part.h, smaller.part.d_k) == (2, 4)
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-10, atol=1e-10)


def test_numbers_that_may_count_heads_are_named_where_these_are_kept():
    net, seen = network(lambda: Net(lambda net, x: net.part(x), part=_Heads())), (drawn(2, 3, 16),)
    with pytest.raises(ValueError, match=r"a count as a number of its own \(parts=4\), or in its code"):
        fr.channel_groups(net, seen)


class _Talking(nn.Module):
    """Attention whose heads are mixed before and after the softmax, with one count for all of them."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.scale = 4, 0.5
        self.q, self.k, self.v, self.last = *[nn.Linear(5, 16) for _ in range(3)], nn.Linear(16, 3)
        self.before, self.after = CONV(4, 6, 1), CONV(6, 4, 1)

    def forward(self, x):
        q, k, v = [
            layer(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v)
        ]
        weights = self.after(self.before(q @ k.transpose(-1, -2) * self.scale).softmax(-1))
        return self.last((weights @ v).transpose(1, 2).flatten(2))


class _Cascade(nn.Module):
    """A layer for each part, all of one width, and a part that has a width of its own in the code."""

    def __init__(self):
        super().__init__()
        self.width = 8
        self.parts, self.last = nn.ModuleList(nn.Linear(5, 8) for _ in range(3)), nn.Linear(32, 3)
        self.other = nn.Linear(5, 8)

    def forward(self, x):
        parts = [part(x).relu().view(*x.shape[:2], 1, self.width) for part in self.parts]
        return self.last(torch.cat([*parts, self.other(x).relu().view(*x.shape[:2], 1, 8)], -1).flatten(2))


@pytest.mark.parametrize("make", [_Talking, _Cascade])
def test_families_that_one_number_counts_go_as_one(make):
    net, seen = network(make), (drawn(2, 6, 5),)
    groups = fr.channel_groups(net, seen)
    counts, layers = {_Talking: ([4], ("q", "k", "v", "after")), _Cascade: ([8], ("parts.0", "parts.1", "parts.2"))}[
        make
    ]
    assert (groups.counts, groups.layers) == (counts, [layers])
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), seen)
    assert entries(smaller) < entries(net)
    assert (smaller.num_heads if make is _Talking else smaller.width) == counts[0] // 2
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-10, atol=1e-10)
    other = (drawn(3, 9, 5, seed=4),)
    torch.testing.assert_close(outputs(smaller, other), outputs(dead, other), rtol=1e-10, atol=1e-10)


class _Splines(nn.Module):
    """A layer whose weight is computed from two, and viewed as a matrix."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.scale = (
            nn.Parameter(torch.empty(outputs, inputs, 4)),
            nn.Parameter(torch.empty(outputs, inputs)),
        )
        self.register_buffer("centers", torch.linspace(-1, 1, 4))

    def forward(self, x):
        bumps = torch.tanh(x[..., None] * self.centers).flatten(-2)
        return F.linear(bumps, (self.weight * self.scale[..., None]).view(len(self.weight), -1))


def test_weights_lie_in_memory_as_they_did_where_outputs_are_compared():
    net, x = network(lambda: nn.Sequential(_Splines(5, 8), _Splines(8, 6), _Splines(6, 3))), vectors()
    groups = fr.channel_groups(net, x)
    assert groups.counts == [8, 6]
    dead = without_half(net, groups)
    made = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), x)
    torch.testing.assert_close(made(*x), dead(*x), rtol=1e-10, atol=1e-10)


def test_layers_of_one_channel_are_named_where_nothing_can_go():
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(16, 2)).to(DEVICE)
    with pytest.raises(ValueError, match=r"only one of their layer, as where all others were dead: 0\.weight, 2\."):
        fr.channel_groups(net, (torch.zeros(2, 1, 8, 8, device=DEVICE),))
