"""The prefix tree: which token prefixes have their KV in which pages, and which of those pages may be evicted next.

Owns nodes, matching and eviction order. Knows neither requests nor page tables (manager.py) and decides no admission (scheduler.py).

One node is one page of tokens below its parent, holding one page per state kind. A node with fewer tokens than a page is a *tail*: where
a sequence ended; it never has children. Radix reuse after SGLang's RadixAttention [Zheng et al. 2024], here page by page.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf

from miniinfer.cache.pool import PagePool

TOKEN_BYTES = 4
EVICTED_KEPT = 1 << 15  # evicted pages that are remembered, some 150 bytes each


def pack(tokens: Sequence[int]) -> bytes:
    """Token ids as a tree key, TOKEN_BYTES each."""
    return array("I", tokens).tobytes()


class Node:
    """A page of tokens in the tree. Two counts protect it from eviction:

    `users`: requests whose path runs through it; protects the node and its pages of full-attention kinds.
    `refs[k]`: requests that read its page of sliding kind k; a sliding page may go while the node stays (pages[k] becomes 0)."""

    __slots__ = ("children", "digest", "keep_until", "key", "keys", "pages", "parent", "refs", "users")

    def __init__(self, parent: Node | None, key: bytes, pages: list[int]) -> None:
        self.parent = parent
        self.key = key
        self.digest: int = 0 if parent is None else hash((parent.digest, key))  # of the whole path; it outlives the node in the list of the evicted
        self.pages = pages  # per kind, 0 = none
        self.users = 0
        self.keep_until = 0.0  # time before which others are evicted first; never earlier than a descendant's
        self.refs = [0] * len(pages)
        self.children: dict[bytes, Node] = {}
        self.keys: list[bytes] = []  # the children's keys, sorted: the longest common prefix is with a neighbour

    def closest(self, key: bytes) -> tuple[Node | None, int]:
        """The child that shares the most leading tokens with `key`, and how many."""
        at = bisect_left(self.keys, key)
        best, common = None, 0
        for near in self.keys[max(0, at - 1) : at + 1]:
            shared = _common_tokens(near, key)
            if shared > common:
                best, common = self.children[near], shared
        return best, common


def _common_tokens(a: bytes, b: bytes) -> int:
    size = min(len(a), len(b))
    differ = int.from_bytes(a[:size], "big") ^ int.from_bytes(b[:size], "big")
    return (size - (differ.bit_length() + 7) // 8) // TOKEN_BYTES


class LRU:
    """Eviction policy: least recently released first; after all others nodes that are to be kept for a while; and last of all pinned ones.

    A policy must never name an idle node before its idle descendants. LRU keeps that by itself, because whoever uses a node uses its
    ancestors too, and lets go of them later (paths are released from the end); and a node is kept or pinned as long as any below it."""

    def __init__(self, pinned: Container[int]) -> None:
        """`pinned`: the digests of nodes that are."""
        self._order: OrderedDict[Node, None] = OrderedDict()
        self._kept: OrderedDict[Node, None] = OrderedDict()
        self._pinned: OrderedDict[Node, None] = OrderedDict()
        self._digests = pinned
        self._now, self._next = 0.0, inf  # the time, and when the first of the kept is due

    def tick(self, now: float) -> None:
        """It is `now`: what need not be kept any longer is like all others, as if released now."""
        self._now = now
        if now < self._next:
            return
        for node in [node for node in self._kept if node.keep_until <= now]:
            del self._kept[node]
            self._order[node] = None
        self._next = min((node.keep_until for node in self._kept), default=inf)

    def add(self, node: Node) -> None:
        if node.digest in self._digests:
            self._pinned[node] = None
        elif node.keep_until > self._now:
            self._kept[node] = None
            self._next = min(self._next, node.keep_until)
        else:
            self._order[node] = None

    def discard(self, node: Node) -> None:
        self._order.pop(node, None)
        self._kept.pop(node, None)
        self._pinned.pop(node, None)

    def pop(self) -> Node:
        return (self._order or self._kept or self._pinned).popitem(last=False)[0]

    def has(self, node: Node, pinned: bool) -> bool:
        """Is this node here; `pinned`: even if it is pinned."""
        return node in self._order or node in self._kept or (pinned and node in self._pinned)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    @property
    def num_pinned(self) -> int:
        return len(self._pinned)

    def __len__(self) -> int:
        return len(self._order) + len(self._kept) + len(self._pinned)

    def __iter__(self) -> Iterator[Node]:
        return chain(self._order, self._kept, self._pinned)


@dataclass(slots=True)
class Match:
    """A usable prefix: whole pages of `nodes`, then, if `source` is given, the first tokens of its page, to be copied."""

    nodes: list[Node]
    source: Node | None
    length: int  # tokens
    whole: int  # leading nodes that are usable without the source

    def without_source(self, page_size: int) -> Match:
        return Match(self.nodes[: self.whole], None, self.whole * page_size, self.whole)


NO_MATCH = Match([], None, 0, 0)


class RadixTree:
    """One tree over all namespaces: a namespace is a child of the root without pages. `windows` per kind, 0 = full attention."""

    def __init__(self, windows: Sequence[int], page_size: int, pools: Sequence[PagePool], pinned: Sequence[Container[int]]) -> None:
        """`pinned`: per kind, the digests of nodes whose pages go last."""
        self.windows = tuple(windows)
        self.page_size = page_size
        self.sliding = tuple(k for k, window in enumerate(windows) if window)
        self.root = Node(None, b"", [])
        self.evictions = 0
        self._evicted: OrderedDict[int, None] = OrderedDict()  # digests of pages evicted lately, oldest first
        self._pools = pools
        self.idle = LRU(() if windows[0] else pinned[0])  # nodes on nobody's path; a full kind, which they are evicted for, comes first
        self.idle_pages = {k: LRU(pinned[k]) for k in self.sliding}  # nodes whose page of that kind nobody reads

    # ---------------------------------------------------------------------------------------------------- lookup

    def namespace(self, name: str) -> Node:
        """The node below which a namespace's prefixes live, made if need be; lock it to keep it."""
        key = name.encode("utf-8", "surrogatepass")
        node = self.root.children.get(key)
        if node is None:
            node = self._attach(self.root, key, [])
        return node

    def match(self, name: str, tokens: Sequence[int], limit: int) -> Match:
        """The longest prefix of tokens[:limit] from which computation can go on.

        A full kind needs its pages on the whole path (nodes always have them); a sliding kind of window w only those that cover the
        last w - 1 tokens before the end, so where such a page was evicted the end moves back."""
        node = self.root.children.get(name.encode("utf-8", "surrogatepass"))
        if node is None or limit <= 0:
            return NO_MATCH
        packed, width = pack(tokens[:limit]), self.page_size * TOKEN_BYTES
        path: list[Node] = []
        usable = 0  # leading nodes after which computation can go on
        present = dict.fromkeys(self.sliding, 0)  # per sliding kind: since which index no page is missing
        while (child := node.children.get(packed[len(path) * width : (len(path) + 1) * width])) is not None and len(child.key) == width:
            node = child
            path.append(node)
            for k in self.sliding:
                if not node.pages[k]:
                    present[k] = len(path)
            if self._covered(present, len(path) * self.page_size):
                usable = len(path)
        source, common = node.closest(packed[len(path) * width : (len(path) + 1) * width])
        if source is not None and all(source.pages[k] for k in self.sliding):
            length = len(path) * self.page_size + common
            if self._covered(present, length):
                return Match(path, source, length, usable)
        return Match(path[:usable], None, usable * self.page_size, usable)

    def was_evicted(self, name: str, tokens: Sequence[int], at: int) -> bool:
        """Whether a page that held tokens[:at + 1], or its part of a sliding window, was evicted lately; asked where `match` ended at `at`."""
        packed, width = pack(tokens), self.page_size * TOKEN_BYTES
        key = name.encode("utf-8", "surrogatepass")
        digest, node = hash((self.root.digest, key)), self.root.children.get(key)
        pages, inside = divmod(at, self.page_size)
        for i in range(pages):
            key = packed[i * width : (i + 1) * width]
            digest, node = hash((digest, key)), node and node.children.get(key)
        key = packed[pages * width : (pages + 1) * width]
        if node is not None and node.closest(key)[1] > inside:  # the node has stayed, its page of some window has not
            return True
        return any(hash((digest, key[: n * TOKEN_BYTES])) in self._evicted for n in range(inside + 1, len(key) // TOKEN_BYTES + 1))

    def digests(self, name: str, tokens: Sequence[int]) -> list[int]:
        """The digests that the nodes of these tokens' whole pages have or would have."""
        packed, width = pack(tokens), self.page_size * TOKEN_BYTES
        found = [hash((self.root.digest, name.encode("utf-8", "surrogatepass")))]
        for start in range(0, len(packed) - width + 1, width):
            found.append(hash((found[-1], packed[start : start + width])))
        return found[1:]

    def first_needed(self, kind: int, position: int) -> int:
        """Index of the first page that computing `position` and later ones reads."""
        window = self.windows[kind]
        return max(0, position - window + 1) // self.page_size if window else 0

    def _covered(self, present: dict[int, int], end: int) -> bool:
        return all(self.first_needed(k, end) >= since for k, since in present.items())

    # ------------------------------------------------------------------------------------------------------ usage

    def lock(self, node: Node) -> None:
        if node.users == 0:
            self.idle.discard(node)
        node.users += 1

    def unlock(self, node: Node) -> None:
        """Undoes one lock. Unlock a path from its end: the eviction order rests on it."""
        node.users -= 1
        if node.users == 0:
            if node.pages:  # a namespace holds none, so it is never evicted, only pruned
                self.idle.add(node)
            self._prune(node)

    def keep(self, node: Node, until: float) -> None:
        """Has an idle node, of which no ancestor may be kept for less, evicted after others until then."""
        node.keep_until = max(node.keep_until, until)
        self._reorder(node)

    def reorder(self, name: str, tokens: Sequence[int]) -> None:
        """These tokens' pages have been pinned, or are no longer: puts idle ones where they belong now."""
        packed, width = pack(tokens), self.page_size * TOKEN_BYTES
        node, path = self.root.children.get(name.encode("utf-8", "surrogatepass")), list[Node]()
        while node is not None and (node := node.children.get(packed[len(path) * width : (len(path) + 1) * width])) is not None:
            path.append(node)
        for node in reversed(path):
            self._reorder(node)

    def _reorder(self, node: Node) -> None:
        orders = [] if node.users else [self.idle]
        for order in orders + [self.idle_pages[k] for k in self.sliding if node.pages[k] and not node.refs[k]]:
            order.discard(node)
            order.add(node)

    def tick(self, now: float) -> None:
        """Tells the time, by which kept nodes cease to be."""
        for order in (self.idle, *self.idle_pages.values()):
            order.tick(now)

    def hold(self, node: Node, kind: int) -> None:
        """Protects a node's page of a sliding kind."""
        if node.refs[kind] == 0:
            self.idle_pages[kind].discard(node)
        node.refs[kind] += 1

    def drop(self, node: Node, kind: int) -> None:
        """Undoes one hold."""
        node.refs[kind] -= 1
        if node.refs[kind] == 0:
            self.idle_pages[kind].add(node)

    # ------------------------------------------------------------------------------------------------ growth, decay

    def insert(self, parent: Node, key: bytes, pages: list[int]) -> Node:
        """A new child that owns `pages` from now on, idle until locked and held. A tail that it extends has become superfluous."""
        at = bisect_left(parent.keys, key)
        if at and key.startswith(parent.keys[at - 1]):
            shorter = parent.children[parent.keys[at - 1]]
            if shorter.users == 0:
                self._remove(shorter)
        return self._attach(parent, key, pages)

    def covers(self, parent: Node, key: bytes) -> bool:
        """Does some child start with `key`?"""
        at = bisect_left(parent.keys, key)
        return at < len(parent.keys) and parent.keys[at].startswith(key)

    def adopt(self, node: Node, kind: int, page: int) -> None:
        """Gives a node the page of a sliding kind that it had lost."""
        node.pages[kind] = page
        self.idle_pages[kind].add(node)

    def evictable(self, kind: int) -> LRU:
        """The nodes whose page of a kind may be evicted."""
        return self.idle_pages[kind] if self.windows[kind] else self.idle

    def evict(self, kind: int) -> None:
        """Frees one page of a kind (a full kind's page takes its node, and the node's pages of other kinds, with it)."""
        self.evictions += 1
        if not self.windows[kind]:
            node = self.idle.pop()
            parent = node.parent
            self._forget(node)
        else:
            node = parent = self.idle_pages[kind].pop()
            self._pools[kind].free(node.pages[kind])
            node.pages[kind] = 0
        assert parent is not None
        self._prune(parent)

    def clear(self) -> None:
        """Drops every node and page that no request uses."""
        while len(self.idle):
            node = self.idle.pop()
            parent = node.parent
            self._forget(node)
            assert parent is not None
            self._prune(parent)
        for k in self.sliding:  # left over: pages behind the windows of running requests
            while len(self.idle_pages[k]):
                node = self.idle_pages[k].pop()
                self._pools[k].free(node.pages[k])
                node.pages[k] = 0

    def clear_namespace(self, name: str) -> None:
        """Drops a namespace of which no request uses any node."""
        top = self.root.children.get(name.encode("utf-8", "surrogatepass"))
        if top is None:
            return
        for node in reversed(list(self.walk(top))):  # children before parents
            self._remove(node)

    def drop_unused(self, node: Node) -> None:
        """Drops a node and what is below it, unless somebody uses it."""
        if node.users == 0 and node.pages:
            for each in reversed(list(self.walk(node))):  # children before parents
                self._remove(each)

    def walk(self, node: Node) -> Iterator[Node]:
        """A node and everything below it, parents first."""
        stack = [node]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _attach(self, parent: Node, key: bytes, pages: list[int]) -> Node:
        node = Node(parent, key, pages)
        parent.children[key] = node
        parent.keys.insert(bisect_left(parent.keys, key), key)
        if pages:
            self.idle.add(node)
        for k in self.sliding:
            if pages and pages[k]:
                self.idle_pages[k].add(node)
        return node

    def _remove(self, node: Node) -> None:
        """Takes a leaf that nobody uses out of the tree and frees its pages."""
        self.idle.discard(node)
        for k, page in enumerate(node.pages):
            if page:
                self._pools[k].free(page)
                if self.windows[k]:
                    self.idle_pages[k].discard(node)
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        del parent.keys[bisect_left(parent.keys, node.key)]

    def _forget(self, node: Node) -> None:
        """Removes a leaf, but remembers that it was there."""
        self._remove(node)
        self._evicted[node.digest] = None
        if len(self._evicted) > EVICTED_KEPT:
            self._evicted.popitem(last=False)

    def _prune(self, node: Node) -> None:
        """Removes a node that has become useless (no pages, children or users), then its parent if that has, and so on."""
        while node.parent is not None and not (node.users or node.children or any(node.pages)):
            parent = node.parent
            self._remove(node)
            node = parent
