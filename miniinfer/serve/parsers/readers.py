"""One reader per way of writing tool calls: from a place in the text where one may begin to where its arguments do.

Owns the syntaxes of formats.py other than harmony's, but for arguments, which arguments.py reads. A reader raises `No` or `More` (cursor.py); the
search for places, what is held back and what is content are tools.py's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from miniinfer.serve.parsers.arguments import Arguments, JsonArguments, PythonArguments, TaggedArguments, WholeArguments, json_object
from miniinfer.serve.parsers.cursor import Cursor, More, No, dump_json, load_json

_NAME = re.compile(r"[\w.\-]+")
_LONGEST_HEAD = 256  # characters of a name and what belongs to it


@dataclass(frozen=True, slots=True)
class Call:
    """A call, read up to its arguments. `after` reads what closes it, as far as that is there, and in a list goes on to the next one; it may need
    more text, but never fails. `id` is what the model wrote itself."""

    name: str
    arguments: Arguments
    after: After
    id: str | None = None


After = Callable[[Cursor], Call | None]
Schemas = Mapping[str, Mapping[str, Any]]  # JSON schemas of the arguments, by function


@dataclass(frozen=True)
class Reader:
    """`tags`: where a call may begin. `closers`: tags after calls that mean nothing more. `bare`: calls may also begin without a tag, at the start of
    a line or after another call, with one of these characters; then only functions that were offered count. `between`: so may what stands between
    calls."""

    read: Callable[[Cursor, Schemas], Call]
    tags: tuple[str, ...]
    closers: tuple[str, ...] = ()
    bare: str = ""
    between: str = ""


def _call(cursor: Cursor, schemas: Schemas, name: str, arguments: Arguments, after: After, id: str | None = None) -> Call:
    """The call whose arguments begin here. If its function was not offered, they have to be whole."""
    if not _NAME.fullmatch(name):
        raise No
    arguments.check(cursor.copy())
    if name in schemas:
        return Call(name, arguments, after, id)
    text = arguments.read(cursor)
    if not arguments.ended:
        raise No if arguments.broken else More
    return Call(name, WholeArguments(text), after, id)


def _closing(*tags: str) -> After:
    """Steps over tags that close a call, and over white space."""

    def after(cursor: Cursor) -> None:
        for tag in tags:
            cursor.space()
            cursor.close(tag)

    return after


def _list(cursor: Cursor, element: Callable[[Cursor, After], Call], end: After) -> Call:
    """The first call of a list; each goes on to the next."""

    def after(cursor: Cursor) -> Call | None:
        start = cursor.at
        cursor.space()
        if not cursor.optional(","):
            cursor.close("]")
            return end(cursor)
        cursor.space()
        try:
            return element(cursor, after)
        except (More, No) as e:
            if isinstance(e, More) and not cursor.whole:
                raise
            cursor.at = start
            return None

    cursor.literal("[")
    cursor.space()
    return element(cursor, after)


# ------------------------------------------------------------------------------------------------ calls as JSON objects


def _json_call(cursor: Cursor, schemas: Schemas, after: After, bare: bool = False) -> Call:
    """`{"name": NAME, "arguments": {...}}`, also with other words and in another order. Read as it comes if the name comes first and was offered.
    `bare`: only functions that were offered count."""

    def behind(cursor: Cursor) -> Call | None:
        _object_end(cursor)
        return after(cursor)

    start = cursor.at
    _first_key(cursor.copy())
    try:
        name = _json_head(cursor)
        JsonArguments().check(cursor.copy())
    except No:
        name = ""
    if name in schemas:
        return Call(name, JsonArguments(), behind)
    if name and bare:
        raise No
    cursor.at = start
    name, arguments = _whole_call(cursor.json())
    if bare and name not in schemas:
        raise No
    return Call(name, WholeArguments(arguments), after)


def _first_key(cursor: Cursor) -> None:
    """Nobody is to wait for the end of an object that is something else."""
    cursor.literal("{")
    cursor.space()
    if _json_word(cursor) not in ("name", "type", "id", "function", "arguments", "parameters"):
        raise No


def _json_head(cursor: Cursor) -> str:
    """The name of a call whose arguments come next."""
    name = None
    cursor.literal("{")
    while True:
        cursor.space()
        key = _json_word(cursor)
        cursor.space()
        cursor.literal(":")
        cursor.space()
        if key in ("arguments", "parameters") and name is not None:
            return name
        if key in ("arguments", "parameters", "function"):
            raise No
        word = _json_word(cursor) if cursor.peek() == '"' else cursor.match(_NAME)
        if key == "name":
            name = word
        cursor.space()
        cursor.literal(",")


def _json_word(cursor: Cursor) -> str:
    cursor.literal('"')
    word = cursor.until('"', _LONGEST_HEAD)
    if "\\" in word:
        raise No
    return word


def _object_end(cursor: Cursor) -> None:
    """What comes after a call's arguments in its object; nothing if that does not end as it should."""
    start, rest = cursor.at, JsonArguments(within=True)
    rest.read(cursor)
    if rest.broken:
        cursor.at = start
    elif not rest.ended and not cursor.whole:
        raise More


