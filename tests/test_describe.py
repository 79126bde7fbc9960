"""What descriptions say: every transform in words, the leaves it acts on, and the known mistakes."""

from __future__ import annotations

import inspect
import re
import warnings

import pytest
import torch
from cases import HEAD, TRANSFORMS, draw, falling
from torch import nn

import funcreg as fr
from funcreg.core.notation import formula, plain

PUBLIC = {name: value for name, value in vars(fr).items() if not name.startswith("_") and not inspect.ismodule(value)}


def described(tx, params=None):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fr.describe(tx, params)


@pytest.mark.parametrize("case", TRANSFORMS.values(), ids=TRANSFORMS)
def test_every_transform_is_described_by_its_documentation(case):
    tx = case.make()
    for params in (None, draw()):
        found = described(tx, params)
        assert found.rows[0].link == repr(tx)
        assert all(row.what for row in found.rows if not row.link.startswith("Transform("))
        assert isinstance(found, fr.Description)
        assert str(found) == repr(found)
        assert len({row.depth for row in found.rows}) == 1 + max(row.depth for row in found.rows)
        for row in found.rows:
            assert row.link in str(found)
            assert (row.leaves is None) == (params is None)


def test_an_optimizer_of_chains_is_refused_with_what_to_describe():
    optimizer = fr.Optimizer(torch.nn.Linear(2, 1).named_parameters(), fr.adamw, lr=1e-3)
    with pytest.raises(
        TypeError, match=r"argument 0 of describe is an Optimizer; .* give describe what the factory makes"
    ):
        fr.describe(optimizer)


def test_formulas_become_letters_and_signs():
    first = {name: plain((inspect.getdoc(value) or "").split("\n\n")[0]) for name, value in PUBLIC.items()}
    marks = ("\\", "$", ":math:", "  ", "`")
    assert {name: text for name, text in first.items() if any(mark in text for mark in marks)} == {}


def test_letters_and_signs():
    assert formula(r"\frac{\lambda}{2} \|w\|_2^2") == "λ/2 ‖w‖₂²"
    assert formula(r"u / \sqrt{v + \epsilon}") == "u / √(v + ε)"
    assert formula(r"\sqrt[3]{x_{t-1}} \hat{m}^{n}, \{a\}") == "∛xₜ₋₁ m̂ⁿ, {a}"
    assert formula(r"x^") == "x"
    assert plain("Add :math:`w`\n to `updates`.") == "Add w to updates."


def test_an_optimizer_is_shown_with_its_links_and_their_leaves():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    found = described(fr.adamw(1e-3, weight_decay=0.1, mask=fr.matrices), model)
    assert [row.depth for row in found.rows] == [0, 1, 1, 1]
    assert [row.link.partition("(")[0] for row in found.rows] == [
        "adamw",
        "scale_by_adam",
        "add_decayed_weights",
        "scale_by_learning_rate",
    ]
    assert found.rows[2].leaves == ("0.weight",)
    assert found.rows[2].note == "1 of 4 leaves, 6 of 12 numbers: 0.weight; not 0.bias, 1.bias, 1.weight"
    assert found.rows[1].note == "all 4 leaves, 12 numbers"
    assert not found.warnings


def test_wrappers_are_opened_with_their_labels():
    params = draw()
    parts = {"slow": fr.adam(0.1), "fast": fr.masked(fr.sgd(0.1), True)}
    tx = fr.named_chain(("clip", fr.clip(1.0)), ("parts", fr.partition(parts, {"head": "slow", "body": "fast"})))
    found = described(tx, params)
    assert [row.place for row in found.rows] == ["", "clip", "parts", "slow", "1", "2", "fast", "1", "1", "2"]
    slow, fast = (next(row for row in found.rows if row.place == label) for label in parts)
    assert set(slow.leaves) == {"head.weight", "head.bias"}
    assert set(fast.leaves) == {"body.filters", "body.scale.0"}
    assert not found.warnings


def test_frozen_leaves_are_left_out_of_the_other_links():
    found = described(fr.chain(fr.adam(0.1), fr.chain(fr.freeze(HEAD))), draw())
    adam, freeze = (next(row for row in found.rows if row.link.startswith(name)) for name in ("scale_by_a", "freeze"))
    assert set(adam.leaves) == {"body.filters", "body.scale.0"}
    assert set(freeze.leaves) == {"head.weight", "head.bias"}
    assert freeze.note.startswith("holds 2 of 4 leaves")


