"""A sweep is a loop of trainings: stacks, grids, splits, members that stop, and what comes of it."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import sys
import threading
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, draw, normal
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import KFold
from torch import nn, tensor
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import funcreg as fr


def data(rows=60, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = normal(generator, rows, 6, dtype=dtype)
    return x, (x[:, 0] + 0.5 * x[:, 1] > 0).long()


def plain():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def normed():
    # No bias where BatchNorm takes it away: Adam would enlarge the rounding of its gradient, which is zero.
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def accuracy(outputs, y):
    return (outputs.argmax(-1) == y).double().mean()


def prox(lr, strength):
    return fr.prox_adam(lr, fr.l1, strength=strength, mask=fr.matrices)


GRID = {"lr": [0.01, 0.1], "strength": [0.0, 0.03]}


# Stacks


@pytest.mark.parametrize("tree", [draw(), fr.adam(0.1).init(draw()), torch.ones(2)], ids=["params", "state", "leaf"])
def test_unstack_is_the_inverse_of_stack(tree):
    trees = [fr.tree_map(lambda w, k=k: w + k, tree) for k in range(3)]
    assert_close(fr.unstack(fr.stack(trees)), trees, rtol=0, atol=0)


def test_stack_of_modules_is_that_of_torch():
    modules = [normed() for _ in range(3)]
    params, buffers = found = fr.stack(modules)
    assert isinstance(found, fr.Members)
    expected = torch.func.stack_module_state(modules)
    assert_close((params, buffers), tuple(expected), rtol=0, atol=0)
    assert not any(w.requires_grad for w in params.values())


def test_replicas_share_no_memory():
    module = normed()
    members = fr.replicate(module, 3)
    members.params["0.weight"][0].zero_()
    assert_close(members.params["0.weight"][2], module[0].weight.detach())
    assert bool((module[0].weight != 0).any())


def test_numbers_of_members_may_be_numpys():
    assert len(fr.replicate(torch.ones(2), np.int64(3))) == 3
    assert len(fr.init_ensemble(lambda: torch.randn(2), np.int64(3))) == 3
    assert len(fr.init_ensemble(lambda: torch.randn(2), np.arange(3))) == 3


def test_members_of_seeds_are_those_of_the_seeds_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    eight, two = fr.init_ensemble(normed, 8), fr.init_ensemble(normed, [5, 2])
    assert torch.equal(torch.get_rng_state(), before)
    for at, seed in enumerate((5, 2)):
        assert_close(two.params["0.weight"][at], eight.params["0.weight"][seed], rtol=0, atol=0)
        torch.manual_seed(seed)
        assert_close(two.params["0.weight"][at], normed()[0].weight.detach(), rtol=0, atol=0)
    trees = fr.init_ensemble(lambda: {"w": torch.randn(3)}, 2)
    assert trees["w"].shape == (2, 3)


def test_a_member_loads_into_a_module_with_its_buffers():
    members, x = fr.init_ensemble(normed, 3), data()[0]

    def forward(params, buffers):
        buffers = {name: b.clone() for name, b in buffers.items()}
        own = {**params, **buffers}
        return functional_call(members_module, own, (x,)), {name: own[name] for name in buffers}

    members_module = normed()
    outputs, buffers = vmap(forward)(*members)
    params, own = fr.unstack(members._replace(buffers=buffers))[1]
    alone = normed()
    alone.load_state_dict({**params, **{name: b[1] for name, b in members.buffers.items()}})
    assert_close(alone(x).detach(), outputs[1])
    assert_close(dict(alone.named_buffers()), own)


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: fr.stack([]), ValueError, "no members"),
        (lambda: fr.stack(plain()), TypeError, "Sequential; expected a list of members"),
        (lambda: fr.stack([{"w": torch.ones(2)}, {"w": torch.ones(3)}]), ValueError, r"'w' of member 1 is of \(3,\)"),
        (
            lambda: fr.stack([{"w": torch.ones(2)}, {"v": torch.ones(2)}]),
            ValueError,
            "member 1 does not match member 0",
        ),
        (lambda: fr.stack([{"w": 1.0}]), ValueError, "member 0 has a float at 'w'"),
        (lambda: fr.stack([nn.LazyLinear(2)]), ValueError, "has no shape yet"),
        (lambda: fr.unstack({"a": torch.ones(2), "b": torch.ones(3)}), ValueError, "2 at 'a', 3 at 'b'"),
        (lambda: fr.unstack({"a": torch.ones(())}), ValueError, "None at 'a'"),
        (lambda: fr.replicate(plain(), 0), ValueError, "members is 0"),
        (lambda: fr.init_ensemble(plain(), 3), TypeError, "replicate stacks copies"),
        (lambda: fr.init_ensemble(plain, 2.0), TypeError, "seeds is 2.0; expected a number of seeds"),
        (lambda: fr.init_ensemble(plain, []), ValueError, "expected at least one"),
        (lambda: fr.matrices(fr.replicate(plain(), 3).params), ValueError, r"'0.bias' of shape .*stacked\(matrices\)"),
    ],
)
def test_stacks_refuse_what_does_not_stack(call, kind, said):
    with pytest.raises(kind, match=said):
        call()


MASKS = [
    fr.matrices,
    ~fr.matrices,
    fr.matrices & fr.select("*2*"),
    {"0.weight": True, "0.bias": False, "2.weight": True, "2.bias": False},
]


@pytest.mark.parametrize("mask", MASKS, ids=["matrices", "others", "one", "tree"])
def test_a_mask_for_one_member_holds_for_stacks(mask):
    members = fr.init_ensemble(plain, 3).params
    each = vmap(lambda params: fr.l1(params, mask=mask))(members)
    assert_close(fr.l1(members, mask=fr.stacked(mask)), each.sum())
    assert fr.stacked(mask)(members) == fr.stacked(mask)(fr.stack([plain()]).params)


def test_the_mask_of_stacks_prints_as_written():
    assert repr(~fr.stacked(fr.matrices)) == "~stacked(matrices)"


# One run is a loop


def by_hand(module, optimizer, x, y, steps, shrink=lambda module: None):
    """What everybody writes: full batches, one model."""
    module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            shrink(module)
    return module.eval()


@pytest.mark.parametrize("make_module", [plain, normed])
def test_members_are_what_a_loop_with_a_torch_optimizer_trains(make_module):
    (x, y), held = data(40), data(30, seed=1)
    grid = {"lr": [0.01, 0.1], "decay": [0.0, 0.5]}
    result = fr.sweep(
        lambda: make_module().double(),
        F.cross_entropy,
        lambda lr, decay: fr.adamw(lr, weight_decay=decay),
        grid,
        (x.double(), y),
        epochs=6,
        batch_size=64,
        validation=(held[0].double(), held[1]),
        seeds=2,
        score=accuracy,
    )
    assert [(row["lr"], row["decay"], row["seed"]) for row in result.rows[:5]] == [
        (0.01, 0.0, 0), (0.01, 0.0, 1), (0.01, 0.5, 0), (0.01, 0.5, 1), (0.1, 0.0, 0)
    ]  # fmt: skip
    for k, row in enumerate(result.rows):
        torch.manual_seed(row["seed"])
        module = make_module().double()
        optimizer = torch.optim.AdamW(module.parameters(), row["lr"], weight_decay=row["decay"])
        module = by_hand(module, optimizer, x.double(), y, 6)
        assert_close(result.member(k), module.state_dict(), rtol=1e-7, atol=1e-9)
        outputs = module(held[0].double()).detach()
        assert row["loss"] == pytest.approx(float(F.cross_entropy(outputs, held[1])), rel=1e-6)
        assert row["score"] == pytest.approx(float(accuracy(outputs, held[1])))
        assert (row["epoch"], row["epochs"], row["status"]) == (6, 6, "done")


OPTIONS = {
    "holdout": {},
    "folds": {"folds": 3},
    "patience": {"patience": 2},
    "patience of folds": {"patience": 1, "folds": 2},
    "chunks": {"chunk_size": 3},
    "compiled": {"compile": "eager", "chunk_size": 3, "patience": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_member_is_the_same_alone_and_among_others(options):
    """Minibatches, folds, early stopping and chunks: none of them lets members see each other."""
    shared = dict(epochs=5, batch_size=16, **{name: x for name, x in options.items() if name in ("folds", "patience")})
    train = lambda grid, **kw: fr.sweep(normed, F.cross_entropy, prox, grid, data(), **shared, **kw)
    together = train(GRID, **{name: x for name, x in options.items() if name not in shared})
    for k in range(len(together)):
        alone = train([together.hyper(k)])
        fold = 0 if "folds" in options else None
        assert_close(together.member(k, fold), alone.member(0, fold), rtol=1e-4, atol=1e-5)
        for name in ("loss", "train_loss", "epoch", "epochs", "status"):
            expected = alone.rows[0][name]
            assert together.rows[k][name] == (pytest.approx(expected, rel=1e-4) if name.endswith("loss") else expected)


def test_a_tree_of_parameters_and_its_loss_train_alike():
    x, y = data(dtype=torch.float64)
    least = lambda params, x, y: (x @ params["w"] - y).square().mean()
    start = {"w": torch.zeros(6, dtype=torch.float64)}
    result = fr.sweep(
        start, least, lambda lr: fr.sgd(lr), {"lr": tensor([0.01, 0.1])}, (x, y), epochs=3, batch_size=60, validation=0
    )
    for k, lr in enumerate((0.01, 0.1)):
        w = start["w"]
        for _ in range(3):
            w = w - lr * grad(least)({"w": w}, x, y)["w"]
        assert_close(result.member(k), {"w": w})
    assert result.best["lr"] == pytest.approx(0.1)
    assert result.best["loss"] == result.best["train_loss"]


def test_folds_are_those_of_scikit_learn_if_they_are_given():
    x, y = data(30)
    folds = list(KFold(3, shuffle=True, random_state=0).split(x.cpu()))
    module = plain()
    loss = lambda params, rows: F.cross_entropy(functional_call(module, params, (x[rows],)), y[rows])
    result = fr.sweep(plain, F.cross_entropy, prox, [{"lr": 0.1, "strength": 0.0}], (x, y), epochs=4, folds=folds)
    for fold, (train, valid) in enumerate(folds):
        params, tx = fr.unstack(fr.init_ensemble(plain, [0]).params)[0], prox(0.1, 0.0)
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(grad(loss)(params, torch.as_tensor(train)), state, params)
            params = fr.apply_updates(params, updates)
        assert_close(result.member(fold=fold), params, rtol=1e-4, atol=1e-5)
        found = float(loss(params, torch.as_tensor(valid)))
        assert result.rows[0]["folds"][fold] == pytest.approx(found, rel=1e-4)
    assert result.rows[0]["loss"] == pytest.approx(np.mean(result.rows[0]["folds"]))
    assert result.rows[0]["loss_std"] == pytest.approx(np.std(result.rows[0]["folds"]))


def dropping():
    """A network that begins with the same weights whatever the seed, so that only what it draws tells members apart."""
    module = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    return module.load_state_dict({name: torch.full_like(w, 0.1) for name, w in module.state_dict().items()}) and module


def test_dropout_of_members_differs_and_is_repeatable():
    before = torch.get_rng_state()
    train = lambda **kw: fr.sweep(
        dropping, F.cross_entropy, fr.sgd, [{"learning_rate": 0.1}] * 2, data(), epochs=2, seeds=2, **kw
    )
    first, again = train(), train()
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(first.params, again.params, rtol=0, atol=0)
    assert not torch.equal(*first.params["0.weight"][:2])
    assert not torch.equal(train(seed=1).params["0.weight"], first.params["0.weight"])
    for name, w in first.params.items():  # Two equal configurations: what they draw follows from the seed alone.
        assert_close(w[:2], w[2:], rtol=0, atol=0, msg=name)


#: What torch warns of where it maps an LSTM or attention on a CPU.
SLOWLY = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def noisy(learning_rate, strength=0.1):
    return fr.chain(fr.prox_sgd(learning_rate, fr.l1, strength=0.01), fr.add_noise(strength, 0.55, key=7))


def variational(outputs, y):
    return F.cross_entropy(F.dropout(outputs, 0.3), y)


class Noisy(nn.Module):
    """What draws in place into new memory, as stochastic depth does, by a distribution, and an order."""

    def forward(self, h):
        kept = torch.empty(len(h), 1).bernoulli_(0.7)
        h = torch.distributions.Normal(h, F.softplus(h)).rsample()
        return F.rrelu(kept * h[torch.randperm(len(h))], training=self.training)


DRAWING = {
    "dropout": (dropping, F.cross_entropy, fr.adam),
    "noise of a chain": (plain, F.cross_entropy, noisy),
    "a loss that draws": (plain, variational, fr.sgd),
    "layers that draw": pytest.param(
        lambda: nn.Sequential(nn.Linear(6, 2), Noisy()), F.cross_entropy, fr.sgd,
        marks=pytest.mark.filterwarnings("ignore:sweep runs without a compiler, with equal results. there randperm"),
    ),
    "attention": (
        lambda: nn.Sequential(nn.Unflatten(-1, (3, 2)), nn.TransformerEncoderLayer(2, 1, 4, batch_first=True),
                              nn.Flatten(), nn.Linear(6, 2)),
        F.cross_entropy,
        fr.adam,
    ),
}  # fmt: skip
AMONG = {
    "others": {"seeds": [3, 5]},
    "chunks": {"seeds": [3, 5], "chunk_size": 1},
    "folds": {"seeds": [3, 5], "folds": 2},
    "compiled": pytest.param({"seeds": [3, 5], "compile": "eager"}, marks=pytest.mark.slow),
}


@SLOWLY
@pytest.mark.parametrize("options", AMONG.values(), ids=AMONG)
@pytest.mark.parametrize(("network", "loss", "make"), DRAWING.values(), ids=DRAWING)
def test_what_a_member_draws_follows_from_its_seed(network, loss, make, options):
    grid = [{"learning_rate": 0.02}, {"learning_rate": 0.1}]
    train = lambda grid, **kw: fr.sweep(network, loss, make, grid, data(), epochs=2, batch_size=16, **kw)
    found = train(grid, **options)
    alone = train(grid[1:], **{**options, "seeds": [5], "chunk_size": None, "compile": False})
    fold = 1 if "folds" in options else None
    assert_close(found.member(3, fold), alone.member(0, fold), rtol=1e-4, atol=1e-5)
    assert found.rows[3]["loss"] == pytest.approx(alone.rows[0]["loss"], rel=1e-4)
    assert found.rows[2]["loss"] != found.rows[3]["loss"]


def test_noise_of_a_chain_follows_from_its_key_too():
    train = lambda key: fr.sweep(plain, F.cross_entropy, lambda eta: fr.chain(fr.sgd(0.1), fr.add_noise(eta, 0.0, key)),
                                 {"eta": [0.0, 0.1, 0.2]}, data(), epochs=1, batch_size=48)  # fmt: skip
    first, other = train(0).params["0.weight"], train(1).params["0.weight"]
    assert_close((first[1] - first[0]) * 2**0.5, first[2] - first[0])
    assert torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])


def test_a_layer_that_reads_its_count_is_named():
    network = lambda: nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2, momentum=None))
    with pytest.raises(TypeError, match=r"'1' has momentum=None, .* expected a momentum"):
        fr.sweep(network, F.cross_entropy, fr.sgd, {"learning_rate": [0.1, 0.2]}, data(), epochs=1)


class Cooled(nn.Module):
    """A network whose forward has hyperparameters, and that has one itself."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(6, 5), nn.Linear(5, 2), 1.0

    def forward(self, x, rate=0.1, *, temperature=1.0):
        return self.scale * self.head(F.dropout(self.body(x).tanh(), rate, self.training)) / temperature


