"""The engine as a whole on a tiny model: ways of computing that must not change the answer, and requests that must leave nothing behind."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from harness import HYBRID, SHAPE, VOCAB, Wanted, make_core, naive, run

from miniinfer.config import ConfigError
from miniinfer.data import Add, SamplingParams
from miniinfer.engine import runner
from miniinfer.engine.graphs import Graphs


def some_requests(count: int, seed: int = 0, length: int = 20, **params) -> list[Wanted]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 60))] for _ in range(count)]
    return [Wanted(p, SamplingParams(**{"temperature": 0.8, "seed": i, "max_tokens": length, **params})) for i, p in enumerate(prompts)]


def test_overlapped_loop_gives_the_tokens_of_the_synchronous_one(tmp_path: Path):
    wanted = some_requests(24, logprobs=1)
    sync = run(make_core(tmp_path, overlap=0, max_num_batched_tokens=64), wanted, stagger=2)
    overlapped = run(make_core(tmp_path, overlap=1, max_num_batched_tokens=64), wanted, stagger=2)
    for a, b in zip(sync, overlapped, strict=True):
        assert (a.tokens, a.finish) == (b.tokens, b.finish)


@pytest.mark.parametrize("shape", [SHAPE, HYBRID], ids=["full", "hybrid"])
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("shared", [40, 37], ids=["whole pages", "inside a page"])
def test_cached_prefix_is_bitwise_the_cold_answer(tmp_path: Path, shape: dict, shared: int, overlap: int):
    """At equal batch shapes: the cold run computes `shared` tokens in its first chunk, the warm one finds exactly those in the cache."""
    rng = random.Random(3)
    prefix, tail, other = ([rng.randrange(1, VOCAB) for _ in range(n)] for n in (shared, 9, 9))
    other[0] = tail[0] + 1 if tail[0] + 1 < VOCAB else 1  # the two prompts part exactly behind the prefix
    params = SamplingParams(temperature=0.7, seed=4, max_tokens=12, logprobs=5, ignore_eos=True)
    options = {"overlap": overlap, "max_num_batched_tokens": shared}
    cold = run(make_core(tmp_path, shape, **options), [Wanted(prefix + tail, params)])[0]
    core = make_core(tmp_path, shape, **options)
    run(core, [Wanted(prefix + other, SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))], prefix="warm")
    warm = run(core, [Wanted(prefix + tail, params)])[0]
    assert (cold.cached, warm.cached) == (0, shared)
    assert warm.tokens == cold.tokens
    assert [t.logprobs for t in warm.logprobs] == [t.logprobs for t in cold.logprobs]  # exactly, not nearly


def test_a_conversation_reuses_its_generated_tokens(tmp_path: Path):
    core = make_core(tmp_path)
    first = Wanted(list(range(1, 30)), SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True))
    answer = run(core, [first])[0].tokens
    follow = Wanted(first.prompt + answer + [5, 6, 7], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    got = run(core, [follow], prefix="second")[0]
    assert got.cached >= len(first.prompt) + len(answer) - 1  # the last sampled token was never computed
    assert got.tokens == naive(core, follow).tokens


@pytest.mark.parametrize("overlap", [0, 1])
def test_preempted_requests_give_the_same_tokens(tmp_path: Path, overlap: int):
    wanted = some_requests(10, length=90, ignore_eos=True)
    roomy = run(make_core(tmp_path, overlap=overlap), wanted)
    core = make_core(tmp_path, overlap=overlap, num_pages=66)
    tight = run(core, wanted)
    assert core.stats()["preemptions"] > 0
    assert [g.tokens for g in tight] == [g.tokens for g in roomy]


def test_siblings_share_the_prompt(tmp_path: Path):
    core = make_core(tmp_path)
    prompt = list(range(1, 42))
    got = run(core, [Wanted(prompt, SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=8, ignore_eos=True))])
    assert [g.cached for g in got[1:]] == [40, 40, 40]  # all but the token that must be computed for its logits
    assert len({tuple(g.tokens) for g in got}) == 4


@pytest.mark.parametrize("overlap", [0, 1])
def test_abort_frees_everything_at_once(tmp_path: Path, overlap: int):
    core = make_core(tmp_path, overlap=overlap, enable_prefix_caching=False, max_num_batched_tokens=32, max_num_seqs=4)
    free = core.scheduler.num_free_pages
    for i, w in enumerate(some_requests(8)):
        core.add(Add(str(i), w.prompt, w.params))
    for _ in range(5):
        core.step()
    ended = core.abort([str(i) for i in range(8)] + ["unknown"])
    assert all(u.finish_reason == "abort" for u in ended)
    assert core.scheduler.num_free_pages == free
    assert not core.scheduler.has_work
    core.scheduler.check()
    assert core.step() == []  # the step in flight: its results belong to nobody
    assert not core.has_work


def test_a_request_that_can_never_run_is_refused_alone(tmp_path: Path):
    core = make_core(tmp_path)
    refused = core.add(Add("long", [1] * 600, SamplingParams()))
    assert refused[0].finish_reason == "error" and "max_model_len" in (refused[0].error or "")
    assert core.add(Add("empty", [], SamplingParams()))[0].finish_reason == "error"
    assert run(core, some_requests(1))[0].finish


def test_stats_and_control(tmp_path: Path):
    core = make_core(tmp_path)
    run(core, some_requests(3))
    stats = core.control("stats")
    assert stats["running"] == 0 and stats["generated_tokens"] > 0
    assert core.control("check") and core.control("reset_prefix_cache")
    with pytest.raises(ValueError, match="unknown command"):
        core.control("dance")


@pytest.mark.parametrize("limit", [1, 3, 4, 33, 470, 4096, 6300])
def test_sizes_of_graphs_waste_little_and_keep_kernels_classes(limit: int):
    graphs = Graphs(lambda shape: torch.zeros(1), 200, limit, 1000, True)
    for tokens in range(2, limit + 1):
        padded, sequences = graphs.pad(tokens, 1) or (0, 0)
        assert tokens <= padded <= max(tokens * 5 // 4 if tokens > 128 else 2 * tokens - 1, 4) and padded <= limit and sequences == 1
        assert (padded <= 32) == (tokens <= 32)
    assert graphs.pad(limit + 2, 1) is None
    for sequences in range(2, 201):
        same, _ = graphs.pad(sequences, sequences) or (0, 0)
        assert sequences <= same <= 200
        if sequences < limit:
            assert sequences <= (graphs.pad(sequences + 1, sequences) or (0, 0))[1] <= min(2 * sequences, 200)


def test_too_little_memory_is_one_clear_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="cpu_kv_gib.*max_model_len"):
        make_core(tmp_path, cpu_kv_gib=1e-6)
    with pytest.raises(ConfigError, match="num_pages"):
        make_core(tmp_path, num_pages=3)


def test_the_same_seed_repeats_in_any_company(tmp_path: Path):
    alone = some_requests(1, seed=9, ignore_eos=True)
    core = make_core(tmp_path)
    first = run(core, alone)[0].tokens
    assert run(core, alone + some_requests(7, seed=10), prefix="b")[0].tokens == first


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("filtered", [False, True])
def test_logits_that_are_not_finite_end_their_request_alone(tmp_path: Path, overlap: int, filtered: bool):
    """One token's embedding is NaN: whoever reads it ends with an error at once, in whatever company; pages that had NaN in them serve others."""
    bad = 77
    core = make_core(tmp_path, overlap=overlap, max_num_batched_tokens=64, num_pages=66, max_num_seqs=8)
    more = {"top_k": 20, "top_p": 0.9} if filtered else {}
    healthy = some_requests(12, ignore_eos=True, logit_bias={bad: -100.0}, logprobs=1, **more)
    for w in healthy:
        w.prompt = [token if token != bad else 1 for token in w.prompt]
    undisturbed = run(core, healthy)
    core.cache.reset()
    with torch.no_grad():
        core.model.embed.weight[bad] = float("nan")
    start = list(range(1, 20))  # shared by those who read it and those who do not
    reads = Wanted([*start, bad, 5], SamplingParams(max_tokens=9, logprobs=2, **more))
    writes = Wanted([*start, 5], SamplingParams(max_tokens=9, logprobs=2, ignore_eos=True, logit_bias={bad: 100.0}, **more))
    mixed = [w for each in healthy for w in (reads, each, writes)]
    got = run(core, mixed, stagger=1, prefix="mixed")
    for first, one, second in zip(got[0::3], got[1::3], got[2::3], strict=True):
        assert (first.tokens, first.finish) == ([], "error")
        assert (second.tokens, second.finish) == ([bad], "error") and len(second.logprobs) == 1
        assert one.finish == "length"
    assert [g.tokens for g in got[1::3]] == [g.tokens for g in undisturbed]
    assert [g.tokens for g in run(core, healthy, prefix="after")] == [g.tokens for g in undisturbed]
    assert core.scheduler.add(Add("again", [bad], SamplingParams()), 0.0) is None and not core.abort(["unknown"])
    (ended,) = [u for _ in range(4) for u in core.step() if u.finish_reason]
    assert ended.error == "the model's logits were not finite (NaN or infinity)"


