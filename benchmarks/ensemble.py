"""Whole training steps of 32 small networks, gradients and AdamW with an L1 of each member's own.

1x is a loop over the members, each with its own torch optimizer and a loop of softshrink.

    python benchmarks/ensemble.py --write
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import DECAY, RATE, STEPS, Leaves, Row, against, check_moved, report, softshrink_loop, start
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import AdamW

import funcreg as fr

MEMBERS, BATCH = 32, 64
REFERENCE = "loop over members, `AdamW`, softshrink"


class Problem:
    """Networks of 6337 parameters, stacked, and a batch for each of them."""

    def __init__(self, members: int) -> None:
        torch.manual_seed(0)
        make = lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        self.models = [make() for _ in range(members)]
        self.x, self.y = torch.randn(members, BATCH, 32), torch.randn(members, BATCH, 1)
        self.thresholds = torch.logspace(-6, -4, members)
        stacked = [dict(model.named_parameters()) for model in self.models]
        self.params = {name: torch.stack([each[name].detach() for each in stacked]) for name in stacked[0]}

    def loss(self, params: Leaves, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(self.models[0], params, (x,)), y)

    def tx(self) -> fr.Transform:
        return fr.ensemble(
            lambda threshold: fr.chain(
                fr.scale_by_adam(),
                fr.add_decayed_weights(DECAY),
                fr.scale_by_learning_rate(RATE),
                fr.soft_threshold(threshold),
            ),
            self.thresholds,
        )


def loop_row(problem: Problem, **kind: Any) -> Row:
    """A model and an optimizer for each member."""
    made = Problem(len(problem.models)).models  # Of the same seed, so that the others stay as they are.
    optimizers = [AdamW(model.parameters(), RATE, weight_decay=DECAY, **kind) for model in made]
    shrinks = [softshrink_loop(threshold) for threshold in problem.thresholds.tolist()]

    def call() -> None:
        for model, optimizer, shrink, x, y in zip(made, optimizers, shrinks, problem.x, problem.y, strict=True):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                shrink(list(model.parameters()), optimizer)

    def results() -> list[Tensor]:
        trees = [dict(model.named_parameters()) for model in made]
        return [torch.stack([tree[name].detach() for tree in trees]) for name in problem.params]

    return Row(call, results)


def stepped(params: Leaves, state: Any, whole: Callable[[Leaves, Any], Any]) -> Row:
    """A function from parameters and state to the next ones."""

    def call() -> None:
        nonlocal params, state
        params, state = whole(params, state)

    return Row(call, lambda: params.values())


def ways(problem: Problem) -> dict[str, Callable[[], Row]]:
    slopes = vmap(grad(problem.loss))
    compiled = torch.compile(slopes, fullgraph=True)
    x, y = problem.x, problem.y

    def fused(slopes: Any) -> Row:
        step = fr.fuse(problem.tx(), donate=True)
        return stepped(*step.init(problem.params), lambda params, state: step(params, slopes(params, x, y), state))

    def one_graph(donate: bool) -> Row:
        tx = problem.tx()

        @torch.compile(fullgraph=True)
        def whole(params: Leaves, state: Any, x: Tensor, y: Tensor) -> Any:
            updates, new = tx.update(slopes(params, x, y), state, params)
            after = fr.apply_updates(params, updates)
            if donate:
                fr.tree_map(Tensor.copy_, (params, state), (after, new))
                return params, state
            return after, new

        params = {name: w.clone() for name, w in problem.params.items()}
        return stepped(params, tx.init(params), lambda params, state: whole(params, state, x, y))

    def eager() -> Row:
        tx = problem.tx()

        def whole(params: Leaves, state: Any) -> Any:
            updates, new = tx.update(slopes(params, x, y), state, params)
            return fr.apply_updates(params, updates), new

        return stepped(problem.params, tx.init(problem.params), whole)

    return {
        "loop over members, `AdamW(fused=True)`, softshrink": lambda: loop_row(problem, fused=True),
        "`vmap(grad(loss))`, eager `ensemble`": eager,
        "`vmap(grad(loss))`, `fuse(ensemble)`": lambda: fused(slopes),
        "compiled `vmap(grad(loss))`, `fuse(ensemble)`": lambda: fused(compiled),
        "both in one `torch.compile`": lambda: one_graph(False),
        "both in one `torch.compile`, in place": lambda: one_graph(True),
    }


def main() -> None:
    options = start(__doc__)
    problem = Problem(4 if options.quick else MEMBERS)
    reference = loop_row(problem)
    for _ in range(STEPS):
        reference.once()
    expected = list(reference.results())
    result: dict[str, Any] = {}
    for name, way in ways(problem).items():

        def make(way: Callable[[], Row] = way) -> Row:
            row = way()
            for _ in range(STEPS):
                row.once()
            check_moved(row, expected, problem.params.values())
            return row

        result[name] = against(reference, make, options.quick)
        print(f"{name:52} {1e3 * result[name]['seconds']:8.3f} ms {1 / result[name]['ratio']:6.1f}x")
    report("ensemble", {"reference": REFERENCE, "rows": result}, options.write)


if __name__ == "__main__":
    main()
