"""Anthropic's API: messages and the count of their tokens. Owns its bodies, answers, stream events and errors; a conversation runs as OpenAI's do.

What has no meaning here (metadata, service_tier and their like) is taken and ignored; what would change the answer and cannot be done (images,
documents, server tools) is refused. Every prefix is cached anyway: `cache_control` has those that it marks
kept for its time, evicted after all that is not marked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter
from pydantic import BeforeValidator, Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from miniinfer.data import CompletionOutput, SamplingParams
from miniinfer.serve.answers import encode
from miniinfer.serve.anthropic_fields import known_fields, plain_block
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.foreign import ForeignAnswer, Part, chat_request, prepare, thinking_variables
from miniinfer.serve.parsers import arguments_so_far
from miniinfer.serve.prefixes import common_prefix
from miniinfer.serve.protocol import ApiError, ChatRequest, Strict, between
from miniinfer.serve.schemas import Shape, described
from miniinfer.serve.service import Service

LONG = 3600  # seconds of the longer of the two times that a mark can name
_NAMES = {"continue_final_message": "messages", "stop": "stop_sequences", "response_format": "output_config.format"}

# ----------------------------------------------------------------------------------------------------------- errors

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large"} | {
    429: "rate_limit_error", 500: "api_error", 503: "overloaded_error", 504: "timeout_error"
}  # fmt: skip


class AnthropicError(ApiError):
    """An error in Anthropic's shape."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status, error.message, param=error.param, code=error.code, headers=error.headers)

    def body(self) -> bytes:
        kind = _TYPES.get(self.status, "invalid_request_error")
        details = {"details": {"error_code": self.code}} if self.code is not None else {}
        return encode({"type": "error", "error": {"type": kind, "message": self.message, **details}})


# ----------------------------------------------------------------------------------------------------------- bodies


