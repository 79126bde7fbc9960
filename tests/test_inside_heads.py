"""Features inside the heads of attention: they go from all heads at once where nothing else comes from their number."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, drawn
from test_channels import Net, entries, linears, network, outputs, vectors, without_half
from test_trying import GPT, words
from torch import nn

import funcreg as fr
from funcreg.networks import trying

WIDTH, HEADS, KEYS, VALUES = 12, 3, 8, 6
SCALE = KEYS**-0.5


def sequence(examples=2, length=5):
    return (drawn(examples, length, WIDTH),)


def split(net, x):
    return [layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (net.q, net.k, net.v)]


def read(net, scores, v):
    return net.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def scored(scale):
    """Attention whose scores are scaled by a function of them and the queries."""

    def run(net, x):
        q, k, v = split(net, x)
        return read(net, scale(q @ k.mT, q), v)

    return lambda: attention(run)


def attention(run, keys=HEADS * KEYS, values=HEADS * VALUES, layer=nn.Linear, **more):
    q, k, v, o = layer(WIDTH, HEADS * KEYS), layer(WIDTH, keys), layer(WIDTH, values), layer(HEADS * VALUES, WIDTH)
    return Net(run, q=q, k=k, v=v, o=o, **more)


def fused(scale):
    def run(net, x):
        q, k, v = split(net, x)
        return net.o(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2))

    return lambda: attention(run)


def masked(net, x):
    q, k, v = split(net, x)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    return read(net, (SCALE * q @ k.mT).masked_fill(later, -1e9), v)


def grouped(net, x):
    """All heads of queries have the keys and values of one."""
    b, t, _ = x.shape
    q, k, v = net.q(x).view(b, t, HEADS, -1), net.k(x).view(b, t, 1, -1), net.v(x).view(b, t, 1, -1)
    k, v = k.repeat_interleave(HEADS, 2), v.repeat_interleave(HEADS, 2)
    weights = (SCALE * torch.einsum("bthd,bshd->bhts", q, k)).softmax(-1)
    return net.o(torch.einsum("bhts,bshd->bthd", weights, v).reshape(b, t, -1))


def batched(net, x):
    """Heads and examples share a dimension."""
    b, t, _ = x.shape
    q, k, v = (y.reshape(b * HEADS, t, -1) for y in split(net, x))
    weights = torch.baddbmm(x.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha=SCALE).softmax(-1)
    return net.o((weights @ v).view(b, HEADS, t, -1).transpose(1, 2).flatten(2))


def over_images(net, x):
    b, _, height, width = x.shape
    q, k, v = (layer(x).view(b, HEADS, -1, height * width) for layer in (net.q, net.k, net.v))
    weights = (SCALE * q.mT @ k).softmax(-1)
    return net.o((v @ weights.mT).reshape(b, -1, height, width))


def linear(net, x):
    """Without a softmax over scores."""
    q, k, v = split(net, x)
    return net.o((q.relu() @ (k.relu().mT @ v)).transpose(1, 2).flatten(2))


def single(net, x):
    return net.o((SCALE * net.q(x) @ net.k(x).mT).softmax(-1) @ net.v(x))


class Rotary(nn.Module):
    """Queries and keys turned by angles that grow with their position, two features by each."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", 0.3 ** torch.arange(KEYS // 2))

    def forward(self, y):
        angle = torch.arange(y.shape[2], device=y.device)[:, None] * self.frequencies
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        first, second = y.chunk(2, -1)
        return y * cos + torch.cat([-second, first], -1) * sin


def turned(net, x):
    q, k, v = split(net, x)
    return read(net, SCALE * net.rotary(q) @ net.rotary(k).mT, v)


class Packed(nn.Module):
    """Attention as timm writes it, with one width of heads and a scale as attributes."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = HEADS, KEYS, SCALE
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * KEYS), nn.Linear(HEADS * KEYS, WIDTH)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (self.scale * q @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, -1))


class Widths(nn.Module):
    """Attention that holds the widths of keys and values under names of its own."""

    def __init__(self, values=VALUES):
        super().__init__()
        self.n_heads, self.d_k, self.d_v = HEADS, KEYS, values
        self.q, self.k = nn.Linear(WIDTH, HEADS * KEYS, bias=False), nn.Linear(WIDTH, HEADS * KEYS, bias=False)
        self.v, self.o = nn.Linear(WIDTH, HEADS * values), nn.Linear(HEADS * values, WIDTH)

    def forward(self, x):
        b, t, _ = x.shape
        q, k = (layer(x).view(b, t, self.n_heads, self.d_k).transpose(1, 2) for layer in (self.q, self.k))
        v = self.v(x).view(b, t, self.n_heads, self.d_v).transpose(1, 2)
        return self.o(((SCALE * q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(b, t, self.n_heads * self.d_v))


class OneWidth(nn.Module):
    """Attention as BERT had it: one width for queries, keys and values."""

    def __init__(self, scale=None, heads=HEADS):
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, KEYS, heads * KEYS
        self.scale = scale
        self.query, self.key, self.value = (nn.Linear(WIDTH, heads * KEYS) for _ in range(3))
        self.dense = nn.Linear(heads * KEYS, WIDTH)

    def forward(self, x):
        heads = (*x.shape[:2], self.num_attention_heads, self.attention_head_size)
        q, k, v = (layer(x).view(heads).permute(0, 2, 1, 3) for layer in (self.query, self.key, self.value))
        weights = (q @ k.mT / (self.scale or math.sqrt(self.attention_head_size))).softmax(-1)
        return self.dense((weights @ v).permute(0, 2, 1, 3).reshape(*x.shape[:2], self.all_head_size))


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm, self.attention, self.last = nn.LayerNorm(WIDTH), attention, nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 10), nn.GELU(), nn.Linear(10, WIDTH))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.last(x))


def normal_convolution(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


def images():
    return (drawn(2, WIDTH, 3, 3),)


APART = {"q": KEYS, "v": VALUES}
#: Of each kind of attention what makes it, its inputs, and how many groups the layers have.
EXACT = {
    "by hand": (scored(lambda scores, q: SCALE * scores), sequence, APART),
    "without a scale": (scored(lambda scores, q: scores), sequence, APART),
    "one function": (fused(SCALE), sequence, APART),
    "masked": (lambda: attention(masked), sequence, APART),
    "shared keys": (lambda: attention(grouped, KEYS, VALUES), sequence, APART),
    "heads in the batch": (lambda: attention(batched), sequence, APART),
    "linear": (lambda: attention(linear), sequence, APART),
    "images": (lambda: attention(over_images, layer=lambda a, b: nn.Conv2d(a, b, 1)), images, APART),
    "normalized": (lambda: attention(over_images, layer=normal_convolution), images, {"q.0": KEYS, "v.0": VALUES}),
    "one head": (lambda: attention(single), sequence, {"q": HEADS * KEYS, "v": HEADS * VALUES}),
    "rotary": (lambda: attention(turned, rotary=Rotary()), sequence, {"q": KEYS // 2, "v": VALUES}),
    "packed": (Packed, sequence, {"qkv": KEYS}),
    "widths of its own": (Widths, sequence, APART),
    "equal widths": (lambda: Widths(KEYS), sequence, {"q": KEYS, "v": KEYS}),
    "one width": (lambda: OneWidth(SCALE), sequence, {"query": KEYS}),
    "blocks": (
        lambda: nn.Sequential(Block(Packed()), Block(OneWidth(3.0))),
        sequence,
        {"0.attention.qkv": KEYS, "0.mlp.0": 10, "1.attention.query": KEYS, "1.mlp.0": 10},
    ),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_dead_features_go_from_all_heads_and_outputs_stay(name, dtype, tolerance):
    make, inputs, expected = EXACT[name]
    net, seen = network(make).to(dtype), tuple(x.to(dtype) for x in inputs())
    groups = fr.channel_groups(net, seen, inside_heads=True)
    assert {names[0]: count for names, count in zip(groups.layers, groups.counts, strict=True)} == expected
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), seen, inside_heads=True)
    assert entries(smaller) < 0.7 * entries(net)
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=tolerance, atol=tolerance)


#: Scales from the number of features, by what the code that computes them calls.
FROM_SHAPES = {
    "mul": scored(lambda scores, q: scores * q.size(-1) ** -0.5),
    "div": scored(lambda scores, q: scores / math.sqrt(q.shape[-1])),
    "div ": scored(lambda scores, q: scores.div_(q.shape[-1])),
    "tensor": scored(lambda scores, q: scores / torch.tensor(q.shape[-1]).sqrt()),
    "full": scored(lambda scores, q: scores / torch.full([], q.shape[-1] ** 0.5, device=q.device)),
    "scaled_dot_product_attention": fused(None),
}


@pytest.mark.parametrize("what", FROM_SHAPES)
@pytest.mark.parametrize("length", [1, 5])  # A single key has all the weight, whatever the scale.
def test_where_the_scale_comes_from_the_number_of_features_values_go_alone(what, length):
    net, seen = network(FROM_SHAPES[what]), sequence(1, length)
    groups = fr.channel_groups(net, seen, inside_heads=True)
    assert groups.layers == [("v",)]
    reason = next(reason for reason, places in groups.kept.items() if any("q.weight, dimension 0" in p for p in places))
    assert "the number of features" in reason
    assert what.strip() in reason


KEPT = {
    "a number of its own": (lambda: OneWidth(), r"OneWidth.* computes truediv by .*|OneWidth.* computes div by"),
    "a norm": (scored(lambda s, q: 3 * F.normalize(q, dim=-1) @ q.mT), r"linalg_vector_norm"),
    "angles in the code": (scored(lambda s, q: (q * torch.arange(8, device=q.device)) @ q.mT), r"not channels \(mul, "),
    "torch's own": (lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True), "number of features"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_closes_features_is_said(name):
    make, reason = KEPT[name]
    net = Block(make()).double()
    groups = fr.channel_groups(net.to(DEVICE), sequence(), inside_heads=True)
    owners = {layer for names in groups.layers for layer in names}
    assert not owners & {"attention.q", "attention.k", "attention.query", "attention.self_attn"}
    assert re.search(reason, groups.explain())


def test_heads_go_whole_unless_features_are_asked_for():
    net = network(Packed)
    groups = fr.channel_groups(net, sequence())
    assert groups.counts == [HEADS]
    assert groups[0]["qkv.weight"] == fr.Along(0, size=KEYS, packed=3)
    features = fr.channel_groups(net, sequence(), inside_heads=True)
    assert features[0] == {
        "qkv.weight": fr.Along(0, packed=3 * HEADS),
        "qkv.bias": fr.Along(0, packed=3 * HEADS),
        "proj.weight": fr.Along(1, packed=HEADS),
    }
    assert features.sizes == [3 * HEADS * (WIDTH + 1) + HEADS * WIDTH]


def test_attributes_follow_and_the_scale_stays():
    net = network(lambda: OneWidth(SCALE))
    groups = fr.channel_groups(net, sequence(), inside_heads=True, round_to=4)
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), inside_heads=True)
    found = smaller.num_attention_heads, smaller.attention_head_size, smaller.all_head_size, smaller.scale
    assert found == (HEADS, 4, 4 * HEADS, SCALE)
    # The state of a file, in a network that was never trained.
    again = fr.resized(network(lambda: OneWidth(SCALE), seed=1), smaller.state_dict(), inside_heads=True)
    torch.testing.assert_close(outputs(again, sequence()), outputs(smaller, sequence()))


def test_moments_of_an_optimizer_are_sliced_too():
    net, seen = network(lambda: nn.Sequential(Block(Packed()), nn.Linear(WIDTH, 1))), sequence()
    groups = fr.channel_groups(net, seen, inside_heads=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    fr.regularize(optimizer, fr.coupled(fr.group_lasso, groups), strength=1.0, module=net, weights="sqrt_size")
    for _ in range(12):
        optimizer.zero_grad()
        net(*seen).square().mean().backward()
        optimizer.step()
    assert groups.left(fr.with_buffers(net))[0] < KEYS
    tree, state = fr.remove_dead(fr.with_buffers(net), groups, optimizer.state_dict())
    smaller = fr.resized(net, tree, inside_heads=True)
    torch.testing.assert_close(outputs(smaller, seen), outputs(net, seen), rtol=1e-12, atol=1e-12)
    again = torch.optim.Adam(smaller.parameters(), lr=1e-2)
    again.load_state_dict(state)
    smaller(*seen).square().mean().backward()
    again.step()
    assert all(again.state[w]["exp_avg"].shape == w.shape for w in smaller.parameters())


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("heads", [3, 4])  # Of four heads a half of the features is as wide as two of them.
def test_resized_without_what_channel_groups_was_told_is_an_error(inside, heads):
    net, seen = network(lambda: Block(OneWidth(SCALE, heads))), sequence()
    groups = fr.channel_groups(net, seen, inside_heads=inside)
    dead = without_half(net, groups)
    tree = fr.remove_dead(fr.with_buffers(dead), groups)
    told = "inside_heads=True" if heads == 3 else f"inside_heads={not inside}"
    with pytest.raises(ValueError, match=told):
        fr.resized(dead, tree, inside_heads=not inside)
    smaller = fr.resized(dead, tree, inside_heads=inside)
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-12, atol=1e-12)


def test_features_of_all_layers_are_offered_and_the_others_kept():
    net, tokens = network(GPT), words()
    groups = fr.channel_groups(net, tokens, inside_heads=True)
    assert all("mlp" in names[0] for names in groups.layers)  # nanoGPT scales by the number of features.
    assert "attention takes the scale of scores from the number of features" in groups.explain()


def test_large_networks_whose_outputs_are_not_compared_have_no_scale_from_shapes_either(monkeypatch):
    monkeypatch.setattr(trying, "_COPIED", 0)
    for what, layers in (("div", [("v",)]), ("by hand", [("q", "k"), ("v",)])):
        make = FROM_SHAPES[what] if what in FROM_SHAPES else EXACT[what][0]
        groups = fr.channel_groups(network(make), sequence(), inside_heads=True)
        assert groups.layers == layers
        assert "Outputs were not compared" in groups.explain()


def test_queries_and_keys_stay_where_nothing_can_be_tried_out():
    def run(net, x):
        if net.q.weight.detach().cpu().numpy()[0, 0] != own:
            raise ArithmeticError("it has other weights")
        q, k, v = split(net, x)
        return read(net, SCALE * q @ k.mT, v)

    net = network(lambda: attention(run))
    own = net.q.weight.detach().cpu().numpy()[0, 0]
    groups = fr.channel_groups(net, sequence(), inside_heads=True)
    assert groups.layers == [("v",)]
    assert "a product of two tensors of channels, whose scale may go by their number (" in groups.explain()
    assert "Not tried out" in groups.explain()


def test_layers_that_are_asked_for_go_with_what_shares_their_width():
    net, seen = network(EXACT["blocks"][0]), sequence()
    groups = fr.channel_groups(net, seen, layers=["*.key"], inside_heads=True)
    assert groups.layers == [("1.attention.query", "1.attention.key", "1.attention.value")]


def test_where_it_has_no_effect_or_is_no_bool_is_an_error():
    mlp = nn.Sequential(*linears(5, 4, 3)).double().to(DEVICE)
    with pytest.raises(ValueError, match="multiplies no two tensors of channels"):
        fr.channel_groups(mlp, vectors(), inside_heads=True)
    with pytest.raises(ValueError, match="inside_heads has no effect without example_inputs"):
        fr.channel_groups(mlp, inside_heads=True)
    with pytest.raises(TypeError, match="inside_heads is 1"):
        fr.channel_groups(mlp, vectors(), inside_heads=1)
    with pytest.raises(TypeError, match="inside_heads is None"):
        fr.resized(mlp, mlp.state_dict(), inside_heads=None)


class Shared(nn.Module):
    """Attention by hand with a single head of keys and values, and a frozen slope for each head of queries."""

    def __init__(self, how, heads=4, of_keys=1):
        super().__init__()
        self.how, width = how, 4
        self.q, self.k = nn.Linear(16, heads * width), nn.Linear(16, of_keys * width)
        self.v, self.o = nn.Linear(16, of_keys * width), nn.Linear(heads * width, 16)
        self.slopes = nn.Parameter(torch.linspace(0.5, 1, heads)[:, None, None], requires_grad=False)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (SHARED[self.how](y, q.shape[1] // y.shape[1]) for y in (k, v))
        scores = q @ k.transpose(-1, -2) / 2 * self.slopes
        return x + self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


SHARED = {
    "repeat_interleave": lambda y, times: y.repeat_interleave(times, 1),
    "repeat": lambda y, times: y.repeat(1, times, 1, 1),
    "expand": lambda y, times: y[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2),
    "broadcast": lambda y, times: y,
}


@pytest.mark.parametrize("how", SHARED)
def test_heads_of_queries_go_that_share_one_head_of_keys(how):
    net = network(lambda: Shared(how))
    inputs = (drawn(2, 5, 16),)
    groups = fr.channel_groups(net, inputs)
    assert groups.counts == [4]
    assert groups[0]["slopes"] == fr.Along(0, penalized=False)
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), inputs)
    assert smaller.q.out_features == 8
    assert smaller.k.out_features == 4