def dropping():
    return nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4), nn.AlphaDropout(), nn.Linear(4, 2)
    )


@pytest.mark.parametrize(
    ("network", "grid", "options"),
    [
        (dropping, {"lr": [0.05], "*.p": [0.0, 0.2, 1.0]}, {}),
        (dropping, {"lr": [0.05, 0.1], "2.p": [0.4, 0.2], "4.p": [0.1]}, {"folds": 2}),
        (Cooled, {"lr": [0.05], "rate": [0.0, 0.3], "temperature": [1.0, 2.0]}, {"score": accuracy}),
        (Cooled, {"lr": [0.05], "scale": [1.0, 2.0], "rate": [0.3]}, {"seeds": 2}),
        pytest.param(dropping, {"lr": [0.05], "*.p": [0.0, 0.2]}, {"compile": "eager"}, marks=pytest.mark.slow),
    ],
)
def test_hyperparameters_of_a_network_are_swept_and_each_member_is_that_of_its_own(network, grid, options):
    train = lambda grid, options: fr.sweep(network, F.cross_entropy, fr.adam, grid, data(), epochs=2, **options)
    named = lambda grid: {"learning_rate" if name == "lr" else name: values for name, values in grid.items()}
    found = train(named(grid), {"batch_size": 16, **options})
    fold = 1 if "folds" in options else None
    for k, row in enumerate(found.rows):
        same = {
            "batch_size": 16,
            **options,
            "compile": False,
            **({"seeds": [row["seed"]]} if "seeds" in options else {}),
        }
        alone = train([found.hyper(k)], same)
        assert row["loss"] == pytest.approx(alone.rows[0]["loss"], rel=1e-5)
        assert_close(found.member(k, fold), alone.member(0, fold), rtol=1e-5, atol=1e-6)
    assert len({row["loss"] for row in found.rows}) == len(found.rows)  # They make a difference.


