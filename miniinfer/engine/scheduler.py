"""The scheduler: which requests compute how many tokens in the next step, and what becomes of a step's results.

Owns requests from Add to their end: the queue, device rows, stop rules. Plain Python over plain data: time is passed in, pages are
cache/manager.py's, and nobody here knows of devices. `plan = schedule()`; the plan is executed; `updates = apply(plan, result)`.

Contract with the loop: every plan is executed, in the order made; results are applied in the same order, each at most one plan late (depth 1).
There is no prefill and no decode: a request has `computed` and `total` tokens, and a step moves `computed` towards `total`.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from miniinfer.cache.manager import CacheManager, PageEntry
from miniinfer.config import DETERMINISTIC_CHUNK
from miniinfer.data import Add, Admission, Request, RowInit, SequenceUpdate, Status, StepPlan, StepResult, TokenLogprobs, sequence_seed

if TYPE_CHECKING:
    from miniinfer.engine.grammar import Constraint

SECONDS_PER_PRIORITY = 30.0  # a request of priority p is treated as if it had come p times this later, so nobody starves
FAR = 1800.0  # seconds: a request whose turn is so much later than another's must not be felt by that one
FAR_SHARE = 128  # of so many tokens of a step's budget they have one, while somebody else computes
NOT_FINITE = "the model's logits were not finite (NaN or infinity)"
RETRY_STEPS = 8  # how often a blocked head of the queue is tried again although no page was freed
RUNNING_PER_HEADROOM_PAGE = 4  # admission leaves a page per so many running requests, so that it does not cause a preemption at once


@dataclass(slots=True)
class _Group:
    """Siblings (n > 1) of one API request."""

    leader: Request
    seen: int = 0
    alive: int = 0


class Scheduler:
    """Continuous batching with chunked prefill, priorities, preemption and prefix reuse.

    Order of everything is the request's key, (arrival + 30 s * priority, counter), lowest first: admission takes the lowest key, preemption
    the highest. The lowest key therefore always makes progress. Those that are FAR behind it have a small share of its steps, and give up their
    places for it."""

    def __init__(
        self,
        cache: CacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        seed: int = 0,
        deterministic: bool = False,
    ) -> None:
        least = DETERMINISTIC_CHUNK if deterministic else 1
        if max_num_batched_tokens < max_num_seqs - 1 + least:
            raise ValueError(f"max_num_batched_tokens: {max_num_batched_tokens} cannot hold {least} tokens beside {max_num_seqs - 1} requests")
        if cache.max_chunk < least:
            raise ValueError(f"num_pages: a step could compute {cache.max_chunk} tokens of a request at most, fewer than {least}")
        self.cache = cache
        self._budget = max_num_batched_tokens
        self._far_budget = max(1, max_num_batched_tokens // FAR_SHARE)
        self._max_chunk = min(max_num_batched_tokens, cache.max_chunk)
        self._max_model_len = max_model_len
        self._eos = frozenset(eos_token_ids)
        self._seed = seed
        self._deterministic, self._least = deterministic, least
        self._requests: dict[str, Request] = {}  # all that live
        self._waiting: list[tuple[tuple[float, int], Request]] = []  # heap
        self._preparing: list[Request] = []  # whose grammars are being compiled
        self._refused: list[SequenceUpdate] = []
        self._running: list[Request] = []  # sorted by key
        self._num_rows = max_num_seqs
        self._rows = list(range(max_num_seqs))  # free ones, heap: low rows first keep batches compact
        self._groups: dict[str, _Group] = {}
        self._planned: dict[int, list[Request]] = {}  # per step in flight, aligned with the plan's rows
        self._steps = 0
        self._arrivals = 0
        self._now = 0.0
        self._blocked: tuple[Request, int, list[int]] | None = None  # head that did not fit, step, pages available then
        self._counts = {"finished": 0, "preemptions": 0, "prompt_tokens": 0, "generated_tokens": 0}

    # ------------------------------------------------------------------------------------------------ coming and going

    def add(self, message: Add, now: float, constraint: Constraint | None = None) -> SequenceUpdate | None:
        """Takes a sequence in; `now` in seconds, of any clock that only rises. An update with an error if it can never run.

        With a `constraint` it enters the queue when that is ready, its place being that of its arrival."""
        error = self._refusal(message)
        if not error and message.pin:
            error = self.cache.pin(message.id, message.cache_salt, message.prompt)
        if error:
            return SequenceUpdate(message.id, [], "error", error=error, invalid=message.pin)
        params, size = message.params, len(message.prompt)
        limit = min(self._max_model_len, self.cache.max_tokens)
        self._arrivals += 1
        request = Request(
            id=message.id,
            prompt_len=size,
            tokens=[*message.prompt, *message.output],
            params=params,
            seed=0,
            max_total=size + 1 if message.pooling else limit if params.max_tokens is None else min(size + params.max_tokens, limit),
            stop_ids=(frozenset() if params.ignore_eos else self._eos) | frozenset(params.stop_token_ids or ()),
            key=(now + SECONDS_PER_PRIORITY * message.priority, self._arrivals),
            namespace=message.cache_salt,
            group=message.group,
            arrived=now,
            pooling=message.pooling,
        )
        sibling = self._join_group(request)
        request.seed = sequence_seed(params, sibling, self._seed, self._arrivals) if message.seed is None else message.seed
        self.cache.join(request)
        self._requests[request.id] = request
        request.constraint = constraint
        if constraint is None:
            heapq.heappush(self._waiting, (request.key, request))
        else:
            self._preparing.append(request)
        return None

    def abort(self, ids: Sequence[str]) -> list[SequenceUpdate]:
        """Ends sequences at once, whatever their state, and what they have pinned; rows and pages are free on return. Unknown ids are ignored."""
        ended = [self._requests[i] for i in ids if i in self._requests]
        for request in ended:
            self._finish(request, aborted=True)
        self._drop_finished()
        self.cache.unpin(ids)
        return [SequenceUpdate(request.id, [], "abort", cached_tokens=request.cached_tokens) for request in ended]

    def _refusal(self, message: Add) -> str | None:
        size = len(message.prompt)
        if message.id in self._requests:
            return f"id: {message.id!r} is already in use"
        if size == 0:
            return "prompt: must have at least one token"
        if min(message.prompt) < 0 or max(message.prompt) >= 2**31:
            return "prompt: token ids must be from 0 to 2^31 - 1"
        if size >= self._max_model_len + (message.pooling is not None):
            return f"prompt: {size} tokens leave no room for output, max_model_len is {self._max_model_len}"
        if size + 1 > self.cache.max_tokens:
            return f"prompt: {size} tokens need more KV pages than there are (room for {self.cache.max_tokens} tokens); raise num_pages"
        return None

    def _join_group(self, request: Request) -> int:
        """Enters a request into its group; its index among the siblings."""
        if request.group is None:
            return 0
        group = self._groups.setdefault(request.group, _Group(request))
        if group.leader is not request:
            request.leader = group.leader
        group.seen += 1
        group.alive += 1
        return group.seen - 1

    def _leave_group(self, request: Request, aborted: bool) -> None:
        if request.group is None:
            return
        group = self._groups[request.group]
        group.alive -= 1
        # Siblings still to come must get indices of their own, even if the first have finished; unless the request was aborted.
        if group.alive == 0 and (aborted or group.seen >= request.params.n):
            del self._groups[request.group]

    def _finish(self, request: Request, aborted: bool = False, trusted: bool = True) -> None:
        """Frees everything a request has. A step in flight may still compute for it: its result is dropped, and its writes are done
        before any later plan's (see cache/manager.py). The caller drops finished requests from the running list."""
        if request.status is Status.RUNNING:
            self._give_back(request, [] if aborted else self._kept(request), trusted)
        elif request in self._preparing:
            self._preparing.remove(request)
        else:
            self._waiting.remove((request.key, request))
            heapq.heapify(self._waiting)
        request.status = Status.FINISHED
        del self._requests[request.id]
        self.cache.leave(request)
        self._leave_group(request, aborted)
        self._counts["finished"] += 1

    def _kept(self, request: Request) -> list[tuple[int, float]]:
        """What its parameters want kept for the next turn: how many of its first tokens, until when."""
        params = request.params
        whole = [(len(request.tokens), params.keep_cache_seconds)] if params.keep_cache_seconds else []
        return [(tokens, self._now + seconds) for tokens, seconds in (*whole, *(params.keep_cache_prefixes or ()))]

    def _give_back(self, request: Request, keep: Sequence[tuple[int, float]] = (), trusted: bool = True) -> None:
        if trusted:
            self.cache.release(request, keep)
        else:
            self.cache.discard(request)
        heapq.heappush(self._rows, request.row)
        request.row = -1

    def _drop_finished(self) -> None:
        self._running = [r for r in self._running if r.status is Status.RUNNING]

    # ------------------------------------------------------------------------------------------------------- planning

    def schedule(self, now: float | None = None) -> StepPlan | None:
        """The next step, or None if nothing can be computed now (no work, or all of it waits for results in flight). From `now`, on the clock
        of `add`, newcomers learn how long they have waited."""
        if self._preparing:
            self._end_preparing()
        if now is not None:
            self._now = now
            self.cache.tick(now)
        plan = StepPlan(self._steps, [], [], [], [], [], [], [])
        self._give_way()
        preemptions = self._counts["preemptions"]
        work = self._plan_running(plan.page_entries)
        if not work or preemptions == self._counts["preemptions"]:  # where pages were short, newcomers would make them shorter
            self._plan_waiting(work, plan, now)
        self.cache.end_plan()
        if not work:
            return None
        self._advance(work, plan)
        self._planned[plan.step] = [request for request, _ in work]
        self._steps += 1
        return plan

    def _end_preparing(self) -> None:
        """Moves requests whose grammars are ready to the queue, and ends those whose grammars are bad."""
        for request in self._preparing.copy():
            constraint = request.constraint
            if not constraint.ready:
                continue
            if constraint.error is None:
                self._preparing.remove(request)
                heapq.heappush(self._waiting, (request.key, request))
            else:
                self._finish(request, aborted=True)
                self._refused.append(SequenceUpdate(request.id, [], "error", error=constraint.error, invalid=constraint.invalid))

    def refused(self) -> list[SequenceUpdate]:
        """The ends of requests that `schedule` has refused since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def constrained(self, plan: StepPlan) -> list[Request]:
        """Those of a plan that sample under a mask, in the order of `plan.constrained`; some may have ended meanwhile."""
        planned = self._planned[plan.step]
        return [planned[entry] for entry in plan.constrained]

    def _plan_running(self, entries: list[PageEntry]) -> list[tuple[Request, int]]:
        """(request, tokens) pairs of running requests.

        Each may have one token, which is all that a decode wants; prompts share what the budget leaves, so that they never hold decodes
        up. Those that are far behind whoever runs, or is about to, share a few tokens. Pages go by key: a request short of pages takes them
        from the highest key, whose turn has not come, so nothing planned is undone."""
        running = self._running
        work: list[tuple[Request, int]] = []
        urgent = self._waiting[0][0][0] if self._waiting else float("inf")
        lead = min(urgent, running[0].key[0]) if running else urgent
        first_far, far = bisect_right(running, lead + FAR, key=lambda r: r.key[0]), self._far_budget
        spare = self._budget - first_far - min(far, len(running) - first_far)
        turn = 0
        while turn < len(running):
            request = running[turn]
            turn += 1
            total = len(request.tokens) + request.in_flight
            if total >= request.max_total:  # its last token is in flight
                continue
            count = total - request.computed
            behind = turn > first_far and (bool(work) or urgent == lead)
            if behind and not far:
                break
            if count > 1:
                count = self._chunk(request, min(count, spare + 1, self._max_chunk, far if behind else count))
                if not count:
                    continue
                spare -= count - 1
            far -= count if behind else 0
            if request.computed + count > request.pages.capacity and not self._make_room(request, count, entries):
                break
            work.append((request, count))
        return work

    def _chunk(self, request: Request, most: int) -> int:
        """How many of its known tokens a request computes next, at most `most`; 0 if it has to wait for more room.

        Where attention over one new token and over several sum in different orders, a token's result must not depend on where chunks end. So if
        deterministic, a prompt of several tokens never computes one of them alone, and what a resumed request had generated is computed
        one by one again."""
        if not self._deterministic:
            return most
        left = request.prompt_len - request.computed
        if left <= 0 or request.prompt_len == 1:
            return 1
        count = min(left, most)
        count -= left - count == 1
        return count if count > 1 else 0

    def _make_room(self, request: Request, count: int, entries: list[PageEntry]) -> bool:
        """Pages for `count` more tokens, if need be at the cost of the highest keys; False if that was the request itself."""
        while not self._extend(request, request.computed + count, entries):
            if self._preempt() is request:
                return False
        return True

    def _preempt(self) -> Request:
        """Puts the running request of the highest key back into the queue."""
        victim = self._running.pop()
        self._give_back(victim)
        victim.status, victim.computed = Status.WAITING, 0
        victim.preemptions += 1
        self._counts["preemptions"] += 1
        heapq.heappush(self._waiting, (victim.key, victim))
        return victim

    def _give_way(self) -> None:
        """The place of one that is far behind the head of the queue, which found none in the step before."""
        head = self._waiting[0][1] if self._waiting and self._running else None
        if head is None or not _is_far(self._running[-1], head):
            return
        if not self._rows or (self._blocked is not None and self._blocked[0] is head):
            self._preempt()
            self._blocked = None

    def _extend(self, request: Request, upto: int, entries: list[PageEntry]) -> bool:
        """Pinned pages are for a request that runs alone and could not go on otherwise."""
        return self.cache.extend(request, upto, entries, pins=len(self._running) == 1)

    def _plan_waiting(self, work: list[tuple[Request, int]], plan: StepPlan, now: float | None) -> None:
        """Admits from the queue while rows, budget and pages last. A request that does not fit holds up those behind it; one that
        waits for its leader's prompt pages does not."""
        if not self._waiting or not self._rows:
            return
        held = []
        budget = self._budget - sum(count for _, count in work)
        while self._waiting and self._rows and budget >= self._least:
            request = self._waiting[0][1]
            leader = request.leader
            if leader is not None and leader.status is Status.RUNNING and leader.computed < leader.prompt_len - 1:
                held.append(heapq.heappop(self._waiting))
                continue
            if work and _is_far(request, self._running[0]):
                budget = min(budget, self._far_budget - sum(count for other, count in work if _is_far(other, self._running[0])))
                if budget < self._least:
                    break
            if request.in_flight or not self._admit(request, plan):
                break
            if request.admission is None:
                miss = self.cache.explain(request, self._running) if request.params.explain_cache else None
                request.admission = Admission(0.0 if now is None else max(0.0, now - request.arrived), miss)
            count = self._chunk(request, min(len(request.tokens) - request.computed, budget, self._max_chunk))
            budget -= count
            if request.computed + count > request.pages.capacity and not self._extend(request, request.computed + count, plan.page_entries):
                raise RuntimeError("an admitted request has no pages for its first chunk")
            work.append((request, count))
        for entry in held:
            heapq.heappush(self._waiting, entry)

    def _admit(self, request: Request, plan: StepPlan) -> bool:
        """Moves the head of the queue to the running list, with a row and pages; False if it does not fit."""
        available = [self.cache.num_available(k) for k in range(len(self.cache.kinds))]
        if self._running and self._blocked is not None:
            head, step, before = self._blocked
            if head is request and self._steps < step + RETRY_STEPS and all(a <= b for a, b in zip(available, before, strict=True)):
                return False  # spares matching a long prompt again in every step
        request.row = self._rows[0]
        headroom = -(-len(self._running) // RUNNING_PER_HEADROOM_PAGE)
        if not self.cache.admit(request, self._max_chunk, headroom, plan.page_entries, plan.copies, pins=not self._running):
            request.row = -1
            self._blocked = (request, self._steps, available)
            return False
        request.reused = request.computed
        heapq.heappop(self._rows)
        heapq.heappop(self._waiting)
        insort(self._running, request, key=lambda r: r.key)
        request.status, request.leader, self._blocked = Status.RUNNING, None, None
        plan.inits.append(RowInit(request.row, request.tokens.copy(), request.prompt_len, request.seed, request.params, sorted(request.stop_ids)))
        return True

    def _advance(self, work: list[tuple[Request, int]], plan: StepPlan) -> None:
        """Writes the plan's rows and moves the requests on as if it were done: whatever is planned next is executed after it."""
        plan.rows = [request.row for request, _ in work]
        plan.starts = [request.computed for request, _ in work]
        plan.counts = [count for _, count in work]
        samples = plan.samples
        for request, count in work:
            params, prompt_len = request.params, request.prompt_len
            start = request.computed
            end = request.computed = start + count
            if end == len(request.tokens) + request.in_flight:
                samples.append(True)
                request.in_flight += 1
                if request.constraint is not None:
                    plan.constrained.append(len(samples) - 1)
                if params.logprobs is not None and params.logprobs > plan.logprobs:
                    plan.logprobs = params.logprobs
            else:
                samples.append(False)
            if start < prompt_len:
                self._counts["prompt_tokens"] += min(end, prompt_len) - start
                if params.prompt_logprobs is not None and max(start, len(request.prompt_logprobs)) < prompt_len - 1:
                    plan.prompt_logprobs.append(len(samples) - 1)
            if request.pooling == "mean" or (request.pooling is not None and samples[-1]):
                plan.pooled.append((len(samples) - 1, count if request.pooling == "mean" else 1))
            if count > 1:  # known tokens: siblings and other requests can share them from the next plan on
                self.cache.commit(request)

    # -------------------------------------------------------------------------------------------------------- results

    def apply(self, plan: StepPlan, result: StepResult) -> list[SequenceUpdate]:
        """A step's results: tokens appended, stop rules, finished requests freed. Results of requests that have ended are dropped."""
        updates: list[SequenceUpdate] = []
        requests = self._planned.pop(plan.step)
        before = self._counts["finished"]
        gone, logprobs, prompt_logprobs = Status.FINISHED, result.logprobs, result.prompt_logprobs
        for index, (request, sampled) in enumerate(zip(requests, plan.samples, strict=True)):
            if request.status is gone:  # aborted or stopped meanwhile: the one rule for late results
                continue
            if prompt_logprobs and index in prompt_logprobs:
                self._gather_prompt_logprobs(request, plan.starts[index], prompt_logprobs[index])
            if result.pooled and index in result.pooled:
                _pool(request, plan.starts[index], result.pooled[index])
            if sampled:
                request.in_flight -= 1
                if request.stale:
                    request.stale -= 1
                    continue
                update = self._append(request, result.tokens[index])
                if logprobs is not None and request.params.logprobs is not None:
                    update.logprobs = _narrowed(logprobs[index][: len(update.token_ids)], request.params.logprobs)
                updates.append(_embedding(request, update) if request.pooling is not None and update.finish_reason in ("stop", "length") else update)
        if self._counts["finished"] != before:
            self._drop_finished()
        return updates

    def _append(self, request: Request, new: list[int]) -> SequenceUpdate:
        """Appends sampled tokens until a stop rule holds; the stop token itself is part of the output."""
        tokens, before = request.tokens, len(request.tokens)
        update = SequenceUpdate(request.id, new, cached_tokens=request.cached_tokens)
        if before == request.prompt_len:
            update.admission = request.admission
            if request.params.prompt_logprobs is not None:
                update.prompt_logprobs = request.prompt_logprobs
        for token in new:
            if token < 0:
                update.token_ids = new[: len(tokens) - before]
                self._distrust(request, update)
                break
            tokens.append(token)
            last = token in request.stop_ids or len(tokens) >= request.max_total or request.constraint is not None
            if last and self._ends(request, token, update):
                update.token_ids = new[: len(tokens) - before]
                self._finish(request)
                break
        self._counts["generated_tokens"] += len(update.token_ids)
        return update

    def _distrust(self, request: Request, update: SequenceUpdate) -> None:
        """Logits that are not finite end their request; unless what it read from the cache may be to blame, left there by another that has not
        been found out yet. Then it computes everything once more, by itself."""
        if request.status is not Status.RUNNING:  # preempted meanwhile, and will compute it again
            return
        if request.alone or not request.reused:
            update.finish_reason, update.error = "error", NOT_FINITE
            self._finish(request, trusted=False)
            return
        self._give_back(request, trusted=False)
        request.status, request.computed, request.alone, request.stale = Status.WAITING, 0, True, request.in_flight
        heapq.heappush(self._waiting, (request.key, request))
        self._running.remove(request)

    def _ends(self, request: Request, token: int, update: SequenceUpdate) -> bool:
        """Whether `token`, just appended, ends the request; says why in the update."""
        params = request.params
        if token in request.stop_ids and len(request.tokens) - request.prompt_len >= params.min_tokens:
            update.finish_reason = "stop"
            update.stop_reason = None if token in self._eos and not params.ignore_eos else token
        elif request.constraint is not None and self._ends_by_grammar(request, token, update):
            pass
        elif len(request.tokens) >= request.max_total:
            update.finish_reason = "length"
        return update.finish_reason is not None

    def _ends_by_grammar(self, request: Request, token: int, update: SequenceUpdate) -> bool:
        """Whether the output is complete, so that not even an end-of-text token is wanted, or its grammar has failed."""
        constraint = request.constraint
        constraint.advance(request.tokens, request.prompt_len)
        if constraint.error is not None:
            update.finish_reason, update.error, update.invalid = "error", constraint.error, constraint.invalid
        elif constraint.finished:
            update.finish_reason, update.complete = "stop", token not in self._eos
        return update.finish_reason is not None

    def _gather_prompt_logprobs(self, request: Request, start: int, found: list[TokenLogprobs]) -> None:
        """Appends one chunk's; a resumed request computes positions again that it has. The last prompt position predicts output."""
        have = request.prompt_logprobs
        have.extend(found[len(have) - start : request.prompt_len - 1 - start])

    # ---------------------------------------------------------------------------------------------------------- state

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def num_free_pages(self) -> int:
        """Pages of all kinds that no request holds (free, or cached and evictable)."""
        return sum(self.cache.num_available(k) for k in range(len(self.cache.kinds)))

    def stats(self) -> dict[str, float]:
        """Gauges now, and counts since the start."""
        cache = self.cache
        used = [1 - cache.num_available(k) / pool.size for k, pool in enumerate(cache.pools)]
        return {
            "running": len(self._running),
            "waiting": len(self._waiting) + len(self._preparing),
            "kv_usage": max(used),  # share of the scarcest kind's pages that requests hold
            "prefix_queries": cache.query_tokens,
            "prefix_hits": cache.hit_tokens,
            "evicted_pages": cache.tree.evictions,
            "pinned_pages": cache.pins.num_pages,
            "steps": self._steps,
            **self._counts,
        }

    def check(self) -> None:
        """Proves the invariants of scheduler and cache. Call between steps; costs time in proportion to the pages. Raises RuntimeError."""
        self.cache.check(self._running)
        waiting = [request for _, request in self._waiting] + self._preparing
        everyone = self._running + waiting
        _ensure(len(everyone) == len(self._requests) == len({r.id for r in everyone}), "a request is in no place or in two")
        _ensure(all(self._requests.get(r.id) is r for r in everyone), "a request is known by another's id")
        _ensure(sorted(self._rows + [r.row for r in self._running]) == list(range(self._num_rows)), "a row is in no place or in two")
        _ensure(all(a.key < b.key for a, b in zip(self._running, self._running[1:], strict=False)), "running requests are out of order")
        _ensure(all(r.status is Status.RUNNING for r in self._running), "a request on the running list is not running")
        for r in waiting:
            _ensure(r.status is Status.WAITING and r.row == -1 and r.pages is None and r.computed == 0, "a waiting request holds something")
        launched = Counter(r.id for requests in self._planned.values() for r in requests)
        for r in everyone:
            _ensure(0 <= r.in_flight <= launched[r.id], "a token is in flight without a step")
            _ensure(r.computed <= len(r.tokens) + r.in_flight <= r.max_total, "a request has run past its end")
        _ensure(sum(g.alive for g in self._groups.values()) == sum(r.group is not None for r in everyone), "a group's size is wrong")


def _is_far(request: Request, other: Request) -> bool:
    """Is a request's turn so much later than another's that it must not be in its way."""
    return request.key[0] - other.key[0] > FAR


def _pool(request: Request, start: int, sums: list[float]) -> None:
    """Adds a chunk's sum of hidden states; a resumed request computes from the beginning again."""
    have = request.pooled if start else []
    request.pooled = [a + b for a, b in zip(have, sums, strict=True)] if have else sums


def _embedding(request: Request, update: SequenceUpdate) -> SequenceUpdate:
    """The end of a pooled sequence: its one token was never wanted."""
    count = request.prompt_len if request.pooling == "mean" else 1
    return SequenceUpdate(request.id, [], "stop", cached_tokens=update.cached_tokens, embedding=[x / count for x in request.pooled])


def _narrowed(found: list[TokenLogprobs], alternatives: int) -> list[TokenLogprobs]:
    """A step carries as many alternatives as its most demanding row wants; the others get their own number, and the token's own."""
    end = alternatives + 1
    return [TokenLogprobs(p.token_ids[:end], p.logprobs[:end], p.ranks[:end]) for p in found]


def _ensure(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(f"scheduler: {message}")
