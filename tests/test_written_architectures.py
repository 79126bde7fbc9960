"""Networks as people write them by hand: three lines, and what is dead is gone, with outputs as they were."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, drawn
from networks import all_or_nothing
from test_channels import CONV, Net, entries, linears, network, outputs, without_half
from torch import nn

import funcreg as fr

# Convolutions


def conv_norm(a, b, size=1, act=nn.ReLU, **options):
    """A convolution, its normalization and an activation."""
    conv = CONV(a, b, size, padding=size // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(b), act())


class Squeezed(nn.Module):
    """Squeeze and excitation, as EfficientNet has it."""

    def __init__(self, width, less):
        super().__init__()
        self.reduce, self.expand = CONV(width, less, 1), CONV(less, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class Inverted(nn.Module):
    """A block of EfficientNet: expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self, a, b, expand=4, stride=1):
        super().__init__()
        wide = a * expand
        self.skips = stride == 1 and a == b
        self.expand = conv_norm(a, wide, act=nn.SiLU)
        self.depthwise = conv_norm(wide, wide, 3, act=nn.SiLU, groups=wide, stride=stride)
        self.squeeze, self.project = Squeezed(wide, 4), conv_norm(wide, b, act=nn.Identity)

    def forward(self, x):
        y = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + y if self.skips else y


def efficientnet():
    blocks = [conv_norm(3, 8, 3, nn.SiLU, stride=2), Inverted(8, 8), Inverted(8, 12, stride=2), Inverted(12, 12)]
    return nn.Sequential(
        *blocks, conv_norm(12, 16, act=nn.SiLU), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )


