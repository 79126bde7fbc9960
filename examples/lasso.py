"""The lasso on scikit-learn's diabetes data: proximal steps reach the solution of coordinate descent.

Both minimize 1 / (2 n) * |y - X w|^2 + alpha * |w|_1 and find the same coefficients, with the same
exact zeros: scikit-learn's alpha is the strength here, because the loss has its factor 1 / (2 n).

    python examples/lasso.py
    python examples/lasso.py --alpha 10
"""

import argparse

import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso, lasso_path
from torch.func import grad

import funcreg as fr


def main() -> None:
    parser = argparse.ArgumentParser(description="the lasso, against scikit-learn")
    parser.add_argument("--alpha", type=float, default=2.0, help="strength of the penalty")
    parser.add_argument("--steps", type=int, default=2000, help="proximal steps")
    options = parser.parse_args()

    torch.set_num_threads(1)  # Ten coefficients are no work to share between cores.
    names = ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]
    x, y = map(torch.tensor, load_diabetes(return_X_y=True, scaled=False))
    # With columns and target centred the intercept is the mean of the target, and no parameter is left unpenalized.
    x = (x - x.mean(0)) / x.std(0, correction=0)
    y = y - y.mean()

    def loss(w):
        return (y - x @ w).square().sum() / (2 * len(y))

    # Above 1 / L, L the greatest curvature, FISTA may diverge.
    rate = 1 / torch.linalg.eigvalsh(x.T @ x / len(y)).max()

    def solve(tx):
        w = torch.zeros(x.shape[1], dtype=x.dtype)
        state = tx.init(w)  # One tensor is a tree, too.
        for _ in range(options.steps):
            updates, state = tx.update(grad(loss)(w), state, w)
            w = fr.apply_updates(w, updates)
        return w

    lasso = Lasso(alpha=options.alpha, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(x.numpy(), y.numpy())
    reference = torch.tensor(lasso.coef_)
    columns = {
        "scikit-learn": reference,
        "fista": solve(fr.fista(rate, fr.l1, strength=options.alpha)),
        "prox_sgd": solve(fr.prox_sgd(rate, fr.l1, strength=options.alpha, momentum=0.9)),
    }

    print(f"{'alpha = ' + format(options.alpha, 'g'):12}", *(f"{name:>14}" for name in columns))
    for name, *row in zip(names, *columns.values(), strict=True):
        print(f"{name:12}", *(f"{number:14.8f}" for number in row))
    print(f"{'difference':12}", *(f"{(w - reference).abs().max():14.1e}" for w in columns.values()))
    print(f"{'exact zeros':12}", *(f"{(w == 0).sum():14d}" for w in columns.values()))
    residuals = [fr.kkt_residual(w, grad(loss)(w), fr.l1, strength=options.alpha) for w in columns.values()]
    print(f"{'KKT residual':12}", *(f"{residual:14.1e}" for residual in residuals))

    # From this strength on, all coefficients are zero.
    least = fr.lambda_max(grad(loss)(torch.zeros_like(reference)), fr.l1)
    alphas, _, _ = lasso_path(x.numpy(), y.numpy())
    print(f"\nlambda_max {least:.10f}, scikit-learn's alpha_max {alphas[0]:.10f}")


if __name__ == "__main__":
    main()
