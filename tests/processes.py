"""What the processes of `test_distributed` run: tables of checks, each of a sharded result against a whole one."""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from cases import CONSTRAINTS, GRADIENT_ALONE, PENALTIES, TRANSFORMS, draw, draw_fours
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import funcreg as fr

Check = tuple[str, Callable[[], None]]
#: Seconds that a collective may take before a process gives up: a process that raised alone is found by that.
PATIENCE = 15.0
#: From the name of a spread to what cuts a leaf so, for each number of processes.
Spread = Callable[[int, Tensor], Tensor]


def spreads(world: int) -> dict[str, Spread]:
    """Ways to spread leaves over processes, by their names."""
    line = init_device_mesh("cpu", (world,))
    if world == 2:
        return {
            "rows": lambda i, w: distribute_tensor(w, line, [Shard(0)]),
            "columns": lambda i, w: distribute_tensor(w, line, [Shard(w.ndim - 1)]),
            "copies": lambda i, w: distribute_tensor(w, line, [Replicate()]),
            "some plain": lambda i, w: distribute_tensor(w, line, [Shard(0)]) if i % 2 else w,
        }
    square: DeviceMesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    return {
        "rows": lambda i, w: distribute_tensor(w, line, [Shard(0)]),  # Fewer than there are processes.
        "hybrid": lambda i, w: distribute_tensor(w, square, [Replicate(), Shard(0)]),
        "both dimensions": lambda i, w: distribute_tensor(w, square, [Shard(0), Shard(w.ndim - 1)]),
    }


def spread_tree(spread: Spread, tree: Any) -> Any:
    """A tree with each leaf of one dimension or more spread."""
    leaves, rebuild = fr.tree.flatten(tree)
    return rebuild([spread(i, w) if w.ndim else w for i, w in enumerate(leaves)])


def whole(tree: Any) -> Any:
    return fr.tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, tree)


def same(sharded: Any, plain: Any, like: Any = None, tol: float = 1e-9) -> None:
    """A sharded tree has the numbers of a whole one, and the placements of the tree that it is like."""
    for path, x, y in zip(fr.tree_paths(plain), fr.tree_leaves(sharded), fr.tree_leaves(plain), strict=True):
        full = x.full_tensor() if isinstance(x, DTensor) else x
        torch.testing.assert_close(full, y, rtol=tol, atol=tol, equal_nan=True, msg=lambda m, path=path: f"{path}: {m}")
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


def of_penalty(name: str, case: Any, params: Any, spread: Spread) -> Iterator[Check]:
    there = spread_tree(spread, params)

    def value() -> None:
        one_number(case.value(there), case.value(params))
        same(torch.func.grad(case.value)(there), torch.func.grad(case.value)(params), there)

    def backward() -> None:
        tracked, plain = (fr.tree_map(lambda w: w.detach().clone().requires_grad_(), tree) for tree in (there, params))
        for tree in (tracked, plain):
            value = case.value(tree)
            if value.requires_grad:
                value.backward()
        if fr.tree_leaves(plain)[0].grad is not None:
            same(*[fr.tree_map(lambda w: w.grad, tree) for tree in (tracked, plain)], there)

    def gradient() -> None:
        same(case.grad(there), case.grad(params), there)

    def proximal() -> None:
        same(case.prox(there, 0.3), case.prox(params, 0.3), there)
        if getattr(case, "unweighted", ""):
            return
        steps = fr.tree_map(lambda w: 0.3, params)
        same(case.prox(there, steps), case.prox(params, steps), there)

    def metric() -> None:
        h = fr.tree_map(lambda w: 0.5 + w.abs(), params)
        same(case.prox(there, 0.3, metric=spread_tree(spread, h)), case.prox(params, 0.3, metric=h), there)

    def residual() -> None:
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


def penalties(world: int) -> Iterator[Check]:
    for how, spread in spreads(world).items():
        for name, case in (PENALTIES | GRADIENT_ALONE).items():
            for check, run in of_penalty(name, case, draw(), spread):
                yield f"{how}, {check}", run


def constraints(world: int) -> Iterator[Check]:
    for how, spread in spreads(world).items():
        for name, case in CONSTRAINTS.items():
            for check, run in of_penalty(name, case, draw_fours(), spread):
                yield f"{how}, {check}", run


# Transforms


def transforms(world: int) -> Iterator[Check]:
    for how, spread in spreads(world).items():
        for name, case in TRANSFORMS.items():
            yield f"{how}, {name}", lambda case=case, spread=spread: three_steps(case.make(), spread)


def three_steps(tx: Any, spread: Spread) -> None:
    """Three updates of sharded parameters are those of whole ones, and keep where everything lies."""
    params = draw()
    there = spread_tree(spread, params)
    state, spread_state = tx.init(params), tx.init(there)
    for seed in (1, 2, 3):
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


GROUPS: dict[str, Callable[[int], Iterator[Check]]] = {
    "penalties": penalties,
    "constraints": constraints,
    "transforms": transforms,
    "alone": alone,
}


# Running


def run(rank: int, world: int, folder: str, groups: list[str], only: str = "") -> None:
    """Run all checks of some groups in one process, and write what failed; stop at one that others do not reach."""
    faulthandler.dump_traceback_later(float(os.environ.get("FUNCREG_LIMIT", "400")), exit=True)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "CPU process group does not support alltoall")
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
    for group in groups:
        for name, check in GROUPS[group](world):
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
    run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4].split(","), *sys.argv[5:])
