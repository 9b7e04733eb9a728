"""Every pair of features on the CPU, and the file that says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from matrix import Feature, check_pair, pairs, render

from miniinfer.kernels import select

MATRIX = Path(__file__).parents[2] / "docs" / "matrix.md"


@pytest.mark.parametrize(("a", "b"), pairs(gpu=False), ids=lambda f: f.name)
def test_pair(a: Feature, b: Feature, tmp_path: Path) -> None:
    if a.cpu or b.cpu:
        try:
            select("cpu", "cpu")
        except RuntimeError as e:
            pytest.skip(str(e))
    check_pair(a, b, tmp_path)


def test_matrix_file_is_current(request: pytest.FixtureRequest) -> None:
    """The table lists what test_pair runs; a failing pair fails the run, so a green run is what makes the table true."""
    text = render({(a.name, b.name) for a, b in pairs(gpu=False)})
    if request.config.getoption("--update-docs"):
        MATRIX.write_text(text)
    assert MATRIX.read_text() == text, "run: pytest tests/cpu/test_matrix.py --update-docs"
