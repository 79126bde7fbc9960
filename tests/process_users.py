"""What users do with sharded parameters beyond calling rules: checks that `processes` runs in several processes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import TRANSFORMS, draw
from processes import OF_EXAMPLES, Check, network, one_number, same, spread_tree, spreads, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import funcreg as fr


def users(world: int) -> Iterator[Check]:
    for check in (
        mixed_precision,
        hybrid,
        tensor_parallel,
        frozen,
        tied,
        resharded_optimizer,
        resharded_state,
        tables,
        parts,
        dead,
        noise,
        sixteen_bits_at_random,
        not_finite,
        unsummed_gradients,
        whole_gradients,
        missing_gradients,
        whole_state,
        single_rows,
        without_distributed_rules,
    ):
        yield check.__name__, lambda check=check: check(world)
    rows = spreads(world)["rows"]
    for name, case in TRANSFORMS.items():
        if world == 2 or name.startswith(OF_EXAMPLES):  # Four processes have shards that are not alike.
            continue
        yield f"fused {name}", lambda case=case: fused(case.make(), rows)


def fused(tx: Any, spread: Any) -> None:
    """Two fused steps are those of the plain functions on whole parameters, and keep where everything lies."""
    params = draw()
    there = spread_tree(spread, params)
    state = tx.init(params)
    step = fr.fuse(tx, donate=True, backend="eager")
    p, s = step.init(there)
    begun = fr.tree_leaves(s)
    for seed in (1, 2):
        grads = draw(seed)
        updates, state = tx.update(grads, state, params)
        params = fr.apply_updates(params, updates)
        p, s = step(p, spread_tree(spread, grads), s)
        same(p, params, there)
        same(s, state)
        for old, new in zip(begun, fr.tree_leaves(s), strict=True):
            assert isinstance(old, DTensor) == isinstance(new, DTensor)
            assert not isinstance(old, DTensor) or old.placements == new.placements
    same(there, draw())


# Modules and optimizers


def _train(module: nn.Module, optimizer: Any, rows: Tensor, steps: int = 4) -> None:
    for _ in range(steps):
        module(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _named(module: nn.Module) -> dict[str, Tensor]:
    return {name: w.detach() for name, w in module.named_parameters()}


def _own(x: Tensor) -> Tensor:
    """The rows of this process."""
    return x[dist.get_rank() :: dist.get_world_size()]


def _batch(world: int) -> Tensor:
    return torch.randn(4 * world, 6, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(5))


def mixed_precision(world: int) -> None:
    """Computed in bfloat16, kept and stepped in float32: the step is that of whole tensors with the same gradients."""
    net = network().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)), mp_policy=policy)
    tx = fr.prox_adam(0.05, fr.l1, strength=0.1, mask=fr.matrices)
    step = fr.fuse(tx, donate=True, backend="eager")
    params = _named(net)
    state = tx.init(params)
    plain = fr.tree_map(torch.clone, whole(params))
    plain_state = tx.init(plain)
    for _ in range(3):
        net(_own(_batch(world)).float()).square().mean().backward()
        grads = {name: w.grad for name, w in net.named_parameters()}
        updates, plain_state = tx.update(whole(grads), plain_state, plain)
        plain = fr.apply_updates(plain, updates)
        params, state = step(params, grads, state)
        net.zero_grad()
        same(params, plain, tol=1e-6)
        same(_named(net), plain, tol=1e-6)  # In the memory of the module.
    assert fr.sparsity(params) > 0


def _models(world: int, shard: Callable[[nn.Module], Any]) -> tuple[nn.Module, nn.Module]:
    plain, net = network(), network()
    shard(net)
    return plain, net


def hybrid(world: int) -> None:
    """Copies of shards: sums count each shard once."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("copies", "shards"))
    x = _batch(world)
    for make in (_optimizer, _clipped_optimizer, _regularized):
        plain, net = _models(world, lambda net: fully_shard(net, mesh=mesh))
        _train(plain, make(plain), x)
        _train(net, make(net), _own(x))
        same(_named(net), _named(plain))


def _compiler() -> str:
    """The real compiler in two processes; four take the same way with one that makes no code."""
    return "inductor" if dist.get_world_size() == 2 else "eager"


def _optimizer(model: nn.Module) -> Any:
    factory = lambda lr, strength: fr.prox_adam(lr, fr.l1, strength=strength, mask=fr.matrices)
    return fr.Optimizer(model.named_parameters(), factory, lr=0.01, strength=0.05, compile=_compiler())


