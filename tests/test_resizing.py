"""Networks without what is zero in them give what they gave, whatever their layers are."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, drawn
from networks import halve, kept, smaller
from torch import nn

import funcreg as fr


def result(output):
    """The first tensor that a layer gives."""
    return output if isinstance(output, torch.Tensor) else output[0]


def around(*layers):
    return lambda: nn.Sequential(*[make() for make in layers])


def conv(*sizes, kind=nn.Conv2d, **options):
    return lambda: kind(*sizes, **options)


def chain(first, last, *, middle=(), size=1, reads=1):
    """The channels of a layer, which others pass on and a last one reads."""
    places = {
        name: kept(0, size) if name.rpartition(".")[2].startswith("running") else fr.Along(0, size) for name in middle
    }
    own = {f"{first}.weight": fr.Along(0, size), f"{first}.bias": fr.Along(0, size)}
    return {**own, **places, f"{last}.weight": kept(reads, size)}


def norm(path, *more):
    return [f"{path}.{own}" for own in ("weight", "bias", *more)]


class Only(nn.Module):
    """A layer whose first result is what counts."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Own(nn.Module):
    """A linear layer of somebody else."""

    def __init__(self, into, out):
        super().__init__()
        self.in_features, self.out_features = into, out
        self.weight, self.bias = nn.Parameter(torch.empty(out, into)), nn.Parameter(torch.empty(out))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias).reshape(*x.shape[:-1], self.out_features)


