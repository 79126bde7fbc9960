"""The pages: their code runs, their tables are those of the measured numbers, and they name all that is public."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import funcreg as fr

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")])}
README = PAGES["README.md"].read_text()
PUBLIC = [name for name, value in vars(fr).items() if not name.startswith("_") and not inspect.ismodule(value)]
tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def run(page: Path, folder: Path) -> str:
    """What the blocks of a page print, one after the other in an empty folder, as if they were pasted."""
    return run_script(blocks(page), folder)


def run_script(parts: list[str], folder: Path) -> str:
    script = "\n".join(["import torch; torch.set_num_threads(1)", *parts])
    torchs_own = "ignore::DeprecationWarning:torch.jit._script"  # Its compiler imports what it deprecates.
    command = [sys.executable, "-W", "error", "-W", torchs_own, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # Installed or not.
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    # The sections of integrations.md need a library each, and run in test_integrations.py.
    [path for path in PAGES.values() if blocks(path) and path.name != "integrations.md"],
    ids=lambda path: path.name,
)
def test_blocks_run_from_top_to_bottom(page, tmp_path):
    said = run(page, tmp_path)
    if page == PAGES["README.md"]:
        loss, zeros, right = re.match(r"loss (.*), (\d+)% of .*\n(\d+)% of new examples", said).groups()
        assert float(loss) < 0.1  # The network lives,
        assert 80 <= int(zeros) <= 90  # most of its weights do not,
        assert int(right) >= 95  # and it learned what it was to learn.
        assert int(re.search(r"Conv2d\(1, (\d+),", said).group(1)) < 14  # Channels of the smaller network.


@pytest.mark.parametrize("page", [path for path in PAGES.values() if blocks(path)], ids=lambda path: path.name)
def test_what_blocks_draw_is_seeded(page):
    """So that a page runs for every reader, or for none."""
    draw = re.search(r"torch\.rand|nn\.[A-Z]\w+\(.*|manual_seed", "\n".join(blocks(page)))
    assert draw is None or draw.group() == "manual_seed"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="blocks marked `python optuna` need optuna")
def test_blocks_that_need_optuna_run_after_the_first(tmp_path):
    page = PAGES["examples/tuning.md"]
    assert "'lr'" in run_script([blocks(page)[0], *blocks(page, "python optuna")], tmp_path)


def test_recipes_are_lines_that_build_something():
    """Every line of funcreg in the table, with names as the page has them."""
    params = {"fc1.weight": torch.ones(5, 10), "fc2.weight": torch.ones(1, 5), "fc2.bias": torch.ones(1)}
    params |= {"norm.weight": torch.ones(5)}
    names = {"fr": fr, "params": params, "loss": 1.0, "lam": 0.01, "lr": 0.1, "opt": fr.sgd(0.1)}
    names |= {"hidden": torch.ones(3, 5), "momentum": 0.9, "decay": 1e-3, "grid": torch.tensor([0.0, 0.1])}
    names |= {"start": params, "zeros": fr.tree_map(torch.zeros_like, params)}
    rows = re.findall(r"^\| .*? \| (.*?) \| .* \|$", PAGES["examples/recipes.md"].read_text(), flags=re.MULTILINE)
    lines = [line for row in rows for line in re.findall(r"`([^`]*fr\.[^`]*)`", row)]
    assert len(lines) > 20
    for line in lines:
        made = eval(line, dict(names))
        assert isinstance(made, (fr.Transform, torch.Tensor)), line


# Tables


@every_page
def test_tables_are_those_of_the_measured_numbers(page):
    assert page.read_text() == tables["filled"](page.read_text()), "run python benchmarks/tables.py"


def test_every_measurement_has_its_table():
    written = "".join(path.read_text() for path in tables["PAGES"])
    for path in (ROOT / "benchmarks").glob("*.json"):
        assert f"<!-- {path.stem} -->\n| " in written


# What they say


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250


def test_all_that_is_public_is_named_and_all_that_is_named_is_public():
    text = "".join(path.read_text() for name, path in PAGES.items() if name != "CHANGELOG.md")
    assert set(re.findall(r"\bfr\.([A-Za-z_0-9]+)", text)) <= set(PUBLIC)
    missing = [name for name in PUBLIC if not re.search(rf"`{name}\b", text)]
    assert missing == [], "run python examples/catalogue.py --write"


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        target, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_the_commands_of_the_readme_are_those_of_the_project():
    commands = re.findall(r"<!-- (?:main|test) -->\n```sh\n(.*)\n```\n<!-- end -->", README)
    assert len(commands) == 2
    assert all(c.startswith("python3 -m venv .venv && ") for c in commands)
    assert (ROOT / "examples" / "digits.py").exists()
    assert "<!-- test -->" in (ROOT / ".ci" / "run").read_text()
