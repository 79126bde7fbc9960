"""What each way to an L1 penalty solves: the lasso of the diabetes data, against scikit-learn.

Run `python benchmarks/which_l1.py`; it writes `benchmarks/which_l1.json` and the tables of the pages.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import tables
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso
from torch import Tensor
from torch.func import grad

import funcreg as fr

HERE = pathlib.Path(__file__).parent
STRENGTH = 0.2
STEPS = 6000


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Design and response, standardized, and scikit-learn's coefficients."""
    data: Any = load_diabetes()
    x, y = data.data, data.target
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    solution = Lasso(STRENGTH, fit_intercept=False, tol=1e-15, max_iter=10**6).fit(x, y).coef_
    return torch.tensor(x), torch.tensor(y), torch.tensor(solution)


def main() -> None:
    torch.set_num_threads(1)  # Ten coefficients are no work to share between cores.
    x, y, solution = problem()
    rate = 0.5 / float(torch.linalg.matrix_norm(x, 2) ** 2 / len(x))
    falling = fr.linear_schedule(rate, rate / 10, STEPS)
    cosine = fr.cosine_decay_schedule(0.01, STEPS)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return (x @ params["w"] - y).square().mean() / 2

    def penalized(params: dict[str, Tensor]) -> Tensor:
        return loss(params) + STRENGTH * fr.l1(params)

    l1_gradient = fr.add_penalty(fr.l1, strength=STRENGTH)
    threshold = fr.soft_threshold(rate * STRENGTH)
    ways = {
        "`loss + λ * l1(params)`, SGD": (penalized, fr.sgd(rate)),
        "`loss + λ * l1(params)`, Adam": (penalized, fr.adam(0.01)),
        "`add_penalty(l1, strength=λ)`, SGD": (loss, fr.chain(l1_gradient, fr.sgd(rate))),
        "`soft_threshold(η λ)` after SGD": (loss, fr.chain(fr.sgd(rate), threshold)),
        "`soft_threshold(η λ)` after SGD with momentum 0.9": (loss, fr.chain(fr.sgd(rate, 0.9), threshold)),
        "`soft_threshold(η λ)` after SGD, η falling to a tenth": (loss, fr.chain(fr.sgd(falling), threshold)),
        "`soft_threshold(η λ)` after Adam": (loss, fr.chain(fr.adam(0.01), fr.soft_threshold(0.01 * STRENGTH))),
        "`prox_sgd`, momentum 0.9, η falling": (loss, fr.prox_sgd(falling, fr.l1, strength=STRENGTH, momentum=0.9)),
        "`prox_adam`": (loss, fr.prox_adam(cosine, fr.l1, strength=STRENGTH)),
        "`fista`": (loss, fr.fista(rate, fr.l1, strength=STRENGTH)),
    }
    rows = []
    for name, (objective, tx) in ways.items():
        params = {"w": torch.full_like(solution, 0.1)}
        slope, state = grad(objective), tx.init(params)
        for _ in range(STEPS):
            updates, state = tx.update(slope(params), state, params)
            params = fr.apply_updates(params, updates)
        error = float((params["w"] - solution).abs().max() / solution.abs().max())
        zeros = int((params["w"] == 0).sum())
        same = bool(torch.equal(params["w"] == 0, solution == 0))
        rows.append({"way": name, "error": error, "zeros": zeros, "same zeros": same})
        print(f"{name:60} {error:9.1e} {zeros:3d} {same}")
    result = {"strength": STRENGTH, "zeros of the solution": int((solution == 0).sum()), "rows": rows}
    (HERE / "which_l1.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    tables.write()


if __name__ == "__main__":
    main()
