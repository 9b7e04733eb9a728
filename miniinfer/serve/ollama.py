"""Ollama's API: chat, generate and embed. Owns their bodies and answers (lines of JSON); what clients ask about models is ollama_models.py's, the
life of a request service.py's.

Options of llama.cpp's loading (num_ctx, num_gpu and their like) are taken and ignored: the server was started with its own. Samplers that we do
not have are refused unless they are off. A model's name may end in ":latest".
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter
from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from miniinfer.data import MAX_LOGPROBS, CompletionOutput, RequestOutput, SamplingParams
from miniinfer.serve.answers import Prompt, encode
from miniinfer.serve.embeddings import EmbeddingAnswer, EmbeddingRequest
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.foreign import ForeignAnswer, Part, chat_request, prepare, thinking_variables
from miniinfer.serve.ollama_models import Name, add_routes, now, read, shapes
from miniinfer.serve.openai import infilled
from miniinfer.serve.parsers import whole_arguments
from miniinfer.serve.protocol import ApiError, ChatRequest, Strict, TokenIds, Tools, between, checked
from miniinfer.serve.schemas import Shape
from miniinfer.serve.service import Service

_LINES = "application/x-ndjson"

E = TypeVar("E", bound=EmbeddingAnswer)


class OllamaError(ApiError):
    """An error in Ollama's shape."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status, error.message, param=error.param, code=error.code, headers=error.headers)

    def body(self) -> bytes:
        return encode({"error": self.message})


# ----------------------------------------------------------------------------------------------------------- bodies

_OURS = {
    "repeat_penalty": "repetition_penalty",
    **{f: f for f in ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")},
}
_NAMES = {ours: f"options.{name}" for name, ours in _OURS.items()} | {"max_tokens": "options.num_predict", "response_format": "format"}
_OFF = {"mirostat": 0, "tfs_z": 1.0, "typical_p": 1.0}  # samplers that we do not have, and how they are switched off
_PENALTIES = between(-2, 2)


class Options(Strict):
    """Sampling under Ollama's names; after it what is ignored, or may only be off."""

    temperature: float | None = between(0, 100)
    num_predict: int | None = Field(None, lt=2**31)  # not positive: as much as the context holds
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    top_p: float | None = Field(None, json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})
    min_p: float | None = between(0, 1)
    seed: int | None = between(-(2**63), 2**63 - 1)
    stop: list[Annotated[str, Field(min_length=1)]] | None = Field(None, max_length=64)
    repeat_penalty: float | None = Field(None, json_schema_extra={"exclusiveMinimum": 0, "maximum": 100})
    presence_penalty: float | None = _PENALTIES
    frequency_penalty: float | None = _PENALTIES
    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    num_keep: int | None = None
    repeat_last_n: int | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    logits_all: bool | None = None
    vocab_only: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    embedding_only: bool | None = None
    penalize_newline: bool | None = None
    mirostat: Literal[0] | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    tfs_z: float | None = Field(None, ge=1, le=1)
    typical_p: float | None = Field(None, ge=1, le=1)

    @model_validator(mode="before")
    @classmethod
    def _only_off(cls, raw: Any) -> Any:
        for name, off in _OFF.items() if isinstance(raw, dict) else ():
            if raw.get(name) not in (None, off):
                raise ApiError(400, f"options.{name}: not supported, only {off}, which is off", param=f"options.{name}")
        return raw


class Asked(Strict):
    """What chat and generate share."""

    model: Name
    stream: bool = True
    options: Options = Field(default_factory=lambda: Options.model_validate({}))
    format: Literal["", "json"] | dict[str, Any] = ""
    keep_alive: float | str | None = None  # the model stays anyway
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def chat(self, service: Service, messages: list[dict[str, Any]], **more: Any) -> ChatRequest:
        """The same in OpenAI's fields."""
        given = self.options
        fields = {ours: getattr(given, name) for name, ours in _OURS.items()}
        limit = given.num_predict if given.num_predict is not None and given.num_predict > 0 else None
        fields |= {"model": self.model, "stream": self.stream, "messages": messages, "max_tokens": limit, **more}
        fields |= {"logprobs": self.logprobs, "top_logprobs": self.top_logprobs if self.logprobs else None}
        if self.format == "json":
            fields["response_format"] = {"type": "json_object"}
        elif self.format:
            fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": self.format}}
        effort = self.think if isinstance(self.think, str) else None
        variables = thinking_variables(service, None if self.think is None else self.think is not False, effort)
        if self.think and not variables:
            raise ApiError(400, f"think: {service.model!r} does not support thinking", param="think")
        return chat_request(fields | {"chat_template_kwargs": variables}, _NAMES)


