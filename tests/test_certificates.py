"""Certificates against scikit-learn, and against what they promise."""

from __future__ import annotations

import math
import re
import warnings

import numpy as np
import pytest
import torch
from cases import GRADIENT_ALONE, assert_equal, draw
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNet, Lasso, MultiTaskElasticNet, MultiTaskLasso, lasso_path
from torch.func import grad, vmap
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import funcreg as fr


def standardized(x):
    x = x[:, x.std(0) > 0]
    return (x - x.mean(0)) / x.std(0)


X, y = load_diabetes(return_X_y=True)
X, y = standardized(X), standardized(y[:, None])[:, 0]
Y = np.stack([y, y**2 - np.mean(y**2)], 1)
design = torch.tensor(X)

# scikit-learn's model, targets, and the same penalty.
MODELS = {
    "Lasso": (Lasso(0.05), y, fr.l1, (), {"strength": 0.05}),
    "ElasticNet": (ElasticNet(0.1, l1_ratio=0.4), y, fr.elastic, (0.1, 0.4), {}),
    "ElasticNet as a sum": (ElasticNet(0.1, l1_ratio=0.4), y, 0.04 * fr.l1 + 0.06 * fr.half_l2, (), {}),
    "MultiTaskLasso": (MultiTaskLasso(0.05), Y, fr.group_lasso, (), {"strength": 0.05, "dim": 0}),
    "MultiTaskElasticNet": (
        MultiTaskElasticNet(0.1, l1_ratio=0.4),
        Y,
        0.04 * fr.group_lasso.given(dim=0) + 0.06 * fr.half_l2,
        (),
        {},
    ),
}


def predict(params):
    return torch.tensordot(design, params["w"], ([1], [-1]))


@pytest.mark.parametrize("passes", [1, 2, 4, 8, 1000])
@pytest.mark.parametrize("name", MODELS)
def test_the_duality_gap_is_scikit_learns(name, passes):
    model, targets, penalty, hyper, keywords = MODELS[name]
    model.set_params(fit_intercept=False, tol=1e-15, max_iter=passes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, targets)
    gap = fr.duality_gap(predict, {"w": torch.tensor(model.coef_)}, torch.tensor(targets), penalty, *hyper, **keywords)
    assert abs(float(gap) - model.dual_gap_) <= 1e-12
    assert passes > 1 or gap > 1e-2


# Of the penalties that are norms and ridges, on a logistic problem.
PENALTIES = {
    "l1": (fr.l1, 0.15),
    "elastic": (fr.elastic.given(1.0, 0.3), 0.1),
    "groups": (fr.group_lasso.given(dim=0), 0.1),
    "sparse groups": (fr.sparse_group_lasso.given(1.0, 0.5, dim=None), 0.1),
    "a sum": (fr.l1 + 0.3 * fr.group_lasso.given(dim=None) + 0.1 * fr.l2, 0.05),
}