class Transposed(nn.Module):
    """A linear layer as GPT-2 has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.empty(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], self.nf)


class Scale(nn.Module):
    """A normalization with a name for its width."""

    def __init__(self, count):
        super().__init__()
        self.num_features = count
        self.register_buffer("weight", torch.empty(count))

    def forward(self, x):
        return x.reshape(-1, self.num_features) * self.weight


LAYERS = {
    "a grouped convolution loses groups": (
        around(conv(3, 12, 1), conv(12, 18, 3, groups=6), conv(18, 4, 1)),
        (3, 5, 5),
        [{**chain("0", "2", size=2), "1.weight": fr.Along(0, 3), "1.bias": fr.Along(0, 3), "2.weight": kept(1, 3)}],
    ),
    "a grouped convolution takes less in each group": (
        around(conv(3, 12, 1, kind=nn.Conv1d), conv(12, 4, 3, kind=nn.Conv1d, groups=2)),
        (3, 6),
        [{"0.weight": fr.Along(0, packed=2), "0.bias": fr.Along(0, packed=2), "1.weight": kept(1)}],
    ),
    "a grouped convolution gives less in each group": (
        around(conv(4, 12, 3, kind=nn.Conv1d, groups=2), conv(12, 4, 1, kind=nn.Conv1d)),
        (4, 6),
        [{"0.weight": fr.Along(0, packed=2), "0.bias": fr.Along(0, packed=2), "1.weight": kept(1, packed=2)}],
    ),
    "a grouped convolution gives less, and could have lost groups": (
        around(conv(3, 8, 1), conv(8, 8, 3, groups=4), conv(8, 4, 1)),
        (3, 5, 5),
        [{"1.weight": fr.Along(0, packed=4), "1.bias": fr.Along(0, packed=4), "2.weight": kept(1, packed=4)}],
    ),
    "a transposed convolution of groups": (
        around(
            conv(3, 8, 1, kind=nn.Conv1d),
            conv(8, 12, 3, kind=nn.ConvTranspose1d, groups=4),
            conv(12, 2, 1, kind=nn.Conv1d),
        ),
        (3, 5),
        [
            {
                "0.weight": fr.Along(0, 2),
                "0.bias": fr.Along(0, 2),
                "1.weight": fr.Along(0, 2),
                "1.bias": fr.Along(0, 3),
                "2.weight": kept(1, 3),
            }
        ],
    ),
    "a transposed convolution gives less in each group": (
        around(conv(8, 12, 3, kind=nn.ConvTranspose1d, groups=4), conv(12, 2, 1, kind=nn.Conv1d)),
        (8, 5),
        [{"0.weight": 1, "0.bias": fr.Along(0, packed=4), "1.weight": kept(1, packed=4)}],
    ),
    "a convolution of three dimensions": (
        around(conv(2, 6, 2, kind=nn.Conv3d), conv(6, 3, 1, kind=nn.ConvTranspose3d)),
        (2, 3, 3, 3),
        [chain("0", "1", reads=0)],
    ),
    "depthwise, and a normalization": (
        around(conv(3, 6, 1), conv(6, 6, 3, groups=6), lambda: nn.BatchNorm2d(6), nn.ReLU6, conv(6, 3, 1)),
        (3, 5, 5),
        [chain("0", "4", middle=["1.weight", "1.bias", *norm("2", "running_mean", "running_var")])],
    ),
    "groups of channels normalized together": (
        around(conv(3, 12, 1), lambda: nn.GroupNorm(4, 12), nn.ReLU, conv(12, 3, 1)),
        (3, 5, 5),
        [chain("0", "3", middle=norm("1"), size=3)],
    ),
    "channels normalized for themselves": (
        around(
            conv(3, 8, 1),
            lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            lambda: nn.PReLU(8),
            conv(8, 3, 1),
        ),
        (3, 5, 5),
        [{**chain("0", "3", middle=norm("1", "running_mean", "running_var")), "2.weight": kept(0)}],
    ),
    "channels normalized for themselves, without scales": (
        around(conv(3, 8, 1, bias=False), lambda: nn.InstanceNorm2d(8), nn.ReLU, conv(8, 3, 1)),
        (3, 5, 5),
        [{"0.weight": 0, "3.weight": kept(1)}],
    ),
    "an embedding": (
        around(lambda: nn.Embedding(9, 6, padding_idx=0), lambda: nn.Linear(6, 3)),
        (),
        [{"0.weight": 1, "1.weight": 1}],
    ),
    "a bag of embeddings": (
        around(lambda: nn.EmbeddingBag(9, 6), lambda: nn.Linear(6, 3)),
        (),
        [{"0.weight": 1, "1.weight": 1}],
    ),
    "a transposed linear layer": (
        around(lambda: nn.Linear(3, 6), lambda: Transposed(6, 6), lambda: Transposed(2, 6)),
        (3,),
        [{"0.weight": 0, "0.bias": 0, "1.weight": kept(0)}, {"1.weight": 1, "1.bias": 0, "2.weight": kept(0)}],
    ),
    "layers of others that name their widths": (
        around(lambda: Own(3, 6), lambda: Scale(6), lambda: Own(6, 6), lambda: Own(6, 2)),
        (3,),
        [
            {"0.weight": 0, "0.bias": 0, "1.weight": kept(0), "2.weight": kept(1)},
            {"2.weight": 0, "2.bias": 0, "3.weight": kept(1)},
        ],
    ),
}
every_layer = pytest.mark.parametrize(("make", "shape", "families"), LAYERS.values(), ids=LAYERS)


def built(make, families):
    return halve(make().double().to(DEVICE).eval(), families)


def inputs(shape):
    return (
        drawn(5, *shape)
        if shape
        else torch.randint(0, 9, (5, 4), generator=torch.Generator().manual_seed(1), device="cpu").to(DEVICE)
    )


@every_layer
def test_outputs_are_equal_and_the_network_is_smaller(make, shape, families):
    net, x = built(make, families), inputs(shape)
    before = copy.deepcopy(net.state_dict())
    made = smaller(net, families)
    expected = result(net(x))
    torch.testing.assert_close(result(made(x)), expected, rtol=1e-12, atol=1e-12)
    assert sum(w.numel() for w in made.parameters()) < sum(w.numel() for w in net.parameters())
    assert torch.equal(smaller(net, families, (x,))(x), made(x))
    assert all(torch.equal(w, before[name]) for name, w in net.state_dict().items())


# Recurrent layers

RECURRENT = {
    "RNN": (lambda: nn.RNN(3, 6), 1),
    "RNN of two layers": (lambda: nn.RNN(3, 6, num_layers=2, nonlinearity="relu", bias=False), 1),
    "LSTM": (lambda: nn.LSTM(3, 6, batch_first=True), 4),
    "LSTM in both directions": (lambda: nn.LSTM(3, 6, num_layers=2, bidirectional=True), 4),
    "LSTM with a projection": (lambda: nn.LSTM(3, 6, proj_size=2), 4),
    "GRU": (lambda: nn.GRU(3, 6, num_layers=2, bidirectional=True), 3),
    "RNNCell": (lambda: nn.RNNCell(3, 6), 1),
    "LSTMCell": (lambda: nn.LSTMCell(3, 6), 4),
    "GRUCell": (lambda: nn.GRUCell(3, 6), 3),
}


def without_units(layer, gates):
    """A recurrent layer whose first three of six hidden units are zero, and its tensors without these."""
    gone = torch.arange(6, device=DEVICE) < 3
    tree = {}
    for name, w in layer.named_parameters():
        rows, columns = gone.repeat(gates), torch.zeros(w.shape[-1], dtype=torch.bool, device=DEVICE)
        if w.shape[0] != 6 * gates:  # A projection of the units.
            rows, columns = torch.zeros(w.shape[0], dtype=torch.bool, device=DEVICE), gone
        elif w.ndim == 2 and w.shape[1] % 6 == 0:
            columns = gone.repeat(w.shape[1] // 6)
        with torch.no_grad():
            w[rows] = 0
        tree[name] = w[~rows][:, ~columns] if w.ndim == 2 else w[~rows]
    return tree


@pytest.mark.parametrize(("make", "gates"), RECURRENT.values(), ids=RECURRENT)
def test_hidden_units_of_recurrent_layers_may_go(make, gates):
    layer, x = built(make, []), drawn(5, 4, 3) if "Cell" not in type(make()).__name__ else drawn(5, 3)
    made = fr.resized(layer, without_units(layer, gates))
    assert made.hidden_size == 3
    found, expected = result(made(x)), result(layer(x))
    if found.shape != expected.shape:  # Directions side by side, dead units first in each.
        expected = expected.unflatten(-1, (-1, 6))[..., 3:].flatten(-2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.sum().backward()
    assert all(w.grad is not None for w in made.parameters())


def test_a_recurrent_layer_has_one_width():
    layer = nn.LSTM(3, 6, num_layers=2)
    tree = {name: w.detach() for name, w in layer.named_parameters()}
    tree["weight_ih_l0"] = tree["weight_ih_l0"][:12]
    with pytest.raises(ValueError, match=r"weight_ih_l0.* has shape \(12, 3\); expected \(24, 3\).*packed=4"):
        fr.resized(layer, tree)


# Attention


def attention_heads(path, size, *, packed=True, extra=False):
    names = ["in_proj_weight"] if packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    heads: dict[str, Any] = dict.fromkeys([f"{path}.{name}" for name in names], fr.Along(0, size, 3 if packed else 1))
    heads[f"{path}.in_proj_bias"] = fr.Along(0, size, 3)
    if extra:
        heads.update(dict.fromkeys([f"{path}.bias_k", f"{path}.bias_v"], fr.Along(2, size)))
    return {**heads, f"{path}.out_proj.weight": fr.Along(1, size)}


class Attending(nn.Module):
    """Attention with all of its arguments."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 8, **options)

    def forward(self, query, key, value, **options):
        return self.attention(query, key, value, **options)