class CalledFunction(Strict):
    """What a call calls."""

    name: str
    arguments: dict[str, Any]
    index: int | None = None
    description: str | None = None


class Called(Strict):
    """A call that the model made."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None


class OllamaMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    images: list[str] | None = Field(None, max_length=0)
    tool_calls: list[Called] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    def for_chat(self, index: int) -> dict[str, Any]:
        """As OpenAI's API has it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id or f"call_{index}_{i}", "type": "function"}
                | {"function": {"name": call.function.name, "arguments": encode(call.function.arguments).decode()}}
                for i, call in enumerate(self.tool_calls)
            ]
        if self.role == "tool":
            message |= {"name": self.tool_name, "tool_call_id": self.tool_call_id}
        return message


class OllamaChatRequest(Asked):
    """/api/chat. Without messages it loads the model, that is, does nothing."""

    messages: list[OllamaMessage] = []
    tools: Tools | None = None


class GenerateRequest(Asked):
    """/api/generate. Without a prompt it loads the model, that is, does nothing."""

    prompt: str = ""
    system: str = ""
    raw: bool = False
    context: TokenIds | None = None
    suffix: str = ""  # the text after the one that is wanted, where the tokenizer has tokens for that
    template: str | None = Field(None, max_length=0)
    images: list[str] | None = Field(None, max_length=0)


class EmbedRequest(Strict):
    """/api/embed."""

    model: Name
    input: Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    truncate: bool = True  # what does not fit into the context is left out; false: it is an error
    dimensions: int | None = Field(None, ge=1, lt=2**31)
    options: Options | None = None  # nothing in them concerns embeddings
    keep_alive: float | str | None = None


class OldEmbedRequest(Strict):
    """/api/embeddings, as older clients know it: one text, and its vector as it is."""

    model: Name
    prompt: str
    truncate: bool = True
    options: Options | None = None
    keep_alive: float | str | None = None


# ---------------------------------------------------------------------------------------------------------- answers


