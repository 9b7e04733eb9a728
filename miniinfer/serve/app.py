"""The ASGI application: every API's routes, the server's own, and every error in OpenAI's shape. Owns their assembly."""

from __future__ import annotations

from fastapi import APIRouter, Depends, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from miniinfer import __version__
from miniinfer.engine.client import EngineDeadError
from miniinfer.serve import openai
from miniinfer.serve.metrics import CONTENT_TYPE
from miniinfer.serve.protocol import ApiError
from miniinfer.serve.service import Service, as_api_error


def build_app(service: Service) -> FastAPI:
    """The application over one service."""
    app = FastAPI(openapi_url=None)

    async def on_error(http: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=499)  # nobody is there to read it
        shown = as_api_error(error)
        if shown.status == 404 and isinstance(error, HTTPException):
            shown.message = f"there is no {http.url.path} here"
        service.metrics.refused[str(shown.status)] += 1
        return Response(shown.body(), shown.status, shown.headers, "application/json")

    for kind in (ApiError, ClientDisconnect, EngineDeadError, HTTPException, Exception):
        app.add_exception_handler(kind, on_error)
    for routes in (openai.router(service), _control(service)):
        app.include_router(routes, dependencies=[Depends(service.authorize)])
    app.include_router(_state(service))
    return app


def _control(service: Service) -> APIRouter:
    """Commands to the engine."""
    routes = APIRouter()

    @routes.post("/start_profile")
    async def start_profile() -> Response:
        return await service.control("start_profile")

    @routes.post("/stop_profile")
    async def stop_profile() -> Response:
        return await service.control("stop_profile")

    return routes


def _state(service: Service) -> APIRouter:
    """What the server says of itself to whoever asks."""
    routes = APIRouter()

    @routes.get("/live")
    async def live() -> Response:
        return JSONResponse({"status": "ok"})

    @routes.get("/ready")
    @routes.get("/health")
    async def ready() -> Response:
        """Does the server take work."""
        status = "draining" if service.draining else "ok" if service.engine.is_alive else "engine dead"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @routes.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @routes.get("/metrics")
    async def prometheus() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    return routes
