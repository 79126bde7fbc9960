"""Every penalty, constraint and other public name in the tables of `catalogue.md`, made from the code.

Names and signatures come from the library, formulas and papers from its documentation. What a penalty does to weights
is seen, not told: its proximal operator acts on a matrix with growing steps, and what becomes of the matrix is named.

    python examples/catalogue.py
    python examples/catalogue.py --write
"""

import argparse
import inspect
import itertools
import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import funcreg as fr

PAGE = pathlib.Path(__file__).parent / "catalogue.md"

#: What options without a default, and hyperparameters for which 1 would not show what they do, are given, by name.
GIVEN: dict[str, Any] = {
    "rho": 0.2, "beta": 0.1, "strength": 2.0, "gamma": 3.0, "a": 3.7, "epsilon": 0.1, "anchor": 0.25, "lower": -1.0,
    "radius": 6.0, "total": 6.0, "k": 3, "n": 2, "m": 4, "normal": 1.0, "offset": 0.0, "kappa": 2.0, "factor": 1.0,
    "matrix": torch.eye(2, 48, dtype=torch.float64), "shortest": 4.0, "longest": 6.0,
    "groups": ((0, (1, 2)), (3, (4, 5))),
    "weights": torch.linspace(2, 1, 48, dtype=torch.float64).reshape(6, 8),
}  # fmt: skip


# The penalties


def penalties() -> list[fr.Penalty]:
    """The public ones as they are written: what a module builds on before it, then from top to bottom."""
    # A module becomes a name of its package when its own imports are done.
    modules = [module for module in vars(fr.regularizers).values() if inspect.ismodule(module)]
    public = [value for value in vars(fr).values() if isinstance(value, fr.Penalty)]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if any([value is one for one in public]) and value.__module__ == module.__name__
    ]


def builders() -> list[Any]:
    """The public functions that make penalties."""
    functions = [value for value in vars(fr).values() if inspect.isfunction(value)]
    return [f for f in functions if f.__annotations__.get("return") == "Penalty"]


