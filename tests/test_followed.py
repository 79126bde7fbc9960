"""Operations that act along other dimensions than channels, or add zeros to sums: channels go, in training as well."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, drawn
from test_channels import CONV, Net, among, between, entries, images, network, outputs, without_half
from torch import nn

import funcreg as fr
from funcreg.networks import trying


def numbers(*values):
    return torch.tensor(values, device=DEVICE)


def steps(*shape):
    """A batch of sequences of vectors of five features."""
    return (drawn(*(shape or (3, 7)), 5),)


def rows(run, **layers):
    """A graph of seven nodes, whose rows are gathered and added to others."""
    return between(lambda net, y: run(y, numbers(0, 1, 2, 2, 3, 4, 6), numbers(1, 0, 0, 4, 5, 4, 2)), **layers)


def wide(index, y):
    return index[:, None].expand_as(y)


def zeros(y):
    return y.new_zeros(7, y.shape[1])


def nodes():
    return (drawn(7, 5, seed=1),)


ROWS = {
    "index_add": lambda y, i, j: zeros(y).index_add(0, j, y[i].relu()),
    "index_add_ with a factor": lambda y, i, j: zeros(y).index_add_(0, j, y[i], alpha=0.5),
    "index_add to itself": lambda y, i, j: y.index_add(0, j, y[i].relu()),
    "scatter_add": lambda y, i, j: zeros(y).scatter_add_(0, wide(j, y), y[i]),
    "scatter_reduce sum": lambda y, i, j: zeros(y).scatter_reduce(0, wide(j, y), y[i], "sum"),
    "scatter_reduce mean": lambda y, i, j: zeros(y).scatter_reduce(0, wide(j, y), y[i], "mean", include_self=False),
    "scatter_reduce amax": lambda y, i, j: y.relu().scatter_reduce(0, wide(j, y), y[i], "amax"),
    "scatter": lambda y, i, j: y.scatter(0, wide(i, y), y[j].relu()),
    "index_put": lambda y, i, j: zeros(y).index_put((j,), y[i], accumulate=True),
    "index_put that sets": lambda y, i, j: y.index_put((i,), y.relu()),
    "rows that are set": lambda y, i, j: y.index_put((i > 3,), y.new_zeros(())),
    "rows that are masked": lambda y, i, j: y.index_put((i > 3,), torch.tensor(0.0, dtype=y.dtype, device=DEVICE)),
    "index_copy": lambda y, i, j: zeros(y).index_copy(0, numbers(6, 5, 4, 3, 2, 1, 0), y.relu()),
    "gather by a repeated index": lambda y, i, j: y.gather(0, i[:, None].repeat(1, y.shape[1])) * y.relu(),
    "take_along_dim": lambda y, i, j: torch.take_along_dim(y, i[:, None], 0) * y.relu(),
    "gather": lambda y, i, j: y.gather(0, wide(i, y)) * y.relu(),
}


class Graph(nn.Module):
    """A layer of a graph network whose attention is computed by hand, the mean of two heads."""

    def __init__(self):
        super().__init__()
        self.first, self.scores, self.last = nn.Linear(5, 6), nn.Linear(5, 2), nn.Linear(6, 3)

    def forward(self, x, edges):
        y, (i, j) = self.first(x), edges
        weights = (self.scores(x)[i] + self.scores(x)[j]).exp()
        total = torch.zeros_like(weights[: len(x)]).index_add(0, j, weights)
        weights = weights / total[j]
        seen = y.new_zeros(len(x), 2, y.shape[1]).index_add_(0, j, weights[..., None] * y[i][:, None])
        return self.last(F.elu(seen).mean(1))


def edges():
    return drawn(5, 5), torch.stack([numbers(0, 1, 2, 3, 4, 0, 2), numbers(1, 2, 3, 4, 0, 0, 4)])


class Cached(nn.Module):
    """Hidden states that are written into places of a longer tensor, as into a cache."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.first(x)
        cache = y.new_zeros(len(y), 9, y.shape[-1])
        cache[:, torch.arange(7, device=y.device)] = y
        return self.last(cache.tanh().sum(1))


