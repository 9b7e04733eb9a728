"""CacheManager: which KV pages each running request holds, from prefix match to release.

Owns the requests' page tables on the host and the rules of sharing. Free pages are pool.py's, prefixes and eviction radix.py's; who gets to
run is the scheduler's. Moves no data: it hands out page numbers, page-table entries and copy orders for the plan in the making.

Why pages may change hands while steps that use them are still running: every plan is executed, and in order. A page freed, committed or
copied while building plan n is touched by its new owner in step n or later, so after all that older steps still write to it. Within
plan n copies come first, so a copy's source must have been written by an earlier plan and must not be given away in this one: pages are
committed only once the plan that computes them is complete, and sources stay locked until `end_plan`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from miniinfer.cache.pins import Pin, Pins
from miniinfer.cache.pool import PagePool
from miniinfer.cache.radix import NO_MATCH, TOKEN_BYTES, Match, Node, RadixTree, pack
from miniinfer.data import Request

PageEntry = tuple[int, int, int, int]  # StepPlan.page_entries
PageCopy = tuple[int, int, int]  # StepPlan.copies


@dataclass(eq=False, slots=True)
class Pages:
    """What one running request holds. Page i covers tokens [i * S, (i + 1) * S).

    Page tables[k][i] belongs to the tree if it is nodes[i]'s page of that kind, else to this request alone."""

    top: Node | None  # the namespace; None = shares nothing
    tables: list[list[int]]  # per kind and index; 0 = none (behind the window)
    first: list[int]  # per kind: index of the first page held
    nodes: list[Node] = field(default_factory=list)  # tree path of the committed pages, each locked
    capacity: int = 0  # tokens that fit into the pages held
    cut: bool = False  # what was found in the cache went on into a page for whose copy there was no room


