"""Start-up on a GPU: weights through pinned buffers, and the dry run that finds the kernels to compile."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from harness import HYBRID, MOE, SHAPE, VOCAB, Wanted, make_core, run
from tiny import tiny_folder

from miniinfer.config import ModelConfig
from miniinfer.data import SamplingParams
from miniinfer.engine import start
from miniinfer.models.registry import build
from miniinfer.models.weights import load

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BASE = {"device": "cuda", "kernels": "triton", "page_size": 16, "num_pages": 400}


@pytest.mark.parametrize("piece", [1000, 8 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_arrive_as_on_the_cpu(piece: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces smaller than tensors send each buffer round many times: one read into too early would show."""
    folder = tiny_folder("qwen3_moe", tmp_path)
    monkeypatch.setattr("miniinfer.models.weights._PIECE", piece)
    shape = ModelConfig.from_folder(folder)
    models = [build(shape, dtype, device) for device in ("cpu", "cuda")]
    for model in models:
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(torch.nan)
        load(model, folder)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(*(model.parameters() for model in models), strict=True))


@pytest.mark.parametrize("shape", [SHAPE, HYBRID, MOE], ids=["dense", "hybrid", "moe"])
def test_a_rehearsal_changes_nothing(shape: dict, tmp_path: Path) -> None:
    runner = make_core(tmp_path, shape, **BASE).runner
    rows = runner.rows
    for tensor in (*(t for pair in runner.caches for t in pair), rows.tokens, runner.ids, runner.lengths, *runner.slots):
        tensor.fill_(1)
    state = [
        *(t for pair in runner.caches for t in pair),
        rows.tokens,
        rows.params,
        *rows.page_tables,
        rows.turns,
        runner.ids,
        runner.lengths,
        *runner.slots,
    ]
    before = [t.clone() for t in state]
    start.rehearse(runner)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_little_is_left_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, mixed and decode steps, filters, penalties and copied pages meet only kernels that start-up has compiled."""
    import triton

    core = make_core(tmp_path, SHAPE, **BASE)
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda src, **_: compiled.append(src.name))
    rng = random.Random(3)
    kinds = ({}, {"top_p": 0.9}, {"presence_penalty": 0.5}, {"top_k": 5, "repetition_penalty": 1.1})
    prefix = [rng.randrange(1, VOCAB) for _ in range(40)]
    wanted = [
        Wanted(
            [*prefix, *(rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 40)))],
            SamplingParams(max_tokens=rng.randrange(1, 20), **kinds[i % 4]),
        )
        for i in range(24)
    ]
    run(core, wanted)
    assert compiled == []
