"""A call's arguments while they are being written: out of what a format has, the JSON text of an object, piece by piece.

Owns what clients rest on: at any time, what was read adds up to the beginning of a valid JSON text, and that text is the same however it was cut
into pieces. Where a model writes what cannot go on so, the arguments are broken: they end as they are.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic_core import from_json

from miniinfer.serve.parsers.cursor import CLOSING, DEEPEST, Cursor, More, No, dump_json, load_json
from miniinfer.serve.parsers.deltas import held_back


class Arguments:
    """`read` goes on until it has `ended`, or is `broken`."""

    ended = False
    broken = False

    def read(self, cursor: Cursor) -> str:
        """What the text adds; the cursor moves behind what that was made of. At the end of a whole text, arguments may be left unfinished."""
        pieces = []
        while not (self.ended or self.broken) and cursor.at < len(cursor.text):
            at = cursor.at
            try:
                pieces.append(self._step(cursor))
            except More:
                cursor.at = at
                break
            except No:
                cursor.at, self.broken = at, True
        return "".join(pieces)

    def check(self, cursor: Cursor) -> None:
        """`No` if no arguments can begin here, `More` if that is not certain. A call counts as one from here on, so this looks further ahead than
        `read` has to."""
        raise NotImplementedError

    def _step(self, cursor: Cursor) -> str:
        """The next piece of what is behind the cursor, which moves on by it."""
        raise NotImplementedError


class WholeArguments(Arguments):
    """Arguments that are known already."""

    def __init__(self, text: str) -> None:
        self._text = text

    def read(self, cursor: Cursor) -> str:
        self.ended = True
        return self._text


# ---------------------------------------------------------------------------------------------------------------- JSON

_BLANKS = re.compile(r"[ \t\n\r]+")
_CHARACTERS = re.compile(r'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt])++')
_UNIT = re.compile(r"\\u[0-9a-fA-F]{4}")
_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_WORD = re.compile(r'[^\s,:\[\]{}"<]+')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LITERALS = ("true", "false", "null")
_BEGUN = re.compile(r"t(?:ru?)?|f(?:a(?:ls?)?)?|n(?:ul?)?|-?(?:(?:0|[1-9][0-9]*)(?:\.(?:[0-9]+(?:[eE][+-]?)?)?|[eE][+-]?)?)?")
_LONGEST_WORD = 400
_NEXT = {"start": "{", "{": '"}', "[": '"{[]', "key": ":", "value": ",}]", ":": '"{[', "{,": '"', "[,": '"{['}  # what may come, by what came
_SCALAR_NEXT = ("[", ":", "[,")  # and behind these a number or a literal, too


class JsonArguments(Arguments):
    """JSON, passed on as it is written. Mended are what models get wrong and what nobody can take: raw control characters in strings, a
    backslash before a character that needs none, and halves of surrogate pairs. `within`: the text goes on in an object, behind a value."""

    def __init__(self, within: bool = False) -> None:
        self._open = ["{"] if within else []
        self._came = "value" if within else "start"
        self._string = ""  # what the string that is being read will be when it ends: "key" or "value"

    def check(self, cursor: Cursor) -> None:
        cursor.literal("{")
        cursor.space()
        if cursor.peek() not in ('"', "}"):
            raise No

    def _step(self, cursor: Cursor) -> str:
        if self._string:
            return self._characters(cursor)
        if blanks := _BLANKS.match(cursor.text, cursor.at):
            cursor.at = blanks.end()
            return blanks[0]
        first = cursor.peek()
        if not first:
            raise More
        if first not in _NEXT[self._came]:
            if self._came in _SCALAR_NEXT:
                return self._scalar(cursor)
            raise No
        if first == '"':
            self._string = "key" if self._came in ("{", "{,") else "value"
        elif first in CLOSING:
            if self._open.pop() != CLOSING[first]:
                raise No
            self._came, self.ended = "value", not self._open
        elif first == ",":
            self._came = self._open[-1] + ","
        else:
            self._came = first
            if first != ":":
                self._open.append(first)
                if len(self._open) > DEEPEST:
                    raise No
        cursor.at += 1
        return first

    def _scalar(self, cursor: Cursor) -> str:
        found = _WORD.match(cursor.text, cursor.at)
        if found is None or len(found[0]) > _LONGEST_WORD:
            raise No
        word, last = found[0], found.end() == len(cursor.text)
        if last and not cursor.whole:
            raise More
        if not (word in _LITERALS or (_NUMBER.fullmatch(word) and abs(float(word)) < float("inf")) or (last and _BEGUN.fullmatch(word))):
            raise No
        cursor.at, self._came = found.end(), "value"
        return word

    def _characters(self, cursor: Cursor) -> str:
        if found := _CHARACTERS.match(cursor.text, cursor.at):
            cursor.at = found.end()
            return found[0]
        match cursor.peek():
            case "":
                raise More
            case '"':
                cursor.at, self._came, self._string = cursor.at + 1, self._string, ""
                return '"'
            case "\\":
                return self._escape(cursor)
            case control:
                cursor.at += 1
                return json.dumps(control)[1:-1]

    def _escape(self, cursor: Cursor) -> str:
        """An escape that is not one of the plain ones."""
        ahead = cursor.text[cursor.at : cursor.at + 12]
        for form, sample in ((_UNIT, "\\u0000"), (_PAIR, ahead[:6] + "\\udc00")):
            if len(ahead) < len(sample) and form.fullmatch(ahead + sample[len(ahead) :]):  # may become one
                if not cursor.whole:
                    raise More
                cursor.at += len(ahead)
                return ""
        if _PAIR.match(ahead):
            cursor.at += 12
            return ahead
        if _UNIT.match(ahead):
            cursor.at += 6
            return "\\ufffd" if ahead[2] in "dD" and ahead[3] in "89abcdefABCDEF" else ahead[:6]
        cursor.at += 1
        return "\\\\"


def json_object(text: str) -> str | None:
    """The JSON text of an object as it would have been streamed; None if it is no object."""
    arguments, cursor = JsonArguments(), Cursor(text.strip(), 0, True)
    made = arguments.read(cursor)
    return made if arguments.ended and cursor.at == len(cursor.text) else None


def whole_arguments(text: str) -> dict[str, Any] | None:
    """The value of a call's arguments; None if they break off."""
    try:
        return dict(from_json(text))
    except ValueError:
        return None


