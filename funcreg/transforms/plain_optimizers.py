"""Optimizers without a preconditioner: of signs, of norms of leaves, of noise, or of gradients before, as in optax."""

from __future__ import annotations

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Scalar, Schedule
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute
from funcreg.core.rounding import one_key
from funcreg.transforms.chains import chain
from funcreg.transforms.combine import masked
from funcreg.transforms.directions import scale_by_optimistic_gradient, scale_by_rprop
from funcreg.transforms.factory_checks import below_one, finite_nonnegative, without_momentum
from funcreg.transforms.noise import add_noise, differentially_private_aggregate
from funcreg.transforms.regularizing import add_decayed_weights
from funcreg.transforms.scaling import ema, scale, scale_by_learning_rate, scale_by_sign, scale_by_trust_ratio, trace
from funcreg.transforms.transform import Transform, identity, scheduled

# Signs


@remembered
def sign_sgd(learning_rate: Hyper | Schedule) -> Transform:
    r"""Descent along the signs of gradients, :math:`w' = w - \eta \operatorname{sign}(g)`.

    Args:
        learning_rate: :math:`\eta`, by which each entry moves.

    Example:
        >>> tx, params = sign_sgd(0.1), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1000,  0.1000])}

    References:
        Bernstein, Wang, Azizzadenesheli & Anandkumar, *signSGD: compressed optimisation for non-convex problems*, 2018.
    """
    return chain(scale_by_sign(), scale_by_learning_rate(learning_rate))


@remembered
def signum(
    learning_rate: Hyper | Schedule, beta: Scalar = 0.9, accumulator_dtype: torch.dtype | None = None
) -> Transform:
    r"""Descent along the signs of a mean of gradients, :math:`w' = w - \eta \operatorname{sign}(m)`.

    Args:
        learning_rate: :math:`\eta`, by which each entry moves.
        beta: Decay of the mean :math:`m`.
        accumulator_dtype: Dtype of the mean; by default that of the parameter, float32 for 16-bit ones.

    Example:
        >>> tx, params = signum(0.1), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.1000,  0.1000])}

    References:
        Bernstein, Wang, Azizzadenesheli & Anandkumar, *signSGD: compressed optimisation for non-convex problems*, 2018.
    """
    mean = ema(beta, debias=False, accumulator_dtype=accumulator_dtype)
    return chain(mean, scale_by_sign(), scale_by_learning_rate(learning_rate))


@remembered
def rprop(
    learning_rate: Scalar,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step_size: Scalar = 1e-6,
    max_step_size: Scalar = 50.0,
) -> Transform:
    r"""Rprop: a step for each entry along the sign of its gradient, which grows while the sign stays.

    As in optax 0.2.8 every step is the one that the gradient *before* asked for; see `scale_by_rprop`.
    `torch.optim.Rprop` goes at once, so that paths differ.

    Args:
        learning_rate: First step size, above 0; it follows no schedule.
        eta_minus: Factor of a step size where a sign turns, above 0 and below 1.
        eta_plus: Factor where it stays, above 1.
        min_step_size: Least step size.
        max_step_size: Greatest step size.

    Example:
        >>> tx, params = rprop(0.1), {"weight": torch.zeros(2)}
        >>> _, state = tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)
        >>> tx.update({"weight": torch.tensor([3.0, 0.2])}, state, params)[0]
        {'weight': tensor([-0.1000, -0.0000])}

    References:
        Riedmiller & Braun, *A direct adaptive method for faster backpropagation learning: the RPROP algorithm*, 1993.
    """
    return chain(scale_by_rprop(learning_rate, eta_minus, eta_plus, min_step_size, max_step_size), scale(-1.0))


# Norms


@remembered
def lars(
    learning_rate: Hyper | Schedule,
    weight_decay: Hyper | Schedule = 0.0,
    weight_decay_mask: Mask | None = True,
    trust_coefficient: Scalar = 0.001,
    eps: Scalar = 0.0,
    trust_ratio_mask: Mask = True,
    momentum: Scalar = 0.9,
    nesterov: bool = False,
) -> Transform:
    r"""LARS: descent whose step in each leaf has a share of the size of the leaf, with momentum after the rate.

    .. math:: m_t = \beta m_{t-1} - \eta c \frac{\|w\|}{\|u\| + \epsilon} u, \quad u = g + \lambda w

    A leaf whose norm, or whose gradient's norm, is zero takes its plain step.

    Args:
        learning_rate: :math:`\eta`.
        weight_decay: :math:`\lambda`: number, tensor, schedule, or a tree of them like the parameters.
        weight_decay_mask: Leaves that decay; True means apply.
        trust_coefficient: :math:`c`, the share.
        eps: :math:`\epsilon`.
        trust_ratio_mask: Leaves whose steps are scaled; biases and norms are often left out, as by `matrices`.
        momentum: Decay :math:`\beta` of the momentum.
        nesterov: Whether the momentum is Nesterov's.

    Example:
        >>> tx, params = lars(1.0), {"weight": torch.tensor([30.0, 40.0])}
        >>> tx.update({"weight": torch.tensor([0.0, 7.0])}, tx.init(params), params)[0]
        {'weight': tensor([ 0.0000, -0.0500])}

    References:
        You, Gitman & Ginsburg, *Large batch training of convolutional networks*, 2017.
    """
    if momentum is None:
        raise TypeError("momentum is None; expected a number from 0 to below 1. lars without momentum has momentum=0.0")
    below_one(momentum=momentum)
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        masked(scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps), trust_ratio_mask),
        scale_by_learning_rate(learning_rate),
        trace(momentum, nesterov),
    )


