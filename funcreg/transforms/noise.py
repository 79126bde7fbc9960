"""Noise for gradients, each number of which is a function of a key, a step and its place.

Such noise has no hidden state: a run that goes on from a saved state draws what it would have drawn, steps compile and
map, and a tensor gets the same numbers on every device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from funcreg.core._typing import Params, Scalar, Schedule, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute, increment, widen
from funcreg.core.ranges import scalars, single
from funcreg.core.rounding import first_key, one_key, shifted, words
from funcreg.core.tree import flatten, tree_map
from funcreg.transforms.factory_checks import finite_nonnegative
from funcreg.transforms.per_example import check_examples, per_example_global_norm_clip
from funcreg.transforms.transform import Transform, at_step, counter, public_state


@public_state
class AddNoiseState(NamedTuple):
    """The state of `add_noise`.

    Example:
        >>> add_noise(0.1, 0.55, key=7).init(torch.zeros(1)).steps
        tensor(0, dtype=torch.int32)
    """

    steps: Tensor  # Number of updates made, int32.
    key: Tensor  # What the noise of all steps is made from, int64.


@remembered
def add_noise(
    eta: Scalar | Schedule,
    gamma: Scalar,
    key: int | Tensor | torch.Generator | None = None,
    *,
    seed: int | Tensor | torch.Generator | None = None,
) -> Transform:
    r"""Add Gaussian noise to updates, :math:`u' = u + \sqrt{\eta / t^\gamma} \, \xi`, :math:`\xi \sim N(0, 1)`.

    After the step of `sgd`, with the right variance, this is Langevin dynamics (SGLD), whose parameters are samples of
    a posterior: for a loss that is a mean over :math:`n` examples plus the prior's penalty,
    `chain(sgd(rate), add_noise(2 * rate / n, 0.0, key))`.

    Noise is a function of key, step, and place in the tree: a run that goes on from a saved state draws what it would
    have drawn. An ensemble draws other noise for each member. Under `vmap` of your own members differ if their keys do
    (a tensor of keys, mapped over), or if `init` is mapped with `randomness="different"`.

    Args:
        eta: :math:`\eta`: variance of the noise at the first step, number of at least 0, tensor or schedule.
        gamma: :math:`\gamma`, at least 0: how fast the variance falls. 0 keeps it.
        key: Where the noise comes from: an int, a 0-dim tensor of an integer, or a generator, from which `init` draws.
        seed: Another name of `key`; one of them is given.

    Example:
        >>> tx, params = add_noise(0.25, 0.0, key=0), {"weight": torch.zeros(10_000)}
        >>> updates, state = tx.update({"weight": torch.ones(10_000)}, tx.init(params), params)
        >>> round(float(updates["weight"].mean()), 1), round(float(updates["weight"].std()), 1)
        (1.0, 0.5)

    References:
        Neelakantan and others, *Adding gradient noise improves learning for very deep networks*, 2015.
        Welling & Teh, *Bayesian learning via stochastic gradient Langevin dynamics*, 2011.
        Steele, Lea & Flood, *Fast splittable pseudorandom number generators*, 2014.
    """
    finite_nonnegative(eta=eta, gamma=gamma)
    (gamma,) = scalars(gamma=gamma)
    single(eta=eta, gamma=gamma)
    begin = one_key("add_noise", key, seed)

    def init(params: Params) -> AddNoiseState:
        return AddNoiseState(counter(params), first_key(begin, params))

    def update(updates: Updates, state: AddNoiseState, params: Params) -> tuple[Updates, AddNoiseState]:
        steps = increment(state.steps)
        size = (at_step(eta, state.steps) / steps.to(torch.float64) ** gamma) ** 0.5
        leaves, rebuild = flatten(params)
        noise = rebuild(map(_normal, words(state.key, steps, params), leaves))
        moved = compute(lambda u, x, s: u + s * x, updates, noise, hyper=(size,))
        return moved, AddNoiseState(steps, state.key)

    return Transform(init, update, state=AddNoiseState)


def _normal(bits: Tensor, w: Tensor) -> Tensor:
    """Normal numbers like a tensor, by the method of Box and Muller, in float32 at least."""
    real = torch.float64 if w.dtype in (torch.float64, torch.complex128) else torch.float32
    first, second = (((half.to(real) + 0.5) * 2.0**-32) for half in (shifted(bits, 32), bits & (2**32 - 1)))
    radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
    if w.is_complex():
        return torch.complex(radius * angle.cos(), radius * angle.sin()) / math.sqrt(2)
    return radius * angle.cos()


# Sums of gradients of examples


@public_state
class DifferentiallyPrivateAggregateState(NamedTuple):
    """The state of `differentially_private_aggregate`.

    Example:
        >>> differentially_private_aggregate(1.0, 1.1, key=7).init(torch.zeros(1)).steps
        tensor(0, dtype=torch.int32)
    """

    steps: Tensor  # Number of updates made, int32.
    key: Tensor  # What the noise of all steps is made from, int64.


@remembered
def differentially_private_aggregate(
    l2_norm_clip: Scalar,
    noise_multiplier: Scalar,
    key: int | Tensor | torch.Generator | None = None,
    *,
    seed: int | Tensor | torch.Generator | None = None,
) -> Transform:
    r"""The noisy mean of clipped gradients, :math:`\frac{1}{B} (\sum_i g_i \min(1, c / \|g_i\|) + \sigma c \, \xi)`.

    Updates are gradients of single examples, trees with one more dimension, the first, as `vmap(grad(loss),
    in_dims=(None, 0))` makes them: so it stands first in a chain, and in no wrapper but a chain and
    `inject_hyperparams`. A batch is one step: `MultiSteps`, which would clip sums of examples, has no place here.

    `fuse` takes gradients like the parameters: make this update first, and fuse what comes after it. A whole training
    step that maps, clips and updates goes through `torch.compile`.

    It counts no privacy that is spent: an accountant does, from :math:`\sigma`, the share of examples in a batch, and
    the number of steps. Noise is a function of key, step, and place, as that of `add_noise`; who knows the key knows
    the noise, so that it belongs to what is kept secret.

    Args:
        l2_norm_clip: :math:`c`, the greatest norm of one example's gradient, at least 0.
        noise_multiplier: :math:`\sigma`, at least 0.
        key: Where the noise comes from: an int, a 0-dim tensor of an integer, or a generator, from which `init` draws.
        seed: Another name of `key`; one of them is given.

    Raises:
        ValueError: Leaves are not like the parameters with one dimension more, or differ in the number of examples.

    Example:
        >>> tx = chain(differentially_private_aggregate(1.0, 0.0, key=0), sgd(1.0))
        >>> params, grads = {"w": torch.zeros(2)}, {"w": torch.tensor([[3.0, 4.0], [0.2, 0.0]])}
        >>> tx.update(grads, tx.init(params), params)[0]
        {'w': tensor([-0.4000, -0.4000])}

    References:
        Abadi et al., *Deep learning with differential privacy*, 2016.
    """
    finite_nonnegative(l2_norm_clip=l2_norm_clip, noise_multiplier=noise_multiplier)
    l2_norm_clip, noise_multiplier = scalars(l2_norm_clip=l2_norm_clip, noise_multiplier=noise_multiplier)
    single(l2_norm_clip=l2_norm_clip, noise_multiplier=noise_multiplier)
    begin = one_key("differentially_private_aggregate", key, seed)

    def init(params: Params) -> DifferentiallyPrivateAggregateState:
        return DifferentiallyPrivateAggregateState(counter(params), first_key(begin, params))

    def update(
        updates: Updates, state: DifferentiallyPrivateAggregateState, params: Params
    ) -> tuple[Updates, DifferentiallyPrivateAggregateState]:
        steps = increment(state.steps)
        leaves, rebuild = flatten(params)
        if not leaves:
            return updates, DifferentiallyPrivateAggregateState(steps, state.key)
        count = check_examples(updates, "differentially_private_aggregate", params)
        if not count:
            raise ValueError(
                "differentially_private_aggregate got gradients of no examples; expected one at least, for it is their "
                "mean. Skip the step of an empty batch."
            )
        clipped, _ = per_example_global_norm_clip(tree_map(widen, updates), l2_norm_clip)
        noise = rebuild(map(_normal, words(state.key, steps, params), leaves))
        deviation = l2_norm_clip * noise_multiplier
        mean = compute(lambda w, g, x, s: (g + s * x) / count, params, clipped, noise, hyper=(deviation,))
        return mean, DifferentiallyPrivateAggregateState(steps, state.key)

    return Transform(init, update, state=DifferentiallyPrivateAggregateState, examples=True)
