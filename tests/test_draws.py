"""Random numbers of members: right in distribution, the same alone, among others, and in compiled code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE
from torch import Tensor, nn, tensor
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

from funcreg.core import undocumented
from funcreg.training.draws import Draws

ONES = torch.ones(200, 500)


def drawn(function, key=3, step=7):
    with Draws(tensor(key), tensor(step)):
        return function()


#: What draws, and the mean and deviation of what comes of it.
DRAWN = {
    "rand": (lambda: torch.rand(200, 500), 0.5, 12**-0.5),
    "rand_like": (lambda: torch.rand_like(ONES, dtype=torch.float64), 0.5, 12**-0.5),
    "randn": (lambda: torch.randn(200, 500), 0.0, 1.0),
    "randn_like": (lambda: torch.randn_like(ONES.double()), 0.0, 1.0),
    "randint": (lambda: torch.randint(-2, 8, (200, 500)), 2.5, 8.25**0.5),
    "dropout": (lambda: F.dropout(ONES, 0.3), 1.0, (3 / 7) ** 0.5),
    "dropout of all": (lambda: F.dropout(ONES, 1.0), 0.0, 0.0),
    "dropout1d": (lambda: F.dropout1d(ONES.reshape(5000, 20, 1), 0.3), 1.0, (3 / 7) ** 0.5),
    "dropout2d": (lambda: F.dropout2d(ONES.reshape(5000, 20, 1, 1), 0.3), 1.0, (3 / 7) ** 0.5),
    "dropout3d": (lambda: F.dropout3d(ONES.reshape(5000, 20, 1, 1, 1), 0.3), 1.0, (3 / 7) ** 0.5),
    "alpha_dropout": (lambda: F.alpha_dropout(torch.randn(200, 500), 0.3, True), 0.0, 1.0),
    "feature_alpha_dropout": (lambda: F.feature_alpha_dropout(torch.randn(5000, 20, 1), 0.3, True), 0.0, 1.0),
    "dropout of a rate in a tensor": (lambda: F.dropout(ONES, tensor(0.3)), 1.0, (3 / 7) ** 0.5),
    "randint by name": (lambda: torch.randint(8, size=(200, 500)), 3.5, 5.25**0.5),
    "randint_like": (lambda: torch.randint_like(ONES, -2, 8), 2.5, 8.25**0.5),
    "randperm": (lambda: torch.randperm(100000), 49999.5, 100000 * 12**-0.5),
    "normal": (lambda: torch.normal(2.0, 3.0, (200, 500), dtype=torch.float64), 2.0, 3.0),
    "normal of tensors": (lambda: torch.normal(2 * ONES, torch.full((500,), 3.0)), 2.0, 3.0),
    "normal of a deviation": (lambda: torch.normal(2.0, 3 * ONES), 2.0, 3.0),
    "bernoulli": (lambda: torch.bernoulli(0.3 * ONES), 0.3, 0.21**0.5),
    "bernoulli of one number": (lambda: ONES.double().bernoulli(0.3), 0.3, 0.21**0.5),
    "multinomial": (lambda: torch.multinomial(tensor([1.0, 0.0, 3.0]).expand(100000, 3), 1), 1.5, 0.75**0.5),
    "multinomial of several": (lambda: torch.multinomial(tensor([1.0, 0.0, 3.0]).expand(50000, 3), 2), 1.0, 1.0),
    "rrelu": (lambda: F.rrelu(-ONES, 0.1, 0.3, True), -0.2, 0.2 * 12**-0.5),
    "gumbel_softmax": (lambda: F.gumbel_softmax(ONES.reshape(-1, 2), 1e-6), 0.5, 0.5),
    "hard gumbel_softmax": (lambda: F.gumbel_softmax(ONES.reshape(-1, 4), hard=True), 0.25, 0.1875**0.5),
    "normal_": (lambda: torch.empty(200, 500).normal_(std=2.0), 0.0, 2.0),
    "log_normal_": (lambda: torch.empty(200, 500).log_normal_(0.0, 0.5), 1.13315, 0.60390),
    "uniform_": (lambda: torch.empty(200, 500, dtype=torch.float64).uniform_(-1, to=1), 0.0, 3**-0.5),
    "uniform_ by name": (lambda: torch.empty(200, 500).uniform_(**{"from": 1, "to": 2}), 1.5, 12**-0.5),
    "bernoulli_": (lambda: torch.empty(200, 500).bernoulli_(0.3), 0.3, 0.21**0.5),
    "bernoulli_ of bools": (lambda: torch.empty(200, 500, dtype=torch.bool).bernoulli_(0.3 * ONES), 0.3, 0.21**0.5),
    "exponential_": (lambda: torch.empty(200, 500).exponential_(2.0), 0.5, 0.5),
    "geometric_": (lambda: torch.empty(200, 500).geometric_(0.4), 2.5, 0.6**0.5 / 0.4),
    "geometric_ of a tensor": (lambda: torch.empty(200, 500).geometric_(tensor(0.4)), 2.5, 0.6**0.5 / 0.4),
    "cauchy_": (lambda: torch.empty(200, 500).cauchy_(2.0, 3.0).clamp(-1, 5), 2.0, 3 * (2 / math.pi) ** 0.5),
    "random_": (lambda: torch.empty(200, 500).random_(-2, 8), 2.5, 8.25**0.5),
    "nn.init.normal_": (lambda: nn.init.normal_(torch.empty(200, 500), std=2.0), 0.0, 2.0),
    "nn.init.uniform_": (lambda: nn.init.uniform_(torch.empty(200, 500), -1.0, b=1.0), 0.0, 3**-0.5),
    "kaiming_uniform_": (lambda: nn.init.kaiming_uniform_(torch.empty(200, 500)), 0.0, (2 / 500) ** 0.5),
    "xavier_uniform_": (lambda: nn.init.xavier_uniform_(torch.empty(200, 500)), 0.0, (2 / 700) ** 0.5),
    "distribution": (lambda: torch.distributions.Laplace(ONES, 0.5).rsample(), 1.0, 0.5**0.5),
}
every = pytest.mark.parametrize(("function", "mean", "deviation"), DRAWN.values(), ids=DRAWN)


@every
def test_what_is_drawn_has_the_mean_and_the_deviation_of_what_torch_draws(function, mean, deviation):
    for found in (drawn(function), function()):  # The second is torch's own.
        assert float(found.double().mean()) == pytest.approx(mean, abs=6 * max(deviation, 1e-9) / math.sqrt(1e5))
        assert float(found.double().std()) == pytest.approx(deviation, rel=0.03, abs=1e-9)


@every
def test_what_is_drawn_follows_from_key_and_step_alone(function, mean, deviation):
    before = torch.get_rng_state()
    first = drawn(function)
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(drawn(function), first, rtol=0, atol=0)
    assert not deviation or not any(torch.equal(drawn(function, *at), first) for at in ((4, 7), (3, 8)))
    assert (first.shape, first.dtype) == ((other := function()).shape, other.dtype)
    assert not deviation or not torch.equal(*drawn(lambda: (function(), function())))


KINDS = {"1d": (F.dropout1d, (40, 30, 6)), "2d": (F.dropout2d, (40, 30, 6, 2)), "3d": (F.dropout3d, (40, 30, 6, 2, 2))}


@pytest.mark.parametrize(("function", "shape"), KINDS.values(), ids=KINDS)
def test_channels_are_dropped_as_wholes(function, shape):
    rows = drawn(lambda: function(torch.ones(shape), 0.3)).flatten(2)
    assert bool((rows == rows[..., :1]).all())
    assert rows.unique().tolist() == pytest.approx([0.0, 1 / 0.7])


@pytest.mark.parametrize("p", [0.2, 1.0])
def test_dropout_has_the_gradient_of_what_it_keeps(p):
    x = torch.rand(50, 40, dtype=torch.float64) + 1
    found = drawn(lambda: grad(lambda x: F.dropout(x, p).sum())(x))
    assert_close(found, drawn(lambda: F.dropout(x, p)) / x)
    y = x.clone()
    assert drawn(lambda: F.dropout(y, p, inplace=True)) is y
    assert_close(y, drawn(lambda: F.dropout(x, p)))


DROPOUTS = [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout]


@pytest.mark.parametrize("function", DROPOUTS)
@pytest.mark.parametrize("p", [0.0, 1e-3, 0.3, 1.0])
def test_a_rate_in_a_tensor_drops_what_that_number_does(function, p):
    x = torch.randn(20, 30, 4, *[2] * {F.dropout1d: 0, F.dropout2d: 1}.get(function, 2), dtype=torch.float64)
    expected = drawn(lambda: function(x, p, True))
    rates = tensor([0.5, p], dtype=torch.float64)
    assert_close(drawn(lambda: function(x, rates[1], True)), expected, rtol=1e-12, atol=0)

    def member(rate, key):
        with Draws(key, tensor(7)):
            return function(x, rate, True)

    assert_close(vmap(member)(rates, tensor([3, 3]))[1], expected, rtol=1e-12, atol=0)
    assert_close(drawn(lambda: function(x, rates[1], False)), x, rtol=0, atol=0)


def test_a_rate_that_is_no_share_is_an_error_where_it_can_be_read_and_no_number_elsewhere():
    with pytest.raises(ValueError, match="has to be between 0 and 1"):
        drawn(lambda: F.dropout(ONES, tensor(1.5)))
    found = vmap(lambda rate: drawn(lambda: F.dropout(ONES, rate)))(tensor([-0.5, 0.5, 1.5]))
    assert found.isnan().flatten(1).all(1).tolist() == [True, False, True]


def test_what_comes_after_a_dropout_does_not_depend_on_its_rate():
    after = lambda p: drawn(lambda: (F.dropout(ONES, p), torch.rand(5)))[1]
    assert all(torch.equal(after(p), after(0.5)) for p in (0.0, 1.0, tensor(0.0)))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_attention_takes_a_rate_in_a_tensor(p):
    q, layer = torch.randn(2, 3, 5, 8), nn.MultiheadAttention(8, 2)
    attend = lambda p: drawn(lambda: F.scaled_dot_product_attention(q, q, q, dropout_p=p))
    assert_close(attend(tensor(p)), attend(p))

    def heads(p):
        layer.dropout = p
        return drawn(lambda: layer(q[0], q[0], q[0])[0])

    assert_close(heads(tensor(p)), heads(p))


@pytest.mark.parametrize("call", [lambda x: F.dropout(x, 0.5, False), lambda x: F.dropout(x, 0.0), lambda x: x.cos()])
def test_what_draws_nothing_is_torchs(call):
    assert torch.equal(drawn(lambda: call(ONES)), call(ONES))


def test_what_has_a_generator_of_its_own_draws_from_it():
    own = lambda: torch.Generator(DEVICE).manual_seed(1)
    call = lambda: torch.rand(3, generator=own(), device=DEVICE)
    assert torch.equal(drawn(call), call())
    # But for a key: that of members follows from the seed of the generator and from their own.
    key = lambda seed: torch.randint(
        -(2**63), 2**63 - 1, (), generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE
    )
    assert len({int(drawn(lambda seed=seed: key(seed), at)) for seed in (0, 1) for at in (0, 1)}) == 4


@pytest.mark.slow
@every
def test_compiled_code_draws_the_same_or_is_known_not_to(function, mean, deviation):
    context = Draws(tensor(3), tensor(7))
    with context:
        found = function()

    def again(key: Tensor, step: Tensor) -> Tensor:
        with Draws(key, step):
            return function()

    if not context.not_compiled():
        compiled = torch.compile(again, fullgraph=True, backend="eager")
        assert_close(compiled(tensor(3), tensor(7)), found, rtol=0, atol=0)


def test_inside_a_map_of_the_users_each_row_draws_its_own_by_torch():
    rows = torch.ones(6, 50)
    many = vmap(lambda x: F.dropout(x, 0.5), randomness="different")
    context = Draws(tensor(3), tensor(7))
    with context:
        found = many(rows)
    assert len(found.unique(dim=0)) == 6
    assert context.not_compiled() == ["dropout"]
    with Draws(tensor(3), tensor(7)), pytest.raises(RuntimeError, match="random"):
        vmap(lambda x: F.dropout(x, 0.5))(rows)


def test_without_a_count_of_maps_members_draw_the_same_alone_and_among_others(monkeypatch):
    def loss(key: Tensor) -> Tensor:
        with Draws(key, tensor(7)):
            return F.dropout(torch.ones(20), 0.5)

    keys = tensor([3, 4])
    expected = torch.stack([loss(key) for key in keys])
    monkeypatch.delattr("torch._functorch.pyfunctorch.retrieve_all_functorch_interpreters")
    assert undocumented.count_maps() == 0
    assert torch.equal(vmap(loss)(keys), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.poisson(torch.full((3,), 0.5)),
        lambda: torch.multinomial(torch.full((3,), 0.5), 9, replacement=True),
        lambda: torch.empty(3, dtype=torch.complex64).normal_(),
        lambda: torch.empty(3, dtype=torch.int64).random_(),
        lambda: F.rrelu(torch.linspace(-1, 1, 5)),
    ],
)
def test_what_else_torch_draws_is_torchs(call):
    torch.manual_seed(0)
    found = drawn(call)
    torch.manual_seed(0)
    assert torch.equal(found, call())


@pytest.mark.parametrize("make", [torch.empty, lambda n: ONES.new_empty(n), lambda n: torch.empty_like(ONES[0, :n])])
def test_new_memory_takes_what_a_member_draws(make):
    def noise(key: Tensor) -> Tensor:
        with Draws(key, tensor(7)):
            assert torch.empty(2, 2, layout=torch.sparse_coo).is_sparse
            return make(5).normal_()

    found = vmap(noise)(tensor([3, 4]))
    assert_close(found, torch.stack([noise(tensor(3)), noise(tensor(4))]), rtol=0, atol=0)
    assert not torch.equal(*found)
    make = torch.zeros
    with pytest.raises(RuntimeError, match="normal_ writes random numbers of each member into one tensor"):
        vmap(noise)(tensor([3, 4]))


TINY = 1e-12  # So rare that nothing is dropped: all else has to be torch's.
MASKS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bools": {"attn_mask": torch.ones(5, 5).tril().bool()},
    "numbers": {"attn_mask": torch.linspace(-3, 3, 25).reshape(5, 5)},
    "scale": {"scale": 0.3},
    "no scale": {"scale": 0.0},
    "what sees nothing": {"attn_mask": torch.ones(5, 5).tril(-1).bool()},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_attention_is_torchs_but_for_what_it_drops(options):
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    attend = lambda p: F.scaled_dot_product_attention(q, k, v, dropout_p=p, **options)
    assert_close(drawn(lambda: attend(TINY)), attend(0.0))
    means = torch.stack([drawn(lambda: attend(0.3), step=step) for step in range(1000)]).mean(0)
    assert_close(means, attend(0.0), rtol=0, atol=0.35)


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 7}, {"bias": False}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_heads_are_torchs_but_for_what_they_drop(options, needed, batched):
    attention = nn.MultiheadAttention(8, 2, dropout=TINY, **options)
    shape = (3, 3) if batched else (3,)
    given = [torch.randn(*shape, options.get(name, 8)) for name in ("", "kdim", "vdim")]
    call = lambda: attention(*given, need_weights=needed)
    found = drawn(call)
    attention.dropout = 0.0
    assert_close(found, call())
    attention.dropout = 0.4
    first, again, other = drawn(call), drawn(call), drawn(call, step=8)
    assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[0], other[0])


def test_members_draw_what_they_draw_alone_in_eager_and_compiled_code():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True)
    module = nn.Sequential(layer, nn.AlphaDropout(0.1), nn.Flatten(), nn.Unflatten(-1, (5, 8)))
    x = torch.randn(3, 5, 8)

    def loss(params: dict[str, Tensor], key: Tensor, step: Tensor) -> Tensor:
        with Draws(key, step):
            return functional_call(module, params, (F.dropout(x, 0.2),)).square().sum()

    params = {name: w.detach().expand(3, *w.shape) for name, w in module.named_parameters()}
    keys, step = tensor([1, 2, 1]), tensor(4)
    mapped = vmap(grad(loss), in_dims=(0, 0, None))
    found = mapped(params, keys, step)
    for k, key in enumerate(keys):
        alone = grad(loss)({name: w[k] for name, w in params.items()}, key, step)
        assert_close({name: g[k] for name, g in found.items()}, alone, rtol=1e-4, atol=1e-4)
    assert not any(torch.equal(g[0], g[1]) for g in found.values())
    compiled = torch.compile(mapped, fullgraph=True, backend="eager")(params, keys, step)
    assert_close(compiled, found, rtol=1e-4, atol=1e-4)