class CacheManager:
    """Pages for requests, shared by equal prefixes. `kinds`: windows as in ModelConfig.state_kinds; `num_pages`: per kind, page 0 included.

    With `enabled` False requests share nothing, except siblings (n > 1) of one group while the group lives. If `deterministic`, only what was
    computed in chunks of a prompt is shared, and only with chunks of prompts: generated tokens, and prompts of one token, are computed
    by other kernels, whose last bits may differ.

    Pinned pages (`pin`, at most `max_pinned` of all) count as taken, except for a request that runs alone (`pins` in what follows): so whoever
    could run without pins can run with them, and nobody waits for ever."""

    def __init__(
        self,
        kinds: tuple[int, ...],
        num_pages: Sequence[int],
        page_size: int,
        enabled: bool,
        deterministic: bool = False,
        max_pinned: float = 0.25,
    ) -> None:
        if not kinds or len(kinds) != len(num_pages):
            raise ValueError(f"num_pages: expected one number for each of the state kinds {kinds}, got {list(num_pages)}")
        self.kinds, self.page_size, self.enabled, self.deterministic = kinds, page_size, enabled, deterministic
        self.pools = [PagePool(n) for n in num_pages]
        self.pins = Pins([pool.size for pool in self.pools], max_pinned)
        self.tree = RadixTree(kinds, page_size, self.pools, self.pins.pinned)
        self.query_tokens = 0  # of prompts admitted
        self.hit_tokens = 0  # of those, found in the cache
        self._full = [k for k, window in enumerate(kinds) if not window]
        self._sources: list[Node] = []  # copied from by the plan in the making
        self._members: Counter[str] = Counter()  # live requests per group, where groups are namespaces

    # ----------------------------------------------------------------------------------------------------- capacity

    @property
    def max_tokens(self) -> int:
        """The longest sequence that fits when alone."""
        return min((pool.size * self.page_size for k, pool in enumerate(self.pools) if self._room(k) < 1), default=sys.maxsize)

    @property
    def max_chunk(self) -> int:
        """The most tokens of one sequence that a step may compute: pages of a whole chunk and of the window before it are held at once."""
        return min((self._room(k) for k in range(len(self.kinds)) if self._room(k) >= 1), default=sys.maxsize)

    def _room(self, kind: int) -> int:
        """How many tokens a sliding kind's pool takes beside a window, at any alignment; below 1 sequences end before they could slide."""
        return (self.pools[kind].size - 1) * self.page_size + 2 - self.kinds[kind] if self.kinds[kind] else 0

    def num_available(self, kind: int, pins: bool = False) -> int:
        """Pages of a kind that no request holds and that are not pinned (`pins`: or are): free or evictable."""
        idle = self.tree.evictable(kind)
        return self.pools[kind].num_free + len(idle) - (0 if pins else idle.num_pinned)

    # -------------------------------------------------------------------------------------------- a request's pages

    def join(self, request: Request) -> None:
        """Announces a request, so that its group's shared pages live as long as one member does."""
        if not self.enabled and request.group is not None:
            self._members[request.group] += 1

    def leave(self, request: Request) -> None:
        """Undoes `join`, after `release`."""
        if self.enabled or request.group is None:
            return
        self._members[request.group] -= 1
        if not self._members[request.group]:
            del self._members[request.group]
            self.tree.clear_namespace(request.group)

    def admit(self, request: Request, chunk: int, headroom: int, entries: list[PageEntry], copies: list[PageCopy], pins: bool = False) -> bool:
        """Gives a request with a row its longest cached prefix (sets `computed`) and pages for all its known tokens.

        A full kind's pages are all allocated now, a sliding kind's by `extend`. At least one token is left to compute, and all of them
        while prompt log-probabilities are still wanted. False, with nothing changed, unless `headroom` pages of each kind would
        remain after it; `chunk` is the most tokens that a step will compute for it."""
        namespace = request.namespace if self.enabled else request.group
        wants_all = request.params.prompt_logprobs is not None and len(request.prompt_logprobs) < request.prompt_len - 1
        wants_all |= request.pooling == "mean" or request.alone
        limit = 0 if wants_all else self._reusable(request)
        match = found = NO_MATCH if namespace is None else self.tree.match(namespace, request.tokens, limit)
        if not self._fits(request, match, chunk, headroom, pins):
            # A copy's source takes a page more than the request itself: it must not keep a request out that fills the pool.
            match = match.without_source(self.page_size)
            if not self._fits(request, match, chunk, headroom, pins):
                return False
        self._take(request, match, namespace, entries, copies)
        for k in self._full:
            self._grow(request, k, len(request.tokens), entries)
        self._set_capacity(request.pages)
        request.pages.cut = match.length < found.length
        request.computed = match.length
        if request.preemptions == 0:
            request.cached_tokens = match.length
            self.query_tokens += request.prompt_len
            self.hit_tokens += match.length
            self.pins.note(request.id, match.nodes)
        return True

    def explain(self, request: Request, running: Iterable[Request]) -> str | None:
        """Why the first token that a request just admitted did not find in the cache was not there; None if it found all that can be reused.

        "disabled"; "prompt_logprobs" (they need every position); "page_boundary" (it is computed, in a page that cannot be shared: not yet
        whole, or none was left for its copy); "not_yet_computed" (a request that still runs will have it); "evicted" (lately, whole page by page);
        "other_salt" (it is there for requests without a salt); "never_seen". Of other salts' prefixes nothing is told: that is what salts are for."""
        namespace = request.namespace if self.enabled else request.group
        if namespace is None:
            return "disabled"
        if request.params.prompt_logprobs is not None:
            return "prompt_logprobs"
        tokens, at = request.tokens, request.computed
        limit = self._reusable(request)
        if at >= limit:
            return None
        if request.pages.cut:
            return "page_boundary"
        for other in running:
            related = other.namespace == namespace if self.enabled else other.group == namespace
            if other is not request and related and len(other.tokens) > at and other.tokens[at] == tokens[at] and other.tokens[:at] == tokens[:at]:
                return "page_boundary" if other.computed > at else "not_yet_computed"
        if self.tree.was_evicted(namespace, tokens, at):
            return "evicted"
        shared = self.enabled and namespace and self.tree.match("", tokens, limit).length > at
        return "other_salt" if shared else "never_seen"

    def extend(self, request: Request, upto: int, entries: list[PageEntry], pins: bool = False) -> bool:
        """Makes room for computing tokens [computed, upto); gives up pages behind the windows. False if too few pages are available."""
        pages: Pages = request.pages
        self.commit(request)
        for k in self.tree.sliding:
            needed = self.tree.first_needed(k, request.computed)
            for i in range(pages.first[k], min(needed, len(pages.tables[k]))):
                self._give_up(pages, k, i)
                pages.tables[k][i] = 0
            pages.first[k] = max(pages.first[k], needed)
        total = -(-upto // self.page_size)
        if any(total - len(table) > self.num_available(k, pins) for k, table in enumerate(pages.tables)):
            return False
        for k in range(len(self.kinds)):
            self._grow(request, k, upto, entries)
        self._set_capacity(pages)
        return True

    def commit(self, request: Request) -> None:
        """Puts pages whose tokens are all known and computed by plans handed out into the tree.

        Where the tree already has such a page ours stays private: no page table changes under a running step."""
        pages: Pages = request.pages
        if pages.top is None:
            return
        tokens, size, known = request.tokens, self.page_size, self._shareable(request)
        for i in range(len(pages.nodes), known // size):
            parent = pages.nodes[-1] if pages.nodes else pages.top
            key = pack(tokens[i * size : (i + 1) * size])
            node = parent.children.get(key)
            if node is None:
                node = self.tree.insert(parent, key, [table[i] for table in pages.tables])
            self.tree.lock(node)
            pages.nodes.append(node)
            for k in self.tree.sliding:
                page = pages.tables[k][i]
                if page and not node.pages[k]:
                    self.tree.adopt(node, k, page)
                if page and node.pages[k] == page:
                    self.tree.hold(node, k)

    def release(self, request: Request, keep: Iterable[tuple[int, float]] = ()) -> None:
        """Takes everything from a request: what is computed stays in the tree, to the token, until evicted; the rest is free at once.

        For each (tokens, until) of `keep`, others' pages are evicted before those of its first so many tokens until then, on the clock of `tick`;
        unless half of all pages are kept already.
        A step in flight may still write to these pages, but only behind the tokens committed here, or the very values they stand for."""
        pages: Pages = request.pages
        self.commit(request)
        tail = self._commit_tail(request)
        if 2 * self.tree.idle.num_kept < min(pool.size for pool in self.pools):
            for tokens, until in keep:
                for node in pages.nodes[: -(-tokens // self.page_size)]:
                    node.keep_until = max(node.keep_until, until)
                if tail is not None and tokens > len(pages.nodes) * self.page_size:
                    self.tree.keep(tail, until)
        for i in range(max(map(len, pages.tables)) - 1, -1, -1):  # from the end: the eviction order rests on it
            for k, table in enumerate(pages.tables):
                if i < len(table) and table[i]:
                    self._give_up(pages, k, i)
            if i < len(pages.nodes):
                self.tree.unlock(pages.nodes[i])
        if pages.top is not None:
            self.tree.unlock(pages.top)
        request.pages = None

    def discard(self, request: Request) -> None:
        """Takes everything from a request whose values cannot be trusted. Nothing on its path stays in the tree but what others are using."""
        pages: Pages = request.pages
        for i in range(max(map(len, pages.tables)) - 1, -1, -1):
            for k, table in enumerate(pages.tables):
                if i < len(table) and table[i]:
                    self._give_up(pages, k, i)
            if i < len(pages.nodes):
                self.tree.unlock(pages.nodes[i])
                self.tree.drop_unused(pages.nodes[i])
        if pages.top is not None:
            self.tree.unlock(pages.top)
        request.pages = None

    def pin(self, id: str, namespace: str, tokens: Sequence[int]) -> str | None:
        """Pins the whole pages of a prefix, whether or not they are there yet, until `unpin`. Why that is impossible, if it is."""
        if not self.enabled:
            return "prefix caching is off (enable_prefix_caching), so nothing can be pinned"
        tokens = list(tokens[: len(tokens) // self.page_size * self.page_size])
        if not tokens:
            return f"the prefix is shorter than a KV page, {self.page_size} tokens: there is nothing to pin"
        first = [self.tree.first_needed(k, len(tokens)) for k in range(len(self.kinds))]
        pin = Pin(namespace, tokens, self.tree.digests(namespace, tokens), first)
        refusal = self.pins.refusal(pin)
        if refusal is None:
            self.pins.add(id, pin)
            self.tree.reorder(namespace, tokens)
        return refusal

    def unpin(self, ids: Iterable[str]) -> None:
        """From now on these prefixes are like others. Unknown ids are ignored."""
        for id in ids:
            pin = self.pins.remove(id)
            if pin is not None:
                self.tree.reorder(pin.namespace, pin.tokens)

    def describe_pins(self) -> dict[str, dict[str, int]]:
        """By id: the pages of each pin, how many of them are there at present, and how many requests have found them all."""
        return {
            id: {
                "pages": len(pin.digests),
                "resident": self.tree.match(pin.namespace, pin.tokens, len(pin.tokens)).whole,
                "hits": pin.hits,
            }
            for id, pin in self.pins.by_id.items()
        }

    def tick(self, now: float) -> None:
        """Tells the time: pages that were to be kept until then are like all others again."""
        self.tree.tick(now)

    def end_plan(self) -> None:
        """The plan is complete: sources of its copies may be evicted by the next."""
        for node in self._sources:
            for k in self.tree.sliding:
                self.tree.drop(node, k)
            self.tree.unlock(node)
        self._sources.clear()

    def reset(self) -> None:
        """Forgets every prefix that no running request uses."""
        self.tree.clear()

    # ---------------------------------------------------------------------------------------------------- internals

    def _reusable(self, request: Request) -> int:
        """How many of its first tokens may come from the cache: at least one is left to compute."""
        return max(0, request.prompt_len - 2) if self.deterministic else len(request.tokens) - 1

    def _fits(self, request: Request, match: Match, chunk: int, headroom: int, pins: bool) -> bool:
        total = -(-len(request.tokens) // self.page_size)
        for k, window in enumerate(self.kinds):
            first = self.tree.first_needed(k, match.length)
            held = total - first
            if window:
                held = min(held, (window + chunk - 3) // self.page_size + 2)  # pages that window - 1 + chunk tokens can touch
            shared, evictable = match.nodes[first:], self.tree.evictable(k)
            # Matched pages that nobody uses count as available now, but no longer once this request has them.
            idle = sum(evictable.has(node, pins) for node in shared)
            if match.source is not None:
                idle += evictable.has(match.source, pins)
            if held - len(shared) + idle + headroom > self.num_available(k, pins):
                return False
        return True

    def _take(self, request: Request, match: Match, namespace: str | None, entries: list[PageEntry], copies: list[PageCopy]) -> None:
        tree = self.tree
        top = None if namespace is None else tree.namespace(namespace)
        first = [tree.first_needed(k, match.length) for k in range(len(self.kinds))]
        tables = [[0] * skip + [node.pages[k] for node in match.nodes[skip:]] for k, skip in enumerate(first)]
        request.pages = Pages(top=top, tables=tables, first=first, nodes=list(match.nodes))
        if top is not None:
            tree.lock(top)
        for node in match.nodes:
            tree.lock(node)
        for k in tree.sliding:
            for node in match.nodes[first[k] :]:
                tree.hold(node, k)
        for k, table in enumerate(tables):
            entries.extend((k, request.row, i, table[i]) for i in range(first[k], len(table)))
        if match.source is None:
            return
        tree.lock(match.source)
        for k in tree.sliding:
            tree.hold(match.source, k)
        self._sources.append(match.source)
        for k in range(len(self.kinds)):
            self._grow(request, k, match.length, entries)
            copies.append((k, match.source.pages[k], tables[k][-1]))

    def _grow(self, request: Request, kind: int, upto: int, entries: list[PageEntry]) -> None:
        table, pool = request.pages.tables[kind], self.pools[kind]
        for i in range(len(table), -(-upto // self.page_size)):
            if not pool.num_free:
                self.tree.evict(kind)
            page = pool.alloc()
            table.append(page)
            entries.append((kind, request.row, i, page))

    def _give_up(self, pages: Pages, kind: int, i: int) -> None:
        page = pages.tables[kind][i]
        if i >= len(pages.nodes) or pages.nodes[i].pages[kind] != page:
            self.pools[kind].free(page)
        elif self.kinds[kind]:
            self.tree.drop(pages.nodes[i], kind)

    def _shareable(self, request: Request) -> int:
        """How many of its first tokens are computed and may be put into the tree."""
        if self.deterministic:
            return min(request.computed, request.prompt_len) if request.prompt_len > 1 else 0
        return min(request.computed, len(request.tokens))

    def _commit_tail(self, request: Request) -> Node | None:
        """Puts the tokens of a last, unfilled page into the tree. The new node if there is one."""
        pages: Pages = request.pages
        done = len(pages.nodes)
        key = pack(request.tokens[done * self.page_size : self._shareable(request)])
        parent = pages.nodes[-1] if pages.nodes else pages.top
        if parent is None or not key or self.tree.covers(parent, key):
            return None
        held = [table[done] for table in pages.tables]
        if not any(held):  # behind every window
            return None
        tail = self.tree.insert(parent, key, held)
        for table in pages.tables:
            table[done] = 0
        return tail

    def _set_capacity(self, pages: Pages) -> None:
        pages.capacity = min(map(len, pages.tables)) * self.page_size

    # ----------------------------------------------------------------------------------------------------- invariants

    def check(self, running: Iterable[Request]) -> None:
        """Proves that every page is in exactly one place and that every count is right. Call between plans. Raises RuntimeError."""
        held = [request.pages for request in running]
        nodes = [node for node in self.tree.walk(self.tree.root) if node.parent is not None]
        self._check_tree(nodes)
        nodes = [node for node in nodes if node.pages]  # without the namespaces
        users = Counter(node for pages in held for node in pages.nodes)
        _ensure(not self._sources, "a copy's source is still locked")
        _ensure(users == Counter({node: node.users for node in nodes if node.users}), "a node's users are not the requests whose path it is on")
        _ensure(set(self.tree.idle) == {node for node in nodes if not node.users}, "idle nodes are not those without users")
        for k in range(len(self.kinds)):
            self._check_kind(k, nodes, held)
        for pages in held:
            _ensure(all(not any(t[:f]) and all(t[f:]) for t, f in zip(pages.tables, pages.first, strict=True)), "a page table has a hole")
            _ensure(pages.capacity == min(map(len, pages.tables)) * self.page_size, "a request's capacity is not its pages'")

    def _check_tree(self, nodes: list[Node]) -> None:
        full = self.page_size * TOKEN_BYTES
        for node in nodes:
            parent = node.parent
            if parent is None or parent.children.get(node.key) is not node or len(parent.keys) != len(parent.children):
                raise RuntimeError("KV cache: a node is not its parent's child")
            if not (node.users or node.children or any(node.pages)):
                raise RuntimeError("KV cache: a useless node was not pruned")
            if node.pages and node.children and len(node.key) < full:
                raise RuntimeError("KV cache: a tail has children")
            if len(node.keys) > 1 and node.keys != sorted(node.children):
                raise RuntimeError("KV cache: a node's keys are not its children's")
        seen: set[Node | None] = set()
        for node in self.tree.idle:
            _ensure(node.parent not in seen, "a node would be evicted before its descendant")
            seen.add(node)

    def _check_kind(self, k: int, nodes: list[Node], held: list[Pages]) -> None:
        places = self.pools[k].free_pages()
        places += [node.pages[k] for node in nodes if node.pages[k]]
        refs: Counter[Node] = Counter()
        for pages in held:
            for i in range(pages.first[k], len(pages.tables[k])):
                page = pages.tables[k][i]
                if i < len(pages.nodes) and pages.nodes[i].pages[k] == page:
                    refs[pages.nodes[i]] += 1
                else:
                    places.append(page)
        places.sort()
        _ensure(places == list(range(1, self.pools[k].size + 1)), f"kind {k}: a page is in no place or in two")
        order, pinned = self.tree.evictable(k), self.pins.pinned[k]
        _ensure(all(order.has(node, False) != (node.digest in pinned) for node in order), f"kind {k}: a pinned page does not go last")
        if not self.kinds[k]:
            _ensure(all(node.pages[k] for node in nodes), f"kind {k}: a node has lost its page")
            return
        _ensure(refs == Counter({node: node.refs[k] for node in nodes if node.refs[k]}), f"kind {k}: a page's references are not its holders")
        idle = {node for node in nodes if node.pages[k] and not node.refs[k]}
        _ensure(set(self.tree.idle_pages[k]) == idle, f"kind {k}: idle pages are not those without holders")


def _ensure(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(f"KV cache: {message}")
