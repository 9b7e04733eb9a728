"""OpenAI's Responses API: bodies, routes, and the store that `previous_response_id` and retrieval need.

A response is a chat answer told in other words: the body becomes a ChatRequest, and the chat's stream becomes items and events
(response_items.py), so that templates, tools, formats and reasoning are the same in both APIs. Owns nothing of a request's life.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Discriminator, Field, Tag, WithJsonSchema, field_validator
from starlette.requests import Request
from starlette.responses import Response

from miniinfer.serve.answers import encode
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.openai import chat_answer
from miniinfer.serve.protocol import ApiError, CacheRetention, ChatRequest, Effort, Stop, Strict, TemplateVariables, TokenIds, between, checked
from miniinfer.serve.response_items import ResponseAnswer, ResponseShape, messages_of
from miniinfer.serve.schemas import Deleted, Shape, described
from miniinfer.serve.service import Service, as_api_error
from miniinfer.utils import get_logger

log = get_logger(__name__)

MAX_STORED, MAX_STORED_BYTES, STORED_SECONDS = 1000, 256 << 20, 24 * 3600.0

# ------------------------------------------------------------------------------------------------------------ bodies

_PART = {"type": "object", "required": ["type", "text"], "properties": {"type": {"enum": ["input_text", "output_text"]}, "text": {"type": "string"}}}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}


def _join(value: Any) -> Any:
    """Text parts as one text; ValueError for other parts."""
    if not isinstance(value, list):
        return value
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "summary_text", "reasoning_text", "text"):
            raise ValueError(f"part {i} has type {kind!r}; only text is supported")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"part {i} needs 'text', a string")
    return "".join(part["text"] for part in value)


class Item(Strict):
    """What all items may carry when a client sends back what it got."""

    id: str | None = None
    status: str | None = None


class InputMessage(Item):
    """A message of a conversation."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[str, WithJsonSchema(_CONTENT)]
    phase: str | None = None

    _text = field_validator("content", mode="before")(_join)


class CallItem(Item):
    """A function call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutput(Item):
    """What the function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[str, WithJsonSchema(_CONTENT)]

    _text = field_validator("output", mode="before")(_join)


class ReasoningItem(Item):
    """The model's reasoning, sent back: it goes before the assistant's next words, where the template has a place for it."""

    type: Literal["reasoning"]
    summary: list[dict[str, Any]] = []
    content: Annotated[str, WithJsonSchema({"type": "array"})] | None = None
    encrypted_content: str | None = None

    _text = field_validator("content", mode="before")(_join)


