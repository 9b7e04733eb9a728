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
        self._after_call = False  # where white space means nothing
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
        while self._step(whole, deltas):
            pass
        return deltas

    def _step(self, whole: bool, deltas: list[Delta]) -> bool:
        """Reads up to where something else begins. False: that is not there yet."""
        if self._arguments is not None:
            return self._write(self._arguments, whole, deltas)
        found = _TAG.search(self._held)
        tag = found[0] if found else ""
        length = found.start() if found else len(self._held) - (0 if whole else held_back(self._held, (*_BEGINS, *_ENDS)))
        if self._kind is None:
            return self._call(length, tag, whole, deltas)
        text, self._held = self._held[:length], self._held[length:]
        self._say(self._kind, text, deltas)
        if tag in _ENDS:
            self._held, self._kind, self._head, self._after_call = self._held[len(tag) :], Content, "", False
        return tag in _ENDS or (tag != "" and self._begin(tag, whole, deltas))

    def _call(self, length: int, tag: str, whole: bool, deltas: list[Delta]) -> bool:
        """The beginning of a call's message, or all of it, if that is what it takes to know. False: it may still be either."""
        assert self._calls is not None
        last = bool(tag) or whole
        text = self._held[:length]
        cursor = Cursor(text, 0, last)
        begins = self._begins(cursor)
        if begins:
            deltas += self._calls.begin(self._to)
            self._arguments, self._held = JsonArguments(), self._held[cursor.at :]
            return True
        if begins is None and not last:
            return False
        arguments = json_object(text.strip() or ("{}" if tag else "")) if last else None  # without the message's end, they may be missing
        self._kind = Content
        if arguments is None:
            self._say(Content, self._head, deltas)
        else:
            deltas += [*self._calls.begin(self._to), *self._calls.write(arguments)]
            self._calls.end()
            self._held = self._held[length:]
        return True

    def _write(self, arguments: JsonArguments, whole: bool, deltas: list[Delta]) -> bool:
        """More of a call's arguments, in whose strings tags are text. False: they go on."""
        assert self._calls is not None
        cursor = Cursor(self._held, 0, whole)
        deltas += self._calls.write(arguments.read(cursor))
        self._held = self._held[cursor.at :]
        if not (arguments.ended or arguments.broken or whole):
            return False
        if arguments.ended:
            self._calls.end()
        self._arguments, self._kind, self._after_call = None, Content, arguments.ended
        return True

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
        self._after_call = False
        self._kind = None if to else Reasoning if head["channel"] == "analysis" else Content
        self._gap = "\n"
        if (self._kind is Reasoning and not self._split_reasoning) or (self._kind is None and self._calls is None):
            self._kind = Content
            self._say(Content, self._head, deltas)
        return True

    def _say(self, kind: type[Content] | type[Reasoning], text: str, deltas: list[Delta]) -> None:
        if self._after_call:
            text = text.lstrip()
        if not text:
            return
        self._after_call = False
        if self._gap and kind in self._said:
            text = self._gap + text
        self._gap = ""
        self._said.add(kind)
        deltas.append(kind(text))
