"""Weight decay: each kind is its formula, stands where it belongs in any optimizer, and agrees with torch.optim."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import get_args

import pytest
import torch
from cases import DOWN, HEAD, assert_equal, draw, falling
from torch.func import vmap

import funcreg as fr
from funcreg.transforms.placement import Kind

KINDS = get_args(Kind)
every_kind = pytest.mark.parametrize("kind", KINDS)
PAGE = (Path(__file__).parent.parent / "examples" / "decay.md").read_text()

#: From a weight, a gradient, the rate, its share of the greatest one, and the anchor and average of the weight.
FORMULAS = {
    "coupled": lambda w, g, r, share, a, m: w - r * (g + 0.3 * w),
    "decoupled": lambda w, g, r, share, a, m: w - r * (g + 0.3 * w),
    "independent": lambda w, g, r, share, a, m: w - r * g - 0.3 * share * w,
    "corrected": lambda w, g, r, share, a, m: w - r * (g + 0.3 * share * w),
    "cautious": lambda w, g, r, share, a, m: w - r * (g + (0.3 * w if g * w >= 0 else 0.0)),
    "proximal": lambda w, g, r, share, a, m: (w - r * g) / (1 + r * 0.3),
    "anchor": lambda w, g, r, share, a, m: w - r * (g + 0.3 * (w - a)),
    "ema": lambda w, g, r, share, a, m: w - r * (g + 0.3 * (w - m)),
    "l1_anchor": lambda w, g, r, share, a, m: w - r * (g + 0.3 * ((w > a) - (w < a))),
    "l1_ema": lambda w, g, r, share, a, m: w - r * (g + 0.3 * ((w > m) - (w < m))),
}


def options(kind):
    return {"ema_decay": 0.75} if "ema" in kind else {}


def train(tx, params, steps=4):
    """Parameters after some steps along gradients that oscillate with them."""
    state = tx.init(params)
    for n in range(steps):
        grads = fr.tree_map(lambda w, n=n: torch.sin(3 * w + n), params)
        updates, state = tx.update(grads, state, params)
        params = fr.apply_updates(params, updates)
    return params


@every_kind
def test_descent_with_decay_is_the_formula_in_plain_python(kind):
    tx = fr.with_weight_decay(fr.sgd(DOWN), kind, 0.3, **options(kind))
    start = [1.5, -0.7, 0.2, -2.5]
    found = train(tx, {"w": torch.tensor(start, dtype=torch.float64)})["w"]
    for first, reached in zip(start, found.tolist(), strict=True):
        w = m = first
        for n in range(4):
            m = 0.75 * m + 0.25 * w
            share = 1 - 0.2 * n  # Of a rate that falls from 0.5 to 0.1 in four steps.
            w = FORMULAS[kind](w, math.sin(3 * w + n), 0.5 * share, share, first, m)
        assert reached == pytest.approx(w, rel=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.01])
@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("coupled", fr.adam, torch.optim.Adam),
        ("decoupled", fr.adam, torch.optim.AdamW),
        ("coupled", fr.sgd, torch.optim.SGD),
        ("coupled", lambda lr: fr.rmsprop(lr, 0.99, eps_in_sqrt=False), torch.optim.RMSprop),
    ],
)
def test_it_is_the_decay_of_torch(kind, ours, theirs, rate):
    params = {"w": draw()["head"].weight}
    leaf = params["w"].clone().requires_grad_()
    optimizer = theirs([leaf], lr=rate, weight_decay=0.3)
    for n in range(4):
        leaf.grad = torch.sin(3 * leaf.detach() + n)
        optimizer.step()
    assert_equal(train(fr.with_weight_decay(ours(rate), kind, 0.3), params), {"w": leaf.detach()}, rtol=1e-12)


def test_the_decays_of_optimizers_are_kinds_of_it():
    adam = fr.adam(DOWN, eps=0.1)
    assert_equal(
        train(fr.with_weight_decay(adam, "decoupled", 0.3), draw()),
        train(fr.adamw(DOWN, eps=0.1, weight_decay=0.3), draw()),
    )
    assert_equal(
        train(fr.with_weight_decay(adam, "proximal", 0.3), draw()),
        train(fr.adamprox(DOWN, 0.3, eps=0.1), draw()),
        rtol=1e-12,
    )
    state = fr.adamw(0.1).init(draw())
    assert fr.tree_paths(fr.with_weight_decay(fr.adam(0.1), "decoupled", 0.3).init(draw())) == fr.tree_paths(state)


WRAPPERS = {
    "a chain": lambda tx: fr.chain(fr.clip(10.0), tx),
    "a chain of chains": lambda tx: fr.chain(fr.identity(), fr.chain(fr.chain(tx))),
    "a named chain": lambda tx: fr.named_chain(("clip", fr.clip(10.0)), ("step", tx)),
    "a named chain in a chain": lambda tx: fr.chain(fr.named_chain(("step", tx))),
    "a mask": lambda tx: fr.masked(tx, True),
    "parts": lambda tx: fr.partition({"all": tx, "none": fr.set_to_zero()}, lambda params: "all"),
    "a mask in a chain": lambda tx: fr.chain(fr.masked(tx, True), fr.project(fr.linf_ball, 100.0)),
    "a guard": lambda tx: fr.apply_if_finite(tx, 3),
    "a projection after it": lambda tx: fr.chain(tx, fr.project(fr.linf_ball, 100.0)),
    "a frozen leaf": lambda tx: fr.chain(tx, fr.freeze(False)),
}


@every_kind
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_decay_finds_its_place_inside(kind, wrap):
    plain = fr.with_weight_decay(fr.adam(DOWN, eps=0.1), kind, 0.3, mask=fr.matrices, **options(kind))
    tx = fr.with_weight_decay(wrap(fr.adam(DOWN, eps=0.1)), kind, 0.3, mask=fr.matrices, **options(kind))
    assert_equal(train(tx, draw()), train(plain, draw()), rtol=1e-12, atol=1e-14)


def test_decay_is_for_steps_downhill_and_not_for_those_that_climb():
    climb = fr.chain(fr.normalize_by_update_norm(), fr.sgd(0.05))
    decayed = fr.with_weight_decay(fr.sam(fr.adam(0.1), climb), "decoupled", 0.3)
    assert_equal(train(decayed, draw()), train(fr.sam(fr.adamw(0.1, weight_decay=0.3), climb), draw()))
    with warnings.catch_warnings(action="error"):  # What a climb decays is no decay of where the descent goes.
        fr.with_weight_decay(fr.sam(fr.sgd(0.1), fr.adamw(0.05, weight_decay=0.1)), "decoupled", 0.3)
    by_name = fr.with_weight_decay(fr.sam(adv_optimizer=fr.sgd(0.05), optimizer=fr.sgd(DOWN)), "corrected", 0.3)
    expected = fr.sam(fr.with_weight_decay(fr.sgd(DOWN), "corrected", 0.3), fr.sgd(0.05))
    assert_equal(train(by_name, draw()), train(expected, draw()))
    with pytest.raises(ValueError, match=r"sam\(.*\) has no learning rate that with_weight_decay could see"):
        fr.with_weight_decay(fr.sam(fr.scale_by_adam(), climb), "decoupled", 0.3)


def test_both_parts_of_muon_decay():
    found = train(fr.with_weight_decay(fr.muon(0.1), "decoupled", 0.3), draw())
    assert_equal(found, train(fr.muon(0.1, weight_decay=0.3, adam_weight_decay=0.3), draw()))


@every_kind
def test_a_learning_rate_may_be_spread_over_links(kind):
    spread = fr.chain(fr.scale_by_adam(eps=0.1), fr.scale_by_schedule(fr.linear_schedule(5.0, 1.0, 4)), fr.scale(-0.1))
    tx = fr.with_weight_decay(spread, kind, 0.3, **options(kind))
    expected = fr.with_weight_decay(fr.adam(DOWN, eps=0.1), kind, 0.3, **options(kind))
    assert_equal(train(tx, draw()), train(expected, draw()), rtol=1e-12, atol=1e-14)


@every_kind
def test_each_part_decays_by_its_own_learning_rate(kind):
    rates = {"head": DOWN, "body": fr.linear_schedule(0.2, 0.1, 4)}
    parts = {name: fr.sgd(rate) for name, rate in rates.items()}
    together = fr.partition(parts, {"head": "head", "body": "body"})
    found = train(fr.with_weight_decay(together, kind, 0.3, **options(kind)), draw())
    for name, part in parts.items():
        alone = train(fr.with_weight_decay(part, kind, 0.3, **options(kind)), {name: draw()[name]})
        assert_equal({name: found[name]}, alone, rtol=1e-12, atol=1e-14)


@every_kind
def test_leaves_outside_of_the_mask_do_not_decay(kind):
    tx = fr.with_weight_decay(fr.sgd(DOWN), kind, 0.3, mask=HEAD, **options(kind))
    found, plain = train(tx, draw()), train(fr.sgd(DOWN), draw())
    assert_equal(found["body"], plain["body"])
    assert not torch.equal(found["head"].weight, plain["head"].weight)


@pytest.mark.slow
@every_kind
def test_it_is_mapped_fused_and_made_inside_of_compiled_code(kind):
    make = lambda decay: fr.with_weight_decay(fr.adam(DOWN, eps=0.1), kind, decay, **options(kind))
    params, decays = {"w": draw()["head"].weight}, torch.tensor([0.1, 0.3], dtype=torch.float64)
    expected = [train(make(float(decay)), params)["w"] for decay in decays]
    assert_equal({"w": vmap(lambda decay: train(make(decay), params)["w"])(decays)}, {"w": torch.stack(expected)}, 1e-9)
    compiled = torch.compile(lambda params: train(make(0.3), params, 2), fullgraph=True, backend="eager")
    assert_equal(compiled(params), train(make(0.3), params, 2), rtol=1e-12)
    step = fr.fuse(make(0.3), backend="eager")
    moved, state = step.init(params)
    for n in range(4):
        moved, state = step(moved, {"w": torch.sin(3 * moved["w"] + n)}, state)
    assert_equal(moved, {"w": expected[1]}, rtol=1e-9)


def test_an_optimizer_of_torch_has_it_in_its_groups():
    params = {"w": draw()["head"].weight}
    leaf = params["w"].clone().requires_grad_()
    make = lambda lr, weight_decay: fr.with_weight_decay(fr.adam(lr, eps=0.1), "cautious", weight_decay)
    optimizer = fr.Optimizer([leaf], make, lr=0.1, weight_decay=0.3, compile=False)
    for n in range(4):
        leaf.grad = torch.sin(3 * leaf.detach() + n)
        optimizer.step()
    assert_equal({"w": leaf.detach()}, train(make(0.1, 0.3), params), rtol=1e-6)


def test_an_anchor_may_be_given_and_is_else_a_part_of_the_state():
    params, anchor = draw(), draw(1)
    given = fr.add_weight_decay_to_anchor(0.3, anchor, mask=HEAD)
    assert not fr.tree_leaves(given.init(params))
    updates, _ = given.update(draw(2), given.init(params), params)
    expected = fr.tree_map(lambda g, w, a: g + 0.3 * (w - a), draw(2), params, anchor)
    assert_equal(updates["head"], expected["head"], rtol=1e-12)
    assert_equal(updates["body"], draw(2)["body"])
    tx = fr.with_weight_decay(fr.sgd(0.1), "anchor", 0.3)
    assert_equal(tx.init(params)[0].anchor, params)
    moved = tx.update(draw(2), tx.init(anchor), params)[0]
    assert_equal(moved, fr.tree_map(lambda u: -0.1 * u, expected), rtol=1e-12, atol=1e-15)


def test_an_average_of_weights_that_do_not_move_is_exactly_those_weights():
    tx, params = fr.add_l1_weight_decay_to_ema(0.3), draw(dtype=torch.float32)
    updates, _ = tx.update(params, tx.init(params), params)
    assert_equal(updates, params)


def test_signs_are_compared_where_products_vanish():
    tx, params = fr.add_cautious_weight_decay(1.0), {"w": torch.tensor([1e-30, -1e-30, 1.0])}
    updates, _ = tx.update({"w": torch.tensor([-1e-30, -1e-30, 0.0])}, fr.EmptyState(), params)
    assert updates["w"].tolist() == torch.tensor([-1e-30, -2e-30, 1.0]).tolist()
    turned = {"w": torch.tensor([1 + 1j, 1 + 1j])}
    updates, _ = tx.update({"w": torch.tensor([1j, -1j])}, fr.EmptyState(), turned)
    assert updates["w"].tolist() == [1 + 2j, -1j]


def test_proximal_decay_is_stable_where_that_of_adamw_is_not():
    start = {"w": torch.ones(1, dtype=torch.float64)}
    step = lambda kind: train(fr.with_weight_decay(fr.scale_by_learning_rate(0.1), kind, 50.0), start, 30)["w"].abs()
    assert step("proximal") < 1 < 1e6 < step("decoupled")


REFUSED = [
    (lambda: fr.with_weight_decay(fr.adam, "decoupled", 0.1), r"argument 0 of with_weight_decay is a function"),
    (
        lambda: fr.with_weight_decay(fr.chain(fr.flatten(fr.adam(0.1))), "decoupled", 0.1, mask=fr.matrices),
        r"flatten\(adam\(0.1\)\) makes one vector of all leaves, where a mask.* has no place",
    ),
    (lambda: fr.with_weight_decay(fr.adam(0.1), "decopled", 0.1), r"kind is 'decopled'; expected one of 'coupled'"),
    (lambda: fr.with_weight_decay(fr.adam(0.1), "decoupled", -0.1), r"weight_decay is -0.1; expected .* at least 0"),
    (lambda: fr.with_weight_decay(fr.adam(0.1), "decoupled", 0.1, mask="w"), r"mask is the string 'w'"),
    (
        lambda: fr.with_weight_decay(fr.adam(0.1), "decoupled", 0.1, anchor=0.0),
        r"anchor is 0.0; it has no effect on decoupled decay. It belongs to 'anchor', 'l1_anchor'",
    ),
    (lambda: fr.with_weight_decay(fr.scale_by_adam(), "decoupled", 0.1), r"scale_by_adam\(\) has no learning rate"),
    (
        lambda: fr.with_weight_decay(fr.chain(fr.scale_by_adam(), fr.scale_by_schedule(falling)), "cautious", 0.1),
        r"the sign of scale_by_schedule\(falling\) is not known; write scale_by_learning_rate",
    ),
    (
        lambda: fr.with_weight_decay(fr.rmsprop(0.1, momentum=0.9), "decoupled", 0.1),
        r"trace\(0.9, False\) stands after the learning rate of rmsprop.*such as 'independent'",
    ),
    (
        lambda: fr.with_weight_decay(fr.chain(fr.scale(1 / 128), fr.scale_by_learning_rate(0.1)), "decoupled", 0.1),
        r"scale\(0.0078125\) may scale gradients, or be a part of the learning rate",
    ),
    (
        lambda: fr.with_weight_decay(fr.chain(fr.adam(0.1), fr.scale(-1.0)), "decoupled", 0.1),
        r"two links of chain\(.*\) turn signs",
    ),
    (
        lambda: fr.with_weight_decay(fr.prox_adam(0.1, fr.l1), "decoupled", 0.1),
        r"prox_adam\(0.1, l1\) makes a step and lands in one.*it has an argument weight_decay, or take 'coupled'",
    ),
    (
        lambda: fr.with_weight_decay(fr.prox_sgd(0.1, fr.l1), "decoupled", 0.1),
        r"prox_sgd.* put elastic, or a sum of half_l2 and its penalty, into it",
    ),
    (
        lambda: fr.with_weight_decay(fr.ensemble(fr.sgd, torch.tensor([0.1, 0.2])), "decoupled", 0.1),
        r"the learning rate inside ensemble\(.*\) is not to be seen; put with_weight_decay around the optimizer",
    ),
    (lambda: fr.with_weight_decay(fr.adam(0.1), "corrected", 0.1), r"is 0.1 at every step.*that of AdamW"),
    (
        lambda: fr.with_weight_decay(fr.adam(falling), "corrected", 0.1),
        r"greatest value of learning_rate, falling, is not known; .*give max_rate=",
    ),
    (
        lambda: fr.add_corrected_weight_decay(0.1, fr.join_schedules([falling, DOWN], [3])),
        r"join_schedules\(\[falling, .*, is not known",
    ),
    (lambda: fr.add_corrected_weight_decay(0.1, fr.exponential_decay(1.0, 1, 2.0)), r"is inf; expected a schedule"),
    (lambda: fr.add_corrected_weight_decay(0.1, fr.constant_schedule(0.0)), r"is 0.0; expected .* above 0"),
    (lambda: fr.add_independent_weight_decay(0.1, max_rate=1.0), r"max_rate is 1.0; it has no effect without"),
    (lambda: fr.add_weight_decay_to_ema(0.1, ema_decay=1.0), r"ema_decay is 1.0; expected .* below 1"),
    (lambda: fr.add_proximal_weight_decay(0.1, -1.0), r"learning_rate is -1.0"),
    (lambda: fr.add_weight_decay_to_anchor(0.1, anchor="w"), r"anchor is 'w'; expected a number, a tensor"),
    (lambda: fr.add_weight_decay_to_anchor(0.1, anchor=torch.nn.Linear(2, 2)), r"anchor is the module Linear"),
    (lambda: fr.with_weight_decay(fr.adam(0.1), 0.1, "decoupled"), r"Are kind and weight_decay swapped\?"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_is_not_known_is_refused_with_a_remedy(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_the_greatest_rate_is_that_of_the_whole_schedule():
    rise = fr.warmup_cosine_decay_schedule(0.0, 0.4, 3, 8)
    found = train(fr.with_weight_decay(fr.sgd(rise), "corrected", 0.3), draw(), 6)
    assert_equal(found, train(fr.with_weight_decay(fr.sgd(rise), "corrected", 0.3, max_rate=0.4), draw(), 6))


def test_a_second_decay_is_warned_of():
    with pytest.warns(UserWarning, match=r"adamw\(0.1\) decays weights already, by add_decayed_weights\(0.0001"):
        fr.with_weight_decay(fr.adamw(0.1), "cautious", 0.1)
    with pytest.warns(UserWarning, match="decays weights already"):
        fr.with_weight_decay(fr.adamw(0.1, mask=fr.matrices), "cautious", 0.1, mask=fr.matrices)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fr.with_weight_decay(fr.adamw(0.1, weight_decay=0.0), "cautious", 0.1)
        anchored = fr.with_weight_decay(fr.adam(0.1), "anchor", 0.5, mask=fr.select("backbone.*"))
        fr.with_weight_decay(anchored, "decoupled", 0.1, mask=fr.select("head.*"))  # Of masks it is not known.
    with pytest.warns(UserWarning, match=r"sgd\(0.1\) stands after add_independent_weight_decay\(0.1\).*goes uphill"):
        fr.chain(fr.add_independent_weight_decay(0.1), fr.sgd(0.1))


def test_the_table_of_the_page_has_every_kind_with_its_transform():
    rows = re.findall(r'^\| `"(\w+)"` \| .* \| `(\w+)\((.*?)\)` \| .* \|$', PAGE, flags=re.MULTILINE)
    assert [kind for kind, _, _ in rows] == list(KINDS)
    for kind, name, arguments in rows:
        tx = eval(f"{name}({arguments})", {**vars(fr), "λ": 0.3, "schedule": DOWN, "a": draw(), "β": 0.75})
        step = fr.scale_by_learning_rate(DOWN)
        by_hand = fr.chain(step, tx) if kind in ("independent", "proximal") else fr.chain(tx, step)
        whole = fr.with_weight_decay(fr.sgd(DOWN), kind, 0.3, **options(kind))
        assert_equal(train(by_hand, draw()), train(whole, draw()), rtol=1e-12, atol=1e-14)
