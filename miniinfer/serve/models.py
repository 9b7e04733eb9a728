"""Models as clients see and change them: OpenAI's list, llama.cpp's load and unload, and the registry of versions and aliases.

Owns these routes and their bodies. Names and memory are fleet.py's.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from miniinfer.config import ConfigError
from miniinfer.serve.fleet import Fleet, Member
from miniinfer.serve.protocol import ApiError, Strict
from miniinfer.serve.schemas import Deleted, Model, ModelList, Shape, described
from miniinfer.serve.specs import below, make_spec


class NamedModel(Strict):
    """Which model something is to be done to."""

    model: str


class Registration(Strict):
    """A new model: its name, perhaps with a version (chat:2), its folder below the server's models_dir, and options as in --model."""

    model: str
    path: str
    options: dict[str, Any] = {}


class Activation(Strict):
    """The version that a model's bare name is to mean. The one before is unloaded once its requests have ended, unless it is to be kept."""

    model: str
    keep_previous: bool = False


class Alias(Strict):
    """Another name for a model, or for whichever version of it is active."""

    alias: str
    model: str


class Done(Shape):
    success: bool
    model: str
    status: dict[str, Any]


def router(fleet: Fleet) -> APIRouter:
    """The routes below /v1/models and /models."""
    routes = APIRouter()

    @routes.get("/v1/models", **described(answer=ModelList))
    @routes.get("/models", **described(answer=ModelList))
    async def models() -> Response:
        cards = [_shown(card) for card in fleet.cards()]
        ends = {"first_id": cards[0]["id"], "last_id": cards[-1]["id"], "has_more": False}
        return JSONResponse({"object": "list", "data": cards, **ends})

    @routes.get("/v1/models/{model:path}", **described(answer=Model))
    async def one_model(model: str) -> Response:
        return JSONResponse(_shown(fleet.find(model).card(model)))

    @routes.delete("/v1/models/{model:path}", **described(answer=Deleted))
    async def forget(model: str) -> Response:
        """Takes an alias, or a model that is no longer active, out of the registry."""
        await fleet.remove(model)
        return JSONResponse({"id": model, "object": "model", "deleted": True})

    @routes.post("/models/load", **described(NamedModel, Done))
    async def load(http: Request) -> Response:
        """Brings a model into memory, which a request for it would do as well."""
        member = await _named(fleet, http)
        await fleet.load(member)
        return _done(member)

    @routes.post("/models/unload", **described(NamedModel, Done))
    async def unload(http: Request) -> Response:
        """Ends a model's engine once its requests have ended; the next request brings it back."""
        member = await _named(fleet, http)
        if not fleet.changes:
            raise ApiError(400, "model: a server's only model stays; see --model and --model-idle-seconds", param="model")
        await fleet.unload(member)
        return _done(member)

    @routes.post("/models/register", **described(Registration, Done))
    async def register(http: Request) -> Response:
        asked: Registration = await fleet.body(http, Registration)
        if fleet.config.models_dir is None:
            raise ApiError(400, "path: the server registers models only below a folder of its own; start it with --models-dir", param="path")
        try:
            folder = await asyncio.to_thread(below, fleet.config.models_dir, asked.path)
            spec = make_spec(asked.model, folder, asked.options, fleet.find(None).config, fleet.config)
        except ConfigError as e:
            raise ApiError.from_value_error(ValueError(str(e))) from None
        return _done(fleet.add(Member(spec.name, spec.engine, spec.server)))

    @routes.post("/models/activate", **described(Activation, Done))
    async def activate(http: Request) -> Response:
        """From now on a model's bare name means this version. It is loaded first, and requests under way end where they began: none fails."""
        asked: Activation = await fleet.body(http, Activation)
        member = fleet.find(asked.model)
        await fleet.activate(member, asked.keep_previous)
        return _done(member)

    @routes.post("/models/alias", **described(Alias, Done))
    async def alias(http: Request) -> Response:
        asked: Alias = await fleet.body(http, Alias)
        fleet.alias(asked.alias, asked.model)
        return _done(fleet.find(asked.alias))

    return routes


def _shown(card: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's and Anthropic's words for a model in one object: clients of each ask at the same address."""
    created = datetime.fromtimestamp(card["created"], UTC).isoformat().replace("+00:00", "Z")
    about = {"type": "model", "display_name": card["id"], "created_at": created, "lifecycle": "active"}
    return {**card, **about, "max_input_tokens": card["max_model_len"]}


async def _named(fleet: Fleet, http: Request) -> Member:
    asked: NamedModel = await fleet.body(http, NamedModel)
    return fleet.find(asked.model)


def _done(member: Member) -> Response:
    return JSONResponse({"success": True, "model": member.name, "status": {"value": member.state}})
