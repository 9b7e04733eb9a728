"""OpenAI's Responses API: bodies and routes.

A response is a chat answer told in other words: the body becomes a ChatRequest, and the chat's stream becomes items and events
(response_items.py), so that templates, tools, formats and reasoning are the same in both APIs. Tools are response_tools.py's, what is remembered
response_store.py's. Owns nothing of a request's life.
"""

from __future__ import annotations

import asyncio
import uuid
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Discriminator, Field, Tag, WithJsonSchema, field_validator, model_validator
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from miniinfer.data import SamplingParams
from miniinfer.engine.output import validate
from miniinfer.serve.answers import encode
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.openai import chat_answer
from miniinfer.serve.protocol import (
    ApiError,
    CacheRetention,
    ChatRequest,
    Effort,
    Stop,
    Strict,
    TemplateVariables,
    TokenIds,
    between,
    checked,
    without_foreign,
)
from miniinfer.serve.response_items import ResponseAnswer, ResponseShape, messages_of
from miniinfer.serve.response_store import Events, Store, Stored
from miniinfer.serve.response_tools import ResponseTool, ToolChoice, for_chat
from miniinfer.serve.schemas import Deleted, Shape, described
from miniinfer.serve.service import Service, as_api_error
from miniinfer.utils import get_logger

log = get_logger(__name__)

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


class _Called(Item):
    call_id: str
    name: str
    namespace: str | None = None
    caller: dict[str, Any] | None = None


class CallItem(_Called):
    """A function call that the model made."""

    type: Literal["function_call"]
    arguments: str


class CustomCallItem(_Called):
    """A call of a custom tool that the model made."""

    type: Literal["custom_tool_call"]
    input: str


class CallOutput(Item):
    """What the function returned."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    caller: dict[str, Any] | None = None
    output: Annotated[str, WithJsonSchema(_CONTENT)]

    _text = field_validator("output", mode="before")(_join)


class ReasoningItem(Item):
    """The model's reasoning, sent back: it goes before the assistant's next words, where the template has a place for it."""

    type: Literal["reasoning"]
    summary: list[dict[str, Any]] = []
    content: Annotated[str, WithJsonSchema({"type": "array"})] | None = None
    encrypted_content: str | None = None

    _text = field_validator("content", mode="before")(_join)


class ItemReference(Strict):
    """An item of a stored response."""

    type: Literal["item_reference"] = "item_reference"
    id: str


def _kind(value: Any) -> str:
    """A dict's when it is checked, a model's when it is written out again."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    reference = isinstance(value, dict) and not kind and set(value) == {"id"}
    return "item_reference" if reference else str(kind or "message")


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutput, Tag("function_call_output")]
    | Annotated[CustomCallItem, Tag("custom_tool_call")]
    | Annotated[CallOutput, Tag("custom_tool_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(
        _kind,
        custom_error_type="unknown_item",
        custom_error_message="items of this type come from tools that OpenAI's servers run; leave it out, or tell what it says in a message",
    ),
]