def test_a_rate_is_that_of_a_network_made_with_it():
    given = lambda p: nn.Sequential(nn.Linear(6, 5), nn.Dropout(p), nn.Linear(5, 2))
    train = lambda p, grid: fr.sweep(
        lambda: given(p), F.cross_entropy, fr.sgd, grid, data(), epochs=2, batch_size=16
    ).member(-1)
    found = train(0.5, {"learning_rate": [0.1], "1.p": [0.9, 0.2]})
    assert_close(found, train(0.2, {"learning_rate": [0.1, 0.1]}), rtol=1e-5, atol=1e-6)


def test_hyperparameters_that_no_attribute_is_or_two_are_are_refused():
    train = lambda grid: fr.sweep(dropping, F.cross_entropy, fr.sgd, {"learning_rate": [0.1], **grid}, data(), epochs=1)
    with pytest.raises(TypeError, match=r"names '\*.q', which is in the grid, nor is it an attribute of the module"):
        train({"*.q": [0.1]})
    with pytest.raises(ValueError, match=r"'\*.p' and '2.p', which are both '2.p' of the module; expected one of them"):
        train({"*.p": [0.1], "2.p": [0.2]})
    with pytest.raises(TypeError, match=r"grid has the key '2.'; expected the name"):
        train({"2.": [0.1]})


def test_a_compiled_loss_is_refused(monkeypatch):
    compiled = torch.compile(F.cross_entropy, backend="eager")
    with pytest.raises(TypeError, match=r"was made by torch.compile; give the plain one. compile=True compiles the wh"):
        fr.sweep(plain, compiled, fr.sgd, {"learning_rate": [0.1, 0.2]}, data(), epochs=1)
    monkeypatch.setattr("funcreg.training.trained.CALLS_COMPILED", "another name")
    with pytest.raises(TypeError, match="model and loss run for one member, but not for all at once under vmap"):
        fr.sweep(plain, compiled, fr.sgd, {"learning_rate": [0.1, 0.2]}, data(), epochs=1)


def test_a_hyperparameter_that_nothing_takes_is_told():
    scaled = lambda outputs, y, temperature, slope: F.cross_entropy(outputs / temperature, y)
    grid = {"learning_rate": [0.1], "0.in_features": [6, 7], "temperature": [1.0, 2.0], "slope": [0.1, 0.2]}
    with pytest.warns(UserWarning, match=r"takes slope, 0.in_features, which the grid has: members .* are alike"):
        fr.sweep(plain, scaled, fr.sgd, grid, data(), epochs=1)


def test_a_hyperparameter_that_the_factory_leaves_out_is_told():
    grid = {"lr": [0.1, 0.2], "strength": [0.0, 0.1]}
    with pytest.warns(UserWarning, match=r"makes prox_sgd\(0.1, l1, .*nothing of lr, which the grid has: members"):
        fr.sweep(
            plain,
            F.cross_entropy,
            lambda lr, strength: fr.prox_sgd(0.1, fr.l1, strength=strength),
            grid,
            data(),
            epochs=1,
        )
    for make, options in (
        (lambda lr, strength: prox(0.5 * lr, strength), {}),
        (lambda lr, strength: fr.chain(fr.add_decayed_weights(strength), fr.sgd(lambda count: lr)), {}),
        (lambda lr, strength: prox(0.1 if lr > 0.15 else 0.2, strength), {"static": ["lr"]}),
    ):
        fr.sweep(plain, F.cross_entropy, make, grid, data(), epochs=1, **options)


def test_a_chain_that_leads_uphill_is_told():
    make = lambda lr: fr.chain(fr.scale_by_adam(), fr.scale(lr))
    with pytest.warns(UserWarning, match=r"makes chain\(.*\), in which nothing turns the sign .* go uphill"):
        fr.sweep(plain, F.cross_entropy, make, {"lr": [0.1, 0.2]}, data(), epochs=1)


@pytest.mark.skipif(
    "while True" not in inspect.getsource(nn.init._no_grad_trunc_normal_),
    reason="this torch draws once, which vmap maps",
)
def test_what_is_drawn_until_it_lies_within_bounds_is_named():
    drawing = lambda outputs, y: F.cross_entropy(outputs + nn.init.trunc_normal_(torch.empty(2)), y)
    with pytest.raises(TypeError, match=r"trunc_normal_ draws again until .* one draw, are math.sqrt"):
        fr.sweep(plain, drawing, fr.sgd, {"learning_rate": [0.1, 0.2]}, data(), epochs=1)


