"""What torch.optim has too: the same steps, beside the real optimizers.

Not comparable, because they are other algorithms: `torch.optim.NAdam` decays its momentum (`momentum_decay`),
`torch.optim.Adam(amsgrad=True)` corrects the greatest mean square, not the mean square before it is compared, and
`torch.optim.Rprop` goes one step earlier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import DEVICE
from torch.func import functional_call, grad
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop, lr_scheduler

import funcreg as fr

STEPS = 30


def problem():
    """A small network, and its loss as a function of the parameters."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    return model, lambda params: (functional_call(model, params, (x,)) - y).square().mean()


def by_torch(make, before=lambda params: None, schedule=None):
    """The parameters after each step of a torch optimizer, with something done to the gradients before it."""
    model, loss = problem()
    optimizer = make(list(model.parameters()))
    scheduler = schedule and schedule(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(dict(model.named_parameters())).backward()
        before(model.parameters())
        optimizer.step()
        if scheduler:
            scheduler.step()
        yield {name: w.detach().clone() for name, w in model.named_parameters()}


def by_funcreg(tx):
    model, loss = problem()
    params = {name: w.detach() for name, w in model.named_parameters()}
    state = tx.init(params)
    for _ in range(STEPS):
        updates, state = tx.update(grad(loss)(params), state, params)
        params = fr.apply_updates(params, updates)
        yield params


def largest_difference(ours, theirs):
    return max((a[name] - b[name]).abs().max() for a, b in zip(ours, theirs, strict=True) for name in a)


class Case(NamedTuple):
    tx: Callable[[], fr.Transform]
    optimizer: Callable[[list[Any]], torch.optim.Optimizer]
    before: Callable[[Any], Any] = lambda params: None
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    close: float = 1e-12


def groups(weights, biases):
    """Two groups of parameters: matrices, and vectors."""
    return lambda params: [
        {"params": [w for w in params if w.ndim > 1], **weights},
        {"params": [w for w in params if w.ndim < 2], **biases},
    ]


RATES = {"0.weight": 0.1, "0.bias": 0.02, "2.weight": 0.1, "2.bias": 0.02}

CASES = {
    "SGD": Case(lambda: fr.sgd(0.1), lambda p: SGD(p, 0.1)),
    "SGD momentum": Case(lambda: fr.sgd(0.1, 0.9), lambda p: SGD(p, 0.1, 0.9)),
    "SGD nesterov": Case(lambda: fr.sgd(0.1, 0.9, nesterov=True), lambda p: SGD(p, 0.1, 0.9, nesterov=True)),
    "SGD weight_decay": Case(
        lambda: fr.chain(fr.add_decayed_weights(0.1), fr.sgd(0.1, 0.9)), lambda p: SGD(p, 0.1, 0.9, weight_decay=0.1)
    ),
    "SGD maximize": Case(
        lambda: fr.chain(fr.clip(0.1), fr.trace(0.5), fr.scale_by_learning_rate(0.1, flip_sign=False)),
        lambda p: SGD(p, 0.1, 0.5, maximize=True),
        before=lambda p: clip_grad_value_(p, 0.1),
    ),
    "SGD rates by group": Case(
        lambda: fr.sgd(RATES, 0.9), lambda p: SGD(groups({"lr": 0.1}, {"lr": 0.02})(p), momentum=0.9)
    ),
    "Adam": Case(lambda: fr.adam(0.01), lambda p: Adam(p, 0.01)),
    "Adam keywords": Case(lambda: fr.adam(0.01, 0.8, 0.95, 1e-2), lambda p: Adam(p, 0.01, (0.8, 0.95), 1e-2)),
    "Adam weight_decay": Case(
        lambda: fr.chain(fr.add_decayed_weights(0.1), fr.adam(0.01)), lambda p: Adam(p, 0.01, weight_decay=0.1)
    ),
    "AdamW": Case(lambda: fr.adamw(0.01, weight_decay=0.01), lambda p: AdamW(p, 0.01)),
    "AdamW keywords": Case(
        lambda: fr.adamw(0.01, 0.8, 0.95, 1e-2, weight_decay=0.3),
        lambda p: AdamW(p, 0.01, (0.8, 0.95), 1e-2, weight_decay=0.3),
    ),
    "AdamW decay by group": Case(
        lambda: fr.adamw(0.01, weight_decay=0.3, mask=fr.matrices),
        lambda p: AdamW(groups({"weight_decay": 0.3}, {"weight_decay": 0.0})(p), 0.01),
    ),
    "AdamW of some": Case(
        lambda: fr.chain(fr.freeze(~fr.matrices), fr.adamw(0.01, weight_decay=0.3)),
        lambda p: AdamW(groups({}, {})(p)[:1], 0.01, weight_decay=0.3),
    ),
    "RMSprop": Case(lambda: fr.rmsprop(0.01, 0.99, eps_in_sqrt=False), lambda p: RMSprop(p, 0.01)),
    "RMSprop keywords": Case(
        lambda: fr.rmsprop(0.01, 0.9, 1e-2, eps_in_sqrt=False), lambda p: RMSprop(p, 0.01, 0.9, 1e-2)
    ),
    "RMSprop centered": Case(
        lambda: fr.rmsprop(0.01, 0.99, eps_in_sqrt=False, centered=True), lambda p: RMSprop(p, 0.01, centered=True)
    ),
    "RMSprop momentum": Case(
        lambda: fr.rmsprop(0.01, 0.99, eps_in_sqrt=False, momentum=0.9), lambda p: RMSprop(p, 0.01, momentum=0.9)
    ),
    "RMSprop weight_decay, centered, momentum": Case(
        lambda: fr.chain(
            fr.add_decayed_weights(0.1), fr.rmsprop(0.01, 0.9, 1e-3, eps_in_sqrt=False, centered=True, momentum=0.8)
        ),
        lambda p: RMSprop(p, 0.01, 0.9, 1e-3, 0.1, 0.8, True),
    ),
    "Adagrad without eps": Case(
        lambda: fr.adagrad(0.1, eps=0.0), lambda p: Adagrad(p, 0.1, initial_accumulator_value=0.1, eps=0.0)
    ),
    # Near, not equal: the eps of torch stands beside the root, that of funcreg, as optax's, below it.
    # A GPU multiplies and adds in one rounding.
    "Adagrad": Case(
        lambda: fr.adagrad(0.1, 0.0, eps=1e-20),
        lambda p: Adagrad(p, 0.1, foreach=False),
        close=1e-7 if torch.device(DEVICE).type == "cpu" else 1e-6,
    ),
    "Adagrad not from zero": Case(
        lambda: fr.adagrad(0.1, eps=1e-10), lambda p: Adagrad(p, 0.1, initial_accumulator_value=0.1), close=1e-9
    ),
    "Adamax": Case(lambda: fr.adamax(0.01), lambda p: Adamax(p, 0.01)),
    "Adamax keywords, weight_decay": Case(
        lambda: fr.chain(fr.add_decayed_weights(0.1), fr.adamax(0.01, 0.8, 0.9, 1e-2)),
        lambda p: Adamax(p, 0.01, (0.8, 0.9), 1e-2, 0.1),
    ),
    # With such a decay its momentum is whole from the first step on. It keeps a power of it in float32.
    "NAdam": Case(lambda: fr.nadam(0.01), lambda p: NAdam(p, 0.01, momentum_decay=1e6), close=1e-7),
    "NAdam keywords, decoupled": Case(
        lambda: fr.nadamw(0.01, 0.8, 0.95, 1e-2, weight_decay=0.3),
        lambda p: NAdam(p, 0.01, (0.8, 0.95), 1e-2, 0.3, 1e6, decoupled_weight_decay=True),
        close=1e-7,
    ),
    # Its eps stands beside a root that is not corrected yet.
    "RAdam without eps": Case(lambda: fr.radam(0.01, eps=0.0), lambda p: RAdam(p, 0.01, eps=0.0)),
    "RAdam keywords, without eps": Case(
        lambda: fr.radam(0.01, 0.8, 0.95, eps=0.0), lambda p: RAdam(p, 0.01, (0.8, 0.95), eps=0.0)
    ),
    "RAdam": Case(lambda: fr.radam(0.01), lambda p: RAdam(p, 0.01), close=1e-5),
    "Adadelta": Case(lambda: fr.adadelta(1.0), lambda p: Adadelta(p)),
    "Adadelta keywords, weight_decay": Case(
        lambda: fr.adadelta(0.5, 0.8, 1e-3, weight_decay=0.1), lambda p: Adadelta(p, 0.5, 0.8, 1e-3, 0.1)
    ),
    "clip_grad_norm_": Case(
        lambda: fr.chain(fr.clip_by_global_norm(0.05, eps=1e-6), fr.sgd(0.1, 0.9)),
        lambda p: SGD(p, 0.1, 0.9),
        before=lambda p: clip_grad_norm_(p, 0.05),
    ),
    "clip_grad_norm_ at times": Case(
        lambda: fr.chain(fr.clip_by_global_norm(0.2, eps=1e-6), fr.sgd(0.1)),
        lambda p: SGD(p, 0.1),
        before=lambda p: clip_grad_norm_(p, 0.2),
    ),
    "clip_grad_norm_ without its eps": Case(
        lambda: fr.chain(fr.clip_by_global_norm(0.05), fr.sgd(0.1)),
        lambda p: SGD(p, 0.1),
        before=lambda p: clip_grad_norm_(p, 0.05),
        close=1e-5,
    ),
    "LinearLR": Case(
        lambda: fr.sgd(fr.linear_schedule(0.1, 0.01, 20)),
        lambda p: SGD(p, 0.1),
        schedule=lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, 20),
    ),
    "PolynomialLR": Case(
        lambda: fr.adam(fr.polynomial_schedule(0.1, 0.0, 2, 20)),
        lambda p: Adam(p, 0.1),
        schedule=lambda o: lr_scheduler.PolynomialLR(o, 20, 2.0),
    ),
    "ExponentialLR": Case(
        lambda: fr.adamw(fr.exponential_decay(0.1, 1, 0.9), weight_decay=0.3),
        lambda p: AdamW(p, 0.1, weight_decay=0.3),
        schedule=lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    ),
    "StepLR": Case(
        lambda: fr.sgd(fr.exponential_decay(0.1, 7, 0.5, staircase=True), 0.9),
        lambda p: SGD(p, 0.1, 0.9),
        schedule=lambda o: lr_scheduler.StepLR(o, 7, 0.5),
    ),
    "MultiStepLR": Case(
        lambda: fr.sgd(fr.piecewise_constant_schedule(0.1, {5: 0.5, 20: 0.5})),
        lambda p: SGD(p, 0.1),
        schedule=lambda o: lr_scheduler.MultiStepLR(o, [5, 20], 0.5),
    ),
    "CosineAnnealingLR": Case(
        lambda: fr.adam(fr.cosine_decay_schedule(0.1, 30, alpha=0.1)),
        lambda p: Adam(p, 0.1),
        schedule=lambda o: lr_scheduler.CosineAnnealingLR(o, 30, 0.01),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_thirty_steps_are_those_of_torch(case):
    theirs = by_torch(case.optimizer, case.before, case.schedule)
    assert largest_difference(by_funcreg(case.tx()), theirs) < case.close


def test_dampened_momentum_is_an_average_that_begins_at_the_first_gradient():
    model, loss = problem()
    first = grad(loss)({name: w.detach() for name, w in model.named_parameters()})
    ema = fr.ema(0.9, debias=False)
    started = fr.Transform(lambda params: ema.init(params)._replace(ema=first), ema.update)
    dampened = by_torch(lambda p: SGD(p, 0.1, 0.9, dampening=0.9))
    assert largest_difference(by_funcreg(fr.chain(started, fr.scale(-0.1))), dampened) < 1e-12


@pytest.mark.parametrize(
    ("tx", "optimizer"),
    [
        (lambda: fr.amsgrad(0.01, b2=0.9), lambda p: Adam(p, 0.01, (0.9, 0.9), amsgrad=True)),
        (lambda: fr.nadamw(0.01, weight_decay=0.0), lambda p: NAdam(p, 0.01)),
        (lambda: fr.rprop(0.01), lambda p: Rprop(p, 0.01)),
        (lambda: fr.chain(fr.ema(0.9, debias=False), fr.sgd(0.1)), lambda p: SGD(p, 0.1, 0.9, dampening=0.9)),
    ],
    ids=["amsgrad", "NAdam", "Rprop", "dampening"],
)
def test_what_is_another_algorithm_in_torch_differs(tx, optimizer):
    assert largest_difference(by_funcreg(tx()), by_torch(optimizer)) > 1e-3
