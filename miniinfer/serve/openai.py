"""OpenAI's API: chat completions and completions. Owns the routes; the life of a request is service.py's, bodies are protocol.py's."""

from __future__ import annotations

import uuid
from typing import TypeVar

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from miniinfer.data import SamplingParams
from miniinfer.serve.answers import ChatAnswer, CompletionAnswer, Prompt
from miniinfer.serve.beams import beam_answer
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.infill import infill_ids
from miniinfer.serve.parsers import Formats
from miniinfer.serve.protocol import ApiError, ChatRequest, CompletionRequest
from miniinfer.serve.schemas import ChatCompletion, Completion, described
from miniinfer.serve.service import Service
from miniinfer.serve.tools_grammar import constraint

A = TypeVar("A", bound=ChatAnswer)


async def chat_answer(service: Service, request: ChatRequest, kind: type[A], prefix: str) -> tuple[A, SamplingParams]:
    """What a conversation needs to run, in whichever API's shape its answer will be: `kind` and its id's `prefix` say so."""
    params = request.params(service.defaults)
    prompt = await service.chat_prompt(
        [message.for_template() for message in request.messages],
        request.offered_tools,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        add_special_tokens=bool(request.add_special_tokens),
        template_kwargs=request.template_variables,
        chat_template=request.chat_template,
    )
    if request.skip_special_tokens is None and prompt.formats is not None and prompt.formats.special_tokens:
        params = msgspec.structs.replace(params, skip_special_tokens=False)
    try:
        formats = prompt.formats or Formats(None, None)
        budget = _budget(service, request, params.max_tokens, formats)
        given = params.structured_outputs, request.offered_tools or [], request.tool_choice, request.parallel_tool_calls
        wanted = constraint(*given, formats, prompt.text or "", budget)
    except ValueError as e:
        raise ApiError.from_value_error(e) from None
    if wanted is not params.structured_outputs:
        params = msgspec.structs.replace(params, structured_outputs=wanted)
    prompt.token_ids = service.truncated(prompt.token_ids, request, params.max_tokens)
    answer = kind(prefix + uuid.uuid4().hex, service.model, request, [prompt], params.n, service.engine.tokenizer)
    return answer, params


def _budget(service: Service, request: ChatRequest, limit: int | None, formats: Formats) -> int | None:
    """The most tokens of reasoning, if that is less than all. ValueError if reasoning cannot be ended here."""
    budget = request.thinking_token_budget
    if budget is None or budget < 0:
        return None
    if formats.reasoning is None or formats.reasoning.ids(service.engine.tokenizer) is None:
        name = formats.reasoning.name if formats.reasoning else "none"
        raise ValueError(f"thinking_token_budget: the model's reasoning (reasoning_parser: {name}) is not between two tokens of its own")
    return None if limit is not None and budget >= limit else budget


async def infilled(service: Service, prompt: str, suffix: str, add_special_tokens: bool) -> list[int]:
    """The tokens of a prompt with a gap behind it, after those that begin any text."""
    begin = await service.encode("", add_special_tokens, "prompt")
    parts = [await service.encode(prompt, False, "prompt"), await service.encode(suffix, False, "suffix")]
    try:
        return begin + infill_ids(service.engine.tokenizer, *parts)
    except ValueError as e:
        raise ApiError.from_value_error(e) from None


def router(fleet: Fleet) -> APIRouter:
    """The routes below /v1."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/chat/completions", **described(ChatRequest, ChatCompletion, stream="text/event-stream"))
    async def chat(http: Request) -> Response:
        service, request = await fleet.read(http, ChatRequest)
        answer, params = await chat_answer(service, request, ChatAnswer, "chatcmpl-")
        if answer.request.use_beam_search:
            return await service.reply(http, beam_answer(service, answer, params), answer.id)
        return await service.respond(http, answer, params)

    @routes.post("/completions", **described(CompletionRequest, Completion, stream="text/event-stream"))
    async def completions(http: Request) -> Response:
        service, request = await fleet.read(http, CompletionRequest)
        params = request.params(service.defaults)
        prompts = []
        for given in request.prompt:
            if isinstance(given, str) and request.suffix:
                prompts.append(Prompt(await infilled(service, given, request.suffix, request.add_special_tokens is not False), given))
            elif isinstance(given, str):
                prompts.append(Prompt(await service.encode(given, request.add_special_tokens is not False, "prompt"), given))
            else:
                prompts.append(Prompt(given))
        for prompt in prompts:
            kept = service.truncated(prompt.token_ids, request, params.max_tokens)
            if len(kept) < len(prompt.token_ids):
                prompt.token_ids, prompt.text = kept, None
        answer = CompletionAnswer(f"cmpl-{uuid.uuid4().hex}", service.model, request, prompts, params.n, service.engine.tokenizer)
        if request.use_beam_search:
            return await service.reply(http, beam_answer(service, answer, params), answer.id)
        return await service.respond(http, answer, params)

    return routes
