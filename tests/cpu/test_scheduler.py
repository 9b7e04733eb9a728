"""The scheduler's rules by hand-made cases, on a device that samples what the test says; random ones are in test_scheduler_fuzz.py."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from miniinfer.cache.manager import CacheManager
from miniinfer.data import Add, Admission, SamplingParams, SequenceUpdate, StepPlan, StepResult, TokenLogprobs
from miniinfer.engine.scheduler import Scheduler

S = 4
EOS = 0


def make(pages: int = 101, seqs: int = 8, budget: int = 64, length: int = 200, kinds: tuple[int, ...] = (0,), enabled: bool = True) -> Scheduler:
    cache = CacheManager(kinds, [pages] * len(kinds), S, enabled)
    return Scheduler(cache, max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=length, eos_token_ids=(EOS,), seed=7)


def prompt(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def add(scheduler: Scheduler, name: str, tokens: list[int], now: float = 0.0, priority: int = 0, group: str | None = None, **params) -> None:
    params.setdefault("max_tokens", 4)
    assert scheduler.add(Add(name, tokens, SamplingParams(**params), priority=priority, group=group), now) is None


def result(plan: StepPlan, token: int = 9) -> StepResult:
    return StepResult(plan.step, [[token] if sample else [] for sample in plan.samples])


def step(scheduler: Scheduler, token: int = 9) -> tuple[StepPlan, list[SequenceUpdate]]:
    plan = scheduler.schedule()
    assert plan is not None
    updates = scheduler.apply(plan, result(plan, token))
    scheduler.check()
    return plan, updates


def finish(scheduler: Scheduler, watch: Callable[[StepPlan], None] = lambda plan: None) -> dict[str, list[int]]:
    """Runs to the end; tokens per request, in order of finishing."""
    tokens: dict[str, list[int]] = {}
    ended: dict[str, list[int]] = {}
    while scheduler.has_work:
        plan, updates = step(scheduler)
        watch(plan)
        for update in updates:
            tokens.setdefault(update.id, []).extend(update.token_ids)
            if update.finish_reason:
                ended[update.id] = tokens[update.id]
    return ended


def running(scheduler: Scheduler) -> list[str]:
    return [request.id for request in scheduler._running]


def test_a_request_from_prompt_to_end() -> None:
    scheduler = make(budget=8)
    add(scheduler, "a", prompt(10, 11), max_tokens=2, seed=5, stop_token_ids=[3])
    assert scheduler.has_work
    plan, updates = step(scheduler)
    assert (plan.rows, plan.starts, plan.counts, plan.samples, updates) == ([0], [0], [8], [False], [])
    (init,) = plan.inits
    assert (init.row, init.tokens, init.prompt_len, init.seed, init.stop_ids) == (0, prompt(10, 11), 11, 5, [EOS, 3])
    assert [(kind, row, index) for kind, row, index, _ in plan.page_entries] == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]
    plan, updates = step(scheduler)
    assert (plan.starts, plan.counts, plan.samples, plan.inits, plan.page_entries) == ([8], [3], [True], [], [])
    assert updates == [SequenceUpdate("a", [9], admission=Admission(0.0))]
    plan, updates = step(scheduler)
    assert (plan.starts, plan.counts) == ([11], [1])
    assert updates == [SequenceUpdate("a", [9], "length")]
    assert not scheduler.has_work and scheduler.schedule() is None
    assert scheduler.num_free_pages == 100
    stats = scheduler.stats()
    assert (stats["prompt_tokens"], stats["generated_tokens"], stats["finished"], stats["kv_usage"]) == (11, 2, 1, 0)


@pytest.mark.parametrize(
    ("params", "sampled", "reason", "stop"),
    [
        ({}, EOS, "stop", None),
        ({"ignore_eos": True}, EOS, None, None),
        ({"stop_token_ids": [5]}, 5, "stop", 5),
        ({"stop_token_ids": [EOS]}, EOS, "stop", None),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, EOS, "stop", EOS),
        ({"min_tokens": 2}, EOS, None, None),
        ({"min_tokens": 1}, EOS, "stop", None),
        ({"max_tokens": 1}, 5, "length", None),
        ({"max_tokens": 1}, EOS, "stop", None),
    ],
)
def test_stop_rules(params: dict, sampled: int, reason: str | None, stop: int | None) -> None:
    scheduler = make()
    add(scheduler, "a", [1, 2], **params)
    (update,) = step(scheduler, sampled)[1]
    assert (update.token_ids, update.finish_reason, update.stop_reason) == ([sampled], reason, stop)


def test_several_tokens_a_step_end_at_the_first_stop() -> None:
    scheduler = make()
    add(scheduler, "a", [1, 2])
    plan = scheduler.schedule()
    assert plan is not None
    (update,) = scheduler.apply(plan, StepResult(plan.step, [[7, EOS, 8]]))
    assert (update.token_ids, update.finish_reason) == ([7, EOS], "stop")


@pytest.mark.parametrize(
    ("tokens", "says"),
    [([], "prompt: must have at least one"), ([1] * 200, "max_model_len"), ([1] * 44, "num_pages"), ([-1], "token ids"), ([2**31], "token ids")],
)
def test_requests_that_can_never_run_are_refused(tokens: list[int], says: str) -> None:
    scheduler = make(pages=12)
    refused = scheduler.add(Add("a", tokens, SamplingParams()), 0.0)
    assert refused is not None and refused.finish_reason == "error" and says in (refused.error or "")
    assert not scheduler.has_work


def test_an_id_in_use_is_refused() -> None:
    scheduler = make()
    add(scheduler, "a", [1])
    refused = scheduler.add(Add("a", [1], SamplingParams()), 0.0)
    assert refused is not None and "already in use" in (refused.error or "")


def test_output_ends_where_context_or_pages_do() -> None:
    scheduler = make(length=10)
    add(scheduler, "a", prompt(1, 6), max_tokens=None)
    assert len(finish(scheduler)["a"]) == 4
    scheduler = make(pages=1 + 3)
    add(scheduler, "a", prompt(1, 6), max_tokens=None)
    assert len(finish(scheduler)["a"]) == 6


def test_decodes_come_before_prompts_and_prompts_in_chunks() -> None:
    scheduler = make(budget=8, seqs=4)
    for name in "ab":
        add(scheduler, name, [ord(name), 1], max_tokens=20)
    step(scheduler)
    add(scheduler, "c", prompt(100, 20), now=-5.0)  # a lower key than the decodes
    plan, updates = step(scheduler)
    assert sorted(plan.counts) == [1, 1, 6] and len(updates) == 2
    add(scheduler, "d", prompt(200, 20))
    plan, updates = step(scheduler)
    assert sorted(plan.counts) == [1, 1, 6] and running(scheduler) == ["c", "a", "b"]


def test_every_running_prompt_moves_even_with_no_budget_to_spare() -> None:
    scheduler = make(budget=2, seqs=2)
    add(scheduler, "a", prompt(0, 7))
    add(scheduler, "b", prompt(50, 7))
    assert set(finish(scheduler)) == {"a", "b"}


def test_priorities_are_seconds_of_arrival() -> None:
    scheduler = make(seqs=1)
    add(scheduler, "late", [1], now=29.0)
    add(scheduler, "low", [2], now=0.0, priority=1)
    add(scheduler, "urgent", [3], now=50.0, priority=-1)
    add(scheduler, "later", [4], now=31.0)
    assert list(finish(scheduler)) == ["urgent", "late", "low", "later"]


def test_who_is_far_behind_is_hardly_felt() -> None:
    scheduler = make(budget=512, seqs=16)
    for i in range(10):
        add(scheduler, f"far {i}", prompt(10 * i, 8), priority=120, max_tokens=20)
    assert sum(step(scheduler)[0].counts) == 80 and sum(step(scheduler)[0].counts) == 10  # alone they have all of it
    add(scheduler, "me", prompt(500, 30), max_tokens=3)
    add(scheduler, "too", prompt(500, 31), max_tokens=3)
    add(scheduler, "far late", prompt(900, 100), priority=120)
    assert sorted(step(scheduler)[0].counts) == [1, 1, 1, 1, 30, 31]  # from the first step on
    for _ in range(2):
        assert step(scheduler)[0].counts == [1] * 6
    plan, _ = step(scheduler)
    assert sum(plan.counts) == 110 and "me" not in running(scheduler)
    assert set(finish(scheduler)) == {f"far {i}" for i in range(10)} | {"far late"}


def test_a_prompt_that_is_far_behind_comes_in_small_pieces() -> None:
    scheduler = make(budget=512)
    add(scheduler, "me", prompt(0, 10), max_tokens=20)
    add(scheduler, "far", prompt(50, 40), priority=120)
    assert [step(scheduler)[0].counts for _ in range(4)] == [[10, 4], [1, 4], [1, 4], [1, 4]]
    add(scheduler, "far too", prompt(200, 40), priority=120)
    assert step(scheduler)[0].counts == [1, 4]
    assert list(finish(scheduler)) == ["far", "me", "far too"]


@pytest.mark.parametrize(("pages", "seqs"), [(101, 3), (1 + 3 * 8, 8)])
def test_who_is_far_behind_gives_its_place_up(pages: int, seqs: int) -> None:
    scheduler = make(pages=pages, seqs=seqs)
    for i in range(3):  # all rows, or all pages
        add(scheduler, f"far {i}", prompt(40 * i, 24), priority=120, max_tokens=16, now=float(i))
    for _ in range(4):
        step(scheduler)
    add(scheduler, "me", prompt(500, 20), max_tokens=9, now=5.0)
    add(scheduler, "near", prompt(600, 4), max_tokens=9, priority=1, now=6.0)
    for _ in range(4):
        step(scheduler)
    assert running(scheduler)[:2] == ["me", "near"] and "far 2" not in running(scheduler)
    ended = finish(scheduler)
    assert len(ended) == 5 and list(ended)[:2] == ["me", "near"]


def test_a_head_that_does_not_fit_is_not_overtaken() -> None:
    scheduler = make(pages=1 + 10)
    add(scheduler, "first", prompt(0, 20), max_tokens=9)
    step(scheduler)
    add(scheduler, "big", prompt(50, 30))
    add(scheduler, "small", prompt(90, 2))
    step(scheduler)
    assert running(scheduler) == ["first"]
    assert list(finish(scheduler)) == ["first", "big", "small"]


def test_preemption_takes_the_highest_key_and_resumes_from_its_own_pages() -> None:
    scheduler = make(pages=1 + 8)
    add(scheduler, "old", prompt(10, 8), now=1.0, max_tokens=18)
    add(scheduler, "young", prompt(50, 8), now=2.0, max_tokens=18)
    resumed = []

    def watch(plan: StepPlan) -> None:
        resumed.extend((init.tokens, plan.starts[plan.rows.index(init.row)]) for init in plan.inits if len(init.tokens) > init.prompt_len)

    ended = finish(scheduler, watch)
    assert ended == {"old": [9] * 18, "young": [9] * 18} and list(ended) == ["old", "young"]
    assert scheduler.stats()["preemptions"] == len(resumed) == 1
    tokens, start = resumed[0]
    assert tokens[:8] == prompt(50, 8) and 0 < start < len(tokens)  # the oldest of its pages survived


def test_abort_frees_at_once_whatever_the_state() -> None:
    scheduler = make(seqs=1)
    add(scheduler, "running", prompt(0, 8))
    add(scheduler, "waiting", prompt(20, 8))
    plan = scheduler.schedule()
    assert plan is not None
    updates = scheduler.abort(["waiting", "running", "nobody"])
    assert [(u.id, u.finish_reason) for u in updates] == [("waiting", "abort"), ("running", "abort")]
    scheduler.check()
    assert not scheduler.has_work and scheduler.num_free_pages == 100
    assert scheduler.apply(plan, result(plan)) == []  # too late
    assert scheduler.schedule() is None


def test_overlap_plans_the_next_token_before_the_last_is_known() -> None:
    scheduler = make()
    add(scheduler, "a", prompt(0, 3), max_tokens=3)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert first is not None and second is not None
    assert (second.starts, second.counts, second.samples) == ([3], [1], [True])
    assert scheduler.apply(first, result(first)) == [SequenceUpdate("a", [9], admission=Admission(0.0))]
    third = scheduler.schedule()
    assert third is not None and third.starts == [4]
    assert scheduler.schedule() is None  # the last token is in flight
    scheduler.apply(second, result(second))
    assert scheduler.apply(third, result(third))[0].finish_reason == "length"


def test_a_late_result_of_a_stopped_request_is_dropped() -> None:
    scheduler = make()
    add(scheduler, "a", prompt(1, 3))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None and second is not None
    assert scheduler.apply(first, result(first, EOS))[0].finish_reason == "stop"
    add(scheduler, "b", prompt(50, 3))
    third = scheduler.schedule()
    assert third is not None and third.rows == [0]  # the row has a new owner
    assert scheduler.apply(second, result(second, 77)) == []
    assert scheduler.apply(third, result(third)) == [SequenceUpdate("b", [9], admission=Admission(0.0))]


def test_a_token_in_flight_at_preemption_still_counts() -> None:
    scheduler = make(pages=1 + 5)
    add(scheduler, "old", prompt(10, 7), now=1.0, max_tokens=8)
    add(scheduler, "young", prompt(50, 7), now=2.0, max_tokens=8)
    young = scheduler._requests["young"]
    pending: StepPlan | None = None
    in_flight, tokens = 0, {"old": 0, "young": 0}
    while scheduler.has_work:
        plan = scheduler.schedule()
        scheduler.check()
        if young.preemptions and young.row < 0:
            in_flight = max(in_flight, young.in_flight)
        for update in scheduler.apply(pending, result(pending)) if pending else []:
            tokens[update.id] += len(update.token_ids)
        pending = plan
    assert in_flight == 1 and tokens == {"old": 8, "young": 8}


@pytest.mark.parametrize("enabled", [True, False])
def test_siblings_wait_for_their_leader_and_share_its_pages(enabled: bool) -> None:
    scheduler = make(budget=8, enabled=enabled)
    for i in range(3):
        add(scheduler, f"s{i}", prompt(1, 13), group="g", seed=40, n=3)
    add(scheduler, "other", prompt(60, 2))
    assert [scheduler._requests[f"s{i}"].seed for i in range(3)] == [40, 41, 42]
    plan, _ = step(scheduler)
    assert running(scheduler) == ["s0"] and plan.counts == [8]
    plan, _ = step(scheduler)
    assert running(scheduler) == ["s0", "other"] and plan.counts == [5, 2]  # others are not held up
    plan, updates = step(scheduler)
    assert running(scheduler) == ["s0", "s1", "s2", "other"]
    assert [scheduler._requests[f"s{i}"].cached_tokens for i in range(3)] == [0, 12, 12]
    finish(scheduler)
    assert not scheduler._groups and scheduler.num_free_pages == 100


def test_seeds_differ_and_repeat() -> None:
    def seeds() -> list[int]:
        scheduler = make()
        for i in range(3):
            add(scheduler, str(i), [1])
        return [scheduler._requests[str(i)].seed for i in range(3)]

    first = seeds()
    assert len(set(first)) == 3 and first == seeds()
    scheduler = make()
    for i in range(2):
        add(scheduler, str(i), [1], group="g", seed=2**63 - 1, n=2)
    assert scheduler._requests["1"].seed == -(2**63)


def test_a_late_sibling_gets_a_seed_of_its_own() -> None:
    scheduler = make()
    add(scheduler, "0", [1], group="g", seed=5, n=2, max_tokens=1)
    step(scheduler)
    add(scheduler, "1", [1], group="g", seed=5, n=2, max_tokens=1)
    assert scheduler._requests["1"].seed == 6
    step(scheduler)
    assert not scheduler._groups


def test_logprobs_as_many_as_each_row_wants() -> None:
    scheduler = make()
    for name, wanted in (("a", None), ("b", 0), ("c", 2)):
        add(scheduler, name, [ord(name)], logprobs=wanted)
    plan = scheduler.schedule()
    assert plan is not None and plan.logprobs == 2
    found = [[TokenLogprobs([9, 1, 2], [-1.0, -0.5, -0.7], [3, 1, 2])]] * 3
    updates = scheduler.apply(plan, StepResult(plan.step, [[9]] * 3, logprobs=found))
    assert [u.logprobs for u in updates] == [None, [TokenLogprobs([9], [-1.0], [3])], found[2]]
    add(scheduler, "d", [1])
    scheduler.abort(["b", "c"])
    plan = scheduler.schedule()
    assert plan is not None and plan.logprobs == -1


def test_prompt_logprobs_are_gathered_over_chunks() -> None:
    scheduler = make(budget=4, seqs=2)
    add(scheduler, "warm", prompt(0, 9), max_tokens=1)
    finish(scheduler)
    add(scheduler, "a", prompt(0, 9), prompt_logprobs=1)
    chunks, updates = [], []
    while not updates:
        plan = scheduler.schedule()
        assert plan is not None
        at = {0: [TokenLogprobs([p + 1], [0.0], [1]) for p in range(plan.starts[0], plan.starts[0] + plan.counts[0])]}
        chunks.append((plan.starts[0], plan.prompt_logprobs))
        updates = scheduler.apply(plan, StepResult(plan.step, result(plan).tokens, prompt_logprobs=at if plan.prompt_logprobs else None))
    assert chunks == [(0, [0]), (4, [0]), (8, [])]  # nothing reused; position 8 predicts output
    assert [p.token_ids for p in updates[0].prompt_logprobs or []] == [[i] for i in range(1, 9)]
    assert step(scheduler)[1][0].prompt_logprobs is None


def test_a_next_turn_reuses_the_whole_conversation() -> None:
    scheduler = make()
    add(scheduler, "turn1", prompt(10, 9), max_tokens=5)
    answer = finish(scheduler)["turn1"]
    add(scheduler, "turn2", [*prompt(10, 9), *answer, 70, 71])
    plan, (update,) = step(scheduler)
    assert update.cached_tokens == plan.starts[0] == 13  # all but the answer's last token, which was never computed
    assert len(plan.copies) == 1


def test_output_pages_behind_a_sliding_window_stay_matchable() -> None:
    scheduler = make(kinds=(6,))
    add(scheduler, "a", prompt(10, 8), max_tokens=24)
    finish(scheduler)
    add(scheduler, "b", [*prompt(10, 8), *[9] * 10, 70])
    assert step(scheduler)[0].starts == [18]


def test_budget_must_hold_a_token_for_each_row() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        make(budget=4, seqs=5)


def test_a_step_of_256_decodes_costs_little() -> None:
    scheduler = make(pages=256 * 40, seqs=256, budget=4096, length=1000)
    for i in range(256):
        add(scheduler, str(i), prompt(i, 8), max_tokens=None)
    for _ in range(4):
        step(scheduler)
    best = 1.0
    for _ in range(40):
        begin = time.perf_counter()
        plan = scheduler.schedule()
        assert plan is not None and len(plan.rows) == 256
        scheduler.apply(plan, result(plan))
        best = min(best, time.perf_counter() - begin)
    assert best < 0.005  # half a millisecond on a quiet core; ten times that is a mistake


def test_the_time_in_the_queue_and_the_reason_of_a_miss_come_with_the_first_token() -> None:
    scheduler = make()
    explained = SamplingParams(max_tokens=3, explain_cache=True)
    scheduler.add(Add("a", [1, 2, 3], explained), 10.0)
    plan = scheduler.schedule(10.5)
    assert plan is not None
    (first,) = scheduler.apply(plan, result(plan))
    assert first.admission == Admission(0.5, "never_seen")
    plan = scheduler.schedule(11.0)
    assert plan is not None
    assert scheduler.apply(plan, result(plan))[0].admission is None
