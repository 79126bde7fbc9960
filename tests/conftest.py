from __future__ import annotations

import gc
import sys

import hypothesis
import pytest
import torch
from cases import DEVICE

from funcreg.fused import lowering

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40, database=None)
hypothesis.settings.load_profile("suite")
torch.set_num_threads(1)  # Tests are many and small: starting threads takes longer than their work.

if torch.device(DEVICE).type != "cpu":
    # What is printed in documentation, written in articles and run as a script is the same on every device.
    collect_ignore = ["test_articles.py", "test_catalogue.py", "test_examples.py", "test_pages.py", "test_public.py"]


def _freeze() -> None:
    """Modules and tests stay until the end: the garbage collector need not visit them while code is traced."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _by_test(items: list[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """The cases of each test."""
    found: dict[str, list[pytest.Item]] = {}
    for item in items:
        found.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="run one in so many cases of each test")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    places = {item: place for own in _by_test(items).values() for place, item in enumerate(own)}
    items[:] = [item for item in items if places[item] % config.getoption("every") == 0]
    named = [item.nodeid for item in items if " at 0x" in item.nodeid]
    assert not named, f"{named[0]} has an address in its name, which is another one in each worker: give it ids="
    for item in items:  # Whose proximal operator takes many steps: laws take seconds each.
        if "isotropic_total_variation" in item.name:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    _freeze()


def _skip_what_torch_measures() -> None:
    """Dynamo times the guards of all that it compiles, for its logs, with empty caches of the processor."""
    guards = sys.modules.get("torch._dynamo.guards")
    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *arguments: 0.0  # pyright: ignore[reportOptionalMemberAccess]
    config = sys.modules.get("torch._dynamo.config")
    if config is not None and hasattr(config, "verbose"):  # Asked for at each instruction, by a slow lookup.
        vars(config)["verbose"] = config.verbose


def _seed() -> None:
    """Begin with the same random numbers; for each device that may come, torch keeps where it was asked to."""
    if torch.device(DEVICE).type == "cpu":
        torch.default_generator.manual_seed(0)
    else:
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_start():
    """Every test begins with the same random numbers, no compiled code, and no warning said that is said once."""
    _seed()
    lowering._said.clear()
    _skip_what_torch_measures()
    modules = len(sys.modules)
    yield
    if "torch._dynamo" in sys.modules:  # Its import takes seconds.
        torch._dynamo.reset()
    if len(sys.modules) > modules + 100:
        _freeze()
