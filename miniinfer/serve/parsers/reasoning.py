"""Splits reasoning between two tags from the answer that follows it. Owns tags of the `<think>` kind; harmony's channels are harmony.py's."""

from __future__ import annotations

from miniinfer.serve.parsers.deltas import held_back
from miniinfer.serve.parsers.formats import ReasoningFormat


class ReasoningParser:
    """Reasoning can only come first. `opened`: the prompt ended with the opening tag. White space at reasoning's edges, and before the answer
    that follows it, is layout."""

    def __init__(self, format: ReasoningFormat, opened: bool) -> None:
        self._begin, self._end = format.begin, format.end
        self._state = "opened" if opened else "start"  # then "begun", "reasoning", "ended", "answer"
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """The reasoning and the content that are certain now."""
        self._held += text
        reasoning = ""
        if self._state in ("start", "opened"):
            self._start()
        if self._state == "begun":
            self._held = self._held.lstrip()
            self._state = "reasoning" if self._held else "begun"
        if self._state == "reasoning":
            reasoning = self._reasoning()
        if self._state == "ended":
            self._held = self._held.lstrip()
            self._state = "answer" if self._held else "ended"
        if self._state != "answer":
            return reasoning, ""
        content, self._held = self._held, ""
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        """What was held back: the end of unfinished reasoning, or what looked like a tag."""
        held, self._held = self._held, ""
        return (held, "") if self._state in ("opened", "begun", "reasoning") else ("", held)

    def _start(self) -> None:
        """Is there an opening tag? Some models write it although the prompt has."""
        text = self._held.lstrip()
        if text.startswith(self._begin):
            self._held, self._state = text[len(self._begin) :], "begun"
        elif text and not self._begin.startswith(text):
            self._state = "begun" if self._state == "opened" else "answer"

    def _reasoning(self) -> str:
        end = self._held.find(self._end)
        if end >= 0:
            reasoning = self._held[:end].rstrip()
            self._held, self._state = self._held[end + len(self._end) :], "ended"
            return reasoning
        certain = len(self._held[: len(self._held) - held_back(self._held, (self._end,))].rstrip())
        reasoning, self._held = self._held[:certain], self._held[certain:]
        return reasoning
