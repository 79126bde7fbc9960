"""`Optimizer`: any chain in the loops, schedulers, checkpoints and trainers of torch."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import math
import pickle
import re
import warnings
import weakref
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import DEVICE, TRANSFORMS, assert_equal, cpu_only
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import vmap
from torch.optim import SGD, Adagrad, AdamW, RMSprop, lr_scheduler

import funcreg as fr
from funcreg.fused import lowering, plan

every_transform = pytest.mark.parametrize("case", TRANSFORMS.values(), ids=TRANSFORMS)
#: Plain functions, and the fused step without a compiler.
every_way = pytest.mark.parametrize("compile", [False, "eager"], ids=["plain", "fused"])
LASSO = lambda lr, strength: fr.prox_adam(lr, fr.l1, strength=strength, mask=fr.matrices)


def lasso(lr, strength):
    return LASSO(lr, strength)


def network(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def backward(model, n):
    """Gradients of the n-th batch."""
    generator = torch.Generator("cpu").manual_seed(n)
    p = next(model.parameters())
    x = torch.randn(6, 5, generator=generator, device="cpu").to(p.device, p.dtype)
    model.zero_grad()
    model(x).square().mean().backward()


def trained(model, optimizer, steps=5, begin=0, scheduler=None):
    for n in range(begin, begin + steps):
        backward(model, n)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [p.detach().clone() for p in model.parameters()]


def made(compile=False, dtype=torch.float64, factory=LASSO, **hyper):
    model = network(dtype)
    hyper = hyper or {"lr": 1e-2, "strength": 1e-3}
    return model, fr.Optimizer(model.named_parameters(), factory, compile=compile, **hyper)


@pytest.fixture
def compilations(monkeypatch):
    """How many kernels were compiled."""
    count, compile = [0], lowering.Compiler._compile

    def counting(self, *args):
        count[0] += 1
        return compile(self, *args)

    monkeypatch.setattr(lowering.Compiler, "_compile", counting)
    return count


# It computes what the chain does


@pytest.mark.filterwarnings("ignore:param group 0. .* go uphill")
@every_transform
def test_it_is_the_functional_chain_bit_for_bit(case):
    model = network()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    tx, state = case.make(), case.make().init(params)
    optimizer = fr.Optimizer(model.named_parameters(), lambda: tx, compile=False)
    for n in range(3):
        backward(model, n)
        grads = {name: p.grad for name, p in model.named_parameters()}
        updates, state = tx.update(grads, state, params)
        params = fr.apply_updates(params, updates)
        optimizer.step()
        assert_equal({name: p.detach() for name, p in model.named_parameters()}, params)
    if case.shared:
        return
    places = [x.data_ptr() for p in model.parameters() for x in [p, *optimizer.state[p].values()] if x.ndim]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_numbers_in_groups_give_the_bits_of_numbers_in_the_chain(dtype):
    model, optimizer = made(dtype=dtype)
    other = network(dtype)
    constant = fr.Optimizer(other.named_parameters(), lambda: LASSO(1e-2, 1e-3), compile=False)
    rounding = {} if torch.device(DEVICE).type == "cpu" else {"rtol": 1e-6, "atol": 1e-7}  # Of products and sums.
    assert_equal(trained(model, optimizer), trained(other, constant), **rounding)


def test_the_compiled_step_is_the_plain_one_up_to_rounding():
    results = [trained(*made(compile)) for compile in (False, "eager")]
    assert_equal(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_momentum_that_a_scheduler_changes_is_followed_as_by_regularize(nesterov):
    factory = lambda lr, momentum: fr.prox_sgd(lr, fr.l1, strength=1e-2, momentum=momentum, nesterov=nesterov)
    (model, plain), other = made(factory=factory, lr=1e-2, momentum=0.9), network()
    sgd = SGD(other.parameters(), lr=1e-2, momentum=0.9, nesterov=nesterov)
    fr.regularize(sgd, fr.l1, strength=1e-2)
    rows = [(each, o, lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 4)) for each, o in ((model, plain), (other, sgd))]
    found = [trained(each, o, steps=12, scheduler=scheduler) for each, o, scheduler in rows]
    assert plain.param_groups[0]["momentum"] == sgd.param_groups[0]["momentum"] < 0.9
    assert_equal(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("lands", ["a penalty of groups", "a constraint"])
def test_momentum_and_sums_over_rows_compile_where_a_leaf_is_left_out(lands):
    """Where Inductor fails to fuse all of it; a warning of that is an error."""
    make = {
        "a penalty of groups": lambda lr: fr.prox_sgd(lr, fr.group_lasso, strength=0.2, momentum=0.9, mask=fr.matrices),
        "a constraint": lambda lr: fr.chain(fr.sgd(lr, momentum=0.9), fr.project(fr.max_norm, 0.5, mask=fr.matrices)),
    }[lands]
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape).to(DEVICE)) for shape in ((8, 27), (8,))]
        optimizer = fr.Optimizer(params, make, lr=0.1, compile=compile)
        for _ in range(3):
            for w in params:
                w.grad = torch.ones_like(w)
            optimizer.step()
        found.append([w.detach() for w in params])
    assert_equal(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.ones(()), "grad_dtype"), reason="gradients have the dtype of their leaf there")
def test_gradients_of_another_dtype_compile():
    """A compiler that is given a view of a parameter looks at the gradient of that, too."""
    ends = []
    for compile in (True, False):
        w = nn.Parameter(torch.linspace(-1, 1, 64, device=DEVICE).reshape(8, 8))
        w.grad_dtype = torch.bfloat16
        w.grad = torch.ones_like(w, dtype=torch.bfloat16)
        optimizer = fr.Optimizer([w], LASSO, lr=0.1, strength=1e-3, compile=compile)
        for _ in range(2):
            optimizer.step()
        ends.append(w.detach())
    assert_equal(*ends, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_it_is_compiled_by_default(compilations):
    model = network(torch.float32)
    optimizer = fr.Optimizer(model.named_parameters(), LASSO, lr=1e-2, strength=1e-3)
    found = trained(model, optimizer)
    assert compilations[0]
    assert_equal(found, trained(*made(dtype=torch.float32)), rtol=1e-5, atol=1e-6)


class Case(NamedTuple):
    factory: Any
    hyper: dict[str, float]
    torchs: Any
    cycles: str | None = None  # What OneCycleLR and CyclicLR change besides lr.
    close: float = 1e-12


def decayed_sgd(lr, momentum, nesterov=False):
    return fr.chain(fr.add_decayed_weights(0.1), fr.sgd(lr, momentum, nesterov=nesterov))


CASES = {
    "AdamW": Case(
        lambda lr, weight_decay: fr.adamw(lr, weight_decay=weight_decay),
        {"lr": 1e-2, "weight_decay": 0.1},
        lambda p: AdamW(p, 1e-2, weight_decay=0.1),
    ),
    "AdamW betas": Case(
        lambda lr, betas: fr.adamw(lr, *betas, weight_decay=0.01),
        {"lr": 1e-2, "betas": (0.8, 0.95)},
        lambda p: AdamW(p, 1e-2, (0.8, 0.95)),
    ),
    "SGD": Case(lambda lr: fr.sgd(lr), {"lr": 0.1}, lambda p: SGD(p, 0.1)),
    "SGD momentum": Case(
        lambda lr, momentum: decayed_sgd(lr, momentum),
        {"lr": 0.1, "momentum": 0.9},
        lambda p: SGD(p, 0.1, 0.9, weight_decay=0.1),
        cycles="momentum",
    ),
    "SGD nesterov": Case(
        decayed_sgd,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        lambda p: SGD(p, 0.1, 0.9, weight_decay=0.1, nesterov=True),
        cycles="momentum",
    ),
    "RMSprop": Case(
        lambda lr, alpha: fr.rmsprop(lr, alpha, eps_in_sqrt=False),
        {"lr": 1e-2, "alpha": 0.95},
        lambda p: RMSprop(p, 1e-2, 0.95),
    ),
    "Adagrad": Case(
        lambda lr: fr.adagrad(lr, eps=0.0), {"lr": 0.1}, lambda p: Adagrad(p, 0.1, initial_accumulator_value=0.1, eps=0)
    ),
}

SCHEDULERS = {
    "StepLR": lambda o, cycles: lr_scheduler.StepLR(o, 3, 0.5),
    "CosineAnnealingLR": lambda o, cycles: lr_scheduler.CosineAnnealingLR(o, 10),
    "LambdaLR": lambda o, cycles: lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
    "SequentialLR": lambda o, cycles: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "OneCycleLR": lambda o, cycles: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12, cycle_momentum=bool(cycles)),
    "CyclicLR": lambda o, cycles: lr_scheduler.CyclicLR(o, 1e-3, 0.1, 4, cycle_momentum=bool(cycles)),
    "CosineAnnealingWarmRestarts": lambda o, cycles: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
}


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_torchs_optimizer_under_every_scheduler(case, schedule):
    cycles = case.cycles or ("betas" if "betas" in case.hyper else None)
    model, optimizer = made(factory=case.factory, **case.hyper)
    ours = trained(model, optimizer, 10, scheduler=schedule(optimizer, cycles))
    other = network()
    theirs = case.torchs(list(other.parameters()))
    assert_equal(ours, trained(other, theirs, 10, scheduler=schedule(theirs, cycles)), rtol=0, atol=case.close)


def test_a_plateau_and_averaging_schedulers_work():
    model, optimizer = made()
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    plateau.step(1.0), plateau.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    average = torch.optim.swa_utils.AveragedModel(model)
    swa = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.5, anneal_epochs=1)
    trained(model, optimizer, 2, scheduler=swa)
    average.update_parameters(model)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_scheduler_that_cycles_what_is_not_there_says_so():
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        lr_scheduler.OneCycleLR(made()[1], 0.1, total_steps=10)


# Hyperparameters


def test_no_new_number_compiles_anything(compilations):
    model, optimizer = made("aot_eager")
    trained(model, optimizer, 1)
    once = compilations[0]
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20, cycle_momentum=False)
    for n, strength in enumerate([1e-3, 0, 1, np.float64(1e-3), np.float32(0.5), 1e-4, math.inf]):
        optimizer.param_groups[0]["strength"] = strength
        trained(model, optimizer, 1, n, scheduler)
    assert compilations[0] == once
    assert len(optimizer._steps) == 1


@every_way
def test_what_is_changed_by_hand_acts_at_the_next_step(compile):
    model, optimizer = made(compile)
    trained(model, optimizer, 2)
    assert fr.sparsity(dict(model.named_parameters()), mask=fr.matrices) == 0
    optimizer.param_groups[0]["strength"] = 1e3
    trained(model, optimizer, 1)
    assert fr.sparsity(dict(model.named_parameters()), mask=fr.matrices) == 1
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    assert_equal(trained(model, optimizer, 1), before)


@every_way
def test_rates_may_be_tensors_that_change_in_place(compile):
    model, optimizer = made(compile, lr=torch.tensor(1e-2, dtype=torch.float64), strength=1e-3)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    other, plain = made(compile)
    assert_equal(
        trained(model, optimizer, scheduler=scheduler),
        trained(other, plain, scheduler=lr_scheduler.ExponentialLR(plain, 0.5)),
        rtol=1e-12,
    )
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    if torch.device(DEVICE).type != "cpu":  # Where to read a number would wait for the device.
        return
    optimizer.param_groups[0]["lr"].neg_()
    with pytest.raises(ValueError, match="param group 0: learning_rate is -"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0  # A number instead.
    before = [p.detach().clone() for p in model.parameters()]
    assert_equal(trained(model, optimizer, 1), before)


@every_way
@pytest.mark.parametrize("shape", [(1,), (1, 1, 1)])
def test_a_rate_in_a_tensor_may_have_any_shape_of_one_number_as_in_torch(compile, shape):
    scalar, found = nn.Parameter(torch.tensor(1.0)), []
    for lr in (0.5, torch.full(shape, 0.5)):
        w, v = nn.Parameter(scalar.detach().clone()), nn.Parameter(torch.ones(3))
        optimizer = fr.Optimizer([w, v], lambda lr: fr.sgd(lr, 0.9), lr=lr, compile=compile)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            w.grad, v.grad = torch.ones_like(w), torch.ones_like(v)
            optimizer.step()
            scheduler.step()
        found.append([w.detach(), v.detach()])
    assert_equal(*found, rtol=1e-6)
    assert optimizer.param_groups[0]["lr"].shape == shape


STRENGTHS = {"0.weight": 0.1, "0.bias": 0.0, "2.weight": 0.2, "2.bias": 0.0}


def test_whole_numbers_bools_strings_and_trees_reach_the_factory():
    seen = []

    def factory(lr, every, nesterov, kind, betas, strength):
        seen.append((every, nesterov, kind))
        return fr.prox_adam(lr, fr.l1, strength=strength, b1=betas[0])

    hyper = {"lr": 1, "every": 2, "nesterov": True, "kind": "a", "betas": (0.9, 0.99), "strength": STRENGTHS}
    model, optimizer = made(factory=factory, **hyper)
    assert seen[-1] == (2, True, "a")
    trained(model, optimizer, 1)
    count = len(seen)
    optimizer.param_groups[0]["lr"] = 0.5  # It was a whole number.
    trained(model, optimizer, 1)
    assert len(seen) == count
    optimizer.param_groups[0]["every"] = 3
    trained(model, optimizer, 1)
    assert seen[-1] == (3, True, "a")


@every_way
def test_groups_have_values_and_chains_of_their_own(compile):
    model, other = network(), network()
    groups = lambda net: [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters()}]
    factory = lambda lr, momentum: fr.chain(fr.clip_by_global_norm(0.5), fr.sgd(lr, momentum))
    optimizer = fr.Optimizer(groups(model), factory, lr=1e-2, momentum=0.9, compile=compile)
    found = trained(model, optimizer, 4)
    each = [
        fr.Optimizer(net.parameters(), factory, lr=lr, momentum=0.9, compile=compile)
        for net, lr in ((other[0], 0.1), (other[2], 1e-2))
    ]
    for n in range(4):
        backward(other, n)
        for one in each:
            one.step()
    assert_equal(found, [p.detach() for p in other.parameters()], rtol=1e-12)


@every_way
def test_names_are_known_to_masks(compile):
    factory = lambda lr: fr.prox_sgd(lr, fr.l1, strength=1e6, mask=fr.select("2.*"))
    model, optimizer = made(compile, factory=factory, lr=0.1)
    trained(model, optimizer, 1)
    zeros = {name: bool((p == 0).all()) for name, p in model.named_parameters()}
    assert zeros == {"0.weight": False, "0.bias": False, "2.weight": True, "2.bias": True}


@every_way
def test_a_group_may_be_added_between_steps(compile):
    model = network()
    optimizer = fr.Optimizer(model[0].named_parameters(), LASSO, lr=1e-2, strength=1e-3, compile=compile)
    trained(model, optimizer, 2)
    optimizer.add_param_group({"params": model[2].named_parameters(), "lr": 0.5})
    assert optimizer.param_groups[1]["strength"] == 1e-3
    before = model[2].weight.detach().clone()
    trained(model, optimizer, 1)
    assert (model[2].weight != before).any()
    assert optimizer.state[model[2].weight]["steps"] == 1
    assert optimizer.state[model[0].weight]["steps"] == 3


# Parameters without gradients


@every_way
def test_a_parameter_without_a_gradient_does_not_move_nor_does_its_state(compile):
    factory = lambda lr: fr.chain(fr.clip_by_global_norm(0.1), fr.trace(0.9), fr.scale_by_learning_rate(lr))
    model, optimizer = made(compile, factory=factory, lr=0.1)
    trained(model, optimizer, 2)
    rest = [model[0].weight, model[0].bias]
    kept = copy.deepcopy([(p.detach(), optimizer.state[p]) for p in rest])
    backward(model, 2)
    norm = torch.stack([p.grad.square().sum() for p in model[2].parameters()]).sum().sqrt()
    last = optimizer.state[model[2].bias]["1.trace"].clone()
    for p in rest:
        p.grad = None
    optimizer.step()
    assert_equal([(p.detach(), optimizer.state[p]) for p in rest], kept)
    moved = 0.9 * last + model[2].bias.grad * (0.1 / norm).clamp(max=1)  # The norm is that of what has gradients.
    assert_equal(optimizer.state[model[2].bias]["1.trace"], moved, rtol=1e-12)
    model.zero_grad()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.step()  # Nothing at all.
    assert_equal(optimizer.state_dict()["state"], before["state"])


@every_way
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parameters_that_begin_late_are_those_of_torch(case, compile):
    model, optimizer = made(compile, factory=case.factory, **case.hyper)
    other = network()
    theirs = case.torchs(list(other.parameters()))
    for net, opt in ((model, optimizer), (other, theirs)):
        net[0].requires_grad_(False)
        trained(net, opt, 3)
        net[0].requires_grad_(True)
        trained(net, opt, 3, 3)
    assert_equal(
        [p.detach() for p in model.parameters()], [p.detach() for p in other.parameters()], rtol=0, atol=case.close
    )
    if optimizer.state[model[2].bias]:  # Counters of their own also after a checkpoint.
        again = fr.Optimizer(model.named_parameters(), case.factory, compile=compile, **case.hyper)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert_equal(trained(model, again, 3, 6), trained(other, theirs, 3, 6), rtol=0, atol=case.close)


def test_one_that_is_looked_up_in_state_has_not_begun():
    model, optimizer = made()
    assert optimizer.state[model[0].weight] == {}
    trained(model, optimizer, 1)
    assert optimizer.state[model[0].weight]["steps"] == 1
    optimizer.state.clear()
    trained(model, optimizer, 1)
    assert optimizer.state[model[0].weight]["steps"] == 1


@every_way
@pytest.mark.parametrize("which", [slice(0, 1), slice(None)], ids=["one", "all"])
def test_states_that_are_emptied_begin_anew_as_those_of_torch(compile, which):
    model, optimizer = made(compile, factory=fr.adam, lr=1e-2)
    other = network()
    theirs = torch.optim.Adam(other.parameters(), lr=1e-2)
    for net, opt in ((model, optimizer), (other, theirs)):
        trained(net, opt, 3)
        for p in [*net.parameters()][which]:
            opt.state[p] = {}
        trained(net, opt, 3, 3)
    assert_equal([*model.parameters()], [*other.parameters()], rtol=0, atol=1e-9)


def test_an_entry_that_is_taken_out_of_a_state_is_named_and_nothing_is_changed():
    model, optimizer = made()
    trained(model, optimizer, 2)
    del optimizer.state[model[0].weight]["direction.mu"]
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 2)
    with pytest.raises(ValueError, match=r"the state of parameter '0\.weight' has .*; expected .*direction\.mu"):
        optimizer.step()
    assert_equal([*model.parameters()], before, rtol=0, atol=0)


# The habits of loops


@every_way
def test_closures_hooks_and_zero_grad_are_those_of_torch(compile):
    model, optimizer = made(compile)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(torch.ones(1, 5, dtype=torch.float64)).square().sum()
        loss.backward()
        called.append("closure")
        return loss

    losses = [optimizer.step(closure=closure), optimizer.step(closure)]
    assert losses[1] < losses[0]
    assert called == ["before", "closure", "after"] * 2
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.defaults == {"lr": 1e-2, "strength": 1e-3}


@every_way
def test_a_scaler_skips_steps_that_overflow(compile):
    model, optimizer = made(compile, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 0)
    scaler.scale(torch.ones(()))
    model[0].weight.grad[0, 0] = torch.inf
    scaler.step(optimizer), scaler.update()
    assert_equal([p.detach() for p in model.parameters()], before)
    backward(model, 0)
    scaler.step(optimizer), scaler.update()
    assert scaler.get_scale() == 2.0
    assert (model[0].weight != before[0]).any()


@every_way
def test_parameters_stay_where_they_are_and_autograd_notices(compile):
    model = network()
    whole = torch.zeros(40, dtype=torch.float64)
    model[0].weight.data = whole[7:27].view(4, 5)  # As in the flat buffers of a trainer.
    optimizer = fr.Optimizer(model.parameters(), lambda lr: fr.adamw(lr), lr=0.1, compile=compile)
    places = [p.data_ptr() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    trained(model, optimizer, 2)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert_equal(whole[7:27].view(4, 5), model[0].weight.detach())
    assert (whole[:7] == 0).all()
    assert all(p._version > before for p, before in zip(model.parameters(), versions, strict=True))
    loss = model(torch.ones(1, 5, dtype=torch.float64)).square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("large_too", [True, False])
def test_the_state_is_packed_beside_parameters_that_stay_where_they_are(large_too, monkeypatch):
    monkeypatch.setattr(plan, "SEPARATE", {torch.device(DEVICE).type: (8, 20)})
    if not large_too:  # As where memory is scarce.
        small = lambda group: sum([math.prod(member.inputs[0].shape) < 8 for member in group.members])
        monkeypatch.setattr(plan, "packed_members", small)
    (model, optimizer), (plain, reference) = made("eager"), made()
    places = [p.data_ptr() for p in model.parameters()]
    for n in range(4):
        backward(model, n)
        backward(plain, n)
        optimizer.step()
        reference.step()
        if n == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert_equal(list(model.parameters()), list(plain.parameters()))
    assert places == [p.data_ptr() for p in model.parameters()]
    (step,) = optimizer._steps.values()
    (made_plan,) = step._plans.values()
    parts = made_plan.parts("state")
    assert all([len(part._used) == 1 for part in parts if part.positions])
    count = sum([len(part.positions) for part in parts])
    assert count == (8 if large_too else 4)
    for entries in optimizer.state.values():
        for x in entries.values():
            assert x.untyped_storage().nbytes() == x.nbytes


@pytest.mark.parametrize(
    "extra", [{"value": 1.0}, {"value": torch.tensor(1.0, device="cpu")}], ids=["number", "tensor"]
)
def test_the_state_is_packed_also_beside_extra_arguments(extra, monkeypatch):
    monkeypatch.setattr(plan, "SEPARATE", {torch.device(DEVICE).type: (8, 20)})
    factory = lambda lr: fr.chain(fr.adam(lr), fr.reduce_on_plateau(factor=0.5, patience=1))
    (model, optimizer), (plain, reference) = made("eager", factory=factory, lr=0.1), made(factory=factory, lr=0.1)
    for n in range(4):
        backward(model, n)
        backward(plain, n)
        optimizer.step(**extra)
        reference.step(**extra)
        assert_equal(list(model.parameters()), list(plain.parameters()))
    (step,) = optimizer._steps.values()
    (made_plan,) = step._plans.values()
    assert all([len(part._used) == 1 for part in made_plan.parts("state") if part.positions])


@every_way
def test_tied_weights_and_new_storages_are_followed(compile):
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 5, bias=False))
    model[2].weight = model[0].weight
    optimizer = fr.Optimizer(model.named_parameters(), lambda lr: fr.sgd(lr, 0.9), lr=0.1, compile=compile)
    trained(model, optimizer, 1)
    assert model[2].weight is model[0].weight
    model.to(torch.float64)  # Moves parameters to other storages.
    optimizer.state.clear()
    before = model[0].weight.detach().clone()
    trained(model, optimizer, 1)
    assert (model[0].weight != before).any()


def test_torch_compile_takes_its_step():
    model, optimizer = made("eager")
    expected = trained(*made("eager"), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The compiler speaks of the profiler in torch's own wrapper.
        step = torch.compile(optimizer.step, backend="eager")
        for n in range(3):
            backward(model, n)
            step()
    assert_equal([p.detach() for p in model.parameters()], expected)


def test_it_prints_its_groups():
    said = repr(made(factory=lasso)[1])
    assert (
        said == "Optimizer of lasso (\nParameter Group 0: 4 tensors, 34 entries\n    lr: 0.01\n    strength: 0.001\n)"
    )


# Saving


def resumed(optimizer, model, compile, folder):
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "run.pt")
    saved = torch.load(folder / "run.pt", weights_only=True)
    fresh = network(next(model.parameters()).dtype, seed=9)
    fresh.load_state_dict(saved["model"])
    again = fr.Optimizer(fresh.named_parameters(), LASSO, lr=1.0, strength=1.0, compile=compile)
    again.load_state_dict(saved["optimizer"])
    return fresh, again


@every_way
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_run_is_resumed_bit_for_bit(compile, dtype, tmp_path):
    model, optimizer = made(compile, dtype)
    scheduler = lr_scheduler.StepLR(optimizer, 2, 0.5)
    trained(model, optimizer, 5, scheduler=scheduler)
    fresh, again = resumed(optimizer, model, compile, tmp_path)
    follow = lr_scheduler.StepLR(again, 2, 0.5)
    follow.load_state_dict(scheduler.state_dict())
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert_equal(trained(fresh, again, 4, 5, follow), trained(model, optimizer, 4, 5, scheduler))
    state = again.state[fresh[0].weight]
    assert (state["steps"].dtype, state["direction.mu"].dtype) == (
        torch.int32,
        torch.promote_types(dtype, torch.float32),
    )
    assert state["steps"] == 9


def test_a_loaded_state_shares_memory_with_nothing():
    model, optimizer = made()
    trained(model, optimizer, 1)
    again = fr.Optimizer(model.named_parameters(), LASSO, lr=1.0, strength=1.0, compile=False)
    again.load_state_dict(optimizer.state_dict())
    p = model[0].weight
    assert again.state[p]["direction.mu"].data_ptr() != optimizer.state[p]["direction.mu"].data_ptr()
    assert again.state[p]["steps"] is again.state[model[0].bias]["steps"]


@every_way
@pytest.mark.parametrize("written", [torch.Tensor.item, torch.Tensor.float, torch.Tensor.long])
def test_counters_that_were_saved_as_other_numbers_are_those_of_the_chain(written, compile):
    model, optimizer = made(compile)
    trained(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        entries["steps"] = written(entries["steps"])
    again, loaded = made(compile)
    again.load_state_dict(model.state_dict())
    loaded.load_state_dict(state)
    assert_equal(trained(again, loaded, 2), trained(model, optimizer, 2))
    assert_equal(loaded.state_dict()["state"], optimizer.state_dict()["state"])


def in_order(model, order, prefix="", factory=LASSO):
    """An optimizer whose parameters come in an order of their own."""
    own = dict(model.named_parameters())
    return fr.Optimizer([(prefix + n, own[n]) for n in order], factory, lr=1e-2, strength=1e-3, compile=False)


def square():
    """A network in which a parameter that is taken for another has its shape."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))


