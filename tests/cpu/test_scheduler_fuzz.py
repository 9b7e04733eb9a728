"""Random requests through scheduler and cache on a device that exists only as page contents: every token read is checked, every sequence compared.

The device executes plans literally, one after the other. A page slot holds (token, position, hash of the prefix up to it), so a page that
was reused wrongly, freed too early, copied too late or never written is caught when it is read, and by the token sampled from it.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest

from miniinfer.cache.manager import CacheManager
from miniinfer.data import Add, SamplingParams, SequenceUpdate, StepPlan, StepResult, TokenLogprobs
from miniinfer.engine.scheduler import Scheduler

EOS, STOP = 0, 1
MASK = 2**61 - 1


def chain(prefix: int, token: int) -> int:
    """Hash of a prefix, extended by one token."""
    return ((prefix ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x1234567) & MASK


def hashes(tokens: list[int]) -> list[int]:
    out, prefix = [], 0
    for token in tokens:
        prefix = chain(prefix, token)
        out.append(prefix)
    return out


def sampled(prefix: int, seed: int, vocab: int) -> int:
    """The next token, a pure function of prefix and seed; few seeds and tokens make many equal prefixes."""
    return (chain(prefix, seed & 0xFFFF) >> 20) % vocab


@dataclass
class Row:
    tokens: list[int]
    seed: int
    hashes: list[int]
    tables: list[dict[int, int]]


class Device:
    """What a runner does with a plan, in the promised order: copies, row inits, page entries, forward (writes, then reads), sampling."""

    def __init__(self, kinds: tuple[int, ...], num_pages: list[int], page_size: int, num_rows: int, vocab: int) -> None:
        self.kinds, self.size, self.vocab = kinds, page_size, vocab
        self.pages: list[list[list[tuple[int, int, int] | None]]] = [[[None] * page_size for _ in range(n)] for n in num_pages]
        self.rows: list[Row | None] = [None] * num_rows
        self.copied = 0

    def execute(self, plan: StepPlan) -> StepResult:
        for kind in range(len(self.kinds)):
            pairs = [(s, d) for k, s, d in plan.copies if k == kind]
            targets = {d for _, d in pairs}
            assert len(targets) == len(pairs) and not targets & {s for s, _ in pairs}, "copies overlap"
            assert 0 not in targets and all(s for s, _ in pairs)
            for source, target in pairs:
                self.pages[kind][target] = list(self.pages[kind][source])
                self.copied += 1
        for init in plan.inits:
            self.rows[init.row] = Row(list(init.tokens), init.seed, hashes(init.tokens), [{} for _ in self.kinds])
        for kind, row, index, page in plan.page_entries:
            assert page
            self.row(row).tables[kind][index] = page
        assert len(set(plan.rows)) == len(plan.rows)
        for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            self.write(self.row(row), start, count)
        for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            self.read(self.row(row), start, count)
        return self.sample(plan)

    def row(self, index: int) -> Row:
        row = self.rows[index]
        assert row is not None
        return row

    def write(self, row: Row, start: int, count: int) -> None:
        assert count > 0 and start + count <= len(row.tokens), "computes a token that does not exist yet"
        for kind, pages in enumerate(self.pages):
            table = row.tables[kind]
            for p in range(start, start + count):
                pages[table[p // self.size]][p % self.size] = (row.tokens[p], p, row.hashes[p])

    def read(self, row: Row, start: int, count: int) -> None:
        for kind, window in enumerate(self.kinds):
            table, pages = row.tables[kind], self.pages[kind]
            for p in range(max(0, start - window + 1) if window else 0, start + count):
                found = pages[table[p // self.size]][p % self.size]
                assert found == (row.tokens[p], p, row.hashes[p]), f"kind {kind}, position {p}: the cache holds {found}"

    def sample(self, plan: StepPlan) -> StepResult:
        result = StepResult(plan.step, [])
        logprobs: list[list[TokenLogprobs]] = []
        for index, (r, start, count, sample) in enumerate(zip(plan.rows, plan.starts, plan.counts, plan.samples, strict=True)):
            row, end = self.row(r), start + count
            if index in plan.prompt_logprobs:
                # Position p predicts the token at p + 1; behind the last known token stands whatever is sampled.
                following = [*row.tokens[start + 1 : end + 1], -1][:count]
                result.prompt_logprobs = {**(result.prompt_logprobs or {}), index: [TokenLogprobs([t], [0.0], [1]) for t in following]}
            new = []
            if sample:
                assert end == len(row.tokens)
                new = [sampled(row.hashes[-1], row.seed, self.vocab)]
                row.tokens += new
                row.hashes.append(chain(row.hashes[-1], new[0]))
            result.tokens.append(new)
            alternatives = list(range(plan.logprobs + 1))
            logprobs.append([TokenLogprobs([t, *alternatives[1:]], [0.0] * len(alternatives), alternatives) for t in new])
        if plan.logprobs >= 0:
            result.logprobs = logprobs
        return result


def expected(message: Add, seed: int, limit: int, vocab: int) -> tuple[list[int], str, int | None]:
    """The sequence that a request must become, from its definition alone."""
    params = message.params
    tokens, prefix = list(message.prompt), hashes(message.prompt)[-1]
    most = limit if params.max_tokens is None else min(limit, len(tokens) + params.max_tokens)
    output: list[int] = []
    while True:
        token = sampled(prefix, seed, vocab)
        output.append(token)
        prefix = chain(prefix, token)
        if len(output) >= params.min_tokens:
            if token == EOS and not params.ignore_eos:
                return output, "stop", None
            if token in (params.stop_token_ids or ()):
                return output, "stop", token
        if len(tokens) + len(output) >= most:
            return output, "length", None


@dataclass
class Seen:
    """What came back for one request."""

    message: Add
    seed: int
    output: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: SequenceUpdate | None = None


class Run:
    """One random configuration, fed with random requests until they have all ended."""

    def __init__(self, seed: int, kinds: tuple[int, ...], enabled: bool, depth: int, deterministic: bool = False) -> None:
        rng = self.rng = random.Random(seed)
        self.depth, self.deterministic = depth, deterministic
        self.vocab = rng.choice([3, 8, 50])
        size = rng.choice([1, 2, 4, 8])
        self.rows = rng.choice([1, 3, 6, 10])
        self.budget = self.rows + rng.choice([2 if deterministic else 0, 3, 20, 60])
        self.model_len = rng.choice([12, 40, 90])
        num_pages = []
        for window in kinds:
            # Pools for a share of the longest sequence up to a few; a sliding kind's also of just its window, at any alignment.
            pages = int(rng.choice([0.7, 1.2, 2.5]) * self.model_len / size)
            least = -(-(window - 1) // size) + (4 if deterministic else 1)
            num_pages.append(
                1
                + max(
                    1,
                    pages
                    if not window
                    else rng.choice([least // 2 if not deterministic else least, least, least + 1, 2 * least, pages + deterministic * least]),
                )
            )
        self.cache = CacheManager(kinds, num_pages, size, enabled, deterministic, rng.choice([0.25, 0.6, 1.0]))
        self.scheduler = Scheduler(
            self.cache,
            max_num_seqs=self.rows,
            max_num_batched_tokens=self.budget,
            max_model_len=self.model_len,
            eos_token_ids=(EOS,),
            seed=seed,
            deterministic=deterministic,
        )
        self.device = Device(kinds, num_pages, size, self.rows, self.vocab)
        self.prefixes = [[rng.randrange(2, max(3, self.vocab)) for _ in range(rng.randrange(1, self.model_len))] for _ in range(4)]
        self.seen: dict[str, Seen] = {}
        self.pending: deque[tuple[StepPlan, StepResult]] = deque()
        self.steps = self.now = self.names = self.spent = 0
        self.pins: list[str] = []
        self.evict, self.cache.tree.evict = self.cache.tree.evict, self.watch_eviction

    def watch_eviction(self, kind: int) -> None:
        """Pinned pages go only when nothing else is left, and only for a request that runs alone."""
        order = self.cache.tree.evictable(kind)
        if order.num_pinned == len(order):
            assert len(self.scheduler._running) <= 1
            self.spent += 1
        self.evict(kind)

    def params(self) -> SamplingParams:
        rng = self.rng
        most = rng.choice([None, 1, 2, 5, 12, 30])
        return SamplingParams(
            max_tokens=most,
            min_tokens=rng.choice([0, 0, min(most or 3, 3)]),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=rng.choice([None, None, [STOP], [EOS]]),
            seed=rng.choice([0, 1, None, rng.randrange(2**62)]),
            logprobs=rng.choice([None, None, 0, 2]),
            prompt_logprobs=rng.choice([None] * 5 + [0]),
            keep_cache_seconds=rng.choice([0.0, 0.0, 5.0, 60.0]),
        )

    def add(self) -> None:
        rng = self.rng
        base = rng.choice(self.prefixes)
        prompt = base[: rng.randrange(len(base) + 1)] + [rng.randrange(self.vocab) for _ in range(rng.choice([0, 1, 3, 9]))]
        if self.seen and rng.random() < 0.3:  # a next turn of some conversation
            known = rng.choice(list(self.seen.values()))
            prompt = known.message.prompt + known.output + prompt[-3:]
        params, self.names = self.params(), self.names + 1
        count = rng.choice([1, 1, 1, 2, 4])
        params.n = count
        priority = rng.choice([0, 0, 0, -1, 1, 3, 120])
        for sibling in range(count):
            message = Add(f"{self.names}.{sibling}", list(prompt), params, priority=priority, group=str(self.names) if count > 1 else None)
            message.cache_salt = rng.choice(["", "", "other"])
            message.pin = count == 1 and rng.random() < 0.3
            refused = self.scheduler.add(message, self.now)
            if message.pin and refused is None:
                self.pins.append(message.id)
            if refused is not None and message.pin and ("pin" in (refused.error or "")):
                assert message.id not in self.cache.pins.by_id
                continue
            if refused is not None:
                limit = min(self.model_len, self.cache.max_tokens)
                assert refused.finish_reason == "error" and refused.error and (not prompt or len(prompt) > limit - 1)
                continue
            seed = self.scheduler._requests[message.id].seed
            assert params.seed is None or seed == params.seed + sibling
            self.seen[message.id] = Seen(message, seed)

    def abort(self) -> None:
        alive = [name for name, seen in self.seen.items() if seen.last is None]
        chosen = self.rng.sample(alive, min(len(alive), self.rng.choice([1, 1, 3])))
        self.take(self.scheduler.abort([*chosen, "nobody"]))
        assert not self.cache.pins.by_id.keys() & set(chosen)

    def unpin(self) -> None:
        if self.pins and self.seen[self.pins[0]].last is not None:
            assert not self.scheduler.abort([self.pins.pop(0)])

    def step(self) -> None:
        """One turn of the loop in engine/core.py: at depth 1 the next plan is made and executed before a result is applied."""
        plan = self.scheduler.schedule(self.now)
        assert plan is not None or self.pending or not self.scheduler.has_work, "stalled with work to do"
        if plan is not None:
            assert plan.num_tokens <= self.budget and plan.rows
            if self.deterministic:
                self.check_chunks(plan)
            self.pending.append((plan, self.device.execute(plan)))
            self.steps += 1
        if self.rng.random() < 0.2:
            self.scheduler.check()
        if self.rng.random() < 0.02:
            self.abort()
        if self.pending and (len(self.pending) > self.depth or plan is None):
            self.take(self.scheduler.apply(*self.pending.popleft()))
        self.scheduler.check()

    def check_chunks(self, plan: StepPlan) -> None:
        """A prompt's tokens come several at a time, all else one by one: which kernel computes a token does not depend on the load."""
        for request, start, count in zip(self.scheduler._planned[plan.step], plan.starts, plan.counts, strict=True):
            size = request.prompt_len
            assert (count > 1 and start + count <= size) if size > 1 and start < size else count == 1

    def take(self, updates: list[SequenceUpdate]) -> None:
        assert not [name for name, times in Counter(u.id for u in updates).items() if times > 1]
        for update in updates:
            seen = self.seen[update.id]
            assert seen.last is None, "an update after the end"
            if update.prompt_logprobs is not None:
                assert seen.prompt_logprobs is None and not seen.output
                seen.prompt_logprobs = update.prompt_logprobs
            seen.output += update.token_ids
            assert (update.logprobs is not None) == (seen.message.params.logprobs is not None and bool(update.token_ids))
            seen.logprobs += update.logprobs or []
            if update.finish_reason:
                seen.last = update

    def play(self, busy: int) -> None:
        rng = self.rng
        for _ in range(busy):
            self.now += rng.choice([0, 1, 20])
            for _ in range(rng.choice([0, 0, 0, 1, 1, 4])):
                self.add()
            if rng.random() < 0.03:
                self.abort()
            if rng.random() < 0.03:
                self.unpin()
            if rng.random() < 0.01:
                self.cache.reset()
                self.scheduler.check()
            self.step()
        for _ in range(20000):
            if not self.scheduler.has_work and not self.pending:
                break
            self.step()
        else:
            raise AssertionError("requests that never end")

    def verify(self) -> None:
        limit = min(self.model_len, self.cache.max_tokens)
        for seen in self.seen.values():
            message, last = seen.message, seen.last
            assert last is not None
            output, reason, stop = expected(message, seen.seed, limit, self.vocab)
            assert [p.token_ids[0] for p in seen.logprobs] == (seen.output if message.params.logprobs is not None else [])
            assert all(len(p.token_ids) == (message.params.logprobs or 0) + 1 for p in seen.logprobs)
            if last.finish_reason == "abort":
                assert seen.output == output[: len(seen.output)]
                continue
            assert (seen.output, last.finish_reason, last.stop_reason) == (output, reason, stop), message
            assert last.cached_tokens < len(message.prompt)
            if message.params.prompt_logprobs is None:
                assert seen.prompt_logprobs is None
            else:
                assert last.cached_tokens == 0
                assert seen.prompt_logprobs is not None
                assert [p.token_ids for p in seen.prompt_logprobs] == [[t] for t in message.prompt[1:]]
        assert not self.scheduler.abort(list(self.seen))
        assert not self.cache.pins.num_pages and not any(self.cache.tree.evictable(k).num_pinned for k in range(len(self.cache.kinds)))
        self.cache.reset()
        self.scheduler.check()
        assert [pool.num_free for pool in self.cache.pools] == [pool.size for pool in self.cache.pools], "pages are lost"
        assert not self.cache.tree.root.children and not self.scheduler._groups and not self.scheduler._planned


