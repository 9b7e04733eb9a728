"""The engine on a GPU: graphs against eager, overlapped against synchronous, cached against cold, in bf16 with the GPU kernels."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from harness import HYBRID, MOE, SHAPE, VOCAB, Wanted, make_core, run

from miniinfer.config import ConfigError
from miniinfer.data import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BASE = {"device": "cuda", "kernels": "triton", "page_size": 16, "num_pages": 400}


def requests(count: int, length: int = 24, size: int = 33) -> list[Wanted]:
    rng = random.Random(1)
    prompts = [[rng.randrange(1, VOCAB) for _ in range(size)] for _ in range(count)]
    return [Wanted(p, SamplingParams(temperature=0.8, seed=i, max_tokens=length, logprobs=2, ignore_eos=True)) for i, p in enumerate(prompts)]


def outcome(got: list) -> list:
    return [(g.tokens, [t.logprobs for t in g.logprobs]) for g in got]


@pytest.mark.parametrize("shape", [SHAPE, HYBRID, MOE], ids=["dense", "hybrid", "moe"])
@pytest.mark.parametrize("count", [1, 4, 8])
def test_graph_is_bitwise_eager(tmp_path: Path, shape: dict, count: int):
    """At batch sizes that need no padding both run the same kernels on the same shapes."""
    eager = run(make_core(tmp_path, shape, enforce_eager=True, **BASE), requests(count))
    core = make_core(tmp_path, shape, **BASE)
    graph = run(core, requests(count))
    assert core.runner.graphs.captured
    assert outcome(graph) == outcome(eager)


def test_padding_to_a_bucket_changes_no_token(tmp_path: Path):
    eager = run(make_core(tmp_path, enforce_eager=True, **BASE), requests(11))
    graph = run(make_core(tmp_path, **BASE), requests(11))
    assert [g.tokens for g in graph] == [g.tokens for g in eager]


def test_overlapped_is_bitwise_synchronous(tmp_path: Path):
    sync = run(make_core(tmp_path, overlap=0, **BASE), requests(8))
    overlapped = run(make_core(tmp_path, overlap=1, **BASE), requests(8))
    assert outcome(overlapped) == outcome(sync)


def test_cached_is_bitwise_cold_at_equal_shapes(tmp_path: Path):
    rng = random.Random(3)
    prefix, tail = ([rng.randrange(1, VOCAB) for _ in range(n)] for n in (70, 9))
    params = SamplingParams(temperature=0.7, seed=4, max_tokens=12, logprobs=5, ignore_eos=True)
    options = {**BASE, "max_num_batched_tokens": 70}
    cold = run(make_core(tmp_path, **options), [Wanted(prefix + tail, params)])
    core = make_core(tmp_path, **options)
    other = [tail[0] % (VOCAB - 1) + 1, *tail[1:]]
    run(core, [Wanted(prefix + other, SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))], prefix="warm")
    warm = run(core, [Wanted(prefix + tail, params)])
    assert warm[0].cached == 70
    assert outcome(warm) == outcome(cold)


def test_the_same_run_repeats_bitwise(tmp_path: Path):
    first, second = (outcome(run(make_core(tmp_path, MOE, **BASE), requests(20), stagger=1)) for _ in range(2))
    assert first == second


def test_too_little_memory_is_one_clear_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        make_core(tmp_path, **{**BASE, "num_pages": None, "gpu_memory_utilization": 1e-4})
