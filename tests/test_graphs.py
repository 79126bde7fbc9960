"""Steps of `minimize` as graphs: equal results, one recording for all numbers, and none where there can be none."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from cases import DEVICE, normal, number, squares, zeros
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, vmap

import funcreg as fr
from funcreg.solvers import graphs


def begin(size: int = 8) -> dict[str, Tensor]:
    return {"w": zeros(size), "b": zeros()}


def made(rows: int = 60, columns: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = normal(generator, rows, columns)
    return x, x[:, 0] - 2 * x[:, 1] + 0.1 * normal(generator, rows)


def logistic(params, x, y):
    return nn.functional.softplus(-y.sign() * (x @ params["w"] + params["b"])).mean()


def in_place(params, x, y):
    rest = (x @ params["w"]).clone()
    rest += params["b"]
    rest -= y
    return rest.square().mean() / 2


def picked(params, x, y):
    some = torch.tensor([0, 3, 1], device=x.device)
    return (x[:, some] @ params["w"][some] + params["b"] - y).square().mean() + params["w"].square().sum() / 100


network = nn.Sequential(nn.Linear(8, 1), nn.Softplus()).double().to(DEVICE)


def of_module(params, x, y):
    given = {"0.weight": params["w"][None], "0.bias": params["b"][None]}
    return nn.functional.mse_loss(functional_call(network, given, (x,))[:, 0], y.abs())


class Scaled(torch.autograd.Function):
    """A function of its own, which `functionalize` does not take."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, slope):
        return 2 * slope


LOSSES = [squares, logistic, in_place, picked, of_module, lambda params, x, y: Scaled.apply(squares(params, x, y))]
PENALTIES = {
    "l1": (fr.l1, (), {"strength": 0.1}),
    "elastic": (fr.elastic, (0.1, 0.5), {}),
    "given": (fr.elastic.given(0.2, 0.5), (), {"strength": 0.5}),
    "sum": (0.1 * fr.l1 + 0.2 * fr.half_l2, (), {}),
    "group": (fr.group_lasso, (), {"strength": 0.1, "dim": None}),
    "slope": (fr.slope, (torch.linspace(1, 0.1, 8, dtype=torch.float64, device=DEVICE),), {"strength": 0.1}),
    "mcp": (fr.mcp, (0.1, 3.0), {}),
    "simplex": (fr.simplex, (), {}),
    "tree": (fr.l1, (), {"strength": {"w": torch.linspace(0.01, 0.1, 8, device=DEVICE), "b": 0.0}}),
    "free": (fr.l1, (), {"strength": 0}),
}


@pytest.fixture(autouse=True)
def _no_graphs(monkeypatch):
    monkeypatch.setattr(graphs, "_made", {})


def both(call, compile="eager"):
    """What a call gives with and without graphs, and how many graphs it makes."""
    before = len(graphs._made)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = call(compile)
    return found, call(False), len(graphs._made) - before


