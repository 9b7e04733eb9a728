"""What parsers make of a model's text, piece by piece. Owns the types only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; calls are numbered from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments. They are the JSON text of an object, or the beginning of one if the call is cut off."""

    index: int
    text: str


Delta = Content | Reasoning | CallStart | CallArguments


class OutputParser(Protocol):
    """One answer's text in, its parts out. However the text is cut into pieces, the deltas add up to the same."""

    @property
    def called(self) -> bool:
        """Are there calls, and all of them whole."""

    def push(self, text: str) -> list[Delta]:
        """What is certain now."""

    def finish(self) -> list[Delta]:
        """What was held back, once nothing follows. To be called once."""


def held_back(text: str, tags: tuple[str, ...]) -> int:
    """Length of the text's end that may become one of the tags."""
    beginnings, longest = _beginnings(tags)
    for start in range(max(0, len(text) - longest), len(text)):
        if text[start:] in beginnings:
            return len(text) - start
    return 0


@cache
def _beginnings(tags: tuple[str, ...]) -> tuple[frozenset[str], int]:
    """What tags begin with, and the length of the longest of that."""
    return frozenset(tag[:end] for tag in tags for end in range(1, len(tag))), max(map(len, tags), default=1) - 1