def _kind(value: Any) -> str:
    """A dict's when it is checked, a model's when it is written out again."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return str(kind or "message")


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


def _or_text(schema: dict[str, Any]) -> None:
    items = {key: schema.pop(key) for key in ("type", "items", "minItems") if key in schema}
    schema["anyOf"] = [{"type": "string", "minLength": 1}, items]


class FunctionTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class Format(Strict):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        if self.json_schema is None:
            raise ApiError(400, "text.format.schema: required field is missing", param="text.format.schema")
        named = {"name": self.name or "answer", "schema": self.json_schema, "strict": self.strict, "description": self.description}
        return {"type": "json_schema", "json_schema": {key: value for key, value in named.items() if value is not None}}


class TextOptions(Strict):
    format: Format | None = None
    verbosity: str | None = None


class ReasoningOptions(Strict):
    """How hard the model is to think, if its template knows how to tell it; reasoning is given back as it is, not as a summary."""

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None


class NamedFunction(Strict):
    type: Literal["function"]
    name: str


class EventOptions(Strict):
    include_obfuscation: bool = False


class ResponsesRequest(Strict):
    """/v1/responses. Fields from `metadata` on change nothing in the answer; they are taken because official clients send them."""

    model: str | None = None
    input: list[InputItem] = Field(min_length=1, json_schema_extra=_or_text)
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool = False
    stream_options: EventOptions | None = None
    background: bool = False
    store: bool = True
    max_output_tokens: int | None = Field(None, json_schema_extra={"minimum": 1})
    temperature: float | None = between(0, 100)
    top_p: float | None = Field(None, json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})
    top_logprobs: int | None = between(0, 20)
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    truncation: Literal["disabled"] | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = between(0, 1)
    presence_penalty: float | None = between(-2, 2)
    frequency_penalty: float | None = between(-2, 2)
    repetition_penalty: float | None = Field(None, json_schema_extra={"exclusiveMinimum": 0, "maximum": 100})
    seed: int | None = between(-(2**63), 2**63 - 1)
    stop: Stop | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    cache_salt: str = Field("", max_length=256)
    chat_template_kwargs: TemplateVariables | None = None
    metadata: dict[str, str] | None = None
    max_tool_calls: int | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: CacheRetention | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _one_message(cls, value: Any) -> Any:
        return [{"role": "user", "content": value}] if isinstance(value, str) and value else value

    def chat(self, before: list[dict[str, Any]]) -> ChatRequest:
        """The same as a chat request, after the messages of `before`."""
        instructions = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        messages = instructions + before + messages_of([item.model_dump(exclude_none=True) for item in self.input])
        raw: dict[str, Any] = {name: getattr(self, name) for name in _PASSED_ON} | {"messages": messages}
        raw["reasoning_effort"] = self.reasoning.effort if self.reasoning is not None else None
        raw["max_completion_tokens"] = self.max_output_tokens
        if self.wants_logprobs:
            raw |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.tools:
            raw["tools"] = [tool.for_chat() for tool in self.tools]
        choice = self.tool_choice
        raw["tool_choice"] = {"type": "function", "function": {"name": choice.name}} if isinstance(choice, NamedFunction) else choice
        if self.text is not None and self.text.format is not None:
            raw["response_format"] = self.text.format.for_chat()
        try:
            return checked(ChatRequest, raw)
        except ApiError as e:
            head = (e.param or "").partition(".")[0]
            if head in _RENAMED:
                e.message, e.param = e.message.replace(head, _RENAMED[head], 1), _RENAMED[head]
            raise

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())


_PASSED_ON = "model stream parallel_tool_calls temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty seed".split()
_PASSED_ON += "stop stop_token_ids ignore_eos skip_special_tokens include_stop_str_in_output priority cache_salt chat_template_kwargs".split()
_PASSED_ON += ["prompt_cache_retention"]
_RENAMED = {"messages": "input", "response_format": "text.format", "max_completion_tokens": "max_output_tokens"}

# ------------------------------------------------------------------------------------------------------------- store


@dataclass(slots=True)
class Stored:
    """A response, and the conversation up to and with it (without instructions, which are not handed on)."""

    response: dict[str, Any]
    input: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    size: int = 0
    until: float = field(default_factory=lambda: time.monotonic() + STORED_SECONDS)
    task: asyncio.Task[None] | None = None  # computes it, in the background


class Store:
    """Responses by id, in memory: the oldest go when there are too many, too much of them, or after a day. One being computed stays."""

    def __init__(self, count: int = MAX_STORED, size: int = MAX_STORED_BYTES) -> None:
        self._count, self._size = count, size
        self._held: OrderedDict[str, Stored] = OrderedDict()
        self._total = 0

    def put(self, stored: Stored) -> None:
        """Adds a response, or what has become of one."""
        self.drop(stored.response["id"])
        stored.size = len(encode((stored.response, stored.input, stored.messages)))
        self._held[stored.response["id"]] = stored
        self._total += stored.size
        for id in [id for id, held in self._held.items() if held.task is None or held.task.done()]:
            if len(self._held) <= self._count and self._total <= self._size and self._held[id].until > time.monotonic():
                break
            self.drop(id)

    def get(self, id: str, param: str | None = None) -> Stored:
        """ApiError 404 for one that is not, or no longer, there."""
        stored = self._held.get(id)
        if stored is None or stored.until <= time.monotonic():
            self.drop(id)
            raise ApiError(404, f"there is no response '{id}'; responses are kept in memory for a day, if 'store' is true", param=param)
        return stored

    def drop(self, id: str) -> None:
        if (stored := self._held.pop(id, None)) is not None:
            self._total -= stored.size


# ------------------------------------------------------------------------------------------------------------ routes


class ItemList(Shape):
    object: str
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


def router(fleet: Fleet) -> APIRouter:
    """The routes below /v1/responses."""
    routes = APIRouter(prefix="/v1/responses")
    store = Store()

    @routes.post("", **described(ResponsesRequest, ResponseShape, stream="text/event-stream"))
    async def create(http: Request) -> Response:
        service, request = await fleet.read(http, ResponsesRequest)
        if request.background and (request.stream or not request.store):
            raise ApiError(400, "background: only without stream and with store", param="background")
        previous = request.previous_response_id
        before = store.get(previous, "previous_response_id") if previous is not None else None
        if before is not None and before.response["status"] in ("queued", "in_progress"):
            raise ApiError(400, f"previous_response_id: '{previous}' is not completed yet", param="previous_response_id")
        answer, params = await chat_answer(service, request.chat(before.messages if before else []), ResponseAnswer, "resp_")
        answer.begin(request.model_dump(by_alias=True))
        items = [{"id": f"msg_{uuid.uuid4().hex}", **item.model_dump(exclude_none=True)} for item in request.input]
        stored = Stored(answer.response, items, [])

        def keep() -> None:
            stored.messages = (before.messages if before else []) + messages_of(items) + messages_of(answer.response["output"])
            store.put(stored)

        if request.store:
            answer.ended = keep
        if not request.background:
            return await service.respond(http, answer, params)
        service.check_length(answer.prompts[0], params.max_tokens)
        service.gate.admit(1)
        stored.task = asyncio.create_task(_compute(service, answer, params))
        store.put(stored)
        return _json(answer.response)

    @routes.get("/{response_id}", **described(answer=ResponseShape))
    async def retrieve(response_id: str) -> Response:
        return _json(store.get(response_id).response)

    @routes.delete("/{response_id}", **described(answer=Deleted))
    async def delete(response_id: str) -> Response:
        if (task := store.get(response_id).task) is not None:
            task.cancel()
        store.drop(response_id)
        return _json({"id": response_id, "object": "response", "deleted": True})

    @routes.post("/{response_id}/cancel", **described(answer=ResponseShape))
    async def cancel(response_id: str) -> Response:
        stored = store.get(response_id)
        if stored.task is None:
            raise ApiError(400, "only a response made with background=true can be cancelled; to end another one, close its connection")
        stored.task.cancel()
        await asyncio.gather(stored.task, return_exceptions=True)
        if stored.response["status"] == "queued":  # it had not begun
            stored.response["status"] = "cancelled"
        return _json(stored.response)

    @routes.get("/{response_id}/input_items", **described(answer=ItemList))
    async def input_items(
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        items = store.get(response_id).input
        items = items if order == "asc" else items[::-1]
        if after is not None:
            at = next((i for i, item in enumerate(items) if item["id"] == after), None)
            if at is None:
                raise ApiError(400, f"after: there is no item '{after}'", param="after")
            items = items[at + 1 :]
        shown = [_shown(item) for item in items[:limit]]
        ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
        return _json({"object": "list", "data": shown, **ends, "has_more": len(items) > limit})

    return routes


async def _compute(service: Service, answer: ResponseAnswer, params: Any) -> None:
    """A response that nobody waits for."""
    try:
        answer.response["status"] = "in_progress"
        async with aclosing(service.items(answer, params)) as items:
            async for item in items:
                for delta in item.outputs:
                    answer.add(delta)
    except asyncio.CancelledError:
        answer.close("cancelled")
    except Exception as e:
        shown = as_api_error(e)
        if shown.status == 500:
            log.error("%s failed", answer.id, exc_info=e)
        answer.failure(shown)


def _shown(item: dict[str, Any]) -> dict[str, Any]:
    """An input item as the API shows it: a message's text as a part."""
    if item["type"] != "message":
        return item
    kind = "output_text" if item["role"] == "assistant" else "input_text"
    part: dict[str, Any] = {"type": kind, "text": item["content"]}
    return {"status": "completed", **item, "content": [part | ({"annotations": []} if kind == "output_text" else {})]}


def _json(value: Any) -> Response:
    return Response(encode(value), media_type="application/json")
