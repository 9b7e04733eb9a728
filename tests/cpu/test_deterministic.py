"""`--deterministic` on the CPU: see tests/determinism.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from determinism import check
from harness import HYBRID, MOE, SHAPE, SLIDING

from miniinfer.config import ConfigError, DeviceInfo, EngineConfig, ModelConfig, resolve

SHAPES = {"dense": SHAPE, "hybrid": HYBRID, "sliding": SLIDING, "experts": MOE}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SHAPES)
def test_same_bits_in_every_situation(name: str, dtype: str, tmp_path: Path) -> None:
    check(tmp_path, SHAPES[name], dtype=dtype, device="cpu", page_size=8, num_threads=1)


def test_what_cannot_be_deterministic_is_refused(tmp_path: Path) -> None:
    model = ModelConfig.from_folder(Path(__file__).parents[2] / "miniinfer/bench/shapes/Qwen3-0.6B")
    cpu, asked = DeviceInfo("cpu", 2), EngineConfig(deterministic=True)
    with pytest.raises(ConfigError, match="deterministic: plain torch"):
        resolve(dataclasses.replace(asked, kernels="reference"), model, cpu)
    with pytest.raises(ConfigError, match="deterministic: float16"):
        resolve(dataclasses.replace(asked, dtype="float16"), model, cpu)
    with pytest.raises(ConfigError, match="deterministic: max_num_batched_tokens=9"):
        resolve(dataclasses.replace(asked, max_num_batched_tokens=9, max_num_seqs=8), model, cpu)
    assert resolve(dataclasses.replace(asked, max_num_batched_tokens=9), model, cpu).max_num_seqs == 7