def shuffle(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


class ShuffleUnit(nn.Module):
    """A unit of ShuffleNet V2, with stride 2 or on a half of the channels."""

    def __init__(self, a, b, stride):
        super().__init__()
        half, self.stride = b // 2, stride
        into = a if stride > 1 else half
        if stride > 1:
            depthwise = nn.Sequential(CONV(a, a, 3, stride, 1, groups=a, bias=False), nn.BatchNorm2d(a))
            self.branch1 = nn.Sequential(depthwise, conv_norm(a, half))
        depthwise = nn.Sequential(CONV(half, half, 3, stride, 1, groups=half, bias=False), nn.BatchNorm2d(half))
        self.branch2 = nn.Sequential(conv_norm(into, half), depthwise, conv_norm(half, half))

    def forward(self, x):
        if self.stride == 1:
            a, b = x.chunk(2, dim=1)
            y = torch.cat((a, self.branch2(b)), dim=1)
        else:
            y = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return shuffle(y, 2)


def shufflenet():
    units = [ShuffleUnit(6, 12, 2), ShuffleUnit(12, 12, 1), ShuffleUnit(12, 12, 1)]
    return nn.Sequential(conv_norm(3, 6, 3), *units, conv_norm(12, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten()).append(
        nn.Linear(16, 5)
    )


class Inception(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.branch1 = conv_norm(a, 6)
        self.branch2 = nn.Sequential(conv_norm(a, 4), conv_norm(4, 8, 3))
        self.branch3 = nn.Sequential(conv_norm(a, 4), conv_norm(4, 6, 3), conv_norm(6, 6, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_norm(a, 4))

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


def googlenet():
    blocks = [conv_norm(3, 8, 3), Inception(8), nn.MaxPool2d(2), Inception(24), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*blocks, nn.Dropout(0.4), nn.Linear(24, 5))


class Diffusion(nn.Module):
    """A U-Net of a diffusion model: a time embedding is added to channels, and pixels attend to each other."""

    class Block(nn.Module):
        def __init__(self, a, b, time):
            super().__init__()
            self.norm1, self.conv1 = nn.GroupNorm(4, a), CONV(a, b, 3, padding=1)
            self.time = nn.Linear(time, b)
            self.norm2, self.conv2 = nn.GroupNorm(4, b), CONV(b, b, 3, padding=1)
            self.skip = CONV(a, b, 1) if a != b else nn.Identity()

        def forward(self, x, t):
            y = self.conv1(F.silu(self.norm1(x)))
            y = y + self.time(F.silu(t))[:, :, None, None]
            return self.skip(x) + self.conv2(F.silu(self.norm2(y)))

    class Attention(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.heads = heads
            self.norm, self.qkv, self.out = nn.GroupNorm(4, width), CONV(width, 3 * width, 1), CONV(width, width, 1)

        def forward(self, x):
            b, _, h, w = x.shape
            q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, -1, h * w).unbind(1)
            y = (q.transpose(-1, -2) @ k * q.shape[-2] ** -0.5).softmax(-1) @ v.transpose(-1, -2)
            return x + self.out(y.transpose(-1, -2).reshape(b, -1, h, w))

    def __init__(self, width=16):
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, 24), nn.SiLU(), nn.Linear(24, 24))
        self.first = CONV(3, 8, 3, padding=1)
        self.down1, self.less = self.Block(8, 8, 24), CONV(8, 8, 3, stride=2, padding=1)
        self.down2, self.attend, self.middle = self.Block(8, 16, 24), self.Attention(16, 4), self.Block(16, 16, 24)
        self.up2, self.more = self.Block(32, 8, 24), CONV(8, 8, 3, padding=1)
        self.up1, self.norm, self.last = self.Block(16, 8, 24), nn.GroupNorm(4, 8), CONV(8, 3, 3, padding=1)

    def forward(self, x, t):
        rates = torch.exp(-math.log(10000) * torch.arange(self.width // 2, device=x.device) / (self.width // 2))
        angles = t[:, None].to(x.dtype) * rates.to(x.dtype)
        t = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        a = self.down1(self.first(x), t)
        b = self.down2(self.less(a), t)
        y = self.up2(torch.cat([self.middle(self.attend(b), t), b], 1), t)
        y = self.more(F.interpolate(y, scale_factor=2, mode="nearest"))
        return self.last(F.silu(self.norm(self.up1(torch.cat([y, a], 1), t))))


class WaveNet(nn.Module):
    def __init__(self, width=8, skip=10, layers=3):
        super().__init__()
        self.first = nn.Conv1d(3, width, 1)
        self.filters = nn.ModuleList(nn.Conv1d(width, width, 2, dilation=2**i) for i in range(layers))
        self.gates = nn.ModuleList(nn.Conv1d(width, width, 2, dilation=2**i) for i in range(layers))
        self.residuals = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.skips = nn.ModuleList(nn.Conv1d(width, skip, 1) for _ in range(layers))
        self.mix, self.last = nn.Conv1d(skip, 8, 1), nn.Conv1d(8, 4, 1)

    def forward(self, x):
        x, total = self.first(x), 0
        for i, (f, g, r, s) in enumerate(zip(self.filters, self.gates, self.residuals, self.skips, strict=True)):
            y = F.pad(x, (2**i, 0))
            y = torch.tanh(f(y)) * torch.sigmoid(g(y))
            total = total + s(y)
            x = x + r(y)
        return self.last(F.relu(self.mix(F.relu(total))))


class Pyramid(nn.Module):
    """The head of DeepLab: dilated convolutions side by side, and the mean of the image spread over it."""

    def __init__(self, a=12, b=8):
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 8, 3), conv_norm(8, a, 3, stride=2))
        self.branches = nn.ModuleList([conv_norm(a, b)])
        self.branches.extend(
            nn.Sequential(CONV(a, b, 3, padding=r, dilation=r, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for r in (2, 3)
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_norm(a, b))
        self.project, self.last = conv_norm(4 * b, b), CONV(b, 3, 1)

    def forward(self, x):
        y = self.stem(x)
        parts = [branch(y) for branch in self.branches]
        parts.append(F.interpolate(self.pooled(y), size=y.shape[-2:], mode="bilinear", align_corners=False))
        y = self.last(self.project(torch.cat(parts, 1)))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


class Standardized(nn.Conv2d):
    """A convolution whose weights have mean 0 and deviation 1 in each filter."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Modulated(nn.Module):
    """FiLM: a condition scales and shifts channels."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.norm = CONV(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.condition = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 2 * width))
        self.second, self.last = CONV(width, width, 3, padding=1), nn.Linear(width, 4)

    def forward(self, x, c):
        scale, shift = self.condition(c).chunk(2, dim=1)
        y = self.norm(self.first(x)) * (1 + scale[..., None, None]) + shift[..., None, None]
        return self.last(F.relu(self.second(F.relu(y))).mean((2, 3)))


class SlowFast(nn.Module):
    """Two paths through a film, one with few frames and one with few channels, the second feeding the first."""

    def __init__(self):
        super().__init__()
        conv = lambda a, b, t: nn.Sequential(
            nn.Conv3d(a, b, (t, 3, 3), padding=(t // 2, 1, 1), bias=False), nn.BatchNorm3d(b), nn.ReLU(inplace=True)
        )
        self.slow1, self.fast1 = conv(3, 8, 1), conv(3, 4, 3)
        self.lateral = nn.Conv3d(4, 8, (5, 1, 1), stride=(4, 1, 1), padding=(2, 0, 0), bias=False)
        self.slow2, self.fast2 = conv(16, 12, 1), conv(4, 6, 3)
        self.head = nn.Linear(18, 5)

    def forward(self, x):
        slow, fast = self.slow1(x[:, :, ::4]), self.fast1(x)
        slow = self.slow2(torch.cat([slow, self.lateral(fast)], dim=1))
        return self.head(torch.cat([y.mean((2, 3, 4)) for y in (slow, self.fast2(fast))], dim=1))


class Temporal(nn.Module):
    """A block of a temporal convolutional network: padded on both sides, and cut at one."""

    def __init__(self, a, b, dilation):
        super().__init__()
        self.padding = 2 * dilation
        self.conv1 = nn.Conv1d(a, b, 3, padding=self.padding, dilation=dilation)
        self.conv2 = nn.Conv1d(b, b, 3, padding=self.padding, dilation=dilation)
        self.down = nn.Conv1d(a, b, 1) if a != b else None

    def forward(self, x):
        y = F.relu(self.conv1(x)[:, :, : -self.padding].contiguous())
        y = F.relu(self.conv2(y)[:, :, : -self.padding])
        return F.relu(y + (x if self.down is None else self.down(x)))


class Auxiliary(nn.Module):
    """A classifier with a second one in the middle, which is there in training alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.rest = (
            conv_norm(3, 8, 3),
            nn.Sequential(nn.Dropout2d(0.2), conv_norm(8, 12, 3), nn.Dropout(0.2)),
        )
        self.middle, self.end = nn.Linear(8, 5), nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.end(self.rest(x).mean((2, 3)))
        return y + 0.3 * self.middle(x.mean((2, 3))) if self.training else y


class Gated(nn.Module):
    """CBAM: channels are gated by what is seen of them, then pixels by a map of all channels."""

    def __init__(self, width=12):
        super().__init__()
        self.stem = conv_norm(3, width, 3)
        self.mlp = nn.Sequential(CONV(width, 4, 1, bias=False), nn.ReLU(), CONV(4, width, 1, bias=False))
        self.pixels, self.last = CONV(2, 1, 3, padding=1), CONV(width, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x * torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1)))
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.last(x * torch.sigmoid(self.pixels(seen)))


class Ghost(nn.Module):
    """A GhostNet module: a half of the channels is made of the other half, by a convolution of each."""

    def __init__(self, a, b):
        super().__init__()
        self.first, self.cheap = conv_norm(a, b // 2), conv_norm(b // 2, b // 2, 3, groups=b // 2)

    def forward(self, x):
        y = self.first(x)
        return torch.cat([y, self.cheap(y)], 1)


class SuperResolution(nn.Module):
    """EDSR: residual blocks without normalization, scaled, and pixels shuffled in the end."""

    def __init__(self, width=8):
        super().__init__()
        self.head = CONV(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(CONV(width, 12, 3, padding=1), nn.ReLU(True), CONV(12, width, 3, padding=1)) for _ in range(2)
        )
        self.body, self.tail = CONV(width, width, 3, padding=1), nn.Sequential(CONV(width, 32, 3, padding=1))
        self.tail.extend([nn.PixelShuffle(2), CONV(8, 3, 3, padding=1)])

    def forward(self, x):
        x = self.head(x)
        y = x
        for block in self.blocks:
            y = y + block(y) * 0.1
        return self.tail(x + self.body(y))


class Branched(nn.Module):
    """RepVGG while it is trained: a 3x3, a 1x1 and an identity, each with its normalization."""

    def __init__(self, width):
        super().__init__()
        conv = lambda size: nn.Sequential(
            CONV(width, width, size, padding=size // 2, bias=False), nn.BatchNorm2d(width)
        )
        self.dense, self.point, self.norm = conv(3), conv(1), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(self.dense(x) + self.point(x) + self.norm(x))


# Generators and encoders


class Generator(nn.Module):
    """Of a DCGAN: from a vector by transposed convolutions."""

    def __init__(self):
        super().__init__()
        up = lambda a, b: [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(nn.ConvTranspose2d(6, 16, 4, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2))
        self.net.extend([*up(16, 8), nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False), nn.Tanh()])

    def forward(self, z):
        return self.net(z.view(z.size(0), -1, 1, 1))


class Viewed(nn.Module):
    """A generator that begins with a linear layer, whose outputs are pixels of so many channels."""

    def __init__(self, channels=None):
        super().__init__()
        self.channels = channels
        self.first, self.norm = nn.Linear(6, 16 * 16), nn.BatchNorm2d(16)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ConvTranspose2d(8, 3, 4, 2, 1)

    def forward(self, z):
        y = self.first(z)
        y = y.view(-1, 16, 4, 4) if self.channels is None else y.view(-1, self.channels, 4, 4)
        return torch.tanh(self.last(F.relu(self.up(F.relu(self.norm(y))))))


class Autoencoder(nn.Module):
    """A variational one: what it draws depends on how many latent numbers there are, so that they stay."""

    def __init__(self, draws=False):
        super().__init__()
        self.draws = draws
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(10, 6), nn.Linear(10, 6)
        self.decoder = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 12))

    def forward(self, x):
        h = self.encoder(x)
        z = mean = self.mean(h)
        if self.training or self.draws:
            z = mean + torch.randn_like(mean) * torch.exp(0.5 * self.log_variance(h))
        return torch.sigmoid(self.decoder(z))


# Sequences, sets and graphs


class Recurrent(nn.Module):
    """CRNN: columns of features are the steps of a recurrent layer in both directions."""

    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(
            conv_norm(1, 8, 3), nn.MaxPool2d(2), conv_norm(8, 12, 3), nn.MaxPool2d((2, 1)), conv_norm(12, 12, 3)
        )
        self.rnn, self.head = nn.LSTM(12 * 2, 10, num_layers=2, bidirectional=True), nn.Linear(20, 7)

    def forward(self, x):
        y = self.cnn(x)
        y, _ = self.rnn(y.flatten(1, 2).permute(2, 0, 1))
        return self.head(y).log_softmax(-1)


class PointNet(nn.Module):
    """Points, turned by what is seen of them, and classified by the greatest of each feature."""

    def __init__(self):
        super().__init__()
        self.turn1, self.turn2, self.turn3 = nn.Conv1d(3, 8, 1), nn.Linear(8, 10), nn.Linear(10, 9)
        self.conv1, self.conv2 = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 16, 1)
        self.norm1, self.norm2 = nn.BatchNorm1d(8), nn.BatchNorm1d(16)
        self.local, self.head = nn.Conv1d(24, 12, 1), nn.Conv1d(12, 4, 1)

    def forward(self, x):
        b, _, n = x.shape
        turn = self.turn3(F.relu(self.turn2(F.relu(self.turn1(x)).max(2)[0]))).view(-1, 3, 3)
        x = torch.bmm(x.transpose(2, 1), turn + torch.eye(3, dtype=x.dtype, device=x.device)).transpose(2, 1)
        points = F.relu(self.norm1(self.conv1(x)))
        every = self.norm2(self.conv2(points)).max(2, keepdim=True)[0].view(b, -1, 1).repeat(1, 1, n)
        return self.head(F.relu(self.local(torch.cat([points, every], 1))))


class Mixer(nn.Module):
    """A block of MLP-Mixer: patches are mixed, then channels."""

    def __init__(self, patches=9, width=12):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.patches = nn.Sequential(nn.Linear(patches, 14), nn.GELU(), nn.Linear(14, patches))
        self.channels = nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))

    def forward(self, x):
        x = x + self.patches(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Windows(nn.Module):
    """A block of Swin: attention inside of windows, which are shifted, with a bias for relative places."""

    def __init__(self, width=12, heads=4, window=2, shift=1):
        super().__init__()
        self.window, self.shift, self.head_dim = window, shift, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.places = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = (grid[:, :, None] - grid[:, None]).permute(1, 2, 0) + window - 1
        self.register_buffer("index", apart[..., 0] * (2 * window - 1) + apart[..., 1])
        self.mlp = nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        places = self.places[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5 + places[None]
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))

    def forward(self, x):
        b, h, w, c = x.shape
        m = self.window
        y = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2))
        y = y.view(b, h // m, m, w // m, m, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, m * m, c)
        y = self.attend(y).view(b, h // m, w // m, m, m, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)
        x = x + torch.roll(y, (self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))


class Perceiver(nn.Module):
    """Learned latent vectors attend to whatever comes in, then to each other."""

    class Attention(nn.Module):
        def __init__(self, width, context, heads=4, size=3):
            super().__init__()
            self.heads, self.scale = heads, size**-0.5
            self.to_q, self.to_kv = nn.Linear(width, heads * size, bias=False), nn.Linear(context, 2 * heads * size)
            self.to_out = nn.Linear(heads * size, width)

        def forward(self, x, context):
            q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, dim=-1)
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
            y = torch.einsum("bhid,bhjd->bhij", q, k).mul(self.scale).softmax(-1)
            return self.to_out(torch.einsum("bhij,bhjd->bhid", y, v).transpose(1, 2).flatten(2))

    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(5, 12))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(12), nn.LayerNorm(8), nn.LayerNorm(12)
        self.cross, self.own = self.Attention(12, 8), self.Attention(12, 12)
        self.mlp, self.head = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)), nn.Linear(12, 4)

    def forward(self, x):
        y = self.latents[None].expand(len(x), -1, -1)
        y = y + self.cross(self.norm1(y), self.norm2(x))
        z = self.norm3(y)
        y = y + self.own(z, z)
        return self.head((y + self.mlp(y)).mean(1))


class Routed(nn.Module):
    """A mixture of experts: each row goes to the two experts that a gate likes best."""

    def __init__(self, width=8, experts=3):
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(*linears(width, 12), nn.GELU(), *linears(12, width)) for _ in range(experts)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == i)
            y.index_add_(0, rows, weights[rows, place, None] * expert(x[rows]))
        return self.head(x + y)


class Adapted(nn.Module):
    """A linear layer with a trained product of two thin matrices beside it."""

    def __init__(self, base, rank=4, alpha=8):
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        self.a = nn.Parameter(torch.randn(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T * self.scaling


def siamese(net, a, b):
    return net.head((net.body(a) - net.body(b)).abs())


class Conformer(nn.Module):
    """Half a feed-forward layer, attention, a gated convolution over time, and the other half."""

    def __init__(self, width=12):
        super().__init__()
        half = lambda: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 20), nn.SiLU(), nn.Linear(20, width))
        self.first, self.second = half(), half()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.conv_norm, self.up = nn.LayerNorm(width), nn.Conv1d(width, 20, 1)
        self.depthwise, self.norm2 = nn.Conv1d(10, 10, 3, padding=1, groups=10), nn.BatchNorm1d(10)
        self.down, self.last = nn.Conv1d(10, width, 1), nn.LayerNorm(width)

    def forward(self, x):
        x = x + 0.5 * self.first(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = F.glu(self.up(self.conv_norm(x).transpose(1, 2)), dim=1)
        x = x + self.down(F.silu(self.norm2(self.depthwise(y)))).transpose(1, 2)
        return self.last(x + 0.5 * self.second(x))


class Squeezebert(nn.Module):
    """Attention whose queries, keys and values are convolutions of two groups, beside one another."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        grouped = lambda a, b: nn.Conv1d(a, b, 1, groups=2)
        self.heads, self.norm, self.head = heads, nn.LayerNorm(width), nn.Conv1d(width, 3, 1)
        self.query, self.key, self.value, self.out = (grouped(width, width) for _ in range(4))
        self.up, self.down = grouped(width, 24), grouped(24, width)

    def forward(self, x):
        y = self.norm(x.mT).mT
        q, k, v = (layer(y).unflatten(1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        y = ((q.mT @ k / (q.shape[2] ** 0.5)).softmax(-1) @ v.mT).mT.flatten(1, 2)
        x = x + self.out(y)
        return self.head(x + self.down(F.gelu(self.up(x))))


class Latent(nn.Module):
    """Attention whose keys and values come from a few latent features, and a part of the keys that all heads share."""

    def __init__(self, width=12, heads=4):
        super().__init__()
        self.query, self.latent = nn.Linear(width, heads * 5, bias=False), nn.Linear(width, 8)
        self.up, self.out, self.head = nn.Linear(6, heads * 6), nn.Linear(heads * 3, width), nn.Linear(width, 3)

    def forward(self, x):
        q = self.query(x).unflatten(-1, (-1, 5)).transpose(1, 2)
        latent, shared = self.latent(x).split([6, 2], -1)
        k, v = self.up(latent).unflatten(-1, (-1, 6)).transpose(1, 2).chunk(2, -1)
        keys = k.new_empty(*k.shape[:-1], 5)  # As DeepSeek writes it, in place of a concatenation.
        keys[..., :3].copy_(k)
        keys[..., 3:].copy_(shared[:, None].expand(-1, k.shape[1], -1, -1))
        y = (q @ keys.mT / 5**0.5).softmax(-1) @ v
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


class Fourier(nn.Module):
    """A Fourier neural operator: low frequencies are mixed by complex weights, all by a layer beside them."""

    def __init__(self, width=8, modes=4):
        super().__init__()
        self.real, self.imaginary = (nn.Parameter(torch.randn(width, width, modes) / width) for _ in range(2))
        self.first, self.beside, self.last = nn.Conv1d(3, width, 1), nn.Conv1d(width, width, 1), nn.Conv1d(width, 2, 1)

    def forward(self, x):
        x = self.first(x)
        low = torch.fft.rfft(x)[..., : self.real.shape[-1]]
        mixed = torch.einsum("bim,iom->bom", low, torch.complex(self.real, self.imaginary))
        return self.last(F.gelu(torch.fft.irfft(mixed, n=x.shape[-1]) + self.beside(x)))


class Graph(nn.Module):
    """Graph convolutions on a dense adjacency, divided by degrees."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.own = nn.Linear(5, 10), nn.Linear(10, 8), nn.Linear(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x, adjacency):
        degrees = adjacency.sum(-1).clamp(min=1).rsqrt()
        mix = degrees[:, None] * adjacency * degrees[None]
        x = F.relu(mix @ self.first(x))
        return self.head(F.relu(mix @ self.second(x) + self.own(x)))


class Highway(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first, self.gate, self.change = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, width)
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        x = self.first(x)
        t = torch.sigmoid(self.gate(x))
        return self.last(t * F.relu(self.change(x)) + (1 - t) * x)


def straight(net, x):
    """Attention with nothing around it."""
    return net.last(net.attention(y := net.first(x), y, y)[0].relu())


pictures = lambda *shape: lambda: (drawn(2, *(shape or (3, 8, 8))),)
rows = lambda *shape: lambda: (drawn(4, *shape),)
STEPS = torch.tensor([3, 70])
# What makes it, its inputs, and at least the share of parameters that goes with a random half of all groups.
NETWORKS = {
    "EfficientNet": (efficientnet, pictures(3, 16, 16), 0.6),
    "ShuffleNet V2": (shufflenet, pictures(), 0.45),
    "GoogLeNet": (googlenet, pictures(), 0.6),
    "diffusion U-Net": (Diffusion, lambda: (drawn(2, 3, 8, 8), STEPS.to(DEVICE)), 0.3),
    "WaveNet": (WaveNet, rows(3, 16), 0.6),
    "DeepLab": (Pyramid, pictures(3, 12, 12), 0.6),
    "standardized weights": (
        lambda: nn.Sequential(
            Standardized(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), Standardized(8, 12, 3), nn.GroupNorm(4, 12), nn.ReLU()
        ).extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)]),
        pictures(),
        0.3,
    ),
    "FiLM": (Modulated, lambda: (drawn(2, 3, 8, 8), drawn(2, 5, seed=2)), 0.6),
    "SlowFast": (SlowFast, pictures(3, 8, 6, 6), 0.6),
    "TCN": (
        lambda: nn.Sequential(Temporal(3, 8, 1), Temporal(8, 8, 2), Temporal(8, 6, 4), nn.Conv1d(6, 2, 1)),
        rows(3, 16),
        0.6,
    ),
    "a second classifier in training": (Auxiliary, pictures(), 0.6),
    "CBAM": (Gated, pictures(), 0.05),
    "GhostNet": (
        lambda: nn.Sequential(conv_norm(3, 8, 3), Ghost(8, 12), Ghost(12, 16), CONV(16, 3, 1)),
        pictures(),
        0.5,
    ),
    "super-resolution": (SuperResolution, pictures(), 0.6),
    "RepVGG": (
        lambda: nn.Sequential(conv_norm(3, 8, 3), Branched(8), Branched(8), CONV(8, 3, 1)),
        pictures(),
        0.6,
    ),
    "a generator": (Generator, rows(6), 0.5),
    "a generator that views": (lambda: Viewed(16), rows(6), 0.5),
    "a variational autoencoder": (Autoencoder, rows(12), 0.5),
    "a variational autoencoder that draws": (lambda: Autoencoder(draws=True), rows(12), 0.4),
    "CRNN": (Recurrent, pictures(1, 8, 12), 0.6),
    "PointNet": (PointNet, pictures(3, 7), 0.5),
    "MLP-Mixer": (lambda: nn.Sequential(Mixer(), Mixer()), pictures(9, 12), 0.4),
    "Swin": (lambda: nn.Sequential(Windows(shift=0), Windows()), pictures(4, 4, 12), 0.35),
    "Perceiver": (Perceiver, pictures(7, 8), 0.3),
    "a mixture of experts": (Routed, rows(8), 0.4),
    "LoRA": (
        lambda: nn.Sequential(
            Adapted(nn.Linear(5, 12)), nn.ReLU(), Adapted(nn.Linear(12, 10)), nn.ReLU(), nn.Linear(10, 3)
        ),
        rows(5),
        0.6,
    ),
    "Siamese": (
        lambda: Net(siamese, body=nn.Sequential(*linears(5, 10), nn.ReLU(), *linears(10, 8)), head=nn.Linear(8, 2)),
        lambda: (drawn(4, 5), drawn(4, 5, seed=2)),
        0.6,
    ),
    "Conformer": (Conformer, pictures(6, 12), 0.4),
    "SqueezeBert": (Squeezebert, pictures(16, 6), 0.4),
    "latent attention": (Latent, pictures(5, 12), 0.3),
    "Fourier neural operator": (Fourier, pictures(3, 16), 0.6),
    "graph convolution": (Graph, lambda: (drawn(6, 5), (drawn(6, 6) > 0).double()), 0.5),
    "Highway": (Highway, rows(5), 0.5),
    "attention with nothing around it": (
        lambda: Net(
            straight,
            first=nn.Linear(5, 12),
            attention=nn.MultiheadAttention(12, 4, batch_first=True),
            last=nn.Linear(12, 3),
        ),
        pictures(7, 5),
        0.6,
    ),
}


def tells(net, given):
    """Whether a network tells inputs apart, as half of one may not."""
    made = outputs(net, given)
    return float((made[0] - made[1]).abs().max()) > 1e-6


@all_or_nothing
@pytest.mark.parametrize("name", NETWORKS)
def test_three_lines_make_it_smaller_and_it_trains_on(name):
    make, inputs, share = NETWORKS[name]
    net, seen = network(make), inputs()
    groups = fr.channel_groups(net, seen)
    dead = next(half for seed in range(9) if tells(half := without_half(net, groups, seed), seen))
    before = copy.deepcopy(fr.with_buffers(dead))
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), seen)
    torch.testing.assert_close(fr.with_buffers(dead), before, rtol=0, atol=0)
    other = [x.flip(0) if x.is_floating_point() and x.ndim > 2 else x for x in seen]
    for given in (seen, other):
        torch.manual_seed(0)
        expected = outputs(dead, given)
        torch.manual_seed(0)
        torch.testing.assert_close(outputs(smaller, given), expected, rtol=1e-5, atol=1e-9)
    assert 1 - entries(smaller) / entries(net) > share
    smaller.train()(*seen).square().mean().backward()
    torch.optim.SGD(smaller.parameters(), 1e-3).step()
