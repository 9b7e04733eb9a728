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
from starlette.routing import Match, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from miniinfer import __version__
from miniinfer.engine.client import EngineAsleepError, EngineDeadError
from miniinfer.serve import (
    anthropic,
    batches,
    embeddings,
    files,
    loads,
    models,
    ollama,
    openai,
    prefixes,
    responses,
    sglang,
    sleep,
    tokens,
    web,
)
from miniinfer.serve.admission import Guard
from miniinfer.serve.answers import encode
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.metrics import CONTENT_TYPE, render
from miniinfer.serve.protocol import ApiError
from miniinfer.serve.record import Recorder
from miniinfer.serve.schemas import State, Version, described, openapi
from miniinfer.serve.service import as_api_error
from miniinfer.serve.storage import Store


def build_app(fleet: Fleet) -> FastAPI:
    """The application over a server's models."""
    store = Store(fleet.config)
    batched = batches.Batches(fleet, store)
    prefix = fleet.config.root_path
    app = FastAPI(openapi_url=None, lifespan=batched.running, redirect_slashes=not prefix)  # a redirect would not have the prefix

    async def on_error(http: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=499)  # nobody is there to read it
        shown = _as_refusal(error) if isinstance(error, RequestValidationError) else as_api_error(error)
        if shown.status == 404 and isinstance(error, HTTPException):
            shown.message = f"there is no {http.url.path} here"
        metrics = getattr(http.state, "metrics", None) or fleet.default.metrics  # of the model, once it is known which
        metrics.refused[str(shown.status)] += 1
        body = next((shape(shown) for prefix, shape in _SHAPES if http.url.path.startswith(prefix)), shown).body()
        return Response(body, shown.status, shown.headers, "application/json")

    for kind in (ApiError, RequestValidationError, ClientDisconnect, EngineAsleepError, EngineDeadError, HTTPException, Exception):
        app.add_exception_handler(kind, on_error)
    app.add_middleware(Guard, keys=fleet.keys, refuse=on_error)
    if fleet.config.cors_origin:  # outside the guard: a browser's question whether it may ask carries no key
        exposed = ["x-request-id", "retry-after"]
        app.add_middleware(CORSMiddleware, allow_origins=fleet.config.cors_origin, allow_methods=["*"], allow_headers=["*"], expose_headers=exposed)
    app.add_middleware(Heads)
    app.add_middleware(Recorder, sinks=fleet.sinks)
    if prefix:
        app.add_middleware(Unprefixed, prefix=prefix, router=app.router)

    @cache
    def document() -> bytes:
        return encode(openapi(app, fleet.default.engine.info.get("vocab_size"), fleet.config.guarded, prefix))

    control = _control(fleet)

    @control.get("/openapi.json", include_in_schema=False)
    async def description() -> Response:
        return Response(document(), media_type="application/json")

    closed = (
        openai.router(fleet),
        prefixes.router(fleet),
        embeddings.router(fleet),
        files.router(fleet, store),
        batches.router(fleet, batched),
        responses.router(fleet),
        tokens.router(fleet),
        anthropic.router(fleet),
        ollama.router(fleet),
        sglang.router(fleet),
        sleep.router(fleet),
        loads.router(fleet),
        models.router(fleet),
        control,
    )
    for routes in closed:
        app.include_router(routes)
    app.include_router(_state(fleet))
    app.include_router(web.router())
    return app


class Heads:
    """ASGI middleware: HEAD, by which clients and watchdogs ask whether something is there, is GET; the HTTP server leaves out the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope, receive, send)


class Unprefixed:
    """ASGI middleware: paths lose the prefix that a reverse proxy has left on them. One that strips it may leave a path of ours that begins alike."""

    def __init__(self, app: ASGIApp, prefix: str, router: Router) -> None:
        self._app, self._prefix, self._router = app, prefix, router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path.startswith(self._prefix + "/") and all(route.matches(scope)[0] is Match.NONE for route in self._router.routes):
            raw = scope.get("raw_path") or b""
            scope = {**scope, "path": path.removeprefix(self._prefix), "raw_path": raw.removeprefix(self._prefix.encode())}
        await self._app(scope, receive, send)


_SHAPES = (("/v1/messages", anthropic.AnthropicError), ("/api/", ollama.OllamaError))  # paths whose errors are not in OpenAI's shape


def _as_refusal(error: RequestValidationError) -> ApiError:
    """A bad query parameter, as every other bad field."""
    first = error.errors()[0]
    field = [part for part in first["loc"] if isinstance(part, str)][-1]  # behind it numbers, in a list
    return ApiError(400, f"{field}: {first['msg'].removeprefix('Input ')}", param=field)


def _control(fleet: Fleet) -> APIRouter:
    """Commands to the engine."""
    routes = APIRouter()

    @routes.post("/start_profile", **described())
    async def start_profile(model: str | None = None) -> Response:
        return await (await fleet.service(model)).control("start_profile")

    @routes.post("/stop_profile", **described())
    async def stop_profile(model: str | None = None) -> Response:
        return await (await fleet.service(model)).control("stop_profile")

    return routes


def _state(fleet: Fleet) -> APIRouter:
    """What the server says of itself to whoever asks."""
    routes = APIRouter()

    @routes.get("/live", **described(answer=State))
    async def live() -> Response:
        return JSONResponse({"status": "ok"})

    @routes.get("/ready", **described(answer=State, error=State))
    @routes.get("/health", **described(answer=State, error=State))
    @routes.get("/ping", **described(answer=State, error=State))
    @routes.post("/ping", **described(answer=State, error=State))  # as SageMaker and vLLM have it
    async def ready() -> Response:
        """Does the server take work."""
        return JSONResponse({"status": fleet.status}, 200 if fleet.status == "ok" else 503)

    @routes.get("/version", **described(answer=Version))
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @routes.get("/metrics", **described(answer=str, media="text/plain"))
    async def prometheus(names: Literal["vllm", "plain"] = "vllm") -> Response:
        """Names are vLLM's (vllm:...) where it has the metric or, if plain, all miniinfer_..., as Prometheus's own lint wants them."""
        return Response(render(fleet.metrics(), names == "plain"), media_type=CONTENT_TYPE)

    return routes
