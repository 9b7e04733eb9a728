"""Reading a text that may not have come whole yet: a place in it, and steps that either succeed, fail for good, or need more text.

Owns the one rule that makes streams equal whole texts: whatever a step says of a text, other than `More`, it says of every longer text too.
"""

from __future__ import annotations

import json
import re
from typing import Any

_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_JSON_PART = re.compile(_STRING + r"|[\s,:\-+.0-9eEtrufalsn]+|[{\[]|[}\]]", re.S)
_PYTHON_PART = re.compile(_STRING + r"|'[^'\\]*+(?:\\.[^'\\]*+)*+'|[({\[]|[)}\]]|[^\"'(){}\[\]<]+", re.S)
_SPACE = re.compile(r"\s*")
_DEEPEST = 100  # brackets within brackets; deeper ones are no call that anybody makes, and would cost time
_CLOSING = {"}": "{", "]": "[", ")": "("}


class More(Exception):  # noqa: N818 -- not an error
    """What is there may be the beginning of it."""


class No(Exception):  # noqa: N818 -- not an error
    """Whatever may follow, this is not it."""


class Cursor:
    """`whole`: nothing follows the text. A `More` is then as good as a `No`."""

    def __init__(self, text: str, at: int, whole: bool) -> None:
        self.text, self.at, self.whole = text, at, whole

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
        """A closing tag; models that end with it may leave it out, whole or in part."""
        if self.whole and literal.startswith(self.text[self.at :]):
            self.at = len(self.text)
        else:
            self.literal(literal)

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

    def until(self, literal: str) -> str:
        """The text before a literal, which is stepped over."""
        end = self.text.find(literal, self.at)
        if end < 0:
            raise More
        start, self.at = self.at, end + len(literal)
        return self.text[start:end]

    def json(self, opening: str = "{") -> str:
        """The text of a JSON object (or array, by its `opening`), its brackets and strings balanced; what is in it may still be wrong."""
        return self._balanced(_JSON_PART, opening)

    def python(self, opening: str) -> str:
        """The same for brackets and strings of Python."""
        return self._balanced(_PYTHON_PART, opening)

    def _balanced(self, parts: re.Pattern[str], opening: str) -> str:
        start, at, open_ = self.at, self.at, []
        if self.peek() != opening:
            raise No
        while True:
            part = parts.match(self.text, at)
            if part is None:
                if at == len(self.text) or self.text[at] in ('"' if parts is _JSON_PART else "\"'"):  # at a string without an end
                    raise More
                raise No
            at, first = part.end(), part[0][0]
            if first in "{[(":
                open_.append(first)
                if len(open_) > _DEEPEST:
                    raise No
            elif first in _CLOSING:
                if open_.pop() != _CLOSING[first]:
                    raise No
                if not open_:
                    self.at = at
                    return self.text[start:at]


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


def object_text(text: str) -> str | None:
    """The JSON text of an object as it was written, or mended where only `load_json` takes it; None if it is no object."""
    try:
        value = load_json(text)
        if not isinstance(value, dict):
            return None
        try:
            json.loads(text)
            return text.strip()
        except ValueError:
            return dump_json(value)
    except (ValueError, RecursionError):
        return None


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
