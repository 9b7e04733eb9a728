"""One reader per way of writing tool calls: from a place in the text where one may begin to the calls there and where they end.

Owns the syntaxes of formats.py other than harmony's. A reader raises `No` or `More` (cursor.py); the search for places, what is held back and
what is content are tools.py's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from miniinfer.serve.parsers.cursor import Cursor, More, No, dump_json, load_json, object_text

_NAME = re.compile(r"[\w.\-]+")
_LONGEST_HEAD = 256  # characters of a name and what belongs to it


@dataclass(frozen=True, slots=True)
class Call:
    """A call as read; `arguments` is the JSON text of an object, `id` what the model wrote itself."""

    name: str
    arguments: str
    id: str | None = None


Schemas = Mapping[str, Mapping[str, Any]]  # JSON schemas of the arguments, by function


@dataclass(frozen=True)
class Reader:
    """`tags`: where a call may begin. `closers`: tags after calls that mean nothing more. `bare`: calls may also begin without a tag, at the
    start of the answer or after another call, with one of these characters; then only functions that were offered count."""

    read: Callable[[Cursor, Schemas], list[Call]]
    tags: tuple[str, ...]
    closers: tuple[str, ...] = ()
    bare: str = ""


class _Written(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"")
    parameters: msgspec.Raw = msgspec.Raw(b"")


def call_of(text: str) -> Call:
    """A call from its JSON, arguments as they were written where that is valid."""
    try:
        written = msgspec.json.decode(text, type=_Written)
        arguments = object_text((bytes(written.arguments) or bytes(written.parameters) or b"{}").decode())
        if arguments is not None and _NAME.fullmatch(written.name):
            return Call(written.name, arguments)
    except (ValueError, RecursionError):  # also a wrong type
        return _call_of(_loaded(text))
    return _call_of(_loaded(text))


def _call_of(value: Any) -> Call:
    """A call from a JSON value: a name, and `arguments` or `parameters`, an object or its JSON text; perhaps within OpenAI's wrapping."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not _NAME.fullmatch(value["name"]):
        raise No
    arguments = value.get("arguments", value.get("parameters", {}))
    text = object_text(arguments if isinstance(arguments, str) else dump_json(arguments))
    if text is None:
        raise No
    return Call(value["name"], text)


def _loaded(text: str) -> Any:
    try:
        return load_json(text)
    except ValueError:
        raise No from None


def _arguments(cursor: Cursor) -> str:
    text = object_text(cursor.json())
    if text is None:
        raise No
    return text


def _head(cursor: Cursor, end: str) -> str:
    """What stands before a tag, on one line and short."""
    start = cursor.at
    try:
        head = cursor.until(end)
    except More:
        if len(cursor.text) - start > _LONGEST_HEAD:
            raise No from None
        raise
    if len(head) > _LONGEST_HEAD - len(end):
        raise No
    return head


def read_hermes(cursor: Cursor, schemas: Schemas) -> list[Call]:
    cursor.literal("<tool_call>")
    cursor.space()
    call = call_of(cursor.json())
    cursor.space()
    cursor.close("</tool_call>")
    return [call]


def read_qwen3_coder(cursor: Cursor, schemas: Schemas) -> list[Call]:
    """The tag around the function is one that models leave out."""
    tagged = cursor.text.startswith("<tool_call>", cursor.at)
    if tagged:
        cursor.literal("<tool_call>")
        cursor.space()
    cursor.literal("<function=")
    name = _head(cursor, ">").strip("\"' ")
    if not _NAME.fullmatch(name):
        raise No
    values: dict[str, Any] = {}
    while True:
        cursor.space()
        if not cursor.optional("<parameter="):
            break
        key = _head(cursor, ">").strip("\"' ")
        value = cursor.until("</parameter>").removeprefix("\n").removesuffix("\n")
        values[key] = _typed(value, schemas.get(name), key)
    cursor.literal("</function>")  # without it, arguments may be missing
    if tagged:
        cursor.space()
        cursor.close("</tool_call>")
    return [Call(name, dump_json(values))]