BODY = {"head": False, "body": True}


@pytest.mark.parametrize(
    "make",
    [
        lambda: fr.partition({True: fr.freeze(True), False: fr.sgd(0.1)}, HEAD),
        lambda: fr.chain(fr.clip(1.0), fr.partition({True: fr.chain(fr.freeze(True)), False: fr.sgd(0.1)}, HEAD)),
        lambda: fr.chain(fr.sgd(0.1), fr.masked(fr.freeze(True), HEAD)),
        lambda: fr.MultiSteps(fr.chain(fr.freeze(HEAD), fr.sgd(0.1, momentum=0.9)), 2),
        lambda: fr.chain(fr.lookahead(fr.apply_if_finite(fr.chain(fr.sgd(0.1), fr.freeze(HEAD)), 2), 2, 0.5)),
        lambda: fr.chain(
            fr.freeze({"head": {"weight": True, "bias": False}, "body": False}), fr.chain(fr.freeze(HEAD)), fr.sgd(0.1)
        ),
        lambda: fr.chain(fr.freeze(HEAD), fr.add_decayed_weights(0.0, {"body": True}), fr.masked(fr.sgd(0.1), BODY)),
    ],
)
def test_leaves_that_are_frozen_inside_are_those_that_are_said_to_be_held(make):
    tx, params = make(), draw()
    params["head"] = params["head"]._asdict()
    held = [name for name, frozen in zip(fr.tree_paths(params), tx.frozen(params), strict=True) if frozen]
    found = described(tx, params)
    assert not found.warnings
    assert [set(row.leaves) for row in found.rows if row.link.startswith("freeze(")][-1] == set(held)
    for row in found.rows:
        if row.note and not row.link.startswith("freeze("):
            assert set(row.leaves) <= set(fr.tree_paths(params)) - set(held), row


def test_what_a_factory_makes_is_opened_and_its_mistakes_are_warned_of():
    """Also with the schedules that it was called with, and inside other wrappers."""

    def make(rate, threshold):
        return fr.chain(fr.sgd(rate), fr.soft_threshold(threshold))

    tx = fr.inject_hyperparams(make)(fr.linear_schedule(0.1, 0.0, 5), 0.1)
    for each in (tx, fr.MultiSteps(tx, 2)):
        described = fr.describe(each)
        assert "soft_threshold(0.1)" in str(described)
        assert [message for message in described.warnings if "the threshold does not" in message]
    assert len(fr.describe(fr.inject_hyperparams(fr.adam)(0.1)).rows) == len(fr.describe(fr.adam(0.1)).rows) + 1


def test_an_ensemble_is_shown_by_its_first_member():
    members = fr.tree_map(lambda w: torch.stack([w, w]), draw())
    found = described(fr.ensemble(lambda rate: fr.adamw(rate, mask=fr.matrices), torch.tensor([0.1, 0.2])), members)
    assert found.rows[1].place == "each member, here the first"
    assert set(found.rows[3].leaves) == {"head.weight", "body.filters"}


def test_a_users_own_is_shown_by_its_name_and_documentation():
    def halve(updates, state, params):
        """Halve :math:`u`."""
        return fr.tree_map(lambda u: u / 2, updates), state

    found = described(fr.chain(fr.Transform(fr.init_empty_state, halve), fr.sgd(0.1)))
    assert "halve" in found.rows[1].link
    assert found.rows[1].what == "Halve u."
    assert described(fr.Transform(fr.init_empty_state, lambda u, s, p: (u, s))).rows[0].what == ""
    assert not found.warnings


SCHEDULE = fr.linear_schedule(0.1, 0.0, 10)

