"""What other vendors' APIs share: their conversations become ChatRequests, their answers are made of the same parts as OpenAI's.

Owns no API: shapes and routes are anthropic.py's, ollama.py's and sglang.py's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeVar

from miniinfer.data import CompletionOutput, SamplingParams
from miniinfer.serve.answers import ChatAnswer, Choice
from miniinfer.serve.openai import chat_answer
from miniinfer.serve.parsers import CallArguments, CallStart, Content, Reasoning
from miniinfer.serve.protocol import ApiError, ChatRequest, checked
from miniinfer.serve.service import Service

F = TypeVar("F", bound="ForeignAnswer")


def chat_request(fields: dict[str, Any], names: dict[str, str]) -> ChatRequest:
    """A conversation in OpenAI's fields, checked. `names` are the API's own names of fields, for errors."""
    try:
        return checked(ChatRequest, fields)
    except ApiError as e:
        raise renamed(e, names) from None


def renamed(error: ApiError, names: dict[str, str]) -> ApiError:
    """The error under the name that the client knows the field by."""
    field, colon, rest = error.message.partition(": ")
    name = names.get(field)
    if name is None or not colon:
        return error
    return ApiError(error.status, f"{name}: {rest}", param=name, code=error.code, headers=error.headers)


async def prepare(service: Service, request: ChatRequest, kind: type[F], prefix: str, names: dict[str, str]) -> tuple[F, SamplingParams]:
    """`chat_answer`, with errors under the API's own names."""
    try:
        answer, params = await chat_answer(service, request, kind, prefix)
    except ApiError as e:
        raise renamed(e, names) from None
    if params.structured_outputs is not None:
        params.structured_outputs.field = names.get(params.structured_outputs.field, params.structured_outputs.field)
    return answer, params


def thinking_variables(service: Service, on: bool | None, effort: str | None = None) -> dict[str, Any]:
    """Variables by which the model's chat template is told whether and how hard to think; empty if it knows none of them."""
    tokenizer = service.engine.tokenizer
    text = "\n".join(template.text for template in tokenizer.chat_templates.values()) if tokenizer else ""
    wanted = {"enable_thinking": on, "thinking": on, "reasoning_effort": effort}
    return {
        name: value for name, value in wanted.items() if value is not None and re.search(rf"\b{name} is (not )?defined|\bif (not )?{name}\b", text)
    }


# ---------------------------------------------------------------------------------------------------------- answers


@dataclass(slots=True)
class Part:
    """A piece of an answer. A call is one "call" part and then "arguments" parts, whose texts add up to a JSON object."""

    kind: str  # "thinking", "text", "call" or "arguments"
    text: str = ""
    id: str = ""
    name: str = ""


class ForeignAnswer(ChatAnswer):
    """A chat answer in another API's shape: a subclass says how its parts look."""

    def parts(self, delta: CompletionOutput) -> list[Part]:
        """What a delta adds to the answer; its finish_reason becomes "tool_calls" if calls end it."""
        parts = []
        for said in self.deltas(delta):
            match said:
                case Content(text):
                    parts.append(Part("text", text))
                case Reasoning(text):
                    parts.append(Part("thinking", text))
                case CallStart(_, id, name):
                    parts.append(Part("call", id=id, name=name))
                case CallArguments(_, text):
                    parts.append(Part("arguments", text))
        return parts

    def whole(self, choice: Choice) -> list[Part]:
        """All parts of a finished choice, those of one kind that follow one another being joined."""
        output = CompletionOutput(0, "".join(choice.text), choice.token_ids, finish_reason=choice.finish_reason)
        joined: list[Part] = []
        for part in self.parts(output):
            if joined and joined[-1].kind == part.kind != "call":
                joined[-1].text += part.text
            else:
                joined.append(part)
        choice.finish_reason = output.finish_reason
        return joined

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def cached_tokens(self) -> int:
        return sum(prompt.cached_tokens for prompt in self.prompts)
