"""Channels of any network, followed through what its forward pass does: what is dead goes, and outputs stay."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, assert_equal, drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import all_or_nothing, halve
from torch import nn

import funcreg as fr
from funcreg.networks.removal import without


def images(*shape):
    return (drawn(2, *(shape or (3, 8, 8))),)


def vectors(*shape):
    return (drawn(4, *(shape or (5,))),)


class Net(nn.Module):
    """Named layers, and what is done with them."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def network(make, seed=0):
    """A network with random weights, statistics too, in evaluation."""
    torch.manual_seed(seed)
    return halve(make().double().eval().to(DEVICE), [], seed)


def without_half(net, groups, seed=0, among=None):
    """The network once a random half of each family of groups is zero, or of some of these, penalized entries alone."""
    generator, net = torch.Generator().manual_seed(seed), copy.deepcopy(net)
    weights = []
    for i, count in enumerate(groups.counts):
        gone = torch.zeros(count, dtype=torch.float64)
        some = count // 2 if among is None or i in among else 0
        gone[torch.randperm(count, generator=generator, device="cpu")[:some]] = 1e9
        weights.append(gone.to(DEVICE))
    dead = fr.coupled(fr.group_lasso, groups).prox(dict(net.named_parameters()), 1.0, weights=weights)
    with torch.no_grad():
        for name, w in net.named_parameters():
            w.copy_(dead[name])
    return net


def entries(net):
    return sum(w.numel() for w in net.parameters())


def outputs(net, inputs):
    with torch.no_grad():
        return net(**inputs) if isinstance(inputs, dict) else net(*inputs)


def linears(*widths):
    return [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]


def between(run, width=6, inner=None, **layers):
    """Something between two linear layers."""
    first, last = nn.Linear(5, width), nn.Linear(inner or width, 3)
    return Net(lambda net, x: net.last(run(net, net.first(x))), first=first, last=last, **layers)


def among(run, width=6, inner=None, out=nn.Conv2d, **layers):
    """Something between two convolutions."""
    first, last = nn.Conv2d(3, width, 3), out(inner or width, 4, 1)
    return Net(lambda net, x: net.last(run(net, net.first(x))), first=first, last=last, **layers)


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = None
        if stride > 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu_(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.down is None else self.down(x)
        return F.relu(y, inplace=True)


class Dense(nn.Module):
    def __init__(self, inputs, growth, layers):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inputs + i * growth),
                nn.ReLU(),
                nn.Conv2d(inputs + i * growth, growth, 3, padding=1, bias=False),
            )
            for i in range(layers)
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class Unet(nn.Module):
    def __init__(self, kind="transposed"):
        super().__init__()
        block = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
        self.down1, self.down2, self.middle = block(3, 6), block(6, 8), block(8, 10)
        up = lambda a, b: nn.ConvTranspose2d(a, b, 2, 2)
        if kind == "upsampled":
            up = lambda a, b: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(a, b, 1))
        self.up2, self.merge2 = up(10, 8), block(16, 8)
        self.up1, self.merge1 = up(8, 6), block(12, 6)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.up2(self.middle(F.avg_pool2d(b, 2)))
        y = self.up1(self.merge2(torch.cat([y, b], dim=1)))
        return self.head(self.merge1(torch.cat((a, y), dim=1)))