ATTENTION = {
    "packed": ({}, {}),
    "batch first": ({"batch_first": True}, {"need_weights": False}),
    "keys and values of other widths": ({"kdim": 5, "vdim": 7, "batch_first": True}, {"average_attn_weights": False}),
    "biases of keys and values": ({"add_bias_kv": True, "add_zero_attn": True, "batch_first": True}, {}),
}
MASKS = {
    "no mask": dict,
    "a mask of bools": lambda: {"attn_mask": torch.ones(3, 4, dtype=torch.bool, device=DEVICE).triu(1)},
    "a mask of numbers": lambda: {"attn_mask": drawn(3, 4)},
    "padding": lambda: {"key_padding_mask": torch.arange(4, device=DEVICE).expand(2, -1) > 2},
    "both": lambda: {"attn_mask": drawn(3, 4), "key_padding_mask": drawn(2, 4)},
}


@pytest.mark.parametrize(("options", "given"), ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("batched", [True, False])
def test_attention_without_dead_heads_gives_what_it_gave(options, given, mask, batched):
    family = attention_heads("attention", 2, packed="kdim" not in options, extra="add_bias_kv" in options)
    net = built(lambda: Attending(**options), [family])
    made = smaller(net, [family])
    assert made.attention.num_heads == 4
    assert isinstance(made.attention, nn.MultiheadAttention)
    query, key, value = (
        drawn(2, 3, 16),
        drawn(2, 4, options.get("kdim", 16)),
        drawn(2, 4, options.get("vdim", 16), seed=2),
    )
    given = {**mask(), **given}
    if not batched:
        query, key, value = query[0], key[0], value[0]
        given = {name: x[0] if name == "key_padding_mask" else x for name, x in given.items()}
    elif "batch_first" not in options:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    found, expected = made(query, key, value, **given), net(query, key, value, **given)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    if expected[1] is None or expected[1].dim() > (3 if batched else 2):
        assert (found[1] is None) == (expected[1] is None)
    else:
        assert found[1].shape == expected[1].shape


def test_attention_stays_plain_where_its_embedding_becomes_narrower_with_its_heads():
    attention = nn.MultiheadAttention(8, 4)
    tree = {"in_proj_weight": torch.ones(12, 4), "in_proj_bias": torch.ones(12)}
    tree |= {"out_proj.weight": torch.ones(4, 4), "out_proj.bias": torch.ones(4)}
    made = fr.resized(attention, tree)
    assert type(made) is nn.MultiheadAttention
    assert (made.embed_dim, made.num_heads, made.head_dim, made.kdim) == (4, 2, 2, 4)
    made(*[torch.ones(3, 4)] * 3)
    with pytest.raises(ValueError, match=r"queries, keys, values, an output and biases of widths .*whole heads of 2"):
        fr.resized(attention, {**tree, "in_proj_weight": torch.ones(9, 4)})


def test_attention_of_ones_own_is_not_exchanged():
    class Mine(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)

    family = attention_heads("attention", 2)
    net = nn.ModuleDict({"attention": Mine(8, 4)}).double().to(DEVICE)
    with pytest.raises(ValueError, match=r"'attention' is a Mine, whose 4 features of heads are fewer than its 8"):
        smaller(halve(net, [family]), [family])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoders_and_decoders_lose_heads_and_hidden_units(norm_first):
    options = {"dim_feedforward": 12, "batch_first": True, "dropout": 0.0, "norm_first": norm_first}
    families: list[dict[str, Any]] = []
    for part, kinds in (("encoder", ["self_attn"]), ("decoder", ["self_attn", "multihead_attn"])):
        for i in range(2):
            path = f"{part}.layers.{i}"
            families += [attention_heads(f"{path}.{kind}", 2) for kind in kinds]
            families.append({f"{path}.linear1.weight": 0, f"{path}.linear1.bias": 0, f"{path}.linear2.weight": 1})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "enable_nested_tensor is True")
        net = built(lambda: nn.Transformer(8, 4, 2, 2, **options), families)
    made = smaller(net, families)
    given = {"src": drawn(2, 5, 8), "tgt": drawn(2, 4, 8)}
    padding = torch.arange(5, device=DEVICE).expand(2, -1) > torch.tensor([[3], [4]], device=DEVICE)
    for more in ({}, {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}):
        with torch.no_grad():  # The fused path of encoders is for inference.
            torch.testing.assert_close(made(**given, **more), net(**given, **more), rtol=1e-12, atol=1e-12)
    for other in (fr.resized(net, made.state_dict()), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(**given), made(**given))
    made.train()(**given).sum().backward()
    assert all(w.grad is not None for w in made.parameters())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # Torch maps its attention member by member.