class CacheControl(Strict):
    """What comes before the end of this block is to be kept in the cache. A mark within a message counts for the whole of it."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] = "5m"
    scope: str | None = None  # whose cache; there is one here, and `cache_salt` separates users

    @property
    def seconds(self) -> int:
        return LONG if self.ttl == "1h" else 300


class TextBlock(Strict):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: list[Any] | None = None


class ThinkingBlock(Strict):
    """What the model thought, given back to it."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedBlock(Strict):
    """Thoughts that only Anthropic could read; left out."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Strict):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: dict[str, Any] | None = None


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _or_text(schema: dict[str, Any]) -> None:
    """In /openapi.json: a string stands for one block of text."""
    listed = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "string"}, listed]


Texts = Annotated[list[Annotated[TextBlock, BeforeValidator(plain_block)]], BeforeValidator(_as_blocks), Field(json_schema_extra=_or_text)]


class ToolResultBlock(Strict):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = []
    is_error: bool = False
    cache_control: CacheControl | None = None


_Block = Annotated[TextBlock | ThinkingBlock | RedactedBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]
Block = Annotated[_Block, BeforeValidator(plain_block)]


class MessageParam(Strict):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_as_blocks), Field(json_schema_extra=_or_text)]


class CustomTool(Strict):
    """A function that the client runs."""

    name: str = Field(min_length=1)
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] = "custom"
    strict: bool | None = None
    cache_control: CacheControl | None = None
    input_examples: list[dict[str, Any]] | None = None
    eager_input_streaming: bool | None = None


class ToolChoice(Strict):
    """Whether calls are to be made."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingConfig(Strict):
    """Whether the model thinks first, for templates that know it, and for how many tokens, if its thinking can be ended."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    display: str | None = None


class OutputConfig(Strict):
    """What the text is to look like, and how hard the model is to think, for templates that know it."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class CountRequest(Strict):
    """/v1/messages/count_tokens."""

    model: str
    messages: list[MessageParam] = Field(min_length=1)
    system: Texts = []
    tools: list[CustomTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None

    _known = model_validator(mode="before")(known_fields)

    def chat(self, service: Service, **more: Any) -> ChatRequest:
        """The same conversation as OpenAI's API has it."""
        begun = self.messages[-1].role == "assistant"
        if begun and any(isinstance(block, ToolUseBlock) for block in self.messages[-1].content):
            raise ApiError(400, "messages: the last one has calls; their results must follow", param="messages")
        messages = [{"role": "system", "content": _text(self.system)}] if self.system else []
        for i, message in enumerate(self.messages):
            messages += _messages(message, i)
        fields: dict[str, Any] = {"model": self.model, "messages": messages, "continue_final_message": begun, **more}
        if self.tools:
            fields["tools"] = [_function(tool) for tool in self.tools]
        if self.tool_choice is not None:
            fields["tool_choice"] = _choice(self.tool_choice)
            fields["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        if self.output_config is not None and self.output_config.format is not None:
            fields["response_format"] = _format(self.output_config.format)
        on = None if self.thinking is None else self.thinking.type != "disabled"
        if on and (tags := service.formats().reasoning) and tags.ids(service.engine.tokenizer):  # else it is left out: clients send it unasked
            fields["thinking_token_budget"] = self.thinking and self.thinking.budget_tokens
        fields["chat_template_kwargs"] = thinking_variables(service, on, self.output_config.effort if self.output_config else None)
        return chat_request(fields, _NAMES)

    def marks(self) -> dict[int, int]:
        """What is to be kept: up to the end of how many of the chat's messages, and for how many seconds. Longest prefixes first; a shorter one is
        there only if it is to be kept longer. Tools belong to the system prompt, in or before which templates put them."""
        count = int(bool(self.system))
        ends = [(count, item.cache_control) for item in (*(self.tools or ()), *self.system)]
        for i, message in enumerate(self.messages):
            count += len(_messages(message, i))
            ends += [(count, getattr(block, "cache_control", None)) for block in message.content]
        found: dict[int, int] = {}
        for end, mark in reversed([*ends, (count, self.cache_control)]):
            if mark is not None and mark.seconds > max(found.values(), default=0):
                found[end] = mark.seconds
        return found


class MessagesRequest(CountRequest):
    """/v1/messages."""

    max_tokens: int = Field(ge=1)
    stream: bool = False
    stop_sequences: list[Annotated[str, Field(min_length=1)]] | None = Field(None, max_length=64)
    temperature: float | None = between(0, 100)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    top_p: float | None = Field(None, json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def run(self, service: Service) -> ChatRequest:
        """The conversation with its settings."""
        more = {name: getattr(self, name) for name in ("max_tokens", "stream", "temperature", "top_k", "top_p")}
        return self.chat(service, stop=self.stop_sequences, **more)


def _text(blocks: Iterable[Any]) -> str:
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))


def _messages(message: MessageParam, index: int) -> list[dict[str, Any]]:
    """A message as OpenAI's API has it: results of calls are messages of their own there."""
    made: list[dict[str, Any]] = []
    allowed = {"user": (TextBlock, ToolResultBlock), "system": (TextBlock,)}.get(
        message.role, (TextBlock, ThinkingBlock, RedactedBlock, ToolUseBlock)
    )
    for i, block in enumerate(message.content):
        if not isinstance(block, allowed):
            field = f"messages.{index}.content.{i}"
            raise ApiError(400, f"{field}: a block of type '{block.type}' has no place in a message of the {message.role}", param=field)
        if isinstance(block, ToolResultBlock):
            text = ("Error: " if block.is_error else "") + _text(block.content)
            made.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
    texts = [block for block in message.content if isinstance(block, TextBlock)]
    if message.role != "assistant":
        return [*made, {"role": message.role, "content": _text(texts)}] if texts or not made else made
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": encode(block.input).decode()}}
        for block in message.content
        if isinstance(block, ToolUseBlock)
    ]
    thoughts = "".join(block.thinking for block in message.content if isinstance(block, ThinkingBlock))
    said: dict[str, Any] = {"role": "assistant", "content": "".join(block.text for block in texts)}
    return [said | ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": thoughts} if thoughts else {})]


def _function(tool: CustomTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> Any:
    if choice.type != "tool":
        return {"auto": "auto", "any": "required", "none": "none"}[choice.type]
    if choice.name is None:
        raise ApiError(400, "tool_choice.name: required field is missing", param="tool_choice.name")
    return {"type": "function", "function": {"name": choice.name}}


def _format(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("type") != "json_schema" or not isinstance(given.get("schema"), dict):
        field = "output_config.format"
        raise ApiError(400, f"{field}: must be {{'type': 'json_schema', 'schema': {{...}}}}", param=field)
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": given["schema"], "strict": True}}


# ---------------------------------------------------------------------------------------------------------- answers

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageAnswer(ForeignAnswer):
    """A message: whole, or as events in Anthropic's order. `kept`: prefixes that were asked to be kept, in tokens and seconds."""

    kept: list[tuple[int, float]] = []
    shortened = False  # there was less room in the context than it was allowed to have

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._blocks = 0  # begun so far
        self._open = ""  # the kind of the block that is open
        self._ended: CompletionOutput | None = None

    def event(self, delta: CompletionOutput) -> bytes:
        events = b"" if self._started[0] else _event("message_start", message=self._message([], None, None))
        self._started[0] = True
        for part in self.parts(delta):
            events += self._part(part)
        if delta.finish_reason is not None:
            events += self._close()
            self._ended = delta
        return events

    def end(self) -> bytes:
        assert self._ended is not None
        reason, stop = self._reason(self._ended.finish_reason, self._ended.stop_reason)
        last = _event("message_delta", delta={"stop_reason": reason, "stop_sequence": stop}, usage=self.usage())
        return last + _event("message_stop")

    def failure(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + AnthropicError(error).body() + b"\n\n"

    def result(self) -> bytes:
        (choice,) = self.choices
        content: list[dict[str, Any]] = []
        for part in self.whole(choice):
            if part.kind == "arguments":
                content[-1]["input"] = arguments_so_far(part.text)
            else:
                content.append(_begun(part) | ({part.kind: part.text} if part.kind != "call" else {}))
        return encode(self._message(content, *self._reason(choice.finish_reason, choice.stop_reason)))

    def usage(self) -> dict[str, Any]:
        """Anthropic counts tokens from the cache apart, and those that a mark has put there."""
        cached = self.cached_tokens
        written, longer = (max([0, *(tokens - cached for tokens, seconds in self.kept if seconds >= least)]) for least in (0, LONG))
        return {
            "input_tokens": self.prompt_tokens - cached - written,
            "cache_creation_input_tokens": written,
            "cache_read_input_tokens": cached,
            "cache_creation": {"ephemeral_5m_input_tokens": written - longer, "ephemeral_1h_input_tokens": longer},
            "output_tokens": self.completion_tokens,
        }

    def _message(self, content: list[dict[str, Any]], reason: str | None, stop: str | None) -> dict[str, Any]:
        about = {"id": self.id, "type": "message", "role": "assistant", "model": self._about["model"]}
        return about | {"content": content, "stop_reason": reason, "stop_sequence": stop, "usage": self.usage()}

    def _reason(self, finish_reason: str | None, stop: int | str | None) -> tuple[str, str | None]:
        if finish_reason == "stop" and isinstance(stop, str):
            return "stop_sequence", stop
        if finish_reason == "length" and self.shortened:
            return "model_context_window_exceeded", None
        return _REASONS[finish_reason or "stop"], None

    def _part(self, part: Part) -> bytes:
        events = b""
        if part.kind == "call" or (part.kind != "arguments" and part.kind != self._open):
            events = self._close() + _event("content_block_start", index=self._blocks, content_block=_begun(part))
            if not self._blocks:
                events += _event("ping")
            self._blocks, self._open = self._blocks + 1, part.kind
        if not part.text:
            return events
        kind, name = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}.get(part.kind, ("input_json_delta", "partial_json"))
        return events + _event("content_block_delta", index=self._blocks - 1, delta={"type": kind, name: part.text})

    def _close(self) -> bytes:
        if not self._open:
            return b""
        self._open = ""
        return _event("content_block_stop", index=self._blocks - 1)


def _begun(part: Part) -> dict[str, Any]:
    """A content block before anything is in it."""
    if part.kind == "call":
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
    return {"type": "thinking", "thinking": "", "signature": ""} if part.kind == "thinking" else {"type": "text", "text": ""}


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind, **fields}) + b"\n\n"


# ----------------------------------------------------------------------------------------------------------- routes


class AnthropicErrorDetail(Shape):
    type: str
    message: str


class AnthropicErrorShape(Shape):
    """What went wrong, in Anthropic's shape."""

    type: str
    error: AnthropicErrorDetail


class CacheCreation(Shape):
    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int


class AnthropicUsage(Shape):
    input_tokens: int
    cache_creation: CacheCreation
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int


class AnthropicMessage(Shape):
    id: str
    type: str
    role: str
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: AnthropicUsage


class TokenCount(Shape):
    input_tokens: int


def router(fleet: Fleet) -> APIRouter:
    """The routes below /v1/messages."""
    routes = APIRouter(prefix="/v1/messages")

    @routes.post("", **described(MessagesRequest, AnthropicMessage, stream="text/event-stream", error=AnthropicErrorShape))
    async def messages(http: Request) -> Response:
        _check_version(http)
        service, request = await fleet.read(http, MessagesRequest)
        chat = request.run(service)
        answer, params = await prepare(service, chat, MessageAnswer, "msg_", _NAMES)
        params = _fitted(service, answer, params)
        answer.kept = await _kept(service, chat, answer.prompts[0].token_ids, request.marks())
        response = await service.respond(http, answer, msgspec.structs.replace(params, keep_cache_prefixes=answer.kept or None))
        response.headers["request-id"] = answer.id
        return response

    @routes.post("/count_tokens", **described(CountRequest, TokenCount, error=AnthropicErrorShape))
    async def count_tokens(http: Request) -> Response:
        _check_version(http)
        service, request = await fleet.read(http, CountRequest)
        answer, _ = await prepare(service, request.chat(service), MessageAnswer, "msg_", _NAMES)
        return JSONResponse({"input_tokens": answer.prompt_tokens})

    return routes


def _fitted(service: Service, answer: MessageAnswer, params: SamplingParams) -> SamplingParams:
    """What is left of the context bounds an answer, too: clients have to name a max_tokens, and name the most that they can use. If nothing is
    left, ApiError 400 in the words by which they know that they have to shorten the conversation."""
    limit = service.engine.info["max_model_len"]
    room = limit - answer.prompt_tokens
    if room < 1:
        message = f"prompt is too long: {answer.prompt_tokens} tokens > {limit - 1} maximum"
        raise ApiError(400, message, param="messages", code="context_length_exceeded")
    answer.shortened = room < (params.max_tokens or room)
    return msgspec.structs.replace(params, max_tokens=room) if answer.shortened else params


async def _kept(service: Service, chat: ChatRequest, tokens: list[int], marks: dict[int, int]) -> list[tuple[int, float]]:
    """The marked prefixes in tokens of the prompt: what it has in common with one that goes on differently behind the mark."""
    if not service.engine.info.get("enable_prefix_caching", True):
        return []
    messages, kept = [message.for_template() for message in chat.messages], list[tuple[int, float]]()
    for end, seconds in marks.items():
        shared = tokens
        if end < len(messages):
            following = {k: v for k, v in messages[end].items() if k in ("role", "tool_call_id", "name")}
            following["content"] = "1" if str(messages[end]["content"]).startswith("0") else "0"
            other = await service.chat_prompt(
                [*messages[:end], following], chat.offered_tools, add_generation_prompt=False, template_kwargs=chat.template_variables
            )
            shared = common_prefix([tokens, other.token_ids])
        if shared:
            kept.append((len(shared), float(seconds)))
    return kept


def _check_version(http: Request) -> None:
    """Versions are dates; what clients of different ones send and understand is the same here."""
    given = http.headers.get("anthropic-version", "2023-06-01")
    if not re.fullmatch(r"20\d\d-\d\d-\d\d", given):
        raise ApiError(400, f"anthropic-version: must be a date like 2023-06-01, got {given!r}", param="anthropic-version")
