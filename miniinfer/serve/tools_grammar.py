"""Tool calls that cannot come out wrong: what a model may write under a `tool_choice`, as a structural tag in the format that the model knows.

Owns the way from tools and a ToolFormat to the tag; formats are parsers/formats.py's, compiling is the engine's. Names are those of the tools, and
arguments follow their schemas. Other constraints come together with calls and reasoning here, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from miniinfer.data import StructuredOutputsParams
from miniinfer.serve.parsers import Formats
from miniinfer.serve.parsers.formats import ReasoningFormat, ToolFormat
from miniinfer.serve.structured import params

Form = dict[str, Any]

_TAG = re.compile(r"<[^<>\n]+>|\[TOOL_CALLS\]")  # what a format's calls begin with, where that cannot be met in prose

_NAME = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"], "additionalProperties": False}
_NAMED = {"type": {"const": "function"}, "function": _NAME}
_ONE: Form = {"type": "object", "properties": _NAMED, "required": list(_NAMED), "additionalProperties": False}
_SOME = {"mode": {"enum": ["auto", "required"]}, "tools": {"type": "array", "items": _ONE, "minItems": 1}}
_ALLOWED = {"type": {"const": "allowed_tools"}, "allowed_tools": {"type": "object", "properties": _SOME, "required": list(_SOME)}}
CHOICE_SCHEMA: Form = {  # what /openapi.json shows
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        _ONE,
        {"type": "object", "properties": _ALLOWED, "required": list(_ALLOWED), "additionalProperties": False},
    ]
}


def only_allowed(choice: Any, tools: list[dict[str, Any]] | None) -> tuple[Any, list[dict[str, Any]] | None]:
    """A `tool_choice` that allows some of the tools as a plain one, and these tools: the model does not see the others."""
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return choice, tools
    given = choice.get("allowed_tools")
    mode, listed = (given.get("mode"), given.get("tools")) if isinstance(given, dict) else (None, None)
    if mode not in ("auto", "required") or not isinstance(listed, list) or not listed:
        raise ValueError("tool_choice: allowed_tools must be {'mode': 'auto' or 'required', 'tools': [{'type': 'function', 'function': ...}, ...]}")
    for one in listed:
        check_choice(one if isinstance(one, dict) else [one], tools)
    names = [one["function"]["name"] for one in listed]
    return mode, [tool for tool in tools or () if tool["function"]["name"] in names]


def check_choice(choice: Any, tools: Sequence[dict[str, Any]] | None) -> None:
    """ValueError unless a `tool_choice` is one that there is, for these tools."""
    if choice in (None, "none", "auto"):
        return
    if not tools:
        raise ValueError(f"tool_choice: {choice!r} needs tools")
    if choice == "required":
        return
    function = choice.get("function") if isinstance(choice, dict) and set(choice) == {"type", "function"} else None
    if not isinstance(function, dict) or set(function) != {"name"} or choice["type"] != "function":
        raise ValueError(
            f"tool_choice: must be 'none', 'auto', 'required' or {{'type': 'function', 'function': {{'name': ...}}}}, got {choice!r}"[:300]
        )
    if function["name"] not in [tool["function"]["name"] for tool in tools]:
        raise ValueError(f"tool_choice: there is no tool {function['name']!r}")


def constraint(
    wanted: StructuredOutputsParams | None,
    tools: Sequence[dict[str, Any]],
    choice: Any,
    parallel: bool,
    formats: Formats,
    prompt: str,
    budget: int | None = None,
) -> StructuredOutputsParams | None:
    """What an answer must look like; None if it may be anything. `wanted` is what the request itself asks for, `tools` those that the model is shown,
    `choice` one that `check_choice` let pass, `prompt` the rendered one, `budget` the most tokens of reasoning, where its tags are tokens.

    "required" and a name make the answer calls and nothing else. Left to choose, the model writes calls or what is wanted; without anything wanted,
    calls to a tool that is `strict` have arguments of its schema, if the format's calls begin with a tag of their own. All this comes after the
    reasoning for which the prompt leaves room. ValueError, naming the field, for what cannot be had."""
    format, reasoning = formats.tools if tools else None, formats.reasoning
    if reasoning is None or reasoning.closed_by(prompt):
        budget = None
    form = None if wanted is None else _form(wanted, reasoning)
    if choice not in (None, "auto", "none"):
        if format is None:
            raise ValueError("tool_choice: the server reads no tool calls (tool_call_parser), only 'auto' and 'none' are possible")
        if wanted is not None and wanted.field != "response_format":  # that is about text, of which there is none beside forced calls
            raise ValueError(f"tool_choice: {choice!r} leaves no room for {wanted.field}")
        named = choice["function"]["name"] if isinstance(choice, dict) else None
        called = [tool for tool in tools if named in (None, tool["function"]["name"])]
        calls = _calls([_call(tool, format, _parameters(tool)) for tool in called], format, parallel and named is None)
        return params("tool_choice", structural_tag={"format": after_reasoning(calls, reasoning, prompt, budget)})
    if wanted is not None:
        if form is None and budget is not None:
            raise ValueError(f"thinking_token_budget: {wanted.field} with a {wanted.kind} says itself what reasoning there may be")
        if form is None or (format is None and after_reasoning(form, reasoning, prompt) is form):
            return wanted
        if format is not None and format.arguments == "json":
            form = {"type": "or", "elements": [_calls([_call(t, format, _parameters(t)) for t in tools], format, parallel), form]}
        return params(wanted.field, structural_tag={"format": after_reasoning(form, reasoning, prompt, budget)})
    if format is not None and any(tool["function"].get("strict") for tool in tools):
        form = _auto(tools, format)
    if budget is None or reasoning is None:
        return None if form is None else params("tools", structural_tag={"format": form})
    excluded = [reasoning.begin]  # what is free must not be reasoning as well
    form = {"type": "any_tokens", "exclude_tokens": excluded} if form is None else {**form, "excludes": excluded}
    return params("thinking_token_budget", structural_tag={"format": after_reasoning(form, reasoning, prompt, budget)})


def after_reasoning(form: Form, reasoning: ReasoningFormat | None, prompt: str, budget: int | None = None) -> Form:
    """`form`, with the reasoning before it for which the prompt leaves room: none behind a closed one, and an open one must be ended, after `budget`
    tokens at the latest."""
    if reasoning is None or reasoning.closed_by(prompt):
        return form
    layout = {"type": "const_string", "value": "<|start|>assistant"} if reasoning.name == "harmony" else {"type": "regex", "pattern": r"\s{0,4}"}
    opened = reasoning.opened_by(prompt)
    text: Form = {"type": "any_text"} if budget is None else {"type": "any_text", "max_tokens": budget}
    thought = _tag("" if opened else reasoning.begin, text, reasoning.end)
    after = {"type": "sequence", "elements": [thought, layout, form]}
    return after if opened else {"type": "or", "elements": [after, form]}


def _form(wanted: StructuredOutputsParams, reasoning: ReasoningFormat | None) -> Form | None:
    """What is wanted, as part of a structural tag; None for grammars and for tags, which say themselves where they begin."""
    match wanted.kind:
        case "json" | "json_object":
            schema = {"type": "object"} if wanted.kind == "json_object" else json.loads(wanted.text)
            form: Form = {"type": "json_schema", "json_schema": schema}
        case "regex":
            form = {"type": "regex", "pattern": wanted.text}
        case "choice":
            form = {"type": "or", "elements": [{"type": "const_string", "value": c} for c in wanted.choice or ()]}
        case _:
            return None
    return _tag("<|channel|>final<|message|>", form, "") if reasoning is not None and reasoning.name == "harmony" else form


def _parameters(tool: dict[str, Any]) -> Form:
    schema = tool["function"].get("parameters") or {"type": "object", "properties": {}}
    return schema if isinstance(schema, dict) and "type" in schema else {"type": "object", **schema}


def _call(tool: dict[str, Any], format: ToolFormat, schema: Form) -> Form:
    """One call: a tag whose content are the arguments, in formats that number calls behind the number."""
    if format.arguments != "json":
        raise ValueError(f"tool_choice: calls in the model's format ({format.name}) cannot be forced, only 'auto' and 'none' are possible")
    begin, number, rest = f"{format.before}{tool['function']['name']}{format.between}".partition("{index}")
    content: Form = {"type": "json_schema", "json_schema": schema}
    if number:
        parts: list[Form] = [{"type": "regex", "pattern": "[0-9]{1,3}"}, {"type": "const_string", "value": rest}, content]
        content = {"type": "sequence", "elements": parts}
    return _tag(begin, content, format.after)


def _calls(calls: list[Form], format: ToolFormat, several: bool) -> Form:
    listed = {"type": "tags_with_separator", "tags": calls, "separator": format.separator, "at_least_one": True, "stop_after_first": not several}
    return _tag(format.begin, listed, format.end)


def _auto(tools: Sequence[dict[str, Any]], format: ToolFormat) -> Form | None:
    """Free text; from the tag on that begins calls, only calls."""
    found = _TAG.match(format.begin or format.before)
    if found is None or format.arguments != "json":
        return None
    calls = [_call(tool, format, _parameters(tool) if tool["function"].get("strict") else {"type": "object"}) for tool in tools]
    tags = [_calls(calls, format, True)] if format.begin else calls
    return {"type": "triggered_tags", "triggers": [found[0]], "tags": tags}


def _tag(begin: str, content: Form, end: str) -> Form:
    return {"type": "tag", "begin": begin, "content": content, "end": end}
