"""Pages, prefix tree and manager by hand-made cases; random ones are in test_scheduler_fuzz.py."""

from __future__ import annotations

import sys

import pytest

from miniinfer.cache import radix
from miniinfer.cache.manager import CacheManager, PageCopy, PageEntry
from miniinfer.cache.pool import PagePool
from miniinfer.data import Request, SamplingParams, Status, TokenLogprobs

S = 4


class Bench:
    """A cache and the little of a scheduler that its tests need."""

    def __init__(self, kinds: tuple[int, ...] = (0,), pages: int = 33, enabled: bool = True) -> None:
        self.cache = CacheManager(kinds, [pages] * len(kinds), S, enabled)
        self.running: list[Request] = []
        self.entries: list[PageEntry] = []
        self.copies: list[PageCopy] = []

    def request(self, tokens: list[int], **fields) -> Request:
        params = fields.pop("params", SamplingParams())
        defaults = {"id": "r", "seed": 0, "max_total": 1000, "stop_ids": frozenset(), "key": (0.0, 0)}
        return Request(prompt_len=len(tokens), tokens=list(tokens), params=params, **{**defaults, **fields})

    def admit(self, tokens: list[int] | Request, headroom: int = 0, chunk: int = 1000) -> Request | None:
        request = tokens if isinstance(tokens, Request) else self.request(tokens)
        self.entries, self.copies = [], []
        request.row = len(self.running)
        if not self.cache.admit(request, chunk, headroom, self.entries, self.copies):
            return None
        request.status = Status.RUNNING
        self.running.append(request)
        return request

    def compute(self, request: Request, upto: int) -> bool:
        """A step of its own that computes up to a position; as in the scheduler the pages are committed when the plan is complete."""
        ok = request.pages.capacity >= upto or self.cache.extend(request, upto, self.entries)
        self.cache.end_plan()
        if ok:
            request.computed = upto
            self.cache.commit(request)
        self.cache.check(self.running)
        return ok

    def end(self, request: Request) -> None:
        self.cache.release(request)
        self.running.remove(request)
        self.cache.check(self.running)

    def run(self, tokens: list[int], **fields) -> Request:
        """A request from beginning to end."""
        request = self.admit(self.request(tokens, **fields))
        assert request is not None
        while request.computed < len(tokens):
            assert self.compute(request, min(len(tokens), request.computed + S))
        self.end(request)
        return request

    def cached(self, tokens: list[int], **fields) -> int:
        """How many tokens of a prompt would be found now."""
        request = self.admit(self.request(tokens, **fields))
        assert request is not None
        found = request.computed
        self.cache.end_plan()
        request.computed = 0  # computed nothing, leaves nothing
        self.end(request)
        return found