#: Chains, and of each warning what it says.
MISTAKEN = {
    "decay before Adam": (
        lambda: fr.chain(fr.add_decayed_weights(0.1, fr.matrices), fr.adam(0.1)),
        ["before scale_by_adam.*'decoupled'"],
    ),
    "coupled decay before Lion": (
        lambda: fr.with_weight_decay(fr.lion(0.1, weight_decay=0.0), "coupled", 0.1, mask=fr.matrices),
        ["before scale_by_lion"],
    ),
    "a prox that is not last": (
        lambda: fr.chain(fr.sgd(0.1), fr.soft_threshold(0.1), fr.scale(0.5)),
        [r"scale\(0.5\) stands after soft_threshold.* scales or clips"],
    ),
    "clipping after a prox": (
        lambda: fr.chain(fr.sgd(0.1), fr.project(fr.l2_ball, 1.0), fr.clip_by_global_norm(1.0)),
        ["clip_by_global_norm.* stands after project.* scales or clips"],
    ),
    "a momentum after a prox": (
        lambda: fr.chain(fr.prox_sgd(0.1, fr.l1), fr.trace(0.9)),
        ["trace.* stands after prox_sgd.* changes", "prox_sgd.* penalizes .*head.bias"],
    ),
    "a constant threshold under a schedule": (
        lambda: fr.chain(fr.sgd(SCHEDULE), fr.soft_threshold(0.1)),
        [r"the learning rate follows linear_schedule\(0.1, 0.0, 10\) and the threshold does not"],
    ),
    "a constant threshold after Adam and momentum": (
        lambda: fr.chain(fr.trace(0.9), fr.adam(0.1), fr.proximal(fr.l1, 0.1)),
        ["a step size of its own, and trace.*longer"],
    ),
    "a mask that chooses nothing": (
        lambda: fr.chain(fr.masked(fr.clip(1.0), fr.select("decoder.*")), fr.sgd(0.1)),
        [r"select\('decoder.\*'\).*matches no"],
    ),
    "a mask that does not fit": (
        lambda: fr.chain(fr.masked(fr.clip(1.0), {"tail": True}), fr.sgd(0.1)),
        ["mask"],
    ),
    "labels that do not fit": (
        lambda: fr.partition({"a": fr.sgd(0.1)}, {"tail": "a"}),
        ["param_labels"],
    ),
    "decay of biases": (
        lambda: fr.adamw(0.1, weight_decay=0.1),
        [r"add_decayed_weights\(0.1, None\) decays .*head.bias.*mask=matrices"],
    ),
    "two decays": (
        lambda: fr.chain(fr.add_cautious_weight_decay(0.1, fr.matrices), fr.adamw(0.1, mask=fr.matrices)),
        ["before scale_by_adam", r"the same leaves decay, by add_cautious.* and again by add_decayed_weights"],
    ),
    "a penalty and a decay": (
        lambda: fr.chain(fr.sgd(0.1), fr.add_independent_weight_decay(0.1, mask=fr.matrices), fr.proximal(fr.l2, 0.1)),
        ["the same leaves decay, by add_independent.* and again by proximal"],
    ),
    "a ridge with decay": (
        lambda: fr.prox_adam(0.1, fr.elastic, 0.1, 0.5, weight_decay=0.1, mask=fr.matrices),
        ["the same leaves decay, by prox_adam.* twice"],
    ),
    "a penalty twice": (
        lambda: fr.chain(fr.add_penalty(fr.l1, strength=0.1), fr.prox_sgd(0.1, fr.l1)),
        [
            "add_penalty.* penalizes .*head.bias",
            "prox_sgd.* penalizes .*head.bias",
            "the same leaves are penalized by l1, by add_penalty.* and again by prox_sgd",
        ],
    ),
    "no learning rate": (lambda: fr.chain(fr.clip(1.0), fr.scale_by_adam()), ["updates go uphill"]),
    "a penalty before Adam": (
        lambda: fr.chain(fr.add_penalty(fr.l1, strength=0.1, mask=fr.matrices), fr.adam(0.1)),
        [r"add_penalty\(l1.* stands before scale_by_adam.*another strength.*prox_adam"],
    ),
    "an elastic net before Lion": (
        lambda: fr.chain(fr.add_penalty(fr.elastic, 0.1, 0.5, mask=fr.matrices), fr.lion(0.1, weight_decay=0.0)),
        [r"add_penalty\(elastic.* stands before scale_by_lion"],
    ),
    "a schedule that does not turn the sign": (
        lambda: fr.chain(fr.scale_by_adam(), fr.scale_by_schedule(fr.warmup_cosine_decay_schedule(0.0, 0.1, 5, 20))),
        ["no link has a learning rate that turns the sign: .* go uphill"],
    ),
    "a schedule that turns the sign again": (
        lambda: fr.chain(fr.adam(0.1), fr.scale_by_schedule(lambda count: -falling(count))),
        [r"scale_by_schedule\(.*\) turns the sign that scale_by_learning_rate\(0.1\) has turned"],
    ),
    "leaves that were to be held, and decay": (
        lambda: fr.chain(fr.masked(fr.set_to_zero(), HEAD), fr.adamw(0.1, mask=fr.matrices)),
        [r"add_decayed_weights\(0.0001, matrices\) stands after set_to_zero\(\) and moves the leaves .*freeze\(mask\)"],
    ),
    "leaves that were to be held, and thresholds": (
        lambda: fr.chain(fr.sgd(0.1), fr.masked(fr.set_to_zero(), HEAD), fr.soft_threshold(0.1)),
        [r"soft_threshold\(0.1\) stands after set_to_zero\(\)"],
    ),
    "two turns of the sign": (
        lambda: fr.chain(fr.adam(0.1), fr.scale(-1.0)),
        [r"scale\(-1.0\) turns the sign that scale_by_learning_rate\(0.1\) has turned: updates go uphill"],
    ),
    "a projection that does not see the metric": (
        lambda: fr.chain(fr.adam(0.1), fr.project(fr.simplex)),
        [r"project\(simplex\) goes to the nearest point of the set, and scale_by_adam.* not at its best point"],
    ),
    "a set that spoils another": (
        lambda: fr.chain(fr.sgd(0.1), fr.project(fr.l2_ball, 0.5), fr.project(fr.box, 0.1, 1.0)),
        [r"project\(box, 0.1, 1.0\) stands after project\(l2_ball, 0.5\): .* nor be the nearest point of both"],
    ),
    "two intervals apart": (
        lambda: fr.chain(fr.sgd(0.1), fr.project(fr.box, 0.0, 1.0), fr.project(fr.box, 2.0, 3.0)),
        [r"project\(box, 2.0, 3.0\) stands after project\(box, 0.0, 1.0\), and no number is in both sets"],
    ),
    "two sets in the wrong order": (
        lambda: fr.chain(fr.sgd(0.1), fr.project(fr.l2_ball, 0.5), fr.project(fr.nonnegative)),
        [r"project\(nonnegative\) stands after project\(l2_ball, 0.5\): .* Swap the two"],
    ),
    "a mean of zeros": (
        lambda: fr.lookahead(fr.prox_adam(0.1, fr.l1, mask=fr.matrices), 5, 0.5),
        [r"lookahead averages the parameters of prox_adam.*exactly zero"],
    ),
    "an average of zeros": (
        lambda: fr.schedule_free(fr.chain(fr.sgd(0.1), fr.soft_threshold(0.01)), 0.1),
        [r"schedule_free averages the parameters of soft_threshold"],
    ),
    "a penalty of biases": (
        lambda: fr.prox_adam(0.1, fr.l1),
        [r"prox_adam\(0.1, l1\) penalizes .*head.bias.*mask=matrices"],
    ),
    "a gradient of a penalty of biases": (
        lambda: fr.chain(fr.add_penalty(fr.l1, strength=0.1), fr.sgd(0.1)),
        [r"add_penalty\(l1, strength=0.1\) penalizes .*head.bias"],
    ),
    "a preconditioner in a step of its own": (
        lambda: fr.chain(fr.proximal_step(fr.scale_by_adam(), 0.1, fr.l1), fr.clip(1.0)),
        ["clip.* stands after proximal_step", r"proximal_step.* penalizes .*head.bias"],
    ),
    "a ridge in a sum with decay": (
        lambda: fr.chain(
            fr.add_decayed_weights(0.1, fr.matrices), fr.prox_sgd(0.1, fr.l1 + 0.5 * fr.half_l2, mask=fr.matrices)
        ),
        [r"the same leaves decay, by add_decayed_weights.* and again by prox_sgd"],
    ),
    "a mask around an optimizer": (
        lambda: fr.masked(fr.adam(0.1), HEAD),
        [r"masked\(adam.* makes steps downhill at some leaves.*: body.* would go uphill.*freeze"],
    ),
    "a climb that turns the sign of a descent that does not": (
        lambda: fr.sam(fr.chain(fr.scale_by_adam(), fr.clip(1.0)), fr.sgd(0.1)),
        ["no link has a learning rate that turns the sign: .* go uphill"],
    ),
    "a part that takes no steps": (
        lambda: fr.partition({"a": fr.sgd(0.1), "b": fr.clip(1.0)}, {"head": "a", "body": "b"}),
        [r"partition.*: body.* would go uphill"],
    ),
    "a part that climbs along a schedule": (
        lambda: fr.partition({"a": fr.sgd(0.1), "b": fr.scale_by_schedule(SCHEDULE)}, {"head": "a", "body": "b"}),
        [r"partition.*: body.* would go uphill"],
    ),
    "clipping of each of several gradients": (
        lambda: fr.chain(fr.clip_by_global_norm(1.0), fr.MultiSteps(fr.sgd(0.1), 4)),
        [r"clip_by_global_norm\(1.0\) stands before MultiSteps.*each of them, and not their mean. Put it inside"],
    ),
    "noise and moments of several gradients": (
        lambda: fr.named_chain(
            ("noise", fr.add_noise(0.1, 0.0, 0)),
            ("moments", fr.chain(fr.scale_by_adam(), fr.trace(0.9))),
            ("steps", fr.MultiSteps(fr.sgd(0.1), 4)),
            ("more", fr.add_noise(0.1, 0.0, 0)),
        ),
        ["averaged with them", "scale_by_adam.*memory", "trace.*memory", "stands after MultiSteps.* at every call"],
    ),
    "a constant threshold behind steps of sizes that are found": (
        lambda: fr.chain(fr.polyak_sgd(), fr.reduce_on_plateau(), fr.soft_threshold(0.1)),
        [r"scale_by_polyak.* chooses a step size anew, and reduce_on_plateau\(\) chooses a step size anew\. prox_sgd"],
    ),
    "decay before Muon": (
        lambda: fr.chain(fr.add_decayed_weights(0.1, mask=fr.matrices), fr.muon(0.1)),
        ["before scale_by_muon.*'decoupled'"],
    ),
    "decay of what Muon leaves to Adam": (
        lambda: fr.muon(0.1, weight_decay=0.1, adam_weight_decay=0.2),
        [r"add_decayed_weights\(0.2, None\) decays .*head.bias"],
    ),
    "a learning rate before Adam": (
        lambda: fr.chain(fr.scale_by_learning_rate(0.1), fr.scale_by_adam()),
        [r"scale_by_learning_rate\(0.1\) stands before scale_by_adam.* is divided out"],
    ),
    "decay that takes no mask": (
        lambda: fr.schedule_free_adamw(0.1, weight_decay=0.1),
        [r"decays .*head.bias.* left alone where the decay is a link with mask=matrices"],
    ),
    "a learning rate of zero": (
        lambda: fr.sgd(0.0),
        [r"scale_by_learning_rate\(0.0\) multiplies updates by 0: its leaves never move. .* freeze\(mask\)"],
    ),
    "a schedule of zeros before a proximal step": (
        lambda: fr.prox_adam(fr.constant_schedule(0.0), fr.l1, mask=fr.matrices),
        [r"prox_adam\(constant_schedule\(0.0\), l1.*\) multiplies updates by 0 at every step"],
    ),
    "NaN that a moment keeps": (
        lambda: fr.chain(fr.adam(0.1), fr.zero_nans()),
        [r"zero_nans\(\) stands after scale_by_adam\(.*\), which keeps the first NaN .* Put it first"],
    ),
    "a pattern that matches nothing": (
        lambda: fr.prox_sgd(0.1, fr.per_leaf({"tail.*": 0.1 * fr.l1})),
        [r"per_leaf has 'tail.\*', which matches no leaf"],
    ),
}


