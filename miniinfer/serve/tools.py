"""Tool calls out of a model's text: the `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` form of Hermes and Qwen.

Owns the incremental parser only. A call is reported whole, when its closing tag has come; text that merely looks like a call (bad JSON,
no end) is given back as text, so nothing that the model wrote is lost.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

import msgspec

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(slots=True)
class ToolCall:
    """`arguments` is the JSON text of an object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


class ToolCallParser:
    """Splits one choice's text into content and calls. Feed deltas, then `finish` once.

    White space is held back until something follows it: between and after calls it is layout, not content."""

    def __init__(self, parallel: bool = True) -> None:
        self._buffer = ""
        self._parallel = parallel
        self.num_calls = 0

    def feed(self, text: str) -> tuple[str, list[ToolCall]]:
        """The content and the calls that are certain now."""
        self._buffer += text
        content: str = ""
        calls: list[ToolCall] = []
        while True:
            start = self._buffer.find(OPEN)
            if start < 0:
                return content + self._take(self._certain()), calls
            end = self._buffer.find(CLOSE, start)
            if end < 0:
                return content + self._take(len(self._buffer[:start].rstrip())), calls
            call = _parse(self._buffer[start + len(OPEN) : end])
            if call is None:
                content += self._take(end + len(CLOSE))
                continue
            content += self._buffer[:start].rstrip()
            self._buffer = self._buffer[end + len(CLOSE) :]
            if self._parallel or not self.num_calls:
                calls.append(call)
                self.num_calls += 1

    def finish(self) -> str:
        """What is left: an unfinished call as text; white space only if there were no calls."""
        rest, self._buffer = self._buffer, ""
        return rest if rest.strip() or not self.num_calls else ""

    def _take(self, length: int) -> str:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken

    def _certain(self) -> int:
        """Length of the buffer's head that cannot become part of an opening tag or of white space before one."""
        end = len(self._buffer)
        for length in range(min(len(OPEN) - 1, end), 0, -1):
            if self._buffer.endswith(OPEN[:length]):
                end -= length
                break
        return len(self._buffer[:end].rstrip())


class _Written(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


def _parse(text: str) -> ToolCall | None:
    try:
        written = msgspec.json.decode(text, type=_Written)
    except msgspec.DecodeError:  # also a wrong type
        return None
    arguments = bytes(written.arguments).decode()
    return ToolCall(written.name, arguments) if arguments.startswith("{") else None