@SLOWLY
def test_what_does_not_follow_seeds_is_told():
    deep = nn.LSTM(6, 5, num_layers=2, dropout=0.5)
    take = lambda outputs, y: F.cross_entropy(outputs[0], y % 5)
    with pytest.warns(UserWarning, match="does not follow the seeds"):
        fr.sweep(deep, take, fr.sgd, {"learning_rate": [0.1, 0.2]}, data(), epochs=1)
    numbers = lambda: torch.randn(2, generator=torch.Generator().manual_seed(3), device="cpu").to(DEVICE)
    own = lambda outputs, y: F.cross_entropy(outputs + numbers(), y)
    with pytest.warns(UserWarning, match="does not follow the seeds of members, as recurrent layers .* generators"):
        fr.sweep(plain, own, fr.sgd, {"learning_rate": [0.1, 0.2]}, data(), epochs=1)
    shared = torch.zeros(2)
    loss = lambda outputs, y: F.cross_entropy(outputs + shared.normal_(), y)
    with pytest.raises(
        TypeError, match=r"normal_ writes .* into one tensor.* Each member draws its own: by torch.rand"
    ):
        fr.sweep(plain, loss, fr.sgd, {"learning_rate": [0.1, 0.2]}, data(), epochs=1)
    loss = lambda outputs, y: F.cross_entropy(outputs + torch.randn(2), y)
    train = lambda **kw: fr.sweep(plain, loss, fr.sgd, {"learning_rate": [0.1, 0.2]}, data(), epochs=1, **kw)
    with pytest.warns(UserWarning, match="without a compiler, with equal results: there randn would draw other"):
        found = train(compile="eager")
    assert_close(found.params, train().params, rtol=0, atol=0)


def test_what_other_threads_draw_is_not_taken_for_what_the_model_draws():
    def loss(outputs, y):
        other = threading.Thread(target=lambda: torch.rand(3))
        other.start()
        other.join()
        return F.cross_entropy(outputs, y)

    train = lambda loss: fr.sweep(plain, loss, fr.sgd, {"learning_rate": [0.1, 0.2]}, data(), epochs=1).params
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = train(loss)
    assert_close(found, train(F.cross_entropy), rtol=0, atol=0)