class _Written(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"")
    parameters: msgspec.Raw = msgspec.Raw(b"")


def _whole_call(text: str) -> tuple[str, str]:
    """Name and arguments from a call's JSON, arguments as they were written where that is valid."""
    try:
        written = msgspec.json.decode(text, type=_Written)
        arguments = json_object((bytes(written.arguments) or bytes(written.parameters) or b"{}").decode())
    except (ValueError, RecursionError):  # also a wrong type
        arguments = None
    if arguments is not None and _NAME.fullmatch(written.name):
        return written.name, arguments
    try:
        return _call_of(load_json(text))
    except ValueError:
        raise No from None


def _call_of(value: Any) -> tuple[str, str]:
    """From a JSON value: a name, and `arguments` or `parameters`, an object or its JSON text; perhaps within OpenAI's wrapping."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not _NAME.fullmatch(value["name"]):
        raise No
    arguments = value.get("arguments", value.get("parameters", {}))
    text = json_object(arguments if isinstance(arguments, str) else dump_json(arguments))
    if text is None:
        raise No
    return value["name"], text


# -------------------------------------------------------------------------------------------------------------- formats


def read_hermes(cursor: Cursor, schemas: Schemas) -> Call:
    cursor.literal("<tool_call>")
    cursor.space()
    return _json_call(cursor, schemas, _closing("</tool_call>"))


def read_qwen3_coder(cursor: Cursor, schemas: Schemas) -> Call:
    """The tag around the function is one that models leave out."""
    tagged = cursor.text.startswith("<tool_call>", cursor.at)
    if tagged:
        cursor.literal("<tool_call>")
        cursor.space()
    cursor.literal("<function=")
    name = cursor.until(">", _LONGEST_HEAD).strip("\"' ")
    arguments = TaggedArguments(schemas.get(name), _qwen_key, _QWEN_CLOSERS, margin="\n")
    return _call(cursor, schemas, name, arguments, _closing("</tool_call>") if tagged else _closing())


_QWEN_CLOSERS = {"\n</parameter>": 13, "</parameter>": 12, "\n<parameter=": 1, "\n</function>": 1}  # the last two: models forget the first


def _qwen_key(cursor: Cursor) -> str | None:
    cursor.space()
    if cursor.optional("<parameter="):
        return cursor.until(">", _LONGEST_HEAD).strip("\"' ")
    cursor.literal("</function>")  # without it, arguments may be missing
    return None


def read_glm45(cursor: Cursor, schemas: Schemas) -> Call:
    cursor.literal("<tool_call>")
    cursor.space()
    name = cursor.match(_NAME)
    return _call(cursor, schemas, name, TaggedArguments(schemas.get(name), _glm_key, {"</arg_value>": 12}), _closing())


def _glm_key(cursor: Cursor) -> str | None:
    cursor.space()
    if cursor.optional("<arg_key>"):
        key = cursor.until("</arg_key>", _LONGEST_HEAD).strip()
        cursor.space()
        cursor.literal("<arg_value>")
        return key
    cursor.literal("</tool_call>")  # without it, arguments may be missing
    return None


def read_mistral(cursor: Cursor, schemas: Schemas) -> Call:
    """`[TOOL_CALLS]` before a list of calls, or before each name[ARGS]{...}."""
    cursor.literal("[TOOL_CALLS]")
    cursor.space()
    if cursor.peek() == "[":
        return _list(cursor, lambda cursor, after: _json_call(cursor, schemas, after), _closing())
    if cursor.peek() == "{":
        return _json_call(cursor, schemas, _closing())
    name, id = cursor.match(_NAME), None
    if cursor.optional("[CALL_ID]"):
        id = cursor.match(_NAME)
    cursor.optional("[ARGS]")
    cursor.space()
    return _call(cursor, schemas, name, JsonArguments(), _closing(), id)


_CALL_BEGIN, _CALL_END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


def read_deepseek(cursor: Cursor, schemas: Schemas) -> Call:
    """V3 and R1: kind, separator, name, JSON in a fence. V3.1: name, separator, JSON."""
    cursor.optional("<｜tool▁calls▁begin｜>")
    cursor.space()
    cursor.literal(_CALL_BEGIN)
    name = cursor.until(_SEPARATOR, _LONGEST_HEAD).strip()
    cursor.space()
    fenced = cursor.peek() != "{"
    if fenced:
        name = cursor.until("\n", _LONGEST_HEAD).strip()
        cursor.space()
        cursor.literal("```json")
        cursor.space()
    return _call(cursor, schemas, name, JsonArguments(), _closing("```", _CALL_END) if fenced else _closing(_CALL_END))


_KIMI_ID = re.compile(r"(?:functions\.)?([\w.\-]+?)(?::\d+)?")


def read_kimi_k2(cursor: Cursor, schemas: Schemas) -> Call:
    """The model numbers its calls over the whole conversation, and wants to see its own ids again."""
    cursor.optional("<|tool_calls_section_begin|>")
    cursor.space()
    cursor.literal("<|tool_call_begin|>")
    id = cursor.until("<|tool_call_argument_begin|>", _LONGEST_HEAD).strip()
    named = _KIMI_ID.fullmatch(id)
    if named is None:
        raise No
    cursor.space()
    return _call(cursor, schemas, named[1], JsonArguments(), _closing("<|tool_call_end|>"), id if ":" in id else None)


_PYTHON_TAGS = ("<|python_tag|>", "<|python_start|>")


def read_llama3(cursor: Cursor, schemas: Schemas) -> Call:
    """JSON objects or a list of them, `[f(a=1), g()]`, and after a tag also `f.call(a=1)`, which Llama 3's own tools use."""
    _separator(cursor)
    tagged = any([cursor.optional(tag) for tag in _PYTHON_TAGS])
    cursor.space()
    end = _closing("<|python_end|>") if tagged else _closing()
    if not tagged or cursor.peek() in ("{", "["):
        return _bare_call(cursor, schemas, end, python=True)
    name = cursor.match(_NAME)
    if name.endswith(".call"):
        name = name.removesuffix(".call")
    elif name not in schemas:
        raise No  # code for an interpreter
    cursor.literal("(")
    return _call(cursor, schemas, name, PythonArguments(), end)