def arguments(penalty: fr.Penalty, **other: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hyperparameters and options to try a penalty with: those given, defaults, or 1 where that is in bounds."""
    given, hyper, options = GIVEN | other, [], {}
    for p in list(inspect.signature(penalty).parameters.values())[1:]:
        if p.kind is not p.KEYWORD_ONLY:
            low, high = penalty.bounds.get(p.name, (1.0, 1.0))
            default = min(max(1.0, low), high) if p.default is p.empty else p.default
            hyper.append(given.get(p.name, default))
        elif p.default is p.empty:
            if p.name not in given:
                raise ValueError(f"{penalty!r} takes {p.name}=, which has no default; write a value for it into GIVEN")
            options[p.name] = given[p.name]
    return tuple(hyper), options


# What it does to weights


ROWS, COLUMNS = 6, 8
#: Fine enough that entries that vanish each for itself do so one by one.
STEPS = torch.logspace(-3, 3, 76, dtype=torch.float64).tolist()


def sample(seed: int = 0) -> Tensor:
    """A matrix of full rank whose magnitudes are all different; the greatest entry is negative."""
    generator = torch.Generator("cpu").manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    powers = torch.rand(ROWS, COLUMNS, **draw).argsort(1)
    sizes = 0.1 * 1.5**powers * (1 + 0.1 * torch.rand(ROWS, COLUMNS, **draw)) * torch.arange(2, 2 + ROWS).unsqueeze(1)
    w = sizes * torch.randn(ROWS, COLUMNS, **draw).sign()
    return -w * w.flatten()[w.abs().argmax()].sign()


class Seen(NamedTuple):
    """One step of a proximal operator. Zero is the point to which a penalty pulls, an anchor if it has one."""

    w: Tensor  # The matrix.
    z: Tensor  # Where it landed.
    before: Tensor  # Where it landed with the step before.


def alike(x: Tensor) -> bool:
    return bool(x.max() - x.min() <= 1e-9 * x.abs().max())


def is_varied(row: Tensor) -> bool:
    """Three magnitudes that are not zero, or one of either sign: not what vanishes together by being equal."""
    sizes = row.abs().round(decimals=9).unique()
    return bool((sizes > 0).sum() > 2 or ((row > 0).any() and alike(row.abs()) and (row < 0).any()))


def zeroes_rows(s: Seen) -> bool:
    """What was left of a row vanishes at once, and other rows stay."""
    dead = (s.z == 0).all(1)
    return bool(0 < dead.sum() < ROWS) and any(map(is_varied, s.before[dead]))


def zeroes_entries(s: Seen) -> bool:
    zero = s.z == 0
    return bool((zero.any(1) & ~zero.all(1)).any())


def cuts_large_entries(s: Seen) -> bool:
    """Entries are level at the top, and those below are as they were."""
    level = s.z.abs() == s.z.abs().amax()
    return bool(1 < level.sum() < s.z.numel() and (s.z == s.w)[~level].all())


def levels_magnitudes(s: Seen) -> bool:
    """Entries of either sign are level."""
    return bool(torch.isin(s.z[s.z > 0], -s.z[s.z < 0]).any())


def levels_neighbours(s: Seen) -> bool:
    return bool(((s.z[:, 1:] == s.z[:, :-1]) & (s.z[:, 1:] != 0)).any())


def levels_singular_values(s: Seen) -> bool:
    first, second = torch.linalg.svdvals(s.z)[:2].tolist()
    return first > 0 and first - second < 1e-9 * first


def lowers_rank(s: Seen) -> bool:
    return 0 < int(torch.linalg.matrix_rank(s.z)) < ROWS


def keeps_others(s: Seen) -> bool:
    return bool(((s.z == s.w) | (s.z == 0)).all())


def keeps_large_entries(s: Seen) -> bool:
    largest = s.w.abs() == s.w.abs().amax()
    return bool((s.z == s.w)[largest].all())


def scales_all(s: Seen) -> bool:
    return alike((s.z / s.w)[s.z != 0])


def scales_rows(s: Seen) -> bool:
    return all([alike(z / w) for w, z in zip(s.w, s.z, strict=True)])


def shifts_all(s: Seen) -> bool:
    return alike(s.z - s.w)


def loss(s: Seen) -> Tensor:
    """By how much the magnitudes that are left fell, from the smallest to the greatest."""
    left = s.z != 0
    return (s.w.abs() - s.z.abs())[left][s.w[left].abs().argsort()]


def shrinks_all_alike(s: Seen) -> bool:
    return alike(loss(s))


def shrinks_large_less(s: Seen) -> bool:
    return bool((loss(s).diff() <= 1e-12).all())


def shrinks_large_more(s: Seen) -> bool:
    return bool((loss(s).diff() >= -1e-12).all())


def effects(penalty: fr.Penalty, w: Tensor) -> str:
    """What is seen of a matrix while the step of the proximal operator grows."""
    hyper, options = arguments(penalty)
    centre = GIVEN["anchor"] if "anchor" in inspect.signature(penalty).parameters else 0.0
    points = torch.vmap(lambda step: penalty.prox(w, step, *hyper, **options))(torch.tensor(STEPS, dtype=w.dtype))
    path = [w - centre, *(points - centre)]
    steps = [Seen(w - centre, z, before) for before, z in itertools.pairwise(path)]
    moved = [s for s in steps if (s.z != s.w).any() and (s.z != 0).sum() > 2]

    def ever(*kinds: tuple[Any, str]) -> list[str]:
        return [text for sees, text in kinds if any(map(sees, moved))]

    def always(*kinds: tuple[Any, str]) -> list[str]:
        return [text for sees, text in kinds if moved and all(map(sees, moved))]

    zeros = ever((zeroes_rows, "zeroes rows"), (zeroes_entries, "zeroes entries"))
    zeros = zeros[-1:] if hasattr(penalty, "project") else zeros  # All at once: rows vanish with their entries.
    levels = ever(
        (cuts_large_entries, "cuts large magnitudes to one level"),
        (levels_magnitudes, "makes magnitudes equal"),
        (levels_neighbours, "makes neighbours equal"),
    )[:1]
    if not zeros and not levels:
        levels = ever((levels_singular_values, "makes singular values equal"), (lowers_rank, "lowers the rank"))[:1]
    manner = always((keeps_others, "keeps the others"))
    manner += ever((keeps_large_entries, "keeps large ones"))
    manner += always(
        (scales_all, "scales all alike"),
        (scales_rows, "scales each row"),
        (shifts_all, "shifts all alike"),
        (shrinks_all_alike, "shrinks all alike"),
        (shrinks_large_less, "shrinks large ones less"),
        (shrinks_large_more, "shrinks large ones more"),
    )
    said = ", ".join(zeros + levels + ([] if levels else manner[:1]))
    return f"of the change from the anchor: {said}" if centre else said


# Whether it is convex, and whether it has a proximal operator


def is_convex(penalty: fr.Penalty) -> bool:
    """No point between two others was found whose value is above the mean of theirs."""
    hyper, options = arguments(penalty)
    generator = torch.Generator("cpu").manual_seed(1)
    pairs = []
    for seed in range(12):
        a, b = (10.0 ** (seed % 4 - 2) * sample(2 * seed + k) for k in range(2))
        some = torch.rand(ROWS, COLUMNS, generator=generator, device="cpu") < 0.5
        row, other = (torch.arange(ROWS).unsqueeze(1) == k for k in (seed % ROWS, (seed + 1) % ROWS))
        pairs += [(a, b), (a * some, b), (a, -a), (a, 0 * a), (a * row, b * other)]
    x, y = map(torch.stack, zip(*pairs, strict=True))
    if hasattr(penalty, "project"):
        project = torch.vmap(lambda point: penalty.prox(point, 1.0, *hyper, **options))
        x, y = project(x), project(y)
        found, expected = (project((x + y) / 2) - (x + y) / 2).abs().amax((1, 2)), torch.zeros(())
    else:
        value = torch.vmap(lambda point: penalty(point, *hyper, **options))
        found, expected = value((x + y) / 2), (value(x) + value(y)) / 2
    return not (found > expected * (1 + 1e-9) + 1e-9).any()


def proximal(penalty: fr.Penalty, w: Tensor) -> str:
    hyper, options = arguments(penalty)
    try:
        penalty.prox(w, 1.0, *hyper, **options)
    except ValueError:
        return "none"
    kind = "projection" if hasattr(penalty, "project") else "yes"
    return f"{kind}, in any metric" if penalty.in_metric(w, *hyper, **options) else kind


# The table


def markdown(text: str) -> str:
    """Documentation as a cell of a table: mathematics as GitHub has it, on one line, without bars."""

    def formula(found: re.Match[str]) -> str:
        bars = found[1].replace("\\|", r"\Vert ").replace("|", r"\vert ")
        return f"$`{' '.join(bars.split())}`$"

    text = re.sub(r"\.\. math::\s*(.*)", r"<br>:math:`\1`", text, flags=re.DOTALL)
    return " ".join(re.sub(r":math:`(.*?)`", formula, text, flags=re.DOTALL).replace("|", r"\|").split())


def what(thing: Any) -> str:
    """The first line of the documentation, and the formula below it if there is one."""
    paragraphs = (inspect.getdoc(thing) or "").split("\n\n")
    below = [p for p in paragraphs[1:] if p.startswith(".. math::")][:1]
    return markdown("\n".join([paragraphs[0].removesuffix("."), *below]))


def paper(thing: Any) -> str:
    listed = (inspect.getdoc(thing) or "").partition("References:\n")[2]
    return re.sub(r"(?<=\.) (?=[A-Z])", "<br>", markdown("\n".join(listed.splitlines())))


def signature(thing: Any) -> str:
    shown = []
    for p in inspect.signature(thing).parameters.values():
        default = "..." if p.default is ... else repr(p.default)
        shown.append(p.name if p.default is p.empty else f"{p.name}={default}")
    return f"`{thing.__name__}({', '.join(shown)})`"


FAMILIES = ["Entry by entry", "Groups", "Singular values", "Constraints"]


def family(penalty: fr.Penalty) -> str:
    """By what the penalty is a sum over."""
    if hasattr(penalty, "project"):
        return "Constraints"
    if penalty.separable:
        return "Entry by entry"
    return "Singular values" if of_matrices(penalty) else "Groups"


def of_matrices(penalty: fr.Penalty) -> bool:
    """Whether leaves are read as matrices, and not in groups."""
    return penalty.__module__ == fr.nuclear.__module__ and "dim" not in inspect.signature(penalty).parameters


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(list(header)), *lines[1:]])


def catalogue() -> str:
    """A table for each family of penalties."""
    w = sample()
    found: dict[str, list[list[str]]] = {}
    for penalty in penalties():
        kind = proximal(penalty, w)
        seen = "" if kind == "none" else effects(penalty, w)
        convex = "yes" if is_convex(penalty) else "no"
        row = [signature(penalty), what(penalty), seen, convex, kind, paper(penalty)]
        found.setdefault(family(penalty), []).append(row)
    header = ["penalty", "what it is", "what it does to weights", "convex", "proximal operator", "paper"]
    parts = [f"## {name}\n\n{table(header, found[name])}" for name in FAMILIES if name in found]
    rows = [[signature(thing), what(thing), paper(thing)] for thing in builders()]
    return "\n\n".join([*parts, f"## Functions that make penalties\n\n{table(header[:2] + header[-1:], rows)}"])


# Everything else


SECTIONS = {
    "Regularize": ["regularizing", "decay", "placement", "noise"],
    "Scale": ["scaling", "adam_family", "preconditioners", "directions", "plateau"],
    "Clip and clean": ["clipping", "per_example"],
    "Combine": ["transform", "chains", "combine"],
    "Wrap and measure": ["wrappers", "hyperparams", "averaging", "monitoring"],
    "Ensembles and sweeps": ["ensemble", "sweep", "grids"],
    "Optimizers": [
        *("optimizers", "adaptive_optimizers", "plain_optimizers", "factored", "muon", "mixing", "polyak", "lbfgs"),
        *("linesearch", "proximal", "stochastic"),
    ],
    "Low precision": ["precision"],
    "Optimizers and loops of torch": ["regularize", "optimizer", "checkpoint"],
    "Schedules": ["schedules", "phases", "annealing"],
    "Certificates": ["certificates"],
    "See": ["report", "describe"],
    "Minima, paths, choices of a strength": ["minimize", "path", "cross_validation"],
    "Speed": ["fusing", "value_and_grad"],
    "Penalties and constraints of your own": [
        *("lifting", "penalty", "constraint", "constraints", "composition", "penalties")
    ],
    "Groups that span leaves": ["families", "channels", "channel_tables", "coupled", "removal"],
    "Getting zeros out": ["deployment", "resizing", "factorizing"],
    "Projections of a tree as one vector": ["projections"],
    "What λ means elsewhere": ["conventions"],
    "Trees and masks": ["tree", "leafwise", "masks", "selection", "trees", "arithmetic"],
}
#: The rest, which is read in results.
OTHERS = "States, and what functions return"


def section(thing: Any) -> str:
    """By the module that it is written in."""
    written = getattr(getattr(thing, "func", thing), "__module__", type(thing).__module__)
    return next((name for name, modules in SECTIONS.items() if written.split(".")[-1] in modules), OTHERS)


def names() -> str:
    """A table for each section of what is public and no penalty."""
    found: dict[str, list[list[str]]] = {name: [] for name in [*SECTIONS, OTHERS]}
    for name, thing in vars(fr).items():
        if not (
            name.startswith("_") or inspect.ismodule(thing) or isinstance(thing, fr.Penalty) or thing in builders()
        ):
            found[section(thing)].append([f"`{name}`", what(thing)])
    parts = [f"### {name}\n\n{table(['name', 'what it is'], rows)}" for name, rows in found.items() if rows]
    return "\n\n".join(parts)


TABLES = {"catalogue": catalogue, "names": names}


def main() -> None:
    parser = argparse.ArgumentParser(description="the tables of what is public")
    parser.add_argument("--write", action="store_true", help="write them between their marks in catalogue.md")
    options = parser.parse_args()
    for name, make in TABLES.items():
        text = make()
        if not options.write:
            print(text)
            continue
        head, mark, rest = PAGE.read_text().partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition("<!-- end -->")
        if not mark or not end:
            raise SystemExit(f"catalogue.md has no lines <!-- {name} --> and <!-- end -->")
        PAGE.write_text(f"{head}{mark}\n{text}\n\n{end}{tail}")


if __name__ == "__main__":
    main()
