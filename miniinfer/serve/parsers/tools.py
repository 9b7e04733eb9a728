"""Finds tool calls in a growing text: what may be a call is held back until it is known to be one or not.

Owns the search, white space around calls, and calls' ids. A call is reported when it is complete and valid, so nothing that a client was told
is taken back; what is no valid call (bad JSON, no end) is content, as the model wrote it. The syntaxes are readers.py's.
"""

from __future__ import annotations

import secrets
import string
import uuid

from miniinfer.serve.parsers.cursor import Cursor, More, No
from miniinfer.serve.parsers.deltas import CallArguments, CallStart, Content, Delta, held_back
from miniinfer.serve.parsers.formats import ToolFormat
from miniinfer.serve.parsers.readers import READERS, Call, Schemas

_READ_ALWAYS = 4096  # characters up to which what may be a call is read again with every piece; a longer one when it has grown by 1/16


class Calls:
    """Numbers an answer's calls and gives them ids such as the format's chat templates accept."""

    def __init__(self, format: str, parallel: bool) -> None:
        self._format, self._parallel = format, parallel
        self.count = 0

    def report(self, calls: list[Call]) -> list[Delta]:
        """The calls as deltas; without `parallel` only the answer's first."""
        deltas: list[Delta] = []
        for call in calls:
            if self.count and not self._parallel:
                break
            deltas.append(CallStart(self.count, call.id or self._new_id(call.name), call.name))
            deltas.append(CallArguments(self.count, call.arguments))
            self.count += 1
        return deltas

    def _new_id(self, name: str) -> str:
        if self._format.startswith("mistral"):  # its templates take nothing else
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        if self._format == "kimi_k2":
            return f"functions.{name}:{self.count}"
        return f"call_{uuid.uuid4().hex[:24]}"


class ToolParser:
    """Splits text into content and calls. White space is held back until something follows: before and after calls it is layout."""

    def __init__(self, format: ToolFormat, schemas: Schemas, parallel: bool = True) -> None:
        self._reader, self._schemas = READERS[format.parser], schemas
        self._calls = Calls(format.name, parallel)
        self._found = False  # a call, reported or not
        self._buffer = ""
        self._space = ""  # white space after what was reported
        self._fresh = True  # nothing but white space since the start or the last call: where bare calls may begin
        self._read_at = 0  # length of the buffer from which on reading it again is worth the while

    @property
    def num_calls(self) -> int:
        return self._calls.count

    def push(self, text: str) -> list[Delta]:
        self._buffer += text
        return [] if len(self._buffer) < self._read_at else self._read(whole=False)

    def finish(self) -> list[Delta]:
        deltas = self._read(whole=True)
        if self._space and not self._found:
            deltas.append(Content(self._space))
        return deltas

    def _read(self, whole: bool) -> list[Delta]:
        self._read_at = 0
        deltas: list[Delta] = []
        while True:
            start, length = self._next_place()
            if not length:
                held = 0 if whole else held_back(self._buffer, self._reader.tags + self._reader.closers)
                self._say(self._take(len(self._buffer) - held), deltas)
                return deltas
            self._say(self._take(start), deltas)
            if self._fresh and self._found and self._buffer.startswith(self._reader.closers):
                self._take(length)
                continue
            cursor = Cursor(self._buffer, 0, whole)
            try:
                calls = self._reader.read(cursor, self._schemas)
            except (More, No) as e:
                if isinstance(e, More) and not whole:
                    size = len(self._buffer)
                    self._read_at = size + size // 16 if size > _READ_ALWAYS else 0
                    return deltas
                self._say(self._take(length), deltas)
                continue
            self._take(cursor.at)
            deltas += self._calls.report(calls)
            self._space, self._fresh, self._found = "", True, True

    def _next_place(self) -> tuple[int, int]:
        """Where in the buffer the next call (or tag to be dropped) may begin, and how much of it is content if it is none; (0, 0) if nowhere."""
        places = [(at, len(tag)) for tag in self._reader.tags if (at := self._buffer.find(tag)) >= 0]
        if self._fresh:
            first = len(self._buffer) - len(self._buffer.lstrip())
            places += [(first, len(tag)) for tag in self._reader.closers if self._found and self._buffer.startswith(tag, first)]
            if self._buffer[first : first + 1] in tuple(self._reader.bare):
                places.append((first, 1))
        return min(places, default=(0, 0))

    def _take(self, length: int) -> str:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken

    def _say(self, text: str, deltas: list[Delta]) -> None:
        """Content, but for white space at its end."""
        text = self._space + text
        said = text.rstrip()
        self._space = text[len(said) :]
        if said:
            self._fresh = False
            deltas.append(Content(said))