class Last(nn.Module):
    """A recurrent layer and what it ends with."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer, self.out = kind(6, 5, batch_first=True, **options), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(self.layer(x)[0][:, -1])


@SLOWLY
@pytest.mark.parametrize("score", [None, accuracy, lambda outputs, y: accuracy_score(y, outputs.argmax(-1))])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_measured_too(kind, score):
    x, y = data()
    x = torch.stack([x, x.flip(0), x.roll(1, 0)], 1)
    grid, options = {"learning_rate": [0.01, 0.1]}, {"validation": (x[:20], y[:20]), "score": score}
    result = fr.sweep(lambda: Last(kind), F.cross_entropy, fr.adam, grid, (x, y), epochs=2, batch_size=16, **options)
    for k, row in enumerate(result.rows):
        module = Last(kind)
        module.load_state_dict(result.member(k))
        outputs = module(x[:20]).detach()
        assert row["loss"] == pytest.approx(float(F.cross_entropy(outputs, y[:20])), rel=1e-5)
        assert score is None or row["score"] == pytest.approx(float(accuracy(outputs, y[:20])))


def test_the_module_stays_as_it_was():
    module = normed().eval()
    before = copy.deepcopy(module.state_dict())
    fr.sweep(module, F.cross_entropy, prox, GRID, data(), epochs=1)
    assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert not module.training
    assert all(w.requires_grad and w.grad is None for w in module.parameters())


def test_what_requires_no_gradient_stays_and_tied_weights_stay_tied():
    module = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 2))
    module[2].weight = module[0].weight
    module[3].weight.requires_grad_(False)
    result = fr.sweep(module, F.cross_entropy, fr.sgd, {"learning_rate": [0.1, 0.5]}, data(), epochs=2)
    state = result.member()
    assert "3.weight" not in result.params
    assert torch.equal(state["3.weight"], module[3].weight)
    assert torch.equal(state["2.weight"], state["0.weight"])
    assert not torch.equal(state["0.weight"], module[0].weight)
    assert module.load_state_dict(state)


def test_layers_that_were_put_into_evaluation_stay_there_in_training():
    module = normed()
    module[1].eval()
    result = fr.sweep(module, F.cross_entropy, fr.sgd, {"learning_rate": [0.1, 0.5]}, data(), epochs=2)
    assert_close(result.member()["1.running_mean"], torch.zeros(5))


UNEVEN = [(range(40), range(40, 60)), (range(8, 24), range(8)), (range(30, 60), range(30))]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"patience": 2}, {"compile": "eager"}], ids=str)
@pytest.mark.parametrize("network", [plain, dropping], ids=["plain", "dropout"])
def test_folds_of_other_sizes_are_trained_as_if_they_were_alone(network, options):
    """Each sees all its rows once an epoch: those that have less wait, and their schedules and moments with them."""
    folds = [tuple(torch.tensor(list(rows)) for rows in pair) for pair in UNEVEN]
    make = lambda lr: fr.adam(fr.linear_schedule(lr, 0.0, 12))
    train = lambda folds, **kw: fr.sweep(
        network, F.cross_entropy, make, {"lr": [0.01, 0.1]}, data(), folds=folds, epochs=3, batch_size=8, **kw
    )
    found = train(folds, **options)
    for place, fold in enumerate(folds):
        alone = train([fold], **{name: x for name, x in options.items() if name != "compile"})
        for k in range(2):
            assert_close(found.member(k, fold=place), alone.member(k), rtol=1e-4, atol=1e-5)
            assert found.rows[k]["folds"][place] == pytest.approx(alone.rows[k]["loss"], rel=1e-4)
            assert float(found.history["train_loss"][-1, k, place]) == pytest.approx(
                float(alone.history["train_loss"][-1, k]), rel=1e-4
            )


def test_a_batch_that_no_small_fold_has_is_told():
    folds = [tuple(torch.tensor(list(rows)) for rows in pair) for pair in UNEVEN]
    with pytest.warns(UserWarning, match="batch_size is 32, and the smallest fold has 16 rows.*are of 16"):
        _wrong(folds=folds, batch_size=32)
    _wrong(folds=7)  # These differ by one row.


# Hyperparameters


def test_complex_parameters_have_real_hyperparameters():
    x, y = data()
    loss = lambda params, x, y: (x.to(torch.complex64) @ params["w"] - y).abs().square().mean()
    start = {"w": torch.zeros(6, dtype=torch.complex64)}
    result = fr.sweep(start, loss, fr.adam, {"learning_rate": [0.01, 0.1]}, (x, y), epochs=3)
    assert result.best["learning_rate"] == 0.1


@pytest.mark.slow
def test_each_group_is_compiled_however_many_there_are():
    grid = {"name": list("abcdefghij"), "lr": [0.1, 0.2]}
    train = lambda **kw: fr.sweep({"w": torch.zeros(6)}, lambda params, x, y: (x @ params["w"] - y).square().mean(),
                                  lambda name, lr: fr.sgd(lr), grid, data(), epochs=1, **kw)  # fmt: skip
    counted = []
    found = train(compile=lambda module, inputs: counted.append(module) or module)
    assert len(counted) == 10
    assert_close(found.params, train().params)


@pytest.mark.parametrize("options", [{"batch_size": np.int64(8)}, {"epochs": np.int32(2)}, {"seed": np.int64(3)},
                                     {"seeds": np.int64(2)}, {"seeds": np.array([0, 1])}, {"patience": np.int8(2)},
                                     {"folds": np.int64(2)}, {"draws": np.int64(2)}, {"validation": np.float32(0.25)}],
                         ids=str)  # fmt: skip
def test_whole_numbers_may_be_numpys(options):
    plainly = lambda x: x.tolist() if isinstance(x, np.ndarray) else x.item()
    expected = _wrong(**{name: plainly(x) for name, x in options.items()})
    assert_close(_wrong(**options).params, expected.params, rtol=0, atol=0)


def test_what_is_no_number_splits_members_into_groups():
    grid = {"penalty": [fr.l1, fr.half_l2], "lr": [0.01, 0.1], "momentum": [None, 0.9]}

    def make(penalty, lr, momentum):
        return fr.prox_sgd(lr, penalty, strength=0.1, momentum=momentum)

    result = fr.sweep(plain, F.cross_entropy, make, grid, data(), epochs=2)
    assert [row["penalty"] for row in result.rows] == [fr.l1] * 4 + [fr.half_l2] * 4
    for k in (1, 6):
        alone = fr.sweep(plain, F.cross_entropy, make, [result.hyper(k)], data(), epochs=2)
        assert_close(result.member(k), alone.member(), rtol=1e-5, atol=1e-6)
    assert "half_l2" in str(result)


def test_hyperparameters_that_the_loss_names_go_to_it():
    def loss(outputs, y, *, smoothing):
        return (1 - smoothing) * F.cross_entropy(outputs, y) + smoothing * outputs.square().mean()

    result = fr.sweep(plain, loss, lambda lr: fr.sgd(lr), {"lr": [0.5], "smoothing": [0.0, 1.0]}, data(), epochs=5)
    assert [row["smoothing"] for row in result.rows] == [0.0, 1.0]
    assert result.rows[1]["loss"] < result.rows[0]["loss"]


def test_static_hyperparameters_are_numbers_of_python():
    make = lambda lr, k: fr.chain(fr.sgd(lr), fr.project(fr.top_k, k, mask=fr.matrices))
    result = fr.sweep(plain, F.cross_entropy, make, {"lr": [0.1, 0.2], "k": [1, 3]}, data(), epochs=1, static=["k"])
    zeros = [int((result.member(k)["0.weight"] != 0).sum()) for k in range(4)]
    assert zeros == [1, 3, 1, 3]


def test_schedules_of_members_have_rates_of_their_own():
    make = lambda lr: fr.sgd(fr.linear_schedule(lr, 0.0, 4))
    result = fr.sweep(plain, F.cross_entropy, make, {"lr": [0.1, 1.0]}, data(), epochs=4, batch_size=48)
    alone = fr.sweep(plain, F.cross_entropy, make, [{"lr": 1.0}], data(), epochs=4, batch_size=48)
    assert_close(result.member(1), alone.member(), rtol=1e-5, atol=1e-6)


def test_numbers_of_a_grid_are_pythons_and_labels_that_no_class_has_are_told():
    found = fr.sweep(plain, F.cross_entropy, fr.sgd, {"learning_rate": np.array([0.1, 0.2])}, data(), epochs=1)
    assert [type(row["learning_rate"]) for row in found.rows] == [float, float]
    x, y = data()
    with pytest.raises(ValueError, match=r"the loss failed on a batch: IndexError.*out of bounds.*It was given"):
        fr.sweep(plain, F.cross_entropy, fr.sgd, {"learning_rate": [0.1]}, (x, y + 9), epochs=1)


def test_random_draws_come_from_distributions_and_lists():
    class Scipys:
        def rvs(self, size, random_state):
            return np.random.default_rng(random_state).uniform(size=size)

    grid = {"lr": fr.log_uniform(1e-3, 1.0), "strength": [0.0, 0.5], "decay": Scipys()}
    make = lambda lr, strength, decay: fr.chain(fr.add_decayed_weights(decay), prox(lr, strength))
    train = lambda **kw: fr.sweep(plain, F.cross_entropy, make, grid, data(), epochs=1, draws=12, **kw).rows
    rows = train()
    assert len({row["lr"] for row in rows}) == 12
    assert all(1e-3 <= row["lr"] <= 1.0 and 0 <= row["decay"] <= 1 for row in rows)
    assert {row["strength"] for row in rows} == {0.0, 0.5}
    assert train() == rows
    assert train(seed=1)[0]["lr"] != rows[0]["lr"]


# Who goes on


def test_early_stopping_keeps_the_best_parameters():
    x, y = data(40)
    options = {"epochs": 40, "batch_size": 20, "validation": (x, 1 - y)}  # What is learned makes validation worse.
    make, grid = lambda lr: fr.adam(lr), {"lr": [0.0, 1e-3, 0.1]}
    result = fr.sweep(plain, F.cross_entropy, make, grid, (x, y), patience=3, **options)
    losses = result.history["loss"]
    assert [row["status"] for row in result.rows] == ["stopped"] * 3
    for k, row in enumerate(result.rows):
        own = losses[:, k][losses[:, k].isfinite()]
        assert row["epochs"] == len(own) == row["epoch"] + 3
        assert row["loss"] == float(own.min()) == float(own[row["epoch"] - 1])
        module = plain()
        module.load_state_dict(result.member(k))
        assert float(F.cross_entropy(module(x).detach(), 1 - y)) == pytest.approx(row["loss"], rel=1e-5)
    assert len(losses) < 40


def test_halving_goes_on_with_the_best():
    grid = {"lr": [1e-4, 1e-3, 1e-2, 0.1], "strength": [0.0, 1.0]}
    seen = []
    result = fr.sweep(
        plain, F.cross_entropy, prox, grid, data(), epochs=8, batch_size=8, halving=2, progress=seen.append
    )
    assert [now["members"] for now in seen] == [4, 2, 2, 1, 1, 1, 1, 1]
    assert sorted(row["epochs"] for row in result.rows) == [1, 1, 1, 1, 2, 2, 4, 8]
    first = result.history["loss"][0]
    dropped = [k for k, row in enumerate(result.rows) if row["epochs"] == 1]
    assert set(first.argsort()[4:].tolist()) == set(dropped)
    assert result.best["status"] == "done"
    assert [result.rows[k]["epochs"] for k in result.ranking] == [8, 4, 2, 2, 1, 1, 1, 1]


def test_members_that_diverge_are_out_and_say_so():
    result = fr.sweep(
        plain, F.cross_entropy, lambda lr: fr.sgd(lr), {"lr": [0.1, 1e38]}, data(), epochs=4, batch_size=8
    )
    assert [row["status"] for row in result.rows] == ["done", "diverged"]
    assert result.best["lr"] == 0.1
    assert all(w.isfinite().all() for w in result.member(0).values())


def test_members_stop_without_a_new_compilation():
    counted, options = [], {"patience": 1, "halving": 2, "chunk_size": 2}

    def backend(module, inputs):
        counted.append(module)
        return module

    grid = {"learning_rate": [0.0, 1e-3, 1e-2, 0.1, 0.5]}
    result = fr.sweep(plain, F.cross_entropy, fr.sgd, grid, data(), epochs=8, batch_size=16, compile=backend, **options)
    assert {"done", "dropped"} <= {row["status"] for row in result.rows}
    assert len(counted) == 1


@pytest.mark.slow
def test_the_compiled_step_is_the_eager_one():
    train = lambda compile: fr.sweep(
        normed, F.cross_entropy, prox, GRID, data(), epochs=3, batch_size=16, compile=compile
    )
    assert_close(train(True).params, train(False).params, rtol=1e-3, atol=1e-4)


def test_a_member_is_frozen_by_its_rate():
    """The recipe for loops of one's own: rates in a tensor, and one of them set to zero."""
    rates, members = tensor([0.1, 0.1]), fr.init_ensemble(plain, 2).params
    step = fr.fuse(fr.ensemble(lambda rate: fr.prox_adam(rate, fr.l1, strength=0.1), rates), backend="aot_eager")
    grads, state = fr.tree_map(torch.ones_like, members), step.init(members)[1]
    members, state = step(members, grads, state)
    rates[1] = 0.0
    after, state = step(members, grads, state)
    for name, w in after.items():
        assert torch.equal(w[1], members[name][1])
        assert not torch.equal(w[0], members[name][0])


