"""Masks by regular expression, shape and role, why they choose, and a penalty for each kind of leaf."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from cases import DEVICE, assert_equal, draw, flat
from torch import nn
from torch.func import grad, vmap

import funcreg as fr

PARAMS = {
    "conv.weight": torch.ones(4, 3, 2, 2),
    "conv.bias": torch.ones(4),
    "layers.0.weight": torch.ones(5, 4),
    "layers.12.weight": torch.ones(2, 5),
    "head.weight": torch.ones(2, 3),
}


def chosen(mask, params=PARAMS):
    return [name for name, value in mask(params).items() if value]


# Regular expressions and shapes


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (r"layers\.\d+\.weight", ["layers.0.weight", "layers.12.weight"]),
        (r"layers\.\d\.weight", ["layers.0.weight"]),
        (r".*\.(bias|weight)", list(PARAMS)),
        (r"(layers|head)\..*", ["layers.0.weight", "layers.12.weight", "head.weight"]),
    ],
)
def test_regular_expressions_match_whole_names(pattern, names):
    mask = fr.select(re.compile(pattern))
    assert chosen(mask) == names
    assert repr(mask) == f"select({re.compile(pattern)!r})"
    for again in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), eval(repr(mask), {"re": re, **vars(fr)})):
        assert chosen(again) == names
    assert chosen(mask, {f"_orig_mod.{name}": w for name, w in PARAMS.items()}) == [f"_orig_mod.{n}" for n in names]
    assert chosen(fr.select(re.compile(pattern.upper().replace(r"\D", r"\d"), re.IGNORECASE))) == names


def test_a_regular_expression_that_is_found_but_does_not_match_says_so():
    with pytest.raises(ValueError, match=r"matches no leaf; .*found in 'conv.weight'.*re.compile\('\.\*weight\.\*'\)"):
        fr.select(re.compile("weight"))(PARAMS)
    with pytest.raises(ValueError, match=r"select\(re.compile\('decoder'\)\) matches no leaf; the leaves are"):
        fr.select(re.compile("decoder"))(PARAMS)
    with pytest.raises(TypeError, match=r"select got .*expected globs.*regular expressions"):
        fr.select(re.compile(b"weight"))


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((None, 3), ["head.weight"]),
        ((2, None), ["layers.12.weight", "head.weight"]),
        ((..., 2, 2), ["conv.weight"]),
        ((4, ...), ["conv.weight", "conv.bias"]),
        ((4, ..., 2), ["conv.weight"]),
        ((None,), ["conv.bias"]),
        ((...,), list(PARAMS)),
        ((), []),
        (lambda shape: len(shape) == 4 and shape[0] > 3, ["conv.weight"]),
    ],
)
def test_shapes_choose_by_size(shape, names):
    assert chosen(fr.select(shape=shape)) == names
    assert chosen(fr.select("*.weight", shape=shape)) == [name for name in names if name.endswith("weight")]
    assert chosen(fr.select(min_ndim=2, shape=shape)) == [name for name in names if PARAMS[name].ndim > 1]


@pytest.mark.parametrize("shape", [3, [None, 3], (None, -1), (..., 3, ...), ("3",), (True,), tuple])
def test_what_is_no_shape_is_refused(shape):
    with pytest.raises(TypeError, match=r"shape is .*expected a tuple of sizes"):
        fr.select(shape=shape)


def test_a_function_of_shapes_returns_a_bool():
    with pytest.raises(TypeError, match=r"returned 1 for .*expected True or False"):
        fr.select(shape=len)(PARAMS)


def test_selections_by_expression_and_shape_compile_and_map():
    mask = fr.select(re.compile(r".*weight"), shape=(..., None, 3))
    tx = fr.add_decayed_weights(0.1, mask=mask)
    f = lambda p: tx.update(p, tx.init(p), p)[0]
    assert_equal(torch.compile(f, fullgraph=True, backend="eager")(PARAMS), f(PARAMS))
    many = vmap(f)(fr.tree_map(lambda w: torch.stack([w, w]), PARAMS))
    assert_equal(fr.tree_map(lambda w: w[0], many), f(PARAMS))


# Roles


class RMSNorm(nn.Module):
    """A layer as models of language have it, whose class is not one of torch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1))


class Model(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.patch_embed = nn.Sequential(nn.Conv2d(3, 4, 2))
        self.pos_embed = nn.Parameter(torch.ones(1, 3, 4))
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.norm = RMSNorm()
        self.batch = nn.BatchNorm2d(4)
        self.rnn = nn.LSTM(4, 4)
        self.act = nn.PReLU()
        self.out = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)) if not tied else nn.Linear(4, 6)
        if tied:
            self.out.weight = self.embed.weight


