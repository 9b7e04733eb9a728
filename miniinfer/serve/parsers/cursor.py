"""Reading a text that may not have come whole yet: a place in it, and steps that either succeed, fail for good, or need more text.

Owns the one rule that makes streams equal whole texts: whatever a step says of a text, other than `More`, it says of every longer text too.
"""

from __future__ import annotations

import json
import re
from typing import Any

_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_JSON_PART = re.compile(_STRING + r"|[\s,:\-+.0-9eEtrufalsn]+|[{\[]|[}\]]", re.S)
_PYTHON_PART = re.compile(_STRING + r"|'[^'\\]*+(?:\\.[^'\\]*+)*+'|[({\[]|[)}\],]|[^\"'(){}\[\]<,]+", re.S)
_SPACE = re.compile(r"\s*")
DEEPEST = 100  # brackets within brackets; deeper ones are no call that anybody makes, and would cost time
CLOSING = {"}": "{", "]": "[", ")": "("}


class More(Exception):  # noqa: N818 -- not an error
    """What is there may be the beginning of it."""


class No(Exception):  # noqa: N818 -- not an error
    """Whatever may follow, this is not it."""


class Cursor:
    """`whole`: nothing follows the text. A `More` is then as good as a `No`."""

    def __init__(self, text: str, at: int, whole: bool) -> None:
        self.text, self.at, self.whole = text, at, whole

    def copy(self) -> Cursor:
        """The same place, to look ahead from."""
        return Cursor(self.text, self.at, self.whole)

    def optional(self, literal: str) -> bool:
        """Steps over the literal if it is here."""
        if self.text.startswith(literal, self.at):
            self.at += len(literal)
            return True
        if not self.whole and literal.startswith(self.text[self.at :]):
            raise More
        return False

    def literal(self, literal: str) -> None:
        if not self.optional(literal):
            raise No

    def close(self, literal: str) -> None:
        """Steps over a closing tag if it is here, or as much of it as there is at the end of a whole text. Nothing depends on it."""
        if self.whole and literal.startswith(self.text[self.at :]):
            self.at = len(self.text)
        else:
            self.optional(literal)

    def space(self) -> None:
        found = _SPACE.match(self.text, self.at)
        assert found is not None
        self.at = found.end()

    def peek(self) -> str:
        """The next character; "" at the end of a whole text."""
        if self.at < len(self.text):
            return self.text[self.at]
        if self.whole:
            return ""
        raise More

    def match(self, pattern: re.Pattern[str]) -> str:
        """What matches here; it must end before the text does, since it might go on."""
        found = pattern.match(self.text, self.at)
        if found is None:
            if self.at == len(self.text):
                raise More
            raise No
        if found.end() == len(self.text) and not self.whole:
            raise More
        self.at = found.end()
        return found[0]

    def until(self, literal: str, longest: int) -> str:
        """The text before a literal, which is stepped over; both together are not longer than so many characters."""
        end = self.text.find(literal, self.at, self.at + longest)
        if end < 0:
            if len(self.text) - self.at >= longest:
                raise No
            raise More
        start, self.at = self.at, end + len(literal)
        return self.text[start:end]

    def json(self) -> str:
        """The text of a JSON object, its brackets and strings balanced; what is in it may still be wrong."""
        if self.peek() != "{":
            raise No
        start, open_ = self.at, []
        while True:
            part = self._part(_JSON_PART, '"')
            if part[0] in "{[":
                open_.append(part)
                if len(open_) > DEEPEST:
                    raise No
            elif part in CLOSING:
                if open_.pop() != CLOSING[part]:
                    raise No
                if not open_:
                    return self.text[start : self.at]

    def python(self) -> str:
        """The text of a Python expression up to the comma or bracket that ends it; only its brackets and strings are looked at."""
        start, open_ = self.at, []
        while True:
            at, part = self.at, self._part(_PYTHON_PART, "\"'")
            if part[0] in "({[":
                open_.append(part)
                if len(open_) > DEEPEST:
                    raise No
            elif not open_ and part in ",)}]":
                self.at = at
                return self.text[start:at]
            elif part in CLOSING and open_.pop() != CLOSING[part]:
                raise No

    def _part(self, parts: re.Pattern[str], quotes: str) -> str:
        part = parts.match(self.text, self.at)
        if part is None:
            if self.at == len(self.text) or self.text[self.at] in quotes:  # at a string without an end
                raise More
            raise No
        self.at = part.end()
        return part[0]


def load_json(text: str) -> Any:
    """The value of a JSON text; raw line breaks in strings, which models write, are let through. ValueError for what is none."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(text)
    return value


def dump_json(value: Any) -> str:
    """JSON text of a value; escapes what UTF-8 cannot carry. ValueError for what JSON does not know."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        return text
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None
