"""What a generated conversation is, and the helpers that give the generators a wide choice of wordings.

Owns Sample, Check (when is a reply right) and Voice (seeded choice of words). Knows no task and no tokenizer.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tables import ONES, ORDINALS, TENS, WORDS

T = TypeVar("T")
Message = dict[str, Any]
HELD_OUT_SHARE = 32  # one key in so many is kept out of training
VOCABULARY = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split()  # 4,400 words of CPython's documentation


@dataclass(slots=True)
class Check:
    """When a reply is right. kind "exact": it equals one of `accept`; "contains": it holds all of them (any case);
    "json": it parses to a value equal to one of them; "tool": it is one tool call equal to the JSON in `accept`; "keys": it is a JSON object
    with exactly these keys."""

    kind: str
    accept: tuple[str, ...]

    def passes(self, reply: str) -> bool:
        """Is the reply, without its end-of-turn token, right?"""
        reply = reply.strip()
        if self.kind == "exact":
            return reply in self.accept
        if self.kind == "contains":
            return all(a.lower() in reply.lower() for a in self.accept)
        try:
            if self.kind == "tool":
                head, tail = "<tool_call>", "</tool_call>"
                return reply.startswith(head) and reply.endswith(tail) and json.loads(reply[len(head) : -len(tail)]) == json.loads(self.accept[0])
            value = json.loads(reply)
        except ValueError:
            return False
        if self.kind == "keys":
            return isinstance(value, dict) and set(value) == set(self.accept)
        return any(value == json.loads(a) for a in self.accept)


@dataclass(slots=True)
class Sample:
    """One conversation; the last message is the reply that `check` judges."""

    task: str
    messages: list[Message]
    check: Check
    key: str = ""  # identity of the problem, whatever its wording; "" for a closed set, which training must have seen
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def held_out(self) -> bool:
        """Is the problem kept out of training?"""
        return bool(self.key) and zlib.crc32(f"{self.task}|{self.key}".encode()) % HELD_OUT_SHARE == 0


Generator = Callable[["Voice"], Sample]

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_ASK_BEFORE = (
    "Can you {}?", "Could you {}?", "Please {}.", "Would you {}?", "I want you to {}.", "Could you please {}?", "Can you please {}?",
    "please {}", "I need you to {}.", "Hey, {}.", "can you {}", "Now {}.", "Hi! Please {}.", "Help me: {}.", "I'd like you to {}.",
    "Go ahead and {}.",
)  # fmt: skip
_QUESTION_BEFORE = (
    "Hey, ", "Tell me, ", "Quick question: ", "Please tell me: ", "Hi! ", "Hello, ", "I wonder, ", "Question: ", "So, ", "Ok, ", "And ",
    "Do you know: ", "Hi, ", "Hello! ", "Please answer: ", "Sorry, but ",
)  # fmt: skip
_PLEASE_AFTER = (", please", " please", " for me", " for me, please", "", "")
_THANKS = (" Thanks!", " Thank you!", " Thanks.", " thanks")
_LITERAL = re.compile(r"(?<![{\w'\"])[a-z]{4,}(?![}\w'\"])")  # a template's own word, not a slot and not quoted
_EXACT = {*ORDINALS, *ONES, *TENS, "hundred", "thousand", "last"}  # a letter changed here may make another question


@cache
def _parse(template: str) -> tuple[tuple[str, ...], ...]:
    """A template "say [hi|hello] to {name}" as a row of choices."""
    parts: list[tuple[str, ...]] = []
    at = 0
    for m in _CHOICE.finditer(template):
        parts += [(template[at : m.start()],), tuple(m.group(1).split("|"))]
        at = m.end()
    return (*parts, (template[at:],))


def _mistyped(text: str, chance: random.Random) -> str:
    """The template with one letter of one of its words missing, doubled or swapped with the next."""
    places = [m for m in _LITERAL.finditer(text) if m.group() not in _EXACT]
    if not places:
        return text
    start, end = chance.choice(places).span()
    at = chance.randrange(start + 1, end - 1)
    wrong, rest = chance.choice((("", 1), (text[at] * 2, 1), (text[at + 1] + text[at], 2)))
    return text[:at] + wrong + text[at + rest :]


class Voice:
    """A seeded source of choices and wordings."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed)
        self.chance = lambda p: self.random.random() < p

    def pick(self, options: Sequence[T]) -> T:
        """One of them."""
        return options[int(self.random.random() * len(options))]

    def some(self, options: Sequence[T], n: int) -> list[T]:
        """n different ones."""
        return self.random.sample(options, n)

    def int(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int(self.random.random() * (high - low + 1))

    def fill(self, template: str, **slots: Any) -> str:
        """A template with its choices made and its slots filled."""
        text = "".join(p[0] if len(p) == 1 else self.pick(p) for p in _parse(template))
        return text.format(**slots) if slots else text

    def ask(self, templates: Sequence[str], **slots: Any) -> str:
        """A user's wording. "!do this" marks a request, which may be wrapped in politeness; else a question or a statement, kept as it is."""
        template = self.pick(templates)
        text = "".join(p[0] if len(p) == 1 else self.pick(p) for p in _parse(template))
        if self.random.random() < 0.04:
            text = _mistyped(text, self.random)
        roll = self.random.random()
        open_end = text.endswith("}")  # the user's own words come last: nothing may follow that could be taken for one of them
        if text.startswith("!"):
            text = text[1:]
            if roll < 0.45:
                text = self.pick(_ASK_BEFORE).replace("{}", text)
            else:
                text = (
                    text + ("" if open_end else self.pick(_PLEASE_AFTER)) + (self.pick((".", ".", "", "", "!")) if text[-1] not in '.:!?"}' else "")
                )
        elif roll < 0.15:
            before = self.pick(_QUESTION_BEFORE)
            text = before + (text[0].lower() + text[1:] if text[1:2].islower() or text[1:2] == " " else text)
        elif roll < 0.25 and text.endswith("?") and len(text) > 3:
            text = text[:-1].rstrip()
        if self.random.random() < 0.8:
            text = text[0].upper() + text[1:]
        elif self.random.random() < 0.6:
            text = text.lower()  # slot names are lower case, values come later
            if not open_end and self.random.random() < 0.6:
                text = text.rstrip(" .?!") or text
        if text[-1] in ".?!" and not open_end and self.random.random() < 0.06:
            text += self.pick(_THANKS)
        return text.format(**slots) if slots else text

    def reply(self, task: str, user: str, replies: Sequence[str], key: str = "", history: Sequence[Message] = (), **slots: Any) -> Sample:
        """A sample whose answer is any of the given replies."""
        accept = tuple(r.format(**slots) for r in replies) if slots else tuple(replies)
        messages = [*history, {"role": "user", "content": user}, {"role": "assistant", "content": self.pick(accept)}]
        return Sample(task, messages, Check("exact", accept), key)

    def plain_word(self) -> str:
        """A word of the tables or of CPython's documentation."""
        return self.pick(WORDS if self.chance(0.5) else VOCABULARY)

    def word(self) -> str:
        """Mostly a real word, else one that can be pronounced, two words in one, or random letters: copying must not depend on knowing the word."""
        roll = self.random.random()
        if roll < 0.62:
            return self.plain_word()
        if roll < 0.82:
            return self.made_up(2 if roll < 0.74 else 3)
        if roll < 0.90:
            return (self.plain_word() + self.plain_word())[:12]
        return "".join(self.pick("abcdefghijklmnopqrstuvwxyz") for _ in range(self.int(3, 8)))

    def made_up(self, syllables: int) -> str:
        """A word that can be pronounced and probably does not exist, of up to ten letters."""
        starts = ("b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "st", "br", "tr", "fl", "ch", "sh", "th")
        ends = ("", "", "", "", "l", "m", "n", "r", "s", "t", "ll", "ss", "rr", "ck")
        return "".join(self.pick(starts) + self.pick("aeiou") + self.pick(ends) for _ in range(syllables))[:10]

    def quoted(self, word: str) -> str:
        """The word as a user writes it: bare or in quotes."""
        return self.pick((word, word, f'"{word}"', f"'{word}'", f'"{word}"'))


def joined(items: Sequence[Any]) -> str:
    """a, b and c"""
    words = [str(i) for i in items]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
