"""/tokenize, /detokenize and /tokenizer_info, in vLLM's shapes: what a text or a conversation is in tokens, and back. Owns bodies and routes."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from pydantic import ConfigDict, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from miniinfer.serve.fleet import Fleet
from miniinfer.serve.protocol import ApiError, Message, RequestTemplate, Strict, TemplateVariables, TokenIds, Tools
from miniinfer.serve.schemas import Shape, described

SHORT = 4096  # tokens; decoding more is worth a thread


class TokenizeRequest(Strict):
    """A text (`prompt`) or a conversation (`messages`), and how it is written."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None  # by default a text gets them; a conversation has them from its template
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Tools | None = None
    chat_template: RequestTemplate | None = None
    chat_template_kwargs: TemplateVariables | None = None

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
            ]
        }
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "prompt: give either prompt (a text) or messages (a conversation)", param="prompt")
        return self


class DetokenizeRequest(Strict):
    """Token ids, to be a text."""

    model: str | None = None
    tokens: TokenIds


class Tokenized(Shape):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokenizerInfo(Shape):
    eos_token: str | None
    bos_token: str | None
    chat_template: str | None
    model_max_length: int


class Detokenized(Shape):
    prompt: str


def router(fleet: Fleet) -> APIRouter:
    """The routes, at the root as vLLM has them."""
    routes = APIRouter()

    @routes.post("/tokenize", **described(TokenizeRequest, Tokenized))
    async def tokenize(http: Request) -> Response:
        service, request = await fleet.read(http, TokenizeRequest)
        if request.prompt is not None:
            ids = await service.encode(request.prompt, request.add_special_tokens is not False, "prompt")
        else:
            prompt = await service.chat_prompt(
                [message.for_template() for message in request.messages],
                request.tools,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                add_special_tokens=bool(request.add_special_tokens),
                template_kwargs=request.chat_template_kwargs,
                chat_template=request.chat_template,
            )
            ids = prompt.token_ids
        tokenizer = service.engine.tokenizer
        texts = [tokenizer.spelling(i) for i in ids] if tokenizer is not None and request.return_token_strs else None
        return JSONResponse({"count": len(ids), "max_model_len": service.engine.info["max_model_len"], "tokens": ids, "token_strs": texts})

    @routes.post("/detokenize", **described(DetokenizeRequest, Detokenized))
    async def detokenize(http: Request) -> Response:
        service, request = await fleet.read(http, DetokenizeRequest)
        tokenizer, vocabulary = service.engine.tokenizer, service.engine.info["vocab_size"]
        if tokenizer is None:
            raise ApiError(400, "tokens: the server runs without a tokenizer", param="tokens")
        if bad := next((t for t in request.tokens if not 0 <= t < vocabulary), None):
            raise ApiError(400, f"tokens: token id {bad} is outside the vocabulary of {vocabulary}", param="tokens")
        if len(request.tokens) <= SHORT:
            text = tokenizer.decode(request.tokens, skip_special_tokens=False)
        else:
            text = await asyncio.to_thread(tokenizer.decode, request.tokens, False)
        return JSONResponse({"prompt": text})

    @routes.get("/tokenizer_info", **described(answer=TokenizerInfo))
    async def info(model: str | None = None) -> Response:
        """Its special tokens by their roles and its chat template, for clients that put prompts together themselves."""
        service = await fleet.service(model)
        tokenizer = service.engine.tokenizer
        if tokenizer is None:
            raise ApiError(404, "the server runs without a tokenizer")
        template = tokenizer.chat_templates.get("default")
        about = {"chat_template": template.text if template else None, "model_max_length": service.engine.info["max_model_len"]}
        return JSONResponse({"eos_token": None, "bos_token": None, **tokenizer.special_tokens, **about})

    return routes
