"""Sleep and wake-up on command, under vLLM's names and SGLang's. Owns these routes; what sleeps and how is the engine's, and models that a fleet
puts away by itself are fleet.py's.

A model that was put to sleep here refuses requests (503) until it is woken up here: its memory is wanted for something else, such as training.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from miniinfer.config import ConfigError
from miniinfer.engine.client import EngineAsleepError, EngineDeadError
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.protocol import ApiError, Strict, parse
from miniinfer.serve.schemas import Shape, described
from miniinfer.serve.service import read_body

Part = Literal["weights", "kv_cache"]
Level = Literal["1", "2"]  # of a query, which is text


class MemoryRequest(Strict):
    """/release_memory_occupation and /resume_memory_occupation: which parts, if not all, and of which model, if not the first."""

    tags: list[Part] | None = None
    model: str | None = None


class SleepState(Shape):
    """After a change: what sleeps (level 0: nothing), and bytes of device memory that were given back or taken."""

    level: int
    bytes: int


class IsSleeping(Shape):
    is_sleeping: bool


_MEMORY = described(MemoryRequest, SleepState)
_MEMORY["openapi_extra"]["requestBody"]["required"] = False


def router(fleet: Fleet) -> APIRouter:
    routes = APIRouter()

    @routes.post("/sleep", **described(answer=SleepState))
    async def sleep(level: Level = "1", mode: Literal["wait", "abort"] = "wait", model: str | None = None) -> Response:
        """Gives the model's memory back, until /wake_up. Level 1 keeps the weights in host memory, level 2 reads them from the checkpoint again. New
        requests get 503; those that are open end first, or with mode abort at once."""
        return await _sleep(fleet, model, int(level), mode, None)

    @routes.post("/wake_up", **described(answer=SleepState))
    async def wake_up(tags: Annotated[list[Part] | None, Query()] = None, model: str | None = None) -> Response:
        """Undoes /sleep, for everything or for the parts that are named."""
        return await _wake_up(fleet, model, tags)

    @routes.get("/is_sleeping", **described(answer=IsSleeping))
    async def is_sleeping(model: str | None = None) -> Response:
        """Is a model asleep, be it in part."""
        member = fleet.find(model)
        return JSONResponse({"is_sleeping": member.service is not None and member.service.engine.is_sleeping})

    @routes.post("/release_memory_occupation", **_MEMORY)
    async def release(http: Request) -> Response:
        """As /sleep: the weights stay in host memory."""
        request = await _read(fleet, http)
        return await _sleep(fleet, request.model, 1, "wait", request.tags)

    @routes.post("/resume_memory_occupation", **_MEMORY)
    async def resume(http: Request) -> Response:
        """As /wake_up."""
        request = await _read(fleet, http)
        return await _wake_up(fleet, request.model, request.tags)

    return routes


async def _read(fleet: Fleet, http: Request) -> MemoryRequest:
    """The checked body, which may be empty."""
    return parse(MemoryRequest, await read_body(http, fleet.config.max_body_mib) or b"{}")


async def _sleep(fleet: Fleet, model: str | None, level: int, mode: str, tags: list[Part] | None) -> Response:
    member = fleet.find(model)
    if member.service is None or member.state != "loaded":
        raise ApiError(400, f"model: '{member.name}' is not in memory", param="model")
    return await _outcome(member.service.engine.sleep(level, mode, tags))


async def _wake_up(fleet: Fleet, model: str | None, tags: list[Part] | None) -> Response:
    member = fleet.find(model)
    await fleet.load(member)
    assert member.service is not None
    return await _outcome(member.service.engine.wake_up(tags))


async def _outcome(change: Awaitable[dict[str, Any]]) -> Response:
    try:
        return JSONResponse(await change)
    except ConfigError as e:  # a new process could not start, or the checkpoint has gone
        raise ApiError(503, f"the model is still asleep: {e}") from None
    except ValueError as e:
        raise ApiError.from_value_error(e) from None
    except (EngineDeadError, EngineAsleepError):
        raise
    except (RuntimeError, OSError) as e:
        raise ApiError(503, f"the model stays as it was: {e}") from None