class Attention(nn.Module):
    """Heads counted from the width, as code that may be resized does."""

    def __init__(self, width=12, size=3, kind="packed", groups=1):
        super().__init__()
        self.size, self.kind, self.groups = size, kind, groups
        if kind == "packed":
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (
                nn.Linear(width, width),
                *linears(width, width // groups),
                nn.Linear(width, width // groups),
            )
        self.out = nn.Linear(width, width)

    def forward(self, x):
        b, n, _ = x.shape
        if self.kind == "packed":
            q, k, v = self.qkv(x).reshape(b, n, 3, -1, self.size).permute(2, 0, 3, 1, 4)
        elif self.kind == "interleaved":
            raise NotImplementedError
        else:
            q, k, v = (f(x).view(b, n, -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.groups > 1:
            k, v = (y[:, :, None].expand(-1, -1, self.groups, -1, -1).flatten(1, 2) for y in (k, v))
        if self.kind == "by hand":
            y = torch.softmax(q @ k.transpose(-2, -1) / self.size**0.5, -1) @ v
        elif self.kind == "einsum":
            scores = torch.einsum("bhnd,bhmd->bhnm", q, k).mul(self.size**-0.5).softmax(-1)
            y = torch.einsum("bhnm,bhmd->bhnd", scores, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.kind == "causal")
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


class Packed(nn.Module):
    """Queries in one layer with fewer keys and values, as code that may be resized counts them."""

    def __init__(self, by="split", heads=6, keys=2):
        super().__init__()
        self.by, self.head_dim, self.n_heads, self.n_kv_heads = by, 2, heads, keys
        self.qkv, self.out_proj = nn.Linear(12, 2 * (heads + 2 * keys)), nn.Linear(2 * heads, 12)

    def forward(self, x):
        y, q, k = self.qkv(x), self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        parts = y.split([q, k, k], -1)
        if self.by == "slices":
            parts = y[..., :q], y[..., q : q + k], y[..., q + k :]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed, self.places = nn.Embedding(11, 12), nn.Parameter(torch.zeros(7, 12))
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(12), Attention(**options), nn.RMSNorm(12)
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.places[: tokens.shape[1]]
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))


def words():
    return (torch.arange(14, device=DEVICE).reshape(2, 7) % 11,)


class Shuffled(nn.Module):
    """A unit of ShuffleNet: half of the channels go through, and all are shuffled."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(6, 6, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 6, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
        )
        self.tail = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        a, b = self.stem(x).chunk(2, dim=1)
        x = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.tail(x)


def excited(net, y):
    return y * torch.sigmoid(net.grow(F.relu(net.squeeze(y.mean((2, 3))))))[:, :, None, None]


def recurrence(net, x):
    state = x.new_zeros(len(x), net.across.in_features)
    for step in x.unbind(1):
        state = torch.tanh(net.first(step) + net.across(state))
    return net.last(state)


def written(net, x):
    place = torch.zeros(len(x), 2, net.a.out_features, dtype=x.dtype, device=x.device)
    place[:, 0], place[:, 1] = net.a(x), net.b(x).relu()
    return net.last(place.sum(1))


class Computed(nn.Linear):
    """A linear layer whose weight is computed of a parameter and a buffer."""

    def __init__(self, inputs, outputs, kind):
        super().__init__(inputs, outputs)
        self.kind, self.gain = kind, nn.Parameter(torch.ones(outputs, device="cpu"))
        self.register_buffer("mask", (torch.rand(outputs, inputs, device="cpu") > 0.1).float())

    def forward(self, x):
        if self.kind == "scaled":
            return F.linear(x, self.weight * 0.5, self.bias * 0.1)
        if self.kind == "masked":
            return F.linear(x, self.mask * self.weight * self.gain[:, None], self.bias)
        return F.linear(x, self.weight + (torch.round(8 * self.weight) / 8 - self.weight).detach(), self.bias)


def computed(kind):
    layers = [Computed(a, b, kind) for a, b in ((5, 8), (8, 10), (10, 8), (8, 3))]
    return nn.Sequential(*[each for layer in layers for each in (layer, nn.LeakyReLU(0.2))][:-1])


class Experts(nn.Module):
    """Two layers of four experts each, stacked, and a share of each for every example."""

    def __init__(self):
        super().__init__()
        self.gate, self.last = nn.Linear(5, 4), nn.Linear(6, 3)
        self.into, self.out = (
            nn.Parameter(torch.zeros(4, 5, 8, device="cpu")),
            nn.Parameter(torch.zeros(4, 8, 6, device="cpu")),
        )
        self.shift = nn.Parameter(torch.zeros(4, 8, device="cpu"))

    def forward(self, x):
        y = F.gelu(torch.einsum("bi,eih->beh", x, self.into) + self.shift)
        return self.last(torch.einsum("beh,eho,be->bo", y, self.out, self.gate(x).softmax(-1)))


def beside(net, x):
    """Queries, keys and values by one product, of three weights side by side."""
    layers = net.q, net.k, net.v
    weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    q, k, v = F.linear(net.first(x).relu(), weight, bias).chunk(3, -1)
    return net.last(q.relu() * k.tanh() + v)


def masked(net, x):
    """Attention that looks back, by a mask that is written out for each head."""
    q, k, v = (y.unflatten(-1, (-1, 3)).transpose(1, 2) for y in net.maps(x).chunk(3, -1))
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    y = F.scaled_dot_product_attention(q, k, v, mask.expand(len(x), q.shape[1], -1, -1))
    return net.last(y.transpose(1, 2).flatten(2))


CONV = nn.Conv2d
# What makes a network, its inputs, and at least the share of parameters that goes with a random half of all groups.
NETWORKS = {
    "linear layers": (lambda: nn.Sequential(*linears(5, 7, 6, 3)), vectors, 0.5),
    "convolutions": (
        lambda: nn.Sequential(CONV(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(True), CONV(6, 4, 3), nn.ReLU(), CONV(4, 3, 1)),
        images,
        0.5,
    ),
    "a flattening": (
        lambda: nn.Sequential(
            CONV(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 8), nn.Linear(8, 3)
        ),
        images,
        0.6,
    ),
    "one dimension": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 6, 3),
            nn.BatchNorm1d(6),
            nn.ELU(),
            nn.ConvTranspose1d(6, 8, 2),
            nn.AvgPool1d(2),
            nn.Conv1d(8, 2, 1),
        ),
        lambda: images(3, 9),
        0.5,
    ),
    "three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(1, 6, 2), nn.GELU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 3)),
        lambda: images(1, 4, 4, 4),
        0.4,
    ),
    "a residual network": (
        lambda: nn.Sequential(
            nn.Sequential(CONV(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            Residual(8, 8),
            Residual(8, 12, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 5),
        ),
        images,
        0.7,
    ),
    "a dense network": (
        lambda: nn.Sequential(
            CONV(3, 8, 3, padding=1),
            Dense(8, 4, 3),
            nn.BatchNorm2d(20),
            nn.ReLU(),
            CONV(20, 10, 1),
            nn.AvgPool2d(2),
            Dense(10, 4, 2),
            nn.BatchNorm2d(18),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(18, 5),
        ),
        images,
        0.6,
    ),
    "a U-Net": (Unet, images, 0.65),
    "a U-Net that is upsampled": (lambda: Unet("upsampled"), images, 0.65),
    "a unit of ShuffleNet": (Shuffled, images, 0.5),
    "groups of a convolution": (
        lambda: nn.Sequential(
            CONV(3, 12, 1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            CONV(12, 24, 3, groups=4),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            CONV(24, 4, 1),
        ),
        images,
        0.45,
    ),
    "depthwise": (
        lambda: nn.Sequential(
            CONV(3, 8, 1), nn.ReLU6(), CONV(8, 16, 3, groups=8), nn.Hardswish(), CONV(16, 4, 1), nn.Conv2d(4, 3, 1)
        ),
        images,
        0.4,
    ),
    "depthwise, transposed": (
        lambda: nn.Sequential(CONV(3, 8, 1), nn.ConvTranspose2d(8, 16, 2, groups=8), nn.SiLU(), CONV(16, 4, 1)),
        images,
        0.4,
    ),
    "squeeze and excitation": (
        lambda: among(excited, squeeze=nn.Linear(6, 4), grow=nn.Linear(4, 6)),
        images,
        0.5,
    ),
    "group normalization": (
        lambda: among(lambda net, y: F.relu(net.norm(y)), 12, norm=nn.GroupNorm(4, 12)),
        images,
        0.4,
    ),
    "instance normalization": (
        lambda: among(lambda net, y: F.relu(net.norm(y)), norm=nn.InstanceNorm2d(6, affine=True)),
        images,
        0.4,
    ),
    "instance normalization without a scale": (
        lambda: among(lambda net, y: F.relu(F.instance_norm(y))),
        images,
        0.4,
    ),
    "batch normalization without statistics": (
        lambda: between(lambda net, y: F.relu(net.norm(y)), norm=nn.BatchNorm1d(6, track_running_stats=False)),
        vectors,
        0.4,
    ),
    "a scale and a bias by hand": (
        lambda: among(
            lambda net, y: F.relu(y * net.scale.view(1, -1, 1, 1) + net.bias[None, :, None, None]),
            scale=nn.Parameter(torch.ones(6)),
            bias=nn.Parameter(torch.ones(6)),
        ),
        images,
        0.4,
    ),
    "PReLU": (lambda: among(lambda net, y: net.act(y), act=nn.PReLU(6)), images, 0.4),
    "a constant that is read by the last layer": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 3)),
        vectors,
        0.4,
    ),
    "constants that biases take": (
        lambda: nn.Sequential(
            nn.Linear(5, 8), nn.Softplus(), nn.Linear(8, 7), nn.Sigmoid(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)
        ),
        vectors,
        0.5,
    ),
    "constants that biases of convolutions take": (
        lambda: nn.Sequential(
            CONV(3, 6, 3), nn.BatchNorm2d(6), nn.Sigmoid(), nn.MaxPool2d(2), CONV(6, 6, 2, 2), nn.Flatten(), nn.ReLU()
        ).extend([nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)]),
        images,
        0.5,
    ),
    "a constant that is read in several places": (
        lambda: Net(
            lambda net, x: net.last(torch.cos(y := net.first(x)) @ net.mix + net.a(torch.cos(y)).relu() * net.b(y)),
            first=nn.Linear(5, 6),
            a=nn.Linear(6, 4),
            b=nn.Linear(6, 4),
            mix=nn.Parameter(torch.ones(6, 1)),
            last=nn.Linear(4, 2),
        ),
        vectors,
        0.2,
    ),
    "a constant in a border of it": (
        lambda: among(
            lambda net, y: F.relu(net.mix(F.pad(F.pad(y.sigmoid(), (1, 1), value=0.5), (1, 0, 0, 1), "reflect"))),
            inner=8,
            mix=CONV(6, 8, 3),
        ),
        images,
        0.5,
    ),
    "parameters in lists": (
        lambda: Net(
            lambda net, x: F.linear(F.linear(F.linear(x, net.w[0], net.w[1]).sigmoid(), net.w[2], net.w[3]), net.w[4]),
            w=nn.ParameterList([torch.ones(8, 5), torch.ones(8), torch.ones(7, 8), torch.ones(7), torch.ones(3, 7)]),
        ),
        vectors,
        0.5,
    ),
    "several networks side by side": (
        lambda: Net(
            lambda net, x: net.last(torch.cat([net.a(x), F.max_pool2d(x, 3, 1, 1), net.b(x)], 1)),
            a=CONV(3, 6, 1),
            b=CONV(3, 4, 3, padding=1),
            last=CONV(13, 3, 1),
        ),
        images,
        0.3,
    ),
    "a stack that is summed": (
        lambda: Net(
            lambda net, x: net.last(torch.stack([net.a(x), net.b(x)]).sum(0)),
            a=nn.Linear(5, 6),
            b=nn.Linear(5, 6),
            last=nn.Linear(6, 2),
        ),
        vectors,
        0.4,
    ),
    "a gate in one matrix": (
        lambda: Net(lambda net, x: net.down(F.glu(net.up(x))), up=nn.Linear(5, 16), down=nn.Linear(8, 3)),
        vectors,
        0.4,
    ),
    "a gate in one matrix, in chunks": (
        lambda: Net(
            lambda net, x: net.down((lambda a, b: a * F.gelu(b))(*net.up(x).chunk(2, -1))),
            up=nn.Linear(5, 16),
            down=nn.Linear(8, 3),
        ),
        vectors,
        0.4,
    ),
    "pixels shuffled": (
        lambda: Net(
            lambda net, x: net.last(F.relu(F.pixel_shuffle(net.first(x), 2))), first=CONV(3, 24, 1), last=CONV(6, 2, 3)
        ),
        images,
        0.4,
    ),
    "pixels as features": (
        lambda: Net(
            lambda net, x: net.last(F.pixel_unshuffle(F.relu(net.first(x)), 2)),
            first=CONV(3, 6, 1),
            last=CONV(24, 2, 3),
        ),
        images,
        0.4,
    ),
    "padding": (lambda: among(lambda net, y: F.pad(F.pad(y, (1, 1, 2, 0)), (1, 1, 1, 1), "reflect")), images, 0.4),
    "channels last": (
        lambda: among(
            lambda net, y: net.grow(y.permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2), 6, 10, grow=nn.Linear(6, 10)
        ),
        images,
        0.5,
    ),
    "one layer in two places": (
        lambda: Net(
            lambda net, x: net.last(net.mix(F.relu(net.mix(F.relu(net.first(x)))))),
            first=nn.Linear(5, 6),
            mix=nn.Linear(6, 6),
            last=nn.Linear(6, 2),
        ),
        vectors,
        0.4,
    ),
    "a sum of what a layer takes and gives": (
        lambda: between(lambda net, y: F.relu(y + net.mix(F.relu(y))), mix=nn.Linear(6, 6)),
        vectors,
        0.4,
    ),
    "a low rank": (
        lambda: Net(
            lambda net, x: x @ net.a @ net.b, a=nn.Parameter(torch.ones(5, 6)), b=nn.Parameter(torch.ones(6, 3))
        ),
        vectors,
        0.4,
    ),
    "a product of weights": (
        lambda: Net(
            lambda net, x: F.linear(x, net.w + net.b @ net.a),
            w=nn.Parameter(torch.ones(3, 5)),
            a=nn.Parameter(torch.ones(4, 5)),
            b=nn.Parameter(torch.ones(3, 4)),
        ),
        vectors,
        0.2,
    ),
    "MultiheadAttention": (
        lambda: Net(lambda net, x: net.attend(x, x, x)[0], attend=nn.MultiheadAttention(12, 4, batch_first=True)),
        lambda: (drawn(2, 5, 12),),
        0.45,
    ),
    "MultiheadAttention over another sequence": (
        lambda: Net(lambda net, x, y: net.attend(x, y, y)[0], attend=nn.MultiheadAttention(12, 4, batch_first=True)),
        lambda: (drawn(2, 5, 12), drawn(2, 4, 12)),
        0.45,
    ),
    "MultiheadAttention where some are padded": (
        lambda: Net(
            lambda net, x: net.attend(x, x, x, key_padding_mask=x[..., 0] > 1)[0],
            attend=nn.MultiheadAttention(12, 4, batch_first=True),
        ),
        lambda: (drawn(2, 5, 12),),
        0.45,
    ),
    "a mask that is expanded": (
        lambda: Net(masked, maps=nn.Linear(12, 36), last=nn.Linear(12, 12)),
        lambda: (drawn(2, 5, 12),),
        0.45,
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(12, 4, 20, batch_first=True), 2, enable_nested_tensor=False
        ),
        lambda: (drawn(2, 5, 12),),
        0.4,
    ),
    "attention, packed": (Transformer, words, 0.35),
    "attention, causal": (lambda: Transformer(kind="causal"), words, 0.35),
    "attention by hand": (lambda: Transformer(kind="by hand"), words, 0.35),
    "attention by einsum": (lambda: Transformer(kind="einsum"), words, 0.35),
    "attention, more queries packed than keys": (Packed, lambda: (drawn(2, 5, 12),), 0.4),
    "attention, more queries packed than keys, in slices": (lambda: Packed("slices"), lambda: (drawn(2, 5, 12),), 0.4),
    "a recurrence by hand": (
        lambda: Net(recurrence, first=nn.Linear(5, 8), across=nn.Linear(8, 8, bias=False), last=nn.Linear(8, 3)),
        lambda: (drawn(2, 4, 5),),
        0.4,
    ),
    "a place to write into": (
        lambda: Net(written, a=nn.Linear(5, 8), b=nn.Linear(5, 8), last=nn.Linear(8, 3)),
        vectors,
        0.4,
    ),
    "attention, two queries for a key": (lambda: Transformer(kind="by hand", groups=2), words, 0.3),
    "experts that are stacked": (Experts, vectors, 0.5),
    "weights that are scaled": (lambda: computed("scaled"), vectors, 0.4),
    "weights under a mask": (lambda: computed("masked"), vectors, 0.4),
    "weights that are rounded": (lambda: computed("rounded"), vectors, 0.4),
    "weights side by side": (
        lambda: Net(
            beside, first=nn.Linear(5, 8), **dict(zip("qkv", linears(8, 8, 8, 8), strict=True)), last=nn.Linear(8, 3)
        ),
        vectors,
        0.6,
    ),
}
every_network = pytest.mark.parametrize(("make", "inputs", "share"), NETWORKS.values(), ids=NETWORKS)


@every_network
def test_a_network_without_dead_channels_gives_what_it_gave(make, inputs, share):
    net, seen = network(make), inputs()
    groups = fr.channel_groups(net, seen)
    for seed in range(2):
        dead = without_half(net, groups, seed)
        smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), seen)
        expected = outputs(dead, seen)
        torch.testing.assert_close(outputs(smaller, seen), expected, rtol=1e-10, atol=1e-10)
        assert (expected[0] - expected[1]).abs().max() > 1e-6  # It still tells inputs apart.
        assert 1 - entries(smaller) / entries(net) > share


@every_network
def test_families_do_not_overlap_and_tell_what_they_carry(make, inputs, share):
    net, seen = network(make), inputs()
    before = copy.deepcopy(net.train())
    groups = fr.channel_groups(net, seen)
    assert all(a.training for a in net.modules())
    assert not any(a._forward_hooks or a._forward_pre_hooks for a in net.modules())
    assert_equal(fr.with_buffers(net), fr.with_buffers(before))
    params = {name: w.detach() for name, w in net.named_parameters()}
    fr.coupled(fr.group_lasso, groups).prox(params, 1.0)  # Has no overlap.
    for i, family in enumerate(groups):
        one = fr.ChannelGroups([family])
        smaller = fr.remove_dead(without_half(net, fr.ChannelGroups([family], [groups.counts[i]])).state_dict(), one)
        carried = groups.counts[i] // 2 * groups.sizes[i]
        lost = sum(w.numel() for w in params.values()) - sum(smaller[n].numel() for n in params)
        twice = any(isinstance(where, tuple) and not isinstance(where, fr.Along) for where in family.values())
        assert 0 < lost < carried if twice else lost == carried
        fewer = without(fr.with_buffers(net), [family], [groups.counts[i] - 1], 1)
        assert sum(w.numel() - fewer[name].numel() for name, w in params.items()) == groups.sizes[i]


def test_a_hidden_unit_that_is_a_row_and_a_column_of_one_weight_is_counted_once():
    net = network(lambda: Net(lambda net, x: net.f(net.r(x)[0][:, -1]), r=nn.LSTM(6, 10), f=nn.Linear(10, 3)))
    groups = fr.channel_groups(net, (drawn(2, 5, 6),))
    # Rows of four gates of 6 inputs and 2 biases, a row and column of 40 by 10 entries, and a column of the last layer.
    assert (groups.counts, groups.sizes) == ([10], [4 * 8 + (400 - 36 * 9) + 3])


# What is kept

KEPT = {
    "LayerNorm": (
        lambda: between(lambda net, y: net.norm(y), norm=nn.LayerNorm(6)),
        r"normalized over channels .*'norm'",
    ),
    "RMSNorm": (lambda: between(lambda net, y: net.norm(y), norm=nn.RMSNorm(6)), r"'norm'"),
    "softmax": (lambda: between(lambda net, y: y.softmax(-1)), r"a softmax over channels"),
    "mean": (lambda: between(lambda net, y: y - y.mean(-1, keepdim=True)), r"reduced over channels \(mean\)"),
    "max": (lambda: between(lambda net, y: y - y.amax(-1, keepdim=True)), r"reduced over channels \(amax\)"),
    "a norm": (lambda: between(lambda net, y: F.normalize(y)), r"reduced over channels \(linalg_vector_norm\)"),
    "sorting": (lambda: between(lambda net, y: y.sort(-1)[0]), r"their order is written in the code \(sort\)"),
    "an index": (lambda: between(lambda net, y: y[:, [3, 1, 2, 0, 5, 4]]), r"looked up by an index \(index\)"),
    "flipping": (lambda: between(lambda net, y: y.flip(-1)), r"their order is written in the code \(flip\)"),
    "unequal parts": (
        lambda: between(lambda net, y: torch.cat(y.split([2, 4], -1)[::-1], -1)),
        r"unequal parts are taken \(split_with_sizes\)",
    ),
    "a slice": (lambda: between(lambda net, y: y[:, 1:], inner=5), r"unequal parts are taken \(slice\)"),
    "every second": (lambda: between(lambda net, y: y[:, ::2], inner=3), r"every few entries are taken"),
    "one of them": (lambda: between(lambda net, y: y * y[:, :1]), r"unequal parts are taken"),
    "a sum with inputs": (
        lambda: Net(lambda net, x: net.b(x + net.a(x)), a=nn.Linear(5, 5), b=nn.Linear(5, 3)),
        r"\(add\)",
    ),
    "a constant": (lambda: between(lambda net, y: y + torch.ones(6, dtype=y.dtype, device=y.device)), r"\(add\)"),
    "a constant shift that is not read at the end": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)),
        None,
    ),
    "a shift between layers": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Softplus(), nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)),
        None,
    ),
    "cumulative sums": (lambda: between(lambda net, y: y.cumsum(-1)), r"\(cumsum\)"),
    "an operation nobody knows": (lambda: between(lambda net, y: torch.fft.fft(y).real), r"is not followed"),
    "a sum, which may be a mean": (
        lambda: between(lambda net, y: y - y.sum(-1, keepdim=True) / y.shape[-1]),
        r"reduced over channels \(sum\)",
    ),
    "an inner product that is scaled": (
        lambda: Net(lambda net, x: (y := net.a(x)) @ net.b(x).T / y.shape[1], a=nn.Linear(5, 6), b=nn.Linear(5, 6)),
        r"a product of two tensors of channels, whose scale may go by their number",
    ),
    "pixels": (
        lambda: Net(lambda net, x: net.b(net.a(x)), a=nn.Linear(8, 8), b=CONV(3, 2, 3)),
        r"they are pixels \(convolution, 'b'\)",
    ),
    "a weight that is normalized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.Linear(6, 3)),
        r"weight_norm_interface.*parametrizations.weight.original1, dimension 0 of 6",
    ),
    "a weight that is 1 where its parameter is 0": (
        lambda: Net(
            lambda net, x: F.linear(net.a(x).sigmoid(), net.b.weight + 1), a=nn.Linear(5, 6), b=nn.Linear(6, 3)
        ),
        r"a dead one would be 0.5, not 0, which no bias here can take \(mm\)",
    ),
    "an output": (
        lambda: Net(lambda net, x: {"hidden": (h := net.a(x)), "out": net.b(h)}, a=nn.Linear(5, 6), b=nn.Linear(6, 3)),
        r"an output of the network",
    ),
}


@pytest.mark.parametrize(
    ("make", "reason"), [row for row in KEPT.values() if row[1]], ids=[n for n, r in KEPT.items() if r[1]]
)
def test_channels_that_cannot_go_without_a_trace_are_kept_and_the_reason_is_told(make, reason):
    net = network(make)
    seen = images() if any(isinstance(layer, nn.Conv2d) for layer in net.modules()) else vectors()
    with pytest.raises(ValueError, match=rf"(?s)found no channels in .*{reason}"):
        fr.channel_groups(net, seen)


@pytest.mark.parametrize("name", [name for name, row in KEPT.items() if row[1] is None])
def test_channels_that_would_be_a_number_are_kept_where_they_are_read_by_what_forms_groups(name):
    net, seen = network(KEPT[name][0]), vectors()
    if "not read at the end" in name:  # The reader does not form groups, so that its columns are in the norm.
        assert list(fr.channel_groups(net, seen)) == [{"0.weight": 0, "0.bias": 0, "2.weight": 1}]
        return
    groups = fr.channel_groups(net, seen)
    assert list(groups) == [{"2.weight": 0, "4.weight": 1}]
    assert "a dead one would be 0.693147, not 0" in groups.explain()


def readers(net, seen):
    """Where biases take what dead channels are."""
    groups = fr.channel_groups(net, seen)
    return {
        name: (where.constant, where.bias)
        for family in groups
        for name, where in family.items()
        if isinstance(where, fr.Along) and where.bias is not None
    }


def test_a_bias_takes_a_constant_where_it_is_the_same_at_every_place_and_used_once():
    layers = lambda *more: lambda: nn.Sequential(CONV(3, 6, 1), nn.Sigmoid(), *more, nn.ReLU(), CONV(8, 2, 1))
    assert readers(network(layers(CONV(6, 8, 3))), images()) == {"2.weight": (0.5, "2.bias")}
    for reader in (CONV(6, 8, 3, padding=1), CONV(6, 8, 3, bias=False), nn.ConvTranspose2d(6, 8, 2)):
        net = network(layers(reader))
        assert readers(net, images()) == {}
        assert "a dead one would be 0.5, not 0" in fr.channel_groups(net, images()).explain()

    def twice(net, x):
        return net.last(F.relu(net.mix(torch.sigmoid(net.first(x)))) + F.relu(net.mix(net.other(x))))

    parts = {"first": nn.Linear(5, 6), "other": nn.Linear(5, 6), "mix": nn.Linear(6, 4), "last": nn.Linear(4, 2)}
    assert readers(network(lambda: Net(twice, **parts)), vectors()) == {}

    def shared(net, x):
        return net.last(F.relu(net.mix(torch.sigmoid(net.first(x)))) + net.mix.bias)

    assert readers(network(lambda: Net(shared, **parts)), vectors()) == {}


def test_no_bias_takes_a_constant_that_lies_between_zeros_or_is_averaged_with_them():
    def unpooled(net, y):
        y, where = F.max_pool2d(y.sigmoid(), 2, return_indices=True)
        return F.relu(net.mix(F.max_unpool2d(y, where, 2)))

    for run in (unpooled, lambda net, y: F.relu(net.mix(F.avg_pool2d(y.sigmoid(), 3, 1, 1)))):
        assert readers(network(lambda run=run: among(run, inner=8, mix=CONV(6, 8, 3))), images()) == {}


@all_or_nothing
def test_a_plain_list_of_families_has_the_constants_and_a_part_of_a_network_too():
    net, seen = network(NETWORKS["constants that biases take"][0]), vectors()
    groups = fr.channel_groups(net, seen, prefix="part")
    around = nn.ModuleDict({"part": without_half(net, fr.channel_groups(net, seen))})
    tree = fr.with_buffers(around)
    before = copy.deepcopy(tree)
    smaller = fr.resized(around, fr.remove_dead(tree, list(groups)))
    assert_equal(tree, before)
    torch.testing.assert_close(outputs(smaller["part"], seen), outputs(around["part"], seen), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"at leaf 'part.2.weight': .*expected a bias among the leaves"):
        fr.remove_dead(
            {name: w for name, w in tree.items() if name != "part.2.bias"},
            groups[:1],
        )
    for wrong in (fr.Along(1, constant=0.5, bias="b"), fr.Along(1, penalized=False, constant=0.5)):
        with pytest.raises(ValueError, match="expected a constant with the bias that takes it"):
            fr.remove_dead({"a": torch.zeros(3), "w": torch.ones(2, 3)}, {"a": 0, "w": wrong})
    with pytest.raises(ValueError, match=r"leaf 'b' of shape \(3,\) is to take the constants .*expected 2 entries"):
        fr.remove_dead(
            {"a": torch.zeros(3), "w": torch.ones(2, 3), "b": torch.ones(3)},
            {"a": 0, "w": fr.Along(1, penalized=False, constant=0.5, bias="b")},
        )


def test_what_is_one_number_for_some_inputs_alone_is_no_constant():
    def run(net, x):
        gate = torch.sigmoid(net.first(x)) * x[:, :1]  # Not the same at every input.
        return net.last(net.mix(F.threshold(gate, 5.0, 0.0)).relu())

    parts = {"first": nn.Linear(5, 6), "mix": nn.Linear(6, 6, bias=False), "last": nn.Linear(6, 3)}
    net = network(lambda: Net(run, **parts))
    assert "first.weight" not in [name for family in fr.channel_groups(net, vectors()) for name in family]


def test_weights_that_are_standardized_keep_their_columns():
    def standardized(net, y):
        w = net.conv.weight
        w = F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True).reshape(w.shape)
        return F.relu(F.conv2d(y, w, net.conv.bias))

    net, seen = network(lambda: among(standardized, 6, 8, conv=CONV(6, 8, 1))), images()
    assert list(fr.channel_groups(net, seen)) == [{"conv.weight": 0, "conv.bias": 0, "last.weight": 1}]


def test_views_of_what_is_written_into_are_not_taken_for_zero():
    def run(net, y):
        view = y.view(y.shape)
        y.add_(1.0)
        return net.mix(view).relu()

    assert readers(network(lambda: between(run, mix=nn.Linear(6, 6))), vectors()) == {"mix.weight": (1.0, "mix.bias")}
    net = network(lambda: between(run, mix=nn.Linear(6, 6, bias=False)))
    assert "first.weight" not in [name for family in fr.channel_groups(net, vectors()) for name in family]


def test_unequal_parts_are_kept_where_nobody_knows_how_they_become_smaller():
    unknown = network(lambda: Net(lambda net, x: net.part(x), part=Packed()))
    (x,) = (drawn(2, 5, 12),)
    assert fr.channel_groups(unknown, (x,)).counts == [2]
    del unknown.part.n_kv_heads
    parts = lambda part, x: part.out_proj(torch.cat(part.qkv(x).split([12, 4, 4], -1)[:1], -1))
    unknown.part.forward = types.MethodType(parts, unknown.part)
    with pytest.raises(ValueError, match=r"unequal parts are taken \(split_with_sizes, 'part'\)"):
        fr.channel_groups(unknown, (x,))


def test_packed_heads_of_which_a_family_names_a_part_are_an_error():
    net = network(Packed)
    tree = {name: w.detach() for name, w in net.named_parameters()}
    tree["qkv.weight"], tree["qkv.bias"] = tree["qkv.weight"][:16], tree["qkv.bias"][:16]
    with pytest.raises(
        ValueError, match=r"projections of '', a Packed, do not hold whole heads of 2 .* had 6 heads of q"
    ):
        fr.resized(net, tree)


def test_inputs_on_which_the_module_fails_are_told_with_what_it_takes():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*linears(5, 6, 3))

        def forward(self, x, *, scale=1.0):
            return self.layers(x) * scale

    net, (x,) = network(Named), vectors()
    for wrong, said in (
        (x[:, :4], r"Named failed in 'layers.0', a Linear on example_inputs, which are \(float64\[4, 4\] on"),
        ({"y": x}, r"Named failed on example_inputs, which are \(y=float64\[4, 5\] on .*TypeError"),
        (
            (x, 3),
            r"which are \(float64\[4, 5\] on \w+, int\): TypeError: .*Its forward takes \(x, \*, scale=1.0\); exp",
        ),
        ((), r"which are \(\): TypeError: .*expected a tuple of positional arguments, a dict of keyword"),
        (x.float(), r"float32\[4, 5\]"),
    ):
        with pytest.raises(ValueError, match=said):
            fr.channel_groups(net.train(), wrong)
        assert net.training
        assert all(layer.training for layer in net.modules())
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in net.modules())


def test_what_is_behind_a_normalization_is_kept_by_its_reason():
    layers = lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    kept = fr.channel_groups(network(layers), vectors()).kept
    found = next(places for reason, places in kept.items() if reason.startswith("normalized over channels"))
    assert "2.weight, dimension 1 of 6" in found


# What is asked for


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_heads_of_an_encoder_go_where_some_are_padded_and_the_rest_is_kept_by_its_normalizations():
    encoder = lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 4, 20, 0.0, batch_first=True), 2)
    net = network(lambda: Net(lambda net, x, padded: net.t(x, src_key_padding_mask=padded), t=encoder()))
    groups = fr.channel_groups(net, (drawn(2, 5, 12), torch.arange(5, device=DEVICE).expand(2, -1) > 2))
    assert sorted(groups.counts) == [4, 4, 20, 20]
    assert "not followed" not in groups.explain()


def test_layers_and_types_choose():
    net, seen = network(lambda: Transformer()), words()
    every = fr.channel_groups(net, seen)
    assert every.layers == [("attention.qkv",), ("gate", "up")]
    assert list(fr.channel_groups(net, seen, layers=["gate"])) == [every[1]]
    assert list(fr.channel_groups(net, seen, layers=["att*"])) == [every[0]]
    assert list(fr.channel_groups(net, seen, types=nn.Linear)) == list(every)
    inside = fr.channel_groups(net, seen, prefix="part")
    assert [list(family) for family in inside] == [[f"part.{name}" for name in family] for family in every]
    for wrong in (["nothing"], "gate", ["gate", "down"]):
        with pytest.raises(ValueError, match=r"layers is .*; expected names among 'attention.qkv', 'gate', 'up', or"):
            fr.channel_groups(net, seen, layers=wrong)
    with pytest.raises(ValueError, match=r"layers is 'gate'; .*, in a list: \['gate'\]"):
        fr.channel_groups(net, seen, layers="gate")
    with pytest.raises(ValueError, match=r"types is .*Conv2d.*; expected types among those of .* which are Linear"):
        fr.channel_groups(net, seen, types=nn.Conv2d)


def test_every_second_layer_has_norms_of_all_that_belongs_to_a_channel():
    net, seen = network(lambda: nn.Sequential(*linears(5, 7, 6, 4, 3))), vectors()
    assert list(fr.channel_groups(net, seen, layers=["0", "2"])) == [
        {"0.weight": 0, "0.bias": 0, "1.weight": 1},
        {"2.weight": 0, "2.bias": 0, "3.weight": 1},
    ]
    assert list(fr.channel_groups(net, seen)) == fr.channel_groups(net)
    assert list(fr.channel_groups(net, seen, layers=[])) == []


def test_it_is_called_as_the_module_is():
    def run(net, x, scale=None, *, more=None):
        return net.b(net.a(x) * scale["by"]) if more is None else net.b(net.a(x))

    net, (x,) = network(lambda: Net(run, a=nn.Linear(5, 6), b=nn.Linear(6, 3))), vectors()
    scale = {"by": torch.tensor(2.0, device=DEVICE)}
    every = [
        fr.channel_groups(net, seen)
        for seen in ((x, scale), [x, scale], ((x,), {"scale": scale}), {"x": x, "scale": scale}, {"x": x, "more": 1})
    ]
    assert all(groups == [{"a.weight": 0, "a.bias": 0, "b.weight": 1}] for groups in every)
    single = network(lambda: nn.Sequential(*linears(5, 6, 3)))
    assert fr.channel_groups(single, x) == fr.channel_groups(single, (x,))
    with pytest.raises(TypeError, match=r"example_inputs is an int; expected a tuple of the arguments"):
        fr.channel_groups(single, 3)
    with pytest.raises(TypeError, match=r"module is a dict; expected torch\.nn\.Sequential, or any torch\.nn\.Module"):
        fr.channel_groups({}, (x,))  # pyright: ignore[reportArgumentType]
    with torch.device("meta"), pytest.raises(ValueError, match=r"on the meta device has no memory, by which"):
        fr.channel_groups(nn.Linear(2, 3), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"round_to is 0; expected a whole number of at least 1"):
        fr.channel_groups(single, (x,), round_to=0)


def test_numbers_of_channels_stay_multiples():
    net, seen = network(lambda: nn.Sequential(*linears(5, 20, 3))), vectors()
    groups = fr.channel_groups(net, seen, round_to=8)
    dead = without_half(net, groups)
    assert fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups))[0].out_features == 16
    assert fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups, round_to=1))[0].out_features == 10
    same = fr.channel_groups(net, round_to=4)
    assert fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), same))[0].out_features == 12
    heads = network(lambda: Transformer())
    groups = fr.channel_groups(heads, words(), layers=["attention.*"], round_to=6)  # Of three features each.
    dead = without_half(heads, groups)
    assert fr.remove_dead(fr.with_buffers(dead), groups)["attention.out.weight"].shape == (12, 6)


def test_it_prints_as_a_table_explains_itself_and_comes_back_from_a_pickle():
    net = network(lambda: Transformer())
    groups = fr.channel_groups(net, words())
    assert repr(groups).splitlines() == [
        "channels of    groups  parameters each",
        "attention.qkv       4              153",
        "gate, up           20               38",
    ]
    said = groups.explain()
    assert said == repr(said)
    assert "- an output of the network" in said or "normalized over channels (native_layer_norm, 'norm1')" in said
    assert "embed.weight, dimension 1 of 12" in said
    stored = io.BytesIO()
    torch.save(groups, stored)
    stored.seek(0)
    for other in (pickle.loads(pickle.dumps(groups)), copy.deepcopy(groups), torch.load(stored, weights_only=False)):
        assert isinstance(other, fr.ChannelGroups)
        assert other == groups
        assert repr(other) == repr(groups)
        assert other.explain() == said
    p = fr.coupled(fr.group_lasso, groups)
    again = pickle.loads(pickle.dumps(p))
    params = fr.with_buffers(net)
    torch.testing.assert_close(again(params), p(params))
    assert repr(p) == repr(again)
    assert "'gate.weight': 0" in repr(p)
    assert repr(fr.ChannelGroups([{"w": 0}])) == "[{'w': 0}]"


# From the penalty to the smaller network


@all_or_nothing
@pytest.mark.parametrize("name", ["a residual network", "attention, packed", "a U-Net", "constants that biases take"])
def test_a_network_is_regularized_made_smaller_and_trained_on(name):
    make, inputs, _ = NETWORKS[name]
    net, seen = network(make).float().train(), inputs()
    seen = tuple(x.float() if x.is_floating_point() else x for x in seen)
    groups = fr.channel_groups(net, seen)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    handle = fr.regularize(optimizer, fr.coupled(fr.group_lasso, groups), strength=0.1, module=net, weights="sqrt_size")
    for _ in range(20):
        optimizer.zero_grad()
        net(*seen).square().mean().backward()
        optimizer.step()
    del handle
    net.eval()
    params, state = fr.remove_dead(fr.with_buffers(net), groups, optimizer.state_dict())
    smaller = fr.resized(net, params)
    assert entries(smaller) < entries(net)
    torch.testing.assert_close(outputs(smaller, seen), outputs(net, seen), rtol=1e-4, atol=1e-5)
    going = torch.optim.Adam(smaller.parameters(), 0.02)
    going.load_state_dict(state)
    smaller.train()(*seen).square().mean().backward()
    going.step()


# Random networks


class Graph(nn.Module):
    """Layers of a kind each, applied to what is there already."""

    def __init__(self, steps):
        super().__init__()
        self.steps, self.layers = [], nn.ModuleList()
        widths = [3]
        for kind, source, other, size in steps:
            i, j = source % len(widths), other % len(widths)
            a, b = widths[i], widths[j]
            if kind in ("add", "mul") and a != b:
                kind = "match"
            layer: nn.Module = nn.Identity()
            width = a
            if kind in ("conv", "match"):
                width = b if kind == "match" else size
                layer = CONV(a, width, 3, padding=1, bias=size % 2 == 0)
            elif kind == "pointwise":
                layer, width = CONV(a, size, 1), size
            elif kind == "norm":
                layer = nn.BatchNorm2d(a)
            elif kind == "depthwise":
                layer = CONV(a, a, 3, padding=1, groups=a)
            elif kind == "gate":
                layer = nn.Sequential(nn.AdaptiveAvgPool2d(1), CONV(a, a, 1), nn.Sigmoid())
            elif kind == "group norm":
                layer = nn.GroupNorm(2 if a % 2 == 0 else 1, a)
            elif kind == "cat":
                width = a + b
            elif kind == "halves":
                kind = "halves" if a % 2 == 0 else "relu"
                width = a // 2 if kind == "halves" else a
            elif kind == "linear":
                layer, width = nn.Linear(a, size), size
            self.steps.append((kind, i, j))
            self.layers.append(layer)
            widths.append(width)
        self.head = CONV(widths[-1], 2, 1)

    def forward(self, x):
        made = [x]
        for (kind, i, j), layer in zip(self.steps, self.layers, strict=True):
            a, b = made[i], made[j]
            if kind == "cat":
                made.append(torch.cat([a, b], 1))
            elif kind == "add":
                made.append(a + b)
            elif kind == "mul":
                made.append(a * b)
            elif kind == "match":
                made.append(layer(a) + b)
            elif kind == "gate":
                made.append(a * layer(a))
            elif kind == "halves":
                made.append(torch.mul(*a.chunk(2, 1)))
            elif kind == "linear":
                made.append(layer(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
            elif kind == "relu":
                made.append(F.relu(a))
            elif kind in ("sigmoid", "softplus", "cos"):
                made.append({"sigmoid": torch.sigmoid, "softplus": F.softplus, "cos": torch.cos}[kind](a))
            else:
                made.append(layer(a))
        return self.head(made[-1])


KINDS = [
    "conv",
    "conv",
    "norm",
    "relu",
    "add",
    "mul",
    "cat",
    "depthwise",
    "gate",
    "halves",
    "linear",
    "group norm",
    "sigmoid",
    "softplus",
    "cos",
    "pointwise",
    "pointwise",
]
step = st.tuples(st.sampled_from(KINDS), st.integers(0, 7), st.integers(0, 7), st.integers(2, 6))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(step, min_size=2, max_size=8))
def test_random_networks_without_dead_channels_give_what_they_gave(steps):
    net, inputs = network(lambda: Graph(steps)), images(3, 5, 5)
    try:
        groups = fr.channel_groups(net, inputs)
    except ValueError:  # There are none that could go.
        return
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups))
    torch.testing.assert_close(outputs(smaller, inputs), outputs(dead, inputs), rtol=1e-9, atol=1e-9)


def test_what_is_kept_in_numbered_layers_stands_in_one_line_and_pixels_are_no_channels():
    blocks = [nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(4)]
    net = network(lambda: Net(lambda net, x: [x := x + block(x) for block in net.h][-1], h=nn.ModuleList(blocks)))
    groups = fr.channel_groups(net, (drawn(4, 6),))
    assert repr(groups).splitlines()[1].split() == ["h.*.1", "(4", "families)", "8", "13"]
    said = groups.explain().splitlines()
    assert "- normalized over channels (native_layer_norm, 'h.*.0'):" in said
    assert "    h.*.0.weight, dimension 0 of 6" in said
    assert len(said) < 20
    assert sum(map(len, groups.kept.values())) > 15
    pictures = network(lambda: nn.Sequential(CONV(3, 6, 3), nn.ReLU(), CONV(6, 2, 3)))
    assert "kernel" not in fr.channel_groups(pictures, images()).explain()


class Coordinates(nn.Module):
    """A bias that a network computes of coordinates in a buffer, as Swin Transformer v2 does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("coordinates", torch.linspace(-1, 1, 12).reshape(6, 2))
        self.hidden, self.bias = nn.Linear(2, 32), nn.Linear(32, 8, bias=False)
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(F.relu(self.first(x) + self.bias(F.relu(self.hidden(self.coordinates))).sum(0)))


class Frequencies(nn.Module):
    """Features of the input by random frequencies in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", drawn(5, 6))
        self.hidden, self.last = nn.Linear(12, 32), nn.Linear(32, 3)

    def forward(self, x):
        x = x @ self.frequencies
        return self.last(F.relu(self.hidden(torch.cat([x.sin(), x.cos()], -1))))


@pytest.mark.parametrize("make", [Coordinates, Frequencies])
def test_hidden_units_go_before_dimensions_of_a_buffer(make):
    net = make().double().to(DEVICE)
    inputs = (vectors()[0].to(DEVICE),)
    groups = fr.channel_groups(net, inputs)
    assert dict(zip(groups.layers, groups.counts, strict=True))[("hidden",)] == 32
    assert not any([name in family for family in groups for name in ("coordinates", "frequencies")])
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), inputs)
    assert smaller.hidden.out_features == 16


IN_PLACE = {
    "squeeze_": lambda h: h.unsqueeze(1).relu().squeeze_(1),
    "squeeze_ of all": lambda h: h.relu().squeeze_().view(len(h), -1),
    "unsqueeze_": lambda h: h.relu().unsqueeze_(1).relu()[:, 0],
    "t_": lambda h: h.relu().t_().relu().t(),
    "transpose_": lambda h: h.relu().transpose_(0, 1).relu().T,
    "swapaxes_": lambda h: h.relu().swapaxes_(0, 1).clone().t_(),
    "several": lambda h: h.relu().unsqueeze_(0).squeeze_(0).t_().t_(),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", IN_PLACE)
def test_channels_are_followed_where_a_tensor_gets_another_shape_in_place(name, batch):
    net = between(lambda net, h: IN_PLACE[name](h)).double().to(DEVICE)
    inputs = (drawn(batch, 5).to(DEVICE),)
    groups = fr.channel_groups(net, inputs)
    assert groups.counts == [6]
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), inputs)
    assert_equal(outputs(smaller, inputs), outputs(dead, inputs), rtol=1e-12)


class Adapted(nn.Module):
    """A frozen layer with a low-rank one beside it."""

    def __init__(self, inputs, outputs, rank=3):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def frozen(*names, make=lambda: nn.Sequential(*linears(5, 8), nn.ReLU(), *linears(8, 7), nn.ReLU(), *linears(7, 3))):
    net = make().double().to(DEVICE)
    for name in names:
        net.get_parameter(name).requires_grad_(False)
    return net


FROZEN = {
    "a weight": (lambda: frozen("0.weight"), [("2",)], "'0.weight' is frozen"),
    "a bias": (lambda: frozen("0.bias"), [("2",)], "'0.bias' is frozen"),
    "a bias before weights that are penalized": (lambda: frozen("2.bias"), [("0",), ("2",)], None),
    "a layer": (lambda: frozen("0.weight", "0.bias"), [("2",)], "'0.weight' is frozen"),
    "what reads": (lambda: frozen("2.weight", "2.bias"), [("0",)], "'2.weight' is frozen"),
    "a last layer": (lambda: frozen("4.weight", "4.bias"), [("0",), ("2",)], None),
    "all": (lambda: nn.Sequential(*frozen()).requires_grad_(False), [("0",), ("2",)], None),
    "beside adapters": (
        lambda: frozen(make=lambda: nn.Sequential(Adapted(5, 8), nn.ReLU(), Adapted(8, 3))),
        [("0.down",), ("2.down",)],
        "'0.base.weight' is frozen",
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parameters_are_in_no_group(name):
    make, layers, reason = FROZEN[name]
    net = make()
    inputs = (vectors()[0].to(DEVICE),)
    groups = fr.channel_groups(net, inputs)
    assert groups.layers == layers
    assert (reason is None) == ("is frozen" not in groups.explain())
    assert (reason or "") in groups.explain()
    penalized = [
        leaf
        for family in groups
        for leaf, where in family.items()
        if any([along.penalized for along in fr.networks.families.parts(where)])
    ]
    if name != "all":
        assert all([net.get_parameter(leaf).requires_grad for leaf in penalized])
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), inputs)
    assert entries(smaller) < entries(net)


def test_a_frozen_layer_that_is_named_has_groups():
    net, inputs = frozen("0.weight"), (vectors()[0].to(DEVICE),)
    assert fr.channel_groups(net, inputs, layers=["0", "2"]).layers == [("0",), ("2",)]
    net[0].weight.requires_grad_(True)
    with torch.no_grad():
        net[0].bias.zero_()
    net[0].bias.requires_grad_(False)  # It is zero, whatever else becomes of its layer.
    assert fr.channel_groups(net, inputs).layers == [("0",), ("2",)]


class Scaled(nn.Module):
    """A parameter of the network itself that scales channels."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner, self.last = nn.Parameter(torch.ones(8)), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last((self.scale * self.inner(x)).relu())


def test_parameters_of_the_network_itself_have_a_name_in_the_table():
    groups = fr.channel_groups(network(Scaled), vectors())
    assert "\nthe module itself, inner" in repr(groups)


class Positions(nn.Module):
    """Scores of relative positions, shifted by padding and another view, as in BoTNet."""

    def __init__(self, size=4):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.relative = nn.Parameter(torch.randn(2 * size - 1, 8))

    def forward(self, x):
        y, n = self.first(x), x.shape[1]
        scores = F.pad(F.pad(y @ self.relative.T, (0, 1)).flatten(1), (0, n - 1))
        scores = scores.reshape(-1, n + 1, 2 * n - 1)[:, :n, n - 1 :]
        return self.last(scores.softmax(-1) @ y.relu())


def test_positions_that_padding_shifts_end_and_are_kept():
    net, seen = network(Positions), (drawn(2, 4, 5),)
    groups = fr.channel_groups(net, seen)
    assert groups.counts == [8]
    dead = without_half(net, groups)
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), seen)
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("network_too", [True, False])
def test_channels_that_lie_last_in_memory_go_as_others_do_and_stay_last(network_too):
    """Pooling to one pixel gives other strides there than elsewhere."""
    layers = (CONV(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), CONV(16, 12, 3), nn.ReLU())
    net = network(lambda: nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)))
    x = drawn(2, 3, 9, 9).to(DEVICE, memory_format=torch.channels_last)
    net = net.to(memory_format=torch.channels_last) if network_too else net
    groups = fr.channel_groups(net, (x,))
    assert groups.counts == [16, 12]
    dead = without_half(net, groups)
    made = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), (x,))
    torch.testing.assert_close(made(x), dead(x), rtol=1e-10, atol=1e-10)
    for i in (0, 3):
        last = made[i].weight.is_contiguous(memory_format=torch.channels_last)
        assert (made[i].in_channels, made[i].out_channels) == ((3, 8), (8, 6))[i // 3]
        assert last == network_too