@pytest.mark.filterwarnings("ignore:in this chain")
@pytest.mark.parametrize(("make", "messages"), MISTAKEN.values(), ids=MISTAKEN)
def test_known_mistakes_are_warned_of(make, messages):
    found = fr.describe(make(), draw()).warnings
    assert len(found) == len(messages), found
    for said, message in zip(found, messages, strict=True):
        assert re.search(message, said), said


@pytest.mark.filterwarnings("ignore:in this chain")
def test_links_out_of_order_are_warned_of():
    uphill = fr.chain(fr.sgd(0.1), fr.add_decayed_weights(0.1))
    assert "adds a gradient to the step of" in fr.describe(uphill).warnings[0]
    early = fr.chain(fr.add_independent_weight_decay(0.1), fr.sgd(0.1))
    assert "turns its sign" in fr.describe(early).warnings[0]


RIGHT = [
    lambda: fr.chain(fr.adam(0.1), fr.project(fr.nonnegative), fr.monitor({"norm": fr.global_norm})),
    lambda: fr.chain(fr.sgd(0.1), fr.project(fr.nonnegative), fr.snapshot("norm", fr.global_norm)),
    lambda: fr.muon(0.1, weight_decay=0.1),
    lambda: fr.with_weight_decay(fr.adam(0.1), "anchor", 0.1),
    lambda: fr.prox_adam(0.1, fr.anchored_l1, 0.0, strength=0.1),
    lambda: fr.with_master_weights(fr.chain(fr.clip(1.0), fr.adam(0.1), fr.project(fr.nonnegative))),
    lambda: fr.chain(fr.with_master_weights(fr.adam(0.1)), fr.monitor({"norm": fr.global_norm}), fr.freeze(HEAD)),
    lambda: fr.MultiSteps(fr.chain(fr.clip_by_global_norm(1.0), fr.adam(0.1), fr.add_noise(0.1, 0.0, 0)), 4),
    lambda: fr.chain(fr.MultiSteps(fr.adam(0.1), 4), fr.project(fr.nonnegative)),
    lambda: fr.prox_adam(0.1, fr.simplex),
    lambda: fr.chain(fr.sgd(0.1), fr.project(fr.nonnegative), fr.project(fr.max_norm, 2.0, dim=None)),
    lambda: fr.chain(
        fr.sgd(0.1), fr.project(fr.simplex, mask=HEAD), fr.project(fr.top_k, 2, mask={"head": False, "body": True})
    ),
    lambda: fr.chain(fr.sgd(0.1, momentum=0.9), fr.project(fr.simplex)),
    lambda: fr.chain(fr.freeze(HEAD), fr.masked(fr.adam(0.1), {"head": False, "body": True})),
    lambda: fr.chain(fr.clip_by_global_norm(1.0), fr.adamw(SCHEDULE, mask=fr.matrices)),
    lambda: fr.chain(fr.sgd(0.1), fr.soft_threshold(0.1)),
    lambda: fr.chain(fr.sgd(SCHEDULE), fr.soft_threshold(SCHEDULE), fr.project(fr.linf_ball, 1.0), fr.identity()),
    lambda: fr.chain(fr.adam(SCHEDULE), fr.project(fr.nonnegative), fr.freeze(HEAD)),
    lambda: fr.prox_adam(SCHEDULE, fr.l1, strength=0.1, weight_decay=0.1, mask=fr.matrices),
    lambda: fr.chain(fr.masked(fr.prox_sgd(0.1, fr.l1), HEAD), fr.masked(fr.adam(0.1), {"head": False, "body": True})),
    lambda: fr.partition({"a": fr.adam(0.1), "b": fr.prox_sgd(0.1, fr.l1)}, {"head": "a", "body": "b"}),
    lambda: fr.chain(fr.add_decayed_weights(0.1, fr.matrices), fr.sgd(0.1, momentum=0.9)),
    lambda: fr.chain(fr.scale_by_adam(), fr.scale_by_schedule(lambda count: -falling(count))),
    lambda: fr.chain(fr.scale_by_adam(), fr.scale_by_schedule(lambda count: 0.5 - 0.1 * count)),
    lambda: fr.partition(
        {"a": fr.sgd(0.1), "b": fr.scale_by_schedule(lambda count: -falling(count))}, {"head": "a", "body": "b"}
    ),
    lambda: fr.partition(
        {"a": fr.sgd(0.1), "b": fr.scale_by_schedule(fr.linear_schedule(-0.1, 0.0, 9))}, {"head": "a", "body": "b"}
    ),
    lambda: fr.chain(fr.adam(0.1), fr.scale_by_schedule(falling)),
    lambda: fr.chain(fr.masked(fr.set_to_zero(), HEAD), fr.adamw(0.1, mask=fr.matrices & fr.select("body*"))),
    lambda: fr.chain(fr.masked(fr.set_to_zero(), HEAD), fr.sgd(0.1, momentum=0.9), fr.project(fr.nonnegative)),
    lambda: fr.scale_by_adam(),
    lambda: fr.chain(fr.zero_nans(), fr.adam(0.1), fr.zero_nans()),
    lambda: fr.apply_if_finite(fr.chain(fr.sgd(0.1, momentum=0.9), fr.zero_nans()), 3),
    lambda: fr.chain(fr.sgd(0.0), fr.add_independent_weight_decay(0.1, mask=fr.matrices)),
    lambda: fr.adam(torch.tensor(0.0)),
    lambda: fr.adam(lambda count: [0.1, 0.0][int(count)]),  # Of steps that are not asked for it knows nothing.
    lambda: fr.adam(lambda count: 0.1 / (100 - count)),
    lambda: fr.sam(fr.sgd(0.1), fr.chain(fr.scale_by_adam(), fr.clip(1.0))),
    lambda: fr.sam(fr.prox_sgd(0.1, fr.l1, mask=fr.matrices), fr.chain(fr.normalize_by_update_norm(), fr.sgd(0.05))),
    lambda: fr.proximal_step(fr.scale_by_adam(), SCHEDULE, fr.l1, strength=0.1, mask=fr.matrices),
    lambda: fr.chain(fr.monitor({"mean": fr.ema(0.9)}), fr.sgd(0.1), fr.soft_threshold(0.1)),
    lambda: fr.lookahead(fr.chain(fr.sgd(0.1), fr.project(fr.linf_ball, 1.0)), 5, 0.5),
    lambda: fr.chain(fr.masked(fr.scale(-1.0), HEAD), fr.masked(fr.sgd(0.1), {"head": False, "body": True})),
    lambda: fr.prox_adam(0.1, fr.per_leaf({"*weight": 0.1 * fr.l1, "*filters": fr.group_lasso})),
    lambda: fr.prox_adam(0.1, 0.1 * fr.l1.given(mask=fr.matrices) + fr.group_lasso.given(mask=fr.matrices)),
    lambda: fr.chain(fr.add_decayed_weights(0.1, fr.matrices), fr.lbfgs(linesearch=None)),
    lambda: fr.with_weight_decay(fr.adamw(0.1, weight_decay=torch.tensor(0.0)), "cautious", 0.1, mask=fr.matrices),
    lambda: fr.partition({"a": fr.sgd(0.1), "b": fr.chain(fr.scale(-1.0), fr.scale(0.1))}, {"head": "a", "body": "b"}),
]