# What is shown


def test_the_table_has_the_best_row_first():
    result = fr.sweep(plain, F.cross_entropy, prox, GRID, data(), epochs=2, seeds=2, score=accuracy)
    header, *rows = str(result).splitlines()
    named = ["row", "lr", "strength", "seed", "loss", "score", "train_loss", "epoch", "epochs", "status"]
    assert header.split() == named
    assert len(rows) == len(result) == 8
    assert [int(line.split()[0]) for line in rows] == result.ranking  # As `member` takes them.
    assert float(rows[0].split()[5]) == pytest.approx(max(row["score"] for row in result.rows), rel=1e-3)
    assert isinstance(result, fr.Sweep)


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_what_came_of_a_sweep_is_saved_whatever_its_functions_are(copied):
    score = lambda outputs, labels: accuracy(outputs, labels)
    result = fr.sweep(lambda: plain(), F.cross_entropy, lambda **h: prox(**h), GRID, data(), epochs=1, score=score)
    saved = copied(result)
    assert str(saved) == str(result)
    assert saved.hyper() == result.hyper()
    assert_close(saved.member(), result.member(), rtol=0, atol=0)


def test_progress_is_a_function_a_bar_or_lines(monkeypatch, capsys):
    train = lambda progress: fr.sweep(plain, F.cross_entropy, prox, GRID, data(), epochs=2, progress=progress)
    seen = []
    train(seen.append)
    assert [(now["epoch"], now["epochs"], now["members"]) for now in seen] == [(1, 2, 4), (2, 2, 4)]
    assert math.isfinite(seen[-1]["loss"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    train(True)
    assert "epoch 2, epochs 2, members 4, loss" in capsys.readouterr().err
    assert "tqdm" not in {name.split(".")[0] for name in vars(sys.modules["funcreg.training.sweep"])}


def test_data_may_be_nested_and_of_numpy():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 2)

        def forward(self, x, scale):
            return self.fc(x) * scale

    (x, y), scale = data(), torch.ones(60, 1)
    train = lambda data: fr.sweep(Two, F.cross_entropy, fr.sgd, {"learning_rate": [0.1, 0.2]}, data, epochs=1).params
    expected = train(((x, scale), y))
    for other in (({"x": x, "scale": scale}, y), TensorDataset(x, y)):
        if isinstance(other, TensorDataset):
            other = ((x.cpu().numpy(), scale.cpu().numpy()), y.cpu().numpy())
        assert_close(train(other), expected, rtol=0, atol=0)
    plainly = lambda data: (
        fr.sweep(plain, F.cross_entropy, fr.sgd, {"learning_rate": [0.1, 0.2]}, data, epochs=1).params
    )
    assert_close(plainly(TensorDataset(x, y)), plainly([x, y]), rtol=0, atol=0)


def _wrong(**changes):
    given = {
        "model": plain,
        "loss": F.cross_entropy,
        "make": prox,
        "grid": GRID,
        "data": data(),
        "epochs": 1,
        **changes,
    }
    return fr.sweep(**given)


WRONG = {
    "unknown": (
        {"grid": {"rate": [0.1], "lr": [0.1], "strength": [0.1]}},
        TypeError,
        "takes lr, strength, and neither",
    ),
    "an optimizer of torch": (
        {"make": torch.optim.Adam, "grid": {"lr": [0.1]}},
        TypeError,
        "make is the optimizer Adam of torch.* such as fr.adamw",
    ),
    "missing": ({"grid": {"lr": [0.1]}}, TypeError, "lacks hyperparameters.*'strength'"),
    "negative": ({"grid": {**GRID, "strength": [0.1, -1.0]}}, ValueError, r"with \{'lr': 0.01, 'strength': -1.0\}"),
    "number": ({"grid": {**GRID, "lr": 0.1}}, TypeError, "0.1 for 'lr'; expected a list"),
    "empty": ({"grid": {**GRID, "lr": []}}, ValueError, "no values for 'lr'"),
    "reserved": ({"grid": {"loss": [1.0]}}, ValueError, "named 'loss', as a column"),
    "no draws": ({"grid": {**GRID, "lr": fr.log_uniform(0.1, 1.0)}}, ValueError, "give draws="),
    "draws": ({"draws": 0}, ValueError, "draws is 0"),
    "draws of a list": ({"grid": [{"lr": 0.1, "strength": 0.0}], "draws": 2}, ValueError, "draws came with a list"),
    "no grid": ({"grid": []}, ValueError, "empty list"),
    "string": ({"grid": "lr"}, TypeError, "grid is a str"),
    "unlike": ({"grid": [{"lr": 0.1}, {"strength": 0.1}]}, ValueError, "configuration 1 names"),
    "no transform": ({"make": lambda lr, strength: None}, TypeError, "Is a return missing"),
    "no function": ({"make": fr.sgd(0.1)}, TypeError, "expected a function from hyperparameters"),
    "loss": ({"loss": 3}, TypeError, "loss is 3"),
    "loss of rows": ({"loss": lambda o, y: F.cross_entropy(o, y, reduction="none")}, ValueError, r"shape \(48,\)"),
    "loader": ({"data": DataLoader(TensorDataset(*data()))}, TypeError, "makes its own batches"),
    "one tensor": ({"data": data()[0]}, TypeError, "expected a tuple of tensors"),
    "rows": ({"data": (data()[0], data()[1][:5])}, ValueError, "60 at '0', 5 at '1'"),
    "share": ({"validation": 1.5}, ValueError, "validation is 1.5"),
    "share too small": ({"validation": 1e-9}, ValueError, "leaves none on one side"),
    "both": ({"validation": 0.1, "folds": 2}, ValueError, "came together"),
    "folds": ({"folds": 1}, ValueError, "folds is 1"),
    "indices": ({"folds": [([0, 1], [99])]}, ValueError, "from 0 to 59"),
    "score": ({"validation": 0, "score": accuracy}, ValueError, "score came without validation"),
    "seeds": ({"model": plain(), "seeds": 2}, ValueError, "a function that makes them"),
    "a width": ({"model": lambda width: nn.Linear(6, width)}, TypeError, r"\(width\); expected.*call sweep once for"),
    "rows that meet all": (
        {"loss": F.mse_loss, "data": (data()[0], data()[1].float()), "model": lambda: nn.Linear(6, 1)},
        ValueError,
        r"was given \(48, 1\), torch.float32 and \(48,\), torch.float32.*nn.Flatten",
    ),
    "rows that meet all, of a module": (
        {"loss": nn.PoissonNLLLoss(), "data": (data()[0], data()[1].float()), "model": lambda: nn.Linear(6, 1)},
        ValueError,
        "compared with the targets of all rows",
    ),
    "name of a score": ({"score": "accuracy"}, TypeError, "'accuracy'; expected a function of outputs and targets"),
    "model": ({"model": [1.0]}, TypeError, "model '0' is 1.0"),
    "nothing": ({"model": plain().requires_grad_(False)}, ValueError, "nothing to train"),
    "epochs": ({"epochs": 0}, ValueError, "epochs is 0"),
    "patience": ({"patience": 0}, ValueError, "patience is 0"),
    "halving": ({"halving": 1}, ValueError, "drops nothing"),
    "static": ({"static": ["rate"]}, ValueError, "expected a list of names"),
    "number of steps": (
        {"make": lambda n: fr.sgd(fr.cosine_decay_schedule(0.1, n)), "grid": {"n": [5, 9]}},
        TypeError,
        r"decay_steps is tensor\(5\).*static= names those",
    ),
    "number of entries": (
        {"make": lambda n: fr.lbfgs(memory_size=n), "grid": {"n": [5, 9]}},
        ValueError,
        r"memory_size is tensor\(5\).*static= names those",
    ),
    "key": ({"make": lambda lr: fr.noisy_sgd(lr), "grid": {"lr": [0.1, 0.2]}}, TypeError, "same noise.$"),
    "part of an epoch": ({"epochs": 2.0}, ValueError, "epochs is 2.0; expected a whole number of at least 1"),
    "seeds of text": ({"seeds": "ab"}, TypeError, "seeds is 'ab'; expected a number of seeds, or a list of whole"),
    "half a seed": ({"seed": 0.5}, TypeError, "seed is 0.5; expected a whole number"),
    "no seeds": ({"seeds": []}, ValueError, "at least one"),
    "progress": ({"progress": "bar"}, TypeError, "progress is 'bar'"),
}


@pytest.mark.parametrize(("changes", "kind", "said"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused(changes, kind, said):
    with pytest.raises(kind, match=said):
        _wrong(**changes)


def test_log_uniform_wants_a_range():
    with pytest.raises(ValueError, match="low is 0"):
        fr.log_uniform(0.0, 1.0)
    with pytest.raises(ValueError, match=r"high is 0\.1"):
        fr.log_uniform(0.1, 0.1)


# Chains that take the loss, or the objective


def test_chains_that_take_the_loss_are_trained_as_in_a_loop():
    x, y = data(40)
    held = data(20, seed=1)
    make = lambda lr: fr.chain(fr.adam(lr), fr.reduce_on_plateau(factor=0.5, patience=1, rtol=0.5))
    result = fr.sweep(plain, F.cross_entropy, make, {"lr": [0.01, 0.1]}, (x, y), epochs=6, validation=held)
    loss = lambda params: F.cross_entropy(functional_call(module, params, (x,)), y)
    module = plain()
    for k, lr in enumerate((0.01, 0.1)):
        params, tx = fr.unstack(fr.init_ensemble(plain, [0]).params)[0], make(lr)
        state = tx.init(params)
        for _ in range(6):
            grads, value = grad_and_value(loss)(params)
            updates, state = tx.update(grads, state, params, value=value)
            params = fr.apply_updates(params, updates)
        assert state[1].scale < 1
        assert_close(result.member(k), params, rtol=1e-4, atol=1e-5)


TAKERS = {
    "polyak": (lambda most: fr.polyak_sgd(most), {"most": [0.1, 0.5]}),
    "a line search": (
        lambda trials: fr.chain(fr.sgd(1.0), fr.scale_by_backtracking_linesearch(trials)),
        {"trials": [4, 8]},
    ),
    "lbfgs": (lambda size: fr.lbfgs(memory_size=size), {"size": [2, 3]}),
    "inside others": (
        lambda lr: fr.apply_if_finite(fr.chain(fr.sgd(lr), fr.reduce_on_plateau()), 3),
        {"lr": [0.1, 0.5]},
    ),
}


@pytest.mark.parametrize("options", [{}, {"folds": 2}], ids=["plain", "folds"])
@pytest.mark.parametrize(("make", "grid"), TAKERS.values(), ids=TAKERS)
def test_chains_that_take_the_objective_are_trained(make, grid, options):
    static = [name for name in grid if name in ("trials", "size")]
    train = lambda grid: fr.sweep(plain, F.cross_entropy, make, grid, data(), epochs=2, static=static, **options)
    result, name = train(grid), next(iter(grid))
    assert [row["status"] for row in result.rows] == ["done", "done"]
    alone = train([{name: grid[name][1]}])
    fold = 1 if "folds" in options else None
    assert_close(result.member(1, fold), alone.member(0, fold), rtol=1e-4, atol=1e-5)


def test_the_compiled_step_takes_the_loss():
    train = lambda compile: fr.sweep(
        plain, F.cross_entropy, fr.polyak_sgd, {"max_learning_rate": [0.1, 0.5]}, data(), epochs=2, compile=compile
    )
    # Up to torch 2.9 the compiler reads no names of arguments, and so knows not who takes the loss.
    is_old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10)
    with pytest.warns(UserWarning, match="runs without a compiler") if is_old else nullcontext():
        found = train("eager")
    assert_close(found.params, train(False).params, rtol=1e-5, atol=1e-6)


def test_what_no_compiler_takes_is_trained_without_one():
    train = lambda make, loss, grid, compile: fr.sweep(plain, loss, make, grid, data(), epochs=2, compile=compile)
    search = fr.lbfgs, F.cross_entropy, {"learning_rate": [0.5, 1.0]}
    with pytest.warns(UserWarning, match="chains that take value_fn"):
        found = train(*search, "eager")
    assert_close(found.params, train(*search, False).params, rtol=0, atol=0)

    def broken(outputs, y):
        torch._dynamo.graph_break()
        return F.cross_entropy(outputs, y)

    rates = fr.sgd, broken, {"learning_rate": [0.1, 0.5]}
    with pytest.warns(UserWarning, match=r"sweep runs without a compiler, with equal results: .*graph_break"):
        found = train(*rates, "eager")
    assert_close(found.params, train(*rates, False).params, rtol=0, atol=0)


# Scores of any kind


def by_numpy(outputs, y):
    return float(np.mean(outputs.cpu().numpy().argmax(-1) == y.cpu().numpy()))


def by_sklearn(outputs, y):
    return accuracy_score(y, outputs.argmax(-1))


def by_item(outputs, y):
    return sum(int(o.argmax() == t) for o, t in zip(outputs, y, strict=True)) / len(y)


@pytest.mark.parametrize("options", [{}, {"folds": 2}, {"patience": 1}, {"chunk_size": 3}], ids=str)
@pytest.mark.parametrize("score", [by_numpy, by_sklearn, by_item])
def test_a_score_that_is_no_function_of_torch_is_called_for_one_member_after_the_other(score, options):
    train = lambda score: fr.sweep(normed, F.cross_entropy, prox, GRID, data(), epochs=2, score=score, **options)
    found, expected = train(score), train(accuracy)
    assert [row["score"] for row in found.rows] == pytest.approx([row["score"] for row in expected.rows])
    assert_close(found.params, expected.params, rtol=0, atol=0)


def test_a_score_of_all_rows_is_not_the_mean_over_pieces():
    held = data(1500, seed=3)
    f1 = lambda outputs, y: f1_score(y, outputs.argmax(-1), average="macro")
    options = {"epochs": 1, "validation": held, "score": f1}
    result = fr.sweep(normed, F.cross_entropy, prox, GRID, data(), **options)
    for k, row in enumerate(result.rows):
        module = normed().eval()
        module.load_state_dict(result.member(k))
        assert row["score"] == pytest.approx(f1(module(held[0]).detach().cpu(), held[1].cpu()))


def test_scores_of_trees_get_the_parameters():
    x, y = data()
    loss = lambda params, x, y: F.cross_entropy(x @ params["w"], y)
    score = lambda params, x, y: accuracy_score(y, (x @ params["w"]).argmax(-1))
    params = {"w": torch.zeros(6, 2)}
    result = fr.sweep(params, loss, fr.sgd, {"learning_rate": [0.1, 1.0]}, (x, y), epochs=3, score=score)
    assert result.best["score"] > 0.6


def test_members_that_diverge_have_no_score_of_a_library():
    with pytest.warns(UserWarning, match="all 2 rows of the sweep have diverged"):
        result = fr.sweep(plain, F.cross_entropy, fr.sgd, {"learning_rate": [1e38, 2e38]}, data(), epochs=3,
                          batch_size=8, score=by_sklearn)  # fmt: skip
    assert {row["status"] for row in result.rows} == {"diverged"}


# What users bring


def arrays(dtype=np.float64):
    x, y = data()
    return x.cpu().numpy().astype(dtype), y.cpu().numpy()


def test_arrays_have_the_dtype_of_the_network():
    train = lambda data: fr.sweep(plain, F.cross_entropy, fr.sgd, {"learning_rate": [0.1, 0.2]}, data, epochs=1).params
    assert_close(train(arrays()), train(data()), rtol=0, atol=0)


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        out = self.fc(x)
        return out * 2 if out.sum() > 0 else out


MISFITS = {
    "float64": ({"data": (data()[0].double(), data()[1])}, "the module failed on a batch.*float64: data at '0'"),
    "float32": ({"model": lambda: plain().double()}, "the module failed on a batch.*float32: data at '0'"),
    "float classes": ({"data": (data()[0], data()[1].float())}, r"the loss failed.*torch.float32.*y.long\(\)"),
    "whole targets": (
        {"loss": lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], y)},
        r"the loss failed.*int64.*not classes: y.float\(\)",
    ),
    "a class for a loss": (
        {"loss": nn.CrossEntropyLoss},
        r"loss is the class C.*expected what it makes, CrossEntropyLoss\(\)",
    ),
    "whole inputs": ({"data": (data()[0].long(), data()[1])}, "the module failed on a batch.*int64: data at '0'"),
    "a splitter": ({"folds": KFold(3)}, r"folds is KFold.*expected a number, or pairs .* as list\(KFold"),
    "no hyperparameters": ({"grid": {}, "make": lambda rate: fr.sgd(rate)}, "grid names no .* 'rate'"),
    "reads": ({"model": Reads}, "not for all at once under vmap"),
    "loss reads": ({"loss": lambda o, y: F.cross_entropy(o, y) * (2 if o.sum() > 0 else 1)}, "not for all at once"),
    "score": ({"score": lambda y, outputs: accuracy_score(y, outputs)}, r"the score failed: ValueError.*\(12, 2\)"),
    "score of two": ({"score": lambda outputs: 1.0}, "the score failed: TypeError"),
    "a hyperparameter that torch reads": (
        {
            "loss": lambda o, y, *, smoothing: F.cross_entropy(o, y, label_smoothing=smoothing),
            "grid": {**GRID, "smoothing": [0.0, 0.1]},
        },
        "not for all at once under vmap. There no number.*takes smoothing as 0-dim tensors; static= names",
    ),
    "validation without targets": ({"validation": data()[:1]}, "the loss failed on rows of validation.*target"),
    "narrow validation": ({"validation": (data()[0][:, :3], data()[1])}, "the module failed on rows of validation"),
    "float64 validation": (
        {"validation": (data()[0].double(), data()[1])},
        "the module failed on rows of validation.*float64: validation at '0'",
    ),
    "text": ({"data": (np.array([["a"] * 6] * 60), arrays()[1])}, "data at '0' is a ndarray of <U1"),
}


