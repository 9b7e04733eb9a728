"""The feature matrix: every pair of features, run together through the engine, must give the tokens of naive generation.

Owns the features as data and the one check; tests/cpu/test_matrix.py and tests/gpu/test_matrix.py run it and keep docs/matrix.md true.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import msgspec
from harness import HYBRID, MOE, SHAPE, SLIDING, VOCAB, Got, Wanted, make_core, naive, run

from miniinfer.data import Add, SamplingParams, StructuredOutputsParams
from miniinfer.engine.core import EngineCore


@dataclass(frozen=True)
class Feature:
    """What switching a feature on changes: the model's shape, the engine's options, the requests, or how they are run."""

    name: str
    shape: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    stagger: int = 0
    cached: bool = False  # run an earlier request that shares its prefix first
    pinned: bool = False  # pin that prefix
    slept: bool = False  # sleep and wake up before the requests come
    preempted: bool = False  # and prove that a preemption happened
    priorities: bool = False
    gpu: bool = False  # on GPUs only
    cpu: bool = False  # on CPUs only


FEATURES = [
    Feature("chunked prefill", options={"max_num_batched_tokens": 16}),
    Feature("cached prefix", cached=True),
    Feature("no prefix cache", options={"enable_prefix_caching": False}),
    Feature("pinned prefix", pinned=True),
    Feature("after sleep", options={"enable_sleep_mode": True}, slept=True),
    Feature("preemption", options={"max_num_seqs": 8}, preempted=True),
    Feature("overlapped loop", options={"overlap": 1}),
    Feature("staggered arrivals", stagger=2),
    Feature("priorities", priorities=True),
    Feature("sliding window", shape=SLIDING),
    Feature("hybrid windows", shape=HYBRID),
    Feature("mixture of experts", shape=MOE),
    Feature("n > 1", params={"n": 3}),
    Feature("seeded sampling", params={"temperature": 0.9}),
    Feature("top-k, top-p, min-p", params={"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.02}),
    Feature("penalties", params={"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}),
    Feature("bias, min_tokens", params={"logit_bias": {5: 3.0, 9: -100.0}, "min_tokens": 6}),
    Feature("stop token ids", params={"stop_token_ids": [3, 11, 50]}),
    Feature("logprobs", params={"logprobs": 3}),
    Feature("prompt logprobs", params={"prompt_logprobs": 2}),
    Feature("structured output", params={"structured_outputs": StructuredOutputsParams(regex="(([a-m]{1,5}|[0-9]{1,3})[ ,])+")}),
    Feature("compiled CPU kernels", options={"kernels": "cpu"}, cpu=True),
    Feature("CUDA graphs", options={"enforce_eager": False}, gpu=True),
]


def pairs(gpu: bool) -> list[tuple[Feature, Feature]]:
    """Every pair that can hold together (two shapes cannot), each feature alone included."""
    usable = [f for f in FEATURES if not (f.cpu if gpu else f.gpu)]
    return [(a, b) for a, b in combinations_with_replacement(usable, 2) if not (a.shape and b.shape and a is not b) and not _exclusive(a, b)]


def _exclusive(a: Feature, b: Feature) -> bool:
    return {a.name, b.name} in ({"cached prefix", "no prefix cache"}, {"pinned prefix", "no prefix cache"})


def check_pair(a: Feature, b: Feature, folder: Path, **base: Any) -> None:
    """Runs both features together and compares every token, finish reason and log-probability with naive generation."""
    features = (a, b)
    options = {"enforce_eager": True, **base}
    params: dict[str, Any] = {"temperature": 0.0}
    for f in features:
        options.update(f.options)
        params.update(f.params)
    if options.get("device", "cpu") == "cpu":
        options.pop("enforce_eager")
    shape = next((f.shape for f in features if f.shape), SHAPE)
    preempted = any(f.preempted for f in features)
    if preempted:  # room for one request at the limit, which is less than six at their ends
        size = options.get("page_size", 8)
        options["num_pages"] = 2 + SHAPE["max_position_embeddings"] // size
    core = make_core(folder, shape, **options)
    rng = random.Random(5)
    shared = [rng.randrange(1, VOCAB) for _ in range(37)]
    wanted = []
    for i in range(6 if preempted else 3):
        prompt = shared[: 37 - 5 * (i % 2)] + [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 30))]
        length = rng.randrange(60, 90) if preempted else rng.randrange(8, 20)
        each = SamplingParams(**{**params, "max_tokens": length, "seed": 1000 * i, "ignore_eos": preempted})
        wanted.append(Wanted(prompt, each, priority=i % 3 if any(f.priorities for f in features) else 0))
    earlier = [Wanted(shared, SamplingParams(temperature=0.0, max_tokens=4))]
    if any(f.slept for f in features):
        run(core, earlier, prefix="before")
        core.sleep(1)
        core.wake_up()
    if any(f.cached for f in features):
        run(core, earlier, prefix="warm")
    pinned = any(f.pinned for f in features)
    if pinned:
        assert not core.add(Add("pin", shared[:32], SamplingParams(temperature=0.0, max_tokens=1), pin=True))
        while core.has_work:
            core.step()
    got = run(core, wanted, stagger=max(f.stagger for f in features))
    expected = [expect(core, shape, w, k) for w in wanted for k in range(w.params.n)]
    each_sample = (w for w in wanted for _ in range(w.params.n))
    for g, e, asked in zip(got, expected, each_sample, strict=True):
        _compare(g, e, asked)
    if any(f.cached or f.pinned for f in features) and params.get("prompt_logprobs") is None:
        assert max(g.cached for g in got) >= 32, "nothing came from the cache"
    if pinned and not preempted:
        pin = core.cache.describe_pins()["pin"]
        assert pin["pages"] == pin["resident"]
    grows = shape is not SLIDING  # a window's pages do not grow with the output, so what was admitted fits to its end
    if preempted and grows and not any(f.params.get("stop_token_ids") for f in features):
        assert core.stats()["preemptions"] > 0, "the scenario did not preempt"
    core.cache.reset()
    core.scheduler.check()
    assert not core.has_work


_EXPECTED: dict[tuple[Any, ...], Got] = {}


def expect(core: EngineCore, shape: dict[str, Any], w: Wanted, sibling: int) -> Got:
    """Naive generation, remembered: many pairs ask the same of the same weights."""
    key = (id(shape), core.runner.device.type, tuple(w.prompt), msgspec.json.encode(w.params), sibling)
    if key not in _EXPECTED:
        _EXPECTED[key] = naive(core, w, sibling)
    return _EXPECTED[key]


def _compare(got: Got, expected: Got, wanted: Wanted) -> None:
    assert got.tokens == expected.tokens
    assert got.finish == expected.finish
    if wanted.params.logprobs is not None:
        assert len(got.logprobs) == len(got.tokens)
        for at, token, value in zip(got.logprobs, expected.tokens, expected.logprobs, strict=True):
            assert at.token_ids[0] == token and abs(at.logprobs[0] - value) < 1e-3
            assert sorted(at.logprobs[1:], reverse=True) == at.logprobs[1:] and len(at.token_ids) == 1 + wanted.params.logprobs
    if wanted.params.prompt_logprobs is not None:
        assert got.prompt_logprobs is not None and expected.prompt_logprobs is not None
        assert len(got.prompt_logprobs) == len(wanted.prompt) - 1
        for at, token, value in zip(got.prompt_logprobs, wanted.prompt[1:], expected.prompt_logprobs, strict=True):
            assert at.token_ids[0] == token and abs(at.logprobs[0] - value) < 1e-3


def render(checked: set[tuple[str, str]]) -> str:
    """docs/matrix.md from the pairs that were checked."""
    names = [f.name for f in FEATURES]
    gpu, cpu = {f.name for f in FEATURES if f.gpu}, {f.name for f in FEATURES if f.cpu}
    lines = [
        "# Which features hold together",
        "",
        "Generated by `tests/cpu/test_matrix.py` (rewrite with `pytest tests/cpu/test_matrix.py --update-docs`).",
        "`yes`: both features were on in one engine, and every token, finish reason and log-probability equalled naive generation",
        "(no cache, no batching, the whole sequence recomputed per token). `GPU`: checked by `tests/gpu/test_matrix.py` only.",
        "`-`: the two exclude each other. The diagonal is the feature alone.",
        "",
        "| | " + " | ".join(str(i + 1) for i in range(len(names))) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for i, a in enumerate(names):
        cells = []
        for b in names[: i + 1]:
            device = "GPU" if a in gpu or b in gpu else "-"
            cells.append("yes" if (b, a) in checked else "-" if {a, b} & cpu and {a, b} & gpu else device)
        lines.append(f"| {i + 1} {a} | " + " | ".join(cells + [""] * (len(names) - i - 1)) + " |")
    return "\n".join(lines) + "\n"