def arguments_so_far(text: str) -> dict[str, Any]:
    """The value of what is complete of a call's arguments."""
    return dict(from_json(text, allow_partial=True)) if text else {}


# ----------------------------------------------------------------------------------------------------------- XML forms


class TaggedArguments(Arguments):
    """Parameters between tags, each when it is complete; text, where the schema wants nothing else, as it comes.

    `key` reads the beginning of a parameter, or None and the end of the arguments. `closers` are what may end a value, each with how much of it is
    stepped over; `margin` stands before a value and is none of it."""

    def __init__(self, schema: Mapping[str, Any] | None, key: Callable[[Cursor], str | None], closers: dict[str, int], margin: str = "") -> None:
        properties = (schema or {}).get("properties")
        self._properties = properties if isinstance(properties, dict) else {}
        self._key, self._closers, self._margin = key, closers, margin
        self._begin = "{"  # what comes before the next parameter
        self._in_text = False

    def check(self, cursor: Cursor) -> None:
        self._key(cursor)

    def _step(self, cursor: Cursor) -> str:
        if self._in_text:
            return self._text(cursor)
        key = self._key(cursor)
        if key is None:
            self.ended = True
            return "{}" if self._begin == "{" else "}"
        if self._margin:
            cursor.optional(self._margin)
        types = json_types(self._properties.get(key))
        begin = f"{self._begin}{dump_json(key)}: "
        start, (end, behind) = cursor.at, self._end(cursor)
        if _is_text(cursor.text[start:end], types):
            begin, self._in_text = begin + '"', True
        elif not behind:
            raise More
        else:
            try:
                begin, cursor.at = begin + dump_json(typed(cursor.text[start:end], types)), behind
            except ValueError:  # nested too deeply
                raise No from None
        self._begin = ", "
        return begin

    def _text(self, cursor: Cursor) -> str:
        start, (end, behind) = cursor.at, self._end(cursor)
        if not behind and (end == start and not cursor.whole or start == len(cursor.text)):
            raise More
        text = dump_json(cursor.text[start:end])[1:-1]
        cursor.at, self._in_text = behind or (len(cursor.text) if cursor.whole else end), not behind  # half a tag at the end is no text
        return text + '"' if behind else text

    def _end(self, cursor: Cursor) -> tuple[int, int]:
        """Where the value ends, and what comes behind that begins; or how far it certainly goes, and 0."""
        found = [(at, at + length) for tag, length in self._closers.items() if (at := cursor.text.find(tag, cursor.at)) >= 0]
        if found:
            return min(found)
        return len(cursor.text) - held_back(cursor.text[cursor.at :], tuple(self._closers)), 0