class Interactions(nn.Module):
    """The shape of a DLRM: inner products of all pairs of embeddings and a vector."""

    def __init__(self):
        super().__init__()
        self.embed = nn.ModuleList([nn.Embedding(9, 6), nn.Embedding(8, 6)])
        self.dense, self.last = nn.Linear(5, 6), nn.Linear(9, 1)

    def forward(self, x, i):
        parts = torch.stack([F.relu(self.dense(x)), *[each(i) for each in self.embed]], 1)
        return self.last((parts @ parts.mT).flatten(1))


class Edges(nn.Module):
    """The greatest of what the edges of a node give, as in EdgeConv."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x, edges):
        i, j = edges
        y = F.relu(self.first(torch.cat([x[i], x[j] - x[i]], -1)))
        seen = x.new_zeros(len(x), y.shape[1])
        return self.last(seen.scatter_reduce(0, wide(j, y), y, "amax", include_self=False))


class Factorization(nn.Module):
    """A factorization machine: half of the square of a sum less the sum of squares."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(9, 6), nn.Embedding(9, 1)

    def forward(self, i):
        x = self.embed(i)
        pairs = x.sum(1).square() - x.square().sum(1)
        return 0.5 * pairs.sum(-1) + self.linear(i).sum((1, 2))


class Matrix(nn.Module):
    """Matrix factorization."""

    def __init__(self, run):
        super().__init__()
        self.run, self.users, self.items = run, nn.Embedding(9, 6), nn.Embedding(8, 6)

    def forward(self, i, j):
        return self.run(self.users(i), self.items(j))


def pairs():
    return numbers(0, 3, 8, 2), numbers(1, 7, 0, 1)


