"""Paths and choices of a strength are those of scikit-learn, and certified for any loss."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from cases import DEVICE, normal
from sklearn.covariance import graphical_lasso
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.linear_model import ElasticNetCV, LassoCV, enet_path, lasso_path
from sklearn.model_selection import KFold
from test_minimize import EVERY_ZERO, logistic, plain, sparse, squares, standard, zeros
from torch import Tensor
from torch.func import grad, jacfwd, jvp, vmap
from torch.nn.functional import cross_entropy, huber_loss, mse_loss, softplus

import funcreg as fr
from funcreg.solvers.strengths import is_quadratic

WEIGHTS = {"mask": fr.select("w")}


def bare(params, x, y):
    return (x @ params["w"] - y).square().mean() / 2


def begin(columns):
    return {"w": zeros(columns), "b": zeros()}


@pytest.mark.parametrize(("penalty", "hyper", "share"), [(fr.l1, (), 1.0), (fr.elastic, (1.0, 0.5), 0.5)])
def test_paths_of_scikit_learn(penalty, hyper, share):
    x, y = standard(load_diabetes)
    path = fr.regularization_path(squares, begin(10), penalty, *hyper, args=(x, y), count=40, **WEIGHTS)
    most = (x.T @ (y - y.mean())).abs().max() / (len(x) * share)
    expected = most * 1e-3 ** (torch.arange(40, dtype=torch.float64, device=DEVICE) / 39)
    data, options = (x.cpu().numpy(), (y - y.mean()).cpu().numpy()), {"tol": 1e-13, "max_iter": 100_000}
    options["alphas"] = expected.cpu().numpy()
    solve = lasso_path if share == 1.0 else lambda *args, **options: enet_path(*args, l1_ratio=share, **options)
    weights = solve(*data, **options)[1]
    assert path.converged.all()
    torch.testing.assert_close(path.strengths, expected, rtol=1e-12, atol=0)
    np.testing.assert_allclose(path.params["w"].cpu(), weights.T, atol=1e-6)
    assert not path.params["w"][0].any()  # At the first strength some versions of scikit-learn leave 1e-16.
    np.testing.assert_array_equal(path.params["w"].cpu()[1:] == 0, weights.T[1:] == 0)
    assert (path.sparsity.diff() <= 0.1001).all()
    assert path.sparsity[0] == 1
    torch.testing.assert_close(path.losses, vmap(lambda p: squares(p, x, y))(path.params))


def test_of_many_entries_none_is_lost():
    generator = torch.Generator().manual_seed(0)
    x = normal(generator, 60, 300)
    y = x[:, :8].sum(1) + normal(generator, 60)
    path = fr.regularization_path(squares, {"w": zeros(300)}, fr.l1, args=(x, y), count=20, ratio=0.05)
    assert path.converged.all()
    assert (path.residuals <= 1e-8).all()
    for strength, w in zip(path.strengths, path.params["w"], strict=True):
        g = grad(squares)({"w": w}, x, y)
        assert fr.kkt_residual({"w": w}, g, fr.l1, strength=strength) <= 1e-8
    _, weights, _ = lasso_path(
        x.cpu().numpy(), y.cpu().numpy(), alphas=path.strengths.cpu().numpy(), tol=1e-13, max_iter=100_000
    )
    np.testing.assert_allclose(path.params["w"].cpu(), weights.T, atol=1e-6)


@pytest.mark.slow
def test_losses_and_penalties_that_nobody_else_has():
    x, y = standard(load_breast_cancer)
    path = fr.regularization_path(logistic, begin(30), fr.mcp, 1.0, 3.0, args=(x, y), count=6, ratio=0.1, **WEIGHTS)
    assert path.converged.sum() >= 5  # Where a penalty is not convex, a descent may end elsewhere, and says so.
    assert torch.equal(path.converged, path.residuals <= 1e-8)
    groups = fr.sparse_group_lasso.given(1.0, 0.5, dim=None)
    path = fr.regularization_path(logistic, begin(30), groups, args=(x, y), count=6, ratio=0.05, **WEIGHTS)
    assert path.converged.all()
    assert path.sparsity[0] == 1


def test_strengths_that_are_given_come_back_in_their_order():
    x, y = standard(load_diabetes)
    given = torch.tensor([1.0, 20.0, 5.0], dtype=torch.float64, device=DEVICE)
    path = fr.regularization_path(squares, begin(10), fr.l1, strengths=given, args=(x, y), **WEIGHTS)
    assert torch.equal(path.strengths, given)
    for strength, w in zip(given, path.params["w"], strict=True):
        alone = fr.minimize(squares, begin(10), fr.l1, strength=strength, args=(x, y), **WEIGHTS)
        torch.testing.assert_close(w, alone.params["w"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_choice_of_scikit_learn(share):
    x, y = standard(load_diabetes)  # 442 samples: folds of two sizes.
    strengths = torch.logspace(1.6, -1, 12, dtype=torch.float64, device=DEVICE)
    found = fr.cross_validate(squares, begin(10), fr.elastic, 1.0, share, data=(x, y), strengths=strengths, **WEIGHTS)
    model = LassoCV if share == 1.0 else lambda **options: ElasticNetCV(l1_ratio=share, **options)
    expected = model(alphas=strengths.cpu().numpy(), cv=5, tol=1e-13, max_iter=100_000).fit(
        x.cpu().numpy(), y.cpu().numpy()
    )
    np.testing.assert_allclose(found.scores.T.cpu(), expected.mse_path_ / 2, rtol=1e-8)
    assert float(found.best) == pytest.approx(expected.alpha_)
    np.testing.assert_allclose(found.params["w"].cpu(), expected.coef_, atol=1e-7)
    assert found.one_standard_error >= found.best
    places = [torch.arange(i, len(y), 3) for i in range(3)]
    own = lambda folds: fr.cross_validate(
        squares, begin(10), fr.l1, data=(x, y), strengths=strengths[:3], folds=folds, **WEIGHTS
    )
    masks = [torch.zeros(len(y), dtype=torch.bool).index_fill(0, held, True) for held in places]
    pairs = [((~mask).nonzero()[:, 0], held) for mask, held in zip(masks, places, strict=True)]
    by_places, by_masks, by_pairs = map(own, (places, masks, pairs))
    assert by_places.converged.all()
    assert torch.equal(by_places.scores, by_masks.scores)
    assert torch.equal(by_places.scores, by_pairs.scores)


@pytest.mark.slow
def test_a_choice_says_what_it_is_worth():
    x, y = standard(load_diabetes)
    choose = lambda x, **options: fr.cross_validate(
        squares, {"w": zeros(10)}, fr.l1, data=(x, y), strengths=[1.0, 0.1], **options
    )
    with pytest.warns(UserWarning, match="fits have not converged"):
        assert not choose(x, max_steps=1).converged.all()
    with pytest.warns(UserWarning, match="NaN or inf in args"), pytest.raises(ValueError, match=r"is nan"):
        choose(torch.where(x > 3, torch.nan, x))


@pytest.mark.parametrize(("change", "said"), [
    ({"penalty": fr.half_l2}, "no greatest strength"),
    ({"count": 0}, "count"),
    ({"ratio": 1.0}, "ratio"),
    ({"strengths": [-1.0]}, "strengths"),
    ({"strengths": []}, "expected a list of numbers"),
])  # fmt: skip
def test_bad_paths_are_named(change, said):
    given = {"penalty": fr.l1} | change
    with pytest.raises(ValueError, match=said):
        fr.regularization_path(lambda w: (w - 1).square().sum(), zeros(2), given.pop("penalty"), **given)


@pytest.mark.parametrize(("folds", "said"), [
    (1, "folds is 1"), (11, "from 2 to the number of samples, 10"), ([[0], [12]], "fold 1 is"),
    ([list(range(10)), [0]], "all samples"), ([], "folds are 0"), ([[0.0, 1.5], [2]], "fold 0 is"),
    ([([0, 1], [1, 2]), ([0], [1])], "some that it fits"),
])  # fmt: skip
def test_bad_folds_are_named(folds, said):
    x = torch.ones(10, 2, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=said):
        fr.cross_validate(squares, {"w": zeros(2)}, fr.l1, data=(x, x[:, 0]), folds=folds)


def test_results_are_public():
    path = fr.regularization_path(lambda w: (w - 1).square().sum() / 2, zeros(2), fr.l1, count=2, ratio=0.5)
    assert isinstance(path, fr.Path)
    x = torch.eye(4, dtype=torch.float64, device=DEVICE)
    found = fr.cross_validate(squares, {"w": zeros(4)}, fr.l1, data=(x, x[:, 0]), folds=2, count=2)
    assert isinstance(found, fr.CrossValidation)


def test_common_losses_of_torch_have_paths_and_choices():
    x, y = standard(load_diabetes)
    loss = lambda params, x, y: mse_loss(x @ params["w"] + params["b"], y) / 2
    options = {"strengths": [20.0, 2.0, 0.2], **WEIGHTS}
    path = fr.regularization_path(loss, begin(10), fr.l1, args=(x, y), **options)
    expected = fr.regularization_path(squares, begin(10), fr.l1, args=(x, y), **options)
    torch.testing.assert_close(path.params, expected.params, rtol=0, atol=1e-6)
    scores = [fr.cross_validate(f, begin(10), fr.l1, data=(x, y), **options).scores for f in (loss, squares)]
    torch.testing.assert_close(*scores, rtol=1e-8, atol=0)


@pytest.mark.parametrize("count", [3, 12])
def test_a_path_is_a_loop_of_minima_that_begin_at_the_one_before(count):
    x, y = standard(load_breast_cancer)
    loss = lambda params, x, y: softplus((1 - 2 * y) * (x @ params["w"])).mean()
    path = fr.regularization_path(loss, {"w": zeros(30)}, fr.l1, args=(x, y), count=count, ratio=0.05)
    at = {"w": zeros(30)}
    for strength, w in zip(path.strengths, path.params["w"], strict=True):
        at = fr.minimize(loss, at, fr.l1, strength=strength, args=(x, y)).params
        torch.testing.assert_close(w, at["w"], rtol=0, atol=1e-5)


def test_constant_targets_have_no_path():
    x = torch.eye(4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="zero is the solution for every strength"):
        fr.regularization_path(squares, {"w": zeros(4)}, fr.l1, args=(x, zeros(4)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_targets_that_are_told_without_a_penalty_have_no_path(dtype):
    x, start = standard(load_breast_cancer)[0][:50, :5].to(dtype), fr.tree_cast(begin(5), dtype)
    beside = lambda p, x, z, y: (x @ p["w"] + z @ p["free"] + p["b"] - y).square().mean() / 2
    z = x[:, :2] * 0.3 + 1 / 3
    for loss, point, args in [
        (logistic, start, (x, torch.ones_like(x[:, 0]))),
        (beside, {**start, "free": torch.zeros_like(x[0, :2])}, (x, z, z @ z.new_tensor([0.7, -2.0]) + 0.1)),
    ]:
        with pytest.raises(ValueError, match=r"is 0 up to rounding, .* Does what carries no penalty tell them"):
            fr.regularization_path(loss, point, fr.l1, args=args, **WEIGHTS)


def test_targets_of_one_class_have_a_path_whose_loss_is_nearly_zero():
    x, y = standard(load_breast_cancer)
    args, strengths = (x[:50, :5], torch.ones_like(y[:50])), [0.1, 0.01, 0.001]
    path = fr.regularization_path(logistic, begin(5), fr.l1, args=args, strengths=strengths, **WEIGHTS)
    assert (path.params["b"] > 10).all()


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_paths_of_targets_in_any_unit_are_those_in_units(unit):
    x, y = standard(load_diabetes)
    x, y = x[:30, :3], y[:30] / y[:30].std()
    path = lambda unit, **how: fr.regularization_path(squares, begin(3), fr.l1, args=(x, unit * y), **how, **WEIGHTS)
    one = path(1.0, count=3)
    for found in (path(unit, count=3), path(unit, strengths=unit * one.strengths)):
        assert found.converged.all()
        assert (found.residuals <= 1e-8 * found.strengths[0]).all()
        torch.testing.assert_close(found.strengths / unit, one.strengths, rtol=1e-8, atol=0)
        torch.testing.assert_close(found.params["w"] / unit, one.params["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("unit", [1e-9, 1e-6, 1e-3, 1e3, 1e6, 1e9])
def test_choices_of_targets_in_any_unit_are_those_in_units(unit):
    x, y = standard(load_diabetes)
    x, y = x[:60, :6], y[:60] / y[:60].std()
    choose = lambda unit: fr.cross_validate(squares, begin(6), fr.l1, data=(x, unit * y), count=6, **WEIGHTS)
    found, one = choose(unit), choose(1.0)
    assert found.converged.all()
    torch.testing.assert_close(found.best / unit, one.best, rtol=1e-8, atol=0)
    torch.testing.assert_close(found.params["w"] / unit, one.params["w"], rtol=1e-5, atol=1e-6)


def test_folds_are_numbers_of_any_kind_or_masks():
    x, y = standard(load_diabetes)
    choose = lambda folds: fr.cross_validate(
        squares, begin(10), fr.l1, data=(x, y), strengths=[5.0, 1.0], folds=folds, **WEIGHTS
    )
    expected = choose(3).scores
    assert torch.equal(choose(np.int64(3)).scores, expected)
    masks = torch.zeros(3, len(y), dtype=torch.bool)
    for mask, held in zip(masks, torch.arange(len(y)).tensor_split(3), strict=True):
        mask[held] = True
    assert torch.equal(choose(masks).scores, expected)
    for folds in (None, 2.5, "ab"):
        with pytest.raises(TypeError, match="folds is"):
            choose(folds)
    with pytest.raises(TypeError, match=r"it is folds\.split\(x, y\)"):
        choose(KFold(3))


# What users meet


def test_paths_and_choices_have_derivatives():
    x, y = standard(load_diabetes)
    y, generator = y / 50, torch.Generator().manual_seed(0)
    way = normal(generator, len(y))
    losses = {
        "path": lambda y: fr.regularization_path(
            squares, {"w": zeros(10)}, fr.l1, strengths=[0.5, 0.1], args=(x, y)
        ).params["w"],
        "choice": lambda y: (
            fr.cross_validate(squares, {"w": zeros(10)}, fr.l1, strengths=[0.5, 0.1], data=(x, y)).scores
        ),
    }
    for f in losses.values():
        size = lambda y, f=f: f(y).square().sum()
        numeric = (size(y + 1e-4 * way) - size(y - 1e-4 * way)) / 2e-4
        torch.testing.assert_close((grad(size)(y) * way).sum(), numeric, rtol=1e-5, atol=0)
    strengths = torch.tensor([0.5, 0.1], dtype=torch.float64, device=DEVICE)
    size = lambda strengths: (
        fr.regularization_path(squares, {"w": zeros(10)}, fr.l1, strengths=strengths, args=(x, y))
        .params["w"]
        .square()
        .sum()
    )
    way = torch.tensor([1.0, -2.0], dtype=torch.float64, device=DEVICE)
    numeric = (size(strengths + 1e-4 * way) - size(strengths - 1e-4 * way)) / 2e-4
    torch.testing.assert_close((grad(size)(strengths) * way).sum(), numeric, rtol=1e-5, atol=0)


def test_derivatives_in_data_reach_folds_and_the_strengths_of_a_path():
    x, y = standard(load_diabetes)
    x, y = x[:60, :4], y[:60] / 50
    size = lambda p: p.square().sum()
    of = {
        "choice": lambda c: fr.cross_validate(
            bare, {"w": zeros(4)}, fr.l1, data=(c * x, y), folds=2, strengths=[0.5, 0.1]
        ).scores.sum(),
        "path": lambda c: size(
            fr.regularization_path(bare, {"w": zeros(4)}, fr.l1, args=(c * x, y), count=3, ratio=0.1).params["w"]
        ),
        "elastic": lambda c: size(
            fr.regularization_path(bare, {"w": zeros(4)}, fr.elastic, c, 0.5, args=(x, c * y), count=3).params["w"]
        ),
    }
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    for name, f in of.items():
        expected = (f(one + 1e-5) - f(one - 1e-5)) / 2e-5
        torch.testing.assert_close(
            grad(f)(one), expected, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("strengths", [{"strengths": [0.5, 0.1]}, {"count": np.int64(3), "ratio": 0.2}], ids=str)
def test_derivatives_reach_what_models_leave_out(strengths):
    generator = torch.Generator().manual_seed(0)
    x, y = normal(generator, 30, 70), normal(generator, 30)
    f = lambda c: (
        fr.regularization_path(bare, {"w": zeros(70)}, fr.l1, args=(x, c * y), tol=1e-12, **strengths)
        .params["w"]
        .square()
        .sum()
    )
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    expected = (f(one + 1e-5) - f(one - 1e-5)) / 2e-5
    for found in (grad(f)(one), jvp(f, (one,), (one,))[1]):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_path_that_is_not_convex_has_derivatives_where_strengths_are_given_or_says_so():
    x, y = standard(load_diabetes)
    begun = lambda c, **strengths: (
        fr.regularization_path(bare, begin(4), fr.l0, args=(x[:60, :4], c * y[:60] / 50), count=2, **strengths)
        .params["w"]
        .sum()
    )
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    for derivative in (grad, jacfwd):
        with pytest.raises(NotImplementedError, match="give strengths="):
            derivative(begun)(one)
    assert grad(lambda c: begun(c, strengths=[1e-4]))(one) != 0


@pytest.mark.filterwarnings("error")
def test_a_path_of_its_own_strengths_has_derivatives_without_a_warning():
    x, y = standard(load_diabetes)
    leaf = y.clone().requires_grad_()
    fr.regularization_path(squares, {"w": zeros(10)}, fr.l1, count=3, args=(x, leaf)).params["w"].sum().backward()
    assert leaf.grad.isfinite().all()


def test_inside_of_maps_paths_and_choices_say_what_to_map():
    x, y = standard(load_diabetes)
    targets = torch.stack([y, y.flip(0)])
    path = lambda y, **options: fr.regularization_path(squares, {"w": zeros(10)}, fr.l1, args=(x, y), **options).params
    choice = lambda y: fr.cross_validate(squares, {"w": zeros(10)}, fr.l1, data=(x, y)).mean
    held = lambda y: fr.regularization_path(lambda w: squares({"w": w}, x, y), zeros(10), fr.l1).params
    for f in (path, lambda y: path(y, strengths=[1.0]), choice, held):
        with pytest.raises(TypeError, match="Map minimize over strengths or data"):
            vmap(f)(targets)


@pytest.mark.parametrize("call", [fr.regularization_path, fr.cross_validate])
@pytest.mark.parametrize(("change", "error", "said"), [
    ({"penalty": fr.nonnegative}, ValueError, "is the same for all strengths"),
    ({"mask": False}, ValueError, "acts on no leaf"),
    ({"strengths": "auto"}, TypeError, "strengths is 'auto'"),
    ({"strengths": [None]}, TypeError, "expected a list of numbers"),
    ({"strength": 0.5}, TypeError, "strengths= gives those"),
    ({"alphas": [0.5]}, TypeError, "strengths= gives them"),
    ({"cv": 5}, TypeError, "folds= gives"),
])  # fmt: skip
def test_what_no_path_has_is_said(call, change, error, said):
    given = {"penalty": fr.l1} | change
    x = torch.eye(10, dtype=torch.float64, device=DEVICE)
    data = {"args" if call is fr.regularization_path else "data": (x, x[0])}
    with pytest.raises(error, match=said):
        call(squares, {"w": zeros(10)}, given.pop("penalty"), **data, **given)


@pytest.mark.parametrize(
    "strengths",
    [(20.0, 2.0, 0.2), np.array([20.0, 2.0, 0.2]), iter([20.0, 2.0, 0.2])],
    ids=["tuple", "array", "iterator"],
)
def test_strengths_are_lists_of_any_kind(strengths):
    x, y = standard(load_diabetes)
    path = fr.regularization_path(squares, begin(10), fr.l1, strengths=strengths, args=(x, y), **WEIGHTS)
    assert path.strengths.tolist() == [20.0, 2.0, 0.2]
    assert path.converged.all()


@pytest.mark.parametrize("call", ["path", "choice"])
def test_what_has_the_weight_0_is_fitted_as_what_the_mask_leaves_out(call):
    x, y = standard(load_diabetes)
    weighted = {"w": 1.0, "b": 0.0} * fr.l1
    if call == "path":
        solve = lambda penalty, **mask: fr.regularization_path(
            squares, begin(10), penalty, args=(x, y), count=5, ratio=0.1, **mask
        )
    else:
        solve = lambda penalty, **mask: fr.cross_validate(
            squares, begin(10), penalty, data=(x, y), folds=3, count=5, ratio=0.1, **mask
        )
    found, expected = solve(weighted), solve(fr.l1, **WEIGHTS)
    torch.testing.assert_close(found.strengths, expected.strengths, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.params, expected.params, rtol=1e-7, atol=1e-7)


def test_single_entries_and_groups_may_have_the_weight_0():
    x, y = standard(load_diabetes)
    weights = torch.ones(10, dtype=torch.float64, device=DEVICE)
    weights[[2, 7]] = 0
    path = fr.regularization_path(squares, begin(10), {"w": weights, "b": 0.0} * fr.l1, args=(x, y), count=4)
    assert path.converged.all()
    assert (path.params["w"][0] != 0).nonzero()[:, 0].tolist() == [2, 7]
    groups = {"w": 1.0, "b": 0.0} * fr.group_lasso.given(dim=None)
    masked = fr.regularization_path(squares, begin(10), fr.group_lasso, args=(x, y), count=3, dim=None, **WEIGHTS)
    path = fr.regularization_path(squares, begin(10), groups, args=(x, y), count=3)
    torch.testing.assert_close(path.strengths, masked.strengths, rtol=1e-12, atol=0)


def test_a_penalty_of_one_side_that_holds_all_at_zero_says_so():
    x = torch.ones(4, 2, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"points nowhere that nonnegative_form\(l1\) lets parameters go.*one-sided"):
        fr.regularization_path(bare, {"w": zeros(2)}, fr.nonnegative_form(fr.l1), args=(x, -x[:, 0]))


@pytest.mark.filterwarnings("ignore:Sparse CSR")  # Torch's own, that it may change.
def test_designs_of_sparse_rows_are_those_of_dense_ones():
    x, y = standard(load_diabetes)
    x = torch.where(x.abs() < 1, 0, x)
    dense = fr.minimize(bare, {"w": zeros(10)}, fr.l1, args=(x, y), strength=1.0)
    for design in (
        x.to_sparse_csr(),
        scipy.sparse.csr_array(x.cpu().numpy()),
        scipy.sparse.coo_matrix(x.cpu().numpy()),
    ):
        found = fr.minimize(bare, {"w": zeros(10)}, fr.l1, args=(design, y), strength=1.0)
        torch.testing.assert_close(found.params, dense.params, rtol=1e-8, atol=1e-8)
    total = lambda s, x: fr.minimize(bare, {"w": zeros(10)}, fr.l1, args=(x, y), strength=s).params["w"].sum()
    at = torch.tensor(1.0, dtype=torch.float64, device=DEVICE)
    is_old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)  # Torch has no forward derivatives of them.
    for coordinates in (x.to_sparse(), design):
        for derivative in (grad,) if is_old else (grad, jacfwd):
            expected = derivative(lambda s: total(s, x))(at)
            torch.testing.assert_close(
                derivative(lambda s, x=coordinates: total(s, x))(at), expected, rtol=1e-7, atol=0
            )
    rows = x.to_sparse_csr()
    with pytest.raises(TypeError, match=r"sparse rows \(CSR\), which torch.func cannot read; give x.to_sparse"):
        grad(lambda s: total(s, rows))(at)
    path = fr.regularization_path(bare, {"w": zeros(10)}, fr.l1, strengths=[2.0, 1.0], args=(design, y))
    torch.testing.assert_close(path.params["w"][1], dense.params["w"], rtol=1e-8, atol=1e-8)
    with pytest.raises(TypeError, match=r"data is sparse at '0', of which torch takes no rows.*to_dense"):
        fr.cross_validate(bare, {"w": zeros(10)}, fr.l1, data=(design, y))


def test_other_losses_of_sparse_designs_have_paths_or_say_how():
    generator = torch.Generator().manual_seed(0)
    x = normal(generator, 30, 4).relu()
    y = torch.arange(30, device=DEVICE) % 3
    by_column = lambda w, x: cross_entropy(torch.stack([x @ column for column in w.unbind(1)], 1), y)
    dense, found = (
        fr.regularization_path(by_column, zeros(4, 3), fr.group_lasso, count=3, ratio=0.1, args=(design,))
        for design in (x, x.to_sparse())
    )
    torch.testing.assert_close(found.params, dense.params, rtol=1e-7, atol=1e-7)
    for call in (fr.minimize, fr.regularization_path):
        with pytest.raises(TypeError, match=r"sparse matrix by a matrix.*expected products with vectors"):
            call(lambda w, x: cross_entropy(x @ w, y), zeros(4, 3), fr.group_lasso, args=(x.to_sparse(),))
    with pytest.warns(UserWarning, match="There is NaN or inf in args at '0'"):
        fr.minimize(by_column, zeros(4, 3), fr.group_lasso, args=((x / 0).to_sparse(),))


@pytest.mark.parametrize("name", EVERY_ZERO)
def test_where_every_zero_is_stationary_paths_leave_it(name):
    x, y = sparse()
    penalty, loss, shape = EVERY_ZERO[name]
    path = fr.regularization_path(loss, zeros(*shape), penalty, args=(x, y), count=8, ratio=0.02)
    assert path.converged.all()
    assert path.sparsity[0] == 1
    assert path.sparsity[1:].max() < 1
    assert (path.losses.diff() <= 1e-9).all()


@pytest.mark.parametrize("penalty", [fr.l0, fr.l_half], ids=["l0", "l_half"])
def test_paths_and_choices_where_every_zero_is_stationary_find_the_support(penalty):
    x, y = sparse(rows=120, columns=80)
    wanted = torch.arange(80, device=DEVICE) < 3
    path = fr.regularization_path(plain, zeros(80), penalty, args=(x, y), count=12, ratio=0.02)
    assert ((path.params != 0) == wanted).all(1).any()
    chosen = fr.cross_validate(plain, zeros(80), penalty, data=(x, y), count=8, ratio=0.02)
    assert (chosen.params != 0)[:3].all()
    assert chosen.converged.all()
    # However columns are scaled, and beside an intercept.
    scaled = lambda p: ((x * 10.0) @ p["w"] + p["b"] - y - 5).square().mean() / 2
    path = fr.regularization_path(scaled, {"w": zeros(80), "b": zeros()}, penalty, count=5, ratio=0.02, **WEIGHTS)
    assert path.sparsity[0] == 1
    assert path.sparsity[2] < 1
    assert path.converged.all()


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [fr.l1, fr.elastic.given(1.0, 0.7)])
def test_choices_among_many_entries_are_those_of_each_fold_alone(penalty):
    generator = torch.Generator().manual_seed(3)
    x, y = normal(generator, 31, 70), normal(generator, 31)
    params = {"w": zeros(70), "b": zeros()}
    strengths, folds = [0.3, 0.15, 0.1], torch.arange(31).tensor_split(2)

    def alone(y):
        scores = []
        for held in folds:
            fit = torch.ones(31, dtype=torch.bool).index_fill(0, held, False)
            solve = lambda c, fit=fit: fr.minimize(
                squares, params, penalty, strength=c, args=(x[fit], y[fit]), **WEIGHTS
            )
            scores.append(torch.stack([squares(solve(c).params, x[held], y[held]) for c in strengths]))
        return torch.stack(scores)

    choose = lambda y: fr.cross_validate(squares, params, penalty, data=(x, y), strengths=strengths, folds=2, **WEIGHTS)
    found = choose(y)
    assert found.converged.all()
    torch.testing.assert_close(found.scores, alone(y), rtol=0, atol=1e-6)
    whole = fr.minimize(squares, params, penalty, strength=found.best, args=(x, y), **WEIGHTS)
    torch.testing.assert_close(found.params, whole.params, rtol=0, atol=1e-6)
    moved = jvp(lambda y: choose(y).scores, (y,), (x[:, 0],))[1]
    numeric = (choose(y + 1e-5 * x[:, 0]).scores - choose(y - 1e-5 * x[:, 0]).scores) / 2e-5
    torch.testing.assert_close(moved, numeric, rtol=1e-4, atol=1e-6)


def test_losses_that_are_quadratic_in_places_have_paths():
    generator = torch.Generator().manual_seed(5)
    x, y = normal(generator, 40, 90), normal(generator, 40)
    y = y.index_fill(0, torch.tensor([3, 20], device=DEVICE), 30.0)
    loss = lambda params, x, y: huber_loss(x @ params["w"], y, delta=2.0)
    path = fr.regularization_path(loss, {"w": zeros(90)}, fr.l1, args=(x, y), count=4, ratio=0.3)
    assert path.converged.all()
    assert path.steps.sum() < 100
    for strength, w in zip(path.strengths, path.params["w"], strict=True):
        slopes = grad(loss)({"w": w}, x, y)
        assert fr.kkt_residual({"w": w}, slopes, fr.l1, strength=strength) <= 1e-8


def test_losses_that_are_linear_along_some_direction_are_not_taken_for_quadratic():
    x, y = standard(load_wine)
    loss = lambda w, x, y: cross_entropy(x @ w, y)  # The same if all classes get as much.
    assert not is_quadratic(lambda w: loss(w, x, y), zeros(13, 3))
    assert is_quadratic(lambda w: (x @ w - y[:, None]).square().mean(), zeros(13, 3))


def test_choices_among_thousands_of_entries_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(4)
    x, y = normal(generator, 24, 1030), normal(generator, 24)
    found = fr.cross_validate(bare, {"w": zeros(1030)}, fr.l1, data=(x, y), folds=2, count=4, ratio=0.5)
    model = LassoCV(alphas=found.strengths.cpu().numpy(), cv=2, fit_intercept=False, tol=1e-10, max_iter=100_000)
    scores = model.fit(x.cpu().numpy(), y.cpu().numpy()).mse_path_.T
    torch.testing.assert_close(2 * found.scores.cpu(), torch.as_tensor(scores), rtol=0, atol=1e-7)
    assert float(found.best) == pytest.approx(model.alpha_)


# Losses without a value at zeros


def gaussian(params, covariance):
    p = (params["p"] + params["p"].mT) / 2  # A Cholesky factor reads one triangle alone.
    return (covariance * p).sum() - 2 * torch.linalg.cholesky(p).diagonal().log().sum()


def covariances() -> tuple[dict[str, Tensor], Tensor]:
    """A precision matrix to begin with, and a covariance: the graphical lasso."""
    x, _ = standard(load_diabetes)
    return {"p": torch.eye(5, dtype=torch.float64, device=DEVICE)}, (x[:, :5].T @ x[:, :5] / len(x))


def test_strengths_of_a_loss_without_a_value_at_zeros_are_solved_from_params_on():
    begin, covariance = covariances()
    path = fr.regularization_path(gaussian, begin, fr.l1, strengths=[0.02, 0.1], args=(covariance,))
    assert path.converged.all()
    for strength, p in zip(path.strengths, path.params["p"], strict=True):
        slopes = grad(gaussian)({"p": p}, covariance)
        assert fr.kkt_residual({"p": p}, slopes, fr.l1, strength=strength) < 1e-7
        assert torch.linalg.eigvalsh(p).min() > 0


def test_the_graphical_lasso_of_scikit_learn_whose_diagonal_carries_no_penalty():
    begin, covariance = covariances()
    off_diagonal = (1 - begin["p"]) * fr.l1
    path = fr.regularization_path(gaussian, begin, off_diagonal, args=(covariance,), count=3, ratio=0.1)
    assert path.converged.all()
    expected = [graphical_lasso(covariance.cpu().numpy(), float(s), enet_tol=1e-8)[1] for s in path.strengths]
    torch.testing.assert_close(path.params["p"].cpu(), torch.tensor(np.array(expected)), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "of", [gaussian, lambda p, c: (c * p["p"]).sum() - torch.logdet(p["p"])], ids=["forward", "backward"]
)
def test_a_loss_without_a_value_where_a_solver_begins_is_told(of):
    begin, covariance = covariances()
    with pytest.raises(ValueError, match=r"not finite at zero.*strengths="):
        fr.regularization_path(of, begin, fr.l1, args=(covariance,))
    with pytest.raises(torch.linalg.LinAlgError, match=r"the loss failed: .*no value at params"):
        fr.minimize(of, fr.tree_zeros_like(begin), fr.l1, args=(covariance,))
