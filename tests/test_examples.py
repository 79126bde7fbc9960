"""Each example runs in its short mode, and says what it should."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.distributed  # A process each.


def run(name: str, *options: str) -> str:
    torchs_own = "ignore::DeprecationWarning:torch.jit._script"  # Its compiler imports what it deprecates.
    command = [sys.executable, "-W", "error", "-W", torchs_own, str(EXAMPLES / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_digits_prints_a_row_for_each_strength_and_draws(tmp_path):
    said = run("digits.py", "--steps", "20", "--out", str(tmp_path / "digits.png"))
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    assert said.count("%") >= 16


@pytest.mark.slow
def test_tune_prints_a_table_and_tests_the_best():
    said = run("tune.py", "--epochs", "2", "--rates", "2", "--strengths", "2")
    assert said.splitlines()[0].split()[:5] == ["row", "lr", "strength", "loss", "score"]
    assert re.search(r"^best: lr .*, test accuracy \d+.\d%, \d+% of the weights", said, flags=re.MULTILINE)
    assert "searched: lr" in said


@pytest.mark.slow
def test_lasso_agrees_with_scikit_learn():
    said = run("lasso.py")
    assert "bmi" in said
    assert "KKT" in said


@pytest.mark.slow
def test_adamw_chain_trains_a_transformer():
    assert "loss" in run("adamw_chain.py", "--steps", "3", "--width", "16", "--layers", "1")


@pytest.mark.slow
def test_structured_sparsity_gives_a_smaller_network_with_equal_outputs():
    said = run("structured_sparsity.py", "--steps", "40", "--width", "8", "--strength", "0.01")
    before, after = (int(row.split("%")[0].split()[-2].replace(",", "")) for row in said.splitlines() if "ms" in row)
    assert after < before
    assert "largest difference" in said


@pytest.mark.slow
def test_a_residual_network_loses_channels_and_keeps_its_outputs(tmp_path):
    options = ("--epochs", "2", "--width", "8", "--strength", "0.004", "--out", str(tmp_path / "widths.png"))
    said = run("smaller_resnet.py", *options)
    assert (tmp_path / "widths.png").stat().st_size > 10_000
    dense, trained, without = (
        int(row.split("%")[0].split()[-2].replace(",", "")) for row in said.splitlines() if " ms" in row
    )
    assert without < trained == dense
    assert "largest difference" in said


@pytest.mark.slow
def test_a_transformer_loses_heads_and_units_and_keeps_its_outputs():
    said = run("smaller_transformer.py", "--steps", "60", "--width", "16", "--layers", "1", "--strength", "0.01")
    _, trained, without, longer = (row.split()[-6:-3] for row in said.splitlines() if " ms" in row)
    assert without == longer
    assert all(int(few) < int(all_of_them) for few, all_of_them in zip(without[:2], trained[:2], strict=True))
    assert "largest difference" in said


@pytest.mark.slow
def test_gallery_draws_every_penalty_of_two_weights(tmp_path):
    said = run("gallery.py", "--points", "21", "--out", str(tmp_path / "gallery.png"))
    assert (tmp_path / "gallery.png").stat().st_size > 10_000
    curves, balls = (int(count) for count in said.split() if count.isdigit())
    assert 15 <= curves <= balls


@pytest.mark.slow
def test_strengths_that_are_learned_beat_the_best_single_one():
    said = run("learn_lambda.py", "--steps", "5")
    assert said.count("loss") == 2


@pytest.mark.slow
def test_bayesian_prints_how_well_each_of_three_is_calibrated():
    said = run("bayesian.py", "--steps", "20")
    rows = [line.split() for line in said.splitlines() if "%" in line]
    assert len(rows) == 3
    for row in rows:
        accuracy, log_loss, error = float(row[-5]), float(row[-3]), float(row[-2])
        assert accuracy > 50  # Of ten digits, after twenty steps.
        assert 0 < log_loss < 2
        assert 0 < error < 60
