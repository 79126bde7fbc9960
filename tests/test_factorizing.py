"""Layers of low rank as two thin ones, with equal outputs and fewer parameters."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import DEVICE, drawn
from torch import nn

import funcreg as fr


class Transposed(nn.Module):
    """A linear layer as GPT-2 has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def low(module, rank=2, dim=0):
    """A layer whose weight, as a matrix with a dimension in its rows, has a rank, and singular values not too small."""
    w = module.weight
    moved = w.data.movedim(dim, 0)
    m = drawn(len(moved), rank) @ drawn(rank, moved[0].numel(), seed=2)
    w.data = m.reshape(moved.shape).movedim(0, dim).contiguous()
    return module.double().to(DEVICE)


options = {"stride": 2, "padding": 2, "dilation": 2}
LAYERS = {
    "linear": (lambda: low(nn.Linear(12, 9)), (4, 12), "- -"),
    "linear without a bias": (lambda: low(nn.Linear(12, 9, bias=False)), (2, 3, 12), "- -"),
    "transposed linear": (lambda: low(Transposed(12, 9)), (4, 9), "- -"),
    "1x1": (lambda: low(nn.Conv2d(12, 9, 1, stride=2)), (2, 12, 5, 5), "(1, 1) (1, 1)"),
    "kernel first": (lambda: low(nn.Conv2d(4, 18, 3, **options)), (2, 4, 9, 9), "(3, 3) (1, 1)"),
    "kernel last": (
        lambda: low(nn.Conv2d(18, 4, 3, padding="same", padding_mode="circular"), dim=1),
        (2, 18, 7, 7),
        "(1, 1) (3, 3)",
    ),
    "one dimension": (lambda: low(nn.Conv1d(8, 16, 3, padding_mode="reflect", padding=1)), (2, 8, 7), "(3,) (1,)"),
    "three dimensions": (lambda: low(nn.Conv3d(4, 8, 2, bias=False)), (1, 4, 4, 4, 4), "(2, 2, 2) (1, 1, 1)"),
    "transposed, kernel last": (
        lambda: low(nn.ConvTranspose2d(18, 4, 3, stride=2, output_padding=1)),
        (2, 18, 4, 4),
        "(1, 1) (3, 3)",
    ),
    "transposed, kernel first": (
        lambda: low(nn.ConvTranspose1d(4, 18, 3, padding=1), dim=1),
        (2, 4, 6),
        "(3,) (1,)",
    ),
}
every_layer = pytest.mark.parametrize(("make", "shape", "says"), LAYERS.values(), ids=LAYERS)


def count(module):
    return sum(w.numel() for w in module.parameters())


@every_layer
def test_outputs_are_equal_and_the_layer_is_smaller(make, shape, says):
    torch.manual_seed(0)
    layer, x = make(), drawn(*shape)
    before = copy.deepcopy(layer.state_dict())
    thin = fr.factorized(layer)
    torch.testing.assert_close(thin(x), layer(x), rtol=1e-12, atol=1e-11)
    assert count(thin) < count(layer)
    assert "rank=2" in repr(thin)
    assert f"parameters={count(thin)}" in repr(thin)
    assert says == " ".join([str(getattr(part, "kernel_size", "-")) for part in thin])
    assert all(torch.equal(w, before[name]) for name, w in layer.state_dict().items())
    # A rank that is low up to a tolerance.
    with torch.no_grad():
        layer.weight += 1e-6 * drawn(*layer.weight.shape, seed=3)
    with pytest.warns(UserWarning, match=r"found no layer .* at tolerance=0.0: '' has rank \d+ of \d+, "):
        assert type(fr.factorized(layer, 0.0)) is type(layer)
    torch.testing.assert_close(fr.factorized(layer, 1e-3)(x), layer(x), rtol=1e-3, atol=1e-3)


