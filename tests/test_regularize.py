"""Penalties on torch's own optimizers: their solutions, their steps, and what may go wrong around them."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import CONSTRAINTS, DEVICE, PENALTIES, assert_equal, cpu_only, draw_fours, joint, normal
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.func import grad
from torch.optim import lr_scheduler
from torch.testing import assert_close

import funcreg as fr
from funcreg.networks.coupled import landed_by
from funcreg.torch_optim import denominators, followed_steps
from funcreg.torch_optim.landing import CompiledRows

Make = Callable[..., optim.Optimizer]


class Row(NamedTuple):
    make: Make  # From parameters to an optimizer.
    steps: int = 450  # Until it is at the solution of the lasso.
    buffered: bool = False  # Whether it takes some steps until a buffer holds its sum of gradients.
    resumes: float = 0.0  # By how much torch itself goes on otherwise after a state was loaded.


OPTIMIZERS = {
    "SGD": Row(lambda p, **o: optim.SGD(p, **{"lr": 0.1, **o})),
    "SGD, momentum": Row(lambda p, **o: optim.SGD(p, **{"lr": 0.05, "momentum": 0.9, **o}), buffered=True),
    "SGD, Nesterov": Row(
        lambda p, **o: optim.SGD(p, **{"lr": 0.02, "momentum": 0.9, "nesterov": True, **o}), buffered=True
    ),
    "SGD, dampening": Row(
        lambda p, **o: optim.SGD(p, **{"lr": 0.1, "momentum": 0.8, "dampening": 0.5, **o}), buffered=True
    ),
    "Adam": Row(lambda p, **o: optim.Adam(p, **{"lr": 0.01, **o})),
    "AdamW": Row(lambda p, **o: optim.AdamW(p, **{"lr": 0.01, "weight_decay": 0.0, **o})),
    "Adam, amsgrad": Row(lambda p, **o: optim.Adam(p, **{"lr": 0.02, "amsgrad": True, **o})),
    # The product of momenta is of float32, and becomes float64 when it is loaded.
    "NAdam": Row(lambda p, **o: optim.NAdam(p, **{"lr": 0.01, **o}), resumes=1e-10),
    "RAdam": Row(lambda p, **o: optim.RAdam(p, **{"lr": 0.01, **o}), 1100),
    "Adamax": Row(lambda p, **o: optim.Adamax(p, **{"lr": 0.01, **o})),
    "RMSprop": Row(lambda p, **o: optim.RMSprop(p, **{"lr": 0.003, **o}), 1100),
    "RMSprop, centered": Row(lambda p, **o: optim.RMSprop(p, **{"lr": 0.01, "centered": True, "eps": 0.1, **o})),
    "RMSprop, momentum": Row(
        lambda p, **o: optim.RMSprop(p, **{"lr": 0.001, "momentum": 0.9, "alpha": 0.9, **o}), buffered=True
    ),
    "Adagrad": Row(lambda p, **o: optim.Adagrad(p, **{"lr": 0.1, **o})),
    "Adagrad, decay": Row(lambda p, **o: optim.Adagrad(p, **{"lr": 0.1, "lr_decay": 1e-3, **o})),
    "Adadelta": Row(lambda p, **o: optim.Adadelta(p, **{"lr": 1.0, **o}), 750),
    "Adafactor": Row(lambda p, **o: optim.Adafactor(p, **{"lr": 0.02, **o}), 1500),
}
every_optimizer = pytest.mark.parametrize("row", OPTIMIZERS.values(), ids=OPTIMIZERS)

SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n / 100)),
    "LambdaLR, warmup from 0": lambda o: lr_scheduler.LambdaLR(o, lambda n: min(n / 20, 1.0)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.997),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 100, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [70, 300], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 50),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 70),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.997),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 670),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 670),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 170),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 50), lr_scheduler.ExponentialLR(o, 0.997)], o
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 50), lr_scheduler.ExponentialLR(o, 0.997)], [50]
    ),
    "CyclicLR, with momentum": lambda o: lr_scheduler.CyclicLR(o, 0.005, 0.02, 50),
    "OneCycleLR, with momentum": lambda o: lr_scheduler.OneCycleLR(o, 0.02, 500),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=150),
    "SWALR": lambda o: optim.swa_utils.SWALR(o, 0.005, 50),
}


@functools.cache
def lasso() -> tuple[Tensor, Tensor, Tensor]:
    """The Gram matrix and the moments of the diabetes data, and scikit-learn's solution for a strength of 0.1."""
    x, y = load_diabetes(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    fit = Lasso(alpha=0.1, fit_intercept=False, tol=1e-15, max_iter=10**6).fit(x, y)
    known = [torch.tensor(each).to(DEVICE) for each in (x, y, fit.coef_)]
    return known[0].T @ known[0] / len(x), known[0].T @ known[1] / len(x), known[2]


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(normal(torch.Generator().manual_seed(seed), *shape, dtype=dtype))


def solved(make: Make, steps: int, schedule: Callable[[optim.Optimizer], Any] | None = None, **options: Any) -> Tensor:
    gram, moment, _ = lasso()
    w = nn.Parameter(torch.full_like(moment, 0.1))
    optimizer = make([w], **options)
    fr.regularize(optimizer, fr.l1, strength=0.1)
    scheduler = schedule and schedule(optimizer)
    for _ in range(steps):
        w.grad = gram @ w.detach() - moment
        if options.get("maximize"):
            w.grad = -w.grad
        optimizer.step()
        if scheduler is not None:
            scheduler.step(*((1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()))
    return w.detach()


def assert_is_lasso(w: Tensor) -> None:
    solution = lasso()[2]
    assert_equal(w == 0, solution == 0)
    assert_equal(w, solution, atol=1e-6)


# The problem that is solved


@every_optimizer
def test_it_ends_at_the_solution_of_scikit_learn(row):
    assert_is_lasso(solved(row.make, row.steps))


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize(("name", "lr"), [("SGD, momentum", 0.05), pytest.param("AdamW", 0.02, marks=pytest.mark.slow)])
def test_it_ends_there_under_every_scheduler(name, lr, schedule):
    assert_is_lasso(solved(OPTIMIZERS[name].make, 500, schedule, lr=lr))


@every_optimizer
def test_a_step_down_a_slope_and_the_proximal_step_of_the_opposite_slope_cancel(row):
    """So that step and metric are those of the optimizer, at the first step, too."""
    slopes = {"groups.0.params.0": weight(4, 3, seed=1).detach(), "groups.0.params.1": weight(5, seed=2).detach()}
    linear = fr.penalty(
        gradient=lambda w, c: c + 0 * w, proximal=lambda w, step, c: w - step * c, separable=True, bounds={}
    )(lambda w, c: c * w)
    params = [weight(4, 3), weight(5)]
    optimizer = row.make(params)
    fr.regularize(optimizer, linear, {name: -slope for name, slope in slopes.items()})
    before = [w.detach().clone() for w in params]
    for step in range(500 if row.buffered else 12):
        for w, slope in zip(params, slopes.values(), strict=True):
            w.grad = slope.clone()
        optimizer.step()
        if row.buffered and step < 490:
            before = [w.detach().clone() for w in params]
    assert_equal([w.detach() for w in params], before, atol=1e-10)


VARIANTS = {
    "foreach": {"foreach": True},
    "one by one": {"foreach": False},
    "maximize": {"maximize": True},
    "tensor lr": {"lr": "tensor", "foreach": False},
    "fused": {"fused": True},
}
FUSED = ("SGD", "SGD, momentum", "SGD, dampening", "Adam", "AdamW", "Adam, amsgrad", "Adagrad", "Adagrad, decay")


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@every_optimizer
def test_variants_of_an_optimizer_take_the_same_steps(row, variant):
    name = next(name for name, each in OPTIMIZERS.items() if each is row)
    if "fused" in variant and name not in FUSED:
        return  # There is none.
    options = dict(variant)
    if options.get("lr") == "tensor":
        options["lr"] = torch.tensor(row.make([weight(1)]).param_groups[0]["lr"], dtype=torch.float64)
    assert_equal(solved(row.make, 8, **options), solved(row.make, 8), atol=1e-11)


@pytest.mark.parametrize("name", ["SGD, momentum", "AdamW", "RAdam", "RMSprop", "Adadelta"])
def test_a_learning_rate_in_a_tensor_of_float32_rounds_no_threshold(name):
    exact, number = weight(6), weight(6)
    for w, strength in ((exact, torch.tensor(0.07, dtype=torch.float64)), (number, 0.07)):
        optimizer = OPTIMIZERS[name].make([w], lr=torch.tensor(0.001), foreach=False)
        fr.regularize(optimizer, fr.l1, strength=strength)
        for seed in (1, 2, 3):
            stepped(optimizer, w, seed=seed)
    assert_equal(number.detach(), exact.detach(), atol=1e-15)


@pytest.mark.parametrize("name", ["AdamW", "Adam, amsgrad", "NAdam", "RAdam", "Adagrad, decay", "Adafactor"])
def test_counters_that_lie_on_a_device_are_computed_with_and_not_read(name, monkeypatch):
    row = OPTIMIZERS[name]
    expected = solved(row.make, 12)
    monkeypatch.setattr(denominators, "_steps", lambda state: state["step"].double())
    assert_equal(solved(row.make, 12), expected, atol=1e-9)


@pytest.mark.parametrize("name", ["SGD, momentum", "AdamW", "RMSprop", "Adagrad"])
def test_derivatives_run_through_a_differentiable_step(name):
    def landed(start: Tensor) -> Tensor:
        w = start.clone()
        optimizer = OPTIMIZERS[name].make([w], differentiable=True, foreach=False)
        fr.regularize(optimizer, fr.l1, strength=0.1)
        for seed in (1, 2):
            w.grad = weight(6, seed=seed).detach()
            optimizer.step()
        return w

    start = weight(6)
    (slope,) = torch.autograd.grad(landed(start).sum(), start)
    kept = landed(start.detach().clone().requires_grad_()) != 0
    assert_equal(slope, kept.to(slope.dtype), atol=1e-12)


# The same steps as the functional optimizers


def by_hook(make: Make, params: dict[str, Tensor], loss: Any, steps: int, *args: Any, **kwargs: Any) -> Any:
    module = nn.ParameterDict({name: nn.Parameter(w.clone()) for name, w in params.items()})
    optimizer = make(module.parameters())
    fr.regularize(optimizer, *args, module=module, **kwargs)
    for _ in range(steps):
        for name, g in grad(loss)({name: w.detach() for name, w in module.items()}).items():
            module[name].grad = g
        optimizer.step()
    return {name: w.detach() for name, w in module.items()}


def by_chain(tx: fr.Transform, params: dict[str, Tensor], loss: Any, steps: int) -> Any:
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grad(loss)(params), state, params)
        params = fr.apply_updates(params, updates)
    return params


def quadratic(params: dict[str, Tensor]) -> Tensor:
    return sum([((i + 1) * (w - 0.3)).square().sum() for i, w in enumerate(params.values())]) / 2


FUNCTIONAL: dict[str, tuple[Make, Callable[..., fr.Transform]]] = {
    "SGD": (lambda p: optim.SGD(p, 0.05), lambda *a, **k: fr.prox_sgd(0.05, *a, **k)),
    "momentum": (lambda p: optim.SGD(p, 0.02, 0.8), lambda *a, **k: fr.prox_sgd(0.02, *a, momentum=0.8, **k)),
    "Nesterov": (
        lambda p: optim.SGD(p, 0.02, 0.8, nesterov=True),
        lambda *a, **k: fr.prox_sgd(0.02, *a, momentum=0.8, nesterov=True, **k),
    ),
    "Adam": (lambda p: optim.Adam(p, 0.05), lambda *a, **k: fr.prox_adam(0.05, *a, **k)),
    "AdamW": (
        lambda p: optim.AdamW(p, 0.05, weight_decay=0.1),
        lambda *a, **k: fr.prox_adam(0.05, *a, weight_decay=0.1, **k),
    ),
}
SUMS = {
    "a sum": ((0.1 * fr.l1 + fr.half_l2.given(strength=0.3),), {}),
    "a sum of groups": ((0.1 * fr.l1 + 0.1 * fr.group_lasso.given(mask=fr.matrices),), {}),
    "a sum with a mask by name": ((0.1 * fr.l1.given(mask=fr.select("*a")) + fr.half_l2,), {}),
    "weights": (({"a": 0.1, "b": 1.0, "c": 0.0} * fr.l1,), {}),
    "inner steps": ((fr.nuclear,), {"inner_steps": 3, "mask": fr.matrices}),
    "coupled": ((fr.coupled(fr.group_lasso, {"a": 0, "c": 0}),), {}),
    "strengths by name": ((fr.l1,), {"strength": {"a": 0.1, "b": 1.0, "c": 0.0}}),
    "a schedule": ((fr.l1,), {"strength": lambda n: 0.1 * torch.as_tensor(n + 1).double()}),
    "a scheduled hyperparameter": ((fr.elastic, lambda n: 0.1 * torch.as_tensor(n + 1).double(), 0.5), {}),
    "a mask of bools": ((fr.l1,), {"mask": {"a": True, "b": False, "c": True}}),
    "a mask by name": ((fr.l1,), {"mask": ~fr.select("b"), "strength": {"a": 0.1, "b": 1.0, "c": 0.2}}),
}


@pytest.mark.filterwarnings("ignore:.* would decay twice")
@pytest.mark.parametrize("given", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize("functional", FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_its_steps_are_those_of_the_functional_optimizer(functional, given):
    (make, chain), (args, kwargs) = functional, given
    # Adam itself shares inner steps only through proximal_step; plain descent has no metric.
    other = {k: v for k, v in kwargs.items() if k != "inner_steps" or "prox_adam" in chain.__code__.co_names}
    params = {"a": weight(4, 3).detach(), "b": weight(3, 2, seed=1).detach(), "c": weight(4, seed=2).detach()}
    assert_equal(
        by_hook(make, params, quadratic, 6, *args, **kwargs),
        by_chain(chain(*args, **other), params, quadratic, 6),
        atol=1e-12,
    )


WITH_STRENGTH = {
    **{name: (case, {"strength": 0.3}) for name, case in PENALTIES.items()},
    **{name: (case, {}) for name, case in CONSTRAINTS.items()},  # Which hold whatever their strength.
}


@pytest.mark.parametrize(("case", "strong"), WITH_STRENGTH.values(), ids=WITH_STRENGTH)
@pytest.mark.parametrize("functional", ["momentum", "Adam"])
def test_every_penalty_takes_the_steps_of_the_functional_optimizer(functional, case, strong):
    (make, chain), tree = FUNCTIONAL[functional], draw_fours()
    matrix = tree["head"].weight
    args, kwargs = (case.penalty, *case.hyper), {**case.options, **strong}
    params = {"a": matrix.clone(), "b": matrix.flip(0).clone() - 0.1}
    assert_equal(
        by_hook(make, params, quadratic, 2, *args, **kwargs),
        by_chain(chain(*args, **kwargs), params, quadratic, 2),
        atol=1e-10,
    )


# What a step does not touch


def stepped(optimizer: optim.Optimizer, *params: Tensor, seed: int = 1) -> None:
    """A step with some gradients."""
    for i, w in enumerate(params):
        w.grad = weight(*w.shape, seed=seed + i, dtype=w.dtype).detach()
    optimizer.step()


@every_optimizer
def test_a_parameter_without_a_gradient_stays_where_it_is(row):
    used, unused = weight(3), weight(3, seed=1)
    optimizer = row.make([used, unused])
    fr.regularize(optimizer, fr.l1, strength=0.1)
    stepped(optimizer, used, unused)
    before = unused.detach().clone()
    unused.grad = None
    stepped(optimizer, used)
    assert_equal(unused.detach(), before)
    stepped(optimizer, used, unused)  # Which have taken different numbers of steps by now.
    alone = weight(3, seed=1)
    other = row.make([alone])
    fr.regularize(other, fr.l1, strength=0.1)
    stepped(other, alone, seed=2)
    stepped(other, alone, seed=2)
    assert_equal(unused.detach(), alone.detach(), atol=1e-12)


def test_one_without_any_gradient_is_said():
    optimizer = optim.SGD([weight(3)], 0.1)
    fr.regularize(optimizer, fr.l1)
    with pytest.warns(UserWarning, match="none of its parameters has a gradient"):
        optimizer.step()


@pytest.mark.parametrize(("between", "said"), [
    ("nothing", True),  # As where a copy of the module gets the gradients.
    ("steps of a layer that is not frozen", False),
    ("a gradient at every fifth step", False),  # As a critic takes its steps between two of a generator.
])  # fmt: skip
def test_an_optimizer_whose_model_is_no_longer_trained_is_said_once(between, said, recwarn):
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    optimizer = optim.SGD(net.parameters(), 0.1)
    fr.regularize(optimizer, fr.l1, strength=1e-3, module=net, mask=fr.select("0.weight"))
    stepped(optimizer, *net.parameters())
    optimizer.zero_grad()
    for k in range(45):
        if between.startswith("steps"):
            stepped(optimizer, *net[1].parameters())
        elif between.startswith("a gradient") and not k % 5:
            stepped(optimizer, *net.parameters())
        optimizer.zero_grad()
        optimizer.step()
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == said
    assert not said or "in any of 20 steps after the first 1: no parameter of the optimizer had a" in messages[0]


def test_the_mask_false_means_what_it_says():
    w = weight(3)
    optimizer, before = optim.Adam([w], 0.1), w.detach().clone()
    handle = fr.regularize(optimizer, fr.l1, mask=False)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert_equal(w.detach(), before)
    assert handle.penalty_value() == 0
    assert "on 0 of 1 parameters" in repr(handle)


def test_leaves_of_a_mask_alone_are_penalized():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    layers = fr.select(nn.Linear, module=model) & fr.matrices
    for mask in (
        layers,
        fr.matrices,
        fr.select("*.weight", min_ndim=2),
        lambda tree: {k: tree[k].ndim > 1 for k in tree},
    ):
        optimizer = optim.SGD(model.parameters(), 1.0)
        handle = fr.regularize(optimizer, fr.l1, strength=1e6, module=model, mask=mask)
        before = copy.deepcopy(model.state_dict())
        for w in model.parameters():
            w.grad = torch.zeros_like(w)
        optimizer.step()
        assert [name for name, w in model.named_parameters() if not w.any()][:1] == ["0.weight"]
        assert_equal(model[0].bias.detach(), before["0.bias"])
        assert_equal(model[1].weight.detach(), before["1.weight"])
        assert "on 2 of 6 parameters" in repr(handle)
        model.load_state_dict(before)


def test_groups_that_come_later_are_penalized_too():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    optimizer = optim.AdamW(model[0].parameters(), 0.1)
    fr.regularize(optimizer, fr.l1, strength=1e3, module=model, mask=fr.matrices)
    stepped(optimizer, *model[0].parameters())
    optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.2})
    stepped(optimizer, *model.parameters())
    assert not model[1].weight.any()
    assert model[1].bias.all()
    optimizer.add_param_group({"params": [weight(2, 2)]})
    with pytest.raises(ValueError, match=r"parameter 0 of param group 2, of shape .2, 2., is not in module"):
        stepped(optimizer, *model.parameters())


def test_each_group_has_its_own_learning_rate_and_momentum():
    a, b = weight(3), weight(3, seed=1)
    optimizer = optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.01, "momentum": 0.5}])
    fr.regularize(optimizer, fr.l1, strength=0.5)
    expected = [fr.l1.prox(a.detach(), 0.05), fr.l1.prox(b.detach(), 0.01)]
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    optimizer.step()
    assert_equal([a.detach(), b.detach()], expected, atol=1e-15)