class OllamaAnswer(ForeignAnswer):
    """Lines of JSON, the last of which has the figures; or one object with everything."""

    stream_type = _LINES
    arrived = 0  # set by the route, in nanoseconds

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._created = self._begun = self._first = self._last = time.monotonic_ns()
        self._call: Part | None = None  # whose arguments are still coming
        self._calls = 0
        self._ended: str | None = None

    def note(self, index: int, item: RequestOutput) -> None:
        super().note(index, item)
        self._last = time.monotonic_ns()
        if item.admission is not None:
            self._begun = self._created + int(item.admission.queued * 1e9)
        if self._first == self._created:
            self._first = self._last

    def event(self, delta: CompletionOutput) -> bytes:
        said = self._said(self.parts(delta), delta.finish_reason is not None)
        if delta.logprobs:
            said["logprobs"] = self._logprobs(delta.token_ids, delta.logprobs)["content"]
        self._ended = delta.finish_reason
        return self._line(said) if said else b""

    def end(self) -> bytes:
        return self._line({}, self._figures(self._ended))

    def failure(self, error: ApiError) -> bytes:
        return OllamaError(error).body() + b"\n"

    def result(self) -> bytes:
        (choice,) = self.choices
        said = self._said(self.whole(choice), True)
        if choice.logprobs is not None:
            said["logprobs"] = self._logprobs(choice.token_ids, choice.logprobs)["content"]
        return self._line(said, self._figures(choice.finish_reason))[:-1]

    def _said(self, parts: list[Part], finished: bool) -> dict[str, Any]:
        """Text, thinking and calls by their names; a call when all of its arguments are there. One that is cut off is text: here, calls are whole."""
        said: dict[str, Any] = {}
        calls = []
        for part in [*parts, *([Part("end")] if finished else [])]:
            if part.kind == "arguments":
                assert self._call is not None
                self._call.text += part.text
                continue
            if self._call is not None:
                arguments = whole_arguments(self._call.text)
                if arguments is None:
                    said["text"] = said.get("text", "") + f'{{"name": "{self._call.name}", "arguments": {self._call.text}'
                else:
                    calls.append({"id": self._call.id, "function": {"index": self._calls, "name": self._call.name, "arguments": arguments}})
                    self._calls += 1
                self._call = None
            if part.kind == "call":
                self._call = part
            elif part.kind != "end":
                said[part.kind] = said.get(part.kind, "") + part.text
        return said | ({"tool_calls": calls} if calls else {})

    def _figures(self, reason: str | None) -> dict[str, Any]:
        """Loading is what comes before the model works on the prompt: reading the request, and the queue."""
        first = max(self._first, self._begun)
        return {
            "done_reason": "length" if reason == "length" else "stop",
            "total_duration": time.monotonic_ns() - (self.arrived or self._created),
            "load_duration": self._begun - (self.arrived or self._created),
            "prompt_eval_count": self.prompt_tokens,
            "prompt_eval_duration": first - self._begun,
            "eval_count": self.completion_tokens,
            "eval_duration": max(self._last - first, 0),
        }

    def _line(self, said: dict[str, Any], figures: dict[str, Any] | None = None) -> bytes:
        shown = {"model": self._about["model"], "created_at": now()} | self._content(said)
        shown |= {"logprobs": said["logprobs"]} if "logprobs" in said else {}
        return encode(shown | {"done": figures is not None} | (figures or {})) + b"\n"

    def _content(self, said: dict[str, Any]) -> dict[str, Any]:
        """What was said, under the endpoint's names."""
        raise NotImplementedError


class OllamaChatAnswer(OllamaAnswer):
    """/api/chat."""

    def _content(self, said: dict[str, Any]) -> dict[str, Any]:
        more = {name: said[name] for name in ("thinking", "tool_calls") if name in said}
        return {"message": {"role": "assistant", "content": said.get("text", "")} | more}