@pytest.mark.parametrize("flatten", [None, False, True], ids=["plain", "distributed", "flat"])
def test_states_find_their_parameters_by_name(flatten):
    options = torch.distributed.checkpoint.state_dict.StateDictOptions(flatten_optimizer_state_dict=bool(flatten))
    first = lambda lr, strength: fr.prox_adam(lr, fr.l1, strength=strength, mask=fr.select("0.*"))
    names, other = ["0.weight", "0.bias", "2.weight", "2.bias"], ["2.weight", "2.bias", "0.weight", "0.bias"]
    model = square()
    optimizer = in_order(model, names, "module.", first)
    trained(model, optimizer, 3)
    fresh = copy.deepcopy(model)
    again = in_order(fresh, other, factory=first)
    if flatten is None:
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        set_optimizer_state_dict(fresh, again, saved, options=options)
    assert again.param_groups[0]["param_names"] == other  # By which the mask chooses.
    assert_equal(trained(fresh, again, 3, 3), trained(model, optimizer, 3, 3))


def test_states_of_parameters_with_other_names_go_by_place_or_are_refused():
    model = square()
    names = [name for name, _ in model.named_parameters()]
    optimizer = in_order(model, names, "net.")
    trained(model, optimizer, 3)
    fresh = copy.deepcopy(model)
    again = in_order(fresh, names)
    with pytest.warns(UserWarning, match="calls number 0 of param group 0 'net.0.weight', which is '0.weight' here"):
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.param_groups[0]["param_names"] == names
    assert_equal(trained(fresh, again, 3, 3), trained(model, optimizer, 3, 3))
    own = list(model.named_parameters())
    parts = lambda *groups: fr.Optimizer([{"params": group} for group in groups], fr.sgd, lr=1e-2, compile=False)
    for into, saved, said in [
        (parts(own[:2], own[2:]), parts(own[2:], own[:2]), "'0.weight' is number 0 .* it is number 0 of param group 1"),
        (parts(own[1:]), parts(own[:-1]), "'0.bias' is number 0 .* it is number 1 of param group 0"),
        (parts(own[:2], own[2:]), parts(own[:3], own[3:]), "doesn't match the size"),
    ]:
        groups = [group["param_names"] for group in into.param_groups]
        with pytest.raises(ValueError, match=said):
            into.load_state_dict(saved.state_dict())
        assert [group["param_names"] for group in into.param_groups] == groups


