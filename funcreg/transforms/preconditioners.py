"""Preconditioners without a mean over their root, with optax's names and numbers: RMSprop, AdaGrad, SM3 and others.

Each tells its metric, so that `proximal_step` solves the penalized problem in it. Moments of 16-bit parameters are kept
in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Params, Scalar, Schedule, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import (
    compute,
    compute_wide,
    gathered,
    increment,
    reduce_leaves,
    safe_sqrt,
    squared,
    wide,
    widen,
    zeros,
)
from funcreg.core.ranges import flags, scalars, single
from funcreg.core.tree import flatten, leaves_like, tree_leaves, tree_map
from funcreg.transforms.factory_checks import below_one, dtypes, finite_nonnegative, positive, share
from funcreg.transforms.moments import (
    average,
    average_square,
    bias_correction,
    check_real,
    real_zeros,
    stored,
    stored_square,
)
from funcreg.transforms.transform import Transform, at_step, check_fit, counter, public_state


@public_state
class RmsState(NamedTuple):
    """The state of `scale_by_rms`.

    Example:
        >>> scale_by_rms().init(torch.zeros(1))
        RmsState(steps=tensor(0, dtype=torch.int32), nu=tensor([0.]))
    """

    steps: Tensor  # Number of updates made, int32.
    nu: Params  # Moving average of the squares of updates.


def _root(eps_in_sqrt: bool) -> Any:
    return lambda v, e: safe_sqrt(v + e) if eps_in_sqrt else safe_sqrt(v) + e


def _checked_rms(
    decay: Scalar, eps: Scalar, initial_scale: Scalar, nu_dtype: torch.dtype | None
) -> tuple[Scalar, Scalar, Scalar]:
    """The hyperparameters of RMSprop, checked."""
    below_one(decay=decay)
    finite_nonnegative(eps=eps, initial_scale=initial_scale)
    check_real(nu_dtype)
    decay, eps, initial_scale = scalars(decay=decay, eps=eps, initial_scale=initial_scale)
    single(initial_scale=initial_scale)
    return decay, eps, initial_scale


@remembered
def scale_by_rms(
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    nu_dtype: torch.dtype | None = None,
) -> Transform:
    r"""Divide updates by the root of their mean square, :math:`u / \sqrt{v + \epsilon}`.

    Args:
        decay: Decay of the mean square :math:`v`.
        eps: :math:`\epsilon`.
        initial_scale: First mean square.
        eps_in_sqrt: Whether :math:`\epsilon` stands below the root; `torch.optim.RMSprop` adds it to the root.
        bias_correction: Whether the mean square is corrected for its first value.
        nu_dtype: Dtype in which the mean square is kept, as in `scale_by_adam`.

    Example:
        >>> tx, params = scale_by_rms(decay=0.75), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([ 2.0000, -2.0000])}

    References:
        Tieleman & Hinton, *Lecture 6.5: rmsprop*, 2012.
    """
    decay, eps, initial_scale = _checked_rms(decay, eps, initial_scale, nu_dtype)
    flags(eps_in_sqrt=eps_in_sqrt, bias_correction=bias_correction)
    corrected = bias_correction

    def init(params: Params) -> RmsState:
        return RmsState(counter(params), real_zeros(params, initial_scale, nu_dtype))

    def update(updates: Updates, state: RmsState, params: Params) -> tuple[Updates, RmsState]:
        steps = increment(state.steps)
        new = RmsState(steps, stored_square(average_square(state.nu, updates, decay), state.nu, steps))
        return compute(lambda u, h: u / h, updates, metric(new)), new

    def metric(state: RmsState) -> Params:
        root = _root(eps_in_sqrt)
        missing = _missing(decay, state.steps, corrected)
        return compute(lambda v, c, e: root(v / c, e), tree_map(widen, state.nu), hyper=(missing, eps))

    return Transform(init, update, metric, state=RmsState)


def _missing(decay: Scalar, steps: Tensor, corrected: bool) -> Scalar:
    return bias_correction(decay, steps) if corrected else 1.0


@public_state
class StddevState(NamedTuple):
    """The state of `scale_by_stddev`.

    Example:
        >>> scale_by_stddev().init(torch.zeros(1)).mu
        tensor([0.])
    """

    steps: Tensor  # Number of updates made, int32.
    mu: Params  # Moving average of updates.
    nu: Params  # Moving average of their squares.


@remembered
def scale_by_stddev(
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    nu_dtype: torch.dtype | None = None,
) -> Transform:
    r"""Divide updates by their standard deviation, :math:`u / \sqrt{v - m^2 + \epsilon}`: centred RMSprop.

    Args:
        decay: Decay of the mean :math:`m` and of the mean square :math:`v`.
        eps: :math:`\epsilon`.
        initial_scale: First mean square.
        eps_in_sqrt: Whether :math:`\epsilon` stands below the root; `torch.optim.RMSprop` adds it to the root.
        bias_correction: Whether both means are corrected for their first value.
        nu_dtype: Dtype in which the mean square is kept, as in `scale_by_adam`.

    Example:
        >>> tx, params = scale_by_stddev(decay=0.5), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0, -0.1])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([ 2.0000, -2.0000])}

    References:
        Graves, *Generating sequences with recurrent neural networks*, 2013.
    """
    decay, eps, initial_scale = _checked_rms(decay, eps, initial_scale, nu_dtype)
    flags(eps_in_sqrt=eps_in_sqrt, bias_correction=bias_correction)
    corrected = bias_correction

    def init(params: Params) -> StddevState:
        return StddevState(counter(params), zeros(params), real_zeros(params, initial_scale, nu_dtype))

    def update(updates: Updates, state: StddevState, params: Params) -> tuple[Updates, StddevState]:
        steps = increment(state.steps)
        mu, nu = average(state.mu, updates, decay), average_square(state.nu, updates, decay)
        new = StddevState(steps, stored(mu, state.mu), stored_square(nu, state.nu, steps))
        return compute(lambda u, h: u / h, updates, metric(new)), new

    def metric(state: StddevState) -> Params:
        root = _root(eps_in_sqrt)
        missing = _missing(decay, state.steps, corrected)
        nu = tree_map(widen, state.nu)
        # Where updates hardly change, rounding leaves less than 0.
        spread = lambda v, m: (v - squared(m)).clamp(min=0.0)
        return compute(lambda v, m, c, e: root(spread(v / c, m / c), e), nu, state.mu, hyper=(missing, eps))

    return Transform(init, update, metric, state=StddevState)


@public_state
class RssState(NamedTuple):
    """The state of `scale_by_rss`.

    Example:
        >>> scale_by_rss(0.1).init(torch.zeros(1))
        RssState(sum_of_squares=tensor([0.1000]))
    """

    sum_of_squares: Params  # Of all updates so far.


@remembered
def scale_by_rss(initial_accumulator_value: Scalar = 0.1, eps: Scalar = 1e-7) -> Transform:
    r"""Divide updates by the root of the sum of all squares so far, :math:`u / \sqrt{\sum_s u_s^2 + \epsilon}`.

    Args:
        initial_accumulator_value: First sum.
        eps: :math:`\epsilon`, below the root.

    Example:
        >>> tx, params = scale_by_rss(initial_accumulator_value=0.0), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0, 0.0])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([1., 0.])}

    References:
        Duchi, Hazan & Singer, *Adaptive subgradient methods for online learning and stochastic optimization*, 2011.
    """
    finite_nonnegative(initial_accumulator_value=initial_accumulator_value, eps=eps)
    initial_accumulator_value, eps = scalars(initial_accumulator_value=initial_accumulator_value, eps=eps)
    single(initial_accumulator_value=initial_accumulator_value)

    def init(params: Params) -> RssState:
        return RssState(real_zeros(params, initial_accumulator_value))

    def update(updates: Updates, state: RssState, params: Params) -> tuple[Updates, RssState]:
        new = RssState(compute(lambda v, u: v + squared(u), state.sum_of_squares, updates))
        return compute(lambda u, h: u / torch.where(h == 0, 1.0, h), updates, metric(new)), new

    def metric(state: RssState) -> Params:
        return compute(lambda v, e: safe_sqrt(v + e), state.sum_of_squares, hyper=(eps,))

    return Transform(init, update, metric, state=RssState)


@public_state
class AdadeltaState(NamedTuple):
    """The state of `scale_by_adadelta`.

    Example:
        >>> scale_by_adadelta().init(torch.zeros(1))
        AdadeltaState(e_g=tensor([0.]), e_x=tensor([0.]), h=tensor([1.]))
    """

    e_g: Params  # Moving average of the squares of updates that come in.
    e_x: Params  # Moving average of the squares of those that go out.
    h: Params  # What the last updates were divided by, from the average of those that went out before them.


@remembered
def scale_by_adadelta(rho: Scalar = 0.9, eps: Scalar = 1e-6) -> Transform:
    r"""Give updates the size of those before them, :math:`u' = \sqrt{x + \epsilon} / \sqrt{v + \epsilon} \; u`.

    Here :math:`v` is the mean square of updates :math:`u`, and :math:`x` that of the earlier :math:`u'`. The same as
    in `torch.optim.Adadelta`; of a complex entry the squared magnitude counts, where optax squares the entry. The state
    keeps what it divided by, one tensor more than theirs, for the metric of `proximal_step`.

    Args:
        rho: Decay of both mean squares.
        eps: :math:`\epsilon`, above 0: with 0 nothing would ever move.

    Example:
        >>> tx, params = scale_by_adadelta(rho=0.75, eps=1.0), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([4.0, 0.0])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([1.7889, 0.0000])}

    References:
        Zeiler, *Adadelta: an adaptive learning rate method*, 2012.
    """
    below_one(rho=rho)
    positive(eps=eps)
    rho, eps = scalars(rho=rho, eps=eps)

    def init(params: Params) -> AdadeltaState:
        return AdadeltaState(real_zeros(params), real_zeros(params), real_zeros(params, 1.0))

    def update(updates: Updates, state: AdadeltaState, params: Params) -> tuple[Updates, AdadeltaState]:
        e_g = stored(average_square(state.e_g, updates, rho), state.e_g)
        h = compute(lambda v, x, e: (v + e).sqrt() / (x + e).sqrt(), e_g, state.e_x, hyper=(eps,))
        direction = compute_wide(lambda u, h: u / h, updates, h)
        e_x = stored(average_square(state.e_x, direction, rho), state.e_x)
        return stored(direction, updates), AdadeltaState(e_g, e_x, h)

    return Transform(init, update, lambda state: state.h, state=AdadeltaState)


# Leaf by leaf


@public_state
class NovogradState(NamedTuple):
    """The state of `scale_by_novograd`.

    Example:
        >>> scale_by_novograd().init(torch.zeros(2))
        NovogradState(steps=tensor(0, dtype=torch.int32), mu=tensor([0., 0.]), nu=tensor([0.]))
    """

    steps: Tensor  # Number of updates made, int32.
    mu: Params  # Decayed sum of updates over their norm, and of decay.
    nu: Params  # For each leaf, the moving average of the squared norm of its updates.


@remembered
def scale_by_novograd(
    b1: Scalar = 0.9,
    b2: Scalar = 0.25,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: Hyper | Schedule = 0.0,
    mu_dtype: torch.dtype | None = None,
) -> Transform:
    r"""Divide the update of each leaf by the root of its mean squared norm, then sum with momentum.

    .. math:: m_t = \beta_1 m_{t-1} + \frac{u_t}{\sqrt{v_t} + \epsilon} + \lambda w, \quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \|u_t\|^2, \quad v_1 = \|u_1\|^2

    Args:
        b1: Decay of the momentum :math:`m`, which is a sum and no mean.
        b2: Decay of the mean squared norm :math:`v`, one number a leaf.
        eps: :math:`\epsilon`, added to the root.
        eps_root: Added below the root.
        weight_decay: :math:`\lambda`: number of at least 0, tensor, schedule, or a tree of them like the parameters.
        mu_dtype: Dtype in which the momentum is kept, and to which updates are rounded; by default that of the
            parameter, float32 for 16-bit ones.

    Example:
        >>> tx, params = scale_by_novograd(), {"weight": torch.zeros(2)}
        >>> updates, state = tx.update({"weight": torch.tensor([3.0, -4.0])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([ 0.6000, -0.8000])}

    References:
        Ginsburg et al., *Stochastic gradient methods with layer-wise adaptive moments for training of deep networks*,
        2019.
    """
    below_one(b1=b1, b2=b2)
    finite_nonnegative(eps=eps, eps_root=eps_root, weight_decay=weight_decay)
    b1, b2, eps, eps_root = scalars(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    dtypes(mu_dtype=mu_dtype)

    def init(params: Params) -> NovogradState:
        check_fit(params, None, weight_decay)
        # One entry with the dimensions of its leaf, beside which a fused step keeps it.
        single = lambda w: torch.zeros([1] * w.ndim, dtype=wide(w.real.dtype), device=w.device)
        return NovogradState(counter(params), zeros(params, mu_dtype), tree_map(single, params))

    def update(updates: Updates, state: NovogradState, params: Params) -> tuple[Updates, NovogradState]:
        sums = flatten(updates)[1](reduce_leaves(squared, updates))
        sizes = tree_map(lambda s, v: s.reshape(v.shape), sums, state.nu)
        follow = lambda v, s, n, b: torch.where(n == 0, s, b * v + (1 - b) * s)
        nu = compute(follow, state.nu, sizes, hyper=(state.steps, b2))
        # One after another, in the order of operations that optax has.
        scaled = lambda u, w, v, e, r, c: u / (safe_sqrt(v + r) + e) + c * w
        own = compute_wide(scaled, updates, params, hyper=(nu, eps, eps_root, at_step(weight_decay, state.steps)))
        mu = stored(compute_wide(lambda m, u, b: b * m + u, state.mu, own, hyper=(b1,)), state.mu)
        # Cloned, because leaves of updates and state never share memory.
        return compute(lambda u, m: m.clone(), updates, mu), NovogradState(increment(state.steps), mu, nu)

    def metric(state: NovogradState) -> Params:
        # Of the sum, which exceeds a mean by 1 / (1 - b1).
        spread = lambda m, v, b, e, r: torch.zeros_like(m.real) + (1 - b) * (safe_sqrt(v + r) + e)
        return compute_wide(spread, state.mu, hyper=(state.nu, b1, eps, eps_root))

    return Transform(init, update, metric, state=NovogradState)


# Dimension by dimension


@public_state
class SM3State(NamedTuple):
    """The state of `scale_by_sm3`.

    Example:
        >>> scale_by_sm3().init(torch.zeros(2, 3)).mu
        (tensor([0., 0.]), tensor([0., 0., 0.]))
    """

    mu: Params  # For each dimension of a leaf, the greatest sums of squares along it; of a vector the sums themselves.
    nu: Params  # Moving average of divided updates.
    factors: Params  # Moving average of what they were multiplied by; () unless the metric is kept.


@remembered
def scale_by_sm3(b1: Scalar = 0.9, b2: Scalar = 1.0, eps: Scalar = 1e-8, *, keep_metric: bool = False) -> Transform:
    r"""Divide updates by the root of their sum of squares, of which a vector a dimension is kept, then take the mean.

    .. math:: a_{ij} = \min(r_i, c_j) + u_{ij}^2, \quad
        m' = \beta_1 m + (1 - \beta_1) \frac{u}{\sqrt{a + \epsilon}}, \quad
        r_i' = \max_j a_{ij}, \quad c_j' = \max_i a_{ij}

    So a matrix needs as much memory beside its mean as its rows and columns. With `b2` below 1 the sum is
    :math:`\beta_2 \min(r_i, c_j) + (1 - \beta_2) u_{ij}^2`.

    Args:
        b1: Decay of the mean :math:`m`, which is not corrected for its first value.
        b2: Decay of the sums, at most 1, which keeps them.
        eps: :math:`\epsilon`, below the root.
        keep_metric: Whether the state has one more tensor like the parameters, for the metric of `proximal_step`,
            which cannot be told from rows and columns.

    Example:
        >>> tx, params = scale_by_sm3(b1=0.5), {"weight": torch.zeros(2, 2)}
        >>> updates, state = tx.update({"weight": torch.tensor([[4.0, 0.0], [-1.0, 2.0]])}, tx.init(params), params)
        >>> updates
        {'weight': tensor([[ 0.5000,  0.0000],
                [-0.5000,  0.5000]])}
        >>> state.mu
        {'weight': (tensor([16.,  4.]), tensor([16.,  4.]))}

    References:
        Anil, Gupta, Koren & Singer, *Memory-efficient adaptive optimization*, 2019.
    """
    below_one(b1=b1)
    share(b2=b2)
    finite_nonnegative(eps=eps)
    b1, b2, eps = scalars(b1=b1, b2=b2, eps=eps)
    flags(keep_metric=keep_metric)
    # A sum counts the squares whole, a mean by their weight.
    whole = torch.where(b2 == 1, 1.0, 1 - b2) if isinstance(b2, Tensor) else 1.0 if b2 == 1 else 1 - b2

    def init(params: Params) -> SM3State:
        return SM3State(tree_map(_along_dimensions, params), zeros(params), real_zeros(params) if keep_metric else ())

    def update(updates: Updates, state: SM3State, params: Params) -> tuple[Updates, SM3State]:
        add = lambda u, b, f, *along: f * squared(u) + b * functools.reduce(torch.minimum, _tensors(along))
        sums = compute_wide(add, updates, hyper=(b2, whole, *_laid_out(updates, state.mu)))
        divide = lambda u, a, e: torch.where(a > 0, u / _root_of(a, e), 0.0)
        nu = stored(average(state.nu, compute_wide(divide, updates, sums, hyper=(eps,)), b1), state.nu)
        rows = zip(tree_leaves(sums), leaves_like(updates, state.mu), strict=True)
        mu = flatten(updates)[1]([_greatest(a, kept) for a, kept in rows])
        # Cloned, because leaves of updates and state never share memory.
        return compute(lambda u, m: m.clone(), updates, nu), SM3State(mu, nu, follow(state.factors, sums))

    def follow(factors: Params, sums: Params) -> Params:
        if not keep_metric:
            return ()
        return compute(lambda p, a, b, e: b * p + (1 - b) / _root_of(a, e), factors, sums, hyper=(b1, eps))

    def metric(state: SM3State) -> Params:
        return compute(lambda p: 1 / p, state.factors)

    return Transform(init, update, metric if keep_metric else None, state=SM3State)


def _root_of(sums: Tensor, eps: Scalar) -> Tensor:
    """The root of a sum of squares, or 1 where there is none, so that no quotient and no derivative is NaN."""
    inside = sums + eps
    return torch.where(inside == 0, 1.0, inside).sqrt()


def _tensors(values: Sequence[Tensor | float]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor)]


def _along_dimensions(w: Tensor) -> tuple[Tensor, ...]:
    """Zeros along each dimension of a leaf, the same in every process; of a vector, or a number, where it lies."""
    kept = wide(w.real.dtype)
    if w.ndim < 2:
        return (torch.zeros_like(w.real, dtype=kept),)
    return tuple([torch.zeros(n, dtype=kept, device=w.device) for n in w.shape])


def _laid_out(updates: Updates, mu: Params) -> list[Hyper]:
    """For each dimension a tree of what is kept along it, as it broadcasts; infinity where a leaf has fewer."""
    rows = [
        [
            x if len(kept) == 1 else x.reshape([x.numel() if d == i else 1 for i in range(len(kept))])
            for d, x in enumerate(kept)
        ]
        for kept in leaves_like(updates, mu)
    ]
    most, rebuild = max([len(row) for row in rows], default=0), flatten(updates)[1]
    return [rebuild([row[d] if d < len(row) else math.inf for row in rows]) for d in range(most)]


def _greatest(sums: Tensor, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The greatest entries along each dimension, in the dtype in which they are kept."""
    if sums.ndim < 2:
        return (sums.to(like[0].dtype),)
    # A sum over no entries is 0, a maximum an error.
    over = lambda a, others: a.amax(others) if a.numel() else a.sum(others)
    others = [tuple([i for i in range(sums.ndim) if i != d]) for d in range(sums.ndim)]
    found = gathered([compute_wide(lambda a, dims=dims: over(a, dims), sums) for dims in others])
    return tuple([x.to(kept.dtype) for x, kept in zip(found, like, strict=True)])