KINDS = [(0,), (5,), (16,), (0, 5), (0, 2, 16), (1, 9)]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("enabled", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_random_requests(kinds: tuple[int, ...], enabled: bool, depth: int) -> None:
    totals: Counter[str] = Counter()
    for seed in range(5):
        run = Run(seed * 1000 + KINDS.index(kinds) * 10 + enabled * 2 + depth, kinds, enabled, depth)
        run.play(busy=60)
        run.verify()
        totals.update({k: int(v) for k, v in run.scheduler.stats().items()}, copied=run.device.copied, spent=run.spent)
    _check_trouble(totals, kinds)


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_random_requests_deterministic(kinds: tuple[int, ...]) -> None:
    totals: Counter[str] = Counter()
    for seed in range(5):
        run = Run(seed * 1000 + KINDS.index(kinds) * 10 + 7, kinds, True, 1, deterministic=True)
        run.play(busy=60)
        run.verify()
        totals.update({k: int(v) for k, v in run.scheduler.stats().items()}, copied=run.device.copied, spent=run.spent)
    _check_trouble(totals, kinds)


def test_random_pins_are_found_and_spent() -> None:
    """What the runs above do to pins beside all else: requests find them, and one that runs alone may take their pages."""
    totals: Counter[str] = Counter()
    for seed in range(4):
        run = Run(seed * 1000 + 1, (0,), True, 1)
        run.play(busy=60)
        totals.update(found=sum(pin.hits for pin in run.cache.pins.by_id.values()), spent=run.spent)
        run.verify()
    assert totals["found"] > 3 and totals["spent"] > 3


def _check_trouble(totals: Counter[str], kinds: tuple[int, ...]) -> None:
    """The test is worth nothing unless it gets into trouble."""
    assert totals["steps"] > 500 and totals["finished"] > 150 and (totals["preemptions"] > 0 or kinds == (1, 9))
    assert totals["prefix_hits"] > 50 and totals["evicted_pages"] > 50 and totals["copied"] > 2
