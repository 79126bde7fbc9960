"""What the processes of `test_distributed` run: tables of checks, each of a sharded result against a whole one."""

from __future__ import annotations

import datetime
import faulthandler
import functools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CONSTRAINTS, GRADIENT_ALONE, PENALTIES, TRANSFORMS, draw, draw_fours
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import funcreg as fr

Check = tuple[str, Callable[[], None]]
#: Seconds that a collective may take before a process gives up: a process that raised alone is found by that.
PATIENCE = float(os.environ.get("FUNCREG_PATIENCE", "60"))
#: From the name of a spread to what cuts a leaf so, for each number of processes.
Spread = Callable[[int, Tensor], Tensor]
#: A check of leaves that are spread somehow.
SpreadCheck = tuple[str, Callable[[Spread], None]]


def spreads(world: int) -> dict[str, Spread]:
    """Ways to spread leaves over processes, by their names."""
    line = init_device_mesh("cpu", (world,))
    if world == 2:
        return {
            "rows": lambda i, w: cut(w, line, [Shard(0)]),
            "columns": lambda i, w: cut(w, line, [Shard(w.ndim - 1)]),
            "copies": lambda i, w: cut(w, line, [Replicate()]),
            "some plain": lambda i, w: cut(w, line, [Shard(0)]) if i % 2 else w,
        }
    square: DeviceMesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    return {
        "rows": lambda i, w: cut(w, line, [Shard(0)]),  # Fewer than there are processes.
        "hybrid": lambda i, w: cut(w, square, [Replicate(), Shard(0)]),
        "both dimensions": lambda i, w: cut(w, square, [Shard(0), Shard(w.ndim - 1)]),
    }


