"""What all tests share: an option to rewrite generated documents, repeatable random tests, one thread a process, no GPU tests without a GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny models lose by threads, and pytest-xdist fills the cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network

import hypothesis
import pytest

GPU_TESTS = Path(__file__).parent / "gpu"

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-docs", action="store_true", help="rewrite generated files under docs/ instead of failing when they are stale")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    below = [item for item in items if GPU_TESTS in item.path.parents]
    if below:
        import torch

        if not torch.cuda.is_available():
            for item in below:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """An entry point that a test calls sets up logging to that test's stderr, which the next test must not inherit."""
    root = logging.getLogger("miniinfer")
    before = root.handlers[:], root.propagate, root.level
    yield
    root.handlers[:], root.propagate = before[0], before[1]
    root.setLevel(before[2])
