"""The API over gRPC, as an option: generate, embed, model info, and gRPC's standard health service. Owns its messages' meaning and its statuses.

The same engine, admission and keys as over HTTP. Messages come from proto/api.binpb, compiled from the .proto files beside it, so that neither
generated code nor its compiler's version matters. Imported only where the option is given: grpcio and protobuf are the extra miniinfer[grpc].
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec

from miniinfer import __version__
from miniinfer.config import ConfigError
from miniinfer.data import CompletionOutput, SamplingParams
from miniinfer.serve.admission import caller, identify
from miniinfer.serve.answers import Answer, Prompt
from miniinfer.serve.embeddings import EmbeddingAnswer, EmbeddingRequest
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.protocol import ApiError, CompletionRequest, checked
from miniinfer.serve.record import begin, current, finish
from miniinfer.serve.service import Service, as_api_error
from miniinfer.utils import get_logger

try:
    import grpc
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
except ImportError as e:
    raise ConfigError(f"grpc_port: needs grpcio and protobuf ({e}); pip install 'miniinfer[grpc]'") from None

log = get_logger(__name__)

DESCRIPTORS = Path(__file__).parent / "proto" / "api.binpb"
SERVICE, HEALTH = "miniinfer.v1.MiniInfer", "grpc.health.v1.Health"
WATCH_SECONDS = 1.0  # how often a watched health is looked at
_STRUCTURED = ("json", "regex", "grammar")
_STATUS = {
    401: grpc.StatusCode.UNAUTHENTICATED, 403: grpc.StatusCode.PERMISSION_DENIED, 404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED, 429: grpc.StatusCode.RESOURCE_EXHAUSTED, 500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}  # fmt: skip


class Api:
    """Every message and method of the .proto files, in a pool of their own: an application may have its own copy of the health service."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.DescriptorPool()
        for file in descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file:
            self._pool.Add(file)

    def message(self, name: str) -> Any:
        """A message's class by its full name."""
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(name))

    def handlers(self, service: str, behaviours: dict[str, Callable[..., Any]]) -> grpc.GenericRpcHandler:
        """A service over its methods' functions."""
        methods = {}
        for method in self._pool.FindServiceByName(service).methods:
            make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
            taken, given = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
            methods[method.name] = make(behaviours[method.name], taken.FromString, given.SerializeToString)
        return grpc.method_handlers_generic_handler(service, methods)


class GrpcAnswer(Answer):
    """Counts; what is sent is made from each delta."""


class GrpcEmbedding(EmbeddingAnswer):
    """Keeps the vector as numbers."""

    @property
    def vector(self) -> list[float]:
        vector: list[float] = msgspec.json.decode(self._vectors[0])
        return vector


