"""Ledger: what an engine process must be told to go on where another one died, and which request to blame if they keep dying.

Owns the open sequences with all that they have produced. Plain data: no sockets, no clock, no torch. A death is nobody's fault at first, and
everything is sent again at once. A request that has been there at two deaths makes the ledger careful: then requests go to the new process one
after the other, the next when the one before has produced PROOF tokens or has ended. If the process dies under such a trial, the request
on trial is given up, and those that had passed are sent at once. So each bad request costs three deaths, however many run beside it. A request
that kills only after more than PROOF further tokens is not found out by a trial; the limit on restarts ends that.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from miniinfer.data import Add

PROOF = 8  # tokens of each of its sequences after which a request has passed its trial


class _Entry:
    """An open request."""

    __slots__ = ("adds", "deaths", "fresh", "passed")

    def __init__(self, adds: list[Add]) -> None:
        self.adds = {add.id: add for add in adds}  # of the sequences that still run
        self.deaths = 0  # of processes that had it
        self.fresh = 0  # tokens from the present process
        self.passed = False  # its trial


class Ledger:
    """Belongs to one AsyncEngine. Ids are those of requests; sequences are named by their Add's id."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}  # in the order of their arrival
        self._owners: dict[str, tuple[str, _Entry]] = {}  # by sequence
        self._unsent: dict[str, _Entry] = {}
        self._careful = False
        self._trial: _Entry | None = None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def __bool__(self) -> bool:
        return bool(self._owners)

    def open(self, request_id: str, adds: list[Add]) -> None:
        """A new request; `due` will have it sent."""
        entry = self._entries[request_id] = self._unsent[request_id] = _Entry(adds)
        for add in adds:
            self._owners[add.id] = request_id, entry

    def produced(self, sequence: str, tokens: list[int]) -> None:
        """A sequence has got further. One that is not open is ignored."""
        owner = self._owners.get(sequence)
        if owner is not None:
            entry = owner[1]
            entry.adds[sequence].output += tokens
            entry.fresh += len(tokens)

    def close(self, sequences: Iterable[str]) -> None:
        """These have ended, or nobody wants them any more."""
        for sequence in sequences:
            owner = self._owners.pop(sequence, None)
            if owner is None:
                continue
            request_id, entry = owner
            del entry.adds[sequence]
            if not entry.adds:
                del self._entries[request_id]
                self._unsent.pop(request_id, None)

    def due(self) -> list[list[Add]]:
        """What to send to a process that is ready, each request's sequences together; from then on it counts as sent."""
        if not self._unsent:
            self._careful = self._careful and self._on_trial()
            return []
        if not self._careful:
            chosen, self._unsent = self._unsent, {}
        elif self._on_trial():
            return []
        else:
            chosen = {id: entry for id, entry in self._unsent.items() if entry.passed}
            if not chosen:
                id, self._trial = next(iter(self._unsent.items()))
                chosen = {id: self._trial}
            for id in chosen:
                del self._unsent[id]
        return [_continued(entry) for entry in chosen.values()]

    def died(self) -> list[str]:
        """The process is gone: everything is to be sent again. Returns the sequences of the request that is to blame, if one is found: the caller
        must end and close them."""
        blamed: list[str] = []
        suspicion = False
        on_trial = self._trial if self._careful and self._on_trial() else None
        for id, entry in self._entries.items():
            if id not in self._unsent:
                entry.deaths += 1
                entry.passed = self._careful and entry is not on_trial
                suspicion |= entry.deaths > 1
                if entry is on_trial:
                    blamed += entry.adds
            entry.fresh = 0
        self._careful, self._trial = suspicion, None
        self._unsent = dict(self._entries)
        return blamed

    def _on_trial(self) -> bool:
        entry = self._trial
        return entry is not None and bool(entry.adds) and entry.fresh < PROOF * len(entry.adds)


def _continued(entry: _Entry) -> list[Add]:
    """The messages for a request's sequences: whole, or from where they are. Prompt log-probabilities were delivered with the first token."""
    if entry.deaths:
        for add in entry.adds.values():
            prompt = None if add.output else add.params.prompt_logprobs
            add.params = msgspec.structs.replace(add.params, n=len(entry.adds), prompt_logprobs=prompt)
    return list(entry.adds.values())
