"""Trees, masks and selections."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import types
from collections import OrderedDict, UserDict, defaultdict, deque

import numpy
import optree
import pytest
import torch
from cases import Layer, assert_equal, draw, flat
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap
from torch.nn.utils.parametrizations import weight_norm

import funcreg as fr
from funcreg.core.checks import filled
from funcreg.core.masks import Selection, keep
from funcreg.core.tree import ABSENT, broadcast, leaves_like, map_with_path, structure

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


@dataclasses.dataclass
class Weights:
    w: torch.Tensor


class Output(OrderedDict):
    pass


_NET = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
_W = torch.ones(2)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (_NET, r"params is a Sequential; .*dict\(module.named_parameters\(\)\)"),
        ({"net": _NET}, r"params 'net' is a Sequential; .*dict\(module.named_parameters\(\)\)"),
        (nn.ParameterDict({"a": _W}), r"params is a ParameterDict; .*dict\(module.named_parameters\(\)\)"),
        (_NET.named_parameters(), r"params is a generator; .*dict\(module.named_parameters\(\)\)"),
        (list(_NET.named_parameters()), r"params '0.0' is '0.weight'; .*dict\(module.named_parameters\(\)\)"),
        (_NET.state_dict(), r"params '1.num_batches_tracked' is .*is it a buffer.*dict\(module.named_parameters\(\)\)"),
        (Weights(_W), r"params is a Weights; .*make a dict of it, vars\(...\)"),
        (Output(a=_W), r"params is an Output; .*make a dict of it, dict\(...\)"),
        (types.MappingProxyType({"a": _W}), r"params is a mappingproxy; .*make a dict of it, dict\(...\)"),
        (UserDict(a=_W), r"params is a UserDict; .*make a dict of it, dict\(...\)"),
        ({"a": _W}.values(), "params is a dict_values; .*make a list or a dict of it"),
        ({"a": {_W}}, "params 'a' is a set; .*make a list or a dict of it"),
        ({"a": 0.5}, "params 'a' is 0.5; .*torch.as_tensor"),
        ({"a": numpy.ones(2)}, "params 'a' is a numpy.ndarray; .*torch.as_tensor"),
        (None, "params is None; expected a tensor"),
    ],
)
@pytest.mark.parametrize("use", [fr.l1, fr.l1.grad, fr.sgd(0.1).init])
def test_what_is_no_tree_of_tensors_is_said_with_the_remedy(use, tree, message):
    with pytest.raises(TypeError, match=f"(?i){message}"):
        use(tree)


def test_trees_may_span_devices():
    params = {"a": torch.ones(3), "b": torch.ones(3, device="meta")}
    tx = fr.chain(
        fr.scale_by_adam(), fr.add_decayed_weights(lambda count: 0.1), fr.scale_by_learning_rate(torch.tensor(0.1))
    )
    updates, state = tx.update(params, tx.init(params), params)
    assert [u.device.type for u in fr.tree_leaves(updates)] == [params["a"].device.type, "meta"]
    assert state[0].steps.device.type == "cpu"  # Counters of trees that span devices.


def test_global_norm_is_exact_in_sixteen_bits_and_flat_at_zero():
    assert fr.global_norm({"w": torch.full((70000,), 1000.0, dtype=torch.float16)}).isfinite()
    assert fr.global_norm({"w": torch.full((4_000_000,), 0.1)}).sub(200).abs() < 1e-3
    assert fr.global_norm({}) == 0
    assert not grad(lambda w: fr.global_norm([w]))(torch.zeros(3)).any()
    torch.testing.assert_close(fr.global_norm([torch.tensor([3j, 4.0])]), torch.tensor(5.0))


# Gradients that are not there, or are no numbers


def test_none_becomes_zeros_where_it_is_allowed_and_only_there():
    params = {"head": Layer(torch.ones(2, 3), torch.ones(2)), "body": [torch.ones(4, dtype=torch.bfloat16)]}
    updates = {"head": Layer(torch.ones(2, 3), None), "body": [None]}
    whole = filled(params, updates, [True, False, True])
    assert whole["head"].weight is updates["head"].weight
    assert not whole["head"].bias.any()
    assert whole["body"][0].dtype == torch.bfloat16
    assert updates == {"head": Layer(updates["head"].weight, None), "body": [None]}
    assert filled(params, whole) is whole
    for allowed in (None, [False] * 3, lambda params: [True, True, False]):
        with pytest.raises(ValueError, match=r"updates '(body.0|head.bias)' is None; .*no gradient.*Freeze"):
            filled(params, updates, allowed)
    with pytest.raises(ValueError, match=r"updates is None"):
        filled(torch.ones(2), None)


def test_none_becomes_zeros_in_compiled_and_batched_code():
    params = {"w": torch.ones(3, 2), "b": torch.ones(3)}
    fill = lambda p: filled(p, {"w": 2 * p["w"], "b": None}, [True, False])
    for make in (lambda f: torch.compile(f, fullgraph=True), vmap):
        torch.testing.assert_close(make(fill)(params), {"w": 2 * params["w"], "b": torch.zeros(3)})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), "updates 'w' is a tensor of torch.int64; is it a mask, an index"),
        (torch.ones(2, 3, dtype=torch.bool), "updates 'w' is a tensor of torch.bool"),
        (torch.ones(2, 3).to_sparse(), r"updates 'w' has the layout torch.sparse_coo; .*to_dense.*sparse=False"),
        (torch.ones(2, 3).to(torch.float8_e4m3fn), "updates 'w' is a tensor of torch.float8_e4m3fn.*bfloat16"),
        (torch.ones(2, 3, dtype=torch.complex64), "updates 'w' is a tensor of torch.complex64; expected real numbers"),
        (1.0, "updates 'w' is 1.0; expected a tensor"),
    ],
)
@pytest.mark.parametrize("use", [fr.apply_updates, filled, lambda p, u: fr.sgd(0.1).update(u, fr.sgd(0.1).init(p), p)])
def test_updates_that_are_no_dense_tensors_of_numbers_are_refused_with_the_leaf(use, wrong, message):
    params = {"b": torch.ones(3), "w": torch.ones(2, 3)}
    with pytest.raises(TypeError, match=message):
        use(params, {"b": torch.ones(3), "w": wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(2, dtype=torch.int64), "params 'w' is a tensor of torch.int64; is it a buffer"),
        (torch.ones(2, 3).to_sparse(), "params 'w' has the layout torch.sparse_coo"),
        (torch.ones(2, 3).to(torch.float8_e5m2), "params 'w' is a tensor of torch.float8_e5m2"),
    ],
)
@pytest.mark.parametrize("use", [fr.l1, fr.l1.grad, fr.sgd(0.1).init, lambda p: fr.l1.prox(p, 0.1)])
def test_parameters_that_are_no_dense_tensors_of_numbers_are_refused_with_the_leaf(use, wrong, message):
    with pytest.raises(TypeError, match=message):
        use({"w": wrong})


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


def test_the_types_of_layers_that_a_tree_lacks_are_an_error():
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    params = dict(net.named_parameters())
    with pytest.raises(ValueError, match=r"Conv2d, and no such layer of this Sequential.*types LayerNorm, Linear"):
        fr.select(nn.Conv2d, module=net)
    norms = fr.select(nn.LayerNorm, module=net)
    with pytest.raises(ValueError, match=r"select of LayerNorm matches no leaf.*has 1.bias, 1.weight.*head.0.bias"):
        norms({"head": params})
    inner = fr.masked(fr.scale(2.0), norms)  # Under an outer mask, a type may rightly match none of the rest.
    fr.masked(inner, fr.select("0.*")).init(params)


def weight_norms(net):
    net[0] = weight_norm(net[0])
    return net


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel, weight_norms])
def test_selections_see_through_wrappers(wrap):
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    params, wrapped = dict(net.named_parameters()), wrap(copy.deepcopy(net))
    outside = dict(wrapped.named_parameters())
    assert outside.keys() != params.keys()
    for kind, glob in ((nn.LayerNorm, "1.*"), (nn.Linear, "0.*")):
        expected = chosen(fr.select(glob), params)
        weights = chosen(fr.select(glob) & fr.select("*.weight"), outside)
        for module in (net, wrapped):
            assert chosen(fr.select(kind, module=module), params) == expected
            assert set(weights) < set(chosen(fr.select(kind, module=module), outside))
            assert chosen(fr.select(kind, module=module), outside) == chosen(fr.select(glob), outside)


def test_a_tied_parameter_belongs_to_each_layer_that_has_it():
    params = dict(Tied().named_parameters())
    assert list(params) == ["embedding.weight"]
    for kind in (nn.Linear, nn.Embedding):
        assert chosen(fr.select(kind, module=Tied()), params) == ["embedding.weight"]


def test_a_module_may_be_called_module():
    net = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.LayerNorm(2)})
    params = dict(net.named_parameters())
    assert chosen(fr.select(nn.Linear, module=net), params) == ["module.weight", "module.bias"]
    assert chosen(fr.select("module.weight"), params) == ["module.weight"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (3, "select got 3; expected globs over dotted names"),
        (None, "select got None"),
        (b"*.weight", r"select got b'\*.weight'"),
        (["a", "b"], r"select got a list.*select\(\*patterns\)"),
        (int, "select got the class int"),
        (nn.Linear(1, 1), "select got a Linear.*its type, or the name"),
    ],
)
def test_patterns_that_are_none_are_errors(pattern, message):
    with pytest.raises(TypeError, match=message):
        fr.select(pattern)
    with pytest.raises(TypeError, match=message):
        fr.select("a", pattern, module=nn.Linear(1, 1))


def test_options_of_selections_are_checked():
    with pytest.raises(TypeError, match="min_ndim is '2'"):
        fr.select(min_ndim="2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="min_ndim is -1"):
        fr.select(min_ndim=-1)
    with pytest.raises(TypeError, match=r"module is a dict; expected the torch.nn.Module"):
        fr.select(nn.Linear, module=PARAMS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"params 'a' is 0.5"):
        fr.matrices({"a": 0.5})


SELECTIONS = {
    "matrices": fr.matrices,
    "select('*.weight', 'head.*')": fr.select("*.weight", "head.*"),
    "select('*.bias', min_ndim=1)": fr.select("*.bias", min_ndim=1),
    "select(Linear, module=Sequential)": fr.select(
        nn.Linear, module=nn.Sequential(OrderedDict(head=nn.Linear(2, 2), norm=nn.LayerNorm(2)))
    ),
    "~select('head.*') & matrices": ~fr.select("head.*") & fr.matrices,
    "~(select('head.*') & matrices)": ~(fr.select("head.*") & fr.matrices),
    "(matrices | select('*.bias')) & ~~matrices": (fr.matrices | fr.select("*.bias")) & ~~fr.matrices,
    "matrices | matrices & (matrices & matrices)": fr.matrices | fr.matrices & (fr.matrices & fr.matrices),
    "matrices | (matrices | matrices)": fr.matrices | (fr.matrices | fr.matrices),
    "matrices & {'a': True}": fr.matrices & {"a": True},
    "matrices | False": fr.matrices | False,
    "matrices | callable": fr.matrices | callable,
}


@pytest.mark.parametrize("text", SELECTIONS)
def test_selections_print_as_written_and_come_back_from_a_pickle(text):
    selection = SELECTIONS[text]
    assert repr(selection) == text
    for again in (pickle.loads(pickle.dumps(selection)), copy.deepcopy(selection)):
        assert repr(again) == text
        if "{" not in text and "callable" not in text:
            assert again(PARAMS) == selection(PARAMS)


def vectors(params):
    return [w.ndim == 1 for w in fr.tree_leaves(params)]


def test_a_selection_of_ones_own_pickles_if_its_function_does():
    own = Selection(vectors)
    assert repr(own | fr.matrices) == "Selection(vectors) | matrices"
    assert pickle.loads(pickle.dumps(own | fr.matrices))(PARAMS) == dict.fromkeys(PARAMS, True)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(Selection(lambda params: [True]))


def test_the_selection_of_this_library_comes_back_as_itself():
    assert pickle.loads(pickle.dumps(fr.matrices)) is fr.matrices
    assert copy.deepcopy(fr.matrices) is fr.matrices


def test_compiled_code_builds_trees_as_eager_code_does():
    """Dicts in the order that they came in, and kinds of nodes; leaves in that of sorted keys."""
    x = torch.arange(3.0)
    tree = {"b": x, "a": (x + 1, [x + 2, {}, None]), 1: (x + 3, {"z": x + 4, "y": x + 5}), "o": OrderedDict(z=x, c=x)}
    both = lambda tree: (fr.tree_map(lambda a, b: a * b, tree, tree), fr.tree_leaves(tree), fr.tree_map(torch.neg, x))
    found = torch.compile(both, fullgraph=True, backend="eager")(tree)
    assert repr(found) == repr(both(tree))


def test_selections_may_be_made_in_compiled_code():
    net = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(2, 2)), "norm": nn.LayerNorm(2), "head": nn.Linear(2, 2)})
    made = ~fr.select(nn.Linear, module=torch.compile(net), min_ndim=2)
    for choose in (
        lambda: fr.select("*.weight") & fr.matrices | fr.select("norm.*"),
        lambda: fr.select(nn.Linear, module=net),
        lambda: made,  # torch.compile follows no `~` of an object: write it outside.
    ):
        compiled = torch.compile(lambda p, choose=choose: fr.l1(p, mask=choose()), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(PARAMS), fr.l1(PARAMS, mask=choose()))


@pytest.mark.parametrize(
    "use",
    [
        lambda: not fr.matrices,
        lambda: fr.matrices and fr.select("*.weight"),
        lambda: fr.select("a") or fr.select("b"),
        lambda: bool(fr.matrices),
    ],
)
def test_a_selection_has_no_truth_value(use):
    with pytest.raises(TypeError, match=r"has no truth value.*~a.*a & b.*a \| b"):
        use()


EMPTY_MASKS = {
    "tree": dict.fromkeys(PARAMS, False),
    "function": lambda params: dict.fromkeys(params, False),
    "selection": fr.select("*.bias", min_ndim=2),
    "composed": fr.matrices & fr.select("*.bias"),
}


@pytest.mark.parametrize("mask", EMPTY_MASKS.values(), ids=EMPTY_MASKS)
@pytest.mark.parametrize(
    "use",
    [
        lambda mask: fr.l1(PARAMS, mask=mask),
        lambda mask: fr.l1.prox(PARAMS, 0.1, mask=mask),
        lambda mask: fr.masked(fr.scale(2.0), mask).init(PARAMS),
        lambda mask: fr.freeze(mask).init(PARAMS),
        lambda mask: fr.add_decayed_weights(0.1, mask).init(PARAMS),
        lambda mask: fr.prox_sgd(0.1, fr.l1, strength=0.1, mask=mask).init(PARAMS),
    ],
)
def test_a_mask_that_chooses_no_leaf_is_an_error_that_names_the_leaves(use, mask):
    with pytest.raises(ValueError, match=r"chooses no leaf.*encoder.0.bias.*mask=False"):
        use(mask)
    use(False)


@pytest.mark.parametrize("mask", EMPTY_MASKS.values(), ids=EMPTY_MASKS)
def test_a_mask_may_choose_no_leaf_inside_another_one(mask):
    fr.masked(fr.masked(fr.scale(2.0), mask), {name: "bias" not in name for name in PARAMS}).init(PARAMS)
    fr.partition({"a": fr.masked(fr.scale(2.0), mask), "b": fr.identity(), "c": fr.identity()}, labels).init(PARAMS)
    assert not any((fr.matrices & mask)(PARAMS).values())


def labels(params):
    """Of three labels, one for no leaf."""
    return {name: "a" if "weight" in name else "b" for name in params}


def test_what_stands_for_a_leaf_left_out_comes_back_as_itself():
    # Trees are rebuilt with others of its type.
    for absent in (ABSENT, fr.tree_map(torch.clone, ABSENT)):
        assert repr(pickle.loads(pickle.dumps(absent))) == repr(copy.deepcopy(absent)) == "ABSENT"
    state = keep(PARAMS, [True, False, False, True])
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file)  # Of weights only.
    assert repr(loaded["head.weight"]) == "ABSENT"
    assert structure(loaded)[1] == structure(state)[1]


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
    with pytest.raises(ValueError, match="mask does not match the parameters: it has 'tail', unknown to"):
        tx = use(fr.identity(), {"head": True, "body": True, "tail": True})
        tx.update(params, tx.init(params), params)
    for value, message in (
        (torch.ones(2, 2) > 0, "is a tensor of shape .*chooses whole leaves"),
        (numpy.bool_(True), r"is a numpy.bool\w*; expected True.*bool\(...\)"),
        (1, "is 1; expected True"),
        (None, "mask does not match the parameters"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            tx = use(fr.identity(), {"head": value, "body": True})
            tx.update(params, tx.init(params), params)
    for mask, message in (
        (nn.Linear, r"the class Linear.*select\(Linear, module=...\)"),
        (nn.Linear(1, 1), "a module, a Linear"),
        (b"head", "the string b'head'"),
        (["head", "body"], r"a list of strings.*select\('head', 'body'\)"),
        (lambda params: None, "returned None; expected a tree of bools"),
    ):
        with pytest.raises(TypeError, match=message):
            tx = use(fr.identity(), mask)
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


def _stepped(tx, params):
    return tx.update(params, tx.init(params), params)[0]


def _regularized(params, strength, mask):
    named = [(name, torch.nn.Parameter(w.clone())) for name, w in params.items()]
    optimizer = torch.optim.SGD(named, lr=0.1)
    fr.regularize(optimizer, fr.l1, strength=strength, mask=mask)
    for _, w in named:
        w.grad = torch.ones_like(w)
    optimizer.step()
    return {name: w.detach() for name, w in named}


def _distance(params):
    return (params["w"] - 2).square().sum() + (params["b"] - 3).square().sum()


LEFT_OUT = {
    "value": lambda p, s, mask: (s * fr.l1)(p, mask=mask),
    "gradient": lambda p, s, mask: fr.elastic.grad(p, s, 0.5, mask=mask),
    "proximal operator": lambda p, s, mask: fr.l1.prox(p, s, mask=mask),
    "given": lambda p, s, mask: fr.l1.given(strength=s, mask=mask).prox(p, 0.5),
    "a sum": lambda p, s, mask: (fr.half_l2 + fr.l1.given(strength=s, mask=mask)).prox(p, 0.5),
    "curvature": lambda p, s, mask: (fr.l1 + fr.half_l2.given(strength=s, mask=mask)).prox(p, 0.5),
    "add_penalty": lambda p, s, mask: _stepped(fr.add_penalty(fr.l1, strength=s, mask=mask), p),
    "proximal": lambda p, s, mask: _stepped(fr.proximal(fr.l1, s, mask=mask), p),
    "masked": lambda p, s, mask: _stepped(fr.masked(fr.add_decayed_weights(s), mask), p),
    "prox_sgd": lambda p, s, mask: _stepped(fr.prox_sgd(0.1, fr.l1, strength=s, mask=mask), p),
    "prox_adam": lambda p, s, mask: _stepped(fr.prox_adam(0.1, fr.l1, strength=s, mask=mask), p),
    "fista": lambda p, s, mask: _stepped(fr.fista(0.1, fr.l1, strength=s, mask=mask), p),
    "rmda": lambda p, s, mask: _stepped(fr.rmda(0.1, fr.l1, strength=s, mask=mask), p),
    "ftrl": lambda p, s, mask: _stepped(fr.ftrl(0.1, fr.l1, strength=s, mask=mask), p),
    "regularize": _regularized,
    "minimize": lambda p, s, mask: fr.minimize(_distance, p, fr.l1, strength=s, mask=mask).params,
    "kkt_residual": lambda p, s, mask: fr.kkt_residual(p, p, fr.l1, strength=s, mask=mask),
}


@pytest.mark.parametrize("use", LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_strength_may_lack_the_leaves_that_a_mask_leaves_out(use):
    params, mask = {"w": torch.ones(2), "b": torch.ones(1)}, fr.select("w")
    assert_equal(use(params, {"w": 0.3}, mask), use(params, {"w": 0.3, "b": 0.0}, mask))
    with pytest.raises(ValueError, match=r"it lacks 'w'.* each leaf that no mask leaves out, as in \{'w': 0\.0\}"):
        use(params, {"b": 0.3}, mask)
    with pytest.raises(ValueError, match="it has 'c', unknown to the parameters"):
        use(params, {"w": 0.3, "c": 0.0}, mask)


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
    with pytest.raises(ValueError, match="at leaf 'w': weights has 3 entries; expected 4, one for each group"):
        fr.group_lasso(params, weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"at leaf 'w': .*twice"):
        fr.group_lasso(params, dim=(1, -1))
    with pytest.raises(ValueError, match="at leaf 'w': dim is 'rows'"):
        fr.group_lasso(params, dim="rows")


# Ensembles


_RATES = torch.tensor([0.1, 1.0])


@pytest.mark.parametrize(
    ("make", "hyper", "error", "message"),
    [
        (
            lambda rate: None,
            [_RATES],
            TypeError,
            "returned None for member 0; expected a Transform. Is a return missing",
        ),
        (lambda rate: fr.identity, [_RATES], TypeError, r"expected a Transform. Is it called, as in identity\(\)"),
        (fr.sgd(0.1), [_RATES], TypeError, "expected a function from hyperparameters to a transform"),
        (fr.sgd, [torch.tensor([])], ValueError, "hyperparameters without entries; expected one entry for each"),
        (fr.sgd, [[0.1, 1.0]], ValueError, r"got 0.1 as hyperparameter 0.0; expected a tensor.*torch.as_tensor"),
        (fr.sgd, [numpy.ones(2)], ValueError, "as hyperparameter 0; expected a tensor.*torch.as_tensor"),
        (lambda h: fr.sgd(h["rate"]), [{"rate": 0.1}], ValueError, "got 0.1 as hyperparameter 0.rate"),
        (fr.sgd, [torch.tensor(0.1)], ValueError, "a tensor without dimensions as hyperparameter 0"),
        (fr.prox_adam, [_RATES, torch.ones(3)], ValueError, "2 for hyperparameter 0, 3 for hyperparameter 1"),
        (lambda rate: fr.sgd(rate), [_RATES, _RATES], TypeError, r"2 hyperparameters for <lambda>\(rate\): too many"),
        (fr.sgd, [], TypeError, "0 hyperparameters for sgd.*missing a required argument: 'learning_rate'"),
        (lambda: fr.sgd(0.1), [], ValueError, "got no hyperparameters; expected"),
        (lambda rate: fr.sgd(rate.item()), [-_RATES.flip(0)], ValueError, "at member 0 of the ensemble: learning_rate"),
        (lambda rate: fr.sgd(0.5 - rate.item()), [_RATES], ValueError, "at member 1 of the ensemble: learning_rate"),
    ],
)
def test_ensembles_that_cannot_be_meant_are_errors(make, hyper, error, message):
    with pytest.raises(error, match=message):
        fr.ensemble(make, *hyper)


def test_what_an_ensemble_gets_is_stacked():
    taking = fr.Transform(fr.init_empty_state, lambda updates, state, params, value, other: (updates, state))
    tx, params = fr.ensemble(lambda rate: fr.chain(taking, fr.sgd(rate)), _RATES), {"w": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"2 members got the leaf 'w' of shape \(3,\); expected stacked parameters"):
        tx.init({"w": torch.ones(3)})
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"the extra argument 'value' of shape \(3,\); expected one entry a member"):
        tx.update(params, state, params, value=torch.ones(3))
    tx.update(params, state, params, value=torch.ones(()), other=torch.ones(2))


def test_an_ensemble_takes_every_tree():
    """Also those that `vmap` does not know: with None among leaves, and with nodes that optree was told of."""
    tx, w = fr.ensemble(fr.adamw, _RATES), torch.ones(2, 3)
    alone = [fr.adamw(rate) for rate in _RATES]
    for tree in ({"a": w, "b": None, "c": [None, w]}, [defaultdict(list, {"a": w}), deque([w])]):
        one = fr.tree_map(lambda x: x[0], tree)
        updates, _ = tx.update(tree, tx.init(tree), tree)
        for k, member in enumerate(alone):
            expected, _ = member.update(one, member.init(one), one)
            assert_equal(fr.tree_map(lambda x, k=k: x[k], updates), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda lazy: fr.l1(dict(lazy.named_parameters())),
        lambda lazy: fr.adam(0.1).init(dict(lazy.named_parameters())),
        lambda lazy: fr.sparsity(lazy),
        lambda lazy: fr.explain(fr.matrices, lazy),
        lambda lazy: fr.channel_groups(nn.Sequential(lazy, nn.Linear(2, 2)), (torch.ones(1, 3),)),
    ],
)
def test_parameters_that_have_no_shape_yet_are_named(call):
    with pytest.raises(ValueError, match=r"(bias|weight)' has no shape yet; run (its|the) module once on some inputs"):
        call(nn.LazyLinear(2))