@pytest.mark.parametrize("make", RIGHT)
def test_what_is_right_is_not_warned_of(make):
    assert described(make(), draw()).warnings == []


#: What a row of the table is made of, where it is an optimizer: names, not what is built upon them.
OPTIMIZERS = {name: case for name, case in TRANSFORMS.items() if "steps" in case.make().stages}


@pytest.mark.parametrize("case", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_no_optimizer_of_the_table_is_warned_of(case):
    """But for what it is told to do with biases, which the tree of the table has."""
    assert described(case.make()).warnings == []
    for said in described(case.make(), draw()).warnings:
        assert "of fewer than two dimensions" in said


@pytest.mark.parametrize("keep", [fr.with_master_weights, lambda tx: fr.with_stochastic_rounding(tx, 0)])
def test_what_changes_rounded_updates_is_warned_of(keep):
    half, tx = {"w": torch.ones(2, 2, dtype=torch.bfloat16)}, keep(fr.sgd(0.1))
    for after in (
        fr.scale(0.1),
        fr.clip(0.1),
        fr.add_noise(0.1, 0.5, 0),
        fr.add_independent_weight_decay(0.1),
        fr.project(fr.nonnegative),
    ):
        with pytest.warns(UserWarning, match=r"stands after .*, which ends at numbers of sixteen bits.* Put it inside"):
            chained = fr.chain(tx, after)
        assert any("end at numbers of sixteen bits" in said for said in fr.describe(chained, half).warnings)
    wide = {**half, "b": torch.ones(2)}
    only = fr.masked(fr.set_to_zero(), {"w": False, "b": True})
    with pytest.warns(UserWarning, match="stands after"):
        beside = fr.chain(tx, only)
    assert not any("sixteen bits" in said and "set_to_zero" in said for said in fr.describe(beside, wide).warnings)
    for around in (lambda tx: fr.lookahead(tx, 5, 0.5), lambda tx: fr.schedule_free(tx, 0.1)):
        with pytest.warns(UserWarning, match=r"averages the parameters of .* Put (lookahead|schedule_free) inside"):
            wrapped = around(tx)
        assert any("end at numbers of sixteen bits" in said for said in fr.describe(wrapped, half).warnings)


def test_steps_that_sixteen_bits_lose_are_warned_of():
    half = {"w": torch.ones(2, 2, dtype=torch.bfloat16), "b": torch.ones(2, 2)}
    (said,) = described(fr.adamw(0.1), half).warnings
    assert re.search(r"makes steps of w: what is smaller than 1/512 of a weight in bfloat16 is rounded away", said)
    (said,) = described(fr.prox_sgd(0.1, fr.l1), fr.tree_map(lambda w: w.half(), half)).warnings
    assert "1/4096 of a weight in float16" in said
    for keep in (fr.with_master_weights, lambda tx: fr.with_stochastic_rounding(tx, 0)):
        assert described(keep(fr.adamw(0.1)), half).warnings == []
    assert described(fr.chain(fr.freeze({"w": True, "b": False}), fr.adamw(0.1)), half).warnings == []
    (said,) = described(fr.masked(fr.adamw(0.1), {"w": False, "b": True}), half).warnings
    assert "would go uphill" in said


def test_defaults_for_weights_with_inputs_first_are_warned_of_on_layers_of_torch():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))
    tree = dict(net.named_parameters())
    (said,) = described(fr.chain(fr.adaptive_grad_clip(0.01), fr.sgd(0.1)), net).warnings
    assert re.search(
        "takes the last dimension for that of units.*of 0.weight, 2.weight, 3.weight it is the first", said
    )
    (said,) = described(fr.muon(0.1), net).warnings
    assert re.search("takes the first dimension for that of inputs.*of 3.weight it is that of outputs", said)
    outputs_first = lambda params: {
        name: fr.MuonDimensionNumbers(1, 0) if w.ndim == 2 else None for name, w in params.items()
    }
    for tx, params in [
        (fr.chain(fr.adaptive_grad_clip(0.01, axis=...), fr.sgd(0.1)), net),
        (fr.muon(0.1, muon_weight_dimension_numbers=outputs_first), net),
        (fr.muon(0.1, consistent_rms=0.2), net),  # Of the longer side.
        (fr.muon(0.1), tree),  # May be used in any way.
        (fr.muon(0.1), nn.Linear(3, 3)),
    ]:
        assert described(tx, params).warnings == []