def _clipped_optimizer(model: nn.Module) -> Any:
    factory = lambda lr: fr.chain(fr.clip_by_global_norm(0.1), fr.adamw(lr), fr.soft_threshold(1e-4))
    return fr.Optimizer(model.named_parameters(), factory, lr=0.01, compile=_compiler())


def _regularized(model: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    fr.regularize(optimizer, fr.group_lasso, strength=0.05, module=model, mask=fr.matrices)
    return optimizer


def tensor_parallel(world: int) -> None:
    """Layers cut along rows and columns, every process with the whole batch."""
    mesh = init_device_mesh("cpu", (world,))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    x = _batch(world)
    for make in (_optimizer, _clipped_optimizer, _regularized):
        plain, net = _models(world, lambda net: parallelize_module(net, mesh, plan))
        _train(plain, make(plain), x)
        _train(net, make(net), x)
        same(_named(net), _named(plain))
    plain, net = _models(world, lambda net: parallelize_module(net, mesh, plan))
    units = {"0.weight": 0, "0.bias": 0, "2.weight": 1}
    for module in (plain, net):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        fr.regularize(optimizer, fr.coupled(fr.group_lasso, units), strength=0.5, module=module)
        _train(module, optimizer, x)
    same(_named(net), _named(plain))


def frozen(world: int) -> None:
    """Parameters that need no gradient stay, and the others move as ever."""
    mesh = init_device_mesh("cpu", (world,))

    def without_first(net: nn.Module) -> nn.Module:
        for name, w in net.named_parameters():
            w.requires_grad_(not name.startswith("0."))
        return net

    x = _batch(world)
    for make in (_optimizer, _regularized):
        plain, net = without_first(network()), without_first(network())
        fully_shard(net, mesh=mesh)
        _train(plain, make(plain), x)
        _train(net, make(net), _own(x))
        same(_named(net), _named(plain))
        same(_named(net)["0.weight"], _named(network())["0.weight"])
    tx = fr.chain(fr.adamw(0.1), fr.freeze(fr.select("0.*")))
    params, there = _named(plain), _named(net)
    made = []
    for tree, donate in ((fr.tree_map(torch.clone, params), False), (there, True), (there, False)):
        grads = {name: None if name.startswith("0.") else w.cos() for name, w in whole(tree).items()}
        slopes = {n: g if g is None or tree is not there else _like(g, there[n]) for n, g in grads.items()}
        own = fr.tree_map(torch.clone, tree)
        made.append(fr.fuse(tx, donate=donate, backend="eager")(own, slopes, tx.init(own))[0])
    same(made[1], made[0], there)
    same(made[2], made[0], there)


def _like(x: Tensor, leaf: Any) -> Tensor:
    return distribute_tensor(x, leaf.device_mesh, leaf.placements)


class _Tied(nn.Module):
    """A layer whose weight is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6).double(), nn.Linear(6, 6, bias=False).double()
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


def tied(world: int) -> None:
    torch.manual_seed(1)
    plain = _Tied()
    torch.manual_seed(1)
    net = _Tied()
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    assert list(_named(net)) == list(_named(plain)) == ["first.weight", "first.bias"]
    x = _batch(world)
    for make in (_optimizer, _regularized):
        _train(plain, make(plain), x)
        _train(net, make(net), _own(x))
        same(_named(net), _named(plain))


# Checkpoints


def _folder() -> Path:
    """A new folder, the same in all processes."""
    found = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(found)
    return Path(found[0])


def resharded_optimizer(world: int) -> None:
    """Torch's own functions for states of optimizers, saved from one placement and read into another."""
    line = init_device_mesh("cpu", (world,))
    square = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("copies", "shards"))
    x, folder = _batch(world), _folder()
    plain, net = _models(world, lambda net: fully_shard(net, mesh=line))
    optimizer = _optimizer(plain)
    _train(plain, optimizer, x, 6)
    optimizer = _optimizer(net)
    _train(net, optimizer, _own(x), 3)
    saved = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.save(saved, checkpoint_id=folder / "at")  # pyright: ignore[reportPrivateImportUsage]  # It is documented.
    _, other = _models(world, lambda net: fully_shard(net, mesh=square))
    optimizer = _optimizer(other)
    loaded = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, optimizer)}
    dcp.load(loaded, checkpoint_id=folder / "at")  # pyright: ignore[reportPrivateImportUsage]  # It is documented.
    other.load_state_dict(loaded["model"])
    set_optimizer_state_dict(other, optimizer, loaded["optimizer"])
    _train(other, optimizer, _own(x), 3)
    same(_named(other), _named(plain))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def resharded_state(world: int) -> None:
    """A flat dict read into other placements, and into whole tensors; the step goes on from there."""
    line = init_device_mesh("cpu", (world,))
    square = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("copies", "shards"))
    tx = fr.chain(fr.clip_by_global_norm(1.0), fr.adamw(0.1), fr.ema(0.5))
    params = draw()
    rows = lambda mesh: lambda i, w: distribute_tensor(w, mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)])
    there = spread_tree(rows(line), params)
    _, state = tx.update(spread_tree(rows(line), draw(1)), tx.init(there), there)
    flat = fr.to_state_dict({"params": there, "state": state})
    assert all(isinstance(x, DTensor) for name, x in flat.items() if name.startswith("params"))
    other = spread_tree(rows(square), fr.tree_map(torch.zeros_like, params))
    for template in (other, fr.tree_map(torch.zeros_like, params), there):
        whole_tensors = template is not other and template is not there
        source = flat if whole_tensors or template is there else {name: whole(x) for name, x in flat.items()}
        found = fr.from_state_dict({"params": template, "state": tx.init(template)}, source)
        same(found, {"params": params, "state": whole(state)})
        same(found["params"], params, template)
        again, _ = tx.update(template, found["state"], found["params"])
        same(again, tx.update(whole(template), whole(state), params)[0], template)


