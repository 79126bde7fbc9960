"""Pictures of weights, paths, sweeps and training: each function draws on axes and returns them.

matplotlib is imported when the first picture is drawn. No style is changed and nothing is shown: in a notebook the
picture appears by itself, in a script `axes.figure.savefig(...)` writes it, also without a screen.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcreg.core._typing import Mask, Params
from funcreg.core.masks import kept_by, mask_leaves
from funcreg.core.tree import tree_leaves, tree_map, tree_paths
from funcreg.core.wording import type_of
from funcreg.networks.families import Groups, grouped_matrices
from funcreg.reports.report import readable, say_same_memory

# One hue from dark to light for what has an order, one other for what stands out: also apart in gray, and for eyes that
# do not see red and green apart.
INK, GRAY, PALE = "#333333", "#767676", "#d9d9d9"
DARK, BLUE, LIGHT, ACCENT = "#08306b", "#2171b5", "#9ecae1", "#d95f02"
_SHADES = (DARK, BLUE, "#6baed6", LIGHT)
#: Lines with a name of their own; more are drawn without.
_NAMED = 10
#: What a row of a sweep has beside its hyperparameters.
_RESULTS = {
    *("seed", "loss", "score", "train_loss", "epoch", "epochs", "status", "loss_std", "score_std", "folds", "fold"),
    *("member", "rank", "steps"),
}


def _pyplot() -> Any:
    try:
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError(
            "funcreg.plot draws with matplotlib, which is not installed: pip install 'funcreg[plot]', or matplotlib"
        ) from error


def _axes(axes: Any, **options: Any) -> Any:
    """Axes as they are, or new ones, with what all pictures have in common."""
    if axes is None:
        _, axes = _pyplot().subplots(layout="constrained", **options)
    for each in _each(axes):
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=9, color=GRAY, labelcolor=INK)
        for label in (each.xaxis.label, each.yaxis.label):
            label.set(size=9.5, color=INK)
    return axes


def _each(axes: Any) -> list[Any]:
    """One or several axes as a list."""
    if isinstance(axes, (list, tuple)):
        return list(axes)
    return axes.flatten().tolist() if hasattr(axes, "flatten") else [axes]


def _numbers(x: Any) -> list[float]:
    return torch.as_tensor(x).detach().to("cpu", torch.float64).flatten().tolist()


# Weights


def _entries(params: Params, mask: Mask | None) -> Tensor:
    leaves = tree_leaves(kept_by(mask, params))
    parts = [w.abs() if w.is_complex() else w for w in leaves]
    return torch.cat([w.to("cpu", torch.float64).flatten() for w in parts])


def histograms(before: Params, after: Params, mask: Mask | None = None, *, bins: int = 61, axes: Any = None) -> Any:
    """Weights before and after training. Those that are exactly zero stand apart, as a line at 0 with their number.

    Args:
        before: Tree of tensors, or a module.
        after: The same later.
        mask: Leaves that are shown, such as `matrices`; by default all.
        bins: Number of bins.
        axes: matplotlib's axes; by default new ones.

    Example:
        >>> from funcreg import plot
        >>> axes = plot.histograms({"w": torch.randn(100)}, {"w": torch.zeros(100)})
        >>> axes.get_xlabel()
        'weight'
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins is {bins!r}; expected a number of at least 1")
    before, after = (readable("histograms", tree) for tree in (before, after))
    say_same_memory("histograms", before, after)
    first, second = (_entries(tree, mask) for tree in (before, after))
    both = torch.cat([first, second])
    both = both[both.isfinite()]
    limit = float(both.abs().amax()) if both.numel() and both.any() else 1.0
    edges = torch.linspace(-limit, limit, bins + 1, dtype=torch.float64).tolist()
    axes = _axes(axes, figsize=(6, 3.8))
    styles = {"color": PALE}, {"histtype": "step", "color": BLUE, "linewidth": 1.5}
    for what, x, style in zip(("before", "after"), (first, second), styles, strict=True):
        zeros = int((x == 0).sum())
        lost = int((~x.isfinite()).sum())
        told = [f"{100 * zeros / max(len(x), 1):.0f} % exactly zero"] if zeros else []
        told += [f"{lost} NaN or inf, not shown"] if lost else []
        axes.hist(
            x[(x != 0) & x.isfinite()].tolist(),
            edges,
            label=f"{what}: {', '.join(told)}" if told else what,
            **style,
        )
        if zeros:
            color = BLUE if what == "after" else GRAY
            axes.vlines(0, 0.5, zeros, color=color, linewidth=1.5)
            axes.plot([0], [zeros], "o", color=color, markersize=5)
    axes.set_yscale("log")
    most = max(1, axes.get_ylim()[1])
    axes.set_ylim(0.7, most * 4)  # With room for the legend.
    axes.set_xlabel("weight")
    axes.set_ylabel("number of weights")
    axes.legend(loc="upper left", fontsize=9, frameon=False)
    return axes


