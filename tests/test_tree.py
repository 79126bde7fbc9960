"""Trees, masks and selections."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict

import optree
import pytest
import torch
from cases import Layer, draw, flat
from hypothesis import example, given
from hypothesis import strategies as st
from torch.func import grad

import funcreg as fr
from funcreg.tree import ABSENT, broadcast, copier, leaves_like, map_with_path, restored, structure

trees = st.recursive(
    st.integers(),
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(st.text("abc", max_size=2), children, max_size=3),
        st.dictionaries(st.text("abc", max_size=2), children, max_size=3).map(OrderedDict),
        st.tuples(children, children).map(lambda pair: Layer(*pair)),
        st.just(None),
        st.just(ABSENT),
    ),
    max_leaves=12,
)


@given(trees)
def test_walking_agrees_with_optree(tree):
    seen = []
    copy = map_with_path(lambda path, leaf: seen.append(leaf) or leaf, tree)
    assert seen == optree.tree_leaves(tree) == fr.tree_leaves(tree)
    assert optree.tree_structure(copy) == optree.tree_structure(tree)
    assert copy == tree
    assert len(fr.tree_paths(tree)) == len(seen)
    assert fr.tree_map(lambda x: x, tree) == tree


def containers(tree):
    """What of a tree can be written into."""
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    mine = [tree] if isinstance(tree, dict | list) else []
    return mine + [each for child in children for each in containers(child)]


@example((0, [1], Layer(2, {"a": 3, "b": (4,)})), {1, 3}, False)
@example((0, 1), set(), False)
@given(trees, st.sets(st.integers(0, 11)), st.booleans())
def test_a_copied_tree_has_new_leaves_where_told_and_containers_of_its_own(tree, changed, with_default):
    tree = defaultdict(list, tree=tree) if with_default else tree
    leaves, spec = structure(tree)
    changed = changed.intersection(range(len(leaves)))
    old, new = [object() for _ in leaves], [object() for _ in leaves]
    before = restored(spec, old)
    held = sum(map(sys.getrefcount, [*old, *new]))
    after = copier(restored(spec, range(len(leaves))), changed)(before, new)
    assert sum(map(sys.getrefcount, [*old, *new])) == held + len(leaves)
    assert structure(after)[1] == spec
    # A node that only optree knows is made anew of all leaves.
    expected = [b if with_default or i in changed else a for i, (a, b) in enumerate(zip(old, new, strict=True))]
    assert fr.tree_leaves(after) == expected
    assert not {id(x) for x in containers(before)} & {id(x) for x in containers(after)}


@given(trees, st.integers())
def test_a_leaf_is_a_prefix_of_every_tree(tree, value):
    assert broadcast(value, tree) == [value] * len(fr.tree_leaves(tree))
    assert broadcast(tree, tree) == fr.tree_leaves(tree)


@given(trees)
def test_a_tree_without_leaves_still_takes_a_whole_prefix(tree):
    pruned = fr.tree_map(lambda leaf: ABSENT, tree)
    assert not fr.tree_leaves(pruned)
    assert broadcast(tree, pruned) == []


def test_the_order_of_keys_does_not_matter_and_is_kept():
    params = {"b": torch.ones(1), "a": torch.zeros(1)}
    updates = {"a": torch.ones(1), "b": torch.zeros(1)}
    after = fr.apply_updates(params, updates)
    assert list(after) == ["b", "a"]
    assert after == {"b": torch.ones(1), "a": torch.ones(1)}
    assert list(fr.tree_map(lambda w: w, OrderedDict(params))) == ["b", "a"]


def test_other_mappings_and_registered_nodes_are_trees():
    tree = defaultdict(list, {"a": torch.ones(2)})
    assert fr.l1(tree) == 2
    assert fr.tree_map(lambda w: 2 * w, tree)["a"].sum() == 4
    assert fr.tree_paths(tree) == ["a"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": 1}, r"updates does not match params: it lacks 'b'"),
        ({"a": 1, "b": {"c": 2}, "d": 3}, "it has 'd', unknown to params"),
        ({"a": 1, "b": 5}, r"updates does not match params at 'b': expected a dict, got 5"),
        (7, r"updates does not match params: expected a dict, got 7"),
        ({"a": 1, "b": {"x": 2}}, "it lacks 'b.c', has 'b.x'"),
    ],
)
def test_trees_that_differ_are_told_apart_by_the_leaf(other, message):
    with pytest.raises(ValueError, match=message):
        leaves_like({"a": 1, "b": {"c": 2}}, other, ("params", "updates"))


def test_apply_updates_keeps_the_dtype_of_parameters_and_says_what_is_wrong():
    params = {"w": torch.ones(2, dtype=torch.bfloat16)}
    assert fr.apply_updates(params, {"w": torch.ones(2)})["w"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"updates 'w' has shape \(3,\); expected \(2,\)"):
        fr.apply_updates(params, {"w": torch.ones(3)})
    with pytest.raises(ValueError, match=rf"updates 'w' is on meta; expected {params['w'].device}"):
        fr.apply_updates(params, {"w": torch.ones(2, device="meta")})
    with pytest.raises(TypeError, match=r"params is a generator.*named_parameters"):
        fr.l1(torch.nn.Linear(2, 2).parameters())


def test_trees_may_span_devices():
    params = {"a": torch.ones(3), "b": torch.ones(3, device="meta")}
    tx = fr.chain(
        fr.scale_by_adam(), fr.add_decayed_weights(lambda count: 0.1), fr.scale_by_learning_rate(torch.tensor(0.1))
    )
    updates, state = tx.update(params, tx.init(params), params)
    assert [u.device.type for u in fr.tree_leaves(updates)] == [params["a"].device.type, "meta"]
    assert state[0].steps.device == params["a"].device


def test_global_norm_is_exact_in_sixteen_bits_and_flat_at_zero():
    assert fr.global_norm({"w": torch.full((70000,), 1000.0, dtype=torch.float16)}).isfinite()
    assert fr.global_norm({"w": torch.full((4_000_000,), 0.1)}).sub(200).abs() < 1e-3
    assert fr.global_norm({}) == 0
    assert not grad(lambda w: fr.global_norm([w]))(torch.zeros(3)).any()
    torch.testing.assert_close(fr.global_norm([torch.tensor([3j, 4.0])]), torch.tensor(5.0))


# Masks


PARAMS = {
    "encoder.0.weight": torch.ones(2, 2),
    "encoder.0.bias": torch.ones(2),
    "norm.weight": torch.ones(2),
    "head.weight": torch.ones(2, 2),
}


def chosen(selection, params=PARAMS):
    return [name for name, value in selection(params).items() if value]


def test_selections_choose_by_name_dimension_and_type():
    assert chosen(fr.select("encoder.*")) == ["encoder.0.weight", "encoder.0.bias"]
    assert chosen(fr.matrices) == chosen(fr.select(min_ndim=2)) == ["encoder.0.weight", "head.weight"]
    assert chosen(fr.select("*.weight", min_ndim=2) & ~fr.select("head.*")) == ["encoder.0.weight"]
    assert chosen(fr.select("head.*") | fr.select("*.bias")) == ["encoder.0.bias", "head.weight"]
    assert chosen(fr.select("head.*") | {name: name == "norm.weight" for name in PARAMS}) == [
        "norm.weight",
        "head.weight",
    ]
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), torch.nn.Embedding(3, 2))
    params = dict(model.named_parameters())
    assert chosen(fr.select(torch.nn.LayerNorm, torch.nn.Embedding, module=model), params) == [
        "1.weight",
        "1.bias",
        "2.weight",
    ]
    assert chosen(fr.select(torch.nn.Linear, "1.bias", module=model), params) == ["0.weight", "0.bias", "1.bias"]
    assert fr.select("head.*")({"head": {"weight": PARAMS["head.weight"]}}) == {"head": {"weight": True}}


def test_selections_that_cannot_be_meant_are_errors():
    with pytest.raises(
        ValueError, match=r"select\('decoder.\*'\) matches no leaf; the leaves are encoder.0.bias, encoder.0.weight"
    ):
        fr.select("decoder.*")(PARAMS)
    with pytest.raises(TypeError, match=r"module type LayerNorm; it also needs module="):
        fr.select(torch.nn.LayerNorm)


@pytest.mark.parametrize(
    "use", [fr.masked, lambda tx, mask: fr.freeze(mask), lambda tx, mask: fr.soft_threshold(0.1, mask)]
)
def test_masks_that_cannot_be_meant_are_errors(use):
    params = draw()
    with pytest.raises(TypeError, match=r"mask is the string 'head'.*Do you mean select\('head'\)"):
        tx = use(fr.identity(), "head")
        tx.update(params, tx.init(params), params)
    with pytest.raises(TypeError, match=r"mask at 'head.bias' is 'no'; expected True"):
        tx = use(fr.identity(), {"head": Layer(True, "no"), "body": True})
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="mask does not match the parameters: it lacks 'body'"):
        tx = use(fr.identity(), {"head": True})
        tx.update(params, tx.init(params), params)


def test_masks_nest_and_selections_work_inside_them():
    tx = fr.masked(fr.masked(fr.scale(0.0), fr.select("head.*", "body.scale.*")), {"head": True, "body": False})
    params = draw()
    updates, _ = tx.update(draw(1), tx.init(params), params)
    assert not flat(updates["head"]).any()
    assert flat(updates["body"]).any()


# Wrong numbers


@pytest.mark.parametrize(
    "make",
    [
        lambda: fr.sgd(-0.1),
        lambda: fr.add_decayed_weights(-0.1),
        lambda: fr.add_decayed_weights({"a": 0.1, "b": -0.1}),
        lambda: fr.soft_threshold(-0.1),
        lambda: fr.add_penalty(fr.l1, strength=-0.1),
        lambda: fr.proximal(fr.l1, -0.1),
        lambda: fr.add_penalty(fr.elastic, -0.1, 0.5),
        lambda: fr.elastic({"w": torch.ones(2)}, 0.1, 1.5),
        lambda: fr.l1.prox({"w": torch.ones(2)}, -1.0),
        lambda: fr.prox_sgd(0.1, fr.l1, strength=-1.0),
        lambda: fr.prox_sgd(0.1, fr.l1, momentum=1.0),
        lambda: fr.prox_adam(-0.1, fr.l1),
        lambda: fr.fista(0.1, fr.l1, strength=-1),
        lambda: fr.clip_by_global_norm(-1.0),
        lambda: fr.scale_by_adam(b1=-0.9),
        lambda: fr.kkt_residual({}, {}, fr.l1, strength=-1.0),
        lambda: fr.apply_if_finite(fr.identity(), -1),
        lambda: fr.elastic_from_keras(l1=-1.0),
        lambda: fr.warmup_cosine_decay_schedule(0.0, 1.0, 10, 10),
        lambda: fr.scale_by_lion(mode="soft"),  # pyright: ignore[reportArgumentType]
        lambda: fr.group_lasso({"w": torch.ones(2, 2)}, weights="size"),
        lambda: fr.named_chain(("a", fr.identity()), ("a", fr.identity())),
        lambda: fr.Transform(lambda p: (), lambda u, s, p: (u, s), reach="far"),  # pyright: ignore[reportArgumentType]
        lambda: fr.ensemble(fr.sgd, torch.ones(3)).init({"w": torch.ones(2, 2)}),
        lambda: fr.ensemble(fr.sgd, 0.1),
    ],
)
def test_numbers_that_cannot_be_meant_are_errors_at_construction(make):
    with pytest.raises(ValueError, match=r"expected|needs"):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fr.add_penalty(fr.elastic, 0.1), "elastic takes alpha, rho; rho is missing"),
        (lambda: fr.add_penalty(fr.l1, 0.1), "l1 takes no hyperparameters; got 1 hyperparameters.*strength="),
        (
            lambda: fr.proximal(fr.group_lasso, 0.1, dims=1),
            "group_lasso takes no hyperparameters and the keywords dim, weights; got dims",
        ),
        (lambda: fr.prox_sgd(0.1, "l1"), "penalty is 'l1'; expected a Penalty"),  # pyright: ignore[reportArgumentType]
        (lambda: fr.sgd("0.1"), "learning_rate is '0.1'; expected a number"),
        (lambda: fr.chain(fr.identity), r"argument 0 of chain is a function.*identity\(\)"),
        (lambda: fr.masked(lambda u: u, True), "argument 0 of masked is a function"),  # pyright: ignore[reportArgumentType]
        (lambda: fr.scale_by_schedule(0.1), "expected a function of the step"),  # pyright: ignore[reportArgumentType]
        (lambda: fr.elastic({"w": torch.ones(1)}, fr.Elastic(0.1, 0.5)), r"rho is missing.*\*"),
    ],
)
def test_calls_that_cannot_be_meant_say_what_was_expected(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_wrong_dimensions_are_said_with_the_leaf():
    with pytest.raises(ValueError, match=r"at leaf 'body.scale.0': dim=1 got a leaf of shape \(5,\).*mask=matrices"):
        fr.group_lasso(draw(), dim=1)
    with pytest.raises(ValueError, match="leaf 'b' has the label 'x'; expected one of 'y'"):
        fr.partition({"y": fr.identity()}, {"a": "y", "b": "x"}).init({"a": torch.ones(1), "b": torch.ones(1)})


def test_mask_functions_see_no_leaf_that_an_outer_mask_left_out():
    params = {"a": torch.ones(2, 2), "b": torch.ones(2), "c": {"d": torch.ones(2, 2), "e": torch.ones(2)}}
    walk = lambda p: {k: walk(v) if isinstance(v, dict) else v.ndim > 1 for k, v in p.items()}
    labels = lambda p: dict.fromkeys(p, "yes")
    for hide in (fr.select("b", "c.e"), {"a": False, "b": True, "c": True}):
        for inner in (
            fr.add_decayed_weights(0.1, mask=walk),
            fr.partition({"yes": fr.add_decayed_weights(0.1)}, labels),
            fr.prox_sgd(0.1, fr.l1, strength=0.0, mask=walk),
        ):
            tx = fr.chain(fr.freeze(hide), inner)
            updates, _ = tx.update(params, tx.init(params), params)
            assert not updates["b"].any()
            assert updates["a"].all()


@pytest.mark.parametrize("use", [fr.elastic, fr.elastic.grad, lambda p, a, r: fr.elastic.prox(p, a, 0.1, r)])
def test_hyperparameters_that_would_widen_a_leaf_are_refused(use):
    params = {"w": torch.ones(4, 5), "b": torch.ones(4)}
    for wrong in (torch.ones(4, 1), torch.ones(3)):
        with pytest.raises(ValueError, match=r"at leaf '[wb]': a hyperparameter has shape"):
            use(params, wrong, 0.5)
    use(params, {"w": torch.ones(4, 1), "b": torch.ones(4)}, 0.5)


@pytest.mark.parametrize(
    ("tx", "other"),
    [
        (fr.adam(1e-3), fr.sgd(0.1, momentum=0.9)),
        (fr.masked(fr.trace(0.9), True), fr.trace(0.9)),
        (fr.partition({"a": fr.trace(0.9)}, "a"), fr.partition({"b": fr.trace(0.9)}, "b")),
        (fr.prox_sgd(0.1, fr.l1, momentum=0.9), fr.prox_adam(0.1, fr.l1)),
        (fr.scale_by_adam(), fr.scale_by_amsgrad()),
        (fr.scale_by_rms(), fr.scale_by_adam()),
        (fr.sgd(lambda count: 0.1), fr.sgd(0.1)),
        (fr.fista(0.1, fr.l1), fr.prox_sgd(0.1, fr.l1)),
        (fr.chain(fr.identity()), fr.chain(fr.identity(), fr.identity())),
    ],
)
def test_the_state_of_another_transform_is_refused(tx, other):
    params = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=r"was it made by|Was it made by"):
        tx.update(params, other.init(params), params)


def test_group_options_that_do_not_fit_are_said_with_the_leaf():
    params = {"w": torch.ones(4, 5)}
    with pytest.raises(ValueError, match="at leaf 'w': weights has 3 entries for the 4 groups"):
        fr.group_lasso(params, weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"at leaf 'w': .*twice"):
        fr.group_lasso(params, dim=(1, -1))
    with pytest.raises(ValueError, match="at leaf 'w': dim is 'rows'"):
        fr.group_lasso(params, dim="rows")
