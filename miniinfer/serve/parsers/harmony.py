"""gpt-oss's harmony format: an answer is messages on channels. analysis is reasoning, final is content, and what is sent to a function is a call.

Owns the whole answer, since channels carry both reasoning and calls. Text outside of messages is content, as is a call without valid arguments.
What is certain of a call goes out while it is written, as in tools.py.
"""

from __future__ import annotations

import re

from miniinfer.serve.parsers.arguments import JsonArguments, json_object
from miniinfer.serve.parsers.cursor import Cursor, More, No
from miniinfer.serve.parsers.deltas import Content, Delta, Reasoning, held_back
from miniinfer.serve.parsers.readers import Schemas
from miniinfer.serve.parsers.tools import Calls

_BEGINS, _MESSAGE, _ENDS = ("<|start|>", "<|channel|>"), "<|message|>", ("<|end|>", "<|call|>", "<|return|>")
_TAG = re.compile("|".join(map(re.escape, (*_BEGINS, *_ENDS))))
_HEAD = re.compile(
    r"(?:<\|start\|>(?P<role>[\w.:\-]*)(?P<to_role>\s+to=[^\s<]+)?\s*)?(?:<\|channel\|>(?P<channel>\w+)(?P<to>\s+to=[^\s<]+)?)?"
    r"\s*(?:<\|constrain\|>)?\s*\w*\s*<\|message\|>"
)
_LONGEST_HEAD = 256  # characters
_PROMPTED = "<|start|>assistant"  # what prompts end with


class HarmonyParser:
    """`calls` None: no tools were offered, what is sent to a function is content. `split_reasoning` False: analysis is content, tags and all."""

    def __init__(self, calls: Calls | None, schemas: Schemas, split_reasoning: bool) -> None:
        self._calls, self._schemas, self._split_reasoning = calls, schemas, split_reasoning
        self._held = ""
        self._first = True  # nothing has been read yet
        self._prompted = 0  # characters before what is held that are the prompt's
        self._kind: type[Content] | type[Reasoning] | None = Content  # of the text that is being read; None: that of a call
        self._arguments: JsonArguments | None = None  # of a call that has been reported
        self._head, self._to = "", ""  # of the message that is being read
        self._said: set[type] = set()  # kinds that have text; a further message of one begins on a line of its own
        self._gap = ""

    @property
    def called(self) -> bool:
        return self._calls is not None and self._calls.called

    def push(self, text: str) -> list[Delta]:
        self._held += text
        return self._read(whole=False)

    def finish(self) -> list[Delta]:
        return self._read(whole=True)

    def _read(self, whole: bool) -> list[Delta]:
        deltas: list[Delta] = []
        if self._first:
            text = self._held.lstrip()
            if "to=".startswith(text) and not whole:
                return deltas
            self._first = False
            if text.startswith("to="):  # the head goes on that the prompt has begun
                self._held, self._prompted = _PROMPTED + self._held, len(_PROMPTED)
        while True:
            found = _TAG.search(self._held)
            if found is None:
                keep = 0 if whole else held_back(self._held, (*_BEGINS, *_ENDS))
                self._body(len(self._held) - keep, "", whole, deltas)
                return deltas
            tag = found[0]
            if not self._body(found.start(), tag, whole, deltas):
                return deltas
            if tag in _ENDS:
                self._held, self._kind, self._head = self._held[len(tag) :], Content, ""
            elif not self._begin(tag, whole, deltas):
                return deltas

    def _body(self, length: int, tag: str, whole: bool, deltas: list[Delta]) -> bool:
        """The message's text up to a tag, or as much of it as there is. False: it waits for more."""
        text, self._held = self._held[:length], self._held[length:]
        if self._kind is None:
            assert self._calls is not None
            text = self._call(self._calls, text, tag, bool(tag) or whole, deltas)
        if self._kind is None:
            self._held = text + self._held
            return False
        self._say(self._kind, text, deltas)
        return True

    def _call(self, calls: Calls, text: str, tag: str, last: bool, deltas: list[Delta]) -> str:
        """Reads a call's message. What is left of its text has to wait, or is content if `_kind` says so."""
        cursor = Cursor(text, 0, last)
        if self._arguments is None:
            begins = self._begins(cursor)
            if begins is None and not last:
                return text
            if not begins:
                arguments = json_object(text.strip() or ("{}" if tag else "")) if last else None  # without the message's end, they may be missing
                self._kind = Content
                if arguments is None:
                    return self._head + text
                deltas += [*calls.begin(self._to), *calls.write(arguments)]
                calls.end()
                return ""
            self._arguments = JsonArguments()
            deltas += calls.begin(self._to)
        if not self._arguments.ended:
            deltas += calls.write(self._arguments.read(cursor))
            if self._arguments.ended:
                calls.end()
        text = text[cursor.at :]
        if self._arguments.ended:
            text = text.lstrip()
        if last or self._arguments.broken or (self._arguments.ended and text):
            self._arguments, self._kind = None, Content
        return text

    def _begins(self, cursor: Cursor) -> bool | None:
        """Do arguments certainly begin here, of a function that was offered? None: not yet."""
        if self._to not in self._schemas:
            return None
        try:
            cursor.space()
            JsonArguments().check(cursor.copy())
        except (More, No) as e:
            return None if isinstance(e, More) else False
        return True

    def _begin(self, tag: str, whole: bool, deltas: list[Delta]) -> bool:
        """Reads a message's head, or takes it for text if it is none. False: it waits for more."""
        end = self._held.find(_MESSAGE)
        if end < 0 and not whole and len(self._held) <= _LONGEST_HEAD:
            return False
        head = _HEAD.fullmatch(self._held, 0, end + len(_MESSAGE)) if 0 <= end <= _LONGEST_HEAD - len(_MESSAGE) else None
        prompted, self._prompted = self._prompted, 0
        if head is None:
            text, self._held = self._held[prompted : len(tag)], self._held[prompted or len(tag) :]
            self._say(self._kind or Content, text, deltas)
            return True
        self._head, self._held = head[0][prompted:], self._held[head.end() :]
        to = (head["to"] or head["to_role"] or "").strip().removeprefix("to=")
        self._to = to.removeprefix("functions.")
        self._kind = None if to else Reasoning if head["channel"] == "analysis" else Content
        self._gap = "\n"
        if (self._kind is Reasoning and not self._split_reasoning) or (self._kind is None and self._calls is None):
            self._kind = Content
            self._say(Content, self._head, deltas)
        return True

    def _say(self, kind: type[Content] | type[Reasoning], text: str, deltas: list[Delta]) -> None:
        if not text:
            return
        if self._gap and kind in self._said:
            text = self._gap + text
        self._gap = ""
        self._said.add(kind)
        deltas.append(kind(text))