# What is printed and counted


def tables(world: int) -> None:
    """Reports, comparisons, shares and explanations have the numbers of whole parameters."""
    units = {"head.weight": 0, "head.bias": 0}
    for how, spread in spreads(world).items():
        params = fr.l1.prox(draw(), 0.3)
        there = spread_tree(spread, params)
        for penalty in (fr.l1, fr.group_lasso, fr.nuclear, fr.coupled(fr.group_lasso, units)):
            found, expected = (fr.report(tree, penalty, strength=0.1) for tree in (there, params))
            assert str(found) == str(expected), f"{how}\n{found}\n{expected}"
        moved, there_moved = (fr.l1.prox(tree, 0.1) for tree in (params, there))
        assert str(fr.compare(there, there_moved)) == str(fr.compare(params, moved))
        assert str(fr.explain(fr.matrices, there)) == str(fr.explain(fr.matrices, params))
        found, expected = (fr.penalties(tree, {"l1": fr.l1, "rows": fr.group_lasso}) for tree in (there, params))
        same(found, expected)
        tx = fr.chain(fr.clip_by_global_norm(1.0), fr.prox_adam(0.1, fr.l1, strength=0.1, mask=fr.matrices))
        assert str(fr.describe(tx, there)) == str(fr.describe(tx, params))
    net = network()
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    assert str(fr.report(net, fr.l1)) == str(fr.report(network(), fr.l1))
    one_number(fr.sparsity(_named(net), mask=fr.matrices), fr.sparsity(_named(network()), mask=fr.matrices))


def parts(world: int) -> None:
    """Another penalty for each kind of leaf, weights for each, and sums of penalties."""
    layers = fr.per_leaf({"head.*": 0.1 * fr.l1, "body.*": fr.group_lasso.given(dim=None)})
    both = 0.1 * fr.l1 + fr.group_lasso.given(dim=None, mask=fr.matrices)
    for spread in spreads(world).values():
        params = draw()
        there = spread_tree(spread, params)
        for penalty in (layers, both):
            one_number(penalty(there), penalty(params))
            same(penalty.grad(there), penalty.grad(params), there)
            same(penalty.prox(there, 0.5), penalty.prox(params, 0.5), there)
        same(layers.parts(there), layers.parts(params))
        tx = fr.prox_adam(0.1, layers)
        same(tx.update(there, tx.init(there), there)[0], tx.update(params, tx.init(params), params)[0], there)


def dead(world: int) -> None:
    """Dead channels are taken out alike in all processes, of states, too; leaves come back whole."""
    mesh = init_device_mesh("cpu", (world,))
    alive = torch.arange(8) % 3 != 0
    params = _named(network())
    params = {
        **params,
        "0.weight": params["0.weight"] * alive[:, None],
        "0.bias": params["0.bias"] * alive,
        "2.weight": params["2.weight"] * alive,
    }
    there = {name: distribute_tensor(w, mesh, [Shard(0)]) for name, w in params.items()}
    units = {"0.weight": 0, "0.bias": 0, "2.weight": 1}
    tx = fr.trace(0.9)
    found = fr.remove_dead(there, units, tx.init(there))
    expected = fr.remove_dead(params, units, tx.init(params))
    same(found, expected)
    assert found[0]["0.weight"].shape == (int(alive.sum()), 6)


