"""SGLang's own API: generate, and what its clients ask of a server. Owns its bodies and answers; work runs as OpenAI's completions do.

A stream's events hold the whole text so far, as SGLang's do by default. What a client leaves open is the checkpoint's recommendation, as in all
our APIs, but for the length of the output, which is SGLang's.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import aclosing
from typing import Annotated, Any, Literal
from weakref import WeakSet

from fastapi import APIRouter
from pydantic import ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from miniinfer import __version__
from miniinfer.data import MAX_LOGPROBS, CompletionOutput, Logprob, SamplingParams
from miniinfer.serve.admission import caller
from miniinfer.serve.answers import Answer, Choice, Prompt, Table, encode
from miniinfer.serve.auth import Client
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.foreign import renamed
from miniinfer.serve.protocol import ApiError, CompletionRequest, Strict, TokenIds, between, checked, parse
from miniinfer.serve.schemas import Error, Shape, State, described
from miniinfer.serve.service import Service, read_body

HEALTH_SECONDS = 20.0  # for one token

# ----------------------------------------------------------------------------------------------------------- bodies

_SAME = ("n temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty"
         " stop stop_token_ids ignore_eos skip_special_tokens logit_bias").split()  # fmt: skip
_OURS = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "no_stop_trim": "include_stop_str_in_output", "sampling_seed": "seed"}
_STRUCTURED = {"json_schema": "json", "regex": "regex", "ebnf": "grammar", "structural_tag": "structural_tag"}
_NAMES = {name: f"sampling_params.{name}" for name in (*_SAME, *_STRUCTURED)} | {ours: f"sampling_params.{name}" for name, ours in _OURS.items()}
_Stop = Annotated[str, Field(min_length=1)]


class SglangSampling(Strict):
    """Sampling under SGLang's names."""

    max_new_tokens: int = Field(128, ge=1, lt=2**31)
    min_new_tokens: int | None = Field(None, ge=0, lt=2**31)
    n: int | None = between(1, 128)
    temperature: float | None = between(0, 100)
    top_p: float | None = Field(None, json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = between(0, 1)
    presence_penalty: float | None = between(-2, 2)
    frequency_penalty: float | None = between(-2, 2)
    repetition_penalty: float | None = Field(None, json_schema_extra={"exclusiveMinimum": 0, "maximum": 100})
    stop: _Stop | Annotated[list[_Stop], Field(max_length=64)] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None  # our text is the tokens' own
    no_stop_trim: bool | None = None
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = between(-(2**63), 2**63 - 1)
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None

    def completion(self) -> dict[str, Any]:
        """The same in the fields of OpenAI's completions."""
        fields = {name: getattr(self, name) for name in _SAME} | {ours: getattr(self, name) for name, ours in _OURS.items()}
        wanted = {ours: value for name, ours in _STRUCTURED.items() if (value := getattr(self, name)) is not None}
        return fields | ({"structured_outputs": wanted} if wanted else {})


class SglangRequest(Strict):
    """/generate: one prompt or several, as text or as token ids."""

    model: str | None = None
    text: str | list[str] | None = None
    input_ids: TokenIds | list[TokenIds] | None = None
    sampling_params: SglangSampling | list[SglangSampling] = Field(default_factory=lambda: SglangSampling.model_validate({}))
    rid: str | None = Field(None, max_length=256)  # what meta_info shows for the request's id
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = Field(-1, ge=-1, lt=2**31)  # the first prompt token whose log-probability is wanted; -1: none
    top_logprobs_num: int = Field(0, ge=0, le=MAX_LOGPROBS)
    return_text_in_logprobs: bool = False
    return_hidden_states: Literal[False] = False
    return_routed_experts: Literal[False] = False  # SGLang's benchmark says so

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["text"], "properties": {"text": {"type": ["string", "array"]}}},
                {"required": ["input_ids"], "properties": {"input_ids": {"type": "array"}}},
            ]
        }
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> SglangRequest:
        if (self.text is None) == (self.input_ids is None):
            raise ApiError(400, "text: give either text or input_ids", param="text")
        several = self.sampling_params
        if isinstance(several, list) and (not several or len(several) != len(self.prompts) or len({one.n or 1 for one in several}) > 1):
            raise ApiError(400, "sampling_params: a list must have one for each prompt, all with the same n", param="sampling_params")
        return self

    @property
    def batch(self) -> bool:
        """Is the answer a list."""
        given: Any = self.text if self.text is not None else self.input_ids
        return isinstance(given, list) and not (given and isinstance(given[0], int))

    @property
    def prompts(self) -> list[Any]:
        given: Any = self.text if self.text is not None else self.input_ids
        return given if self.batch else [given]

    def completion(self, service: Service) -> tuple[CompletionRequest, list[SamplingParams]]:
        """The same as a completion, which has its checks, and each prompt's parameters, or those of all."""
        several = self.sampling_params if isinstance(self.sampling_params, list) else [self.sampling_params]
        request, first = self._completion(service, self.prompts, several[0])
        return request, [first, *(self._completion(service, [[0]], sampling)[1] for sampling in several[1:])]

    def _completion(self, service: Service, prompts: list[Any], sampling: SglangSampling) -> tuple[CompletionRequest, SamplingParams]:
        try:
            request = checked(CompletionRequest, {"prompt": prompts, "stream": self.stream} | sampling.completion())
            params = request.params(service.defaults)
        except ApiError as e:
            names = _NAMES | {"prompt": "text" if self.text is not None else "input_ids", "structured_outputs": "sampling_params"}
            raise renamed(e, names) from None
        if self.return_logprob:
            params.logprobs = self.top_logprobs_num
            params.prompt_logprobs = self.top_logprobs_num if self.logprob_start_len >= 0 else None
        return request, params