def read_glm45(cursor: Cursor, schemas: Schemas) -> list[Call]:
    cursor.literal("<tool_call>")
    cursor.space()
    name = cursor.match(_NAME)
    values: dict[str, Any] = {}
    while True:
        cursor.space()
        if not cursor.optional("<arg_key>"):
            break
        key = _head(cursor, "</arg_key>").strip()
        cursor.space()
        cursor.literal("<arg_value>")
        values[key] = _typed(cursor.until("</arg_value>"), schemas.get(name), key)
    cursor.literal("</tool_call>")  # without it, arguments may be missing
    return [Call(name, dump_json(values))]


def _typed(text: str, schema: Mapping[str, Any] | None, key: str) -> Any:
    """A value of the XML forms: text where the schema wants a string, else JSON, else text after all."""
    properties = (schema or {}).get("properties")
    types = _types(properties.get(key) if isinstance(properties, dict) else None)
    if types == {"string"}:
        return text
    try:
        value = load_json(text.strip())
    except ValueError:
        words = {"true": True, "false": False, "none": None} if types else {}
        return words.get(text.strip().lower(), text)
    return text if "string" in types and not types & _JSON_TYPES.get(type(value), set()) else value


_JSON_TYPES = {
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    list: {"array"},
    dict: {"object"},
    type(None): {"null"},
}


def _types(schema: Any) -> set[str]:
    """The JSON types that a schema names, its alternatives' included."""
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type")
    types = {named} if isinstance(named, str) else {t for t in named if isinstance(t, str)} if isinstance(named, list) else set()
    for key in ("anyOf", "oneOf"):
        for alternative in schema[key] if isinstance(schema.get(key), list) else ():
            types |= _types(alternative)
    return types


def read_mistral(cursor: Cursor, schemas: Schemas) -> list[Call]:
    """`[TOOL_CALLS]` before a list of calls, or before each name[ARGS]{...}."""
    cursor.literal("[TOOL_CALLS]")
    cursor.space()
    if cursor.peek() == "[":
        calls = _loaded(cursor.json("["))
        if not calls:
            raise No
        return [_call_of(call) for call in calls]
    if cursor.peek() == "{":
        return [call_of(cursor.json())]
    name, id = cursor.match(_NAME), None
    if cursor.optional("[CALL_ID]"):
        id = cursor.match(_NAME)
    cursor.optional("[ARGS]")
    cursor.space()
    return [Call(name, _arguments(cursor), id)]


_CALL_BEGIN, _CALL_END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


def read_deepseek(cursor: Cursor, schemas: Schemas) -> list[Call]:
    """V3 and R1: kind, separator, name, JSON in a fence. V3.1: name, separator, JSON."""
    cursor.optional("<｜tool▁calls▁begin｜>")
    cursor.space()
    cursor.literal(_CALL_BEGIN)
    name = _head(cursor, _SEPARATOR).strip()
    cursor.space()
    fenced = cursor.peek() != "{"
    if fenced:
        name = _head(cursor, "\n").strip()
        cursor.space()
        cursor.literal("```json")
        cursor.space()
    if not _NAME.fullmatch(name):
        raise No
    arguments = _arguments(cursor)
    cursor.space()
    if fenced:
        cursor.close("```")
        cursor.space()
    cursor.close(_CALL_END)
    return [Call(name, arguments)]


_KIMI_ID = re.compile(r"(?:functions\.)?([\w.\-]+?)(?::\d+)?")


def read_kimi_k2(cursor: Cursor, schemas: Schemas) -> list[Call]:
    """The model numbers its calls over the whole conversation, and wants to see its own ids again."""
    cursor.optional("<|tool_calls_section_begin|>")
    cursor.space()
    cursor.literal("<|tool_call_begin|>")
    id = _head(cursor, "<|tool_call_argument_begin|>").strip()
    named = _KIMI_ID.fullmatch(id)
    if named is None:
        raise No
    cursor.space()
    arguments = _arguments(cursor)
    cursor.space()
    cursor.close("<|tool_call_end|>")
    return [Call(named[1], arguments, id if ":" in id else None)]