# Noise


def noise(world: int) -> None:
    """Noise is that of whole tensors, and so is other noise in each shard."""
    tx = fr.add_noise(1.0, 0.0, key=7)
    mesh = init_device_mesh("cpu", (world,))
    params = {"w": torch.zeros(4 * world, 3, dtype=torch.float64), "b": torch.zeros(5, dtype=torch.float64)}
    there = {name: distribute_tensor(w, mesh, [Shard(0)]) for name, w in params.items()}
    found, state = tx.update(there, tx.init(there), there)
    same(found, tx.update(params, tx.init(params), params)[0], there)
    again, _ = tx.update(there, state, there)
    assert len(torch.cat([whole(x["w"]).reshape(-1) for x in (found, again)]).unique()) == 2 * 12 * world
    step = fr.fuse(tx, donate=True, backend="eager")
    p, s = step.init(there)
    same(step(p, there, s)[0], whole(found), there)


def sixteen_bits_at_random(world: int) -> None:
    """Copies in float32 and rounding at random are, bit for bit, those of whole tensors."""
    mesh = init_device_mesh("cpu", (world,))
    params = {"w": torch.randn(3 * world + 1, 5).bfloat16(), "b": torch.ones(3).bfloat16(), "s": torch.randn(6)}
    grads = fr.tree_map(lambda w: (0.1 * w.float().cos()).to(w.dtype), params)
    there, slopes = ({n: distribute_tensor(w, mesh, [Shard(0)]) for n, w in tree.items()} for tree in (params, grads))
    inner = fr.adamw(1e-2, weight_decay=0.1)
    for tx in (fr.with_stochastic_rounding(inner, key=3), fr.with_master_weights(inner)):
        step = fr.fuse(tx, donate=True, backend="eager")
        p, s = step.init(there)
        tree, spread_leaves, state, spread_state = params, there, tx.init(params), tx.init(there)
        for _ in range(3):
            updates, state = tx.update(grads, state, tree)
            found, spread_state = tx.update(slopes, spread_state, spread_leaves)
            same(found, updates, there, tol=1e-6)
            tree, spread_leaves = fr.apply_updates(tree, updates), fr.apply_updates(spread_leaves, found)
            same(spread_leaves, tree, there, tol=1e-6)
            p, s = step(p, slopes, s)
            same(p, tree, there, tol=1e-6)


# Gradients that are not as they should be


def not_finite(world: int) -> None:
    """A NaN in the shard of one process makes all of them leave the step out."""
    params = draw()
    bad = draw(1)
    bad["head"].weight.view(-1)[0] = float("nan")
    for spread in spreads(world).values():
        there = spread_tree(spread, params)
        slopes = spread_tree(spread, bad)
        for tx in (
            fr.apply_if_finite(fr.adamw(0.1), 3),
            fr.MultiSteps(fr.adamw(0.1), 1, should_skip_update_fn=fr.skip_not_finite),
            fr.chain(fr.zero_nans(), fr.clip_by_global_norm(0.1), fr.adamw(0.1)),
        ):
            updates, state = tx.update(bad, tx.init(params), params)
            found, after = tx.update(slopes, tx.init(there), there)
            same(found, updates, there)
            same(after, state)
            p, s = fr.fuse(tx, backend="eager")(there, slopes, tx.init(there))
            same(p, fr.apply_updates(params, updates), there)
            same(s, state)


def unsummed_gradients(world: int) -> None:
    """Gradients that are sums not yet made."""
    mesh = init_device_mesh("cpu", (world,))
    params, grads = draw(), draw(1)
    there = spread_tree(lambda i, w: distribute_tensor(w, mesh, [Shard(0)]), params)
    slopes = fr.tree_map(lambda g: DTensor.from_local(g / world, mesh, [Partial()], run_check=False), grads)
    for tx in (fr.adamw(0.1), fr.chain(fr.clip_by_global_norm(0.1), fr.adamw(0.1)), fr.lion(0.1)):
        updates, _ = tx.update(grads, tx.init(params), params)
        new = fr.apply_updates(params, updates)
        for donate in (False, True):
            p, s = fr.fuse(tx, backend="eager").init(there)
            p, s = fr.fuse(tx, donate=donate, backend="eager")(p, slopes, s)
            same(p, new, there)
        found, _ = tx.update(slopes, tx.init(there), there)
        same(found, updates)