def _or_text(schema: dict[str, Any]) -> None:
    items = {key: schema.pop(key) for key in ("type", "items", "minItems") if key in schema}
    schema["anyOf"] = [{"type": "string", "minLength": 1}, items]


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
    tools: list[ResponseTool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    truncation: Literal["disabled", "auto"] | None = None
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

    @model_validator(mode="before")
    @classmethod
    def _known_foreign_fields(cls, raw: Any) -> Any:
        return without_foreign(raw, _IGNORED, _REFUSED)

    def chat(self, conversation: list[dict[str, Any]]) -> ChatRequest:
        """The same as a chat request with these messages after the instructions."""
        messages = ([] if self.instructions is None else [{"role": "system", "content": self.instructions}]) + conversation
        raw: dict[str, Any] = {name: getattr(self, name) for name in _PASSED_ON} | {"messages": messages}
        raw["reasoning_effort"] = self.reasoning.effort if self.reasoning is not None else None
        raw["max_completion_tokens"] = self.max_output_tokens
        if self.wants_logprobs:
            raw |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        raw["tools"] = for_chat(self.tools or [])[0] or None
        raw["tool_choice"] = self.tool_choice if isinstance(self.tool_choice, str | None) else self.tool_choice.for_chat()
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
# Settings of a service's, and hints that change no answer.
_IGNORED = ("access_programs", "client_metadata", "context_management", "prompt_cache_options")
_REFUSED = {
    "conversation": "not supported; go on from a response with previous_response_id",
    "moderation": "not supported; ask a model for it in a request of its own",
    "prompt": "not supported; send what it says as instructions and input",
}
_RENAMED = {"messages": "input", "response_format": "text.format", "max_completion_tokens": "max_output_tokens"}

# ------------------------------------------------------------------------------------------------------------ routes


class InputTokens(Shape):
    object: str
    input_tokens: int


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
        if request.background and not request.store:
            raise ApiError(400, "background: needs store, from which the answer can be had", param="background")
        previous = request.previous_response_id
        before = store.get(previous, "previous_response_id") if previous is not None else None
        if before is not None and before.response["status"] in ("queued", "in_progress"):
            raise ApiError(400, f"previous_response_id: '{previous}' is not completed yet", param="previous_response_id")
        items = _given(request, store)
        conversation = (before.messages if before else []) + messages_of(items)
        answer, params = await _answer(service, request, conversation)
        answer.begin(request.model_dump(by_alias=True))
        answer.origins = for_chat(request.tools or [])[1]
        stored = Stored(answer.response, items, [])

        def keep() -> None:
            stored.messages = conversation + messages_of(answer.response["output"])
            store.put(stored)

        if request.store:
            answer.ended = keep
        if not request.background:
            return await service.respond(http, answer, params)
        service.check_length(answer.prompts[0], params.max_tokens)
        service.gate.admit(1)
        stored.events = Events() if request.stream else None
        stored.task = asyncio.create_task(_compute(service, answer, params, stored.events))
        store.put(stored)
        if stored.events is not None:
            return _stream(stored.events, 0)
        return _json(answer.response)

    @routes.post("/input_tokens", **described(ResponsesRequest, InputTokens))
    async def count(http: Request) -> Response:
        """How many tokens a request's input is."""
        service, request = await fleet.read(http, ResponsesRequest)
        previous = request.previous_response_id
        before = store.get(previous, "previous_response_id").messages if previous is not None else []
        answer, params = await chat_answer(service, request.chat(before + messages_of(_given(request, store))), ResponseAnswer, "resp_")
        ids = answer.prompts[0].token_ids
        try:
            validate(
                ids[:1], params, service.engine.info, service.engine.tokenizer
            )  # what would be refused when it is sent; its length is the question
        except ValueError as e:
            raise ApiError.from_value_error(e) from None
        return _json({"object": "response.input_tokens", "input_tokens": len(ids)})

    @routes.get("/{response_id}", **described(answer=ResponseShape, stream="text/event-stream"))
    async def retrieve(response_id: str, stream: bool = False, starting_after: Annotated[int, Query(ge=-1)] = -1) -> Response:
        """A stored response or, if it was made in the background with stream, its events behind the one with the number `starting_after`."""
        stored = store.get(response_id)
        if not stream:
            return _json(stored.response)
        if stored.events is None:
            raise ApiError(400, "stream: only a response that was made with background and stream can be streamed again", param="stream")
        return _stream(stored.events, starting_after + 1)

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


def _given(request: ResponsesRequest, store: Store) -> list[dict[str, Any]]:
    """The request's items, those that it only refers to included."""
    items = []
    for i, item in enumerate(request.input):
        if isinstance(item, ItemReference):
            items.append(store.item(item.id, f"input.{i}"))
        else:
            items.append({"id": f"msg_{uuid.uuid4().hex}", **item.model_dump(exclude_none=True)})
    return items


async def _answer(service: Service, request: ResponsesRequest, conversation: list[dict[str, Any]]) -> tuple[ResponseAnswer, SamplingParams]:
    """The answer to be. With truncation "auto" a conversation that does not fit loses its oldest turns, as few as it must."""

    async def from_turn(first: int) -> tuple[ResponseAnswer, SamplingParams]:
        kept = [message for message in conversation[:first] if message["role"] in ("system", "developer")] + conversation[first:]
        return await chat_answer(service, request.chat(kept), ResponseAnswer, "resp_")

    turns = [0, *(i for i, message in enumerate(conversation) if i and message["role"] == "user")]
    made = await from_turn(0)
    if request.truncation != "auto" or len(turns) == 1 or _fits(service, *made):
        return made
    low, high = 1, len(turns) - 1  # the last turn stays, and if it does not fit, that is an error
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(service, *await from_turn(turns[middle])) else (middle + 1, high)
    return await from_turn(turns[low])


def _fits(service: Service, answer: ResponseAnswer, params: SamplingParams) -> bool:
    return len(answer.prompts[0].token_ids) + (params.max_tokens or 1) <= int(service.engine.info["max_model_len"])


def _stream(events: Events, first: int) -> Response:
    return StreamingResponse(events.read(first), headers={"content-type": "text/event-stream", "cache-control": "no-cache"})


async def _compute(service: Service, answer: ResponseAnswer, params: SamplingParams, events: Events | None) -> None:
    """A response that nobody waits for; somebody may follow its events."""
    told = b""
    try:
        answer.response["status"] = "in_progress"
        async with aclosing(service.items(answer, params)) as items:
            async for item in items:
                for delta in item.outputs:
                    if events is None:
                        answer.add(delta)
                    else:
                        events.add(answer.event(delta))
    except asyncio.CancelledError:
        told = b"".join(answer.close("cancelled"))
    except Exception as e:
        shown = as_api_error(e)
        if shown.status == 500:
            log.error("%s failed", answer.id, exc_info=e)
        told = answer.failure(shown)
    finally:
        if events is not None:
            events.add(told)
            events.end()


def _shown(item: dict[str, Any]) -> dict[str, Any]:
    """An input item as the API shows it: a message's text as a part."""
    if item["type"] != "message":
        return item
    kind = "output_text" if item["role"] == "assistant" else "input_text"
    part: dict[str, Any] = {"type": kind, "text": item["content"]}
    return {"status": "completed", **item, "content": [part | ({"annotations": []} if kind == "output_text" else {})]}


def _json(value: Any) -> Response:
    return Response(encode(value), media_type="application/json")
