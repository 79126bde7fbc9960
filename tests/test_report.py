"""Reports say what counting by hand says, and terms of a loss are the penalties themselves."""

from __future__ import annotations

import copy
import math

import matplotlib
import pytest
import torch
from cases import drawn
from torch import nn
from torch.func import grad, vmap
from torch.testing import assert_close

import funcreg as fr
from funcreg import plot

matplotlib.use("agg")


def sparse():
    """A convolution with a dead filter, a matrix with a dead row and two dead columns, a bias, a number."""
    params = {
        "conv.weight": drawn(4, 3, 2, 2),
        "fc.weight": drawn(5, 6, seed=1),
        "fc.bias": drawn(5, seed=2),
        "scale": drawn(seed=3),
    }
    params["conv.weight"][1] = 0
    params["fc.weight"][2], params["fc.weight"][:, [0, 4]] = 0, 0
    params["fc.bias"][3] = 0
    return params


def net():
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))


# report


def test_it_counts():
    params = sparse()
    conv, fc, bias, scale = fr.report(params).rows
    assert [row["name"] for row in (conv, fc, bias, scale)] == list(params)  # As they were written, and not sorted.
    assert (conv["shape"], conv["numel"], conv["zeros"]) == ((4, 3, 2, 2), 48, 12)
    assert (conv["dead_rows"], conv["rows"], conv["dead_columns"], conv["columns"]) == (1, 4, 0, 3)
    assert (fc["dead_rows"], fc["dead_columns"], fc["zeros"]) == (1, 2, 6 + 2 * 4)
    assert (bias["zeros"], bias["dead_rows"], bias["effective_rank"]) == (1, None, None)
    assert (scale["shape"], scale["numel"]) == ((), 1)
    for row, w in zip((conv, fc, bias, scale), params.values(), strict=True):
        assert row["l1"] == pytest.approx(float(w.abs().sum()))
        assert row["l2_norm"] == pytest.approx(float(w.square().sum().sqrt()))


def test_its_total_is_that_of_all_leaves():
    params, total = sparse(), fr.report(sparse()).total
    assert total["numel"] == 48 + 30 + 5 + 1
    assert total["zeros"] / total["numel"] == pytest.approx(float(fr.sparsity(params)))
    assert total["l1"] == pytest.approx(float(fr.l1(params)))
    assert total["l2_norm"] == pytest.approx(float(fr.global_norm(params)))
    assert (total["dead_rows"], total["dead_columns"]) == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (4, 3, 2)])
def test_the_effective_rank_is_that_of_singular_values(shape, dtype):
    w = drawn(*shape).to(dtype)
    values = torch.linalg.svdvals(w.to(torch.complex128).flatten(1))
    shares = values / values.sum()
    expected = math.exp(-sum(p * math.log(p) for p in shares.tolist()))
    assert fr.report(w).rows[0]["effective_rank"] == pytest.approx(expected, rel=1e-6)


def test_the_effective_rank_of_special_matrices():
    ranks = {
        0.0: torch.zeros(3, 4),
        1.0: torch.ones(50, 40),
        7.0: 1e-30 * torch.eye(7),
        6.0: 1e30 * torch.eye(6, 9),
    }
    for rank, w in ranks.items():
        assert fr.report(w).rows[0]["effective_rank"] == pytest.approx(rank, abs=1e-5)
    assert math.isnan(fr.report(torch.tensor([[math.nan, 1.0]])).rows[0]["effective_rank"])
    assert fr.report(torch.ones(2, 2), rank=False).rows[0]["effective_rank"] is None


PENALIZED = {
    "l1": (fr.l1, (), {}),
    "strength": (fr.l1, (), {"strength": 0.1}),
    "strength of each leaf": (
        fr.l1,
        (),
        {"strength": {"conv.weight": 0.5, "fc.weight": 2.0, "fc.bias": 0.0, "scale": 1.0}},
    ),
    "mask": (fr.elastic, (0.1, 0.5), {"mask": fr.matrices}),
    "selection": (fr.l2, (), {"mask": fr.select("fc.*")}),
    "groups": (fr.group_lasso, (), {"dim": 0, "mask": fr.matrices, "weights": "sqrt_size"}),
    "sum": (0.1 * fr.l1 + fr.group_lasso.given(dim=None, mask=fr.select("*.weight")), (), {"strength": 2.0}),
    "coupled": (fr.coupled(fr.group_lasso, {"fc.weight": 0, "fc.bias": 0}), (), {"weights": "sqrt_size"}),
    "coupled in a sum": (fr.l2 + 3.0 * fr.coupled(fr.group_lasso, {"fc.weight": 0, "fc.bias": 0}), (), {}),
}


