"""Every public name has a row, a docstring with a doctest that holds, and its place in the layers."""

from __future__ import annotations

import ast
import doctest
import graphlib
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from cases import CONSTRAINTS, GRADIENT_ALONE, PENALTIES, TRANSFORMS
from reference.twins import SCHEDULES
from test_annealing import CASES

import funcreg as fr
from funcreg.core import spelling

ROOT = Path(__file__).parent.parent
PUBLIC = {name: value for name, value in vars(fr).items() if not name.startswith("_") and not inspect.ismodule(value)}
every_name = pytest.mark.parametrize("name", PUBLIC)


@every_name
def test_its_docstring_has_an_example_that_holds(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert text.splitlines()[0].strip().endswith((".", "`."))
    example = doctest.DocTestParser().get_doctest(text, {"torch": torch, "fr": fr, **PUBLIC}, name, name, 0)
    assert example.examples
    runner = doctest.DocTestRunner()
    said: list[str] = []
    runner.run(example, out=said.append)
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize("name", [n for n, v in PUBLIC.items() if callable(v) and n != "matrices"])
def test_its_docstring_names_its_arguments(name):
    parameters = [
        p
        for p in inspect.signature(PUBLIC[name]).parameters
        if p not in ("self", "params", "tree", "args", "kwargs", "updates", "keywords")
    ]
    text = inspect.getdoc(PUBLIC[name]) or ""
    # A comment beside each field of a named tuple says what it is.
    fields = isinstance(PUBLIC[name], type) and issubclass(PUBLIC[name], tuple)
    if name in ("nadam", "nadamw") or fields or len(parameters) == 0:
        return
    named = re.findall(r"^    (\w+): ", text.partition("Args:")[2], flags=re.MULTILINE)
    assert set(parameters) <= set(named)


@pytest.mark.filterwarnings("ignore:this schedule stays")  # Some rows have no steps.
@every_name
def test_it_has_a_row_or_a_test(name):
    if isinstance(PUBLIC[name], fr.Penalty):
        assert any(
            case.penalty is PUBLIC[name]
            for case in (*PENALTIES.values(), *GRADIENT_ALONE.values(), *CONSTRAINTS.values())
        ), "write a row of PENALTIES, GRADIENT_ALONE or CONSTRAINTS in tests/cases.py"
    elif inspect.isfunction(PUBLIC[name]) and inspect.signature(PUBLIC[name]).return_annotation == "Transform":
        rows = {row.split()[0] for row in TRANSFORMS} | {"ensemble"}  # The ensemble is a law over all rows.
        assert name in rows, "write a row of TRANSFORMS in tests/cases.py that begins with its name"
    elif inspect.isfunction(PUBLIC[name]) and inspect.signature(PUBLIC[name]).return_annotation == "Schedule":
        made = [*(make(fr) for make in SCHEDULES.values()), *(make(1.0) for make in CASES.values())]
        here = {str(schedule).split("(")[0] for schedule in made}
        assert name in here, "write a row of CASES in tests/test_annealing.py, or of SCHEDULES if optax has it"
    else:
        here = "\n".join(path.read_text() for path in (ROOT / "tests").glob("**/*.py"))
        assert re.search(rf"fr\.{name}\b|lib\.{name}\b", here), "no test uses it"


def test_penalties_look_like_functions():
    assert fr.elastic.__name__ == "elastic"
    assert str(inspect.signature(fr.elastic)) == "(params, alpha: 'Scalar', rho: 'Scalar')"
    assert repr(fr.elastic) == "<penalty elastic(params, alpha, rho)>"


# Layers


#: Each imports from those before it alone.
PACKAGES = ["core", "regularizers", "networks", "transforms", "fused", "torch_optim", "solvers", "training", "reports"]
PACKAGES += ["plot"]


def imports(path: Path) -> set[str]:
    """Modules imported anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            module = node.module or ""
            is_package = module in {"funcreg", *(f"funcreg.{package}" for package in PACKAGES)} - {"funcreg.plot"}
            found |= {f"{module}.{each.name}" for each in node.names} if is_package else {module}
    return found


def package_of(module: str) -> str:
    return module.split(".")[1]


def test_imports_point_down_and_only_tree_imports_optree():
    paths = [path for path in (ROOT / "funcreg").rglob("*.py") if path.stem != "__init__"]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): imports(path) for path in paths}
    own = {name: {each for each in found if each.startswith("funcreg")} for name, found in modules.items()}
    graphlib.TopologicalSorter(own).prepare()  # An error for modules that import each other.
    assert {package_of(name) for name in modules} == set(PACKAGES)
    for name, found in modules.items():
        assert own[name] <= set(modules), name
        assert all(PACKAGES.index(package_of(each)) <= PACKAGES.index(package_of(name)) for each in own[name]), name
        assert ("optree" in found) == (name == "funcreg.core.tree")
        outside = {each.split(".")[0] for each in found} - {"funcreg", "torch", "optree"}
        assert outside <= set(sys.stdlib_module_names), name


def test_packages_import_nothing_by_themselves():
    """Modules say what they need, so that the layers above are what is imported."""
    written = [ast.parse(path.read_text()).body for path in (ROOT / "funcreg").glob("*/__init__.py")]
    assert len(written) == len(PACKAGES) - 1
    assert all(isinstance(body[0], ast.Expr) and len(body) == 1 for body in written)


def test_names_of_types_have_their_article():
    """By `type_of`, which knows an AveragedModel from a Linear."""
    written = {p.stem for p in (ROOT / "funcreg").rglob("*.py") if re.search(r"\ban? \{type\(", p.read_text())}
    assert written == set()


def test_only_one_module_asks_torch_whether_something_is_compiled():
    """What it says is true in all threads while one of them compiles: `undocumented.is_compiling` knows of this one."""
    asking = {path.stem for path in (ROOT / "funcreg").rglob("*.py") if "compiler.is_compiling" in path.read_text()}
    assert asking == {"undocumented"}


@pytest.mark.parametrize(("name", "said"), [
    ("ElasticNet", r"has no attribute 'ElasticNet'\. Is it elastic\?"),
    ("prox_adamw", r"Is it prox_adam, with weight_decay="),
    ("AdamW", r"Is it adamw\?"),
    ("group_laso", r"Is it group_lasso\?"),
    ("tree_utils", r"Is it tree_norm, or another name of optax\.tree_utils, at the top level\?"),
    ("resizings", r"'resizings'$"),  # And not a module that is called nearly so.
    ("_private", r"'_private'$"),
])  # fmt: skip
def test_names_of_others_are_told_what_they_are_here(name, said):
    with pytest.raises(AttributeError, match=said):
        getattr(fr, name)


def test_pictures_are_told_where_they_are():
    said = spelling.unknown_name("plot", {})  # Of a process that has not imported the module.
    assert said.endswith("Pictures are a module of their own: from funcreg import plot.")


@pytest.mark.parametrize(("theirs", "ours"), spelling._ELSEWHERE.items())
def test_what_is_said_of_names_of_others_is_here(theirs, ours):
    assert re.match(r"\w+", ours)[0] in PUBLIC  # pyright: ignore[reportOptionalSubscript]
    assert not hasattr(fr, theirs)


def test_torch_and_optree_are_all_it_needs():
    script = """
        import sys, torch, optree
        before = set(sys.modules)
        import funcreg
        print(*set(sys.modules) - before)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    new = {name.split(".")[0] for name in run.stdout.split()}
    assert new <= {"funcreg", "torch", "optree", *sys.stdlib_module_names}
    assert "torch._dynamo" not in run.stdout.split()  # The compiler is imported when it is used.
