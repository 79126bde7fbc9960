r"""What a strength means elsewhere: converters to the `alpha` and `rho` of `elastic`.

All are for a loss that is a mean over the samples plus a penalty,
:math:`\frac{1}{n} \sum_i \ell_i + \text{elastic}(w, \alpha, \rho)`.
"""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Scalar
from funcreg.core.ranges import scalars
from funcreg.transforms.factory_checks import finite_nonnegative, positive, share


class Elastic(NamedTuple):
    r"""The hyperparameters of `elastic`: :math:`\alpha (\rho \|w\|_1 + \frac{1 - \rho}{2} \|w\|_2^2)`.

    Example:
        >>> elastic({"weight": torch.tensor([3.0, -4.0])}, *Elastic(alpha=0.1, rho=0.5))
        tensor(0.9750)
    """

    alpha: Scalar  # Strength.
    rho: Scalar  # Share of the l1 term.


def _samples(n_samples: float) -> None:
    """Raise an error unless this may be a number of samples, or the sum of their weights."""
    if isinstance(n_samples, bool) or not isinstance(n_samples, numbers.Real):
        raise TypeError(f"n_samples is {n_samples!r}; expected a number, len(x), or sum(sample_weight)")
    positive(n_samples=n_samples)


def elastic_from_torch(weight_decay: Scalar) -> Elastic:
    r"""From `weight_decay` of `torch.optim` or optax: :math:`\frac{\lambda}{2} \|w\|_2^2`, gradient :math:`\lambda w`.

    Args:
        weight_decay: :math:`\lambda`, as in `torch.optim.SGD` or `Adam`; in AdamW it is no penalty of the loss.

    Example:
        >>> elastic_from_torch(weight_decay=0.01)
        Elastic(alpha=0.01, rho=0.0)
    """
    finite_nonnegative(weight_decay=weight_decay)
    (weight_decay,) = scalars(weight_decay=weight_decay)
    return Elastic(weight_decay, 0.0)


def elastic_from_keras(l1: Scalar = 0.0, l2: Scalar = 0.0) -> Elastic:
    r"""From `keras.regularizers.L1L2`: :math:`\lambda_1 \|w\|_1 + \lambda_2 \|w\|_2^2`, without one half.

    Args:
        l1: :math:`\lambda_1`.
        l2: :math:`\lambda_2`.

    Example:
        >>> elastic_from_keras(l1=0.5, l2=0.25)
        Elastic(alpha=1.0, rho=0.5)
    """
    finite_nonnegative(l1=l1, l2=l2)
    l1, l2 = scalars(l1=l1, l2=l2)
    alpha = l1 + 2 * l2
    if isinstance(alpha, Tensor):
        return Elastic(alpha, torch.where(alpha == 0, 0.0, l1 / torch.where(alpha == 0, 1.0, alpha)))
    return Elastic(alpha, l1 / alpha if alpha else 0.0)


def elastic_from_sklearn(alpha: Scalar, l1_ratio: Scalar = 1.0) -> Elastic:
    r"""From `sklearn.linear_model.ElasticNet` or `Lasso`, whose loss is :math:`\frac{1}{2 n} \|y - X w\|^2`.

    Args:
        alpha: Strength.
        l1_ratio: Share of the :math:`\ell_1` term, from 0 to 1; 1 is the lasso.

    Example:
        >>> elastic_from_sklearn(alpha=0.1, l1_ratio=0.5)
        Elastic(alpha=0.1, rho=0.5)
    """
    finite_nonnegative(alpha=alpha)
    share(l1_ratio=l1_ratio)
    alpha, l1_ratio = scalars(alpha=alpha, l1_ratio=l1_ratio)
    return Elastic(alpha, l1_ratio)


def elastic_from_sklearn_ridge(alpha: Scalar, n_samples: float) -> Elastic:
    r"""From `sklearn.linear_model.Ridge`, whose :math:`\|y - X w\|^2 + \alpha \|w\|^2` is not divided by the samples.

    The loss that goes with the result is :math:`\frac{1}{2 n} \|y - X w\|^2`.

    Args:
        alpha: Strength.
        n_samples: Number of samples :math:`n`; with `sample_weight` the sum of the weights.

    Example:
        >>> elastic_from_sklearn_ridge(alpha=2.0, n_samples=100)
        Elastic(alpha=0.02, rho=0.0)
    """
    finite_nonnegative(alpha=alpha)
    (alpha,) = scalars(alpha=alpha)
    _samples(n_samples)
    return Elastic(alpha / n_samples, 0.0)


def elastic_from_sklearn_logistic(C: Scalar, n_samples: float, l1_ratio: Scalar = 0.0) -> Elastic:
    r"""From `sklearn.linear_model.LogisticRegression`, whose :math:`C` multiplies the sum of the losses.

    The loss that goes with the result is the mean cross entropy; the intercept carries no penalty.

    Args:
        C: Inverse strength, above 0.
        n_samples: Number of samples :math:`n`; with `sample_weight` the sum of the weights.
        l1_ratio: Share of the :math:`\ell_1` term, from 0 to 1.

    Example:
        >>> elastic_from_sklearn_logistic(C=0.5, n_samples=100, l1_ratio=1.0)
        Elastic(alpha=0.02, rho=1.0)
    """
    positive(C=C)
    share(l1_ratio=l1_ratio)
    C, l1_ratio = scalars(C=C, l1_ratio=l1_ratio)
    _samples(n_samples)
    return Elastic(1 / (C * n_samples), l1_ratio)


def elastic_from_glmnet(lambda_: Scalar, alpha: Scalar = 1.0) -> Elastic:
    r"""From glmnet's `lambda` and `alpha`, with `standardize=FALSE` and, for a ridge share, responses of unit variance.

    Args:
        lambda_: Strength.
        alpha: Share of the :math:`\ell_1` term, from 0 to 1.

    Example:
        >>> elastic_from_glmnet(0.1, alpha=0.5)
        Elastic(alpha=0.1, rho=0.5)
    """
    finite_nonnegative(lambda_=lambda_)
    share(alpha=alpha)
    lambda_, alpha = scalars(lambda_=lambda_, alpha=alpha)
    return Elastic(lambda_, alpha)