@pytest.mark.parametrize(("changes", "said"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_named(changes, said):
    with pytest.raises(TypeError, match=said):
        _wrong(**changes)


@pytest.mark.parametrize(("score", "said"), [
    (lambda outputs, y: (outputs.argmax(-1) == y).double(), r"score returned shape \(12,\)"),
    (lambda outputs, y: None, "score returned None"),
    (lambda outputs, y: np.ones(3), r"score returned shape \(3,\)"),
])  # fmt: skip
def test_a_score_is_a_number(score, said):
    with pytest.raises(ValueError, match=said):
        _wrong(score=score)


@pytest.mark.parametrize(("make", "grid", "said"), [
    (fr.adamw, {"lr": [0.1]}, "Did you mean 'learning_rate'"),
    (fr.adamw, {"learning_rate": [0.1], "weigth_decay": [0.1]}, "Did you mean 'weight_decay'"),
    (prox, {"lr": [0.1], "strenght": [0.1]}, "Did you mean 'strength'"),
    (prox, {"lr": [0.1], "alpha": [0.1]}, "Did you mean 'strength'"),
    (fr.prox_adam, {"learning_rate": [0.1], "strength": [0.1]}, "'penalty'.*as in lambda learning_rate, strength"),
])  # fmt: skip
def test_names_that_are_near_are_said(make, grid, said):
    with pytest.raises(TypeError, match=said):
        _wrong(make=make, grid=grid)


def test_draws_from_lists_are_different():
    draw = lambda n, seed=0: fr.sweep(plain, F.cross_entropy, prox, GRID, data(), epochs=1, draws=n, seed=seed).rows
    rows = [(row["lr"], row["strength"]) for row in draw(4)]
    assert sorted(rows) == [(0.01, 0.0), (0.01, 0.03), (0.1, 0.0), (0.1, 0.03)]
    with pytest.raises(ValueError, match="draws is 5, and the grid has 4 combinations"):
        draw(5)


# Members


def test_members_are_asked_for_by_row_and_fold():
    train = lambda **options: fr.sweep(plain, F.cross_entropy, prox, GRID, data(), epochs=1, **options)
    result = train()
    assert_close(result.member(-1), result.member(3), rtol=0, atol=0)
    for row in (4, -5):
        with pytest.raises(IndexError, match=f"row is {row}; expected a whole number from 0 to 3"):
            result.member(row)
        with pytest.raises(IndexError, match="row is"):
            result.hyper(row)
    with pytest.raises(TypeError, match="row is 'best'"):
        result.member("best")
    with pytest.raises(ValueError, match="the sweep had no folds"):
        result.member(0, fold=1)
    result = train(folds=2)
    with pytest.raises(ValueError, match=r"had 2 folds.*give fold=, from 0 to 1.*validation=0"):
        result.member()
    with pytest.raises(IndexError, match="fold is 2; expected a whole number from 0 to 1"):
        result.member(0, fold=2)
    assert_close(result.member(2, fold=1)["0.weight"], result.params["0.weight"][2, 1], rtol=0, atol=0)


def test_a_long_table_is_cut():
    grid = {"learning_rate": torch.linspace(0.01, 0.1, 50)}
    lines = str(fr.sweep(plain, F.cross_entropy, fr.sgd, grid, data(), epochs=1)).splitlines()
    assert len(lines) == 37
    assert lines[-1] == "... 15 more, in .rows"
