"""Finds tool calls in a growing text: what may be a call is held back until it is known to be one or not; from then on its arguments go out as
they are written.

Owns the search, white space around calls, and calls' ids. What a client was told is never taken back: a call counts once its name is known and its
arguments have begun as they must (for a tool that was not offered: once they are whole). What cannot be read as one is content, as the model wrote
it, and so is what follows arguments that break off. The syntaxes are readers.py's and arguments.py's.
"""

from __future__ import annotations

import re
import secrets
import string
import uuid

from miniinfer.serve.parsers.cursor import Cursor, More, No
from miniinfer.serve.parsers.deltas import CallArguments, CallStart, Content, Delta, held_back
from miniinfer.serve.parsers.formats import ToolFormat
from miniinfer.serve.parsers.readers import READERS, Call, Schemas

_READ_ALWAYS = 4096  # characters up to which what may be a call is read again with every piece; a longer one when it has grown by 1/16


class Calls:
    """Numbers an answer's calls and gives them ids such as the format's chat templates accept. Without `parallel` only the first is reported."""

    def __init__(self, format: str, parallel: bool) -> None:
        self._format, self._parallel = format, parallel
        self._count = self._whole = 0
        self._silent = False

    @property
    def called(self) -> bool:
        return 0 < self._count == self._whole

    def begin(self, name: str, id: str | None = None) -> list[Delta]:
        self._silent = self._count > 0 and not self._parallel
        if self._silent:
            return []
        start = CallStart(self._count, id or self._new_id(name), name)
        self._count += 1
        return [start]

    def write(self, text: str) -> list[Delta]:
        """More of the arguments of the call that was begun last."""
        return [CallArguments(self._count - 1, text)] if text and not self._silent else []

    def end(self) -> None:
        """Its arguments are whole."""
        self._whole += not self._silent

    def _new_id(self, name: str) -> str:
        if self._format.startswith("mistral"):  # its templates take nothing else
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        if self._format == "kimi_k2":
            return f"functions.{name}:{self._count}"
        return f"call_{uuid.uuid4().hex[:24]}"


class ToolParser:
    """Splits text into content and calls. White space is held back until something follows: before and after calls it is layout."""

    def __init__(self, format: ToolFormat, schemas: Schemas, parallel: bool = True) -> None:
        self._reader, self._schemas = READERS[format.parser], schemas
        self._calls = Calls(format.name, parallel)
        self._bare = re.compile(rf"\n[ \t]*[{re.escape(self._reader.bare)}]") if self._reader.bare else None  # at the start of a line
        self._call: Call | None = None  # that is being written
        self._found = False  # a call, reported or not
        self._buffer = ""
        self._space = ""  # white space after what was reported
        self._fresh = True  # nothing but white space since the start or the last call: where bare calls may begin
        self._read_at = 0  # length of the buffer from which on reading it again is worth the while

    @property
    def called(self) -> bool:
        return self._calls.called

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
        while self._write(self._call, whole, deltas) if self._call is not None else self._search(whole, deltas):
            pass
        return deltas

    def _search(self, whole: bool, deltas: list[Delta]) -> bool:
        """Up to the next call, or tag to be dropped. False: there is none yet."""
        start, length = self._next_place()
        if not length:
            held = 0 if whole else held_back(self._buffer, self._reader.tags + self._reader.closers)
            self._say(self._take(len(self._buffer) - held), deltas)
            return False
        self._say(self._take(start), deltas)
        if self._fresh and self._found and self._buffer.startswith(self._reader.closers):
            self._take(length)
            return True
        cursor = Cursor(self._buffer, 0, whole)
        try:
            call = self._reader.read(cursor, self._schemas)
        except (More, No) as e:
            if isinstance(e, More) and not whole:
                self._wait()
                return False
            self._say(self._take(length), deltas)
            return True
        self._take(cursor.at)
        self._begin(call, deltas)
        return True

    def _begin(self, call: Call, deltas: list[Delta]) -> None:
        self._call, self._found, self._space = call, True, ""
        deltas += self._calls.begin(call.name, call.id)

    def _write(self, call: Call, whole: bool, deltas: list[Delta]) -> bool:
        """More of the call, or what comes after it. False: that is not there yet."""
        cursor = Cursor(self._buffer, 0, whole)
        if not call.arguments.ended:
            deltas += self._calls.write(call.arguments.read(cursor))
            self._take(cursor.at)
            if call.arguments.ended:
                self._calls.end()
            elif whole or call.arguments.broken:
                self._call, self._fresh = None, False
            elif not cursor.at:
                self._wait()
            return whole or call.arguments.ended or call.arguments.broken
        try:
            following = call.after(cursor)
        except More:
            self._wait()
            return False
        self._take(cursor.at)
        self._call, self._fresh = None, True
        if following is not None:
            self._begin(following, deltas)
        return True

    def _wait(self) -> None:
        """For more text; for more of it, the longer it is that will be read again."""
        size = len(self._buffer)
        self._read_at = size + size // 16 if size > _READ_ALWAYS else 0

    def _next_place(self) -> tuple[int, int]:
        """Where in the buffer the next call (or tag to be dropped) may begin, and how much of it is content if it is none; (0, 0) if nowhere."""
        places = [(at, len(tag)) for tag in self._reader.tags if (at := self._buffer.find(tag)) >= 0]
        first = len(self._buffer) - len(self._buffer.lstrip())
        character = self._buffer[first : first + 1]
        if self._fresh:
            places += [(first, len(tag)) for tag in self._reader.closers if self._found and self._buffer.startswith(tag, first)]
            if self._found and character in tuple(self._reader.between):
                places.append((first, 1))
        if self._bare is not None:
            if character in tuple(self._reader.bare) and (self._fresh or "\n" in self._space + self._buffer[:first]):
                places.append((first, 1))
            elif found := self._bare.search(self._buffer):
                places.append((found.end() - 1, 1))
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