def test_logits_are_made_in_parts_without_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows that need fp32 logits come three at a time; log-probabilities of prompts too."""
    each = [{"logprobs": 2}, {"presence_penalty": 1.5, "logprobs": 0}, {"logit_bias": {5: 3.0}}, {"top_k": 9, "prompt_logprobs": 1}]
    wanted = [w for i, more in enumerate(each * 3) for w in some_requests(1, seed=i, length=8, **more)]
    whole = run(make_core(tmp_path, max_num_seqs=16, max_num_batched_tokens=512), wanted)
    monkeypatch.setattr(runner, "LOGITS_AT_ONCE", 3)
    parts = run(make_core(tmp_path, max_num_seqs=16, max_num_batched_tokens=512), wanted)
    assert [g.tokens for g in parts] == [g.tokens for g in whole]
    for one, other in zip(parts, whole, strict=True):
        for found, right in ((one.logprobs, other.logprobs), (one.prompt_logprobs or [], other.prompt_logprobs or [])):
            assert [t and t.token_ids for t in found] == [t and t.token_ids for t in right]
            values = [[v for t in some if t for v in t.logprobs] for some in (found, right)]
            assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_no_accepted_parameter_makes_logits_that_are_not_finite(tmp_path: Path):
    """The least and the most of each, together with those that multiply it."""
    least = 5e-324
    extremes = [
        {"repetition_penalty": least},
        {"repetition_penalty": least, "temperature": least},
        {"repetition_penalty": least, "temperature": 1e-5, "frequency_penalty": -2, "presence_penalty": -2, "logit_bias": {5: 100}},
        {"repetition_penalty": 100, "temperature": 100, "frequency_penalty": 2, "logit_bias": {5: -100}},
        {"top_p": least, "min_p": least, "temperature": 1e-5},
        {"top_p": least, "min_p": 1.0, "top_k": 2**31 - 1, "temperature": 100},
    ]
    wanted = [w for each in extremes for w in some_requests(2, ignore_eos=True, logprobs=1, **each)]
    assert [got.finish for got in run(make_core(tmp_path), wanted)] == ["length"] * len(wanted)