@remembered
def fromage(learning_rate: Hyper | Schedule, min_norm: Scalar = 1e-6) -> Transform:
    r"""Fromage: a step of the size of each leaf, and back so far that leaves do not grow.

    .. math:: w' = \frac{1}{\sqrt{1 + \eta^2}} \left(w - \eta \frac{\|w\|}{\|g\|} g\right)

    Args:
        learning_rate: :math:`\eta`.
        min_norm: Least norm of a leaf and of its gradient.

    Example:
        >>> tx, params = fromage(0.75), {"weight": torch.tensor([3.0, 4.0])}
        >>> updates, state = tx.update({"weight": torch.tensor([0.5, 0.0])}, tx.init(params), params)
        >>> apply_updates(params, updates)
        {'weight': tensor([-0.6000,  3.2000])}

    References:
        Bernstein, Vahdat, Yue & Liu, *On the distance between two neural networks and the stability of learning*, 2020.
    """
    finite_nonnegative(learning_rate=learning_rate)

    def back(u: Tensor, w: Tensor, rate: Scalar) -> Tensor:
        factor = (1 + rate * rate) ** -0.5
        # factor - 1, without the difference of two numbers near 1.
        return -rate * factor * u - (rate * factor) ** 2 / (1 + factor) * w

    rule = lambda updates, params, rate: compute(back, updates, params, hyper=(rate,))
    return chain(scale_by_trust_ratio(min_norm), scheduled(rule, learning_rate, descends=True, stages=["steps"]))


# Noise and gradients before


@remembered
def noisy_sgd(
    learning_rate: Hyper | Schedule,
    eta: Scalar | Schedule = 0.01,
    gamma: Scalar = 0.55,
    key: int | Tensor | torch.Generator | None = None,
    *,
    seed: int | Tensor | torch.Generator | None = None,
) -> Transform:
    r"""Descent with noise in gradients, :math:`w' = w - \alpha (g + \sqrt{\eta / t^\gamma} \, \xi)`.

    The noise is that of `add_noise`: a function of the key, the step and the place, and not that of optax.

    Args:
        learning_rate: :math:`\alpha`.
        eta: :math:`\eta`: variance of the noise at the first step.
        gamma: :math:`\gamma`: how fast the variance falls.
        key: Where the noise comes from: an int, a 0-dim tensor of an integer, or a generator.
        seed: Another name of `key`; one of them is given.

    Example:
        >>> tx, params = noisy_sgd(0.1, key=0), {"weight": torch.zeros(10_000)}
        >>> updates, state = tx.update({"weight": torch.ones(10_000)}, tx.init(params), params)
        >>> round(float(updates["weight"].mean()), 2), round(float(updates["weight"].std()), 2)
        (-0.1, 0.01)

    References:
        Neelakantan and others, *Adding gradient noise improves learning for very deep networks*, 2015.
    """
    key = one_key("noisy_sgd", key, seed)
    return chain(add_noise(eta, gamma, key), scale_by_learning_rate(learning_rate))


@remembered
def optimistic_gradient_descent(learning_rate: Hyper | Schedule, alpha: Scalar = 1.0, beta: Scalar = 1.0) -> Transform:
    r"""Descent that adds the last change of the gradient, :math:`w' = w - \eta ((\alpha + \beta) g_t - \beta g_{t-1})`.

    Args:
        learning_rate: :math:`\eta`.
        alpha: :math:`\alpha`, the weight of the gradient.
        beta: :math:`\beta`, the weight of its change.

    Example:
        A game: one player lowers :math:`x y`, the other one raises it. Both come to the saddle point.

        >>> tx, params = optimistic_gradient_descent(0.3), {"x": torch.ones(1), "y": torch.ones(1)}
        >>> state = tx.init(params)
        >>> for _ in range(400):
        ...     updates, state = tx.update({"x": params["y"], "y": -params["x"]}, state, params)
        ...     params = apply_updates(params, updates)
        >>> bool(global_norm(params) < 1e-3)
        True

    References:
        Mokhtari, Ozdaglar & Pattathil, *A unified analysis of extra-gradient and optimistic gradient methods for saddle
        point problems*, 2020.
    """
    return chain(scale_by_optimistic_gradient(alpha, beta), scale_by_learning_rate(learning_rate))


@remembered
def dpsgd(
    learning_rate: Hyper | Schedule,
    l2_norm_clip: Scalar,
    noise_multiplier: Scalar,
    seed: int | Tensor | torch.Generator,
    momentum: Scalar | None = None,
    nesterov: bool = False,
) -> Transform:
    r"""DP-SGD, `sgd` with `differentially_private_aggregate`: descent along noisy means of clipped gradients.

    Updates are gradients of single examples, trees with one more dimension, the first. It counts no privacy that is
    spent.

    Args:
        learning_rate: :math:`\eta`.
        l2_norm_clip: Greatest norm of one example's gradient.
        noise_multiplier: Standard deviation of the noise of their sum, in units of that norm.
        seed: Where the noise comes from: an int, a 0-dim tensor of an integer, or a generator.
        momentum: Decay of the momentum; None for none.
        nesterov: Whether the momentum is Nesterov's.

    Example:
        >>> tx, params = dpsgd(1.0, 1.0, 0.0, seed=0), {"w": torch.zeros(2)}
        >>> tx.update({"w": torch.tensor([[3.0, 4.0], [0.2, 0.0]])}, tx.init(params), params)[0]
        {'w': tensor([-0.4000, -0.4000])}

    References:
        Abadi et al., *Deep learning with differential privacy*, 2016.
    """
    without_momentum(momentum, nesterov=nesterov)
    return chain(
        differentially_private_aggregate(l2_norm_clip, noise_multiplier, seed),
        identity() if momentum is None else trace(momentum, nesterov),
        scale_by_learning_rate(learning_rate),
    )
