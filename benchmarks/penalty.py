"""Value and gradient of a penalty on a small transformer; 1.00 is the loop of the articles and its backward pass.

python benchmarks/penalty.py --write
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from common import Leaves, Row, against, draw, report, shapes, start
from torch import Tensor
from torch.func import grad_and_value

import funcreg as fr

ALPHA, RHO = 0.3, 0.6
LOOP = "loop over parameters, backward"
PACKED = "`funcreg.value_and_grad(penalty)`, parameters of a fused step"
Pair = tuple[Leaves, Tensor]


def l1_loop(leaves: list[Tensor]) -> Tensor:
    return sum([w.abs().sum() for w in leaves], torch.zeros(()))


def elastic_loop(leaves: list[Tensor]) -> Tensor:
    squares = sum([w.pow(2).sum() for w in leaves], torch.zeros(()))
    return ALPHA * RHO * l1_loop(leaves) + ALPHA * (1 - RHO) / 2 * squares


class Case(NamedTuple):
    loop: Callable[[list[Tensor]], Tensor]
    penalty: fr.Penalty
    hyper: tuple[float, ...]
    term: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


PENALTIES = {
    "l1": Case(l1_loop, fr.l1, (), lambda w: w.abs(), lambda w: w.sign()),
    "elastic": Case(
        elastic_loop,
        fr.elastic,
        (ALPHA, RHO),
        lambda w: ALPHA * (RHO * w.abs() + (1 - RHO) / 2 * w * w),
        lambda w: ALPHA * (RHO * w.sign() + (1 - RHO) * w),
    ),
}


def backward_row(loop: Callable[[list[Tensor]], Tensor], params: Leaves) -> Row:
    leaves = [w.clone().requires_grad_() for w in params.values()]
    value = torch.zeros(())

    def call() -> None:
        nonlocal value
        for w in leaves:
            w.grad = None
        value = loop(leaves)
        value.backward()

    return Row(call, lambda: [value, *(w.grad for w in leaves if w.grad is not None)])


def pair_row(f: Callable[[Leaves], Pair], params: Leaves) -> Row:
    """A function from parameters to gradient and value."""
    made: list[Pair] = []

    def call() -> None:
        made.clear()  # A training loop lets go of the gradient of the last step, too.
        made.append(f(params))

    return Row(call, lambda: [made[0][1], *made[0][0].values()])


def ways(case: Case, slow: bool) -> dict[str, Callable[[Leaves], Pair]]:
    penalty, hyper = case.penalty, case.hyper
    value = lambda params: penalty(params, *hyper)
    both = lambda params: (penalty.grad(params, *hyper), penalty(params, *hyper))

    def direct(backend: str) -> Callable[[Leaves], Pair]:
        f = fr.value_and_grad(penalty, *hyper, backend=backend)

        def swapped(params: Leaves) -> Pair:
            value, slopes = f(params)
            return slopes, value

        return swapped

    found: dict[str, Callable[[Leaves], Pair]] = {
        "`funcreg.value_and_grad(penalty)`": direct("inductor"),
        PACKED: direct("inductor"),
        '`funcreg.value_and_grad(penalty, backend="eager")`': direct("eager"),
        "`torch.func.grad_and_value(penalty)`": grad_and_value(value),
        "`penalty(params)`, `penalty.grad(params)`": both,
    }
    if slow:  # A graph of 300 leaves compiles for minutes.
        found["`torch.func.grad_and_value(penalty)`, compiled"] = torch.compile(grad_and_value(value), fullgraph=True)
        found["`penalty(params)`, `penalty.grad(params)`, compiled"] = torch.compile(both, fullgraph=True)
    return found


def checked(row: Row, case: Case, params: Leaves) -> Row:
    """Assert that value and gradient are those of the formula in float64: to 1e-5 of the value, and to 1e-7."""
    row.once()
    value, *slopes = [x.detach().double() for x in row.results()]
    expected = sum([case.term(w.double()).sum() for w in params.values()])
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    for w, found in zip(params.values(), slopes, strict=True):
        torch.testing.assert_close(found, case.slope(w.double()), rtol=0, atol=1e-7)
    return row


def main() -> None:
    options = start(__doc__, "slow")
    params = draw(shapes("transformer", options.quick), 0)
    packed, _ = fr.fuse(fr.adamw(1e-3)).init(params)
    result: dict[str, Any] = {}
    for name, case in PENALTIES.items():
        reference = checked(backward_row(case.loop, params), case, params)
        for way, f in ways(case, options.slow).items():
            given = packed if way == PACKED else params
            make = lambda f=f, case=case, given=given: checked(pair_row(f, given), case, given)
            times = against(reference, make, options.quick)
            result.setdefault(way, {})[name] = times
            print(f"{name:8} {way:66} {1e3 * times['seconds']:8.3f} ms {times['ratio']:6.2f}")
    report("penalty", {"reference": LOOP, "rows": result}, options.write)


if __name__ == "__main__":
    main()
