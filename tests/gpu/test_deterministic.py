"""`--deterministic` on a GPU: see tests/determinism.py. Graphs are on, so steps are padded too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from determinism import check, make
from harness import SHAPE, SLIDING

from miniinfer.config import ConfigError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")

WIDE = {**SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SHAPES = {
    "dense": WIDE,
    "heads of 128": {**WIDE, "head_dim": 128},
    "sliding": {**WIDE, "architectures": SLIDING["architectures"], "sliding_window": 24},
    "experts": {
        **WIDE, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128,
        "norm_topk_prob": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("name", SHAPES)
def test_same_bits_in_every_situation(name: str, page_size: int, tmp_path: Path) -> None:
    check(tmp_path, SHAPES[name], device="cuda", dtype="bfloat16", page_size=page_size, num_pages=200)


def test_fp32_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="deterministic: no product .* float32"):
        make(tmp_path, WIDE, device="cuda", dtype="float32", page_size=64, num_pages=50)
