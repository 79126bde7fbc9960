"""Paths of strengths: one `regularization_path`, a loop of `minimize`, and those who solve a fixed list of losses.

Lasso and l1 logistic regression beside scikit-learn's and skglm's coordinate descent in compiled code, which is what
to use where the problem is on their list; and a problem that neither has. Every way must reach the same solutions.
Times are those of whole paths, the median of rounds in turn; of a compiled path also that of its first call, with
nothing in the caches of the compiler (not where models have many sizes, each with graphs of its own).

    python benchmarks/paths.py --write  # In an environment with scikit-learn, and skglm if it is to have its rows.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from common import report, start
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.linear_model import LogisticRegression, lasso_path
from torch import Tensor

import funcreg as fr
from funcreg.solvers import graphs

#: Solutions as arrays, a row for each strength.
Way = Callable[[], np.ndarray]
Problem = tuple[str, dict[str, Way]]
PATH, LOOP, SKLEARN, SKGLM = "`regularization_path`", "a loop of `minimize`, warm", "scikit-learn", "skglm"
RECORDED, COMPILED = '`compile="eager"`', "`compile=True`"
FIRST = "its first call"


def squares(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (x @ w - y).square().mean() / 2


def logistic(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.softplus(-y * (x @ w)).mean()


def softmax(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x @ w, y)


def standard(x: np.ndarray) -> np.ndarray:
    scale = x.std(0)
    return (x - x.mean(0))[:, scale > 0] / scale[scale > 0]


def made(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    x = standard(generator.standard_normal((rows, columns)))
    y = x[:, :10] @ generator.standard_normal(10) + generator.standard_normal(rows)
    return x, y - y.mean()


def ours(
    loss: Any, w: Tensor, penalty: fr.Penalty, args: tuple[Tensor, ...], strengths: list[float], compiled: bool
) -> dict[str, Way]:
    def path(compile: bool | str = False) -> np.ndarray:
        return found(fr.regularization_path(loss, w, penalty, strengths=strengths, args=args, compile=compile))

    def loop() -> np.ndarray:
        solved = [fr.minimize(loss, w, penalty, strength=strengths[0], args=args)]
        for strength in strengths[1:]:
            solved.append(fr.minimize(loss, solved[-1].params, penalty, strength=strength, args=args))
        assert all([bool(each.converged) for each in solved])
        return torch.stack([each.params for each in solved]).numpy()

    ways: dict[str, Way] = {PATH: path, RECORDED: lambda: path("eager")}
    return ways | ({COMPILED: lambda: path(True)} if compiled else {}) | {LOOP: loop}


def found(path: fr.Path) -> np.ndarray:
    assert path.converged.all()
    return path.params.numpy()


def lasso(name: str, x: np.ndarray, y: np.ndarray, count: int, ratio: float) -> Problem:
    most = float(np.abs(x.T @ y).max() / len(y))
    strengths = np.geomspace(most, most * ratio, count)
    tensors = torch.tensor(x), torch.tensor(y)
    ways = ours(squares, torch.zeros(x.shape[1], dtype=torch.float64), fr.l1, tensors, strengths.tolist(), count == 100)
    descent: Any = lasso_path
    ways[SKLEARN] = lambda: descent(x, y, alphas=strengths, tol=1e-10, max_iter=100_000)[1].T
    if importlib.util.find_spec("skglm"):
        from skglm import Lasso  # pyright: ignore[reportMissingImports]

        ways[SKGLM] = lambda: Lasso(fit_intercept=False, tol=1e-9).path(x, y, strengths)[1].T
    return f"lasso, {name}, {x.shape[0]} x {x.shape[1]}, {count} strengths", ways


def classes(count: int) -> Problem:
    data: Any = load_breast_cancer()
    x, y = standard(data.data), 2.0 * data.target - 1
    strengths = np.geomspace(1, 1e-2, count) * np.abs(x.T @ y).max() / len(y) / 2
    tensors = torch.tensor(x), torch.tensor(y)
    ways = ours(
        logistic, torch.zeros(x.shape[1], dtype=torch.float64), fr.l1, tensors, strengths.tolist(), count == 100
    )

    def by_sklearn() -> np.ndarray:
        options: dict[str, Any] = {"l1_ratio": 1} if "l1_ratio" in _new else {"penalty": "l1"}
        options |= {"solver": "liblinear", "fit_intercept": False, "tol": 1e-10, "max_iter": 100_000}
        return np.stack([LogisticRegression(C=1 / (len(y) * s), **options).fit(x, y).coef_[0] for s in strengths])

    ways[SKLEARN] = by_sklearn
    if importlib.util.find_spec("skglm"):
        from skglm import SparseLogisticRegression  # pyright: ignore[reportMissingImports]

        def by_skglm() -> np.ndarray:
            model = SparseLogisticRegression(fit_intercept=False, tol=1e-9, warm_start=True)
            return np.stack([model.set_params(alpha=s).fit(x, y).coef_[0].copy() for s in strengths])

        ways[SKGLM] = by_skglm
    return f"l1 logistic, breast cancer, {x.shape[0]} x {x.shape[1]}, {count} strengths", ways


#: From 1.8 on `l1_ratio=1` says what `penalty="l1"` said.
_new = {"l1_ratio"} if tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8) else set()


def groups(count: int) -> Problem:
    data: Any = load_digits()
    x, y = torch.tensor(standard(data.data)), torch.tensor(data.target)
    w = torch.zeros(x.shape[1], 10, dtype=torch.float64)
    most = float(fr.lambda_max(torch.func.grad(softmax)(w, x, y), fr.group_lasso))
    strengths = np.geomspace(most, most / 10, count).tolist()
    ways = ours(softmax, w, fr.group_lasso, (x, y), strengths, True)
    return f"softmax with group lasso, digits, {x.shape[0]} x {x.shape[1]} x 10, {count} strengths", ways


def problems(quick: bool) -> list[Problem]:
    data: Any = load_diabetes()
    diabetes = standard(data.data), data.target - data.target.mean()
    if quick:
        return [lasso("diabetes", *diabetes, 5, 0.1), classes(3)]
    return [
        *(lasso("diabetes", *diabetes, count, 1e-3) for count in (3, 20, 100)),
        lasso("made", *made(200, 1000), 50, 0.05),
        *map(classes, (3, 20, 100)),
        groups(5),
    ]


def fresh(solve: Way) -> np.ndarray:
    """Solutions of a first call, with nothing in the caches of the compiler."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        graphs._compiled.clear()
        return solve()


def main() -> None:
    options = start(__doc__)
    table: dict[str, Any] = {}
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name, ways in problems(options.quick):
        expected, first = {}, {}
        for way, solve in ways.items():  # And all that compiles at a first call.
            begin = time.perf_counter()
            expected[way] = fresh(solve) if way == COMPILED else solve()
            first[way] = time.perf_counter() - begin
        for way, weights in expected.items():
            np.testing.assert_allclose(weights, expected[PATH], atol=1e-5 * np.abs(expected[PATH]).max(), err_msg=way)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(1 if options.quick else 3):
            for way, solve in ways.items():
                begin = time.perf_counter()
                solve()
                seconds[way].append(time.perf_counter() - begin)
        table[name] = {}
        for way, times in seconds.items():
            table[name][way] = statistics.median(times)
            if way == COMPILED:
                table[name][FIRST] = first[way]
        print(name, {way: f"{each:.4f} s" for way, each in table[name].items()})
    report("paths", {"rows": table}, options.write)


if __name__ == "__main__":
    main()
