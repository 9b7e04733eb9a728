"""Pins: prefixes whose pages outlive all others. Which they are, how often they were found, and how much may be pinned.

Owns the promise only. A page is pinned by what it holds, told by the digest of its path in the tree, and not by being there: so a pin needs no
page when it is made, and one that was lost is pinned again as soon as anybody has computed it. Pages, and when they go, are radix.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miniinfer.cache.radix import Node


@dataclass(slots=True)
class Pin:
    """One prefix, in whole pages."""

    namespace: str
    tokens: list[int]
    digests: list[int]  # per page
    first: list[int]  # per kind: the first page that is needed to go on behind the prefix
    hits: int = 0  # requests that found all of it in the cache

    def parts(self) -> list[list[int]]:
        """The digests that are pinned, per kind."""
        return [self.digests[first:] for first in self.first]


class Pins:
    """All pins of a cache. `pinned[k]` counts, by digest, the pins that a page of kind k belongs to."""

    def __init__(self, sizes: Sequence[int], fraction: float) -> None:
        """At most `fraction` of each kind's pages (`sizes`) may be pinned."""
        self._sizes = list(sizes)
        self.limits = [int(size * fraction) for size in sizes]
        self.pinned: list[Counter[int]] = [Counter() for _ in sizes]
        self.by_id: dict[str, Pin] = {}

    @property
    def num_pages(self) -> int:
        """Pages that are promised, of all kinds."""
        return sum(map(len, self.pinned))

    def refusal(self, pin: Pin) -> str | None:
        """Why there is no room for a pin, if so."""
        for k, (part, pinned) in enumerate(zip(pin.parts(), self.pinned, strict=True)):
            new = sum(digest not in pinned for digest in part)
            if len(pinned) + new > self.limits[k]:
                return (
                    f"the prefix needs {new} more pinned KV pages; {len(pinned)} are pinned, and {self.limits[k]} of {self._sizes[k]} may be"
                    " (max_pinned_fraction): delete a pinned prefix, or start the server with a larger fraction or more num_pages"
                )
        return None

    def add(self, id: str, pin: Pin) -> None:
        self.by_id[id] = pin
        for part, pinned in zip(pin.parts(), self.pinned, strict=True):
            pinned.update(part)

    def remove(self, id: str) -> Pin | None:
        """Ends a pin; None if there is none of that id."""
        pin = self.by_id.pop(id, None)
        if pin is not None:
            for part, pinned in zip(pin.parts(), self.pinned, strict=True):
                for digest in part:
                    pinned[digest] -= 1
                    if not pinned[digest]:
                        del pinned[digest]
        return pin

    def note(self, id: str, nodes: Sequence[Node]) -> None:
        """Counts the pins that a request found, whose cached pages are `nodes`; its own does not count."""
        for name, pin in self.by_id.items():
            last = len(pin.digests) - 1
            if name != id and last < len(nodes) and nodes[last].digest == pin.digests[last]:
                pin.hits += 1
