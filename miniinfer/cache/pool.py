"""PagePool: which pages of one KV state kind are free. Owns page numbers only, neither memory nor meaning."""

from __future__ import annotations


class PagePool:
    """Pages 1 .. num_pages - 1 of one state kind. Page 0 belongs to nobody: padding is written there, and 0 stands for "no page"."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages: must be at least 2 (page 0 is reserved), got {num_pages}")
        self.size = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def alloc(self) -> int:
        """A free page, the one freed last first (its lines may still be in a cache). Raises IndexError if there is none."""
        return self._free.pop()

    def free(self, page: int) -> None:
        self._free.append(page)

    def free_pages(self) -> list[int]:
        """A copy of the free list, for checks."""
        return self._free.copy()