def by_turns(world: int, checks: Iterable[SpreadCheck], every: int = 1) -> Iterator[Check]:
    """Each check of leaves spread in one of the ways, whose turns change with the checks.

    In four processes all are of few rows, and one in `every` of one of the other ways, too.
    """
    first, *others = spreads(world).items()
    ways = others if world == 4 else [first, *others]
    for i, (name, check) in enumerate(checks):
        # A step further after each round: else one kind of check would always meet the same spread.
        turn = ways[(i + i // len(ways)) % len(ways)]
        few = [first, turn] if (i + i // 6) % every == 0 else [first]
        for how, spread in few if world == 4 else [turn]:
            yield f"{how}, {name}", lambda check=check, spread=spread: check(spread)


def cut(w: Tensor, mesh: DeviceMesh, placements: Any) -> DTensor:
    """A tensor that all processes have, sharded without a word between them."""
    return distribute_tensor(w.clone(), mesh, placements, src_data_rank=None)


def spread_tree(spread: Spread, tree: Any) -> Any:
    """A tree with each leaf of one dimension or more spread."""
    leaves, rebuild = fr.core.tree.flatten(tree)
    return rebuild([spread(i, w) if w.ndim else w for i, w in enumerate(leaves)])


def whole(tree: Any) -> Any:
    return fr.tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, tree)


def same(sharded: Any, plain: Any, like: Any = None, tol: float = 1e-9) -> None:
    """A sharded tree has the numbers of a whole one, and the placements of the tree that it is like."""
    for path, x, y in zip(fr.tree_paths(plain), fr.tree_leaves(sharded), fr.tree_leaves(plain), strict=True):
        if isinstance(x, DTensor) and any([p.is_partial() for p in x.placements]):
            x = x.full_tensor()
        elif isinstance(x, DTensor):  # Each process looks at its own shard.
            assert x.shape == y.shape, path
            x, y = x.to_local(), cut(y, x.device_mesh, x.placements).to_local()
        torch.testing.assert_close(x, y, rtol=tol, atol=tol, equal_nan=True, msg=lambda m, path=path: f"{path}: {m}")
    if like is None:
        return
    for path, x, w in zip(fr.tree_paths(like), fr.tree_leaves(sharded), fr.tree_leaves(like), strict=True):
        assert isinstance(x, DTensor) == isinstance(w, DTensor), path
        if isinstance(x, DTensor):
            assert (x.placements, x.device_mesh) == (w.placements, w.device_mesh), f"{path}: {x.placements}"
            assert x.to_local().shape == w.to_local().shape, path


def one_number(value: Tensor, plain: Tensor) -> None:
    """A number that every process has, and that is no `DTensor`."""
    assert not isinstance(value, DTensor)
    torch.testing.assert_close(value, plain, rtol=1e-9, atol=1e-9, equal_nan=True)


# Penalties and constraints


def of_penalty(name: str, case: Any, params: Any) -> Iterator[SpreadCheck]:
    def value(spread: Spread) -> None:
        there = spread_tree(spread, params)
        one_number(case.value(there), case.value(params))
        same(torch.func.grad(case.value)(there), torch.func.grad(case.value)(params), there)

    def backward(spread: Spread) -> None:
        there = spread_tree(spread, params)
        tracked, plain = (fr.tree_map(lambda w: w.detach().clone().requires_grad_(), tree) for tree in (there, params))
        for tree in (tracked, plain):
            value = case.value(tree)
            if value.requires_grad:
                value.backward()
        if fr.tree_leaves(plain)[0].grad is not None:
            same(*[fr.tree_map(lambda w: w.grad, tree) for tree in (tracked, plain)], there)

    def gradient(spread: Spread) -> None:
        there = spread_tree(spread, params)
        same(case.grad(there), case.grad(params), there)

    def proximal(spread: Spread) -> None:
        there = spread_tree(spread, params)
        same(case.prox(there, 0.3), case.prox(params, 0.3), there)
        if getattr(case, "unweighted", ""):
            return
        steps = fr.tree_map(lambda w: 0.3, params)
        same(case.prox(there, steps), case.prox(params, steps), there)

    def metric(spread: Spread) -> None:
        there = spread_tree(spread, params)
        h = fr.tree_map(lambda w: 0.5 + w.abs(), params)
        same(case.prox(there, 0.3, metric=spread_tree(spread, h)), case.prox(params, 0.3, metric=h), there)

    def residual(spread: Spread) -> None:
        there = spread_tree(spread, params)
        slopes = fr.tree_map(lambda w: w.cos(), params)
        own = [
            fr.kkt_residual(p, g, case.penalty, *case.hyper, strength=0.4, **case.options)
            for p, g in ((there, spread_tree(spread, slopes)), (params, slopes))
        ]
        one_number(*own)

    yield f"{name}: value", value
    yield f"{name}: backward", backward
    yield f"{name}: gradient", gradient
    if name in GRADIENT_ALONE:
        return
    yield f"{name}: proximal", proximal
    if case.metric:
        yield f"{name}: metric", metric
    yield f"{name}: residual", residual


def of_rows(world: int, rows: dict[str, Any], params: Any) -> Iterator[Check]:
    yield from by_turns(world, [check for name, case in rows.items() for check in of_penalty(name, case, params)], 2)


def penalties(world: int) -> Iterator[Check]:
    yield from of_rows(world, PENALTIES | GRADIENT_ALONE, draw())


def constraints(world: int) -> Iterator[Check]:
    yield from of_rows(world, CONSTRAINTS, draw_fours())


# Transforms


#: Rows whose updates are gradients of single examples.
OF_EXAMPLES = ("differentially_private_aggregate", "dpsgd")


def transforms(world: int) -> Iterator[Check]:
    steps = functools.partial(few_steps, count=3 if world == 2 else 2)
    check = lambda name: refuse_shards if name.startswith(OF_EXAMPLES) else steps
    rows = [(name, check(name), case.make) for name, case in TRANSFORMS.items()]
    yield from by_turns(world, [(name, lambda spread, of=of, make=make: of(make(), spread)) for name, of, make in rows])


def refuse_shards(tx: Any, spread: Spread) -> None:
    """They read norms over whole gradients, and say so in all processes."""
    there = spread_tree(spread, draw())
    with pytest.raises(TypeError, match="as a sharded tensor"):
        tx.update(there, tx.init(there), there)


def few_steps(tx: Any, spread: Spread, count: int = 3) -> None:
    """A few updates of sharded parameters are those of whole ones, and keep where everything lies."""
    params = draw()
    there = spread_tree(spread, params)
    state, spread_state = tx.init(params), tx.init(there)
    for seed in range(1, 1 + count):
        grads = draw(seed)
        updates, state = tx.update(grads, state, params)
        found, after = tx.update(spread_tree(spread, grads), spread_state, there)
        same(found, updates, there)
        same(after, state, spread_state)
        spread_state = after
        params, there = fr.apply_updates(params, updates), fr.apply_updates(there, found)
    same(there, params)


def alone(world: int) -> Iterator[Check]:
    """A check that one process leaves while the others wait for it: it is to fail, and not to hang."""

    def leave() -> None:
        if dist.get_rank():
            raise ValueError("a process alone")
        dist.all_reduce(torch.ones(1))

    yield "one raises", leave


def aborted(world: int) -> Iterator[Check]:
    """A check that ends one process by a signal when it is first run."""

    def abort() -> None:
        if dist.get_rank() and os.path.basename(sys.argv[3]) != "again":
            os.abort()

    yield "one is ended", abort


# All else


def others(world: int) -> Iterator[Check]:
    for how, spread in spreads(world).items():
        for check in (certificates, norms, families, hyperparameters, members, twice, vectors, wholes, sixteen_bits):
            yield f"{how}, {check.__name__}", lambda check=check, spread=spread: check(spread)
    for check in (modules, meshes, counts, refused, untold):
        yield check.__name__, lambda check=check: check(world)


def certificates(spread: Spread) -> None:
    params, grads = draw(), draw(1)
    there, slopes = spread_tree(spread, params), spread_tree(spread, grads)
    for penalty, hyper, options in (
        (fr.l1, (), {}),
        (fr.elastic, (0.3, 0.5), {}),
        (fr.group_lasso, (), {}),
        (fr.group_lasso, (), {"dim": 0}),
        (fr.nuclear, (), {}),
        (fr.linf, (), {}),
        (0.5 * fr.l1 + fr.group_lasso.given(), (), {}),
    ):
        one_number(fr.lambda_max(slopes, penalty, *hyper, **options), fr.lambda_max(grads, penalty, *hyper, **options))
        one_number(
            fr.kkt_residual(there, slopes, penalty, *hyper, mask=fr.matrices, **options),
            fr.kkt_residual(params, grads, penalty, *hyper, mask=fr.matrices, **options),
        )
    one_number(fr.sparsity(there), fr.sparsity(params))
    assert f"{fr.sparsity(there).item():.3f} {fr.l1(there):.3f}" == f"{fr.sparsity(params):.3f} {fr.l1(params):.3f}"
    x, y = torch.eye(4, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64)
    w = {"w": draw()["head"].bias}
    one_number(
        fr.duality_gap(lambda p: fr.core.sharding.whole(p["w"]) @ x, spread_tree(spread, w), y, fr.l1, strength=0.5),
        fr.duality_gap(lambda p: p["w"] @ x, w, y, fr.l1, strength=0.5),
    )


def norms(spread: Spread) -> None:
    params = draw()
    there = spread_tree(spread, params)
    one_number(fr.global_norm(there), fr.global_norm(params))
    same(torch.func.grad(fr.global_norm)(there), torch.func.grad(fr.global_norm)(params), there)
    huge = fr.tree_map(lambda w: (1e25 * w).float(), params)
    torch.testing.assert_close(fr.global_norm(spread_tree(spread, huge)), fr.global_norm(huge))
    nothing = fr.tree_map(torch.zeros_like, params)
    same(torch.func.grad(fr.global_norm)(spread_tree(spread, nothing)), nothing)


def families(spread: Spread) -> None:
    head, alive = draw()["head"], torch.arange(4) < 2
    params = {"0.weight": head.weight * alive[:, None], "0.bias": head.bias * alive}
    params["2.weight"] = (head.weight.T * alive).contiguous()
    there = spread_tree(spread, params)
    units = {"0.weight": 0, "0.bias": 0, "2.weight": 1}
    penalty = fr.coupled(fr.group_lasso, units)
    one_number(penalty(there), penalty(params))
    same(penalty.prox(there, 0.5), penalty.prox(params, 0.5), there)
    same(torch.func.grad(penalty)(there), torch.func.grad(penalty)(params), there)
    same(fr.remove_dead(there, units), fr.remove_dead(params, units))


def hyperparameters(spread: Spread) -> None:
    """Derivatives in what all processes have alike, and trees and tensors of hyperparameters."""
    params = draw()
    there = spread_tree(spread, params)
    strength = torch.tensor(0.3, dtype=torch.float64)
    values = lambda tree: lambda a: fr.elastic(tree, a, 0.5)
    one_number(torch.func.grad(values(there))(strength), torch.func.grad(values(params))(strength))
    landed = lambda tree: lambda a: fr.l2(fr.l1.prox(tree, a))
    one_number(torch.func.grad(landed(there))(strength), torch.func.grad(landed(params))(strength))
    rows = fr.tree_map(lambda w: torch.rand((w.shape[0], *[1] * (w.ndim - 1)), dtype=w.dtype), params)
    entries = fr.tree_map(lambda w: torch.rand(w.shape, dtype=w.dtype), params)
    for penalty, weights in ((fr.group_lasso, rows), (fr.l1, rows), (fr.l1, entries)):
        one_number((weights * penalty)(there), (weights * penalty)(params))
        same((weights * penalty).prox(there, 0.5), (weights * penalty).prox(params, 0.5), there)
        of = lambda tree, penalty=penalty: lambda c: (c * penalty)(tree)
        same(torch.func.grad(of(there))(weights), torch.func.grad(of(params))(weights))
    anchor = draw(3)
    one_number(fr.anchored_l2(there, spread_tree(spread, anchor)), fr.anchored_l2(params, anchor))
    one_number(fr.anchored_l2(there, anchor), fr.anchored_l2(params, anchor))
    tracked = strength.clone().requires_grad_()
    (slope,) = torch.autograd.grad(fr.elastic(there, tracked, 0.5), tracked)
    one_number(slope, fr.elastic(params, 1.0, 0.5))


def members(spread: Spread) -> None:
    """A batch of strengths over one set of sharded parameters."""
    params = draw()
    there = spread_tree(spread, params)
    strengths = torch.tensor([0.1, 0.5], dtype=torch.float64)
    for penalty in (fr.l1, fr.group_lasso, fr.linf):
        many = lambda tree, penalty=penalty: torch.func.vmap(lambda a: penalty.prox(tree, a))(strengths)
        same(many(there), many(params))
    values = lambda tree: torch.func.vmap(lambda a: fr.elastic(tree, a, 0.5))(strengths)
    one_number(values(there), values(params))
    values = lambda tree: torch.func.vmap(torch.func.grad(lambda a: fr.elastic(tree, a, 0.5)))(strengths)
    one_number(values(there), values(params))


def twice(spread: Spread) -> None:
    """Derivatives of derivatives."""
    params = draw()
    there = spread_tree(spread, params)
    for penalty in (fr.l2, fr.group_lasso, fr.orthogonality):
        slope = lambda tree, penalty=penalty: fr.l2(torch.func.grad(penalty)(tree))
        same(torch.func.grad(slope)(there), torch.func.grad(slope)(params), there)


def vectors(spread: Spread) -> None:
    params = draw()
    there = spread_tree(spread, params)
    same(fr.projection_simplex(there, 1.5), fr.projection_simplex(params, 1.5), there)
    same(fr.projection_l1_ball(there, 0.5), fr.projection_l1_ball(params, 0.5), there)
    same(fr.projection_l2_ball(there, 0.5), fr.projection_l2_ball(params, 0.5), there)


def wholes(spread: Spread) -> None:
    """What a user writes: penalties of rules that depend on the size of what they see, and rules on trees."""

    @fr.penalty(gradient=lambda w: w.sign() / w.numel(), proximal=lambda w, step: w - (step / w.numel()) * w.sign())
    def mean(w: Tensor) -> Tensor:
        return w.abs() / w.numel()

    @fr.penalty(
        gradient=lambda w: w, proximal=lambda w, step: w - step * torch.arange(w.shape[0], dtype=w.dtype).mean()
    )
    def counted(w: Tensor) -> Tensor:
        return w * torch.arange(w.shape[0], dtype=w.dtype).mean()

    for penalty in (mean, counted):
        params = draw()
        there = spread_tree(spread, params)
        one_number(penalty(there), penalty(params))
        same(penalty.grad(there), penalty.grad(params), there)
        same(penalty.prox(there, 0.5), penalty.prox(params, 0.5), there)


def sixteen_bits(spread: Spread) -> None:
    params = draw(dtype=torch.bfloat16)
    there = spread_tree(spread, params)
    torch.testing.assert_close(fr.l1(there), fr.l1(params))
    same(fr.l1.prox(there, 0.3), fr.l1.prox(params, 0.3), there)
    same(fr.nuclear.prox(there, 0.3), fr.nuclear.prox(params, 0.3), there, tol=1e-2)
    assert all(x.dtype == torch.bfloat16 for x in fr.tree_leaves(fr.l1_ball.project(there, 0.3)))


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()


def modules(world: int) -> None:
    """Parameters as FSDP2 and tensor parallelism shard them; whole gradients beside theirs."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plain, net = network(), network()
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        parallelize_module(net, mesh["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(net, mesh=mesh["data"])
    else:
        fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    params, there = dict(plain.named_parameters()), dict(net.named_parameters())
    x = torch.randn(5, 6, dtype=torch.float64)
    for model, tree in ((plain, params), (net, there)):
        loss = model(x).square().mean() + 0.1 * fr.elastic(tree, 0.5, 0.5) + 0.1 * fr.group_lasso(tree, dim=0)
        loss.backward()
    grads, slopes = ({name: w.grad for name, w in tree.items()} for tree in (params, there))
    same(slopes, grads, there)
    with torch.no_grad():
        for tx in (
            fr.adamw(0.1),
            fr.prox_adam(0.1, fr.l1, strength=0.1),
            fr.prox_sgd(0.1, fr.group_lasso, strength=0.1, momentum=0.5),
            fr.chain(fr.clip_by_global_norm(0.1), fr.sgd(0.1), fr.project(fr.l1_ball, 1.0)),
        ):
            updates, _ = tx.update(grads, tx.init(params), params)
            found, _ = tx.update(slopes, tx.init(there), there)
            same(found, updates, there)
            fr.apply_updates(there, found)


def meshes(world: int) -> None:
    """Leaves of two meshes in one tree."""
    line = init_device_mesh("cpu", (world,))
    square = init_device_mesh("cpu", (world // 2, 2))
    params = draw()
    there = spread_tree(
        lambda i, w: distribute_tensor(w, *((line, [Shard(0)]) if i % 2 else (square, [Shard(0)] * 2))), params
    )
    one_number(fr.l1(there), fr.l1(params))
    one_number(fr.global_norm(there), fr.global_norm(params))
    same(torch.func.grad(fr.l2)(there), torch.func.grad(fr.l2)(params), there)
    tx = fr.chain(fr.clip_by_global_norm(1.0), fr.adamw(0.1))
    same(tx.update(there, tx.init(there), there)[0], tx.update(params, tx.init(params), params)[0], there)


def counts(world: int) -> None:
    """How many collectives a call takes."""
    from torch.distributed.tensor.debug import CommDebugMode

    line = init_device_mesh("cpu", (world,))
    there = {str(i): distribute_tensor(torch.randn(2 * world, 3), line, [Shard(0)]) for i in range(10)}
    grads = fr.tree_map(torch.clone, there)
    clipped = fr.chain(fr.clip_by_global_norm(1.0), fr.scale_by_adam(), fr.scale(-0.1))
    tx = fr.prox_adam(0.1, fr.l1, strength=0.1)
    for expected, call in (
        (1, lambda: fr.l1(there)),
        (1, lambda: fr.group_lasso(there)),
        (1, lambda: torch.func.grad(fr.l1)(there)),
        (0, lambda: fr.l1.prox(there, 0.1)),
        (0, lambda: fr.group_lasso.prox(there, 0.1)),
        (0, lambda: fr.max_norm.project(there, 0.1)),
        (1, lambda: fr.global_norm(there)),
        (1, lambda: fr.kkt_residual(there, grads, fr.l1)),
        (1, lambda: fr.sparsity(there)),
        (10, lambda: fr.group_lasso.prox(there, 0.1, dim=0)),
        (1, lambda: clipped.update(grads, clipped.init(there), there)),
        (0, lambda: tx.update(grads, tx.init(there), there)),
    ):
        with CommDebugMode() as seen:
            call()
        assert seen.get_total_counts() == expected, f"{seen.get_comm_counts()}; expected {expected}"
    for tx in (  # Of these no leaf is gathered: sums over pieces are completed.
        fr.lamb(0.1),
        fr.adaptive_grad_clip(0.1),
        fr.scale_by_factored_rms(min_dim_size_to_factor=2),
        fr.prox_sgd(0.1, fr.group_lasso, strength=0.1, dim=0),
    ):
        with CommDebugMode() as seen:
            tx.update(grads, tx.init(there), there)
        assert 0 < seen.get_total_counts() <= 20
        assert not [op for op in seen.get_comm_counts() if "gather" in str(op)], tx


def untold(world: int) -> None:
    """Without the mode that looks at rules, all of them run on whole leaves."""
    locality: Any = sys.modules["funcreg.core.locality"]
    mode, known = locality.dispatch_mode, dict(locality._known)
    there = spread_tree(spreads(world)["rows"], draw())
    try:
        locality._known.clear()
        locality.dispatch_mode = lambda: None
        one_number(fr.l1(there), fr.l1(draw()))
        same(fr.elastic.prox(there, 0.1, 1.0, 0.5), fr.elastic.prox(draw(), 0.1, 1.0, 0.5), there)
        assert set(locality._known.values()) == {None}
    finally:
        locality.dispatch_mode = mode
        locality._known.clear()
        locality._known.update(known)


def refused(world: int) -> None:
    """Errors are raised in all processes alike, and name the leaf."""
    there = spread_tree(spreads(world)["rows"], draw())
    for call, text in (
        (lambda: fr.n_m_sparsity.project(there, 2, 4), "head.weight|body.filters|no multiple of m=4"),
        (lambda: fr.l1({**there, "head": there["body"]}, mask="head"), "string"),
        (lambda: fr.l1.prox(there, {"head": torch.ones(9), "body": 1.0}), "head"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            call()


# The fused step


def steps(world: int) -> Iterator[Check]:
    """Fused steps, donating and not, in whatever way they run."""
    for how, spread in spreads(world).items():
        for name, make in CHAINS.items():
            for donate in (False, True):
                yield (
                    f"{how}, {name}{', donating' * donate}",
                    lambda make=make, spread=spread, donate=donate: fused_steps(make(), spread, donate),
                )
    yield "compiled", lambda: compiled(world)


CHAINS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: fr.adamw(fr.linear_schedule(0.1, 0.0, 10)),
    "prox_adam": lambda: fr.prox_adam(0.1, fr.l1, strength=0.1),
    "groups of rows": lambda: fr.prox_sgd(0.1, fr.group_lasso, strength=0.1, momentum=0.5),
    "clipped": lambda: fr.chain(fr.clip_by_global_norm(0.1), fr.adamw(0.1), fr.soft_threshold(1e-3)),
    "projected": lambda: fr.chain(fr.sgd(0.1), fr.project(fr.l1_ball, 1.0)),
    "masked": lambda: fr.chain(fr.scale_by_adam(), fr.add_decayed_weights(0.1, mask=fr.matrices), fr.scale(-0.1)),
}


def fused_steps(tx: Any, spread: Spread, donate: bool, backend: str = "eager") -> None:
    params = draw()
    there = spread_tree(spread, params)
    state = tx.init(params)
    step = fr.fuse(tx, donate=donate, backend=backend)
    p, s = step.init(there) if donate else (there, tx.init(there))
    same(p, params, there)
    for seed in (1, 2, 3):
        grads = draw(seed)
        updates, state = tx.update(grads, state, params)
        params = fr.apply_updates(params, updates)
        before = fr.tree_leaves((p, s))
        p, s = step(p, spread_tree(spread, grads), s)
        if donate:
            assert all(a is b for a, b in zip(before, fr.tree_leaves((p, s)), strict=True))
        same(p, params, there)
        same(s, state)
    same(there, draw())  # What the step does not own is as it was.


def compiled(world: int) -> None:
    """With the real compiler, on gradients that the step gave: no collective in a chain that acts entry by entry."""
    from torch.distributed.tensor.debug import CommDebugMode

    spread = spreads(world)["rows"]
    fused_steps(fr.adamw(0.1), spread, True, "inductor")
    step = fr.fuse(fr.prox_adam(0.1, fr.l1, strength=0.1), donate=True, backend="eager")
    params, state = step.init(spread_tree(spread, draw()))
    grads = step.gradients(params)
    with torch.no_grad():
        for g, w in zip(fr.tree_leaves(grads), fr.tree_leaves(spread_tree(spread, draw(1))), strict=True):
            g.copy_(w)
    step(params, grads, state)
    for name, make in CHAINS.items():
        tx = make()
        way = fr.fused.shards.OnShards(tx, False, False, lambda tx: tx).way(params, grads, tx.init(params), {})
        assert way is {"clipped": True, "projected": None}.get(name, False), name
    for donate in (False, True):  # Also at the second call, which knows its trees again.
        step = fr.fuse(CHAINS["clipped"](), donate=donate, backend="eager")
        p, s = step.init(params)
        p, s = step(p, grads, s)
        with CommDebugMode() as seen:
            step(p, grads, s)
        assert seen.get_total_counts() == 1
    with CommDebugMode() as seen:
        fr.value_and_grad(fr.l1, backend="eager")(params)
    assert seen.get_total_counts() == 1
    tracked = fr.tree_map(lambda w: w.detach().requires_grad_(), params)
    with pytest.raises(ValueError, match="requires grad and cannot be donated"):
        step(tracked, grads, state)


# Torch's own loops


def loops(world: int) -> Iterator[Check]:
    """`Optimizer` and `regularize` on models that torch shards or copies, against one process with the whole batch."""
    for how in ("fsdp", "ddp"):
        for name, make in LOOPS.items():
            yield f"{how}, {name}", lambda how=how, make=make: trained(world, how, make)


def _regularized(model: torch.nn.Module, optimizer: Any, *args: Any, **options: Any) -> Any:
    fr.regularize(optimizer, *args, module=model, **options)
    return optimizer


LOOPS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "Optimizer": lambda model: fr.Optimizer(
        model.named_parameters(),
        lambda lr, strength: fr.prox_adam(lr, fr.l1, strength=strength, mask=fr.matrices),
        lr=0.01,
        strength=0.05,
        compile=False,
    ),
    "Optimizer compiled": lambda model: fr.Optimizer(
        model.named_parameters(),
        lambda lr, strength: fr.prox_sgd(lr, fr.group_lasso, strength=strength, momentum=0.5),
        lr=0.01,
        strength=0.05,
        compile="eager",
    ),
    "Optimizer clipped": lambda model: fr.Optimizer(
        model.named_parameters(),
        lambda lr: fr.chain(fr.clip_by_global_norm(0.1), fr.adamw(lr), fr.project(fr.l1_ball, 2.0)),
        lr=0.01,
        compile=False,
    ),
    "regularize": lambda model: _regularized(
        model, torch.optim.AdamW(model.parameters(), lr=0.01), fr.l1, strength=0.05, mask=fr.matrices, compile=False
    ),
    "regularize with groups": lambda model: _regularized(
        model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5), fr.group_lasso, strength=0.05, dim=0
    ),
    "regularize with a constraint": lambda model: _regularized(
        model, torch.optim.SGD(model.parameters(), lr=0.01), fr.l1_ball, 2.0, mask=fr.matrices
    ),
}


def trained(world: int, how: str, make: Callable[[torch.nn.Module], Any]) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    plain, net = network(), network()
    model = fully_shard(net, mesh=init_device_mesh("cpu", (world,))) if how == "fsdp" else DistributedDataParallel(net)
    x = torch.randn(4 * world, 6, dtype=torch.float64)
    own = x[dist.get_rank() :: world]
    for module, rows in ((plain, x), (model, own)):
        optimizer = make(module)
        for _ in range(5):
            module(rows).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    same(dict(net.named_parameters()), fr.tree_map(lambda w: w.detach(), dict(plain.named_parameters())))


GROUPS: dict[str, Callable[[int], Iterator[Check]]] = {
    "penalties": penalties,
    "constraints": constraints,
    "transforms": transforms,
    "others": others,
    "steps": steps,
    "loops": loops,
    "alone": alone,
    "aborted": aborted,
}


# Running


def run(rank: int, world: int, folder: str, groups: list[str], only: str = "") -> None:
    """Run all checks of some groups in one process, and write what failed; stop at one that others do not reach."""
    faulthandler.enable()  # Where a process was that memory or a signal ended.
    faulthandler.dump_traceback_later(float(os.environ.get("FUNCREG_LIMIT", "400")), exit=True)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "CPU process group does not support alltoall")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # Nothing is written into what a model returns.
    warnings.filterwarnings("ignore", "fuse got .* steps go uphill")  # Links of chains by themselves.
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    apart = dist.new_group(timeout=datetime.timedelta(seconds=2 * PATIENCE))  # Where processes say how a check went.
    results: dict[str, str | None] = {}
    for group, name, check in ((each, *row) for each in groups for row in GROUPS[each](world)):
        if only not in name:
            continue
        torch.manual_seed(0)
        error = None
        try:
            check()
        except Exception:
            error = traceback.format_exc()
        results[f"{group}: {name}"] = error
        ends: list[Any] = [None] * world
        try:
            dist.all_gather_object(ends, error and error.strip().splitlines()[-1], group=apart)
        except RuntimeError:
            ends = [rank, error]
        if len(set(ends)) > 1:  # Some raised, and the others may have waited for them.
            results[f"{group}: {name}"] = f"process {rank} of {world}, not all alike: {error}"
            break
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(results, file)
    faulthandler.cancel_dump_traceback_later()
    sys.stdout.flush()
    os._exit(0)  # Groups that wait for others would hold the process back.


if __name__ == "__main__":
    from process_users import users  # Which imports from here.

    GROUPS["users"] = users
    run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4].split(","), *sys.argv[5:])
