"""Leaves on another device than the CPU, hyperparameters as numbers and as tensors of the CPU, no default device.

The meta device stands for a GPU. Like one it takes scalars of the CPU and refuses other tensors of it.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
import torch
from cases import CONSTRAINTS, DEVICE, GRADIENT_ALONE, PENALTIES, TRANSFORMS, draw, draw_fours

import funcreg as fr

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _no_default_device():
    """Also where the suite has one."""
    if DEVICE != "cpu":
        torch.set_default_device(None)
    yield
    if DEVICE != "cpu":
        torch.set_default_device(DEVICE)


def elsewhere(tree):
    return fr.tree_map(lambda w: w.to("meta"), tree)


def devices(tree):
    return {leaf.device.type for leaf in fr.tree_leaves(tree)}


def numbers_and_tensors(hyper):
    """Hyperparameters, and again with those that are no whole numbers in tensors, if there are some."""
    tensors = [torch.tensor(h, device="cpu") if isinstance(h, float) else h for h in hyper]
    return [hyper, tensors] if any(isinstance(h, float) for h in hyper) else [hyper]


@pytest.mark.parametrize("case", PENALTIES.values(), ids=PENALTIES)
def test_penalties_take_scalars_of_the_cpu(case):
    params = elsewhere(draw())
    for step, *hyper in numbers_and_tensors((0.5, *case.hyper)):
        penalty = case.penalty
        assert penalty(params, *hyper, **case.options).device.type == "meta"
        assert devices(penalty.grad(params, *hyper, **case.options)) == {"meta"}
        assert devices(penalty.prox(params, step, *hyper, **case.options)) == {"meta"}
        if case.metric:
            metric = fr.tree_map(torch.ones_like, params)
            assert devices(penalty.prox(params, step, *hyper, metric=metric, **case.options)) == {"meta"}
        weighted = penalty.given(*hyper, strength=step, **case.options)
        assert weighted(params).device.type == "meta"
        assert devices(weighted.grad(params)) == {"meta"}


@pytest.mark.parametrize("case", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_constraints_take_scalars_of_the_cpu(case):
    params = elsewhere(draw_fours())
    for hyper in numbers_and_tensors(case.hyper):
        assert case.penalty(params, *hyper, **case.options).device.type == "meta"
        assert devices(case.penalty.project(params, *hyper, **case.options)) == {"meta"}


@pytest.mark.parametrize("case", GRADIENT_ALONE.values(), ids=GRADIENT_ALONE)
def test_penalties_without_a_proximal_operator_do_too(case):
    params = elsewhere(draw())
    for hyper in numbers_and_tensors(case.hyper):
        assert case.penalty(params, *hyper, **case.options).device.type == "meta"
        assert devices(case.penalty.grad(params, *hyper, **case.options)) == {"meta"}


@pytest.mark.parametrize("case", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_do_too(case):
    params, grads = elsewhere(draw()), elsewhere(draw(1))
    for factor in (1.0, torch.tensor(1.0, device="cpu")):
        tx = case.make(factor)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
        assert devices(updates) == {"meta"}
        assert devices(state) <= {"meta"}


def _fused(tx, params):
    step = fr.fuse(tx, backend="eager")
    params, state = step.init(params)
    return step(params, params, state)


def _regularized(params, strength, penalty=fr.l1):
    w = torch.nn.Parameter(params["w"].clone())
    try:
        return fr.regularize(torch.optim.SGD({"w": w}.items(), lr=0.1), penalty, strength=strength)
    finally:
        assert torch.equal(w, params["w"])


def _squares(params):
    return (params["w"] - 2).square().sum()


WITHOUT_NUMBERS = {
    "the value": lambda params, x: (x * fr.l1)(params),
    "the value of a sum": lambda params, x: (fr.l1 + x * fr.half_l2)(params),
    "a hyperparameter": lambda params, x: fr.elastic(params, x, 0.5),
    "the gradient": lambda params, x: fr.elastic.grad(params, x, 0.5),
    "the step of a proximal operator": lambda params, x: fr.l1.prox(params, {"w": x}),
    "a transform": lambda params, x: (tx := fr.prox_sgd(0.1, fr.l1, strength=x)).update(
        params, tx.init(params), params
    ),
    "a fused step": lambda params, x: _fused(fr.prox_sgd(0.1, fr.l1, strength=x), params),
    "regularize": _regularized,
    "regularize, a tree": lambda params, x: _regularized(params, {"w": x}),
    "regularize, inside of a penalty": lambda params, x: _regularized(params, 1.0, x * fr.l1),
    "minimize": lambda params, x: fr.minimize(_squares, params, fr.l1, strength=x),
    "a path": lambda params, x: fr.regularization_path(_squares, params, fr.l1, strengths=x.reshape(1)),
}


@pytest.mark.parametrize("use", WITHOUT_NUMBERS.values(), ids=WITHOUT_NUMBERS)
def test_a_strength_without_numbers_is_refused_beside_leaves_that_have_some(use):
    with pytest.raises(ValueError, match=r"got .* on meta, a device without numbers; expected a tensor on cpu"):
        use({"w": torch.ones(3, device="cpu")}, torch.tensor(0.5, device="meta"))


# The suite itself


HERE_ALONE = {
    *("test_articles.py", "test_catalogue.py", "test_examples.py", "test_pages.py", "test_public.py"),
    *("test_integrations.py", "test_architectures.py", "test_traced_architectures.py", "test_distributed.py"),
    "processes.py",
}


@functools.cache
def calls():
    """All calls of tests that run on every device, with their place."""
    return [
        (f"{path.name}:{node.lineno}", node)
        for path in sorted(TESTS.glob("*.py"))
        for node in (ast.walk(ast.parse(path.read_text())) if path.name not in HERE_ALONE else ())
        if isinstance(node, ast.Call)
    ]


def test_numbers_of_a_generator_are_drawn_on_the_cpu_and_moved():
    named = [(place, {keyword.arg for keyword in call.keywords}) for place, call in calls()]
    assert [place for place, names in named if "generator" in names and not names & {"device", None}] == []


def test_arrays_come_from_the_cpu():
    arrays = [(place, call) for place, call in calls() if ast.unparse(call.func).endswith(".numpy")]
    assert [place for place, call in arrays if not ast.unparse(call.func).endswith("cpu().numpy")] == []


def test_autocast_is_that_of_the_device_under_test():
    assert [place for place, call in calls() if ast.unparse(call).startswith("torch.autocast('cpu'")] == []
