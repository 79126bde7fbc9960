"""Whole training steps of a small transformer with L1: what a user feels.

All rows see the same batch and make the same steps: AdamW on the gradient of the loss plus that of the penalty. The
articles add a loop over parameters to the loss; a chain adds the gradient in the step.

    python benchmarks/training.py --write
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import DECAY, RATE, STEPS, Leaves, Row, against, check_moved, lists, report, start
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.optim import AdamW

import funcreg as fr

STRENGTH = 1e-4
REFERENCE = "loss + loop of L1, backward, `AdamW`"


class Block(nn.Module):
    """Attention, then a small network on each token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attend(self.norm_attention(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.join(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.network(self.norm_network(x))


class Problem:
    """A transformer that tells the next of 256 tokens, and a batch."""

    def __init__(self, quick: bool) -> None:
        width, layers, self.quick = (32, 1, quick) if quick else (128, 6, quick)
        torch.manual_seed(0)
        body = [Block(width) for _ in range(layers)]
        self.model = nn.Sequential(nn.Embedding(256, width), *body, nn.LayerNorm(width), nn.Linear(width, 256))
        self.tokens, self.after = torch.randint(256, (8, 32)), torch.randint(256, (8 * 32,))

    def of(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), self.after)

    def loss(self, params: Leaves) -> Tensor:
        return self.of(functional_call(self.model, params, (self.tokens,)))

    def params(self) -> Leaves:
        return {name: w.detach().clone() for name, w in self.model.named_parameters()}


def tx() -> fr.Transform:
    return fr.chain(fr.add_penalty(fr.l1, strength=STRENGTH), fr.adamw(RATE, weight_decay=DECAY))


def ordinary(quick: bool, penalized: bool = True, compiled: bool = False, **kind: Any) -> Row:
    """The loop of the articles, on a model of its own."""
    problem = Problem(quick)
    model, leaves = problem.model, list(problem.model.parameters())
    run = torch.compile(model) if compiled else model
    optimizer = AdamW(leaves, RATE, weight_decay=DECAY, **kind)

    def call() -> None:
        optimizer.zero_grad()
        loss = problem.of(run(problem.tokens))
        if penalized:
            loss = loss + STRENGTH * sum([w.abs().sum() for w in leaves], torch.zeros(()))
        loss.backward()
        optimizer.step()

    return Row(call, lambda: leaves)


def functional(quick: bool, compiled: bool = False) -> Row:
    """Gradients of `torch.func` into the fused step."""
    problem = Problem(quick)
    slope = torch.compile(grad(problem.loss), fullgraph=True) if compiled else grad(problem.loss)
    step = fr.fuse(tx(), donate=True)
    params, state = step.init(problem.params())

    def call() -> None:
        nonlocal params, state
        params, state = step(params, slope(params), state)

    return Row(call, lambda: params.values())


def one_graph(quick: bool) -> Row:
    """Gradient and update in one graph of the user's own."""
    problem, chain = Problem(quick), tx()

    @torch.compile(fullgraph=True)
    def whole(params: Leaves, state: Any) -> Any:
        updates, state = chain.update(grad(problem.loss)(params), state, params)
        return fr.apply_updates(params, updates), state

    params = problem.params()
    state = chain.init(params)

    def call() -> None:
        nonlocal params, state
        params, state = whole(params, state)

    return Row(call, lambda: params.values())


def module(quick: bool, compiled: bool = False) -> Row:
    """A module whose parameters are those of the step, and whose `backward` writes where the step reads."""
    problem = Problem(quick)
    step = fr.fuse(tx(), donate=True)
    params, state = step.init(dict(problem.model.named_parameters()))
    slopes = step.gradients(params)
    for name, w in problem.model.named_parameters():
        w.data, w.grad = params[name], slopes[name]
    buffers = list(slopes.values())
    run = torch.compile(problem.model) if compiled else problem.model

    def call() -> None:
        nonlocal params, state
        lists._foreach_zero_(buffers)
        problem.of(run(problem.tokens)).backward()
        params, state = step(params, slopes, state)

    return Row(call, problem.model.parameters)


WAYS: dict[str, Callable[[bool], Row]] = {
    "loss + loop of L1, backward, `AdamW(fused=True)`": lambda quick: ordinary(quick, fused=True),
    "without L1: backward, `AdamW(fused=True)`": lambda quick: ordinary(quick, penalized=False, fused=True),
    "`torch.func.grad`, fused step": functional,
    "module, backward into `step.gradients`, fused step": module,
    "compiled model, loss + loop of L1, `AdamW(fused=True)`": lambda quick: ordinary(quick, compiled=True, fused=True),
    "compiled `torch.func.grad`, fused step": lambda quick: functional(quick, compiled=True),
    "compiled module, backward into `step.gradients`, fused step": lambda quick: module(quick, compiled=True),
    "gradient and update in one `torch.compile`": one_graph,
}


def main() -> None:
    options = start(__doc__)
    began = list(Problem(options.quick).params().values())
    reference = ordinary(options.quick)
    for _ in range(STEPS):
        reference.once()
    expected = [w.detach().clone() for w in reference.results()]
    result: dict[str, Any] = {}
    for name, way in WAYS.items():

        def make(name: str = name, way: Callable[[bool], Row] = way) -> Row:
            row = way(options.quick)
            for _ in range(STEPS):
                row.once()
            if "without" not in name:
                check_moved(row, expected, began)
            return row

        result[name] = against(reference, make, options.quick)
        print(f"{name:60} {1 / result[name]['seconds']:8.1f} steps/s {1 / result[name]['ratio']:6.2f}x")
    report("training", {"reference": REFERENCE, "rows": result}, options.write)


if __name__ == "__main__":
    main()
