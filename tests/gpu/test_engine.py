"""The engine on a GPU: graphs against eager, overlapped against synchronous, cached against cold, in bf16 with the GPU kernels."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest
import torch
from harness import HYBRID, MOE, SHAPE, VOCAB, Wanted, make_core, run

from miniinfer.config import ConfigError
from miniinfer.data import SamplingParams
from miniinfer.engine import graphs
from miniinfer.engine.graphs import DRAW, HIDDEN, Graphs, Shape

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
    eager = run(make_core(tmp_path, shape, enforce_eager=True, **BASE), requests(count, size=32))
    core = make_core(tmp_path, shape, **BASE)
    graph = run(core, requests(count, size=32))
    assert core.runner.graphs.captured
    assert outcome(graph) == outcome(eager)


def test_padding_to_a_bucket_changes_no_token(tmp_path: Path):
    eager = run(make_core(tmp_path, enforce_eager=True, **BASE), requests(11))
    graph = run(make_core(tmp_path, **BASE), requests(11))
    assert [g.tokens for g in graph] == [g.tokens for g in eager]


@pytest.mark.parametrize("shape", [SHAPE, HYBRID, MOE], ids=["dense", "hybrid", "moe"])
def test_graphs_of_prompts(tmp_path: Path, shape: dict):
    """Whether a step is computed eagerly, captured or replayed changes no bit; nor do padding tokens and sequences, for the tokens."""
    options = {**BASE, "enable_prefix_caching": False}
    wanted = [w for size in (19, 40, 7) for w in requests(3, length=6, size=size)]
    drawn = [Wanted(w.prompt, SamplingParams(temperature=0.8, seed=7, max_tokens=6, ignore_eos=True)) for w in wanted]
    core = make_core(tmp_path, shape, **options)
    for each in (wanted, drawn):  # graphs that end with hidden states, and with tokens
        eager = run(make_core(tmp_path, shape, enforce_eager=True, **options), each, stagger=1)
        times = [outcome(run(core, each, stagger=1, prefix=f"{i}")) for i in range(3)]
        assert times[1] == times[0] and times[2] == times[0]
        assert [tokens for tokens, _ in times[0]] == [g.tokens for g in eager]
    shapes = list(core.runner.graphs.captured)
    assert {s.ending for s in shapes if s.max_query > 1} == {HIDDEN, DRAW}
    assert any(s.max_query > 1 and s.sequences > 1 for s in shapes)


def test_graphs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    core = make_core(tmp_path, **BASE)
    many = run(core, requests(9), stagger=2)
    assert 0 < len(core.runner.graphs.captured) <= 2
    assert [g.tokens for g in many] == [g.tokens for g in run(make_core(tmp_path, enforce_eager=True, **BASE), requests(9), stagger=2)]


def test_a_profile_shows_the_gpu(tmp_path: Path):
    core = make_core(tmp_path / "model", profile=str(tmp_path / "profiles"), **BASE)
    run(core, requests(4, length=40))
    core.control("start_profile")
    run(core, requests(4, length=40), prefix="again")
    figures = core.control("stop_profile")
    gpu = figures["gpu"]
    assert figures["steps"] >= 40 and 0 < gpu["busy"] <= 1 and len(figures["top"]) > 5
    assert 0 <= gpu["gap_us"]["median"] <= gpu["gap_us"]["longest"] and gpu["span_us"] > 0


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


def test_a_garbage_collection_never_ends_a_capture() -> None:
    """Graphs that only a cycle still holds, as those of an engine that is gone, are freed by the collector whenever it comes."""

    def step(shape: Shape) -> torch.Tensor:
        for _ in range(3000):  # containers that live: enough for collections of every generation
            kept.append([])
        return number * 2

    kept: list[list[int]] = []
    number = torch.ones(1, device="cuda")
    threshold = gc.get_threshold()
    gc.collect()
    gc.set_threshold(100, 1, 1)
    try:
        for _ in range(3):
            gone = Graphs(lambda shape: number * 2, 8, 0, 64, True)
            gone.run(Shape(1, 1, 1, 64, DRAW))
            cycle: list[object] = [gone]
            cycle.append(cycle)
            del gone, cycle
            graphs_now = Graphs(step, 8, 0, 64, True)
            graphs_now.run(Shape(1, 1, 1, 64, DRAW))
            assert graphs_now.run(Shape(1, 1, 1, 64, DRAW)).item() == 2 and gc.isenabled()
    finally:
        gc.set_threshold(*threshold)