# Names


def test_names_come_from_the_optimizer_where_it_has_them():
    model = nn.Linear(4, 3)
    optimizer = optim.SGD(model.named_parameters(), 0.1)
    assert "1 of 2" in repr(fr.regularize(optimizer, fr.l1, mask=fr.select("bias")))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_name_of_the_module_that_the_optimizer_was_not_given_is_told(frozen):
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    net[0].requires_grad_(not frozen)
    optimizer = optim.SGD(net[1].parameters(), 0.1)
    said = r"'0\.weight'\) matches no leaf; .* has 0\.weight, 0\.bias, too, which the optimizer was not given"
    said += " and which are frozen" if frozen else r"\."
    with pytest.raises(ValueError, match=said):
        fr.regularize(optimizer, fr.l1, module=net, mask=fr.select("0.weight"))
    with pytest.raises(ValueError, match=r"write mask=False\. The module has 0\.weight"):
        fr.regularize(optim.SGD([net[1].bias], 0.1), fr.l1, module=net, mask=fr.matrices)
    with pytest.raises(ValueError, match=r"is not in module, .* a part of a module the whole, and a mask such as sel"):
        fr.regularize(optim.SGD(net.parameters(), 0.1), fr.l1, module=net[0])


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapper, lambda m: torch.compile(m, backend="eager")], ids=["parallel", "compiled"])
def test_names_are_those_without_wrappers(wrap):
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    wrapped = wrap(net)
    raw = dict.fromkeys(dict(wrapped.named_parameters()), True)
    units = fr.coupled(fr.group_lasso, fr.channel_groups(net))
    for given in (
        {"mask": fr.select("0.weight")},
        {"mask": raw},
        {"strength": dict.fromkeys(raw, 1.0)},
    ):
        fr.regularize(optim.SGD(wrapped.parameters(), 0.1), fr.l1, module=wrapped, **given)
    optimizer = optim.SGD(wrapped.parameters(), 0.1)
    fr.regularize(optimizer, units, strength=1e3, module=wrapped)
    for w in wrapped.parameters():
        w.grad = torch.zeros_like(w)
    optimizer.step()
    assert not net[0].weight.any()
    assert not net[2].weight.any()


# Groups over leaves


def test_coupled_leaves_take_one_step_over_all_groups():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    units = fr.coupled(fr.group_lasso, fr.channel_groups(net))
    optimizer = optim.AdamW([{"params": net[0].parameters()}, {"params": net[2].parameters()}], 0.1)
    fr.regularize(optimizer, units, strength=0.1, module=net)
    stepped(optimizer, *net.parameters())
    optimizer.param_groups[1]["lr"] = 0.2
    with pytest.raises(ValueError, match=r"couples leaves, which have to take one step; .* differ, 0.1 and 0.2"):
        stepped(optimizer, *net.parameters())
    other = optim.SGD([{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.2}], 0.1)
    for again in ({}, {"lr": 0.1, "momentum": 0.9}):
        other.param_groups[1].update(again)
        with pytest.raises(
            ValueError, match=r"step; those of '0.bias' and '2.weight', which share groups, differ, 0.1"
        ):
            fr.regularize(other, units, strength=0.1, module=net)


