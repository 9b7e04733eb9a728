"""Tools of the Responses API, and what they are in a chat: everything there is a function.

Owns the bodies of tools and choices, and the way back from a function's name to the tool that was offered. A custom tool takes a text, which is the
one argument of its function; a grammar for it is told to the model and not enforced. The tools of a namespace carry its name before theirs. What
OpenAI's own clients offer in addition to their tools and only OpenAI's servers can do (a search) is taken, and the model is not told of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from miniinfer.serve.protocol import ApiError, Strict

UNSEEN = (
    *("image_generation", "tool_search", "web_search", "web_search_2025_08_26"),
    *("web_search_preview", "web_search_preview_2025_03_11"),
)
TEXT = "input"  # the argument of a custom tool's function


class Offered(Strict):
    """What all tools of the client's own have. From `defer_loading` on it changes nothing: the model is shown every tool, and calls it itself."""

    name: str = Field(min_length=1)
    description: str | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None
    output_schema: dict[str, Any] | None = None


class FunctionTool(Offered):
    """A function that the model may call."""

    type: Literal["function"]
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def for_chat(self, name: str) -> dict[str, Any]:
        return _function(name, self.description, self.parameters, self.strict)


class TextFormat(Strict):
    """What a custom tool's text is to look like."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class FreeformTool(Offered):
    """A tool that takes a text."""

    type: Literal["custom"]
    format: TextFormat | None = None

    def for_chat(self, name: str) -> dict[str, Any]:
        about = self.description or ""
        if self.format is not None and self.format.definition:
            about += f"\n\nThe text must follow this grammar ({self.format.syntax or 'lark'}):\n{self.format.definition}"
        schema = {"type": "object", "properties": {TEXT: {"type": "string"}}, "required": [TEXT], "additionalProperties": False}
        return _function(name, about.strip() or None, schema, True)


class Namespace(Strict):
    """Tools that belong together."""

    type: Literal["namespace"]
    name: str = Field(min_length=1)
    description: str | None = None
    tools: list[Annotated[FunctionTool | FreeformTool, Field(discriminator="type")]]


class UnseenTool(Strict):
    """What the server has not got; the model is not told of it."""

    model_config = ConfigDict(extra="ignore")

    type: Literal[UNSEEN]  # type: ignore[valid-type]


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "unseen" if kind in UNSEEN else str(kind)


ResponseTool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[FreeformTool, Tag("custom")]
    | Annotated[Namespace, Tag("namespace")]
    | Annotated[UnseenTool, Tag("unseen")],
    Discriminator(
        _kind,
        custom_error_type="unknown_tool",
        custom_error_message="the server runs no tools of this type itself; offer what it does as a function, which the client runs",
    ),
]


class Named(Strict):
    """One tool, by its name."""

    type: Literal["function", "custom"]
    name: str
    namespace: str | None = None

    def for_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": flat(self.name, self.namespace)}}


class Allowed(Strict):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[Named] = Field(min_length=1)

    def for_chat(self) -> dict[str, Any]:
        return {"type": "allowed_tools", "allowed_tools": {"mode": self.mode, "tools": [tool.for_chat() for tool in self.tools]}}


ToolChoice = Literal["none", "auto", "required"] | Annotated[Named | Allowed, Field(discriminator="type")]


@dataclass(frozen=True, slots=True)
class Origin:
    """The tool that a function of the chat stands for."""

    name: str
    namespace: str | None
    custom: bool


def flat(name: str, namespace: str | None) -> str:
    """What a tool of a namespace is called in a chat."""
    return name if not namespace else f"{namespace.removesuffix('__')}__{name}"


def for_chat(tools: Sequence[FunctionTool | FreeformTool | Namespace | UnseenTool]) -> tuple[list[dict[str, Any]], dict[str, Origin]]:
    """The functions that a chat has instead of these tools, and which of them stand for something else. ApiError 400 for two of one name."""
    functions: list[dict[str, Any]] = []
    origins: dict[str, Origin] = {}
    for tool in tools:
        for one in tool.tools if isinstance(tool, Namespace) else [] if isinstance(tool, UnseenTool) else [tool]:
            namespace = tool.name if isinstance(tool, Namespace) else None
            name = flat(one.name, namespace)
            if any(function["function"]["name"] == name for function in functions):
                raise ApiError(400, f"tools: there are two tools {name!r}", param="tools")
            functions.append(one.for_chat(name))
            origins[name] = Origin(one.name, namespace, isinstance(one, FreeformTool))
    return functions, origins


def text_of(arguments: str) -> str:
    """The text for a custom tool from its function's arguments; what is no such arguments is the text itself."""
    try:
        return str(json.loads(arguments)[TEXT])
    except (ValueError, KeyError, TypeError):
        return arguments


def _function(name: str, description: str | None, parameters: dict[str, Any] | None, strict: bool | None) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}