def whole_gradients(world: int) -> None:
    """Whole gradients beside sharded parameters, as a loop that gathers them has."""
    params, grads = draw(), draw(1)
    for spread in spreads(world).values():
        there = spread_tree(spread, params)
        for tx in (fr.adamw(0.1), fr.chain(fr.clip_by_global_norm(0.1), fr.sgd(0.1, momentum=0.9))):
            updates, _ = tx.update(grads, tx.init(params), params)
            for donate in (False, True):
                step = fr.fuse(tx, donate=donate, backend="eager")
                p, s = step.init(there)
                p, s = step(p, grads, s)
                same(p, fr.apply_updates(params, updates), there)


def missing_gradients(world: int) -> None:
    """A gradient that is None is an error in all processes, which names the leaf."""
    there = spread_tree(spreads(world)["rows"], draw())
    grads = fr.tree_map(torch.clone, there)
    missing = {**grads, "body": {**grads["body"], "scale": (None,)}}
    for donate in (False, True):
        step = fr.fuse(fr.adamw(0.1), donate=donate, backend="eager")
        p, s = step.init(there)
        with pytest.raises((TypeError, ValueError), match="scale"):
            step(p, missing, s)
        step(p, grads, s)


def whole_state(world: int) -> None:
    """A state that was made of whole parameters, beside sharded ones."""
    params, grads = draw(), draw(1)
    there, slopes = (spread_tree(spreads(world)["rows"], tree) for tree in (params, grads))
    tx = fr.adamw(0.1)
    updates, state = tx.update(grads, tx.init(params), params)
    found, after = tx.update(slopes, tx.init(params), there)
    same(found, updates, there)
    same(after, state)
    p, s = fr.fuse(tx, backend="eager")(there, slopes, tx.init(params))
    same(p, fr.apply_updates(params, updates), there)
    same(s, state)


def single_rows(world: int) -> None:
    """Rules that ask for dimensions of one entry do not take the one row of a process for such a dimension."""
    mesh = init_device_mesh("cpu", (world,))
    params = {"w": torch.randn(world, 3, dtype=torch.float64), "k": torch.randn(world + 1, 2, 2, dtype=torch.float64)}
    there = {name: distribute_tensor(w, mesh, [Shard(0)]) for name, w in params.items()}
    grads, slopes = (fr.tree_map(lambda w: w.cos(), tree) for tree in (params, there))
    for tx in (
        fr.adaptive_grad_clip(0.1),
        fr.scale_by_factored_rms(min_dim_size_to_factor=2),
        fr.prox_sgd(0.1, fr.group_lasso, strength=0.1, dim=0),
        fr.stateless(lambda u, p: fr.tree_map(lambda u: u / max(1, sum(n != 1 for n in u.shape)), u)),
    ):
        updates, _ = tx.update(grads, tx.init(params), params)
        same(tx.update(slopes, tx.init(there), there)[0], updates, there)
        p, s = fr.fuse(tx, backend="eager").init(there)
        same(fr.fuse(tx, backend="eager")(p, slopes, s)[0], fr.apply_updates(params, updates), there)


def without_distributed_rules(world: int) -> None:
    """What reads numbers of whole vectors says so of sharded ones, in all processes."""
    mesh = init_device_mesh("cpu", (world,))
    w = distribute_tensor(torch.randn(4 * world, dtype=torch.float64), mesh, [Shard(0)])
    loss = lambda p: (fr.core.sharding.whole(p["w"]) - 1).square().sum()
    calls: list[Callable[[], Any]] = [
        lambda: fr.minimize(loss, {"w": w}, fr.l1, strength=0.1),
        lambda: fr.regularization_path(loss, {"w": w}, fr.l1, count=3),
        lambda: fr.to_sparse({"w": distribute_tensor(torch.eye(4 * world), mesh, [Shard(0)])}),
    ]
    net = network()
    fully_shard(net, mesh=mesh)
    calls += [lambda: fr.to_prune(net), lambda: fr.from_prune(net), lambda: fr.factorized(net)]
    calls += [lambda: fr.channel_groups(net, (torch.ones(1, 6),)), lambda: fr.resized(net, whole(_named(net)))]
    for call in calls:
        with pytest.raises((TypeError, ValueError), match=r"sharded|DTensor"):
            call()
