"""/v1/embeddings: vectors from a decoder's final hidden states. Owns body, answer and route; pooling is the engine's."""

from __future__ import annotations

import base64
import sys
import uuid
from array import array
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter
from pydantic import Field, WithJsonSchema, field_validator
from starlette.requests import Request
from starlette.responses import Response

from miniinfer.data import RequestOutput, SamplingParams
from miniinfer.engine.output import unit
from miniinfer.serve.answers import Answer, Prompt, encode
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.foreign import renamed
from miniinfer.serve.protocol import PROMPT_SCHEMA, ApiError, Truncation, list_of_prompts
from miniinfer.serve.schemas import Shape, described


class EmbeddingRequest(Truncation):
    """Texts or token ids to embed. `pooling`: the last token's state, or the mean over all."""

    model: str | None = None
    input: Annotated[list[str] | list[list[int]], WithJsonSchema(PROMPT_SCHEMA)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=2**31 - 1)
    user: str | None = None  # accepted and ignored
    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True
    add_special_tokens: bool = True
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    cache_salt: str = Field("", max_length=256)

    _prompts = field_validator("input", mode="plain")(list_of_prompts)

    @property
    def stream(self) -> bool:
        return False

    @property
    def include_usage(self) -> bool:
        return False


class Embedding(Shape):
    object: str
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Shape):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Shape):
    id: str
    object: str
    created: int
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class EmbeddingAnswer(Answer):
    """The vectors of all prompts, encoded as they come."""

    request: EmbeddingRequest  # type: ignore[assignment]  # has what the engine's side asks of a request

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.pooling = self.request.pooling
        self._vectors = [msgspec.Raw(b"null") for _ in self.prompts]

    def note(self, index: int, item: RequestOutput) -> None:
        super().note(index, item)
        if item.embedding is None:
            return
        wanted, size = self.request.dimensions, len(item.embedding)
        if wanted is not None and wanted > size:
            raise ApiError(400, f"dimensions: the model's embeddings have {size}, got {wanted}", param="dimensions")
        vector = unit(item.embedding, wanted, self.request.normalize)
        self._vectors[index] = msgspec.Raw(encode(vector if self.request.encoding_format == "float" else _base64(vector)))

    def result(self) -> bytes:
        data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(self._vectors)]
        usage = self.usage()
        counts = {key: usage[key] for key in ("prompt_tokens", "total_tokens", "prompt_tokens_details")}
        return encode(self._about | {"object": "list", "data": data, "usage": counts})


def _base64(vector: list[float]) -> str:
    """32-bit floats, little-endian, as OpenAI's clients read them."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


def router(fleet: Fleet) -> APIRouter:
    """The one route."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/embeddings", **described(EmbeddingRequest, EmbeddingList))
    async def embeddings(http: Request) -> Response:
        service, request = await fleet.read(http, EmbeddingRequest)
        params, prompts = SamplingParams(max_tokens=1), []
        for given in request.input:
            ids = await service.encode(given, request.add_special_tokens, "input") if isinstance(given, str) else given
            prompts.append(Prompt(service.truncated(ids, request, 0)))
        answer = EmbeddingAnswer(f"embd-{uuid.uuid4().hex}", service.model, request, prompts, 1, service.engine.tokenizer)
        try:
            return await service.respond(http, answer, params)
        except ApiError as e:
            raise renamed(e, {"prompt": "input"}) from None

    return routes