def test_the_leaves_of_each_pattern_are_counted():
    layers = fr.per_leaf({"head.*": 0.1 * fr.l1, "*filters": fr.group_lasso})
    note = described(fr.prox_adam(0.1, layers), draw()).rows[0].note
    assert note == (
        "all 4 leaves, 45 numbers: head.* 2 leaves, 16 numbers; *filters 1 leaves, 24 numbers; "
        "no pattern 1 leaves, 5 numbers"
    )


def test_a_vector_of_coefficients_is_no_bias():
    lasso = {"coef": torch.zeros(5)}
    assert described(fr.prox_sgd(0.1, fr.l1), lasso).warnings == []
    assert described(fr.adamw(0.1), lasso).warnings == []


def test_without_parameters_branches_of_a_partition_do_not_meet():
    parts = {"a": fr.add_decayed_weights(0.1), "b": fr.scale_by_adam()}
    assert described(fr.chain(fr.partition(parts, {"head": "a", "body": "b"}), fr.sgd(0.1))).warnings == []


def test_without_parameters_masks_that_differ_do_not_meet():
    parts = fr.chain(fr.masked(fr.adam(0.1), fr.matrices), fr.masked(fr.sgd(0.1), ~fr.matrices))
    assert described(parts).warnings == []
    twice = lambda mask: fr.chain(fr.masked(fr.adam(0.1), mask()), fr.masked(fr.sgd(0.1), mask()))
    assert len(described(twice(lambda: fr.select("head.*"))).warnings) == 1
    assert described(twice(lambda: lambda params: HEAD)).warnings == []


def test_what_is_no_transform_is_refused():
    with pytest.raises(TypeError, match="argument 0 of describe is a function; expected a Transform"):
        fr.describe(fr.adam)
    with pytest.raises(TypeError, match=r"params is 3\.0; expected a tensor"):
        fr.describe(fr.adam(0.1), 3.0)