@pytest.mark.parametrize("norm", [True, False])
def test_what_an_encoder_pads_is_zero_where_that_of_torch_makes_it_so(norm):
    def encoder():
        layer = nn.TransformerEncoderLayer(8, 4, 12, 0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2, nn.LayerNorm(8) if norm else None)

    families = [attention_heads(f"layers.{i}.self_attn", 2) for i in range(2)]
    net = built(encoder, families)
    made = pickle.loads(pickle.dumps(smaller(net, families)))
    assert made.layers[0].self_attn.num_heads == 2
    x, bools = drawn(2, 4, 8), torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]], device=DEVICE) > 0
    numbers = torch.zeros(2, 4, dtype=x.dtype, device=DEVICE).masked_fill(bools, -torch.inf)
    for grads in (False, True):
        with torch.set_grad_enabled(grads):
            for padding in (None, bools, numbers, bools[:, [0, 2, 1, 3]], bools & False):
                expected = net(x, src_key_padding_mask=padding)
                torch.testing.assert_close(made(x, src_key_padding_mask=padding), expected, rtol=1e-12, atol=1e-12)
            zero = torch.zeros_like(x[0, 2]) if net.norm is None else net.norm(torch.zeros_like(x[0, 2]))
            assert torch.equal(net(x, src_key_padding_mask=bools)[0, 2], zero) is not grads
    for each in (net, made):
        each.requires_grad_(False)
    followed = x.clone().requires_grad_()  # Torch takes no nested tensors then.
    expected = net(followed, src_key_padding_mask=bools)
    torch.testing.assert_close(made(followed, src_key_padding_mask=bools), expected, rtol=1e-12, atol=1e-12)
    mapped = torch.func.vmap(lambda x: made(x, src_key_padding_mask=bools))(x.unsqueeze(0))
    torch.testing.assert_close(mapped[0][~bools], expected[~bools], rtol=1e-12, atol=1e-12)


