"""Pictures of the penalties: what their proximal operators do to a weight, and where their values are at most 1.

Everything is drawn from the functions of the library, mapped over a grid, for every penalty that it has.

    python examples/gallery.py
    python examples/gallery.py --points 41
"""

import argparse
import inspect
import math
from typing import Any

import matplotlib
import torch
from catalogue import arguments, of_matrices, penalties
from PIL import Image
from torch import Tensor
from torch.func import vmap

import funcreg as fr

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # After the choice of a backend that needs no screen.

#: Steps with a color and a width, so that a curve shows beside those over it.
STEPS = {2.0: ("#08306b", 2.0), 1.0: ("#4292c6", 1.4), 0.5: ("#9ecae1", 0.8)}
COLUMNS = 9
INK, PAPER = "#333333", "#c6dbef"

#: Hyperparameters that show a shape between -3 and 3.
ON_A_LINE = {
    "rho": 0.5, "strength": 1.0, "gamma": 1.5, "a": 2.5, "epsilon": 0.5, "anchor": 1.0, "radius": 1.5, "upper": 2.0,
}  # fmt: skip
#: And those of two weights, some with a number for each.
IN_THE_PLANE = {
    "rho": 0.5, "strength": 0.9, "gamma": 2.6, "a": 2.5, "epsilon": 0.5, "threshold": 0.75, "beta": 1.0, "anchor": 0.5,
    "fisher": torch.tensor([[4.0, 16.0]]), "weights": torch.tensor([[1.0, 0.5]]), "groups": ((0, (1,)),),
}  # fmt: skip


def landings(penalty: fr.Penalty, w: Tensor) -> list[Tensor]:
    """Where the proximal operator takes each weight, for each step, with a gap in the curve where it jumps."""
    hyper, options = arguments(penalty, **ON_A_LINE)
    found = vmap(lambda step: penalty.prox(w, step, *hyper, **options))(torch.tensor(list(STEPS)).to(w))
    # No curve is as steep as that.
    jumps = torch.nn.functional.pad(found.diff().abs() > 20 * w.diff().amax(), (0, 1))
    return list(torch.where(jumps, math.nan, found))


def values(penalty: fr.Penalty, x: Tensor, y: Tensor) -> Tensor:
    """The value for all pairs of two weights: of a row, of a column if groups are indices, or singular values."""
    hyper, options = arguments(penalty, **IN_THE_PLANE)

    def value(x: Tensor, y: Tensor) -> Tensor:
        w = torch.stack([x, y])
        if of_matrices(penalty):
            return penalty(torch.diag_embed(w), *hyper, **options)
        return penalty(w if "groups" in options else w.unsqueeze(0), *hyper, **options)

    return vmap(vmap(value, (0, None)), (None, 0))(x, y)


def name(axes: Any, penalty: fr.Penalty, given: dict[str, Any]) -> None:
    """The name of a penalty over its picture, and its hyperparameters in small below."""
    names = list(inspect.signature(penalty).parameters)[1:]
    hyper = zip(names, arguments(penalty, **given)[0], strict=False)
    text = ", ".join(f"{name} {value:g}" for name, value in hyper if isinstance(value, (int, float)))
    if of_matrices(penalty):
        text = "of singular values"
    axes.set_title(penalty.__name__, fontsize=8, color=INK, pad=13)
    axes.text(0.5, 1.04, text, fontsize=6, color="gray", ha="center", transform=axes.transAxes)


def panels(figure: Any, count: int, title: str, limit: float) -> list[Any]:
    """Square pictures in rows, without frames; the first has a scale."""
    rows = math.ceil(count / COLUMNS)
    figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=10, color=INK)
    drawn = figure.subplots(rows, COLUMNS, squeeze=False).flatten().tolist()
    for axes in drawn:
        axes.set(xticks=[], yticks=[], aspect="equal", frame_on=False)
        axes.set_visible(False)
    for axes in drawn[:count]:
        axes.set_visible(True)
        axes.axhline(0, color="lightgray", linewidth=0.6, zorder=0)
        axes.axvline(0, color="lightgray", linewidth=0.6, zorder=0)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit))
    ticks = [-int(limit), 0, int(limit)]
    drawn[0].set(xticks=ticks, yticks=ticks)
    drawn[0].tick_params(labelsize=6, labelcolor="gray", color="lightgray", length=2)
    return drawn[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description="pictures of all penalties")
    parser.add_argument("--points", type=int, default=301, help="points of a grid along each side")
    parser.add_argument("--out", default="gallery.png", help="where the picture goes")
    options = parser.parse_args()

    line = torch.linspace(-3, 3, 10 * options.points, dtype=torch.float64)
    curves = [penalty for penalty in penalties() if penalty.separable]
    curves.sort(key=lambda penalty: hasattr(penalty, "project"))  # Constraints come last.

    # One of them is exactly 0, for penalties that count zeros.
    side = torch.arange(-(options.points // 2), options.points // 2 + 1).double()
    side = 1.6 * side / side[-1]
    grids = {p: values(p, side, side) for p in penalties() if not hasattr(p, "project")}
    # Not those that two weights alone do not change.
    grids = {penalty: grid for penalty, grid in grids.items() if (grid <= 1).any() and not (grid <= 1).all()}

    rows = [math.ceil(len(shown) / COLUMNS) for shown in (curves, grids)]
    figure = plt.figure(figsize=(11.5, 1.55 * sum(rows) + 0.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=rows)
    above, below = parts

    title = "What the proximal operator makes of a weight (gray), with step 0.5, 1 and 2: the greater, the darker"
    for axes, penalty in zip(panels(above, len(curves), title, 3.1), curves, strict=True):
        axes.plot(line, line, color="lightgray", linewidth=0.6)
        for landed, (color, width) in zip(landings(penalty, line), STEPS.values(), strict=True):
            axes.plot(line, landed, color=color, linewidth=width)
        name(axes, penalty, ON_A_LINE)

    title = "Where the penalty of two weights in a row, or of two singular values, is at most 1"
    for axes, (penalty, grid) in zip(panels(below, len(grids), title, 1.6), grids.items(), strict=True):
        axes.contourf(side, side, grid, [-1, 1], colors=[PAPER])
        axes.contour(side, side, grid, [1 + 1e-9], colors=["#08306b"], linewidths=1)
        name(axes, penalty, IN_THE_PLANE)

    figure.savefig(options.out, dpi=110)
    # A palette of few colors takes a third of the space.
    Image.open(options.out).convert("RGB").quantize(32).save(options.out, optimize=True)
    print(f"{len(curves)} curves and {len(grids)} balls in {options.out}")


if __name__ == "__main__":
    main()