@pytest.mark.parametrize(("penalty", "hyper", "more"), PENALIZED.values(), ids=PENALIZED)
def test_shares_add_up_to_the_penalty(penalty, hyper, more):
    params, options = sparse(), {key: value for key, value in more.items() if key != "strength"}
    made = fr.report(params, penalty, *hyper, **more)
    whole = penalty.weighted_value(params, more.get("strength", 1.0), *hyper, **options)
    assert made.total["penalty"] == pytest.approx(float(whole))
    assert sum(row["share"] for row in made.rows) == pytest.approx(1.0)
    for row in made.rows:
        assert row["share"] == pytest.approx(row["penalty"] / float(whole))


def test_the_share_of_a_leaf_is_its_own_value():
    rows = fr.report(sparse(), fr.l1, strength=0.5, mask=fr.matrices).rows
    assert [row["penalty"] for row in rows] == pytest.approx([0.5 * rows[0]["l1"], 0.5 * rows[1]["l1"], 0, 0])


def test_leaves_share_a_norm_by_their_squares():
    params = {"a": torch.tensor([[3.0]]), "b": torch.tensor([4.0])}
    rows = fr.report(params, fr.coupled(fr.group_lasso, {"a": 0, "b": 0})).rows
    assert [row["penalty"] for row in rows] == pytest.approx([9 / 5, 16 / 5])


def test_a_penalty_that_is_zero_or_infinite_has_no_shares():
    zero = {"w": torch.zeros(2, 2)}
    assert fr.report(zero, fr.l1).rows[0]["share"] is None
    assert fr.report({"w": -torch.ones(2)}, fr.nonnegative).total["penalty"] == math.inf
    coupled = fr.coupled(fr.group_lasso, {"w": 0})
    assert fr.report(zero, coupled).rows[0] | {"penalty": 0.0, "share": None} == fr.report(zero, coupled).rows[0]


def test_a_module_is_its_parameters():
    module = net()
    made = fr.report(module, fr.l1)
    assert [row["name"] for row in made.rows] == ["0.weight", "0.bias", "2.weight"]
    assert made == fr.report(dict(module.named_parameters()), fr.l1)


def test_it_prints_a_table_with_a_line_for_each_leaf():
    lines = str(fr.report(sparse(), fr.l1, mask=fr.matrices)).splitlines()
    assert len(lines) == 1 + 4 + 1
    assert lines[2].split()[:6] == ["fc.weight", "5", "x", "6", "30", "46.7"]
    assert len({len(line) for line in lines}) == 1  # The last numbers end at one place.
    assert "dead rows" in lines[0]
    assert "dead rows" not in str(fr.report({"bias": torch.ones(3)}))  # Columns without entries are left out.
    assert repr(fr.report(sparse())) == str(fr.report(sparse()))


@pytest.mark.parametrize(
    "tree", [torch.ones(2, 2), [torch.ones(2), {"a": torch.zeros(1)}], {"a": {"b": torch.ones(1)}}]
)
def test_any_tree_has_rows(tree):
    assert [row["name"] for row in fr.report(tree).rows] == fr.tree_paths(tree)


@pytest.mark.parametrize("call", [fr.report, lambda module: fr.compare(module, module)], ids=["report", "compare"])
def test_what_has_no_numbers_yet_is_named(call):
    with pytest.raises(ValueError, match="'bias' has no shape yet; call its module once"):
        call(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="'bias' is on the device meta, where tensors have no numbers"):
        call(nn.Linear(2, 3, device="meta"))


def test_what_cannot_be_reported_says_why():
    stacked = fr.tree_map(lambda w: torch.stack([w, w]), sparse())
    with pytest.raises(TypeError, match="parameters of one member"):
        vmap(fr.report)(stacked)
    with pytest.raises(TypeError, match="no penalty that takes them"):
        fr.report(sparse(), strength=0.1)
    with pytest.raises(TypeError, match="alpha is missing"):
        fr.report(sparse(), fr.elastic)
    with pytest.raises(TypeError, match="expected a Penalty"):
        fr.report(sparse(), "l1")
    with pytest.raises(ValueError, match="no parameters"):
        fr.report(nn.ReLU())
    with pytest.raises(TypeError, match="num_batches_tracked"):
        fr.report(nn.BatchNorm1d(3).state_dict())


# compare


def test_it_compares():
    before = sparse()
    after = {name: w.clone() for name, w in before.items()}
    after["fc.weight"][0] = 0
    made = fr.compare(before, after)
    row = made.rows[1]
    assert (row["zeros_before"], row["zeros_after"]) == (14, 14 + 4)
    assert (row["dead_rows_before"], row["dead_rows_after"]) == (1, 2)
    moved = float(before["fc.weight"][0].square().sum().sqrt())
    assert row["change"] == pytest.approx(moved / row["l2_norm_before"])
    assert made.total["change"] == pytest.approx(moved / made.total["l2_norm_before"])
    assert [row["change"] for row in made.rows if row["name"] != "fc.weight"] == [0.0] * 3
    line = str(made).splitlines()[2]
    assert "46.7 % -> 60.0 %" in line
    assert "1 of 5 -> 2 of 5" in line


