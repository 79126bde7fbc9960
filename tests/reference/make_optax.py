"""Run the rows of `twins.py` with optax in float64 and store what comes in `optax.json`.

The suite reads the file and needs neither optax nor jax. To make it again:

    pip install optax && python tests/reference/make_optax.py
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from twins import COUNTS, PROJECTIONS, SCHEDULES, SHAPES, TRANSFORMS, plain, run, tree_map

jax.config.update("jax_enable_x64", True)


class Spy:
    """Optax, that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.float32, self.float64 = jnp.float32, jnp.float64

    def __getattr__(self, name: str) -> Any:
        self.asked.add(name)
        found = _find(name)
        return _in_float64(found) if name in SCHEDULES_OF_OPTAX else found


def _in_float64(make: Any) -> Any:
    """A schedule that counts in 64 bits, because at an int32 count, such as optax's own, jax computes in float32."""

    def made(*args: Any, **kwargs: Any) -> Any:
        schedule = make(*args, **kwargs)
        return lambda count: schedule(jnp.asarray(count, jnp.int64))

    return made


SCHEDULES_OF_OPTAX = {name for name in dir(optax.schedules) if name.endswith(("_schedule", "_schedules", "_decay"))}


LIBRARIES = (optax, optax.transforms, optax.projections, optax.contrib)
#: Modules of which only the names are stored.
BESIDE = ("tree_utils", "losses", "perturbations", "second_order", "assignment", "microbatching")


def _find(name: str) -> Any:
    return next(getattr(lib, name) for lib in LIBRARIES if hasattr(lib, name))


def _public(module: Any) -> set[str]:
    return {n for n in dir(module) if n[0] != "_" and callable(getattr(module, n))}


def inputs() -> dict[str, Any]:
    """Parameters, curvatures and targets, of three decimals. The bias begins at zero; one curvature is zero."""

    def drawn(f: Any) -> Any:
        return tree_map(lambda shape: np.fromfunction(np.vectorize(lambda *i: round(f(*i), 3)), shape).tolist(), SHAPES)

    def wave(rate: float) -> Any:
        return lambda *i: math.sin(rate * (1 + sum((7 * k + 1) * (j + 1) for k, j in enumerate(i))))

    trees = {
        "params": drawn(wave(1.3)),
        "curvature": drawn(lambda *i: 1.1 + 0.9 * wave(2.1)(*i)),
        "target": drawn(wave(0.7)),
    }
    trees["params"]["linear"]["bias"] = [0.0] * 3
    trees["curvature"]["linear"]["weight"][0][0] = 0.0
    return trees


def signature(name: str) -> list[list[Any]]:
    """Name, kind and default of each parameter; the default is None also where there is none, and then required."""
    return [
        [p.name, p.kind.name, "required" if p.default is p.empty else plain(p.default)]
        for p in inspect.signature(_find(name)).parameters.values()
    ]


def fields() -> dict[str, str]:
    """The fields of each named tuple."""
    found = {name: _find(name) for lib in LIBRARIES for name in _public(lib)}
    return {name: " ".join(kind._fields) for name, kind in sorted(found.items()) if hasattr(kind, "_fields")}


def _lines(rows: dict[str, Any]) -> str:
    return "{\n" + ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()) + "\n  }"


def main() -> None:
    given, spy = inputs(), Spy()
    arrays = {name: tree_map(lambda leaf: jnp.array(leaf, jnp.float64), tree) for name, tree in given.items()}
    steps: dict[str, Any] = {}
    for name in TRANSFORMS:
        first, last = (tree_map(lambda leaf: np.asarray(leaf).tolist(), tree) for tree in run(spy, name, arrays))
        steps[name] = {"first": first, "last": last}
    projected = {}
    for name, project in PROJECTIONS.items():
        z = project(spy, arrays["params"], arrays["target"])
        projected[name] = tree_map(lambda leaf: np.asarray(leaf).tolist(), z)
    values = {}
    for name, make in SCHEDULES.items():
        schedule = make(spy)
        values[name] = [float(schedule(count)) for count in COUNTS]
    public = set().union(*map(_public, LIBRARIES))
    parts = {
        "optax": json.dumps(optax.__version__),
        "names": json.dumps(" ".join(sorted(public))),
        "beside": _lines({name: " ".join(sorted(_public(getattr(optax, name)) - public)) for name in BESIDE}),
        "signatures": _lines({name: signature(name) for name in sorted(spy.asked)}),
        "fields": _lines(fields()),
        "counts": json.dumps(COUNTS),
        "schedules": _lines(values),
        "inputs": _lines(given),
        "transforms": _lines(steps),
        "projections": _lines(projected),
    }
    text = "{\n" + ",\n".join(f'  "{name}": {part}' for name, part in parts.items()) + "\n}\n"
    Path(__file__).with_name("optax.json").write_text(text)


if __name__ == "__main__":
    main()
