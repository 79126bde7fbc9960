"""Ask other libraries for values, gradients and proximal points, and store what they say in `penalties.json`.

A row is a penalty or constraint of funcreg, and the call of a peer that should give the same. The suite reads the
file and needs none of the peers. To make it again:

    pip install jax jaxopt pyproximal skglm keras
    KERAS_BACKEND=jax python tests/reference/make_penalties.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt.projection as jp
import keras
import keras.constraints as kc
import keras.regularizers as kr
import numpy as np
import pyproximal as pp
import skglm.penalties as sk
from jaxopt import prox as jx

jax.config.update("jax_enable_x64", True)
keras.config.set_floatx("float64")


@dataclass(frozen=True)
class Row:
    """What funcreg is asked, and the function of the inputs and a step that asks a peer the same."""

    ours: str  # A name of funcreg, or of `MADE` in tests/test_peers.py.
    given: str  # A name of the inputs.
    theirs: Callable[..., Any]
    hyper: tuple[Any, ...] = ()
    strength: Any = 1.0  # Factor on the penalty: a number, or one for each entry in a proximal operator.
    options: dict[str, Any] = field(default_factory=dict)
    convention: str | None = (
        None  # Function of funcreg that turns the peer's hyperparameters, here in `hyper`, to ours.
    )
    steps: tuple[float, ...] = (0.25, 1.5)
    rounded: bool = False  # The peer computes in float32, or guards a quotient by a small number.


def inputs() -> dict[str, Any]:
    """Of three decimals; `sparse` has zeros, a zero row and ties, the others have none."""
    rng = np.random.default_rng(0)
    drawn = {
        "vector": rng.normal(size=12) * 2,
        "matrix": rng.normal(size=(5, 4)),
        "sparse": rng.normal(size=(4, 3)),
        "anchor": rng.normal(size=12),
        "weights": np.sort(rng.uniform(0.1, 1.0, size=12))[::-1],
    }
    drawn["sparse"][1] = 0.0
    drawn["sparse"][2] = [0.0, 0.7, -0.7]
    return {name: np.round(x, 3) for name, x in drawn.items()}


X = inputs()
MATRIX_ROWS = {"dim": 1}
MATRIX_COLUMNS = {"dim": 0}


def _each_row(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda w: np.stack([np.asarray(f(row)) for row in w])


# jaxopt. The documentation of `prox_ridge` has no factor one half; its code has it, and is what runs here.
# Not here: `projection_l2_sphere` of zero, which is NaN.
JAXOPT_PROX = {
    "prox_lasso": Row("l1", "sparse", lambda w, s: jx.prox_lasso(w, 0.7, s), strength=0.7),
    "prox_lasso, a strength for each entry": Row(
        "l1", "vector", lambda w, s: jx.prox_lasso(w, X["weights"], s), strength=X["weights"]
    ),
    "prox_non_negative_lasso": Row(
        "nonnegative_form(l1)", "sparse", lambda w, s: jx.prox_non_negative_lasso(w, 0.7, s), strength=0.7
    ),
    "prox_elastic_net": Row(
        "elastic", "sparse", lambda w, s: jx.prox_elastic_net(w, (0.8 * 0.3, (1 - 0.3) / 0.3), s), hyper=(0.8, 0.3)
    ),
    "prox_ridge": Row("half_l2", "sparse", lambda w, s: jx.prox_ridge(w, 0.7, s), strength=0.7),
    "prox_ridge of twice the strength": Row("l2", "sparse", lambda w, s: jx.prox_ridge(w, 2 * 0.7, s), strength=0.7),
    "prox_non_negative_ridge": Row(
        "nonnegative_form(half_l2)", "sparse", lambda w, s: jx.prox_non_negative_ridge(w, 0.7, s), strength=0.7
    ),
    "prox_group_lasso of rows": Row(
        "group_lasso",
        "sparse",
        lambda w, s: _each_row(lambda row: jx.prox_group_lasso(row, 0.7, s))(w),
        strength=0.7,
        options=MATRIX_ROWS,
    ),
    "prox_group_lasso of columns": Row(
        "group_lasso",
        "matrix",
        lambda w, s: _each_row(lambda row: jx.prox_group_lasso(row, 0.7, s))(w.T).T,
        strength=0.7,
        options=MATRIX_COLUMNS,
    ),
    "prox_group_lasso of all": Row(
        "group_lasso", "sparse", lambda w, s: jx.prox_group_lasso(w, 0.7, s), strength=0.7, options={"dim": None}
    ),
}

JAXOPT_PROJECTIONS = {
    "projection_non_negative": Row("nonnegative", "sparse", jp.projection_non_negative),
    "projection_box": Row("box", "vector", lambda w: jp.projection_box(w, (-0.4, 0.6)), hyper=(-0.4, 0.6)),
    "projection_box, bounds for each entry": Row(
        "box",
        "vector",
        lambda w: jp.projection_box(w, (X["anchor"], X["anchor"] + X["weights"])),
        hyper=(X["anchor"], X["anchor"] + X["weights"]),
    ),
    "projection_hypercube": Row("box", "sparse", lambda w: jp.projection_hypercube(w, 0.9), hyper=(0.0, 0.9)),
    "projection_simplex": Row("simplex", "vector", lambda w: jp.projection_simplex(w, 1.7), hyper=(1.7,)),
    "projection_simplex of rows": Row("simplex", "sparse", _each_row(jp.projection_simplex), options=MATRIX_ROWS),
    "projection_l1_ball": Row("l1_ball", "vector", lambda w: jp.projection_l1_ball(w, 2.5), hyper=(2.5,)),
    "projection_l1_ball inside": Row("l1_ball", "vector", lambda w: jp.projection_l1_ball(w, 99.0), hyper=(99.0,)),
    "projection_l1_ball of rows": Row("l1_ball", "sparse", _each_row(jp.projection_l1_ball), options=MATRIX_ROWS),
    "projection_l2_ball": Row("l2_ball", "sparse", lambda w: jp.projection_l2_ball(w, 1.3), hyper=(1.3,)),
    "projection_l2_ball inside": Row("l2_ball", "sparse", lambda w: jp.projection_l2_ball(w, 99.0), hyper=(99.0,)),
    "projection_l2_ball of rows": Row(
        "max_norm", "sparse", _each_row(lambda row: jp.projection_l2_ball(row, 1.1)), hyper=(1.1,)
    ),
    "projection_l2_sphere": Row("l2_sphere", "sparse", lambda w: jp.projection_l2_sphere(w, 1.3), hyper=(1.3,)),
    "projection_linf_ball": Row("linf_ball", "sparse", lambda w: jp.projection_linf_ball(w, 0.6), hyper=(0.6,)),
    "projection_hyperplane": Row(
        "hyperplane", "vector", lambda w: jp.projection_hyperplane(w, (X["anchor"], 0.8)), hyper=(X["anchor"], 0.8)
    ),
    "projection_halfspace": Row(
        "halfspace", "vector", lambda w: jp.projection_halfspace(w, (X["anchor"], -9.0)), hyper=(X["anchor"], -9.0)
    ),
    "projection_halfspace inside": Row(
        "halfspace", "vector", lambda w: jp.projection_halfspace(w, (X["anchor"], 99.0)), hyper=(X["anchor"], 99.0)
    ),
}


# pyproximal.
# Not here: `L0` (its threshold has no root and no 2), `L0Ball` and `L10Ball` of 0 (keep everything), `Log1` and `Huber`
# (each switches branches at the wrong size), `SCAD` with a step above a + 1, `L21_plus_L1` of exact zeros (0 / 0), `TV`
# (iterates, with a wrong rule for its momentum), `ETP`, `Geman` and others that funcreg does not have.
def _matrix(f: Callable[..., Any]) -> Callable[..., Any]:
    """From a function of one flat array to one of matrices."""
    return lambda w, *step: f(w.ravel(), *step).reshape(w.shape) if step else f(w.ravel())


def _columns_in_front(f: Callable[..., Any]) -> Callable[..., Any]:
    """From a function of one flat array, whose groups are columns, to one of the rows of a matrix."""
    return lambda w, *step: f(w.T.ravel(), *step).reshape(w.T.shape).T if step else f(w.T.ravel())


def _each_entry(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda w, *step: (
        np.array([f(w[i : i + 1], *step)[0] for i in range(len(w))]) if step else sum(f(x[None]) for x in w)
    )


@dataclass(frozen=True)
class Operator:
    """An operator of pyproximal, and how it takes its inputs."""

    make: Callable[[], Any]
    ours: str
    given: str = "vector"
    hyper: tuple[Any, ...] = ()
    strength: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    steps: tuple[float, ...] = (0.25, 1.5)
    through: Callable[[Callable[..., Any]], Callable[..., Any]] = _matrix

    def row(self, call: str) -> Row:
        def theirs(w: Any, step: float = 1.0) -> Any:
            made = self.make()
            return self.through(made)(w) if call == "value" else self.through(made.prox)(w, step)

        return Row(self.ours, self.given, theirs, self.hyper, self.strength, self.options, steps=self.steps)


_LOG = 0.8 / math.log(1 + 1.3)  # pyproximal's logarithm is 1 at 1, funcreg's has slope 1 / epsilon at 0.
_EXACTLY = {"xtol": 1e-15, "maxiter": 1000}

PYPROXIMAL = {
    "L1": Operator(lambda: pp.L1(sigma=0.7), "l1", "sparse", strength=0.7),
    "L1 around g": Operator(lambda: pp.L1(0.7, g=X["anchor"]), "anchored_l1", hyper=(X["anchor"],), strength=0.7),
    "L2": Operator(lambda: pp.L2(sigma=0.7), "half_l2", "sparse", strength=0.7),
    "L2 of b": Operator(lambda: pp.L2(b=X["anchor"], sigma=2 * 0.7), "anchored_l2", hyper=(X["anchor"],), strength=0.7),
    "Euclidean": Operator(lambda: pp.Euclidean(0.7), "group_lasso", "matrix", strength=0.7, options={"dim": None}),
    "L21": Operator(
        lambda: pp.L21(ndim=4, sigma=0.7),
        "group_lasso",
        "matrix",
        strength=0.7,
        options=MATRIX_ROWS,
        through=_columns_in_front,
    ),
    "L21_plus_L1": Operator(
        lambda: pp.L21_plus_L1(sigma=0.7, rho=0.3),
        "sparse_group_lasso",
        "matrix",
        (0.7, 0.3),
        options=MATRIX_COLUMNS,
        through=lambda f: f,
    ),
    "HuberCircular": Operator(
        lambda: pp.HuberCircular(0.6), "huber", hyper=(0.6,), strength=1 / 0.6, through=_each_entry
    ),
    "SCAD": Operator(lambda: pp.SCAD(0.7, 3.7), "scad", hyper=(0.7, 3.7), steps=(0.25, 1.5, 2.6, 3.5)),
    "Log": Operator(lambda: pp.Log(0.8, 1.3), "log_sum", hyper=(1 / 1.3,), strength=_LOG),
    "QuadraticEnvelopeCard": Operator(
        lambda: pp.QuadraticEnvelopeCard(0.7**2 / 2), "mcp", hyper=(0.7, 1.0), steps=(0.25, 0.9)
    ),
    "Nuclear": Operator(lambda: pp.Nuclear((5, 4), 0.7), "nuclear", "matrix", strength=0.7),
    "SingularValuePenalty of SCAD": Operator(
        lambda: pp.SingularValuePenalty((5, 4), pp.SCAD(0.7, 3.7)), "on_singular_values(scad)", "matrix", (0.7, 3.7)
    ),
    "SingularValuePenalty of Log": Operator(
        lambda: pp.SingularValuePenalty((5, 4), pp.Log(0.8, 1.3)),
        "on_singular_values(log_sum)",
        "matrix",
        (1 / 1.3,),
        strength=_LOG,
    ),
}

PYPROXIMAL_SETS = {
    "Box": Operator(lambda: pp.Box(-0.4, 0.6), "box", hyper=(-0.4, 0.6)),
    "Simplex": Operator(lambda: pp.Simplex(12, 1.7, **_EXACTLY), "simplex", hyper=(1.7,)),
    "EuclideanBall": Operator(lambda: pp.EuclideanBall(0.0, 1.3), "l2_ball", "sparse", (1.3,)),
    "L1Ball": Operator(lambda: pp.L1Ball(12, 2.5, **_EXACTLY), "l1_ball", hyper=(2.5,)),
    "L0Ball": Operator(lambda: pp.L0Ball(5), "top_k", "matrix", (5,)),
    "NuclearBall": Operator(lambda: pp.NuclearBall((5, 4), 2.5, **_EXACTLY), "nuclear_ball", "matrix", (2.5,)),
    "HalfSpace": Operator(lambda: pp.HalfSpace(X["anchor"], -9.0), "halfspace", hyper=(X["anchor"], -9.0)),
    "HalfSpace inside": Operator(lambda: pp.HalfSpace(X["anchor"], 99.0), "halfspace", hyper=(X["anchor"], 99.0)),
}

# skglm.
# Not here: `MCPenalty` with a step of gamma or above (its formula holds below), `SCAD` with a step of a - 1 (divides by
# 0), blocks of zeros (ZeroDivisionError), `L1_plus_L2.alpha_max` (forgets the share of l1), `L2_05` (funcreg has no
# such groups).
_GROUPS = (np.arange(0, 21, 4, dtype=np.int32), np.arange(20, dtype=np.int32))  # The rows of `matrix`, flat.
_SIZES = np.full(5, math.sqrt(4))


def _prox_1d(penalty: Any) -> Callable[..., Any]:
    return lambda w, s: np.array([penalty.prox_1d(x, s, i) for i, x in enumerate(w.ravel())]).reshape(w.shape)


def _prox_1feat(penalty: Any) -> Callable[..., Any]:
    return lambda w, s: np.stack([penalty.prox_1feat(row, s, i) for i, row in enumerate(w)])


def _prox_1group(penalty: Any) -> Callable[..., Any]:
    return lambda w, s: np.stack([penalty.prox_1group(row, s, i) for i, row in enumerate(w)])


SKGLM_PROX = {
    "L1": Row("l1", "sparse", _prox_1d(sk.L1(0.7)), strength=0.7),
    "L1 positive": Row("nonnegative_form(l1)", "sparse", _prox_1d(sk.L1(0.7, positive=True)), strength=0.7),
    "WeightedL1": Row("l1", "vector", _prox_1d(sk.WeightedL1(0.7, weights=X["weights"])), strength=0.7 * X["weights"]),
    "L1_plus_L2": Row("elastic", "sparse", _prox_1d(sk.L1_plus_L2(0.8, 0.3)), (0.8, 0.3)),
    "L1_plus_L2 positive": Row(
        "nonnegative_form(elastic)", "sparse", _prox_1d(sk.L1_plus_L2(0.8, 0.3, positive=True)), (0.8, 0.3)
    ),
    "MCPenalty": Row("mcp", "vector", _prox_1d(sk.MCPenalty(0.7, 3.0)), (0.7, 3.0), steps=(0.25, 1.5, 2.9)),
    "MCPenalty positive": Row(
        "nonnegative_form(mcp)", "vector", _prox_1d(sk.MCPenalty(0.7, 3.0, positive=True)), (0.7, 3.0)
    ),
    "SCAD": Row("scad", "vector", _prox_1d(sk.SCAD(0.7, 3.7)), (0.7, 3.7), steps=(0.25, 1.5, 2.6, 3.5, 5.0)),
    "L0_5": Row("l_half", "vector", _prox_1d(sk.L0_5(0.7)), strength=0.7),
    "L2_3": Row("l_two_thirds", "vector", _prox_1d(sk.L2_3(0.7)), strength=0.7),
    "LogSumPenalty": Row("log_sum", "vector", _prox_1d(sk.LogSumPenalty(0.7, 0.4)), (0.4,), strength=0.7),
    "SLOPE": Row("slope", "vector", sk.SLOPE(0.7 * X["weights"]).prox_vec, (X["weights"],), strength=0.7),
    "L2_1": Row("group_lasso", "matrix", _prox_1feat(sk.L2_1(0.7)), strength=0.7),
    "BlockMCPenalty": Row("group_mcp", "matrix", _prox_1feat(sk.BlockMCPenalty(0.7, 3.0)), (0.7, 3.0)),
    "BlockSCAD": Row("group_scad", "matrix", _prox_1feat(sk.BlockSCAD(0.7, 3.7)), (0.7, 3.7)),
    "WeightedGroupL2": Row(
        "group_lasso",
        "matrix",
        _prox_1group(sk.WeightedGroupL2(0.7, _SIZES, *_GROUPS)),
        strength=0.7,
        options={"weights": "sqrt_size"},
    ),
    "WeightedL1GroupL2": Row(
        "sparse_group_lasso",
        "matrix",
        _prox_1group(sk.WeightedL1GroupL2(0.7, (1 - 0.3) * _SIZES, np.full(20, 0.3), *_GROUPS)),
        (0.7, 0.3),
        options={"weights": "sqrt_size"},
    ),
}

SKGLM_VALUES = {
    "L1": Row("l1", "sparse", sk.L1(0.7).value, strength=0.7),
    "L2": Row("half_l2", "vector", sk.L2(0.7).value, strength=0.7),
    "L1_plus_L2": Row("elastic", "vector", sk.L1_plus_L2(0.8, 0.3).value, (0.8, 0.3)),
    "MCPenalty": Row("mcp", "vector", sk.MCPenalty(0.7, 3.0).value, (0.7, 3.0)),
    "SCAD": Row("scad", "vector", sk.SCAD(0.7, 3.7).value, (0.7, 3.7)),
    "L0_5": Row("l_half", "vector", sk.L0_5(0.7).value, strength=0.7),
    "L2_3": Row("l_two_thirds", "vector", sk.L2_3(0.7).value, strength=0.7),
    "LogSumPenalty": Row("log_sum", "vector", sk.LogSumPenalty(0.7, 0.4).value, (0.4,), strength=0.7),
    "SLOPE": Row("slope", "vector", sk.SLOPE(0.7 * X["weights"]).value, (X["weights"],), strength=0.7),
    "L2_1": Row("group_lasso", "sparse", sk.L2_1(0.7).value, strength=0.7),
    "BlockMCPenalty": Row("group_mcp", "sparse", sk.BlockMCPenalty(0.7, 3.0).value, (0.7, 3.0)),
    "BlockSCAD": Row("group_scad", "sparse", sk.BlockSCAD(0.7, 3.7).value, (0.7, 3.7)),
    "WeightedGroupL2": Row(
        "group_lasso",
        "matrix",
        lambda w: sk.WeightedGroupL2(0.7, _SIZES, *_GROUPS).value(w.ravel()),
        strength=0.7,
        options={"weights": "sqrt_size"},
    ),
    "WeightedL1GroupL2": Row(
        "sparse_group_lasso",
        "matrix",
        lambda w: sk.WeightedL1GroupL2(0.7, (1 - 0.3) * _SIZES, np.full(20, 0.3), *_GROUPS).value(w.ravel()),
        (0.7, 0.3),
        options={"weights": "sqrt_size"},
    ),
}

SKGLM_SETS = {
    "IndicatorBox": Row("box", "sparse", lambda w: _prox_1d(sk.IndicatorBox(0.6))(w, 1.0), (0.0, 0.6)),
    "PositiveConstraint": Row("nonnegative", "sparse", lambda w: _prox_1d(sk.PositiveConstraint())(w, 1.0)),
}


def _in_jax(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda w: f(jnp.asarray(w))


# Keras. Its L2 has no factor one half.
# Not here: `OrthogonalRegularizer` of a single row (divides by 0), `MinMaxNorm` (funcreg has no such set),
# gradients at zeros (the derivative of a magnitude is 1 there in jax, and 0 in funcreg).
KERAS = {
    "L1": Row("l1", "sparse", kr.L1(0.7), strength=0.7),
    "L2": Row("l2", "sparse", kr.L2(0.7), strength=0.7),
    "L1L2": Row("elastic", "sparse", kr.L1L2(0.7, 0.4), (0.7, 0.4), convention="elastic_from_keras"),
    "L1L2 of l2 alone": Row("elastic", "matrix", kr.L1L2(l2=0.4), (0.0, 0.4), convention="elastic_from_keras"),
    "OrthogonalRegularizer": Row("keras_orthogonal", "matrix", kr.OrthogonalRegularizer()),
    "OrthogonalRegularizer of rows": Row("keras_orthogonal", "matrix", kr.OrthogonalRegularizer(0.3), (0.3,)),
    "OrthogonalRegularizer of columns": Row(
        "keras_orthogonal", "matrix", kr.OrthogonalRegularizer(0.3, "columns"), (0.3,), options={"mode": "columns"}
    ),
}

# The norms of `MaxNorm` and `UnitNorm` are too large by 1e-7, which guards their quotients.
KERAS_SETS = {
    "NonNeg": Row("nonnegative", "sparse", kc.NonNeg()),
    "MaxNorm of columns": Row("max_norm", "matrix", kc.MaxNorm(1, axis=0), (1.0,), options={"dim": 0}, rounded=True),
    "MaxNorm of rows": Row("max_norm", "sparse", kc.MaxNorm(1, axis=1), (1.0,), rounded=True),
    "UnitNorm": Row("l2_sphere", "matrix", kc.UnitNorm(axis=1), options=MATRIX_ROWS, rounded=True),
}

#: From a peer to the rule it is asked for to rows.
PEERS: dict[str, dict[str, dict[str, Row]]] = {
    "jaxopt": {"prox": JAXOPT_PROX, "project": JAXOPT_PROJECTIONS},
    "pyproximal": {
        "value": {name: operator.row("value") for name, operator in PYPROXIMAL.items()},
        "prox": {name: operator.row("prox") for name, operator in PYPROXIMAL.items()},
        "project": {name: operator.row("project") for name, operator in PYPROXIMAL_SETS.items()},
    },
    "skglm": {"value": SKGLM_VALUES, "prox": SKGLM_PROX, "project": SKGLM_SETS},
    "keras": {
        "value": {name: replace(row, theirs=_in_jax(row.theirs)) for name, row in KERAS.items()},
        "grad": {
            name: replace(row, given="matrix", theirs=_in_jax(jax.grad(row.theirs))) for name, row in KERAS.items()
        },
        "project": KERAS_SETS,
    },
}


def ask(rule: str, row: Row) -> Any:
    """The answer of the peer: one for each step if it is asked for a proximal point."""
    w = X[row.given]
    answers = [row.theirs(w.copy(), step) for step in row.steps] if rule == "prox" else [row.theirs(w.copy())]
    for answer in answers:
        dtype = np.asarray(answer).dtype
        assert dtype == np.float64 or row.rounded, f"{row.ours} came in {dtype}"
    numbers = [np.asarray(answer, np.float64).tolist() for answer in answers]
    return numbers if rule == "prox" else numbers[0]


def stored(rule: str, row: Row) -> dict[str, Any]:
    """A row as it is written: what funcreg needs, and the answer."""
    parts = {
        "rule": rule,
        "ours": row.ours,
        "given": row.given,
        "hyper": [np.asarray(h).tolist() for h in row.hyper],
        "strength": np.asarray(row.strength).tolist(),
        "options": row.options,
        "convention": row.convention,
        "steps": list(row.steps) if rule == "prox" else None,
        "rounded": row.rounded,
    }
    return {name: part for name, part in parts.items() if part} | {"theirs": ask(rule, row)}


def _lines(rows: dict[str, Any]) -> str:
    return "{\n" + ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()) + "\n  }"


def main() -> None:
    parts = {
        "versions": json.dumps({peer: version(peer) for peer in PEERS}),
        "inputs": _lines({name: x.tolist() for name, x in X.items()}),
    }
    for peer, rules in PEERS.items():
        parts[peer] = _lines(
            {f"{name}, {rule}": stored(rule, row) for rule, rows in rules.items() for name, row in rows.items()}
        )
    text = "{\n" + ",\n".join(f'  "{name}": {part}' for name, part in parts.items()) + "\n}\n"
    Path(__file__).with_name("penalties.json").write_text(text)


if __name__ == "__main__":
    main()
