"""The description of the HTTP API, /openapi.json: what each route takes and answers, built from the pydantic models that check the bodies.

Owns the document's assembly, and the shapes of answers that several APIs share. Routes read their bodies themselves, so a route says with
`described(...)` what FastAPI cannot see: `@routes.post("/v1/x", **described(Request, Answer))`.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, TypeAdapter

from miniinfer import __version__
from miniinfer.serve.admission import is_open

_REFERENCES = "#/components/schemas/{model}"
_TOKEN = "x-token-id"  # marks a schema of token ids until the vocabulary is known


class Shape(BaseModel):
    """What an answer holds; clients must bear fields that they do not know. For the description only: answers are not built from it."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class ErrorDetail(Shape):
    message: str
    type: str
    param: str | None
    code: str | int | None


class Error(Shape):
    """What went wrong, in OpenAI's shape."""

    error: ErrorDetail


# One server-sent event, which is how tools read a schema of this content type.
_EVENT: dict[str, Any] = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}, "event": {"type": "string"}}}
TOKEN_ID: dict[str, Any] = {"type": "integer", "minimum": 0, _TOKEN: True}


def described(
    body: Any = None,
    answer: Any = None,
    *,
    stream: str | None = None,
    media: str = "application/json",
    taken: str = "application/json",
    error: Any = Error,
) -> dict[str, Any]:
    """Keyword arguments of a FastAPI route: the model of its body and of its answer (pydantic models, or other types that pydantic knows).

    `stream`: the content type that it may answer with instead; `media` and `taken`: the content types of answer and body."""
    content: dict[str, Any] = {media: {"schema": _schema(answer, "serialization") if answer is not None else {}}}
    if stream is not None:
        content[stream] = {"schema": _EVENT if stream == "text/event-stream" else {"description": "JSON, one object a line"}}
    failed = {"content": {"application/json": {"schema": _schema(error, "serialization")}}}
    extra: dict[str, Any] = {
        "responses": {
            "200": {"description": "Success", "content": content},
            "4XX": {"description": "The request is at fault", **failed},
            "5XX": {"description": "The server is at fault, or takes no work", **failed},
        }
    }
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {taken: {"schema": _schema(body, "validation")}}}
    return {"openapi_extra": extra}


def _schema(kind: Any, mode: Any) -> dict[str, Any]:
    return TypeAdapter(kind).json_schema(ref_template=_REFERENCES, mode=mode)


def openapi(app: FastAPI, vocab_size: int | None, key_needed: bool, root_path: str = "") -> dict[str, Any]:
    """The document. `key_needed`: every route but those on the server's state asks for an API key; `root_path`: what clients put before the paths."""
    document = get_openapi(
        title="MiniInfer", version=__version__, summary="An inference server for large language models", openapi_version="3.1.0", routes=app.routes
    )
    if root_path:
        document["servers"] = [{"url": root_path}]
    components: dict[str, Any] = {}
    own = _schema(Error, "serialization")
    for path in document["paths"].values():
        for operation in path.values():
            responses = operation["responses"]
            responses.pop("422", None)  # ours is 400, like every bad field's
            for range in ("4XX", "5XX"):
                responses.setdefault(range, {"description": "Error", "content": {"application/json": {"schema": own}}})
            if len(content := responses["200"]["content"]) > 1 and not content.get("application/json", {}).get("schema", True):
                del content["application/json"]  # FastAPI's guess
            for content in _contents(operation):
                for medium in content.values():
                    medium["schema"] = _hoist(medium.get("schema", {}), components)
    document["components"] = {"schemas": dict(sorted(components.items()))}
    _bound_tokens(document, vocab_size)
    if key_needed:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for name, path in document["paths"].items():
            if not is_open(name):
                for operation in path.values():
                    operation["security"] = [{"key": []}]
    return document


def _contents(operation: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [operation["requestBody"]] if "requestBody" in operation else []
    return [part["content"] for part in (*parts, *operation["responses"].values()) if "content" in part]


def _hoist(schema: dict[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    """Moves named schemas to the components, so that the document holds each once. Two of one name must be the same one."""
    schema = dict(schema)
    for name, definition in schema.pop("$defs", {}).items():
        _define(name, definition, components)
    name = schema.get("title", "")
    if schema.get("type") != "object" or not name.isidentifier() or "properties" not in schema:
        return schema
    _define(name, schema, components)
    return {"$ref": _REFERENCES.format(model=name)}


def _define(name: str, definition: dict[str, Any], components: dict[str, Any]) -> None:
    if components.setdefault(name, definition) != definition:
        raise ValueError(f"two schemas of the API are called {name}")


def _bound_tokens(node: Any, vocab_size: int | None) -> None:
    """Token ids end where the model's vocabulary does."""
    if isinstance(node, dict):
        if node.pop(_TOKEN, None) and vocab_size:
            node["maximum"] = vocab_size - 1
        for value in node.values():
            _bound_tokens(value, vocab_size)
    elif isinstance(node, list):
        for value in node:
            _bound_tokens(value, vocab_size)


# --------------------------------------------------------------------------------------------------- OpenAI's answers


class CachedTokens(Shape):
    cached_tokens: int


class ReasoningTokens(Shape):
    reasoning_tokens: int


class UsageShape(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens | None = None


class FunctionShape(Shape):
    name: str
    arguments: str


class ToolCallShape(Shape):
    id: str
    type: str
    function: FunctionShape


class MessageShape(Shape):
    role: str
    content: str | None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallShape] | None = None


class ChatChoice(Shape):
    index: int
    message: MessageShape
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: int | str | None


class ChatCompletion(Shape):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageShape


class CompletionChoice(Shape):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: int | str | None


class Completion(Shape):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageShape


class Model(Shape):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(Shape):
    object: str
    data: list[Model]


class State(Shape):
    status: str


class Version(Shape):
    version: str


class Deleted(Shape):
    id: str
    object: str
    deleted: bool