def test_leaves_may_have_lost_rows():
    groups = {"0.weight": 0, "0.bias": 0, "2.weight": fr.Along(1, penalized=False)}
    before = {name: w.detach().clone() for name, w in net().named_parameters()}
    before["0.weight"][1], before["0.bias"][1] = 0, 0
    made = fr.compare(before, fr.remove_dead(before, groups))
    assert made.rows[0]["shape_before"] == (4, 6)
    assert made.rows[0]["shape_after"] == (3, 6)
    assert made.rows[0]["change"] is None
    assert made.total["change"] is None
    assert "4 x 6 -> 3 x 6" in str(made)


def test_modules_compare_and_nothing_changes_nothing():
    module = net()
    made = fr.compare(copy.deepcopy(module), dict(module.named_parameters()))
    assert all(row["change"] == 0 for row in [*made.rows, made.total])
    assert "->" not in str(made)


@pytest.mark.parametrize("compared", [fr.compare, plot.histograms], ids=["compare", "histograms"])
@pytest.mark.parametrize("kept", [nn.Module.state_dict, lambda module: dict(module.named_parameters())])
def test_weights_that_an_optimizer_wrote_into_are_no_weights_of_before(compared, kept):
    module = net()
    before = {name: w.detach() for name, w in kept(module).items()}
    torch.optim.SGD(module.parameters(), lr=0.1).step(lambda: module(torch.ones(1, 6)).sum().backward())
    with pytest.warns(UserWarning, match="before and after that lie in the same memory") as caught:
        compared(before, module)
    assert [each.filename for each in caught] == [__file__]
    before["0.weight"] = before["0.weight"].clone()
    compared(before, module)  # What is frozen may lie where it lay.


@pytest.mark.parametrize("turned", [False, True])
def test_leaves_of_one_alone_are_named(turned):
    trees = [{"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1)}]
    with pytest.raises(ValueError, match="leaf 'b' of"):
        fr.compare(*(reversed(trees) if turned else trees))


# penalties

PARTS = {"l1": 0.1 * fr.l1, "rows": fr.group_lasso.given(mask=fr.matrices), "elastic": fr.elastic.given(0.1, 0.5)}


def test_terms_are_the_penalties():
    params = sparse()
    found = fr.penalties(params, PARTS)
    assert list(found) == list(PARTS)
    for name, value in found.items():
        assert_close(value, PARTS[name](params))
    masked = fr.penalties(params, {"l1": fr.l1}, mask=fr.matrices)
    assert_close(masked["l1"], fr.l1(params, mask=fr.matrices))


def test_terms_have_derivatives_and_map_and_compile():
    params = sparse()

    def loss(params):
        parts = fr.penalties(params, PARTS)
        return sum(parts.values()), parts

    slopes, parts = grad(loss, has_aux=True)(params)
    expected = fr.tree_map(torch.zeros_like, params)
    for penalty in PARTS.values():
        expected = fr.tree_map(torch.add, expected, penalty.grad(params))
    assert_close(slopes, expected)
    compiled = torch.compile(lambda params: fr.penalties(params, PARTS), backend="eager", fullgraph=True)
    assert_close(compiled(params), parts)
    stacked = fr.tree_map(lambda w: torch.stack([w, 2 * w]), params)
    mapped = vmap(lambda params: fr.penalties(params, PARTS))(stacked)
    assert_close(mapped["l1"], torch.stack([parts["l1"], 2 * parts["l1"]]))


def test_terms_of_a_module_reach_its_gradients():
    module = net()
    sum(fr.penalties(module, {"l1": fr.l1}).values()).backward()
    assert_close(module[0].weight.grad, module[0].weight.detach().sign())


def test_wrong_terms_are_named():
    with pytest.raises(ValueError, match="components is empty"):
        fr.penalties(sparse(), {})
    with pytest.raises(TypeError, match="dict from names to penalties"):
        fr.penalties(sparse(), [fr.l1])
    with pytest.raises(TypeError, match=r"component 'x' is 0\.1"):
        fr.penalties(sparse(), {"x": 0.1})
    with pytest.raises(TypeError, match="component 'x': elastic takes alpha"):
        fr.penalties(sparse(), {"x": fr.elastic})


def test_a_report_is_rows_and_a_total():
    made = fr.report(sparse())
    assert isinstance(made, fr.Report)
    assert all(type(value) in (str, int, float, tuple, type(None)) for row in made.rows for value in row.values())
