"""gpt-oss's harmony format: an answer is messages on channels. analysis is reasoning, final is content, and what is sent to a function is a call.

Owns the whole answer, since channels carry both reasoning and calls. Text outside of messages is content, as is a call without valid arguments.
"""

from __future__ import annotations

import re

from miniinfer.serve.parsers.cursor import object_text
from miniinfer.serve.parsers.deltas import Content, Delta, Reasoning, held_back
from miniinfer.serve.parsers.readers import Call
from miniinfer.serve.parsers.tools import Calls

_BEGINS, _MESSAGE, _ENDS = ("<|start|>", "<|channel|>"), "<|message|>", ("<|end|>", "<|call|>", "<|return|>")
_HEAD = re.compile(
    r"(?:<\|start\|>(?P<role>[\w.:\-]*)(?P<to_role>\s+to=[^\s<]+)?\s*)?(?:<\|channel\|>(?P<channel>\w+)(?P<to>\s+to=[^\s<]+)?)?"
    r"\s*(?:<\|constrain\|>)?\s*\w*\s*<\|message\|>"
)
_LONGEST_HEAD = 256  # characters


class HarmonyParser:
    """`calls` None: no tools were offered, what is sent to a function is content. `split_reasoning` False: analysis is content, tags and all."""

    def __init__(self, calls: Calls | None, split_reasoning: bool) -> None:
        self._calls, self._split_reasoning = calls, split_reasoning
        self._held = ""
        self._kind: type[Content] | type[Reasoning] | None = Content  # of the text that is being read; None: that of a call
        self._head, self._to = "", ""  # of the message that is being read
        self._said: set[type] = set()  # kinds that have text; a further message of one begins on a line of its own
        self._gap = ""

    @property
    def num_calls(self) -> int:
        return self._calls.count if self._calls else 0

    def push(self, text: str) -> list[Delta]:
        self._held += text
        return self._read(whole=False)

    def finish(self) -> list[Delta]:
        return self._read(whole=True)

    def _read(self, whole: bool) -> list[Delta]:
        deltas: list[Delta] = []
        while True:
            found = [(at, tag) for tag in (*_BEGINS, *_ENDS) if (at := self._held.find(tag)) >= 0]
            at, tag = min(found, default=(len(self._held), ""))
            if not tag:
                keep = 0 if whole else held_back(self._held, (*_BEGINS, *_ENDS))
                self._body(len(self._held) - keep, "", whole, deltas)
                return deltas
            if not self._body(at, tag, whole, deltas):
                return deltas
            if tag in _ENDS:
                self._held, self._kind, self._head = self._held[len(tag) :], Content, ""
            elif not self._begin(tag, whole, deltas):
                return deltas

    def _body(self, length: int, tag: str, whole: bool, deltas: list[Delta]) -> bool:
        """The message's text up to a tag, or as much of it as there is. False: it waits for more, as calls do for their end."""
        if self._kind is None and not (tag or whole):
            return False
        text, self._held = self._held[:length], self._held[length:]
        if self._kind is not None:
            self._say(self._kind, text, deltas)
            return True
        arguments = object_text(text or ("{}" if tag else ""))  # without the end of the message, arguments may be missing
        if arguments is None or self._calls is None:
            self._say(Content, self._head + text, deltas)
        else:
            deltas += self._calls.report([Call(self._to, arguments)])
        self._kind = Content
        return True

    def _begin(self, tag: str, whole: bool, deltas: list[Delta]) -> bool:
        """Reads a message's head, or takes it for text if it is none. False: it waits for more."""
        end = self._held.find(_MESSAGE)
        if end < 0 and not whole and len(self._held) <= _LONGEST_HEAD:
            return False
        head = _HEAD.fullmatch(self._held, 0, end + len(_MESSAGE)) if 0 <= end <= _LONGEST_HEAD - len(_MESSAGE) else None
        if head is None:
            text, self._held = self._held[: len(tag)], self._held[len(tag) :]
            self._say(self._kind or Content, text, deltas)
            return True
        self._head, self._held = head[0], self._held[head.end() :]
        to = (head["to"] or head["to_role"] or "").strip().removeprefix("to=")
        self._to = to.removeprefix("functions.")
        self._kind = None if to else Reasoning if head["channel"] == "analysis" else Content
        if self._kind is Reasoning and not self._split_reasoning:
            self._kind = Content
            self._say(Content, self._head, deltas)
        self._gap = "\n"
        return True

    def _say(self, kind: type[Content] | type[Reasoning], text: str, deltas: list[Delta]) -> None:
        if not text:
            return
        if self._gap and kind in self._said:
            text = self._gap + text
        self._gap = ""
        self._said.add(kind)
        deltas.append(kind(text))
