"""One donating step of other chains, each against its twin in torch: an optimizer, or what users write in a loop.

    python benchmarks/chains.py --write

Results are equal to the twin's, but for NAdam, which is another algorithm in torch; that chain is compared with its
formula. Gradients are the same at every step, so that AMSGrad, too, agrees with torch's.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from common import (
    DECAY,
    RATE,
    STEPS,
    Leaves,
    Row,
    against,
    check,
    draw,
    fused_row,
    report,
    shapes,
    softshrink_loop,
    start,
    torch_row,
)
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop

import funcreg as fr

STRENGTH = 1e-3


def adam_direction(w: Any, m: Tensor, v: Tensor, n: int, eps: float) -> Tensor:
    m.mul_(0.9).add_(w.grad, alpha=0.1)
    v.mul_(0.999).addcmul_(w.grad, w.grad, value=0.001)
    return m / (1 - 0.9**n) / ((v / (1 - 0.999**n)).sqrt() + eps)


class Loop(abc.ABC):
    """An optimizer that torch has not, as users write it: one leaf after the other."""

    def __init__(self, leaves: list[Tensor]) -> None:
        self.leaves, self.steps = leaves, 0
        self.m, self.v = [[torch.zeros_like(w) for w in leaves] for _ in range(2)]

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for leaf in zip(self.leaves, self.m, self.v, strict=True):
            self.one(*leaf)

    @abc.abstractmethod
    def one(self, w: Any, m: Tensor, v: Tensor) -> None:
        """Step one parameter, with its moments."""


class Lion(Loop):
    def one(self, w: Any, m: Tensor, v: Tensor) -> None:
        w.mul_(1 - RATE * DECAY)
        w.add_(m.mul(0.9).add_(w.grad, alpha=0.1).sign_(), alpha=-RATE)
        m.mul_(0.99).add_(w.grad, alpha=0.01)


class Lamb(Loop):
    def one(self, w: Any, m: Tensor, v: Tensor) -> None:
        u = adam_direction(w, m, v, self.steps, 1e-6).add_(w, alpha=DECAY)
        w.sub_(RATE * w.norm() / u.norm() * u)


def proximal(act: Callable[[Any, Tensor], Tensor]) -> Callable[[list[Any], Any], None]:
    """A loop after Adam's step, with its metric."""

    def after(leaves: list[Any], optimizer: Any) -> None:
        for w in leaves:
            state = optimizer.state[w]
            w.copy_(act(w, (state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))).sqrt() + 1e-8))

    return after


def shrink(w: Any, metric: Tensor) -> Tensor:
    threshold = RATE * STRENGTH / metric
    return w - w.clamp(-threshold, threshold)


def shrink_rows(w: Any, metric: Tensor) -> Tensor:
    return fr.group_lasso.prox(w.detach(), RATE * STRENGTH, metric=metric)


def nadamw_by_hand(params: Leaves, grads: Leaves) -> Iterable[Tensor]:
    for w, g in zip(params.values(), grads.values(), strict=True):
        w, g = w.double(), g.double()
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for n in range(1, STEPS + 1):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            ahead = 0.9 * m / (1 - 0.9 ** (n + 1)) + 0.1 * g / (1 - 0.9**n)
            w = w - RATE * (ahead / ((v / (1 - 0.999**n)).sqrt() + 1e-8) + DECAY * w)
        yield w


def groups(leaves: list[Tensor]) -> list[dict[str, Any]]:
    matrices, others = [w for w in leaves if w.ndim > 1], [w for w in leaves if w.ndim < 2]
    return [{"params": matrices, "lr": RATE}, {"params": others, "lr": 10 * RATE}]


def kinds(params: Leaves) -> dict[str, str]:
    return {name: "matrix" if w.ndim > 1 else "other" for name, w in params.items()}


class Case(NamedTuple):
    tx: fr.Transform
    twin: str
    make: Callable[[list[Tensor]], Any]
    around: Mapping[str, Any] = MappingProxyType({})  # What the twin does before and after its step.
    formula: Callable[[Leaves, Leaves], Iterable[Tensor]] | None = None  # By default, the twin is equal.
    tolerance: float = 1e-7


