"""Optimizers with the preconditioners of `preconditioners`: chains under optax's names, keywords and defaults."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from funcreg.core._typing import Hyper, Mask, Scalar, Schedule
from funcreg.core.construction import remembered
from funcreg.core.ranges import scalars
from funcreg.transforms.adam_family import (
    scale_by_adam,
    scale_by_adamax,
    scale_by_adan,
    scale_by_belief,
    scale_by_radam,
    scale_by_yogi,
)
from funcreg.transforms.chains import chain
from funcreg.transforms.directions import scale_by_optimistic_gradient
from funcreg.transforms.factory_checks import positive
from funcreg.transforms.optimizers import adam
from funcreg.transforms.preconditioners import scale_by_adadelta, scale_by_novograd, scale_by_sm3
from funcreg.transforms.regularizing import add_decayed_weights
from funcreg.transforms.scaling import scale_by_learning_rate
from funcreg.transforms.transform import Transform

nadam: Callable[..., Transform] = functools.partial(adam, nesterov=True)
nadam.__doc__ = r"""NAdam: `adam` whose mean looks one step ahead.

    The same as `adam(..., nesterov=True)`, with the same arguments.

    `torch.optim.NAdam` is another one, whose momentum grows from half of `b1`; with `momentum_decay=1e6` it does not,
    and takes the same steps.

    Example:
        >>> tx, params = nadam(0.1), {"weight": torch.tensor([1.0])}
        >>> tx.update({"weight": torch.tensor([4.0])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1474])}

    References:
        Dozat, *Incorporating Nesterov momentum into Adam*, 2016.
    """


@remembered
def adamax(learning_rate: Hyper | Schedule, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8) -> Transform:
    r"""Adam with the greatest magnitude for the mean square, :math:`w' = w - \eta \hat m / v`: `torch.optim.Adamax`.

    Args:
        learning_rate: :math:`\eta`.
        b1: Decay of the mean.
        b2: Decay of the greatest magnitude.
        eps: Added to magnitudes.

    Example:
        >>> tx, params = adamax(0.1), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1000,  0.1000])}

    References:
        Kingma & Ba, *Adam: a method for stochastic optimization*, 2015.
    """
    return chain(scale_by_adamax(b1, b2, eps), scale_by_learning_rate(learning_rate))


@remembered
def adamaxw(
    learning_rate: Hyper | Schedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Hyper | Schedule = 1e-4,
    mask: Mask | None = None,
) -> Transform:
    r"""Adamax with decoupled weight decay, :math:`w' = w - \eta (\hat m / v + \lambda w)`.

    Args:
        learning_rate: :math:`\eta`.
        b1: Decay of the mean.
        b2: Decay of the greatest magnitude.
        eps: Added to magnitudes.
        weight_decay: :math:`\lambda`: number, tensor, schedule, or a tree of them like the parameters.
        mask: Leaves that decay; True means apply.

    Example:
        >>> tx, params = adamaxw(0.1, weight_decay=0.5), {"weight": torch.tensor([1.0, 1.0])}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1500,  0.0500])}

    References:
        Loshchilov & Hutter, *Decoupled weight decay regularization*, 2019.
    """
    direction = scale_by_adamax(b1, b2, eps)
    return chain(direction, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate))


@remembered
def adabelief(
    learning_rate: Hyper | Schedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-16,
    eps_root: Scalar = 1e-16,
    *,
    nesterov: bool = False,
) -> Transform:
    r"""AdaBelief: Adam that divides by how far gradients are from their mean.

    Args:
        learning_rate: :math:`\eta`.
        b1: Decay of the mean.
        b2: Decay of the mean square of distances.
        eps: Added to the root; 1e-8 in the paper.
        eps_root: Added to the mean square at every step.
        nesterov: Whether the mean looks one step ahead.

    Example:
        >>> tx, params = adabelief(0.1), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1111,  0.1111])}

    References:
        Zhuang et al., *AdaBelief optimizer: adapting stepsizes by the belief in observed gradients*, 2020.
    """
    direction = scale_by_belief(b1, b2, eps, eps_root, nesterov=nesterov)
    return chain(direction, scale_by_learning_rate(learning_rate))


@remembered
def yogi(learning_rate: Hyper | Schedule, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-3) -> Transform:
    r"""Yogi: Adam with a mean square that moves by steps of one size, and so does not forget at once.

    Args:
        learning_rate: :math:`\eta`.
        b1: Decay of the mean.
        b2: Decay of the mean square.
        eps: Added to the root.

    Example:
        >>> tx, params = yogi(0.1), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1000,  0.0944])}

    References:
        Zaheer, Reddi, Sachan, Kale & Kumar, *Adaptive methods for nonconvex optimization*, 2018.
    """
    return chain(scale_by_yogi(b1, b2, eps), scale_by_learning_rate(learning_rate))


@remembered
def radam(
    learning_rate: Hyper | Schedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    *,
    nesterov: bool = False,
) -> Transform:
    r"""Rectified Adam, which begins as descent with momentum and divides once the mean square is to be trusted.

    `torch.optim.RAdam` adds :math:`\epsilon` to the root of the mean square before that is corrected; with
    :math:`\epsilon = 0` both take the same steps.

    Args:
        learning_rate: :math:`\eta`.
        b1: Decay of the mean.
        b2: Decay of the mean square.
        eps: :math:`\epsilon`, added to the root.
        eps_root: Added below the root.
        threshold: From which length of the moving average it divides, at least 4; see `scale_by_radam`.
        nesterov: Whether the mean looks one step ahead.

    Example:
        >>> tx, params = radam(0.1), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.4000,  0.0100])}

    References:
        Liu et al., *On the variance of the adaptive learning rate and beyond*, 2020.
    """
    direction = scale_by_radam(b1, b2, eps, eps_root, threshold, nesterov=nesterov)
    return chain(direction, scale_by_learning_rate(learning_rate))


@remembered
def novograd(
    learning_rate: Hyper | Schedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.25,
    eps: Scalar = 1e-6,
    eps_root: Scalar = 0.0,
    weight_decay: Hyper | Schedule = 0.0,
) -> Transform:
    r"""NovoGrad: momentum of gradients over the norm of each leaf's, and of the decay.

    Args:
        learning_rate: :math:`\eta`.
        b1: Decay of the momentum.
        b2: Decay of the mean squared norm.
        eps: Added to the root.
        eps_root: Added below the root.
        weight_decay: :math:`\lambda`, in the momentum: number, tensor, schedule, or a tree of them like the parameters.

    Example:
        >>> tx, params = novograd(0.1), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([3.0, -4.0])}, tx.init(params), params)[0]
        {'weight': tensor([-0.0600,  0.0800])}

    References:
        Ginsburg et al., *Stochastic gradient methods with layer-wise adaptive moments for training of deep networks*,
        2019.
    """
    direction = scale_by_novograd(b1, b2, eps, eps_root, weight_decay)
    return chain(direction, scale_by_learning_rate(learning_rate))


@remembered
def adan(
    learning_rate: Hyper | Schedule,
    b1: Scalar = 0.98,
    b2: Scalar = 0.92,
    b3: Scalar = 0.99,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 1e-8,
    weight_decay: Hyper | Schedule = 0.0,
    mask: Mask | None = None,
) -> Transform:
    r"""Adan: Adam with a Nesterov momentum of the changes of gradients, and decoupled weight decay.

    Args:
        learning_rate: :math:`\eta`.
        b1: Decay of the mean.
        b2: Decay of the mean of changes.
        b3: Decay of the mean square.
        eps: Added to the root.
        eps_root: Added below the root.
        weight_decay: :math:`\lambda`: number, tensor, schedule, or a tree of them like the parameters.
        mask: Leaves that decay; True means apply.

    Example:
        >>> tx, params = adan(0.1, weight_decay=0.5), {"weight": torch.tensor([1.0, 1.0])}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1500,  0.0500])}

    References:
        Xie, Zhou, Li, Lin & Yan, *Adan: adaptive Nesterov momentum algorithm for faster optimizing deep models*, 2022.
    """
    direction = scale_by_adan(b1, b2, b3, eps, eps_root)
    return chain(direction, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate))


@remembered
def adadelta(
    learning_rate: Hyper | Schedule | None = None,
    rho: Scalar = 0.9,
    eps: Scalar = 1e-6,
    weight_decay: Hyper | Schedule = 0.0,
    weight_decay_mask: Mask | None = None,
) -> Transform:
    r"""Adadelta: steps of the size of those before them; `torch.optim.Adadelta`, whose rate is 1 by default.

    Args:
        learning_rate: :math:`\eta`. None, optax's default with which updates go uphill, is refused.
        rho: Decay of the mean squares of gradients and of steps.
        eps: :math:`\epsilon`, above 0.
        weight_decay: :math:`\lambda` of :math:`g + \lambda w`, which is L2 regularization: number, tensor, schedule, or
            a tree of them like the parameters.
        weight_decay_mask: Leaves that decay; True means apply.

    Example:
        >>> tx, params = adadelta(1.0, rho=0.75, eps=1.0), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -4.0])}, tx.init(params), params)[0]
        {'weight': tensor([-1.7889,  1.7889])}

    References:
        Zeiler, *Adadelta: an adaptive learning rate method*, 2012.
    """
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_adadelta(rho, eps),
        scale_by_learning_rate(learning_rate),
    )


@remembered
def sm3(learning_rate: Hyper | Schedule, momentum: Scalar = 0.9) -> Transform:
    r"""SM3: Adagrad that keeps a vector for each dimension of a leaf in place of a sum for each entry, with a mean.

    Args:
        learning_rate: :math:`\eta`.
        momentum: Decay of the mean.

    Example:
        >>> tx, params = sm3(0.1, momentum=0.5), {"weight": torch.zeros(2, 2)}
        >>> tx.update({"weight": torch.tensor([[4.0, 1.0], [-1.0, 2.0]])}, tx.init(params), params)[0]
        {'weight': tensor([[-0.0500, -0.0500],
                [ 0.0500, -0.0500]])}

    References:
        Anil, Gupta, Koren & Singer, *Memory-efficient adaptive optimization*, 2019.
    """
    return chain(scale_by_sm3(momentum), scale_by_learning_rate(learning_rate))


# In games


@remembered
def optimistic_adam(
    learning_rate: Scalar,
    optimism: Scalar | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = True,
) -> Transform:
    r"""Adam that adds the last change of its direction, :math:`w' = w - (\eta + \omega) d_t + \omega d_{t-1}`.

    Optax gives it up for `optimistic_adam_v2`, which takes schedules.

    Args:
        learning_rate: :math:`\eta`, a number or a 0-dim tensor.
        optimism: :math:`\omega`; None for :math:`\eta`.
        b1: Decay of the mean.
        b2: Decay of the mean square.
        eps: Added to the root.
        eps_root: Added below the root.
        mu_dtype: Dtype in which the mean is kept.
        nesterov: Whether the mean looks one step ahead.

    Example:
        >>> tx, params = optimistic_adam(0.1, nesterov=False), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1000,  0.1000])}

    References:
        Daskalakis, Ilyas, Syrgkanis & Zeng, *Training GANs with optimism*, 2018.
    """
    if callable(learning_rate):
        raise TypeError(
            f"learning_rate is the function {learning_rate!r}; expected a number or a tensor. It follows no "
            "schedule; optimistic_adam_v2 takes schedules"
        )
    (learning_rate,) = scalars(learning_rate=learning_rate)
    positive(learning_rate=learning_rate)
    direction = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    ahead = scale_by_optimistic_gradient(learning_rate, learning_rate if optimism is None else optimism)
    return chain(direction, ahead, scale_by_learning_rate(1.0))


@remembered
def optimistic_adam_v2(
    learning_rate: Hyper | Schedule,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 1.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    nesterov: bool = True,
) -> Transform:
    r"""Adam that adds the last change of its direction, :math:`w' = w - \eta ((\alpha + \beta) d_t - \beta d_{t-1})`.

    Args:
        learning_rate: :math:`\eta`.
        alpha: :math:`\alpha`, the weight of the direction.
        beta: :math:`\beta`, the weight of its change.
        b1: Decay of the mean.
        b2: Decay of the mean square.
        eps: Added to the root.
        eps_root: Added below the root.
        mu_dtype: Dtype in which the mean is kept.
        nesterov: Whether the mean looks one step ahead.

    Example:
        >>> tx, params = optimistic_adam_v2(0.1, nesterov=False), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1000,  0.1000])}

    References:
        Daskalakis, Ilyas, Syrgkanis & Zeng, *Training GANs with optimism*, 2018.
    """
    direction = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return chain(direction, scale_by_optimistic_gradient(alpha, beta), scale_by_learning_rate(learning_rate))