class AbortRequest(Strict):
    """/abort_request: the `rid` that /generate was given."""

    rid: str = Field(min_length=1, max_length=256)


# ---------------------------------------------------------------------------------------------------------- answers


class SglangAnswer(Answer):
    """What became of each prompt; in a stream, of one with every event."""

    asked: SglangRequest  # set by the route, as are the other two
    service: Service
    client: Client | None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._start = time.monotonic()

    def event(self, delta: CompletionOutput) -> bytes:
        self.add(delta)
        if not (delta.token_ids or delta.finish_reason):
            return b""
        shown = self._one(delta.index)
        return b"data: " + encode(shown | ({"index": delta.index} if len(self.choices) > 1 else {})) + b"\n\n"

    def result(self) -> bytes:
        shown = [self._one(i) for i in range(len(self.choices))]
        return encode(shown if self.asked.batch or len(shown) > 1 else shown[0])

    def _one(self, index: int) -> dict[str, Any]:
        choice, prompt = self.choices[index], self.prompts[index // self.n]
        meta: dict[str, Any] = {
            "id": self.asked.rid or self.id,
            "finish_reason": _reason(choice),
            "prompt_tokens": len(prompt.token_ids),
            "completion_tokens": len(choice.token_ids),
            "cached_tokens": prompt.cached_tokens,
        }
        if choice.finish_reason is not None:
            meta["e2e_latency"] = time.monotonic() - self._start
        if self.asked.return_logprob:
            meta |= self._scores(choice, prompt)
        return {"text": "".join(choice.text), "output_ids": choice.token_ids, "meta_info": meta}

    def _scores(self, choice: Choice, prompt: Prompt) -> dict[str, Any]:
        start = self.asked.logprob_start_len
        wanted = prompt.logprobs is not None and start >= 0
        sides: dict[str, list[tuple[int, Table | None]]] = {
            "input": list(zip(prompt.token_ids, prompt.logprobs or (), strict=True))[start:] if wanted else [],
            "output": list(zip(choice.token_ids, choice.logprobs or (), strict=True)),
        }
        shown: dict[str, Any] = {}
        for side, entries in sides.items():
            shown[f"{side}_token_logprobs"] = [self._entry(token, table[token] if table else None) for token, table in entries]
            if top := self.asked.top_logprobs_num:
                shown[f"{side}_top_logprobs"] = [
                    table and [self._entry(*best) for best in sorted(table.items(), key=lambda entry: -entry[1].logprob)[:top]]
                    for _, table in entries
                ]
        return shown

    def _entry(self, token: int, value: Logprob | None) -> list[Any]:
        text = self._text(token) if self.asked.return_text_in_logprobs else None
        return [None if value is None else max(value.logprob, -9999.0), token, text]  # JSON has no infinity


def _reason(choice: Choice) -> dict[str, Any] | None:
    if choice.finish_reason is None:
        return None
    if choice.finish_reason == "length":
        return {"type": "length", "length": len(choice.token_ids)}
    if choice.finish_reason == "abort":
        return {"type": "abort", "message": "aborted by /abort_request"}
    return {"type": choice.finish_reason, "matched": choice.stop_reason if choice.stop_reason is not None else choice.token_ids[-1]}


# ----------------------------------------------------------------------------------------------------------- routes


class MetaInfo(Shape):
    id: str
    finish_reason: dict[str, Any] | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Generated(Shape):
    text: str
    output_ids: list[int]
    meta_info: MetaInfo


class ModelInfo(Shape):
    model_path: str
    is_generation: bool


class ServerInfo(Shape):
    model_path: str
    version: str


def router(fleet: Fleet) -> APIRouter:
    """The routes, at the root as SGLang has them."""
    routes = APIRouter()
    named: WeakSet[SglangAnswer] = WeakSet()  # those with an rid, for as long as somebody works on them

    @routes.post("/generate", **described(SglangRequest, Generated | list[Generated], stream="text/event-stream"))
    async def generate(http: Request) -> Response:
        service, asked = await fleet.read(http, SglangRequest)
        request, params = asked.completion(service)
        prompts = [await _prompt(service, given) for given in asked.prompts]
        for prompt, own in zip(prompts, params, strict=len(params) > 1):
            prompt.params = own
        answer = _answer(service, request, params[0], prompts)
        answer.asked, answer.service, answer.client = asked, service, caller.get().client
        if asked.rid:
            named.add(answer)
        return await service.respond(http, answer, params[0])

    @routes.post("/abort_request", **described(AbortRequest, answer=str, media="text/plain"))
    async def abort_request(http: Request) -> Response:
        """Ends the client's own requests of this rid, which answer with what they have; it is no error if there are none."""
        asked = parse(AbortRequest, await read_body(http, fleet.config.max_body_mib))
        for answer in [one for one in named if one.asked.rid == asked.rid and one.client is caller.get().client]:
            answer.service.abort(answer)
        return Response(media_type="text/plain")

    @routes.get("/model_info", **described(answer=ModelInfo))
    @routes.get("/get_model_info", **described(answer=ModelInfo))
    async def model_info(model: str | None = None) -> Response:
        service = await fleet.service(model)
        return JSONResponse({**_about(service), "is_generation": True, "preferred_sampling_params": None})

    @routes.get("/server_info", **described(answer=ServerInfo))
    @routes.get("/get_server_info", **described(answer=ServerInfo))
    async def server_info(model: str | None = None) -> Response:
        service = await fleet.service(model)
        info = service.engine.info
        facts = {name: info[name] for name in ("max_model_len", "max_num_seqs", "vocab_size", "dtype", "device", "page_size") if name in info}
        state = {**service.engine.stats, "unfinished": service.unfinished}
        return JSONResponse({**_about(service), "version": __version__, **facts, "internal_states": [state]})

    @routes.get("/health_generate", **described(answer=State, error=State | Error))
    async def health_generate(model: str | None = None) -> Response:
        """Does the engine make a token, in reasonable time."""
        service = await fleet.service(model)
        params = SamplingParams(max_tokens=1, temperature=0)
        request = checked(CompletionRequest, {"prompt": [[0]]})
        try:
            async with asyncio.timeout(HEALTH_SECONDS), aclosing(service.items(_answer(service, request, params, [Prompt([0])]), params)) as items:
                async for _ in items:
                    pass
        except TimeoutError:
            return JSONResponse({"status": "no token came"}, 503)
        return JSONResponse({"status": "ok"})

    @routes.get("/flush_cache", **described(answer=str, media="text/plain"))
    @routes.post("/flush_cache", **described(answer=str, media="text/plain"))
    async def flush_cache(model: str | None = None) -> Response:
        """Forgets all cached prefixes that no request is using."""
        await (await fleet.service(model)).control("reset_prefix_cache")
        return Response("Cache flushed.\n", media_type="text/plain")

    return routes


def _about(service: Service) -> dict[str, Any]:
    return {"model_path": service.model, "tokenizer_path": service.model}


def _answer(service: Service, request: CompletionRequest, params: SamplingParams, prompts: list[Prompt]) -> SglangAnswer:
    return SglangAnswer(uuid.uuid4().hex, service.model, request, prompts, params.n, service.engine.tokenizer)


async def _prompt(service: Service, given: str | list[int]) -> Prompt:
    return Prompt(await service.encode(given, True, "text"), given) if isinstance(given, str) else Prompt(given)