class GenerateAnswer(OllamaAnswer):
    """/api/generate. Its last line has the conversation's tokens, for the next request's `context`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._ids: list[int] = []

    def note(self, index: int, item: RequestOutput) -> None:
        super().note(index, item)
        for delta in item.outputs:
            self._ids += delta.token_ids

    def _figures(self, reason: str | None) -> dict[str, Any]:
        return super()._figures(reason) | {"context": self.prompts[0].token_ids + self._ids}

    def _content(self, said: dict[str, Any]) -> dict[str, Any]:
        return {"response": said.get("text", "")} | ({"thinking": said["thinking"]} if "thinking" in said else {})


class OldEmbedAnswer(EmbeddingAnswer):
    """/api/embeddings."""

    def result(self) -> bytes:
        return encode({"embedding": self._vectors[0]})


class EmbedAnswer(EmbeddingAnswer):
    """/api/embed."""

    arrived = 0  # set by the route, in nanoseconds

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.made = time.monotonic_ns()

    def result(self) -> bytes:
        began = self.arrived
        figures = {
            "total_duration": time.monotonic_ns() - began,
            "load_duration": self.made - began,
            "prompt_eval_count": sum(len(p.token_ids) for p in self.prompts),
        }
        return encode({"model": self._about["model"], "embeddings": self._vectors} | figures)


# ----------------------------------------------------------------------------------------------------------- routes


class Figures(Shape):
    model: str
    created_at: str
    done: bool
    done_reason: str


class OllamaChatShape(Figures):
    message: dict[str, Any]


class GenerateShape(Figures):
    response: str


class OldEmbedded(Shape):
    embedding: list[float]


class Embedded(Shape):
    model: str
    embeddings: list[list[float]]


def router(fleet: Fleet) -> APIRouter:
    """The routes below /api."""
    routes = APIRouter(prefix="/api")

    @routes.post("/chat", **shapes(OllamaChatRequest, OllamaChatShape, _LINES))
    async def chat(http: Request) -> Response:
        arrived, (service, request) = time.monotonic_ns(), await read(fleet, http, OllamaChatRequest)
        if not request.messages:
            return await _loaded(fleet, request, message={"role": "assistant", "content": ""})
        messages = [message.for_chat(i) for i, message in enumerate(request.messages)]
        answer, params = await prepare(service, request.chat(service, messages, tools=request.tools or None), OllamaChatAnswer, "chat-", _NAMES)
        answer.arrived = arrived
        return await service.respond(http, answer, params)

    @routes.post("/generate", **shapes(GenerateRequest, GenerateShape, _LINES))
    async def generate(http: Request) -> Response:
        arrived, (service, request) = time.monotonic_ns(), await read(fleet, http, GenerateRequest)
        if not request.prompt:
            return await _loaded(fleet, request, response="")
        answer, params = await _generation(service, request)
        answer.arrived = arrived
        return await service.respond(http, answer, params)

    @routes.post("/embed", **shapes(EmbedRequest, Embedded))
    async def embed(http: Request) -> Response:
        arrived, (service, request) = time.monotonic_ns(), await read(fleet, http, EmbedRequest)
        texts = [request.input] if isinstance(request.input, str) else request.input
        answer = await _embedding(service, EmbedAnswer, texts, request.truncate, dimensions=request.dimensions)
        answer.arrived = arrived
        return await service.respond(http, answer, SamplingParams(max_tokens=1))

    @routes.post("/embeddings", **shapes(OldEmbedRequest, OldEmbedded))
    async def embeddings(http: Request) -> Response:
        service, request = await read(fleet, http, OldEmbedRequest)
        if not request.prompt:
            return JSONResponse({"embedding": []})
        answer = await _embedding(service, OldEmbedAnswer, [request.prompt], request.truncate, normalize=False)
        return await service.respond(http, answer, SamplingParams(max_tokens=1))

    add_routes(routes, fleet)
    return routes


async def _embedding(service: Service, kind: type[E], texts: list[str], truncate: bool, **settings: Any) -> E:
    prompts = [Prompt(await service.encode(text, True, "input")) for text in texts]
    if truncate:
        for prompt in prompts:
            del prompt.token_ids[service.engine.info["max_model_len"] :]
    asked = checked(EmbeddingRequest, {"input": texts, **settings})
    return kind(f"embed-{uuid.uuid4().hex}", service.model, asked, prompts, 1, service.engine.tokenizer)


async def _generation(service: Service, request: GenerateRequest) -> tuple[GenerateAnswer, SamplingParams]:
    """A prompt in the chat template, or as it is if it is raw, or with a gap after it if there is a suffix."""
    messages = [{"role": "system", "content": request.system}] if request.system else []
    chat = request.chat(service, [*messages, {"role": "user", "content": request.prompt}])
    if request.raw or request.suffix:
        ids = service.encode(request.prompt, True, "prompt") if not request.suffix else infilled(service, request.prompt, request.suffix, True)
        params, prompt = chat.params(service.defaults), Prompt(await ids, request.prompt)
        answer = GenerateAnswer(f"generate-{uuid.uuid4().hex}", service.model, chat, [prompt], 1, service.engine.tokenizer)
    else:
        answer, params = await prepare(service, chat, GenerateAnswer, "generate-", _NAMES)
    answer.prompts[0].token_ids = (request.context or []) + answer.prompts[0].token_ids
    return answer, params


async def _loaded(fleet: Fleet, request: Asked, **empty: Any) -> Response:
    """What a request for nothing does: it loads the model or, if it is not to be kept, unloads it; a server's only model stays."""
    member, reason = fleet.find(request.model), "unload" if request.keep_alive in (0, "0") else "load"
    if fleet.changes:
        await (fleet.load if reason == "load" else fleet.unload)(member)
    return JSONResponse({"model": member.name, "created_at": now(), **empty, "done": True, "done_reason": reason})