def read_json(cursor: Cursor, schemas: Schemas) -> Call:
    """JSON calls, bare or in a fence. A plain answer may well be JSON too, so only functions that were offered count."""
    _separator(cursor)
    fenced = cursor.peek() == "`"
    if fenced:
        cursor.literal("```")
        cursor.optional("json")
        cursor.space()
    return _bare_call(cursor, schemas, _closing("```") if fenced else _closing(), python=False)


def _separator(cursor: Cursor) -> None:
    """What some models write between bare calls."""
    if cursor.peek() in (";", ","):
        cursor.at += 1
        cursor.space()


def _bare_call(cursor: Cursor, schemas: Schemas, end: After, python: bool) -> Call:
    def as_json(cursor: Cursor, after: After) -> Call:
        return _json_call(cursor, schemas, after, bare=True)

    def as_python(cursor: Cursor, after: After) -> Call:
        name = cursor.match(_NAME)
        if name not in schemas:
            raise No
        cursor.literal("(")
        return _call(cursor, schemas, name, PythonArguments(), after)

    if cursor.peek() != "[":
        return as_json(cursor, end)
    ahead = Cursor(cursor.text, cursor.at + 1, cursor.whole)
    ahead.space()
    return _list(cursor, as_python if python and ahead.peek() != "{" else as_json, end)


READERS: dict[str, Reader] = {
    "hermes": Reader(read_hermes, ("<tool_call>",)),
    "qwen3_coder": Reader(read_qwen3_coder, ("<tool_call>", "<function=")),
    "glm45": Reader(read_glm45, ("<tool_call>",)),
    "mistral": Reader(read_mistral, ("[TOOL_CALLS]",)),
    "deepseek": Reader(read_deepseek, ("<｜tool▁calls▁begin｜>", _CALL_BEGIN), ("<｜tool▁calls▁end｜>",)),
    "kimi_k2": Reader(read_kimi_k2, ("<|tool_calls_section_begin|>", "<|tool_call_begin|>"), ("<|tool_calls_section_end|>",)),
    "llama3": Reader(read_llama3, _PYTHON_TAGS, bare="{[", between=";,"),
    "json": Reader(read_json, (), bare="{[`", between=";,"),
}
