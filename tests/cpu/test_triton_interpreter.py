"""Every Triton kernel against the reference, in Triton's interpreter: fp32 only, since it computes bf16 wrongly.

The interpreter must be chosen before Triton is first imported, and would stay chosen for every later test: hence one process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_checks import CHECKS

ROOT = Path(__file__).parents[2]
GPU_ONLY = {"large_offsets", "attention_invariance"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(ROOT / "tests" / "kernel_checks.py")], env=env, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", [n for n in CHECKS if n not in GPU_ONLY])
def test_kernel(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, results[name]


def test_uniform_numbers_stay_below_one() -> None:
    """This lane's random bits are all ones: half a step above them must not round to 1, whose Gumbel noise is infinite."""
    import torch

    from miniinfer.kernels.reference import uniform

    highest = uniform(torch.tensor([11]), torch.tensor([3], dtype=torch.int32), 650_237)[0, 650_236]
    assert 1 - 2**-23 < highest < 1