@pytest.mark.parametrize("loss", ["squared", pytest.param("logistic", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PENALTIES)
def test_the_gap_bounds_the_distance_to_the_minimum_and_closes_there(name, loss):
    penalty, strength = PENALTIES[name]
    x = torch.tensor(standardized(load_breast_cancer(return_X_y=True)[0]))[:, :12]
    labels = torch.tensor(load_breast_cancer(return_X_y=True)[1], dtype=torch.float64)
    targets = torch.stack([labels, 1 - labels.roll(200)], 1)  # Two outputs for each sample.
    model = lambda p: x @ p["w"].T
    losses = {
        "squared": lambda p: 0.5 * (model(p) - targets).square().sum(1).mean(),
        "logistic": lambda p: binary_cross_entropy_with_logits(model(p), targets, reduction="none").sum(1).mean(),
    }
    objective = lambda p: losses[loss](p) + strength * penalty(p)
    smoothness = float(torch.linalg.eigvalsh(x.T @ x)[-1]) / len(x)
    tx = fr.fista(1 / (smoothness + 0.1), penalty, strength=strength)
    params = {"w": torch.zeros(2, 12, dtype=torch.float64)}
    state, seen = tx.init(params), []
    for n in range(800):
        if n in (0, 2, 10):
            seen.append(params)
        updates, state = tx.update(grad(losses[loss])(params), state, params)
        params = fr.apply_updates(params, updates)
        if n % 20 == 19 and updates["w"].abs().max() <= 1e-15:  # It stays there.
            break
    gap = lambda p: fr.duality_gap(model, p, targets, penalty, strength=strength, loss=loss)
    assert gap(params).abs() < 1e-10
    for other in seen:
        assert gap(other) >= objective(other) - objective(params) - 1e-10
        assert gap(other) > 1e-8
    assert gap({"w": torch.full((2, 12), 50.0, dtype=torch.float64)}) > 1


def test_the_gap_maps_over_members_and_keeps_dtypes():
    params = {"w": torch.randn(3, 10)}
    x, targets = design.float(), torch.tensor(y).float()
    gap = lambda p, strength: fr.duality_gap(lambda p: x @ p["w"], p, targets, fr.elastic, 1.0, 0.5, strength=strength)
    strengths = torch.tensor([0.01, 0.1, 1.0])
    many = vmap(gap)(params, strengths)
    assert many.dtype == torch.float32
    for i in range(3):
        torch.testing.assert_close(many[i], gap({"w": params["w"][i]}, float(strengths[i])))


def test_the_gap_refuses_what_has_no_dual_norm():
    params, targets = {"w": torch.zeros(10, dtype=torch.float64)}, torch.tensor(y)
    with pytest.raises(ValueError, match="there is no norm in it"):
        fr.duality_gap(predict, params, targets, fr.half_l2)
    unknown = fr.Penalty(fr.global_norm, lambda p: p, lambda p, step, metric=None: p)
    with pytest.raises(ValueError, match="global_norm is neither"):
        fr.duality_gap(predict, params, targets, fr.l1 + unknown)
    for free in (fr.total_variation, {"w": 0.0} * fr.l1):
        with pytest.raises(ValueError, match="along which no multiple of the gradient is feasible"):
            fr.duality_gap(predict, params, targets, free)
    both, chosen = {**params, "b": torch.zeros((), dtype=torch.float64)}, fr.select("w")
    for some in (fr.l1.given(mask=chosen), fr.l1.given(mask=chosen) + fr.half_l2, fr.per_leaf({"w": fr.l1})):
        with pytest.raises(ValueError, match="no norm acts on leaf 'b'"):  # A multiple would be no bound.
            fr.duality_gap(lambda p: predict(p) + p["b"], both, targets, some)
    with pytest.raises(ValueError, match="loss is 'hinge'; expected one of 'squared', 'logistic'"):
        fr.duality_gap(predict, params, targets, fr.l1, loss="hinge")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="targets have shape"):
        fr.duality_gap(predict, params, targets[:, None], fr.l1)


# Residuals


def test_the_docstring_of_kkt_residual_names_every_penalty_without_a_rule():
    said = str(fr.kkt_residual.__doc__).split("Of what the library has, these are")[1].split(". ")[0]
    made = {"on_singular_values": fr.on_singular_values(fr.l1), "hierarchical": fr.hierarchical("a", "b")}
    made |= {name: each for name, each in vars(fr).items() if isinstance(each, fr.Penalty)}
    landing = {name for name in made if not any(made[name] is row.penalty for row in GRADIENT_ALONE.values())}
    assert {*re.findall(r"`(\w+)`", said)} == {name for name in landing if not made[name].has_residual}


# Paths


def test_a_path_begins_where_scikit_learns_does():
    targets = torch.tensor(y) + 3.0
    loss = lambda p: 0.5 * (design @ p["w"] + p["b"] - targets).square().mean()
    params = {"w": torch.ones(10, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    start = fr.null_model(loss, params, fr.select("w"))
    assert_equal(start, {"w": torch.zeros(10).double(), "b": targets.mean()}, rtol=1e-14)
    first = fr.lambda_max(grad(loss)(start), fr.l1, mask=fr.select("w"))
    assert abs(float(first) - lasso_path(X, y)[0][0]) <= 1e-14


def test_the_null_model_of_classes_predicts_their_frequencies():
    images, digits = load_digits(return_X_y=True)
    x, labels = torch.tensor(standardized(images)), torch.tensor(digits)
    keep = (labels < 3) | (torch.arange(len(labels)) % 7 == 0)  # Some classes are rare.
    x, labels = x[keep], labels[keep]
    params = {"w": torch.randn(10, x.shape[1], dtype=torch.float64), "b": torch.zeros(10, dtype=torch.float64)}
    loss = lambda p: cross_entropy(x @ p["w"].T + p["b"], labels)
    start = fr.null_model(loss, params, fr.select("w"))
    shares = torch.bincount(labels, minlength=10).double() / len(labels)
    torch.testing.assert_close(start["b"].softmax(0), shares, rtol=1e-12, atol=0)
    slopes = grad(loss)(start)
    assert slopes["b"].abs().max() < 1e-14
    one_hot = torch.nn.functional.one_hot(labels, 10).double()
    expected = ((shares - one_hot).T @ x / len(x)).square().sum(0).sqrt().max()
    found = fr.lambda_max(slopes, fr.group_lasso, dim=0, mask=fr.select("w"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_null_model_finds_a_minimum_that_newtons_full_steps_overshoot():
    labels = torch.zeros(100000)
    labels[0] = 1
    loss = lambda p: binary_cross_entropy_with_logits((p["b"] + 0 * labels).double(), labels.double())
    start = fr.null_model(loss, {"b": torch.tensor([9.0], dtype=torch.float64)}, mask=False)
    torch.testing.assert_close(start["b"].sigmoid(), torch.tensor([1e-5]).double(), rtol=1e-6, atol=0)
    params = {"w": torch.ones(2), "e": torch.ones(0)}
    assert_equal(fr.null_model(lambda p: p["w"].sum(), params, mask=True), fr.tree_map(torch.zeros_like, params))
    assert_equal(fr.null_model(lambda p: p["w"].sum(), params, mask={"w": True, "e": False})["w"], torch.zeros(2))


def test_lambda_max_has_the_closed_forms_of_the_papers():
    g = draw()["head"].weight
    params = {"w": g}
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-13, atol=0)
    norms = g.square().sum(1).sqrt()
    close(fr.lambda_max(params, fr.elastic, 1.0, 0.25), g.abs().max() / 0.25)
    close(fr.lambda_max(params, fr.group_lasso, weights="sqrt_size"), norms.max() / math.sqrt(3))
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    close(fr.lambda_max(params, fr.group_lasso, weights=weights), (norms / weights).max())
    close(fr.lambda_max(params, 0.5 * fr.l1 + fr.l2), g.abs().max() / 0.5)
    root = fr.lambda_max(params, fr.sparse_group_lasso, 1.0, 0.4)
    left = fr.l1.prox(g, 0.4 * root).square().sum(1).sqrt() - 0.6 * root
    assert left.max().abs() < 1e-13


@pytest.mark.parametrize("size", [1e-290, 1e-30, 1.0, 1e100, 1e290])
def test_lambda_max_is_exact_to_the_last_bit(size):
    g = draw()["head"].weight * size
    assert fr.lambda_max(g, fr.l1) == g.abs().max()
    for penalty in (fr.elastic.given(1.0, 0.3), fr.group_lasso.given(dim=0)):
        least = fr.lambda_max(g, penalty)
        assert not penalty.prox(g, least).any()
        assert penalty.prox(g, torch.nextafter(least, torch.zeros_like(least))).any()


def test_lambda_max_looks_downhill():
    @fr.penalty(
        gradient=lambda w: (w > 0).to(w.dtype),
        proximal=lambda w, step: w - torch.minimum(w.relu(), torch.as_tensor(step, dtype=w.dtype)),
    )
    def positive_part(w):
        return w.relu()

    # Zero is a solution if no entry wants to become negative, which costs nothing, or positive by more than one.
    assert fr.lambda_max(torch.tensor([-2.0, 0.0]), positive_part) == 2
    assert fr.lambda_max(torch.tensor([2.0, 0.0]), positive_part) == math.inf


def test_a_strength_of_gradients_that_are_all_none_is_refused():
    with pytest.raises(ValueError, match=r"None for every leaf.* Was backward\(\) called"):
        fr.lambda_max({"w": None, "b": None}, fr.l1)


def test_the_sparsity_of_a_module_is_that_of_its_parameters():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.nn.init.zeros_(net[0].weight[0])
    assert fr.sparsity(net, mask=fr.matrices) == 0.5
    assert fr.sparsity(net) == fr.sparsity(dict(net.named_parameters()))