class Bag(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.embed, self.last = nn.EmbeddingBag(9, 6, mode=mode), nn.Linear(6, 3)

    def forward(self, i, starts):
        return self.last(self.embed(i, starts))


class Both(nn.Module):
    """A bilinear layer between channels on both sides."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.mix, self.last = nn.Linear(5, 6), nn.Linear(5, 7), nn.Bilinear(6, 7, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(F.relu(self.mix(F.relu(self.a(x)), self.b(x))))


def sparse(run):
    return between(
        lambda net, y: run(torch.eye(len(y), dtype=y.dtype, device=y.device).roll(1, 0).to_sparse(), y.relu())
    )


class Adjacency(nn.Module):
    """Graph convolutions with a sparse matrix, from a buffer or among the inputs."""

    def __init__(self, matrix=None):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("matrix", matrix)

    def forward(self, x, matrix=None):
        matrix = self.matrix if matrix is None else matrix
        return self.last(matrix @ F.relu(self.first(matrix @ x)))


def circle():
    return torch.eye(7, dtype=torch.float64, device=DEVICE).roll(1, 0).to_sparse()


def turned(net, y):
    places = F.affine_grid(torch.eye(2, 3).to(y).roll(1, 1).expand(len(y), -1, -1), y.shape, align_corners=False)
    return F.grid_sample(y, places, align_corners=False)


def patched(net, y):
    return F.fold(F.unfold(y, 2, stride=2), y.shape[2:], 2, stride=2)


def compared(net, x):
    """Attention of one head over pixels, without a scale, as in SAGAN."""
    q, k, v = (layer(x).flatten(2) for layer in (net.query, net.key, net.value))
    return net.last((v @ (q.mT @ k).softmax(-1)).unflatten(2, x.shape[2:]))


class OneKey(nn.Module):
    """Queries of several heads in one layer with one head of keys and values."""

    def __init__(self, by="split"):
        super().__init__()
        self.by, self.num_heads, self.head_dim = by, 6, 2
        self.qkv, self.out_proj = nn.Linear(5, 16), nn.Linear(12, 3)

    def forward(self, x):
        y, q, k = self.qkv(x), self.num_heads * self.head_dim, self.head_dim
        if self.by == "heads":  # As Falcon does.
            y = y.unflatten(-1, (self.num_heads + 2, self.head_dim))
            q, k, v = (part.transpose(1, 2) for part in (y[..., :-2, :], y[..., [-2], :], y[..., [-1], :]))
        else:
            parts = y.split((q, k, k), -1) if self.by == "split" else (y[..., :q], y[..., q : q + k], y[..., q + k :])
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        if self.by == "by hand":
            y = (q @ k.mT * self.head_dim**-0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, *(part.expand(-1, q.shape[1], -1, -1) for part in (k, v)))
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Shuffle(nn.Module):
    """A unit of ShuffleNet's first version: convolutions in groups with a shuffle between them, and a residual sum."""

    def __init__(self, width=24, groups=3):
        super().__init__()
        self.groups = groups
        self.a = nn.Sequential(CONV(width, width // 2, 1, groups=groups, bias=False), nn.BatchNorm2d(width // 2))
        self.b = nn.Sequential(CONV(width // 2, width // 2, 3, 1, 1, groups=width // 2), nn.BatchNorm2d(width // 2))
        self.c = nn.Sequential(CONV(width // 2, width, 1, groups=groups), nn.BatchNorm2d(width))

    def forward(self, x):
        n, _, h, w = x.shape
        y = F.relu(self.a(x)).view(n, self.groups, -1, h, w).transpose(1, 2).reshape(n, -1, h, w)
        return F.relu(x + self.c(self.b(y)))


def shuffled(groups=3):
    return nn.Sequential(
        CONV(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), *[Shuffle(24, groups) for _ in range(2)]
    ).extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3)])


def one_key(net, x):
    q, k, v = net.query(x), net.key(x), net.value(x)
    return net.last((q @ k.mT / torch.ones(q.shape[-1], dtype=q.dtype, device=q.device).sum()).softmax(-1) @ v)


OPERATIONS = {
    "shuffled groups of a convolution, 3": (shuffled, images, 0.3),
    "shuffled groups of a convolution, 4": (lambda: shuffled(4), images, 0.3),
    "groups of the last convolution": (
        lambda: nn.Sequential(CONV(3, 12, 3), nn.ReLU(), CONV(12, 8, 3, groups=4)),
        images,
        0.2,
    ),
    "constants that a convolution in groups reads": (
        lambda: nn.Sequential(
            *(CONV(3, 12, 3), nn.Sigmoid(), CONV(12, 8, 3, groups=2), nn.ChannelShuffle(2), nn.ReLU()),
            *(CONV(8, 8, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)),
        ),
        images,
        0.4,
    ),
    **{
        f"one head of keys, {by}": (lambda by=by: OneKey(by), steps, 0.3)
        for by in ("split", "slices", "heads", "by hand")
    },
    **{name: (lambda run=run: rows(run), nodes, 0.3) for name, run in ROWS.items()},
    "graph attention": (Graph, edges, 0.3),
    "edges of a graph": (Edges, edges, 0.3),
    "a cache": (Cached, steps, 0.3),
    "an embedding bag, sum": (lambda: Bag("sum"), lambda: (numbers(0, 3, 8, 2, 5), numbers(0, 2, 2)), 0.4),
    "an embedding bag, mean": (lambda: Bag("mean"), lambda: (numbers(0, 3, 8, 2, 5), numbers(0, 2, 2)), 0.4),
    "an embedding bag, max": (lambda: Bag("max"), lambda: (numbers(0, 3, 8, 2, 5), numbers(0, 2, 2)), 0.4),
    "torch.sparse.mm": (lambda: sparse(torch.sparse.mm), nodes, 0.3),
    "a product with a sparse matrix": (lambda: sparse(lambda a, y: a @ y), nodes, 0.3),
    "a sparse matrix in a buffer": (lambda: Adjacency(circle()), nodes, 0.3),
    "a sparse matrix among the inputs": (Adjacency, lambda: (*nodes(), circle()), 0.3),
    "a sum of products": (lambda: Matrix(lambda u, v: (u * v).sum(-1)), pairs, 0.4),
    "a sum of squares of differences": (lambda: Matrix(lambda u, v: (u - v).square().sum(-1).sqrt()), pairs, 0.4),
    "an inner product": (lambda: Matrix(lambda u, v: u @ v.T), pairs, 0.4),
    "an inner product by einsum": (lambda: Matrix(lambda u, v: torch.einsum("id,id->i", u, v)), pairs, 0.4),
    "a count of what is not zero": (
        lambda: between(lambda net, y: y.relu() / (1 + (y > 0).sum(-1, keepdim=True))),
        nodes,
        0.3,
    ),
    "a factorization machine": (Factorization, lambda: (numbers(0, 3, 8, 2, 5, 1).reshape(2, 3),), 0.3),
    "interactions": (Interactions, lambda: (drawn(4, 5), numbers(0, 3, 7, 2)), 0.3),
    "attention of one head without a scale": (
        lambda: Net(compared, query=CONV(3, 6, 1), key=CONV(3, 6, 1), value=CONV(3, 8, 1), last=CONV(8, 3, 1)),
        images,
        0.3,
    ),
    "a bilinear layer": (Both, nodes, 0.5),
    "a bilinear layer of one tensor": (
        lambda: Net(lambda net, x: net.mix(y := net.a(x), y), a=nn.Linear(5, 6), mix=nn.Bilinear(6, 6, 3)),
        nodes,
        0.4,
    ),
    "slopes that are drawn in training": (
        lambda: between(lambda net, y: net.act(y), act=nn.RReLU(0.25, 0.25)),
        nodes,
        0.3,
    ),
    "sampling": (lambda: among(turned), images, 0.3),
    "patches": (lambda: among(patched), images, 0.3),
    "windows": (lambda: between(lambda net, y: y.relu().unfold(1, 3, 2).mean(-1)), steps, 0.3),
    "a median": (lambda: between(lambda net, y: y.relu().median(1)[0]), steps, 0.3),
    "a greatest entry so far": (lambda: between(lambda net, y: y.relu().cummax(1)[0]), steps, 0.3),
    "a least entry but one": (lambda: between(lambda net, y: y.kthvalue(2, 1)[0]), steps, 0.3),
    "a logarithm of cumulative sums": (lambda: between(lambda net, y: y.logcumsumexp(1)), steps, 0.3),
    "a cumulative sum": (lambda: between(lambda net, y: y.cumsum(1).relu()), steps, 0.3),
    "a filter of frequencies": (
        lambda: among(lambda net, y: torch.fft.irfft2(torch.fft.rfft2(y) * 0.5, s=y.shape[2:])),
        images,
        0.3,
    ),
    "a turn by a right angle": (lambda: among(lambda net, y: y.rot90(1, (2, 3))), images, 0.3),
}
every_operation = pytest.mark.parametrize(("make", "inputs", "share"), OPERATIONS.values(), ids=OPERATIONS)


@every_operation
def test_channels_go_without_another_output_in_evaluation_and_in_training(make, inputs, share):
    net, seen = network(make), inputs()
    groups = fr.channel_groups(net, seen)
    for seed in range(2):
        dead = without_half(net, groups, seed)
        smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), groups), seen)
        for training in (False, True):
            expected = outputs(dead.train(training), seen)
            torch.testing.assert_close(outputs(smaller.train(training), seen), expected, rtol=1e-10, atol=1e-10)
            assert (expected[0] - expected[1]).abs().max() > 1e-6  # It still tells inputs apart.
        assert 1 - entries(smaller) / entries(net) > share


# What is kept

MEAN = r"normalized over them in training \(\w*batch_norm, 'norm'\)"
KEPT = {
    "BatchNorm over steps": (lambda: between(lambda net, y: net.norm(y).relu(), norm=nn.BatchNorm1d(7)), steps, MEAN),
    "InstanceNorm of steps": (
        lambda: between(
            lambda net, y: net.norm(y).relu(), norm=nn.InstanceNorm1d(7, affine=True, track_running_stats=True)
        ),
        steps,
        MEAN,
    ),
    "an index for each channel": (
        lambda: rows(lambda y, i, j: zeros(y).scatter_add(0, wide(j, y) + torch.arange(6, device=y.device) % 2, y[i])),
        nodes,
        r"looked up by an index \(scatter_add\)",
    ),
    "an index for some channels": (
        lambda: between(lambda net, y: y.gather(0, numbers(0, 1)[:, None].expand(2, 4)), inner=4),
        nodes,
        r"looked up by an index \(gather\)",
    ),
    "rows beside entries that are no channels": (
        lambda: rows(lambda y, i, j: torch.ones(7, 6, dtype=y.dtype, device=y.device).index_add(0, j, y[i])),
        nodes,
        r"written into entries that are not channels \(index_add\)",
    ),
    "a mask of entries": (
        lambda: between(lambda net, y: y[torch.ones_like(y, dtype=torch.bool)].reshape(7, -1)),
        nodes,
        r"used as an index \(index\)",
    ),
    "a sum of exponentials": (
        lambda: Matrix(lambda u, v: (u * v).exp().sum(-1)),
        pairs,
        r"reduced over channels \(sum\)",
    ),
    "an inner product that is scaled": (
        lambda: Matrix(lambda u, v: (u * v).sum(-1) / u.shape[-1] ** 0.5),
        pairs,
        r"reduced over channels \(sum\): .*computes .* by 1.732.*, which was .* by 2.449",
    ),
    "an inner product beside random numbers": (
        lambda: Matrix(lambda u, v: (u * v).sum(-1) + torch.randn(4, dtype=u.dtype, device=u.device)),
        pairs,
        r"reduced over channels \(sum\), and outputs were not compared, because they depend on random numbers",
    ),
    "an inner product under a softmax over one entry": (
        lambda: Net(one_key, query=nn.Linear(5, 6), key=nn.Linear(5, 6), value=nn.LayerNorm(5), last=nn.Linear(5, 3)),
        lambda: steps(3, 1),
        r"a product of two tensors of channels.*, which a softmax over one entry would hide",
    ),
    "an inner product of what is not zero": (
        lambda: Matrix(lambda u, v: (1 + u) @ v.exp().T),
        pairs,
        r"a product of two tensors of channels",
    ),
    "a transform along channels": (
        lambda: between(lambda net, y: torch.fft.fft(y).real),
        nodes,
        r"a transform along channels is not followed",
    ),
}


@pytest.mark.parametrize(("make", "inputs", "reason"), KEPT.values(), ids=KEPT)
def test_what_sees_channels_keeps_them_and_the_reason_is_told(make, inputs, reason):
    with pytest.raises(ValueError, match=rf"(?s)found no channels in .*{reason}"):
        fr.channel_groups(network(make), inputs())


def test_heads_that_share_one_packed_head_of_keys_are_a_part_of_the_layer():
    net, seen = network(OneKey), steps()
    heads = fr.Along(0, size=2, stop=12)
    by_hand = [{"qkv.weight": heads, "qkv.bias": heads, "out_proj.weight": fr.Along(1, size=2)}]
    assert list(fr.channel_groups(net, seen)) == by_hand
    dead = without_half(net, fr.ChannelGroups(by_hand, [6]))
    smaller = fr.resized(dead, fr.remove_dead(fr.with_buffers(dead), by_hand))
    assert (smaller.num_heads, smaller.qkv.out_features, smaller.out_proj.in_features) == (3, 10, 6)
    torch.testing.assert_close(outputs(smaller, seen), outputs(dead, seen), rtol=1e-10, atol=1e-10)


def test_sums_are_kept_where_nothing_can_be_tried_out_or_compared(monkeypatch):
    net, seen = network(lambda: Matrix(lambda u, v: (u * v).sum(-1))), pairs()
    assert fr.channel_groups(net, seen).layers == [("users", "items")]
    monkeypatch.setattr(trying, "_COPIED", 0)
    with pytest.raises(ValueError, match=r"reduced over channels \(sum\), and outputs were not .* tensors are large"):
        fr.channel_groups(net, seen)

    def run(u, v):
        if float(u.std(-1).max()) < 1e-9:
            raise ArithmeticError("all features are the same")
        return (u * v).sum(-1)

    with pytest.raises(ValueError, match=r"reduced over channels \(sum\)"):
        fr.channel_groups(network(lambda: Matrix(run)), seen)


def test_a_whole_part_of_a_network_keeps_its_groups_where_another_one_mixes_them():
    part = lambda: nn.Sequential(CONV(12, 12, 1, groups=3), nn.ReLU(), CONV(12, 12, 1))
    net = network(
        lambda: nn.Sequential(CONV(3, 12, 1), *part(), CONV(12, 12, 1, groups=3), nn.ChannelShuffle(3)).extend(
            [nn.ReLU(), CONV(12, 3, 1, groups=3), nn.ReLU(), CONV(3, 2, 1)]
        )
    )
    groups = fr.channel_groups(net, images())
    places = [next(iter(family.items())) for family in groups]
    assert places[0] == ("0.weight", fr.Along(0, size=4))  # Whole groups.
    assert places[1] == ("3.weight", fr.Along(0, packed=3))  # As many of each.
