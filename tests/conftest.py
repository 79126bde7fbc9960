from __future__ import annotations

import hypothesis
import pytest
import torch
from cases import DEVICE

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40, database=None)
hypothesis.settings.load_profile("suite")
torch.set_num_threads(1)  # Tests are many and small: starting threads takes longer than their work.

if torch.device(DEVICE).type != "cpu":
    # What is printed in documentation, written in articles and run as a script is the same on every device.
    collect_ignore = ["test_articles.py", "test_catalogue.py", "test_examples.py", "test_pages.py", "test_public.py"]


@pytest.fixture(autouse=True)
def _same_start():
    """Every test begins with the same random numbers and no compiled code."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