def channels(groups: Groups, params: Params, *, axes: Any = None) -> Any:
    """The norm of each channel, from the greatest to the least, for each family of groups; dead ones are counted.

    Args:
        groups: Families of groups; see `coupled` and `channel_groups`.
        params: Tree of tensors, or a module.
        axes: matplotlib's axes, one for each family; by default new ones. They are returned as a list.

    Example:
        >>> from funcreg import plot
        >>> axes = plot.channels({"w": 0}, {"w": torch.tensor([[3.0], [0.0], [1.0]])})
        >>> axes[0].get_title(loc="left")
        'w: 2 of 3 alive'
    """
    norms = [
        (names[0], torch.cat([w.to("cpu", torch.float64) for w in rows], 1).abs().square().sum(1).sqrt())
        for names, rows in grouped_matrices(groups, readable("channels", params))
    ]
    if axes is None:
        columns = min(len(norms), 4)
        lines = math.ceil(len(norms) / columns)
        size = {"figsize": (max(3.2 * columns, 4.5), 2.4 * lines), "squeeze": False}
        axes = _axes(None, nrows=lines, ncols=columns, **size)
    flat = _each(axes)
    if len(flat) < len(norms):
        raise ValueError(f"axes has {len(flat)} axes; expected {len(norms)}, one for each family of groups")
    for each, (name, values) in zip(_axes(flat), norms, strict=False):
        finite = values[values.isfinite()]
        alive, count, lost = int((finite > 0).sum()), len(values), len(values) - len(finite)
        heights = [*finite.sort(descending=True).values.tolist(), *[0.0] * lost]
        if count <= 20:
            each.bar(range(1, count + 1), heights, width=0.85, color=BLUE)
        else:  # Without gaps, which would be drawn as stripes.
            each.stairs(heights, [k + 0.5 for k in range(count + 1)], fill=True, color=BLUE)
        spans = ("dead", alive, count - lost, PALE), ("NaN or inf", count - lost, count, ACCENT)
        for word, first, last, color in spans:
            if first < last:
                each.axvspan(first + 0.5, last + 0.5, color=color, alpha=0.5 if color == PALE else 0.2, linewidth=0)
            if last - first >= count / 6:  # Where the word has room.
                place = {"transform": each.get_xaxis_transform(), "ha": "center", "va": "center"}
                each.text((first + last + 1) / 2, 0.5, word, color=GRAY, fontsize=9, **place)
        broken = f", {lost} NaN or inf" if lost else ""
        each.set_title(f"{name}: {alive} of {count} alive{broken}", fontsize=9, color=INK, loc="left")
        each.set_xlim(0.4, count + 0.6)
        each.xaxis.get_major_locator().set_params(integer=True)
        each.set_xlabel("channel, by norm")
        each.set_ylabel("norm")
    for each in flat[len(norms) :]:
        each.set_visible(False)
    return flat


# Strengths


