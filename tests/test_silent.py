"""What would do nothing, or the opposite, in silence: it warns or raises, and what is meant does not."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from cases import CONSTRAINTS, PENALTIES, assert_equal, cpu_only, draw
from torch import nn, tensor
from torch.func import vmap
from torch.testing import assert_close

import funcreg as fr

pytestmark = cpu_only  # Numbers in tensors are checked on the CPU, where reading them waits for no device.
LEAVES = {"a": tensor([1.0, -2.0], device="cpu"), "b": tensor([3.0], device="cpu")}
ONES, ZEROS = fr.tree_map(torch.ones_like, LEAVES), fr.tree_map(torch.zeros_like, LEAVES)
IN_A, IN_B = {"a": True, "b": False}, {"a": False, "b": True}


def step(tx, grads, params=LEAVES):
    return tx.update(grads, tx.init(params), params)[0]


# Chains whose links are in the wrong order

DECAY, L1 = fr.add_decayed_weights(0.1), fr.add_penalty(fr.l1, strength=0.1)
UPHILL = {
    "decay after a step": lambda: fr.chain(fr.sgd(0.1), DECAY),
    "a penalty after Adam": lambda: fr.chain(fr.adam(0.1), L1),
    "a masked penalty": lambda: fr.chain(fr.adam(0.1), fr.add_decayed_weights(0.1, mask=IN_A)),
    "two optimizers": lambda: fr.chain(fr.adam(0.1), fr.sgd(0.1)),
    "two learning rates": lambda: fr.chain(fr.scale_by_learning_rate(0.1), fr.scale_by_learning_rate(0.1)),
    "a wrapper between": lambda: fr.chain(fr.apply_if_finite(fr.chain(fr.sgd(0.1)), 3), fr.scale(0.5), DECAY),
    "names": lambda: fr.named_chain(("a", fr.sgd(0.1)), ("b", fr.named_chain(("c", DECAY)))),
    "a proximal optimizer": lambda: fr.chain(fr.prox_sgd(0.1, fr.l1), DECAY),
    "an optimizer before a proximal one": lambda: fr.chain(fr.sgd(0.1), fr.prox_adam(0.1, fr.l1)),
    "a label": lambda: fr.chain(fr.partition({0: fr.sgd(0.1), 1: fr.adam(0.1)}, {"a": 0, "b": 1}), DECAY),
    "some leaves": lambda: fr.chain(fr.masked(fr.sgd(0.1), IN_A), DECAY),
    "an ensemble": lambda: fr.chain(fr.ensemble(fr.sgd, tensor([0.1, 0.2])), fr.ensemble(fr.sgd, tensor([0.1, 0.2]))),
}
MISSED = {
    "a learning rate": lambda: fr.chain(fr.soft_threshold(0.1), fr.scale_by_learning_rate(0.1)),
    "an optimizer": lambda: fr.chain(fr.project(fr.nonnegative), fr.sgd(0.1)),
    "a factor": lambda: fr.chain(fr.sgd(0.1), fr.proximal(fr.l1, 0.1, mask=IN_A), fr.scale(0.5)),
    "a schedule": lambda: fr.chain(fr.prox_sgd(0.1, fr.l1), fr.scale_by_schedule(lambda count: 0.5)),
    "a penalty": lambda: fr.chain(fr.keep_params_nonnegative(), L1),
}
LEGAL = {
    "AdamW": lambda: fr.adamw(0.1),
    "momentum after the learning rate": lambda: fr.rmsprop(0.1, momentum=0.9),
    "a threshold at the end": lambda: fr.chain(fr.adamw(0.1), fr.soft_threshold(0.1)),
    "several at the end": lambda: fr.chain(fr.sgd(0.1), fr.soft_threshold(0.1), fr.project(fr.nonnegative)),
    "a set after a proximal optimizer": lambda: fr.chain(fr.prox_sgd(0.1, fr.l1), fr.project(fr.nonnegative)),
    "a factor after the step": lambda: fr.chain(fr.sgd(0.1), fr.scale(0.5)),
    "a bound after the step": lambda: fr.chain(fr.sgd(0.1), fr.clip(0.1)),
    "ascent": lambda: fr.chain(fr.scale(-1.0), fr.adam(0.1)),
    "ascent by the last link": lambda: fr.chain(fr.adam(0.1), fr.scale(-1.0)),
    "a penalty for an ascent": lambda: fr.chain(fr.sgd(0.1), fr.scale(-1.0), DECAY, fr.scale_by_learning_rate(0.1)),
    "a learning rate without a sign": lambda: fr.chain(fr.scale_by_learning_rate(0.1, flip_sign=False), fr.sgd(1.0)),
    "decay before": lambda: fr.chain(DECAY, fr.sgd(0.1)),
    "leaves apart": lambda: fr.chain(fr.masked(fr.adam(0.1), IN_A), fr.masked(fr.sgd(0.1), IN_B)),
    "frozen leaves": lambda: fr.chain(fr.adam(0.1), fr.freeze(IN_B)),
    "a function of the user": lambda: fr.chain(fr.sgd(0.1), fr.stateless(lambda updates, params: updates)),
}


def table(rows):
    return pytest.mark.parametrize("make", rows.values(), ids=rows)


@table(UPHILL)
def test_a_link_that_takes_a_step_for_a_gradient_is_warned_of_once_with_both_links(make):
    with pytest.warns(UserWarning, match=r"in this chain, .+ stands after .+, which makes a step downhill") as caught:
        make()
    assert len([w for w in caught if "in this chain" in str(w.message)]) == 1
    assert caught[0].filename == __file__


@table(MISSED)
def test_a_link_that_loses_what_a_proximal_link_made_is_warned_of(make):
    with pytest.warns(UserWarning, match=r"in this chain, .+ stands after .+, which ends where parameters are to be"):
        make()


@table(LEGAL)
def test_chains_in_order_are_not_warned_of(make):
    tx = make()
    step(tx, ONES)


#: Transforms that act by the count of their calls, in a wrapper that begins them anew.
ANEW = {
    "lookahead of later steps": lambda: fr.lookahead(fr.conditionally_mask(fr.sgd(0.1), lambda n: n > 0), 1, 0.5, True),
    "lookahead of gathered steps": lambda: fr.lookahead(fr.MultiSteps(fr.sgd(0.1), 2), 3, 0.5, True),
    "lookahead of summed steps": lambda: fr.lookahead(fr.chain(fr.sgd(0.1), fr.apply_every(2)), 1, 0.5, True),
    "lookahead of sam": lambda: fr.lookahead(fr.sam(fr.sgd(0.1), fr.sgd(0.1)), 1, 0.5, True),
    "lookahead of later gathered steps": lambda: fr.lookahead(
        fr.conditionally_mask(fr.MultiSteps(fr.sgd(0.1), 2), lambda n: n > 0), 4, 0.5, True
    ),
    "lookahead of steps gathered twice": lambda: fr.lookahead(
        fr.MultiSteps(fr.MultiSteps(fr.sgd(0.1), 2), 2), 2, 0.5, True
    ),
    "sam that climbs later": lambda: fr.sam(fr.sgd(0.1), fr.conditionally_mask(fr.sgd(0.1), lambda n: n > 3)),
}
WHOLE = {
    "steps gathered in time": lambda: fr.lookahead(fr.MultiSteps(fr.sgd(0.1), 2), 4, 0.5, True),
    "sam in time": lambda: fr.lookahead(fr.sam(fr.sgd(0.1), fr.sgd(0.1)), 4, 0.5, True),
    "steps gathered a number of numpy": lambda: fr.lookahead(fr.MultiSteps(fr.sgd(0.1), np.int64(2)), 4, 0.5, True),
    "steps summed in time": lambda: fr.lookahead(fr.chain(fr.apply_every(2), fr.sgd(0.1)), 4, 0.5, True),
    "steps gathered in a chain": lambda: fr.lookahead(
        fr.named_chain(("clip", fr.clip(1.0)), ("step", fr.MultiSteps(fr.sgd(0.1), 2))), 4, 0.5, True
    ),
    "steps gathered in a wrapper": lambda: fr.lookahead(
        fr.apply_if_finite(fr.MultiSteps(fr.sgd(0.1), 2), 3), 2, 0.5, True
    ),
    "steps gathered twice in time": lambda: fr.lookahead(fr.MultiSteps(fr.MultiSteps(fr.sgd(0.1), 2), 2), 4, 0.5, True),
    "counts that stay": lambda: fr.lookahead(fr.conditionally_mask(fr.sgd(0.1), lambda n: n > 0), 1, 0.5),
    "no count": lambda: fr.lookahead(fr.sgd(0.1), 1, 0.5, True),
}


@table(ANEW)
def test_counts_of_calls_that_begin_anew_are_warned_of(make):
    with pytest.warns(UserWarning, match="anew at each synchronization, and with it the count of its calls, which nev"):
        make()


@table(WHOLE)
def test_counts_of_calls_that_lose_nothing_are_not_warned_of(make):
    tx, params = make(), LEAVES
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(ONES, state, params)
        params = fr.apply_updates(params, updates)
    assert all((params[name] < LEAVES[name]).all() for name in LEAVES)


def test_chains_are_warned_of_but_compute_what_they_say():
    with pytest.warns(UserWarning, match="uphill"):
        tx = fr.chain(fr.sgd(0.1), DECAY)
    assert_equal(step(tx, ONES), fr.tree_map(lambda g, w: -0.1 * g + 0.1 * w, ONES, LEAVES))


def test_chains_that_are_made_where_code_is_traced_or_batched_say_nothing():
    def moved(rate, params):
        return fr.chain(fr.sgd(rate), fr.add_decayed_weights(rate)).update(
            params, ((fr.EmptyState(),) * 2,) * 2, params
        )

    def updates(rate, w):
        tx = fr.chain(fr.sgd(rate), fr.add_decayed_weights(rate))
        return tx.update({"a": w}, tx.init({"a": w}), {"a": w})[0]

    found = vmap(updates, in_dims=(0, None))(tensor([0.1, 0.2]), LEAVES["a"])
    assert found["a"].shape == (2, 2)
    torch.compile(updates, backend="eager", fullgraph=True)(tensor(0.1), LEAVES["a"])


# Leaves that go by their raw gradients


@pytest.mark.parametrize(
    "make",
    [
        lambda: fr.masked(fr.adam(0.1), IN_A),
        lambda: fr.masked(fr.adam(0.1), fr.select("a")),
        lambda: fr.masked(fr.chain(fr.scale_by_adam(), fr.scale(-0.1)), IN_A),
        lambda: fr.chain(fr.clip(1.0), fr.masked(fr.adam(0.1), IN_A)),
        lambda: fr.named_chain(("a", fr.apply_if_finite(fr.masked(fr.sgd(0.1), IN_A), 3))),
        lambda: fr.partition({"train": fr.adam(0.1), "rest": fr.identity()}, {"a": "train", "b": "rest"}),
        lambda: fr.partition({0: fr.masked(fr.adam(0.1), IN_A)}, 0),
    ],
)
def test_leaves_that_a_masked_optimizer_leaves_to_their_raw_gradients_are_named(make):
    tx = make()
    with pytest.warns(
        UserWarning, match=r": b would go uphill, by the whole of their gradients.*freeze.*partition"
    ) as w:
        tx.init(LEAVES)
    assert len(w) == 1
    assert_equal(tx.update(ONES, _quietly(tx.init), LEAVES)[0]["b"], ONES["b"])  # As optax does.


def _quietly(init):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return init(LEAVES)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fr.masked(fr.adam(0.1), True),
        lambda: fr.masked(fr.adam(0.1), {"a": True, "b": True}),
        lambda: fr.masked(fr.scale_by_adam(), IN_A),
        lambda: fr.chain(fr.masked(fr.adam(0.1), IN_A), fr.masked(fr.set_to_zero(), IN_B)),
        lambda: fr.chain(fr.masked(fr.adam(0.1), IN_A), fr.masked(fr.sgd(0.1), IN_B)),
        lambda: fr.chain(fr.freeze(IN_B), fr.masked(fr.adam(0.1), IN_A)),
        lambda: fr.partition({0: fr.adam(0.1), 1: fr.set_to_zero()}, {"a": 0, "b": 1}),
        lambda: fr.partition({0: fr.adam(0.1), 1: fr.freeze(True)}, {"a": 0, "b": 1}),
        lambda: fr.chain(fr.masked(fr.scale_by_adam(), IN_A), fr.scale_by_learning_rate(0.1)),
        lambda: fr.chain(fr.masked(fr.scale(-1.0), IN_A), fr.adam(0.1)),
    ],
)
def test_leaves_that_something_sees_to_are_not_warned_of(make):
    step(make(), ONES)


def test_none_for_a_gradient_that_a_masked_step_needs_is_refused_though_another_link_leaves_the_leaf_out():
    for rest in (fr.sgd(0.1), fr.set_to_zero()):
        tx = fr.chain(fr.masked(fr.adam(0.1), IN_A), fr.masked(rest, IN_B))
        with pytest.raises(ValueError, match=r"updates 'a' is None; .* Freeze the leaf, as in chain\(freeze"):
            tx.update({**ONES, "a": None}, tx.init(LEAVES), LEAVES)
    assert_equal(tx.update({**ONES, "b": None}, tx.init(LEAVES), LEAVES)[0]["b"], ZEROS["b"])


def test_leaves_whose_rows_are_their_own_means_are_warned_of():
    params = {
        "first": torch.ones(4, 1),
        "filters": torch.ones(3, 1, 1, 1),
        "weight": torch.eye(4),
        "bias": torch.ones(4),
    }
    tx = fr.chain(fr.centralize(), fr.sgd(0.1))
    with pytest.warns(UserWarning, match=r"centralize makes every update of filters, first zero.*masked\("):
        state = tx.init(params)
    updates, _ = tx.update(params, state, params)
    assert [name for name, u in updates.items() if not u.any()] == ["first", "filters"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fr.chain(fr.masked(fr.centralize(), {"first": False, "filters": False, "weight": True, "bias": True})).init(
            params
        )
        fr.centralize().init({"empty": torch.ones(0, 1), "none": torch.ones(3, 0), "row": torch.ones(1, 2)})


def test_a_label_that_no_leaf_has_is_warned_of():
    tx = fr.partition({"body": fr.sgd(0.1), "frozen_head": fr.sgd(0.2)}, {"a": "body", "b": "body"})
    with pytest.warns(UserWarning, match=r"no leaf has the label 'frozen_head'.*leaves have 'body'"):
        tx.init(LEAVES)
    fr.partition({"body": fr.sgd(0.1), "norm": fr.sgd(0.2)}, lambda params: dict.fromkeys(params, "body")).init(LEAVES)


def test_a_tree_without_a_leaf_is_warned_of_once():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(2, 2)]  # No ModuleList, so that the module has no parameters.

    params = dict(Listed().named_parameters())
    for tx in (fr.adamw(0.1), fr.prox_adam(0.1, fr.l1), fr.prox_sgd(0.1, fr.l1, momentum=torch.tensor(0.9))):
        for init in (tx.init, fr.fuse(tx).init):
            with pytest.warns(UserWarning, match=r"begins without parameters, .* where a ModuleList") as said:
                init(params)
            assert len(said) == 1
    parts = {"body": fr.sgd(0.1), "norm": fr.adam(0.2)}  # Of which the second has no leaf.
    fr.partition(parts, lambda params: dict.fromkeys(params, "body")).init(LEAVES)


def test_a_module_without_parameters_is_refused_where_they_are_read():
    for read in (fr.sparsity, fr.report):
        with pytest.raises(ValueError, match=r"the ReLU has no parameters to read\. .* ModuleList .* quantization"):
            read(nn.ReLU())


# Schedules that turn


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        (fr.linear_schedule(0.1, -0.1, 4), 4),
        (fr.polynomial_schedule(0.1, -0.1, 2, 10, transition_begin=5), 15),
        (fr.cosine_decay_schedule(0.1, 7, alpha=-0.5), 7),
        (fr.warmup_constant_schedule(0.0, -0.1, 5), 5),
        (fr.warmup_cosine_decay_schedule(0.0, -0.1, 5, 100), 4),
        (fr.warmup_cosine_decay_schedule(0.0, 0.1, 5, 100, end_value=-0.1), 100),
        (fr.exponential_decay(0.1, 5, 2.0, end_value=-0.1), 0),
        (fr.exponential_decay(0.1, 5, 1.5, transition_begin=3, end_value=-0.1), 0),
        (fr.join_schedules([fr.constant_schedule(0.1), fr.constant_schedule(-0.1)], [2]), 2),
        (fr.join_schedules([lambda count: 0.1, fr.linear_schedule(0.1, -0.1, 4)], [2]), 6),
        (fr.join_schedules([lambda count: 0.1 - count * 0.1, fr.constant_schedule(0.1)], [5]), 4),
    ],
)
@pytest.mark.parametrize(
    "make", [fr.sgd, lambda s: fr.prox_sgd(0.1, fr.l1, strength=s), lambda s: fr.adamw(0.1, weight_decay={"a": s})]
)
def test_a_schedule_is_checked_wherever_it_turns(schedule, at, make):
    with pytest.raises(ValueError, match=rf"at step {at} is -[\d.e-]+; expected a .*number of at least 0. Is a sign"):
        make(schedule)


def test_schedules_that_stay_in_their_range_are_taken_and_others_where_there_is_none():
    for schedule in (
        fr.warmup_cosine_decay_schedule(0.0, 0.1, 5, 10**10),
        fr.exponential_decay(0.1, 5, 2.0),
        fr.exponential_decay(0.0, 5, 2.0, end_value=0.1),
        fr.exponential_decay(0.1, 5, 0.5, end_value=-1.0),
        fr.join_schedules([fr.linear_schedule(0.2, -0.2, 10), fr.constant_schedule(0.1)], [5]),
        fr.piecewise_constant_schedule(0.1, {3: 0.5, 10: 0.0}),
    ):
        fr.sgd(schedule)
    fr.scale_by_schedule(fr.linear_schedule(0.1, -0.1, 4))


# Metrics and thresholds


@pytest.mark.parametrize("name", PENALTIES)
def test_a_metric_below_0_is_refused_with_its_leaf_and_one_of_0_takes_no_step(name):
    case = PENALTIES[name]
    params = {"a": tensor([[1.0, -2.0], [0.5, 3.0]])}
    try:
        known = case.penalty.in_metric(params, *case.hyper, **getattr(case, "options", {}))
    except (TypeError, ValueError):
        known = False
    if not known:
        return
    options = getattr(case, "options", {})
    metric = {"a": tensor([[1.0, -1.0], [1.0, 1.0]])}
    with pytest.raises(ValueError, match=r"^metric at 'a' has the entry -1\.0; expected numbers of at least 0"):
        case.penalty.prox(params, 0.1, *case.hyper, metric=metric, **options)
    for zero in (0.0, -0.0):
        metric = {"a": torch.full((2, 2), zero)}
        assert_equal(case.penalty.prox(params, 0.0, *case.hyper, metric=metric, **options), params)
        assert case.penalty.prox(params, 0.1, *case.hyper, metric=metric, **options)["a"].isfinite().all()


def test_a_metric_of_0_holds_nothing_back_and_nan_goes_through():
    params, h = {"a": tensor([1.0, -2.0, 3.0])}, {"a": tensor([0.0, -0.0, float("nan")])}
    found = fr.l1.prox(params, 0.1, metric=h)["a"]
    assert_equal(found[:2], tensor([0.0, 0.0]))
    assert found[2].isnan()
    with pytest.raises(ValueError, match=r"^metric at 'a' has the entry -1"):
        fr.box.project(params, -1.0, 1.0, metric={"a": tensor([1.0, 1.0, -1.0])})
    vmap(lambda h: fr.l1.prox(params, 0.1, metric={"a": h}))(-torch.ones(2, 3))  # Not known, not read.


def test_a_threshold_below_0_is_refused():
    w = tensor([1.0, -2.0])
    for wrong in (-0.5, tensor(-0.5)):
        with pytest.raises(ValueError, match=r"^threshold is -0\.5; expected a number of at least 0"):
            fr.shrink(w, wrong)
    with pytest.raises(ValueError, match=r"^threshold has the entry -0\.5; expected numbers of at least 0"):
        fr.shrink(w, tensor([0.5, -0.5]))
    assert fr.shrink(w, float("nan")).isnan().all()


# Penalties without a gradient


@pytest.mark.parametrize("name", [name for name, value in vars(fr).items() if isinstance(value, fr.Penalty)])
def test_a_penalty_without_a_gradient_is_refused_where_one_is_added(name):
    penalty = getattr(fr, name)
    if penalty.has_gradient:
        return
    for make in (fr.add_penalty, lambda *p: fr.value_and_grad(*p, backend="eager")):
        hyper = {"box": (-1.0, 1.0), "top_k": (1,), "n_m_sparsity": (2, 4)}.get(name)
        if hyper is None:
            count = [
                p for p in list(inspect.signature(penalty).parameters.values())[1:] if p.kind is not p.KEYWORD_ONLY
            ]
            hyper = (1.0,) * len(count)
        with pytest.raises(TypeError, match=rf"{name}, whose gradient is 0 everywhere.*Use (project|proximal)"):
            make(penalty, *hyper)


@pytest.mark.parametrize("name", PENALTIES)
def test_what_says_that_it_has_a_gradient_has_one(name):
    case = PENALTIES[name]
    grads = case.penalty.grad(draw(), *case.hyper, **getattr(case, "options", {}))
    assert case.penalty.has_gradient == any([bool(g.any()) for g in fr.tree_map(lambda g: g, _leaves(grads))])


def _leaves(tree):
    found = []
    fr.tree_map(found.append, tree)
    return found


def test_constraints_and_sums_with_a_term_without_a_gradient_have_none():
    assert not any(case.penalty.has_gradient for case in CONSTRAINTS.values())
    assert not (0.1 * fr.l1 + fr.l0).has_gradient
    assert not fr.coupled(fr.group_l0, {"a": 0}).has_gradient
    assert (0.1 * fr.l1 + fr.l2).has_gradient
    with pytest.raises(TypeError, match=r"l1 \+ l0, whose gradient is 0 everywhere, or that of a term is"):
        fr.add_penalty(fr.l1 + fr.l0)


@pytest.mark.parametrize("strength", [0.1, 0.0, torch.tensor(1.0, device="cpu"), fr.linear_schedule(0.0, 1.0, 5)])
@pytest.mark.parametrize("name", ["regularize", "prox_sgd", "prox_adam", "fista", "rmda", "ramda", "ftrl"])
def test_a_strength_of_a_constraint_is_refused(name, strength):
    make = getattr(fr, name)
    for penalty in (fr.linf_ball.given(1.0), 0.5 * fr.linf_ball.given(1.0, mask=fr.matrices)):
        first = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], 0.1) if name == "regularize" else 0.1
        with pytest.raises(ValueError, match=r"linf_ball.* holds whatever its strength; expected no strength="):
            make(first, penalty, strength=strength)
        make(first, penalty, strength=1.0)


# Strengths of value_and_grad


def test_value_and_grad_takes_weights_as_add_penalty_does():
    params = {"a": tensor([[1.0, -1.0]]), "b": tensor([[2.0, 2.0]])}
    for strength in (0.5, tensor(0.5), tensor([0.1, 0.2]), {"a": 0.1, "b": tensor([[0.2, 0.0]])}, {"a": 0.1, "b": 0.0}):
        for mask in (None, {"a": True, "b": False}):
            value, grads = fr.value_and_grad(fr.l1, strength=strength, mask=mask, backend="eager")(params)
            tx = fr.add_penalty(fr.l1, strength=strength, mask=mask)
            assert value.shape == ()
            assert_equal(grads, step(tx, fr.tree_map(torch.zeros_like, params), params))
            assert_equal(value, fr.l1.weighted_value(params, strength, mask=mask))
    for penalty, hyper, strength in ((fr.l1, (), lambda count: 0.1), (fr.elastic, (lambda count: 0.1, 0.5), 1.0)):
        with pytest.raises(TypeError, match="value_and_grad got a function as the strength or a hyperparameter"):
            fr.value_and_grad(penalty, *hyper, strength=strength)
    with pytest.raises(TypeError, match="strength is the penalty l2; expected a number"):
        fr.value_and_grad(fr.l1, strength=fr.l2)
    with pytest.raises(TypeError, match="mask is the string 'a'"):
        fr.value_and_grad(fr.l1, mask="a")


# Options that are True or False

FLAGGED = {
    "Constraint": lambda **o: fr.Constraint(lambda params: params, **o),
    "Penalty": lambda **o: fr.Penalty(fr.global_norm, lambda params: params, lambda params, step: params, **o),
    "Transform": lambda **o: fr.Transform(fr.init_empty_state, lambda u, s, p: (u, s), **o),
    "Along": lambda **o: fr.coupled(fr.group_lasso, {"a": fr.Along(0, **o)}),
    "constraint": fr.constraint,
    "tree_norm": lambda **o: fr.tree_norm(torch.ones(2), **o),
    "penalty": lambda **o: fr.penalty(gradient=abs, proximal=abs, **o),
    "adam": lambda **o: fr.adam(0.1, **o),
    "adamw": lambda **o: fr.adamw(0.1, **o),
    "amsgrad": lambda **o: fr.amsgrad(0.1, **o),
    "nadamw": lambda **o: fr.adamw(0.1, **o),
    "ema": lambda **o: fr.ema(0.9, **o),
    "trace": lambda **o: fr.trace(0.9, **o),
    "exponential_decay": lambda **o: fr.exponential_decay(0.1, 3, 0.5, **o),
    "fista": lambda **o: fr.fista(0.1, fr.l1, **o),
    "masked": lambda **o: fr.masked(fr.identity(), True, **o),
    "partition": lambda **o: fr.partition({0: fr.identity()}, 0, **o),
    "prox_sgd": lambda **o: fr.prox_sgd(0.1, fr.l1, momentum=0.9, **o),
    "rmsprop": lambda **o: fr.rmsprop(0.1, momentum=0.9, **o),
    "scale_by_adam": fr.scale_by_adam,
    "scale_by_amsgrad": fr.scale_by_amsgrad,
    "scale_by_learning_rate": lambda **o: fr.scale_by_learning_rate(0.1, **o),
    "scale_by_rms": fr.scale_by_rms,
    "scale_by_stddev": fr.scale_by_stddev,
    "sgd": lambda **o: fr.sgd(0.1, momentum=0.9, **o),
    "dpsgd": lambda **o: fr.dpsgd(0.1, 1.0, 1.0, 0, momentum=0.9, **o),
    "warmup_exponential_decay_schedule": lambda **o: fr.warmup_exponential_decay_schedule(0.0, 0.1, 3, 3, 0.5, **o),
    "adafactor": fr.adafactor,
    "scale_by_factored_rms": fr.scale_by_factored_rms,
    "adopt": lambda **o: fr.adopt(0.1, **o),
    "scale_by_adopt": fr.scale_by_adopt,
    "muon": lambda **o: fr.muon(0.1, **o),
    "scale_by_muon": fr.scale_by_muon,
    "lbfgs": fr.lbfgs,
    "scale_by_lbfgs": fr.scale_by_lbfgs,
    "scale_by_backtracking_linesearch": lambda **o: fr.scale_by_backtracking_linesearch(5, **o),
    "per_example_layer_norm_clip": lambda **o: fr.per_example_layer_norm_clip(torch.ones(2, 2), 1.0, **o),
    "from_state_dict": lambda **o: fr.from_state_dict({}, {}, **o),
    "fuse": lambda **o: fr.fuse(fr.identity(), **o),
    "regularize": lambda **o: fr.regularize(torch.optim.SGD([torch.ones(1)], 0.1), fr.l1, **o),
    "report": lambda **o: fr.report({}, **o),
    "Structure": fr.Structure,
    "channel_groups": lambda **o: fr.channel_groups(torch.nn.Linear(2, 2), (torch.ones(1, 2),), **o),
    "resized": lambda **o: fr.resized(torch.nn.Linear(2, 2), {"bias": torch.ones(2)}, **o),
    "compare": lambda **o: fr.compare({}, {}, **o),
    "MultiSteps": lambda **o: fr.MultiSteps(fr.identity(), 2, **o),
    "conditionally_mask": lambda **o: fr.conditionally_mask(fr.identity(), abs, **o),
    "conditionally_transform": lambda **o: fr.conditionally_transform(fr.identity(), abs, **o),
    "lookahead": lambda **o: fr.lookahead(fr.identity(), 2, 0.5, **o),
    "measure_with_ema": lambda **o: fr.measure_with_ema(fr.global_norm, 0.5, **o),
    "multi_transform": lambda **o: fr.multi_transform({0: fr.identity()}, 0, **o),
    "sam": lambda **o: fr.sam(fr.identity(), fr.identity(), **o),
    "scale_by_belief": fr.scale_by_belief,
    "scale_by_radam": fr.scale_by_radam,
    "scale_by_sm3": fr.scale_by_sm3,
    "adabelief": lambda **o: fr.adabelief(0.1, **o),
    "nadam": lambda **o: fr.adam(0.1, **o),
    "optimistic_adam": lambda **o: fr.optimistic_adam(0.1, **o),
    "optimistic_adam_v2": lambda **o: fr.optimistic_adam_v2(0.1, **o),
    "radam": lambda **o: fr.radam(0.1, **o),
    "lars": lambda **o: fr.lars(0.1, **o),
}


def options(function):
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if str(getattr(p.annotation, "__forward_arg__", p.annotation)) in _BOOLS]


_BOOLS = ("bool", "bool | None", "<class 'bool'>")
PUBLIC = {name: value for name, value in vars(fr).items() if not name.startswith("_") and callable(value)}
EVERY_FLAG = [(name, option) for name, value in PUBLIC.items() for option in options(value)]


@pytest.mark.parametrize(("name", "option"), EVERY_FLAG)
def test_an_option_that_is_neither_true_nor_false_is_refused(name, option):
    for thing in ("no", 0, 1.0):
        with pytest.raises(TypeError, match=rf"^{option} is {thing!r}; expected True or False"):
            FLAGGED[name](**{option: thing})


# Groups that a mask leaves out


def test_groups_of_which_a_mask_leaves_no_leaf_are_refused():
    params = {"a": torch.ones(2, 3), "b": torch.ones(2), "c": torch.ones(2)}
    units, only_c = fr.coupled(fr.group_lasso, {"a": 0, "b": 0}), {"a": False, "b": False, "c": True}
    for call in (
        lambda: units(params, mask=only_c),
        lambda: units.grad(params, mask=only_c),
        lambda: units.prox(params, 0.1, mask=only_c),
        lambda: (0.5 * units)(params, mask=fr.select("c")),
        lambda: step(fr.proximal(units, 0.1, mask=only_c), params, params),
        lambda: step(fr.chain(fr.freeze({"a": True, "b": True, "c": False}), fr.prox_sgd(0.1, units)), params, params),
    ):
        with pytest.raises(ValueError, match=r"groups names no leaf that a mask or freeze has left: those are c\."):
            call()
    assert units(params, mask={"a": True, "b": False, "c": False}) > 0


# Names that reach nobody


def takes_value(**kept):
    return fr.Transform(fr.init_empty_state, lambda updates, state, params, value: (updates, state), **kept)


def takes_all(seen):
    def update(updates, state, params, **extra):
        seen.append(sorted(extra))
        return updates, state

    return fr.Transform(fr.init_empty_state, update)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: fr.chain(fr.clip(1.0), tx),
        lambda tx: fr.named_chain(("a", tx)),
        lambda tx: fr.masked(tx, IN_A),
        lambda tx: fr.chain(fr.freeze(IN_A), tx),
        lambda tx: fr.partition({0: tx, 1: fr.identity()}, {"a": 0, "b": 1}),
        lambda tx: fr.apply_if_finite(fr.chain(fr.identity(), tx), 3),
    ],
)
def test_an_extra_argument_that_no_transform_takes_is_refused_by_name(wrap):
    tx = wrap(takes_value())
    tx.update(ONES, tx.init(LEAVES), LEAVES, value=3.0)
    with pytest.raises(TypeError, match=r"^update got the extra argument 'valeu', which no transform of .* takes"):
        tx.update(ONES, tx.init(LEAVES), LEAVES, value=3.0, valeu=3.0)
    seen = []
    both = fr.chain(tx, wrap(takes_all(seen)))
    both.update(ONES, both.init(LEAVES), LEAVES, value=3.0, other=1.0)
    assert seen == [["other", "value"]]
    tx = fr.sgd(0.1)
    with pytest.raises(TypeError, match="which no transform of"):
        tx.update(ONES, tx.init(LEAVES), LEAVES, loss=1.0)
    tx.update(ONES, tx.init(LEAVES), LEAVES, value=1.0)  # Which loops hand to every chain.


def test_an_ensemble_and_compiled_code_refuse_and_take_the_same_names():
    def make(rate):
        return fr.chain(takes_value(), fr.sgd(rate))

    tx, stack = fr.ensemble(make, tensor([0.1, 0.2])), {"a": torch.ones(2, 3)}
    tx.update(stack, tx.init(stack), stack, value=3.0)
    with pytest.raises(TypeError, match="extra argument 'valeu'"):
        tx.update(stack, tx.init(stack), stack, value=3.0, valeu=3.0)
    one = make(0.1)
    state = one.init(LEAVES)
    compiled = torch.compile(lambda g, p: one.update(g, state, p, value=3.0)[0], backend="eager", fullgraph=True)
    assert_equal(compiled(ONES, LEAVES), one.update(ONES, state, LEAVES, value=3.0)[0])
    fused = fr.fuse(one, backend="eager")
    with pytest.raises(TypeError, match="extra argument 'valeu'"):
        fused(LEAVES, ONES, state, value=tensor(3.0), valeu=tensor(3.0))


# Truth values


@pytest.mark.parametrize("thing", [fr.l1, 0.5 * fr.l1 + fr.l2, fr.nonnegative, fr.sgd(0.1), fr.chain()])
def test_penalties_and_transforms_have_no_truth_value(thing):
    said = "Write chain" if isinstance(thing, fr.Transform) else r"Write a \+ b"
    for use in (lambda: not thing, lambda: thing and fr.l2, lambda: thing or fr.l2, lambda: bool(thing)):
        with pytest.raises(TypeError, match=f"has no truth value. {said}"):
            use()


# Penalties where numbers belong, and functions of the wrong kind


@pytest.mark.parametrize(
    "make",
    [
        fr.sgd,
        fr.scale,
        fr.soft_threshold,
        fr.clip,
        lambda p: fr.adamprox(0.1, p),
        lambda p: fr.adamw(0.1, weight_decay=p),
        lambda p: fr.sgd({"a": p}),
        lambda p: fr.prox_sgd(0.1, fr.elastic, p, 0.5),
        lambda p: fr.elastic(LEAVES, p, 0.5),
        lambda p: fr.constant_schedule(p),
        lambda p: fr.l1.prox(LEAVES, p),
    ],
)
def test_a_penalty_is_no_schedule(make):
    for thing, name in (
        (fr.l1, "penalty l1"),
        (fr.nonnegative, "constraint nonnegative"),
        (fr.matrices, "selection ma"),
    ):
        with pytest.raises(TypeError, match=rf" is the {name}.*; expected a number, a tensor, a schedule"):
            make(thing)


def test_a_function_that_expects_a_leaf_is_told_that_it_gets_the_tree():
    for mask in (lambda w: w.ndim > 1, lambda name, w: True, lambda w: w > 0):
        with pytest.raises(
            TypeError, match=r"mask=<lambda> raised .*gets the whole tree.*tree_map\(lambda w: .*select"
        ):
            fr.l1(LEAVES, mask=mask)
    with pytest.raises(TypeError, match=r"param_labels=<lambda> raised AttributeError.*gets the whole tree"):
        fr.partition({0: fr.sgd(0.1)}, lambda w: w.ndim).init(LEAVES)
    for f in (torch.sign, lambda u: u, lambda u, p: u.sign()):
        with pytest.raises(TypeError, match=r"of stateless raised .*It gets two trees.*tree_map\("):
            step(fr.stateless(f), ONES)


# Names of torch.optim


def as_optimizer(factory, **options):
    return fr.Optimizer([nn.Parameter(torch.ones(2))], factory, lr=0.1, **options)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: fr.adam(lr=1e-3), "adam got lr=, as in torch.optim; here that is learning_rate"),  # pyright: ignore[reportCallIssue]
        (lambda: fr.prox_adam(1e-3, fr.l1, betas=(0.9, 0.99)), "prox_adam got betas=, .* here that is b1 and b2"),
        (lambda: fr.sgd(1e-2, weight_decay=1e-4), "sgd got weight_decay=, .* with_weight_decay"),  # pyright: ignore[reportCallIssue]
        (lambda: fr.rmsprop(1e-2, alpha=0.99), "rmsprop got alpha=, .* here that is decay"),  # pyright: ignore[reportCallIssue]
        (
            lambda: as_optimizer(fr.adamw, betas=(0.9, 0.99)),
            "not take betas; .* It is a name of torch.optim; .* b1 and b2",
        ),
        (
            lambda: as_optimizer(fr.sgd, weight_decay=1e-4),
            "not take weight_decay; .* that is a link .* with_weight_decay",
        ),
        (lambda: as_optimizer(fr.rmsprop, alpha=0.99), "not take alpha; .* here that is decay"),
        (
            lambda: as_optimizer(fr.prox_adam, strength=0.1),
            r"takes a penalty, .* lambda lr, strength: fr.prox_adam\(lr,",
        ),
        (lambda: as_optimizer(fr.sgd, betas=(0.9, 0.99)), "not take betas; .* Add it to the parameters of the factory"),
        (
            lambda: as_optimizer(lambda lr: fr.adam(lr), betas=(0.9, 0.99)),
            "not take betas; .* Add it to the parameters",
        ),
    ],
)
def test_arguments_by_the_names_of_torch_are_told_what_they_are_here(make, said):
    with pytest.raises(TypeError, match=said):
        make()


# Calls that are written as for something else


NET = torch.nn.Linear(3, 2)
OPTIMIZER = torch.optim.SGD(NET.parameters(), lr=0.1)
ANY: Any = fr  # What is wrong here, a type checker sees too.

MISWRITTEN = {
    "prox with a strength": (
        lambda: ANY.l1.prox(LEAVES, strength=0.1),
        r"l1\.prox lacks step; expected l1\.prox\(params, step\)\. The step is the learning rate times the strength",
    ),
    "prox of a sum": (
        lambda: (0.1 * ANY.l1).prox(LEAVES),
        r"\(0\.1 \* l1\)\.prox lacks step; expected \(0\.1 \* l1\)\.p",
    ),
    "prox with both": (
        lambda: fr.l1.prox(LEAVES, 0.1, strength=0.1),
        r"got strength\..* l1\.prox\(params, 1e-4 \* rate\)",
    ),
    "dual prox": (
        lambda: ANY.l1.prox_dual(LEAVES),
        r"l1\.prox_dual lacks step; expected l1\.prox_dual\(params, step\)",
    ),
    "a gradient with a strength": (
        lambda: fr.l1.grad(LEAVES, lam=0.1),
        r"got lam\. Its strength is a factor, 1e-4 \* l1",
    ),
    "strengths of Keras": (
        lambda: fr.elastic(LEAVES, l1=0.1, l2=0.2),
        r"got l1, l2\. Two strengths .* elastic\(params, \*elastic_from_keras\(l1=1e-3, l2=1e-4\)\)",
    ),
    "one argument too many": (
        lambda: fr.l1(LEAVES, 0.1),
        r"l1 takes no hyperparameters; got 1.* Its strength is a factor",
    ),
    "a penalty called": (lambda: ANY.l1(), r"l1 lacks params; expected l1\(params\)\. What takes a penalty .* gets it"),
    "a projection of nothing": (
        lambda: ANY.l2_ball.project(),
        r"l2_ball\.project lacks params; expected l2_ball\.project\(p",
    ),
    "a gradient of nothing": (
        lambda: ANY.elastic.grad(),
        r"elastic\.grad lacks params; expected .*\(params, alpha, rho\)",
    ),
    "a value for a penalty": (lambda: fr.add_penalty(ANY.l1(LEAVES)), r"the penalty itself, l1 and not l1\(params\)"),
    "a layer for a penalty": (lambda: fr.regularize(OPTIMIZER, NET), "penalty is a Linear; expected a Penalty"),
    "a penalty for a rate": (lambda: fr.prox_sgd(ANY.l1, ANY.l1), "learning_rate is the penalty l1; .* another order"),
    "a penalty in a chain": (
        lambda: fr.chain(ANY.l1),
        r"is the penalty l1; .* add_penalty\(l1\) before the step, or pr",
    ),
    "a set in a chain": (lambda: fr.chain(ANY.max_norm), r"is the constraint max_norm; .* project\(max_norm, \.\.\.\)"),
    "a mask for a transform": (
        lambda: fr.masked(ANY.matrices, ANY.sgd(0.1)),
        r"the selection matrices; .* masked\(tx, m",
    ),
    "a penalty in a loss": (lambda: torch.ones(()) + 0.1 * ANY.l1, r"a tensor; expected .* \(0\.1 \* l1\)\(params\)"),
    "a penalty and a number": (lambda: ANY.l1 + 1.0, r"l1 and the float 1\.0; expected penalties"),
    "a module to regularize": (
        lambda: fr.regularize(NET, fr.l1),
        r"optimizer is a Linear; expected one of torch.* as in regularize\(optimizer, l1, strength=",
    ),
    "groups to regularize": (lambda: fr.regularize(OPTIMIZER.param_groups, fr.l1), "optimizer is a list; expected"),
    "a class to regularize": (lambda: fr.regularize(torch.optim.SGD, fr.l1), "optimizer is the class SGD; expected"),
    "arguments of regularize swapped": (lambda: fr.regularize(ANY.l1, OPTIMIZER), "optimizer is the penalty l1; exp"),
    "parameters for a module": (
        lambda: fr.regularize(OPTIMIZER, fr.l1, module=NET.parameters()),
        "module is a generator; expected the torch.nn.Module",
    ),
    "an optimizer for parameters": (
        lambda: fr.Optimizer(OPTIMIZER, fr.adamw, lr=0.1),
        r"params is the optimizer SGD; expected parameters, .* regularize\(optimizer, l1\)",
    ),
    "a penalty for a factory": (
        lambda: fr.Optimizer(NET.parameters(), ANY.l1),
        r"factory is the penalty l1; .* lambda lr, strength: fr\.prox_adam\(lr, l1, strength=strength\)",
    ),
    "a transform for a factory": (
        lambda: fr.Optimizer(NET.parameters(), ANY.adamw(1e-3)),
        r"factory is adamw\(0\.001\); expected a function .* fr\.adamw itself .*\(params, fr\.adamw, lr=1e-3\)",
    ),
    "arguments of Optimizer swapped": (lambda: fr.Optimizer(fr.adamw, NET.parameters()), "factory is a generator; exp"),
    "an optimizer for a factory": (
        lambda: fr.Optimizer(NET.parameters(), OPTIMIZER),
        "factory is an SGD; expected a f",
    ),
}


@pytest.mark.parametrize(("call", "says"), MISWRITTEN.values(), ids=MISWRITTEN)
def test_what_is_written_wrong_is_told_how_to_write_it(call, says):
    with pytest.raises(TypeError, match=says):
        call()


def test_penalties_are_summed_by_sum():
    assert repr(sum([fr.l1, 0.5 * fr.l2])) == "l1 + 0.5 * l2"


# Frozen parameters


def half_frozen():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).to("cpu")
    model(torch.ones(2, 3, device="cpu")).sum().backward()
    model[0].requires_grad_(False)
    return model


def held(parameters):
    return {name: w.detach().clone() for name, w in parameters.items() if name.startswith("0")}


@pytest.mark.parametrize("where", ["regularize", "Optimizer"])
def test_a_penalty_leaves_frozen_parameters_with_gradients_of_zero_as_they_were(where):
    model = half_frozen()
    if where == "regularize":
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        fr.regularize(optimizer, fr.l1, strength=1e-3, module=model)
    else:
        chain = lambda lr: fr.prox_adam(lr, fr.l1, strength=1e-3, weight_decay=0.1)
        optimizer = fr.Optimizer(model.named_parameters(), chain, lr=0.1, compile=False)
    before = held(dict(model.named_parameters()))
    optimizer.zero_grad(set_to_none=False)
    model(torch.ones(2, 3, device="cpu")).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
        optimizer.step()
    assert_close(held(dict(model.named_parameters())), before, rtol=0, atol=0)
    assert len(caught) == (where == "regularize")
    model[0].requires_grad_(True)  # It thaws, and moves from then on.
    model(torch.ones(2, 3, device="cpu")).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_a_step_names_frozen_parameters_that_it_would_move():
    params = dict(half_frozen().named_parameters())
    with pytest.warns(UserWarning, match=r"init got 0.bias, 0.weight with requires_grad=False"):
        fr.fuse(fr.prox_adam(0.1, fr.l1), backend="eager").init(params)
    is_first = {name: name.startswith("0") for name in params}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fr.fuse(fr.chain(fr.freeze(is_first), fr.prox_adam(0.1, fr.l1)), backend="eager").init(params)
        step = fr.fuse(fr.prox_adam(0.1, fr.l1), backend="eager")
        step.init({name: w for name, w in params.items() if w.requires_grad})
        step.init({name: w.detach() for name, w in params.items()})  # Of gradients by torch.func.
        step.init({"w": torch.ones(2, requires_grad=True), "anchor": torch.ones(2)})


# Anchors that move along


@pytest.mark.parametrize(
    "penalty", [lambda anchor: fr.anchored_l1.given(anchor), lambda anchor: 2 * fr.anchored_l2.given(anchor)]
)
def test_an_anchor_in_the_memory_of_parameters_that_are_trained_is_said(penalty):
    model = nn.Linear(3, 2).to("cpu")
    params, shared = dict(model.named_parameters()), model.state_dict()
    with pytest.warns(UserWarning, match=r"shares memory with params 'weight', .* moves both"):
        penalty({**shared, "bias": torch.zeros(2)})(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty(copy.deepcopy(shared))(params)
        penalty({**shared, "weight": torch.zeros(2, 3)})(params, mask=fr.matrices)  # The bias is left out.
        penalty(shared)(shared)  # As in functional loops, which begin where the anchor is, and write into nothing.
        torch.func.grad(penalty(shared))(params)
        torch.compile(lambda params: penalty(shared)(params), backend="eager", fullgraph=True)(params)
        with torch.no_grad():
            assert penalty(shared)(params) == 0


# While another thread compiles, nothing here is compiled


@pytest.fixture
def compiling_beside():
    """Another thread in the middle of a compilation."""
    begun, over = threading.Event(), threading.Event()

    def backend(graph, inputs):
        begun.set()
        assert over.wait(60)
        return graph

    def work():
        torch.compile(lambda x: x.sin(), backend=backend)(torch.ones(3, device="cpu"))

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    yield
    over.set()
    thread.join()


@pytest.mark.usefixtures("compiling_beside")
def test_while_another_thread_compiles_checks_names_and_pickles_are_those_of_always():
    with pytest.raises(ValueError, match="at member 1 of the ensemble: strength is -1"):
        fr.ensemble(lambda s: fr.prox_sgd(0.1, fr.l1, strength=s), tensor([1.0, -1.0], device="cpu"))
    for made in (fr.chain(fr.clip(1.0), fr.adam(0.1)), ~fr.matrices, fr.select("a") & fr.matrices):
        assert "locals" not in repr(made)
        assert repr(pickle.loads(pickle.dumps(made))) == repr(made)
    with pytest.warns(UserWarning, match="uphill"):
        fr.chain(fr.adam(0.1), fr.add_decayed_weights(0.1)).init(LEAVES)


@pytest.mark.usefixtures("compiling_beside")
def test_while_another_thread_compiles_a_hook_says_no_zeros_that_are_not_there():
    model = nn.Linear(3, 2, device="cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    fr.regularize(optimizer, fr.l1, strength=1e-6, compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 3, device="cpu")).square().sum().backward()
            optimizer.step()
