"""Every pair of features on the GPU, with the GPU kernels and CUDA graphs among the features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matrix import Feature, check_pair, pairs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(("a", "b"), pairs(gpu=True), ids=lambda f: f.name)
def test_pair(a: Feature, b: Feature, tmp_path: Path) -> None:
    check_pair(a, b, tmp_path, device="cuda", kernels="triton", page_size=16, num_pages=200)
