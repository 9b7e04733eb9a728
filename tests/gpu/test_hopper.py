"""The engine over the kernels for Hopper, which take 16-bit numbers in pages of 64 tokens: against plain torch, and graphs against eager steps."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import SLIDING, VOCAB, WIDE, WIDE_MOE, Wanted, run

from miniinfer.batch import Batch
from miniinfer.config import EngineConfig
from miniinfer.data import SamplingParams
from miniinfer.engine.core import EngineCore
from miniinfer.kernels import REFERENCE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")

BIASED = {**WIDE, "architectures": ["Qwen2ForCausalLM"], "num_attention_heads": 14}
SHAPES = {
    "heads of 128": WIDE,
    "heads of 64, tied": {**WIDE, "head_dim": 64, "num_attention_heads": 16, "tie_word_embeddings": True},
    "biases": BIASED,
    "products in a chain": BIASED,
    "window": {**WIDE, "architectures": SLIDING["architectures"], "sliding_window": 100},
    "experts": WIDE_MOE,
}
SIZES = (1, 7, 64, 65, 150, 300, 30, 2)


@pytest.fixture(autouse=True)
def chained(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of products are for weights far larger than these."""
    from miniinfer.kernels.triton import chain_hopper

    if request.node.callspec.params["name"] == "products in a chain":
        monkeypatch.setattr(chain_hopper, "LEAST", 0)


def make(folder: Path, shape: dict[str, Any], **options: Any) -> EngineCore:
    """The same random weights each time, large enough that every token depends on the whole context."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    wanted = {"load_format": "dummy", "dtype": "bfloat16", "page_size": 64, "num_pages": 100, "skip_tokenizer_init": True, "max_num_seqs": 16}
    core = EngineCore(EngineConfig(model=str(folder), **{"device": "cuda", **wanted, **options}))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in core.model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.2 * parameter.shape[-1] ** -0.5)
    return core


def requests(sizes: tuple[int, ...], length: int = 24) -> list[Wanted]:
    rng = random.Random(2)
    prompts = [[rng.randrange(8, VOCAB) for _ in range(size)] for size in sizes]
    return [Wanted(p, SamplingParams(temperature=0.8, seed=i, max_tokens=length, logprobs=0, ignore_eos=True)) for i, p in enumerate(prompts)]


def outcome(core: EngineCore, wanted: list[Wanted], prefix: str, stagger: int = 0) -> list[Any]:
    return [(g.tokens, [t.logprobs for t in g.logprobs]) for g in run(core, wanted, stagger=stagger, prefix=prefix)]


@pytest.mark.parametrize("name", SHAPES)
def test_against_plain_torch(name: str, tmp_path: Path) -> None:
    """Prompts whole and in chunks, beside decodes, several runs over so that graphs are replayed: the log-probabilities of what was drawn."""
    wanted, limit = requests(SIZES), 0.5 if name == "experts" else 0.03  # bf16 costs 0.01, but another choice of experts far more; wrong weights: 1.4
    model = make(tmp_path, SHAPES[name], kernels="reference", enforce_eager=True).model
    for options in ({}, {"max_num_batched_tokens": 40, "enable_prefix_caching": False}):
        core = make(tmp_path, SHAPES[name], **options)
        for turn in range(3):
            for (tokens, found), asked in zip(outcome(core, wanted, f"{turn}", stagger=2), wanted, strict=True):
                with torch.inference_mode():
                    logits = model.logits(model(Batch.packed([asked.prompt + tokens[:-1]], REFERENCE, core.runner.device)))
                right = logits[len(asked.prompt) - 1 :].float().log_softmax(-1).gather(1, torch.tensor(tokens, device=logits.device)[:, None])
                off = (torch.tensor(found, device=logits.device) - right).abs()
                assert off.mean() < limit, f"{options}, turn {turn}, prompt of {len(asked.prompt)}: {off.mean():.3f} off, at most {off.max():.3f}"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("count", [1, 4, 8])
def test_graphs_are_bitwise_eager(name: str, count: int, tmp_path: Path) -> None:
    """Decode steps at sizes that need no padding, behind prompts that fill theirs; again once everything is captured."""
    wanted = requests((64,) * count)
    options = {"enable_prefix_caching": False}
    eager = outcome(make(tmp_path, SHAPES[name], enforce_eager=True, **options), wanted, "eager")
    core = make(tmp_path, SHAPES[name], **options)
    for turn in range(3):
        assert outcome(core, wanted, f"{turn}") == eager
    assert core.runner.graphs.captured


@pytest.mark.parametrize("name", SHAPES)
def test_many_at_once_repeat_bitwise(name: str, tmp_path: Path) -> None:
    """A race between kernels that overlap shows as a bit that differs from one run to the next."""
    core = make(tmp_path, SHAPES[name], max_num_seqs=64, num_pages=400, enable_prefix_caching=False)
    wanted = requests(tuple(random.Random(4).choices(range(1, 200), k=60)), length=40)
    runs = [outcome(core, wanted, f"{turn}") for turn in range(4)]
    assert all(each == runs[-1] for each in runs[1:])