def test_a_state_that_does_not_fit_is_named_and_changes_nothing():
    model, optimizer = made()
    trained(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    net = network()
    torchs = AdamW(net.parameters())
    trained(net, torchs, 1)
    other = copy.deepcopy(before)
    other["state"][0]["direction.mu"] = torch.ones(1)
    number, nothing = copy.deepcopy(before), copy.deepcopy(before)
    number["state"][0]["direction.mu"], nothing["state"][0]["steps"] = 0.5, None
    for wrong, message in [
        (torchs.state_dict(), "the state of parameter '0.weight' has .*exp_avg.*expected steps, .*of torch"),
        (other, r"the state direction.mu of parameter '0.weight' has shape \(1,\); expected \(4, 5\)"),
        (number, r"the state direction.mu of parameter '0.weight' is 0.5; expected a tensor of shape \(4, 5\)"),
        (nothing, r"the state steps of parameter '0.weight' is None; expected a tensor of shape \(\)"),
        ({**before, "param_groups": []}, "different number of parameter groups"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(wrong)
        assert_equal(optimizer.state_dict()["state"], before["state"])
        assert optimizer.param_groups[0]["lr"] == 1e-2
    trained(model, optimizer, 1)


@every_way
def test_copies_and_pickles_go_on_alone(compile):
    model, optimizer = made(compile, factory=lasso)
    trained(model, optimizer, 2)
    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        twin, other = copied((model, optimizer))
        assert other.param_groups[0]["params"][0] is twin[0].weight
        before = copy.deepcopy(model.state_dict())
        found = trained(twin, other, 2, 2)
        assert_equal(model.state_dict(), before)
        expected = copy.deepcopy((model, optimizer))
        assert_equal(found, trained(*expected, 2, 2))
    lambdas = made(factory=LASSO)[1]
    assert copy.deepcopy(lambdas).param_groups[0]["lr"] == 1e-2
    with pytest.raises(pickle.PicklingError, match="Define the factory with def at the top of a module"):
        pickle.dumps(lambdas)
    other.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "param_names": ["more"]})


@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_gives_back_what_it_got(flatten, tmp_path):
    options = torch.distributed.checkpoint.state_dict.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = made()
    trained(model, optimizer, 3)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    again = fr.Optimizer(fresh.named_parameters(), LASSO, lr=1.0, strength=1.0, compile=False)
    template = get_optimizer_state_dict(fresh, again, options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It says that there is one process.
        dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "saved")
        loaded = {"optimizer": template}
        dcp.load(loaded, checkpoint_id=tmp_path / "saved")
    set_optimizer_state_dict(fresh, again, loaded["optimizer"], options=options)
    fresh.load_state_dict(model.state_dict())
    assert again.param_groups[0]["lr"] == 1e-2
    assert_equal(trained(fresh, again, 2, 3), trained(model, optimizer, 2, 3))


def test_making_states_for_a_distributed_checkpoint_moves_no_parameter():
    model, optimizer = made(factory=lambda lr: fr.chain(fr.sgd(lr, 0.9), fr.soft_threshold(0.1)), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    saved = get_optimizer_state_dict(model, optimizer)
    assert_equal([p.detach() for p in model.parameters()], before)
    assert saved["state"].keys() == {name for name, _ in model.named_parameters()}
    assert optimizer.param_groups[0]["lr"] == 0.1


@cpu_only
@pytest.mark.parametrize("compile", [False, True])
def test_sharded_parameters_keep_their_placement(compile):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, other = network(), network()
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        factory = lambda lr: fr.chain(fr.clip_by_global_norm(1.0), fr.prox_adam(lr, fr.l1, strength=0.1))
        optimizer = fr.Optimizer(model.named_parameters(), factory, lr=0.1, compile=compile)
        expected = trained(other, fr.Optimizer(other.named_parameters(), factory, lr=0.1, compile=False))
        trained(model, optimizer, 3)
        optimizer.load_state_dict(optimizer.state_dict())
        trained(model, optimizer, 2, 3)
        assert isinstance(optimizer.state[model[0].weight]["1.direction.mu"], DTensor)
        assert_equal([p.detach().full_tensor() for p in model.parameters()], expected, rtol=1e-9)
    finally:
        dist.destroy_process_group()


# What is wrong


P = [torch.nn.Parameter(torch.ones(2, 2))]
WRONG = {
    "a missing hyperparameter": (
        lambda: fr.Optimizer(P, LASSO, lr=0.1), TypeError, "param group 0 has no value for strength, which"
    ),
    "an unknown one": (
        lambda: fr.Optimizer(P, LASSO, lr=0.1, strength=1.0, decay=1.0), TypeError,
        "does not take decay; it takes lr, strength. Add it",
    ),
    "a habit": (
        lambda: fr.Optimizer(P, LASSO, lr=0.1, strength=1.0, foreach=True), TypeError,
        "does not take foreach; .* compiled for all tensors at once",
    ),
    "maximize": (
        lambda: fr.Optimizer(P, LASSO, lr=0.1, strength=1.0, maximize=True), TypeError, "Minimize the negative",
    ),
    "a negative rate": (
        lambda: fr.Optimizer(P, LASSO, lr=-0.1, strength=1.0), ValueError, "param group 0: learning_rate is -0.1"
    ),
    "a negative rate in a tensor": (
        lambda: fr.Optimizer(P, LASSO, lr=torch.tensor(-0.5, device="cpu"), strength=1.0), ValueError,
        "learning_rate is -0.5",
    ),
    "several rates in a tensor": (
        lambda: fr.Optimizer(P, LASSO, lr=torch.tensor([0.5, 0.1], device="cpu"), strength=1.0), ValueError,
        r"param group 0: lr is a tensor of shape \(2,\); expected one number",
    ),
    "no transform": (lambda: fr.Optimizer(P, lambda lr: fr.l1, lr=0.1), TypeError, "returned a Penalty. Expected"),
    "no return": (lambda: fr.Optimizer(P, lambda lr: None, lr=0.1), TypeError, "returned None; lacks it a return"),
    "a transform": (lambda: fr.Optimizer(P, fr.adamw(0.1)), TypeError, r"factory is adamw\(0.1\); expected a function"),
    "a class of torch": (lambda: fr.Optimizer(P, AdamW, lr=0.1), TypeError, "is the optimizer AdamW of torch"),
    "gradients of examples": (
        lambda: fr.Optimizer(P, lambda lr: fr.dpsgd(lr, 1.0, 1.0, 0), lr=0.1), TypeError,
        "takes gradients of single examples; a parameter has that of their mean",
    ),
    "a module": (lambda: fr.Optimizer(nn.Linear(2, 2), LASSO), TypeError, "expected its named_parameters"),
    "a schedule": (
        lambda: fr.Optimizer(P, LASSO, lr=fr.constant_schedule(1.0), strength=1.0), TypeError,
        "A schedule belongs in the factory",
    ),
    "a mask": (
        lambda: fr.Optimizer(P, lambda lr, mask: fr.adamw(lr, mask=mask), lr=0.1, mask=fr.matrices), TypeError,
        "mask is matrices; expected a number",
    ),
    "a backend": (lambda: fr.Optimizer(P, fr.sgd, lr=0.1, compile=3), TypeError, "compile is 3; expected True"),
    "no parameters": (lambda: fr.Optimizer([], fr.sgd, lr=0.1), ValueError, "empty parameter list"),
    "one name for two": (
        lambda: fr.Optimizer([("w", P[0]), ("w", nn.Parameter(torch.ones(1)))], fr.sgd, lr=0.1), ValueError,
        "several parameters called w",
    ),
    "one parameter twice": (
        lambda: fr.Optimizer([P[0], P[0]], fr.sgd, lr=0.1), ValueError,
        "parameter 0 of param group 0 is there again, at place 1",
    ),
    "a reserved name": (
        lambda: fr.Optimizer(P, lambda params: fr.sgd(0.1), params=1.0), TypeError, "params"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")  # By torch.
@pytest.mark.parametrize(("make", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@cpu_only  # Elsewhere to read a number would wait for the device.
@every_way
def test_what_comes_to_be_wrong_is_named_and_changes_nothing(compile):
    model, optimizer = made(compile)
    trained(model, optimizer, 1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    for name, value, message in [
        ("lr", -1.0, "param group 0: learning_rate is -1"),
        ("strength", float("nan"), "param group 0: strength is nan"),
        ("strength", torch.tensor(-2.0), "param group 0: strength is -2"),
    ]:
        old = optimizer.param_groups[0][name]
        optimizer.param_groups[0][name] = value
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        optimizer.param_groups[0][name] = old
    assert_equal((model.state_dict(), optimizer.state_dict()["state"]), before)
    with pytest.raises(ValueError, match="learning_rate is -3"):
        optimizer.add_param_group({"params": [("more", torch.nn.Parameter(torch.ones(1)))], "lr": -3.0})
    assert len(optimizer.param_groups) == 1
    trained(model, optimizer, 1)


@every_way
@pytest.mark.parametrize("raised", [KeyboardInterrupt, ValueError])
def test_a_first_step_that_fails_leaves_no_state(raised, compile):
    fails = [True]

    def update(updates, state, params):
        if fails:
            raise raised("in the middle")
        return updates, state

    def factory(lr):
        return fr.chain(fr.adamw(lr), fr.Transform(lambda params: (), update))

    (model, optimizer), (other, unbroken) = [made(compile, factory=factory, lr=1e-2) for _ in range(2)]
    with pytest.raises(raised):
        trained(model, optimizer, 1)
    assert not optimizer.state
    assert_equal([w.detach() for w in model.parameters()], [w.detach() for w in other.parameters()])
    fails.clear()
    assert_equal(trained(model, optimizer, 2), trained(other, unbroken, 2))


def test_a_step_that_is_interrupted_leaves_what_has_no_gradient_where_it_is():
    """What torch would not move keeps its numbers, also where the step was in the middle of writing."""
    interrupts: list[bool] = []

    def backend(graph, inputs):
        writes = any("copy_" in str(node.target) for node in graph.graph.nodes)

        def run(*args):
            found = graph(*args)
            if interrupts and writes:
                raise KeyboardInterrupt
            return found

        return run

    model, optimizer = made(backend, factory=lambda lr: fr.adamw(lr, weight_decay=0.1), lr=1e-2)
    trained(model, optimizer, 2)
    moments = lambda p: {name: x.clone() for name, x in optimizer.state[p].items() if x.ndim}
    still, moving = model[0].weight, model[2].weight
    kept, moved, before = moments(still), moments(moving), still.detach().clone()
    backward(model, 2)
    still.grad = None
    interrupts.append(True)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert all(not torch.equal(x, moved[name]) for name, x in moments(moving).items())
    assert_equal((still.detach(), moments(still)), (before, kept))


def test_groups_and_checkpoints_that_are_interrupted_change_nothing(monkeypatch):
    calls: list[bool] = []

    def factory(lr):
        if calls:
            raise KeyboardInterrupt
        return fr.adamw(lr)

    model, optimizer = made(False, factory=factory, lr=1e-2)
    trained(model, optimizer, 1)
    state = optimizer.state_dict()
    trained(model, optimizer, 1)
    held, groups = dict(optimizer.state), list(optimizer.param_groups)
    calls.append(True)
    with pytest.raises(KeyboardInterrupt):
        optimizer.add_param_group({"params": [("more", torch.nn.Parameter(torch.ones(1)))]})
    assert optimizer.param_groups == groups
    calls.clear()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fr.Optimizer, "_read_groups", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.load_state_dict(state)
    monkeypatch.undo()
    assert optimizer.param_groups == groups
    assert all([optimizer.state[p] is held[p] for p in held])
    trained(model, optimizer, 1)


# Parameters that are gone at once


def regularized(make, *penalty, **options):
    def optimizer_of(model):
        optimizer = make(model.parameters())
        return optimizer, fr.regularize(optimizer, *penalty, strength=1e-3, module=model, mask=fr.matrices, **options)

    return optimizer_of


HOLDERS: dict[str, Any] = {
    "of torch": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "plain": lambda model: fr.Optimizer(model.named_parameters(), LASSO, lr=1e-2, strength=1e-3, compile=False),
    "fused": lambda model: fr.Optimizer(model.named_parameters(), LASSO, lr=1e-2, strength=1e-3, compile="eager"),
    "regularize SGD": regularized(functools.partial(SGD, lr=0.1, momentum=0.9), fr.l1),
    "regularize Adam": regularized(AdamW, fr.group_lasso),
    "inner steps": regularized(AdamW, fr.nuclear, inner_steps=2),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_parameters_are_released_with_their_optimizer(holder):
    """Without the garbage collector, which may not run while a device runs out of memory."""

    def use():
        model = network()
        held = HOLDERS[holder](model)
        trained(model, held[0] if isinstance(held, tuple) else held, 2)
        return [weakref.ref(p) for p in model.parameters()]

    use()  # What is made once for all.
    gc.collect()
    gc.disable()
    try:
        assert not any(reference() is not None for reference in use())
    finally:
        gc.enable()


def test_what_has_no_effect_in_a_group_is_said():
    for group in ({"weight_decay": 0.1}, {"maximize": True}, {"betas": (0.9, 0.95)}, {"amsgrad": True}):
        with pytest.warns(UserWarning, match=f"param group 0 has {next(iter(group))}.*no effect"):
            fr.Optimizer([{"params": P, **group}], LASSO, lr=0.1, strength=1.0)
    fr.Optimizer([{"params": P, "initial_lr": 0.1, "name": "head"}], LASSO, lr=0.1, strength=1.0)


def test_what_is_set_in_a_group_later_and_has_no_effect_is_said_once():
    w = nn.Parameter(torch.ones(2))
    optimizer = fr.Optimizer([w], lambda lr: fr.sgd(lr), lr=0.1, compile=False)
    w.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.1  # As a scheduler of weight decay does.
    with pytest.warns(UserWarning, match=r"group 0 has weight_decay=0.1, which the factory does not take"):
        optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.2
    optimizer.step()
    optimizer.load_state_dict({"state": {}, "param_groups": [{"params": [0], "lr": 0.1, "momentum": 0.9}]})
    with pytest.warns(UserWarning, match=r"group 0 has momentum=0.9, which the factory does not take"):
        optimizer.step()


def halved(updates, state, params):
    return fr.tree_map(lambda u: -u / 2, updates), state


@pytest.mark.parametrize(
    ("factory", "climbs"),
    [
        (lambda lr: fr.scale_by_adam(), True),
        (lambda lr: fr.chain(fr.scale_by_adam(), fr.scale(lr)), True),
        (lambda lr: fr.chain(fr.trace(0.9), fr.scale_by_schedule(fr.cosine_decay_schedule(0.1, 10))), True),
        (lambda lr: fr.apply_if_finite(fr.clip(1.0), 3), True),
        (lambda lr: fr.chain(fr.scale_by_adam(), fr.scale(-lr)), False),
        (
            lambda lr: fr.chain(
                fr.trace(0.9), fr.scale_by_schedule(lambda n: -lr * fr.cosine_decay_schedule(1.0, 10)(n))
            ),
            False,
        ),
        (lambda lr: fr.inject_hyperparams(fr.adamw)(lr), False),
        (lambda lr: fr.chain(fr.clip(1.0), fr.Transform(fr.init_empty_state, halved)), False),
        (lambda lr: fr.partition({"a": fr.sgd(lr), "b": fr.set_to_zero()}, lambda params: {"w": "a"}), False),
    ],
)
def test_a_chain_that_goes_uphill_is_said_at_once(factory, climbs):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fr.Optimizer([("w", torch.nn.Parameter(torch.ones(2)))], factory, lr=0.1, compile=False)
    assert [bool(re.search("param group 0: .* go uphill. End it with", str(each.message))) for each in said] == (
        [True] if climbs else []
    )


#: Factories, and what a warning says that their chains have nothing of.
UNREAD = {
    "a rate": (lambda lr: fr.adamw(1e-3), "lr"),
    "a strength": (lambda lr, strength: fr.adamw(lr), "strength"),
    "a rate beside a mask": (lambda lr: fr.prox_adam(1e-3, 0.1 * fr.l1, mask=~fr.select("b*")), "lr"),
    "a rate in a schedule": (lambda lr: fr.sgd(fr.linear_schedule(lr, 0.0, 10)), None),
    "a rate in a function": (lambda lr: fr.sgd(lambda count: lr * 0.9**count), None),
    "a rate as a default": (lambda lr: fr.sgd(lambda count, rate=lr: rate * 0.9**count), None),
    "a rate that is computed with": (lambda lr: fr.sgd(0.1 * (lr + 0.0)), None),
    "a rate in a branch": (lambda lr: fr.sgd(0.1 if lr > 0.01 else 0.2), None),
    "a factor": (lambda lr, strength: fr.prox_sgd(lr, strength * fr.l1 + fr.half_l2), None),
    "a tree": (lambda lr, strength: fr.prox_sgd(lr, fr.l1, strength={"w": strength}), None),
    "a rule of one's own": (
        lambda lr: fr.Transform(fr.init_empty_state, lambda u, s, p: (fr.tree_map(lambda u: -lr * u, u), s)),
        None,
    ),
}


@pytest.mark.parametrize(("factory", "name"), UNREAD.values(), ids=UNREAD)
def test_a_value_of_which_the_chain_has_nothing_is_said(factory, name):
    hyper = dict.fromkeys(inspect.signature(factory).parameters, 0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fr.Optimizer([("w", torch.nn.Parameter(torch.ones(2)))], factory, compile=False, **hyper)
    assert len(said) == (name is not None)
    for each in said:
        assert re.search(f"param group 0: the factory makes .* nothing of {name}, so that", str(each.message))


def test_parameters_that_have_no_shape_yet_are_named():
    lazy = torch.nn.LazyLinear(2)
    with pytest.raises(ValueError, match="parameter 'weight' is not initialized; run the module once"):
        fr.Optimizer(lazy.named_parameters(), LASSO, lr=0.1, strength=1.0)
    with pytest.raises(ValueError, match="parameter 0 of param group 0 is not initialized"):
        fr.Optimizer(lazy.parameters(), LASSO, lr=0.1, strength=1.0)


@every_way
def test_a_chain_with_extra_arguments_is_refused(compile):
    def update(updates, state, params, *, value):
        return fr.tree_map(lambda u: -value * u, updates), state

    model, optimizer = made(compile, factory=lambda lr: fr.Transform(lambda params: (), update), lr=0.1)
    with pytest.raises(TypeError, match="needs an extra argument, which step"):
        trained(model, optimizer, 1)


def test_a_factory_may_be_a_public_optimizer_or_partial():
    model, optimizer = made(factory=fr.adamw, lr=1e-2, weight_decay=0.1)
    other = network()
    theirs = AdamW(other.parameters(), 1e-2, weight_decay=0.1)
    assert_equal(trained(model, optimizer), trained(other, theirs), rtol=0, atol=1e-12)
    pickle.loads(pickle.dumps(optimizer))
    bound = functools.partial(fr.prox_adam, penalty=fr.l1, mask=fr.matrices)
    trained(*made(factory=bound, lr=1e-2, strength=1e-3))
    assert fr.Optimizer(dict(other.named_parameters()), fr.sgd, lr=0.1).param_groups[0]["param_names"][0] == "0.weight"
    assert made(factory=lambda lr=0.25: fr.sgd(lr), lr=0.5)[1].param_groups[0]["lr"] == 0.5
    assert fr.Optimizer(network().parameters(), lambda lr=0.25: fr.sgd(lr)).param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("compile", [False, "eager"])
def test_sparse_gradients_are_named(compile):
    model = nn.ModuleDict({"table": nn.Embedding(4, 2, sparse=True), "head": nn.Linear(2, 1)})
    groups = [{"params": list(model["head"].named_parameters())}, {"params": list(model["table"].named_parameters())}]
    optimizer = fr.Optimizer(groups, fr.sgd, lr=0.1, compile=compile)
    model["head"](model["table"](torch.tensor([1]))).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        TypeError, match=r"^the gradient of 'weight', in param group 1, has the layout torch\.sparse_coo"
    ):
        optimizer.step()
    assert_equal(dict(model.state_dict()), dict(before))
    assert not optimizer.state


def test_a_learning_rate_goes_by_the_name_that_it_has_in_torch():
    with pytest.raises(TypeError, match=r"does not take learning_rate; it takes lr, .* is called lr here, as in torch"):
        fr.Optimizer(nn.Linear(2, 1).parameters(), fr.adam, learning_rate=0.1)


# Parameters that are replaced


@every_way
def test_parameters_that_are_replaced_in_a_group_or_taken_out_of_it_are_followed(compile):
    """As torch's optimizers do: the state of new ones begins."""
    model, optimizer = made(compile)
    trained(model, optimizer, 2)
    new = network(seed=1)
    optimizer.param_groups[0]["params"] = list(new.parameters())
    other = network(seed=1)
    fresh = fr.Optimizer(other.named_parameters(), LASSO, lr=1e-2, strength=1e-3, compile=compile)
    assert_equal(trained(new, optimizer, 3), trained(other, fresh, 3))
    optimizer.param_groups[0]["params"].pop()
    before = new[2].bias.detach().clone()
    trained(new, optimizer, 2)
    assert_equal(new[2].bias.detach(), before)
    assert not torch.equal(new[2].weight, other[2].weight)


def test_a_step_without_any_gradient_is_said_once():
    model, optimizer = made()
    with pytest.warns(UserWarning, match=r"no effect, because no parameter .* backward\(\) missing"):
        optimizer.step()
    optimizer.step()
    trained(model, optimizer, 1)


def test_parameters_that_were_replaced_after_a_step_are_said_and_a_step_left_out_is_not():
    net = torch.nn.Linear(3, 2, device=DEVICE)
    optimizer = fr.Optimizer(net.named_parameters(), fr.adamw, lr=0.1, compile=False)

    def step(backward: bool) -> None:
        optimizer.zero_grad()
        if backward:
            net(torch.ones(4, 3, device=DEVICE)).sum().backward()
        optimizer.step()

    for backward in (True, False, False, True, False, False):
        step(backward)
    net.load_state_dict({name: w.clone() for name, w in net.state_dict().items()}, assign=True)
    with pytest.warns(UserWarning, match=r"no effect, because no parameter .* load_state_dict\(assign=True\)"):
        step(True)
    step(True)


# What a factory makes of its arguments


def _written_to_a_place(lr):
    x = lr.new_zeros(1)
    x[0] = lr
    return x[0]


DERIVED = {
    "a product": lambda lr, strength: LASSO(0.5 * lr, strength / 2),
    "one of another": lambda lr, strength: LASSO(lr.sqrt() * (1 - lr), strength),
    "changed in place": lambda lr, strength: LASSO((lr * 3).mul_(0.25).add_(1e-3), strength),
    "views": lambda lr, strength: LASSO(lr.view(()).detach(), torch.stack([strength, lr])[0]),
    "a converter": lambda lr, strength: fr.prox_adam(lr, fr.elastic, *fr.elastic_from_keras(strength, lr)),
    "a momentum": lambda lr, strength: fr.prox_sgd(lr, fr.l1, strength=1e-3, momentum=900 * strength),
    "a function of math": lambda lr, strength: LASSO(math.exp(lr) - 1, strength),
    "a schedule": lambda lr, strength: LASSO(lambda n: lr * 0.9**n, fr.linear_schedule(strength, 2 * strength, 3)),
    "detached": lambda lr, strength: LASSO((0.5 * lr).detach(), (strength / 2).data),
    "one of several": lambda lr, strength: LASSO(torch.stack([lr, strength]).max(0).values, strength.frexp()[0] / 900),
    "copied": lambda lr, strength: LASSO(copy.deepcopy(lr), strength),
    "written to a place": lambda lr, strength: LASSO(_written_to_a_place(lr), strength),
    "written over": lambda lr, strength: LASSO(lr.mul_(0.5), strength),
    "mapped": lambda lr, strength: LASSO(vmap(lambda s: s * lr)(torch.ones(2, device=DEVICE))[0], strength),
    "text": lambda lr, strength: LASSO(float(f"{lr:.6f}"), strength),
    "a number": lambda lr, strength: LASSO(float(lr), strength.item()),
    "a branch": lambda lr, strength: LASSO(lr if lr > 5e-3 else 5e-3, max(strength, 5e-4)),
}


@every_way
@pytest.mark.parametrize("factory", DERIVED.values(), ids=DERIVED)
@pytest.mark.filterwarnings("ignore:param group 0. the factory makes a number")
def test_what_a_factory_computes_follows_the_values_of_the_group(factory, compile):
    """As if the chain were made anew at each step, around the same state."""
    model, optimizer = made(compile, factory=factory, lr=1e-2, strength=1e-3)
    other, again = made(factory=factory, lr=1e-2, strength=1e-3)
    for n, (lr, strength) in enumerate([(1e-2, 1e-3), (8e-3, 1e-3), (4e-3, 2e-4), (4e-3, 2e-4), (0.02, 9e-4)]):
        for each in (optimizer, again):
            each.param_groups[0].update(lr=lr, strength=strength)
        again._values.clear()
        trained(model, optimizer, 1, n), trained(other, again, 1, n)
    assert_equal(list(model.parameters()), list(other.parameters()), rtol=1e-12, atol=1e-14)


def test_what_is_derived_compiles_nothing_and_what_is_converted_says_so(compilations):
    model, optimizer = made("eager", factory=DERIVED["a product"], lr=1e-2, strength=1e-3)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    trained(model, optimizer, 1, 0, scheduler)
    once = compilations[0]
    trained(model, optimizer, 3, 1, scheduler)
    assert compilations[0] == once
    model, optimizer = made("eager", factory=DERIVED["a number"], lr=1e-2, strength=1e-3)
    trained(model, optimizer, 2)  # Nothing changes, and nothing is said.
    once = compilations[0]
    optimizer.param_groups[0]["lr"] = 5e-3
    with pytest.warns(UserWarning, match="the factory makes a number of lr, .* no longer compiled"):
        trained(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 4e-3
    trained(model, optimizer, 1)
    assert compilations[0] == once


def test_a_chain_of_another_kind_for_another_number_is_refused():
    model, optimizer = made(factory=lambda lr: fr.adam(lr) if lr > 0.01 else fr.sgd(lr), lr=0.1)
    trained(model, optimizer, 1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 1e-3
    with pytest.warns(UserWarning, match="makes a number"), pytest.raises(ValueError, match="state of another chain"):
        trained(model, optimizer, 1)
    assert_equal([p.detach() for p in model.parameters()], before)


# Extra arguments


def by_closure(model, optimizer, n):
    """A loss whose data do not change, as a closure of the optimizer."""

    def closure():
        optimizer.zero_grad()
        p = next(model.parameters())
        generator = torch.Generator("cpu").manual_seed(n)
        x = torch.randn(6, 5, generator=generator, device="cpu").to(p.device, p.dtype)
        loss = (model(x) - x[:, :2]).square().mean()
        loss.backward()
        return loss

    return closure


PLATEAU = lambda lr: fr.chain(fr.sgd(lr), fr.reduce_on_plateau(factor=0.5, patience=1))


@every_way
@pytest.mark.parametrize("through", ["closure", "keyword", "scaler"])
def test_a_plateau_gets_the_loss(compile, through):
    model, optimizer = made(compile, factory=PLATEAU, lr=1.0)
    for n in range(4):
        closure = by_closure(model, optimizer, n)
        if through == "closure":
            assert optimizer.step(closure) is not None
        elif through == "keyword":
            closure()
            optimizer.step(value=1.0)
        else:
            closure()
            torch.amp.GradScaler("cpu", enabled=False).step(optimizer, value=torch.tensor(1.0, requires_grad=True))
    scale = optimizer.state[model[0].weight]["1.scale"]
    assert scale < 1 if through != "closure" else scale <= 1
    fresh, again = made(compile, factory=PLATEAU, lr=1.0)
    again.load_state_dict(optimizer.state_dict())
    assert again.state[fresh[0].weight]["1.best_value"] == optimizer.state[model[0].weight]["1.best_value"]


def test_the_loss_that_a_chain_lacks_is_asked_for():
    model, optimizer = made(factory=PLATEAU, lr=1.0)
    with pytest.raises(TypeError, match=r"reduce_on_plateau needs the value.* step\(closure\).* step\(value=loss\)"):
        trained(model, optimizer, 1)
    with pytest.raises(TypeError, match="extra argument 'values', which no chain"):
        optimizer.step(values=1.0)
    with pytest.raises(TypeError, match=r"closure is a Tensor; expected a function. A loss goes as value=loss"):
        optimizer.step(torch.ones(()))
    model, optimizer = made()
    backward(model, 0)
    optimizer.step(value=1.0)  # As loops hand it to all.
    model, optimizer = made(factory=fr.lbfgs, lr=1.0)
    with pytest.raises(TypeError, match=r"needs the objective.* step\(closure\)"):
        trained(model, optimizer, 1)
    with pytest.raises(TypeError, match=r"needs the value.* where the closure returns the loss"):
        optimizer.step(lambda: None)
    model, optimizer = made(factory=PLATEAU, lr=1.0)
    backward(model, 0)
    with pytest.raises(TypeError, match=r"needs the value.*The closure returned None; lacks it `return loss`\?"):
        optimizer.step(lambda: None)
    optimizer.step(lambda: 3.0)  # A number is a value, too.


SEARCHES = {
    "lbfgs": lambda: fr.lbfgs(),
    "backtracking": lambda: fr.chain(fr.sgd(1.0), fr.scale_by_backtracking_linesearch(15)),
    "zoom": lambda: fr.chain(fr.sgd(1.0), fr.scale_by_zoom_linesearch(15)),
}


@every_way
@pytest.mark.parametrize("factory", SEARCHES.values(), ids=SEARCHES)
def test_a_line_search_calls_the_closure(factory, compile):
    """What `update` does with a function of the parameters."""
    model = network()
    optimizer = fr.Optimizer(model.named_parameters(), factory, compile=compile)
    params, tx = {name: p.detach().clone() for name, p in model.named_parameters()}, factory()
    other = network()
    x = torch.randn(6, 5, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(DEVICE, torch.float64)
    f = lambda params: (torch.func.functional_call(other, params, (x,)) - x[:, :2]).square().mean()
    state = tx.init(params)
    for _ in range(4):
        grads, loss = torch.func.grad_and_value(f)(params)
        updates, state = tx.update(grads, state, params, value=loss, grad=grads, value_fn=f)
        params = fr.apply_updates(params, updates)
        assert_equal(optimizer.step(by_closure(model, optimizer, 0)).detach(), loss)
        assert_equal({name: p.detach() for name, p in model.named_parameters()}, params)
    assert f(params) < 0.5 * f({name: p.detach() for name, p in other.named_parameters()})


def test_a_line_search_over_several_groups_is_refused():
    model = network()
    groups = [{"params": [("a", model[0].weight)]}, {"params": [("b", model[2].weight)]}]
    optimizer = fr.Optimizer(groups, fr.lbfgs)
    with pytest.raises(ValueError, match="these are 2 trees, of 2 param groups; expected one group"):
        optimizer.step(by_closure(model, optimizer, 0))


# Masks, groups, and parameters that begin later


def test_a_mask_may_choose_nothing_in_one_group_or_among_those_that_begin_later():
    """Groups of weights and of biases, as trainers make them; and biases that are frozen at first."""
    for later in (False, True):
        model = torch.nn.Linear(3, 2)
        groups = [{"params": [model.weight]}, {"params": [model.bias]}]
        optimizer = fr.Optimizer([*model.parameters()] if later else groups, LASSO, lr=0.1, strength=1e6, compile=False)
        model.bias.requires_grad_(not later)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
            model.bias.requires_grad_(True)
        assert not model.weight.any()
        assert model.bias.all()
        again = fr.Optimizer([*model.parameters()] if later else groups, LASSO, lr=0.1, strength=1e6, compile=False)
        again.load_state_dict(optimizer.state_dict())
        again.step()


def test_a_mask_by_name_knows_the_parameters_that_begin_later():
    model = torch.nn.Linear(3, 2)
    mask = {"weight": True, "bias": False}
    optimizer = fr.Optimizer(model.named_parameters(), lambda lr: fr.adamw(lr, mask=mask), lr=0.1, compile=False)
    model.bias.requires_grad_(False)
    for _ in range(2):
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        model.bias.requires_grad_(True)
    assert len(optimizer.state) == 2


def test_a_mask_that_chooses_nothing_in_any_group_is_refused_and_nothing_is_changed():
    model = torch.nn.Linear(3, 2)
    factory = lambda lr: fr.prox_adam(lr, fr.l1, mask=fr.select("*.gamma"))
    groups = [{"params": [(name, w)]} for name, w in model.named_parameters()]
    optimizer = fr.Optimizer(groups, factory, lr=0.1, compile=False)
    before = [w.detach().clone() for w in model.parameters()]
    model(torch.ones(4, 3)).sum().backward()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"select\('\*.gamma'\) matches no leaf"):
            optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(w, old) for w, old in zip(model.parameters(), before, strict=True))
    unnamed = fr.Optimizer(model.parameters(), factory, lr=0.1, compile=False)
    with pytest.raises(ValueError, match=r"leaves are 0, 1\. For names, give the optimizer model\.named_parameters"):
        unnamed.step()
    optimizer = fr.Optimizer(model.named_parameters(), factory, lr=0.1, compile=False)
    model.bias.grad = None  # Also where not all of the group have begun.
    with pytest.raises(ValueError, match=r"matches no leaf; the leaves are bias, weight"):
        optimizer.step()


def test_values_of_groups_are_not_set_as_attributes():
    optimizer = fr.Optimizer(network().named_parameters(), lasso, lr=0.1, strength=0.2, compile=False)
    with pytest.raises(
        AttributeError, match=r"in each param group, as in optimizer\.param_groups\[0\]\['strength'\] = 1"
    ):
        optimizer.strength = 1.0
    optimizer.epoch = 3  # What others keep there is theirs.
    assert optimizer.param_groups[0]["strength"] == 0.2