def test_the_weight_changes_by_at_most_the_tolerance():
    layer = low(nn.Linear(20, 20), rank=20)
    u, _, v = torch.linalg.svd(layer.weight.detach())
    layer.weight.data = u * 0.5 ** torch.arange(20, device=DEVICE) @ v
    for tolerance, rank in ((0.3, 2), (0.06, 5), (0.01, 7)):
        thin = fr.factorized(layer, tolerance)
        assert thin[0].out_features == rank
        gap = torch.linalg.matrix_norm(thin.weight - layer.weight, 2)
        assert gap <= tolerance
        torch.testing.assert_close(gap, torch.tensor(0.5**rank, dtype=torch.float64))  # The best there is.
        assert thin.bias is thin[1].bias


def test_training_with_the_nuclear_norm_gives_layers_that_become_thin():
    torch.manual_seed(0)
    x = drawn(64, 10).float()
    y = x @ torch.outer(torch.arange(10.0), torch.ones(8)).to(DEVICE)
    net = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 8)).to(DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    fr.regularize(optimizer, fr.nuclear, strength=20.0, module=net, mask=fr.matrices)
    for _ in range(100):
        optimizer.zero_grad()
        (net(x) - y).square().sum(1).mean().backward()
        optimizer.step()
    thin = fr.factorized(net)
    assert count(thin) < count(net) / 2
    torch.testing.assert_close(thin(x), net(x), rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    """A module with a forward of its own, layers that share a weight, and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 12, padding_idx=0), nn.Linear(12, 20, bias=False)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.again = self.first
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.again(self.second(self.first(self.embedding(x)))))


def block():
    torch.manual_seed(0)
    net = Block()
    low(net.first), low(net.embedding)
    net.head.weight = net.embedding.weight
    return net.double().to(DEVICE)


def test_layers_that_share_a_weight_stay_and_a_layer_that_is_used_twice_stays_one():
    net, x = block(), torch.arange(6, device=DEVICE)
    net.first.weight.requires_grad_(False)
    net.first.eval()
    thin = fr.factorized(net)
    torch.testing.assert_close(thin(x), net(x), rtol=1e-12, atol=1e-10)
    assert thin.first is thin.again
    assert thin.head.weight is thin.embedding.weight
    assert type(thin.second) is nn.Linear
    assert [w.requires_grad for w in thin.first.parameters()] == [False, False, True]
    assert not thin.first[0].training
    for name in ("head", "embedding"):
        with pytest.raises(ValueError, match=rf"layers names '{name}', .*: it shares its weight with another layer"):
            fr.factorized(net, layers=[name])


def test_only_the_layers_that_are_named_become_thin():
    net = nn.Sequential(low(nn.Linear(12, 12)), low(nn.Linear(12, 12)), nn.Linear(12, 3).double().to(DEVICE))
    thin = fr.factorized(net, layers=["1"])
    assert [type(layer).__name__ for layer in thin] == ["Linear", "Factors", "Linear"]
    assert list(thin.state_dict()) == [
        "0.weight",
        "0.bias",
        "1.0.weight",
        "1.1.weight",
        "1.1.bias",
        "2.weight",
        "2.bias",
    ]
    for layers, message in (
        (["2"], r"layers names '2', .*: '2' has rank 3 of 3, 45 parameters for 36"),
        (["3"], r"layers is \['3'\]; expected names among '0', '1', .*'2'"),
        ("1", r"layers is '1'; expected names among .*, in a list: \['1'\]"),
        ([""], r"layers names '', .*: it is a Sequential"),
    ):
        with pytest.raises(ValueError, match=message):
            fr.factorized(net, layers=layers)


def test_embeddings_become_thin_where_they_are_named():
    table = low(nn.Embedding(20, 12, padding_idx=3))
    table.weight.data[3] = 0
    net, x = nn.Sequential(table), torch.arange(6, device=DEVICE)
    with pytest.warns(UserWarning, match="no linear layer or convolution of one group"):
        assert type(fr.factorized(net)[0]) is nn.Embedding
    thin = fr.factorized(net, layers=["0"])
    torch.testing.assert_close(thin(x), net(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(thin[0].weight, table.weight, rtol=1e-12, atol=1e-12)
    assert thin[0][0].padding_idx == 3


REFUSED = {
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(9, 9)), "is it parametrized"),
    "groups": (lambda: nn.Conv1d(8, 8, 3, groups=2), "it is a convolution of 2 groups"),
    "hooks": (lambda: nn.utils.prune.identity(nn.Linear(9, 9), "weight"), "its weight is no parameter"),
    "other hooks": (lambda: hooked(nn.Linear(9, 9)), "it has hooks"),
    "max_norm": (lambda: nn.Embedding(9, 9, max_norm=1.0), "it has max_norm"),
    "activation": (lambda: nn.ReLU(), "it is a ReLU"),
}


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_two_layers_is_left_and_refused_where_it_is_named(make, message):
    layer = make()
    if isinstance(vars(layer).get("weight"), torch.Tensor):
        layer.weight = layer.weight.detach()  # As after a forward without gradients: else it cannot be copied.
    net = nn.Sequential(layer)
    with pytest.raises(ValueError, match=rf"layers names '0', which cannot be two thin layers: .*{message}"):
        fr.factorized(net, layers=["0"])
    with pytest.warns(UserWarning, match="factorized found no layer"):
        assert type(fr.factorized(net)[0]) is type(layer)


def test_attention_and_encoder_layers_still_run():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, 12, batch_first=True).double().to(DEVICE).eval()
    low(layer.linear1), low(layer.linear2), low(layer.self_attn.out_proj)
    thin, x = fr.factorized(layer), drawn(2, 5, 12)
    assert type(thin.self_attn.out_proj) is type(layer.self_attn.out_proj)
    assert count(thin.linear1) < count(layer.linear1)
    torch.testing.assert_close(thin(x), layer(x), rtol=1e-11, atol=1e-11)
    with torch.no_grad():  # Where it asks for the weights of its layers, the fused path of inference.
        torch.testing.assert_close(thin(x), layer(x), rtol=1e-11, atol=1e-11)


@every_layer
def test_a_thin_network_trains_and_is_saved(make, shape, says):
    torch.manual_seed(0)
    net, x = nn.Sequential(make()), drawn(*shape)
    thin = fr.factorized(net)
    thin(x).square().mean().backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in thin.parameters())
    torch.optim.SGD(thin.parameters(), lr=1e-3).step()
    file = io.BytesIO()
    torch.save(thin.state_dict(), file)
    file.seek(0)
    read = fr.factorized(net, state=torch.load(file))  # From the code of the large one.
    for other in (read, copy.deepcopy(thin), pickle.loads(pickle.dumps(thin))):
        assert torch.equal(other(x), thin(x))
    exported = torch.export.export(thin, (x,)).module()
    torch.testing.assert_close(exported(x), thin(x), rtol=1e-12, atol=1e-12)


def test_a_state_without_thin_layers_is_an_error():
    net = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="state has no thin layers of this Sequential"):
        fr.factorized(net, state=net.state_dict())
    with pytest.raises(TypeError, match=r"module is a dict; expected a torch\.nn"):
        fr.factorized({})
    net[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the weight of '0' has entries that are not finite"):
        fr.factorized(net)
    with pytest.raises(ValueError, match=r"tolerance is 1\.0; expected a number of at least 0 and below 1"):
        fr.factorized(net, 1.0)


def test_dtypes_and_layers_of_zeros():
    layer = nn.Linear(16, 16).bfloat16()
    layer.weight.data = torch.outer(torch.arange(16.0), torch.ones(16)).bfloat16()
    thin = fr.factorized(layer, 0.01)
    assert {w.dtype for w in thin.parameters()} == {torch.bfloat16}
    assert thin[0].out_features == 1
    layer.weight.data.zero_()
    thin = fr.factorized(layer)
    assert torch.equal(thin(torch.ones(2, 16).bfloat16()), layer(torch.ones(2, 16).bfloat16()))


def test_what_stays_is_said_with_its_reason():
    net = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9))
    net[0].weight.data.fill_(1.0)
    net[2].weight = net[0].weight
    with pytest.warns(UserWarning, match="'0' stays: it shares its weight with another layer; '2' stays: it shares"):
        fr.factorized(net)
    with pytest.raises(ValueError, match=r"layers is \['3'\]; expected names among '', the module itself"):
        fr.factorized(net[0], layers=["3"])
