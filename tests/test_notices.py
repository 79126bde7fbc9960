"""Warnings point at the user's line, whatever lies between it and what warns."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import pytest
import torch
from sklearn.utils.parallel import Parallel, delayed
from torch import nn

import funcreg as fr

FUNCREG = Path(fr.__file__).parent
IN_A = {"a": True, "b": False}
LEAVES = {"a": torch.ones(2), "b": torch.ones(2)}


def one(kind=torch.optim.SGD, lr=0.1, grad=True, **given):
    """A parameter, and an optimizer of it."""
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2) if grad else None
    return w, kind([w], lr=lr, **given)


def history():
    params, tx = {"a": torch.ones(1, requires_grad=True)}, fr.sgd(0.1)
    state = tx.init(params)
    for _ in range(101):
        updates, state = tx.update(params, state, params)
        params = fr.apply_updates(params, updates)


def without_gradient(through):
    def run():
        _, optimizer = one(lambda params, lr: fr.Optimizer(params, fr.sgd, lr=lr, compile=False), grad=False)
        step = optimizer.step
        if through == "a scheduler":
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            step = optimizer.step
        elif through == "a scaler":
            step = lambda: torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
        elif through == "a closure":
            step = lambda: optimizer.step(lambda: torch.ones(()))
        step()

    return run


def number_made():
    _, optimizer = one(lambda params, lr: fr.Optimizer(params, lambda lr: fr.sgd(float(lr)), lr=lr, compile=False))
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.step()


def group_option():
    fr.Optimizer([{"params": [nn.Parameter(torch.ones(1))], "decay": 0.1}], lambda lr: fr.sgd(lr), lr=0.1)


def regularized_without_gradient(through=None, steps=1):
    def run():
        _, optimizer = one(grad=False)
        fr.regularize(optimizer, fr.l1, strength=0.1)
        if through == "a scheduler":
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for _ in range(steps):
            optimizer.step()

    return run


def all_zero():
    _, optimizer = one(lr=5.0)
    fr.regularize(optimizer, fr.l1, strength=1.0)
    optimizer.step()


def restored():
    w, optimizer = one()
    fr.regularize(optimizer, fr.l1, strength=lambda n: 0.0 * n)
    optimizer.step()
    w.grad = torch.ones(2)
    _, other = one(momentum=0.9)
    other.step()
    optimizer.load_state_dict(other.state_dict())
    optimizer.step()


def replaced():
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    fr.regularize(optimizer, fr.l1, strength=1e-6, module=net)
    net.load_state_dict({name: w.clone() for name, w in net.state_dict().items()}, assign=True)
    optimizer.step()


def scaled():
    net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    fr.regularize(torch.optim.SGD(net.parameters(), lr=0.1), fr.l1, strength=1e-3, module=net)


def stale():
    step = fr.fuse(fr.sgd(0.1), donate=True, backend="eager")
    params, state = step.init(LEAVES)
    gradients = step.gradients(params)
    for _ in range(3):
        params, state = step(params, gradients, state)


def broken_compiler():
    def refuse(module, inputs):
        raise RuntimeError("no compiler here")

    step = fr.fuse(fr.sgd(0.1), backend=refuse)
    params, state = step.init(LEAVES)
    step(params, LEAVES, state)


def not_recorded():
    fr.fuse(fr.stateless(lambda u, p: fr.tree_map(lambda x: x.clone().mul_(2), u)), backend="eager").init(LEAVES)


def object_given():
    tx = fr.Transform(lambda params: (), lambda updates, state, params, loss: (updates, state))
    fr.fuse(tx, backend="eager")(LEAVES, LEAVES, (), loss=abs)


def not_converged():
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    loss = lambda p, x, y: (x @ p["w"] - y).square().mean()
    begin = {"w": torch.zeros(4, dtype=torch.float64)}
    fr.cross_validate(loss, begin, fr.l1, data=(x, y), folds=2, count=3, max_steps=1)


def flat_loss():
    fr.minimize(lambda p: (p["w"].detach() ** 2).sum() + 0 * p["w"].sum(), {"w": torch.ones(2)}, fr.l1, strength=0.1)


def tight():
    fr.minimize(lambda p: (p["w"] ** 2).sum(), {"w": torch.ones(2)}, fr.l1, strength=0.1, tol=1e-12)


#: What warns, and what it says.
WARNED = {
    "links out of order": (lambda: fr.chain(fr.sgd(0.1), fr.add_decayed_weights(0.1)), "in this chain"),
    "raw gradients": (lambda: fr.masked(fr.adam(0.1), IN_A).init(LEAVES), "would go uphill"),
    "a label of no leaf": (
        lambda: fr.partition({0: fr.sgd(0.1), 1: fr.sgd(0.2)}, {"a": 0, "b": 0}).init(LEAVES),
        "no leaf has the label",
    ),
    "steps now and then": (lambda: fr.conditionally_transform(fr.sgd(0.1), lambda n: n > 1), "gradients pass as they"),
    "two decays": (lambda: fr.with_weight_decay(fr.adamw(0.1), "decoupled", 0.1), "decays weights already"),
    "a history": (history, "updates lie in one autograd history"),
    "an option of a group": (group_option, "has decay=0.1, which the factory does not take"),
    "a number of a tensor": (number_made, "makes a number of lr"),
    **{
        f"no gradient, through {through}": (without_gradient(through), "a step has no effect")
        for through in ("step", "a scheduler", "a scaler", "a closure")
    },
    "no gradient of a penalty": (regularized_without_gradient(), "has no effect on this step"),
    "the same under a scheduler": (regularized_without_gradient("a scheduler"), "has no effect on this step"),
    "the same at each step": (regularized_without_gradient(steps=3), "has no effect on this step"),
    "no weight left": (all_zero, "entries are zero after 1 steps"),
    "a schedule that was restored": (restored, "was restored"),
    "parameters that are gone": (replaced, "module no longer has"),
    "a scale that is lost": (scaled, "the direction of weight norm"),
    "old gradients": (stale, "nothing was written into the gradients"),
    "no compiler": (broken_compiler, "without compiled kernels"),
    "what cannot be recorded": (not_recorded, "computed leaf by leaf"),
    "an object": (object_given, "without a compiler"),
    "fits that have not converged": (not_converged, "fits have not converged"),
    "a loss without a slope": (flat_loss, "does it depend on them"),
    "a tolerance": (tight, "tol is 1e-12"),
    "nothing sparse": (lambda: fr.to_sparse({"w": torch.ones(8, 8)}), "found no matrix"),
    "nothing to prune": (lambda: fr.to_prune(nn.Linear(2, 2)), "nothing to prune"),
    "no low rank": (lambda: fr.factorized(nn.Linear(8, 8)), "found no layer"),
    "nothing dead": (lambda: fr.remove_dead({"w": torch.ones(3, 1)}, {"w": 0}), "found no dead group"),
}


def through_a_search():
    """The way from a search of scikit-learn to an estimator."""
    Parallel(n_jobs=1)([delayed(fr.to_sparse)({"w": torch.ones(8, 8, device="cpu")})])


WARNED["through a search of scikit-learn"] = (through_a_search, "found no matrix")


def half_frozen():
    model = nn.Sequential(nn.Linear(2, 2, device="cpu"), nn.Linear(2, 1, device="cpu"))
    model(torch.ones(1, 2, device="cpu")).sum().backward()
    model[0].requires_grad_(False)
    return model


def frozen_in_a_step():
    fr.fuse(fr.adam(0.1), backend="eager").init(dict(half_frozen().named_parameters()))


def frozen_under_an_optimizer():
    model = half_frozen()
    optimizer = torch.optim.Adam(model.parameters())
    fr.regularize(optimizer, fr.l1, strength=1e-3, module=model)
    optimizer.step()
    optimizer.step()


class Limited(nn.Module):
    """Two layers, and a number as large as their width, which no input reaches."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.number = nn.Linear(5, 8, device="cpu"), nn.Linear(8, 3, device="cpu"), 8

    def forward(self, x):
        return self.b(self.a(x).relu()) if x.shape[0] != 999 else x[:, : self.number]


def untold():
    net, x = Limited(), torch.randn(6, 5, device="cpu")
    with torch.no_grad():
        for w in (net.a.weight, net.a.bias, net.b.weight.T):
            w[::2] = 0
    groups = fr.channel_groups(net, (x,))
    fr.resized(net, fr.remove_dead(fr.with_buffers(net), groups), (x,))


WARNED["a number that nothing tells"] = (untold, "leaves number=8 of ''")
WARNED["frozen parameters of a step"] = (frozen_in_a_step, "init got 0.bias, 0.weight with requires_grad=False")
WARNED["frozen parameters with gradients"] = (frozen_under_an_optimizer, "leaves out 0.weight, 0.bias, frozen by")


@pytest.mark.parametrize(("warns", "says"), WARNED.values(), ids=WARNED)
def test_a_warning_points_at_the_users_line(warns, says):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warns()
    assert [says in str(each.message) for each in caught] == [True], [str(each.message) for each in caught]
    assert caught[0].filename == __file__


def test_all_warnings_go_the_same_way():
    """So that each points there, and has its row above."""
    calls = {}
    for path in FUNCREG.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warnings.warn_explicit"):
                calls[path.stem] = calls.get(path.stem, 0) + 1
    assert calls == {"notices": 1}