class Heads(nn.Module):
    """Attention written by hand, with a count of heads."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


BY_HAND = {"qkv.weight": fr.Along(0, 4, 3), "qkv.bias": fr.Along(0, 4, 3), "out.weight": fr.Along(1, 4)}


def test_a_count_of_heads_that_nobody_knows_is_an_error_unless_outputs_show_it():
    net, x = built(Heads, [BY_HAND]), drawn(2, 3, 16)
    with pytest.raises(ValueError, match=r"'', a Heads, stores heads=4, which its forward may use for a width.*rules="):
        smaller(net, [BY_HAND])
    by_sight = smaller(net, [BY_HAND], x)
    by_rule = smaller(net, [BY_HAND], rules={Heads: lambda layer, before: setattr(layer, "heads", 2)})
    for made in (by_sight, by_rule):
        assert made.heads == 2
        torch.testing.assert_close(made(x), net(x), rtol=1e-12, atol=1e-12)
    # The same shapes, and other heads: half of the features of each.
    narrow = {"qkv.weight": fr.Along(0, 1, 12), "qkv.bias": fr.Along(0, 1, 12), "out.weight": fr.Along(1, 1, 4)}
    net = built(Heads, [narrow])
    made = smaller(net, [narrow], {"x": x})
    assert made.heads == 4
    torch.testing.assert_close(made(x), net(x), rtol=1e-12, atol=1e-12)


# Numbers in modules


class Stored(nn.Module):
    """A module that uses a width, says one that it does not use, and has a number that is a width by chance."""

    def __init__(self, config=None):
        super().__init__()
        self.width, self.out_features, self.hidden_dim, self.times, self.config = 8, 2, 8, 8, config
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = self.first(x).reshape(-1, self.width if self.config is None else self.config.width).relu()
        return self.second(h)


class Masking(Stored):
    """One whose outputs are not all finite."""

    def forward(self, x):
        return super().forward(x).masked_fill(x[:, :2] > 0, -torch.inf)


UNITS = {"first.weight": 0, "first.bias": 0, "second.weight": 1}


class Config:
    def __init__(self):
        self.width, self.depth = 8, 8


def test_a_stored_width_that_nobody_knows_is_an_error_unless_outputs_show_it():
    net, x = built(Stored, [UNITS]), drawn(5, 3)
    with pytest.raises(ValueError, match=r"a Stored, stores width=8, .*Give example_inputs, .*rules=\{type:"):
        smaller(net, [UNITS])
    made = smaller(net, [UNITS], x)
    assert (made.width, made.hidden_dim, made.times, made.out_features) == (4, 4, 8, 2)  # By name where unused.
    torch.testing.assert_close(made(x), net(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        made.second.bias += 1
    with pytest.raises(
        ValueError, match=r"differs .* stores width=8, .* trained on since outputs tell nothing: save the"
    ):
        fr.resized(net, made.state_dict(), x)
    around = nn.Sequential(nn.Identity(), net)
    made = smaller(around, [{f"1.{name}": dim for name, dim in UNITS.items()}], (x,))
    assert made[1].width == 4


def test_a_number_that_scales_and_is_no_width_stays_as_outputs_show():
    class Scaled(Stored):
        def forward(self, x):
            return self.second(self.first(x).relu() * self.width**-0.5)

    net, x = built(Scaled, [UNITS]), drawn(5, 3)
    made = smaller(net, [UNITS], x)
    assert made.width == 8
    torch.testing.assert_close(made(x), net(x), rtol=1e-12, atol=1e-12)


def test_a_width_in_a_configuration_is_changed_in_a_copy_of_it():
    config = Config()
    net = nn.Sequential(*[built(lambda: Stored(config), [UNITS]) for _ in range(2)])[:1]
    families, x = [{f"0.{name}": dim for name, dim in UNITS.items()}], drawn(5, 3)
    with pytest.raises(ValueError, match=r"'0', a Stored, stores width=8, .*there are 1 more"):
        smaller(net, families)
    made = smaller(net, families, x)
    assert (made[0].config.width, made[0].config.depth, config.width) == (4, 8, 8)


def test_what_example_inputs_show_to_be_broken_is_an_error_that_says_where():
    class Wrong(Stored):
        def forward(self, x):
            return super().forward(x) * self.first.weight.shape[0]

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({"part": Stored()})

        def forward(self, x):
            return self.layers["part"](x.reshape(-1, 3))

    net, x = built(Wrong, [UNITS]), drawn(5, 3)
    with pytest.raises(ValueError, match=r"is not the module: output 0 of it differs .* by \d.*a Wrong, stores"):
        smaller(net, [UNITS], x)
    net = built(Fixed, [])
    part = {f"layers.part.{name}": dim for name, dim in UNITS.items()}
    halve(net, [part])
    with pytest.raises(ValueError, match=r"fails on example_inputs: in 'layers.part', a Stored: RuntimeError"):
        smaller(net, [part], x, rules={Stored: lambda layer, before: None})
    with pytest.raises(ValueError, match=r"module itself fails on example_inputs: in 'layers.part.first', a Linear"):
        smaller(net, [part], (x.float(),))
    with pytest.raises(ValueError, match=r"itself fails on example_inputs: in its own forward: TypeError: .*forw"):
        smaller(net, [part], ())
    masked = built(Masking, [UNITS])
    torch.testing.assert_close(smaller(masked, [UNITS], x)(x), masked(x), rtol=1e-12, atol=1e-12)
    unread = built(around(lambda: nn.Linear(3, 4), lambda: nn.Linear(4, 2)), [])
    cut = {name: w.detach()[..., :2] if name == "1.weight" else w.detach()[:2] for name, w in unread.named_parameters()}
    with pytest.raises(ValueError, match=r"is not the module: output 0 of it differs .*Does the module hold the zeros"):
        fr.resized(unread, cut, x)


@pytest.mark.parametrize(
    ("bare", "size", "message"),
    [
        (lambda: nn.GroupNorm(4, 8, affine=False), 2, r"'1', a GroupNorm, stores num_groups=4"),
        (lambda: nn.ChannelShuffle(2), 4, r"'1', a ChannelShuffle, stores groups=2"),
    ],
)
def test_layers_without_parameters_that_divide_channels_are_numbers_too(bare, size, message):
    channels = {"0.weight": fr.Along(0, size), "2.weight": kept(1, size)}
    if size == 4:  # A channel of each half goes, and those between which it is shuffled.
        channels = {"0.weight": fr.Along(0, packed=2), "2.weight": kept(1, size=2)}
    net = built(lambda: Alone(nn.Conv1d(3, 8, 1, bias=False), bare(), nn.Conv1d(8, 2, 1)), [channels])
    with pytest.raises(ValueError, match=message):
        smaller(net, [channels])
    made, x = smaller(net, [channels], drawn(2, 3, 5)), drawn(2, 3, 5)
    torch.testing.assert_close(made(x), net(x), rtol=1e-12, atol=1e-12)


class Alone(nn.ModuleList):
    """Layers in sequence with a forward of their own."""

    def __init__(self, *layers):
        super().__init__(layers)

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


def test_rules_are_functions_for_types_that_the_module_has():
    net, tree = nn.Sequential(nn.Linear(2, 3)), {"0.weight": torch.ones(3, 2)}
    with pytest.raises(ValueError, match="rules has one for Conv2d, and the module has no such layer"):
        fr.resized(net, tree, rules={nn.Conv2d: lambda layer, before: None})
    for wrong in ({"Linear": print}, {nn.Linear: 3}):
        with pytest.raises(TypeError, match="expected a type of module and a function"):
            fr.resized(net, tree, rules=wrong)


def test_an_unflattening_is_a_number_too():
    channels = {"0.weight": fr.Along(0, 4), "0.bias": fr.Along(0, 4), "2.weight": kept(1)}
    net = built(lambda: Alone(nn.Linear(3, 32), nn.Unflatten(1, (8, 2, 2)), nn.Conv2d(8, 2, 1)), [channels])
    with pytest.raises(ValueError, match=r"'1', an Unflatten, stores unflattened_size=\(8, 2, 2\)"):
        smaller(net, [channels])
    made, x = smaller(net, [channels], drawn(2, 3)), drawn(2, 3)
    assert made[1].unflattened_size == (4, 2, 2)
    torch.testing.assert_close(made(x), net(x), rtol=1e-12, atol=1e-12)


def test_tensors_beside_the_parameters_are_numbers_too():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)
            self.factor = torch.full((8,), 2.0)

        def forward(self, x):
            return self.second(self.first(x) * self.factor)

    net = built(Masked, [UNITS])
    with pytest.raises(ValueError, match=r"stores factor=a tensor of shape \(8,\)"):
        smaller(net, [UNITS])

    def rule(layer, before):
        layer.factor = before.factor[: layer.first.out_features]

    made = smaller(net, [UNITS], drawn(5, 3), rules={Masked: rule})
    assert made.factor.shape == (4,)


# What stays


def test_ties_hooks_modes_and_gradients_stay():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.up = nn.Embedding(7, 4), nn.Linear(4, 6)
            self.down, self.head = nn.Linear(6, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight
            self.note = {"about": [1, 2]}

        def forward(self, x):
            return self.head(self.down(self.up(self.embedding(x)).relu()))

    units = {"up.weight": 0, "up.bias": 0, "down.weight": 1}
    net = built(Tied, [units])
    net.down.requires_grad_(False)
    net.up.train()
    calls = []
    net.up.register_forward_hook(lambda *_: calls.append(1))
    made = smaller(net, [units])
    assert made.head.weight is made.embedding.weight
    assert made.note == net.note
    assert made.note is not net.note
    assert [w.requires_grad for w in made.parameters()] == [w.requires_grad for w in net.parameters()]
    assert [layer.training for layer in made.modules()] == [layer.training for layer in net.modules()]
    made(torch.ones(2, dtype=torch.long, device=DEVICE))
    assert calls == [1]
    read = fr.resized(net, made.state_dict())  # Which has the tied weight under both of its names.
    assert read.head.weight is read.embedding.weight
    with pytest.raises(ValueError, match=r"'head.weight' and 'embedding.weight' are one tensor .* given two"):
        fr.resized(net, {"embedding.weight": torch.ones(7, 4), "head.weight": torch.zeros(7, 4)})


def test_a_tied_weight_becomes_narrower_under_both_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    features = {"embedding.weight": 1}
    net = built(Tied, [features])
    made, x = smaller(net, [features]), torch.arange(7, device=DEVICE)
    assert made.head.weight is made.embedding.weight
    assert (made.head.in_features, made.embedding.embedding_dim) == (3, 3)
    torch.testing.assert_close(made(x), net(x), rtol=1e-12, atol=1e-12)


def test_dtypes_are_those_of_the_tree():
    net = halve(nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2)).bfloat16(), [])
    tree = {"0.weight": torch.ones(4, 3, dtype=torch.bfloat16), "0.bias": torch.ones(4, dtype=torch.bfloat16)}
    made = fr.resized(net, {**tree, "1.weight": torch.ones(2, 4, dtype=torch.bfloat16)})
    assert {w.dtype for w in made.parameters()} == {torch.bfloat16}


@every_layer
def test_a_smaller_network_trains_and_is_saved(make, shape, families):
    net, x = built(make, families), inputs(shape)
    made = smaller(net, families)
    result(made(x)).square().sum().backward()
    torch.optim.SGD(made.parameters(), lr=1e-3).step()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in made.parameters())
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    for other in (fr.resized(net, torch.load(file)), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(x), made(x))


# Refusals


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_module_compiled_by_torch_jit_is_refused():
    with pytest.raises(TypeError, match=r"module is compiled by torch\.jit; expected the module that it was"):
        fr.resized(torch.jit.trace(nn.Linear(2, 3), torch.ones(1, 2)), {"weight": torch.ones(2, 2)})
    net = nn.Sequential(torch.jit.trace(nn.Linear(2, 3), torch.ones(1, 2)), nn.Linear(3, 2))
    with pytest.raises(
        TypeError, match=r"'0' in the module is compiled by torch\.jit; expected the module that it was"
    ):
        fr.resized(net, {"1.bias": torch.ones(2)})


@pytest.mark.parametrize("given", [3, torch.ones(2), nn.Linear(2, 3)])
def test_what_is_no_tree_of_tensors_is_refused_by_its_type(given):
    with pytest.raises(TypeError, match=rf"params is an? {type(given).__name__}; expected a tree of parameters"):
        fr.resized(nn.Linear(2, 3), given)


def test_parametrized_and_pruned_weights_do_not_change_their_shape():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"'0.parametrizations.weight.original1' .* a weight is computed from it"):
        fr.resized(nn.Sequential(normed), {"0.parametrizations.weight.original1": torch.ones(2, 2)})
    pruned = nn.utils.prune.identity(nn.Linear(2, 3), "weight")
    with pytest.raises(ValueError, match=r"'0.weight_mask' .* a weight is computed from it; .*prune.remove"):
        fr.resized(nn.Sequential(pruned), {"0.weight_orig": torch.ones(2, 2), "0.weight_mask": torch.ones(2, 2)})


class Configured(nn.Linear):
    """A layer that is copied from its numbers, as those of Keras are."""

    def __reduce__(self):
        return type(self), (self.in_features, self.out_features)


def test_a_layer_that_copies_itself_from_its_numbers_is_an_error_that_says_so():
    net = nn.Sequential(Configured(4, 3), nn.ReLU(), nn.Linear(3, 2))
    groups = fr.channel_groups(net, (torch.ones(2, 4),))
    assert "fails to be copied: a copy of Sequential has not the '0." in groups.explain()
    alive = torch.tensor([0.0, 1.0, 1.0])  # The first of three units is zero.
    tree = {"0.weight": alive[:, None] * torch.ones(3, 4), "0.bias": alive, "2.weight": alive * torch.ones(2, 3)}
    for params in (tree, fr.remove_dead(tree, groups)):  # What is given would be lost, whatever its shape.
        with pytest.raises(ValueError, match=r"a copy of Sequential has not the '0\.\w+' that it was given: a layer"):
            fr.resized(net, params)


@pytest.mark.parametrize(
    ("layer", "tree", "message"),
    [
        (nn.GroupNorm(2, 8), {"weight": torch.ones(6), "bias": torch.ones(6)}, "a GroupNorm of 2 groups of 4 channels"),
        (nn.GroupNorm(2, 8), {"weight": torch.ones(4)}, "the bias of '' has 8 entries, and its weight gives 4"),
        (nn.LayerNorm(8), {"weight": torch.ones(4)}, "the weight and the bias of '' have 4 and 8 entries"),
        (nn.InstanceNorm1d(4, affine=True), {"weight": torch.ones(2)}, "another width for some of .* of ''"),
        (nn.Embedding(8, 2, padding_idx=7), {"weight": torch.ones(5, 2)}, "has padding_idx=7 and 5 rows left"),
        (nn.Bilinear(2, 3, 4), {"weight": torch.ones(2, 2, 3)}, "the bias of '' has 4 entries, and its weight gives 2"),
        (nn.Linear(2, 3), {"weight": torch.ones(6)}, "resized got 1 dimensions for 'weight'; the module has 2"),
    ],
)
def test_parameters_of_no_such_layer_are_errors(layer, tree, message):
    with pytest.raises(ValueError, match=message):
        fr.resized(layer, tree)


def test_normalizations_of_rows_and_bilinear_layers_follow_their_parameters():
    for layer in (nn.LayerNorm(8), nn.RMSNorm(8)):
        made = fr.resized(layer, {name: torch.ones(5) for name, _ in layer.named_parameters()})
        assert made.normalized_shape == (5,)
        made(torch.ones(2, 5))
    made = fr.resized(nn.Bilinear(4, 5, 6), {"weight": torch.ones(3, 2, 1), "bias": torch.ones(3)})
    assert made(torch.ones(7, 2), torch.ones(7, 1)).shape == (7, 3)
    made = fr.resized(nn.GroupNorm(1, 8), {"weight": torch.ones(5), "bias": torch.ones(5)})
    assert (made.num_groups, made.num_channels) == (1, 5)


@pytest.mark.slow
def test_a_narrow_attention_is_exported_and_compiled():
    families = [attention_heads("self_attn", 2), {"linear1.weight": 0, "linear1.bias": 0, "linear2.weight": 1}]
    net = built(lambda: nn.TransformerEncoderLayer(8, 4, 12, batch_first=True), families)
    made, x = smaller(net, families), drawn(2, 5, 8)
    expected = net(x)
    exported = torch.export.export(made, (x,)).module()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    for run in (exported, compiled):
        torch.testing.assert_close(run(x), expected, rtol=1e-11, atol=1e-12)


class _Drawing(nn.Module):
    """A network with dropout that stays on, and a number that is its width."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.wide = nn.Linear(5, 8), nn.Linear(8, 3), 8

    def forward(self, x):
        return self.b(F.dropout(self.a(x).relu(), 0.5, training=True).reshape(-1, self.wide))


