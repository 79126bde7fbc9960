"""Chains in wrappers in chains, drawn at random: all ways to compute a step are one, and what changes nothing does not.

A row of the table of transforms is under its laws alone. Here optimizers stand two or three deep in wrappers, on trees
of every form, with gradients that are zero, tiny, or equal; each seed is one chain.
"""

from __future__ import annotations

import copy
import io
import random
import warnings
from typing import Any

import pytest
import torch
from cases import DEVICE, TRANSFORMS, Layer, assert_equal, every_other, falling, normal, stacked

import funcreg as fr
from funcreg.core.masks import Selection

#: Of the leaves of `tree` the one that is always there.
the_matrix = Selection(lambda params: [w.shape == (4, 3) for w in fr.tree_leaves(params)])
#: Optimizers, and links before a step and after it, from a factor of a hyperparameter.
OPTIMIZERS = ["sgd", "adamw", "lion", "rmsprop", "prox_sgd", "prox_adam of groups", "ftrl", "rmda", "adan", "fista"]
SCALERS = ["trace", "scale_by_adam", "scale_by_rms", "scale_by_sm3", "scale_by_yogi", "scale_by_factored_rms"]
EARLY = [
    lambda h: fr.clip_by_global_norm(h),
    lambda h: fr.add_penalty(fr.elastic, 0.3, 0.6, strength=lambda count: h * falling(count)),
    lambda h: fr.add_decayed_weights(0.1 * h, mask=fr.matrices),
    lambda h: fr.masked(fr.ema(0.5 * h), fr.select(min_ndim=1)),
    lambda h: fr.monitor({"norm": fr.global_norm}),
    lambda h: fr.apply_every(2),
    lambda h: fr.identity(),
]
LATE = [
    lambda h: fr.soft_threshold(0.05 * h),
    lambda h: fr.proximal(fr.group_lasso, 0.1 * h, mask=fr.matrices),
    lambda h: fr.project(fr.max_norm, 0.7 * h),
    lambda h: fr.add_independent_weight_decay(0.05 * h),
    lambda h: fr.conditionally_transform(fr.project(fr.box, -h, h), every_other),
]
WRAPPERS = [
    lambda tx, other, h: fr.MultiSteps(tx, 2, should_skip_update_fn=fr.skip_not_finite),
    lambda tx, other, h: fr.lookahead(tx, 2, 0.25 * h, reset_state=True),
    lambda tx, other, h: fr.schedule_free(tx, 0.1 * h),
    lambda tx, other, h: fr.apply_if_finite(tx, 2),
    lambda tx, other, h: fr.conditionally_mask(tx, every_other),
    lambda tx, other, h: fr.partition({True: tx, False: other}, lambda params: fr.matrices(params)),
    lambda tx, other, h: fr.selective_transform(tx, freeze_mask=the_matrix),
    lambda tx, other, h: fr.chain(other, fr.freeze(~the_matrix), fr.masked(tx, the_matrix)),
    lambda tx, other, h: fr.with_master_weights(tx),
    lambda tx, other, h: fr.sam(tx, fr.sgd(0.05), 2),
    lambda tx, other, h: fr.named_chain(("one", tx), ("other", fr.scale(0.5 * h))),
    lambda tx, other, h: fr.inject_hyperparams(lambda rate: fr.chain(tx, fr.scale(rate)))(0.5 * h),
]


def drawn(pick: random.Random, depth: int, h: Any) -> fr.Transform:
    """An optimizer in `depth` wrappers."""
    if depth:
        wrap, tx, other = pick.choice(WRAPPERS), drawn(pick, depth - 1, h), drawn(pick, 0, h)
        return wrap(tx, other, h)
    if pick.random() < 0.5:
        return TRANSFORMS[pick.choice(OPTIMIZERS)].make(h)
    early, late = [[each(h) for each in pick.sample(links, pick.randint(0, 2))] for links in (EARLY, LATE)]
    return fr.chain(*early, TRANSFORMS[pick.choice(SCALERS)].make(h), fr.scale_by_learning_rate(0.1 * h), *late)


SHAPES = [(), (0,), (3,), (4, 3), (3, 0), (2, 3), (3, 2, 2, 2), (5,)]


def tree(pick: random.Random, seed: int) -> Any:
    """A tree of four leaves, one of them a matrix, whose form is drawn."""
    shapes, form = [(4, 3), *pick.sample(SHAPES, 3)], pick.randrange(4)
    a, b, c, d = [normal(torch.Generator().manual_seed(4 * seed + i), *shape) for i, shape in enumerate(shapes)]
    a = a.t().contiguous().t()  # Entries of a transposed leaf lie in another order.
    return [{"a": a, "b": b, "c": {"d": c, "e": d}}, Layer(a, [b, (c, d)]), [a, None, {"b": b}, c, d], (d, c, b, a)][
        form
    ]