def seq(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def test_pool_keeps_page_zero() -> None:
    pool = PagePool(5)
    pages = [pool.alloc() for _ in range(4)]
    assert sorted(pages) == [1, 2, 3, 4] and pool.num_free == 0
    with pytest.raises(IndexError):
        pool.alloc()
    pool.free(3)
    assert pool.alloc() == 3
    with pytest.raises(ValueError, match="num_pages"):
        PagePool(1)


def test_match_is_exact_to_the_token_and_leaves_one() -> None:
    bench = Bench()
    bench.run(seq(0, 10))
    assert bench.cached(seq(0, 10)) == 9  # the last token is always computed
    assert bench.cached(seq(0, 20)) == 10  # two pages and the tail
    assert bench.cached(seq(0, 8)) == 7  # inside a whole page
    assert bench.cached(seq(0, 6) + [99, 99]) == 6
    assert bench.cached([99] + seq(0, 10)) == 0
    assert bench.cached([0]) == 0


def test_whole_pages_are_shared_and_a_partial_one_is_copied() -> None:
    bench = Bench()
    first = bench.admit(seq(0, 10))
    assert first is not None and bench.compute(first, 10)
    table = list(first.pages.tables[0])
    assert bench.entries == [(0, 0, i, page) for i, page in enumerate(table)]
    second = bench.admit(seq(0, 7) + [99])
    assert second is not None and second.computed == 7 and second.pages.tables[0][0] == table[0]
    copied = second.pages.tables[0][1]
    assert bench.copies == [(0, table[1], copied)] and copied != table[1]
    assert bench.entries == [(0, 1, 0, table[0]), (0, 1, 1, copied)]
    assert bench.compute(second, 8)
    bench.end(first)
    bench.end(second)
    assert bench.cached(seq(0, 7) + [99, 1]) == 8


def test_closest_child_wins() -> None:
    bench = Bench()
    for prompt in ([1, 2, 3, 4], [1, 2, 9, 9], [1, 5, 5, 5], [2, 2, 2, 2], [1, 2, 3]):
        bench.run(prompt)
    assert bench.cached([1, 2, 3, 7, 7]) == 3
    assert bench.cached([1, 2, 9, 7, 7]) == 3
    assert bench.cached([1, 2, 4, 7, 7]) == 2
    assert bench.cached([1, 5, 4, 4]) == 2
    assert bench.cached([3, 1]) == 0


def test_tokens_still_unknown_or_not_computed_are_not_cached() -> None:
    bench = Bench()
    request = bench.admit(seq(0, 8))
    assert request is not None and bench.compute(request, 6)
    bench.end(request)
    assert bench.cached(seq(0, 9)) == 6
    running = bench.admit(seq(50, 8))
    assert running is not None and bench.compute(running, 8)
    assert bench.compute(running, 9)  # computes a token whose value the host does not know
    bench.end(running)
    assert bench.cached(seq(50, 12)) == 8


def test_a_longer_sequence_replaces_the_tail_it_continues() -> None:
    bench = Bench()
    bench.run(seq(0, 6))
    bench.run(seq(0, 7))  # a conversation's next turns
    bench.run(seq(0, 9))
    bench.run(seq(0, 7))
    pages = sum(bool(node.pages) for node in bench.cache.tree.walk(bench.cache.tree.root))
    assert pages == 3 and bench.cache.pools[0].num_free == 32 - 3


def test_equal_work_done_twice_stays_private() -> None:
    bench = Bench()
    a, b = bench.admit(seq(0, 8)), bench.admit(seq(0, 8))
    assert a is not None and b is not None and b.computed == 0
    assert bench.compute(a, 8) and bench.compute(b, 8)
    assert not set(a.pages.tables[0]) & set(b.pages.tables[0])
    bench.end(a)
    bench.end(b)
    assert bench.cache.pools[0].num_free == 32 - 2


def test_namespaces_do_not_share() -> None:
    bench = Bench()
    bench.run(seq(0, 8), namespace="a")
    assert bench.cached(seq(0, 9)) == 0
    assert bench.cached(seq(0, 9), namespace="b") == 0
    assert bench.cached(seq(0, 9), namespace="a") == 8


def test_prompt_logprobs_want_every_position_once() -> None:
    bench = Bench()
    bench.run(seq(0, 8))
    params = SamplingParams(prompt_logprobs=0)
    assert bench.cached(seq(0, 9), params=params) == 0
    complete = [TokenLogprobs([0], [0.0], [1])] * 8
    assert bench.cached(seq(0, 9), params=params, prompt_logprobs=complete) == 8  # resumed with all of them gathered


def test_least_recently_used_leaves_go_first() -> None:
    bench = Bench(pages=1 + 6)
    bench.run(seq(0, 8))
    bench.run(seq(100, 8))
    bench.run([*seq(0, 8), 50])  # uses the first again, and leaves a tail
    assert bench.cache.num_available(0) == 6
    big = bench.admit(seq(200, 12))
    assert big is not None and bench.cache.tree.evictions == 2
    bench.end(big)
    assert bench.cached(seq(100, 9)) == 0
    assert bench.cached(seq(0, 9)) == 8


def test_pages_in_use_are_never_evicted() -> None:
    bench = Bench(pages=1 + 5)
    bench.run(seq(0, 12))
    user = bench.admit(seq(0, 8) + [77])
    assert user is not None and user.computed == 8
    assert bench.cache.num_available(0) == 2
    assert bench.admit(seq(100, 12)) is None
    other = bench.admit(seq(100, 8))
    assert other is not None and not set(other.pages.tables[0]) & set(user.pages.tables[0])
    bench.cache.check(bench.running)


def test_headroom_is_left() -> None:
    bench = Bench(pages=1 + 5)
    assert bench.admit(seq(0, 16), headroom=2) is None
    assert bench.admit(seq(0, 16), headroom=1) is not None


def test_source_of_a_copy_stays_until_the_plan_is_complete() -> None:
    bench = Bench(pages=1 + 5)
    bench.run(seq(0, 4))
    first = bench.admit([0, 1, 99])
    assert first is not None and first.computed == 2
    source = bench.copies[0][1]
    assert bench.cache.num_available(0) == 3
    assert bench.admit(seq(100, 16)) is None
    second = bench.admit(seq(100, 12))
    assert second is not None and source not in second.pages.tables[0]
    bench.cache.end_plan()
    assert bench.cache.num_available(0) == 1


def test_a_request_that_fills_the_pool_does_without_the_copy() -> None:
    bench = Bench(pages=1 + 2)
    bench.run([0, 1, 2, 3, 4, 5])
    request = bench.admit([0, 1, 2, 3, 4, 5, 6, 7])
    assert request is not None and request.computed == 4 and not bench.copies
    assert bench.compute(request, 8)


def test_extend_takes_all_or_nothing() -> None:
    bench = Bench(kinds=(0, 1000), pages=1 + 3)
    request = bench.admit(seq(0, 4))
    assert request is not None and bench.compute(request, 4)
    assert not bench.cache.extend(request, 17, bench.entries)
    assert [pool.num_free for pool in bench.cache.pools] == [2, 2]
    assert bench.compute(request, 12)


def test_sliding_pages_behind_the_window_are_given_up_but_stay_matchable() -> None:
    bench = Bench(kinds=(6,), pages=1 + 20)
    request = bench.admit(seq(0, 40))
    assert request is not None
    for end in range(4, 41, 4):
        assert bench.compute(request, end)
    assert bench.cache.extend(request, 41, bench.entries)
    assert request.pages.first == [35 // S] and sum(map(bool, request.pages.tables[0])) == 3
    assert bench.cached(seq(0, 17)) == 16  # needs tokens 11..15 only
    bench.end(request)
    assert bench.cached(seq(0, 60)) == 40


def test_sliding_match_moves_back_to_where_the_window_is_whole() -> None:
    bench = Bench(kinds=(0, 6), pages=1 + 20)
    bench.run(seq(0, 24))
    tree = bench.cache.tree
    path = [n for n in tree.walk(tree.root) if n.pages]
    assert len(path) == 6
    bench.cache.tree.idle_pages[1].discard(path[4])
    bench.cache.pools[1].free(path[4].pages[1])
    path[4].pages[1] = 0  # as if evicted: tokens 16..19
    bench.cache.check([])
    assert bench.cached(seq(0, 18)) == 16  # would need the lost page itself
    assert bench.cached(seq(0, 24)) == 16  # tokens 18..22
    assert bench.cached(seq(0, 30)) == 16  # tokens 19..23: the last one of the lost page
    request = bench.admit(seq(0, 30))
    assert request is not None and request.computed == 16
    for end in range(20, 33, 4):
        assert bench.compute(request, min(end, 30))
    assert path[4].pages[1]  # adopted from the request that computed it again
    bench.end(request)
    assert bench.cached(seq(0, 30)) == 29


def test_sliding_eviction_leaves_the_node_and_its_full_page() -> None:
    bench = Bench(kinds=(0, 6), pages=1 + 20)
    bench.run(seq(0, 16))
    for _ in range(4):
        bench.cache.tree.evict(1)
    bench.cache.check([])
    assert [pool.num_free for pool in bench.cache.pools] == [16, 20]
    assert bench.cached(seq(0, 17)) == 0  # nothing to go on from


def test_only_sliding_kinds_leave_no_empty_nodes() -> None:
    bench = Bench(kinds=(6,), pages=1 + 20)
    bench.run(seq(0, 16))
    for _ in range(4):
        bench.cache.tree.evict(0)
    bench.cache.check([])
    assert not bench.cache.tree.root.children


def test_uncached_siblings_share_while_one_of_them_lives() -> None:
    bench = Bench(enabled=False)
    bench.run(seq(0, 8))
    assert bench.cache.pools[0].num_free == 32
    siblings = [bench.request(seq(0, 9), id=str(i), group="g") for i in range(2)]
    stranger = bench.request(seq(0, 9), group="h")
    for request in (*siblings, stranger):
        bench.cache.join(request)
    a = bench.admit(siblings[0])
    assert a is not None and bench.compute(a, 9)
    b, c = bench.admit(siblings[1]), bench.admit(stranger)
    assert b is not None and b.computed == 8 and c is not None and c.computed == 0
    for request in (a, b, c):
        bench.cache.end_plan()
        bench.end(request)
        bench.cache.leave(request)
    assert bench.cache.pools[0].num_free == 32 and not bench.cache.tree.root.children


def test_reset_spares_running_requests() -> None:
    bench = Bench(kinds=(0, 6))
    bench.run(seq(100, 8))
    request = bench.admit(seq(0, 12))
    assert request is not None and bench.compute(request, 12)
    bench.cache.reset()
    bench.cache.check(bench.running)
    assert bench.cached(seq(100, 9)) == 0 and bench.cached(seq(0, 13)) == 12
    bench.end(request)
    bench.cache.reset()
    assert [pool.num_free for pool in bench.cache.pools] == [32, 32]


def test_capacity_of_pools() -> None:
    def manager(kinds: tuple[int, ...], pages: list[int]) -> CacheManager:
        return CacheManager(kinds, pages, S, True)

    assert manager((0,), [11]).max_tokens == 40 and manager((0,), [11]).max_chunk == sys.maxsize
    assert manager((0, 6), [11, 5]).max_tokens == 40
    assert manager((6,), [5]).max_tokens == sys.maxsize
    # Four pages hold, at the worst alignment, 13 tokens: 5 of the window before, 8 new.
    assert manager((6,), [5]).max_chunk == 8
    assert manager((100,), [5]).max_tokens == 16  # smaller than the window: never slides
    with pytest.raises(ValueError, match="state kinds"):
        manager((0, 6), [11])


@pytest.mark.parametrize("damage", ["lost", "twice", "users", "order"])
def test_check_finds_damage(damage: str) -> None:
    bench = Bench()
    bench.run(seq(0, 8))
    request = bench.admit(seq(0, 9))
    assert request is not None
    bench.cache.end_plan()
    if damage == "lost":
        bench.cache.pools[0].alloc()
    elif damage == "twice":
        bench.cache.pools[0].free(request.pages.tables[0][0])
    elif damage == "users":
        request.pages.nodes[0].users += 1
    else:
        bench.end(request)
        bench.running.clear()
        first = next(iter(bench.cache.tree.idle))
        bench.cache.tree.idle.discard(first)
        bench.cache.tree.idle.add(first)
    with pytest.raises(RuntimeError, match="KV cache"):
        bench.cache.check(bench.running)


# ----------------------------------------------------------------------------------------------------- explanations


def why(b: Bench, tokens: list[int], **fields) -> tuple[int, str | None]:
    """Where a prompt's first miss is, and what is said of it."""
    request = b.admit(b.request(tokens, **fields))
    assert request is not None
    found, said = request.computed, b.cache.explain(request, b.running)
    b.cache.end_plan()
    request.computed = 0
    b.end(request)
    return found, said


def test_a_miss_is_explained() -> None:
    b, prompt = Bench(), seq(0, 10)
    assert why(b, prompt) == (0, "never_seen")
    b.run(prompt)
    assert why(b, prompt) == (9, None)  # the last token is always computed
    assert why(b, prompt[:6] + seq(90, 6)) == (6, "never_seen")
    assert why(b, prompt + seq(90, 6)) == (10, "never_seen")
    b.cache.reset()
    assert why(b, prompt) == (0, "evicted")
    assert why(b, prompt[:9] + seq(50, 9)) == (0, "evicted")  # its first page was there
    assert why(b, [77, *prompt]) == (0, "never_seen")


def test_an_evicted_end_is_told_from_an_end_never_seen() -> None:
    b, prompt = Bench(pages=5), seq(0, 12)
    b.run(prompt)
    holder = b.admit(seq(500, 8))  # takes the last free page, and evicts the prompt's end
    assert holder is not None
    b.cache.end_plan()
    b.end(holder)
    assert why(b, prompt) == (8, "evicted")
    assert why(b, prompt[:9]) == (8, None)
    assert why(b, prompt[:8] + seq(70, 3)) == (8, "never_seen")


def test_a_lost_window_is_an_eviction() -> None:
    b, prompt = Bench(kinds=(0, 6), pages=17), seq(0, 16)
    b.run(prompt)
    while len(b.cache.tree.evictable(1)):
        b.cache.tree.evict(1)
    assert why(b, prompt) == (0, "evicted")


def test_salts_explain_only_what_is_unsalted() -> None:
    b, prompt = Bench(), seq(0, 8)
    b.run(prompt, namespace="a")
    assert why(b, prompt, namespace="b") == (0, "never_seen") == why(b, prompt)
    b.run(prompt)
    assert why(b, prompt, namespace="b") == (0, "other_salt")
    assert why(b, prompt, namespace="a") == (7, None)


def test_pages_of_a_running_request_explain_a_miss() -> None:
    b, prompt = Bench(), seq(0, 12)
    first = b.admit(prompt)
    assert first is not None
    assert why(b, prompt) == (0, "not_yet_computed")
    assert b.compute(first, 6)
    assert why(b, prompt) == (4, "page_boundary")  # two tokens more are computed, in a page that is not whole
    assert why(b, [*prompt[:4], 99, 98]) == (4, "never_seen")
    assert why(b, prompt, namespace="b") == (0, "other_salt")


def test_what_forbids_reuse_is_named() -> None:
    prompt = seq(0, 8)
    off = Bench(enabled=False)
    assert why(off, prompt) == (0, "disabled")
    b = Bench()
    b.run(prompt)
    assert why(b, prompt, params=SamplingParams(prompt_logprobs=0)) == (0, "prompt_logprobs")
    tight = Bench(pages=3)
    tight.run(prompt[:6])
    assert why(tight, [*prompt[:5], 9, 9, 9]) == (4, "page_boundary")  # the copy's source would take a third page


def test_the_memory_of_evictions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radix, "EVICTED_KEPT", 3)
    b = Bench()
    for start in (0, 100, 200, 300):
        b.run(seq(start, S))
    b.cache.reset()
    assert [why(b, seq(start, S))[1] for start in (0, 100, 200, 300)] == ["never_seen", "evicted", "evicted", "evicted"]


def test_kept_prefixes_go_last_until_their_time() -> None:
    """A finished request's hint protects its whole path from eviction by newcomers, for its time, and never refuses anybody pages."""
    cache = CacheManager((0,), [1 + 8], 4, True)
    now = 0.0

    def play(tokens: list[int], keep: float = 0.0) -> int:
        """Runs a request of these tokens to its end; how many it found cached."""
        r = Request("r", len(tokens), tokens, SamplingParams(), 0, 99, frozenset(), (0.0, 0), row=0)
        assert cache.admit(r, 99, 0, [], [])
        found = r.computed
        r.computed = len(tokens)
        cache.end_plan()
        cache.release(r, [(len(tokens), now + keep)] if keep else [])
        cache.check([])
        return found

    kept, other = list(range(100, 110)), list(range(200, 210))
    play(kept, keep=10.0)
    play(other)
    for base in (300, 400, 500):  # each takes three of eight pages
        play(list(range(base, base + 12)))
    assert play([*kept, 1]) == 10 and play([*other, 1]) == 0
    assert play(list(range(600, 632))) == 0, "kept pages give way when there are no others"
    play(kept, keep=10.0)
    now = 11.0
    cache.tick(now)
    for base in (700, 800, 900):
        play(list(range(base, base + 12)))
    assert play([*kept, 1]) == 0


def test_a_kept_prefix_does_not_keep_what_follows_it() -> None:
    """`keep` names how many tokens, to the page: the rest of the request is like everybody's."""
    b = Bench(pages=1 + 8)
    asked = b.admit(seq(100, 20))
    assert asked is not None and b.compute(asked, 20)
    b.running.remove(asked)
    b.cache.release(asked, [(8, 10.0), (5, 20.0)])
    b.cache.check([])
    b.run(seq(300, 24))  # needs six of eight pages
    assert b.cached(seq(100, 20)) == 8
    b.cache.tick(11.0)
    b.run(seq(400, 32))
    assert b.cached(seq(100, 20)) == 0


# ------------------------------------------------------------------------------------------------------------- pins


def play(b: Bench, tokens: list[int]) -> int:
    """A whole request; how many of its tokens were cached."""
    found = b.cached(tokens)
    b.run(tokens)
    return found


def test_pinned_pages_stay_whatever_comes() -> None:
    b = Bench(pages=1 + 8)
    assert b.cache.pin("p", "", seq(100, 11)) is None  # two whole pages, and three tokens that are not pinned
    b.run(seq(100, 11))
    for base in (200, 300, 400, 500):
        b.run(seq(base, 24))
        b.cache.check([])
    assert b.cached(seq(100, 20)) == 8
    assert b.cache.describe_pins() == {"p": {"pages": 2, "resident": 2, "hits": 1}}
    b.cache.unpin(["p", "nobody"])
    assert b.cache.describe_pins() == {} and b.cache.pins.num_pages == 0
    b.run(seq(600, 24))
    b.run(seq(700, 28))
    assert b.cached(seq(100, 20)) == 0


def test_pins_count_as_taken_but_for_a_request_that_runs_alone() -> None:
    b = Bench(pages=1 + 8)
    assert b.cache.pin("p", "", seq(100, 8)) is None
    b.run(seq(100, 8))
    assert (b.cache.num_available(0), b.cache.num_available(0, pins=True)) == (6, 8)
    assert b.admit(seq(200, 28)) is None, "seven pages, of which one is pinned"
    long = b.request(seq(200, 28))
    assert b.cache.admit(long, 100, 0, [], [], pins=True)
    b.running.append(long)
    b.cache.end_plan()
    b.compute(long, 28)
    assert not b.cache.extend(long, 32, []) and b.cache.extend(long, 32, [], pins=True)
    b.end(long)
    assert b.cached(seq(100, 9)) == 0
    b.run(seq(100, 8))
    b.run(seq(300, 24))
    assert b.cached(seq(100, 9)) == 8, "computed again, it is pinned again"


def test_a_page_in_two_pins_stays_until_both_are_gone() -> None:
    b = Bench(pages=1 + 16)
    assert b.cache.pin("a", "", seq(100, 8)) is None and b.cache.pin("b", "", [*seq(100, 4), *seq(200, 4)]) is None
    assert b.cache.pins.num_pages == 3
    b.run(seq(100, 8))
    b.cache.unpin(["a"])
    assert b.cache.pins.num_pages == 2 and b.cache.tree.idle.num_pinned == 1
    b.cache.check([])


@pytest.mark.parametrize(
    "tokens, enabled, said",
    [
        (seq(0, 3), True, "shorter than a KV page"),
        (seq(0, 40), True, "needs 10 more pinned KV pages; 0 are pinned, and 8 of 32 may be"),
        (seq(0, 8), False, "prefix caching is off"),
    ],
)
def test_what_cannot_be_pinned_is_said(tokens: list[int], enabled: bool, said: str) -> None:
    b = Bench(enabled=enabled)
    assert said in (b.cache.pin("p", "", tokens) or "")
    assert not b.cache.pins.by_id and not b.cache.pins.num_pages


def test_of_a_sliding_kind_only_the_window_before_the_end_is_pinned() -> None:
    b = Bench(kinds=(0, 6), pages=1 + 40)
    assert b.cache.pin("p", "", seq(100, 40)) is None
    assert [len(pinned) for pinned in b.cache.pins.pinned] == [10, 2]
    b.run(seq(100, 40))
    for base in (300, 400, 500):
        b.run(seq(base, 80))
    assert b.cached(seq(100, 45)) == 40


def test_pins_know_salts() -> None:
    b = Bench(pages=1 + 8)
    assert b.cache.pin("p", "mine", seq(100, 8)) is None
    b.run(seq(100, 8), namespace="mine")
    b.run(seq(100, 8))
    b.run(seq(200, 24))
    assert b.cached(seq(100, 9), namespace="mine") == 8 and b.cached(seq(100, 9)) == 0


def test_a_pin_whose_values_are_not_trusted_is_dropped() -> None:
    b = Bench()
    assert b.cache.pin("p", "", seq(100, 8)) is None
    bad = b.admit(seq(100, 8))
    assert bad is not None and b.compute(bad, 8)
    b.running.remove(bad)
    b.cache.discard(bad)
    b.cache.check([])
    assert b.cached(seq(100, 9)) == 0 and b.cache.describe_pins()["p"]["resident"] == 0