def test_a_network_that_draws_other_numbers_where_it_is_narrower_is_not_compared():
    family = {"a.weight": 0, "a.bias": 0, "b.weight": 1}
    net = built(_Drawing, [family])
    with pytest.raises(
        ValueError, match=r"depend on random numbers: output 0 .* no example_inputs, and rules, for '', a"
    ):
        smaller(net, [family], drawn(6, 5))
    assert smaller(net, [family], rules={_Drawing: lambda new, _: setattr(new, "wide", new.a.out_features)}).wide == 4


class Blur(nn.Module):
    """A filter for each channel, which a `state_dict` leaves out."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("filters", torch.full((channels, 1, 3, 3), 1 / 9), persistent=False)

    def forward(self, x):
        return F.conv2d(x, self.filters, groups=len(self.filters))


def test_buffers_that_a_state_dict_leaves_out_are_told():
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), Blur(16), nn.Flatten(), nn.Linear(64, 3)).to(DEVICE).double()
    x = drawn(2, 1, 6, 6)
    groups = fr.channel_groups(net, (x,))
    made = smaller(halve(net, groups), groups, x)
    assert made[2].filters.shape == (8, 1, 3, 3)
    with pytest.warns(UserWarning, match=r"was given no 2\.filters, with dimensions as wide .*with_buffers\(smaller\)"):
        fr.resized(net, made.state_dict())
    assert torch.equal(fr.resized(net, fr.with_buffers(made))(x), made(x))