def test_families_have_learning_rates_of_their_own():
    shapes, trained = {"a": (4, 3), "b": (4,), "c": (3, 2), "d": (3,)}, []
    families = [{"a": 0, "b": 0}, {"c": 0, "d": 0}]
    for several in (False, True):
        params = {name: weight(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
        rows = [[(name, params[name]) for name in family] for family in families]
        optimizer = optim.SGD([{"params": rows[0]}, {"params": rows[1], "lr": 0.2, "momentum": 0.5}], 0.1)
        if several:
            for family in families:
                mask = {name: name in family for name in params}
                fr.regularize(optimizer, fr.coupled(fr.group_lasso, [family]), strength=0.5, mask=mask)
        else:
            units = fr.coupled(fr.group_lasso, families)
            fr.regularize(optimizer, units, strength=0.5, weights="sqrt_size")
            fr.regularize(optimizer, fr.max_norm, 100.0)  # Which changes nothing.
        for seed in range(5):
            stepped(optimizer, *params.values(), seed=seed)
        trained.append(params)
    assert 0 < sum([int((w == 0).sum()) for w in trained[0].values()]) < 25
    by_hand = {name: weight(*shape, seed=i).detach() for i, (name, shape) in enumerate(shapes.items())}
    for family, lr, gain in ((families[0], 0.1, 1.0), (families[1], 0.2, 2.0)):
        tree, unit = {name: by_hand[name] for name in family}, fr.coupled(fr.group_lasso, [family])
        momentum, buffer = 1 - 1 / gain, None
        for seed in range(5):
            grads = {n: weight(*w.shape, seed=seed + [*shapes].index(n)).detach() for n, w in tree.items()}
            buffer = grads if buffer is None else {n: momentum * buffer[n] + g for n, g in grads.items()}
            reached = {n: w - lr * buffer[n] for n, w in tree.items()}
            tree = unit.prox(reached, 0.5 * lr * gain, weights="sqrt_size")
        for name, w in tree.items():
            assert_equal(trained[0][name].detach(), w, atol=1e-12)


@every_optimizer
def test_a_family_whose_learning_rate_is_zero_stays_where_it_is(row):
    params = {each: weight(4, 3, seed=i) for i, each in enumerate("abcd")}
    rows, families = (
        [[(each, params[each]) for each in own] for own in ("ab", "cd")],
        [{"a": 0, "b": 0}, {"c": 0, "d": 0}],
    )
    optimizer = row.make([{"params": rows[0], "lr": 0.0}, {"params": rows[1]}])
    fr.regularize(optimizer, fr.coupled(fr.group_lasso, families), strength=0.3)
    before = {name: w.detach().clone() for name, w in params.items()}
    for rate in (0.0, torch.tensor(0.0, device=DEVICE)):
        optimizer.param_groups[0]["lr"] = rate
        stepped(optimizer, *params.values())
    alone = {each: weight(4, 3, seed=i) for i, each in enumerate("abcd")}
    other = row.make([(each, alone[each]) for each in "cd"])
    fr.regularize(other, fr.coupled(fr.group_lasso, families[1:]), strength=0.3)
    for _ in range(2):
        for i, w in enumerate(alone.values()):
            w.grad = weight(*w.shape, seed=1 + i).detach()
        other.step()
    for name, w in params.items():
        assert_equal(w.detach(), before[name] if name in "ab" else alone[name].detach(), atol=1e-12)


def test_sums_with_groups_land_each_leaf_by_its_own_rate():
    params = {"a": weight(4, 3), "b": weight(4, seed=1), "c": weight(5, seed=2)}
    optimizer = optim.SGD([{"params": [(n, w)], "lr": 0.1 if n < "c" else 0.3} for n, w in params.items()], 0.1)
    fr.regularize(optimizer, 0.2 * fr.half_l2 + fr.coupled(fr.group_lasso, {"a": 0, "b": 0}), strength=0.5)
    before = {name: w.detach().clone() for name, w in params.items()}
    stepped(optimizer, *params.values())
    reached = {name: before[name] - (0.1 if name < "c" else 0.3) * w.grad for name, w in params.items()}
    assert_equal(params["c"].detach(), reached["c"] / (1 + 0.3 * 0.5 * 0.2), atol=1e-12)
    wide = fr.coupled(fr.group_lasso, {"a": 0, "b": 0}).prox({name: reached[name] for name in "ab"}, 0.1 * 0.5)
    for name in "ab":
        assert_equal(params[name].detach(), wide[name] / (1 + 0.1 * 0.5 * 0.2), atol=1e-12)


@every_optimizer
def test_leaves_without_a_gradient_count_in_their_groups_and_stay_where_they_are(row):
    params = {"a": weight(4, 3), "b": weight(4, seed=1), "c": weight(4, seed=2), "d": weight(4, 2, seed=3)}
    optimizer = row.make(params.items())
    fr.regularize(optimizer, fr.coupled(fr.group_lasso, [{"a": 0, "b": 0, "c": 0}, {"d": 0}]), strength=1.5)
    for names in ("ab", "abcd", "a", "b", "d", "cd", "ac"):  # "c" has no state at first.
        before = {name: w.detach().clone() for name, w in params.items()}
        for w in params.values():
            w.grad = None
        stepped(optimizer, *[params[name] for name in names])
        for name, w in params.items():
            assert name in names or w.detach().equal(before[name])
            assert w.isfinite().all()
    for _ in range(200):
        if params["d"].norm() <= 0.5 * before["d"].norm():
            break
        for w in params.values():
            w.grad = torch.zeros_like(w)
        params["b"].grad = None
        optimizer.step()
    assert params["d"].norm() <= 0.5 * before["d"].norm() or isinstance(optimizer, optim.Adadelta)


def test_steps_in_which_leaves_have_no_gradient_are_those_of_a_chain():
    trained = []
    for chain in (False, True):
        params = {"a": weight(4, 3), "b": weight(4, seed=1), "c": weight(4, 2, seed=2)}
        penalty = fr.coupled(fr.group_lasso, [{"a": 0, "b": 0}, {"c": 0}])
        if chain:
            make = lambda lr, penalty=penalty: fr.prox_sgd(lr, penalty, strength=0.7)
            optimizer = fr.Optimizer(params.items(), make, lr=0.1, compile=False)
        else:
            optimizer = optim.SGD(params.items(), 0.1)
            fr.regularize(optimizer, penalty, strength=0.7)
        for seed, names in enumerate(("abc", "a", "b", "c", "ac", "bc", "abc")):
            for w in params.values():
                w.grad = None
            stepped(optimizer, *[params[name] for name in names], seed=seed)
        trained.append({name: w.detach() for name, w in params.items()})
    assert_equal(*trained, atol=1e-12)


def mixture() -> nn.Module:
    """A mixture of experts, of which some get no row; their outputs form groups with those of the layer before."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.route, self.last = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 3)
            self.experts = nn.ModuleList([nn.Sequential(*map(nn.Linear, (6, 8), (8, 6))) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            share, chosen = self.route(x).softmax(-1).max(-1)
            y = torch.zeros_like(x)
            for k, expert in enumerate(self.experts):
                rows = (chosen == k).nonzero()[:, 0]
                if len(rows):
                    y[rows] = expert(x[rows]) * share[rows, None]
            return self.last(x + y)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mixture().double()


@pytest.mark.slow
@every_optimizer
def test_a_mixture_of_experts_trains_where_some_get_no_row(row):
    net = mixture()
    families = [{f"experts.{k}.0.weight": 0, f"experts.{k}.0.bias": 0} for k in range(4)]
    families.append({"first.weight": 0, "first.bias": 0, **{f"experts.{k}.1.weight": 0 for k in range(4)}})
    optimizer = row.make(net.parameters())
    fr.regularize(optimizer, fr.coupled(fr.group_lasso, families), strength=1e-3, module=net)
    generator, missing = torch.Generator().manual_seed(0), set()
    for _ in range(24):
        x = torch.randn(4, 6, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        still = {n: w.detach().clone() for n, w in net.named_parameters() if w.grad is None}
        missing.update(still)
        optimizer.step()
        assert all([w.equal(still.get(n, w)) and w.isfinite().all() for n, w in net.named_parameters()])
    assert len(missing) > 4


def test_leaves_that_never_have_a_gradient_are_said_once():
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2)).double()
    units = fr.coupled(fr.group_lasso, [{"0.weight": 0, "1.weight": 1}, {"1.bias": 0, "2.weight": 1}])
    optimizer = optim.Adam(net.parameters())
    fr.regularize(optimizer, units, strength=0.1, module=net)
    said = []
    for _ in range(200):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            stepped(optimizer, net[0].weight, net[1].weight, net[2].weight)
        said += [str(each.message) for each in caught]
    assert len(said) == 1
    assert re.match(
        r"'1.bias' had no gradient in any of 100 steps of regularize\(Adam, coupled_group_lasso, ...\)", said[0]
    )


def test_nothing_is_called_dead_for_a_part_that_is_zero():
    params = {"a": weight(4, 3), "b": weight(4, seed=1), "c": weight(4, seed=2)}
    optimizer = optim.SGD(params.items(), 0.1)
    strength = lambda n: 1e3 * (n == 9)
    handle = fr.regularize(optimizer, fr.coupled(fr.group_lasso, [{"a": 0, "b": 0}, {"c": 0}]), strength=strength)
    for i in range(10):
        for w in params.values():
            w.grad = None
        stepped(optimizer, *list(params.values())[: 1 if i else 3])
    assert handle.steps == 10
    assert not params["a"].any()
    assert params["b"].all()


def test_a_set_that_couples_leaves_follows_any_optimizer_and_rates():
    a, b = weight(3, 3), weight(3, 3, seed=1)
    optimizer = optim.Rprop([{"params": [("a", a)]}, {"params": [("b", b)], "lr": 0.2}], 0.1)
    ball = fr.Constraint(lambda params: fr.tree_map(lambda w: 0.5 * w / fr.global_norm(params), params))
    fr.regularize(optimizer, ball)
    stepped(optimizer, a, b)
    assert_close(torch.cat([a, b]).norm().detach(), torch.tensor(0.5, dtype=torch.float64))


def test_groups_that_are_frozen_or_not_in_the_optimizer_are_told_at_once():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    units = lambda *layers: fr.coupled(fr.group_lasso, fr.channel_groups(net, layers=layers or None))
    net[0].requires_grad_(False)
    trained = [w for w in net.parameters() if w.requires_grad]
    named = [(name, w) for name, w in net.named_parameters() if w.requires_grad]
    for given, count in ((trained, 4), (named, 4), (trained[:1], 1)):
        with pytest.raises(
            ValueError,
            match=rf"groups names '0.weight', '0.bias'.*, of the module, but not among the {count} parameters that",
        ):
            fr.regularize(optim.SGD(given, 0.1), units(), module=net)
    with pytest.raises(ValueError, match=r"given\. They are frozen, requires_grad=False\. Leave their layers out"):
        fr.regularize(optim.SGD(trained, 0.1), units(), module=net)
    with pytest.raises(ValueError, match=r"'0.weight', which is no leaf; .* frozen or that an optimizer was not given"):
        fr.regularize(optim.SGD(named, 0.1), units())
    with pytest.warns(
        UserWarning, match=r"in each family .* is frozen, by requires_grad=False: '0.weight', '0.bias'\."
    ):
        fr.regularize(optim.SGD(net.parameters(), 0.1), units("0"), module=net)
    fr.regularize(optim.SGD(net.parameters(), 0.1), units(), module=net)  # There are others.
    fr.regularize(optim.SGD(trained, 0.1), units("2"), module=net)


def test_a_set_that_couples_leaves_holds_whatever_has_a_gradient():
    a, b = weight(3), weight(3, seed=1)
    optimizer = optim.SGD([("a", a), ("b", b)], 0.1)
    ball = fr.Constraint(lambda params: fr.tree_map(lambda w: 0.5 * w / fr.global_norm(params), params))
    fr.regularize(optimizer, ball)
    stepped(optimizer, a)
    assert_close(torch.cat([a, b]).norm().detach(), torch.tensor(0.5, dtype=torch.float64))
    a.grad = None
    b.requires_grad_(False)
    with pytest.raises(ValueError, match=r"couples leaves, and b of them are frozen"):
        stepped(optimizer, a)


# Mixed precision and accumulation


@cpu_only
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", ["SGD, momentum", "AdamW"])
def test_steps_that_a_scaler_skips_are_none(name, fused):
    w = weight(5, dtype=torch.float32)
    optimizer = OPTIMIZERS[name].make([w], fused=fused)
    handle = fr.regularize(optimizer, fr.l1, strength=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    # Torch's fused SGD leaves its momentum uninitialized where the first step of all is skipped, and then adds to that.
    begins = [] if fused and name.startswith("SGD") else [False]
    for finite in (*begins, True, False):
        optimizer.zero_grad()
        scaler.scale((w * (1.0 if finite else torch.inf)).sum()).backward()
        before = w.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, w.detach()) != finite
    assert handle.steps == 1


@cpu_only  # Numbers in uninitialized memory.
def test_momentum_that_torch_leaves_uninitialized_is_said_and_what_to_do_helps():
    w = weight(4)
    optimizer = optim.SGD([w], 0.1, momentum=0.9, fused=True)
    fr.regularize(optimizer, fr.l1, strength=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    start = w.detach().clone()
    scaler.scale((w * torch.inf).sum()).backward()
    with pytest.warns(UserWarning, match=r"first step of SGD with fused=True.*uninitialized in 1 parameters"):
        scaler.step(optimizer)
    scaler.update()
    optimizer.state.clear()
    for _ in range(2):  # A warning would be an error.
        optimizer.zero_grad()
        scaler.scale(w.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    first = fr.l1.prox(start - 0.1, 0.5)  # With 1 / (1 - momentum) for a buffer.
    assert_equal(w.detach(), fr.l1.prox(first - 0.19, 0.5), atol=1e-12)


def test_a_skipped_step_on_a_device_is_not_waited_for():
    """Where `found_inf` may not be read, what it says is computed with."""
    w = weight(5)
    optimizer = optim.SGD([w], 0.1)
    handle = fr.regularize(optimizer, fr.l1)
    w.grad = torch.zeros_like(w)
    moved = handle._moved(optimizer)
    for skipped in (1.0, 0.0):
        before = w.detach().clone()
        with torch.no_grad():
            handle._land(optimizer, moved, (1.0,), torch.tensor(skipped), looks=False)
        assert_equal(w.detach(), before if skipped else fr.l1.prox(before, 0.1))


def test_a_penalty_counts_once_a_step_however_many_gradients_it_sums():
    w, v = weight(5), weight(5)
    one, four = optim.SGD([w], 0.1), optim.SGD([v], 0.1)
    fr.regularize(one, fr.l1, strength=0.5)
    fr.regularize(four, fr.l1, strength=0.5)
    (w.square().sum() / 2).backward()
    for _ in range(4):
        (v.square().sum() / 8).backward()
    one.step()
    four.step()
    assert_equal(w.detach(), v.detach(), atol=1e-15)


def test_a_closure_is_evaluated_without_the_penalty():
    w = weight(3)
    optimizer = optim.SGD([w], 0.1)
    fr.regularize(optimizer, fr.l1, strength=0.5)
    expected = fr.l1.prox(0.9 * w.detach(), 0.05)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_equal(w.detach(), expected, atol=1e-15)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adagrad", "Adafactor", "Adadelta"])
def test_parameters_of_sixteen_bits_get_zeros_and_keep_their_dtype(name):
    w = weight(200, dtype=torch.bfloat16)
    optimizer = OPTIMIZERS[name].make([w])
    fr.regularize(optimizer, fr.l1, strength=3.0)
    for _ in range(20):
        w.grad = (0.01 * w).detach()
        optimizer.step()
    assert w.dtype == torch.bfloat16
    assert 0 < (w == 0).float().mean() <= 1
    assert w.isfinite().all()


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_penalty_that_sixteen_bits_round_away_is_said_once(kind, dtype):
    w = nn.Parameter(torch.linspace(0.5, 1.0, 20, dtype=dtype))
    optimizer = kind([w], 0.01, weight_decay=0.0)
    handle = fr.regularize(optimizer, fr.half_l2, strength=1e-4)
    w.grad = torch.full_like(w, 0.25)
    with pytest.warns(UserWarning, match=r"half_l2.* leaves 20 of 20 entries of sixteen bits .*prox_adam") as said:
        [optimizer.step() for _ in range(10)]
    assert len(said) == 1
    assert said[0].filename == __file__
    for _ in range(100):
        optimizer.step()  # Warnings are errors.
    handle.remove()
    for v, strength in ((w, 0.0), (w, 5.0), (w.detach().float().requires_grad_(), 1e-4)):
        v.grad = torch.zeros_like(v)
        other = optim.SGD([v], 0.01)
        fr.regularize(other, fr.half_l2, strength=strength)
        for _ in range(11):
            other.step()  # Warnings are errors.


def test_small_steps_of_a_warm_up_are_no_loss():
    w = nn.Parameter(torch.linspace(0.5, 1.0, 20, dtype=torch.bfloat16))
    optimizer = optim.SGD([w], 0.5)
    fr.regularize(optimizer, fr.half_l2, strength=0.1)
    scheduler = lr_scheduler.LinearLR(optimizer, 1e-4, total_iters=50)
    for _ in range(120):
        w.grad = torch.zeros_like(w)
        optimizer.step()  # Warnings are errors.
        scheduler.step()
    assert w.max() < 0.1


def test_sparse_gradients_are_those_of_a_table_whose_other_rows_have_none():
    table, dense = nn.Embedding(6, 2, sparse=True), nn.Embedding(6, 2)
    dense.load_state_dict(table.state_dict())
    for net in (table, dense):
        optimizer = optim.SGD(net.parameters(), 0.1)
        fr.regularize(optimizer, fr.l1, strength=0.5)
        net(torch.tensor([1, 4])).square().sum().backward()
        optimizer.step()
    assert_equal(table.weight.detach(), dense.weight.detach(), atol=1e-7)


# Strengths that change


@pytest.mark.parametrize(("make", "options", "lost"), [
    (optim.Adam, {}, 4),
    (optim.Adagrad, {}, 4),
    (optim.Adagrad, {"sparse": True}, 4),
    (optim.Adam, {"max_step": 1.0}, 0),
    (optim.Adam, {"mask": fr.matrices & ~fr.select("0.weight")}, 0),
    (optim.SGD, {}, 0),
])  # fmt: skip
def test_rows_of_an_embedding_that_go_to_zero_for_want_of_a_gradient_are_said(make, options, lost, recwarn):
    options, sparse = dict(options), options.get("sparse", False)
    options.pop("sparse", None)
    net = nn.Sequential(nn.Embedding(8, 2, padding_idx=7, sparse=sparse), nn.Linear(2, 1)).to("cpu")
    optimizer = make(net.parameters(), 1e-2)
    fr.regularize(optimizer, fr.l1, module=net, **{"strength": 1e-4, **options})
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.tensor([0, 2, 4])).sum().backward()
        optimizer.step()
    assert (net[0].weight == 0).all(1).sum() == 1 + lost  # That of padding is zero from the beginning.
    said = [str(each.message) for each in recwarn if "an embedding" in str(each.message)]
    assert len(said) == bool(lost)
    assert not lost or "4 of 8 rows of '0.weight', an embedding, became zero in the first step of" in said[0]


class _Gated(nn.Module):
    """A residual block behind a gate that begins at zero, as in ReZero."""

    def __init__(self):
        super().__init__()
        self.inner, self.gate = nn.Linear(3, 3, bias=False), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.gate * self.inner(x)


@pytest.mark.parametrize(("make", "options", "lost"), [
    (optim.Adam, {}, True),
    (optim.RMSprop, {}, True),
    (optim.Adam, {"max_step": 1.0}, False),
    (optim.SGD, {}, False),
])  # fmt: skip
def test_leaves_that_go_to_zero_behind_a_gate_of_zero_are_said(make, options, lost, recwarn):
    net = nn.Sequential(nn.Linear(3, 3), _Gated()).to("cpu")
    optimizer = make(net.parameters(), 1e-2)
    fr.regularize(optimizer, fr.l1, strength=1e-4, mask=fr.matrices, **options)
    net(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()
    assert bool((net[1].inner.weight == 0).all()) == lost
    said = [str(each.message) for each in recwarn if "became zero in the first step of" in str(each.message)]
    assert len(said) == lost
    assert not lost or "Bound the step, as by max_step=1.0" in said[0]


def test_a_strength_in_a_tensor_is_read_at_every_step():
    w, strength = weight(3), torch.tensor(0.0)
    optimizer = optim.SGD([w], 0.1)
    fr.regularize(optimizer, fr.l1, strength=strength)
    w.grad = torch.zeros_like(w)
    before = w.detach().clone()
    optimizer.step()
    assert_equal(w.detach(), before)
    strength.fill_(1.0)
    optimizer.step()
    assert_equal(w.detach(), fr.l1.prox(before, 0.1), atol=1e-8)


def test_a_schedule_goes_on_where_it_was_saved():
    def start() -> tuple[Any, Any, Any]:
        w = weight(3)
        optimizer = optim.AdamW([w], 0.1)
        return w, optimizer, fr.regularize(optimizer, fr.l1, strength=lambda n: 0.1 * n)

    w, optimizer, handle = start()
    for seed in range(3):
        stepped(optimizer, w, seed=seed)
    saved = pickle.loads(pickle.dumps((w.detach().clone(), optimizer.state_dict(), handle.state_dict())))
    stepped(optimizer, w, seed=9)
    v, other, again = start()
    v.data.copy_(saved[0])
    other.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    stepped(other, v, seed=9)
    assert_equal(v.detach(), w.detach())
    other.load_state_dict(saved[1])
    with pytest.warns(UserWarning, match="was restored, but .* follows a schedule from step 4"):
        stepped(other, v)
    with pytest.raises(ValueError, match="expected what state_dict"):
        again.load_state_dict({"count": 3})


def test_a_cycle_of_momentum_goes_on_where_it_was_saved():
    def start() -> tuple[Any, Any, Any]:
        w = weight(3)
        optimizer = optim.SGD([w], 0.1, momentum=0.9)
        return w, optimizer, fr.regularize(optimizer, fr.l1, strength=0.1)

    w, optimizer, handle = start()
    for seed, momentum in enumerate((0.9, 0.8, 0.7)):
        optimizer.param_groups[0]["momentum"] = momentum
        stepped(optimizer, w, seed=seed)
    v, other, again = start()
    v.data.copy_(w.detach())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(handle.state_dict())
    stepped(optimizer, w, seed=9)
    stepped(other, v, seed=9)
    assert_equal(v.detach(), w.detach())


# The optimizer remains what it was


@every_optimizer
def test_the_state_of_the_optimizer_is_as_it_was_and_resumes(row):
    def train(optimizer: optim.Optimizer, w: Tensor, seeds: range) -> None:
        for seed in seeds:
            stepped(optimizer, w, seed=seed)

    w, plain = weight(4, 3), weight(4, 3)
    optimizer, other = row.make([w]), row.make([plain])
    fr.regularize(optimizer, fr.l1, strength=0.1)
    train(optimizer, w, range(3))
    train(other, plain, range(3))
    state = optimizer.state_dict()
    assert state.keys() == other.state_dict().keys()
    assert state["param_groups"] == other.state_dict()["param_groups"]
    assert fr.tree_paths(state["state"]) == fr.tree_paths(other.state_dict()["state"])
    assert state["state"].keys() == other.state_dict()["state"].keys()
    buffer = io.BytesIO()
    torch.save((w.detach().clone(), state), buffer)
    train(optimizer, w, range(3, 6))
    start, loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    v = nn.Parameter(start)
    resumed = row.make([v])
    fr.regularize(resumed, fr.l1, strength=0.1)
    resumed.load_state_dict(loaded)
    train(resumed, v, range(3, 6))
    assert_equal(v.detach(), w.detach(), atol=row.resumes)


def saved(x):
    """What comes back from a file."""
    file = io.BytesIO()
    torch.save(x, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def test_copies_and_pickles_of_an_optimizer_are_without_it_and_say_so():
    w = weight(3)
    optimizer = optim.SGD([w], 0.1)
    fr.regularize(optimizer, fr.l1, strength=1e6)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), saved(optimizer)):
        (v,) = copied.param_groups[0]["params"]
        assert copied.state_dict() == optimizer.state_dict()
        with pytest.warns(UserWarning, match=r"this SGD is a copy, and is without regularize\(SGD, l1, .*as well"):
            stepped(copied, v)
        stepped(copied, v)  # It is said once.
        assert v.all()
        fr.regularize(copied, fr.l1, strength=1e6)
        stepped(copied, v)
        assert not v.any()


def test_copies_that_are_regularized_again_and_those_without_a_penalty_say_nothing():
    w = weight(3)
    optimizer = optim.AdamW([w], 0.1)
    handle = fr.regularize(optimizer, fr.l1, strength=0.1)
    pair = copy.deepcopy({"w": w, "optimizer": optimizer})
    assert pair["optimizer"].param_groups[0]["params"][0] is pair["w"]
    fr.regularize(pair["optimizer"], fr.l1, strength=0.1)
    for _ in range(2):
        stepped(pair["optimizer"], pair["w"])
        stepped(optimizer, w)
    assert_equal(pair["w"].detach(), w.detach())
    own = fr.Optimizer([w], fr.sgd, lr=0.1, compile=False)
    bound = fr.regularize(own, fr.max_norm, 0.1)
    for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        with pytest.warns(
            UserWarning, match=r"this Optimizer is a copy, and is without regularize\(Optimizer, max_norm"
        ):
            stepped(copied, copied.param_groups[0]["params"][0])
    bound.remove()
    copied = copy.deepcopy(own)
    stepped(copied, copied.param_groups[0]["params"][0])
    handle.remove()
    copied = pickle.loads(pickle.dumps(optimizer))
    assert "funcreg" not in str(pickle.dumps(optimizer))
    stepped(copied, copied.param_groups[0]["params"][0])


def test_what_it_returns_tells_the_value_and_takes_the_penalty_off():
    w, b = nn.Parameter(torch.tensor([[3.0, -1.0]])), nn.Parameter(torch.tensor([5.0]))
    optimizer = optim.SGD([w, b], 0.1)
    handle = fr.regularize(optimizer, fr.elastic, 0.5, 1.0, strength=2.0, mask=fr.matrices)
    assert handle.penalty_value().item() == 4.0
    assert repr(handle) == "regularize(SGD, elastic, 0.5, 1.0, strength=2.0, mask=matrices) on 1 of 2 parameters"
    w.grad = b.grad = None
    w.grad, b.grad = torch.zeros_like(w), torch.zeros_like(b)
    optimizer.step()
    assert_equal((w.detach(), b.detach()), (torch.tensor([[2.9, -0.9]]), torch.tensor([5.0])), atol=1e-6)
    handle.remove()
    handle.remove()
    before = w.detach().clone()
    optimizer.step()
    assert_equal(w.detach(), before)
    fr.regularize(optimizer, fr.elastic, 0.5, 1.0)


@pytest.mark.slow
def test_it_may_be_asked_inside_a_compiled_step():
    w, v = weight(5), weight(5)
    optimizer, other = optim.SGD([w], 0.1), optim.SGD([v], 0.1)
    for each in (optimizer, other):
        fr.regularize(each, fr.l1, strength=0.5)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for seed in range(2):
        w.grad, v.grad = weight(5, seed=seed).detach(), weight(5, seed=seed).detach()
        compiled()
        other.step()
    assert_equal(w.detach(), v.detach())


# Other optimizers


class Descent(optim.Optimizer):
    """Plain descent, which nobody knows."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self.state[w]["h"] = torch.full_like(w, 2.0)
                    w -= group["lr"] * w.grad / 2


class Lazy(optim.Adam):
    def step(self, closure: Any = None) -> None:
        super().step()


class Same(optim.Adam):
    pass


class Outer(optim.Optimizer):
    """As libraries wrap an optimizer, without a call of its constructor."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()


@pytest.mark.parametrize(
    "metric", [lambda state, group: 2.0, lambda state, group: state["h"]], ids=["number", "tensor"]
)
def test_a_metric_of_the_users_makes_any_optimizer_known(metric):
    gram, moment, _ = lasso()
    w = nn.Parameter(torch.zeros_like(moment))
    optimizer = Descent([w], 0.2)
    fr.regularize(optimizer, fr.l1, strength=0.1, metric=metric)
    for _ in range(1000):
        w.grad = gram @ w.detach() - moment
        optimizer.step()
    assert_is_lasso(w.detach())


@pytest.mark.parametrize("value", [-1.0, float("nan"), torch.tensor([1.0, float("nan"), 1.0])], ids=str)
def test_a_metric_that_is_none_is_refused(value):
    w = weight(3)
    fr.regularize(optimizer := Descent([w], 0.2), fr.l1, metric=lambda state, group: value)
    with pytest.raises(
        ValueError, match=r"metric returned .*, which has negative numbers or NaN; expected a number of"
    ):
        stepped(optimizer, w)


class Clearing(Descent):
    """As some libraries do, it frees gradients in its step."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.zero_grad()


@pytest.mark.parametrize("penalty", [fr.l1, fr.group_lasso, fr.max_norm.given(0.5)], ids=str)
def test_optimizers_that_clear_gradients_in_their_step_are_followed(penalty):
    found = []
    for kind in (Descent, Clearing):
        moved, still = weight(3, 4), weight(3, 4, seed=1)
        fr.regularize(optimizer := kind([moved, still], 0.2), penalty, metric=lambda state, group: 1.0)
        for seed in range(3):
            stepped(optimizer, moved, seed=seed)
        found.append([moved.detach(), still.detach()])
        assert_equal(still.detach(), weight(3, 4, seed=1).detach())
    assert_equal(*found)


def of_steps_in_steps(twice: bool) -> tuple[type[optim.Optimizer], type[optim.Optimizer]]:
    """A new class of optimizers, and one whose steps call those of the first."""

    class Base(Descent):
        def step(self, closure: Any = None) -> Any:
            super().step()

    class Twice(Base):
        def step(self, closure: Any = None) -> Any:
            super().step()
            return super().step()

    class Closing(Base):
        """Takes the closure itself, and frees gradients in the end."""

        def step(self, closure: Any = None) -> Any:
            loss = torch.enable_grad()(closure)()
            super().step()
            self.zero_grad()
            return loss

    return Base, Twice if twice else Closing


@pytest.mark.parametrize("twice", [True, False], ids=["twice", "with a closure"])
@pytest.mark.parametrize("used", [False, True], ids=["base as it was", "base used before"])
def test_steps_that_call_steps_are_followed_once_whatever_was_used_before(twice, used):
    base, kind = of_steps_in_steps(twice)
    if used:
        base([weight(1)], 0.1)
    w = nn.Parameter(torch.tensor([5.0, 0.05], dtype=torch.float64, device=DEVICE))
    goal = torch.tensor([1.0, 0.2], dtype=torch.float64, device=DEVICE)
    optimizer = kind([w], lr=0.1)
    # Descent halves gradients.
    handle = fr.regularize(optimizer, fr.l1, strength=0.3, metric=lambda state, group: 1.0 if twice else 2.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (w - goal).square().sum()
        loss.backward()
        return loss

    for _ in range(400):
        if twice:
            closure()
        optimizer.step(*[] if twice else [closure])
    assert handle.steps == 400
    assert_equal(w.detach(), torch.tensor([0.7, 0.0], dtype=torch.float64, device=DEVICE), atol=1e-6)


def adagrad_takes_groups() -> bool:
    """Whether Adagrad makes a state of groups that are added, which earlier versions of torch forget."""
    w = weight(2)
    optimizer = optim.Adagrad([weight(2, seed=1)])
    optimizer.add_param_group({"params": [w]})
    w.grad = torch.ones_like(w)
    try:
        optimizer.step()
    except KeyError:
        return False
    return True


@pytest.mark.parametrize("name", ["Adam", "Adadelta", "Adagrad"])
def test_groups_that_are_added_are_noted_before_their_first_step(name):
    if name == "Adagrad" and not adagrad_takes_groups():
        pytest.skip("this torch makes no state of a group that is added to Adagrad")
    first, second = weight(4, 3), weight(4, 3, seed=1)
    optimizer = OPTIMIZERS[name].make([first])
    fr.regularize(optimizer, fr.nuclear, strength=0.1)
    stepped(optimizer, first)
    optimizer.add_param_group({"params": [second]})
    stepped(optimizer, first, second)
    alone = weight(4, 3, seed=1)
    fr.regularize(other := OPTIMIZERS[name].make([alone]), fr.nuclear, strength=0.1)
    stepped(other, alone, seed=2)
    assert_equal(second.detach(), alone.detach(), atol=1e-12)


@pytest.mark.parametrize("place", ["_numbers", "copy_all", "Moved"])
def test_a_hook_that_is_interrupted_follows_the_next_steps(place, monkeypatch):
    """As one that is made anew then: what was found out in part is found out again."""
    first, second = weight(4, 3), weight(2, seed=1)
    optimizer = optim.Adam([first, second], lr=0.1)
    handle = fr.regularize(optimizer, fr.group_lasso, strength=0.1)

    def interrupts(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(followed_steps, place, interrupts)
        with pytest.raises(KeyboardInterrupt):
            stepped(optimizer, first, second)
    others = [w.detach().clone().requires_grad_() for w in (first, second)]
    other = optim.Adam(others, lr=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fr.regularize(other, fr.group_lasso, strength=0.1).load_state_dict(handle.state_dict())
    for seed in range(2):
        stepped(optimizer, first, second, seed=seed)
        stepped(other, *others, seed=seed)
    assert_equal([first.detach(), second.detach()], [w.detach() for w in others])


def test_what_a_penalty_cannot_take_is_refused_at_every_step_until_it_is_gone():
    first, second = weight(4, 3), torch.nn.Parameter(torch.ones(2, dtype=torch.complex128, device=DEVICE))
    optimizer = optim.Adam([first], lr=0.1)
    fr.regularize(optimizer, fr.l1, strength=0.1)
    optimizer.add_param_group({"params": [second]})
    before = first.detach().clone()
    for _ in range(3):
        with pytest.raises(ValueError, match=r"'groups.1.params.0' is complex"):
            stepped(optimizer, first, second)
        assert_equal(first.detach(), before, atol=0)
    del optimizer.param_groups[1]
    stepped(optimizer, first)
    assert not torch.equal(first, before)


def test_the_value_is_that_of_what_moves():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    handle = fr.regularize(optimizer, fr.l1, strength=0.5, module=net)
    value = lambda module: 0.5 * fr.l1(dict(module.named_parameters())).detach()
    assert_equal(handle.penalty_value(), value(net[1]))
    assert_equal(copy.deepcopy(handle).penalty_value(), value(net[1]))
    stepped(optimizer, *net[1].parameters())
    assert_equal(handle.penalty_value(), value(net[1]))
    net[0].requires_grad_(True)
    assert_close(handle.penalty_value(), value(net))
    net.requires_grad_(False)  # As for torch.func: nothing is frozen beside others.
    assert_close(handle.penalty_value(), value(net))
    # What a frozen leaf shares a norm with moves with it.
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    net[2].requires_grad_(False)
    units = fr.coupled(fr.group_lasso, fr.channel_groups(net))
    with pytest.warns(UserWarning, match="in each family of groups"):
        handle = fr.regularize(optim.SGD(net.parameters(), lr=0.1), units, module=net)
    assert_equal(handle.penalty_value(), units(dict(net.named_parameters())).detach(), rtol=1e-6)


def test_a_handle_says_and_values_what_the_optimizer_has_now():
    first, second = weight(4, 3), weight(2)
    optimizer = optim.SGD([first], lr=0.1)
    handle = fr.regularize(optimizer, fr.l1, strength=0.5)
    assert repr(handle).endswith("on 1 of 1 parameters")
    optimizer.add_param_group({"params": [second]})
    assert "on 1 of 1 parameters (the optimizer got others since: it holds 2" in repr(handle)
    assert_equal(handle.penalty_value(), 0.5 * (first.detach().abs().sum() + second.detach().abs().sum()))
    assert repr(handle).endswith("on 2 of 2 parameters")
    handle.remove()
    optimizer.add_param_group({"params": [weight(3)]})
    assert repr(handle).endswith("on 2 of 2 parameters")


@pytest.mark.parametrize("name", ["Adadelta", "Adafactor", "AdamW"])
def test_a_parameter_that_takes_the_place_of_another_is_noted_before_its_first_step(name):
    first, second, alone = weight(4, 3), weight(4, 3, seed=1), weight(4, 3, seed=1)
    optimizer = OPTIMIZERS[name].make([first])
    fr.regularize(optimizer, fr.nuclear, strength=0.1)
    stepped(optimizer, first)
    optimizer.param_groups[0]["params"][0] = second
    stepped(optimizer, second)
    fr.regularize(other := OPTIMIZERS[name].make([alone]), fr.nuclear, strength=0.1)
    stepped(other, alone)
    assert_equal(second.detach(), alone.detach(), atol=1e-12)


def test_parameters_that_get_other_shapes_in_place_land_as_new_ones():
    params, others = [weight(4, 3), weight(4)], [weight(6, 3, seed=1), weight(6, seed=1)]
    optimizer = torch.optim.SGD(params, lr=0.1)
    fr.regularize(optimizer, fr.l1, strength=0.1)
    stepped(optimizer, *params)
    for w, new in zip(params, others, strict=True):
        w.grad, w.data = None, new.detach().clone()
    stepped(optimizer, *params)
    fr.regularize(other := torch.optim.SGD(others, lr=0.1), fr.l1, strength=0.1)
    stepped(other, *others)
    assert_equal([w.detach() for w in params], [w.detach() for w in others], atol=1e-15)


@pytest.mark.slow
def test_a_compiled_step_is_as_exact_as_the_dtype_that_parameters_get():
    ends = []
    for compile in (False, True):
        w = torch.nn.Parameter(torch.full((3, 2), 2.0, device="cpu").to(DEVICE))
        optimizer = torch.optim.SGD([w], lr=0.1)
        fr.regularize(optimizer, fr.l1, strength=0.3, compile=compile)
        for dtype in (torch.float32, torch.float64):
            w.grad, w.data = None, w.data.to(dtype)
            w.grad = torch.zeros_like(w)
            optimizer.step()
        ends.append(w.detach())
    assert_equal(ends[1], ends[0], atol=1e-15)


def test_a_counter_that_is_set_back_in_place_is_seen():
    still, anew = (nn.Parameter(torch.full((3,), 5.0, dtype=torch.float64, device=DEVICE)) for _ in range(2))
    optimizer = optim.Adam([still, anew], lr=0.01)
    fr.regularize(optimizer, fr.l1, strength=0.1)
    for _ in range(5):
        stepped(optimizer, still, anew)
    for x in optimizer.state[anew].values():
        x.zero_()
    alone = nn.Parameter(anew.detach().clone())
    fr.regularize(other := optim.Adam([alone], lr=0.01), fr.l1, strength=0.1)
    stepped(optimizer, still, anew)
    stepped(other, alone, seed=2)
    assert_equal(anew.detach(), alone.detach(), atol=1e-12)


def test_subclasses_and_wrappers_of_known_optimizers_are_known_unless_they_step_otherwise():
    assert_equal(solved(lambda p: Same(p, 0.01), 5), solved(lambda p: optim.Adam(p, 0.01), 5))
    inner = optim.SGD([weight(3)], 0.1)
    assert "regularize(SGD" in repr(fr.regularize(Outer(inner), fr.l1))
    with pytest.raises(ValueError, match="its step is not that of Adam"):
        fr.regularize(Lazy([weight(3)]), fr.l1)


REFUSED = {
    "LBFGS": (optim.LBFGS, "differences of gradients"),
    "Rprop": (optim.Rprop, "signs of gradients"),
    "ASGD": (optim.ASGD, "a mean over steps"),
    "SparseAdam": (optim.SparseAdam, "only the entries in a sparse gradient"),
    "Muon": (optim.Muon, "orthogonal matrix"),
    "another": (lambda p: Descent(p, 0.1), "its metric is not known"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_optimizers_that_no_penalty_can_follow_are_refused_and_constraints_hold_all_the_same(make, reason):
    w = weight(3, 4)
    optimizer = make([w])
    with pytest.raises(ValueError, match=reason):
        fr.regularize(optimizer, fr.l1)
    if isinstance(optimizer, optim.LBFGS):
        with pytest.raises(ValueError, match=reason):
            fr.regularize(optimizer, fr.max_norm, 0.5)
        return
    fr.regularize(optimizer, fr.max_norm, 0.5)
    w.grad = torch.ones_like(w)
    if isinstance(optimizer, optim.SparseAdam):
        w.grad = w.grad.to_sparse()
    optimizer.step()
    assert fr.max_norm(w.detach(), 0.5) == 0


# What is wrong


def of(*args: Any, **kwargs: Any) -> Callable[[], Any]:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    if kwargs.get("module") is None:
        kwargs.pop("module", None)
    kwargs = {k: model if v is model.__class__ else v for k, v in kwargs.items()}
    return lambda: fr.regularize(optim.Adam(model.parameters()), *args, **kwargs)


TWO = [nn.Linear(3, 2), nn.Linear(2, 2)]
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no optimizer": (lambda: fr.regularize(fr.adam(0.1), fr.l1), TypeError, "expected one of torch"),
    "a scheduler": (
        lambda: fr.regularize(lr_scheduler.StepLR(optim.SGD([weight(2)], 0.1), 1), fr.l1),
        TypeError,
        "optimizer is the scheduler StepLR; expected",
    ),
    "a module": (lambda: fr.regularize(nn.Linear(2, 2), fr.l1), TypeError, "optimizer is a Linear; expected one"),
    "an optimizer of another library": (
        lambda: fr.regularize(type("Adam", (), {"__module__": "torchopt.optim"})(), fr.l1),
        TypeError,
        "optimizer is an Adam of torchopt; expected one of torch",
    ),
    "a wrapper that is no optimizer": (
        lambda: fr.regularize(types.SimpleNamespace(base=optim.SGD([weight(2)], 0.1), k=5), fr.l1),
        TypeError,
        r"is a SimpleNamespace.*; expected one of torch, the one that it holds, as in regularize\(optimizer.base, l1, ",
    ),
    "averages in place of the module": (
        of(fr.l1, module=optim.swa_utils.AveragedModel(nn.Linear(3, 2))),
        ValueError,
        "is not in module, an AveragedModel. Was the optimizer made for another module",
    ),
    "an optimizer with a chain": (
        lambda: fr.regularize(fr.Optimizer([weight(2)], fr.adam, lr=0.1), fr.l1),
        ValueError,
        "a chain of its own, into which the penalty belongs: prox_adam",
    ),
    "a value": (of(torch.zeros(())), TypeError, r"Give the penalty itself, l1 and not l1\(params\)"),
    "groups by position": (
        of(fr.group_lasso, [{"0.weight": 0}]),
        TypeError,
        r"go in by coupled\(group_lasso, groups\)",
    ),
    "a strength by position": (of(fr.l1, 1e-4), TypeError, r"got 1 hyperparameters. Its strength is .* strength=1e-4"),
    "a strength by another name": (
        of(fr.l1, lam=1e-4),
        TypeError,
        r"got lam\. Its strength is .* strength=1e-4 where it is an argument",
    ),
    "no penalty": (of(nn.L1Loss()), TypeError, "expected a Penalty"),
    "no module": (of(fr.l1, module="model"), TypeError, "expected the torch.nn.Module"),
    "negative strength": (of(fr.l1, strength=-0.1), ValueError, "strength is -0.1"),
    "a schedule as a string": (of(fr.l1, strength="cosine"), TypeError, "strength is 'cosine'"),
    "missing hyperparameters": (of(fr.elastic), TypeError, "alpha is missing"),
    "a string for a mask": (of(fr.l1, mask="*.weight"), TypeError, "select"),
    "a mask by names that there are none of": (
        of(fr.l1, mask=fr.select("*.weight")),
        ValueError,
        "Parameters have no names without module=",
    ),
    "a mask that matches nothing": (
        of(fr.l1, mask=fr.select("head.*"), module=nn.Sequential),
        ValueError,
        "matches no leaf; the leaves are",
    ),
    "a mask without a leaf": (
        of(fr.l1, mask=fr.select(min_ndim=3), module=nn.Sequential),
        ValueError,
        "chooses no leaf",
    ),
    "a mask of what is not there": (
        of(fr.l1, mask={"head": True}, module=nn.Sequential),
        ValueError,
        "chooses 'head', which the optimizer does not hold",
    ),
    "another module": (of(fr.l1, module=nn.Linear(2, 2)), ValueError, "is not in module, a Linear"),
    "one of two modules": (
        lambda: fr.regularize(optim.SGD([*TWO[0].parameters(), *TWO[1].parameters()], 0.1), fr.l1, module=TWO[0]),
        ValueError,
        r"is not in module, a Linear.* module=ModuleList\(\[a, b\]\)",
    ),
    "globs for names": (
        of(fr.l1, strength={"0.*": 1.0}, module=nn.Sequential),
        ValueError,
        r"has '0.\*', unknown to the parameters. Keys are whole names; globs go to select, and to per_leaf",
    ),
    "beginnings for names": (
        of(fr.l1, strength={"0": 1.0, "1": 0.1}, module=nn.Sequential),
        ValueError,
        r"has '0', unknown to the parameters.* '0' stands for all that begins with it only where dicts are nested",
    ),
    "no proximal operator": (of(fr.orthogonality, mask=fr.matrices), ValueError, "no proximal operator.*into the loss"),
    "no exact sum": (
        lambda: fr.regularize(optim.SGD([weight(3, 2)], 0.1), fr.group_lasso + fr.group_lasso.given(dim=0)),
        ValueError,
        "no proximal operator that is known to be exact",
    ),
    "groups without names": (of(fr.coupled(fr.group_lasso, {"0.weight": 0})), ValueError, "0.weight"),
    "a strength for what is not there": (
        of(fr.l1, strength={"0.weight": 1.0}, module=nn.Sequential),
        ValueError,
        "0.bias",
    ),
    "bad inner steps": (of(fr.nuclear, mask=fr.matrices, inner_steps=0), ValueError, "inner_steps"),
    "bad bound": (of(fr.l1, max_step=0.0), ValueError, "max_step is 0.0"),
    "bad compile": (of(fr.l1, compile="yes"), TypeError, "compile"),
    "a number for a metric": (of(fr.l1, metric=1.0), TypeError, r"metric is 1.0; .* as lambda state, group: 1.0"),
    "a metric of one argument": (of(fr.l1, metric=lambda state: 1.0), TypeError, "metric cannot be called with two"),
    "lazy parameters": (
        lambda: fr.regularize(optim.SGD(nn.LazyLinear(2).parameters(), 0.1), fr.l1),
        ValueError,
        r"'groups\.0\.params\.0' is not initialized; run the module once",
    ),
    "one parameter twice": (
        lambda: fr.regularize(optim.SGD([nn.Parameter(torch.ones(1))] * 2, 0.1), fr.l1),
        ValueError,
        r"parameter 1 of param group 0 is there again, after 'groups\.0\.params\.0': a step moves it twice",
    ),
    "complex parameters under Adam": (
        lambda: fr.regularize(optim.Adam([nn.Parameter(torch.ones(2, dtype=torch.complex64))]), fr.l1),
        ValueError,
        "is complex",
    ),
}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")  # By torch.
@pytest.mark.parametrize(("call", "kind", "match"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_told_before_the_first_step(call, kind, match):
    with pytest.raises(kind, match=match):
        call()


#: What is changed in the first group after `regularize`, and so is told before the optimizer has moved anything.
CHANGED = {
    "lr below zero": (
        lambda p: optim.SGD(p, 0.1),
        {"lr": -0.1},
        "has the learning rate -0.1, with which its step goes",
    ),
    "lr in a tensor": (
        lambda p: optim.Adam(p, torch.tensor(0.1, device="cpu"), foreach=False),
        {"lr": torch.tensor(-0.1, device="cpu")},
        r"has the learning rate -0.1000.*, with which its step goes uphill",
    ),
    "momentum of a centered metric": (
        lambda p: optim.RMSprop(p, 0.1, centered=True),
        {"momentum": 0.9},
        "^param group 0 has got momentum 0.9: RMSprop with centered=True divides",
    ),
    "momentum of 1": (
        lambda p: optim.SGD(p, 0.1, momentum=0.5),
        {"momentum": 1.0},
        "momentum is 1.0; expected a number",
    ),
    "rates of one family": (lambda p: optim.SGD(p, 0.1), {"lr": 0.2}, r"which share groups, differ, 0.1 and 0.2"),
}


@pytest.mark.parametrize(("make", "changed", "match"), CHANGED.values(), ids=CHANGED)
def test_what_no_step_can_follow_is_told_before_the_optimizer_moves(make, changed, match):
    w, v = weight(3, 2), weight(3, seed=1)
    optimizer = make([{"params": [("w", w)]}, {"params": [("v", v)]}])
    groups = fr.coupled(fr.group_lasso, [{"w": 0, "v": 0}])
    fr.regularize(optimizer, groups if "share" in match else fr.l1, strength=0.1)
    stepped(optimizer, w, v)
    optimizer.param_groups[0].update(changed)
    before = copy.deepcopy(([w, v], optimizer.state_dict()["state"]))
    with pytest.raises(ValueError, match=match):
        stepped(optimizer, w, v)
    for x, y in zip([w, v], before[0], strict=True):
        assert_equal(x.detach(), y.detach(), rtol=0, atol=0)
    assert_equal(optimizer.state_dict()["state"], before[1], rtol=0, atol=0)


_BALL = fr.l2_ball.given(0.5)
#: Pairs on one leaf in the order in which they land, and what a warning says of them, or what lands at once.
PAIRS = {
    "two sets": (_BALL, fr.box.given(0.1, 1.0), "need not lie in the first set, .* Leave one out"),
    "intervals apart": (fr.box.given(2.0, 3.0), fr.box.given(0.0, 1.0), "never lies in the first set, .* Leave one"),
    "a half line apart": (fr.nonnegative, fr.box.given(-2.0, -1.0), "never lies in the first set, because no number"),
    "bounds of entries apart": (
        fr.box.given(torch.tensor([0.0, 2.0, 0.0, 0.0], device="cpu"), 3.0),
        fr.box.given(-1.0, 1.0),
        "never lies in the first set",
    ),
    "two sets, exact as a sum": (_BALL, fr.nonnegative, r"regularize\(optimizer, l2_ball.given\(0.5\) \+ nonnegative"),
    "groups cut at 0": (0.1 * fr.group_lasso, fr.nonnegative, "is not the best of both. Their sum is exact"),
    "two sets, in order": (fr.nonnegative, _BALL, _BALL + fr.nonnegative),
    "two intervals": (fr.nonnegative, fr.box.given(-1.0, 1.0), fr.box.given(0.0, 1.0)),
    "intervals that touch": (fr.box.given(1.0, 2.0), fr.box.given(-1.0, 1.0), fr.box.given(1.0, 1.0)),
    "a penalty and a set": (0.1 * fr.l1, _BALL, 0.1 * fr.l1 + _BALL),
    "groups in balls": (0.1 * fr.group_lasso, fr.max_norm.given(0.5), 0.1 * fr.group_lasso + fr.max_norm.given(0.5)),
}


@pytest.mark.parametrize(("first", "last", "expected"), PAIRS.values(), ids=PAIRS)
def test_a_set_that_spoils_what_landed_before_is_told_and_no_other(first, last, expected):
    w = weight(3, 4)
    optimizer = optim.SGD([w], 0.5)
    fr.regularize(optimizer, first)
    if isinstance(expected, str):
        with pytest.warns(UserWarning, match=expected):
            fr.regularize(optimizer, last)
        return
    fr.regularize(optimizer, last)  # A warning would be an error.
    start = w.detach().clone()
    stepped(optimizer, w)
    assert_equal(w.detach(), expected.prox(start - 0.5 * w.grad, 0.5), rtol=1e-12)


def test_two_regularizations_may_call_a_parameter_by_other_names():
    net = nn.Linear(3, 2)
    optimizer = optim.SGD(net.parameters(), 0.5)
    fr.regularize(optimizer, fr.nonnegative, module=net)
    fr.regularize(optimizer, fr.l1, strength=0.1)
    start = net.weight.detach().clone()
    net.weight.square().sum().backward()
    optimizer.step()
    assert_equal(net.weight.detach(), (start - 0.5 * 2 * start - 0.05).clamp(min=0), rtol=0, atol=1e-6)


class Averaging(Descent):
    """As schedule-free optimizers do, it evaluates at other numbers than it trains."""

    def train(self) -> None:
        """Put those of steps into the parameters."""

    def eval(self) -> None:
        """Put their average into the parameters."""


@pytest.mark.parametrize(("constraint", "hyper", "enough", "options"), [
    (fr.top_k, (15,), (14,), {}),
    (fr.top_k, (5,), (4,), {"dim": 1}),
    (fr.group_top_k, (3,), (2,), {}),
    (fr.top_k.given(15), (), None, {}),
    (fr.n_m_sparsity, (5, 5), (4, 5), {}),
])  # fmt: skip
def test_a_count_that_keeps_everything_is_told(constraint, hyper, enough, options):
    make = lambda: optim.SGD(nn.Linear(5, 3).named_parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"has no effect: .* keeps all entries of 'weight'"):
        fr.regularize(make(), constraint, *hyper, mask=fr.matrices, **options)
    if enough is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fr.regularize(make(), constraint, *enough, mask=fr.matrices, **options)
            fr.regularize(make(), constraint, lambda n: hyper[0], *hyper[1:], mask=fr.matrices, **options)
            fr.regularize(make(), constraint, *hyper, mask=False, **options)


def test_an_optimizer_that_evaluates_at_other_parameters_is_said():
    with pytest.warns(UserWarning, match=r"Averaging has train\(\) and eval\(\).*linf_ball.* need not hold after eval"):
        fr.regularize(Averaging([weight(3)], 0.1), fr.linf_ball, 0.1)
    fr.regularize(Descent([weight(3)], 0.1), fr.linf_ball, 0.1)  # A warning would be an error.


@pytest.mark.parametrize("penalty", [fr.half_l2, fr.l1 + fr.l2, fr.elastic.given(0.1, 0.5)])
def test_a_ridge_beside_the_decay_of_an_optimizer_is_told(penalty):
    with pytest.warns(UserWarning, match=r"^groups.0.params.0 would decay twice, by weight_decay=0.01 of AdamW and by"):
        fr.regularize(optim.AdamW([weight(3)]), penalty, strength=0.1)
    for other in (fr.l1, fr.elastic.given(0.1, 1.0), fr.anchored_l2.given(0.5)):
        fr.regularize(optim.AdamW([weight(3)]), other, strength=0.1)  # A warning would be an error.
    fr.regularize(optim.AdamW([weight(3)], weight_decay=0.0), penalty, strength=0.1)
    parts = fr.per_leaf({"a": penalty, "b": fr.l1})
    with pytest.warns(UserWarning, match=r"^a would decay twice"):
        fr.regularize(optim.AdamW([("a", weight(3)), ("b", weight(3))]), parts, strength=0.1)
    named = [("a", weight(3, 2)), ("b", weight(3)), ("c", weight(2, 2))]
    with pytest.warns(UserWarning, match=r"^c would decay twice"):
        fr.regularize(optim.AdamW(named), fr.elastic, 0.1, {"a": 1.0, "c": 0.5}, mask=fr.matrices)
    groups = [{"params": [weight(3)]}, {"params": [weight(2, 2)], "weight_decay": 0.0}]
    fr.regularize(optim.AdamW(groups), penalty, strength=0.1, mask=fr.matrices)


def test_a_strength_that_is_changed_to_one_below_zero_is_told():
    w, strength = weight(3), torch.tensor(1.0, device="cpu")
    optimizer = optim.SGD([w], 0.1)
    fr.regularize(optimizer, fr.l1, strength=strength)
    strength.fill_(-2.0)
    with pytest.raises(ValueError, match=r"^strength is -2.0; expected a number of at least 0"):
        stepped(optimizer, w)
    assert_equal(w.detach(), weight(3).detach(), rtol=0, atol=0)


def test_a_failed_call_leaves_the_optimizer_alone():
    w = weight(3)
    optimizer = optim.SGD([w], 0.1)
    with pytest.raises(ValueError, match="chooses no leaf"):
        fr.regularize(optimizer, fr.l1, mask=fr.matrices)
    before = dict(vars(optimizer))
    assert not before["_optimizer_step_post_hooks"]


def test_parameters_are_regularized_once():
    a, b = weight(3, 2), weight(3)
    optimizer = optim.SGD([a, b], 0.1)
    handle = fr.regularize(optimizer, fr.l1, mask=fr.matrices)
    with pytest.raises(ValueError, match=r"regularized already, by regularize\(SGD, l1.*remove\(\) it first"):
        fr.regularize(optimizer, fr.l1)
    with pytest.raises(ValueError, match=r"not that of both. Regularize with their sum"):
        fr.regularize(optimizer, fr.group_lasso, mask=fr.matrices)
    fr.regularize(optimizer, fr.l1, mask=~fr.matrices)
    fr.regularize(optimizer, fr.max_norm, 3.0, mask=fr.matrices)
    handle.remove()
    fr.regularize(optimizer, fr.group_lasso, mask=fr.matrices)


@pytest.mark.parametrize("given", [{"momentum": 1.0}, {"momentum": 0.5, "dampening": 1.0}], ids=str)
def test_a_buffer_that_comes_to_no_mean_gradient_is_told(given):
    w = weight(3)
    optimizer = optim.SGD([w], 0.1, **given)
    fr.regularize(optimizer, fr.l1)
    with pytest.raises(ValueError, match=r"is 1.0; expected a number below 1"):
        stepped(optimizer, w)


def test_entries_without_gradients_go_to_zero_at_once_or_by_a_bounded_step():
    for bound, left in ((None, 0.0), (0.5, 1.85)):
        w = nn.Parameter(torch.tensor([2.0, 2.0]))
        optimizer = optim.Adam([w], 0.1)
        fr.regularize(optimizer, fr.l1, strength=0.3, max_step=bound)
        w.grad = torch.tensor([1.0, 0.0])
        optimizer.step()
        assert_equal(w.detach(), torch.tensor([1.87, left]), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_leaves_of_any_shape_and_group_land_by_their_own_steps(dtype):
    """Small ones are computed with end to end; here one after the other, by the formula."""
    shapes = [(), (3,), (0, 2), (4, 5), (130, 140), (2, 3, 4, 4), (7, 1), (5,)]
    generator = torch.Generator().manual_seed(0)
    leaves = [nn.Parameter(normal(generator, *shape).to(dtype)) for shape in shapes]
    leaves[5].data = leaves[5].data.to(memory_format=torch.channels_last)
    rates = [0.1, 0.02]
    optimizer = optim.Adam([{"params": leaves[i::2], "lr": rate} for i, rate in enumerate(rates)], eps=0.1)
    reached: list[Tensor] = []
    optimizer.register_step_post_hook(lambda *_: reached.extend([w.detach().clone() for w in leaves]))
    fr.regularize(optimizer, fr.elastic, 0.3, 0.5, compile=False)
    for step in range(3):
        for i, w in enumerate(leaves):
            w.grad = None if step == 0 and i == 3 else torch.ones_like(w)  # That one counts a step less.
        reached.clear()
        optimizer.step()
        for i, (w, z) in enumerate(zip(leaves, reached, strict=True)):
            if w.grad is None:
                assert_equal(w.detach(), z)
                continue
            state = optimizer.state[w]
            correction = 1 - 0.999 ** float(state["step"])
            size = rates[i % 2] * 0.15 / ((state["exp_avg_sq"].double() / correction).sqrt() + 0.1)
            z = z.double().sign() * (z.double().abs() - size).clamp(min=0) / (1 + size)
            assert_close(w.detach(), z.to(dtype), rtol=1e-12 if dtype == torch.float64 else 1e-2, atol=0)


# Compiled


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SGD, momentum", "AdamW", "RAdam", "RMSprop, centered", "Adadelta"])
def test_a_compiled_step_is_the_same(name):
    trained = []
    for compile in (False, True):
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)).double()
        params = list(model.parameters())
        for i, w in enumerate(params):
            w.data.copy_(weight(*w.shape, seed=10 + i))
        where = [w.data_ptr() for w in params]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
        optimizer = OPTIMIZERS[name].make(groups)
        strength = torch.tensor(0.1, dtype=torch.float64)
        handle = fr.regularize(
            optimizer, fr.elastic, strength, lambda n: 0.5 + 0.125 * n, module=model, compile=compile
        )
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
        for seed in range(4):
            stepped(optimizer, *params, seed=seed)
            scheduler.step()
            strength.mul_(1.5)
        params[3].grad = None
        optimizer.step()
        assert [w.data_ptr() for w in params] == where
        assert all([w.requires_grad for w in params])
        assert len(handle._layouts) == 2 * compile
        trained.append([w.detach().clone() for w in params])
    assert_equal(*trained, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True], ids=["two families", "many families"])
@pytest.mark.parametrize("name", ["SGD, momentum", "Adam"])
def test_a_compiled_step_of_groups_is_the_same(name, several):
    trained, families = [], [{"a": 0, "b": 0, "c": 0}, {"d": 0, "e": 0}]
    more = {f"more{i}": 0 for i in range(9)} if several else {}
    families += [{each: 0} for each in more]
    for compile in (False, True):
        params = {each: weight(4, 3, seed=i) for i, each in enumerate("abcde")}
        params.update({each: weight(3 + i, 2 + i % 3, seed=i) for i, each in enumerate(more)})
        rows = [[(each, params[each]) for each in family] for family in ("abc", ["d", "e", *more])]
        optimizer = OPTIMIZERS[name].make([{"params": rows[0]}, {"params": rows[1], "lr": 0.02}])
        units = fr.coupled(fr.group_lasso, families)
        handle = fr.regularize(optimizer, units, strength=0.3, weights="sqrt_size", compile=compile)
        turns = ("abde", "abcde", "abc", "bcd", "d", "abcde")
        if name == "Adam" and not several:  # Each set of gradients is a kernel that takes seconds to compile.
            turns = ("abde", "bcd", "abde")
        for seed, names in enumerate(turns):
            for w in params.values():
                w.grad = None
            optimizer.param_groups[1]["lr"] = 0.0 if names == "bcd" else 0.02
            stepped(optimizer, *[params[each] for each in (*names, *more)], seed=seed)
        assert bool(handle._layouts) == (compile and not several)
        assert copy.deepcopy(handle).penalty_value() == handle.penalty_value()
        assert name == "Adam" or several or len(handle._layouts) == compile
        trained.append([w.detach().clone() for w in params.values()])
    assert_equal(*trained, atol=1e-12)


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("penalty", ["groups", "entries of groups", "a sum", "weights"])
def test_rows_that_are_landed_by_kernels_are_the_same(penalty, metric):
    families = [{"a": 0, "b": 0}, {"c": fr.Along(1, size=2)}, {"d": 0}]
    units = fr.coupled(fr.group_lasso, families)
    of, hyper, options = {
        "groups": (units, (), {"weights": "sqrt_size"}),
        "entries of groups": (fr.coupled(fr.sparse_group_lasso, families), (0.7, torch.tensor(0.4)), {}),
        "a sum": (0.5 * units + 0.1 * fr.half_l2, (), {}),
        "weights": (units, (), {"weights": [torch.arange(1.0, 5.0), None, torch.tensor([0.5, 0.0, 2.0])]}),
    }[penalty]
    params = {"a": weight(4, 3), "b": weight(4), "c": weight(3, 8, seed=1), "d": weight(3, 5, seed=2).float()}
    params["free"] = weight(2, seed=3)
    params = {name: w.detach() for name, w in params.items()}
    by_kernels = landed_by(of, lambda rows: CompiledRows(rows, backend="eager"))
    assert by_kernels is not of
    assert landed_by(fr.l1, CompiledRows) is fr.l1
    h = {name: 0.5 + w.square() for name, w in params.items()} if metric else None
    for step in (0.3, 0.4, torch.tensor(0.3), 0.0):
        found = by_kernels.prox(params, step, *hyper, metric=h, **options)
        assert_equal(found, of.prox(params, step, *hyper, metric=h, **options), atol=1e-6)
        assert [w.dtype for w in found.values()] == [w.dtype for w in params.values()]


def test_kernels_of_rows_tell_families_of_one_shape_apart():
    land, w = CompiledRows(fr.group_lasso, backend="eager"), weight(3, 4).detach()
    for _ in range(2):
        for number, weights in enumerate((None, "sqrt_size", torch.tensor([1.0, 2.0, 0.0]))):
            (found,) = land([(number, [w], {"weights": weights})], 0.2, ())
            assert_equal(found, fr.group_lasso.prox(w, 0.2, weights=weights), atol=1e-12)


@pytest.mark.slow
def test_a_compiled_step_tells_autograd_what_it_wrote():
    w = weight(6)
    optimizer = optim.SGD([w], 0.1)
    fr.regularize(optimizer, fr.l1, compile=True)
    loss = w.square().sum()
    stepped(optimizer, w)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_penalty_of_a_whole_tree_is_one_step():
    params = {"a": weight(4, 3).detach(), "b": weight(3, seed=1).detach()}
    assert_equal(
        by_hook(FUNCTIONAL["SGD"][0], params, quadratic, 3, joint, strength=0.3),
        by_chain(FUNCTIONAL["SGD"][1](joint, strength=0.3), params, quadratic, 3),
        atol=1e-12,
    )


# Masks beside groups


def test_a_mask_that_parts_a_group_is_refused_and_one_that_leaves_out_whole_groups_is_not():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    units = fr.coupled(fr.group_lasso, fr.channel_groups(net, layers=["0", "2"]))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match=r"mask leaves out '0\.bias', a part of groups of coupled.* Drop mask="):
        fr.regularize(optimizer, units, strength=1e-3, module=net, mask=fr.matrices)
    fr.regularize(optimizer, units, strength=1e3, module=net, mask=fr.select("0.*"))
    net(torch.randn(64, 3, device="cpu").to(DEVICE)).sum().backward()
    optimizer.step()
    assert not net[0].bias.any()
    assert net[2].weight.all()


def test_a_mask_that_parts_a_group_is_refused_in_sums_and_by_every_proximal_transform():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    params = {name: w.detach() for name, w in net.named_parameters()}
    units = fr.coupled(fr.group_lasso, fr.channel_groups(net))
    penalties = [
        units,
        0.1 * units,
        units + fr.half_l2,
        fr.coupled(fr.group_lasso, lambda params: fr.channel_groups(net)),
    ]
    for penalty in penalties:
        made = [
            fr.prox_sgd(0.1, penalty, mask=fr.matrices),
            fr.prox_adam(0.1, penalty, mask=fr.matrices),
            fr.proximal_step(fr.scale_by_rms(), 0.1, penalty, mask=fr.matrices),
            fr.fista(0.1, penalty, mask=fr.matrices),
            fr.rmda(0.1, penalty, mask=fr.matrices),
            fr.ftrl(0.1, penalty, mask=fr.matrices),
        ]
        for tx in made:
            with pytest.raises(ValueError, match=r"mask leaves out '0\.bias', a part of groups"):
                tx.init(params)
        with pytest.raises(ValueError, match=r"mask leaves out '0\.bias', a part of groups"):
            fr.minimize(lambda p: p["0.weight"].square().sum(), params, penalty, mask=fr.matrices)
        with pytest.raises(ValueError, match=r"mask leaves out '0\.bias', a part of groups"):
            fr.regularize(torch.optim.SGD(net.parameters()), penalty, module=net, mask=fr.matrices)
        fr.prox_adam(0.1, penalty, mask=~fr.select("2.bias")).init(params)
    with pytest.raises(ValueError, match=r"mask leaves out '0\.bias'"):
        fr.prox_adam(0.1, fr.half_l2 + units.given(mask=fr.matrices)).init(params)


# A strength that is far too large


@pytest.mark.parametrize("given", [{}, {"strength": 0.5}, {"strength": torch.tensor(0.5, device="cpu")}], ids=str)
def test_a_strength_that_leaves_no_weight_is_warned_of_once(given):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    handle = fr.regularize(optimizer, fr.l1, module=net, mask=fr.matrices, **given)
    assert "strength=" in repr(handle)
    said = []
    for _ in range(101):
        optimizer.zero_grad()
        (net(torch.ones(2, 3)).square().mean() * 0.01).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said += [str(each.message) for each in caught]
    assert not any([w.any() for w in net.parameters() if w.ndim > 1])
    assert len(said) == 1
    assert re.match(r"all 20 entries are zero after \d+ steps of regularize\(Adam, l1, strength=", said[0])


ON_MATRICES = {
    "a mask of its own": (fr.l1.given(mask=fr.matrices), {}),
    "a mask around it": (fr.l1, {"mask": fr.matrices}),
    "a term": (0.5 * fr.l1.given(mask=fr.matrices) + 0.5 * fr.l1.given(mask=fr.matrices), {}),
    "a pattern": (fr.per_leaf({"*weight": fr.l1}), {}),
}


@pytest.mark.parametrize(("penalty", "options"), ON_MATRICES.values(), ids=ON_MATRICES)
def test_what_a_penalty_does_is_told_of_the_parameters_on_which_it_acts(penalty, options):
    model = nn.Linear(5, 4)
    optimizer = optim.SGD(model.parameters(), 0.5)
    handle = fr.regularize(optimizer, penalty, module=model, **options)
    assert repr(handle).endswith("on 1 of 2 parameters")
    fr.regularize(optimizer, fr.half_l2, strength=0.1, module=model, mask=~fr.matrices)  # Of the others.
    with pytest.raises(ValueError, match=r"'weight' is regularized already"):
        fr.regularize(optimizer, fr.half_l2, strength=0.1, module=model)
    for w in model.parameters():
        w.grad = torch.full_like(w, 0.01)
    with pytest.warns(UserWarning, match=r"all 20 entries are zero after 1 steps of regularize\(SGD, "):
        optimizer.step()
    assert model.bias.all()


@pytest.mark.parametrize(("share", "dies"), [(0.2, False), (0.9, False), (1.2, True)])
def test_a_lasso_that_begins_at_zero_under_momentum_is_dead_only_above_lambda_max(share, dies):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator, device="cpu").to(DEVICE)
    y = x @ torch.tensor([2.0, -1.5, 0, 0, 1, 0, 0, 0], device=DEVICE)
    w = nn.Parameter(torch.zeros(8, device=DEVICE))
    loss = lambda w: (x @ w - y).square().mean() / 20
    most = fr.lambda_max(torch.func.grad(loss)(torch.zeros(8, device=DEVICE)), fr.l1)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    fr.regularize(optimizer, fr.l1, strength=share * most.item())
    said = []
    for _ in range(101):
        optimizer.zero_grad()
        loss(w).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said += [str(each.message) for each in caught]
    assert bool(w.any()) != dies
    assert len(said) == dies


def test_weights_that_begin_at_zero_under_a_warmup_are_no_sign_of_a_strength():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(DEVICE)
    nn.init.zeros_(net[1].weight)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    fr.regularize(optimizer, fr.l1, strength=1e-6, module=net, mask=fr.select("1.weight"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, n / 5))
    for _ in range(11):
        optimizer.zero_grad()
        (net(torch.ones(2, 3, device=DEVICE)) - 1).square().mean().backward()
        optimizer.step()  # Warnings are errors.
        scheduler.step()
    assert net[1].weight.all()


@pytest.mark.parametrize(
    ("penalty", "hyper", "strength"),
    [(fr.l1, (), 1e-3), (fr.l2_ball, (0.0,), 1.0), (fr.l1, (), 0.0), (fr.l1, (), 1e6)],
    ids=str,
)
def test_a_step_that_leaves_some_or_is_meant_to_leave_none_is_not_warned_of(penalty, hyper, strength):
    w = weight(3, 4)
    optimizer = torch.optim.SGD([w], lr=0.1)
    fr.regularize(optimizer, penalty, *hyper, strength=strength)
    stepped(optimizer, w)


# Parameters that are not what they seem


class Halved(nn.Module):
    def forward(self, w):
        return w / 2


def halved(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Halved())


#: What computes a weight from a parameter, and what a penalty of it is said to do.
COMPUTED = {
    "weight norm": (
        nn.utils.parametrizations.weight_norm,
        r"original1, the direction of weight norm: .*becomes NaN.* ~select\('0\.param.*original1'\).*\.original0'",
    ),
    "the older weight norm": (nn.utils.weight_norm, r"weight_v, the direction of weight norm: .*'0\.weight_g'"),
    "spectral norm": (nn.utils.parametrizations.spectral_norm, "its largest singular value: .*zeros of the weight"),
    "orthogonal": (nn.utils.parametrizations.orthogonal, "makes a rotation of: its zeros are no zeros of the weight"),
    "another": (halved, r"what Halved computes a weight from: its zeros and its size need not be"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(("wrap", "said"), COMPUTED.values(), ids=COMPUTED)
def test_a_parameter_from_which_a_weight_is_computed_is_warned_of(wrap, said):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    wrap(net[0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=said):
        fr.regularize(optimizer, fr.l1, strength=1e-3, module=net, mask=fr.matrices).remove()
    fr.regularize(optimizer, fr.l1, strength=1e-3, module=net, mask=fr.select("2.weight"))
    fr.regularize(optimizer, fr.max_norm, 3.0, module=net, mask=fr.matrices)


def test_the_remedy_for_directions_is_as_it_is_said():
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(20, 64)), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    mask = fr.matrices & ~fr.select("0.parametrizations.weight.original1")
    fr.regularize(optimizer, fr.l1, strength=4e-3, module=net, mask=mask)  # Warnings are errors.
    x = torch.randn(64, 20)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), x[:, :3].argmax(1))
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    dead = net[0].parametrizations.weight.original0[:, 0] == 0
    assert dead.any()
    assert (net[0].weight[dead] == 0).all()


def test_a_tree_of_hyperparameters_needs_no_values_that_the_mask_leaves_out():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    whole = {name: w.detach().clone() for name, w in net.named_parameters()}
    part = {name: w for name, w in whole.items() if name.startswith("0.")}
    options = {"module": net, "mask": fr.select("0.*")}
    for anchor, strength in [(whole, 0.5), (part, 0.5), (part, {"0.weight": 0.5, "0.bias": 0.5})]:
        net.load_state_dict(whole)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        handle = fr.regularize(optimizer, fr.anchored_l2, anchor, strength=strength, **options)
        stepped(optimizer, *net.parameters())
        value = handle.penalty_value()
        assert value > 0
        assert_equal(value, 0.5 * fr.anchored_l2({name: net.state_dict()[name] for name in part}, part))
    with pytest.raises(ValueError, match=r"lacks '0\.bias'"):
        fr.regularize(torch.optim.SGD(net.parameters(), lr=0.1), fr.l1, strength={"0.weight": 0.5}, **options)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: torch.compile(net, backend="eager")])
def test_an_anchor_from_a_file_says_which_of_its_names_are_no_parameters(wrap):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    saved, net = copy.deepcopy(net.state_dict()), wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"2\.weight is 0\.weight, 1\.running_mean is a buffer, .*saved\[name\]"):
        fr.regularize(optimizer, fr.anchored_l2, saved, module=net)
    with pytest.raises(ValueError, match=r"of its own: 2\.weight is 0\.weight\. Of a state_dict"):
        fr.regularize(optimizer, fr.l1, strength={"2.weight": 0.1}, module=net, mask=fr.select("0.weight"))
    kept = {name: saved[name.removeprefix("_orig_mod.")] for name, _ in net.named_parameters()}
    fr.regularize(optimizer, fr.anchored_l2, kept, module=net)


def test_an_anchor_that_moves_along_with_the_parameters_is_refused():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    copied = copy.deepcopy(net.state_dict())
    part = {name: w if name.startswith("1.") else copied[name] for name, w in net.state_dict().items()}
    regularize = functools.partial(fr.regularize, module=net)
    for shared in (net.state_dict(), {name: w.detach() for name, w in net.named_parameters()}, part):
        for penalty, *anchor in [(fr.anchored_l2, shared), (fr.l1 + 0.1 * fr.anchored_l2.given(shared),)]:
            with pytest.raises(ValueError, match=r"anchored_l2 got a tensor that shares memory with parameter '\d"):
                regularize(torch.optim.SGD(net.parameters(), lr=0.1), penalty, *anchor)
    regularize(torch.optim.SGD(net.parameters(), lr=0.1), fr.anchored_l2, copied)
    regularize(torch.optim.SGD(net.parameters(), lr=0.1), fr.anchored_l2, part, mask=fr.select("0.*"))


def test_parameters_that_the_module_no_longer_has_are_said():
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    fr.regularize(optimizer, fr.l1, strength=1e-6, module=net)
    for _ in range(2):
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    net.load_state_dict({name: w.clone() for name, w in net.state_dict().items()}, assign=True)
    net(torch.ones(1, 3)).sum().backward()
    with pytest.warns(UserWarning, match=r"no longer has, as after load_state_dict\(assign=True\)"):
        optimizer.step()


def test_parameters_that_were_replaced_are_said_where_the_old_ones_keep_their_gradients():
    net = nn.Linear(3, 2, device=DEVICE)
    optimizer = torch.optim.Adam(net.parameters())
    fr.regularize(optimizer, fr.l1, strength=1e-6, module=net)
    said = []
    for n in range(12):
        if n == 5:
            net.load_state_dict({name: w.clone() for name, w in net.state_dict().items()}, assign=True)
        net.zero_grad()  # Of the module, which does not know the old ones any more.
        net(torch.ones(1, 3, device=DEVICE)).sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said += [(n, str(each.message)) for each in caught]
    assert len(said) == 1
    assert said[0][0] == 9
    assert "no longer has, as after load_state_dict(assign=True)" in said[0][1]


def test_a_layer_that_is_a_new_one_is_said_by_name():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(net.parameters())
    fr.regularize(optimizer, fr.l1, strength=1e-6, module=net, mask=fr.matrices)
    net[1] = nn.Linear(4, 3)
    net(torch.ones(1, 3)).sum().backward()
    with pytest.warns(UserWarning, match=r"no effect on 1\.weight: .* no longer has, .* a layer is a new one"):
        optimizer.step()
    optimizer.zero_grad()
    net[0].bias.requires_grad_(False)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()  # It is said once.


def test_a_strength_is_not_set_from_outside():
    w = torch.ones(2, requires_grad=True)
    handle = fr.regularize(torch.optim.SGD([w], lr=0.1), fr.l1, strength=0.5)
    with pytest.raises(AttributeError, match=r"the strength of .* is not set from outside. Give .* a tensor"):
        handle.strength = 1.0
    assert handle.strength == 0.5
    for name in ("mask", "penalty", "lam"):
        with pytest.raises(
            AttributeError, match=rf"{name} of regularize\(SGD, l1, .* cannot be set: nothing would read"
        ):
            setattr(handle, name, fr.matrices)


@pytest.mark.parametrize("name", ["step", "zero_grad", "param_groups", "add_param_group"])
def test_a_handle_that_is_taken_for_the_optimizer_says_so(name):
    handle = fr.regularize(torch.optim.SGD([weight(2)], lr=0.1), fr.l1, strength=0.5)
    with pytest.raises(AttributeError, match=rf"has no attribute '{name}'. It is what regularize .*: optimizer.{name}"):
        getattr(handle, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'values'$"):
        handle.values  # noqa: B018  # Asked for.


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_two_modules_of_one_optimizer_may_have_equal_names(kind):
    def trained(with_module):
        torch.manual_seed(0)
        first, second = nn.Linear(3, 3), nn.Linear(4, 3)
        both, x = nn.ModuleList([first, second]), torch.randn(8, 4)
        params = nn.Module.parameters if with_module else nn.Module.named_parameters
        optimizer = kind([{"params": params(first)}, {"params": params(second), "lr": 0.01}], lr=0.1)
        handle = fr.regularize(optimizer, fr.l1, strength=0.1, module=both if with_module else None)
        for _ in range(3):
            optimizer.zero_grad()
            (first(x[:, :3]).square().mean() + second(x).mean()).backward()
            optimizer.step()
        return handle, list(both.parameters())

    (handle, params), (_, expected) = trained(False), trained(True)
    assert "4 of 4 parameters" in repr(handle)
    assert_close(params, expected, rtol=0, atol=0)
    assert_close(handle.penalty_value(), 0.1 * sum(w.abs().sum() for w in expected), rtol=1e-6, atol=0)


def test_equal_names_of_one_group_are_places_and_masks_match_all_of_a_name():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = torch.optim.SGD([*first.named_parameters(), *second.named_parameters()], lr=0.1)
    assert "4 of 4" in repr(fr.regularize(optimizer, fr.l1, strength=0.1))
    groups = [{"params": first.named_parameters()}, {"params": second.named_parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert "2 of 4" in repr(fr.regularize(optimizer, fr.l1, strength=0.1, mask=fr.select("*weight")))


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_the_look_of_a_distributed_checkpoint_at_a_state_is_no_step(lr):
    module = nn.Linear(3, 3)
    before = [w.detach().clone() for w in module.parameters()]
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, foreach=False)
    handle = fr.regularize(optimizer, fr.max_norm, fr.linear_schedule(0.01, 0.02, 10))
    get_optimizer_state_dict(module, optimizer)
    assert handle.steps == 0
    assert_close(list(module.parameters()), before, rtol=0, atol=0)
    for w in module.parameters():
        w.grad = torch.ones_like(w)
    optimizer.step()
    assert handle.steps == 1
    assert max(w.norm() for w in module.parameters()) <= 0.0175


# Wrappers that hold the optimizer which takes the steps


class Sharpness(optim.Optimizer):
    """Users call `second_step`, past the hooks of this one."""

    def __init__(self, params, held):
        super().__init__(params, {"lr": 0.1})
        inner = optim.SGD(self.param_groups)
        self.base_optimizer = held(inner)
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        raise NotImplementedError


class WithReference(optim.SGD):
    """Takes its steps itself."""

    def __init__(self, params, other):
        super().__init__(params, 0.1)
        self.other = other


@pytest.mark.parametrize(
    "given",
    [
        (fr.l1, {"strength": 50.0}),
        (fr.l1, {"strength": 50.0, "metric": lambda s, g: 1.0}),
        (fr.linf_ball, {}),
    ],
    ids=["a penalty", "in a metric", "a constraint"],
)
@pytest.mark.parametrize(
    ("held", "place"),
    [(lambda inner: inner, ""), (lambda inner: [inner], "[0]"), (lambda inner: {"slow": inner}, "['slow']")],
    ids=["itself", "in a list", "in a dict"],
)
def test_a_wrapper_is_refused_with_the_name_of_the_optimizer_that_takes_its_steps(given, held, place):
    (penalty, options), hyper = given, (0.1,) if given[0] is fr.linf_ball else ()
    w = weight(4, 3)
    outer, name = Sharpness([w], held), re.escape(f"base_optimizer{place}")
    with pytest.raises(
        ValueError, match=rf"Sharpness holds {name}, .* regularize\(optimizer.{name}, {penalty.__name__}, "
    ):
        fr.regularize(outer, penalty, *hyper, **options)
    inner = optim.SGD([w], 0.1)
    fr.regularize(inner, penalty, *hyper, **options)
    fr.regularize(WithReference([w], inner), penalty, *hyper, **options)


class WithoutRate(optim.Optimizer):
    """Finds its steps itself, and calls them otherwise."""

    def __init__(self, params):
        super().__init__(params, {"d": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for w in group["params"]:
                w -= group["d"] * w.grad


def test_an_optimizer_without_a_learning_rate_is_refused_before_its_first_step():
    w = weight(4, 3)
    with pytest.raises(ValueError, match=r"param group 0 of WithoutRate has no 'lr', but d\. .*group\['lr'\]"):
        fr.regularize(WithoutRate([w]), fr.l1, strength=0.1, metric=lambda state, group: 1.0)
    optimizer = WithoutRate([w])
    fr.regularize(optimizer, fr.linf_ball, 0.1)
    stepped(optimizer, w)
    assert w.abs().max() <= 0.1


def test_hooks_that_come_after_a_constraint_see_where_a_later_penalty_and_it_land():
    w, seen = weight(4, 3), []
    optimizer = optim.SGD([w], lr=0.1)
    see = lambda *_: seen.append(w.detach().clone())
    optimizer.register_step_post_hook(see)
    handle = fr.regularize(optimizer, fr.linf_ball, 0.1)
    optimizer.register_step_post_hook(see)
    fr.regularize(optimizer, fr.l1, strength=0.5)
    for _ in range(2):
        stepped(optimizer, w)
        before, after = seen[-2:]
        assert before.abs().max() > 0.1
        assert_equal(after, w.detach(), rtol=0, atol=0)
        assert_equal(after, (0.5 * fr.l1).prox(before, 0.1).clamp(-0.1, 0.1), atol=1e-12)
        w.data.copy_(weight(4, 3).detach())
    handle.remove()
    stepped(optimizer, w)
    assert_equal(seen[-1], (0.5 * fr.l1).prox(seen[-2], 0.1), atol=1e-12)


@pytest.mark.parametrize("first", ["penalty", "constraint"])
def test_a_constraint_holds_beside_a_penalty_whichever_came_first(first):
    w = weight(4, 3)
    optimizer = optim.Adam([w], lr=0.1)
    makes = [
        lambda: fr.regularize(optimizer, fr.l1, strength=0.5),
        lambda: fr.regularize(optimizer, fr.simplex, dim=1),
    ]
    handles = [make() for make in (makes if first == "penalty" else makes[::-1])]
    for seed in (1, 2):
        stepped(optimizer, w, seed=seed)
        assert_close(w.detach().sum(1), torch.ones_like(w[:, 0]).detach())
    for handle in handles:
        handle.remove()
    stepped(optimizer, w, seed=3)
    assert (w.sum(1) - 1).abs().min() > 1e-3


def test_strengths_in_param_groups_are_said_to_have_no_effect():
    w, v = weight(4, 3), weight(4, 3, seed=1)
    groups = lambda: [{"params": [("w", w)]}, {"params": [("v", v)], "strength": 0.5}]
    optimizer = optim.SGD(groups(), 0.1)
    with pytest.warns(UserWarning, match=r"param group 1 has strength=0.5, which regularize\(SGD, l1, .* not read"):
        fr.regularize(optimizer, fr.l1, strength=0.1)
    optimizer.param_groups[0]["strength"] = 0.2  # As one would change that of an Optimizer.
    w.grad = torch.zeros_like(w)
    with pytest.warns(UserWarning, match=r"param group 0 has strength=0.2, .* change that in place"):
        optimizer.step()
    optimizer.step()  # It is said once.
    w.grad = None
    factory = lambda lr, strength: fr.prox_sgd(lr, fr.l1, strength=strength)
    own = fr.Optimizer(groups(), factory, lr=0.1, strength=0.1, compile=False)
    fr.regularize(own, fr.linf_ball, 1.0)


def test_a_penalty_that_is_written_alike_is_the_same():
    """As where a cell of a notebook is run again."""
    optimizer = optim.SGD([weight(4, 3)], 0.1)
    fr.regularize(optimizer, 0.5 * fr.l1)
    with pytest.raises(ValueError, match=r"remove\(\) it first, on what regularize returned"):
        fr.regularize(optimizer, 0.5 * fr.l1)
    with pytest.raises(ValueError, match="Regularize with their sum"):
        fr.regularize(optimizer, 0.4 * fr.l1)


# A handle in a module


def loaded(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW, optim.Adadelta])
def test_a_module_that_holds_a_handle_is_copied_with_it(copied, kind):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).to(DEVICE)
    optimizer = kind(model.parameters(), lr=0.01)
    model.penalty = handle = fr.regularize(optimizer, fr.l1, strength=2e-3, module=model, mask=fr.matrices)
    before = sum([2e-3 * w.detach().abs().sum() for w in model.parameters() if w.ndim > 1])
    other = copied(model)
    assert_close(other.penalty.penalty_value(), before)
    assert "(a copy, which no optimizer follows)" in repr(other.penalty)
    assert "copy" not in repr(handle)
    other.penalty.remove()  # Takes nothing off the first.
    with torch.no_grad():
        other[0].weight.zero_()  # The copy has parameters of its own.
    assert other.penalty.penalty_value() < before
    assert_close(handle.penalty_value(), before)
    with pytest.warns(UserWarning, match="has no effect: call regularize on the optimizer"):
        other.penalty.load_state_dict(handle.state_dict())
    for w in model.parameters():
        w.grad = torch.ones_like(w)
    optimizer.step()
    assert handle.steps == 1
    other.penalty = fr.regularize(kind(other.parameters()), fr.l1, module=other)


# Groups that are added later


@pytest.mark.parametrize("named", ["by the module", "by wrapped names"])
def test_a_tree_of_strengths_may_name_parameters_that_the_optimizer_gets_later(named):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).to(DEVICE)
    prefix = "module." if named == "by wrapped names" else ""
    strength = {f"{prefix}{name}": 0.5 * (1 + i) for i, (name, _) in enumerate(model.named_parameters())}
    optimizer = optim.SGD(model[1].parameters(), 0.1)
    module = nn.DataParallel(model) if prefix else model
    fr.regularize(optimizer, fr.l1, strength=strength, module=module)
    for grouped in (model[1], model):
        before = {name: w.detach().clone() for name, w in model.named_parameters()}
        for w in model.parameters():
            w.grad = torch.zeros_like(w)
        optimizer.step()
        moved = {f"{prefix}{name}": w for name, w in model.named_parameters() if w in {*grouped.parameters()}}
        expected = {name: fr.l1.prox(before[name.removeprefix(prefix)], 0.1 * strength[name]) for name in moved}
        assert_close({k: w.detach() for k, w in moved.items()}, expected)
        if grouped is not model:
            optimizer.add_param_group({"params": model[0].parameters()})
    late, only = optim.SGD(model[1].parameters(), 0.1), {k: v for k, v in strength.items() if "1." in k}
    fr.regularize(late, fr.l1, strength=only, module=module)
    late.add_param_group({"params": model[0].parameters()})
    with pytest.raises(ValueError, match=r"lacks '0.bias'.* got other parameters after regularize"):
        late.step()
    with pytest.raises(ValueError, match="'typo', unknown to the parameters"):
        fr.regularize(optim.SGD(model.parameters(), 0.1), fr.l1, strength={**strength, "typo": 1.0}, module=module)


def test_names_stay_what_they_were_where_others_are_added():
    model, extra = nn.DataParallel(nn.Sequential(nn.Linear(4, 4))).to(DEVICE), nn.Linear(4, 2).to(DEVICE)
    optimizer = optim.SGD(model.named_parameters(), 0.1)
    fr.regularize(optimizer, fr.l1, strength=1e3, mask=fr.select("0.weight"))
    optimizer.add_param_group({"params": list(extra.named_parameters())})
    for w in [*model.parameters(), *extra.parameters()]:
        w.grad = torch.zeros_like(w)
    optimizer.step()
    assert not model.module[0].weight.any()
    assert model.module[0].bias.any()
    assert extra.weight.any()
