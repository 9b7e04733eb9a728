"""The kernels for Hopper compile with the Triton that is installed: their language is experimental, and its names change from version to version."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def test_every_kernel_compiles(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, str(ROOT / "tests" / "compile_kernels.py")], env=env, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert not found["failed"], f"Triton {found['triton']}: {found['failed']}"
    gluon = {f"{name}_hopper_kernel" for name in ("chain", "decode", "expert", "linear", "matmul", "prefill")}
    assert gluon <= set(found["compiled"]), f"not launched: {gluon - set(found['compiled'])}"
    assert sum(found["compiled"].values()) > 25