def close(found, expected):
    torch.testing.assert_close(fr.tree_leaves(found), fr.tree_leaves(expected), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
def test_graphs_of_any_loss_find_the_same(loss):
    solve = lambda compile: fr.minimize(
        loss, begin(), fr.l1, strength=0.05, args=made(), mask=fr.select("w"), compile=compile
    )
    found, expected, count = both(solve)
    close(found.params, expected.params)
    assert found.steps == expected.steps
    assert found.converged
    assert count > 3


@pytest.mark.parametrize("name", PENALTIES)
def test_graphs_of_any_penalty_find_the_same(name):
    penalty, hyper, options = PENALTIES[name]
    mask = None if name == "tree" else fr.select("w")
    solve = lambda compile: fr.minimize(
        squares, begin(), penalty, *hyper, args=made(), mask=mask, compile=compile, **options
    )
    found, expected, count = both(solve)
    close(found.params, expected.params)
    assert found.converged == expected.converged
    assert count > 3
    assert both(solve)[2] == 0


def test_other_numbers_need_no_other_graphs():
    solve = lambda strength, share, seed: (
        lambda compile: fr.minimize(
            squares, begin(), fr.elastic, strength, share, args=made(seed=seed), mask=fr.select("w"), compile=compile
        )
    )
    assert both(solve(0.11, 0.7, 0))[2] > 0
    for strength, share, seed in [(0.3, 0.7, 0), (0.01, 0.2, 0), (0.2, 0.9, 3)]:
        found, expected, count = both(solve(strength, share, seed))
        close(found.params, expected.params)
        assert count == 0


def test_what_a_loss_holds_is_read_at_every_call():
    for k in range(3):
        x, y = made(seed=k)
        held = lambda params: squares(params, x, y)  # noqa: B023
        found, expected, count = both(
            lambda compile: fr.minimize(held, begin(), fr.l1, strength=0.1, mask=fr.select("w"), compile=compile)  # noqa: B023
        )
        close(found.params, expected.params)
        assert k == 0 or count == 0


@pytest.mark.parametrize("kind", ["number", "constant", "code", "no_grad"])
def test_a_loss_that_computes_something_else_has_other_graphs(kind):
    x, y = made()

    def loss(params):
        value = squares(params, x, y)
        if kind == "number":
            return value * (1 + k)
        if kind == "constant":
            return value * torch.tensor(1.0 + k, dtype=torch.float64, device=DEVICE)
        if kind == "code":
            return value.square() if k else value
        with torch.set_grad_enabled(bool(k)):
            rest = params["b"].square()
        return value + rest

    for k in range(2):  # noqa: B007  # The loss reads it.
        found, expected, count = both(
            lambda compile: fr.minimize(loss, begin(), fr.l1, strength=0.1, mask=fr.select("w"), compile=compile)
        )
        close(found.params, expected.params)
        assert count > 0


def test_a_penalty_of_its_own_is_watched_too():
    scale = number(1.0)

    @fr.penalty(
        gradient=lambda w: scale * w.sign(), proximal=lambda w, step: w - w.clamp(min=-scale * step, max=scale * step)
    )
    def own(w):
        return scale * w.abs()

    for scale in (number(1.0), number(3.0)):  # noqa: B007  # The penalty reads it.
        solve = lambda compile: fr.minimize(
            squares, begin(), own, strength=0.1, args=made(), mask=fr.select("w"), compile=compile
        )
        found, expected, _ = both(solve)
        close(found.params, expected.params)


STRENGTHS = torch.logspace(-2, 0, 4, dtype=torch.float64, device=DEVICE)
X, Y = made()
MAPPED = {
    "strengths": lambda solve: vmap(lambda s: solve(s, X, Y))(STRENGTHS),
    "data": lambda solve: vmap(lambda y: solve(0.1, X, y))(torch.stack([Y, -Y])),
    "both": lambda solve: vmap(lambda y: vmap(lambda s: solve(s, X, y))(STRENGTHS))(torch.stack([Y, -Y])),
    "jacrev": lambda solve: jacrev(lambda s: solve(s, X, Y))(number(0.1)),
    "jacfwd": lambda solve: jacfwd(lambda s: solve(s, X, Y))(number(0.1)),
    "of data": lambda solve: grad(lambda y: solve(0.1, X, y)["w"].sum())(Y),
    "mapped": lambda solve: vmap(grad(lambda s: solve(s, X, Y)["w"].sum()))(STRENGTHS),
}


@pytest.mark.parametrize("name", MAPPED)
def test_maps_and_derivatives_are_the_same(name):
    def call(compile):
        return MAPPED[name](
            lambda strength, x, y: (
                fr.minimize(
                    squares, begin(), fr.l1, strength=strength, args=(x, y), mask=fr.select("w"), compile=compile
                ).params
            )
        )

    found, expected, _ = both(call)
    close(found, expected)


def test_many_parameters_have_graphs_for_those_that_are_not_zero():
    x, y = made(80, 600)
    loss = lambda w, x, y: (x @ w - y).square().mean() / 2
    solve = lambda strength: (
        lambda compile: fr.minimize(loss, zeros(600), fr.l1, strength=strength, args=(x, y), compile=compile)
    )
    found, expected, count = both(solve(0.05))
    close(found.params, expected.params)
    assert count > 3
    assert both(solve(0.051))[2] == 0


@pytest.mark.parametrize("columns", [8, 80])
def test_paths_and_choices_are_the_same(columns):
    x, y = made(60, columns)
    args = {"count": 6, "ratio": 0.05, "mask": fr.select("w")}
    path = lambda compile: fr.regularization_path(squares, begin(columns), fr.l1, args=(x, y), compile=compile, **args)
    found, expected, count = both(path)
    close((found.params, found.losses), (expected.params, expected.losses))
    assert found.converged.all()
    assert count > 3
    assert both(path)[2] == 0
    found, expected, _ = both(
        lambda compile: fr.cross_validate(squares, begin(columns), fr.l1, data=(x, y), folds=3, compile=compile, **args)
    )
    close((found.params, found.scores), (expected.params, expected.scores))
    assert found.best == expected.best


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda params, x, y: squares(params, x, y) * (2 if params["b"] > 9 else 1), "reads a number from a tensor"),
        (
            lambda params, x, y: squares(params, x, y) + 0 * torch.tensor([1.0] * 2000, device=DEVICE).sum(),
            "2000 numbers",
        ),
    ],
)
def test_a_loss_without_graphs_says_so_once_and_is_minimized(loss, said):
    graphs_of = lambda compile: fr.minimize(
        loss, begin(), fr.l1, strength=0.1, args=made(), mask=fr.select("w"), compile=compile
    )
    expected = graphs_of(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = graphs_of("eager"), graphs_of("eager")
    close(found[0].params, expected.params)
    close(found[1].params, expected.params)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 1
    assert "runs without compiled steps, with equal results" in texts[0]
    assert said in texts[0]


def test_a_compiler_that_may_write_no_file_is_told_once():
    counted = itertools.count()

    def backend(graph, inputs):
        raise PermissionError(1, "Operation not permitted", f"/cache/{next(counted)}")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = fr.minimize(squares, begin(), fr.l1, strength=0.1, args=made(), compile=backend)
    assert found.converged
    assert next(counted) > 1
    assert [str(each.message) for each in said if "Operation not permitted" in str(each.message)] == [
        "minimize runs without compiled steps, with equal results: [Errno 1] Operation not permitted: '/cache/0'"
    ]


def test_a_backend_that_is_none_is_named():
    with pytest.raises(TypeError, match="compile is 3; expected True, False or a backend"):
        fr.minimize(squares, begin(), fr.l1, args=made(), compile=3)
    with pytest.warns(UserWarning, match="with equal results: Invalid backend: 'nonsense'"):
        found = fr.minimize(squares, begin(), fr.l1, strength=0.1, args=made(), compile="nonsense")
    close(found.params, fr.minimize(squares, begin(), fr.l1, strength=0.1, args=made()).params)


def test_graphs_are_recorded_in_inference_mode():
    solve = lambda compile: fr.minimize(squares, begin(), fr.l1, strength=0.2, args=made(50), compile=compile)
    with torch.inference_mode():
        found, expected, count = both(solve)
        close(found.params, expected.params)
        x, y = (t.clone() for t in made(50))
    assert count > 3
    assert found.steps > 0
    held = lambda params: squares(params, x, y)
    solve = lambda compile: fr.minimize(held, begin(), fr.l1, strength=0.2, compile=compile)
    close(*(each.params for each in both(solve)[:2]))


def test_only_so_many_graphs_are_kept(monkeypatch):
    known: dict[int, int] = {}
    monkeypatch.setattr(graphs, "_MOST", 3)
    for k in range(5):
        assert graphs._remember(known, k, k) == k
    assert list(known) == [2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", True])
def test_compilers_find_the_same(backend):
    x, y = made(40, 10)  # As many as there are objectives in memory.
    x = x.T.contiguous().T  # And not in the order of rows.
    begun = zeros(10)
    loss = lambda w, x, y: (x @ w - y).square().mean() / 2
    solve = lambda strength: (
        lambda compile: fr.minimize(loss, begun, fr.l1, strength=strength, args=(x, y), compile=compile)
    )
    found, expected, _ = both(solve(0.1), backend)
    close(found.params, expected.params)
    assert found.steps == expected.steps
    if backend == "aot_eager":  # What is mapped takes the real compiler long.
        path = lambda compile: vmap(lambda s: solve(s)(compile).params)(STRENGTHS)
        close(*both(path, backend)[:2])