def gradients(params: Any, pick: random.Random, seed: int) -> Any:
    """A tree like the parameters, of numbers that are drawn, or extreme."""
    generator, how = torch.Generator().manual_seed(seed), pick.choice(["drawn", "drawn", "zeros", "tiny", "equal"])
    change = {"zeros": lambda g: 0 * g, "tiny": lambda g: 1e-30 * g, "equal": lambda g: 0.5 * g.sign()}.get(how)
    new = fr.tree_map(lambda w: normal(generator, *w.shape), params)
    return new if change is None else fr.tree_map(change, new)


class Run:
    """Some steps of a chain as plain functions, from a seed."""

    def __init__(self, seed: int, h: Any = 1.0, member: int = 0, steps: int = 5) -> None:
        self.make = lambda h=h: drawn(random.Random(seed), 1 + seed % 3, h)
        tx, params, kinds = self.make(), tree(random.Random(seed), 10 * seed + member), random.Random(seed)
        self.grads = [gradients(params, kinds, 100 * seed + 10 * n + member) for n in range(steps)]
        self.params, self.states = [params], [tx.init(params)]
        for grads in self.grads:
            before = copy.deepcopy((grads, self.states[-1], self.params[-1]))
            updates, state = tx.update(grads, self.states[-1], self.params[-1])
            assert_equal((grads, self.states[-1], self.params[-1]), before)
            self.params.append(fr.apply_updates(self.params[-1], updates))
            self.states.append(state)


@pytest.fixture(autouse=True)
def quiet():
    """Links in an order that is drawn are warned of, but never a step that is not fused."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("error", "fuse runs|this is computed leaf by leaf")
        yield


FEW, MANY = range(3), range(3, 30)
every_seed = pytest.mark.parametrize("seed", [*FEW, *[pytest.param(seed, marks=pytest.mark.slow) for seed in MANY]])


@every_seed
def test_fused_steps_of_nested_chains_are_the_plain_ones(seed):
    run = Run(seed)
    for donate in (False, True):
        step = fr.fuse(run.make(), donate=donate, backend="eager")
        params, state = step.init(run.params[0])
        for n, grads in enumerate(run.grads, start=1):
            params, state = step(params, grads, state)
            assert_equal((params, state), (run.params[n], run.states[n]), rtol=1e-9, atol=1e-11)


@every_seed
def test_members_of_nested_chains_are_those_of_a_loop(seed):
    factors = torch.tensor([1.0, 0.5], dtype=torch.float64, device=DEVICE)
    alone = [Run(seed, float(h), k) for k, h in enumerate(factors)]
    tx = fr.ensemble(alone[0].make, factors)
    state = tx.init(stacked([run.params[0] for run in alone]))
    for n in range(3):
        params = stacked([run.params[n] for run in alone])
        updates, state = tx.update(stacked([run.grads[n] for run in alone]), state, params)
        expected = stacked([run.params[n + 1] for run in alone])
        assert_equal(fr.apply_updates(params, updates), expected, rtol=1e-7, atol=1e-9)


@every_seed
def test_nested_chains_go_on_from_what_was_saved_bit_for_bit(seed):
    run = Run(seed)
    now, begun = (run.params[2], run.states[2]), (run.params[0], run.make().init(run.params[0]))
    buffer = io.BytesIO()
    torch.save(fr.to_state_dict(now), buffer)
    buffer.seek(0)
    read = fr.from_state_dict(begun, torch.load(buffer, weights_only=True))
    for params, state in (read, copy.deepcopy(now)):
        tx = run.make()
        for grads in run.grads[2:]:
            updates, state = tx.update(grads, state, params)
            params = fr.apply_updates(params, updates)
        assert_equal((params, state), (run.params[-1], run.states[-1]))


NOTHING = {
    "masked": lambda tx: fr.masked(tx, True),
    "partition": lambda tx: fr.partition({"all": tx}, "all"),
    "chain": lambda tx: fr.chain(fr.chain(fr.identity(), tx), fr.identity()),
    "named_chain": lambda tx: fr.named_chain(("all", tx)),
    "MultiSteps": lambda tx: fr.MultiSteps(tx, 1),
    "conditionally_mask": lambda tx: fr.conditionally_mask(tx, lambda step: True),
    "apply_if_finite": lambda tx: fr.apply_if_finite(tx, 2),
    "with_extra_args": lambda tx: fr.with_extra_args(tx),
}


@every_seed
def test_wrappers_that_change_nothing_change_nothing(seed):
    run = Run(seed)
    for wrap in NOTHING.values():
        tx, params = wrap(run.make()), run.params[0]
        state = tx.init(params)
        for grads, expected in zip(run.grads, run.params[1:], strict=True):
            updates, state = tx.update(grads, state, params)
            params = fr.apply_updates(params, updates)
            assert_equal(params, expected, rtol=1e-12, atol=1e-14)