_PYTHON_TAGS = ("<|python_tag|>", "<|python_start|>")


def read_llama3(cursor: Cursor, schemas: Schemas) -> list[Call]:
    """JSON objects or a list of them, `[f(a=1), g()]`, and after a tag also `f.call(a=1)`, which Llama 3's own tools use."""
    _separator(cursor)
    tagged = any([cursor.optional(tag) for tag in _PYTHON_TAGS])
    cursor.space()
    if not tagged or cursor.peek() in "{[":
        calls = _read_bare(cursor, schemas, python=True)
    else:
        calls = _read_own_tool(cursor, schemas)
    if tagged:
        cursor.space()
        cursor.optional("<|python_end|>")
    return calls


def _read_own_tool(cursor: Cursor, schemas: Schemas) -> list[Call]:
    start = cursor.at
    name = cursor.match(_NAME)
    cursor.python("(")
    call = _python_calls("[" + cursor.text[start : cursor.at] + "]")[0]
    if name.endswith(".call"):
        return [Call(name.removesuffix(".call"), call.arguments)]
    if name not in schemas:
        raise No  # code for an interpreter
    return [call]


def read_json(cursor: Cursor, schemas: Schemas) -> list[Call]:
    """JSON calls, bare or in a fence. A plain answer may well be JSON too, so only functions that were offered count."""
    _separator(cursor)
    fenced = cursor.peek() == "`"
    if fenced:
        cursor.literal("```")
        cursor.optional("json")
        cursor.space()
    calls = _read_bare(cursor, schemas, python=False)
    if fenced:
        cursor.space()
        cursor.close("```")
    return calls


def _separator(cursor: Cursor) -> None:
    """What some models write between bare calls."""
    if cursor.peek() in ";,":
        cursor.at += 1
        cursor.space()


def _read_bare(cursor: Cursor, schemas: Schemas, python: bool) -> list[Call]:
    start = cursor.at
    if cursor.peek() == "{":
        calls = [call_of(cursor.json())]
    elif cursor.peek() != "[":
        raise No
    else:
        cursor.at += 1
        cursor.space()
        as_json = cursor.peek() == "{"
        cursor.at = start
        if as_json:
            calls = [_call_of(call) for call in _loaded(cursor.json("["))]
        elif python:
            calls = _python_calls(cursor.python("["))
        else:
            raise No
    if not calls or any(call.name not in schemas for call in calls):
        raise No
    return calls


def _python_calls(text: str) -> list[Call]:
    """Calls with literal keyword arguments, out of a list of them."""
    try:
        expression = ast.parse(text, mode="eval").body
        if not isinstance(expression, ast.List) or not expression.elts:
            raise No
        return [_python_call(element) for element in expression.elts]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise No from None


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        raise No
    return Call(ast.unparse(node.func), dump_json({str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}))


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
                raise No
            return value


READERS: dict[str, Reader] = {
    "hermes": Reader(read_hermes, ("<tool_call>",)),
    "qwen3_coder": Reader(read_qwen3_coder, ("<tool_call>", "<function=")),
    "glm45": Reader(read_glm45, ("<tool_call>",)),
    "mistral": Reader(read_mistral, ("[TOOL_CALLS]",)),
    "deepseek": Reader(read_deepseek, ("<｜tool▁calls▁begin｜>", _CALL_BEGIN), ("<｜tool▁calls▁end｜>",)),
    "kimi_k2": Reader(read_kimi_k2, ("<|tool_calls_section_begin|>", "<|tool_call_begin|>"), ("<|tool_calls_section_end|>",)),
    "llama3": Reader(read_llama3, _PYTHON_TAGS, bare="{[;,"),
    "json": Reader(read_json, (), bare="{[`;,"),
}
