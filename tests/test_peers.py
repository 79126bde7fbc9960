"""What other libraries have too: the same values, gradients and proximal points, against stored numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cases import DEVICE

import funcreg as fr

REFERENCE = json.loads((Path(__file__).parent / "reference" / "penalties.json").read_text())

ROWS = {f"{peer}: {name}": row for peer in REFERENCE["versions"] for name, row in REFERENCE[peer].items()}

# Penalties that are made from others.
MADE = {
    "nonnegative_form(l1)": fr.nonnegative_form(fr.l1),
    "nonnegative_form(half_l2)": fr.nonnegative_form(fr.half_l2),
    "nonnegative_form(elastic)": fr.nonnegative_form(fr.elastic),
    "nonnegative_form(mcp)": fr.nonnegative_form(fr.mcp),
    "on_singular_values(scad)": fr.on_singular_values(fr.scad),
    "on_singular_values(log_sum)": fr.on_singular_values(fr.log_sum),
}

# Penalties and constraints that are compared with no stored numbers of a peer, and why; their equations are in
# tests/cases.py.
WITHOUT = {
    "affine_set": "its equation is the peers' own, by a pseudoinverse",
    "birkhoff": "jaxopt iterates to a tolerance; compared with assignments and quadratic programs in test_polytopes",
    "box_section": "jaxopt bisects to a tolerance; compared with quadratic programs in test_polytopes",
    "capped_l1": "no peer has it",
    "etp": "no numbers of pyproximal are stored; the minimum is searched on a grid",
    "ewc": "no peer has it",
    "exclusive_lasso": "no peer has it",
    "fused_lasso": "no peer has it",
    "geman": "no numbers of pyproximal are stored; the minimum is searched on a grid",
    "group_l0": "pyproximal has its ball, L10Ball, and not the penalty",
    "group_l_half": "no peer has it for groups with a closed form; the minimum is searched on a grid",
    "group_top_k": "no peer has it",
    "hoyer_square": "no peer has it",
    "isotropic_total_variation": "pyproximal.TV iterates to a tolerance; compared with its dual in test_images",
    "l0": "the threshold of pyproximal.L0 has no root and no 2",
    "l0_envelope": "no numbers of pyproximal are stored; the minimum is searched on a grid",
    "l1_linf": "no peer has it",
    "linf": "no peer has it",
    "min_max_norm": "the formula of Keras is a row of examples/from_others.md",
    "n_m_sparsity": "no peer has it",
    "orthogonality": "no peer has it",
    "orthogonality_offdiagonal": "no peer has it: Keras normalizes rows, which is keras_orthogonal",
    "oscar": "skglm has it as SLOPE, which is compared as slope",
    "polyhedron": "peers iterate to a tolerance; compared with quadratic programs in test_polytopes",
    "rank_envelope": "no numbers of pyproximal are stored; it is l0_envelope of singular values",
    "relaxed_mumford_shah": "no numbers of pyproximal are stored; the minimum is searched on a grid",
    "schatten": "no peer has it",
    "sparse_simplex": "no numbers of jaxopt are stored; compared with all choices of entries in test_constraints",
    "spectral": "no peer has it",
    "spectral_ball": "no peer has it",
    "spectral_mcp": "no peer has it",
    "srip": "no peer has it",
    "stiefel": "no peer has it: pyproximal.Orthogonal composes with an orthogonal operator",
    "total_variation": "pyproximal.TV iterates, with a wrong rule for its momentum",
    "transport": "jaxopt iterates to a tolerance; compared with quadratic programs in test_polytopes",
    "tree_lasso": "no peer has it",
}


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.float64, device=DEVICE)


def number(x):
    """A hyperparameter: lists are tensors."""
    return tensor(x) if isinstance(x, list) else x


def answer(row):
    """What funcreg says to the question of a row."""
    penalty = MADE[row["ours"]] if row["ours"] in MADE else getattr(fr, row["ours"])
    params, strength = {"weight": tensor(REFERENCE["inputs"][row["given"]])}, number(row["strength"])
    hyper = [number(x) for x in row.get("hyper", [])]
    if "convention" in row:
        hyper = getattr(fr, row["convention"])(*hyper)
    options = row.get("options", {})
    if row["rule"] == "value":
        return strength * penalty(params, *hyper, **options)
    if row["rule"] == "grad":
        return strength * penalty.grad(params, *hyper, **options)["weight"]
    if row["rule"] == "project":
        return penalty.prox(params, 0.0, *hyper, **options)["weight"]
    return torch.stack([penalty.prox(params, strength * s, *hyper, **options)["weight"] for s in row["steps"]])


@pytest.mark.parametrize("name", ROWS)
def test_a_peer_says_the_same(name):
    row = ROWS[name]
    tolerance = 1e-6 if row.get("rounded") else 1e-10
    torch.testing.assert_close(answer(row), tensor(row["theirs"]), rtol=tolerance, atol=tolerance)


def test_every_penalty_has_a_peer_or_a_reason():
    penalties = {name for name in dir(fr) if isinstance(getattr(fr, name), fr.Penalty)}
    assert penalties == {row["ours"] for row in ROWS.values() if row["ours"] not in MADE} | set(WITHOUT)


def test_no_penalty_with_a_peer_has_a_reason():
    assert not set(WITHOUT) & {row["ours"] for row in ROWS.values()}
