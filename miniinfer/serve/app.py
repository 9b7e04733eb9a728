"""The ASGI application: every API's routes, the server's own, and every error in its API's shape. Owns their assembly."""

from __future__ import annotations

from functools import cache
from typing import Literal

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from miniinfer import __version__
from miniinfer.engine.client import EngineDeadError
from miniinfer.serve import (
    anthropic,
    embeddings,
    loads,
    ollama,
    openai,
    responses,
    sglang,
    tokens,
    web,
)
from miniinfer.serve.admission import Guard
from miniinfer.serve.answers import encode
from miniinfer.serve.metrics import CONTENT_TYPE, render
from miniinfer.serve.protocol import ApiError
from miniinfer.serve.record import Recorder
from miniinfer.serve.schemas import State, Version, described, openapi
from miniinfer.serve.service import Service, as_api_error


def build_app(service: Service) -> FastAPI:
    """The application over one service."""
    app = FastAPI(openapi_url=None)

    async def on_error(http: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=499)  # nobody is there to read it
        shown = _as_refusal(error) if isinstance(error, RequestValidationError) else as_api_error(error)
        if shown.status == 404 and isinstance(error, HTTPException):
            shown.message = f"there is no {http.url.path} here"
        service.metrics.refused[str(shown.status)] += 1
        body = next((shape(shown) for prefix, shape in _SHAPES if http.url.path.startswith(prefix)), shown).body()
        return Response(body, shown.status, shown.headers, "application/json")

    for kind in (ApiError, RequestValidationError, ClientDisconnect, EngineDeadError, HTTPException, Exception):
        app.add_exception_handler(kind, on_error)
    app.add_middleware(Guard, keys=service.keys, refuse=on_error)
    if service.config.cors_origin:  # outside the guard: a browser's question whether it may ask carries no key
        exposed = ["x-request-id", "retry-after"]
        app.add_middleware(CORSMiddleware, allow_origins=service.config.cors_origin, allow_methods=["*"], allow_headers=["*"], expose_headers=exposed)
    app.add_middleware(Recorder, sinks=service.sinks)

    @cache
    def document() -> bytes:
        return encode(openapi(app, service.engine.info.get("vocab_size"), service.config.guarded))

    control = _control(service)

    @control.get("/openapi.json", include_in_schema=False)
    async def description() -> Response:
        return Response(document(), media_type="application/json")

    closed = (
        openai.router(service),
        embeddings.router(service),
        responses.router(service),
        tokens.router(service),
        anthropic.router(service),
        ollama.router(service),
        sglang.router(service),
        loads.router(service),
        control,
    )
    for routes in closed:
        app.include_router(routes)
    app.include_router(_state(service))
    app.include_router(web.router())
    return app


_SHAPES = (("/v1/messages", anthropic.AnthropicError), ("/api/", ollama.OllamaError))  # paths whose errors are not in OpenAI's shape


def _as_refusal(error: RequestValidationError) -> ApiError:
    """A bad query parameter, as every other bad field."""
    first = error.errors()[0]
    field = str(first["loc"][-1])
    return ApiError(400, f"{field}: {first['msg'].removeprefix('Input ')}", param=field)


def _control(service: Service) -> APIRouter:
    """Commands to the engine."""
    routes = APIRouter()

    @routes.post("/start_profile", **described())
    async def start_profile() -> Response:
        return await service.control("start_profile")

    @routes.post("/stop_profile", **described())
    async def stop_profile() -> Response:
        return await service.control("stop_profile")

    return routes


def _state(service: Service) -> APIRouter:
    """What the server says of itself to whoever asks."""
    routes = APIRouter()

    @routes.get("/live", **described(answer=State))
    async def live() -> Response:
        return JSONResponse({"status": "ok"})

    @routes.get("/ready", **described(answer=State, error=State))
    @routes.get("/health", **described(answer=State, error=State))
    async def ready() -> Response:
        """Does the server take work."""
        engine = service.engine
        status = "draining" if service.draining else "engine dead" if not engine.is_alive else "restarting" if engine.restarting else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @routes.get("/version", **described(answer=Version))
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @routes.get("/metrics", **described(answer=str, media="text/plain"))
    async def prometheus(names: Literal["vllm", "plain"] = "vllm") -> Response:
        """Names are vLLM's (vllm:...) where it has the metric or, if plain, all miniinfer_..., as Prometheus's own lint wants them."""
        return Response(render([service.metrics], names == "plain"), media_type=CONTENT_TYPE)

    return routes