class _Methods:
    """What the methods do."""

    def __init__(self, fleet: Fleet, api: Api) -> None:
        self._fleet = fleet
        self._response, self._info = api.message("miniinfer.v1.GenerateResponse"), api.message("miniinfer.v1.ModelInfoResponse")
        self._embedding = api.message("miniinfer.v1.EmbedResponse")
        self._health = api.message("grpc.health.v1.HealthCheckResponse")

    async def generate(self, request: Any, context: Any) -> AsyncGenerator[Any]:
        """Leaving this generator, as a deadline or a cancellation makes us do, aborts the request."""
        with self._recorded(context, "Generate"):
            async with aclosing(self._generate(request, context)) as responses:
                async for response in responses:
                    yield response

    async def _generate(self, request: Any, context: Any) -> AsyncGenerator[Any]:
        try:
            self._identify(context)
            service = await self._fleet.service(request.model or None)
            answer, params = await self._prepare(service, request)
            async with aclosing(service.items(answer, params)) as items:
                async for item in items:
                    for delta in item.outputs:
                        yield self._shown(answer, delta)
        except Exception as e:
            await _fail(context, e)

    async def embed(self, request: Any, context: Any) -> Any:
        with self._recorded(context, "Embed"):
            return await self._embed(request, context)

    async def _embed(self, request: Any, context: Any) -> Any:
        try:
            self._identify(context)
            service = await self._fleet.service(request.model or None)
            service.gate.admit(0)
            prompt = await self._prompt(service, request)
            fields = {field.name: value for field, value in request.ListFields() if field.name in ("pooling", "normalize", "dimensions")}
            asked = checked(EmbeddingRequest, {**fields, "input": [prompt.token_ids]})
            service.check_length(prompt, 0)
            answer = GrpcEmbedding(f"grpc-{uuid.uuid4().hex}", service.model, asked, [prompt], 1, service.engine.tokenizer)
            async with aclosing(service.items(answer, SamplingParams(max_tokens=1))) as items:
                async for _ in items:
                    pass
            usage = {"prompt_tokens": len(prompt.token_ids), "cached_tokens": prompt.cached_tokens}
            return self._embedding(embedding=answer.vector, usage=usage)
        except Exception as e:
            await _fail(context, e)

    async def model_info(self, request: Any, context: Any) -> Any:
        try:
            self._identify(context)
            service = await self._fleet.service(None)
        except Exception as e:
            await _fail(context, e)
        info = service.engine.info
        return self._info(model=service.model, max_model_len=info["max_model_len"], vocab_size=info["vocab_size"], server_version=__version__)

    async def check(self, request: Any, context: Any) -> Any:
        if request.service not in ("", SERVICE, HEALTH):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service!r}")
        return self._health(status=self._state())

    async def watch(self, request: Any, context: Any) -> AsyncGenerator[Any]:
        """The state, and then every change of it."""
        known, last = request.service in ("", SERVICE, HEALTH), None
        while True:
            state = self._state() if known else "SERVICE_UNKNOWN"
            if state != last:
                last = state
                yield self._health(status=state)
            await asyncio.sleep(WATCH_SECONDS)

    def _state(self) -> str:
        return "SERVING" if self._fleet.status == "ok" else "NOT_SERVING"

    def _identify(self, context: Any) -> None:
        """Whose call it is, as the guard of HTTP finds out."""
        caller.set(identify(self._fleet.keys, _headers(context)))

    @contextmanager
    def _recorded(self, context: Any, method: str) -> Iterator[None]:
        """A line in the log and a span, as requests over HTTP have; the status is HTTP's for the same end."""
        client = re.fullmatch(r"ipv[46]:\[?([^\]]*?)\]?(:\d+)?", unquote(context.peer()))
        record, _ = begin("gRPC", f"/{SERVICE}/{method}", client[1] if client else None, _headers(context))
        current.set(record)  # the call's task is its own, so there is nothing to put back
        try:
            yield
            record.status = 200
        except BaseException as e:
            record.status = record.status or (499 if isinstance(e, asyncio.CancelledError | GeneratorExit) else 500)  # others: `_fail` has set it
            raise
        finally:
            finish(record, self._fleet.sinks)

    async def _prepare(self, service: Service, request: Any) -> tuple[GrpcAnswer, SamplingParams]:
        """The request as a completion, which has its checks."""
        service.gate.admit(0)
        prompt = await self._prompt(service, request)
        sampling = {field.name: value if not field.is_repeated else list(value) for field, value in request.sampling.ListFields()}
        wanted = {name: sampling.pop(name) for name in _STRUCTURED if name in sampling}
        fields = sampling | ({"structured_outputs": wanted} if wanted else {}) | {"priority": request.priority, "cache_salt": request.cache_salt}
        checked_fields = checked(CompletionRequest, {**fields, "prompt": [prompt.token_ids]})
        params = checked_fields.params(service.defaults)
        service.check_length(prompt, params.max_tokens)
        return GrpcAnswer(f"grpc-{uuid.uuid4().hex}", service.model, checked_fields, [prompt], params.n, service.engine.tokenizer), params

    async def _prompt(self, service: Service, request: Any) -> Prompt:
        """The prompt in any of its forms."""
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise ApiError(400, "prompt: one of text, token_ids and conversation must be set", param="prompt")
        if kind == "conversation":
            return await service.chat_prompt([{"role": message.role, "content": message.content} for message in request.conversation.messages])
        if kind == "text":
            return Prompt(await service.encode(request.text, True, "text"), request.text)
        return Prompt(list(request.token_ids.ids))

    def _shown(self, answer: GrpcAnswer, delta: CompletionOutput) -> Any:
        response = self._response(index=delta.index, text=delta.text, token_ids=delta.token_ids, finish_reason=delta.finish_reason or "")
        if delta.logprobs is not None:
            response.logprobs.extend(table[token].logprob for token, table in zip(delta.token_ids, delta.logprobs, strict=True))
        if delta.finish_reason is not None:
            (prompt,) = answer.prompts
            usage = response.usage
            usage.prompt_tokens, usage.cached_tokens = len(prompt.token_ids), prompt.cached_tokens
            usage.completion_tokens = answer.completion_tokens
            response.stop_reason = "" if delta.stop_reason is None else str(delta.stop_reason)
        return response


def _headers(context: Any) -> dict[bytes, bytes]:
    """A call's metadata, of several with one name the first."""
    return {key.encode(): value.encode() if isinstance(value, str) else value for key, value in reversed(context.invocation_metadata())}


async def _fail(context: Any, error: Exception) -> None:
    """Ends a call with the status that stands for the error. What gRPC raises to end a call goes through."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    shown = as_api_error(error)
    if (record := current.get()) is not None:
        record.status = shown.status
    if shown.status == 500:
        log.error("a gRPC call failed", exc_info=error)
    wait = (shown.headers or {}).get("retry-after")
    await context.abort(_STATUS.get(shown.status, grpc.StatusCode.INVALID_ARGUMENT), shown.message, (("retry-after", wait),) if wait else ())


async def start(fleet: Fleet, host: str, port: int) -> tuple[Any, int]:
    """A running gRPC server and its port. ConfigError if the port is taken."""
    api = Api()
    methods = _Methods(fleet, api)
    options = [("grpc.max_receive_message_length", fleet.config.max_body_mib << 20), ("grpc.so_reuseport", 0)]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers(
        (
            api.handlers(SERVICE, {"Generate": methods.generate, "Embed": methods.embed, "ModelInfo": methods.model_info}),
            api.handlers(HEALTH, {"Check": methods.check, "Watch": methods.watch}),
        )
    )
    try:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        config = fleet.config
        if config.ssl_certfile is not None and config.ssl_keyfile is not None:
            pair = Path(config.ssl_keyfile).read_bytes(), Path(config.ssl_certfile).read_bytes()
            bound = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            bound = server.add_insecure_port(address)
    except RuntimeError as e:
        raise ConfigError(f"grpc_port: cannot listen on {host}:{port} ({e})") from None
    await server.start()
    return server, bound
