"""Results as text: one line for each, and a short table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from funcreg.core.masks import listed
from funcreg.core.tree import tree_leaves, tree_paths
from funcreg.core.undocumented import is_traced, is_transformed

#: Rows of a table of many.
_SHOWN = 12


def table(cells: Sequence[Sequence[str]]) -> str:
    """Rows of texts, the header first, in columns that end at the right.

    Example:
        >>> print(table([["strength", "loss"], ["0.5", "12.25"]]))
        strength   loss
             0.5  12.25
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    notes = not cells[0][-1]  # A last column without a header holds words.
    place = lambda k, cell: cell.ljust(widths[k]) if notes and k == len(widths) - 1 else cell.rjust(widths[k])
    return "\n".join("  ".join(place(k, cell) for k, cell in enumerate(row)).rstrip() for row in cells)


def _spread(count: int, *others: int) -> list[int]:
    """Indices from the first to the last, some of them if there are many, with others that must be there."""
    if count <= _SHOWN + len(others):
        return list(range(count))
    return sorted({round(k * (count - 1) / (_SHOWN - 1)) for k in range(_SHOWN)} | set(others))


def _readable(tensors: Iterable[Any]) -> bool:
    plain = all([isinstance(x, Tensor) and x.device.type != "meta" for x in tensors])
    return plain and not is_traced() and not is_transformed(lambda: list(tensors))


def _shapes(result: Any) -> str:
    """A result without numbers: inside of `vmap`, or of something else than tensors."""
    said = [
        f"{name}: {tuple(x.shape)}"
        for name, x in zip(tree_paths(result), tree_leaves(result), strict=True)
        if isinstance(x, Tensor)
    ]
    return f"{type(result).__name__}(shapes {listed(said)})"


def _converged(converged: Tensor, what: str) -> str:
    count, done = converged.numel(), int(converged.sum())
    return f"all {what} converged" if done == count else f"only {done} of {count} {what} converged"


def _counted(steps: int) -> str:
    return f"{steps} step" if steps == 1 else f"{steps} steps"


# Solutions


def solution_line(found: Any) -> str:
    """A `Solution`, or one for each of some members, in a line."""
    if not _readable(tree_leaves(tuple(found))):
        return _shapes(found)
    residual, steps = found.residual, found.steps
    if residual.ndim:
        least, most = int(steps.amin()), int(steps.amax())
        done = _converged(found.converged, "members")
        return f"Solution({done}, residuals of at most {float(residual.amax()):.1e}, {least} to {_counted(most)})"
    leaves = tree_leaves(found.params)
    entries = sum(w.numel() for w in leaves)
    alive = sum(int((w != 0).sum()) for w in leaves)
    done = f"{'converged' if bool(found.converged) else 'NOT converged'} in {_counted(int(steps))}"
    return f"Solution({done}, residual {float(residual):.1e}, {alive} of {entries} entries not zero)"


def solution_text(found: Any) -> str:
    """A `Solution` with a row for each of its leaves."""
    leaves = tree_leaves(found.params)
    if not _readable(tree_leaves(tuple(found))) or found.residual.ndim or not leaves:
        return solution_line(found)
    rows = [["", "shape", "not zero", "least", "greatest"]]
    for name, w in list(zip(tree_paths(found.params), leaves, strict=True))[:_SHOWN]:
        ends = [f"{float(x):.4g}" for x in (w.amin(), w.amax())] if w.numel() else ["", ""]
        rows.append([name or "params", _shape(w), f"{int((w != 0).sum())} of {w.numel()}", *ends])
    rest = f"\n... {len(leaves) - _SHOWN} more leaves" if len(leaves) > _SHOWN else ""
    return f"{solution_line(found)}\n{table(rows)}{rest}"


def _shape(w: Tensor) -> str:
    return " x ".join(map(str, w.shape)) or "number"


# Paths


def path_line(path: Any) -> str:
    """A `Path` in a line."""
    if not _readable(tree_leaves(tuple(path))) or path.strengths.ndim != 1:
        return _shapes(path)
    ends = f"{float(path.strengths.amax()):.4g} to {float(path.strengths.amin()):.4g}"
    residuals = f"residuals of at most {float(path.residuals.amax()):.1e}"
    return f"Path({len(path.strengths)} strengths from {ends}, {_converged(path.converged, 'fits')}, {residuals})"


def path_text(path: Any) -> str:
    """A `Path` with a row for some of its strengths."""
    if not _readable(tree_leaves(tuple(path))) or path.strengths.ndim != 1:
        return path_line(path)
    rows = [["strength", "loss", "zeros", "residual", "steps", ""]]
    for k in _spread(len(path.strengths)):
        numbers = [f"{float(x[k]):.4g}" for x in (path.strengths, path.losses)]
        done = "" if bool(path.converged[k]) else "NOT converged"
        zeros = f"{100 * float(path.sparsity[k]):.0f} %"
        rows.append([*numbers, zeros, f"{float(path.residuals[k]):.0e}", str(int(path.steps[k])), done])
    return f"{path_line(path)}\n{table(rows)}"


# Choices


def choice_line(choice: Any) -> str:
    """A `CrossValidation` in a line."""
    if not _readable(tree_leaves(tuple(choice))) or choice.scores.ndim != 2:
        return _shapes(choice)
    folds, count = choice.scores.shape
    return (
        f"CrossValidation(best strength {float(choice.best):.4g}, one standard error "
        f"{float(choice.one_standard_error):.4g}; {count} strengths, {folds} folds, "
        f"{_converged(choice.converged, 'fits')})"
    )


def choice_text(choice: Any) -> str:
    """A `CrossValidation` with a row for some of its strengths."""
    if not _readable(tree_leaves(tuple(choice))) or choice.scores.ndim != 2:
        return choice_line(choice)
    marks = {
        int((choice.strengths == choice.one_standard_error).int().argmax()): "one standard error",
        int((choice.strengths == choice.best).int().argmax()): "best",
    }
    rows = [["strength", "loss", "standard error", ""]]
    for k in _spread(len(choice.strengths), *marks):
        numbers = [f"{float(x[k]):.4g}" for x in (choice.strengths, choice.mean, choice.standard_error)]
        rows.append([*numbers, marks.get(k, "")])
    return f"{choice_line(choice)}\n{table(rows)}"