_adamw = functools.partial(AdamW, lr=RATE, weight_decay=DECAY, fused=True)
_ours = functools.partial(fr.adamw, weight_decay=DECAY)
_clip = {"before": lambda leaves: clip_grad_norm_(leaves, 1.0, foreach=True), "fresh": True}
CASES = {
    "`sgd`, momentum": Case(fr.sgd(RATE, 0.9), "SGD fused", lambda p: SGD(p, RATE, 0.9, fused=True)),
    "`adam`": Case(fr.adam(RATE), "Adam fused", lambda p: Adam(p, RATE, fused=True)),
    "`adam`, coupled decay": Case(
        fr.chain(fr.add_decayed_weights(DECAY), fr.adam(RATE)),
        "Adam fused, weight_decay",
        lambda p: Adam(p, RATE, weight_decay=DECAY, fused=True),
        tolerance=1e-5,  # Where gradient and decay cancel, Adam enlarges the rounding of their sum.
    ),
    "`amsgrad`": Case(fr.amsgrad(RATE), "Adam fused, amsgrad", lambda p: Adam(p, RATE, amsgrad=True, fused=True)),
    "`nadamw`": Case(
        fr.nadamw(RATE, weight_decay=DECAY),
        "NAdam foreach",
        lambda p: NAdam(p, RATE, weight_decay=DECAY, decoupled_weight_decay=True, foreach=True),
        formula=nadamw_by_hand,
    ),
    "`rmsprop`": Case(
        fr.rmsprop(RATE, 0.99, eps_in_sqrt=False), "RMSprop foreach", lambda p: RMSprop(p, RATE, foreach=True)
    ),
    "`adagrad`": Case(
        fr.adagrad(RATE, eps=0.0),
        "Adagrad fused",
        lambda p: Adagrad(p, RATE, initial_accumulator_value=0.1, eps=0.0, fused=True),
    ),
    "`lion`": Case(fr.lion(RATE, weight_decay=DECAY), "loop", Lion),
    "`lamb`": Case(fr.lamb(RATE, weight_decay=DECAY), "loop", Lamb),
    "`clip_by_global_norm`, `adamw`": Case(
        fr.chain(fr.clip_by_global_norm(1.0, eps=1e-6), _ours(RATE)),
        "clip_grad_norm_ foreach, AdamW fused",
        _adamw,
        _clip,
    ),
    "`partition`, two rates": Case(
        fr.partition({"matrix": _ours(RATE), "other": _ours(10 * RATE)}, kinds),
        "AdamW fused, two groups",
        lambda p: _adamw(groups(p)),
    ),
    "`prox_sgd(l1)`, momentum": Case(
        fr.prox_sgd(RATE, fr.l1, strength=STRENGTH, momentum=0.9),
        "SGD fused, softshrink loop",
        lambda p: SGD(p, RATE, 0.9, fused=True),
        {"after": softshrink_loop(RATE * STRENGTH / (1 - 0.9))},
    ),
    "`prox_adam(l1)`": Case(
        fr.prox_adam(RATE, fr.l1, strength=STRENGTH, weight_decay=DECAY),
        "AdamW fused, loop",
        _adamw,
        {"after": proximal(shrink)},
    ),
    "`prox_adam(group_lasso)`": Case(
        fr.prox_adam(RATE, fr.group_lasso, strength=STRENGTH, weight_decay=DECAY),
        "AdamW fused, loop of `group_lasso.prox`",
        _adamw,
        {"after": proximal(shrink_rows)},
    ),
}


def main() -> None:
    options = start(__doc__)
    sizes = shapes("transformer", options.quick)
    params, grads = draw(sizes, 0), draw(sizes, 1)
    result = {}
    for name, case in CASES.items():
        twin = torch_row(case.make, params, grads, **case.around)
        for _ in range(STEPS):
            twin.once()

        def make(case: Case = case, twin: Row = twin) -> Row:
            row = fused_row(case.tx, params, grads)
            expected = case.formula(params, grads) if case.formula else twin.results()
            check(row, expected, tolerance=case.tolerance)
            return row

        result[name] = {"twin": case.twin, **against(twin, make, options.quick)}
        print(f"{name:40} {1e3 * result[name]['seconds']:8.3f} ms {result[name]['ratio']:6.2f}")
    report("chains", {"rows": result}, options.write)


if __name__ == "__main__":
    main()