@pytest.mark.parametrize("tied", [False, True])
def test_weights_decay_and_biases_norms_and_embeddings_do_not(tied):
    model = Model(tied)
    mask, params = fr.no_bias_norm_embed(model), dict(model.named_parameters())
    expected = ["patch_embed.0.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
    expected += ["rnn.weight_ih_l0", "rnn.weight_hh_l0", *([] if tied else ["out.parametrizations.weight.original"])]
    assert sorted(chosen(mask, params)) == sorted(expected)
    wrapped = {f"_orig_mod.{name}": w for name, w in params.items()}
    assert [name.removeprefix("_orig_mod.") for name in chosen(mask, wrapped)] == chosen(mask, params)
    stacked = fr.tree_map(lambda w: torch.stack([w, w]), params)
    assert chosen(mask, stacked) == chosen(mask, params)  # By name: members may be stacked.
    if tied:  # A second name of a tied matrix, as in state_dict().
        assert not mask({**params, "out.weight": model.out.weight})["out.weight"]


def test_the_mask_of_roles_composes_prints_pickles_and_is_used():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    mask, params = fr.no_bias_norm_embed(model), dict(model.named_parameters())
    assert repr(mask) == "no_bias_norm_embed(Sequential)"
    assert pickle.loads(pickle.dumps(mask))(params) == mask(params)
    assert chosen(mask & fr.select("0.*"), params) == ["0.weight"]
    assert chosen(~mask, params) == ["0.bias", "1.weight", "1.bias"]
    tx = fr.adamw(0.1, weight_decay=0.5, mask=mask)
    zeros = fr.tree_map(torch.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert [name for name, u in updates.items() if u.any()] == ["0.weight"]
    with pytest.raises(ValueError, match=r"no leaf is called as a parameter of this Sequential, which has 0.weight"):
        mask({"other": torch.ones(2)})
    with pytest.raises(TypeError, match=r"no_bias_norm_embed got a dict; expected the torch.nn.Module"):
        fr.no_bias_norm_embed(params)


def test_leaves_that_the_module_does_not_know_are_judged_by_name_and_dimensions():
    mask = fr.no_bias_norm_embed(nn.Linear(2, 2))
    extra = {"weight": torch.ones(2, 2), "lora.a": torch.ones(2, 1), "lora.bias": torch.ones(2), "scale": torch.ones(2)}
    assert chosen(mask, extra) == ["weight", "lora.a"]


# Why


def test_tables_say_what_is_chosen_and_why():
    table = fr.explain(fr.select("conv.*") & ~fr.select("*.bias") | fr.select(shape=(None, 3)), PARAMS)
    found = {row["name"]: (row["chosen"], row["why"]) for row in table.rows}
    assert found["conv.weight"] == (True, "matches 'conv.*', does not match '*.bias'")
    assert found["conv.bias"] == (False, "matches '*.bias', of shape (4,), against shape=(None, 3)")
    assert found["head.weight"] == (True, "of shape (2, 3), as shape=(None, 3)")
    assert table.total["why"] == "2 of 5 leaves, 61 % of the entries"
    assert [row["name"] for row in table.rows] == list(PARAMS)
    assert "head.weight" in repr(table)
    assert "yes" in repr(table)


def test_masks_of_all_kinds_are_explained():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    rows = fr.explain(fr.no_bias_norm_embed(model), model).rows
    assert [row["why"] for row in rows] == ["a weight", "a bias", "of the layer LayerNorm", "of the layer LayerNorm"]
    rows = fr.explain(fr.select(nn.LayerNorm, "0.bias", module=model), model).rows
    assert [row["why"] for row in rows[:2]] == ["matches none of LayerNorm, '0.bias'", "matches '0.bias'"]
    assert [row["why"] for row in rows[2:]] == ["of LayerNorm"] * 2
    assert [row["why"] for row in fr.explain(fr.matrices, model).rows] == ["2 dimensions", *["1 dimension"] * 3]
    for mask in ({name: "0" in name for name, _ in model.named_parameters()}, lambda p: dict.fromkeys(p, True)):
        assert {row["why"] for row in fr.explain(mask, model).rows} == {""}
    assert [row["chosen"] for row in fr.explain(False, model).rows] == [False] * 4


def test_objects_that_explain_themselves_are_asked():
    class Groups:
        def explain(self, params=None):
            return "asked", params

    assert fr.explain(Groups()) == ("asked", None)
    assert fr.explain(Groups(), PARAMS) == ("asked", PARAMS)
    with pytest.raises(TypeError, match=r"explain got matrices and no parameters; expected explain\(mask, params\)"):
        fr.explain(fr.matrices)
    with pytest.raises(TypeError, match="explain got the penalty"):
        fr.explain(fr.l1, PARAMS)
    with pytest.raises(TypeError, match=r"mask is the string .*select"):
        fr.explain("conv.*", PARAMS)


# A penalty for each kind of leaf


def layers(strength=1.0):
    return fr.per_leaf(
        {
            "body.*": 0.3 * strength * fr.l1 + 0.1 * fr.half_l2,
            fr.matrices: fr.group_lasso.given(strength=0.5 * strength),
        }
    )


def apart(f, params):
    """What three rules of the parts do, each called on its own leaves; the bias of the head has none."""
    body = f(0.3 * fr.l1 + 0.1 * fr.half_l2, {"body": params["body"]})
    head = f(0.5 * fr.group_lasso, {"w": params["head"].weight})
    return body["body"], head["w"]


def test_each_leaf_has_the_value_gradient_and_proximal_point_of_its_part():
    params, metric, penalty = draw(), fr.tree_map(lambda w: w.abs() + 0.5, draw(3)), layers()
    value = (0.3 * fr.l1 + 0.1 * fr.half_l2)(params["body"]) + 0.5 * fr.group_lasso(params["head"].weight)
    torch.testing.assert_close(penalty(params), value)
    own = {"body": metric["body"], "w": metric["head"].weight}
    three = {
        "grad": (penalty.grad(params), lambda p, w: p.grad(w)),
        "prox": (penalty.prox(params, 0.7), lambda p, w: p.prox(w, 0.7)),
        "metric": (
            penalty.prox(params, 0.7, metric=metric, inner_steps=None),
            lambda p, w: p.prox(w, 0.7, metric={name: own[name] for name in w}),
        ),
        "strength": ((2.0 * penalty).prox(params, 0.7), lambda p, w: p.prox(w, 1.4)),
        "residual": (
            penalty.residual(params, draw(1), strength=2.0),
            lambda p, w: p.residual(
                w, {"body": draw(1)["body"]} if "body" in w else {"w": draw(1)["head"].weight}, strength=2.0
            ),
        ),
    }
    rest = {"grad": 0 * params["head"].bias, "residual": draw(1)["head"].bias}
    for name, (found, rule) in three.items():
        body, weight = apart(rule, params)
        assert_equal(found["body"], body)
        assert_equal(found["head"].weight, weight)
        assert_equal(found["head"].bias, rest.get(name, params["head"].bias))


def test_parts_are_logged_by_pattern():
    parts = layers().parts(draw())
    assert list(parts) == ["body.*", "matrices"]
    torch.testing.assert_close(sum(parts.values()), layers()(draw()))
    assert_equal(fr.penalties(draw(), layers()), parts)
    assert list(fr.per_leaf({re.compile(r"head\..*"): fr.l1}).parts(draw())) == [r"head\..*"]


def test_weights_multiply_the_parts_leaf_by_leaf():
    weights = {"head": 2.0, "body": {"filters": 3.0, "scale": 0.0}}
    found = (weights * layers()).prox(draw(), 0.5)
    expected = {name: layers().prox(draw(), 0.5 * factor) for name, factor in (("head", 2.0), ("filters", 3.0))}
    assert_equal(found["head"], expected["head"]["head"])
    assert_equal(found["body"]["filters"], expected["filters"]["body"]["filters"])
    assert_equal(found["body"]["scale"], draw()["body"]["scale"])
    torch.testing.assert_close((2.0 * layers())(draw()), 2 * layers()(draw()))


def test_it_adds_to_other_penalties():
    both = layers() + 0.2 * fr.half_l2
    point = both.prox(draw(), 0.5)
    assert_equal(point["head"].bias, draw()["head"].bias / 1.1, rtol=1e-12)
    torch.testing.assert_close(both(draw()), layers()(draw()) + 0.2 * fr.half_l2(draw()))


def make_sgd(strength=1.0):
    return fr.prox_sgd(0.1, layers(strength))


USES = {
    "add_penalty": lambda h=1.0: fr.add_penalty(layers(h)),
    "proximal": lambda h=1.0: fr.chain(fr.sgd(0.1), fr.proximal(layers(h), 0.1)),
    "prox_sgd": make_sgd,
    "prox_adam": lambda h=1.0: fr.prox_adam(0.1, layers(h), eps=0.1),
    "fista": lambda h=1.0: fr.fista(0.1, layers(h)),
}


@pytest.mark.filterwarnings("ignore:fuse got .* steps go uphill")
@pytest.mark.slow
@pytest.mark.parametrize("make", USES.values(), ids=USES)
def test_transforms_take_it_eager_mapped_in_one_graph_and_fused(make):
    tx, params = make(), draw()
    state = tx.init(params)
    updates, _ = tx.update(draw(1), state, params)
    expected = fr.apply_updates(params, updates)
    step = fr.fuse(tx, backend="eager")
    owned, ready = step.init(params)
    assert_equal(step(owned, draw(1), ready)[0], expected, rtol=1e-9, atol=1e-12)
    compiled = torch.compile(lambda g, s, p: tx.update(g, s, p)[0], fullgraph=True, backend="eager")
    assert_equal(compiled(draw(1), state, params), updates, rtol=1e-9, atol=1e-12)
    strengths = torch.tensor([0.5, 2.0], dtype=torch.float64)
    grads = draw(1)
    many = vmap(lambda h: make(h).update(grads, make(h).init(params), params)[0])(strengths)
    for i, strength in enumerate(strengths.tolist()):
        alone = make(strength)
        assert_equal(
            fr.tree_map(lambda u, i=i: u[i], many), alone.update(draw(1), alone.init(params), params)[0], rtol=1e-6
        )


def test_the_solution_has_no_residual_and_the_greatest_strength_zeroes_what_carries_a_penalty():
    target, penalty = draw(1), layers()
    solution = penalty.prox(target, 1.0)
    slopes = fr.tree_map(lambda w, t: w - t, solution, target)
    assert fr.kkt_residual(solution, slopes, penalty) < 1e-12
    least = fr.lambda_max(target, penalty)
    landed = penalty.prox(target, least)
    assert not flat((landed["body"], landed["head"].weight)).any()
    assert (
        flat(penalty.prox(target, 0.999 * least)["body"]).any()
        or penalty.prox(target, 0.999 * least)["head"].weight.any()
    )
    masked = fr.l1.given(mask=fr.matrices)
    assert fr.lambda_max(target, masked) == fr.lambda_max(target, fr.l1, mask=fr.matrices)


def test_a_path_fits_what_carries_no_penalty_first():
    x, target = draw()["body"]["filters"].reshape(8, 3), torch.arange(8, dtype=torch.float64)
    loss = lambda p: (x @ p["w"] + p["b"] - target).square().mean() / 2
    start = {"w": torch.zeros(3, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    found = fr.regularization_path(loss, start, fr.per_leaf({"w": fr.l1}), count=3)
    masked = fr.regularization_path(loss, start, fr.l1, count=3, mask=fr.select("w"))
    assert_equal(found._replace(sparsity=masked.sparsity), masked, rtol=1e-6, atol=1e-8)


def test_an_optimizer_of_torch_takes_it():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fr.regularize(optimizer, fr.per_leaf({"0.weight": fr.l1}), strength=100.0, module=model)
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not model[0].weight.any()
    assert model[1].weight.any()
    assert not torch.equal(before["1.weight"], model[1].weight)


def test_it_is_differentiable_in_its_strengths():
    slope = grad(lambda h: layers(h)(draw()))(torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(slope, layers()(draw()) - 0.1 * fr.half_l2(draw()["body"]))


def test_it_prints_as_written_and_comes_back_from_a_pickle():
    penalty = fr.per_leaf({"body.*": 0.5 * fr.l1, re.compile("head.*"): fr.group_lasso})
    assert repr(penalty) == "per_leaf({'body.*': 0.5 * l1, re.compile('head.*'): group_lasso})"
    assert repr(0.5 * penalty).startswith("0.5 * per_leaf(")
    again = pickle.loads(pickle.dumps(penalty))
    assert again(draw()) == penalty(draw())


def test_leaves_that_an_outer_mask_left_out_are_not_missed():
    tx = fr.add_penalty(layers(), mask={"head": False, "body": True})
    updates, _ = tx.update(draw(1), tx.init(draw()), draw())
    assert_equal(updates["head"], draw(1)["head"])
    pairs = fr.per_leaf([({"head": True, "body": False}, fr.l1), ("*", fr.l2)])
    assert [row["why"] for row in fr.explain(pairs, draw()).rows] == [
        *["*: l2"] * 2,
        *["{'head': True, 'body': False}: l1"] * 2,
    ]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fr.per_leaf({"bdy.*": fr.l1})(draw()), ValueError, r"'bdy.\*', which matches no leaf.*mean 'body"),
        (
            lambda: fr.per_leaf({"*": fr.l1, "head.*": fr.l2})(draw()),
            ValueError,
            r"head.weight, head.bias alone.*before",
        ),
        (lambda: fr.per_leaf({fr.select(min_ndim=7): fr.l1})(draw()), ValueError, r"min_ndim=7\) chooses no leaf"),
        (
            lambda: fr.per_leaf({"*": fr.elastic}),
            TypeError,
            r"at pattern '\*' of per_leaf: elastic still takes alpha, rho",
        ),
        (lambda: fr.per_leaf({"*": 1e-4}), TypeError, r"per_leaf has 0.0001 for '\*'; expected a Penalty"),
        (lambda: fr.per_leaf({}), ValueError, "per_leaf got no parts"),
        (lambda: fr.per_leaf(fr.l1), TypeError, "per_leaf got a Penalty; expected a dict"),
        (lambda: fr.per_leaf([fr.l1]), TypeError, "per_leaf got a list; expected a dict"),
        (lambda: fr.per_leaf({nn.Linear: fr.l1}), TypeError, "mask is the class Linear"),
    ],
)
def test_wrong_parts_are_said(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({3: 0.1 * fr.l1}, r"per_leaf has the pattern 3; expected a glob over names such as 'conv\*'"),
        ({None: 0.1 * fr.l1}, "per_leaf has the pattern None"),
        ([(torch.ones(2), 0.1 * fr.l1)], r"per_leaf has the pattern tensor of \(2,\)"),
        ([(fr.l1, "conv*")], r"per_leaf has the pattern l1; .*Are pattern and penalty swapped\?"),
        ([(fr.adam(0.1), 0.1 * fr.l1)], r"per_leaf has the pattern adam\(0.1\)"),
    ],
)
def test_what_chooses_no_leaves_is_no_pattern(parts, message):
    with pytest.raises(TypeError, match=message):
        fr.per_leaf(parts)


STACKED = {"w": torch.ones(4, 2, 3), "b": torch.ones(4, 2)}
#: Leaves of one network that are no stack, although some of what is seen of stacks is there.
UNSTACKED = {
    "other sizes": {**STACKED, "head": torch.ones(3, 2)},
    "a vector": {**STACKED, "scale": torch.ones(4)},
    "filters and a layer of one width": {"filters": torch.ones(4, 4, 3), "layer": torch.ones(4, 4)},
    "heads": {"query": torch.ones(4, 2, 3), "shift": torch.ones(4, 3)},
}


def test_leaves_that_look_like_stacked_biases_are_warned_of():
    with pytest.warns(UserWarning, match=r"matrices got 'b' of shape \(4, 2\).*stacked members.*stacked\(matrices\)"):
        assert fr.matrices(STACKED) == {"w": True, "b": True}
    for params in UNSTACKED.values():
        fr.matrices(params)  # A warning would be an error.
    assert fr.stacked(fr.matrices)(STACKED) == {"w": True, "b": False}
    assert vmap(lambda params: fr.sparsity(params, mask=fr.matrices))(STACKED).shape == (4,)


def test_a_stack_has_members():
    with pytest.raises(ValueError, match="the leaf 'scale' has no dimensions; expected members along the first"):
        fr.stacked(fr.matrices)({"scale": torch.tensor(1.0), "w": torch.ones(2, 3, 4)})


def test_a_mask_that_asks_for_a_tied_weight_by_its_other_name_is_told_the_first():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(4, 3, device=DEVICE), nn.Linear(3, 4, device=DEVICE)
            self.head.weight = self.embedding.weight

    net = Tied()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for mask in (fr.select("head.weight"), {"head.weight": True}):
        with pytest.raises(ValueError, match=r"by their first name: head\.weight is embedding\.weight"):
            fr.regularize(optimizer, fr.l1, module=net, mask=mask)


@pytest.mark.parametrize("make", [lambda: nn.RNN(3, 8), lambda: nn.MultiheadAttention(4, 2), lambda: nn.Linear(3, 8)])
def test_matrices_refuses_stacks_with_as_many_members_as_units(make):
    """Shapes alone do not tell: convolutions of as many channels have them, too."""
    params = fr.init_ensemble(make, 12 if isinstance(make(), nn.MultiheadAttention) else 8).params
    with pytest.raises(
        ValueError, match=r"stacked members, whose biases look like matrices\? Take stacked\(matrices\)"
    ):
        fr.matrices(params)
    assert not any(on for name, on in fr.stacked(fr.matrices)(params).items() if "bias" in name)
    convolutions = {"a": torch.ones(8, 8, 3), "head": torch.ones(8, 8)}
    assert all(fr.matrices(convolutions).values())
