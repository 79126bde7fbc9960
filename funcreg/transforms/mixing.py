"""Preconditioners whose momentum mixes averages, or comes after the division, with optax's names and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Params, Scalar, Schedule, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute, compute_wide, increment, safe_sqrt, scalar_device, zeros
from funcreg.core.ranges import check_range, flags, scalars
from funcreg.transforms.adam_family import AdamState
from funcreg.transforms.chains import chain
from funcreg.transforms.factory_checks import below_one, dtypes, finite_nonnegative
from funcreg.transforms.moments import adam_metric, average, average_square, bias_correction, real_zeros, stored
from funcreg.transforms.regularizing import add_decayed_weights
from funcreg.transforms.scaling import scale_by_learning_rate
from funcreg.transforms.transform import Transform, at_step, counter, public_state

# AdEMAMix


@public_state
class AdemamixState(NamedTuple):
    """The state of `scale_by_ademamix`.

    Example:
        >>> scale_by_ademamix().init(torch.zeros(1)).m2
        tensor([0.])
    """

    steps: Tensor  # Number of updates made, int32.
    m1: Params  # Fast moving average of updates.
    m2: Params  # Slow moving average of updates.
    nu: Params  # Moving average of their squares.
    weight: Tensor  # Sum of the weights of updates in the slow average.


@remembered
def scale_by_ademamix(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar | Schedule = 0.9999,
    alpha: Scalar | Schedule = 6.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
) -> Transform:
    r"""Adam with a second, slow mean, :math:`(\hat m_1 + \alpha m_2) / (\sqrt{\hat v} + \epsilon)`.

    The slow mean is not corrected for its first value. Its metric, which proximal steps use, takes the weight of both
    means into account, so that a penalty keeps its strength.

    Args:
        b1: Decay of the fast mean :math:`m_1`.
        b2: Decay of the mean square :math:`v`.
        b3: Decay of the slow mean :math:`m_2`: number, tensor or schedule.
        alpha: :math:`\alpha`, share of the slow mean: number of at least 0, tensor or schedule.
        eps: :math:`\epsilon`, added to the root.
        eps_root: Added below the root.
        mu_dtype: Dtype in which means are kept; by default that of the parameter, float32 for 16-bit ones. Mean squares
            stay in float32 at least.

    Example:
        >>> tx, params = scale_by_ademamix(b3=0.5, alpha=2.0), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([ 2.0000, -2.0000])}

    References:
        Pagliardini, Ablin & Grangier, *The AdEMAMix optimizer: better, faster, older*, 2024.
    """
    below_one(b1=b1, b2=b2, b3=b3)
    finite_nonnegative(alpha=alpha, eps=eps, eps_root=eps_root)
    b1, b2, eps, eps_root = scalars(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    _one_for_all(b3=b3, alpha=alpha)
    dtypes(mu_dtype=mu_dtype)

    def init(params: Params) -> AdemamixState:
        weight = torch.zeros((), dtype=torch.float64, device=scalar_device(params))
        return AdemamixState(
            counter(params), zeros(params, mu_dtype), zeros(params, mu_dtype), real_zeros(params), weight
        )

    def update(updates: Updates, state: AdemamixState, params: Params) -> tuple[Updates, AdemamixState]:
        steps, slow, share = increment(state.steps), at_step(b3, state.steps), at_step(alpha, state.steps)
        m1, m2 = average(state.m1, updates, b1), average(state.m2, updates, slow)
        nu = stored(average_square(state.nu, updates, b2), state.nu)
        weight = (slow * state.weight + (1 - slow)).to(state.weight.dtype)
        new = AdemamixState(steps, stored(m1, state.m1), stored(m2, state.m2), nu, weight)
        mixed = compute_wide(lambda a, b, c, s: a / c + s * b, m1, m2, hyper=(bias_correction(b1, steps), share))
        return compute(lambda u, m, h: m / h, updates, mixed, denominators(new)), new

    def denominators(state: AdemamixState) -> Params:
        return adam_metric(state.nu, bias_correction(b2, state.steps), eps, eps_root)

    def metric(state: AdemamixState) -> Params:
        weight = 1 + at_step(alpha, state.steps - 1) * state.weight
        return compute(lambda h, c: h / c, denominators(state), hyper=(weight,))

    return Transform(init, update, metric, state=AdemamixState)


@remembered
def ademamix(
    learning_rate: Hyper | Schedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar | Schedule = 0.9999,
    alpha: Scalar | Schedule = 5.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    weight_decay: Hyper | Schedule = 0.0,
    mask: Mask | None = None,
) -> Transform:
    r"""AdEMAMix, :math:`w' = w - \eta ((\hat m_1 + \alpha m_2) / (\sqrt{\hat v} + \epsilon) + \lambda w)`.

    Args:
        learning_rate: :math:`\eta`.
        b1: Decay of the fast mean :math:`m_1`.
        b2: Decay of the mean square :math:`v`.
        b3: Decay of the slow mean :math:`m_2`: number, tensor or schedule.
        alpha: :math:`\alpha`, share of the slow mean: number of at least 0, tensor or schedule.
        eps: :math:`\epsilon`, added to the root.
        eps_root: Added below the root.
        mu_dtype: Dtype in which means are kept.
        weight_decay: :math:`\lambda`: number, tensor, schedule, or a tree of them like the parameters.
        mask: Leaves that decay; True means apply.

    Example:
        >>> tx, params = ademamix(0.1, b3=0.5, alpha=2.0), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.2000,  0.2000])}

    References:
        Pagliardini, Ablin & Grangier, *The AdEMAMix optimizer: better, faster, older*, 2024.
    """
    direction = scale_by_ademamix(b1, b2, b3, alpha, eps, eps_root, mu_dtype)
    return chain(direction, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate))


def _one_for_all(**hyper: Any) -> None:
    """Raise a TypeError for the first of these that is a tree; schedules are taken."""
    scalars(**{name: value for name, value in hyper.items() if not callable(value)})


@public_state
class SimplifiedAdemamixState(NamedTuple):
    """The state of `scale_by_simplified_ademamix`.

    Example:
        >>> scale_by_simplified_ademamix().init(torch.zeros(1)).m
        tensor([0.])
    """

    steps: Tensor  # Number of updates made, int32.
    m: Params  # Decayed sum of updates.
    nu: Params  # Moving average of their squares.


@remembered
def scale_by_simplified_ademamix(
    b1: Scalar = 0.99,
    b2: Scalar = 0.95,
    alpha: Scalar | Schedule = 0.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
) -> Transform:
    r"""Divide a decayed sum and a share of the update, :math:`(m + \alpha u) / (\sqrt{\hat v} + \epsilon)`.

    The sum :math:`m_t = u_t + \beta_1 m_{t-1}` grows to :math:`1 / (1 - \beta_1)` updates, so that learning rates are a
    hundredth of Adam's. The metric, which proximal steps use, takes that into account.

    Args:
        b1: Decay of the sum :math:`m`.
        b2: Decay of the mean square :math:`v`.
        alpha: :math:`\alpha`, share of the update itself: number of at least 0, tensor or schedule.
        eps: :math:`\epsilon`, added to the root.
        eps_root: Added below the root.

    Example:
        >>> tx, params = scale_by_simplified_ademamix(alpha=1.0), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([ 2.0000, -2.0000])}

    References:
        Morwani et al., *Connections between schedule-free optimizers, AdEMAMix, and accelerated SGD variants*, 2025.
    """
    below_one(b1=b1, b2=b2)
    finite_nonnegative(alpha=alpha, eps=eps, eps_root=eps_root)
    b1, b2, eps, eps_root = scalars(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    _one_for_all(alpha=alpha)

    def init(params: Params) -> SimplifiedAdemamixState:
        return SimplifiedAdemamixState(counter(params), zeros(params), real_zeros(params))

    def update(
        updates: Updates, state: SimplifiedAdemamixState, params: Params
    ) -> tuple[Updates, SimplifiedAdemamixState]:
        share = at_step(alpha, state.steps)
        m = compute_wide(lambda m, u, b: u + b * m, state.m, updates, hyper=(b1,))
        nu = stored(average_square(state.nu, updates, b2), state.nu)
        new = SimplifiedAdemamixState(increment(state.steps), stored(m, state.m), nu)
        return compute(lambda u, m, h, s: (m + s * u) / h, updates, m, denominators(new), hyper=(share,)), new

    def denominators(state: SimplifiedAdemamixState) -> Params:
        return adam_metric(state.nu, bias_correction(b2, state.steps), eps, eps_root)

    def metric(state: SimplifiedAdemamixState) -> Params:
        weight = bias_correction(b1, state.steps) / (1 - b1) + at_step(alpha, state.steps - 1)
        return compute(lambda h, c: h / c, denominators(state), hyper=(weight,))

    return Transform(init, update, metric, state=SimplifiedAdemamixState)


@remembered
def simplified_ademamix(
    learning_rate: Hyper | Schedule,
    b1: Scalar = 0.99,
    b2: Scalar = 0.95,
    alpha: Scalar | Schedule = 0.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: Hyper | Schedule = 0.0,
    mask: Mask | None = None,
) -> Transform:
    r"""AdEMAMix with one buffer, :math:`w' = w - \eta ((m + \alpha g) / (\sqrt{\hat v} + \epsilon) + \lambda w)`.

    The buffer is a sum, :math:`m_t = g_t + \beta_1 m_{t-1}`: learning rates are about :math:`1 - \beta_1` times Adam's.

    Args:
        learning_rate: :math:`\eta`.
        b1: Decay of the sum :math:`m`.
        b2: Decay of the mean square :math:`v`.
        alpha: :math:`\alpha`, share of the gradient itself: number of at least 0, tensor or schedule.
        eps: :math:`\epsilon`, added to the root.
        eps_root: Added below the root.
        weight_decay: :math:`\lambda`: number, tensor, schedule, or a tree of them like the parameters.
        mask: Leaves that decay; True means apply.

    Example:
        >>> tx, params = simplified_ademamix(0.01), {"weight": torch.zeros(2)}
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)[0]
        {'weight': tensor([-0.0100,  0.0100])}

    References:
        Morwani et al., *Connections between schedule-free optimizers, AdEMAMix, and accelerated SGD variants*, 2025.
    """
    direction = scale_by_simplified_ademamix(b1, b2, alpha, eps, eps_root)
    return chain(direction, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate))


# ADOPT


def fourth_root(steps: Any) -> Scalar:
    r"""The bound of ADOPT's ratios, :math:`t^{1/4}`.

    Args:
        steps: :math:`t`, number of steps taken.

    Example:
        >>> fourth_root(torch.tensor(16))
        tensor(2., dtype=torch.float64)
    """
    return (steps.to(torch.float64) if isinstance(steps, Tensor) else torch.tensor(steps, dtype=torch.float64)) ** 0.25


def _bounded(x: Tensor, most: Tensor) -> Tensor:
    if x.is_complex():
        return x * (most / torch.maximum(x.abs(), most)).nan_to_num(0.0)
    return torch.minimum(torch.maximum(x, -most), most)


@remembered
def scale_by_adopt(
    b1: Scalar = 0.9,
    b2: Scalar = 0.9999,
    eps: Scalar = 1e-6,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[Any], Scalar] = fourth_root,
) -> Transform:
    r"""The mean of updates, each divided by the root of the mean square before it, :math:`u / \max(\sqrt v, \epsilon)`.

    An update has no part in what it is divided by. The first one only begins the mean square: it makes no step.

    Args:
        b1: Decay of the mean.
        b2: Decay of the mean square :math:`v`.
        eps: :math:`\epsilon`, the least root, above 0.
        mu_dtype: Dtype in which the mean is kept; by default that of the parameter, float32 for 16-bit ones.
        nesterov: Whether the mean looks one step ahead.
        use_clipping: Whether ratios are bounded.
        clip_value_fn: From the number of steps taken to the greatest ratio.

    Example:
        >>> tx, params = scale_by_adopt(), {"weight": torch.zeros(2)}
        >>> first, state = tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)
        >>> first, tx.update({"weight": torch.tensor([4.0, -0.1])}, state, params)[0]
        ({'weight': tensor([0., 0.])}, {'weight': tensor([ 0.1000, -0.1000])})

    References:
        Taniguchi et al., *ADOPT: modified Adam can converge with any beta2 with the optimal rate*, 2024.
    """
    below_one(b1=b1, b2=b2)
    check_range("eps", eps, 0.0, open_low=True, finite=True)  # With 0 an entry without a gradient would be 0 / 0.
    b1, b2, eps = scalars(b1=b1, b2=b2, eps=eps)
    dtypes(mu_dtype=mu_dtype)
    flags(nesterov=nesterov, use_clipping=use_clipping)
    if not callable(clip_value_fn):
        raise TypeError(
            f"clip_value_fn is {clip_value_fn!r}; expected a function of the number of steps. "
            "For a number, take constant_schedule."
        )

    def init(params: Params) -> AdamState:
        return AdamState(counter(params), zeros(params, mu_dtype), real_zeros(params))

    def ratio(u: Tensor, v: Tensor, least: Scalar, most: Scalar) -> Tensor:
        x = u / torch.maximum(safe_sqrt(v), least + torch.zeros_like(v))
        return _bounded(x, most + torch.zeros_like(v)) if use_clipping else x

    def update(updates: Updates, state: AdamState, params: Params) -> tuple[Updates, AdamState]:
        begun = (state.steps > 0).to(torch.float64)
        most = clip_value_fn(state.steps) if use_clipping else 0.0
        ratios = compute_wide(ratio, updates, state.nu, hyper=(eps, most))
        # The first update is all of the mean square, and nothing of the mean.
        decay, slower = 1 - begun * (1 - b1), begun * b2
        mu, nu = average(state.mu, ratios, decay), average_square(state.nu, updates, slower)
        ahead = average(mu, ratios, decay) if nesterov else mu
        new = AdamState(increment(state.steps), stored(mu, state.mu), stored(nu, state.nu))
        return compute(lambda u, m: m.clone(), updates, ahead), new

    def metric(state: AdamState) -> Params:
        return compute(lambda v, e: torch.maximum(safe_sqrt(v), e + torch.zeros_like(v)), state.nu, hyper=(eps,))

    return Transform(init, update, metric, state=AdamState)


@remembered
def adopt(
    learning_rate: Hyper | Schedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.9999,
    eps: Scalar = 1e-6,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[Any], Scalar] = fourth_root,
) -> Transform:
    r"""ADOPT, :math:`w' = w - \eta m`, a mean of gradients over the root of the mean square before each of them.

    For weight decay put `add_decayed_weights` between `scale_by_adopt` and `scale_by_learning_rate`.

    Args:
        learning_rate: :math:`\eta`.
        b1: Decay of the mean.
        b2: Decay of the mean square.
        eps: Least root of the mean square, above 0.
        mu_dtype: Dtype in which the mean is kept.
        nesterov: Whether the mean looks one step ahead.
        use_clipping: Whether ratios are bounded.
        clip_value_fn: From the number of steps taken to the greatest ratio.

    Example:
        >>> tx, params = adopt(0.1), {"weight": torch.zeros(2)}
        >>> _, state = tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)
        >>> tx.update({"weight": torch.tensor([4.0, -0.1])}, state, params)[0]
        {'weight': tensor([-0.0100,  0.0100])}

    References:
        Taniguchi et al., *ADOPT: modified Adam can converge with any beta2 with the optimal rate*, 2024.
    """
    direction = scale_by_adopt(
        b1, b2, eps, mu_dtype, nesterov=nesterov, use_clipping=use_clipping, clip_value_fn=clip_value_fn
    )
    return chain(direction, scale_by_learning_rate(learning_rate))