def path(path: Any, names: Sequence[str] | None = None, mask: Mask | None = None, *, axes: Any = None) -> Any:
    """Every weight against the strength, from the strongest penalty on the left to the weakest.

    Weights are dark if they come in early. Above stands how many are not zero. Rings on the axis mark strengths that
    have not converged.

    Args:
        path: What `regularization_path` returned.
        names: A name for each weight that is shown; by default its leaf and place. They are
            written where at most ten weights are drawn: leave an intercept out with `mask`.
        mask: Leaves that are shown; by default all.
        axes: matplotlib's axes; by default new ones.

    Example:
        >>> from funcreg import plot
        >>> found = regularization_path(lambda w: (w - 1).square().sum() / 2, torch.zeros(2), l1, count=5)
        >>> plot.path(found).get_xlabel()
        'strength'
    """
    if not all([hasattr(path, name) for name in ("strengths", "params", "converged")]):
        raise TypeError(f"path is {type_of(path)}; expected what regularization_path returned")
    strengths = torch.as_tensor(path.strengths).detach().to("cpu", torch.float64)
    curves, places = _curves(path.params, len(strengths), mask)
    converged = torch.as_tensor(path.converged).detach().cpu().flatten()
    falling = strengths.argsort(descending=True, stable=True)  # They are in the order in which they were given.
    strengths, curves, converged = strengths[falling], curves[falling], converged[falling]
    if names is not None and len(names) != len(places):
        raise ValueError(f"names has {len(names)} entries; expected {len(places)}, one for each weight")
    shown = strengths > 0  # There is no 0 on a logarithmic scale.
    x, curves = strengths[shown], curves[shown]
    if not len(x):
        raise ValueError("path has no strength above 0, so that there is nothing to draw")
    axes = _axes(axes, figsize=(6.5, 4))
    axes.axhline(0, color=PALE, linewidth=0.8, zorder=0)
    alive = curves != 0
    entered = torch.where(alive.any(0), alive.int().argmax(0), len(x))
    order = entered.argsort(stable=True).tolist()
    few = len(order) <= _NAMED
    for place, k in enumerate(order):
        if not bool(alive[:, k].any()):
            continue
        shade = _SHADES[min(len(_SHADES) * place // len(order), len(_SHADES) - 1)]
        axes.plot(x.tolist(), curves[:, k].tolist(), color=shade, linewidth=1.4 if few else 0.8, **_marked(len(x)))
    axes.set_xscale("log")
    first, last = float(x.max()), float(x.min())
    axes.set_xlim((first * 1.02, last / 1.02) if first > last else (first * 2, last / 2))
    axes.set_xlabel("strength")
    axes.set_ylabel("weight")
    if few:
        written = list(names or places)
        ends = {written[k]: float(curves[-1, k]) for k in order if bool(alive[:, k].any())}
        _label_ends(axes, ends)
    bad = ~converged[shown]
    if bool(bad.any()):
        ring = {"markerfacecolor": "none", "transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 5}
        axes.plot(x[bad].tolist(), [0.0] * int(bad.sum()), "o", color=ACCENT, label="not converged", **ring)
        axes.legend(loc="upper left", fontsize=9, frameon=False)
    _count_above(axes, x, alive.sum(1))
    return axes


def _marked(points: int) -> dict[str, Any]:
    """What shows a line of a single point."""
    return {"marker": "o", "markersize": 4} if points == 1 else {}


def _curves(params: Params, count: int, mask: Mask | None) -> tuple[Tensor, list[str]]:
    """Entries of stacked parameters as columns, and their names."""
    params = readable("path", params)
    one = [True] * len(tree_leaves(params))
    if mask is not None:  # Made for one member.
        one = mask_leaves(mask, tree_map(lambda w: w[0], params))
    columns, names = [], []
    for name, w, chosen in zip(tree_paths(params), tree_leaves(params), one, strict=True):
        if not w.ndim or len(w) != count:
            raise ValueError(
                f"leaf '{name}' has shape {tuple(w.shape)}; expected ({count}, ...), one entry a strength, as "
                "regularization_path returns them"
            )
        if chosen:
            columns.append(w.to("cpu", torch.float64).reshape(count, -1))
            places = [list(map(int, place)) for place in torch.ones(w.shape[1:]).nonzero()]
            names += [name + (str(place) if place else "") for place in places]
    return torch.cat(columns, 1), names


def _label_ends(axes: Any, ends: Mapping[str, float]) -> None:
    """Names at the right ends of lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height * 72 / axes.figure.dpi
    gap = 11 * (high - low) / max(height, 1.0)
    names = sorted(ends, key=lambda name: ends[name])
    spots = [ends[name] for name in names]
    for _ in range(200):  # Neighbours that are too close push each other away.
        for i in range(len(spots) - 1):
            near = gap - (spots[i + 1] - spots[i])
            if near > 1e-9 * gap:
                spots[i], spots[i + 1] = spots[i] - near / 2, spots[i + 1] + near / 2
    for name, spot in zip(names, spots, strict=True):
        axes.annotate(name, (1, spot), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
                      va="center", fontsize=8, color=INK, annotation_clip=False)  # fmt: skip


def _count_above(axes: Any, strengths: Tensor, counts: Tensor) -> None:
    """Numbers of weights that are not zero, above a path."""
    places = sorted({round(i * (len(strengths) - 1) / 5) for i in range(6)})
    above = axes.secondary_xaxis("top")
    above.set_xscale("log")
    above.set_xticks([float(strengths[i]) for i in places], [str(int(counts[i])) for i in places], fontsize=8)
    above.set_xticks([], minor=True)
    above.tick_params(length=0, labelcolor=GRAY)
    above.spines["top"].set_visible(False)
    above.set_xlabel("weights that are not zero", fontsize=8, color=GRAY)


def sweep(sweep: Any, x: str | None = None, y: str | None = None, *, axes: Any = None) -> Any:
    """The score of each row of a sweep against one of its hyperparameters, with a line through the best of each value.

    The best row has a ring, rows that diverged a cross at the top. Rows that differ in a second hyperparameter of few
    values have a line for each of these.

    Args:
        sweep: What `sweep` returned, or a list of rows, dicts of hyperparameters and scores.
        x: The hyperparameter; by default the first number that differs.
        y: What is drawn: by default `"score"`, the more the better, if rows have one, else `"loss"`.
        axes: matplotlib's axes; by default new ones.

    Example:
        >>> from funcreg import plot
        >>> rows = [{"strength": 0.1, "loss": 2.0}, {"strength": 0.01, "loss": 1.0}]
        >>> axes = plot.sweep(rows)
        >>> axes.get_xlabel(), axes.get_ylabel()
        ('strength', 'loss')
    """
    rows, x, y = _told(sweep, x, y)
    few = {name: values for name, values in _varied(rows, y).items() if name != x and len(values) <= len(_SHADES)}
    by, kinds = next(iter(few.items()), (None, [None]))
    good = [row for row in rows if math.isfinite(row[y]) and row.get("status") != "diverged"]
    gone = [float(row[x]) for row in rows if row not in good]
    if not good:
        raise ValueError(f"all rows diverged or have no finite {y!r}, so that there is nothing to draw")
    axes = _axes(axes, figsize=(6, 3.8))
    best_of = max if y == "score" else min
    for color, kind in zip(_SHADES, kinds, strict=False):
        points = [(float(row[x]), float(row[y])) for row in good if by is None or row.get(by) == kind]
        line = [(at, best_of(value for where, value in points if where == at)) for at in sorted(dict(points))]
        axes.plot(*_columns(points), "o", color=color, markersize=4, alpha=0.6, markeredgewidth=0)
        axes.plot(*_columns(line), color=color, linewidth=1.4, label=by and f"{by} = {_text(kind)}")
    best = best_of(good, key=lambda row: row[y])
    label = f"best: {x} = {_text(best[x])}, {y} = {_text(best[y])}"
    ring = {"markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.6}
    axes.plot([best[x]], [best[y]], "o", color=ACCENT, label=label, **ring)
    if gone:
        top = axes.get_xaxis_transform()  # They have no number to stand at.
        axes.plot(gone, [0.98] * len(gone), "x", color=GRAY, markersize=5, transform=top, label="diverged")
    places = sorted(float(row[x]) for row in rows)
    if places[0] > 0 and places[-1] >= 20 * places[0]:
        axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.margins(y=0.1)
    axes.legend(loc="best", fontsize=9, frameon=False)
    return axes


def _told(sweep: Any, x: str | None, y: str | None) -> tuple[list[Mapping[str, Any]], str, str]:
    """Rows, and which of their columns are drawn."""
    rows = list(getattr(sweep, "rows", sweep))
    if not rows or not all([isinstance(row, Mapping) for row in rows]):
        raise TypeError(f"sweep is {sweep!r}; expected what has rows, dicts of hyperparameters and scores")
    y = y or ("score" if "score" in rows[0] else "loss")
    if any([y not in row for row in rows]):
        raise ValueError(f"rows have no {y!r}; they have {', '.join(map(str, rows[0]))}")
    varied = _varied(rows, y)
    numbers = [name for name, values in varied.items() if all(map(_is_number, values))]
    if not x and not numbers:
        raise ValueError("rows differ in no hyperparameter that is a number, and so there is nothing to draw along")
    x = x or numbers[0]
    if any([not _is_number(row.get(x)) for row in rows]):
        raise ValueError(f"x is {x!r}; expected a hyperparameter that is a number and differs: {', '.join(varied)}")
    return rows, x, y


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [at for at, _ in points], [value for _, value in points]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return f"{value:.3g}" if _is_number(value) else getattr(value, "__name__", None) or str(value)


def _varied(rows: Sequence[Mapping[str, Any]], y: str) -> dict[str, list[Any]]:
    """Hyperparameters that differ between rows, with their values in order."""
    found: dict[str, list[Any]] = {}
    for name in rows[0]:
        if name in _RESULTS or name == y:
            continue
        values = list(dict.fromkeys(row.get(name) for row in rows if row.get(name).__hash__ is not None))
        if len(values) > 1:
            found[name] = sorted(values) if all(map(_is_number, values)) else values
    return found


# Training


def sparsity(history: Any, steps: Sequence[float] | None = None, *, axes: Any = None) -> Any:
    """Shares of exact zeros while training goes on.

    Args:
        history: Shares from 0 to 1 such as those of `funcreg.sparsity`, one for each time: a sequence of numbers, or
            of dicts from names to numbers; or a dict from names to sequences.
        steps: When they were measured; by default 0, 1, 2, ...
        axes: matplotlib's axes; by default new ones.

    Example:
        >>> from funcreg import plot
        >>> plot.sparsity({"l1": [0.0, 0.3, 0.5], "l0": [0.0, 0.1, 0.2]}, steps=[0, 100, 200]).get_ylabel()
        'weights that are exactly zero'
    """
    lines = _lines(history)
    axes = _axes(axes, figsize=(6, 3.8))
    ends: dict[str, float] = {}
    for i, (name, values) in enumerate(lines.items()):
        at = list(range(len(values))) if steps is None else _numbers(steps)
        if len(at) != len(values):
            raise ValueError(f"history{f' of {name!r}' if name else ''} has {len(values)} entries, steps {len(at)}")
        axes.plot(
            at, [100 * value for value in values], color=_SHADES[i % len(_SHADES)], linewidth=1.5, **_marked(len(at))
        )
        ends[str(name)] = 100 * values[-1]
    axes.set_ylim(-2, 102)
    axes.margins(x=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axes.set_xlabel("step")
    axes.set_ylabel("weights that are exactly zero")
    if list(ends) != [""]:
        _label_ends(axes, ends)
    return axes


def _lines(history: Any) -> dict[str, list[float]]:
    if not isinstance(history, Mapping):
        history = list(history)
        if not history:
            raise ValueError("history is empty; expected at least one number")
        if all([isinstance(each, Mapping) for each in history]):
            unlike = next((each for each in history if each.keys() != history[0].keys()), None)
            if unlike is not None:
                raise ValueError(f"history has {sorted(unlike)} at one time, and {sorted(history[0])} at the first")
            history = {name: [each[name] for each in history] for name in history[0]}
        else:
            history = {"": history}
    lines = {name: [_share(value) for value in values] for name, values in history.items()}
    if not lines or not all(lines.values()):
        raise ValueError("history has no numbers; expected at least one")
    outside = [value for values in lines.values() for value in values if not 0 <= value <= 1]
    if outside:
        raise ValueError(f"history has the entry {outside[0]}; expected shares from 0 to 1. Are these per cent?")
    return lines


def _share(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
        raise TypeError(
            f"history has the entry {came}; expected numbers, one a time. Of several, give a dict of lists"
        ) from error
