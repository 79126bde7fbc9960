"""Optimizers: chains of transforms under optax's names, keywords and defaults.

Each ends with `scale_by_learning_rate`, so that `apply_updates` descends. A learning rate may be a number, a
tensor, a schedule, or a tree of them like the parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from funcreg.core._typing import Hyper, Mask, Scalar, Schedule
from funcreg.core.construction import remembered
from funcreg.core.ranges import flags
from funcreg.transforms.adam_family import scale_by_adam, scale_by_amsgrad
from funcreg.transforms.chains import chain
from funcreg.transforms.factory_checks import without_momentum
from funcreg.transforms.preconditioners import scale_by_rms, scale_by_rss, scale_by_stddev
from funcreg.transforms.regularizing import add_decayed_weights
from funcreg.transforms.scaling import scale_by_learning_rate, scale_by_lion, scale_by_trust_ratio, trace
from funcreg.transforms.transform import Transform, identity


@remembered
def sgd(
    learning_rate: Hyper | Schedule,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    accumulator_dtype: torch.dtype | None = None,
) -> Transform:
    r"""Stochastic gradient descent, :math:`w' = w - \eta m`, with momentum :math:`m_t = g_t + \beta m_{t-1}`.

    The same as `torch.optim.SGD`; for its `weight_decay` put `add_decayed_weights` before it in a chain.

    Args:
        learning_rate: :math:`\eta`.
        momentum: :math:`\beta`; None for plain descent.
        nesterov: Whether the step follows :math:`g_t + \beta m_t`.
        accumulator_dtype: Dtype of the momentum; by default that of the parameter, float32 for 16-bit ones.

    Example:
        >>> tx, params = sgd(0.1), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.4000,  0.0100])}
    """
    flags(nesterov=nesterov)
    without_momentum(momentum, nesterov=nesterov, accumulator_dtype=accumulator_dtype)
    direction = identity() if momentum is None else trace(momentum, nesterov, accumulator_dtype)
    return chain(direction, scale_by_learning_rate(learning_rate))


@remembered
def adam(
    learning_rate: Hyper | Schedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
    nu_dtype: torch.dtype | None = None,
) -> Transform:
    r"""Adam, :math:`w' = w - \eta \hat m / (\sqrt{\hat v} + \epsilon)`: `torch.optim.Adam` without decay.

    Args:
        learning_rate: :math:`\eta`.
        b1: Decay of the mean.
        b2: Decay of the mean square.
        eps: :math:`\epsilon`, added to the root.
        eps_root: Added below the root.
        mu_dtype: Dtype in which the mean is kept.
        nesterov: Whether the mean looks one step ahead (NAdam).
        nu_dtype: Dtype in which the mean square is kept, as in `scale_by_adam`.

    Example:
        >>> tx, params = adam(0.1), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1000,  0.1000])}

    References:
        Kingma & Ba, *Adam: a method for stochastic optimization*, 2015.
    """
    direction = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, nu_dtype=nu_dtype)
    return chain(direction, scale_by_learning_rate(learning_rate))


@remembered
def adamw(
    learning_rate: Hyper | Schedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    weight_decay: Hyper | Schedule = 1e-4,
    mask: Mask | None = None,
    *,
    nesterov: bool = False,
    nu_dtype: torch.dtype | None = None,
) -> Transform:
    r"""Adam with decoupled weight decay, :math:`w' = w - \eta (\hat m / (\sqrt{\hat v} + \epsilon) + \lambda w)`.

    The default decay is optax's 1e-4; that of `torch.optim.AdamW` is 1e-2. Of bfloat16 parameters a step of less than
    1/512 of a weight is rounded away, which is all of such a decay: `with_master_weights(adamw(...))` and
    `with_stochastic_rounding` keep it.

    Args:
        learning_rate: :math:`\eta`.
        b1: Decay of the mean.
        b2: Decay of the mean square.
        eps: :math:`\epsilon`, added to the root.
        eps_root: Added below the root.
        mu_dtype: Dtype in which the mean is kept.
        weight_decay: :math:`\lambda`: number, tensor, schedule, or a tree of them like the parameters.
        mask: Leaves that decay; True means apply.
        nesterov: Whether the mean looks one step ahead (NAdamW).
        nu_dtype: Dtype in which the mean square is kept, as in `scale_by_adam`.

    Example:
        >>> tx, params = adamw(0.1, weight_decay=0.5), {"weight": torch.tensor([1.0, 1.0])}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1500,  0.0500])}

    References:
        Loshchilov & Hutter, *Decoupled weight decay regularization*, 2019.
    """
    direction = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, nu_dtype=nu_dtype)
    return chain(direction, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate))


nadamw: Callable[..., Transform] = functools.partial(adamw, nesterov=True)
nadamw.__doc__ = r"""NAdam with decoupled weight decay: `adamw` whose mean looks one step ahead.

    The same as `adamw(..., nesterov=True)`, with the same arguments.

    Example:
        >>> tx, params = nadamw(0.1, weight_decay=0.5), {"weight": torch.tensor([1.0])}
        >>> tx.update({"weight": torch.tensor([4.0])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1974])}

    References:
        Dozat, *Incorporating Nesterov momentum into Adam*, 2016.
    """


@remembered
def amsgrad(
    learning_rate: Hyper | Schedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    nu_dtype: torch.dtype | None = None,
) -> Transform:
    r"""Adam with the greatest mean square so far, :math:`w' = w - \eta \hat m / (\sqrt{\max_s \hat v_s} + \epsilon)`.

    Args:
        learning_rate: :math:`\eta`.
        b1: Decay of the mean.
        b2: Decay of the mean square.
        eps: :math:`\epsilon`, added to the root.
        eps_root: Added below the root.
        mu_dtype: Dtype in which the mean is kept.
        bias_correction_mu: Whether the mean is corrected.
        bias_correction_nu: Whether the mean square is corrected.
        nu_dtype: Dtype in which the mean square is kept, as in `scale_by_adam`.

    Example:
        >>> tx, params = amsgrad(0.1), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1000,  0.1000])}

    References:
        Reddi, Kale & Kumar, *On the convergence of Adam and beyond*, 2018.
    """
    direction = scale_by_amsgrad(
        b1, b2, eps, eps_root, mu_dtype, bias_correction_mu, bias_correction_nu, nu_dtype=nu_dtype
    )
    return chain(direction, scale_by_learning_rate(learning_rate))


@remembered
def lion(
    learning_rate: Hyper | Schedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: torch.dtype | None = None,
    weight_decay: Hyper | Schedule = 1e-3,
    mask: Mask | None = None,
) -> Transform:
    r"""Lion, :math:`w' = w - \eta (\operatorname{sign}(\beta_1 m + (1 - \beta_1) g) + \lambda w)`.

    Args:
        learning_rate: :math:`\eta`; about a tenth of Adam's.
        b1: Share of the momentum in the direction.
        b2: Decay of the momentum.
        mu_dtype: Dtype in which the momentum is kept.
        weight_decay: :math:`\lambda`: number, tensor, schedule, or a tree of them like the parameters.
        mask: Leaves that decay; True means apply.

    Example:
        >>> tx, params = lion(0.1, weight_decay=0.5), {"weight": torch.tensor([1.0, 1.0])}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1500,  0.0500])}

    References:
        Chen et al., *Symbolic discovery of optimization algorithms*, 2023.
    """
    direction = scale_by_lion(b1, b2, mu_dtype)
    return chain(direction, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate))


@remembered
def rmsprop(
    learning_rate: Hyper | Schedule,
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    nu_dtype: torch.dtype | None = None,
) -> Transform:
    r"""RMSprop, :math:`w' = w - \eta g / \sqrt{v + \epsilon}`, with momentum after the learning rate.

    `torch.optim.RMSprop` is this with `eps_in_sqrt=False` and `decay=0.99`.

    Args:
        learning_rate: :math:`\eta`.
        decay: Decay of the mean square.
        eps: :math:`\epsilon`.
        initial_scale: First mean square.
        eps_in_sqrt: Whether :math:`\epsilon` stands below the root.
        centered: Whether to divide by the standard deviation instead.
        momentum: Decay of a momentum; None for none.
        nesterov: Whether that momentum is Nesterov's.
        bias_correction: Whether the mean square is corrected.
        nu_dtype: Dtype in which the mean square is kept, as in `scale_by_adam`.

    Example:
        >>> tx, params = rmsprop(0.1, decay=0.75), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.2000,  0.2000])}

    References:
        Tieleman & Hinton, *Lecture 6.5: rmsprop*, 2012.
    """
    flags(centered=centered, nesterov=nesterov)
    without_momentum(momentum, nesterov=nesterov)
    preconditioner = scale_by_stddev if centered else scale_by_rms
    return chain(
        preconditioner(decay, eps, initial_scale, eps_in_sqrt, bias_correction, nu_dtype=nu_dtype),
        scale_by_learning_rate(learning_rate),
        identity() if momentum is None else trace(momentum, nesterov),
    )


@remembered
def adagrad(learning_rate: Hyper | Schedule, initial_accumulator_value: Scalar = 0.1, eps: Scalar = 1e-7) -> Transform:
    r"""Adagrad, :math:`w' = w - \eta g / \sqrt{\sum_s g_s^2 + \epsilon}`.

    `torch.optim.Adagrad` starts from 0 and adds :math:`\epsilon` to the root.

    Args:
        learning_rate: :math:`\eta`.
        initial_accumulator_value: First sum of squares.
        eps: :math:`\epsilon`, below the root.

    Example:
        >>> tx, params = adagrad(0.1, initial_accumulator_value=0.0), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -1.0])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1000,  0.1000])}

    References:
        Duchi, Hazan & Singer, *Adaptive subgradient methods for online learning and stochastic optimization*, 2011.
    """
    return chain(scale_by_rss(initial_accumulator_value, eps), scale_by_learning_rate(learning_rate))


@remembered
def lamb(
    learning_rate: Hyper | Schedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    eps_root: Scalar = 0.0,
    weight_decay: Hyper | Schedule = 0.0,
    mask: Mask | None = None,
    *,
    mu_dtype: torch.dtype | None = None,
    nu_dtype: torch.dtype | None = None,
) -> Transform:
    r"""LAMB: AdamW whose step in each leaf has the size of the leaf, :math:`w' = w - \eta \frac{\|w\|}{\|u\|} u`.

    Args:
        learning_rate: :math:`\eta`.
        b1: Decay of the mean.
        b2: Decay of the mean square.
        eps: :math:`\epsilon`, added to the root.
        eps_root: Added below the root.
        weight_decay: :math:`\lambda`: number, tensor, schedule, or a tree of them like the parameters.
        mask: Leaves that decay; True means apply.
        mu_dtype: Dtype in which the mean is kept.
        nu_dtype: Dtype in which the mean square is kept, as in `scale_by_adam`.

    Example:
        >>> tx, params = lamb(0.1), {"weight": torch.tensor([3.0, 4.0])}
        >>> tx.update({"weight": torch.tensor([7.0, 7.0])}, tx.init(params), params)[0]
        {'weight': tensor([-0.3536, -0.3536])}

    References:
        You et al., *Large batch optimization for deep learning: training BERT in 76 minutes*, 2020.
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nu_dtype=nu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
    )