def _is_text(begun: str, types: set[str]) -> bool:
    """Is a value of the XML forms text, whatever follows what there is of it."""
    if "null" not in types:
        return types == {"string"}
    return types == {"string", "null"} and not any(word.startswith(begun.strip().lower()) for word in ("null", "none"))


def typed(text: str, types: set[str]) -> Any:
    """A value of the XML forms: text where the schema wants a string, else JSON, else text after all."""
    if types == {"string"}:
        return text
    try:
        value = load_json(text.strip())
    except ValueError:
        words = {"true": True, "false": False, "none": None} if types else {}
        value = words.get(text.strip().lower(), text)
    return text if "string" in types and not types & _JSON_TYPES.get(type(value), set()) else value


_JSON_TYPES = {
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    list: {"array"},
    dict: {"object"},
    type(None): {"null"},
}


def json_types(schema: Any) -> set[str]:
    """The JSON types that a schema names, its alternatives' included."""
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type")
    types = {named} if isinstance(named, str) else {t for t in named if isinstance(t, str)} if isinstance(named, list) else set()
    for key in ("anyOf", "oneOf"):
        for alternative in schema[key] if isinstance(schema.get(key), list) else ():
            types |= json_types(alternative)
    return types


# -------------------------------------------------------------------------------------------------------------- Python

_KEYWORD = re.compile(r"[^\W\d]\w*")
_LITERAL_BEGIN = re.compile(r"[\"'(\[{\-0-9.]|[tTfFnN][a-z]")


class PythonArguments(Arguments):
    """Keyword arguments with literal values, behind the opening bracket; each when it is complete."""

    def __init__(self) -> None:
        self._begin = "{"

    def check(self, cursor: Cursor) -> None:
        cursor.space()
        if not cursor.optional(")"):
            self._keyword(cursor)
            if not _LITERAL_BEGIN.match(cursor.text, cursor.at):
                if len(cursor.text) - cursor.at < 2:
                    raise More
                raise No

    def _step(self, cursor: Cursor) -> str:
        cursor.space()
        if cursor.optional(")"):
            self.ended = True
            return "{}" if self._begin == "{" else "}"
        begin = f"{self._begin}{dump_json(self._keyword(cursor))}: "
        try:
            value = dump_json(_literal(ast.parse(cursor.python().strip(), mode="eval").body))
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            raise No from None
        if not cursor.optional(",") and cursor.peek() != ")":
            raise No
        self._begin = ", "
        return begin + value

    def _keyword(self, cursor: Cursor) -> str:
        key = cursor.match(_KEYWORD)
        cursor.space()
        cursor.literal("=")
        cursor.space()
        return key


def _literal(node: ast.expr) -> Any:
    """The value of a Python literal that JSON has too; also JSON's own true, false and null."""
    match node:
        case ast.Name(id="true" | "false" | "null" as word):
            return {"true": True, "false": False, "null": None}[word]
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_literal(element) for element in elements]
        case ast.Dict(keys=keys, values=values):
            return {str(ast.literal_eval(key)): _literal(value) for key, value in zip(keys, values, strict=True) if key is not None}
        case _:
            value = ast.literal_eval(node)
            if not isinstance(value, str | int | float | bool | None) or value in (float("inf"), float("-inf")):
                raise ValueError(f"{value!r} is nothing that JSON has")
            return value
