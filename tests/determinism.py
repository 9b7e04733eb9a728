"""`--deterministic`: the same request gives bitwise the same tokens and log-probabilities in every situation. Owns the situations and the check;
tests/cpu/test_deterministic.py and tests/gpu/test_deterministic.py run it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from harness import VOCAB, Got, Wanted, run

from miniinfer.config import EngineConfig
from miniinfer.data import SamplingParams
from miniinfer.engine.core import EngineCore

LONGEST = 160
ALONE = {"enable_prefix_caching": False}
SITUATIONS: dict[str, dict[str, Any]] = {
    "together": {**ALONE},
    "small chunks": {**ALONE, "max_num_batched_tokens": 18},
    "odd chunks": {**ALONE, "max_num_batched_tokens": 31, "max_num_seqs": 5},
    "overlapped": {"overlap": 1, "max_num_batched_tokens": 50},
    "cached": {},
    "few pages": {"max_num_seqs": 8, "pages": 1.4},
}


def requests(page_size: int) -> list[Wanted]:
    """Prompts of 1, 2, 3 and more tokens, some the beginnings of others; greedy and sampled, one with prompt log-probabilities. Outputs of short
    ones go on into a second page, so that where pages are few they preempt each other."""
    rng = random.Random(3)
    shared = [rng.randrange(1, VOCAB) for _ in range(80)]
    sizes = [1, 2, 3, 16, 17, 33, 50, 64, 80, 1, 34]
    wanted = []
    for i, size in enumerate(sizes):
        own = [rng.randrange(1, VOCAB) for _ in range(i % 4)] if i > 5 else []
        longer = max(0, page_size - 16) if size <= 34 else 0
        params = SamplingParams(
            temperature=0.8 * (i % 2), top_k=20 * (i % 3 == 0), seed=i, max_tokens=24 + i + longer, ignore_eos=True,
            logprobs=2, prompt_logprobs=1 if i == 6 else None,
        )  # fmt: skip
        wanted.append(Wanted(shared[:size] + own, params))
    return wanted


def make(folder: Path, shape: dict[str, Any], **options: Any) -> EngineCore:
    """An engine over the same random weights each time."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    if fraction := options.pop("pages", None):  # of the longest request
        options["num_pages"] = 2 + int(fraction * LONGEST / options["page_size"])
    defaults = {"max_num_seqs": 16, "cpu_kv_gib": 0.02, "max_model_len": LONGEST, "deterministic": True}
    return EngineCore(EngineConfig(model=str(folder), load_format="dummy", **{**defaults, **options}))


def check(folder: Path, shape: dict[str, Any], **options: Any) -> None:
    """Runs every request alone, then all of them in each situation, and compares bit by bit."""
    wanted = requests(options["page_size"])
    core = make(folder, shape, **{**options, **ALONE})
    alone = [run(core, [w])[0] for w in wanted]
    assert len({tuple(g.tokens) for g in alone}) > 6, "the model says the same to everything: a difference would not show"
    for name, situation in SITUATIONS.items():
        core = make(folder, shape, **{**options, **situation})
        for turn in ("first", "again") if name == "cached" else ("first",):
            _compare(run(core, wanted, prefix=turn), alone, f"{name}, {turn}")
        if name == "cached":
            _next_turn(core, wanted[8], alone[8], make(folder, shape, **{**options, **ALONE}))
            assert core.stats()["prefix_hits"] > 0, "nothing came from the cache"
        if name == "few pages" and not shape.get("sliding_window"):
            assert core.stats()["preemptions"] > 0, "the situation did not preempt"


def _next_turn(core: EngineCore, first: Wanted, answer: Got, fresh: EngineCore) -> None:
    """A conversation's next prompt holds what was generated before, as prompt now: cached or not, the same bits."""
    later = Wanted(first.prompt + answer.tokens + [5, 6], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=2))
    _compare(run(core, [later], prefix="next"), run(fresh, [later]), "next turn")


def _compare(got: list[Got], alone: list[Got], where: str) -> None:
    for i, (g, a) in enumerate(zip(got, alone, strict=True)):
        assert g.tokens == a.tokens, f"{where}: request {i} got other tokens"
        assert g.logprobs == a.logprobs, f"{where}: request {i} got other log-probabilities"
        assert g.prompt_logprobs == a.prompt_logprobs, f"{where}: request {i} got other prompt log-probabilities"
