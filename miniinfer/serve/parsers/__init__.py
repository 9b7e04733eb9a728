"""From a model's text to content, reasoning and tool calls, piece by piece: one protocol for every format.

Owns the choice of formats for a model (`choose`) and how parsers are put together for one answer (`Formats.parser`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from miniinfer.serve.parsers.arguments import arguments_so_far, whole_arguments
from miniinfer.serve.parsers.deltas import CallArguments, CallStart, Content, Delta, OutputParser, Reasoning
from miniinfer.serve.parsers.formats import ReasoningFormat, ToolFormat, reasoning_format, tool_format
from miniinfer.serve.parsers.harmony import HarmonyParser
from miniinfer.serve.parsers.readers import Schemas
from miniinfer.serve.parsers.reasoning import ReasoningParser
from miniinfer.serve.parsers.tools import Calls, ToolParser

__all__ = [
    "CallArguments",
    "CallStart",
    "Content",
    "Delta",
    "Formats",
    "OutputParser",
    "Reasoning",
    "arguments_so_far",
    "choose",
    "whole_arguments",
]


@dataclass(frozen=True)
class Formats:
    """How a model writes tool calls and reasoning; None: it does not, or nobody wants them apart."""

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None

    @property
    def special_tokens(self) -> bool:
        """Are reasoning's tags special tokens, which text usually leaves out? Those of calls may be in any format."""
        return self.reasoning is not None and self.reasoning.name != "think"

    def parser(self, prompt: str, tools: Sequence[dict[str, Any]] | None, parallel: bool = True) -> OutputParser | None:
        """A parser for one answer to a rendered prompt; None where all text is content. `tools` in OpenAI's form."""
        format, schemas = self.tools if tools else None, _schemas(tools or ())
        harmony = "harmony" in (self.reasoning.name if self.reasoning else "", format.name if format else "")
        if harmony:
            return HarmonyParser(Calls("harmony", parallel) if format else None, schemas, self.reasoning is not None)
        calls = ToolParser(format, schemas, parallel) if format else None
        if self.reasoning is None:
            return calls
        return _Chain(ReasoningParser(self.reasoning, self.reasoning.opened_by(prompt)), calls)


@lru_cache(maxsize=64)
def choose(tool_parser: str, reasoning_parser: str, template: str, family: str) -> Formats:
    """The formats that two options name; "auto" goes by the chat template's text and the family. ConfigError for a name that is none. Asked for every
    conversation, but seldom for another template."""
    return Formats(tool_format(tool_parser, template, family), reasoning_format(reasoning_parser, template))


def _schemas(tools: Sequence[dict[str, Any]]) -> Schemas:
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}


class _Chain:
    """Reasoning first; what follows it goes to the parser of calls."""

    def __init__(self, reasoning: ReasoningParser, calls: ToolParser | None) -> None:
        self._reasoning, self._calls = reasoning, calls

    @property
    def called(self) -> bool:
        return self._calls is not None and self._calls.called

    def push(self, text: str) -> list[Delta]:
        return self._both(*self._reasoning.push(text))

    def finish(self) -> list[Delta]:
        deltas = self._both(*self._reasoning.finish())
        return deltas + (self._calls.finish() if self._calls else [])

    def _both(self, reasoning: str, content: str) -> list[Delta]:
        deltas: list[Delta] = [Reasoning(reasoning)] if reasoning else []
        if content:
            deltas += self._calls.push(content) if self._calls else [Content(content)]
        return deltas
